"""Rows of the table of queued runs: what `leases` and `checkpoints` write with what else they do to a run.

One row per run that was put into a shared queue, for as long as the run is kept:

    held      it waits for other runs (`dependencies`)
    delayed   it may not begin yet
    ready     it waits to be taken
    taken     a process has taken it, or it ended while it waited

`line` is priority and tenant as one text whose order is that of the priorities, highest first. With the index
on it the lines of a queue are found by one seek each, however many runs wait in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.sql import Connection, execute

PRIORITY_MAX = 100
"""Priorities go from minus this to this."""
CHANNEL = "af_queued"
"""Of PostgreSQL's notifications: something may be ready."""
_RANK_DIGITS = 3

QueueState = Literal["held", "delayed", "ready", "taken"]

CREATE_AFTER = (
    """CREATE TABLE IF NOT EXISTS af_after (
        root_id TEXT NOT NULL, needed_id TEXT NOT NULL, any_end INTEGER NOT NULL,
        PRIMARY KEY (root_id, needed_id))""",
    "CREATE INDEX IF NOT EXISTS af_after_needed ON af_after (needed_id)",
)
CREATE_STARTS = (
    "CREATE TABLE IF NOT EXISTS af_starts (queue TEXT NOT NULL, at_s DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX IF NOT EXISTS af_starts_at ON af_starts (queue, at_s)",
)
CREATE_SERVING = (
    "CREATE TABLE IF NOT EXISTS af_serving (executor_id TEXT NOT NULL, queue TEXT NOT NULL, "
    "PRIMARY KEY (executor_id, queue))",
)
CREATE_QUEUED = (
    """CREATE TABLE IF NOT EXISTS af_queued (
        root_id TEXT PRIMARY KEY, queue TEXT NOT NULL, priority INTEGER NOT NULL, tenant TEXT NOT NULL,
        name TEXT NOT NULL, version TEXT NOT NULL, line TEXT NOT NULL, state TEXT NOT NULL,
        at_s DOUBLE PRECISION NOT NULL, not_before_s DOUBLE PRECISION, deadline_s DOUBLE PRECISION,
        taken_at_s DOUBLE PRECISION)""",
    "CREATE INDEX IF NOT EXISTS af_queued_ready ON af_queued (queue, line, at_s, root_id) "
    "WHERE state = 'ready'",
    "CREATE INDEX IF NOT EXISTS af_queued_returned ON af_queued (queue, line, at_s) "
    "WHERE state = 'ready' AND taken_at_s IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS af_queued_delayed ON af_queued (not_before_s) WHERE state = 'delayed'",
    "CREATE INDEX IF NOT EXISTS af_queued_deadlines ON af_queued (deadline_s) "
    "WHERE state <> 'taken' AND deadline_s IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS af_queued_served ON af_queued (tenant, taken_at_s) "
    "WHERE taken_at_s IS NOT NULL",
)


def line_of(priority: int, tenant: str) -> str:
    """See this module."""
    return f"{PRIORITY_MAX - priority:0{_RANK_DIGITS}d}:{tenant}"


def tenant_of(line: str) -> str:
    """The tenant of a line."""
    return line[_RANK_DIGITS + 1 :]


def check_priority(priority: int) -> None:
    """Refuse what no line can have.

    Raises:
        InvalidInput: it is outside the range.
    """
    if abs(priority) > PRIORITY_MAX:
        raise InvalidInput(
            f"the priority {priority!r} is out of range", hint=f"use {-PRIORITY_MAX} to {PRIORITY_MAX}"
        )


def enqueue(
    connection: Connection,
    root_id: str,
    *,
    queue: str,
    priority: int,
    tenant: str,
    name: str,
    version: str,
    at_s: float,
    not_before_s: float | None = None,
    deadline_s: float | None = None,
    held: bool = False,
) -> None:
    """Put a run into a queue, unless it has one. The caller's transaction holds its top-level row.

    Args:
        connection: In a transaction.
        root_id: The run.
        queue: Where to.
        priority: Of the run.
        tenant: Whose it is.
        name: Its workflow: only processes that know it take it.
        version: Of the engine that stored it.
        at_s: Since when it waits, in seconds since 1970.
        not_before_s: It is not taken before.
        deadline_s: From then on it is not begun.
        held: It waits for other runs.
    """
    state: QueueState = "ready" if not_before_s is None or not_before_s <= at_s else "delayed"
    execute(
        connection,
        "INSERT INTO af_queued (root_id, queue, priority, tenant, name, version, line, state, at_s, "
        "not_before_s, deadline_s) VALUES (:root_id, :queue, :priority, :tenant, :name, :version, :line, "
        ":state, :at_s, :not_before_s, :deadline_s) ON CONFLICT DO NOTHING",
        root_id=root_id,
        queue=queue,
        priority=priority,
        tenant=tenant,
        name=name,
        version=version,
        line=line_of(priority, tenant),
        state="held" if held else state,
        at_s=at_s,
        not_before_s=not_before_s,
        deadline_s=deadline_s,
    )


def set_state(
    connection: Connection, roots: Sequence[str], state: QueueState, taken_at_s: float | None
) -> None:
    """Change the state of those of these runs that have a row.

    Args:
        connection: In a transaction.
        roots: The runs.
        state: What they are from now on.
        taken_at_s: When they were taken by a process; None, or another state: as it was.
    """
    if not roots:
        return
    took = state == "taken" and taken_at_s is not None
    execute(
        connection,
        f"UPDATE af_queued SET state = :state{', taken_at_s = :at' if took else ''} WHERE root_id IN :ids",  # noqa: S608 - constants
        state=state,
        ids=list(roots),
        **({"at": taken_at_s} if took else {}),
    )


def wait_for(connection: Connection, root_id: str, needed: Sequence[str], *, any_end: bool) -> None:
    """Note that a run waits for others. The caller's transaction has just stored it.

    Args:
        connection: In a transaction.
        root_id: The run.
        needed: The others.
        any_end: Whether it is enough that they have ended.
    """
    for needed_id in needed:
        execute(
            connection,
            "INSERT INTO af_after (root_id, needed_id, any_end) VALUES (:id, :needed, :any_end)",
            id=root_id,
            needed=needed_id,
            any_end=int(any_end),
        )


def make_ready(connection: Connection, roots: Sequence[str], now_s: float) -> None:
    """Let those of these runs that have a row be taken from their queue, unless they wait for other runs.

    Args:
        connection: In a transaction.
        roots: The runs.
        now_s: Since when they wait for a worker. One that may not begin yet is delayed.
    """
    if not roots:
        return
    execute(
        connection,
        "UPDATE af_queued SET state = CASE WHEN EXISTS (SELECT 1 FROM af_after a "
        "WHERE a.root_id = af_queued.root_id) THEN 'held' WHEN not_before_s > :now THEN 'delayed' "
        "ELSE 'ready' END, at_s = CASE WHEN state = 'held' THEN :now ELSE at_s END WHERE root_id IN :ids",
        now=now_s,
        ids=list(roots),
    )


def notify(connection: Connection) -> None:
    """Wake the processes that wait for work, once this transaction has been committed. On PostgreSQL."""
    connection.execute(f"NOTIFY {CHANNEL}")
