"""Reflections on failed tries: by a model behind a real gateway or without, kept once, found by task."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import ProviderProtocol
from agentic_flow.core.settings import AgentDBSettings, GatewaySettings
from agentic_flow.gateway.service import Gateway
from agentic_flow.memory.episodes import (
    CHARS_PER_TOKEN,
    CLOSING,
    CRITIQUE_CHARS_MAX,
    NEXT_TRY_CHARS_MAX,
    OPENING,
    Episode,
    Episodes,
    episodes_context,
    mechanical_reflection,
    read_reflection,
    reflect_request,
)
from agentic_flow.memory.records import Trajectory, TrajectoryStep, Verdict
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from attack_corpus import ATTACKS

pytestmark = pytest.mark.anyio

ME = Principal("tenant", "me", frozenset({"*"}))
SETTINGS = AgentDBSettings(embedding_dimension=256)
FAILURE = Verdict(outcome="failure", source="judge")
SUCCESS = Verdict(outcome="success", source="person")
SECRET = "sk-proj-" + "a1B2c3D4e5F6g7H8" * 2


class SetClock(SystemClock):
    """A clock that a test moves."""

    ahead_s = 0.0

    def time_s(self) -> float:
        return super().time_s() + self.ahead_s


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
async def db(tmp_path: Path, clock: SetClock) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path, SETTINGS, clock=clock) as opened:
        yield opened


def tried(name: str, task: str = "Deploy the shop to the test cluster", **more: object) -> Trajectory:
    steps = (
        TrajectoryStep(name="shell", action="helm upgrade shop", error="no such context"),
        TrajectoryStep(name="shell", action="helm upgrade shop", error="no such context"),
        TrajectoryStep(name="shell", action="kubectl config use-context test", observation="switched"),
        TrajectoryStep(name="http", action=f"POST /deploy key {SECRET}", error=f"refused {SECRET}"),
    )
    fields: dict[str, object] = {"steps": steps, "steps_total": len(steps), "outcome": "failed", **more}
    return Trajectory.model_validate({"id": name, "task": task, **fields})


def said(critique: str, next_try: str = "") -> Reply:
    return Reply.text(json.dumps({"critique": critique, "next_try": next_try}))


async def with_model(
    db: AgentDB, replies: Sequence[Reply], trajectory: Trajectory
) -> tuple[Episode | None, int]:
    """The episode that a model's answers make, and how many calls were made."""
    with FakeProvider(list(replies), keyless=True) as fake:
        settings = GatewaySettings.model_validate({"openai": {"base_url": fake.openai_url}})
        async with Gateway(settings) as gateway:
            episodes = Episodes(db, gateway, model="m")
            first = await episodes.reflect(ME, trajectory, FAILURE)
            again = await episodes.reflect(ME, trajectory, FAILURE)
        assert first == again, "reflected on twice"
        return first, len(fake.requests)


async def test_a_model_reflects_once(db: AgentDB) -> None:
    """Catches a second call for what is known, a secret that the model repeated, and a lost reflection."""
    episode, calls = await with_model(db, [said(f"It used {SECRET}.", "Set the context first.")], tried("t1"))
    assert calls == 1
    assert episode is not None
    assert episode.origin == "model"
    assert SECRET not in episode.model_dump_json()
    assert episode.next_try == "Set the context first."
    assert await Episodes(db, None, model=None).recall("tenant", tried("x").task) == [episode]


async def test_a_malformed_reflection_is_asked_for_again(db: AgentDB) -> None:
    """Catches prose that is stored as a reflection, no second try, or endless ones."""
    episode, calls = await with_model(
        db, [Reply.text("Well, it failed."), said("wrong context")], tried("t1")
    )
    assert calls == 2
    assert episode is not None
    assert episode.critique == "wrong context"
    with pytest.raises(ProviderProtocol):
        await with_model(db, [Reply.text("no"), Reply.text("still no")], tried("t2"))
    assert [one.id for one in (await Episodes(db, None, model=None).list_episodes("tenant"))[0]] == ["t1"]


async def test_without_a_model_it_says_what_happened(db: AgentDB) -> None:
    """Catches keyless reflections that say nothing, invent something, or keep a secret."""
    episode = await Episodes(db, None, model=None).reflect(ME, tried("t1", error="deploy failed"), FAILURE)
    assert episode is not None
    assert episode.origin == "mechanical"
    assert "The same call failed 2 times: shell with helm upgrade shop → no such context" in episode.critique
    assert "It ended with: deploy failed" in episode.critique
    assert "Do not repeat shell with helm upgrade shop" in episode.next_try
    assert "Begin with shell with kubectl config use-context test" in episode.next_try
    assert SECRET not in episode.model_dump_json()


