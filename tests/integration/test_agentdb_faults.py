"""Bad input on disk: damaged, foreign and unwritable files, a full disk, a lock that is not given.

Whatever happens to an index file, answers come from the rows; whatever happens to the database, the caller is
told what to do, and what was stored is there again once the cause is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import apsw
import numpy as np
import pytest
import structlog.testing
from structlog.typing import EventDict

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.index.files import read_index, write_index
from agentic_flow.agentdb.index.layout import walk_vectors
from agentic_flow.agentdb.index.tiers import Indexes
from agentic_flow.agentdb.records import find_namespace
from agentic_flow.agentdb.service import DATABASE, INDEXES, AgentDB
from agentic_flow.core.db import Database, rows
from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted, StorageFull, Unavailable
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item, SearchQuery, Vector

pytestmark = pytest.mark.anyio

T, SPACE, DIMENSION = "acme", "notes", 16
SCAN, GRAPH = AgentDBSettings(index="scan"), AgentDBSettings(index="graph")
TIERS = pytest.mark.parametrize("settings", [SCAN, GRAPH], ids=["scan", "graph"])


def items(count: int, *, first: int = 0, size_bytes: int = 0) -> list[Item]:
    """Items whose vectors and words are their own."""
    numbers = np.random.default_rng(7).standard_normal((first + count, DIMENSION))
    return [
        Item(
            id=f"item{n}",
            text=f"note number{n} {'x' * size_bytes}",
            metadata={"n": n},
            vector=Vector(numbers[n].astype(np.float32).tolist()),
        )
        for n in range(first, first + count)
    ]


async def filled(folder: Path, settings: AgentDBSettings, count: int, space: str = SPACE) -> None:
    """A closed store with so many items and a written index."""
    async with AgentDB(folder, settings) as store:
        await store.create_namespace(T, space, dimension=DIMENSION, embedder_id="test")
        if count:
            await store.upsert(T, space, items(count))
        await store.settle()


async def answers(store: AgentDB, count: int, space: str = SPACE) -> None:
    """Every one of the first `count` items is found by vector and by word; the index is as a rebuilt one."""
    wanted = items(count)
    queries = [SearchQuery(vector=item.vector, mode="vector", k=1) for item in wanted]
    queries += [SearchQuery(text=f"number{item.metadata['n']}", mode="text", k=1) for item in wanted]
    found: list[str] = []
    for start in range(0, len(queries), 200):
        results = await store.search_many(T, space, queries[start : start + 200])
        found += [result.hits[0].item.id if result.hits else "" for result in results]
    assert found == [item.id for item in wanted] * 2
    assert await store.check_index(T, space) == []


async def rebuilt(folder: Path, settings: AgentDBSettings, count: int) -> list[EventDict]:
    """Open the store over what was done to the index file: all is found, the index was made again and told
    so, and the next process has nothing to make again. The warnings."""
    with structlog.testing.capture_logs() as logs:
        async with AgentDB(folder, settings) as store:
            await answers(store, count)
            assert list(store.indexes_rebuilt()) == [1]
    async with AgentDB(folder, settings) as store:
        await answers(store, count)
        assert store.indexes_rebuilt() == {}
    warned = [log for log in logs if log["event"] == "index_rebuilt"]
    assert warned
    assert warned[0]["log_level"] == "warning"
    return warned


def index_file(folder: Path, namespace_id: int = 1) -> Path:
    return folder / INDEXES / f"{namespace_id}.index"


# Index files


class OneIndex:
    """The index of one namespace as another process would load it, without opening the whole store."""

    def __init__(self, folder: Path, settings: AgentDBSettings) -> None:
        self.folder, self.settings = folder, settings
        self.database = Database(folder / DATABASE, schema.MIGRATIONS)
        self.layout = self.database.read_sync(lambda connection: find_namespace(connection, T, SPACE)).layout

    def reason(self, *, compared: bool = True) -> str | None:
        """Why the file was not used. What is in its place answers, and may be compared with the rows."""
        indexes = Indexes(self.folder / INDEXES, self.settings, self.database.read_sync)

        def job(connection: apsw.Connection) -> list[str]:
            keys, vectors = next(walk_vectors(connection, self.layout))
            near = indexes.nearest(connection, self.layout, vectors[0], 3)
            assert near.keys[0] == keys[0]
            return indexes.check(connection, self.layout) if compared else []

        assert self.database.read_sync(job) == []
        return indexes.rebuilt.get(1)


@contextmanager
def one_index(folder: Path, settings: AgentDBSettings) -> Generator[OneIndex]:
    opened = OneIndex(folder, settings)
    try:
        yield opened
    finally:
        opened.database.close()


@TIERS
@pytest.mark.timeout(600)
async def test_index_file_truncated_at_every_byte(tmp_path: Path, settings: AgentDBSettings) -> None:
    """Catches a part of an index that is taken for the whole, and a reader that trips over one."""
    count = 12
    await filled(tmp_path, settings, count)
    path = index_file(tmp_path)
    whole = path.read_bytes()
    with one_index(tmp_path, settings) as index, structlog.testing.capture_logs() as logs:
        assert index.reason() is None
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert index.reason(compared=length % 40 == 0) is not None, (
                f"{length} of {len(whole)} bytes were served"
            )
        path.write_bytes(whole + b"\0")
        assert index.reason() is not None
    assert sum(log["event"] == "index_rebuilt" for log in logs) == len(whole) + 1
    for length in (0, 1, 16, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        await rebuilt(tmp_path, settings, count)


@TIERS
async def test_index_file_with_flipped_bits(tmp_path: Path, settings: AgentDBSettings) -> None:
    """Catches a damaged index that is served."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    count = 12
    await filled(tmp_path, settings, count)
    path = index_file(tmp_path)
    whole = path.read_bytes()
    with one_index(tmp_path, settings) as index:
        for _ in range(300):
            flipped = bytearray(whole)
            at = chance.randrange(len(whole))
            flipped[at] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            assert index.reason(compared=False) is not None, f"seed {seed}: bit flipped in byte {at}"
    await rebuilt(tmp_path, settings, count)


