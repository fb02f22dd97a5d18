"""The picture of a run that is folded from its events."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.run_view import RunView
from agentic_flow.swarm.runs import AgentReport, RunEvent, RunResult, RunUsage


def events(*listed: tuple[str, str, str | None, dict[str, Any]]) -> list[RunEvent]:
    """Events one second apart, from (kind, agent, name, data)."""
    return [
        RunEvent.model_validate(
            {"sequence": n, "kind": kind, "at_s": 100.0 + n, "agent": agent, "name": name, "data": data}
        )
        for n, (kind, agent, name, data) in enumerate(listed, start=1)
    ]


MESH = events(
    ("run_accepted", "run", None, {}),
    ("run_started", "run", None, {}),
    ("step_finished", "run", "ingest", {}),
    (
        "step_finished",
        "run",
        "assign",
        {"assignments": [{"key": f"draft-{i}", "agent": f"peer-{i}", "role": "worker"} for i in (1, 2)]},
    ),
    ("agent_started", "draft-1", None, {}),
    ("agent_started", "draft-2", None, {}),
    ("step_finished", "draft-1", "model", {}),
    ("agent_started", "draft-1.ask-1", None, {}),
    ("step_finished", "draft-1.ask-1", "model", {}),
    ("agent_finished", "draft-1.ask-1", None, {"state": "completed"}),
    ("step_finished", "draft-2", "tool:file_read", {"error": {"detail": "no such\nfile"}}),
    ("agent_finished", "draft-2", None, {"state": "failed", "error": {"detail": "no such file"}}),
    ("agent_finished", "draft-1", None, {"state": "completed"}),
    (
        "step_finished",
        "run",
        "assign",
        {"assignments": [{"key": "revise-2-1", "agent": "peer-1", "role": "worker"}]},
    ),
    ("agent_started", "revise-2-1", None, {}),
    ("step_finished", "revise-2-1", "model", {}),
    ("agent_finished", "revise-2-1", None, {"state": "completed"}),
    ("run_finished", "run", None, {"state": "completed", "error": None}),
)


def folded(listed: list[RunEvent]) -> RunView:
    view = RunView("run-1")
    for event in listed:
        view.take(event)
    return view


def test_agents_are_one_row_with_those_they_asked_below_them() -> None:
    """Catches a row for each assignment of an agent, delegates beside their askers, and lost failures."""
    view = folded(MESH)
    assert [(depth, row.name, row.state, row.steps) for depth, row in view.tree()] == [
        (0, "peer-1", "completed", 2),
        (1, "ask-1", "completed", 1),
        (0, "peer-2", "failed", 1),
    ]
    peer = view.tree()[0][1]
    assert peer.elapsed_s(1e9) == (113 - 105) + (117 - 115)
    assert (view.state, view.ended, view.elapsed_s(1e9)) == ("completed", True, 17.0)


def test_progress_counts_what_is_known_and_lines_are_lines() -> None:
    """Catches a bar that is full while an agent works, and problems that break a log's lines."""
    view = RunView("run-1")
    lines = [view.take(event) for event in MESH[:-3]]
    assert view.progress() == (3, 4)
    assert "peer-2: tool:file_read failed: no such file" in lines
    assert all(line is not None and "\n" not in line for line in lines)


def test_roles_that_need_no_model_are_over_with_their_batch() -> None:
    """Catches a finished run whose bar is not full, and a lead whose work is called none."""

    def assign(key: str, agent: str) -> tuple[str, str, str, dict[str, Any]]:
        return "step_finished", "run", "assign", {"assignments": [{"key": key, "agent": agent}]}

    listed = events(
        assign("plan-1", "lead-1"),
        ("agent_started", "plan-1", None, {}),
        ("agent_finished", "plan-1", None, {"state": "completed"}),
        assign("report-1", "lead-1"),
        assign("review", "reviewer"),
        ("run_finished", "run", None, {"state": "completed"}),
    )
    states = [[row.state for _, row in folded(listed[:n]).tree()] for n in (4, 5, 6)]
    assert states == [["waiting"], ["completed", "waiting"], ["completed", "no part"]]
    assert folded(listed[:5]).progress() == (2, 3)
    assert folded(listed).progress() == (3, 3)


@given(st.lists(st.tuples(st.integers(0, len(MESH)), st.integers(0, len(MESH))), max_size=6))
def test_a_stream_opened_again_changes_nothing(cuts: list[tuple[int, int]]) -> None:
    """Catches events that count twice when a stream repeats what was seen before it was cut."""
    again = RunView("run-1")
    reached = 0
    for start, stop in cuts:
        for event in MESH[min(start, reached) : stop]:
            again.take(event)
        reached = max(reached, stop)
    for event in MESH[reached:]:
        again.take(event)
    assert again == folded(MESH)


def test_what_agents_used_is_found_while_they_work_and_afterwards() -> None:
    """Catches tokens of a running agent, which is reported under its path, that reach no row."""

    def told(*reports: tuple[str, int, float | None]) -> RunResult:
        return RunResult(
            run_id="run-1",
            state="running",
            goal="g",
            topology="mesh",
            model="m",
            answer="",
            usage=RunUsage(input_tokens=7, cost_usd=None),
            agents=tuple(
                AgentReport(
                    name=name,
                    role="worker",
                    model="m",
                    state="unfinished",
                    steps=1,
                    usage=RunUsage(input_tokens=tokens, cost_usd=cost),
                )
                for name, tokens, cost in reports
            ),
        )

    view = folded(MESH[:-2])
    view.account(told(("peer-1", 3, 0.5), ("peer-1", 4, 0.25), ("draft-1-ask-1", 2, None)))
    used = {row.name: (row.tokens, row.cost_usd) for _, row in view.tree()}
    assert used == {"peer-1": (7, 0.75), "ask-1": (2, None), "peer-2": (None, 0.0)}
    view.account(told(("peer-1", 3, 0.5)))
    assert view.tree()[0][1].tokens == 3
    assert (view.tokens, view.cost_usd) == (7, None)
