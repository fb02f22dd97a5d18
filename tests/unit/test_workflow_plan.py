"""The plan of a workflow: random graphs with random outcomes, seen to their end."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.swarm.workflow_check import check_spec
from agentic_flow.swarm.workflow_plan import Outcome, Plan, Start, advance, conclude
from agentic_flow.swarm.workflow_spec import WorkflowSpec, given_inputs

ERROR = {"type": "about:blank", "code": "invalid_input", "title": "x", "detail": "it broke", "status": 400}


def tool(name: str, **options: Any) -> dict[str, Any]:
    return {"id": name, "tool": {"name": "file_list"}, **options}


def workflow(*steps: dict[str, Any], **options: Any) -> WorkflowSpec:
    spec = WorkflowSpec.model_validate({"name": "test", "steps": list(steps), **options})
    assert check_spec(spec) == []
    return spec


@dataclass
class Played:
    """A workflow as it was played: what started in which order, and how it came out."""

    started: list[Start] = field(default_factory=list[Start])
    results: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    most_at_once: int = 0
    most_of_one: Counter[str] = field(default_factory=Counter[str])
    plan: Plan | None = None

    def outcome(self, name: str) -> Outcome:
        assert self.plan is not None
        return self.plan.outcomes[name]

    def states(self) -> dict[str, str]:
        assert self.plan is not None
        return {name: outcome.state for name, outcome in self.plan.outcomes.items()}


def play(
    spec: WorkflowSpec,
    inputs: dict[str, Any] | None = None,
    *,
    fails: set[str] | None = None,
    seed: int = 0,
    outputs: dict[str, Any] | None = None,
) -> Played:
    """Run a plan to its end; work ends in the order of the seed, and `fails` names keys."""
    rng = random.Random(seed)
    values = given_inputs(spec, inputs or {})
    played, running = Played(), list[str]()
    for _ in range(10_000):
        plan = played.plan = advance(spec, values, played.results, running)
        assert plan == advance(spec, values, dict(played.results), list(running)), "not deterministic"
        for start in plan.start:
            assert start.key not in played.results
            assert start.key not in running
            played.started.append(start)
            running.append(start.key)
        played.most_at_once = max(played.most_at_once, len(running))
        for name, count in Counter(key.partition("-")[0] for key in running).items():
            played.most_of_one[name] = max(played.most_of_one[name], count)
        if plan.over:
            assert not running
            return played
        assert running, "nothing runs, nothing starts, and it is not over"
        key = running.pop(rng.randrange(len(running)))
        if key in (fails or set()):
            played.results[key] = Outcome("failed", error=ERROR)
        else:
            played.results[key] = Outcome("completed", (outputs or {}).get(key, {"key": key}))
    raise AssertionError("it does not end")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[WorkflowSpec, set[str]]:
    """Random graphs with every policy, and the keys whose work fails."""
    count = draw(st.integers(1, 9))
    names = [f"s{number}" for number in range(count)]
    steps: list[dict[str, Any]] = []
    keys: list[str] = []
    for number, name in enumerate(names):
        step = tool(
            name,
            needs=draw(st.lists(st.sampled_from(names[:number]), unique=True, max_size=3)) if number else [],
        )
        step["start_when"] = draw(st.sampled_from(["all", "all", "any", "ended"]))
        step["on_failure"] = draw(st.sampled_from(["fail", "continue", "continue", "fallback"]))
        if draw(st.booleans()) and draw(st.booleans()):
            step["when"] = draw(st.sampled_from(["inputs.yes", "not inputs.yes"]))
        if step["on_failure"] == "fallback":
            step["fallback"] = f"f{number}"
            steps.append(tool(f"f{number}"))
            keys.append(f"f{number}")
        elif draw(st.booleans()):
            step["fan_out"] = {"over": "inputs.many", "parallel_max": draw(st.integers(1, 3))}
            keys += [f"{name}-{item}" for item in range(1, 5)]
        keys.append(name)
        steps.append(step)
    fails = draw(st.sets(st.sampled_from(keys)))
    spec = workflow(
        *steps,
        inputs={
            "yes": {"type": "boolean", "default": True},
            "many": {"type": "list", "default": [1, 2, 3, 4]},
        },
        parallel_max=draw(st.integers(1, 5)),
    )
    return spec, fails


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_every_workflow_ends_and_keeps_its_order(graph: tuple[WorkflowSpec, set[str]], seed: int) -> None:
    """Catches a workflow that hangs, repeats work, starts before its needs, or runs more than it may."""
    spec, fails = graph
    played = play(spec, fails=fails, seed=seed)
    assert played.plan is not None
    assert set(played.plan.outcomes) == {step.id for step in spec.steps}
    assert max(Counter(start.key for start in played.started).values(), default=0) <= 1
    assert played.most_at_once <= spec.parallel_max
    for step in spec.steps:
        if step.fan_out is not None:
            assert played.most_of_one[step.id] <= step.fan_out.parallel_max
    started = {start.step for start in played.started}
    states = played.states()
    for step in spec.steps:
        if step.id not in started or step.id in spec.fallbacks:
            continue
        for need in step.needs:
            passed = states[need] == "completed" or spec.step(need).on_failure == "continue"
            assert step.start_when != "all" or passed
            if step.start_when == "all" and states[need] == "skipped":
                pytest.fail(f"{step.id} ran although {need} was skipped")


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_what_is_called_completed_was_done(graph: tuple[WorkflowSpec, set[str]], seed: int) -> None:
    """Catches a workflow called completed of whose final steps none was done, or which hides a failure."""
    spec, fails = graph
    played = play(spec, fails=fails, seed=seed)
    assert played.plan is not None
    outputs, failure = conclude(spec, given_inputs(spec, {}), played.plan.outcomes)
    states = played.states()
    fatal = [
        s.id
        for s in spec.steps
        if states[s.id] == "failed" and s.on_failure != "continue" and s.id not in spec.fallbacks
    ]
    if fatal or not any(states[name] == "completed" for name in spec.final):
        assert isinstance(failure, AgenticFlowError)
        assert outputs == {}
    else:
        assert failure is None
        assert set(outputs) == {name for name in spec.final if states[name] == "completed"}


@settings(max_examples=40, deadline=None)
@given(graphs(), st.integers(0, 1000), st.integers(0, 1000))
def test_the_outcome_does_not_hang_on_who_was_faster(
    graph: tuple[WorkflowSpec, set[str]], one: int, other: int
) -> None:
    """Catches outcomes that depend on the order of events where no failure cuts the workflow short."""
    spec, fails = graph
    lasting = {key for key in fails if spec.step(key.partition("-")[0]).on_failure == "continue"}
    first, second = play(spec, fails=lasting, seed=one), play(spec, fails=lasting, seed=other)
    assert first.states() == second.states()
    assert {start.key for start in first.started} == {start.key for start in second.started}


def test_a_skipped_step_takes_those_that_need_it_with_it() -> None:
    """Catches a skip that does not spread, and a join that waits for a branch not taken."""
    spec = workflow(
        tool("a", when="false"),
        tool("b", needs=["a"]),
        tool("c"),
        tool("d", needs=["b", "c"], start_when="any"),
        tool("e", needs=["b"], start_when="ended"),
        tool("f", needs=["b", "a"], start_when="any"),
    )
    played = play(spec)
    assert played.states() == {
        "a": "skipped", "b": "skipped", "c": "completed", "d": "completed", "e": "completed", "f": "skipped",
    }  # fmt: skip
    assert "'a' was skipped" in played.outcome("b").reason


def test_all_skipped_is_not_completed() -> None:
    """Catches a workflow that did nothing and says that it completed."""
    spec = workflow(tool("a", when="false"), tool("b", needs=["a"]))
    played = play(spec)
    assert played.plan is not None
    _, failure = conclude(spec, {}, played.plan.outcomes)
    assert failure is not None
    assert "b: skipped" in failure.message


def test_a_fallback_stands_in() -> None:
    """Catches a fallback that does not run, does not see the error, or whose output is not the step's."""
    spec = workflow(
        tool("a", on_failure="fallback", fallback="spare"),
        {"id": "spare", "tool": {"name": "file_list", "arguments": {"path": "{{ steps.a.error.detail }}"}}},
        tool("b", needs=["a"]),
        outputs={"got": "{{ steps.a.output.key }}"},
    )
    played = play(spec, fails={"a"})
    assert [start.key for start in played.started] == ["a", "spare", "b"]
    assert played.started[1].work == {"path": "it broke"}
    assert played.plan is not None
    assert conclude(spec, {}, played.plan.outcomes) == ({"got": "spare"}, None)
    assert play(spec).states() == {"a": "completed", "spare": "skipped", "b": "completed"}


