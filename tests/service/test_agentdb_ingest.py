"""Folders become documents: what is read, what is passed over and counted, and what is not read twice."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.agentdb.ingest import RACY_NS, IngestReport, ingest
from agentic_flow.agentdb.reading import text_of
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import Cancelled, Conflict, LimitExceeded, PathNotFound
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item, SearchQuery

pytestmark = pytest.mark.anyio

TENANT, NAMESPACE = "acme", "input"
SETTINGS = AgentDBSettings(embedding_dimension=256, file_max_bytes=100_000)
LONG_AGO_S = 1_600_000_000


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with a time stamp that is long past, so that it is not taken for one that still changes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    return path


def tree(folder: Path) -> Path:
    root = folder / "project"
    write(root, "app.py", "def start():\n    '''Start the engine.'''\n    return engine()\n")
    write(root, "docs/guide.md", "# Guide\n\nTurn the key to start.\n")
    write(root, "page.html", "<html>\n<p>visible text</p>\n</html>\n")
    write(root, "data.json", '{\n  "answer": 42\n}\n')
    write(root, "table.csv", "name,age\nann,3\n")
    write(root, "latin.txt", "Größe der Straße in Metern\n".encode("latin-1"))
    return root


async def run(store: AgentDB, *roots: Path, **how: Any) -> IngestReport:
    named = {root.name: root for root in roots}
    return await ingest(store, TENANT, NAMESPACE, named, settings=how.pop("settings", SETTINGS), **how)


async def chunks(store: AgentDB, namespace: str = NAMESPACE) -> list[Item]:
    return list((await store.list_items(TENANT, namespace, limit=1000)).items)


async def paths(store: AgentDB) -> list[str]:
    return sorted(await store.fingerprints(TENANT, NAMESPACE))


async def test_kinds_and_true_lines(tmp_path: Path) -> None:
    """Catches a chunk whose path, lines, kind or id do not lead back to exactly its text in the file."""
    root = tree(tmp_path)
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        report = await run(store, root)
        assert (report.added, report.chunks, report.changed, report.removed) == (6, 6, 0, 0)
        kinds: dict[str, str] = {}
        for item in await chunks(store):
            path, first, last = (item.metadata[name] for name in ("path", "line_start", "line_end"))
            assert item.id == f"{path}:{first}-{last}"
            lines = text_of(path, (root / path).read_bytes()).splitlines()
            assert item.text == "\n".join(lines[first - 1 : last])
            kinds[path] = item.metadata["kind"]
        assert kinds == {
            "app.py": "python", "docs/guide.md": "markdown", "page.html": "html", "data.json": "json",
            "table.csv": "csv", "latin.txt": "text",
        }  # fmt: skip
        found = await store.search(TENANT, NAMESPACE, SearchQuery(text="starting the engine", k=1))
        assert (found.hits[0].item.metadata["path"], found.hits[0].item.metadata["symbol"]) == (
            "app.py",
            "start",
        )


async def test_what_is_passed_over_is_counted_once(tmp_path: Path) -> None:
    """Catches a file that is read although it must not be, or that is in no count or in two."""
    root = tree(tmp_path)
    outside = write(tmp_path, "outside/secret.txt", "the secret\n")
    write(root, "binary.dat", b"\x7fELF\x00\x01\x02")
    write(root, "noise.txt", bytes(range(128, 256)) * 3)
    write(root, "empty.txt", "")
    write(root, "blank.txt", "\n \n\t\n")
    write(root, "huge.txt", "x" * 100_001)
    write(root, ".hidden", "hidden\n")
    write(root, ".git/config", "not seen\n")
    write(root, "node_modules/m/index.js", "not seen\n")
    write(root, "__pycache__/a.pyc", "not seen\n")
    write(root, ".venv/lib.py", "not seen\n")
    write(root, ".gitignore", "*.log\nbuild/\n!keep.log\n")
    write(root, "a.log", "ignored\n")
    write(root, "keep.log", "kept\n")
    write(root, "build/out.txt", "not seen\n")
    write(root, "sub/.gitignore", "/local.txt\n!b.log\n")
    write(root, "sub/local.txt", "ignored\n")
    write(root, "sub/deeper/local.txt", "kept\n")
    write(root, "sub/b.log", "kept\n")
    write(root, "broken.pdf", b"%PDF-1.7 broken")
    (root / "link.txt").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        report = await run(store, root)
        assert report.model_dump(exclude={"cpu_s", "chunks"}) == {
            "added": 9,
            "changed": 0,
            "unchanged": 0,
            "removed": 0,
            "skipped_binary": 2,
            # .hidden, two .gitignore, a.log, sub/local.txt, three links and the pipe
            "skipped_ignored": 9,
            "skipped_too_large": 1,
            "skipped_unreadable": 1,
            "skipped_empty": 2,
        }
        found = await paths(store)
        assert {"keep.log", "sub/b.log", "sub/deeper/local.txt"} < set(found)
        assert not [
            path for path in found if "secret" in path or ("local.txt" in path and "deeper" not in path)
        ]
        assert not [item for item in await chunks(store) if "secret" in item.text]


async def test_a_200_mb_file_is_not_read(tmp_path: Path) -> None:
    """Catches a large file that is opened and read before its size is known."""
    root = tree(tmp_path)
    with (root / "big.txt").open("wb") as file:
        file.truncate(200_000_000)
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        before = read_bytes_of_this_process()
        report = await run(store, root)
        assert report.skipped_too_large == 1
        assert read_bytes_of_this_process() - before < 50_000_000


def read_bytes_of_this_process() -> int:
    """Bytes that read calls returned so far, by the kernel's account."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


