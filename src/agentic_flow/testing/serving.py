"""Real servers for tests: apps of ours on port 0, in this event loop, by the very code that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from agentic_flow.core.serve import serve
from agentic_flow.core.settings import TlsSettings


@asynccontextmanager
async def serving(
    *apps: Starlette,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TlsSettings | None = None,
    drain_timeout_s: float = 1.0,
    linger_s: float = 0.0,
    stop: asyncio.Event | None = None,
) -> AsyncGenerator[list[str]]:
    """Serve `apps` and give their base URLs, in order. Drained and closed on exit.

    Whatever the servers raise, at start or at the end, is raised here.

    Args:
        apps: Made by `agentic_flow.core.web.create_app`.
        host: Address to bind.
        port: Port of the first app, to come back where a server was; the others take any.
        tls: Certificates; the URLs are https then.
        drain_timeout_s: Seconds given to requests in flight on exit.
        linger_s: Seconds for which requests are taken still on exit.
        stop: Set it to begin the drain before the block ends.
    """
    stop = stop or asyncio.Event()
    ready: asyncio.Future[list[tuple[str, int]]] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(
            [(app, host, 0 if index else port) for index, app in enumerate(apps)],
            tls=tls,
            drain_timeout_s=drain_timeout_s,
            linger_s=linger_s,
            on_ready=ready.set_result,
            stop=stop,
            signals=False,
        )
    )
    await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        await task
        raise RuntimeError("the servers ended before they were ready")
    scheme = "https" if tls is not None and tls.certificate_file is not None else "http"
    try:
        yield [f"{scheme}://{host}:{port}" for host, port in ready.result()]
    finally:
        stop.set()
        await task
