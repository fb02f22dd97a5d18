"""AgentDB on PostgreSQL with pgvector: the `VectorStore` for what one machine's folder cannot hold or share.

What a call means is the same as in the embedded store; both pass one contract suite. The database does the
work: this process keeps connections, and nothing that another process would have to know.
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from psycopg import AsyncConnection

from agentic_flow.agentdb import schema as limits
from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.agentdb.names import check_namespace, check_tenant
from agentic_flow.agentdb.namespaces import namespace_spec
from agentic_flow.agentdb.postgres import schema, writing
from agentic_flow.agentdb.postgres.conditions import compile_filter
from agentic_flow.agentdb.postgres.connections import EVERY_TENANT, Connections, connect, fetch
from agentic_flow.agentdb.postgres.encoding import index_key, unescape
from agentic_flow.agentdb.postgres.growth import Growth
from agentic_flow.agentdb.postgres.preparing import prepare_items, prepare_requests
from agentic_flow.agentdb.postgres.rows import (
    DIMENSION_MAX,
    LIVE,
    NamespaceRow,
    find_namespace,
    item_columns,
    read_item,
    read_namespaces,
)
from agentic_flow.agentdb.postgres.search import (
    StatisticsCache,
    run_search,
)
from agentic_flow.agentdb.records import check_document, json_list
from agentic_flow.core.auth import DEFAULT_TENANT
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    InvalidSettings,
    NotFound,
    TooLarge,
    Unavailable,
)
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

log = structlog.get_logger()

T = TypeVar("T")

NAMESPACES_KNOWN_MAX = 10_000
SERVER_VERSION_MIN = 150_000


class PostgresAgentDB:
    """`VectorStore` in a PostgreSQL database; an async context manager.

    Args:
        url: `postgresql://…` of the primary. Its role owns the schema, or is a member of `agentic_flow_app`.
        settings: The `agentdb` section; `replica_url` there may name a standby for reads.
        embedder: Embeds texts of namespaces without vectors of their own; the hashed n-gram one by default.
        clock: Tells the time of writes and expiry.
        create: Migrate a database that has no schema of ours. Older schemas are never migrated on opening.

    Entering raises:
        InvalidSettings: the URL is malformed or refused, or the replica is none.
        Conflict: the schema is older or newer than this program's.
        Forbidden: the role may not migrate, or not work as `agentic_flow_app`.
        Unavailable: the database cannot be reached, has no pgvector, or is too old.
    """

    def __init__(
        self,
        url: str,
        settings: AgentDBSettings,
        embedder: Embedder | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        create: bool = False,
    ) -> None:
        self._embedder = embedder or HashedNgramEmbedder(settings.embedding_dimension)
        self._clock = clock
        self._settings = settings
        self._url = url
        self._create = create
        replica = settings.replica_url
        self._replica_url = replica.get_secret_value() if replica else None
        self._db = Connections(
            url,
            self._replica_url,
            pool_max=settings.pool_max,
            query_timeout_s=settings.query_timeout_s,
            clock=clock,
        )
        self._statistics = StatisticsCache()
        self._namespaces: dict[tuple[str, str], NamespaceRow] = {}
        self._growth = Growth(self._db, settings)

    async def __aenter__(self) -> Self:
        vector_schema = await self._check()
        await self._db.open(vector_schema)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._growth.close()
        await self._db.close()

    async def _check(self) -> str:
        """Whether this program can work with the database; the schema in which pgvector lives."""
        if self._create:
            async with await connect(self._url) as connection:
                missing = not await schema.has_schema(connection)
            if missing:
                await schema.migrate(self._url)
        async with await connect(self._url) as connection:
            ((server, standby),) = await fetch(
                connection, "SELECT current_setting('server_version_num')::int, pg_is_in_recovery()"
            )
            if server < SERVER_VERSION_MIN:
                raise Unavailable(
                    f"PostgreSQL has version {server // 10_000!r}",
                    hint=f"use {SERVER_VERSION_MIN // 10_000} or newer",
                )
            if standby:
                raise InvalidSettings(
                    f"database {self._db.where} is a standby, which takes no writes",
                    hint="give the primary's URL, and this one as agentdb.replica_url",
                )
            if not await schema.has_schema(connection):
                raise Conflict(
                    f"database {self._db.where} has no schema of AgentDB",
                    hint=f"run {schema.MIGRATE_COMMAND!r}",
                )
            await schema.work_as_app(connection)
            await schema.check_version(connection)
            vector_schema = await schema.find_pgvector(connection)
        if vector_schema is None:
            raise Unavailable(f"database {self._db.where} has lost pgvector", hint="CREATE EXTENSION vector")
        if self._replica_url is not None:
            await _check_replica(self._replica_url)
        return vector_schema

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
        if spec.dimension > DIMENSION_MAX:
            raise InvalidInput(
                f"dimension {spec.dimension!r} is out of range", hint=f"pgvector stores 1 to {DIMENSION_MAX}"
            )
        now_s = self._clock.time_s()

        async def same(connection: AsyncConnection) -> Namespace | None:
            existing = await read_namespaces(connection, tenant, now_s, name)
            if existing:
                spec.demand(existing[0], chosen=quantization is not None)
            return existing[0] if existing else None

        async def job(connection: AsyncConnection) -> Namespace:
            made = await fetch(
                connection,
                "INSERT INTO agentic_flow.namespaces (tenant, name, metric, dimension, embedder_id, "
                "quantization, "
                "callers_vectors, created_at_s) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
                "ON CONFLICT (tenant, name) DO NOTHING RETURNING id",
                (
                    tenant, name, spec.metric, spec.dimension, spec.embedder_id, spec.quantization,
                    spec.callers_vectors, now_s,
                ),
            )  # fmt: skip
            if made:
                await writing.log(connection, tenant, made[0][0], "create", [], now_s)
            existing = await same(connection)
            if existing is None:
                raise Conflict(f"namespace {name!r} was deleted meanwhile", hint="repeat the call")
            return existing

        # Almost always it exists; then nothing is written.
        return await self._db.read(tenant, same) or await self._db.write(tenant, job)

    async def namespaces(self, tenant: str) -> list[Namespace]:
        """See VectorStore; by name."""
        check_tenant(tenant)
        now_s = self._clock.time_s()
        return await self._db.read(tenant, lambda connection: read_namespaces(connection, tenant, now_s))

    async def check(self) -> None:
        """See VectorStore."""
        await self.namespaces(DEFAULT_TENANT)
        await self._db.check_room()

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        """See VectorStore."""
        check_tenant(tenant)

        async def job(connection: AsyncConnection) -> tuple[bool, bool]:
            found = await fetch(
                connection,
                "SELECT id, shard FROM agentic_flow.namespaces WHERE tenant = %s AND name = %s FOR UPDATE",
                (tenant, name),
            )
            for namespace_id, shard in found:
                await writing.drop_namespace(connection, namespace_id, shard)
            return bool(found), any(shard for _, shard in found)

        deleted, swept = await self._db.write(tenant, job)
        if swept:
            await self._growth.sweep(tenant)
        return deleted

    async def tenants(self) -> list[str]:
        """Every tenant that has a namespace, by name. For the operator: no tenant may ask this."""

        async def job(connection: AsyncConnection) -> list[str]:
            found = await fetch(
                connection, "SELECT DISTINCT tenant FROM agentic_flow.namespaces ORDER BY tenant"
            )
            return [tenant for (tenant,) in found]

        return await self._db.read(EVERY_TENANT, job)

    async def tenants_with(self, namespace: str) -> list[str]:
        """See VectorStore."""
        check_namespace(namespace)

        async def job(connection: AsyncConnection) -> list[str]:
            found = await fetch(
                connection,
                'SELECT tenant FROM agentic_flow.namespaces WHERE name = %s ORDER BY tenant COLLATE "C"',
                (namespace,),
            )
            return [tenant for (tenant,) in found]

        return await self._db.read(EVERY_TENANT, job)

    async def stats(self, tenant: str) -> list[NamespaceStats]:
        """See VectorStore. A graph index changes with its rows, so none lags."""
        check_tenant(tenant)
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection) -> list[NamespaceStats]:
            stats: list[NamespaceStats] = []
            for namespace in await read_namespaces(connection, tenant, now_s):
                row = await find_namespace(connection, tenant, namespace.name)
                ((stored, text_bytes, index_bytes),) = await fetch(
                    connection,
                    "SELECT count(*), coalesce(sum(octet_length(i.text) + octet_length(i.metadata)), "
                    "0)::bigint, "
                    "pg_relation_size(to_regclass(%s)) FROM agentic_flow.items AS i "
                    "WHERE i.shard = %s AND i.namespace_id = %s",
                    (f"agentic_flow.items_n{row.shard}_graph", row.shard, row.id),
                )
                stats.append(
                    NamespaceStats(
                        **namespace.model_dump(),
                        tier="graph" if row.graph else "exact",
                        index_lag=0,
                        index_bytes=index_bytes,
                        vector_bytes=stored * row.layout.stored_bytes,
                        text_bytes=text_bytes,
                        sequence=row.sequence,
                    )
                )
            return stats

        return await self._db.read(tenant, job)

    async def erase_tenant(self, tenant: str) -> int:
        """See VectorStore. Operations and idempotency records go too; the disk forgets at the next vacuum."""
        check_tenant(tenant)

        async def job(connection: AsyncConnection) -> tuple[int, bool]:
            found = await fetch(
                connection,
                "SELECT id, shard FROM agentic_flow.namespaces WHERE tenant = %s ORDER BY id FOR UPDATE",
                (tenant,),
            )
            removed = [await writing.drop_namespace(connection, one, shard) for one, shard in found]
            return sum(removed), any(shard for _, shard in found)

        removed, swept = await self._db.write(tenant, job)
        if swept:
            await self._growth.sweep(tenant)
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
        """See VectorStore: all of the items or none.

        Raises:
            Conflict: an item is not at `expected_version`, the idempotency key was used for another
                request, or the namespace has another embedder.
            InvalidInput: a vector or value does not fit; an id occurs twice.
            TooLarge: an item or the batch is past its limit.
        """
        _check_batch(items)
        if idempotency_key is not None and not (
            0 < len(idempotency_key) <= limits.KEY_CHARS_MAX and idempotency_key.isprintable()
        ):
            raise InvalidInput(
                f"{idempotency_key[: limits.KEY_CHARS_MAX]!r} is no idempotency key",
                hint=f"1 to {limits.KEY_CHARS_MAX} printable characters",
            )
        return await self._on(
            tenant,
            namespace,
            lambda row: self._upserted(tenant, row, items, expected_version, idempotency_key, embedder_id),
        )

    async def _upserted(
        self,
        tenant: str,
        row: NamespaceRow,
        items: Sequence[Item],
        expected_version: int | None,
        idempotency_key: str | None,
        embedder_id: str | None,
    ) -> UpsertResult:
        if embedder_id is not None and embedder_id != row.embedder_id:
            raise Conflict(
                f"namespace {row.name!r} holds vectors of {row.embedder_id!r}, these are of {embedder_id!r}",
                hint="vectors of different embedders cannot be compared: use a namespace of its own",
            )
        digest = "" if idempotency_key is None else _request_digest(items, expected_version)
        prepared = await prepare_items(self._embedder, row, items)
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection, current: NamespaceRow) -> UpsertResult:
            if idempotency_key is not None:
                earlier = await _earlier(connection, tenant, current, idempotency_key, digest, now_s)
                if earlier is not None:
                    return earlier
            result = await writing.upsert_items(
                connection, tenant, current, prepared, expected_version, now_s
            )
            if idempotency_key is not None:
                await connection.execute(
                    "UPDATE agentic_flow.idempotency SET response = %s WHERE namespace_id = %s AND key = %s",
                    (result.model_dump_json(), current.id, idempotency_key),
                )
            return result

        return await self._written(tenant, row, job, len(items))

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
        prepared = await prepare_items(self._embedder, row, items, restored=True)
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection, current: NamespaceRow) -> int:
            await writing.restore_items(connection, tenant, current, prepared, documents or {}, now_s)
            return len(prepared)

        return await self._written(tenant, row, job, len(items))

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        """See VectorStore. Vectors come along in namespaces whose vectors callers bring."""
        keys = _id_keys(ids)
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection) -> list[Item]:
            row = await find_namespace(connection, tenant, namespace)
            vectors = row.callers_vectors
            found = await fetch(
                connection,
                f"SELECT {item_columns(row, vectors=vectors)} FROM agentic_flow.items AS i "
                f"WHERE i.shard = %s AND i.namespace_id = %s AND i.id = ANY(%s) AND {LIVE}",
                (row.shard, row.id, keys, now_s),
            )
            by_id = {item.id: item for item in (read_item(row, r, vectors=vectors) for r in found)}
            return [by_id[item_id] for item_id in ids if item_id in by_id]

        return await self._db.read(check_tenant(tenant), job)

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        """See VectorStore."""
        return await self._delete(tenant, namespace, "i.id = ANY(%s)", [_id_keys(ids)])

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int:
        """See VectorStore.

        Raises:
            InvalidInput: the filter is malformed, or empty.
        """
        if not where:
            raise InvalidInput(
                "the filter is empty, which would delete everything", hint="use delete_namespace for that"
            )
        return await self._delete(tenant, namespace, *compile_filter(where))

    async def _delete(self, tenant: str, namespace: str, condition: str, bindings: list[Any]) -> int:
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection, current: NamespaceRow) -> int:
            return await writing.delete_where(
                connection, tenant, current, f"{LIVE} AND {condition}", [now_s, *bindings], now_s
            )

        return await self._on(tenant, namespace, lambda row: self._written(tenant, row, job, 0))

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
        if not 1 <= limit <= limits.PAGE_ITEMS_MAX:
            raise InvalidInput(f"limit {limit!r} is out of range", hint=f"1 to {limits.PAGE_ITEMS_MAX}")
        condition, bindings = compile_filter(where)
        after = index_key(_read_cursor(cursor))[0]
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection) -> Page:
            row = await find_namespace(connection, tenant, namespace)
            sent = vectors or row.callers_vectors
            found = await fetch(
                connection,
                f"SELECT {item_columns(row, vectors=sent)} FROM agentic_flow.items AS i "
                f"WHERE i.shard = %s AND i.namespace_id = %s AND i.id > %s AND {LIVE} AND {condition} "
                "ORDER BY i.id LIMIT %s",
                (row.shard, row.id, after, now_s, *bindings, limit + 1),
            )
            items = tuple(read_item(row, r, vectors=sent) for r in found[:limit])
            return Page(items=items, cursor=_cursor(items[-1].id) if len(found) > limit else None)

        return await self._db.read(check_tenant(tenant), job)

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
        timeout_s = self._settings.query_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._on(tenant, namespace, lambda row: self._searched(tenant, row, queries))
        except TimeoutError:
            raise DeadlineExceeded(
                f"the search took longer than {timeout_s!r} s",
                hint="narrow its filter, ask for less, or raise agentdb.query_timeout_s",
            ) from None

    async def _searched(
        self, tenant: str, row: NamespaceRow, queries: Sequence[SearchQuery]
    ) -> list[SearchResult]:
        requests = await prepare_requests(self._embedder, row, queries, self._clock.time_s())
        semantic = not row.callers_vectors and self._embedder.semantic

        async def job(connection: AsyncConnection) -> list[SearchResult]:
            current = await self._unchanged(connection, tenant, row)
            results: list[SearchResult] = []
            for request in requests:
                found = await run_search(connection, self._statistics, current, request)
                results.append(
                    SearchResult(
                        hits=found.hits,
                        embedder_id=row.embedder_id,
                        semantic=semantic,
                        mode=request.mode,
                        tier=found.tier,
                    )
                )
            return results

        return await self._db.read(tenant, job)

    # Documents

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        """See VectorStore. A document that comes without chunks and whose sha256 is the stored one keeps its
        chunks; only its fingerprint is refreshed.

        Raises:
            TooLarge: a chunk, a document or the batch is past its limit.
            InvalidInput: a path or chunk id occurs twice, or a chunk does not fit.
            Conflict: a chunk's id belongs to another item, or the namespace has another embedder.
        """
        if len(documents) > limits.DOCUMENTS_PER_CALL_MAX:
            raise TooLarge(
                f"{len(documents)!r} documents in one call", hint=f"at most {limits.DOCUMENTS_PER_CALL_MAX}"
            )
        if len({document.path for document in documents}) != len(documents):
            raise InvalidInput("a path occurs twice in one call", hint="send each document once")
        for document in documents:
            check_document(document)
        row = await self._namespace(tenant, namespace)
        chunks = [chunk for document in documents for chunk in document.chunks]
        if len({chunk.id for chunk in chunks}) != len(chunks):
            raise InvalidInput("a chunk id occurs twice in one call", hint="use path:line_start-line_end")
        prepared = iter(await prepare_items(self._embedder, row, chunks))
        ready = [
            writing.PreparedDocument(
                document.path, document.fingerprint, tuple(next(prepared) for _ in document.chunks)
            )
            for document in documents
        ]
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection, current: NamespaceRow) -> int:
            return await writing.put_documents(connection, tenant, current, ready, now_s)

        return await self._written(tenant, row, job, len(chunks))

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        """See VectorStore."""

        async def job(connection: AsyncConnection) -> dict[str, Fingerprint]:
            row = await find_namespace(connection, tenant, namespace)
            found = await fetch(
                connection,
                "SELECT coalesce(d.long_path, d.path_key), d.size_bytes, d.mtime_ns, d.sha256 "
                "FROM agentic_flow.documents AS d WHERE d.namespace_id = %s",
                (row.id,),
            )
            return {
                unescape(path): Fingerprint(size_bytes=size, mtime_ns=mtime, sha256=unescape(digest))
                for path, size, mtime, digest in found
            }

        return await self._db.read(check_tenant(tenant), job)

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        """See VectorStore; how many existed."""
        json_list(paths, "the paths")
        now_s = self._clock.time_s()

        async def job(connection: AsyncConnection, current: NamespaceRow) -> int:
            return await writing.delete_documents(connection, tenant, current, paths, now_s)

        return await self._on(tenant, namespace, lambda row: self._written(tenant, row, job, 0))

    # Large namespaces

    async def promote(self, tenant: str, namespace: str) -> bool:
        """Give a namespace a partition and a graph index of its own now. Writers wait, readers do not.

        Returns:
            Whether it was done: not for a namespace that has one, or whose vectors are too long for one.
        """
        return await self._growth.promote(tenant, await self._namespace(tenant, namespace))

    async def settle(self) -> None:
        """Return once every namespace that grew large here has its own partition."""
        await self._growth.settle()

    # Shared

    async def _on(self, tenant: str, name: str, call: Callable[[NamespaceRow], Awaitable[T]]) -> T:
        """The call's result on the namespace as remembered; on what it is now, where it was replaced."""
        row = self._namespaces.get((tenant, name)) or await self._namespace(tenant, name)
        try:
            return await call(row)
        except (Conflict, InvalidInput, NotFound):
            again = await self._namespace(tenant, name)
            if _same(again, row):
                raise
            return await call(again)

    async def _namespace(self, tenant: str, name: str) -> NamespaceRow:
        row = await self._db.read(
            check_tenant(tenant), lambda connection: find_namespace(connection, tenant, name)
        )
        if len(self._namespaces) >= NAMESPACES_KNOWN_MAX:
            self._namespaces.clear()
        self._namespaces[tenant, name] = row
        return row

    @staticmethod
    async def _unchanged(
        connection: AsyncConnection, tenant: str, row: NamespaceRow, *, lock: str = ""
    ) -> NamespaceRow:
        """The namespace again, inside the transaction: it may have been deleted or made anew meanwhile."""
        current = await find_namespace(connection, tenant, row.name, lock=lock)
        if not _same(current, row):
            raise Conflict(f"namespace {row.name!r} was replaced meanwhile", hint="repeat the call")
        return current

    async def _written(
        self,
        tenant: str,
        row: NamespaceRow,
        job: Callable[[AsyncConnection, NamespaceRow], Awaitable[T]],
        rows_written: int,
    ) -> T:
        """The job's result once it is durable. The namespace stays, and in its partition, while it runs."""
        current = row

        async def locked(connection: AsyncConnection) -> T:
            nonlocal current
            current = await self._unchanged(connection, tenant, row, lock="FOR KEY SHARE OF n")
            return await job(connection, current)

        result = await self._db.write(tenant, locked)
        self._growth.written(tenant, current, rows_written)
        return result


