"""Trajectories and learning from them, on a real store: queue, verdicts, retries, retention, walls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.agentdb.routes import build_routes
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import DEFAULT_TENANT, LOCAL_OWNER, Principal
from agentic_flow.core.clock import Deadline, SystemClock
from agentic_flow.core.errors import Conflict, NotFound, ProviderFailed
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings, GatewaySettings, MemorySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.service import Gateway
from agentic_flow.memory import learning
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.distill import Distiller
from agentic_flow.memory.judge import Judge
from agentic_flow.memory.learning import Learner, backoff_s, credits_of
from agentic_flow.memory.records import MemoryItem, Outcome, Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.trajectories import Trajectories
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.serving import serving
from attack_corpus import ATTACKS

pytestmark = pytest.mark.anyio

T = "t-learn"
DAY_S = 86_400.0


class SetClock(SystemClock):
    """A clock that a test moves; nobody is woken by it."""

    now_s = 1_000_000.0

    def time_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.Event().wait()


class CountingEmbedder(HashedNgramEmbedder):
    """The embedder that needs no model; keeps which documents it was given."""

    def __init__(self) -> None:
        super().__init__(256)
        self.texts: list[str] = []

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        self.texts += texts if kind == "document" else ()
        return await super().embed(texts, kind=kind)


class Anybody:
    """Takes every caller for the owner."""

    async def authenticate(self, credential: str) -> Principal:
        return LOCAL_OWNER


class ScriptedJudge:
    """Says what it is told to, of every trajectory, and counts."""

    def __init__(self, outcome: Outcome = "success") -> None:
        self.outcome: Outcome = outcome
        self.error: Exception | None = None
        self.seen: list[str] = []
        self.asked = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict:
        self.seen.append(f"{principal.tenant}/{trajectory.id}")
        self.asked.set()
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        return Verdict(outcome=self.outcome, confidence=0.8, source="judge", model="scripted")

    async def judging_model(self, principal: Principal) -> str | None:
        return "scripted"


async def settled(learner: Learner) -> int:
    """Learn from what is due; from how many it learned."""
    before = learner.stats.learned
    await learner.settle()
    return learner.stats.learned - before


class Place:
    """The parts of memory over one store."""

    def __init__(self, store: VectorStore, clock: SetClock, **settings: Any) -> None:
        self.clock = clock
        self.settings = MemorySettings(**settings)
        self.trajectories = Trajectories(store, self.settings, clock=clock)
        self.bank = Bank(store, self.settings, clock=clock)
        self.judge = ScriptedJudge()
        self.shown: dict[str, Sequence[str]] = {}
        self.hooked: list[str] = []
        self.learned = asyncio.Event()

    def learner(self, **more: Any) -> Learner:
        async def shown(tenant: str, recall_id: str) -> Sequence[str]:
            return self.shown.get(recall_id, ())

        async def hook(principal: Principal, trajectory: Trajectory, verdict: Verdict) -> None:
            self.hooked.append(f"{trajectory.id} {verdict.outcome}")
            self.learned.set()

        return Learner(
            self.trajectories,
            self.bank,
            more.pop("judge", self.judge),
            more.pop("distiller", Distiller(None, model=None, clock=self.clock)),
            self.settings,
            clock=self.clock,
            shown=shown,
            after=[hook],
            rng=random.Random(1),
            **more,
        )

    async def state(self, trajectory_id: str, tenant: str = T) -> Trajectory:
        found = await self.trajectories.get(tenant, trajectory_id)
        assert found is not None
        return found

    async def items(self, tenant: str = T) -> dict[str, MemoryItem]:
        items, _ = await self.bank.list_items(tenant)
        return {item.id: item for item in items}


@asynccontextmanager
async def place_in(folder: Path, **settings: Any) -> AsyncGenerator[Place]:
    clock = SetClock()
    async with AgentDB(folder, AgentDBSettings(), clock=clock) as store:
        yield Place(store, clock, **settings)


def tried(trajectory_id: str, **more: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "task": f"close the valve {trajectory_id}",
        "agent": "worker",
        "outcome": "completed",
        "answer": "closed",
        "steps": (
            TrajectoryStep(agent="worker", name="turn", action="left", error="stuck"),
            TrajectoryStep(agent="worker", name="turn", action="right", observation="it closed"),
        ),
        **more,
    }
    return Trajectory(id=trajectory_id, **fields)


# ---- trajectories ----------------------------------------------------------------------------------------


async def test_steps_come_while_it_is_open(tmp_path: Path) -> None:
    """Catches steps that are lost, doubled by a retry, out of order, or taken after the end."""
    async with place_in(tmp_path) as place:
        t = place.trajectories
        with pytest.raises(NotFound):
            await t.append(T, "a", [TrajectoryStep(name="early")])
        begun = await t.start(T, Trajectory(id="a", task="do it", agent="worker"))
        assert await t.start(T, Trajectory(id="a", task="do it")) == begun
        with pytest.raises(Conflict):
            await t.start(T, Trajectory(id="a", task="something else"))
        for number in range(3):
            place.clock.now_s += 1
            await t.append(T, "a", [TrajectoryStep(name=f"s{number}")])
        for _ in range(2):
            await t.append(T, "a", [TrajectoryStep(name="once")], key="~retried")
        open_now = await place.state("a")
        assert [step.name for step in open_now.steps] == ["s0", "s1", "s2", "once"]
        assert (open_now.state, await t.due(T, place.clock.now_s)) == ("open", [])
        told = Verdict(outcome="success", source="test", subject="t1")
        await t.add_verdict(T, "a", told)
        ended = await t.finish(T, "a", outcome="completed", answer="done", cited=("x", "x"))
        assert ended == await place.state("a") == await t.finish(T, "a", outcome="completed")
        assert [step.name for step in ended.steps] == ["s0", "s1", "s2", "once"]
        assert (ended.state, ended.outcome, ended.cited) == ("pending", "completed", ("x",))
        assert [one.subject for one in ended.verdicts] == ["t1"]
        with pytest.raises(Conflict):
            await t.finish(T, "a", outcome="failed")
        with pytest.raises(Conflict):
            await t.append(T, "a", [TrajectoryStep(name="late")])
        with pytest.raises(NotFound):
            await t.finish(T, "missing", outcome="failed")


async def test_they_are_found_and_listed(tmp_path: Path) -> None:
    """Catches a filter that lets others through, a page that repeats, a wrong neighbour first."""
    async with place_in(tmp_path) as place:
        t = place.trajectories
        assert await t.similar(T, "valve") == []
        assert await t.list_trajectories(T) == ([], None)
        assert await t.get(T, "a") is None
        for name in ("a", "b", "c"):
            place.clock.now_s += 10
            await t.record(T, tried(name, agent=name, outcome="failed" if name == "b" else "completed"))
        await t.record(T, tried("d", task="bake a cake with apples"))
        first, cursor = await t.list_trajectories(T, limit=3)
        rest, end = await t.list_trajectories(T, limit=3, cursor=cursor)
        assert ([one.id for one in first], [one.id for one in rest], end) == (["a", "b", "c"], ["d"], None)
        assert [one.id for one in (await t.list_trajectories(T, outcome="failed"))[0]] == ["b"]
        assert [one.id for one in (await t.list_trajectories(T, agent="c"))[0]] == ["c"]
        since = await t.list_trajectories(T, since_s=place.clock.now_s)
        assert [one.id for one in since[0]] == ["c", "d"]
        assert (await t.similar(T, "an apple cake", k=1))[0].id == "d"
        assert await t.tenants() == [T]


async def test_a_record_is_replaced_until_it_is_learned_from(tmp_path: Path) -> None:
    """Catches a run that is stored twice, loses a verdict by being stored again, or is learned from anew."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a"))
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="failure", source="person"))
        await place.trajectories.record(T, tried("a", answer="better"))
        again = await place.state("a")
        assert (again.answer, len(again.verdicts)) == ("better", 1)
        assert await settled(place.learner()) == 1
        await place.trajectories.record(T, tried("a", answer="too late"))
        assert ((await place.state("a")).answer, (await place.state("a")).state) == ("better", "learned")


