"""What every `RunEngine` must do, whichever store it writes to.

A test module gives a `RunEngineCase` whose `make` returns an unopened engine on one and the same store at
each call, and runs every check of `CHECKS` on it. Checks leave no workflow running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agentic_flow.core.errors import (
    AgenticFlowError,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    ProviderFailed,
    StorageFull,
    Unavailable,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import EventRecord, StepContext, Workflow, WorkflowContext
from agentic_flow.testing.run_engine_after_contract import AFTER_CHECKS
from agentic_flow.testing.run_engine_artifacts_contract import ARTIFACT_CHECKS
from agentic_flow.testing.run_engine_case import (
    TENANT,
    TIMEOUT_S,
    Journal,
    RunEngineCase,
    refused,
    state_of,
    until,
)
from agentic_flow.testing.run_engine_inbox_contract import INBOX_CHECKS
from agentic_flow.testing.run_engine_queue_contract import QUEUE_CHECKS
from agentic_flow.testing.run_engine_retention_contract import RETENTION_CHECKS
from agentic_flow.testing.run_engine_retry_contract import RETRY_CHECKS


async def runs_and_records(case: RunEngineCase) -> None:
    """Results, steps and metadata come back as stored; live and stored values are the same JSON."""
    seen: list[JsonObject] = []
    journal = Journal()

    async def odd(step: StepContext) -> JsonObject:
        return {"pair": (1, 2), "$error": {"code": "conflict"}}

    async def marked(step: StepContext) -> JsonObject:
        return {"$error": {"code": "conflict"}}

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        assert context.workflow_id == case.id("one")
        seen.append(payload)
        seen.append(await context.step("odd", odd))
        seen.append(await context.step("marked", marked))
        await context.step("plain", journal.note("plain"))
        return {"answer": 42, "pair": (1, 2)}

    async with case.engine(flow=flow) as engine:
        assert await engine.start(case.id("flow"), case.id("one"), {"in": (1, 2)}, tenant=TENANT)
        record = await engine.wait(case.id("one"))
        assert (record.state, record.output, record.error) == (
            "completed",
            {"answer": 42, "pair": [1, 2]},
            None,
        )
        assert (record.name, record.tenant, record.payload) == (case.id("flow"), TENANT, {"in": [1, 2]})
        assert record.created_at_s <= record.updated_at_s
        steps = await engine.steps(case.id("one"))
        assert [step.name for step in steps] == ["odd", "marked", "plain"]
        assert seen == [{"in": [1, 2]}, steps[0].output, steps[1].output]
        assert steps[0].output == {"pair": [1, 2], "$error": {"code": "conflict"}}
        assert steps[1].output == {"$error": {"code": "conflict"}}
        assert len({step.index for step in steps}) == 3
        assert journal.keys == [f"{case.id('one')}:{steps[2].index}"]
        assert await engine.get(case.id("one")) == record


async def accepts_an_id_once(case: RunEngineCase) -> None:
    """Of many starts with one id exactly one is told so, and it runs once."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("s", journal.note("s"))

    async with case.engine(flow=flow) as engine:
        starts = [engine.start(case.id("flow"), case.id("one"), {}, tenant=TENANT) for _ in range(8)]
        assert sorted(await asyncio.gather(*starts)) == [False] * 7 + [True]
        await engine.wait(case.id("one"))
        assert not await engine.start(case.id("flow"), case.id("one"), {}, tenant=TENANT)
        assert journal.calls == ["s"]


