"""What reading the whole standard library into AgentDB costs: CPU time, peak memory, and doing it again.

Each figure is of a process of its own, interpreter and imports included. Corpus: the standard library of the
running interpreter without its tests, installed packages and caches.

Usage: python benchmarks/ingest.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog

from process_memory import peak_mib

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Reading the standard library"
sys.path.insert(0, str(ROOT / "src"))

TENANT, NAMESPACE = "benchmark", "stdlib"
FORBIDDEN = ("test/", "tests/", "idle_test/", "site-packages/", "__pycache__/")
QUESTION = "How do I get an order in which tasks that depend on each other can run?"
WARM_QUERIES = 20

LIMITS = {
    "ingest_cpu_s": 20.0,
    "ingest_peak_mib": 300.0,
    "unchanged_wall_s": 3.0,
    "cold_query_cpu_s": 1.5,
    "warm_query_cpu_s": 0.3,
}


async def _ingest(data: Path) -> dict[str, Any]:
    from agentic_flow.agentdb.ingest import ingest
    from agentic_flow.agentdb.service import AgentDB
    from agentic_flow.core.settings import AgentDBSettings

    settings = AgentDBSettings()
    started_s = time.monotonic()
    async with AgentDB(data, settings) as store:
        report = await ingest(
            store,
            TENANT,
            NAMESPACE,
            {"stdlib": Path(sysconfig.get_paths()["stdlib"])},
            settings=settings,
            paths_forbidden=FORBIDDEN,
        )
    return {"report": report.model_dump(), "wall_s": time.monotonic() - started_s}


async def _query(data: Path, repetitions: int) -> dict[str, Any]:
    from agentic_flow.agentdb.service import AgentDB
    from agentic_flow.core.settings import AgentDBSettings
    from agentic_flow.core.vectors import SearchQuery

    async with AgentDB(data, AgentDBSettings()) as store:
        query = SearchQuery(text=QUESTION, k=8)
        found = await store.search(TENANT, NAMESPACE, query)
        started_s = time.process_time()
        for _ in range(repetitions):
            await store.search(TENANT, NAMESPACE, query)
        warm_s = (time.process_time() - started_s) / repetitions if repetitions else None
    return {"first": found.hits[0].item.id, "warm_query_cpu_s": warm_s}


def _child(task: str, data: Path) -> dict[str, Any]:
    """Run one task in a process of its own; what it printed, and what the kernel says it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, "--data", str(data)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    figures["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures


def measure() -> dict[str, Any]:
    """Figures of the first ingestion, of the second over unchanged files, and of queries."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        first = _child("ingest", data)
        second = _child("ingest", data)
        cold = _child("query", data)
        warm = _child("queries", data)
        size_bytes = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    assert second["report"]["unchanged"] == first["report"]["added"], "the second run read files again"
    return {
        "files": first["report"]["added"],
        "chunks": first["report"]["chunks"],
        "ingest_cpu_s": first["cpu_s"],
        "ingest_wall_s": first["wall_s"],
        "ingest_peak_mib": first["peak_mib"],
        "unchanged_cpu_s": second["cpu_s"],
        "unchanged_wall_s": second["wall_s"],
        "database_mib": size_bytes / (1024 * 1024),
        "cold_query_cpu_s": cold["cpu_s"],
        "cold_query_peak_mib": cold["peak_mib"],
        "warm_query_cpu_s": warm["warm_query_cpu_s"],
        "limits": LIMITS,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| figure | measured | at most |", "|---|---|---|"]
    for name, value in figures.items():
        if isinstance(value, float):
            limit = figures["limits"].get(name)
            lines.append(f"| {name.replace('_', ' ')} | {value:.3f} | {'' if limit is None else limit} |")
    return "\n".join([*lines, "", f"{figures['files']} files, {figures['chunks']} chunks."])


def section() -> str:
    """The section of RESULTS.md."""
    return f"""Interpreter's start and imports are included, except in the warm query.

{table(measure())}

`python benchmarks/ingest.py`"""


def main() -> int:
    """Print the table; 1 when a figure is past its limit."""
    parser = argparse.ArgumentParser(description="Cost of reading the standard library into AgentDB.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--task", choices=("ingest", "query", "queries"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Data on stdout, talk on stderr.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if options.task is not None:
        if options.task == "ingest":
            figures = asyncio.run(_ingest(options.data))
        else:
            figures = asyncio.run(_query(options.data, WARM_QUERIES if options.task == "queries" else 0))
        figures["peak_mib"] = peak_mib()
        print(json.dumps(figures))
        return 0
    figures = measure()
    print(json.dumps(figures) if options.json else table(figures))
    return int(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
