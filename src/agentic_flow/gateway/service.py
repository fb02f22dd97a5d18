"""The gateway: one door to every model. Chooses the provider, retries, prices, and says what happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager, aclosing
from types import TracebackType
from typing import NamedTuple, Self, cast

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import AgenticFlowError, ProviderProtocol, UnknownModel
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ModelInfo,
    StreamEnd,
    StreamEvent,
)
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.models import EXTRACTIVE, choose, default_name
from agentic_flow.gateway.prices import PriceList
from agentic_flow.gateway.providers import (
    HttpProvider,
    Provider,
    ProviderFactory,
    build_providers,
    log_estimate,
)
from agentic_flow.gateway.retries import RetryPolicy
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.gateway.wire.format import IMAGE_TOKENS, load_object, request_chars, request_images
from agentic_flow.gateway.wire.passing import PassingReader, PassingRequest

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer("agentic_flow.gateway")

MODELS_CACHED_S = 300.0
MODELS_TIMEOUT_S = 10.0
# Reservations must not fall short: code and JSON run to about three characters a token.
_RESERVE_CHARS_PER_TOKEN = 3


class Destination(NamedTuple):
    """Where a call goes: the provider, its own id of the model, the format that it speaks over HTTP, and all
    formats in which requests pass through to it."""

    provider: str
    model: str
    wire: str | None
    passes: frozenset[str] = frozenset()


class Gateway:
    """`Completer` over the configured providers.

    Args:
        settings: The section `gateway`.
        providers: Exactly these, instead of the built-in ones and `extra_providers`.
        extra_providers: Factories by name, added to the built-in ones (plug-ins).
        clock: Time and waiting.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        providers: Iterable[Provider] | None = None,
        extra_providers: Mapping[str, ProviderFactory] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._transport = HttpTransport(
            idle_timeout_s=settings.idle_timeout_s, response_max_bytes=settings.response_max_bytes
        )
        self._providers: dict[str, Provider] = (
            build_providers(settings, self._transport, extra_providers)
            if providers is None
            else {provider.name: provider for provider in providers}
        )
        self._prices = PriceList(settings.prices_usd_per_mtok, clock=clock)
        self._policy = RetryPolicy(settings.attempts, settings.backoff_s, clock)
        self._listed: dict[str, tuple[float, list[ModelInfo]]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to providers."""
        await self._transport.close()

    # What can be asked

    def default_model(self) -> str:
        """The model for callers that name none.

        `openai:` without a model means the first one that the configured endpoint lists.
        """
        return default_name(self._settings.model, self._providers)

    async def resolve(self, model: str | None, *, principal: Principal) -> ModelInfo:
        """The model that would serve this name now (None: the default one), under its full name.

        Asks the provider only where a custom endpoint has to say which models it has.

        Raises:
            UnknownModel: it names nothing that is configured; the hint lists what is.
        """
        chosen = choose(model or self.default_model(), self._providers)
        if chosen.provider == EXTRACTIVE:
            return (await self._list(self._providers[EXTRACTIVE]))[0]
        provider = self._providers[chosen.provider]
        deadline = Deadline.after(MODELS_TIMEOUT_S, self._clock)
        native = chosen.model or provider.default_model or await self._first_listed(provider, deadline)
        priced = self._priced(ModelInfo(id=native, provider=chosen.provider))
        return priced.model_copy(update={"id": f"{chosen.provider}:{native}"})

    async def models(self, *, principal: Principal) -> list[ModelInfo]:
        """The models that can be asked now, the default one first.

        A provider whose list cannot be had now is logged and shown with its default model alone.
        """
        ready = [provider for provider in self._providers.values() if provider.configured]
        lists = await asyncio.gather(*(self._list(provider) for provider in ready))
        found = [info for listed in lists for info in listed]
        try:
            chosen = choose(self.default_model(), self._providers)
        except UnknownModel:
            return found  # the configured default is wrong; asking for it says so, listing does not fail
        first = next(
            (info for info in found if info.provider == chosen.provider and chosen.model in ("", info.id)),
            None,
        )
        if first is None and chosen.model:
            first = self._priced(ModelInfo(id=chosen.model, provider=chosen.provider))
        return found if first is None else [first, *(info for info in found if info is not first)]

    async def _list(self, provider: Provider) -> list[ModelInfo]:
        now_s = self._clock.monotonic_s()
        known = self._listed.get(provider.name)
        if known and now_s - known[0] < MODELS_CACHED_S:
            return known[1]
        try:
            listed = await provider.models(deadline=Deadline.after(MODELS_TIMEOUT_S, self._clock))
        except AgenticFlowError as error:
            _log.warning(
                "models_unavailable", provider=provider.name, error_code=error.code, error=error.message
            )
            default = provider.default_model
            return [self._priced(ModelInfo(id=default, provider=provider.name))] if default else []
        priced = [self._priced(info) for info in listed]
        self._listed[provider.name] = (now_s, priced)
        return priced

    def _priced(self, info: ModelInfo) -> ModelInfo:
        rates = self._prices.rates(info.provider, info.id, base_url=self._price_url(info.provider))
        if rates is None:
            return info
        first = rates.tiers[0]
        return info.model_copy(
            update={
                "input_usd_per_mtok": round(first.input * 1e6, 9),
                "output_usd_per_mtok": round(first.output * 1e6, 9),
                "context_tokens": info.context_tokens or rates.context_tokens,
            }
        )

    def _price_url(self, provider: str) -> str | None:
        """For endpoints that only speak OpenAI's format, the address says whose prices hold."""
        served = self._providers.get(provider)
        return served.base_url if provider == "openai" and isinstance(served, HttpProvider) else None

    def estimate_cost(self, request: CompletionRequest) -> float | None:
        """The most that this call can cost in USD, to reserve from a budget; None when no price is known.

        Raises:
            UnknownModel: no configured provider serves the model.
        """
        chosen = choose(request.model, self._providers)
        model = chosen.model or self._providers[chosen.provider].default_model or ""
        rates = self._prices.rates(chosen.provider, model, base_url=self._price_url(chosen.provider))
        if rates is None:
            return None
        input_tokens = -(-request_chars(request) // _RESERVE_CHARS_PER_TOKEN)
        input_tokens += IMAGE_TOKENS * request_images(request)
        return rates.cost_max_usd(input_tokens, request.output_tokens_max)

    # Answering

    async def complete(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> Completion:
        """One whole answer; with `request.stream`, over the provider's streaming format.

        Raises:
            UnknownModel: no configured provider serves `request.model`.
            ProviderError: the provider failed after the bounded retries; says how many.
            DeadlineExceeded: no answer within the deadline or `gateway.timeout_s`.
        """
        deadline = deadline.earliest(self._settings.timeout_s)
        provider, asked = await self._route(request, deadline)
        call = _Call(provider.name, asked.model, asked.output_tokens_max, principal, self._clock)

        async def once() -> Completion:
            call.tries += 1
            if asked.stream:
                events = provider.stream(asked, deadline=deadline, idempotency_key=idempotency_key)
                return await _last(provider.name, events)
            return await provider.complete(asked, deadline=deadline, idempotency_key=idempotency_key)

        with call.span() as span:
            try:
                answered = await self._policy.run(once, provider=provider.name, deadline=deadline)
            except BaseException as error:
                call.failed(span, error)
                raise
            completion = self._settle(answered, provider.name, asked.model, call)
            call.finished(span, completion)
            return completion

    async def stream(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """The answer as it comes; retries happen before the first event only.

        Raises:
            UnknownModel, ProviderError, DeadlineExceeded: as `complete`; also after events were given.
        """
        deadline = deadline.earliest(self._settings.timeout_s)
        provider, asked = await self._route(request, deadline)
        call = _Call(provider.name, asked.model, asked.output_tokens_max, principal, self._clock)

        async def begin() -> tuple[AsyncGenerator[StreamEvent], StreamEvent]:
            call.tries += 1
            events = cast(
                AsyncGenerator[StreamEvent],
                provider.stream(asked, deadline=deadline, idempotency_key=idempotency_key),
            )
            try:
                return events, await anext(events)
            except StopAsyncIteration:
                raise _no_end(provider.name) from None
            except BaseException:
                await events.aclose()
                raise

        # The span is not made current: a generator's body runs in whatever context its consumer has.
        span = call.start_span()
        try:
            events, event = await self._policy.run(begin, provider=provider.name, deadline=deadline)
            async with aclosing(events):
                while not isinstance(event, StreamEnd):
                    call.first_event()
                    yield event
                    event = await anext(events, None)
                    if event is None:
                        raise _no_end(provider.name)
            completion = self._settle(event.completion, provider.name, asked.model, call)
            call.finished(span, completion)
        except BaseException as error:
            call.failed(span, error)
            raise
        finally:
            span.end()
        yield StreamEnd(completion=completion)

    # Passing through: the caller speaks the provider's own format

    async def destination(self, model: str | None) -> Destination:
        """Where a call to `model` goes (None: the default one), without asking for it.

        Raises:
            UnknownModel: no configured provider serves it.
        """
        provider, native = await self._place(
            model or self.default_model(), Deadline.after(MODELS_TIMEOUT_S, self._clock)
        )
        if not isinstance(provider, HttpProvider):
            return Destination(provider.name, native, None)
        return Destination(provider.name, native, provider.wire_name, provider.passes)

    async def pass_whole(
        self,
        destination: Destination,
        sent: PassingRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> bytes:
        """The provider's answer to a request in its own format, byte for byte; priced and recorded.

        Raises:
            ProviderError, DeadlineExceeded: as `complete`.
        """
        deadline = deadline.earliest(self._settings.timeout_s)
        provider = self._passing_provider(destination)
        call = _Call(provider.name, destination.model, _output_max(sent), principal, self._clock)

        async def once() -> tuple[bytes, PassingReader]:
            call.tries += 1
            body = await provider.pass_whole(sent, deadline=deadline, idempotency_key=idempotency_key)
            reader = provider.reader(sent)
            reader.take_answer(load_object(body, f"the answer of {provider.name}"))
            return body, reader

        with call.span() as span:
            try:
                body, reader = await self._policy.run(once, provider=provider.name, deadline=deadline)
            except BaseException as error:
                call.failed(span, error)
                raise
            call.finished(span, self._passed(destination, reader, call))
            return body

    async def pass_stream(
        self,
        destination: Destination,
        sent: PassingRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> AsyncGenerator[bytes]:
        """The same, streamed: whole events, untouched; retries happen before the first one only.

        An error event of the provider is the last that is passed on.

        Raises:
            ProviderError, DeadlineExceeded: as `stream`; also after events were given.
        """
        deadline = deadline.earliest(self._settings.timeout_s)
        provider = self._passing_provider(destination)
        call = _Call(provider.name, destination.model, _output_max(sent), principal, self._clock)

        async def begin() -> tuple[AsyncGenerator[bytes], PassingReader, bytes]:
            call.tries += 1
            reader = provider.reader(sent)
            stream = provider.pass_stream(sent, reader, deadline=deadline, idempotency_key=idempotency_key)
            try:
                first = await anext(stream)
                if reader.error is not None and reader.model == "":
                    raise reader.error  # nothing of an answer has come: it can be tried again
            except StopAsyncIteration:
                raise _no_end(provider.name) from None
            except BaseException:
                await stream.aclose()
                raise
            return stream, reader, first

        span = call.start_span()
        try:
            stream, reader, events = await self._policy.run(begin, provider=provider.name, deadline=deadline)
            async with aclosing(stream):
                call.first_event()
                yield events
                async for events in stream:
                    yield events
            if reader.error is not None:
                call.failed(span, reader.error)
                _log.warning("stream_broken", provider=provider.name, error=reader.error.message)
            else:
                call.finished(span, self._passed(destination, reader, call))
        except BaseException as error:
            call.failed(span, error)
            raise
        finally:
            span.end()

    async def pass_count(
        self, destination: Destination, sent: PassingRequest, *, principal: Principal, deadline: Deadline
    ) -> bytes:
        """The provider's answer to a question that costs nothing, such as how many tokens a request has."""
        deadline = deadline.earliest(self._settings.timeout_s)
        provider = self._passing_provider(destination)

        async def once() -> bytes:
            body = await provider.pass_whole(sent, deadline=deadline)
            load_object(body, f"the answer of {provider.name}")
            return body

        return await self._policy.run(once, provider=provider.name, deadline=deadline)

    def _passing_provider(self, destination: Destination) -> HttpProvider:
        provider = self._providers[destination.provider]
        assert isinstance(provider, HttpProvider), "only a destination with a wire can be passed to"
        return provider

    def _passed(self, destination: Destination, reader: PassingReader, call: _Call) -> Completion:
        """What the books need of an answer that passed through."""
        usage, estimated = reader.billed()
        completion = Completion(
            model=reader.model or destination.model,
            provider=destination.provider,
            parts=(),
            stop_reason=reader.stop_reason,
            usage=usage,
        )
        if estimated:
            log_estimate(destination.provider, completion)
        return self._settle(completion, destination.provider, destination.model, call)

    async def _route(
        self, request: CompletionRequest, deadline: Deadline
    ) -> tuple[Provider, CompletionRequest]:
        provider, model = await self._place(request.model, deadline)
        return provider, request.model_copy(update={"model": model})

    async def _place(self, name: str, deadline: Deadline) -> tuple[Provider, str]:
        """The provider that a name means, and its own id of the model."""
        chosen = choose(name, self._providers)
        provider = self._providers[chosen.provider]
        return provider, chosen.model or provider.default_model or await self._first_listed(
            provider, deadline
        )

    async def _first_listed(self, provider: Provider, deadline: Deadline) -> str:
        known = self._listed.get(provider.name)
        listed = known[1] if known else await provider.models(deadline=deadline)
        if not listed:
            raise UnknownModel(
                f"{provider.name} lists no model to use by default",
                hint=f"name one: `{provider.name}:MODEL`, or set gateway.model",
            )
        self._listed.setdefault(provider.name, (self._clock.monotonic_s(), listed))
        return listed[0].id

    def _settle(self, completion: Completion, provider: str, asked: str, call: _Call) -> Completion:
        usage = completion.usage
        if usage.cost_usd is None:
            url = self._price_url(provider)
            cost = self._prices.cost_usd(provider, completion.model, usage, base_url=url)
            if cost is None and completion.model != asked:
                cost = self._prices.cost_usd(provider, asked, usage, base_url=url)
            usage = usage.model_copy(update={"cost_usd": cost})
        return completion.model_copy(
            update={"usage": usage, "provider": provider, "latency_s": call.elapsed_s()}
        )


async def _last(provider: str, events: AsyncIterator[StreamEvent]) -> Completion:
    """Read a stream to its end; only the end counts as an answer."""
    async with aclosing(cast(AsyncGenerator[StreamEvent], events)) as reading:
        async for event in reading:
            if isinstance(event, StreamEnd):
                return event.completion
    raise _no_end(provider)


def _output_max(sent: PassingRequest) -> int | None:
    """The output limit that a request in a vendor's format names, if any."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = sent.sent.get(name)
        # An attribute of a span holds 64 bits.
        if isinstance(value, int) and 0 < value < 2**63:
            return value
    return None


def _no_end(provider: str) -> ProviderProtocol:
    return ProviderProtocol(
        f"the stream of {provider} ended before the answer did", hint="the call can be repeated"
    )


class _Call:
    """The record of one call: its span and its one log line.

    Attribute names: OpenTelemetry semantic conventions for generative AI.
    """

    def __init__(
        self, provider: str, model: str, output_tokens_max: int | None, principal: Principal, clock: Clock
    ) -> None:
        self.tries = 0
        self._provider = provider
        self._model = model
        self._output_tokens_max = output_tokens_max
        self._principal = principal
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._first_event_s: float | None = None

    def elapsed_s(self) -> float:
        return self._clock.monotonic_s() - self._started_s

    def first_event(self) -> None:
        if self._first_event_s is None:
            self._first_event_s = self.elapsed_s()

    def start_span(self) -> Span:
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._provider,
            "gen_ai.request.model": self._model,
            "agentic_flow.tenant": self._principal.tenant,
        }
        if self._output_tokens_max is not None:
            attributes["gen_ai.request.max_tokens"] = self._output_tokens_max
        return _tracer.start_span(f"chat {self._model}", kind=SpanKind.CLIENT, attributes=attributes)

    def span(self) -> AbstractContextManager[Span]:
        """A span that is current for a block; `failed` and `finished` say how it went."""
        return trace.use_span(
            self.start_span(), end_on_exit=True, record_exception=False, set_status_on_exception=False
        )

    def finished(self, span: Span, completion: Completion) -> None:
        usage = completion.usage
        span.set_attribute("gen_ai.response.model", completion.model)
        span.set_attribute("gen_ai.response.finish_reasons", [completion.stop_reason])
        span.set_attribute("gen_ai.usage.input_tokens", usage.input_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", usage.output_tokens)
        if usage.cost_usd is not None:
            span.set_attribute("agentic_flow.cost_usd", usage.cost_usd)
        _log.info(
            "completion_finished",
            provider=self._provider,
            model=completion.model,
            tenant=self._principal.tenant,
            tries=self.tries,
            stop_reason=completion.stop_reason,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cost_usd=usage.cost_usd,
            latency_s=round(self.elapsed_s(), 4),
            first_event_s=None if self._first_event_s is None else round(self._first_event_s, 4),
        )

    def failed(self, span: Span, error: BaseException) -> None:
        """Mark the span. The error travels on to whoever logs it, so it is not logged here."""
        kind = error.code if isinstance(error, AgenticFlowError) else type(error).__name__
        span.set_attribute("error.type", kind)
        if not isinstance(error, asyncio.CancelledError | GeneratorExit):
            span.set_status(Status(StatusCode.ERROR, str(error)))
