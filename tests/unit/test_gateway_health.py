"""The circuit breakers of the gateway, by provider, key and model, on a clock that is set by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentic_flow.core.breaker import Breaker, Permit
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import CircuitOpen
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.health import CALLS_MIN, FAILURES_MAX, OPEN_MAX_S, WINDOW_S, Health

OPEN_S = 5.0
SLOW_S = 30.0
NAME = ("p", "k", "m")


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


def health(clock: HandClock, **more: int) -> Health:
    return Health(open_s=OPEN_S, slow_call_s=SLOW_S, clock=clock, rng=random.Random(7), **more)


def fail(of: Health, times: int = FAILURES_MAX) -> None:
    for _ in range(times):
        of.permit(*NAME).failed()


def wait_s(of: Health) -> float:
    with pytest.raises(CircuitOpen) as caught:
        of.permit(*NAME)
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s + 1e-9  # sums of floats fall short


def test_one_key_and_model_does_not_close_another() -> None:
    """Catches a breaker per provider, where one bad key or model takes all others with it."""
    of = health(HandClock())
    fail(of)
    assert 0 < wait_s(of) <= OPEN_S
    of.permit("p", "other", "m").succeeded()
    of.permit("p", "k", "other").succeeded()
    of.permit("other", "k", "m").succeeded()
    assert {report[:3]: report.state for report in of.states()} == {
        NAME: "open",
        ("p", "other", "m"): "closed",
        ("p", "k", "other"): "closed",
        ("other", "k", "m"): "closed",
    }


def test_a_high_error_rate_opens_without_a_row_of_failures() -> None:
    """Catches a provider that fails every second call and is never left alone."""
    clock = HandClock()
    of = health(clock)
    for turn in range(CALLS_MIN):
        permit = of.permit(*NAME)
        clock.now_s += 0.1
        (permit.succeeded if turn % 2 == 0 else permit.failed)()
    assert wait_s(of) > 0


def test_failures_of_long_ago_do_not_count() -> None:
    """Catches a window that never slides: rare failures over a day would open the circuit."""
    clock = HandClock()
    of = health(clock)
    for turn in range(CALLS_MIN * 4):
        clock.now_s += WINDOW_S / (CALLS_MIN / 2)
        permit = of.permit(*NAME)
        (permit.succeeded if turn % 2 == 0 else permit.failed)()
    assert of.states()[0].state == "closed"


def test_the_pause_doubles_to_its_limit_and_starts_over_after_a_good_while() -> None:
    """Catches probing at a fixed rate, a pause without bound or jitter, and one that never shrinks."""
    clock = HandClock()
    of = health(clock)
    fail(of)
    pauses = [wait_s(of)]
    for _ in range(6):
        clock.now_s += pauses[-1]
        of.permit(*NAME).failed()
        pauses.append(wait_s(of))
    for pause_s, bound_s in zip(pauses, [5, 10, 20, 40, 60, 60, 60], strict=True):
        assert bound_s * 0.75 <= pause_s <= bound_s + 1e-6
    assert len({pause_s / min(OPEN_MAX_S, 5 * 2**n) for n, pause_s in enumerate(pauses)}) > 3
    assert of.states()[0].opened_for_s == pytest.approx(sum(pauses[:-1]))
    # It flaps: well for a moment, then the trouble goes on.
    clock.now_s += pauses[-1]
    of.permit(*NAME).succeeded()
    fail(of)
    assert wait_s(of) > 40
    clock.now_s += OPEN_MAX_S
    of.permit(*NAME).succeeded()
    clock.now_s += 3600
    fail(of)
    assert wait_s(of) <= OPEN_S


def test_a_probe_that_has_begun_to_answer_lets_others_through_and_still_decides() -> None:
    """Catches recovery that takes as long as a stream, and a stream that breaks and closes the circuit."""
    clock = HandClock()
    of = health(clock)
    fail(of)
    clock.now_s += OPEN_S
    first = of.permit(*NAME)
    wait_s(of)
    first.answering()
    second = of.permit(*NAME)
    wait_s(of)
    first.failed()
    second.succeeded()
    assert of.states()[0].state == "open", "the stream broke: nothing is well"
    clock.now_s += 2 * OPEN_S
    third = of.permit(*NAME)
    third.answering()
    third.succeeded()
    assert of.states()[0].state == "closed"


def test_a_mute_probe_is_followed_by_another() -> None:
    """Catches a circuit that stays open for as long as one lost call hangs."""
    clock = HandClock()
    of = health(clock)
    fail(of)
    clock.now_s += OPEN_S
    mute = of.permit(*NAME)
    clock.now_s += SLOW_S
    of.permit(*NAME).succeeded()
    assert of.states()[0].state == "closed"
    mute.failed()
    assert of.states()[0].state == "closed"


def test_the_number_of_circuits_is_bounded_and_open_ones_stay() -> None:
    """Catches memory that grows with made-up names of models, and names that push out what is known."""
    of = health(HandClock(), circuits_max=10)
    fail(of)
    for number in range(100):
        of.permit("p", "k", f"made-up-{number}").succeeded()
    reports = of.states()
    assert len(reports) == 10
    assert [report.state for report in reports if report.model == "m"] == ["open"]


def test_a_removed_key_is_forgotten() -> None:
    """Catches metrics that show keys of long ago."""
    of = health(HandClock())
    fail(of)
    of.permit("p", "other", "m").succeeded()
    of.forget("p", "k")
    assert [report.key_id for report in of.states()] == ["other"]


def test_slow_is_less_than_the_deadline() -> None:
    """Catches settings under which a provider that never answers is never counted."""
    assert Health.of(GatewaySettings(timeout_s=10, slow_call_s=60)).slow_call_s < 10
    assert Health.of(GatewaySettings(timeout_s=100, slow_call_s=60)).slow_call_s == 60


class HealthMachine(RuleBasedStateMachine):
    """Any order of calls, outcomes and waiting, on one circuit."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.health = health(self.clock)
        self.out: list[Permit] = []
        self.silent: list[tuple[Permit, float]] = []
        """What has not begun to answer, and since when."""
        self.health.permit(*NAME).succeeded()

    def breaker(self) -> Breaker:
        return self.health._circuits[NAME]  # pyright: ignore[reportPrivateUsage]

    def generation(self) -> int:
        return self.breaker()._generation  # pyright: ignore[reportPrivateUsage]

    @rule()
    def call(self) -> None:
        state = self.breaker().state
        try:
            permit = self.health.permit(*NAME)
        except CircuitOpen as error:
            wait_s = error.retry_after_s or 0.0
        else:
            assert state != "open"
            assert permit.is_probe == (state == "half_open")
            self.out.append(permit)
            self.silent.append((permit, self.clock.now_s))
            return
        assert state != "closed"
        assert 0 < wait_s <= OPEN_MAX_S

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(self.out))
        permit.answering()
        self.silent = [entry for entry in self.silent if entry[0] is not permit]

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.silent = [entry for entry in self.silent if entry[0] is not permit]
        before = self.breaker().state
        current = permit.generation == self.generation()
        getattr(permit, outcome)()
        after = self.breaker().state
        if not current or outcome == "abandoned" or (permit.is_overdue and outcome == "failed"):
            assert after == before  # nothing was learned, or nothing of what is now
        elif permit.is_probe:
            assert after == ("closed" if outcome == "succeeded" else "open")

    @rule(times=st.integers(1, FAILURES_MAX))
    def fail_in_a_row(self, times: int) -> None:
        for _ in range(times):
            if self.breaker().state != "closed":
                return
            self.health.permit(*NAME).failed()

    @rule(duration_s=st.floats(0, SLOW_S * 1.5))
    def wait(self, duration_s: float) -> None:
        self.clock.now_s += duration_s

    @invariant()
    def at_most_one_probe(self) -> None:
        """Of those that have not begun to answer and are not given up."""
        silent = [
            permit
            for permit, since_s in self.silent
            if permit.is_probe
            and permit.generation == self.generation()
            and self.clock.now_s - since_s < SLOW_S
        ]
        assert len(silent) <= 1

    @invariant()
    def a_row_of_failures_is_never_borne(self) -> None:
        assert self.breaker().state != "closed" or self.breaker().failures < FAILURES_MAX

    @invariant()
    def it_always_can_close_again(self) -> None:
        """Whatever is still under way and never ends, a healthy provider is found out."""
        # Looked at on a copy, so that looking changes nothing.
        copy = Breaker("copy")
        copy.__dict__.update(self.breaker().__dict__)
        before_s = self.clock.now_s
        self.clock.now_s += OPEN_MAX_S + SLOW_S
        try:
            copy.acquire().succeeded()
            assert copy.state == "closed"
        finally:
            self.clock.now_s = before_s


TestHealthMachine = HealthMachine.TestCase
TestHealthMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
