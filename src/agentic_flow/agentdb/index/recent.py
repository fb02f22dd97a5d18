"""Stored vectors that were compared lately, in memory: candidates are decided without reading them again.

They are the file's bytes; of a small namespace, all of them, as float32: twice the memory, half the time.
They go as soon as the index takes in an operation that touched them. So they are what a transaction sees if,
and only if, it is of the operation that the index is of: the owner sees to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.layout import Keys, Layout, Scores, Vectors, widened

MEMORY_SHARE = 0.25
"""Share of the memory for indexes that those of one namespace may take."""
READY_MAX_BYTES = 64 * 2**20
"""Size of a namespace's vectors as float32 up to which all are kept, and kept so: with few rows, to decide
among the candidates is most of a search."""
_ROWS_MIN = 1024


class Recent:
    """Vectors by item key, as the file has them. Not safe for use while it changes: the owner holds a lock.

    Args:
        layout: Of the vectors.
        max_bytes: Size past which all are let go, and gathering begins anew.
        ready: Keep them as float32, ready to be compared.
    """

    def __init__(self, layout: Layout, max_bytes: int, *, ready: bool = False) -> None:
        self._layout = layout
        self.ready = ready
        kind = np.dtype(np.float32) if ready else np.dtype(f"<i{layout.dtype.itemsize}")
        self._rows_max = max_bytes // (layout.dimension * kind.itemsize)
        self._slot_of: dict[int, int] = {}
        # Room for all that is to be kept: the system gives memory as it is written to, and nothing is copied.
        self._vectors = np.zeros((self._rows_max if ready else 0, layout.dimension), kind)
        self._gathered = self._vectors[:0]
        self._free: list[int] = []
        self._used = 0

    @property
    def size_bytes(self) -> int:
        """Memory of it."""
        rows = self._used if self.ready else len(self._vectors)
        return rows * self._vectors.itemsize * self._layout.dimension

    def missing(self, keys: Keys) -> Keys:
        """Those of the keys that are not there."""
        slot_of = self._slot_of
        return np.array([key for key in keys.tolist() if key not in slot_of], np.int64)

    def bring(self, keys: Keys, stored: list[bytes]) -> None:
        """Take in the vectors of keys, but for those that are there: another search may have brought them."""
        missing = self.missing(keys)
        if len(missing) == len(keys):
            self._take(keys, self._kept(stored))
        elif len(missing):
            wanted = set(missing.tolist())
            chosen = [place for place, key in enumerate(keys.tolist()) if key in wanted]
            self._take(keys[chosen], self._kept([stored[place] for place in chosen]))

    @classmethod
    def of_rows(cls, layout: Layout, rows: int, most_bytes: int) -> Recent:
        """An empty one for a namespace of so many rows, with at most so much memory."""
        if 4 * layout.dimension * rows <= min(READY_MAX_BYTES, most_bytes):
            return cls(layout, READY_MAX_BYTES, ready=True)
        return cls(layout, most_bytes)

    def after(self, changed: Keys, keys: Keys, vectors: Vectors, rows: int) -> Recent | None:
        """What is left once the changed keys have become these; None when a namespace of so many rows is too
        large, by now, for all its vectors to be kept."""
        if self.ready and rows > self._rows_max:
            return None
        self.drop(changed)
        self.fill(keys, vectors)
        return self

    def fill(self, keys: Keys, vectors: Vectors) -> None:
        """Take in comparable vectors of keys that are not there; nothing, unless all are kept."""
        if self.ready and self._used + len(keys) - len(self._free) <= self._rows_max:
            self._take(keys, vectors)

    def comparable(self, keys: Keys) -> Vectors | None:
        """The comparable vectors of keys; None when one of them is not there, or they are kept otherwise."""
        slots = [slot for slot in map(self._slot_of.get, keys.tolist()) if slot is not None]
        if not self.ready or len(slots) < len(keys):
            return None
        return self._vectors.take(np.array(slots, np.int64), 0)

    def _kept(self, stored: list[bytes]) -> NDArray[Any]:
        """Vectors as they are kept, of what the file has."""
        if self.ready:
            return self._layout.decoded(stored)
        return np.frombuffer(b"".join(stored), self._vectors.dtype).reshape(
            len(stored), self._layout.dimension
        )

    def _take(self, keys: Keys, vectors: NDArray[Any]) -> None:
        if self._used + len(keys) - len(self._free) > self._rows_max:
            self._slot_of, self._free, self._used = {}, [], 0
            if len(keys) > self._rows_max:
                return
        again = min(len(keys), len(self._free))
        slots = [self._free.pop() for _ in range(again)]
        first, self._used = self._used, self._used + len(keys) - again
        slots.extend(range(first, self._used))
        if self._used > len(self._vectors):
            room = min(max(self._used, 2 * len(self._vectors), _ROWS_MIN), self._rows_max)
            grown = np.zeros((room, self._layout.dimension), self._vectors.dtype)
            grown[:first] = self._vectors[:first]
            self._vectors = grown
        self._vectors[slots] = vectors
        self._slot_of.update(zip(keys.tolist(), slots, strict=True))

    def drop(self, keys: Keys) -> None:
        """Let go of those of the keys that are there."""
        if self._slot_of:
            for key in keys.tolist():
                slot = self._slot_of.pop(key, None)
                if slot is not None:
                    self._free.append(slot)

    def scores(self, query: NDArray[np.float32], keys: Keys) -> Scores | None:
        """Similarities of the keys; None when one of them is not there."""
        slots = list(map(self._slot_of.get, keys.tolist()))
        if None in slots:
            return None
        if len(slots) > len(self._gathered):
            self._gathered = np.empty((2 * len(slots), self._layout.dimension), self._vectors.dtype)
        # Into memory that is there: to get pages from the system takes longer than to fill them.
        gathered = self._gathered[: len(slots)]
        self._vectors.take(np.array(slots, np.int64), 0, gathered, "clip")
        layout = self._layout
        if self.ready:
            return layout.similarities(gathered, query)
        if layout.quantization == "f16":
            vectors = widened(gathered.data)
        else:
            vectors = layout.comparable(gathered.view(np.float32))
        return layout.similarities(vectors.reshape(gathered.shape), query)
