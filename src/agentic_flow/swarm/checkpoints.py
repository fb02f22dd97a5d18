"""The one thread of a process that writes the checkpoints of its workflows.

Whatever is pending when it gets to write goes into one transaction: 64 workflows that each finish a step
share one commit, one workflow pays for one. In the transaction the fence of every checkpoint is checked; one
that may not be written is left out, and does no harm to the others. Futures are resolved after the commit, on
the event loop they belong to: what was awaited is on disk.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog

from agentic_flow.core.errors import AgenticFlowError, StorageFull, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.sql import Connection, SqlDatabase, execute
from agentic_flow.swarm.artifact_rows import INSERT_ARTIFACT
from agentic_flow.swarm.event_log import EventRow, append, end_data, event, step_data
from agentic_flow.swarm.queue_rows import enqueue, notify, wait_for
from agentic_flow.swarm.scheduling import UNFINISHED, Fence, Permission, StoredWorkflow, may_record

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_BATCH_MAX = 512
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0
_VALUE_ERRORS = {
    "IntegrityError",
    "DataError",
    "ProgrammingError",
    "StatementError",
    "TypeError",
    "ValueError",
}
"""By name: SQLite's and SQLAlchemy's are different classes."""

Bindings = dict[str, Any]
_WORKFLOW_COLUMNS = (
    "workflow_id, root_id, parent_id, parent_step, name, version, tenant, priority, status, epoch, "
    "executor_id, payload, takeovers, accepted_at_s, started_at_s, updated_at_s"
)
_INSERT_WORKFLOW = (
    f"INSERT INTO af_workflows ({_WORKFLOW_COLUMNS}) VALUES (:workflow_id, :root_id, :parent_id, "
    ":parent_step, :name, :version, :tenant, :priority, :status, :epoch, :executor_id, :payload, 0, "
    ":accepted_at_s, :started_at_s, :accepted_at_s) ON CONFLICT DO NOTHING"
)
_INSERT_STEP = (
    "INSERT INTO af_steps (workflow_id, step_index, name, output, error, started_at_s, completed_at_s) "
    "VALUES (:workflow_id, :step_index, :name, :output, :error, :started_at_s, :completed_at_s) "
    "ON CONFLICT DO NOTHING"
)
_START = (
    "UPDATE af_workflows SET status = 'running', started_at_s = :now, updated_at_s = :now "
    "WHERE workflow_id = :workflow_id"
)
_END = (
    "UPDATE af_workflows SET status = :status, output = :output, error = :error, updated_at_s = :now, "
    "ended_at_s = :now WHERE workflow_id = :workflow_id"
)


@dataclass(frozen=True, slots=True)
class Accept:
    """Store a new top-level workflow, unless its id is taken: the answer is whether it was not.

    Args:
        row: Of `af_workflows`.
        queued: What `queue_rows.enqueue` is told of it besides, if it goes to a shared queue.
        after: Runs that it waits for.
        any_end: Whether it is enough that they have ended.
    """

    row: Bindings
    queued: Bindings | None = None
    after: Sequence[str] = ()
    any_end: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Statements of one kind that a workflow's execution writes, if its fence still holds.

    Args:
        root_id: The top-level workflow of its tree.
        workflow_id: The workflow itself.
        fence: What its process believes to hold.
        statement: One of this module.
        rows: What is bound to it, once for each.
        events: What it adds to the run's event log.
        ending: The status that the workflow has afterwards, if this ends it.
        artifacts: Rows of what the step leaves besides.
    """

    root_id: str
    workflow_id: str
    fence: Fence
    statement: str
    rows: Sequence[Bindings]
    events: Sequence[EventRow]
    ending: str | None = None
    artifacts: Sequence[Bindings] = ()


Operation = Accept | Checkpoint
Answer = bool | Permission


def recorded_step(
    root_id: str,
    workflow_id: str,
    fence: Fence,
    row: Bindings,
    *,
    also: Sequence[EventRow] = (),
    artifacts: Sequence[Bindings] = (),
) -> Checkpoint:
    """A step's result, the events that it is besides, and the artifacts that it leaves."""
    data = step_data(row["step_index"], row["error"])
    told = event(root_id, workflow_id, "step_finished", row["completed_at_s"], row["name"], data)
    return Checkpoint(root_id, workflow_id, fence, _INSERT_STEP, (row,), (told, *also), artifacts=artifacts)


def new_children(root_id: str, workflow_id: str, fence: Fence, rows: Sequence[Bindings]) -> Checkpoint:
    """Children that the workflow starts."""
    told = [
        event(root_id, row["workflow_id"], "child_started", row["accepted_at_s"], row["name"]) for row in rows
    ]
    return Checkpoint(root_id, workflow_id, fence, _INSERT_WORKFLOW, rows, told)


