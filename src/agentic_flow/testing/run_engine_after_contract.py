"""What every `RunEngine` must do with runs that begin after others. Part of `run_engine_contract.CHECKS`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from agentic_flow.core.errors import NotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunEngine, Workflow, WorkflowContext, WorkflowRecord
from agentic_flow.testing.run_engine_case import (
    TENANT,
    TIMEOUT_S,
    Journal,
    RunEngineCase,
    refused,
    state_of,
    until,
)


def noting(journal: Journal) -> Workflow:
    """A workflow of one step that notes its run. With `hold` it waits for the gate, with `fail` it fails."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        step = journal.hold if payload.get("hold") else journal.note
        result = await context.step("s", step(context.workflow_id))
        if payload.get("fail"):
            raise NotFound("what it looks for is not there", hint="look elsewhere")
        return result

    return flow


async def _put(
    case: RunEngineCase,
    engine: RunEngine,
    name: str,
    payload: JsonObject | None = None,
    tenant: str = TENANT,
    **more: Any,
) -> str:
    run = case.id(name)
    put = await engine.start(case.id("flow"), run, payload or {}, tenant=tenant, **more)
    assert put, run
    return run


async def _ended(engine: RunEngine, run: str) -> WorkflowRecord:
    async with asyncio.timeout(TIMEOUT_S):
        return await engine.wait(run)


def _told(record: WorkflowRecord, run: str, state: str) -> None:
    """It has failed, and says because of which run."""
    assert record.state == "failed", record
    error = record.error or {}
    assert error["code"] == "conflict"
    assert repr(run) in error["detail"], error
    assert error["details"] == {"after": run, "state": state}


async def begins_after_all(case: RunEngineCase) -> None:
    """A run begins when the last of those before it has completed, and says what it waits for."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as engine:
        quick = await _put(case, engine, "quick")
        slow = await _put(case, engine, "slow", {"hold": True})
        after = await _put(case, engine, "after", after=[quick, slow])
        last = await _put(case, engine, "last", after=[after])
        await _ended(engine, quick)
        await _ended(engine, await _put(case, engine, "other", after=[quick]))  # it has what it waits for
        assert (await state_of(engine, after), await state_of(engine, last)) == ("queued", "queued")
        assert after not in journal.calls
        journal.gate.set()
        assert (await _ended(engine, last)).state == "completed"
        events = await engine.events(after)
        assert [event.kind for event in events] == ["accepted", "started", "step_finished", "ended"]
        assert slow in events[0].data["after"]
        assert events[1].at_s >= (await engine.events(slow))[-1].at_s
    assert journal.calls[-2:] == [after, last]


async def waits_without_a_place(case: RunEngineCase) -> None:
    """Runs that wait for others keep nobody from the only place."""
    journal = Journal()
    async with case.engine(False, 1, flow=noting(journal)) as engine:
        first = await _put(case, engine, "first", {"hold": True})
        waiting = [await _put(case, engine, f"waits-{n}", after=[first]) for n in range(3)]
        other = await _put(case, engine, "other")
        journal.gate.set()
        for run in (first, other, *waiting):
            assert (await _ended(engine, run)).state == "completed"
    assert sorted(journal.calls) == sorted([first, other, *waiting])


async def fails_after_what_fails(case: RunEngineCase) -> None:
    """A run fails with the reason, unexecuted, as do those after it; one that may follow any end begins."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as engine:
        bad = await _put(case, engine, "bad", {"hold": True, "fail": True})
        never = await _put(case, engine, "never", after=[bad])
        nor = await _put(case, engine, "nor", after=[never])
        still = await _put(case, engine, "still", after=[bad], after_any_end=True)
        journal.gate.set()
        _told(await _ended(engine, never), bad, "failed")
        _told(await _ended(engine, nor), never, "failed")
        assert (await _ended(engine, still)).state == "completed"
        assert [event.kind for event in await engine.events(never)] == ["accepted", "ended"]
        late = await _put(case, engine, "late", after=[bad])  # it had failed before
        _told(await _ended(engine, late), bad, "failed")
    assert journal.calls == [bad, still]


async def fails_after_what_is_cancelled(case: RunEngineCase) -> None:
    """To cancel a run fails those that wait for it; one that is cancelled while it waits waits on resumed."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as engine:
        first = await _put(case, engine, "first", {"hold": True})
        second = await _put(case, engine, "second", {"hold": True})
        never, waits = (
            await _put(case, engine, "never", after=[second, first]),
            await _put(case, engine, "waits", after=[second]),
        )
        assert await engine.cancel(first)
        _told(await _ended(engine, never), first, "cancelled")
        assert await engine.cancel(waits)
        assert await state_of(engine, waits) == "cancelled"
        assert await engine.resume(waits)
        assert await state_of(engine, waits) == "queued"
        journal.gate.set()
        assert (await _ended(engine, waits)).state == "completed"
    assert journal.calls[-1] == waits
    assert never not in journal.calls


async def refuses_to_follow_strangers(case: RunEngineCase) -> None:
    """What is not there, another tenant's or below a run cannot be waited for, and nothing is stored."""

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {}

    async def parent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.children(case.id("child"), {"one": {}})

    async with case.engine(flow=noting(Journal()), parent=parent, child=child) as engine:
        theirs = await _put(case, engine, "theirs", tenant="tenant-b")
        tree = case.id("tree")
        await engine.start(case.id("parent"), tree, {}, tenant=TENANT)
        await _ended(engine, theirs)
        await _ended(engine, tree)
        run = case.id("run")
        for other in (theirs, case.id("nothing"), run, f"{tree}.one"):
            start = engine.start(case.id("flow"), run, {}, tenant=TENANT, after=[tree, other])
            await refused(start, NotFound)
        assert await engine.get(run) is None


