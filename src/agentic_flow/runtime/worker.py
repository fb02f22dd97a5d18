"""`agentic-flow worker`: takes runs from shared queues and does them; a port only for health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from prometheus_client import Gauge
from starlette.applications import Starlette

from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.readiness import all_of, room
from agentic_flow.core.serve import bind, serve, stop_on_signals
from agentic_flow.core.settings import Settings
from agentic_flow.runtime.build import Runtime
from agentic_flow.swarm.queue_metrics import QueueMetrics
from agentic_flow.swarm.service import Swarm

SERVICE = "worker"


async def work(
    settings: Settings,
    *,
    on_ready: Callable[[], None],
    on_drain: Callable[[], None],
    stop: asyncio.Event,
    on_listening: Callable[[str], None] | None = None,
) -> int:
    """Work for the queues of `swarm.queues` until SIGTERM, Ctrl-C or `stop`; then drain.

    Draining takes no more runs and lets those at work end for `swarm.drain_s`. What is left goes back to its
    queue, where another process takes it at once, after its last recorded step. A second signal ends the
    process there and then: others take its runs over when its lease has run out.

    With `serve.worker_port` it answers on `/health` and `/metrics` there, to the end of the drain.

    Args:
        settings: The whole configuration.
        on_ready: Called when it takes runs.
        on_drain: Called when it has begun to drain.
        stop: Set it to stop.
        on_listening: Called with the address of its port, if it has one.

    Returns:
        How many runs it had to leave unfinished.

    Raises:
        Unavailable: the run database cannot be used.
        PortInUse: the port is taken; nothing was opened.
        InvalidSettings: the address cannot be bound.
    """
    if settings.serve.worker_port is not None:
        bind(SERVICE, settings.serve.host, settings.serve.worker_port).close()
    async with Runtime(settings, serves=("swarm",)) as runtime:
        with stop_on_signals(stop):
            swarm = await runtime.worker()
            async with _port(runtime, swarm, stop, on_listening):
                on_ready()
                await stop.wait()
                on_drain()
                return await swarm.drain(settings.swarm.drain_s)


@asynccontextmanager
async def _port(
    runtime: Runtime, swarm: Swarm, stop: asyncio.Event, on_listening: Callable[[str], None] | None
) -> AsyncGenerator[None]:
    """Health and metrics on the port of the settings, if there is one."""
    settings = runtime.settings
    port, host = settings.serve.worker_port, settings.serve.host
    if port is None:
        yield
        return
    queues = QueueMetrics(swarm.queue_depths, settings.swarm.queues)
    runtime.metrics.register(queues)
    measuring = asyncio.create_task(queues.keep_fresh(), name="queue-metrics")
    listening: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    closing = asyncio.Event()
    serving = asyncio.create_task(
        serve(
            [(_app(runtime, swarm, stop), host, port)],
            tls=settings.tls,
            on_ready=lambda addresses: listening.set_result(addresses[0]),
            stop=closing,
            signals=False,
        ),
        name="worker-port",
    )
    try:
        await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            await serving  # raises what is wrong with the port
        if on_listening is not None:
            scheme = "https" if settings.tls.certificate_file else "http"
            at, number = listening.result()
            on_listening(f"{scheme}://{f'[{at}]' if ':' in at else at}:{number}")
        yield
        closing.set()
        await serving
    finally:
        measuring.cancel()
        closing.set()
        await asyncio.wait((measuring, serving))


def _app(runtime: Runtime, swarm: Swarm, stop: asyncio.Event) -> Starlette:
    from agentic_flow.core.web import create_app

    async def ready() -> dict[str, bool]:
        health = await swarm.health()
        return {
            "taking runs": not stop.is_set(),
            "run database": health.database,
            "heartbeat": health.heartbeat,
        }

    settings = runtime.settings
    disk = room(settings.data_dir, settings.serve.disk_free_min_bytes)
    places = Gauge("agentic_flow_worker_places", "Runs that it does at a time.", registry=runtime.metrics)
    places.set(settings.swarm.runs_parallel_max)
    working = Gauge("agentic_flow_worker_runs", "Runs that have a place here now.", registry=runtime.metrics)
    working.set_function(lambda: swarm.working)
    # It shows only what is open on every port: an address wider than loopback needs no keys.
    closed = settings.model_copy(update={"auth": settings.auth.model_copy(update={"required": True})})
    return create_app(
        SERVICE,
        (),
        authenticator=NoCredentials(),
        settings=closed,
        ready=all_of(ready, disk),
        metrics=runtime.metrics,
    )
