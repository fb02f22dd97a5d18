"""What every `RunEngine` must do with messages to its workflows, and with what waits for them.

Part of `run_engine_contract`: its CHECKS include these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from agentic_flow.core.errors import Conflict, DeadlineExceeded, InvalidInput, NotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunEngine, WorkflowContext
from agentic_flow.testing.run_engine_case import (
    TENANT,
    TIMEOUT_S,
    Journal,
    RunEngineCase,
    WrongClock,
    refused,
    state_of,
    until,
)


async def has_step(engine: RunEngine, workflow_id: str, name: str) -> bool:
    return any(step.name == name for step in await engine.steps(workflow_id))


async def ended_as(engine: RunEngine, workflow_id: str) -> JsonObject:
    """What the workflow, which must complete, has returned."""
    async with asyncio.timeout(TIMEOUT_S):
        record = await engine.wait(workflow_id)
    assert record.state == "completed", record
    assert record.output is not None
    return record.output


async def two_messages(context: WorkflowContext, payload: JsonObject) -> JsonObject:
    return {"got": [await context.receive("news"), await context.receive("news")]}


async def delivers_messages_in_order(case: RunEngineCase) -> None:
    """Messages come once each, oldest first, by topic; a repeat does nothing, what is wrong is refused."""
    run, reader = case.id("run"), case.make()
    async with case.engine(flow=two_messages) as engine:
        await refused(engine.send(run, "news", {}, key="k"), NotFound)
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        assert await engine.send(run, "other", {"n": 0}, key="b", sender="me")
        assert await engine.send(run, "news", {"n": 1}, key="b", sender="me")
        assert not await engine.send(run, "news", {"n": 1}, key="b", sender="you")
        await refused(engine.send(run, "news", {"n": 2}, key="b"), Conflict)
        await refused(engine.send(f"{run}.child", "news", {}, key="k"), NotFound)
        await refused(engine.send(run, "", {}, key="k"), InvalidInput)
        await refused(engine.send(run, "news", {}, key="nul\0"), InvalidInput)
        await refused(engine.send(run, "late", {}, key="k", before_s=1.0), DeadlineExceeded)
        assert await state_of(engine, run) == "running"
        assert await reader.send(run, "news", {"n": 2}, key="a", sender="me")
        assert await ended_as(engine, run) == {"got": [{"n": 1}, {"n": 2}]}
        await refused(engine.send(run, "news", {}, key="c"), Conflict)
        assert not await engine.send(run, "news", {"n": 2}, key="a"), "a repeat after the end is a repeat"
        sent = [(m.topic, m.key, m.payload, m.sender) for m in await reader.messages(run)]
        assert sent == [
            ("other", "b", {"n": 0}, "me"),
            ("news", "b", {"n": 1}, "me"),
            ("news", "a", {"n": 2}, "me"),
        ]
        told = [(e.name, e.data["key"]) for e in await engine.events(run) if e.kind == "message"]
        assert told == [("other", "b"), ("news", "b"), ("news", "a")]


async def takes_one_message_of_many_senders(case: RunEngineCase) -> None:
    """Of many who send with one key at once exactly one is told that it did; the message is there once."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.receive("news")

    run = case.id("run")
    async with case.engine(flow=flow) as engine, case.engine() as other:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "wait:news"))
        sends = [one.send(run, "news", {"n": 1}, key="k") for one in (engine, other) for _ in range(4)]
        assert sorted(await asyncio.gather(*sends)) == [False] * 7 + [True]
        assert await ended_as(engine, run) == {"n": 1}
        assert len(await engine.messages(run)) == 1


async def waits_through_restarts(case: RunEngineCase) -> None:
    """A wait goes on in another process: with a message of the time between, and with its first deadline."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        first = await context.receive("news")
        return {"first": first, "second": await context.receive("news", timeout_s=0.5, default={"n": 0})}

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "wait:news"))
    assert await case.make().send(run, "news", {"n": 1}, key="k")
    async with case.engine(flow=flow) as engine:
        assert await engine.resume_interrupted() == [run]
        await until(lambda: has_step(engine, run, "receive:news"))
        await until(lambda: _has_count(engine, run, "wait:news", 2))
    deadlines = [s.output for s in await case.make().steps(run) if s.name == "wait:news"]
    async with case.engine(flow=flow) as engine:
        await engine.resume_interrupted()
        assert await ended_as(engine, run) == {"first": {"n": 1}, "second": {"n": 0}}
        steps = await engine.steps(run)
        assert [s.output for s in steps if s.name == "wait:news"] == deadlines
        assert steps[-1].completed_at_s is not None
        until_s = (deadlines[1] or {})["until_s"]
        assert steps[-1].completed_at_s >= until_s, "it went on before its time was over"


async def keeps_to_accepted_answers(case: RunEngineCase) -> None:
    """An answer is refused, or what the run goes on with, whatever the clock of the run's process says."""
    clock = WrongClock()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        said = await context.ask("Go on?", timeout_s=20.0, default="no")
        await context.receive("end")
        return {"said": said["answer"]}

    run, other = case.id("run"), case.make()
    engine = case.make(clock=clock)
    engine.register(case.id("flow"), flow)
    async with engine.open():
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "question:q1"))
        asked = (await engine.steps(run))[0].output or {}
        clock.ahead_s = 1000.0
        with suppress(TimeoutError):  # where the store has a clock of its own it has time yet
            async with asyncio.timeout(2.0):
                await until(lambda: has_step(engine, run, "receive:answer:q1"))
        said = "yes"
        try:
            await other.send(
                run, "answer:q1", {"answer": "yes"}, key="answer", before_s=float(asked["until_s"])
            )
        except DeadlineExceeded:
            said = "no"
        await other.send(run, "end", {}, key="k")
        assert await ended_as(engine, run) == {"said": said}
        assert [m.key for m in await other.messages(run)] == ["answer"] * (said == "yes") + ["k"]


