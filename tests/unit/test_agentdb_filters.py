"""Filters: the compiled SQL, the definition in Python and a naive evaluation mean the same thing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import apsw
import orjson
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from agentic_flow.agentdb import filters
from agentic_flow.agentdb.filters import compile_filter, matches, parse_filter
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.vectors import Item

KEYS = st.sampled_from(
    [
        "a",
        "b",
        "a.b",
        "$",
        'quo"te',
        "x y",
        "ü",
        "u\u0308",
        "[0]",
        "ni\nl",
        "b\\s",
        "",
        "'",
        "#-1",
        "\\u0061",
    ]
)
AT_KEYS = st.sampled_from(["@id", "@", "@@x", "@text"])
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
BIG = st.sampled_from([2**53, 2**53 + 1, 2.0**53, 2**63 - 1, -(2**63), 2.0**63, 1e300, 5e-324, 9.3e18])
SMALL = st.sampled_from([0, 1, 2, -1, 10, 1.0, 0.5, 2.5, -0.0, 0.0])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
WORDS = st.sampled_from(
    [
        "red",
        "Fox",
        "FOXES",
        "fox",
        "straße",
        "STRASSE",
        "É",
        "e\u0301",
        "snake_case",
        "42",
        "ﬁ",
        "日本",
        "ς",
        "İ",
        "ΐ",
    ]
)
SENTENCES = st.lists(WORDS | st.sampled_from([" ", "-", "…", "\0"]) | TEXTS, max_size=5).map(" ".join)
TIMES = st.sampled_from(
    [
        "2026-11-24T12:00Z", "2026-11-24T12:00:00Z", "2026-11-24 13:00:00+01:00", "2026-11-24T12:00:00.5Z",
        "2026-11-24", "2026-11-24T12:00", "2026-11-24T12:00z", "2026-02-30T00:00Z", "0001-01-01T00:00+23:59",
        "9999-12-31T23:59:59.999999999-23:59", "2026-11-24T24:00Z", "２026-11-24T12:00Z",
        "2026-11-24T12:00Z\n",
    ]
) | st.integers(-10, 10).map(lambda n: 1795521600 + n)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | SMALL
    | BIG
    | NUMBERS
    | TEXTS
    | WORDS
    | st.sampled_from(["", "a", "true", "1"])
)
VALUES = (
    SCALARS | SENTENCES | TIMES | st.just(2**64 - 1)
    | st.lists(SCALARS, max_size=2) | st.dictionaries(KEYS, SCALARS, max_size=2)
)  # fmt: skip
METADATA = st.dictionaries(KEYS | AT_KEYS, VALUES, max_size=4)

NAMES = KEYS | AT_KEYS.map(lambda key: f"@{key}")
ORDERED = SMALL | BIG.filter(lambda n: n != 2**64 - 1) | NUMBERS | TEXTS
HAS_WORD = SENTENCES.filter(lambda text: re.search(r"\w", naive_fold(text)) is not None)
INSTANTS = TIMES.filter(lambda value: naive_instant(value) is not None)


def operations_of(operators: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    one = st.sampled_from(sorted(operators)).flatmap(
        lambda name: st.fixed_dictionaries({name: operators[name]})
    )
    return one | st.tuples(one, one).map(lambda pair: {**pair[0], **pair[1]})


def equalities(values: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    names = ("eq", "ne", "gt", "gte", "lt", "lte")
    return {**dict.fromkeys(names, values), "in": st.lists(values, max_size=4)}


TESTS = operations_of(
    {
        **equalities(ORDERED),
        "eq": SCALARS,
        "ne": SCALARS,
        "in": st.lists(SCALARS, max_size=4),
        "exists": st.booleans(),
        "match": HAS_WORD,
        "before": INSTANTS,
        "after": INSTANTS,
    }
)
IDS = st.sampled_from(["a", "b", "ID", "é", "ид/🙂 'x'", "1"])
STAMPS = st.sampled_from([0, 0.5, 1795521600, 1795521600.0, 1795521599.5, 2**53 + 1])
ITEM_TESTS = st.one_of(
    st.fixed_dictionaries({"@id": IDS | operations_of(equalities(IDS))}),
    st.fixed_dictionaries({"@text": st.fixed_dictionaries({"match": HAS_WORD})}),
    st.fixed_dictionaries({"@version": SMALL | operations_of(equalities(SMALL | BIG))}),
    *(
        st.fixed_dictionaries(
            {name: STAMPS | operations_of({**equalities(STAMPS), "before": INSTANTS, "after": INSTANTS})}
        )
        for name in ("@created_at_s", "@updated_at_s")
    ),
)
FILTERS = st.recursive(
    st.dictionaries(NAMES, SCALARS | TESTS, max_size=2) | ITEM_TESTS,
    lambda inner: (
        st.fixed_dictionaries({"and": st.lists(inner, max_size=2)})
        | st.fixed_dictionaries({"or": st.lists(inner, max_size=2)})
        | st.fixed_dictionaries({"not": inner})
    ),
    max_leaves=4,
)
ITEMS = st.builds(
    Item,
    id=IDS,
    text=SENTENCES,
    metadata=METADATA,
    version=st.sampled_from([1, 2, 10, 2**53 + 1]),
    created_at_s=STAMPS.map(float),
    updated_at_s=STAMPS.map(float),
)


# A third evaluation, written without a look at the others


def naive_fold(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def naive_words(text: str) -> set[str]:
    cut = "".join(c if c == "_" or c.isalnum() else " " for c in naive_fold(text))
    return set(cut.split(" ")) - {""}


def naive_instant(value: Any) -> Fraction | None:
    """Exact seconds since 1970."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if not isinstance(value, str):
        return Fraction(value) if abs(value) < 2**63 else None
    ascii_digits = re.fullmatch(r"[-0-9T :.Z+]+", value)
    shape = re.fullmatch(r"(....-..-..)[T ](..:..)(:..)?(\.[^Z+-]{1,9})?(Z|[+-]..:..)", value)
    if not ascii_digits or not shape or (shape[4] and not shape[3]):
        return None
    try:
        whole = datetime.strptime(f"{shape[1]} {shape[2]}{shape[3] or ':00'}", "%Y-%m-%d %H:%M:%S")
        offset = datetime.strptime("+00:00" if shape[5] == "Z" else shape[5], "%z").tzinfo
    except ValueError:
        return None
    assert isinstance(offset, timezone)
    seconds = (whole.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    return seconds + Fraction(shape[4] or 0) - int(offset.utcoffset(None).total_seconds())


def naive_number(value: Any) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    past_64_bits = isinstance(value, int) and not -(2**63) <= value <= 2**63 - 1
    return Fraction(float(value) if past_64_bits else value)


def naive_equal(one: Any, other: Any) -> bool:
    if naive_number(one) is not None and naive_number(other) is not None:
        return naive_number(one) == naive_number(other)
    return type(one) is type(other) and not isinstance(one, dict | list) and one == other


def naive_test(present: bool, value: Any, operator: str, operand: Any) -> bool:
    match operator:
        case "exists":
            return present == operand
        case "eq":
            return present and naive_equal(value, operand)
        case "ne":
            return not (present and naive_equal(value, operand))
        case "in":
            return present and any(naive_equal(value, choice) for choice in operand)
        case "match":
            return isinstance(value, str) and naive_words(operand) <= naive_words(value)
        case "before" | "after":
            time, other = naive_instant(value), naive_instant(operand)
            if time is None or other is None:
                return False
            return float(time) < float(other) if operator == "before" else float(time) > float(other)
        case _:
            a: Any = value if isinstance(value, str) else naive_number(value)
            b: Any = operand if isinstance(operand, str) else naive_number(operand)
            if not present or a is None or type(a) is not type(b):
                return False
            return {"gt": a > b, "gte": a >= b, "lt": a < b, "lte": a <= b}[operator]


def naive(where: dict[str, Any], item: Item) -> bool:
    verdicts: list[bool] = []
    for name, value in where.items():
        if name == "and":
            verdicts.append(all(naive(part, item) for part in value))
        elif name == "or":
            verdicts.append(any(naive(part, item) for part in value))
        elif name == "not":
            verdicts.append(not naive(value, item))
        else:
            if name[:1] == "@" and name[:2] != "@@":
                present, held = True, item.model_dump()[name[1:]]
            else:
                key = name[1:] if name[:2] == "@@" else name
                present, held = key in item.metadata, item.metadata.get(key)
            tests = value if isinstance(value, dict) else {"eq": value}
            verdicts += [naive_test(present, held, operator, operand) for operator, operand in tests.items()]
    return all(verdicts)


@pytest.fixture(scope="module")
def connection() -> Iterator[apsw.Connection]:
    opened = apsw.Connection(":memory:")
    filters.register_functions(opened)
    opened.execute(
        "CREATE TABLE items (key INTEGER PRIMARY KEY, id TEXT NOT NULL, version INTEGER NOT NULL, "
        "created_at_s REAL NOT NULL, updated_at_s REAL NOT NULL, metadata TEXT NOT NULL, "
        "text TEXT NOT NULL) STRICT"
    )
    yield opened
    opened.close()


def by_sql(connection: apsw.Connection, where: dict[str, Any], items: list[Item]) -> list[bool]:
    """Which of the items the compiled filter selects from a real table; it must be 0 or 1 for each."""
    connection.execute("DELETE FROM items")
    connection.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (key, i.id, i.version, i.created_at_s, i.updated_at_s, orjson.dumps(i.metadata).decode(), i.text)
            for key, i in enumerate(items)
        ],
    )
    sql, bindings = compile_filter(where)
    values = connection.execute(f"SELECT ({sql}) FROM items ORDER BY key", bindings).fetchall()
    selected = {key for (key,) in connection.execute(f"SELECT key FROM items WHERE {sql}", bindings)}
    assert all(value in (0, 1) for (value,) in values), "unknown is neither true nor false"
    assert selected == {key for key, (value,) in enumerate(values) if value}
    return [bool(value) for (value,) in values]


