"""Rate limits as callers meet them: what is admitted, when to come back, what the headers say."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import RateLimited, as_openai, as_problem
from agentic_flow.gateway.limits import Admission, OverLimit, RateLimits, duration_text
from agentic_flow.gateway.policies import Caller, LimitRule

CALLER = Caller("acme", "k1")
MICRO = 1e-6


class HandClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def time_s(self) -> float:
        return 1_800_000_000.0 + self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("rate limits never sleep")


def per_key(requests: int | None = None, tokens: int | None = None, **more: Any) -> LimitRule:
    return LimitRule(scope="key", requests_per_minute=requests, tokens_per_minute=tokens, **more)


def admitted(limits: RateLimits, rules: tuple[LimitRule, ...], tokens: int = 1, **caller: str) -> bool:
    asking = CALLER._replace(**{name: value for name, value in caller.items() if name != "model"})
    try:
        limits.admit(asking, caller.get("model", "m"), tokens, rules)
    except OverLimit:
        return False
    return True


# How much


@given(
    limit=st.integers(1, 500),
    steps=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 300)), max_size=60),
)
def test_no_window_admits_more_than_was_promised(limit: int, steps: list[tuple[float, int]]) -> None:
    """Catches a bucket that refills too fast or forgets a charge: more than the docstring promises."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(tokens=limit),)
    taken: list[tuple[float, int]] = []
    for wait_s, tokens in steps:
        clock.now_s += wait_s
        if admitted(limits, rules, tokens):
            taken.append((clock.now_s, tokens))
    for first, (start_s, _) in enumerate(taken):
        total = 0
        for at_s, tokens in taken[first:]:
            total += tokens
            assert total <= limit * (1 + (at_s - start_s + 3 * MICRO) / 60)


@given(
    limit=st.integers(1, 100_000),
    amounts=st.lists(st.integers(1, 60_000), min_size=1, max_size=30),
    gaps_s=st.lists(st.floats(0, 5), min_size=30, max_size=30),
)
def test_the_time_to_wait_is_exact(limit: int, amounts: list[int], gaps_s: list[float]) -> None:
    """Catches a retry_after_s after which one is refused again, or longer than needed."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(requests=20, tokens=limit),)
    for tokens, gap_s in zip(amounts, gaps_s, strict=False):
        clock.now_s += gap_s
        try:
            limits.admit(CALLER, "m", tokens, rules)
        except OverLimit as error:
            if error.retry_after_s is None:
                assert tokens > limit
                continue
            refused_at_s = clock.now_s
            clock.now_s = refused_at_s + error.retry_after_s - 5 * MICRO
            assert clock.now_s < refused_at_s or not admitted(limits, rules, tokens)
            clock.now_s = refused_at_s + error.retry_after_s
            limits.admit(CALLER, "m", tokens, rules)


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 30), st.integers(1, 100), st.floats(0, 1), st.booleans()), max_size=60
    )
)
def test_corrections_never_create_tokens(steps: list[tuple[float, int, float, bool]]) -> None:
    """Catches refunds that exceed what was charged: more used since the start than was ever allowed."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(tokens=100),)
    began_s = clock.now_s
    used = 0
    running: list[tuple[Admission, int]] = []
    for wait_s, estimate, share, settles in steps:
        clock.now_s += wait_s
        if settles and running:
            admission, estimated = running.pop(0)
            admission.settle(int(estimated * share))
            used += int(estimated * share)
        try:
            running.append((limits.admit(CALLER, "m", estimate, rules), estimate))
        except OverLimit:
            continue
        in_flight = sum(estimated for _, estimated in running)
        assert used + in_flight <= 100 * (1 + (clock.now_s - began_s + MICRO) / 60)


def test_what_was_estimated_too_high_can_be_used_by_others() -> None:
    """Catches a settlement without effect, or one that counts twice."""
    limits = RateLimits(HandClock())
    rules = (per_key(tokens=100),)
    admission = limits.admit(CALLER, "m", 100, rules)
    assert not admitted(limits, rules, 1)
    admission.settle(30)
    admission.settle(0)
    admission.release()
    assert not admitted(limits, rules, 71)
    assert admitted(limits, rules, 70)


