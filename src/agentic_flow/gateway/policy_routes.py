"""The gateway's policies over HTTP, for operators: every route demands `platform:admin`.

GET /v1/policies           the version in force with its document; ?version=N an earlier one
PUT /v1/policies           {"policies": {…}, "reason": "…"}, made from the version in If-Match or
                           "expected_version" → the new version, and what changed
GET /v1/policies/history   ?limit=50 → versions, newest first, without their documents
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.web import json_response, parse, require
from agentic_flow.gateway.policy_files import as_document, replace_policies
from agentic_flow.gateway.policy_store import PolicyStore, PolicyWatch, StoredPolicies, parse_policies

SCOPE = "platform:admin"
HISTORY_DEFAULT = 50
VERSION_MAX = 10**18 - 1
_ANY = "*"

_log = structlog.get_logger(__name__)


class NewPolicies(BaseModel):
    """What `PUT /v1/policies` takes: all policies, why, and the version that they were made from."""

    model_config = ConfigDict(extra="forbid")

    policies: dict[str, Any]
    reason: str
    expected_version: Annotated[int, Field(ge=0, le=VERSION_MAX)] | None = None


def build_policy_routes(store: PolicyStore, watch: PolicyWatch) -> list[Route]:
    """The routes of the stored policies.

    Args:
        store: Where they are.
        watch: This process's copy, which follows a change at once; other processes follow within a second.
    """

    async def show(request: Request) -> Response:
        require(request, SCOPE)
        version = _number(request, "version")
        stored = await asyncio.to_thread(store.current if version is None else lambda: store.get(version))
        return json_response(stored_entry(stored), headers={"etag": f'"{stored.version}"'})

    async def replace(request: Request) -> Response:
        principal = require(request, SCOPE)
        wanted = await parse(request, NewPolicies)
        expected = _expected(request, wanted.expected_version)
        policies = parse_policies(wanted.policies, source="policies")
        done = await asyncio.to_thread(
            replace_policies,
            store,
            policies,
            expected_version=expected,
            by=_who(principal),
            reason=wanted.reason,
        )
        try:
            await watch.refresh()
        except AgenticFlowError as error:
            # They are stored: the watch finds them by itself when the database is back.
            _log.warning("policies_not_refreshed", version=done.version, error=error.message)
        return json_response(
            {
                "version": done.version,
                "before": done.before,
                "changes": [change._asdict() for change in done.changes],
                "unreadable": done.unreadable,
            },
            headers={"etag": f'"{done.version}"'},
        )

    async def history(request: Request) -> Response:
        require(request, SCOPE)
        limit = _number(request, "limit")
        found = await asyncio.to_thread(store.history, HISTORY_DEFAULT if limit is None else limit)
        return json_response({"versions": [change._asdict() for change in found]})

    return [
        Route("/v1/policies", show, methods=["GET"]),
        Route("/v1/policies", replace, methods=["PUT"]),
        Route("/v1/policies/history", history, methods=["GET"]),
    ]


def stored_entry(stored: StoredPolicies) -> dict[str, Any]:
    """One version as JSON; its document without defaults, as its operator wrote it."""
    return {
        "version": stored.version,
        "at_s": stored.at_s,
        "by": stored.by,
        "reason": stored.reason,
        "policies": as_document(stored.policies),
    }


def _expected(request: Request, field: int | None) -> int | None:
    """The version that a change was made from; None: whatever is there is to be replaced."""
    header = request.headers.get("if-match")
    if header is None:
        if field is None:
            raise InvalidInput(
                "the change does not say from which version it was made",
                hint="send If-Match with the ETag of GET /v1/policies, or expected_version; If-Match: * "
                "replaces whatever is there",
            )
        return field
    if header.strip() == _ANY:
        return field
    tag = header.strip().removeprefix("W/").strip('"')
    if not tag.isascii() or not tag.isdigit() or len(tag) > 18:
        raise InvalidInput(f"If-Match is {header[:40]!r}", hint='send one version, such as "3", or *')
    if field is not None and field != int(tag):
        raise InvalidInput(
            f"If-Match {header[:40]!r} and expected_version {field!r} contradict each other", hint="send one"
        )
    return int(tag)


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidInput(f"{name} is {text[:40]!r}", hint="send a whole number")
    return int(text)


def _who(principal: Principal) -> str:
    key = f", key {principal.key_id}" if principal.key_id else ""
    return f"{principal.subject} of tenant {principal.tenant}{key}"