async def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    """Catches unchanged files that are read again, changes that are missed, and ghosts of removed files."""
    root = tree(tmp_path)
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        await run(store, root)
        versions = {item.id: item.updated_at_s for item in await chunks(store)}
        # Same size and time: the content is not looked at, or this change would be seen.
        write(root, "table.csv", "NAME,age\nann,3\n")
        report = await run(store, root)
        assert (report.unchanged, report.added, report.changed, report.chunks) == (6, 0, 0, 0)
        # A new time and the same content: not cut again, and the next run need not read it.
        os.utime(root / "app.py", (LONG_AGO_S + 5, LONG_AGO_S + 5))
        report = await run(store, root)
        assert (report.unchanged, report.changed, report.chunks) == (6, 0, 0)
        fingerprint = (await store.fingerprints(TENANT, NAMESPACE))["app.py"]
        assert fingerprint.mtime_ns == (LONG_AGO_S + 5) * 10**9
        assert {item.id: item.updated_at_s for item in await chunks(store)} == versions
        # A real change, a removal, a new file, and one that is binary now.
        (root / "docs/guide.md").write_text("# Guide\n\nPush the button.\n", "utf-8")
        (root / "data.json").unlink()
        write(root, "new.txt", "brand new\n")
        write(root, "latin.txt", b"\0" * 30)
        report = await run(store, root)
        assert (report.added, report.changed, report.removed, report.unchanged) == (1, 1, 1, 3)
        assert report.skipped_binary == 1
        assert await paths(store) == ["app.py", "docs/guide.md", "new.txt", "page.html", "table.csv"]
        texts = " ".join(item.text for item in await chunks(store))
        assert "Push the button" in texts
        assert "Turn the key" not in texts
        assert "42" not in texts


