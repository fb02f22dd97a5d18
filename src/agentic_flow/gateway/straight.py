"""The straight path of an ordinary whole request: in the event loop's callbacks, without a task.

What is ordinary, and why, is told by docs/decisions/0019. A `StraightWalk` takes the same things in the same
order as the walk that it is, without waiting for any: a place among the limits, a place at the door, the
budget's money, a key of the provider, a connection. If one cannot be had at once, or the answer is not a good
one, it is handed over: its `whole` goes on from there as a walk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

import structlog
from opentelemetry import trace

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, RateLimited
from agentic_flow.core.messages import Completion
from agentic_flow.core.telemetry import writes_info
from agentic_flow.gateway.budgets.service import Reservation
from agentic_flow.gateway.calls import Ended
from agentic_flow.gateway.exchange import Begun
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.prices import ModelRates
from agentic_flow.gateway.providers import HttpProvider
from agentic_flow.gateway.questions import Destination, Question
from agentic_flow.gateway.routing.plan import Plan
from agentic_flow.gateway.walk import House, Walk, Whole
from agentic_flow.gateway.wire.passing import PassingRequest

COURSE_AGE_MAX_S = 0.25
"""How long it is believed what a name means; as long as a key's file is."""
COURSES_MAX = 1024
_RATES_MAX = 16

_log = structlog.get_logger(__name__)


class Course(NamedTuple):
    """Where requests for a model go, while everything is as it was.

    Args:
        policies: Those that were in force.
        plan: The one candidate.
        at: Where it is asked.
        provider: Who is.
        served: How answers' headers name it.
        rates: Prices by the model that answers name, as far as they were asked.
        observed: Takes the time to the first token, and whether it answered.
        told: Whether a log line is written for each.
        until_s: When it is to be looked at again, by the monotonic clock.
    """

    policies: GatewayPolicies
    plan: Plan
    at: Destination
    provider: HttpProvider
    served: str
    rates: dict[str, ModelRates | None]
    observed: Callable[[float | None, bool], None]
    told: bool
    until_s: float


class StraightCounts:
    """How many requests went which way since the start."""

    __slots__ = ("begun", "finished", "handed_over")

    def __init__(self) -> None:
        self.begun = 0
        """Begun without a task."""
        self.finished = 0
        """Answered without one."""
        self.handed_over = 0
        """Handed to the general walk on the way."""


class Straight:
    """Knows which requests are ordinary.

    Args:
        house: What walks use.
        placed: Provider, model → where it is asked.
    """

    def __init__(self, house: House, placed: Callable[[str, str], Destination]) -> None:
        self.counts = StraightCounts()
        self._house = house
        self._placed = placed
        self._courses: dict[str, Course | None] = {}
        self._until_s = 0.0

    def walk(
        self, question: Question, *, principal: Principal, deadline: Deadline, request_id: str
    ) -> StraightWalk | None:
        """A walk for a request that is ordinary as far as can be seen now; None: it is not."""
        course = self._courses.get(question.asked)
        if (
            course is None
            or self._house.clock.monotonic_s() >= course.until_s
            or course.policies is not self._house.policies()
        ):
            course = self._course(question.asked)
            if course is None:
                return None
        return StraightWalk(
            self._house,
            question,
            course,
            self.counts,
            principal=principal,
            deadline=deadline,
            request_id=request_id,
        )

    def _course(self, asked: str) -> Course | None:
        now_s = self._house.clock.monotonic_s()
        if now_s < self._until_s and asked in self._courses and self._courses[asked] is None:
            return None
        if now_s >= self._until_s or len(self._courses) >= COURSES_MAX:
            # What is not ordinary is looked at again as well.
            self._courses = {}
            self._until_s = now_s + COURSE_AGE_MAX_S
        course = self._courses[asked] = self._look(asked, now_s)
        return course

    def _look(self, asked: str, now_s: float) -> Course | None:
        house = self._house
        if house.open is not None:
            return None
        policies = house.policies()
        if policies.cache.mode != "off" or not house.guardrails(policies).empty:
            return None
        try:
            plan = house.router.plan(asked, policies, explore=False)
        except AgenticFlowError:
            return None  # the walk says why
        if plan.route is not None or plan.escalation is not None or len(plan.candidates) != 1:
            return None
        candidate = plan.candidates[0]
        provider = house.providers[candidate.provider]
        model = candidate.model or provider.default_model
        if type(provider) is not HttpProvider or not model:
            return None
        at = self._placed(candidate.provider, model)
        return Course(
            policies=policies,
            plan=plan,
            at=at,
            provider=provider,
            served=f"{at.provider}:{at.model}",
            rates={},
            observed=house.router.observer(candidate),
            told=writes_info(),
            until_s=now_s + COURSE_AGE_MAX_S,
        )


