"""AgentDB: the vector store in a folder. SQLite holds the truth; vectors in memory are derived from it.

Several processes may open one folder: each sees what the others committed, and writers take turns.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import apsw
import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb import schema, writing
from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.agentdb.filters import Compiled, compile_filter
from agentic_flow.agentdb.names import check_namespace, check_tenant
from agentic_flow.agentdb.records import (
    CALLER,
    ITEM_COLUMNS,
    LIVE,
    NamespaceRow,
    PreparedItem,
    check_document,
    check_item,
    check_vector,
    find_namespace,
    json_list,
    prepare,
    read_item,
    read_namespaces,
)
from agentic_flow.agentdb.search import SPELLING_WEIGHT, Mode, Request, run_search
from agentic_flow.agentdb.vector_cache import Layout, VectorCache
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.db import Database, rows
from agentic_flow.core.errors import Conflict, InvalidInput, TooLarge
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    Page,
    SearchQuery,
    SearchResult,
    UpsertResult,
)

T = TypeVar("T")

DATABASE = Path("agentdb", "agentdb.db")


class AgentDB:
    """`VectorStore` in a folder.

    Args:
        data_dir: Folder of all local state; the database is `agentdb/agentdb.db` in it.
        settings: The `agentdb` section.
        embedder: Embeds texts of namespaces without vectors of their own; the hashed n-gram one by default.
        clock: Tells the time of writes and expiry.

    Raises:
        Conflict: the database was written by a newer version.
        DataCorrupted: it is not healthy.
        Unavailable: it cannot be opened.
    """

    def __init__(
        self,
        data_dir: Path,
        settings: AgentDBSettings,
        embedder: Embedder | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._embedder = embedder or HashedNgramEmbedder(settings.embedding_dimension)
        self._clock = clock
        self._db = Database(data_dir / DATABASE, schema.MIGRATIONS)
        self._cache = VectorCache()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Finish what was accepted, then close the file. Idempotent."""
        self._db.close()

    # Namespaces

    async def create_namespace(
        self, tenant: str, name: str, *, metric: Metric = "cosine", dimension: int | None = None
    ) -> Namespace:
        """See VectorStore.

        Raises:
            Conflict: it exists with another metric, dimension or embedder.
        """
        check_tenant(tenant)
        check_namespace(name)
        if metric not in ("cosine", "dot", "euclidean"):
            raise InvalidInput(f"{metric!r} is no metric", hint="use cosine, dot or euclidean")
        if dimension is not None and not 1 <= dimension <= schema.DIMENSION_MAX:
            raise InvalidInput(
                f"dimension {dimension!r} is out of range", hint=f"1 to {schema.DIMENSION_MAX}"
            )
        embedder_id = self._embedder.id if dimension is None else CALLER
        wanted = (metric, dimension or self._embedder.dimension, embedder_id)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> Namespace:
            existing = read_namespaces(connection, tenant, now_s, name)
            if existing:
                has = existing[0]
                if (has.metric, has.dimension, has.embedder_id) != wanted:
                    raise Conflict(
                        f"namespace {name!r} exists with metric {has.metric!r}, dimension {has.dimension!r} "
                        f"and embedder {has.embedder_id!r}",
                        hint=f"delete it to make it anew with {wanted!r}, or set back what was changed",
                    )
                return has
            rows(
                connection,
                "INSERT INTO namespaces (tenant, name, metric, dimension, embedder_id, vector_format, "
                "created_at_s) VALUES (?, ?, ?, ?, ?, ?, ?)",
                # Vectors that can be made again from the text are kept in half the bytes.
                (tenant, name, *wanted, "f16" if dimension is None else "f32", now_s),
            )
            schema.create_text_tables(connection, connection.last_insert_rowid())
            return read_namespaces(connection, tenant, now_s, name)[0]

        # Almost always it exists; then no write, no disk.
        return await self._db.read(
            lambda c: self._same(c, tenant, name, wanted, now_s)
        ) or await self._db.write(job)

    @staticmethod
    def _same(
        connection: apsw.Connection, tenant: str, name: str, wanted: tuple[Any, ...], now_s: float
    ) -> Namespace | None:
        for has in read_namespaces(connection, tenant, now_s, name):
            if (has.metric, has.dimension, has.embedder_id) == wanted:
                return has
        return None

    async def namespaces(self, tenant: str) -> list[Namespace]:
        """See VectorStore; by name."""
        now_s = self._clock.time_s()
        return await self._db.read(lambda connection: read_namespaces(connection, tenant, now_s))

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        check_tenant(tenant)

        def job(connection: apsw.Connection) -> int | None:
            found = rows(
                connection, "SELECT id FROM namespaces WHERE tenant = ? AND name = ?", (tenant, name)
            )
            if not found:
                return None
            writing.drop_namespace(connection, found[0][0])
            return found[0][0]

        namespace_id = await self._db.write(job)
        if namespace_id is not None:
            self._cache.forget(namespace_id)
        return namespace_id is not None

    async def erase_tenant(self, tenant: str) -> int:
        """See VectorStore. Rows, full-text tables, operations and idempotency records all go."""
        check_tenant(tenant)

        def job(connection: apsw.Connection) -> tuple[int, list[int]]:
            ids = [i for (i,) in rows(connection, "SELECT id FROM namespaces WHERE tenant = ?", (tenant,))]
            return sum(writing.drop_namespace(connection, namespace_id) for namespace_id in ids), ids

        removed, ids = await self._db.write(job)
        for namespace_id in ids:
            self._cache.forget(namespace_id)
        return removed

    # Items

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> UpsertResult:
        """See VectorStore: all of the items or none.

        Raises:
            Conflict: an item is not at `expected_version`, the idempotency key was used for another
                request, or the namespace has another embedder.
            InvalidInput: a vector or value does not fit; an id occurs twice.
            TooLarge: an item or the batch is past its limit.
        """
        if len(items) > schema.ITEMS_PER_CALL_MAX:
            raise TooLarge(f"{len(items)!r} items in one call", hint=f"at most {schema.ITEMS_PER_CALL_MAX}")
        if len({item.id for item in items}) != len(items):
            raise InvalidInput("an item id occurs twice in one call", hint="send each item once")
        row = await self._namespace(tenant, namespace)
        digest = ""
        if idempotency_key is not None:
            if not 0 < len(idempotency_key) <= schema.KEY_CHARS_MAX or not idempotency_key.isprintable():
                raise InvalidInput(
                    f"{idempotency_key[: schema.KEY_CHARS_MAX]!r} is no idempotency key",
                    hint=f"1 to {schema.KEY_CHARS_MAX} printable characters",
                )
            digest = await asyncio.to_thread(_request_digest, items, expected_version)
        prepared = await self._prepare(row, items)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> UpsertResult:
            current = self._unchanged(connection, tenant, row)
            if idempotency_key is not None:
                earlier = _earlier(connection, current, idempotency_key, digest, now_s)
                if earlier is not None:
                    return earlier
            result = writing.upsert_items(connection, current, prepared, expected_version, now_s)
            if idempotency_key is not None:
                rows(
                    connection,
                    "INSERT INTO idempotency (namespace_id, key, request_sha256, response, at_s) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (current.id, idempotency_key, digest, result.model_dump_json(), now_s),
                )
            return result

        return await self._db.write(job)

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        """See VectorStore. Vectors come along in namespaces whose vectors callers bring."""
        wanted = _checked_ids(ids)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> list[Item]:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT {ITEM_COLUMNS} FROM items WHERE namespace_id = ? AND {LIVE} "
                "AND id IN (SELECT value FROM json_each(?))",
                (row.id, now_s, wanted),
            )
            by_id = {item.id: item for item in (read_item(r, _layout(row)) for r in found)}
            return [by_id[item_id] for item_id in ids if item_id in by_id]

        return await self._db.read(job)

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        wanted = _checked_ids(ids)
        return await self._delete(
            tenant, namespace, ("items.id IN (SELECT value FROM json_each(?))", [wanted])
        )

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int:
        """See VectorStore.

        Raises:
            InvalidInput: the filter is malformed, or empty.
        """
        if not where:
            raise InvalidInput(
                "the filter is empty, which would delete everything", hint="use delete_namespace for that"
            )
        return await self._delete(tenant, namespace, compile_filter(where))

    async def _delete(self, tenant: str, namespace: str, condition: Compiled) -> int:
        sql, bindings = condition
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> int:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT key FROM items WHERE namespace_id = ? AND {LIVE} AND ({sql})",
                (row.id, now_s, *bindings),
            )
            writing.delete_keys(connection, row, [key for (key,) in found], now_s)
            return len(found)

        return await self._db.write(job)

    async def list_items(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page:
        """See VectorStore.

        Raises:
            InvalidInput: the cursor or the filter is malformed, or the limit is out of range.
        """
        if not 1 <= limit <= schema.PAGE_ITEMS_MAX:
            raise InvalidInput(f"limit {limit!r} is out of range", hint=f"1 to {schema.PAGE_ITEMS_MAX}")
        sql, bindings = compile_filter(where)
        after = _read_cursor(cursor)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> Page:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT {ITEM_COLUMNS} FROM items WHERE namespace_id = ? AND id > ? AND {LIVE} "
                f"AND ({sql}) ORDER BY id LIMIT ?",
                (row.id, after, now_s, *bindings, limit + 1),
            )
            items = tuple(read_item(r, _layout(row)) for r in found[:limit])
            return Page(items=items, cursor=_cursor(items[-1].id) if len(found) > limit else None)

        return await self._db.read(job)

    # Search

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        """See VectorStore. `mode` of the result is what was done: a side that the query gives nothing for
        takes no part, and then it is the other's name.

        Score parts: `text` is BM25, `vector` the similarity (cosine, inner product, negative distance),
        `document` what the rest of the hit's document adds to a hybrid score.

        Raises:
            InvalidInput: the query gives nothing that its mode can search with, or its filter is malformed.
            Conflict: the namespace's embedder is not this store's.
        """
        row = await self._namespace(tenant, namespace)
        embeds = not row.brings_vectors
        if embeds and row.embedder_id != self._embedder.id and query.mode != "text":
            raise self._other_embedder(row)
        mode, vector = await self._sides(row, query)
        semantic = embeds and self._embedder.semantic
        request = Request(
            query=query,
            mode=mode,
            vector=vector,
            vector_weight=SPELLING_WEIGHT if embeds and not semantic else 1.0,
            where=compile_filter(query.filter) if query.filter else None,
            now_s=self._clock.time_s(),
        )

        def job(connection: apsw.Connection) -> SearchResult:
            current = self._unchanged(connection, tenant, row)
            hits = run_search(connection, self._cache, current, request)
            return SearchResult(hits=hits, embedder_id=row.embedder_id, semantic=semantic, mode=mode)

        return await self._db.read(job)

    async def _sides(self, row: NamespaceRow, query: SearchQuery) -> tuple[Mode, NDArray[np.float32] | None]:
        """Which sides of the search take part, and the vector for one of them."""
        text = bool(query.text.strip())
        vector: NDArray[np.float32] | None = None
        if query.mode != "text":
            if query.vector is not None:
                vector = _bounded_vector(query.vector, row.layout, "the query")
                norm = float(np.linalg.norm(vector))
                vector = vector / norm if row.metric == "cosine" else vector
            elif text and not row.brings_vectors:
                vector = (await self._embedder.embed([query.text[: schema.QUERY_CHARS_MAX]], kind="query"))[0]
        if query.mode == "vector" or (query.mode == "hybrid" and not text):
            if vector is None:
                raise InvalidInput(
                    "the query has no vector and nothing to make one from",
                    hint="give it a vector" if row.brings_vectors else "give it a text or a vector",
                )
            return "vector", vector
        if not text:
            raise InvalidInput("the query has no text", hint="give it one, or search by vector")
        return ("text", None) if vector is None else ("hybrid", vector)

    # Documents

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        """See VectorStore. A document that comes without chunks and whose sha256 is the stored one keeps its
        chunks; only its fingerprint is refreshed.

        Raises:
            TooLarge: a chunk, a document or the batch is past its limit.
            InvalidInput: a path or chunk id occurs twice, or a chunk does not fit.
            Conflict: a chunk's id belongs to another item, or the namespace has another embedder.
        """
        if len(documents) > schema.DOCUMENTS_PER_CALL_MAX:
            raise TooLarge(
                f"{len(documents)!r} documents in one call", hint=f"at most {schema.DOCUMENTS_PER_CALL_MAX}"
            )
        if len({document.path for document in documents}) != len(documents):
            raise InvalidInput("a path occurs twice in one call", hint="send each document once")
        for document in documents:
            check_document(document)
        row = await self._namespace(tenant, namespace)
        chunks = [chunk for document in documents for chunk in document.chunks]
        if len({chunk.id for chunk in chunks}) != len(chunks):
            raise InvalidInput("a chunk id occurs twice in one call", hint="use path:line_start-line_end")
        prepared = iter(await self._prepare(row, chunks))
        ready = [
            writing.PreparedDocument(
                document.path, document.fingerprint, tuple(next(prepared) for _ in document.chunks)
            )
            for document in documents
        ]
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> int:
            current = self._unchanged(connection, tenant, row)
            return sum(writing.put_document(connection, current, document, now_s) for document in ready)

        return await self._db.write(job)

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        """See VectorStore."""

        def job(connection: apsw.Connection) -> dict[str, Fingerprint]:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                "SELECT path, size_bytes, mtime_ns, sha256 FROM documents WHERE namespace_id = ?",
                (row.id,),
            )
            return {
                path: Fingerprint(size_bytes=size, mtime_ns=mtime, sha256=digest)
                for path, size, mtime, digest in found
            }

        return await self._db.read(job)

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        """See VectorStore; how many existed."""
        wanted = json_list(paths, "the paths")
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> int:
            row = find_namespace(connection, tenant, namespace)
            return writing.delete_documents(connection, row, wanted, now_s)

        return await self._db.write(job)

    # Shared

    async def _namespace(self, tenant: str, name: str) -> NamespaceRow:
        return await self._db.read(lambda connection: find_namespace(connection, tenant, name))

    @staticmethod
    def _unchanged(connection: apsw.Connection, tenant: str, row: NamespaceRow) -> NamespaceRow:
        """The namespace again, inside the transaction: it may have been deleted or made anew meanwhile."""
        current = find_namespace(connection, tenant, row.name)
        if current.layout != row.layout or current.embedder_id != row.embedder_id:
            raise Conflict(f"namespace {row.name!r} was replaced meanwhile", hint="repeat the call")
        return current

    async def _prepare(self, row: NamespaceRow, items: Sequence[Item]) -> list[PreparedItem]:
        """Check, embed and cut into words, away from the event loop and the writer thread."""
        layout = row.layout
        bare = [item for item in items if item.vector is None]
        if bare and row.brings_vectors:
            raise InvalidInput(
                f"item {bare[0].id!r} has no vector", hint=f"namespace {row.name!r} takes your vectors"
            )
        if bare and row.embedder_id != self._embedder.id:
            raise self._other_embedder(row)

        def check() -> tuple[list[bytes], dict[str, NDArray[np.float32]]]:
            metadata = [check_item(item) for item in items]
            brought = {
                item.id: _bounded_vector(item.vector, layout, f"item {item.id!r}")
                for item in items
                if item.vector is not None
            }
            return metadata, brought

        metadata, vectors = await asyncio.to_thread(check)
        if bare:
            embedded = await self._embedder.embed([item.text for item in bare])
            vectors.update((item.id, vector) for item, vector in zip(bare, embedded, strict=True))
        return await asyncio.to_thread(
            lambda: [
                prepare(item, encoded, vectors[item.id], layout)
                for item, encoded in zip(items, metadata, strict=True)
            ]
        )

    def _other_embedder(self, row: NamespaceRow) -> Conflict:
        return Conflict(
            f"namespace {row.name!r} was embedded by {row.embedder_id!r}, this store embeds with "
            f"{self._embedder.id!r}",
            hint="configure that embedder, or delete the namespace and fill it again",
        )


