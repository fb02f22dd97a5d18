"""What changes rows: functions within a write transaction that holds a key-share lock on its namespace.

Rows that exist are locked in id order before they change, and inserted in id order, so that overlapping
batches wait for each other instead of deadlocking. Each call leaves one operation.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import AsyncConnection, AsyncCursor

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.postgres.connections import Repeat, fetch
from agentic_flow.agentdb.postgres.encoding import Prepared, escape, index_key, unescape
from agentic_flow.agentdb.postgres.rows import NamespaceRow
from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.vectors import Fingerprint, UpsertResult

Cursor = AsyncCursor[tuple[Any, ...]]

_OPERATIONS_PRUNED_EVERY = 1000


class PreparedDocument(NamedTuple):
    """A document whose chunks are checked, embedded and encoded."""

    path: str
    fingerprint: Fingerprint
    items: tuple[Prepared, ...]


class Values(NamedTuple):
    """What an item's row holds beside what the caller sent."""

    version: int
    created_at_s: float
    updated_at_s: float
    document_id: int | None


class _Stored(NamedTuple):
    key: int
    version: int
    created_at_s: float
    document_id: int | None


async def upsert_items(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    prepared: Sequence[Prepared],
    expected_version: int | None,
    now_s: float,
) -> UpsertResult:
    """Insert or replace items.

    Raises:
        Conflict: an item is not at `expected_version`.
        Repeat: another transaction inserted one of them first.
    """
    async with connection.pipeline():  # one round trip
        finding_expired = await _find_expired(connection, namespace, now_s)
        finding_stored = await _find_stored(connection, namespace, [item.id_key for item in prepared], now_s)
        finding_keys = await _find_keys(connection, len(prepared))
        expired, found, given = (
            await finding_expired.fetchall(),
            await finding_stored.fetchall(),
            [key for (key,) in await finding_keys.fetchall()],
        )
    await _purge(connection, namespace, [key for (key,) in expired])
    stored = await _live(connection, namespace, found)
    if expected_version is not None:
        for item in prepared:
            version = stored[item.id_key].version if item.id_key in stored else 0
            if version != expected_version:
                raise Conflict(
                    f"item {item.item.id!r} is at version {version!r}, not {expected_version!r}",
                    hint="read it again and repeat the change",
                )
    fresh = [(item, Values(1, now_s, now_s, None)) for item in prepared if item.id_key not in stored]
    known = [(item, stored[item.id_key]) for item in prepared if item.id_key in stored]
    keys = await _insert(connection, tenant, namespace, fresh, given)
    if known:
        await _update(connection, namespace, known, now_s)
        keys += [was.key for _, was in known]
        await recount_documents(connection, namespace, {was.document_id for _, was in known})
    await log(connection, tenant, namespace.id, "upsert", keys, now_s)
    return UpsertResult(
        ids=tuple(item.item.id for item in prepared),
        versions=tuple(stored[item.id_key].version + 1 if item.id_key in stored else 1 for item in prepared),
        inserted=len(fresh),
        updated=len(known),
    )


async def restore_items(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    prepared: Sequence[Prepared],
    documents: Mapping[str, Fingerprint],
    now_s: float,
) -> None:
    """Store items as they are: version, times and document included; what has their ids goes.

    Raises:
        InvalidInput: an item is of a document that neither `documents` nor the namespace has.
        Repeat: another transaction inserted one of them first.
    """
    stored = await _stored(connection, namespace, [item.id_key for item in prepared], now_s)
    gone = await _delete(connection, namespace, "i.key = ANY(%s)", [[was.key for was in stored.values()]])
    await _put_fingerprints(connection, tenant, namespace, documents, now_s)
    wanted = {path for item in prepared if (path := item.item.document) is not None} | set(documents)
    ids = {path: found[0] for path, found in (await _documents(connection, namespace, wanted)).items()}
    for item in prepared:
        if item.item.document is not None and item.item.document not in ids:
            raise InvalidInput(
                f"item {item.item.id!r} is of document {item.item.document!r}, which is not there",
                hint="give the document's fingerprint along with its items",
            )
    rows = [
        (
            item,
            Values(
                max(item.item.version, 1),
                item.item.created_at_s,
                item.item.updated_at_s,
                None if item.item.document is None else ids[item.item.document],
            ),
        )
        for item in prepared
    ]
    keys = await _insert(connection, tenant, namespace, rows)
    await recount_documents(connection, namespace, {*ids.values(), *(row[1] for row in gone)})
    await log(connection, tenant, namespace.id, "restore", keys, now_s)


