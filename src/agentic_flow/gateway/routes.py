"""The gateway over HTTP, in its own vocabulary: what its HTTP twin speaks.

GET  /v1/models            OpenAI-shaped list, with our own fields beside; Anthropic's pages for its clients
GET  /v1/models/{id}       one of them, likewise
GET  /v1/resolve           ?model=NAME → the ModelInfo that would serve it; without a name the default one
POST /v1/complete          CompletionRequest → Completion
POST /v1/complete/stream   CompletionRequest → StreamEvents as server-sent events
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import CompletionRequest, StreamEvent
from agentic_flow.core.ports import Completer
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.web import deadline_of, event_stream, json_response, parse, require
from agentic_flow.gateway.front import listing

SCOPE = "models:use"
IDEMPOTENCY_HEADER = "idempotency-key"
# The gateway's own setting is the limit that matters; this one bounds a caller who names none.
TIMEOUT_MAX_S = 3600.0
_LONG_NUMBER = re.compile(rb"\d{19}")


def build_routes(gateway: Completer) -> list[Route]:
    """The routes of a gateway; each demands the scope `models:use`."""

    async def models(request: Request) -> Response:
        found = await gateway.models(principal=require(request, SCOPE))
        if listing.VERSION_HEADER in request.headers:
            return json_response(listing.anthropic_page(found, request.query_params))
        return json_response(listing.openai_list(found))

    async def model(request: Request) -> Response:
        found = await gateway.models(principal=require(request, SCOPE))
        info = listing.find(found, str(request.path_params["id"]))
        shape = listing.anthropic_model if listing.VERSION_HEADER in request.headers else listing.openai_model
        return json_response(shape(info))

    async def resolve(request: Request) -> Response:
        principal = require(request, SCOPE)
        return json_response(await gateway.resolve(request.query_params.get("model"), principal=principal))

    async def complete(request: Request) -> Response:
        principal = require(request, SCOPE)
        wanted = await _wanted(request)
        completion = await gateway.complete(
            wanted,
            principal=principal,
            deadline=deadline_of(request, TIMEOUT_MAX_S),
            idempotency_key=request.headers.get(IDEMPOTENCY_HEADER),
        )
        return json_response(completion)

    async def stream(request: Request) -> Response:
        principal = require(request, SCOPE)
        wanted = await _wanted(request)
        deadline = deadline_of(request, TIMEOUT_MAX_S)
        key = request.headers.get(IDEMPOTENCY_HEADER)
        return event_stream(_events(gateway, wanted, principal, deadline, key))

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{id:path}", model, methods=["GET"]),
        Route("/v1/resolve", resolve, methods=["GET"]),
        Route("/v1/complete", complete, methods=["POST"]),
        Route("/v1/complete/stream", stream, methods=["POST"]),
    ]


async def _wanted(request: Request) -> CompletionRequest:
    """The request of a body.

    Raises:
        InvalidInput: it is none, or holds a number that no provider's JSON has a place for.
    """
    wanted = await parse(request, CompletionRequest)
    if _LONG_NUMBER.search(await request.body()):
        try:
            orjson.dumps(wanted.model_dump(mode="json"))
        except TypeError as error:
            raise InvalidInput(
                f"the body holds a number that does not fit: {error}", hint="use whole numbers of 64 bits"
            ) from None
    return wanted


async def _events(
    gateway: Completer,
    wanted: CompletionRequest,
    principal: Principal,
    deadline: Deadline,
    idempotency_key: str | None,
) -> AsyncGenerator[ServerEvent]:
    events = gateway.stream(wanted, principal=principal, deadline=deadline, idempotency_key=idempotency_key)
    async with aclosing(cast(AsyncGenerator[StreamEvent], events)) as reading:
        async for event in reading:
            yield ServerEvent(event.model_dump_json(), event.kind)
