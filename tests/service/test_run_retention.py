"""Ended runs are removed: by a command, over HTTP, and by a server past its settings."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import orjson
import pytest
from cli_process import TIMEOUT_S, Place

from agentic_flow.client import AsyncClient
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Forbidden, InvalidInput, NotFound
from agentic_flow.core.ports import ToolScope
from agentic_flow.core.settings import Settings
from agentic_flow.core.toolkit import Deadline
from agentic_flow.runtime.build import Runtime
from agentic_flow.swarm.blackboard import NAMESPACE, board_name
from agentic_flow.swarm.runs import PurgeRequest
from agentic_flow.swarm.workflow_spec import WorkflowRequest

FLOW = "name: w\nsteps:\n- id: gate\n  timeout_s: 0.01\n  approval: {question: 'Now?', default: approve}\n"


def ended_run(place: Place) -> str:
    """A run of a workflow that has ended."""

    (place.folder / "flow.yaml").write_text(FLOW, "utf-8")

    async def run() -> str:
        async with AsyncClient(data_dir=place.data_dir) as client:
            return (await client.workflows.run(place.folder / "flow.yaml")).run_id

    return asyncio.run(run())


def run_ids(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/runs", timeout=60) as answer:
        return [run["run_id"] for run in orjson.loads(answer.read())["runs"]]


def call(url: str, body: Any) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    request = urllib.request.Request(url, orjson.dumps(body), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())


def test_purged_by_a_command_and_over_http(tmp_path: Path) -> None:
    """Catches a purge that removes too much or nothing, tells wrongly, or goes without being told what."""
    place = Place(tmp_path)
    run_id = ended_run(place)
    refused = place.run("runs", "purge", "--older-than", "soon")
    assert (refused.code, "'soon'" in refused.problem) == (2, True), refused.err
    would = place.run("runs", "purge", "--older-than", "0s", "--dry-run", "--json").data
    assert (would["runs"], would["agents"], would["messages"], would["dry_run"]) == (1, 1, 0, True)
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        assert run_ids(url) == [run_id]
        bodies: list[Any] = [{}, {"older_than_s": -1}, {"older_than_s": "x"}, {"surprise": 1}, []]
        for body in bodies:
            assert call(f"{url}/v1/runs/purge", body)[0] == 400, body
        assert call(f"{url}/v1/runs/purge", {"older_than_s": 3600})[1]["runs"] == 0
        status, gone = call(f"{url}/v1/runs/purge", {"older_than_s": 0})
        assert (status, gone) == (200, {**would, "dry_run": False})
        assert run_ids(url) == []
    ended_run(place)
    told = place.run("runs", "purge", "--older-than", "0s")
    assert told.code == 0, told.err
    assert told.out.startswith(f"1 run removed, with 1 agent, {would['steps']} steps, ")
    size_bytes = int(told.out.partition(" artifacts: ")[2].partition(" bytes")[0].replace(",", ""))
    assert abs(size_bytes - would["size_bytes"]) < 200  # times have more digits or fewer


def test_a_server_removes_what_is_past_its_settings(tmp_path: Path) -> None:
    """Catches settings of retention that nobody keeps, and a server that removes runs without any."""
    place = Place(tmp_path)
    run_id = ended_run(place)
    with place.start("serve", "platform") as server:
        assert run_ids(server.addresses(1)["platform"]) == [run_id]
    with place.start("serve", "platform", AGENTIC_FLOW_SWARM__KEEP_BYTES="1") as server:
        url = server.addresses(1)["platform"]
        give_up_at_s = time.monotonic() + TIMEOUT_S
        while run_ids(url):  # nothing announces it
            assert time.monotonic() < give_up_at_s
            time.sleep(0.05)


@pytest.mark.anyio
async def test_blackboards_go_with_their_runs_and_other_tenants_are_not_asked(tmp_path: Path) -> None:
    """Catches entries of a board that outlive their run, those of a live one lost, and purges for others."""
    settings = Settings(data_dir=tmp_path)
    async with AsyncClient(settings=settings) as client, Runtime(settings) as runtime:
        source = {"text": FLOW.replace("timeout_s: 0.01\n  ", "")}
        swarm = await runtime.swarm()
        owner = runtime.principal
        waiting = await swarm.submit_workflow(owner, WorkflowRequest.model_validate(source))
        done = await swarm.submit_workflow(owner, WorkflowRequest(text=FLOW))
        assert (await swarm.wait(owner, done)).state == "completed"
        toolbox = await runtime.toolbox()
        for run_id in (waiting, done):
            written = await toolbox.call(
                owner,
                "board_write",
                {"key": "k", "value": run_id, "expected_version": 0},
                deadline=Deadline.after(30.0),
                scope=ToolScope(board=board_name(run_id, "all")),
            )
            assert not written.is_error, written
        stranger = Principal("default2", "them", frozenset({"runs:read", "runs:write"}))
        with pytest.raises(Forbidden):
            await swarm.purge(stranger, PurgeRequest(older_than_s=0, tenant="default"))
        assert (await swarm.purge(stranger, PurgeRequest(older_than_s=0))).runs == 0
        with pytest.raises(NotFound):
            await swarm.retry(stranger, done, from_step="gate")
        with pytest.raises(NotFound):
            await swarm.signal(stranger, waiting, "go")
        with pytest.raises(InvalidInput):
            await client.runs.purge()
        gone = await swarm.purge(owner, PurgeRequest(older_than_s=0))
        assert (gone.runs, gone.board_entries) == (1, 1)
        left = await (await runtime.store()).list_items(owner.tenant, NAMESPACE)
        assert [item.text for item in left.items] == [waiting]
        assert await asyncio.wait_for(swarm.cancel(owner, waiting), 30)
