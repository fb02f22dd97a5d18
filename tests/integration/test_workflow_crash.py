"""`kill -9` at any point of a workflow: it goes on where it was, and no recorded step is done again."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import Killed, Machine, kill_at, recover

from agentic_flow.swarm.workflow_run import WORKFLOW
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest
from agentic_flow.tools.audit import AuditLog

KILLS = int(os.environ.get("KILLS", "4"))
DELAY_S = 0.05
MODEL_CALLS = 5
FLOW = """
name: kettle
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
steps:
  - id: find
    tool: {name: file_find, arguments: {glob: "*.py"}}
  - id: each
    needs: [find]
    fan_out: {over: "steps.find.output.entries | map(attribute='path')", parallel_max: 2}
    agent: {prompt: "Look at {{ item }}", tools: []}
  - id: write
    needs: [each]
    tool:
      name: file_write
      arguments: {path: "report.txt", text: "{{ steps.each.output | map(attribute='text') | join('+') }}"}
  - id: again
    needs: [write]
    agent: {prompt: "Say more", tools: []}
  - id: fourth
    needs: [again]
    agent: {prompt: "And more", tools: []}
  - id: fifth
    needs: [fourth]
    agent: {prompt: "Last", tools: []}
outputs:
  report: "{{ steps.each.output | map(attribute='text') | join('+') }} {{ steps.fifth.output.text }}"
"""


class FlowMachine(Machine):
    """A machine whose runs are workflows."""

    def run_ids(self) -> set[str]:
        records = self.store.list_workflows("default", name=WORKFLOW, states=(), limit=1000)
        return {record.workflow_id for record in records}

    def tool_calls(self, run_id: str) -> Counter[str]:
        """Calls by key; a tool that writes leaves two records of each, and the first only says `started`."""

        async def read() -> Counter[str]:
            log = AuditLog(self.data_dir / "audit.db")
            records = await log.records("default", run_id=run_id, limit=1000)
            await asyncio.to_thread(log.close)
            return Counter(one.idempotency_key or "" for one in records if one.outcome != "started")

        return asyncio.run(read()) if (self.data_dir / "audit.db").exists() else Counter()


def say(request: SeenRequest) -> Reply:
    """Each prompt has an answer of its own, so that mixed-up answers would show."""
    return Reply.text(f"<{request.last_text.split()[-1]}>", delay_s=DELAY_S)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FlowMachine]:
    with FakeProvider(say) as provider:
        found = FlowMachine(tmp_path, provider)
        (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
        (tmp_path / "policy.toml").write_text('[defaults]\nwrite = "allow"\ndestructive = "allow"\n', "utf-8")
        found.environment |= {
            "AGENTIC_FLOW_MEMORY__ENABLED": "false",
            "AGENTIC_FLOW_TOOLS__POLICY_FILE": str(tmp_path / "policy.toml"),
        }
        yield found


@pytest.mark.timeout(900)
def test_a_killed_workflow_goes_on_where_it_was(machine: FlowMachine) -> None:
    """Catches steps that are lost or done twice, and workflows that nobody takes over."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    interrupted = 0
    for kill in range(KILLS):
        known = machine.run_ids()
        (machine.folder / "report.txt").unlink(missing_ok=True)
        folder = f"folder={machine.folder}"
        process = machine.start("workflow", "run", "flow.yaml", "--input", folder, "--json")
        kill_at(machine, process, rng.randrange(1, MODEL_CALLS), pause_s=rng.uniform(0, 2 * DELAY_S))
        killed = Killed.of(machine, known)
        if killed is None:
            continue
        interrupted += 1
        result = recover(machine, killed.run_id, by_server=kill % 2 == 1)
        assert result["state"] == "completed", json.dumps(result)[:2000]
        assert result["workflow"]["outputs"] == {"report": "<kettle.py>+<listeners.py> <Last>"}
        assert (machine.folder / "report.txt").read_text("utf-8") == "<kettle.py>+<listeners.py>"
        killed.check(model_calls=MODEL_CALLS)
    assert interrupted >= KILLS // 2, "most kill points must hit a workflow under way"
