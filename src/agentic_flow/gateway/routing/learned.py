"""The router that learns which model is good enough for which prompt, from what checkers said before.

For each tenant and model it predicts the verdict from the prompt's embedding: the mean of an average over
nearest neighbours and a logistic regression, both shrunk to the average of the model. The cost stays outside
of the model: a choice weighs predicted quality against today's prices. Under a checker the choice is a
sequence of models, the best one by dynamic programming. A stated share of the choices is drawn, to explore,
and every choice says its propensity.

Chosen by `benchmarks/router.py` (ten seeds, known truth), which prints the alternatives: with 2,000 outcomes
the neighbours do a little better than the regression, and the mean of both as well as the neighbours.
Escalation brings more than any of them.

NumPy is imported with this module, so import it where it is used.

Sources: D. Weitzman, "Optimal Search for the Best Alternative" (Econometrica 1979), for the order by cost and
chance; K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (ICML 2009); T. Hastie et
al., "The Elements of Statistical Learning", 4.4.1, for Newton's method on the logistic likelihood.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.later import Later
from agentic_flow.core.products import inner_products
from agentic_flow.gateway.escalation import Escalated
from agentic_flow.gateway.routing.outcomes import Kept, Outcome, OutcomeLog
from agentic_flow.gateway.routing.plan import Candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
else:
    np = Later("numpy")

DIMENSION = 256
PROMPT_BYTES_READ = 2048
"""Of a longer prompt the first and the last half of this: instructions stand at either end."""

Method = Literal["mix", "neighbours", "logistic"]

_NGRAM_SIZES = (3, 4, 5)
_NEIGHBOURS = 25
_NEIGHBOURS_PRIOR = 0.4  # the average's say, in neighbours of full similarity
_PRIOR_OUTCOMES = 10.0  # the say of all models' average in one model's
_RIDGE = 3.0
_NEWTON_STEPS_MAX = 8
_PROBABILITY_MIN = 0.01
# A refused answer makes the prompt look harder: so much in log-odds of the next model for each one before.
_HARDER_PER_TRY = 0.3
_HARDER_FACTORS = tuple(math.exp(-_HARDER_PER_TRY * before) for before in range(64))
# Outcomes that were unlikely to be seen stand for those that were not, within bounds.
_WEIGHT_MIN, _WEIGHT_MAX = 0.3, 3.0


def embedding(prompt: str) -> Floats:
    """Hashed character n-grams of a prompt, `DIMENSION` numbers of length 1; zeros for an empty one."""
    data = prompt.lower().encode("utf-8", "replace")
    if len(data) > PROMPT_BYTES_READ:
        half = PROMPT_BYTES_READ // 2
        data = data[:half] + b" " + data[-half:]
    codes = np.frombuffer(b" " + data + b" ", np.uint8).astype(np.uint32)
    if not data:
        return np.zeros(DIMENSION, np.float32)
    mixed = _hashes(codes)
    mixed *= np.uint32(2_654_435_761)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(2_246_822_519)
    mixed ^= mixed >> np.uint32(13)
    # One bit is the sign, which keeps inner products unbiased where n-grams share a slot.
    counts = np.bincount(mixed & np.uint32(2 * DIMENSION - 1), minlength=2 * DIMENSION)
    signed = counts[:DIMENSION] - counts[DIMENSION:]
    values = np.copysign(np.log1p(np.abs(signed)), signed)
    norm = math.sqrt(float(values @ values))
    return (values / norm if norm else values).astype(np.float32)


def _hashes(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """FNV-like hashes of all n-grams of the three sizes, each from the one a character shorter."""
    found: list[NDArray[np.uint32]] = []
    hashes = codes + np.uint32(1)
    for size in range(2, min(_NGRAM_SIZES[-1], len(codes)) + 1):
        hashes = hashes[:-1] * np.uint32(0x01000193) ^ codes[size - 1 :]
        if size in _NGRAM_SIZES:
            found.append(hashes)
    return np.concatenate(found)


def packed(vector: Floats) -> bytes:
    """An embedding as an Outcome holds it: float16 bytes."""
    return vector.astype("<f2").tobytes()


class Decision(NamedTuple):
    """What was decided for one prompt.

    Args:
        order: The candidates: first those worth trying under a checker, then the others, for when a provider
            fails.
        tries: How many of `order` are worth trying; 1 without a checker.
        reason: One sentence with the numbers.
        propensity: Probability with which the first came first.
        propensities: The same of each of `order`.
        explored: The first was drawn, not chosen.
        predicted: Predicted verdict of each of `order`; empty before enough outcomes are known.
        embedding: For the Outcome.
    """

    order: tuple[Candidate, ...]
    tries: int
    reason: str
    propensity: float
    explored: bool
    predicted: tuple[float, ...]
    embedding: bytes
    propensities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Fit:
    """What one tenant's outcomes taught. The rows of `examples` are grouped by model, as `starts` says."""

    kept: Kept
    slots: dict[tuple[str, str], int]
    centre: Floats
    weights: Floats
    intercepts: Floats
    priors: Floats
    average: float
    examples: Floats
    verdicts: Floats
    starts: tuple[int, ...]

    def predict(self, vector: Floats, method: Method) -> Floats:
        """Verdict expected of each model, in the order of `slots`."""
        turned = _turned(vector, self.centre)
        if method == "neighbours":
            return self._by_neighbours(turned)
        logistic: Floats = _sigmoid(self.weights @ turned + self.intercepts)
        if method == "logistic":
            return logistic
        return (logistic + self._by_neighbours(turned)) * np.float32(0.5)

    def _by_neighbours(self, turned: Floats) -> Floats:
        likeness = np.maximum(inner_products(self.examples, turned), 0)
        found = self.priors.copy()
        for slot, (start, end) in enumerate(pairwise(self.starts)):
            near, verdicts = likeness[start:end], self.verdicts[start:end]
            if end - start > _NEIGHBOURS:
                nearest = np.argpartition(near, -_NEIGHBOURS)[-_NEIGHBOURS:]
                near, verdicts = near[nearest], verdicts[nearest]
            prior = _NEIGHBOURS_PRIOR * self.priors[slot]
            found[slot] = (near @ verdicts + prior) / (near.sum() + _NEIGHBOURS_PRIOR)
        return found


