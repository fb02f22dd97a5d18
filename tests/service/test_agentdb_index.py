"""AgentDB's indexes: every tier equals a rebuilt one whatever happened, and no filter costs recall."""

# pyright: reportPrivateUsage=false, reportArgumentType=false

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import apsw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentic_flow.agentdb.index import recent as recent_vectors
from agentic_flow.agentdb.index.files import DamagedIndex, read_index, write_index
from agentic_flow.agentdb.index.layout import Layout, newest_sequence, widened
from agentic_flow.agentdb.index.matrix import Matrix
from agentic_flow.agentdb.index.recent import Recent
from agentic_flow.agentdb.index.sketch import TRAINING_ROWS, Sketch
from agentic_flow.agentdb.index.tiers import Indexes
from agentic_flow.agentdb.records import find_namespace
from agentic_flow.agentdb.schema import MIGRATIONS
from agentic_flow.agentdb.service import DATABASE, INDEXES, AgentDB
from agentic_flow.core.db import Database
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import IndexTier, Item, SearchQuery

pytestmark = pytest.mark.anyio

T, SPACE = "tenant", "space"
Tier = Literal["exact", "scan", "graph"]
TIERS: tuple[Tier, ...] = ("exact", "scan", "graph")
TENDED_TIMEOUT_S = 60.0
DIMENSION = 64  # the least that turbovec is used for


MAKING = r"""
import asyncio, re, sys
from pathlib import Path

import faiss, turbovec

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings

def mib(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

async def main():
    async with AgentDB(Path(sys.argv[1]), AgentDBSettings(index="scan")) as store:
        before = mib("VmRSS")
        await store.settle()
        print(mib("VmHWM") - before)

asyncio.run(main())
"""
"""Makes the index of a namespace; says, in MiB, by how much its memory grew at the most."""

CHANGING = r"""
import sys
from threading import Thread
from time import sleep

import numpy as np

from agentic_flow.agentdb.index.codes import make_codes
from agentic_flow.agentdb.index.layout import Layout

codes = make_codes(Layout(1, 128, sys.argv[2], "f32"), sys.argv[1])
block = np.random.default_rng(0).standard_normal((5000, 128)).astype(np.float32)
block /= np.linalg.norm(block, axis=1, keepdims=True)
for first in range(0, 200_000, 5000):
    codes.add(np.arange(first, first + 5000, dtype=np.int64), block)
searches, over = [], False

def search():
    while not over:
        assert codes.nearest(block[7], 60, None).max() < 400_000
        searches.append(1)

threads = [Thread(target=search) for _ in range(2)]
for thread in threads:
    thread.start()
while not searches:
    sleep(0.001)
for first in range(200_000, 400_000, 5000):
    codes.add(np.arange(first, first + 5000, dtype=np.int64), block)
    if first % 50_000 == 0:
        codes.remove(np.arange(first - 40_000, first - 35_000, dtype=np.int64))
over = True
for thread in threads:
    thread.join()
print(len(searches), len(codes))
"""
"""Searches codes that grow and shrink; what moves them under a search ends the process."""


def settings_of(tier: Tier, **values: Any) -> AgentDBSettings:
    return AgentDBSettings(index=tier, **values)


