"""Whole runs in every shape that can be asked for: their results, records, and what models were sent."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scripted_team import ANSWER_LINE, GOAL, TRUE_CITATION, make_folder, team
from test_run_over_wires import settings_for

from agentic_flow.client import AsyncClient
from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.swarm.picture import assignments_of, graph_of, graph_text, picture
from agentic_flow.swarm.runs import RunEvent, RunResult, RunStep
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio

Script = Callable[[SeenRequest], Reply]
WORKER = "Your question: "
FINDING = f"{ANSWER_LINE} in tick [{TRUE_CITATION}]."


def quick(request: SeenRequest) -> Reply:
    """The scripted team, with workers that answer at once."""
    return Reply.text(FINDING) if WORKER in request.text else team(request)


class Ran:
    """A run that has ended, its record, and what the model was sent."""

    def __init__(self, result: RunResult, steps: list[RunStep], requests: list[SeenRequest]) -> None:
        self.result = result
        self.steps = steps
        self.requests = requests

    def notes(self, text: str) -> list[str]:
        return [note for note in self.result.notes if text in note]


async def run(place: Path, script: Script = quick, **options: Any) -> Ran:
    events: list[RunEvent] = []
    folder = place / "project"
    if not folder.exists():
        make_folder(place)
    settings = options.pop("settings", {})
    with FakeProvider(script) as provider:
        chosen = settings_for(provider, place / "data", "openai", stream=False, **settings)
        async with AsyncClient(settings=chosen) as client:
            given = {"input": str(folder), "agents": 2, **options}
            result = await client.run(GOAL, on_event=events.append, **given)
            steps = list(await client.runs.steps(result.run_id))
        ran = Ran(result, steps, list(provider.requests))
    ran.result = result
    return ran


async def test_a_lead_reports_for_its_team_and_the_record_shows_the_tree(tmp_path: Path) -> None:
    """Catches nested teams that only exist on paper, and a picture that is not of this run."""
    ran = await run(tmp_path, agents=6, teams=[2])
    assert ran.result.state == "completed", ran.result.error
    assert ran.result.citations[0].label == TRUE_CITATION
    heard = {(edge.speaker, edge.listener) for edge in graph_of(ran.steps).edges}
    assert {("planner", "lead-1"), ("lead-1", "worker-1-1"), ("worker-1-1", "lead-1")} <= heard
    assert {speaker for speaker, listener in heard if listener == "reviewer"} == {"lead-1", "lead-2"}
    drawn = picture(ran.result, ran.steps)
    words = {element.text for element in ElementTree.fromstring(drawn).iter()}
    assert {"lead-2", "worker-2-1", "synthesizer"} <= words
    assert "worker-1-1   worker       hears lead-1" in graph_text(ran.result, ran.steps)


async def test_waves_change_nothing_but_how_many_work_at_once(tmp_path: Path) -> None:
    """Catches a batch size that is ignored, and results that depend on it."""
    waves = await run(tmp_path, topology="mesh", agents=3, batch_size=1)
    spans: dict[str, tuple[float, float]] = {}
    for step in waves.steps:
        if step.agent.startswith("draft-"):
            assert step.started_at_s is not None
            assert step.completed_at_s is not None
            first, last = spans.get(step.agent, (step.started_at_s, step.completed_at_s))
            spans[step.agent] = (min(first, step.started_at_s), max(last, step.completed_at_s))
    ordered = sorted(spans.values())
    assert len(ordered) == 3
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ordered))
    together = await run(tmp_path, topology="mesh", agents=3)
    assert (together.result.answer, together.result.citations) == (
        waves.result.answer,
        waves.result.citations,
    )
    assert waves.notes("vote revise-2: 3 of 3 agree")


async def test_a_mesh_that_does_not_agree_goes_on_to_its_last_round(tmp_path: Path) -> None:
    """Catches a vote by the number of answers instead of by what they say."""
    claims = iter([f"The kettle boils [kettle.py:{n}-{n}]." for n in (1, 3, 4, 6, 7, 8) * 9])

    def script(request: SeenRequest) -> Reply:
        return Reply.text(next(claims)) if WORKER in request.text else team(request)

    ran = await run(tmp_path, script, topology="mesh", agents=3, rounds_max=3, quorum=3)
    assert [note for note in ran.result.notes if note.startswith("vote revise-")][-1].startswith(
        "vote revise-3"
    )


async def test_a_pipeline_hands_its_work_from_persona_to_persona(tmp_path: Path) -> None:
    """Catches stages that all have the same persona, or do not see what was handed over."""
    ran = await run(
        tmp_path,
        topology="pipeline",
        stages=[{"agent": "researcher"}, {"agent": "tester", "task": "Find out what is wrong."}],
    )
    assert ran.result.state == "completed", ran.result.error
    stages = [request for request in ran.requests if WORKER in request.text]
    assert ["researcher" in stages[0].system, "tester" in stages[1].system] == [True, True]
    assert "Find out what is wrong." in stages[1].text
    assert "<findings" in stages[1].text


async def test_an_adaptive_team_says_why_it_changed(tmp_path: Path) -> None:
    """Catches a change that leaves no trace in the notes or the record."""

    def script(request: SeenRequest) -> Reply:
        if "Claims with the lines they cite" in request.last_text:
            first = "<findings" not in "".join(seen)
            numbers = re.findall(r"^Claim (\d+):", request.last_text, re.MULTILINE)
            return Reply.text(
                json.dumps({"verdicts": [{"claim": int(n), "supported": not first} for n in numbers]})
            )
        if WORKER in request.text:
            seen.append(request.text)
        return quick(request)

    seen: list[str] = []
    ran = await run(tmp_path, script, topology="adaptive")
    assert ran.result.state == "completed", ran.result.error
    (note,) = ran.notes("the team changed to mesh")
    assert "the review rejected 2 and kept 0" in note
    assert any(a.key.startswith("turn2-revise-2") for a in assignments_of(ran.steps))
    assert "changed to mesh: the review rejected" in graph_text(ran.result, ran.steps)


async def test_a_majority_of_reviewers_decides(tmp_path: Path) -> None:
    """Catches one reviewer that overrules two."""

    def script(request: SeenRequest) -> Reply:
        if "Claims with the lines they cite" in request.last_text:
            numbers = re.findall(r"^Claim (\d+):", request.last_text, re.MULTILINE)
            loud = next(reviews) == 0
            return Reply.text(
                json.dumps({"verdicts": [{"claim": int(n), "supported": not loud} for n in numbers]})
            )
        return quick(request)

    reviews = iter(range(9))
    ran = await run(tmp_path, script, reviewers=3)
    assert ran.result.state == "completed", ran.result.error
    assert ran.result.citations
    assert len([agent for agent in ran.result.agents if agent.role == "reviewer"]) == 3


async def test_ten_thousand_tasks_are_bounded(tmp_path: Path) -> None:
    """Catches a confused planner that starts ten thousand agents, or is cut without a word."""

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" in request.last_text:
            return Reply.text(json.dumps({"tasks": [{"question": f"q{i}"} for i in range(10_000)]}))
        return quick(request)

    ran = await run(tmp_path, script)
    assert ran.result.state == "completed"
    assert ran.notes("the plan has 10000 tasks and 2 can be worked on")
    assert len([agent for agent in ran.result.agents if agent.role == "worker"]) == 2


async def test_a_team_that_says_nothing_has_failed(tmp_path: Path) -> None:
    """Catches a completed run whose agents did nothing."""

    def script(request: SeenRequest) -> Reply:
        return Reply.text(" \n") if WORKER in request.text else team(request)

    ran = await run(tmp_path, script)
    assert ran.result.state == "failed"
    assert ran.result.error is not None
    assert "nothing" in ran.result.error["detail"] or "no usable answer" in ran.result.error["detail"]


# ---- acceptance ------------------------------------------------------------------------------------------


async def test_an_answer_that_is_not_accepted_is_a_failed_run(tmp_path: Path) -> None:
    """Catches criteria as decoration, a refused answer that is lost, and a cost that memory does not know."""
    unmet = [
        {"kind": "contains", "text": "quantum"},
        {"kind": "min_citations", "n": 99},
        {"kind": "command", "argv": ["true"]},
    ]
    met = [{"kind": "cites", "path": "kettle.*"}, {"kind": "max_words", "n": 500}]
    ran = await run(tmp_path, acceptance=[*unmet, *met])
    assert ran.result.state == "failed"
    assert ran.result.error is not None
    assert ran.result.error["code"] == "not_accepted"
    for named in ("contains 'quantum'", "min_citations 99", "command 'true'"):
        assert named in ran.result.error["detail"]
    assert [entry.met for entry in ran.result.acceptance] == [False, False, False, True, True]
    assert ANSWER_LINE in ran.result.answer
    assert ran.result.citations
    with FakeProvider(quick) as provider:
        settings = settings_for(provider, tmp_path / "data", "openai", stream=False)
        async with AsyncClient(settings=settings) as client:
            kept = await client.memory.trajectory(ran.result.run_id)
    assert kept.outcome == "failed"
    assert kept.usage["input_tokens"] == ran.result.usage.input_tokens > 0
    accepted = await run(tmp_path, acceptance=met)
    assert accepted.result.state == "completed"


async def test_a_question_about_the_answer_is_put_to_the_reviewer(tmp_path: Path) -> None:
    """Catches a judgement that is not asked for, or that is not heeded."""

    def script(request: SeenRequest) -> Reply:
        if "One claim about the team's answer" in request.last_text:
            supported = "listeners" in request.last_text and "is it short" not in request.last_text
            verdict = {"claim": 1, "supported": supported, "reason": "read it"}
            return Reply.text(json.dumps({"verdicts": [verdict]}))
        return quick(request)

    good = await run(tmp_path, script, acceptance=[{"kind": "question", "text": "says who is told"}])
    assert good.result.state == "completed", good.result.error
    bad = await run(tmp_path, script, acceptance=[{"kind": "question", "text": "is it short"}])
    assert bad.result.state == "failed"
    assert "question 'is it short': read it" in (bad.result.error or {})["detail"]


# ---- limits, roles, what is refused ----------------------------------------------------------------------


async def test_a_deadline_ends_the_run(tmp_path: Path) -> None:
    """Catches a deadline that nobody keeps."""
    ran = await run(tmp_path, lambda _: Reply.broken("hang"), deadline_s=1.0)
    assert ran.result.state == "failed"
    assert (ran.result.error or {})["code"] == "deadline_exceeded"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "topology": ({"topology": "tree"}, "'tree'"),
    "tool": ({"roles": {"worker": {"tools": ["file_raed"]}}}, "'file_raed'"),
    "agent": ({"roles": {"worker": {"agent": "reseacher"}}}, "'reseacher'"),
    "role": ({"roles": {"king": {"model": "x"}}}, "king"),
    "stage": ({"topology": "pipeline", "stages": [{"agent": "nobody"}]}, "'nobody'"),
    "no stages": ({"topology": "pipeline"}, "0 stages"),
    "teams of a star": ({"topology": "star", "teams": [2]}, "'star'"),
    "too few agents": ({"agents": 3, "teams": [2]}, "too few"),
    "reviewers of a star": ({"topology": "star", "reviewers": 2}, "hub"),
    "quorum": ({"quorum": 3, "reviewers": 2}, "quorum of 3"),
    "steps": ({"steps_max": 10_000}, "swarm.steps_max"),
    "deadline": ({"deadline_s": 1e6}, "swarm.run_timeout_s"),
    "criterion": ({"acceptance": [{"kind": "nice"}]}, "acceptance"),
}


async def test_what_cannot_be_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    """Catches a typing error that is silently ignored, and one that costs a model call."""
    folder = make_folder(tmp_path)
    with FakeProvider(quick) as provider:
        settings = settings_for(provider, tmp_path / "data", "openai", stream=False)
        async with AsyncClient(settings=settings) as client:
            for what, (options, said) in REFUSED.items():
                with pytest.raises(AgenticFlowError) as caught:
                    await client.run(GOAL, input=str(folder), **options)
                assert caught.value.exit_code in (2, 4), what
                assert said in caught.value.message, (what, caught.value.message)
            assert await client.runs.list() == []
            with pytest.raises(InvalidInput) as question:
                await client.run(GOAL, model="extractive", acceptance=[{"kind": "question", "text": "x"}])
            assert "judges nothing" in question.value.message
        assert provider.requests == []


async def test_each_role_has_its_own_model_and_tools(tmp_path: Path) -> None:
    """Catches one model for everybody, and tools that a role was not given."""
    roles = {"worker": {"tools": ["file_read"]}, "reviewer": {"model": "openai:strict"}}
    ran = await run(tmp_path, roles=roles)
    assert ran.result.state == "completed", ran.result.error
    for request in ran.requests:
        review = "Claims with the lines" in request.last_text
        assert request.model == ("strict" if review else "some-model")
        if WORKER in request.text:
            assert "file_search" not in str(request.tools)
            assert "file_read" in str(request.tools)


# ---- delegation and the blackboard -----------------------------------------------------------------------


def calls(name: str, **arguments: Any) -> Reply:
    return Reply.tool_calls([{"name": name, "arguments": arguments}])


def turns(request: SeenRequest) -> int:
    return sum(1 for message in request.messages if message.get("role") == "assistant")


async def test_an_agent_asks_another_role_and_the_question_cannot_go_round(tmp_path: Path) -> None:
    """Catches delegation without end, without account, and a refusal that the model cannot read."""

    def script(request: SeenRequest) -> Reply:
        if WORKER not in request.text:
            return team(request)
        if "Your question: What is the limit?" in request.text:
            if turns(request) == 0:  # the one who is asked tries to pass the question on
                return calls("delegate", role="worker", question="what is the LIMIT")
            return Reply.text("The limit is 96 [kettle.py:1-1].")
        if turns(request) == 0:
            return calls("delegate", role="worker", question="What is the limit?")
        return Reply.text(f"{FINDING} The limit is set [kettle.py:1-1].")

    tools = ["file_read", "delegate"]
    ran = await run(tmp_path, script, agents=1, roles={"worker": {"tools": tools}})
    assert ran.result.state == "completed", ran.result.error
    assert (ran.result.usage.delegations, ran.result.usage.delegation_depth) == (1, 1)
    assert [agent.name for agent in ran.result.agents if "-ask-" in agent.name] == ["worker-1-ask-1"]
    answers = "".join(str(request.body) for request in ran.requests)
    assert "would go round in a circle" in answers
    assert "The limit is 96" in answers
    assert ("worker-1-ask-1", "worker-1") in {(e.speaker, e.listener) for e in graph_of(ran.steps).edges}
    assert ran.result.usage.model_calls == sum(1 for step in ran.steps if step.name == "model")


async def test_a_handed_over_task_ends_with_the_other_s_answer(tmp_path: Path) -> None:
    """Catches a hand-off after which the first agent talks on."""

    def script(request: SeenRequest) -> Reply:
        if "Do it for me" in request.text and "Your question: Do it for me" in request.text:
            return Reply.text(FINDING)
        if WORKER in request.text:
            assert turns(request) == 0, "the agent was asked again after it handed over"
            return calls("handoff", role="worker", question="Do it for me.")
        return team(request)

    ran = await run(tmp_path, script, agents=1, roles={"worker": {"tools": ["handoff"]}})
    assert ran.result.state == "completed", ran.result.error
    assert ran.result.citations[0].label == TRUE_CITATION


async def test_peers_share_a_board_and_spokes_have_none(tmp_path: Path) -> None:
    """Catches a lost update between peers, and a board that lets spokes speak to each other."""

    def script(request: SeenRequest) -> Reply:
        if WORKER not in request.text:
            return team(request)
        done = turns(request)
        if "board_write" not in str(request.tools):
            return Reply.text(FINDING)
        if done == 0:
            return calls("board_write", key="limit", value="96", expected_version=0)
        if done == 1:
            return calls("board_read", key="limit")
        return calls("board_list") if done == 2 else Reply.text(FINDING)

    ran = await run(tmp_path, script, topology="mesh", batch_size=1, board="topology")
    assert ran.result.state == "completed", ran.result.error
    writes = [step.output for step in ran.steps if step.name == "tool:board_write" and step.output]
    assert [output["is_error"] for output in writes] == [False, True, True, True]
    assert "is at version 1, not at 0" in str(writes[1])
    reads = [step.output for step in ran.steps if step.name == "tool:board_read" and step.output]
    assert {(r["content"]["value"], r["content"]["author"]) for r in reads} == {("96", "peer-1")}
    star = await run(tmp_path, script, topology="star", board="topology")
    spokes = [request for request in star.requests if WORKER in request.text]
    assert spokes
    assert all("board_" not in str(request.tools) for request in spokes)
