"""What goes wrong with what people and models give to runs: for each a defined outcome, seen from outside.

| Bad input | Outcome | Shown by |
|---|---|---|
| unknown topology, role, agent, tool | refused, nothing stored, no call | `REFUSED` in `test_run_teams` |
| cyclic graph of steps; missing tool | refused with the place in the file, nothing stored | here |
| cyclic graph in a planner's answer | worked on without that order | here |
| budget, time, tokens or steps of zero | refused | here |
| 10,000 sub-tasks from a confused planner | as many as there are agents, the rest is told | here |
| agent that loops | stopped, the run failed, error and hint at the run and at the agent | here |
| agent that returns nonsense | completed without evidence, and says so; silence: failed | here |
| agent that calls tools that are not there, or with wrong arguments | told so, and may go on | here |
| tool that hangs | cut off at its deadline, the agent is told | here, and `test_tools_toolbox` |
| two submissions with one key | one run; another specification: refused | here |
| cancelled parent with live children | all cancelled, for good | here, and `test_workflows` for its steps |
| clock jumps | the run ends once, steps that are recorded are not repeated | here, and `tests/simulation` |
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from scripted_team import ANSWER_LINE, GOAL, make_folder, team
from test_run_over_wires import settings_for
from test_run_teams import WORKER, quick, run

from agentic_flow.client import AsyncClient
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import AgenticFlowError, Conflict, InvalidInput
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio

PLAN = "Split it into at most"


# ---- what people give ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["budget_usd", "deadline_s", "tokens_max", "steps_max"])
async def test_a_limit_of_nothing_is_refused(tmp_path: Path, limit: str) -> None:
    """Catches a limit of zero that is taken for none, or that starts a run which can do nothing."""
    options: dict[str, Any] = {limit: 0}
    with pytest.raises(AgenticFlowError) as refused:
        await run(tmp_path, **options)
    assert limit in refused.value.message
    assert refused.value.exit_code == 2


TOOL = "tool: {name: file_list}"
WORKFLOWS = {
    "circle": (
        f"[{{id: a, needs: [c], {TOOL}}}, {{id: b, needs: [a], {TOOL}}}, {{id: c, needs: [b], {TOOL}}}]",
        "the steps wait for each other",
    ),
    "itself": (f"[{{id: a, needs: [a], {TOOL}}}]", "a"),
    "missing tool": ("[{id: a, tool: {name: file_raed}}]", "file_raed"),
    "missing tool of an agent": ("[{id: a, agent: {prompt: p, tools: [hammer]}}]", "hammer"),
    "missing agent": ("[{id: a, agent: {definition: nobody, prompt: p}}]", "nobody"),
    "unknown topology": ("[{id: a, team: {goal: g, topology: tree}}]", "tree"),
}


async def test_a_workflow_that_cannot_run_is_refused_whole(tmp_path: Path) -> None:
    """Catches a fault that is found when half of the steps have run and been paid."""
    with FakeProvider(quick) as provider:
        settings = settings_for(provider, tmp_path / "data", "openai", stream=False)
        async with AsyncClient(settings=settings) as client:
            for what, (steps, said) in WORKFLOWS.items():
                flow = tmp_path / "flow.yaml"
                flow.write_text(f"name: w\nsteps: {steps}\n", "utf-8")
                with pytest.raises(InvalidInput) as refused:
                    await client.workflows.submit(flow)
                assert said in f"{refused.value.message} {refused.value.details}", what
                assert refused.value.hint, what
            assert await client.runs.list() == []
        assert provider.requests == []


async def test_a_key_stands_for_one_run(tmp_path: Path) -> None:
    """Catches a submission that is done twice because its answer was lost, and a key that hides another."""
    folder = str(make_folder(tmp_path))
    with FakeProvider(quick) as provider:
        settings = settings_for(provider, tmp_path / "data", "openai", stream=False)
        async with AsyncClient(settings=settings) as client:
            together = await asyncio.gather(
                *(client.runs.submit(GOAL, input=folder, agents=2, idempotency_key="k") for _ in range(5))
            )
            assert len(set(together)) == 1
            assert (await client.runs.wait(together[0])).state == "completed"
            calls = len(provider.requests)
            assert await client.runs.submit(GOAL, input=folder, agents=2, idempotency_key="k") == together[0]
            with pytest.raises(Conflict) as refused:
                await client.runs.submit(GOAL, input=folder, agents=3, idempotency_key="k")
            assert refused.value.hint == "use a new key for a new run"
            assert len(await client.runs.list()) == 1
        assert len(provider.requests) == calls


async def test_a_cancelled_run_takes_its_live_agents_along(tmp_path: Path) -> None:
    """Catches agents that work on, and pay, for a run that was cancelled, and one without a trajectory."""
    folder = str(make_folder(tmp_path))
    both, asked = Event(), list[str]()

    def script(request: SeenRequest) -> Reply:
        if PLAN in request.last_text:
            return team(request)
        asked.append(request.last_text)
        if len(asked) == 2:
            both.set()
        return Reply.broken("hang")

    with FakeProvider(script) as provider:
        settings = settings_for(provider, tmp_path / "data", "openai", stream=False)
        async with AsyncClient(settings=settings) as client:
            run_id = await client.runs.submit(GOAL, input=folder, agents=2)
            assert await asyncio.to_thread(both.wait, 60)
            assert await client.runs.cancel(run_id)
            result = await client.runs.wait(run_id)
            assert result.state == "cancelled"
            assert {agent.state for agent in result.agents if agent.role == "worker"} <= {"unfinished"}
            events = [event async for event in client.runs.events(run_id)]
            assert events[-1].kind == "run_finished"
            assert await client.runs.cancel(run_id) is False
            kept = await client.memory.trajectory(f"{run_id}-cancelled")
            assert (kept.outcome, kept.run_id) == ("cancelled", run_id)
        async with AsyncClient(settings=settings) as client:  # whoever comes next leaves it alone
            assert (await client.runs.show(run_id)).state == "cancelled"
        assert len(asked) == 2


# ---- what models give ------------------------------------------------------------------------------------


def plans(tasks: list[JsonObject]) -> Any:
    def script(request: SeenRequest) -> Reply:
        return Reply.text(json.dumps({"tasks": tasks})) if PLAN in request.last_text else quick(request)

    return script


async def test_ten_thousand_tasks_are_bounded(tmp_path: Path) -> None:
    """Catches a confused planner that starts ten thousand agents, or is cut without a word."""
    ran = await run(tmp_path, plans([{"question": f"q{number}"} for number in range(10_000)]))
    assert ran.result.state == "completed"
    assert ran.notes("the plan has 10000 tasks and 2 can be worked on: 9998 were left out")
    assert len([agent for agent in ran.result.agents if agent.role == "worker"]) == 2


async def test_tasks_that_wait_for_each_other_are_worked_on(tmp_path: Path) -> None:
    """Catches a team that waits for ever because its planner has planned in a circle."""
    circle = [{"question": "first", "after": [2]}, {"question": "second", "after": [1]}]
    ran = await run(tmp_path, plans(circle), topology="adaptive")
    assert ran.result.state == "completed", ran.result.error
    asked = [request.text for request in ran.requests if WORKER in request.text]
    assert any("first" in text for text in asked)
    assert any("second" in text for text in asked)


async def test_an_agent_that_loops_is_stopped(tmp_path: Path) -> None:
    """Catches an agent that asks for the same tool for ever, a team that waits for it, and a failure that
    does not say of whom and what to do."""

    def script(request: SeenRequest) -> Reply:
        if WORKER in request.text:
            return Reply.tool_calls([{"name": "file_read", "arguments": {"path": "kettle.py"}}])
        return team(request)

    ran = await run(tmp_path, script, steps_max=3)
    assert ran.result.state == "failed"
    error = ran.result.error or {}
    assert (error["code"], error["hint"][:20]) == ("limit_exceeded", "raise swarm.steps_ma")
    assert "no answer within 3 model calls" in error["detail"]
    looped = [agent for agent in ran.result.agents if agent.role == "worker"]
    assert len(looped) == 2
    for agent in looped:
        assert (agent.state, agent.usage.model_calls) == ("failed", 3)
        assert "no answer within 3 model calls" in str(agent.error)
        assert "raise swarm.steps_max" in str(agent.hint)
    assert [agent.state for agent in ran.result.agents if agent.role == "planner"] == ["completed"]


async def test_one_agent_that_loops_does_not_stop_the_others(tmp_path: Path) -> None:
    """Catches a run that is lost, or silent, because one of its agents hit a limit."""

    def script(request: SeenRequest) -> Reply:
        if WORKER in request.text and "Who is told" in request.text:
            return Reply.tool_calls([{"name": "file_read", "arguments": {"path": "kettle.py"}}])
        return quick(request)

    ran = await run(tmp_path, script, steps_max=3)
    assert ran.result.state == "completed", ran.result.error
    assert ran.notes("worker-2 failed: no answer within 3 model calls")
    states = {agent.name: (agent.state, bool(agent.hint)) for agent in ran.result.agents}
    assert (states["worker-1"], states["worker-2"]) == (("completed", False), ("failed", True))


async def test_nonsense_is_no_evidence(tmp_path: Path) -> None:
    """Catches words without a citation that count as findings, and a plan or review that must be readable."""
    ran = await run(tmp_path, lambda _: Reply.text("%$ lorem [kettle.py:900-950] {{{ \x07 ☃"))
    assert ran.result.state == "completed", ran.result.error
    assert ran.result.answer.startswith("No evidence was found")
    assert ran.result.citations == ()
    assert ran.notes("the answer held no tasks: one agent takes the whole goal")
    assert ran.notes("citation dropped: [kettle.py:900-950]")


async def test_silence_is_a_failure(tmp_path: Path) -> None:
    """Catches a completed run whose agents did nothing."""
    ran = await run(tmp_path, lambda request: Reply.text(" \n") if WORKER in request.text else team(request))
    assert ran.result.state == "failed"
    assert ran.result.error is not None
    assert ran.result.error["hint"]
    assert all(agent.error for agent in ran.result.agents if agent.role == "worker")


WRONG_CALLS: dict[str, JsonObject] = {
    "no such tool": {"name": "launch_rocket", "arguments": {}},
    "wrong arguments": {"name": "file_read", "arguments": {"file": 7}},
    "outside": {"name": "file_read", "arguments": {"path": "../../etc/passwd"}},
    "not given to it": {"name": "shell_run", "arguments": {"argv": ["true"]}},
}


@pytest.mark.parametrize("what", WRONG_CALLS)
async def test_a_wrong_tool_call_is_told_to_the_agent(tmp_path: Path, what: str) -> None:
    """Catches a tool call that ends the run, or works, though it is wrong."""

    def script(request: SeenRequest) -> Reply:
        if WORKER in request.text and not any(one.get("role") == "assistant" for one in request.messages):
            return Reply.tool_calls([WRONG_CALLS[what]])
        return quick(request)

    ran = await run(tmp_path, script)
    assert ran.result.state == "completed", ran.result.error
    assert ANSWER_LINE in ran.result.answer
    told = [request.messages[-1] for request in ran.requests if len(request.messages) > 3]
    assert told
    assert not any("root:" in json.dumps(message) for message in told)


async def test_a_tool_that_hangs_is_cut_off(tmp_path: Path) -> None:
    """Catches a run that waits for a tool for ever, and an agent that is not told what happened."""

    def script(request: SeenRequest) -> Reply:
        if WORKER in request.text and not any(one.get("role") == "assistant" for one in request.messages):
            return Reply.tool_calls([{"name": "shell_run", "arguments": {"argv": ["sleep", "600"]}}])
        return quick(request)

    policy = tmp_path / "policy.toml"
    policy.write_text('[[rules]]\neffect = "allow"\ntools = ["shell_run"]\n', "utf-8")
    settings = {
        "tools.shell_allowed": ("sleep",),
        "tools.timeout_s": 3.0,
        "tools.policy_file": str(policy),
    }
    roles = {"worker": {"tools": ["shell_run", "file_read"]}}
    ran = await run(tmp_path, script, settings=settings, roles=roles)
    assert ran.result.state == "completed", ran.result.error
    hung = [step for step in ran.steps if step.name == "tool:shell_run"]
    assert len(hung) == 2
    for step in hung:
        assert step.output is not None
        assert step.output["content"]["timed_out"] is True
    told = [
        json.dumps(request.messages[-1]) for request in ran.requests if "timed_out" in str(request.messages)
    ]
    assert told, "the agents were not told"


# ---- what clocks give ------------------------------------------------------------------------------------


class JumpingClock(SystemClock):
    """The machine's clock, as somebody sets it."""

    offset_s = 0.0

    def time_s(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return time.time() + self.offset_s


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0], ids=["forward", "back"])
async def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path: Path, jump_s: float) -> None:
    """Catches a run that two processes finish, that nobody finishes, or whose steps are done anew, because
    the machine's clock was set while it worked."""
    clock = JumpingClock()
    done = Counter[str]()
    working = asyncio.Event()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        def noted(name: str, then: JsonObject) -> Any:
            async def step(_: StepContext) -> JsonObject:
                done[name] += 1
                if name == "second":
                    working.set()
                return then

            return step

        await context.step("first", noted("first", {}))
        await context.step("second", noted("second", {}))
        await context.receive("go")
        return await context.step("third", noted("third", {"answer": 1}))

    def engine() -> SqlRunEngine:
        made = SqlRunEngine(None, tmp_path, lease_s=1.0, runs_parallel_max=4, clock=clock)
        made.register("flow", flow)
        return made

    one, other = engine(), engine()
    async with one.open(takeover=True), other.open(takeover=True), asyncio.timeout(60):
        await one.start("flow", "run-1", {}, tenant="t")
        await working.wait()
        clock.offset_s += jump_s
        await asyncio.sleep(1.5)  # several looks at who lives
        await other.send("run-1", "go", {}, key="k")
        assert (await other.wait("run-1")).output == {"answer": 1}
        ended = [event.kind for event in await other.events("run-1")].count("ended")
    assert ended == 1
    assert done["first"] == 1
    assert done["third"] == 1
