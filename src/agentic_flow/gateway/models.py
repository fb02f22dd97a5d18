"""Model names: which provider a name means, and which model it means there.

`provider:model` is explicit, `provider:` alone is that provider's default. A bare name goes to the provider
that owns it: names with a slash to OpenRouter, `claude…` to Anthropic, and so on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from agentic_flow.core.errors import UnknownModel

# The models asked when nobody names one. A test holds them to the pinned price snapshot; no vendor was asked.
ANTHROPIC_DEFAULT = "claude-sonnet-5-5"
OPENROUTER_DEFAULT = "anthropic/claude-sonnet-5.5"
OPENAI_DEFAULT = "gpt-6.1-sol"
EXTRACTIVE = "extractive"

# Short names that agent definitions for Claude use.
FAMILY_NAMES = {
    "sonnet": "anthropic:claude-sonnet-5-5",
    "opus": "anthropic:claude-opus-5-5",
    "haiku": "anthropic:claude-haiku-5-5",
}
PROVIDER_NAMES = {"claude": "anthropic"}
DEFAULT_ORDER = ("anthropic", "openrouter", "openai")


class Named(Protocol):
    """What choosing by name needs to know of a provider."""

    @property
    def name(self) -> str: ...

    @property
    def default_model(self) -> str | None: ...

    @property
    def configured(self) -> bool: ...

    @property
    def setup_hint(self) -> str: ...

    def owns(self, model: str) -> bool: ...


class Choice(NamedTuple):
    """A provider's name and its own id of the model; an empty id is the provider's default."""

    provider: str
    model: str


def meaning(name: str, providers: Mapping[str, Named]) -> Choice | None:
    """What a name means whether or not its provider is configured; None when no provider claims it.

    A bare name that several claim goes to the first that is configured, else to the first.
    """
    wanted = FAMILY_NAMES.get(name, name)
    prefix, colon, rest = wanted.partition(":")
    if colon:
        prefix = PROVIDER_NAMES.get(prefix, prefix)
        if prefix in providers:
            return Choice(prefix, rest)
    if wanted == EXTRACTIVE and EXTRACTIVE in providers:
        return Choice(EXTRACTIVE, EXTRACTIVE)
    first: Choice | None = None
    for provider in providers.values():
        if provider.owns(wanted):
            if provider.configured:
                return Choice(provider.name, wanted)
            first = first or Choice(provider.name, wanted)
    return first


def choose(name: str, providers: Mapping[str, Named]) -> Choice:
    """The provider and model that a name means.

    Raises:
        UnknownModel: it names nothing that is configured; lists what is, and what would add it.
    """
    chosen = meaning(name, providers)
    if chosen is None:
        raise UnknownModel(
            f"no provider serves model {name!r}", hint=_hint(name, providers, _missing(providers.values()))
        )
    _demand_configured(name, providers[chosen.provider], providers)
    return chosen


def default_name(configured_model: str | None, providers: Mapping[str, Named]) -> str:
    """The setting's model, else the default of the first provider with a key, else the keyless model."""
    if configured_model:
        return configured_model
    for name in DEFAULT_ORDER:
        provider = providers.get(name)
        if provider and provider.configured:
            return f"{name}:{provider.default_model or ''}"
    for provider in providers.values():
        if provider.configured and provider.name != EXTRACTIVE:
            return f"{provider.name}:{provider.default_model or ''}"
    return EXTRACTIVE


def _demand_configured(name: str, provider: Named, providers: Mapping[str, Named]) -> None:
    if not provider.configured:
        raise UnknownModel(
            f"model {name!r} belongs to {provider.name}, which is not configured",
            hint=_hint(name, providers, [provider.setup_hint]),
        )


def _missing(providers: Iterable[Named]) -> list[str]:
    return [provider.setup_hint for provider in providers if not provider.configured]


def _hint(name: str, providers: Mapping[str, Named], remedies: Sequence[str]) -> str:
    ready = [provider for provider in providers.values() if provider.configured]
    shown = ", ".join(
        EXTRACTIVE if p.name == EXTRACTIVE else f"{p.name}:{p.default_model or 'MODEL'}" for p in ready
    )
    known = [
        *FAMILY_NAMES,
        *(f"{p.name}:" for p in providers.values()),
        *(p.default_model for p in providers.values() if p.default_model),
        *(f"{p.name}:{p.default_model}" for p in providers.values() if p.default_model),
    ]
    close = [match for match in difflib.get_close_matches(name, known, n=1) if match != name]
    parts = [f"did you mean {close[0]!r}?"] if close else []
    parts.append(f"configured: {shown}")
    if remedies:
        parts.append(f"to add more: {'; '.join(remedies)}")
    return "; ".join(parts)
