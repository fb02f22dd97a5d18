"""Results within their size limit: what does not fit is cut at an honest border and said to be cut."""

from __future__ import annotations

from typing import Any, cast

import orjson

from agentic_flow.core.messages import JsonObject

_NOTES = frozenset({"truncated", "more"})


def bound_result(content: JsonObject, max_bytes: int, *, limit_argument: bool) -> tuple[JsonObject, bool]:
    """A result of at most `max_bytes` of JSON, and whether anything had to be cut.

    The largest top-level value is cut first: a list between its elements, a text between characters; an
    object that does not fit is left out whole. A `cursor` goes when a list was cut, since it points behind
    what the caller did not get; asking again with the `limit` that fits gives a true one.

    Args:
        limit_argument: Whether the tool takes `limit`.
    """
    if len(orjson.dumps(content)) <= max_bytes:
        return content, False
    cut: JsonObject = {key: value for key, value in content.items() if key not in _NOTES}
    cut["truncated"] = True
    notes: list[str] = []
    spare: list[str] = [key for key in cut if key not in _NOTES and isinstance(cut[key], list | str | dict)]
    while spare:
        cut["more"] = "; ".join(notes) or "narrow the call"
        over = len(orjson.dumps(cut)) - max_bytes
        if over <= 0:
            break
        sizes = {name: len(orjson.dumps(cut[name])) for name in spare}
        over += 200  # room for the note that follows
        key = max(spare, key=sizes.__getitem__)
        spare.remove(key)
        room = sizes[key] - over
        value: Any = cut[key]
        if isinstance(value, list):
            elements = cast(list[Any], value)
            kept = _leading(elements, room)
            cut[key] = elements[:kept]
            cut.pop("cursor", None)
            again = f"call again with limit={kept}" if limit_argument and kept else "narrow the call"
            notes.append(f"only the first {kept} of {len(elements)} {key} fit: {again}")
        elif isinstance(value, str):
            cut[key] = _leading_text(value, room)
            notes.append(f"{key} was cut to {len(cut[key])} of {len(value)} characters")
        else:
            del cut[key]
            notes.append(f"{key} did not fit")
        spare = [name for name in spare if name in cut]  # a cursor may have gone
    cut["more"] = "; ".join(notes) or "narrow the call"
    if len(orjson.dumps(cut)) > max_bytes:
        return {"truncated": True, "more": "the result does not fit: narrow the call"}, True
    return cut, True


def _leading(elements: list[Any], room: int) -> int:
    """How many leading elements have JSON of at most `room` bytes, brackets included."""
    used = 2
    for count, element in enumerate(elements):
        used += len(orjson.dumps(element)) + 1
        if used > room:
            return count
    return len(elements)


def _leading_text(text: str, room: int) -> str:
    low, high = 0, max(0, min(len(text), room))
    while low < high:
        middle = (low + high + 1) // 2
        if len(orjson.dumps(text[:middle])) <= room:
            low = middle
        else:
            high = middle - 1
    return text[:low]
