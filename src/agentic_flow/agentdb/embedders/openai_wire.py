"""OpenAI's Embeddings format, both ways. Pure: texts to requests, answers to vectors, refusals to errors.

Source: platform.openai.com/docs/api-reference/embeddings; Retry-After: RFC 9110, section 10.2.3.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.core.errors import (
    AgenticFlowError,
    InvalidInput,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
    UnknownModel,
)

ANSWER_BYTES_PER_NUMBER = 32
"""More than any server writes for one number of a vector, blank space included."""

_MESSAGE_CHARS_MAX = 500
_OVERLOADED = frozenset({429, 529})
_TRANSIENT = frozenset({408, 409, 425})
# In the words of OpenAI and vLLM, Ollama, llama.cpp (which answers 500), text-embeddings-inference.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|too large to process|must have less than \d+ tokens|too long"
    r"|too many tokens|max\w* (?:sequence|input) length|token limit|exceed.{0,40}\btokens\b",
    re.IGNORECASE,
)
_ITEM = re.compile(r"input\[(\d+)\]")
_NO_SUCH_MODEL = re.compile(r"not a valid model|model_not_found|invalid model|unknown model", re.IGNORECASE)
_WITHOUT_DIMENSIONS = re.compile(r"dimensions|matryoshka", re.IGNORECASE)
_WITHOUT_BASE64 = re.compile(r"encoding_format|base64", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one request, and the places that they have in the call."""

    positions: Sequence[int]
    texts: Sequence[str]


class Options(NamedTuple):
    """Optional fields of a request, which not every server takes. `dimensions` None: not sent."""

    dimensions: int | None
    base64: bool


class Said(NamedTuple):
    """What a refusal's body says."""

    message: str
    code: str


def batches(texts: Sequence[str], *, texts_max: int, chars_max: int) -> list[Batch]:
    """Texts in order, in groups of at most so many texts and characters; a longer text goes alone.

    Texts without any sign are left out: the vendor refuses them.
    """
    found: list[Batch] = []
    places: list[int] = []
    chars = 0
    for place, text in enumerate(texts):
        if not text.strip():
            continue
        if places and (len(places) == texts_max or chars + len(text) > chars_max):
            found.append(Batch(places, [texts[each] for each in places]))
            places, chars = [], 0
        places.append(place)
        chars += len(text)
    if places:
        found.append(Batch(places, [texts[each] for each in places]))
    return found


def request_body(model: str, batch: Batch, options: Options) -> bytes:
    """The request.

    Raises:
        InvalidInput: a text is not Unicode (it has lone surrogates).
    """
    body: dict[str, Any] = {"model": model, "input": list(batch.texts)}
    if options.dimensions is not None:
        body["dimensions"] = options.dimensions
    if options.base64:
        body["encoding_format"] = "base64"
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        for place, text in zip(batch.positions, batch.texts, strict=True):
            if not _is_unicode(text):
                raise InvalidInput(
                    f"text {place!r} is not Unicode: it has lone surrogates",
                    hint="decode it with errors='replace'",
                ) from None
        raise


def read_answer(peer: str, body: bytes, count: int) -> NDArray[np.float32]:
    """The vectors of an answer in the order of the texts, of unit length, shape (count, dimension).

    Raises:
        ProviderProtocol: it is broken, incomplete, or holds what is no vector.
    """
    try:
        answer: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _broken(peer, f"broken JSON: {error}") from None
    listed = cast(dict[str, Any], answer).get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        raise _broken(peer, "no list of embeddings")
    entries = cast(list[Any], listed)
    if len(entries) != count:
        raise _broken(peer, f"{len(entries)!r} embeddings for {count!r} texts")
    ordered: list[NDArray[np.float32] | None] = [None] * count
    for entry in entries:
        fields = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        index = fields.get("index")
        if type(index) is not int or not 0 <= index < count or ordered[index] is not None:
            raise _broken(peer, f"an embedding with the index {index!r}, wrong or given twice")
        ordered[index] = _vector(peer, index, fields.get("embedding"))
    vectors = [vector for vector in ordered if vector is not None]
    sizes = {len(vector) for vector in vectors}
    if len(sizes) > 1:
        raise _broken(peer, f"embeddings of different sizes {sorted(sizes)!r}")
    return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)


def _vector(peer: str, index: int, value: Any) -> NDArray[np.float32]:
    """One embedding, base64 of little-endian float32 or a list of numbers, at unit length."""
    try:
        if isinstance(value, str):
            numbers = np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float64)
        else:
            numbers = np.asarray(value, np.float64)
    except (binascii.Error, ValueError, TypeError):
        raise _broken(peer, f"an embedding {index!r} that is neither numbers nor base64 of float32") from None
    if numbers.ndim != 1 or not numbers.size:
        raise _broken(peer, f"an embedding {index!r} of the shape {numbers.shape!r}")
    # In float64, whose squares do not overflow for anything that float32 holds.
    norm = float(np.linalg.norm(numbers))
    if not np.isfinite(norm) or norm == 0:
        raise _broken(peer, f"an embedding {index!r} with {'zeros only' if norm == 0 else 'NaN or infinity'}")
    return (numbers / norm).astype(np.float32)


