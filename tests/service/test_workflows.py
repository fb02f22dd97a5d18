"""Workflows at work: agents, teams and tools one budget, retries, time-outs and bad input."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scripted_team import ANSWER_LINE, GOAL, make_folder, team

from agentic_flow import AsyncClient
from agentic_flow.core.errors import Conflict, InvalidInput, PathNotFound
from agentic_flow.core.settings import Settings, load
from agentic_flow.swarm.runs import RunResult
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest


def settings_at(place: Path, provider: FakeProvider, **more: Any) -> Settings:
    flags: dict[str, object] = {
        "data_dir": str(place / "data"),
        "memory.enabled": False,
        "gateway.openai.base_url": provider.openai_url,
        "gateway.openai.api_key": "test-key",
        "gateway.model": "openai:some-model",
        **more,
    }
    return load(flags, environ={}, directory=place, user_config=place / "none.toml").settings


def ran(place: Path, text: str, answer: Any, inputs: dict[str, Any] | None = None) -> RunResult:
    """A workflow run to its end, with a provider that answers so."""
    (place / "flow.yaml").write_text(text, "utf-8")

    async def main(settings: Settings) -> RunResult:
        async with AsyncClient(settings=settings) as client:
            return await client.workflows.run(place / "flow.yaml", inputs)

    with FakeProvider(answer) as provider:
        return asyncio.run(main(settings_at(place, provider)))


def states(result: RunResult) -> dict[str, str]:
    assert result.workflow is not None
    return {step.id: step.state for step in result.workflow.steps}


def test_a_team_within_a_workflow_has_its_folder_and_its_budget(tmp_path: Path) -> None:
    """Catches a team step without the workflow's folder, or whose tokens do not count for the whole."""
    folder = make_folder(tmp_path)
    flow = f"""
name: w
inputs: {{folder: {{type: path}}}}
folders: ["{{{{ inputs.folder }}}}"]
tokens_max: 200000
steps:
  - id: ask
    team: {{goal: {json.dumps(GOAL)}, agents: 2}}
  - id: after
    needs: [ask]
    tool: {{name: file_read, arguments: {{path: "{{{{ steps.ask.output.citations[0].path }}}}"}}}}
outputs: {{answer: "{{{{ steps.ask.output.answer }}}}", file: "{{{{ steps.after.output.path }}}}"}}
"""
    result = ran(tmp_path, flow, team, {"folder": str(folder)})
    assert result.state == "completed", result.error
    assert ANSWER_LINE in result.answer
    assert result.workflow is not None
    assert result.workflow.outputs["file"] == "kettle.py"
    assert any(agent.name.startswith("ask.") for agent in result.agents)
    assert result.usage.model_calls == 9
    short = ran(tmp_path, flow.replace("200000", "10"), team, {"folder": str(folder)})
    assert short.state == "failed"
    assert short.error is not None
    assert short.error["code"] == "limit_exceeded", short.error
    assert "its 10 tokens" in short.error["detail"]


def test_steps_share_one_budget(tmp_path: Path) -> None:
    """Catches a budget that each step has anew: the second call must find the first one's tokens spent."""
    flow = """
name: w
tokens_max: 1
steps:
  - {id: a, agent: {prompt: "One", tools: []}}
  - {id: b, needs: [a], agent: {prompt: "Two", tools: []}}
"""

    def answer(_: SeenRequest) -> Reply:
        return Reply.text("said")

    refused = ran(tmp_path, flow, answer)
    assert refused.error is not None
    needed = int(re.findall(r"needs about (\d+)", refused.error["detail"])[0])
    one_and_a_bit = flow.replace("tokens_max: 1", f"tokens_max: {needed + 20}")
    result = ran(tmp_path, one_and_a_bit, answer)  # a call costs 30 tokens
    assert states(result) == {"a": "completed", "b": "failed"}
    assert result.error is not None
    assert result.error["code"] == "limit_exceeded"
    assert (
        ran(tmp_path, flow.replace("tokens_max: 1", f"tokens_max: {needed + 30}"), answer).state
        == "completed"
    )