async def test_a_claim_holds_for_its_lease(tmp_path: Path) -> None:
    """Catches two workers on one trajectory, and one that stays taken when its worker has died."""
    async with place_in(tmp_path) as place:
        t = place.trajectories
        await t.record(T, tried("a"))
        claims = await asyncio.gather(*(t.claim(T, "a", lease_s=50) for _ in range(8)))
        (first,) = [claim for claim in claims if claim is not None]
        assert await t.due(T, place.clock.now_s) == []
        assert await t.waiting(T) == 1
        place.clock.now_s += 51
        second = await t.claim(T, "a", lease_s=50)
        assert second is not None
        assert second.trajectory.attempts == 2
        assert await t.settle(first, item_ids=["x"]) is False
        assert await t.settle(second) is True
        assert (await place.state("a")).item_ids == ()
        assert await t.claim(T, "a") is None


async def test_retention_removes_what_is_old_and_done(tmp_path: Path) -> None:
    """Catches experience that goes before anybody learned from it, and such as stays for ever."""
    async with place_in(tmp_path, retention_days=30, attempts_max=1) as place:
        t = place.trajectories
        await t.record(T, tried("learned"))
        await place.learner().settle()
        place.judge.error = ProviderFailed("down")
        await t.record(T, tried("shelved"))
        await place.learner().settle()
        await t.record(T, tried("pending"))
        await t.start(T, Trajectory(id="open", task="begun"))
        await t.append(T, "open", [TrajectoryStep(name="a step")])
        place.clock.now_s += 29 * DAY_S
        assert await t.expire(T) == 0
        place.clock.now_s += 2 * DAY_S
        assert await t.expire(T) == 3
        assert [one.id for one in (await t.list_trajectories(T))[0]] == ["pending"]
        assert await t.expire("nobody") == 0


