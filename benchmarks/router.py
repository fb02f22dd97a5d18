"""The learned router and verdict-gated escalation in a world whose truth is known.

A tenant's prompts come from twelve families, each with words of its own among words that all share. Each
prompt has a difficulty that nothing shows beyond its family; each model has a strength, and a gift for each
family. Whether a model would answer a prompt rightly is drawn once for each pair. A checker sees whether an
answer is right, but errs at the stated rates; routers see its verdicts and never the truth. Every check is
paid for at the price of a small judging model. Prices are a ladder like those of one vendor's real models.

The first 2,000 prompts of a seed are the log: a model drawn at random answers each, and the checker's verdict
is logged. The next 2,000 are the test. "From its own traffic" has no such log: it begins cold, explores with
its 5 %, logs what it sees, escalation included, and learns anew after each 250 prompts.

Usage: python benchmarks/router.py [--check] [--seeds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TITLE = "The learned router"
sys.path.insert(0, str(ROOT / "src"))

from agentic_flow.core.messages import (  # noqa: E402
    Completion,
    CompletionRequest,
    Message,
    TextPart,
    Usage,
)
from agentic_flow.gateway.checkers import Verdict  # noqa: E402
from agentic_flow.gateway.escalation import Escalated, escalate  # noqa: E402
from agentic_flow.gateway.routing.learned import (  # noqa: E402
    LearnedRouter,
    embedding,
    outcomes_of,
    packed,
)
from agentic_flow.gateway.routing.outcomes import Outcome  # noqa: E402
from agentic_flow.gateway.routing.plan import Candidate  # noqa: E402

SEEDS, LOGGED, TESTED, FAMILIES, EACH = 10, 2000, 2000, 12, 250
TRIES = 5
GIFT = 1.2  # spread of what a model is better at than its strength says, in log-odds
QUALITY_MIN, COST_MAX = 0.95, 0.25
PRICES = {  # USD per million tokens, in and out
    "nano": (0.05, 0.40),
    "mini": (0.25, 2.00),
    "flash": (0.30, 2.50),
    "medium": (1.00, 5.00),
    "large": (3.00, 15.00),
    "premium": (5.00, 25.00),
}
STRENGTHS = (-0.6, 0.4, 0.4, 1.1, 1.8, 2.6)  # log-odds of a right answer to a prompt of average difficulty
JUDGE = PRICES["mini"]
JUDGE_TOKENS_OUT = 60
MODELS = tuple(Candidate("vendor", name) for name in PRICES)
TENANT = "tenant"


@dataclass(frozen=True)
class World:
    """One seed's prompts and the truth about them: a row for each prompt, a column for each model."""

    texts: list[str]
    right: np.ndarray[Any, Any]
    costs_usd: np.ndarray[Any, Any]
    judge_usd: np.ndarray[Any, Any]
    errs: np.ndarray[Any, Any]
    """Uniform draws that decide whether a verdict on a pair is wrong: the same for every arm."""


def make_world(seed: int, gift: float = GIFT) -> World:
    """A world; nothing but the seed decides about it."""
    rng = np.random.default_rng(seed)
    count = LOGGED + TESTED
    shared = _words(rng, 200)
    own = [_words(rng, 40) for _ in range(FAMILIES)]
    family = rng.integers(FAMILIES, size=count)
    difficulty = rng.normal(0, 1.2, FAMILIES)[family] + rng.normal(0, 0.8, count)
    gifts = rng.normal(0, gift, (FAMILIES, len(MODELS)))[family]
    chance = 1 / (1 + np.exp(difficulty[:, None] - gifts - np.array(STRENGTHS)))
    tokens_in, tokens_out = rng.integers(200, 2000, count), rng.integers(50, 600, count)
    rates = np.array(list(PRICES.values()))
    costs = (tokens_in[:, None] * rates[:, 0] + tokens_out[:, None] * rates[:, 1]) / 1e6
    judge = ((tokens_in + tokens_out) * JUDGE[0] + JUDGE_TOKENS_OUT * JUDGE[1]) / 1e6
    texts = [
        " ".join(
            own[family[row]][min(39, int(rng.zipf(1.5)) - 1)]
            if rng.random() < 0.35
            else shared[rng.integers(200)]
            for _ in range(rng.integers(12, 60))
        )
        for row in range(count)
    ]
    shape = (count, len(MODELS))
    return World(texts, rng.random(shape) < chance, costs, judge, rng.random(shape))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    consonants, vowels = "bcdfghjklmnprstvz", "aeiou"
    return [
        "".join(consonants[rng.integers(17)] + vowels[rng.integers(5)] for _ in range(rng.integers(2, 4)))
        for _ in range(count)
    ]


