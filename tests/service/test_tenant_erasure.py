"""Erasing a tenant's runs: every row of every table, and nobody else's."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import DbosRunEngine
from agentic_flow.swarm.leases import Leases, RunDatabase

pytestmark = pytest.mark.anyio


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
    engine = DbosRunEngine(None, tmp_path, lease_s=5.0, runs_parallel_max=8)
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