def started(root_id: str, fence: Fence, name: str, now_s: float) -> Checkpoint:
    """A top-level workflow that waited has got its place."""
    row = {"workflow_id": root_id, "now": now_s}
    told = event(root_id, root_id, "started", now_s, name)
    return Checkpoint(root_id, root_id, fence, _START, (row,), (told,))


def ended(
    root_id: str,
    workflow_id: str,
    fence: Fence,
    name: str,
    status: str,
    output: str | None,
    error: str | None,
    now_s: float,
) -> Checkpoint:
    """A workflow's end."""
    row = {"workflow_id": workflow_id, "status": status, "output": output, "error": error, "now": now_s}
    is_top = workflow_id == root_id
    data = end_data(status, None if is_top else error)
    told = event(root_id, workflow_id, "ended" if is_top else "child_ended", now_s, name, data)
    return Checkpoint(root_id, workflow_id, fence, _END, (row,), (told,), ending=status)


class CheckpointWriter:
    """Writes checkpoints for one event loop. Made, used and closed on it.

    Args:
        database: Where they go.
        patience_s: So long a database that does not answer is tried again.
    """

    def __init__(self, database: SqlDatabase, *, patience_s: float) -> None:
        self._database = database
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Operation, asyncio.Future[Answer]]] = []
        self._batches: queue.SimpleQueue[list[tuple[Operation, asyncio.Future[Answer]]] | None] = (
            queue.SimpleQueue()
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-engine-checkpoints", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation) -> asyncio.Future[Answer]:
        """Write it with the next transaction.

        The future gives `True` or `False` for an Accept, a Permission for a Checkpoint; it fails with
        Unavailable when the database stays away (an Accept at once when its disk is full), and with
        DataCorrupted when it is damaged.
        """
        future: asyncio.Future[Answer] = self._loop.create_future()
        if not self._pending:
            # At the end of this turn of the loop, so that all workflows that woke in it share a transaction.
            self._loop.call_soon(self._hand_over)
        self._pending.append((operation, future))
        return future

    async def close(self) -> None:
        """Write what is pending, and end the thread."""
        self._closing.set()
        self._hand_over()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)

    def _hand_over(self) -> None:
        if self._pending:
            self._batches.put(self._pending)
            self._pending = []

    # ---- in the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            over = False
            while len(batch) < _BATCH_MAX and not self._batches.empty():
                more = self._batches.get()
                if more is None:
                    over = True
                    break
                batch += more
            answers = self._answers([operation for operation, _ in batch])
            self._loop.call_soon_threadsafe(_resolve, batch, answers)
            if over:
                return

    def _answers(self, operations: Sequence[Operation], *, again: bool = False) -> list[Answer | Exception]:
        try:
            return self._patiently(operations, again=again) if operations else []
        except Exception as error:
            if len(operations) > 1 and _is_about_values(error):
                # One of them cannot be written: the others can.
                return [answer for operation in operations for answer in self._answers([operation])]
            if not isinstance(error, AgenticFlowError):
                log.exception("checkpoint_failed")
            return [error] * len(operations)

    def _patiently(self, operations: Sequence[Operation], *, again: bool) -> list[Answer | Exception]:
        give_up_at_s = time.monotonic() + self._patience_s
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                return list(write(self._database, operations, again=again))
            except Unavailable as error:
                if isinstance(error, StorageFull) and (rest := _without_accepts(operations)) != operations:
                    # Who asks for a run is told at once; what runs have done waits for room.
                    answers = iter(self._answers(rest, again=again))
                    return [error if isinstance(one, Accept) else next(answers) for one in operations]
                if (
                    _is_about_values(error)
                    or self._closing.is_set()
                    or time.monotonic() + pause_s > give_up_at_s
                ):
                    raise
                log.warning("checkpoint_tried_again", error=error.message)
            self._closing.wait(pause_s)
            again = True
            pause_s = min(pause_s * 2, _RETRY_MOST_S)


def _without_accepts(operations: Sequence[Operation]) -> Sequence[Operation]:
    rest = [operation for operation in operations if not isinstance(operation, Accept)]
    return operations if len(rest) == len(operations) else rest


def _is_about_values(error: Exception) -> bool:
    """Whether what was to be written is the cause, so that to try it again is of no use."""
    return type(error.__cause__ or error).__name__ in _VALUE_ERRORS


