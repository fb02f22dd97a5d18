"""Metadata filters: the compiled SQL and the definition in plain Python are the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apsw
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.filters import compile_filter, matches
from agentic_flow.core.errors import InvalidInput

KEYS = st.sampled_from(["a", "b", "a.b", "$", 'quo"te', "x y", "ü", "[0]", "ni\nl", "b\\s"])
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False, width=32)
SMALL = st.sampled_from([0, 1, 2, -1, 1.0, 0.5, 2.5, -0.0])
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
SCALARS = st.none() | st.booleans() | SMALL | NUMBERS | st.sampled_from(["", "a", "b", "true", "1"]) | TEXTS
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(KEYS, SCALARS, max_size=2)
METADATA = st.dictionaries(KEYS, VALUES, max_size=4)

ORDERED = SMALL | NUMBERS | TEXTS
TESTS = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), ORDERED, min_size=1, max_size=2) | (
    st.fixed_dictionaries({"eq": SCALARS})
    | st.fixed_dictionaries({"ne": SCALARS})
    | st.fixed_dictionaries({"in": st.lists(SCALARS, max_size=4)})
    | st.fixed_dictionaries({"exists": st.booleans()})
)
FILTERS = st.recursive(
    st.dictionaries(KEYS, SCALARS | TESTS, max_size=2),
    lambda inner: (
        st.fixed_dictionaries({"and": st.lists(inner, max_size=2)})
        | st.fixed_dictionaries({"or": st.lists(inner, max_size=2)})
        | st.fixed_dictionaries({"not": inner})
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def connection() -> Iterator[apsw.Connection]:
    opened = apsw.Connection(":memory:")
    yield opened
    opened.close()


def by_sql(connection: apsw.Connection, where: dict[str, Any], metadata: dict[str, Any]) -> bool:
    sql, bindings = compile_filter(where, "m.metadata")
    row = connection.execute(
        f"SELECT {sql} FROM (SELECT ? AS metadata) AS m", (*bindings, orjson.dumps(metadata).decode())
    ).fetchone()
    return bool(row[0])


@given(where=FILTERS, metadata=METADATA)
def test_sql_means_what_the_definition_says(
    connection: apsw.Connection, where: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Catches any filter whose SQL keeps other rows than its definition, odd keys and values included."""
    assert by_sql(connection, where, metadata) == matches(where, metadata)


@given(where=FILTERS)
def test_only_bindings_carry_the_callers_words(where: dict[str, Any]) -> None:
    """Catches a key or value that reaches the SQL text, where it could be more than a value."""
    sql, bindings = compile_filter(where)
    assert sql.count("?") == len(bindings)
    words = set(sql.replace("(", " ").replace(")", " ").replace(",", " ").split())
    assert words <= {
        "1", "0", "AND", "OR", "NOT", "EXISTS", "SELECT", "FROM", "WHERE", "IN", "AS", "json_each",
        "json_extract", "items.metadata", "j", "j.key", "j.type", "j.atom", "=", "<", "<=", ">", ">=", "?",
        "value",
        "'null'", "'true'", "'false'", "'text'", "'integer'", "'real'", "'$'",
    }  # fmt: skip


@pytest.mark.parametrize(
    "where",
    [
        {"n": {"like": "x"}}, {"n": {}}, {"n": [1]}, {"n": {"in": "abc"}}, {"n": {"exists": None}},
        {"and": {"n": 1}}, {"or": [1]}, {"not": 3}, {"n": {"gt": True}}, {"n": {"lt": None}},
        {"n": float("nan")}, {"n": float("inf")}, {"n": 2**64}, {"n": "\ud800"}, {"n": {"in": [[1]]}},
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(where: dict[str, Any]) -> None:
    """Catches a malformed filter that silently keeps everything, or nothing."""
    with pytest.raises(InvalidInput) as caught:
        compile_filter(where)
    assert caught.value.hint


def test_size_is_bounded() -> None:
    """Catches a filter so deep or large that compiling it is an attack."""
    deep: dict[str, Any] = {"n": 1}
    for _ in range(20):
        deep = {"not": deep}
    for where in (deep, {"or": [{"n": n} for n in range(501)]}, {"n": {"in": list(range(50_001))}}):
        with pytest.raises(InvalidInput):
            compile_filter(where)