def clustered(count: int, seed: int = 0, dimension: int = DIMENSION) -> NDArray[np.float32]:
    """Unit vectors around 50 centres, the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((50, dimension))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 50, count)] + 0.5 * rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def items_of(vectors: NDArray[np.float32], first: int = 0) -> list[Item]:
    return [
        Item(id=f"i{first + n:05}", text=f"number {first + n}", metadata={"n": first + n}, vector=vector)
        for n, vector in enumerate(vectors)
    ]


def nearest_ids(
    vectors: NDArray[np.float32], query: NDArray[np.float32], k: int, keep: NDArray[np.bool_] | None = None
) -> set[str]:
    scores = vectors @ query
    if keep is not None:
        scores = np.where(keep, scores, -np.inf)
    return {f"i{n:05}" for n in np.argsort(-scores)[:k]}


async def found(store: AgentDB, query: NDArray[np.float32], **more: Any) -> list[str]:
    asked = SearchQuery(vector=query, mode="vector", **more)
    return [hit.item.id for hit in (await store.search(T, SPACE, asked)).hits]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["upsert", "delete", "search", "settle", "reopen"]),
        st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("library", ["turbovec", "faiss"])
@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=12, deadline=None)
@given(steps=STEPS)
def test_indexes_equal_a_rebuild(tier: Tier, library: Any, steps: list[tuple[str, list[int]]]) -> None:
    """Catches an index that, after any history of two writers, differs from one made afresh."""
    if tier == "exact" and library == "faiss":
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_play(Path(folder), settings_of(tier, scan_library=library), steps))


async def _play(folder: Path, chosen: AgentDBSettings, steps: list[tuple[str, list[int]]]) -> None:
    vectors = clustered(41, seed=len(steps))
    stores = [AgentDB(folder, chosen), AgentDB(folder, chosen)]
    try:
        await stores[0].create_namespace(T, SPACE, dimension=DIMENSION)
        held: dict[str, int] = {}
        for turn, (kind, numbers) in enumerate(steps):
            store = stores[turn % 2]
            ids = [f"i{number:05}" for number in numbers]
            if kind == "upsert":
                # A row gets another vector each time, so that a stale one shows.
                rows = [(number + turn) % 41 for number in numbers]
                await store.upsert(
                    T, SPACE, [Item(id=i, vector=vectors[row]) for i, row in zip(ids, rows, strict=True)]
                )
                held |= dict(zip(ids, rows, strict=True))
            elif kind == "delete":
                await store.delete(T, SPACE, ids)
                for item_id in ids:
                    held.pop(item_id, None)
            elif kind == "settle":
                await store.settle()
            elif kind == "reopen":
                await asyncio.to_thread(store.close)
                stores[turn % 2] = AgentDB(folder, chosen)
            else:
                await _compare(store, vectors, held)
        for store in stores:
            await _compare(store, vectors, held)
    finally:
        for store in stores:
            await asyncio.to_thread(store.close)


async def _compare(store: AgentDB, vectors: NDArray[np.float32], held: dict[str, int]) -> None:
    assert await store.check_index(T, SPACE) == []
    for query in vectors[:3]:
        ids = await found(store, query, k=5)
        assert len(ids) == min(5, len(held))
        assert await found(store, query, k=5, exact=True) == sorted(
            held, key=lambda item_id: (-float(vectors[held[item_id]] @ query), item_id)
        )[: len(ids)] or _ties(vectors, held, query)


def _ties(vectors: NDArray[np.float32], held: dict[str, int], query: NDArray[np.float32]) -> bool:
    """Whether two rows are equally near, so that their order is the store's choice."""
    scores = sorted(float(vectors[row] @ query) for row in held.values())
    return any(b - a < 1e-6 for a, b in itertools.pairwise(scores))


@pytest.mark.parametrize("tier", TIERS)
async def test_filters_never_cost_recall(tier: Tier, tmp_path: Path) -> None:
    """Catches post-filtering: fewer than k rows, or wrong ones, when a filter keeps 10 % or 1 %."""
    vectors = clustered(6000)
    queries = clustered(40, seed=1)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION, quantization="f16")
        await store.upsert(T, SPACE, items_of(vectors))
        await store.settle()
        numbers = np.arange(len(vectors))
        for share, kept in ((1.0, numbers >= 0), (0.1, numbers < 600), (0.01, numbers % 100 == 7)):
            where = {"n": {"in": numbers[kept].tolist()}} if share < 1 else None
            right = 0
            for query in queries:
                ids = await found(store, query, k=10, filter=where)
                assert len(ids) == 10, (tier, share)
                right += len(nearest_ids(vectors, query, 10, kept) & set(ids))
            assert right / 400 >= (0.99 if share == 1.0 else 0.995), (tier, share, right / 400)


