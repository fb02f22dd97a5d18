"""What an item does: success of the runs that were shown it against that of runs from which it was kept back.

Whether an item is kept back is drawn by chance for each item of each recall (`assign`), so that nothing else
differs between the two arms: that comparison is randomised, and by intention to treat (shown, whether the
agent used it or not). What an agent cites is its own choice, which goes with how hard its task is: comparing
runs that cited an item with runs that were shown it and did not is observational, is marked so, and never
mixed with the first.

One row a recall in `memory.recalls`, gone after `OUTCOME_DAYS`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict
from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Item
from agentic_flow.memory.certificates import Certificate
from agentic_flow.memory.intervals import LEVEL, Arms, pooled, stratified
from agentic_flow.memory.intervals import newcombe as difference_of
from agentic_flow.memory.records import RECALLS, VERDICT_RANK, Id, Outcome, Share, Verdict, VerdictSource
from agentic_flow.memory.rows import Rows

ARM_MIN = 10
"""Runs that each arm needs before anything is said of the difference."""

OUTCOME_DAYS = 365.0
"""Age at which the outcome of a recall no longer counts and is removed."""

TRIES_MAX = 20
"""Writers of the same recall's outcome that may come between."""

_KEY = "o."
_DAY_S = 86_400.0

Finding = Literal["no evidence yet", "unclear", "helps", "harms"]
"""`unclear`: enough runs, and an interval that holds both signs."""


class Exposure(Frozen):
    """What a run was given: ids of items shown and kept back, the chance of the latter.

    `cited` are those it said it used. `stratum` is whatever else should be compared with its like only: an
    agent, a model, a kind of task.
    """

    recall_id: Id
    shown: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    cited: tuple[str, ...] = ()
    share: Share = 0.0
    stratum: Annotated[str, Field(max_length=200)] = ""

    @classmethod
    def of(cls, certificate: Certificate, *, cited: Collection[str] = (), stratum: str = "") -> Exposure:
        """The exposure that a certificate attests."""
        return cls(
            recall_id=certificate.id,
            shown=certificate.shown,
            withheld=certificate.withheld,
            cited=tuple(one for one in certificate.shown if one in cited),
            share=certificate.withheld_share,
            stratum=stratum,
        )


class _Outcome(Frozen):
    """An exposure and how its run ended."""

    exposure: Exposure
    outcome: Outcome
    source: VerdictSource
    confidence: float
    at_s: float


class Estimate(Frozen):
    """Two arms and the difference of their success.

    `difference` with `low` and `high` (95 %) compares all runs of the arms; `within` with `within_low` and
    `within_high` only like with like, by strata. None while there is too little. `strata` counts those that
    have both arms. `finding` goes by the second.
    """

    kind: Literal["randomised", "observational"]
    with_n: int
    with_successes: int
    without_n: int
    without_successes: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    within: float | None = None
    within_low: float | None = None
    within_high: float | None = None
    strata: int = 0
    finding: Finding = "no evidence yet"


class ItemUplift(Frozen):
    """What is known of the effect of one item. `randomised` (shown against kept back) shows what it causes;
    `observational` (cited against shown and not cited) only what goes together."""

    item_id: str
    randomised: Estimate
    observational: Estimate


class UpliftReport(Frozen):
    """Items by id, and memory as a whole: runs shown every candidate against runs shown none, by chance.

    Of twenty items that do nothing, one has by chance an interval of 95 % without zero: `items` says how many
    were compared. `recalls` have an outcome that counts; `randomised_recalls` of them drew what to show.
    """

    recalls: int
    randomised_recalls: int
    whole: Estimate
    items: tuple[ItemUplift, ...]


def assign(rng: random.Random, item_ids: Sequence[str], share: float) -> tuple[str, ...]:
    """The items to keep back: each by itself, with the chance `share`.

    Args:
        rng: Draws once for each item.
        item_ids: What would be shown.
        share: 0 to 1.
    """
    return tuple(one for one in item_ids if rng.random() < share)


