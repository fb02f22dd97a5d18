"""AgentDB on PostgreSQL: the wall between tenants, races, lost connections, filters and recall, a replica."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import errors

from agentic_flow.agentdb.filters import matches, text_words
from agentic_flow.agentdb.postgres.schema import MIGRATIONS, migrate, schema_version
from agentic_flow.agentdb.postgres.store import PostgresAgentDB
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    InvalidSettings,
    NeedsNewer,
    NotFound,
    Unavailable,
)
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, Vector
from postgres_server import TEMPLATE, Cluster, database_url, make_template, new_database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

SPACE = "notes"
TABLES = ("namespaces", "documents", "items", "operations", "idempotency")


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


def opened(url: str, **settings: Any) -> PostgresAgentDB:
    return PostgresAgentDB(url, AgentDBSettings.model_validate(settings))


def rows(url: str, sql: str, *setup: str) -> list[tuple[Any, ...]]:
    """What one statement returns after some others, in a transaction that is rolled back."""
    with psycopg.connect(url) as connection:
        for statement in setup:
            connection.execute(statement.encode())
        found = connection.execute(sql.encode()).fetchall()
        connection.rollback()
        return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; the test's own timeout bounds it."""
    while not await asyncio.to_thread(condition):
        await asyncio.sleep(0.01)


# The wall between tenants


async def two_tenants(url: str) -> None:
    async with opened(url) as store:
        for tenant in ("one", "two"):
            await store.create_namespace(tenant, SPACE)
            await store.upsert(tenant, SPACE, [Item(id="a", text=f"secret of {tenant}")], idempotency_key="k")
            mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
            chunk = Item(id="d", text=f"chunk of {tenant}", metadata={"path": "d"})
            await store.put_documents(tenant, SPACE, [Document(path="d", fingerprint=mark, chunks=(chunk,))])


APP = "SET LOCAL ROLE agentic_flow_app"