async def test_euclidean_and_inner_product_have_their_tiers(tmp_path: Path) -> None:
    """Catches codes or a graph that compare by another metric than the namespace's."""
    rng = np.random.default_rng(3)
    vectors = (clustered(1500) * rng.uniform(0.5, 2.0, (1500, 1))).astype(np.float32)
    queries = clustered(20, seed=4)
    for tier in TIERS:
        async with AgentDB(tmp_path / tier, settings_of(tier)) as store:
            for metric in ("dot", "euclidean"):
                await store.delete_namespace(T, SPACE)
                await store.create_namespace(T, SPACE, dimension=DIMENSION, metric=metric)
                await store.upsert(T, SPACE, items_of(vectors))
                await store.settle()
                right = 0
                for query in queries:
                    scores = vectors @ query if metric == "dot" else -np.linalg.norm(vectors - query, axis=1)
                    wanted = {f"i{n:05}" for n in np.argsort(-scores)[:10]}
                    right += len(wanted & set(await found(store, query, k=10)))
                assert right >= 194, (tier, metric, right)


async def test_tiers_follow_the_number_of_rows(tmp_path: Path) -> None:
    """Catches a namespace that stays on a tier it has outgrown, or keeps one that it shrank below."""
    chosen = AgentDBSettings(scan_rows_min=200, graph_rows_min=600)
    vectors = clustered(900)
    async with AgentDB(tmp_path, chosen) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION)

        async def tier_of(rows: slice) -> str:
            await store.upsert(T, SPACE, items_of(vectors[rows], rows.start))
            await store.settle()
            result = await store.search(T, SPACE, SearchQuery(vector=vectors[0], mode="vector"))
            assert await store.check_index(T, SPACE) == []
            return result.tier

        assert await tier_of(slice(0, 100)) == "exact"
        assert await tier_of(slice(100, 300)) == "scan"
        assert await tier_of(slice(300, 900)) == "graph"
        await store.delete(T, SPACE, [f"i{n:05}" for n in range(50, 900)])
        assert (await store.search(T, SPACE, SearchQuery(vector=vectors[0], mode="vector"))).tier == "exact"
        assert await store.check_index(T, SPACE) == []


@pytest.mark.parametrize("tier", ["scan", "graph"])
async def test_the_index_file_is_used_and_replayed(tier: Tier, tmp_path: Path) -> None:
    """Catches a file that is never read, or read without what was written since."""
    vectors = clustered(500)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION)
        await store.upsert(T, SPACE, items_of(vectors[:400]))
        await store.settle()
    kept = tmp_path / "kept.index"
    path = tmp_path / INDEXES / "1.index"
    shutil.copy(path, kept)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.upsert(T, SPACE, items_of(vectors[400:], 400))
        await store.delete(T, SPACE, ["i00003"])
    shutil.copy(kept, path)  # as if the process had been killed before it wrote the newer one
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        assert "i00450" in await found(store, vectors[450])
        assert "i00003" not in await found(store, vectors[3])
        assert await store.check_index(T, SPACE) == []
        assert store.indexes_rebuilt() == {}
        assert (await store.stats(T))[0].tier == tier


@pytest.mark.parametrize("tier", ["scan", "graph"])
async def test_an_index_of_another_past_is_not_used(tier: Tier, tmp_path: Path) -> None:
    """Catches an index newer than a database that was put back, or one of other rows with equal numbers."""
    vectors = clustered(300)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION)
        await store.upsert(T, SPACE, items_of(vectors[:200]))
    older = tmp_path / "older"
    shutil.copytree(tmp_path / "agentdb", older)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.upsert(T, SPACE, items_of(vectors[200:], 200))
        await store.settle()
    index = (tmp_path / INDEXES / "1.index").read_bytes()
    shutil.rmtree(tmp_path / "agentdb")
    shutil.copytree(older, tmp_path / "agentdb")
    (tmp_path / INDEXES).mkdir(exist_ok=True)
    (tmp_path / INDEXES / "1.index").write_bytes(index)
    async with AgentDB(tmp_path, settings_of(tier)) as store:
        await store.upsert(T, SPACE, [Item(id="other", vector=vectors[299])])
        assert await found(store, vectors[299], k=1) == ["other"]
        assert await store.check_index(T, SPACE) == []
        assert list(store.indexes_rebuilt()) == [1]


