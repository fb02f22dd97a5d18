"""A graph over a namespace's vectors (HNSW), for namespaces too large to be scanned in a blink.

Source: Y. Malkov, D. Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
Navigable Small World graphs" (arXiv 1603.09320), as built by faiss over 8-bit codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.codes import untyped
from agentic_flow.agentdb.index.layout import Keys, Layout, Vectors

LINKS = 16
"""Links of a node (M): more cost memory and time, fewer cost recall."""
BUILD_BEAM = 100
"""Candidates looked at when a node is linked (efConstruction)."""
TRAINING_ROWS = 20_000
REBUILD_SHARE = 0.2
"""Share of nodes whose rows are gone past which the graph is made anew."""


class Graph:
    """Nodes are numbered by insertion; `keys[node]` is the item. A row that is changed or deleted leaves a
    dead node behind, which still guides searches but is never an answer.

    Not safe for use while it changes: the owner holds a lock.
    """

    def __init__(self, layout: Layout, sample: Vectors) -> None:
        faiss = self._faiss = untyped("faiss")
        metric = faiss.METRIC_L2 if layout.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        kind = faiss.ScalarQuantizer.QT_8bit
        self._index: Any = faiss.IndexHNSWSQ(layout.dimension, kind, LINKS, metric)
        self._index.hnsw.efConstruction = BUILD_BEAM
        self._index.train(np.ascontiguousarray(sample, np.float32))
        self._keys: list[Keys] = []
        self._node_of: dict[int, int] = {}
        self._dead = np.zeros(0, np.uint8)
        self._deaths = 0

    @classmethod
    def build(cls, layout: Layout, sample: Vectors, blocks: Iterable[tuple[Keys, Vectors]]) -> Graph:
        """A graph of all vectors of the blocks.

        Args:
            sample: Some of them, to learn the range of the numbers from.
        """
        graph = cls(layout, sample)
        for keys, vectors in blocks:
            graph.add(keys, vectors)
        return graph

    @property
    def live(self) -> int:
        """Nodes that are answers."""
        return len(self._node_of)

    @property
    def worn(self) -> bool:
        """Whether so many nodes are dead that it should be made anew."""
        return self._deaths > REBUILD_SHARE * max(len(self._node_of), 1)

    def __contains__(self, key: int) -> bool:
        return key in self._node_of

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Take in comparable vectors of keys that are not there."""
        first = self._index.ntotal
        self._index.add(np.ascontiguousarray(vectors, np.float32))
        self._keys.append(keys)
        self._node_of.update(zip(keys.tolist(), range(first, first + len(keys)), strict=True))

    def remove(self, keys: Keys) -> None:
        """Declare the nodes of those keys that are there dead."""
        nodes = [node for node in (self._node_of.pop(key, None) for key in keys.tolist()) if node is not None]
        if not nodes:
            return
        wanted = -(-self._index.ntotal // 8)
        if len(self._dead) < wanted:
            self._dead = np.concatenate([self._dead, np.zeros(2 * wanted - len(self._dead), np.uint8)])
        for node in nodes:
            self._dead[node >> 3] |= 1 << (node & 7)
        self._deaths += len(nodes)

    def nearest(self, query: NDArray[np.float32], count: int, beam: int) -> Keys:
        """Keys of about the `count` nearest live nodes, best first; `beam` is efSearch."""
        if not self._node_of:
            return np.zeros(0, np.int64)
        faiss = self._faiss
        if self._deaths:
            wanted = -(-self._index.ntotal // 8)
            if len(self._dead) < wanted:
                self._dead = np.concatenate([self._dead, np.zeros(wanted - len(self._dead), np.uint8)])
            dead = faiss.IDSelectorBitmap(self._dead)
            params = faiss.SearchParametersHNSW(sel=faiss.IDSelectorNot(dead), efSearch=max(beam, count))
        else:
            params = faiss.SearchParametersHNSW(efSearch=max(beam, count))
        _, found = self._index.search(query[None, :], min(count, len(self._node_of)), params=params)
        nodes = found[0]
        return self._all_keys()[nodes[nodes >= 0]]

    def _all_keys(self) -> Keys:
        if len(self._keys) != 1:
            self._keys = [np.concatenate(self._keys)]
        return self._keys[0]

    def parts(self) -> dict[str, bytes]:
        """What `from_parts` makes it again from."""
        return {
            "graph": self._faiss.serialize_index(self._index).tobytes(),
            "graph_keys": self._all_keys().tobytes(),
            "graph_dead": self._dead.tobytes(),
        }

    @classmethod
    def from_parts(cls, layout: Layout, parts: dict[str, bytes]) -> Graph:
        """The graph of `parts`.

        Raises:
            ValueError: they do not fit together.
        """
        graph = cls.__new__(cls)
        graph._faiss = untyped("faiss")
        try:
            graph._index = graph._faiss.deserialize_index(np.frombuffer(parts["graph"], np.uint8))
            graph._index.hnsw.efConstruction = BUILD_BEAM
            keys = np.frombuffer(parts["graph_keys"], np.int64)
            dead = np.frombuffer(parts["graph_dead"], np.uint8).copy()
        except (RuntimeError, AttributeError, KeyError) as error:
            raise ValueError(f"no graph: {error}") from error
        if graph._index.d != layout.dimension or graph._index.ntotal != len(keys):
            raise ValueError("the graph and its keys do not belong together")
        graph._keys = [keys]
        graph._dead = dead
        bits = np.unpackbits(dead, bitorder="little")[: len(keys)]
        gone = np.zeros(len(keys), bool)
        gone[: len(bits)] = bits.astype(bool)
        graph._deaths = int(gone.sum())
        nodes = np.flatnonzero(~gone)
        graph._node_of = dict(zip(keys[nodes].tolist(), nodes.tolist(), strict=True))
        return graph
