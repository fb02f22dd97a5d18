"""RunEngine over SQL: durable workflows in SQLite or PostgreSQL, executed on the event loop of their owner.

A workflow and everything below it belong to one process at a time (`leases`); one thread of that process
writes its recorded steps (`checkpoints`). What may be done is decided without I/O (`scheduling`).

How a replay works: the steps and the children of a workflow have numbers, counted in the order in which the
workflow asks for them. What is recorded under a number is returned instead of executed; when something else
is recorded there than is asked for, the code has changed, and the workflow fails instead of guessing. Each
child counts for itself, so that the order among children does not matter.
"""

# long because the life of a run in its process is one state machine: accepted, placed, executed, handed on

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import orjson
import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Cancelled,
    Conflict,
    NeedsNewer,
    NotFound,
    Unavailable,
    as_problem,
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
from agentic_flow.swarm.checkpoints import Accept, Checkpoint, CheckpointWriter
from agentic_flow.swarm.claiming import Claimer
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
    row_of,
    run_of,
)
from agentic_flow.swarm.heartbeat import Heartbeat, answers, keep, unbroken
from agentic_flow.swarm.inbox import Inbox, Waiters, patiently, woken_before
from agentic_flow.swarm.leases import NOBODY, Claim, Leases, RunDatabase, root_of
from agentic_flow.swarm.pauses import Pauses
from agentic_flow.swarm.queue_rates import WINDOW_S, QueueRates
from agentic_flow.swarm.queue_rows import check_priority
from agentic_flow.swarm.queues import RunQueues, late_error
from agentic_flow.swarm.reader import RunReader, decoded_object
from agentic_flow.swarm.retention import Retention
from agentic_flow.swarm.retries import Retries
from agentic_flow.swarm.scheduling import DEFAULT_QUEUE, ENDED, QUEUED_BY, UNFINISHED, Custody, Fence, Places

