"""Export and import: every row back as it was, and every damaged or foreign file told apart."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentic_flow.agentdb.digests import Digest, item_digest
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.agentdb.transfer import export_namespace, import_file
from agentic_flow.agentdb.transfer_files import Columns
from agentic_flow.agentdb.transfer_lines import LinesReader
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    InvalidInput,
    NotFound,
    PathNotFound,
)
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Item, Vector

pytestmark = pytest.mark.anyio

TENANT = "default"
ENDINGS = ("jsonl", "jsonl.gz", "parquet")
FAR_S = 4_000_000_000.0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path / "data", AgentDBSettings()) as store:
        yield store


def vector(number: int, dimension: int = 4) -> Vector:
    return Vector(np.random.default_rng(number).normal(size=dimension))


def words(number: int) -> str:
    """A text whose few words give a vector with few numbers, which half precision rounds visibly."""
    return " ".join(f"w{number * place % 97}" for place in range(20))


async def fill(store: AgentDB, name: str = "mine", count: int = 5) -> None:
    """A namespace with vectors of its own, two versions of one item, validity and time to live."""
    await store.create_namespace(TENANT, name, dimension=4, metric="euclidean", embedder_id="clip")
    items = [
        Item(
            id=f"item {number} ü\n",
            text=f"text {number}\n\u2028 end",
            metadata={"n": number, "half": number / 3, "list": [1, {"a": None}], "日本": "x", "on": True},
            vector=vector(number),
            expires_at_s=FAR_S + number if number % 2 else None,
            valid_from_s=float(number) if number % 3 else None,
            valid_until_s=FAR_S if number % 3 == 1 else None,
        )
        for number in range(count)
    ]
    await store.upsert(TENANT, name, items)
    await store.upsert(TENANT, name, items[:2])


async def everything(store: AgentDB, name: str) -> list[Item]:
    page = await store.list_items(TENANT, name, limit=1000, vectors=True)
    assert page.cursor is None
    return list(page.items)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_export_comes_back_as_it_was(store: AgentDB, tmp_path: Path, ending: str) -> None:
    """Catches a field that an export loses: version, times, validity, metadata's types, a bit of a vector."""
    await fill(store)
    file = tmp_path / f"mine.{ending}"
    wrote = await export_namespace(store, TENANT, "mine", file)
    assert (wrote.items, wrote.documents, wrote.size_bytes) == (5, 0, file.stat().st_size)
    report = await import_file(store, TENANT, "again", file)
    assert (report.items, report.created, report.verified, report.ours) == (5, True, True, True)
    assert await everything(store, "again") == await everything(store, "mine")
    settings_of = {n.name: n.model_copy(update={"name": ""}) for n in await store.namespaces(TENANT)}
    assert settings_of["again"] == settings_of["mine"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_documents_and_embedded_texts_come_back(store: AgentDB, tmp_path: Path, ending: str) -> None:
    """Catches chunks that lose their document, a document without chunks that vanishes, vectors of the
    store's embedder that change on the way, and a namespace that can no longer embed."""
    await store.create_namespace(TENANT, "docs")
    documents = [
        Document(
            path=f"src/{number}.py",
            fingerprint=Fingerprint(size_bytes=number, mtime_ns=number**9, sha256=f"{number:064x}"),
            chunks=tuple(
                Item(
                    id=f"{number}:{part}",
                    text=f"chunk {part} of {number}: {words(part)}",
                    metadata={"path": "p"},
                )
                for part in range(number)
            ),
        )
        for number in range(12)
    ]
    await store.put_documents(TENANT, "docs", documents)
    file = tmp_path / f"docs.{ending}"
    wrote = await export_namespace(store, TENANT, "docs", file)
    report = await import_file(store, TENANT, "again", file, batch_items=7)
    assert (report.items, report.documents) == (66, 12)
    assert report.verified
    assert await everything(store, "again") == await everything(store, "docs")
    assert await store.fingerprints(TENANT, "again") == await store.fingerprints(TENANT, "docs")
    twice = await export_namespace(store, TENANT, "again", tmp_path / f"twice.{ending}")
    assert twice.digest == wrote.digest
    await store.upsert(TENANT, "again", [Item(id="new", text="embedded here")])


_keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
_metadata = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_items = st.builds(
    Item,
    id=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
    text=_texts,
    metadata=st.dictionaries(_keys, _metadata, max_size=4),
    vector=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3).map(Vector),
    version=st.integers(1, 2**40),
    created_at_s=st.floats(0, 1e10),
    updated_at_s=st.floats(0, 1e10),
    expires_at_s=st.none() | st.floats(FAR_S, 1e10),
    valid_from_s=st.none() | st.floats(-1e10, 1e10),
    valid_until_s=st.none() | st.floats(-1e10, 1e10),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(_items, max_size=6, unique_by=lambda item: item.id), ending=st.sampled_from(ENDINGS))
