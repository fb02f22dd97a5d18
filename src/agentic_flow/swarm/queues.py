"""Shared queues of runs: whoever has a place takes the next, in whichever process it was accepted.

A queued run is a row of `af_workflows` that `QUEUED_BY` owns, and one of `af_queued`. Taking it is a claim as
any other: its epoch grows, so that nobody before can record anything. Who is next is decided without I/O
(`scheduling.chosen`); here is what that is asked about. On PostgreSQL one process chooses at a time, so that
limits hold over all of them; on SQLite a transaction has the file for itself anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from zlib import crc32

import orjson

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import DeadlineExceeded, as_problem
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import EventKind, QueueDepth
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.event_log import append, end_data, event
from agentic_flow.swarm.leases import READABLE, Claim, RunDatabase
from agentic_flow.swarm.queue_rates import QueueRates
from agentic_flow.swarm.queue_rows import notify, set_state, tenant_of
from agentic_flow.swarm.scheduling import QUEUED_BY, Fence, Queued, chosen

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_TAKEN_MAX = 64
_LINES_MAX = 64
_EXPIRED_MAX = 100
_TICK_S = 1e-5
_NEW, _RETURNED = "AND taken_at_s IS NULL", "AND taken_at_s IS NOT NULL"
_LINES_RETURNED = """SELECT DISTINCT q.line, (SELECT MAX(s.taken_at_s) FROM af_queued s
    WHERE s.taken_at_s IS NOT NULL AND s.tenant = q.tenant)
FROM af_queued q WHERE q.state = 'ready' AND q.queue = :queue AND q.taken_at_s IS NOT NULL LIMIT 1000"""
_LINES = """WITH RECURSIVE lines(line) AS (
    SELECT MIN(line) FROM af_queued WHERE state = 'ready' AND queue = :queue
    UNION ALL
    SELECT (SELECT MIN(q.line) FROM af_queued q
            WHERE q.state = 'ready' AND q.queue = :queue AND q.line > lines.line)
    FROM lines WHERE lines.line IS NOT NULL)
SELECT line, (SELECT MAX(s.taken_at_s) FROM af_queued s
              WHERE s.taken_at_s IS NOT NULL AND s.tenant = substr(lines.line, 5))
