"""Which provider, key and model may be asked now: one circuit breaker for each, and what counts against it.

A call fails when the provider cannot be reached, answers that it cannot serve, breaks off or falls silent at
any point of the answer, or takes longer than `slow_call_s` to begin a stream. A refusal that is the caller's
own doing (status 400, no such model) shows that the provider is well. A caller who leaves shows nothing,
unless the first token was overdue by then.

Questions beside a model's answers, such as how many tokens a request has, are held back with the model's
circuit and say nothing of it; they have none of their own.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import NamedTuple, Self

from agentic_flow.core.breaker import Breaker, BreakerState, Permit
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import CircuitOpen
from agentic_flow.core.settings import GatewaySettings

FAILURES_MAX = 5
ERROR_RATE_MAX = 0.5
WINDOW_S = 30.0
CALLS_MIN = 20
OPEN_MAX_S = 60.0
CIRCUITS_MAX = 2048
# The rest of the time is for the other targets of a route.
_SLOW_OF_TIMEOUT = 0.6
# How far from the least recently used end a closed circuit is looked for, before an open one is forgotten.
_EVICTION_LOOKS = 16


class BreakerReport(NamedTuple):
    """One circuit as metrics show it.

    Args:
        provider, key_id, model: What it stands for.
        state: closed, open or half_open.
        failures: Failures in a row.
        opened_for_s: Seconds since the provider was last known to be well; 0 while closed.
    """

    provider: str
    key_id: str
    model: str
    state: BreakerState
    failures: int
    opened_for_s: float


class Health:
    """The circuit breakers of a gateway. Synchronous; belongs to one event loop.

    Args:
        open_s: First pause of a circuit that opens; it doubles up to OPEN_MAX_S, with jitter.
        slow_call_s: A stream whose first token takes longer counts as a failure; a probe that is silent for
            longer is followed by another.
        clock: Times.
        rng: Draws the jitter.
        circuits_max: Most circuits remembered; beyond them the least recently used closed one is forgotten.
    """

    def __init__(
        self,
        *,
        open_s: float,
        slow_call_s: float,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
        circuits_max: int = CIRCUITS_MAX,
    ) -> None:
        self.slow_call_s = slow_call_s
        self.clock = clock
        self._open_s = open_s
        self._rng = rng or random.Random()
        self._circuits_max = circuits_max
        self._circuits: OrderedDict[tuple[str, str, str], Breaker] = OrderedDict()

    @classmethod
    def of(
        cls, settings: GatewaySettings, *, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None
    ) -> Self:
        """As the settings say; slow is most of the deadline at the latest, or a mute one never counted."""
        slow_call_s = min(settings.slow_call_s, _SLOW_OF_TIMEOUT * settings.timeout_s)
        return cls(open_s=settings.breaker_open_s, slow_call_s=slow_call_s, clock=clock, rng=rng)

    def permit(self, provider: str, key_id: str, model: str) -> Permit:
        """Leave to make one call; report its outcome on the permit.

        Raises:
            CircuitOpen: not now; carries `retry_after_s`.
        """
        name = (provider, key_id, model)
        breaker = self._circuits.get(name)
        if breaker is None:
            breaker = self._add(name)
        else:
            self._circuits.move_to_end(name)
        try:
            return breaker.acquire()
        except CircuitOpen as error:
            error.details.update(provider=provider, key_id=key_id, model=model)
            raise

    def aside(self, provider: str, key_id: str, model: str) -> Permit:
        """Leave for a question beside the model's answers; what becomes of it is not counted.

        Raises:
            CircuitOpen: the model may not be asked now; carries `retry_after_s`.
        """
        breaker = self._circuits.get((provider, key_id, model))
        if breaker is not None and breaker.state == "open":
            self.permit(provider, key_id, model).abandoned()
        return Breaker(provider, clock=self.clock).acquire()

    def states(self) -> list[BreakerReport]:
        """Every circuit in use, for metrics. One that is missing is closed."""
        return [
            BreakerReport(*name, breaker.state, breaker.failures, breaker.down_for_s)
            for name, breaker in self._circuits.items()
        ]

    def forget(self, provider: str, key_id: str) -> None:
        """Drop the circuits of a key that is no longer in use."""
        for name in [name for name in self._circuits if name[:2] == (provider, key_id)]:
            del self._circuits[name]

    def _add(self, name: tuple[str, str, str]) -> Breaker:
        if len(self._circuits) >= self._circuits_max:
            self._evict()
        provider, key_id, model = name
        breaker = Breaker(
            f"{provider}:{model} with key {key_id}" if key_id else f"{provider}:{model}",
            failures_max=FAILURES_MAX,
            open_s=self._open_s,
            open_max_s=OPEN_MAX_S,
            error_rate_max=ERROR_RATE_MAX,
            window_s=WINDOW_S,
            calls_min=CALLS_MIN,
            probe_s=self.slow_call_s,
            clock=self.clock,
            rng=self._rng,
        )
        self._circuits[name] = breaker
        return breaker

    def _evict(self) -> None:
        # Names of models come from callers: made-up ones must not push out what is known of real ones.
        oldest = next(iter(self._circuits))
        for looked, (name, breaker) in enumerate(self._circuits.items()):
            if breaker.state == "closed":
                oldest = name
                break
            if looked >= _EVICTION_LOOKS:
                break
        del self._circuits[oldest]
