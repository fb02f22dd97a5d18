"""Filters: parsed once into typed conditions; compiled to SQLite's SQL; and what they mean, in plain Python.

    {"lang": "py"}                         equal (of the same JSON type; 1 equals 1.0, never true)
    {"size": {"gte": 3, "lt": 9}}          eq ne gt gte lt lte: numbers with numbers, strings with strings
    {"lang": {"in": ["py", "md"]}}         equal to one of them
    {"note": {"exists": true}}             has the key, whatever its value
    {"title": {"match": "red fox"}}        a string that contains all of these words, in any order
    {"due": {"before": "2026-11-24T12:00Z"}}   before, after: strictly earlier or later than an instant
    {"and": […]} {"or": […]} {"not": {…}}  several keys in one object are joined by and

Keys are the top-level names of the metadata; a key that is absent equals nothing, not even null. Integers
past 64 bits in metadata count as the float nearest to them.

Words are the runs of letters, digits and underscores (Python's `\\w`) of the text in Unicode's normal form C,
casefolded: "Straße" matches "STRASSE". Whole words: "fox" does not match "foxes".

Instants are numbers of Unix seconds, or RFC 3339 text with Z or an offset, in which seconds may be left out.
A value of metadata that is no instant is neither before nor after any.

Names that begin with @ are fields of the item itself:

    @id                         eq ne in gt gte lt lte, with strings
    @text                       match
    @version                    eq ne in gt gte lt lte, with numbers
    @created_at_s @updated_at_s eq ne in gt gte lt lte, with numbers; before after

A metadata key that itself begins with @ is written with one more: `{"@@type": "Person"}` is about "@type".
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, cast

import apsw
import orjson

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.vectors import Filter, Item

DEPTH_MAX = 16
CONDITIONS_MAX = 500
CHOICES_MAX = 50_000
WORDS_MAX = 64
MATCH_CHARS_MAX = 4096

Operator = Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "exists", "match", "before", "after"]

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_EQUALITIES = ("eq", "ne", "in", *_COMPARISONS)
_INSTANTS = {"before": "<", "after": ">"}
_OPERATORS = ("eq", "ne", *_COMPARISONS, "in", "exists", "match", *_INSTANTS)

_FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "id": ("string", _EQUALITIES),
    "text": ("string", ("match",)),
    "version": ("number", _EQUALITIES),
    "created_at_s": ("number", (*_EQUALITIES, *_INSTANTS)),
    "updated_at_s": ("number", (*_EQUALITIES, *_INSTANTS)),
}
"""Fields of an item that filters know: the kind of their value, and the operators they take."""

Scalar = str | int | float | bool | None
Compiled = tuple[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Test:
    """One comparison.

    Args:
        field: Key of the metadata, or name of the item's field without its @.
        of_item: Which of the two.
        operator: How it is compared.
        operand: With what: a tuple of choices for `in`, a bool for `exists`, a tuple of folded words for
            `match`, Unix seconds for `before` and `after`, else a scalar.
    """

    __test__ = False  # no test case of pytest's

    field: str
    of_item: bool
    operator: Operator
    operand: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class And:
    """All of them; of none, true."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of them; of none, false."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Condition


Condition = Test | And | Or | Not
"""A filter that was found good. Every condition is true or false of every item, never unknown."""


def parse_filter(where: Filter | None) -> Condition:
    """The filter as a condition; None and `{}` are true of every item.

    Raises:
        InvalidInput: an operator or field is unknown, a value has the wrong kind, or it is too deep or large.
    """
    return _Parser().all_of(where or {}, 1)


def compile_filter(where: Filter | None) -> Compiled:
    """An SQL condition over the table `items` of SQLite, and its bindings in order.

    It may call functions that `register_functions` brings. Metadata must be written by orjson.

    Raises:
        InvalidInput: as `parse_filter`.
    """
    return compile_condition(parse_filter(where))


def matches(where: Filter | None, item: Item) -> bool:
    """Whether the item satisfies the filter.

    Raises:
        InvalidInput: as `parse_filter`.
    """
    return holds(parse_filter(where), item)


