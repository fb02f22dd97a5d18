"""What the store says of workflows, read-only, from any process and without a run engine at work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, LimitExceeded, as_problem
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import ArtifactRecord, EventRecord, RunState, StepRecord, WorkflowRecord
from agentic_flow.core.sql import execute
from agentic_flow.swarm.artifact_rows import artifacts_of, content_of
from agentic_flow.swarm.event_log import events_of
from agentic_flow.swarm.leases import NOBODY, TREE, Leases, RunDatabase, root_of, tree_of
from agentic_flow.swarm.scheduling import HANDED_ON, QUEUED_BY, TAKEOVERS_MAX, UNFINISHED, state_of

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_STATUSES: dict[RunState, tuple[str, ...]] = {
    "completed": ("completed",),
    "failed": ("failed", "completed"),  # a completed one whose result cannot be read counts as failed
    "cancelled": ("cancelled",),
    "queued": ("queued",),
    "running": ("running",),
    "paused": UNFINISHED,
    "interrupted": (*UNFINISHED, "given_up"),
}


class RunReader:
    """Workflows and steps of one run database.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        lease_s: Seconds after which a silent owner counts as dead.
        clock: Compares heartbeats on SQLite.
    """

    def __init__(
        self, database_url: str | None, data_dir: Path, *, lease_s: float, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._database = RunDatabase(database_url, data_dir, pooled=False)
        self._leases = Leases(self._database, lease_s=lease_s, clock=clock)
        self._ready = self._has_log = self._has_pauses = self._has_queues = self._has_artifacts = False

    @classmethod
    def on(cls, database: RunDatabase, leases: Leases) -> RunReader:
        """A reader over connections that somebody else opens and closes."""
        reader = cls.__new__(cls)
        reader._database, reader._leases = database, leases
        reader._ready = reader._has_log = reader._has_pauses = reader._has_queues = False
        reader._has_artifacts = False
        return reader

    def get(self, workflow_id: str) -> WorkflowRecord | None:
        """One workflow, top-level or child, or None."""
        found = self._records(
            "w.workflow_id = :id", "w.workflow_id", 1, root=root_of(workflow_id), id=workflow_id
        )
        return found[0] if found else None

    def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[WorkflowRecord]:
        """Top-level workflows of a tenant, newest first."""
        where = "w.tenant = :tenant AND w.name = :name AND w.parent_id IS NULL"
        order = "w.accepted_at_s DESC, w.workflow_id DESC"
        bindings: dict[str, Any] = {"tenant": tenant, "name": name}
        if states:
            where += " AND w.status IN :statuses"
            bindings["statuses"] = sorted({s for state in states for s in _STATUSES[state]})
        # Whether an unfinished one runs depends on its owner, so that part is decided after reading.
        found: list[WorkflowRecord] = []
        offset, page = 0, max(limit, 100) if states else limit
        while len(found) < limit:
            records = self._records(where, order, page, offset, **bindings)
            found += [record for record in records if not states or record.state in states]
            if len(records) < page:
                break
            offset += page
        return found[:limit]

    def steps(self, workflow_id: str) -> list[StepRecord]:
        """Recorded steps of the workflow and of everything below it, in order of completion."""
        if not self._is_ready():
            return []
        rows = self._database.rows(
            "SELECT workflow_id, step_index, name, output, error, started_at_s, completed_at_s FROM af_steps "
            f"WHERE workflow_id IN (SELECT workflow_id FROM af_workflows WHERE {TREE}) "
            "ORDER BY completed_at_s, workflow_id, step_index",
            **tree_of(workflow_id),
        )
        return [_step(row) for row in rows]

    def events(self, workflow_id: str, after: int = 0) -> list[EventRecord]:
        """What happened in a top-level workflow and below it, with a sequence number above `after`."""
        if not self._is_ready():
            return []
        self._has_log = self._has_log or self._database.has_table("af_events")
        with self._database.reading() as connection:
            return events_of(connection, workflow_id, after, has_log=self._has_log)

    def artifacts(self, workflow_id: str) -> list[ArtifactRecord]:
        """What the workflow, and everything below it, has left besides results, every version in order."""
        if not self._keeps_artifacts():
            return []
        with self._database.reading() as connection:
            return artifacts_of(connection, workflow_id)

    def artifact_content(self, workflow_id: str, number: int) -> bytes | None:
        """The bytes of one; see RunEngine."""
        if not self._keeps_artifacts():
            return None
        with self._database.reading() as connection:
            return content_of(connection, workflow_id, number)

    def _keeps_artifacts(self) -> bool:
        if self._is_ready() and not self._has_artifacts:  # what an older build has made lacks the table
            self._has_artifacts = self._database.has_table("af_artifacts")
        return self._has_artifacts

    def _is_ready(self) -> bool:
        self._ready = self._ready or self._database.has_runs()
        return self._ready

    def _records(
        self, where: str, order: str, limit: int, offset: int = 0, *, root: str | None = None, **bindings: Any
    ) -> list[WorkflowRecord]:
        if not self._is_ready():
            return []
        root_id = "w.root_id"
        if root is not None:
            root_id, bindings["root"] = ":root", root
        self._has_pauses = self._has_pauses or self._database.has_table("af_paused")
        paused = "0"
        if self._has_pauses:
            paused = "(SELECT COUNT(*) FROM af_paused p WHERE p.root_id = r.workflow_id)"
        self._has_queues = self._has_queues or self._database.has_table("af_queued")
        queued, joined = "NULL, NULL, NULL", ""
        if self._has_queues:
            queued = "q.queue, q.not_before_s, q.deadline_s"
            joined = "LEFT JOIN af_queued q ON q.root_id = w.workflow_id"
        with self._database.reading() as connection:
            found = execute(
                connection,
                "SELECT w.workflow_id, w.name, w.tenant, w.status, w.payload, w.output, w.error, "
                f"w.accepted_at_s, w.updated_at_s, r.executor_id, r.status, {paused}, "
                f"w.priority, {queued} "
                f"FROM af_workflows w JOIN af_workflows r ON r.workflow_id = {root_id} {joined} "
                f"WHERE {where} ORDER BY {order} LIMIT {int(limit)} OFFSET {int(offset)}",
                **bindings,
            )
            rows: list[Sequence[Any]] = [tuple(row) for row in found]
            alive = self._leases.alive(connection, {str(row[9]) for row in rows if row[3] in UNFINISHED})
        return [_record(row, alive) for row in rows]


def decoded(text: str) -> Any:
    """A stored value.

    Raises:
        DataCorrupted: it is not JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(
            f"a stored value of the run database is not JSON: {text[:60]!r}", hint="restore it from a backup"
        ) from error


