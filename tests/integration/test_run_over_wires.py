"""A whole run through real HTTP: both wire formats, streaming and not, and every way a provider can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_team import ANSWER_LINE, FILES, GOAL, TRUE_CITATION, make_folder, team

from agentic_flow.client import AsyncClient
from agentic_flow.core.settings import Settings, load
from agentic_flow.swarm.runs import RunResult
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio


def settings_for(
    provider: FakeProvider, data_dir: Path, wire: str, *, stream: bool, **more: object
) -> Settings:
    url = provider.anthropic_url if wire == "anthropic" else provider.openai_url
    flags: dict[str, object] = {
        "data_dir": str(data_dir),
        f"gateway.{wire}.base_url": url,
        f"gateway.{wire}.api_key": "test-key",
        "gateway.model": f"{wire}:some-model",
        "gateway.stream": stream,
        "gateway.backoff_s": 0.01,
        "gateway.idle_timeout_s": 30.0,
        "gateway.timeout_s": 60.0,
        **more,
    }
    return load(flags, environ={}, directory=data_dir, user_config=data_dir / "none.toml").settings


async def run(settings: Settings, folder: Path, topology: str = "hierarchical", **more: Any) -> RunResult:
    async with AsyncClient(settings=settings) as client:
        return await client.run(GOAL, input=str(folder), topology=topology, agents=2, **more)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("wire", ["anthropic", "openai"])
async def test_a_team_answers_over_each_wire(tmp_path: Path, wire: str, stream: bool) -> None:
    """Catches a format that loses tool calls, results or the answer, and citations that are not checked."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        result = await run(settings_for(provider, tmp_path, wire, stream=stream), folder)
        assert provider.refused == []
        assert all(request.stream is stream for request in provider.requests)
    assert result.state == "completed", result.error
    assert ANSWER_LINE in result.answer
    assert [c.label for c in result.citations] == [TRUE_CITATION, "listeners.py:1-3"]
    lines = FILES["kettle.py"].splitlines()
    assert result.citations[0].quote == "\n".join(lines[3:8])
    assert any("README.md:40-50" in note and "3 lines" in note for note in result.notes), result.notes
    assert any("thermostat.py:1-2" in note for note in result.notes), result.notes
    assert result.model == f"{wire}:some-model"
    # planner 1, two workers of three calls each, reviewer 1, synthesizer 1; each worker calls three tools
    assert (result.usage.model_calls, result.usage.tool_calls) == (9, 6)
    assert result.usage.input_tokens == 9 * 20
    assert {(agent.name, agent.role) for agent in result.agents} >= {
        ("planner", "planner"),
        ("worker-1", "worker"),
        ("worker-2", "worker"),
        ("reviewer", "reviewer"),
        ("synthesizer", "synthesizer"),
    }


@pytest.mark.parametrize("topology", ["mesh", "ring", "star", "adaptive"])
async def test_every_topology_answers(tmp_path: Path, topology: str) -> None:
    """Catches a topology that only works on paper."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        result = await run(settings_for(provider, tmp_path, "openai", stream=True), folder, topology)
        assert provider.refused == []
    assert result.state == "completed", result.error
    assert result.citations[0].label == TRUE_CITATION


async def test_a_rejected_claim_is_dropped(tmp_path: Path) -> None:
    """Catches a reviewer whose verdict changes nothing."""
    folder = make_folder(tmp_path)

    def script(request: SeenRequest) -> Reply:
        if "Claims with the lines they cite" in request.last_text:
            return Reply.text(
                '{"verdicts": [{"claim": 1, "supported": false, "reason": "no"}, '
                '{"claim": 2, "supported": false, "reason": "no"}]}'
            )
        return team(request)

    with FakeProvider(script) as provider:
        result = await run(settings_for(provider, tmp_path, "anthropic", stream=False), folder)
    assert result.state == "completed"
    assert result.citations == ()
    assert "No evidence was found" in result.answer
    assert any("rejected 2 claim" in note for note in result.notes)


FAULTS: dict[str, Reply] = {
    "429": Reply.error(429, "slow down", retry_after="0"),
    "500": Reply.error(500, "broken"),
    "broken json": Reply.broken("broken_json"),
    "truncated": Reply.broken("truncated"),
    "no terminal event": Reply.broken("no_terminal"),
    "reset": Reply.broken("reset"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
async def test_a_provider_that_keeps_failing_fails_the_run_truthfully(tmp_path: Path, fault: str) -> None:
    """Catches unbounded retries, a run that hangs, and a failed run that claims to be completed."""
    folder = make_folder(tmp_path)
    with FakeProvider(lambda _: FAULTS[fault]) as provider:
        result = await run(settings_for(provider, tmp_path, "openai", stream=True), folder)
        tries = len(provider.requests)
    assert result.state == "failed"
    assert result.error is not None
    assert result.error["code"].startswith("provider_")
    # The planner and the worker that replaces the plan each give up after gateway.attempts tries.
    assert 4 <= tries <= 3 * 4
    assert result.answer == ""


async def test_a_fault_in_passing_is_survived(tmp_path: Path) -> None:
    """Catches retries that do not happen, or that happen although the answer came."""
    folder = make_folder(tmp_path)
    failing = iter([Reply.error(500), Reply.broken("truncated"), Reply.error(429, retry_after="0")])

    def script(request: SeenRequest) -> Reply:
        return next(failing, None) or team(request)

    with FakeProvider(script) as provider:
        result = await run(settings_for(provider, tmp_path, "anthropic", stream=True), folder)
        assert len(provider.requests) == 9 + 3
    assert result.state == "completed"


async def test_a_stalled_provider_does_not_hang_the_run(tmp_path: Path) -> None:
    """Catches a model call without an effective time-out."""
    folder = make_folder(tmp_path)
    with FakeProvider(lambda _: Reply.broken("hang_mid")) as provider:
        settings = settings_for(
            provider,
            tmp_path,
            "openai",
            stream=True,
            **{"gateway.idle_timeout_s": 0.3, "gateway.attempts": 1},
        )
        result = await run(settings, folder)
    assert result.state == "failed"


async def test_a_budget_stops_the_run_before_the_money_is_spent(tmp_path: Path) -> None:
    """Catches a budget that is only decoration, and one that is kept silently without knowing prices."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        priced = settings_for(
            provider,
            tmp_path,
            "openai",
            stream=False,
            **{"gateway.prices_usd_per_mtok": {"some-model": [1000.0, 1000.0]}},
        )
        result = await run(priced, folder, budget_usd=0.001)
        assert provider.requests == []
    assert result.state == "failed"
    assert result.error is not None
    assert result.error["code"] == "budget_exceeded"


async def test_forbidden_paths_stay_unseen(tmp_path: Path) -> None:
    """Catches a forbidden file that reaches a model through memory, search, reading or a citation."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        settings = settings_for(provider, tmp_path, "openai", stream=False)
        first = await run(settings, folder)
        before = len(provider.requests)
        second = await run(settings, folder, paths_forbidden=["kettle.py"])
        seen = "".join(str(request.body) for request in provider.requests[before:])
    assert first.citations
    assert "LIMIT_CELSIUS" not in seen
    assert all(citation.path != "kettle.py" for citation in second.citations)
