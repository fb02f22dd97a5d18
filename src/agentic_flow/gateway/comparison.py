"""What the same tasks cost on different models: list prices times one stated mix of tokens.

Beside each sum stands the figure of a published comparison, where it has one. Those figures do not follow
from one mix of tokens at list prices, so they are shown as published and never used in a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from agentic_flow.core.errors import InvalidInput, UnknownModel
from agentic_flow.core.messages import Frozen, Usage
from agentic_flow.gateway.models import (
    ANTHROPIC_DEFAULT,
    EXTRACTIVE,
    FAMILY_NAMES,
    OPENAI_DEFAULT,
    OPENROUTER_DEFAULT,
    PROVIDER_NAMES,
    Choice,
)
from agentic_flow.gateway.prices import PriceList, snapshot_date, snapshot_version

# The mix at which Claude 3.5 Sonnet costs what was published for it.
INPUT_TOKENS = 10_000
OUTPUT_TOKENS = 3_333
TASKS = 1_000
TOKENS_MAX = 100_000_000
TASKS_MAX = 1_000_000_000

# US dollars per 1000 tasks, as published. The comparison names no mix and no exact models; which list price
# stands beside a figure is our reading.
PUBLISHED_USD: Mapping[str, float] = {
    "anthropic:claude-3-5-sonnet": 80.00,
    "openrouter:meta-llama/llama-3.1-8b-instruct": 0.30,
    "openrouter:deepseek/deepseek-chat": 0.50,
    "openrouter:google/gemini-2.5-flash": 1.00,
    "onnx:phi-4": 0.00,
}
PUBLISHED_NOTE = (
    "published: per 1000 tasks, from a comparison that states no token mix; "
    "its figures are not consistent with one mix at list prices"
)
_DEFAULTS = {
    "anthropic": ANTHROPIC_DEFAULT,
    "openai": OPENAI_DEFAULT,
    "openrouter": OPENROUTER_DEFAULT,
    EXTRACTIVE: EXTRACTIVE,
}
DEFAULT_MODELS = (
    *PUBLISHED_USD,
    f"anthropic:{ANTHROPIC_DEFAULT}",
    f"openrouter:{OPENROUTER_DEFAULT}",
    f"openai:{OPENAI_DEFAULT}",
)


class Mix(Frozen):
    """Tokens of one task, which is one call.

    Args:
        input_tokens: All input, cached included.
        output_tokens: All output, reasoning included.
        cached_tokens: Input that is read from the provider's cache.
        tasks: How many tasks a sum is for.
    """

    input_tokens: int = INPUT_TOKENS
    output_tokens: int = OUTPUT_TOKENS
    cached_tokens: int = 0
    tasks: int = TASKS


class ComparedModel(Frozen):
    """A line of the comparison.

    Args:
        model: `provider:model`.
        cost_usd: US dollars for all tasks of the mix; None when no price is known, which is not free.
        published_usd: The published figure per 1000 tasks, whatever the mix; None when there is none.
        price_source: `snapshot` for list prices, `own` for prices of the settings, and for `extractive` and
            `onnx`, which are free; None without a price.
        notes: What to know before trusting the sum.
    """

    model: str
    cost_usd: float | None
    published_usd: float | None
    price_source: str | None
    notes: tuple[str, ...] = ()


class Comparison(Frozen):
    """The whole comparison: the mix, the prices' origin and date, and a line per model."""

    mix: Mix
    snapshot: str
    snapshot_date: date
    published_note: str
    models: tuple[ComparedModel, ...]


def compare(
    mix: Mix,
    prices: PriceList,
    *,
    models: Sequence[str] = (),
    base_urls: Mapping[str, str] | None = None,
) -> Comparison:
    """The cost of the mix on each model. Asks no provider and needs no key.

    Args:
        mix: What is priced.
        prices: List prices and overrides.
        models: `provider:model` each; none stands for the published comparison's and the built-in defaults.
        base_urls: Provider → address, for endpoints whose address tells whose prices hold.

    Raises:
        InvalidInput: a count is out of bounds, or a model is not named `provider:model`.
        UnknownModel: no price is known for a model that was asked for by name.
    """
    _check(mix)
    lines: dict[str, ComparedModel] = {}
    for name in models or DEFAULT_MODELS:
        chosen = _parse(name)
        line = _line(mix, prices, chosen, (base_urls or {}).get(chosen.provider))
        if models and line.cost_usd is None:
            raise UnknownModel(
                f"no price is known for model {name!r}",
                hint=f"check its spelling, or give its price: gateway.prices_usd_per_mtok = "
                f'{{"{line.model}" = [INPUT, OUTPUT]}}',
            )
        lines.setdefault(line.model, line)
    return Comparison(
        mix=mix,
        snapshot=snapshot_version(),
        snapshot_date=snapshot_date(),
        published_note=PUBLISHED_NOTE,
        models=tuple(lines.values()),
    )


def _check(mix: Mix) -> None:
    for name, count, least, most in (
        ("input tokens", mix.input_tokens, 1, TOKENS_MAX),
        ("output tokens", mix.output_tokens, 1, TOKENS_MAX),
        ("cached tokens", mix.cached_tokens, 0, TOKENS_MAX),
        ("tasks", mix.tasks, 1, TASKS_MAX),
    ):
        if not least <= count <= most:
            raise InvalidInput(f"{name} {count!r} out of bounds", hint=f"{least} to {most}")
    if mix.cached_tokens > mix.input_tokens:
        raise InvalidInput(
            f"cached tokens {mix.cached_tokens!r} are more than the input tokens {mix.input_tokens!r}",
            hint="cached tokens are a part of the input",
        )


def _parse(name: str) -> Choice:
    provider, colon, model = FAMILY_NAMES.get(name, name).partition(":")
    provider = PROVIDER_NAMES.get(provider, provider)
    if provider == EXTRACTIVE and model in ("", EXTRACTIVE):
        return Choice(EXTRACTIVE, EXTRACTIVE)
    model = model or _DEFAULTS.get(provider, "")
    if not (colon and provider and model):
        raise InvalidInput(
            f"model {name!r} does not say whose it is",
            hint="write PROVIDER:NAME, such as openrouter:deepseek/deepseek-chat",
        )
    return Choice(provider, model)


def _line(mix: Mix, prices: PriceList, chosen: Choice, base_url: str | None) -> ComparedModel:
    name = f"{chosen.provider}:{chosen.model}"
    published = PUBLISHED_USD.get(name)
    rates = prices.rates(chosen.provider, chosen.model, base_url=base_url)
    if rates is None:
        return ComparedModel(model=name, cost_usd=None, published_usd=published, price_source=None)
    usage = Usage(
        input_tokens=mix.input_tokens,
        output_tokens=mix.output_tokens,
        cache_read_tokens=mix.cached_tokens,
    )
    notes: list[str] = []
    if rates.snapshot_id not in (None, chosen.model):
        notes.append(f"priced as {rates.snapshot_id}")
    if chosen.provider == "onnx" and rates.snapshot_id is None and rates.cost_usd(usage) == 0:
        notes.append("runs on your machine, which is not counted")
    if rates.deprecated:
        notes.append("deprecated in the snapshot")
    if rates.context_tokens and mix.input_tokens + mix.output_tokens > rates.context_tokens:
        notes.append(f"such a task does not fit its context of {rates.context_tokens} tokens")
    return ComparedModel(
        model=name,
        cost_usd=round(mix.tasks * rates.cost_usd(usage), 9),
        published_usd=published,
        price_source="snapshot" if rates.snapshot_id else "own",
        notes=tuple(notes),
    )
