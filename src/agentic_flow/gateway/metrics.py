"""What the gateway measures: Prometheus metrics, and OpenTelemetry's for generative AI.

Labels are of bounded cardinality: a model gets a series of its own after a call that went well, as long as
there is room; other names, which callers can make up, share `other`. Callers are no labels (tenants are named
only by the rules of budgets): the usage ledger answers for them.

OpenTelemetry's API costs next to nothing until export is set up; then its SDK takes about ten microseconds
for each value, of which a call has three or four.

Source of the OpenTelemetry names and buckets: semantic conventions for generative AI, "metrics".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import structlog
from opentelemetry import metrics as otel
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentic_flow.core.errors import ROWS
from agentic_flow.core.histogram import BatchHistogram
from agentic_flow.gateway.policies import BudgetRule
from agentic_flow.gateway.usage import UsageRecord

_log = structlog.get_logger(__name__)

OTHER, NONE = "other", "none"
MODELS_MAX = 64
"""Models, over all providers, with series of their own."""
_BOUND_MAX = 4096
_UNSHOWN_MAX = 256
BREAKERS_MAX, BUDGETS_MAX = 256, 256
"""Most series of each; circuits that are not closed and budgets with the least left come first."""
NANO = 1_000_000_000

_LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
)  # fmt: skip
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
_OTEL_DURATION_S = tuple(0.01 * 2**power for power in range(14))
_OTEL_TOKENS = tuple(4**power for power in range(14))
_OTEL_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip

_STATE_NUMBERS = {"closed": 0, "half_open": 1, "open": 2}
_LIMITED = frozenset({"rate_limited", "budget_exceeded", "limit_exceeded"})
_UNAVAILABLE = frozenset({"unavailable", "circuit_open", "storage_full", "deadline_exceeded"})


class BreakerView(Protocol):
    """One circuit breaker: closed, half_open or open."""

    @property
    def provider(self) -> str: ...
    @property
    def key_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def state(self) -> str: ...


class BudgetView(Protocol):
    """One account of a budget rule in its current period; `budgets.BudgetState` is one."""

    @property
    def rule(self) -> BudgetRule: ...
    @property
    def left_nano(self) -> int: ...


class LedgerView(Protocol):
    """What the usage ledger says of itself."""

    @property
    def lost(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class _Bound:
    """The series of one combination of labels, looked up once, and what they do not show yet.

    A series of the client library takes a lock and two microseconds for each value; a sum here takes next to
    none, and is carried over when somebody looks, or `_UNSHOWN_MAX` calls have come.
    """

    __slots__ = (
        "cache_hits", "calls", "cost_nano", "durations_s", "first_tokens_s", "otel", "otel_input",
        "otel_output", "retries", "series", "tokens", "unpriced",
    )  # fmt: skip

    def __init__(self, series: _Series, otel_labels: dict[str, str], error: str | None) -> None:
        self.series = series
        self.otel = otel_labels if error is None else {**otel_labels, "error.type": error}
        self.otel_input = {**otel_labels, "gen_ai.token.type": "input"}
        self.otel_output = {**otel_labels, "gen_ai.token.type": "output"}
        self._empty()

    def _empty(self) -> None:
        self.calls = self.cost_nano = self.unpriced = self.cache_hits = self.retries = 0
        self.durations_s: list[float] = []
        self.first_tokens_s: list[float] = []
        self.tokens = [0, 0, 0, 0, 0]

    def show(self) -> None:
        """Carry over what the series do not show yet."""
        if not self.calls:
            return
        series = self.series
        series.calls(self.calls)
        for duration_s in self.durations_s:
            series.duration(duration_s)
        for first_token_s in self.first_tokens_s:
            series.first_token(first_token_s)
        for count, tokens in zip(series.tokens, self.tokens, strict=True):
            if tokens:
                count(tokens)
        for add, amount in (
            (series.cost, self.cost_nano / NANO),
            (series.unpriced, self.unpriced),
            (series.cache_hits, self.cache_hits),
            (series.retries, self.retries),
        ):
            if amount:
                add(amount)
        self._empty()


class _Series(NamedTuple):
    """What counts in the series of one combination of labels."""

    calls: Callable[[float], None]
    duration: Callable[[float], None]
    first_token: Callable[[float], None]
    tokens: tuple[Callable[[float], None], ...]
    cost: Callable[[float], None]
    unpriced: Callable[[float], None]
    cache_hits: Callable[[float], None]
    retries: Callable[[float], None]


_TOKEN_KINDS = ("input", "output", "cache_read", "cache_write", "reasoning")


class GatewayMetrics:
    """Metrics of the calls, in a registry for `/metrics` and through OpenTelemetry's API.

    Args:
        registry: Where they are registered; None makes one of its own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._models: set[tuple[str, str]] = set()
        self._bound: dict[tuple[str, str, str, str], _Bound] = {}
        # The first collector that a look at the registry asks: those after it then have everything.
        self.registry.register(_Unshown(self._bound))
        self._make_series()
        self._make_otel()
        self._live = _LiveCollector()
        self.registry.register(self._live)

    def _make_series(self) -> None:
        model = ("provider", "model")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"agentic_flow_gateway_{name}", text, (*model, *labels), registry=self.registry)

        self._calls = counter("calls", "Model calls that ended, by how.", "wire", "status")
        self._tokens = counter(
            "tokens", "Tokens; input includes the cache's, output includes reasoning.", "kind"
        )
        self._cost = counter("cost_usd", "Known cost of calls in US dollars.")
        self._unpriced = counter("unpriced_calls", "Calls whose cost is not known.")
        self._cache_hits = counter("cache_hits", "Calls that the response cache answered.")
        self._retries = counter("retries", "Calls to providers beyond the first of each request.")
        self._duration = BatchHistogram(
            "agentic_flow_gateway_call_duration_seconds",
            "Time from a request to the end of its answer.",
            (*model, "status"),
            registry=self.registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self._first_token = BatchHistogram(
            "agentic_flow_gateway_first_token_seconds",
            "Time from a request to the first piece of its streamed answer.",
            model,
            registry=self.registry,
            buckets=_FIRST_TOKEN_BUCKETS_S,
        )

    def _make_otel(self) -> None:
        meter = otel.get_meter("agentic_flow.gateway")
        self._otel_duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_OTEL_DURATION_S,
        )
        self._otel_tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_OTEL_TOKENS,
        )
        self._otel_first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="Time to generate first token for successful responses.",
            explicit_bucket_boundaries_advisory=_OTEL_FIRST_TOKEN_S,
        )

    def observe(self, record: UsageRecord) -> None:
        """Count a call that has ended. Some microseconds; no lock is held for long."""
        bound = self._bound.get((record.provider, record.model, record.wire, record.status))
        if bound is None:
            bound = self._bind(record)
        bound.calls += 1
        bound.durations_s.append(record.latency_s)
        first_token_s = record.first_token_s
        answered = record.status == "ok"
        if answered and first_token_s is not None:
            bound.first_tokens_s.append(first_token_s)
        tokens = bound.tokens
        tokens[0] += record.input_tokens
        tokens[1] += record.output_tokens
        if record.cache_read_tokens or record.cache_write_tokens or record.reasoning_tokens:
            tokens[2] += record.cache_read_tokens
            tokens[3] += record.cache_write_tokens
            tokens[4] += record.reasoning_tokens
        if record.cost_nano_usd is None:
            bound.unpriced += 1
        else:
            bound.cost_nano += record.cost_nano_usd
        if record.tries > 1:
            bound.retries += record.tries - 1
        if record.cached:
            bound.cache_hits += 1
        if bound.calls >= _UNSHOWN_MAX:
            bound.show()
        if record.cached:
            # Of a cached answer no provider was asked, so nothing of the client metrics below happened.
            return
        self._otel_duration.record(record.latency_s, bound.otel)
        if answered:
            self._otel_tokens.record(record.input_tokens, bound.otel_input)
            self._otel_tokens.record(record.output_tokens, bound.otel_output)
            if first_token_s is not None:
                self._otel_first_token.record(first_token_s, bound.otel)

    def _bind(self, record: UsageRecord) -> _Bound:
        """The series of a record's labels, remembered when they are its own."""
        provider, model, wire, status = (
            record.provider or NONE,
            record.model or NONE,
            record.wire,
            record.status,
        )
        own = self._has_series(record)
        if not own:
            if (provider, OTHER) not in self._models and len(self._models) >= 2 * MODELS_MAX:
                provider = OTHER
            self._models.add((provider, OTHER))
            model = OTHER
            known = self._bound.get((provider, model, wire, status))
            if known is not None:
                return known
        bound = self._series(provider, model, wire, status)
        if len(self._bound) >= _BOUND_MAX:
            for known in self._bound.values():
                known.show()
            self._bound.clear()  # they are looked up again; the series themselves stay
        if own:
            self._bound[record.provider, record.model, record.wire, record.status] = bound
        else:
            self._bound[provider, model, wire, status] = bound
        return bound

    def _has_series(self, record: UsageRecord) -> bool:
        name = (record.provider, record.model)
        if name in self._models or record.model == "":
            return True
        if record.status != "ok" or sum(model != OTHER for _, model in self._models) >= MODELS_MAX:
            return False
        self._models.add(name)
        return True

    def _series(self, provider: str, model: str, wire: str, status: str) -> _Bound:
        kind = status_class(status)
        series = _Series(
            calls=self._calls.labels(provider, model, wire, kind).inc,
            duration=self._duration.labels(provider, model, kind).observe,
            first_token=self._first_token.labels(provider, model).observe,
            tokens=tuple(self._tokens.labels(provider, model, token).inc for token in _TOKEN_KINDS),
            cost=self._cost.labels(provider, model).inc,
            unpriced=self._unpriced.labels(provider, model).inc,
            cache_hits=self._cache_hits.labels(provider, model).inc,
            retries=self._retries.labels(provider, model).inc,
        )
        labels = {
            "gen_ai.operation.name": "embeddings" if "embeddings" in wire else "chat",
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
        }
        return _Bound(series, labels, None if status == "ok" else status)

    # Gauges, asked when somebody looks

    def set_breakers(self, callback: Callable[[], Iterable[BreakerView]]) -> None:
        """Show the circuit breakers that this gives."""
        self._live.sources["breakers"] = lambda: _breakers(callback())

    def set_budgets(self, callback: Callable[[], Iterable[BudgetView]]) -> None:
        """Show what is left of the budgets that this gives."""
        self._live.sources["budgets"] = lambda: _budgets(callback())

    def set_calls(self, callback: Callable[[], tuple[int, int]]) -> None:
        """Show how many calls are under way, and how many wait for their turn."""
        self._live.sources["calls"] = lambda: _calls(*callback())

    def set_ledger(self, ledger: LedgerView) -> None:
        """Show what the usage ledger lost, and what it has not written yet."""
        self._live.sources["ledger"] = lambda: _ledger(ledger)


