"""How good a namespace's index is on the user's own data: its recall and latency against exact search.

Queries are the stored vectors of items drawn at random from the whole namespace. The item itself is left out
of both answers: everything finds an item by its own vector. A hit counts when it is among the true k, or as
close as the last of them, for equals may come in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentic_flow.agentdb.paging import Progress, find_namespace, no_progress, sample_items
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Filter, Hit, IndexTier, Item, SearchQuery

K_MAX = 999
SAMPLES_MAX = 10_000
_SCORE_TOLERANCE = 1e-6
"""Relative; float32 gives 7 digits, and both searches add in another order."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of single searches as the caller sees them, in milliseconds."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class RecallReport:
    """What a check found. `recall` is the mean over the samples, `recall_min` that of the worst one.

    `short` counts the samples for which the index gave fewer hits than exact search.
    """

    namespace: str
    items: int
    samples: int
    k: int
    tier: IndexTier
    recall: float
    recall_min: float
    short: int
    index: Latency
    exact: Latency


async def check_recall(
    store: VectorStore,
    tenant: str,
    namespace: str,
    *,
    samples: int = 100,
    k: int = 10,
    where: Filter | None = None,
    ef: int | None = None,
    seed: int = 0,
    clock: Clock = SYSTEM_CLOCK,
    progress: Progress = no_progress,
) -> RecallReport:
    """Search with the vectors of random items, by the index and exactly, and compare.

    One search of each kind goes before those that are timed, so that loading an index is not counted.

    Args:
        where: Filter of all searches; the queries are drawn from the whole namespace all the same.
        ef: As in SearchQuery; the store's by default.
        progress: In samples.

    Raises:
        NotFound: there is no such namespace.
        InvalidInput: it is empty, nothing passes the filter, or a number is out of range.
    """
    if not 1 <= k <= K_MAX or not 1 <= samples <= SAMPLES_MAX:
        raise InvalidInput(
            f"k {k!r} or samples {samples!r} is out of range",
            hint=f"k up to {K_MAX}, samples up to {SAMPLES_MAX}",
        )
    found = await find_namespace(store, tenant, namespace)
    chosen, items = await sample_items(store, tenant, found, samples, seed=seed)
    if not chosen:
        raise InvalidInput(f"namespace {namespace!r} is empty", hint="there is nothing to check yet")
    run = _Check(store, tenant, namespace, k, where, ef, clock)
    await run.both(chosen[0])
    recalls: list[float] = []
    short = 0
    run.forget_times()
    for number, item in enumerate(chosen, start=1):
        by_index, truth = await run.both(item)
        if truth:
            recalls.append(recall(by_index, truth))
            short += len(by_index) < len(truth)
        progress(number, len(chosen))
    if not recalls:
        raise InvalidInput("nothing passes the filter", hint="there is nothing to find, and so no recall")
    return RecallReport(
        namespace=namespace,
        items=items,
        samples=len(recalls),
        k=k,
        tier=run.tier,
        recall=sum(recalls) / len(recalls),
        recall_min=min(recalls),
        short=short,
        index=latency(run.index_s),
        exact=latency(run.exact_s),
    )


class _Check:
    """Both kinds of search, and how long they took."""

    def __init__(
        self,
        store: VectorStore,
        tenant: str,
        namespace: str,
        k: int,
        where: Filter | None,
        ef: int | None,
        clock: Clock,
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._namespace = namespace
        self._k = k
        self._where = where
        self._ef = ef
        self._clock = clock
        self.tier: IndexTier = "exact"
        self.index_s: list[float] = []
        self.exact_s: list[float] = []

    def forget_times(self) -> None:
        """Start timing anew."""
        self.index_s.clear()
        self.exact_s.clear()

    async def both(self, item: Item) -> tuple[list[Hit], list[Hit]]:
        """The k nearest of the item by the index, and the true ones."""
        by_index = await self._search(item, exact=False, times=self.index_s)
        return by_index, await self._search(item, exact=True, times=self.exact_s)

    async def _search(self, item: Item, *, exact: bool, times: list[float]) -> list[Hit]:
        query = SearchQuery(
            vector=item.vector,
            k=self._k + 1,
            mode="vector",
            filter=self._where,
            exact=exact,
            ef=None if exact else self._ef,
        )
        began_s = self._clock.monotonic_s()
        result = await self._store.search(self._tenant, self._namespace, query)
        times.append(self._clock.monotonic_s() - began_s)
        if not exact:
            self.tier = result.tier
        return [hit for hit in result.hits if hit.item.id != item.id][: self._k]


def recall(by_index: Sequence[Hit], truth: Sequence[Hit]) -> float:
    """The share of the true hits that the index has, where equals of the last one count as it."""
    ids = {hit.item.id for hit in truth}
    last = min(hit.score for hit in truth)
    least = last - _SCORE_TOLERANCE * max(1.0, abs(last))
    right = sum(hit.item.id in ids or hit.score >= least for hit in by_index)
    return min(1.0, right / len(truth))


def latency(times_s: Sequence[float]) -> Latency:
    """Median and 95th percentile of some times."""
    p50, p95 = np.percentile(np.array(times_s), [50, 95]) * 1000
    return Latency(float(p50), float(p95))
