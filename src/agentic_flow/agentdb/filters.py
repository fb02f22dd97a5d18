"""Metadata filters: checked, compiled to SQL with bound values, and evaluated naively.

    {"path": "a.py"}                         equality
    {"size": {"gte": 3, "lt": 9}}            eq, ne, lt, lte, gt, gte, in, exists
    {"and": [f, g]}, {"or": [f, g]}, {"not": f}

A key with dots walks into objects. A comparison with a missing key is false, `ne` included; numbers compare
with numbers, texts with texts, and nothing else compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.vectors import Filter

_OPERATORS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_DEPTH_MAX = 16
_VALUES_MAX = 2000
_HINT = "see the filters of SearchQuery: {'key': value} or {'key': {'gte': 3}}, and/or/not"


def compile_filter(where: Filter, column: str = "metadata", depth: int = 0) -> tuple[str, list[Any]]:
    """A SQL expression over the JSON text in `column`, and its bindings.

    Raises:
        InvalidInput: the filter is malformed or too deep.
    """
    if depth > _DEPTH_MAX:
        raise InvalidInput(f"the filter is nested deeper than {_DEPTH_MAX} levels", hint="flatten it")
    parts: list[str] = []
    bindings: list[Any] = []
    for key, value in where.items():
        if key in ("and", "or") and isinstance(value, list):
            sub = [compile_filter(_object(f), column, depth + 1) for f in cast(list[Any], value)]
            empty = "1" if key == "and" else "0"
            parts.append("(" + f" {key.upper()} ".join(s for s, _ in sub) + ")" if sub else empty)
            bindings += [b for _, bound in sub for b in bound]
        elif key == "not":
            sql, bound = compile_filter(_object(value), column, depth + 1)
            parts.append(f"NOT ({sql})")
            bindings += bound
        else:
            sql, bound = _compile_key(key, value, column)
            parts.append(sql)
            bindings += bound
    return (" AND ".join(parts) if parts else "1"), bindings


def matches(where: Filter, metadata: Mapping[str, Any]) -> bool:
    """Whether metadata passes the filter: the definition that the SQL has to agree with."""
    for key, value in where.items():
        if key == "and" and isinstance(value, list):
            passed = all(matches(f, metadata) for f in cast(list[Filter], value))
        elif key == "or" and isinstance(value, list):
            passed = any(matches(f, metadata) for f in cast(list[Filter], value))
        elif key == "not":
            passed = not matches(cast(Filter, value), metadata)
        else:
            passed = all(
                _compare(operator, _walk(metadata, key), operand)
                for operator, operand in _conditions(key, value)
            )
        if not passed:
            return False
    return True


def _compile_key(key: str, value: Any, column: str) -> tuple[str, list[Any]]:
    path = _json_path(key)
    parts: list[str] = []
    bindings: list[Any] = []
    for operator, operand in _conditions(key, value):
        if operator == "exists":
            parts.append(f"json_type({column}, ?) IS {'NOT ' if operand else ''}NULL")
            bindings.append(path)
        elif operator == "in":
            options = [_compile_compare(column, path, "eq", option) for option in operand]
            parts.append("(" + " OR ".join(sql for sql, _ in options) + ")" if options else "0")
            bindings += [b for _, bound in options for b in bound]
        else:
            sql, bound = _compile_compare(column, path, operator, operand)
            parts.append(sql)
            bindings += bound
    return " AND ".join(parts), bindings


def _compile_compare(column: str, path: str, operator: str, operand: Any) -> tuple[str, list[Any]]:
    kinds = _json_types(operand)
    if operand is None or isinstance(operand, bool):
        wanted = "null" if operand is None else str(operand).lower()
        if operator == "eq":
            return f"COALESCE(json_type({column}, ?) = ?, 0)", [path, wanted]
        return f"COALESCE(json_type({column}, ?) <> ?, 0)", [path, wanted]
    typed = f"json_type({column}, ?) IN ({', '.join('?' for _ in kinds)})"
    compared = f"json_extract({column}, ?) {_OPERATORS[operator]} ?"
    if operator == "ne":
        # Present and different: another type is different too.
        return (
            f"(json_type({column}, ?) IS NOT NULL AND NOT COALESCE({typed} AND json_extract({column}, ?) = ?, 0))",
            [path, path, *kinds, path, operand],
        )
    return f"COALESCE({typed} AND {compared}, 0)", [path, *kinds, path, operand]


def _compare(operator: str, found: Any, operand: Any) -> bool:
    if operator == "exists":
        return (found is not _MISSING) == operand
    if found is _MISSING:
        return False
    if operator == "in":
        return any(_compare("eq", found, option) for option in operand)
    alike = _kind(found) == _kind(operand)
    if operator == "eq":
        return alike and found == operand
    if operator == "ne":
        return not (alike and found == operand)
    if not alike or _kind(found) not in ("number", "text"):
        return False
    return {
        "lt": found < operand,
        "lte": found <= operand,
        "gt": found > operand,
        "gte": found >= operand,
    }[operator]


def _conditions(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        _check_operand(key, value)
        return [("eq", value)]
    conditions = list(cast(dict[str, Any], value).items())
    if not conditions:
        raise InvalidInput(f"the filter on {key!r} is empty", hint=_HINT)
    for operator, operand in conditions:
        if operator == "exists":
            if not isinstance(operand, bool):
                raise InvalidInput(f"exists of {key!r} is {operand!r}", hint="use true or false")
        elif operator == "in":
            if not isinstance(operand, list) or len(cast(list[Any], operand)) > _VALUES_MAX:
                raise InvalidInput(f"in of {key!r} is no list of at most {_VALUES_MAX} values", hint=_HINT)
            for option in cast(list[Any], operand):
                _check_operand(key, option)
        elif operator in _OPERATORS:
            _check_operand(key, operand)
            if operator not in ("eq", "ne") and (operand is None or isinstance(operand, bool)):
                raise InvalidInput(f"{operator} of {key!r} is {operand!r}", hint="compare numbers or texts")
        else:
            raise InvalidInput(
                f"{operator!r} is no comparison (filter on {key!r})",
                hint=f"use {', '.join([*_OPERATORS, 'in', 'exists'])}",
            )
    return conditions


def _check_operand(key: str, operand: Any) -> None:
    if operand is not None and not isinstance(operand, str | int | float | bool):
        raise InvalidInput(f"the filter on {key!r} compares with {operand!r}", hint=_HINT)
    if isinstance(operand, int) and not isinstance(operand, bool) and not -(2**63) <= operand < 2**63:
        raise InvalidInput(f"the filter on {key!r} compares with {operand!r}", hint="use 64-bit integers")


def _object(value: Any) -> Filter:
    if not isinstance(value, dict):
        raise InvalidInput(f"{value!r} is no filter", hint=_HINT)
    return cast(Filter, value)


def _json_path(key: str) -> str:
    if not key or '"' in key or "\0" in key:
        raise InvalidInput(f"{key!r} cannot be a key of a filter", hint=_HINT)
    return "$" + "".join(f'."{part}"' for part in key.split("."))


def _json_types(operand: Any) -> Sequence[str]:
    if isinstance(operand, str):
        return ("text",)
    return ("integer", "real")


class _Missing:
    pass


_MISSING = _Missing()


def _walk(metadata: Mapping[str, Any], key: str) -> Any:
    found: Any = metadata
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = cast(Mapping[str, Any], found)[part]
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "other"