async def test_index_file_of_something_else(tmp_path: Path) -> None:
    """Catches an index of another namespace, database or format that is taken for this one's, and a header
    that says nothing we know."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        await filled(folder, SCAN, 12)
        await filled(folder, SCAN, 12, "others")
    path = index_file(here)
    about, parts = read_index(path)
    strange: list[tuple[dict[str, Any], dict[str, bytes]]] = [
        ({**about, "format": about["format"] + 1}, parts),
        ({**about, "dimension": 8}, parts),
        ({**about, "library": "another"}, parts),
        ({name: about[name] for name in about if name != "library"}, parts),
        ({name: about[name] for name in about if name not in ("sequence", "mark")}, parts),
        (about, {}),
        (about, {"codes": b"no codes"}),
    ]
    for changed, content in strange:
        write_index(path, changed, content)
        await rebuilt(here, SCAN, 12)
    for source in (index_file(here, 2), index_file(there)):
        shutil.copy(source, path)
        await rebuilt(here, SCAN, 12)
    path.write_bytes(os.urandom(5000))
    await rebuilt(here, SCAN, 12)
    path.unlink()
    path.mkdir()
    async with AgentDB(here, SCAN) as store:
        await answers(store, 12)
        assert list(store.indexes_rebuilt()) == [1]


@TIERS
async def test_index_newer_than_the_database(tmp_path: Path, settings: AgentDBSettings) -> None:
    """Catches an index that is trusted because its number fits, when the database was put back."""
    await filled(tmp_path, settings, 12)
    old = tmp_path / "old.db"
    shutil.copy(tmp_path / DATABASE, old)
    async with AgentDB(tmp_path, settings) as store:
        await store.upsert(T, SPACE, items(5, first=12))
        await store.delete(T, SPACE, ["item3"])
        await store.settle()
    newer = index_file(tmp_path).read_bytes()
    shutil.copy(old, tmp_path / DATABASE)
    await rebuilt(tmp_path, settings, 12)
    # The same number of calls again, other ones: the sequence fits, what it stands for does not.
    async with AgentDB(tmp_path, settings) as store:
        await store.upsert(T, SPACE, items(8, first=12))
        await store.delete(T, SPACE, ["item19"])
    index_file(tmp_path).write_bytes(newer)
    await rebuilt(tmp_path, settings, 19)


async def test_indexes_folder_is_missing(tmp_path: Path) -> None:
    """Catches a store that needs its derived files."""
    await filled(tmp_path, SCAN, 12)
    shutil.rmtree(tmp_path / INDEXES)
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 12)
        await store.upsert(T, SPACE, items(4, first=12))
        await store.settle()
        assert index_file(tmp_path).exists()
        shutil.rmtree(tmp_path / INDEXES)
        await store.upsert(T, SPACE, items(4, first=16))
        await answers(store, 20)
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 20)


async def test_indexes_folder_cannot_be_written(tmp_path: Path) -> None:
    """Catches searches, writes or erasure that fail because an index cannot be kept, and silence about it."""
    await filled(tmp_path, SCAN, 12)
    shutil.rmtree(tmp_path / INDEXES)
    (tmp_path / INDEXES).write_text("in the way")
    with structlog.testing.capture_logs() as logs:
        async with AgentDB(tmp_path, SCAN) as store:
            await answers(store, 12)
            await store.upsert(T, SPACE, items(4, first=12))
            await store.settle()
            await answers(store, 16)
            assert [space.items for space in await store.stats(T)] == [16]
            await store.create_namespace(T, "more", dimension=DIMENSION, embedder_id="test")
            assert await store.delete_namespace(T, "more")
            await store.create_namespace("other", "more", dimension=DIMENSION, embedder_id="test")
            assert await store.erase_tenant("other") == 0
    assert "index_unsaved" in {log["event"] for log in logs}
    (tmp_path / INDEXES).unlink()
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 16)
    assert index_file(tmp_path).exists()


@pytest.mark.parametrize("left", [f"1.index.{2**22 + 1}.0a0b0c0d.part", "77.index"])  # no process has that
async def test_files_that_a_killed_process_left_are_removed(tmp_path: Path, left: str) -> None:
    """Catches half-written index files that pile up, and indexes of namespaces that are gone."""
    await filled(tmp_path, SCAN, 12)
    path = tmp_path / INDEXES / left
    shutil.copy(index_file(tmp_path), path)
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 12)
        assert store.indexes_rebuilt() == {}
    assert sorted(file.name for file in (tmp_path / INDEXES).iterdir()) == ["1.index"]


# The database file


async def test_database_of_a_newer_version(tmp_path: Path) -> None:
    """Catches an older program that writes into a newer file."""
    await filled(tmp_path, SCAN, 3)
    set_version(tmp_path, 99)
    before = (tmp_path / DATABASE).read_bytes()
    with pytest.raises(Conflict, match="schema version 99") as caught:
        AgentDB(tmp_path, SCAN)
    assert caught.value.hint is not None
    assert "newer" in caught.value.hint
    assert (tmp_path / DATABASE).read_bytes() == before
    set_version(tmp_path, len(schema.MIGRATIONS))
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 3)


def set_version(folder: Path, version: int) -> None:
    connection = apsw.Connection(str(folder / DATABASE))
    rows(connection, f"PRAGMA user_version={version}")
    connection.close()


@pytest.mark.parametrize(
    "content", [b"no database " * 1000, os.urandom(20_000), b"SQLite format 3\0" + b"?" * 9000]
)
def test_garbage_in_place_of_the_database(tmp_path: Path, content: bytes) -> None:
    """Catches a raw error of SQLite, and a store that overwrites what it does not know."""
    path = tmp_path / DATABASE
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataCorrupted, match="not a healthy database") as caught:
        AgentDB(tmp_path, SCAN)
    assert caught.value.hint == "restore it from a backup"
    assert path.read_bytes() == content


async def test_database_truncated_or_with_zeroed_pages(tmp_path: Path) -> None:
    """Catches wrong answers, raw errors and hangs when part of the file is gone: each call answers rightly or
    says DataCorrupted. (Rows here fit into their pages: SQLite keeps no checksums, so zeros in the overflow
    pages of a long text are beyond what it can see; `verify` of a backup compares digests.)"""
    source = tmp_path / "source"
    count = 150
    await filled(source, SCAN, count)
    whole = (source / DATABASE).read_bytes()
    told, hints = {"right": 0, "corrupted": 0}, set[str | None]()
    size = 4096
    again = tmp_path / "again"
    damaged = [
        whole[: page * size] + bytes(size) + whole[(page + 1) * size :] for page in range(len(whole) // size)
    ]
    damaged += [whole[: page * size + cut] for page in range(1, len(whole) // size, 4) for cut in (0, 1000)]
    for content in damaged:
        shutil.copytree(source, again)
        (again / DATABASE).write_bytes(content)
        try:
            async with AgentDB(again, SCAN) as store:
                for call in damaged_calls(store, count):
                    try:
                        await asyncio.wait_for(call, 20)
                        told["right"] += 1
                    except DataCorrupted as error:
                        hints.add(error.hint)
                        told["corrupted"] += 1
        except DataCorrupted as error:
            hints.add(error.hint)
            told["corrupted"] += 1
        shutil.rmtree(again)
    print(f"{len(damaged)} damaged files: {told}")
    assert told["right"] > 0
    assert told["corrupted"] > 0
    assert all(hint and "backup" in hint for hint in hints)


def damaged_calls(store: AgentDB, count: int) -> Iterator[Any]:
    wanted = items(count)

    async def get() -> None:
        found = await store.get(T, SPACE, [item.id for item in wanted])
        assert [(item.id, item.text, item.metadata, item.vector) for item in found] == [
            (item.id, item.text, item.metadata, item.vector) for item in wanted
        ]

    async def listed() -> None:
        found = (await store.list_items(T, SPACE, limit=1000, vectors=True)).items
        assert {item.id: item.vector for item in found} == {item.id: item.vector for item in wanted}

    async def by_vector() -> None:
        for item in wanted[::10]:
            found = await store.search(T, SPACE, SearchQuery(vector=item.vector, mode="vector", k=1))
            assert [hit.item.id for hit in found.hits] == [item.id]

    async def by_word() -> None:
        for item in wanted[::10]:
            query = SearchQuery(text=f"number{item.metadata['n']}", mode="text", k=1)
            assert [hit.item.id for hit in (await store.search(T, SPACE, query)).hits] == [item.id]

    async def write() -> None:
        await store.upsert(T, SPACE, items(1, first=count))
        assert [item.id for item in await store.get(T, SPACE, [f"item{count}"])] == [f"item{count}"]
        assert await store.delete(T, SPACE, [f"item{count}"]) == 1

    for call in (get, listed, by_vector, by_word, write):
        yield call()


async def test_paths_that_are_something_else(tmp_path: Path) -> None:
    """Catches a raw OSError, and one that does not name the path."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="file") as caught:
        AgentDB(tmp_path / "file", SCAN)
    assert caught.value.hint is not None
    (tmp_path / "folder" / DATABASE).mkdir(parents=True)
    with pytest.raises(Unavailable, match=r"agentdb\.db") as caught:
        AgentDB(tmp_path / "folder", SCAN)
    assert caught.value.hint is not None


