"""The limits a run shares: parallel agents must not overshoot them together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import BudgetExceeded, LimitExceeded
from agentic_flow.core.messages import CompletionRequest, Message, ModelInfo, TextPart, Usage
from agentic_flow.swarm.budget import RunBudget

PRICES = {"m": ModelInfo(id="m", provider="p", input_usd_per_mtok=1.0, output_usd_per_mtok=10.0)}


def request(chars: int = 2000, output: int = 1000, model: str = "m") -> CompletionRequest:
    message = Message(role="user", parts=(TextPart(text="x" * chars),))
    return CompletionRequest(model=model, messages=(message,), output_tokens_max=output)


def budget(usd: float | None = None, tokens: int = 10**9, spent: Usage | None = None) -> RunBudget:
    return RunBudget(
        budget_usd=usd, tokens_max=tokens, prices=PRICES, deadline=Deadline.after(60), spent=spent or Usage()
    )


@given(st.floats(0.001, 0.2), st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 4000)), max_size=40))
def test_parallel_reservations_never_overshoot(limit: float, calls: list[tuple[int, int]]) -> None:
    """Catches concurrent calls that each fit the money left but together exceed it."""
    shared = budget(usd=limit)
    reserved = 0.0
    for chars, output in calls:
        try:
            reserved += shared.reserve(request(chars, output))[0]
        except BudgetExceeded:
            continue
    assert reserved <= limit + 1e-9


def test_released_money_can_be_used_again() -> None:
    """Catches a failed call that eats the budget although nothing was billed."""
    shared = budget(usd=0.0125)
    held = shared.reserve(request())
    with pytest.raises(BudgetExceeded, match="left"):
        shared.reserve(request())
    shared.release(held)
    shared.settle(shared.reserve(request()), Usage(cost_usd=0.001))
    shared.reserve(request())


def test_money_spent_before_a_resume_counts() -> None:
    """Catches a resumed run that starts with a fresh budget."""
    with pytest.raises(BudgetExceeded):
        budget(usd=0.02, spent=Usage(cost_usd=0.0195)).reserve(request())


def test_a_budget_needs_a_price() -> None:
    """Catches a budget silently ignored for a model whose price nobody knows."""
    with pytest.raises(BudgetExceeded, match="no price"):
        budget(usd=1.0).reserve(request(model="unknown"))
    budget().reserve(request(model="unknown"))


def test_tokens_are_limited() -> None:
    """Catches a run that goes on past its token limit."""
    with pytest.raises(LimitExceeded, match="of its 500 tokens"):
        budget(tokens=500, spent=Usage(input_tokens=400)).reserve(request())
