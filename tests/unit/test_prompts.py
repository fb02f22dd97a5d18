"""Prompts and the reading of structured answers."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.prompts import QUESTION_CHARS_MAX, parse_verdicts, read_plan, split_goal
from agentic_flow.swarm.topology import Task


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


def questions(text: str, tasks_max: int) -> tuple[str, ...]:
    return tuple(task.question for task in read_plan(text, tasks_max).tasks)


def test_plans_are_found_in_prose_and_fences() -> None:
    """Catches a planner whose JSON is wrapped, partly malformed, or longer than the team."""
    tasks = '[{"title": "x", "question": "q1 {a}"}, "q2", 3, {"question": ""}]'
    text = f'Sure {{not json}}\n```json\n{{"tasks": {tasks}}}\n```'
    assert questions(text, 5) == ("q1 {a}", "q2")
    assert questions(text, 1) == ("q1 {a}",)
    assert questions("no plan", 3) == ()


def test_a_confused_plan_is_bounded_and_its_faults_are_named() -> None:
    """Catches ten thousand tasks, repeated and empty ones that are worked on, or dropped without a word."""
    many = read_plan(orjson.dumps({"tasks": [{"question": f"q{i}"} for i in range(10_000)]}).decode(), 4)
    assert [task.question for task in many.tasks] == ["q0", "q1", "q2", "q3"]
    assert many.notes == ("the plan has 10000 tasks and 4 can be worked on: 9996 were left out",)
    odd = read_plan(orjson.dumps({"tasks": ["q", "q", "", {"x": 1}, None, "y" * 99_999]}).decode(), 4)
    assert [len(task.question) for task in odd.tasks] == [1, QUESTION_CHARS_MAX]
    assert any("twice" in note for note in odd.notes)
    assert any("3 task(s)" in note for note in odd.notes)
    assert "no tasks" in read_plan('{"tasks": "many"}', 4).notes[0]


def test_needs_between_tasks_follow_the_tasks() -> None:
    """Catches a need that points at another task after repeated and empty ones were left out."""
    tasks = [
        {"question": "a"},
        {"question": ""},
        {"question": "a"},
        {"question": "b", "after": [3, 4, 9, "x", True, 2]},
        {"question": "c", "after": 1},
    ]
    assert read_plan(orjson.dumps({"tasks": tasks}).decode(), 9).tasks == (
        Task("a"),
        Task("b", (1,)),
        Task("c"),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["question", "after", "title"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=20), st.integers(1, 5))
def test_whatever_the_planner_says_is_a_plan_within_bounds(tasks: list[object], tasks_max: int) -> None:
    """Catches a plan that is too long, repeats itself, or needs what is not there."""
    plan = read_plan(orjson.dumps({"tasks": tasks}).decode(), tasks_max)
    found = [task.question for task in plan.tasks]
    assert len(found) == len(set(found)) <= tasks_max
    assert all(found)
    for number, task in enumerate(plan.tasks, start=1):
        assert set(task.after) <= set(range(1, len(found) + 1)) - {number}
    assert found or plan.notes


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
    read_plan(text, 4)
    parse_verdicts(text)
