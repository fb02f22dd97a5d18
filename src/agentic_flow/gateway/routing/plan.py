"""Which models a call may use, and in what order: pure decisions over names, prices and what was observed.

Nothing here waits, and nothing is asked of a provider. What a process learns while it serves (which target
holds a conversation, how soon each answers) stays in the process; other workers learn it for themselves.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidInput, PolicyDenied, UnknownModel
from agentic_flow.gateway.models import EXTRACTIVE, FAMILY_NAMES, Named, choose, meaning
from agentic_flow.gateway.policies import Escalation, GatewayPolicies, Route
from agentic_flow.gateway.prices import ModelRates, PriceList
from agentic_flow.gateway.routing.memory import Latencies, Pins
from agentic_flow.gateway.routing.names import BUILT_IN, resolve_alias, route_named

ALWAYS_LOCAL = frozenset({"onnx", EXTRACTIVE})
TARGETS_AGE_MAX_S = 60.0
"""Targets are worked out anew after this long, because prices change by date and hour."""
_REASONS_SHOWN_MAX = 8
_FAMILIES = {model: family for family, model in FAMILY_NAMES.items()}


class Candidate(NamedTuple):
    """A provider's name and its own id of the model; an empty id is the provider's default."""

    provider: str
    model: str


class Plan(NamedTuple):
    """Where one call may go.

    Args:
        asked: The name that the caller gave.
        route: The route that it led to; None for a model by name.
        candidates: In the order to try them; never empty.
        reason: Why the first is first, in one line.
        escalation: Whether, and by whom, answers are checked; a router that learns may lower `tries_max`.
        sticky: The route keeps conversations: tell `Router.served` who answered.
        propensity: Probability with which the first came first, for who learns from the outcome.
        private: The text must not leave for any other machine, not for an embedding either.
    """

    asked: str
    route: str | None
    candidates: tuple[Candidate, ...]
    reason: str
    escalation: Escalation | None
    sticky: bool
    propensity: float = 1.0
    private: bool = False


class Considered(NamedTuple):
    """One target as a choice saw it.

    Args:
        model: The provider's id, "" for the first that it lists; the name itself where no provider claims it.
        provider: Its provider; None when no provider claims the name.
        cost_usd: Expected cost of this call; None when no price is known.
        quality: From the policies; None when they do not say.
        latency_s: Time to the first token as observed here; None before any.
        local: Whether it keeps data on the operator's own machines.
        configured: Whether its provider can be asked.
        position: From 1; None when it was left out.
        reason: Why it stands there, or why it was left out.
        predicted: What the strategy `learned` expects of its answer, 0 to 1; None before enough is known.
        propensity: Probability with which that strategy, or `weighted`, has it come first.
    """

    model: str
    provider: str | None
    cost_usd: float | None
    quality: float | None
    latency_s: float | None
    local: bool
    configured: bool
    position: int | None
    reason: str
    predicted: float | None = None
    propensity: float | None = None


class Decided(Protocol):
    """What a router that learns decided; see `learned.Decision`."""

    @property
    def order(self) -> tuple[Candidate, ...]: ...

    @property
    def reason(self) -> str: ...

    @property
    def propensity(self) -> float: ...

    @property
    def tries(self) -> int:
        """How many of `order` are worth trying under a checker; the others wait for failures."""
        ...

    @property
    def predicted(self) -> tuple[float, ...]:
        """The verdict expected of each of `order`; empty before enough is known."""
        ...

    @property
    def propensities(self) -> tuple[float, ...]:
        """Probability of each of `order` to come first."""
        ...


class LearnedOrder(Protocol):
    """A router that learns from outcomes."""

    def decide(
        self,
        candidates: Sequence[Candidate],
        prompt: str,
        *,
        costs_usd: Sequence[float | None],
        tenant: str = "",
        tries_max: int = 1,
        cost_weight: float | None = None,
        explore: bool = True,
    ) -> Decided:
        """The candidates in the order to try them, why, and how likely that was; see `learned`."""
        ...


@dataclass(slots=True)
class _Option:
    """A target as far as it is the same for all calls; `out` says why it was left out."""

    name: str
    weight: float
    named: bool
    provider: str = ""
    model: str = ""
    native: str = ""
    rates: ModelRates | None = None
    quality: float | None = None
    local: bool = False
    configured: bool = False
    out: str = ""

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.provider, self.model)

    @property
    def key(self) -> tuple[str, str]:
        return self.provider, self.native

    def cost_usd(self, call: _Call) -> float | None:
        """Expected cost of one call; None when no price is known."""
        if self.rates is None:
            return None
        tier = self.rates.at(call.tokens_in)
        return call.tokens_in * tier.input + call.tokens_out * tier.output


class _Targets(NamedTuple):
    """A route's targets after its rules: all of them, and those that may be asked."""

    all: list[_Option]
    left: list[_Option]