class LearnedRouter:
    """Chooses models by what a tenant's earlier calls showed. Tenants never learn from each other.

    Args:
        epsilon: Probability that the first model is drawn, cheap ones more often, so that all stay known.
        cost_weight: What the dearest candidate's price is worth in quality, where a route does not say: at
            .9 a model for that price must be right 90 % of the time to be worth asking. The default was
            chosen on other seeds of the benchmark than those reported, for a quarter of the best model's
            cost.
        false_verdicts: How often the checker is presumed wrong, either way; 0 to below .5.
        outcomes_min: Fewer outcomes of a tenant than this: its models go by cost.
        rows_max: Newest outcomes of a tenant that are learned from; bounds time and memory (1 KiB each).
        tenants_max: Tenants remembered; the one that was learned longest ago is forgotten.
        method: What predicts; all but `mix` are there to be measured against.
        rng: Where exploration draws from.
        clock: Bounds the time of a fit.
        fit_max_s: A tenant's fit takes no further Newton steps after this.
    """

    def __init__(
        self,
        *,
        epsilon: float = 0.05,
        cost_weight: float = 0.9,
        false_verdicts: float = 0.1,
        outcomes_min: int = 50,
        rows_max: int = 4000,
        tenants_max: int = 1000,
        method: Method = "mix",
        rng: random.Random | None = None,
        clock: Clock = SYSTEM_CLOCK,
        fit_max_s: float = 5.0,
    ) -> None:
        if not 0 <= epsilon <= 1:
            raise InvalidInput(f"epsilon is {epsilon!r}", hint="give a probability from 0 to 1")
        if not 0 <= false_verdicts < 0.5:
            raise InvalidInput(
                f"false_verdicts is {false_verdicts!r}", hint="give a rate from 0 to below 0.5"
            )
        if not cost_weight >= 0:
            raise InvalidInput(f"cost_weight is {cost_weight!r}", hint="give 0 or more")
        self._epsilon = epsilon
        self._cost_weight = cost_weight
        self._false_verdicts = false_verdicts
        self._outcomes_min = outcomes_min
        self._rows_max = rows_max
        self._tenants_max = tenants_max
        self._method: Method = method
        self._random = rng or random.Random()
        self._clock = clock
        self._fit_max_s = fit_max_s
        self._fits: dict[str, _Fit] = {}

    def order(
        self,
        candidates: Sequence[Candidate],
        prompt: str,
        *,
        costs_usd: Sequence[float | None],
        tenant: str = "",
        tries_max: int = 1,
    ) -> tuple[tuple[Candidate, ...], str]:
        """The order to try the candidates in, and why; see `decide`."""
        decision = self.decide(candidates, prompt, costs_usd=costs_usd, tenant=tenant, tries_max=tries_max)
        return decision.order, decision.reason

    def decide(
        self,
        candidates: Sequence[Candidate],
        prompt: str,
        *,
        costs_usd: Sequence[float | None],
        tenant: str = "",
        tries_max: int = 1,
        cost_weight: float | None = None,
        explore: bool = True,
    ) -> Decision:
        """Choose for one prompt.

        Args:
            candidates: At least one.
            prompt: Its text.
            costs_usd: What each candidate would cost for this call; an unknown price counts as the dearest.
            tenant: Whose outcomes to go by.
            tries_max: How many may be tried under a checker; 1 when nobody checks the answer.
            cost_weight: Instead of the router's own.
            explore: False: nothing is drawn, to tell what would be chosen; propensities are as ever.

        Raises:
            InvalidInput: no candidates, or not one cost for each.
        """
        costs = _costs(candidates, costs_usd)
        weight = self._cost_weight if cost_weight is None else cost_weight
        vector = embedding(prompt)
        predicted = self._predict(candidates, vector, tenant)
        chosen = self._choose(costs, predicted, tries_max, weight)
        chances = self._chances(costs, chosen[0])
        explored = explore and self._random.random() < self._epsilon
        if explored:
            drawn = self._random.choices(range(len(costs)), _draws(costs))[0]
            chosen = [drawn, *(index for index in chosen if index != drawn)][: max(tries_max, 1)]
        others = [index for index in range(len(candidates)) if index not in chosen]
        others.sort(
            key=lambda index: costs[index] if predicted is None else -_net(predicted, costs, index, weight)
        )
        order = [*chosen, *others]
        return Decision(
            order=tuple(candidates[index] for index in order),
            tries=len(chosen),
            reason=self._reason(candidates, costs_usd, order, predicted, tenant, explored, weight),
            propensity=chances[order[0]],
            explored=explored,
            predicted=() if predicted is None else tuple(predicted[index] for index in order),
            embedding=packed(vector),
            propensities=tuple(chances[index] for index in order),
        )

    def propensity(
        self,
        candidates: Sequence[Candidate],
        prompt: str,
        first: Candidate,
        *,
        costs_usd: Sequence[float | None],
        tenant: str = "",
        tries_max: int = 1,
    ) -> float:
        """Probability with which `first` comes first; 0 for one that is no candidate."""
        if first not in candidates:
            return 0.0
        costs = _costs(candidates, costs_usd)
        predicted = self._predict(candidates, embedding(prompt), tenant)
        choice = self._choose(costs, predicted, tries_max, self._cost_weight)[0]
        return self._chances(costs, choice)[list(candidates).index(first)]

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """Learn each tenant anew from these outcomes, all that shall count. Blocks: call it in a thread.

        Some .3 CPU seconds for 4,000 outcomes; NumPy releases the interpreter for most of it.
        """
        by_tenant: defaultdict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            if len(outcome.embedding) == DIMENSION * 2:  # others come from another version's embedding
                by_tenant[outcome.tenant].append(outcome)
        for tenant, own in by_tenant.items():
            kept = Kept(len(own), max(outcome.at_s for outcome in own))
            self._learn_tenant(tenant, own, kept)

    async def refit(self, log: OutcomeLog, *, tenant: str | None = None) -> int:
        """Learn the tenants whose outcomes in the log have changed, forget those that have none; how many.

        Call it now and then, in every worker: each learns from what all of them logged. Raises as the
        database does.

        Args:
            log: Where the outcomes are.
            tenant: Learn this one only, and forget the others; None: all.
        """
        stored = await log.tenants()
        if tenant is not None:
            stored = {tenant: stored[tenant]} if tenant in stored else {}
        for gone in [known for known in self._fits if known not in stored]:
            self.forget(gone)
        changed = 0
        for name, kept in stored.items():
            known = self._fits.get(name)
            if known is not None and known.kept == kept:
                continue
            recent = await log.recent(name, self._rows_max)
            usable = [outcome for outcome in recent if len(outcome.embedding) == DIMENSION * 2]
            if usable:
                await asyncio.to_thread(self._learn_tenant, name, usable, kept)
                changed += 1
        return changed

    def forget(self, tenant: str) -> None:
        """Drop what was learned of a tenant."""
        self._fits.pop(tenant, None)

    def _learn_tenant(self, tenant: str, outcomes: Sequence[Outcome], kept: Kept) -> None:
        newest = sorted(outcomes, key=lambda outcome: outcome.at_s)[-self._rows_max :]
        give_up_at_s = self._clock.monotonic_s() + self._fit_max_s
        fit = _fitted(newest, kept, lambda: self._clock.monotonic_s() >= give_up_at_s)
        self._fits.pop(tenant, None)
        self._fits[tenant] = fit
        while len(self._fits) > self._tenants_max:
            self._fits.pop(next(iter(self._fits)), None)

    def _predict(self, candidates: Sequence[Candidate], vector: Floats, tenant: str) -> list[float] | None:
        """Verdict expected of each candidate; None while too little is known."""
        fit = self._fits.get(tenant)
        if fit is None or fit.kept.outcomes < self._outcomes_min:
            return None
        by_slot = fit.predict(vector, self._method)
        return [
            fit.average if (slot := fit.slots.get(candidate)) is None else float(by_slot[slot])
            for candidate in candidates
        ]

    def _choose(
        self, costs: Sequence[float], predicted: Sequence[float] | None, tries_max: int, weight: float
    ) -> list[int]:
        """Whom to try, in which order."""
        tries_max = max(tries_max, 1)
        if predicted is None:
            by_cost = sorted(range(len(costs)), key=lambda index: costs[index])
            return by_cost[:tries_max]
        if tries_max == 1:
            return [max(range(len(costs)), key=lambda index: _net(predicted, costs, index, weight))]
        dearest = max(costs)
        prices = [weight * cost / dearest if dearest else 0.0 for cost in costs]
        return best_sequence(predicted, prices, tries_max, false_verdicts=self._false_verdicts)

    def _chances(self, costs: Sequence[float], choice: int) -> list[float]:
        """Probability of each to come first when `choice` is the choice."""
        chances = [self._epsilon * share for share in _draws(costs)]
        chances[choice] += 1 - self._epsilon
        return chances

    def _reason(
        self,
        candidates: Sequence[Candidate],
        costs_usd: Sequence[float | None],
        order: Sequence[int],
        predicted: Sequence[float] | None,
        tenant: str,
        explored: bool,
        weight: float,
    ) -> str:
        fit = self._fits.get(tenant)
        known = fit.kept.outcomes if fit else 0

        def shown(index: int) -> str:
            cost = costs_usd[index]
            price = "an unknown price" if cost is None else f"${cost:.6f}"
            quality = "" if predicted is None else f"predicted {predicted[index]:.2f} "
            return f"{':'.join(candidates[index])} {quality}at {price}"

        drawn = f", drawn to explore (epsilon {self._epsilon:g})" if explored else ""
        if predicted is None:
            few = f"{known} of {self._outcomes_min} outcomes known"
            return f"{shown(order[0])}{drawn}: cheapest first ({few})"
        rival = max(order, key=lambda index: predicted[index])
        against = f", against {shown(rival)}" if rival != order[0] else ", the best predicted"
        return f"{shown(order[0])}{against}{drawn} ({known} outcomes, cost weight {weight:g})"


