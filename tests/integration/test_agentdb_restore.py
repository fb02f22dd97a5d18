"""Backup, verify and point-in-time restore of a real AgentDB: random work, kill -9, writers, damage."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agentic_flow.agentdb.backup import BackupReport, backup, restore, verify
from agentic_flow.agentdb.manifest import DATABASE, MANIFEST
from agentic_flow.agentdb.segment_files import list_segments, load_segment
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    InvalidInput,
    NotFound,
    PathNotFound,
)
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, Vector
from history_store import SETTINGS, Recorded, Snapshot, recorded, stored, texts

pytestmark = pytest.mark.anyio

CALLS = 220
RESTORES = 20
ROOT = str(Path(__file__).resolve().parents[1])


@dataclass
class Workload:
    """Random calls of several tenants, and what the rows were after each."""

    one: Recorded
    chance: random.Random
    moments: dict[int, Snapshot] = field(default_factory=dict[int, Snapshot])
    times: dict[int, float] = field(default_factory=dict[int, float])
    erased_at: int | None = None

    async def step(self) -> None:
        """One call of a random kind; one that the store refuses is a call, too."""
        kinds = [
            *[self.upsert] * 8, *[self.delete] * 2, self.delete_where, *[self.put_document] * 3,
            self.delete_document, self.restore, *[self.create] * 3, self.drop, self.erase,
        ]  # fmt: skip
        self.one.clock.now_s += self.chance.random() * 5
        try:
            await self.chance.choice(kinds)()
        except (NotFound, Conflict):
            return
        finally:
            self.moments[self.one.sequence] = self.one.snapshot()
            self.times[self.one.sequence] = self.one.clock.now_s

    def place(self) -> tuple[str, str]:
        return self.chance.choice(["acme", "bolt", "gone"]), self.chance.choice(["notes", "vectors"])

    def item(self, namespace: str) -> Item:
        vector = Vector([self.chance.gauss(0, 1) for _ in range(8)]) if namespace == "vectors" else None
        return Item(
            id=f"i{self.chance.randrange(40)}",
            text=" ".join(self.chance.choices(["red", "green", "blue", "größe", "日本"], k=6)),
            metadata={"n": self.chance.randrange(5), "path": "a/b.py"},
            vector=vector,
            expires_at_s=self.one.clock.now_s + 30 if self.chance.random() < 0.2 else None,
            valid_from_s=self.chance.choice([None, 5.0]),
        )

    def items(self, namespace: str) -> list[Item]:
        made = [self.item(namespace) for _ in range(self.chance.randrange(1, 12))]
        return list({item.id: item for item in made}.values())

    async def create(self) -> None:
        tenant, namespace = self.place()
        await self.one.store.create_namespace(
            tenant, namespace, dimension=8 if namespace == "vectors" else None
        )

    async def drop(self) -> None:
        if self.chance.random() < 0.4:
            await self.one.store.delete_namespace(*self.place())

    async def upsert(self) -> None:
        tenant, namespace = self.place()
        await self.one.store.upsert(
            tenant,
            namespace,
            self.items(namespace),
            idempotency_key=f"k{self.chance.randrange(1000)}" if self.chance.random() < 0.3 else None,
            expected_version=1 if self.chance.random() < 0.1 else None,
        )

    async def delete(self) -> None:
        ids = [f"i{self.chance.randrange(40)}" for _ in range(6)]
        await self.one.store.delete(*self.place(), ids)

    async def delete_where(self) -> None:
        await self.one.store.delete_where(*self.place(), {"n": self.chance.randrange(5)})

    async def restore(self) -> None:
        tenant, namespace = self.place()
        items = [item.model_copy(update={"version": 7}) for item in self.items(namespace)]
        await self.one.store.restore(tenant, namespace, items)

    async def put_document(self) -> None:
        tenant, _ = self.place()
        path = f"doc{self.chance.randrange(6)}"
        chunks = [Item(id=f"{path}:{n}", text=f"chunk {n} of it") for n in range(self.chance.randrange(5))]
        mark = Fingerprint(size_bytes=9, mtime_ns=2**60 + 1, sha256=str(self.chance.randrange(3)))
        document = Document(path=path, fingerprint=mark, chunks=tuple(chunks))
        await self.one.store.put_documents(tenant, "notes", [document])

    async def delete_document(self) -> None:
        await self.one.store.delete_documents(self.place()[0], "notes", [f"doc{self.chance.randrange(6)}"])

    async def erase(self) -> None:
        # Once, in the middle: what must be missing afterwards is then easy to say.
        if self.erased_at is None and len(self.moments) > CALLS // 3:
            await asyncio.to_thread(self.one.erase, "gone")
            self.erased_at = self.one.sequence

    def expected(self, sequence: int) -> Snapshot:
        """The rows at that moment, without those of the tenant that was erased later."""
        snapshot = self.moments[max(s for s in self.moments if s <= sequence)]
        if self.erased_at is None or sequence >= self.erased_at:
            return snapshot
        gone = {row[0] for row in snapshot["namespaces"] if row[1] == "gone"}
        keys = {row[0] for row in snapshot["items"] if row[1] in gone}
        return {
            "namespaces": [row for row in snapshot["namespaces"] if row[0] not in gone],
            "documents": [row for row in snapshot["documents"] if row[1] not in gone],
            "items": [row for row in snapshot["items"] if row[1] not in gone],
            "vectors": [row for row in snapshot["vectors"] if row[0] not in keys],
            "idempotency": [row for row in snapshot["idempotency"] if row[0] not in gone],
        }


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_restore_to_random_moments_gives_exactly_their_rows(tmp_path: Path, seed: int) -> None:
    """Catches any row, key, version, time or vector that differs from what was there at that moment, a kind
    of call that is not recorded, and words that full text would no longer find."""
    data, history = tmp_path / "data", tmp_path / "history"
    chance = random.Random(seed)
    bases: list[BackupReport] = []
    with recorded(data, history, segment_max_bytes=30_000) as one:
        work = Workload(one, chance)
        await work.create()
        for number in range(CALLS):
            if number in (10, 100, 150):
                bases.append(backup(data, tmp_path / f"base-{number}"))
            await work.step()
            if chance.random() < 0.1:
                one.history.seal()
        last = one.sequence
        first = bases[0].manifest.sequence
        assert len(list_segments(one.history.status().folder)) > 3
        for number in range(RESTORES):
            sequence = chance.randrange(first, last + 1)
            base = chance.choice([b for b in bases if b.manifest.sequence <= sequence])
            target = tmp_path / f"restored-{number}"
            report = restore(base.folder, target, history=history, at=sequence, live=data)
            assert stored(target) == work.expected(sequence), sequence
            assert report.sequence <= sequence
            assert report.items == len(work.expected(sequence)["items"])
            found = verify(target)
            assert found.ok, found.problems
        newest = restore(bases[0].folder, tmp_path / "newest", history=history, live=data)
        assert newest.sequence == last
        assert newest.database_id != newest.origin_database_id == one.history.database_id
        moment = chance.choice(sorted(s for s in work.moments if s >= first))
        at = datetime.fromtimestamp(work.times[moment], UTC)
        by_time = restore(bases[0].folder, tmp_path / "by-time", history=history, at=at, live=data)
        assert by_time.sequence == moment
    assert texts(tmp_path / "newest") == texts(data)
    async with AgentDB(tmp_path / "newest", SETTINGS) as store:
        # It is a database like any other: it takes writes, and its sequences go on.
        await store.create_namespace("acme", "fresh")
        await store.upsert("acme", "fresh", [Item(id="x", text="hello world")])
        hits = (await store.search("acme", "fresh", SearchQuery(text="hello"))).hits
        assert [hit.item.id for hit in hits] == ["x"]
        (fresh,) = [stats for stats in await store.stats("acme") if stats.name == "fresh"]
        assert fresh.sequence is not None
        assert fresh.sequence > last


WRITE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agentic_flow.core.vectors import Item
from history_store import recorded

async def main(data, history, start):
    with recorded(Path(data), Path(history), start=True, seal_s=0.003, segment_max_bytes=20_000) as one:
        await one.store.create_namespace("acme", "notes")
        for number in range(int(start), int(start) + 4000):
            await one.store.upsert("acme", "notes", [Item(id=f"item-{number}", text=f"words {number}")])
            print(number, one.sequence, flush=True)

asyncio.run(main(*sys.argv[2:]))
"""


