"""The history of an AgentDB: recording, sealing, errors of the disk, erasure, and several processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentic_flow.agentdb import segments, writing
from agentic_flow.agentdb.backup import backup, backups_holding, erase_from_history, restore, verify
from agentic_flow.agentdb.manifest import DATABASE
from agentic_flow.agentdb.pruning import prune
from agentic_flow.agentdb.records import find_namespace
from agentic_flow.agentdb.segment_files import list_segments, load_segment, locked
from agentic_flow.agentdb.segments import Kind, Record
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, Unavailable
from agentic_flow.core.vectors import Item
from history_store import Recorded, SteppedClock, recorded, stored

pytestmark = pytest.mark.anyio

ACME, NOTES = "acme", "notes"


async def put(one: Recorded, *ids: str, tenant: str = ACME, text: str = "some words") -> None:
    one.clock.now_s += 1.0
    await one.store.create_namespace(tenant, NOTES)
    await one.store.upsert(tenant, NOTES, [Item(id=i, text=f"{text} {i}") for i in ids])


def waiting(one: Recorded) -> list[tuple[Any, ...]]:
    return one.store._db.read_sync(
        lambda connection: rows(connection, "SELECT sequence, tenant, patch FROM changes ORDER BY sequence")
    )


def sealed(folder: Path) -> list[Record]:
    """All records of a folder, each of whose segments is whole."""
    found: list[Record] = []
    for file in list_segments(folder):
        scan = load_segment(file)
        assert scan.damage is None
        found += scan.records
    return found


async def test_every_call_is_one_record_and_a_failed_one_is_none(tmp_path: Path) -> None:
    """Catches a change that is not recorded, a rolled-back call that is, and sequences with holes."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a", "b")
        with pytest.raises(Conflict):
            await one.store.upsert(ACME, NOTES, [Item(id="a", text="x")], expected_version=7)
        await one.store.upsert(ACME, NOTES, [Item(id="c", text="y")], idempotency_key="once")
        await one.store.upsert(ACME, NOTES, [Item(id="c", text="y")], idempotency_key="once")
        await one.store.delete(ACME, NOTES, ["a"])
        await one.store.delete(ACME, NOTES, ["never there"])
        one.history.seal()
        records = sealed(one.history.status().folder)
        assert waiting(one) == []
        assert [record.last for record in records][-1] == one.sequence
    position = records[0].first - 1
    for record in records:
        assert record.first == position + 1
        assert record.tenant == ACME
        position = record.last
    assert len(records) == 4


async def test_a_change_without_an_operation_gets_one(tmp_path: Path) -> None:
    """Catches rows that change (old idempotency keys that go) at no sequence, thus at no moment."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a")
        item = Item(id="c", text="y")
        await one.store.upsert(ACME, NOTES, [item], idempotency_key="old")
        one.clock.now_s += 20 * 3600
        await one.store.upsert(ACME, NOTES, [item], idempotency_key="young")
        one.clock.now_s += 10 * 3600
        before = one.sequence
        await one.store.upsert(ACME, NOTES, [item], idempotency_key="young")
        assert one.sequence == before + 1
        assert waiting(one)[-1][0] == one.sequence


async def test_small_segments_become_one_and_large_ones_stay(tmp_path: Path) -> None:
    """Catches a file for each sealing, a segment that is never closed, and a link that does not hold."""
    with recorded(tmp_path / "data", tmp_path / "history", segment_max_bytes=6000) as one:
        for number in range(30):
            await put(one, f"item-{number}")
            one.history.seal()
        folder = one.history.status().folder
        files = list_segments(folder)
        assert 3 < len(files) < 25
        assert len(sealed(folder)) == 31
        report = verify(folder)
        assert report.ok
        assert report.notes == ()
        assert report.sequences == (records_first(folder), one.sequence)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f.path.name for f in files), "lock"])


def records_first(folder: Path) -> int:
    return sealed(folder)[0].first


async def test_sealing_again_after_a_crash_neither_loses_nor_doubles(tmp_path: Path) -> None:
    """Catches a record sealed twice when the process died between the file's name and the rows' removal."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a")
        await put(one, "b")
        kept = one.store._db.read_sync(lambda c: rows(c, "SELECT sequence, tenant, at_s, patch FROM changes"))
        one.history.seal()
        folder = one.history.status().folder
        before = [record.last for record in sealed(folder)]

        def put_back(connection: apsw.Connection) -> None:
            for row in kept:
                rows(
                    connection, "INSERT INTO changes (sequence, tenant, at_s, patch) VALUES (?, ?, ?, ?)", row
                )

        one.store._db.write_sync(put_back)
        # What else a crash leaves: half a file, and a short segment beside the one that took its place.
        (folder / f"{list_segments(folder)[0].path.name}.1.abcd.part").write_bytes(b"half")
        first = sealed(folder)[0]
        (folder / f"{first.first:016d}-{first.last:016d}.segment").write_bytes(
            segments.encode_segment(one.history.database_id, segments.NO_SEGMENT, [first])
        )
        await put(one, "c")
        one.history.seal()
        assert [record.last for record in sealed(folder)] == [*before, one.sequence]
        assert len(list(folder.iterdir())) == 2
        assert waiting(one) == []


