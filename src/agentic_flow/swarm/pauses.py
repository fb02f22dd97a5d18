"""Runs that somebody has paused: rows beside the workflows, which the owner of a run looks at.

A table of its own and no column of the workflows: processes of older builds may be writing those.
"""

from __future__ import annotations

from collections.abc import Collection

from agentic_flow.core.clock import Clock
from agentic_flow.core.ports import EventKind
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.event_log import append, event, written_down
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.scheduling import ENDED


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
            name, status = self._database.locked_run(connection, workflow_id)
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
            name, _ = self._database.locked_run(connection, workflow_id)
            if execute(connection, "DELETE FROM af_paused WHERE root_id = :id", id=workflow_id).rowcount != 1:
                return False
            self._tell(connection, workflow_id, "unpaused", name, by)
        return True

    def among(self, roots: Collection[str]) -> set[str]:
        """Which of these are paused."""
        return self._database.roots_in("af_paused", roots)

    def _tell(self, connection: Connection, root_id: str, kind: EventKind, name: str, by: str) -> None:
        sqlite = self._database.is_sqlite
        written_down(connection, root_id, sqlite=sqlite)
        told = event(root_id, root_id, kind, self._clock.time_s(), name, {"by": by})
        append(connection, [told], sqlite=sqlite)
