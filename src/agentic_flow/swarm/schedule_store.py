"""Rows of the table of schedules, in the run database.

To fire is two writes around a submission: the first notes for which due time (of several processes one gets
it noted), the last that it was done. What is noted and not done is submitted by whoever finds it, under an
idempotency key of the schedule and the due time: a process that dies in between leaves neither a run too many
nor one too few.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import Conflict, LimitExceeded, NeedsNewer, NotFound
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.schedule_rows import IS_DUE, bound
from agentic_flow.swarm.schedule_rule import ScheduleRule
from agentic_flow.swarm.schedules import SCHEDULES_MAX, Schedule, ScheduleRequest

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.schedules")

_DUE_MAX = 100
_COLUMNS = (
    "schedule_id, tenant, name, workflow, subject, scopes, request, rule, is_paused, anchor_s, next_s, "
    "firing_s, last_s, last_run_id, fired, skipped, note"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A stored schedule. `firing_s` is a due time whose run is being submitted."""

    schedule_id: str
    tenant: str
    name: str
    workflow: str
    subject: str
    scopes: tuple[str, ...]
    request: ScheduleRequest
    rule: ScheduleRule
    is_paused: bool
    anchor_s: float
    next_s: float
    firing_s: float | None
    last_s: float | None
    last_run_id: str | None
    fired: int
    skipped: int
    note: str

    @property
    def principal(self) -> Principal:
        """In whose name its runs are made."""
        return Principal(self.tenant, self.subject, frozenset(self.scopes))

    def shown(self) -> Schedule:
        """As callers see it."""
        return Schedule(
            name=self.name,
            workflow=self.workflow,
            rule=self.rule,
            state="paused" if self.is_paused else "active",
            inputs=self.request.inputs,
            queue=self.request.queue,
            priority=self.request.priority,
            subject=self.subject,
            next_at_s=None if self.is_paused else self.next_s,
            last_at_s=self.last_s,
            last_run_id=self.last_run_id,
            fired=self.fired,
            skipped=self.skipped,
            note=self.note,
            created_at_s=self.anchor_s,
        )


