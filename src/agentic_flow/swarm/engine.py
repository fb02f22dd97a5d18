"""RunEngine over SQL: durable workflows in SQLite or PostgreSQL, executed on the event loop of their owner.

A workflow and everything below it belong to one process at a time (`leases`); one thread of that process
writes its recorded steps (`checkpoints`). What may be done is decided without I/O (`scheduling`). This is the
face of the port, and what accepts; `executor` executes, `handover` takes from others and gives to them,
`upkeep` looks after the rest.

How a replay works: the steps and the children of a workflow have numbers, counted in the order in which the
workflow asks for them. What is recorded under a number is returned instead of executed; when something else
is recorded there than is asked for, the code has changed, and the workflow fails instead of guessing. Each
child counts for itself, so that the order among children does not matter.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    NeedsNewer,
    NotFound,
    Unavailable,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import (
    ArtifactRecord,
    EngineHealth,
    EventRecord,
    MessageRecord,
    PurgeReport,
    QueueDepth,
    RunState,
    StepRecord,
    Workflow,
    WorkflowRecord,
)
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.checkpoints import Accept, CheckpointWriter
from agentic_flow.swarm.dependencies import Dependencies
from agentic_flow.swarm.execution import (
    Run,
    encoded,
    row_of,
)
from agentic_flow.swarm.executor import TEARDOWN_S, Executor, RunStores
from agentic_flow.swarm.handover import Handover
from agentic_flow.swarm.heartbeat import Heartbeat, answers, unbroken
from agentic_flow.swarm.inbox import Inbox
from agentic_flow.swarm.leases import NOBODY, Leases, RunDatabase
from agentic_flow.swarm.pauses import Pauses
from agentic_flow.swarm.queue_rates import WINDOW_S, QueueRates
from agentic_flow.swarm.queue_rows import check_priority
from agentic_flow.swarm.queues import RunQueues
from agentic_flow.swarm.reader import RunReader
from agentic_flow.swarm.retention import Retention
from agentic_flow.swarm.retries import Retries
from agentic_flow.swarm.scheduling import DEFAULT_QUEUE, ENDED, QUEUED_BY, Fence
from agentic_flow.swarm.upkeep import Upkeep

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_WAIT_FIRST_S, _WAIT_MOST_S = 0.01, 0.25


class SqlRunEngine:
    """See RunEngine.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        lease_s: A process silent for this long has lost its workflows.
        runs_parallel_max: Top-level workflows of this process at a time; more wait their turn, durably.
            With 0 it executes none: what is started goes to a shared queue.
        queue_runs_max: Queue → runs of it at a time, in all processes with this limit; no entry: any number.
        tenant_runs_max: Runs of a tenant at a time that come from shared queues; None: any number.
        queue_starts_per_minute: Queue → runs of it that may begin in any minute, in all processes with this
            limit; no entry: any number. What is gone on with does not count.
        minute_s: How long that minute is, in seconds.
        peer_patience_s: Longest time that a step waits for a neighbour of ours which is away.
        clock: Stamps what is stored.
    """

    def __init__(
        self,
        database_url: str | None,
        data_dir: Path,
        *,
        lease_s: float,
        runs_parallel_max: int,
        queue_runs_max: Mapping[str, int] | None = None,
        tenant_runs_max: int | None = None,
        queue_starts_per_minute: Mapping[str, int] | None = None,
        minute_s: float = WINDOW_S,
        peer_patience_s: float = 300.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._database = database = RunDatabase(database_url, data_dir)
        rates = QueueRates(database, clock, queue_starts_per_minute or {}, window_s=minute_s)
        self._stores = RunStores(
            database=database,
            leases=Leases(database, lease_s=lease_s, clock=clock),
            queues=RunQueues(
                database,
                clock,
                queue_runs_max=queue_runs_max or {},
                tenant_runs_max=tenant_runs_max,
                rates=rates,
            ),
            dependencies=Dependencies(database, clock),
            inbox=Inbox(database, clock),
            pauses=Pauses(database, clock),
        )
        unpooled = RunDatabase(database_url, data_dir, pooled=False)
        self._closed_inbox, self._closed_pauses = Inbox(unpooled, clock), Pauses(unpooled, clock)
        self._retention = Retention(unpooled, clock)
        self._open_reader = RunReader.on(database, self._stores.leases)
        self._closed_reader = RunReader(database_url, data_dir, lease_s=lease_s, clock=clock)
        self._lease_s = lease_s
        self._places_max = runs_parallel_max
        self.clock = clock
        self.peer_patience_s = peer_patience_s
        self._workflows: dict[str, Workflow] = {}
        self._is_open = False
        self._opened = self._takes_over = False
        self._reset()

    def _reset(self) -> None:
        self._executor_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._accepting: dict[str, asyncio.Future[checkpoints.Answer]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._writer: CheckpointWriter | None = None
        self._heartbeat: Heartbeat | None = None
        self._present = ExitStack()
        self._working: tuple[Executor, Handover] | None = None

    # ---- life ----------------------------------------------------------------------------------------------

    def register(self, name: str, workflow: Workflow) -> None:
        """See RunEngine."""
        assert name not in self._workflows, name
        self._workflows[name] = workflow

    @asynccontextmanager
    async def open(self, *, takeover: bool = False, queues: Sequence[str] = ()) -> AsyncGenerator[None]:
        """See RunEngine. It can be opened again after it was closed.

        Raises:
            Conflict: it is open already, or an older build is at work on the database.
            Unavailable: the database cannot be reached.
            DataCorrupted: the database file is damaged.
        """
        if self._opened:
            raise Conflict("this run engine is open already", hint="share it, or close it first")
        self._opened, self._takes_over = True, takeover
        self._reset()
        try:
            await unbroken(asyncio.to_thread(self._prepare, queues if self._places_max else ()))
            self._begin(takeover, queues)
            yield
        finally:
            try:
                await unbroken(self._close())
            finally:
                self._opened = False
                self._database.close()

    def _begin(self, takeover: bool, queues: Sequence[str]) -> None:
        self._writer = CheckpointWriter(self._database, patience_s=self._lease_s)
        handover = Handover(
            self._stores,
            self._executor_id,
            self._workflows,
            lease_s=self._lease_s,
            executes=self._places_max > 0,
        )
        executor = Executor(
            self._stores,
            self._writer,
            self._workflows,
            places_max=self._places_max,
            clock=self.clock,
            peer_patience_s=self.peer_patience_s,
            on_free=handover.wake,
            on_abandoned=handover.let_go,
        )
        handover.serve(executor)
        self._working = executor, handover
        self._is_open = True
        upkeep = Upkeep(self._stores, self._executor_id, executor, handover, self._accepting.keys())
        self._keepers += upkeep.keepers(for_others=takeover or bool(queues))
        self._keepers += handover.keepers(takeover=takeover, queues=queues)

    def _prepare(self, queues: Sequence[str]) -> None:
        self._database.create()
        self._stores.leases.forget_the_dead()
        self._present.enter_context(self._stores.leases.presence(self._executor_id))
        self._heartbeat = Heartbeat(self._stores.leases, self._executor_id, self._lease_s / 4)
        self._heartbeat.start()
        if queues:
            self._stores.leases.serve(self._executor_id, queues)

    async def _close(self) -> None:
        """Let go without recording anything: what was in flight runs again wherever it is resumed."""
        self._is_open = False
        if self._working is not None:
            await self._stop_work(*self._working)
        if self._writer is not None:
            await self._writer.close()
        await asyncio.to_thread(self._withdraw)

    async def _stop_work(self, executor: Executor, handover: Handover) -> None:
        executor.is_open = False
        if self._accepting:
            await asyncio.wait(list(self._accepting.values()))
        for keeper in self._keepers:
            keeper.cancel()
        tasks = {*self._keepers, *handover.background, *executor.stop_all()}
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=TEARDOWN_S)
            if left:
                log.warning("steps_ignore_cancellation", count=len(left))
        executor.leave_all()

    def _withdraw(self) -> None:
        """Others may have what was ours."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._heartbeat.has_begun:
                try:
                    self._stores.queues.hand_back(self._executor_id)
                    self._stores.leases.leave(self._executor_id)
                except AgenticFlowError as error:  # others then wait for the lease to run out
                    log.warning("leave_failed", error=error.message)
            self._heartbeat = None
        self._present.close()

    async def drain(self, timeout_s: float) -> int:
        """See RunEngine."""
        self._check_open()
        await self._handover.drain(timeout_s)
        return len(self._executor.runs)

    @property
    def working(self) -> int:
        """See RunEngine."""
        return 0 if self._working is None else self._working[0].working

    async def health(self) -> EngineHealth:
        """See RunEngine."""
        self._check_open()
        assert self._heartbeat is not None
        return EngineHealth(
            database=await answers(self._database),
            heartbeat=self._heartbeat.is_fresh(self._lease_s),
        )

    # ---- accepting -----------------------------------------------------------------------------------------

    async def start(
        self,
        name: str,
        workflow_id: str,
        payload: JsonObject,
        *,
        tenant: str,
        queue: str | None = None,
        priority: int = 0,
        not_before_s: float | None = None,
        deadline_s: float | None = None,
        after: Sequence[str] = (),
        after_any_end: bool = False,
    ) -> bool:
        """See RunEngine. A caller that is cancelled meanwhile leaves the workflow whole: accepted or not.

        Raises:
            InvalidInput: the priority is out of range.
            NotFound: one of those that it is to begin after is not there.
            Unavailable: the database cannot be used now.
        """
        check_priority(priority)
        self._check_open()
        assert name in self._workflows, name
        assert "." not in workflow_id, workflow_id
        text = encoded(payload)
        try:
            unmet = await self._unmet(tenant, after, after_any_end)
        except NotFound:
            if await self.get(workflow_id) is None:
                raise
            return False  # accepted before, and what it waited for has been removed since
        while (other := self._accepting.get(workflow_id)) is not None:
            await asyncio.wait([other])
            self._check_open()
        if workflow_id in self._executor.runs:
            return False
        if queue is None and (not self._places_max or not_before_s is not None):
            queue = DEFAULT_QUEUE
        fence = Fence(self._executor_id if queue is None else QUEUED_BY, 1)
        run = Run(workflow_id, name, tenant, priority, text, fence, self.clock.time_s(), is_new=True)
        run.deadline_s = deadline_s
        if queue is not None:
            queued = {"queue": queue, "not_before_s": not_before_s, "deadline_s": deadline_s}
            return await self._queue(workflow_id, Accept(row_of(run), queued, unmet, after_any_end))
        self._handover.check_begins()
        run.is_held = bool(unmet)
        self._executor.enter(run)
        run.starts_at_once = run.has_place  # stored as running: no second write when it begins
        accepting = self._executor.write(Accept(row_of(run), None, unmet, after_any_end))
        self._accepting[workflow_id] = accepting
        accepting.add_done_callback(lambda _: self._accepted(run, accepting))
        return bool(await asyncio.shield(accepting))

    async def _unmet(self, tenant: str, after: Sequence[str], any_end: bool) -> list[str]:
        if not after:
            return []
        return await asyncio.to_thread(self._stores.dependencies.unmet, tenant, after, any_end=any_end)

    async def _queue(self, workflow_id: str, accept: Accept) -> bool:
        accepting = self._executor.write(accept)
        self._accepting[workflow_id] = accepting

        def accepted(_: asyncio.Future[checkpoints.Answer]) -> None:
            self._accepting.pop(workflow_id, None)
            self._handover.wake()

        accepting.add_done_callback(accepted)
        return bool(await asyncio.shield(accepting))

    def _accepted(self, run: Run, accepting: asyncio.Future[checkpoints.Answer]) -> None:
        """Called when the store has the workflow, or another one under this id, or failed."""
        self._accepting.pop(run.workflow_id, None)
        # Looked at here as well: the caller may have gone.
        if accepting.cancelled() or accepting.exception() is not None:
            self._executor.custody.doubt()  # perhaps only the answer was lost
            self._executor.leave(run, None)
            return
        if not accepting.result():
            self._executor.leave(run, None)
            return
        run.is_accepted = True
        if self._is_open:
            self._executor.begin_if_placed(run)
        else:
            self._executor.leave(run, None)

    async def retry(
        self, workflow_id: str, new_id: str, payload: JsonObject, *, from_step: str | None = None
    ) -> bool:
        """See RunEngine."""
        self._check_open()
        return await unbroken(self._retry(workflow_id, new_id, encoded(payload), from_step))

    async def _retry(self, workflow_id: str, new_id: str, payload: str, from_step: str | None) -> bool:
        record = await self.get(workflow_id)
        if record is not None and record.name not in self._workflows:
            raise NeedsNewer(
                f"workflow {workflow_id!r} needs {record.name!r}, which this process does not have",
                hint="retry it with the version that started it",
            )
        self._handover.claiming.add(new_id)
        try:
            accept = Retries(self._database, self.clock).accept
            queue = record.queue if record is not None else None
            queue = queue if self._places_max else queue or DEFAULT_QUEUE
            if queue is None:
                self._handover.check_begins()
            me = self._executor_id if queue is None else NOBODY
            accepted_at_s = await asyncio.to_thread(
                accept, workflow_id, new_id, payload, from_step=from_step, executor_id=me
            )
            if accepted_at_s is None or record is None:
                return False
            if queue is not None:
                return await self._handover.put_back(new_id, asked=True, queue=queue)
            run = Run(
                new_id, record.name, record.tenant, 0, payload, Fence(me, 1), accepted_at_s, is_new=False
            )
            run.is_accepted = True
            if self._is_open:
                self._executor.enter(run)
            return True
        except Unavailable:
            self._executor.custody.doubt()  # perhaps it was stored: only the answer was lost
            raise
        finally:
            self._handover.claiming.discard(new_id)

    # ---- what callers ask and tell -------------------------------------------------------------------------

    async def wait(self, workflow_id: str) -> WorkflowRecord:
        """See RunEngine.

        Raises:
            Unavailable: the workflow is not in the run database.
            NeedsNewer: this build cannot go on with it.
        """
        pause_s = _WAIT_FIRST_S
        while True:
            run = self._here(workflow_id)
            if run is not None:
                record = await asyncio.shield(run.ended)
                if record is not None:
                    return record
            record = await self.get(workflow_id)
            if record is None:
                raise Unavailable(
                    f"workflow {workflow_id!r} is not in the run database",
                    hint="list what is there with `agentic-flow runs list`",
                )
            if record.state in ENDED:
                return record
            if record.state == "interrupted":
                self._check_others(workflow_id)
            if self._here(workflow_id) is None:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, _WAIT_MOST_S)

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

    async def events(self, workflow_id: str, after: int = 0) -> list[EventRecord]:
        """See RunEngine."""
        return await asyncio.to_thread(self._reader.events, workflow_id, after)

    async def artifacts(self, workflow_id: str) -> list[ArtifactRecord]:
        """See RunEngine."""
        return await asyncio.to_thread(self._reader.artifacts, workflow_id)

    async def artifact_content(self, workflow_id: str, number: int) -> bytes | None:
        """See RunEngine."""
        return await asyncio.to_thread(self._reader.artifact_content, workflow_id, number)

    async def send(
        self,
        workflow_id: str,
        topic: str,
        payload: JsonObject,
        *,
        key: str,
        sender: str = "",
        before_s: float | None = None,
    ) -> bool:
        """See RunEngine. Works without `open` as well."""
        sending = asyncio.to_thread(
            self._inbox.send, workflow_id, topic, payload, key=key, sender=sender, before_s=before_s
        )
        is_new = await unbroken(sending)
        if self._working is not None:
            self._executor.waiters.wake(workflow_id)
        return is_new

    async def pause(self, workflow_id: str, *, by: str = "") -> bool:
        """See RunEngine. Works without `open` as well; owners in other processes notice within a second."""
        return await self._change_pause(self._pauses.pause, workflow_id, by, paused=True)

    async def unpause(self, workflow_id: str, *, by: str = "") -> bool:
        """See RunEngine, and `pause`."""
        return await self._change_pause(self._pauses.unpause, workflow_id, by, paused=False)

    async def _change_pause(
        self, change: Callable[[str, str], bool], workflow_id: str, by: str, *, paused: bool
    ) -> bool:
        has_changed = await unbroken(asyncio.to_thread(change, workflow_id, by))
        run = self._here(workflow_id)
        if has_changed and run is not None:
            self._executor.pauses_changed += 1
            self._executor.set_paused(run, paused)
        return has_changed

    async def messages(self, workflow_id: str) -> list[MessageRecord]:
        """See RunEngine."""
        return await asyncio.to_thread(self._inbox.messages, workflow_id)

    async def resume(self, workflow_id: str) -> bool:
        """See RunEngine.

        Raises:
            NeedsNewer: a newer build has stored the workflow, or this process does not have it.
        """
        self._check_open()
        record = await self.get(workflow_id)
        if record is None or record.state not in ("interrupted", "cancelled"):
            return False
        if record.name not in self._workflows:
            raise NeedsNewer(
                f"workflow {workflow_id!r} needs {record.name!r}, which this process does not have",
                hint="resume it with the version that started it",
            )
        if record.state == "cancelled":
            await self._executor.left(workflow_id, "cancelled")
        if record.queue is not None or not self._places_max:
            return await unbroken(self._handover.put_back(workflow_id, asked=True))
        self._handover.check_begins()
        return await unbroken(self._handover.go_on_with(workflow_id, asked=True))

    async def resume_interrupted(self) -> list[str]:
        """See RunEngine. Takes only workflows whose name is registered here."""
        self._check_open()
        return await self._handover.resume_interrupted()

    async def cancel(self, workflow_id: str) -> bool:
        """See RunEngine. Owners in other processes notice within a second."""
        self._check_open()
        cancelled = await unbroken(asyncio.to_thread(self._stores.leases.cancel, workflow_id))
        if cancelled:
            run = self._executor.runs.get(workflow_id)
            if run is not None:
                self._executor.stop_run(run, "cancelled")
            else:
                self._executor.stop_tree(workflow_id, "cancelled")
        return cancelled

    async def purge(
        self, tenant: str, *, older_than_s: float | None, keep_bytes: int | None, dry_run: bool = False
    ) -> PurgeReport:
        """See RunEngine. Works without `open` as well."""
        return await asyncio.to_thread(
            self._retention.purge,
            tenant,
            older_than_s=older_than_s,
            keep_bytes=keep_bytes,
            dry_run=dry_run,
        )

    async def is_served(self, queue: str) -> bool:
        """See RunEngine."""
        self._check_open()
        return await asyncio.to_thread(self._stores.leases.is_served, queue)

    async def queue_depths(self) -> list[QueueDepth]:
        """See RunEngine."""
        self._check_open()
        return await asyncio.to_thread(self._stores.queues.depths)

    # ---- plumbing ------------------------------------------------------------------------------------------

    @property
    def _executor(self) -> Executor:
        assert self._working is not None, "it is open"
        return self._working[0]

    @property
    def _handover(self) -> Handover:
        assert self._working is not None, "it is open"
        return self._working[1]

    def _here(self, workflow_id: str) -> Run | None:
        return None if self._working is None else self._executor.runs.get(workflow_id)

    def _check_others(self, workflow_id: str) -> None:
        """Refuse to wait for what this build cannot go on with, if it is alone with the run database."""
        refusal = None if self._working is None else self._handover.refused.get(workflow_id)
        if refusal is not None and not self._takes_over:
            raise refusal

    @property
    def _reader(self) -> RunReader:
        return self._open_reader if self._is_open else self._closed_reader

    @property
    def _pauses(self) -> Pauses:
        return self._stores.pauses if self._is_open else self._closed_pauses

    @property
    def _inbox(self) -> Inbox:
        return self._stores.inbox if self._is_open else self._closed_inbox

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the run engine is not open", hint="use it inside `async with engine.open()`")