async def test_memory_is_bounded(tmp_path: Path) -> None:
    """Catches indexes that are never let go, the wrong ones, or answers that lack when one is too large."""
    vectors = clustered(100)
    async with AgentDB(tmp_path, AgentDBSettings()) as store:
        for n in range(6):
            await store.create_namespace(T, f"n{n}", dimension=DIMENSION)
            await store.upsert(T, f"n{n}", items_of(vectors))
    size = 128 * (4 * DIMENSION + 9)
    async with AgentDB(tmp_path, AgentDBSettings(index_memory_max_bytes=3 * size)) as store:
        for n in range(6):
            query = SearchQuery(vector=vectors[7], mode="vector", k=1)
            assert (await store.search(T, f"n{n}", query)).hits[0].item.id == "i00007"
        assert store.indexes_loaded() == [4, 5, 6]
    async with AgentDB(tmp_path, AgentDBSettings(index_memory_max_bytes=size // 4)) as store:
        query = SearchQuery(vector=vectors[7], mode="vector", k=1)
        assert (await store.search(T, "n1", query)).hits[0].item.id == "i00007"
        assert store.indexes_loaded() == []


async def test_making_an_index_takes_little_more_than_what_it_keeps(tmp_path: Path) -> None:
    """Catches blocks, copies or pages of the file that pile up while an index is made and written."""
    count, dimension = 8000, 1024
    vectors = clustered(count, dimension=dimension)
    async with AgentDB(tmp_path, settings_of("exact")) as store:
        await store.create_namespace(T, SPACE, dimension=dimension)
        for first in range(0, count, 1000):
            await store.upsert(T, SPACE, items_of(vectors[first : first + 1000], first))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAKING, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await child.communicate()
    assert child.returncode == 0
    assert (tmp_path / INDEXES / "1.index").exists()
    kept_mib = 4 * dimension * count / 2**20
    assert kept_mib < float(said) < kept_mib + 64


@pytest.mark.parametrize(("library", "metric"), [("turbovec", "cosine"), ("faiss", "euclidean")])
def test_codes_are_searched_while_they_change(library: str, metric: str) -> None:
    """Catches a library that reads memory which a write beside it has given back: the process is gone."""
    done = subprocess.run(
        [sys.executable, "-c", CHANGING, library, metric], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    searches, held = map(int, done.stdout.split())
    assert searches > 2
    assert held == 400_000 - 4 * 5000


def test_matrix_lets_go_of_replaced_rows() -> None:
    """Catches memory that grows with every change although the namespace stays as large as it is."""
    layout = Layout(1, 8, "cosine", "f32")
    matrix = Matrix(layout)
    keys, vectors = np.arange(1, 1001), clustered(1000, dimension=8)
    sizes: list[int] = []
    for _ in range(50):
        matrix.apply(keys, keys, vectors)
        sizes.append(matrix.size_bytes)
    assert len(matrix) == 1000
    assert max(sizes) <= 3 * sizes[0]


def test_index_files_are_whole_or_refused(tmp_path: Path) -> None:
    """Catches a truncated or altered index file that is taken for a good one."""
    path = tmp_path / "x.index"
    parts = {"codes": os.urandom(60), "more": b""}
    write_index(path, {"sequence": 7}, parts)
    assert read_index(path) == ({"sequence": 7}, parts)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedIndex):
            read_index(path)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(DamagedIndex):
            read_index(path)
    assert sorted(tmp_path.iterdir()) == [path], "a temporary file was left"


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


HARD = {
    "clustered 384": lambda: clustered(6000, dimension=384),
    "random 384": lambda: unit(np.random.default_rng(5).standard_normal((6000, 384))),
    "random 64": lambda: unit(np.random.default_rng(6).standard_normal((6000, 64))),
    "alike 96": lambda: unit(1.0 + 0.02 * np.random.default_rng(7).standard_normal((6000, 96))),
}


@pytest.mark.parametrize("data", HARD)
async def test_the_scan_is_as_coarse_as_its_rows_allow(data: str, tmp_path: Path) -> None:
    """Catches codes too coarse, or short lists too short, for the rows they are of; filtered or not."""
    vectors = HARD[data]()
    rng = np.random.default_rng(8)
    queries = unit(vectors[rng.integers(0, 6000, 40)] + 0.01 * rng.standard_normal((40, vectors.shape[1])))
    async with AgentDB(tmp_path, settings_of("scan")) as store:
        await store.create_namespace(T, SPACE, dimension=vectors.shape[1])
        await store.upsert(T, SPACE, items_of(vectors))
        await store.settle()
        assert await store.check_index(T, SPACE) == []
        numbers = np.arange(len(vectors))
        for kept, where in (
            (numbers >= 0, None),
            (numbers < 3000, {"n": {"lt": 3000}}),
            (numbers < 1500, {"n": {"lt": 1500}}),
        ):
            right = 0
            for query in queries:
                ids = await found(store, query, k=10, filter=where)
                right += len(nearest_ids(vectors, query, 10, kept) & set(ids))
            assert right / 400 >= 0.995, (data, where, right / 400)


async def test_codes_are_chosen_again_when_rows_have_doubled(tmp_path: Path) -> None:
    """Catches codes that stay as they were chosen for few rows, and rows lost while new ones are made."""
    easy, hard = clustered(3000), unit(np.random.default_rng(9).standard_normal((6000, DIMENSION)))
    async with AgentDB(tmp_path, settings_of("scan")) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION)
        await store.upsert(T, SPACE, items_of(easy))
        await store.settle()
        await store.upsert(T, SPACE, items_of(hard, len(easy)))
        await store.delete(T, SPACE, [f"i{n:05}" for n in range(100)])
        await store.settle()
        assert await store.check_index(T, SPACE) == []
        kept, right = np.concatenate([easy, hard])[100:], 0
        for query in hard[:40]:
            wanted = {f"i{n + 100:05}" for n in np.argsort(-(kept @ query))[:10]}
            right += len(wanted & set(await found(store, query, k=10)))
        assert right / 400 >= 0.995, right / 400


async def test_the_beam_is_chosen_again_when_the_graph_has_grown(tmp_path: Path) -> None:
    """Catches a graph that is searched for ever as far as the few rows needed that it began with."""
    vectors = clustered(3000, seed=3)
    async with AgentDB(tmp_path, settings_of("graph")) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION, embedder_id="mine")
        await store.upsert(T, SPACE, items_of(vectors[:300]))
        await store.settle()
        (index,) = store._indexes.held()
        assert index.beam_rows <= 300
        for first in range(300, 3000, 900):
            await store.upsert(T, SPACE, items_of(vectors[first : first + 900], first))
        await store.settle()
        assert index.tier == "graph"
        assert index.beam_rows > 1000
        assert await store.check_index(T, SPACE) == []
        queries = clustered(40, seed=4)
        right = [len(set(await found(store, q, k=10)) & nearest_ids(vectors, q, 10)) for q in queries]
        assert sum(right) >= 0.98 * 400
    async with AgentDB(tmp_path, settings_of("graph")) as store:
        await found(store, queries[0])
        assert store._indexes.held()[0].beam_rows > 1000
        assert store.indexes_rebuilt() == {}


