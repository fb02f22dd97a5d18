"""Time as a dependency: the clock that a simulation can replace, and deadlines made from it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from agentic_flow.core.errors import DeadlineExceeded


class Clock(Protocol):
    """The only source of time and waiting for code that a simulation must be able to run."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch; may jump."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never run backwards."""
        ...

    async def sleep(self, duration_s: float) -> None: ...


class SystemClock:
    """The machine's clock and the running event loop's timer."""

    # Without a function of Python's in between: a request asks some twenty times.
    time_s = staticmethod(time.time)
    monotonic_s = staticmethod(time.monotonic)

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on a monotonic clock. It crosses process borders as the seconds that remain."""

    at_s: float
    clock: Clock = SYSTEM_CLOCK

    @classmethod
    def after(cls, duration_s: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        return cls(clock.monotonic_s() + duration_s, clock)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - self.clock.monotonic_s())

    def earliest(self, duration_s: float) -> Deadline:
        """This deadline or one `duration_s` from now, whichever comes first."""
        at_s = self.clock.monotonic_s() + duration_s
        return self if self.at_s <= at_s else Deadline(at_s, self.clock)

    def check(self, what: str) -> None:
        """Raise DeadlineExceeded, naming `what`, when no time is left."""
        if self.remaining_s <= 0:
            raise DeadlineExceeded(f"no time was left for {what}", hint="give it a longer timeout")