@pytest.mark.timeout(300)
async def test_kill_while_writing_and_sealing_loses_no_acknowledged_call(tmp_path: Path) -> None:
    """Catches a call that is in neither a segment nor the database after kill -9, or is applied twice."""
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history):
        pass
    base = backup(data, tmp_path / "base")
    chance = random.Random(11)
    start = 0
    for number in range(12):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITE, ROOT, str(data), str(history), str(start), stdout=PIPE,
            stderr=DEVNULL,
        )  # fmt: skip
        assert child.stdout is not None
        lines = [await child.stdout.readline() for _ in range(chance.randrange(1, 60))]
        os.kill(child.pid, signal.SIGKILL)
        lines += (await child.communicate())[0].splitlines()
        whole = [line.split() for line in lines if len(line.split()) == 2]
        start, acknowledged = int(whole[-1][0]) + 1, int(whole[-1][1])
        found = verify(history)
        assert found.problems == ()
        assert not [note for note in found.notes if "leftover" not in note]
        target = tmp_path / f"restored-{number}"
        restore(base.folder, target, history=history, at=acknowledged, live=data)
        ids = {row[3] for row in stored(target)["items"]}
        assert ids >= {f"item-{n}" for n in range(start)}
        shutil.rmtree(target)
    restore(base.folder, tmp_path / "last", history=history, live=data)
    assert stored(tmp_path / "last") == stored(data)
    assert verify(data).ok
    assert len(list_segments(next(history.iterdir()))) > 3


