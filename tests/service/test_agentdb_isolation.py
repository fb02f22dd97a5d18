"""50 tenants with equal names: whatever they do, none sees, finds, counts or changes what is another's."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import apsw
import numpy as np
import pytest

from agentic_flow.agentdb import service
from agentic_flow.agentdb.index.tiers import Near
from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.agentdb.routes import build_routes
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import LOCAL_OWNER, NoCredentials, Principal
from agentic_flow.core.errors import NotFound
from agentic_flow.core.settings import AgentDBSettings, Settings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, Vector
from agentic_flow.core.web import create_app
from agentic_flow.runtime.identity import Identity
from agentic_flow.testing.serving import serving
from isolation_tenants import EMBEDDING_DIMENSION, live, new_tenants

pytestmark = pytest.mark.anyio


def settings(**more: Any) -> AgentDBSettings:
    return AgentDBSettings.model_validate({"embedding_dimension": EMBEDDING_DIMENSION, **more})


@pytest.mark.parametrize("tier", ["exact", "scan", "graph"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_answer_is_the_tenants_own(seed: int, tier: str, tmp_path: Path) -> None:
    """Catches an answer, a count, a score or an error in which another tenant shows, on any kind of index."""
    async with (
        AgentDB(tmp_path / "all", settings(index=tier)) as store,
        AgentDB(tmp_path / "alone", settings(index=tier)) as alone,
    ):
        await live(store, seed, rounds=150, at_once=6, looks_every=50, alone=alone)


class TenantKeys:
    """TokenSource of callers with one API key a tenant, which the identity service made."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._keys = keys

    async def token(self, principal: Principal) -> str | None:
        return self._keys[principal.tenant]

    def forget(self, principal: Principal) -> None:
        raise AssertionError(f"the key of {principal.tenant!r} was refused")


@dataclass
class Served:
    """A server that knows its callers by their keys, and the twin that calls it."""

    url: str
    remote: RemoteAgentDB
    keys: dict[str, str]
    identity: Identity
    store: AgentDB


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[Served]:
    """AgentDB on a real port, with real keys for all tenants."""
    whole = Settings.model_validate({"auth": {"required": True}})
    identity = Identity(folder / "identity.db", whole.auth)

    async def ready() -> dict[str, bool]:
        return {"agentdb": True}

    try:
        keys: dict[str, str] = {}
        for tenant in new_tenants():
            await identity.create_tenant(tenant.name)
            _, keys[tenant.name] = await identity.create_key(tenant.name, "app", {"memory:*"})
        async with AgentDB(folder / "all", settings()) as store:
            app = create_app(
                "agentdb",
                build_routes(store, whole.agentdb),
                authenticator=identity,
                settings=whole,
                ready=ready,
            )
            async with serving(app) as (url,), RemoteAgentDB(url, tokens=TenantKeys(keys)) as remote:
                yield Served(url, remote, keys, identity, store)
    finally:
        identity.close()


@pytest.mark.parametrize("seed", [3])
async def test_every_answer_over_http_is_the_tenants_own(seed: int, tmp_path: Path) -> None:
    """Catches a face that mixes callers up: the tenant of a call is the one whose key it came with."""
    async with served(tmp_path) as at, AgentDB(tmp_path / "alone", settings()) as alone:
        await live(at.remote, seed, rounds=100, at_once=6, looks_every=50, alone=alone)


async def test_only_an_operator_is_told_how_much_all_tenants_write(tmp_path: Path) -> None:
    """Catches a count of the others' calls in the numbers of one's own, and an operator who is told none."""
    one, other = "tenant-00", "tenant-01"
    async with served(tmp_path) as at, aiohttp.ClientSession() as session:
        for tenant in (one, other, one):
            await at.remote.create_namespace(tenant, "points", dimension=2, embedder_id="model-a")
            await at.remote.upsert(tenant, "points", [Item(id="a", vector=Vector((1.0, 0.0)))])
        (known,) = await at.store.stats(one)
        assert known.sequence
        wanted = {
            ("memory:read",): None,
            ("memory:*",): None,
            ("*",): None,
            ("memory:read", "platform:admin"): known.sequence,
        }
        for scopes, sequence in wanted.items():
            _, key = await at.identity.create_key(one, "someone", set(scopes))
            url, headers = f"{at.url}/v1/namespace-stats", {"authorization": f"Bearer {key}"}
            async with session.get(url, headers=headers) as answer:
                assert answer.status == 200
                (told,) = (await answer.json())["stats"]
            assert "sequence" in told
            assert told == {**known.model_dump(mode="json"), "sequence": sequence}, scopes


async def test_the_local_owner_is_the_operator(tmp_path: Path) -> None:
    """Catches a number withheld from who has the whole folder: a caller on loopback without any keys."""

    async def ready() -> dict[str, bool]:
        return {"agentdb": True}

    async with AgentDB(tmp_path, settings()) as store:
        await store.create_namespace(LOCAL_OWNER.tenant, "notes")
        app = create_app(
            "agentdb", build_routes(store), authenticator=NoCredentials(), settings=Settings(), ready=ready
        )
        async with serving(app) as (url,), RemoteAgentDB(url) as remote:
            (told,) = await remote.stats(LOCAL_OWNER.tenant)
        assert told.sequence
        assert [told] == await store.stats(LOCAL_OWNER.tenant)


