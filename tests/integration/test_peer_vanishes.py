"""A service that is suddenly out of reach: packets are lost, and nobody says so.

This module is also the program of the process that calls it, in a network of its own. It needs Linux, `ip`,
and the right to make namespaces.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from aiohttp import web
from test_engine_partition import ip, networks

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CALL_S = 600.0
"""Longer than the test may take: whoever waits for it has not noticed."""


async def caller(folder: Path, url: str, path: str) -> None:
    """A run of one step, which asks the service."""
    lost = False

    async def call(step: StepContext) -> JsonObject:
        nonlocal lost
        deadline = Deadline.after(CALL_S)
        try:
            if path == "/whole" or lost:
                return await twin.call("GET", path, deadline=deadline, idempotent=False)
            async for _ in twin.stream_events("GET", path, deadline=deadline):
                raise AssertionError("it says nothing")
        except Unavailable as error:
            lost = True
            print("lost", error.peer, flush=True)
            raise
        raise AssertionError("it never ends")

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("call", call)

    engine = SqlRunEngine(None, folder, lease_s=10.0, runs_parallel_max=1, peer_patience_s=CALL_S)
    engine.register("flow", flow)
    async with HttpTwin(url) as twin, engine.open():
        await engine.start("flow", "run", {}, tenant="t")
        record = await engine.wait("run")
        print("ended", record.state, json.dumps(record.output), flush=True)


async def said(child: asyncio.subprocess.Process, word: str) -> str:
    """The next line that begins with this word; there is a log between."""
    assert child.stdout is not None
    while line := (await child.stdout.readline()).decode():
        if line.startswith(word):
            return line.strip()
    raise AssertionError(f"it ended without {word!r}")


@pytest.mark.parametrize("path", ["/whole", "/events"])
def test_a_step_notices_that_its_neighbour_is_gone(path: str, tmp_path: Path) -> None:
    """Catches a call in flight that hangs until its deadline when packets are lost without a word, and a step
    that fails of it, or does not go on when the way is back."""

    async def main() -> None:
        with networks() as (network, _):
            asked, count = asyncio.Event(), 0

            async def answer(request: web.Request) -> web.StreamResponse:
                nonlocal count
                count += 1
                if count > 1:
                    return web.json_response({"asked": count})
                if path == "/events":
                    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
                    await response.prepare(request)
                    await response.write(b": heartbeat\n\n")
                asked.set()
                await asyncio.Event().wait()  # as a long model call does
                raise AssertionError

            app = web.Application()
            app.router.add_get(path, answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, network.here, 0).start()
            url = f"http://{network.here}:{runner.addresses[0][1]}"
            command = [
                "ip",
                "netns",
                "exec",
                network.name,
                sys.executable,
                __file__,
                str(tmp_path),
                url,
                path,
            ]
            child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            try:
                await asked.wait()
                ip("link", "set", network.cable, "down")
                assert (await said(child, "lost")) == f"lost {url}"
                ip("link", "set", network.cable, "up")
                assert (await said(child, "ended")).startswith('ended completed {"asked": ')
            finally:
                child.kill()
                await child.wait()
                await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 150))


if __name__ == "__main__":
    asyncio.run(caller(Path(sys.argv[1]), *sys.argv[2:]))
