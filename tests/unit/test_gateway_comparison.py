"""The cost comparison: sums against hand-computed ones, refusals, what is said of the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput, UnknownModel
from agentic_flow.gateway.comparison import (
    DEFAULT_MODELS,
    PUBLISHED_USD,
    TASKS_MAX,
    TOKENS_MAX,
    Mix,
    compare,
)
from agentic_flow.gateway.models import ANTHROPIC_DEFAULT
from agentic_flow.gateway.prices import PriceList, snapshot_date, snapshot_version

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "models.md"
SNAPSHOT = PriceList()


def costs(prices: PriceList = SNAPSHOT, **mix: int) -> dict[str, float | None]:
    """Cost by model, of the default models."""
    return {line.model: line.cost_usd for line in compare(Mix(**mix), prices).models}


def test_sums_from_own_prices_are_those_done_by_hand() -> None:
    """Catches tokens counted twice or in the wrong unit, and input and output swapped."""
    prices = PriceList({"openai:mine": (2.0, 8.0), "bare": (0.5, 1.0)})
    mix = Mix(input_tokens=4_000, output_tokens=500, cached_tokens=1_000, tasks=250)
    found = compare(mix, prices, models=["openai:mine", "openrouter:bare"])
    # 250 x 4000 = 1 M tokens in, 250 x 500 = 0.125 M out; two prices know no third for cached input.
    assert [line.cost_usd for line in found.models] == [2.0 + 0.125 * 8.0, 0.5 + 0.125 * 1.0]
    assert {line.price_source for line in found.models} == {"own"}
    assert (found.snapshot, found.snapshot_date) == (snapshot_version(), snapshot_date())
    assert found.mix == mix


def test_cached_input_costs_what_the_list_says() -> None:
    """Catches cached tokens charged as plain input, or on top of it."""
    mix = Mix(input_tokens=10_000, output_tokens=1_000, cached_tokens=8_000)
    line = compare(mix, SNAPSHOT, models=["anthropic:claude-3-5-sonnet"]).models[0]
    # Per million: $3 input, $0.30 cached, $15 output; 2 M plain, 8 M cached, 1 M out.
    assert line.cost_usd == pytest.approx(2 * 3 + 8 * 0.30 + 1 * 15)


def test_the_published_models_stand_beside_what_they_compute_to() -> None:
    """Catches a published figure that slips into a sum, and a local model shown as if it were free."""
    shown = {line.model: line for line in compare(Mix(), SNAPSHOT).models}
    assert list(shown) == list(DEFAULT_MODELS)
    assert {name: shown[name].published_usd for name in PUBLISHED_USD} == {
        "anthropic:claude-3-5-sonnet": 80.0,
        "openrouter:meta-llama/llama-3.1-8b-instruct": 0.3,
        "openrouter:deepseek/deepseek-chat": 0.5,
        "openrouter:google/gemini-2.5-flash": 1.0,
        "onnx:phi-4": 0.0,
    }
    assert shown["anthropic:claude-3-5-sonnet"].cost_usd == pytest.approx(10 * 3 + 3.333 * 15)
    assert shown["onnx:phi-4"].cost_usd == 0.0
    assert shown["onnx:phi-4"].notes == ("runs on your machine, which is not counted",)
    assert shown[f"anthropic:{ANTHROPIC_DEFAULT}"].published_usd is None
    assert costs(PriceList({"onnx:phi-4": (0.1, 0.0)}))["onnx:phi-4"] == pytest.approx(1.0)


def test_no_mix_gives_the_published_figures() -> None:
    """Catches a snapshot in which the claim of note and guide, that no mix fits, is no longer true."""
    reference = "anthropic:claude-3-5-sonnet"
    dear = SNAPSHOT.rates(*reference.split(":", 1))
    assert dear is not None
    for name in set(PUBLISHED_USD) - {reference, "onnx:phi-4"}:
        cheap = SNAPSHOT.rates(*name.split(":", 1))
        assert cheap is not None
        # The ratio of two sums lies between the least and the greatest ratio of their terms.
        greatest = max(
            getattr(dear.tiers[0], rate) / getattr(cheap.tiers[0], rate)
            for rate in ("input", "output", "cache_read", "cache_write")
        )
        assert greatest < PUBLISHED_USD[reference] / PUBLISHED_USD[name], name


def test_the_guide_gives_the_sums_of_today() -> None:
    """Catches a figure of the guide that the pinned snapshot no longer gives."""
    page = GUIDE.read_text("utf-8")
    for name, cost in costs().items():
        if name in PUBLISHED_USD:
            published = f"${PUBLISHED_USD[name]:.2f}"
            computed = "no price" if cost is None else f"${cost:.4f}"
            assert f"| `{name}` | {computed} | {published} |" in page


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"input_tokens": 0}, "input tokens 0"),
        ({"input_tokens": -1}, "input tokens -1"),
        ({"input_tokens": TOKENS_MAX + 1}, str(TOKENS_MAX + 1)),
        ({"output_tokens": 0}, "output tokens 0"),
        ({"output_tokens": 10**30}, str(10**30)),
        ({"cached_tokens": -1}, "cached tokens -1"),
        ({"input_tokens": 10, "cached_tokens": 11}, "11 are more than the input tokens 10"),
        ({"tasks": 0}, "tasks 0"),
        ({"tasks": TASKS_MAX + 1}, str(TASKS_MAX + 1)),
    ],
)
def test_counts_out_of_bounds_are_refused(wrong: dict[str, Any], told: str) -> None:
    """Catches a mix that cannot be, priced as if it could."""
    with pytest.raises(InvalidInput) as refused:
        compare(Mix(**wrong), SNAPSHOT)
    assert told in refused.value.message


@pytest.mark.parametrize("name", ["openai:qwen3", "nobody:nothing", "anthropic:claude-3-5-sonnnet"])
def test_a_model_without_a_price_is_refused_by_name(name: str) -> None:
    """Catches an unknown price that is passed over when the model was asked for."""
    with pytest.raises(UnknownModel) as refused:
        compare(Mix(), SNAPSHOT, models=["anthropic:claude-3-5-sonnet", name])
    assert repr(name) in refused.value.message
    assert name in (refused.value.hint or "")


@pytest.mark.parametrize("name", ["", ":", "gpt-5.5", ":gpt-5.5", "google:"])
def test_a_name_without_its_provider_is_refused(name: str) -> None:
    """Catches a guess at whose price was meant, and a prefix that stands for a model it does not name."""
    with pytest.raises(InvalidInput) as refused:
        compare(Mix(), SNAPSHOT, models=[name])
    assert repr(name) in refused.value.message


def test_names_mean_what_they_mean_elsewhere_and_are_shown_once() -> None:
    """Catches short names that are not understood here, and one model on two lines."""
    names = ["sonnet", "anthropic:", "claude:claude-sonnet-5-5", "extractive", "extractive:"]
    found = compare(Mix(), SNAPSHOT, models=names).models
    assert [line.model for line in found] == ["anthropic:claude-sonnet-5-5", "extractive:extractive"]
    assert found[1].cost_usd == 0.0


def test_what_weakens_a_sum_is_noted() -> None:
    """Catches a price taken from another model's entry, a deprecated one, or an impossible call, unsaid."""
    found = compare(
        Mix(input_tokens=1_000_000, output_tokens=1_000),
        SNAPSHOT,
        models=["anthropic:claude-3-5-sonnet-20241022", "google:gemini-2.5-flash-preview"],
    ).models
    assert found[0].notes == (
        "priced as claude-3-5-sonnet",
        "such a task does not fit its context of 200000 tokens",
    )
    assert found[1].notes == ("deprecated in the snapshot",)
    assert found[1].cost_usd == pytest.approx(1000 * 0.15 + 1 * 0.60)


