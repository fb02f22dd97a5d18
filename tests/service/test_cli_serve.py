"""`agentic-flow serve` from outside: ports, health, keys, refusals, draining, and runs that outlive it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from cli_process import Place
from scripted_team import GOAL, make_folder, team

from agentic_flow.client import AsyncClient, Client
from agentic_flow.core.settings import Settings, load
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

QUESTION = "What switches the kettle off when the temperature reaches the limit?"


def get(url: str, key: str | None = None) -> tuple[int, str]:
    """Status and body."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def settings_beside(place: Place) -> Settings:
    """Those of a client, without the developer's own."""
    return load(
        {"data_dir": str(place.folder / "client")},
        environ={},
        directory=place.folder,
        user_config=place.folder / "none.toml",
    ).settings


def remote(url: str, place: Place, token: str | None = None) -> Client:
    """A client of a server."""
    return Client(url, token=token, settings=settings_beside(place))


async def check_events_go_on_anywhere(url: str, place: Place, run_id: str) -> None:
    """The stream over HTTP, also from its last event on, which must not wait for another."""
    async with AsyncClient(url, settings=settings_beside(place)) as client, asyncio.timeout(30):
        whole = [event async for event in client.runs.events(run_id) if event.kind != "ingest_progress"]
        assert [event.sequence for event in whole] == list(range(1, len(whole) + 1))
        for after in (1, len(whole) - 1, len(whole)):
            assert [event async for event in client.runs.events(run_id, after=after)] == whole[after:]


def test_three_services_answer_as_the_embedded_client_does(tmp_path: Path) -> None:
    """Catches a service without health or metrics, a run that differs over HTTP, and an unclean end."""
    place = Place(tmp_path)
    folder = make_folder(tmp_path)
    embedded = place.run("run", QUESTION, "--input", folder, "--json", "--data-dir", tmp_path / "other")
    with place.start("serve", "all") as server:
        urls = server.addresses()
        assert set(urls) == {"platform", "agentdb", "swarm"}
        for url in urls.values():
            assert get(f"{url}/health/live")[0] == 200
            while get(f"{url}/health/ready")[0] != 200:  # within two seconds a busy machine may not know
                time.sleep(0.05)
            status, metrics = get(f"{url}/metrics")
            assert status == 200
            assert "# TYPE" in metrics
        assert sum("owner key" in line for line in server.err) == 1
        events: list[str] = []
        with remote(urls["platform"], place) as client:
            result = client.run(QUESTION, input=folder, on_event=lambda event: events.append(event.kind))
            assert [run.run_id for run in client.runs.list()] == [result.run_id]
        assert events[-1] == "run_finished"
        asyncio.run(check_events_go_on_anywhere(urls["swarm"], place, result.run_id))
        assert result.state == "completed"
        got = [citation.model_dump() for citation in result.citations]
        assert got == embedded.data["citations"]
        server.signal(signal.SIGTERM)
        done = server.end()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    with place.start("serve", "agentdb") as again:
        again.addresses(1)
        again.signal(signal.SIGTERM)
        assert "owner key" not in again.end().err


def test_keys_are_demanded_where_required(tmp_path: Path) -> None:
    """Catches a server that lets anybody in, or that refuses the owner's own key."""
    place = Place(tmp_path, AGENTIC_FLOW_AUTH__REQUIRED="true")
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        (line,) = [line for line in server.err if "owner key" in line]
        key = line.split()[-1]
        assert get(f"{url}/v1/runs")[0] == 401
        assert get(f"{url}/v1/runs", "af_0000_not-a-key-at-all-really")[0] == 401
        assert get(f"{url}/v1/runs", key)[0] == 200
        assert get(f"{url}/health/live")[0] == 200
        server.signal(signal.SIGTERM)
        assert server.end().code == 0


def test_a_taken_port_starts_nothing(tmp_path: Path) -> None:
    """Catches a half-started server, and a first start that burns the owner's key."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = Place(tmp_path)
        refused = place.run("serve", "all", AGENTIC_FLOW_SERVE__AGENTDB_PORT=str(port))
    assert refused.code == 7
    assert str(port) in refused.problem
    assert "owner key" not in refused.err
    assert not place.data_dir.exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["serve", "all", "--host", "0.0.0.0"], 2, "0.0.0.0"),
        (["serve", "mcp"], 2, "platform, agentdb, swarm"),
        (["serve", "federation"], 2, "platform, agentdb, swarm"),
    ],
)
def test_what_is_not_safe_or_not_built_is_refused(
    tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    """Catches an open door to the network, and a service offered that does not exist."""
    place = Place(tmp_path)
    refused = place.run(*words)
    assert refused.code == code
    assert refused.problem
    assert told in refused.err
    assert not place.data_dir.exists()


def test_a_run_of_a_killed_server_goes_on_by_itself(tmp_path: Path) -> None:
    """Catches an accepted run that is lost with its process, and one that needs a hand to go on."""
    folder = make_folder(tmp_path)
    working, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text or goes_on.is_set():
            return team(request)
        working.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
            AGENTIC_FLOW_SWARM__LEASE_S="1",
        )
        with place.start("serve", "all") as server:
            with remote(server.addresses()["platform"], place) as client:
                run_id = client.runs.submit(GOAL, input=folder, agents=2)
            assert working.wait(60)
            server.signal(signal.SIGKILL)
            server.end()
        goes_on.set()
        with place.start("serve", "all") as heir:
            with remote(heir.addresses()["platform"], place) as client:
                result: Any = client.runs.wait(run_id)
            heir.signal(signal.SIGTERM)
            assert heir.end().code == 0
        plans = sum("Split it into at most" in request.last_text for request in provider.requests)
    assert result.state == "completed", result.error
    assert result.citations
    assert plans == 1
