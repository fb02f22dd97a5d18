"""Quantized vectors that are scanned as a whole: candidates for the stored vectors to decide among.

`TurbovecCodes` is the fast one (2 or 4 bits a number, SIMD), `FaissCodes` the fallback (16 bits) for what the
first cannot do: Euclidean distance and short vectors. Decision record 10 has the measurements.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.index.layout import Keys, Layout, Vectors
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.settings import AgentDBSettings, env_name

TURBOVEC_DIMENSION_MIN = 64
"""Fewer numbers leave 4-bit codes too little to tell vectors apart."""
BITS = 4
"""Bits a number of codes that nothing was measured for."""
_STEP = 8  # turbovec takes dimensions of whole steps; zeros fill the last one


def untyped(library: str) -> Any:
    """A library whose stubs, where it has any, say less than is true; imported when it is first needed."""
    return importlib.import_module(library)


def installable(settings: AgentDBSettings) -> AgentDBSettings:
    """Settings that the installed libraries can keep.

    Without faiss, as in the image of the swarm, `auto` means `exact`: every other tier takes part of it.

    Raises:
        InvalidSettings: faiss is not installed, and a setting asks for what needs it.
    """
    if find_spec("faiss") is not None:
        return settings
    for name, value, fit in (
        ("index", settings.index, ("auto", "exact")),
        ("scan_library", settings.scan_library, ("turbovec",)),
    ):
        if value not in fit:
            raise InvalidSettings(
                f"agentdb.{name} is {value!r}, which needs the library faiss, and that is not installed",
                hint=f"set {env_name(f'agentdb.{name}')}={fit[0]}, "
                f"or name a service that has it: {env_name('peers.agentdb_url')}",
            )
    return settings.model_copy(update={"index": "exact"})


class Codes(Protocol):
    """Quantized vectors by item key."""

    library: str
    bits: int
    """Bits a number."""

    def __len__(self) -> int: ...

    def __contains__(self, key: int) -> bool: ...

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Take in comparable vectors of keys that are not there."""
        ...

    def remove(self, keys: Keys) -> None:
        """Drop those of the keys that are there."""
        ...

    def nearest(self, query: NDArray[np.float32], count: int, allowed: Keys | None) -> Keys:
        """Keys of the `count` nearest by their codes (of `allowed` ones, sorted), best first."""
        ...

    def to_bytes(self) -> bytes: ...


def make_codes(layout: Layout, library: str, bits: int = BITS) -> Codes:
    """Empty codes for a namespace, by the library asked for where it can serve it.

    Args:
        bits: A number, where there is a choice: 2 or 4.
    """
    if library == "turbovec" and layout.metric != "euclidean" and layout.dimension >= TURBOVEC_DIMENSION_MIN:
        return TurbovecCodes(layout, bits=bits)
    return FaissCodes(layout)


def codes_from_bytes(layout: Layout, library: str, data: bytes) -> Codes:
    """What `to_bytes` gave.

    Raises:
        ValueError: it is not that.
    """
    kind = TurbovecCodes if library == "turbovec" else FaissCodes
    codes = kind(layout, data)
    if codes.library != library:
        raise ValueError(f"codes of {codes.library!r}, not {library!r}")
    return codes