@settings(max_examples=600, deadline=None)
@given(where=FILTERS, items=st.lists(ITEMS, min_size=1, max_size=4))
@example(where={"a": {"in": [None, 0, ""]}}, items=[Item(id="a", metadata={"a": -0.0})])
@example(where={"not": {"a": {"match": "x"}}}, items=[Item(id="a"), Item(id="b", metadata={"a": ["x"]})])
@example(
    where={"a": 2**53}, items=[Item(id="a", metadata={"a": 2.0**53}), Item(id="b", metadata={"a": 2**53 + 1})]
)
@example(
    where={"a": "b"},
    items=[Item(id="a", metadata={"b": {"a": "b"}}), Item(id="b", metadata={"b": '"a":"b"'})],
)
@example(where={"a": 10}, items=[Item(id="a", metadata={"a": 10.0}), Item(id="b", metadata={"a": 100})])
@example(where={"@@id": {"exists": True}}, items=[Item(id="a", metadata={"@id": 1}), Item(id="b")])
def test_three_evaluations_agree(
    connection: apsw.Connection, where: dict[str, Any], items: list[Item]
) -> None:
    """Catches any filter whose SQL or definition keeps other items than plain words say."""
    expected = [naive(where, item) for item in items]
    assert [matches(where, item) for item in items] == expected
    assert by_sql(connection, where, items) == expected