async def delete_where(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    condition: str,
    bindings: Sequence[Any],
    now_s: float,
) -> int:
    """Remove the items that an SQL condition selects; the documents they belong to keep the rest."""
    gone = await _delete(
        connection, namespace, f"i.namespace_id = %s AND {condition}", [namespace.id, *bindings]
    )
    if gone:
        await recount_documents(connection, namespace, {document_id for _, document_id in gone})
        await log(connection, tenant, namespace.id, "delete", [key for key, _ in gone], now_s)
    return len(gone)


async def put_documents(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    documents: Sequence[PreparedDocument],
    now_s: float,
) -> int:
    """Replace the chunks of documents. Returns how many chunks they have now.

    A document whose content is the stored one (equal sha256) and that comes without chunks keeps those it
    has: only its fingerprint is refreshed.

    Raises:
        Conflict: a chunk's id belongs to an item outside its document.
        Repeat: another transaction stored one of the documents first.
    """
    await purge_expired(connection, namespace, now_s)
    stored = await _documents(connection, namespace, [document.path for document in documents], lock=True)
    refreshed = {
        document.path
        for document in documents
        if not document.items and stored.get(document.path, (0, ""))[1] == document.fingerprint.sha256
    }
    replaced = [found[0] for path, found in stored.items() if path not in refreshed]
    gone = await _delete(connection, namespace, "i.document_id = ANY(%s)", [replaced])
    await _put_fingerprints(
        connection, tenant, namespace, {document.path: document.fingerprint for document in documents}, now_s
    )
    ids = await _documents(connection, namespace, [document.path for document in documents])
    rows = [
        (item, Values(1, now_s, now_s, ids[document.path][0]))
        for document in documents
        for item in document.items
    ]
    try:
        keys = await _insert(connection, tenant, namespace, rows)
    except Repeat:
        conflict = await _taken(connection, namespace, documents)
        if conflict is None:
            raise  # somebody else stored the same documents first: once more, in their place
        raise conflict from None
    await recount_documents(connection, namespace, {document_id for document_id, _ in ids.values()})
    await log(connection, tenant, namespace.id, "document", [*(key for key, _ in gone), *keys], now_s)
    kept = await fetch(
        connection,
        "SELECT count(*) FROM agentic_flow.items AS i WHERE i.shard = %s AND i.document_id = ANY(%s)",
        (namespace.shard, [ids[path][0] for path in refreshed]),
    )
    return len(keys) + int(kept[0][0])


async def _taken(
    connection: AsyncConnection, namespace: NamespaceRow, documents: Sequence[PreparedDocument]
) -> Conflict | None:
    """The error that names a document one of whose chunk ids belongs to another item; None: none does."""
    found = await fetch(
        connection,
        "SELECT i.id, i.document_id FROM agentic_flow.items AS i "
        "WHERE i.shard = %s AND i.namespace_id = %s AND i.id = ANY(%s)",
        (namespace.shard, namespace.id, [item.id_key for document in documents for item in document.items]),
    )
    ids = {
        path: found[0]
        for path, found in (await _documents(connection, namespace, [d.path for d in documents])).items()
    }
    owners: dict[str, int | None] = dict(found)
    path = next(
        (
            document.path
            for document in documents
            for item in document.items
            if item.id_key in owners and owners[item.id_key] != ids[document.path]
        ),
        None,
    )
    if path is None:
        return None
    return Conflict(
        f"a chunk id of document {path!r} belongs to another item",
        hint="prefix chunk ids with the document's path",
    )


async def delete_documents(
    connection: AsyncConnection, tenant: str, namespace: NamespaceRow, paths: Sequence[str], now_s: float
) -> int:
    """Remove documents with their chunks. Returns how many existed."""
    stored = await _documents(connection, namespace, paths, lock=True)
    if not stored:
        return 0
    ids = [document_id for document_id, _ in stored.values()]
    gone = await _delete(connection, namespace, "i.document_id = ANY(%s)", [ids])
    await connection.execute("DELETE FROM agentic_flow.documents AS d WHERE d.id = ANY(%s)", (ids,))
    await log(connection, tenant, namespace.id, "delete", [key for key, _ in gone], now_s)
    return len(ids)


async def drop_namespace(connection: AsyncConnection, namespace_id: int, shard: int) -> int:
    """Remove a namespace and everything in it. Returns the number of items it had."""
    cursor = await connection.execute(
        "DELETE FROM agentic_flow.items WHERE shard = %s AND namespace_id = %s", (shard, namespace_id)
    )
    for table in ("documents", "operations", "idempotency"):
        await connection.execute(
            f"DELETE FROM agentic_flow.{table} WHERE namespace_id = %s".encode(), (namespace_id,)
        )
    await connection.execute("DELETE FROM agentic_flow.namespaces WHERE id = %s", (namespace_id,))
    return cursor.rowcount


