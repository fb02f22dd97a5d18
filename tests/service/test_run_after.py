"""Runs that begin after others, as callers see them: in Python, by a command and over HTTP."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from cli_process import Place
from test_run_signals import call, write

from agentic_flow.client import AsyncClient
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.swarm.runs import RunSpec
from agentic_flow.swarm.workflow_spec import WorkflowRequest

WAITS = "{name: w, steps: [{id: a, wait_for: {signal: go}}]}"
ENDS = "{name: w, steps: [{id: a, wait_for: {signal: x, default: 1}, timeout_s: 0.01}]}"


@pytest.mark.anyio
async def test_runs_and_workflows_follow_runs(tmp_path: Path) -> None:
    """Catches `after` that only one kind of run heeds, that no result shows, or that a key does not cover."""
    async with AsyncClient(data_dir=tmp_path / "data") as client, asyncio.timeout(60):
        flow = write(tmp_path, WAITS)
        first, other = await client.workflows.submit(flow), await client.workflows.submit(flow)
        team = await client.runs.submit("Who waits?", input=flow, agents=1, after=(first,))
        then = await client.workflows.submit(flow, after=[first, other], idempotency_key="k")
        assert then == await client.workflows.submit(flow, after=[first, other], idempotency_key="k")
        for changed in ([first], []):
            with pytest.raises(Conflict):
                await client.workflows.submit(flow, after=changed, idempotency_key="k")
        shown = await client.runs.show(team)
        assert (shown.state, shown.after) == ("queued", (first,))
        assert (await client.runs.show(then)).after == (first, other)
        await client.runs.signal(first, "go")
        result = await client.runs.wait(team)
        assert (result.state, result.after) == ("completed", (first,)), result.error
        assert (await client.runs.show(then)).state == "queued"
        await client.runs.cancel(other)
        failed = await client.runs.wait(then)
        assert failed.state == "failed"
        assert f"{other!r}, which is cancelled" in str((failed.error or {})["detail"])
        ends = write(tmp_path, ENDS)
        any_end = await client.workflows.submit(ends, after=[other], after_any_end=True)
        assert (await client.runs.wait(any_end)).state == "completed"


@pytest.mark.anyio
async def test_nobody_follows_what_is_not_his(tmp_path: Path) -> None:
    """Catches a tenant that learns from a refusal, or from waiting, that another tenant's run exists."""
    async with AsyncClient(data_dir=tmp_path / "data") as client, asyncio.timeout(60):
        _, runs = await client._swarm()  # pyright: ignore[reportPrivateUsage]
        one, other = (Principal(tenant, "s", frozenset({"runs:read", "runs:write"})) for tenant in "ab")
        request = WorkflowRequest(text=WAITS)
        theirs = await runs.submit_workflow(other, request)
        told: list[str] = []
        for run_id in (theirs, "run-nobody"):
            with pytest.raises(NotFound) as refused:
                await runs.submit(one, RunSpec(goal="g", agents=1, after=(run_id,)))
            told.append(refused.value.message.replace(run_id, "ID"))
            with pytest.raises(NotFound) as refused:
                await runs.submit_workflow(one, request.model_copy(update={"after": (run_id,)}))
            told.append(refused.value.message.replace(run_id, "ID"))
        assert len(set(told)) == 1, told
        assert await runs.list_runs(one) == []


def test_a_command_follows_a_run_of_a_server(tmp_path: Path) -> None:
    """Catches a flag that is not passed on, and a wait that does not survive `kill -9` of its server."""
    place = Place(tmp_path)
    flow = write(tmp_path, WAITS)

    async def submitted(url: str) -> tuple[str, str]:
        async with AsyncClient(url) as client:
            first = await client.workflows.submit(flow)
            return first, await client.runs.submit("Who waits?", input=flow, agents=1, after=(first,))

    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        first, then = asyncio.run(submitted(url))
        body = {"goal": "g", "agents": 1}
        assert call(f"{url}/v1/runs", body | {"after": ["run-nobody"]})[0] == 404
        assert call(f"{url}/v1/runs", body | {"after": ["no id!"]})[0] == 400
        assert call(f"{url}/v1/workflows", {"text": WAITS, "after": ["run-nobody"]})[0] == 404
        server.signal(signal.SIGKILL)
        server.end()
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        assert call(f"{url}/v1/runs/{first}/signals/go", {})[0] == 200

        async def ended() -> str:
            async with AsyncClient(url) as client, asyncio.timeout(60):
                return (await client.runs.wait(then)).state

        assert asyncio.run(ended()) == "completed"
    done = place.run("run", "Who waits?", "-i", str(flow), "--agents", "1", "--after", then, "--json")
    assert (done.code, done.data["after"]) == (0, [then]), done.err
    failed = place.run("workflow", "run", str(flow), "--after", "run-nobody")
    assert failed.code != 0
    assert "there is no run 'run-nobody' to begin after" in failed.err
