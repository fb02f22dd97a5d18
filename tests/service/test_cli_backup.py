"""`agentic-flow backup|restore` of a data folder: one moment of a server at work, and nothing half done."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import apsw
import pytest
from cli_process import TIMEOUT_S, Place

from agentic_flow.core.db import Database, execute_many, rows
from agentic_flow.core.errors import Conflict, DataCorrupted, Unavailable
from agentic_flow.deploy.backup import back_up_folder, databases, restore_folder
from agentic_flow.deploy.snapshot import one_moment

MOMENTS = int(os.environ.get("BACKUP_MOMENTS", "10"))
RUN_EACH = 20
"""Links of the chain from one run to the next: a run takes half a second of a processor."""


@dataclass
class Chain:
    """Writes to three databases in turn, each after the one before was acknowledged: of one moment's state,
    what is there is always the beginning of the chain.

    Args:
        urls: Of the services.
        folder: What the runs read.
        done: Links that were acknowledged.
        problems: Answers that were none.
    """

    urls: dict[str, str]
    folder: Path
    done: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._crowd)]

    def __enter__(self) -> Self:
        post(f"{self.urls['agentdb']}/v1/namespaces/chain", {}, "PUT")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def wait_for(self, links: int) -> None:
        """Until so many more are acknowledged."""
        until_s = time.monotonic() + TIMEOUT_S
        wanted = len(self.done) + links
        while len(self.done) < wanted:
            assert not self.problems
            assert time.monotonic() < until_s
            time.sleep(0.01)

    def _write(self) -> None:
        for number in itertools.count():
            if self._end.is_set():
                return
            link = f"link-{number:05}"
            try:
                if number % RUN_EACH == 2:
                    goal = f"{link}: what switches the kettle off?"
                    run = {"goal": goal, "inputs": [str(self.folder)], "agents": 1}
                    post(f"{self.urls['platform']}/v1/runs", run)
                elif number % 2:
                    post(f"{self.urls['platform']}/v1/tenants", {"name": link})
                else:
                    items = [{"id": link, "text": f"Note {number}."}]
                    post(f"{self.urls['agentdb']}/v1/namespaces/chain/items", {"items": items})
            except OSError as error:
                if not self._end.is_set():
                    self.problems.append(f"{link}: {error}")
                return
            self.done.append(link)

    def _crowd(self) -> None:
        """Keeps AgentDB's writer busy, so that its lock is hard to get."""
        for number in itertools.count():
            if self._end.is_set():
                return
            items = [{"id": f"crowd-{number % 50}-{one}", "text": f"crowd {number}"} for one in range(5)]
            try:
                post(f"{self.urls['agentdb']}/v1/namespaces/chain/items", {"items": items})
            except OSError as error:
                if not self._end.is_set():
                    self.problems.append(f"crowd: {error}")
                return


def post(url: str, body: dict[str, Any], method: str = "POST") -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"content-type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.loads(answer.read())


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        return json.loads(answer.read())


def column(file: Path, sql: str) -> list[Any]:
    # Not by another SQLite library: two in one process end each other's locks.
    with closing(apsw.Connection(str(file))) as connection:
        return [value for (value,) in rows(connection, sql)]


def links_in(data_dir: Path) -> set[str]:
    """The links of the chain that a data folder holds, whichever database they are in."""
    items = column(data_dir / "agentdb/agentdb.db", "SELECT id FROM items WHERE id LIKE 'link-%'")
    tenants = column(data_dir / "identity.db", "SELECT name FROM tenants WHERE name LIKE 'link-%'")
    runs = column(
        data_dir / "runs/runs.db",
        "SELECT payload FROM af_workflows WHERE parent_id IS NULL AND name = 'run'",
    )
    goals = [re.search(r"link-\d+", payload) for payload in runs]
    return {*items, *tenants, *(goal[0] for goal in goals if goal is not None)}


