"""Values of the vector store port: namespaces, items, documents, queries and hits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from agentic_flow.core.messages import Frozen, JsonObject

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}$")]
"""A namespace or tenant name."""

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=1024)]

Metric = Literal["cosine", "dot", "euclidean"]


class Namespace(Frozen):
    """A set of items with one embedder, one dimension and one metric, fixed when it is created."""

    name: Name
    dimension: int
    metric: Metric = "cosine"
    embedder_id: str
    items: int = 0
    documents: int = 0


class Item(Frozen):
    """One stored row. Without a `vector` the store embeds `text` with the namespace's embedder.

    `version` is 1 on insert and grows by one with each change; pass `expected_version` to an upsert to be
    refused when somebody else was faster (0 demands that the item does not exist).
    """

    id: ItemId
    text: str = ""
    metadata: JsonObject = Field(default_factory=dict[str, Any])
    vector: tuple[float, ...] | None = None
    version: int = 0
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    expires_at_s: float | None = None


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
`{"note": {"exists": true}}`, combined by `{"and": […]}`, `{"or": […]}`, `{"not": {…}}`."""


class SearchQuery(Frozen):
    """What to look for.

    Give `text` (embedded by the namespace's embedder and matched by full text), a `vector`, or both.
    `mode`: "hybrid" fuses vector and full-text scores by z-score; "vector" and "text" use one side.
    `per_document` keeps at most that many hits of one document (0: no limit).
    `mmr_lambda` diversifies: 1 is pure relevance, lower values trade it for novelty.
    """

    text: str = ""
    vector: tuple[float, ...] | None = None
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    filter: Filter | None = None
    per_document: Annotated[int, Field(ge=0)] = 0
    mmr_lambda: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class Hit(Frozen):
    """A found item, its fused score (higher is better) and the parts that made it."""

    item: Item
    score: float
    score_parts: dict[str, float] = Field(default_factory=dict[str, float])


class SearchResult(Frozen):
    """Hits, best first; says which embedder served the query and whether it understands meaning."""

    hits: tuple[Hit, ...]
    embedder_id: str
    semantic: bool
    mode: str


class Page(Frozen):
    """One page of items in id order; pass `cursor` back for the next, None is the end."""

    items: tuple[Item, ...]
    cursor: str | None


class UpsertResult(Frozen):
    ids: tuple[str, ...]
    versions: tuple[int, ...]
    inserted: int
    updated: int
