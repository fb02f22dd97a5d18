"""What `serve platform` starts with: no more than model calls need, and what is wrong is said already."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import orjson
import pytest
from cli_process import Done, Place, Process
from scripted_team import GOAL, make_folder, team

from agentic_flow.core.ports import WorkflowRecord
from agentic_flow.swarm.reader import RunReader
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

NOT_FOR_MODEL_CALLS = {
    "aiohttp",
    "faiss",
    "joserfc",
    "numpy",
    "onnxruntime",
    "psycopg",
    "pydantic_ai",
    "pypdf",
    "rich",
    "sqlalchemy",
}
LEASE_S = 5.0
"""Longer than a busy machine stands still: a run that is taken from somebody alive is planned twice."""
TIMEOUT_S = 120.0


def place_of(folder: Path, provider: FakeProvider, **variables: str) -> Place:
    """A place whose default model is the provider's."""
    return Place(
        folder,
        OPENAI_BASE_URL=provider.openai_url,
        OPENAI_API_KEY="test-key",
        AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
        AGENTIC_FLOW_SWARM__LEASE_S=str(LEASE_S),
        **variables,
    )


def call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer's JSON."""
    data = None if body is None else orjson.dumps(body)
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return orjson.loads(answer.read())


def ask_model(url: str) -> str:
    """What the model answers through the gateway."""
    messages = [{"role": "user", "content": "2 + 2?"}]
    answer = call(url, "/v1/chat/completions", {"model": "openai:some-model", "messages": messages})
    return str(answer["choices"][0]["message"]["content"])


def submit(url: str, folder: Path) -> str:
    """A run's id."""
    return str(call(url, "/v1/runs", {"goal": GOAL, "inputs": [str(folder)], "agents": 2})["run_id"])


def ended(find: Callable[[], WorkflowRecord | None]) -> WorkflowRecord:
    """A run's record once it has ended."""
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        record = find()
        if record is not None and record.state in ("completed", "failed", "cancelled"):
            return record
        Event().wait(0.1)  # the store is all there is to look at: nobody may ask the server
    raise AssertionError("it did not end")


def stopped(server: Process) -> Done:
    """The server's end after SIGTERM."""
    server.signal(signal.SIGTERM)
    done = server.end()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return done


def imported(done: Done) -> set[str]:
    """Packages of which a process with PYTHONPROFILEIMPORTTIME imported a module."""
    lines = [line for line in done.err.splitlines() if line.startswith("import time:")]
    names = [line.rpartition("|")[2].strip() for line in lines]
    # A name without a dot may be an attempt that failed; every package that matters has modules.
    return {name.partition(".")[0] for name in names if "." in name}


def test_model_calls_need_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    """Catches an import that makes every gateway pay, in time and memory, for what it never uses."""
    with FakeProvider(lambda _: Reply.text("4")) as provider:
        place = place_of(tmp_path, provider, PYTHONPROFILEIMPORTTIME="1")
        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]
            assert ask_model(url) == "4"
            assert call(url, "/health/ready")["status"] == "ready"
            found = imported(stopped(server))
    assert {"agentic_flow", "uvicorn"} <= found
    assert found & NOT_FOR_MODEL_CALLS == set()


def test_what_is_left_out_at_the_start_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    """Catches a platform without runs, memory or its OpenAPI document, and one that makes them unasked."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        place = place_of(tmp_path, provider, PYTHONPROFILEIMPORTTIME="1")
        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]
            assert not (place.data_dir / "agentdb").exists()
            run_id = submit(url, folder)
            record = ended(lambda: RunReader(None, place.data_dir, lease_s=LEASE_S).get(run_id))
            assert record.state == "completed", record.error
            assert call(url, f"/v1/runs/{run_id}")["citations"]
            assert call(url, "/v1/namespaces")["namespaces"] is not None
            assert "/v1/chat/completions" in call(url, "/openapi.json")["paths"]
            found = imported(stopped(server))
    assert {"numpy", "pydantic_ai"} <= found
    assert "sqlalchemy" not in found


@pytest.mark.parametrize("started", ["after", "before"])
def test_an_unfinished_run_goes_on_without_a_request(tmp_path: Path, started: str) -> None:
    """Catches a platform that leaves the runs of a killed one alone until somebody asks for runs: when it
    starts afterwards, and when it has been there before with nothing to do."""
    folder = make_folder(tmp_path)
    working, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text or goes_on.is_set():
            return team(request)
        working.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = place_of(tmp_path, provider)

        def find() -> WorkflowRecord | None:
            return RunReader(None, place.data_dir, lease_s=LEASE_S).get(run_id)

        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]
            if started == "after":
                run_id = submit(url, folder)
                assert working.wait(TIMEOUT_S)
                server.signal(signal.SIGKILL)
                server.end()
                goes_on.set()
                with place.start("serve", "platform") as heir:
                    record = ended(find)
                    stopped(heir)
            else:
                with place.start("serve", "platform") as heir:
                    heir.addresses(1)
                    run_id = submit(url, folder)
                    assert working.wait(TIMEOUT_S)
                    goes_on.set()
                    server.signal(signal.SIGKILL)
                    server.end()
                    record = ended(find)
                    stopped(heir)
        plans = sum("Split it into at most" in request.last_text for request in provider.requests)
    assert record.state == "completed", record.error
    assert plans == 1


@pytest.mark.parametrize(
    "file", ["agentdb/agentdb.db", "audit.db", "gateway.db", "identity.db", "runs/runs.db"]
)
def test_a_damaged_database_is_said_at_the_start(tmp_path: Path, file: str) -> None:
    """Catches a platform that says it is ready and finds out at the first request that its data is lost."""
    place = Place(tmp_path)
    path = place.data_dir / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is no database, and it is long enough to be read as a page of one" * 100)
    refused = place.run("serve", "platform")
    assert refused.code == 9
    assert path.name in refused.problem
    assert "listens on" not in refused.err


def test_a_broken_setting_of_what_is_made_later_is_said_at_the_start(tmp_path: Path) -> None:
    """Catches a wrong policy of tools that shows itself only when the first agent calls a tool."""
    place = Place(tmp_path)
    missing = tmp_path / "none.toml"
    refused = place.run("serve", "platform", AGENTIC_FLOW_TOOLS__POLICY_FILE=str(missing))
    assert refused.code != 0
    assert str(missing) in refused.problem


def test_a_diagnosis_writes_nothing(tmp_path: Path) -> None:
    """Catches a doctor that makes or changes a database: it may run beside a server, or on a copy."""
    place = Place(tmp_path)
    assert place.run("doctor", "--json").code == 0
    assert not place.data_dir.exists()
    policies = tmp_path / "policies.json"
    policies.write_text('{"aliases": {"fast": "extractive"}}')
    assert place.run("policies", "set", policies, "--reason", "test").code == 0
    before = {path: path.read_bytes() for path in place.data_dir.rglob("*") if path.is_file()}
    checks = {check["name"]: check for check in place.run("doctor", "--json").data["checks"]}
    assert checks["default model"] == {**checks["default model"], "state": "ok", "message": "extractive"}
    assert {path: path.read_bytes() for path in place.data_dir.rglob("*") if path.is_file()} == before
