"""RunEngine on DBOS: durable workflows on SQLite or Postgres.

What DBOS gives: checkpoints of steps, replay, the fence that refuses a checkpoint of an execution that no
longer owns its workflow. What is ours: who owns a workflow and whether the owner lives (`run_store`), prompt
take-over, JSON instead of pickle, and execution on the event loop of the process that opened the engine.

DBOS is one per process, so one engine can be open per process. All workflows run through one registered DBOS
workflow, `_entry`, which looks up our function by name; nothing of ours is pickled or registered with DBOS.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import orjson
import structlog

from agentic_flow.core.errors import AgenticFlowError, Conflict, Unavailable, as_problem, from_problem
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunState, StepContext, StepFunction, StepRecord, Workflow, WorkflowRecord
from agentic_flow.swarm.run_store import ERROR_KEY as _ERROR
from agentic_flow.swarm.run_store import RunStore

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

APPLICATION_VERSION = "runs-1"
"""Recovery takes only workflows of its own version. It changes when stored runs can no longer be replayed by
this code, not with every build: otherwise an upgrade would strand every run under way."""

_ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})
_WAIT_FIRST_S, _WAIT_MOST_S = 0.02, 0.25
_WATCH_S = 0.5
_RESUME_POLL_S = 0.1

_open_engine: DbosRunEngine | None = None
_entry_workflow: Any = None


class DbosRunEngine:
    """See RunEngine.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        lease_s: A process silent for this long has lost its workflows.
        runs_parallel_max: Top-level workflows of this process at a time; more wait their turn, durably.
    """

    def __init__(
        self, database_url: str | None, data_dir: Path, *, lease_s: float, runs_parallel_max: int
    ) -> None:
        self._store = RunStore(database_url, data_dir, lease_s=lease_s)
        self._lease_s = lease_s
        self._runs_parallel_max = runs_parallel_max
        self._workflows: dict[str, Workflow] = {}
        self._tasks: dict[str, asyncio.Task[JsonObject]] = {}
        self._closing = False
        self._is_open = False
        self._executor_id = ""
        self._queue: str | None = None
        self._queue_lock = asyncio.Lock()

    # ---- life --------------------------------------------------------------------------------------------

    def register(self, name: str, workflow: Workflow) -> None:
        """See RunEngine."""
        assert name not in self._workflows, name
        self._workflows[name] = workflow

    @asynccontextmanager
    async def open(self, *, takeover: bool = False) -> AsyncGenerator[None]:
        """See RunEngine.

        Raises:
            Conflict: another engine is open in this process.
            Unavailable: the database cannot be reached.
        """
        global _open_engine
        if _open_engine is not None:
            raise Conflict("a run engine is already open in this process", hint="close it first, or share it")
        _open_engine = self
        try:
            self._loop = asyncio.get_running_loop()
            self._slots = asyncio.Semaphore(self._runs_parallel_max)
            self._queue_lock = asyncio.Lock()
            self._closing, self._queue = False, None
            self._executor_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"
            with self._store.presence(self._executor_id):
                await asyncio.to_thread(self._launch)
                self._is_open = True
                keepers = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._watch())]
                if takeover:
                    keepers.append(asyncio.create_task(self._take_orphans()))
                try:
                    yield
                finally:
                    await self._close(keepers)
        finally:
            _open_engine = None
            self._store.close()

    def _launch(self) -> None:
        global _entry_workflow
        from dbos import DBOS
        from sqlalchemy.exc import SQLAlchemyError

        logging.getLogger("dbos").propagate = False
        if _entry_workflow is None:
            _entry_workflow = DBOS.workflow(name="agentic_flow")(_entry)
        try:
            self._store.create()
            self._store.beat(self._executor_id)
            DBOS(
                config={
                    "name": "agentic-flow",
                    "system_database_url": self._store.url,
                    "system_database_engine": self._store.engine,
                    "application_version": APPLICATION_VERSION,
                    "executor_id": self._executor_id,
                    "serializer": _serializer(),
                    "log_level": "CRITICAL",  # what matters is in the store, and logged here
                    "enable_otlp": False,
                }
            )
            # Of the named queues only the one that this process resumes from, see _own_queue.
            DBOS.listen_queues([self._queue_name])
            DBOS.launch()
        except SQLAlchemyError as error:
            DBOS.destroy()
            raise Unavailable(
                f"the run database cannot be used: {error}", hint="start it, or check swarm.database_url"
            ) from error

    @property
    def _queue_name(self) -> str:
        return f"resume-{self._executor_id}"

    async def _close(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Let go without recording anything: what was in flight runs again wherever it is resumed."""
        from dbos import DBOS

        self._closing, self._is_open = True, False
        tasks: list[asyncio.Task[Any]] = [*keepers, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._queue is not None:
            await DBOS.delete_queue_async(self._queue)
        # DBOS put its own thread pool under this event loop and now shuts it down.
        pool = ThreadPoolExecutor(thread_name_prefix="agentic-flow")
        self._loop.set_default_executor(pool)
        await asyncio.to_thread(DBOS.destroy)
        await asyncio.to_thread(self._store.leave, self._executor_id)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            try:
                await asyncio.to_thread(self._store.beat, self._executor_id)
            except Unavailable as error:
                log.warning("heartbeat_failed", error=error.message)

    async def _watch(self) -> None:
        """Notice what others did to our workflows: cancelled them, or took them over while we were silent."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if not self._tasks:
                continue
            try:
                running = list(self._tasks)
                cancelled = await asyncio.to_thread(self._store.cancelled_among, running)
                owned = await asyncio.to_thread(self._store.owned_by, self._executor_id)
            except Unavailable as error:
                log.warning("watch_failed", error=error.message)
                continue
            for workflow_id in running:
                if workflow_id in cancelled or _root(workflow_id) not in owned:
                    self._stop_local(workflow_id)

    async def _take_orphans(self) -> None:
        while True:
            try:
                for workflow_id in await self.resume_interrupted():
                    log.info("workflow_taken_over", workflow_id=workflow_id)
            except Unavailable as error:
                log.warning("takeover_failed", error=error.message)
            await asyncio.sleep(self._lease_s / 2)

    # ---- callers -----------------------------------------------------------------------------------------

    async def start(self, name: str, workflow_id: str, payload: JsonObject, *, tenant: str) -> bool:
        """See RunEngine."""
        from dbos import DBOS, SetWorkflowID

        self._check_open()
        assert name in self._workflows, name
        assert "." not in workflow_id, workflow_id
        if not await asyncio.to_thread(
            self._store.take_new, workflow_id, self._executor_id, tenant, name
        ) and not await self._take_unborn(workflow_id):
            return False
        with SetWorkflowID(workflow_id):
            await DBOS.start_workflow_async(_entry_workflow, name, payload)
        return True

    async def wait(self, workflow_id: str) -> WorkflowRecord:
        """See RunEngine."""
        pause_s = _WAIT_FIRST_S
        while True:
            record = await self.get(workflow_id)
            if record is None:
                raise Unavailable(f"workflow {workflow_id!r} is not in the run database")
            if record.state in _ENDED:
                return record
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _WAIT_MOST_S)

    async def get(self, workflow_id: str) -> WorkflowRecord | None:
        """See RunEngine."""
        return await self._read(lambda: self._store.get(workflow_id), None)

    async def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[WorkflowRecord]:
        """See RunEngine."""
        nothing: list[WorkflowRecord] = []
        return await self._read(
            lambda: self._store.list_workflows(tenant, name=name, states=states, limit=limit), nothing
        )

    async def steps(self, workflow_id: str) -> list[StepRecord]:
        """See RunEngine."""
        nothing: list[StepRecord] = []
        return await self._read(lambda: self._store.steps(workflow_id), nothing)

    async def resume(self, workflow_id: str) -> bool:
        """See RunEngine."""
        self._check_open()
        record = await self.get(workflow_id)
        if record is None or record.state not in ("interrupted", "cancelled"):
            return False
        cancelled = record.state == "cancelled"
        if cancelled:
            self._stop_local(workflow_id)
        # Whoever owned a cancelled workflow has stopped, or its next checkpoint is refused.
        if not await asyncio.to_thread(
            self._store.take_over, workflow_id, self._executor_id, even_from_the_living=cancelled
        ):
            return False
        await self._continue(workflow_id)
        return True

    async def resume_interrupted(self) -> list[str]:
        """See RunEngine."""
        self._check_open()
        taken: list[str] = []
        for workflow_id in await asyncio.to_thread(self._store.orphans):
            if await asyncio.to_thread(self._store.take_over, workflow_id, self._executor_id):
                await self._continue(workflow_id)
                taken.append(workflow_id)
        return taken

    async def cancel(self, workflow_id: str) -> bool:
        """See RunEngine."""
        from dbos import DBOS

        self._check_open()
        record = await self.get(workflow_id)
        if record is None or record.state in _ENDED:
            return False
        await _outside_workflows(DBOS.cancel_workflow_async(workflow_id, cancel_children=True))
        self._stop_local(workflow_id)
        return True

    # ---- execution ---------------------------------------------------------------------------------------

    async def execute(self, name: str, payload: JsonObject) -> JsonObject:
        """The body of a DBOS workflow: our function, on the loop of this engine.

        DBOS runs what it takes from a queue on an event loop of its own, where connections of our services
        do not work. The DBOS context travels along in the context variables.
        """
        from dbos import DBOS

        workflow_id = cast(str, DBOS.workflow_id)
        body = self._body(name, workflow_id, payload)
        if asyncio.get_running_loop() is self._loop:
            return await self._own(workflow_id, body)
        context = contextvars.copy_context()
        outcome: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
        outer = asyncio.get_running_loop()

        def settle(task: asyncio.Task[JsonObject]) -> None:
            def set_outcome() -> None:
                if outcome.done():
                    return
                if task.cancelled():
                    outcome.cancel()
                elif (error := task.exception()) is not None:
                    outcome.set_exception(error)
                else:
                    outcome.set_result(task.result())

            with suppress(RuntimeError):  # DBOS's loop is gone while closing: nobody waits any more
                outer.call_soon_threadsafe(set_outcome)

        def begin() -> None:
            task = self._loop.create_task(self._own(workflow_id, body), context=context)
            task.add_done_callback(settle)

        self._loop.call_soon_threadsafe(begin)
        return await outcome

    async def _own(self, workflow_id: str, body: Awaitable[JsonObject]) -> JsonObject:
        task = asyncio.ensure_future(body)
        self._tasks[workflow_id] = task
        try:
            return await task
        finally:
            if self._tasks.get(workflow_id) is task:
                del self._tasks[workflow_id]

    async def _body(self, name: str, workflow_id: str, payload: JsonObject) -> JsonObject:
        workflow = self._workflows.get(name)
        if workflow is None:
            raise Unavailable(
                f"workflow {workflow_id!r} needs {name!r}, which this process does not have",
                hint="resume it with a version that has it",
            )
        context = _Context(self, workflow_id)
        if _root(workflow_id) != workflow_id:
            return await workflow(context, payload)
        async with self._slots:
            await asyncio.to_thread(self._store.note_started, workflow_id)
            return await workflow(context, payload)

    def _stop_local(self, workflow_id: str) -> None:
        """Interrupt the executions here of a workflow and its children; nothing of it is recorded."""
        for running, task in list(self._tasks.items()):
            if running == workflow_id or _root(running) == workflow_id:
                task.cancel()

    async def stop_children(self, workflow_ids: Sequence[str]) -> None:
        """Cancel children whose parent gave up on them (not when the whole process lets go)."""
        from dbos import DBOS

        if self._closing:
            return
        for workflow_id in workflow_ids:
            await _outside_workflows(DBOS.cancel_workflow_async(workflow_id))
            self._stop_local(workflow_id)

    async def _continue(self, workflow_id: str) -> None:
        """Put the unfinished part of a tree on this process's own queue, children first."""
        from dbos import DBOS

        queue = await self._own_queue()
        for unfinished in await asyncio.to_thread(self._store.unfinished_tree, workflow_id):
            await _outside_workflows(DBOS.resume_workflow_async(unfinished, queue_name=queue))

    async def _own_queue(self) -> str:
        """DBOS resumes through a queue; with one of our own nobody else can pick the workflow up."""
        from dbos import DBOS

        async with self._queue_lock:
            if self._queue is None:
                await DBOS.register_queue_async(self._queue_name, polling_interval_sec=_RESUME_POLL_S)
                self._queue = self._queue_name
            return self._queue

    async def _take_unborn(self, workflow_id: str) -> bool:
        """Whether an id that is known was never started (its process died in between) and is ours now."""
        for _ in range(20):
            if await self.get(workflow_id) is not None:
                return False
            if await asyncio.to_thread(self._store.take_over, workflow_id, self._executor_id):
                return True
            await asyncio.sleep(0.05)  # a living process has taken the id and is about to store it
        raise Unavailable(f"workflow {workflow_id!r} is being accepted elsewhere", hint="try again")

    async def _read(self, read: Callable[[], Any], nothing: Any) -> Any:
        if not self._is_open:
            if not await asyncio.to_thread(lambda: self._store.exists):
                return nothing
            await asyncio.to_thread(self._store.create)
        return await asyncio.to_thread(read)

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the run engine is not open", hint="use it inside `async with engine.open()`")


class _Context:
    """WorkflowContext of one execution."""

    def __init__(self, engine: DbosRunEngine, workflow_id: str) -> None:
        self._engine = engine
        self._workflow_id = workflow_id
        self._busy = False

    @property
    def workflow_id(self) -> str:
        return self._workflow_id

    async def step(self, name: str, function: StepFunction) -> JsonObject:
        """See WorkflowContext. One at a time: steps are numbered by the order in which they start."""
        from dbos import DBOS

        assert not self._busy, f"two steps of {self._workflow_id} at once, the second is {name!r}"
        self._busy = True

        async def call() -> JsonObject:
            try:
                return await function(StepContext(f"{self._workflow_id}:{DBOS.step_id}"))
            except AgenticFlowError:
                raise
            except Exception as error:
                log.exception("step_failed", workflow_id=self._workflow_id, step=name)
                raise _internal(f"step {name!r}", error) from error

        try:
            return await DBOS.run_step_async({"name": name, "preemptible": True}, call)
        finally:
            self._busy = False

    async def children(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
        """See WorkflowContext."""
        from dbos import DBOS, SetWorkflowID

        handles: dict[str, Any] = {}
        results: dict[str, JsonObject] = {}
        try:
            for key, payload in payloads.items():
                with SetWorkflowID(f"{self._workflow_id}.{key}"):
                    handles[key] = await DBOS.start_workflow_async(_entry_workflow, name, payload)
            for key, handle in handles.items():
                try:
                    results[key] = await handle.get_result(polling_interval_sec=_RESUME_POLL_S)
                except AgenticFlowError as error:
                    results[key] = {"error": as_problem(error)}
        except asyncio.CancelledError:
            unfinished = [f"{self._workflow_id}.{key}" for key in handles if key not in results]
            await self._engine.stop_children(unfinished)
            raise
        return results


async def _entry(name: str, payload: JsonObject) -> JsonObject:
    """The one workflow that DBOS knows."""
    engine = _open_engine
    if engine is None:
        raise asyncio.CancelledError("the engine has been closed")
    try:
        return await engine.execute(name, payload)
    except AgenticFlowError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("dbos"):
            raise  # its own signals: cancelled, no longer the owner
        log.exception("workflow_failed", workflow=name)
        raise _internal(f"workflow {name!r}", error) from error


def _internal(what: str, error: Exception) -> AgenticFlowError:
    return AgenticFlowError(
        f"{what} failed unexpectedly: {type(error).__name__}: {error}",
        hint="this is a bug of agentic-flow; the log has the traceback",
    )


def _serializer() -> Any:
    """What DBOS stores, as JSON: readable by other languages, and nothing is executed by reading it."""
    from dbos import Serializer

    class JsonSerializer(Serializer):
        def serialize(self, data: Any) -> str:
            if isinstance(data, AgenticFlowError):
                data = {_ERROR: as_problem(data)}
            elif isinstance(data, Exception):
                data = {_ERROR: as_problem(_internal("the engine", data))}
            return orjson.dumps(data).decode()

        def deserialize(self, serialized_data: str) -> Any:
            data: Any = orjson.loads(serialized_data)
            if isinstance(data, dict) and _ERROR in data:
                return from_problem(cast(JsonObject, data)[_ERROR])
            return cast(Any, data)

        def name(self) -> str:
            return "agentic-flow-json"

    return JsonSerializer()


async def _outside_workflows(operation: Awaitable[Any]) -> Any:
    """Await a DBOS call without the current workflow recording it as one of its steps."""
    context = contextvars.Context()
    return await asyncio.get_running_loop().create_task(_await(operation), context=context)


async def _await(operation: Awaitable[Any]) -> Any:
    return await operation


def _root(workflow_id: str) -> str:
    return workflow_id.partition(".")[0]