def _resolve(
    batch: Sequence[tuple[Operation, asyncio.Future[Answer]]], answers: Sequence[Answer | Exception]
) -> None:
    for (_, future), answer in zip(batch, answers, strict=True):
        if future.done():  # whoever waited has been cancelled
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def write(database: SqlDatabase, operations: Sequence[Operation], *, again: bool = False) -> list[Answer]:
    """Carry these out in one transaction, those that may be; an answer for each, in their order.

    Args:
        database: Where to.
        operations: What to write.
        again: An attempt before this one failed, perhaps only in its answer.

    Raises:
        Unavailable: the database cannot be used now; nothing was written.
        DataCorrupted: it is damaged.
    """
    answers: list[Answer] = [False] * len(operations)
    with database.transaction() as connection:
        accepts = [(o.row["workflow_id"], n) for n, o in enumerate(operations) if isinstance(o, Accept)]
        told: list[EventRow] = []
        for _, number in sorted(accepts):  # in one order everywhere, so that two processes cannot deadlock
            answers[number] = _accepted(connection, cast(Accept, operations[number]), again, told)
        new = {row[0] for row in told}
        if not database.is_sqlite and any(isinstance(o, Accept) and o.queued for o in operations):
            notify(connection)
        if len(accepts) < len(operations):
            _write_checkpoints(connection, operations, answers, database.for_update, told)
        append(connection, told, new=new, sqlite=database.is_sqlite, again=again)
    return answers


def _accepted(connection: Connection, accept: Accept, again: bool, told: list[EventRow]) -> bool:
    row = accept.row
    if connection.execute(_INSERT_WORKFLOW, row).rowcount == 1:
        of = (row["workflow_id"], row["workflow_id"])
        data: JsonObject | None = {"after": list(accept.after)} if accept.after else None
        told.append(event(*of, "accepted", row["accepted_at_s"], row["name"], data))
        if row["status"] == "running":
            told.append(event(*of, "started", row["accepted_at_s"], row["name"]))
        if accept.queued is not None:
            about = {key: row[key] for key in ("priority", "tenant", "name", "version")}
            about |= {"at_s": row["accepted_at_s"], "held": bool(accept.after)}
            enqueue(connection, row["workflow_id"], **about, **accept.queued)
        wait_for(connection, row["workflow_id"], accept.after, any_end=accept.any_end)
        return True
    if not again:
        return False
    # Ours already, when the answer to the first attempt got lost.
    found = execute(
        connection,
        "SELECT executor_id, accepted_at_s FROM af_workflows WHERE workflow_id = :id",
        id=row["workflow_id"],
    ).first()
    own = (row["executor_id"], row["accepted_at_s"])
    return found is not None and (str(found[0]), float(found[1])) == own


def _write_checkpoints(
    connection: Connection,
    operations: Sequence[Operation],
    answers: list[Answer],
    for_update: str,
    told: list[EventRow],
) -> None:
    checkpoints = [(n, o) for n, o in enumerate(operations) if isinstance(o, Checkpoint)]
    stored = _stored(connection, {i for _, o in checkpoints for i in (o.root_id, o.workflow_id)}, for_update)
    rows: dict[str, list[Bindings]] = {}
    for number, operation in checkpoints:
        answers[number] = permission = may_record(
            stored.get(operation.root_id),
            stored.get(operation.workflow_id),
            operation.fence,
            ending=operation.ending,
        )
        if permission != "granted":
            continue
        rows.setdefault(operation.statement, []).extend(operation.rows)
        if operation.artifacts:
            rows.setdefault(INSERT_ARTIFACT, []).extend(operation.artifacts)
        if operation.ending is None or stored[operation.workflow_id].status in UNFINISHED:
            told += operation.events  # of an end that is written twice, once
        if operation.ending is not None:  # for what comes after it in this transaction
            before = stored[operation.workflow_id]
            stored[operation.workflow_id] = StoredWorkflow(operation.ending, before.executor_id, before.epoch)
    # Steps before ends, children before what they might do.
    for statement in sorted(rows):
        every = rows[statement]
        connection.execute(statement, every if len(every) > 1 else every[0])


def _stored(connection: Connection, ids: set[str], for_update: str) -> dict[str, StoredWorkflow]:
    """These workflows, locked until the transaction ends."""
    columns = "SELECT workflow_id, status, executor_id, epoch FROM af_workflows WHERE workflow_id"
    if len(ids) == 1:
        (one,) = ids
        found = connection.execute(f"{columns} = :id{for_update}", {"id": one})
    else:
        # In one order everywhere, a root before its children, so that two processes cannot deadlock.
        found = connection.execute(f"{columns} IN :ids ORDER BY workflow_id{for_update}", {"ids": list(ids)})
    return {str(row[0]): StoredWorkflow(str(row[1]), str(row[2]), int(row[3])) for row in found}
