"""An AgentDB with a history, and all its rows as plain values to compare moments by."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from agentic_flow.agentdb import schema, writing
from agentic_flow.agentdb.history import History
from agentic_flow.agentdb.manifest import DATABASE
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.db import rows
from agentic_flow.core.settings import AgentDBSettings

SETTINGS = AgentDBSettings(embedding_dimension=256)
TRUTH = ("namespaces", "documents", "items", "vectors", "idempotency")

Snapshot = dict[str, list[tuple[Any, ...]]]


class SteppedClock:
    """A clock that a test moves."""

    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


@dataclass
class Recorded:
    """A store, and the history that records it."""

    store: AgentDB
    history: History
    clock: SteppedClock

    @property
    def sequence(self) -> int:
        """The last operation that was committed."""
        return self.store._db.read_sync(
            lambda connection: rows(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'operations'")
        )[0][0]

    def snapshot(self) -> Snapshot:
        """Every row of the tables that hold the truth."""
        return self.store._db.read_sync(snapshot_of)

    def erase(self, tenant: str) -> int:
        """Erase the tenant from the rows and the history, as `AgentDB.erase_tenant` is to do."""
        now_s = self.clock.time_s()

        def job(connection: apsw.Connection) -> int:
            rows(connection, "PRAGMA secure_delete=ON")
            with self.history.recording(connection, tenant, now_s, erases=True):
                found = rows(connection, "SELECT id FROM namespaces WHERE tenant = ?", (tenant,))
                return sum(writing.drop_namespace(connection, one, now_s) for (one,) in found)

        removed = self.store._db.write_sync(job)
        self.history.seal()
        return removed


@contextmanager
def recorded(
    data: Path, history_dir: Path, *, clock: SteppedClock | None = None, start: bool = False, **options: Any
) -> Generator[Recorded]:
    """Open the store with a history; by default nothing is sealed but when the test says so."""
    clock = clock or SteppedClock()
    store = AgentDB(data, SETTINGS, clock=clock)
    try:
        history = History(history_dir, store._db, **options)
        store._history = history
        if start:
            history.start()
        try:
            yield Recorded(store, history, clock)
        finally:
            history.close()
    finally:
        store.close()


def snapshot_of(connection: apsw.Connection) -> Snapshot:
    """Every row of the tables that hold the truth, in order of their keys."""
    return {table: rows(connection, f"SELECT * FROM {table} ORDER BY 1, 2") for table in TRUTH}


def stored(data: Path) -> Snapshot:
    """The same of a database that nobody has open."""
    connection = apsw.Connection(str(data / DATABASE))
    try:
        return snapshot_of(connection)
    finally:
        connection.close()


def texts(data: Path) -> dict[tuple[str, str, str], list[int]]:
    """(tenant, namespace, word) → rowids that full text finds, for every word there is."""
    connection = apsw.Connection(str(data / DATABASE))
    try:
        found: dict[tuple[str, str, str], list[int]] = {}
        for namespace_id, tenant, name in rows(connection, "SELECT id, tenant, name FROM namespaces"):
            for table in (schema.item_table(namespace_id), schema.document_table(namespace_id)):
                rows(connection, f"CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, {table}, instance)")
                for word, row, column, offset in rows(
                    connection, "SELECT term, doc, col, offset FROM temp.words ORDER BY 1, 2, 3, 4"
                ):
                    key = (tenant, name, f"{table.split('_')[0]} {word} {column} {offset}")
                    found.setdefault(key, []).append(row)
                rows(connection, "DROP TABLE temp.words")
        return found
    finally:
        connection.close()