async def purge_expired(connection: AsyncConnection, namespace: NamespaceRow, now_s: float) -> None:
    """Remove some of the items that no read shows any more; those that somebody else changes are left."""
    finding = await _find_expired(connection, namespace, now_s)
    await _purge(connection, namespace, [key for (key,) in await finding.fetchall()])


async def _find_expired(connection: AsyncConnection, namespace: NamespaceRow, now_s: float) -> Cursor:
    return await connection.execute(
        "SELECT i.key FROM agentic_flow.items AS i WHERE i.shard = %s AND i.namespace_id = %s "
        "AND i.expires_at_s <= %s LIMIT %s FOR UPDATE SKIP LOCKED",
        (namespace.shard, namespace.id, now_s, schema.PURGED_AT_ONCE),
    )


async def _purge(connection: AsyncConnection, namespace: NamespaceRow, keys: list[int]) -> None:
    if keys:
        gone = await _delete(connection, namespace, "i.key = ANY(%s)", [keys])
        await recount_documents(connection, namespace, {document_id for _, document_id in gone})


async def recount_documents(
    connection: AsyncConnection, namespace: NamespaceRow, document_ids: Iterable[int | None]
) -> None:
    """Bring the word counts of documents up to date with the chunks they have."""
    wanted = sorted({document_id for document_id in document_ids if document_id is not None})
    if wanted:
        await connection.execute(
            "UPDATE agentic_flow.documents AS d SET word_count = (SELECT coalesce(sum(i.word_count), 0) "
            "FROM agentic_flow.items AS i WHERE i.shard = %s AND i.document_id = d.id) WHERE d.id = ANY(%s)",
            (namespace.shard, wanted),
        )


async def log(
    connection: AsyncConnection, tenant: str, namespace_id: int, kind: str, keys: Sequence[int], now_s: float
) -> None:
    """Write the operation of this call, and now and then let go of the oldest ones."""
    found = await fetch(
        connection,
        "INSERT INTO agentic_flow.operations (tenant, namespace_id, kind, keys, at_s) "
        "VALUES (%s, %s, %s, %s, %s) RETURNING sequence",
        (tenant, namespace_id, kind, list(keys), now_s),
    )
    sequence: int = found[0][0]
    if sequence % _OPERATIONS_PRUNED_EVERY == 0:
        await connection.execute(
            "DELETE FROM agentic_flow.operations WHERE namespace_id = %s AND sequence <= %s",
            (namespace_id, sequence - schema.OPERATIONS_KEPT),
        )


async def _stored(
    connection: AsyncConnection, namespace: NamespaceRow, id_keys: Sequence[str], now_s: float
) -> dict[str, _Stored]:
    """Those of the items that exist, locked. An expired one does not exist: it goes."""
    finding = await _find_stored(connection, namespace, id_keys, now_s)
    return await _live(connection, namespace, await finding.fetchall())


async def _find_stored(
    connection: AsyncConnection, namespace: NamespaceRow, id_keys: Sequence[str], now_s: float
) -> Cursor:
    return await connection.execute(
        "SELECT i.id, i.key, i.version, i.created_at_s, i.document_id, "
        "i.expires_at_s IS NOT NULL AND i.expires_at_s <= %s "
        "FROM agentic_flow.items AS i WHERE i.shard = %s AND i.namespace_id = %s AND i.id = ANY(%s) "
        "ORDER BY i.id FOR UPDATE",
        (now_s, namespace.shard, namespace.id, list(id_keys)),
    )


async def _live(
    connection: AsyncConnection, namespace: NamespaceRow, found: Sequence[tuple[Any, ...]]
) -> dict[str, _Stored]:
    await _purge(connection, namespace, [row[1] for row in found if row[5]])
    return {row[0]: _Stored(*row[1:5]) for row in found if not row[5]}


async def _find_keys(connection: AsyncConnection, count: int) -> Cursor:
    return await connection.execute(
        "SELECT nextval('agentic_flow.item_keys') FROM generate_series(1, %s)", (count,)
    )


