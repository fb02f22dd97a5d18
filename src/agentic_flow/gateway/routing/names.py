"""Names that callers may ask for besides models: aliases, routes, and the built-in `auto` ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from agentic_flow.core.errors import InvalidInput, UnknownModel
from agentic_flow.gateway.policies import GatewayPolicies, Route

ALIAS_HOPS_MAX = 8
"""Aliases of aliases that are followed."""

AUTO = "auto"
BUILT_IN: Mapping[str, Route] = MappingProxyType(
    {
        AUTO: Route(strategy="cost"),
        "auto:cost": Route(strategy="cost"),
        "auto:latency": Route(strategy="latency"),
        "auto:quality": Route(strategy="quality"),
        "auto:privacy": Route(strategy="privacy"),
    }
)
"""Routes over all models that are configured. Operators may define `auto` anew; the rest stays."""


def resolve_alias(name: str, aliases: Mapping[str, str]) -> str:
    """What a name stands for at the end of its chain of aliases; itself when it is none.

    Raises:
        UnknownModel: the chain comes back to itself, or is longer than `ALIAS_HOPS_MAX`.
    """
    if name not in aliases or _reserved(name):
        return name
    chain = [name]
    while (name := aliases[name]) in aliases and not _reserved(name):
        if name in chain or len(chain) >= ALIAS_HOPS_MAX:
            shown = " → ".join(map(repr, [*chain, name]))
            what = "leads back to itself" if name in chain else f"is longer than {ALIAS_HOPS_MAX} aliases"
            raise UnknownModel(
                f"the alias {chain[0]!r} {what}: {shown}", hint="correct `aliases` in the gateway's policies"
            )
        chain.append(name)
    return name


def route_named(name: str, policies: GatewayPolicies) -> Route | None:
    """The route of this name, which is no alias any more; None when it must be a model."""
    if _reserved(name):
        return BUILT_IN[name]
    return policies.routes.get(name) or (BUILT_IN[AUTO] if name == AUTO else None)


def check_names(policies: GatewayPolicies) -> None:
    """Refuse names that could not be followed, or that would not mean what they say.

    Raises:
        InvalidInput: names the field: an alias that leads nowhere, a name that is alias and route at once,
            a built-in name defined anew, or a route among the targets of another.
    """
    for name in policies.aliases:
        field = f"aliases.{name}"
        if _reserved(name):
            raise InvalidInput(
                f"{field}: {name!r} is a built-in route and cannot be an alias",
                hint="choose another name; `auto` alone may be defined anew",
            )
        if name in policies.routes:
            raise InvalidInput(
                f"{field}: {name!r} is also the name of a route", hint="take one of the two away"
            )
        try:
            resolve_alias(name, policies.aliases)
        except UnknownModel as error:
            raise InvalidInput(
                f"{field}: {error.message}", hint="end the chain at a model or route"
            ) from None
    for name, route in policies.routes.items():
        if _reserved(name):
            raise InvalidInput(
                f"routes.{name}: {name!r} is built in and cannot be defined anew",
                hint="choose another name; `auto` alone may be defined anew",
            )
        for index, target in enumerate(route.targets):
            end = resolve_alias(target.model, policies.aliases)
            if route_named(end, policies) is not None:
                raise InvalidInput(
                    f"routes.{name}.targets[{index}].model: {target.model!r} is a route, not a model",
                    hint="name its models one by one",
                )


def _reserved(name: str) -> bool:
    return name in BUILT_IN and name != AUTO
