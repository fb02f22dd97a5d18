"""A circuit breaker as a pure state machine: closed → open → half-open → closed or open again.

Source: M. Nygard, "Release It!", second edition, "Circuit Breaker". Three things that breakers get wrong are
ruled out by construction: a probe that is cancelled gives its place back; one that gets no answer, as when
the peer stood still or its connection died, is soon followed by another, so that the circuit does recover;
and an answer to a call made before the circuit changed says nothing about the peer as it is now.
"""

from __future__ import annotations

import random
from typing import Literal

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import CircuitOpen

BreakerState = Literal["closed", "open", "half_open"]

_BUCKETS = 10
# Two openings this close together, in pauses, are one trouble: the pause goes on growing.
_FLAPPING_PAUSES = 4.0
_RETRY_MIN_S = 0.05


class Permit:
    """Leave to make one call; report its outcome once. Later reports are ignored."""

    __slots__ = ("_breaker", "_done", "generation", "is_overdue", "is_probe")

    def __init__(self, breaker: Breaker, generation: int, is_probe: bool) -> None:
        self._breaker = breaker
        self._done = False
        self.generation = generation
        self.is_probe = is_probe
        self.is_overdue = False

    def succeeded(self) -> None:
        """The peer answered (an error that is the caller's own fault counts as an answer)."""
        if not self._done:
            self._done = True
            self._breaker.settle(self, True)

    def failed(self) -> None:
        """The peer could not be reached, was too slow, or said that it cannot serve."""
        self._report(False)

    def abandoned(self) -> None:
        """The call was cancelled; nothing was learned."""
        self._report(None)

    def answered(self) -> None:
        """The peer has answered well: a circuit that this call probes is closed. What follows of the answer
        may break, as any may; the outcome is still to be reported."""
        if self.is_probe and not self._done:
            self._breaker.prove(self)

    def answering(self) -> None:
        """The peer has begun to answer: another probe need not wait for the end of a long stream.

        The outcome is still to be reported, and a stream that breaks counts as any failure.
        """
        if self.is_probe and not self._done:
            self._breaker.release(self)

    def _report(self, outcome: bool | None) -> None:
        if not self._done:
            self._done = True
            self._breaker.settle(self, outcome)


