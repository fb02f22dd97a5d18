"""How a namespace's vectors are stored, made comparable and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import apsw
import numpy as np
from numpy.typing import NDArray

from agentic_flow.core.db import rows
from agentic_flow.core.products import inner_products
from agentic_flow.core.vectors import Metric

BLOCK_BYTES = 2**20
"""Size, as float32, of the vectors that are read and compared at a time: bounds the memory of anything that
walks a namespace."""
_BLOCK_ROWS_MAX = 4096

_HALF_BITS = np.uint32(0x8FFFE000).view(np.int32)
_HALF_FACTOR = np.float32(2.0**112)

Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]
Scores = NDArray[np.float32]
Read = Callable[[Keys], tuple[Keys, Vectors]]
"""Those of the keys that exist, in the order given, with their comparable vectors."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a namespace's vectors are stored and compared.

    Args:
        namespace_id: `namespaces.id`; never given out twice.
        dimension: Numbers of one vector.
        metric: What closeness means.
        quantization: "f32" or "f16", the numbers in the file.
    """

    namespace_id: int
    dimension: int
    metric: Metric
    quantization: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the file holds numbers."""
        return np.dtype("<f2" if self.quantization == "f16" else "<f4")

    @property
    def stored_bytes(self) -> int:
        """Bytes of one vector in the file."""
        return self.dimension * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows that are read and compared at a time."""
        return max(1, min(_BLOCK_ROWS_MAX, BLOCK_BYTES // (4 * self.dimension)))

    def decoded(self, blobs: list[bytes]) -> Vectors:
        """Stored vectors as float32, comparable, shape (len(blobs), dimension)."""
        data, shape = b"".join(blobs), (len(blobs), self.dimension)
        if self.quantization == "f16":
            return widened(data).reshape(shape)  # under cosine it is stored as the unit vector
        return self.comparable(np.frombuffer(data, self.dtype).reshape(shape))

    def comparable(self, vectors: Vectors) -> Vectors:
        """What `similarities` and the indexes expect of float32 vectors: unit ones under cosine."""
        if self.metric != "cosine":
            return vectors
        norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        return vectors / np.maximum(norms, np.float32(1e-30))

    def similarities(self, vectors: Vectors, query: NDArray[np.float32]) -> Scores:
        """Cosine, inner product or negative distance of comparable vectors to a comparable query."""
        if self.metric != "euclidean":
            return inner_products(vectors, query)
        scores = np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), self.block_rows):
            block = vectors[start : start + self.block_rows]
            scores[start : start + len(block)] = -np.linalg.norm(block - query, axis=1)
        return scores


def widened(halves: bytes | memoryview) -> Vectors:
    """Finite little-endian float16 numbers as float32: exactly `astype`, four times as fast.

    Sign, exponent and fraction are put where float32 has them; the exponents' different zeros are a factor.
    """
    bits = np.frombuffer(halves, "<i2").astype(np.int32)
    bits <<= 13
    bits &= _HALF_BITS
    numbers = bits.view(np.float32)
    numbers *= _HALF_FACTOR
    return numbers


def read_vectors(connection: apsw.Connection, layout: Layout, keys: Keys) -> tuple[Keys, Vectors]:
    """The comparable vectors of those keys that exist, in the order given.

    Args:
        keys: Of this namespace; distinct int64.
    """
    held, blobs = read_stored(connection, keys)
    if not blobs:
        return held, np.zeros((0, layout.dimension), np.float32)
    return held, layout.decoded(blobs)


def read_stored(connection: apsw.Connection, keys: Keys) -> tuple[Keys, list[bytes]]:
    """The vectors of those keys that exist, in the order given, as the file has them."""
    found = rows(
        connection,
        "SELECT v.key, v.vector FROM carray(?) AS c CROSS JOIN vectors AS v ON v.key = c.value",
        (bound_keys(keys),),
    )
    if len(found) < len(keys):
        keys = np.fromiter((key for key, _ in found), np.int64, len(found))
    return keys, [blob for _, blob in found]


def walk_vectors(
    connection: apsw.Connection, layout: Layout, keys: Keys | None = None
) -> Iterator[tuple[Keys, Vectors]]:
    """Every vector of the namespace (or of `keys`) in key order, in blocks."""
    if keys is None:
        keys = namespace_keys(connection, layout.namespace_id)
    return read_blocks(layout, keys, partial(read_vectors, connection, layout))


def read_blocks(layout: Layout, keys: Keys, read: Read) -> Iterator[tuple[Keys, Vectors]]:
    """The vectors of the keys that exist, in blocks."""
    for start in range(0, len(keys), layout.block_rows):
        block = read(keys[start : start + layout.block_rows])
        if len(block[0]):
            yield block


def namespace_exists(connection: apsw.Connection, namespace_id: int) -> bool:
    """Whether the namespace is there, in this transaction."""
    return bool(rows(connection, "SELECT 1 FROM namespaces WHERE id = ?", (namespace_id,)))


def namespace_keys(connection: apsw.Connection, namespace_id: int) -> Keys:
    """Keys of all items of a namespace, sorted; those that have expired and are still there included."""
    found = rows(connection, "SELECT key FROM items WHERE namespace_id = ?", (namespace_id,))
    keys = np.fromiter((key for (key,) in found), np.int64, len(found))
    keys.sort()
    return keys


def newest_sequence(connection: apsw.Connection, namespace_id: int) -> int:
    """Sequence of the namespace's last operation; once that is pruned, of the last one that is."""
    found = rows(connection, "SELECT max(sequence) FROM operations WHERE namespace_id = ?", (namespace_id,))
    if found[0][0] is not None:
        return found[0][0]
    return rows(connection, "SELECT coalesce(min(sequence), 1) - 1 FROM operations")[0][0]