async def test_a_copied_database_does_not_overwrite_the_history(tmp_path: Path) -> None:
    """Catches changes of a copy that are dropped because the original sealed others at the same sequences."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a")
        one.history.seal()
        backup(tmp_path / "data", tmp_path / "copy")
        await put(one, "b")
        one.history.seal()
        folder = one.history.status().folder
    (tmp_path / "other" / "agentdb").mkdir(parents=True)
    shutil.copy(tmp_path / "copy" / "agentdb.db", tmp_path / "other" / DATABASE)
    with recorded(tmp_path / "other", tmp_path / "history") as copy:
        await put(copy, "different")
        with pytest.raises(DataCorrupted, match="other changes"):
            copy.history.seal()
        assert len(waiting(copy)) == 1
    assert [record.tenant for record in sealed(folder)] == [ACME] * 3


async def test_errors_of_the_folder_are_told_and_end_when_it_is_back(tmp_path: Path) -> None:
    """Catches writes that stop at once or never, changes that are lost, and an error that stays."""
    with recorded(tmp_path / "data", tmp_path / "history", waiting_max_bytes=60_000) as one:
        await put(one, "a")
        folder = one.history.status().folder
        folder.rename(tmp_path / "away")
        with pytest.raises(Unavailable, match="cannot be written"):
            one.history.seal()
        written = 0
        while one.history.status().waiting_bytes <= 60_000:
            await put(one, f"item-{written}")
            written += 1
        assert 20 < written < 500
        before = one.snapshot()
        with pytest.raises(Unavailable, match="wait to be sealed") as refused:
            await put(one, "one more")
        # Clients read it: nothing of the server's folders is in it.
        assert str(tmp_path) not in f"{refused.value} {refused.value.hint}"
        assert one.snapshot() == before
        (tmp_path / "away").rename(folder)
        one.history.seal()
        await put(one, "again")
        assert one.history.seal() == one.sequence
        assert verify(folder).ok
        assert len(sealed(folder)) == written + 3


async def test_the_background_tells_its_error_and_recovers(tmp_path: Path) -> None:
    """Catches a thread that dies of an error, or a status that hides it."""
    with recorded(tmp_path / "data", tmp_path / "history", start=True, seal_s=0.02) as one:
        folder = one.history.status().folder
        folder.rename(tmp_path / "away")
        await put(one, "a")
        while one.history.status().error is None:
            await asyncio.sleep(0.01)
        assert one.history.status().waiting_bytes > 0
        (tmp_path / "away").rename(folder)
        while one.history.status().error is not None or waiting(one):
            await asyncio.sleep(0.01)
        assert one.history.status().sealed_sequence == one.sequence


async def test_lost_segments_are_told_and_nothing_is_sealed_behind_the_hole(tmp_path: Path) -> None:
    """Catches a history that silently goes on after its last segment was deleted or damaged."""
    with recorded(tmp_path / "data", tmp_path / "history", segment_max_bytes=1500) as one:
        for name in "abcd":
            await put(one, name)
            one.history.seal()
        folder = one.history.status().folder
        last = list_segments(folder)[-1].path
        content = last.read_bytes()
        last.unlink()
        await put(one, "e")
        with pytest.raises(DataCorrupted, match="was sealed there"):
            one.history.seal()
        last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataCorrupted, match="damaged at byte"):
            one.history.seal()
        last.write_bytes(content)
        assert one.history.seal() == one.sequence


@pytest.mark.parametrize("sealed_first", [True, False])
async def test_an_erased_tenant_is_nowhere(tmp_path: Path, sealed_first: bool) -> None:
    """Catches bytes of an erased tenant in segments or waiting changes, its return by a restore to before the
    erasure, and a neighbour that suffers."""
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history) as one:
        await put(one, "theirs", tenant="other")
        await put(one, "base", tenant="gone", text="aardvark")
        backup(data, tmp_path / "base")
        await put(one, "later", tenant="gone", text="aardvark")
        await put(one, "also", tenant="other")
        before = one.sequence
        if sealed_first:
            one.history.seal()
        assert one.erase("gone") == 2
        await put(one, "third", tenant="other")
        await put(one, "anew", tenant="gone", text="badger")
        one.history.seal()
        now = one.snapshot()
        folder = one.history.status().folder
        assert verify(folder).ok
        content = b"".join(path.read_bytes() for path in folder.iterdir())
        assert b"aardvark" not in content
        assert b"badger" in content
        kinds = [record.kind for record in sealed(folder)]
        assert kinds.count(Kind.ERASED) == 3 if sealed_first else kinds.count(Kind.ERASED) >= 1
        assert kinds.count(Kind.ERASURE) == 1
        backup(data, tmp_path / "after")
    assert backups_holding("gone", [tmp_path]) == [tmp_path / "after", tmp_path / "base"]
    assert backups_holding("other", [tmp_path / "base"]) == [tmp_path / "base"]
    assert backups_holding("nobody", [tmp_path]) == []
    report = restore(tmp_path / "base", tmp_path / "back", history=history, at=before)
    assert report.tenants_withheld == 1
    back = stored(tmp_path / "back")
    assert {row[1] for row in back["namespaces"]} == {"other"}
    assert {row[3] for row in back["items"]} == {"theirs", "also"}
    assert len(back["vectors"]) == 2
    assert verify(tmp_path / "back").ok
    restore(tmp_path / "base", tmp_path / "newest", history=history)
    assert stored(tmp_path / "newest") == now


async def test_erasing_by_name_is_harmless_to_repeat(tmp_path: Path) -> None:
    """Catches an erasure of the sealed files alone that goes too far, or breaks the chain."""
    with recorded(tmp_path / "data", tmp_path / "history", segment_max_bytes=1500) as one:
        for number in range(8):
            await put(one, f"item-{number}", tenant=("x", "y")[number % 2])
            one.history.seal()
        middle = one.sequence
        await put(one, "late", tenant="x")
        one.history.seal()
        folder = one.history.status().folder
        report = erase_from_history(tmp_path / "history", one.history.database_id, "x", middle)
        assert report.records == 5
        assert report.segments > 1
        again = erase_from_history(tmp_path / "history", one.history.database_id, "x", middle)
        assert (again.records, again.segments) == (0, 0)
        assert verify(folder).ok
        assert [r.last for r in sealed(folder) if r.tenant == "x"] == [one.sequence]


async def test_a_locked_history_is_waited_for_and_told(tmp_path: Path) -> None:
    """Catches two processes that write one folder at once."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a")
        with locked(one.history.status().folder, 0.0):
            with pytest.raises(Unavailable):
                one.history.seal(wait_s=0.05)
            assert len(waiting(one)) == 2
        one.history.seal()
        assert waiting(one) == []


