"""What `agentic-flow serve` makes when it is first needed: groups of routes, and the run engine.

A process that only answers model calls starts without the libraries of memory and runs, and keeps their
memory for its callers. What is wrong with the databases that are there is said at the start all the same.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog
from starlette.routing import BaseRoute, Match, Router
from starlette.types import Receive, Scope, Send

from agentic_flow.core.clock import SYSTEM_CLOCK
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.dependencies import Dependencies
from agentic_flow.swarm.heartbeat import Heartbeat, answers
from agentic_flow.swarm.leases import Leases, RunDatabase
from agentic_flow.swarm.queue_metrics import QueueMetrics
from agentic_flow.swarm.queues import RunQueues
from agentic_flow.swarm.schedule_rows import is_any_due

_LOOK_S = 1.0
"""So long what another process hands on, or puts into a queue, waits for a process that was idle so far."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.serve")


class DeferredRoutes(BaseRoute):
    """Routes that are made when the first request for one of them comes.

    That request, and those that come meanwhile, wait for it. When it fails they get the error, and the next
    one tries again.

    Args:
        roots: The paths that they have, and below which they are (`/v1/runs`).
        make: Makes them.
    """

    def __init__(self, roots: Sequence[str], make: Callable[[], Awaitable[Sequence[BaseRoute]]]) -> None:
        self._roots = tuple(roots)
        self._below = tuple(f"{root}/" for root in roots)
        self._make = make
        self._making = asyncio.Lock()
        self._router: Router | None = None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See BaseRoute: by the path alone. Which route, and whether there is one, is asked afterwards."""
        path: str = scope["path"] if scope["type"] == "http" else ""
        return (Match.FULL if path in self._roots or path.startswith(self._below) else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See BaseRoute.

        Raises:
            AgenticFlowError: what the routes are for cannot be had now.
            HTTPException: there is no such route, or it does not take the method.
        """
        async with self._making:
            if self._router is None:
                self._router = Router([*await self._make()])
        await self._router(scope, receive, send)


class RunWatch:
    """Looks for runs that nobody executes, with a cheap question and without the run engine.

    They are interrupted, wait in a shared queue that this process works for, or are to be made by a schedule.
    It measures the queues, too.

    Args:
        settings: The section `swarm`.
        data_dir: Folder of local state.
        begun: Whether the run engine is at work, which then looks for itself.
        begin: Puts it to work.
    """

    def __init__(
        self,
        settings: SwarmSettings,
        data_dir: Path,
        *,
        begun: Callable[[], bool],
        begin: Callable[[], Awaitable[object]],
    ) -> None:
        url = settings.database_url.get_secret_value() if settings.database_url else None
        self._database = RunDatabase(url, data_dir)
        self._leases = Leases(self._database, lease_s=settings.lease_s)
        self._queues = RunQueues(self._database, SYSTEM_CLOCK, queue_runs_max={}, tenant_runs_max=None)
        self._dependencies = Dependencies(self._database, SYSTEM_CLOCK)
        self._names = settings.queues if settings.runs_parallel_max else ()
        self.metrics = QueueMetrics(lambda: asyncio.to_thread(self._queues.depths), settings.queues)
        """How the shared queues stand, for `/metrics`; there are figures once `start` was called."""
        self._heartbeat = Heartbeat(
            self._leases, f"{socket.gethostname()}-watch-{secrets.token_hex(6)}", settings.lease_s / 4
        )
        self._present = ExitStack()
        self._announced = False
        self._interval_s = min(_LOOK_S, settings.lease_s / 2)
        self._begun = begun
        self._begin = begin
        self._task: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what is interrupted now, and go on looking.

        Raises:
            Unavailable: the run database cannot be used.
            DataCorrupted: it is damaged.
        """
        await asyncio.to_thread(self._database.create)
        if self._names:
            await asyncio.to_thread(self._announce)
        self._measuring = asyncio.create_task(self.metrics.keep_fresh(), name="queue-metrics")
        if not await self._look():
            self._task = asyncio.create_task(self._keep_looking(), name="run-watch")

    def _announce(self) -> None:
        """Let others know that the queues are served, though the engine is not at work yet."""
        executor_id = self._heartbeat.executor_id
        self._present.enter_context(self._leases.presence(executor_id))
        self._heartbeat.start()
        self._announced = True
        self._leases.serve(executor_id, self._names)

    def _withdraw(self) -> None:
        if self._announced:
            self._announced = False
            self._heartbeat.stop()
            try:
                self._leases.leave(self._heartbeat.executor_id)
            except AgenticFlowError as error:  # others then wait for its lease to run out
                _log.warning("leave_failed", error=error.message)
        self._present.close()
        self._database.close()

    async def works(self) -> bool:
        """Whether the run database can be read."""
        return await answers(self._database)

    async def close(self) -> None:
        """Look no more. Idempotent."""
        tasks = [task for task in (self._task, self._measuring) if task is not None]
        self._task = self._measuring = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self._withdraw)

    async def _look(self) -> bool:
        """Whether there is nothing left to look for: the run engine is at work."""
        if not self._begun() and await asyncio.to_thread(self._has_work):
            await self._begin()
        return self._begun()

    def _has_work(self) -> bool:
        return (
            self._leases.has_orphans()
            or self._queues.has_work(self._names)
            or self._dependencies.is_due()
            or is_any_due(self._database, SYSTEM_CLOCK)
        )

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                if await self._look():
                    return
            except AgenticFlowError as error:
                _log.warning("run_watch_failed", error=error.message)
            except Exception:  # noqa: BLE001 - the next look must come, whatever happened in this one
                _log.exception("run_watch_failed")
