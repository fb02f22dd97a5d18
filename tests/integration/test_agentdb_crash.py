"""AgentDB under `kill -9` and with a log that ends anywhere: no call is lost, none is there in part.

Sizes: `AGENTDB_KILLS` kill points in all (default 520, spread over the kinds of store below).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import agentdb_writer
import apsw
import pytest
from agentdb_model import EMBEDDER, LANES, Call, Lane
from agentdb_writer import LaneClock, at_time, check_file, differences, perform

from agentic_flow.agentdb.service import DATABASE, INDEXES, AgentDB
from agentic_flow.core.db import rows
from agentic_flow.core.settings import AgentDBSettings

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("AGENTDB_KILLS", "520"))
STORES: dict[str, dict[str, Any]] = {
    "scan": {"index": "scan"},
    "graph": {"index": "graph"},
    "exact": {"index": "exact"},
    "tiers that change": {"index": "auto", "scan_rows_min": 40, "graph_rows_min": 120},
    "the fallback": {"index": "scan", "scan_library": "faiss"},
}
KILL_TIMEOUT_S = 900
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
"""For libraries in a process that forks: their threads would not be there in the child."""


@pytest.mark.timeout(KILL_TIMEOUT_S)
def test_killed_at_random_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Catches lost or half-made calls, stale or damaged indexes, full text out of step, files left behind."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    kills = -(-KILLS // len(STORES))
    drivers: dict[str, subprocess.Popen[str]] = {}
    try:
        for number, (name, settings) in enumerate(STORES.items()):
            arguments = [str(tmp_path / name), str(seed + number), str(kills), json.dumps(settings)]
            drivers[name] = subprocess.Popen(
                [sys.executable, agentdb_writer.__file__, *arguments],
                env={**os.environ, **ONE_THREAD},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        ended = {name: driver.communicate() for name, driver in drivers.items()}
    finally:
        for driver in drivers.values():
            if driver.poll() is None:
                driver.kill()
                driver.communicate()
    for name, (out, err) in ended.items():
        assert drivers[name].returncode == 0, f"{name}: {err}"
        told: dict[str, int] = json.loads(out.splitlines()[-1])
        print(f"{name}: {told}")
        assert told["kills"] >= kills
        assert told["acknowledged calls"] > kills
    total = {name: json.loads(out.splitlines()[-1]) for name, (out, _) in ended.items()}
    for hit in ("cut calls that are there", "cut calls that are absent", "kills before the check was over"):
        assert sum(one.get(hit, 0) for one in total.values()) > 0, f"no {hit}: the kills missed their moment"


# A log that ends anywhere

SETTLED_CALL = 2
"""After which of the calls the index file is written."""


class State(NamedTuple):
    """The rows that must be there when the log is at least so long."""

    wal_bytes: int
    lane: Lane
    digest: list[Any]


def digest(connection: apsw.Connection) -> list[Any]:
    """Every row of every table that a call changes, and the rows that full text knows."""
    told: list[Any] = [
        rows(connection, sql)
        for sql in (
            "SELECT i.*, v.vector FROM items AS i LEFT JOIN vectors AS v USING (key) ORDER BY key",
            "SELECT count(*) FROM vectors",
            "SELECT * FROM documents ORDER BY id",
            "SELECT * FROM operations ORDER BY sequence",
            "SELECT * FROM idempotency",
            "SELECT * FROM namespaces",
        )
    ]
    for (space,) in rows(connection, "SELECT id FROM namespaces"):
        told.append(rows(connection, f"SELECT rowid FROM item_text_{space} ORDER BY rowid"))
        told.append(rows(connection, f"SELECT id, sz FROM item_text_{space}_docsize ORDER BY id"))
    return told


@contextmanager
def opened(path: Path) -> Generator[apsw.Connection]:
    """A connection that leaves the log as it is."""
    connection = apsw.Connection(str(path))
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        yield connection
    finally:
        connection.close()


def small_calls(lane: Lane) -> Iterator[Call]:
    """Calls of a few pages each: new rows, rows that replace others, rows that go."""
    short: list[dict[str, Any]] = [
        {"kind": "upsert", "ids": ("i1", "i2")},
        {"kind": "documents", "ids": ("doc0.md#0", "doc0.md#1")},
        {"kind": "documents", "ids": ("doc0.md#0",)},
        {"kind": "delete", "ids": ("i2",)},
        {"kind": "upsert", "ids": ("i1",)},
    ]
    for fields in short:
        yield Call(lane.number, lane.next, "upsert", "short")._replace(**fields)


async def logged_states(folder: Path, settings: AgentDBSettings) -> list[State]:
    """Fill a folder so that all calls but the first lie in the log; what it must hold at each length of it.

    Pages of 512 bytes keep the log small: more of them end within the length that is tried byte by byte.
    """
    (folder / DATABASE).parent.mkdir(parents=True)
    with opened(folder / DATABASE) as connection:
        rows(connection, "PRAGMA page_size=512")
        rows(connection, "VACUUM")
    lane = Lane(LANES.index(("plain", "short")))
    source = folder.with_name("source")
    shutil.copytree(folder, source)
    create = Call(lane.number, lane.next, "create", "short")
    async with AgentDB(source, settings, EMBEDDER, clock=LaneClock()) as store:
        await perform(store, lane, create)
    lane.apply(create)
    states: list[State] = []
    async with AgentDB(source, settings, EMBEDDER, clock=LaneClock()) as store:
        wal = (source / DATABASE).with_name(f"{DATABASE.name}-wal")
        with opened(source / DATABASE) as connection:
            states.append(State(0, lane.after([]), digest(connection)))
            for number, call in enumerate(small_calls(lane)):
                at_time(call.now_s)
                result = await perform(store, lane, call)
                assert result == lane.apply(call)
                states.append(State(wal.stat().st_size, lane.after([]), digest(connection)))
                if number == SETTLED_CALL:
                    await store.settle()
            # What a killed process would leave: nothing was moved from the log into the database yet.
            for path in (source / DATABASE, wal):
                shutil.copy(path, folder / DATABASE.parent)
            if (source / INDEXES).exists():
                # Not what a slow machine is still writing, which may be renamed meanwhile.
                shutil.copytree(source / INDEXES, folder / INDEXES, ignore=shutil.ignore_patterns("*.part"))
    return states


def state_at(states: Sequence[State], wal_bytes: int) -> State:
    return max((state for state in states if state.wal_bytes <= wal_bytes), key=lambda state: state.wal_bytes)


@pytest.mark.timeout(600)
async def test_log_truncated_at_every_byte(tmp_path: Path) -> None:
    """Catches a call that is there in part, or one lost although the log still has all of it.

    Every length is read with SQLite alone (all rows of all tables, and what full text has). The store itself
    is opened at the end of each frame, one byte before and one after it: there the rows are compared through
    its interface, the index with a rebuilt one, and a new call is made. The index file stays as it was after
    the third call: with shorter logs it is newer than the database.
    """
    settings = AgentDBSettings(index="scan")
    folder = tmp_path / "small"
    states = await logged_states(folder, settings)
    path = folder / DATABASE
    wal = path.with_name(f"{DATABASE.name}-wal")
    whole = wal.read_bytes()
    assert len(whole) == states[-1].wal_bytes
    frames = range(32, len(whole) + 1, 24 + struct.unpack_from(">I", whole, 8)[0])
    rebuilt = 0
    for length in sorted({at + d for at in frames for d in (-1, 0, 1)} - {len(whole) + 1}):
        again = tmp_path / "again"
        shutil.copytree(folder, again)
        os.truncate(again / wal.relative_to(folder), length)
        rebuilt += await check_store(again, settings, state_at(states, length))
        shutil.rmtree(again)
    assert rebuilt > 0, "no index file was newer than the database"
    lengths = 0
    for length in range(len(whole), -1, -1):
        os.truncate(wal, length)
        with opened(path) as connection:
            # Without other processes the index of the log lies in memory, not in a file.
            rows(connection, "PRAGMA locking_mode=EXCLUSIVE")
            wanted = state_at(states, length)
            assert digest(connection) == wanted.digest, f"at {length} of {len(whole)} bytes"
        lengths += 1
    print(
        f"{lengths} lengths, {len(frames)} frames, {len(states)} calls, {rebuilt} indexes newer than the rows"
    )


async def check_store(folder: Path, settings: AgentDBSettings, state: State) -> bool:
    """The store has these rows and takes another call; whether its index was made again."""
    lane = state.lane.after([])
    at_time(lane.now_s - 1)
    async with AgentDB(folder, settings, EMBEDDER, clock=LaneClock()) as store:
        assert await differences(store, lane, lane.now_s - 1) == []
        call = Call(lane.number, lane.next, "upsert", "short", ("i1", "i9"))
        at_time(call.now_s)
        assert await perform(store, lane, call) == lane.apply(call)
        assert await differences(store, lane, call.now_s) == []
        rebuilt = bool(store.indexes_rebuilt())
    check_file(folder)
    return rebuilt


async def test_flipped_bits_in_the_log(tmp_path: Path) -> None:
    """Catches a log whose damage is taken for data: what is left must be the calls before the damage."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    folder = tmp_path / "small"
    states = await logged_states(folder, AgentDBSettings(index="exact"))
    path = folder / DATABASE
    wal = path.with_name(f"{DATABASE.name}-wal")
    whole = wal.read_bytes()
    digests = [state.digest for state in states]
    for _ in range(400):
        at = chance.randrange(32, len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << chance.randrange(8)
        wal.write_bytes(flipped)
        with opened(path) as connection:
            rows(connection, "PRAGMA locking_mode=EXCLUSIVE")
            found = digest(connection)
        assert found in digests, f"seed {seed}: bit flipped in byte {at}"
        assert digests.index(found) <= digests.index(state_at(states, at).digest), f"seed {seed}, byte {at}"
