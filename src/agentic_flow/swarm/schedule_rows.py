"""The table of schedules, and the cheap question whether anything is to be done about one.

Apart from `schedule_store`, so that a process that only looks needs none of what runs are made with.
"""

from __future__ import annotations

from agentic_flow.core.clock import Clock
from agentic_flow.core.sql import SqlDatabase

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

CLOCK_BACK_S = 3600.0
"""What has happened so far in the future shows that the clock was set back."""

CREATE_SCHEDULES = (
    """CREATE TABLE IF NOT EXISTS af_schedules (
        schedule_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, workflow TEXT NOT NULL,
        subject TEXT NOT NULL, scopes TEXT NOT NULL, request TEXT NOT NULL, rule TEXT NOT NULL,
        is_paused INTEGER NOT NULL, anchor_s DOUBLE PRECISION NOT NULL, next_s DOUBLE PRECISION NOT NULL,
        firing_s DOUBLE PRECISION, last_s DOUBLE PRECISION, last_run_id TEXT, fired INTEGER NOT NULL,
        skipped INTEGER NOT NULL, note TEXT NOT NULL, UNIQUE (tenant, name))""",
    "CREATE INDEX IF NOT EXISTS af_schedules_next ON af_schedules (next_s)",
)

IS_DUE = (
    "(firing_s IS NOT NULL OR (is_paused = 0 AND (next_s <= :now OR last_s > :future OR anchor_s > :future)))"
)


def bound(clock: Clock) -> dict[str, float]:
    """What is bound to `IS_DUE`."""
    now_s = clock.time_s()
    return {"now": now_s, "future": now_s + CLOCK_BACK_S}


def is_any_due(database: SqlDatabase, clock: Clock) -> bool:
    """Whether something is to be done about any schedule. Takes no lock; the tables must be there."""
    return bool(database.rows(f"SELECT 1 FROM af_schedules WHERE {IS_DUE} LIMIT 1", **bound(clock)))