# Locks


@contextmanager
def write_lock(folder: Path) -> Generator[apsw.Connection]:
    """Another writer in the middle of its transaction."""
    connection = apsw.Connection(str(folder / DATABASE))
    try:
        rows(connection, "BEGIN IMMEDIATE")
        yield connection
    finally:
        if connection.in_transaction:
            rows(connection, "ROLLBACK")
        connection.close()


async def test_second_writer_waits(tmp_path: Path) -> None:
    """Catches a write that is refused, or slips in, while another writer is at work."""
    await filled(tmp_path, SCAN, 3)
    async with AgentDB(tmp_path, SCAN) as store:
        with write_lock(tmp_path) as other:
            writing = asyncio.create_task(store.upsert(T, SPACE, items(1, first=3)))
            await answers(store, 3)  # readers are not held up
            done, _ = await asyncio.wait({writing}, timeout=0.2)
            assert not done
            rows(other, "COMMIT")
            assert (await writing).inserted == 1
        await answers(store, 4)


async def test_lock_held_too_long_is_told(tmp_path: Path) -> None:
    """Catches a write that waits for ever, or an error that does not name the other process."""
    await filled(tmp_path, SCAN, 3)
    database = Database(tmp_path / DATABASE, schema.MIGRATIONS, busy_timeout_s=0.1)
    try:
        with write_lock(tmp_path):
            with pytest.raises(Unavailable, match="locked") as caught:
                await database.write(lambda connection: rows(connection, "DELETE FROM items"))
            assert caught.value.hint is not None
            assert "another process" in caught.value.hint
            with pytest.raises(Unavailable, match="locked by another process"):
                Database(tmp_path / DATABASE, schema.MIGRATIONS, busy_timeout_s=0.1)
        await database.write(lambda connection: rows(connection, "SELECT 1"))
    finally:
        database.close()
    async with AgentDB(tmp_path, SCAN) as store:
        await answers(store, 3)


