"""Checking what callers bring, and turning rows of the file into values and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import apsw
import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.analysis import index_text
from agentic_flow.agentdb.index.layout import Layout
from agentic_flow.agentdb.names import check_namespace, check_tenant
from agentic_flow.core.db import rows
from agentic_flow.core.errors import DataCorrupted, InvalidInput, NotFound, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.vectors import Document, Item, Metric, Namespace, Quantization, Vector

ITEM_COLUMNS = (
    "items.key, items.id, items.text, items.metadata, items.version, items.created_at_s, "
    "items.updated_at_s, items.expires_at_s, items.valid_from_s, items.valid_until_s, "
    "iif(items.document_id IS NULL, NULL, (SELECT path FROM documents WHERE id = items.document_id))"
)
VECTOR_COLUMN = "(SELECT vector FROM vectors WHERE vectors.key = items.key)"
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
    quantization: Quantization
    callers_vectors: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.id, self.dimension, self.metric, self.quantization)


class PreparedItem(NamedTuple):
    """An item checked and encoded outside the writer thread, which only has to store it."""

    id: str
    text: str
    metadata: str
    expires_at_s: float | None
    valid_from_s: float | None
    valid_until_s: float | None
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
        "SELECT id, name, metric, dimension, embedder_id, quantization, callers_vectors FROM namespaces "
        "WHERE tenant = ? AND name = ?",
        (check_tenant(tenant), check_namespace(name)),
    )
    if not found:
        raise NotFound(f"there is no namespace {name!r}", hint="create it first")
    return _namespace_row(found[0])


def all_namespaces(connection: apsw.Connection) -> list[NamespaceRow]:
    """Every tenant's namespaces."""
    found = rows(
        connection,
        "SELECT id, name, metric, dimension, embedder_id, quantization, callers_vectors FROM namespaces",
    )
    return [_namespace_row(row) for row in found]


def _namespace_row(row: tuple[Any, ...]) -> NamespaceRow:
    return NamespaceRow(*row[:6], callers_vectors=bool(row[6]))


def read_namespaces(
    connection: apsw.Connection, tenant: str, now_s: float, name: str | None = None
) -> list[Namespace]:
    """The tenant's namespaces (or the one) with their counts, by name."""
    found = rows(
        connection,
        "SELECT name, dimension, metric, embedder_id, quantization, "
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
            quantization=quantization,
            items=items,
            documents=documents,
        )
        for name, dimension, metric, embedder, quantization, items, documents in found
    ]


def check_vectors(
    vectors: Sequence[Vector], layout: Layout, what: Callable[[int], str], *, embedded: bool = False
) -> NDArray[np.float32]:
    """The vectors as the index and the file can hold them, shape (len(vectors), dimension).

    Sums of squares stay within single precision. Under cosine, half precision stores the unit vector: nothing
    overflows and small values are not lost.

    Args:
        what: Names the vector of a position, for the error.
        embedded: The store's embedder made them, and they were stored before: they stay as they are, and a
            text without words has no direction.

    Raises:
        InvalidInput: wrong dimension, not finite, too large or, under cosine, without a direction.
    """
    for position, vector in enumerate(vectors):
        if len(vector) != layout.dimension:
            raise InvalidInput(
                f"{what(position)} has a vector of dimension {len(vector)!r}, the namespace has "
                f"{layout.dimension!r}",
                hint="embed it with the namespace's embedder",
            )
    data = b"".join(vector.data for vector in vectors)
    matrix = np.frombuffer(data, "<f4").reshape(len(vectors), layout.dimension)
    largest = np.abs(matrix).max(axis=1, initial=0.0)
    cosine, half = layout.metric == "cosine", layout.quantization == "f16"
    most = schema.HALF_ABS_MAX if half and not cosine else schema.VECTOR_ABS_MAX
    # NaN fails every comparison, so what is not surely right is wrong.
    good = largest <= most
    if cosine and not embedded:
        good &= largest >= schema.DIRECTION_ABS_MIN
    if not good.all():
        position = int(np.flatnonzero(~good)[0])
        raise _bad_vector(what(position), float(largest[position]), most)
    if cosine and half and not embedded:
        matrix = layout.comparable(matrix)
    return matrix