async def waits_through_restarts(case: RunEngineCase) -> None:
    """A run whose process ends while it waits is interrupted, and waits on where it is resumed."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as submitter:
        first = await _put(case, submitter, "first", {"hold": True})
        async with case.engine(flow=noting(journal)) as engine:
            after = await _put(case, engine, "after", after=[first])
            bad = await _put(case, engine, "bad", after=[first])
            assert await state_of(submitter, after) == "queued"
        assert await state_of(submitter, after) == "interrupted"
        async with case.engine(flow=noting(journal)) as engine:
            assert await engine.resume(after)
            assert await state_of(submitter, after) == "queued"
        await journal.begun.wait()
        assert await submitter.cancel(first)
        async with case.engine(flow=noting(journal)) as engine:  # it is too late for both
            assert await engine.resume(after)
            _told(await _ended(engine, after), first, "cancelled")
            assert await engine.resume(bad)
            _told(await _ended(submitter, bad), first, "cancelled")
    assert journal.calls == [first]


async def holds_in_the_queue(case: RunEngineCase) -> None:
    """In a shared queue no worker takes a run before those before it have completed, wherever they ran."""
    journal = Journal()
    queue = case.id("queue")
    async with case.engine(flow=noting(journal)) as submitter, case.worker(1, flow=noting(journal)):
        first = await _put(case, submitter, "first", {"hold": True}, queue=queue)
        after = await _put(case, submitter, "after", after=[first], queue=queue, priority=9)
        never = await _put(case, submitter, "never", {"fail": True}, after=[first], queue=queue)
        nor = await _put(case, submitter, "nor", after=[after, never], queue=queue)
        await journal.begun.wait()
        depth = next(one for one in await submitter.queue_depths() if one.queue == queue)
        assert (depth.waiting, depth.delayed, depth.running) == (0, 3, 1)
        assert await state_of(submitter, after) == "queued"
        other = await _put(case, submitter, "other", after=[first], queue=queue)
        assert await submitter.cancel(other)
        assert await submitter.resume(other)  # it waits on
        depth = next(one for one in await submitter.queue_depths() if one.queue == queue)
        assert (depth.waiting, depth.delayed, depth.running) == (0, 4, 1)
        assert await submitter.cancel(other)
        journal.gate.set()
        assert (await _ended(submitter, after)).state == "completed"
        assert (await _ended(submitter, never)).error is not None
        _told(await _ended(submitter, nor), never, "failed")
    assert journal.calls == [first, after, never]


async def expires_while_it_waits(case: RunEngineCase) -> None:
    """A deadline that passes while a run waits for another fails it, in a queue and without one."""
    journal = Journal()
    soon_s = time.time() + 0.2
    async with case.engine(flow=noting(journal)) as engine, case.worker(flow=noting(journal)):
        first = await _put(case, engine, "first", {"hold": True})
        for name, queue in (("here", None), ("queued", case.id("queue"))):
            run = await _put(case, engine, name, after=[first], queue=queue, deadline_s=soon_s)
            record = await _ended(engine, run)
            assert (record.error or {})["code"] == "deadline_exceeded", record
        journal.gate.set()
        await _ended(engine, first)
    assert journal.calls == [first]


async def keeps_what_is_waited_for(case: RunEngineCase) -> None:
    """No purge removes a run that an unfinished one waits for; a tenant of its own, for all of it goes."""
    journal = Journal()
    tenant = case.id("tenant")
    async with case.engine(flow=noting(journal)) as engine:
        held = await _put(case, engine, "held", {"hold": True}, tenant=tenant)
        bad = await _put(case, engine, "bad", {"fail": True}, tenant=tenant)
        await _ended(engine, bad)
        async with case.engine(flow=noting(journal)) as other:
            # Nobody lets it go on when this process has gone: what it waits for must stay all the same.
            waits = await _put(case, other, "waits", after=[held], tenant=tenant)
        journal.gate.set()
        await _ended(engine, held)
        await engine.purge(tenant, older_than_s=0, keep_bytes=None)
        assert await engine.get(bad) is None
        assert await engine.get(held) is not None
        assert await engine.resume(waits)
        assert (await _ended(engine, waits)).state == "completed"
        await engine.purge(tenant, older_than_s=0, keep_bytes=None)

        async def is_gone() -> bool:
            return await engine.get(held) is None and await engine.get(waits) is None

        await until(is_gone)


AFTER_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    begins_after_all,
    waits_without_a_place,
    fails_after_what_fails,
    fails_after_what_is_cancelled,
    refuses_to_follow_strangers,
    waits_through_restarts,
    holds_in_the_queue,
    expires_while_it_waits,
    keeps_what_is_waited_for,
)
