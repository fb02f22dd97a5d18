"""Checking what callers bring, and turning rows of the file into values and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import apsw
import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.analysis import index_text
from agentic_flow.agentdb.names import check_namespace, check_tenant
from agentic_flow.agentdb.vector_cache import Layout
from agentic_flow.core.db import rows
from agentic_flow.core.errors import DataCorrupted, InvalidInput, NotFound, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.vectors import Document, Item, Metric, Namespace

CALLER = "caller"
"""`embedder_id` of namespaces whose vectors the caller brings."""


ITEM_COLUMNS = (
    "items.key, items.id, items.text, items.metadata, items.version, items.created_at_s, "
    "items.updated_at_s, items.expires_at_s, items.vector"
)
LIVE = "(items.expires_at_s IS NULL OR items.expires_at_s > ?)"
"""Condition of rows that have not expired; binds the time."""


@dataclass(frozen=True, slots=True)
class NamespaceRow:
    """A namespace as the file has it."""

    id: int
    name: str
    metric: Metric
    dimension: int
    embedder_id: str
    vector_format: str

    @property
    def layout(self) -> Layout:
        return Layout(self.id, self.dimension, self.metric, self.vector_format)

    @property
    def brings_vectors(self) -> bool:
        """Whether callers bring the vectors."""
        return self.embedder_id == CALLER


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """An item checked and encoded outside the writer thread, which only has to store it."""

    item: Item
    metadata: bytes
    symbol: str
    path: str
    words: str
    vector: bytes


def find_namespace(connection: apsw.Connection, tenant: str, name: str) -> NamespaceRow:
    """The namespace of this tenant.

    Raises:
        NotFound: the tenant has none of this name.
    """
    found = rows(
        connection,
        "SELECT id, name, metric, dimension, embedder_id, vector_format FROM namespaces "
        "WHERE tenant = ? AND name = ?",
        (check_tenant(tenant), check_namespace(name)),
    )
    if not found:
        raise NotFound(f"there is no namespace {name!r}", hint="create it first")
    return NamespaceRow(*found[0])


def read_namespaces(
    connection: apsw.Connection, tenant: str, now_s: float, name: str | None = None
) -> list[Namespace]:
    """The tenant's namespaces (or the one) with their counts, by name."""
    found = rows(
        connection,
        "SELECT name, dimension, metric, embedder_id, "
        # Both counts are answered by an index alone, however many items there are.
        "(SELECT count(*) FROM items WHERE namespace_id = namespaces.id) "
        "- (SELECT count(*) FROM items WHERE namespace_id = namespaces.id AND expires_at_s <= ?), "
        "(SELECT count(*) FROM documents WHERE namespace_id = namespaces.id) "
        "FROM namespaces WHERE tenant = ? AND (? IS NULL OR name = ?) ORDER BY name",
        (now_s, check_tenant(tenant), name, name),
    )
    return [
        Namespace(
            name=name,
            dimension=dimension,
            metric=metric,
            embedder_id=embedder,
            items=items,
            documents=documents,
        )
        for name, dimension, metric, embedder, items, documents in found
    ]


