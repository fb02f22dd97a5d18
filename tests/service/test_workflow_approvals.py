"""Questions of runs from outside: asked by a workflow file, answered over HTTP and by commands."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from cli_process import Place, Process
from scripted_team import make_folder

FLOW = """
name: release
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
steps:
  - {id: find, tool: {name: file_find, arguments: {glob: "*.py"}}}
  - id: gate
    needs: [find]
    approval: {question: "Release {{ steps.find.output.entries | count }} files?"}
  - {id: ship, needs: [gate], tool: {name: file_find, arguments: {glob: "k*.py"}}}
outputs:
  shipped: "{{ steps.ship.output.entries | map(attribute='path') | join }} for {{ steps.gate.output.by }}"
"""


def call(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    data = None if body is None else orjson.dumps(body)
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())


def submitted(url: str, folder: Path) -> str:
    status, accepted = call(f"{url}/v1/workflows", {"text": FLOW, "inputs": {"folder": str(folder)}})
    assert status == 202, accepted
    return accepted["run_id"]


def events_of(url: str, run_id: str) -> Generator[Any]:
    """The events of a run as they come, until it has ended."""
    with urllib.request.urlopen(f"{url}/v1/runs/{run_id}/events", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                yield orjson.loads(line.removeprefix(b"data:"))


def event_of(url: str, run_id: str, kind: str) -> Any:
    """The first event of this kind, waited for."""
    with closing(events_of(url, run_id)) as events:
        for event in events:
            if event["kind"] == kind:
                return event
    raise AssertionError(f"the stream ended without {kind!r}")


def platform_of(server: Process) -> str:
    return server.addresses(1)["platform"]


def test_a_question_waits_through_the_death_of_its_server(tmp_path: Path) -> None:
    """Catches a question lost with its process, answers taken twice or wrongly, and a gate that leaks."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    with place.start("serve", "platform") as server:
        url = platform_of(server)
        run_id = submitted(url, folder)
        asked = event_of(url, run_id, "question_asked")
        assert asked["agent"] == "gate"
        assert asked["data"]["options"] == ["approve", "deny"]
        question_id = asked["data"]["id"]
    # Killed by leaving the block. The answer is taken without any server, and read by the next one.
    listed = place.run("runs", "questions", run_id, "--json")
    assert listed.code == 0, listed.err
    (question,) = listed.data
    assert (question["id"], question["state"]) == (question_id, "open")
    assert question["text"].startswith("Release ")
    assert question["text"].endswith(" files?")
    wrong = place.run("runs", "answer", run_id, question_id, "perhaps")
    assert wrong.code == 2, wrong.err
    assert "perhaps" in wrong.problem
    assert place.run("runs", "show", run_id, "--json").data["state"] == "interrupted"
    first = place.run("runs", "answer", run_id, question_id, "approve", "--json")
    assert (first.code, first.data["is_new"]) == (0, True), first.err
    with place.start("serve", "platform") as server:
        url = platform_of(server)
        finished = event_of(url, run_id, "run_finished")
        assert finished["data"] == {"state": "completed", "error": None}
        answers = f"{url}/v1/runs/{run_id}/questions"
        assert call(f"{answers}/{question_id}", {"answer": "approve"})[1]["is_new"] is False
        assert call(f"{answers}/{question_id}", {"answer": "deny"})[0] == 409
        (question,) = call(answers)[1]["questions"]
        assert (question["state"], question["answer"]) == ("answered", "approve")
        by = question["answered_by"]
        assert by
        assert call(f"{url}/v1/runs/{run_id}")[1]["answer"] == f"kettle.py for {by}"


def test_a_denial_ends_the_workflow(tmp_path: Path) -> None:
    """Catches a denied step whose followers run all the same, and answers to what was never asked."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    with place.start("serve", "platform") as server:
        url = platform_of(server)
        run_id = submitted(url, folder)
        question_id = event_of(url, run_id, "question_asked")["data"]["id"]
        answers = f"{url}/v1/runs/{run_id}/questions"
        assert call(f"{answers}/gate.q99", {"answer": "deny"})[0] == 404
        assert call(f"{url}/v1/runs/run-nobody/questions/q1", {"answer": "deny"})[0] == 404
        for body in ({}, {"answer": ""}, {"answer": 3}, {"answer": "maybe"}, []):
            assert call(f"{answers}/{question_id}", body)[0] == 400, body
        assert call(f"{answers}/{question_id}", {"answer": "deny"}) == (
            200,
            {"question_id": question_id, "answer": "deny", "is_new": True},
        )
        finished = event_of(url, run_id, "run_finished")["data"]
        assert finished["state"] == "failed"
        assert finished["error"]["code"] == "not_accepted"
        steps = call(f"{url}/v1/runs/{run_id}")[1]["workflow"]["steps"]
        assert {step["id"]: step["state"] for step in steps} == {
            "find": "completed",
            "gate": "failed",
            "ship": "skipped",
        }


def test_a_paused_run_goes_on_only_when_resumed(tmp_path: Path) -> None:
    """Catches a pause that holds nothing, is told wrongly, or cannot be lifted from outside."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    with place.start("serve", "platform") as server:
        url = platform_of(server)
        run_id = submitted(url, folder)
        question_id = event_of(url, run_id, "question_asked")["data"]["id"]
        run = f"{url}/v1/runs/{run_id}"
        assert call(f"{run}/pause", {}) == (200, {"paused": True})
        assert call(f"{run}/pause", {}) == (200, {"paused": False})
        assert call(f"{run}/questions/{question_id}", {"answer": "approve"})[0] == 200
        assert [r["run_id"] for r in call(f"{url}/v1/runs?state=paused")[1]["runs"]] == [run_id]
        assert call(run)[1]["state"] == "paused"
        assert call(f"{run}/resume", {}) == (200, {"resumed": True})
        finished = event_of(url, run_id, "run_finished")
        assert finished["data"]["state"] == "completed"
        lifted = event_of(url, run_id, "run_unpaused")["sequence"]
        assert event_of(url, run_id, "run_paused")["sequence"] < lifted
        begun = [e for e in events_of(url, run_id) if e["kind"] == "agent_started"]
        starts = [e["sequence"] for e in begun if e["agent"] == "ship"]
        assert len(starts) == 1
        assert lifted < starts[0] < finished["sequence"]
        assert call(f"{run}/pause", {}) == (200, {"paused": False})
        assert call(f"{url}/v1/runs/run-nobody/pause", {})[0] == 404


@pytest.mark.parametrize(
    ("default", "state"), [("approve", "completed"), ("deny", "failed"), (None, "failed")]
)
def test_nobody_answers(tmp_path: Path, default: str | None, state: str) -> None:
    """Catches a time-out that waits on, or goes on without a default as if somebody had approved."""
    place = Place(tmp_path)
    (tmp_path / "flow.yaml").write_text(
        "name: w\nsteps:\n- id: gate\n  timeout_s: 0.05\n  approval: {question: 'Now?'"
        + (f", default: {default}" if default else "")
        + "}\noutputs: {said: '{{ steps.gate.output.answer }} {{ steps.gate.output.timed_out }}'}\n",
        "utf-8",
    )
    done = place.run("workflow", "run", "flow.yaml", "--json")
    assert done.data["state"] == state, done.err
    assert (done.code == 0) == (state == "completed")
    if state == "completed":
        assert done.data["answer"].lower() == "approve true"
    else:
        code = "not_accepted" if default else "deadline_exceeded"
        assert done.data["error"]["code"] == code, done.err
    assert "Now?" in done.err
    assert "runs answer" in done.err
