"""`agentic-flow worker`: takes runs from shared queues and does them, without a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agentic_flow.core.serve import stop_on_signals
from agentic_flow.core.settings import Settings
from agentic_flow.runtime.build import Runtime


async def work(
    settings: Settings, *, on_ready: Callable[[], None], on_drain: Callable[[], None], stop: asyncio.Event
) -> int:
    """Work for the queues of `swarm.queues` until SIGTERM, Ctrl-C or `stop`; then drain.

    Draining takes no more runs and lets those at work end for `swarm.drain_s`. What is left goes back to its
    queue, where another process takes it at once, after its last recorded step. A second signal ends the
    process there and then: others take its runs over when its lease has run out.

    Args:
        settings: The whole configuration.
        on_ready: Called when it takes runs.
        on_drain: Called when it has begun to drain.
        stop: Set it to stop.

    Returns:
        How many runs it had to leave unfinished.

    Raises:
        Unavailable: the run database cannot be used.
    """
    async with Runtime(settings, serves=("swarm",)) as runtime:
        with stop_on_signals(stop):
            swarm = await runtime.worker()
            on_ready()
            await stop.wait()
            on_drain()
            return await swarm.drain(settings.swarm.drain_s)