async def _has_count(engine: RunEngine, workflow_id: str, name: str, count: int) -> bool:
    return [step.name for step in await engine.steps(workflow_id)].count(name) == count


async def fails_without_a_message(case: RunEngineCase) -> None:
    """When time is over and there is no default, the workflow is told, and the failure is its step's."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        try:
            return await context.receive("news", timeout_s=0.01)
        except DeadlineExceeded as error:
            return {"late": error.code}

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        assert await ended_as(engine, run) == {"late": "deadline_exceeded"}
        assert ((await engine.steps(run))[-1].error or {})["code"] == "deadline_exceeded"


async def waits_without_a_place(case: RunEngineCase) -> None:
    """A workflow that waits lets others run; woken, it goes before what has not begun, not beside."""
    held, order = Journal(), Journal()
    # Calls to the store have one thread: whatever is answered after the message was sent and another run was
    # accepted, the woken one has been answered before, and stands in the line when the gate opens.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    async def waits(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.receive("news")
        await context.step("after", order.note("woken"))
        return {}

    async def holds(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", held.hold("held"))

    async def plain(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("plain", order.note(str(payload["name"])))

    run = case.id("waits")
    async with case.engine(False, 1, waits=waits, holds=holds, plain=plain) as engine:
        await engine.start(case.id("waits"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "wait:news"))
        await engine.start(case.id("plain"), case.id("before"), {"name": "before"}, tenant=TENANT)
        await ended_as(engine, case.id("before"))
        await engine.start(case.id("holds"), case.id("holds"), {}, tenant=TENANT)
        await held.begun.wait()
        await engine.start(case.id("plain"), case.id("queued"), {"name": "queued"}, tenant=TENANT)
        await engine.send(run, "news", {}, key="k")
        await engine.start(case.id("plain"), case.id("last"), {"name": "last"}, tenant=TENANT)
        assert order.calls == ["before"]
        assert not await has_step(engine, run, "receive:news"), "it went on without a place"
        held.gate.set()
        for name in ("waits", "queued", "last"):
            await ended_as(engine, case.id(name))
        assert order.calls == ["before", "woken", "queued", "last"]


async def keeps_its_place_while_a_child_works(case: RunEngineCase) -> None:
    """A tree gives its place back only when nothing of it works; both children then go on with one place."""
    held = Journal()

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.children(case.id("child"), {"waits": {}, "works": {"works": True}})

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        if payload:
            await context.step("held", held.hold("held"))
        return await context.receive("news")

    async def plain(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    run = case.id("run")
    async with case.engine(False, 1, parent=parent, child=child, plain=plain) as engine:
        await engine.start(case.id("parent"), run, {}, tenant=TENANT)
        await held.begun.wait()
        await until(lambda: has_step(engine, run, "wait:news"))
        await engine.start(case.id("plain"), case.id("plain"), {}, tenant=TENANT)
        assert await state_of(engine, case.id("plain")) == "queued"
        held.gate.set()
        await ended_as(engine, case.id("plain"))
        assert await state_of(engine, run) == "running"
        await engine.send(run, "news", {"n": 1}, key="k")
        assert await ended_as(engine, run) == {"waits": {"n": 1}, "works": {"n": 1}}
        await engine.start(case.id("plain"), case.id("after"), {}, tenant=TENANT)
        await ended_as(engine, case.id("after"))


async def cancels_what_waits(case: RunEngineCase) -> None:
    """A workflow that waits is cancelled at once, leaves its place to others, and waits on when resumed."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.receive("news")

    run = case.id("run")
    async with case.engine(False, 1, flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "wait:news"))
        assert await engine.cancel(run)
        assert (await engine.wait(run)).state == "cancelled"
        await refused(engine.send(run, "news", {}, key="k"), Conflict)
        assert await engine.resume(run)
        assert await engine.send(run, "news", {"n": 1}, key="k")
        assert await ended_as(engine, run) == {"n": 1}
        await engine.start(case.id("flow"), case.id("other"), {}, tenant=TENANT)
        await engine.send(case.id("other"), "news", {"n": 2}, key="k")
        assert await ended_as(engine, case.id("other")) == {"n": 2}


