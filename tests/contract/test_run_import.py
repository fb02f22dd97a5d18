"""Runs of builds that used DBOS are taken in: finished ones stay, unfinished ones go on where they were.

`runs_of_dbos.sql` is the dump of a database that such a build wrote: `run-done` has children in two rounds,
one of which failed; `run-interrupted` was stopped in the second step of its child `slow`; `run-fills` in its
second step; `run-queued` had not begun; `run-cancelled` was cancelled in its second step.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agentic_flow.core.errors import Conflict, ProviderFailed
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import Leases, RunDatabase
from agentic_flow.swarm.locks import hold_lock, lock_path
from agentic_flow.swarm.reader import RunReader

DUMP = Path(__file__).with_name("runs_of_dbos.sql")
LEASE_S = 5.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of the older build."""
    (tmp_path / "runs").mkdir()
    with closing(sqlite3.connect(tmp_path / "runs" / "runs.db")) as connection:
        connection.executescript(DUMP.read_text("utf-8"))
    return tmp_path


def tables_with(folder: Path, word: str) -> set[str]:
    """Tables in which it occurs."""
    found: set[str] = set()
    with closing(sqlite3.connect(folder / "runs" / "runs.db")) as connection:
        names = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        for name in names:
            rows = connection.execute(f"SELECT * FROM {name}").fetchall()
            if any(word in str(row) for row in rows):
                found.add(name)
    return found


