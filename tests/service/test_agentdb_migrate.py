"""Moving tenants between a folder and a real PostgreSQL, and noticing every difference."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import pytest
from cli_process import Place

from agentic_flow.agentdb.migrate import Moved, TenantStore, check_places, migrate, open_place, shown_place
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, NotFound, PathNotFound
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, Vector
from postgres_server import TEMPLATE, make_template, new_database, postgres_server

pytestmark = pytest.mark.anyio

SETTINGS = AgentDBSettings()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server of this module's own, with a migrated template database."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        make_template(url)
        yield url


@pytest.fixture
def url(server: str) -> str:
    """A database with our schema and nothing in it."""
    return new_database(server, template=TEMPLATE)


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path / "source", SETTINGS) as store:
        yield store


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path / "target", SETTINGS) as store:
        yield store


async def fill(store: AgentDB) -> None:
    """Two tenants: vectors in both precisions, all metrics, documents, versions, times, odd ids."""
    for tenant, count in (("team-a", 300), ("team-b", 7)):
        for metric, kept in (("cosine", "f32"), ("dot", "f16"), ("euclidean", "f32")):
            name = f"{metric}-{kept}"
            await store.create_namespace(
                tenant, name, dimension=3, metric=metric, quantization=kept, embedder_id="clip"
            )
            await store.upsert(tenant, name, [item(number) for number in range(count)])
        await store.upsert(tenant, "dot-f16", [item(number) for number in range(3)])
        await store.create_namespace(tenant, "docs")
        await store.put_documents(tenant, "docs", [document(number) for number in range(6)])
        await store.upsert(tenant, "docs", [Item(id="loose", text="of no document: " + "long word " * 30)])
        await store.create_namespace(tenant, "empty")


def item(number: int) -> Item:
    return Item(
        id=["plain", "nul\1\2", "ünï", "a" * 900 + "\U0001f98a", "tab\t"][number % 5] + f"-{number}",
        text=f"text \0 with {number}" if number % 4 == 0 else f"text {number}",
        metadata={"n": number, "third": number / 3, "deep": {"a": [None, True, "\0"]}},
        vector=Vector([1.0, number / 7, -number]),
        valid_from_s=number * 0.1 if number % 3 else None,
        expires_at_s=time.time() + 1e6 if number % 5 == 1 else None,
    )


def document(number: int) -> Document:
    return Document(
        path=f"src/{number}.py",
        fingerprint=Fingerprint(size_bytes=2**40 + number, mtime_ns=2**60 + number, sha256=f"{number:064x}"),
        chunks=tuple(
            Item(
                id=f"{number}:{part}",
                text=f"def f{part}(): return {' '.join(f'w{part * p % 53}' for p in range(30))}",
            )
            for part in range(number)
        ),
    )


async def contents(store: TenantStore) -> dict[Any, Any]:
    """Everything of every tenant."""
    found: dict[Any, Any] = {}
    for tenant in await store.tenants():
        for namespace in await store.namespaces(tenant):
            page = await store.list_items(tenant, namespace.name, limit=1000, vectors=True)
            assert page.cursor is None
            marks = await store.fingerprints(tenant, namespace.name)
            found[tenant, namespace.name] = (namespace, page.items, marks)
    return found


def digests(moved: list[Moved]) -> dict[tuple[str, str], str]:
    assert all(one.source_digest == one.target_digest for one in moved)
    return {(one.tenant, one.namespace): one.source_digest for one in moved}


async def test_there_and_back(source: AgentDB, target: AgentDB, url: str) -> None:
    """Catches a field, a bit of a vector, a document or a tenant that PostgreSQL or the way back changes."""
    await fill(source)
    async with open_place(url, SETTINGS, create=True) as postgres:
        there = await migrate(source, postgres)
        assert [one.written for one in there] == [one.items for one in there]
        assert sum(one.items for one in there) == 3 * 307 + 2 * 16
        assert sum(one.documents for one in there) == 12
        assert await contents(postgres) == await contents(source)
        back = await migrate(postgres, target)
        assert digests(back) == digests(there)
        assert await contents(target) == await contents(source)
        query = SearchQuery(text="return w0 w3", k=3)
        for store in (postgres, target):
            found = await store.search("team-a", "docs", query)
            assert found.mode == "hybrid"  # the store's embedder serves it still
            assert len(found.hits) == 3


async def test_again_writes_what_is_missing(source: AgentDB, target: AgentDB) -> None:
    """Catches a second run that starts from nothing, or one that believes an unfinished one."""
    await fill(source)
    first = await migrate(source, target, tenants=["team-b"])
    again = await migrate(source, target)
    written = {(one.tenant, one.namespace): one.written for one in again}
    assert written["team-b", "cosine-f32"] == 0
    assert written["team-a", "cosine-f32"] == 300
    # As if it had been interrupted: some rows are missing, and one is of an earlier version.
    rows = (await source.list_items("team-a", "cosine-f32", limit=1000)).items
    await target.delete("team-a", "cosine-f32", [row.id for row in rows[50:150]])
    older = rows[7].model_copy(update={"text": "as it was", "updated_at_s": rows[7].updated_at_s - 1})
    await target.restore("team-a", "cosine-f32", [older])
    await target.delete_documents("team-a", "docs", ["src/0.py", "src/3.py"])
    resumed = {(one.tenant, one.namespace): one.written for one in await migrate(source, target)}
    assert resumed["team-a", "cosine-f32"] == 101
    assert resumed["team-a", "docs"] == 3
    assert await contents(target) == await contents(source)
    assert digests(first).items() <= digests(again).items()


async def test_an_item_that_is_newer_there_is_not_overwritten(source: AgentDB, target: AgentDB) -> None:
    """Catches a migration that destroys what somebody wrote into the target."""
    await fill(source)
    await migrate(source, target)
    (row,) = await target.get("team-b", "cosine-f32", ["plain-0"])
    newer = row.model_copy(update={"text": "written here", "updated_at_s": row.updated_at_s + 1})
    await target.restore("team-b", "cosine-f32", [newer])
    with pytest.raises(Conflict, match=r"'plain-0'.*'cosine-f32'.*'team-b'"):
        await migrate(source, target)
    assert (await target.get("team-b", "cosine-f32", ["plain-0"]))[0].text == "written here"


async def test_every_difference_is_named(source: AgentDB, target: AgentDB) -> None:
    """Catches a comparison that looks at the source's rows only, or at documents not at all."""
    await fill(source)
    await migrate(source, target)
    await target.upsert("team-a", "dot-f16", [Item(id="zz only here", vector=Vector([1, 2, 3]))])
    with pytest.raises(
        DataCorrupted, match=r"'dot-f16' of tenant 'team-a'.*'zz only here' is only in the target"
    ):
        await migrate(source, target)
    await target.delete("team-a", "dot-f16", ["zz only here"])
    await migrate(source, target)
    extra = document(3).model_copy(update={"path": "src/extra.py", "chunks": ()})
    await target.put_documents("team-a", "docs", [extra])
    with pytest.raises(DataCorrupted, match=r"'docs'.*document 'src/extra.py'"):
        await migrate(source, target)