async def asks_and_is_answered(case: RunEngineCase) -> None:
    """A question is an event and a step; its answer, or its default, is what the workflow goes on with."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        first = await context.ask("Ship it?", options=["yes", "no"])
        late = await context.ask("Why?", timeout_s=0.01, default="because")
        try:
            await context.ask("What?", options=["a"], default="b")
        except InvalidInput:
            return {"first": first, "late": late}
        return {}

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "question:q1"))
        assert await engine.send(run, "answer:q1", {"answer": "no"}, key="answer", sender="ann")
        assert await ended_as(engine, run) == {
            "first": {"answer": "no", "by": "ann", "timed_out": False},
            "late": {"answer": "because", "by": None, "timed_out": True},
        }
        asked = [e.data for e in await engine.events(run) if e.kind == "question"]
        assert [(q["id"], q["text"], q["options"]) for q in asked] == [
            ("q1", "Ship it?", ["yes", "no"]),
            ("q3", "Why?", []),
        ]
        assert asked[0]["until_s"] is None
        assert asked[1]["until_s"] is not None


async def pauses_before_the_next_step(case: RunEngineCase) -> None:
    """A pause lets the steps under way end and begins no other, needs no place, and tells who did it."""
    held, order = Journal(), Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("held", held.hold("held"))
        await context.step("two", order.note("two"))
        return await context.children(case.id("child"), {"c": {}})

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("three", order.note("three"))

    async def plain(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("plain", order.note("plain"))

    run = case.id("run")
    async with case.engine(False, 1, flow=flow, child=child, plain=plain) as engine:
        await refused(engine.pause(run), NotFound)
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await held.begun.wait()
        assert await engine.pause(run, by="ann")
        assert not await engine.pause(run)
        assert await state_of(engine, run) == "paused"
        held.gate.set()
        # With one place, that this one ends says that the paused one has given its own back.
        await engine.start(case.id("plain"), case.id("plain"), {}, tenant=TENANT)
        await ended_as(engine, case.id("plain"))
        assert [step.name for step in await engine.steps(run)] == ["held"]
        listed = await engine.list_workflows(TENANT, name=case.id("flow"), states=["paused"])
        assert [record.workflow_id for record in listed] == [run]
        assert await engine.list_workflows(TENANT, name=case.id("flow"), states=["running"]) == []
        assert await engine.unpause(run, by="bob")
        assert not await engine.unpause(run)
        await ended_as(engine, run)
        assert order.calls == ["plain", "two", "three"]
        assert not await engine.pause(run), "it has ended"
        told = [(e.kind, e.data["by"]) for e in await engine.events(run) if e.kind in ("paused", "unpaused")]
        assert told == [("paused", "ann"), ("unpaused", "bob")]


async def stays_paused_in_other_hands(case: RunEngineCase) -> None:
    """A pause from another process holds, and outlives the owner: who takes the workflow over holds it."""
    order = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.receive("news")
        return await context.step("after", order.note("after"))

    async def plain(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    run, elsewhere = case.id("run"), case.make()
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await until(lambda: has_step(engine, run, "wait:news"))
        assert await elsewhere.pause(run)
        assert await state_of(engine, run) == "paused"
    assert await state_of(elsewhere, run) == "interrupted"
    await elsewhere.send(run, "news", {}, key="k")
    async with case.engine(False, 1, flow=flow, plain=plain) as engine:
        assert await engine.resume_interrupted() == [run]
        await engine.start(case.id("plain"), case.id("plain"), {}, tenant=TENANT)
        await ended_as(engine, case.id("plain"))
        assert await state_of(engine, run) == "paused"
        assert not await has_step(engine, run, "receive:news")
        assert await elsewhere.unpause(run)
        await ended_as(engine, run)
    assert order.calls == ["after"]


async def cancels_what_is_paused(case: RunEngineCase) -> None:
    """A paused workflow can be cancelled, and does not keep others waiting."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.receive("news")
        return {}

    run = case.id("run")
    async with case.engine(False, 1, flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        assert await engine.pause(run)
        assert await engine.cancel(run)
        assert (await engine.wait(run)).state == "cancelled"
        await engine.start(case.id("flow"), case.id("other"), {}, tenant=TENANT)
        await engine.send(case.id("other"), "news", {}, key="k")
        await ended_as(engine, case.id("other"))


INBOX_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    delivers_messages_in_order,
    takes_one_message_of_many_senders,
    waits_through_restarts,
    fails_without_a_message,
    keeps_to_accepted_answers,
    waits_without_a_place,
    keeps_its_place_while_a_child_works,
    cancels_what_waits,
    asks_and_is_answered,
    pauses_before_the_next_step,
    stays_paused_in_other_hands,
    cancels_what_is_paused,
)
