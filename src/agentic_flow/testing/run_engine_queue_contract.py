"""What every `RunEngine` must do with shared queues. Part of `run_engine_contract.CHECKS`.

Each check has a queue of its own. `case.worker` works for it; an engine of `case.engine` only puts runs in.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from agentic_flow.core.errors import InvalidInput, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import QueueDepth, RunEngine, StepContext, Workflow, WorkflowContext
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


def noting(journal: Journal) -> Workflow:
    """A workflow of one step, which notes whose it was."""

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("s", journal.note(context.workflow_id))

    return flow


async def _put(
    case: RunEngineCase, engine: RunEngine, name: str, tenant: str = TENANT, /, **more: Any
) -> str:
    run = case.id(name)
    put = await engine.start(case.id("flow"), run, {}, tenant=tenant, queue=case.id("queue"), **more)
    assert put, run
    return run


async def _depth(case: RunEngineCase, engine: RunEngine) -> QueueDepth | None:
    return next((one for one in await engine.queue_depths() if one.queue == case.id("queue")), None)


async def _completed(engine: RunEngine, *runs: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        for run in runs:
            record = await engine.wait(run)
            assert record.state == "completed", record


async def accepts_what_others_execute(case: RunEngineCase) -> None:
    """A process that executes nothing accepts runs, one that accepts nothing executes them, each once."""
    journal = Journal()
    flow = noting(journal)
    async with case.engine(True, 0, flow=flow) as submitter:
        run = await _put(case, submitter, "one", priority=3)
        assert not await submitter.start(case.id("flow"), run, {}, tenant=TENANT, queue=case.id("queue"))
        record = await submitter.get(run)
        assert record is not None
        assert (record.state, record.owner) == ("queued", None)
        assert (record.queue, record.priority) == (case.id("queue"), 3)
        # Whatever looks after interrupted runs leaves it alone: it is none, and nobody here may execute it.
        assert run not in await submitter.resume_interrupted()
        assert not await submitter.resume(run)
        assert journal.calls == []
        async with case.worker(flow=flow):
            await _completed(submitter, run)
    assert journal.calls == [run]
    kinds = [event.kind for event in await case.make().events(run)]
    assert kinds == ["accepted", "started", "step_finished", "ended"]
    assert journal.keys == [f"{run}:1"]


async def refuses_what_no_line_has(case: RunEngineCase) -> None:
    """A priority outside the range is refused before anything is stored."""
    async with case.engine(flow=noting(Journal())) as engine:
        run = case.id("one")
        await refused(
            engine.start(case.id("flow"), run, {}, tenant=TENANT, queue=case.id("queue"), priority=101),
            InvalidInput,
        )
        assert await engine.get(run) is None


async def takes_by_priority_then_fairly(case: RunEngineCase) -> None:
    """High priorities first; then tenants in turn, however many one of them has; then the oldest."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as submitter:
        for number in range(4):
            await _put(case, submitter, f"a{number}", "a")
        for number in range(2):
            await _put(case, submitter, f"b{number}", "b")
        await _put(case, submitter, "urgent", "a", priority=1)
        await _put(case, submitter, "idle", "b", priority=-1)
        names = ["urgent", "b0", "a0", "b1", "a1", "a2", "a3", "idle"]
        async with case.worker(1, flow=noting(journal)):
            await _completed(submitter, *map(case.id, names))
    assert journal.calls == [case.id(name) for name in names]


async def starves_nobody(case: RunEngineCase) -> None:
    """A tenant with a thousand runs that wait does not hold up another's one."""
    journal = Journal()
    entered: list[str] = []

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        entered.append(context.workflow_id)
        if len(entered) == 1:
            await journal.gate.wait()
        return {}

    async with case.engine(flow=flow) as submitter:
        await asyncio.gather(*(_put(case, submitter, f"many-{n}", "many") for n in range(1000)))
        async with case.worker(1, flow=flow):

            async def has_begun() -> bool:
                return bool(entered)

            await until(has_begun)
            one = await _put(case, submitter, "one", "few")
            journal.gate.set()
            await _completed(submitter, one)
            assert entered[1] == one, entered.index(one)
    # The rest stays in a queue that nobody works for.


