"""What goes on beside the workflows of a process: its sign of life, and what it looks after now and then."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.swarm.leases import Leases, RunDatabase

T = TypeVar("T")
_ANSWER_S = 2.0
log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")


class Heartbeat:
    """Renews the lease from a thread of its own, so that a busy event loop does not look like death."""

    def __init__(self, leases: Leases, executor_id: str, interval_s: float) -> None:
        self._leases = leases
        self.executor_id = executor_id
        self._interval_s = interval_s
        self.has_begun = False
        self._written_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-engine-heartbeat", daemon=True)

    def start(self) -> None:
        """Beat once now, so that others see this process, and then regularly."""
        self._beat()
        self.has_begun = True
        self._thread.start()

    def is_fresh(self, lease_s: float) -> bool:
        """Whether the store has a sign of life of this process that is younger than a lease."""
        return self.has_begun and time.monotonic() - self._written_s < lease_s

    def stop(self) -> None:
        """Beat no more. Idempotent."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        began_s = time.monotonic()  # what is stored is not younger than this
        self._leases.beat(self.executor_id)
        self._written_s = began_s

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            try:
                self._beat()
            except AgenticFlowError as error:
                log.warning("heartbeat_failed", error=error.message)


async def answers(database: RunDatabase) -> bool:
    """Whether a run database answers a question within two seconds, and has room if it had none."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            await asyncio.to_thread(database.check, "SELECT COUNT(*) FROM af_executors")
    except (AgenticFlowError, TimeoutError):
        return False
    return True


def keep(interval_s: float, action: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Do this now and again, so many seconds after it was done, until the task is cancelled."""
    return asyncio.create_task(_repeat(interval_s, action))


async def _repeat(interval_s: float, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        try:
            await action()
        except AgenticFlowError as error:
            log.warning("engine_upkeep_failed", action=action.__name__, error=error.message)
        except Exception:  # the next round must come, whatever happened in this one
            log.exception("engine_upkeep_failed", action=action.__name__)
        await asyncio.sleep(interval_s)


async def unbroken(operation: Coroutine[Any, Any, T]) -> T:
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
