"""Prices, model names and error mapping as pure functions."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import (
    ProviderFailed,
    ProviderOverloaded,
    ProviderRejected,
    UnknownModel,
)
from agentic_flow.core.messages import Usage
from agentic_flow.gateway.faults import error_from_answer, retry_after_s
from agentic_flow.gateway.models import (
    ANTHROPIC_DEFAULT,
    FAMILY_NAMES,
    OPENAI_DEFAULT,
    OPENROUTER_DEFAULT,
    choose,
    default_name,
)
from agentic_flow.gateway.prices import PriceList, snapshot_date, snapshot_version
from agentic_flow.gateway.wire.format import ProviderFault

PRICES = PriceList({"own": (1.0, 2.0), "openai:own": (3.0, 4.0)})


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            ("anthropic", "claude-sonnet-5-5"),
            ("anthropic", "claude-haiku-5-5"),
            ("openai", "gpt-5.5"),
            ("openrouter", "anthropic/claude-sonnet-5.5"),
        ]
    ),
    st.integers(0, 600_000),
    st.integers(0, 300_000),
    st.integers(0, 300_000),
    st.integers(0, 100_000),
)
def test_compiled_rates_agree_with_the_package(
    model: tuple[str, str], plain: int, read: int, written: int, output: int
) -> None:
    """Catches compiled rates that differ from genai-prices' own sum, tiers and caches included."""
    from genai_prices import Usage as TheirUsage
    from genai_prices import calc_price

    total = plain + read + written
    theirs = calc_price(
        TheirUsage(
            input_tokens=total, cache_read_tokens=read, cache_write_tokens=written, output_tokens=output
        ),
        model[1],
        provider_id=model[0],
    )
    ours = PRICES.cost_usd(
        *model,
        Usage(input_tokens=total, cache_read_tokens=read, cache_write_tokens=written, output_tokens=output),
    )
    assert ours == pytest.approx(float(theirs.total_price), rel=1e-9, abs=1e-12)


def test_own_prices_win_and_unknown_is_not_free() -> None:
    """Catches an override that is ignored, and a model without a price that counts as costing nothing."""
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    assert PRICES.cost_usd("anthropic", "own", usage) == pytest.approx(3.0)
    assert PRICES.cost_usd("openai", "own", usage) == pytest.approx(7.0)
    assert PRICES.cost_usd("anthropic", "no-such-model", usage) is None
    assert PRICES.cost_usd("openai", "gpt-5.5", usage, base_url="http://127.0.0.1:11434/v1") is None
    assert PRICES.cost_usd("openai", "gpt-5.5", usage, base_url="https://api.openai.com/v1") is not None
    assert PRICES.cost_usd("extractive", "extractive", usage) == 0.0


def test_the_snapshot_is_dated() -> None:
    """Catches prices whose age nobody can tell, and a date that lies in the future."""
    assert snapshot_version().startswith("genai-prices 0.")
    assert date(2026, 1, 1) < snapshot_date() <= datetime.now(UTC).date()


def test_default_models_have_prices() -> None:
    """Catches a default model that was renamed or retired: the dated snapshot no longer knows it."""
    usage = Usage(input_tokens=1, output_tokens=1)
    defaults = [
        ("anthropic", ANTHROPIC_DEFAULT),
        ("openrouter", OPENROUTER_DEFAULT),
        ("openai", OPENAI_DEFAULT),
        *(tuple(name.split(":")) for name in FAMILY_NAMES.values()),
    ]
    assert all(PRICES.cost_usd(provider, model, usage) for provider, model in defaults)


class Named:
    def __init__(self, name: str, prefix: str, default: str | None, configured: bool) -> None:
        self.name = name
        self.default_model = default
        self.configured = configured
        self.setup_hint = f"set {name.upper()}_API_KEY"
        self._prefix = prefix

    def owns(self, model: str) -> bool:
        return model.startswith(self._prefix)


