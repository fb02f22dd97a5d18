"""How far an item is believed: a Beta posterior over whether a run that uses it succeeds.

Evidence is weighted (a use that the agent only may have made counts less than one it cited), ages with a
half-life, and is added to a weak prior. Old evidence fading lets an item that once failed be tried again.

Source of the interval: the regularised incomplete beta function by its continued fraction, W. Press et al.,
"Numerical Recipes" (3rd edition, section 6.4), inverted by bisection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from agentic_flow.memory.records import VERDICT_RANK, MemoryItem, Outcome, VerdictSource

Origin = Literal["model", "mechanical", "imported", "person"]

PRIORS: dict[Origin, tuple[float, float]] = {
    "model": (1.0, 1.0),
    "mechanical": (1.0, 1.0),
    "imported": (2.0, 1.0),
    "person": (4.0, 1.0),
}
"""Weights of success and failure before any evidence, by origin: a coin; more for what a person wrote, and
for what is imported as much as a run adds that surely taught it."""

TAUGHT_WEIGHT = 0.8
"""What one trajectory adds to the belief in an item it taught: as much as a use of it would by the verdict of
a judge who is 80 % sure. For of a run that was free to act otherwise the outcome says no less."""

LOG_ODDS_PER_WEIGHT = 1.73
"""What evidence of weight 1 adds to the log-odds of an item: a verdict that is right with a chance of 80 %
weighs 0.8, and makes what it speaks for log(0.8 / 0.2) likelier."""

BELIEF_MIN = 0.5
"""An item whose posterior mean is below this is refuted, and not recalled: it is more likely to fail than to
help. As evidence fades towards a prior of one half, it takes new evidence to bring it back."""

SHOWN_MIN = 0.55
"""What a recall must believe a lesson at least to tell it: more than what it knows nothing of here. One
verdict (80 %) is enough, and still where a task has only every second word of the lesson's."""

INTERVAL = 0.9
"""Mass of the credible interval between `low` and `high`."""

DAY_S = 86_400.0

_LOG_ODDS_MAX = 4.6
"""Of 99 %: however much verdicts agree, no lesson of theirs is surer, for it may not fit."""

_FRACTION_STEPS = 300
_BISECTIONS = 50


@dataclass(frozen=True, slots=True)
class Belief:
    """A Beta distribution by its two weights; the interval is computed when it is asked for."""

    alpha: float
    beta: float
    evidence: float
    """Weight of the evidence in it, without the prior."""

    @property
    def mean(self) -> float:
        """Expected chance that a run that uses the item succeeds."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def low(self) -> float:
        """Lower end of the central 90 % credible interval."""
        return quantile(self.alpha, self.beta, (1 - INTERVAL) / 2)

    @property
    def high(self) -> float:
        """Upper end of it."""
        return quantile(self.alpha, self.beta, (1 + INTERVAL) / 2)

    @property
    def refuted(self) -> bool:
        """Whether it is more likely to fail than to help."""
        return self.mean < BELIEF_MIN


def prior(origin: Origin) -> Belief:
    """What is believed of an item of this origin before anything is known of it."""
    alpha, beta = PRIORS[origin]
    return Belief(alpha, beta, 0.0)


def fading(age_s: float, half_life_days: float) -> float:
    """Share of its weight that evidence of this age (seconds) still has; all of it if it is from the future.

    Args:
        age_s: Its age.
        half_life_days: Age at which half is left.
    """
    return math.exp2(-max(0.0, age_s) / (half_life_days * DAY_S))


def posterior(item: MemoryItem, now_s: float, half_life_days: float) -> Belief:
    """What is believed of the item now.

    Args:
        item: Its `successes` and `failures` are as of its `updated_at_s`.
        now_s: Unix seconds.
        half_life_days: Age at which evidence counts half.
    """
    return weighed(item.origin, item.successes, item.failures, now_s - item.updated_at_s, half_life_days)


def weighed(origin: Origin, successes: float, failures: float, age_s: float, half_life_days: float) -> Belief:
    """`posterior` of bare numbers: weights that are `age_s` old."""
    share = fading(age_s, half_life_days)
    alpha, beta = PRIORS[origin]
    return Belief(alpha + successes * share, beta + failures * share, (successes + failures) * share)


def decayed(item: MemoryItem, now_s: float, half_life_days: float) -> MemoryItem:
    """The item with its evidence as it weighs at `now_s`; the belief in it is the same before and after."""
    if now_s <= item.updated_at_s:
        return item
    share = fading(now_s - item.updated_at_s, half_life_days)
    return item.model_copy(
        update={
            "successes": item.successes * share,
            "failures": item.failures * share,
            "outcomes": tuple(
                one.model_copy(update={"balance": one.balance * share}) for one in item.outcomes
            ),
            "updated_at_s": now_s,
        }
    )


def believed(weight: float) -> float:
    """Chance that something holds that this much more evidence speaks for than against, prior included.

    Args:
        weight: Of what speaks for it, less that of what speaks against it.
    """
    odds = LOG_ODDS_PER_WEIGHT * weight
    return 1.0 / (1.0 + math.exp(-min(_LOG_ODDS_MAX, max(-_LOG_ODDS_MAX, odds))))


@dataclass(frozen=True, slots=True)
class Credit:
    """What the outcome of a run says of one item that the run was shown.

    Args:
        item_id: The item.
        trajectory_id: The run; a second credit of it replaces the first unless its verdict is less trusted.
        outcome: How the run ended; `unknown` and `impossible` say nothing of the item.
        weight: How surely the item took part in it, times how sure the verdict is: 0 to 1.
        source: Who gave the verdict.
        task: What the run was to do: it says where the item held or did not.
    """

    item_id: str
    trajectory_id: str
    outcome: Outcome
    weight: float = 1.0
    source: VerdictSource = "judge"
    task: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight {self.weight!r} is not from 0 to 1")

    @property
    def rank(self) -> int:
        """Trust in the verdict; more is more."""
        return VERDICT_RANK[self.source]


def credit_weight(cited: bool, shown: int, verdict_confidence: float) -> float:
    """Weight of a credit: what the run cited counts in full; what it was only shown, little.

    Args:
        cited: Whether the run said that it used the item.
        shown: How many items it was shown.
        verdict_confidence: 0 to 1.
    """
    share = 1.0 if cited else 0.5 / max(1, shown)
    return share * min(1.0, max(0.0, verdict_confidence))


def quantile(alpha: float, beta: float, mass: float) -> float:
    """Where the Beta distribution has `mass` (0 to 1) of its probability below.

    Args:
        alpha: Above 0.
        beta: Above 0.
        mass: 0 to 1.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if beta_cdf(alpha, beta, middle) < mass:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_cdf(alpha: float, beta: float, x: float) -> float:
    """Probability below `x` under the Beta distribution: the regularised incomplete beta function."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = math.exp(
        math.lgamma(alpha + beta)
        - math.lgamma(alpha)
        - math.lgamma(beta)
        + alpha * math.log(x)
        + beta * math.log1p(-x)
    )
    # The fraction converges fast on this side of the mean only.
    if x < (alpha + 1) / (alpha + beta + 2):
        return front * _continued_fraction(alpha, beta, x) / alpha
    return 1.0 - front * _continued_fraction(beta, alpha, 1.0 - x) / beta


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Lentz's method; `tiny` stands in for a zero denominator."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, _FRACTION_STEPS):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + step * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + step / c
            c = c if abs(c) > tiny else tiny
            result *= d * c
        if abs(d * c - 1.0) < 1e-12:
            break
    return result


assert set(PRIORS) == set(get_args(Origin))
