"""AgentDB among processes: kill -9 in the middle of an ingestion, and two processes on one folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest

from agentic_flow.agentdb.ingest import ingest
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item, SearchQuery

pytestmark = pytest.mark.anyio

TENANT, NAMESPACE = "acme", "input"
SETTINGS = AgentDBSettings(embedding_dimension=256)
FILES = 400
KILLS = 12
LIVES_MAX = 4 * KILLS

INGEST = """
import asyncio, sys
from pathlib import Path
import structlog
from agentic_flow.agentdb.ingest import ingest
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main(data, root):
    settings = AgentDBSettings(embedding_dimension=256)
    async with AgentDB(Path(data), settings) as store:
        await ingest(store, "acme", "input", {"root": Path(root)}, settings=settings,
                     progress=lambda done, total: print(done, flush=True))

asyncio.run(main(*sys.argv[1:]))
"""

WRITE = """
import asyncio, sys
from pathlib import Path
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item

async def main(data, name, count):
    async with AgentDB(Path(data), AgentDBSettings(embedding_dimension=256)) as store:
        await store.create_namespace("acme", "input")
        for number in range(int(count)):
            await store.upsert("acme", "input", [Item(id=f"{name}-{number}", text=f"{name} wrote {number}")])
            print(number, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def many_files(root: Path) -> None:
    for number in range(FILES):
        folder = root / f"part{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        body = "\n\n".join(f"Paragraph {p} of file {number}." for p in range(5))
        (folder / f"file{number:03d}.md").write_text(f"# File {number}\n\n{body}\n", "utf-8")


async def check_whole(data: Path) -> set[str]:
    """Every stored document has all its chunks, and both indexes have them too. Returns the paths."""
    async with AgentDB(data, SETTINGS) as store:
        if not await store.namespaces(TENANT):
            return set()
        known = set(await store.fingerprints(TENANT, NAMESPACE))
        found: dict[str, list[Item]] = {path: [] for path in known}
        cursor: str | None = None
        while True:
            page = await store.list_items(TENANT, NAMESPACE, cursor=cursor, limit=1000)
            for item in page.items:
                found[item.metadata["path"]].append(item)  # a chunk without its document would be a KeyError
            cursor = page.cursor
            if cursor is None:
                break
        for path, chunks in found.items():
            number = int(path[-6:-3])
            text = "\n".join(chunk.text for chunk in sorted(chunks, key=lambda c: c.metadata["line_start"]))
            assert f"# File {number}" in text
            assert f"Paragraph 4 of file {number}." in text
    return known


async def test_kill_during_ingestion_loses_nothing_and_leaves_nothing_half(tmp_path: Path) -> None:
    """Catches a document with some of its chunks, or an acknowledged one that is gone, after kill -9."""
    root = tmp_path / "root"
    many_files(root)
    chance = random.Random(7)
    data, killed = tmp_path / "data0", 0
    for number in range(LIVES_MAX):
        done, was_killed = await ingest_and_kill(data, root, chance)
        killed += was_killed
        kept = await check_whole(data) if (data / "agentdb").exists() else set[str]()
        assert len(kept) >= done
        if len(kept) == FILES:
            data = tmp_path / f"data{number + 1}"
        if killed == KILLS:  # on a quick machine some lives are over before
            break
    assert killed >= KILLS // 2, "the child was done before it could be killed"
    async with AgentDB(data, SETTINGS) as store:
        report = await ingest(store, TENANT, NAMESPACE, {"root": root}, settings=SETTINGS)
        assert report.added + report.unchanged == FILES
        assert report.changed == 0
        found = await store.search(TENANT, NAMESPACE, SearchQuery(text="paragraph of file 399", k=3))
        assert "part0/file399.md" in {hit.item.metadata["path"] for hit in found.hits}
    assert len(await check_whole(data)) == FILES


async def ingest_and_kill(data: Path, root: Path, chance: random.Random) -> tuple[int, bool]:
    """Start an ingestion and kill it at a random moment. Files it had reported, whether the signal hit it."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INGEST, str(data), str(root), stdout=PIPE, stderr=DEVNULL
    )
    assert child.stdout is not None
    done = 0
    try:
        for _ in range(chance.randint(1, 3)):
            done = int(await child.stdout.readline() or done)
        # The point of a random pause: to hit every part of reading, embedding and committing.
        await asyncio.sleep(chance.random() * 0.05)
    finally:
        # It may have ended by itself, which the loop is only told of next.
        with contextlib.suppress(ProcessLookupError):
            if child.returncode is None:
                os.kill(child.pid, signal.SIGKILL)
        await child.communicate()
    return done, child.returncode == -signal.SIGKILL


async def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    """Catches a lost write of either process, and a search here that does not see what was written there."""
    async with AgentDB(tmp_path, SETTINGS) as store:
        await store.create_namespace(TENANT, NAMESPACE)
        await store.upsert(TENANT, NAMESPACE, [Item(id="own", text="zebra of the parent")])
        assert len((await store.search(TENANT, NAMESPACE, SearchQuery(text="zebra"))).hits) == 1
        children = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", WRITE, str(tmp_path), name, "25", stdout=PIPE
            )
            for name in ("anna", "berta")
        ]
        for child in children:
            assert child.stdout is not None
            while line := await child.stdout.readline():
                # Acknowledged there means visible here, on every side of the search.
                number = int(line)
                name = "anna" if child is children[0] else "berta"
                if number % 8 == 0:
                    query = SearchQuery(text=f"{name} wrote {number}", mode="vector", k=3)
                    hits = (await store.search(TENANT, NAMESPACE, query)).hits
                    assert f"{name}-{number}" in {hit.item.id for hit in hits}
            assert await child.wait() == 0
        ids = {item.id for item in (await store.list_items(TENANT, NAMESPACE, limit=1000)).items}
        assert ids == {"own", *(f"{name}-{n}" for name in ("anna", "berta") for n in range(25))}
