"""CPU per durable step of the run engine, beside a raw SQLite commit of the same bytes.

Both write to a fresh file in WAL mode with `synchronous=FULL`; every step is on disk before the next begins.

Usage: python benchmarks/steps.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TITLE = "A durable step"
sys.path.insert(0, str(ROOT / "src"))

from agentic_flow.core.messages import JsonObject  # noqa: E402
from agentic_flow.core.ports import StepContext, WorkflowContext  # noqa: E402
from agentic_flow.swarm.engine import SqlRunEngine  # noqa: E402

STEPS, ROUNDS = 300, 5
RESULT: JsonObject = {"text": "x" * 1000}


async def _engine_round(engine: SqlRunEngine, number: int) -> float:
    started_s = time.process_time()
    await engine.start("steps", f"run-{number}", {}, tenant="benchmark")
    record = await engine.wait(f"run-{number}")
    assert record.state == "completed", record
    return (time.process_time() - started_s) / STEPS


async def _engine(place: Path) -> list[float]:
    engine = SqlRunEngine(None, place, lease_s=10.0, runs_parallel_max=1)

    async def step(_: StepContext) -> JsonObject:
        return RESULT

    async def workflow(context: WorkflowContext, _: JsonObject) -> JsonObject:
        for _number in range(STEPS):
            await context.step("step", step)
        return {}

    engine.register("steps", workflow)
    async with engine.open():
        return [await _engine_round(engine, number) for number in range(ROUNDS)]


def _raw(place: Path) -> list[float]:
    connection = sqlite3.connect(place / "raw.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE steps (id INTEGER PRIMARY KEY, output TEXT)")
    text = json.dumps(RESULT)
    rounds: list[float] = []
    for _ in range(ROUNDS):
        started_s = time.process_time()
        for _number in range(STEPS):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO steps (output) VALUES (?)", (text,))
            connection.execute("COMMIT")
        rounds.append((time.process_time() - started_s) / STEPS)
    connection.close()
    return rounds


def measure() -> dict[str, Any]:
    """CPU milliseconds per step: medians of the rounds."""
    with tempfile.TemporaryDirectory() as place:
        raw = statistics.median(_raw(Path(place))) * 1000
        engine = statistics.median(asyncio.run(_engine(Path(place)))) * 1000
    return {"engine_ms": engine, "raw_commit_ms": raw, "ratio": engine / raw}


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    return "\n".join(
        [
            "| durable step | CPU ms |",
            "|---|---|",
            f"| run engine (SQLite) | {figures['engine_ms']:.2f} |",
            f"| raw SQLite commit of the same bytes | {figures['raw_commit_ms']:.2f} |",
        ]
    )


def section() -> str:
    """The section of RESULTS.md."""
    return f"{table(measure())}\n\n`python benchmarks/steps.py`"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="CPU per durable step.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = measure()
    print(json.dumps(figures) if options.json else table(figures))


if __name__ == "__main__":
    main()
