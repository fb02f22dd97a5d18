"""What changes rows: functions for the writer thread, each within the caller's transaction.

Every change of an item also changes its full-text row and leaves an operation, so that a derived index can
tell what it has not seen.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import apsw
import orjson

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.analysis import index_text
from agentic_flow.agentdb.records import NamespaceRow, PreparedItem, path_words
from agentic_flow.core.db import execute_many, rows
from agentic_flow.core.errors import Conflict
from agentic_flow.core.vectors import Fingerprint, UpsertResult


@dataclass(frozen=True, slots=True)
class PreparedDocument:
    """A document whose chunks are checked, embedded and cut into words."""

    path: str
    fingerprint: Fingerprint
    items: tuple[PreparedItem, ...]


def upsert_items(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    prepared: Sequence[PreparedItem],
    expected_version: int | None,
    now_s: float,
) -> UpsertResult:
    """Insert or replace items one by one.

    Raises:
        Conflict: an item is not at `expected_version`.
    """
    purge_expired(connection, namespace, now_s)
    stored = _stored(connection, namespace, [item.item.id for item in prepared], now_s)
    versions: list[int] = []
    documents: set[int] = set()
    for new in prepared:
        key, version, created_at_s, document_id = stored.get(new.item.id, (None, 0, now_s, None))
        if expected_version is not None and version != expected_version:
            raise Conflict(
                f"item {new.item.id!r} is at version {version!r}, not {expected_version!r}",
                hint="read it again and repeat the change",
            )
        if key is not None:
            _delete_text(connection, namespace, [key])
        key = _store(connection, namespace, new, key, version + 1, created_at_s, now_s, document_id)
        _log(connection, namespace, "upsert", [key], now_s)
        versions.append(version + 1)
        if document_id is not None:
            documents.add(document_id)
    reindex_documents(connection, namespace, documents)
    inserted = sum(version == 1 for version in versions)
    return UpsertResult(
        ids=tuple(new.item.id for new in prepared),
        versions=tuple(versions),
        inserted=inserted,
        updated=len(versions) - inserted,
    )


def delete_keys(
    connection: apsw.Connection, namespace: NamespaceRow, keys: Sequence[int], now_s: float
) -> None:
    """Remove these items; the documents they belong to keep the rest."""
    wanted = orjson.dumps(list(keys)).decode()
    documents = {
        document
        for (document,) in rows(
            connection,
            "SELECT DISTINCT document_id FROM items WHERE document_id IS NOT NULL "
            "AND key IN (SELECT value FROM json_each(?))",
            (wanted,),
        )
    }
    _delete_text(connection, namespace, keys)
    rows(connection, "DELETE FROM items WHERE key IN (SELECT value FROM json_each(?))", (wanted,))
    _log(connection, namespace, "delete", keys, now_s)
    reindex_documents(connection, namespace, documents)


def put_document(
    connection: apsw.Connection, namespace: NamespaceRow, document: PreparedDocument, now_s: float
) -> int:
    """Replace a document's chunks. Returns how many there are now.

    A document whose content is the stored one (equal sha256) and that comes without chunks keeps those it
    has: only its fingerprint is refreshed.

    Raises:
        Conflict: a chunk's id belongs to an item outside this document.
    """
    mark = document.fingerprint
    found = rows(
        connection,
        "SELECT id, sha256 FROM documents WHERE namespace_id = ? AND path = ?",
        (namespace.id, document.path),
    )
    refreshed = bool(found) and found[0][1] == mark.sha256 and not document.items
    if found and not refreshed:
        keys = _document_keys(connection, found[0][0])
        _delete_text(connection, namespace, keys)
        rows(connection, "DELETE FROM items WHERE document_id = ?", (found[0][0],))
        _log(connection, namespace, "delete", keys, now_s)
    document_id: int = rows(
        connection,
        "INSERT INTO documents (namespace_id, path, size_bytes, mtime_ns, sha256, updated_at_s) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (namespace_id, path) DO UPDATE SET "
        "size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns, sha256 = excluded.sha256, "
        "updated_at_s = excluded.updated_at_s RETURNING id",
        (namespace.id, document.path, mark.size_bytes, mark.mtime_ns, mark.sha256, now_s),
    )[0][0]
    if refreshed:
        return len(_document_keys(connection, document_id))
    try:
        keys = [
            _store(connection, namespace, item, None, 1, now_s, now_s, document_id) for item in document.items
        ]
    except apsw.ConstraintError:
        raise Conflict(
            f"a chunk id of document {document.path!r} belongs to another item",
            hint="prefix chunk ids with the document's path",
        ) from None
    _log(connection, namespace, "upsert", keys, now_s)
    _index_document(
        connection, namespace, document_id, document.path, [item.words for item in document.items]
    )
    return len(keys)


def delete_documents(connection: apsw.Connection, namespace: NamespaceRow, paths: str, now_s: float) -> int:
    """Remove the documents of a JSON list of paths, with their chunks. Returns how many existed."""
    found = rows(
        connection,
        "SELECT id FROM documents WHERE namespace_id = ? AND path IN (SELECT value FROM json_each(?))",
        (namespace.id, paths),
    )
    for (document_id,) in found:
        keys = _document_keys(connection, document_id)
        _delete_text(connection, namespace, keys)
        rows(connection, "DELETE FROM items WHERE document_id = ?", (document_id,))
        rows(connection, f"DELETE FROM {schema.document_table(namespace.id)} WHERE rowid = ?", (document_id,))
        rows(connection, "DELETE FROM documents WHERE id = ?", (document_id,))
        _log(connection, namespace, "delete", keys, now_s)
    return len(found)


def drop_namespace(connection: apsw.Connection, namespace_id: int) -> int:
    """Remove a namespace and everything in it. Returns the number of items it had."""
    count: int = rows(connection, "SELECT count(*) FROM items WHERE namespace_id = ?", (namespace_id,))[0][0]
    for table in ("items", "documents", "operations", "idempotency"):
        rows(connection, f"DELETE FROM {table} WHERE namespace_id = ?", (namespace_id,))
    schema.drop_text_tables(connection, namespace_id)
    rows(connection, "DELETE FROM namespaces WHERE id = ?", (namespace_id,))
    return count


def purge_expired(connection: apsw.Connection, namespace: NamespaceRow, now_s: float) -> None:
    """Remove some of the items that no read shows any more."""
    expired = rows(
        connection,
        "SELECT key FROM items WHERE namespace_id = ? AND expires_at_s <= ? LIMIT ?",
        (namespace.id, now_s, schema.PURGED_AT_ONCE),
    )
    if expired:
        delete_keys(connection, namespace, [key for (key,) in expired], now_s)


def reindex_documents(
    connection: apsw.Connection, namespace: NamespaceRow, document_ids: Iterable[int]
) -> None:
    """Bring the whole-document text up to date with the chunks that are left."""
    for document_id in document_ids:
        path: str = rows(connection, "SELECT path FROM documents WHERE id = ?", (document_id,))[0][0]
        texts = rows(connection, "SELECT text FROM items WHERE document_id = ? ORDER BY key", (document_id,))
        _index_document(connection, namespace, document_id, path, [index_text(text) for (text,) in texts])


def _index_document(
    connection: apsw.Connection, namespace: NamespaceRow, document_id: int, path: str, words: Sequence[str]
) -> None:
    rows(
        connection,
        f"INSERT OR REPLACE INTO {schema.document_table(namespace.id)} (rowid, path, text) VALUES (?, ?, ?)",
        (document_id, path_words(path), "\n".join(words)),
    )


def _stored(
    connection: apsw.Connection, namespace: NamespaceRow, ids: Sequence[str], now_s: float
) -> dict[str, tuple[int | None, int, float, int | None]]:
    """Key, version, time of creation and document of those items that exist. An expired one does not."""
    found = rows(
        connection,
        "SELECT id, key, version, created_at_s, document_id, expires_at_s FROM items "
        "WHERE namespace_id = ? AND id IN (SELECT value FROM json_each(?))",
        (namespace.id, orjson.dumps(list(ids)).decode()),
    )
    expired = [row[1] for row in found if row[5] is not None and row[5] <= now_s]
    if expired:
        delete_keys(connection, namespace, expired, now_s)
    gone = set(expired)
    return {row[0]: (row[1], row[2], row[3], row[4]) for row in found if row[1] not in gone}


def _store(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    new: PreparedItem,
    key: int | None,
    version: int,
    created_at_s: float,
    now_s: float,
    document_id: int | None,
) -> int:
    item = new.item
    values: tuple[Any, ...] = (
        document_id, item.id, version, created_at_s, now_s, item.expires_at_s,
        new.metadata.decode(), item.text, new.vector,
    )  # fmt: skip
    if key is None:
        rows(
            connection,
            "INSERT INTO items (namespace_id, document_id, id, version, created_at_s, updated_at_s, "
            "expires_at_s, metadata, text, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (namespace.id, *values),
        )
        key = connection.last_insert_rowid()
    else:
        rows(
            connection,
            "UPDATE items SET document_id = ?, id = ?, version = ?, created_at_s = ?, updated_at_s = ?, "
            "expires_at_s = ?, metadata = ?, text = ?, vector = ? WHERE key = ?",
            (*values, key),
        )
    rows(
        connection,
        f"INSERT INTO {schema.item_table(namespace.id)} (rowid, symbol, path, text) VALUES (?, ?, ?, ?)",
        (key, new.symbol, new.path, new.words),
    )
    return key


def _delete_text(connection: apsw.Connection, namespace: NamespaceRow, keys: Sequence[int]) -> None:
    execute_many(
        connection,
        f"DELETE FROM {schema.item_table(namespace.id)} WHERE rowid = ?",
        [(key,) for key in keys],
    )


def _document_keys(connection: apsw.Connection, document_id: int) -> list[int]:
    return [key for (key,) in rows(connection, "SELECT key FROM items WHERE document_id = ?", (document_id,))]


def _log(
    connection: apsw.Connection, namespace: NamespaceRow, kind: str, keys: Sequence[int], now_s: float
) -> None:
    """Write the operations, and let go of the oldest once there are many."""
    execute_many(
        connection,
        "INSERT INTO operations (namespace_id, kind, item_key, at_s) VALUES (?, ?, ?, ?)",
        [(namespace.id, kind, key, now_s) for key in keys],
    )
    if keys:
        rows(
            connection,
            "DELETE FROM operations WHERE sequence <= ?",
            (connection.last_insert_rowid() - schema.OPERATIONS_KEPT,),
        )
