"""All vectors of a small namespace in memory: every one is compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.layout import Keys, Layout, Scores, Vectors

_ROWS_MIN = 64
_DEAD_SHARE_MAX = 0.25
_SORTED_AT_ONCE = 300
"""Scores up to which one sort takes less than finding the best and sorting these."""


class Matrix:
    """Comparable vectors by item key.

    Rows are only ever appended; a changed or deleted one is masked out. So whoever took the arrays a moment
    ago goes on reading what they held then.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._keys = np.zeros(_ROWS_MIN, np.int64)
        self._vectors = np.zeros((_ROWS_MIN, layout.dimension), np.float32)
        self._live = np.zeros(_ROWS_MIN, bool)
        self._used = 0
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: int) -> bool:
        return key in self._row_of

    @property
    def size_bytes(self) -> int:
        """Memory of it."""
        return self._vectors.nbytes + self._keys.nbytes + self._live.nbytes

    def apply(self, changed: Keys, keys: Keys, vectors: Vectors) -> None:
        """Drop the changed keys, then take in those of them that exist now."""
        gone = [row for row in (self._row_of.pop(key, None) for key in changed.tolist()) if row is not None]
        if gone:
            self._live = self._live.copy()
            self._live[gone] = False
        dead = self._used - len(self._row_of)
        if dead > max(_ROWS_MIN, _DEAD_SHARE_MAX * len(self._row_of)):
            self._compact()
        self._grow(self._used + len(keys))
        rows = slice(self._used, self._used + len(keys))
        self._keys[rows], self._vectors[rows], self._live[rows] = keys, vectors, True
        self._row_of.update(zip(keys.tolist(), range(rows.start, rows.stop), strict=True))
        self._used = rows.stop

    def all(self) -> tuple[Keys, Vectors]:
        """Keys and vectors of every live row."""
        live = np.flatnonzero(self._live[: self._used])
        return self._keys[live], self._vectors[live]

    def nearest(self, query: NDArray[np.float32], count: int, allowed: Keys | None) -> tuple[Keys, Scores]:
        """Keys (of `allowed` ones, sorted) and similarities of the nearest, best first."""
        used = self._used
        keys, live = self._keys[:used], self._live[:used]
        scores = self._layout.similarities(self._vectors[:used], query)
        if allowed is not None:
            live = live & np.isin(keys, allowed)
        if not live.all():
            keys, scores = keys[live], scores[live]
        return best(keys, scores, count)

    def similarities(self, query: NDArray[np.float32], keys: Keys) -> tuple[Keys, Scores]:
        """Those of the keys that are there, with their similarities."""
        known = [
            (key, row)
            for key, row in ((key, self._row_of.get(key)) for key in keys.tolist())
            if row is not None
        ]
        rows = [row for _, row in known]
        held = np.fromiter((key for key, _ in known), np.int64, len(known))
        return held, self._layout.similarities(self._vectors[rows], query)

    def _grow(self, wanted: int) -> None:
        if wanted <= len(self._keys):
            return
        room = max(wanted, 2 * len(self._keys))
        used = self._used
        keys, vectors = np.zeros(room, np.int64), np.zeros((room, self._layout.dimension), np.float32)
        live = np.zeros(room, bool)
        keys[:used], vectors[:used], live[:used] = self._keys[:used], self._vectors[:used], self._live[:used]
        self._keys, self._vectors, self._live = keys, vectors, live

    def _compact(self) -> None:
        keys, vectors = self.all()
        self._used = 0
        self._keys = np.zeros(max(len(keys), _ROWS_MIN), np.int64)
        self._vectors = np.zeros((len(self._keys), self._layout.dimension), np.float32)
        self._live = np.zeros(len(self._keys), bool)
        self._row_of = {}
        rows = slice(0, len(keys))
        self._keys[rows], self._vectors[rows], self._live[rows] = keys, vectors, True
        self._row_of.update(zip(keys.tolist(), range(len(keys)), strict=True))
        self._used = len(keys)


def best(keys: Keys, scores: Scores, count: int) -> tuple[Keys, Scores]:
    """The `count` highest, best first; equal ones in order of their keys."""
    if len(keys) > max(count, _SORTED_AT_ONCE):
        # Everything that ties with the last place, so that which of them stays does not depend on the order.
        edge = np.partition(scores, len(scores) - count)[len(scores) - count]
        chosen = np.flatnonzero(scores >= edge)
        keys, scores = keys[chosen], scores[chosen]
    order = np.lexsort((keys, -scores))[:count]
    return keys[order], scores[order]
