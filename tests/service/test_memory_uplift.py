"""What items do: outcomes of recalls, kept once; compared by chance and by choice, apart from each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.memory.certificates import Certificates, Head, certify
from agentic_flow.memory.records import (
    RECALLS,
    MemoryItem,
    Outcome,
    Recall,
    RecalledItem,
    Verdict,
    VerdictSource,
)
from agentic_flow.memory.uplift import ARM_MIN, OUTCOME_DAYS, Exposure, Uplift, assign

pytestmark = pytest.mark.anyio

T = "tenant"
SETTINGS = AgentDBSettings(embedding_dimension=256)


class SetClock(SystemClock):
    """A clock that a test sets forward."""

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


def verdict(outcome: Outcome, source: VerdictSource = "judge") -> Verdict:
    return Verdict(outcome=outcome, source=source)


def ended(success: bool) -> Verdict:
    return verdict("success" if success else "failure")


async def test_chance_shows_what_citing_hides(db: AgentDB) -> None:
    """Catches observational data taken for evidence: agents cite the useless item when a task is easy."""
    uplift, rng = Uplift(db), random.Random(7)
    for number in range(400):
        easy = rng.random() < 0.5
        withheld = assign(rng, ["useless", "good", "bad"], 0.5)
        shown = tuple(one for one in ("useless", "good", "bad") if one not in withheld)
        chance = (0.7 if easy else 0.2) + 0.25 * ("good" in shown) - 0.25 * ("bad" in shown)
        exposure = Exposure(
            recall_id=f"r{number}",
            shown=shown,
            withheld=withheld,
            cited=tuple(one for one in shown if one == "useless" and easy),
            share=0.5,
        )
        await uplift.record(T, exposure, ended(rng.random() < chance))
    report = await uplift.report(T)
    items = {one.item_id: one for one in report.items}
    assert (report.recalls, report.randomised_recalls) == (400, 400)
    assert {name: one.randomised.finding for name, one in items.items()} == {
        "useless": "unclear",
        "good": "helps",
        "bad": "harms",
    }
    assert items["useless"].observational.finding == "helps", "what goes with easy tasks looks like help"
    assert (items["useless"].observational.kind, items["useless"].randomised.kind) == (
        "observational",
        "randomised",
    )
    good = items["good"].randomised
    assert good.within is not None
    assert good.within_low is not None
    assert good.within_high is not None
    assert good.within_low < 0.25 < good.within_high
    assert good.with_n + good.without_n == 400
    assert items["good"].observational.finding == "no evidence yet", "nobody cited it"


async def test_nothing_is_claimed_of_few_runs(db: AgentDB) -> None:
    """Catches an effect told from a handful of runs, however clear they look."""
    uplift = Uplift(db)
    for number in range(2 * ARM_MIN - 1):
        arm: dict[str, Any] = {"shown": ("a",)} if number % 2 == 0 else {"withheld": ("a",)}
        await uplift.record(T, Exposure(recall_id=f"r{number}", share=0.5, **arm), ended(number % 2 == 0))
    (few,) = (await uplift.report(T)).items
    assert few.randomised.finding == "no evidence yet"
    assert (few.randomised.difference, few.randomised.within, few.randomised.low) == (None, None, None)
    assert (few.randomised.with_n, few.randomised.without_n) == (ARM_MIN, ARM_MIN - 1)
    await uplift.record(T, Exposure(recall_id="last", share=0.5, withheld=("a",)), ended(False))
    report = await uplift.report(T)
    assert report.items[0].randomised.finding == "helps"
    assert report.whole.finding == "helps", "the runs were shown everything or nothing"
    assert (await uplift.report(T, item_ids=["never"])).items[0].randomised.with_n == 0
    assert (await Uplift(db).report("other")).items == ()


async def test_a_change_of_the_chance_is_no_effect(db: AgentDB) -> None:
    """Catches times being compared: when things went well most were shown it, when badly most were not."""
    uplift, rng = Uplift(db), random.Random(3)
    for number in range(300):
        share = 0.1 if number < 150 else 0.9
        arm: dict[str, Any] = {"withheld": ("a",)} if rng.random() < share else {"shown": ("a",)}
        success = rng.random() < (0.9 if number < 150 else 0.2)
        await uplift.record(T, Exposure(recall_id=f"r{number}", share=share, **arm), ended(success))
    (one,) = (await uplift.report(T)).items
    assert one.randomised.low is not None
    assert one.randomised.low > 0, "all runs together look like help"
    assert one.randomised.strata == 2
    assert one.randomised.finding == "unclear"


async def test_what_was_not_drawn_is_not_randomised(db: AgentDB) -> None:
    """Catches runs without any chance of keeping back among the randomised ones."""
    uplift = Uplift(db)
    for number in range(40):
        cited = ("a",) if number % 2 else ()
        await uplift.record(
            T, Exposure(recall_id=f"r{number}", shown=("a",), cited=cited), ended(bool(cited))
        )
    report = await uplift.report(T)
    assert (report.recalls, report.randomised_recalls, report.whole.with_n) == (40, 0, 0)
    assert report.items[0].randomised.with_n == 0
    assert report.items[0].observational.finding == "helps"


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        ([("failure", "judge"), ("success", "person")], "success"),
        ([("success", "person"), ("failure", "judge")], "success"),
        ([("failure", "judge"), ("success", "judge")], "success"),
        ([("success", "judge"), ("success", "judge")], "success"),
        ([("success", "judge"), ("impossible", "person")], None),
        ([("unknown", "mechanical")], None),
    ],
)
async def test_a_recall_counts_once_by_its_best_verdict(
    db: AgentDB, said: list[tuple[Outcome, VerdictSource]], counted: Literal["success"] | None
) -> None:
    """Catches outcomes counted twice, a judge that overrules a person, and no answer taken for failure."""
    uplift = Uplift(db)
    exposure = Exposure(recall_id="r", shown=("a",), share=0.2)
    for outcome, source in said:
        await uplift.record(T, exposure, verdict(outcome, source))
    report = await uplift.report(T, item_ids=["a"])
    assert report.recalls == (1 if counted else 0)
    assert report.items[0].randomised.with_successes == (1 if counted else 0)


async def test_writers_of_one_outcome_do_not_lose_the_best(tmp_path: Path, clock: SetClock) -> None:
    """Catches a judge's verdict that comes between a person's reading and writing and wins."""
    async with AgentDB(tmp_path, SETTINGS) as one, AgentDB(tmp_path, SETTINGS) as two:
        sources: list[VerdictSource] = ["judge", "person", "reviewer", "mechanical", "test", "judge"]
        for turn in range(5):
            exposure = Exposure(recall_id=f"r{turn}", shown=("a",), share=0.2)
            await asyncio.gather(
                *(
                    Uplift((one, two)[index % 2]).record(
                        T, exposure, verdict("success" if source == "person" else "failure", source)
                    )
                    for index, source in enumerate(sources)
                )
            )
        report = await Uplift(one).report(T)
        assert (report.recalls, report.items[0].randomised.with_successes) == (5, 5)


async def test_outcomes_end_with_their_time(db: AgentDB, clock: SetClock) -> None:
    """Catches outcomes kept forever, and a late verdict that makes an old run a new one."""
    uplift = Uplift(db, clock=clock)
    await uplift.record(T, Exposure(recall_id="old", shown=("a",), share=0.2), ended(True))
    clock.ahead_s = 300 * 86_400.0
    await uplift.record(T, Exposure(recall_id="new", shown=("a",), share=0.2), ended(True))
    await uplift.record(T, Exposure(recall_id="old", shown=("a",), share=0.2), verdict("failure", "person"))
    assert (await uplift.report(T)).recalls == 2
    assert (await uplift.report(T, since_s=clock.time_s() - 1000)).recalls == 1
    clock.ahead_s = (OUTCOME_DAYS + 1) * 86_400.0
    assert (await uplift.report(T)).recalls == 1
    clock.ahead_s = 2 * OUTCOME_DAYS * 86_400.0
    assert (await uplift.report(T)).recalls == 0


async def test_outcomes_and_certificates_do_not_disturb_each_other(db: AgentDB) -> None:
    """Catches rows of one taken for rows of the other: they share a namespace."""

    class NoItems:
        async def get(self, tenant: str, ids: object) -> list[MemoryItem]:
            return []

    item = MemoryItem(id="a", title="t", content="c")
    recall = Recall(id="r", task="x", items=(RecalledItem(item=item, score=1.0),), withheld=("b",))
    certificate = await Certificates(db, NoItems()).issue(T, recall, withheld_share=0.3)
    exposure = Exposure.of(certificate, cited={"a", "z"}, stratum="coder")
    assert exposure == Exposure(
        recall_id="r", shown=("a",), withheld=("b",), cited=("a",), share=0.3, stratum="coder"
    )
    assert certify(recall, Head(), at_s=certificate.at_s, withheld_share=0.3) == certificate
    await Uplift(db).record(T, exposure, ended(True))
    report = await Certificates(db, NoItems()).verify(T)
    assert (report.whole, report.certificates, report.gone) == (True, 1, 1)
    assert [one.item_id for one in (await Uplift(db).report(T)).items] == ["a", "b"]
    assert sorted(one.id for one in (await db.list_items(T, RECALLS)).items) == [
        "c.000000000001",
        "o.r",
        "r.r",
    ]