def test_a_fan_out_gives_its_outputs_in_order() -> None:
    """Catches items lost or mixed up, a failed item that is hidden, and a list that is too long but taken."""
    spec = workflow(
        {
            "id": "each",
            "fan_out": {"over": "inputs.many", "parallel_max": 2, "items_max": 4},
            "on_failure": "continue",
            "tool": {"name": "file_read", "arguments": {"path": "{{ item }}", "n": "{{ index }}"}},
        },
        inputs={"many": {"type": "list"}},
    )
    played = play(spec, {"many": ["x", "y", "z"]}, fails={"each-2"}, seed=3)
    assert [start.work for start in played.started] == [
        {"path": "x", "n": 0}, {"path": "y", "n": 1}, {"path": "z", "n": 2},
    ]  # fmt: skip
    assert played.outcome("each").output == [{"key": "each-1"}, None, {"key": "each-3"}]
    assert played.outcome("each").reason.startswith("1 of 3 items failed")
    assert play(spec, {"many": []}).outcome("each").output == []
    assert play(spec, {"many": ["x"]}, fails={"each-1"}).outcome("each").state == "failed"
    too_long = play(spec, {"many": [1, 2, 3, 4, 5]})
    assert not too_long.started
    assert "has 5 entries" in str(too_long.outcome("each").error)


def test_a_name_without_a_value_fails_the_step_that_uses_it() -> None:
    """Catches a missing value that is filled in as nothing, or an error that does not say where and what."""
    spec = workflow(
        tool("a"),
        {"id": "b", "needs": ["a"], "agent": {"prompt": "Say {{ steps.a.output.nothing }}"}},
    )
    played = play(spec)
    error = played.outcome("b").error
    assert error is not None
    for word in ("'b'", "steps.a.output.nothing", "'nothing'"):
        assert word in str(error["detail"])
    assert "key" in str(error.get("hint"))


def test_a_long_chain_is_planned_in_time_that_grows_with_its_length() -> None:
    """Catches planning whose cost explodes: 150 steps in a chain are 150 turns."""
    names = [f"s{number}" for number in range(150)]
    spec = workflow(*(tool(name, needs=names[i - 1 : i] if i else []) for i, name in enumerate(names)))
    assert len(play(spec).started) == 150