async def test_backup_while_four_writers_write(tmp_path: Path) -> None:
    """Catches a backup that mixes moments or misses a row acknowledged before it began."""
    data = tmp_path / "data"
    done = [0, 0, 0, 0]
    with recorded(data, tmp_path / "history", start=True, seal_s=0.05) as one:
        await one.store.create_namespace("acme", "notes")
        running = True

        async def write(writer: int) -> None:
            while running:
                item = Item(id=f"w{writer}-{done[writer]}", text=f"words {done[writer]}")
                await one.store.upsert("acme", "notes", [item])
                done[writer] += 1

        writers = [asyncio.create_task(write(writer)) for writer in range(4)]
        reports: list[BackupReport] = []
        for number in range(5):
            while min(done) < 30 * (number + 1):
                await asyncio.sleep(0.01)
            before = list(done)
            report = await asyncio.to_thread(
                backup, data, tmp_path / f"backup-{number}", history_dir=tmp_path / "history"
            )
            reports.append(report)
            assert report.history_error is None
            found = verify(report.folder)
            assert found.ok, found.problems
            target = tmp_path / f"restored-{number}"
            restore(report.folder, target)
            ids = {row[3] for row in stored(target)["items"]}
            for writer, count in enumerate(before):
                mine = sorted(int(i.split("-")[1]) for i in ids if i.startswith(f"w{writer}-"))
                assert mine == list(range(len(mine)))
                assert len(mine) >= count
        running = False
        await asyncio.gather(*writers)
        rows_now = one.snapshot()
        one.history.seal()
    for report in reports:
        assert report.sealed_sequence is not None
        assert report.sealed_sequence >= report.manifest.sequence
    restore(reports[0].folder, tmp_path / "rolled", history=tmp_path / "history")
    assert stored(tmp_path / "rolled") == rows_now


@pytest.fixture
async def history_of_ten(tmp_path: Path) -> Path:
    """A data folder, a backup of its beginning and a history of ten calls in several segments."""
    with recorded(tmp_path / "data", tmp_path / "history", segment_max_bytes=1500) as one:
        await one.store.create_namespace("acme", "notes")
        backup(tmp_path / "data", tmp_path / "base")
        for number in range(10):
            one.clock.now_s += 1
            await one.store.upsert("acme", "notes", [Item(id=f"item-{number}", text="words")])
            one.history.seal()
    return tmp_path


