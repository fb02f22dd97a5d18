"""The HTTP face of the identity service. No logic: it parses, demands scopes, calls, encodes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.errors import InvalidInput, Unauthenticated
from agentic_flow.core.messages import Frozen
from agentic_flow.core.web import credential_of, json_response, parse, require
from agentic_flow.runtime.identity import Eraser, Identity

PUBLIC_PATHS = frozenset({"/v1/auth/jwks", "/v1/auth/revocations"})
"""What services must read before they can check any credential. Both hold nothing but opaque ids."""

Scopes = Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]


class TokenRequest(Frozen):
    """Body of POST /v1/auth/token; empty means: for the key's own principal."""

    tenant: str | None = None
    subject: str | None = None
    scopes: Scopes | None = None


class KeyRequest(Frozen):
    """Body of POST /v1/keys. `tenant` is the caller's own unless it is the administrator."""

    subject: str
    scopes: Scopes
    tenant: str | None = None
    expires_at_s: Annotated[float, Field(gt=0)] | None = None


class TenantRequest(Frozen):
    """Body of POST /v1/tenants."""

    name: str


def identity_routes(
    identity: Identity,
    *,
    erasers: Mapping[str, Eraser] | None = None,
    survey: Callable[[str], Awaitable[Frozen]] | None = None,
) -> list[Route]:
    """The routes of the identity service.

    Args:
        erasers: Place → what removes a tenant's data there, called when a tenant is erased.
        survey: Says which backups still hold it afterwards.
    """

    async def token(request: Request) -> Response:
        credential = credential_of(request.headers)
        if credential is None:
            raise Unauthenticated("a token is made from a key and none was sent", hint="send an API key")
        wanted = await parse(request, TokenRequest) if await request.body() else TokenRequest()
        issued = await identity.exchange(
            credential, tenant=wanted.tenant, subject=wanted.subject, scopes=wanted.scopes
        )
        return json_response(issued, headers={"cache-control": "no-store"})

    async def jwks(request: Request) -> Response:
        return json_response(await identity.jwks())

    async def revocations(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        # SQLite's integers have 63 bits.
        if not since.isdecimal() or len(since) > 18:
            raise InvalidInput(f"since is {since!r}", hint="send the `seq` of the last answer")
        return json_response(await identity.revocations(int(since)))

    async def create_key(request: Request) -> Response:
        principal = require(request, "keys:write")
        wanted = await parse(request, KeyRequest)
        info, text = await identity.create_key(
            wanted.tenant or principal.tenant,
            wanted.subject,
            wanted.scopes,
            expires_at_s=wanted.expires_at_s,
            by=principal,
        )
        return json_response({"info": info, "key": text}, 201, headers={"cache-control": "no-store"})

    async def list_keys(request: Request) -> Response:
        principal = require(request, "keys:read")
        tenant = request.query_params.get("tenant", principal.tenant)
        if tenant != principal.tenant:
            require(request, "platform:admin")
        return json_response({"keys": await identity.list_keys(tenant)})

    async def revoke_key(request: Request) -> Response:
        principal = require(request, "keys:write")
        return json_response(await identity.revoke_key(request.path_params["id"], by=principal))

    async def create_tenant(request: Request) -> Response:
        principal = require(request, "platform:admin")
        wanted = await parse(request, TenantRequest)
        return json_response(await identity.create_tenant(wanted.name, by=principal), 201)

    async def list_tenants(request: Request) -> Response:
        require(request, "platform:admin")
        return json_response({"tenants": await identity.list_tenants()})

    async def revoke_tenant(request: Request) -> Response:
        principal = require(request, "platform:admin")
        return json_response(await identity.revoke_tenant(request.path_params["name"], by=principal))

    async def erase_tenant(request: Request) -> Response:
        principal = require(request, "platform:admin")
        name = request.path_params["name"]
        erased = await identity.erase_tenant(name, others=erasers, by=principal)
        backups = {} if survey is None else {"backups": await survey(name)}
        return json_response({"erased": erased, **backups})

    return [
        Route("/v1/auth/token", token, methods=["POST"]),
        Route("/v1/auth/jwks", jwks),
        Route("/v1/auth/revocations", revocations),
        Route("/v1/keys", list_keys, methods=["GET"]),
        Route("/v1/keys", create_key, methods=["POST"]),
        Route("/v1/keys/{id}", revoke_key, methods=["DELETE"]),
        Route("/v1/tenants", list_tenants, methods=["GET"]),
        Route("/v1/tenants", create_tenant, methods=["POST"]),
        Route("/v1/tenants/{name}/revoke", revoke_tenant, methods=["POST"]),
        Route("/v1/tenants/{name}", erase_tenant, methods=["DELETE"]),
    ]