async def keeps_accepting_when_the_caller_leaves(case: RunEngineCase) -> None:
    """A start whose caller is cancelled at any moment leaves a workflow that runs, or none at all."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    async with case.engine(flow=flow) as engine:
        for turns in range(40):
            workflow_id = case.id(f"left-{turns}")
            start = asyncio.ensure_future(engine.start(case.id("flow"), workflow_id, {}, tenant=TENANT))
            for _ in range(turns):
                await asyncio.sleep(0.001)
            start.cancel()
            await asyncio.wait([start])
            if not await engine.start(case.id("flow"), workflow_id, {}, tenant=TENANT):
                assert await engine.get(workflow_id) is not None
            async with asyncio.timeout(TIMEOUT_S):
                assert (await engine.wait(workflow_id)).state == "completed"


async def fails_truthfully(case: RunEngineCase) -> None:
    """Errors on purpose keep code, hint and details; a bug fails the workflow with code `internal`."""

    async def on_purpose(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        raise DeadlineExceeded("too slow: 'x'", hint="wait", retry_after_s=2.0, details={"a": 1})

    async def bug(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {"never": 1 // int(payload["zero"])}

    async def step_bug(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def divide(step: StepContext) -> JsonObject:
            return {"never": 1 // int(payload["zero"])}

        return await context.step("divide", divide)

    async def not_json(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def returns_object(step: StepContext) -> JsonObject:
            return {"object": object()}

        return await context.step("object", returns_object)

    async def cancelled_inside(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def awaits_what_is_cancelled(step: StepContext) -> JsonObject:
            future: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
            future.cancel()
            return await future

        return await context.step("stray", awaits_what_is_cancelled)

    async def two_at_once(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        journal = Journal()
        await asyncio.gather(*(context.step(name, journal.note(name)) for name in ("a", "b")))
        return {}

    flows = {
        "bug": bug,
        "step_bug": step_bug,
        "not_json": not_json,
        "cancelled_inside": cancelled_inside,
        "two_at_once": two_at_once,
    }
    async with case.engine(on_purpose=on_purpose, **flows) as engine:
        for name in ("on_purpose", *flows):
            await engine.start(case.id(name), case.id(f"run-{name}"), {"zero": 0}, tenant=TENANT)
        record = await engine.wait(case.id("run-on_purpose"))
        assert record.state == "failed"
        assert record.output is None
        assert record.error is not None
        kept = {key: record.error[key] for key in ("code", "detail", "hint", "retry_after_s", "details")}
        assert kept == {
            "code": "deadline_exceeded",
            "detail": "too slow: 'x'",
            "hint": "wait",
            "retry_after_s": 2.0,
            "details": {"a": 1},
        }
        for name in flows:
            async with asyncio.timeout(TIMEOUT_S):
                record = await engine.wait(case.id(f"run-{name}"))
            assert (record.state, (record.error or {}).get("code")) == ("failed", "internal"), name


async def waits_for_a_neighbour(case: RunEngineCase) -> None:
    """A step whose service is away, or has no room, is tried until that is over, and recorded once. No other
    error waits."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def asks(step: StepContext) -> JsonObject:
            journal.calls.append("asks")
            if len(journal.calls) < 4:
                away = [Unavailable("it broke off"), CircuitOpen("held back"), StorageFull("no room")]
                away[0].peer = away[1].peer = "platform"
                raise away[len(journal.calls) - 1]
            return {"answer": 1}

        async def is_refused(step: StepContext) -> JsonObject:
            journal.calls.append("is refused")
            raise Unavailable("somebody else is away")

        answer = await context.step("asks", asks)
        try:
            await context.step("is refused", is_refused)
        except Unavailable:
            return answer
        raise AssertionError("the step did not fail")

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        async with asyncio.timeout(TIMEOUT_S):
            record = await engine.wait(run)
        assert (record.state, record.output) == ("completed", {"answer": 1})
        assert journal.calls == ["asks"] * 4 + ["is refused"]
        assert [(step.name, step.error is None) for step in await engine.steps(run)] == [
            ("asks", True),
            ("is refused", False),
        ]