def _layout(row: NamespaceRow) -> Any:
    return row.layout if row.brings_vectors else None


def _bounded_vector(values: Sequence[float], layout: Layout, what: str) -> NDArray[np.float32]:
    """The vector, if sums of squares stay within single precision and its values within what is stored.

    Under cosine, half precision stores the unit vector: nothing overflows and small values are not lost.
    """
    vector = check_vector(values, layout, what)
    cosine, half = layout.metric == "cosine", layout.vector_format == "f16"
    most = schema.HALF_ABS_MAX if half and not cosine else schema.VECTOR_ABS_MAX
    largest = float(np.abs(vector).max())
    if largest > most or (cosine and largest < schema.DIRECTION_ABS_MIN):
        raise InvalidInput(
            f"{what} has a vector whose largest value is {largest!r}",
            hint=f"scale vectors to lengths near 1; values go up to {most:g}",
        )
    return vector / np.float32(np.linalg.norm(vector)) if cosine and half else vector


def _checked_ids(ids: Sequence[str]) -> str:
    if len(ids) > schema.IDS_PER_CALL_MAX:
        raise TooLarge(f"{len(ids)!r} ids in one call", hint=f"at most {schema.IDS_PER_CALL_MAX}")
    return json_list(ids, "the ids")


def _request_digest(items: Sequence[Item], expected_version: int | None) -> str:
    digest = hashlib.sha256(repr(expected_version).encode())
    for item in items:
        digest.update(item.model_dump_json(exclude={"version", "created_at_s", "updated_at_s"}).encode())
    return digest.hexdigest()


def _earlier(
    connection: apsw.Connection, row: NamespaceRow, key: str, digest: str, now_s: float
) -> UpsertResult | None:
    """What the same request got before; also forgets keys that are too old to be repeated."""
    rows(
        connection,
        "DELETE FROM idempotency WHERE namespace_id = ? AND at_s < ?",
        (row.id, now_s - schema.IDEMPOTENCY_KEPT_S),
    )
    found = rows(
        connection,
        "SELECT request_sha256, response FROM idempotency WHERE namespace_id = ? AND key = ?",
        (row.id, key),
    )
    if not found:
        return None
    if found[0][0] != digest:
        raise Conflict(
            f"the idempotency key {key!r} was used for another request",
            hint="use a new key for a new request",
        )
    return UpsertResult.model_validate_json(found[0][1])


def _cursor(item_id: str) -> str:
    return base64.urlsafe_b64encode(item_id.encode()).decode()


def _read_cursor(cursor: str | None) -> str:
    if cursor is None:
        return ""
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidInput(
            f"cursor {cursor!r} is not ours", hint="pass back what the last page gave"
        ) from None
