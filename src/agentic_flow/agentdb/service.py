"""AgentDB: the vector store in a folder. SQLite holds the truth; indexes are derived from it.

Several processes may open one folder: each sees what the others committed, and writers take turns.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import apsw
import numpy as np
import structlog
from numpy.typing import NDArray

from agentic_flow.agentdb import schema, writing
from agentic_flow.agentdb.embedding import HashedNgramEmbedder, QueryVectors
from agentic_flow.agentdb.erasure import empty_log, overwrite_free_space
from agentic_flow.agentdb.filters import Compiled, compile_filter, register_functions
from agentic_flow.agentdb.history import History, HistoryStatus
from agentic_flow.agentdb.index.allowed import AllowedKeys
from agentic_flow.agentdb.index.codes import installable
from agentic_flow.agentdb.index.indexer import Indexer
from agentic_flow.agentdb.index.tiers import Indexes
from agentic_flow.agentdb.names import check_idempotency_key, check_namespace, check_tenant
from agentic_flow.agentdb.namespaces import namespace_spec, read_stats
from agentic_flow.agentdb.records import (
    ITEM_COLUMNS,
    LIVE,
    VECTOR_COLUMN,
    NamespaceRow,
    PreparedItem,
    all_namespaces,
    check_document,
    check_item,
    check_query,
    check_vectors,
    find_namespace,
    json_list,
    prepare,
    read_item,
    read_namespaces,
)
from agentic_flow.agentdb.search import SPELLING_WEIGHT, Mode, Request, Searcher, deadline
from agentic_flow.core.auth import DEFAULT_TENANT
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.db import Database, at_commit, execute_many, rows
from agentic_flow.core.errors import AgenticFlowError, Conflict, InvalidInput, TooLarge
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    NamespaceStats,
    Page,
    Quantization,
    SearchQuery,
    SearchResult,
    UpsertResult,
)

_log = structlog.get_logger(__name__)

T = TypeVar("T")

DATABASE = Path("agentdb", "agentdb.db")
INDEXES = Path("agentdb", "indexes")

MMAP_MAX_BYTES = 64 * 1024**3
"""Address space, not memory: searches read a few rows from all over the file."""
NAMESPACES_KNOWN_MAX = 10_000
LOG_WAIT_S = 30.0
"""How long erasing a tenant waits for readers of the log."""
PREPARED_HERE_MAX = 8
"""Items of one call up to which handing them to another thread costs more than preparing them."""


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
        InvalidSettings: they ask for a library that is not installed.
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
        self._queries = QueryVectors(self._embedder)
        self._clock = clock
        self._settings = settings
        fitting = installable(settings)
        self._db = Database(
            data_dir / DATABASE,
            schema.MIGRATIONS,
            mmap_max_bytes=MMAP_MAX_BYTES,
            prepare=_prepare_connection,
        )
        self._indexes = Indexes(data_dir / INDEXES, fitting, self._db.read_apart)
        self._searcher = Searcher(self._indexes, AllowedKeys())
        self._indexer = Indexer(self._indexes)
        self._indexes.sweep()
        self._namespaces: dict[tuple[str, str], NamespaceRow] = {}
        self._history: History | None = None
        self._closed = False
        if settings.history_dir is not None:
            try:
                self._history = History(settings.history_dir, self._db, seal_s=settings.history_seal_s)
            except BaseException:
                self._db.close()
                raise
            self._history.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Finish what was accepted, write the indexes, seal the history, then close the file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._indexer.close()
        try:
            # We may have written the index of what another process has erased meanwhile.
            self._indexes.sweep()
        except (AgenticFlowError, OSError, apsw.Error) as error:
            _log.warning("indexes_unswept", error=str(error))
        if self._history is not None:
            self._history.close()
        self._db.close()

    async def settle(self) -> None:
        """Return once every index has taken in all that is committed, and its file is written."""
        rows_of_all = await self._db.read(lambda connection: all_namespaces(connection))
        for row in rows_of_all:
            await asyncio.to_thread(self._indexes.tend, row.layout, save=True)

    async def check_index(self, tenant: str, namespace: str) -> list[str]:
        """What the namespace's index has other than a rebuilt one would; nothing, if all is well."""
        row = await self._namespace(tenant, namespace)
        return await self._db.read(lambda connection: self._indexes.check(connection, row.layout))

    def history_status(self) -> HistoryStatus | None:
        """How sealing is doing; None when no history is kept."""
        return None if self._history is None else self._history.status()

    def indexes_rebuilt(self) -> dict[int, str]:
        """Namespace id → why its index file was made again, since this store was opened."""
        return dict(self._indexes.rebuilt)

    def indexes_loaded(self) -> list[int]:
        """Ids of the namespaces whose indexes are in memory, the least recently used first."""
        return [index.layout.namespace_id for index in self._indexes.held()]

    # Namespaces

    async def create_namespace(
        self,
        tenant: str,
        name: str,
        *,
        metric: Metric = "cosine",
        dimension: int | None = None,
        embedder_id: str | None = None,
        quantization: Quantization | None = None,
    ) -> Namespace:
        """See VectorStore.

        Raises:
            Conflict: it exists with another metric, dimension, embedder or quantization.
        """
        check_tenant(tenant)
        check_namespace(name)
        spec = namespace_spec(self._embedder, metric, dimension, embedder_id, quantization)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> Namespace:
            existing = read_namespaces(connection, tenant, now_s, name)
            if existing:
                spec.demand(existing[0], chosen=quantization is not None)
                return existing[0]
            writing.create_namespace(connection, tenant, name, spec, now_s)
            return read_namespaces(connection, tenant, now_s, name)[0]

        def same(connection: apsw.Connection) -> Namespace | None:
            existing = read_namespaces(connection, tenant, now_s, name)
            if existing:
                spec.demand(existing[0], chosen=quantization is not None)
            return existing[0] if existing else None

        # Almost always it exists; then no write, no disk.
        return await self._db.read(same) or await self._write(tenant, job)

    async def namespaces(self, tenant: str) -> list[Namespace]:
        """See VectorStore; by name."""
        now_s = self._clock.time_s()
        return await self._db.read(lambda connection: read_namespaces(connection, tenant, now_s))

    async def check(self) -> None:
        """See VectorStore. How much room its disk has is known without it."""
        await self.namespaces(DEFAULT_TENANT)

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        check_tenant(tenant)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> int | None:
            found = rows(
                connection, "SELECT id FROM namespaces WHERE tenant = ? AND name = ?", (tenant, name)
            )
            if not found:
                return None
            writing.drop_namespace(connection, found[0][0], now_s)
            return found[0][0]

        namespace_id = await self._write(tenant, job, drops=name)
        if namespace_id is not None:
            await asyncio.to_thread(self._indexes.forget, namespace_id)
        return namespace_id is not None

    async def tenants(self) -> list[str]:
        """Every tenant that has a namespace, by name. For the operator: no tenant may ask this."""
        return await self._db.read(
            lambda connection: [
                tenant
                for (tenant,) in rows(connection, "SELECT DISTINCT tenant FROM namespaces ORDER BY tenant")
            ]
        )

    async def tenants_with(self, namespace: str) -> list[str]:
        """See VectorStore."""
        check_namespace(namespace)
        sql = "SELECT tenant FROM namespaces WHERE name = ? ORDER BY tenant"
        return await self._db.read(
            lambda connection: [name for (name,) in rows(connection, sql, (namespace,))]
        )

    async def stats(self, tenant: str) -> list[NamespaceStats]:
        """See VectorStore."""
        check_tenant(tenant)
        now_s = self._clock.time_s()
        return await self._db.read(lambda connection: read_stats(connection, self._indexes, tenant, now_s))

    async def erase_tenant(self, tenant: str) -> int:
        """See VectorStore. Rows, full-text tables, operations and idempotency records all go, with what they
        left in freed space, in the write-ahead log and in the history. The file is written anew: other writes
        wait for as long as that takes, and the disk needs room for two more copies of it.

        Raises:
            Unavailable: the file, the history or the log still holds something and cannot be written now:
                erase again.
        """
        check_tenant(tenant)
        self._queries.forget(tenant)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> tuple[int, list[int]]:
            ids = [i for (i,) in rows(connection, "SELECT id FROM namespaces WHERE tenant = ?", (tenant,))]
            # Freed pages are overwritten: a file that is copied afterwards holds nothing of the tenant.
            rows(connection, "PRAGMA secure_delete=ON")
            removed = sum(writing.drop_namespace(connection, one, now_s) for one in ids)
            at_commit(connection, lambda writer: execute_many(writer, "PRAGMA secure_delete=FAST", [()]))
            return removed, ids

        removed, ids = await self._write(tenant, job, erases=True)
        for namespace_id in ids:
            await asyncio.to_thread(self._indexes.forget, namespace_id)
        await self._db.write(overwrite_free_space)
        await self._db.vacuum()
        await asyncio.to_thread(lambda: empty_log(self._db.path, wait_s=LOG_WAIT_S))
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
        embedder_id: str | None = None,
    ) -> UpsertResult:
        """See VectorStore.

        Raises:
            Conflict: an item is not at `expected_version`, the idempotency key was used for another
                request, or the namespace has another embedder.
            InvalidInput: a vector or value does not fit; an id occurs twice.
            TooLarge: an item or the batch is past its limit.
        """
        _check_batch(items)
        if idempotency_key is not None:
            check_idempotency_key(idempotency_key)

        async def write(row: NamespaceRow) -> UpsertResult:
            if embedder_id is not None and embedder_id != row.embedder_id:
                raise Conflict(
                    f"namespace {namespace!r} holds vectors of {row.embedder_id!r}, these are of "
                    f"{embedder_id!r}",
                    hint="vectors of different embedders cannot be compared: use a namespace of its own",
                )
            return await self._upserted(tenant, row, items, expected_version, idempotency_key)

        return await self._with_namespace(tenant, namespace, write)

    async def _upserted(
        self,
        tenant: str,
        row: NamespaceRow,
        items: Sequence[Item],
        expected_version: int | None,
        idempotency_key: str | None,
    ) -> UpsertResult:
        prepared = await self._prepare(row, items)
        digest = ""
        if idempotency_key is not None:
            digest = await asyncio.to_thread(_request_digest, items, expected_version)
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

        return await self._written(tenant, row, job)

    async def restore(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        documents: Mapping[str, Fingerprint] | None = None,
    ) -> int:
        """See VectorStore.

        Raises:
            InvalidInput: a value does not fit, an id occurs twice, or a document is missing.
            TooLarge: an item or the batch is past its limit.
        """
        _check_batch(items)
        row = await self._namespace(tenant, namespace)
        prepared = await self._prepare(row, items, embedded=not row.callers_vectors)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> int:
            current = self._unchanged(connection, tenant, row)
            pairs = list(zip(prepared, items, strict=True))
            writing.restore_items(connection, current, pairs, documents or {}, now_s)
            return len(pairs)

        return await self._written(tenant, row, job)

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        """See VectorStore. Vectors come along in namespaces whose vectors callers bring."""
        wanted = _checked_ids(ids)
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> list[Item]:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT {_columns(row.callers_vectors)} FROM items WHERE namespace_id = ? AND {LIVE} "
                "AND id IN (SELECT value FROM json_each(?))",
                (row.id, now_s, wanted),
            )
            layout = row.layout if row.callers_vectors else None
            by_id = {item.id: item for item in (read_item(r, layout) for r in found)}
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
        row = await self._namespace(tenant, namespace)

        def job(connection: apsw.Connection) -> int:
            row = find_namespace(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT key FROM items WHERE namespace_id = ? AND {LIVE} AND ({sql})",
                (row.id, now_s, *bindings),
            )
            if found:
                writing.delete_keys(connection, row, [key for (key,) in found], now_s)
            return len(found)

        return await self._written(tenant, row, job)

    async def list_items(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
        vectors: bool = False,
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
            layout = row.layout if vectors or row.callers_vectors else None
            found = rows(
                connection,
                f"SELECT {_columns(layout is not None)} FROM items WHERE namespace_id = ? AND id > ? "
                f"AND {LIVE} AND ({sql}) ORDER BY id LIMIT ?",
                (row.id, after, now_s, *bindings, limit + 1),
            )
            items = tuple(read_item(r, layout) for r in found[:limit])
            return Page(items=items, cursor=_cursor(items[-1].id) if len(found) > limit else None)

        return await self._db.read(job)

    # Search

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        """See VectorStore. `mode` of the result is what was done: a side that the query gives nothing for
        takes no part, and then it is the other's name.

        Raises:
            InvalidInput: the query gives nothing that its mode can search with, or its filter is malformed.
            Conflict: the namespace's embedder is not this store's.
            DeadlineExceeded: it took longer than `agentdb.query_timeout_s`.
        """
        return (await self.search_many(tenant, namespace, (query,)))[0]

    async def search_many(
        self, tenant: str, namespace: str, queries: Sequence[SearchQuery]
    ) -> list[SearchResult]:
        """See VectorStore; raises what `search` raises.

        Raises:
            TooLarge: there are more queries than `agentdb.queries_max`.
        """
        if len(queries) > self._settings.queries_max:
            raise TooLarge(
                f"{len(queries)!r} queries in one call", hint=f"at most {self._settings.queries_max}"
            )
        return await self._with_namespace(tenant, namespace, lambda row: self._searched(tenant, row, queries))

    async def _searched(
        self, tenant: str, row: NamespaceRow, queries: Sequence[SearchQuery]
    ) -> list[SearchResult]:
        requests = await self._requests(tenant, row, queries)
        semantic = not row.callers_vectors and self._embedder.semantic

        def job(connection: apsw.Connection) -> list[SearchResult]:
            current = self._unchanged(connection, tenant, row)
            results: list[SearchResult] = []
            with deadline(connection, self._settings.query_timeout_s):
                for request in requests:
                    found = self._searcher.run(connection, current, request)
                    results.append(
                        SearchResult.trusted(
                            hits=found.hits,
                            embedder_id=row.embedder_id,
                            semantic=semantic,
                            mode=request.mode,
                            tier=found.tier,
                        )
                    )
            return results

        if len(requests) == 1 and self._searcher.is_quick(row.layout, requests[0]):
            # It takes less time than handing it to another thread and back.
            return self._db.read_here(job)
        return await self._db.read(job)

    async def _requests(
        self, tenant: str, row: NamespaceRow, queries: Sequence[SearchQuery]
    ) -> list[Request]:
        """What the database needs of each query: modes decided, texts embedded, filters compiled."""
        modes: list[Mode] = [self._mode(row, query) for query in queries]
        bare = [
            position
            for position, (query, mode) in enumerate(zip(queries, modes, strict=True))
            if mode != "text" and query.vector is None
        ]
        vectors: dict[int, NDArray[np.float32]] = {}
        if bare:
            texts = [queries[position].text[: schema.QUERY_CHARS_MAX] for position in bare]
            vectors = dict(zip(bare, await self._queries.of(tenant, texts), strict=True))
        semantic = not row.callers_vectors and self._embedder.semantic
        now_s = self._clock.time_s()
        requests: list[Request] = []
        for position, (query, mode) in enumerate(zip(queries, modes, strict=True)):
            vector = vectors.get(position)
            if mode != "text" and query.vector is not None:
                vector = check_query(query.vector, row.layout)
            requests.append(
                Request(
                    query=query,
                    mode=mode,
                    vector=vector,
                    vector_weight=1.0 if row.callers_vectors or semantic else SPELLING_WEIGHT,
                    where=compile_filter(query.filter) if query.filter else None,
                    now_s=now_s,
                )
            )
        return requests

    def _mode(self, row: NamespaceRow, query: SearchQuery) -> Mode:
        """Which sides of the search take part."""
        if query.at_s is not None and not math.isfinite(query.at_s):
            raise InvalidInput(f"the query asks for time {query.at_s!r}", hint="give Unix seconds")
        text = bool(query.text.strip())
        given = query.vector is not None or (text and not row.callers_vectors)
        if query.mode == "text":
            given = False
        elif not row.callers_vectors and row.embedder_id != self._embedder.id:
            raise self._other_embedder(row)
        if query.mode == "vector" or (query.mode == "hybrid" and not text):
            if not given:
                raise InvalidInput(
                    "the query has no vector and nothing to make one from",
                    hint="give it a vector" if row.callers_vectors else "give it a text or a vector",
                )
            return "vector"
        if not text:
            raise InvalidInput("the query has no text", hint="give it one, or search by vector")
        return "hybrid" if given else "text"

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

        return await self._written(tenant, row, job)

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
        row = await self._namespace(tenant, namespace)

        def job(connection: apsw.Connection) -> int:
            row = find_namespace(connection, tenant, namespace)
            return writing.delete_documents(connection, row, wanted, now_s)

        return await self._written(tenant, row, job)

    # Shared

    async def _namespace(self, tenant: str, name: str) -> NamespaceRow:
        row = await self._db.read(lambda connection: find_namespace(connection, tenant, name))
        if len(self._namespaces) >= NAMESPACES_KNOWN_MAX:
            self._namespaces.clear()
        self._namespaces[tenant, name] = row
        return row

    async def _with_namespace(self, tenant: str, name: str, use: Callable[[NamespaceRow], Awaitable[T]]) -> T:
        """`use` of the namespace as it was last seen, which it checks in its transaction; a look saved."""
        row = self._namespaces.get((tenant, name))
        if row is not None:
            try:
                return await use(row)
            except AgenticFlowError:
                # It may have been made anew since.
                again = await self._namespace(tenant, name)
                if again == row:
                    raise
        return await use(await self._namespace(tenant, name))

    @staticmethod
    def _unchanged(connection: apsw.Connection, tenant: str, row: NamespaceRow) -> NamespaceRow:
        """The namespace again, inside the transaction: it may have been deleted or made anew meanwhile."""
        current = find_namespace(connection, tenant, row.name)
        if current != row:
            raise Conflict(f"namespace {row.name!r} was replaced meanwhile", hint="repeat the call")
        return current

    async def _write(
        self,
        tenant: str,
        job: Callable[[apsw.Connection], T],
        *,
        drops: str | None = None,
        erases: bool = False,
    ) -> T:
        """The job's result once it, and its record in the history if one is kept, are durable.

        Args:
            drops: The namespace that the job removes, if that is what it does.
            erases: Whether it removes the tenant.
        """
        history = self._history
        if history is None:
            return await self._db.write(job)
        now_s = self._clock.time_s()

        def recorded(connection: apsw.Connection) -> T:
            with history.recording(connection, tenant, now_s, drops=drops, erases=erases):
                return job(connection)

        result = await self._db.write(recorded)
        if erases:
            # Nothing is erased as long as the sealed history still holds it.
            await asyncio.to_thread(history.seal)
        return result

    async def _written(self, tenant: str, row: NamespaceRow, job: Callable[[apsw.Connection], T]) -> T:
        """The same for a job that changes rows; the index is brought up to date afterwards."""
        result = await self._write(tenant, job)
        self._indexer.wake(row.layout)
        return result

    async def _prepare(
        self, row: NamespaceRow, items: Sequence[Item], *, embedded: bool = False
    ) -> list[PreparedItem]:
        """Check, embed and cut into words, away from the event loop and the writer thread.

        Args:
            embedded: Vectors that the items bring are the store's own, as it gave them out.
        """
        layout = row.layout
        bare = [position for position, item in enumerate(items) if item.vector is None]
        if bare and row.callers_vectors:
            raise InvalidInput(
                f"item {items[bare[0]].id!r} has no vector", hint=f"namespace {row.name!r} takes your vectors"
            )
        if bare and row.embedder_id != self._embedder.id:
            raise self._other_embedder(row)
        made: NDArray[np.float32] | None = None
        if bare:
            await asyncio.to_thread(lambda: [check_item(items[position]) for position in bare])
            made = await self._embedder.embed([items[position].text for position in bare])

        def ready() -> list[PreparedItem]:
            metadata = [check_item(item) for item in items]
            if made is not None and len(bare) == len(items):
                return prepare(items, metadata, made, layout)
            brought = [position for position, item in enumerate(items) if item.vector is not None]
            checked = check_vectors(
                [vector for item in items if (vector := item.vector) is not None],
                layout,
                lambda position: f"item {items[brought[position]].id!r}",
                embedded=embedded,
            )
            if made is None:
                return prepare(items, metadata, checked, layout)
            vectors = np.empty((len(items), layout.dimension), np.float32)
            vectors[brought], vectors[bare] = checked, made
            return prepare(items, metadata, vectors, layout)

        if len(items) <= PREPARED_HERE_MAX:
            return ready()
        return await asyncio.to_thread(ready)

    def _other_embedder(self, row: NamespaceRow) -> Conflict:
        return Conflict(
            f"namespace {row.name!r} was embedded by {row.embedder_id!r}, this store embeds with "
            f"{self._embedder.id!r}",
            hint="configure that embedder, or delete the namespace and fill it again",
        )


def _prepare_connection(connection: apsw.Connection) -> None:
    register_functions(connection)
    # Rows that go away are overwritten where that costs no page more; see `overwrite_free_space`.
    rows(connection, "PRAGMA secure_delete=FAST")


def _columns(vector: bool) -> str:
    return f"{ITEM_COLUMNS}, {VECTOR_COLUMN}" if vector else ITEM_COLUMNS


def _check_batch(items: Sequence[Item]) -> None:
    if len(items) > schema.ITEMS_PER_CALL_MAX:
        raise TooLarge(f"{len(items)!r} items in one call", hint=f"at most {schema.ITEMS_PER_CALL_MAX}")
    if len({item.id for item in items}) != len(items):
        raise InvalidInput("an item id occurs twice in one call", hint="send each item once")


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
