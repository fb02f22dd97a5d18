"""What memory did over time, as numbers: success with and without it, how the bank grew, what is believed.

Pure functions over trajectories and items; `plots` draws what they return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from agentic_flow.core.messages import Frozen
from agentic_flow.memory.records import MemoryItem, Trajectory

PERIODS_MAX = 14
"""Points of a curve over time."""
BINS = 10
"""Bars of the distribution of confidence."""

_Z_95 = 1.959964
_DAY_S = 86_400.0
# A period is a round length that a reader knows.
_PERIODS_S = (60.0, 600.0, 3600.0, 6 * 3600.0, _DAY_S, 7 * _DAY_S, 30 * _DAY_S, 91 * _DAY_S, 365 * _DAY_S)

Arm = Literal["with", "without"]


class SuccessPoint(Frozen):
    """Judged runs of one period that were shown items ("with") or none; `low` and `high` bound the share with
    95 % (Wilson's score interval). Periods without such runs have no point."""

    arm: Arm
    from_s: float
    until_s: float
    runs: int
    successes: int
    share: float
    low: float
    high: float


class GrowthPoint(Frozen):
    """How much there was at the end of a period: items ever kept, those of them that are active now, and
    trajectories recorded (of those that are still here)."""

    at_s: float
    items: int
    active: int
    trajectories: int


class ConfidenceBin(Frozen):
    """Active items by mean belief, from `low` to below `high`; `tested`: outcomes of uses are in it."""

    low: float
    high: float
    tested: int
    untested: int


class MemorySeries(Frozen):
    """All curves. `judged` and `unjudged` count the ended runs; those without a verdict are in no curve."""

    period_s: float
    success: tuple[SuccessPoint, ...] = ()
    growth: tuple[GrowthPoint, ...] = ()
    confidence: tuple[ConfidenceBin, ...] = ()
    judged: int = 0
    unjudged: int = 0


def memory_series(
    trajectories: Iterable[Trajectory],
    items: Iterable[MemoryItem],
    *,
    shown: Mapping[str, bool],
    belief: Callable[[MemoryItem], float],
    now_s: float,
) -> MemorySeries:
    """The curves of what is stored.

    Args:
        trajectories: Those of a tenant; open ones are left out.
        items: Of the same tenant.
        shown: Id of a recall → whether the agent was shown an item by it.
        belief: Mean of an item's posterior now.
        now_s: End of the last period.
    """
    ended = [one for one in trajectories if one.outcome != "open"]
    kept = list(items)
    times = [_time_s(one) for one in ended] + [item.created_at_s for item in kept]
    first_s = min((at_s for at_s in times if at_s > 0), default=now_s)
    period_s = _period_s(now_s - first_s)
    start_s = math.floor(first_s / period_s) * period_s
    # Items of an import can be older by far than all else; the last periods are the ones that matter.
    start_s = max(start_s, math.floor(now_s / period_s) * period_s - (PERIODS_MAX - 1) * period_s)
    ends = _ends(start_s, now_s, period_s)
    judged = [one for one in ended if _success(one) is not None]
    return MemorySeries(
        period_s=period_s,
        success=tuple(_success_points(judged, shown, ends, period_s)),
        growth=tuple(_growth_points(ended, kept, ends)) if times else (),
        confidence=_confidence_bins([item for item in kept if item.state == "active"], belief),
        judged=len(judged),
        unjudged=len(ended) - len(judged),
    )


def wilson(successes: int, runs: int) -> tuple[float, float]:
    """The 95 % score interval of a share.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    if runs == 0:
        return 0.0, 1.0
    share = successes / runs
    square = _Z_95 * _Z_95
    middle = share + square / (2 * runs)
    spread = _Z_95 * math.sqrt(share * (1 - share) / runs + square / (4 * runs * runs))
    scale = 1 + square / runs
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _success(trajectory: Trajectory) -> bool | None:
    """Whether the run reached its goal by the verdict that counts; None: nothing tells, or nobody could."""
    verdict = trajectory.verdict
    if verdict is None or verdict.outcome in ("unknown", "impossible"):
        return None
    return verdict.outcome == "success"


def _time_s(trajectory: Trajectory) -> float:
    return trajectory.ended_at_s or trajectory.started_at_s


def _period_s(span_s: float) -> float:
    for period_s in _PERIODS_S:
        if span_s / period_s <= PERIODS_MAX - 1:
            return period_s
    return _PERIODS_S[-1]


def _ends(start_s: float, now_s: float, period_s: float) -> list[float]:
    count = max(1, math.floor((now_s - start_s) / period_s) + 1)
    return [start_s + number * period_s for number in range(1, min(count, PERIODS_MAX) + 1)]


def _success_points(
    judged: Sequence[Trajectory], shown: Mapping[str, bool], ends: Sequence[float], period_s: float
) -> Iterable[SuccessPoint]:
    arms: tuple[Arm, ...] = ("with", "without")
    for arm in arms:
        own = [one for one in judged if shown.get(one.recall_id or "", False) == (arm == "with")]
        for end_s in ends:
            outcomes = [_success(one) for one in own if end_s - period_s <= _time_s(one) < end_s]
            if not outcomes:
                continue
            successes = sum(outcome is True for outcome in outcomes)
            low, high = wilson(successes, len(outcomes))
            yield SuccessPoint(
                arm=arm,
                from_s=end_s - period_s,
                until_s=end_s,
                runs=len(outcomes),
                successes=successes,
                share=successes / len(outcomes),
                low=low,
                high=high,
            )


def _growth_points(
    ended: Sequence[Trajectory], items: Sequence[MemoryItem], ends: Sequence[float]
) -> Iterable[GrowthPoint]:
    for end_s in ends:
        made = [item for item in items if item.created_at_s < end_s]
        yield GrowthPoint(
            at_s=end_s,
            items=len(made),
            active=sum(item.state == "active" for item in made),
            trajectories=sum(_time_s(one) < end_s for one in ended),
        )


def _confidence_bins(
    active: Sequence[MemoryItem], belief: Callable[[MemoryItem], float]
) -> tuple[ConfidenceBin, ...]:
    tested, untested = [0] * BINS, [0] * BINS
    for item in active:
        place = min(BINS - 1, max(0, int(belief(item) * BINS)))
        (tested if item.uses else untested)[place] += 1
    if not active:
        return ()
    return tuple(
        ConfidenceBin(
            low=place / BINS, high=(place + 1) / BINS, tested=tested[place], untested=untested[place]
        )
        for place in range(BINS)
    )
