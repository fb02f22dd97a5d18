"""The one moment of several databases: writers are held and let go, whatever becomes of the backup."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli_process import TIMEOUT_S, Place
from kept_rows import add, column, database

from agentic_flow.core.db import execute_many, rows
from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, Unavailable
from agentic_flow.deploy.backup import back_up_folder, databases, restore_folder
from agentic_flow.deploy.snapshot import one_moment
from agentic_flow.deploy.volumes import put, take


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder with two databases that are open."""
    data_dir = tmp_path / "data"
    opened = [database(data_dir / name) for name in ("one.db", "deep/two.db")]
    try:
        yield data_dir
    finally:
        for one in opened:
            one.close()


HOLD = """
import sys
from pathlib import Path
from agentic_flow.deploy.backup import databases
from agentic_flow.deploy.snapshot import one_moment
from agentic_flow.deploy.volumes import put, take
def at_moment():
    print("held", flush=True)
    sys.stdin.readline()
with one_moment(databases(Path(sys.argv[1])), at_moment=at_moment):
    print("let go", flush=True)
    sys.stdin.readline()
"""
STOP = """
import sys
from pathlib import Path
from agentic_flow.deploy.backup import back_up_folder
def progress(path, done, total):
    print("at work", flush=True)
    sys.stdin.readline()
back_up_folder(Path(sys.argv[1]), Path(sys.argv[2]), settle_s=0.0, progress=progress)
"""


def child(program: str, *words: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_all_writers_are_held_at_the_moment_and_then_let_go(folder: Path) -> None:
    """Catches a barrier that bars nobody, or not everybody, and one that stays while copies are made."""
    process = child(HOLD, folder)
    try:
        assert said(process) == "held"
        for file in databases(folder):
            with pytest.raises(apsw.BusyError):
                add(file, "held", busy_timeout_s=0.0)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert said(process) == "let go"
        for file in databases(folder):
            add(file, "later", busy_timeout_s=0.0)
    finally:
        end(process)


def test_a_backup_that_is_killed_lets_go_and_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    """Catches a lock that outlives its process, and half a backup under the final name."""
    process = child(HOLD, folder)
    assert said(process) == "held"
    end(process)
    for file in databases(folder):
        add(file, "free", busy_timeout_s=0.0)
    process = child(STOP, folder, tmp_path / "a.tar.gz")
    assert said(process) == "at work"
    end(process)
    rests = [path for path in tmp_path.iterdir() if path != folder]
    assert rests
    assert all(path.name.startswith(".") and path.name.endswith(".part") for path in rests)
    back_up_folder(folder, tmp_path / "a.tar.gz", settle_s=0.0)
    restore_folder(tmp_path / "a.tar.gz", tmp_path / "b")
    assert column(tmp_path / "b/one.db", "SELECT value FROM kept") == ["free"]


def test_a_writer_without_end_is_an_error_and_holds_nobody_up(folder: Path) -> None:
    """Catches a wait for ever, and locks on the other databases meanwhile."""
    one, two = sorted(databases(folder))
    with closing(apsw.Connection(str(one))) as busy:
        rows(busy, "BEGIN IMMEDIATE")
        with (
            pytest.raises(Unavailable, match=re.escape(one.name)) as raised,
            one_moment([two, one], wait_s=0.2),
        ):
            pass
        assert raised.value.retryable
        add(two, "free", busy_timeout_s=0.0)


def test_a_folder_is_replaced_only_when_told_and_not_under_a_server(folder: Path, tmp_path: Path) -> None:
    """Catches a restore over what is there, one under a process that works, and one that loses the old."""
    add(folder / "one.db", "first")
    back_up_folder(folder, tmp_path / "a.tar.gz", settle_s=0.0)
    add(folder / "one.db", "second")
    with pytest.raises(Conflict, match="not empty"):
        restore_folder(tmp_path / "a.tar.gz", folder)
    with pytest.raises(Conflict, match="in use"):
        restore_folder(tmp_path / "a.tar.gz", folder, force=True)
    other = tmp_path / "other"
    restore_folder(tmp_path / "a.tar.gz", other)
    add(other / "one.db", "third")
    report = restore_folder(tmp_path / "a.tar.gz", other, force=True)
    assert report.kept is not None
    assert column(report.kept / "one.db", "SELECT value FROM kept") == ["first", "third"]
    assert column(other / "one.db", "SELECT value FROM kept") == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "a.tar.gz", "other", report.kept.name}


