"""RunEngine on DBOS: durable workflows on SQLite or Postgres.

What DBOS gives: checkpoints of steps, replay, the fence that refuses a checkpoint of an execution that no
longer owns its workflow. What is ours: who owns a workflow and whether the owner lives (`leases`), prompt
take-over, JSON instead of pickle, and execution on the event loop of the process that opened the engine.

DBOS is one per process, so one engine can be open per process. All workflows run through one registered DBOS
workflow, `_entry`, which looks up our function by name; nothing of ours is pickled or registered with DBOS.
It is imported and launched when there is a workflow to execute: a process that only answers model calls has
neither its modules in memory nor its threads, and looks for orphans with plain SQL.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import orjson
import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    Unavailable,
    as_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunState, StepContext, StepFunction, StepRecord, Workflow, WorkflowRecord
from agentic_flow.swarm.dbos_library import (
    Encoded,
    Library,
    check_unused,
    child_cancelled_error,
    encode,
    internal,
)
from agentic_flow.swarm.leases import (
    Claim,
    Leases,
    RunDatabase,
    RunReader,
    decoded,
    root_of,
)

T = TypeVar("T")
log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})
_WAIT_FIRST_S, _WAIT_MOST_S = 0.01, 0.25
_WATCH_S = 0.5
_CHILD_POLL_S = 0.1
_ACCEPT_ATTEMPTS, _ACCEPT_PAUSE_S = 20, 0.05
_TEARDOWN_S = 30.0

StopReason = Literal["closing", "cancelled", "lost"]

_open_engine: DbosRunEngine | None = None


class DbosRunEngine:
    """See RunEngine.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        lease_s: A process silent for this long has lost its workflows.
        runs_parallel_max: Top-level workflows of this process at a time; more wait their turn, durably.
        clock: Stamps heartbeats on SQLite.
    """

    def __init__(
        self,
        database_url: str | None,
        data_dir: Path,
        *,
        lease_s: float,
        runs_parallel_max: int,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._database = RunDatabase(database_url, data_dir)
        self._leases = Leases(self._database, lease_s=lease_s, clock=clock)
        self._open_reader = RunReader.on(self._database, self._leases)
        self._closed_reader = RunReader(database_url, data_dir, lease_s=lease_s, clock=clock)
        self._library = Library(_entry)
        self._lease_s = lease_s
        self._runs_parallel_max = runs_parallel_max
        self._workflows: dict[str, Workflow] = {}
        self._is_open = False
        self._reset()

    def _reset(self) -> None:
        self._executor_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._places = _Places(self._runs_parallel_max)
        self._executions: set[_Execution] = set()
        self._epochs: dict[str, int] = {}
        self._done: dict[str, asyncio.Event] = {}
        self._accepting: dict[str, asyncio.Task[bool]] = {}
        self._unaccounted: set[str] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._launch: asyncio.Task[None] | None = None
        self._heartbeat: _Heartbeat | None = None
        self._present = ExitStack()

    # ---- life --------------------------------------------------------------------------------------------

    def register(self, name: str, workflow: Workflow) -> None:
        """See RunEngine."""
        assert name not in self._workflows, name
        self._workflows[name] = workflow

    @asynccontextmanager
    async def open(self, *, takeover: bool = False) -> AsyncGenerator[None]:
        """See RunEngine. It can be opened again after it was closed.

        Raises:
            Conflict: another engine, or another use of DBOS, is alive in this process.
            Unavailable: the database cannot be reached.
            DataCorrupted: the database file is damaged.
        """
        global _open_engine
        if _open_engine is not None:
            raise Conflict("a run engine is already open in this process", hint="close it first, or share it")
        check_unused()
        _open_engine = self
        self._reset()
        try:
            try:
                await _unbroken(asyncio.to_thread(self._prepare))
                self._is_open = True
                if takeover:
                    self._keepers.append(self._keep(self._lease_s / 2, self._take_orphans))
                yield
            finally:
                await _unbroken(self._close())
        finally:
            _open_engine = None
            self._database.close()

    def _prepare(self) -> None:
        """What is wrong with the database is said now, not when the first workflow comes."""
        self._database.create()
        self._leases.forget_the_dead()

    async def _launched(self) -> None:
        """Be one of those that execute workflows: present, beating, with DBOS at work.

        Whoever needs it first waits for it, and whoever comes meanwhile waits with them; the event loop goes
        on. A launch that fails is tried again by the next.
        """
        self._check_open()
        if self._launch is None:
            self._launch = asyncio.create_task(self._launch_all())
            self._launch.add_done_callback(self._launch_ended)
        await asyncio.shield(self._launch)

    def _launch_ended(self, launch: asyncio.Task[None]) -> None:
        # Looked at here as well: all who waited may have gone.
        if launch.cancelled() or launch.exception() is not None:
            self._launch = None

    async def _launch_all(self) -> None:
        try:
            await asyncio.to_thread(self._launch_library)
            self._library.adopt_running_loop()
        except BaseException:
            await asyncio.to_thread(self._withdraw)
            raise
        self._keepers.append(self._keep(_WATCH_S, self._watch))

    def _launch_library(self) -> None:
        self._present.enter_context(self._leases.presence(self._executor_id))
        self._heartbeat = _Heartbeat(self._leases, self._executor_id, self._lease_s / 4)
        self._heartbeat.start()  # before DBOS, whose launch on a slow disk can outlast a short lease
        self._library.launch(self._database, self._executor_id)

    def _withdraw(self) -> None:
        """Others may have what was ours."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._heartbeat.has_begun:
                try:
                    self._leases.leave(self._executor_id)
                except AgenticFlowError as error:  # others then wait for the lease to run out
                    log.warning("leave_failed", error=error.message)
            self._heartbeat = None
        self._present.close()

    async def _close(self) -> None:
        """Let go without recording anything: what was in flight runs again wherever it is resumed."""
        self._is_open = False
        if self._launch is not None:
            await asyncio.wait([self._launch])
        accepting = list(self._accepting.values())
        await asyncio.gather(*accepting, return_exceptions=True)
        for keeper in self._keepers:
            keeper.cancel()
        tasks = {*self._keepers, *self._stop(self._executions, "closing"), *self._library.cancel_tasks()}
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_TEARDOWN_S)
            if left:
                log.warning("steps_ignore_cancellation", count=len(left))
        if self._launch is None:
            return
        # DBOS put its own thread pool under this event loop and now shuts it down.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="agentic-flow"))
        await asyncio.to_thread(self._library.destroy)
        await asyncio.to_thread(self._withdraw)

    # ---- what runs beside the workflows ------------------------------------------------------------------

    def _keep(self, interval_s: float, action: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._repeat(interval_s, action))

    async def _repeat(self, interval_s: float, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await action()
            except AgenticFlowError as error:
                log.warning("engine_upkeep_failed", action=action.__name__, error=error.message)
            except Exception:  # the next round must come, whatever happened in this one
                log.exception("engine_upkeep_failed", action=action.__name__)
            await asyncio.sleep(interval_s)

    async def _watch(self) -> None:
        """Notice what others did to our workflows: cancelled them, or took them over while we were silent."""
        here = {execution.workflow_id for execution in self._executions}
        owned = await asyncio.to_thread(self._leases.owned, self._executor_id)
        if here:
            statuses = await asyncio.to_thread(self._leases.statuses, here)
            for workflow_id in here:
                if statuses.get(workflow_id) == "CANCELLED":
                    self._stop_tree(workflow_id, "cancelled")
                elif workflow_id not in statuses:  # erased with its tenant
                    self._stop_tree(workflow_id, "lost")
                # A root that has just ended is not among the unfinished either.
                elif root_of(workflow_id) not in owned and statuses.get(workflow_id) == "PENDING":
                    await self._check_lost(workflow_id)
        await self._release_unaccounted(owned)

    async def _check_lost(self, workflow_id: str) -> None:
        record = await asyncio.to_thread(self._reader.get, root_of(workflow_id))
        if record is not None and record.owner != self._executor_id:
            self._stop_tree(root_of(workflow_id), "lost")

    async def _release_unaccounted(self, owned: set[str]) -> None:
        """Let go of what is ours and unfinished but executed by nobody (its outcome could not be written)."""
        idle = (
            owned
            - {root_of(e.workflow_id) for e in self._executions}
            - set(self._done)
            - set(self._accepting)
        )
        for workflow_id in idle & self._unaccounted:
            log.error("workflow_abandoned", workflow_id=workflow_id)
            await asyncio.to_thread(self._leases.release, workflow_id, self._executor_id)
        self._unaccounted = idle - self._unaccounted

    async def _take_orphans(self) -> None:
        for workflow_id in await self.resume_interrupted():
            log.info("workflow_taken_over", workflow_id=workflow_id)

    # ---- callers -----------------------------------------------------------------------------------------

    async def start(self, name: str, workflow_id: str, payload: JsonObject, *, tenant: str) -> bool:
        """See RunEngine. A caller that is cancelled meanwhile leaves the workflow whole: accepted or not.

        Raises:
            Unavailable: another process is accepting the same id at this moment.
        """
        await self._launched()
        self._check_open()
        assert name in self._workflows, name
        assert "." not in workflow_id, workflow_id
        normal = _normal(payload)  # what a replay will see
        while (other := self._accepting.get(workflow_id)) is not None:
            await asyncio.wait([other])
        task = asyncio.create_task(self._accept(name, workflow_id, normal, tenant))
        self._accepting[workflow_id] = task
        task.add_done_callback(lambda _: self._accepting.pop(workflow_id, None))
        return await asyncio.shield(task)

    async def _accept(self, name: str, workflow_id: str, payload: JsonObject, tenant: str) -> bool:
        for _ in range(_ACCEPT_ATTEMPTS):
            taken = await asyncio.to_thread(
                self._leases.take_new, workflow_id, self._executor_id, tenant, name
            )
            if taken is not None:
                break
            await asyncio.sleep(_ACCEPT_PAUSE_S)
        else:
            raise Unavailable(f"workflow {workflow_id!r} is being accepted elsewhere", hint="try again")
        if not taken:
            return False
        self._enter(workflow_id, 1)
        try:
            await self._library.start(workflow_id, name, payload)
        except BaseException:
            self._leave(workflow_id)
            raise
        return True

    async def wait(self, workflow_id: str) -> WorkflowRecord:
        """See RunEngine.

        Raises:
            Unavailable: the workflow is not in the run database.
        """
        pause_s = _WAIT_FIRST_S
        while True:
            record = await self.get(workflow_id)
            if record is None:
                raise Unavailable(
                    f"workflow {workflow_id!r} is not in the run database",
                    hint="list what is there with `agentic-flow runs list`",
                )
            if record.state in _ENDED:
                return record
            done = self._done.get(workflow_id)
            if done is None:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, _WAIT_MOST_S)
            else:
                waiter = asyncio.ensure_future(done.wait())
                await asyncio.wait([waiter], timeout=_WAIT_MOST_S)
                waiter.cancel()

    async def get(self, workflow_id: str) -> WorkflowRecord | None:
        """See RunEngine. Works without `open` as well, like all that only reads."""
        return await asyncio.to_thread(self._reader.get, workflow_id)

    async def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[WorkflowRecord]:
        """See RunEngine."""
        return await asyncio.to_thread(
            self._reader.list_workflows, tenant, name=name, states=states, limit=limit
        )

    async def steps(self, workflow_id: str) -> list[StepRecord]:
        """See RunEngine."""
        return await asyncio.to_thread(self._reader.steps, workflow_id)

    async def resume(self, workflow_id: str) -> bool:
        """See RunEngine.

        Raises:
            Conflict: the workflow was stored by another version, or is one that this process does not have.
        """
        self._check_open()
        record = await self.get(workflow_id)
        if record is None or record.state not in ("interrupted", "cancelled"):
            return False
        if record.name not in self._workflows:
            raise Conflict(
                f"workflow {workflow_id!r} needs {record.name!r}, which this process does not have",
                hint="resume it with the version that started it",
            )
        await self._launched()
        if record.state == "cancelled":
            # Its executions here may still be cleaning up; their steps must not run twice at once.
            old = self._stop_tree(workflow_id, "cancelled")
            if old:
                await asyncio.wait(old, timeout=_TEARDOWN_S)
        return await _unbroken(self._continue(workflow_id, asked=True))

    async def resume_interrupted(self) -> list[str]:
        """See RunEngine. Takes only workflows whose name is registered here."""
        self._check_open()
        orphans = await asyncio.to_thread(self._leases.orphans, list(self._workflows))
        if orphans:
            await self._launched()
        return [each for each in orphans if await _unbroken(self._continue(each, asked=False))]

    async def cancel(self, workflow_id: str) -> bool:
        """See RunEngine. Owners in other processes notice within a second."""
        self._check_open()
        cancelled = await _unbroken(asyncio.to_thread(self._leases.cancel, workflow_id))
        if cancelled:
            self._stop_tree(workflow_id, "cancelled")
        return cancelled

    # ---- execution ---------------------------------------------------------------------------------------

    async def _continue(self, workflow_id: str, *, asked: bool) -> bool:
        """Claim a workflow and execute its unfinished part here, children before their parents."""
        token = str(uuid.uuid4())
        claim: Claim | None = await asyncio.to_thread(
            self._leases.claim, workflow_id, self._executor_id, token, asked=asked
        )
        if claim is None:
            return False
        self._enter(workflow_id, claim.epoch)
        for unfinished in claim.unfinished:
            try:
                await asyncio.to_thread(self._library.execute_claimed, unfinished, token)
            except Exception as error:  # noqa: BLE001 - whatever DBOS met, the workflow must not hang
                await self._not_continued(workflow_id, unfinished, error)
        return True

    async def _not_continued(self, root: str, workflow_id: str, error: Exception) -> None:
        """A claimed workflow did not start: its end is recorded (bad payload, many attempts), or let go."""
        log.warning("workflow_not_continued", workflow_id=workflow_id, error=str(error))
        if workflow_id == root:
            self._leave(root)
        statuses = await asyncio.to_thread(self._leases.statuses, [workflow_id])
        if statuses.get(workflow_id) == "PENDING":
            self._stop_tree(root, "lost")
            self._leave(root)
            await asyncio.to_thread(self._leases.release, root, self._executor_id)
            raise Unavailable(f"workflow {workflow_id!r} could not be continued: {error}") from error

    def _enter(self, workflow_id: str, epoch: int) -> None:
        self._epochs[workflow_id] = epoch
        self._done[workflow_id] = asyncio.Event()
        self._places.reserve(workflow_id)

    def _leave(self, workflow_id: str) -> None:
        self._places.give_back(workflow_id)
        if (done := self._done.pop(workflow_id, None)) is not None:
            done.set()

    async def execute(self, name: str, payload: JsonObject) -> JsonObject:
        """The body of the one DBOS workflow: our function by its name."""
        signals = self._library.signals
        workflow_id = self._library.workflow_id
        execution = _Execution(workflow_id, cast("asyncio.Task[Any]", asyncio.current_task()))
        self._executions.add(execution)
        execution.task.add_done_callback(lambda _: self._executions.discard(execution))
        epoch = self._epochs.get(root_of(workflow_id), 0)
        try:
            result = await self._outcome(execution, name, payload)
            await self.drop_abandoned(execution)
            return result
        except asyncio.CancelledError as error:
            if execution.stopped == "cancelled":
                raise signals.cancelled(f"workflow {workflow_id!r} was cancelled") from error
            raise
        finally:
            if root_of(workflow_id) == workflow_id and self._epochs.get(workflow_id) == epoch:
                self._leave(workflow_id)

    async def _outcome(self, execution: _Execution, name: str, payload: JsonObject) -> JsonObject:
        """What our function returned, as JSON, or what went wrong in words of the product."""
        try:
            result = _normal(await self._body(execution, name, payload))
        except asyncio.CancelledError as error:
            if execution.is_being_stopped:
                raise
            failure = internal(f"workflow {name!r}", error)
        except AgenticFlowError as error:
            failure = error
        except Exception as error:
            log.exception("workflow_failed", workflow_id=execution.workflow_id, workflow=name)
            failure = internal(f"workflow {name!r}", error)
        else:
            if execution.broken is None:
                return result
            failure = execution.broken
        await self.drop_abandoned(execution)
        raise execution.broken or failure

    async def _body(self, execution: _Execution, name: str, payload: JsonObject) -> JsonObject:
        workflow_id = execution.workflow_id
        workflow = self._workflows.get(name)
        if workflow is None:
            raise Conflict(
                f"workflow {workflow_id!r} needs {name!r}, which this process does not have",
                hint="run it with the version that started it",
            )
        if root_of(workflow_id) == workflow_id:
            await self._places.taken(workflow_id)
            if not await asyncio.to_thread(
                self._leases.note_started, workflow_id, self._executor_id, self._epochs[workflow_id]
            ):
                self._stop_tree(workflow_id, "lost")
                await asyncio.sleep(0)  # where the cancellation arrives
        return await workflow(_Context(self, self._library, execution), payload)

    def _stop_tree(self, workflow_id: str, reason: StopReason) -> list[asyncio.Task[Any]]:
        """Interrupt the executions here of a workflow and everything below it; nothing of it is recorded."""
        below = f"{workflow_id}."
        return self._stop(
            [e for e in self._executions if e.workflow_id == workflow_id or e.workflow_id.startswith(below)],
            reason,
        )

    def _stop(self, executions: Collection[_Execution], reason: StopReason) -> list[asyncio.Task[Any]]:
        for execution in executions:
            if execution.stopped is None:
                execution.stopped = reason
                execution.task.cancel()
        return [execution.task for execution in executions]

    async def give_up(self, execution: _Execution) -> NoReturn:
        """The store refused a write of this execution: find out why, and stop its tree here.

        Raises:
            CancelledError: always.
        """
        if execution.stopped is None:
            statuses = await asyncio.to_thread(self._leases.statuses, [execution.workflow_id])
            if statuses.get(execution.workflow_id) == "CANCELLED":
                self._stop_tree(execution.workflow_id, "cancelled")
            else:
                log.warning("workflow_lost", workflow_id=execution.workflow_id)
                self._stop_tree(root_of(execution.workflow_id), "lost")
        raise asyncio.CancelledError

    async def drop_abandoned(self, execution: _Execution) -> None:
        """Cancel the children that this workflow gave up on and went on without.

        Only now, not when it was interrupted: from inside, an end of the process looks like a timeout of the
        workflow. Refused when the tree has changed hands.
        """
        while execution.abandoned and execution.stopped is None:
            child_id = execution.abandoned.pop()
            as_owner = (self._executor_id, self._epochs.get(root_of(child_id), 0))
            cancelling = asyncio.to_thread(self._leases.cancel, child_id, only_as=as_owner)
            if await _unbroken(cancelling):
                self._stop_tree(child_id, "cancelled")

    async def until_left(self, workflow_id: str) -> None:
        """Wait until no execution of this workflow is left here."""
        tasks = [e.task for e in self._executions if e.workflow_id == workflow_id]
        if tasks:
            await asyncio.wait(tasks)

    @property
    def _reader(self) -> RunReader:
        return self._open_reader if self._is_open else self._closed_reader

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the run engine is not open", hint="use it inside `async with engine.open()`")


