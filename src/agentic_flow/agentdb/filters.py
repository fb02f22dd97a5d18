"""Metadata filters compiled to SQL. Pure: nothing of a filter reaches the SQL text, only its bindings.

    {"lang": "py"}                         equal (of the same JSON type; 1 equals 1.0, never true)
    {"size": {"gte": 3, "lt": 9}}          eq ne gt gte lt lte: numbers with numbers, strings with strings
    {"lang": {"in": ["py", "md"]}}         equal to one of them
    {"note": {"exists": true}}             has the key, whatever its value
    {"and": […]} {"or": […]} {"not": {…}}  several keys in one object are joined by and

Keys are the top-level names of the metadata; a key that is absent equals nothing, not even null.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import orjson

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.vectors import Filter

DEPTH_MAX = 16
CONDITIONS_MAX = 500
CHOICES_MAX = 50_000

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "exists")

Compiled = tuple[str, list[Any]]


def compile_filter(where: Filter | None, column: str = "items.metadata") -> Compiled:
    """An SQL condition over a column of JSON text, and its bindings in order.

    Raises:
        InvalidInput: an operator is unknown, a value has the wrong kind, or it is too deep or too large.
    """
    if not where:
        return "1", []
    return _Compiler(column).all_of(where, 1)


class _Compiler:
    def __init__(self, column: str) -> None:
        self._column = column
        self._conditions = 0

    def all_of(self, where: Mapping[str, Any], depth: int) -> Compiled:
        if depth > DEPTH_MAX:
            raise InvalidInput(f"the filter is nested deeper than {DEPTH_MAX!r}", hint="make it flatter")
        return _join(" AND ", "1", [self._entry(key, value, depth) for key, value in where.items()])

    def _entry(self, key: str, value: Any, depth: int) -> Compiled:
        if key in ("and", "or"):
            if not isinstance(value, list | tuple):
                raise InvalidInput(f"the filter's {key!r} is {value!r}", hint="give it a list of filters")
            parts = [self.all_of(_object(key, part), depth + 1) for part in cast(list[Any], value)]
            return _join(" AND ", "1", parts) if key == "and" else _join(" OR ", "0", parts)
        if key == "not":
            sql, bindings = self.all_of(_object(key, value), depth + 1)
            return f"NOT ({sql})", bindings
        if isinstance(value, Mapping):
            tests = cast(Mapping[str, Any], value)
            if not tests:
                raise InvalidInput(f"the filter on {key!r} is empty", hint=f"use one of {_shown(_OPERATORS)}")
            return _join(" AND ", "1", [self._test(key, name, operand) for name, operand in tests.items()])
        return self._test(key, "eq", value)

    def _test(self, key: str, operator: str, operand: Any) -> Compiled:
        self._conditions += 1
        if self._conditions > CONDITIONS_MAX:
            raise InvalidInput(f"the filter has more than {CONDITIONS_MAX!r} conditions", hint="use 'in'")
        if operator == "exists":
            if not isinstance(operand, bool):
                raise InvalidInput(f"'exists' on {key!r} is {operand!r}", hint="give it true or false")
            sql, bindings = self._some(key, "1", [])
            return (sql, bindings) if operand else (f"NOT {sql}", bindings)
        if operator in ("eq", "ne"):
            sql, bindings = self._some(key, *_equal(key, operand))
            return (sql, bindings) if operator == "eq" else (f"NOT {sql}", bindings)
        if operator in _COMPARISONS:
            return self._some(key, *_compared(key, operator, operand))
        if operator == "in":
            return self._some(key, *_one_of(key, operand))
        raise InvalidInput(
            f"{operator!r} (on {key!r}) is no filter operator", hint=f"use one of {_shown(_OPERATORS)}"
        )

    def _some(self, key: str, condition: str, bindings: list[Any]) -> Compiled:
        sql = f"EXISTS (SELECT 1 FROM json_each({self._column}) AS j WHERE j.key = ? AND {condition})"
        return sql, [_text(key), *bindings]


def _join(word: str, empty: str, parts: list[Compiled]) -> Compiled:
    if not parts:
        return empty, []
    bindings = [binding for _, some in parts for binding in some]
    return word.join(f"({sql})" for sql, _ in parts), bindings


def _equal(key: str, value: Any) -> Compiled:
    if value is None:
        return "j.type = 'null'", []
    if isinstance(value, bool):
        return f"j.type = '{'true' if value else 'false'}'", []
    if isinstance(value, str):
        return "j.type = 'text' AND j.atom = ?", [_text(value)]
    return "j.type IN ('integer', 'real') AND j.atom = json_extract(?, '$')", [_number(key, value)]


def _compared(key: str, operator: str, value: Any) -> Compiled:
    sign = _COMPARISONS[operator]
    if isinstance(value, str):
        return f"j.type = 'text' AND j.atom {sign} ?", [_text(value)]
    return f"j.type IN ('integer', 'real') AND j.atom {sign} json_extract(?, '$')", [_number(key, value)]


def _one_of(key: str, choices: Any) -> Compiled:
    if not isinstance(choices, list | tuple):
        raise InvalidInput(f"'in' on {key!r} is {choices!r}", hint="give it a list")
    values = cast(list[Any], choices)
    if len(values) > CHOICES_MAX:
        raise InvalidInput(f"'in' on {key!r} has {len(values)!r} values", hint=f"at most {CHOICES_MAX}")
    texts = [_text(value) for value in values if isinstance(value, str)]
    numbers = [
        orjson.Fragment(_number(key, value))
        for value in values
        if value is not None and not isinstance(value, str | bool)
    ]
    parts: list[Compiled] = [
        _equal(key, value) for value in (None, True, False) if any(value is other for other in values)
    ]
    if texts:
        parts.append(("j.type = 'text' AND j.atom IN (SELECT value FROM json_each(?))", [_json(texts)]))
    if numbers:
        parts.append(
            (
                "j.type IN ('integer', 'real') AND j.atom IN (SELECT value FROM json_each(?))",
                [_json(numbers)],
            )
        )
    sql, bindings = _join(" OR ", "0", parts)
    return f"({sql})", bindings


def _number(key: str, value: Any) -> str:
    """A number as JSON: SQLite then parses both sides of a comparison by the same rule."""
    whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return _json(value)
    raise InvalidInput(
        f"the filter compares {key!r} with {value!r}", hint="compare with a string, number, true, false, null"
    )


def _text(value: str) -> str:
    # SQLite's JSON cannot hold what is no valid Unicode.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{value!r} in the filter is no valid text", hint="send valid Unicode") from None
    return value


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _object(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(f"the filter's {key!r} holds {value!r}", hint="write filters as objects")
    return cast(Mapping[str, Any], value)


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names)


# The meaning of filters, without SQL


def matches(where: Filter | None, metadata: Mapping[str, Any]) -> bool:
    """Whether metadata satisfies a filter that `compile_filter` accepts: the definition in plain Python."""
    for key, value in (where or {}).items():
        if key == "and":
            holds = all(matches(part, metadata) for part in value)
        elif key == "or":
            holds = any(matches(part, metadata) for part in value)
        elif key == "not":
            holds = not matches(value, metadata)
        elif isinstance(value, Mapping):
            tests = cast(Mapping[str, Any], value)
            holds = all(_holds(name, operand, key, metadata) for name, operand in tests.items())
        else:
            holds = _holds("eq", value, key, metadata)
        if not holds:
            return False
    return True


_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}


def _holds(operator: str, operand: Any, key: str, metadata: Mapping[str, Any]) -> bool:
    if operator == "exists":
        return (key in metadata) is operand
    if operator == "ne":
        return not _holds("eq", operand, key, metadata)
    if key not in metadata:
        return False
    value = metadata[key]
    if operator == "in":
        return any(_same(value, choice) for choice in operand)
    if operator == "eq":
        return _same(value, operand)
    return _kind(value) == _kind(operand) != "other" and _ORDER[operator](value, operand)


def _same(value: Any, other: Any) -> bool:
    if value is None or isinstance(value, bool) or other is None or isinstance(other, bool):
        return value is other
    return _kind(value) == _kind(other) != "other" and value == other


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else "other"
