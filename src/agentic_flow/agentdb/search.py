"""One search inside one read transaction: candidates from both sides, filtered, fused, and read again."""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import apsw
import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.agentdb import ranking, schema
from agentic_flow.agentdb.analysis import match_expression
from agentic_flow.agentdb.filters import Compiled
from agentic_flow.agentdb.index.allowed import AllowedKeys
from agentic_flow.agentdb.index.layout import Layout, bound_keys, newest_sequence
from agentic_flow.agentdb.index.tiers import GATHERED_MAX, Indexes
from agentic_flow.agentdb.records import ITEM_COLUMNS, LIVE, NamespaceRow, read_item
from agentic_flow.core.db import rows
from agentic_flow.core.errors import DeadlineExceeded
from agentic_flow.core.vectors import Hit, IndexTier, SearchQuery

CANDIDATES_MAX = 4096
"""Best full-text matches that are fused; no answer looks further down."""
VECTOR_CANDIDATES = 256
MMR_POOL_MIN = 50
PROGRESS_STEPS = 20_000
"""Steps of SQLite's machine between two looks at the clock: about every millisecond."""
SPELLING_WEIGHT = 0.25
"""Weight of a vector side that knows spelling only, beside the full-text side's 1."""

MOMENTS_KEPT_MAX = 1000
QUICK_POOL_MAX = 100
QUICK_ROWS_MAX = 128
"""Rows that a filter leaves up to which to read and compare them all takes less than asking a thread."""
NAMED_KEYS_MAX = 32
"""Keys of hits up to which they are bound one by one."""
QUICK_NUMBERS_MAX: dict[IndexTier, int] = {"exact": 2_000_000, "scan": 100_000_000}
"""Numbers compared up to which a search of this tier takes about a millisecond."""

