"""AgentDB over HTTP, for the tenant of the caller and no other: what its HTTP twin speaks.

GET    /v1/namespaces                         the tenant's namespaces
DELETE /v1/namespaces                         everything of the tenant → items removed
PUT    /v1/namespaces/{namespace}             create
DELETE /v1/namespaces/{namespace}             delete
POST   /v1/namespaces/{namespace}/items       upsert
POST   /v1/namespaces/{namespace}/items/get   by ids
POST   /v1/namespaces/{namespace}/items/list  a page, by filter
POST   /v1/namespaces/{namespace}/items/delete   by ids or by filter
POST   /v1/namespaces/{namespace}/search      SearchQuery → SearchResult
PUT    /v1/namespaces/{namespace}/documents   replace documents
GET    /v1/namespaces/{namespace}/documents   path → fingerprint
POST   /v1/namespaces/{namespace}/documents/delete   by paths

Reading demands the scope `memory:read`, everything else `memory:write`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Document, Filter, Item, Metric, SearchQuery
from agentic_flow.core.web import json_response, parse, require

READ, WRITE = "memory:read", "memory:write"
IDEMPOTENCY_HEADER = "idempotency-key"


class NamespaceSpec(Frozen):
    """Body of a creation."""

    metric: Metric = "cosine"
    dimension: int | None = None


class Upsert(Frozen):
    """Body of an upsert; the idempotency key is a header."""

    items: tuple[Item, ...]
    expected_version: Annotated[int, Field(ge=0)] | None = None


class Ids(Frozen):
    """Body of a read by ids."""

    ids: tuple[str, ...]


class Deletion(Frozen):
    """Body of a deletion: exactly one of both."""

    ids: tuple[str, ...] | None = None
    where: Filter | None = None


class Listing(Frozen):
    """Body of a page's request."""

    where: Filter | None = None
    cursor: str | None = None
    limit: int = 100


class Documents(Frozen):
    """Body of a replacement of documents."""

    documents: tuple[Document, ...]


class Paths(Frozen):
    """Body of a deletion of documents."""

    paths: tuple[str, ...]


def build_routes(db: VectorStore) -> list[Route]:
    """The routes of a store."""
    return [*_namespace_routes(db), *_item_routes(db), *_document_routes(db)]


def _namespace_routes(db: VectorStore) -> list[Route]:
    async def listed(request: Request) -> Response:
        return json_response({"namespaces": await db.namespaces(require(request, READ).tenant)})

    async def erase(request: Request) -> Response:
        return json_response({"items": await db.erase_tenant(require(request, WRITE).tenant)})

    async def create(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        spec = await parse(request, NamespaceSpec)
        return json_response(
            await db.create_namespace(
                tenant, _namespace(request), metric=spec.metric, dimension=spec.dimension
            )
        )

    async def delete(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        return json_response({"deleted": await db.delete_namespace(tenant, _namespace(request))})

    return [
        Route("/v1/namespaces", listed, methods=["GET"]),
        Route("/v1/namespaces", erase, methods=["DELETE"]),
        Route("/v1/namespaces/{namespace}", create, methods=["PUT"]),
        Route("/v1/namespaces/{namespace}", delete, methods=["DELETE"]),
    ]


def _item_routes(db: VectorStore) -> list[Route]:
    async def upsert(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Upsert)
        return json_response(
            await db.upsert(
                tenant,
                _namespace(request),
                body.items,
                expected_version=body.expected_version,
                idempotency_key=request.headers.get(IDEMPOTENCY_HEADER),
            )
        )

    async def get(request: Request) -> Response:
        tenant = require(request, READ).tenant
        body = await parse(request, Ids)
        return json_response({"items": await db.get(tenant, _namespace(request), body.ids)})

    async def page(request: Request) -> Response:
        tenant = require(request, READ).tenant
        body = await parse(request, Listing)
        return json_response(
            await db.list_items(
                tenant, _namespace(request), where=body.where, cursor=body.cursor, limit=body.limit
            )
        )

    async def delete(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Deletion)
        if body.ids is not None and body.where is None:
            count = await db.delete(tenant, _namespace(request), body.ids)
        elif body.where is not None and body.ids is None:
            count = await db.delete_where(tenant, _namespace(request), body.where)
        else:
            raise InvalidInput("a deletion names ids or a filter", hint="send exactly one of ids and where")
        return json_response({"deleted": count})

    async def search(request: Request) -> Response:
        tenant = require(request, READ).tenant
        query = await parse(request, SearchQuery)
        return json_response(await db.search(tenant, _namespace(request), query))

    return [
        Route("/v1/namespaces/{namespace}/items", upsert, methods=["POST"]),
        Route("/v1/namespaces/{namespace}/items/get", get, methods=["POST"]),
        Route("/v1/namespaces/{namespace}/items/list", page, methods=["POST"]),
        Route("/v1/namespaces/{namespace}/items/delete", delete, methods=["POST"]),
        Route("/v1/namespaces/{namespace}/search", search, methods=["POST"]),
    ]


def _document_routes(db: VectorStore) -> list[Route]:
    async def put(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Documents)
        return json_response({"chunks": await db.put_documents(tenant, _namespace(request), body.documents)})

    async def listed(request: Request) -> Response:
        tenant = require(request, READ).tenant
        return json_response({"documents": await db.fingerprints(tenant, _namespace(request))})

    async def delete(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Paths)
        return json_response({"deleted": await db.delete_documents(tenant, _namespace(request), body.paths)})

    return [
        Route("/v1/namespaces/{namespace}/documents", put, methods=["PUT"]),
        Route("/v1/namespaces/{namespace}/documents", listed, methods=["GET"]),
        Route("/v1/namespaces/{namespace}/documents/delete", delete, methods=["POST"]),
    ]


def _namespace(request: Request) -> str:
    return str(request.path_params["namespace"])
