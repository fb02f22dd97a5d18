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
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import apsw
import pytest
from cli_process import TIMEOUT_S, Place
from kept_rows import column, database

from agentic_flow.core.db import rows
from agentic_flow.deploy.backup import back_up_folder, databases, restore_folder

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

    def wait_for_end_of_a_run(self) -> None:
        """Until one has completed."""
        until_s = time.monotonic() + TIMEOUT_S
        while not get(f"{self.urls['platform']}/v1/runs?state=completed")["runs"]:
            assert not self.problems
            assert time.monotonic() < until_s
            time.sleep(0.05)

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


def check_agreement(data_dir: Path, *, booked_before_s: float = 0.0) -> None:
    """Whether the databases of a folder agree with each other.

    Args:
        booked_before_s: Each run that ended before then must have its model calls in the books: those are
            written half a second behind, and a backup waits for what came before it began.
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
    ended = column(
        runs,
        "SELECT workflow_id FROM af_workflows WHERE status = 'completed' AND parent_id IS NULL "
        f"AND name = 'run' AND ended_at_s < {booked_before_s!r}",
    )
    assert bool(ended) is (booked_before_s > 0)
    assert set(ended) <= set(column(data_dir / "gateway.db", "SELECT DISTINCT run FROM gw_usage"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "kettle.md").write_text("The thermostat switches the kettle off at 96 degrees.\n")
    return Place(tmp_path)


@pytest.mark.timeout(300)  # two servers are started, on a machine that may be busy
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
                check_agreement(folder)
            chain.wait_for_end_of_a_run()  # it is of those whose model calls must be in the books
            acknowledged, began_s = list(chain.done), time.time()
            last = place.run("backup", "last.tar.gz", "--json")
            assert last.code == 0, last.err
        server.signal(signal.SIGKILL)  # when nobody is in the middle of a call, which would fail of it
        assert not chain.problems
    print(f"{MOMENTS} moments: writers held for {max(pauses_s) * 1000:.1f} ms at most")
    assert last.data["left_out"] == []
    restored = place.run("restore", "last.tar.gz", "--data-dir", "elsewhere", "--json")
    assert restored.code == 0, restored.err
    elsewhere = place.folder / "elsewhere"
    assert set(acknowledged) <= links_in(elsewhere)
    check_agreement(elsewhere, booked_before_s=began_s)
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


def test_state_that_is_elsewhere_is_not_passed_over(place: Place) -> None:
    """Catches a backup that says nothing of the runs that PostgreSQL keeps, and success over no database."""
    assert place.run("backup", "a.tar.gz").code == 2
    database(place.data_dir / "one.db").close()
    url = {"AGENTIC_FLOW_SWARM__DATABASE_URL": "postgresql://flow@db.example/flow"}
    refused = place.run("backup", "a.tar.gz", **url)
    assert (refused.code, "swarm.database_url" in refused.problem) == (2, True)
    done = place.run("backup", "a.tar.gz", "--folder-only", "--json", **url)
    assert (done.code, done.data["elsewhere"]) == (0, ["swarm.database_url"])


def test_who_erases_a_tenant_is_told_of_backups_that_hold_it(place: Place) -> None:
    """Catches a tenant that is said to be gone and comes back with a backup that nobody named."""
    for words in (
        ("tenants", "create", "team-a"),
        ("db", "create", "notes", "--tenant", "team-a"),
        ("db", "put", "notes", "--tenant", "team-a", "--id", "s", "--text", "A secret."),
    ):
        assert place.run(*words).code == 0
    backups = place.folder / "backups"
    made = back_up_folder(place.data_dir, backups / "one.tar.gz", settle_s=0.0)
    assert made.contents.about.tenants == ("team-a",)
    erased = place.run("tenants", "erase", "team-a", "--yes", "--json")
    assert erased.code == 0, erased.err
    assert erased.data["backups"]["holding"] == [str(made.file)]
    made.file.rename(backups / "moved.tar.gz")
    back_up_folder(place.data_dir, backups / "after.tar.gz", settle_s=0.0)
    (backups / "foreign.tar.gz").write_bytes(b"")
    assert place.run("tenants", "create", "team-a").code == 0  # another of the same name
    again = place.run("tenants", "erase", "team-a", "--yes", "--json", "--backups", backups)
    assert again.code == 0, again.err
    assert again.data["backups"]["holding"] == [str(backups / "moved.tar.gz")]
    assert again.data["backups"]["missing"] == [str(made.file)]
    assert "foreign.tar.gz" in again.data["backups"]["unreadable"][0]
