"""The gateway's metrics as a scraper and an OpenTelemetry collector read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from agentic_flow.core.errors import ROWS
from agentic_flow.gateway import metrics as module
from agentic_flow.gateway.metrics import BREAKERS_MAX, MODELS_MAX, GatewayMetrics, status_class
from agentic_flow.gateway.policies import BudgetRule
from agentic_flow.gateway.usage import UsageRecord
from usage_records import record, records

PREFIX = "agentic_flow_gateway_"
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: GatewayMetrics) -> Series:
    """Every sample of the exposition, by name and labels."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(series: Series, name: str, /, **labels: str) -> float:
    """The sum of the samples with this name and these labels."""
    found = [
        v for (n, pairs), v in series.items() if n == PREFIX + name and labels.items() <= dict(pairs).items()
    ]
    assert found, (name, labels, sorted({n for n, _ in series}))
    return sum(found)


def test_a_call_shows_in_every_series_it_belongs_to() -> None:
    """Catches a number that is counted under a wrong name, label or unit."""
    metrics = GatewayMetrics()
    metrics.observe(record())
    metrics.observe(record(cost_nano_usd=None, tries=3, cached=True, first_token_s=None))
    metrics.observe(record(status="rate_limited", cost_nano_usd=0, input_tokens=0, latency_s=7.0))
    series = scrape(metrics)
    here = {"provider": "openai", "model": "gpt-5-mini"}
    assert value(series, "calls_total", **here, wire="openai_chat", status="ok") == 2
    assert value(series, "calls_total", **here, status="limited") == 1
    assert value(series, "tokens_total", **here, kind="input") == 2000
    assert value(series, "tokens_total", **here, kind="cache_read") == 300
    assert value(series, "cost_usd_total", **here) == pytest.approx(0.00065)
    assert value(series, "unpriced_calls_total", **here) == 1
    assert value(series, "retries_total", **here) == 2
    assert value(series, "cache_hits_total", **here) == 1
    assert value(series, "call_duration_seconds_bucket", status="ok", le="0.5") == 0
    assert value(series, "call_duration_seconds_bucket", status="ok", le="1.0") == 2
    assert value(series, "call_duration_seconds_sum", status="limited") == 7.0
    assert value(series, "first_token_seconds_count", **here) == 1
    assert not any("tenant" in dict(pairs) or "key" in dict(pairs) for _, pairs in series)


@settings(max_examples=50)
@given(st.lists(records(), max_size=40))
def test_counters_equal_the_sums_of_the_records(given_records: list[UsageRecord]) -> None:
    """Catches calls that are dropped or counted twice when their labels are met again."""
    metrics = GatewayMetrics()
    for one in given_records:
        metrics.observe(one)
    series = scrape(metrics)

    def total(name: str, **labels: str) -> float:
        return sum(
            v
            for (n, pairs), v in series.items()
            if n == PREFIX + name and labels.items() <= dict(pairs).items()
        )

    assert total("calls_total") == len(given_records)
    assert total("calls_total", status="ok") == sum(r.status == "ok" for r in given_records)
    assert total("tokens_total", kind="output") == sum(r.output_tokens for r in given_records)
    assert total("cost_usd_total") == pytest.approx(sum(r.cost_nano_usd or 0 for r in given_records) / 1e9)
    assert total("cache_hits_total") == sum(r.cached for r in given_records)
    assert total("call_duration_seconds_count") == len(given_records)


def test_names_made_up_by_callers_make_no_series() -> None:
    """Catches a scrape that grows with whatever callers ask for."""
    metrics = GatewayMetrics()
    metrics.observe(record(model="known"))
    for number in range(500):
        metrics.observe(record(model=f"junk-{number}", status="provider_rejected"))
    assert value(scrape(metrics), "calls_total", model="other") == 500
    for number in range(500):
        metrics.observe(record(model=f"real-{number}"))
    series = scrape(metrics)
    models = {dict(pairs).get("model") for _, pairs in series} - {None}
    assert len(models) == MODELS_MAX + 1
    assert {"known", "other", "real-0"} <= models
    assert value(series, "calls_total") == 1001
    assert len(metrics._bound) <= module._BOUND_MAX


def test_refusals_before_a_provider_are_counted() -> None:
    """Catches calls that were refused at the door and appear nowhere."""
    metrics = GatewayMetrics()
    metrics.observe(record(provider="", model="", status="budget_exceeded", cost_nano_usd=0, tries=0))
    assert value(scrape(metrics), "calls_total", provider="none", model="none", status="limited") == 1


def test_every_error_has_a_class() -> None:
    """Catches an error code that would be counted as a success, or whose class says nothing."""
    classes = {code: status_class(code) for code in ROWS}
    assert set(classes.values()) == {
        "cancelled", "limited", "unavailable", "provider_error", "refused", "failed",
    }  # fmt: skip
    assert classes["unknown_model"] == "refused"
    assert classes["internal"] == status_class("of a plug-in") == "failed"
    assert status_class("ok") == "ok"