async def resumes_where_it_was(case: RunEngineCase) -> None:
    """After an interruption recorded steps and errors are replayed; only the step in flight runs again."""
    first, second = Journal(), Journal()

    def flow_with(journal: Journal) -> Workflow:
        async def failing(step: StepContext) -> JsonObject:
            journal.calls.append("failing")
            raise ProviderFailed("503", hint="later", details={"status": 503})

        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            one = await context.step("one", journal.note("one"))
            caught: AgenticFlowError | None = None
            try:
                await context.step("failing", failing)
            except ProviderFailed as error:
                caught = error
            assert caught is not None
            held = await context.step("held", journal.hold("held"))
            return {"one": one, "caught": [caught.message, caught.hint, caught.details], "held": held}

        return flow

    run = case.id("run")
    async with case.engine(flow=flow_with(first)) as engine:
        await engine.start(case.id("flow"), run, {"p": 1}, tenant=TENANT)
        await first.begun.wait()
        assert await state_of(engine, run) == "running"
        assert not await engine.resume(run), "it is alive"
        assert await engine.resume_interrupted() == []
    assert await state_of(case.make(), run) == "interrupted"

    second.gate.set()
    async with case.engine(flow=flow_with(second)) as engine:
        assert await state_of(engine, run) == "interrupted"
        assert await engine.resume(run)
        record = await engine.wait(run)
        assert record.state == "completed"
        assert record.output == {
            "one": {"name": "one", "nth": 1},
            "caught": ["503", "later", {"status": 503}],
            "held": {"name": "held", "nth": 1},
        }
        assert not await engine.resume(run), "it has ended"
        errors = [step.error["code"] for step in await engine.steps(run) if step.error]
        assert errors == ["provider_failed"]
    assert first.calls == ["one", "failing", "held"]
    assert second.calls == ["held"]
    assert second.keys == [first.keys[-1]], "the key of a step must be the same at every attempt"


async def records_no_interruption(case: RunEngineCase) -> None:
    """A step that turns its interruption into an error of its own leaves no record, and runs again."""
    first, second = Journal(), Journal()
    second.gate.set()

    def flow_with(journal: Journal) -> Workflow:
        async def translates(step: StepContext) -> JsonObject:
            try:
                return await journal.hold("translates")(step)
            except asyncio.CancelledError as error:
                raise Unavailable("connection closed") from error

        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            return await context.step("translates", translates)

        return flow

    async with case.engine(flow=flow_with(first)) as engine:
        await engine.start(case.id("flow"), case.id("run"), {}, tenant=TENANT)
        await first.begun.wait()
    assert await case.make().steps(case.id("run")) == []
    async with case.engine(flow=flow_with(second)) as engine:
        assert await engine.resume_interrupted() == [case.id("run")]
        assert (await engine.wait(case.id("run"))).state == "completed"


async def runs_children_in_parallel(case: RunEngineCase) -> None:
    """Children run at the same time under fixed ids, and one's failure is data for the parent."""
    meeting = asyncio.Barrier(3)

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def meet(step: StepContext) -> JsonObject:
            async with asyncio.timeout(TIMEOUT_S):
                await meeting.wait()
            if payload["fails"]:
                raise ProviderFailed("no", hint="retry")
            return {"id": context.workflow_id}

        return await context.step("meet", meet)

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        plans: dict[str, JsonObject] = {key: {"fails": key == "b"} for key in ("a", "b", "c")}
        return await context.children(case.id("child"), plans)

    run = case.id("run")
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)
        output = (await engine.wait(run)).output
        assert output is not None
        assert output["a"] == {"id": f"{run}.a"}
        assert output["c"] == {"id": f"{run}.c"}
        assert output["b"]["error"]["code"] == "provider_failed"
        assert output["b"]["error"]["hint"] == "retry"
        record = await engine.get(f"{run}.b")
        assert record is not None
        assert (record.state, record.name, record.tenant) == ("failed", case.id("child"), TENANT)
        assert {step.workflow_id for step in await engine.steps(run)} == {f"{run}.{key}" for key in "abc"}
        listed = await engine.list_workflows(TENANT, name=case.id("child"))
        assert listed == [], "children are not workflows of their own in lists"


