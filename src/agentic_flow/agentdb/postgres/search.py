"""One search inside one snapshot: candidates from both sides, filtered, fused, and read.

The vector side compares every row of a small namespace. A large one has a graph index (pgvector's HNSW with
iterative scan); under a filter a sample of its rows says whether walking the graph until enough rows pass is
cheaper than comparing all that pass. Where the graph gives fewer rows than asked for, all are compared: a
filter may cost time, never rows.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from psycopg import AsyncConnection

from agentic_flow.agentdb import ranking, schema
from agentic_flow.agentdb.postgres.conditions import Compiled
from agentic_flow.agentdb.postgres.connections import fetch
from agentic_flow.agentdb.postgres.encoding import folded_query
from agentic_flow.agentdb.postgres.rows import (
    ITEM_COLUMNS,
    LIVE,
    NamespaceRow,
    read_item,
    read_vector,
    sent_vector,
)
from agentic_flow.core.vectors import Hit, IndexTier, SearchQuery

CANDIDATES_MAX = 4096
"""Best full-text matches that are fused; no answer looks further down."""
VECTOR_CANDIDATES = 256
MMR_POOL_MIN = 50
SPELLING_WEIGHT = 0.25
"""Weight of a vector side that knows spelling only, beside the full-text side's 1."""

EF_MIN = 120
"""Least beam of a graph search that was not told another."""
EF_MAX = 1000
"""Most that pgvector takes; an iterative scan goes on beyond it."""
SAMPLE_ROWS = 1000
SCAN_TUPLES_MIN = 20_000
OVER_FETCH = 10
GRAPH_STEP_COST = 20
"""What visiting a row in the graph costs, in rows that a filter reads (measured: 17 µs and .9 µs)."""
GRAPH_SHARE_MIN = 0.05
"""A filter that admits less makes the walk so long that it misses some (measured: recall .987 at 1 %) …"""
GATHERED_ROWS_MAX = 20_000
"""… so up to this many rows are compared one by one instead."""