def register(engine: SqlRunEngine, executed: list[str]) -> None:
    """The workflows that the dump is of, with steps that tell when they run."""

    async def note(step: StepContext) -> JsonObject:
        executed.append(step.idempotency_key)
        return {"key": step.idempotency_key}

    async def leaf(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def second(step: StepContext) -> JsonObject:
            if payload.get("fails"):
                raise ProviderFailed("no", hint="retry")
            return await note(step)

        return {"first": await context.step("first", note), "second": await context.step("second", second)}

    async def team(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        planned = await context.step("plan", note)
        early = await context.children("leaf", {"ok": {}, "bad": {"fails": True}})
        late = await context.children("leaf", {"quick": {}, "slow": {"holds": payload["holds"]}})
        merged = await context.step("merge", note)
        return {"planned": planned, "early": early, "late": late, "merged": merged}

    engine.register("leaf", leaf)
    engine.register("team", team)


def test_older_runs_are_shown(folder: Path) -> None:
    """Catches an upgrade after which finished runs are gone, or have other results, steps or owners."""
    reader = RunReader(None, folder, lease_s=LEASE_S)
    teams = reader.list_workflows("a", name="team")
    assert [(run.workflow_id, run.state) for run in teams] == [
        ("run-interrupted", "interrupted"),
        ("run-done", "completed"),
    ]
    done = teams[1]
    assert done.payload == {"holds": False}
    assert done.output is not None
    assert done.output["late"]["slow"] == {
        "first": {"key": "run-done.slow:1"},
        "second": {"key": "run-done.slow:2"},
    }
    assert done.output["early"]["bad"]["error"]["code"] == "provider_failed"
    assert done.created_at_s == pytest.approx(1795980550.15, abs=0.01)
    steps = {(step.workflow_id, step.index): step for step in reader.steps("run-done")}
    assert len(steps) == 10
    assert steps["run-done", 10].name == "merge"
    assert (steps["run-done.bad", 2].error or {})["hint"] == "retry"
    failed = reader.get("run-failed")
    assert failed is not None
    assert (failed.state, (failed.error or {})["code"]) == ("failed", "provider_failed")
    states = {run.workflow_id: run.state for run in reader.list_workflows("b", name="leaf")}
    assert states == {"run-cancelled": "cancelled", "run-fills": "interrupted"}
    child = reader.get("run-interrupted.slow")
    assert child is not None
    assert (child.name, child.tenant, child.state, child.payload) == (
        "leaf",
        "a",
        "interrupted",
        {"holds": True},
    )


def test_older_runs_go_on_where_they_were(folder: Path) -> None:
    """Catches a step of an older run that is paid twice, gets another key, or is taken for another one."""
    executed: list[str] = []

    async def main() -> None:
        engine = SqlRunEngine(None, folder, lease_s=LEASE_S, runs_parallel_max=1)
        register(engine, executed)
        async with engine.open():
            assert await engine.resume_interrupted() == ["run-interrupted", "run-fills", "run-queued"]
            interrupted = await engine.wait("run-interrupted")
            assert interrupted.state == "completed", interrupted
            done = await engine.get("run-done")
            assert done is not None
            said, expected = str(interrupted.output), str(done.output)
            assert said == expected.replace("run-done", "run-interrupted")
            for run in ("run-fills", "run-queued"):
                assert (await engine.wait(run)).state == "completed"
            assert await engine.resume("run-cancelled")
            assert (await engine.wait("run-cancelled")).state == "completed"

    asyncio.run(main())
    assert executed == [
        "run-interrupted.slow:2",
        "run-interrupted:10",
        "run-fills:2",
        "run-queued:1",
        "run-queued:2",
        "run-cancelled:2",
    ]


def test_nothing_of_a_tenant_stays_in_the_older_tables(folder: Path) -> None:
    """Catches an erased tenant whose payloads and results live on where nobody looks any more."""
    assert len(tables_with(folder, "run-done")) > 3
    database = RunDatabase(None, folder)
    database.create()
    assert tables_with(folder, "run-done") == {"af_workflows", "af_steps"}
    assert Leases(database, lease_s=LEASE_S).erase_tenant("a") == 4
    database.close()
    assert tables_with(folder, "run-done") == set()
    assert tables_with(folder, "run-cancelled") == {"af_workflows", "af_steps"}


def test_an_older_process_at_work_is_not_robbed(folder: Path) -> None:
    """Catches two builds that execute the same runs, each in tables of its own."""
    with closing(sqlite3.connect(folder / "runs" / "runs.db")) as connection:
        connection.execute("INSERT INTO af_executors VALUES ('old', 0)")
        connection.commit()
    descriptor = hold_lock(lock_path(folder / "runs" / "executors", "old"))
    database = RunDatabase(None, folder, pooled=False)
    with pytest.raises(Conflict, match="older build"):
        database.create()
    assert "workflow_status" in tables_with(folder, "run-done")
    closing_file = open(descriptor, "rb")  # noqa: SIM115 - closed at once, which gives the lock back
    closing_file.close()
    database.create()
    assert "workflow_status" not in tables_with(folder, "run-done")


def test_a_database_without_runs_is_taken_over(tmp_path: Path) -> None:
    """Catches a start that fails where the older build had made its tables and never executed anything."""
    (tmp_path / "runs").mkdir()
    with closing(sqlite3.connect(tmp_path / "runs" / "runs.db")) as connection:
        connection.execute("CREATE TABLE af_executors (executor_id TEXT PRIMARY KEY, heartbeat_at_s REAL)")
        connection.execute("CREATE TABLE af_leases (workflow_id TEXT PRIMARY KEY)")
        connection.commit()
    executed: list[str] = []

    async def main() -> None:
        engine = SqlRunEngine(None, tmp_path, lease_s=LEASE_S, runs_parallel_max=1)
        register(engine, executed)
        async with engine.open():
            await engine.start("leaf", "run-1", {}, tenant="a")
            assert (await engine.wait("run-1")).state == "completed"

    asyncio.run(main())
    assert executed == ["run-1:1", "run-1:2"]


def test_older_damage_is_told_not_hidden(folder: Path) -> None:
    """Catches a damaged row of the older build that stops the whole upgrade, or passes for a result."""
    with closing(sqlite3.connect(folder / "runs" / "runs.db")) as connection:
        connection.execute("UPDATE workflow_input SET inputs = '{' WHERE workflow_uuid = 'run-done'")
        connection.execute("UPDATE workflow_output SET error = 'x' WHERE workflow_uuid = 'run-failed'")
        connection.commit()
    reader = RunReader(None, folder, lease_s=LEASE_S)
    for run in ("run-done", "run-failed"):
        record = reader.get(run)
        assert record is not None
        assert (record.state, (record.error or {})["code"]) == ("failed", "data_corrupted")
