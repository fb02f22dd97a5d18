"""Why an item is believed: its evidence put into words and numbers; and the numbers of a whole bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from agentic_flow.core.messages import Frozen
from agentic_flow.memory.confidence import (
    BELIEF_MIN,
    INTERVAL,
    SHOWN_MIN,
    Belief,
    believed,
    fading,
    posterior,
    prior,
)
from agentic_flow.memory.ledger import TAUGHT_RANK, Ledger, totals
from agentic_flow.memory.records import VERDICT_RANK, MemoryItem, Source

_WORDINGS_TOLD = 4
HISTOGRAM_BINS = 10


class BeliefReport(Frozen):
    """A belief in numbers: mean, central 90 % interval, and the weight of the evidence in it."""

    mean: float
    low: float
    high: float
    evidence: float


class Evidence(Frozen):
    """What one trajectory says of an item. `source`: who gave the verdict; None where it taught the item."""

    trajectory_id: str
    kind: Literal["taught", "use"]
    counts: Literal["for", "against", "neither"]
    weight: float
    weight_now: float
    source: str | None
    at_s: float


class Explanation(Frozen):
    """An item, what is believed of it, and from what. `folded_*` is evidence too old to be kept one by one.

    `recalled` says whether it can be recalled; `reasons` say why it can or not, and what moved the belief.
    """

    item: MemoryItem
    prior: BeliefReport
    belief: BeliefReport
    evidence: tuple[Evidence, ...]
    folded_successes: float
    folded_failures: float
    half_life_days: float
    sources: tuple[Source, ...]
    absorbed: tuple[str, ...]
    contradicts: tuple[str, ...]
    recalled: bool
    reasons: tuple[str, ...]


class BankStats(Frozen):
    """Numbers of a tenant's bank. `confidence` counts active items by posterior mean, in ten equal bins."""

    items: int = 0
    active: int = 0
    contradicted: int = 0
    merged: int = 0
    pruned: int = 0
    avoid: int = 0
    unbelieved: int = 0
    uses: int = 0
    shown: int = 0
    sources: int = 0
    by_origin: dict[str, int] = Field(default_factory=dict[str, int])
    confidence: tuple[int, ...] = (0,) * HISTOGRAM_BINS


def report(belief: Belief) -> BeliefReport:
    """The belief in numbers."""
    return BeliefReport(mean=belief.mean, low=belief.low, high=belief.high, evidence=belief.evidence)


def explanation(
    item: MemoryItem,
    ledger: Ledger,
    rivals: Mapping[str, MemoryItem],
    now_s: float,
    half_life_days: float,
) -> Explanation:
    """Everything that is known of why the item is believed.

    Args:
        item: The item.
        ledger: Its evidence.
        rivals: By id, the items that contradict it and still exist.
        now_s: Unix seconds.
        half_life_days: Age at which evidence counts half.
    """
    belief = posterior(item, now_s, half_life_days)
    sources_by_rank: dict[int, str | None] = {rank: name for name, rank in VERDICT_RANK.items()}
    sources_by_rank[TAUGHT_RANK] = None
    evidence = tuple(
        Evidence(
            trajectory_id=trajectory_id,
            kind=entry.kind,
            counts=entry.counts,
            weight=entry.weight,
            weight_now=entry.weight * fading(now_s - entry.at_s, half_life_days),
            source=sources_by_rank.get(entry.rank),
            at_s=entry.at_s,
        )
        for trajectory_id, entry in sorted(ledger.entries.items(), key=lambda pair: (pair[1].at_s, pair[0]))
    )
    folded = fading(now_s - ledger.folded_at_s, half_life_days)
    told = _told(item, ledger, now_s, half_life_days)
    return Explanation(
        item=item,
        prior=report(prior(item.origin)),
        belief=report(belief),
        evidence=evidence,
        folded_successes=ledger.folded_successes * folded,
        folded_failures=ledger.folded_failures * folded,
        half_life_days=half_life_days,
        sources=ledger.sources or item.sources,
        absorbed=ledger.absorbed,
        contradicts=item.contradicts,
        recalled=item.state == "active" and belief.mean >= BELIEF_MIN and told,
        reasons=tuple(_reasons(item, belief, evidence, rivals, told, now_s, half_life_days)),
    )