def changes_since(connection: apsw.Connection, namespace_id: int, sequence: int) -> Keys | None:
    """Keys of rows that operations after `sequence` touched, sorted; None when the log no longer tells."""
    oldest: int | None = rows(connection, "SELECT min(sequence) FROM operations")[0][0]
    if oldest is None or sequence + 1 < oldest:
        return None
    found = rows(
        connection,
        "SELECT keys FROM operations WHERE namespace_id = ? AND sequence > ?",
        (namespace_id, sequence),
    )
    return np.unique(np.frombuffer(b"".join(keys for (keys,) in found), "<i8"))


def bound_keys(keys: Keys) -> Any:
    """The keys as one binding for `carray`, which takes no empty array; no row has the key -1."""
    return cast(Any, apsw).carray(np.ascontiguousarray(keys) if len(keys) else np.array([-1]))


def count_rows(connection: apsw.Connection, namespace_id: int) -> int:
    """Items of a namespace; those that have expired and are still there included."""
    return rows(connection, "SELECT count(*) FROM items WHERE namespace_id = ?", (namespace_id,))[0][0]


def changed_rows_since(connection: apsw.Connection, namespace_id: int, sequence: int) -> int:
    """Rows that the namespace's operations after `sequence` touched, each as often as it was."""
    return rows(
        connection,
        "SELECT coalesce(sum(length(keys)) / 8, 0) FROM operations WHERE namespace_id = ? AND sequence > ?",
        (namespace_id, sequence),
    )[0][0]


def operation_mark(connection: apsw.Connection, sequence: int) -> float:
    """When the operation was made, seconds since the epoch, which tells it from others; 0.0 without one."""
    found = rows(connection, "SELECT at_s FROM operations WHERE sequence = ?", (sequence,))
    return found[0][0] if found else 0.0


def spread(keys: Keys, count: int) -> Keys:
    """At most `count` of the keys, evenly spread."""
    return keys[np.unique(np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(np.int64))]