def test_a_refund_that_comes_late_is_not_paid_twice() -> None:
    """Catches tokens given back although the bucket had refilled as if they were used."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(tokens=100),)
    first = limits.admit(CALLER, "m", 100, rules)
    clock.now_s += 59.4
    limits.admit(CALLER, "m", 99, rules)
    first.settle(0)
    assert admitted(limits, rules, 1), "what has not drained yet is given back"
    assert not admitted(limits, rules, 2)


def test_what_was_estimated_too_low_is_a_debt() -> None:
    """Catches callers who get more by estimating less."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(tokens=60),)
    limits.admit(CALLER, "m", 10, rules).settle(120)
    with pytest.raises(OverLimit) as refused:
        limits.admit(CALLER, "m", 1, rules)
    assert refused.value.retry_after_s == pytest.approx(61, abs=1e-5)
    clock.now_s += refused.value.retry_after_s or 0
    assert admitted(limits, rules, 1)


def test_a_call_that_never_ran_costs_nothing() -> None:
    """Catches a release that keeps the request or its tokens."""
    limits = RateLimits(HandClock())
    rules = (per_key(requests=1, tokens=10),)
    for _ in range(5):
        limits.admit(CALLER, "m", 10, rules).release()
    assert admitted(limits, rules, 10)


def test_a_request_beyond_the_whole_limit_is_not_sent_to_wait() -> None:
    """Catches a caller who retries for ever what can never be admitted."""
    limits = RateLimits(HandClock())
    rules = (per_key(tokens=100),)
    with pytest.raises(RateLimited, match="about 101 tokens, more than the 100 a minute") as refused:
        limits.admit(CALLER, "m", 101, rules)
    error = refused.value
    assert isinstance(error, OverLimit)
    assert error.retry_after_s is None
    assert not error.retryable
    assert error.headers("openai")["x-should-retry"] == "false"
    assert as_problem(error)["retryable"] is False
    assert admitted(limits, rules, 100), "the refusal was charged"


# Whom


def test_all_rules_are_charged_or_none() -> None:
    """Catches a refusal by one rule that used up another."""
    limits = RateLimits(HandClock())
    rules = (
        LimitRule(scope="tenant", requests_per_minute=3),
        LimitRule(scope="model", name="big", requests_per_minute=1),
    )
    assert admitted(limits, rules, model="big")
    for _ in range(5):
        assert not admitted(limits, rules, model="big")
    assert [admitted(limits, rules, model="small") for _ in range(3)] == [True, True, False]


def test_each_has_an_allowance_of_its_own() -> None:
    """Catches keys, tenants or models that share what is each one's own, or do not share what they should."""
    for scope, ours, others in (
        ("key", [("acme", "k1", "m"), ("acme", "k1", "n")], [("acme", "k2", "m"), ("other", "k1", "m")]),
        ("tenant", [("acme", "k1", "m"), ("acme", "k2", "n")], [("other", "k1", "m")]),
        ("model", [("acme", "k1", "m"), ("acme", "k2", "m")], [("acme", "k1", "n"), ("other", "k1", "m")]),
    ):
        limits = RateLimits(HandClock())
        rules = (LimitRule.model_validate({"scope": scope, "requests_per_minute": 1}),)
        (tenant, key, model), (tenant2, key2, model2) = ours
        assert admitted(limits, rules, tenant=tenant, key=key, model=model)
        assert not admitted(limits, rules, tenant=tenant2, key=key2, model=model2), scope
        for tenant, key, model in others:
            assert admitted(limits, rules, tenant=tenant, key=key, model=model), scope


def test_rules_apply_to_whom_they_name() -> None:
    """Catches a rule of one tenant or name that hits another, and a name that lifts what holds for each."""
    limits = RateLimits(HandClock())
    rules = (
        per_key(1, name="k1", tenant="acme"),
        per_key(2),
        per_key(1, name="k9"),
    )
    assert [admitted(limits, rules) for _ in range(2)] == [True, False]
    assert [admitted(limits, rules, tenant="other") for _ in range(3)] == [True, True, False]
    assert [admitted(limits, rules, key="k9") for _ in range(2)] == [True, False]
    nobody = (per_key(1, name="k1", tenant="acme"),)
    assert limits.admit(Caller("other", "k1"), "m", 1, nobody).headers("openai") == {}


def test_two_rules_on_the_same_thing_both_hold() -> None:
    """Catches one bucket for two rules, which would be charged twice and lose one limit."""
    clock = HandClock()
    limits = RateLimits(clock)
    rules = (per_key(4), per_key(2))
    assert [admitted(limits, rules) for _ in range(3)] == [True, True, False]
    clock.now_s += 30
    assert [admitted(limits, rules) for _ in range(2)] == [True, False]