class Uplift:
    """Keeps how recalls turned out and compares.

    Args:
        store: Keeps them, in the namespace `memory.recalls`.
        clock: Dates them.
    """

    def __init__(self, store: VectorStore, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._rows = Rows(store, RECALLS, searched=False)
        self._clock = clock

    async def record(self, tenant: str, exposure: Exposure, verdict: Verdict) -> bool:
        """Note how the run of a recall ended; whether that changed anything.

        A recall has one outcome, by the most trusted verdict and the newest of equals: noting one twice
        counts once.

        Raises:
            Conflict: others kept changing the same outcome.
        """
        key = _KEY + exposure.recall_id
        now_s = self._clock.time_s()
        fresh = _Outcome(
            exposure=exposure,
            outcome=verdict.outcome,
            source=verdict.source,
            confidence=verdict.confidence,
            at_s=now_s,
        )
        for _ in range(TRIES_MAX):
            row = (await self._rows.get(tenant, [key])).get(key)
            if row is not None:
                known = _read(row)
                if VERDICT_RANK[known.source] > VERDICT_RANK[fresh.source]:
                    return False
                # The age is that of the first: a verdict that comes late does not make the run a later one.
                fresh = fresh.model_copy(update={"at_s": known.at_s})
                if known == fresh:
                    return False
            item = Item(
                id=key,
                metadata={"kind": "outcome", **fresh.model_dump(mode="json")},
                expires_at_s=fresh.at_s + OUTCOME_DAYS * _DAY_S,
            )
            try:
                await self._rows.put(tenant, [item], expected_version=row.version if row else 0)
            except Conflict:
                continue
            return True
        raise Conflict(f"the outcome of recall {exposure.recall_id!r} kept changing", hint="record it again")

    async def report(
        self, tenant: str, *, item_ids: Collection[str] | None = None, since_s: float = 0.0
    ) -> UpliftReport:
        """What each item does, as far as the outcomes tell.

        Args:
            tenant: Whose.
            item_ids: Only these; all that were ever shown or kept back, when None.
            since_s: Only runs recorded since, Unix seconds.
        """
        tally = _Tally()
        async for row in self._rows.all(tenant, where={"kind": "outcome"}):
            outcome = _read(row)
            if outcome.outcome in ("success", "failure") and outcome.at_s >= since_s:
                tally.count(outcome)
        known = tally.items() if item_ids is None else set(item_ids)
        return UpliftReport(
            recalls=tally.recalls,
            randomised_recalls=tally.randomised_recalls,
            whole=estimate("randomised", tally.whole.values()),
            items=tuple(
                ItemUplift(
                    item_id=one,
                    randomised=estimate("randomised", tally.randomised[one].values()),
                    observational=estimate("observational", tally.observational[one].values()),
                )
                for one in sorted(known)
            ),
        )


_Strata = dict[tuple[object, ...], Arms]


class _Tally:
    """Runs and successes by item, arm and stratum."""

    def __init__(self) -> None:
        self.recalls = 0
        self.randomised_recalls = 0
        self.randomised: defaultdict[str, _Strata] = defaultdict(dict)
        self.observational: defaultdict[str, _Strata] = defaultdict(dict)
        self.whole: _Strata = {}

    def count(self, outcome: _Outcome) -> None:
        given = outcome.exposure
        success = outcome.outcome == "success"
        self.recalls += 1
        cited = set(given.cited)
        for one in given.shown:
            _add(self.observational[one], (given.stratum,), one in cited, success)
        if not 0.0 < given.share < 1.0:
            return
        self.randomised_recalls += 1
        # Runs with other chances of assignment may be of other times: they are compared among themselves.
        stratum = (given.share, given.stratum)
        for one in given.shown:
            _add(self.randomised[one], stratum, True, success)
        for one in given.withheld:
            _add(self.randomised[one], stratum, False, success)
        # The chance to be shown all or nothing hangs on how many candidates there were.
        if not (given.shown and given.withheld) and (given.shown or given.withheld):
            candidates = len(given.shown) + len(given.withheld)
            _add(self.whole, (*stratum, candidates), bool(given.shown), success)

    def items(self) -> set[str]:
        """Every item that was shown or kept back."""
        return set(self.randomised) | set(self.observational)


def estimate(kind: Literal["randomised", "observational"], strata: Collection[Arms]) -> Estimate:
    """The difference between two arms, if both have enough runs.

    Args:
        kind: How runs came into their arm.
        strata: Runs and successes; `with` is the arm of the item.
    """
    arms = pooled(strata)
    counts = arms._asdict()
    within = stratified(strata, LEVEL)
    if min(arms.with_n, arms.without_n) < ARM_MIN or within is None:
        return Estimate(kind=kind, **counts)
    overall = difference_of(arms, LEVEL)
    finding: Finding = "helps" if within.low > 0 else "harms" if within.high < 0 else "unclear"
    return Estimate(
        kind=kind,
        **counts,
        difference=overall.value,
        low=overall.low,
        high=overall.high,
        within=within.value,
        within_low=within.low,
        within_high=within.high,
        strata=sum(1 for one in strata if one.with_n and one.without_n),
        finding=finding,
    )


def _add(strata: _Strata, stratum: tuple[object, ...], treated: bool, success: bool) -> None:
    arms = strata.get(stratum, Arms())
    if treated:
        arms = arms._replace(with_n=arms.with_n + 1, with_successes=arms.with_successes + success)
    else:
        arms = arms._replace(without_n=arms.without_n + 1, without_successes=arms.without_successes + success)
    strata[stratum] = arms


def _read(row: Item) -> _Outcome:
    fields: Mapping[str, object] = {name: value for name, value in row.metadata.items() if name != "kind"}
    return _Outcome.from_record(fields)
