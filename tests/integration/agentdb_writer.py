"""Writers on one AgentDB folder that are killed at random, and checked by the next one.

    python agentdb_writer.py FOLDER SEED KILLS SETTINGS_JSON

This process imports everything once and then only forks, which makes a kill cost some hundred milliseconds.
Each child opens the folder, compares it with what was acknowledged, tells what it found, and goes on writing
until it is killed. The last line of the output is a JSON object that says how many kills there were and when
they hit. Anything that is not as it must be ends this process with status 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import apsw
import numpy as np
import structlog
from agentdb_model import (
    BASE_S,
    EMBEDDER,
    LANES,
    SPECS,
    Call,
    Lane,
    Space,
    documents_of,
    items_of,
    own_word,
    refreshed,
    restored_of,
    stored_vector,
)

from agentic_flow.agentdb.index.codes import make_codes
from agentic_flow.agentdb.index.layout import Layout
from agentic_flow.agentdb.service import DATABASE, INDEXES, AgentDB
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Item, SearchQuery

CALLS_MAX = 16
"""Calls of a lane after which a child closes the store and begins anew."""
SEARCHED_ROWS = 30
WINDOW_S = 2.0
"""Longest wait for the moment of a kill; after it the child is killed wherever it is."""

_now_s: ContextVar[float] = ContextVar("now_s", default=BASE_S)


class LaneClock(SystemClock):
    """Each lane has its own time, that of its calls."""

    def time_s(self) -> float:
        return _now_s.get()


def at_time(now_s: float) -> None:
    """Let the clock of this task show that time."""
    _now_s.set(now_s)


# In the child: check, then write until killed


class Child:
    """One life of the store."""

    def __init__(self, folder: Path, settings: AgentDBSettings, lanes: Sequence[Lane], report: int) -> None:
        self.folder, self.settings, self.report = folder, settings, report
        self.lanes = list(lanes)

    def tell(self, what: str, *values: Any) -> None:
        os.write(self.report, json.dumps([what, *values]).encode() + b"\n")

    async def live(self, pending: Sequence[Call | None], chance: random.Random) -> None:
        async with AgentDB(self.folder, self.settings, EMBEDDER, clock=LaneClock()) as store:
            self.tell("opened")
            applied = [await self.settle_lane(store, position, call) for position, call in enumerate(pending)]
            for position, call in enumerate(pending):
                if call is not None and call.kind == "keyed":
                    applied[position] = await self.repeat(store, position, call)
            check_file(self.folder)
            check_folder(self.folder)
            assert store.indexes_rebuilt() == {}, "a crash damaged an index file"
            self.tell("checked", applied)
            seeds = [chance.randrange(2**32) for _ in self.lanes]
            async with asyncio.TaskGroup() as group:
                for lane, seed in zip(self.lanes, seeds, strict=True):
                    group.create_task(self.write(store, lane, random.Random(seed)))
            self.tell("mark", "close")
        self.tell("mark", "closed")

    async def settle_lane(self, store: AgentDB, position: int, call: Call | None) -> bool:
        """Whether the call that was under way is there; anything but wholly there or absent is an error."""
        before = self.lanes[position]
        states = [before] if call is None else [before, before.after([call])]
        _now_s.set(BASE_S + before.next + (call is not None) - 1)
        problems: list[str] = []
        for applied, lane in enumerate(states):
            found = await differences(store, lane, _now_s.get())
            if not found:
                lane.next = max(state.next for state in states)
                self.lanes[position] = lane
                return bool(applied)
            problems.append(f"{'after' if applied else 'before'} {call}: {found[:5]}")
        raise AssertionError("\n".join(problems))

    async def repeat(self, store: AgentDB, position: int, call: Call) -> bool:
        """Send the call again under its idempotency key: now it is there once, whether or not it was."""
        lane = self.lanes[position]
        space = lane.spaces.get(call.space)
        assert space is not None, "keyed calls are for namespaces that are there"
        _now_s.set(call.now_s)
        there = all(space.rows.get(item.id, item).metadata == item.metadata for item in items_of(call))
        there = there and all(item.id in space.rows for item in items_of(call))
        if not there:
            lane.next = call.number
            lane.apply(call)
        result = await perform(store, lane, call)
        wanted = [space.rows[item_id].version for item_id in call.ids]
        assert result == wanted, f"{call} repeated gave {result}, not {wanted}"
        found = await differences(store, lane, call.now_s)
        assert not found, f"{call} repeated: {found[:5]}"
        return True

    async def write(self, store: AgentDB, lane: Lane, chance: random.Random) -> None:
        for _ in range(chance.randint(1, CALLS_MAX)):
            call = lane.plan(chance)
            _now_s.set(call.now_s)
            self.tell("begin", call)
            result = await perform(store, lane, call)
            wanted = lane.apply(call)
            assert wanted is None or result == wanted, f"{call} gave {result}, not {wanted}"
            self.tell("done", call.lane, call.number)
            moment = chance.random()
            if moment < 0.10:
                self.tell("mark", "settle")
                await store.settle()
            elif moment < 0.22 and call.space in lane.spaces:
                problems = await find_rows(store, lane, call.space, chance, 3)
                assert not problems, problems
            elif moment < 0.23:
                await asyncio.sleep(0.3)  # longer than the indexer waits for more writes


async def perform(store: AgentDB, lane: Lane, call: Call) -> Any:
    """Make the call; its answer in the model's words."""
    tenant, space, spec = lane.tenant, call.space, SPECS[call.space]
    match call.kind:
        case "create":
            await store.create_namespace(
                tenant,
                space,
                metric=spec.metric,
                dimension=None if spec.embedder is None else spec.dimension,
                embedder_id=spec.embedder,
                quantization=spec.quantization,
            )
            return None
        case "drop":
            return await store.delete_namespace(tenant, space)
        case "erase":
            return await store.erase_tenant(tenant)
        case "upsert" | "batch" | "keyed" | "versioned":
            key = f"key {call.number}" if call.kind == "keyed" else None
            try:
                result = await store.upsert(
                    tenant, space, items_of(call), expected_version=call.version, idempotency_key=key
                )
            except Conflict:
                return "conflict"
            return list(result.versions)
        case "restore":
            return await store.restore(tenant, space, restored_of(call))
        case "delete":
            return await store.delete(tenant, space, call.ids)
        case "delete_where":
            return await store.delete_where(tenant, space, {"group": call.group})
        case "documents":
            return await store.put_documents(tenant, space, documents_of(call))
        case "refresh":
            mark = refreshed(lane.spaces[space].documents.get(call.ids[0]), call)
            return await store.put_documents(
                tenant, space, [Document(path=call.ids[0], fingerprint=mark, chunks=())]
            )
        case "delete_documents":
            return await store.delete_documents(tenant, space, call.ids)


