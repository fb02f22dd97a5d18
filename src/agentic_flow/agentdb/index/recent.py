"""Stored vectors that were compared lately, in memory: candidates are decided without reading them again.

They are the file's bytes, and go as soon as the index takes in an operation that touched them. So they are
what a transaction sees if, and only if, it is of the operation that the index is of: the owner sees to that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.layout import Keys, Layout, Scores, widened

_ROWS_MIN = 1024


class Recent:
    """Vectors by item key, as the file has them. Not safe for use while it changes: the owner holds a lock.

    Args:
        layout: Of the vectors.
        max_bytes: Size past which all are let go, and gathering begins anew.
    """

    def __init__(self, layout: Layout, max_bytes: int) -> None:
        self._layout = layout
        self._rows_max = max_bytes // layout.stored_bytes
        self._slot_of: dict[int, int] = {}
        self._vectors = np.zeros((0, layout.dimension), np.dtype(f"<i{layout.dtype.itemsize}"))
        self._used = 0

    @property
    def size_bytes(self) -> int:
        """Memory of it."""
        return self._vectors.nbytes

    def missing(self, keys: Keys) -> Keys:
        """Those of the keys that are not there."""
        slot_of = self._slot_of
        return np.array([key for key in keys.tolist() if key not in slot_of], np.int64)

    def bring(self, keys: Keys, stored: list[bytes]) -> None:
        """Take in the vectors of keys, but for those that are there: another search may have brought them."""
        missing = self.missing(keys)
        if len(missing) == len(keys):
            self.take(keys, b"".join(stored))
        elif len(missing):
            wanted = set(missing.tolist())
            chosen = [place for place, key in enumerate(keys.tolist()) if key in wanted]
            self.take(keys[chosen], b"".join(stored[place] for place in chosen))

    def take(self, keys: Keys, stored: bytes) -> None:
        """Take in the vectors of keys that are not there.

        Args:
            stored: One after the other, as the file has them.
        """
        if self._used + len(keys) > self._rows_max:
            self._slot_of, self._used = {}, 0
            if len(keys) > self._rows_max:
                return
        first, self._used = self._used, self._used + len(keys)
        if self._used > len(self._vectors):
            room = min(max(self._used, 2 * len(self._vectors), _ROWS_MIN), self._rows_max)
            grown = np.zeros((room, self._layout.dimension), self._vectors.dtype)
            grown[:first] = self._vectors[:first]
            self._vectors = grown
        new = np.frombuffer(stored, self._vectors.dtype).reshape(len(keys), self._layout.dimension)
        self._vectors[first : self._used] = new
        self._slot_of.update(zip(keys.tolist(), range(first, self._used), strict=True))

    def drop(self, keys: Keys) -> None:
        """Let go of those of the keys that are there."""
        if self._slot_of:
            for key in keys.tolist():
                self._slot_of.pop(key, None)

    def scores(self, query: NDArray[np.float32], keys: Keys) -> Scores | None:
        """Similarities of the keys; None when one of them is not there."""
        slots = list(map(self._slot_of.get, keys.tolist()))
        if None in slots:
            return None
        gathered = self._vectors.take(np.array(slots, np.int64), axis=0)
        layout = self._layout
        if layout.quantization == "f16":
            vectors = widened(gathered.data)
        else:
            vectors = layout.comparable(gathered.view(np.float32))
        return layout.similarities(vectors.reshape(gathered.shape), query)
