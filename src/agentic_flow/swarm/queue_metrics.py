"""How the shared queues stand, as Prometheus gauges: what workers are scaled by."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.ports import QueueDepth

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

REFRESH_S = 2.0
QUEUES_MAX = 256
"""Queues with series of their own; those where most waits come first."""


class QueueMetrics(Collector):
    """Figures of the last look, so that a scrape never waits for the database.

    A look that fails keeps the figures before it, and says so: `agentic_flow_queue_read_failures` grows.

    Args:
        read: Looks.
        always: Queues that are shown also when nothing is in them.
    """

    def __init__(self, read: Callable[[], Awaitable[Sequence[QueueDepth]]], always: Sequence[str]) -> None:
        self._read = read
        self._always = tuple(always)
        self._depths: Sequence[QueueDepth] | None = None
        self._failures = 0

    async def keep_fresh(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            try:
                self._depths = await self._read()
            except AgenticFlowError as error:
                self._failures += 1
                log.warning("queue_metrics_failed", error=error.message)
            await asyncio.sleep(REFRESH_S)

    def describe(self) -> list[Metric]:
        """Nothing: the series are known when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        failures = GaugeMetricFamily(
            "agentic_flow_queue_read_failures", "Looks at the queues that failed since the start."
        )
        failures.add_metric((), self._failures)
        yield failures
        if self._depths is None:
            return
        found = {depth.queue: depth for depth in self._depths}
        empty = [QueueDepth(name, 0, 0.0, 0, 0) for name in self._always if name not in found]
        shown = sorted(found.values(), key=lambda one: -one.waiting)[:QUEUES_MAX] + empty
        waiting = _gauge("waiting_runs", "Runs that wait for a worker.")
        oldest = _gauge("oldest_wait_seconds", "Since when the oldest of them waits.")
        delayed = _gauge("delayed_runs", "Runs that may not begin yet.")
        running = _gauge("running_runs", "Unfinished runs that workers have taken.")
        for depth in shown:
            labels = (depth.queue,)
            waiting.add_metric(labels, depth.waiting)
            oldest.add_metric(labels, depth.oldest_s)
            delayed.add_metric(labels, depth.delayed)
            running.add_metric(labels, depth.running)
        yield from (waiting, oldest, delayed, running)


def _gauge(name: str, about: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"agentic_flow_queue_{name}", about, labels=("queue",))
