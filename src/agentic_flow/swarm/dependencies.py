"""Runs that begin after other runs: what they wait for, and what becomes of them when that has ended.

A row of `af_after` says that one run still waits for another. It goes when the other has completed (or has
ended in whichever way, if that is enough), so that what is fulfilled stays so, whatever becomes of the other
later. A run without rows may begin. One that waits belongs to a process or to a shared queue as any other;
it is not begun, takes no place, and fails as soon as it can never begin. Only runs that exist can be waited
for, so that nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import Conflict, NotFound, as_problem
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.event_log import append, end_data, event, written_down
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.queue_rows import make_ready, notify, set_state
from agentic_flow.swarm.scheduling import QUEUED_BY, UNFINISHED

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_SETTLED_MAX = 200
_ENDED = "(w.status IS NULL OR w.status NOT IN ('queued', 'running'))"


@dataclass(frozen=True, slots=True)
class Need:
    """A run that another one waits for.

    Args:
        run_id: The run that is waited for.
        status: As it is stored; None: it is gone.
        any_end: Whether it is enough that it has ended.
    """

    run_id: str
    status: str | None
    any_end: bool

    @property
    def is_met(self) -> bool:
        """Whether it keeps nobody waiting any more."""
        return self.status == "completed" or (self.any_end and self.status not in UNFINISHED)


def verdict(needs: Sequence[Need]) -> Literal["begin", "wait"] | Need:
    """Whether a run may begin, must wait, or can never begin: then because of which.

    Args:
        needs: All that it waits for.
    """
    for need in sorted(needs, key=lambda one: one.run_id):
        if not need.is_met and need.status not in UNFINISHED:
            return need
    return "begin" if all(need.is_met for need in needs) else "wait"


def never_error(run_id: str, need: Need) -> Conflict:
    """What a run ends with that waited for one which did not complete."""
    state = {None: "is gone", "given_up": "was given up"}.get(need.status, f"is {need.status}")
    return Conflict(
        f"run {run_id!r} was to begin after run {need.run_id!r}, which {state}",
        hint="submit it again after a run that completes, or with after_any_end",
        details={"after": need.run_id, "state": need.status or "gone"},
    )


class Dependencies:
    """What the runs of one run database wait for.

    Args:
        database: Where they are.
        clock: Stamps what is stored.
    """

    def __init__(self, database: RunDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def unmet(self, tenant: str, run_ids: Sequence[str], *, any_end: bool) -> list[str]:
        """Which of these a new run must wait for.

        Args:
            tenant: Whose the new run is.
            run_ids: What it is to begin after.
            any_end: Whether it is enough that they have ended.

        Raises:
            NotFound: one is not a run of this tenant.
        """
        rows = self._database.rows(
            "SELECT workflow_id, status FROM af_workflows WHERE workflow_id IN :ids "
            "AND parent_id IS NULL AND tenant = :tenant",
            ids=list(run_ids),
            tenant=tenant,
        )
        status = {str(row[0]): str(row[1]) for row in rows}
        for run_id in run_ids:
            if run_id not in status:
                raise NotFound(
                    f"there is no run {run_id!r} to begin after",
                    hint="list them with `agentic-flow runs list`",
                )
        needs = [Need(run_id, status[run_id], any_end) for run_id in dict.fromkeys(run_ids)]
        return [need.run_id for need in needs if not need.is_met]

    def waiting_among(self, run_ids: Collection[str]) -> set[str]:
        """Those of these runs that still wait for others."""
        return self._database.roots_in("af_after", run_ids)

    def is_due(self, owner: str = QUEUED_BY) -> bool:
        """Whether anything waits, of this owner's, for a run that has ended. Takes no lock."""
        return bool(self._due(owner, 1))

    def settle(self, owner: str) -> int:
        """Let go on what waits, of this owner's, for runs that have ended: it may begin, or has failed.

        Args:
            owner: A process, of its own runs; or `QUEUED_BY`.

        Returns:
            How many runs may begin or have failed because of it.
        """
        found = self._due(owner, _SETTLED_MAX)
        if not found:
            return 0
        with self._database.transaction() as connection:
            held = execute(
                connection,
                "SELECT workflow_id, name FROM af_workflows WHERE workflow_id IN :ids AND status = 'queued' "
                f"AND executor_id = :owner ORDER BY workflow_id{self._database.for_update}",
                ids=found,
                owner=owner,
            )
            names = {str(row[0]): str(row[1]) for row in held}
            if not names:
                return 0
            begun: list[str] = []
            failed = 0
            for root_id, needs in self._needs(connection, list(names)).items():
                decided = verdict(needs)
                if isinstance(decided, Need):
                    self._fail(connection, root_id, names[root_id], decided)
                    failed += 1
                    continue
                self._forget(connection, root_id, [need.run_id for need in needs if need.is_met])
                if decided == "begin":
                    begun.append(root_id)
            make_ready(connection, begun, self._clock.time_s())
            if begun and not self._database.is_sqlite:
                notify(connection)
        return len(begun) + failed

    def _due(self, owner: str, limit: int) -> list[str]:
        rows = self._database.rows(
            "SELECT DISTINCT a.root_id FROM af_after a JOIN af_workflows d ON d.workflow_id = a.root_id "
            "LEFT JOIN af_workflows w ON w.workflow_id = a.needed_id "
            f"WHERE d.executor_id = :owner AND d.status = 'queued' AND {_ENDED} LIMIT {int(limit)}",
            owner=owner,
        )
        return [str(row[0]) for row in rows]

    def _needs(self, connection: Connection, roots: Sequence[str]) -> dict[str, list[Need]]:
        rows = execute(
            connection,
            "SELECT a.root_id, a.needed_id, w.status, a.any_end FROM af_after a "
            "LEFT JOIN af_workflows w ON w.workflow_id = a.needed_id WHERE a.root_id IN :ids",
            ids=list(roots),
        )
        needs: dict[str, list[Need]] = {}
        for root_id, needed_id, status, any_end in rows:
            need = Need(str(needed_id), None if status is None else str(status), bool(any_end))
            needs.setdefault(str(root_id), []).append(need)
        return needs

    def _forget(self, connection: Connection, root_id: str, needed: Sequence[str]) -> None:
        if needed:
            execute(
                connection,
                "DELETE FROM af_after WHERE root_id = :id AND needed_id IN :needed",
                id=root_id,
                needed=list(needed),
            )

    def _fail(self, connection: Connection, root_id: str, name: str, need: Need) -> None:
        now_s = self._clock.time_s()
        execute(
            connection,
            "UPDATE af_workflows SET status = 'failed', error = :error, updated_at_s = :now, "
            "ended_at_s = :now WHERE workflow_id = :id",
            error=orjson.dumps(as_problem(never_error(root_id, need))).decode(),
            now=now_s,
            id=root_id,
        )
        execute(connection, "DELETE FROM af_after WHERE root_id = :id", id=root_id)
        set_state(connection, [root_id], "taken", None)
        sqlite = self._database.is_sqlite
        written_down(connection, root_id, sqlite=sqlite)
        told = event(root_id, root_id, "ended", now_s, name, end_data("failed", None))
        append(connection, [told], sqlite=sqlite)