def best_sequence(
    chances: Sequence[float], prices: Sequence[float], tries_max: int, *, false_verdicts: float = 0.0
) -> list[int]:
    """The models to try one after the other until a checker accepts; the last one's answer stands.

    Maximises the expected quality of what is returned less the prices paid, over all subsets in the order of
    price per chance, which is the best order where every verdict is right and failures are independent.
    Each refused answer lowers the chances of the models that follow.

    Args:
        chances: Probability that the checker accepts each model's answer.
        prices: In units of quality: what a right answer is worth is 1.
        tries_max: Length of the sequence at most.
        false_verdicts: Probability that a verdict is wrong, either way.
    """
    wrong = false_verdicts
    qualities = [_clipped((chance - wrong) / (1 - 2 * wrong)) for chance in chances]
    order = sorted(range(len(chances)), key=lambda one: (prices[one] / qualities[one], -qualities[one]))
    # later[n]: value and models of the best sequence from the next position on, after n refusals.
    nothing = -math.inf, ()
    later: list[tuple[float, tuple[int, ...]]] = [nothing] * (tries_max + 1)
    for index in reversed(order):
        odds = qualities[index] / (1 - qualities[index])
        best: list[tuple[float, tuple[int, ...]]] = []
        for before in range(tries_max):
            harder = odds * _HARDER_FACTORS[min(before, len(_HARDER_FACTORS) - 1)]
            quality = harder / (1 + harder)
            found = quality - prices[index], (index,)
            value, models = later[before + 1]
            if models:
                accepted = quality * (1 - wrong) + (1 - quality) * wrong
                value = quality * (1 - wrong) - prices[index] + (1 - accepted) * value
                if value > found[0]:
                    found = value, (index, *models)
            best.append(found if found[0] > later[before][0] else later[before])
        later = [*best, nothing]
    return list(later[0][1])