def uses_metadata(condition: Condition) -> bool:
    """Whether the condition looks at any metadata; without, columns alone decide it."""
    if isinstance(condition, Test):
        return not condition.of_item
    if isinstance(condition, Not):
        return uses_metadata(condition.part)
    return any(uses_metadata(part) for part in condition.parts)


# Parsing


class _Parser:
    def __init__(self) -> None:
        self._conditions = 0

    def all_of(self, where: Mapping[Any, Any], depth: int) -> Condition:
        if depth > DEPTH_MAX:
            raise InvalidInput(f"the filter is nested deeper than {DEPTH_MAX!r}", hint="make it flatter")
        return _and([self._entry(key, value, depth) for key, value in where.items()])

    def _entry(self, key: Any, value: Any, depth: int) -> Condition:
        if not isinstance(key, str):
            raise InvalidInput(f"the filter names {key!r}", hint="names are strings")
        if key in ("and", "or"):
            if not isinstance(value, list | tuple):
                raise InvalidInput(f"the filter's {key!r} is {value!r}", hint="give it a list of filters")
            parts = [self.all_of(_object(key, part), depth + 1) for part in cast(list[Any], value)]
            return _and(parts) if key == "and" else Or(tuple(parts))
        if key == "not":
            return Not(self.all_of(_object(key, value), depth + 1))
        if not isinstance(value, Mapping):
            return self._test(key, "eq", value)
        tests = cast(Mapping[Any, Any], value)
        if not tests:
            raise InvalidInput(f"the filter on {key!r} is empty", hint=f"use one of {_shown(_OPERATORS)}")
        return _and([self._test(key, operator, operand) for operator, operand in tests.items()])

    def _test(self, name: str, operator: Any, operand: Any) -> Condition:
        self._conditions += 1
        if self._conditions > CONDITIONS_MAX:
            raise InvalidInput(f"the filter has more than {CONDITIONS_MAX!r} conditions", hint="use 'in'")
        if operator not in _OPERATORS:
            raise InvalidInput(
                f"{operator!r} (on {name!r}) is no filter operator", hint=f"use one of {_shown(_OPERATORS)}"
            )
        of_item = name.startswith("@") and not name.startswith("@@")
        if not of_item:
            key = name.removeprefix("@")
            if "\0" in key:
                # SQLite takes it for the end of a name; items with such keys are refused as well.
                raise InvalidInput(f"the filter's key {key!r} contains NUL", hint="no metadata key does")
            return Test(_text(key), False, cast(Operator, operator), _operand(name, operator, operand))
        field = name.removeprefix("@")
        if field not in _FIELDS:
            raise InvalidInput(
                f"{name!r} is no field of an item",
                hint=f"use one of {_shown(tuple('@' + known for known in _FIELDS))}; "
                f"write '@{name}' for the metadata key",
            )
        kind, operators = _FIELDS[field]
        if operator not in operators:
            raise InvalidInput(
                f"{operator!r} is no operator for {name!r}", hint=f"use one of {_shown(operators)}"
            )
        parsed = _operand(name, operator, operand)
        for value in parsed if operator == "in" and isinstance(parsed, tuple) else (parsed,):
            if operator in _EQUALITIES and _kind(value) != kind:
                raise InvalidInput(f"the filter compares {name!r} with {value!r}", hint=f"give it a {kind}")
        return Test(field, True, cast(Operator, operator), parsed)


