"""Tools that the policy lets pass with somebody's yes only: the run asks, and waits through restarts."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_team import ANSWER_LINE, GOAL, make_folder
from test_run_over_wires import settings_for
from test_run_teams import WORKER, quick

from agentic_flow.client import AsyncClient
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Forbidden
from agentic_flow.core.settings import Settings
from agentic_flow.swarm.questions import Question
from agentic_flow.swarm.runs import RunResult
from agentic_flow.swarm.workflow_spec import WorkflowRequest
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest
from agentic_flow.tools.audit import AuditLog

pytestmark = pytest.mark.anyio

OPTIONS: dict[str, Any] = {"agents": 1, "roles": {"worker": {"tools": ["shell_run", "file_read"]}}}


def script(request: SeenRequest) -> Reply:
    """A worker that wants to change something first."""
    if WORKER in request.text and not any(one.get("role") == "assistant" for one in request.messages):
        return Reply.tool_calls([{"name": "shell_run", "arguments": {"argv": ["touch", "made"]}}])
    return quick(request)


def settings_at(place: Path, provider: FakeProvider, **more: object) -> Settings:
    return settings_for(
        provider, place / "data", "openai", stream=False, **{"tools.shell_allowed": ("touch",), **more}
    )


async def asked(client: AsyncClient, run_id: str) -> Question:
    """The question of a run, once it has asked."""
    async for event in client.runs.events(run_id):
        if event.kind == "question_asked":
            (question,) = await client.runs.questions(run_id)
            return question
    raise AssertionError(f"{run_id} has asked nothing")


async def audited(place: Path, run_id: str) -> list[tuple[str, str]]:
    """Decision and outcome of the shell's calls, as the audit log has them."""
    log = await asyncio.to_thread(AuditLog, place / "data" / "audit.db")
    try:
        found = await log.records("default", run_id=run_id)
    finally:
        log.close()
    return [(record.decision, record.outcome) for record in found if record.tool == "shell_run"]


def told(provider: FakeProvider) -> str:
    """What workers were told about their calls."""
    return json.dumps([r.messages[-1] for r in provider.requests if "shell_run" in json.dumps(r.messages)])


async def test_a_yes_lets_the_call_pass_after_a_restart(tmp_path: Path) -> None:
    """Catches a call that is made before anybody said yes, a question that a restart forgets, and a call that
    is made twice."""
    folder = make_folder(tmp_path)
    with FakeProvider(script) as provider:
        settings = settings_at(tmp_path, provider)
        async with AsyncClient(settings=settings) as client:
            run_id = await client.runs.submit(GOAL, input=str(folder), **OPTIONS)
            question = await asked(client, run_id)
            assert 'call shell_run with {"argv":["touch","made"]' in question.text
            assert "the default for destructive tools" in question.text
            assert (question.options, question.default) == (("approve", "deny"), "deny")
        assert not (folder / "made").exists()
        async with AsyncClient(settings=settings) as client:
            assert await client.runs.answer(run_id, question.id, "approve")
            result = await client.runs.resume(run_id)
            assert result.state == "completed", result.error
            assert ANSWER_LINE in result.answer
            made = [step for step in await client.runs.steps(run_id) if step.name == "tool:shell_run"]
        assert (folder / "made").exists()
        assert len(made) == 2, "it asked, and was made"
        assert made[1].output is not None
        assert made[1].output["content"]["exit_code"] == 0
    yes = "ask:default:approved by local-owner"
    assert await audited(tmp_path, run_id) == [(yes, "started"), (yes, "ok")]


async def refused(place: Path, act: Callable[[AsyncClient, str], Any], **more: object) -> str:
    """What a worker is told when its call is not approved; the run ends all the same."""
    folder = make_folder(place)
    with FakeProvider(script) as provider:
        async with AsyncClient(settings=settings_at(place, provider, **more)) as client:
            run_id = await client.runs.submit(GOAL, input=str(folder), **OPTIONS)
            question = await asked(client, run_id)
            await act(client, run_id) if question.state == "open" else None
            result: RunResult = await client.runs.wait(run_id)
            assert result.state == "completed", result.error
        assert not (folder / "made").exists()
        return told(provider)


async def test_a_no_is_told_to_the_agent(tmp_path: Path) -> None:
    """Catches a call that is made all the same, and an agent that waits for ever or is not told."""

    async def deny(client: AsyncClient, run_id: str) -> None:
        (question,) = await client.runs.questions(run_id)
        assert await client.runs.answer(run_id, question.id, "deny")

    assert "declined by" in await refused(tmp_path, deny)


async def test_silence_is_a_no(tmp_path: Path) -> None:
    """Catches a run that waits for ever for somebody who does not come."""

    async def nothing(client: AsyncClient, run_id: str) -> None:
        return None

    said = await refused(tmp_path, nothing, **{"tools.approval_timeout_s": 0.2})
    assert "nobody approved tool" in said


async def test_a_workflow_asks_for_its_tool_steps(tmp_path: Path) -> None:
    """Catches a step of a workflow file that is refused, or made, where the policy asks."""
    folder = make_folder(tmp_path)
    flow = tmp_path / "flow.yaml"
    flow.write_text(
        "name: w\ninputs: {folder: {type: path}}\nfolders: ['{{ inputs.folder }}']\n"
        "steps: [{id: a, tool: {name: shell_run, arguments: {argv: [touch, made]}}}]\n"
        "outputs: {code: '{{ steps.a.output.exit_code }}'}\n",
        "utf-8",
    )
    with FakeProvider(script) as provider:
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client:
            run_id = await client.workflows.submit(flow, {"folder": str(folder)})
            question = await asked(client, run_id)
            assert question.text.startswith("May step a call shell_run")
            assert not (folder / "made").exists()
            assert await client.runs.answer(run_id, question.id, "approve")
            result = await client.runs.wait(run_id)
            assert result.state == "completed", result.error
    assert (folder / "made").exists()


async def test_a_tenant_s_key_cannot_say_yes_in_the_operator_s_place(tmp_path: Path) -> None:
    """Catches callers who approve for themselves what the operator's policy asks about."""
    everything = Principal("team-a", "key-1", frozenset({"*"}))
    approver = Principal("team-a", "key-2", frozenset({"runs:read", "runs:write", "platform:approve"}))
    text = "name: w\nsteps: [{id: a, tool: {name: shell_run, arguments: {argv: [touch, made]}}}]\n"
    with FakeProvider(script) as provider:
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client:
            _, swarm = await client._swarm()
            run_id = await swarm.submit_workflow(everything, WorkflowRequest(text=text))
            async for event in swarm.events(everything, run_id):
                if event.kind == "question_asked":
                    break
            (question,) = await swarm.questions(everything, run_id)
            with pytest.raises(Forbidden, match="platform:approve"):
                await swarm.answer(everything, run_id, question.id, "approve")
            assert (await swarm.questions(everything, run_id))[0].state == "open"
            assert await swarm.answer(approver, run_id, question.id, "deny")
            assert (await swarm.wait(everything, run_id)).state == "failed"