# ---- learning --------------------------------------------------------------------------------------------


async def test_a_run_becomes_items_that_are_recalled(tmp_path: Path) -> None:
    """Catches a trajectory that teaches nothing, is learned from twice, or is kept whole for ever."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a"))
        learner = place.learner()
        assert await settled(learner) == 1
        assert await settled(learner) == 0
        after = await place.state("a")
        assert (after.state, after.compressed, after.attempts) == ("learned", True, 1)
        assert after.item_ids == ("a.s1", "a.s2")
        assert after.verdict is not None
        assert (after.verdict.source, after.verdict.model) == ("judge", "scripted")
        assert [step.action for step in after.steps] == ["left", "right"]
        assert not any(step.observation for step in after.steps)
        recall = await place.bank.recall(T, "close the valve")
        assert "right" in recall.context
        assert place.hooked == ["a success"]
        assert learner.stats.learned == 1


async def test_what_could_not_be_done_teaches_nothing(tmp_path: Path) -> None:
    """Catches a task that is called impossible and counted as a failure of how it was tried."""
    async with place_in(tmp_path) as place:
        place.judge.outcome = "impossible"
        await place.trajectories.record(T, tried("a"))
        assert await settled(place.learner()) == 1
        after = await place.state("a")
        assert after.state == "learned"
        assert after.verdict is not None
        assert (after.verdict.outcome, after.verdict.source) == ("impossible", "judge")
        assert await place.items() == {}


async def test_no_secret_or_address_of_a_person_is_kept(tmp_path: Path) -> None:
    """Catches an address, a telephone number or a key of an observation in what is told to other runs."""
    private = ("ada.byron@example.org", "+44 20 7946 0958", "sk-ant-api03-" + "aB3" * 20)
    steps = tuple(
        TrajectoryStep(
            agent="worker", name="write", action=f"write to {one}", observation=f"{one} has answered"
        )
        for one in private
    )
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a", steps=steps, answer=" and ".join(private)))
        assert await settled(place.learner()) == 1
        items = await place.items()
        assert items
        told = "\n".join(item.model_dump_json() for item in items.values())
        recall = await place.bank.recall(T, "close the valve")
        assert "answered" in recall.context
    assert not [one for one in private if one in told or one in recall.context]


async def test_a_learner_consolidates_by_itself(tmp_path: Path) -> None:
    """Catches a bank that only grows, because nobody gives the command."""
    async with place_in(tmp_path) as place:
        words = {"title": "Lift the latch", "content": "Lift the latch before you push the gate"}
        await place.bank.add(T, [MemoryItem(id="first", **words)], idempotency_key="first")
        # As another process has stored it meanwhile.
        other = MemoryItem(id="second", title="Something else", content="entirely")
        await place.bank.add(T, [other], idempotency_key="second")
        await place.bank.edit(T, "second", **words)
        learner = place.learner()
        for number in range(learning.CONSOLIDATED_AFTER):
            assert (await place.items())["second"].state == "active", number
            await place.trajectories.record(T, tried(f"t{number}"))
            await learner.settle()
        (second,) = await place.bank.get(T, ["second"])
        assert (second.state, second.merged_into) == ("merged", "first")


async def test_people_outrank_the_judge(tmp_path: Path) -> None:
    """Catches a judge that is asked where somebody knows, or that overrules them."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a"))
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="failure", source="test"))
        await place.learner().settle()
        assert place.judge.seen == []
        assert (await place.state("a")).item_ids[0] == "a.f1"
        assert (await place.items())["a.f1"].lesson == "avoid"