@dataclass(eq=False)
class _Execution:
    """One execution of a workflow in this process.

    `broken` is set when a replay took another path, `abandoned` are children it no longer waits for.
    """

    workflow_id: str
    task: asyncio.Task[Any]
    stopped: StopReason | None = None
    broken: AgenticFlowError | None = None
    abandoned: list[str] = field(default_factory=list[str])

    @property
    def is_being_stopped(self) -> bool:
        """Whether a CancelledError comes from outside, not from a library inside that raised one."""
        return self.stopped is not None or self.task.cancelling() > 0


class _Context:
    """WorkflowContext of one execution."""

    def __init__(self, engine: DbosRunEngine, library: Library, execution: _Execution) -> None:
        self._engine = engine
        self._library = library
        self._execution = execution
        self._busy: str | None = None

    @property
    def workflow_id(self) -> str:
        return self._execution.workflow_id

    async def step(self, name: str, function: StepFunction) -> JsonObject:
        """See WorkflowContext. One at a time: steps are numbered by the order in which they start."""
        assert self._busy is None, f"steps {self._busy!r} and {name!r} of {self.workflow_id!r} at once"
        self._busy = name
        try:
            await self._engine.drop_abandoned(self._execution)
            recorded = await self._guarded(self._library.step(name, lambda: self._call(name, function)))
        finally:
            self._busy = None
        # Live and replayed results are the same JSON: a tuple is a list on the first run already.
        return decoded(recorded.text) if isinstance(recorded, Encoded) else recorded

    async def _call(self, name: str, function: StepFunction) -> Encoded:
        execution = self._execution
        try:
            key = f"{execution.workflow_id}:{self._library.step_id}"
            return Encoded(encode(await function(StepContext(key))))
        except asyncio.CancelledError as error:
            if execution.is_being_stopped:
                raise
            raise internal(f"step {name!r}", error) from error
        except Exception as error:
            if execution.is_being_stopped:
                # Whatever it says, it says it because it was interrupted: that is no result.
                raise asyncio.CancelledError from error
            if isinstance(error, AgenticFlowError):
                raise
            log.exception("step_failed", workflow_id=execution.workflow_id, step=name)
            raise internal(f"step {name!r}", error) from error

    async def children(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
        """See WorkflowContext. When the parent gives up on them or fails, its children are cancelled."""
        assert self._busy is None, f"step {self._busy!r} and children of {self.workflow_id!r} at once"
        assert not any("." in key for key in payloads), list(payloads)
        self._busy = name
        handles: dict[str, Any] = {}
        results: dict[str, JsonObject] = {}
        finished = False
        try:
            await self._engine.drop_abandoned(self._execution)
            for key, payload in payloads.items():
                handles[key] = None
                child_id = f"{self.workflow_id}.{key}"
                starting = _unbroken(self._library.start(child_id, name, _normal(payload)))
                handles[key] = await self._guarded(starting, child_id)
            for key, handle in handles.items():
                results[key] = await self._result(f"{self.workflow_id}.{key}", handle)
            finished = True
        finally:
            self._busy = None
            if not finished:
                left = [f"{self.workflow_id}.{key}" for key in handles if key not in results]
                self._execution.abandoned.extend(left)
        return results

    async def _result(self, child_id: str, handle: Any) -> JsonObject:
        # A child that was resumed is known to DBOS's handle only by polling.
        await self._engine.until_left(child_id)
        try:
            return await self._guarded(handle.get_result(polling_interval_sec=_CHILD_POLL_S))
        except AgenticFlowError as error:
            if error is self._execution.broken:
                raise
            return {"error": as_problem(error)}
        except self._library.signals.child_cancelled:
            return {"error": as_problem(child_cancelled_error(child_id))}

    async def _guarded(self, operation: Coroutine[Any, Any, Any], child_id: str | None = None) -> Any:
        """Await a call into DBOS and put its signals into our words."""
        signals = self._library.signals
        if self._execution.broken is not None:
            operation.close()
            raise self._execution.broken
        try:
            result = await operation
        except (signals.refused, signals.cancelled):
            await self._engine.give_up(self._execution)
        except (signals.other_step, signals.other_outcome) as error:
            raise self._broken(str(error)) from error
        if child_id is not None and result.get_workflow_id() != child_id:
            raise self._broken(f"child {result.get_workflow_id()!r} was recorded where {child_id!r} is now")
        return result

    def _broken(self, what: str) -> AgenticFlowError:
        self._execution.broken = Conflict(
            f"workflow {self.workflow_id!r} took another path than the one recorded: {what}",
            hint="its code has changed since it was started; start it anew",
        )
        return self._execution.broken


class _Places:
    """Turns of the top-level workflows of this process, in the order of their reservation."""

    def __init__(self, places_max: int) -> None:
        self._free = places_max
        self._waiting: deque[str] = deque()
        self._turns: dict[str, asyncio.Event] = {}

    def reserve(self, workflow_id: str) -> None:
        self.give_back(workflow_id)
        self._turns[workflow_id] = asyncio.Event()
        self._waiting.append(workflow_id)
        self._admit()

    async def taken(self, workflow_id: str) -> None:
        await self._turns[workflow_id].wait()

    def give_back(self, workflow_id: str) -> None:
        turn = self._turns.pop(workflow_id, None)
        if turn is None:
            return
        if turn.is_set():
            self._free += 1
        else:
            self._waiting.remove(workflow_id)
        self._admit()

    def _admit(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._turns[self._waiting.popleft()].set()


class _Heartbeat:
    """Renews the lease from a thread of its own, so that a busy event loop does not look like death."""

    def __init__(self, leases: Leases, executor_id: str, interval_s: float) -> None:
        self._leases = leases
        self._executor_id = executor_id
        self._interval_s = interval_s
        self.has_begun = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-engine-heartbeat", daemon=True)

    def start(self) -> None:
        """Beat once now, so that others see this process, and then regularly."""
        self._leases.beat(self._executor_id)
        self.has_begun = True
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            try:
                self._leases.beat(self._executor_id)
            except AgenticFlowError as error:
                log.warning("heartbeat_failed", error=error.message)


async def _entry(name: str, payload: JsonObject) -> JsonObject:
    """The one workflow that DBOS knows."""
    engine = _open_engine
    if engine is None:
        raise asyncio.CancelledError("the engine has been closed")
    return await engine.execute(name, payload)


def _normal(value: JsonObject) -> JsonObject:
    """The value as it will come back from the store."""
    return orjson.loads(orjson.dumps(value))


async def _unbroken(operation: Coroutine[Any, Any, T]) -> T:
    """Await to the end even when cancelled meanwhile: half of it would leave a workflow that nobody runs."""
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; the cancellation is what the caller hears of
        raise