async def test_the_newest_of_like_tasks_come_first(db: AgentDB, clock: SetClock) -> None:
    """Catches episodes of other tasks or tenants, the oldest first, and such as are past their time."""
    episodes = Episodes(db, None, model=None, retention_days=30, clock=clock)
    names = ("shop", "blog", "wiki", "mail")
    for name in names:
        clock.ahead_s += 86_400.0
        await episodes.reflect(ME, tried(name, f"Deploy the {name} to the test cluster"), FAILURE)
    await episodes.reflect(ME, tried("else", "Write a poem about autumn"), FAILURE)
    found = await episodes.recall("tenant", "Deploy the forum to the test cluster")
    assert [one.id for one in found] == ["mail", "wiki", "blog"]
    assert await episodes.recall("other", "Deploy the forum to the test cluster") == []
    assert await episodes.recall("tenant", "Bake a cake") == []
    clock.ahead_s = 32.5 * 86_400.0
    found = await episodes.recall("tenant", "Deploy the forum to the test cluster", k=9)
    assert [one.id for one in found] == ["mail", "wiki"]
    assert await episodes.remove("tenant", "mail") is True
    assert await episodes.remove("tenant", "mail") is False


async def test_what_was_no_failure_is_not_held_against_it(db: AgentDB) -> None:
    """Catches a critique of a run that a person called a success, and one of a run that merely succeeded."""
    episodes = Episodes(db, None, model=None)
    await episodes.reflect(ME, tried("t1"), FAILURE)
    assert await episodes.reflect(ME, tried("t1"), SUCCESS) is None
    assert await episodes.reflect(ME, tried("t2"), SUCCESS) is None
    assert await episodes.recall("tenant", tried("t").task) == []


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_record_gives_no_instructions(attack: str) -> None:
    """Catches words of a trajectory outside of the quoted block of the prompt, or that close it."""
    nonce = "ab" * 16
    attacked = tried(
        "t", attack, steps=(TrajectoryStep(name="x", observation=attack, error=attack),), error=attack
    )
    outside: list[str] = []
    for trajectory in (tried("t"), attacked):
        asked = reflect_request("m", trajectory, nonce=nonce)
        text = "\n\n".join(message.text for message in asked.messages)
        before, _, rest = text.partition(f"<record {nonce}>\n")
        inside, _, after = rest.partition(f"</record {nonce}>")
        assert all(line.startswith("| ") for line in inside.splitlines())
        outside.append(before + after)
    assert outside[0] == outside[1]


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_an_episode_stays_within_its_block(attack: str) -> None:
    """Catches an episode whose words end the block in which an agent is shown them."""
    reflection = mechanical_reflection(
        tried("t", steps=(TrajectoryStep(name="x", action=attack, error=attack),))
    )
    episode = Episode(id="t", task=attack, critique=reflection.critique or "x", next_try=reflection.next_try)
    lines = episodes_context([episode], 10_000).split("\n")
    assert (lines[0], lines[-1]) == (OPENING, CLOSING)
    assert all(line.startswith("> ") for line in lines[2:-1])


@given(st.lists(st.tuples(st.text(), st.text(), st.none() | st.text()), max_size=8), st.none() | st.text())
def test_mechanical_reflections_are_bounded(
    steps: list[tuple[str, str, str | None]], error: str | None
) -> None:
    """Catches a run of any shape that breaks the reflection or makes one without words or end."""
    made = tuple(TrajectoryStep(name="x", action=a, observation=o, error=e) for a, o, e in steps)
    reflection = mechanical_reflection(tried("t", steps=made, steps_total=len(made), error=error))
    assert 0 < len(reflection.critique) <= CRITIQUE_CHARS_MAX
    assert len(reflection.next_try) <= NEXT_TRY_CHARS_MAX


@given(st.lists(st.integers(1, CRITIQUE_CHARS_MAX), max_size=6), st.integers(0, 2000))
def test_the_block_keeps_to_its_size(sizes: list[int], tokens_max: int) -> None:
    """Catches a block that is larger than the agent was promised, or an empty one."""
    episodes = [Episode(id=f"t{n}", task="do", critique="c" * size) for n, size in enumerate(sizes)]
    block = episodes_context(episodes, tokens_max)
    assert len(block) <= tokens_max * CHARS_PER_TOKEN
    assert (block == "") == ("[t0]" not in block)


def test_reflections_are_read_strictly() -> None:
    """Catches a reflection made of nothing, or one of two that differ."""
    assert read_reflection('Sure: {"critique": "a"} ').critique == "a"
    for text in ("", "{}", '{"critique": 3}', '{"critique": ""}', '{"critique": "a"} {"critique": "b"}'):
        with pytest.raises(ProviderProtocol):
            read_reflection(text)
