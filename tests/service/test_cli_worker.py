"""`agentic-flow worker` from outside: a server that only accepts, workers that only execute."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import signal
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Event

from cli_process import Place
from scripted_team import GOAL, make_folder, team
from test_cli_serve import QUESTION, get, remote

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest


def test_a_server_accepts_and_a_worker_executes(tmp_path: Path) -> None:
    """Catches a server without places that executes, a depth that is not shown, or a worker nobody asks."""
    place = Place(tmp_path)
    folder = make_folder(tmp_path)
    with (
        place.start("serve", "all", AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX="0") as server,
        remote(server.addresses()["platform"], place) as client,
    ):
        url = client.settings.peers.platform_url
        by_default = client.runs.submit(QUESTION, input=folder, agents=1)
        nightly = client.runs.submit(QUESTION, input=folder, agents=1, queue="nightly", priority=5)
        shown = client.runs.show(nightly)
        assert (shown.state, shown.queue, shown.priority) == ("queued", "nightly", 5)
        assert client.runs.show(by_default).queue == "default"
        metrics = ""
        while 'agentic_flow_queue_waiting_runs{queue="nightly"} 1.0' not in metrics:
            metrics = get(f"{url}/metrics")[1]  # measured again every two seconds
        assert 'agentic_flow_queue_waiting_runs{queue="default"} 1.0' in metrics
        assert 'agentic_flow_queue_oldest_wait_seconds{queue="nightly"}' in metrics
        with place.start("worker", "--queue", "nightly", "--places", "2", "--json") as worker:
            worker.until(lambda line: "takes runs from nightly, 2 at a time" in line)
            assert client.runs.wait(nightly).state == "completed"
            assert client.runs.show(by_default).state == "queued"
            worker.signal(signal.SIGTERM)
            done = worker.end()
        assert done.code == 0, done.err
        assert done.data == {"working": {"queues": ["nightly"], "places": 2}}
        assert "Traceback" not in done.err
        with place.start("worker") as worker:
            worker.until(lambda line: "takes runs from default" in line)
            assert client.runs.wait(by_default).state == "completed"
        server.signal(signal.SIGTERM)
        assert server.end().code == 0


def test_a_worker_that_leaves_hands_back(tmp_path: Path) -> None:
    """Catches a worker that waits for ever for a slow model, or takes the run with it."""
    folder = make_folder(tmp_path)
    asked, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text or goes_on.is_set():
            return team(request)
        asked.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
            AGENTIC_FLOW_SWARM__LEASE_S="300",
        )
        with (
            place.start("serve", "all", AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX="0") as server,
            remote(server.addresses()["platform"], place) as client,
        ):
            with place.start("worker", "--drain-s", "0.1") as worker:
                worker.until(lambda line: "takes runs" in line)
                run = client.runs.submit(GOAL, input=folder, agents=2)
                assert asked.wait(60)
                worker.signal(signal.SIGTERM)
                worker.until(lambda line: "1 unfinished runs handed back" in line)
                assert worker.end().code == 0
            assert client.runs.show(run).state == "queued"
            goes_on.set()
            with place.start("worker") as worker:
                worker.until(lambda line: "takes runs" in line)
                assert client.runs.wait(run).state == "completed"
        plans = sum("Split it into at most" in request.last_text for request in provider.requests)
    assert plans == 1


def until_failing(url: str, *failing: str) -> dict[str, bool]:
    """The checks of `/health/ready` once these, and no others, fail."""
    while True:  # the test's own timeout bounds it
        status, text = get(f"{url}/health/ready")
        said = json.loads(text)
        if (status, said.get("failing", [])) == (503 if failing else 200, list(failing)):
            return said["checks"]


def test_a_worker_tells_how_it_is(tmp_path: Path) -> None:
    """Catches a readiness that is always yes: without a sign of life in the store, or while it drains."""
    folder = make_folder(tmp_path)
    asked, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" not in request.last_text:
            asked.set()
            goes_on.wait(60)
        return team(request)

    with FakeProvider(script) as provider:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
            AGENTIC_FLOW_SWARM__LEASE_S="1",
        )
        with place.start("worker", "--queue", "gpu", "--places", "3", "--port", "0", "--json") as worker:
            url = worker.addresses(1)["worker"]
            assert until_failing(url) == {
                "accepting": True,
                "taking runs": True,
                "run database": True,
                "heartbeat": True,
                "disk": True,
            }
            assert get(f"{url}/v1/runs")[0] == 401, "it has no routes of its own"
            file = place.data_dir / "runs" / "runs.db"
            with closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")  # nobody else can write, the heartbeat neither
                until_failing(url, "heartbeat")
                assert get(f"{url}/health/live")[0] == 200
                other.execute("ROLLBACK")
            until_failing(url)
            submitted = place.start("run", GOAL, "--input", folder, "--agents", "2", "--queue", "gpu")
            with submitted:
                assert asked.wait(60)
                metrics = ""
                while 'agentic_flow_queue_running_runs{queue="gpu"} 1.0' not in metrics:
                    metrics = get(f"{url}/metrics")[1]  # measured again every two seconds
                assert "agentic_flow_worker_places 3.0" in metrics
                assert "agentic_flow_worker_runs 1.0" in metrics
                worker.signal(signal.SIGTERM)
                until_failing(url, "taking runs")
                assert get(f"{url}/health/live")[0] == 200
                goes_on.set()
                done = worker.end()
                assert done.code == 0, done.err
                assert done.data == {"working": {"queues": ["gpu"], "places": 3, "listening": url}}
                assert submitted.end().code == 0


def test_a_worker_says_that_its_port_is_taken(tmp_path: Path) -> None:
    """Catches a worker that works on without the port that it is probed at."""
    place = Place(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = place.run("worker", "--port", str(taken.getsockname()[1]))
    assert refused.code != 0
    assert "the port is in use" in refused.problem
    assert "AGENTIC_FLOW_SERVE__WORKER_PORT" in refused.err
    assert not (place.data_dir / "runs").exists()


FLOW = """
name: note
steps:
  - {id: note, tool: {name: artifact_write, arguments: {name: n.txt, text: noted}}}
