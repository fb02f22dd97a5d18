"""Explaining a choice outside a running gateway: where a call would go, by the settings and policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import Frozen
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.models import Named
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_store import PolicyStore, StoredPolicies
from agentic_flow.gateway.prices import PriceList
from agentic_flow.gateway.providers import HttpProvider, ProviderFactory, StoredSecrets, build_providers
from agentic_flow.gateway.routing.plan import Considered, LearnedOrder, Plan, Router
from agentic_flow.gateway.stores import gateway_database
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.gateway.wire.format import CHARS_PER_TOKEN


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
    """

    asked: str
    route: str | None
    chosen: tuple[str, ...]
    reason: str
    policies_version: int
    tokens_in: int
    tokens_out: int
    targets: tuple[ExplainedTarget, ...]


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


def explain_choice(
    prompt: str,
    *,
    asked: str,
    settings: GatewaySettings,
    stored: StoredPolicies,
    extra_providers: Mapping[str, ProviderFactory] | None = None,
    learned: LearnedOrder | None = None,
    stored_secrets: StoredSecrets | None = None,
    tokens_in: int | None = None,
    tokens_out: int = 1000,
    tenant: str = "",
) -> tuple[ExplainedChoice, AgenticFlowError | None]:
    """What a gateway with these settings and policies would choose. No provider is asked.

    Args:
        prompt: The prompt; its length gives `tokens_in` unless that is given.
        asked: A model, an alias or a route.
        settings: The section `gateway`.
        stored: The policies in force.
        extra_providers: Those of plug-ins.
        learned: What the strategy `learned` asks.
        stored_secrets: The encrypted store, for keys that no setting gives.
        tokens_in, tokens_out: Expected size of the call.
        tenant: Whose call it would be.

    Returns:
        The explanation, and the error that the call would end with instead of being sent, if any.

    Raises:
        UnknownModel: the name means nothing.
        InvalidInput: see `Router.plan`.
    """
    transport = HttpTransport(
        idle_timeout_s=settings.idle_timeout_s, response_max_bytes=settings.response_max_bytes
    )
    providers = build_providers(settings, transport, extra_providers, stored=stored_secrets)
    prices = PriceList(settings.prices_usd_per_mtok)
    router = Router(providers, prices, price_url=price_urls(providers), learned=learned)
    if tokens_in is None:
        tokens_in = max(1, -(-len(prompt) // CHARS_PER_TOKEN))
    rows = router.explain(
        asked, stored.policies, tokens_in=tokens_in, tokens_out=tokens_out, prompt=prompt, tenant=tenant
    )
    plan: Plan | None = None
    refused: AgenticFlowError | None = None
    try:
        plan = router.plan(
            asked, stored.policies, tokens_in=tokens_in, tokens_out=tokens_out, prompt=prompt, tenant=tenant
        )
    except AgenticFlowError as error:
        refused = error
    explained = ExplainedChoice(
        asked=asked,
        route=plan.route if plan else asked,
        chosen=tuple(f"{c.provider}:{c.model}" for c in plan.candidates) if plan else (),
        reason=plan.reason if plan else (refused.message if refused else ""),
        policies_version=stored.version,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        targets=tuple(_target(row) for row in rows),
    )
    return explained, refused


def _target(row: Considered) -> ExplainedTarget:
    return ExplainedTarget(**row._asdict())