class StraightWalk(Walk):
    """An ordinary whole request. `begin` it; `look` at each news; `commit` its answer, or `leave` the path.

    Args:
        house, question, principal, deadline, request_id: As for `Walk`.
        course: Where it goes.
        counts: Count what becomes of it.
    """

    # As they begin.
    _sent: PassingRequest | None = None
    _planned = False
    """Whether the limits have admitted it."""
    _inside = False
    """Whether it holds a place at the door."""
    _held: Reservation | None = None
    _is_reserved = False
    _under_way: Begun | None = None

    def __init__(
        self,
        house: House,
        question: Question,
        course: Course,
        counts: StraightCounts,
        *,
        principal: Principal,
        deadline: Deadline,
        request_id: str,
    ) -> None:
        super().__init__(
            house,
            question,
            principal=principal,
            deadline=deadline,
            idempotency_key=None,
            request_id=request_id,
        )
        self._course = course
        self._counts = counts
        self._policies = course.policies

    # Straight on

    def begin(self, told: Callable[[], None]) -> bool:
        """Take what is needed, and ask the provider. False: hand it over.

        Args:
            told: Called whenever there is something to `look` at.
        """
        self._counts.begun += 1
        try:
            begun = self._take()
        except (AgenticFlowError, ValueError):
            return False  # the general walk comes to the same, and says it
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and the general walk goes on
            _log.exception("straight_path_failed")
            return False
        if begun is None:
            return False
        self._under_way = begun
        begun.pending.connection.told = told
        return True

    def _take(self) -> Begun | None:
        house, course, question, caller = self._house, self._course, self._question, self._caller
        at, policies = course.at, course.policies
        if question.wire in at.passes:
            self._sent, encoded = question.passing(at), None
        else:
            encoded = course.provider.encode(self._translated(at))
        if policies.limits:
            try:
                self._admission = house.limits.admit(
                    caller, question.asked, question.input_tokens(), policies.limits
                )
            except RateLimited:
                return None
            if question.wire is not None:
                self.headers |= self._admission.headers(question.wire)
        self._planned = True
        if not house.door.open_to():
            return None
        self._inside = True
        self._call.destination = at
        rules, budgets = policies.budgets, house.budgets
        if rules and budgets is not None:
            most = self._cost_max(at)
            if most is None:
                return None
            self._held = budgets.at_once(caller, rules, most)
            if self._held is None:
                return None
        self._is_reserved = True
        if encoded is not None:
            return course.provider.begin(encoded, at.model, self._deadline)
        assert self._sent is not None
        return course.provider.begin_passing(self._sent, at.model, self._deadline)

    def look(self) -> Straightened | None:
        """The answer, if it is there; None: more is to come.

        Raises:
            NotOrdinary, AgenticFlowError: it must be handed over; nothing was settled.
        """
        begun = self._under_way
        assert begun is not None, "look at what was begun"
        pending = begun.pending
        body = pending.whole()
        if body is None:
            if pending.waits():
                return None
            raise NotOrdinary
        course = self._course
        at, provider = course.at, course.provider
        sent = self._sent
        if sent is None:
            completion = self._priced(provider.decode(self._translated(at), body), at)
            return Straightened(None, completion, completion)
        seen = provider.glance(sent, body)
        if seen is not None:
            rates = course.rates.get(seen.model) or self._rates(at, seen.model) or self._rates(at, at.model)
            if rates is not None:
                seen.cost_usd = rates.cost_usd(seen)
            return Straightened(body, Ended(at.provider, seen.model, seen.stop_reason, seen), None)
        reader = provider.reader(sent)
        provider.read_answer(reader, body)
        usage = reader.usage
        if usage is None:
            return Straightened(body, self._priced(self._read(at, reader), at), None)
        model = reader.model or at.model
        usage = self._price(usage, model, at)
        return Straightened(body, Ended(at.provider, model, reader.stop_reason, usage), None)

    def commit(self, ended: Completion | Ended) -> None:
        """Settle everything for an answer that will be given now.

        Raises:
            InvalidInput: its cost is absurd; it must be handed over.
        """
        begun, house = self._under_way, self._house
        assert begun is not None, "commit what was begun"
        self._call.tries = 1
        self._pay(self._held, ended.usage)
        begun.pending.connection.told = None
        begun.finish()
        self._under_way = None
        course = self._course
        course.observed(None, True)
        self.headers["x-agentic-flow-model"] = course.served
        self._inside = False
        house.door.leave()
        self._call.finished(trace.INVALID_SPAN, ended, told=course.told)
        self._counts.finished += 1

    def leave(self) -> None:
        """Leave the path: `whole` goes on with what there is."""
        self._counts.handed_over += 1
        self._call.tries = 0
        if self._under_way is not None:
            self._under_way.pending.connection.told = None

    # As a walk, with what was taken already

    async def whole(self) -> Whole:
        """See `Walk`."""
        try:
            return await super().whole()
        except BaseException as error:
            # Cancelled or out of time before the walk came to it.
            begun, self._under_way = self._under_way, None
            if begun is not None:
                begun.drop(error)
            if self._inside:
                self._inside = False
                self._house.door.leave()
            if self._is_reserved and self._held is not None:
                self._held.release()
            raise

    async def _admitted(self) -> Plan:
        return self._course.plan if self._planned else await super()._admitted()

    def _at_the_door(self) -> AbstractAsyncContextManager[None]:
        if not self._inside:
            return super()._at_the_door()
        self._inside = False
        return self._house.door.entered()

    async def _reserved(self, at: Destination) -> Reservation | None:
        if not self._is_reserved:
            return await super()._reserved(at)
        self._is_reserved = False
        return self._held

    def _rates(self, at: Destination, model: str) -> ModelRates | None:
        known = self._course.rates
        if model in known:
            return known[model]
        if len(known) >= _RATES_MAX:
            known.clear()
        rates = known[model] = super()._rates(at, model)
        return rates

    @property
    def _is_begun(self) -> bool:
        return self._under_way is not None

    def _begun_exchange(self) -> Begun | None:
        begun, self._under_way = self._under_way, None
        return begun


class Straightened(NamedTuple):
    """An answer that can be given.

    Args:
        body: The provider's bytes, where they pass through.
        ended: For the books.
        completion: To be translated, where they do not.
    """

    body: bytes | None
    ended: Completion | Ended
    completion: Completion | None


class NotOrdinary(Exception):
    """The answer is another one than the straight path knows."""