async def test_a_damaged_segment_stops_the_restore_where_it_is(history_of_ten: Path) -> None:
    """Catches a restore that silently gives less, gives up what is whole, or names a wrong place."""
    folder = next((history_of_ten / "history").iterdir())
    files = list_segments(folder)
    assert len(files) >= 3
    file = files[len(files) // 2]
    good = file.path.read_bytes()
    offset = len(good) // 2
    for damaged in (good[:offset], good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :]):
        file.path.write_bytes(damaged)
        scan = load_segment(file)
        assert scan.damage is not None
        reachable = scan.records[-1].last if scan.records else file.first - 1
        report = verify(history_of_ten / "history")
        assert [(p.file, p.offset) for p in report.problems] == [(file.path, scan.damage.offset)]
        with pytest.raises(DataCorrupted) as caught:
            restore(history_of_ten / "base", history_of_ten / "x", history=history_of_ten / "history")
        assert caught.value.details == {
            "file": str(file.path),
            "offset": scan.damage.offset,
            "sequence": reachable,
        }
        assert not (history_of_ten / "x" / "agentdb").exists()
        target = history_of_ten / f"restored-{len(damaged)}"
        found = restore(history_of_ten / "base", target, history=history_of_ten / "history", at=reachable)
        assert found.sequence == reachable
        assert found.notes
        with pytest.raises(DataCorrupted):
            restore(
                history_of_ten / "base", history_of_ten / "x", history=history_of_ten / "history",
                at=reachable + 1,
            )  # fmt: skip


async def test_a_missing_or_exchanged_segment_is_named(history_of_ten: Path) -> None:
    """Catches a hole in the history that is stepped over."""
    folder = next((history_of_ten / "history").iterdir())
    files = list_segments(folder)
    gone = files[1]
    gone.path.rename(history_of_ten / "kept")
    report = verify(folder)
    assert [problem.file for problem in report.problems] == [files[2].path]
    with pytest.raises(DataCorrupted, match=r"are not in the history|not the one"):
        restore(history_of_ten / "base", history_of_ten / "x", history=history_of_ten / "history")
    shutil.copy(files[2].path, gone.path)
    assert not verify(folder).ok
    with pytest.raises(DataCorrupted):
        restore(history_of_ten / "base", history_of_ten / "x", history=history_of_ten / "history")


async def test_calls_that_were_not_recorded_are_a_gap(history_of_ten: Path) -> None:
    """Catches a restore across calls that were made while the history was off."""
    async with AgentDB(history_of_ten / "data", SETTINGS) as store:
        await store.upsert("acme", "notes", [Item(id="unseen", text="words")])
    with recorded(history_of_ten / "data", history_of_ten / "history") as one:
        await one.store.upsert("acme", "notes", [Item(id="seen", text="words")])
        one.history.seal()
        second = backup(history_of_ten / "data", history_of_ten / "second")
        last = one.sequence
    report = verify(history_of_ten / "history")
    assert report.ok
    assert len(report.notes) == 1
    with pytest.raises(DataCorrupted, match="are not in the history") as caught:
        restore(history_of_ten / "base", history_of_ten / "x", history=history_of_ten / "history")
    assert caught.value.details["sequence"] == last - 2
    restore(history_of_ten / "base", history_of_ten / "y", history=history_of_ten / "history", at=last - 2)
    restore(second.folder, history_of_ten / "z", history=history_of_ten / "history")


async def test_a_damaged_backup_is_refused_and_the_place_named(history_of_ten: Path) -> None:
    """Catches a backup that is restored although a byte of it changed, and damage that has no place."""
    base = history_of_ten / "base"
    file = base / "agentdb.db"
    good = file.read_bytes()
    chance = random.Random(5)
    for _ in range(20):
        offset = chance.randrange(len(good))
        file.write_bytes(
            good[:offset] + bytes([good[offset] ^ 1 << chance.randrange(8)]) + good[offset + 1 :]
        )
        assert verify(base).problems[0].file == file
        with pytest.raises(DataCorrupted, match="is damaged at byte 0"):
            restore(base, history_of_ten / "x")
    file.write_bytes(good[:5000])
    assert verify(base).problems[0].offset == 5000
    with pytest.raises(DataCorrupted, match="is damaged at byte 5000"):
        restore(base, history_of_ten / "x")
    file.write_bytes(good)
    manifest = (base / MANIFEST).read_bytes()
    (base / MANIFEST).write_bytes(manifest.replace(b'"items": 0', b'"items": 1'))
    assert verify(base).problems[0].file == base / MANIFEST
    with pytest.raises(DataCorrupted):
        restore(base, history_of_ten / "x")
    (base / MANIFEST).unlink()
    with pytest.raises(PathNotFound):
        restore(base, history_of_ten / "x")
    assert not (history_of_ten / "x" / "agentdb").exists()