T = TypeVar("T")
log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_WAIT_FIRST_S, _WAIT_MOST_S = 0.01, 0.25
_WATCH_S = 0.5
_LOOK_S = 0.25
_EXPIRE_S = 1.0
_SETTLE_S = 0.5
_TEARDOWN_S = 30.0
_REFUSED_MAX = 10_000


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
        self._database = RunDatabase(database_url, data_dir)
        self._queues = RunQueues(
            self._database,
            clock,
            queue_runs_max=queue_runs_max or {},
            tenant_runs_max=tenant_runs_max,
            rates=QueueRates(self._database, clock, queue_starts_per_minute or {}, window_s=minute_s),
        )
        self._leases = Leases(self._database, lease_s=lease_s, clock=clock)
        self._dependencies = Dependencies(self._database, clock)
        self._open_inbox = Inbox(self._database, clock)
        self._open_pauses = Pauses(self._database, clock)
        unpooled = RunDatabase(database_url, data_dir, pooled=False)
        self._closed_inbox, self._closed_pauses = Inbox(unpooled, clock), Pauses(unpooled, clock)
        self._retention = Retention(unpooled, clock)
        self._open_reader = RunReader.on(self._database, self._leases)
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
        self._places: Places[Run] = Places(self._places_max)
        self._claimer: Claimer | None = None
        self._is_draining = False
        self._place_given_back = asyncio.Event()
        self._runs: dict[str, Run] = {}
        self._waiters = Waiters()
        self._pauses_changed = 0
        self._accepting: dict[str, asyncio.Future[checkpoints.Answer]] = {}
        self._executions: dict[str, set[Execution]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._claiming: set[str] = set()
        self._refused: dict[str, NeedsNewer] = {}
        self._taking_over = asyncio.Lock()
        self._custody = Custody()
        self._background: set[asyncio.Task[Any]] = set()
        self._writer: CheckpointWriter | None = None
        self._heartbeat: Heartbeat | None = None
        self._present = ExitStack()

    # ---- life --------------------------------------------------------------------------------------------

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
            self._writer = CheckpointWriter(self._database, patience_s=self._lease_s)
            self._is_open = True
            self._keepers.append(keep(_WATCH_S, self._watch))
            self._keepers.append(keep(_LOOK_S, self._look))
            if takeover:
                # The lease and this must be within 15 s, with the default lease of 10 s and some to spare.
                self._keepers.append(keep(self._lease_s / 4, self._take_orphans))
                self._keepers.append(keep(_SETTLE_S, self._take_handed_on))
            self._keepers.append(keep(_SETTLE_S, self._settle_own))
            if takeover or queues:
                self._keepers.append(keep(_EXPIRE_S, self._expire))
                self._keepers.append(keep(_SETTLE_S, self._settle_queued))
            self._claim_from(queues)
            yield
        finally:
            try:
                await unbroken(self._close())
            finally:
                self._opened = False
                self._database.close()

    def _claim_from(self, queues: Sequence[str]) -> None:
        if not queues or not self._places_max:
            return
        self._claimer = Claimer(
            self._database,
            self._queues,
            self._executor_id,
            names=queues,
            workflows=self._workflows,
            free=lambda: 0 if self._is_draining else self._places.free,
            enter=self._enter_taken,
            doubt=self._custody.doubt,
            besides=self._refused.keys(),
        )
        self._keepers.append(asyncio.create_task(self._claimer.run()))
        if not self._database.is_sqlite:
            self._keepers.append(asyncio.create_task(self._claimer.listen()))

    def _prepare(self, queues: Sequence[str]) -> None:
        self._database.create()
        self._leases.forget_the_dead()
        self._present.enter_context(self._leases.presence(self._executor_id))
        self._heartbeat = Heartbeat(self._leases, self._executor_id, self._lease_s / 4)
        self._heartbeat.start()
        if queues:
            self._leases.serve(self._executor_id, queues)

    async def _close(self) -> None:
        """Let go without recording anything: what was in flight runs again wherever it is resumed."""
        self._is_open = False
        if self._accepting:
            await asyncio.wait(list(self._accepting.values()))
        for keeper in self._keepers:
            keeper.cancel()
        stopped = self._stop(self._all_executions(), "closing")
        tasks = {*self._keepers, *self._background, *stopped}
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_TEARDOWN_S)
            if left:
                log.warning("steps_ignore_cancellation", count=len(left))
        for run in list(self._runs.values()):
            self._leave(run, None)
        if self._writer is not None:
            await self._writer.close()
        await asyncio.to_thread(self._withdraw)

    def _withdraw(self) -> None:
        """Others may have what was ours."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._heartbeat.has_begun:
                try:
                    self._queues.hand_back(self._executor_id)
                    self._leases.leave(self._executor_id)
                except AgenticFlowError as error:  # others then wait for the lease to run out
                    log.warning("leave_failed", error=error.message)
            self._heartbeat = None
        self._present.close()

    async def drain(self, timeout_s: float) -> int:
        """See RunEngine."""
        self._check_open()
        self._is_draining = True
        not_begun = [
            run
            for run in self._runs.values()
            if run.is_accepted and not run.has_place and not self._executions.get(run.workflow_id)
        ]
        for run in not_begun:
            self._leave(run, None)
        try:
            await unbroken(asyncio.to_thread(self._leases.serve, self._executor_id, ()))
            await unbroken(asyncio.to_thread(self._hand_over, [run.workflow_id for run in not_begun]))
        except AgenticFlowError as error:  # the close will try again
            log.warning("hand_over_failed", error=error.message)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(run.has_place for run in self._runs.values()):
                    self._place_given_back.clear()
                    await self._place_given_back.wait()
        return len(self._runs)

    @property
    def working(self) -> int:
        """See RunEngine."""
        return sum(run.has_place for run in self._runs.values())

    def _hand_over(self, run_ids: Sequence[str]) -> None:
        self._queues.hand_back(self._executor_id, run_ids)
        self._leases.hand_on(self._executor_id, run_ids)

    async def health(self) -> EngineHealth:
        """See RunEngine."""
        self._check_open()
        assert self._heartbeat is not None
        return EngineHealth(
            database=await answers(self._database),
            heartbeat=self._heartbeat.is_fresh(self._lease_s),
        )

    # ---- what runs beside the workflows ------------------------------------------------------------------

    async def _watch(self) -> None:
        """Notice what others did to our workflows: cancelled them, or took them over while we were silent."""
        here = {run.workflow_id: run for run in self._runs.values() if run.is_accepted}
        if not self._custody.must_compare(here):
            return
        children = [e.workflow_id for e in self._all_executions() if e.workflow_id != e.run.workflow_id]
        held = {workflow_id: run.fence.epoch for workflow_id, run in here.items()}
        owned = await asyncio.to_thread(self._leases.owned, self._executor_id)
        gone = self._custody.lost(held, owned)
        statuses = await asyncio.to_thread(self._leases.statuses, [*gone, *children])
        for workflow_id in gone:
            run = self._runs.get(workflow_id)
            if run is not None and run is here[workflow_id] and not run.is_ending:
                self._stop_run(run, "cancelled" if statuses.get(workflow_id) == "cancelled" else "lost")
        for workflow_id in children:
            if statuses.get(workflow_id) == "cancelled":
                self._stop_tree(workflow_id, "cancelled")
        await self._watch_pauses()
        await self._release_idle(owned)

    async def _watch_pauses(self) -> None:
        """Notice which of our workflows others have paused, or let go on."""
        changed = self._pauses_changed
        runs = {run.workflow_id: run for run in self._runs.values() if run.is_accepted}
        paused = await asyncio.to_thread(self._pauses.among, runs)
        if changed == self._pauses_changed:  # else what was read may be older than what we know
            for workflow_id, run in runs.items():
                self._set_paused(run, workflow_id in paused)

    def _set_paused(self, run: Run, paused: bool) -> None:
        if paused and run.unpaused is None:
            run.unpaused = asyncio.Event()
        elif not paused and run.unpaused is not None:
            run.unpaused.set()
            run.unpaused = None

    async def _look(self) -> None:
        """Wake who waits for a message that another process has sent."""
        if roots := self._waiters.roots:
            self._waiters.note(await asyncio.to_thread(self._inbox.newest, roots))

    async def _release_idle(self, owned: Mapping[str, int]) -> None:
        """Let go, again, of what is ours in the store and executed by nobody: its end was not written."""
        executed = {workflow_id for workflow_id, run in self._runs.items() if run.is_accepted}
        under_way = {*self._accepting, *self._claiming}
        for workflow_id, epoch in self._custody.to_release(owned, executed, under_way).items():
            await asyncio.to_thread(self._leases.release, workflow_id, Fence(self._executor_id, epoch))

    async def _expire(self) -> None:
        for workflow_id in await asyncio.to_thread(self._queues.expire):
            log.info("queued_run_expired", workflow_id=workflow_id)

    async def _settle_queued(self) -> None:
        if await asyncio.to_thread(self._dependencies.settle, QUEUED_BY):
            self._wake_claimer()

    async def _settle_own(self) -> None:
        """Let our runs go on that waited for others."""
        held = {run.workflow_id: run for run in self._runs.values() if run.is_held and run.is_accepted}
        if not held:
            return
        await asyncio.to_thread(self._dependencies.settle, self._executor_id)
        # Asked for, not told: of an earlier round perhaps only the answer was lost.
        free = held.keys() - await asyncio.to_thread(self._dependencies.waiting_among, held)
        now_s = self.clock.time_s()
        free |= {i for i, run in held.items() if run.deadline_s is not None and now_s >= run.deadline_s}
        statuses = await asyncio.to_thread(self._leases.statuses, sorted(free))
        for workflow_id in sorted(free, key=lambda one: held[one].accepted_at_s):
            run = held[workflow_id]
            if self._runs.get(workflow_id) is not run or not run.is_held:
                continue
            if statuses.get(workflow_id) in UNFINISHED:  # or is late, which it fails of when it begins
                run.is_held = False
                self._enter(run)
            else:
                self._leave(run, None)  # it can never begin, and has failed

    async def _take_orphans(self) -> None:
        async with self._taking_over:  # one after the other, so that the oldest are first
            for workflow_id in await self.resume_interrupted():
                log.info("workflow_taken_over", workflow_id=workflow_id)

    async def _take_handed_on(self) -> None:
        """What another process has let go of needs no lease to run out."""
        if self._places_max and await asyncio.to_thread(self._leases.has_handed_on):
            await self._take_orphans()

    # ---- callers -----------------------------------------------------------------------------------------

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
        if workflow_id in self._runs:
            return False
        if queue is None and (not self._places_max or not_before_s is not None):
            queue = DEFAULT_QUEUE
        fence = Fence(self._executor_id if queue is None else QUEUED_BY, 1)
        run = Run(workflow_id, name, tenant, priority, text, fence, self.clock.time_s(), is_new=True)
        run.deadline_s = deadline_s
        if queue is not None:
            queued = {"queue": queue, "not_before_s": not_before_s, "deadline_s": deadline_s}
            return await self._queue(workflow_id, Accept(row_of(run), queued, unmet, after_any_end))
        self._check_begins()
        run.is_held = bool(unmet)
        self._enter(run)
        run.starts_at_once = run.has_place  # stored as running: no second write when it begins
        accepting = self._write(Accept(row_of(run), None, unmet, after_any_end))
        self._accepting[workflow_id] = accepting
        accepting.add_done_callback(lambda _: self._accepted(run, accepting))
        return bool(await asyncio.shield(accepting))

    async def _unmet(self, tenant: str, after: Sequence[str], any_end: bool) -> list[str]:
        if not after:
            return []
        return await asyncio.to_thread(self._dependencies.unmet, tenant, after, any_end=any_end)

    async def _queue(self, workflow_id: str, accept: Accept) -> bool:
        accepting = self._write(accept)
        self._accepting[workflow_id] = accepting

        def accepted(_: asyncio.Future[checkpoints.Answer]) -> None:
            self._accepting.pop(workflow_id, None)
            self._wake_claimer()

        accepting.add_done_callback(accepted)
        return bool(await asyncio.shield(accepting))

    def _wake_claimer(self) -> None:
        if self._claimer is not None:
            self._claimer.wake()

    def _accepted(self, run: Run, accepting: asyncio.Future[checkpoints.Answer]) -> None:
        """Called when the store has the workflow, or another one under this id, or failed."""
        self._accepting.pop(run.workflow_id, None)
        # Looked at here as well: the caller may have gone.
        if accepting.cancelled() or accepting.exception() is not None:
            self._custody.doubt()  # perhaps only the answer was lost
            self._leave(run, None)
            return
        if not accepting.result():
            self._leave(run, None)
            return
        run.is_accepted = True
        if self._is_open:
            self._begin_if_placed(run)
        else:
            self._leave(run, None)

    async def wait(self, workflow_id: str) -> WorkflowRecord:
        """See RunEngine.

        Raises:
            Unavailable: the workflow is not in the run database.
            NeedsNewer: this build cannot go on with it.
        """
        pause_s = _WAIT_FIRST_S
        while True:
            run = self._runs.get(workflow_id)
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
            if record.state == "interrupted" and not self._takes_over and workflow_id in self._refused:
                raise self._refused[workflow_id]  # alone with the run database: nobody else will end it
            if workflow_id not in self._runs:
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
        self._waiters.wake(workflow_id)
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
        run = self._runs.get(workflow_id)
        if has_changed and run is not None:
            self._pauses_changed += 1
            self._set_paused(run, paused)
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
            await self._left(workflow_id, "cancelled")
        if record.queue is not None or not self._places_max:
            return await unbroken(self._put_back(workflow_id, asked=True))
        self._check_begins()
        return await unbroken(self._continue(workflow_id, asked=True))

    async def resume_interrupted(self) -> list[str]:
        """See RunEngine. Takes only workflows whose name is registered here."""
        self._check_open()
        if self._is_draining:
            return []
        me = self._executor_id
        queued = await asyncio.to_thread(self._leases.orphans, None, asker=me, queued=True)
        found = [each for each in queued if await unbroken(self._put_back(each, asked=False))]
        if not self._places_max:
            return found
        names = list(self._workflows)
        others = await asyncio.to_thread(self._leases.orphans, names, asker=me, queued=False)
        others = [each for each in others if each not in self._refused]
        return found + [each for each in others if await unbroken(self._continue(each, asked=False))]

    async def cancel(self, workflow_id: str) -> bool:
        """See RunEngine. Owners in other processes notice within a second."""
        self._check_open()
        cancelled = await unbroken(asyncio.to_thread(self._leases.cancel, workflow_id))
        if cancelled:
            run = self._runs.get(workflow_id)
            if run is not None:
                self._stop_run(run, "cancelled")
            else:
                self._stop_tree(workflow_id, "cancelled")
        return cancelled

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
        self._claiming.add(new_id)
        try:
            accept = Retries(self._database, self.clock).accept
            queue = record.queue if record is not None else None
            queue = queue if self._places_max else queue or DEFAULT_QUEUE
            if queue is None:
                self._check_begins()
            me = self._executor_id if queue is None else NOBODY
            accepted_at_s = await asyncio.to_thread(
                accept, workflow_id, new_id, payload, from_step=from_step, executor_id=me
            )
            if accepted_at_s is None or record is None:
                return False
            if queue is not None:
                return await self._put_back(new_id, asked=True, queue=queue)
            run = Run(
                new_id, record.name, record.tenant, 0, payload, Fence(me, 1), accepted_at_s, is_new=False
            )
            run.is_accepted = True
            if self._is_open:
                self._enter(run)
            return True
        except Unavailable:
            self._custody.doubt()  # perhaps it was stored: only the answer was lost
            raise
        finally:
            self._claiming.discard(new_id)

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
        return await asyncio.to_thread(self._leases.is_served, queue)

    async def queue_depths(self) -> list[QueueDepth]:
        """See RunEngine."""
        self._check_open()
        return await asyncio.to_thread(self._queues.depths)

    # ---- top-level workflows -----------------------------------------------------------------------------

    async def _continue(self, workflow_id: str, *, asked: bool) -> bool:
        """Claim a workflow and execute its unfinished part here."""
        if not self._is_open or self._is_draining or workflow_id in self._claiming:
            return False
        self._claiming.add(workflow_id)
        try:
            claim = await asyncio.to_thread(self._leases.claim, workflow_id, self._executor_id, asked=asked)
            if claim is None:
                return False
            await self._left(workflow_id, "lost")  # what another process had taken over from us
            run = run_of(claim, is_new=False)
            self._set_paused(run, bool(await asyncio.to_thread(self._pauses.among, [workflow_id])))
            run.is_held = bool(await asyncio.to_thread(self._dependencies.waiting_among, [workflow_id]))
            self._enter(run)
            return True
        except Unavailable:
            self._custody.doubt()  # perhaps it is ours: only the answer was lost, or what comes after failed
            raise
        finally:
            self._claiming.discard(workflow_id)

    async def _put_back(self, workflow_id: str, *, asked: bool, queue: str = DEFAULT_QUEUE) -> bool:
        """Let it wait in its shared queue again, or in this one, for whoever takes it."""
        claim = await asyncio.to_thread(self._leases.claim, workflow_id, QUEUED_BY, asked=asked, queue=queue)
        self._wake_claimer()
        return claim is not None

    async def _enter_taken(self, claims: Sequence[Claim]) -> None:
        """Begin what was taken from a shared queue for the places that are free."""
        ids = {claim.workflow_id for claim in claims}
        if self._is_draining:  # since it was asked for
            await asyncio.to_thread(self._hand_over, sorted(ids))
            return
        self._claiming |= ids
        try:
            paused = await asyncio.to_thread(self._pauses.among, ids) if ids else set[str]()
            for claim in claims:
                await self._left(claim.workflow_id, "lost")
                run = run_of(claim, is_new=claim.is_new)
                self._set_paused(run, claim.workflow_id in paused)
                self._enter(run)
        finally:
            self._claiming -= ids

    def _enter(self, run: Run) -> None:
        self._runs[run.workflow_id] = run
        if not run.is_held:
            self._places.ask(run)
            self._admit()

    def _admit(self) -> None:
        for admitted in self._places.admit():
            admitted.has_place = True
            if admitted.placed is None:
                self._begin_if_placed(admitted)
            else:
                admitted.placed.set()  # it is being executed: only who waits in it goes on
                admitted.placed = None

    def _begin_if_placed(self, run: Run) -> None:
        if run.has_place and run.is_accepted and self._is_open:
            self._execute(Execution(run, run.workflow_id, run.name, run.payload, is_new=run.is_new))

    def _leave(self, run: Run, record: WorkflowRecord | None) -> None:
        """It is no longer ours to execute."""
        if self._runs.get(run.workflow_id) is run:
            del self._runs[run.workflow_id]
        if not run.ended.done():
            run.ended.set_result(record)
        run.has_place = False
        self._given_back(run)

    def _given_back(self, run: Run) -> None:
        self._places.give_back(run)
        if self._is_open:
            self._admit()
        self._place_given_back.set()
        self._wake_claimer()

    async def _left(self, workflow_id: str, reason: StopReason) -> None:
        """Wait for executions here that still clean up: their steps must not run twice at once."""
        if (before := self._runs.get(workflow_id)) is not None:
            self._stop_run(before, reason)
        old = self._stop_tree(workflow_id, reason)
        if old:
            await asyncio.wait(old, timeout=_TEARDOWN_S)

    def _stop_run(self, run: Run, reason: StopReason) -> None:
        """Interrupt a top-level workflow, whether it works or waits for its place."""
        self._stop_tree(run.workflow_id, reason)
        if not self._executions.get(run.workflow_id):
            self._leave(run, None)

    # ---- execution ---------------------------------------------------------------------------------------

    def _write(self, operation: checkpoints.Operation) -> asyncio.Future[checkpoints.Answer]:
        assert self._writer is not None
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
            self._leave(run, execution.record)
        elif not execution.result.done() and execution.stopped == "cancelled":
            told = Cancelled(f"workflow {execution.workflow_id!r} was cancelled")
            execution.result.set_result({"error": as_problem(told)})
        if execution.task.cancelled() or (error := execution.task.exception()) is None:
            return
        # The store could not be used, or not be understood: let go, so that it is continued where it can.
        log.error("workflow_abandoned", workflow_id=execution.workflow_id, error=str(error))
        if isinstance(error, NeedsNewer):
            while len(self._refused) >= _REFUSED_MAX:
                del self._refused[next(iter(self._refused))]
            self._refused[run.workflow_id] = error
        self._stop_run(run, "lost")
        self._custody.doubt()
        releasing = asyncio.create_task(self._release(run))
        self._background.add(releasing)
        releasing.add_done_callback(self._background.discard)

    async def _release(self, run: Run) -> None:
        try:
            if (refusal := self._refused.get(run.workflow_id)) is not None:
                await asyncio.to_thread(self._leave_to_others, run, refusal.message)
                self._wake_claimer()
            else:
                await asyncio.to_thread(self._leases.release, run.workflow_id, run.fence)
        except AgenticFlowError as error:
            log.warning("release_failed", workflow_id=run.workflow_id, error=error.message)

    def _leave_to_others(self, run: Run, why: str) -> None:
        if not self._queues.hand_back(self._executor_id, [run.workflow_id], why=why):
            self._leases.leave_to_others(run.workflow_id, run.name, run.fence, why)

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
        name = execution.name
        try:
            output = encoded(await self._call(execution))
        except asyncio.CancelledError as error:
            if execution.is_being_stopped:
                raise
            failure = internal(f"workflow {name!r}", error)
        except NeedsNewer:
            raise
        except AgenticFlowError as error:
            if error is execution.unusable:
                raise
            failure = error
        except Exception as error:
            log.exception("workflow_failed", workflow_id=execution.workflow_id, workflow=name)
            failure = internal(f"workflow {name!r}", error)
        else:
            if execution.broken is None:
                return output, None
            failure = execution.broken
        return None, as_problem(execution.broken or failure)

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
                execution.history = await asyncio.to_thread(recorded_history, self._database, execution)
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
            answer = await self._write(checkpoint)
        except AgenticFlowError as error:
            execution.unusable = error
            raise
        if answer != "granted":
            self._give_up(execution, "cancelled" if answer == "cancelled" else "lost")

    def _give_up(self, execution: Execution, reason: StopReason) -> NoReturn:
        if execution.stopped is None:
            if reason == "cancelled":
                self._stop_tree(execution.workflow_id, "cancelled")
            else:
                log.warning("workflow_lost", workflow_id=execution.workflow_id)
                self._stop_tree(execution.run.workflow_id, "lost")
        raise asyncio.CancelledError

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
            cancelling = asyncio.to_thread(self._leases.cancel, child_id, only_as=execution.run.fence)
            try:
                was_running = await unbroken(cancelling)
            except Unavailable as error:
                execution.unusable = error
                raise
            if was_running:
                self._stop_tree(child_id, "cancelled")

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
            found, left_s = await patiently(self._inbox.last, run.workflow_id, topic, known, until_s)
            if found is not None or left_s <= 0:
                return found
            until_here_s = self.clock.time_s() + left_s

    async def _message_before(
        self, execution: Execution, topic: str, known: Collection[str], until_s: float | None
    ) -> MessageRecord | None:
        run_id = execution.run.workflow_id
        with self._waiters.waiting(run_id) as woken:
            found = await patiently(self._inbox.oldest, run_id, topic, known)
            if found is None:
                with self._idle(execution):
                    while found is None and await woken_before(woken, until_s, self.clock):
                        found = await patiently(self._inbox.oldest, run_id, topic, known)
        return found

    def _rest(self, run: Run) -> None:
        """Give the tree's place back if all of it waits: for messages, or for children that do."""
        if run.has_place and all(e.is_idle for e in self._executions.get(run.workflow_id, ())):
            run.has_place = False
            self._given_back(run)

    async def go_on(self, execution: Execution) -> None:
        """See EngineOfExecution. While it is paused the tree needs no place, if nothing of it still works."""
        run = execution.run
        while (unpaused := run.unpaused) is not None or not run.has_place:
            if unpaused is None:
                await self._take_place(run)
                continue
            with self._idle(execution):
                await unpaused.wait()

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
                self._places.ask(run, returns=True)
                self._admit()
            else:
                placed = run.placed
            await placed.wait()

    def _all_executions(self) -> list[Execution]:
        return [execution for each in self._executions.values() for execution in each]

    def _stop_tree(self, workflow_id: str, reason: StopReason) -> list[asyncio.Task[None]]:
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

    @property
    def _reader(self) -> RunReader:
        return self._open_reader if self._is_open else self._closed_reader

    @property
    def _pauses(self) -> Pauses:
        return self._open_pauses if self._is_open else self._closed_pauses

    @property
    def _inbox(self) -> Inbox:
        return self._open_inbox if self._is_open else self._closed_inbox

    def _check_begins(self) -> None:
        if self._is_draining:
            raise Unavailable(
                "this process is about to stop, and begins no more runs",
                hint="send it again: to another process, or when this one is back",
            )

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the run engine is not open", hint="use it inside `async with engine.open()`")