@settings(max_examples=300, deadline=None)
@given(key=KEYS | AT_KEYS, metadata=METADATA, data=st.data())
def test_values_find_themselves(
    connection: apsw.Connection, key: str, metadata: dict[str, Any], data: st.DataObject
) -> None:
    """Catches a value that its own filter misses: escapes, signs, precision. Random filters rarely hit."""
    value = data.draw(SCALARS)
    assume(not (isinstance(value, int) and not -(2**63) <= value < 2**63))
    item = Item(id="a", metadata={**metadata, key: value})
    name = f"@{key}" if key.startswith("@") else key
    for where in ({name: value}, {name: {"in": ["zz", value]}}, {name: {"exists": True}}):
        assert by_sql(connection, where, [item]) == [matches(where, item)] == [True], where
    wheres: list[dict[str, Any]] = [{name: {"ne": value}}, {name: {"exists": False}}]
    for where in wheres:
        assert by_sql(connection, where, [item]) == [matches(where, item)] == [False], where


@given(where=FILTERS)
def test_only_bindings_carry_the_callers_words(where: dict[str, Any]) -> None:
    """Catches a key or value that reaches the SQL text, where it could be more than a value."""
    sql, bindings = compile_filter(where)
    assert sql.count("?") == len(bindings)
    words = set(sql.replace("(", " ").replace(")", " ").replace(",", " ").split())
    assert words <= {
        "1", "0", "AND", "OR", "NOT", "SELECT", "FROM", "IN", "IS", "NULL", "TRUE", "CASE", "WHEN",
        "THEN", "END", "json_each", "json_extract", "json_type", "instr", "agentdb_has_words",
        "agentdb_unix_s",
        "value", "items.metadata", "items.id", "items.text", "items.version", "items.created_at_s",
        "items.updated_at_s",
        "=", "<>", "<", "<=", ">", ">=", "?",
        "'null'", "'true'", "'false'", "'text'", "'integer'", "'real'", "'$'",
    }  # fmt: skip


