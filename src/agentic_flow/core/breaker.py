"""A circuit breaker as a pure state machine: closed → open → half-open → closed or open again.

Source: M. Nygard, "Release It!", second edition, "Circuit Breaker". Two things that breakers get wrong are
ruled out by construction: a probe that is cancelled gives its place back, so the circuit does recover; and
an answer to a call made before the circuit changed says nothing about the peer as it is now.
"""

from __future__ import annotations

from typing import Literal

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import CircuitOpen

BreakerState = Literal["closed", "open", "half_open"]


class Permit:
    """Leave to make one call; report its outcome once. Later reports are ignored."""

    __slots__ = ("_breaker", "_done", "generation", "is_probe")

    def __init__(self, breaker: Breaker, generation: int, is_probe: bool) -> None:
        self._breaker = breaker
        self._done = False
        self.generation = generation
        self.is_probe = is_probe

    def succeeded(self) -> None:
        """The peer answered (an error that is the caller's own fault counts as an answer)."""
        self._report(True)

    def failed(self) -> None:
        """The peer could not be reached, was too slow, or said that it cannot serve."""
        self._report(False)

    def abandoned(self) -> None:
        """The call was cancelled; nothing was learned."""
        self._report(None)

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
    """

    def __init__(
        self, peer: str, *, failures_max: int = 5, open_s: float = 5.0, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._peer = peer
        self._failures_max = failures_max
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opened_at_s: float | None = None
        self._probe: Permit | None = None
        # Counts state changes: a permit of an older generation has no say.
        self._generation = 0

    @property
    def state(self) -> BreakerState:
        if self._opened_at_s is None:
            return "closed"
        return "open" if self._clock.monotonic_s() - self._opened_at_s < self._open_s else "half_open"

    def acquire(self) -> Permit:
        """Leave to call now.

        Raises:
            CircuitOpen: the circuit is open, or its one probe is under way; carries `retry_after_s`.
        """
        if self._opened_at_s is None:
            return Permit(self, self._generation, is_probe=False)
        wait_s = self._open_s - (self._clock.monotonic_s() - self._opened_at_s)
        # The same comparison as `state`, so that both always agree.
        if self.state == "open" or self._probe is not None:
            raise CircuitOpen(
                f"calls to {self._peer!r} are held back after {self._failures_max!r} failures in a row",
                hint="it is probed by itself; see the peer's log for why it fails",
                retry_after_s=max(wait_s, 0.05),
            )
        self._probe = Permit(self, self._generation, is_probe=True)
        return self._probe

    def settle(self, permit: Permit, outcome: bool | None) -> None:
        """Take a permit's outcome; called by the permit."""
        if permit.generation != self._generation:
            return
        if permit.is_probe:
            self._probe = None
            if outcome is True:
                self._close()
            elif outcome is False:
                self._open()
        elif outcome is True:
            self._failures = 0
        elif outcome is False:
            self._failures += 1
            if self._failures >= self._failures_max:
                self._open()

    def _open(self) -> None:
        self._opened_at_s = self._clock.monotonic_s()
        self._generation += 1

    def _close(self) -> None:
        self._opened_at_s = None
        self._failures = 0
        self._generation += 1
