"""Intervals for shares and for the difference of two shares, which hold for few observations as well.

Sources: E. Wilson, "Probable inference, the law of succession, and statistical inference" (1927);
R. Newcombe, "Interval estimation for the difference between independent proportions" (1998, method 10);
weights of strata by N. Mantel and W. Haenszel (1959); the score interval of a weighted share with L. Kish's
effective number of trials, as in N. Dean and M. Pagano, "Evaluating confidence interval methods for binomial
proportions in clustered surveys" (2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95
"""Share of such intervals that contain the truth."""


class Arms(NamedTuple):
    """Trials and successes of two arms."""

    with_n: int = 0
    with_successes: int = 0
    without_n: int = 0
    without_successes: int = 0


class Difference(NamedTuple):
    """Share of the first arm less that of the second, and its interval; from -1 to 1."""

    value: float
    low: float
    high: float


def wilson(successes: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a share; from 0 to 1 when nothing was tried.

    Args:
        successes: 0 to `trials`.
        trials: Independent trials; of a weighted share, those of an unweighted one of like precision.
        level: Confidence, between 0 and 1.
    """
    if trials == 0:
        return 0.0, 1.0
    z = _z(level)
    share = min(1.0, successes / trials)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # The share lies inside for every count; rounding alone could say otherwise at its ends.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def newcombe(arms: Arms, level: float = LEVEL) -> Difference:
    """Difference of two independent shares by combining their score intervals.

    Raises:
        ValueError: an arm has no trial.
    """
    if not arms.with_n or not arms.without_n:
        raise ValueError(f"both arms need trials, not {arms!r}")
    return _between(arms.with_successes, arms.with_n, arms.without_successes, arms.without_n, level)


def stratified(strata: Iterable[Arms], level: float = LEVEL) -> Difference | None:
    """Difference within strata, averaged by Mantel-Haenszel weights; None when no stratum has both arms.

    What differs between strata (when, for whom, with which chance of assignment) cannot pass for an effect.
    With one stratum it is `newcombe`. The interval errs on the wide side where strata differ much.
    """
    both = [arms for arms in strata if arms.with_n and arms.without_n]
    weights = [arms.with_n * arms.without_n / (arms.with_n + arms.without_n) for arms in both]
    total = sum(weights)
    if not total:
        return None
    ours = theirs = our_spread = their_spread = 0.0
    for arms, weight in zip(both, weights, strict=True):
        share = weight / total
        ours += share * arms.with_successes / arms.with_n
        theirs += share * arms.without_successes / arms.without_n
        our_spread += share**2 / arms.with_n
        their_spread += share**2 / arms.without_n
    # Strata of one or two runs say nothing of their own spread: each arm is taken as one weighted share.
    return _between(ours / our_spread, 1 / our_spread, theirs / their_spread, 1 / their_spread, level)


def _between(
    our_successes: float, our_trials: float, their_successes: float, their_trials: float, level: float
) -> Difference:
    ours, theirs = our_successes / our_trials, their_successes / their_trials
    our_low, our_high = wilson(our_successes, our_trials, level)
    their_low, their_high = wilson(their_successes, their_trials, level)
    value = ours - theirs
    return Difference(
        value,
        max(-1.0, value - math.hypot(ours - our_low, their_high - theirs)),
        min(1.0, value + math.hypot(our_high - ours, theirs - their_low)),
    )


def pooled(strata: Iterable[Arms]) -> Arms:
    """All strata as one."""
    sums = [sum(column) for column in zip(*strata, strict=True)]
    return Arms(*sums) if sums else Arms()


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
