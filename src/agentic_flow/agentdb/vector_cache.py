"""Vectors of a namespace in memory: a cache derived from `items` that knows which operations it includes.

A snapshot never changes once it is made, so searches read it without a lock; refreshing makes a new one that
shares what stayed the same. Several processes may write the file: each refreshes its own cache by the log.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apsw
import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.schema import OPERATIONS_KEPT
from agentic_flow.core.db import rows
from agentic_flow.core.vectors import Metric

CACHE_MAX_BYTES = 512 * 1024 * 1024
"""Namespaces are dropped from memory, least recently used first, past this; larger ones are streamed."""

_BLOCK_ROWS = 4096
_SMALL_SEGMENTS_MAX = 16
_REBUILD_SHARE = 0.25
"""Changed and dead rows, as a share of the live ones, past which everything is loaded anew."""

Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a namespace's vectors are stored and compared."""

    namespace_id: int
    dimension: int
    metric: Metric
    vector_format: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the file holds numbers."""
        return np.dtype("<f2" if self.vector_format == "f16" else "<f4")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        return 4 * self.dimension


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows that were loaded together; `live` False: deleted, or replaced in a later segment."""

    keys: Keys
    vectors: Vectors
    live: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The vectors of a namespace as of operation `sequence`."""

    sequence: int
    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(segment.vectors.nbytes + segment.keys.nbytes for segment in self.segments)

    @property
    def rows(self) -> int:
        """Rows in memory, those included that are no longer live."""
        return sum(len(segment.keys) for segment in self.segments)

    @property
    def live_rows(self) -> int:
        return sum(int(segment.live.sum()) for segment in self.segments)


class VectorCache:
    """Snapshots of recently searched namespaces."""

    def __init__(self, max_bytes: int = CACHE_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self._lock = threading.Lock()
        self._refreshing: dict[int, threading.Lock] = {}

    def similarities(
        self, connection: apsw.Connection, layout: Layout, query: NDArray[np.float32]
    ) -> tuple[Keys, NDArray[np.float32]]:
        """Key and similarity (higher is closer) of every row, in key order.

        Call it within a read transaction: rows written before it began are all there.
        """
        count = int(
            rows(connection, "SELECT count(*) FROM items WHERE namespace_id = ?", (layout.namespace_id,))[0][
                0
            ]
        )
        if count * layout.row_bytes > self._max_bytes:
            scored = [
                (keys, _compared(vectors, query, layout.metric))
                for keys, vectors in _load(connection, layout)
            ]
        else:
            scored = [
                (segment.keys[segment.live], _compared(segment.vectors, query, layout.metric)[segment.live])
                for segment in self.snapshot(connection, layout).segments
            ]
        if not scored:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        keys = np.concatenate([keys for keys, _ in scored])
        scores = np.concatenate([scores for _, scores in scored])
        order = np.argsort(keys, kind="stable")
        return keys[order], scores[order]

    def snapshot(self, connection: apsw.Connection, layout: Layout) -> Snapshot:
        """The namespace's vectors, at least as new as the connection's transaction."""
        namespace_id = layout.namespace_id
        with self._lock:
            guard = self._refreshing.setdefault(namespace_id, threading.Lock())
        with guard:
            with self._lock:
                held = self._snapshots.get(namespace_id)
            fresh = _refreshed(connection, layout, held)
            with self._lock:
                self._snapshots[namespace_id] = fresh
                self._snapshots.move_to_end(namespace_id)
                while (
                    len(self._snapshots) > 1
                    and sum(kept.size_bytes for kept in self._snapshots.values()) > self._max_bytes
                ):
                    self._snapshots.popitem(last=False)
            return fresh

    def forget(self, namespace_id: int) -> None:
        """The namespace is gone."""
        with self._lock:
            self._snapshots.pop(namespace_id, None)
            self._refreshing.pop(namespace_id, None)


def _refreshed(connection: apsw.Connection, layout: Layout, held: Snapshot | None) -> Snapshot:
    newest, own = rows(
        connection,
        # The counter and not the log's last row: the log of a deleted namespace goes with it.
        "SELECT (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'operations'), "
        "(SELECT coalesce(max(sequence), 0) FROM operations WHERE namespace_id = ?)",
        (layout.namespace_id,),
    )[0]
    # Older operations are pruned: a snapshot from before that cannot know what it missed.
    if held is None or held.sequence < newest - OPERATIONS_KEPT:
        return _rebuilt(connection, layout, newest)
    if held.sequence >= own:
        return Snapshot(max(held.sequence, newest), held.segments)
    if sum(len(segment.keys) < _BLOCK_ROWS for segment in held.segments) >= _SMALL_SEGMENTS_MAX:
        return _rebuilt(connection, layout, newest)
    changed = [
        key
        for (key,) in rows(
            connection,
            "SELECT DISTINCT item_key FROM operations WHERE namespace_id = ? AND sequence > ? "
            "ORDER BY item_key",
            (layout.namespace_id, held.sequence),
        )
    ]
    dead = held.rows - held.live_rows
    if len(changed) + dead > _REBUILD_SHARE * max(held.live_rows, 1):
        return _rebuilt(connection, layout, newest)
    keys = np.array(changed, np.int64)
    kept = tuple(
        Segment(segment.keys, segment.vectors, segment.live & ~np.isin(segment.keys, keys))
        for segment in held.segments
    )
    return Snapshot(newest, (*kept, *_segments(_load(connection, layout, changed))))


def _rebuilt(connection: apsw.Connection, layout: Layout, sequence: int) -> Snapshot:
    return Snapshot(sequence, tuple(_segments(_load(connection, layout))))


def _segments(parts: Iterator[tuple[Keys, Vectors]]) -> Iterator[Segment]:
    for keys, vectors in parts:
        yield Segment(keys, vectors, np.ones(len(keys), bool))


def _load(
    connection: apsw.Connection, layout: Layout, only: Sequence[int] | None = None
) -> Iterator[tuple[Keys, Vectors]]:
    """Rows in blocks, ready to compare: unit vectors under cosine."""
    sql = "SELECT key, vector FROM items WHERE namespace_id = ? AND key > ? ORDER BY key LIMIT ?"
    last = 0
    position = 0
    while True:
        if only is None:
            found = rows(connection, sql, (layout.namespace_id, last, _BLOCK_ROWS))
            done = len(found) < _BLOCK_ROWS
            last = found[-1][0] if found else last
        else:
            wanted = list(only[position : position + _BLOCK_ROWS])
            position += _BLOCK_ROWS
            done = position >= len(only)
            found = rows(
                connection,
                "SELECT key, vector FROM items WHERE namespace_id = ? "
                "AND key IN (SELECT value FROM json_each(?)) ORDER BY key",
                (layout.namespace_id, str(wanted)),
            )
        if found:
            keys = np.array([key for key, _ in found], np.int64)
            vectors = np.frombuffer(b"".join(blob for _, blob in found), layout.dtype)
            yield keys, _comparable(vectors.reshape(len(found), layout.dimension), layout.metric)
        if done:
            return


def _comparable(vectors: Vectors, metric: Metric) -> Vectors:
    # float32 in memory: numpy converts float16 so slowly that doing it in each search would dominate it.
    wide = vectors.astype(np.float32)
    if metric == "cosine":
        wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    return wide


def _compared(vectors: Vectors, query: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Cosine, inner product, or negative distance."""
    if metric != "euclidean":
        return vectors @ query
    scores = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK_ROWS):  # bounds the memory of the differences
        block = vectors[start : start + _BLOCK_ROWS]
        scores[start : start + len(block)] = -np.linalg.norm(block - query, axis=1)
    return scores