class Forgetful:
    """A store in front of another that damages one item on its way in, as a faulty driver would."""

    def __init__(self, store: AgentDB, damage: dict[str, Any]) -> None:
        self._store = store
        self._damage = damage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def restore(self, tenant: str, namespace: str, items: Any, documents: Any = None) -> int:
        """Store them, one of them otherwise."""
        damaged = [
            one.model_copy(update=self._damage) if one.id == "plain-5" and self._damage else one
            for one in items
        ]
        kept = [one for one in damaged if self._damage or one.id != "plain-5"]
        return await self._store.restore(tenant, namespace, kept, documents)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({}, "is missing"),
        ({"text": "x"}, "another text"),
        ({"metadata": {"n": 5.0}}, "another metadata"),
        ({"vector": Vector([1.0, 5 / 7, -5.000001])}, "another vector"),
        ({"version": 2}, "another version"),
        ({"created_at_s": 1.0}, "another created_at_s"),
        ({"valid_until_s": 1.0}, "another valid_until_s"),
        ({"expires_at_s": None, "valid_from_s": None}, "another valid_from_s"),
    ],
)
async def test_a_target_that_changes_a_row_is_found_out(
    source: AgentDB, target: AgentDB, damage: dict[str, Any], told: str
) -> None:
    """Catches a verification that trusts what was sent instead of reading what is there."""
    await source.create_namespace("team-a", "mine", dimension=3, metric="dot")
    await source.upsert("team-a", "mine", [item(number) for number in range(20)])
    with pytest.raises(DataCorrupted, match=f"'mine' of tenant 'team-a'.*'plain-5'.*{told}"):
        await migrate(source, Forgetful(target, damage))


