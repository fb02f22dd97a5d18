"""Parsed filters as SQL over `items AS i`. Pure: nothing of a filter reaches the SQL, only its bindings.

What a filter means is `agentdb.filters.holds`. Two things that PostgreSQL would see differently, it is told:
the folded words of texts that are not ASCII, and the instants that texts name, both in `derived`.
"""

from __future__ import annotations

from typing import Any, cast

from agentic_flow.agentdb.filters import And, Condition, Not, Scalar, Test, parse_filter
from agentic_flow.agentdb.postgres.encoding import escape, index_key, scalar_json
from agentic_flow.core.vectors import Filter

Compiled = tuple[str, list[Any]]

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_INSTANTS = {"before": "<", "after": ">"}
_WHOLE_ID = "coalesce(i.long_id, i.id)"
_INSTANT_BELOW = "9223372036854775808"


def compile_filter(where: Filter | None) -> Compiled:
    """An SQL condition and its bindings, in psycopg's placeholders.

    Raises:
        InvalidInput: as `agentdb.filters.parse_filter`.
    """
    return compile_condition(parse_filter(where))


def compile_condition(condition: Condition) -> Compiled:
    """The same for a parsed filter. It is true or false of every row, never NULL."""
    if isinstance(condition, Test):
        return _item_test(condition) if condition.of_item else _metadata_test(condition)
    if isinstance(condition, Not):
        sql, bindings = compile_condition(condition.part)
        return f"(NOT {sql})", bindings
    parts = [compile_condition(part) for part in condition.parts]
    if not parts:
        return ("true" if isinstance(condition, And) else "false"), []
    joined = (" AND " if isinstance(condition, And) else " OR ").join(sql for sql, _ in parts)
    return f"({joined})", [binding for _, some in parts for binding in some]


def _item_test(test: Test) -> Compiled:
    """A test of columns, none of which is ever NULL."""
    operator, operand = test.operator, test.operand
    if operator == "match":
        sql, bindings = _has_words("i.text", [], "i.derived ->> 'text'", [], cast(tuple[str, ...], operand))
        return f"({sql})", bindings
    if operator in _INSTANTS:
        return f"(i.{test.field} {_INSTANTS[operator]} %s::float8)", [operand]
    if test.field == "id":
        return _id_test(test)
    return _scalar_test(f"to_jsonb(i.{test.field})", [], test)


def _id_test(test: Test) -> Compiled:
    """By the column that the index of ids holds."""
    if test.operator == "in":
        choices = cast(tuple[str, ...], test.operand)
        return "(i.id = ANY(%s))", [[index_key(choice)[0] for choice in choices]]
    text = cast(str, test.operand)
    if test.operator in ("eq", "ne"):
        return f"(i.id {'=' if test.operator == 'eq' else '<>'} %s)", [index_key(text)[0]]
    return f'({_WHOLE_ID} COLLATE "C" {_COMPARISONS[test.operator]} %s)', [escape(text)]


def _metadata_test(test: Test) -> Compiled:
    """A test of metadata: NOT must turn a missing key into a match, so it ends in IS TRUE."""
    operator, operand, key = test.operator, test.operand, escape(test.field)
    value = "(i.fields -> %s)"
    if operator == "exists":
        return f"({value} IS {'NOT ' if operand else ''}NULL)", [key]
    text = f"({value} #>> '{{}}')"
    if operator == "match":
        words, bindings = _has_words(
            text, [key], "i.derived -> 'words' ->> %s", [key], cast(tuple[str, ...], operand)
        )
        return f"((jsonb_typeof({value}) = 'string' AND {words}) IS TRUE)", [key, *bindings]
    if operator in _INSTANTS:
        # A number is its own instant; of texts, what they name was noted when they were stored.
        number = (
            f"CASE WHEN jsonb_typeof({value}) = 'number' THEN "
            f"CASE WHEN abs({value}::numeric) < {_INSTANT_BELOW} THEN {value}::numeric::float8 END "
            "ELSE (i.derived -> 'instants' -> %s)::float8 END"
        )
        return f"(({number} {_INSTANTS[operator]} %s::float8) IS TRUE)", [key, key, key, key, operand]
    return _scalar_test(value, [key], test)


def _scalar_test(value: str, named: list[Any], test: Test) -> Compiled:
    """A test of a JSON value against values: kinds never mix, numbers are exact, texts go by code points."""
    operator, operand = test.operator, test.operand
    if operator == "in":
        choices = [scalar_json(choice) for choice in cast(tuple[Scalar, ...], operand)]
        # PostgreSQL looks constants up in a hash table, however many there are.
        return f"(({value} = ANY(%s::text[]::jsonb[])) IS TRUE)", [*named, choices]
    if operator in ("eq", "ne"):
        return (
            f"(({value} = %s::jsonb) IS {'' if operator == 'eq' else 'NOT '}TRUE)",
            [*named, scalar_json(operand)],
        )
    sign = _COMPARISONS[operator]
    if isinstance(operand, str):
        compared = f"({value} #>> '{{}}') COLLATE \"C\" {sign} %s"
        return (
            f"((jsonb_typeof({value}) = 'string' AND {compared}) IS TRUE)",
            [*named, *named, escape(operand)],
        )
    return (
        f"((jsonb_typeof({value}) = 'number' AND {value} {sign} %s::jsonb) IS TRUE)",
        [*named, *named, scalar_json(operand)],
    )


def _has_words(
    text: str, named: list[Any], folded: str, folded_named: list[Any], words: tuple[str, ...]
) -> Compiled:
    """Whether a text contains folded words: by its derived words, or, where it has none, as the ASCII it is.

    Under the collation "C", lower case and word boundaries are those of ASCII whatever the database's locale.
    """
    stored = " AND ".join(f"strpos({folded}, %s) > 0" for _ in words)
    bindings: list[Any] = [*folded_named]
    for word in words:
        bindings += [*folded_named, f" {word} "]
    plain = "false"
    if all(word.isascii() for word in words):
        plain = " AND ".join(f'lower({text} COLLATE "C") ~ %s COLLATE "C"' for _ in words)
        for word in words:
            bindings += [*named, rf"\m{word}\M"]
    return f"CASE WHEN ({folded}) IS NOT NULL THEN {stored} ELSE {plain} END", bindings
