"""Signals to runs: sent by a command, over HTTP and in Python, received by steps of workflow files."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import orjson
import pytest
from cli_process import Place

from agentic_flow.client import AsyncClient
from agentic_flow.core.errors import Conflict, InvalidInput, NotFound

FLOW = """
name: w
steps:
- {id: first, wait_for: {signal: go}}
- {id: again, needs: [first], wait_for: {signal: go}}
- {id: other, needs: [again], timeout_s: 0.01, wait_for: {signal: late, default: {n: 0}}}
outputs:
  all: "{{ steps.first.output.value.n }} {{ steps.again.output.value.n }} {{ steps.first.output.by }}
    {{ steps.other.output.value.n }} {{ steps.other.output.timed_out }} {{ steps.first.output.timed_out }}"
"""


def write(place: Path, text: str = FLOW) -> Path:
    flow = place / "flow.yaml"
    flow.write_text(text, "utf-8")
    return flow


def call(url: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    headers = {"content-type": "application/json"} | ({"idempotency-key": key} if key else {})
    request = urllib.request.Request(url, orjson.dumps(body), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())


@pytest.mark.anyio
async def test_steps_receive_signals_and_defaults(tmp_path: Path) -> None:
    """Catches a signal that only one step gets, that a repeat changes, and a default nobody hears of."""
    async with AsyncClient(data_dir=tmp_path / "data") as client, asyncio.timeout(60):
        run_id = await client.workflows.submit(write(tmp_path))
        with pytest.raises(NotFound):
            await client.runs.signal("run-nobody", "go")
        for wrong in ("", "x" * 300):
            with pytest.raises(InvalidInput):
                await client.runs.signal(run_id, wrong)
        assert await client.runs.signal(run_id, "stray", [1, None])
        assert await client.runs.signal(run_id, "go", {"n": 1}, key="k")
        result = await client.runs.wait(run_id)
        assert result.state == "completed", result.error
        words = result.answer.lower().split()
        assert (words[:2], words[3:]) == (["1", "1"], ["0", "true", "false"]), result.answer
        assert not await client.runs.signal(run_id, "go", {"n": 1}, key="k")
        with pytest.raises(Conflict):
            await client.runs.signal(run_id, "go", {"n": 2}, key="k")
        with pytest.raises(Conflict):
            await client.runs.signal(run_id, "go", {"n": 3})
        never = write(tmp_path, "{name: w, steps: [{id: a, timeout_s: 0.01, wait_for: {signal: never}}]}")
        failed = await client.workflows.run(never)
        assert (failed.state, (failed.error or {})["code"]) == ("failed", "deadline_exceeded")


def test_signals_reach_a_run_that_nobody_executes(tmp_path: Path) -> None:
    """Catches a signal lost while no server lives, and a route or a command that sends something else."""
    place = Place(tmp_path)

    async def submitted(url: str) -> str:
        async with AsyncClient(url) as client:
            return await client.workflows.submit(write(tmp_path))

    with place.start("serve", "platform") as server:
        run_id = asyncio.run(submitted(server.addresses(1)["platform"]))
    sent = place.run("runs", "signal", run_id, "go", "--value", '{"n": 7}', "--key", "k", "--json")
    assert (sent.code, sent.data["is_new"], sent.data["value"]) == (0, True, {"n": 7}), sent.err
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        signals = f"{url}/v1/runs/{run_id}/signals"
        assert call(f"{signals}/go", {"value": {"n": 7}}, "k")[1] == {"signal": "go", "is_new": False}
        assert call(f"{signals}/go", {"value": {"n": 8}}, "k")[0] == 409
        assert call(f"{signals}/go", {"worth": 1})[0] == 400
        assert call(f"{url}/v1/runs/run-nobody/signals/go", {})[0] == 404

        async def ended() -> str:
            async with AsyncClient(url) as client:
                return (await client.runs.wait(run_id)).answer

        assert asyncio.run(ended()).startswith("7 7 ")