async def _check_replica(url: str) -> None:
    """Raise InvalidSettings where the replica is none; one that is down now may come back."""
    try:
        async with await connect(url) as connection:
            ((standby,),) = await fetch(connection, "SELECT pg_is_in_recovery()")
    except Unavailable as error:
        log.warning("replica_left", error=error.message)
        return
    if not standby:
        raise InvalidSettings(
            "agentdb.replica_url names a primary, not a standby",
            hint="give the URL of a streaming replica of agentdb.database_url, or leave it out",
        )


def _same(one: NamespaceRow, other: NamespaceRow) -> bool:
    """Whether both are the same namespace, wherever its rows lie."""
    return (one.id, one.layout, one.embedder_id, one.callers_vectors) == (
        other.id,
        other.layout,
        other.embedder_id,
        other.callers_vectors,
    )


def _check_batch(items: Sequence[Item]) -> None:
    if len(items) > limits.ITEMS_PER_CALL_MAX:
        raise TooLarge(f"{len(items)!r} items in one call", hint=f"at most {limits.ITEMS_PER_CALL_MAX}")
    if len({item.id for item in items}) != len(items):
        raise InvalidInput("an item id occurs twice in one call", hint="send each item once")


def _id_keys(ids: Sequence[str]) -> list[str]:
    if len(ids) > limits.IDS_PER_CALL_MAX:
        raise TooLarge(f"{len(ids)!r} ids in one call", hint=f"at most {limits.IDS_PER_CALL_MAX}")
    json_list(ids, "the ids")
    return [index_key(item_id)[0] for item_id in ids]