def outcomes_of(decision: Decision, escalated: Escalated, *, at_s: float, tenant: str) -> list[Outcome]:
    """What an escalation walk has to tell the log, one Outcome for each answer that was judged."""
    found: list[Outcome] = []
    for tries_before, (judged, completion) in enumerate(
        zip(escalated.verdicts, escalated.completions, strict=True)
    ):
        candidate, verdict = judged
        if not verdict.judged:
            continue
        cost = completion.usage.cost_usd
        found.append(
            Outcome(
                at_s=at_s,
                tenant=tenant,
                embedding=decision.embedding,
                provider=candidate.provider,
                model=candidate.model,
                # What comes later follows from the verdicts, not from a draw.
                propensity=decision.propensity if candidate == decision.order[0] else 1.0,
                verdict=verdict.score,
                cost_nano_usd=None if cost is None else round(cost * 1e9),
                latency_s=completion.latency_s,
                tries_before=tries_before,
            )
        )
    return found


def _costs(candidates: Sequence[Candidate], costs_usd: Sequence[float | None]) -> list[float]:
    """A cost for each candidate; the unknown are as dear as the dearest that is known."""
    if not candidates or len(candidates) != len(costs_usd):
        raise InvalidInput(
            f"{len(candidates)!r} candidates with {len(costs_usd)!r} costs",
            hint="give at least one candidate, and a cost or None for each",
        )
    dearest = max((cost for cost in costs_usd if cost is not None), default=0.0)
    return [dearest if cost is None else cost for cost in costs_usd]


