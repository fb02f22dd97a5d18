"""The simulated stream: what chance decides is the same for every memory, and the agent obeys notes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.testing.memory_stream import (
    NoMemory,
    Note,
    act,
    action_of,
    distil,
    judged,
    make_world,
    topic_of,
    walk,
)

WORLD = make_world(3, tasks=120)


def test_a_world_is_its_seed() -> None:
    """Catches chance that comes from elsewhere than the seed: memories would not be compared in pairs."""
    assert make_world(3, tasks=120) == WORLD
    assert make_world(4, tasks=120) != WORLD


def test_the_trap_is_the_rule_of_the_twin() -> None:
    """Catches a world without look-alike rules, in which no memory could do harm."""
    rules = {task.family: task.right for task in WORLD.tasks if task.right is not None}
    assert len(rules) == 12
    assert all(rules[family] != rules[family ^ 1] for family in rules)
    traps = sum(task.preference[0] == rules[task.family ^ 1] for task in WORLD.tasks)
    assert 0.35 < traps / len(WORLD.tasks) < 0.75


def test_a_changed_world_is_the_same_before_the_change() -> None:
    """Catches a change of rules that changes the words or the draws as well."""
    changed = make_world(3, tasks=120, change_at=60)
    assert changed.tasks[:60] == WORLD.tasks[:60]
    assert [task.text for task in changed.tasks] == [task.text for task in WORLD.tasks]
    assert changed.tasks != WORLD.tasks


@given(st.integers(0, 119), st.sampled_from(WORLD.actions), st.booleans())
def test_lessons_say_what_was_done_and_what_it_was_about(row: int, action: str, success: bool) -> None:
    """Catches a distiller whose words do not lead back to the action and the topic, or that keeps details."""
    text = WORLD.tasks[row].text
    lesson = distil(text, action, success)
    assert action_of(lesson.content) == action
    assert topic_of(lesson.content) == topic_of(text)
    assert len(topic_of(text)) == 4
    assert not any(word in lesson.text for word in text.partition(" for ")[2].split())


@given(st.integers(0, 119), st.sampled_from(WORLD.actions))
def test_the_agent_follows_notes_right_or_wrong(row: int, action: str) -> None:
    """Catches an agent that peeks at the truth, or one that no wrong note can harm."""
    task = WORLD.tasks[row]
    tried = act(task, [Note("n", "do", action, topic_of(task.text))])
    assert (tried.action, tried.cited) == (action, ("n",))
    assert tried.success == (action == task.right)
    assert tried.harmed == (task.right is not None and action != task.right)


@given(st.integers(0, 119), st.sampled_from(WORLD.actions))
def test_the_agent_leaves_what_is_advised_against_or_is_about_something_else(row: int, action: str) -> None:
    """Catches warnings that change nothing, and notes on other topics that are followed."""
    task = WORLD.tasks[row]
    warned = act(task, [Note("n", "avoid", action, topic_of(task.text))])
    assert warned.action != action
    assert bool(warned.cited) == (task.preference[0] == action)
    strange = act(task, [Note("n", "do", action, frozenset({"elsewhere"}))])
    assert (strange.action, strange.cited, strange.harmed) == (task.preference[0], (), False)


@settings(max_examples=20)
@given(st.floats(0.0, 0.3))
def test_the_judge_errs_at_its_rate(error_rate: float) -> None:
    """Catches a judge that never errs, or whose errors depend on what is judged."""
    tasks = make_world(9, tasks=2000).tasks
    wrong = sum(not judged(task, True, error_rate) for task in tasks)
    assert wrong == sum(judged(task, False, error_rate) for task in tasks)
    assert abs(wrong / len(tasks) - error_rate) < 0.05


async def test_without_memory_nothing_is_learned() -> None:
    """Catches a stream that gets easier by itself."""
    walked = await walk(make_world(1), NoMemory(), error_rate=0.1)
    half = len(walked.success) // 2
    assert abs(sum(walked.success[:half]) - sum(walked.success[half:])) / half < 0.1
    assert not any(walked.harmed)
