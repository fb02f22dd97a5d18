"""What a router remembers between calls, all of it bounded: who holds a conversation, who answers soon."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from agentic_flow.core.clock import Clock

PINS_TENANT_MAX = 4096
PINS_MAX = 65_536
LATENCIES_MAX = 4096
LATENCY_AGE_MAX_S = 300.0
"""An average this old says nothing any more: the target is tried again."""
PROBE_TIMEOUT_S = 30.0
"""How long one call that tries an unmeasured target keeps others from doing the same."""
_NEWEST = 0.2
_SUCCESS_MIN = 0.05

Key = tuple[str, str]


class Pins:
    """Conversations and the targets that hold them: the least recently used are forgotten first.

    A tenant with many conversations displaces its own; past the bound of all, the tenant that was idle
    longest loses its oldest.
    """

    def __init__(self, *, tenant_max: int = PINS_TENANT_MAX, total_max: int = PINS_MAX) -> None:
        self._tenant_max = tenant_max
        self._total_max = total_max
        self._tenants: OrderedDict[str, OrderedDict[bytes, Key]] = OrderedDict()
        self._total = 0

    @staticmethod
    def key(tenant: str, route: str, conversation: str) -> bytes:
        """What a conversation is known by; what callers call it is not kept, and may be of any length."""
        parts = (part.encode("utf-8", "surrogatepass") for part in (tenant, route, conversation))
        digest = blake2b(digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()

    def __len__(self) -> int:
        return self._total

    def get(self, tenant: str, key: bytes) -> Key | None:
        """Who holds it, as used now; None for a conversation that is not known."""
        pins = self._tenants.get(tenant)
        held = pins.get(key) if pins else None
        if pins is not None and held is not None:
            pins.move_to_end(key)
            self._tenants.move_to_end(tenant)
        return held

    def add(self, tenant: str, key: bytes, target: Key) -> None:
        """Have a target hold it, unless one does."""
        pins = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        if key in pins:
            pins.move_to_end(key)
            return
        pins[key] = target
        self._total += 1
        if len(pins) > self._tenant_max:
            pins.popitem(last=False)
            self._total -= 1
        if self._total > self._total_max:
            idle, theirs = next(iter(self._tenants.items()))
            theirs.popitem(last=False)
            self._total -= 1
            if not theirs:
                del self._tenants[idle]

    def drop(self, tenant: str, key: bytes) -> None:
        """Forget one conversation."""
        pins = self._tenants.get(tenant)
        if pins is not None and pins.pop(key, None) is not None:
            self._total -= 1
            if not pins:
                del self._tenants[tenant]


@dataclass(slots=True)
class _Seen:
    latency_s: float | None = None
    success: float = 1.0
    at_s: float = 0.0
    probing_until_s: float = 0.0


class Latencies:
    """Moving averages of the time to the first token, by target.

    Failures count as well: a target that answers every second time is expected to take twice as long.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: OrderedDict[Key, _Seen] = OrderedDict()

    def observe(self, key: Key, first_token_s: float | None, ok: bool) -> None:
        """Take in one call."""
        seen = self._seen.get(key)
        if seen is None:
            seen = self._entry(key)
        else:
            self._seen.move_to_end(key)
        now_s = self._clock.monotonic_s()
        if now_s - seen.at_s > LATENCY_AGE_MAX_S:
            seen.latency_s, seen.success = None, 1.0
        if first_token_s is not None:
            before_s = first_token_s if seen.latency_s is None else seen.latency_s
            seen.latency_s = before_s + _NEWEST * (first_token_s - before_s)
        seen.success += _NEWEST * (float(ok) - seen.success)
        seen.at_s = now_s
        seen.probing_until_s = 0.0

    def begin_probe(self, key: Key) -> None:
        """One call is about to find out; until it did, others need not."""
        self._entry(key).probing_until_s = self._clock.monotonic_s() + PROBE_TIMEOUT_S

    def expected_s(self, key: Key) -> float | None:
        """Expected time to a first token; None when it is not known, or not any more."""
        seen = self._seen.get(key)
        if seen is None or seen.latency_s is None:
            return None
        if self._clock.monotonic_s() - seen.at_s > LATENCY_AGE_MAX_S:
            return None
        return seen.latency_s / max(_SUCCESS_MIN, seen.success)

    def rank(self, key: Key) -> tuple[int, float]:
        """For sorting: what is to be measured, then by expected time, then what failed or is being tried."""
        expected_s = self.expected_s(key)
        if expected_s is not None:
            return 1, expected_s
        seen = self._seen.get(key)
        if seen is None:
            return 0, 0.0
        now_s = self._clock.monotonic_s()
        failed = seen.success < 1.0 and now_s - seen.at_s <= LATENCY_AGE_MAX_S
        return (2, 0.0) if failed or now_s < seen.probing_until_s else (0, 0.0)

    def _entry(self, key: Key) -> _Seen:
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(at_s=self._clock.monotonic_s())
            if len(self._seen) > LATENCIES_MAX:
                self._seen.popitem(last=False)
        else:
            self._seen.move_to_end(key)
        return seen
