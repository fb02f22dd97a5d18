"""How often the right file is among the first three that a search cites, beside plain BM25.

Corpus: the standard library of the running interpreter without its tests. Questions: `questions/`, written
without sight of the retriever; q001 to q030 were used to tune it, q031 to q060 (held-out) were not. Ours,
its vector side alone, and plain BM25 (SQLite FTS5, default tokenizer, question words joined by OR, raw chunk
text) search the very same chunks in the same run.

Usage: python benchmarks/retrieval.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import apsw
import structlog

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from agentic_flow.agentdb.ingest import ingest  # noqa: E402
from agentic_flow.agentdb.service import AgentDB  # noqa: E402
from agentic_flow.core.settings import AgentDBSettings  # noqa: E402
from agentic_flow.core.vectors import SearchQuery  # noqa: E402

CITATIONS = 3
TENANT, NAMESPACE = "benchmark", "stdlib"
FORBIDDEN = ("test/", "tests/", "idle_test/", "site-packages/", "__pycache__/")

Search = Callable[[str], Awaitable[list[str]]]
"""Question → paths of distinct files, best first."""


def question_set() -> ModuleType:
    """`questions/check.py`, which reads the questions and measures their overlap."""
    spec = importlib.util.spec_from_file_location("question_check", ROOT / "benchmarks/questions/check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def distinct(paths: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(paths))[:CITATIONS]


def agentdb_search(store: AgentDB, mode: str) -> Search:
    """Search through the public call that agents' memory_search makes."""

    async def search(question: str) -> list[str]:
        query = SearchQuery.model_validate({"text": question, "k": 30, "mode": mode})
        found = await store.search(TENANT, NAMESPACE, query)
        return distinct([str(hit.item.metadata["path"]) for hit in found.hits])

    return search


async def plain_bm25(store: AgentDB) -> Search:
    """The baseline over the chunks that the store holds."""
    connection = apsw.Connection(":memory:")
    connection.execute("CREATE VIRTUAL TABLE chunks USING fts5(path UNINDEXED, text)")
    cursor: str | None = None
    while True:
        page = await store.list_items(TENANT, NAMESPACE, cursor=cursor, limit=1000)
        connection.executemany(
            "INSERT INTO chunks VALUES (?, ?)",
            [(str(item.metadata["path"]), item.text) for item in page.items],
        )
        cursor = page.cursor
        if cursor is None:
            break

    async def search(question: str) -> list[str]:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question))
        found = connection.execute(
            "SELECT path FROM chunks WHERE chunks MATCH ? ORDER BY rank LIMIT 30", (words,)
        )
        return distinct([str(row[0]) for row in found])

    return search


async def _measure() -> dict[str, Any]:
    check = question_set()
    library = Path(sysconfig.get_paths()["stdlib"])
    questions = check.load_questions()
    settings = AgentDBSettings()
    with tempfile.TemporaryDirectory() as folder:
        async with AgentDB(Path(folder), settings) as store:
            report = await ingest(
                store,
                TENANT,
                NAMESPACE,
                {"stdlib": library},
                settings=settings,
                paths_forbidden=FORBIDDEN,
            )
            searches = {
                "ours": agentdb_search(store, "hybrid"),
                "plain_bm25": await plain_bm25(store),
                "vector_only": agentdb_search(store, "vector"),
            }
            groups = {
                "all": questions,
                "dev": questions[: check.DEV_SIZE],
                "held_out": questions[check.DEV_SIZE :],
                "low_overlap": [
                    q
                    for q in questions
                    if len(check.overlap(q.question, q.file, library)) <= check.LOW_OVERLAP
                ],
            }
            found: dict[str, dict[str, bool]] = {}
            query_cpu_s: dict[str, float] = {}
            for name, search in searches.items():
                await search("warm the caches")
                started_s = time.process_time()
                found[name] = {
                    q.id: bool({q.file, *q.also} & set(await search(q.question))) for q in questions
                }
                query_cpu_s[name] = (time.process_time() - started_s) / len(questions)
    return {
        "files": report.added,
        "chunks": report.chunks,
        "citations": CITATIONS,
        "questions": {group: len(members) for group, members in groups.items()},
        "members": {group: [q.id for q in members] for group, members in groups.items()},
        "share": {
            name: {
                group: sum(hits[q.id] for q in members) / len(members) for group, members in groups.items()
            }
            for name, hits in found.items()
        },
        "query_cpu_s": query_cpu_s,
        "missed": {name: [q for q, hit in hits.items() if not hit] for name, hits in found.items()},
    }


def measure() -> dict[str, Any]:
    """Shares of questions answered by one of the first three files, by search and group of questions."""
    return asyncio.run(_measure())


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    groups = list(figures["questions"])
    lines = [
        "| right file among the first 3 | "
        + " | ".join(f"{group.replace('_', '-')} ({figures['questions'][group]})" for group in groups)
        + " | CPU ms per query |",
        "|---|" + "---|" * (len(groups) + 1),
    ]
    for name, shares in figures["share"].items():
        cells = " | ".join(f"{shares[group]:.3f}" for group in groups)
        lines.append(f"| {name.replace('_', ' ')} | {cells} | {figures['query_cpu_s'][name] * 1000:.1f} |")
    return "\n".join([*lines, "", f"{figures['files']} files, {figures['chunks']} chunks."])


def main() -> int:
    """Print the table; 1 when ours is not above plain BM25 on both halves."""
    parser = argparse.ArgumentParser(description="Retrieval quality over the standard library.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    # Data on stdout, talk on stderr.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    figures = measure()
    print(json.dumps(figures) if options.json else table(figures))
    share = figures["share"]
    better = all(share["ours"][half] > share["plain_bm25"][half] for half in ("dev", "held_out"))
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