async def test_wall_shows_one_tenant(url: str) -> None:
    """Catches policies that are missing, not forced, or that a statement without a tenant walks around."""
    await two_tenants(url)
    for table in TABLES:
        count = f"SELECT count(*), count(DISTINCT tenant), min(tenant) FROM agentic_flow.{table}"
        ((everything, tenants, _),) = rows(url, count)
        assert tenants == 2, "the superuser must see both, or the test proves nothing"
        assert rows(url, count, APP) == [(0, 0, None)], table
        assert rows(url, count, APP, "SET LOCAL agentic_flow.tenant = ''") == [(0, 0, None)], table
        half = [(everything // 2, 1, "one")]
        assert rows(url, count, APP, "SET LOCAL agentic_flow.tenant = 'one'") == half, table
    operator = "SET LOCAL agentic_flow.tenant = '*'"
    assert rows(url, "SELECT tenant FROM agentic_flow.namespaces ORDER BY 1", APP, operator) == [
        ("one",),
        ("two",),
    ]
    for table in TABLES[1:]:
        assert rows(url, f"SELECT count(*) FROM agentic_flow.{table}", APP, operator) == [(0,)]


async def test_wall_takes_no_foreign_rows(url: str) -> None:
    """Catches a wall that only hides: rows written into, changed in or called from another tenant."""
    await two_tenants(url)
    as_one = (APP, "SET LOCAL agentic_flow.tenant = 'one'")
    ((foreign, key),) = rows(
        url, "SELECT namespace_id, key FROM agentic_flow.items WHERE tenant = 'two' AND id = 'a'"
    )
    for statement in (
        "UPDATE agentic_flow.items SET tenant = 'two' RETURNING 1",
        f"INSERT INTO agentic_flow.operations (tenant, namespace_id, kind, keys, at_s) "
        f"VALUES ('two', {foreign}, 'x', '{{}}', 0) RETURNING 1",
        "SELECT count(*) FROM agentic_flow.items_shared",
        "SELECT agentic_flow.promote(0, 'vector', 'l2_ops') FROM agentic_flow.items_shared",
        "ALTER TABLE agentic_flow.items DISABLE ROW LEVEL SECURITY",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            rows(url, statement, *as_one)
    for statement in (
        f"DELETE FROM agentic_flow.items WHERE key = {key} RETURNING 1",
        f"UPDATE agentic_flow.items SET text = 'x' WHERE key = {key} RETURNING 1",
        f"SELECT * FROM agentic_flow.text_search(0, {foreign}, '{{secret}}', 0, 0, 1, 1, 1, 1, 10)",
    ):
        assert rows(url, statement, *as_one) == [], statement
    promoted = f"SELECT agentic_flow.promote({foreign}, 'halfvec', 'cosine_ops')"
    assert rows(url, promoted, *as_one) == [(False,)]


async def test_store_stays_behind_the_wall(server: str) -> None:
    """Catches the store reading as the superuser that its URL logs in as: a foreign row then is one bug away.

    A trigger records who inserts.
    """
    url = new_database(server, template=TEMPLATE)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE seen (role text, bypasses boolean); GRANT INSERT ON seen TO agentic_flow_app; "
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen "
            "SELECT current_user, rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user; "
            "RETURN NEW; END $$; "
            "CREATE TRIGGER note BEFORE INSERT ON agentic_flow.items FOR EACH ROW EXECUTE FUNCTION note()"
        )
    await two_tenants(url)
    assert set(rows(url, "SELECT * FROM seen")) == {("agentic_flow_app", False)}


async def test_roles_without_privileges(server: str) -> None:
    """Catches a store that only works for superusers, and errors that do not say what to grant."""
    name, mark = f"owned_{secrets.token_hex(4)}", secrets.token_hex(4)
    owner, reader = f"owner_{mark}", f"reader_{mark}"
    with psycopg.connect(server, autocommit=True) as connection:
        for statement in (
            f"CREATE ROLE {owner} LOGIN",
            f"CREATE ROLE {reader} LOGIN",
            f"CREATE DATABASE {name} OWNER {owner}",
        ):
            connection.execute(statement.encode())
    admin = database_url(server, name)
    as_owner = admin.replace("postgres:@", f"{owner}:@")
    as_reader = admin.replace("postgres:@", f"{reader}:@")
    with pytest.raises(Forbidden) as refused:
        await migrate(as_owner)
    assert "CREATE EXTENSION vector" in str(refused.value.hint)
    rows_of_admin = psycopg.connect(admin, autocommit=True)
    with rows_of_admin:
        rows_of_admin.execute("CREATE EXTENSION vector")
        with pytest.raises(Forbidden) as refused:
            await migrate(as_owner)
        assert "agentic_flow_app" in str(refused.value.hint)
        rows_of_admin.execute(f"GRANT agentic_flow_app TO {owner}".encode())
        assert await migrate(as_owner) == [migration.name for migration in MIGRATIONS]
        with pytest.raises(Forbidden) as refused:
            async with opened(as_reader):
                pass
        assert "GRANT agentic_flow_app" in str(refused.value.hint)
        rows_of_admin.execute(f"GRANT agentic_flow_app TO {reader}".encode())
    for url in (as_owner, as_reader):
        async with opened(url) as store:
            await store.create_namespace("small", SPACE)
            await store.upsert("small", SPACE, [Item(id="a", text="zebra"), Item(id="b", text="walrus")])
            for mode in ("hybrid", "text"):
                query = SearchQuery.model_validate({"text": "zebra", "mode": mode})
                assert (await store.search("small", SPACE, query)).hits[0].item.id == "a"
            assert await store.erase_tenant("small") == 2
            await store.create_namespace("big", SPACE, dimension=4)
            await store.upsert(
                "big", SPACE, [Item(id=str(i), vector=Vector((1, i, 0, 0))) for i in range(20)]
            )
            assert await store.promote("big", SPACE)
            found = await store.search("big", SPACE, SearchQuery(vector=Vector((1, 7, 0, 0)), k=1))
            assert (found.hits[0].item.id, found.tier) == ("7", "graph")
            assert await store.tenants() == ["big"]
            await store.erase_tenant("big")
    # A role of its own, a member of the application's: what it inherits is behind the wall as well.
    assert rows(as_reader, "SELECT count(*) FROM agentic_flow.items") == [(0,)]
    with pytest.raises(errors.InsufficientPrivilege):
        rows(as_reader, "SELECT count(*) FROM agentic_flow.items_shared")


# Opening and migrating


async def test_migrating_is_explicit(server: str) -> None:
    """Catches a store that changes a schema by opening it, or works on one that it does not know."""
    url = new_database(server)
    assert await schema_version(url) == 0
    with pytest.raises(Conflict) as refused:
        async with opened(url):
            pass
    assert "agentic-flow db migrate-schema" in str(refused.value.hint)
    async with PostgresAgentDB(url, AgentDBSettings(), create=True) as store:
        await store.create_namespace("t", SPACE)
    assert await schema_version(url) == len(MIGRATIONS)
    assert await migrate(url) == []
    last = f"agentic_flow.migrations WHERE version = {len(MIGRATIONS)}"
    later = "INSERT INTO agentic_flow.migrations (version, name) VALUES (99, 'later')"
    for change, word in ((later, "newer one"), ("DELETE FROM " + last, "migrate-schema")):
        with psycopg.connect(url) as connection:
            connection.execute(b"DELETE FROM agentic_flow.migrations WHERE version = 99")
            connection.execute(change.encode())
        with pytest.raises(Conflict) as refused:
            async with PostgresAgentDB(url, AgentDBSettings(), create=True):
                pass
        assert word in f"{refused.value.message} {refused.value.hint}", change


async def test_works_beside_a_newer_build(server: str) -> None:
    """Catches a schema to which a newer build only added something, and that shuts this build out; and
    statements that a new column breaks."""
    url = new_database(server)
    async with PostgresAgentDB(url, AgentDBSettings(), create=True) as running:
        await running.create_namespace("t", SPACE)
        with psycopg.connect(url) as connection:
            connection.execute(b"ALTER TABLE agentic_flow.migrations ADD COLUMN reader_min integer")
            connection.execute(
                b"INSERT INTO agentic_flow.migrations (version, name, reader_min) VALUES (99, 'later', %s)",
                (len(MIGRATIONS),),
            )
            for table in TABLES:
                for column in ("newer_note text", "newer_count integer NOT NULL DEFAULT 7"):
                    connection.execute(f"ALTER TABLE agentic_flow.{table} ADD COLUMN {column}".encode())
        async with PostgresAgentDB(url, AgentDBSettings(), create=True) as restarted:
            for name, store in (("one", running), ("two", restarted)):
                await store.create_namespace("t", name)
                item = Item(id="a", text="a kettle", metadata={"room": "kitchen"})
                again = [await store.upsert("t", name, [item], idempotency_key="k") for _ in range(2)]
                assert again[0] == again[1]
                assert [found.text for found in await store.get("t", name, ["a"])] == ["a kettle"]
                found = await store.search("t", name, SearchQuery(text="kettle", k=1))
                assert [hit.item.id for hit in found.hits] == ["a"]
                mark = Fingerprint(sha256="0" * 64, size_bytes=1, mtime_ns=1)
                chunk = Item(id="c", text="chunk words")
                await store.put_documents("t", name, [Document(path="p", fingerprint=mark, chunks=(chunk,))])
                assert await store.delete("t", name, ["a"]) == 1
                assert await store.delete_namespace("t", name)
    with psycopg.connect(url) as connection:
        connection.execute(b"UPDATE agentic_flow.migrations SET reader_min = 99 WHERE version = 99")
    with pytest.raises(NeedsNewer, match="99"):
        async with PostgresAgentDB(url, AgentDBSettings()):
            pass


async def test_processes_race_to_migrate(server: str) -> None:
    """Catches two processes that start together and both make the schema, or see half of it."""
    url = new_database(server)
    program = (
        "import asyncio, sys; from agentic_flow.agentdb.postgres.schema import migrate; "
        "sys.stdin.readline(); print(*asyncio.run(migrate(sys.argv[1])))"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    applied: list[str] = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        output, _ = await asyncio.to_thread(racer.communicate)
        assert racer.returncode == 0
        applied += output.split()
    assert applied == [migration.name for migration in MIGRATIONS], "each migration once, by one of them"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://me:hunter2@127.0.0.1:1/db", Unavailable),
        ("postgresql://me:hunter2@127.0.0.1:port/db", InvalidSettings),
        ("hunter2", InvalidSettings),
        ("postgresql://me:hunter2@/db?sslcert=%ZZ", InvalidSettings),
    ],
)
async def test_bad_urls_keep_their_secret(url: str, kind: type[Exception]) -> None:
    """Catches a driver's message, and with it a password, in an error that gets logged."""
    with pytest.raises(kind) as refused:
        async with opened(url):
            pass
    assert "hunter2" not in repr(refused.value) + str(getattr(refused.value, "hint", ""))


async def test_unknown_database(server: str) -> None:
    """Catches a typing mistake reported as a server that is down, which nobody then corrects."""
    with pytest.raises(InvalidSettings, match="does not exist"):
        async with opened(database_url(server, "nobody_made_this")):
            pass


# Lost connections


def end_backends(url: str) -> int:
    """Terminate every connection of a store to this database; how many."""
    return len(rows(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE "
                    "'agentdb%' AND datname = current_database()"))  # fmt: skip


def waiting(url: str) -> bool:
    """Whether a call of a store waits for a lock."""
    return bool(rows(url, "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'agentdb%' "
                     "AND datname = current_database() AND wait_event_type = 'Lock'"))  # fmt: skip


@contextmanager
def locked(url: str) -> Generator[psycopg.Connection]:
    """Hold the items against everybody."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE agentic_flow.items IN ACCESS EXCLUSIVE MODE")
        yield connection
        connection.rollback()


async def test_backends_killed_between_calls(url: str) -> None:
    """Catches a pool that hands out dead connections: neither reads nor writes may notice."""
    async with opened(url, pool_max=3) as store:
        await store.create_namespace("t", SPACE)
        for turn in range(3):
            await asyncio.gather(*(store.fingerprints("t", SPACE) for _ in range(6)))  # fills the pool
            assert await asyncio.to_thread(end_backends, url) >= 1
            if turn:
                await store.upsert("t", SPACE, [Item(id=str(turn))])
            assert len((await store.list_items("t", SPACE)).items) == turn


async def test_backend_killed_in_a_read(url: str) -> None:
    """Catches a read that fails because the server ended its connection once."""
    async with opened(url) as store:
        await store.create_namespace("t", SPACE)
        await store.upsert("t", SPACE, [Item(id="a", text="kept")])
        with locked(url) as holder:
            reading = asyncio.create_task(store.get("t", SPACE, ["a"]))
            await until(lambda: waiting(url))
            await asyncio.to_thread(end_backends, url)
            holder.rollback()
            assert [item.text for item in await reading] == ["kept"]


async def test_backend_killed_in_a_write(url: str) -> None:
    """Catches a write that is repeated on its own after it may have been committed, or is half there."""
    async with opened(url) as store:
        await store.create_namespace("t", SPACE)
        await store.upsert("t", SPACE, [Item(id="a", text="old")])
        with locked(url) as holder:
            items = [Item(id="a", text="new"), Item(id="b", text="new")]
            writing = asyncio.create_task(store.upsert("t", SPACE, items, idempotency_key="k"))
            await until(lambda: waiting(url))
            await asyncio.to_thread(end_backends, url)
            with pytest.raises(Unavailable) as lost:
                await writing
            assert lost.value.retryable
            holder.rollback()
        assert [item.text for item in (await store.list_items("t", SPACE)).items] == ["old"]
        assert (await store.upsert("t", SPACE, items, idempotency_key="k")).versions == (2, 1)


async def test_slow_calls_end_typed(url: str) -> None:
    """Catches a call that waits for ever, and a cancelled one that keeps its connection."""
    async with opened(url) as patient:
        await patient.create_namespace("t", SPACE)
    async with opened(url, pool_max=1, query_timeout_s=2.0) as store:
        with locked(url):
            with pytest.raises(DeadlineExceeded, match=r"2\.0 s"):
                await store.get("t", SPACE, ["a"])
            with pytest.raises(DeadlineExceeded):
                await store.search("t", SPACE, SearchQuery(text="a"))
            with pytest.raises(Unavailable, match="too long"):
                await store.upsert("t", SPACE, [Item(id="a")])
    async with opened(url, pool_max=1) as store:
        with locked(url):
            for call in (store.get("t", SPACE, ["a"]), store.upsert("t", SPACE, [Item(id="a")])):
                task = asyncio.create_task(call)
                await until(lambda: waiting(url))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert await store.get("t", SPACE, ["a"]) == []


@pytest.fixture
def folder() -> Generator[Path]:
    """A folder that PostgreSQL's own user can reach, short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="afpg") as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_server_crashes_and_comes_back(folder: Path) -> None:
    """Catches an acknowledged row that a crash of the server takes along, and a pool that never recovers."""
    cluster = Cluster(folder)
    cluster.start()
    try:
        async with PostgresAgentDB(cluster.url, AgentDBSettings(query_timeout_s=5), create=True) as store:
            await store.create_namespace("t", SPACE)
            acknowledged = [str(i) for i in range(20)]
            for item_id in acknowledged:
                await store.upsert("t", SPACE, [Item(id=item_id, text="word")])
            await asyncio.to_thread(cluster.stop, "immediate")
            for call in (store.get("t", SPACE, ["1"]), store.upsert("t", SPACE, [Item(id="x")])):
                with pytest.raises(Unavailable):
                    await call
            await asyncio.to_thread(cluster.start)
            assert len(await store.get("t", SPACE, acknowledged)) == len(acknowledged)
            assert len((await store.search("t", SPACE, SearchQuery(text="word", k=100))).hits) == 20
            await store.upsert("t", SPACE, [Item(id="x")])
    finally:
        cluster.stop()


async def test_replica_serves_reads(folder: Path) -> None:
    """Catches reads that miss what the same process wrote, and a store that falls with its replica."""
    (folder / "primary").mkdir()
    (folder / "standby").mkdir()
    primary = Cluster(folder / "primary")
    primary.start()
    try:
        await migrate(primary.url)
        standby = primary.standby(folder / "standby")
        standby.start()
        async with opened(primary.url, replica_url=standby.url) as store:
            await store.create_namespace("t", SPACE)
            for step in range(300):  # enough to meet a replica that replays during the check
                await store.upsert("t", SPACE, [Item(id="a", text=f"step {step}")])
                (item,) = await store.get("t", SPACE, ["a"])
                assert item.text == f"step {step}", "an own write was not read"
                hits = (await store.search("t", SPACE, SearchQuery(text=f"step {step}"))).hits
                assert [hit.item.text for hit in hits] == [f"step {step}"]
            ((written,),) = rows(primary.url, "SELECT pg_current_wal_insert_lsn()")
            replayed = f"SELECT pg_last_wal_replay_lsn() >= '{written}'"
            await until(lambda: rows(standby.url, replayed) == [(True,)])
            # What only the standby answers: the primary's items are locked, and their lock is not replayed.
            paused = "SELECT pg_get_wal_replay_pause_state() FROM pg_wal_replay_pause()"
            await until(lambda: rows(standby.url, paused) == [("paused",)])
            with locked(primary.url):
                assert [item.id for item in await store.get("t", SPACE, ["a"])] == ["a"]
            await asyncio.to_thread(standby.stop, "immediate")
            assert [item.id for item in await store.get("t", SPACE, ["a"])] == ["a"]
            await store.upsert("t", SPACE, [Item(id="b")])
            assert len((await store.list_items("t", SPACE)).items) == 2
        with pytest.raises(InvalidSettings, match="not a standby"):
            async with opened(primary.url, replica_url=primary.url):
                pass
        standby.start()
        with pytest.raises(InvalidSettings, match="standby"):
            async with opened(standby.url):
                pass
        standby.stop()
    finally:
        primary.stop()


# Races


async def test_one_writer_wins(url: str) -> None:
    """Catches lost updates between processes: of writers that saw one version, exactly one may succeed."""
    async with opened(url) as one, opened(url) as other:
        await one.create_namespace("t", SPACE)

        async def attempt(number: int, expected: int) -> bool:
            store = (one, other)[number % 2]
            batch = [Item(id=name, text=str(number)) for name in ("a", "b")]
            try:
                await store.upsert("t", SPACE, batch[:: (-1) ** number], expected_version=expected)
            except Conflict:
                return False
            return True

        for version in range(5):
            won = await asyncio.gather(*(attempt(number, version) for number in range(8)))
            assert won.count(True) == 1, version
            stored = await one.get("t", SPACE, ["a", "b"])
            assert {(item.version, item.text) for item in stored} == {(version + 1, str(won.index(True)))}


async def test_overlapping_batches_all_count(url: str) -> None:
    """Catches deadlocks that reach the caller, and increments lost between batches in different orders."""
    names = [f"i{number}" for number in range(20)]
    async with opened(url, pool_max=8) as store:
        await store.create_namespace("t", SPACE)

        async def write(turn: int) -> None:
            ordered = names if turn % 2 else names[::-1]
            await store.upsert("t", SPACE, [Item(id=name, text=str(turn)) for name in ordered])

        await asyncio.gather(*(write(turn) for turn in range(16)))
        stored = (await store.list_items("t", SPACE)).items
        assert {item.version for item in stored} == {16}
        assert len({item.text for item in stored}) == 1, "a batch was applied in part"


async def test_readers_of_one_folder_store_it_together(url: str) -> None:
    """Catches a run that fails because another one, at another worker, read the same new folder first."""
    async with opened(url) as one, opened(url) as other:
        await one.create_namespace("t", SPACE)
        mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
        for turn in range(5):
            documents = [
                Document(
                    path=f"{turn}/{name}",
                    fingerprint=mark,
                    chunks=tuple(
                        Item(id=f"{turn}/{name}:{line}", text="a line", metadata={"path": f"{turn}/{name}"})
                        for line in range(3)
                    ),
                )
                for name in ("a", "b", "c")
            ]
            stores = (one, other, one, other)
            counts = await asyncio.gather(*(store.put_documents("t", SPACE, documents) for store in stores))
            assert counts == [9] * 4
        assert len((await one.list_items("t", SPACE, limit=100)).items) == 45
        taken = Document(
            path="else", fingerprint=mark, chunks=(Item(id="0/a:0", text="x", metadata={"path": "else"}),)
        )
        with pytest.raises(Conflict, match="belongs to another item"):
            await one.put_documents("t", SPACE, [taken])


async def test_one_key_one_application(url: str) -> None:
    """Catches a request that is applied twice because its repetition arrived before the first had ended."""
    async with opened(url) as one, opened(url) as other:
        await one.create_namespace("t", SPACE)
        calls = [
            store.upsert("t", SPACE, [Item(id="a", text="x")], idempotency_key="k")
            for store in (one, other, one, other, one)
        ]
        results = await asyncio.gather(*calls)
        assert {result.versions for result in results} == {(1,)}
        assert [item.version for item in await one.get("t", SPACE, ["a"])] == [1]


async def test_namespaces_made_and_deleted_at_once(url: str) -> None:
    """Catches rows left behind by a namespace that goes while it is written, and the driver's errors."""
    async with opened(url) as store:

        async def churn(number: int) -> None:
            for _ in range(5):
                await store.create_namespace("t", SPACE)
                with suppress(NotFound, Conflict):
                    await store.upsert("t", SPACE, [Item(id=str(number))])
                await store.delete_namespace("t", SPACE)

        await asyncio.gather(*(churn(number) for number in range(4)))
        assert await store.namespaces("t") == []
    for table in TABLES:
        assert rows(url, f"SELECT count(*) FROM agentic_flow.{table}") == [(0,)], table


# Large namespaces

ROWS, DIMENSION, QUERIES, K = 20_000, 64, 50, 10
FILTERS: dict[str, Any] = {
    "none": None,
    "half": {"n": {"gte": ROWS // 2}},
    "10 %": {"tenth": 3},
    "1 %": {"hundredth": 7},
    "20 rows": {"n": {"lt": 20}},
    "5 rows": {"n": {"in": list(range(5))}},
}


def clustered(rng: np.random.Generator, count: int, centres: np.ndarray) -> list[Vector]:
    chosen = centres[rng.integers(len(centres), size=count)]
    return [Vector.read(row) for row in chosen + 0.35 * rng.normal(size=chosen.shape)]


@pytest.mark.parametrize(("metric", "quantization"), [("cosine", "f32"), ("euclidean", "f16")])
async def test_filters_keep_recall(url: str, metric: Any, quantization: Any) -> None:
    """Catches filters applied after the nearest were picked, and answers shorter than they could be."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(200, DIMENSION))
    vectors = clustered(rng, ROWS, centres)
    queries = clustered(rng, QUERIES, centres)
    async with opened(url, index="exact") as store:
        await store.create_namespace(
            "t", "big", metric=metric, dimension=DIMENSION, quantization=quantization
        )
        for start in range(0, ROWS, 5000):
            batch = [
                Item(id=f"i{n}", vector=vectors[n], metadata={"n": n, "tenth": n % 10, "hundredth": n % 100})
                for n in range(start, start + 5000)
            ]
            await store.upsert("t", "big", batch)
        assert await store.promote("t", "big")
        assert not await store.promote("t", "big"), "it has one"
    async with opened(url) as store:
        tiers: dict[str, set[str]] = {}
        for name, where in FILTERS.items():
            found = 0
            for vector in queries:
                query = SearchQuery(vector=vector, mode="vector", k=K, filter=where)
                exact = await store.search("t", "big", query.model_copy(update={"exact": True}))
                answer = await store.search("t", "big", query)
                assert exact.tier == "exact"
                tiers.setdefault(name, set()).add(answer.tier)
                assert len(answer.hits) == min(K, 5 if name == "5 rows" else K), name
                assert all(matches(where, hit.item) for hit in answer.hits), name
                scores = [hit.score for hit in answer.hits]
                assert scores == sorted(scores, reverse=True)
                found += len({hit.item.id for hit in answer.hits} & {hit.item.id for hit in exact.hits})
            recall = found / (QUERIES * min(K, 5 if name == "5 rows" else K))
            assert recall >= 0.99, (name, recall)
        assert tiers["none"] == tiers["half"] == tiers["10 %"] == {"graph"}
        assert tiers["5 rows"] == {"exact"}


async def test_growth_gives_a_partition(url: str) -> None:
    """Catches rows lost or doubled while a namespace moves to its own partition under writers and readers."""
    async with opened(url, scan_rows_min=300, pool_max=6) as store:
        await store.create_namespace("t", SPACE)
        await store.create_namespace("other", SPACE)
        await store.upsert("other", SPACE, [Item(id="x", text="word of another")])

        async def write(number: int) -> None:
            for step in range(10):
                items = [Item(id=f"{number}-{step}-{i}", text=f"word {number} {step} {i}") for i in range(20)]
                await store.upsert("t", SPACE, items)
                assert len(await store.get("t", SPACE, [item.id for item in items])) == 20

        await asyncio.gather(*(write(number) for number in range(4)))
        await store.settle()
        (stats,) = await store.stats("t")
        assert (stats.items, stats.tier) == (800, "graph")
        assert stats.index_bytes
        assert (await store.stats("other"))[0].tier == "exact"
        await store.upsert("t", SPACE, [Item(id="blank", text="…"), Item(id="0-0-0", text="changed zebra")])
        assert len((await store.list_items("t", SPACE, limit=1000)).items) == 801
        assert (await store.search("t", SPACE, SearchQuery(text="zebra"))).hits[0].item.id == "0-0-0"
        everything = await store.search("t", SPACE, SearchQuery(text="word", k=1000, mode="vector"))
        assert len(everything.hits) == 801, "an item without a direction is not in the graph, but it is there"
        assert await store.delete_where("t", SPACE, {"@version": {"gte": 1}}) == 801
        assert await store.delete_namespace("t", SPACE)
        assert [item.id for item in (await store.list_items("other", SPACE)).items] == ["x"]
    partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'agentic_flow.items'::regclass"
    assert rows(url, partitions) == [(1,)], "the partition of a deleted namespace stays"


async def test_many_small_namespaces(url: str) -> None:
    """Catches a table or an index for each namespace, which 10,000 of them could not have."""
    count = "SELECT count(*) FROM pg_class"
    before = rows(url, count)
    async with opened(url) as store:
        for number in range(100):
            for tenant in ("one", "two"):
                await store.create_namespace(tenant, f"space{number}")
        await store.upsert("one", "space7", [Item(id="a", text="word")])
        assert len(await store.namespaces("one")) == 100
        assert await store.tenants() == ["one", "two"]
    assert rows(url, count) == before


# Values

texts = st.text(st.sampled_from("ab\x00\x01\x02Z z'\"\\é🙂0"), max_size=4)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    texts,
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 2**53, 2**53 + 1, 2**62 + 7]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 1.0, 2.0**53, 2.0**62, 9.3e18, 1e300, 5e-324]),
)
keys = st.sampled_from(["a", "b", "\x01", "a.b", "", "'"])
ordered = scalars.filter(lambda value: value is not None and not isinstance(value, bool))
instants = st.sampled_from(
    [0, 12.5, 2**62, "2026-11-24T12:00:00Z", "2026-11-24T13:00:00.5+01:00", "1969-12-31 23:59Z"]
)
words = st.text(st.sampled_from("abAßÉé_ -\x00I\u0130\u0301\u212a"), min_size=1, max_size=5)
phrases = words.filter(lambda text: bool(text_words(text)))
stored_values = st.one_of(scalars, instants, words, st.just([1]), st.just({"a": 1}), st.just(2**64 - 1))


def compared(operators: list[str], values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.sampled_from(operators), values).map(lambda pair: {pair[0]: pair[1]})


tests = st.one_of(
    scalars,
    compared(["eq", "ne"], scalars),
    compared(["gt", "gte", "lt", "lte"], ordered),
    compared(["in"], st.lists(scalars, max_size=12)),
    compared(["exists"], st.booleans()),
    compared(["match"], phrases),
    compared(["before", "after"], instants),
)
item_tests = st.one_of(
    st.fixed_dictionaries({"@id": compared(["eq", "ne", "gt", "gte", "lt", "lte"], st.sampled_from("0123"))}),
    st.fixed_dictionaries({"@id": compared(["in"], st.lists(st.sampled_from("0123")))}),
    st.fixed_dictionaries({"@text": compared(["match"], phrases)}),
    st.fixed_dictionaries({"@version": compared(["eq", "gt", "lte"], st.sampled_from([1, 2, 3.5]))}),
    st.fixed_dictionaries({"@created_at_s": compared(["before", "after"], instants)}),
    st.fixed_dictionaries({"@updated_at_s": compared(["gt", "lt", "ne"], st.sampled_from([0, 1e12, 1.5]))}),
)


def combined(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        compared(["and", "or"], st.lists(inner, max_size=3)),
        compared(["not"], inner),
    )


filters: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.one_of(st.dictionaries(keys, tests, max_size=2), item_tests), combined, max_leaves=6
)
metadata = st.dictionaries(keys, stored_values, max_size=4)


def test_filters_mean_what_they_mean(url: str) -> None:
    """Catches a condition in SQL that differs from the definition: NULLs, kinds, order, rounding, escapes."""
    with asyncio.Runner() as runner:
        store = opened(url)
        runner.run(store.__aenter__())
        runner.run(store.create_namespace("t", SPACE))

        @settings(max_examples=300, deadline=None)
        @given(
            st.lists(st.tuples(words, metadata), min_size=1, max_size=4),
            st.lists(filters, min_size=1, max_size=6),
        )
        def check(stored: list[tuple[str, dict[str, Any]]], asked: list[dict[str, Any]]) -> None:
            sent = [
                Item(id=str(number), text=text, metadata=values)
                for number, (text, values) in enumerate(stored)
            ]
            runner.run(store.upsert("t", SPACE, sent))
            items = runner.run(store.get("t", SPACE, [item.id for item in sent]))
            assert [(item.text, item.metadata) for item in items] == stored
            runner.run(store.delete("t", SPACE, [str(number) for number in range(len(items), 4)]))
            for where in asked:
                page = runner.run(store.list_items("t", SPACE, where=where))
                expected = [item.id for item in items if matches(where, item)]
                assert [item.id for item in page.items] == expected

        try:
            check()
        finally:
            runner.run(store.__aexit__(None, None, None))


async def test_long_and_odd_names(url: str) -> None:
    """Catches ids and paths that an index entry cannot hold, or that PostgreSQL's text cannot."""
    ids = ["🙂" * 1024, "🙂" * 1023 + "a", "a" * 1024, "\x01", "\x01\x02", "a\x01\x01", "é"]
    paths = ["🙂" * 4096, "🙂" * 4095 + "b", "\x01", "plain"]
    async with opened(url) as store:
        await store.create_namespace("t", SPACE)
        await store.upsert("t", SPACE, [Item(id=name, text="word") for name in ids])
        assert [item.id for item in await store.get("t", SPACE, ids)] == ids
        listed: list[str] = []
        cursor = None
        while True:
            page = await store.list_items("t", SPACE, cursor=cursor, limit=2)
            listed += [item.id for item in page.items]
            if (cursor := page.cursor) is None:
                break
        assert sorted(listed) == sorted(ids)
        assert await store.delete("t", SPACE, ids) == len(ids)
        mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256="\x00")
        documents = [
            Document(path=path, fingerprint=mark, chunks=(Item(id=str(number), text="word"),))
            for number, path in enumerate(paths)
        ]
        assert await store.put_documents("t", SPACE, documents) == len(paths)
        assert set(await store.fingerprints("t", SPACE)) == set(paths)
        stored = await store.get("t", SPACE, [str(number) for number in range(len(paths))])
        assert [item.document for item in stored] == paths
        assert await store.delete_documents("t", SPACE, paths) == len(paths)
        with pytest.raises(InvalidInput):
            await store.create_namespace("t", "wide", dimension=16_001)


async def test_texts_of_many_words(url: str) -> None:
    """Catches the limits of PostgreSQL's own text search: 1 MB of words, words of 2 KB, 255 positions."""
    distinct = " ".join(f"w{number:x}q{number * 7919:x}" for number in range(40_000))
    async with opened(url) as store:
        await store.create_namespace("t", SPACE)
        long = "x" * 5000
        await store.upsert(
            "t",
            SPACE,
            [
                Item(id="many", text=distinct),
                Item(id="long", text=f"short {long}"),
                Item(id="none", text="…"),
            ],
        )
        for text, wanted in ((f"w{39_999:x}q{39_999 * 7919:x}", "many"), (long, "long")):
            hits = (await store.search("t", SPACE, SearchQuery(text=text, mode="text"))).hits
            assert hits[0].item.id == wanted


def ids_of(items: Sequence[Item]) -> list[str]:
    return [item.id for item in items]


async def test_restore_keeps_everything(url: str) -> None:
    """Catches an import that invents versions or times, loses vectors, or orphans chunks."""
    async with opened(url) as store:
        await store.create_namespace("t", SPACE)
        mark = Fingerprint(size_bytes=3, mtime_ns=4, sha256="ab")
        await store.upsert("t", SPACE, [Item(id="a", text="old")])
        (before,) = (await store.list_items("t", SPACE, vectors=True)).items
        await store.put_documents(
            "t", SPACE, [Document(path="p", fingerprint=mark, chunks=(Item(id="c", text="chunk words"),))]
        )
        exported = (await store.list_items("t", SPACE, vectors=True)).items
        odd = before.model_copy(
            update={"id": "z", "version": 41, "created_at_s": 1.5, "updated_at_s": 2.5, "expires_at_s": 4e9}
        )
        await store.create_namespace("t", "copy")
        assert await store.restore("t", "copy", [*exported, odd], {"p": mark}) == 3
        assert (await store.list_items("t", "copy", vectors=True)).items == (*exported, odd)
        assert await store.fingerprints("t", "copy") == {"p": mark}
        assert await store.restore("t", "copy", [odd]) == 1
        assert ids_of((await store.list_items("t", "copy")).items) == ["a", "c", "z"]
        with pytest.raises(InvalidInput, match="not there"):
            await store.restore("t", "copy", [odd.model_copy(update={"document": "never"})])


VOCABULARY = "run runs running cache cached caches zebra straße Résumé HTTPServer call_soon x2 the a".split()


async def test_both_stores_rank_alike(url: str, tmp_path: Path) -> None:
    """Catches full text that scores otherwise than the embedded store: BM25, stems, weights, word splits."""
    rng = np.random.default_rng(3)
    items = [
        Item(
            id=f"i{number:02}",
            text=" ".join(rng.choice(VOCABULARY, size=rng.integers(1, 30))),
            metadata={"symbol": str(rng.choice(VOCABULARY)), "path": f"src/{rng.choice(VOCABULARY)}.py"}
            if number % 3
            else {},
        )
        for number in range(60)
    ]
    async with opened(url) as there, AgentDB(tmp_path, AgentDBSettings()) as here:
        for store in (there, here):
            await store.create_namespace("t", SPACE)
            await store.upsert("t", SPACE, items)
        for text in (
            "zebra",
            "running",
            "http server",
            "callSoon cached",
            "resume",
            "src x2",
            "x2 run zebra",
        ):
            query = SearchQuery(text=text, mode="text", k=100)
            theirs, ours = await there.search("t", SPACE, query), await here.search("t", SPACE, query)
            scores = {hit.item.id: hit.score for hit in ours.hits}
            assert {hit.item.id: hit.score for hit in theirs.hits} == pytest.approx(scores), text
            query = SearchQuery(text=text, k=5)
            theirs, ours = await there.search("t", SPACE, query), await here.search("t", SPACE, query)
            expected = [hit.score for hit in ours.hits]
            assert [hit.score for hit in theirs.hits] == pytest.approx(expected, rel=1e-3), text
            query = SearchQuery(text=text, k=5, fusion="rrf", explain=True)
            for hit in (await there.search("t", SPACE, query)).hits:
                parts = hit.score_parts
                by_text = 1 / (60 + parts["text_rank"]) if "text_rank" in parts else 0.0
                by_vector = parts["vector_weight"] / (60 + parts["vector_rank"])
                assert hit.score == pytest.approx(by_text + by_vector), text
