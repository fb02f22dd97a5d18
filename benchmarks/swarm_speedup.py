# pyright: basic
"""What more workers bring, and what the scheduler alone costs per step at 1,000 agents.

Seven test files of this repository, of pure modules, are run by a star with 1, 2 and 4 workers through
`swarm.bench_suite`; they use the processor, so more workers than cores bring nothing. A model is asked by a
mesh of 1, 8 and 64. It is an HTTP server of ours, in a process of its
own, that answers after 1 s; agents × 1 s is the work, and the share of the ideal speed-up is what is lost to
coordination.

Usage: python benchmarks/swarm_speedup.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

TITLE = "Speed-up of a team"
PLOT = Path(__file__).with_name("swarm_speedup.svg")
WORKERS = (1, 2, 4)
AGENTS = (1, 8, 64)
MODEL_S = 1.0
STEP_AGENTS, STEPS = 1000, 5
TESTS = (
    "test_budget.py",
    "test_citations.py",
    "test_picture.py",
    "test_prompts.py",
    "test_swarm_scheduling.py",
    "test_voting.py",
    "test_workflow_plan.py",
)


def measure_tests() -> dict[int, dict[str, float]]:
    """Workers → wall seconds of the work, CPU seconds, files."""
    from agentic_flow.core.settings import load
    from agentic_flow.runtime.swarm_bench import Bench, Plan

    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        project = Path(place) / "project"
        project.mkdir()
        for name in TESTS:  # beside the sources they are of, which are on the interpreter's path
            (project / name).write_bytes((ROOT / "tests" / "unit" / name).read_bytes())
        (project / "conftest.py").write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n", "utf-8"
        )
        settings = load({"data_dir": str(Path(place) / "data")}, environ={}).settings
        bench = Bench(settings=settings, folder=project, python=Path(sys.executable))
        for workers in WORKERS:
            one = asyncio.run(bench.run("tests", Plan("star", workers), 1))
            passed = sum(file.outcome == "passed" for file in one.files)
            assert (one.verdict, passed) == ("ok", len(TESTS)), one.failing
            found[workers] = {"wall_s": one.work_s, "cpu_s": one.cpu_s, "files": len(one.files)}
    return found


def serve_model() -> None:
    """A provider that answers after `MODEL_S`; says where, and serves until its input ends."""
    from agentic_flow.testing.fake_provider import FakeProvider, Reply

    with FakeProvider(lambda _: Reply.text("I have seen it.", delay_s=MODEL_S)) as provider:
        print(provider.openai_url, flush=True)
        sys.stdin.read()


async def _model_run(url: str, agents: int, place: Path) -> float:
    """Wall seconds between the first and the last recorded step of a mesh's first round."""
    from agentic_flow.client import AsyncClient
    from agentic_flow.core.settings import load

    environ = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
    flags = {"data_dir": str(place), "gateway.model": "openai:model", "memory.enabled": False}
    settings = load(flags, environ=environ, directory=place, user_config=place / "none.toml").settings
    async with AsyncClient(settings=settings) as client:
        run_id = await client.runs.submit("Say that you have seen it.", topology="mesh", agents=agents)
        await client.runs.wait(run_id)
        steps = [s for s in await client.runs.steps(run_id) if s.agent.startswith("draft-")]
    assert len({step.agent for step in steps}) == agents, steps
    began_s = min(step.started_at_s or 0.0 for step in steps)
    return max(step.completed_at_s or 0.0 for step in steps) - began_s


