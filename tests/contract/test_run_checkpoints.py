"""What the run engine's store refuses, shares and survives; SQLite."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError, StorageFull, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import NewArtifact, StepContext, WorkflowContext
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.artifact_rows import artifact_row
from agentic_flow.swarm.checkpoints import Accept, Checkpoint, CheckpointWriter
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.event_log import events_of
from agentic_flow.swarm.leases import VERSION, Leases, RunDatabase
from agentic_flow.swarm.reader import RunReader
from agentic_flow.swarm.scheduling import TAKEOVERS_MAX, Fence

LEASE_S = 5.0
GIVES_UP_S = 3.0
"""A lease so long, too: a process that stands still for a moment looks dead after a shorter one."""
MINE = Fence("me", 1)


def row(workflow_id: str, parent: str | None = None) -> dict[str, Any]:
    """A workflow that runs."""
    return {
        "workflow_id": workflow_id,
        "root_id": workflow_id.partition(".")[0],
        "parent_id": parent,
        "parent_step": None if parent is None else 1,
        "name": "flow",
        "version": VERSION,
        "tenant": "t",
        "priority": 0,
        "status": "running",
        "epoch": 1,
        "executor_id": "" if parent else "me",
        "payload": "{}",
        "accepted_at_s": 1.0,
        "started_at_s": 1.0,
    }


def step(workflow_id: str, index: int, fence: Fence = MINE, *, name: str | None = "s") -> Checkpoint:
    values = {
        "workflow_id": workflow_id,
        "step_index": index,
        "name": name,
        "output": "{}",
        "error": None,
        "started_at_s": 1.0,
        "completed_at_s": 2.0,
    }
    return checkpoints.recorded_step(workflow_id.partition(".")[0], workflow_id, fence, values)


def end(workflow_id: str, fence: Fence = MINE, status: str = "completed") -> Checkpoint:
    root_id = workflow_id.partition(".")[0]
    return checkpoints.ended(root_id, workflow_id, fence, "flow", status, "{}", None, 3.0)


def recorded(database: RunDatabase) -> set[tuple[str, int]]:
    return {(str(r[0]), int(r[1])) for r in database.rows("SELECT workflow_id, step_index FROM af_steps")}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[RunDatabase]:
    made = RunDatabase(None, tmp_path)
    made.create()
    yield made
    made.close()  # from Python 3.13 on, connections that are only let go fail whichever test comes next


class Counting:
    """A run database that counts its transactions, and refuses as many as it is told to."""

    def __init__(self, database: RunDatabase) -> None:
        self._database = database
        self.transactions = 0
        self.refuses = 0
        self.refusal = Unavailable("gone", hint="wait")
        self.for_update = database.for_update
        self.is_sqlite = database.is_sqlite

    def transaction(self) -> Any:
        self.transactions += 1
        if self.refuses:
            self.refuses -= 1
            raise self.refusal
        return self._database.transaction()


@asynccontextmanager
async def writer_on(database: Any, patience_s: float = 30.0) -> AsyncIterator[CheckpointWriter]:
    writer = CheckpointWriter(database, patience_s=patience_s)
    try:
        yield writer
    finally:
        await writer.close()


async def test_workflows_share_a_transaction(database: RunDatabase) -> None:
    """Catches a commit for each of many workflows that record at the same time."""
    counting = Counting(database)
    async with writer_on(counting) as writer:
        accepted = await asyncio.gather(*(writer.submit(Accept(row(f"run-{n}"))) for n in range(50)))
        assert accepted == [True] * 50
        assert counting.transactions == 1
        answers = await asyncio.gather(*(writer.submit(step(f"run-{n}", 1)) for n in range(50)))
        assert answers == ["granted"] * 50
        assert counting.transactions == 2
    assert len(recorded(database)) == 50


async def test_what_is_refused_harms_nobody_else(database: RunDatabase) -> None:
    """Catches a fence that is ignored in a shared transaction, or that takes the others down with it."""
    for name in ("a", "b", "c", "d"):
        checkpoints.write(database, [Accept(row(name))])
    leases = Leases(database, lease_s=LEASE_S)
    assert leases.cancel("b")
    async with writer_on(database) as writer:
        answers = await asyncio.gather(
            writer.submit(step("a", 1)),
            writer.submit(step("b", 1)),
            writer.submit(step("c", 1, Fence("me", 2))),
            writer.submit(step("d", 1, Fence("you", 1))),
            writer.submit(step("nobody", 1)),
            writer.submit(step("c", 2)),
            writer.submit(Accept(row("a"))),
        )
    assert answers == ["granted", "cancelled", "lost", "lost", "lost", "granted", False]
    assert recorded(database) == {("a", 1), ("c", 2)}


async def test_nothing_is_recorded_after_the_end(database: RunDatabase) -> None:
    """Catches a step written over an end of the same transaction, and an end repeated as a failure."""
    checkpoints.write(database, [Accept(row("a"))])
    assert checkpoints.write(database, [end("a"), step("a", 1), end("a", status="failed"), end("a")]) == [
        "granted",
        "lost",
        "lost",
        "granted",
    ]
    assert recorded(database) == set()


async def test_one_that_cannot_be_written_fails_alone(database: RunDatabase) -> None:
    """Catches a value that the database refuses and that fails every workflow of its transaction."""
    checkpoints.write(database, [Accept(row("a")), Accept(row("b"))])
    async with writer_on(database) as writer:
        bad, good = writer.submit(step("a", 1, name=None)), writer.submit(step("b", 1))
        assert await good == "granted"
        with pytest.raises(AgenticFlowError):
            await bad
    assert recorded(database) == {("b", 1)}


async def test_an_absence_of_the_database_is_waited_for(database: RunDatabase) -> None:
    """Catches a run that fails because its database was away for a moment."""
    counting = Counting(database)
    counting.refuses = 2
    async with writer_on(counting) as writer:
        assert await writer.submit(Accept(row("a")))
        assert counting.transactions == 3


async def test_a_lost_answer_is_no_other_acceptance(database: RunDatabase) -> None:
    """Catches an acceptance, repeated after its answer was lost, that is told to be somebody else's."""
    assert checkpoints.write(database, [Accept(row("a"))]) == [True]
    assert checkpoints.write(database, [Accept(row("a"))], again=True) == [True]
    assert checkpoints.write(database, [Accept({**row("a"), "executor_id": "you"})], again=True) == [False]
    assert checkpoints.write(database, [Accept(row("a"))]) == [False]


