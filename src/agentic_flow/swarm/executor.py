"""What a process executes of its own: top-level workflows in their places, and every execution in them.

It knows nothing of other processes. What it may execute it is given (`enter`); what it could not go on with
it gives away (`on_abandoned`). How a replay works is told in `engine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn

import orjson
import structlog

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Cancelled,
    NeedsNewer,
    Unavailable,
    as_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import MessageRecord, Workflow, WorkflowRecord
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.checkpoints import Checkpoint, CheckpointWriter
from agentic_flow.swarm.dependencies import Dependencies
from agentic_flow.swarm.execution import (
    Child,
    Context,
    Execution,
    Run,
    StopReason,
    encoded,
    ended_record,
    internal,
    recorded_history,
)
from agentic_flow.swarm.heartbeat import unbroken
from agentic_flow.swarm.inbox import Inbox, Waiters, patiently, woken_before
from agentic_flow.swarm.leases import Leases, RunDatabase, root_of
from agentic_flow.swarm.pauses import Pauses
from agentic_flow.swarm.queues import RunQueues, late_error
from agentic_flow.swarm.reader import decoded_object
from agentic_flow.swarm.scheduling import Custody, Places

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

TEARDOWN_S = 30.0
"""So long steps may take to heed that they are interrupted."""


@dataclass(frozen=True, slots=True)
class RunStores:
    """The parts of one run database, over connections that are kept."""

    database: RunDatabase
    leases: Leases
    queues: RunQueues
    dependencies: Dependencies
    inbox: Inbox
    pauses: Pauses


class Executor:
    """See this module, and EngineOfExecution. Made and used on one event loop.

    Args:
        stores: The run database.
        writer: Writes what is recorded; it is closed by whoever made it.
        workflows: The workflows that this process knows.
        places_max: Top-level workflows at a time; more wait their turn.
        clock: Stamps what is stored.
        peer_patience_s: Longest time that a step waits for a neighbour of ours which is away.
        on_free: Called when a place may have become free.
        on_abandoned: Called with what cannot be gone on with here, and why.

    Attributes:
        runs: What is this process's to execute, by id.
        custody: What it holds, beside what the store says that it owns.
        waiters: Who waits for messages.
        places: Who works, and who waits for his turn.
        pauses_changed: Counts what callers have paused and let go on here.
        place_given_back: Set whenever a place is given back.
        is_open: Whether anything is begun.
    """

    def __init__(
        self,
        stores: RunStores,
        writer: CheckpointWriter,
        workflows: Mapping[str, Workflow],
        *,
        places_max: int,
        clock: Clock,
        peer_patience_s: float,
        on_free: Callable[[], None],
        on_abandoned: Callable[[Run, BaseException], None],
    ) -> None:
        self._stores = stores
        self._writer = writer
        self._workflows = workflows
        self.clock = clock
        self.peer_patience_s = peer_patience_s
        self._on_free = on_free
        self._on_abandoned = on_abandoned
        self.runs: dict[str, Run] = {}
        self.custody = Custody()
        self.waiters = Waiters()
        self.places: Places[Run] = Places(places_max)
        self.pauses_changed = 0
        self.place_given_back = asyncio.Event()
        self.is_open = True
        self._executions: dict[str, set[Execution]] = {}

    @property
    def working(self) -> int:
        """How many top-level workflows are at work."""
        return sum(run.has_place for run in self.runs.values())

    @property
    def not_begun(self) -> list[Run]:
        """What is stored as this process's and waits for its first place here."""
        return [
            run
            for run in self.runs.values()
            if run.is_accepted and not run.has_place and not self._executions.get(run.workflow_id)
        ]

    def stop_all(self) -> list[asyncio.Task[None]]:
        """Begin nothing more, and interrupt what is executed, without recording anything."""
        self.is_open = False
        return self._stop(self.all_executions(), "closing")

    def leave_all(self) -> None:
        """Nothing is this process's any more."""
        for run in list(self.runs.values()):
            self.leave(run, None)

    # ---- top-level workflows -------------------------------------------------------------------------------

    def enter(self, run: Run) -> None:
        """Execute it as soon as it has a place, unless it waits for other runs."""
        self.runs[run.workflow_id] = run
        if not run.is_held:
            self.places.ask(run)
            self._admit()

    def _admit(self) -> None:
        for admitted in self.places.admit():
            admitted.has_place = True
            if admitted.placed is None:
                self.begin_if_placed(admitted)
            else:
                admitted.placed.set()  # it is being executed: only who waits in it goes on
                admitted.placed = None

    def begin_if_placed(self, run: Run) -> None:
        """Begin it, now that something that it needed is there."""
        if run.has_place and run.is_accepted and self.is_open:
            self._execute(Execution(run, run.workflow_id, run.name, run.payload, is_new=run.is_new))

    def leave(self, run: Run, record: WorkflowRecord | None) -> None:
        """It is no longer ours to execute."""
        if self.runs.get(run.workflow_id) is run:
            del self.runs[run.workflow_id]
        if not run.ended.done():
            run.ended.set_result(record)
        run.has_place = False
        self._given_back(run)

    def _given_back(self, run: Run) -> None:
        self.places.give_back(run)
        if self.is_open:
            self._admit()
        self.place_given_back.set()
        self._on_free()

    async def left(self, workflow_id: str, reason: StopReason) -> None:
        """Wait for executions here that still clean up: their steps must not run twice at once."""
        if (before := self.runs.get(workflow_id)) is not None:
            self.stop_run(before, reason)
        old = self.stop_tree(workflow_id, reason)
        if old:
            await asyncio.wait(old, timeout=TEARDOWN_S)

    def stop_run(self, run: Run, reason: StopReason) -> None:
        """Interrupt a top-level workflow, whether it works or waits for its place."""
        self.stop_tree(run.workflow_id, reason)
        if not self._executions.get(run.workflow_id):
            self.leave(run, None)

    def set_paused(self, run: Run, paused: bool) -> None:
        """Hold it before its next steps, or let it go on."""
        if paused and run.unpaused is None:
            run.unpaused = asyncio.Event()
        elif not paused and run.unpaused is not None:
            run.unpaused.set()
            run.unpaused = None

    # ---- execution -----------------------------------------------------------------------------------------

    def write(self, operation: checkpoints.Operation) -> asyncio.Future[checkpoints.Answer]:
        """Have something written with the next transaction."""
        return self._writer.submit(operation)

    def _execute(self, execution: Execution) -> None:
        execution.task = asyncio.create_task(self._body(execution))
        self._executions.setdefault(execution.run.workflow_id, set()).add(execution)
        execution.task.add_done_callback(lambda _: self._executed(execution))

    def _executed(self, execution: Execution) -> None:
        run = execution.run
        executions = self._executions[run.workflow_id]
        executions.discard(execution)
        if not executions:
            del self._executions[run.workflow_id]
        elif run.waiting:
            self._rest(run)
        if execution.workflow_id == run.workflow_id:
            self.leave(run, execution.record)
        elif not execution.result.done() and execution.stopped == "cancelled":
            told = Cancelled(f"workflow {execution.workflow_id!r} was cancelled")
            execution.result.set_result({"error": as_problem(told)})
        if execution.task.cancelled() or (error := execution.task.exception()) is None:
            return
        # The store could not be used, or not be understood: let go, so that it is continued where it can.
        log.error("workflow_abandoned", workflow_id=execution.workflow_id, error=str(error))
        self.stop_run(run, "lost")
        self.custody.doubt()
        self._on_abandoned(run, error)

    async def _body(self, execution: Execution) -> None:
        """One execution of a workflow from its beginning to its recorded end."""
        run = execution.run
        is_top = execution.workflow_id == run.workflow_id
        if is_top and not run.starts_at_once:
            await self.record(
                execution, checkpoints.started(run.workflow_id, run.fence, run.name, self.clock.time_s())
            )
        output, problem = await self._outcome(execution)
        await self.drop_abandoned(execution)
        if execution.stopped is not None:
            raise asyncio.CancelledError  # whatever it returned, it returned because it was interrupted
        now_s = self.clock.time_s()
        status: Literal["completed", "failed"] = "completed" if problem is None else "failed"
        error = None if problem is None else orjson.dumps(problem).decode()
        run.is_ending = run.is_ending or is_top
        await self.record(
            execution,
            checkpoints.ended(
                run.workflow_id,
                execution.workflow_id,
                run.fence,
                execution.name,
                status,
                output,
                error,
                now_s,
            ),
        )
        if not is_top:
            execution.result.set_result({"error": problem} if output is None else decoded_object(output))
            return
        execution.record = ended_record(run, status, output, error, now_s)

    async def _outcome(self, execution: Execution) -> tuple[str | None, JsonObject | None]:
        """What our function returned, as JSON text, or the problem that it ended with."""
        name, output, failure = execution.name, None, None
        try:
            output = encoded(await self._call(execution))
        except asyncio.CancelledError as error:
            if execution.is_being_stopped:
                raise
            failure = internal(f"workflow {name!r}", error)
        except NeedsNewer:
            raise
        except AgenticFlowError as error:
            failure = error
        except Exception as error:
            if execution.unusable is None:
                log.exception("workflow_failed", workflow_id=execution.workflow_id, workflow=name)
            failure = internal(f"workflow {name!r}", error)
        if execution.unusable is not None:
            raise execution.unusable  # whatever it made of it
        if execution.broken is not None:
            failure = execution.broken
        return (output, None) if failure is None else (None, as_problem(failure))

    async def _call(self, execution: Execution) -> JsonObject:
        workflow = self._workflows.get(execution.name)
        if workflow is None:
            raise NeedsNewer(
                f"workflow {execution.workflow_id!r} needs {execution.name!r}, which is not known here",
                hint="run it with the version that started it",
            )
        payload = decoded_object(execution.payload)
        if execution.is_new and self._begins_too_late(execution):
            raise late_error()
        if not execution.is_new:
            try:
                execution.history = await asyncio.to_thread(
                    recorded_history, self._stores.database, execution
                )
            except Unavailable as error:
                execution.unusable = error
                raise
        return await workflow(Context(self, execution), payload)

    def _begins_too_late(self, execution: Execution) -> bool:
        run = execution.run
        is_top = execution.workflow_id == run.workflow_id
        return is_top and run.deadline_s is not None and self.clock.time_s() >= run.deadline_s

    async def record(self, execution: Execution, checkpoint: Checkpoint) -> None:
        """See EngineOfExecution."""
        try:
            answer = await self.write(checkpoint)
        except AgenticFlowError as error:
            execution.unusable = error
            raise
        if answer != "granted":
            self._give_up(execution, "cancelled" if answer == "cancelled" else "lost")

    def start_children(self, execution: Execution, children: Sequence[Child]) -> dict[str, Execution]:
        """See EngineOfExecution."""
        started: dict[str, Execution] = {}
        for child in children:
            below = Execution(
                execution.run, child.workflow_id, child.name, child.payload, is_new=child.status == "new"
            )
            self._execute(below)
            started[child.workflow_id] = below
        return started

    async def drop_abandoned(self, execution: Execution) -> None:
        """See EngineOfExecution.

        Only now, not when it was interrupted: from inside, an end of the process looks like a timeout of the
        workflow. Refused when the tree has changed hands.
        """
        while execution.abandoned and execution.stopped is None:
            child_id = execution.abandoned.pop()
            cancelling = asyncio.to_thread(self._stores.leases.cancel, child_id, only_as=execution.run.fence)
            try:
                was_running = await unbroken(cancelling)
            except Unavailable as error:
                execution.unusable = error
                raise
            if was_running:
                self.stop_tree(child_id, "cancelled")

    async def message(
        self, execution: Execution, topic: str, known: Collection[str], until_s: float | None
    ) -> MessageRecord | None:
        """See EngineOfExecution. Meanwhile the tree needs no place, if nothing else of it works."""
        run = execution.run
        until_here_s = until_s
        while True:
            found = await self._message_before(execution, topic, known, until_here_s)
            await self._take_place(run)
            if found is not None or until_s is None:
                return found
            # Whether time is over, the store's clock says, as it does to whoever sends.
            found, left_s = await patiently(self._stores.inbox.last, run.workflow_id, topic, known, until_s)
            if found is not None or left_s <= 0:
                return found
            until_here_s = self.clock.time_s() + left_s

    async def _message_before(
        self, execution: Execution, topic: str, known: Collection[str], until_s: float | None
    ) -> MessageRecord | None:
        run_id, inbox = execution.run.workflow_id, self._stores.inbox
        with self.waiters.waiting(run_id) as woken:
            found = await patiently(inbox.oldest, run_id, topic, known)
            if found is None:
                with self._idle(execution):
                    while found is None and await woken_before(woken, until_s, self.clock):
                        found = await patiently(inbox.oldest, run_id, topic, known)
        return found

    async def go_on(self, execution: Execution) -> None:
        """See EngineOfExecution. While it is paused the tree needs no place, if nothing of it still works."""
        run = execution.run
        while (unpaused := run.unpaused) is not None or not run.has_place:
            if unpaused is None:
                await self._take_place(run)
                continue
            with self._idle(execution):
                await unpaused.wait()

    def _give_up(self, execution: Execution, reason: StopReason) -> NoReturn:
        if execution.stopped is None:
            if reason == "cancelled":
                self.stop_tree(execution.workflow_id, "cancelled")
            else:
                log.warning("workflow_lost", workflow_id=execution.workflow_id)
                self.stop_tree(execution.run.workflow_id, "lost")
        raise asyncio.CancelledError

    def _rest(self, run: Run) -> None:
        """Give the tree's place back if all of it waits: for messages, or for children that do."""
        if run.has_place and all(e.is_idle for e in self._executions.get(run.workflow_id, ())):
            run.has_place = False
            self._given_back(run)

    @contextmanager
    def _idle(self, execution: Execution) -> Generator[None]:
        execution.is_waiting = True
        execution.run.waiting += 1
        try:
            self._rest(execution.run)
            yield
        finally:
            execution.is_waiting = False
            execution.run.waiting -= 1

    async def _take_place(self, run: Run) -> None:
        while not run.has_place:
            if run.placed is None:
                run.placed = placed = asyncio.Event()
                self.places.ask(run, returns=True)
                self._admit()
            else:
                placed = run.placed
            await placed.wait()

    def all_executions(self) -> list[Execution]:
        """Of every workflow and child here."""
        return [execution for each in self._executions.values() for execution in each]

    def stop_tree(self, workflow_id: str, reason: StopReason) -> list[asyncio.Task[None]]:
        """Interrupt the executions here of a workflow and everything below it; nothing of it is recorded."""
        below = f"{workflow_id}."
        return self._stop(
            [
                e
                for e in self._executions.get(root_of(workflow_id), ())
                if e.workflow_id == workflow_id or e.workflow_id.startswith(below)
            ],
            reason,
        )

    def _stop(self, executions: Collection[Execution], reason: StopReason) -> list[asyncio.Task[None]]:
        for execution in executions:
            if execution.stopped is None:
                execution.stopped = reason
                execution.task.cancel()
        return [execution.task for execution in executions]