async def _insert(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    rows: Sequence[tuple[Prepared, Values]],
    given: Sequence[int] | None = None,
) -> list[int]:
    """Store items whose ids are free; their keys, in order.

    Args:
        given: At least as many keys as there are rows, where the caller has them already.

    Raises:
        Repeat: an id is taken.
    """
    if not rows:
        return []
    if given is None:
        finding = await _find_keys(connection, len(rows))
        given = [key for (key,) in await finding.fetchall()]
    keys = list(given[: len(rows)])
    keyed = sorted(zip(keys, rows, strict=True), key=lambda pair: pair[1][0].id_key)
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO agentic_flow.items (shard, key, tenant, namespace_id, document_id, id, long_id, "
            "version, "
            "created_at_s, updated_at_s, expires_at_s, valid_from_s, valid_until_s, text, metadata, fields, "
            f"derived, words, word_count, {namespace.column}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, "
            "%s, "
            "%s, %s, %s, %s, %s, %s::jsonb, %s::jsonb, agentic_flow.stemmed(%s::jsonb), %s, %b) "
            "ON CONFLICT (shard, namespace_id, id) DO NOTHING".encode(),
            [
                (
                    namespace.shard, key, tenant, namespace.id, values.document_id, new.id_key, new.long_id,
                    values.version, values.created_at_s, values.updated_at_s, new.item.expires_at_s,
                    new.item.valid_from_s, new.item.valid_until_s, new.text, new.metadata, new.fields,
                    new.derived, new.words, new.word_count, namespace.bound(new.vector),
                )
                for key, (new, values) in keyed
            ],
        )  # fmt: skip
        if cursor.rowcount != len(rows):
            raise Repeat
    return keys


async def _update(
    connection: AsyncConnection,
    namespace: NamespaceRow,
    known: Sequence[tuple[Prepared, _Stored]],
    now_s: float,
) -> None:
    """Replace what these items hold, which are locked."""
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "UPDATE agentic_flow.items SET version = %s, updated_at_s = %s, expires_at_s = %s, "
            "valid_from_s = %s, "
            "valid_until_s = %s, text = %s, metadata = %s, fields = %s::jsonb, derived = %s::jsonb, "
            f"words = agentic_flow.stemmed(%s::jsonb), word_count = %s, {namespace.column} = %b "
            "WHERE shard = %s AND key = %s".encode(),
            [
                (
                    was.version + 1, now_s, new.item.expires_at_s, new.item.valid_from_s,
                    new.item.valid_until_s, new.text, new.metadata, new.fields, new.derived, new.words,
                    new.word_count, namespace.bound(new.vector), namespace.shard, was.key,
                )
                for new, was in known
            ],
        )  # fmt: skip


async def _delete(
    connection: AsyncConnection, namespace: NamespaceRow, condition: str, bindings: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Remove the items of this partition that a condition selects; key and document of each.

    A condition by key or document needs no more: they are of one namespace, and PostgreSQL finds them by it.
    """
    return await fetch(
        connection,
        f"DELETE FROM agentic_flow.items AS i WHERE i.shard = %s AND {condition} RETURNING i.key, "
        "i.document_id",
        (namespace.shard, *bindings),
    )


async def _documents(
    connection: AsyncConnection, namespace: NamespaceRow, paths: Iterable[str], *, lock: bool = False
) -> dict[str, tuple[int, str]]:
    """Id and sha256 of those documents that exist, by path."""
    by_key = {index_key(path)[0]: path for path in paths}
    found = await fetch(
        connection,
        "SELECT d.path_key, d.id, d.sha256 FROM agentic_flow.documents AS d WHERE d.namespace_id = %s "
        f"AND d.path_key = ANY(%s) ORDER BY d.path_key{' FOR UPDATE' if lock else ''}",
        (namespace.id, list(by_key)),
    )
    return {by_key[path_key]: (document_id, unescape(sha256)) for path_key, document_id, sha256 in found}


async def _put_fingerprints(
    connection: AsyncConnection,
    tenant: str,
    namespace: NamespaceRow,
    documents: Mapping[str, Fingerprint],
    now_s: float,
) -> None:
    if not documents:
        return
    keyed = sorted(((*index_key(path), mark) for path, mark in documents.items()), key=lambda row: row[0])
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO agentic_flow.documents (tenant, namespace_id, path_key, long_path, size_bytes, "
            "mtime_ns, "
            "sha256, updated_at_s) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (namespace_id, path_key) DO UPDATE SET size_bytes = excluded.size_bytes, "
            "mtime_ns = excluded.mtime_ns, sha256 = excluded.sha256, updated_at_s = excluded.updated_at_s",
            [
                (tenant, namespace.id, key, whole, mark.size_bytes, mark.mtime_ns, escape(mark.sha256), now_s)
                for key, whole, mark in keyed
            ],
        )
