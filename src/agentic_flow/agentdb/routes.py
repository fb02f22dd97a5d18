"""AgentDB over HTTP, for the tenant of the caller and no other: what its HTTP twin speaks.

`operations` is the table of all of them; the routes and the OpenAPI document (`GET /openapi.json`) are made
from it. Reading demands the scope `memory:read`, everything else `memory:write`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.http import bulk
from agentic_flow.agentdb.http.bodies import (
    BatchOptions,
    Chunks,
    Deleted,
    Deletion,
    Documents,
    Erased,
    ExportLine,
    FingerprintMap,
    Ids,
    ImportOptions,
    ImportReport,
    ItemList,
    Listing,
    NamespaceList,
    NamespaceSpec,
    Paths,
    Queries,
    Restore,
    Restored,
    SearchOptions,
    SearchResults,
    StatsList,
    TenantList,
    Upsert,
    VectorOptions,
    WasDeleted,
)
from agentic_flow.agentdb.http.encoding import NDJSON, answer, lines
from agentic_flow.core.errors import InvalidInput, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.openapi import DOCUMENT_PATH, Operation, document, document_route, routes_of
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Name, Namespace, Page, SearchQuery, SearchResult, UpsertResult, Vector
from agentic_flow.core.web import body_max_bytes, principal_of, stream_body

READ, WRITE = "memory:read", "memory:write"
OPERATOR = "platform:admin"
"""Scope of whoever runs the database, and may know what concerns all tenants."""
IDEMPOTENCY_HEADER = "idempotency-key"
RAW = "application/octet-stream"
PUBLIC_PATHS = frozenset({DOCUMENT_PATH})

_ROOT = "/v1/namespaces"
_ONE = "/v1/namespaces/{namespace}"
_DESCRIPTION = (
    "A vector database: namespaces of items with vectors, text and metadata. The tenant is the caller's and "
    "cannot be named. A vector is a list of numbers or base64 of little-endian float32; `vector_format` "
    "chooses how answers write it. What an answer acknowledges is on disk."
)
_DISCARDED_MAX_BYTES = 64 * 1024 * 1024


def build_routes(db: VectorStore, settings: AgentDBSettings | None = None) -> list[Route]:
    """The routes of a store.

    Args:
        settings: `queries_max` is read.
    """
    return routes_of(operations(db, settings or AgentDBSettings()))


def build_document_route() -> Route:
    """`GET /openapi.json`, for a service that is AgentDB alone. Its path is public: see PUBLIC_PATHS."""
    return document_route(openapi_document())


def openapi_document() -> JsonObject:
    """The OpenAPI document of AgentDB's HTTP."""
    return document(
        operations(None, AgentDBSettings()),
        title="AgentDB",
        description=_DESCRIPTION,
        path_types={"namespace": Name},
    )


def operations(db: VectorStore | None, settings: AgentDBSettings) -> list[Operation]:
    """The table. Without a store it can be read and not served."""
    faces: Any = db
    return [
        *_search_operations(_Searches(faces, settings.queries_max)),
        *_item_operations(_Items(faces)),
        *_namespace_operations(_Namespaces(faces)),
        *_document_operations(_Documents(faces)),
        *_stream_operations(_Streams(faces)),
    ]


def _place(request: Request) -> tuple[str, str]:
    """Tenant and namespace of a request."""
    return principal_of(request).tenant, str(request.path_params["namespace"])


# Searching


class _Searches:
    def __init__(self, db: VectorStore, queries_max: int) -> None:
        self._db = db
        self._queries_max = queries_max

    async def one(self, request: Request, body: SearchQuery, query: SearchOptions) -> Response:
        result = await self._db.search(*_place(request), _chosen(body, query))
        return answer(result, query.vector_format)

    async def one_raw(self, request: Request, query: SearchOptions) -> Response:
        (wanted,) = raw_queries(await request.body(), 1, query)
        return answer(await self._db.search(*_place(request), wanted), query.vector_format)

    async def many(self, request: Request, body: Queries, query: BatchOptions) -> Response:
        return await self._many(request, [_chosen(one, query) for one in body.queries], query)

    async def many_raw(self, request: Request, query: BatchOptions) -> Response:
        self._check_count(query.queries)
        return await self._many(request, raw_queries(await request.body(), query.queries, query), query)

    async def _many(
        self, request: Request, queries: Sequence[SearchQuery], options: SearchOptions
    ) -> Response:
        self._check_count(len(queries))
        found = await self._db.search_many(*_place(request), queries)
        return answer(SearchResults(results=tuple(found)), options.vector_format)

    def _check_count(self, count: int) -> None:
        if count > self._queries_max:
            raise TooLarge(
                f"{count!r} queries in one call, more than {self._queries_max!r}",
                hint="send them in several calls, or raise agentdb.queries_max",
            )