async def resumes_a_tree(case: RunEngineCase) -> None:
    """On resume, finished children are not run again, and unfinished ones of every depth are."""
    first, second = Journal(), Journal()
    second.gate.set()

    def flows(journal: Journal) -> dict[str, Workflow]:
        async def leaf(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            name = str(payload["name"])
            return await context.step(name, journal.hold(name) if payload["holds"] else journal.note(name))

        async def branch(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            await context.step("branch", journal.note("branch"))
            return await context.children(
                case.id("leaf"),
                {"quick": {"name": "quick", "holds": False}, "slow": {"name": "slow", "holds": True}},
            )

        async def root(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            return await context.children(case.id("branch"), {"x": {}})

        return {"leaf": leaf, "branch": branch, "root": root}

    run = case.id("run")
    async with case.engine(**flows(first)) as engine:
        await engine.start(case.id("root"), run, {}, tenant=TENANT)
        await first.begun.wait()

        async def quick_is_done() -> bool:
            record = await engine.get(f"{run}.x.quick")
            return record is not None and record.state == "completed"

        await until(quick_is_done)
    async with case.engine(**flows(second)) as engine:
        assert await engine.resume(run)
        async with asyncio.timeout(TIMEOUT_S):
            output = (await engine.wait(run)).output
        assert output == {"x": {"quick": {"name": "quick", "nth": 1}, "slow": {"name": "slow", "nth": 1}}}
    assert sorted(first.calls) == ["branch", "quick", "slow"]
    assert second.calls == ["slow"]


async def cancels_and_continues(case: RunEngineCase) -> None:
    """Cancelling interrupts steps of the whole tree; a resume continues from what was recorded."""
    first = Journal()
    interrupted: list[str] = []

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def held(step: StepContext) -> JsonObject:
            try:
                return await first.hold("child")(step)
            except asyncio.CancelledError:
                interrupted.append(context.workflow_id)
                raise

        return await context.step("held", held)

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("before", first.note("before"))
        return await context.children(case.id("child"), {"a": {}, "b": {}})

    run = case.id("run")
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)

        async def both_run() -> bool:
            return first.calls.count("child") == 2

        await until(both_run)
        assert await engine.cancel(run)
        assert await state_of(engine, run) == "cancelled"
        assert (await engine.wait(run)).state == "cancelled"
        assert not await engine.cancel(run), "it has ended already"

        async def both_stopped() -> bool:
            return len(interrupted) == 2

        await until(both_stopped)
        assert {await state_of(engine, f"{run}.{key}") for key in "ab"} == {"cancelled"}
        first.gate.set()
        assert await engine.resume(run)
        record = await engine.wait(run)
        assert record.state == "completed", record
        assert first.calls.count("before") == 1
        assert first.calls.count("child") == 4


async def tells_of_a_cancelled_child(case: RunEngineCase) -> None:
    """A child cancelled by itself is an error in the parent's results; the parent and its siblings go on."""
    journal = Journal()

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold("held"))

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.children(case.id("child"), {"a": {}, "b": {}})

    run = case.id("run")
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)

        async def both_run() -> bool:
            return len(journal.calls) == 2

        await until(both_run)
        assert await engine.cancel(f"{run}.a")
        journal.gate.set()
        async with asyncio.timeout(TIMEOUT_S):
            record = await engine.wait(run)
        assert record.state == "completed"
        assert record.output is not None
        assert record.output["a"]["error"]["code"] == "cancelled"
        assert record.output["b"]["name"] == "held"


async def drops_children_it_gave_up_on(case: RunEngineCase) -> None:
    """A parent that stops waiting (its own timeout) and goes on leaves no child running."""
    journal = Journal()

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold("held"))

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        waiting = asyncio.ensure_future(context.children(case.id("child"), {"a": {}}))
        await journal.begun.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        await context.step("after", journal.note("after"))
        return {"gave": "up"}

    run = case.id("run")
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)
        assert (await engine.wait(run)).output == {"gave": "up"}
        assert await state_of(engine, f"{run}.a") == "cancelled"