# What must be true of an opened store


async def differences(store: AgentDB, lane: Lane, now_s: float) -> list[str]:
    """What the store has of this lane other than the model says. What is derived comes after the rows."""
    there = {namespace.name for namespace in await store.namespaces(lane.tenant)}
    if there != lane.spaces.keys():
        return [f"namespaces {sorted(there)}, not {sorted(lane.spaces)}"]
    problems: list[str] = []
    for name, space in lane.spaces.items():
        problems += [f"{name}: {one}" for one in await compare_rows(store, lane, name, space, now_s)]
    if problems:
        return problems
    for name in lane.spaces:
        problems += [f"{name}: index: {one}" for one in await store.check_index(lane.tenant, name)]
    return problems + await compare_words(store, lane, now_s)


async def compare_rows(store: AgentDB, lane: Lane, name: str, space: Space, now_s: float) -> list[str]:
    spec = SPECS[name]
    found: dict[str, Item] = {}
    cursor: str | None = None
    while True:
        page = await store.list_items(lane.tenant, name, limit=1000, vectors=True, cursor=cursor)
        found |= {item.id: item for item in page.items}
        cursor = page.cursor
        if cursor is None:
            break
    live = space.live(now_s)
    problems = [f"{item_id} is missing" for item_id in sorted(live.keys() - found.keys())]
    problems += [f"{item_id} should not be there" for item_id in sorted(found.keys() - live.keys())]
    for item_id, item in found.items():
        wanted = live.get(item_id)
        if wanted is None:
            continue
        if item.model_copy(update={"vector": None}) != wanted.model_copy(update={"vector": None}):
            problems.append(f"{item_id} is {item!r}, not {wanted!r}")
        assert item.vector is not None
        vector = np.frombuffer(item.vector.data, np.float32)
        if not np.allclose(vector, stored_vector(wanted, spec), rtol=0, atol=_tolerance(name)):
            problems.append(f"{item_id} has another vector")
    marks = await store.fingerprints(lane.tenant, name)
    if marks != space.documents:
        problems.append(f"documents {marks}, not {space.documents}")
    return problems


