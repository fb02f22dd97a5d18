"""What a model call costs: tokens as billed, times rates compiled once per model.

Rates come from the snapshot that the `genai-prices` package carries, and from settings that override it.
The package's own calculation takes about 300 µs a call; a compiled rate takes less than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib import metadata
from typing import TYPE_CHECKING

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.messages import Usage

if TYPE_CHECKING:
    from decimal import Decimal

    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

    from agentic_flow.gateway.wire.passing import Glance

_MTOK = 1_000_000
# Some prices change by date or by hour; a compiled rate is looked at again after this long.
RATES_AGE_MAX_S = 3600.0
MODELS_COMPILED_MAX = 4096


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices of one model in USD per token, beyond `above_tokens` input tokens of a call."""

    input: float
    output: float
    cache_read: float
    cache_write: float
    above_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelRates:
    """All tiers of one model, lowest first. A call pays the whole of the highest tier it reaches.

    `snapshot_id` is the model of the snapshot whose price this is (the snapshot matches some names by their
    beginning); None for own prices. `deprecated` is the snapshot's word.
    """

    tiers: tuple[Rates, ...]
    context_tokens: int | None = None
    snapshot_id: str | None = None
    deprecated: bool = False

    def at(self, input_tokens: int) -> Rates:
        """The tier that a call with this much input pays."""
        chosen = self.tiers[0]
        for tier in self.tiers[1:]:
            if input_tokens > tier.above_tokens:
                chosen = tier
        return chosen

    def cost_usd(self, usage: Usage | Glance) -> float:
        """Price of billed usage: cached input at its own rates, reasoning within the output."""
        rates = self.tiers[0] if len(self.tiers) == 1 else self.at(usage.input_tokens)
        plain = max(0, usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens)
        return (
            plain * rates.input
            + usage.cache_read_tokens * rates.cache_read
            + usage.cache_write_tokens * rates.cache_write
            + usage.output_tokens * rates.output
        )

    def cost_max_usd(self, input_tokens: int, output_tokens: int) -> float:
        """The most that a call of this size can cost: all input written to the cache if that is dearer."""
        rates = self.tiers[0] if len(self.tiers) == 1 else self.at(input_tokens)
        return input_tokens * max(rates.input, rates.cache_write) + output_tokens * rates.output


_FREE = ModelRates((Rates(0.0, 0.0, 0.0, 0.0),))


class PriceList:
    """Rates by provider and model.

    Args:
        overrides: `model` or `provider:model` → (input, output) in USD per million tokens. They hold for
            cached input as well, since a two-price list knows no third.
        clock: Tells which dated prices hold.
    """

    def __init__(
        self, overrides: Mapping[str, tuple[float, float]] | None = None, *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._overrides = {
            name: ModelRates((Rates(own[0] / _MTOK, own[1] / _MTOK, own[0] / _MTOK, own[0] / _MTOK),))
            for name, own in (overrides or {}).items()
        }
        self._clock = clock
        self._compiled: dict[tuple[str, str], tuple[float, ModelRates | None]] = {}

    def rates(self, provider: str, model: str, *, base_url: str | None = None) -> ModelRates | None:
        """Rates of a model, None when no price is known.

        Args:
            provider: Provider name; `extractive` and `onnx` run on this machine and are free by definition,
                and so are the embedders of `local` that do.
            model: The provider's own id.
            base_url: For endpoints that only speak OpenAI's format, whose address tells whose they are.
        """
        own = self._overrides.get(f"{provider}:{model}") or self._overrides.get(model)
        if own is not None:
            return own
        if provider in ("extractive", "onnx") or (provider == "local" and model.startswith(_EMBEDDERS_HERE)):
            return _FREE
        key = (base_url or provider, model)
        now_s = self._clock.time_s()
        known = self._compiled.get(key)
        if known is None or now_s - known[0] > RATES_AGE_MAX_S:
            if len(self._compiled) >= MODELS_COMPILED_MAX:
                self._compiled.clear()
            known = self._compiled[key] = (now_s, _compile(provider, model, base_url, now_s))
        return known[1]

    def cost_usd(
        self, provider: str, model: str, usage: Usage, *, base_url: str | None = None
    ) -> float | None:
        """Price of billed usage in USD, None when no price is known."""
        rates = self.rates(provider, model, base_url=base_url)
        return None if rates is None else rates.cost_usd(usage)


def snapshot_version() -> str:
    """Package and version of the snapshot in use."""
    return f"genai-prices {metadata.version('genai-prices')}"


def snapshot_date(today: date | None = None) -> date:
    """The newest price change in the snapshot that has taken effect; prices are at least this recent."""
    from genai_prices.data_snapshot import get_snapshot
    from genai_prices.types import StartDateConstraint

    today = today or datetime.now(UTC).date()
    return max(
        price.constraint.start_date
        for provider in get_snapshot().providers
        for model in provider.models
        for price in (model.prices if isinstance(model.prices, list) else [])
        if isinstance(price.constraint, StartDateConstraint) and price.constraint.start_date <= today
    )


_EMBEDDERS_HERE = ("hashed-ngram", "onnx:")
"""How the ids of embedders begin that ask nobody; others may cost what an operator has to say."""


def _compile(provider: str, model: str, base_url: str | None, now_s: float) -> ModelRates | None:
    found = _find(provider, model, base_url)
    if found is None:
        return None
    prices = found.get_prices(datetime.fromtimestamp(now_s, UTC))
    starts = {0}
    for price in (prices.input_mtok, prices.output_mtok, prices.cache_read_mtok, prices.cache_write_mtok):
        starts.update(_tier_starts(price))
    tiers = tuple(tier for start in sorted(starts) if (tier := _tier(prices, start)) is not None)
    return ModelRates(tiers, found.context_window, found.id, bool(found.deprecated)) if tiers else None


def _find(provider: str, model: str, base_url: str | None) -> ModelInfo | None:
    from genai_prices.data_snapshot import get_snapshot

    try:
        if base_url is not None:
            return get_snapshot().find_provider_model(model, None, None, base_url)[1]
        return get_snapshot().find_provider_model(model, None, provider, None)[1]
    except LookupError:
        return None


def _tier_starts(price: Decimal | TieredPrices | None) -> list[int]:
    from genai_prices.types import TieredPrices

    return [tier.start for tier in price.tiers] if isinstance(price, TieredPrices) else []


def _tier(prices: ModelPrice, start: int) -> Rates | None:
    per_input, per_output = _rate(prices.input_mtok, start), _rate(prices.output_mtok, start)
    if per_input is None or per_output is None:
        return None
    read, write = _rate(prices.cache_read_mtok, start), _rate(prices.cache_write_mtok, start)
    return Rates(
        input=per_input,
        output=per_output,
        cache_read=per_input if read is None else read,
        cache_write=per_input if write is None else write,
        above_tokens=start,
    )


def _rate(price: Decimal | TieredPrices | None, start: int) -> float | None:
    from genai_prices.types import TieredPrices

    if price is None:
        return None
    if not isinstance(price, TieredPrices):
        return float(price) / _MTOK
    chosen = price.base
    for tier in price.tiers:
        if tier.start <= start:
            chosen = tier.price
    return float(chosen) / _MTOK
