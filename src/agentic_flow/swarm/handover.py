"""How workflows change hands: what a process takes over, or from a queue, and what it lets others have."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from agentic_flow.core.errors import AgenticFlowError, NeedsNewer, Unavailable
from agentic_flow.core.ports import Workflow
from agentic_flow.swarm.claiming import Claimer
from agentic_flow.swarm.execution import Run, run_of
from agentic_flow.swarm.executor import Executor, RunStores
from agentic_flow.swarm.heartbeat import keep, unbroken
from agentic_flow.swarm.leases import Claim
from agentic_flow.swarm.scheduling import DEFAULT_QUEUE, QUEUED_BY

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_HANDED_ON_S = 0.5
_REFUSED_MAX = 10_000


class Handover:
    """See this module. Made and used on one event loop.

    Args:
        stores: The run database.
        executor_id: The process.
        workflows: The workflows that it knows.
        lease_s: A process silent for this long has lost its workflows.
        executes: Whether this process executes anything.

    Attributes:
        claiming: Ids of what is being claimed: ours in the store, perhaps, and not executed yet.
        refused: What this build cannot go on with, and why; it leaves that to others.
        is_draining: Whether the process is about to stop: it takes nothing more.
        background: Tasks that end by themselves.
    """

    def __init__(
        self,
        stores: RunStores,
        executor_id: str,
        workflows: Mapping[str, Workflow],
        *,
        lease_s: float,
        executes: bool,
    ) -> None:
        self._stores = stores
        self._executor_id = executor_id
        self._workflows = workflows
        self._lease_s = lease_s
        self._executes = executes
        self.claiming: set[str] = set()
        self.refused: dict[str, NeedsNewer] = {}
        self.is_draining = False
        self.background: set[asyncio.Task[Any]] = set()
        self._taking_over = asyncio.Lock()
        self._claimer: Claimer | None = None
        self._executor: Executor

    def serve(self, executor: Executor) -> None:
        """Take for this executor, which in turn calls `wake` and `let_go`."""
        self._executor = executor

    def keepers(self, *, takeover: bool, queues: Sequence[str]) -> list[asyncio.Task[None]]:
        """What goes on beside the workflows, until it is cancelled.

        Args:
            takeover: Whether to take over what dead processes had.
            queues: Shared queues to take runs from.
        """
        tasks: list[asyncio.Task[None]] = []
        if takeover:
            # The lease and this must be within 15 s, with the default lease of 10 s and some to spare.
            tasks.append(keep(self._lease_s / 4, self._take_orphans))
            tasks.append(keep(_HANDED_ON_S, self._take_handed_on))
        return tasks + self._claim_from(queues)

    def wake(self) -> None:
        """Something was put into a queue, or a place has become free."""
        if self._claimer is not None:
            self._claimer.wake()

    # ---- taking --------------------------------------------------------------------------------------------

    def _claim_from(self, queues: Sequence[str]) -> list[asyncio.Task[None]]:
        if not queues or not self._executes:
            return []
        self._claimer = Claimer(
            self._stores.database,
            self._stores.queues,
            self._executor_id,
            names=queues,
            workflows=self._workflows,
            free=lambda: 0 if self.is_draining else self._executor.places.free,
            enter=self._enter_taken,
            doubt=self._executor.custody.doubt,
            besides=self.refused.keys(),
        )
        tasks = [asyncio.create_task(self._claimer.run())]
        if not self._stores.database.is_sqlite:
            tasks.append(asyncio.create_task(self._claimer.listen()))
        return tasks

    async def _take_orphans(self) -> None:
        async with self._taking_over:  # one after the other, so that the oldest are first
            for workflow_id in await self.resume_interrupted():
                log.info("workflow_taken_over", workflow_id=workflow_id)

    async def _take_handed_on(self) -> None:
        """What another process has let go of needs no lease to run out."""
        if self._executes and await asyncio.to_thread(self._stores.leases.has_handed_on):
            await self._take_orphans()

    async def resume_interrupted(self) -> list[str]:
        """See RunEngine. Takes only workflows whose name is registered here."""
        if self.is_draining:
            return []
        me = self._executor_id
        queued = await asyncio.to_thread(self._stores.leases.orphans, None, asker=me, queued=True)
        found = [each for each in queued if await unbroken(self.put_back(each, asked=False))]
        if not self._executes:
            return found
        names = list(self._workflows)
        others = await asyncio.to_thread(self._stores.leases.orphans, names, asker=me, queued=False)
        others = [each for each in others if each not in self.refused]
        return found + [each for each in others if await unbroken(self.go_on_with(each, asked=False))]

    async def go_on_with(self, workflow_id: str, *, asked: bool) -> bool:
        """Claim a workflow and execute its unfinished part here."""
        if not self._executor.is_open or self.is_draining or workflow_id in self.claiming:
            return False
        self.claiming.add(workflow_id)
        try:
            claim = await asyncio.to_thread(
                self._stores.leases.claim, workflow_id, self._executor_id, asked=asked
            )
            if claim is None:
                return False
            await self._executor.left(workflow_id, "lost")  # what another process had taken over from us
            run = run_of(claim, is_new=False)
            self._executor.set_paused(
                run, bool(await asyncio.to_thread(self._stores.pauses.among, [workflow_id]))
            )
            run.is_held = bool(
                await asyncio.to_thread(self._stores.dependencies.waiting_among, [workflow_id])
            )
            self._executor.enter(run)
            return True
        except Unavailable:
            # Perhaps it is ours: only the answer was lost, or what comes after failed.
            self._executor.custody.doubt()
            raise
        finally:
            self.claiming.discard(workflow_id)

    async def put_back(self, workflow_id: str, *, asked: bool, queue: str = DEFAULT_QUEUE) -> bool:
        """Let it wait in its shared queue again, or in this one, for whoever takes it."""
        claim = await asyncio.to_thread(
            self._stores.leases.claim, workflow_id, QUEUED_BY, asked=asked, queue=queue
        )
        self.wake()
        return claim is not None

    async def _enter_taken(self, claims: Sequence[Claim]) -> None:
        """Begin what was taken from a shared queue for the places that are free."""
        ids = {claim.workflow_id for claim in claims}
        if self.is_draining:  # since it was asked for
            await asyncio.to_thread(self.hand_over, sorted(ids))
            return
        self.claiming |= ids
        try:
            paused = await asyncio.to_thread(self._stores.pauses.among, ids) if ids else set[str]()
            for claim in claims:
                await self._executor.left(claim.workflow_id, "lost")
                run = run_of(claim, is_new=claim.is_new)
                self._executor.set_paused(run, claim.workflow_id in paused)
                self._executor.enter(run)
        finally:
            self.claiming -= ids

    # ---- letting go ----------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Take nothing more, let others have what has not begun, and wait for what works.

        Args:
            timeout_s: For so long.
        """
        self.is_draining = True
        executor, not_begun = self._executor, self._executor.not_begun
        for run in not_begun:
            executor.leave(run, None)
        try:
            await unbroken(asyncio.to_thread(self._stores.leases.serve, self._executor_id, ()))
            await unbroken(asyncio.to_thread(self.hand_over, [run.workflow_id for run in not_begun]))
        except AgenticFlowError as error:  # the close will try again
            log.warning("hand_over_failed", error=error.message)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while executor.working:
                    executor.place_given_back.clear()
                    await executor.place_given_back.wait()

    def let_go(self, run: Run, error: BaseException) -> None:
        """What could not be gone on with: its store was away, or a newer build is needed."""
        if isinstance(error, NeedsNewer):
            while len(self.refused) >= _REFUSED_MAX:
                del self.refused[next(iter(self.refused))]
            self.refused[run.workflow_id] = error
        releasing = asyncio.create_task(self._release(run))
        self.background.add(releasing)
        releasing.add_done_callback(self.background.discard)

    async def _release(self, run: Run) -> None:
        try:
            if (refusal := self.refused.get(run.workflow_id)) is not None:
                await asyncio.to_thread(self._leave_to_others, run, refusal.message)
                self.wake()
            else:
                await asyncio.to_thread(self._stores.leases.release, run.workflow_id, run.fence)
        except AgenticFlowError as error:
            log.warning("release_failed", workflow_id=run.workflow_id, error=error.message)

    def _leave_to_others(self, run: Run, why: str) -> None:
        if not self._stores.queues.hand_back(self._executor_id, [run.workflow_id], why=why):
            self._stores.leases.leave_to_others(run.workflow_id, run.name, run.fence, why)

    def hand_over(self, run_ids: Sequence[str]) -> None:
        """Let others have these, which are not executed here any more. Blocks."""
        self._stores.queues.hand_back(self._executor_id, run_ids)
        self._stores.leases.hand_on(self._executor_id, run_ids)

    def check_begins(self) -> None:
        """Refuse to begin anything in a process that is about to stop.

        Raises:
            Unavailable: it is.
        """
        if self.is_draining:
            raise Unavailable(
                "this process is about to stop, and begins no more runs",
                hint="send it again: to another process, or when this one is back",
            )
