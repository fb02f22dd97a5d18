"""AgentDB's file: several processes at once, SIGKILL, erasure, expiry, and the cache derived from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.service import DATABASE, AgentDB
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery
from agentic_flow.testing.vector_store_contract import document, found_by

pytestmark = pytest.mark.anyio

T, SPACE = "tenant", "notes"
SETTINGS = AgentDBSettings(embedding_dimension=256)
MODES = ("hybrid", "text", "vector")
KILLS = 6

PEER = """
import asyncio, json, pathlib, sys
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item, SearchQuery
from agentic_flow.testing.vector_store_contract import document

async def main():
    async with AgentDB(pathlib.Path(sys.argv[1]), AgentDBSettings(embedding_dimension=256)) as db:
        for line in iter(sys.stdin.readline, ""):
            name, args = json.loads(line)
            if name == "search":
                query = SearchQuery.model_validate(args[0])
                answer = [hit.item.id for hit in (await db.search("tenant", "notes", query)).hits]
            elif name == "upsert":
                items = [Item.model_validate(item) for item in args[0]]
                answer = (await db.upsert("tenant", "notes", items)).versions
            elif name == "delete":
                answer = await db.delete("tenant", "notes", args[0])
            elif name == "remake":
                await db.delete_namespace("tenant", "notes")
                answer = (await db.create_namespace("tenant", "notes", **args[0])).dimension
            elif name == "churn":
                for version in range(1, 10**9):
                    for path in args[0]:
                        texts = [f"{path[0]}word version{version} line{n}" for n in range(1 + version % 7)]
                        await db.put_documents("tenant", "notes", [document(path, texts, str(version))])
                        print(json.dumps([path, version]), flush=True)
            print(json.dumps(answer), flush=True)