"""
DETACHED = ("run", QUESTION, "--input", "project", "--agents", "1", "--detach")


def test_a_detached_run_is_refused_where_nobody_would_do_it(tmp_path: Path) -> None:
    """Catches a run that is left where nobody does it: no worker, a dead one, or one of another queue."""
    place = Place(tmp_path)
    make_folder(tmp_path)
    words = DETACHED
    nobody = place.run(*words)
    assert nobody.code != 0
    assert "no process takes runs from the queue 'default'" in nobody.problem
    assert "agentic-flow worker --queue default" in nobody.err
    (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
    flow = ("workflow", "run", "flow.yaml", "--detach")
    assert "no process takes runs from the queue 'default'" in place.run(*flow).problem
    with place.start("worker", "--queue", "gpu") as worker:
        worker.until(lambda line: "takes runs from gpu" in line)
        assert place.run(*words).code == nobody.code, "a worker of another queue"
        on_gpu = place.run(*words, "--queue", "gpu", "--json")
        assert on_gpu.code == 0, on_gpu.err
        also = place.run(*flow, "--queue", "gpu", "--json")
        assert also.code == 0, also.err
        worker.signal(signal.SIGKILL)
        worker.end()
    assert place.run(*words, "--queue", "gpu").code == nobody.code, "a dead worker"
    assert set(place.run_ids()) == {on_gpu.data["run_id"], also.data["run_id"]}


def test_a_detached_run_is_left_to_others(tmp_path: Path) -> None:
    """Catches a command that waits for the run, or that takes a server which is idle for none."""
    place = Place(tmp_path)
    make_folder(tmp_path)
    words = DETACHED
    with place.start("serve", "all") as server:  # idle: its run engine is not at work
        url = server.addresses()["platform"]
        detached = place.run(*words)
        assert detached.code == 0, detached.err
        run_id = detached.out.strip()
        assert f"runs show {run_id}" in detached.err
        with remote(url, place) as client:
            assert client.runs.wait(run_id).state == "completed"
            assert client.runs.show(run_id).queue == "default"
        by_url = place.run(*words, AGENTIC_FLOW_PEERS__PLATFORM_URL=url)
        assert by_url.code == 0, by_url.err
        with remote(url, place) as client:
            assert client.runs.wait(by_url.out.strip()).state == "completed"


def test_a_worker_with_nothing_to_do_is_refused(tmp_path: Path) -> None:
    """Catches a worker that starts and can never take a run."""
    place = Place(tmp_path)
    refused = place.run("worker", AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX="0")
    assert refused.code == 2
    assert "0 places" in refused.problem