async def starves_nobody_by_a_wrong_clock(case: RunEngineCase) -> None:
    """Whom a worker with a late clock serves does not remain the one that was served the longest ago."""
    journal = Journal()
    flow = noting(journal)
    async with case.engine(flow=flow) as submitter:
        async with case.worker(1, flow=flow):
            await _completed(submitter, await _put(case, submitter, "b0", f"{case.prefix}b"))
        names = ["a0", "a1", "a2", "b1"]
        runs = [await _put(case, submitter, name, f"{case.prefix}{name[0]}") for name in names]
        late = case.make(runs_parallel_max=1, clock=WrongClock(-1000.0))
        late.register(case.id("flow"), flow)
        async with late.open(queues=[case.id("queue")]):
            await _completed(submitter, *runs)
    assert journal.calls == [case.id(name) for name in ("b0", "a0", "b1", "a1", "a2")]


async def keeps_to_tenant_limits(case: RunEngineCase) -> None:
    """With places to spare, no tenant has more runs at work than it may, in two processes together."""
    busy: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def work(step: StepContext) -> JsonObject:
            tenant = context.workflow_id.rpartition("-")[2][0]
            busy[tenant] += 1
            most[tenant] = max(most[tenant], busy[tenant])
            await asyncio.sleep(0.01)
            busy[tenant] -= 1
            return {}

        return await context.step("work", work)

    async with case.engine(flow=flow) as submitter:
        runs = [await _put(case, submitter, f"{t}{n}", f"{case.prefix}{t}") for n in range(6) for t in "xy"]
        async with case.worker(4, 1, flow=flow), case.worker(4, 1, flow=flow):
            await _completed(submitter, *runs)
    assert most == {"x": 1, "y": 1}


async def keeps_to_queue_limits(case: RunEngineCase) -> None:
    """A queue's limit holds whatever places there are, and is made use of."""
    now, most = [0], [0]
    both = asyncio.Event()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        now[0] += 1
        most[0] = max(most[0], now[0])
        if now[0] == 2:
            both.set()
        await both.wait()
        await asyncio.sleep(0.01)
        now[0] -= 1
        return {}

    engine = case.make(runs_parallel_max=6, queue_runs_max={case.id("queue"): 2})
    engine.register(case.id("flow"), flow)
    async with engine.open(queues=[case.id("queue")]):
        runs = [await _put(case, engine, f"r{number}") for number in range(8)]
        await _completed(engine, *runs)
    assert most == [2], f"{most[0]} at a time"


async def begins_nothing_too_early(case: RunEngineCase) -> None:
    """A run that may not begin yet waits for its time, and is told apart from what is ready."""
    started: list[float] = []

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        started.append(time.time())
        return {}

    async with case.worker(flow=flow) as engine:
        far_s = time.time() + 3600
        far = await _put(case, engine, "far", not_before_s=far_s)
        assert await _depth(case, engine) == QueueDepth(case.id("queue"), 0, 0.0, 1, 0)
        record = await engine.get(far)
        assert record is not None
        assert (record.state, record.not_before_s) == ("queued", far_s)
        due_s = time.time() + 0.5
        await _completed(engine, await _put(case, engine, "later", not_before_s=due_s))
        assert await state_of(engine, far) == "queued"
        assert await engine.cancel(far)
    assert len(started) == 1
    assert started[0] >= due_s


async def fails_what_begins_too_late(case: RunEngineCase) -> None:
    """A run whose deadline passes while it waits fails and says why; nobody executes it afterwards."""
    journal = Journal()
    async with case.engine(True, 0, flow=noting(journal)) as submitter:
        run = case.id("late")
        queue = case.id("queue")
        await submitter.start(
            case.id("flow"), run, {}, tenant=TENANT, queue=queue, deadline_s=time.time() + 0.2
        )
        async with asyncio.timeout(TIMEOUT_S):
            record = await submitter.wait(run)
        assert record.state == "failed"
        assert (record.error or {})["code"] == "deadline_exceeded"
        assert [event.kind for event in await submitter.events(run)] == ["accepted", "ended"]
        async with case.worker(flow=noting(journal)) as worker:
            await _completed(submitter, await _put(case, worker, "after"))
    assert journal.calls == [case.id("after")]


