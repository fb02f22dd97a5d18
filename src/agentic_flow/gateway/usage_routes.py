"""The usage ledger over HTTP.

GET /v1/usage   ?by=model,day&since=7d&until=2026-11-30&limit=100 → rows, and the totals of all groups

A caller sees its own tenant. `tenant=NAME`, or `tenant=*` for everybody, is for `platform:admin`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.web import json_response, require
from agentic_flow.gateway.usage import UsageLedger
from agentic_flow.gateway.usage_table import EVERYBODY, LIMIT_MAX, read_keys, read_moment

SCOPE = "usage:read"
ADMIN_SCOPE = "platform:admin"
DEFAULT_SINCE = "30d"
DEFAULT_LIMIT = 100
_PARAMETERS = ("by", "since", "until", "limit", "tenant")


def build_usage_routes(ledger: UsageLedger, *, clock: Clock = SYSTEM_CLOCK) -> list[Route]:
    """The routes of a ledger; each demands the scope `usage:read`."""

    async def usage(request: Request) -> Response:
        principal = require(request, SCOPE)
        query = _single(request)
        tenant = _tenant(principal, query.get("tenant"))
        by = read_keys(query.get("by", "model"))
        now_s = clock.time_s()
        since_s = read_moment(query.get("since", DEFAULT_SINCE), "since", now_s)
        until_s = read_moment(query["until"], "until", now_s) if "until" in query else now_s
        limit = _limit(query.get("limit"))
        report = await asyncio.to_thread(ledger.report, tenant, by, since_s, until_s, limit)
        return json_response(report.as_json())

    return [Route("/v1/usage", usage, methods=["GET"])]


def _single(request: Request) -> Mapping[str, str]:
    """The parameters, each known and given once."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in _PARAMETERS:
            raise InvalidInput(f"there is no parameter {name!r}", hint=f"use {', '.join(_PARAMETERS)}")
        if name in found:
            raise InvalidInput(f"the parameter {name!r} is given twice", hint="give it once")
        found[name] = value
    return found


def _tenant(principal: Principal, asked: str | None) -> str | None:
    if asked is None or asked == principal.tenant:
        return principal.tenant
    principal.demand(ADMIN_SCOPE)
    return None if asked == EVERYBODY else asked


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) < LIMIT_MAX or len(text) > 9:
        raise InvalidInput(f"limit is {text!r}", hint=f"a whole number from 1 to {LIMIT_MAX - 1}")
    return int(text)