async def test_closing_writes_what_was_handed_over(database: RunDatabase) -> None:
    """Catches checkpoints that a close leaves hanging or drops."""
    writer = CheckpointWriter(database, patience_s=LEASE_S)
    accepted = [writer.submit(Accept(row(f"run-{n}"))) for n in range(5)]
    await writer.close()
    assert [await one for one in accepted] == [True] * 5


operations = st.lists(
    st.one_of(
        st.builds(
            lambda n, i, e: step(f"run-{n}", i, Fence("me", e)),
            st.integers(0, 3),
            st.integers(1, 4),
            st.integers(1, 2),
        ),
        st.builds(
            lambda n, s: end(f"run-{n}", status=s),
            st.integers(0, 3),
            st.sampled_from(["completed", "failed"]),
        ),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(operations, st.integers(1, 12))
def test_how_transactions_are_cut_changes_nothing(every: list[Checkpoint], size: int) -> None:
    """Catches a decision that depends on what happens to share a transaction."""
    import tempfile

    found: list[tuple[Any, ...]] = []
    for batch in (1, size):
        with tempfile.TemporaryDirectory() as folder:
            database = RunDatabase(None, Path(folder))
            database.create()
            checkpoints.write(database, [Accept(row(f"run-{n}")) for n in range(3)])
            answers: list[Any] = []
            for start in range(0, len(every), batch):
                answers += checkpoints.write(database, every[start : start + batch])
            statuses = database.rows("SELECT workflow_id, status FROM af_workflows ORDER BY workflow_id")
            found.append((answers, statuses, recorded(database)))
            database.close()
    assert found[0] == found[1]


# ---- the engine on it -------------------------------------------------------------------------------------


def engine_in(folder: Path) -> SqlRunEngine:
    return SqlRunEngine(None, folder, lease_s=LEASE_S, runs_parallel_max=4)


async def test_a_full_disk_refuses_new_runs_at_once_and_keeps_what_others_did(database: RunDatabase) -> None:
    """Catches a client that hangs until its deadline, and a step that is lost, because the disk is full."""
    checkpoints.write(database, [Accept(row("old"))])
    counting = Counting(database)
    counting.refuses, counting.refusal = 3, StorageFull("full", hint="make room")
    async with writer_on(counting) as writer:
        answers = await asyncio.gather(
            writer.submit(Accept(row("new"))),
            writer.submit(step("old", 1)),
            writer.submit(Accept(row("newer"))),
            return_exceptions=True,
        )
        assert answers == [counting.refusal, "granted", counting.refusal]
        assert counting.transactions == 4
        counting.refuses = 1
        with pytest.raises(StorageFull):
            await writer.submit(Accept(row("new")))
        assert await writer.submit(Accept(row("new")))
    assert recorded(database) == {("old", 1)}


async def test_a_run_whose_store_fails_is_let_go_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run told to have failed, or hanging for ever, because a checkpoint could not be written."""
    begun, gate = asyncio.Event(), asyncio.Event()
    calls: list[str] = []

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def hold(step: StepContext) -> JsonObject:
            calls.append(step.idempotency_key)
            begun.set()
            await gate.wait()
            return {}

        return await context.step("hold", hold)

    def fails(*_: object, **__: object) -> Any:
        raise Unavailable("disk full", hint="make room")

    engine = SqlRunEngine(None, tmp_path, lease_s=GIVES_UP_S, runs_parallel_max=4)
    engine.register("flow", flow)
    async with engine.open():
        await engine.start("flow", "run-1", {}, tenant="t")
        await begun.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "write", fails)
            gate.set()
            async with asyncio.timeout(30):
                while (record := await engine.get("run-1")) is None or record.state != "interrupted":
                    await asyncio.sleep(0.02)
        assert await engine.resume("run-1")
        assert (await engine.wait("run-1")).state == "completed"
    assert calls == ["run-1:1", "run-1:1"]


@pytest.mark.parametrize("swallows", [False, True], ids=["raises-again", "returns"])
async def test_what_is_not_recorded_has_nothing_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swallows: bool
) -> None:
    """Catches a workflow that tidies up after a step that could not be recorded, on a disk with room again:
    it would fail for good, end without that step, or be refused when it is continued."""
    engine = SqlRunEngine(None, tmp_path, lease_s=GIVES_UP_S, runs_parallel_max=4)
    is_full = True
    written = checkpoints.write

    def full(database: RunDatabase, operations: Sequence[Any], **options: Any) -> Any:
        if is_full and any(isinstance(operation, Checkpoint) for operation in operations):
            raise StorageFull("disk full", hint="make room")
        return written(database, operations, **options)

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        nonlocal is_full

        async def work(step: StepContext) -> JsonObject:
            return {"key": step.idempotency_key}

        try:
            done = await context.step("work", work)
        except AgenticFlowError:
            is_full = False
            try:
                await context.step("tidy", work)
            except AgenticFlowError:
                if not swallows:
                    raise
            return {"work": None}
        return {"work": done, "tidy": await context.step("tidy", work)}

    engine.register("flow", flow)
    monkeypatch.setattr(checkpoints, "write", full)
    async with engine.open():
        await engine.start("flow", "run-1", {}, tenant="t")
        async with asyncio.timeout(30):
            while (record := await engine.get("run-1")) is None or record.state != "interrupted":
                await asyncio.sleep(0.02)
        assert not is_full
        assert await engine.resume("run-1")
        record = await engine.wait("run-1")
    assert (record.state, record.output) == (
        "completed",
        {"work": {"key": "run-1:1"}, "tidy": {"key": "run-1:2"}},
    )


async def test_a_child_cancelled_by_itself_stays_so(tmp_path: Path) -> None:
    """Catches a resumed run whose parent is told another result of a child than before."""
    held = asyncio.Event()

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def hold(step: StepContext) -> JsonObject:
            held.set()
            await asyncio.Event().wait()
            return {}

        return await context.step("hold", hold)

    asked = asyncio.Event()

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        results = await context.children("child", {"a": {}})

        async def after(step: StepContext) -> JsonObject:
            if not asked.is_set():
                asked.set()
                await asyncio.Event().wait()
            return results

        return await context.step("after", after)

    engine = engine_in(tmp_path)
    engine.register("child", child)
    engine.register("parent", parent)
    async with engine.open():
        await engine.start("parent", "run-1", {}, tenant="t")
        await held.wait()
        assert await engine.cancel("run-1.a")
        await asked.wait()
        assert await engine.cancel("run-1")
        assert await engine.resume("run-1")
        record = await engine.wait("run-1")
        assert record.output is not None
        assert record.output["a"]["error"]["code"] == "cancelled"


async def test_a_run_that_kills_every_process_is_left_alone(tmp_path: Path) -> None:
    """Catches a run that takes down process after process for ever, or cannot be asked for again."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    database = RunDatabase(None, tmp_path)
    database.create()
    checkpoints.write(database, [Accept(row("run-1"))])
    database.close()
    with closing(sqlite3.connect(tmp_path / "runs" / "runs.db")) as connection:
        connection.execute("UPDATE af_workflows SET takeovers = ?", (TAKEOVERS_MAX,))
        connection.commit()
    engine = engine_in(tmp_path)
    engine.register("flow", flow)
    async with engine.open():
        assert await engine.resume_interrupted() == []
        record = await engine.get("run-1")
        assert record is not None
        assert (record.state, (record.error or {})["code"]) == ("interrupted", "limit_exceeded")
        assert await engine.resume_interrupted() == []
        assert await engine.resume("run-1")
        assert (await engine.wait("run-1")).state == "completed"


async def test_a_thousand_queued_runs_wait_in_order(tmp_path: Path) -> None:
    """Catches a queue that loses runs, or lets tenants with a few wait behind one with thousands."""
    order: list[str] = []
    gate = asyncio.Event()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await gate.wait()
        order.append(context.workflow_id)
        return {}

    engine = SqlRunEngine(None, tmp_path, lease_s=30.0, runs_parallel_max=2)
    engine.register("flow", flow)
    async with engine.open():
        starts = [engine.start("flow", f"loud-{n:05}", {}, tenant="loud") for n in range(1000)]
        assert all(await asyncio.gather(*starts))
        assert await engine.start("flow", "quiet-1", {}, tenant="quiet")
        gate.set()
        await asyncio.gather(*(engine.wait(f"loud-{n:05}") for n in range(1000)), engine.wait("quiet-1"))
    assert [run for run in order if run != "quiet-1"] == sorted(run for run in order if run != "quiet-1")
    assert order.index("quiet-1") <= 4
    reader = RunReader(None, tmp_path, lease_s=LEASE_S)
    assert len(reader.list_workflows("loud", name="flow", states=["completed"], limit=2000)) == 1000


def told(database: RunDatabase, root_id: str = "a") -> list[tuple[int, str, str]]:
    with database.reading() as connection:
        return [(e.sequence, e.kind, e.agent) for e in events_of(connection, root_id, 0)]


async def test_a_repeated_transaction_tells_once(database: RunDatabase) -> None:
    """Catches an event written twice, or a number left out, when the answer to a commit was lost."""
    operations = [
        [Accept(row("a"))],
        [step("a", 1), checkpoints.new_children("a", "a", MINE, [row("a.x", "a")])],
        [step("a.x", 1), end("a.x"), step("a", 2)],
        [end("a")],
    ]
    for each in operations:
        first = checkpoints.write(database, each)
        assert checkpoints.write(database, each, again=True) == first or each is operations[2]
    assert told(database) == [
        (1, "accepted", ""),
        (2, "started", ""),
        (3, "step_finished", ""),
        (4, "child_started", "x"),
        (5, "step_finished", "x"),
        (6, "child_ended", "x"),
        (7, "step_finished", ""),
        (8, "ended", ""),
    ]


async def test_what_is_refused_is_not_told(database: RunDatabase) -> None:
    """Catches events of steps that a fence kept out of the store."""
    checkpoints.write(database, [Accept(row("a"))])
    checkpoints.write(database, [step("a", 1, Fence("you", 1)), step("a", 1), step("a", 2, Fence("me", 2))])
    assert told(database) == [(1, "accepted", ""), (2, "started", ""), (3, "step_finished", "")]


async def test_runs_without_a_log(database: RunDatabase, tmp_path: Path) -> None:
    """Catches runs of older builds that have no events, or others after they were cancelled."""
    checkpoints.write(database, [Accept(row("a"))])
    checkpoints.write(database, [checkpoints.new_children("a", "a", MINE, [row("a.x", "a")])])
    checkpoints.write(database, [step("a.x", 1), step("a.x", 2)])
    checkpoints.write(database, [end("a.x")])
    logged = told(database)
    with closing(sqlite3.connect(tmp_path / "runs" / "runs.db")) as connection:
        connection.execute("DROP TABLE af_events")
        connection.commit()
    reader = RunReader(None, tmp_path, lease_s=LEASE_S)
    assert [(e.sequence, e.kind, e.agent) for e in reader.events("a")] == logged
    database.create()
    assert [(e.sequence, e.kind, e.agent) for e in reader.events("a")] == logged
    assert Leases(database, lease_s=LEASE_S).cancel("a")
    assert told(database) == [*logged, (len(logged) + 1, "cancelled", "")]
    assert Leases(database, lease_s=LEASE_S).erase_tenant("t") == 1
    assert database.rows("SELECT * FROM af_events") == [], "events of an erased tenant are left"


def test_what_a_step_leaves_is_under_its_fence(database: RunDatabase) -> None:
    """Catches artifacts of a process that lost its run, of a cancelled one, or of a write that came twice."""
    for name in ("a", "b"):
        checkpoints.write(database, [Accept(row(name))])
    assert Leases(database, lease_s=LEASE_S).cancel("b")

    def leaving(workflow_id: str, index: int, fence: Fence = MINE) -> Checkpoint:
        plain = step(workflow_id, index, fence)
        left = artifact_row(workflow_id, plain.rows[0], NewArtifact("n", "text/plain", b"\0bytes"))
        return dataclasses.replace(plain, artifacts=(left,))

    writes = [leaving("a", 1), leaving("a", 2, Fence("me", 2)), leaving("a", 3, Fence("you", 1))]
    answers = checkpoints.write(database, [*writes, leaving("b", 1), leaving("nobody", 1)])
    assert answers == ["granted", "lost", "lost", "cancelled", "lost"]
    assert checkpoints.write(database, [leaving("a", 1), leaving("a", 4)], again=True) == ["granted"] * 2
    stored = database.rows("SELECT root_id, number, step_index, content FROM af_artifacts ORDER BY number")
    assert stored == [("a", 1, 1, b"\0bytes"), ("a", 2, 4, b"\0bytes")]


def test_an_erased_tenant_leaves_no_artifacts(database: RunDatabase) -> None:
    """Catches bytes of a tenant that outlive its erasure, or another's that go with them."""
    for tenant in ("t", "u"):
        checkpoints.write(database, [Accept(row(f"run-{tenant}") | {"tenant": tenant})])
        plain = step(f"run-{tenant}", 1)
        left = artifact_row(f"run-{tenant}", plain.rows[0], NewArtifact("n", "text/plain", tenant.encode()))
        assert checkpoints.write(database, [dataclasses.replace(plain, artifacts=(left,))]) == ["granted"]
    assert Leases(database, lease_s=LEASE_S).erase_tenant("t") == 1
    assert database.rows("SELECT root_id, content FROM af_artifacts") == [("run-u", b"u")]
