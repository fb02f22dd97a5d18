"""The circuit breaker as a state machine."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentic_flow.core.breaker import Breaker, Permit
from agentic_flow.core.errors import CircuitOpen

FAILURES_MAX = 3
OPEN_S = 5.0


class HandClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("a breaker never sleeps")


def opened() -> tuple[Breaker, HandClock]:
    clock = HandClock()
    breaker = Breaker("peer", failures_max=FAILURES_MAX, open_s=OPEN_S, clock=clock)
    for _ in range(FAILURES_MAX):
        breaker.acquire().failed()
    return breaker, clock


def test_it_opens_after_failures_in_a_row_and_says_when_to_come_back() -> None:
    """Catches a breaker that counts successes away, or that gives no time."""
    breaker, clock = opened()
    clock.now_s += 2
    with pytest.raises(CircuitOpen) as caught:
        breaker.acquire()
    assert caught.value.retry_after_s == pytest.approx(3)
    mixed = Breaker("peer", failures_max=2)
    for _ in range(5):
        mixed.acquire().failed()
        mixed.acquire().succeeded()
    assert mixed.state == "closed"


def test_one_probe_is_let_through_and_closes_it() -> None:
    """Catches a thundering herd on a peer that just came back, and a circuit that stays open."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    probe = breaker.acquire()
    with pytest.raises(CircuitOpen):
        breaker.acquire()
    probe.succeeded()
    assert breaker.state == "closed"
    breaker.acquire()


def test_a_failed_probe_opens_it_for_the_full_time() -> None:
    """Catches probing in a tight loop."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    breaker.acquire().failed()
    clock.now_s += OPEN_S - 0.1
    with pytest.raises(CircuitOpen):
        breaker.acquire()


def test_a_cancelled_probe_gives_its_place_back() -> None:
    """Catches the circuit that never closes because its only probe was cancelled."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    breaker.acquire().abandoned()
    breaker.acquire().succeeded()
    assert breaker.state == "closed"


def test_a_probe_without_an_answer_is_followed_by_another() -> None:
    """Catches a circuit that stays open for as long as one call may take, though the peer is well again: a
    probe that it lost, or a model call of minutes, would hold everybody back."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    lost = breaker.acquire()
    clock.now_s += OPEN_S - 2
    with pytest.raises(CircuitOpen) as caught:
        breaker.acquire()
    assert caught.value.retry_after_s == pytest.approx(2)
    clock.now_s += 2
    following = breaker.acquire()
    lost.failed()
    assert breaker.state == "half_open", "its failure is old: the other one says what is"
    with pytest.raises(CircuitOpen):
        breaker.acquire()
    following.succeeded()
    assert breaker.state == "closed"


def test_a_probe_closes_it_with_the_beginning_of_its_answer() -> None:
    """Catches callers held back until the end of a long stream, and a break of that stream that counts
    nowhere, or that alone opens the circuit again."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    probe = breaker.acquire()
    probe.answered()
    assert breaker.state == "closed"
    probe.failed()
    assert (breaker.state, breaker.failures) == ("closed", 1)


def test_a_late_answer_to_an_old_probe_closes_nothing() -> None:
    """Catches an answer that was given before the last failure and counts for what is after it."""
    breaker, clock = opened()
    clock.now_s += OPEN_S
    late = breaker.acquire()
    clock.now_s += OPEN_S
    breaker.acquire().failed()
    late.answered()
    late.succeeded()
    assert breaker.state == "open"


def test_an_old_answer_has_no_say() -> None:
    """Catches slow failures from before that open a circuit which a probe has just closed."""
    clock = HandClock()
    breaker = Breaker("peer", failures_max=FAILURES_MAX, open_s=OPEN_S, clock=clock)
    old = [breaker.acquire() for _ in range(10)]
    for permit in old[:FAILURES_MAX]:
        permit.failed()
    clock.now_s += OPEN_S
    breaker.acquire().succeeded()
    for permit in old[FAILURES_MAX:]:
        permit.failed()
    assert breaker.state == "closed"


class BreakerMachine(RuleBasedStateMachine):
    """Any order of calls, outcomes and waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.breaker = Breaker("peer", failures_max=FAILURES_MAX, open_s=OPEN_S, clock=self.clock)
        self.out: list[Permit] = []
        self.probe: Permit | None = None
        self.probe_at_s = 0.0

    @rule()
    def acquire(self) -> None:
        state = self.breaker.state
        asked = self.probe in self.out and self.clock.now_s - self.probe_at_s < OPEN_S
        if state == "open" or (state == "half_open" and asked):
            with pytest.raises(CircuitOpen) as caught:
                self.breaker.acquire()
            assert 0 < (caught.value.retry_after_s or 0) <= OPEN_S
        else:
            permit = self.breaker.acquire()
            assert permit.is_probe == (state == "half_open")
            self.out.append(permit)
            if permit.is_probe:
                self.probe, self.probe_at_s = permit, self.clock.now_s

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def settle(self, data: st.DataObject, outcome: str) -> None:
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        getattr(permit, outcome)()
        state = self.breaker.state
        permit.failed()
        assert self.breaker.state == state

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def begin_to_answer(self, data: st.DataObject) -> None:
        permit = self.out[data.draw(st.integers(0, len(self.out) - 1))]
        closes = permit.is_probe and permit.generation == self.breaker._generation  # pyright: ignore[reportPrivateUsage]
        state = self.breaker.state
        permit.answered()
        assert self.breaker.state == ("closed" if closes else state)

    @rule(duration_s=st.floats(0, 20))
    def wait(self, duration_s: float) -> None:
        self.clock.now_s += duration_s

    @invariant()
    def it_recovers_whatever_becomes_of_the_calls_under_way(self) -> None:
        """Once time has passed a healthy peer closes it, though no call under way ever ends."""
        # Looked at on a copy, so that looking changes nothing.
        copy = Breaker("copy", failures_max=FAILURES_MAX, open_s=OPEN_S, clock=self.clock)
        copy.__dict__.update(self.breaker.__dict__)
        before_s = self.clock.now_s
        self.clock.now_s += OPEN_S + 1e-6  # sums of floats fall short
        try:
            copy.acquire().succeeded()
            assert copy.state == "closed"
        finally:
            self.clock.now_s = before_s


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