def _request_digest(items: Sequence[Item], expected_version: int | None) -> str:
    digest = hashlib.sha256(repr(expected_version).encode())
    for item in items:
        digest.update(
            item.model_dump_json(
                exclude={"version", "created_at_s", "updated_at_s"}, context={"vectors": "base64"}
            ).encode()
        )
    return digest.hexdigest()


async def _earlier(
    connection: AsyncConnection, tenant: str, row: NamespaceRow, key: str, digest: str, now_s: float
) -> UpsertResult | None:
    """What the same request got before; else the key is taken now. Too old keys are forgotten.

    Two calls with one key at the same time: the second waits here until the first has committed.
    """
    await connection.execute(
        "DELETE FROM agentic_flow.idempotency WHERE namespace_id = %s AND at_s < %s",
        (row.id, now_s - limits.IDEMPOTENCY_KEPT_S),
    )
    taken = await fetch(
        connection,
        "INSERT INTO agentic_flow.idempotency (tenant, namespace_id, key, request_sha256, response, at_s) "
        "VALUES (%s, %s, %s, %s, '', %s) ON CONFLICT (namespace_id, key) DO NOTHING RETURNING 1",
        (tenant, row.id, key, digest, now_s),
    )
    if taken:
        return None
    ((stored_digest, response),) = await fetch(
        connection,
        "SELECT request_sha256, response FROM agentic_flow.idempotency WHERE namespace_id = %s AND key = %s",
        (row.id, key),
    )
    if stored_digest != digest:
        raise Conflict(
            f"the idempotency key {key!r} was used for another request",
            hint="use a new key for a new request",
        )
    return UpsertResult.model_validate_json(response)


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
