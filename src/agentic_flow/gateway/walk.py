"""One call's walk through the gateway.

Guardrails → route → rate limits → cache → a place at the door → for each candidate of the route: reserve its
budget, ask, and go on to the next one if it fails before the first token → settle the budget → the books.
After the first token there is no other candidate: a stream that breaks ends with its error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import structlog

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Clock, Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    BudgetExceeded,
    CircuitOpen,
    DeadlineExceeded,
    InvalidInput,
    PolicyDenied,
    ProviderError,
    ProviderProtocol,
    ProviderRejected,
    UnknownModel,
)
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    ToolCallDelta,
    ToolCallPart,
    Usage,
)
from agentic_flow.gateway.budgets.service import Budgets, Reservation
from agentic_flow.gateway.cache import Cached, ResponseCache, SemanticIndex, cache_key, cacheable
from agentic_flow.gateway.cache import Question as Meaning
from agentic_flow.gateway.calls import NOTHING, Books, CallRecord, changed, nano_usd
from agentic_flow.gateway.checkers import Checker
from agentic_flow.gateway.escalation import Escalated, escalate
from agentic_flow.gateway.exchange import Begun
from agentic_flow.gateway.guardrails import CompiledGuardrails, GuardedAnswer, GuardedRequest, Guardrails
from agentic_flow.gateway.limits import Admission, Door, RateLimits
from agentic_flow.gateway.onward import Onward
from agentic_flow.gateway.policies import Caller, Escalation, GatewayPolicies
from agentic_flow.gateway.prices import ModelRates
from agentic_flow.gateway.providers import HttpProvider, Provider, log_estimate
from agentic_flow.gateway.questions import Destination, Question
from agentic_flow.gateway.retries import RetryPolicy
from agentic_flow.gateway.routing.learned import embedding, packed
from agentic_flow.gateway.routing.outcomes import Outcome, OutcomeLog
from agentic_flow.gateway.routing.plan import Candidate, Plan, Router
from agentic_flow.gateway.wire.format import load_object
from agentic_flow.gateway.wire.passing import CHARS_PER_TOKEN, Glance, PassingReader

_log = structlog.get_logger(__name__)

T = TypeVar("T")

NO_POLICIES = GatewayPolicies()
_NO_GUARDRAILS = Guardrails().compile(())

_OUR_COMPLETION = "application/vnd.agentic-flow.completion+json"

OUTPUT_TOKENS_UNLIMITED = 131_072
"""What a request that sets no limit is taken to be able to write where the model's context is not known."""

OUTPUT_TOKENS_EXPECTED = 1000
"""What it is taken to write when targets are compared by cost."""

# What another candidate may do better.
_FOR_ANOTHER = (ProviderError, CircuitOpen, UnknownModel, InvalidInput, BudgetExceeded, DeadlineExceeded)
_TIME_OF_ONE = 0.75

# What the caller wrote is at fault; no other provider would take it either.
_CALLERS_FAULT = frozenset({400, 413, 422})


@dataclass(slots=True)
class House:
    """What every walk uses; made once by the gateway.

    Args:
        open: Opens the stores before the first call; None once they are open, or where there are none.
        policies: Those in force now.
        providers: By name.
        rates: Prices of a provider's model, None when they are not known.
        place: Candidate, deadline → where it is asked, under the provider's own name of the model.
        router: Orders candidates.
        retries: How often a provider is tried.
        door: Bounds what is under way.
        limits, cache: As their modules say.
        meanings: The semantic index of the cache; None where there is no embedder.
        budgets: None: there is no ledger, and no budgets are kept.
        guardrails: Those in force.
        checker: The checker of an escalation, for a principal.
        outcomes: Where verdicts are logged.
        books: Takes the records.
        clock: Times.
        timeout_s: Longest time of a call.
        patience_s: How long a candidate may be silent, while there is another one.
    """

    open: Callable[[], Awaitable[None]] | None
    policies: Callable[[], GatewayPolicies]
    providers: Mapping[str, Provider]
    rates: Callable[[str, str], ModelRates | None]
    place: Callable[[Candidate, Deadline], Awaitable[Destination]]
    router: Router
    retries: RetryPolicy
    door: Door
    limits: RateLimits
    cache: ResponseCache
    meanings: Callable[[], SemanticIndex] | None
    budgets: Budgets | None
    guardrails: Callable[[GatewayPolicies], CompiledGuardrails]
    checker: Callable[[Escalation, Principal, Deadline], Checker]
    outcomes: OutcomeLog | None
    books: Books | None
    clock: Clock
    timeout_s: float
    patience_s: float


