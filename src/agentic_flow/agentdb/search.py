"""One search inside one read transaction: candidates from both sides, filtered, fused, and read again."""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import apsw
import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.agentdb import ranking, schema
from agentic_flow.agentdb.analysis import match_expression
from agentic_flow.agentdb.filters import Compiled
from agentic_flow.agentdb.records import ITEM_COLUMNS, LIVE, NamespaceRow, read_item
from agentic_flow.agentdb.vector_cache import VectorCache
from agentic_flow.core.db import rows
from agentic_flow.core.vectors import Hit, SearchQuery

CANDIDATES_MAX = 4096
"""Best full-text matches that are fused; no answer looks further down."""
VECTOR_CANDIDATES = 256
MMR_POOL_MIN = 50
SPELLING_WEIGHT = 0.25
"""Weight of a vector side that knows spelling only, beside the full-text side's 1."""

Mode = Literal["hybrid", "vector", "text"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Request:
    """A query with everything that does not need the database already done.

    Args:
        vector: The query's vector, None when the vector side takes no part.
        vector_weight: Weight of that side under fusion.
        where: The compiled filter, None without one.
    """

    query: SearchQuery
    mode: Mode
    vector: NDArray[np.float32] | None
    vector_weight: float
    where: Compiled | None
    now_s: float


@dataclass(slots=True)
class _Candidates:
    keys: Ints
    text: Floats | None = None
    vector: Floats | None = None


def run_search(
    connection: apsw.Connection, cache: VectorCache, namespace: NamespaceRow, request: Request
) -> tuple[Hit, ...]:
    """The hits of one query, best first. Every one was read in this very transaction."""
    candidates = _candidates(connection, cache, namespace, request)
    if not len(candidates.keys):
        return ()
    documents = _documents(connection, candidates.keys)
    fused = _fused(connection, namespace, request, candidates, documents)
    # Ties in order of storage, so that the same query gives the same answer.
    order = [int(index) for index in np.lexsort((candidates.keys, -fused.scores))]
    order = _diversified(connection, namespace, request.query, candidates.keys, fused.scores, order)
    order = ranking.limit_per_document(order, documents, request.query.per_document)[: request.query.k]
    return _hits(connection, namespace, request.now_s, candidates, fused, order)


def _candidates(
    connection: apsw.Connection, cache: VectorCache, namespace: NamespaceRow, request: Request
) -> _Candidates:
    allowed = _allowed(connection, namespace, request)
    query = request.query
    text_keys, text_scores = np.zeros(0, np.int64), np.zeros(0, np.float64)
    expression = match_expression(query.text[: schema.QUERY_CHARS_MAX])
    if request.mode != "vector" and expression is not None:
        text_keys, text_scores = _text_side(connection, namespace, expression, allowed)
    if request.vector is None:
        return _Candidates(text_keys, text_scores)
    keys, similarities = cache.similarities(connection, namespace.layout, request.vector)
    if allowed is not None:
        kept = np.isin(keys, allowed, assume_unique=True)
        keys, similarities = keys[kept], similarities[kept]
    near = similarities.astype(np.float64)
    wanted = min(len(keys), max(VECTOR_CANDIDATES, _pool_size(query)))
    best = np.argpartition(-near, wanted - 1)[:wanted] if wanted else np.zeros(0, np.int64)
    if request.mode == "vector":
        return _Candidates(keys[best], vector=near[best])
    # Both sides know about the same rows, except those written while this search began.
    text_keys, text_scores = _only(keys, text_keys, text_scores)
    union = np.union1d(keys[best], text_keys)
    text = np.zeros(len(union))
    text[np.searchsorted(union, text_keys)] = text_scores
    return _Candidates(union, text, near[np.searchsorted(keys, union)])


def _only(known: Ints, keys: Ints, scores: Floats) -> tuple[Ints, Floats]:
    kept = np.isin(keys, known, assume_unique=True)
    return keys[kept], scores[kept]


def _allowed(connection: apsw.Connection, namespace: NamespaceRow, request: Request) -> Ints | None:
    """Keys that the filter admits and that have not expired; None when that is every row."""
    expired = rows(
        connection,
        "SELECT 1 FROM items WHERE namespace_id = ? AND expires_at_s <= ? LIMIT 1",
        (namespace.id, request.now_s),
    )
    if request.where is None and not expired:
        return None
    condition, bindings = request.where or ("1", [])
    found = rows(
        connection,
        f"SELECT key FROM items WHERE namespace_id = ? AND {LIVE} AND ({condition}) ORDER BY key",
        (namespace.id, request.now_s, *bindings),
    )
    return np.array([key for (key,) in found], np.int64)


def _text_side(
    connection: apsw.Connection, namespace: NamespaceRow, expression: str, allowed: Ints | None
) -> tuple[Ints, Floats]:
    """Full-text matches in key order. A filter is applied before the limit, so it never costs recall."""
    table = schema.item_table(namespace.id)
    weights = ", ".join(map(str, schema.ITEM_WEIGHTS))
    scored = f"SELECT rowid, -bm25({table}, {weights}) AS score FROM {table} WHERE {table} MATCH ?"
    if allowed is None:
        found = rows(connection, f"{scored} ORDER BY score DESC LIMIT ?", (expression, CANDIDATES_MAX))
    else:
        found = rows(connection, scored, (expression,))
    keys = np.array([key for key, _ in found], np.int64)
    scores = np.array([score for _, score in found], np.float64)
    if allowed is not None:
        kept = np.isin(keys, allowed, assume_unique=True)
        keys, scores = keys[kept], scores[kept]
        best = np.argsort(-scores, kind="stable")[:CANDIDATES_MAX]
        keys, scores = keys[best], scores[best]
    order = np.argsort(keys)
    return keys[order], scores[order]


def _documents(connection: apsw.Connection, keys: Ints) -> Ints:
    """Document of each candidate, 0 for none."""
    found: dict[int, int] = dict(
        rows(
            connection,
            "SELECT key, document_id FROM items WHERE document_id IS NOT NULL "
            "AND key IN (SELECT value FROM json_each(?))",
            (_json(keys),),
        )
    )
    return np.fromiter((found.get(int(key), 0) for key in keys), np.int64, len(keys))


def _fused(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    request: Request,
    candidates: _Candidates,
    documents: Ints,
) -> ranking.Fused:
    single = candidates.vector if request.mode == "vector" else candidates.text
    if request.mode != "hybrid" and single is not None:
        return ranking.Fused(single, np.zeros_like(single))
    return ranking.fuse(
        candidates.text,
        candidates.vector,
        vector_weight=request.vector_weight,
        documents=documents,
        document_scores=_document_scores(connection, namespace, request.query.text, documents),
    )


def _document_scores(
    connection: apsw.Connection, namespace: NamespaceRow, text: str, documents: Ints
) -> Floats:
    """How well the document of each candidate matches as a whole."""
    expression = match_expression(text[: schema.QUERY_CHARS_MAX])
    if expression is None or not documents.any():
        return np.zeros(len(documents))
    table = schema.document_table(namespace.id)
    weights = ", ".join(map(str, schema.DOCUMENT_WEIGHTS))
    scores: dict[int, float] = dict(
        rows(
            connection,
            f"SELECT rowid, -bm25({table}, {weights}) AS score FROM {table} WHERE {table} MATCH ? "
            "ORDER BY score DESC LIMIT ?",
            (expression, CANDIDATES_MAX),
        )
    )
    return np.fromiter((scores.get(int(document), 0.0) for document in documents), np.float64, len(documents))


def _pool_size(query: SearchQuery) -> int:
    return max(MMR_POOL_MIN, 4 * query.k)


def _diversified(
    connection: apsw.Connection,
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
    vectors: dict[int, bytes] = dict(
        rows(
            connection,
            "SELECT key, vector FROM items WHERE key IN (SELECT value FROM json_each(?))",
            (_json(keys[pool]),),
        )
    )
    pool = [index for index in pool if int(keys[index]) in vectors]
    if not pool:
        return order
    layout = namespace.layout
    matrix = np.stack([np.frombuffer(vectors[int(keys[index])], layout.dtype) for index in pool])
    unit = matrix.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    relevance = ranking.as_relevance(scores[pool])
    picked = ranking.mmr(relevance, unit @ unit.T, len(pool), query.mmr_lambda)
    return [pool[index] for index in picked]


def _hits(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    now_s: float,
    candidates: _Candidates,
    fused: ranking.Fused,
    order: list[int],
) -> tuple[Hit, ...]:
    keys = [int(candidates.keys[index]) for index in order]
    found: dict[int, tuple[Any, ...]] = {
        row[0]: row
        for row in rows(
            connection,
            f"SELECT {ITEM_COLUMNS} FROM items WHERE key IN (SELECT value FROM json_each(?)) "
            f"AND namespace_id = ? AND {LIVE}",
            (orjson.dumps(keys).decode(), namespace.id, now_s),
        )
    }
    hits: list[Hit] = []
    for index, key in zip(order, keys, strict=True):
        if key not in found:
            continue
        parts: dict[str, float] = {}
        if candidates.text is not None:
            parts["text"] = float(candidates.text[index])
        if candidates.vector is not None:
            parts["vector"] = float(candidates.vector[index])
        if fused.evidence[index]:
            parts["document"] = float(fused.evidence[index])
        hits.append(Hit(item=read_item(found[key]), score=float(fused.scores[index]), score_parts=parts))
    return tuple(hits)


def _json(keys: Ints) -> str:
    return orjson.dumps(keys, option=orjson.OPT_SERIALIZE_NUMPY).decode()
