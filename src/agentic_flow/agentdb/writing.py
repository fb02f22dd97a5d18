"""What changes rows: functions for the writer thread, each within the caller's transaction.

Every change of an item also changes its full-text row, and every call leaves one operation with the keys it
changed, so that a derived index can tell what it has not seen. The sequence number of that operation is what
backups and point-in-time recovery name.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apsw
import numpy as np
import orjson

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.analysis import index_text
from agentic_flow.agentdb.namespaces import NamespaceSpec
from agentic_flow.agentdb.records import (
    NamespaceRow,
    PreparedItem,
    path_words,
    read_metadata,
    text_words,
)
from agentic_flow.core.db import at_commit, execute_many, rows
from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.vectors import Fingerprint, Item, UpsertResult


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
    stored = _stored(connection, namespace, [item.id for item in prepared], now_s)
    if expected_version is not None:
        for item in prepared:
            version = stored[item.id].version if item.id in stored else 0
            if version != expected_version:
                raise Conflict(
                    f"item {item.id!r} is at version {version!r}, not {expected_version!r}",
                    hint="read it again and repeat the change",
                )
    fresh = [item for item in prepared if item.id not in stored]
    known = [(item, stored[item.id]) for item in prepared if item.id in stored]
    keys = _insert(connection, namespace, fresh, None, now_s)
    keys += _update(connection, namespace, known, now_s)
    _log(connection, namespace, "upsert", keys, now_s)
    reindex_documents(connection, namespace, {was.document_id for _, was in known if was.document_id})
    return UpsertResult(
        ids=tuple(item.id for item in prepared),
        versions=tuple(stored[item.id].version + 1 if item.id in stored else 1 for item in prepared),
        inserted=len(fresh),
        updated=len(known),
    )


def restore_items(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    restored: Sequence[tuple[PreparedItem, Item]],
    documents: Mapping[str, Fingerprint],
    now_s: float,
) -> None:
    """Store items as they are: version, times and document included; what has their ids goes.

    Raises:
        InvalidInput: an item is of a document that neither `documents` nor the namespace has.
    """
    stored = _stored(connection, namespace, [item.id for item, _ in restored], now_s)
    if stored:
        delete_keys(connection, namespace, [was.key for was in stored.values()], now_s)
    document_ids = {
        path: _put_fingerprint(connection, namespace, path, mark, now_s) for path, mark in documents.items()
    }
    for _, item in restored:
        if item.document is not None and item.document not in document_ids:
            found = rows(
                connection,
                "SELECT id FROM documents WHERE namespace_id = ? AND path = ?",
                (namespace.id, item.document),
            )
            if not found:
                raise InvalidInput(
                    f"item {item.id!r} is of document {item.document!r}, which is not there",
                    hint="give the document's fingerprint along with its items",
                )
            document_ids[item.document] = found[0][0]
    keys = _insert(connection, namespace, [item for item, _ in restored], None, now_s)
    execute_many(
        connection,
        "UPDATE items SET version = ?, created_at_s = ?, updated_at_s = ?, document_id = ? WHERE key = ?",
        [
            (
                max(item.version, 1),
                item.created_at_s,
                item.updated_at_s,
                None if item.document is None else document_ids[item.document],
                key,
            )
            for (_, item), key in zip(restored, keys, strict=True)
        ],
    )
    _log(connection, namespace, "restore", keys, now_s)
    reindex_documents(connection, namespace, document_ids.values())


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
    _delete_rows(connection, namespace, keys)
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
    gone: list[int] = []
    if found and not refreshed:
        gone = _document_keys(connection, found[0][0])
        _delete_rows(connection, namespace, gone)
    document_id = _put_fingerprint(connection, namespace, document.path, mark, now_s)
    if refreshed:
        _log(connection, namespace, "fingerprint", [], now_s)
        return len(_document_keys(connection, document_id))
    try:
        keys = _insert(connection, namespace, document.items, document_id, now_s)
    except apsw.ConstraintError:
        raise Conflict(
            f"a chunk id of document {document.path!r} belongs to another item",
            hint="prefix chunk ids with the document's path",
        ) from None
    _log(connection, namespace, "document", [*gone, *keys], now_s)
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
        _delete_rows(connection, namespace, keys)
        _delete_document_text(connection, namespace, document_id)
        rows(connection, "DELETE FROM documents WHERE id = ?", (document_id,))
        _log(connection, namespace, "delete", keys, now_s)
    return len(found)


def create_namespace(
    connection: apsw.Connection, tenant: str, name: str, spec: NamespaceSpec, now_s: float
) -> None:
    """Make an empty namespace with its full-text tables."""
    rows(
        connection,
        "INSERT INTO namespaces (tenant, name, metric, dimension, embedder_id, quantization, "
        "callers_vectors, created_at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            tenant, name, spec.metric, spec.dimension, spec.embedder_id, spec.quantization,
            int(spec.callers_vectors), now_s,
        ),
    )  # fmt: skip
    namespace_id = connection.last_insert_rowid()
    at_commit(connection, lambda writer: schema.create_text_tables(writer, namespace_id))
    _log_for(connection, namespace_id, "create", [], now_s)


def drop_namespace(connection: apsw.Connection, namespace_id: int, now_s: float) -> int:
    """Remove a namespace and everything in it. Returns the number of items it had."""
    count: int = rows(connection, "SELECT count(*) FROM items WHERE namespace_id = ?", (namespace_id,))[0][0]
    rows(
        connection,
        "DELETE FROM vectors WHERE key IN (SELECT key FROM items WHERE namespace_id = ?)",
        (namespace_id,),
    )
    for table in ("items", "documents", "operations", "idempotency"):
        rows(connection, f"DELETE FROM {table} WHERE namespace_id = ?", (namespace_id,))
    at_commit(connection, lambda writer: schema.drop_text_tables(writer, namespace_id))
    rows(connection, "DELETE FROM namespaces WHERE id = ?", (namespace_id,))
    _log_for(connection, namespace_id, "drop", [], now_s)
    return count


def rebuild_texts(connection: apsw.Connection, namespace: NamespaceRow) -> None:
    """Make both full-text tables of a namespace anew from its rows."""
    schema.drop_text_tables(connection, namespace.id)
    schema.create_text_tables(connection, namespace.id)
    last = 0
    while True:
        found = rows(
            connection,
            "SELECT key, metadata, text FROM items WHERE namespace_id = ? AND key > ? ORDER BY key LIMIT ?",
            (namespace.id, last, schema.REBUILT_AT_ONCE),
        )
        if not found:
            break
        last = found[-1][0]
        words = [text_words(text, read_metadata(str(key), metadata)) for key, metadata, text in found]
        _insert_texts(
            connection, namespace, [(key, *parts) for (key, _, _), parts in zip(found, words, strict=True)]
        )
    documents = rows(connection, "SELECT id FROM documents WHERE namespace_id = ?", (namespace.id,))
    reindex_documents(connection, namespace, [document_id for (document_id,) in documents])


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
    sql = f"INSERT OR REPLACE INTO {schema.document_table(namespace.id)} (rowid, path, text) VALUES (?, ?, ?)"
    text = (document_id, path_words(path), "\n".join(words))
    at_commit(connection, lambda writer: execute_many(writer, sql, [text]))


def _delete_document_text(connection: apsw.Connection, namespace: NamespaceRow, document_id: int) -> None:
    sql = f"DELETE FROM {schema.document_table(namespace.id)} WHERE rowid = ?"
    at_commit(connection, lambda writer: execute_many(writer, sql, [(document_id,)]))


class _Stored(NamedTuple):
    """What an upsert must know of an item that exists."""

    key: int
    version: int
    document_id: int | None


def _stored(
    connection: apsw.Connection, namespace: NamespaceRow, ids: Sequence[str], now_s: float
) -> dict[str, _Stored]:
    """Those of the items that exist. An expired one does not: it goes."""
    found = rows(
        connection,
        "SELECT id, key, version, document_id, expires_at_s FROM items "
        "WHERE namespace_id = ? AND id IN (SELECT value FROM json_each(?))",
        (namespace.id, orjson.dumps(list(ids)).decode()),
    )
    expired = [row[1] for row in found if row[4] is not None and row[4] <= now_s]
    if expired:
        delete_keys(connection, namespace, expired, now_s)
    gone = set(expired)
    return {row[0]: _Stored(row[1], row[2], row[3]) for row in found if row[1] not in gone}


def _insert(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    items: Sequence[PreparedItem],
    document_id: int | None,
    now_s: float,
) -> list[int]:
    """Store items whose ids are free; their keys, in order.

    Raises:
        apsw.ConstraintError: an id is taken.
    """
    if not items:
        return []
    # Keys are given out here, so that each table is filled by one statement.
    last: int = rows(
        connection, "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'items'), 0)"
    )[0][0]
    keys = list(range(last + 1, last + 1 + len(items)))
    execute_many(
        connection,
        "INSERT INTO items (key, namespace_id, document_id, id, version, created_at_s, updated_at_s, "
        "expires_at_s, valid_from_s, valid_until_s, metadata, text) "
        "VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                key, namespace.id, document_id, item.id, now_s, now_s, item.expires_at_s, item.valid_from_s,
                item.valid_until_s, item.metadata, item.text,
            )
            for key, item in zip(keys, items, strict=True)
        ],
    )  # fmt: skip
    execute_many(
        connection,
        "INSERT INTO vectors (key, vector) VALUES (?, ?)",
        [(key, item.vector) for key, item in zip(keys, items, strict=True)],
    )
    _insert_texts(
        connection,
        namespace,
        [(key, item.symbol, item.path, item.words) for key, item in zip(keys, items, strict=True)],
    )
    return keys


def _update(
    connection: apsw.Connection,
    namespace: NamespaceRow,
    known: Sequence[tuple[PreparedItem, _Stored]],
    now_s: float,
) -> list[int]:
    """Replace what these items hold; their keys, in order."""
    if not known:
        return []
    keys = [was.key for _, was in known]
    execute_many(
        connection,
        "UPDATE items SET version = ?, updated_at_s = ?, expires_at_s = ?, valid_from_s = ?, "
        "valid_until_s = ?, metadata = ?, text = ? WHERE key = ?",
        [
            (
                was.version + 1, now_s, item.expires_at_s, item.valid_from_s, item.valid_until_s,
                item.metadata, item.text, was.key,
            )
            for item, was in known
        ],
    )  # fmt: skip
    execute_many(
        connection,
        "UPDATE vectors SET vector = ? WHERE key = ?",
        [(item.vector, was.key) for item, was in known],
    )
    _delete_texts(connection, namespace, keys)
    _insert_texts(
        connection, namespace, [(was.key, item.symbol, item.path, item.words) for item, was in known]
    )
    return keys


def _insert_texts(
    connection: apsw.Connection, namespace: NamespaceRow, texts: Sequence[tuple[int, str, str, str]]
) -> None:
    sql = f"INSERT INTO {schema.item_table(namespace.id)} (rowid, symbol, path, text) VALUES (?, ?, ?, ?)"
    at_commit(connection, lambda writer: execute_many(writer, sql, texts))


def _delete_texts(connection: apsw.Connection, namespace: NamespaceRow, keys: Sequence[int]) -> None:
    sql = f"DELETE FROM {schema.item_table(namespace.id)} WHERE rowid = ?"
    at_commit(connection, lambda writer: execute_many(writer, sql, [(key,) for key in keys]))


def _delete_rows(connection: apsw.Connection, namespace: NamespaceRow, keys: Sequence[int]) -> None:
    """Remove items from every table that has them."""
    _delete_texts(connection, namespace, keys)
    wanted = orjson.dumps(list(keys)).decode()
    for table in ("vectors", "items"):
        rows(connection, f"DELETE FROM {table} WHERE key IN (SELECT value FROM json_each(?))", (wanted,))


def _document_keys(connection: apsw.Connection, document_id: int) -> list[int]:
    return [key for (key,) in rows(connection, "SELECT key FROM items WHERE document_id = ?", (document_id,))]


def _put_fingerprint(
    connection: apsw.Connection, namespace: NamespaceRow, path: str, mark: Fingerprint, now_s: float
) -> int:
    """Insert or refresh a document's row; its id."""
    return rows(
        connection,
        "INSERT INTO documents (namespace_id, path, size_bytes, mtime_ns, sha256, updated_at_s) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (namespace_id, path) DO UPDATE SET "
        "size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns, sha256 = excluded.sha256, "
        "updated_at_s = excluded.updated_at_s RETURNING id",
        (namespace.id, path, mark.size_bytes, mark.mtime_ns, mark.sha256, now_s),
    )[0][0]


def _log(
    connection: apsw.Connection, namespace: NamespaceRow, kind: str, keys: Sequence[int], now_s: float
) -> None:
    _log_for(connection, namespace.id, kind, keys, now_s)


def _log_for(
    connection: apsw.Connection, namespace_id: int, kind: str, keys: Sequence[int], now_s: float
) -> None:
    """Write the operation, and let go of the oldest once there are many."""
    rows(
        connection,
        "INSERT INTO operations (namespace_id, kind, keys, at_s) VALUES (?, ?, ?, ?)",
        (namespace_id, kind, np.array(keys, "<i8").tobytes(), now_s),
    )
    rows(
        connection,
        "DELETE FROM operations WHERE sequence <= ?",
        (connection.last_insert_rowid() - schema.OPERATIONS_KEPT,),
    )
