"""50 tenants with equal names in one PostgreSQL: none sees, finds, counts or changes what is another's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

import psycopg
import pytest

from agentic_flow.agentdb.postgres.store import PostgresAgentDB
from agentic_flow.core.errors import NotFound
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, Vector
from isolation_tenants import EMBEDDING_DIMENSION, live
from postgres_server import TEMPLATE, make_template, new_database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server of this module's own, with a migrated template database."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        make_template(url)
        yield url


def opened(server: str) -> PostgresAgentDB:
    """A store in a database of its own."""
    settings = AgentDBSettings(embedding_dimension=EMBEDDING_DIMENSION)
    return PostgresAgentDB(new_database(server, template=TEMPLATE), settings)


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_answer_is_the_tenants_own(seed: int, server: str) -> None:
    """Catches an answer, a count, a score or an error in which another tenant shows."""
    async with opened(server) as store, opened(server) as alone:
        await live(store, seed, rounds=60, at_once=6, looks_every=30, alone=alone)


async def test_a_foreign_namespace_takes_the_path_of_a_missing_one(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches statements that run only when the namespace of another exists."""
    seen: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def watched(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        cursor = await execute(self, query, *arguments, **options)
        text = query.as_string(self) if hasattr(query, "as_string") else str(query)
        seen.append(f"{text} -> {cursor.rowcount}")
        return cursor

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", watched)
    item, mark = Item(id="a", vector=Vector((1.0, 0.0))), Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
    async with opened(server) as store:
        await store.create_namespace("other", "private", dimension=2, embedder_id="model-a")
        await store.upsert("other", "private", [item], idempotency_key="key")
        await store.settle()
        calls: list[Callable[[str], Awaitable[Any]]] = [
            lambda name: store.upsert("me", name, [item], idempotency_key="key"),
            lambda name: store.restore("me", name, [item], {"a": mark}),
            lambda name: store.get("me", name, ["a"]),
            lambda name: store.delete("me", name, ["a"]),
            lambda name: store.delete_where("me", name, {"@id": "a"}),
            lambda name: store.list_items("me", name, vectors=True),
            lambda name: store.search("me", name, SearchQuery(vector=item.vector)),
            lambda name: store.put_documents("me", name, [Document(path="a", fingerprint=mark, chunks=())]),
            lambda name: store.fingerprints("me", name),
            lambda name: store.delete_documents("me", name, ["a"]),
            lambda name: store.delete_namespace("me", name),
        ]
        for number, call in enumerate(calls):
            done: list[list[str]] = []
            # Once before, so that every connection is open.
            for name in ("nowhere", "private", "nowhere"):
                seen.clear()
                try:
                    answer = await call(name)
                except NotFound:
                    answer = None
                assert not answer
                done.append([text.replace(name, "…") for text in seen])
            assert done[1] == done[2], number
            assert any("namespaces" in text for text in done[0]), number
