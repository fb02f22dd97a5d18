"""The list of models in the vendors' shapes. Pure: what the gateway knows in, JSON values out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from agentic_flow.core.errors import InvalidInput, UnknownModel
from agentic_flow.core.messages import JsonObject, ModelInfo

VERSION_HEADER = "anthropic-version"
_PAGE_DEFAULT = 20
_PAGE_MAX = 1000
_UNKNOWN_DATE = "1970-01-01T00:00:00Z"


def openai_model(info: ModelInfo) -> JsonObject:
    """One model as OpenAI lists it, with what we know of it beside. Nobody tells when it was created."""
    return {"object": "model", "created": 0, "owned_by": info.provider, **info.model_dump(mode="json")}


def anthropic_model(info: ModelInfo) -> JsonObject:
    """One model as Anthropic lists it."""
    return {
        "type": "model",
        "id": info.id,
        "display_name": info.id,
        "created_at": _UNKNOWN_DATE,
        "lifecycle": "active",
        "max_input_tokens": info.context_tokens,
    }


def openai_list(found: Sequence[ModelInfo]) -> JsonObject:
    """All of them."""
    return {"object": "list", "data": [openai_model(info) for info in found]}


def anthropic_page(found: Sequence[ModelInfo], query: Mapping[str, str]) -> JsonObject:
    """A page: `limit` of them after `after_id` or before `before_id`.

    Raises:
        InvalidInput: the query is wrong.
    """
    limit = query.get("limit", str(_PAGE_DEFAULT))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= _PAGE_MAX):
        raise InvalidInput(
            f"limit is {limit!r}", hint=f"use a number from 1 to {_PAGE_MAX}", details={"field": "limit"}
        )
    found = _told_apart(found)
    ids = [info.id for info in found]
    first, end = 0, len(ids)
    if (after := query.get("after_id")) is not None:
        first = _position(ids, after, "after_id") + 1
    if (before := query.get("before_id")) is not None:
        end = _position(ids, before, "before_id")
        first = max(first, end - int(limit))
    page = found[first : min(end, first + int(limit))]
    return {
        "data": [anthropic_model(info) for info in page],
        "has_more": (first > 0) if before is not None else first + len(page) < end,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


def find(found: Sequence[ModelInfo], name: str) -> ModelInfo:
    """The listed model of a name, with or without its provider in front.

    Raises:
        UnknownModel: none has it.
    """
    for info in found:
        if name in (info.id, f"{info.provider}:{info.id}"):
            return info
    raise UnknownModel(f"no model {name!r} is listed", hint="see GET /v1/models")


def _told_apart(found: Sequence[ModelInfo]) -> list[ModelInfo]:
    """The models with ids that occur once, for pages begin after one; several providers may serve a name."""
    times = Counter(info.id for info in found)
    named = {
        name: info.model_copy(update={"id": name})
        for info in found
        for name in (info.id if times[info.id] == 1 else f"{info.provider}:{info.id}",)
    }
    return list(named.values())


def _position(ids: Sequence[str], wanted: str, field: str) -> int:
    if wanted not in ids:
        raise InvalidInput(
            f"{field} {wanted!r} names no model", hint="see the list", details={"field": field}
        )
    return ids.index(wanted)