def test_new_rules_do_not_wipe_what_was_used() -> None:
    """Catches a change of policy that gives everybody a fresh allowance, or keeps the old limit."""
    limits = RateLimits(HandClock())
    old, new = (per_key(10),), (per_key(12),)
    assert all(admitted(limits, old) for _ in range(10))
    assert [admitted(limits, new) for _ in range(3)] == [True, True, False]
    assert not admitted(limits, old)
    assert admitted(limits, ())


# Memory


def test_memory_is_bounded_and_full_buckets_go_first() -> None:
    """Catches a flood of made-up names that grows without bound, or that resets a limit in use."""
    clock = HandClock()
    limits = RateLimits(clock, buckets_max=8)
    rules = (per_key(1),)
    for number in range(4):
        assert admitted(limits, rules, key=f"early-{number}")
    clock.now_s += 61
    assert admitted(limits, rules, key="busy")
    for number in range(7):
        assert admitted(limits, rules, key=f"new-{number}")
        assert len(limits) <= 8
    assert not admitted(limits, rules, key="busy"), "a bucket in use was forgotten before the full ones"
    assert not admitted(limits, rules, key="new-6")
    for number in range(100):
        admitted(limits, rules, key=f"flood-{number}")
    assert len(limits) == 8


def test_a_forgotten_bucket_is_not_used_any_more() -> None:
    """Catches two buckets for one caller, one of them in a plan made before it was forgotten."""
    clock = HandClock()
    limits = RateLimits(clock, buckets_max=1)
    rules = (LimitRule(scope="key", requests_per_minute=1),)
    assert admitted(limits, rules, model="m")
    assert not admitted(limits, rules, model="n"), "another plan of the same bucket"
    clock.now_s += 61
    assert admitted(limits, rules, key="k2")
    assert admitted(limits, rules, model="m")
    assert not admitted(limits, rules, model="n")


# Headers


def test_headers_show_the_tightest_rule_as_openai_does() -> None:
    """Catches names, numbers or times that OpenAI's clients would misread."""
    limits = RateLimits(HandClock())
    rules = (
        per_key(requests=60, tokens=6000),
        LimitRule(scope="tenant", requests_per_minute=5, tokens_per_minute=100_000),
    )
    assert limits.admit(CALLER, "m", 600, rules).headers("openai") == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "12s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5400",
        "x-ratelimit-reset-tokens": "6s",
    }


def test_headers_show_times_as_anthropic_does() -> None:
    """Catches a reset that is no RFC 3339 time, or not the one at which the allowance is whole again."""
    clock = HandClock()
    limits = RateLimits(clock)
    shown = limits.admit(CALLER, "m", 50, (per_key(requests=10, tokens=100),)).headers("anthropic")
    assert shown["anthropic-ratelimit-requests-limit"] == "10"
    assert shown["anthropic-ratelimit-requests-remaining"] == "9"
    assert shown["anthropic-ratelimit-tokens-limit"] == "100"
    assert shown["anthropic-ratelimit-tokens-remaining"] == "50"
    reset = datetime.fromisoformat(shown["anthropic-ratelimit-tokens-reset"].replace("Z", "+00:00"))
    assert reset == datetime.fromtimestamp(clock.time_s() + 30, UTC)
    assert len(shown) == 6


def test_a_refusal_has_the_headers_too_and_names_its_rule() -> None:
    """Catches a 429 that a client cannot act on."""
    limits = RateLimits(HandClock())
    rules = (LimitRule(scope="model", name="big", requests_per_minute=2, tokens_per_minute=50),)
    limits.admit(CALLER, "big", 30, rules)
    with pytest.raises(OverLimit) as refused:
        limits.admit(CALLER, "big", 30, rules)
    error = refused.value
    assert "50 tokens per minute of the model 'big'" in as_openai(error)["error"]["message"]
    assert error.status == 429
    assert error.headers("openai")["x-ratelimit-remaining-requests"] == "1"
    assert error.headers("openai")["x-ratelimit-remaining-tokens"] == "20"
    assert "x-should-retry" not in error.headers("openai")
    assert error.details == {"scope": "model", "name": "big", "counted": "tokens", "limit_per_minute": 50}
    assert pickle.loads(pickle.dumps(error)).retry_after_s == error.retry_after_s


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0ms"),
        (0.1195, "120ms"),
        (0.9999, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (62, "1m2s"),
        (61.001, "1m2s"),
        (7205, "2h0m5s"),
    ],
)
def test_times_are_written_as_openai_writes_them(duration_s: float, text: str) -> None:
    """Catches units that its clients' parsers do not know, and times rounded down."""
    assert duration_text(duration_s) == text