Mode = Literal["hybrid", "vector", "text"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Request:
    """A query with everything that does not need the database already done.

    Args:
        query: As it was asked.
        mode: The sides that take part.
        vector: The query's vector; None when that side takes no part.
        vector_weight: Weight of that side under fusion.
        where: The compiled filter, None without one.
        now_s: Time of the search.
    """

    query: SearchQuery
    mode: Mode
    vector: NDArray[np.float32] | None
    vector_weight: float
    where: Compiled | None
    now_s: float

    @property
    def at_s(self) -> float:
        """The time at which hits are valid."""
        return self.now_s if self.query.at_s is None else self.query.at_s

    @property
    def pool(self) -> int:
        """How many candidates of the vector side are looked at: more than `k` where they are rearranged."""
        query = self.query
        varied = query.mmr_lambda is not None and query.mmr_lambda < 1
        if self.mode == "vector" and not varied and not query.per_document:
            return query.k
        return max(VECTOR_CANDIDATES, _pool_size(query))

    def visible(self, namespace: NamespaceRow) -> Compiled:
        """The rows that this search may show."""
        where, bindings = self.where or ("true", [])
        return (
            f"i.shard = %s AND i.namespace_id = %s AND {LIVE} "
            "AND (i.valid_from_s IS NULL OR i.valid_from_s <= %s) "
            f"AND (i.valid_until_s IS NULL OR i.valid_until_s > %s) AND {where}",
            [namespace.shard, namespace.id, self.now_s, self.at_s, self.at_s, *bindings],
        )


class Found(NamedTuple):
    """Hits, best first, and what answered the vector side."""

    hits: tuple[Hit, ...]
    tier: IndexTier


class Statistics(NamedTuple):
    """Sizes that BM25 and the choice of a plan need, as of operation `sequence`."""

    sequence: int
    items: int
    item_words: float
    documents: int
    document_words: float


class StatisticsCache:
    """Statistics of recently searched namespaces: counting rows costs more than the search of a large one.

    Args:
        entries_max: Namespaces remembered.
        changed_share: They are counted anew once there were this many calls a row.
    """

    def __init__(self, entries_max: int = 10_000, changed_share: float = 0.01) -> None:
        self._entries_max = entries_max
        self._changed_share = changed_share
        self._known: OrderedDict[int, Statistics] = OrderedDict()

    async def of(self, connection: AsyncConnection, namespace: NamespaceRow) -> Statistics:
        """The namespace's, counted in this transaction or shortly before."""
        known = self._known.get(namespace.id)
        if known is not None:
            changes = abs(namespace.sequence - known.sequence)
            if changes <= self._changed_share * known.items:
                return known
        ((items, item_words, documents, document_words),) = await fetch(
            connection,
            "SELECT n.items, n.words, d.documents, d.words FROM "
            "(SELECT count(*) AS items, coalesce(sum(i.word_count), 0)::float8 AS words "
            "FROM agentic_flow.items AS i WHERE i.shard = %s AND i.namespace_id = %s) AS n, "
            "(SELECT count(*) AS documents, coalesce(sum(d.word_count), 0)::float8 AS words "
            "FROM agentic_flow.documents AS d WHERE d.namespace_id = %s) AS d",
            (namespace.shard, namespace.id, namespace.id),
        )
        counted = Statistics(namespace.sequence, items, item_words, documents, document_words)
        self._known[namespace.id] = counted
        self._known.move_to_end(namespace.id)
        if len(self._known) > self._entries_max:
            self._known.popitem(last=False)
        return counted


@dataclass(slots=True)
class _Candidates:
    """Keys, sorted, with what each side says of them; the document of each, 0 for none."""

    keys: Ints
    documents: Ints
    text: Floats | None = None
    vector: Floats | None = None
    document_scores: Floats | None = None
    tier: IndexTier = "text"


class _Texts(NamedTuple):
    scores: dict[int, float]
    documents: dict[int, int]
    document_scores: dict[int, float]


async def run_search(
    connection: AsyncConnection, cache: StatisticsCache, namespace: NamespaceRow, request: Request
) -> Found:
    """Answer one query."""
    statistics = await cache.of(connection, namespace)
    candidates = await _candidates(connection, statistics, namespace, request)
    if not len(candidates.keys):
        return Found((), candidates.tier)
    fused = _fused(request, candidates)
    # Ties in order of storage, so that the same query gives the same answer.
    order = [int(index) for index in np.lexsort((candidates.keys, -fused.scores))]
    order = await _diversified(connection, namespace, request.query, candidates.keys, fused.scores, order)
    order = ranking.limit_per_document(order, candidates.documents, request.query.per_document)
    hits = await _hits(connection, namespace, request, candidates, fused, order[: request.query.k])
    return Found(hits, candidates.tier)


async def _candidates(
    connection: AsyncConnection, statistics: Statistics, namespace: NamespaceRow, request: Request
) -> _Candidates:
    texts = _Texts({}, {}, {})
    words = folded_query(request.query.text[: schema.QUERY_CHARS_MAX])
    if request.mode != "vector" and words:
        texts = await _text_side(connection, statistics, namespace, request, words)
    near: dict[int, float] = {}
    documents = texts.documents
    tier: IndexTier = "text"
    if request.vector is not None:
        found, tier = await _nearest(connection, statistics, namespace, request, request.vector)
        missing = sorted(texts.scores.keys() - {key for key, _, _ in found})
        found += await _distances(connection, namespace, request.vector, missing)
        near = {key: distance for key, _, distance in found}
        documents = documents | {key: document or 0 for key, document, _ in found}
    keys = np.array(sorted(near.keys() | texts.scores.keys()), np.int64)
    listed: list[int] = keys.tolist()
    return _Candidates(
        keys,
        np.array([documents[key] for key in listed], np.int64),
        None if request.mode == "vector" else np.array([texts.scores.get(key, 0.0) for key in listed]),
        None if request.vector is None else namespace.similarities(np.array([near[key] for key in listed])),
        np.array([texts.document_scores.get(documents[key], 0.0) for key in listed]),
        tier,
    )


async def _text_side(
    connection: AsyncConnection,
    statistics: Statistics,
    namespace: NamespaceRow,
    request: Request,
    words: list[str],
) -> _Texts:
    """Full-text matches. A filter is applied before the limit, so it never costs recall."""
    call = "agentic_flow.text_search(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
    bindings: list[Any] = [
        namespace.shard, namespace.id, words, request.now_s, request.at_s, float(statistics.items),
        max(statistics.item_words / max(statistics.items, 1), 1.0), float(statistics.documents),
        max(statistics.document_words / max(statistics.documents, 1), 1.0),
    ]  # fmt: skip
    columns = "t.item_key, coalesce(t.item_document, 0), t.item_score, t.document_score"
    if request.where is None:
        found = await fetch(connection, f"SELECT {columns} FROM {call} AS t", [*bindings, CANDIDATES_MAX])
    else:
        where, where_bindings = request.where
        found = await fetch(
            connection,
            f"SELECT {columns} FROM {call} AS t JOIN agentic_flow.items AS i ON i.key = t.item_key "
            f"WHERE i.shard = %s AND {where} ORDER BY t.item_score DESC, t.item_key LIMIT %s",
            [*bindings, None, namespace.shard, *where_bindings, CANDIDATES_MAX],
        )
    return _Texts(
        {key: score for key, _, score, _ in found},
        {key: document for key, document, _, _ in found},
        {document: score for _, document, _, score in found if document},
    )


async def _nearest(
    connection: AsyncConnection,
    statistics: Statistics,
    namespace: NamespaceRow,
    request: Request,
    vector: NDArray[np.float32],
) -> tuple[list[tuple[Any, ...]], IndexTier]:
    """Key, document and distance of the nearest rows that the filter admits."""
    wanted = request.pool
    if namespace.graph and not request.query.exact and vector.any():
        share = await _admitted_share(connection, statistics, namespace, request)
        # Rows to visit until `wanted` of them pass, beside reading every row once.
        steps = wanted / max(share, 1e-9)
        rare = share < GRAPH_SHARE_MIN and share * statistics.items <= GATHERED_ROWS_MAX
        if not rare and (request.where is None or GRAPH_STEP_COST * steps <= statistics.items):
            found = await _walked(connection, namespace, request, vector, steps)
            # Zero vectors are not in a graph by cosine; they may be next after negative likeness only.
            complete = len(found) >= wanted and not (
                namespace.metric == "cosine" and found[wanted - 1][2] > 1
            )
            if complete:
                return found[:wanted], "graph"
    where, bindings = request.visible(namespace)
    distance = namespace.distance
    found = await fetch(
        connection,
        f"SELECT i.key, i.document_id, {distance} AS distance FROM agentic_flow.items AS i "
        f"WHERE {where} ORDER BY distance, i.key LIMIT %s",
        [vector, *bindings, wanted],
    )
    return found, "exact"


async def _admitted_share(
    connection: AsyncConnection, statistics: Statistics, namespace: NamespaceRow, request: Request
) -> float:
    """About which share of the namespace's rows the filter admits, by a sample of its pages."""
    if request.where is None:
        return 1.0
    percent = min(100.0, 100.0 * SAMPLE_ROWS / max(statistics.items, 1))
    where, bindings = request.visible(namespace)
    ((sampled, admitted),) = await fetch(
        connection,
        f"SELECT count(*), count(*) FILTER (WHERE {where}) FROM agentic_flow.items AS i "
        "TABLESAMPLE SYSTEM (%s) REPEATABLE (1) WHERE i.shard = %s",
        [*bindings, percent, namespace.shard],
    )
    return admitted / sampled if sampled else 0.0


async def _walked(
    connection: AsyncConnection,
    namespace: NamespaceRow,
    request: Request,
    vector: NDArray[np.float32],
    steps: float,
) -> list[tuple[Any, ...]]:
    """The nearest rows by the graph, in order of their stored vectors."""
    # A few more than asked for: what is near the end of a walk is less surely complete, and the index may
    # order by less precision than is stored.
    wanted = request.pool + max(OVER_FETCH, request.pool // 10)
    beam = request.query.ef or max(EF_MIN, 2 * int(steps))
    await fetch(
        connection,
        "SELECT set_config('hnsw.ef_search', %s, true), set_config('hnsw.iterative_scan', 'strict_order', "
        "true), "
        "set_config('hnsw.max_scan_tuples', %s, true), set_config('hnsw.scan_mem_multiplier', '8', true), "
        "set_config('enable_sort', 'off', true)",
        (str(min(max(beam, wanted), EF_MAX)), str(max(SCAN_TUPLES_MIN, int(min(steps * 16, 2e9))))),
    )
    where, bindings = request.visible(namespace)
    found = await fetch(
        connection,
        f"SELECT i.key, i.document_id, {namespace.distance} FROM (SELECT i.key, i.document_id, "
        f"i.{namespace.column} FROM agentic_flow.items AS i WHERE {where} "
        f"ORDER BY {namespace.indexed_distance} LIMIT %s) AS i",
        [vector, *bindings, namespace.bound(vector), wanted],
    )
    await fetch(connection, "SELECT set_config('enable_sort', 'on', true)")
    return sorted(found, key=lambda row: (row[2], row[0]))


async def _distances(
    connection: AsyncConnection, namespace: NamespaceRow, vector: NDArray[np.float32], keys: list[int]
) -> list[tuple[Any, ...]]:
    """Key, document and distance of these rows."""
    if not keys:
        return []
    return await fetch(
        connection,
        f"SELECT i.key, i.document_id, {namespace.distance} FROM agentic_flow.items AS i "
        "WHERE i.shard = %s AND i.key = ANY(%s)",
        [vector, namespace.shard, keys],
    )


def _fused(request: Request, candidates: _Candidates) -> ranking.Fused:
    single = candidates.vector if request.mode == "vector" else candidates.text
    if request.mode != "hybrid" and single is not None:
        return ranking.Fused(single, np.zeros_like(single))
    assert candidates.document_scores is not None
    return ranking.fuse(
        candidates.text,
        candidates.vector,
        vector_weight=request.vector_weight,
        documents=candidates.documents,
        document_scores=candidates.document_scores,
        method=request.query.fusion,
    )


def _pool_size(query: SearchQuery) -> int:
    return max(MMR_POOL_MIN, 4 * query.k)


async def _diversified(
    connection: AsyncConnection,
    namespace: NamespaceRow,
    query: SearchQuery,
    keys: Ints,
    scores: Floats,
    order: list[int],
) -> list[int]:
    """The best of the order rearranged by maximal marginal relevance, when the query asks for it."""
    if query.mmr_lambda is None or query.mmr_lambda >= 1:
        return order
    pool = order[: _pool_size(query)]
    found = await fetch(
        connection,
        f"SELECT i.key, {sent_vector(namespace)} FROM agentic_flow.items AS i "
        "WHERE i.shard = %s AND i.key = ANY(%s)",
        (namespace.shard, keys[pool].tolist()),
    )
    vectors = {key: read_vector(namespace, sent) for key, sent in found}
    unit = np.stack([vectors[int(keys[index])] for index in pool])
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    relevance = ranking.as_relevance(scores[pool])
    picks = len(pool)
    picked = ranking.mmr(relevance, ranking.similarity_rows(unit, picks), picks, query.mmr_lambda)
    return [pool[index] for index in picked]


async def _hits(
    connection: AsyncConnection,
    namespace: NamespaceRow,
    request: Request,
    candidates: _Candidates,
    fused: ranking.Fused,
    order: list[int],
) -> tuple[Hit, ...]:
    keys = [int(candidates.keys[index]) for index in order]
    found = await fetch(
        connection,
        f"SELECT {ITEM_COLUMNS} FROM agentic_flow.items AS i WHERE i.shard = %s AND i.key = ANY(%s)",
        (namespace.shard, keys),
    )
    by_key = {row[0]: row for row in found}
    hits: list[Hit] = []
    for index, key in zip(order, keys, strict=True):
        parts: dict[str, float] = {}
        if candidates.text is not None:
            parts["text"] = float(candidates.text[index])
        if candidates.vector is not None:
            parts["vector"] = float(candidates.vector[index])
        if fused.evidence[index]:
            parts["document"] = float(fused.evidence[index])
        if request.query.explain:
            parts |= fused.explanation(index)
        item = read_item(namespace, by_key[key], vectors=False)
        hits.append(Hit.model_construct(item=item, score=float(fused.scores[index]), score_parts=parts))
    return tuple(hits)
