"""The VectorStore contract on the embedded AgentDB and on its HTTP twin over a real port."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.agentdb.routes import build_routes
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Forbidden, Unauthenticated
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings, AuthSettings, Settings
from agentic_flow.core.vectors import SearchQuery
from agentic_flow.core.web import create_app
from agentic_flow.testing.serving import serving
from agentic_flow.testing.vector_store_contract import (
    SCENARIOS,
    START_S,
    TENANT,
    Advance,
    VectorStoreContract,
    items,
    raises,
)

pytestmark = pytest.mark.anyio


class HandClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = START_S

    def advance(self, duration_s: float) -> None:
        self.now_s += duration_s

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.advance(duration_s)


class NamedTokens:
    """Tokens that name their principal, for both ends of the wire."""

    async def token(self, principal: Principal) -> str:
        return f"{principal.tenant} {principal.subject} {','.join(sorted(principal.scopes))}".replace(
            " ", "|"
        )

    def forget(self, principal: Principal) -> None:
        raise AssertionError("a good token was refused")

    async def authenticate(self, credential: str) -> Principal:
        tenant, subject, scopes = credential.split("|")
        return Principal(tenant, subject, frozenset(scopes.split(",")))


@asynccontextmanager
async def near(folder: Path) -> AsyncGenerator[tuple[VectorStore, Advance]]:
    clock = HandClock()
    async with AgentDB(folder, AgentDBSettings(embedding_dimension=256), clock=clock) as store:
        yield store, clock.advance


@asynccontextmanager
async def far(folder: Path) -> AsyncGenerator[tuple[VectorStore, Advance]]:
    async with (
        near(folder) as (store, advance),
        served(store) as url,
        RemoteAgentDB(url, tokens=NamedTokens()) as remote,
    ):
        yield remote, advance


@asynccontextmanager
async def served(store: VectorStore) -> AsyncGenerator[str]:
    async def ready() -> dict[str, bool]:
        return {"database": True}

    app = create_app(
        "agentdb",
        build_routes(store),
        authenticator=NamedTokens(),
        settings=Settings(auth=AuthSettings(required=True)),
        ready=ready,
    )
    async with serving(app) as (url,):
        yield url


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("side", [near, far], ids=["embedded", "http"])
async def test_contract(side: object, scenario: str, tmp_path: Path) -> None:
    """Catches any difference between what the port promises and what a store does, near or far."""
    contract = VectorStoreContract(lambda: side(tmp_path))  # type: ignore[operator]
    await getattr(contract, scenario)()


async def test_scopes_are_demanded(tmp_path: Path) -> None:
    """Catches a route that lets a reader write, or a stranger read."""

    def reader(tenant: str) -> Principal:
        return Principal(tenant, "reader", frozenset({"memory:read"}))

    def stranger(tenant: str) -> Principal:
        return Principal(tenant, "stranger", frozenset({"runs:read"}))

    async with near(tmp_path) as (store, _), served(store) as url:
        await store.create_namespace(TENANT, "docs")
        await store.upsert(TENANT, "docs", items("fox"))
        async with RemoteAgentDB(url, tokens=NamedTokens(), principal_of=reader) as remote:
            assert len((await remote.search(TENANT, "docs", SearchQuery(text="fox"))).hits) == 1
            assert len(await remote.namespaces(TENANT)) == 1
            assert await remote.fingerprints(TENANT, "docs") == {}
            for call in (
                remote.create_namespace(TENANT, "new"),
                remote.upsert(TENANT, "docs", items("cache")),
                remote.delete(TENANT, "docs", ["fox"]),
                remote.delete_where(TENANT, "docs", {"name": "fox"}),
                remote.put_documents(TENANT, "docs", []),
                remote.delete_documents(TENANT, "docs", []),
                remote.delete_namespace(TENANT, "docs"),
                remote.erase_tenant(TENANT),
            ):
                await raises(Forbidden, call)
        async with RemoteAgentDB(url, tokens=NamedTokens(), principal_of=stranger) as remote:
            for call in (
                remote.namespaces(TENANT),
                remote.get(TENANT, "docs", ["fox"]),
                remote.list_items(TENANT, "docs"),
                remote.search(TENANT, "docs", SearchQuery(text="fox")),
                remote.fingerprints(TENANT, "docs"),
            ):
                await raises(Forbidden, call)
        async with RemoteAgentDB(url) as remote:
            await raises(Unauthenticated, remote.namespaces(TENANT))
        assert [item.id for item in (await store.list_items(TENANT, "docs")).items] == ["fox"]