def _reasons(
    item: MemoryItem,
    belief: Belief,
    evidence: Sequence[Evidence],
    rivals: Mapping[str, MemoryItem],
    told: bool,
    now_s: float,
    half_life_days: float,
) -> list[str]:
    start = prior(item.origin)
    uses = [one for one in evidence if one.kind == "use"]
    lines = [
        f"origin {item.origin!r} starts at {start.mean:.0%} (weights {start.alpha:g} to {start.beta:g})",
        f"{sum(one.kind == 'taught' for one in evidence)} trajectories taught it and did not use it",
    ]
    for counts in ("for", "against", "neither"):
        chosen = [one for one in uses if one.counts == counts]
        if chosen:
            weight = sum(one.weight_now for one in chosen)
            lines.append(f"{len(chosen)} uses count {counts}, together {weight:.2f} now")
    lines.append(
        f"so it is believed at {belief.mean:.0%}, {INTERVAL:.0%} sure to be between {belief.low:.0%} and "
        f"{belief.high:.0%}; evidence halves every {half_life_days:g} days"
    )
    alone = believed(belief.alpha - belief.beta)
    lines.append(f"a recall that finds nothing else on its matter believes it at {alone:.0%}")
    share = fading(now_s - item.updated_at_s, half_life_days)
    lines += [
        f"in tasks told in the words {one.words!r} the evidence comes to {one.balance * share:+.2f}"
        for one in item.outcomes[-_WORDINGS_TOLD:]
    ]
    lines += [_verdict(item, belief, told)]
    for rival_id in item.contradicts:
        rival = rivals.get(rival_id)
        if rival is None:
            lines.append(f"it contradicted {rival_id!r}, which is gone")
        else:
            mean = posterior(rival, now_s, half_life_days).mean
            lines.append(f"it contradicts {rival_id!r} ({rival.title!r}), believed at {mean:.0%}")
    return lines


def _verdict(item: MemoryItem, belief: Belief, told: bool) -> str:
    if item.state == "merged":
        return f"it is not recalled: it was merged into {item.merged_into!r}"
    if item.state == "pruned":
        return "it is not recalled: it was pruned"
    if item.state == "contradicted":
        why = (
            "a better believed item says the opposite"
            if item.contradicts
            else (f"outcomes refute it: it is believed less than {BELIEF_MIN:.0%}")
        )
        return f"it is not recalled: {why}"
    if belief.mean < BELIEF_MIN:
        return f"it is not recalled: it is believed less than {BELIEF_MIN:.0%}"
    if not told:
        return f"it is not recalled by itself: recalls tell what they believe at {SHOWN_MIN:.0%} or more"
    return "it is recalled for tasks that are near enough to it"


def _told(item: MemoryItem, ledger: Ledger, now_s: float, half_life_days: float) -> bool:
    """Whether a recall for its own task tells it, when nothing else speaks of its matter."""
    start = prior(item.origin)
    at_s = max([ledger.folded_at_s, *(entry.at_s for entry in ledger.entries.values())])
    sums = totals(ledger, at_s, half_life_days)
    share = fading(now_s - at_s, half_life_days) if sums.failures > sums.successes else 1.0
    balance = start.alpha - start.beta + share * (sums.successes - sums.failures)
    return believed(balance) >= SHOWN_MIN


def tallied(stats: BankStats, items: Sequence[MemoryItem], now_s: float, half_life_days: float) -> BankStats:
    """The numbers with these items counted in."""
    counts = stats.model_dump()
    bins = list(stats.confidence)
    origins = dict(stats.by_origin)
    for item in items:
        counts["items"] += 1
        counts[item.state] += 1
        if item.state != "active":
            continue
        mean = posterior(item, now_s, half_life_days).mean
        bins[min(HISTOGRAM_BINS - 1, int(mean * HISTOGRAM_BINS))] += 1
        origins[item.origin] = origins.get(item.origin, 0) + 1
        counts["avoid"] += item.lesson == "avoid"
        counts["unbelieved"] += mean < BELIEF_MIN
        counts["uses"] += item.uses
        counts["shown"] += item.shown
        counts["sources"] += item.sources_total
    return BankStats.model_validate({**counts, "by_origin": origins, "confidence": tuple(bins)})
