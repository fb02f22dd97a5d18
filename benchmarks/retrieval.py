"""Does the right file come up? 60 questions over the standard library, beside plain BM25 on the same chunks.

For each question the first three distinct files are compared with the file that answers it:

    answer   the citations of a whole run with the keyless model, as `agentic-flow run --json` prints them
    search   AgentDB's hybrid search, which the agents call
    bm25     SQLite FTS5 with its default tokenizer over the raw text of the same chunks, words OR-ed
    vector   the hashed n-gram embedder alone

    python benchmarks/retrieval.py [--json] [--check] [--no-runs]

`--check` exits 1 unless the answer beats BM25 on both halves of the set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import apsw

sys.path.insert(0, str(Path(__file__).resolve().parent))

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.client import AsyncClient
from agentic_flow.core.auth import DEFAULT_TENANT
from agentic_flow.core.settings import load
from agentic_flow.core.vectors import SearchQuery
from agentic_flow.swarm.inputs import Folder, Inputs
from agentic_flow.swarm.runs import RunSpec
from questions.check import Question, load_questions, overlap

TOP = 3
NO_TESTS = ("test/", "tests/", "idle_test/", "site-packages/", "__pycache__/")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
Ranking = list[str]


def first_files(paths: Iterable[str]) -> Ranking:
    """The first distinct paths of a ranking of chunks."""
    return list(dict.fromkeys(paths))[:TOP]


class PlainBM25:
    """The peer: what one gets from SQLite in an afternoon."""

    def __init__(self) -> None:
        self._db = apsw.Connection(":memory:")
        self._db.execute("CREATE VIRTUAL TABLE chunks USING fts5(text, path UNINDEXED)")

    def add(self, rows: Sequence[tuple[str, str]]) -> None:
        self._db.executemany("INSERT INTO chunks (text, path) VALUES (?, ?)", rows)

    def rank(self, question: str) -> Ranking:
        match = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question))
        found = self._db.execute(
            "SELECT path FROM chunks WHERE chunks MATCH ? ORDER BY bm25(chunks) LIMIT 200", (match,)
        )
        return first_files(str(row[0]) for row in found)


async def rank_all(questions: Sequence[Question], *, runs: bool) -> dict[str, dict[str, Ranking]]:
    """System → question id → its first three files."""
    ranked: dict[str, dict[str, Ranking]] = {"answer": {}, "search": {}, "bm25": {}, "vector": {}}
    with tempfile.TemporaryDirectory() as place:
        loaded = load({"data_dir": place, "gateway.model": "extractive"}, environ={}, directory=Path(place))
        folder = Folder.of(RunSpec(goal="-", inputs=(str(STDLIB),), paths_forbidden=NO_TESTS))
        async with AgentDB(Path(place), loaded.settings.agentdb) as store:
            await Inputs(store, loaded.settings.agentdb).ingest(DEFAULT_TENANT, folder, None)
            peer = PlainBM25()
            cursor: str | None = None
            while True:
                page = await store.list_items(DEFAULT_TENANT, folder.namespace, cursor=cursor, limit=1000)
                peer.add([(item.text, str(item.metadata["path"])) for item in page.items])
                cursor = page.cursor
                if cursor is None:
                    break
            for question in questions:
                ranked["bm25"][question.id] = peer.rank(question.question)
                for mode, system in (("hybrid", "search"), ("vector", "vector")):
                    query = SearchQuery.model_validate({"text": question.question, "k": 100, "mode": mode})
                    found = await store.search(DEFAULT_TENANT, folder.namespace, query)
                    paths = (str(hit.item.metadata["path"]) for hit in found.hits)
                    ranked[system][question.id] = first_files(paths)
        if not runs:
            del ranked["answer"]
            return ranked
        async with AsyncClient(settings=loaded.settings) as client:
            for question in questions:
                result = await client.run(question.question, input=STDLIB, paths_forbidden=NO_TESTS)
                ranked["answer"][question.id] = [citation.path for citation in result.citations[:TOP]]
    return ranked


def measure(*, runs: bool = True) -> dict[str, object]:
    """Shares of questions with a right file among the first three, by part of the set and system."""
    questions = load_questions()
    ranked = asyncio.run(rank_all(questions, runs=runs))
    parts: dict[str, Callable[[Question], bool]] = {
        "all": lambda q: True,
        "dev": lambda q: q.id <= "q030",
        "held-out": lambda q: q.id > "q030",
        "overlap at most 1 word": lambda q: len(overlap(q.question, q.file)) <= 1,
    }
    shares: dict[str, dict[str, float]] = {}
    for part, belongs in parts.items():
        chosen = [question for question in questions if belongs(question)]
        shares[part] = {"questions": len(chosen)} | {
            system: sum(bool({q.file, *q.also} & set(found[q.id])) for q in chosen) / len(chosen)
            for system, found in ranked.items()
        }
    missed = [q.id for q in questions if not {q.file, *q.also} & set(ranked["search"][q.id])]
    return {"shares": shares, "missed_by_search": missed}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--no-runs", action="store_true", help="search only; quick")
    arguments = parser.parse_args()
    measured = measure(runs=not arguments.no_runs)
    shares: dict[str, dict[str, float]] = measured["shares"]  # type: ignore[assignment]
    if arguments.json:
        print(json.dumps(measured))
    else:
        systems = [name for name in shares["all"] if name != "questions"]
        print("right file among the first three".ljust(34) + "".join(name.rjust(9) for name in systems))
        for part, row in shares.items():
            label = f"{part} ({int(row['questions'])} questions)".ljust(34)
            print(label + "".join(f"{row[system]:9.2f}" for system in systems))
        print("missed by search:", *measured["missed_by_search"])  # type: ignore[misc]
    ours = "search" if arguments.no_runs else "answer"
    beaten = all(shares[part][ours] > shares[part]["bm25"] for part in ("dev", "held-out"))
    return 1 if arguments.check and not beaten else 0


if __name__ == "__main__":
    sys.exit(main())