async def cancels_what_waits(case: RunEngineCase) -> None:
    """A run that is cancelled while it waits is taken by nobody; resumed, it waits again and is executed."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as submitter:
        one, other = await _put(case, submitter, "one"), await _put(case, submitter, "other")
        assert await submitter.cancel(one)
        depth = await _depth(case, submitter)
        assert depth is not None
        assert (depth.waiting, depth.running) == (1, 0)
        async with case.worker(1, flow=noting(journal)):
            await _completed(submitter, other)
            assert await state_of(submitter, one) == "cancelled"
            assert await submitter.resume(one)
            await _completed(submitter, one)
            assert await _depth(case, submitter) is None
    assert journal.calls == [other, one]


async def hands_back_on_leaving(case: RunEngineCase) -> None:
    """What a worker has not finished when it leaves waits at once again; recorded steps are not repeated."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("first", journal.note("first"))
        return await context.step("second", journal.hold("second"))

    async with case.engine(flow=flow) as submitter:
        run = await _put(case, submitter, "one")
        async with case.worker(flow=flow):
            await journal.begun.wait()
            depth = await _depth(case, submitter)
            assert depth is not None
            assert (depth.waiting, depth.running) == (0, 1)
        assert await state_of(submitter, run) == "queued"
        journal.gate.set()
        async with case.worker(flow=flow):
            await _completed(submitter, run)
    assert journal.calls == ["first", "second", "second"]
    kinds = [event.kind for event in await case.make().events(run)]
    assert kinds[3:] == ["handed_back", "started", "step_finished", "ended"], kinds


async def drains(case: RunEngineCase) -> None:
    """A process that drains finishes what works, takes no more, and says what it could not finish."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold(context.workflow_id))

    async with case.engine(flow=flow) as submitter:
        one = await _put(case, submitter, "one")
        async with case.worker(1, flow=flow) as worker:
            await journal.begun.wait()
            other = await _put(case, submitter, "other")
            assert await worker.drain(0.05) == 1
            journal.gate.set()
            assert await worker.drain(TIMEOUT_S) == 0
            assert await state_of(submitter, one) == "completed"
        assert await state_of(submitter, other) == "queued"
        assert await submitter.cancel(other)
    assert journal.calls == [one]


async def hands_on_while_it_drains(case: RunEngineCase) -> None:
    """What a draining process has not begun, with or without a queue, others do meanwhile; it begins nothing
    new, but accepts for queues."""
    journal = Journal()
    async with case.engine(True, 1, flow=noting(journal)) as leaving:
        held, waiting, later = case.id("held"), case.id("waiting"), case.id("later")
        begun = asyncio.Event()

        async def hold(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            begun.set()
            return await context.step("held", journal.hold(context.workflow_id))

        leaving.register(case.id("hold"), hold)
        await leaving.start(case.id("hold"), held, {}, tenant=TENANT)
        await begun.wait()
        await leaving.start(case.id("flow"), waiting, {}, tenant=TENANT)
        async with case.worker(flow=noting(journal)) as other:
            draining = asyncio.create_task(leaving.drain(TIMEOUT_S))
            await _completed(other, waiting)
            assert not draining.done()
            await refused(leaving.start(case.id("flow"), later, {}, tenant=TENANT), Unavailable)
            assert await other.get(later) is None
            await _completed(other, await _put(case, leaving, "queued"))
            journal.gate.set()
            assert await draining == 0
            assert await state_of(other, held) == "completed"
    assert journal.calls.count(waiting) == 1


async def shares_among_workers(case: RunEngineCase) -> None:
    """Runs that two workers take at the same time are executed once each, and by both of them."""
    journal = Journal()
    by: Counter[int] = Counter()
    both = asyncio.Event()

    def of(worker: int) -> Workflow:
        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            by[worker] += 1
            if len(by) == 2:
                both.set()
            await both.wait()  # the first to open could do all of them before the second is there
            return await context.step("s", journal.note(context.workflow_id))

        return flow

    async with case.engine(flow=of(0)) as submitter:
        runs = list(await asyncio.gather(*(_put(case, submitter, f"r{n}", f"t{n % 3}") for n in range(60))))
        async with case.worker(2, flow=of(1)), case.worker(2, flow=of(2)):
            await _completed(submitter, *runs)
    assert sorted(journal.calls) == sorted(runs)
    assert by[1] + by[2] == len(runs)


async def holds_what_is_paused(case: RunEngineCase) -> None:
    """A run that was paused while it waited is held by whoever takes it, and takes nobody's place."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as submitter:
        held = await _put(case, submitter, "held")
        assert await submitter.pause(held)
        assert await state_of(submitter, held) == "paused"
        async with case.worker(1, flow=noting(journal)):
            await _completed(submitter, await _put(case, submitter, "next"))
            assert journal.calls == [case.id("next")]
            assert await submitter.unpause(held)
            await _completed(submitter, held)