asyncio.run(main())
"""


class Peer:
    """Another process on the same folder."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ,
            text=True,
        )

    def send(self, name: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def line(self) -> Any:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the other process ended"
        return json.loads(text)

    async def do(self, name: str, *arguments: Any) -> Any:
        self.send(name, *arguments)
        return await asyncio.to_thread(self.line)


@contextlib.contextmanager
def peer_of(data_dir: Path) -> Generator[Peer]:
    peer = Peer(data_dir)
    try:
        yield peer
        assert peer.process.stdin is not None
        peer.process.stdin.close()
        assert peer.process.wait(30) == 0
    finally:
        if peer.process.poll() is None:
            peer.process.kill()
            peer.process.wait()
        for pipe in (peer.process.stdin, peer.process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def raw(data_dir: Path) -> Generator[apsw.Connection]:
    connection = apsw.Connection(str(data_dir / DATABASE))
    try:
        yield connection
    finally:
        connection.close()


def assert_whole(data_dir: Path) -> None:
    """SQLite's own check, and that items, full text and documents tell the same story."""
    with raw(data_dir) as connection:
        assert rows(connection, "PRAGMA integrity_check") == [("ok",)]
        assert rows(connection, "PRAGMA foreign_key_check") == []
        for (space,) in rows(connection, "SELECT id FROM namespaces"):
            items, documents = schema.item_table(space), schema.document_table(space)
            keys = rows(connection, "SELECT key FROM items WHERE namespace_id = ? ORDER BY key", (space,))
            assert rows(connection, f"SELECT rowid FROM {items} ORDER BY rowid") == keys
            wanted = rows(connection, "SELECT id FROM documents WHERE namespace_id = ? ORDER BY id", (space,))
            assert rows(connection, f"SELECT rowid FROM {documents} ORDER BY rowid") == wanted


def add_operations(data_dir: Path, count: int) -> None:
    """Let the log go on as if so many operations had been written and pruned since."""
    with raw(data_dir) as connection:
        rows(connection, "UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'operations'", (count,))


class SetClock(SystemClock):
    """A clock that a test moves."""

    now_s = 1_000_000.0

    def time_s(self) -> float:
        return self.now_s


@pytest.mark.timeout(300)
async def test_killed_while_writing_documents(tmp_path: Path) -> None:
    """Catches half a document, a lost acknowledged write, or an index out of step after SIGKILL."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, paths = random.Random(seed), ["a.py", "b.py", "c.py"]
    for _ in range(KILLS):
        async with AgentDB(tmp_path, SETTINGS) as store:
            await store.create_namespace(T, SPACE)
            await store.delete_documents(T, SPACE, paths)
        acknowledged: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            peer = Peer(tmp_path)
            stack.callback(peer.process.wait)
            for pipe in (peer.process.stdin, peer.process.stdout):
                assert pipe is not None
                stack.callback(pipe.close)
            peer.send("churn", paths)
            for _ in range(rng.randrange(1, 25)):
                path, version = await asyncio.to_thread(peer.line)
                acknowledged[path] = version
            await asyncio.sleep(rng.random() * 0.02)  # the point between two writes is the subject
            peer.process.send_signal(signal.SIGKILL)
            assert peer.process.stdout is not None
            for line in peer.process.stdout.read().splitlines(keepends=True):
                if line.endswith("\n"):
                    path, version = json.loads(line)
                    acknowledged[path] = version
        assert_whole(tmp_path)
        async with AgentDB(tmp_path, SETTINGS) as store:
            marks = await store.fingerprints(T, SPACE)
            assert set(marks) >= set(acknowledged), seed
            items = (await store.list_items(T, SPACE, limit=1000)).items
            for path, mark in marks.items():
                version = int(mark.sha256)
                assert version >= acknowledged.get(path, 0), (seed, path)
                own = sorted(item.id for item in items if item.id.startswith(f"{path}:"))
                whole = document(
                    path, [f"{path[0]}word version{version} line{n}" for n in range(1 + version % 7)]
                )
                assert own == sorted(chunk.id for chunk in whole.chunks), (seed, path)
                texts = {item.text for item in items if item.id in own}
                assert texts == {chunk.text for chunk in whole.chunks}, (seed, path)
                for mode in MODES:
                    found = await found_by(store, T, text=f"{path[0]}word", mode=mode, k=100)
                    assert set(found) >= set(own), (seed, path, mode)


async def test_two_processes_see_each_other(tmp_path: Path) -> None:
    """Catches a cache that misses what another process wrote, or shows what it deleted, in any mode."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        with peer_of(tmp_path) as peer:
            for round_ in range(12):
                mine, theirs = f"mine{round_}", f"theirs{round_}"
                await store.upsert(T, SPACE, [Item(id=mine, text=f"zebra walrus {round_}")])
                await peer.do("upsert", [{"id": theirs, "text": f"zebra giraffe {round_}"}])
                for mode in MODES:
                    query = {"text": "zebra", "mode": mode, "k": 1000}
                    here = await found_by(store, T, **query)
                    assert set(here) == set(await peer.do("search", query)), (round_, mode)
                    assert {mine, theirs} <= set(here), (round_, mode)
                if round_ % 2:
                    assert await peer.do("delete", [mine]) == 1
                    assert await store.delete(T, SPACE, [theirs]) == 1
                    for mode in MODES:
                        query = {"text": "zebra", "mode": mode, "k": 1000}
                        assert mine not in await found_by(store, T, **query), (round_, mode)
                        assert theirs not in await peer.do("search", query), (round_, mode)
            # The same id with other words: the old vector must not answer.
            await peer.do("upsert", [{"id": "mine0", "text": "submarine periscope"}])
            assert (await found_by(store, T, text="submarine", mode="vector"))[0] == "mine0"
            # Another process replaces the whole namespace: other dimension, no items.
            assert await peer.do("remake", {"dimension": 2, "metric": "dot"}) == 2
            assert (await store.search(T, SPACE, SearchQuery(vector=(1.0, 0.0)))).hits == ()
            await peer.do("upsert", [{"id": "new", "vector": [1.0, 2.0]}])
            assert await found_by(store, T, vector=(1.0, 0.0)) == ["new"]
    assert_whole(tmp_path)


async def test_searches_beside_another_writer_are_consistent(tmp_path: Path) -> None:
    """Catches hits mixed of two versions of a document, duplicates, and errors while another writes."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        peer = Peer(tmp_path)
        try:
            peer.send("churn", ["a.py"])
            newest = 0
            for step in range(60):
                _, newest = await asyncio.to_thread(peer.line)
                result = await store.search(
                    T, SPACE, SearchQuery(text="aword line", mode=("hybrid", "text")[step % 2], k=100)
                )
                versions = {int(hit.item.text.split("version")[1].split()[0]) for hit in result.hits}
                ids = [hit.item.id for hit in result.hits]
                assert len(versions) == 1, "chunks of two versions in one answer"
                assert versions.pop() >= newest
                assert len(set(ids)) == len(ids)
                page = await store.list_items(T, SPACE, limit=1000)
                assert len({item.text.split()[1] for item in page.items}) == 1
        finally:
            peer.process.kill()
            peer.process.wait()
            for pipe in (peer.process.stdin, peer.process.stdout):
                assert pipe is not None
                pipe.close()
    assert_whole(tmp_path)


async def test_concurrent_writes_and_searches(tmp_path: Path) -> None:
    """Catches lost updates and threads that disturb each other within one process."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)

        async def worker(number: int) -> None:
            for step in range(8):
                await store.upsert(T, SPACE, [Item(id=f"w{number}s{step}", text=f"zebra {number} {step}")])
                assert f"w{number}s{step}" in await found_by(store, T, text="zebra", k=1000)
                if step % 2:
                    assert await store.delete(T, SPACE, [f"w{number}s{step}"]) == 1
                    assert f"w{number}s{step}" not in await found_by(store, T, text="zebra", k=1000)

        await asyncio.gather(*(worker(number) for number in range(8)))
        race = [store.upsert(T, SPACE, [Item(id="one")], expected_version=0) for _ in range(10)]
        outcomes = await asyncio.gather(*race, return_exceptions=True)
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 9
        assert (await store.namespaces(T))[0].items == 8 * 4 + 1
    assert_whole(tmp_path)


async def test_row_ids_are_never_reused(tmp_path: Path) -> None:
    """Catches a new row that takes a deleted row's place in a cache, and so its vector."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        seen: set[int] = set()
        for text in ("zebra", "walrus", "giraffe"):
            await store.upsert(T, SPACE, [Item(id="a", text=text)])
            assert await found_by(store, T, text=text, mode="vector") == ["a"]
            with raw(tmp_path) as connection:
                ((key,),) = rows(connection, "SELECT key FROM items")
            assert key not in seen
            seen.add(key)
            await store.delete(T, SPACE, ["a"])
        await store.delete_namespace(T, SPACE)
        await store.create_namespace(T, SPACE)
        with raw(tmp_path) as connection:
            assert rows(connection, "SELECT id FROM namespaces") == [(2,)]


async def test_erasing_a_tenant_leaves_no_row(tmp_path: Path) -> None:
    """Catches a table that erasure forgot: every table of the file is looked at, whatever its name."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace("kept", SPACE)
        await store.upsert("kept", SPACE, [Item(id="k", text="kept words")], idempotency_key="kept")
    with raw(tmp_path) as connection:
        before = contents(connection)
    async with AgentDB(tmp_path, SETTINGS) as store:
        for space in (SPACE, "more"):
            await store.create_namespace("gone", space)
            await store.upsert("gone", space, [Item(id="i", text="secretword")], idempotency_key="secretkey")
            await store.put_documents("gone", space, [document("secret.py", ["secretword", "more"])])
            assert len((await store.search("gone", space, SearchQuery(text="secretword"))).hits) > 0
        assert await store.erase_tenant("gone") == 6
    with raw(tmp_path) as connection:
        assert contents(connection) == before
        rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert_whole(tmp_path)


def contents(connection: apsw.Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, counters aside, and that some namespace (a number) went at some time."""
    names = [name for (name,) in rows(connection, "SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {
        name: sorted(rows(connection, f'SELECT * FROM "{name}"'), key=repr)
        for name in names
        if name not in ("sqlite_sequence", "operations")
    } | {"operations": rows(connection, "SELECT * FROM operations WHERE kind != 'drop'")}


async def test_time_passes(tmp_path: Path) -> None:
    """Catches expiry decided at write time, expired rows never removed, idempotency keys kept for ever."""
    clock = SetClock()
    async with AgentDB(tmp_path, SETTINGS, clock=clock) as store:
        await store.create_namespace(T, SPACE)
        item = Item(id="a", text="zebra", expires_at_s=clock.now_s + 10)
        await store.upsert(T, SPACE, [item], idempotency_key="k")
        for mode in MODES:
            assert await found_by(store, T, text="zebra", mode=mode) == ["a"]
        clock.now_s += 10
        for mode in MODES:
            assert await found_by(store, T, text="zebra", mode=mode) == []
        assert (await store.namespaces(T))[0].items == 0
        assert (await store.upsert(T, SPACE, [item], idempotency_key="k")).versions == (1,)
        assert await store.get(T, SPACE, ["a"]) == [], "a replay wrote again"
        await store.upsert(T, SPACE, [Item(id="b", text="walrus")])
        with raw(tmp_path) as connection:
            assert rows(connection, "SELECT id FROM items") == [("b",)]
        clock.now_s += schema.IDEMPOTENCY_KEPT_S
        again = Item(id="a", text="another request")
        assert (await store.upsert(T, SPACE, [again], idempotency_key="k")).inserted == 1
    assert_whole(tmp_path)


async def test_time_passes_after_writes_elsewhere(tmp_path: Path) -> None:
    """Catches a search that goes by what it knew of the times of rows before its namespace changed."""
    clock = SetClock()
    async with AgentDB(tmp_path, SETTINGS, clock=clock) as store, AgentDB(tmp_path, SETTINGS) as other:
        for name in (SPACE, "elsewhere"):
            await store.create_namespace(T, name)
        await store.upsert(T, SPACE, [Item(id="a", text="zebra")])
        for mode in MODES:
            assert await found_by(store, T, text="zebra", mode=mode) == ["a"]
        await other.upsert(T, "elsewhere", [Item(id="x", text="walrus", expires_at_s=clock.now_s + 1)])
        for mode in MODES:
            assert await found_by(store, T, text="zebra", mode=mode) == ["a"]
        await other.upsert(T, SPACE, [Item(id="b", text="zebra", expires_at_s=clock.now_s + 10)])
        await other.upsert(T, "elsewhere", [Item(id="y", text="walrus")])
        for passed_s, left in ((0, ["a", "b"]), (10, ["a"])):
            clock.now_s += passed_s
            for mode in MODES:
                assert sorted(await found_by(store, T, text="zebra", mode=mode)) == left


@pytest.mark.parametrize("key", ["", "\ud800", "a\x00b", "a\nb", "k" * (schema.KEY_CHARS_MAX + 1)], ids=ascii)
async def test_bad_idempotency_keys_are_refused(key: str, tmp_path: Path) -> None:
    """Catches a key that the database chokes on, or cuts short so that two keys become one."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        with pytest.raises(InvalidInput):
            await store.upsert(T, SPACE, [Item(id="a")], idempotency_key=key)
        assert await store.get(T, SPACE, ["a"]) == []


async def test_another_embedder_is_refused(tmp_path: Path) -> None:
    """Catches vectors of two embedders compared with each other after the settings changed."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        await store.upsert(T, SPACE, [Item(id="a", text="zebra")])
    async with AgentDB(tmp_path, AgentDBSettings(embedding_dimension=512)) as store:
        with pytest.raises(Conflict):
            await store.create_namespace(T, SPACE)
        with pytest.raises(Conflict):
            await store.upsert(T, SPACE, [Item(id="b", text="walrus")])
        with pytest.raises(Conflict):
            await store.search(T, SPACE, SearchQuery(text="zebra"))
        assert await found_by(store, T, text="zebra", mode="text") == ["a"]
    async with AgentDB(tmp_path, SETTINGS) as store:
        assert await found_by(store, T, text="zebra") == ["a"]


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
async def test_brought_vectors_in_half_precision(metric: Any, tmp_path: Path) -> None:
    """Catches overflow or underflow of float16 when a caller brings a vector to an embedded namespace."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE, metric=metric)
        big = Item(id="big", text="zebra", vector=(1e6, *[0.0] * 255))
        small = Item(id="small", text="zebra", vector=(0.0, 1e-9, *[0.0] * 254))
        if metric == "cosine":
            await store.upsert(T, SPACE, [big, small])
            query = SearchQuery(vector=small.vector, mode="vector")
            hits = (await store.search(T, SPACE, query)).hits
            assert [(hit.item.id, round(hit.score, 3)) for hit in hits] == [("small", 1.0), ("big", 0.0)]
        else:
            with pytest.raises(InvalidInput):
                await store.upsert(T, SPACE, [big])
            assert await store.get(T, SPACE, ["big"]) == []


async def test_documents_without_chunks_keep_theirs(tmp_path: Path) -> None:
    """Catches a touched file losing its chunks, and an emptied file keeping them."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(T, SPACE)
        await store.put_documents(T, SPACE, [document("a.py", ["zebra", "walrus"], "one")])
        touched = Fingerprint(size_bytes=2, mtime_ns=99, sha256="one")
        assert (
            await store.put_documents(T, SPACE, [Document(path="a.py", fingerprint=touched, chunks=())]) == 2
        )
        assert (await store.fingerprints(T, SPACE))["a.py"] == touched
        emptied = Fingerprint(size_bytes=0, mtime_ns=100, sha256="two")
        assert (
            await store.put_documents(T, SPACE, [Document(path="a.py", fingerprint=emptied, chunks=())]) == 0
        )
        assert (await store.list_items(T, SPACE)).items == ()
        assert await store.fingerprints(T, SPACE) == {"a.py": emptied}
        assert await found_by(store, T, text="zebra") == []
    assert_whole(tmp_path)


async def test_cache_notices_a_pruned_log(tmp_path: Path) -> None:
    """Catches a stale answer when operations were pruned, and those after them are gone as well."""
    async with AgentDB(tmp_path, SETTINGS) as reader, AgentDB(tmp_path, SETTINGS) as writer:
        for space in (SPACE, "busy"):
            await reader.create_namespace(T, space, dimension=2)
        await writer.upsert(T, SPACE, [Item(id="old", vector=(1.0, 0.0))])
        assert await found_by(reader, T, vector=(1.0, 0.0), mode="vector") == ["old"]
        await writer.delete(T, SPACE, ["old"])
        await writer.upsert(T, SPACE, [Item(id="new", vector=(1.0, 0.0))])
        add_operations(tmp_path, schema.OPERATIONS_KEPT)
        await writer.upsert(T, "busy", [Item(id="x", vector=(1.0, 0.0))])
        await writer.delete_namespace(T, "busy")
        with raw(tmp_path) as connection:
            kept = rows(connection, "SELECT kind FROM operations")
            assert kept == [("drop",)], "nothing was pruned"
        assert await found_by(reader, T, vector=(1.0, 0.0), mode="vector") == ["new"]
