"""What a run engine must do beside processes of a newer build on the same database.

A test module gives a `VersionsCase` and runs every check of `VERSION_CHECKS` on it. What a newer build would
have done is written into the tables directly; what it would execute is given to an engine as workflows that
know more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agentic_flow.core.errors import NeedsNewer
from agentic_flow.core.messages import JsonObject, Record
from agentic_flow.core.ports import NewArtifact, RunEngine, StepContext, Workflow, WorkflowContext
from agentic_flow.core.sql import execute
from agentic_flow.swarm.leases import READER, RunDatabase
from agentic_flow.testing.run_engine_case import (
    TENANT,
    TIMEOUT_S,
    Journal,
    RunEngineCase,
    refused,
    state_of,
    until,
)

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_TABLES = (
    "af_executors",
    "af_workflows",
    "af_steps",
    "af_events",
    "af_inbox",
    "af_paused",
    "af_queued",
    "af_after",
    "af_artifacts",
    "af_starts",
    "af_serving",
    "af_schedules",
)
_KEPT = ("af_workflows", "af_steps", "af_artifacts")
"""Tables whose rows a retry copies."""


@dataclass
class VersionsCase:
    """A case of the contract, and its database as others see it."""

    case: RunEngineCase
    database: RunDatabase

    def add_columns(self) -> None:
        """What a newer build does at its start."""
        for table in _TABLES:
            for column, kind in (("newer_note", "TEXT"), ("newer_count", "INTEGER NOT NULL DEFAULT 7")):
                with self.database.transaction() as connection:
                    if column not in self.database.columns(connection, table):
                        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")

    def write(self, statement: str, **bindings: object) -> int:
        """Change rows as a newer build would; how many."""
        with self.database.transaction() as connection:
            return execute(connection, statement, **bindings).rowcount


class _Known(Record):
    """A payload as the older build knows it."""

    n: int


def _reading(journal: Journal, name: str) -> Workflow:
    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        known = _Known.from_record(payload)
        await context.step("s", journal.note(name))
        return known.model_dump(mode="json")

    return flow


def _newer(journal: Journal, name: str) -> Workflow:
    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("s", journal.note(name))
        return payload

    return flow


async def _ended(engine: RunEngine, run: str, state: str = "completed") -> JsonObject:
    async with asyncio.timeout(TIMEOUT_S):
        record = await engine.wait(run)
    assert record.state == state, record
    return record.output or {}


async def works_while_columns_are_added(versions: VersionsCase) -> None:
    """A statement that names no columns, or reads all of them, and so breaks when a newer build adds one; and
    a copy of a run that leaves out what a newer build has stored with it."""
    case, journal = versions.case, Journal()

    async def leave(step: StepContext) -> JsonObject:
        step.artifacts.append(NewArtifact("a.txt", "text/plain", b"left"))
        return {}

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("below", journal.note("below"))

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("hold", journal.hold("hold"))
        await context.step("leave", leave)
        await context.children(case.id("child"), {"one": {}})
        await context.receive("go")
        return await context.step("last", journal.note("last"))

    async with case.engine(True, flow=flow, child=child) as engine:
        run, late = case.id("run"), case.id("late")
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await journal.begun.wait()
        await asyncio.to_thread(versions.add_columns)
        journal.gate.set()
        await engine.start(case.id("flow"), late, {}, tenant=TENANT, after=(run,))
        for each in (run, late):
            await engine.send(each, "go", {}, key="k")
        assert await engine.pause(late)
        await _ended(engine, run)
        assert await engine.unpause(late)
        await _ended(engine, late)
        for table in _KEPT:
            of = f"workflow_id = :run OR workflow_id LIKE '{run}.%'"
            assert versions.write(
                f"UPDATE {table} SET newer_note = 'kept', newer_count = 8 WHERE {of}", run=run
            )
        again = case.id("again")
        # The message is in the part that is copied.
        assert await engine.retry(run, again, {}, from_step="last")
        await _ended(engine, again)
        for table in _KEPT:
            rows = versions.database.rows(
                f"SELECT newer_note, newer_count FROM {table} WHERE workflow_id LIKE '{again}%' "
                f"AND workflow_id <> '{again}' OR workflow_id = '{again}' AND '{table}' <> 'af_workflows'"
            )
            assert ("kept", 8) in [tuple(row) for row in rows], (table, rows)
        async with case.worker(flow=_newer(journal, "queued")):
            queued = case.id("queued")
            await engine.start(case.id("flow"), queued, {}, tenant=TENANT, queue=case.id("queue"))
            await _ended(engine, queued)
    journal.gate.set()


async def keeps_what_it_does_not_know(versions: VersionsCase) -> None:
    """A record with more in it than this build knows that is refused, or written back without it."""
    case, journal = versions.case, Journal()
    async with case.engine(flow=_reading(journal, "older")) as engine:
        run = case.id("run")
        await engine.start(case.id("flow"), run, {"n": 1, "later": {"x": [1]}}, tenant=TENANT)
        assert await _ended(engine, run) == {"n": 1, "later": {"x": [1]}}


async def hands_back_to_its_queue(versions: VersionsCase) -> None:
    """A run that this build cannot read and that it fails, keeps, or takes again and again; and a build that
    takes nothing else after it."""
    case, journal = versions.case, Journal()
    async with case.worker(1, flow=_reading(journal, "older")) as older:
        run, other = case.id("run"), case.id("other")
        for each, payload in ((run, {"n": "one"}), (other, {"n": 1})):
            await older.start(case.id("flow"), each, payload, tenant=TENANT, queue=case.id("queue"))
        await _ended(older, other)

        async def is_back() -> bool:
            return "handed_back" in [event.kind for event in await older.events(run)]

        await until(is_back)
        assert await state_of(older, run) == "queued"
        assert journal.calls == ["older"]
        async with case.worker(1, flow=_newer(journal, "newer")) as newer:
            assert await _ended(newer, run) == {"n": "one"}
        events = await older.events(run)
    backs = [event for event in events if event.kind == "handed_back"]
    assert len(backs) == 1, "it was taken again"
    assert "'_Known'" in backs[0].data["text"]
    assert "failed" not in [event.data.get("state") for event in events]
    assert journal.calls == ["older", "newer"]


async def hands_on_what_it_took_over(versions: VersionsCase) -> None:
    """The same of a run without a queue, which another process has begun: it must go on where it was."""
    case, journal = versions.case, Journal()

    async def begun(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("s", journal.note("newer"))
        return await context.step("hold", journal.hold("hold"))

    run = case.id("run")
    async with case.engine(flow=begun) as newer:
        await newer.start(case.id("flow"), run, {"n": {}}, tenant=TENANT)
        await journal.begun.wait()
    async with case.engine(True, flow=_reading(journal, "older")) as older:

        async def is_back() -> bool:
            return "handed_back" in [event.kind for event in await older.events(run)]

        await until(is_back)
        assert await state_of(older, run) == "interrupted"
        assert run not in await older.resume_interrupted(), "it was refused"
        journal.gate.set()
        async with case.engine(True, flow=begun) as newer:
            await _ended(newer, run)
    assert journal.calls == ["newer", "hold", "hold"]


async def tells_who_waits_alone(versions: VersionsCase) -> None:
    """A caller that waits for ever for a run which its own process, the only one, cannot read."""
    case = versions.case
    async with case.engine(flow=_reading(Journal(), "older")) as engine, asyncio.timeout(TIMEOUT_S):
        run = case.id("run")
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await refused(engine.wait(run), NeedsNewer)
        assert await engine.cancel(run)


async def leaves_unknown_children_to_others(versions: VersionsCase) -> None:
    """A run of which a newer build has begun a child that this one does not know, failed for it."""
    case, journal = versions.case, Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.children(case.id("child"), {"one": {}})

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("hold", journal.hold("hold"))

    run = case.id("run")
    async with case.engine(flow=flow, child=child) as newer:
        await newer.start(case.id("flow"), run, {}, tenant=TENANT)
        await journal.begun.wait()
    async with case.engine(True, flow=flow) as older:

        async def is_back() -> bool:
            return "handed_back" in [event.kind for event in await older.events(run)]

        await until(is_back)
        journal.gate.set()
        async with case.engine(True, flow=flow, child=child) as newer:
            assert list(await _ended(newer, run)) == ["one"]


async def leaves_newer_runs_alone(versions: VersionsCase) -> None:
    """A run that says it needs a newer build and is taken, resumed or retried all the same."""
    case, journal = versions.case, Journal()
    async with case.engine(flow=_newer(journal, "older")) as engine:
        waiting, ended = case.id("waiting"), case.id("ended")
        await engine.start(case.id("flow"), ended, {}, tenant=TENANT)
        await _ended(engine, ended)
        await engine.start(case.id("flow"), waiting, {}, tenant=TENANT, queue=case.id("queue"))
        for table, key in (("af_workflows", "workflow_id"), ("af_queued", "root_id")):
            versions.write(f"UPDATE {table} SET version = 'runs-2' WHERE {key} IN :ids", ids=[waiting, ended])
        await refused(engine.retry(ended, case.id("again"), {}, from_step="s"), NeedsNewer)
        async with case.worker(flow=_newer(journal, "older")) as worker:
            next_one = case.id("next")
            await engine.start(case.id("flow"), next_one, {}, tenant=TENANT, queue=case.id("queue"))
            await _ended(worker, next_one)
            assert await state_of(worker, waiting) == "queued"
            versions.write("UPDATE af_workflows SET executor_id = '' WHERE workflow_id = :id", id=waiting)
            assert waiting not in await worker.resume_interrupted()
            await refused(worker.resume(waiting), NeedsNewer)
            assert await worker.cancel(waiting), "to give it up needs no newer build"
    assert journal.calls == ["older", "older"]


async def refuses_a_newer_form(versions: VersionsCase) -> None:
    """A database that a newer build has changed past this one's understanding, and that it works on."""
    case = versions.case
    async with case.engine() as engine:
        await engine.health()
    versions.write("CREATE TABLE af_form (reader_min INTEGER NOT NULL)")
    try:
        versions.write("INSERT INTO af_form (reader_min) VALUES (:n)", n=READER)
        async with case.engine() as engine:
            await engine.health()
        versions.write("UPDATE af_form SET reader_min = :n", n=READER + 1)
        await refused(_open(case), NeedsNewer)
        await refused(case.make().get("run"), NeedsNewer)
    finally:
        versions.write("DROP TABLE af_form")


async def _open(case: RunEngineCase) -> None:
    async with case.engine():
        pass


VERSION_CHECKS: tuple[Callable[[VersionsCase], Awaitable[None]], ...] = (
    works_while_columns_are_added,
    keeps_what_it_does_not_know,
    hands_back_to_its_queue,
    hands_on_what_it_took_over,
    tells_who_waits_alone,
    leaves_unknown_children_to_others,
    leaves_newer_runs_alone,
    refuses_a_newer_form,
)