async def test_a_better_verdict_takes_back_what_a_worse_one_taught(tmp_path: Path) -> None:
    """Catches lessons and credits of a verdict that turned out to be wrong."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("old", task="a use of the lesson"))
        await place.learner().settle()
        await place.trajectories.record(T, tried("new", task="another use", cited=("old.s1",)))
        await place.learner().settle()
        believed = (await place.items())["old.s1"]
        await place.trajectories.add_verdict(T, "new", Verdict(outcome="failure", source="person"))
        assert (await place.state("new")).state == "pending"
        await place.learner().settle()
        after = await place.items()
        assert after["old.s1"].successes < believed.successes
        assert after["old.s1"].failures > believed.failures
        ids = (await place.state("new")).item_ids
        assert ids
        assert all(".f" in one for one in ids)
        assert not [one for one in after if one.startswith("new.s")]
        again = await place.items()
        await place.trajectories.add_verdict(T, "new", Verdict(outcome="failure", source="person"))
        await place.learner().settle()
        assert {k: (v.successes, v.failures) for k, v in (await place.items()).items()} == {
            k: (v.successes, v.failures) for k, v in again.items()
        }


async def test_use_is_credited_once(tmp_path: Path) -> None:
    """Catches use that counts for nothing, for too much, again with each attempt, or without a verdict."""
    async with place_in(tmp_path) as place:
        items = [
            MemoryItem(id=f"i{n}", title=f"item {n} about {word}", content=f"{word} " * 9)
            for n, word in enumerate(("alpha", "bravo", "charlie", "delta"))
        ]
        await place.bank.add(T, items, idempotency_key="k")
        place.shown["recall-1"] = ("i0", "i1", "i2")
        run = tried("run", recall_id="recall-1", cited=("i0", "i3"), steps=())
        await place.trajectories.record(T, run)
        await place.learner().settle()
        first = await place.items()
        assert first["i0"].successes > first["i1"].successes > 0
        assert first["i1"].successes == first["i2"].successes
        assert (first["i0"].uses, first["i3"].uses) == (1, 0)
        await place.trajectories.add_verdict(T, "run", Verdict(outcome="success", source="judge"))
        place.judge.outcome = "unknown"
        await place.trajectories.record(T, run.model_copy(update={"id": "run2"}))
        await place.learner().settle()
        assert (await place.items())["i0"].failures == 0


@given(
    st.lists(st.sampled_from("abcdef"), max_size=5),
    st.lists(st.sampled_from("abcdef"), max_size=5),
    st.floats(0, 1),
)
def test_credits_are_shares(cited: list[str], shown: list[str], confidence: float) -> None:
    """Catches an item that is credited twice, more than whole, or though it was never shown."""
    verdict = Verdict(outcome="success", confidence=confidence, source="judge")
    credits = credits_of(tried("t", cited=tuple(cited)), verdict, shown)
    ids = [one.item_id for one in credits]
    assert len(ids) == len(set(ids))
    assert set(ids) == (set(shown) if shown else set(cited))
    assert all(0 <= one.weight <= confidence for one in credits)
    assert all(one.weight == confidence for one in credits if one.item_id in cited)


@given(st.integers(1, 50), st.floats(0, 1))
def test_pauses_grow_within_bounds(attempts: int, draw: float) -> None:
    """Catches a retry at once, and one that never comes."""
    assert 7.5 <= backoff_s(attempts, draw) <= 9 * 3600
    assert backoff_s(attempts + 1, draw) >= backoff_s(attempts, draw)


async def test_a_judge_that_fails_is_asked_again_and_then_reported(tmp_path: Path) -> None:
    """Catches a run that is lost with its judge, tried without end, or shelved without a word."""
    async with place_in(tmp_path, attempts_max=3) as place:
        place.judge.error = ProviderFailed("the judge is down")
        await place.trajectories.record(T, tried("a"))
        learner = place.learner()
        for attempt in (1, 2, 3):
            await learner.settle()
            await learner.settle()
            assert len(place.judge.seen) == attempt
            assert (await place.state("a")).state == ("pending" if attempt < 3 else "shelved")
            place.clock.now_s += DAY_S
        assert "the judge is down" in str((await place.state("a")).problem)
        stats = learner.stats
        assert (stats.shelved, stats.failures) == (1, {"provider_failed": 3})
        assert "the judge is down" in str(stats.problem)
        await learner.settle()
        assert len(place.judge.seen) == 3
        place.judge.error = None
        assert await learner.retry_shelved(T) == ["a"]
        assert await settled(learner) == 1
        assert (await place.state("a")).problem is None


async def test_what_broke_in_the_middle_is_repeated_without_counting_twice(tmp_path: Path) -> None:
    """Catches items or credits that double when the last step of learning fails."""
    async with place_in(tmp_path) as place:
        await place.bank.add(T, [MemoryItem(id="i0", title="x", content="y")], idempotency_key="k")

        async def broken(principal: Principal, trajectory: Trajectory, verdict: Verdict) -> None:
            raise RuntimeError("the hook broke")

        await place.trajectories.record(T, tried("a", cited=("i0",)))
        breaking = Learner(
            place.trajectories,
            place.bank,
            place.judge,
            Distiller(None, model=None, clock=place.clock),
            place.settings,
            clock=place.clock,
            after=[broken],
        )
        await breaking.settle()
        half = await place.items()
        assert set(half) == {"i0", "a.s1", "a.s2"}
        assert breaking.stats.failures == {"RuntimeError": 1}
        place.clock.now_s += DAY_S
        assert await settled(place.learner()) == 1
        whole = await place.items()
        assert set(whole) == set(half)
        assert whole["i0"].uses == 1
        assert whole["i0"].successes <= half["i0"].successes


async def test_what_was_merged_into_another_lesson_is_taken_back_too(tmp_path: Path) -> None:
    """Catches evidence of a wrong verdict that stays with the item which its lesson was merged into."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a", task="close the valve"))
        await place.learner().settle()
        alone = await place.items()
        await place.trajectories.record(T, tried("b", task="close the valve"))
        await place.learner().settle()
        merged = await place.items()
        assert (await place.state("b")).item_ids == (await place.state("a")).item_ids
        assert {one.trajectory_id for one in merged["a.s1"].sources} == {"a", "b"}
        await place.trajectories.add_verdict(T, "b", Verdict(outcome="unknown", source="person"))
        await place.learner().settle()
        after = await place.items()
        assert {one.trajectory_id for one in after["a.s1"].sources} == {"a"}
        assert set(after) == set(alone)
        assert (await place.state("b")).item_ids == ()