def raw_queries(body: bytes, count: int, options: SearchOptions) -> list[SearchQuery]:
    """The queries of a body of bare vectors, little-endian float32, one after the other.

    Raises:
        InvalidInput: its length cannot be `count` vectors of one dimension.
    """
    if not body or len(body) % (4 * count):
        raise InvalidInput(
            f"a body of {len(body)!r} bytes is not {count!r} vectors of float32",
            hint="send 4 bytes a number, little-endian, and say with `queries` how many vectors they are",
        )
    size = len(body) // count
    vectors = (Vector(data=body[start : start + size]) for start in range(0, len(body), size))
    return [_chosen(SearchQuery(vector=vector), options) for vector in vectors]


def _chosen(query: SearchQuery, options: SearchOptions) -> SearchQuery:
    """The query with the fields that the query parameters gave."""
    given = {name: getattr(options, name) for name in options.model_fields_set & _QUERY_FIELDS}
    return query.model_copy(update=given) if given else query


_QUERY_FIELDS = frozenset({"k", "ef", "exact", "mode"})


def _search_operations(faces: _Searches) -> list[Operation]:
    return [
        Operation(
            name="search",
            method="POST",
            path=f"{_ONE}/search",
            summary="The items nearest to a text, a vector, or both.",
            scope=READ,
            body=SearchQuery,
            raw={RAW: faces.one_raw},
            raw_notes={RAW: "One vector of the namespace's dimension, little-endian float32."},
            query=SearchOptions,
            handler=faces.one,
            answer=SearchResult,
        ),
        Operation(
            name="search_many",
            method="POST",
            path=f"{_ONE}/search/batch",
            summary="Several searches from one snapshot.",
            scope=READ,
            body=Queries,
            raw={RAW: faces.many_raw},
            raw_notes={RAW: "As many vectors as `queries` says, little-endian float32, one after the other."},
            query=BatchOptions,
            handler=faces.many,
            answer=SearchResults,
        ),
    ]


# Items


class _Items:
    def __init__(self, db: VectorStore) -> None:
        self._db = db

    async def upsert(self, request: Request, body: Upsert) -> Response:
        result = await self._db.upsert(
            *_place(request),
            body.items,
            expected_version=body.expected_version,
            idempotency_key=request.headers.get(IDEMPOTENCY_HEADER),
            embedder_id=body.embedder_id,
        )
        return answer(result)

    async def restore(self, request: Request, body: Restore) -> Response:
        return answer(Restored(restored=await self._db.restore(*_place(request), body.items, body.documents)))

    async def get(self, request: Request, body: Ids, query: VectorOptions) -> Response:
        items = await self._db.get(*_place(request), body.ids)
        return answer(ItemList(items=tuple(items)), query.vector_format)

    async def page(self, request: Request, body: Listing, query: VectorOptions) -> Response:
        page = await self._db.list_items(
            *_place(request), where=body.where, cursor=body.cursor, limit=body.limit, vectors=body.vectors
        )
        return answer(page, query.vector_format)

    async def delete(self, request: Request, body: Deletion) -> Response:
        if body.ids is not None and body.where is None:
            count = await self._db.delete(*_place(request), body.ids)
        elif body.where is not None and body.ids is None:
            count = await self._db.delete_where(*_place(request), body.where)
        else:
            raise InvalidInput("a deletion names ids or a filter", hint="send exactly one of ids and where")
        return answer(Deleted(deleted=count))