def test_damage_and_a_full_disk_end_it_with_nothing_left(folder: Path, tmp_path: Path) -> None:
    """Catches a backup of a damaged database, and rests of one, or of a restore, that had no room."""
    file = folder / "big.db"
    database(file).close()
    with closing(apsw.Connection(str(file))) as connection, connection:
        execute_many(
            connection, "INSERT INTO kept VALUES (?)", ((os.urandom(500).hex(),) for _ in range(2000))
        )
    back_up_folder(folder, tmp_path / "good.tar.gz", settle_s=0.0)
    before = set(tmp_path.iterdir())
    small = ["bash", "-c", 'ulimit -f 600; exec "$0" -m agentic_flow "$@"', sys.executable]
    for words in (
        ("backup", "a.tar.gz", "--data-dir", "data"),
        ("restore", "good.tar.gz", "--data-dir", "b"),
    ):
        done = subprocess.run(
            [*small, *words],
            cwd=tmp_path,
            env=Place(tmp_path).environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 7, done.stderr
        assert "make room" in done.stderr
    with file.open("r+b") as content:
        content.seek(40 * 4096)
        content.write(b"\xff" * 8192)
    with pytest.raises(DataCorrupted, match=re.escape("big.db")):
        back_up_folder(folder, tmp_path / "a.tar.gz", settle_s=0.0)
    assert set(tmp_path.iterdir()) == before


def volumes(what: str, order: dict[str, Any], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run what a container with the volumes runs."""
    return subprocess.run(
        [sys.executable, "-m", "agentic_flow.deploy.volumes", what],
        input=json.dumps(order).encode() + b"\n" + given,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_volumes_are_taken_and_put_or_left_as_they_were(folder: Path, tmp_path: Path) -> None:
    """Catches a barrier that stays when whoever asked is gone, an archive without its end that is unpacked,
    and volumes of which one is filled and another is not."""
    add(folder / "one.db", "first")
    about = {"made_at_s": 1.0, "kind": "compose", "store": "directory", "name": "x", "with_secrets": False}
    order = {"folders": {"platform": str(folder), "swarm": str(folder / "deep")}, "about": about}
    order |= {"scratch": str(tmp_path)}
    alone = volumes("take", {**order, "wait": True})
    assert alone.returncode == 1
    held, problem = alone.stderr.decode().splitlines()
    assert (held, json.loads(problem)["code"]) == ("held", "unavailable")
    taken = io.BytesIO()
    take({**order, "wait": False}, io.BytesIO(), taken, tmp_path)
    archive = taken.getvalue()
    places = {name: tmp_path / name for name in ("platform", "swarm")}
    for place in places.values():
        place.mkdir()
    target = {"folders": {name: str(place) for name, place in places.items()}}
    for cut in (1000, 512 * 20, len(archive) - 1024 * 11):
        with pytest.raises((DataCorrupted, InvalidInput)):
            put(target, io.BytesIO(archive[:cut]))
        assert all(list(place.iterdir()) == [] for place in places.values())
    done = volumes("put", target, archive)
    assert done.returncode == 0, done.stderr
    assert column(places["platform"] / "one.db", "SELECT value FROM kept") == ["first"]
    assert (places["swarm"] / "two.db").exists()
    with pytest.raises(Conflict, match="already"):
        put(target, io.BytesIO(archive))