Mode = Literal["hybrid", "vector", "text"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Request:
    """A query with everything that does not need the database already done.

    Args:
        query: As it was asked.
        mode: The sides that take part.
        vector: The query's vector, comparable to the namespace's; None when that side takes no part.
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
    def pool(self) -> int:
        """How many candidates of the vector side are looked at: more than `k` where they are rearranged."""
        query = self.query
        varied = query.mmr_lambda is not None and query.mmr_lambda < 1
        if self.mode == "vector" and not varied and not query.per_document:
            return query.k
        return max(VECTOR_CANDIDATES, _pool_size(query))


@dataclass(frozen=True, slots=True)
class Found:
    """Hits, best first, and what answered the vector side."""

    hits: tuple[Hit, ...]
    tier: IndexTier


@dataclass(slots=True)
class _Candidates:
    keys: Ints
    text: Floats | None = None
    vector: Floats | None = None
    tier: IndexTier = "text"


@dataclass(frozen=True, slots=True)
class _Moment:
    """A namespace at one state of the file (`version`, as this thread's connection counts them).

    `newest` is its last operation; `timeless`, that none of its rows ever expires or becomes valid.
    """

    version: int
    newest: int
    timeless: bool


class Searcher:
    """Runs searches of one database, whose connections belong to one thread each.

    Args:
        indexes: Name the nearest rows.
        allowed: Remembers which rows filters admit.
    """

    def __init__(self, indexes: Indexes, allowed: AllowedKeys) -> None:
        self.indexes = indexes
        self.allowed = allowed
        self._seen = threading.local()

    def is_quick(self, layout: Layout, request: Request) -> bool:
        """Whether the search is likely to end within about a millisecond: its index stands in memory, or its
        filter left few rows when it was last asked for."""
        if request.mode != "vector" or request.query.exact or request.pool > QUICK_POOL_MAX:
            return False
        index = self.indexes.loaded(layout)
        if request.where is not None:
            admitted = self.allowed.count(layout.namespace_id, request.where)
            if admitted is None or admitted > GATHERED_MAX:
                return False
            if admitted <= QUICK_ROWS_MAX:
                return True
            if index is not None and index.tier != "exact":
                return index.recent is not None
        if index is None:
            return False
        return index.tier == "graph" or len(index) * layout.dimension <= QUICK_NUMBERS_MAX[index.tier]

    def run(self, connection: apsw.Connection, namespace: NamespaceRow, request: Request) -> Found:
        """Answer one query. Every hit is read in this very transaction."""
        candidates = self._candidates(connection, namespace, request)
        if not len(candidates.keys):
            return Found((), candidates.tier)
        if request.mode == "vector" and request.pool == request.query.k and candidates.vector is not None:
            # Nothing to fuse or rearrange: candidates come best first.
            scores = candidates.vector.tolist()
            parts = [{"vector": score} for score in scores]
            return Found(
                _hits(connection, namespace, request, candidates.keys, scores, parts), candidates.tier
            )
        documents = _documents(connection, candidates.keys)
        fused = _fused(connection, namespace, request, candidates, documents)
        # Ties in order of storage, so that the same query gives the same answer.
        order = [int(index) for index in np.lexsort((candidates.keys, -fused.scores))]
        order = _diversified(connection, namespace, request.query, candidates.keys, fused.scores, order)
        order = ranking.limit_per_document(order, documents, request.query.per_document)[: request.query.k]
        scores = [float(fused.scores[index]) for index in order]
        parts = [_parts(candidates, fused, index, request.query.explain) for index in order]
        return Found(
            _hits(connection, namespace, request, candidates.keys[order], scores, parts), candidates.tier
        )

    def _candidates(
        self, connection: apsw.Connection, namespace: NamespaceRow, request: Request
    ) -> _Candidates:
        moment = self._moment(connection, namespace.id)
        allowed = self._allowed(connection, namespace, request, moment)
        query = request.query
        text_keys, text_scores = np.zeros(0, np.int64), np.zeros(0, np.float64)
        if request.mode != "vector":
            expression = match_expression(query.text[: schema.QUERY_CHARS_MAX])
            if expression is not None:
                text_keys, text_scores = _text_side(connection, namespace, expression, allowed)
        if request.vector is None:
            return _Candidates(text_keys, text_scores)
        near = self.indexes.nearest(
            connection,
            namespace.layout,
            request.vector,
            request.pool,
            allowed=allowed,
            ef=query.ef,
            exact=query.exact,
            newest=moment.newest,
        )
        if request.mode == "vector":
            return _Candidates(near.keys, vector=near.scores.astype(np.float64), tier=near.tier)
        held = self.indexes.loaded(namespace.layout)
        if held is not None and held.sequence < moment.newest:
            # Rows were gathered without the index: one in memory that has not seen the newest loses them.
            self.indexes.current(connection, namespace.layout, moment.newest)
        union = np.union1d(near.keys, text_keys)
        keys, similarities = self.indexes.similarities(connection, namespace.layout, request.vector, union)
        # An index in memory may be newer than this transaction: what it no longer has takes no part.
        text_kept = np.isin(text_keys, keys, assume_unique=True)
        text = np.zeros(len(keys))
        text[np.searchsorted(keys, text_keys[text_kept])] = text_scores[text_kept]
        return _Candidates(keys, text, similarities.astype(np.float64), near.tier)

    def _allowed(
        self, connection: apsw.Connection, namespace: NamespaceRow, request: Request, moment: _Moment
    ) -> Ints | None:
        """Keys that the filter and the time admit, sorted; None when that is every row."""
        hidden = _NONE if moment.timeless else _hidden(connection, namespace.id, request)
        if request.where is None and not len(hidden):
            return None
        keys = self.allowed.keys(connection, namespace.id, request.where or ("1", []))
        if not len(hidden):
            return keys
        return np.setdiff1d(keys, hidden, assume_unique=True)

    def _moment(self, connection: apsw.Connection, namespace_id: int) -> _Moment:
        """What the transaction's state of the file says of the namespace; read again when the file changed.

        The transaction must have read something already: that is when its state is fixed.
        """
        version = connection.data_version()
        seen: dict[int, _Moment] = self._seen.__dict__.setdefault("moments", {})
        moment = seen.get(namespace_id)
        if moment is None or moment.version != version:
            newest = newest_sequence(connection, namespace_id)
            if moment is not None and moment.newest == newest:
                timeless = moment.timeless  # the write was to another namespace
            else:
                timeless = not _timed(connection, namespace_id)
            moment = _Moment(version, newest, timeless)
            if len(seen) >= MOMENTS_KEPT_MAX:
                seen.clear()
            seen[namespace_id] = moment
        return moment


def _timed(connection: apsw.Connection, namespace_id: int) -> bool:
    """Whether a row of the namespace ever expires or becomes valid."""
    found = rows(
        connection,
        "SELECT EXISTS (SELECT 1 FROM items WHERE namespace_id = ?1 AND expires_at_s IS NOT NULL) "
        "OR EXISTS (SELECT 1 FROM items WHERE namespace_id = ?1 "
        "AND (valid_from_s IS NOT NULL OR valid_until_s IS NOT NULL))",
        (namespace_id,),
    )
    return bool(found[0][0])


@contextmanager
def deadline(connection: apsw.Connection, timeout_s: float) -> Generator[None]:
    """Interrupt what the connection does once the time is up.

    Raises:
        DeadlineExceeded: it was.
    """
    give_up_at_s = time.monotonic() + timeout_s
    connection.set_progress_handler(lambda: time.monotonic() > give_up_at_s, PROGRESS_STEPS)
    try:
        yield
    except apsw.InterruptError as error:
        raise DeadlineExceeded(
            f"the search took longer than {timeout_s!r} s",
            hint="narrow its filter, ask for less, or raise agentdb.query_timeout_s",
        ) from error
    finally:
        connection.set_progress_handler(None)


def _hidden(connection: apsw.Connection, namespace_id: int, request: Request) -> Ints:
    """Keys of rows that have expired, or are not valid at the time asked for. Indexes find them at once."""
    at_s = request.now_s if request.query.at_s is None else request.query.at_s
    found = rows(
        connection,
        "SELECT key FROM items WHERE namespace_id = ?1 AND expires_at_s <= ?2 "
        "UNION SELECT key FROM items WHERE namespace_id = ?1 "
        "AND (valid_from_s IS NOT NULL OR valid_until_s IS NOT NULL) "
        "AND (valid_from_s > ?3 OR valid_until_s <= ?3)",
        (namespace_id, request.now_s, at_s),
    )
    return np.fromiter((key for (key,) in found), np.int64, len(found))


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
        method=request.query.fusion,
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
            "SELECT key, vector FROM vectors WHERE key IN (SELECT value FROM json_each(?))",
            (_json(keys[pool]),),
        )
    )
    pool = [index for index in pool if int(keys[index]) in vectors]
    if not pool:
        return order
    layout = namespace.layout
    unit = layout.decoded([vectors[int(keys[index])] for index in pool])
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.float32(1e-12))
    relevance = ranking.as_relevance(scores[pool])
    picks = min(query.k, len(pool)) if not query.per_document else len(pool)
    picked = ranking.mmr(relevance, ranking.similarity_rows(unit, picks), picks, query.mmr_lambda)
    return [pool[index] for index in picked]


def _parts(candidates: _Candidates, fused: ranking.Fused, index: int, explained: bool) -> dict[str, float]:
    parts: dict[str, float] = {}
    if candidates.text is not None:
        parts["text"] = float(candidates.text[index])
    if candidates.vector is not None:
        parts["vector"] = float(candidates.vector[index])
    if fused.evidence[index]:
        parts["document"] = float(fused.evidence[index])
    return parts | fused.explanation(index) if explained else parts


def _hits(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    request: Request,
    keys: Ints,
    scores: Sequence[float],
    parts: Sequence[dict[str, float]],
) -> tuple[Hit, ...]:
    """The rows of the keys, in their order, as they are now; what is gone or expired is left out."""
    order = keys.tolist()
    if len(order) <= NAMED_KEYS_MAX:
        found = rows(connection, _items_by_key(len(order)), (*order, namespace.id, request.now_s))
    else:
        found = rows(
            connection,
            # CROSS JOIN: by key, never through the index of the namespace.
            f"SELECT {ITEM_COLUMNS} FROM carray(?) AS c CROSS JOIN items ON items.key = c.value "
            f"WHERE items.namespace_id = ? AND {LIVE}",
            (bound_keys(keys), namespace.id, request.now_s),
        )
    row_of = {row[0]: row for row in found}
    return tuple(
        Hit.trusted(item=read_item(row_of[key]), score=score, score_parts=part)
        for key, score, part in zip(order, scores, parts, strict=True)
        if key in row_of
    )


@functools.cache
def _items_by_key(count: int) -> str:
    """Twice as fast as `carray` for few keys. The + keeps the index of the namespace out of it."""
    named = ",".join("?" * count)
    return f"SELECT {ITEM_COLUMNS} FROM items WHERE key IN ({named}) AND +namespace_id = ? AND {LIVE}"


def _json(keys: Ints) -> str:
    return orjson.dumps(keys, option=orjson.OPT_SERIALIZE_NUMPY).decode()