class Breaker(NamedTuple):
    provider: str
    key_id: str
    model: str
    state: str


class Budget(NamedTuple):
    rule: BudgetRule
    left_nano: int


class Ledger(NamedTuple):
    lost: int
    waiting: int


def test_gauges_are_asked_at_each_scrape() -> None:
    """Catches gauges frozen at their first value, and states under the wrong number."""
    metrics = GatewayMetrics(CollectorRegistry())
    breakers = [Breaker("openai", "key-1", "a", "closed"), Breaker("openai", "key-2", "a", "open")]
    inside = [3, 1]
    metrics.set_breakers(lambda: breakers)
    each = BudgetRule(scope="tenant", limit_usd=10)
    one = BudgetRule(scope="key", name="key-1", tenant="team-a", limit_usd=10, period="day")
    metrics.set_budgets(lambda: [Budget(each, 5_000_000_000), Budget(each, 2), Budget(one, 10**9)])
    metrics.set_calls(lambda: (inside[0], inside[1]))
    metrics.set_ledger(Ledger(7, 9))
    series = scrape(metrics)
    assert value(series, "breaker_state", key="key-1") == 0
    assert value(series, "breaker_state", key="key-2") == 2
    assert value(series, "breakers", provider="openai", state="open") == 1
    assert value(series, "budget_left_usd", scope="tenant", name="*") == pytest.approx(2e-9)
    assert value(series, "budget_left_usd", scope="key", tenant="team-a", period="day") == 1.0
    assert (value(series, "calls_inside"), value(series, "calls_waiting")) == (3, 1)
    assert value(series, "usage_records_lost_total") == 7
    assert value(series, "usage_records_waiting") == 9
    breakers[1] = breakers[1]._replace(state="half_open")
    inside[0] = 0
    series = scrape(metrics)
    assert value(series, "breaker_state", key="key-2") == 1
    assert value(series, "calls_inside") == 0


def test_many_circuits_show_the_open_ones() -> None:
    """Catches a bound that hides the circuits somebody is looking for."""
    metrics = GatewayMetrics()
    closed = [Breaker("openai", "k", f"m{number}", "closed") for number in range(1000)]
    metrics.set_breakers(lambda: [*closed, Breaker("openai", "k", "broken", "open")])
    series = scrape(metrics)
    assert value(series, "breaker_state", model="broken") == 2
    assert sum(name == PREFIX + "breaker_state" for name, _ in series) == BREAKERS_MAX
    assert value(series, "breakers", state="closed") == 1000


def test_a_broken_source_does_not_hide_the_rest() -> None:
    """Catches a scrape that fails as a whole, or keeps silent about what it could not ask."""
    metrics = GatewayMetrics()
    metrics.observe(record())
    metrics.set_breakers(lambda: [Breaker("openai", "k", "m", "burst")])
    metrics.set_calls(lambda: (1, 2))
    with capture_logs() as logs:
        series = scrape(metrics)
    assert value(series, "calls_inside") == 1
    assert value(series, "calls_total") == 1
    assert [entry["source"] for entry in logs] == ["breakers"]


def test_opentelemetry_gets_the_conventions_metrics() -> None:
    """Catches a name, unit or attribute that a dashboard for the conventions would not find, and calls of the
    cache counted as calls to a provider."""
    # In a process of its own: the meter provider of a process is set once.
    program = """
import sys
from opentelemetry import metrics as otel
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from agentic_flow.gateway.metrics import GatewayMetrics
from usage_records import record
metrics = GatewayMetrics()  # before the provider is set: as the platform may be built
reader = InMemoryMetricReader()
otel.set_meter_provider(MeterProvider([reader]))
metrics.observe(record())
metrics.observe(record(cached=True))
metrics.observe(record(status="provider_failed", first_token_s=None))
for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    for point in metric.data.data_points:
        labels = dict(point.attributes)
        assert labels.pop("gen_ai.provider.name") == "openai"
        labels = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
        print(metric.name, metric.unit, labels, point.count, point.sum)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    chat = "gen_ai.operation.name=chat,gen_ai.request.model=gpt-5-mini"
    assert sorted(done.stdout.splitlines()) == [
        f"gen_ai.client.operation.duration s error.type=provider_failed,{chat} 1 0.8",
        f"gen_ai.client.operation.duration s {chat} 1 0.8",
        f"gen_ai.client.token.usage {{token}} {chat},gen_ai.token.type=input 1 1000",
        f"gen_ai.client.token.usage {{token}} {chat},gen_ai.token.type=output 1 200",
        f"gen_ai.server.time_to_first_token s {chat} 1 0.3",
    ]
