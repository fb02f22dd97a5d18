"""Teams in parallel by the familiar variables: each does its job without a network and ends well."""

from __future__ import annotations

import itertools
import json
import shutil
from datetime import datetime
from pathlib import Path

from container import until
from engine import Engine
from images import Images
from stacks import prepare, spec_with_free_ports

from agentic_flow.deploy import compose
from agentic_flow.deploy.variants import BENCHMARK, PAUSE_S, TEAMS, TRIES

ROOT = Path(__file__).resolve().parents[2]


def test_every_team_works_as_its_variables_say(
    engine: Engine, images: Images, project: object, tmp_path: Path
) -> None:
    """Catches a variable without effect, a team of another size, and a job that fails or needs a network."""
    name = project()  # type: ignore[operator]
    spec = spec_with_free_ports()
    stack = prepare(engine, images, name, tmp_path, spec, (compose.PARALLEL,), targets=("platform",))
    shutil.copytree(ROOT / "docs" / "guides", tmp_path / "inputs" / "guides")
    stack.variables = {"ITERATIONS": "2"}
    stack.compose("up", "--no-log-prefix", timeout_s=600.0)
    states = {one["Service"]: one for one in stack.states()}
    assert set(states) == {team.name for team in (*TEAMS, BENCHMARK)}
    assert {name: one["ExitCode"] for name, one in states.items()} == dict.fromkeys(states, 0), stack.logs()
    for team in TEAMS:
        (container,) = stack.containers(team.name)
        result = json.loads(engine.run("logs", container).stdout)
        assert result["state"] == "completed"
        assert result["topology"] == team.variables["SWARM_TOPOLOGY"]
        workers = {agent["name"] for agent in result["agents"] if agent["role"] == "worker"}
        most = int(team.variables["MAX_AGENTS"])
        # A hierarchy works on the tasks that the goal is split into, two here; the others work all of them.
        assert len(workers) == (2 if team.name == "hierarchical" else most)
    for one in stack.inspected():
        assert one["HostConfig"]["NetworkMode"] == "none"
        assert one["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    (bench,) = stack.containers("benchmark")
    engine.run("cp", f"{bench}:/data/results/bench.json", tmp_path / "bench.json")
    records = json.loads((tmp_path / "bench.json").read_text())
    assert {one["topology"] for one in records} == {"mesh", "hierarchical", "ring", "star"}
    assert {one["iteration"] for one in records} == {1, 2}
    assert all(one["verdict"] == "ok" for one in records)


def test_a_job_that_fails_is_begun_again_after_a_pause(
    engine: Engine, images: Images, project: object, tmp_path: Path
) -> None:
    """Catches a job that is begun again at once, for ever, or never; Compose has no word for a pause."""
    name = project()  # type: ignore[operator]
    stack = prepare(
        engine, images, name, tmp_path, spec_with_free_ports(), (compose.PARALLEL,), targets=("platform",)
    )
    stack.override({"ring": {"command": ["run", "What is here?", "--input", "/inputs/nothing"]}})
    stack.compose("up", "--detach", "ring")
    (container,) = stack.containers("ring")

    def given_up() -> bool:
        said = engine.output("inspect", "--format={{.State.Status}} {{.RestartCount}}", container)
        return said == f"exited {TRIES}"

    until(given_up, "the last try")
    lines = engine.run("logs", "--timestamps", container).stderr.splitlines()
    failed = [
        datetime.fromisoformat(line.split()[0][:26]) for line in lines if f"ends in {PAUSE_S} s" in line
    ]
    assert len(failed) == TRIES + 1, lines
    pauses_s = [(later - sooner).total_seconds() for sooner, later in itertools.pairwise(failed)]
    assert min(pauses_s) >= PAUSE_S