# Full and read-only disks: in a process of their own, which sets its limits itself


OTHER_PROCESS = """
import asyncio, json, os, resource, signal, subprocess, sys
from pathlib import Path
import structlog
sys.path.insert(0, sys.argv[1])
from test_agentdb_faults import SCAN, SPACE, T, answers, filled, items, told_of
from agentic_flow.agentdb.service import DATABASE, AgentDB
from agentic_flow.core.vectors import SearchQuery

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
folder = Path(sys.argv[2])
"""

FILE_LIMIT = """
async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    await filled(folder, SCAN, 20)
    told = []
    async with AgentDB(folder, SCAN) as store:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        for size_bytes, count in ((2_000, 400), (9_000, 4_000), (2_000, 400)):
            told.append(await told_of(store.upsert(T, SPACE, items(count, first=20, size_bytes=size_bytes))))
            await answers(store, 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told.append(await told_of(store.upsert(T, SPACE, items(400, first=20))))
        await answers(store, 420)
    async with AgentDB(folder, SCAN) as store:
        await answers(store, 420)
    print(json.dumps(told))

asyncio.run(main())
"""

SMALL_DISK = """
async def main():
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], check=True)
    data = folder / "data"
    await filled(data, SCAN, 20)
    told, stored = [], 20
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(5_000_000))
    async with AgentDB(data, SCAN) as store:
        for size_bytes, count in ((9_000, 4_000), (9_000, 500), (9_000, 2_000)):
            told.append(await told_of(store.upsert(T, SPACE, items(count, first=20, size_bytes=size_bytes))))
            await answers(store, 20)
        error = None
        while error is None:
            error = await told_of(store.upsert(T, SPACE, items(1, first=stored, size_bytes=9_000)))
            stored += error is None
            assert stored < 2_000
        told.append(error)
        await answers(store, stored)
        assert stored > 20
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass
    other = folder / "data2"
    try:
        AgentDB(other, SCAN)
        told.append(None)
    except Exception as error:
        told.append([type(error).__name__, str(error), getattr(error, "hint", None)])
    ballast.unlink()
    async with AgentDB(data, SCAN) as store:
        told.append(await told_of(store.upsert(T, SPACE, items(40, first=stored))))
        await answers(store, stored + 40)
    print(json.dumps(told))

asyncio.run(main())
"""

