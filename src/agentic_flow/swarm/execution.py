"""One execution of a workflow: its numbered steps and children, replayed or recorded.

See `engine` for how a replay works. Everything that an execution asks of its engine is `EngineOfExecution`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import orjson
import structlog

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    NeedsNewer,
    StorageFull,
    Unavailable,
    as_problem,
    from_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import EventKind, MessageRecord, StepContext, StepFunction, WorkflowRecord
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.artifact_rows import artifact_row
from agentic_flow.swarm.event_log import event
from agentic_flow.swarm.leases import VERSION, Claim
from agentic_flow.swarm.questions import ANSWER, QUESTION, RECEIPT, check_question
from agentic_flow.swarm.reader import decoded_object, record_of
from agentic_flow.swarm.scheduling import Fence

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_PEER_PAUSE_S = 0.5
_PEER_PAUSE_MAX_S = 5.0

StopReason = Literal["closing", "cancelled", "lost"]


@dataclass(eq=False, slots=True)
class Run:
    """A top-level workflow that is this process's to execute.

    `waiting` executions of its tree wait for messages. When nothing of it works it gives its place back, and
    whoever wakes asks for it again: `placed` is set once it has one. `unpaused` is there while it is paused.
    """

    workflow_id: str
    name: str
    tenant: str
    priority: int
    payload: str
    fence: Fence
    accepted_at_s: float
    is_new: bool
    is_accepted: bool = False
    has_place: bool = False
    waiting: int = 0
    placed: asyncio.Event | None = None
    unpaused: asyncio.Event | None = None
    starts_at_once: bool = False
    is_ending: bool = False
    is_held: bool = False
    deadline_s: float | None = None
    queue: str | None = None
    ended: asyncio.Future[WorkflowRecord | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(frozen=True, slots=True)
class Child:
    """A child as it is stored, or (`status` is `new`) about to be."""

    workflow_id: str
    parent_step: int | None
    name: str
    payload: str
    status: str
    output: str | None = None
    error: str | None = None


@dataclass(slots=True)
class History:
    """What is recorded of a workflow: steps by number (name, output, error), children by id."""

    steps: dict[int, tuple[str, str | None, str | None]] = field(
        default_factory=dict[int, tuple[str, str | None, str | None]]
    )
    children: dict[str, Child] = field(default_factory=dict[str, Child])


@dataclass(eq=False, slots=True)
class Execution:
    """One execution of a workflow in this process.

    `broken` is set when a replay took another path, `unusable` when the store could not be read or written,
    `abandoned` are children it no longer waits for, `below` results of children that it does wait for.
    """

    run: Run
    workflow_id: str
    name: str
    payload: str
    is_new: bool
    history: History = field(default_factory=History)
    stopped: StopReason | None = None
    broken: AgenticFlowError | None = None
    unusable: AgenticFlowError | None = None
    abandoned: list[str] = field(default_factory=list[str])
    below: Sequence[asyncio.Future[JsonObject]] = ()
    is_waiting: bool = False
    record: WorkflowRecord | None = None
    result: asyncio.Future[JsonObject] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    task: asyncio.Task[None] = field(init=False)

    @property
    def is_being_stopped(self) -> bool:
        """Whether a CancelledError comes from outside, not from a library inside that raised one."""
        return self.stopped is not None or self.task.cancelling() > 0

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a message, for children or for the end of a pause: not for work of its own."""
        return self.is_waiting or any(not result.done() for result in self.below)


class EngineOfExecution(Protocol):
    """What an execution needs of its engine."""

    clock: Clock
    peer_patience_s: float

    async def record(self, execution: Execution, checkpoint: checkpoints.Checkpoint) -> None:
        """Return when it is on disk.

        Raises:
            CancelledError: it was refused: the workflow is not ours any more, or is cancelled.
            AgenticFlowError: the store cannot be written to.
        """
        ...

    def start_children(self, execution: Execution, children: Sequence[Child]) -> dict[str, Execution]:
        """Execute these, new or interrupted, beside each other."""
        ...

    async def drop_abandoned(self, execution: Execution) -> None:
        """Cancel the children that this workflow gave up on and went on without."""
        ...

    async def go_on(self, execution: Execution) -> None:
        """Return when the execution's tree is not paused and has a place, if it gave its own back."""
        ...

    async def message(
        self, execution: Execution, topic: str, known: Collection[str], until_s: float | None
    ) -> MessageRecord | None:
        """The oldest message whose key is none of `known`, once there is one, or None when time is over."""
        ...