WRITE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agentic_flow.core.vectors import Item
from history_store import recorded

async def main(data, history, name, count):
    with recorded(Path(data), Path(history), start=True, seal_s=0.01, segment_max_bytes=40_000) as one:
        await one.store.create_namespace("acme", "notes")
        for number in range(int(count)):
            await one.store.upsert("acme", "notes", [Item(id=f"{name}-{number}", text=f"{name} {number}")])
            print(number, flush=True)

asyncio.run(main(*sys.argv[2:]))
"""
ROOT = str(Path(__file__).resolve().parents[1])


async def test_two_processes_write_and_seal_one_history(tmp_path: Path) -> None:
    """Catches a record that two sealers wrote twice or left to each other."""
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITE, ROOT, str(tmp_path / "data"), str(tmp_path / "history"), name, "120",
            stdout=DEVNULL,
        )
        for name in ("anna", "berta")
    ]  # fmt: skip
    assert [await child.wait() for child in children] == [0, 0]
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        one.history.seal()
        folder = one.history.status().folder
        records = sealed(folder)
        assert len(records) == 241
        assert [record.first for record in records][1:] == [record.last + 1 for record in records][:-1]
        assert records[-1].last == one.sequence
        report = verify(folder)
        assert (report.problems, report.notes) == ((), ())
        assert len(one.snapshot()["items"]) == 240


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agentic_flow.agentdb.backup import backup, restore
from agentic_flow.core.errors import Unavailable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data, work, base, size = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
for what in (lambda: backup(data, work / "copy"), lambda: restore(base, work / "restored")):
    try:
        what()
    except Unavailable as error:
        print(error.message)
"""