async def test_what_cannot_be_is_refused(history_of_ten: Path) -> None:
    """Catches a target that is overwritten, a moment that is not there, and folders of other databases."""
    base, history, data = (history_of_ten / name for name in ("base", "history", "data"))
    target = history_of_ten / "target"
    refused: list[tuple[type[AgenticFlowError], Callable[[], object]]] = [
        (Conflict, lambda: restore(base, data)),
        (InvalidInput, lambda: restore(base, target, history=history, at=10_000)),
        (InvalidInput, lambda: restore(base, target, history=history, at=1)),
        (InvalidInput, lambda: restore(base, target, at=10)),
        (InvalidInput, lambda: restore(base, target, history=history, at=datetime(2030, 1, 1))),
        (PathNotFound, lambda: restore(history_of_ten / "nothing", target)),
        (PathNotFound, lambda: restore(base, target, history=history_of_ten)),
        (PathNotFound, lambda: restore(base, target, live=history_of_ten)),
        (PathNotFound, lambda: backup(history_of_ten / "nothing", history_of_ten / "b")),
        (PathNotFound, lambda: verify(history_of_ten / "nothing")),
        (Conflict, lambda: backup(data, base)),
        (Conflict, lambda: backup(data, base / MANIFEST)),
    ]
    for kind, call in refused:
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.hint
    restore(base, target)
    with pytest.raises(InvalidInput, match="is database"):
        restore(base, history_of_ten / "other", live=target)
    assert not (history_of_ten / "other" / "agentdb").exists()
    assert verify(target).ok


async def test_verify_finds_rows_without_partner(history_of_ten: Path) -> None:
    """Catches a check that looks at pages only: a lost vector, or a row that full text cannot find."""
    import apsw

    data = history_of_ten / "data"
    assert verify(data).ok
    connection = apsw.Connection(str(data / DATABASE))
    connection.execute("DELETE FROM vectors WHERE key = 3")
    connection.execute("DELETE FROM item_text_1 WHERE rowid = 4")
    connection.execute("UPDATE changes SET patch = x'00'")
    connection.execute("INSERT INTO changes VALUES (1000, 'acme', 1.0, x'07')")
    connection.close()
    messages = " ".join(problem.message for problem in verify(data).problems)
    assert "1 items have no vector" in messages
    assert "1 items of namespace 1 are not in its full text" in messages
    assert "the change at sequence 1000 cannot be read" in messages


async def test_a_backup_has_nothing_of_what_was_deleted(history_of_ten: Path) -> None:
    """Catches deleted content that goes along as free space."""
    with recorded(history_of_ten / "data", history_of_ten / "history") as one:
        await one.store.upsert("acme", "notes", [Item(id="secret", text="aardvark " * 500)])
        one.history.seal()
        await one.store.delete("acme", "notes", ["secret"])
        backup(history_of_ten / "data", history_of_ten / "clean")
    assert b"aardvark aardvark" not in (history_of_ten / "clean" / "agentdb.db").read_bytes()


READ_ONLY = """
import os, sys
from pathlib import Path
from agentic_flow.agentdb.backup import backup, verify
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
root, out = Path(sys.argv[1]), Path(sys.argv[2])
report = backup(root / "data", out / "copy", history_dir=root / "history")
good = verify(root / "data").ok, verify(root / "history").ok
print(report.manifest.items, *good, report.history_error is not None)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
async def test_a_source_that_cannot_be_written_is_backed_up(history_of_ten: Path) -> None:
    """Catches a backup that needs to write beside the database, as on a read-only mount."""
    with tempfile.TemporaryDirectory() as name:
        # Outside pytest's own folders, which nobody else may enter.
        shared = Path(name)
        for kept in ("data", "history"):
            shutil.copytree(history_of_ten / kept, shared / kept)
        for path in (shared, *shared.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        out = shared / "out"
        out.mkdir()
        out.chmod(0o777)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READ_ONLY, str(shared), str(out), stdout=PIPE, cwd=out
        )
        *warned, told = (await child.communicate())[0].decode().splitlines()
    assert child.returncode == 0
    assert told.split() == ["10", "True", "True", "True"]
    assert "backup_unrecorded" in "".join(warned)
