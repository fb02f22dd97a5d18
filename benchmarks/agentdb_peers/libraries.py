"""Index libraries without a database around them, and numpy's linear scan. They return row numbers alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentdb_peers.rows import DIMENSION, KINDS, TENANT, K, Query, Rows, row_id, value_of
from agentdb_peers.system import System


class Library(System):
    """Kept in files when it is closed after loading, and only then: none stores anything by itself."""

    fresh = False

    def create(self) -> None:
        self.fresh = True

    def close(self) -> None:
        if self.fresh:
            self.save()
        self.fresh = False

    @abstractmethod
    def save(self) -> None:
        """Write the files that `open` reads."""


def _only_numbers(numbers: Sequence[int]) -> Sequence[tuple[str, str, Any]]:
    return [(row_id(number), "", None) for number in numbers]


def _members(count: int) -> dict[tuple[str, int], np.ndarray[Any, np.dtype[np.int64]]]:
    """(attribute, value) → numbers of the rows that have it."""
    found: dict[tuple[str, int], np.ndarray[Any, np.dtype[np.int64]]] = {}
    for kind in KINDS[1:]:
        values = np.array([value_of(kind, number) for number in range(count)])
        for value in np.unique(values).tolist():
            found[kind, value] = np.flatnonzero(values == value)
    return found


class Hnswlib(Library):
    """The graph alone; filters are Python functions that it calls for each row it meets."""

    name = "hnswlib"
    about = (
        "bare: M 16, ef_construction 100, ef 24; no rows or durability; an index of the tenant's own, ef 96"
    )
    ef = 24

    def imports(self) -> None:
        import hnswlib

        self._lib = hnswlib

    def load(self, rows: Rows) -> None:
        self._indexes: dict[str, Any] = {}
        numbers = np.arange(rows.count)
        of_tenant = np.flatnonzero([value_of("tenant", number) == TENANT for number in range(rows.count)])
        for name, members in (("all", numbers), ("tenant", of_tenant)):
            index = self._lib.Index(space="cosine", dim=DIMENSION)
            index.init_index(max_elements=len(members), M=16, ef_construction=100)
            index.set_num_threads(1)
            index.add_items(rows.vectors[members] if name == "tenant" else rows.vectors, members)
            index.set_ef(self.ef if name == "all" else 4 * self.ef)
            self._indexes[name] = index

    def save(self) -> None:
        for name, index in self._indexes.items():
            index.save_index(str(self.folder / f"{name}.hnsw"))

    def open(self) -> None:
        self._indexes = {}
        for name in ("all", "tenant"):
            index: Any = self._lib.Index(space="cosine", dim=DIMENSION)
            index.load_index(str(self.folder / f"{name}.hnsw"))
            index.set_num_threads(1)
            index.set_ef(self.ef if name == "all" else 4 * self.ef)
            self._indexes[name] = index

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        index = self._indexes["tenant" if query.kind == "tenant" else "all"]
        where = None
        if query.kind in ("tenth", "hundredth"):
            kind, value = query.kind, query.value

            def where(number: int) -> bool:
                return value_of(kind, number) == value

        try:
            numbers, _ = index.knn_query(query.vector, k=K, filter=where)
        except RuntimeError:
            # It found fewer than k under the filter, and then gives none of them.
            return []
        return _only_numbers(numbers[0].tolist())

    def index_bytes(self) -> int | None:
        return (self.folder / "all.hnsw").stat().st_size


class Turbovec(Library):
    """The codes alone, rescored with float16 rows in memory; filters are allow-lists kept by value."""

    name = "turbovec"
    about = "bare: 4 bits, 30 candidates rescored with float16 rows in memory; no texts or durability"

    def imports(self) -> None:
        import turbovec

        self._lib = turbovec

    def load(self, rows: Rows) -> None:
        self._index: Any = self._lib.IdMapIndex(DIMENSION, 4)
        self._rows = rows.vectors.astype(np.float16)
        self._index.add_with_ids(np.ascontiguousarray(rows.vectors), np.arange(rows.count, dtype=np.uint64))
        self._allowed = {key: members.astype(np.uint64) for key, members in _members(rows.count).items()}

    def save(self) -> None:
        np.save(self.folder / "rows.npy", self._rows)
        (self.folder / "codes").write_bytes(self._index.to_bytes())

    def open(self) -> None:
        self._rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        self._index = self._lib.IdMapIndex.from_bytes((self.folder / "codes").read_bytes())
        self._allowed = {key: members.astype(np.uint64) for key, members in _members(len(self._rows)).items()}

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        asked = query.vector[None, :]
        if query.kind == "all":
            _, found = self._index.search(asked, 30)
        else:
            _, found = self._index.search(asked, 30, allowlist=self._allowed[query.kind, query.value])
        numbers = found[0].astype(np.int64)
        scores = self._rows[numbers].astype(np.float32) @ query.vector
        return _only_numbers(numbers[np.argsort(-scores)[:K]].tolist())

    def index_bytes(self) -> int | None:
        return (self.folder / "codes").stat().st_size


class Numpy(Library):
    """A linear scan: one product of the float32 matrix with the query; filters pick rows of it first."""

    name = "numpy"
    about = "bare: float32 matrix in memory, matrix × query, argpartition; no rows, texts or durability"

    def imports(self) -> None:
        """Nothing more than numpy."""

    def load(self, rows: Rows) -> None:
        self._matrix = np.array(rows.vectors)
        self._allowed = _members(rows.count)

    def save(self) -> None:
        np.save(self.folder / "matrix.npy", self._matrix)

    def open(self) -> None:
        self._matrix = np.load(self.folder / "matrix.npy")
        self._allowed = _members(len(self._matrix))

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        if query.kind == "all":
            scores, members = self._matrix @ query.vector, None
        else:
            members = self._allowed[query.kind, query.value]
            scores = self._matrix[members] @ query.vector
        best = np.argpartition(-scores, K)[:K]
        best = best[np.argsort(-scores[best])]
        return _only_numbers((best if members is None else members[best]).tolist())
