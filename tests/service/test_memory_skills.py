"""Skills in a real store: made by repeated success, made more general, rated by use, retired, bounded."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput, NotFound
from agentic_flow.core.settings import AgentDBSettings, MemorySettings
from agentic_flow.core.vectors import Item
from agentic_flow.memory.confidence import TAUGHT_WEIGHT
from agentic_flow.memory.records import SKILLS, Outcome, Trajectory, TrajectoryStep, Verdict, VerdictSource
from agentic_flow.memory.service import Memory
from agentic_flow.memory.skills import (
    EXAMPLES_MAX,
    RETIRE_USES_MIN,
    SUPPORT_MIN,
    USES_KEPT_MAX,
    Skill,
    Skills,
    as_item,
)

pytestmark = pytest.mark.anyio

T = "tenant"
SETTINGS = AgentDBSettings(embedding_dimension=256)
CITIES = (
    "Paris",
    "Rome",
    "Oslo",
    "Bern",
    "Lima",
    "Cairo",
    "Quito",
    "Dakar",
    "Hanoi",
    "Minsk",
    "Sofia",
    "Tunis",
)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path, SETTINGS) as opened:
        yield opened


def weather(city: str, *, unit: str = "celsius", name: str | None = None) -> Trajectory:
    """A run of four calls, one of which failed."""
    place = f"{len(city)}-{city.lower()}"
    return Trajectory(
        id=name or f"run-{city}",
        task=f"Report the weather in {city} to the team",
        steps=(
            TrajectoryStep(name="model", observation="I will look it up"),
            TrajectoryStep(
                name="tool:find_place", action=json.dumps({"q": city}), observation=f"place {place}"
            ),
            TrajectoryStep(name="tool:forecast", action="{}", error="no place given"),
            TrajectoryStep(
                name="tool:forecast", action=json.dumps({"place": place, "unit": unit, "days": 2})
            ),
            TrajectoryStep(name="tool:post", action=json.dumps({"channel": "team"})),
        ),
        steps_total=5,
        outcome="completed",
        started_at_s=float(CITIES.index(city)),
    )


def verdict(
    outcome: Outcome = "success", source: VerdictSource = "judge", confidence: float = 0.9
) -> Verdict:
    return Verdict(outcome=outcome, source=source, confidence=confidence)


async def learned(skills: Skills, *cities: str) -> Skill:
    skill = None
    for city in cities:
        skill = await skills.learn(T, weather(city), verdict())
    assert skill is not None
    return skill


async def test_the_third_success_makes_a_skill(tmp_path: Path) -> None:
    """Catches a skill from too few runs, from failures from unsure verdicts, or lost with its process."""
    async with AgentDB(tmp_path, SETTINGS) as db:
        skills = Skills(db)
        assert await skills.learn(T, weather("Paris"), verdict()) is None
        assert await skills.learn(T, weather("Rome"), verdict("failure")) is None
        assert await skills.learn(T, weather("Rome"), verdict(confidence=0.3)) is None
        assert await skills.learn(T, weather("Rome"), verdict()) is None
        assert await skills.learn(T, weather("Rome"), verdict()) is None, "the same run twice is one run"
    async with AgentDB(tmp_path, SETTINGS) as db:
        skills = Skills(db)
        skill = await learned(skills, "Oslo")
        assert (skill.supported, skill.current.version, skill.state) == (SUPPORT_MIN, 1, "active")
        assert skill.task == "Report the weather in {q} to the team"
        assert skill.tools == ("find_place", "forecast", "post"), "what failed is no part of it"
        first, second, third = await skills.use(T, skill.id, {"q": "Kyiv"})
        assert first.arguments == {"q": "Kyiv"}
        assert second.arguments == {"place": "{place}", "unit": "celsius", "days": 2}
        assert second.pending == {"place": 1}
        assert third.arguments == {"channel": "team"}
        with pytest.raises(InvalidInput):
            await skills.use(T, skill.id, {})
        assert await skills.learn("other", weather("Oslo"), verdict()) is None, "tenants share nothing"
        assert await skills.find("other", weather("Oslo").task) == []
        with pytest.raises(NotFound):
            await skills.get("other", skill.id)


async def test_runs_that_are_not_alike_make_no_skill(db: AgentDB) -> None:
    """Catches skills from chance: the same tools for unlike tasks, or alike tasks with other tools."""
    skills = Skills(db)
    tasks = ("Translate the letter from Danish", "Find who broke the build", "Order printer paper, blue")
    for number, task in enumerate(tasks):
        unlike = weather("Paris", name=f"u{number}").model_copy(update={"task": task})
        assert await skills.learn(T, unlike, verdict()) is None
    for city, count in (("Rome", 1), ("Oslo", 2), ("Bern", 3)):
        run = weather(city)
        steps = (*run.steps, *(TrajectoryStep(name="tool:post", action="{}"),) * count)
        other = run.model_copy(update={"steps": steps, "steps_total": len(steps)})
        assert await skills.learn(T, other, verdict()) is None
    assert await skills.list_skills(T) == ([], None)


async def test_another_run_makes_it_more_general(db: AgentDB) -> None:
    """Catches a new version without a change, a change without one, and an old version that is lost."""
    skills = Skills(db)
    skill = await learned(skills, *CITIES[:4])
    assert (skill.current.version, skill.supported) == (1, 4)
    fahrenheit = await skills.learn(T, weather("Lima", unit="fahrenheit"), verdict())
    assert fahrenheit is not None
    assert fahrenheit.id == skill.id
    assert [one.version for one in await skills.versions(T, skill.id)] == [1, 2]
    assert (await skills.use(T, skill.id, {"q": "x", "unit": "kelvin"}))[1].arguments["unit"] == "kelvin"
    assert (await skills.use(T, skill.id, {"q": "x"}, version=1))[1].arguments["unit"] == "celsius"
    with pytest.raises(NotFound, match="version 7"):
        await skills.use(T, skill.id, {"q": "x"}, version=7)
    # More runs than examples are kept: the one that made it general must not be forgotten.
    grown = await learned(skills, *CITIES[5:])
    assert (grown.current.version, grown.supported, len(grown.examples)) == (2, len(CITIES), EXAMPLES_MAX)
    assert "run-Lima" in {one.trajectory_id for one in grown.examples}
    assert [one.id for one in (await skills.list_skills(T))[0]] == [skill.id]


async def test_uses_are_counted_once_and_rated(db: AgentDB) -> None:
    """Catches a use counted twice, a judge over a person, and a failing skill that is still offered."""
    skills = Skills(db)
    skill = await learned(skills, *CITIES[:3])
    await skills.record_use(T, skill.id, "u0", verdict("failure"))
    await skills.record_use(T, skill.id, "u0", verdict("failure"))
    await skills.record_use(T, skill.id, "u0", verdict("success", "person"))
    rated = await skills.record_use(T, skill.id, "u0", verdict("failure"))
    assert (rated.current.successes, rated.current.failures) == (1, 0)
    await skills.record_use(T, skill.id, "u1", verdict("unknown"))
    rated = await skills.record_use(T, skill.id, "u2", verdict("impossible"))
    assert rated.current.uses == 1
    assert rated.current.success_share == pytest.approx(2 / 3)
    task = weather("Hanoi").task
    (found,) = await skills.find(T, task)
    assert (found.skill.id, found.parameters) == (skill.id, {"q": "Hanoi"})
    await asyncio.gather(
        *(skills.record_use(T, skill.id, f"f{n}", verdict("failure")) for n in range(2 * RETIRE_USES_MIN))
    )
    retired = await skills.get(T, skill.id)
    assert (retired.current.failures, retired.state) == (2 * RETIRE_USES_MIN, "retired")
    assert retired.current.interval[1] < 0.5
    assert await skills.find(T, task) == []
    # A version that does something else starts afresh; the old one keeps its figures.
    fresh = await skills.learn(T, weather("Lima", unit="fahrenheit"), verdict())
    assert fresh is not None
    assert (fresh.state, fresh.current.uses, fresh.versions[0].failures) == ("active", 0, 2 * RETIRE_USES_MIN)
    assert len(await skills.find(T, task)) == 1
    with pytest.raises(NotFound):
        await skills.record_use(T, "none", "x", verdict())


async def test_a_success_that_was_none_is_taken_out(db: AgentDB) -> None:
    """Catches a skill that stands on a run which a person called a failure."""
    skills = Skills(db)
    skill = await learned(skills, *CITIES[:3])
    await skills.learn(T, weather("Rome"), verdict("failure", "person"))
    left = await skills.get(T, skill.id)
    assert (left.supported, left.state) == (SUPPORT_MIN - 1, "retired")
    assert "run-Rome" not in {one.trajectory_id for one in left.examples}
    assert await skills.find(T, weather("Hanoi").task) == []
    again = await learned(skills, "Bern")
    assert (again.id, again.supported, again.state) == (skill.id, SUPPORT_MIN, "active")


async def test_processes_that_learn_at_once_make_one_skill(tmp_path: Path) -> None:
    """Catches the same skill made twice, or a run that supports it lost, by learners side by side."""
    async with AgentDB(tmp_path, SETTINGS) as one, AgentDB(tmp_path, SETTINGS) as two:
        learners = (Skills(one), Skills(two))
        await asyncio.gather(
            *(
                learners[number % 2].learn(T, weather(city), verdict())
                for number, city in enumerate(CITIES[:8])
            )
        )
        skill = await learned(learners[0], "Minsk")
        listed, _ = await learners[1].list_skills(T)
        assert [found.id for found in listed] == [skill.id]
        assert skill.supported == 9


async def test_the_turn_of_a_learner_that_died_ends(db: AgentDB) -> None:
    """Catches a learner that waits for ever for one that is gone."""
    skills = Skills(db)
    await skills.learn(T, weather("Paris"), verdict())
    (trace,) = (await db.list_items(T, SKILLS)).items
    held = Item(id=f"turn.{trace.metadata['signature']}", text="turn", expires_at_s=time.time() + 0.5)
    await db.upsert(T, SKILLS, [held])
    await skills.learn(T, weather("Rome"), verdict())
    assert time.time() >= (held.expires_at_s or 0.0)
    assert {row.id for row in (await db.list_items(T, SKILLS)).items} >= {trace.id}
    assert await db.get(T, SKILLS, [held.id]) == []


async def test_a_removed_skill_comes_back_by_new_runs_only(db: AgentDB) -> None:
    """Catches a removed skill that one more run brings back, or that cannot be learned ever again."""
    skills = Skills(db)
    skill = await learned(skills, *CITIES[:3])
    assert await skills.remove(T, skill.id) is True
    assert await skills.remove(T, skill.id) is False
    assert await skills.learn(T, weather("Bern"), verdict()) is None
    assert await skills.learn(T, weather("Lima"), verdict()) is None
    assert (await learned(skills, "Cairo")).supported == SUPPORT_MIN


async def test_what_is_kept_is_bounded(db: AgentDB) -> None:
    """Catches rows that grow with every use and traces that stay for ever."""
    skills = Skills(db)
    skill = await learned(skills, *CITIES[:3])
    for number in range(USES_KEPT_MAX + 20):
        await skills.record_use(T, skill.id, f"u{number}", verdict())
    used = await skills.get(T, skill.id)
    assert (used.current.successes, len(used.uses)) == (USES_KEPT_MAX + 20, USES_KEPT_MAX)
    rows = (await db.list_items(T, SKILLS)).items
    assert all(row.expires_at_s is not None for row in rows if row.id.startswith("t."))
    long = weather("Bern").model_copy(
        update={"steps": (TrajectoryStep(name="tool:x", action="y" * 1990),) * 8, "steps_total": 8}
    )
    assert await skills.learn(T, long, verdict()) is None
    assert len((await db.list_items(T, SKILLS)).items) == len(rows), "too long to be a procedure"


async def test_the_skill_of_the_task_is_found_among_many(db: AgentDB) -> None:
    """Catches a search that ranks by spelling alone, and one in which the traces of runs crowd skills out."""
    skills = Skills(db)
    for number in range(30):
        for city in CITIES[:3]:
            task = f"Report the weather number {number} in {city} to the team by radio {number}"
            run = weather(city, name=f"run-{number}-{city}").model_copy(update={"task": task})
            tool = TrajectoryStep(name=f"tool:radio-{number}", action=json.dumps({"to": city}))
            await skills.learn(
                T, run.model_copy(update={"steps": (*run.steps, tool), "steps_total": 6}), verdict()
            )
    assert await skills.count(T) == 30
    for _ in range(2):  # once by a thread, once here
        (found,) = await skills.find(T, "Report the weather number 17 in Quito to the team by radio 17", k=1)
        assert found.skill == await skills.get(T, found.skill.id)
        assert (found.parameters, "radio-17" in found.skill.tools[-1]) == ({"q": "Quito"}, True)
    assert await skills.find(T, "bake a cake", k=3) == []


async def test_a_skill_is_explained_by_its_runs(tmp_path: Path) -> None:
    """Catches an explanation that does not add up to the belief that recalls show, and a retired skill that
    is said to be recalled."""
    owner = Principal(T, "owner", frozenset({"memory:*"}))
    async with AgentDB(tmp_path, SETTINGS) as db:
        memory = Memory(db, MemorySettings())
        skill = await learned(memory.skills, *CITIES[:4])
        used = await memory.skills.record_use(T, skill.id, "u0", verdict("success", "test"))
        found = await memory.explain(owner, skill.id)
        assert found.recalled
        assert found.item == as_item(used)
        weights = sum(one.weight_now for one in found.evidence) + found.folded_successes
        assert abs(weights - found.belief.evidence) < 1e-6
        assert {one.trajectory_id: (one.kind, one.counts) for one in found.evidence} == {
            **{f"run-{city}": ("taught", "for") for city in CITIES[:4]},
            "u0": ("use", "for"),
        }
        for number in range(USES_KEPT_MAX):
            used = await memory.skills.record_use(T, skill.id, f"f{number}", verdict("failure"))
        found = await memory.explain(owner, skill.id)
        assert used.state == "retired"
        assert not found.recalled
        assert "retired" in found.reasons[-1]
        with pytest.raises(NotFound):
            await memory.explain(owner, "skill-0000")


class AlwaysLow(random.Random):
    """Draws what keeps everything back."""

    def random(self) -> float:
        return 0.0


async def test_a_skill_is_kept_back_by_chance_like_an_item(tmp_path: Path) -> None:
    """Catches skills that are shown whatever the draw says, or whose absence is not counted as such."""
    owner = Principal(T, "owner", frozenset({"memory:*"}))
    async with AgentDB(tmp_path, SETTINGS) as db:
        memory = Memory(db, MemorySettings(withheld_share=0.2), rng=AlwaysLow())
        skill = await learned(memory.skills, *CITIES[:3])
        recall = await memory.recall(owner, "Report the weather in Quito to the team", recall_id="r1")
        assert (recall.withheld, recall.items, recall.context) == ((skill.id,), (), "")
        certificate = await memory.certificates.get(T, "r1")
        assert certificate is not None
        assert (certificate.withheld, certificate.withheld_share) == ((skill.id,), 0.2)
        run = weather("Quito").model_copy(update={"recall_id": "r1"})
        await memory.note_outcome(owner, run, verdict("success", "test"))
        await memory.rate_skills(owner, run, verdict("success", "test"))
        (effect,) = (await memory.uplift(owner)).items
        assert (effect.item_id, effect.randomised.without_n, effect.randomised.with_n) == (skill.id, 1, 0)
        assert (await memory.skills.get(T, skill.id)).current.uses == 0


async def test_a_skill_can_go_into_the_bank(db: AgentDB) -> None:
    """Catches an item that says nothing of what to do or where it comes from."""
    item = as_item(await learned(Skills(db), *CITIES[:3]))
    assert item.title == "Report the weather in {q} to the team"
    assert "1. find_place(q={q})" in item.content
    assert "from what step 1 returned" in item.content
    assert [one.trajectory_id for one in item.sources] == ["run-Paris", "run-Rome", "run-Oslo"]
    assert (item.successes, item.failures) == (pytest.approx(3 * TAUGHT_WEIGHT), 0)
