"""Values of the vector store port: namespaces, items, documents, queries and hits."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, overload

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, StringConstraints
from pydantic_core import core_schema

from agentic_flow.core.messages import Frozen, JsonObject

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}$")]
"""A namespace or tenant name."""

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=1024)]

Metric = Literal["cosine", "dot", "euclidean"]

Quantization = Literal["f32", "f16"]
"""How a store keeps the numbers of a namespace's vectors: 4 or 2 bytes each."""

IndexTier = Literal["exact", "scan", "graph", "text"]
"""What answered a search: every vector compared, a scan of quantized vectors or a graph (both rescored with
the stored vectors), or full text alone."""


class Vector(Sequence[float]):
    """An immutable float32 vector in 4 bytes a number, wherever it came from.

    In models it is read from a list of numbers, from base64 of little-endian float32, or from anything with
    numpy's array interface; it is written as a list, or as base64 under the context `{"vectors": "base64"}`.
    Values past float32 become infinite, which stores refuse.

    Args:
        values: Numbers; or `data`, their little-endian float32 bytes.
    """

    __slots__ = ("data",)

    data: bytes
    """Little-endian float32; `numpy.frombuffer(vector.data, "<f4")` reads it without a copy."""

    def __init__(self, values: Sequence[float] = (), *, data: bytes | None = None) -> None:
        if data is None:
            packed = array("f", values)
            if sys.byteorder == "big":
                packed.byteswap()
            data = packed.tobytes()
        elif len(data) % 4:
            raise ValueError(f"{len(data)} bytes are no float32 numbers, which take 4 each")
        object.__setattr__(self, "data", data)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a vector cannot be changed ({name})")

    @classmethod
    def read(cls, value: Any) -> Self:
        """The vector in a value of any of the accepted kinds.

        Raises:
            ValueError: it is none.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                return cls(data=base64.b64decode(value, validate=True))
            except binascii.Error:
                raise ValueError("the text is no base64 of float32 numbers") from None
        try:
            if hasattr(value, "__array_interface__"):
                if value.ndim != 1:
                    raise ValueError(f"an array of {value.ndim} dimensions is no vector")
                return cls(data=value.astype("<f4").tobytes())
            return cls(value)
        except TypeError:
            raise ValueError("a vector is a list of numbers, or base64 of float32") from None

    def base64(self) -> str:
        """The numbers as base64 of little-endian float32."""
        return base64.b64encode(self.data).decode()

    def floats(self) -> tuple[float, ...]:
        """The numbers."""
        return tuple(self._array())

    def _array(self) -> array[float]:
        unpacked = array("f", self.data)
        if sys.byteorder == "big":
            unpacked.byteswap()
        return unpacked

    def __len__(self) -> int:
        return len(self.data) // 4

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...
    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        if isinstance(index, slice):
            return self.floats()[index]
        return self._array()[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self._array())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Vector):
            return self.data == other.data
        return isinstance(other, list | tuple) and self.floats() == tuple(other)  # pyright: ignore[reportUnknownArgumentType] - compared as it is

    def __hash__(self) -> int:
        return hash(self.data)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.data,)

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.6g}" for value in self[:4])
        return f"Vector({shown}{', …' if len(self) > 4 else ''}; {len(self)})"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                _written, info_arg=True, when_used="json"
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}},
                {"type": "string", "contentEncoding": "base64", "description": "Little-endian float32."},
            ]
        }


def _unpickled(data: bytes) -> Vector:
    return Vector(data=data)


def _written(vector: Vector, info: SerializationInfo) -> str | tuple[float, ...]:
    context: dict[str, Any] = info.context or {}
    return vector.base64() if context.get("vectors") == "base64" else vector.floats()


class Namespace(Frozen):
    """A set of items with one embedder, one dimension and one metric, fixed when it is created."""

    name: Name
    dimension: int
    metric: Metric = "cosine"
    embedder_id: str
    quantization: Quantization = "f32"
    items: int = 0
    documents: int = 0


class Item(Frozen):
    """One stored row. Without a `vector` the store embeds `text` with the namespace's embedder.

    `version` is 1 on insert and grows by one with each change; pass `expected_version` to an upsert to be
    refused when somebody else was faster (0 demands that the item does not exist).

    Times are Unix seconds. Past `expires_at_s` (time to live) the item is gone. Searches see it from
    `valid_from_s` (included) until `valid_until_s` (not included), by default at the time of the search.
    `document` is the path of the document that the item is a chunk of; stores set it, nobody sends it.
    """

    id: ItemId
    text: str = ""
    metadata: JsonObject = Field(default_factory=dict[str, Any])
    vector: Vector | None = None
    version: int = 0
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    expires_at_s: float | None = None
    valid_from_s: float | None = None
    valid_until_s: float | None = None
    document: str | None = None


class Fingerprint(Frozen):
    """What tells whether a file changed: its size and times, and the hash of what was ingested."""

    size_bytes: int
    mtime_ns: int
    sha256: str


class Document(Frozen):
    """A source file and its chunks. Storing one replaces all chunks of the same path atomically.

    Chunk items carry `path`, `line_start` and `line_end` in their metadata; the store adds nothing.
    """

    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    fingerprint: Fingerprint
    chunks: tuple[Item, ...]


Filter = JsonObject
"""Metadata filter: `{"path": "a.py"}`, `{"size": {"gte": 3, "lt": 9}}`, `{"lang": {"in": ["py", "md"]}}`,
`{"note": {"exists": true}}`, `{"title": {"match": "red fox"}}`, `{"due": {"before": "2026-11-24T12:00Z"}}`,
combined by `{"and": […]}`, `{"or": […]}`, `{"not": {…}}`. Names that begin with @ are fields of the item
itself: `@id`, `@text`, `@version`, `@created_at_s`, `@updated_at_s`."""


class SearchQuery(Frozen):
    """What to look for.

    Give `text` (embedded by the namespace's embedder and matched by full text), a `vector`, or both.
    `mode`: "hybrid" fuses vector and full-text scores by z-score; "vector" and "text" use one side.
    `per_document` keeps at most that many hits of one document (0: no limit).
    `mmr_lambda` diversifies: 1 is pure relevance, lower values trade it for novelty.
    `fusion`: z-scores of both sides added up, or "rrf", reciprocal ranks.
    `exact` compares every vector instead of asking the index. `ef` is how many candidates an index looks at
    before the stored vectors decide (of a graph its beam, of a scan its short list); None: the store's.
    `at_s` asks for what is valid at that time instead of now.
    `explain` adds what fusion made of each side to the score parts.
    """

    text: str = ""
    vector: Vector | None = None
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    filter: Filter | None = None
    per_document: Annotated[int, Field(ge=0)] = 0
    mmr_lambda: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    fusion: Literal["zscore", "rrf"] = "zscore"
    exact: bool = False
    ef: Annotated[int, Field(ge=1, le=10_000)] | None = None
    at_s: float | None = None
    explain: bool = False


class Hit(Frozen):
    """A found item, its fused score (higher is better) and the parts that made it.

    `score_parts`: `text` is BM25, `vector` the similarity (cosine, inner product, negative distance),
    `document` what the rest of the hit's document adds; explained, also `text_z`, `vector_z` (or `text_rank`,
    `vector_rank` under reciprocal ranks) and `vector_weight`.
    """

    item: Item
    score: float
    score_parts: dict[str, float] = Field(default_factory=dict[str, float])


class SearchResult(Frozen):
    """Hits, best first; says which embedder served the query, whether it understands meaning, and what
    answered the vector side."""

    hits: tuple[Hit, ...]
    embedder_id: str
    semantic: bool
    mode: str
    tier: IndexTier = "exact"


class Page(Frozen):
    """One page of items in id order; pass `cursor` back for the next, None is the end."""

    items: tuple[Item, ...]
    cursor: str | None


class UpsertResult(Frozen):
    ids: tuple[str, ...]
    versions: tuple[int, ...]
    inserted: int
    updated: int


class NamespaceStats(Frozen):
    """What a namespace takes and how its index stands.

    `index_lag` counts committed changes that the index has not taken in yet (searches compare those rows one
    by one, so none is missed). Sizes are of what is stored, in bytes; None where the store cannot tell.

    `sequence` numbers the operations of all tenants together. From its gaps a tenant could count what the
    others do, so over HTTP only the operator (scope `platform:admin`) is told it, others get None. A store in
    the process always gives it: whoever has the data folder has everything in it.
    """

    name: Name
    items: int
    documents: int
    dimension: int
    metric: Metric
    embedder_id: str
    quantization: Quantization
    tier: IndexTier
    index_lag: int
    index_bytes: int | None
    vector_bytes: int
    text_bytes: int
    sequence: int | None = Field(
        description="Last operation of the namespace, in the numbers of the whole database; null for callers "
        "without the scope `platform:admin`."
    )
