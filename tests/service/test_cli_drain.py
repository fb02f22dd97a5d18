"""SIGTERM to `agentic-flow serve` in the middle of runs: it finishes them, or others go on with them."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import signal
import urllib.error
from collections import Counter
from pathlib import Path
from threading import Event

from cli_process import Place
from scripted_team import GOAL, make_folder, team
from test_cli_serve import QUESTION, get, remote

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest


def place_in(folder: Path, provider: FakeProvider, drain_s: float) -> Place:
    """Nobody's lease runs out here while a test lasts."""
    return Place(
        folder,
        OPENAI_BASE_URL=provider.openai_url,
        OPENAI_API_KEY="test-key",
        AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
        AGENTIC_FLOW_SWARM__LEASE_S="300",
        AGENTIC_FLOW_SWARM__DRAIN_S=str(drain_s),
    )


def asked_of(request: SeenRequest) -> str:
    """What makes two model calls the same."""
    return json.dumps([request.messages, request.body.get("tools")], sort_keys=True)


def test_another_server_goes_on_at_once(tmp_path: Path) -> None:
    """Catches runs that wait for a lease of 300 s, and a step that is done again though it was recorded."""
    folder = make_folder(tmp_path)
    working, goes_on = Event(), Event()
    in_flight: list[str] = []

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text or goes_on.is_set():
            return team(request)
        in_flight.append(asked_of(request))
        if len(in_flight) == 2:
            working.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = place_in(tmp_path, provider, drain_s=0.1)
        with (
            place.start("serve", "all", AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX="1") as leaving,
            place.start("serve", "all") as other,
            remote(other.addresses()["platform"], place) as client,
        ):
            with remote(leaving.addresses()["platform"], place) as first:
                run = first.runs.submit(GOAL, input=folder, agents=2)
                assert working.wait(60)
                waiting = first.runs.submit(QUESTION, input=folder, agents=1, model="extractive")
            goes_on.set()
            leaving.signal(signal.SIGTERM)
            left = leaving.end()
            assert left.code == 0, left.err
            assert "Traceback" not in left.err
            assert client.runs.wait(run).state == "completed"
            assert client.runs.wait(waiting).state == "completed"
            events = get(f"{client.settings.peers.platform_url}/v1/runs/{run}/events")[1]
            other.signal(signal.SIGTERM)
            assert other.end().code == 0
        calls = Counter(map(asked_of, provider.requests))
    assert events.count("event: run_taken_over") == 1
    assert {asked for asked, count in calls.items() if count > 1} <= set(in_flight)
    assert max(calls.values()) <= 2


def test_a_server_finishes_what_it_can(tmp_path: Path) -> None:
    """Catches a server that cuts its runs off at SIGTERM, or takes new ones while it finishes."""
    folder = make_folder(tmp_path)
    working, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" not in request.last_text:
            working.set()
            goes_on.wait(60)
        return team(request)

    with FakeProvider(script) as provider:
        place = place_in(tmp_path, provider, drain_s=60)
        with place.start("serve", "all") as server:
            with remote(server.addresses()["platform"], place) as client:
                url = client.settings.peers.platform_url
                run = client.runs.submit(GOAL, input=folder, agents=2)
            assert working.wait(60)
            server.signal(signal.SIGTERM)
            while is_listening(f"{url}/health/live"):
                pass
            goes_on.set()
            ended = server.end()
            assert ended.code == 0, ended.err
            assert "Traceback" not in ended.err
    shown = place.run("runs", "show", run, "--json").data
    assert shown["state"] == "completed", shown["error"]


def is_listening(url: str) -> bool:
    """Whether anybody answers there."""
    try:
        get(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
