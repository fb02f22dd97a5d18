"""Runs whose process was killed: the machine they live on, the kill, the recovery, and what must be left.

The model is a FakeProvider in the process of the test. It outlives the killed ones and has seen every call
with its idempotency key, as the audit log has seen every tool call.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scripted_team import make_folder

from agentic_flow.swarm.reader import RunReader
from agentic_flow.testing.fake_provider import FakeProvider
from agentic_flow.tools.audit import AuditLog

END_TIMEOUT_S = 240.0
"""Only so that a hang ends: a busy machine takes its time."""
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


def wait_for(condition: Callable[[], object], what: str) -> None:
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


@dataclass(frozen=True)
class Killed:
    """A run that was under way when its process was killed, and what was known of it then."""

    machine: Machine
    run_id: str
    recorded: set[tuple[str, str]]
    models: Counter[str]
    tools: Counter[str]

    @classmethod
    def of(cls, machine: Machine, known: set[str]) -> Self | None:
        """The one run beside `known`; None when it was not accepted yet, or had completed.

        To whom it was not accepted nothing was promised.
        """
        new = machine.run_ids() - known
        if not new:
            return None
        (run_id,) = new
        killed = cls(
            machine, run_id, machine.recorded(run_id), machine.model_calls(), machine.tool_calls(run_id)
        )
        record = machine.store.get(run_id)
        assert record is not None
        if record.state == "completed":
            return None
        assert record.state == "interrupted"
        return killed

    def check(self, *, model_calls: int) -> None:
        """After its recovery: no recorded step is lost or was done again, others once more at most."""
        assert self.recorded <= self.machine.recorded(self.run_id), "a recorded step was lost"
        models, tools = self.machine.model_calls(), self.machine.tool_calls(self.run_id)
        for key, name in self.recorded:
            if name == "model":
                assert models[key] == self.models[key] == 1, f"recorded model call {key} was paid again"
            elif name.startswith("tool:"):
                assert tools[key] == self.tools[key] == 1, f"recorded tool call {key} ran again"
        own = {key: count for key, count in models.items() if key.startswith(f"{self.run_id}.")}
        assert len(own) == model_calls
        assert all(count <= 2 for count in [*own.values(), *tools.values()])


def recover(machine: Machine, run_id: str, *, by_server: bool) -> dict[str, Any]:
    """The result after a resume by command, or after a server on the same data took the run over."""
    if not by_server:
        process = machine.start("runs", "resume", run_id, "--json")
        out, err = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 0, err.decode()
        return json.loads(out)
    server = machine.start("serve", "swarm")
    try:
        wait_for(lambda: ended(machine, run_id) or server.poll() is not None, "the end of the run")
        # It takes runs over before all of it has begun: what was nearly done may be done before that.
        wait_for(lambda: server.poll() is not None or catches_sigterm(server.pid), "its signal handler")
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=END_TIMEOUT_S)
    assert server.returncode == 0, err.decode()
    record = machine.store.get(run_id)
    assert record is not None
    assert record.output is not None, record
    return record.output


def catches_sigterm(pid: int) -> bool:
    """Whether a process would do something about SIGTERM, from its mask of caught signals."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def ended(machine: Machine, run_id: str) -> bool:
    record = machine.store.get(run_id)
    return record is not None and record.state in ("completed", "failed", "cancelled")
