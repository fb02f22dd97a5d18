"""Agents that do not end, and limits of nothing: each has an outcome that is told.

The other cases of bad input are where what they try is tested: teams and roles in `test_run_teams`, workflows
in `test_workflow_spec` and `test_workflows`, tools in `test_tools_toolbox`, clocks in `tests/simulation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_team import team
from test_run_teams import WORKER, run

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.testing.fake_provider import Reply
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio


async def test_an_agent_that_loops_is_stopped(tmp_path: Path) -> None:
    """Catches an agent that asks for the same tool for ever, and a team that waits for it."""

    def script(request: SeenRequest) -> Reply:
        if WORKER in request.text:
            return Reply.tool_calls([{"name": "file_read", "arguments": {"path": "kettle.py"}}])
        return team(request)

    ran = await run(tmp_path, script, steps_max=3)
    assert ran.result.state == "failed"
    assert "no answer within 3 model calls" in (ran.result.error or {})["detail"]
    looped = [agent for agent in ran.result.agents if agent.role == "worker"]
    assert looped
    assert all(agent.state != "completed" and agent.usage.model_calls == 3 for agent in looped)


@pytest.mark.parametrize("limit", ["budget_usd", "deadline_s", "tokens_max", "steps_max"])
async def test_a_limit_of_nothing_is_refused(tmp_path: Path, limit: str) -> None:
    """Catches a limit of zero that is taken for none, or that starts a run which can do nothing."""
    options: dict[str, Any] = {limit: 0}
    with pytest.raises(AgenticFlowError) as refused:
        await run(tmp_path, **options)
    assert limit in refused.value.message
    assert refused.value.exit_code == 2