class NoisyChecker:
    """Sees the truth of an answer through an error rate; says accept or not, and nothing more."""

    def __init__(self, world: World, wrong: float) -> None:
        self._world = world
        self.wrong = wrong
        self.row = 0

    def verdict(self, slot: int) -> bool:
        """Whether the model's answer to the current row is accepted."""
        return bool(self._world.right[self.row, slot]) != bool(self._world.errs[self.row, slot] < self.wrong)

    async def check(self, request: CompletionRequest, completion: Completion) -> Verdict:
        accepted = self.verdict(list(PRICES).index(completion.model))
        return Verdict(float(accepted), accepted, "accepted" if accepted else "refused")


@dataclass(frozen=True)
class Score:
    """Quality and cost of one arm in one world, as shares of the best single model's."""

    quality: float
    cost: float


Order = Callable[[int], tuple[Sequence[Candidate], int]]
"""Row → the order, and how many of it may be tried; 1: nobody checks."""

REQUEST = CompletionRequest(model="auto", messages=(Message(role="user", parts=(TextPart(text="?"),)),))


class Bench:
    """One world with one checker, and what the best single model reaches in the test."""

    def __init__(self, seed: int, wrong: float = 0.1, gift: float = GIFT) -> None:
        self.world = make_world(seed, gift)
        self.seed = seed
        self.checker = NoisyChecker(self.world, wrong)
        self.test = range(LOGGED, LOGGED + TESTED)
        means = self.world.right[self.test].mean(axis=0)
        best = int(means.argmax())
        self.best_quality = float(means[best])
        self.best_cost_usd = float(self.world.costs_usd[self.test, best].sum())

    def log(self) -> list[Outcome]:
        """What a uniformly random choice of models left behind."""
        draw = random.Random(self.seed)
        return [self._outcome(row, draw.randrange(len(MODELS))) for row in range(LOGGED)]

    def _outcome(self, row: int, slot: int) -> Outcome:
        self.checker.row = row
        vector = packed(embedding(self.world.texts[row]))
        verdict, model = float(self.checker.verdict(slot)), MODELS[slot]
        cost = round(self.world.costs_usd[row, slot] * 1e9)
        return Outcome(row, TENANT, vector, *model, 1 / len(MODELS), verdict, cost, 0.0)

    async def walk(self, row: int, order: Sequence[Candidate], tries: int) -> Escalated:
        """The product's own escalation over the simulated models."""
        self.checker.row = row

        async def ask(candidate: Candidate) -> Completion:
            slot = MODELS.index(candidate)
            usage = Usage(cost_usd=float(self.world.costs_usd[row, slot]))
            return Completion(
                model=candidate.model, provider=candidate.provider, parts=(), stop_reason="end", usage=usage
            )

        return await escalate(order, ask, self.checker, request=REQUEST, tries_max=tries)

    def paid(self, row: int, walked: Escalated, tries: int) -> float:
        """All answers, and all checks where there is a checker: the last one's too, it is learned from."""
        answers = sum(one.usage.cost_usd or 0.0 for one in walked.completions)
        checks = len(walked.verdicts) if tries > 1 else 0
        return answers + checks * float(self.world.judge_usd[row])

    async def run(self, order: Order) -> Score:
        """Send the test's prompts through an arm."""
        right, cost = 0, 0.0
        for row in self.test:
            candidates, tries = order(row)
            walked = await self.walk(row, candidates, tries)
            right += bool(self.world.right[row, MODELS.index(walked.candidate)])
            cost += self.paid(row, walked, tries)
        return Score(right / TESTED / self.best_quality, cost / self.best_cost_usd)

    def cascade(self, slots: Sequence[int]) -> Score:
        """A fixed order for every prompt. As `escalate` does it, but for all prompts at once."""
        world, rows = self.world, np.array(self.test)
        accepted = world.right[rows] != (world.errs[rows] < self.checker.wrong)
        right, cost = np.zeros(len(rows), bool), np.zeros(len(rows))
        asked = np.ones(len(rows), bool)
        for slot in slots:
            cost[asked] += (world.costs_usd[rows, slot] + world.judge_usd[rows])[asked]
            right[asked] = world.right[rows, slot][asked]
            asked &= ~accepted[:, slot]
        return Score(right.mean() / self.best_quality, cost.sum() / self.best_cost_usd)

    def routed(self, router: LearnedRouter, tries_max: int) -> Order:
        """The arm that asks a router."""

        def order(row: int) -> tuple[Sequence[Candidate], int]:
            decision = router.decide(
                MODELS,
                self.world.texts[row],
                costs_usd=self.world.costs_usd[row].tolist(),
                tenant=TENANT,
                tries_max=tries_max,
            )
            return decision.order, decision.tries

        return order

    def router(self, **options: Any) -> LearnedRouter:
        """A router with the defaults, exploration included, but for these options."""
        return LearnedRouter(rng=random.Random(self.seed), **options)

    async def own_traffic(self) -> Score:
        """The router begins with nothing and learns from what it did itself."""
        router, outcomes = self.router(), list[Outcome]()
        right, cost = 0, 0.0
        for row in range(LOGGED + TESTED):
            decision = router.decide(
                MODELS,
                self.world.texts[row],
                costs_usd=self.world.costs_usd[row].tolist(),
                tenant=TENANT,
                tries_max=TRIES,
            )
            walked = await self.walk(row, decision.order, decision.tries)
            outcomes += outcomes_of(decision, walked, at_s=row, tenant=TENANT)
            if row % EACH == EACH - 1:
                router.learn(outcomes)
            if row in self.test:
                right += bool(self.world.right[row, MODELS.index(walked.candidate)])
                cost += self.paid(row, walked, TRIES)
        return Score(right / TESTED / self.best_quality, cost / self.best_cost_usd)


