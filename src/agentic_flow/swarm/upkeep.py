"""What a process looks after beside its workflows: what others did to them, and what waits for something."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import structlog

from agentic_flow.swarm.executor import Executor, RunStores
from agentic_flow.swarm.handover import Handover
from agentic_flow.swarm.heartbeat import keep
from agentic_flow.swarm.scheduling import QUEUED_BY, UNFINISHED, Fence

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_WATCH_S = 0.5
_LOOK_S = 0.25
_EXPIRE_S = 1.0
_SETTLE_S = 0.5


class Upkeep:
    """See this module. Made and used on one event loop.

    Args:
        stores: The run database.
        executor_id: The process.
        executor: What it executes.
        handover: What it takes.
        accepting: Ids of what is being stored as this process's.
    """

    def __init__(
        self,
        stores: RunStores,
        executor_id: str,
        executor: Executor,
        handover: Handover,
        accepting: Collection[str],
    ) -> None:
        self._stores = stores
        self._executor_id = executor_id
        self._executor = executor
        self._handover = handover
        self._accepting = accepting

    def keepers(self, *, for_others: bool) -> list[asyncio.Task[None]]:
        """Tasks that do it until they are cancelled.

        Args:
            for_others: Whether to look after what waits in shared queues as well.
        """
        tasks = [keep(_WATCH_S, self._watch), keep(_LOOK_S, self._look), keep(_SETTLE_S, self._settle_own)]
        if for_others:
            tasks += [keep(_EXPIRE_S, self._expire), keep(_SETTLE_S, self._settle_queued)]
        return tasks

    async def _watch(self) -> None:
        """Notice what others did to our workflows: cancelled them, or took them over while we were silent."""
        here = {run.workflow_id: run for run in self._executor.runs.values() if run.is_accepted}
        if not self._executor.custody.must_compare(here):
            return
        children = [
            e.workflow_id for e in self._executor.all_executions() if e.workflow_id != e.run.workflow_id
        ]
        held = {workflow_id: run.fence.epoch for workflow_id, run in here.items()}
        owned = await asyncio.to_thread(self._stores.leases.owned, self._executor_id)
        gone = self._executor.custody.lost(held, owned)
        statuses = await asyncio.to_thread(self._stores.leases.statuses, [*gone, *children])
        for workflow_id in gone:
            run = self._executor.runs.get(workflow_id)
            if run is not None and run is here[workflow_id] and not run.is_ending:
                self._executor.stop_run(
                    run, "cancelled" if statuses.get(workflow_id) == "cancelled" else "lost"
                )
        for workflow_id in children:
            if statuses.get(workflow_id) == "cancelled":
                self._executor.stop_tree(workflow_id, "cancelled")
        await self._watch_pauses()
        await self._release_idle(owned)

    async def _watch_pauses(self) -> None:
        """Notice which of our workflows others have paused, or let go on."""
        changed = self._executor.pauses_changed
        runs = {run.workflow_id: run for run in self._executor.runs.values() if run.is_accepted}
        paused = await asyncio.to_thread(self._stores.pauses.among, runs)
        if changed == self._executor.pauses_changed:  # else what was read may be older than what we know
            for workflow_id, run in runs.items():
                self._executor.set_paused(run, workflow_id in paused)

    async def _look(self) -> None:
        """Wake who waits for a message that another process has sent."""
        if roots := self._executor.waiters.roots:
            self._executor.waiters.note(await asyncio.to_thread(self._stores.inbox.newest, roots))

    async def _release_idle(self, owned: Mapping[str, int]) -> None:
        """Let go, again, of what is ours in the store and executed by nobody: its end was not written."""
        executed = {workflow_id for workflow_id, run in self._executor.runs.items() if run.is_accepted}
        under_way = {*self._accepting, *self._handover.claiming}
        for workflow_id, epoch in self._executor.custody.to_release(owned, executed, under_way).items():
            await asyncio.to_thread(self._stores.leases.release, workflow_id, Fence(self._executor_id, epoch))

    async def _expire(self) -> None:
        for workflow_id in await asyncio.to_thread(self._stores.queues.expire):
            log.info("queued_run_expired", workflow_id=workflow_id)

    async def _settle_queued(self) -> None:
        if await asyncio.to_thread(self._stores.dependencies.settle, QUEUED_BY):
            self._handover.wake()

    async def _settle_own(self) -> None:
        """Let our runs go on that waited for others."""
        held = {
            run.workflow_id: run for run in self._executor.runs.values() if run.is_held and run.is_accepted
        }
        if not held:
            return
        await asyncio.to_thread(self._stores.dependencies.settle, self._executor_id)
        # Asked for, not told: of an earlier round perhaps only the answer was lost.
        free = held.keys() - await asyncio.to_thread(self._stores.dependencies.waiting_among, held)
        now_s = self._executor.clock.time_s()
        free |= {i for i, run in held.items() if run.deadline_s is not None and now_s >= run.deadline_s}
        statuses = await asyncio.to_thread(self._stores.leases.statuses, sorted(free))
        for workflow_id in sorted(free, key=lambda one: held[one].accepted_at_s):
            run = held[workflow_id]
            if self._executor.runs.get(workflow_id) is not run or not run.is_held:
                continue
            if statuses.get(workflow_id) in UNFINISHED:  # or is late, which it fails of when it begins
                run.is_held = False
                self._executor.enter(run)
            else:
                self._executor.leave(run, None)  # it can never begin, and has failed
