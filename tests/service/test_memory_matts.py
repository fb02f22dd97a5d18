"""Several tries of one task: at the same time or after each other, their contrast, by a model and without."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import InvalidInput, ProviderFailed, ProviderProtocol
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.service import Gateway
from agentic_flow.memory.judge import Judge
from agentic_flow.memory.matts import (
    ITEMS_MAX,
    TRIES_MAX,
    Contrast,
    Matts,
    Tried,
    Try,
    best_of,
    contrast_request,
    mechanical_contrast,
    read_items,
)
from agentic_flow.memory.records import Outcome, Trajectory, TrajectoryStep, Verdict, VerdictSource
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest
from attack_corpus import ATTACKS

pytestmark = pytest.mark.anyio

ME = Principal("tenant", "me", frozenset({"*"}))
TASK = "Count the open orders"


def steps(*calls: tuple[str, str | None]) -> tuple[TrajectoryStep, ...]:
    return tuple(
        TrajectoryStep(name="sql", action=action, observation="" if error else "rows", error=error)
        for action, error in calls
    )


def tried(
    number: int, good: bool, *calls: tuple[str, str | None], source: VerdictSource = "test", sure: float = 1.0
) -> Trajectory:
    made = steps(*calls)
    outcome: Outcome = "success" if good else "failure"
    return Trajectory(
        id=f"t{number}",
        task=TASK,
        steps=made,
        steps_total=len(made),
        outcome="completed",
        answer="42",
        verdicts=(Verdict(outcome=outcome, source=source, confidence=sure),),
    )


GOOD = (("select 1", None), ("analyze orders", None), ("count orders", None))
BAD = (("select 1", None), ("count all", None), ("drop", "denied"))


def keyless() -> Matts:
    return Matts(None, Judge(None, model=None), model=None)


def soon() -> Deadline:
    return Deadline.after(30.0)


async def test_rollouts_run_at_the_same_time() -> None:
    """Catches tries that wait for each other: every one waits here until all of them have begun."""
    barrier = asyncio.Barrier(5)

    async def attempt(given: Try) -> Trajectory:
        await barrier.wait()
        return tried(given.number, given.number == 3, *(GOOD if given.number == 3 else BAD))

    async with asyncio.timeout(30):
        found = await keyless().parallel(ME, TASK, attempt, 5, deadline=soon())
    assert [one.trajectory.id for one in found.tries] == [f"t{number}" for number in range(5)]
    assert found.best.trajectory.id == "t3"
    assert found.problems == ()


async def test_the_contrast_names_what_made_the_difference() -> None:
    """Catches a keyless contrast that teaches what all tries share, or nothing of why some failed."""

    async def attempt(given: Try) -> Trajectory:
        good = given.number % 2 == 0
        return tried(given.number, good, *(GOOD if good else BAD))

    items = (await keyless().parallel(ME, TASK, attempt, 4, deadline=soon())).items
    do = next(item for item in items if item.lesson == "do")
    avoid = "\n".join(item.content for item in items if item.lesson == "avoid")
    assert "analyze orders" in do.content
    assert "count orders" in do.content
    assert "select 1" not in do.content + avoid, "all did that"
    assert "count all" in avoid
    assert "drop → denied" in avoid
    assert "2 of 4 tries succeeded" in do.description
    assert {item.origin for item in items} == {"mechanical"}
    assert [source.outcome for source in do.sources] == ["success", "failure"] * 2
    assert len({item.id for item in items}) == len(items) <= ITEMS_MAX


def test_numbers_of_one_run_are_not_in_what_it_teaches() -> None:
    """Catches lessons that equal runs of other tickets or days do not share, and such as lose a number that
    the tries had to do with."""

    def titles(ticket: int, year: int) -> list[str]:
        task = f"For ticket {ticket} count the open orders of {year} in table v2.1"
        calls = (("select 1", None), (f"count orders of {year}", None))
        runs = [
            tried(number, good, *(calls if good else BAD)).model_copy(update={"task": task})
            for number, good in enumerate((True, False))
        ]
        found = mechanical_contrast([Tried(run, run.verdicts[0]) for run in runs])
        return [str(one["title"]) for one in found]

    assert titles(4711, 2024) == titles(815, 2024)
    assert titles(4711, 2024)[0] == (
        "What succeeded for 'For ticket … count the open orders of 2024 in table v2.1'"
    )
    assert titles(4711, 2024) != titles(4711, 2023)


async def test_a_try_that_breaks_is_a_failed_try() -> None:
    """Catches one error that ends all other tries, and one that is not ours being swallowed."""

    async def attempt(given: Try) -> Trajectory:
        if given.number == 1:
            raise ProviderFailed("the model went away")
        return tried(given.number, True, *GOOD)

    found = await keyless().parallel(ME, TASK, attempt, 3, deadline=soon())
    assert [one.verdict.outcome for one in found.tries] == ["success", "failure", "success"]
    assert found.tries[1].trajectory.error == "the model went away"

    async def bug(given: Try) -> Trajectory:
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup):
        await keyless().parallel(ME, TASK, bug, 2, deadline=soon())
    for k in (0, TRIES_MAX + 1):
        with pytest.raises(InvalidInput):
            await keyless().parallel(ME, TASK, attempt, k, deadline=soon())


async def test_each_try_sees_the_earlier_ones_and_their_checks() -> None:
    """Catches tries in sequence that know nothing of each other, or that go on after success."""
    seen: list[tuple[str, ...]] = []

    async def attempt(given: Try) -> Trajectory:
        seen.append(tuple(one.check for one in given.earlier))
        return tried(given.number, given.number == 2, *(GOOD if given.number == 2 else BAD))

    found = await keyless().sequential(ME, TASK, attempt, 5, deadline=soon())
    assert [len(checks) for checks in seen] == [0, 1, 2]
    assert "drop → denied" in seen[1][0]
    assert found.best_index == 2
    assert any("analyze orders" in item.content for item in found.items)
    seen.clear()
    await keyless().sequential(ME, TASK, attempt, 4, deadline=soon(), stop_on_success=False)
    assert len(seen) == 4


Script = Sequence[Reply] | Callable[[SeenRequest], Reply]


async def with_model(script: Script, attempts: Sequence[Trajectory]) -> tuple[Contrast, list[SeenRequest]]:
    async def attempt(given: Try) -> Trajectory:
        return attempts[given.number]

    with FakeProvider(script, keyless=True) as fake:
        settings = GatewaySettings.model_validate(
            {"openai": {"base_url": fake.openai_url}, "attempts": 1, "backoff_s": 0.0}
        )
        async with Gateway(settings) as gateway:
            matts = Matts(gateway, Judge(gateway, model="m"), model="m")
            found = await matts.parallel(ME, TASK, attempt, len(attempts), deadline=soon())
        return found, list(fake.requests)


async def test_a_model_contrasts_the_texts_themselves() -> None:
    """Catches a contrast over summaries: the call must carry what each try did, and how it was judged."""
    secret = "sk-proj-" + "a1B2c3D4e5F6g7H8" * 2
    items = [
        {"title": f"T{number}", "description": "d", "content": f"c {secret}", "lesson": "avoid"}
        for number in range(7)
    ]
    found, requests = await with_model(
        [Reply.text(json.dumps({"items": items}))], [tried(0, True, *GOOD), tried(1, False, *BAD)]
    )
    assert len(requests) == 1, "explicit verdicts need no judge"
    for words in ("analyze orders", "count all", "denied", '\\"judged\\": \\"failure\\"'):
        assert words in json.dumps(requests[0].last_text), words
    assert [item.title for item in found.items] == ["T0", "T1", "T2", "T3", "T4"]
    assert {(item.origin, item.lesson) for item in found.items} == {("model", "avoid")}
    assert secret not in found.items[0].content


async def test_a_model_that_fails_costs_no_rollout() -> None:
    """Catches tries lost to a judge or a contrast that breaks, and a fallback that is not told."""

    def broken(request: SeenRequest) -> Reply:
        return Reply.text("I would rather not")

    attempts = [tried(0, True, *GOOD, source="judge"), tried(1, False, *BAD)]
    found, _ = await with_model(broken, attempts)
    assert [one.verdict.source for one in found.tries] == ["mechanical", "test"]
    assert len(found.problems) == 2
    assert {item.origin for item in found.items} == {"mechanical"}


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_records_give_no_instructions(attack: str) -> None:
    """Catches words of a try outside of the quoted block of the contrast, or that close it."""
    nonce = "ab" * 16
    outside: list[str] = []
    for words in ("harmless", attack):
        step = TrajectoryStep(name="x", action=words, observation=words, error=words)
        run = Trajectory(id="t", task=words, steps=(step,), steps_total=1, answer=words, error=words)
        one = Tried(run, Verdict(outcome="failure", source="judge"))
        text = "\n\n".join(m.text for m in contrast_request("m", [one, one], nonce=nonce).messages)
        before, _, rest = text.partition(f"<record {nonce}>\n")
        inside, _, after = rest.partition(f"</record {nonce}>")
        assert all(line.startswith("| ") for line in inside.splitlines())
        outside.append(before + after)
    assert outside[0] == outside[1]


def verdict(outcome: Outcome, source: VerdictSource, confidence: float) -> Verdict:
    return Verdict(outcome=outcome, source=source, confidence=confidence)


runs = st.builds(
    Tried,
    st.builds(
        Trajectory,
        id=st.sampled_from(["a", "b", "c"]),
        task=st.just(TASK),
        steps=st.lists(
            st.builds(
                TrajectoryStep,
                name=st.sampled_from(["x", "y", "model"]),
                action=st.text(max_size=3),
                error=st.none() | st.text(max_size=3),
            ),
            max_size=5,
        ).map(tuple),
    ),
    st.builds(
        verdict,
        st.sampled_from(["success", "failure", "unknown", "impossible"]),
        st.sampled_from(["person", "judge", "mechanical"]),
        st.floats(0, 1),
    ),
)


@given(st.lists(runs, min_size=1, max_size=6))
def test_any_tries_can_be_contrasted(tries: list[Tried]) -> None:
    """Catches a failure called the best while there is a success, and a contrast that names shared calls."""
    best = tries[best_of(tries)]
    if any(one.verdict.outcome == "success" for one in tries):
        assert best.verdict.outcome == "success"
    else:
        order = ("unknown", "impossible", "failure")
        assert best.verdict.outcome == min((one.verdict.outcome for one in tries), key=order.index)
    found = mechanical_contrast(tries)
    assert len(found) <= ITEMS_MAX
    assert all(one["title"] and one["content"] and one["lesson"] in ("do", "avoid") for one in found)
    if all(one.verdict.outcome == "failure" for one in tries):
        assert all(one["lesson"] == "avoid" for one in found)


def test_items_are_read_strictly() -> None:
    """Catches prose taken for items, and an empty list taken for a malformed answer."""
    assert read_items('{"items": []}') == []
    assert read_items('x {"items": [{"title": "t", "content": "c"}, 3]} y')[0]["lesson"] == "do"
    for text in ("", "{}", '{"items": 3}', '{"items": [{"title": "t"}]}'):
        with pytest.raises(ProviderProtocol):
            read_items(text)