WEIGHTS = (0.2, 0.3, 0.4, 0.6)
CURVE = (0.5, 0.6, 0.7, 0.8)  # cost weights of ours beside the default, .9
OURS, OURS_ALONE, COLD = "learned, escalation", "learned, no escalation", "the same from its own traffic"
RANDOM, CASCADE = "random", "fixed cascade of all by price"
CASCADES, NEIGHBOURS, LOGISTIC = "fixed cascade ", "k-NN alone ", "logistic alone "
ERROR_RATES, GIFTS = (0.0, 0.05, 0.1, 0.2, 0.3), (0.4, 0.8, 1.2)

Scores = dict[str, list[Score]]


def measure(seeds: int = SEEDS) -> Scores:
    """The scores of every arm, one for each seed; baselines that have a setting come with all of them."""
    scores: Scores = {}
    for seed in range(seeds):
        bench = Bench(seed)
        log = bench.log()
        draw = random.Random(seed)
        found = {RANDOM: asyncio.run(bench.run(lambda _, draw=draw: ((draw.choice(MODELS),), 1)))}
        for model in MODELS:
            found[f"only {model.model}"] = asyncio.run(bench.run(lambda _, model=model: ((model,), 1)))
        for length in range(2, len(MODELS) + 1):
            for slots in combinations(range(len(MODELS)), length):
                name = CASCADES + ", ".join(MODELS[slot].model for slot in slots)
                found[CASCADE if length == len(MODELS) else name] = bench.cascade(slots)
        for method, name in (("neighbours", NEIGHBOURS), ("logistic", LOGISTIC)):
            for weight in WEIGHTS:
                router = bench.router(method=method, cost_weight=weight)
                found[f"{name}{weight}"] = learned(bench, router, log, 1)
        found[OURS_ALONE] = learned(bench, bench.router(cost_weight=0.4), log, 1)
        found[OURS] = learned(bench, bench.router(), log, TRIES)
        for weight in CURVE:
            found[f"{OURS}, cost weight {weight}"] = learned(
                bench, bench.router(cost_weight=weight), log, TRIES
            )
        found[COLD] = asyncio.run(bench.own_traffic())
        for name, score in found.items():
            scores.setdefault(name, []).append(score)
    return scores