READ_ONLY_DISK = """
async def main():
    await filled(folder, SCAN, 20)
    told = []
    async with AgentDB(folder, SCAN) as store:
        await answers(store, 20)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    for place in (folder, folder / "new"):
        try:
            AgentDB(place, SCAN)
            told.append(None)
        except Exception as error:
            told.append([type(error).__name__, str(error), getattr(error, "hint", None)])
    subprocess.run(["umount", str(folder)], check=True)
    async with AgentDB(folder, SCAN) as store:
        await answers(store, 20)
    print(json.dumps(told))

asyncio.run(main())
"""

NOT_ALLOWED = """
async def main():
    await filled(folder, SCAN, 20)
    for path in (folder, folder / "agentdb", folder / DATABASE):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write anywhere
    told = []
    for place in (folder, folder / "new"):
        try:
            AgentDB(place, SCAN)
            told.append(None)
        except Exception as error:
            told.append([type(error).__name__, str(error), getattr(error, "hint", None)])
    print(json.dumps(told))

asyncio.run(main())
"""


async def told_of(call: Any) -> list[Any] | None:
    """Class, message and hint of the error that a call ends with."""
    try:
        await call
    except Exception as error:  # noqa: BLE001 - what it is is the subject
        return [type(error).__name__, str(error), getattr(error, "hint", None)]
    return None