async def test_any_items_come_back(tmp_path: Path, items: list[Item], ending: str) -> None:
    """Catches characters, numbers or nestings that one of the formats cannot carry."""
    async with AgentDB(tmp_path / "any", AgentDBSettings()) as store:
        for name in ("from", "to"):
            await store.delete_namespace(TENANT, name)
        await store.create_namespace(TENANT, "from", dimension=3, metric="dot", quantization="f16")
        await store.restore(TENANT, "from", [fitting(item) for item in items])
        file = tmp_path / f"any.{ending}"
        await export_namespace(store, TENANT, "from", file, overwrite=True)
        report = await import_file(store, TENANT, "to", file)
        assert report.verified
        assert await everything(store, "to") == await everything(store, "from")


def fitting(item: Item) -> Item:
    """With a vector that float16 can hold."""
    assert item.vector is not None
    return item.model_copy(update={"vector": Vector([value / 1e3 for value in item.vector])})


@given(items=st.lists(_items, max_size=5), seed=st.randoms())
def test_digests_know_every_field_and_no_order(items: list[Item], seed: Any) -> None:
    """Catches a digest that depends on the order of rows, or that misses a field."""
    one, other = Digest(), Digest()
    one.add_items(items, "f32")
    shuffled = list(items)
    seed.shuffle(shuffled)
    other.add_items(shuffled, "f32")
    assert (one.hex, one.count) == (other.hex, other.count)
    for item in items:
        changes: dict[str, Any] = {
            "id": f"{item.id}x",
            "text": f"{item.text}x",
            "metadata": {**item.metadata, "\1new": 1},
            "vector": Vector([*item.vector[:2], 12345.0]) if item.vector else None,
            "version": item.version + 1,
            "created_at_s": item.created_at_s + 0.5,
            "updated_at_s": item.updated_at_s + 0.5,
            "expires_at_s": 1.0 if item.expires_at_s is None else None,
            "valid_from_s": 0.0 if item.valid_from_s is None else None,
            "valid_until_s": 0.0 if item.valid_until_s is None else None,
            "document": "a",
        }
        assert set(changes) == set(Item.model_fields)
        for field, value in changes.items():
            changed = item.model_copy(update={field: value})
            assert item_digest(changed, "f32") != item_digest(item, "f32"), field