@asynccontextmanager
async def _limited(
    case: RunEngineCase, most: int, minute_s: float, flow: Workflow
) -> AsyncGenerator[RunEngine]:
    """A worker of the case's queue, of which so many runs may begin in a minute of this length."""
    engine = case.make(
        runs_parallel_max=8, queue_starts_per_minute={case.id("queue"): most}, minute_s=minute_s
    )
    engine.register(case.id("flow"), flow)
    async with engine.open(takeover=True, queues=[case.id("queue")]):
        yield engine


async def keeps_to_rates(case: RunEngineCase) -> None:
    """A burst waits instead of failing: so many runs begin in a minute, fair among tenants, in two processes
    and after a restart of both; what had begun before goes on whatever the rate."""
    journal = Journal()
    begun: set[str] = set()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        begun.add(context.workflow_id)
        return await context.step("held", journal.hold(context.workflow_id))

    async def has_begun() -> bool:
        return len(begun) == 4

    async with case.engine(flow=flow) as submitter:
        runs = [await _put(case, submitter, f"x{number}", f"{case.prefix}x") for number in range(8)]
        runs += [await _put(case, submitter, f"y{number}", f"{case.prefix}y") for number in range(2)]
        async with _limited(case, 4, 600.0, flow), _limited(case, 4, 600.0, flow):
            await until(has_begun)
        assert begun == set(map(case.id, ("x0", "x1", "y0", "y1")))
        depth = await _depth(case, submitter)
        assert depth is not None
        assert (depth.waiting, depth.running) == (10, 0), "handed back, and waiting"
        journal.gate.set()
        async with _limited(case, 4, 600.0, flow) as worker:
            await _completed(worker, *begun)
            assert len(begun) == 4, "a restart does not begin the minute anew"
            depth = await _depth(case, submitter)
            assert depth is not None
            assert (depth.waiting, depth.running) == (6, 0)
            for run in set(runs) - begun:
                assert await state_of(submitter, run) == "queued"
        async with case.worker(flow=flow):  # without the limit
            await _completed(submitter, *runs)


async def begins_the_rest_of_a_burst_later(case: RunEngineCase) -> None:
    """What a rate holds back begins when the minute is over, without anybody asking for it."""
    journal = Journal()
    async with case.engine(flow=noting(journal)) as submitter:
        runs = [await _put(case, submitter, f"r{number}") for number in range(5)]
        async with _limited(case, 2, 0.3, noting(journal)):
            await _completed(submitter, *runs)
    assert sorted(journal.calls) == runs


QUEUE_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    accepts_what_others_execute,
    refuses_what_no_line_has,
    takes_by_priority_then_fairly,
    starves_nobody,
    starves_nobody_by_a_wrong_clock,
    keeps_to_tenant_limits,
    keeps_to_queue_limits,
    keeps_to_rates,
    begins_the_rest_of_a_burst_later,
    begins_nothing_too_early,
    fails_what_begins_too_late,
    cancels_what_waits,
    hands_back_on_leaving,
    drains,
    hands_on_while_it_drains,
    shares_among_workers,
    holds_what_is_paused,
)
