"""What operators decide about model calls while the gateway runs: one typed document.

Names and routes, budgets, rate limits, the response cache and guardrails. The document lives in the gateway's
database with its history (`policy_store`), is replaced as a whole, and is never half in force.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from agentic_flow.core.auth import Principal
from agentic_flow.core.messages import Frozen

EACH = "*"
"""In a rule's `name`: everyone of that scope has an allowance of their own."""

Name = Annotated[str, Field(min_length=1, max_length=256)]
Scope = Literal["platform", "tenant", "key", "agent", "run"]
Period = Literal["minute", "hour", "day", "week", "month", "total"]
Strategy = Literal["fallback", "weighted", "cost", "latency", "quality", "privacy", "learned"]


class Caller(NamedTuple):
    """Who asks, and who pays.

    Args:
        tenant: Always there.
        key: Id of the API key; the subject where no key is behind the request.
        agent: Name of the agent, as the caller states it; "" for none.
        run: Id of the run, likewise.
    """

    tenant: str
    key: str
    agent: str = ""
    run: str = ""

    @classmethod
    def of(cls, principal: Principal, agent: str | None = None, run: str | None = None) -> Self:
        return cls(principal.tenant, principal.key_id or principal.subject, agent or "", run or "")


class Target(Frozen):
    """A model that a route may use: `provider:model` or a bare name, with its share among weighted ones."""

    model: Name
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class Escalation(Frozen):
    """Try the targets in order until a checker is content: cheap models first.

    Args:
        checker: Name of the checker (entry-point group `agentic_flow.checkers`), or `model:NAME`, which has
            that model judge the answer.
        options: What the checker takes.
        tries_max: Models tried at most; the last one's answer stands, whatever the checker says.
    """

    checker: Name
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    tries_max: Annotated[int, Field(ge=1, le=8)] = 3


class Route(Frozen):
    """A name that callers may ask for instead of a model.

    Args:
        targets: Models, in the order of preference. Empty: every model that is configured and priced.
        strategy: `fallback` in order; `weighted` draws by weight, the others after it; `cost`, `latency` and
            `quality` order the targets by what is known of them; `privacy` keeps the local ones, or refuses;
            `learned` asks the router that learns from outcomes.
        quality_min: Of `cost` and `latency`: targets below this quality (0 to 1) are left out.
        sticky: A conversation stays with the target that answered it first.
        escalation: Whether, and by whom, answers are checked.
        cost_weight: Of `learned`: what the dearest target's price is worth in quality. At 0.9 a model for
            that price must be right 90 % of the time to be worth asking; 0 asks for quality at any price.
            None: 0.9.
    """

    targets: Annotated[tuple[Target, ...], Field(max_length=64)] = ()
    strategy: Strategy = "fallback"
    quality_min: Annotated[float, Field(ge=0, le=1)] = 0.0
    sticky: bool = False
    escalation: Escalation | None = None
    cost_weight: Annotated[float, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _weighs_what_was_learned(self) -> Self:
        if self.cost_weight is not None and self.strategy != "learned":
            raise ValueError(f"cost_weight is of the strategy 'learned', and this one is {self.strategy!r}")
        return self


class BudgetRule(Frozen):
    """No more than `limit_usd` within each period (UTC; weeks begin on Monday).

    Args:
        scope: Who shares it.
        name: Which tenant, key id, agent or run; `*`: each its own. Agents and runs are counted
            within their tenant.
        limit_usd: Inclusive; 0 forbids whatever costs.
        period: When it begins anew; `total` never does.
        tenant: Only callers of this tenant; None: of any.
    """

    scope: Scope
    name: Name = EACH
    limit_usd: Annotated[float, Field(ge=0, le=1e9)]
    period: Period = "month"
    tenant: Name | None = None

    @property
    def limit_nano_usd(self) -> int:
        """The limit as the ledger counts: whole thousand-millionths of a dollar."""
        return round(self.limit_usd * 1_000_000_000)


class LimitRule(Frozen):
    """At most so many requests and tokens per minute.

    Args:
        scope: Who shares it; `model` is the model asked for, in each tenant.
        name: Which; `*`: each one of its own.
        requests_per_minute: None: not limited.
        tokens_per_minute: Input and output together; None: not limited.
        tenant: Only callers of this tenant; None: of any.
    """

    scope: Literal["tenant", "key", "model"]
    name: Name = EACH
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=10_000_000_000)] | None = None
    tenant: Name | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.requests_per_minute is None and self.tokens_per_minute is None:
            raise ValueError("give requests_per_minute, tokens_per_minute or both")
        return self


class CacheRule(Frozen):
    """Answers kept for equal requests of the same tenant.

    Args:
        mode: `off`; `exact`: the same request; `semantic`: also one whose last message means the same, by the
            embedder of AgentDB.
        ttl_s: How long an answer is good.
        entries_max, bytes_max: Bounds of one worker's cache, over all tenants.
        similarity_min: Of `semantic`: cosine similarity from which two messages count as the same.
        tool_turns: Whether turns that offer tools are cached too.
    """

    mode: Literal["off", "exact", "semantic"] = "off"
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = 300.0
    entries_max: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    bytes_max: Annotated[int, Field(ge=1024, le=2**34)] = 64 * 2**20
    similarity_min: Annotated[float, Field(ge=0, le=1)] = 0.95
    tool_turns: bool = False


class GuardrailRule(Frozen):
    """A guardrail in force (entry-point group `agentic_flow.guardrails`), with its options."""

    name: Name
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    tenant: Name | None = None


class GatewayPolicies(Frozen):
    """All of it. Empty: models go by their names, nothing is limited, nothing is cached.

    Args:
        aliases: Name → model name, or the name of a route.
        routes: Name → route. `auto` is one that an operator may define; without it, the built-in one orders
            the configured models by cost.
        quality: Model name → its quality from 0 to 1, for routes that weigh it.
        local: Names of providers, or `provider:model`, that keep data on machines of the operator's own;
            `onnx` and `extractive` always do.
    """

    aliases: Annotated[dict[Name, Name], Field(max_length=1000)] = Field(default_factory=dict[str, str])
    routes: Annotated[dict[Name, Route], Field(max_length=1000)] = Field(default_factory=dict[str, Route])
    quality: dict[Name, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict[str, float])
    local: tuple[Name, ...] = ()
    budgets: Annotated[tuple[BudgetRule, ...], Field(max_length=1000)] = ()
    limits: Annotated[tuple[LimitRule, ...], Field(max_length=1000)] = ()
    cache: CacheRule = CacheRule()
    guardrails: Annotated[tuple[GuardrailRule, ...], Field(max_length=100)] = ()
