"""Explaining a choice over HTTP: where a call would go, and why not elsewhere.

POST /v1/route   {"prompt": "…", "model": "auto", "tokens_in": 9, "tokens_out": 1000} → the targets in their
                 order, each with its cost, and of the strategy `learned` with its predicted quality and the
                 probability with which it comes first

No provider is asked, and nothing is counted. A caller learns of its own tenant; `tenant` is for
`platform:admin`.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.web import json_response, parse, require
from agentic_flow.gateway.routing.choice import ChoiceRequest
from agentic_flow.gateway.service import Gateway

SCOPE = "models:use"
ADMIN_SCOPE = "platform:admin"


def build_choice_routes(gateway: Gateway) -> list[Route]:
    """The route that explains; it demands the scope `models:use`."""

    async def route(request: Request) -> Response:
        principal = require(request, SCOPE)
        wanted = await parse(request, ChoiceRequest)
        tenant = wanted.tenant
        if tenant is not None and tenant != principal.tenant:
            principal.demand(ADMIN_SCOPE)
        whose = wanted.model_copy(update={"tenant": tenant or principal.tenant})
        return json_response(await gateway.explain(whose))

    return [Route("/v1/route", route, methods=["POST"])]
