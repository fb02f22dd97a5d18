"""The SQLite store: what was acknowledged is there, whatever happens to the process."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from agentic_flow.core.db import Database, rows
from agentic_flow.core.errors import Conflict, DataCorrupted, StorageFull, Unavailable
from agentic_flow.core.sql import SqlDatabase

TABLE = ("CREATE TABLE t (writer TEXT, n INTEGER, PRIMARY KEY (writer, n)) STRICT",)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "t.db", TABLE)
    yield opened
    opened.close()


def _insert(writer: str, n: int) -> object:
    return lambda connection: rows(connection, "INSERT INTO t VALUES (?, ?)", (writer, n))


def _count(database: Database) -> int:
    return int(database.read_sync(lambda c: rows(c, "SELECT count(*) FROM t"))[0][0])


def test_a_job_that_fails_takes_no_other_with_it(database: Database) -> None:
    """Catches a group commit in which one bad write loses its neighbours, or half of itself stays."""

    def bad(connection: apsw.Connection) -> None:
        rows(connection, "INSERT INTO t VALUES ('half', 1)")
        rows(connection, "INSERT INTO t VALUES ('half', 1)")

    async def main() -> list[object]:
        jobs = [database.write(_insert("w", n)) for n in range(20)]  # type: ignore[arg-type]
        return await asyncio.gather(*jobs[:10], database.write(bad), *jobs[10:], return_exceptions=True)

    results = asyncio.run(main())
    assert [type(result) for result in results if isinstance(result, Exception)] == [apsw.ConstraintError]
    assert database.read_sync(lambda c: rows(c, "SELECT writer, count(*) FROM t GROUP BY 1")) == [("w", 20)]


def test_no_room_is_told_as_such_by_both_kinds_of_store(database: Database, tmp_path: Path) -> None:
    """Catches a full disk that looks like a service that is away, or a write of which a part stays."""
    large = "x" * 100_000
    database.write_sync(lambda connection: rows(connection, "PRAGMA max_page_count=10"))
    with pytest.raises(StorageFull, match="full") as caught:
        database.write_sync(lambda connection: rows(connection, "INSERT INTO t VALUES (?, 1)", (large,)))
    assert "make room" in str(caught.value.hint)
    assert _count(database) == 0
    database.write_sync(_insert("w", 1))  # type: ignore[arg-type]

    table = ("CREATE TABLE IF NOT EXISTS t (text TEXT)",)
    other = SqlDatabase(None, tmp_path / "other.db", name="other store", setting="other", create=table)
    try:
        other.create()
        with other.reading() as connection:
            connection.execute("PRAGMA max_page_count=10")
        with pytest.raises(StorageFull, match="full") as caught, other.transaction() as connection:
            connection.execute("INSERT INTO t VALUES (:text)", {"text": large})
        assert "make room" in str(caught.value.hint)
        assert other.rows("SELECT count(*) FROM t") == [(0,)]
    finally:
        other.close()


def test_a_cancelled_caller_does_not_stop_the_writer(database: Database) -> None:
    """Catches a writer thread that dies of a future nobody waits for."""

    async def main() -> None:
        tasks = [asyncio.create_task(database.write(_insert("w", n))) for n in range(50)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await database.write(_insert("last", 0))  # type: ignore[arg-type]

    asyncio.run(main())
    assert 26 <= _count(database) <= 51


def test_a_read_sees_one_snapshot_and_cannot_write(database: Database) -> None:
    """Catches reads that mix two states, and writes past the writer thread."""

    def read(connection: apsw.Connection) -> tuple[int, int]:
        before = rows(connection, "SELECT count(*) FROM t")[0][0]
        database.write_sync(lambda c: rows(c, "INSERT INTO t VALUES ('w', 1)"))
        return before, rows(connection, "SELECT count(*) FROM t")[0][0]

    assert database.read_sync(read) == (0, 0)
    assert _count(database) == 1
    with pytest.raises(apsw.ReadOnlyError):
        database.read_sync(lambda c: rows(c, "DELETE FROM t"))
    with pytest.raises(apsw.ReadOnlyError):
        database.read_apart(lambda c: rows(c, "DELETE FROM t"))


def test_migrations_run_once_and_a_newer_file_is_refused(tmp_path: Path) -> None:
    """Catches a schema step that runs twice, and an old program that writes into a newer file."""
    path = tmp_path / "m.db"
    Database(path, TABLE).close()
    second = Database(path, (*TABLE, "INSERT INTO t VALUES ('two', 2); INSERT INTO t VALUES ('two', 3)"))
    second.close()
    third = Database(path, (*TABLE, "INSERT INTO t VALUES ('two', 2); INSERT INTO t VALUES ('two', 3)"))
    assert _count(third) == 2
    third.close()
    with pytest.raises(Conflict, match="version 2"):
        Database(path, TABLE)


def test_a_failed_migration_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Catches a half-migrated file."""
    path = tmp_path / "m.db"
    Database(path, TABLE).close()
    with pytest.raises(apsw.SQLError):
        Database(path, (*TABLE, "CREATE TABLE u (x); SELEKT"))
    again = Database(path, (*TABLE, "CREATE TABLE u (x)"))
    assert rows_of(again, "PRAGMA user_version") == [(2,)]
    again.close()


