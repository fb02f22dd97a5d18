"""Metadata filters as SQL over `items AS i`. Pure: nothing of a filter reaches the SQL, only its bindings.

What a filter means is `agentdb.filters.matches`; what is accepted, the same module's compiler says, with the
same words whatever the store.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from agentic_flow.agentdb.filters import compile_filter as check_filter
from agentic_flow.agentdb.postgres.encoding import escape, scalar_json
from agentic_flow.core.vectors import Filter

Condition = tuple[str, list[Any]]

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}

_ITEM_FIELDS = {
    "@id": "to_jsonb(coalesce(i.long_id, i.id))",
    "@text": "to_jsonb(i.text)",
    "@version": "to_jsonb(i.version)",
    "@created_at_s": "to_jsonb(i.created_at_s)",
    "@updated_at_s": "to_jsonb(i.updated_at_s)",
}


def compile_condition(where: Filter | None) -> Condition:
    """An SQL condition and its bindings, in psycopg's placeholders.

    Raises:
        InvalidInput: as `agentdb.filters.compile_filter`.
    """
    if not where:
        return "true", []
    check_filter(where)
    return _all_of(where)


def _all_of(where: Mapping[str, Any]) -> Condition:
    return _join(" AND ", "true", [_entry(key, value) for key, value in where.items()])


def _entry(key: str, value: Any) -> Condition:
    if key in ("and", "or"):
        parts = [_all_of(part) for part in cast(list[Mapping[str, Any]], value)]
        return _join(" AND ", "true", parts) if key == "and" else _join(" OR ", "false", parts)
    if key == "not":
        sql, bindings = _all_of(value)
        return f"NOT ({sql})", bindings
    if isinstance(value, Mapping):
        tests = cast(Mapping[str, Any], value)
        return _join(" AND ", "true", [_test(key, name, operand) for name, operand in tests.items()])
    return _test(key, "eq", value)


def _test(key: str, operator: str, operand: Any) -> Condition:
    """One comparison. It is true or false, never NULL: NOT must turn a missing key into a match."""
    value, named = ("i.fields -> %s", [escape(key)]) if key not in _ITEM_FIELDS else (_ITEM_FIELDS[key], [])
    if operator == "exists":
        return f"(({value}) IS {'NOT ' if operand else ''}NULL)", named
    if operator == "eq":
        return f"(({value}) = %s::jsonb IS TRUE)", [*named, scalar_json(operand)]
    if operator == "ne":
        return f"(({value}) = %s::jsonb IS NOT TRUE)", [*named, scalar_json(operand)]
    if operator == "in":
        choices = [scalar_json(choice) for choice in operand]
        # PostgreSQL looks constants up in a hash table, however many there are.
        return f"(({value}) = ANY(%s::text[]::jsonb[]) IS TRUE)", [*named, choices]
    sign = _COMPARISONS[operator]
    if isinstance(operand, str):
        return (
            f"((jsonb_typeof({value}) = 'string' AND (({value}) #>> '{{}}') COLLATE \"C\" {sign} %s) IS TRUE)",
            [*named, *named, escape(operand)],
        )
    return (
        f"((jsonb_typeof({value}) = 'number' AND ({value}) {sign} %s::jsonb) IS TRUE)",
        [*named, *named, scalar_json(operand)],
    )


def _join(word: str, empty: str, parts: list[Condition]) -> Condition:
    if not parts:
        return empty, []
    bindings = [binding for _, some in parts for binding in some]
    return "(" + word.join(sql for sql, _ in parts) + ")", bindings
