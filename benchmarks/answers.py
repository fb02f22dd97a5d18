"""Does a whole run cite the right file? The keyless model's answers beside search alone and plain BM25.

For each question of `questions/`, `agentic-flow run --json` is what is measured: its first three citations,
as printed. The peers are those of `retrieval.py`, in the same run over the same folder; they get their first
three distinct files.

Usage: python benchmarks/answers.py [--json]   (exits 1 unless the answers beat BM25 on both halves)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "src"))

import retrieval  # noqa: E402
from agentic_flow.client import AsyncClient  # noqa: E402
from agentic_flow.core.settings import load  # noqa: E402


async def _run_all() -> tuple[dict[str, bool], float]:
    """Question id → whether a run's first three citations hold a right file; and CPU seconds per run."""
    library = Path(sysconfig.get_paths()["stdlib"])
    questions = retrieval.question_set().load_questions()
    hits: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as place:
        loaded = load({"data_dir": place, "gateway.model": "extractive"}, environ={}, directory=Path(place))
        async with AsyncClient(settings=loaded.settings) as client:
            # Reads the folder; not counted below.
            await client.run("warm up", input=library, paths_forbidden=retrieval.FORBIDDEN)
            started_s = time.process_time()
            for question in questions:
                result = await client.run(
                    question.question, input=library, paths_forbidden=retrieval.FORBIDDEN
                )
                cited = {citation.path for citation in result.citations[: retrieval.CITATIONS]}
                hits[question.id] = bool({question.file, *question.also} & cited)
            return hits, (time.process_time() - started_s) / len(questions)


def measure() -> dict[str, Any]:
    """The figures of `retrieval.measure`, with the share of whole runs beside them as `answer`."""
    figures = retrieval.measure()
    hits, cpu_s = asyncio.run(_run_all())
    members = figures["members"]
    share = {group: sum(hits[q] for q in ids) / len(ids) for group, ids in members.items()}
    figures["share"] = {"answer": share, **figures["share"]}
    figures["query_cpu_s"]["answer"] = cpu_s
    figures["missed"]["answer"] = [q for q, hit in hits.items() if not hit]
    return figures


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Right files among the first citations of whole runs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = measure()
    print(json.dumps(figures) if options.json else retrieval.table(figures))
    share = figures["share"]
    better = all(share["answer"][half] > share["plain_bm25"][half] for half in ("dev", "held_out"))
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
