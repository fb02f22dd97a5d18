"""What a namespace is made with, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

import apsw

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.index.tiers import Indexes
from agentic_flow.agentdb.records import find_namespace, read_namespaces
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.ports import Embedder
from agentic_flow.core.vectors import Metric, Namespace, NamespaceStats, Quantization

CALLER = "caller"
"""`embedder_id` of namespaces whose callers bring vectors and do not say from where."""


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """What is fixed when a namespace is made. `callers_vectors`: whether every item must bring its own."""

    metric: Metric
    dimension: int
    embedder_id: str
    quantization: Quantization
    callers_vectors: bool

    def demand(self, has: Namespace, *, chosen: bool) -> None:
        """Raise Conflict unless the namespace is as specified.

        Args:
            chosen: Whether the quantization was asked for, not left to the store.
        """
        wanted = (self.metric, self.dimension, self.embedder_id)
        if (has.metric, has.dimension, has.embedder_id) == wanted and (
            not chosen or has.quantization == self.quantization
        ):
            return
        raise Conflict(
            f"namespace {has.name!r} exists with metric {has.metric!r}, dimension {has.dimension!r}, "
            f"embedder {has.embedder_id!r} and quantization {has.quantization!r}",
            hint=f"delete it to make it anew with {(*wanted, self.quantization)!r}, or ask for what it has",
        )


def namespace_spec(
    embedder: Embedder,
    metric: Metric,
    dimension: int | None,
    embedder_id: str | None,
    quantization: Quantization | None,
) -> NamespaceSpec:
    """The checked settings of a new namespace; see VectorStore.create_namespace.

    Raises:
        InvalidInput: one of them is out of range, or contradicts another.
    """
    if metric not in ("cosine", "dot", "euclidean"):
        raise InvalidInput(f"{metric!r} is no metric", hint="use cosine, dot or euclidean")
    if quantization not in (None, "f32", "f16"):
        raise InvalidInput(f"{quantization!r} is no quantization", hint="use f32 or f16")
    if dimension is None:
        if embedder_id not in (None, embedder.id):
            raise InvalidInput(
                f"this store embeds with {embedder.id!r}, not {embedder_id!r}",
                hint="give the dimension of the vectors that you bring",
            )
        # Vectors that can be made again from the text are kept in half the bytes.
        return NamespaceSpec(metric, embedder.dimension, embedder.id, quantization or "f16", False)
    if not 1 <= dimension <= schema.DIMENSION_MAX:
        raise InvalidInput(f"dimension {dimension!r} is out of range", hint=f"1 to {schema.DIMENSION_MAX}")
    if embedder_id is not None and not (
        0 < len(embedder_id) <= schema.KEY_CHARS_MAX and embedder_id.isprintable()
    ):
        raise InvalidInput(
            f"{embedder_id[: schema.KEY_CHARS_MAX]!r} names no embedder",
            hint=f"1 to {schema.KEY_CHARS_MAX} printable characters",
        )
    return NamespaceSpec(metric, dimension, embedder_id or CALLER, quantization or "f32", True)


def read_stats(
    connection: apsw.Connection, indexes: Indexes, tenant: str, now_s: float
) -> list[NamespaceStats]:
    """The tenant's namespaces by name, with what they take."""
    found: list[NamespaceStats] = []
    for namespace in read_namespaces(connection, tenant, now_s):
        row = find_namespace(connection, tenant, namespace.name)
        state = indexes.state(connection, row.layout)
        stored, text_bytes = rows(
            connection,
            "SELECT count(*), coalesce(sum(length(metadata) + octet_length(text)), 0) FROM items "
            "WHERE namespace_id = ?",
            (row.id,),
        )[0]
        sequence = rows(connection, "SELECT max(sequence) FROM operations WHERE namespace_id = ?", (row.id,))
        found.append(
            NamespaceStats(
                **namespace.model_dump(),
                tier=state.tier,
                index_lag=state.lag,
                index_bytes=state.size_bytes,
                vector_bytes=stored * row.layout.stored_bytes,
                text_bytes=text_bytes,
                sequence=sequence[0][0] or 0,
            )
        )
    return found
