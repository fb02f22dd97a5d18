"""Rate limits of callers, and the door that sheds load: both without a lock, a task or a database.

Both are per process: with several workers or replicas each lets through its own allowance. Where a limit must
hold over all of them, divide it by their number, or use a budget, which has one ledger.

A rate limit is a bucket that holds one minute's allowance and refills evenly, so a rested caller may use it
all at once: in any window of T seconds at most `limit x (1 + T / 60)` is admitted. The bookkeeping is that of
GCRA (ITU-T I.371, the virtual scheduling algorithm) in whole numbers, so that `retry_after_s` is exact.
The library throttled-py was not enough: it is async (some 11 µs CPU a charge), cannot charge several buckets
or none, and cannot correct an estimate by what was used. Nor is `core.request_rate`, which counts requests by
one name and knows neither of these.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import DeadlineExceeded, RateLimited, Unavailable
from agentic_flow.gateway.policies import EACH, Caller, LimitRule

BUCKETS_MAX = 50_000
"""Allowances remembered at once. One that is full is forgotten without effect, so the bound is felt only when
more than so many callers are active within a minute."""
_PLANS_MAX = 16_384
_SWEPT = 8
_US_PER_S = 1_000_000
# A bucket refills by `limit` units a microsecond, so one request or token is worth a minute of them.
_UNIT = 60 * _US_PER_S

Counted = Literal["requests", "tokens"]


class _Bucket:
    """One allowance. `full_at` / `limit` is the microsecond at which it will be full again."""

    __slots__ = ("counted", "forgotten", "full_at", "limit", "rule")

    def __init__(self, rule: LimitRule, counted: Counted, limit: int) -> None:
        self.rule = rule
        self.counted: Counted = counted
        self.limit = limit
        self.full_at = 0
        self.forgotten = False

    def adopt(self, rule: LimitRule, limit: int, now_us: int) -> None:
        """Go on under a changed rule: what was used stays used."""
        used = max(0, self.full_at - now_us * self.limit)
        self.rule, self.limit = rule, limit
        self.full_at = now_us * limit + used


_Charge = tuple[_Bucket, int, int, int]
"""Bucket, amount, the limit at that time (under another one the last means nothing), and `full_at` right
after the charge. A bare tuple: naming the fields would double the time of a charge."""


class OverLimit(RateLimited):
    """A request that was not admitted. `headers(wire)` is what its answer should carry.

    Where no pause would help, `retryable` is False, `retry_after_s` None, and the headers tell the vendors'
    SDKs not to try again.
    """

    def __init__(
        self, message: str, *, shares: Sequence[_Bucket] = (), clock: Clock = SYSTEM_CLOCK, **about: Any
    ) -> None:
        super().__init__(message, **about)
        self.retryable = self.retry_after_s is not None
        self._shares = tuple(shares)
        self._clock = clock

    def headers(self, wire: str) -> dict[str, str]:
        """Headers of the refusal: those of an admitted request, and `x-should-retry` where it is no use."""
        shown = _headers(self._shares, wire, self._clock)
        return shown if self.retryable else {**shown, "x-should-retry": "false"}


class Admission:
    """Leave to make one call. Report once, by `settle` or `release`; later reports are ignored."""

    __slots__ = ("_charges", "_clock", "_open", "_shares")

    def __init__(self, charges: Sequence[_Charge], shares: Sequence[_Bucket], clock: Clock) -> None:
        self._charges = charges
        self._shares = shares
        self._clock = clock
        self._open = bool(charges)

    def settle(self, tokens: int) -> None:
        """Correct the estimate by the tokens that were used.

        Too few were estimated: the rest is charged now, if need be as a debt that later callers wait for. Too
        many: given back, as far as the bucket has not refilled meanwhile as though they had been used.
        """
        if not self._open:
            return
        self._open = False
        for charge in self._charges:
            if tokens != charge[1] and charge[0].counted == "tokens":
                _correct(charge, tokens - charge[1], int(self._clock.monotonic_s() * _US_PER_S))

    def release(self) -> None:
        """The call never ran: give back all that was charged."""
        if not self._open:
            return
        self._open = False
        now_us = int(self._clock.monotonic_s() * _US_PER_S)
        for charge in self._charges:
            _correct(charge, -charge[1], now_us)

    def headers(self, wire: str) -> dict[str, str]:
        """The rate limit headers of a vendor (`openai`, `anthropic`), of the rule with the least left.

        Empty where no rule applies.
        """
        return _headers(self._shares, wire, self._clock) if self._charges else {}


class RateLimits:
    """Allowances per key, tenant and model, per minute.

    Every rule that matches counts, `*` beside a name too: the tightest decides. Not thread-safe: one event
    loop's.

    Args:
        buckets_max: Allowances remembered; see BUCKETS_MAX.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK, *, buckets_max: int = BUCKETS_MAX) -> None:
        self._clock = clock
        self._buckets_max = buckets_max
        self._buckets: OrderedDict[tuple[Any, ...], _Bucket] = OrderedDict()
        self._rules: tuple[LimitRule, ...] = ()
        self._by_name: dict[tuple[str, str], list[tuple[int, LimitRule]]] = {}
        self._plans: dict[tuple[str, str, str], tuple[_Bucket, ...]] = {}
        self._idle = Admission((), (), clock)

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, caller: Caller, model: str, tokens: int, rules: Sequence[LimitRule]) -> Admission:
        """Charge one request and its tokens to every rule that applies, or to none.

        Args:
            model: As it is called in rules: the one asked for.
            tokens: Estimate, input and output together.
            rules: Those in force. The same tuple each time is fastest: it is looked through once.

        Raises:
            OverLimit: a RateLimited; `retry_after_s` is the time until this very request would be admitted
                if nobody else came, rounded up by at most 2 µs; None when it exceeds a whole allowance.
        """
        if rules is not self._rules:
            self._take_rules(tuple(rules))
        if not self._rules:
            return self._idle
        now_us = int(self._clock.monotonic_s() * _US_PER_S)
        place = (caller.tenant, caller.key, model)
        shares = self._plans.get(place)
        if shares is None:
            shares = self._plan(place, now_us)
        else:
            for bucket in shares:
                if bucket.forgotten:
                    shares = self._plan(place, now_us)
                    break
        charges: list[_Charge] = []
        for bucket in shares:
            limit = bucket.limit
            head = now_us * limit
            amount = tokens if bucket.counted == "tokens" else 1
            full_at = bucket.full_at
            end = (full_at if full_at > head else head) + amount * _UNIT
            if end - head > limit * _UNIT:
                raise self._refusal(shares, tokens, now_us)
            charges.append((bucket, amount, limit, end))
        for bucket, _, _, end in charges:
            bucket.full_at = end
        return Admission(charges, shares, self._clock) if charges else self._idle

    def _take_rules(self, rules: tuple[LimitRule, ...]) -> None:
        if rules == self._rules:
            return
        self._rules = rules
        self._plans.clear()
        self._by_name = {}
        alike: dict[tuple[str, str, str | None], int] = {}
        for rule in rules:
            identity = (rule.scope, rule.name, rule.tenant)
            # Two rules on the same thing have a bucket each.
            alike[identity] = ordinal = alike.get(identity, -1) + 1
            self._by_name.setdefault((rule.scope, rule.name), []).append((ordinal, rule))

    def _plan(self, place: tuple[str, str, str], now_us: int) -> tuple[_Bucket, ...]:
        """The buckets that a caller's requests for a model are charged to."""
        tenant, key, model = place
        shares: list[_Bucket] = []
        for scope, subject, owner in (("tenant", tenant, ""), ("key", key, tenant), ("model", model, tenant)):
            for name in {subject, EACH}:
                for ordinal, rule in self._by_name.get((scope, name), ()):
                    if rule.tenant is not None and rule.tenant != tenant:
                        continue
                    identity = (scope, name, rule.tenant, ordinal, owner, subject)
                    if rule.requests_per_minute is not None:
                        limit = rule.requests_per_minute
                        shares.append(self._bucket(identity, rule, "requests", limit, now_us))
                    if rule.tokens_per_minute is not None:
                        limit = rule.tokens_per_minute
                        shares.append(self._bucket(identity, rule, "tokens", limit, now_us))
        self._plans.pop(place, None)
        if len(self._plans) >= _PLANS_MAX:
            del self._plans[next(iter(self._plans))]
        self._plans[place] = plan = tuple(shares)
        return plan

    def _bucket(
        self, identity: tuple[Any, ...], rule: LimitRule, counted: Counted, limit: int, now_us: int
    ) -> _Bucket:
        place = (counted, *identity)
        bucket = self._buckets.get(place)
        if bucket is None:
            if len(self._buckets) >= self._buckets_max:
                self._forget_one(now_us)
            bucket = self._buckets[place] = _Bucket(rule, counted, limit)
        elif bucket.limit != limit or bucket.rule is not rule:
            bucket.adopt(rule, limit, now_us)
        return bucket

    def _forget_one(self, now_us: int) -> None:
        """A full bucket, if one is among the oldest; else the oldest of all."""
        for _ in range(min(_SWEPT, len(self._buckets) - 1)):
            place, bucket = next(iter(self._buckets.items()))
            if bucket.full_at <= now_us * bucket.limit:
                break
            self._buckets.move_to_end(place)
        _, bucket = self._buckets.popitem(last=False)
        bucket.forgotten = True

    def _refusal(self, shares: Iterable[_Bucket], tokens: int, now_us: int) -> OverLimit:
        wait_us, worst, hopeless = -1, None, False
        for bucket in shares:
            head = now_us * bucket.limit
            amount = tokens if bucket.counted == "tokens" else 1
            lacking = max(bucket.full_at, head) + amount * _UNIT - head - bucket.limit * _UNIT
            too_large = amount > bucket.limit
            if lacking > 0 and (too_large, -(-lacking // bucket.limit)) > (hopeless, wait_us):
                hopeless, wait_us, worst = too_large, -(-lacking // bucket.limit), bucket
        assert worst is not None, "no rule refuses this request"
        rule, limit = worst.rule, worst.limit
        whose = f"each {rule.scope}" if rule.name == EACH else f"the {rule.scope} {rule.name!r}"
        details: dict[str, Any] = {
            "scope": rule.scope,
            "name": rule.name,
            "counted": worst.counted,
            "limit_per_minute": limit,
        }
        if hopeless:
            return OverLimit(
                f"the request needs about {tokens!r} tokens, more than the {limit!r} a minute of {whose}",
                hint="waiting does not help: send less or lower the output limit, or have the limit raised",
                details=details,
                shares=tuple(shares),
                clock=self._clock,
            )
        return OverLimit(
            f"the limit of {limit!r} {worst.counted} per minute of {whose} is reached",
            hint="wait as long as it says, or have the limit raised",
            # What is lost in rounding the clock down must not make the wait too short.
            retry_after_s=(wait_us + 1) / _US_PER_S,
            details=details,
            shares=tuple(shares),
            clock=self._clock,
        )


def _correct(charge: _Charge, more: int, now_us: int) -> None:
    """Charge `more` tokens or requests, or give back where it is negative.

    What was charged drains in the order of the charges. Only the part of this one that has not drained yet
    can be given back: the rest refilled the bucket already, and would count twice.
    """
    bucket, _, limit, end = charge
    head = now_us * bucket.limit
    if more > 0:
        bucket.full_at = max(bucket.full_at, head) + more * _UNIT
    elif more < 0:
        end = min(end, bucket.full_at) if limit == bucket.limit else bucket.full_at
        bucket.full_at -= max(0, min(-more * _UNIT, end - head))


# Headers


def _headers(shares: Iterable[_Bucket], wire: str, clock: Clock) -> dict[str, str]:
    """Sources: platform.openai.com "Rate limits in headers"; docs.anthropic.com "Rate limits"."""
    now_us = int(clock.monotonic_s() * _US_PER_S)
    tightest: dict[Counted, tuple[int, int, float]] = {}
    for bucket in shares:
        limit = bucket.limit
        used = bucket.full_at - now_us * limit
        used = used if used > 0 else 0
        left = (limit * _UNIT - used) // _UNIT
        left = left if left > 0 else 0
        counted = bucket.counted
        known = tightest.get(counted)
        if known is None or left < known[0] or (left == known[0] and limit < known[1]):
            tightest[counted] = (left, limit, used / limit / _US_PER_S)
    shown: dict[str, str] = {}
    for counted, (left, limit, reset_s) in tightest.items():
        names = _HEADER_NAMES[wire == "anthropic", counted]
        shown[names[0]] = str(limit)
        shown[names[1]] = str(left)
        if wire == "anthropic":
            shown[names[2]] = _rfc3339(math.ceil(clock.time_s() + reset_s))
        else:
            # Nearly always there is some left, and less than a second to wait.
            shown[names[2]] = f"{math.ceil(reset_s * 1000)}ms" if reset_s < 0.999 else duration_text(reset_s)
    return shown


_HEADER_NAMES: dict[tuple[bool, Counted], tuple[str, ...]] = {
    (vendor == "anthropic", counted): tuple(pattern.format(counted, part) for part in parts)
    for vendor, pattern, parts in (
        ("anthropic", "anthropic-ratelimit-{0}-{1}", ("limit", "remaining", "reset")),
        ("openai", "x-ratelimit-{1}-{0}", ("limit", "remaining", "reset")),
    )
    for counted in ("requests", "tokens")
}


@lru_cache(maxsize=256)
def _rfc3339(at_s: int) -> str:
    """In whole seconds, as the vendor gives it."""
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


def duration_text(duration_s: float) -> str:
    """As OpenAI writes a time to wait, rounded up: `120ms`, `8.64s`, `1m2s`, `2h0m5s`."""
    millis = math.ceil(duration_s * 1000)
    if millis < 1000:
        return f"{millis}ms"
    if millis < 60_000:
        return f"{millis / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, seconds = divmod(-(-millis // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


# Load shedding

_RATE_WINDOW_S = 5.0
_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 60.0


_Refusal = Unavailable | DeadlineExceeded


class _Waiter:
    """One request before the door. Its future says None when it is let in, or why it is sent away."""

    __slots__ = ("future", "tenant")

    def __init__(self, tenant: str, future: asyncio.Future[_Refusal | None]) -> None:
        self.tenant = tenant
        self.future = future


class Door:
    """At most so many requests inside; the others wait in a bounded line, or are sent away at once.

    Those who wait are let in tenant by tenant in turn, and within a tenant in the order they came. When the
    line is full, the newest of the tenant with the most in it gives way to a tenant with fewer (fair queueing
    with longest-queue drop), so that a noisy tenant can neither fill the line nor hold it up. Who comes to an
    open door pays for two counters and nothing else.

    Not thread-safe: one event loop's. Waiting is timed by that loop.

    Args:
        concurrent_max: Inside at most.
        queue_max: Waiting at most, over all tenants; 0: nobody waits.
        queue_timeout_s: Seconds that one waits at most.
        clock: By which the rate is measured.
    """

    def __init__(
        self, *, concurrent_max: int, queue_max: int, queue_timeout_s: float, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.inside = 0
        """Requests let in and not yet out."""
        self.waiting = 0
        self._concurrent_max = concurrent_max
        self._queue_max = queue_max
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self._left = 0
        # Two earlier readings of (when, how many had left); the older one is what the rate is measured from.
        self._older = self._newer = (clock.monotonic_s(), 0)

    def enter(self, deadline: Deadline, tenant: str = "") -> _Entry:
        """`async with door.enter(deadline, tenant):` around the work.

        Raises:
            Unavailable: the line is full, or waiting took `queue_timeout_s`; `retry_after_s` is how long the
                line would take at the present rate.
            DeadlineExceeded: the deadline passed while waiting.
        """
        return _Entry(self, deadline, tenant)

    def entered(self) -> AbstractAsyncContextManager[None]:
        """`async with door.entered():` around the work of one who has taken a place by `open_to`."""
        return _Entered(self)

    def open_to(self) -> bool:
        """Take a place if there is one; for `enter`."""
        # A place that gets free goes to who waits, so with anybody waiting there is none.
        if self.inside >= self._concurrent_max:
            return False
        self.inside += 1
        return True

    def leave(self) -> None:
        """Give a place back: to the next who waits, if anybody does; for `enter`."""
        self._left += 1
        waiter = self._next() if self._lines else None
        if waiter is None:
            self.inside -= 1
        else:
            waiter.future.set_result(None)

    async def wait(self, deadline: Deadline, tenant: str) -> None:
        """Wait for a place; for `enter`."""
        now_s = self._clock.monotonic_s()
        self._read_rate(now_s)
        remaining_s = deadline.remaining_s
        if remaining_s <= 0:
            raise self._too_late()
        if self.waiting >= self._queue_max and not self._make_room(tenant):
            raise self._full()
        loop = asyncio.get_running_loop()
        waiter = _Waiter(tenant, loop.create_future())
        self._lines.setdefault(tenant, deque()).append(waiter)
        self.waiting += 1
        late = remaining_s <= self._queue_timeout_s
        timer = loop.call_later(
            min(self._queue_timeout_s, remaining_s),
            lambda: self._send_away(waiter, self._too_late() if late else self._full()),
        )
        try:
            refusal = await waiter.future
        except asyncio.CancelledError:
            if waiter.future.cancelled():
                self._remove(waiter)
            elif waiter.future.result() is None:
                self.leave()  # the place came in the same turn as the cancellation
            raise
        finally:
            timer.cancel()
        if refusal is not None:
            raise refusal

    def _next(self) -> _Waiter | None:
        """The first of the tenant whose turn it is; that tenant goes to the end of the round."""
        while self._lines:
            tenant, line = next(iter(self._lines.items()))
            waiter = line.popleft()
            self.waiting -= 1
            if line:
                self._lines.move_to_end(tenant)
            else:
                del self._lines[tenant]
            if not waiter.future.done():
                return waiter
        return None

    def _send_away(self, waiter: _Waiter, refusal: _Refusal) -> None:
        if not waiter.future.done():
            self._remove(waiter)
            waiter.future.set_result(refusal)

    def _remove(self, waiter: _Waiter) -> None:
        line = self._lines.get(waiter.tenant)
        if line is not None and waiter in line:
            line.remove(waiter)
            self.waiting -= 1
            if not line:
                del self._lines[waiter.tenant]

    def _make_room(self, tenant: str) -> bool:
        """Send away the newest of the longest line, unless the newcomer's would then be as long."""
        if not self._lines:
            return False
        longest = max(self._lines.values(), key=len)
        if len(longest) <= len(self._lines.get(tenant, ())) + 1:
            return False
        self._send_away(longest[-1], self._full())
        return True

    def _read_rate(self, now_s: float) -> None:
        if now_s - self._newer[0] >= _RATE_WINDOW_S:
            # After a time without a line the older reading would spread the rate over that time.
            self._older = self._newer if self.waiting else (now_s, self._left)
            self._newer = (now_s, self._left)

    def _retry_after_s(self) -> float:
        since_s, left = self._older
        passed, elapsed_s = self._left - left, self._clock.monotonic_s() - since_s
        if passed <= 0 or elapsed_s <= 0:
            expected_s = self._queue_timeout_s
        else:
            expected_s = (self.waiting + 1) * elapsed_s / passed
        return round(min(_RETRY_MAX_S, max(_RETRY_MIN_S, expected_s)), 3)

    def _full(self) -> Unavailable:
        return Unavailable(
            f"the gateway is busy: {self.inside!r} requests are served and {self.waiting!r} wait",
            hint="try again later, or raise gateway.concurrent_max",
            retry_after_s=self._retry_after_s(),
        )

    @staticmethod
    def _too_late() -> DeadlineExceeded:
        return DeadlineExceeded(
            "no time was left while the request waited for its turn", hint="give it a longer timeout"
        )


class _Entry:
    """What `async with` works on."""

    __slots__ = ("_deadline", "_door", "_tenant")

    def __init__(self, door: Door, deadline: Deadline, tenant: str) -> None:
        self._door = door
        self._deadline = deadline
        self._tenant = tenant

    async def __aenter__(self) -> None:
        if not self._door.open_to():
            await self._door.wait(self._deadline, self._tenant)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._door.leave()


class _Entered:
    """The same for a place that is taken already."""

    __slots__ = ("_door",)

    def __init__(self, door: Door) -> None:
        self._door = door

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._door.leave()