def measure_model() -> dict[int, float]:
    """Agents → wall seconds of one round of model calls."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve-model"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    found: dict[int, float] = {}
    try:
        url = server.stdout.readline().strip()
        for agents in AGENTS:
            with tempfile.TemporaryDirectory() as place:
                asyncio.run(_model_run(url, agents, Path(place)))  # what is imported and made once
            with tempfile.TemporaryDirectory() as place:
                found[agents] = asyncio.run(_model_run(url, agents, Path(place)))
    finally:
        server.stdin.close()
        server.wait(30)
    return found


def measure_scheduler() -> dict[str, float]:
    """CPU milliseconds per step of what decides, without an engine and without a model.

    A hierarchy of 1,000 workers: every batch by the topology, checked, made a record and read back, as `team`
    does it. What the engine adds to it is in the section of the run engine.
    """
    from agentic_flow.swarm.payloads import as_record, from_record
    from agentic_flow.swarm.topology import PLAN, Shape, Task, TeamState, checked, topology_named

    topology = topology_named("hierarchical")
    shape = Shape(agents=STEP_AGENTS)
    done: dict[str, bool] = {}
    plans: dict[str, tuple[Task, ...]] = {}
    assigned = decisions = 0
    began_s = time.process_time()
    while True:
        state = TeamState("goal", shape, plans, done, {}, {})
        batch = [from_record(as_record(one)) for one in checked("hierarchical", topology(state), done)]
        decisions += 1
        if not batch:
            break
        for one in batch:
            assigned += 1
            done[one.key] = True
            if one.role == "planner":
                plans[one.key] = tuple(Task(f"task {n}") for n in range(one.tasks_max))
    cpu_ms = (time.process_time() - began_s) * 1000
    assert len(plans[PLAN]) == STEP_AGENTS, plans
    assert assigned >= STEP_AGENTS, assigned
    return {
        "assignments": assigned,
        "decisions": decisions,
        "cpu_ms_per_step": cpu_ms / (assigned * STEPS),
        "cpu_ms_per_decision": cpu_ms / decisions,
    }


def tables(tests: dict[int, dict[str, float]], model: dict[int, float], scheduler: dict[str, float]) -> str:
    """The figures as Markdown."""
    load = os.getloadavg()[0]
    lines = [
        f"{len(TESTS)} test files of this repository by a star, {os.cpu_count()} cores, load {load:.1f}. "
        "Where others are at work too, more workers get a greater share of the machine: a speed-up beyond "
        "its cores is of that, not of the team.",
        "",
        "| workers | wall s | CPU s | speed-up |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {one['wall_s']:.1f} | {one['cpu_s']:.1f} | {tests[1]['wall_s'] / one['wall_s']:.2f} |"
        for n, one in tests.items()
    ]
    lines += [
        "",
        f"One round of a model that answers after {MODEL_S:g} s, agents of one mesh, all at once:",
        "",
        "| agents | wall s | speed-up | of the ideal |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {wall_s:.2f} | {n * model[1] / wall_s:.1f} | {100 * model[1] / wall_s:.0f} % |"
        for n, wall_s in model.items()
    ]
    lines += [
        "",
        f"The scheduler alone, {STEP_AGENTS:,} workers of {STEPS} steps: "
        f"{scheduler['cpu_ms_per_step']:.4f} ms CPU per step (at most 1), "
        f"{scheduler['cpu_ms_per_decision']:.1f} ms per decision; nothing is stored and no "
        "model asked.",
    ]
    return "\n".join(lines)


def plot(tests: dict[int, dict[str, float]], model: dict[int, float]) -> None:
    """Speed-up over workers, both on logarithmic axes, beside the ideal."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "agentic-flow"}):
        figure = Figure(figsize=(8.5, 3.6), layout="tight")
        for place, found, title in (
            (1, {n: tests[1]["wall_s"] / one["wall_s"] for n, one in tests.items()}, "test files"),
            (2, {n: n * model[1] / wall_s for n, wall_s in model.items()}, "a model that takes 1 s"),
        ):
            numbers = list(found)
            axes = figure.add_subplot(1, 2, place)
            axes.plot(numbers, numbers, "--", color="#9aa3ae", label="ideal")
            axes.plot(numbers, list(found.values()), "o-", color="#2f6fb0", label="measured")
            axes.set(xscale="log", yscale="log", xlabel="agents at once", ylabel="speed-up", title=title)
            axes.set_xticks(numbers, [str(number) for number in numbers])
            axes.set_yticks(numbers, [str(number) for number in numbers])
            axes.minorticks_off()
            axes.legend(frameon=False)
        figure.savefig(PLOT, format="svg", metadata={"Date": None})


def section() -> str:
    """The section of RESULTS.md."""
    tests, model, scheduler = measure_tests(), measure_model(), measure_scheduler()
    plot(tests, model)
    return (
        f"{tables(tests, model, scheduler)}\n\n![Speed-up over agents at once]({PLOT.name})\n\n"
        "`python benchmarks/swarm_speedup.py`"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Speed-up of a team, and what its scheduler costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--serve-model", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_model:
        serve_model()
        return
    tests, model, scheduler = measure_tests(), measure_model(), measure_scheduler()
    if options.json:
        print(json.dumps({"tests": tests, "model": model, "scheduler": scheduler}))
    else:
        print(tables(tests, model, scheduler))


if __name__ == "__main__":
    main()