def _net(predicted: Sequence[float], costs: Sequence[float], index: int, weight: float) -> float:
    """Predicted quality less what the model costs."""
    dearest = max(costs)
    return predicted[index] - (weight * costs[index] / dearest if dearest else 0.0)


def _draws(costs: Sequence[float]) -> list[float]:
    """How exploration spreads over the candidates: a dear one is drawn less often, down to a fifth or so.

    Under a checker the dear ones are seen anyway, whenever the cheap ones fail.
    """
    dearest = max(costs)
    shares = [1 / (0.25 + cost / dearest) if dearest else 1.0 for cost in costs]
    return [share / sum(shares) for share in shares]


def _fitted(outcomes: Sequence[Outcome], kept: Kept, late: Callable[[], bool]) -> _Fit:
    """Learn from one tenant's outcomes; Newton stops when it is `late`."""
    slots: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        slots.setdefault((outcome.provider, outcome.model), len(slots))
    ordered = sorted(outcomes, key=lambda outcome: slots[outcome.provider, outcome.model])
    models = np.array([slots[outcome.provider, outcome.model] for outcome in ordered])
    starts = tuple(int(start) for start in np.searchsorted(models, np.arange(len(slots) + 1)))
    vectors = np.frombuffer(b"".join(outcome.embedding for outcome in ordered), "<f2")
    vectors = vectors.reshape(len(ordered), DIMENSION).astype(np.float32)
    centre = vectors.mean(axis=0)
    examples = _turned(vectors, centre)
    verdicts = np.array([outcome.verdict for outcome in ordered], np.float64).clip(0, 1)
    chances = np.array([outcome.propensity for outcome in ordered], np.float64)
    before = np.array([outcome.tries_before for outcome in ordered], np.float64)
    shares = 1 / np.maximum(chances, 1e-3)
    shares = (shares / np.median(shares)).clip(_WEIGHT_MIN, _WEIGHT_MAX)
    average = float(_clipped(float(np.average(verdicts, weights=shares))))
    # Prompts that earlier models failed are harder than the rest: give back what that takes from a verdict.
    base = math.log(average / (1 - average))
    verdicts = verdicts + average - _sigmoid(base - _HARDER_PER_TRY * before)
    priors = np.empty(len(slots))
    weights = np.zeros((len(slots), DIMENSION))
    intercepts = np.empty(len(slots))
    for slot, (start, end) in enumerate(pairwise(starts)):
        own, share = verdicts[start:end], shares[start:end]
        prior = (own @ share + _PRIOR_OUTCOMES * average) / (share.sum() + _PRIOR_OUTCOMES)
        priors[slot] = _clipped(float(prior))
        weights[slot], intercepts[slot] = _logistic(examples[start:end], own, share, priors[slot], late)
    return _Fit(
        kept=kept,
        slots=slots,
        centre=centre,
        weights=weights.astype(np.float32),
        intercepts=intercepts.astype(np.float32),
        priors=priors.astype(np.float32),
        average=average,
        examples=examples,
        verdicts=verdicts.astype(np.float32),
        starts=starts,
    )