def test_a_failed_attempt_is_made_again_and_a_hanging_one_is_cut_off(tmp_path: Path) -> None:
    """Catches retries that do not happen or do not end, and a time-out that nobody keeps."""
    seen: list[str] = []

    def answer(request: SeenRequest) -> Reply:
        word = request.last_text
        seen.append(word)
        if word == "flaky" and seen.count("flaky") == 1:
            return Reply.text("  ")
        if word == "hangs":
            return Reply.text("late", delay_s=60.0)
        return Reply.text(f"<{word}>")

    flow = """
name: w
steps:
  - {id: a, retry: {attempts: 3, backoff_s: 0.01}, agent: {prompt: "flaky", tools: []}}
  - {id: b, timeout_s: 3.0, on_failure: fallback, fallback: c, agent: {prompt: "hangs", tools: []}}
  - {id: c, agent: {prompt: "instead of {{ steps.b.error.code }}", tools: []}}
outputs: {a: "{{ steps.a.output.text }}", b: "{{ steps.b.output.text }}"}
"""
    result = ran(tmp_path, flow, answer)
    assert result.state == "completed", result.error
    assert result.workflow is not None
    assert result.workflow.outputs == {"a": "<flaky>", "b": "<instead of deadline_exceeded>"}
    assert seen.count("flaky") == 2
    assert seen.count("hangs") == 1


def test_a_tool_that_fails_fails_its_step(tmp_path: Path) -> None:
    """Catches a refused path or a missing file that a workflow takes for a result."""
    folder = make_folder(tmp_path)
    flow = """
name: w
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
paths_forbidden: ["kettle.py"]
steps:
  - {id: a, tool: {name: file_read, arguments: {path: kettle.py}}, on_failure: continue}
  - {id: b, needs: [a], tool: {name: file_read, arguments: {path: listeners.py}}}
  - {id: c, needs: [b], tool: {name: file_read, arguments: {path: none.py}}}
"""
    result = ran(tmp_path, flow, team, {"folder": str(folder)})
    assert result.state == "failed"
    assert states(result) == {"a": "failed", "b": "completed", "c": "failed"}
    assert result.error is not None
    assert "'c'" in result.error["detail"]


def recorded_states(settings: Settings) -> dict[str, str]:
    """How each workflow and each child stands in the database of runs."""
    with closing(sqlite3.connect(settings.data_dir / "runs" / "runs.db")) as runs:
        return dict(runs.execute("SELECT workflow_id, status FROM af_workflows").fetchall())


LIVE: dict[str, dict[str, Any]] = {
    "an agent": {"agent": {"prompt": "Work on it.", "tools": []}},
    "a team": {"team": {"goal": GOAL, "agents": 2}},
}


