"""Looking for runs on PostgreSQL: by a coordinator that leaves all work to workers."""

from __future__ import annotations

from pathlib import Path

from agentic_flow.core.clock import SYSTEM_CLOCK
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.queues import RunQueues
from postgres_server import new_database, postgres_server


def test_who_works_for_no_queue_has_no_work(tmp_path: Path) -> None:
    """Catches a coordinator with `swarm.runs_parallel_max` 0 that cannot start: an empty list has no type."""
    with postgres_server(tmp_path / "server") as server:
        database = RunDatabase(new_database(server), tmp_path)
        try:
            database.create()
            queues = RunQueues(database, SYSTEM_CLOCK, queue_runs_max={}, tenant_runs_max=None)
            assert not queues.has_work(())
            assert not queues.has_work(("default",))
        finally:
            database.close()