def named(*configured: str) -> dict[str, Any]:
    table = [("anthropic", "claude", "c"), ("openrouter", "x/", "r"), ("openai", "gpt", "o")]
    providers = {n: Named(n, p, d, n in configured) for n, p, d in table}
    return {**providers, "extractive": Named("extractive", "extractive", "extractive", True)}


def test_names_are_read_by_one_rule() -> None:
    """Catches a name that reaches another provider or model than it says."""
    providers = named("anthropic", "openrouter", "openai")
    assert choose("anthropic:claude-x", providers) == ("anthropic", "claude-x")
    assert choose("anthropic:", providers) == ("anthropic", "")
    assert choose("claude:", providers) == ("anthropic", "")
    assert choose("x/y:free", providers) == ("openrouter", "x/y:free")
    assert choose("openai:gpt:4", providers) == ("openai", "gpt:4")
    assert choose("extractive", providers) == ("extractive", "extractive")
    assert choose("opus", providers).provider == "anthropic"


def test_unknown_names_list_what_would_help() -> None:
    """Catches an error that leaves the reader without the variable to set or the name to correct."""
    with pytest.raises(UnknownModel) as caught:
        choose("claude-x", named("openai"))
    assert "anthropic" in caught.value.message
    assert "set ANTHROPIC_API_KEY" in (caught.value.hint or "")
    assert "configured: openai:o, extractive" in (caught.value.hint or "")
    with pytest.raises(UnknownModel) as caught:
        choose("extractiv", named())
    assert "'extractive'" in (caught.value.hint or "")


def test_the_default_is_the_first_that_can_be_asked() -> None:
    """Catches a default that needs a key which nobody gave."""
    assert default_name(None, named()) == "extractive"
    assert default_name(None, named("openai")) == "openai:o"
    assert default_name(None, named("openai", "anthropic")) == "anthropic:c"
    assert default_name("own", named("openai")) == "own"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_every_form(headers: dict[str, str], expected: float | None) -> None:
    """Catches a form of Retry-After that is not understood."""
    assert retry_after_s(headers, now_s=10.0) == expected


@settings(deadline=None)
@given(st.integers(300, 599), st.text(max_size=20), st.booleans())
def test_every_status_has_an_error(status: int, message: str, explained: bool) -> None:
    """Catches a status that raises nothing of ours, or a 4xx that is tried again."""
    error = error_from_answer(
        "p",
        "m",
        status,
        {},
        ProviderFault("t", message) if explained else None,
        key_hint="KEY",
        base_url_hint="URL",
        now_s=0.0,
        secret="hunter2",
    )
    kinds = (ProviderRejected, ProviderOverloaded, ProviderFailed, UnknownModel)
    assert isinstance(error, kinds)
    assert error.retryable == (status in (408, 409, 425, 429) or status >= 500)
    assert error.hint


SPANS = """
import asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.messages import CompletionRequest, Message, TextPart
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.service import Gateway

async def main():
    async with Gateway(GatewaySettings()) as gateway:
        request = CompletionRequest(
            model="extractive", messages=(Message(role="user", parts=(TextPart(text="hi"),)),)
        )
        await gateway.complete(request, principal=LOCAL_OWNER, deadline=Deadline.after(100))
        refused = request.model_copy(update={"output_schema": {}})
        try:
            await gateway.complete(refused, principal=LOCAL_OWNER, deadline=Deadline.after(100))
        except Exception:
            pass
        async for _ in gateway.stream(request, principal=LOCAL_OWNER, deadline=Deadline.after(100)):
            pass

asyncio.run(main())
for span in kept.get_finished_spans():
    names = ("gen_ai.provider.name", "gen_ai.usage.output_tokens", "error.type")
    print(span.name, *(span.attributes.get(name) for name in names))
"""


def test_calls_leave_spans() -> None:
    """Catches a call without its span, or a failed one that looks well. In a process of its own, because the
    tracer provider of a process can be set only once."""
    done = subprocess.run(
        [sys.executable, "-c", SPANS], capture_output=True, text=True, timeout=200, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("chat ")]
    good = "chat extractive extractive 29 None"
    assert lines == [good, "chat extractive extractive None provider_rejected", good]
