"""Requests per minute by name, on the hot path of every service: a dictionary and some arithmetic.

The generic cell rate algorithm (ITU-T I.371): of each name only the time is kept at which its bucket would be
full of room again. A hundred times cheaper than a limiter with an asynchronous store, which this needs not:
each process counts its own callers.
"""

from __future__ import annotations

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock

_MINUTE_S = 60.0


class RequestRate:
    """At most so many requests per minute of each name, all of them at once if need be.

    Args:
        per_minute: Requests.
        names_max: Names remembered; past it those that have all their room again are forgotten first.
        clock: Its monotonic time counts.
    """

    def __init__(self, per_minute: int, *, names_max: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._interval_s = _MINUTE_S / per_minute
        self._names_max = names_max
        self._clock = clock
        self._full_at_s: dict[str, float] = {}

    def take(self, name: str) -> float | None:
        """Count a request of `name`. None: it may go on; else the seconds until it could."""
        now_s = self._clock.monotonic_s()
        full_at_s = self._full_at_s.get(name, now_s)
        due_s = (full_at_s if full_at_s > now_s else now_s) + self._interval_s
        over_s = due_s - now_s - _MINUTE_S
        # Floating point leaves dust: a thousandth of a request is none.
        if over_s > self._interval_s / 1000:
            return over_s
        if name not in self._full_at_s and len(self._full_at_s) >= self._names_max:
            self._make_room(now_s)
        self._full_at_s[name] = due_s
        return None

    def _make_room(self, now_s: float) -> None:
        waiting = {name: at_s for name, at_s in self._full_at_s.items() if at_s > now_s}
        if len(waiting) >= self._names_max:
            # Those that used least of their minute lose least by being forgotten.
            kept = sorted(waiting, key=waiting.__getitem__, reverse=True)[: self._names_max // 2]
            waiting = {name: waiting[name] for name in kept}
        self._full_at_s = waiting