async def test_a_change_within_the_clocks_resolution_is_seen(tmp_path: Path) -> None:
    """Catches trust in the time stamp of a file that was still being written when it was read."""
    root = tmp_path / "project"
    root.mkdir()
    hot = root / "hot.txt"
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        for attempt in range(50):  # a machine that stands still reads the file too late: then write it anew
            hot.write_text(f"one, {attempt:02d}\n", "utf-8")
            status = hot.stat()
            report = await run(store, root)
            assert report.added + report.changed == 1
            if time.time_ns() - status.st_mtime_ns < RACY_NS:
                break
        else:
            pytest.fail("the file was never read within the clock's resolution of its writing")
        hot.write_text("two, 00\n", "utf-8")
        os.utime(hot, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (await run(store, root)).changed == 1
        assert [item.text for item in await chunks(store)] == ["two, 00"]


async def test_roots_and_rules(tmp_path: Path) -> None:
    """Catches paths that do not name their root, single files, and rules that let a forbidden file in."""
    root = tree(tmp_path)
    other = tmp_path / "other"
    write(other, "notes.txt", "notes\n")
    write(other, "secret/key.txt", "key\n")
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        report = await run(store, root, other, paths_forbidden=["secret/", "*.csv"])
        assert await paths(store) == [
            "other/notes.txt", "project/app.py", "project/data.json", "project/docs/guide.md",
            "project/latin.txt", "project/page.html",
        ]  # fmt: skip
        assert report.skipped_ignored == 1
        await run(store, root, paths_allowed=["docs/**", "*.py"], paths_forbidden=["app.py"])
        assert await paths(store) == ["docs/guide.md"]
        single = await ingest(store, TENANT, "single", {"notes.txt": other / "notes.txt"}, settings=SETTINGS)
        assert single.added == 1
        assert [item.id for item in await chunks(store, "single")] == ["notes.txt:1-1"]


async def test_nothing_is_written_for_a_missing_path(tmp_path: Path) -> None:
    """Catches a half-done ingestion when one of the inputs does not exist or is too much."""
    root = tree(tmp_path)
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        with pytest.raises(PathNotFound, match="absent"):
            await run(store, root, tmp_path / "absent")
        with pytest.raises(LimitExceeded):
            await run(store, root, settings=SETTINGS.model_copy(update={"files_max": 3}))
        assert await store.namespaces(TENANT) == []


async def test_progress_and_cancellation(tmp_path: Path) -> None:
    """Catches progress that runs backwards or stops early, and a cancellation that loses what is stored."""
    root = tmp_path / "many"
    for number in range(200):
        write(root, f"file{number:03d}.txt", f"content {number}\n")
    seen: list[tuple[int, int]] = []
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        with pytest.raises(Cancelled):
            await run(
                store,
                root,
                progress=lambda done, total: seen.append((done, total)),
                cancelled=lambda: len(seen) >= 3,
            )
        stored = len(await paths(store))
        assert 0 < stored < 200
        assert len(await chunks(store)) == stored
        seen.clear()
        report = await run(store, root, progress=lambda done, total: seen.append((done, total)))
        assert (report.added, report.unchanged) == (200 - stored, stored)
        assert seen[0] == (0, 200)
        assert seen[-1] == (200, 200)
        assert seen == sorted(seen)


async def test_a_namespace_of_another_embedder_is_refused(tmp_path: Path) -> None:
    """Catches vectors of two embedders in one namespace, which no comparison can rank."""
    root = tree(tmp_path)
    async with AgentDB(tmp_path / "data", SETTINGS) as store:
        await run(store, root)
    async with AgentDB(tmp_path / "data", SETTINGS.model_copy(update={"embedding_dimension": 512})) as store:
        with pytest.raises(Conflict, match="hashed-ngram-v1-256"):
            await run(store, root)
        with pytest.raises(Conflict):
            await store.upsert(TENANT, NAMESPACE, [Item(id="x", text="x")])
        with pytest.raises(Conflict):
            await store.search(TENANT, NAMESPACE, SearchQuery(text="engine"))
        found = await store.search(TENANT, NAMESPACE, SearchQuery(text="engine", mode="text"))
        assert found.hits[0].item.metadata["path"] == "app.py"
