"""Namespaces and items as PostgreSQL has them, and the vectors between numpy and pgvector."""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pgvector import HalfVector
from psycopg import AsyncConnection

from agentic_flow.agentdb.index.layout import Layout
from agentic_flow.agentdb.names import check_namespace, check_tenant
from agentic_flow.agentdb.postgres.connections import fetch
from agentic_flow.agentdb.postgres.encoding import read_metadata, unescape
from agentic_flow.core.errors import NotFound
from agentic_flow.core.vectors import Item, Metric, Namespace, Quantization, Vector

GRAPH_DIMENSION_MAX = {"f32": 2000, "f16": 4000}
"""Most numbers of a vector that pgvector's graph index takes; longer ones are compared exactly."""
DIMENSION_MAX = 16_000
"""Most that its types hold."""

ITEM_COLUMNS = (
    "i.key, coalesce(i.long_id, i.id), i.text, i.metadata, i.version, i.created_at_s, i.updated_at_s, "
    "i.expires_at_s, i.valid_from_s, i.valid_until_s, "
    "(SELECT coalesce(d.long_path, d.path_key) FROM agentic_flow.documents AS d WHERE d.id = i.document_id)"
)
LIVE = "(i.expires_at_s IS NULL OR i.expires_at_s > %s)"
"""Condition of rows that have not expired; binds the time."""

_OPERATORS: dict[Metric, tuple[str, str]] = {
    "cosine": ("<=>", "cosine_ops"),
    "dot": ("<#>", "ip_ops"),
    "euclidean": ("<->", "l2_ops"),
}


@dataclass(frozen=True, slots=True)
class NamespaceRow:
    """A namespace as the database has it; `sequence` is that of the last call that changed it."""

    id: int
    name: str
    metric: Metric
    dimension: int
    embedder_id: str
    quantization: Quantization
    callers_vectors: bool
    shard: int
    sequence: int

    @property
    def layout(self) -> Layout:
        return Layout(self.id, self.dimension, self.metric, self.quantization)

    @property
    def graph(self) -> bool:
        """Whether it has a partition with a graph index of its own."""
        return self.shard != 0

    @property
    def may_have_graph(self) -> bool:
        return self.dimension <= GRAPH_DIMENSION_MAX[self.quantization]

    @property
    def index_type(self) -> str:
        return "vector" if self.quantization == "f32" else "halfvec"

    @property
    def index_operators(self) -> str:
        return _OPERATORS[self.metric][1]

    @property
    def column(self) -> str:
        """The column that holds its vectors."""
        return "wide" if self.quantization == "f32" else "half"

    @property
    def distance(self) -> str:
        """Distance of `i`'s vector to a bound one in full precision. No index has this expression."""
        operator = _OPERATORS[self.metric][0]
        exact = f"(i.{self.column}::vector {operator} %b::vector)"
        # The zero vector has no direction: pgvector calls its distance NaN, here it is no likeness at all.
        return f"coalesce(nullif({exact}, 'NaN'), 1)" if self.metric == "cosine" else exact

    @property
    def indexed_distance(self) -> str:
        """The distance by which the graph index orders."""
        kind = f"{self.index_type}({self.dimension})"
        return f"(i.{self.column}::{kind} {_OPERATORS[self.metric][0]} %b::{kind})"

    def similarities(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cosine, inner product or negative distance, from what `distance` gives."""
        return np.clip(1.0 - distances, -1.0, 1.0) if self.metric == "cosine" else -distances

    def bound(self, vector: NDArray[np.float32]) -> Any:
        """The vector as this namespace's column type."""
        return vector if self.quantization == "f32" else HalfVector(vector)


async def find_namespace(
    connection: AsyncConnection, tenant: str, name: str, *, lock: str = ""
) -> NamespaceRow:
    """The namespace of this tenant.

    Args:
        lock: A row lock to take, such as FOR KEY SHARE: the namespace then stays and keeps its partition.

    Raises:
        NotFound: the tenant has none of this name.
    """
    found = await fetch(
        connection,
        "SELECT n.id, n.name, n.metric, n.dimension, n.embedder_id, n.quantization, n.callers_vectors, "
        "n.shard, "
        "coalesce((SELECT max(o.sequence) FROM agentic_flow.operations AS o WHERE o.namespace_id = n.id), 0) "
        f"FROM agentic_flow.namespaces AS n WHERE n.tenant = %s AND n.name = %s {lock}",
        (check_tenant(tenant), check_namespace(name)),
    )
    if not found:
        raise NotFound(f"there is no namespace {name!r}", hint="create it first")
    return NamespaceRow(*found[0])


async def read_namespaces(
    connection: AsyncConnection, tenant: str, now_s: float, name: str | None = None
) -> list[Namespace]:
    """The tenant's namespaces (or the one) with their counts, by name."""
    found = await fetch(
        connection,
        "SELECT n.name, n.dimension, n.metric, n.embedder_id, n.quantization, "
        "(SELECT count(*) FROM agentic_flow.items AS i WHERE i.shard = n.shard AND i.namespace_id = n.id) "
        "- (SELECT count(*) FROM agentic_flow.items AS i WHERE i.shard = n.shard AND i.namespace_id = n.id "
        "AND i.expires_at_s <= %s), "
        "(SELECT count(*) FROM agentic_flow.documents AS d WHERE d.namespace_id = n.id) "
        "FROM agentic_flow.namespaces AS n WHERE n.tenant = %s AND (%s::text IS NULL OR n.name = %s) "
        "ORDER BY n.name",
        (now_s, check_tenant(tenant), name, name),
    )
    return [
        Namespace(
            name=name,
            dimension=dimension,
            metric=metric,
            embedder_id=embedder,
            quantization=quantization,
            items=items,
            documents=documents,
        )
        for name, dimension, metric, embedder, quantization, items, documents in found
    ]


def item_columns(namespace: NamespaceRow, *, vectors: bool) -> str:
    """Columns for `read_item`."""
    return f"{ITEM_COLUMNS}, {sent_vector(namespace)}" if vectors else ITEM_COLUMNS


def sent_vector(namespace: NamespaceRow) -> str:
    """The vector as bytes: for large numbers of numbers much faster than as text."""
    return f"{namespace.index_type}_send(i.{namespace.column})"


def read_vector(namespace: NamespaceRow, sent: bytes) -> NDArray[np.float32]:
    """The vector in the bytes of `sent_vector`: two 16-bit integers, then big-endian numbers."""
    numbers = np.frombuffer(sent, ">f4" if namespace.quantization == "f32" else ">f2", offset=4)
    return numbers.astype("<f4")


def read_item(namespace: NamespaceRow, row: Sequence[Any], *, vectors: bool) -> Item:
    """The item of a row of `item_columns`."""
    item_id = unescape(row[1])
    # Everything was checked when it was stored; checking again would cost more than the rest of a search.
    return Item.model_construct(
        id=item_id,
        text=unescape(row[2]),
        metadata=read_metadata(item_id, row[3]),
        vector=Vector(data=read_vector(namespace, row[-1]).tobytes()) if vectors else None,
        version=row[4],
        created_at_s=row[5],
        updated_at_s=row[6],
        expires_at_s=row[7],
        valid_from_s=row[8],
        valid_until_s=row[9],
        document=None if row[10] is None else unescape(row[10]),
    )
