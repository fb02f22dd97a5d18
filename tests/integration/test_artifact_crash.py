"""`kill -9` while a run leaves artifacts: each is there once, whole, and of a recorded step."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import Killed, kill_at, recover
from test_workflow_crash import DELAY_S, FlowMachine

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import NewArtifact, StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

TURNS = 3
FLOW = """
name: leaves
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
steps:
  - id: write
    agent: {prompt: "Write", tools: [artifact_write]}
    artifacts: ["*.py"]
  - id: last
    needs: [write]
    agent: {prompt: "Last", tools: []}
"""
HELD = """
import asyncio, sys
from pathlib import Path
from agentic_flow.core.ports import NewArtifact
from agentic_flow.swarm.engine import SqlRunEngine

async def leave(step):
    step.artifacts.append(NewArtifact("big.bin", "application/octet-stream", b"first" * 100_000))
    print("staged", flush=True)
    await asyncio.Event().wait()

async def flow(context, payload):
    return await context.step("leave", leave)

async def main():
    engine = SqlRunEngine(None, Path(sys.argv[1]), lease_s=1.0, runs_parallel_max=1)
    engine.register("flow", flow)
    async with engine.open():
        await engine.start("flow", "run-1", {}, tenant="t")
        await engine.wait("run-1")

asyncio.run(main())
"""


def write(request: SeenRequest) -> Reply:
    """An agent that writes one artifact a turn, the last one twice, and then says so."""
    if "Last" in request.last_text:
        return Reply.text("Done.", delay_s=DELAY_S)
    turn = 1 + sum(message.get("role") == "assistant" for message in request.messages)
    if turn > TURNS:
        return Reply.text("Written.", delay_s=DELAY_S)
    calls = [{"name": "artifact_write", "arguments": {"name": f"n{turn}.txt", "text": f"turn {turn}"}}]
    if turn == TURNS:
        calls.append({"name": "artifact_write", "arguments": {"name": f"n{turn}.txt", "text": "again"}})
    return Reply.tool_calls(calls, delay_s=DELAY_S)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FlowMachine]:
    with FakeProvider(write) as provider:
        found = FlowMachine(tmp_path, provider)
        (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
        found.environment |= {"AGENTIC_FLOW_MEMORY__ENABLED": "false"}
        yield found


@pytest.mark.timeout(900)
def test_a_killed_workflow_leaves_each_artifact_once(machine: FlowMachine) -> None:
    """Catches artifacts that a kill loses, doubles or leaves without the step that made them."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    interrupted = 0
    for calls in range(2, TURNS + 2):
        known = machine.run_ids()
        folder = f"folder={machine.folder}"
        process = machine.start("workflow", "run", "flow.yaml", "--input", folder, "--json")
        kill_at(machine, process, calls, pause_s=rng.uniform(0, 2 * DELAY_S))
        (run_id,) = machine.run_ids() - known
        before = machine.store.artifacts(run_id)
        assert {(f"{one.workflow_id}:{one.index}", one.step) for one in before} <= machine.recorded(run_id)
        if (killed := Killed.of(machine, known)) is not None:
            interrupted += 1
            result = recover(machine, run_id, by_server=calls == TURNS)
            assert result["state"] == "completed", json.dumps(result)[:2000]
            killed.check(model_calls=TURNS + 2)
        after = machine.store.artifacts(run_id)
        assert after[: len(before)] == before, "what was stored has changed"
        texts = {f"n{turn}.txt": [f"turn {turn}"] for turn in range(1, TURNS + 1)}
        texts[f"n{TURNS}.txt"].append("again")
        found: dict[str, list[str]] = {}
        for one in after:
            content = machine.store.artifact_content(run_id, one.number)
            assert content is not None
            found.setdefault(one.name, []).append(content.decode())
        files = {path.name: [path.read_text("utf-8")] for path in machine.folder.glob("*.py")}
        assert found == texts | files
    assert interrupted >= TURNS // 2, "most kill points must hit a workflow under way"


@pytest.mark.timeout(120)
def test_killed_between_staging_and_recording(tmp_path: Path) -> None:
    """Catches bytes that are stored before their step is, which another process would store again."""
    process = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"staged\n"
        process.send_signal(signal.SIGKILL)
        process.wait()

    async def leave(step: StepContext) -> JsonObject:
        step.artifacts.append(NewArtifact("big.bin", "application/octet-stream", b"second"))
        return {}

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("leave", leave)

    async def main() -> None:
        engine = SqlRunEngine(None, tmp_path, lease_s=1.0, runs_parallel_max=1)
        engine.register("flow", flow)
        assert await engine.artifacts("run-1") == []
        async with engine.open(takeover=True):
            async with asyncio.timeout(60):
                assert (await engine.wait("run-1")).state == "completed"
            (left,) = await engine.artifacts("run-1")
            assert (left.version, left.name) == (1, "big.bin")
            assert await engine.artifact_content("run-1", left.number) == b"second"

    asyncio.run(main())