def test_fields_of_the_item_use_their_index(connection: apsw.Connection) -> None:
    """Catches a form of `@id` that SQLite answers by looking at every row."""
    connection.execute("CREATE INDEX items_by_id ON items (id)")
    for where in ({"@id": "a"}, {"@id": {"in": ["a", "b"]}}, {"@id": {"gte": "a"}}):
        sql, bindings = compile_filter(where)
        plan = connection.execute(
            f"EXPLAIN QUERY PLAN SELECT key FROM items WHERE {sql}", bindings
        ).fetchall()
        assert any("USING COVERING INDEX items_by_id (id" in str(row[3]) for row in plan), (where, plan)
    connection.execute("DROP INDEX items_by_id")


@pytest.mark.parametrize(
    "where",
    [
        {"n": {"like": "x"}}, {"n": {}}, {"n": [1]}, {"n": {"in": "abc"}}, {"n": {"exists": None}},
        {"and": {"n": 1}}, {"or": [1]}, {"not": 3}, {"n": {"gt": True}}, {"n": {"lt": None}},
        {"n": float("nan")}, {"n": float("inf")}, {"n": 2**64}, {"n": "\ud800"}, {"n": {"in": [[1]]}},
        {"\ud800": 1}, {"a\0": 1}, {1: 2}, {"n": {3: 4}}, {"n": {"in": [float("nan")]}},
        {"n": {"gt": float("-inf")}},
        {"n": {"match": 3}}, {"n": {"match": ""}}, {"n": {"match": "… !"}}, {"n": {"match": "a" * 5000}},
        {"n": {"match": " ".join(f"w{i}" for i in range(65))}}, {"n": {"match": "\ud800"}},
        {"n": {"before": "2026-11-24"}}, {"n": {"after": "2026-11-24T12:00"}}, {"n": {"before": None}},
        {"n": {"before": float("nan")}}, {"n": {"before": True}}, {"n": {"after": [1]}},
        {"@name": 1}, {"@": 1}, {"@id": 1}, {"@id": {"exists": True}}, {"@id": {"in": ["a", 1]}},
        {"@id": {"match": "a"}}, {"@text": "a"}, {"@text": {"eq": "a"}}, {"@version": "1"},
        {"@version": {"before": 1}}, {"@created_at_s": "2026-11-24T12:00Z"}, {"@created_at_s": None},
        {"@updated_at_s": {"gt": "2026-11-24T12:00Z"}},
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(where: dict[str, Any]) -> None:
    """Catches a malformed filter that silently keeps everything, or nothing."""
    for read in (compile_filter, parse_filter, lambda where: matches(where, Item(id="a"))):
        with pytest.raises(InvalidInput) as caught:
            read(where)
        assert caught.value.hint


def test_an_unknown_field_names_the_known() -> None:
    """Catches an error that leaves the reader guessing which fields there are, or how to mean metadata."""
    with pytest.raises(InvalidInput) as caught:
        compile_filter({"@type": "Person"})
    hint = caught.value.hint or ""
    assert all(
        name in hint for name in ("@id", "@text", "@version", "@created_at_s", "@updated_at_s", "'@@type'")
    )


def test_size_is_bounded(connection: apsw.Connection) -> None:
    """Catches a filter so deep or large that compiling it is an attack, and one at the limit that fails."""
    deep: dict[str, Any] = {"n": 1}
    for _ in range(15):
        deep = {"not": deep}
    widest: dict[str, Any] = {"or": [{"n": n} for n in range(500)]}
    largest: dict[str, Any] = {"n": {"in": list(range(50_000))}}
    item = Item(id="a", metadata={"n": 499})
    assert by_sql(connection, deep, [item]) == [matches(deep, item)]
    assert by_sql(connection, widest, [item]) == by_sql(connection, largest, [item]) == [True]
    for where in ({"not": deep}, {"or": [{"n": n} for n in range(501)]}, {"n": {"in": list(range(50_001))}}):
        with pytest.raises(InvalidInput):
            compile_filter(where)


def test_what_touches_metadata_is_known() -> None:
    """Catches a filter on columns alone taken for one on metadata, or the reverse."""
    assert not filters.uses_metadata(parse_filter(None))
    assert not filters.uses_metadata(parse_filter({"not": {"@id": "a", "@version": 1}}))
    assert filters.uses_metadata(parse_filter({"or": [{"@id": "a"}, {"@@id": "a"}]}))


def test_whole_words_in_any_case() -> None:
    """Catches parts of words taken for words, and letters that have several spellings."""
    item = Item(id="a", metadata={"title": "Die STRASSE; snake_case, cafe\u0301 ΟΔΟΣ"})
    for words in ("straße", "Snake_Case die", "café", "οδος", "οδοσ"):
        assert matches({"title": {"match": words}}, item), words
    for words in ("snake", "str", "die das", "cafe"):
        assert not matches({"title": {"match": words}}, item), words