def test_the_address_tells_whose_prices_hold() -> None:
    """Catches OpenAI's prices for a model that a server on this machine answers."""
    local = {"openai": "http://127.0.0.1:11434/v1"}
    assert compare(Mix(), SNAPSHOT, models=["openai:gpt-5.5"]).models[0].cost_usd
    with pytest.raises(UnknownModel):
        compare(Mix(), SNAPSHOT, models=["openai:gpt-5.5"], base_urls=local)
    shown = {line.model: line.cost_usd for line in compare(Mix(), SNAPSHOT, base_urls=local).models}
    assert shown["openai:gpt-6.1-sol"] is None


@settings(deadline=None)
@given(st.data())
def test_any_mix_is_priced_in_proportion(data: st.DataObject) -> None:
    """Catches a sum that is not tasks x tokens x rate somewhere within the bounds."""
    input_tokens = data.draw(st.integers(1, TOKENS_MAX))
    mix = Mix(
        input_tokens=input_tokens,
        output_tokens=data.draw(st.integers(1, TOKENS_MAX)),
        cached_tokens=data.draw(st.integers(0, input_tokens)),
        tasks=data.draw(st.integers(1, TASKS_MAX)),
    )
    line = compare(mix, PriceList({"openai:mine": (1.0, 3.0)}), models=["openai:mine"]).models[0]
    expected = mix.tasks * (mix.input_tokens + 3 * mix.output_tokens) / 1e6
    assert line.cost_usd == pytest.approx(expected, rel=1e-9, abs=1e-9)
