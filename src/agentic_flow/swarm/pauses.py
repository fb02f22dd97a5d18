"""Runs that somebody has paused: rows beside the workflows, which the owner of a run looks at.

A table of its own and no column of the workflows: processes of older builds may be writing those.
"""

from __future__ import annotations

from collections.abc import Collection

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import NotFound
from agentic_flow.core.ports import EventKind
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.event_log import append, event, written_down
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.scheduling import ENDED

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.


class Pauses:
    """The paused top-level workflows of one run database.

    Args:
        database: Where they are.
        clock: Stamps the pauses.
    """

    def __init__(self, database: RunDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def pause(self, workflow_id: str, by: str) -> bool:
        """See RunEngine."""
        self._database.create()  # an older build has made no such table
        with self._database.transaction() as connection:
            name, status = self._locked(connection, workflow_id)
            if status in ENDED:
                return False
            now_s = self._clock.time_s()
            stored = connection.execute(
                "INSERT INTO af_paused (root_id, at_s, sender) VALUES (:id, :now, :by) "
                "ON CONFLICT DO NOTHING",
                {"id": workflow_id, "now": now_s, "by": by},
            )
            if stored.rowcount != 1:
                return False
            self._tell(connection, workflow_id, "paused", name, by)
        return True

    def unpause(self, workflow_id: str, by: str) -> bool:
        """See RunEngine."""
        self._database.create()
        with self._database.transaction() as connection:
            name, _ = self._locked(connection, workflow_id)
            if execute(connection, "DELETE FROM af_paused WHERE root_id = :id", id=workflow_id).rowcount != 1:
                return False
            self._tell(connection, workflow_id, "unpaused", name, by)
        return True

    def among(self, roots: Collection[str]) -> set[str]:
        """Which of these are paused."""
        ids, found = sorted(roots), set[str]()
        for start in range(0, len(ids), 500):
            rows = self._database.rows(
                "SELECT root_id FROM af_paused WHERE root_id IN :ids", ids=ids[start : start + 500]
            )
            found |= {str(row[0]) for row in rows}
        return found

    def _locked(self, connection: Connection, workflow_id: str) -> tuple[str, str]:
        """Name and status of a top-level workflow, locked until the transaction ends."""
        row = execute(
            connection,
            "SELECT name, status FROM af_workflows WHERE workflow_id = :id AND parent_id IS NULL"
            f"{self._database.for_update}",
            id=workflow_id,
        ).first()
        if row is None:
            raise NotFound(f"there is no run {workflow_id!r}", hint="list them with `agentic-flow runs list`")
        return str(row[0]), str(row[1])

    def _tell(self, connection: Connection, root_id: str, kind: EventKind, name: str, by: str) -> None:
        sqlite = self._database.is_sqlite
        written_down(connection, root_id, sqlite=sqlite)
        told = event(root_id, root_id, kind, self._clock.time_s(), name, {"by": by})
        append(connection, [told], sqlite=sqlite)
