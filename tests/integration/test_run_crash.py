"""`kill -9` at any point of a run: it goes on where it was, by hand or by itself, and nothing is paid twice.

The model is a FakeProvider in this process: it outlives the killed ones and has seen every call with its
idempotency key, as the audit log has seen every tool call.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_team import GOAL, TRUE_CITATION, make_folder, team

from agentic_flow.swarm.reader import RunReader
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest
from agentic_flow.tools.audit import AuditLog

KILLS = int(os.environ.get("KILLS", "20"))
# The scripted workers make more false claims than true ones, so the adaptive team goes on as a mesh.
CALLS_PER_RUN = {"hierarchical": 9, "adaptive": 22}
END_TIMEOUT_S = 60.0
DELAY_S = 0.03
COMMAND = [sys.executable, "-m", "agentic_flow"]


class Machine:
    """One data folder, one provider, and processes that live and die on them."""

    def __init__(self, place: Path, provider: FakeProvider) -> None:
        self.folder = make_folder(place)
        self.data_dir = place / "data"
        self.provider = provider
        self.store = RunReader(None, self.data_dir, lease_s=2.0)
        self.environment = {
            **os.environ,
            "AGENTIC_FLOW_DATA_DIR": str(self.data_dir),
            "AGENTIC_FLOW_SWARM__LEASE_S": "2",
            "OPENAI_BASE_URL": provider.openai_url,
            "OPENAI_API_KEY": "test-key",
            "AGENTIC_FLOW_GATEWAY__MODEL": "openai:some-model",
            "AGENTIC_FLOW_SERVE__PLATFORM_PORT": "0",
            "AGENTIC_FLOW_SERVE__AGENTDB_PORT": "0",
            "AGENTIC_FLOW_SERVE__SWARM_PORT": "0",
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.environment,
            cwd=self.data_dir.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run_ids(self) -> set[str]:
        records = self.store.list_workflows("default", name="run", states=(), limit=1000)
        return {record.workflow_id for record in records}

    def recorded(self, run_id: str) -> set[tuple[str, str]]:
        """(idempotency key, step name) of every recorded step."""
        return {(f"{step.workflow_id}:{step.index}", step.name) for step in self.store.steps(run_id)}

    def model_calls(self) -> Counter[str]:
        return Counter(request.headers.get("idempotency-key", "") for request in self.provider.requests)

    def tool_calls(self, run_id: str) -> Counter[str]:
        async def read() -> Counter[str]:
            log = AuditLog(self.data_dir / "audit.db")
            records = await log.records("default", run_id=run_id, limit=1000)
            await asyncio.to_thread(log.close)
            return Counter(record.idempotency_key or "" for record in records)

        return asyncio.run(read()) if (self.data_dir / "audit.db").exists() else Counter()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    def slow_team(request: SeenRequest) -> Reply:
        return team(request, delay_s=DELAY_S)

    with FakeProvider(slow_team) as provider:
        yield Machine(tmp_path, provider)


def wait_for(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + END_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {END_TIMEOUT_S} s"
        time.sleep(0.005)


def kill_at(machine: Machine, process: subprocess.Popen[bytes], calls: int, pause_s: float) -> None:
    """SIGKILL once `calls` more model calls have arrived and `pause_s` has passed, or when it has ended."""
    before = len(machine.provider.requests)
    wait_for(
        lambda: len(machine.provider.requests) - before >= calls or process.poll() is not None,
        "the kill point",
    )
    time.sleep(pause_s)  # the random point between two calls is the subject of the test
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_where_it_was(machine: Machine) -> None:
    """Catches lost steps, repeated model or tool calls, wrong results, and runs nobody takes over."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    kills = 0
    interrupted = 0
    while kills < KILLS:
        known = machine.run_ids()
        topology = rng.choice(sorted(CALLS_PER_RUN))
        calls = CALLS_PER_RUN[topology]
        options = ["--input", str(machine.folder), "--agents", "2", "--topology", topology, "--json"]
        process = machine.start("run", GOAL, *options)
        kill_at(machine, process, rng.randrange(calls + 1), pause_s=rng.uniform(0, 2 * DELAY_S))
        kills += 1
        new = machine.run_ids() - known
        if not new:
            continue  # killed before the run was accepted: nothing was promised
        (run_id,) = new
        recorded = machine.recorded(run_id)
        models_before, tools_before = machine.model_calls(), machine.tool_calls(run_id)
        state = machine.store.get(run_id)
        assert state is not None
        if state.state == "completed":
            continue
        assert state.state == "interrupted"
        interrupted += 1
        result = recover(machine, run_id, by_server=kills % 2 == 0)
        assert result["state"] == "completed", result
        labels = [f"{c['path']}:{c['line_start']}-{c['line_end']}" for c in result["citations"]]
        assert labels == [TRUE_CITATION, "listeners.py:1-3"]
        assert recorded <= machine.recorded(run_id), "a recorded step was lost"
        models, tools = machine.model_calls(), machine.tool_calls(run_id)
        for key, name in recorded:
            if name == "model":
                assert models[key] == models_before[key] == 1, f"recorded model call {key} was paid again"
            elif name.startswith("tool:"):
                assert tools[key] == tools_before[key] == 1, f"recorded tool call {key} ran again"
        assert all(count <= 2 for key, count in models.items() if key.startswith(f"{run_id}."))
        assert all(count <= 2 for count in tools.values())
        assert len([key for key in models if key.startswith(f"{run_id}.")]) == calls
    print(f"{kills} kills, {interrupted} runs interrupted and recovered")
    assert interrupted >= KILLS // 2, "most kill points must hit a run under way"


def recover(machine: Machine, run_id: str, *, by_server: bool) -> dict[str, object]:
    """The result after a resume by command, or after a server on the same data took the run over."""
    if not by_server:
        process = machine.start("runs", "resume", run_id, "--json")
        out, err = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 0, err.decode()
        return json.loads(out)
    server = machine.start("serve", "swarm")
    try:
        wait_for(lambda: ended(machine, run_id) or server.poll() is not None, "the end of the run")
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=END_TIMEOUT_S)
    assert server.returncode == 0, err.decode()
    record = machine.store.get(run_id)
    assert record is not None
    assert record.output is not None, record
    return record.output


def ended(machine: Machine, run_id: str) -> bool:
    record = machine.store.get(run_id)
    return record is not None and record.state in ("completed", "failed", "cancelled")