NAMESPACE_CALLS: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/items", {"items": [{"id": "a", "vector": [1.0, 0.0]}], "embedder_id": "model-b"}),
    ("POST", "/items/restore", {"items": [{"id": "a", "vector": [1.0, 0.0]}]}),
    ("POST", "/items/get", {"ids": ["a"]}),
    ("POST", "/items/list", {"cursor": "YQ==", "limit": 5}),
    ("POST", "/items/delete", {"ids": ["a"]}),
    ("POST", "/items/delete", {"where": {"k": "same"}}),
    ("POST", "/search", {"vector": [1.0, 0.0]}),
    ("POST", "/search", {"text": "word", "mode": "text", "filter": {"k": 1}}),
    ("POST", "/search/batch", {"queries": [{"vector": [1.0, 0.0]}]}),
    ("GET", "/documents", None),
    ("PUT", "/documents", {"documents": []}),
    ("POST", "/documents/delete", {"paths": ["a"]}),
    ("DELETE", "", None),
)


async def test_a_foreign_namespace_answers_as_one_that_nobody_has(tmp_path: Path) -> None:
    """Catches a status, a header or a byte of a body that tells that another has such a namespace."""
    async with served(tmp_path) as at, aiohttp.ClientSession() as session:
        await at.remote.create_namespace("tenant-00", "private", dimension=2, embedder_id="model-a")
        items = [Item(id="a", vector=Vector((1.0, 0.0)), metadata={"k": "same"})]
        await at.remote.upsert("tenant-00", "private", items)
        headers = {"authorization": f"Bearer {at.keys['tenant-01']}"}
        for method, path, body in NAMESPACE_CALLS:
            heard: list[tuple[int, dict[str, str], str]] = []
            for name in ("private", "nowhere"):
                url = f"{at.url}/v1/namespaces/{name}{path}"
                async with session.request(method, url, json=body, headers=headers) as answer:
                    text = (await answer.text()).replace(name, "…")
                    told = {
                        key: "" if key in ("Date", "X-Request-ID") else value
                        for key, value in answer.headers.items()
                    }
                    heard.append((answer.status, told, _without_ids(text)))
            assert heard[0] == heard[1], (method, path)
            assert heard[0][0] == (200 if method == "DELETE" else 404), (method, path, heard)
        kept = await at.remote.get("tenant-00", "private", ["a"])
        assert [item.id for item in kept] == ["a"]


def _without_ids(text: str) -> str:
    """A body without the id of its request."""
    return re.sub(r"[0-9a-f]{16,}", "#", text)


class Statements:
    """What SQLite does, seen from outside: every statement with its bindings, rows and steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def watch(self, connection: apsw.Connection) -> None:
        """Note what this connection runs."""

        def profile(event: dict[str, Any]) -> None:
            steps = event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]
            self.seen.append((event["sql"], steps))

        watched: Any = connection
        watched.trace_v2(apsw.SQLITE_TRACE_PROFILE, profile, id=self)


READERS = 4


async def test_a_foreign_namespace_takes_the_path_of_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an existence that shows in the time it takes: other statements, or more steps of the same."""
    statements = Statements()
    prepare = service._prepare_connection

    def prepared(connection: apsw.Connection) -> None:
        prepare(connection)
        statements.watch(connection)

    monkeypatch.setattr(service, "_prepare_connection", prepared)
    async with AgentDB(tmp_path, settings()) as store:
        # Its thread would read in the middle of a call, a quarter of a second after the last write.
        monkeypatch.setattr(store._indexer, "wake", lambda _: None)
        await store.create_namespace("other", "private", dimension=2, embedder_id="model-a")
        await store.create_namespace("me", "mine")
        items = [Item(id=f"i{n}", vector=Vector((1.0, float(n)))) for n in range(500)]
        await store.upsert("other", "private", items, idempotency_key="key")
        await store.search("other", "private", SearchQuery(vector=items[0].vector))
        await store.settle()
        # Every reader opens its connection now: one that did so between two calls would be told apart.
        together = threading.Barrier(READERS)
        await asyncio.gather(*(store._db.read(lambda _: together.wait()) for _ in range(READERS)))
        mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
        calls: list[Callable[[str], Awaitable[Any]]] = [
            lambda name: store.upsert("me", name, items[:1], idempotency_key="key"),
            lambda name: store.restore("me", name, items[:1], {"a": mark}),
            lambda name: store.get("me", name, ["i0"]),
            lambda name: store.delete("me", name, ["i0"]),
            lambda name: store.delete_where("me", name, {"@id": "i0"}),
            lambda name: store.list_items("me", name, vectors=True),
            lambda name: store.search("me", name, SearchQuery(vector=items[0].vector)),
            lambda name: store.search_many("me", name, [SearchQuery(text="a", mode="text")]),
            lambda name: store.put_documents("me", name, [Document(path="a", fingerprint=mark, chunks=())]),
            lambda name: store.fingerprints("me", name),
            lambda name: store.delete_documents("me", name, ["a"]),
            lambda name: store.delete_namespace("me", name),
        ]
        for number, call in enumerate(calls):
            done: list[list[tuple[str, int]]] = []
            # Once before, so that every connection is open and every statement prepared.
            for name in ("nowhere", "private", "nowhere"):
                statements.seen.clear()
                try:
                    answer = await call(name)
                except NotFound:
                    answer = None
                assert not answer
                done.append([(sql.replace(name, "…"), steps) for sql, steps in statements.seen])
            assert done[1] == done[2], number
            assert any("FROM namespaces" in sql for sql, _ in done[1]), number


