"""Erasing a tenant: every row and every byte of it, nobody else's; and which backups still hold it."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli_process import Place

from agentic_flow.agentdb.backup import backup, restore
from agentic_flow.agentdb.erasure import recorded_backups, survey_backups
from agentic_flow.agentdb.lineage import other_histories
from agentic_flow.agentdb.manifest import DATABASE
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.core.settings import AgentDBSettings, Settings
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery
from agentic_flow.runtime.build import Runtime
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import Leases, RunDatabase

pytestmark = pytest.mark.anyio

MARKS = {"gone": "aardvark", "kept": "badger", "also": "condor"}
NOTES = "notes"


def rows_that_name(file: Path, word: str) -> dict[str, int]:
    """Table → rows in which any column holds the word."""
    connection = sqlite3.connect(file)
    found: dict[str, int] = {}
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        rows = connection.execute(f"SELECT * FROM {table}").fetchall()
        count = sum(any(word in str(value) for value in row) for row in rows)
        if count:
            found[table] = count
    connection.close()
    return found


async def test_no_row_of_the_tenant_is_left_and_none_of_another_is_lost(tmp_path: Path) -> None:
    """Catches a table that erasure forgets, a neighbour's rows taken along, and a run that goes on."""
    engine = SqlRunEngine(None, tmp_path, lease_s=5.0, runs_parallel_max=8)
    started, stopped = asyncio.Event(), asyncio.Event()

    async def agent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def step(_: StepContext) -> JsonObject:
            return {"said": payload["word"]}

        return await context.step("model", step)

    async def run(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.children("agent", {"work-1": payload})

        async def forever(_: StepContext) -> JsonObject:
            started.set()
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.set()
            return {}

        return await context.step("wait", forever) if payload["waits"] else {"answer": payload["word"]}

    engine.register("agent", agent)
    engine.register("run", run)
    async with engine.open():
        await engine.start("run", "run-a1", {"word": "aardvark", "waits": False}, tenant="a")
        await engine.wait("run-a1")
        await engine.start("run", "run-a2", {"word": "aardvark", "waits": True}, tenant="a")
        await engine.start("run", "run-b1", {"word": "badger", "waits": False}, tenant="b")
        await engine.wait("run-b1")
        await asyncio.wait_for(started.wait(), 20)
        file = tmp_path / "runs" / "runs.db"
        before = rows_that_name(file, "badger")
        assert rows_that_name(file, "aardvark")
        database = RunDatabase(None, tmp_path, pooled=False)
        assert await asyncio.to_thread(Leases(database, lease_s=5.0).erase_tenant, "a") == 2
        database.close()
        await asyncio.wait_for(stopped.wait(), 20)
        assert await engine.list_workflows("a", name="run") == []
    assert rows_that_name(file, "aardvark") == {}
    assert rows_that_name(file, "run-a") == {}
    assert rows_that_name(file, "badger") == before


async def live_a_while(store: AgentDB, chance: random.Random, steps: int) -> None:
    """Three tenants write, overwrite and delete small and large rows, each with its own word in them."""
    for tenant in MARKS:
        await store.create_namespace(tenant, NOTES)
    for step in range(steps):
        tenant = chance.choice(list(MARKS))
        mark = MARKS[tenant]
        ids = [f"i{number}" for number in chance.sample(range(40), 4)]
        match chance.randrange(10):
            case 0 | 1 | 2 | 3 | 4 | 5:
                size = chance.choice((1, 5, 50, 800))
                items = [Item(id=i, text=f"{mark} x{step} " * size, metadata={"m": mark}) for i in ids]
                await store.upsert(tenant, NOTES, items, idempotency_key=f"{mark}-{step}")
            case 6 | 7:
                await store.delete(tenant, NOTES, ids)
            case _:
                path = f"{mark}-{chance.randrange(4)}.txt"
                chunks = tuple(Item(id=f"{path}:{n}", text=f"{mark} {step} " * 30) for n in range(4))
                print_of = Fingerprint(size_bytes=1, mtime_ns=1, sha256=f"{mark}{step}")
                await store.put_documents(
                    tenant, NOTES, [Document(path=path, fingerprint=print_of, chunks=chunks)]
                )


def files_that_hold(folder: Path, word: str) -> list[str]:
    """The files, read as bytes, that hold the word as UTF-8 or UTF-16."""
    forms = (word.encode(), word.encode("utf-16-le"))
    while True:
        try:
            return [
                str(path.relative_to(folder))
                for path in sorted(folder.rglob("*"))
                if not path.is_dir() and any(form in path.read_bytes() for form in forms)
            ]
        except FileNotFoundError:
            continue  # the history was sealed meanwhile: what it held is in another file now


async def everything(store: AgentDB, tenant: str) -> list[Item]:
    """All items of a tenant; it has fewer than a page."""
    return list((await store.list_items(tenant, NOTES, limit=1000, vectors=True)).items)


@pytest.mark.parametrize("history", [False, True], ids=["no history", "history"])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_byte_of_the_tenant_is_left_on_disk(tmp_path: Path, seed: int, history: bool) -> None:
    """Catches text in freed pages, in the slack of pages, in the log, in sealed segments or in a replay of a
    request; an index file that stays; and a neighbour that loses a row."""
    place = tmp_path / "place"
    history_dir = place / "history" if history else None
    settings = AgentDBSettings(
        embedding_dimension=256, index="scan", history_dir=history_dir, history_seal_s=0.05
    )
    async with AgentDB(place / "data", settings) as store:
        await live_a_while(store, random.Random(seed), 150)
        await store.settle()
        assert files_that_hold(place, "aardvark")
        before = {tenant: await everything(store, tenant) for tenant in ("kept", "also")}
        count = (await store.namespaces("gone"))[0].items
        assert await store.erase_tenant("gone") == count > 0
        assert files_that_hold(place, "aardvark") == []
        indexes = place / "data" / "agentdb" / "indexes"
        assert len(list(indexes.iterdir())) == 2
        for tenant, items in before.items():
            assert await everything(store, tenant) == items
        await store.upsert("kept", NOTES, [Item(id="later", text="badger")])
    assert files_that_hold(place, "aardvark") == []
    assert files_that_hold(place, "badger")
    if history:
        (folder,) = (place / "history").iterdir()
        assert not any(b"gone" in line.replace(b'"gone":', b"") for line in _contents(folder))


def _contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


async def test_the_history_of_the_others_still_restores_to_every_sequence(tmp_path: Path) -> None:
    """Catches an erasure that breaks the chain, loses a neighbour's call, or that a restore undoes."""
    data, history = tmp_path / "data", tmp_path / "history"
    settings = AgentDBSettings(embedding_dimension=256, history_dir=history, history_seal_s=0.05)
    moments: dict[int, list[Item]] = {}
    async with AgentDB(data, settings) as store:
        for tenant in MARKS:
            await store.create_namespace(tenant, NOTES)
        backup(data, tmp_path / "base", history_dir=history)
        for number in range(12):
            await store.upsert("gone", NOTES, [Item(id=f"g{number}", text="aardvark")])
            await store.upsert("kept", NOTES, [Item(id=f"k{number % 5}", text=f"badger {number}")])
            (stats,) = await store.stats("kept")
            assert stats.sequence is not None
            moments[stats.sequence] = await everything(store, "kept")
        assert await store.erase_tenant("gone") == 12
    for sequence, items in moments.items():
        back = tmp_path / f"at-{sequence}"
        report = restore(tmp_path / "base", back, history=history, at=sequence)
        assert (report.sequence, report.tenants_withheld) == (sequence, 1)
        async with AgentDB(back, AgentDBSettings(embedding_dimension=256)) as restored:
            assert await everything(restored, "kept") == items
            assert await restored.namespaces("gone") == []
            assert await restored.tenants() == ["also", "kept"]


async def test_a_process_that_had_the_index_in_memory_does_not_write_it_again(tmp_path: Path) -> None:
    """Catches vectors of an erased tenant that come back to the disk when another process ends."""
    settings = AgentDBSettings(embedding_dimension=256, index="scan")
    indexes = tmp_path / "agentdb" / "indexes"
    items = [Item(id=f"i{number}", text=f"aardvark {number}") for number in range(300)]
    async with AgentDB(tmp_path, settings) as server:
        for tenant in ("gone", "kept"):
            await server.create_namespace(tenant, NOTES)
            await server.upsert(tenant, NOTES, items)
        await server.settle()
        for tenant in ("gone", "kept"):
            await server.upsert(tenant, NOTES, items[:50])
            await server.search(tenant, NOTES, SearchQuery(text="aardvark", mode="vector"))
        async with AgentDB(tmp_path, settings) as command:
            assert await command.erase_tenant("gone") == 300
        assert len(list(indexes.iterdir())) == 1
    assert len(list(indexes.iterdir())) == 1


async def test_a_log_in_use_is_told_and_the_erasure_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an erasure that says it is done while a reader elsewhere keeps the log with the text in it."""
    async with AgentDB(tmp_path, AgentDBSettings(embedding_dimension=256)) as store:
        await store.create_namespace("gone", NOTES)
        await store.upsert("gone", NOTES, [Item(id="a", text="aardvark " * 50)])
        reader = apsw.Connection(str(tmp_path / DATABASE))
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM items").fetchall()
        with monkeypatch.context() as patch:
            patch.setattr("agentic_flow.agentdb.service.LOG_WAIT_S", 0.1)
            with pytest.raises(Unavailable, match="in use"):
                await store.erase_tenant("gone")
        assert await store.namespaces("gone") == []
        reader.execute("COMMIT")
        reader.close()
        assert await store.erase_tenant("gone") == 0
        assert files_that_hold(tmp_path, "aardvark") == []


async def fill(data_dir: Path, *tenants: str, history_dir: Path | None = None) -> None:
    """A database in which each of them has a row."""
    async with AgentDB(data_dir, AgentDBSettings(history_dir=history_dir)) as store:
        for tenant in tenants:
            await store.create_namespace(tenant, NOTES)
            await store.upsert(tenant, NOTES, [Item(id="a", text="some words")])


async def test_backups_are_surveyed_and_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Catches a damaged or missing backup that hides the others, and "not held" where nobody can tell."""
    data = tmp_path / "data"
    await fill(data, "acme", "other")
    for name in ("a", "b", "c"):
        backup(data, tmp_path / "backups" / name)
    backup(data, tmp_path / "elsewhere")
    made = recorded_backups(data / DATABASE)
    assert made == [
        *(tmp_path / "backups" / name for name in ("a", "b", "c")),
        tmp_path / "elsewhere",
    ]
    everywhere = [str(place) for place in made]
    survey = survey_backups("acme", [tmp_path / "backups"], made)
    assert (survey.verdict, list(survey.holding)) == ("held", everywhere)
    assert survey_backups("nobody", [tmp_path / "backups"], made).verdict == "not_held"
    assert survey_backups("acme", [], []).verdict == "unknown"
    database = tmp_path / "backups" / "b" / "agentdb.db"
    database.write_bytes(b"no database" * 100)
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    survey = survey_backups("acme", [tmp_path / "backups"], made)
    assert (survey.verdict, list(survey.holding)) == ("held", [everywhere[0], everywhere[2]])
    assert survey.missing == (everywhere[3],)
    (told,) = survey.unreadable
    assert str(database) in told
    survey = survey_backups("nobody", [tmp_path / "backups", tmp_path / "nothing"], made)
    assert survey.verdict == "unknown"
    assert any("nothing" in told for told in survey.unreadable)


def test_a_record_cut_short_by_a_crash_hides_no_other(tmp_path: Path) -> None:
    """Catches a list of backups that cannot be read because its last line was never finished."""
    (tmp_path / "backups.jsonl").write_bytes(b'{"path": "/a"}\n{"path": "/b"}\n{"pa')
    assert recorded_backups(tmp_path / "agentdb.db") == [Path("/a"), Path("/b")]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"agentdb": {"database_url": "postgresql://flow@db.example/flow"}}, "PostgreSQL"),
        ({"peers": {"agentdb_url": "http://db.example:5432"}}, "service"),
    ],
)
async def test_a_database_elsewhere_has_backups_of_its_own(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    """Catches "no backup holds it" of a database whose backups nobody here knows."""
    await fill(tmp_path / "before", "acme")
    backup(tmp_path / "before", tmp_path / "backups" / "old")
    chosen = Settings.model_validate({"data_dir": str(tmp_path / "data"), **settings})
    async with Runtime(chosen) as runtime:
        survey = await runtime.survey_backups("acme")
        assert survey.verdict == "unknown"
        assert told in survey.notes[0]
        # Backups of the time before it moved there still count.
        survey = await runtime.survey_backups("acme", [tmp_path / "backups"])
        assert (survey.verdict, survey.holding) == ("held", (str(tmp_path / "backups" / "old"),))
        assert (await runtime.survey_backups("other", [tmp_path / "backups"])).verdict == "unknown"


def test_the_command_names_the_backups_that_hold_the_tenant(tmp_path: Path) -> None:
    """Catches a command that erases and keeps silent about backups, or erases before it knows its folders."""
    place = Place(tmp_path)
    for tenant in ("acme", "beta", "gamma"):
        assert place.run("tenants", "create", tenant).code == 0
    erase = ("tenants", "erase", "--yes")
    none = place.run(*erase, "gamma", "--json")
    assert none.code == 0, none.err
    assert none.data["backups"]["verdict"] == "unknown"
    assert "cannot be told" in none.data["backups"]["notes"][0]
    asyncio.run(fill(place.data_dir, "acme", "beta"))
    assert place.run("db", "backup", "aside").code == 0
    refused = place.run(*erase, "acme", "--backups", "nowhere")
    assert refused.code == 2
    assert "'nowhere'" in refused.problem
    asyncio.run(fill(tmp_path / "copied", "acme"))
    backup(tmp_path / "copied", tmp_path / "kept" / "monday")
    backup(tmp_path / "copied", tmp_path / "named" / "tuesday")
    variables = {"AGENTIC_FLOW_AGENTDB__BACKUPS_DIRS": json.dumps([str(tmp_path / "kept")])}
    done = place.run(*erase, "acme", "--backups", "named", "--json", **variables)
    assert done.code == 0, done.err
    assert done.data["erased"]["memory"] == 1
    survey = done.data["backups"]
    assert survey["verdict"] == "held"
    assert set(survey["holding"]) == {str(tmp_path / n) for n in ("aside", "kept/monday", "named/tuesday")}
    told = place.run(*erase, "beta")
    assert told.out.splitlines()[1:] == [f"still held in {tmp_path / 'aside'}"]


def test_a_restored_database_tells_of_the_history_it_came_from(tmp_path: Path) -> None:
    """Catches "erased" said of a restored database while the history that it came from holds the tenant."""
    place = Place(tmp_path, AGENTIC_FLOW_AGENTDB__HISTORY_DIR=str(tmp_path / "history"))
    asyncio.run(fill(place.data_dir, "acme", history_dir=tmp_path / "history"))
    (history,) = (tmp_path / "history").iterdir()
    for words in (
        ("db", "backup", "monday"),
        ("db", "restore", "monday", "--to", "back"),
        ("tenants", "create", "acme", "--data-dir", "back"),
    ):
        done = place.run(*words)
        assert done.code == 0, done.err
    done = place.run("tenants", "erase", "acme", "--yes", "--json", "--data-dir", "back")
    assert done.code == 0, done.err
    assert done.data["erased"]["memory"] == 1
    survey = done.data["backups"]
    assert survey["verdict"] == "held"
    assert survey["holding"] == [str(tmp_path / "monday"), str(history)]
    assert any(str(history) in note for note in survey["notes"])


@pytest.mark.parametrize("configured", [True, False], ids=["history set", "history unset"])
async def test_all_that_a_database_comes_from_is_surveyed(tmp_path: Path, configured: bool) -> None:
    """Catches backups and histories that are forgotten when a restored database is restored again."""
    data, history = tmp_path / "data", tmp_path / "history"
    await fill(data, "acme", "beta", history_dir=history)
    for name in ("first", "second"):
        backup(data, tmp_path / name, history_dir=history)
    (origin,) = history.iterdir()
    restore(tmp_path / "second", tmp_path / "once", history=history)
    backup(tmp_path / "once", tmp_path / "third")
    restore(tmp_path / "third", tmp_path / "twice")
    # With the original at hand, also those that were made after the one that is restored.
    restore(tmp_path / "first", tmp_path / "beside", live=data)
    known = recorded_backups(tmp_path / "beside" / DATABASE)
    assert sorted(known) == [tmp_path / "first", tmp_path / "second"]
    own = AgentDBSettings(history_dir=history if configured else None)
    async with Runtime(Settings(data_dir=tmp_path / "twice", agentdb=own)) as runtime:
        survey = await runtime.survey_backups("acme")
        assert survey.verdict == "held"
        places = [*(tmp_path / name for name in ("first", "second", "third")), origin]
        assert survey.holding == tuple(map(str, places))
        # Erased in the original as well, and the backups deleted: nothing is left, if all can be looked at.
        async with AgentDB(data, AgentDBSettings(history_dir=history)) as store:
            assert await store.erase_tenant("acme") == 1
        for place in places[:3]:
            shutil.rmtree(place)
        survey = await runtime.survey_backups("acme", [tmp_path / "history"])
        assert (survey.holding, survey.missing) == ((), tuple(map(str, places[:3])))
        assert survey.verdict == ("not_held" if configured else "unknown"), survey
        survey = await runtime.survey_backups("beta")
        assert survey.holding == (str(origin),)


async def test_a_history_that_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    """Catches "not held" of a history that is damaged, or whose place nobody knows any more."""
    history, data, back = tmp_path / "history", tmp_path / "data", tmp_path / "back"
    async with AgentDB(data, AgentDBSettings(history_dir=history)) as store:
        await store.create_namespace("acme", NOTES)
    backup(data, tmp_path / "base", history_dir=history)
    restore(tmp_path / "base", back, history=history)
    (folder,) = history.iterdir()
    (segment,) = folder.glob("*.segment")
    whole = segment.read_bytes()
    others = other_histories(back / DATABASE, history)
    assert (others.folders, others.notes) == ((folder,), ())
    survey = survey_backups("acme", [], [], histories=others.folders)
    assert (survey.verdict, survey.holding) == ("held", (str(folder),))
    segment.write_bytes(whole[:100] + b"!" + whole[101:])
    survey = survey_backups("acme", [tmp_path / "base"], histories=others.folders)
    assert survey.verdict == "held"
    assert any(str(segment) in told for told in survey.unreadable)
    assert survey_backups("other", [tmp_path / "base"], histories=others.folders).verdict == "unknown"
    folder.rename(tmp_path / "moved")
    survey = survey_backups("other", [tmp_path / "base"], histories=others.folders)
    assert (survey.verdict, survey.missing) == ("not_held", (str(folder),))
    # The database's own history, when it is not set any more; and an origin whose history nobody named.
    (told,) = other_histories(data / DATABASE, None).notes
    assert "history_dir is not set" in told
    restore(tmp_path / "base", tmp_path / "alone")
    (told,) = other_histories(tmp_path / "alone" / DATABASE, None).notes
    assert folder.name in told
    assert other_histories(tmp_path / "nothing.db", None).notes == ()


def test_a_platform_elsewhere_says_it_over_http(tmp_path: Path) -> None:
    """Catches a route without the survey, and a command that forgets either side's folders."""
    place = Place(tmp_path, AGENTIC_FLOW_AUTH__REQUIRED="true")
    asyncio.run(fill(place.data_dir, "acme", "beta"))
    backup(place.data_dir, tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / "named")
    backup(place.data_dir, tmp_path / "aside")
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        (line,) = [line for line in server.err if "owner key" in line]
        key = line.split()[-1]
        client = Place(
            tmp_path / "named", AGENTIC_FLOW_PEERS__PLATFORM_URL=url, AGENTIC_FLOW_PEERS__TOKEN=key
        )
        for tenant in ("acme", "beta"):
            assert client.run("tenants", "create", tenant).code == 0
        done = client.run("tenants", "erase", "acme", "--yes", "--json", "--backups", tmp_path / "named")
        assert done.code == 0, done.err
        assert done.data["backups"]["verdict"] == "held"
        assert done.data["backups"]["holding"] == [str(tmp_path / "aside"), str(tmp_path / "named")]
        request = urllib.request.Request(
            f"{url}/v1/tenants/beta", method="DELETE", headers={"authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            told = json.load(answer)
        assert told["erased"]["memory"] == 1
        assert told["backups"]["holding"] == [str(tmp_path / "aside")]
        server.signal(signal.SIGTERM)
        assert server.end().code == 0