def rows_of(database: Database, sql: str) -> list[tuple[object, ...]]:
    return database.read_sync(lambda c: rows(c, sql))


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    """Catches SQLite's own words, or a database made in the wrong place, on damaged files and bad folders."""
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this is not a database" * 100)
    with pytest.raises(DataCorrupted, match=r"damaged\.db"):
        Database(damaged, TABLE)
    with pytest.raises(Unavailable, match=r"damaged\.db"):
        Database(damaged / "below" / "t.db", TABLE)
    with pytest.raises(Unavailable):
        Database(tmp_path, TABLE)


def test_a_closed_database_refuses_at_once(tmp_path: Path) -> None:
    """Catches a write that waits for ever for a thread that has ended."""
    database = Database(tmp_path / "t.db", TABLE)
    database.close()
    database.close()
    for call in (database.write_sync, database.read_sync, database.read_apart):
        with pytest.raises(Unavailable, match="closed"):
            call(lambda c: rows(c, "SELECT 1"))


def test_it_is_in_wal_mode_with_full_synchronisation(database: Database) -> None:
    """Catches a default that loses acknowledged commits on power failure."""
    assert database.write_sync(lambda c: rows(c, "PRAGMA synchronous")) == [(2,)]
    assert rows_of(database, "PRAGMA journal_mode") == [("wal",)]


_WRITER = """
import asyncio, sys
from pathlib import Path
from agentic_flow.core.db import Database, rows
path, writer, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
database = Database(path, ("CREATE TABLE t (writer TEXT, n INTEGER, PRIMARY KEY (writer, n)) STRICT",))
async def one(n):
    await database.write(lambda c: rows(c, "INSERT INTO t VALUES (?, ?)", (writer, n)))
    print(n, flush=True)
async def main():
    for start in range(0, count, 20):
        await asyncio.gather(*(one(n) for n in range(start, min(start + 20, count))))
asyncio.run(main())
database.close()
"""


def _start(path: Path, writer: str, count: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), writer, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_no_acknowledged_row_is_lost_by_kill_9(tmp_path: Path) -> None:
    """Catches an acknowledgement that comes before the commit."""
    seed = random.randrange(10_000)
    chance = random.Random(seed)
    path = tmp_path / "k.db"
    for attempt in range(3):
        process = _start(path, f"w{attempt}", 1_000_000)
        assert process.stdout is not None
        _go(process)
        acknowledged = {int(process.stdout.readline()) for _ in range(chance.randint(1, 400))}
        process.send_signal(signal.SIGKILL)
        # What was printed before the kill but not yet read was acknowledged as well. `communicate` alone
        # would leave out what `readline` has buffered, and begin within a line.
        rest = process.stdout.read()
        process.communicate()
        acknowledged |= {int(line) for line in rest.split(b"\n")[:-1]}
        database = Database(path, TABLE)
        stored = {
            row[0]
            for row in database.read_sync(
                lambda c, w=f"w{attempt}": rows(c, "SELECT n FROM t WHERE writer=?", (w,))
            )
        }
        database.close()
        assert acknowledged <= stored, f"seed {seed}: lost {sorted(acknowledged - stored)}"


def test_processes_that_open_a_new_file_together_all_write(tmp_path: Path) -> None:
    """Catches "database is locked": the switch to WAL does not wait, and two writers must take turns."""
    path = tmp_path / "p.db"
    processes = [_start(path, f"w{index}", 200) for index in range(3)]
    for process in processes:
        _go(process)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    database = Database(path, TABLE)
    counts = rows_of(database, "SELECT writer, count(*) FROM t GROUP BY 1 ORDER BY 1")
    database.close()
    assert counts == [("w0", 200), ("w1", 200), ("w2", 200)]


@pytest.mark.parametrize("seed", range(4))
def test_vacuum_leaves_no_copy_of_what_was_deleted(seed: int, tmp_path: Path) -> None:
    """Catches text of deleted rows in the unused space of pages, where SQLite moved rows from, and writes
    that are lost or never end beside a vacuum."""
    chance = random.Random(seed)
    database = Database(
        tmp_path / "notes.db", ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT",)
    )

    def fill(connection: apsw.Connection) -> None:
        rows(connection, "PRAGMA secure_delete=FAST")
        for _ in range(20):
            text = chance.choice(("aardvark", "badger")) * chance.randrange(1, 40)
            rows(connection, "INSERT OR REPLACE INTO notes VALUES (?, ?)", (chance.randrange(500), text))

    def add(connection: apsw.Connection) -> None:
        rows(connection, "INSERT INTO notes VALUES (NULL, 'condor')")

    def empty_log() -> None:
        connection = apsw.Connection(str(database.path))
        rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()

    async def main() -> None:
        for _ in range(60):
            await database.write(fill)
        await database.write(
            lambda connection: rows(connection, "DELETE FROM notes WHERE text >= 'a' AND text < 'b'")
        )
        await asyncio.to_thread(empty_log)
        assert b"aardvark" in database.path.read_bytes(), "there is nothing to be removed"
        await asyncio.gather(
            *(database.write(add) for _ in range(20)),
            database.vacuum(),
            *(database.write(add) for _ in range(20)),
        )
        await asyncio.to_thread(empty_log)
        assert b"aardvark" not in database.path.read_bytes()
        found = await database.read(lambda c: rows(c, "SELECT count(*) FROM notes WHERE text = 'condor'"))
        assert found == [(40,)]

    asyncio.run(main())
    database.close()