class ScheduleStore:
    """The schedules of one run database.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        clock: Says what is due.
    """

    def __init__(self, database_url: str | None, data_dir: Path, clock: Clock) -> None:
        self.clock = clock
        self._closed = RunDatabase(database_url, data_dir, pooled=False)
        self._pooled = RunDatabase(database_url, data_dir)
        self._database = self._closed
        self._has_table = False
        self._left: set[str] = set()

    @contextmanager
    def open(self) -> Generator[None]:
        """Keep connections meanwhile: it is asked every second."""
        self._database = self._pooled
        try:
            yield
        finally:
            self._database = self._closed
            self._pooled.close()

    def add(self, row: Row) -> None:
        """Store a new one.

        Raises:
            Conflict: the tenant has one of this name.
            LimitExceeded: it has too many.
        """
        self._database.create()  # what an older build has made lacks the table
        with self._database.transaction() as connection:
            found = execute(
                connection, "SELECT COUNT(*) FROM af_schedules WHERE tenant = :tenant", tenant=row.tenant
            )
            if int(found.scalar_one() or 0) >= SCHEDULES_MAX:
                raise LimitExceeded(f"there are {SCHEDULES_MAX} schedules already", hint="remove one first")
            stored = connection.execute(
                f"INSERT INTO af_schedules ({_COLUMNS}) VALUES (:schedule_id, :tenant, :name, :workflow, "
                ":subject, :scopes, :request, :rule, 0, :anchor_s, :next_s, NULL, NULL, NULL, 0, 0, '') "
                "ON CONFLICT DO NOTHING",
                {
                    "schedule_id": row.schedule_id,
                    "tenant": row.tenant,
                    "name": row.name,
                    "workflow": row.workflow,
                    "subject": row.subject,
                    "scopes": orjson.dumps(row.scopes).decode(),
                    "request": row.request.model_dump_json(exclude_unset=True),
                    "rule": row.rule.model_dump_json(),
                    "anchor_s": row.anchor_s,
                    "next_s": row.next_s,
                },
            )
            if stored.rowcount != 1:
                raise Conflict(
                    f"there is a schedule {row.name!r} already", hint="remove it first, or give this a name"
                )

    def every(self, tenant: str) -> list[Row]:
        """A tenant's, by name; without those that only a newer build can read."""
        if not self._is_there():
            return []
        rows = self._database.rows(
            f"SELECT {_COLUMNS} FROM af_schedules WHERE tenant = :tenant ORDER BY name", tenant=tenant
        )
        return self._readable(rows)

    def get(self, tenant: str, name: str) -> Row:
        """One of a tenant's.

        Raises:
            NotFound: there is none of this name.
            NeedsNewer: this build cannot read it.
        """
        rows: Sequence[Sequence[Any]] = ()
        if self._is_there():
            rows = self._database.rows(
                f"SELECT {_COLUMNS} FROM af_schedules WHERE tenant = :tenant AND name = :name",
                tenant=tenant,
                name=name,
            )
        if not rows:
            raise _unknown(name)
        return _row(rows[0])

    def set_paused(self, row: Row, *, paused: bool, next_s: float) -> bool:
        """Pause it, or let it go on with this time; False when it is so already, or gone."""
        return self._changed(
            "UPDATE af_schedules SET is_paused = :paused, next_s = :next WHERE schedule_id = :id "
            "AND is_paused <> :paused",
            id=row.schedule_id,
            paused=int(paused),
            next=next_s,
        )

    def remove(self, tenant: str, name: str) -> None:
        """Forget it.

        Raises:
            NotFound: there is none of this name.
        """
        if not self._is_there() or not self._changed(
            "DELETE FROM af_schedules WHERE tenant = :tenant AND name = :name", tenant=tenant, name=name
        ):
            raise _unknown(name)

    def due(self) -> list[Row]:
        """Those that something is to be done about, the latest first to come."""
        if not self._is_there():
            return []
        rows = self._database.rows(
            f"SELECT {_COLUMNS} FROM af_schedules WHERE {IS_DUE} ORDER BY next_s LIMIT {_DUE_MAX}",
            **bound(self.clock),
        )
        return self._readable(rows)

    def _readable(self, rows: Sequence[Sequence[Any]]) -> list[Row]:
        """Those that this build can read: it leaves the others to those which can."""
        found: list[Row] = []
        for row in rows:
            try:
                found.append(_row(row))
            except NeedsNewer as error:
                if row[0] not in self._left:
                    log.warning("schedule_left", tenant=row[1], schedule=row[2], error=error.message)
                self._left.add(str(row[0]))
        return found

    def note_firing(self, row: Row, fire_s: float, next_s: float) -> bool:
        """Note for which due time it runs now; False when another process has."""
        return self._changed(
            "UPDATE af_schedules SET firing_s = :fire, next_s = :next WHERE schedule_id = :id "
            "AND next_s = :was AND firing_s IS NULL AND is_paused = 0",
            id=row.schedule_id,
            fire=fire_s,
            next=next_s,
            was=row.next_s,
        )

    def fired(self, row: Row, fire_s: float, run_id: str) -> None:
        """Note that it has run for this due time."""
        self._changed(
            "UPDATE af_schedules SET firing_s = NULL, last_s = :fire, last_run_id = :run, "
            "fired = fired + 1 WHERE schedule_id = :id AND firing_s = :fire",
            id=row.schedule_id,
            fire=fire_s,
            run=run_id,
        )

    def failed(self, row: Row, fire_s: float, note: str) -> None:
        """Note why it could not run for this due time."""
        self._changed(
            "UPDATE af_schedules SET firing_s = NULL, skipped = skipped + 1, note = :note "
            "WHERE schedule_id = :id AND firing_s = :fire",
            id=row.schedule_id,
            fire=fire_s,
            note=note,
        )

    def pass_over(self, row: Row, next_s: float, note: str) -> bool:
        """Let it wait for a later time, with the reason."""
        return self._changed(
            "UPDATE af_schedules SET next_s = :next, skipped = skipped + 1, note = :note "
            "WHERE schedule_id = :id AND next_s = :was AND firing_s IS NULL",
            id=row.schedule_id,
            next=next_s,
            note=note,
            was=row.next_s,
        )

    def begin_again(self, row: Row, next_s: float) -> bool:
        """Wait for the next time of a clock that was set back; what it had fired before is another time's."""
        return self._changed(
            "UPDATE af_schedules SET next_s = :next, anchor_s = :anchor, last_s = NULL, note = :note "
            "WHERE schedule_id = :id AND next_s = :was AND firing_s IS NULL",
            id=row.schedule_id,
            next=next_s,
            anchor=min(row.anchor_s, self.clock.time_s()),
            note="the clock was set back",
            was=row.next_s,
        )

    def _changed(self, statement: str, **bindings: Any) -> bool:
        with self._database.transaction() as connection:
            return _execute(connection, statement, bindings) == 1

    def _is_there(self) -> bool:
        self._has_table = self._has_table or (
            # One that only an older build has opened has none.
            self._database.has_runs() and self._database.has_table("af_schedules")
        )
        return self._has_table


def _execute(connection: Connection, statement: str, bindings: dict[str, Any]) -> int:
    return connection.execute(statement, bindings).rowcount


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no schedule {name!r}", hint="list them with `agentic-flow schedules list`")


def _row(row: Sequence[Any]) -> Row:
    return Row(
        schedule_id=str(row[0]),
        tenant=str(row[1]),
        name=str(row[2]),
        workflow=str(row[3]),
        subject=str(row[4]),
        scopes=tuple(orjson.loads(row[5])),
        request=ScheduleRequest.from_record(orjson.loads(row[6])),
        rule=ScheduleRule.from_record(orjson.loads(row[7])),
        is_paused=bool(row[8]),
        anchor_s=float(row[9]),
        next_s=float(row[10]),
        firing_s=None if row[11] is None else float(row[11]),
        last_s=None if row[12] is None else float(row[12]),
        last_run_id=None if row[13] is None else str(row[13]),
        fired=int(row[14]),
        skipped=int(row[15]),
        note=str(row[16]),
    )
