"""HTTP face of AgentDB. Thin: each route parses, calls the store for the caller's tenant, encodes."""

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


class NewNamespace(Frozen):
    """Body of POST /v1/namespaces."""

    name: str
    metric: Metric = "cosine"
    dimension: int | None = None


class Upsert(Frozen):
    """Body of POST /v1/namespaces/{namespace}/items."""

    items: tuple[Item, ...]
    expected_version: int | None = None


class Ids(Frozen):
    """Body of the routes that get or delete items by id."""

    ids: tuple[str, ...]


class Where(Frozen):
    """Body of the route that deletes by filter."""

    where: Filter


class Listing(Frozen):
    """Body of the route that lists items."""

    where: Filter | None = None
    cursor: str | None = None
    limit: Annotated[int, Field(ge=1)] = 100


class Documents(Frozen):
    """Body of PUT /v1/namespaces/{namespace}/documents."""

    documents: tuple[Document, ...]


class Paths(Frozen):
    """Body of the route that deletes documents."""

    paths: tuple[str, ...]


def build_routes(store: VectorStore) -> list[Route]:
    """`/v1/namespaces` and what is below it, and DELETE /v1/memory, which erases the caller's tenant."""

    async def create(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, NewNamespace)
        return json_response(
            await store.create_namespace(tenant, body.name, metric=body.metric, dimension=body.dimension)
        )

    async def namespaces(request: Request) -> Response:
        tenant = require(request, READ).tenant
        return json_response({"namespaces": await store.namespaces(tenant)})

    async def delete_namespace(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        return json_response({"deleted": await store.delete_namespace(tenant, _name(request))})

    async def upsert(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Upsert)
        result = await store.upsert(
            tenant,
            _name(request),
            body.items,
            expected_version=body.expected_version,
            idempotency_key=request.headers.get("idempotency-key"),
        )
        return json_response(result)

    async def get(request: Request) -> Response:
        tenant = require(request, READ).tenant
        body = await parse(request, Ids)
        return json_response({"items": await store.get(tenant, _name(request), body.ids)})

    async def delete(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Ids)
        return json_response({"deleted": await store.delete(tenant, _name(request), body.ids)})

    async def delete_where(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Where)
        return json_response({"deleted": await store.delete_where(tenant, _name(request), body.where)})

    async def list_items(request: Request) -> Response:
        tenant = require(request, READ).tenant
        body = await parse(request, Listing)
        page = await store.list_items(
            tenant, _name(request), where=body.where, cursor=body.cursor, limit=body.limit
        )
        return json_response(page)

    async def search(request: Request) -> Response:
        tenant = require(request, READ).tenant
        return json_response(await store.search(tenant, _name(request), await parse(request, SearchQuery)))

    async def put_documents(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Documents)
        return json_response({"chunks": await store.put_documents(tenant, _name(request), body.documents)})

    async def fingerprints(request: Request) -> Response:
        tenant = require(request, READ).tenant
        return json_response({"fingerprints": await store.fingerprints(tenant, _name(request))})

    async def delete_documents(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        body = await parse(request, Paths)
        return json_response({"deleted": await store.delete_documents(tenant, _name(request), body.paths)})

    async def erase(request: Request) -> Response:
        tenant = require(request, WRITE).tenant
        if request.query_params.get("confirm") != tenant:
            raise InvalidInput(
                "erasing a tenant's memory wants its name as the query parameter confirm",
                hint=f"add ?confirm={tenant}",
            )
        return json_response({"erased": await store.erase_tenant(tenant)})

    base = "/v1/namespaces/{namespace}"
    return [
        Route("/v1/namespaces", create, methods=["POST"]),
        Route("/v1/namespaces", namespaces, methods=["GET"]),
        Route("/v1/memory", erase, methods=["DELETE"]),
        Route(base, delete_namespace, methods=["DELETE"]),
        Route(f"{base}/items", upsert, methods=["POST"]),
        Route(f"{base}/items/get", get, methods=["POST"]),
        Route(f"{base}/items/list", list_items, methods=["POST"]),
        Route(f"{base}/items/delete", delete, methods=["POST"]),
        Route(f"{base}/items/delete-where", delete_where, methods=["POST"]),
        Route(f"{base}/search", search, methods=["POST"]),
        Route(f"{base}/documents", put_documents, methods=["PUT"]),
        Route(f"{base}/documents", fingerprints, methods=["GET"]),
        Route(f"{base}/documents/delete", delete_documents, methods=["POST"]),
    ]


def _name(request: Request) -> str:
    return str(request.path_params["namespace"])