def check_vector(values: Sequence[float], layout: Layout, what: str) -> NDArray[np.float32]:
    """The vector as float32.

    Raises:
        InvalidInput: wrong dimension, not finite, or zero where the metric is cosine.
    """
    if len(values) != layout.dimension:
        raise InvalidInput(
            f"{what} has a vector of dimension {len(values)!r}, the namespace has {layout.dimension!r}",
            hint="embed it with the namespace's embedder",
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        vector = np.asarray(values, np.float32)
    if not np.isfinite(vector).all():
        raise InvalidInput(
            f"{what} has a vector with NaN, infinite or too large values", hint="send finite float32 numbers"
        )
    if layout.metric == "cosine" and not vector.any():
        raise InvalidInput(f"{what} has the zero vector", hint="cosine compares directions; it has none")
    return vector


def check_item(item: Item) -> bytes:
    """The item's metadata as JSON, once the item fits the limits.

    Raises:
        TooLarge: text or metadata are past their limit.
        InvalidInput: they hold what cannot be stored.
    """
    if _size(item.text, f"the text of item {item.id!r}") > schema.TEXT_MAX_BYTES:
        raise TooLarge(
            f"the text of item {item.id!r} has {len(item.text)!r} characters",
            hint=f"at most {schema.TEXT_MAX_BYTES} bytes; store it in pieces",
        )
    _size(item.id, "an item id")
    if "\0" in item.id:
        raise InvalidInput(f"item id {item.id!r} contains NUL", hint="use printable characters")
    if item.expires_at_s is not None and not math.isfinite(item.expires_at_s):
        raise InvalidInput(
            f"item {item.id!r} expires at {item.expires_at_s!r}", hint="give Unix seconds, or leave it out"
        )
    try:
        metadata = orjson.dumps(item.metadata)
    except (orjson.JSONEncodeError, TypeError) as error:
        raise InvalidInput(
            f"the metadata of item {item.id!r} cannot be stored: {error}",
            hint="use JSON values with string keys",
        ) from None
    if len(metadata) > schema.METADATA_MAX_BYTES:
        raise TooLarge(
            f"the metadata of item {item.id!r} has {len(metadata)!r} bytes",
            hint=f"at most {schema.METADATA_MAX_BYTES}",
        )
    return metadata


def json_list(texts: Sequence[str], what: str) -> str:
    """The texts as one binding for `json_each`.

    Raises:
        InvalidInput: one of them is no valid Unicode.
    """
    try:
        return orjson.dumps(list(texts)).decode()
    except (orjson.JSONEncodeError, TypeError) as error:
        raise InvalidInput(f"{what} cannot be read: {error}", hint="send valid Unicode") from None


def check_document(document: Document) -> None:
    """Raise InvalidInput or TooLarge unless the document can be stored, its chunks aside."""
    if len(document.chunks) > schema.CHUNKS_PER_DOCUMENT_MAX:
        raise TooLarge(
            f"document {document.path!r} has {len(document.chunks)!r} chunks",
            hint=f"at most {schema.CHUNKS_PER_DOCUMENT_MAX}",
        )
    _size(document.path, "a document path")
    mark = document.fingerprint
    if "\0" in document.path or not (0 <= mark.size_bytes < 2**63 and abs(mark.mtime_ns) < 2**63):
        raise InvalidInput(
            f"document {document.path!r} has an impossible path, size or time", hint="take them from the file"
        )


def _size(text: str, what: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidInput(f"{what} is no valid Unicode: {text[:50]!r}", hint="decode it properly") from None


def prepare(item: Item, metadata: bytes, vector: NDArray[np.float32], layout: Layout) -> PreparedItem:
    """What the writer stores: bytes of the vector, words of the text."""
    symbol, path = item.metadata.get("symbol"), item.metadata.get("path")
    return PreparedItem(
        item,
        metadata,
        index_text(symbol) if isinstance(symbol, str) else "",
        path_words(path) if isinstance(path, str) else "",
        index_text(item.text),
        vector.astype(layout.dtype).tobytes(),
    )


def path_words(path: str) -> str:
    """The words of a path, its file ending left out: `.py` tells nothing among Python files."""
    head, dot, ending = path.rpartition(".")
    return index_text(head if dot and "/" not in ending else path)


def read_item(row: tuple[Any, ...], layout: Layout | None = None) -> Item:
    """The item of a row of ITEM_COLUMNS; with its vector when a layout is given."""
    _, item_id, text, metadata, version, created_at_s, updated_at_s, expires_at_s, blob = row
    try:
        values = cast(JsonObject, orjson.loads(metadata))
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(
            f"the metadata of item {item_id!r} is broken: {error}", hint="restore the file from a backup"
        ) from error
    vector = None
    if layout is not None:
        vector = tuple(float(value) for value in np.frombuffer(blob, layout.dtype))
    return Item(
        id=item_id,
        text=text,
        metadata=values,
        vector=vector,
        version=version,
        created_at_s=created_at_s,
        updated_at_s=updated_at_s,
        expires_at_s=expires_at_s,
    )