def _item_operations(faces: _Items) -> list[Operation]:
    return [
        Operation(
            name="upsert",
            method="POST",
            path=f"{_ONE}/items",
            summary="Insert or replace items: all of them or none.",
            notes="With an idempotency key a repeated request changes nothing more and is answered alike.",
            scope=WRITE,
            body=Upsert,
            headers={
                IDEMPOTENCY_HEADER: {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": schema.KEY_CHARS_MAX,
                    "description": "The same for each try of one request.",
                }
            },
            handler=faces.upsert,
            answer=UpsertResult,
        ),
        Operation(
            name="restore",
            method="POST",
            path=f"{_ONE}/items/restore",
            summary="Store items exactly as they are: version, times, vector and document included.",
            scope=WRITE,
            body=Restore,
            handler=faces.restore,
            answer=Restored,
        ),
        Operation(
            name="get_items",
            method="POST",
            path=f"{_ONE}/items/get",
            summary="Items by id, in the order asked; those that do not exist are left out.",
            scope=READ,
            body=Ids,
            query=VectorOptions,
            handler=faces.get,
            answer=ItemList,
        ),
        Operation(
            name="list_items",
            method="POST",
            path=f"{_ONE}/items/list",
            summary="One page of items in id order, by filter.",
            notes="Pass `cursor` back for the next page. `vectors`: also those that the embedder made.",
            scope=READ,
            body=Listing,
            query=VectorOptions,
            handler=faces.page,
            answer=Page,
        ),
        Operation(
            name="delete_items",
            method="POST",
            path=f"{_ONE}/items/delete",
            summary="Delete items by id or by filter.",
            scope=WRITE,
            body=Deletion,
            handler=faces.delete,
            answer=Deleted,
        ),
    ]


# Namespaces


class _Namespaces:
    def __init__(self, db: VectorStore) -> None:
        self._db = db

    async def listed(self, request: Request) -> Response:
        found = await self._db.namespaces(principal_of(request).tenant)
        return answer(NamespaceList(namespaces=tuple(found)))

    async def stats(self, request: Request) -> Response:
        caller = principal_of(request)
        found = await self._db.stats(caller.tenant)
        if not caller.allows(OPERATOR):
            # Its gaps would tell one tenant how much all the others do.
            found = [one.model_copy(update={"sequence": None}) for one in found]
        return answer(StatsList(stats=tuple(found)))

    async def tenants_with(self, request: Request) -> Response:
        caller, name = principal_of(request), str(request.path_params["namespace"])
        if caller.allows(OPERATOR):
            return answer(TenantList(tenants=tuple(await self._db.tenants_with(name))))
        own = any(one.name == name for one in await self._db.namespaces(caller.tenant))
        return answer(TenantList(tenants=(caller.tenant,) if own else ()))

    async def erase(self, request: Request) -> Response:
        return answer(Erased(items=await self._db.erase_tenant(principal_of(request).tenant)))

    async def create(self, request: Request, body: NamespaceSpec) -> Response:
        made = await self._db.create_namespace(
            *_place(request),
            metric=body.metric,
            dimension=body.dimension,
            embedder_id=body.embedder_id,
            quantization=body.quantization,
        )
        return answer(made)

    async def delete(self, request: Request) -> Response:
        return answer(WasDeleted(deleted=await self._db.delete_namespace(*_place(request))))


def _namespace_operations(faces: _Namespaces) -> list[Operation]:
    return [
        Operation(
            name="list_namespaces",
            method="GET",
            path=_ROOT,
            summary="The tenant's namespaces.",
            scope=READ,
            handler=faces.listed,
            answer=NamespaceList,
        ),
        Operation(
            name="tenants_with",
            method="GET",
            path="/v1/tenants-with/{namespace}",
            summary="The tenants that have a namespace of this name.",
            notes="Without the scope `platform:admin` the caller is told of its own tenant alone.",
            scope=READ,
            handler=faces.tenants_with,
            answer=TenantList,
        ),
        Operation(
            name="erase_tenant",
            method="DELETE",
            path=_ROOT,
            summary="Remove everything of the tenant.",
            scope=WRITE,
            handler=faces.erase,
            answer=Erased,
        ),
        Operation(
            name="namespace_stats",
            method="GET",
            path="/v1/namespace-stats",
            summary="The tenant's namespaces with sizes and the state of their indexes.",
            notes="`sequence` counts the calls of all tenants: only the scope `platform:admin` is told it.",
            scope=READ,
            handler=faces.stats,
            answer=StatsList,
        ),
        Operation(
            name="create_namespace",
            method="PUT",
            path=_ONE,
            summary="Create a namespace, or return the one that exists with the same settings.",
            scope=WRITE,
            body=NamespaceSpec,
            handler=faces.create,
            answer=Namespace,
        ),
        Operation(
            name="delete_namespace",
            method="DELETE",
            path=_ONE,
            summary="Delete a namespace and all that is in it.",
            scope=WRITE,
            handler=faces.delete,
            answer=WasDeleted,
        ),
    ]