async def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    """Catches half a backup or half a database under the real name, and an error that is not ours."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, *(f"item-{number}" for number in range(200)))
        backup(tmp_path / "data", tmp_path / "base")
    work = tmp_path / "work"
    work.mkdir()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FULL, ROOT, str(tmp_path / "data"), str(work), str(tmp_path / "base"), "60000",
        stdout=PIPE,
    )  # fmt: skip
    told = (await child.communicate())[0].decode().splitlines()
    assert child.returncode == 0
    assert len(told) == 2
    assert "cannot be copied" in told[0] or "cannot be written" in told[0]
    assert "cannot be restored" in told[1]
    assert not (work / "copy").exists()
    assert [path for path in work.rglob("*") if path.is_file()] == []


SEAL_FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.vectors import Item
from history_store import recorded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

async def main():
    with recorded(Path(sys.argv[2]), Path(sys.argv[3]), seal_s=0.01) as one:
        await one.store.create_namespace("acme", "notes")
        await one.store.upsert("acme", "notes", [Item(id=f"i{n}", text="words " * 300) for n in range(100)])
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)
        # SQLite writes in pages; a limit on the size of any file stops the segment and spares the log.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft[1]))
        try:
            one.history.seal()
        except Unavailable as error:
            print(error.message)
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        print(len(list(one.history.status().folder.iterdir())))
        print(one.history.seal() == one.sequence)

asyncio.run(main())
"""


async def test_a_segment_that_does_not_fit_on_the_disk_is_sealed_later(tmp_path: Path) -> None:
    """Catches half a segment, and changes that leave the database before they are in a file."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SEAL_FULL, ROOT, str(tmp_path / "data"), str(tmp_path / "history"), stdout=PIPE
    )
    told = (await child.communicate())[0].decode().splitlines()
    assert child.returncode == 0
    assert "cannot be written" in told[0]
    assert told[1:] == ["1", "True"]


async def test_a_patch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Catches a restore that goes on when the rows are not those that the call found."""
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history) as one:
        await put(one, "a")
        backup(data, tmp_path / "base")
        namespace = one.store._db.read_sync(lambda c: find_namespace(c, ACME, NOTES))

        def beside(connection: apsw.Connection) -> None:
            """A change that no history sees, at no sequence: what a program of another maker would do."""
            rows(connection, "DELETE FROM vectors")
            rows(connection, "DELETE FROM items")

        one.store._db.write_sync(beside)
        await put(one, "a")
        one.history.seal()
        assert namespace.id == 1
    with pytest.raises(DataCorrupted, match="does not fit"):
        restore(tmp_path / "base", tmp_path / "back", history=history)
    assert not (tmp_path / "back" / "agentdb").exists()


async def test_times_of_a_clock_that_jumps(tmp_path: Path) -> None:
    """Catches a moment that cannot be reached because the clock was wrong for a while."""
    clock = SteppedClock(1000.0)
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history, clock=clock) as one:
        await put(one, "a")
        backup(data, tmp_path / "base")
        for number, now_s in enumerate((1010.0, 9999.0, 1020.0, 1030.0)):
            clock.now_s = now_s - 1
            await put(one, f"item-{number}")
        last = one.sequence
        one.history.seal()
    for at, sequence in ((1015.0, last - 3), (1025.0, last - 1), (1030.0, last), (9999.0, last)):
        report = restore(tmp_path / "base", tmp_path / f"at-{at}", history=history, at=at)
        assert report.sequence == sequence
    with pytest.raises(InvalidInput, match="ends before"):
        restore(tmp_path / "base", tmp_path / "late", history=history, at=10_000.0)
    with pytest.raises(InvalidInput, match="before the backup"):
        restore(tmp_path / "base", tmp_path / "early", history=history, at=900.0)
    assert os.listdir(tmp_path / "at-1015.0") == ["agentdb"]


async def test_dropping_a_large_namespace_records_its_number_only(tmp_path: Path) -> None:
    """Catches a patch (and memory) that grows with what a drop removes."""
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history) as one:
        await put(one, *(f"item-{number}" for number in range(500)))
        backup(data, tmp_path / "base")
        namespace = one.store._db.read_sync(lambda c: find_namespace(c, ACME, NOTES))

        def drop(connection: apsw.Connection) -> int:
            with one.history.recording(connection, ACME, 5.0, drops=NOTES):
                return writing.drop_namespace(connection, namespace.id, 5.0)

        assert one.store._db.write_sync(drop) == 500
        assert len(waiting(one)[-1][2]) < 100
        now = one.snapshot()
        one.history.seal()
    restore(tmp_path / "base", tmp_path / "back", history=history)
    assert stored(tmp_path / "back") == now
    assert verify(tmp_path / "back").ok


