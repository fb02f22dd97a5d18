"""The gateway: one door to every model. Chooses the provider, retries, prices, and says what happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import structlog

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import AgenticFlowError, UnknownModel
from agentic_flow.core.messages import Completion, CompletionRequest, ModelInfo, StreamEvent
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.cache import ResponseCache, SemanticIndex
from agentic_flow.gateway.checkers import Checker, CheckerFactory, make_checker
from agentic_flow.gateway.guardrails import CompiledGuardrails, GuardrailFactory, Guardrails
from agentic_flow.gateway.health import Health
from agentic_flow.gateway.limits import Door, RateLimits
from agentic_flow.gateway.local_calls import LocalCall
from agentic_flow.gateway.metrics import GatewayMetrics
from agentic_flow.gateway.models import EXTRACTIVE, choose, default_name
from agentic_flow.gateway.policies import Escalation, GatewayPolicies
from agentic_flow.gateway.prices import ModelRates, PriceList
from agentic_flow.gateway.providers import (
    HttpProvider,
    Provider,
    ProviderFactory,
    StoredSecrets,
    build_providers,
)
from agentic_flow.gateway.questions import Destination, Question, TypedQuestion
from agentic_flow.gateway.retries import RetryPolicy
from agentic_flow.gateway.routing.choice import ChoiceRequest, ExplainedChoice, explained
from agentic_flow.gateway.routing.plan import Candidate, Plan, Router
from agentic_flow.gateway.stores import GatewayStores
from agentic_flow.gateway.straight import Straight
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.gateway.usage import UsageRecord
from agentic_flow.gateway.walk import House, Walk
from agentic_flow.gateway.wire.format import load_object
from agentic_flow.gateway.wire.passing import PassingRequest

_log = structlog.get_logger(__name__)

MODELS_CACHED_S = 300.0
MODELS_TIMEOUT_S = 10.0
MODELS_RETRIED_S = 15.0
"""A provider that could not list its models is not asked again for so long."""
PLACES_MAX = 1024
"""Destinations remembered: what a provider speaks stays, and names of models come again."""


class PolicySource(Protocol):
    """Where the policies in force are."""

    @property
    def policies(self) -> GatewayPolicies: ...


@runtime_checkable
class Closing(Protocol):
    """A provider that has something to close."""

    async def close(self) -> None: ...


class FixedPolicies:
    """Policies that stay as they are.

    Args:
        policies: They.
    """

    def __init__(self, policies: GatewayPolicies | None = None) -> None:
        self.policies = policies or GatewayPolicies()


class Gateway:
    """`Completer` over the configured providers.

    Args:
        settings: The section `gateway`.
        providers: Exactly these, instead of the built-in ones and `extra_providers`.
        extra_providers: Factories by name, added to the built-in ones (plug-ins).
        stores: What is kept in the database: policies, budgets, usage. None: there are no policies but
            `policies`, no budgets, and no books.
        policies: Instead of those that are stored.
        metrics: Where calls are counted.
        embedder: Tells the semantic cache which messages mean the same.
        extra_checkers, extra_guardrails: Plug-ins by name.
        stored_secrets: The encrypted store, asked again while it runs for keys that no setting gives.
        clock: Time and waiting.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        providers: Iterable[Provider] | None = None,
        extra_providers: Mapping[str, ProviderFactory] | None = None,
        stores: GatewayStores | None = None,
        policies: GatewayPolicies | None = None,
        metrics: GatewayMetrics | None = None,
        embedder: Embedder | None = None,
        extra_checkers: Mapping[str, CheckerFactory] | None = None,
        extra_guardrails: Mapping[str, GuardrailFactory] | None = None,
        stored_secrets: StoredSecrets | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._transport = HttpTransport(
            idle_timeout_s=settings.idle_timeout_s, response_max_bytes=settings.response_max_bytes
        )
        self._health = Health.of(settings, clock=clock)
        self._providers: dict[str, Provider] = (
            build_providers(
                settings, self._transport, extra_providers, health=self._health, stored=stored_secrets
            )
            if providers is None
            else {provider.name: provider for provider in providers}
        )
        self._prices = PriceList(settings.prices_usd_per_mtok, clock=clock)
        self._retries = RetryPolicy(settings.attempts, settings.backoff_s, clock)
        self._listed: dict[str, tuple[float, list[ModelInfo]]] = {}
        self._unlisted: dict[str, float] = {}
        self._places: dict[tuple[str, str], Destination] = {}
        self._stores = stores
        self._metrics = metrics
        self._policies: PolicySource = (
            FixedPolicies(policies) if stores is None or policies is not None else stores.watch
        )
        self._guardrails = Guardrails(extra_guardrails)
        self._compiled: tuple[GatewayPolicies, CompiledGuardrails] | None = None
        self._extra_checkers = dict(extra_checkers or {})
        self._router = Router(
            self._providers,
            self._prices,
            price_url=self._price_url,
            learned=None if stores is None else stores.learned,
            clock=clock,
        )
        self._door = Door(
            concurrent_max=settings.concurrent_max,
            queue_max=settings.queue_max,
            queue_timeout_s=settings.queue_timeout_s,
            clock=clock,
        )
        self._cache = ResponseCache(clock)
        self._index: SemanticIndex | None = None
        self._house = House(
            open=None if stores is None else self.open,
            policies=lambda: self._policies.policies,
            providers=self._providers,
            rates=self._rates,
            place=self._place,
            router=self._router,
            retries=self._retries,
            door=self._door,
            limits=RateLimits(clock),
            cache=self._cache,
            meanings=None if embedder is None else lambda: self._semantic_index(embedder),
            budgets=None if stores is None else stores.budgets,
            guardrails=self._guardrails_of,
            checker=self._checker,
            outcomes=None if stores is None else stores.outcomes,
            books=None if stores is None and metrics is None else self._enter,
            clock=clock,
            timeout_s=settings.timeout_s,
            # A little more than what the breaker calls slow, so that it learns of whom we did not wait for.
            patience_s=1.02 * self._health.slow_call_s + 0.1,
        )
        self._straight = Straight(self._house, self._placed)
        if metrics is not None:
            metrics.set_breakers(self._health.states)
            metrics.set_calls(lambda: (self._door.inside, self._door.waiting))
            if stores is not None:
                metrics.set_ledger(stores.usage)
                metrics.set_budgets(lambda: stores.budgets.known(self._policies.policies.budgets))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the stores; otherwise the first call does.

        Raises:
            Unavailable, DataCorrupted: as `GatewayStores.open`.
        """
        if self._stores is not None:
            await self._stores.open()
        self._house.open = None

    async def close(self) -> None:
        """Close the connections to providers, models that run here, and the stores."""
        for provider in self._providers.values():
            if isinstance(provider, Closing):
                await provider.close()
        await self._transport.close()
        if self._stores is not None:
            await self._stores.close()

    @property
    def stores(self) -> GatewayStores | None:
        """What is kept in the database; None: nothing is."""
        return self._stores

    async def erase_tenant(self, tenant: str) -> int:
        """Remove a tenant's usage, budgets, outcomes and cached answers; how many there were.

        Other processes forget their cached answers of it as these grow old.

        Raises:
            Unavailable: the database cannot be used now; whatever was removed stays removed.
        """
        removed = self._cache.forget(tenant)
        if self._index is not None:
            self._index.forget(tenant)
        if self._stores is not None:
            await self.open()
            removed += await self._stores.erase_tenant(tenant)
        return removed

    def _enter(self, record: UsageRecord) -> None:
        if self._metrics is not None:
            self._metrics.observe(record)
        if self._stores is not None:
            self._stores.usage.record(record)

    def _guardrails_of(self, policies: GatewayPolicies) -> CompiledGuardrails:
        known = self._compiled
        if known is None or known[0] is not policies:
            known = self._compiled = (policies, self._guardrails.compile(policies.guardrails))
        return known[1]

    def _checker(self, escalation: Escalation, principal: Principal, deadline: Deadline) -> Checker:
        async def judge(request: CompletionRequest) -> Completion:
            return await self.complete(request, principal=principal, deadline=deadline)

        return make_checker(
            escalation.checker, escalation.options, complete=judge, extra=self._extra_checkers
        )

    def _semantic_index(self, embedder: Embedder) -> SemanticIndex:
        if self._index is None:
            self._index = SemanticIndex(embedder, self._cache)
        return self._index

    def _rates(self, provider: str, model: str) -> ModelRates | None:
        return self._prices.rates(provider, model, base_url=self._price_url(provider))

    @property
    def straight(self) -> Straight:
        """The straight path of ordinary whole requests, with its counts."""
        return self._straight

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
        plan = await self._plan(model)
        chosen = plan.candidates[0]
        if chosen.provider == EXTRACTIVE and plan.route is None:
            return (await self._list(self._providers[EXTRACTIVE]))[0]
        provider = self._providers[chosen.provider]
        deadline = Deadline.after(MODELS_TIMEOUT_S, self._clock)
        native = chosen.model or provider.default_model or await self._first_listed(provider, deadline)
        priced = self._priced(
            ModelInfo(id=native, provider=chosen.provider, generative=chosen.provider != EXTRACTIVE)
        )
        # A route keeps its name, or what it would do later could not happen.
        return priced.model_copy(update={"id": plan.route or f"{chosen.provider}:{native}"})

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
        if now_s - self._unlisted.get(provider.name, -MODELS_RETRIED_S) < MODELS_RETRIED_S:
            return self._unlisted_models(provider)
        try:
            listed = await provider.models(deadline=Deadline.after(MODELS_TIMEOUT_S, self._clock))
        except AgenticFlowError as error:
            _log.warning(
                "models_unavailable", provider=provider.name, error_code=error.code, error=error.message
            )
            self._unlisted[provider.name] = self._clock.monotonic_s()
            return self._unlisted_models(provider)
        priced = [self._priced(info) for info in listed]
        self._listed[provider.name] = (now_s, priced)
        return priced

    def _unlisted_models(self, provider: Provider) -> list[ModelInfo]:
        """What is known of a provider whose list cannot be had: its default model."""
        default = provider.default_model
        return [self._priced(ModelInfo(id=default, provider=provider.name))] if default else []

    def _priced(self, info: ModelInfo) -> ModelInfo:
        rates = self._rates(info.provider, info.id)
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
        rates = self._rates(chosen.provider, model)
        if rates is None:
            return None
        question = TypedQuestion(request, stream=False)
        return rates.cost_max_usd(question.input_tokens_max(), request.output_tokens_max)

    # Answering

    def walk(
        self,
        question: Question,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
        request_id: str = "",
    ) -> Walk:
        """One call, ready to go: `await walk.whole()`, or iterate `walk.stream()`."""
        return Walk(
            self._house,
            question,
            principal=principal,
            deadline=deadline,
            idempotency_key=idempotency_key,
            request_id=request_id,
        )

    def local_call(
        self, question: Question, model: str, *, principal: Principal, deadline: Deadline, request_id: str
    ) -> LocalCall:
        """A call that this process answers by itself, by the same rules: `await call.run(work, tokens)`."""
        return LocalCall(
            self._house, question, model, principal=principal, deadline=deadline, request_id=request_id
        )

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
            RateLimited, BudgetExceeded, PolicyDenied: what operators set does not allow it.
            ProviderError: the provider failed after the bounded retries; says how many.
            DeadlineExceeded: no answer within the deadline or `gateway.timeout_s`.
        """
        question = TypedQuestion(request, stream=False)
        walk = self.walk(question, principal=principal, deadline=deadline, idempotency_key=idempotency_key)
        return (await walk.whole()).completion

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
            AgenticFlowError: as `complete`; also after events were given.
        """
        question = TypedQuestion(request, stream=True)
        walk = self.walk(question, principal=principal, deadline=deadline, idempotency_key=idempotency_key)
        async with aclosing(walk.stream()) as events:
            async for event in events:
                assert not isinstance(event, bytes), "our own vocabulary does not pass through"
                yield event

    async def destination(self, model: str | None) -> Destination:
        """Where a call to `model` goes first (None: the default one), without asking for it.

        Raises:
            UnknownModel: no configured provider serves it.
        """
        plan = await self._plan(model)
        return await self._place(plan.candidates[0], Deadline.after(MODELS_TIMEOUT_S, self._clock))

    async def _plan(self, model: str | None) -> Plan:
        if self._house.open is not None:
            await self._house.open()
        return self._router.plan(model or self.default_model(), self._policies.policies)

    async def explain(self, wanted: ChoiceRequest) -> ExplainedChoice:
        """Where a call would go now, and why not elsewhere; no provider is asked. Raises as `explained`."""
        if self._house.open is not None:
            await self._house.open()
        version = 0 if self._stores is None else self._stores.watch.version
        return explained(self._router, wanted, self._policies.policies, version)

    async def pass_count(
        self, destination: Destination, sent: PassingRequest, *, principal: Principal, deadline: Deadline
    ) -> bytes:
        """The provider's answer to a question that costs nothing, such as how many tokens a request has."""
        deadline = deadline.earliest(self._settings.timeout_s)
        provider = self._passing_provider(destination)

        async def once() -> bytes:
            body = await provider.pass_whole(sent, deadline=deadline, model=destination.model)
            load_object(body, f"the answer of {provider.name}")
            return body

        return await self._retries.run(once, provider=provider.name, deadline=deadline)

    def _passing_provider(self, destination: Destination) -> HttpProvider:
        provider = self._providers[destination.provider]
        assert isinstance(provider, HttpProvider), "only a destination with a wire can be passed to"
        return provider

    async def _place(self, candidate: Candidate, deadline: Deadline) -> Destination:
        """Where a candidate is asked, under the provider's own id of the model."""
        provider = self._providers[candidate.provider]
        model = candidate.model or provider.default_model or await self._first_listed(provider, deadline)
        return self._placed(candidate.provider, model)

    def _placed(self, name: str, model: str) -> Destination:
        known = self._places.get((name, model))
        if known is None:
            if len(self._places) >= PLACES_MAX:
                self._places.clear()
            provider = self._providers[name]
            known = (
                Destination(name, model, provider.wire_name, provider.passes)
                if isinstance(provider, HttpProvider)
                else Destination(name, model, None)
            )
            self._places[name, model] = known
        return known

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
