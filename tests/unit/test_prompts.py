"""Prompts and the reading of structured answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.prompts import parse_plan, parse_verdicts, split_goal


def test_a_goal_is_split_by_its_clauses() -> None:
    """Catches a plan that loses the whole goal or makes tasks of scraps."""
    tasks = split_goal(
        "How does the event loop schedule callbacks, and what wakes it from another thread?", 4
    )
    assert tasks[0].startswith("How does the event loop")
    assert any(task.startswith("what wakes it from another") for task in tasks)
    assert len(split_goal("How? Why? So what?", 4)) <= 2


@given(st.text(min_size=1, max_size=300), st.integers(1, 64))
def test_a_split_respects_its_bounds(goal: str, agents: int) -> None:
    """Catches more tasks than agents, none at all, or the same task twice."""
    tasks = split_goal(goal, agents)
    assert 1 <= len(tasks) <= agents
    assert len(set(tasks)) == len(tasks)


def test_plans_are_found_in_prose_and_fences() -> None:
    """Catches a planner whose JSON is wrapped, partly malformed, or longer than the team."""
    tasks = '[{"title": "x", "question": "q1 {a}"}, "q2", 3, {"question": ""}]'
    text = f'Sure {{not json}}\n```json\n{{"tasks": {tasks}}}\n```'
    assert parse_plan(text, 5) == ("q1 {a}", "q2")
    assert parse_plan(text, 1) == ("q1 {a}",)
    assert parse_plan("no plan", 3) == ()


def test_verdicts_are_read_strictly() -> None:
    """Catches a malformed verdict taken for a rejection, or an answer without any taken for approval."""
    text = (
        '{"verdicts": [{"claim": 1, "supported": false, "reason": "r"}, {"claim": "2", "supported": true}]}'
    )
    assert parse_verdicts(text) == {1: (False, "r")}
    assert parse_verdicts("all fine") is None
    assert parse_verdicts('{"verdicts": []}') is None


@given(st.text(max_size=300))
def test_any_answer_is_survived(text: str) -> None:
    """Catches a crash on an answer that is no JSON at all."""
    parse_plan(text, 4)
    parse_verdicts(text)