def learned(bench: Bench, router: LearnedRouter, log: list[Outcome], tries_max: int) -> Score:
    """The score of a router that has learned the log."""
    router.learn(log)
    return asyncio.run(bench.run(bench.routed(router, tries_max)))


def vary(seeds: int = SEEDS) -> dict[str, Scores]:
    """Ours and the cascades in other worlds: the router is not told what is different."""
    worlds = {f"checker wrong {wrong:.0%}": {"wrong": wrong} for wrong in ERROR_RATES}
    worlds |= {f"gifts spread {gift}": {"gift": gift} for gift in GIFTS if gift != GIFT}
    found: dict[str, Scores] = {}
    for label, options in worlds.items():
        scores: Scores = found.setdefault(label, {})
        for seed in range(seeds):
            bench = Bench(seed, **options)
            scores.setdefault(OURS, []).append(learned(bench, bench.router(), bench.log(), TRIES))
            for length in range(2, len(MODELS) + 1):
                for slots in combinations(range(len(MODELS)), length):
                    name = CASCADES + ", ".join(MODELS[slot].model for slot in slots)
                    name = CASCADE if length == len(MODELS) else name
                    scores.setdefault(name, []).append(bench.cascade(slots))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, by Student's t for ten seeds."""
    mean = statistics.fmean(values)
    return mean, 2.262 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def mean(scores: Sequence[Score]) -> Score:
    """Means over the seeds."""
    return Score(statistics.fmean(s.quality for s in scores), statistics.fmean(s.cost for s in scores))


def within(scores: Scores, prefix: str) -> str:
    """The setting with the best mean quality within the limit of cost: chosen in hindsight."""
    names = [name for name in scores if name.startswith(prefix) and name != CASCADE]
    affordable = [name for name in names if mean(scores[name]).cost <= COST_MAX]
    return max(affordable or names, key=lambda name: mean(scores[name]).quality)


def row(label: str, scores: Sequence[Score]) -> str:
    quality = interval([score.quality for score in scores])
    cost = interval([score.cost for score in scores])
    return f"| {label} | {quality[0]:.3f} ± {quality[1]:.3f} | {cost[0]:.3f} ± {cost[1]:.3f} |"


def table(scores: Scores) -> str:
    """The arms as a Markdown table; of baselines with settings the best one within the limit."""
    best = max((name for name in scores if name.startswith("only ")), key=lambda n: mean(scores[n]).quality)
    chosen = {
        f"best single model ({best[5:]})": best,
        "cheapest model (nano)": "only nano",
        RANDOM: RANDOM,
        f"best single model within {COST_MAX:.0%} of the cost, in hindsight": within(scores, "only "),
        f"k-NN alone, its best cost weight within {COST_MAX:.0%}": within(scores, NEIGHBOURS),
        "logistic alone, likewise": within(scores, LOGISTIC),
        f"{CASCADE}, {len(MODELS)} tries": CASCADE,
        f"best fixed cascade within {COST_MAX:.0%}, in hindsight ({within(scores, CASCADES)[14:]})": within(
            scores, CASCADES
        ),
        f"{OURS_ALONE}": OURS_ALONE,
        f"**{OURS}**": OURS,
        **{name: name for name in scores if name.startswith(f"{OURS}, ")},
        f"{COLD}, no random log": COLD,
    }
    lines = ["| arm | quality / best model's | cost / best model's |", "|---|---|---|"]
    return "\n".join([*lines, *(row(label, scores[name]) for label, name in chosen.items())])


def varied_table(found: dict[str, Scores]) -> str:
    """Ours beside the cascades in each world."""
    cascade = f"best fixed cascade within {COST_MAX:.0%}, in hindsight"
    lines = [f"| quality, cost | {OURS} | {CASCADE} | {cascade} |", "|---|---|---|---|"]
    for label, scores in found.items():
        cells = [mean(scores[name]) for name in (OURS, CASCADE, within(scores, CASCADES))]
        lines.append(f"| {label} | " + " | ".join(f"{s.quality:.3f}, {s.cost:.3f}" for s in cells) + " |")
    return "\n".join(lines)