@pytest.mark.parametrize("kind", LIVE)
def test_a_cancelled_workflow_takes_its_live_child_along(tmp_path: Path, kind: str) -> None:
    """Catches a child that works on for a workflow which is cancelled, steps that follow, a result that says
    something else, and one that is taken up again by whoever opens the runs next."""
    flow = tmp_path / "flow.yaml"
    steps = [
        {"id": "before", "agent": {"prompt": "Say one.", "tools": []}},
        {"id": "live", "needs": ["before"], "retry": {"attempts": 3}, "on_failure": "continue", **LIVE[kind]},
        {"id": "later", "needs": ["live"], "agent": {"prompt": "Say three.", "tools": []}},
    ]
    folder = {"inputs": {"folder": {"type": "path"}}, "folders": ["{{ inputs.folder }}"]}
    flow.write_text(json.dumps({"name": "w", **folder, "steps": steps}), "utf-8")
    alone = tmp_path / "alone.yaml"
    alone.write_text('{name: x, steps: [{id: a, agent: {prompt: "Say alone.", tools: []}}]}', "utf-8")
    inputs = {"folder": str(make_folder(tmp_path))}
    hangs, hanging = [True], list[str]()

    async def main() -> None:
        loop, working = asyncio.get_running_loop(), asyncio.Event()

        def answer(request: SeenRequest) -> Reply:
            if request.last_text.startswith("Say "):
                return Reply.text("said")
            if "Split it into at most" in request.last_text or not hangs[0]:
                return Reply.text("done") if kind == "an agent" else team(request)
            hanging.append(request.last_text)
            if len(hanging) == (1 if kind == "an agent" else 2):  # all that are at work are asked now
                loop.call_soon_threadsafe(working.set)
            return Reply.broken("hang")

        with FakeProvider(answer) as provider:
            settings = settings_at(tmp_path, provider)
            async with AsyncClient(settings=settings) as client, asyncio.timeout(60):
                run_id = await client.workflows.submit(flow, inputs)
                await working.wait()
                assert await client.runs.cancel(run_id)
                result = await client.runs.wait(run_id)
                assert (result.run_id, result.state, result.answer) == (run_id, "cancelled", "")
                assert result.usage.model_calls == (1 if kind == "an agent" else 2)
                assert await client.runs.cancel(run_id) is False
                ended = recorded_states(settings)
                assert ended.pop(f"{run_id}.before") == ended.pop(f"{run_id}.before.try-1") == "completed"
                if kind == "a team":
                    assert ended.pop(f"{run_id}.live.try-1.plan") == "completed"
                assert set(ended) >= {run_id, f"{run_id}.live", f"{run_id}.live.try-1"}
                assert set(ended.values()) == {"cancelled"}
                assert f"{run_id}.later" not in ended
                asked = [request.last_text for request in provider.requests]
                # Whatever else the engine does, of this one nothing goes on.
                other = await client.workflows.run(alone)
                assert other.state == "completed"
                assert [request.last_text for request in provider.requests] == [*asked, "Say alone."]
                assert await client.runs.show(run_id) == result
                hangs[0] = False
                resumed = await client.runs.resume(run_id)
                assert resumed.state == "completed", resumed.error
                assert states(resumed) == {"before": "completed", "live": "completed", "later": "completed"}
                texts = [request.last_text for request in provider.requests]
                assert (texts.count("Say one."), texts.count("Say three.")) == (1, 1)

    asyncio.run(main())


def test_bad_requests_are_refused_before_anything_is_stored(tmp_path: Path) -> None:
    """Catches a workflow or input that is taken though it is wrong, and a key used for two of them."""
    flow = tmp_path / "flow.yaml"
    text = "name: w\ninputs: {n: {type: integer}, at: {type: string, default: ''}}\nsteps:\n"
    flow.write_text(text + "- {id: a, tool: {name: file_list}, when: inputs.n > 0}\n", "utf-8")

    async def main(settings: Settings) -> None:
        async with AsyncClient(settings=settings) as client:
            for inputs in ({}, {"n": "x"}, {"n": 1, "m": 2}):
                with pytest.raises(InvalidInput):
                    await client.workflows.submit(flow, inputs)
            wrong = tmp_path / "wrong.yaml"
            wrong.write_text("name: w\nsteps: [{id: a, tool: {name: hammer}}]\n", "utf-8")
            with pytest.raises(InvalidInput, match="hammer"):
                await client.workflows.submit(wrong)
            assert not (await client.workflows.validate(wrong)).valid
            with pytest.raises(PathNotFound):
                await client.workflows.submit(tmp_path / "none.yaml")
            assert await client.runs.list() == []
            first = await client.workflows.submit(flow, {"n": 0}, idempotency_key="k")
            assert await client.workflows.submit(flow, {"n": 0}, idempotency_key="k") == first
            with pytest.raises(Conflict):
                await client.workflows.submit(flow, {"n": 2}, idempotency_key="k")
            with pytest.raises(Conflict):
                await client.runs.submit("Why?", idempotency_key="k")
            ended = await client.runs.wait(first)
            assert ended.state == "failed"
            assert ended.error is not None
            assert ended.error["code"] == "not_accepted", "all skipped is not completed"
            assert [run.run_id for run in await client.runs.list()] == [first]

    with FakeProvider(team) as provider:
        asyncio.run(main(settings_at(tmp_path, provider)))