def lesser(status: int, body: bytes, options: Options) -> Options | None:
    """The options to try instead when a server refuses one of those; None: it refused something else."""
    if status not in (400, 404, 415, 422, 501):
        return None
    said = " ".join(read_refusal(body))
    if options.dimensions is not None and _WITHOUT_DIMENSIONS.search(said):
        return options._replace(dimensions=None)
    if options.base64 and _WITHOUT_BASE64.search(said):
        return options._replace(base64=False)
    return None


def read_refusal(body: bytes) -> Said:
    """Message and code of an error body in OpenAI's shape or one of its imitations."""
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Said(body[: 4 * _MESSAGE_CHARS_MAX].decode("utf-8", "replace").strip(), "")
    fields = cast(dict[str, Any], document) if isinstance(document, dict) else {}
    error = fields.get("error", fields)
    if not isinstance(error, dict):
        return Said(str(error), "")
    inner = cast(dict[str, Any], error)
    message = inner.get("message") or inner.get("detail") or ""
    # FastAPI's validation errors are a list.
    return Said(
        message if isinstance(message, str) else orjson.dumps(message).decode(),
        " ".join(str(inner[name]) for name in ("code", "type") if inner.get(name)),
    )


def error_of(
    peer: str,
    model: str,
    batch: Batch,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    secret: str | None,
    now_s: float,
) -> AgenticFlowError:
    """The error for an answer that is not 200.

    Args:
        peer: Host of the endpoint.
        model: The model that was asked.
        batch: What it was asked with.
        status: HTTP status.
        headers: Response headers, names in lower case.
        body: Its first bytes at least.
        secret: The key in use; servers like to quote it, and it must not travel on.
        now_s: Seconds since the epoch, for a Retry-After that is a date.
    """
    said, code = read_refusal(body)
    if secret:
        said = said.replace(secret, "…")
    said = " ".join(said.split()) or "no explanation"
    said = said if len(said) <= _MESSAGE_CHARS_MAX else f"{said[:_MESSAGE_CHARS_MAX]}…"
    message = f"{peer} answered {status}: {said}"
    details: dict[str, Any] = {"provider": peer, "last_status": status}
    wait_s = retry_after_s(headers, now_s=now_s)
    if status == 402 or "insufficient_quota" in code:
        return ProviderRejected(message, hint=f"the account at {peer} needs credit", details=details)
    if status in _OVERLOADED:
        return ProviderOverloaded(
            message, hint="wait, or raise the limits of the account", retry_after_s=wait_s, details=details
        )
    if status == 413 or _TOO_LONG.search(said):
        text, hint = _shorten(batch, said)
        return TooLarge(message, hint=hint, details={**details, "text": text})
    if status >= 500 or status in _TRANSIENT:
        return ProviderFailed(
            message, hint=f"the fault is on the side of {peer}", retry_after_s=wait_s, details=details
        )
    if status in (401, 403):
        return ProviderRejected(message, hint="check agentdb.embedding.api_key or its file", details=details)
    if status in (400, 404) and (_NO_SUCH_MODEL.search(f"{code} {said}") or (status == 404 and code)):
        return UnknownModel(
            f"{peer} does not embed with the model {model!r}: {said}",
            hint="set agentdb.embedding.model to one that it has",
            details=details,
        )
    if status == 404 or 300 <= status < 400:
        return ProviderRejected(
            message, hint="check agentdb.embedding.base_url: no embeddings there", details=details
        )
    if "batch" in said.lower():
        return ProviderRejected(message, hint="lower agentdb.embedding.batch_max", details=details)
    return ProviderRejected(message, hint=f"{peer} will not take this request as it is", details=details)


def retry_after_s(headers: Mapping[str, str], *, now_s: float) -> float | None:
    """Seconds to wait: OpenAI's `retry-after-ms`, or `retry-after` as seconds or a date."""
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d+(\.\d+)?", milliseconds):
        return float(milliseconds) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.fromtimestamp(now_s, UTC)).total_seconds())


def _shorten(batch: Batch, said: str) -> tuple[int, str]:
    """Place of the text that is too long, named by the server or the longest, and what to do about it."""
    lengths = [len(text) for text in batch.texts]
    named = _ITEM.search(said)
    which = int(named[1]) if named else len(lengths)
    sure = which < len(lengths)
    if not sure:
        which = lengths.index(max(lengths))
    hint = f"split text {batch.positions[which]} of this call ({lengths[which]} characters)"
    if not sure and len(lengths) > 1:
        hint += ", or lower agentdb.embedding.batch_max"
    return batch.positions[which], hint


def _broken(peer: str, what: str) -> ProviderProtocol:
    return ProviderProtocol(
        f"{peer} answered with {what}",
        hint="check that agentdb.embedding.base_url is an OpenAI-compatible endpoint",
        details={"provider": peer},
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