async def refuses_a_child_twice(case: RunEngineCase) -> None:
    """A key of a child counts once: a second use is told at once, begins nothing, and breaks nothing else,
    also when the workflow is resumed behind it."""
    journal = Journal()

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("note", journal.note(context.workflow_id.rpartition(".")[2]))

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        name = case.id("child")
        await context.children(name, {"a": {}})
        try:
            await context.children(name, {"a": {}, "b": {}})
        except InvalidInput as error:
            refused = {"message": error.message, "hint": error.hint}
        else:
            raise AssertionError("the same key twice")
        await context.children(name, {"b": {}})
        await context.step("held", journal.hold("held"))
        return refused

    run = case.id("run")
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)
        await journal.begun.wait()
    journal.gate.set()
    async with case.engine(parent=parent, child=child) as engine:
        await engine.resume_interrupted()
        record = await engine.wait(run)
    assert (record.state, record.error) == ("completed", None)
    assert record.output is not None
    assert "['a']" in record.output["message"]
    assert "another key" in record.output["hint"]
    assert sorted(journal.calls) == ["a", "b", "held", "held"]


async def queues_in_order(case: RunEngineCase) -> None:
    """Beyond the limit workflows wait, visibly and durably, and start in the order of their acceptance."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        name = str(payload["name"])
        return await context.step(name, journal.hold(name) if name == "0" else journal.note(name))

    async with case.engine(False, 1, flow=flow) as engine:
        for name in "01234":
            await engine.start(case.id("flow"), case.id(name), {"name": name}, tenant=TENANT)
        await journal.begun.wait()
        assert [await state_of(engine, case.id(name)) for name in "0123"] == ["running", *["queued"] * 3]
        queued = await engine.list_workflows(TENANT, name=case.id("flow"), states=["queued"])
        assert [record.workflow_id for record in queued] == [case.id(name) for name in "4321"]
        assert await engine.cancel(case.id("2"))
        journal.gate.set()
        assert (await engine.wait(case.id("4"))).state == "completed"
        assert journal.calls == ["0", "1", "3", "4"]


async def keeps_what_is_queued(case: RunEngineCase) -> None:
    """What was queued when its process let go is interrupted, and is taken over with everything else."""
    first, second = Journal(), Journal()
    second.gate.set()

    def flow_with(journal: Journal) -> Workflow:
        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            return await context.step("held", journal.hold(str(payload["name"])))

        return flow

    async with case.engine(False, 1, flow=flow_with(first)) as engine:
        for name in "abc":
            await engine.start(case.id("flow"), case.id(name), {"name": name}, tenant=TENANT)
        await first.begun.wait()
    reader = case.make()
    assert {await state_of(reader, case.id(name)) for name in "abc"} == {"interrupted"}
    async with case.engine(False, 1, flow=flow_with(second)) as engine:
        assert await state_of(engine, case.id("a")) == "interrupted", "nothing is taken without being asked"
    async with case.engine(True, 1, flow=flow_with(second)) as engine:
        async with asyncio.timeout(TIMEOUT_S):
            for name in "abc":
                assert (await engine.wait(case.id(name))).state == "completed"
    assert second.calls == ["a", "b", "c"]


async def refuses_another_path(case: RunEngineCase) -> None:
    """A replay that asks for other steps than the recorded ones fails clearly, even if its code goes on."""
    first, second = Journal(), Journal()

    async def before(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("one", first.note("one"))
        return await context.step("held", first.hold("held"))

    async def after(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        try:
            await context.step("uno", second.note("uno"))
        except AgenticFlowError:
            second.calls.append("swallowed")
        return {"as if": "nothing happened"}

    async with case.engine(flow=before) as engine:
        await engine.start(case.id("flow"), case.id("run"), {}, tenant=TENANT)
        await first.begun.wait()
    async with case.engine(flow=after) as engine:
        await engine.resume(case.id("run"))
        record = await engine.wait(case.id("run"))
        assert record.state == "failed"
        assert record.error is not None
        assert record.error["code"] == "conflict"
        assert "'uno'" in record.error["detail"] or "uno" in record.error["detail"]
    assert second.calls == ["swallowed"]


async def lists_by_tenant(case: RunEngineCase) -> None:
    """Lists hold one tenant's workflows of one name, newest first, by state and limit."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        if payload["fails"]:
            raise Conflict("no")
        return {}

    mine, theirs = case.id("tenant-1"), case.id("tenant-2")
    async with case.engine(flow=flow, other=flow) as engine:
        for number in range(6):
            tenant = theirs if number == 5 else mine
            workflow = case.id("other" if number == 4 else "flow")
            payload = {"fails": number % 2 == 1}
            await engine.start(workflow, case.id(f"run{number}"), payload, tenant=tenant)
            await engine.wait(case.id(f"run{number}"))
        listed = await engine.list_workflows(mine, name=case.id("flow"))
        assert [record.workflow_id for record in listed] == [case.id(f"run{n}") for n in (3, 2, 1, 0)]
        failed = await engine.list_workflows(mine, name=case.id("flow"), states=["failed"])
        assert [record.workflow_id for record in failed] == [case.id("run3"), case.id("run1")]
        newest = await engine.list_workflows(mine, name=case.id("flow"), limit=1)
        assert [record.workflow_id for record in newest] == [case.id("run3")]
        assert await engine.list_workflows(mine, name=case.id("flow"), states=["running"]) == []


