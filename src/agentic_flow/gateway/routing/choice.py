"""Explaining a choice, in a running gateway or outside of it: where a call would go, by the settings,
policies and outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from agentic_flow.core.errors import AgenticFlowError, as_problem
from agentic_flow.core.messages import Frozen
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.models import Named
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_store import PolicyStore, StoredPolicies
from agentic_flow.gateway.prices import PriceList
from agentic_flow.gateway.providers import HttpProvider, ProviderFactory, StoredSecrets, build_providers
from agentic_flow.gateway.routing.names import resolve_alias, route_named
from agentic_flow.gateway.routing.plan import Considered, LearnedOrder, Plan, Router
from agentic_flow.gateway.stores import gateway_database
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.gateway.wire.format import CHARS_PER_TOKEN

TOKENS_MAX = 100_000_000


class ChoiceRequest(Frozen):
    """What `POST /v1/route` is asked.

    Args:
        prompt: What would be asked; its length gives `tokens_in` unless that is given.
        model: A model, an alias or a route.
        tokens_in, tokens_out: Expected size of the call.
        tenant: Whose call it would be. None: the caller's; another one is for `platform:admin`.
    """

    prompt: str
    model: str = "auto"
    tokens_in: Annotated[int, Field(ge=0, le=TOKENS_MAX)] | None = None
    tokens_out: Annotated[int, Field(ge=0, le=TOKENS_MAX)] = 1000
    tenant: str | None = None


class ExplainedTarget(Frozen):
    """See `plan.Considered`."""

    position: int | None
    model: str
    provider: str | None
    cost_usd: float | None
    quality: float | None
    latency_s: float | None
    local: bool
    configured: bool
    reason: str
    predicted: float | None = None
    propensity: float | None = None


class ExplainedChoice(Frozen):
    """One choice: what was asked, what came of it, and every target that was considered.

    Args:
        asked: The name that was asked for.
        route: The route that it led to; None for a model by name.
        chosen: `provider:model` each, in the order to try them; empty when nothing could be asked.
        reason: Why the first is first.
        policies_version: Version of the policies, 0 when none were stored.
        tokens_in, tokens_out: The size that costs are for.
        targets: As `Router.explain` orders them.
        refused: The error that the call would end with instead of being sent, as a problem (RFC 9457).
    """

    asked: str
    route: str | None
    chosen: tuple[str, ...]
    reason: str
    policies_version: int
    tokens_in: int
    tokens_out: int
    targets: tuple[ExplainedTarget, ...]
    refused: dict[str, Any] | None = None


def price_urls(providers: Mapping[str, Named]) -> Callable[[str], str | None]:
    """For endpoints that only speak OpenAI's format, the address says whose prices hold."""

    def address(provider: str) -> str | None:
        served = providers.get(provider)
        return served.base_url if provider == "openai" and isinstance(served, HttpProvider) else None

    return address


def stored_policies(settings: GatewaySettings, data_dir: Path) -> StoredPolicies:
    """The policies in force, without making a database where there is none.

    Raises:
        Unavailable, DataCorrupted: they cannot be read.
    """
    database = gateway_database(settings, data_dir)
    if database.file is not None and not database.file.exists():
        return StoredPolicies(0, GatewayPolicies(), 0.0, "", "")
    try:
        database.create()
        return PolicyStore(database).current()
    finally:
        database.close()


def learned_router(
    wanted: ChoiceRequest, settings: GatewaySettings, data_dir: Path, stored: StoredPolicies
) -> LearnedOrder | None:
    """What the tenant's outcomes teach, where the choice depends on it; None for other strategies.

    Raises:
        Unavailable: the outcomes cannot be read.
    """
    route = route_named(resolve_alias(wanted.model, stored.policies.aliases), stored.policies)
    if route is None or route.strategy != "learned":
        return None
    from agentic_flow.gateway.routing.learned import LearnedRouter
    from agentic_flow.gateway.routing.outcomes import OutcomeLog

    learned = LearnedRouter()
    database = gateway_database(settings, data_dir)
    try:
        database.create()
        asyncio.run(learned.refit(OutcomeLog(database), tenant=wanted.tenant or ""))
    finally:
        database.close()
    return learned


def explain_choice(
    wanted: ChoiceRequest,
    *,
    settings: GatewaySettings,
    stored: StoredPolicies,
    extra_providers: Mapping[str, ProviderFactory] | None = None,
    learned: LearnedOrder | None = None,
    stored_secrets: StoredSecrets | None = None,
) -> ExplainedChoice:
    """What a gateway with these settings and policies would choose. No provider is asked.

    Args:
        wanted: What would be asked, and whose call it would be.
        settings: The section `gateway`.
        stored: The policies in force.
        extra_providers: Those of plug-ins.
        learned: What the strategy `learned` asks.
        stored_secrets: The encrypted store, for keys that no setting gives.

    Raises:
        UnknownModel, InvalidInput: as `explained`.
    """
    transport = HttpTransport(
        idle_timeout_s=settings.idle_timeout_s, response_max_bytes=settings.response_max_bytes
    )
    providers = build_providers(settings, transport, extra_providers, stored=stored_secrets)
    prices = PriceList(settings.prices_usd_per_mtok)
    router = Router(providers, prices, price_url=price_urls(providers), learned=learned)
    return explained(router, wanted, stored.policies, stored.version)


def explained(
    router: Router, wanted: ChoiceRequest, policies: GatewayPolicies, version: int
) -> ExplainedChoice:
    """What a router chooses, and what it saw. Nothing is tried out.

    Args:
        router: Of the gateway that would be asked.
        wanted: What would be asked, and whose call it would be.
        policies: Those in force.
        version: Theirs.

    Raises:
        UnknownModel: the name means nothing.
        InvalidInput: see `Router.plan`.
    """
    tokens_in = wanted.tokens_in
    if tokens_in is None:
        tokens_in = max(1, -(-len(wanted.prompt) // CHARS_PER_TOKEN))
    tokens_out, prompt, tenant = wanted.tokens_out, wanted.prompt, wanted.tenant or ""
    rows = router.explain(
        wanted.model, policies, tokens_in=tokens_in, tokens_out=tokens_out, prompt=prompt, tenant=tenant
    )
    plan: Plan | None = None
    refused: AgenticFlowError | None = None
    try:
        plan = router.plan(
            wanted.model,
            policies,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            prompt=prompt,
            tenant=tenant,
            explore=False,
        )
    except AgenticFlowError as error:
        refused = error
    return ExplainedChoice(
        asked=wanted.model,
        route=plan.route if plan else wanted.model,
        chosen=tuple(f"{c.provider}:{c.model}" for c in plan.candidates) if plan else (),
        reason=plan.reason if plan else (refused.message if refused else ""),
        policies_version=version,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        targets=tuple(_target(row) for row in rows),
        refused=None if refused is None else as_problem(refused),
    )


def _target(row: Considered) -> ExplainedTarget:
    return ExplainedTarget(**row._asdict())