def in_other_process(script: str, folder: Path, *before: str) -> list[list[str] | None]:
    """What the script told."""
    ended = subprocess.run(
        [*before, sys.executable, "-c", OTHER_PROCESS + script, str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return cast(list[list[str] | None], json.loads(ended.stdout.splitlines()[-1]))


def private_mounts() -> bool:
    """Whether this user may mount file systems that nobody else sees."""
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


MOUNTS = pytest.mark.skipif(
    not shutil.which("unshare") or not private_mounts(), reason="this user may not mount file systems"
)


def assert_says(told: list[str] | None, kind: type[AgenticFlowError], *words: str) -> None:
    assert told is not None, "no error"
    assert told[0] == kind.__name__, told
    assert told[2], f"no hint: {told}"
    for word in words:
        assert word in f"{told[1]} {told[2]}", told


def test_file_that_cannot_grow(tmp_path: Path) -> None:
    """Catches lost rows, raw errors and a store that stays broken when the file system takes no more."""
    small, large, again, after = in_other_process(FILE_LIMIT, tmp_path)
    for told in (small, large, again):
        assert_says(told, Unavailable, "nothing was written", "room on the disk")
    assert after is None


@MOUNTS
def test_full_disk(tmp_path: Path) -> None:
    """Catches the same on a disk that is really full, for calls of any size and for opening a new store."""
    *calls, opening, after = in_other_process(SMALL_DISK, tmp_path, "unshare", "--mount")
    assert len(calls) == 4
    for told in calls:
        assert_says(told, StorageFull, "nothing was written", "room on the disk")
    assert_says(opening, StorageFull, "room on the disk")
    assert after is None


@MOUNTS
def test_read_only_disk(tmp_path: Path) -> None:
    """Catches a raw error, or one that does not say what to make writable."""
    for told in in_other_process(READ_ONLY_DISK, tmp_path, "unshare", "--mount"):
        assert_says(told, Unavailable, "permissions")


def test_folder_without_permission() -> None:
    """Catches the same for a folder that belongs to somebody else."""
    # pytest's own folders let nobody else in, which would be another error.
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        try:
            for told in in_other_process(NOT_ALLOWED, folder):
                assert_says(told, Unavailable, "permissions")
        finally:
            for path in (folder, folder / "agentdb"):
                path.chmod(0o755)