class Whole(NamedTuple):
    """A whole answer: the provider's bytes where they passed through, and what the books say of it."""

    body: bytes | None
    completion: Completion


@dataclass(slots=True)
class _Begun(Generic[T]):
    """A stream whose first event is there."""

    destination: Destination
    reservation: Reservation | None
    first: T
    rest: AsyncGenerator[T]
    reader: PassingReader | None = None


class Walk:
    """One call. Use `whole` or `stream`, once.

    `onward` is where a stream goes once its first event was given, if whoever reads it opens this.

    Args:
        house: What it uses.
        question: What is asked.
        principal: Who asks.
        deadline: Of the whole call.
        idempotency_key: Passed on to the provider.
        request_id: Of the request that brought it.
    """

    # As they begin.
    _policies = NO_POLICIES
    """In force for this call, to its end."""
    _admission: Admission | None = None
    _cache_key: bytes | None = None
    _meaning: Meaning | None = None
    _guardrails = _NO_GUARDRAILS

    def __init__(
        self,
        house: House,
        question: Question,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None,
        request_id: str,
    ) -> None:
        self.headers: dict[str, str] = {}
        """What the answer's headers say of limits and route; there once the first event is."""
        self._house = house
        self._question = question
        self._principal = principal
        self._deadline = deadline.earliest(house.timeout_s)
        self._until = self._deadline
        """When the candidate that is asked must have answered, or have begun its stream."""
        self._idempotency_key = idempotency_key
        self._caller = Caller.of(principal, question.agent, question.run)
        self._call = CallRecord(question, self._caller, request_id, house.books, house.clock)

    @property
    def model(self) -> str:
        """The provider's own id of the model that was asked last."""
        at = self._call.destination
        return at.model if at is not None else self._question.asked

    # Walking

    async def whole(self) -> Whole:
        """One whole answer.

        Raises:
            UnknownModel: nothing that is configured serves the name.
            RateLimited, BudgetExceeded, PolicyDenied: what operators set does not allow it.
            ProviderError: every candidate failed; the last one's error.
            DeadlineExceeded: no answer in time.
        """
        with self._call.span() as span:
            try:
                plan = await self._admitted()
                answer = await self._remembered(plan)
                if answer is None:
                    async with self._at_the_door():
                        answer = await self._answered(plan)
                    self._remember(answer)
                await self._look_at(answer)
            except BaseException as error:
                self._failed()
                self._call.failed(span, error)
                raise
            self._call.finished(span, answer.completion)
            return answer

    async def stream(self) -> AsyncGenerator[bytes | StreamEvent]:
        """The answer as it comes: bytes of whole events where they pass through, else events of ours.

        Events of ours end with StreamEnd. An error event of the provider is the last that passes.

        Raises:
            AgenticFlowError: as `whole`; also after events were given.
        """
        # The span is not made current: a generator's body runs in whatever context its consumer has.
        span = self._call.start_span()
        self.onward = Onward()
        used = _Meter()
        try:
            plan = await self._admitted()
            used.keep(not self._guardrails.empty)
            known = await self._remembered(plan)
            if known is None and plan.escalation is not None:
                async with self._house.door.enter(self._deadline, tenant=self._caller.tenant):
                    known = await self._answered(plan)  # a checker sees it before the caller does
                self._remember(known)
            if known is not None:
                completion = known.completion
                for event in [known.body] if known.body is not None else events_of(completion):
                    yield event
            else:
                async with self._house.door.enter(self._deadline, tenant=self._caller.tenant):
                    begun = await self._first_that_works(plan, self._begin)
                    async with aclosing(self._running(begun, used)) as running:
                        async for event in running:
                            yield event
                completion = used.completion
                if completion is None:
                    # The provider's own error event has passed: the caller knows.
                    assert used.error is not None
                    self._call.failed(span, used.error, used.usage)
                    _log.warning("stream_broken", error=used.error.message)
                    return
            await self._look_at(known or Whole(None, completion), used.text)
            self._call.finished(span, completion)
        except BaseException as error:
            self._failed()
            self._call.failed(span, error, used.usage)
            raise
        finally:
            span.end()

    def _at_the_door(self) -> AbstractAsyncContextManager[None]:
        return self._house.door.enter(self._deadline, tenant=self._caller.tenant)

    async def _admitted(self) -> Plan:
        question, house = self._question, self._house
        if house.open is not None:
            await house.open()
        policies = self._policies = house.policies()
        self._guardrails = house.guardrails(policies)
        if not self._guardrails.empty:
            await self._guardrails.before(GuardedRequest(self._caller, question.asked, question.sent()))
        plan = house.router.plan(
            question.asked,
            policies,
            tokens_in=question.input_tokens(),
            tokens_out=question.output_tokens_max() or OUTPUT_TOKENS_EXPECTED,
            conversation=question.conversation,
            prompt=question.prompt() if policies.routes else None,
            tenant=self._caller.tenant,
        )
        if policies.limits:
            self._admission = house.limits.admit(
                self._caller, question.asked, question.input_tokens(), policies.limits
            )
            if question.wire is not None:
                self.headers |= self._admission.headers(question.wire)
        return plan

    async def _answered(self, plan: Plan) -> Whole:
        if plan.escalation is None:
            return await self._first_that_works(plan, self._ask)
        request = self._question.request()
        checker = self._house.checker(plan.escalation, self._principal, self._deadline)

        async def ask(candidate: Candidate) -> Completion:
            return (await self._ask(candidate, 1, translate=True)).completion

        found = await escalate(
            plan.candidates, ask, checker, request=request, tries_max=plan.escalation.tries_max
        )
        for earlier in found.completions[:-1]:
            self._call.spend(earlier.usage)
        if self._house.outcomes is not None:
            self._log_outcomes(self._house.outcomes, plan, found)
        return Whole(None, found.completion)

    def _log_outcomes(self, outcomes: OutcomeLog, plan: Plan, found: Escalated) -> None:
        """What the checker said of each answer, for the router that learns."""
        seen = packed(embedding(self._question.prompt()))
        for number, ((candidate, verdict), completion) in enumerate(
            zip(found.verdicts, found.completions, strict=True)
        ):
            if not verdict.judged:
                continue
            cost = completion.usage.cost_usd
            outcomes.add(
                Outcome(
                    at_s=self._house.clock.time_s(),
                    tenant=self._caller.tenant,
                    embedding=seen,
                    provider=candidate.provider,
                    model=candidate.model,
                    propensity=plan.propensity,
                    verdict=verdict.score,
                    cost_nano_usd=None if cost is None else nano_usd(cost),
                    latency_s=completion.latency_s,
                    tries_before=number,
                )
            )

    async def _first_that_works(self, plan: Plan, ask: Callable[[Candidate, int | None], Awaitable[T]]) -> T:
        """The first candidate's answer, or the next one's where it fails.

        Only the last one is tried several times: a caller waits for no retry while another could answer.
        """
        last = len(plan.candidates) - 1
        for number, candidate in enumerate(plan.candidates):
            self._until = self._deadline if number == last else self._patience()
            try:
                found = await ask(candidate, None if number == last else 1)
            except _FOR_ANOTHER as error:
                if isinstance(error, ProviderError | CircuitOpen | DeadlineExceeded):
                    self._house.router.observe(candidate, None, ok=False)
                if number == last or _callers_fault(error) or self._deadline.remaining_s <= 0:
                    raise
                _log.warning(
                    "candidate_failed",
                    provider=candidate.provider,
                    model=candidate.model,
                    error_code=error.code,
                    error=error.message,
                )
                continue
            at = self._call.destination
            if at is not None:
                self._house.router.observe(candidate, self._call.first_event_s, ok=True)
                self.headers["x-agentic-flow-model"] = f"{at.provider}:{at.model}"
            if plan.sticky:
                self._house.router.served(
                    self._question.conversation, self._caller.tenant, plan.route, candidate
                )
            return found
        raise AssertionError("a plan has a candidate")

    def _patience(self) -> Deadline:
        """How long a candidate that is not the last is waited for. A quarter of the time is for others."""
        return self._deadline.earliest(min(self._house.patience_s, _TIME_OF_ONE * self._deadline.remaining_s))

    # Asking one candidate

    async def _ask(self, candidate: Candidate, attempts: int | None, *, translate: bool = False) -> Whole:
        question, house, call = self._question, self._house, self._call
        at = call.destination = await house.place(candidate, self._until)
        provider = house.providers[at.provider]
        reservation = await self._reserved(at)
        try:
            if question.wire in at.passes and not translate:
                sent = question.passing(at)
                passed = cast(HttpProvider, provider)

                async def passing() -> tuple[bytes, Completion]:
                    call.tries += 1
                    reader = passed.reader(sent)
                    body = await passed.pass_whole(
                        sent,
                        deadline=self._until,
                        idempotency_key=self._idempotency_key,
                        reader=reader,
                        model=at.model,
                        begun=self._begun_exchange(),
                    )
                    return body, self._read(at, reader)

                body, completion = await self._tried(at, passing, attempts)
            else:
                body, asked = None, self._translated(at)

                async def once() -> Completion:
                    call.tries += 1
                    key = self._idempotency_key
                    if asked.stream:
                        events = provider.stream(asked, deadline=self._until, idempotency_key=key)
                        return await _last(at.provider, events)
                    begun = self._begun_exchange()
                    if begun is not None:
                        return await cast(HttpProvider, provider).complete(
                            asked, deadline=self._until, idempotency_key=key, begun=begun
                        )
                    return await provider.complete(asked, deadline=self._until, idempotency_key=key)

                completion = await self._tried(at, once, attempts)
        except BaseException as error:
            self._settle_broken(reservation, at, error)
            raise
        return Whole(body, self._settled(completion, at, reservation))

    async def _begin(self, candidate: Candidate, attempts: int | None) -> _Begun[Any]:
        if self._until is self._deadline:
            return await self._begun(candidate, attempts)
        try:
            # Not by the call's own deadline, which the stream keeps to its end.
            async with asyncio.timeout(self._until.remaining_s):
                return await self._begun(candidate, attempts)
        except TimeoutError as error:
            at = self._call.destination
            raise DeadlineExceeded(
                f"{candidate.provider if at is None else at.provider} did not begin to answer in time",
                hint="another target of the route is asked; see gateway.slow_call_s",
            ) from error

    async def _begun(self, candidate: Candidate, attempts: int | None) -> _Begun[Any]:
        question, house = self._question, self._house
        at = self._call.destination = await house.place(candidate, self._deadline)
        reservation = await self._reserved(at)
        try:
            if question.wire in at.passes:
                first, rest, reader = await self._tried(at, lambda: self._begin_passing(at), attempts)
                return _Begun(at, reservation, first, rest, reader)
            asked = self._translated(at)
            first, rest = await self._tried(at, lambda: self._begin_translated(at, asked), attempts)
            return _Begun(at, reservation, first, rest)
        except BaseException as error:
            self._settle_broken(reservation, at, error)
            raise

    async def _begin_passing(self, at: Destination) -> tuple[bytes, AsyncGenerator[bytes], PassingReader]:
        self._call.tries += 1
        provider = cast(HttpProvider, self._house.providers[at.provider])
        sent = self._question.passing(at)
        reader = provider.reader(sent)
        stream = provider.pass_stream(
            sent,
            reader,
            deadline=self._deadline,
            idempotency_key=self._idempotency_key,
            model=at.model,
            onward=self.onward,
        )
        try:
            first = await anext(stream)
            if reader.error is not None and reader.model == "":
                raise reader.error  # nothing of an answer has come: it can be tried again
        except StopAsyncIteration:
            raise no_end(at.provider) from None
        except BaseException:
            await stream.aclose()
            raise
        return first, stream, reader

    async def _begin_translated(
        self, at: Destination, asked: CompletionRequest
    ) -> tuple[StreamEvent, AsyncGenerator[StreamEvent]]:
        self._call.tries += 1
        provider, key = self._house.providers[at.provider], self._idempotency_key
        given = (
            provider.stream(asked, deadline=self._deadline, idempotency_key=key, onward=self.onward)
            if isinstance(provider, HttpProvider)
            else provider.stream(asked, deadline=self._deadline, idempotency_key=key)
        )
        events = cast(AsyncGenerator[StreamEvent], given)
        try:
            return await anext(events), events
        except StopAsyncIteration:
            raise no_end(at.provider) from None
        except BaseException:
            await events.aclose()
            raise

    async def _running(self, begun: _Begun[Any], used: _Meter) -> AsyncGenerator[Any]:
        """The events of a stream that has begun; `used` knows at the end what it was."""
        at, reader = begun.destination, begun.reader
        self._call.first_event()
        kept: list[bytes] | None = [] if self._cache_key is not None and reader is not None else None

        def pass_by(chunk: bytes) -> None:
            used.pass_by(chunk)
            if kept is not None:
                kept.append(chunk)

        def take(events: list[StreamEvent]) -> None:
            for event in events:
                used.take(event)

        if reader is None:
            self.onward.seen = take
        elif kept is not None or used.text is not None:
            self.onward.seen = pass_by
        try:
            async with aclosing(begun.rest) as rest:
                event = begun.first
                while True:
                    if isinstance(event, StreamEnd):
                        used.completion = self._settled(event.completion, at, begun.reservation)
                        self._remember(Whole(None, used.completion))
                        yield StreamEnd(completion=used.completion)
                        return
                    if reader is None:
                        used.take(event)
                    else:
                        pass_by(event)
                    yield event
                    event = await anext(rest, None)
                    if event is None:
                        break
            if reader is None:
                raise no_end(at.provider)
            if reader.error is not None:
                used.error = reader.error
                used.usage = self._priced(self._read(at, reader), at).usage
                self._pay(begun.reservation, used.usage)
                return
            used.completion = self._settled(self._read(at, reader), at, begun.reservation)
            if kept is not None:
                self._remember(Whole(b"".join(kept), used.completion))
        except BaseException:
            if used.completion is None:
                # What came until then was written, and is billed.
                used.usage = self._priced(self._so_far(at, reader, used), at).usage
                self._call.estimated = True
                self._pay(begun.reservation, used.usage)
            raise

    async def _tried(self, at: Destination, once: Callable[[], Awaitable[T]], attempts: int | None) -> T:
        return await self._house.retries.run(
            once, provider=at.provider, deadline=self._until, attempts=attempts, begun=self._is_begun
        )

    @property
    def _is_begun(self) -> bool:
        """Whether the provider was asked before the walk began to wait; see `straight`."""
        return False

    def _begun_exchange(self) -> Begun | None:
        """What was asked already, once."""
        return None

    def _translated(self, at: Destination) -> CompletionRequest:
        return changed(self._question.request(), model=at.model)

    # Money

    async def _reserved(self, at: Destination) -> Reservation | None:
        rules, budgets = self._policies.budgets, self._house.budgets
        if not rules or budgets is None:
            return None
        most = self._cost_max(at)
        if most is None:
            if not budgets.left(self._caller, rules):
                return None
            raise PolicyDenied(
                f"no price is known for {at.provider}:{at.model}, and a budget is in force",
                hint="give its price in gateway.prices_usd_per_mtok, or ask for another model",
            )
        return await budgets.reserve(self._caller, rules, most)

    def _cost_max(self, at: Destination) -> int | None:
        """The most that it can cost in nano-USD; None when no price is known."""
        rates = self._rates(at, at.model)
        if rates is None:
            return None
        output_max = self._question.output_tokens_max()
        if output_max is None:
            output_max = rates.context_tokens or OUTPUT_TOKENS_UNLIMITED
        return nano_usd(rates.cost_max_usd(self._question.input_tokens_max(), output_max))

    def _priced(self, completion: Completion, at: Destination) -> Completion:
        """With its price, by the model that served, or by the one that was asked where that has none."""
        usage = self._price(completion.usage, completion.model, at)
        return changed(completion, usage=usage, provider=at.provider, latency_s=self._call.elapsed_s())

    def _price(self, usage: Usage, model: str, at: Destination) -> Usage:
        if usage.cost_usd is None:
            rates = self._rates(at, model)
            if rates is None and model != at.model:
                rates = self._rates(at, at.model)
            if rates is not None:
                return changed(usage, cost_usd=rates.cost_usd(usage))
        return usage

    def _rates(self, at: Destination, model: str) -> ModelRates | None:
        return self._house.rates(at.provider, model)

    def _settled(
        self, completion: Completion, at: Destination, reservation: Reservation | None
    ) -> Completion:
        priced = self._priced(completion, at)
        self._pay(reservation, priced.usage)
        return priced

    def _pay(self, reservation: Reservation | None, usage: Usage | Glance) -> None:
        if reservation is not None:
            reservation.settle(nano_usd(usage.cost_usd or 0.0))
        if self._admission is not None:
            self._admission.settle(usage.input_tokens + usage.output_tokens)

    def _settle_broken(self, reservation: Reservation | None, at: Destination, error: BaseException) -> None:
        """Of a call that gave nothing: what the provider may have read of it when the caller left."""
        if reservation is None:
            return
        if isinstance(error, AgenticFlowError):
            reservation.release()
            return
        rates = self._house.rates(at.provider, at.model)
        read = Usage(input_tokens=self._question.input_tokens())
        reservation.settle(nano_usd(rates.cost_usd(read)) if rates is not None and self._call.tries else 0)

    def _failed(self) -> None:
        if self._admission is not None:
            self._admission.release()

    # Reading what came

    def _read(self, at: Destination, reader: PassingReader) -> Completion:
        """What the books need of an answer that passed through."""
        usage, estimated = reader.billed()
        completion = Completion(
            model=reader.model or at.model,
            provider=at.provider,
            parts=(),
            stop_reason=reader.stop_reason,
            usage=usage,
        )
        if estimated:
            self._call.estimated = True
            log_estimate(at.provider, completion)
        return completion

    def _so_far(self, at: Destination, reader: PassingReader | None, used: _Meter) -> Completion:
        if reader is not None:
            return self._read(at, reader)
        usage = Usage(
            input_tokens=self._question.input_tokens(),
            output_tokens=-(-used.chars // CHARS_PER_TOKEN),
            cost_usd=None,
        )
        return Completion(model=at.model, provider=at.provider, parts=(), stop_reason="end", usage=usage)

    # The cache

    async def _remembered(self, plan: Plan) -> Whole | None:
        """The answer that the cache has, for nothing."""
        rule, question, house = self._policies.cache, self._question, self._house
        if rule.mode == "off":
            return None
        sent = question.sent()
        if not cacheable(sent, rule):
            return None
        wire = f"{question.wire or 'ours'}:{'stream' if question.stream else 'whole'}"
        first = plan.candidates[0]
        also = {**question.also(), "asked": f"{first.provider}:{first.model}"}
        self._cache_key = cache_key(wire, sent, also=also)
        found = house.cache.get(self._caller.tenant, self._cache_key, rule)
        if found is None and rule.mode == "semantic" and not plan.private:
            if house.meanings is None:
                raise PolicyDenied(
                    "the policies want a semantic cache, and this gateway has no embedder for it",
                    hint="set cache.mode to exact or off in the policies",
                )
            index = house.meanings()
            self._meaning = await index.ask(self._caller.tenant, wire, sent, also=also)
            if self._meaning is not None:
                found = index.get(self._meaning, rule)
        self.headers["x-agentic-flow-cache"] = "miss" if found is None else "hit"
        if found is None:
            return None
        self._call.cached = True
        if self._admission is not None:
            self._admission.settle(0)
        if found.media == _OUR_COMPLETION:
            known = Completion.model_validate_json(found.body)
            return Whole(None, known.model_copy(update={"usage": NOTHING}))
        completion = Completion(
            model=found.model, provider=found.provider, parts=(), stop_reason="end", usage=NOTHING
        )
        return Whole(found.body, completion)

    def _remember(self, answer: Whole) -> None:
        if self._cache_key is None or self._call.cached:
            return
        house, rule, completion = self._house, self._policies.cache, answer.completion
        own = answer.body is None
        value = Cached(
            body=completion.model_dump_json().encode() if answer.body is None else answer.body,
            media=_OUR_COMPLETION if own else "passed",
            model=completion.model,
            provider=completion.provider,
            usage=completion.usage,
            created_s=house.clock.time_s(),
        )
        house.cache.put(self._caller.tenant, self._cache_key, value, rule)
        if self._meaning is not None and house.meanings is not None:
            house.meanings().put(self._meaning, self._cache_key, rule)

    async def _look_at(self, answer: Whole, streamed: str | None = None) -> None:
        """Let guardrails see the answer. Of one that was streamed they can only note something."""
        if self._guardrails.empty:
            return
        seen: Completion | JsonObject | str = answer.completion
        if streamed is not None:
            seen = streamed
        elif answer.body is not None and not self._question.stream:
            seen = load_object(answer.body, "the answer")
        await self._guardrails.after(
            GuardedAnswer(self._caller, answer.completion.model, seen, streamed=self._question.stream)
        )


class _Meter:
    """What a stream has given."""

    def __init__(self) -> None:
        self.chars = 0
        self.usage = NOTHING
        self.completion: Completion | None = None
        self.error: ProviderError | None = None
        self._kept: list[str] | None = None

    def keep(self, wanted: bool) -> None:
        """Whether guardrails want to see the text at the end."""
        self._kept = [] if wanted else None

    @property
    def text(self) -> str | None:
        """What was written, where it was kept."""
        return None if self._kept is None else "".join(self._kept)

    def take(self, event: StreamEvent) -> None:
        """Count one event."""
        if isinstance(event, TextDelta | ThinkingDelta):
            text = event.text
        elif isinstance(event, ToolCallDelta):
            text = event.arguments_json
        else:
            return
        self.chars += len(text)
        if self._kept is not None:
            self._kept.append(text)

    def pass_by(self, chunk: bytes) -> None:
        """Keep what passed through, for guardrails: they search events as they search text."""
        if self._kept is not None:
            self._kept.append(chunk.decode("utf-8", "replace"))


def events_of(completion: Completion) -> list[StreamEvent]:
    """A whole answer as the events of a stream."""
    import orjson

    events: list[StreamEvent] = []
    calls, written = 0, False
    for part in completion.parts:
        match part:
            case TextPart():
                # Who tells probabilities of tokens writes one text.
                events.append(TextDelta(text=part.text, logprobs=() if written else completion.logprobs))
                written = True
            case ThinkingPart():
                events.append(ThinkingDelta(text=part.text))
            case ToolCallPart():
                arguments = orjson.dumps(part.arguments).decode()
                events.append(
                    ToolCallDelta(index=calls, id=part.id, name=part.name, arguments_json=arguments)
                )
                calls += 1
            case _:
                pass
    return [*events, StreamEnd(completion=completion)]


def no_end(provider: str) -> ProviderProtocol:
    """A stream that stopped before it was complete."""
    return ProviderProtocol(
        f"the stream of {provider} ended before the answer did", hint="the call can be repeated"
    )


async def _last(provider: str, events: AsyncIterator[StreamEvent]) -> Completion:
    """Read a stream to its end; only the end counts as an answer."""
    async with aclosing(cast(AsyncGenerator[StreamEvent], events)) as reading:
        async for event in reading:
            if isinstance(event, StreamEnd):
                return event.completion
    raise no_end(provider)


def _callers_fault(error: AgenticFlowError) -> bool:
    return isinstance(error, ProviderRejected) and error.details.get("last_status") in _CALLERS_FAULT