def check_agreement(data_dir: Path, *, usage: bool) -> None:
    """Whether the databases of a folder agree with each other.

    Args:
        usage: Whether each completed run must have its model calls in the books: those are written half a
            second behind.
    """
    for file in databases(data_dir):
        assert column(file, "PRAGMA integrity_check") == ["ok"]
        assert column(file, "SELECT 1 FROM pragma_foreign_key_check") == []
    runs = data_dir / "runs/runs.db"
    completed = column(
        runs,
        "SELECT workflow_id FROM af_workflows "
        "WHERE status = 'completed' AND parent_id IS NULL AND name = 'run'",
    )
    kept = column(
        data_dir / "agentdb/agentdb.db",
        "SELECT i.id FROM items i JOIN namespaces n ON n.id = i.namespace_id "
        "WHERE n.name = 'memory.trajectories'",
    )
    for run in completed:
        assert any(run in trajectory for trajectory in kept), (run, kept)
    if usage:
        booked = set(column(data_dir / "gateway.db", "SELECT DISTINCT run FROM gw_usage"))
        assert set(completed) <= booked


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "kettle.md").write_text("The thermostat switches the kettle off at 96 degrees.\n")
    return Place(tmp_path)


def test_a_server_at_work_is_backed_up_as_of_one_moment(place: Place) -> None:
    """Catches databases that were copied one after the other, writers that get an error, acknowledged writes
    that are missing, runs without their memory or their books, and a backup that no server goes on from."""
    pauses_s: list[float] = []
    chance = random.Random(7)
    with place.start("serve", "all") as server:
        urls = server.addresses()
        with Chain(urls, place.folder / "notes") as chain:
            chain.wait_for(RUN_EACH)
            for number in range(MOMENTS):
                chain.wait_for(chance.randrange(1, RUN_EACH))
                before = list(chain.done)
                made = back_up_folder(place.data_dir, place.folder / f"{number}.tar.gz", settle_s=0.0)
                after = len(chain.done)
                pauses_s.append(made.contents.manifest.pause_s)
                folder = place.folder / f"restored-{number}"
                restore_folder(made.file, folder)
                found = links_in(folder)
                assert set(before) <= found
                assert found == {f"link-{one:05}" for one in range(len(found))}, (
                    "a later write without an earlier"
                )
                assert len(found) <= after + 1
                check_agreement(folder, usage=False)
            acknowledged = list(chain.done)
            last = place.run("backup", "last.tar.gz", "--json")
            assert last.code == 0, last.err
            server.signal(signal.SIGKILL)
        assert not chain.problems
    print(f"{MOMENTS} moments: writers held for {max(pauses_s) * 1000:.1f} ms at most")
    assert last.data["left_out"] == []
    restored = place.run("restore", "last.tar.gz", "--data-dir", "elsewhere", "--json")
    assert restored.code == 0, restored.err
    elsewhere = place.folder / "elsewhere"
    assert set(acknowledged) <= links_in(elsewhere)
    check_agreement(elsewhere, usage=True)
    check_it_goes_on(place, elsewhere)


def check_it_goes_on(place: Place, data_dir: Path) -> None:
    """A server takes the folder up: every run ends, memory and audit are whole."""
    unfinished = column(
        data_dir / "runs/runs.db",
        "SELECT workflow_id FROM af_workflows "
        "WHERE status NOT IN ('completed', 'failed') AND parent_id IS NULL",
    )
    where = ("--data-dir", str(data_dir))
    with place.start("serve", "all", *where, AGENTIC_FLOW_SWARM__LEASE_S="2") as server:
        urls = server.addresses()
        until_s = time.monotonic() + TIMEOUT_S
        while True:
            states = [run["state"] for run in get(f"{urls['platform']}/v1/runs?limit=500")["runs"]]
            if set(states) == {"completed"}:
                break
            assert time.monotonic() < until_s, (unfinished, states)
            time.sleep(0.1)
        found = post(f"{urls['agentdb']}/v1/namespaces/chain/search", {"text": "Note", "k": 3})
        assert len(found["hits"]) == 3
        server.signal(signal.SIGTERM)
        assert server.end().code == 0
    for words in (("memory", "verify"), ("audit", "verify"), ("doctor",)):
        done = place.run(*words, *where)
        assert done.code == 0, done.out + done.err