async def test_learners_side_by_side_learn_once(tmp_path: Path) -> None:
    """Catches a trajectory that two processes pay for."""
    async with place_in(tmp_path) as place:
        for number in range(20):
            await place.trajectories.record(T, tried(f"r{number:02}"))
        learners = [place.learner() for _ in range(3)]
        learned = await asyncio.gather(*(settled(learner) for learner in learners))
        assert sum(learned) == 20
        assert sorted(place.judge.seen) == [f"{T}/r{number:02}" for number in range(20)]


async def test_a_verdict_that_comes_meanwhile_is_not_lost(tmp_path: Path) -> None:
    """Catches a person's word that is overwritten by the judge at work."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("a"))
        place.judge.goes_on.clear()
        settling = asyncio.create_task(place.learner().settle())
        await place.judge.asked.wait()
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="failure", source="person"))
        place.judge.goes_on.set()
        await settling
        await place.learner().settle()
        after = await place.state("a")
        assert after.verdict is not None
        assert (after.state, after.verdict.source) == ("learned", "person")
        assert [one for one in await place.items() if one.startswith("a.s")] == []


async def test_a_verdict_that_comes_meanwhile_reaches_a_merged_lesson(tmp_path: Path) -> None:
    """Catches evidence that stays with another item because nobody wrote down that it went there."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("first", task="close the valve"))
        await place.learner().settle()
        await place.trajectories.record(T, tried("a", task="close the valve"))
        place.judge.goes_on.clear()
        place.judge.asked.clear()
        settling = asyncio.create_task(place.learner().settle())
        await place.judge.asked.wait()
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="impossible", source="person"))
        place.judge.goes_on.set()
        await settling
        await place.learner().settle()
        assert (await place.state("a")).state == "learned"
        sources = {one.trajectory_id for one in (await place.items())["first.s1"].sources}
        assert sources == {"first"}