def _tolerance(name: str) -> float:
    """Half precision may round a number that lies between two either way."""
    return 0.0 if SPECS[name].quantization == "f32" and SPECS[name].embedder else 2e-3


async def compare_words(store: AgentDB, lane: Lane, now_s: float) -> list[str]:
    """Full text finds each row by the word that only it has, and none that is no more."""
    chance = random.Random(lane.next)
    problems: list[str] = []
    for name, space in lane.spaces.items():
        live = list(space.live(now_s).values())
        wanted = {own_word(item): [item.id] for item in chance.sample(live, min(len(live), SEARCHED_ROWS))}
        wanted |= {word: [] for where, word in lane.dead_words[-SEARCHED_ROWS:] if where == name}
        queries = [SearchQuery(text=word, mode="text", k=5) for word in wanted]
        results = await store.search_many(lane.tenant, name, queries)
        for (word, ids), result in zip(wanted.items(), results, strict=True):
            found = [hit.item.id for hit in result.hits]
            if found != ids:
                problems.append(f"{name}: full text finds {found} for {word!r}, not {ids}")
        problems += await find_rows(store, lane, name, chance, 5)
    return problems


async def find_rows(store: AgentDB, lane: Lane, name: str, chance: random.Random, count: int) -> list[str]:
    """Rows that are not found by their own vectors (where the metric puts a row nearest to itself).

    A graph may miss one; that it holds every row is what `check_index` is asked.
    """
    live = list(lane.spaces[name].live(_now_s.get()).values())
    picked = chance.sample(live, min(len(live), count))
    if SPECS[name].metric == "dot":
        return []
    queries = [
        SearchQuery(vector=item.vector, mode="vector", k=3)
        if item.vector is not None
        else SearchQuery(text=item.text, mode="vector", k=3)
        for item in picked
    ]
    results = await store.search_many(lane.tenant, name, queries)
    return [
        f"{name}: {item.id} is not found by its own vector"
        for item, result in zip(picked, results, strict=True)
        if result.tier != "graph" and (not result.hits or result.hits[0].item.id != item.id)
    ]