class TurbovecCodes:
    """TurboQuant codes (arXiv 2504.19874) by turbovec."""

    library = "turbovec"

    def __init__(self, layout: Layout, data: bytes | None = None, bits: int = BITS) -> None:
        self._dimension = layout.dimension
        self._padded = -(-layout.dimension // _STEP) * _STEP
        kind: Any = untyped("turbovec").IdMapIndex
        self._index: Any = kind(self._padded, bits) if data is None else kind.from_bytes(data)
        self.bits: int = self._index.bit_width
        if self._index.dim not in (self._padded, None):
            raise ValueError(f"codes of dimension {self._index.dim!r}, not {self._padded!r}")

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: int) -> bool:
        return self._index.contains(key)

    def add(self, keys: Keys, vectors: Vectors) -> None:
        self._index.add_with_ids(self._wide(vectors), keys.astype(np.uint64))

    def remove(self, keys: Keys) -> None:
        for key in keys.tolist():
            self._index.remove(key)

    def nearest(self, query: NDArray[np.float32], count: int, allowed: Keys | None) -> Keys:
        if not len(self._index):
            return np.zeros(0, np.int64)
        wide = self._wide(query[None, :])
        if allowed is None:
            _, found = self._index.search(wide, count)
        elif not len(allowed):
            return np.zeros(0, np.int64)
        else:
            try:
                _, found = self._index.search(wide, count, allowlist=allowed.astype(np.uint64))
            except KeyError:  # some went while the caller's transaction still sees them
                contains = self._index.contains
                return self.nearest(
                    query, count, np.array([k for k in allowed.tolist() if contains(k)], np.int64)
                )
        return cast(Keys, found[0].astype(np.int64))

    def nearest_of_each(self, queries: Vectors, count: int, allowed: Keys | None) -> list[Keys]:
        """`nearest` for several queries, all of whose allowed keys are there."""
        chosen = None if allowed is None else allowed.astype(np.uint64)
        _, found = self._index.search(self._wide(queries), count, allowlist=chosen)
        return [keys.astype(np.int64) for keys in found]

    def to_bytes(self) -> bytes:
        return self._index.to_bytes()

    def _wide(self, vectors: Vectors) -> Vectors:
        if self._padded == self._dimension:
            return np.ascontiguousarray(vectors, np.float32)
        wide = np.zeros((len(vectors), self._padded), np.float32)
        wide[:, : self._dimension] = vectors
        return wide


class _Gate:
    """Many at once read what one at a time changes."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._reading = self._changing = 0

    @contextmanager
    def reading(self) -> Generator[None]:
        with self._state:
            while self._changing:  # whoever changes goes first, else searches without a gap would hold it up
                self._state.wait()
            self._reading += 1
        try:
            yield
        finally:
            with self._state:
                self._reading -= 1
                if not self._reading:
                    self._state.notify_all()

    @contextmanager
    def changing(self) -> Generator[None]:
        with self._state:
            self._changing += 1
            try:
                while self._reading:
                    self._state.wait()
                yield  # the lock is held: nobody begins to read
            finally:
                self._changing -= 1
                self._state.notify_all()


class FaissCodes:
    """Half-precision codes by faiss, with inner product or Euclidean distance.

    faiss lets go of the interpreter's lock and has none of its own: what searches read must not be moved.
    """

    library = "faiss"
    bits = 16

    def __init__(self, layout: Layout, data: bytes | None = None) -> None:
        faiss = self._faiss = untyped("faiss")
        self._dimension = layout.dimension
        self._metric = faiss.METRIC_L2 if layout.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        self._keys: set[int] = set()
        self._gate = _Gate()
        if data is None:
            self._index: Any = self._empty()
            return
        try:
            self._index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
            ids = faiss.vector_to_array(self._index.id_map)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"no faiss index: {error}") from error
        if self._index.d != self._dimension:
            raise ValueError(f"codes of dimension {self._index.d!r}, not {self._dimension!r}")
        self._keys = set(ids.tolist())

    def _empty(self) -> Any:
        faiss = self._faiss
        # Half precision needs no training, so codes never depend on which vectors came first.
        codes = faiss.IndexScalarQuantizer(self._dimension, faiss.ScalarQuantizer.QT_fp16, self._metric)
        return faiss.IndexIDMap2(codes)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def add(self, keys: Keys, vectors: Vectors) -> None:
        with self._gate.changing():
            self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), keys)
            self._keys.update(keys.tolist())

    def remove(self, keys: Keys) -> None:
        gone = [key for key in keys.tolist() if key in self._keys]
        if gone:
            with self._gate.changing():
                self._index.remove_ids(np.array(gone, np.int64))
                self._keys.difference_update(gone)

    def nearest(self, query: NDArray[np.float32], count: int, allowed: Keys | None) -> Keys:
        params = None
        if allowed is not None:
            params = self._faiss.SearchParameters(sel=self._faiss.IDSelectorBatch(allowed))
        with self._gate.reading():
            if not self._keys:
                return np.zeros(0, np.int64)
            _, found = self._index.search(query[None, :], min(count, len(self._keys)), params=params)
        return cast(Keys, found[0][found[0] >= 0])

    def to_bytes(self) -> bytes:
        with self._gate.reading():
            return self._faiss.serialize_index(self._index).tobytes()
