"""The learned router: what it predicts and chooses, what it draws, and the best sequence under a checker."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import Completion, Usage
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.checkers import NOT_JUDGED, Verdict
from agentic_flow.gateway.escalation import Escalated
from agentic_flow.gateway.routing.learned import (
    DIMENSION,
    LearnedRouter,
    best_sequence,
    embedding,
    outcomes_of,
    packed,
)
from agentic_flow.gateway.routing.outcomes import TABLES, Outcome, OutcomeLog
from agentic_flow.gateway.routing.plan import Candidate

CHEAP, MIDDLE, DEAR = Candidate("p", "cheap"), Candidate("p", "middle"), Candidate("q", "dear")
MODELS, COSTS = (CHEAP, MIDDLE, DEAR), (0.001, 0.004, 0.02)
SUMS = "please add the numbers {} and {}"
POEMS = "write a melancholic sonnet on autumn leaves number {} and rivers {}"


def outcome(prompt: str, model: Candidate, verdict: float, at_s: float = 0.0, tenant: str = "t") -> Outcome:
    return Outcome(at_s, tenant, packed(embedding(prompt)), *model, 1 / 3, verdict, 1000, 0.1)


def history(tenant: str = "t", count: int = 240) -> list[Outcome]:
    """All can add; only the dear one writes poems."""
    draw = random.Random(7)
    found = list[Outcome]()
    for number in range(count):
        model, poem = draw.choice(MODELS), draw.random() < 0.5
        prompt = (POEMS if poem else SUMS).format(draw.randrange(999), draw.randrange(999))
        verdict = float(not poem or model == DEAR)
        found.append(outcome(prompt, model, verdict, float(number), tenant))
    return found


def router(**options: object) -> LearnedRouter:
    return LearnedRouter(**{"epsilon": 0.0, "rng": random.Random(1), **options})  # type: ignore[arg-type]


@given(st.text(max_size=200))
def test_an_embedding_is_finite_of_length_one_and_the_same_each_time(prompt: str) -> None:
    """Catches an embedding that depends on the process, or breaks on odd text."""
    vector = embedding(prompt)
    assert vector.shape == (DIMENSION,)
    assert float(np.linalg.norm(vector)) == pytest.approx(1.0 if vector.any() else 0.0, abs=1e-5)
    assert np.array_equal(vector, embedding(prompt))
    assert len(packed(vector)) == 2 * DIMENSION


def test_like_prompts_have_like_embeddings_whatever_their_length() -> None:
    """Catches hashes that scatter, and long prompts whose end is never read."""
    near = float(embedding(SUMS.format(1, 2)) @ embedding(SUMS.format(77, 8)))
    far = float(embedding(SUMS.format(1, 2)) @ embedding(POEMS.format(1, 2)))
    assert near > far + 0.2
    filler = "lorem ipsum dolor " * 2000
    assert not np.array_equal(embedding(filler + SUMS), embedding(filler + POEMS))


@pytest.mark.parametrize("method", ["mix", "neighbours", "logistic"])
def test_it_learns_who_can_do_what(method: str) -> None:
    """Catches a router that learns averages only: each kind of prompt has another best model."""
    learned = router(method=method)
    learned.learn(history())
    adding = learned.decide(MODELS, SUMS.format(5, 6), costs_usd=COSTS, tenant="t")
    poetry = learned.decide(MODELS, POEMS.format(5, 6), costs_usd=COSTS, tenant="t", tries_max=3)
    assert adding.order[0] == CHEAP
    assert poetry.order[0] == DEAR
    assert poetry.predicted[0] > 0.7
    assert "predicted" in poetry.reason
    assert "240 outcomes" in poetry.reason


def test_prices_decide_without_learning_anew() -> None:
    """Catches a cost that was learned: when the dear model becomes cheap, it must be chosen at once."""
    learned = router()
    learned.learn(history())
    prompt = SUMS.format(5, 6)
    assert learned.order(MODELS, prompt, costs_usd=(0.02, 0.02, 0.0001), tenant="t")[0][0] == DEAR
    assert learned.order(MODELS, prompt, costs_usd=COSTS, tenant="t")[0][0] == CHEAP


def test_a_cold_start_goes_by_cost_and_says_so() -> None:
    """Catches a router that guesses without evidence, and unknown prices taken for free."""
    learned = router()
    learned.learn(history(count=49))
    order, reason = learned.order(MODELS, "x", costs_usd=(0.5, 0.1, None), tenant="t")
    assert order == (MIDDLE, CHEAP, DEAR)
    assert "49 of 50" in reason
    assert learned.decide(MODELS, "x", costs_usd=COSTS, tenant="t", tries_max=2).tries == 2


def test_tenants_learn_nothing_from_each_other() -> None:
    """Catches one tenant's history in another's choices, and one that is forgotten and still used."""
    learned = router()
    learned.learn([*history("a"), *history("b")])
    assert learned.decide(MODELS, "x", costs_usd=COSTS, tenant="c").predicted == ()
    learned.forget("a")
    assert learned.decide(MODELS, "x", costs_usd=COSTS, tenant="a").predicted == ()
    assert learned.decide(MODELS, "x", costs_usd=COSTS, tenant="b").predicted != ()


def test_every_order_holds_every_candidate_once() -> None:
    """Catches candidates lost on the way: they are the fallback when a provider fails."""
    learned = router(epsilon=0.5)
    learned.learn(history())
    for tries_max in (1, 2, 3, 8):
        for _ in range(20):
            decision = learned.decide(MODELS, "odd", costs_usd=COSTS, tenant="t", tries_max=tries_max)
            assert sorted(decision.order) == sorted(MODELS)
            assert 1 <= decision.tries <= min(tries_max, 3)


def test_propensities_are_the_frequencies() -> None:
    """Catches a logged propensity that is not how often the model really comes first."""
    learned = router(epsilon=0.4)
    learned.learn(history())
    prompt, count = SUMS.format(5, 6), 4000
    decisions = [learned.decide(MODELS, prompt, costs_usd=COSTS, tenant="t") for _ in range(count)]
    firsts = Counter(decision.order[0] for decision in decisions)
    said = {decision.order[0]: decision.propensity for decision in decisions}
    assert sum(said.values()) == pytest.approx(1.0)
    for model in MODELS:
        assert firsts[model] / count == pytest.approx(said[model], abs=0.04)
        assert learned.propensity(MODELS, prompt, model, costs_usd=COSTS, tenant="t") == said[model]
    assert learned.propensity(MODELS, prompt, Candidate("x", "y"), costs_usd=COSTS) == 0.0
    assert any("drawn to explore" in decision.reason for decision in decisions)
    told = [
        learned.decide(MODELS, prompt, costs_usd=COSTS, tenant="t", explore=False) for _ in range(count // 40)
    ]
    assert {(decision.order, decision.explored) for decision in told} == {(told[0].order, False)}
    assert dict(zip(told[0].order, told[0].propensities, strict=True)) == said


def test_a_route_can_weigh_costs_by_itself() -> None:
    """Catches a cost weight of the policies that changes nothing."""
    learned = router()
    learned.learn(history())
    prompt = POEMS.format(5, 6)

    def first(weight: float | None) -> Candidate:
        costs = (0.001, 0.002, 0.0095)
        return learned.decide(MODELS, prompt, costs_usd=costs, tenant="t", cost_weight=weight).order[0]

    assert (first(0.0), first(50.0)) == (DEAR, CHEAP)
    assert first(None) == first(0.9)


def test_a_new_model_counts_as_an_average_one() -> None:
    """Catches a model without outcomes that is never, or always, chosen."""
    learned = router()
    learned.learn(history())
    new = Candidate("p", "new")
    decision = learned.decide((*MODELS, new), POEMS.format(1, 2), costs_usd=(*COSTS, 0.01), tenant="t")
    at = decision.order.index(new)
    assert 0.4 < decision.predicted[at] < 0.9


@pytest.mark.parametrize(
    "options", [{"epsilon": 1.5}, {"false_verdicts": 0.5}, {"cost_weight": -1.0}, {"cost_weight": math.nan}]
)
def test_settings_without_meaning_are_refused(options: dict[str, float]) -> None:
    """Catches a probability of 150 %."""
    with pytest.raises(InvalidInput):
        LearnedRouter(**options)  # type: ignore[arg-type]


def test_candidates_and_costs_must_match() -> None:
    """Catches costs that silently belong to other models."""
    with pytest.raises(InvalidInput):
        router().order(MODELS, "x", costs_usd=(1.0,))
    with pytest.raises(InvalidInput):
        router().order((), "x", costs_usd=())


chances = st.lists(st.floats(0.02, 0.98), min_size=1, max_size=5)


@given(chances, st.data(), st.integers(1, 5))
def test_without_doubts_the_sequence_is_the_best_of_all(
    found: list[float], data: st.DataObject, tries_max: int
) -> None:
    """Catches a programming error in the programme: every sequence is tried beside it."""
    prices = data.draw(st.lists(st.floats(0.001, 1.0), min_size=len(found), max_size=len(found)))

    def value(sequence: tuple[int, ...]) -> float:
        total, reached = 0.0, 1.0
        for before, index in enumerate(sequence):
            odds = math.log(found[index] / (1 - found[index])) - 0.3 * before
            chance = 1 / (1 + math.exp(-odds))
            total += reached * (chance - prices[index])
            reached *= 1 - chance
        return total

    ours = tuple(best_sequence(found, prices, tries_max))
    ordered = sorted(range(len(found)), key=lambda index: (prices[index] / found[index], -found[index]))
    in_order = [
        sequence
        for length in range(1, min(tries_max, len(found)) + 1)
        for sequence in permutations(range(len(found)), length)
        if [index for index in ordered if index in sequence] == list(sequence)
    ]
    assert ours in in_order
    assert value(ours) == pytest.approx(max(value(sequence) for sequence in in_order), abs=1e-9)


def test_doubts_about_the_checker_skip_models_that_are_mostly_wrong() -> None:
    """Catches a nearly free model that is always asked first, though a wrong verdict would let it pass."""
    found, prices = [0.12, 0.9], [0.0001, 0.3]
    assert best_sequence(found, prices, 2) == [0, 1]
    assert best_sequence(found, prices, 2, false_verdicts=0.1) == [1]


def test_outcomes_of_a_walk() -> None:
    """Catches verdicts that are logged for the wrong model, without their cost, or though nobody judged."""
    decision = router().decide(MODELS, "x", costs_usd=COSTS, tries_max=3)
    completions = tuple(
        Completion(
            model=model.model,
            provider=model.provider,
            parts=(),
            stop_reason="end",
            usage=Usage(cost_usd=cost),
            latency_s=0.25,
        )
        for model, cost in zip(MODELS, (0.001, None, 0.02), strict=True)
    )
    verdicts = ((CHEAP, Verdict(0.2, False, "")), (MIDDLE, Verdict(0.4, False, "")), (DEAR, NOT_JUDGED))
    found = outcomes_of(
        decision, Escalated(completions[2], DEAR, verdicts, completions), at_s=5.0, tenant="t"
    )
    assert [(one.model, one.verdict, one.cost_nano_usd, one.tries_before) for one in found] == [
        ("cheap", 0.2, 1_000_000, 0),
        ("middle", 0.4, None, 1),
    ]
    assert found[0].propensity == decision.propensity
    assert found[0].embedding == packed(embedding("x"))


@pytest.mark.anyio
async def test_it_learns_from_the_log_and_forgets_with_it(tmp_path: Path) -> None:
    """Catches a worker that never learns what others logged, or that goes on using an erased tenant's."""
    database = SqlDatabase(
        None, tmp_path / "gateway.db", name="gateway database", setting="gateway.database_url", create=TABLES
    )
    database.create()
    log, learned = OutcomeLog(database, age_max_s=math.inf), router()
    for one in history():
        log.add(one)
    await log.flush()
    assert await learned.refit(log) == 1
    assert await learned.refit(log) == 0
    assert learned.order(MODELS, POEMS.format(5, 6), costs_usd=COSTS, tenant="t")[0][0] == DEAR
    await log.erase_tenant("t")
    await learned.refit(log)
    assert learned.decide(MODELS, "x", costs_usd=COSTS, tenant="t").predicted == ()
    database.close()
