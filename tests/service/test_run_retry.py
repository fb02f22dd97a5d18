"""Runs retried from a step: what a scripted model is asked, what the new run says, and the command."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cli_process import Place
from scripted_team import GOAL, make_folder, team

from agentic_flow.client import AsyncClient
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.settings import Settings, load
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest


def settings_at(place: Path, provider: FakeProvider) -> Settings:
    flags: dict[str, object] = {
        "data_dir": str(place / "data"),
        "gateway.openai.base_url": provider.openai_url,
        "gateway.openai.api_key": "test-key",
        "gateway.model": "openai:some-model",
    }
    return load(flags, environ={}, directory=place, user_config=place / "none.toml").settings


def agent(step_id: str, *needs: str) -> dict[str, Any]:
    """A step of an agent that is asked for the step's name."""
    return {"id": step_id, "needs": list(needs), "agent": {"prompt": f"Say {step_id}.", "tools": []}}


def write_flow(place: Path, **more: Any) -> Path:
    """First `a`; then `b` and `d` at once; then `c`, which needs `b`."""
    flow = place / "flow.yaml"
    steps = [agent("a"), agent("b", "a"), agent("d", "a"), agent("c", "b", "d")]
    flow.write_text(json.dumps({"name": "w", "steps": steps, **more}), "utf-8")
    return flow


def test_kept_steps_ask_no_model_and_the_budget_counts_anew(tmp_path: Path) -> None:
    """Catches a kept model call that is made again, a lost result, and a budget that kept calls used up."""
    is_away = [True]

    def answer(request: SeenRequest) -> Reply:
        if request.last_text == "Say b." and is_away[0]:
            return Reply.error(400, "not now")
        return Reply.text(f"said to {request.last_text!r}", input_tokens=9000)

    async def main(provider: FakeProvider) -> None:
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client, asyncio.timeout(60):
            failed = await client.workflows.run(write_flow(tmp_path, tokens_max=25_000))
            assert failed.state == "failed"
            count = len(provider.requests)
            assert sorted({request.last_text for request in provider.requests}) == [
                "Say a.",
                "Say b.",
                "Say d.",
            ]
            is_away[0] = False
            new = await client.runs.retry(failed.run_id, idempotency_key="k")
            done = await client.runs.wait(new)
            assert (done.state, done.retry_of) == ("completed", failed.run_id), done.error
            assert [request.last_text for request in provider.requests[count:]] == ["Say b.", "Say c."]
            assert done.workflow is not None
            assert {step.state for step in done.workflow.steps} == {"completed"}
            assert await client.runs.retry(failed.run_id, idempotency_key="k") == new
            with pytest.raises(Conflict):
                await client.runs.retry(failed.run_id, from_step="a", idempotency_key="k")
            with pytest.raises(NotFound) as unknown:
                await client.runs.retry(new, from_step="x")
            assert unknown.value.hint == "there are plan, a, b, d, c"
            with pytest.raises(Conflict):
                await client.runs.retry(new)
            assert (await client.runs.show(failed.run_id)).retry_of is None
            again = await client.runs.wait(await client.runs.retry(new, from_step="c"))
            assert (again.state, again.answer) == ("completed", done.answer)
            assert [request.last_text for request in provider.requests[count + 2 :]] == ["Say c."]

    with FakeProvider(answer) as provider:
        asyncio.run(main(provider))


def test_a_team_is_retried_from_one_of_its_agents(tmp_path: Path) -> None:
    """Catches a team's other agents asked again, and an answer or a memory that the retry spoils."""

    async def main(provider: FakeProvider) -> None:
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client, asyncio.timeout(60):
            first = await client.run(GOAL, input=make_folder(tmp_path), agents=2)
            assert first.state == "completed"
            agents = {step.agent for step in await client.runs.steps(first.run_id)}
            asked = len(provider.requests)
            new = await client.runs.retry(first.run_id, from_step="merge")
            second = await client.runs.wait(new)
            assert (second.state, second.answer) == ("completed", first.answer), second.error
            assert second.citations == first.citations
            assert second.notes == first.notes
            assert 1 <= len(provider.requests) - asked < asked / 2
            assert {step.agent for step in await client.runs.steps(new)} == agents

    with FakeProvider(team) as provider:
        asyncio.run(main(provider))


def test_the_command_retries_over_http(tmp_path: Path) -> None:
    """Catches a command, a route or a twin that loses the step, and refusals without the names there are."""
    place = Place(tmp_path)

    def answer(request: SeenRequest) -> Reply:
        return Reply.text(f"said to {request.last_text!r}")

    with FakeProvider(answer) as provider:
        model = {
            "AGENTIC_FLOW_GATEWAY__OPENAI__BASE_URL": provider.openai_url,
            "AGENTIC_FLOW_GATEWAY__OPENAI__API_KEY": "k",
            "AGENTIC_FLOW_GATEWAY__MODEL": "openai:some-model",
            "AGENTIC_FLOW_MEMORY__ENABLED": "false",
        }

        async def first(url: str) -> str:
            async with AsyncClient(url) as client:
                return (await client.workflows.run(write_flow(tmp_path))).run_id

        with place.start("serve", "platform", **model) as server:
            url = server.addresses(1)["platform"]
            run_id = asyncio.run(first(url))
            asked = len(provider.requests)
            there = {"AGENTIC_FLOW_PEERS__SWARM_URL": url}
            refused = place.run("runs", "retry", run_id, "--from", "e", **there)
            assert refused.code != 0
            assert "plan, a, b, d, c" in refused.err
            done = place.run("runs", "retry", run_id, "--from", "d", "--json", **there)
            assert done.code == 0, done.err
            assert (done.data["retry_of"], done.data["state"]) == (run_id, "completed")
        assert [request.last_text for request in provider.requests[asked:]] == ["Say d.", "Say c."]