def failures(scores: Scores) -> list[str]:
    """Why the figure is not reached; empty when it is.

    Ours must hold both limits. A rival within the limit of cost is beaten by more quality. The full cascade
    is dearer than the limit: it is beaten when some cost weight of ours gives at least its quality for less.
    Where a difference is wanted, it must exceed its 95 % interval over the seeds.
    """
    found = list[str]()
    ours = mean(scores[OURS])
    if ours.quality < QUALITY_MIN or ours.cost > COST_MAX:
        found.append(f"quality {ours.quality:.3f} at cost {ours.cost:.3f}, not {QUALITY_MIN} at {COST_MAX}")
    for rival in (RANDOM, within(scores, NEIGHBOURS), within(scores, CASCADES)):
        pairs = zip(scores[OURS], scores[rival], strict=True)
        more, error = interval([mine.quality - theirs.quality for mine, theirs in pairs])
        if more <= error:
            found.append(f"quality over {rival!r}: {more:+.3f} ± {error:.3f}")
    if not dominating(scores):
        found.append(f"no cost weight is both as good as {CASCADE!r} and cheaper")
    return found


def dominating(scores: Scores) -> list[str]:
    """The settings of ours with at least the quality of the full cascade, for surely less."""
    found = list[str]()
    for name in scores:
        if name.startswith(OURS):
            saved, error = interval(
                [theirs.cost - mine.cost for mine, theirs in zip(scores[name], scores[CASCADE], strict=True)]
            )
            if mean(scores[name]).quality >= mean(scores[CASCADE]).quality and saved > error:
                found.append(name)
    return found


def decide_us() -> float:
    """CPU µs of one decision with 2,000 outcomes known."""
    bench = Bench(0)
    router = bench.router()
    router.learn(bench.log())
    order = bench.routed(router, TRIES)
    started_s = time.process_time()
    for index in bench.test:
        order(index)
    return (time.process_time() - started_s) / TESTED * 1e6


INTRODUCTION = """A simulated tenant with known truth: {seeds} seeds, each with {logged} logged prompts (a
model at random, the checker's verdict) and then {tested} tested ones; six models on a price ladder of 1 to
70, twelve families of prompts. The checker is wrong in 10 % of its verdicts, costs what a small model costs,
and is all that routers see of the truth. Intervals are 95 % over the seeds. "In hindsight": chosen on the
test itself, which no real system could; the default cost weight, .9, was chosen on
seeds 100 to 107. The world was not the first: with five models and gifts of .8 a cascade had been as good,
see the other worlds below."""

VARIED = """Other worlds. The router presumes 10 % wrong verdicts throughout. Gifts are how much models
differ by family beyond their strength (log-odds; {gift} above). Where they hardly differ there is little to
learn, and where the checker is wrong in 30 % there is little to learn from: there a fixed cascade, if one
knew which, does as well or better."""


def section() -> str:
    """The section of RESULTS.md."""
    scores = measure()
    missed = failures(scores)
    wanted = f"Wanted: quality {QUALITY_MIN} at cost {COST_MAX}; better than fixed cascade, k-NN and random"
    cheaper = "At least as good as the full cascade, and surely cheaper, are these of the settings above"
    return "\n\n".join(
        [
            INTRODUCTION.format(seeds=SEEDS, logged=LOGGED, tested=TESTED),
            table(scores),
            f"{wanted}: {'not reached: ' + '; '.join(missed) if missed else 'reached'}.",
            f"{cheaper}: {'; '.join(dominating(scores)) or 'none'}.",
            VARIED.format(gift=GIFT),
            varied_table(vary()),
            f"One decision takes {decide_us():.0f} µs CPU.",
            "`python benchmarks/router.py --check`",
        ]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The learned router with known truth.")
    parser.add_argument("--check", action="store_true", help="fail when the figure is not reached")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    scores = measure(options.seeds)
    print(table(scores))
    missed = failures(scores)
    print("not reached: " + "; ".join(missed) if missed else "reached")
    if options.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
