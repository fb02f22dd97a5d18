"""The VectorStore contract on the embedded store, and on its HTTP twin over a real port."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.agentdb.routes import build_routes
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Unauthenticated
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings, PeerSettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.testing import vector_store_contract
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio


class TenantTokens:
    """Both ends of a trust between two processes: the token names the tenant, and if an operator asks."""

    async def token(self, principal: Principal) -> str | None:
        kind = "operator" if principal.allows("platform:admin") else "tenant"
        return f"{kind}.{principal.tenant}"

    def forget(self, principal: Principal) -> None:
        raise AssertionError(f"the token of {principal.tenant!r} was refused")

    async def authenticate(self, credential: str) -> Principal:
        kind, _, tenant = credential.partition(".")
        if kind not in ("tenant", "operator"):
            raise Unauthenticated("no token of ours")
        scopes = {"memory:*"} | ({"platform:admin"} if kind == "operator" else set())
        return Principal(tenant, "service", frozenset(scopes))


@asynccontextmanager
async def near_or_far(data_dir: Path, far: bool) -> AsyncGenerator[VectorStore]:
    async with AgentDB(data_dir, AgentDBSettings()) as store:
        if not far:
            yield store
            return

        async def ready() -> dict[str, bool]:
            return {"agentdb": True}

        tokens = TenantTokens()
        settings = Settings.model_validate({"auth": {"required": True}})
        app = create_app("agentdb", build_routes(store), authenticator=tokens, settings=settings, ready=ready)
        async with serving(app) as (url,), RemoteAgentDB(url, PeerSettings(), tokens=tokens) as remote:
            yield remote


@pytest.mark.parametrize("far", [False, True], ids=["embedded", "http"])
@pytest.mark.parametrize("check", vector_store_contract.ALWAYS, ids=lambda check: check.__name__)
async def test_contract(check: vector_store_contract.Scenario, far: bool, tmp_path: Path) -> None:
    """Catches a store, or its twin, that breaks a promise of the port; each scenario names its own."""
    async with near_or_far(tmp_path, far) as store:
        await check(store)


@pytest.mark.parametrize("far", [False, True], ids=["embedded", "http"])
async def test_scenarios_share_a_store(far: bool, tmp_path: Path) -> None:
    """Catches state of one tenant or namespace that changes what another scenario sees."""
    async with near_or_far(tmp_path, far) as store:
        ran = await vector_store_contract.run_all(store)
        assert len(ran) == len(set(ran)) == len(vector_store_contract.ALWAYS)


@pytest.mark.parametrize("far", [False, True], ids=["embedded", "http"])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_tenants_never_meet(seed: int, far: bool, tmp_path: Path) -> None:
    """Catches a row of one tenant that another can read, find, count, change or erase."""
    async with near_or_far(tmp_path, far) as store:
        await vector_store_contract.tenants_never_meet(store, seed=seed)


async def test_only_operators_learn_of_other_tenants(tmp_path: Path) -> None:
    """Catches a tenant's caller that is told who else has a namespace."""
    async with AgentDB(tmp_path, AgentDBSettings()) as store:

        async def ready() -> dict[str, bool]:
            return {"agentdb": True}

        tokens = TenantTokens()
        settings = Settings.model_validate({"auth": {"required": True}})
        app = create_app("agentdb", build_routes(store), authenticator=tokens, settings=settings, ready=ready)
        for tenant in ("one", "two"):
            await store.create_namespace(tenant, "shared")
        async with serving(app) as (url,), aiohttp.ClientSession() as session:

            async def told(token: str) -> list[str]:
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get(f"{url}/v1/tenants-with/shared", headers=headers) as response:
                    return (await response.json())["tenants"]

            assert await told("operator.one") == ["one", "two"]
            assert await told("tenant.two") == ["two"]
            assert await told("tenant.three") == []