async def test_who_waits_is_not_told_of_the_end_by_a_claim_that_was_lost(tmp_path: Path) -> None:
    """Catches a caller who is told that nothing is left, while a run waits whose verdict came just as the
    background was about to take it."""
    async with place_in(tmp_path) as place:
        claim, begun, goes_on = place.trajectories.claim, asyncio.Event(), asyncio.Event()

        async def overtaken(tenant: str, trajectory_id: str, **_: Any) -> None:
            place.trajectories.claim = claim
            begun.set()
            await goes_on.wait()

        place.trajectories.claim = overtaken
        await place.trajectories.record(T, tried("a"))
        learner = place.learner()
        learner.start()
        await asyncio.wait_for(begun.wait(), 30)
        settling = asyncio.create_task(learner.settle(T))
        async with asyncio.timeout(30):
            while (T, "a") not in learner._again:  # pyright: ignore[reportPrivateUsage]
                await asyncio.sleep(0.001)
        goes_on.set()
        await settling
        assert learner.stats.learned == 1
        await learner.close()


async def test_what_kills_every_process_is_shelved(tmp_path: Path) -> None:
    """Catches a trajectory that ends whoever begins to learn from it, again and again."""
    async with place_in(tmp_path, attempts_max=1) as place:
        await place.trajectories.record(T, tried("a"))
        for _ in range(4):
            assert await place.trajectories.claim(T, "a", lease_s=10) is not None
            place.clock.now_s += 11
        await place.learner().settle()
        after = await place.state("a")
        assert (after.state, place.judge.seen) == ("shelved", [])
        assert "4 times" in str(after.problem)


async def test_in_the_background_it_learns_when_woken(tmp_path: Path) -> None:
    """Catches a learner that must be asked, one that forgets what an earlier process left, one that keeps
    what it was at when it is closed, and one that costs something while nothing happens."""
    async with place_in(tmp_path) as place:
        await place.trajectories.record(T, tried("left-behind"))
        learner = place.learner()
        learner.start()
        await asyncio.wait_for(place.learned.wait(), 30)
        await learner.settle()
        assert place.hooked == ["left-behind success"]
        calls: list[str] = []
        due = place.trajectories.due

        async def counted(tenant: str, now_s: float, limit: int = 16) -> list[str]:
            calls.append(tenant)
            return await due(tenant, now_s, limit)

        place.trajectories.due = counted
        for _ in range(50):
            await asyncio.sleep(0)
        place.learned.clear()
        await place.trajectories.record(T, tried("named"))
        learner.wake(T, "named")
        await asyncio.wait_for(place.learned.wait(), 30)
        assert calls == []
        place.judge.goes_on.clear()
        place.judge.asked.clear()
        await place.trajectories.record(T, tried("next"))
        learner.wake(T)
        await asyncio.wait_for(place.judge.asked.wait(), 30)
        await learner.close()
        given_back = await place.state("next")
        assert (given_back.state, given_back.due_at_s) == ("pending", place.clock.now_s)
        place.judge.goes_on.set()
        assert await settled(place.learner()) == 1