def database(path: Path) -> Database:
    return Database(path, ("CREATE TABLE kept (value TEXT NOT NULL) STRICT",))


def add(path: Path, value: str, *, busy_timeout_s: float = 10.0) -> None:
    with closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(int(busy_timeout_s * 1000))
        rows(connection, "INSERT INTO kept VALUES (?)", (value,))


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


def test_what_was_deleted_and_what_opens_something_is_not_in_it(place: Place) -> None:
    """Catches deleted rows that travel in free pages, and secrets in a backup that is said to have none."""
    path = place.data_dir / "one.db"
    database(path).close()
    with closing(apsw.Connection(str(path))) as connection:
        rows(connection, "PRAGMA secure_delete=OFF")
        rows(connection, "INSERT INTO kept VALUES ('a long deleted text')")
        rows(connection, "DELETE FROM kept")
    assert place.run("keys", "create", "someone").code == 0
    stored = subprocess.run(
        [sys.executable, "-m", "agentic_flow", "secrets", "set", "gateway.openai.api_key"],
        cwd=place.folder, env=place.environment, input="sk-of-a-provider\n", text=True, check=False,
    )  # fmt: skip
    assert stored.returncode == 0
    signing = column(place.data_dir / "identity.db", "SELECT jwk FROM signing_keys")
    assert signing
    plain = place.run("backup", "False.tar.gz")
    assert plain.code == 0, plain.err
    assert "are not in it (--with-secrets)" in plain.err
    back_up_folder(place.data_dir, place.folder / "True.tar.gz", with_secrets=True, settle_s=0.0)
    for with_secrets in (False, True):
        folder = place.folder / f"restored-{with_secrets}"
        restore_folder(place.folder / f"{with_secrets}.tar.gz", folder)
        assert b"a long deleted text" not in (folder / "one.db").read_bytes()
        assert column(folder / "identity.db", "SELECT jwk FROM signing_keys") == (
            signing if with_secrets else []
        )
        assert (folder / "secrets.key").exists() is with_secrets
        assert (folder / "identity.db").stat().st_mode & 0o777 == 0o600
    assert place.run("keys", "list", "--data-dir", place.folder / "restored-False").code == 0


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


def test_damage_and_a_full_disk_end_it_with_nothing_left(folder: Path, tmp_path: Path, place: Place) -> None:
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
            [*small, *words], cwd=tmp_path, env=place.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 7, done.stderr
        assert "make room" in done.stderr
    with file.open("r+b") as content:
        content.seek(40 * 4096)
        content.write(b"\xff" * 8192)
    with pytest.raises(DataCorrupted, match=re.escape("big.db")):
        back_up_folder(folder, tmp_path / "a.tar.gz", settle_s=0.0)
    assert set(tmp_path.iterdir()) == before


def test_state_that_is_elsewhere_is_not_passed_over(place: Place) -> None:
    """Catches a backup that says nothing of the runs that PostgreSQL keeps, and success over no database."""
    assert place.run("backup", "a.tar.gz").code == 2
    database(place.data_dir / "one.db").close()
    url = {"AGENTIC_FLOW_SWARM__DATABASE_URL": "postgresql://flow@db.example/flow"}
    refused = place.run("backup", "a.tar.gz", **url)
    assert (refused.code, "swarm.database_url" in refused.problem) == (2, True)
    done = place.run("backup", "a.tar.gz", "--folder-only", "--json", **url)
    assert (done.code, done.data["elsewhere"]) == (0, ["swarm.database_url"])
