"""What every `RunEngine` must do when a workflow is retried from one of its steps.

Part of `run_engine_contract`: its CHECKS include these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from agentic_flow.core.errors import AgenticFlowError, Conflict, NotFound, ProviderFailed
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunEngine, StepContext, Workflow, WorkflowContext
from agentic_flow.testing.run_engine_case import (
    TENANT,
    TIMEOUT_S,
    Journal,
    RunEngineCase,
    refused,
    state_of,
)


def _flows(case: RunEngineCase, journal: Journal, fails: set[str]) -> dict[str, Workflow]:
    """Plan, three agents at once of whom some fail, then a merge of those that did not."""

    def work(name: str) -> Callable[[StepContext], Awaitable[JsonObject]]:
        async def run(step: StepContext) -> JsonObject:
            journal.calls.append(name)
            if name in fails:
                raise ProviderFailed(f"{name!r} is away", hint="later")
            return {"by": name}

        return run

    async def agent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        name = context.workflow_id.rpartition(".")[2]
        return await context.step("model", work(name))

    async def team(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("plan", work("plan"))
        agents: dict[str, JsonObject] = {f"work-{n}": {} for n in (1, 2, 3)}
        results = await context.children(case.id("agent"), agents)
        lost = [key for key, result in results.items() if "error" in result]
        if lost and payload.get("strict"):
            raise Conflict(f"lost {lost!r}", hint="retry")
        merged = await context.step("merge", work("merge"))
        return {"lost": lost, "merged": merged, "round": payload.get("round", 1)}

    return {"agent": agent, "team": team}


async def _done(engine: RunEngine, workflow_id: str) -> JsonObject:
    async with asyncio.timeout(TIMEOUT_S):
        record = await engine.wait(workflow_id)
    assert record.state == "completed", record
    return record.output or {}


async def retries_from_the_first_failure(case: RunEngineCase) -> None:
    """Kept steps run no second time, what failed does, and both runs tell the truth afterwards."""
    journal, fails = Journal(), {"work-2"}
    old, new, named = case.id("old"), case.id("new"), case.id("named")
    async with case.engine(**_flows(case, journal, fails)) as engine:
        await engine.start(case.id("team"), old, {"strict": True}, tenant=TENANT)
        assert (await engine.wait(old)).state == "failed"
        before = await engine.steps(old)
        assert sorted(journal.calls) == ["plan", "work-1", "work-2", "work-3"]
        journal.calls.clear()
        fails.clear()
        assert await engine.retry(old, new, {"round": 2})
        assert await _done(engine, new) == {"lost": [], "merged": {"by": "merge"}, "round": 2}
        assert journal.calls == ["work-2", "merge"]
        assert not await engine.retry(old, new, {"round": 2}), "its id is taken"
        steps = {(s.workflow_id.removeprefix(new), s.name): s for s in await engine.steps(new)}
        assert len(steps) == 5
        for step in before:
            if step.error is None:
                kept = steps[step.workflow_id.removeprefix(old), step.name]
                assert (kept.output, kept.completed_at_s) == (step.output, step.completed_at_s)
        events = await engine.events(new)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert (events[0].kind, events[0].data) == ("accepted", {"retry_of": old, "from_step": "work-2"})
        finished = [(e.agent, e.name) for e in events if e.kind == "step_finished"]
        assert sorted(finished) == sorted((i.lstrip("."), name) for i, name in steps)
        assert await engine.steps(old) == before
        assert await state_of(engine, old) == "failed"
        journal.calls.clear()
        assert await engine.retry(new, named, {"round": 3}, from_step="work")
        assert (await _done(engine, named))["round"] == 3
        assert sorted(journal.calls) == ["merge", "work-1", "work-2", "work-3"]
        journal.calls.clear()
        assert await engine.retry(new, case.id("last"), {}, from_step="merge")
        await _done(engine, case.id("last"))
        assert journal.calls == ["merge"]


async def refuses_what_cannot_be_retried(case: RunEngineCase) -> None:
    """A retry of what lives, of nothing, of no step, or without a failure is refused and leaves nothing."""
    journal = Journal()
    flows = _flows(case, journal, set())

    async def held(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("held", journal.hold("held"))

    run, new = case.id("run"), case.id("new")
    async with case.engine(held=held, **flows) as engine:
        await engine.start(case.id("held"), run, {}, tenant=TENANT)
        await journal.begun.wait()
        wrong: Mapping[str, tuple[str | None, type[AgenticFlowError]]] = {
            run: ("held", Conflict),
            case.id("nobody"): (None, NotFound),
        }
        for workflow_id, (step, error) in wrong.items():
            await refused(engine.retry(workflow_id, new, {}, from_step=step), error)
        journal.gate.set()
        await _done(engine, run)
        await refused(engine.retry(run, new, {}), Conflict)
        await refused(engine.retry(run, new, {}, from_step="other"), NotFound)
        await refused(engine.retry(f"{run}.child", new, {}), NotFound)
        assert await engine.get(new) is None
        assert await engine.events(new) == []
        await engine.start(case.id("team"), case.id("cut"), {}, tenant=TENANT)
        await _done(engine, case.id("cut"))


async def retries_through_restarts(case: RunEngineCase) -> None:
    """A retry whose process ends goes on elsewhere with what it kept; a cancelled run can be retried too."""
    journal = Journal()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("first", journal.note("first"))
        return await context.step("held", journal.hold("held"))

    old, new = case.id("old"), case.id("new")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), old, {}, tenant=TENANT)
        await journal.begun.wait()
        assert await engine.cancel(old)
        journal.begun.clear()
        await refused(engine.retry(old, new, {}, from_step="held"), NotFound)
        assert await engine.retry(old, new, {})
        await journal.begun.wait()
    assert journal.calls == ["first", "held", "held"]
    async with case.engine(flow=flow) as engine:
        assert await engine.resume_interrupted() == [new]
        journal.gate.set()
        await _done(engine, new)
        assert await state_of(engine, old) == "cancelled"
    assert journal.calls == ["first", "held", "held", "held"]


RETRY_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    retries_from_the_first_failure,
    refuses_what_cannot_be_retried,
    retries_through_restarts,
)
