"""The RunEngine contract on SQLite, and what is particular to the local store."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from agentic_flow.core.errors import DataCorrupted, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.reader import RunReader
from agentic_flow.testing.run_engine_contract import CHECKS, RunEngineCase

LEASE_S = 5.0


def engine_in(folder: Path, *, runs_parallel_max: int = 8, **more: Any) -> SqlRunEngine:
    return SqlRunEngine(None, folder, lease_s=LEASE_S, runs_parallel_max=runs_parallel_max, **more)


def database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "runs" / "runs.db")


async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
    """Two steps; the second fails when the payload says so."""

    async def first(step: StepContext) -> JsonObject:
        return {"key": step.idempotency_key}

    return await context.step("first", first)


async def run_one(engine: SqlRunEngine, workflow_id: str = "run-1") -> None:
    async with engine.open():
        await engine.start("flow", workflow_id, {"goal": "naïve ☃"}, tenant="t")
        await engine.wait(workflow_id)


async def interrupt_one(folder: Path) -> None:
    """Leave an interrupted workflow `run-1` behind."""
    begun = asyncio.Event()

    async def held(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def hold(step: StepContext) -> JsonObject:
            begun.set()
            await asyncio.Event().wait()
            return {}

        return await context.step("hold", hold)

    engine = engine_in(folder)
    engine.register("flow", held)
    async with engine.open():
        await engine.start("flow", "run-1", {"goal": "x"}, tenant="t")
        await begun.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the whole contract: checks must not see each other's workflows."""
    return tmp_path_factory.mktemp("engine")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[RunEngineCase], Awaitable[None]], store: Path) -> None:
    """Catches whatever the docstring of the check says."""

    def make(**options: Any) -> SqlRunEngine:
        return engine_in(store, **options)

    async def main() -> None:
        await check(RunEngineCase(make, secrets.token_hex(4)))

    asyncio.run(main())


