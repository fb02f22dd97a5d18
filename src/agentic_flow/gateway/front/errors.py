"""Errors as the vendors write them, with the statuses that their SDKs act on.

The table of `core.errors` says what an error is to anybody; here a provider's refusal gets back the status
that the caller would have seen at the vendor, where the caller can do something about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import orjson

from agentic_flow.core.errors import (
    ROWS,
    AgenticFlowError,
    ProviderOverloaded,
    ProviderRejected,
    RateLimited,
    Unauthenticated,
    UnknownModel,
    as_anthropic,
    as_openai,
    as_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.gateway.limits import OverLimit

# What the caller wrote is at fault; other refusals concern the gateway's own account or address.
_CALLERS_FAULT = frozenset({400, 413, 422})
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class FrontError(AgenticFlowError):
    """An error on its way to a vendor's client, with the status that it has there.

    Args:
        error: What happened.
        wire: The client's format.
    """

    def __init__(self, error: AgenticFlowError, wire: str) -> None:
        super().__init__(
            error.message, hint=error.hint, retry_after_s=error.retry_after_s, details=error.details
        )
        self.cause = error
        self.wire = wire
        self.code = error.code
        self.retryable = error.retryable
        if isinstance(error, OverLimit):
            self.answer_headers = error.headers(wire)

    @property
    def status(self) -> int:
        return status_of(self.cause, self.wire)


def status_of(error: AgenticFlowError, wire: str) -> int:
    """The HTTP status of an error for clients of a format."""
    last = error.details.get("last_status")
    if isinstance(error, ProviderOverloaded):
        return (529 if wire == "anthropic" else 503) if last == 529 else 429
    if isinstance(error, ProviderRejected) and last in _CALLERS_FAULT:
        return cast(int, last)
    return error.status


def openai_error(error: AgenticFlowError) -> JsonObject:
    """The body of an error at OpenAI-shaped routes: the vendor's own where it sent one."""
    quoted = _quoted(error)
    if quoted is not None:
        return quoted
    shown = as_openai(_cause(error))
    cause, status = _cause(error), status_of(_cause(error), "openai")
    fields = cast(JsonObject, shown["error"])
    fields["param"] = cause.details.get("field")
    if status == 429:
        fields["type"] = "rate_limit_error"
    elif status < 500 and fields["type"] == "server_error":
        fields["type"] = "invalid_request_error"
    for kind, code in (
        (UnknownModel, "model_not_found"),
        (Unauthenticated, "invalid_api_key"),
        (RateLimited | ProviderOverloaded, "rate_limit_exceeded"),
    ):
        if isinstance(cause, kind):
            fields["code"] = code
    return shown


def anthropic_error(error: AgenticFlowError) -> JsonObject:
    """The body of an error at Anthropic-shaped routes: the vendor's own where it sent one."""
    quoted = _quoted(error)
    if quoted is not None:
        return quoted
    cause = _cause(error)
    shown = as_anthropic(cause)
    if isinstance(cause, ProviderOverloaded | ProviderRejected):
        status = status_of(cause, "anthropic")
        shown["error"]["type"] = _ANTHROPIC_TYPES.get(status, ROWS[cause.code].anthropic_type)
    return shown


def models_error(error: AgenticFlowError) -> dict[str, Any]:
    """An error of the model list, which both vendors' clients and our own ask: each finds its fields."""
    return {**as_problem(error), **openai_error(error)}


ERROR_SHAPES: dict[str, Callable[[AgenticFlowError], dict[str, Any]]] = {
    "/v1/chat/completions": openai_error,
    "/v1/responses": openai_error,
    "/v1/embeddings": openai_error,
    "/v1/messages": anthropic_error,
    "/v1/messages/count_tokens": anthropic_error,
    "/v1/models": models_error,
    "/v1/models/": models_error,
}
"""Path, or its beginning with a slash at the end → the shape of an error there."""


def _cause(error: AgenticFlowError) -> AgenticFlowError:
    return error.cause if isinstance(error, FrontError) else error


def _quoted(error: AgenticFlowError) -> JsonObject | None:
    """The vendor's own words about a request that passed through to it."""
    text = error.details.get("answer_body")
    if not isinstance(text, str):
        return None
    # The gateway's key and its account are not the caller's business.
    if not isinstance(_cause(error), UnknownModel) and error.details.get("last_status") not in _CALLERS_FAULT:
        return None
    try:
        value: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return cast(JsonObject, value) if isinstance(value, dict) and "error" in value else None