@functools.cache
def empty_sketch(layout: Layout) -> dict[str, bytes]:
    """A trained sketch without rows; training takes a while."""
    return Sketch(layout, clustered(TRAINING_ROWS, seed=1)).parts()


KEY_SETS = st.lists(st.integers(0, 300), min_size=1, max_size=60, unique=True)


@pytest.mark.parametrize("first", [0, 300])
async def test_tending_from_an_older_transaction_loses_nothing(first: int, tmp_path: Path) -> None:
    """Catches a graph that is made of rows older than what a search has already told the index."""
    vectors = clustered(first + 200)
    stored = vectors if not first else np.vstack([-vectors[:1], vectors[1:]])
    asked = settings_of("graph")
    async with AgentDB(tmp_path, asked) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION, embedder_id="test")
        if first:
            await store.upsert(T, SPACE, items_of(vectors[:first]))
        loop = asyncio.get_running_loop()
        database = Database(tmp_path / DATABASE, MIGRATIONS)
        layout = database.read_sync(lambda connection: find_namespace(connection, T, SPACE)).layout
        moved = False

        def read(job: Callable[[apsw.Connection], Any]) -> Any:
            def after_others(connection: apsw.Connection) -> Any:
                nonlocal moved
                newest_sequence(connection, layout.namespace_id)  # from here on the transaction is what it is
                if not moved:
                    moved = True
                    changed = items_of(vectors[first:], first) + (items_of(-vectors[:1]) if first else [])
                    written = store.upsert(T, SPACE, changed)
                    asyncio.run_coroutine_threadsafe(written, loop).result()
                    database.read_sync(lambda newer: indexes.nearest(newer, layout, vectors[-1], 1))
                return job(connection)

            return database.read_sync(after_others)

        indexes = Indexes(tmp_path / "other", asked, read)
        try:
            await asyncio.to_thread(indexes.tend, layout)
            assert moved

            def near(connection: apsw.Connection) -> list[IndexTier]:
                assert indexes.check(connection, layout) == []
                found = [indexes.nearest(connection, layout, vector, 1) for vector in stored]
                return [answer.tier for answer in found if answer.scores[0] > 0.999]

            tiers = await asyncio.to_thread(database.read_sync, near)
            assert set(tiers) == {"graph"}
            assert len(tiers) >= 0.98 * len(stored)
        finally:
            database.close()