class Breaker:
    """Holds back calls to a peer that fails.

    Args:
        peer: Its name, for the error.
        failures_max: Failures in a row that open the circuit.
        open_s: Seconds until one probe is let through.
        open_max_s: Upper bound of that pause, which doubles while the peer goes on failing; by default it
            does not grow.
        error_rate_max: Share of calls within `window_s` whose failure opens the circuit as well. None: only
            failures in a row do.
        window_s: Length of the sliding window, in seconds.
        calls_min: Calls within the window below which a rate means nothing.
        probe_s: A probe that has been silent for so long is followed by another, and then only its success
            counts. By default as long as `open_s`: a call may last for minutes, and while it does the
            peer may have come back.
        rng: Shortens each pause by up to a quarter, so that breakers of many processes do not probe at
            once. None: no jitter.
    """

    def __init__(
        self,
        peer: str,
        *,
        failures_max: int = 5,
        open_s: float = 5.0,
        open_max_s: float | None = None,
        error_rate_max: float | None = None,
        window_s: float = 30.0,
        calls_min: int = 20,
        probe_s: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> None:
        self._peer = peer
        self._failures_max = failures_max
        self._open_s = open_s
        self._open_max_s = open_s if open_max_s is None else max(open_s, open_max_s)
        self._error_rate_max = error_rate_max
        self._calls_min = calls_min
        self._step_s = window_s / _BUCKETS
        self._probe_s = open_s if probe_s is None else probe_s
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._opened_at_s: float | None = None
        self._down_since_s: float | None = None
        self._closed_at_s: float | None = None
        self._pause_s = 0.0  # as it grew, without jitter
        self._wait_s = open_s  # with jitter: what is waited
        self._probe: Permit | None = None
        self._probe_at_s = 0.0
        # Counts state changes: a permit of an older generation has no say.
        self._generation = 0
        # The sliding window: calls and failures by time step.
        self._stamps = [-1] * _BUCKETS
        self._calls = [0] * _BUCKETS
        self._failed = [0] * _BUCKETS

    @property
    def state(self) -> BreakerState:
        if self._opened_at_s is None:
            return "closed"
        return "open" if self._clock.monotonic_s() - self._opened_at_s < self._wait_s else "half_open"

    @property
    def failures(self) -> int:
        """Failures in a row, as last seen."""
        return self._failures

    @property
    def down_for_s(self) -> float:
        """Seconds since the peer was last known to be well; 0 while the circuit is closed."""
        return 0.0 if self._down_since_s is None else self._clock.monotonic_s() - self._down_since_s

    def acquire(self) -> Permit:
        """Leave to call now.

        Raises:
            CircuitOpen: the circuit is open, or its one probe is under way; carries `retry_after_s`.
        """
        if self._opened_at_s is None:
            return Permit(self, self._generation, False)
        now_s = self._clock.monotonic_s()
        waited_s = now_s - self._opened_at_s
        # The same comparison as `state`, so that both always agree.
        left_s = self._wait_s - waited_s if waited_s < self._wait_s else self._probe_left_s(now_s)
        if left_s > 0:
            raise CircuitOpen(
                f"calls to {self._peer!r} are held back: too many failed, {self._failures!r} in a row",
                hint="it is probed by itself; see the peer's log for why it fails",
                retry_after_s=max(left_s, _RETRY_MIN_S),
            )
        if self._probe is not None:
            self._probe.is_overdue = True
        self._probe = Permit(self, self._generation, is_probe=True)
        self._probe_at_s = now_s
        return self._probe

    def _probe_left_s(self, now_s: float) -> float:
        """How long the probe under way keeps others back: 0 without one."""
        if self._probe is None:
            return 0.0
        return max(0.0, self._probe_s - (now_s - self._probe_at_s))

    def prove(self, permit: Permit) -> None:
        """Close the circuit on the word of a probe, which goes on as any call; called by the permit."""
        if permit.generation == self._generation:
            self._close()
            permit.generation, permit.is_probe = self._generation, False

    def release(self, permit: Permit) -> None:
        """Let another probe through beside this one; called by the permit."""
        if self._probe is permit:
            self._probe = None

    def settle(self, permit: Permit, outcome: bool | None) -> None:
        """Take a permit's outcome; called by the permit."""
        if permit.generation != self._generation:
            return
        if permit.is_probe:
            self.release(permit)
            if outcome is True:
                self._close()
            elif outcome is False and not permit.is_overdue:  # else the one that followed says what is
                self._failures += 1
                self._open()
        elif outcome is not None:
            step = int(self._clock.monotonic_s() / self._step_s)
            slot = step % _BUCKETS
            if self._stamps[slot] != step:
                self._stamps[slot] = step
                self._calls[slot] = self._failed[slot] = 0
            self._calls[slot] += 1
            if outcome:
                self._failures = 0
                return
            self._failures += 1
            self._failed[slot] += 1
            if self._failures >= self._failures_max or self._fails_often(step):
                self._open()

    def _fails_often(self, step: int) -> bool:
        """Whether too many of the calls in the window that ends with `step` have failed."""
        if self._error_rate_max is None:
            return False
        oldest = step - _BUCKETS
        current = [slot for slot, stamp in enumerate(self._stamps) if stamp > oldest]
        calls = sum(self._calls[slot] for slot in current)
        if calls < self._calls_min:
            return False
        return sum(self._failed[slot] for slot in current) >= self._error_rate_max * calls

    def _open(self) -> None:
        now_s = self._clock.monotonic_s()
        goes_on = self._opened_at_s is not None or (
            self._closed_at_s is not None and now_s - self._closed_at_s < _FLAPPING_PAUSES * self._pause_s
        )
        self._pause_s = min(self._pause_s * 2, self._open_max_s) if goes_on else self._open_s
        self._wait_s = self._pause_s * (1.0 if self._rng is None else self._rng.uniform(0.75, 1.0))
        self._opened_at_s = now_s
        self._probe = None
        if self._down_since_s is None:
            self._down_since_s = now_s
        self._generation += 1

    def _close(self) -> None:
        self._closed_at_s = self._clock.monotonic_s()
        self._opened_at_s = self._down_since_s = self._probe = None
        self._failures = 0
        self._stamps = [-1] * _BUCKETS
        self._generation += 1