def test_store_is_durable_json(tmp_path: Path) -> None:
    """Catches a store out of WAL mode, and anything pickled or otherwise not readable as JSON in it."""
    engine = engine_in(tmp_path)
    engine.register("flow", flow)
    asyncio.run(run_one(engine))
    with closing(database(tmp_path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        stored = [
            *connection.execute("SELECT payload FROM af_workflows"),
            *connection.execute("SELECT output FROM af_workflows"),
            *connection.execute("SELECT output FROM af_steps"),
        ]
    assert [orjson.loads(text) for (text,) in stored] == [
        {"goal": "naïve ☃"},
        {"key": "run-1:1"},
        {"key": "run-1:1"},
    ]


def test_every_connection_is_durable(tmp_path: Path) -> None:
    """Catches a connection of the pool that acknowledges before the disk has it."""
    from agentic_flow.swarm.leases import RunDatabase

    run_database = RunDatabase(None, tmp_path)
    run_database.create()
    with run_database.reading() as one, run_database.reading() as two:
        for connection in (one, two):
            assert connection.execute("PRAGMA synchronous").scalar_one() == 2
            assert connection.execute("PRAGMA busy_timeout").scalar_one() == 30_000
    run_database.close()


def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    """Catches threads, lock files and signs of life that outlive the engine."""
    before = set(threading.enumerate())
    engine = engine_in(tmp_path)
    engine.register("flow", flow)
    asyncio.run(run_one(engine))
    assert set(threading.enumerate()) <= before
    assert list((tmp_path / "runs" / "executors").iterdir()) == []
    with closing(database(tmp_path)) as connection:
        assert connection.execute("SELECT count(*) FROM af_executors").fetchone() == (0,)


def test_reader_needs_no_engine(tmp_path: Path) -> None:
    """Catches `runs list` paying for, or changing anything by, a run engine, and a false state."""
    reader = RunReader(None, tmp_path, lease_s=LEASE_S)
    assert reader.list_workflows("t", name="flow") == []
    assert reader.get("run-1") is None
    assert reader.steps("run-1") == []
    assert not (tmp_path / "runs").exists(), "reading created a store"
    asyncio.run(interrupt_one(tmp_path))
    program = (
        "import sys; from pathlib import Path; from agentic_flow.swarm.reader import RunReader\n"
        "reader = RunReader(None, Path(sys.argv[1]), lease_s=5)\n"
        "print(*[(r.workflow_id, r.state) for r in reader.list_workflows('t', name='flow')])\n"
        "assert not {'sqlalchemy', 'agentic_flow.swarm.engine'} & set(sys.modules)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "('run-1', 'interrupted')\n"


def test_damaged_payload_fails_and_hides_nothing(tmp_path: Path) -> None:
    """Catches a damaged row that makes lists unusable, hangs a resume or runs with a wrong payload."""
    asyncio.run(interrupt_one(tmp_path))
    with closing(database(tmp_path)) as connection:
        connection.execute("UPDATE af_workflows SET payload = substr(payload, 1, 9)")
        connection.commit()

    async def main() -> None:
        engine = engine_in(tmp_path)
        engine.register("flow", flow)
        async with engine.open():
            await engine.start("flow", "run-2", {}, tenant="t")
            assert (await engine.wait("run-2")).state == "completed"
            listed = await engine.list_workflows("t", name="flow")
            assert [(r.workflow_id, r.state) for r in listed] == [
                ("run-2", "completed"),
                ("run-1", "interrupted"),
            ]
            assert (listed[1].error or {})["code"] == "data_corrupted"
            assert await engine.resume("run-1")
            record = await engine.wait("run-1")
            assert (record.state, (record.error or {})["code"]) == ("failed", "data_corrupted")

    asyncio.run(main())


def test_damaged_result_is_not_success(tmp_path: Path) -> None:
    """Catches a completed workflow shown as completed although its result cannot be read."""
    engine = engine_in(tmp_path)
    engine.register("flow", flow)
    asyncio.run(run_one(engine))
    with closing(database(tmp_path)) as connection:
        connection.execute("UPDATE af_workflows SET output = 'x'")
        connection.execute("UPDATE af_steps SET output = 'x'")
        connection.commit()
    reader = RunReader(None, tmp_path, lease_s=LEASE_S)
    record = reader.get("run-1")
    assert record is not None
    assert (record.state, (record.error or {})["code"]) == ("failed", "data_corrupted")
    assert [r.workflow_id for r in reader.list_workflows("t", name="flow", states=["failed"])] == ["run-1"]
    assert (reader.steps("run-1")[0].error or {})["code"] == "data_corrupted"


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    """Catches a traceback of the driver, or a fresh database written over a damaged one."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "runs.db").write_bytes(b"this is no database" * 100)

    async def main() -> None:
        async with engine_in(tmp_path).open():
            raise AssertionError("opened")

    with pytest.raises(DataCorrupted, match=r"runs\.db"):
        asyncio.run(main())
    assert (tmp_path / "runs" / "runs.db").read_bytes().startswith(b"this is no database")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    """Catches a data folder that cannot be made ending in anything but one clear line."""
    (tmp_path / "runs").write_text("in the way")

    async def main() -> None:
        async with engine_in(tmp_path).open():
            raise AssertionError("opened")

    with pytest.raises(Unavailable, match="runs"):
        asyncio.run(main())


def test_open_cancelled_while_launching(tmp_path: Path) -> None:
    """Catches a launch that goes on after its caller was cancelled, and blocks every later engine."""

    async def main() -> None:
        for pause_s in (0.0, 0.005, 0.02, 0.05):

            async def opened() -> None:
                async with engine_in(tmp_path).open():
                    await asyncio.Event().wait()

            task = asyncio.create_task(opened())
            await asyncio.sleep(pause_s)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        engine = engine_in(tmp_path)
        engine.register("flow", flow)
        await run_one(engine)

    asyncio.run(main())