def decoded_object(text: str) -> JsonObject:
    """A stored JSON object.

    Raises:
        DataCorrupted: it is something else.
    """
    value = decoded(text)
    if not isinstance(value, dict):
        raise DataCorrupted(
            f"a stored value of the run database is no JSON object: {text[:60]!r}",
            hint="restore it from a backup",
        )
    return cast(JsonObject, value)


def record_of(
    workflow_id: str,
    *,
    name: str,
    tenant: str,
    state: RunState,
    payload: str,
    output: str | None,
    error: str | None,
    accepted_at_s: float,
    updated_at_s: float,
    owner: str,
    priority: int = 0,
    queue: str | None = None,
    not_before_s: float | None = None,
    deadline_s: float | None = None,
) -> WorkflowRecord:
    """A workflow as the store has it. What of it cannot be read is told by its error."""
    read: JsonObject = {"payload": {}, "output": None, "error": None}
    damage: AgenticFlowError | None = None
    for field, text in (("payload", payload), ("output", output), ("error", error)):
        try:
            if text is not None:
                read[field] = decoded_object(text)
        except DataCorrupted as found:
            damage = found
    if damage is not None:
        read["error"] = as_problem(damage)
        state = "failed" if state == "completed" else state
    return WorkflowRecord(
        workflow_id=workflow_id,
        name=name,
        tenant=tenant,
        state=state,
        payload=read["payload"],
        output=read["output"],
        error=read["error"],
        created_at_s=accepted_at_s,
        updated_at_s=updated_at_s,
        owner=None if owner in (NOBODY, QUEUED_BY, HANDED_ON) else owner,
        priority=priority,
        queue=queue,
        not_before_s=not_before_s,
        deadline_s=deadline_s,
    )


def _record(row: Sequence[Any], alive: Collection[str]) -> WorkflowRecord:
    error = row[6]
    if row[3] == "given_up":
        told = LimitExceeded(
            f"workflow {row[0]!r} was taken over {TAKEOVERS_MAX} times and never finished",
            hint="look at why its processes die, then resume it",
        )
        error = orjson.dumps(as_problem(told)).decode()
    return record_of(
        str(row[0]),
        name=str(row[1]),
        tenant=str(row[2]),
        state=state_of(str(row[3]), str(row[10]), owner_lives=row[9] in alive, paused=bool(row[11])),
        payload=str(row[4]),
        output=row[5],
        error=error,
        accepted_at_s=float(row[7]),
        updated_at_s=float(row[8]),
        owner=str(row[9]),
        priority=int(row[12]),
        queue=row[13],
        not_before_s=row[14],
        deadline_s=row[15],
    )


def _step(row: Sequence[Any]) -> StepRecord:
    output, error = None, None
    try:
        output = decoded(row[3]) if row[3] is not None else None
        error = decoded(row[4]) if row[4] is not None else None
    except DataCorrupted as damage:
        error = as_problem(damage)
    return StepRecord(
        workflow_id=str(row[0]),
        index=int(row[1]),
        name=str(row[2]),
        output=output,
        error=error,
        started_at_s=row[5],
        completed_at_s=row[6],
    )