class _Call(NamedTuple):
    """What is known of the call that is planned. `draw` is its conversation's own number, if it has one;
    `explore` says whether something may be tried out with it."""

    name: str
    route: Route
    tokens_in: int
    tokens_out: int
    prompt: str
    tenant: str
    draw: float | None = None
    explore: bool = True


class Router:
    """Plans calls, and remembers what helps the next plan.

    Args:
        providers: Every provider by name, in the order of preference.
        prices: What calls cost.
        price_url: Provider → the address whose prices hold, for endpoints that only speak OpenAI's format.
        learned: What the strategy `learned` asks; without it that strategy is refused.
        clock: Ages what was observed.
        rng: Draws among weighted targets.
    """

    def __init__(
        self,
        providers: Mapping[str, Named],
        prices: PriceList,
        *,
        price_url: Callable[[str], str | None] = lambda provider: None,
        learned: LearnedOrder | None = None,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> None:
        self._providers = providers
        self._prices = prices
        self._price_url = price_url
        self._learned = learned
        self._rng = rng or random.Random()
        self._pins = Pins()
        self._latencies = Latencies(clock)
        self._clock = clock
        self._targets: dict[str, _Targets] = {}
        self._targets_of: tuple[GatewayPolicies | None, list[bool]] = (None, [])
        self._targets_until_s = 0.0

    def plan(
        self,
        asked: str,
        policies: GatewayPolicies,
        *,
        tokens_in: int = 1000,
        tokens_out: int = 1000,
        conversation: str | None = None,
        prompt: str | None = None,
        tenant: str = "",
        explore: bool = True,
    ) -> Plan:
        """Where a call to `asked` may go.

        Args:
            asked: A model, an alias or a route.
            policies: Those in force.
            tokens_in, tokens_out: Expected size of the call, for its cost.
            conversation: What sticky routes know a conversation by; None: none.
            prompt: What the strategy `learned` looks at.
            tenant: Who asks; conversations of two tenants never meet.
            explore: False: the call is not made, so nothing is tried out with it.

        Raises:
            UnknownModel: the name means nothing, or nothing of its route can be asked; lists why.
            PolicyDenied: a route of the strategy `privacy` has no local model that can be asked.
            InvalidInput: the strategy is `learned`, and this gateway has no learned router.
        """
        name = resolve_alias(asked, policies.aliases)
        route = route_named(name, policies)
        if route is None:
            chosen = self._by_name(name, policies)
            return Plan(asked, None, (chosen,), f"the model {name!r} was asked for by name", None, False)
        if route.strategy == "privacy" and route.escalation is not None:
            self._check_judge(name, route.escalation, policies)
        pin = Pins.key(tenant, name, conversation) if route.sticky and conversation is not None else None
        draw = None if pin is None else int.from_bytes(pin[:8], "big") / 2**64
        call = _Call(name, route, tokens_in, tokens_out, prompt or "", tenant, draw, explore)
        found = self._of_route(name, route, policies)
        if not found.left:
            raise _none_left(call, found.all, policies)
        pinned = None if pin is None else self._pinned(tenant, pin, found.left)
        if pinned is not None:
            rest = _by_cost(call, [option for option in found.left if option is not pinned])
            ordered, reason, propensity = [pinned, *rest], "it answered this conversation before", 1.0
            tries = len(ordered)
        else:
            ordered, reason, propensity, tries = self._order(call, found.left)
            if explore and route.strategy == "latency" and self._latencies.expected_s(ordered[0].key) is None:
                self._latencies.begin_probe(ordered[0].key)
        candidates = tuple([option.candidate for option in ordered])
        reason = f"route {name!r}: {reason}"
        private = route.strategy == "privacy"
        escalation = route.escalation
        if escalation is not None and tries < escalation.tries_max:
            escalation = escalation.model_copy(update={"tries_max": tries})
        return Plan(asked, name, candidates, reason, escalation, route.sticky, propensity, private)

    def served(self, conversation: str | None, tenant: str, route: str | None, candidate: Candidate) -> None:
        """Keep a conversation with the target that answered it, unless it has one that still stands."""
        if conversation is not None and route is not None:
            self._pins.add(tenant, Pins.key(tenant, route, conversation), self._key(candidate))

    def observe(self, candidate: Candidate, first_token_s: float | None, ok: bool) -> None:
        """Take in how one call went.

        Args:
            candidate: Who was asked.
            first_token_s: Time to the first token; None when there was none.
            ok: Whether it answered.
        """
        self._latencies.observe(self._key(candidate), first_token_s, ok)

    def observer(self, candidate: Candidate) -> Callable[[float | None, bool], None]:
        """`observe` for one candidate, for who tells of many calls to it."""
        return partial(self._latencies.observe, self._key(candidate))

    def explain(
        self,
        asked: str,
        policies: GatewayPolicies,
        *,
        tokens_in: int = 1000,
        tokens_out: int = 1000,
        prompt: str | None = None,
        tenant: str = "",
    ) -> list[Considered]:
        """Every target of `asked`: first those that would be tried, in order, then those left out, and why.

        Weighted targets stand in the order of their weights, with their share; nothing is drawn, to explore
        neither.

        Raises:
            UnknownModel: the name means nothing.
            InvalidInput: the strategy is `learned`, and this gateway has no learned router.
        """
        name = resolve_alias(asked, policies.aliases)
        route = route_named(name, policies)
        call = _Call(name, route or Route(), tokens_in, tokens_out, prompt or "", tenant, explore=False)
        if route is None:
            chosen = self._by_name(name, policies)
            option = self._option(f"{chosen.provider}:{chosen.model}", 1.0, policies, named=True)
            return [self._considered(call, option, 1, "asked for by name")]
        found = self._of_route(name, route, policies)
        rows: list[Considered] = []
        if found.left and route.strategy == "learned":
            rows = self._explain_learned(call, found.left)
        elif found.left:
            if route.strategy == "weighted":
                ordered, reason = sorted(found.left, key=lambda option: -option.weight), ""
            else:
                ordered, reason, _, _ = self._order(call, found.left)
            total = sum(option.weight for option in ordered)
            for position, option in enumerate(ordered, start=1):
                why = reason if position == 1 else "tried when those before it fail"
                share = None
                if route.strategy == "weighted":
                    share = option.weight / total
                    why = f"drawn for {100 * share:.3g} % of calls"
                elif option.rates is None and route.strategy in ("cost", "quality", "latency"):
                    why += "; no price is known"
                rows.append(self._considered(call, option, position, why, propensity=share))
        rows += [self._considered(call, option, None, option.out) for option in found.all if option.out]
        return rows

    # Names

    def _by_name(self, name: str, policies: GatewayPolicies) -> Candidate:
        try:
            return Candidate(*choose(name, self._providers))
        except UnknownModel as error:
            ours = [*policies.routes, *policies.aliases, *BUILT_IN]
            close = difflib.get_close_matches(name, ours, n=1)
            if not close or name == close[0]:
                raise
            hint = f"did you mean the route or alias {close[0]!r}? {error.hint or ''}".rstrip()
            raise UnknownModel(error.message, hint=hint) from None

    def _check_judge(self, route: str, escalation: Escalation, policies: GatewayPolicies) -> None:
        """A model that judges answers reads them: a private route's judge must be local as well."""
        kind, colon, judge = escalation.checker.partition(":")
        if kind != "model" or not colon:
            return
        end = resolve_alias(judge, policies.aliases)
        named = route_named(end, policies)
        if named is None:
            chosen = meaning(end, self._providers)
            kept = chosen is not None and self._is_local(chosen.provider, chosen.model, policies)
        else:
            kept = named.strategy == "privacy"
        if not kept:
            raise PolicyDenied(
                f"route {route!r} keeps data local, and its checker {escalation.checker!r} is not local",
                hint="have a local model judge, or use another checker",
            )

    def _is_local(self, provider: str, model: str, policies: GatewayPolicies) -> bool:
        local = policies.local
        return (
            provider in ALWAYS_LOCAL
            or provider in local
            or f"{provider}:{self._native(provider, model)}" in local
            or (not model and f"{provider}:" in local)
        )

    def _native(self, provider: str, model: str) -> str:
        if model:
            return model
        served = self._providers.get(provider)
        return (served.default_model if served else None) or ""

    def _key(self, candidate: Candidate) -> tuple[str, str]:
        return candidate.provider, self._native(candidate.provider, candidate.model)

    # Targets

    def _of_route(self, name: str, route: Route, policies: GatewayPolicies) -> _Targets:
        """The route's targets, worked out once for as long as nothing that they depend on changes."""
        now_s = self._clock.monotonic_s()
        configured = [provider.configured for provider in self._providers.values()]
        of, were = self._targets_of
        if of is not policies or were != configured or now_s >= self._targets_until_s:
            self._targets = {}
            self._targets_of = (policies, configured)
            self._targets_until_s = now_s + TARGETS_AGE_MAX_S
        found = self._targets.get(name)
        if found is None:
            options = self._options(route, policies)
            found = self._targets[name] = _Targets(options, [option for option in options if not option.out])
        return found

    def _options(self, route: Route, policies: GatewayPolicies) -> list[_Option]:
        if route.targets:
            options = [
                self._option(target.model, target.weight, policies, named=True) for target in route.targets
            ]
        else:
            options = self._all_models(policies)
        seen: set[tuple[str, str]] = set()
        for option in options:
            if not option.provider:
                continue
            if option.key in seen:
                option.out = "named before"
            seen.add(option.key)
            if route.strategy == "privacy" and not option.local:
                option.out = "it is not local"
            elif not option.out:
                option.out = _below(option, route)
        if not route.targets:
            _leave_weaker_tiers(options, route.strategy == "privacy")
        return options

    def _all_models(self, policies: GatewayPolicies) -> list[_Option]:
        """Whatever the policies' routes name, and the default model of every provider."""
        named = dict.fromkeys(t.model for route in policies.routes.values() for t in route.targets)
        # Those that an operator names come first, so that a default model named twice counts as named.
        return [
            *(self._option(name, 1.0, policies, named=True) for name in named),
            *(self._option(f"{provider}:", 1.0, policies, named=False) for provider in self._providers),
        ]

    def _option(self, name: str, weight: float, policies: GatewayPolicies, *, named: bool) -> _Option:
        option = _Option(name, weight, named)
        try:
            end = resolve_alias(name, policies.aliases)
        except UnknownModel as error:
            option.out = error.message
            return option
        if route_named(end, policies) is not None:
            option.out = "it is a route, not a model"
            return option
        chosen = meaning(end, self._providers)
        if chosen is None:
            option.out = "no provider serves it"
            return option
        provider = self._providers[chosen.provider]
        option.provider, option.model = chosen
        option.native = self._native(*chosen)
        option.configured = provider.configured
        option.local = self._is_local(*chosen, policies)
        full = f"{option.provider}:{option.native}"
        option.quality = _quality(policies.quality, full, option.native, name)
        option.rates = self._prices.rates(
            option.provider, option.native, base_url=self._price_url(option.provider)
        )
        if not option.configured:
            option.out = f"{option.provider} is not configured: {provider.setup_hint}"
        return option

    # Order

    def _pinned(self, tenant: str, pin: bytes, left: Sequence[_Option]) -> _Option | None:
        key = self._pins.get(tenant, pin)
        if key is None:
            return None
        for option in left:
            if option.key == key:
                return option
        self._pins.drop(tenant, pin)  # no target any more: who answers next has the conversation
        return None

    def _order(self, call: _Call, left: list[_Option]) -> tuple[list[_Option], str, float, int]:
        """The order, why, the probability with which the first came first, and how many to try."""
        if call.route.strategy == "learned":
            ordered, decided = self._decided(call, left)
            return ordered, decided.reason, decided.propensity, max(decided.tries, 1)
        return *self._by_rule(call, left), 1.0, len(left)

    def _by_rule(self, call: _Call, left: list[_Option]) -> tuple[list[_Option], str]:
        match call.route.strategy:
            case "fallback":
                return left, "the first in its list that is configured"
            case "privacy":
                return left, "the first that is local"
            case "weighted":
                return self._by_weight(call, left)
            case "cost":
                ordered = _by_cost(call, left)
                cost_usd = ordered[0].cost_usd(call)
                if cost_usd is None:
                    return ordered, "no price is known of any"
                return ordered, f"the cheapest of {len(ordered)}, ${cost_usd:.6f} for this call"
            case "quality":
                ordered = _by_cost(call, left)
                ordered.sort(key=_quality_known, reverse=True)
                quality = ordered[0].quality
                return (
                    ordered,
                    "no quality is known of any" if quality is None else f"best quality, {quality:g}",
                )
            case "latency":
                return self._by_latency(call, left)
            case "learned":
                raise AssertionError("the learned order has a propensity")

    def _by_weight(self, call: _Call, left: list[_Option]) -> tuple[list[_Option], str]:
        ordered = sorted(left, key=lambda option: -option.weight)
        total = sum([option.weight for option in ordered])
        # A conversation's own number takes the place of chance, so that all workers draw the same for it.
        point = (self._rng.random() if call.draw is None else call.draw) * total
        drawn = ordered[0]
        for option in ordered:
            drawn = option
            point -= option.weight
            if point < 0:
                break
        ordered.remove(drawn)
        return [drawn, *ordered], f"drawn by weight, {drawn.weight:g} of {total:g}"

    def _by_latency(self, call: _Call, left: list[_Option]) -> tuple[list[_Option], str]:
        latencies = self._latencies
        ordered = _by_cost(call, left)
        ordered.sort(key=lambda option: latencies.rank(option.key))
        expected_s = latencies.expected_s(ordered[0].key)
        if expected_s is None:
            return ordered, "its latency is not known yet"
        return ordered, f"the soonest to its first token, {expected_s:.3f} s on average"

    def _decided(self, call: _Call, left: list[_Option]) -> tuple[list[_Option], Decided]:
        """The order that was learned from outcomes, and what was decided."""
        if self._learned is None:
            raise InvalidInput(
                f"route {call.name!r} wants the strategy 'learned', and this gateway has no learned router",
                hint="train one, or give the route another strategy",
            )
        candidates = [option.candidate for option in left]
        costs_usd = [option.cost_usd(call) for option in left]
        escalation = call.route.escalation
        decided = self._learned.decide(
            candidates,
            call.prompt,
            costs_usd=costs_usd,
            tenant=call.tenant,
            tries_max=1 if escalation is None else escalation.tries_max,
            cost_weight=call.route.cost_weight,
            explore=call.explore,
        )
        by_candidate = {option.candidate: option for option in left}
        # Whatever it answers, nothing is tried that the rules left out, and nothing is lost or tried twice.
        ordered = [by_candidate.pop(candidate) for candidate in decided.order if candidate in by_candidate]
        return [*ordered, *by_candidate.values()], decided

    def _explain_learned(self, call: _Call, left: list[_Option]) -> list[Considered]:
        """The targets in the order that was learned, with what is expected of each."""
        ordered, decided = self._decided(call, left)
        expected = dict(zip(decided.order, decided.predicted, strict=False))
        chances = dict(zip(decided.order, decided.propensities, strict=True))
        rows: list[Considered] = []
        for position, option in enumerate(ordered, start=1):
            if position == 1:
                why = decided.reason
            elif position <= decided.tries:
                why = "asked when the checker refuses those before it"
            else:
                why = "tried when those before it fail"
            if option.rates is None:
                why += "; no price is known"
            one = option.candidate
            row = self._considered(call, option, position, why, expected.get(one), chances.get(one, 0.0))
            rows.append(row)
        return rows

    def _considered(
        self,
        call: _Call,
        option: _Option,
        position: int | None,
        reason: str,
        predicted: float | None = None,
        propensity: float | None = None,
    ) -> Considered:
        return Considered(
            model=option.native if option.provider else option.name,
            provider=option.provider or None,
            cost_usd=option.cost_usd(call) if option.provider else None,
            quality=option.quality,
            latency_s=self._latencies.expected_s(option.key),
            local=option.local,
            configured=option.configured,
            position=position,
            reason=reason,
            predicted=predicted,
            propensity=propensity,
        )


def _quality(known: Mapping[str, float], full: str, native: str, name: str) -> float | None:
    for key in (full, native, name, _FAMILIES.get(full)):
        if key is not None and key in known:
            return known[key]
    return None


def _below(option: _Option, route: Route) -> str:
    """Why the least quality of a route leaves a target out; "" when it does not."""
    if route.quality_min > 0 and route.strategy in ("cost", "latency"):
        if option.quality is None:
            return f"its quality is not known, and {route.quality_min:g} is the least"
        if option.quality < route.quality_min:
            return f"its quality {option.quality:g} is below {route.quality_min:g}"
    return ""


def _leave_weaker_tiers(options: Sequence[_Option], any_price: bool) -> None:
    """Of all models: those priced or named by the operator, else those without a price, else `extractive`.

    `extractive` writes nothing of its own and costs nothing: by cost it would answer every call.
    """
    ready = [option for option in options if not option.out]
    writing = [option for option in ready if option.provider != EXTRACTIVE]
    if writing:
        for option in ready:
            if option.provider == EXTRACTIVE:
                option.out = "it selects and cites; used only where no other model can be asked"
    if any(option.named or option.rates is not None for option in writing) and not any_price:
        for option in writing:
            if not option.named and option.rates is None:
                option.out = "no price is known; name it in a route, or set gateway.prices_usd_per_mtok"


def _quality_known(option: _Option) -> float:
    return -1.0 if option.quality is None else option.quality


def _by_cost(call: _Call, options: Sequence[_Option]) -> list[_Option]:
    """Cheapest first; those without a price last."""

    def cost(option: _Option) -> float:
        cost_usd = option.cost_usd(call)
        return float("inf") if cost_usd is None else cost_usd

    return sorted(options, key=cost)


def _none_left(
    call: _Call, options: Sequence[_Option], policies: GatewayPolicies
) -> UnknownModel | PolicyDenied:
    reasons = [
        f"{f'{option.provider}:{option.native}' if option.provider else option.name}: {option.out}"
        for option in options
    ]
    shown = "; ".join(reasons[:_REASONS_SHOWN_MAX])
    if len(reasons) > _REASONS_SHOWN_MAX:
        shown += f"; and {len(reasons) - _REASONS_SHOWN_MAX} more"
    details = {"route": call.name, "left_out": reasons}
    if call.route.strategy == "privacy":
        local = ", ".join([*sorted(ALWAYS_LOCAL), *policies.local])
        return PolicyDenied(
            f"route {call.name!r} keeps data local, and has no local model that can be asked now ({shown})",
            hint=f"local are: {local}; add one to the route, or name a provider of your own in `local`",
            details=details,
        )
    return UnknownModel(
        f"route {call.name!r} has no model that can be asked now",
        hint=shown or "give it targets, or configure a provider",
        details=details,
    )
