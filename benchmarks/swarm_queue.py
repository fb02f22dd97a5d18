"""Shared queues: from submission to start in another process, and what ten thousand waiting runs cost.

One process submits and executes nothing, another takes and accepts nothing; both use one store. Times are
from before the submission to the first line of the run's first step, by the machine's clock.

Usage: python benchmarks/swarm_queue.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from process_memory import peak_mib

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Shared queues"
STARTS, QUEUED, TENANTS = 200, 10_000, 20
sys.path.insert(0, str(ROOT / "src"))


def engine_on(url: str, place: Path, places: int) -> Any:
    """An engine with one workflow, whose step says when it began."""
    from agentic_flow.core.messages import JsonObject
    from agentic_flow.core.ports import StepContext, WorkflowContext
    from agentic_flow.swarm.engine import SqlRunEngine

    async def quick(context: WorkflowContext, _: JsonObject) -> JsonObject:
        async def begin(_: StepContext) -> JsonObject:
            return {"at_s": time.time()}

        return await context.step("begin", begin)

    engine = SqlRunEngine(url or None, place, lease_s=30.0, runs_parallel_max=places)
    engine.register("quick", quick)
    return engine


async def work(url: str, place: Path) -> None:
    """A worker, until its standard input ends; then it says its peak of memory."""
    async with engine_on(url, place, 8).open(takeover=True, queues=["q"]):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    print(peak_mib(), flush=True)


async def submit(url: str, place: Path) -> dict[str, float]:
    """Starts one by one, then many at once; and what the worker needed for those."""
    figures: dict[str, float] = {}
    engine = engine_on(url, place, 0)
    async with engine.open():
        with worker(url, place):
            delays_ms: list[float] = []
            for number in range(STARTS):
                asked_s = time.time()
                await engine.start("quick", f"one-{number}", {}, tenant="t", queue="q")
                output = (await engine.wait(f"one-{number}")).output
                delays_ms.append((output["at_s"] - asked_s) * 1000)
        cuts = statistics.quantiles(delays_ms, n=100)
        figures |= {"start_p50_ms": cuts[49], "start_p99_ms": cuts[98]}
        cpu_s = time.process_time()
        payload = {"goal": "x" * 1000}
        for first in range(0, QUEUED, 500):
            starts = [
                engine.start("quick", f"many-{n}", payload, tenant=f"t{n % TENANTS}", queue="q")
                for n in range(first, first + 500)
            ]
            assert all(await asyncio.gather(*starts))
        figures["accept_cpu_ms"] = (time.process_time() - cpu_s) / QUEUED * 1000
        figures["submitter_peak_mb"] = peak_mib()
        began_s = time.perf_counter()
        with worker(url, place) as peak_mb:
            while (depths := await engine.queue_depths()) and depths[0].waiting:
                await asyncio.sleep(0.1)
            figures["runs_per_s"] = QUEUED / (time.perf_counter() - began_s)
        figures["worker_peak_mb"] = peak_mb[0]
    return figures


@contextlib.contextmanager
def worker(url: str, place: Path) -> Generator[list[float]]:
    """A worker process; its peak of memory is in the list afterwards."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", url, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    peak_mb: list[float] = []
    try:
        yield peak_mb
    finally:
        process.stdin.close()
        peak_mb.append(float(process.stdout.readline()))
        process.wait(60)
        process.stdout.close()


@contextlib.contextmanager
def stores() -> Generator[dict[str, str]]:
    """Name → URL: SQLite, and PostgreSQL where the wheel of the tests is installed."""
    with contextlib.ExitStack() as stack:
        found = {"SQLite": ""}
        with contextlib.suppress(ImportError):
            sys.path.insert(0, str(ROOT / "tests"))
            from postgres_server import new_database, postgres_server

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found["PostgreSQL"] = new_database(stack.enter_context(postgres_server(folder)))
        yield found


def measure() -> dict[str, dict[str, float]]:
    """Store → figures, each from fresh processes."""
    figures: dict[str, dict[str, float]] = {}
    with stores() as urls:
        for name, url in urls.items():
            with tempfile.TemporaryDirectory() as place:
                done = subprocess.run(
                    [sys.executable, __file__, "--submit", url, place],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            figures[name] = json.loads(done.stdout)
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table, beside what was asked."""
    rows = [
        ("submission to start in the other process, p50 ms", "start_p50_ms", ".1f", "50"),
        ("submission to start in the other process, p99 ms", "start_p99_ms", ".1f", "250"),
        (f"peak MB of the submitter, {QUEUED:,} runs of 1 kB waiting", "submitter_peak_mb", ".0f", "300"),
        ("peak MB of the worker that does them", "worker_peak_mb", ".0f", "300"),
        ("CPU ms to accept one", "accept_cpu_ms", ".2f", ""),
        (f"runs/s of one worker with 8 places, {TENANTS} tenants", "runs_per_s", ".0f", ""),
    ]
    lines = [f"| shared queue | {' | '.join(figures)} | at most |", "|---" * (len(figures) + 2) + "|"]
    for name, key, form, most in rows:
        cells = " | ".join(f"{each[key]:{form}}" for each in figures.values())
        lines.append(f"| {name} | {cells} | {most} |")
    return "\n".join(lines)


def section() -> str:
    """The section of RESULTS.md."""
    about = (
        "One process submits and executes nothing, another takes and accepts nothing. A run has one step; "
        "times are from before its submission to the beginning of that step, by the machine's clock."
    )
    return f"{about}\n\n{table(measure())}\n\n`python benchmarks/swarm_queue.py`"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Shared queues of the run engine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--work", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--submit", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        asyncio.run(work(options.work[0], Path(options.work[1])))
    elif options.submit:
        print(json.dumps(asyncio.run(submit(options.submit[0], Path(options.submit[1])))))
    else:
        figures = measure()
        print(json.dumps(figures) if options.json else table(figures))


if __name__ == "__main__":
    main()
