"""`agentic-flow run` and `runs` from outside: real processes, real folders, a provider on a real socket."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from cli_process import Done, Place
from scripted_team import ANSWER_LINE, FILES, GOAL, TRUE_CITATION, make_folder, team

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

PROMISED = {"run_id", "state", "model", "answer", "citations", "usage", "agents"}
BESIDE = {
    "acceptance",
    "artifacts",
    "goal",
    "topology",
    "ingest",
    "memory",
    "notes",
    "error",
    "created_at_s",
    "updated_at_s",
    "workflow",
    "queue",
    "priority",
    "deadline_at_s",
    "retry_of",
    "after",
}
QUESTION = "What switches the kettle off when the temperature reaches the limit?"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def with_provider(tmp_path: Path, provider: FakeProvider, **variables: str) -> Place:
    return Place(
        tmp_path,
        OPENAI_BASE_URL=provider.openai_url,
        OPENAI_API_KEY="test-key",
        AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
        AGENTIC_FLOW_GATEWAY__BACKOFF_S="0.01",
        **variables,
    )


def assert_quotes_are_the_files(citations: list[dict[str, Any]], folder: Path) -> None:
    assert citations
    for citation in citations:
        assert set(citation) == {"path", "line_start", "line_end", "quote"}
        lines = (folder / citation["path"]).read_text("utf-8").splitlines()
        assert 1 <= citation["line_start"] <= citation["line_end"] <= len(lines)
        assert citation["quote"] == "\n".join(lines[citation["line_start"] - 1 : citation["line_end"]])


def test_an_answer_its_evidence_and_the_table(place: Place, folder: Path) -> None:
    """Catches output without answer, evidence or table, colour codes in a pipe, and logs among the data."""
    done = place.run("run", QUESTION, "--input", folder)
    assert done.code == 0, done.err
    answer, evidence, table = done.out.partition("\nEvidence\n")
    assert answer.startswith("Answered by the extractive model")
    assert evidence
    assert "kettle.py:" in table
    header = next(line for line in table.splitlines() if line.startswith("agent "))
    assert header.split() == ["agent", "role", "state", "steps", "tool", "calls", "tokens", "cost", "time"]
    assert "read 3 files" in table
    assert "\x1b" not in done.out + done.err
    assert '"event"' not in done.out


def test_json_is_one_object_with_true_citations(place: Place, folder: Path) -> None:
    """Catches a renamed key, talk on stdout, and a quote that is not what the file says."""
    done = place.run("run", QUESTION, "--input", folder, "--json")
    assert done.code == 0, done.err
    assert set(done.data) == PROMISED | BESIDE
    assert done.data["state"] == "completed"
    assert done.data["model"] == "extractive"
    assert_quotes_are_the_files(done.data["citations"], folder)
    assert {"input_tokens", "output_tokens", "cost_usd", "time_s", "tool_calls"} <= set(done.data["usage"])
    assert {"name", "role", "state", "steps", "usage"} <= set(done.data["agents"][0])


def test_a_generative_team_by_environment_alone(tmp_path: Path, folder: Path) -> None:
    """Catches vendors' variables that do not reach the gateway, and citations that nobody checked."""
    with FakeProvider(team) as provider:
        done = with_provider(tmp_path, provider).run(
            "run", GOAL, "--input", folder, "--agents", "2", "--json"
        )
        assert provider.refused == []
    assert done.code == 0, done.err
    assert ANSWER_LINE in done.data["answer"]
    first = done.data["citations"][0]
    assert f"{first['path']}:{first['line_start']}-{first['line_end']}" == TRUE_CITATION
    assert_quotes_are_the_files(done.data["citations"], folder)


