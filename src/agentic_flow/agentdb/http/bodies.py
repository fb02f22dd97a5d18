"""What goes over AgentDB's HTTP, as models that also make its schema: bodies, parameters and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.config import ConfigDict

from agentic_flow.agentdb import schema
from agentic_flow.core.messages import Frozen
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    NamespaceStats,
    Quantization,
    SearchQuery,
    SearchResult,
)

VectorFormat = Literal["list", "base64", "none"]

# Bodies


class NamespaceSpec(Frozen):
    """A namespace to make. Without a dimension the database's embedder serves it."""

    metric: Metric = "cosine"
    dimension: Annotated[int, Field(ge=1, le=schema.DIMENSION_MAX)] | None = None
    embedder_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    quantization: Quantization | None = None


class Upsert(Frozen):
    """Items to insert or replace, all or none; the idempotency key is a header."""

    items: tuple[Item, ...]
    expected_version: Annotated[int, Field(ge=0)] | None = None
    embedder_id: str | None = None


class Restore(Frozen):
    """Items to store exactly as they are, and the documents that they are chunks of."""

    items: tuple[Item, ...]
    documents: dict[str, Fingerprint] = Field(default_factory=dict[str, Fingerprint])


class Ids(Frozen):
    """Items to read."""

    ids: tuple[str, ...]


def _exactly_one(shape: dict[str, Any]) -> None:
    ids, where = (shape["properties"][name]["anyOf"][0] for name in ("ids", "where"))
    shape["oneOf"] = [
        {"properties": {"ids": ids}, "required": ["ids"], "additionalProperties": False},
        {
            "properties": {"where": {**where, "minProperties": 1}},
            "required": ["where"],
            "additionalProperties": False,
        },
    ]
    del shape["properties"]
    shape.pop("additionalProperties", None)


class Deletion(Frozen):
    """Items to delete: exactly one of `ids` and `where`."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    ids: tuple[str, ...] | None = None
    where: Filter | None = None


class Listing(Frozen):
    """A page to read."""

    where: Filter | None = None
    cursor: str | None = None
    limit: Annotated[int, Field(ge=1, le=schema.PAGE_ITEMS_MAX)] = 100
    vectors: bool = False


class Queries(Frozen):
    """Searches to answer from one snapshot."""

    queries: tuple[SearchQuery, ...]


class Documents(Frozen):
    """Documents to replace, all or none."""

    documents: tuple[Document, ...]


class Paths(Frozen):
    """Documents to delete."""

    paths: tuple[str, ...]


# Query parameters


class VectorOptions(Frozen):
    """How vectors are written."""

    vector_format: VectorFormat = Field(
        default="list", description="How vectors are written: numbers, base64 of float32, or left out."
    )


class SearchOptions(VectorOptions):
    """Fields of a SearchQuery for bodies that are bare vectors; given with JSON, they win over its fields."""

    k: Annotated[int, Field(ge=1, le=1000)] | None = Field(default=None, description="Hits wanted.")
    ef: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="Candidates that an index looks at."
    )
    exact: bool | None = Field(default=None, description="Compare every vector.")
    mode: Literal["hybrid", "vector", "text"] | None = Field(
        default=None, description="Which sides of the search take part."
    )


class BatchOptions(SearchOptions):
    """The same for several vectors in one body."""

    queries: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How many vectors a body of bare numbers holds, one after the other."
    )


class ImportOptions(Frozen):
    """How lines are taken."""

    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="At a line that is refused: end there, or go on without it."
    )
    mode: Literal["upsert", "restore"] = Field(
        default="upsert",
        description="upsert: the store sets version and times; restore: items are kept exactly as they are.",
    )
    embedder_id: str | None = Field(default=None, description="What made the vectors; checked.")


# Answers


class NamespaceList(Frozen):
    namespaces: tuple[Namespace, ...]


class TenantList(Frozen):
    tenants: tuple[str, ...]


class StatsList(Frozen):
    stats: tuple[NamespaceStats, ...]


class Erased(Frozen):
    """How many items were removed."""

    items: int


class WasDeleted(Frozen):
    """Whether there was one to delete."""

    deleted: bool


class Deleted(Frozen):
    """How many there were to delete."""

    deleted: int


class Restored(Frozen):
    """How many items were stored."""

    restored: int


class ItemList(Frozen):
    items: tuple[Item, ...]


class SearchResults(Frozen):
    """One result per query, in their order."""

    results: tuple[SearchResult, ...]


class Chunks(Frozen):
    """How many chunks were stored."""

    chunks: int


class FingerprintMap(Frozen):
    """Path → fingerprint."""

    documents: dict[str, Fingerprint]


class RefusedLine(Frozen):
    """A line that was not stored, and why. Lines count from 1."""

    line: int
    code: str
    reason: str


class ImportReport(Frozen):
    """What became of an import: everything counted as inserted, updated or restored is durable.

    `refused` counts all of the lines that were not stored; `errors` names the first of them.
    """

    lines: int = 0
    items: int = 0
    inserted: int = 0
    updated: int = 0
    batches: int = 0
    refused: int = 0
    errors: tuple[RefusedLine, ...] = ()


class ExportedDocuments(Frozen):
    """A line of an export: documents of which the items that follow are chunks."""

    documents: dict[str, Fingerprint]


class ExportEnd(Frozen):
    """The last line of an export: how many items it holds. An export without it was cut."""

    end: Literal[True]
    count: Annotated[int, Field(ge=0)]


ExportLine = Item | ExportedDocuments | ExportEnd