# Documents


class _Documents:
    def __init__(self, db: VectorStore) -> None:
        self._db = db

    async def put(self, request: Request, body: Documents) -> Response:
        return answer(Chunks(chunks=await self._db.put_documents(*_place(request), body.documents)))

    async def listed(self, request: Request) -> Response:
        return answer(FingerprintMap(documents=await self._db.fingerprints(*_place(request))))

    async def delete(self, request: Request, body: Paths) -> Response:
        return answer(Deleted(deleted=await self._db.delete_documents(*_place(request), body.paths)))


def _document_operations(faces: _Documents) -> list[Operation]:
    return [
        Operation(
            name="put_documents",
            method="PUT",
            path=f"{_ONE}/documents",
            summary="Replace documents and their chunks: all of them or none.",
            scope=WRITE,
            body=Documents,
            handler=faces.put,
            answer=Chunks,
        ),
        Operation(
            name="list_documents",
            method="GET",
            path=f"{_ONE}/documents",
            summary="Path and fingerprint of every document.",
            scope=READ,
            handler=faces.listed,
            answer=FingerprintMap,
        ),
        Operation(
            name="delete_documents",
            method="POST",
            path=f"{_ONE}/documents/delete",
            summary="Delete documents and their chunks.",
            scope=WRITE,
            body=Paths,
            handler=faces.delete,
            answer=Deleted,
        ),
    ]


# Streams


class _Streams:
    def __init__(self, db: VectorStore) -> None:
        self._db = db

    async def take_in(self, request: Request, query: ImportOptions) -> Response:
        importing = bulk.ItemImport(self._db, *_place(request), query, line_max_bytes=body_max_bytes(request))
        async with aclosing(stream_body(request)) as chunks:
            report = await importing.run(chunks)
            if importing.stopped:
                # A client that is still sending would not see an answer behind a closed connection.
                await _discard(chunks)
        if importing.stopped:
            first = report.errors[-1]
            raise InvalidInput(
                f"line {first.line!r} is refused: {first.reason}",
                hint="what stood before it is stored; correct it and send all again, or use on_error=skip",
                details={"report": report.model_dump(mode="json")},
            )
        return answer(report)

    async def give_out(self, request: Request, query: VectorOptions) -> Response:
        written = lines(bulk.export(self._db, *_place(request)), query.vector_format)
        # Before the status line is out, so that a namespace that is not there is a 404.
        first = await anext(written)
        return StreamingResponse(_from(first, written), media_type=NDJSON)


async def _discard(chunks: AsyncIterator[bytes]) -> None:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > _DISCARDED_MAX_BYTES:
            return


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for line in rest:
        yield line


def _stream_operations(faces: _Streams) -> list[Operation]:
    return [
        Operation(
            name="import_items",
            method="POST",
            path=f"{_ONE}/import",
            summary="Store a stream of items of any length, one a line.",
            notes=(
                "Batches are committed while the stream is read, and reading waits for them. Items are "
                "stored by id, so sending a stream again after a break does no harm. What stands before a "
                "refused line is stored. Takes what `export` gives. The limit `serve.body_max_bytes` holds "
                "for each line."
            ),
            scope=WRITE,
            raw={NDJSON: faces.take_in},
            raw_notes={NDJSON: "One Item as JSON a line."},
            query=ImportOptions,
            handler=None,
            answer=ImportReport,
        ),
        Operation(
            name="export_items",
            method="GET",
            path=f"{_ONE}/export",
            summary="Every item of the namespace, one a line, with its vector, version and document.",
            notes='Ends with `{"end": true, "count": n}`; without that line the answer was cut.',
            scope=READ,
            query=VectorOptions,
            handler=faces.give_out,
            answer=ExportLine,
            answer_media_type=NDJSON,
        ),
    ]