class Context:
    """WorkflowContext of one execution."""

    def __init__(self, engine: EngineOfExecution, execution: Execution) -> None:
        self._engine = engine
        self._execution = execution
        self._busy: str | None = None
        self._index = 0
        self._received: dict[str, set[str]] = {}
        self._child_keys: set[str] = set()

    @property
    def workflow_id(self) -> str:
        return self._execution.workflow_id

    async def step(self, name: str, function: StepFunction) -> JsonObject:
        """See WorkflowContext. One at a time: steps are numbered by the order in which they start."""
        await self._begin(name, f"step {name!r}")
        try:
            return await self._step(name, function)
        finally:
            self._busy = None

    async def _begin(self, name: str, what: str) -> None:
        assert self._busy is None, f"{what} of {self.workflow_id!r} while {self._busy!r} is not done"
        self._busy = name
        execution = self._execution
        try:
            if execution.stopped is not None:
                raise asyncio.CancelledError
            if execution.broken is not None:
                raise execution.broken
            if execution.unusable is not None:
                # A workflow may catch it and go on. What it then did would stand in the place of what is not
                # recorded, and whoever continues the run would come to another path.
                raise execution.unusable
            await self._engine.drop_abandoned(execution)
            if not execution.run.has_place or execution.run.unpaused is not None:
                await self._engine.go_on(execution)
        except BaseException:
            self._busy = None
            raise

    async def receive(
        self, topic: str, *, timeout_s: float | None = None, default: JsonObject | None = None
    ) -> JsonObject:
        """See WorkflowContext. Two steps: `wait:TOPIC` has the deadline, `receive:TOPIC` the message."""
        await self._begin(topic, f"topic {topic!r}")
        try:

            async def begin(step: StepContext) -> JsonObject:
                return {"until_s": None if timeout_s is None else self._engine.clock.time_s() + timeout_s}

            until_s = (await self._step(f"wait:{topic}", begin))["until_s"]
            return (await self._receive(topic, until_s, default))["payload"]
        finally:
            self._busy = None

    async def ask(
        self,
        question: str,
        *,
        options: Sequence[str] = (),
        timeout_s: float | None = None,
        default: str | None = None,
        scope: str | None = None,
    ) -> JsonObject:
        """See WorkflowContext. Two steps: `question:ID`, and the receipt of a message `answer:ID`."""
        check_question(question, options, default)
        await self._begin(question, f"question {question!r}")
        try:
            _, _, below = self.workflow_id.partition(".")
            question_id = f"{below}.q{self._index + 1}" if below else f"q{self._index + 1}"

            async def begin(step: StepContext) -> JsonObject:
                until_s = None if timeout_s is None else self._engine.clock.time_s() + timeout_s
                asked: JsonObject = {"id": question_id, "text": question, "options": list(options)}
                needed: JsonObject = {} if scope is None else {"scope": scope}
                return asked | {"default": default, "until_s": until_s} | needed

            asked = await self._step(f"{QUESTION}{question_id}", begin, told_as="question")
            instead: JsonObject | None = None if default is None else {"answer": default}
            received = await self._receive(f"{ANSWER}{question_id}", asked["until_s"], instead)
            answer = received["payload"]["answer"]
            return {"answer": answer, "by": received["sender"], "timed_out": received["key"] is None}
        finally:
            self._busy = None

    async def _receive(self, topic: str, until_s: float | None, default: JsonObject | None) -> JsonObject:
        known = self._received.setdefault(topic, set())

        async def take(step: StepContext) -> JsonObject:
            found = await self._engine.message(self._execution, topic, known, until_s)
            if found is not None:
                return {"key": found.key, "payload": found.payload, "sender": found.sender}
            if default is None:
                raise DeadlineExceeded(
                    f"no message of topic {topic!r} came to workflow {self.workflow_id!r} in time",
                    hint="send it earlier, wait longer, or give a default",
                )
            return {"key": None, "payload": default, "sender": None}

        received = await self._step(f"{RECEIPT}{topic}", take)
        if received["key"] is not None:
            known.add(received["key"])
        return received

    async def _step(
        self, name: str, function: StepFunction, *, told_as: EventKind | None = None
    ) -> JsonObject:
        execution = self._execution
        self._index += 1
        index = self._index
        recorded = execution.history.steps.get(index)
        if recorded is not None:
            return self._replayed(index, name, recorded)
        self._check_no_child(index, 1, f"step {name!r}")
        started_at_s = self._engine.clock.time_s()
        while True:
            context = StepContext(f"{execution.workflow_id}:{index}")
            output, error = await self._call(name, context, function)
            if not await self._waited_for_peer(name, error, started_at_s):
                break
        row: checkpoints.Bindings = {
            "workflow_id": execution.workflow_id,
            "step_index": index,
            "name": name,
            "output": output,
            "error": None if error is None else orjson.dumps(as_problem(error)).decode(),
            "started_at_s": started_at_s,
            "completed_at_s": self._engine.clock.time_s(),
        }
        run = execution.run
        of = (run.workflow_id, execution.workflow_id)
        also = [event(*of, told_as, row["completed_at_s"], name, output)] if told_as is not None else []
        artifacts = {one.name: one for one in context.artifacts if error is None}
        left = [artifact_row(run.workflow_id, row, one) for one in artifacts.values()]
        checkpoint = checkpoints.recorded_step(*of, run.fence, row, also=also, artifacts=left)
        await self._engine.record(execution, checkpoint)
        if error is not None:
            raise error
        # Live and replayed results are the same JSON: a tuple is a list on the first run already.
        return orjson.loads(cast(str, output))

    def _replayed(self, index: int, name: str, recorded: tuple[str, str | None, str | None]) -> JsonObject:
        recorded_name, output, error = recorded
        if recorded_name != name:
            raise self._broken(f"step {index} was {recorded_name!r} and is {name!r} now")
        if error is not None:
            raise from_problem(decoded_object(error))
        return decoded_object(output or "null")

    async def _call(
        self, name: str, context: StepContext, function: StepFunction
    ) -> tuple[str | None, AgenticFlowError | None]:
        execution = self._execution
        try:
            return encoded(await function(context)), None
        except asyncio.CancelledError as error:
            if execution.is_being_stopped:
                raise
            return None, internal(f"step {name!r}", error)
        except Exception as error:
            if execution.is_being_stopped:
                # Whatever it says, it says it because it was interrupted: that is no result.
                raise asyncio.CancelledError from error
            if isinstance(error, NeedsNewer):
                # A neighbour's answer. Recorded as it is, it would later look like a record of this run.
                return None, Conflict(error.message, hint=error.hint, details=error.details)
            if isinstance(error, AgenticFlowError):
                return None, error
            log.exception("step_failed", workflow_id=execution.workflow_id, step=name)
            return None, internal(f"step {name!r}", error)

    async def _waited_for_peer(self, name: str, error: AgenticFlowError | None, since_s: float) -> bool:
        """Whether the step is to be tried again, after a pause: a neighbour of ours was away, or a disk full.

        What a service that is replaced, or a network that is cut, keeps from a run is no result of its step.
        """
        if not isinstance(error, Unavailable) or not (error.peer or isinstance(error, StorageFull)):
            return False
        waited_s = self._engine.clock.time_s() - since_s
        pause_s = min(_PEER_PAUSE_MAX_S, max(_PEER_PAUSE_S, waited_s / 4)) * random.uniform(0.75, 1.25)
        if waited_s + pause_s > self._engine.peer_patience_s:
            return False
        log.warning(
            "step_waits",
            workflow_id=self.workflow_id,
            step=name,
            peer=error.peer,
            waited_s=round(waited_s, 1),
            error=error.message,
        )
        await self._engine.clock.sleep(pause_s)
        return True

    async def children(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
        """See WorkflowContext. When the parent gives up on them or fails, its children are cancelled."""
        assert not any("." in key for key in payloads), list(payloads)
        if again := sorted(self._child_keys & payloads.keys()):
            raise InvalidInput(
                f"workflow {self.workflow_id!r} has had children with the keys {again!r} already",
                hint="a child's key is its id: use another key each time, such as one with a number",
            )
        self._child_keys |= payloads.keys()
        await self._begin(name, f"children {name!r}")
        try:
            return await self._children(name, payloads)
        finally:
            self._busy = None

    async def _children(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
        wanted = self._numbered(name, payloads)
        unfinished = [c for c in wanted.values() if c.status not in ("completed", "failed", "cancelled")]
        new = [child for child in unfinished if child.status == "new"]
        executions: dict[str, Execution] = {}
        left = {child.workflow_id for child in unfinished}
        try:
            if new:
                await self._store(new)
            executions = self._engine.start_children(self._execution, unfinished)
            if executions:
                self._execution.below = [execution.result for execution in executions.values()]
                await asyncio.wait(self._execution.below)
        finally:
            self._execution.below = ()
            left -= {i for i, execution in executions.items() if execution.result.done()}
            self._execution.abandoned.extend(sorted(left))
        return {
            key: executions[child.workflow_id].result.result()
            if child.workflow_id in executions
            else _stored_result(child)
            for key, child in wanted.items()
        }

    def _numbered(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, Child]:
        """The children to have, stored or new. Each takes two numbers, as it always has: start and result."""
        first = self._index + 1
        self._index += 2 * len(payloads)
        history = self._execution.history
        wanted: dict[str, Child] = {}
        for number, (key, payload) in enumerate(payloads.items(), first):
            child_id = f"{self.workflow_id}.{key}"
            stored = history.children.get(child_id)
            if stored is None:
                stored = Child(child_id, number, name, encoded(payload), "new")
            elif stored.parent_step != number or stored.name != name:
                raise self._broken(
                    f"child {child_id!r} was {stored.name!r} at number {stored.parent_step}, "
                    f"is {name!r} at {number} now"
                )
            wanted[key] = stored
        for number in range(first, self._index + 1):
            if number in history.steps:
                raise self._broken(f"step {history.steps[number][0]!r} was recorded where children are now")
        asked = {child.workflow_id for child in wanted.values()}
        self._check_no_child(first, 2 * len(payloads), f"children {sorted(asked)!r}", besides=asked)
        return wanted

    async def _store(self, children: Sequence[Child]) -> None:
        execution = self._execution
        run = execution.run
        now_s = self._engine.clock.time_s()
        rows = [
            _new_row(
                workflow_id=child.workflow_id,
                root_id=run.workflow_id,
                parent_id=execution.workflow_id,
                parent_step=child.parent_step,
                name=child.name,
                tenant=run.tenant,
                priority=run.priority,
                status="running",
                executor_id="",
                payload=child.payload,
                accepted_at_s=now_s,
                started_at_s=now_s,
            )
            for child in children
        ]
        await self._engine.record(
            execution, checkpoints.new_children(run.workflow_id, execution.workflow_id, run.fence, rows)
        )

    def _check_no_child(self, first: int, count: int, what: str, *, besides: Collection[str] = ()) -> None:
        for child in self._execution.history.children.values():
            number = child.parent_step
            if number is not None and first <= number < first + count and child.workflow_id not in besides:
                raise self._broken(f"child {child.workflow_id!r} was recorded where {what} is now")

    def _broken(self, what: str) -> AgenticFlowError:
        self._execution.broken = Conflict(
            f"workflow {self.workflow_id!r} took another path than the one recorded: {what}",
            hint="its code has changed since it was started; start it anew",
        )
        return self._execution.broken


def recorded_history(database: SqlDatabase, execution: Execution) -> History:
    """What is recorded of an execution that is not the first."""
    steps = database.rows(
        "SELECT step_index, name, output, error FROM af_steps WHERE workflow_id = :id",
        id=execution.workflow_id,
    )
    children = database.rows(
        "SELECT workflow_id, parent_step, name, payload, status, output, error FROM af_workflows "
        "WHERE root_id = :root AND parent_id IS NOT NULL AND parent_id = :id",
        root=execution.run.workflow_id,
        id=execution.workflow_id,
    )
    return History(
        {int(row[0]): (str(row[1]), row[2], row[3]) for row in steps},
        {str(row[0]): Child(*row) for row in children},
    )


def _stored_result(child: Child) -> JsonObject:
    if child.status == "completed":
        return decoded_object(child.output or "null")
    if child.status == "failed":
        return {"error": decoded_object(child.error or "null")}
    return {"error": as_problem(Cancelled(f"workflow {child.workflow_id!r} was cancelled"))}


def run_of(claim: Claim, *, is_new: bool) -> Run:
    """What a claim is to be executed as."""
    run = Run(
        claim.workflow_id,
        claim.name,
        claim.tenant,
        claim.priority,
        claim.payload,
        claim.fence,
        claim.accepted_at_s,
        is_new=is_new,
    )
    run.is_accepted = True
    run.deadline_s, run.queue = claim.deadline_s, claim.queue
    return run


def ended_record(
    run: Run, status: Literal["completed", "failed"], output: str | None, error: str | None, now_s: float
) -> WorkflowRecord:
    """What the store says of a run that has just ended."""
    return record_of(
        run.workflow_id,
        name=run.name,
        tenant=run.tenant,
        state=status,
        payload=run.payload,
        output=output,
        error=error,
        accepted_at_s=run.accepted_at_s,
        updated_at_s=now_s,
        owner=run.fence.executor_id,
        priority=run.priority,
        deadline_s=run.deadline_s if run.queue is not None else None,
        queue=run.queue,
    )


def row_of(run: Run) -> checkpoints.Bindings:
    return _new_row(
        workflow_id=run.workflow_id,
        root_id=run.workflow_id,
        parent_id=None,
        parent_step=None,
        name=run.name,
        tenant=run.tenant,
        priority=run.priority,
        status="running" if run.starts_at_once else "queued",
        executor_id=run.fence.executor_id,
        payload=run.payload,
        accepted_at_s=run.accepted_at_s,
        started_at_s=run.accepted_at_s if run.starts_at_once else None,
    )


def _new_row(**values: Any) -> checkpoints.Bindings:
    return {"version": VERSION, "epoch": 1, **values}


def encoded(value: JsonObject) -> str:
    return orjson.dumps(value).decode()


def internal(what: str, error: BaseException) -> AgenticFlowError:
    return AgenticFlowError(
        f"{what} failed unexpectedly: {type(error).__name__}: {error}",
        hint="this is a bug of agentic-flow; the log has the traceback",
    )