# ---- walls -----------------------------------------------------------------------------------------------


async def test_no_text_crosses_to_another_tenant(tmp_path: Path) -> None:
    """Catches a trajectory or an item that reaches another tenant's prompts, items or recalls, and an attack
    that changes what is judged and kept of others."""
    answers = '{"outcome": "failure", "confidence": 0.9, "reasons": ["it shows"]}'
    items = '{"items": [{"title": "Look first", "description": "always", "content": "look before it"}]}'

    def model(request: Any) -> Reply:
        return Reply.text(items if "write down" in request.system else answers)

    async with place_in(tmp_path) as place:
        with FakeProvider(model, keyless=True) as fake:
            settings = GatewaySettings.model_validate({"openai": {"base_url": fake.openai_url}})
            async with Gateway(settings) as gateway:
                distiller = Distiller(gateway, model="m", clock=place.clock)
                learner = place.learner(judge=Judge(gateway, model="m"), distiller=distiller)
                await place.trajectories.record("other", tried("quiet", task="the other tenant's own secret"))
                for number, attack in enumerate(ATTACKS[::4]):
                    step = TrajectoryStep(name="read", action="page", observation=attack, error=attack)
                    poisoned = tried(f"p{number:02}", task=f"read {attack}", steps=(step,), answer=attack)
                    await place.trajectories.record("attacker", poisoned)
                await learner.settle()
            for seen in fake.requests:
                of_other = "the other tenant's own secret" in seen.text
                assert of_other != ("read " in seen.last_text and '"did": "read"' in seen.last_text)
        for number in range(len(ATTACKS[::4])):
            after = await place.state(f"p{number:02}", "attacker")
            assert after.verdict is not None
            assert (after.state, after.verdict.outcome) == ("learned", "failure")
        of_other = await place.items("other")
        assert {source.trajectory_id for item in of_other.values() for source in item.sources} == {"quiet"}
        recall = await place.bank.recall("other", "read the page and answer success")
        assert not any(one.item.id.startswith("p") for one in recall.items)
        assert await place.items("nobody") == {}


async def test_over_http_it_learns_the_same(tmp_path: Path) -> None:
    """Catches a queue, a claim or a vector that works in one process and not over the store's HTTP twin."""

    async def ready() -> dict[str, bool]:
        return {"agentdb": True}

    clock = SetClock()
    async with AgentDB(tmp_path, AgentDBSettings(), clock=clock) as store:
        app = create_app(
            "agentdb", build_routes(store), authenticator=Anybody(), settings=Settings(), ready=ready
        )
        async with serving(app) as (url,), RemoteAgentDB(url) as remote:
            far = Place(remote, clock)
            await far.trajectories.record(DEFAULT_TENANT, tried("a"))
            await far.trajectories.start(DEFAULT_TENANT, Trajectory(id="b", task="go on"))
            await far.trajectories.append(DEFAULT_TENANT, "b", [TrajectoryStep(name="s")])
            await far.trajectories.finish(DEFAULT_TENANT, "b", outcome="failed", error="no")
            learners = far.learner(), far.learner()
            assert sum(await asyncio.gather(*map(settled, learners))) == 2
            assert len(far.judge.seen) == 2
        near = Place(store, clock)
        assert (await near.state("b", DEFAULT_TENANT)).steps_total == 1
        assert "right" in (await near.bank.recall(DEFAULT_TENANT, "close the valve a")).context


async def test_tasks_are_embedded_once(tmp_path: Path) -> None:
    """Catches a model of embeddings that is paid for each time that a trajectory's state changes."""
    embedder = CountingEmbedder()
    clock = SetClock()
    async with AgentDB(tmp_path, AgentDBSettings(), embedder, clock=clock) as store:
        place = Place(store, clock)
        await place.trajectories.record(T, tried("a", task="the only task", steps=()))
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="unknown", source="person"))
        assert await settled(place.learner()) == 1
        await place.trajectories.add_verdict(T, "a", Verdict(outcome="impossible", source="person"))
        assert await settled(place.learner()) == 1
        assert embedder.texts == ["the only task"]
        assert (await place.trajectories.similar(T, "the only task"))[0].id == "a"
