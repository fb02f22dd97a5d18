"""What a provider's HTTP answer means as an error of ours. Pure: status, headers and body in, error out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from agentic_flow.core.errors import (
    AgenticFlowError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderRejected,
    UnknownModel,
)
from agentic_flow.gateway.wire.format import ProviderFault

_MESSAGE_CHARS_MAX = 500
_OVERLOADED = frozenset({429, 529})
_TRANSIENT = frozenset({408, 409, 425})
# OpenRouter and several imitators answer 400 for a model they do not have.
_NO_SUCH_MODEL = re.compile(r"not a valid model|model_not_found|invalid model|unknown model", re.IGNORECASE)


def error_from_answer(
    provider: str,
    model: str,
    status: int,
    headers: Mapping[str, str],
    fault: ProviderFault | None,
    *,
    key_hint: str,
    base_url_hint: str,
    now_s: float,
    secret: str | None = None,
) -> AgenticFlowError:
    """The error for an answer that is not 200.

    Args:
        provider: Its name.
        model: The model that was asked.
        status: HTTP status.
        headers: Response headers, names in lower case.
        fault: The error object in the body, when it held one.
        key_hint: Which variable or setting holds the key.
        base_url_hint: Which variable or setting holds the base URL.
        now_s: Seconds since the epoch, for a Retry-After that is a date.
        secret: The key in use; providers like to quote it, and it must not travel on.
    """
    said = fault.message if fault and fault.message else "no explanation"
    if secret:
        said = said.replace(secret, "…")
    said = said if len(said) <= _MESSAGE_CHARS_MAX else f"{said[:_MESSAGE_CHARS_MAX]}…"
    message = f"{provider} answered {status}: {said}"
    details = {"provider": provider, "last_status": status}
    if status in _OVERLOADED:
        return ProviderOverloaded(
            message,
            hint="wait, or raise the limits of the account",
            retry_after_s=retry_after_s(headers, now_s=now_s),
            details=details,
        )
    if status >= 500 or status in _TRANSIENT:
        return ProviderFailed(
            message,
            hint=f"the fault is on {provider}'s side; try later or another model",
            retry_after_s=retry_after_s(headers, now_s=now_s),
            details=details,
        )
    if status in (401, 403):
        return ProviderRejected(message, hint=f"check the key in {key_hint}", details=details)
    if fault and (status == 404 or (status == 400 and _NO_SUCH_MODEL.search(f"{fault.kind} {said}"))):
        return UnknownModel(
            f"{provider} does not serve model {model!r}: {said}",
            hint="see `agentic-flow models list` for what it serves",
            details=details,
        )
    if status == 404 or 300 <= status < 400:
        return ProviderRejected(message, hint=f"check {base_url_hint}: no API answers there", details=details)
    if status == 402:
        return ProviderRejected(message, hint=f"the account at {provider} needs credit", details=details)
    return ProviderRejected(message, hint=f"{provider} will not take this request as it is", details=details)


def retry_after_s(headers: Mapping[str, str], *, now_s: float) -> float | None:
    """Seconds that the provider asks to wait: `retry-after-ms`, or `retry-after` as seconds or a date.

    Source: RFC 9110, section 10.2.3; the milliseconds form is OpenAI's and Anthropic's.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d+(\.\d+)?", milliseconds):
        return float(milliseconds) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    if not value:
        return None
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.fromtimestamp(now_s, UTC)).total_seconds())
