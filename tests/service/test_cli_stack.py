"""`agentic-flow up|down|status|logs --embedded`: one process in the background, seen from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_process import Place

from agentic_flow.deploy.supervisor import FAILURES_MAX, LOG_FILE, STATE_FILE, Supervisor, hold, read_state

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A folder whose background process, if there is one, is ended with the test."""
    place = Place(tmp_path, **NO_ENGINE)
    try:
        yield place
    finally:
        state = read_state(place.data_dir)
        if state is not None:
            for pid in (state.pid, state.server_pid):
                if pid is not None and "agentic_flow" in command_of(pid):
                    os.kill(pid, signal.SIGKILL)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def healthy_status(place: Place, *, after_pid: int | None = None) -> Any:
    """What `status` says once all is ready, which a busy machine may not say in time, with another server
    than `after_pid`."""
    until_s = time.monotonic() + 120
    while True:
        status = place.run("status", "--json")
        if status.code == 0 and status.data["state"]["server_pid"] != after_pid:
            return status.data
        assert time.monotonic() < until_s, status.out


def test_it_is_up_when_it_says_so_and_gone_when_told(place: Place) -> None:
    """Catches an `up` that does not wait, a second one that starts another, a key in the log, and a `down`
    after which something still runs."""
    up = place.run("up", "--json")  # no engine: it says that it takes this way
    assert up.code == 0, up.err
    assert "no containers" in up.err
    assert up.data["mode"] == "embedded"
    assert set(up.data["addresses"]) == {"platform", "agentdb", "swarm"}
    for url in up.data["addresses"].values():
        with urllib.request.urlopen(f"{url}/health/ready", timeout=30) as answer:
            assert answer.status == 200
    key = Path(up.data["owner_key_file"]).read_text().strip()
    request = urllib.request.Request(
        f"{up.data['addresses']['platform']}/v1/runs", headers={"authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
    log = place.run("logs", "--json")
    assert any("listens on" in line["line"] for line in log.data)
    assert key not in Path(up.data["log_file"]).read_text()
    again = place.run("up", "--embedded")
    assert (again.code, "runs already" in again.problem) == (5, True)
    status = healthy_status(place)
    assert status["healthy"] is True
    down = place.run("down", "--json")
    assert (down.code, down.data["stopped"]) == (0, True)
    state = status["state"]
    assert command_of(state["pid"]) == command_of(state["server_pid"]) == ""
    assert place.run("status").code == 1


def test_a_server_that_dies_is_begun_again(place: Place) -> None:
    """Catches a supervisor that only watches, and a `status` that shows the dead server's addresses."""
    assert place.run("up", "--embedded").code == 0
    before = json.loads((place.data_dir / STATE_FILE).read_bytes())
    os.kill(before["server_pid"], signal.SIGKILL)
    assert healthy_status(place, after_pid=before["server_pid"])["state"]["restarts"] == 1
    assert place.run("down").code == 0


def test_a_server_that_cannot_start_is_told_at_once(place: Place) -> None:
    """Catches a wait until the time is over for a port that stays taken, and an error without its cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        up = place.run("up", "--embedded", "--json", AGENTIC_FLOW_SERVE__SWARM_PORT=port)
    assert up.code == 7
    assert port in up.data["error"]["detail"]
    assert place.run("status").code == 1


def test_nothing_started_is_not_found(place: Place) -> None:
    """Catches success over nothing."""
    for words in (("status",), ("down",), ("logs",)):
        assert place.run(*words).code == 4
    both = place.run("up", "--embedded", "--compose")
    assert both.code == 2


def test_trying_again_has_an_end(tmp_path: Path) -> None:
    """Catches a loop that starts a broken program for ever, and one that gives up after the first failure."""
    supervisor = Supervisor(tmp_path, ["sh", "-c", "echo said; echo x >> runs; exit 1"], "0")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert supervisor.run() == 1
    finally:
        os.chdir(here)
    assert (tmp_path / "runs").read_text() == "x\n" * FAILURES_MAX
    assert (tmp_path / LOG_FILE).read_text().count("said\n") == FAILURES_MAX
    state = read_state(tmp_path)
    assert state is not None
    assert (state.restarts, state.server_pid) == (FAILURES_MAX - 1, None)


def test_only_one_supervises_a_folder(tmp_path: Path) -> None:
    """Catches two servers over one data folder."""
    first = hold(tmp_path)
    assert first is not None
    assert hold(tmp_path) is None
    os.close(first)
    again = hold(tmp_path)
    assert again is not None
    os.close(again)
