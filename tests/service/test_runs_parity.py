"""Every operation of the HTTP API of runs is one of the Python client and of the command line.

Both are driven against a server that writes down which operations of its OpenAPI document it was asked for.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from agentic_flow.cli.main import main
from agentic_flow.client import AsyncClient
from agentic_flow.core.settings import load
from agentic_flow.runtime.build import Runtime
from agentic_flow.runtime.platform import _Apps  # pyright: ignore[reportPrivateUsage]
from agentic_flow.swarm.routes import openapi_document
from agentic_flow.swarm.workflow_spec import WorkflowSpec
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.timeout(300)

FLOW = """
name: parity
steps:
  - {id: note, tool: {name: artifact_write, arguments: {name: n.txt, text: noted}}}
  - {id: ask, needs: [note], approval: {question: "Go on?"}}
  - {id: wait, needs: [ask], wait_for: {signal: go}}
"""
SCHEDULED = FLOW.replace("steps:", "schedule: {every_s: 86400}\nsteps:", 1)
DOCUMENT = openapi_document()
OPERATIONS = {
    (method.upper(), path): str(operation["operationId"])
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    if method != "parameters"
}


class Asked:
    """Which operations a server was asked for, with success."""

    def __init__(self) -> None:
        self.operations: set[str] = set()
        self._paths = [
            (method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + "$"), name, path.count("{"))
            for (method, path), name in OPERATIONS.items()
        ]

    def note(self, method: str, path: str) -> None:
        """A request was answered with success."""
        found = [(ids, name) for m, known, name, ids in self._paths if m == method and known.match(path)]
        if found:  # `/v1/runs/purge` is no run named so
            self.operations.add(min(found)[1])


class Watching:
    """ASGI middleware that tells `Asked`."""

    def __init__(self, app: Any, asked: Asked) -> None:
        self._app = app
        self._asked = asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] < 300:
                self._asked.note(scope["method"], scope["path"])
            await send(message)

        await self._app(scope, receive, noted if scope["type"] == "http" else send)


@contextmanager
def server(folder: Path, asked: Asked) -> Generator[str]:
    """A platform in a thread of its own; its address."""
    settings = load(
        {"data_dir": str(folder / "served"), "memory.enabled": False},
        environ={},
        directory=folder,
        user_config=folder / "none.toml",
    ).settings
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is the commands'
    ready, over = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        async with Runtime(settings, serves=("platform", "swarm")) as runtime:
            apps = await _Apps(runtime, None).build(["platform"])
            app = apps["platform"]
            app.middleware_stack = Watching(app.middleware_stack, asked)
            async with serving(app) as urls:
                found.extend(urls)
                ready.set()
                await asyncio.to_thread(over.wait)

    def begin() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()  # whoever waits finds no address

    thread = threading.Thread(target=begin)
    thread.start()
    try:
        ready.wait()
        assert found, "the server did not start"
        yield found[0]
    finally:
        over.set()
        thread.join(60)


async def has_asked(client: AsyncClient, run_id: str) -> str:
    async with asyncio.timeout(60):
        while not (questions := await client.runs.questions(run_id)):
            await asyncio.sleep(0.05)
    return questions[0].id


def test_the_client_reaches_every_operation(tmp_path: Path) -> None:
    """Catches an operation that programs in Python would have to write HTTP for."""
    asked = Asked()
    flow = WorkflowSpec.model_validate(load_yaml(FLOW))
    scheduled = WorkflowSpec.model_validate(load_yaml(SCHEDULED))

    async def drive(url: str) -> None:
        async with AsyncClient(url) as client:
            assert (await client.workflows.validate(flow)).valid
            run_id = await client.workflows.submit(flow)
            question_id = await has_asked(client, run_id)
            assert [run.run_id for run in await client.runs.list()] == [run_id]
            assert (await client.runs.show(run_id)).state == "running"
            assert await client.runs.steps(run_id)
            assert [one.name for one in await client.runs.artifacts(run_id)] == ["n.txt"]
            assert (await client.runs.artifact(run_id, "n.txt")).text == "noted"
            assert "note to ask: 1" in await client.runs.picture(run_id)
            assert await client.runs.pause(run_id)
            await client.runs.restart(run_id)
            assert await client.runs.answer(run_id, question_id, "approve")
            assert await client.runs.signal(run_id, "go")
            assert (await client.runs.wait(run_id)).state == "completed"
            assert [event async for event in client.runs.events(run_id)][-1].kind == "run_finished"
            again = await client.runs.retry(run_id, from_step="ask")
            await has_asked(client, again)
            assert await client.runs.cancel(again)
            assert (await client.runs.purge(older_than_s=0.0)).runs == 2
            goal = await client.runs.submit("What is said?", input=None)
            await client.runs.wait(goal)
            await client.schedules.add(scheduled)
            assert [one.name for one in await client.schedules.list()] == ["parity"]
            assert (await client.schedules.show("parity")).state == "active"
            assert await client.schedules.pause("parity")
            assert await client.schedules.resume("parity")
            await client.schedules.remove("parity")

    with server(tmp_path, asked) as url:
        asyncio.run(drive(url))
    # Who has the record draws the picture from it.
    assert asked.operations | {"run_picture"} == set(OPERATIONS.values())


def load_yaml(text: str) -> dict[str, object]:
    import yaml

    return dict(yaml.safe_load(text))


def test_the_commands_reach_every_operation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an operation that people at a terminal do not have."""
    asked = Asked()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
    (tmp_path / "quick.yaml").write_text("\n".join(FLOW.splitlines()[:4]), "utf-8")
    (tmp_path / "daily.yaml").write_text(SCHEDULED, "utf-8")

    def run(*words: str) -> Any:
        code = main([*words, "--json"])
        captured = capsys.readouterr()
        assert code == 0, (words, captured.err)
        # Of what is followed there is a line for each event.
        return orjson.loads(captured.out.splitlines()[-1] if words[0] == "swarm" else captured.out)

    with server(tmp_path, asked) as url:
        for name in ("PLATFORM", "SWARM"):
            monkeypatch.setenv(f"AGENTIC_FLOW_PEERS__{name}_URL", url)
        run("workflow", "validate", "flow.yaml")
        run_id = str(run("workflow", "run", "flow.yaml", "--detach")["run_id"])

        async def asks(run_id: str) -> str:
            async with AsyncClient(url) as client:
                return await has_asked(client, run_id)

        question_id = asyncio.run(asks(run_id))
        asked.operations.discard("run_questions")
        run("runs", "list")
        run("runs", "show", run_id, "--steps")
        run("runs", "questions", run_id)
        run("runs", "artifacts", run_id, "--out", "left")
        assert (tmp_path / "left" / "n.txt").read_text("utf-8") == "noted"
        assert run("runs", "artifacts", run_id, "--versions")["artifacts"]
        run("runs", "picture", run_id, "-o", "run.svg")
        run("runs", "pause", run_id)
        run("runs", "answer", run_id, question_id, "approve")
        run("runs", "signal", run_id, "go")
        assert run("runs", "resume", run_id)["state"] == "completed"
        run("swarm", "watch", run_id)
        again = str(run("workflow", "run", "flow.yaml", "--detach", "--idempotency-key", "other")["run_id"])
        asyncio.run(asks(again))
        run("runs", "cancel", again)
        quick = run("workflow", "run", "quick.yaml")["run_id"]
        assert run("runs", "retry", quick, "--from", "note")["state"] == "completed"
        run("run", "What is said?", "--input", "flow.yaml", "--detach")
        monkeypatch.setattr(sys, "argv", ["agentic-flow"])
        run("schedules", "add", "daily.yaml")
        run("schedules", "list")
        run("schedules", "show", "parity")
        run("schedules", "pause", "parity")
        run("schedules", "resume", "parity")
        run("schedules", "remove", "parity")
        run("runs", "purge", "--older-than", "0s")
    missing = set(OPERATIONS.values()) - asked.operations - {"run_picture"}
    assert not missing
