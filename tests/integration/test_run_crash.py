"""`kill -9` at any point of a run: it goes on where it was, by hand or by itself; nothing is paid twice."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import Killed, Machine, kill_at, recover
from scripted_team import GOAL, TRUE_CITATION, team

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

KILLS = int(os.environ.get("KILLS", "20"))
# The scripted workers make more false claims than true ones, so the adaptive team goes on as a mesh.
CALLS_PER_RUN = {"hierarchical": 9, "adaptive": 22}
DELAY_S = 0.03


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    def slow_team(request: SeenRequest) -> Reply:
        return team(request, delay_s=DELAY_S)

    with FakeProvider(slow_team) as provider:
        yield Machine(tmp_path, provider)


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
        killed = Killed.of(machine, known)
        if killed is None:
            continue
        interrupted += 1
        result = recover(machine, killed.run_id, by_server=kills % 2 == 0)
        assert result["state"] == "completed", result
        labels = [f"{c['path']}:{c['line_start']}-{c['line_end']}" for c in result["citations"]]
        assert labels == [TRUE_CITATION, "listeners.py:1-3"]
        killed.check(model_calls=calls)
    print(f"{kills} kills, {interrupted} runs interrupted and recovered")
    assert interrupted >= KILLS // 2, "most kill points must hit a run under way"
