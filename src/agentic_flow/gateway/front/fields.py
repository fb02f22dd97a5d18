"""Reading a vendor's request field by field, so that nothing in it is dropped without a word.

Each field is taken once, with its type checked; `finish` refuses by name whatever nobody took. A value of
null counts as absent, as it does at the vendors.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import orjson

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import JsonObject

DEPTH_MAX = 100
"""Deepest nesting of a schema or of tool arguments; JSON writers refuse what is much deeper."""


class Fields:
    """One JSON object of a request and its place in it.

    Args:
        value: The object.
        at: Its path, such as `messages.0`; empty for the whole request.

    Raises:
        InvalidInput: it is no object.
    """

    def __init__(self, value: object, at: str = "") -> None:
        if not isinstance(value, dict):
            raise wrong(at or "body", "must be an object", value)
        self._left = dict(cast(JsonObject, value))
        self._at = at

    def name(self, key: str | int) -> str:
        """The path of a field, as errors name it."""
        return f"{self._at}.{key}" if self._at else str(key)

    def take(self, key: str) -> Any:
        """Any value; None when it is absent."""
        return self._left.pop(key, None)

    def text(self, key: str) -> str | None:
        """A string, None when it is absent."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise wrong(self.name(key), "must be a string", value)
        return value

    def demand(self, key: str) -> str:
        """A string that must be there and say something."""
        value = self.text(key)
        if not value:
            raise wrong(self.name(key), "must be a string that is not empty", value)
        return value

    def flag(self, key: str) -> bool | None:
        """True or false, None when it is absent."""
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise wrong(self.name(key), "must be true or false", value)
        return value

    def number(self, key: str) -> float | None:
        """A finite number, None when it is absent."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong(self.name(key), "must be a number", value)
        return value

    def integer(self, key: str, *, least: int) -> int | None:
        """A whole number of 64 bits from `least` on, None when it is absent."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise wrong(self.name(key), f"must be a whole number, at least {least}", value)
        return value

    def object(self, key: str) -> JsonObject | None:
        """An object that is not nested too deeply, None when it is absent."""
        value = self.take(key)
        return None if value is None else json_object(value, self.name(key))

    def inner(self, key: str) -> Fields | None:
        """The fields of an object, None when it is absent."""
        value = self.take(key)
        return None if value is None else Fields(value, self.name(key))

    def entries(self, key: str) -> list[Fields]:
        """The objects of a list; none when it is absent."""
        value = self.take(key)
        return [] if value is None else list(entries(value, self.name(key)))

    def texts(self, key: str) -> tuple[str, ...]:
        """The strings of a list; none when it is absent."""
        value: object = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(e, str) for e in cast(list[object], value)):
            raise wrong(self.name(key), "must be a list of strings", cast(object, value))
        return tuple(cast(list[str], value))

    def only(self, key: str, *values: object) -> None:
        """Take a field that changes nothing while it has one of these values, and refuse any other."""
        value = self.take(key)
        if value is not None and not any(
            value == allowed and type(value) is type(allowed) for allowed in values
        ):
            raise untranslatable(self.name(key), value)

    def finish(self) -> None:
        """Refuse what is left.

        Raises:
            InvalidInput: names the first field that nobody took.
        """
        for key, value in self._left.items():
            if value is not None:
                raise untranslatable(self.name(key), value)


def entries(value: object, at: str) -> Iterator[Fields]:
    """The objects of a list, with their paths."""
    if not isinstance(value, list):
        raise wrong(at, "must be a list", value)
    for position, entry in enumerate(cast(list[object], value)):
        yield Fields(entry, f"{at}.{position}")


def json_object(value: object, at: str) -> JsonObject:
    """An object that is not nested too deeply."""
    if not isinstance(value, dict):
        raise wrong(at, "must be an object", value)
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return cast(JsonObject, value)
    raise wrong(at, f"is nested deeper than {DEPTH_MAX} levels", cast(object, value))


def _inside(value: object) -> list[Any]:
    held: list[Any] = []
    if isinstance(value, dict):
        held = list(cast(Mapping[str, Any], value).values())
    elif isinstance(value, list):
        held = cast(list[Any], value)
    return [entry for entry in held if isinstance(entry, dict | list)]


def read_body(body: bytes) -> JsonObject:
    """A request's body as an object.

    Raises:
        InvalidInput: it is none.
    """
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is refused: {error}", hint="send valid JSON") from None
    if not isinstance(value, dict):
        raise wrong("body", "must be an object", value)
    return value  # pyright: ignore[reportUnknownVariableType] - a `cast` would be a call for each request


def wrong(field: str, must: str, value: object) -> InvalidInput:
    """The error for a field whose value cannot be right in any case."""
    return InvalidInput(
        f"the field {field!r} {must} (got {reprlib.repr(value)})",
        hint="correct it and send the request again",
        details={"field": field},
    )


def untranslatable(field: str, value: object) -> InvalidInput:
    """The error for a field that the provider's format has no place for."""
    return InvalidInput(
        f"the field {field!r} cannot be translated for this model's provider (got {reprlib.repr(value)})",
        hint="leave it out, or ask a model whose provider speaks this format itself",
        details={"field": field},
    )