async def test_pruning_removes_what_no_kept_backup_needs_and_no_more(tmp_path: Path) -> None:
    """Catches a moment behind a kept backup that is lost, segments that stay, and a chain that breaks off."""
    data, history, backups = tmp_path / "data", tmp_path / "history", tmp_path / "backups"
    with recorded(data, history, segment_max_bytes=1500) as one:
        folder = one.history.status().folder
        moments: dict[str, list[int]] = {}
        for name in ("first", "second", "third"):
            moments[name] = []
            for number in range(6):
                await put(one, f"{name}{number}", text="many words " * 40)
                moments[name].append(one.sequence)
            one.history.seal()
            backup(data, backups / name)
        before = list_segments(folder)
        ends = [moments[name][-1] for name in ("first", "second", "third")]
        foreign = recorded(tmp_path / "other", tmp_path / "other-history")
        with foreign as other:
            await put(other, "x")
        # A backup of another database, however old, needs nothing of this history.
        backup(tmp_path / "other", backups / "foreign")
        tried = prune(data, history, dry_run=True)
        assert (tried.oldest_backup, tried.oldest_sequence) == (backups / "first", ends[0])
        assert list_segments(folder) == before
        assert list(tried.removed) == [file.path for file in before if file.last <= ends[0]]
        (backups / "first").rename(tmp_path / "gone")
        done = prune(data, history, [backups])
        assert (done.oldest_backup, done.missing) == (backups / "second", (backups / "first",))
        assert done.removed_bytes > 0
        after = list_segments(folder)
        assert after == [file for file in before if file.last > ends[1]]
        assert (len(done.removed), done.kept) == (len(before) - len(after), len(after))
        await put(one, "later")
        one.history.seal()
        moments["third"].append(one.sequence)
        assert verify(folder).ok
        for sequence in moments["third"]:
            back = tmp_path / f"at-{sequence}"
            assert restore(backups / "second", back, history=history, at=sequence).sequence == sequence
        with pytest.raises(DataCorrupted, match="not in the history"):
            restore(tmp_path / "gone", tmp_path / "too-old", history=history)
        # Back again, it is the oldest, and the history no longer continues it.
        with pytest.raises(Conflict, match="begins at"):
            prune(data, history, [tmp_path / "gone"])
        shutil.rmtree(tmp_path / "gone")
        # All that is sealed is in the newest backup; the chain goes on from the last segment all the same.
        backup(data, backups / "fourth", history_dir=history)
        for name in ("second", "third"):
            shutil.rmtree(backups / name)
        assert prune(data, history).kept == 1
        await put(one, "last")
        one.history.seal()
        assert verify(folder).ok
        assert restore(backups / "fourth", tmp_path / "end", history=history).sequence == one.sequence


async def test_pruning_needs_a_backup_that_is_whole(tmp_path: Path) -> None:
    """Catches a history that is removed for a backup that is not there, or cannot be restored."""
    data, history = tmp_path / "data", tmp_path / "history"
    with recorded(data, history, segment_max_bytes=1500) as one:
        folder = one.history.status().folder
        for number in range(6):
            await put(one, f"i{number}", text="many words " * 40)
        one.history.seal()
        before = list_segments(folder)
        assert len(before) > 1
        with pytest.raises(Conflict, match="no backup"):
            prune(data, history)
        backup(data, tmp_path / "base")
        file = tmp_path / "base" / "agentdb.db"
        whole = file.read_bytes()
        file.write_bytes(whole[:5000] + b"!" + whole[5001:])
        with pytest.raises(DataCorrupted, match="damaged"):
            prune(data, history)
        assert list_segments(folder) == before
        file.write_bytes(whole)
        assert prune(data, history).kept == 1


async def test_a_history_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    """Catches a bare errno where the path and the reason should stand, beside a backup that is whole."""
    with recorded(tmp_path / "data", tmp_path / "history") as one:
        await put(one, "a")
        wrong = tmp_path / "file"
        wrong.touch()
        told = backup(tmp_path / "data", tmp_path / "base", history_dir=wrong).history_error
        assert told is not None
        assert told.endswith("cannot be written: Not a directory")
        assert told.startswith(f"'{wrong}")
    assert verify(tmp_path / "base").ok