def check_query(vector: Vector, layout: Layout) -> NDArray[np.float32]:
    """A query's vector, comparable to the namespace's.

    Raises:
        InvalidInput: see `check_vectors`.
    """
    if len(vector) == layout.dimension:
        numbers = np.frombuffer(vector.data, "<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(numbers @ numbers)
        # The usual case at a glance: all is finite, and neither too large nor without a direction.
        if 1e-6 < squares < 1e6:
            if layout.metric != "cosine":
                return numbers
            return cast(NDArray[np.float32], numbers / np.float32(math.sqrt(squares)))
    return layout.comparable(check_vectors([vector], layout, lambda _: "the query"))[0]


def _bad_vector(what: str, largest: float, most: float) -> InvalidInput:
    if not math.isfinite(largest):
        return InvalidInput(
            f"{what} has a vector with NaN, infinite or too large values", hint="send finite float32 numbers"
        )
    if largest == 0:
        return InvalidInput(f"{what} has the zero vector", hint="cosine compares directions; it has none")
    return InvalidInput(
        f"{what} has a vector whose largest value is {largest!r}",
        hint=f"scale vectors to lengths near 1; values go up to {most:g}",
    )


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
    if not 0 <= item.version < 2**63:
        raise InvalidInput(f"item {item.id!r} has version {item.version!r}", hint="versions count from 0")
    for name in ("created_at_s", "updated_at_s", "expires_at_s", "valid_from_s", "valid_until_s"):
        time_s: float | None = getattr(item, name)
        if time_s is not None and not math.isfinite(time_s):
            raise InvalidInput(
                f"item {item.id!r} has {name} {time_s!r}", hint="give Unix seconds, or leave it out"
            )
    try:
        metadata = orjson.dumps(item.metadata)
    except (orjson.JSONEncodeError, TypeError) as error:
        raise InvalidInput(
            f"the metadata of item {item.id!r} cannot be stored: {error}",
            hint="use JSON values with string keys",
        ) from None
    # NaN and infinity are written as null; and keys with NUL are cut short by SQLite. Both are rare to see.
    if b"null" in metadata or b"\\u0000" in metadata:
        _check_json(item.metadata, item.id)
    if len(metadata) > schema.METADATA_MAX_BYTES:
        raise TooLarge(
            f"the metadata of item {item.id!r} has {len(metadata)!r} bytes",
            hint=f"at most {schema.METADATA_MAX_BYTES}",
        )
    return metadata


def _check_json(value: Any, item_id: str) -> None:
    """Raise InvalidInput for what JSON text would not hold as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(
            f"the metadata of item {item_id!r} holds {value!r}", hint="JSON has finite numbers; leave it out"
        )
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        for key, entry in entries.items():
            if "\0" in key:
                raise InvalidInput(
                    f"the metadata of item {item_id!r} has the key {key!r}", hint="use keys without NUL"
                )
            _check_json(entry, item_id)
    elif isinstance(value, list | tuple):
        for entry in cast(Sequence[Any], value):
            _check_json(entry, item_id)


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


def prepare(
    items: Sequence[Item], metadata: Sequence[bytes], vectors: NDArray[np.float32], layout: Layout
) -> list[PreparedItem]:
    """What the writer stores: bytes of the vectors, words of the texts."""
    stored = vectors.astype(layout.dtype).tobytes()
    size = layout.stored_bytes
    return [
        _prepared(item, encoded.decode(), stored[position * size : (position + 1) * size])
        for position, (item, encoded) in enumerate(zip(items, metadata, strict=True))
    ]


def _prepared(item: Item, metadata: str, vector: bytes) -> PreparedItem:
    return PreparedItem(
        item.id,
        item.text,
        metadata,
        item.expires_at_s,
        item.valid_from_s,
        item.valid_until_s,
        *text_words(item.text, item.metadata),
        vector,
    )


def text_words(text: str, metadata: Mapping[str, Any]) -> tuple[str, str, str]:
    """What the full-text table is given of an item: words of its symbol, its path and its text."""
    symbol, path = metadata.get("symbol"), metadata.get("path")
    return (
        index_text(symbol) if isinstance(symbol, str) else "",
        path_words(path) if isinstance(path, str) else "",
        index_text(text),
    )


def path_words(path: str) -> str:
    """The words of a path, its file ending left out: `.py` tells nothing among Python files."""
    head, dot, ending = path.rpartition(".")
    return index_text(head if dot and "/" not in ending else path)


def read_item(row: Sequence[Any], layout: Layout | None = None) -> Item:
    """The item of a row of ITEM_COLUMNS; with a layout VECTOR_COLUMN follows, and it has its vector."""
    vector = None
    if layout is not None:
        blob = row[-1]
        if layout.quantization == "f16":
            blob = np.frombuffer(blob, "<f2").astype("<f4").tobytes()
        vector = Vector(data=blob)
    # Everything was checked when it was stored; checking again would cost more than the rest of a search.
    return Item.trusted(
        id=row[1],
        text=row[2],
        metadata=read_metadata(row[1], row[3]),
        vector=vector,
        version=row[4],
        created_at_s=row[5],
        updated_at_s=row[6],
        expires_at_s=row[7],
        valid_from_s=row[8],
        valid_until_s=row[9],
        document=row[10],
    )


def read_metadata(item_id: str, metadata: str) -> JsonObject:
    """The metadata of a row.

    Raises:
        DataCorrupted: it is no JSON.
    """
    try:
        return orjson.loads(metadata)
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(
            f"the metadata of item {item_id!r} is broken: {error}", hint="restore the file from a backup"
        ) from error
