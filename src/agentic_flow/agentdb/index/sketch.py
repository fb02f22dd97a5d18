"""Product-quantized sketches of every vector, one bit a number, looked through in the processor's registers.

Source: H. Jégou, M. Douze, C. Schmid, "Product Quantization for Nearest Neighbor Search" (2011), with the
look-up tables of F. André et al., "Cache locality is not enough" (VLDB 2015), as faiss does it ("fast scan").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.codes import untyped
from agentic_flow.agentdb.index.layout import Keys, Layout, Vectors

NUMBERS_AT_ONCE = 4
"""Numbers of a vector that share one of 16 centres, 4 bits."""
TRAINING_ROWS = 2048
TRAINING_ROUNDS = 5
WORN_SHARE = 0.2
"""Share of rows that are gone past which it should be made anew."""


class Sketch:
    """Sketches of comparable vectors in order of insertion; `keys[place]` is the item. What is removed stays
    behind, is passed over, and costs a little time until the sketch is made anew.

    Not safe for use while it changes: the owner holds a lock.

    Args:
        sample: Vectors to learn the centres from; TRAINING_ROWS of them are enough.
    """

    def __init__(self, layout: Layout, sample: Vectors) -> None:
        faiss = self._faiss = untyped("faiss")
        self._dimension = layout.dimension
        self._padded = -(-layout.dimension // NUMBERS_AT_ONCE) * NUMBERS_AT_ONCE
        metric = faiss.METRIC_L2 if layout.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        self._index: Any = faiss.IndexPQFastScan(self._padded, self._padded // NUMBERS_AT_ONCE, 4, metric)
        self._index.pq.cp.niter = TRAINING_ROUNDS
        # Its threads would mostly wait for each other, which costs ten times the CPU time; the setting is the
        # calling thread's alone.
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            self._index.train(self._wide(sample))
        finally:
            faiss.omp_set_num_threads(threads)
        self._keys = np.zeros(0, np.int64)
        self._gone = np.zeros(0, bool)
        self._used, self._dead = 0, 0
        self._place_of: dict[int, int] | None = {}

    def __len__(self) -> int:
        return self._used - self._dead

    def __contains__(self, key: int) -> bool:
        return key in self._places()

    @property
    def worn(self) -> bool:
        """Whether so much of it is gone that it should be made anew."""
        return self._dead > WORN_SHARE * max(len(self), 1)

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Take in comparable vectors of keys that are not there."""
        if not len(keys):
            return
        self._index.add(self._wide(vectors))
        first, self._used = self._used, self._used + len(keys)
        if self._used > len(self._keys):
            room = max(self._used, 2 * len(self._keys)) - first
            self._keys = np.concatenate([self._keys[:first], np.zeros(room, np.int64)])
            self._gone = np.concatenate([self._gone[:first], np.zeros(room, bool)])
        self._keys[first : self._used] = keys
        if self._place_of is not None:
            self._place_of.update(zip(keys.tolist(), range(first, self._used), strict=True))

    def remove(self, keys: Keys) -> None:
        """Pass over those of the keys that are there from now on."""
        places = self._places()
        gone = [place for place in (places.pop(key, None) for key in keys.tolist()) if place is not None]
        self._gone[gone] = True
        self._dead += len(gone)

    def nearest(self, query: NDArray[np.float32], count: int) -> Keys:
        """Keys of the `count` nearest by their sketches, best first."""
        return self.nearest_of_each(query[None, :], count)[0]

    def nearest_of_each(self, queries: Vectors, count: int) -> list[Keys]:
        """The same for several queries."""
        count = min(count, len(self))
        if not count:
            return [np.zeros(0, np.int64) for _ in queries]
        asked = count
        while True:
            # Should many of the nearest be gone, more are asked for until enough are left.
            asked = min(self._used, asked + (self._dead * asked // self._used + 8 if self._dead else 0))
            _, found = self._index.search(self._wide(queries), asked)
            if not self._dead:
                return [self._keys[places] for places in found]
            kept = [places[~self._gone[places]][:count] for places in found]
            if asked == self._used or all(len(places) == count for places in kept):
                return [self._keys[places] for places in kept]
            asked *= 2

    def parts(self) -> dict[str, bytes]:
        """What `from_parts` makes it again from."""
        return {
            "sketch": self._faiss.serialize_index(self._index).tobytes(),
            "sketch_keys": self._keys[: self._used].astype("<i8").tobytes(),
            "sketch_gone": np.packbits(self._gone[: self._used], bitorder="little").tobytes(),
        }

    @classmethod
    def from_parts(cls, layout: Layout, parts: dict[str, bytes]) -> Sketch:
        """The sketch of `parts`.

        Raises:
            ValueError: they do not fit together.
        """
        sketch = cls.__new__(cls)
        sketch._faiss = untyped("faiss")
        sketch._dimension = layout.dimension
        sketch._padded = -(-layout.dimension // NUMBERS_AT_ONCE) * NUMBERS_AT_ONCE
        try:
            sketch._index = sketch._faiss.deserialize_index(np.frombuffer(parts["sketch"], np.uint8))
            sketch._keys = np.frombuffer(parts["sketch_keys"], "<i8").astype(np.int64)
            gone = np.frombuffer(parts["sketch_gone"], np.uint8)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"no sketch: {error}") from error
        sketch._used = len(sketch._keys)
        if sketch._index.d != sketch._padded or sketch._index.ntotal != sketch._used:
            raise ValueError("the sketch and its keys do not belong together")
        if len(gone) != -(-sketch._used // 8):
            raise ValueError("the sketch and what is gone of it do not belong together")
        sketch._gone = np.unpackbits(gone, bitorder="little")[: sketch._used].astype(bool)
        sketch._dead = int(sketch._gone.sum())
        sketch._place_of = None
        return sketch

    def _places(self) -> dict[int, int]:
        """Place of each live key; made when something is first removed, since most processes only search."""
        if self._place_of is None:
            live = np.flatnonzero(~self._gone[: self._used])
            self._place_of = dict(zip(self._keys[live].tolist(), live.tolist(), strict=True))
        return self._place_of

    def _wide(self, vectors: Vectors) -> Vectors:
        if self._padded == self._dimension:
            return np.ascontiguousarray(vectors, np.float32)
        wide = np.zeros((len(vectors), self._padded), np.float32)
        wide[:, : self._dimension] = vectors
        return wide