def check_file(folder: Path) -> None:
    """SQLite finds the file sound, and its tables tell the same story."""
    connection = apsw.Connection(str(folder / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        assert rows(connection, "PRAGMA integrity_check") == [("ok",)]
        assert rows(connection, "PRAGMA foreign_key_check") == []
        assert rows(connection, "SELECT key FROM vectors EXCEPT SELECT key FROM items") == []
        assert rows(connection, "SELECT key FROM items EXCEPT SELECT key FROM vectors") == []
        spaces = {space for (space,) in rows(connection, "SELECT id FROM namespaces")}
        for table in ("items", "documents", "idempotency"):
            used = {space for (space,) in rows(connection, f"SELECT DISTINCT namespace_id FROM {table}")}
            assert used <= spaces, f"{table} has rows of namespaces {used - spaces} that are gone"
        for space in spaces:
            for table, source, key in (("item_text", "items", "key"), ("document_text", "documents", "id")):
                words = rows(connection, f"SELECT rowid FROM {table}_{space} ORDER BY rowid")
                wanted = rows(
                    connection, f"SELECT {key} FROM {source} WHERE namespace_id = ? ORDER BY {key}", (space,)
                )
                assert words == wanted, f"{table}_{space} has other rows than {source}"
        tables = rows(
            connection,
            "SELECT name FROM sqlite_master WHERE name LIKE 'item_text_%' AND sql LIKE 'CREATE V%'",
        )
        assert {int(name.rsplit("_", 1)[1]) for (name,) in tables} == spaces
    finally:
        connection.close()


def check_folder(folder: Path) -> None:
    """Index files of namespaces that are there, and nothing else."""
    connection = apsw.Connection(str(folder / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        spaces = {f"{space}.index" for (space,) in rows(connection, "SELECT id FROM namespaces")}
    finally:
        connection.close()
    indexes = folder / INDEXES
    files = {path.name for path in indexes.iterdir()} if indexes.exists() else set[str]()
    # A keyed call that was repeated may be on its way into an index file right now.
    files = {name for name in files if f".index.{os.getpid()}." not in name}
    assert files <= spaces, f"files left behind: {sorted(files - spaces)}"


# In the parent: fork, watch, kill


class Driver:
    """Forks children until there were enough kills; holds what was acknowledged."""

    def __init__(self, folder: Path, seed: int, settings: AgentDBSettings) -> None:
        self.folder, self.seed, self.settings = folder, seed, settings
        self.chance = random.Random(seed)
        self.lanes = [Lane(number) for number in range(len(LANES))]
        self.pending: list[Call | None] = [None] * len(LANES)
        self.seen: Counter[str] = Counter()
        self.buffer = b""
        self.marks: Counter[str] = Counter()

    def run(self, kills: int) -> dict[str, int]:
        while self.seen["kills"] < kills:
            self._one_life()
            if self.seen["lives"] > 20 * kills:
                raise AssertionError(f"children end before they can be killed: {self.seen}")
        self._one_life(to_the_end=True)
        return dict(self.seen)

    def _one_life(self, *, to_the_end: bool = False) -> None:
        moment = self.chance.choices(list(MOMENTS), [weight for weight, _ in MOMENTS.values()])[0]
        life_seed = self.chance.randrange(2**32)
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._be_child(writing, life_seed)
        os.close(writing)
        os.set_blocking(reading, False)
        self.buffer, self.marks = b"", Counter()
        self.seen["lives"] += 1
        try:
            if not to_the_end:
                MOMENTS[moment][1](self, reading)
                os.kill(pid, signal.SIGKILL)
            while self._listen(reading, None):
                pass
        finally:
            os.close(reading)
            _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"a child died of signal {os.WTERMSIG(status)}"
            self.seen["kills"] += 1
            self.seen[f"kills at {moment}"] += 1
            self.seen["kills before the check was over"] += not self.marks["checked"]
        else:
            assert os.WEXITSTATUS(status) == 0, f"a child ended with {os.WEXITSTATUS(status)}"

    def _be_child(self, report: int, seed: int) -> NoReturn:
        status = 1
        try:
            child = Child(self.folder, self.settings, self.lanes, report)
            asyncio.run(child.live(self.pending, random.Random(seed)))
            status = 0
        except BaseException:  # noqa: BLE001 - the last word of this process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _listen(self, reading: int, timeout_s: float | None) -> bool:
        """Take in what the child told; False at the end."""
        if not select.select([reading], [], [], timeout_s)[0]:
            return True
        data = os.read(reading, 1 << 16)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(data)

    def _take(self, message: list[Any]) -> None:
        match message:
            case ["checked", applied]:
                self._take_checked(applied)
            case ["begin", fields]:
                call = Call.told(fields)
                self.pending[call.lane] = call
            case ["done", lane, _]:
                self._take_done(int(lane))
                self.seen["acknowledged calls"] += 1
                self.marks["done"] += 1
            case ["mark", name]:
                self.marks[name] += 1
            case _:
                pass

    def _take_done(self, lane: int) -> None:
        call, self.pending[lane] = self.pending[lane], None
        assert call is not None
        self.lanes[lane].apply(call)

    def _take_checked(self, applied: list[bool]) -> None:
        for position, (call, there) in enumerate(zip(self.pending, applied, strict=True)):
            if call is None:
                continue
            lane = self.lanes[position]
            if there:
                lane.apply(call)
            lane.next = call.number + 1
            self.seen["cut calls that are there" if there else "cut calls that are absent"] += 1
            self.pending[position] = None
        self.marks["checked"] += 1
        self.seen["checks"] += 1

    def wait(self, reading: int, reached: Callable[[], bool], poll_s: float = 0.05) -> bool:
        """Listen until the moment has come; False when the child ended before, or it did not come in time."""
        end_s = time.monotonic() + WINDOW_S
        while not reached():
            if not self._listen(reading, poll_s):
                return False
            if self.marks["checked"] and time.monotonic() > end_s:
                return False
            if not self.marks["checked"]:
                end_s = time.monotonic() + WINDOW_S
        return True

    def pause(self, longest_s: float) -> None:
        time.sleep(self.chance.random() * longest_s)  # the random point is the subject

    def wal_mark(self) -> int:
        try:
            return (self.folder / DATABASE).with_name(f"{DATABASE.name}-wal").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def parts(self) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self.folder / INDEXES) if entry.name.endswith(".part")}
        except FileNotFoundError:
            return set()


def after_calls(driver: Driver, reading: int) -> None:
    """Some time after some acknowledged calls."""
    wanted = driver.chance.randint(1, 14)
    driver.wait(reading, lambda: driver.marks["done"] >= wanted)
    driver.pause(0.006)


def in_commit(driver: Driver, reading: int) -> None:
    """While the log of the database is being written."""
    wanted = driver.chance.randint(0, 8)
    if driver.wait(reading, lambda: driver.marks["checked"] > 0 and driver.marks["done"] >= wanted):
        before = driver.wal_mark()
        driver.wait(reading, lambda: driver.wal_mark() != before, poll_s=0)
        driver.pause(0.001)


def in_save(driver: Driver, reading: int) -> None:
    """While an index file is being written."""
    before = driver.parts()
    if driver.wait(reading, lambda: bool(driver.parts() - before), poll_s=0.0001):
        driver.pause(0.003)
        driver.seen["index files cut or just written"] += 1


def in_settle(driver: Driver, reading: int) -> None:
    """Between the commit and the index file that takes it in."""
    driver.wait(reading, lambda: driver.marks["settle"] > 0)
    driver.pause(0.015)


def in_open(driver: Driver, reading: int) -> None:
    """While the child opens the store or checks it."""
    driver.pause(0.08)


def in_close(driver: Driver, reading: int) -> None:
    """While the store is closed: the last index files, and the database's checkpoint."""
    driver.wait(reading, lambda: driver.marks["close"] > 0)
    driver.pause(0.02)


MOMENTS: dict[str, tuple[int, Callable[[Driver, int], None]]] = {
    "a call": (30, after_calls),
    "a commit": (30, in_commit),
    "a save": (12, in_save),
    "settling": (14, in_settle),
    "opening": (10, in_open),
    "closing": (4, in_close),
}
"""When to kill: how often, and what waits for it."""


def warm_up() -> None:
    """Import and compute what every child would have to: above all turbovec's tables of each dimension."""
    for spec in SPECS.values():
        for library in ("turbovec", "faiss"):
            made = make_codes(Layout(1, spec.dimension, spec.metric, spec.quantization), library)
            made.add(np.array([1], np.int64), np.ones((1, spec.dimension), np.float32))


def main(folder: str, seed: str, kills: str, settings: str) -> int:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    warm_up()
    driver = Driver(Path(folder), int(seed), AgentDBSettings.model_validate_json(settings))
    try:
        told = driver.run(int(kills))
    except AssertionError as error:
        print(f"seed {seed}, after {driver.seen}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