async def does_not_know_strangers(case: RunEngineCase) -> None:
    """Ids that nobody accepted are absent, not errors, and waiting for one does not hang."""
    async with case.engine() as engine:
        stranger = case.id("stranger")
        assert await engine.get(stranger) is None
        assert await engine.steps(stranger) == []
        assert not await engine.cancel(stranger)
        assert not await engine.resume(stranger)
        await refused(engine.wait(stranger), Unavailable)


async def opens_again_and_again(case: RunEngineCase) -> None:
    """One engine is opened once at a time, said clearly; after it is closed another or the same one opens."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    engine = case.make()
    engine.register(case.id("flow"), flow)
    await refused(engine.start(case.id("flow"), case.id("closed"), {}, tenant=TENANT), Unavailable)
    for turn in range(3):
        async with engine.open():
            await refused(engine.open().__aenter__(), Conflict)
            await engine.start(case.id("flow"), case.id(f"turn{turn}"), {}, tenant=TENANT)
            assert (await engine.wait(case.id(f"turn{turn}"))).state == "completed"
    async with case.engine(flow=flow) as other:
        assert await state_of(other, case.id("turn0")) == "completed"


async def works_beside_another(case: RunEngineCase) -> None:
    """Two engines in one process leave each other's workflows alone, as processes do, until one is gone."""
    journals = Journal(), Journal()

    def flow_with(journal: Journal) -> Workflow:
        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            return await context.step("held", journal.hold("held"))

        return flow

    run = case.id("run")
    async with case.engine(flow=flow_with(journals[0])) as other:
        async with case.engine(flow=flow_with(journals[1])) as owner:
            await owner.start(case.id("flow"), run, {}, tenant=TENANT)
            await journals[1].begun.wait()
            assert not await other.start(case.id("flow"), run, {}, tenant=TENANT)
            assert await state_of(other, run) == "running"
            assert not await other.resume(run)
            assert await other.resume_interrupted() == []
        journals[0].gate.set()
        assert await other.resume_interrupted() == [run]
        assert (await other.wait(run)).state == "completed"
    assert [journal.calls for journal in journals] == [["held"], ["held"]]