def test_runs_are_listed_shown_and_refused_what_makes_no_sense(place: Place, folder: Path) -> None:
    """Catches a run that cannot be found again, and a cancel or resume of a finished run that says yes."""
    made = place.run("run", QUESTION, "--input", folder, "--agents", "1", "--json").data
    (listed,) = place.run("runs", "list", "--json").data
    assert listed["run_id"] == made["run_id"]
    shown = place.run("runs", "show", made["run_id"], "--steps", "--json").data
    assert {key: shown[key] for key in PROMISED} == {key: made[key] for key in PROMISED}
    names = [step["name"] for step in shown["steps"]]
    assert "model" in names
    assert "tool:memory_search" in names
    assert place.run("runs", "list", "--state", "failed", "--json").data == []
    for verb in ("resume", "cancel"):
        refused = place.run("runs", verb, made["run_id"])
        assert refused.code == 5
        assert "completed" in refused.problem
    missing = place.run("runs", "show", "run-of-nobody")
    assert missing.code == 4
    assert "'run-of-nobody'" in missing.problem


def test_ctrl_c_cancels_and_resume_goes_on(tmp_path: Path, folder: Path) -> None:
    """Catches Ctrl-C that leaves a run going, loses it, or pays recorded calls again on resume."""
    first_worker_call = Event()
    goes_on = Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text or goes_on.is_set():
            return team(request)
        first_worker_call.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = with_provider(tmp_path, provider)
        with place.start("run", GOAL, "--input", folder, "--agents", "2", "--json") as process:
            assert first_worker_call.wait(60)
            process.signal(signal.SIGINT)
            done = process.end()
        assert done.code == 130, done.err
        assert done.data["state"] == "cancelled"
        assert "was cancelled" in done.problem
        planned = [r for r in provider.requests if "Split it into at most" in r.last_text]
        assert len(planned) == 1
        goes_on.set()
        resumed = place.run("runs", "resume", done.data["run_id"], "--json")
        assert resumed.code == 0, resumed.err
        assert resumed.data["state"] == "completed"
        assert resumed.data["run_id"] == done.data["run_id"]
        planned = [r for r in provider.requests if "Split it into at most" in r.last_text]
        assert len(planned) == 1


def test_a_run_is_cancelled_from_another_process(tmp_path: Path, folder: Path) -> None:
    """Catches a cancel that only reaches runs of its own process."""
    working = Event()

    def script(request: SeenRequest) -> Reply:
        working.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        place = with_provider(tmp_path, provider)
        with place.start("run", GOAL, "--input", folder, "--json") as process:
            assert working.wait(60)
            (run_id,) = place.run_ids()
            cancelled = place.run("runs", "cancel", run_id, "--json")
            assert cancelled.data == {"run_id": run_id, "state": "cancelled"}
            done = process.end()
    assert done.code == 130
    assert done.data["state"] == "cancelled"


def _unknown_model(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, "--model", "gpt-of-nobody")


def _missing_path(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder / "nowhere")


def _malformed_agent(place: Place, folder: Path) -> Done:
    agents = place.folder / ".claude" / "agents"
    agents.mkdir(parents=True)
    (agents / "researcher.md").write_text("---\nname: researcher\ntools: [Raed]\n---\nprompt\n", "utf-8")
    return place.run("run", QUESTION, "--input", folder)


def _unknown_setting(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, AGENTIC_FLOW_GATEWAY__MODLE="x")


def _malformed_configuration(place: Place, folder: Path) -> Done:
    (place.folder / "agentic-flow.toml").write_text("[swarm\n", "utf-8")
    return place.run("run", QUESTION, "--input", folder)


def _budget(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, "--budget-usd", "-1")


def _topology(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, "--topology", "tree")


def _agents(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, "--agents", "0")


def _model_without_key(place: Place, folder: Path) -> Done:
    return place.run("run", QUESTION, "--input", folder, "--model", "anthropic:claude-x")


