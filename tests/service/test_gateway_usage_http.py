"""`GET /v1/usage` on a real socket: the caller's own tenant, totals, refusals by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Unauthenticated
from agentic_flow.core.settings import Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.usage import UsageLedger
from agentic_flow.gateway.usage_routes import build_usage_routes
from agentic_flow.testing.serving import serving
from usage_records import DAY_S, NOON, database, record

pytestmark = pytest.mark.anyio

SCOPES = {"reader": {"usage:read"}, "model-user": {"models:use"}, "admin": {"*", "platform:admin"}}
SPAN = {"since": "2026-11-01", "until": "2026-12-01"}


class Keys:
    async def authenticate(self, credential: str) -> Principal:
        if credential not in SCOPES:
            raise Unauthenticated("the key is wrong")
        return Principal("team-a", credential, frozenset(SCOPES[credential]))


@asynccontextmanager
async def usage_server(folder: Path) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    store = database(folder)
    ledger = UsageLedger(store)
    for number in range(6):
        ledger.record(
            record(
                tenant="team-a", model=f"m{number % 3}", at_s=NOON + DAY_S * (number % 2), cost_nano_usd=10**9
            )
        )
    ledger.record(record(tenant="team-b", cost_nano_usd=None))
    await ledger.flush()

    async def ready() -> dict[str, bool]:
        return {}

    app = create_app(
        "platform", build_usage_routes(ledger), authenticator=Keys(), settings=Settings(), ready=ready
    )
    async with serving(app) as (url,), aiohttp.ClientSession() as session:
        yield f"{url}/v1/usage", session
    store.close()


async def asked(
    session: aiohttp.ClientSession, url: str, key: str = "reader", **query: str
) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}"}
    async with session.get(url, params=query, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None)


async def test_a_caller_sees_its_own_tenant(tmp_path: Path) -> None:
    """Catches rows of another tenant, wrong sums, and totals of the rows shown instead of all of them."""
    async with usage_server(tmp_path) as (url, session):
        status, body = await asked(session, url, **SPAN, by="model,day", limit="2")
        assert status == 200
        assert body["tenant"] == "team-a"
        assert [(row["model"], row["day"], row["calls"], row["cost_usd"]) for row in body["rows"]] == [
            ("m0", "2026-11-21", 1, 1.0),
            ("m1", "2026-11-21", 1, 1.0),
        ]
        assert body["truncated"] is True
        assert (body["totals"]["calls"], body["totals"]["cost_nano_usd"]) == (6, 6 * 10**9)
        status, body = await asked(session, url, **SPAN)
        assert [row["model"] for row in body["rows"]] == ["m0", "m1", "m2"]
        assert body["truncated"] is False
        status, body = await asked(session, url, since="2026-12-01", until="2026-12-02")
        assert (status, body["rows"], body["totals"]) == (200, [], None)


async def test_other_tenants_are_for_administrators(tmp_path: Path) -> None:
    """Catches a wall between tenants that a parameter opens, and one that an administrator meets."""
    async with usage_server(tmp_path) as (url, session):
        for tenant in ("team-b", "*"):
            status, body = await asked(session, url, **SPAN, tenant=tenant)
            assert (status, body["code"]) == (403, "forbidden")
        assert (await asked(session, url, **SPAN, tenant="team-a"))[0] == 200
        assert (await asked(session, url, "model-user", **SPAN))[0] == 403
        assert (await asked(session, url, "nobody", **SPAN))[0] == 401
        status, body = await asked(session, url, "admin", **SPAN, tenant="*", by="tenant")
        assert {row["tenant"]: (row["calls"], row["cost_usd"]) for row in body["rows"]} == {
            "team-a": (6, 6.0),
            "team-b": (1, None),
        }
        status, body = await asked(session, url, "admin", **SPAN, tenant="team-b")
        assert body["totals"]["unpriced_calls"] == 1


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"by": "colour"}, "colour"),
        ({"by": "model,model"}, "model,model"),
        ({"since": "yesterday"}, "yesterday"),
        ({"until": "99d99"}, "99d99"),
        ({"since": "2026-12-01", "until": "2026-11-01"}, "empty"),
        ({"limit": "0"}, "'0'"),
        ({"limit": "1e3"}, "1e3"),
        ({"limit": "9" * 5000}, "9999"),
        ({"limit": "²"}, "²"),
        ({"sinse": "7d"}, "sinse"),
    ],
)
async def test_wrong_parameters_are_refused_by_name(
    tmp_path: Path, query: dict[str, str], named: str
) -> None:
    """Catches a parameter that is ignored, misread, or ends in an error of ours."""
    async with usage_server(tmp_path) as (url, session):
        status, body = await asked(session, url, **query)
        assert status == 400
        assert body["code"] == "invalid_input"
        assert named in body["detail"]
        assert body["hint"]