async def test_items_about_to_expire_do_not_fail_it(source: AgentDB, target: AgentDB) -> None:
    """Catches rows with a time to live that are lost, or that make equal databases differ."""
    await source.create_namespace("team-a", "cache", dimension=1, metric="dot")
    soon_s = time.time() + 300  # well within the margin, and past the end of a slow test
    await source.upsert(
        "team-a",
        "cache",
        [Item(id=f"{n}", vector=Vector([n]), expires_at_s=soon_s if n < 3 else None) for n in range(5)],
    )
    (moved,) = await migrate(source, target)
    assert (moved.items, moved.written, moved.expiring) == (5, 5, 3)
    assert len((await target.list_items("team-a", "cache")).items) == 5


async def test_other_settings_and_places_are_refused(
    source: AgentDB, target: AgentDB, tmp_path: Path
) -> None:
    """Catches rows that go into a namespace of another metric, and places that make no sense."""
    await source.create_namespace("team-a", "mine", dimension=3, metric="dot")
    await target.create_namespace("team-a", "mine", dimension=3, metric="cosine")
    with pytest.raises(Conflict, match="'mine' exists with metric 'cosine'"):
        await migrate(source, target)
    with pytest.raises(NotFound, match="'nobody'"):
        await migrate(source, target, tenants=["nobody"])
    with pytest.raises(PathNotFound, match="nowhere"):
        async with open_place(str(tmp_path / "nowhere"), SETTINGS):
            raise AssertionError("opened")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InvalidInput, match="both"):
        check_places(str(tmp_path), f"{tmp_path}/source/..")
    assert shown_place("postgresql://me:secret@db.example:5433/flow?sslmode=require") == (
        "postgresql://db.example:5433/flow"
    )


async def test_by_command(tmp_path: Path, url: str) -> None:
    """Catches a command that reports success without the copy, or that prints a password."""
    place = Place(tmp_path)
    async with AgentDB(place.data_dir, SETTINGS) as store:
        await fill(store)
        truth = await contents(store)
    empty = url.replace("postgres@", "postgres:no-secret@") if "postgres@" in url else url
    done = place.run("db", "migrate", "--to", empty, "--json")
    assert done.code == 0, done.err
    assert {one["namespace"] for one in done.data["namespaces"]} == {name for _, name in truth}
    assert all(one["source_digest"] == one["target_digest"] for one in done.data["namespaces"])
    assert "no-secret" not in done.out + done.err
    again = place.run("db", "migrate", "--to", url)
    assert again.code == 0, again.err
    assert f"{len(truth)} namespaces are the same" in again.out
    back = place.run("db", "migrate", "--from", url, "--to", tmp_path / "copy", "--tenant", "team-b")
    assert back.code == 0, back.err
    async with AgentDB(tmp_path / "copy", SETTINGS) as store:
        assert await contents(store) == {key: value for key, value in truth.items() if key[0] == "team-b"}
    missing = place.run("db", "migrate", "--from", tmp_path / "nowhere", "--to", url)
    assert missing.code == 2
    assert "nowhere" in missing.problem


def test_the_schema_is_migrated_by_command(tmp_path: Path, server: str) -> None:
    """Catches a database that is migrated unasked, or a command that says it did and did not."""
    url = new_database(server)
    place = Place(tmp_path, AGENTIC_FLOW_AGENTDB__DATABASE_URL=url)
    first = place.run("db", "migrate-schema", "--json")
    assert first.code == 0, first.err
    assert first.data["applied"]
    assert place.run("db", "migrate-schema", "--json").data["applied"] == []
    folder = place.run("db", "migrate-schema", "--url", tmp_path)
    assert folder.code == 2
    assert "is no PostgreSQL database" in folder.problem
