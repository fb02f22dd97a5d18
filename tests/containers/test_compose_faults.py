"""Faults of the main stack: each shows on the health routes, heals by itself, and loses nothing accepted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine
from faults import FAULTS, HEALED_WITHIN_S, SEEN_WITHIN_S, Accepted, all_ready, fault_then_whole, tell, until
from images import Images
from stacks import Stack, prepare, spec_with_free_ports

from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from conftest import remove_project

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("platform", "agentdb", "swarm")


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack, healthy, with something to ask about."""
    if not engine.own:
        pytest.skip("a process is killed by its number on this machine: the engine must run on it")
    project, folder = f"af-faults-{new_key().id}", tmp_path_factory.mktemp("faults")
    spec = spec_with_free_ports(name=project)
    made = prepare(engine, images, project, folder, spec, (compose.MAIN,))
    shutil.copytree(ROOT / "docs" / "guides", folder / "inputs" / "guides")
    try:
        made.up()
        yield made
    finally:
        remove_project(engine, project)


CASES = [(fault, name) for fault in ("kill", "pause", "partition") for name in SERVICES]


@pytest.mark.parametrize(("fault", "service"), CASES)
def test_a_fault_is_seen_heals_and_loses_nothing(stack: Stack, fault: str, service: str) -> None:
    """Catches a fault that health hides, that stays when its cause has gone, or that loses something."""
    until(lambda: all_ready(stack), 60, "ready before the fault")
    fault_then_whole(stack, f"{fault} of {service}", FAULTS[fault](stack, service), Accepted(stack))


def test_the_whole_stack_killed_comes_back_whole(stack: Stack) -> None:
    """Catches what only the death of all loses: writes in nobody's memory, runs that nobody takes over.

    Every container is killed by the engine, under writes and with runs accepted; `agentic-flow up` starts
    them again.
    """
    until(lambda: all_ready(stack), 60, "ready before the fault")
    with Accepted(stack, runs=4, agents=4) as accepted:
        stack.engine.run("kill", *stack.containers())
        seen_s = until(lambda: not all_ready(stack), SEEN_WITHIN_S, "the death of all seen")
        started_s = time.monotonic()
        done = agentic_flow(stack, "up", "--spec", "spec.json.yaml", "--dir", stack.folder, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready again")
        healed_s = time.monotonic() - started_s
        until(accepted.takes_writes, HEALED_WITHIN_S, "writes again")
        writes_s = time.monotonic() - started_s
    tell("kill of the whole stack (its end: `agentic-flow up`)", seen_s, healed_s, writes_s)
    accepted.all_there()


def agentic_flow(stack: Stack, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of ours, beside the stack, which its own description names."""
    (stack.folder / "spec.json.yaml").write_text(json.dumps(stack.spec.model_dump(mode="json")), "utf-8")
    return subprocess.run(
        [sys.executable, "-m", "agentic_flow", *map(str, words)],
        cwd=stack.folder,
        env={**stack.engine.environment, "AGENTIC_FLOW_DATA_DIR": str(stack.folder / "client")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