@pytest.mark.parametrize("tier", ["exact", "scan", "graph"])
async def test_equal_vectors_of_all_tenants_stay_apart_on_large_indexes(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an index that names rows of another namespace: all hold the same vectors under the same ids."""
    # Of the filters, one is answered by gathering rows and one by an allow-list given to the index.
    monkeypatch.setattr("agentic_flow.agentdb.index.tiers.GATHERED_MAX", 64)
    rows_each, dimension = 400, 64
    rng = random.Random(17)
    vectors = [Vector([rng.gauss(0, 1) for _ in range(dimension)]) for _ in range(rows_each)]
    tenants = new_tenants()
    async with AgentDB(tmp_path, settings(index=tier)) as store:
        for tenant in tenants:
            await store.create_namespace(tenant.name, "points", dimension=dimension)
            items = [
                Item(id=f"i{n:03}", text=tenant.mark, vector=vector, metadata={"n": n, "owner": tenant.mark})
                for n, vector in enumerate(vectors)
            ]
            await store.upsert(tenant.name, "points", items)
        await store.settle()
        queries = [
            SearchQuery(vector=vectors[7], mode="vector", k=20, filter=where)
            for where in (None, {"n": {"gte": 100}}, {"n": {"lt": 50}}, {"owner": tenants[3].mark})
        ]
        counts, tiers = [20, 20, 20, 0], [tier, "exact" if tier == "exact" else "scan", "exact", "exact"]
        gone = tenants.pop()
        assert await store.erase_tenant(gone.name) == rows_each
        first: list[dict[str, float]] | None = None
        for tenant in tenants:
            results = await store.search_many(tenant.name, "points", queries)
            if tenant is tenants[3]:
                assert len(results.pop().hits) == 20
            assert [len(result.hits) for result in results] == counts[: len(results)]
            assert [result.tier for result in results] == tiers[: len(results)]
            for result in results:
                assert {hit.item.text for hit in result.hits} <= {tenant.mark}
                assert {hit.item.metadata["owner"] for hit in result.hits} <= {tenant.mark}
            # The same rows give the same scores to whoever has them.
            scores = [{hit.item.id: round(hit.score, 4) for hit in r.hits[:5]} for r in results[1:3]]
            first = first or scores
            assert scores == first
        assert await store.namespaces(gone.name) == []


@pytest.mark.parametrize("mode", ["vector", "hybrid"])
async def test_an_index_that_names_foreign_rows_shows_none_of_them(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hits that are taken from an index's word: each row is read again, as the tenant's own."""
    async with AgentDB(tmp_path, settings()) as store:
        for tenant in ("me", "other"):
            await store.create_namespace(tenant, "points", dimension=2)
            items = [Item(id=f"{tenant}{n}", text="common", vector=Vector((1.0, n))) for n in range(20)]
            await store.upsert(tenant, "points", items)
        every = np.arange(1, 41)

        def wrong(*_: Any, **__: Any) -> Near:
            return Near(every, np.ones(40, np.float32), "exact")

        monkeypatch.setattr(store._indexes, "nearest", wrong)
        query = SearchQuery(text="common", vector=Vector((1.0, 0.0)), mode=mode, k=1000)
        found = {hit.item.id for hit in (await store.search("me", "points", query)).hits}
        assert found == {f"me{n}" for n in range(20)}


async def test_hybrid_searches_with_a_filter_find_rows_written_just_now(tmp_path: Path) -> None:
    """Catches rows lost that an index in memory has not seen yet, because a filter gathered them past it."""
    async with AgentDB(tmp_path, settings()) as store:
        await store.create_namespace("me", "notes")
        await store.upsert("me", "notes", [Item(id="old", text="common alpha", metadata={"k": 1})])
        await store.search("me", "notes", SearchQuery(text="common"))
        await store.upsert("me", "notes", [Item(id="new", text="common bravo", metadata={"k": 1})])
        for more in ({"filter": {"k": 1}}, {"exact": True}, {}):
            await store.upsert("me", "notes", [Item(id="new", text="common bravo", metadata={"k": 1})])
            found = await store.search("me", "notes", SearchQuery.model_validate({"text": "common", **more}))
            assert {hit.item.id for hit in found.hits} == {"old", "new"}, more
