"""Requests per minute: exact over time, separate by name, bounded in memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.request_rate import RequestRate


class _Hand:
    now_s = 100.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nothing waits here")


@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=150))
def test_never_more_than_the_rate_and_never_less(per_minute: int, pauses_s: list[float]) -> None:
    """Catches a limiter that lets through more than a minute has room for, or refuses too early."""
    clock = _Hand()
    rate = RequestRate(per_minute, names_max=10, clock=clock)
    room = float(per_minute)
    for pause_s in pauses_s:
        clock.now_s += pause_s
        room = min(float(per_minute), room + pause_s * per_minute / 60)
        wait_s = rate.take("a")
        if wait_s is None:
            assert room > 1 - 0.01
            room -= 1
        else:
            assert room < 1 + 0.01
            assert abs(wait_s - (1 - room) * 60 / per_minute) < 0.1


def test_the_wait_is_the_wait() -> None:
    """Catches a Retry-After that is too short, or a request that is counted although it was refused."""
    clock = _Hand()
    rate = RequestRate(2, names_max=10, clock=clock)
    assert rate.take("a") is None
    assert rate.take("a") is None
    assert rate.take("a") == 30.0
    assert rate.take("b") is None
    clock.now_s += 30.0
    assert rate.take("a") is None
    assert rate.take("a") == 30.0


def test_memory_is_bounded_and_the_busiest_stay_limited() -> None:
    """Catches one entry for each of a flood of names, and a flood that frees a limited name."""
    clock = _Hand()
    rate = RequestRate(3, names_max=8, clock=clock)
    while rate.take("busy") is None:
        pass
    for number in range(1000):
        assert rate.take(f"name {number}") is None
    assert len(rate._full_at_s) <= 8
    assert rate.take("busy") is not None
