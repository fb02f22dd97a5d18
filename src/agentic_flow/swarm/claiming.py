"""What a process with free places does to fill them from the shared queues.

On PostgreSQL it is told when a run was put into a queue (LISTEN), and looks now and then all the same: a
connection that breaks, or a pooler that passes no notifications on, must not leave runs lying. On SQLite
there is nobody to tell another process; it looks more often, with a question that takes no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

import structlog

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.swarm.leases import Claim, RunDatabase
from agentic_flow.swarm.queue_rows import CHANNEL
from agentic_flow.swarm.queues import RunQueues

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_POLL_FILE_S = 0.05
_POLL_SERVER_S = 1.0
_RETRY_S = 1.0


class Claimer:
    """Takes runs for one process, as many as it has places for. Made and used on one event loop.

    Args:
        database: The run database.
        queues: Its queues.
        executor_id: The process.
        names: The queues it works for.
        workflows: The workflows it knows.
        free: How many places are free now.
        enter: Begins what was taken.
        doubt: Called when something may have been taken that is not begun: an answer was lost.
        besides: Runs that the process leaves to others; more may come.
    """

    def __init__(
        self,
        database: RunDatabase,
        queues: RunQueues,
        executor_id: str,
        *,
        names: Sequence[str],
        workflows: Collection[str],
        free: Callable[[], int],
        enter: Callable[[Sequence[Claim]], Awaitable[None]],
        doubt: Callable[[], None],
        besides: Collection[str] = (),
    ) -> None:
        self._database = database
        self._queues = queues
        self._executor_id = executor_id
        self._names = tuple(dict.fromkeys(names))
        self._workflows = workflows
        self._free = free
        self._enter = enter
        self._doubt = doubt
        self._besides = besides
        self._woken = asyncio.Event()
        self._poll_s = _POLL_FILE_S if database.is_sqlite else _POLL_SERVER_S

    def wake(self) -> None:
        """Something was put into a queue, or a place has become free."""
        self._woken.set()

    async def run(self) -> None:
        """Take runs until cancelled."""
        while True:
            self._woken.clear()
            try:
                if await self._take():
                    continue  # there may be more
            except AgenticFlowError as error:
                self._doubt()
                log.warning("queue_unavailable", error=error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            except Exception:  # the next look must come, whatever happened in this one
                self._doubt()
                log.exception("queue_unavailable")
                await asyncio.sleep(_RETRY_S)
                continue
            with suppress(TimeoutError):
                # Without a free place there is nothing to look for.
                async with asyncio.timeout(self._poll_s if self._free() > 0 else None):
                    await self._woken.wait()

    async def _take(self) -> bool:
        free = self._free()
        if free <= 0:
            return False
        besides = frozenset(self._besides)
        if not await asyncio.to_thread(self._queues.has_work, self._names, besides=besides):
            return False
        taking = asyncio.ensure_future(
            asyncio.to_thread(
                self._queues.take,
                self._executor_id,
                self._names,
                self._workflows,
                self._free(),
                besides=besides,
            )
        )
        try:
            taken = await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait([taking])  # what was taken is handed back with the rest
            raise
        await self._enter(taken)
        return bool(taken)

    async def listen(self) -> None:
        """Be woken by other processes, on PostgreSQL, until cancelled."""
        import psycopg

        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._database.url.replace("postgresql+psycopg://", "postgresql://", 1), autocommit=True
                ) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}".encode())
                    self.wake()  # what came meanwhile told nobody
                    async for _ in connection.notifies():
                        self.wake()
            except psycopg.Error as error:
                log.warning("queue_listener_lost", error=" ".join(str(error).split()))
            await asyncio.sleep(_RETRY_S)
