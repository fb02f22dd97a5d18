"""Intervals of shares and of their differences, and the drawing of what is kept back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.memory.intervals import Arms, newcombe, pooled, stratified, wilson
from agentic_flow.memory.uplift import assign


@st.composite
def arms(draw: st.DrawFn) -> Arms:
    with_n, without_n = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    return Arms(with_n, draw(st.integers(0, with_n)), without_n, draw(st.integers(0, without_n)))


def test_intervals_are_those_of_the_literature() -> None:
    """Catches a wrong formula: the values are published in Newcombe (1998), tables I and II, method 10."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert newcombe(Arms(70, 56, 80, 48)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert newcombe(Arms(10, 9, 10, 3)) == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5)
    assert newcombe(Arms(10, 10, 10, 0)) == pytest.approx((1.0, 0.6075, 1.0), abs=5e-5)


@given(arms())
def test_a_difference_lies_in_its_interval(one: Arms) -> None:
    """Catches an interval without its estimate, past -1 or 1, or of no width however few the runs."""
    found = newcombe(one)
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.high - found.low > 0.01
    swapped = newcombe(Arms(one.without_n, one.without_successes, one.with_n, one.with_successes))
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
    assert stratified([one]) == pytest.approx(found)


@given(st.lists(arms(), max_size=8))
def test_strata_are_averaged(strata: list[Arms]) -> None:
    """Catches weights that do not sum to one: the average must lie among the differences."""
    found = stratified([*strata, Arms(5, 5, 0, 0)])
    if not strata:
        assert found is None
        return
    values = [newcombe(one).value for one in strata]
    assert found is not None
    assert min(values) - 1e-9 <= found.value <= max(values) + 1e-9
    assert found.low <= found.value <= found.high
    assert pooled(strata).with_n == sum(one.with_n for one in strata)


def test_strata_undo_what_the_strata_cause() -> None:
    """Catches a comparison across strata (Simpson's paradox): better within each, worse when pooled."""
    strata = [Arms(87, 81, 270, 234), Arms(263, 192, 80, 55)]
    assert newcombe(pooled(strata)).value < 0
    found = stratified(strata)
    assert found is not None
    assert found.value > 0


@pytest.mark.parametrize("effect", [0.0, 0.3])
@pytest.mark.parametrize(
    ("strata", "runs"), [(1, 40), (6, 12), (40, 4)], ids=["one", "several", "many small"]
)
def test_intervals_hold_what_they_promise(effect: float, strata: int, runs: int) -> None:
    """Catches intervals too narrow for few runs: of 600 experiments 95 % should contain the truth."""
    rng = random.Random(5)
    covered = experiments = 0
    for _ in range(600):
        drawn: list[Arms] = []
        for number in range(strata):
            chance = 0.1 + 0.5 * number / max(1, strata - 1)
            treated = sum(rng.random() < 0.5 for _ in range(runs))
            successes = sum(rng.random() < chance + effect for _ in range(treated))
            others = sum(rng.random() < chance for _ in range(runs - treated))
            drawn.append(Arms(treated, successes, runs - treated, others))
        if (found := stratified(drawn)) is not None:
            experiments += 1
            covered += found.low <= effect <= found.high
    assert covered / experiments >= 0.93


@given(st.lists(st.text(max_size=5), unique=True, max_size=20), st.floats(0, 1), st.integers())
def test_what_is_kept_back_is_drawn_in_order(ids: list[str], share: float, seed: int) -> None:
    """Catches a draw that invents, repeats or reorders items, or that the ends of the range do not bind."""
    kept = assign(random.Random(seed), ids, share)
    assert [one for one in ids if one in kept] == list(kept)
    assert assign(random.Random(seed), ids, share) == kept
    assert assign(random.Random(seed), ids, 0.0) == ()
    assert assign(random.Random(seed), ids, 1.0) == tuple(ids)


def test_items_are_kept_back_independently_of_each_other() -> None:
    """Catches one draw for the whole recall: pairs must go together as often as chance has it."""
    rng = random.Random(1)
    draws = [assign(rng, ["a", "b"], 0.3) for _ in range(20_000)]
    assert sum("a" in one for one in draws) / 20_000 == pytest.approx(0.3, abs=0.015)
    assert sum(len(one) == 2 for one in draws) / 20_000 == pytest.approx(0.09, abs=0.01)