async def test_a_namespace_dropped_by_another_process_stops_no_indexing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a graph made of no rows, because searches still hold the index of what is gone: an error that
    ended the thread which tends all other namespaces."""
    asked = settings_of("graph")
    vectors = clustered(40)
    async with AgentDB(tmp_path, asked) as store, AgentDB(tmp_path, asked) as other:
        for name in ("gone", SPACE):
            await other.create_namespace(T, name, dimension=DIMENSION, embedder_id="test")
        await other.upsert(T, "gone", items_of(vectors))
        gone = await store._db.read(lambda connection: find_namespace(connection, T, "gone").layout)
        await store.search(T, "gone", SearchQuery(vector=items_of(vectors)[0].vector, mode="vector"))
        await other.delete_namespace(T, "gone")
        assert [len(index) for index in store._indexes.held()] == [len(vectors)]
        store._indexes.tend(gone)  # here, and by the thread:
        tended: queue.Queue[Layout] = queue.Queue()
        tend = store._indexes.tend

        def noted(layout: Layout) -> None:
            tend(layout)
            tended.put(layout)

        monkeypatch.setattr(store._indexes, "tend", noted)
        for _ in range(2):  # each in a round of the thread's own
            store._indexer.wake(gone)
            assert await asyncio.to_thread(tended.get, timeout=TENDED_TIMEOUT_S) == gone
        await store.upsert(T, SPACE, items_of(vectors))
        assert await asyncio.to_thread(tended.get, timeout=TENDED_TIMEOUT_S) != gone
        assert [index.tier for index in store._indexes.held()] == ["scan", "graph"]


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), KEY_SETS), min_size=1, max_size=8))
def test_a_sketch_passes_over_what_is_gone(metric: Any, steps: list[tuple[bool, list[int]]]) -> None:
    """Catches removed rows among the nearest, and too few of those that are left."""
    layout = Layout(1, DIMENSION, metric, "f32")
    vectors = clustered(301)
    sketch, held = Sketch.from_parts(layout, empty_sketch(layout)), set[int]()
    for number, (adds, keys) in enumerate(steps):
        chosen = np.array([key for key in keys if (key in held) != adds], np.int64)
        if adds:
            sketch.add(chosen, vectors[chosen])
            held |= set(chosen.tolist())
        else:
            sketch.remove(np.array(keys))
            held -= set(keys)
        if number % 3 == 1:
            sketch = Sketch.from_parts(layout, sketch.parts())
        assert {key for key in range(301) if key in sketch} == held
        for count in (1, 10, 400):
            near = sketch.nearest(vectors[0], count).tolist()
            assert len(near) == len(set(near)) == min(count, len(held))
            assert set(near) <= held


@pytest.mark.parametrize("ready", [False, True], ids=["as stored", "ready"])
@pytest.mark.parametrize("quantization", ["f32", "f16"])
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), KEY_SETS), min_size=1, max_size=8), room=st.integers(0, 200))
def test_recent_vectors_are_those_of_the_file(
    quantization: Any, ready: bool, steps: list[tuple[bool, list[int]]], room: int
) -> None:
    """Catches similarities of another row, of one that was dropped, or past the memory allowed."""
    layout = Layout(1, DIMENSION, "cosine", quantization)
    vectors = clustered(301)
    most = room * (4 * DIMENSION if ready else layout.stored_bytes)
    recent = Recent(layout, most, ready=ready)
    for number, (takes, keys) in enumerate(steps):
        if takes and ready and number % 2:
            new = recent.missing(np.array(keys))
            recent.fill(new, layout.decoded([vectors[key].astype(layout.dtype).tobytes() for key in new]))
        elif takes:
            recent.bring(np.array(keys), [vectors[key].astype(layout.dtype).tobytes() for key in keys])
        else:
            recent.drop(np.array(keys))
            assert set(keys) <= set(recent.missing(np.array(keys)).tolist())
        assert recent.size_bytes <= most
        everything = np.arange(301)
        missing = recent.missing(everything)
        assert (recent.scores(vectors[0], everything) is None) == bool(len(missing))
        held = np.setdiff1d(everything, missing)
        scores = recent.scores(vectors[0], held)
        assert scores is not None
        stored = layout.decoded([vectors[key].astype(layout.dtype).tobytes() for key in held])
        assert np.allclose(scores, layout.similarities(stored, vectors[0]), atol=1e-6)


async def test_a_small_namespace_is_decided_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches vectors that first searches must read, old ones that stay, or too many kept as float32."""
    vectors = clustered(600)
    monkeypatch.setattr(recent_vectors, "READY_MAX_BYTES", 4 * DIMENSION * 500)
    async with AgentDB(tmp_path, settings_of("scan")) as store:
        await store.create_namespace(T, SPACE, dimension=DIMENSION)
        layout = (await store._namespace(T, SPACE)).layout

        async def kept(rows: slice) -> tuple[bool, int]:
            await store.upsert(T, SPACE, items_of(vectors[rows], rows.start))
            await store.settle()
            for n in range(rows.start, rows.stop, 37):
                assert (await found(store, vectors[n], k=1)) == [f"i{n:05}"]
            index = store._searcher.indexes.loaded(layout)
            assert index is not None
            assert index.recent is not None
            return index.recent.ready, len(index.recent.missing(np.arange(1, len(index) + 1)))

        assert await kept(slice(0, 400)) == (True, 0)
        vectors[:100] = clustered(100, seed=5)
        assert await kept(slice(0, 100)) == (True, 0)
        assert await kept(slice(400, 500)) == (True, 0)
        ready, missing = await kept(slice(500, 600))
        assert not ready
        assert missing


def test_halves_are_widened_exactly() -> None:
    """Catches one of the 63,488 finite float16 numbers that becomes another float32 number."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    assert widened(halves.astype("<f2").tobytes()).tobytes() == halves.astype(np.float32).tobytes()


async def test_without_faiss_every_vector_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an installation without faiss (the image of the swarm) that fails at its first index."""
    vectors = clustered(300)
    monkeypatch.setitem(sys.modules, "faiss", None)
    async with AgentDB(tmp_path / "auto", AgentDBSettings(scan_rows_min=100)) as db:
        await db.create_namespace(T, SPACE, dimension=DIMENSION)
        await db.upsert(T, SPACE, items_of(vectors))
        await db.settle()
        found = await db.search(T, SPACE, SearchQuery(vector=vectors[7], mode="vector", k=1))
        assert found.hits[0].item.id == "i00007"
        assert found.tier == "exact"
    for asking in (AgentDBSettings(index="graph"), AgentDBSettings(scan_library="faiss")):
        with pytest.raises(InvalidSettings, match="faiss"):
            AgentDB(tmp_path / "asked", asking)
    assert not (tmp_path / "asked").exists()