def _logistic(
    examples: Floats, verdicts: Doubles, shares: Doubles, prior: float, late: Callable[[], bool]
) -> tuple[Doubles, float]:
    """Weights and intercept of a ridge-penalised logistic regression, shrunk to the prior."""
    design = np.column_stack([examples.astype(np.float64), np.ones(len(examples))])
    penalty = np.full(DIMENSION + 1, _RIDGE)
    penalty[-1] = 1.0
    start = np.zeros(DIMENSION + 1)
    start[-1] = math.log(prior / (1 - prior))
    found = start.copy()
    for _ in range(_NEWTON_STEPS_MAX):
        if late():
            break
        expected = _sigmoid(design @ found)
        gradient = design.T @ (shares * (expected - verdicts)) + penalty * (found - start)
        curvature = (design.T * (shares * expected * (1 - expected) + 1e-6)) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        found -= step
        if float(np.abs(step).max()) < 1e-3:
            break
    return found[:-1], float(found[-1])


def _turned(vectors: Floats, centre: Floats) -> Floats:
    """Embeddings seen from the tenant's average prompt, at length 1: what all prompts share says nothing."""
    moved = vectors - centre
    norms = np.linalg.norm(moved, axis=-1, keepdims=True)
    return (moved / np.maximum(norms, 1e-9)).astype(np.float32)


def _sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-values))


def _clipped(probability: float) -> float:
    return min(max(probability, _PROBABILITY_MIN), 1 - _PROBABILITY_MIN)