@pytest.mark.parametrize(
    ("attempt", "told", "code"),
    [
        (_missing_path, "nowhere'", 2),
        (_unknown_model, "'gpt-of-nobody'", 2),
        (_model_without_key, "anthropic", 2),
        (_malformed_agent, "researcher.md", 2),
        (_unknown_setting, "AGENTIC_FLOW_GATEWAY__MODLE", 2),
        (_malformed_configuration, "agentic-flow.toml", 2),
        (_budget, "budget_usd -1", 2),
        (_topology, "tree", 2),
        (_agents, "0", 2),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    place: Place, folder: Path, attempt: Callable[[Place, Path], Done], told: str, code: int
) -> None:
    """Catches bad input that ends in a traceback, a vague line, success, or a half-written run."""
    refused = attempt(place, folder)
    assert refused.code == code, refused.err
    assert told in refused.problem
    assert "hint: " in refused.err
    assert refused.out == ""
    if (place.data_dir / "runs").exists():
        assert place.run_ids() == []


def test_a_wrong_key_fails_the_run_at_once(tmp_path: Path, folder: Path) -> None:
    """Catches a wrong key that is tried again and again, or a run that claims to have worked."""
    with FakeProvider(team, api_key="the-right-key") as provider:
        done = with_provider(tmp_path, provider).run("run", GOAL, "--input", folder, "--json")
    assert done.code == 8, done.err
    assert done.data["state"] == "failed"
    assert done.data["answer"] == ""
    assert "openai" in done.problem
    assert "test-key" not in done.out + done.err


def test_files_that_cannot_be_read_are_counted(place: Place, folder: Path) -> None:
    """Catches a folder whose one odd file stops the run, eats the memory, or goes unmentioned."""
    with (folder / "huge.log").open("wb") as huge:
        huge.truncate(200 * 1024 * 1024)  # sparse: it only claims to be that large
    (folder / "picture.bin").write_bytes(b"\0\1\2\3" * 100)
    locked = folder / "locked.py"
    locked.write_text("SECRET = 1\n", "utf-8")
    locked.chmod(0)
    done = place.run("run", QUESTION, "--input", folder, "--json")
    assert done.code == 0, done.err
    read = done.data["ingest"]
    assert read["skipped_too_large"] == 1
    assert read["skipped_binary"] == 1
    root = os.geteuid() == 0  # may read everything
    assert read["skipped_unreadable"] == (0 if root else 1)
    assert read["added"] == len(FILES) + (1 if root else 0)


def test_an_unchanged_folder_is_not_read_again(place: Place, folder: Path) -> None:
    """Catches ingestion that starts from nothing each time, or that misses a change."""
    assert place.run("run", QUESTION, "--input", folder, "--json").data["ingest"]["added"] == 3
    (folder / "kettle.py").write_text(FILES["kettle.py"] + "\n# descaled every spring\n", "utf-8")
    again = place.run("run", "When is it descaled?", "--input", folder, "--json").data
    assert (again["ingest"]["unchanged"], again["ingest"]["changed"]) == (2, 1)
    assert_quotes_are_the_files(again["citations"], folder)


def test_the_familiar_variables_shape_a_run(place: Place, folder: Path) -> None:
    """Catches a variable of the inventory that is accepted and then has no effect on who works, and when."""
    wanted = {"SWARM_TOPOLOGY": "mesh", "MAX_AGENTS": "3"}

    def together(**more: str) -> tuple[str, set[str], int]:
        """Topology, workers, and how many of them were begun at once at most."""
        done = place.run("run", QUESTION, "--input", folder, "--json", **wanted, **more)
        assert done.code == 0, done.err
        shown = place.run("swarm", "watch", done.data["run_id"], "--json")
        events = [json.loads(line) for line in shown.out.splitlines()]
        at_work, most = set[str](), 0
        for event in events:
            if event.get("kind") == "agent_started":
                at_work.add(event["agent"])
                most = max(most, len(at_work))
            elif event.get("kind") == "agent_finished":
                at_work.discard(event["agent"])
        agents = {agent["name"] for agent in done.data["agents"] if agent["role"] == "worker"}
        return done.data["topology"], agents, most

    workers = {"peer-1", "peer-2", "peer-3"}
    assert together() == ("mesh", workers, 3)
    assert together(BATCH_SIZE="2") == ("mesh", workers, 2)
    assert together(ENABLE_PARALLEL_EXECUTION="false") == ("mesh", workers, 1)