async def leaves_unknown_workflows_alone(case: RunEngineCase) -> None:
    """A process that lacks a workflow's code neither takes it over nor fails it."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold("held"))

    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), case.id("run"), {}, tenant=TENANT)
        await journal.begun.wait()
    async with case.engine() as engine:
        assert await engine.resume_interrupted() == []
        await refused(engine.resume(case.id("run")), Conflict)
        assert await state_of(engine, case.id("run")) == "interrupted"
    journal.gate.set()
    async with case.engine(flow=flow) as engine:
        assert await engine.resume_interrupted() == [case.id("run")]
        assert (await engine.wait(case.id("run"))).state == "completed"


async def tells_what_happened(case: RunEngineCase) -> None:
    """The event log of a tree has numbers without gaps, and a reader that goes on from any misses nothing."""

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        journal = Journal()
        for name in ("one", "two"):
            await context.step(name, journal.note(name))
        if payload["fails"]:
            raise Conflict("no", hint="yes")
        return {}

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("before", Journal().note("before"))
        return await context.children(case.id("child"), {f"c{n}": {"fails": n == 3} for n in range(12)})

    run = case.id("run")
    reader = case.make()
    seen: list[EventRecord] = []
    async with case.engine(parent=parent, child=child) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)
        async with asyncio.timeout(TIMEOUT_S):
            while not seen or seen[-1].kind != "ended":
                seen += await reader.events(run, after=len(seen))
        log = await engine.events(run)
    assert seen == log
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    assert [event.kind for event in log[:2]] == ["accepted", "started"]
    assert (log[2].kind, log[2].agent, log[2].name, log[2].data) == (
        "step_finished",
        "",
        "before",
        {"index": 1},
    )
    assert log[-1].data == {"state": "completed"}
    for number in range(12):
        mine = [event for event in log if event.agent == f"c{number}"]
        assert [event.kind for event in mine] == [
            "child_started",
            "step_finished",
            "step_finished",
            "child_ended",
        ]
        assert [event.name for event in mine[1:3]] == ["one", "two"]
        error = mine[-1].data.get("error", {})
        assert (mine[-1].data["state"], error.get("hint")) == (
            ("failed", "yes") if number == 3 else ("completed", None)
        )
    assert await reader.events(run, after=len(log)) == []
    assert await reader.events(case.id("stranger")) == []


async def tells_of_changes_of_hands(case: RunEngineCase) -> None:
    """Cancelling, resuming and taking over are events of the same numbering, whichever process does it."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold("held"))

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await journal.begun.wait()
    async with case.engine(flow=flow) as engine, case.engine() as other:
        assert await engine.resume_interrupted() == [run]
        assert await other.cancel(run)
        journal.gate.set()
        assert await engine.resume(run)
        await engine.wait(run)
        log = await other.events(run)
    kinds = [event.kind for event in log if event.kind != "started"]
    assert kinds == ["accepted", "taken_over", "cancelled", "taken_over", "step_finished", "ended"]
    assert [event.data["asked"] for event in log if event.kind == "taken_over"] == [False, True]
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))


CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    runs_and_records,
    accepts_an_id_once,
    keeps_accepting_when_the_caller_leaves,
    fails_truthfully,
    waits_for_a_neighbour,
    resumes_where_it_was,
    records_no_interruption,
    runs_children_in_parallel,
    resumes_a_tree,
    cancels_and_continues,
    tells_of_a_cancelled_child,
    drops_children_it_gave_up_on,
    refuses_a_child_twice,
    queues_in_order,
    keeps_what_is_queued,
    refuses_another_path,
    lists_by_tenant,
    does_not_know_strangers,
    opens_again_and_again,
    works_beside_another,
    leaves_unknown_workflows_alone,
    tells_what_happened,
    tells_of_changes_of_hands,
    *INBOX_CHECKS,
    *RETENTION_CHECKS,
    *ARTIFACT_CHECKS,
    *RETRY_CHECKS,
    *QUEUE_CHECKS,
    *AFTER_CHECKS,
)