def _and(parts: list[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _operand(name: str, operator: str, operand: Any) -> Scalar | tuple[Scalar, ...]:
    if operator == "exists":
        if not isinstance(operand, bool):
            raise InvalidInput(f"'exists' on {name!r} is {operand!r}", hint="give it true or false")
        return operand
    if operator == "in":
        if not isinstance(operand, list | tuple):
            raise InvalidInput(f"'in' on {name!r} is {operand!r}", hint="give it a list")
        choices = cast(list[Any], operand)
        if len(choices) > CHOICES_MAX:
            raise InvalidInput(f"'in' on {name!r} has {len(choices)!r} values", hint=f"at most {CHOICES_MAX}")
        return tuple(_scalar(name, choice) for choice in choices)
    if operator == "match":
        return _match_words(name, operand)
    if operator in _INSTANTS:
        return _instant(name, operator, operand)
    if operator in _COMPARISONS and (operand is None or isinstance(operand, bool)):
        raise InvalidInput(
            f"{operator!r} compares {name!r} with {operand!r}", hint="compare with a number or a string"
        )
    return _scalar(name, operand)


def _scalar(name: str, value: Any) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    whole = isinstance(value, int) and -(2**63) <= value < 2**63
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InvalidInput(
        f"the filter compares {name!r} with {value!r}",
        hint="compare with a string, number, true, false, null",
    )


def _match_words(name: str, operand: Any) -> tuple[str, ...]:
    if not isinstance(operand, str):
        raise InvalidInput(f"'match' on {name!r} is {operand!r}", hint="give it words as one string")
    if len(operand) > MATCH_CHARS_MAX:
        raise InvalidInput(
            f"'match' on {name!r} has {len(operand)!r} characters", hint=f"at most {MATCH_CHARS_MAX}"
        )
    words = tuple(dict.fromkeys(text_words(_text(operand))))
    if not words:
        raise InvalidInput(f"'match' on {name!r} has no word: {operand!r}", hint="give it at least one word")
    if len(words) > WORDS_MAX:
        raise InvalidInput(f"'match' on {name!r} has {len(words)!r} words", hint=f"at most {WORDS_MAX}")
    return words


def _instant(name: str, operator: str, operand: Any) -> float:
    time_s = unix_s(operand)
    if time_s is None:
        raise InvalidInput(
            f"{operator!r} on {name!r} is {operand!r}",
            hint="give it Unix seconds, or a time like '2026-11-24T12:00:00Z', with Z or an offset",
        )
    return time_s


def _text(value: str) -> str:
    # Databases cannot hold what is no valid Unicode.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{value!r} in the filter is no valid text", hint="send valid Unicode") from None
    return value


def _object(key: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(f"the filter's {key!r} holds {value!r}", hint="write filters as objects")
    return cast(Mapping[Any, Any], value)


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names)


# Words and instants

_WORD = re.compile(r"\w+")
_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ]([01]\d|2[0-3]):([0-5]\d)(?::([0-5]\d)(?:\.(\d{1,9}))?)?"
    r"(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)
_RFC3339_CHARS_MAX = 35
_EPOCH = datetime(1970, 1, 1)
"""Without a time zone: offsets are taken off by hand, which no date is too early for."""


def text_words(text: str) -> list[str]:
    """The words of a text, folded, in order."""
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Casefolding can take a text out of its normal form.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def has_words(text: str, words: tuple[str, ...]) -> bool:
    """Whether the text contains all of these folded words."""
    folded = _folded(text)
    # Most texts fail at the first test, which is a fraction of the second.
    return all(word in folded for word in words) and all(
        _whole_word(word).search(folded) is not None for word in words
    )


@lru_cache(maxsize=256)
def _whole_word(word: str) -> re.Pattern[str]:
    return re.compile(rf"\b{word}\b")


def unix_s(value: Any) -> float | None:
    """The instant as Unix seconds: of a finite number, itself; of text, RFC 3339; None if it is none.

    Source: RFC 3339, section 5.6, with a space for T and without seconds allowed, and no leap seconds.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if abs(value) < 2.0**63 else None
    # Bounded in length, or the cache would hold on to whatever texts it is shown.
    return _read_rfc3339(value) if isinstance(value, str) and len(value) <= _RFC3339_CHARS_MAX else None


@lru_cache(maxsize=4096)
def _read_rfc3339(text: str) -> float | None:
    found = _RFC3339.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    fraction, sign, offset_hours, offset_minutes = found.groups()[6:]
    try:
        elapsed = datetime(year, month, day, hour, minute, second) - _EPOCH
    except ValueError:
        return None
    offset_s = (int(offset_hours or 0) * 60 + int(offset_minutes or 0)) * 60
    whole_s = elapsed.days * 86_400 + elapsed.seconds - (-offset_s if sign == "-" else offset_s)
    return (whole_s * 10**9 + int((fraction or "").ljust(9, "0"))) / 10**9


# SQLite


def register_functions(connection: apsw.Connection) -> None:
    """Give a connection the SQL functions of `match`, `before` and `after`."""
    create = cast(Any, connection).create_scalar_function  # apsw's stubs type functions as partly unknown
    create("agentdb_has_words", _sql_has_words, 2, deterministic=True)
    create("agentdb_unix_s", unix_s, 1, deterministic=True)


def _sql_has_words(text: str, words: str) -> bool:
    return has_words(text, _split_words(words))


@lru_cache(maxsize=64)
def _split_words(words: str) -> tuple[str, ...]:
    return tuple(words.split(" "))


def compile_condition(condition: Condition) -> Compiled:
    """The SQL of `compile_filter` for a condition."""
    if isinstance(condition, Test):
        return _item_test(condition) if condition.of_item else _metadata_test(condition)
    if isinstance(condition, Not):
        sql, bindings = compile_condition(condition.part)
        return f"NOT ({sql})", bindings
    parts = [compile_condition(part) for part in condition.parts]
    return _join(" AND ", "1", parts) if isinstance(condition, And) else _join(" OR ", "0", parts)


def _join(word: str, empty: str, parts: list[Compiled]) -> Compiled:
    if not parts:
        return empty, []
    bindings = [binding for _, some in parts for binding in some]
    return word.join(f"({sql})" for sql, _ in parts), bindings


def _item_test(test: Test) -> Compiled:
    """A test of columns, none of which is ever NULL."""
    column, operator, operand = f"items.{test.field}", test.operator, test.operand
    if operator == "match":
        return f"agentdb_has_words({column}, ?)", [" ".join(cast(tuple[str, ...], operand))]
    if operator == "in":
        return f"{column} IN (SELECT value FROM json_each(?))", [_json(operand)]
    sign = {"eq": "=", "ne": "<>", **_COMPARISONS, **_INSTANTS}[operator]
    return f"{column} {sign} ?", [operand]


_TYPE = "json_type(items.metadata, ?)"
_VALUE = "json_extract(items.metadata, ?)"
_NUMERIC = f"{_TYPE} IN ('integer', 'real')"
_PARSED = "json_extract(?, '$')"
"""A number bound as JSON: SQLite then reads both sides of a comparison by the same rule."""


def _metadata_test(test: Test) -> Compiled:
    """A test of metadata. It is 0 or 1, never NULL: NOT must turn a missing key into a match."""
    operator, operand = test.operator, test.operand
    # SQLite compares names of a path with names of a document after undoing JSON's escapes in both.
    path = f"$.{_json(test.field)}"
    if operator == "exists":
        sql, bindings = f"{_TYPE} IS NOT NULL", [path]
        needle = _needle(test.field)
        if needle is not None:
            sql, bindings = f"instr(items.metadata, ?) AND {sql}", [needle, *bindings]
        return (sql, bindings) if operand else (f"NOT ({sql})", bindings)
    if operator == "ne":
        sql, bindings = _equal(test.field, path, cast(Scalar, operand))
        return f"NOT ({sql})", bindings
    if operator == "eq":
        return _equal(test.field, path, cast(Scalar, operand))
    if operator == "in":
        return _one_of(test.field, path, cast(tuple[Scalar, ...], operand))
    if operator == "match":
        words = " ".join(cast(tuple[str, ...], operand))
        # CASE, because SQLite may call both sides of an AND.
        return f"(CASE WHEN {_TYPE} = 'text' THEN agentdb_has_words({_VALUE}, ?) END) IS TRUE", [
            path,
            path,
            words,
        ]
    if operator in _INSTANTS:
        typed = f"CASE WHEN {_TYPE} IN ('integer', 'real', 'text') THEN agentdb_unix_s({_VALUE}) END"
        return f"({typed} {_INSTANTS[operator]} ?) IS TRUE", [path, path, operand]
    sign = _COMPARISONS[operator]
    if isinstance(operand, str):
        return f"({_TYPE} = 'text' AND {_VALUE} {sign} ?) IS TRUE", [path, path, operand]
    return f"({_NUMERIC} AND {_VALUE} {sign} {_PARSED}) IS TRUE", [path, path, _json(operand)]


def _equal(key: str, path: str, value: Scalar) -> Compiled:
    if value is None or isinstance(value, bool):
        sql, bindings = f"{_TYPE} IS '{_json(value)}'", [path]
    elif isinstance(value, str):
        sql, bindings = f"({_TYPE} = 'text' AND {_VALUE} = ?) IS TRUE", [path, path, value]
    else:
        sql, bindings = f"({_NUMERIC} AND {_VALUE} = {_PARSED}) IS TRUE", [path, path, _json(value)]
    needle = _needle(key, value)
    # Looking for the bytes costs a fraction of reading the JSON, which the few that have them then decide.
    return (sql, bindings) if needle is None else (f"instr(items.metadata, ?) AND {sql}", [needle, *bindings])


_ANY: Any = object()


def _needle(key: str, value: Any = _ANY) -> str | None:
    """Text that metadata must contain where the key has the value, if there is just one way to write it.

    orjson writes no spaces, and characters as they are unless JSON wants them escaped. A small integer is the
    beginning of every number equal to it (3, 3.0), except zero (-0.0).
    """
    written = f"{_json(key)}:{'' if value is _ANY else _json(value)}"
    number = _kind(value) == "number"
    if "\\" in written or (number and not (isinstance(value, int) and 0 < abs(value) < 10**9)):
        return None
    return written


def _one_of(key: str, path: str, choices: tuple[Scalar, ...]) -> Compiled:
    parts: list[Compiled] = [
        _equal(key, path, value) for value in (None, True, False) if any(value is other for other in choices)
    ]
    for kind, typed in (("string", f"{_TYPE} = 'text'"), ("number", _NUMERIC)):
        values = [value for value in choices if _kind(value) == kind]
        if values:
            chosen = f"{_VALUE} IN (SELECT value FROM json_each(?))"
            parts.append((f"({typed} AND {chosen}) IS TRUE", [path, path, _json(values)]))
    return _join(" OR ", "0", parts)


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


# The meaning of conditions, without SQL


def holds(condition: Condition, item: Item) -> bool:
    """Whether the item satisfies the condition."""
    if isinstance(condition, And):
        return all(holds(part, item) for part in condition.parts)
    if isinstance(condition, Or):
        return any(holds(part, item) for part in condition.parts)
    if isinstance(condition, Not):
        return not holds(condition.part, item)
    if condition.of_item:
        return _holds(condition, getattr(item, condition.field))
    if condition.operator == "exists":
        return (condition.field in item.metadata) is condition.operand
    if condition.field not in item.metadata:
        return condition.operator == "ne"
    return _holds(condition, item.metadata[condition.field])


_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}


def _holds(test: Test, value: Any) -> bool:
    operator, operand = test.operator, test.operand
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)
    if operator == "in":
        return any(_same(value, choice) for choice in cast(tuple[Scalar, ...], operand))
    if operator in ("eq", "ne"):
        return _same(value, operand) is (operator == "eq")
    if operator == "match":
        return isinstance(value, str) and has_words(value, cast(tuple[str, ...], operand))
    if operator in _INSTANTS:
        time_s = unix_s(value)
        return time_s is not None and _ORDER["lt" if operator == "before" else "gt"](time_s, operand)
    return _kind(value) == _kind(operand) != "other" and _ORDER[operator](value, operand)


def _same(value: Any, other: Any) -> bool:
    if value is None or isinstance(value, bool) or other is None or isinstance(other, bool):
        return value is other
    return _kind(value) == _kind(other) != "other" and value == other


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else "other"