FROM lines WHERE line IS NOT NULL LIMIT 1000"""


class RunQueues:
    """The shared queues of one run database.

    Args:
        database: Where they are.
        clock: Stamps what is stored, and says what is due.
        queue_runs_max: See `scheduling.chosen`.
        tenant_runs_max: Likewise.
        rates: How many runs of which queue may begin in a minute.
    """

    def __init__(
        self,
        database: RunDatabase,
        clock: Clock,
        *,
        queue_runs_max: Mapping[str, int],
        tenant_runs_max: int | None,
        rates: QueueRates | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._queue_runs_max = queue_runs_max
        self._tenant_runs_max = tenant_runs_max
        self._rates = rates or QueueRates(database, clock, {})

    def has_work(self, queues: Collection[str], *, besides: Collection[str] = ()) -> bool:
        """Whether anything may wait in these queues, apart from some runs: a question that takes no lock."""
        if not queues:  # who works for none takes nothing
            return False
        closed = self._rates.closed(queues)
        ready = "EXISTS (SELECT 1 FROM af_queued WHERE state = 'ready' AND queue IN"
        asked = ["EXISTS (SELECT 1 FROM af_queued WHERE state = 'delayed' AND not_before_s <= :now)"]
        other, lists = _others(besides)
        # An empty list has no type, and PostgreSQL compares no text with it.
        if opened := sorted(set(queues) - closed):
            asked.append(f"{ready} :opened {other})")
            lists["opened"] = opened
        if closed:
            asked.append(f"{ready} :closed {_RETURNED} {other})")
            lists["closed"] = sorted(closed)
        statement = f"SELECT 1 WHERE {' OR '.join(asked)}"
        return bool(self._database.rows(statement, now=self._clock.time_s(), **lists))

    def take(
        self,
        executor_id: str,
        queues: Sequence[str],
        names: Collection[str],
        free: int,
        *,
        besides: Collection[str] = (),
    ) -> list[Claim]:
        """Become the owner of the next runs of these queues.

        Args:
            executor_id: The process that takes them.
            queues: Those it works for.
            names: The workflows it knows.
            free: Its free places.
            besides: Runs that it leaves to others.
        """
        free = min(free, _TAKEN_MAX)
        with self._database.transaction() as connection:
            if not self._database.is_sqlite:
                connection.execute(f"SELECT pg_advisory_xact_lock({crc32(b'run queues')})")
            now_s = self._clock.time_s()
            execute(
                connection,
                "UPDATE af_queued SET state = 'ready' WHERE state = 'delayed' AND not_before_s <= :now",
                now=now_s,
            )
            running = _running(connection)
            left = self._rates.left(connection, queues)
            candidates = self._candidates(connection, queues, names, running, left, free, now_s, besides)
            next_ones = chosen(
                candidates,
                running,
                free,
                queue_runs_max=self._queue_runs_max,
                tenant_runs_max=self._tenant_runs_max,
                starts_left=left,
            )
            # Later than all that it is compared with, whatever the clock here says: a tenant that is served
            # by a process whose clock is behind would else remain the one served the longest ago.
            served_at_s = max([now_s, *(one.served_at_s + _TICK_S for one in candidates)])
            taken = self._taken(connection, executor_id, [one.run_id for one in next_ones], served_at_s)
            begun = {claim.workflow_id for claim in taken}
            self._rates.note(
                connection, [one.queue for one in next_ones if one.is_start and one.run_id in begun]
            )
            return taken

    def _candidates(
        self,
        connection: Connection,
        queues: Sequence[str],
        names: Collection[str],
        running: Mapping[tuple[str, str], int],
        starts_left: Mapping[str, int],
        free: int,
        now_s: float,
        besides: Collection[str],
    ) -> list[Queued]:
        """The oldest runs of the lines that are next; at least so many that the choice is the right one."""
        by_tenant, by_queue = Counter[str](), Counter[str]()
        for (queue, tenant), count in running.items():
            by_queue[queue] += count
            by_tenant[tenant] += count
        # Queues whose limit is reached must not crowd the others out of what is looked at.
        full = {queue for queue, most in self._queue_runs_max.items() if by_queue[queue] >= most}
        lines = [
            (queue, str(row[0]), float(row[1] or 0.0))
            for queue in queues
            if queue not in full
            for row in execute(
                connection, _LINES if starts_left.get(queue, 1) else _LINES_RETURNED, queue=queue
            )
        ]
        limit = self._tenant_runs_max
        lines = [line for line in lines if limit is None or by_tenant[tenant_of(line[1])] < limit]
        lines.sort(key=lambda line: (line[1].partition(":")[0], by_tenant[tenant_of(line[1])], line[2]))
        found: list[Queued] = []
        other, refused = _others(besides)
        for queue, line, served_at_s in lines[:_LINES_MAX]:
            left = starts_left.get(queue)
            parts = [("", free)] if left is None else [(_RETURNED, free), (_NEW, min(free, left))]
            for which, limit in parts:
                rows = execute(
                    connection,
                    "SELECT root_id, priority, tenant, at_s, taken_at_s FROM af_queued "
                    "WHERE state = 'ready' AND queue = :queue AND line = :line AND name IN :names "
                    f"AND version IN :versions {other} AND (deadline_s IS NULL OR deadline_s > :now) {which} "
                    "ORDER BY at_s, root_id LIMIT :limit",
                    queue=queue,
                    line=line,
                    names=sorted(names),
                    versions=list(READABLE),
                    now=now_s,
                    limit=limit,
                    **refused,
                )
                found += [
                    Queued(
                        str(row[0]),
                        queue,
                        int(row[1]),
                        str(row[2]),
                        float(row[3]),
                        served_at_s,
                        row[4] is None,
                    )
                    for row in rows
                ]
        return found

    def _taken(
        self, connection: Connection, executor_id: str, run_ids: Sequence[str], served_at_s: float
    ) -> list[Claim]:
        if not run_ids:
            return []
        rows = execute(
            connection,
            "SELECT workflow_id, name, tenant, priority, payload, epoch, accepted_at_s FROM af_workflows "
            "WHERE workflow_id IN :ids AND status = 'queued' AND executor_id = :queue "
            f"ORDER BY workflow_id{self._database.for_update}",
            ids=list(run_ids),
            queue=QUEUED_BY,
        )
        stored = {str(row[0]): row for row in rows}
        set_state(connection, run_ids, "taken", served_at_s)  # also what ended meanwhile: it waits no more
        if not stored:
            return []
        queued = execute(
            connection,
            "SELECT root_id, deadline_s, queue FROM af_queued WHERE root_id IN :ids",
            ids=list(stored),
        )
        about = {str(row[0]): (row[1], str(row[2])) for row in queued}
        execute(
            connection,
            "UPDATE af_workflows SET executor_id = :me, epoch = epoch + 1, updated_at_s = :now "
            "WHERE workflow_id IN :ids",
            me=executor_id,
            now=self._clock.time_s(),
            ids=list(stored),
        )
        return [
            Claim(
                workflow_id=run_id,
                name=str(row[1]),
                tenant=str(row[2]),
                priority=int(row[3]),
                payload=str(row[4]),
                fence=Fence(executor_id, int(row[5]) + 1),
                accepted_at_s=float(row[6]),
                is_new=int(row[5]) == 1,
                deadline_s=about[run_id][0],
                queue=about[run_id][1],
            )
            for run_id in run_ids
            if (row := stored.get(run_id)) is not None
        ]

    def hand_back(
        self, executor_id: str, run_ids: Sequence[str] | None = None, *, why: str | None = None
    ) -> list[str]:
        """Give what this process took and has not finished back to its queues, for others to go on with.

        The process must have stopped it: what it would still record is refused.

        Args:
            executor_id: The process.
            run_ids: Only these; None: all.
            why: For people, if it is not that the process leaves.
        """
        if run_ids is not None and not run_ids:
            return []
        only: dict[str, Any] = {} if run_ids is None else {"ids": list(run_ids)}
        with self._database.transaction() as connection:
            rows = execute(
                connection,
                "SELECT workflow_id, name FROM af_workflows WHERE parent_id IS NULL "
                "AND status IN ('queued', 'running') AND executor_id = :me "
                f"AND workflow_id IN (SELECT root_id FROM af_queued) "
                f"{'AND workflow_id IN :ids ' if only else ''}"
                f"ORDER BY workflow_id{self._database.for_update}",
                me=executor_id,
                **only,
            )
            names = {str(row[0]): str(row[1]) for row in rows}
            if not names:
                return []
            now_s = self._clock.time_s()
            execute(
                connection,
                "UPDATE af_workflows SET executor_id = :queue, status = 'queued', updated_at_s = :now "
                "WHERE workflow_id IN :ids",
                queue=QUEUED_BY,
                now=now_s,
                ids=list(names),
            )
            set_state(connection, list(names), "ready", None)
            told: EventKind = "handed_back"
            data: JsonObject | None = None if why is None else {"text": why}
            append(
                connection,
                [event(run_id, run_id, told, now_s, name, data) for run_id, name in names.items()],
                sqlite=self._database.is_sqlite,
            )
            if not self._database.is_sqlite:
                notify(connection)
            return list(names)

    def expire(self) -> list[str]:
        """End the runs whose deadline passed before anybody had begun them; they have failed."""
        now_s = self._clock.time_s()
        late = "state <> 'taken' AND deadline_s IS NOT NULL AND deadline_s <= :now"
        found = self._database.rows(
            f"SELECT root_id FROM af_queued WHERE {late} LIMIT {_EXPIRED_MAX}", now=now_s
        )
        if not found:
            return []
        with self._database.transaction() as connection:
            rows = execute(
                connection,
                "SELECT workflow_id, name FROM af_workflows WHERE workflow_id IN :ids "
                f"AND status = 'queued' AND executor_id = :queue "
                f"ORDER BY workflow_id{self._database.for_update}",
                ids=[str(row[0]) for row in found],
                queue=QUEUED_BY,
            )
            names = {str(row[0]): str(row[1]) for row in rows}
            problem = orjson.dumps(as_problem(late_error())).decode()
            if names:
                execute(
                    connection,
                    "UPDATE af_workflows SET status = 'failed', error = :error, updated_at_s = :now, "
                    "ended_at_s = :now WHERE workflow_id IN :ids",
                    error=problem,
                    now=now_s,
                    ids=list(names),
                )
            set_state(connection, [str(row[0]) for row in found], "taken", None)
            append(
                connection,
                [event(i, i, "ended", now_s, name, end_data("failed", None)) for i, name in names.items()],
                sqlite=self._database.is_sqlite,
            )
        return list(names)

    def depths(self) -> list[QueueDepth]:
        """Every queue that has unfinished runs, by name."""
        now_s = self._clock.time_s()
        with self._database.reading() as connection:
            waiting = execute(
                connection,
                "SELECT queue, COUNT(*), MIN(at_s) FROM af_queued WHERE state = 'ready' GROUP BY queue",
            )
            found: dict[str, list[Any]] = {
                str(row[0]): [int(row[1]), max(0.0, now_s - float(row[2])), 0, 0] for row in waiting
            }
            delayed = execute(
                connection,
                "SELECT queue, COUNT(*) FROM af_queued WHERE state IN ('delayed', 'held') GROUP BY queue",
            )
            for row in delayed:
                found.setdefault(str(row[0]), [0, 0.0, 0, 0])[2] = int(row[1])
            for (queue, _), count in _running(connection).items():
                found.setdefault(queue, [0, 0.0, 0, 0])[3] += count
        return [QueueDepth(queue, *figures) for queue, figures in sorted(found.items())]


def late_error() -> DeadlineExceeded:
    """What a run ends with that nobody had begun in time."""
    return DeadlineExceeded(
        "the run's deadline passed before it could begin",
        hint="give it more time, or start more workers for its queue",
    )


def _others(besides: Collection[str]) -> tuple[str, dict[str, list[str]]]:
    """A condition on `root_id` that leaves these out, and what is bound to it."""
    # Without any there is none: an empty list has no type, and PostgreSQL compares no text with it.
    return ("AND root_id NOT IN :besides", {"besides": sorted(besides)}) if besides else ("", {})


def _running(connection: Connection) -> dict[tuple[str, str], int]:
    """Queue and tenant → unfinished runs that processes have. Those are few, however many wait."""
    rows = execute(
        connection,
        "SELECT q.queue, q.tenant, COUNT(*) FROM af_executors e "
        "JOIN af_workflows w ON w.executor_id = e.executor_id AND w.parent_id IS NULL "
        "AND w.status IN ('queued', 'running') JOIN af_queued q ON q.root_id = w.workflow_id "
        "GROUP BY q.queue, q.tenant",
    )
    return {(str(row[0]), str(row[1])): int(row[2]) for row in rows}