async def test_a_file_cut_anywhere_is_noticed(store: AgentDB, tmp_path: Path) -> None:
    """Catches a truncated JSON Lines export that imports as if it were whole."""
    await fill(store, count=3)
    whole = tmp_path / "whole.jsonl"
    await export_namespace(store, TENANT, "mine", whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for length in [*range(0, len(data) - 250, 11), *range(len(data) - 250, len(data) - 1)]:
        cut.write_bytes(data[:length])
        with pytest.raises(AgenticFlowError) as caught:
            await import_file(store, TENANT, "cut", cut)
        assert isinstance(caught.value, DataCorrupted | InvalidInput), length
    cut.write_bytes(data[:-1])  # without the last line's end it is all there
    assert (await import_file(store, TENANT, "cut", cut)).verified


@pytest.mark.parametrize("ending", ["jsonl.gz", "parquet"])
async def test_damaged_files_are_never_believed(store: AgentDB, tmp_path: Path, ending: str) -> None:
    """Catches a flipped byte or a cut in a compressed file that gives other rows and no error."""
    await fill(store, count=40)
    truth = await everything(store, "mine")
    whole = tmp_path / f"whole.{ending}"
    await export_namespace(store, TENANT, "mine", whole)
    data = whole.read_bytes()
    bad = tmp_path / f"bad.{ending}"
    errors = 0
    for place in range(0, len(data), max(1, len(data) // 60)):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]):
            bad.write_bytes(damaged)
            await store.delete_namespace(TENANT, "bad")
            try:
                report = await import_file(store, TENANT, "bad", bad)
            except (DataCorrupted, InvalidInput, Conflict):
                errors += 1
            else:
                # The byte was one that means nothing, such as gzip's operating system.
                assert report.verified
                assert await everything(store, "bad") == truth
    assert errors > 60


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
async def test_a_changed_row_is_noticed(store: AgentDB, tmp_path: Path, ending: str) -> None:
    """Catches an export that was edited by hand and passes for what was exported."""
    await fill(store)
    file = tmp_path / f"mine.{ending}"
    await export_namespace(store, TENANT, "mine", file)
    if ending == "jsonl":
        file.write_text(file.read_text("utf-8").replace('"n":3', '"n":4'), "utf-8")
    else:
        table = pyarrow.parquet.read_table(file)
        about = pyarrow.parquet.ParquetFile(file).metadata.metadata
        column = pyarrow.array([version + 1 for version in table["version"].to_pylist()], pyarrow.int64())
        table = table.set_column(4, table.schema.field(4), column).replace_schema_metadata(about)
        pyarrow.parquet.write_table(table, file)
    with pytest.raises(DataCorrupted, match=r"is not what was exported.*5 rows of the file are stored"):
        await import_file(store, TENANT, "again", file)


BAD_LINES = [
    ("{broken", "no JSON"),
    ("[1, 2]", "no JSON object"),
    ('{"text": "without id"}', "no column 'id'"),
    ('{"id": "d", "vector": [1, 2, 3, 4, 5]}', "dimension 5"),
    ('{"id": "n", "vector": [1, 2, 3, NaN]}', "no JSON"),
    ('{"id": "i", "vector": [1, 2, 3, 1e300]}', "infinite"),
    ('{"id": "s", "vector": "no base64!"}', "base64"),
    ('{"id": {"a": 1}, "vector": [1, 2, 3, 4]}', "id"),
    ('{"id": "t", "text": 7, "vector": [1, 2, 3, 4]}', "text"),
]


@pytest.mark.parametrize(("bad", "told"), BAD_LINES)
async def test_a_bad_line_is_named_and_batches_before_it_stay(
    store: AgentDB, tmp_path: Path, bad: str, told: str
) -> None:
    """Catches an error without its line, half a batch that is stored, and a count that is not true."""
    good = [json.dumps({"id": f"g{number}", "vector": [1, 2, 3, number]}) for number in range(9)]
    file = tmp_path / "foreign.jsonl"
    file.write_text("\n".join([*good[:6], bad, *good[6:]]) + "\n", "utf-8")
    with pytest.raises(InvalidInput, match=told) as caught:
        await import_file(store, TENANT, "stop", file, batch_items=4)
    assert "4 rows of the file are stored" in caught.value.message
    assert caught.value.details["items"] == 4
    assert "line 7" in caught.value.message or "lines 5 to 8" in caught.value.message
    assert [item.id for item in await everything(store, "stop")] == ["g0", "g1", "g2", "g3"]
    report = await import_file(store, TENANT, "skip", file, batch_items=4, on_error="skip")
    assert (report.items, report.skipped) == (9, 1)
    assert report.problems[0].startswith("line 7: ")
    assert told in report.problems[0]
    assert len(await everything(store, "skip")) == 9


async def test_foreign_lines_are_mapped(store: AgentDB, tmp_path: Path) -> None:
    """Catches columns that go to the wrong place, a number as id, and repeated ids that stop a batch."""
    file = tmp_path / "foreign.jsonl"
    rows = [
        {"doi": 10, "abstract": "first", "emb": [1, 0], "year": 2020, "metadata": {"kept": True}},
        {"doi": 11, "abstract": None, "emb": [0, 1], "year": None, "tags": ["a"], "blob": "long"},
        {"doi": 10, "abstract": "second", "emb": [1, 1], "year": 2021},
    ]
    with gzip.open(file, "wt", encoding="utf-8") as out:  # recognised without its ending
        out.write("\n\n".join(map(json.dumps, rows)))
    columns = Columns(id="doi", text="abstract", vector="emb", left_out=frozenset({"blob"}))
    report = await import_file(
        store, TENANT, "papers", file, columns=columns, metric="dot", embedder_id="specter"
    )
    assert (report.items, report.created, report.ours, report.verified) == (3, True, False, False)
    ten, eleven = await everything(store, "papers")
    assert (ten.id, ten.text, ten.metadata, ten.version) == ("10", "second", {"year": 2021}, 2)
    assert (eleven.id, eleven.text, eleven.metadata) == ("11", "", {"tags": ["a"]})
    (made,) = await store.namespaces(TENANT)
    assert (made.dimension, made.metric, made.embedder_id) == (2, "dot", "specter")
    with pytest.raises(Conflict, match="'other'"):
        await import_file(store, TENANT, "papers", file, columns=columns, embedder_id="other")


async def test_foreign_parquet_is_mapped(store: AgentDB, tmp_path: Path) -> None:
    """Catches types of Parquet that metadata cannot hold, kinds of lists, and nulls among vectors."""
    table = pyarrow.table(
        {
            "key": pyarrow.array([1, 2, 3], pyarrow.int64()),
            "body": ["one", None, "three"],
            "emb": pyarrow.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pyarrow.list_(pyarrow.float64())),
            "when": [datetime(2026, 1, 2, tzinfo=UTC)] * 3,
            "price": [Decimal("1.5"), None, Decimal("2.5")],
            "nested": [{"a": [1]}, None, {"a": []}],
            "metadata": ['{"own": 1}', "plain", None],
            "raw": [b"\x00", b"", b""],
        }
    )
    file = tmp_path / "foreign.parquet"
    pyarrow.parquet.write_table(table, file)
    columns = Columns(id="key", text="body", vector="emb")
    with pytest.raises(InvalidInput, match=r"row 1: column 'raw' holds bytes.*nothing was stored"):
        await import_file(store, TENANT, "papers", file, columns=columns)
    columns = Columns(id="key", text="body", vector="emb", left_out=frozenset({"raw"}))
    report = await import_file(store, TENANT, "papers", file, columns=columns)
    assert report.items == 3
    one, two, three = await everything(store, "papers")
    assert one.vector == [1.0, 2.0]
    assert one.metadata == {"when": "2026-01-02T00:00:00+00:00", "price": 1.5, "nested": {"a": [1]}, "own": 1}
    assert two.metadata == {"when": "2026-01-02T00:00:00+00:00", "metadata": "plain"}
    assert (two.text, three.text) == ("", "three")
    with pytest.raises(InvalidInput, match="'nowhere'") as caught:
        await import_file(store, TENANT, "papers", file, columns=Columns(id="nowhere"))
    assert "'key'" in str(caught.value.hint)
    with pytest.raises(InvalidInput, match="'body' holds 'string'"):
        await import_file(store, TENANT, "papers", file, columns=Columns(id="key", vector="body"))


@pytest.mark.parametrize("kind", ["fixed", "large", "half"])
async def test_every_kind_of_list_is_a_vector(store: AgentDB, tmp_path: Path, kind: str) -> None:
    """Catches offsets that slip where a vector is missing: each row must get its own numbers."""
    types = {
        "fixed": pyarrow.list_(pyarrow.float32(), 2),
        "large": pyarrow.large_list(pyarrow.int64()),
        "half": pyarrow.list_(pyarrow.float16()),
    }
    numbers: list[Any] = [None if place % 5 == 2 else [place, place + 1] for place in range(3000)]
    if kind == "half":
        numbers = [one and [np.float16(value) for value in one] for one in numbers]
    table = pyarrow.table(
        {"id": [f"{place:04}" for place in range(3000)], "vector": pyarrow.array(numbers, types[kind])}
    )
    file = tmp_path / "lists.parquet"
    pyarrow.parquet.write_table(table, file)
    report = await import_file(store, TENANT, "lists", file, on_error="skip", metric="euclidean")
    assert (report.items, report.skipped) == (2400, 600)
    assert "no vector" in report.problems[0]
    for place in (1, 3, 1023, 1024, 2999):
        (item,) = await store.get(TENANT, "lists", [f"{place:04}"])
        assert item.vector == [float(np.float16(place)), float(np.float16(place + 1))] or kind != "half"
        assert item.vector == [place, place + 1] or kind == "half"


async def test_texts_without_vectors_are_embedded(store: AgentDB, tmp_path: Path) -> None:
    """Catches an import that demands vectors, or that cannot add to what is there."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"id": "a", "text": "red fox"}\n{"id": "b", "text": "blue whale"}\n', "utf-8")
    assert (await import_file(store, TENANT, "texts", file)).created
    again = await import_file(store, TENANT, "texts", file)
    assert (again.created, again.items) == (False, 2)
    assert [item.version for item in await everything(store, "texts")] == [2, 2]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"metric": "cosine"}, "metric"),
        ({"dimension": 3}, "dimension"),
        ({"embedder_id": "other"}, "embedder"),
        ({"quantization": "f16"}, "quantization"),
    ],
)
async def test_other_settings_are_refused_before_anything_is_written(
    store: AgentDB, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    """Catches rows of one embedder, dimension, metric or precision among those of another."""
    await fill(store)
    file = tmp_path / "mine.jsonl"
    await export_namespace(store, TENANT, "mine", file)
    wanted: dict[str, Any] = {
        "metric": "euclidean",
        "dimension": 4,
        "embedder_id": "clip",
        "quantization": "f32",
    }
    await store.create_namespace(TENANT, "other", **{**wanted, **changed})
    with pytest.raises(Conflict, match=f"{told}.*nothing was stored"):
        await import_file(store, TENANT, "other", file)
    assert await everything(store, "other") == []


async def test_what_is_no_file_of_rows_is_told_apart(store: AgentDB, tmp_path: Path) -> None:
    """Catches a missing file, a folder, an empty or foreign file that ends in success or in a traceback."""
    with pytest.raises(PathNotFound, match=r"nowhere\.jsonl"):
        await import_file(store, TENANT, "x", tmp_path / "nowhere.jsonl")
    with pytest.raises(PathNotFound, match="directory"):
        await import_file(store, TENANT, "x", tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n")
    with pytest.raises(InvalidInput, match="no rows"):
        await import_file(store, TENANT, "x", empty)
    no_parquet = tmp_path / "text.parquet"
    no_parquet.write_text('{"id": "a"}\n', "utf-8")
    with pytest.raises(InvalidInput, match="no whole Parquet file"):
        await import_file(store, TENANT, "x", no_parquet)
    assert await store.namespaces(TENANT) == []
    await fill(store)
    mine = tmp_path / "mine.jsonl"
    await export_namespace(store, TENANT, "mine", mine)
    newer = tmp_path / "newer.jsonl"
    newer.write_text(mine.read_text("utf-8").replace('"format_version":1', '"format_version":2'), "utf-8")
    with pytest.raises(Conflict, match="version 2"):
        await import_file(store, TENANT, "x", newer)
    two = tmp_path / "two.jsonl"
    two.write_bytes(mine.read_bytes() * 2)
    with pytest.raises(DataCorrupted, match="follows the footer"):
        await import_file(store, TENANT, "x", two)
    with pytest.raises(InvalidInput, match="an export of ours"):
        await import_file(store, TENANT, "x", mine, columns=Columns(id="id"))


async def test_exports_do_not_destroy(store: AgentDB, tmp_path: Path) -> None:
    """Catches an export that overwrites unasked, leaves half a file, or writes somewhere else."""
    await fill(store)
    file = tmp_path / "mine.jsonl"
    file.write_text("precious", "utf-8")
    with pytest.raises(Conflict, match="exists"):
        await export_namespace(store, TENANT, "mine", file)
    assert file.read_text("utf-8") == "precious"
    for name, kind in (
        ("mine.csv", InvalidInput),
        ("x.parquet.gz", InvalidInput),
        ("no/mine.jsonl", PathNotFound),
    ):
        with pytest.raises(kind):
            await export_namespace(store, TENANT, "mine", tmp_path / name)
    with pytest.raises(NotFound):
        await export_namespace(store, TENANT, "nothing", tmp_path / "nothing.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mine.jsonl"]
    await export_namespace(store, TENANT, "mine", file, overwrite=True)
    assert file.read_bytes().startswith(b'{"agentic_flow_export"')


def test_reading_takes_no_more_memory_for_more_rows(tmp_path: Path) -> None:
    """Catches a reader that keeps what it has read: a million rows must fit as ten thousand do."""

    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w", encoding="utf-8") as out:
            out.writelines(
                f'{{"id": "{n}", "text": "{"x" * 200}", "vector": [1, 2, 3]}}\n' for n in range(rows)
            )
        tracemalloc.start()
        try:
            reader = LinesReader(file, Columns())
            assert sum(row.item is not None for row in reader.rows()) == rows
            reader.close()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(40_000) < 1.3 * peak(8000)