class _Unshown(Collector):
    """No metrics of its own: what was counted since the last look is carried over to its series."""

    def __init__(self, bound: dict[tuple[str, str, str, str], _Bound]) -> None:
        self._bound = bound

    def collect(self) -> Iterator[Metric]:
        for bound in list(self._bound.values()):
            bound.show()
        return iter(())


class _LiveCollector(Collector):
    """Metrics whose values are asked for at each scrape."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], Iterable[Metric]]] = {}

    def collect(self) -> Iterator[Metric]:
        for name, source in list(self.sources.items()):
            try:
                found = list(source())
            except Exception:  # noqa: BLE001 - one broken source must not hide the other metrics
                _log.exception("metrics_source_failed", source=name)
                continue
            yield from found


def _breakers(views: Iterable[BreakerView]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "agentic_flow_gateway_breaker_state",
        "Circuit breaker of a provider's key and model: 0 closed, 1 half open, 2 open.",
        labels=("provider", "key", "model"),
    )
    counts = GaugeMetricFamily(
        "agentic_flow_gateway_breakers", "Circuit breakers in each state.", labels=("provider", "state")
    )
    by_state: dict[tuple[str, str], int] = {}
    listed = sorted(views, key=lambda view: view.state == "closed")
    for view in listed:
        place = (view.provider, view.state)
        by_state[place] = by_state.get(place, 0) + 1
    for view in islice(listed, BREAKERS_MAX):
        family.add_metric((view.provider, view.key_id, view.model), _STATE_NUMBERS[view.state])
    for place, count in by_state.items():
        counts.add_metric(place, count)
    yield family
    yield counts


def _budgets(views: Iterable[BudgetView]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "agentic_flow_gateway_budget_left_usd",
        "What is left of a budget in its period, in US dollars; of a rule for each (`*`), the least.",
        labels=("scope", "name", "tenant", "period"),
    )
    least: dict[tuple[str, str, str, str], int] = {}
    for view in views:
        rule = view.rule
        labels = (rule.scope, rule.name, rule.tenant or "", rule.period)
        least[labels] = min(least.get(labels, view.left_nano), view.left_nano)
    for labels, left in islice(sorted(least.items(), key=lambda item: item[1]), BUDGETS_MAX):
        family.add_metric(labels, left / NANO)
    yield family


def _calls(inside: int, waiting: int) -> Iterator[Metric]:
    for name, text, value in (
        ("inside", "Calls under way.", inside),
        ("waiting", "Calls that wait for their turn.", waiting),
    ):
        yield GaugeMetricFamily(f"agentic_flow_gateway_calls_{name}", text, value=value)


def _ledger(ledger: LedgerView) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "agentic_flow_gateway_usage_records_lost", "Usage records that could not be kept.", value=ledger.lost
    )
    yield GaugeMetricFamily(
        "agentic_flow_gateway_usage_records_waiting", "Usage records not written yet.", value=ledger.waiting
    )


def status_class(status: str) -> str:
    """How a call ended, in few words: ok, cancelled, limited, refused, unavailable, provider_error or failed.

    Args:
        status: `ok`, `cancelled`, or an error's code.
    """
    if status in ("ok", "cancelled"):
        return status
    if status in _LIMITED:
        return "limited"
    if status in _UNAVAILABLE:
        return "unavailable"
    if status.startswith("provider_"):
        return "provider_error"
    return "refused" if status in ROWS and ROWS[status].status < 500 else "failed"
