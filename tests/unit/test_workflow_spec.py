"""Workflow files: how they are read, and everything that is found wrong with one before it runs."""

# ruff: noqa: E501 - tables of cases read better one to a line
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, PathNotFound, TooLarge
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.workflow_check import check_spec, check_text, find_cycle
from agentic_flow.swarm.workflow_file import FILE_MAX_BYTES, parse_document, read_workflow_file
from agentic_flow.swarm.workflow_spec import Problem, Surroundings, WorkflowSpec, given_inputs

READ = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
AROUND = Surroundings(
    tools={"file_read": READ, "file_list": {"type": "object", "properties": {}}},
    agents=frozenset({"researcher", "reviewer"}),
    refused_models={"gpt-nonsense": "no provider serves 'gpt-nonsense'"},
    settings=SwarmSettings(),
)
GOOD = """\
name: good
inputs:
  files: {type: list}
  question: {default: "Why?"}
steps:
  - id: read
    fan_out: {over: inputs.files}
    tool: {name: file_read, arguments: {path: "{{ item }}"}}
  - id: answer
    needs: [read]
    when: steps.read.output | length > 0
    agent: {prompt: "{{ inputs.question }} {% for one in steps.read.output %}{{ one.content }}{% endfor %}"}
outputs:
  answer: "{{ steps.answer.output.text | default('nothing to read') }}"
"""


def found(text: str, around: Surroundings | None = AROUND, written: Any = "yaml") -> dict[str, Problem]:
    """Place → problem."""
    spec, problems = check_text(text, written, around)
    assert (spec is None) == bool(problems)
    return {problem.path: problem for problem in problems}


def steps(*lines: str) -> str:
    """A workflow of these steps, each in YAML's flow style."""
    return "name: w\ninputs: {files: {type: list}, name: {}}\nsteps:\n" + "".join(
        f"  - {line}\n" for line in lines
    )


def test_a_good_workflow_has_no_problems() -> None:
    """Catches a check that refuses what it should let through, in the file and in Python."""
    assert found(GOOD) == {}
    spec, _ = check_text(GOOD, "yaml", AROUND)
    assert spec is not None
    assert check_spec(spec, AROUND) == []
    assert WorkflowSpec.model_validate_json(spec.model_dump_json(exclude_unset=True)) == spec


def test_toml_says_the_same() -> None:
    """Catches a format that reads differently."""
    text = """
name = "w"
[inputs.files]
type = "list"
[[steps]]
id = "read"
fan_out = { over = "inputs.files" }
tool = { name = "file_read", arguments = { path = "{{ item }}" } }
"""
    yaml = "name: w\ninputs: {files: {type: list}}\nsteps:\n- id: read\n  fan_out: {over: inputs.files}\n"
    yaml += '  tool: {name: file_read, arguments: {path: "{{ item }}"}}\n'
    assert check_text(text, "toml")[0] == check_text(yaml, "yaml")[0] is not None
    (problem,) = found("name = \n", written="toml").values()
    assert "line 1" in problem.message


LIST = "tool: {name: file_list}"


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        (steps("{id: a, needs: [b], " + LIST + "}", "{id: b, needs: [a], " + LIST + "}"), "steps.0.needs", "a → b → a"),
        (steps("{id: a, needs: [a], " + LIST + "}"), "steps.0.needs", "a → a"),
        (steps("{id: aa, " + LIST + "}", "{id: b, needs: [ab], " + LIST + "}"), "steps.1.needs", "no step 'ab'"),
        (steps("{id: a, " + LIST + "}", "{id: a, " + LIST + "}"), "steps.1.id", "steps.0"),
        (steps("{id: a, tool: {name: file_raed}}"), "steps.0.tool.name", "file_raed"),
        (steps("{id: a, tool: {name: file_read}}"), "steps.0.tool.arguments", "'path'"),
        (steps("{id: a, tool: {name: file_read, arguments: {path: x, x: 1}}}"), "steps.0.tool.arguments.x", "'x'"),
        (steps("{id: a, agent: {prompt: x, role: king}}"), "steps.0.agent.role", "king"),
        (steps("{id: a, agent: {prompt: x, definition: nobody}}"), "steps.0.agent.definition", "nobody"),
        (steps("{id: a, agent: {prompt: x, model: gpt-nonsense}}"), "steps.0.agent.model", "no provider"),
        (steps("{id: a, agent: {prompt: x, tools: [hammer]}}"), "steps.0.agent.tools.0", "hammer"),
        (steps("{id: a, agent: {prompt: x, steps_max: 13}}"), "steps.0.agent.steps_max", "above"),
        (steps("{id: a, team: {goal: x, roles: {worker: {agent: no}}}}"), "steps.0.team.roles.worker.agent", "'no'"),
        (steps("{id: a, team: {goal: x, topology: star, reviewers: 2}}"), "steps.0.team", "star"),
        (steps("{id: a, team: {goal: x, topology: blob}}"), "steps.0.team", "blob"),
        (steps("{id: a, team: {goal: x, budget_usd: 1}}"), "steps.0.team.budget_usd", "whole workflow"),
        (steps('{id: a, agent: {prompt: "{{ inputs.nme }}"}}'), "steps.0.agent.prompt", "'nme'"),
        (steps('{id: a, agent: {prompt: "{{ foo }}"}}'), "steps.0.agent.prompt", "'foo'"),
        (steps('{id: a, agent: {prompt: "{{ item }}"}}'), "steps.0.agent.prompt", "fan_out"),
        (steps('{id: a, agent: {prompt: "{{ steps.b.output }}"}}'), "steps.0.agent.prompt", "no step 'b'"),
        (steps('{id: a, agent: {prompt: "{{ inputs.name() }}"}}'), "steps.0.agent.prompt", "call is not offered"),
        (steps('{id: a, agent: {prompt: "{{ 9 ** 9 }}"}}'), "steps.0.agent.prompt", "pow is not offered"),
        (steps('{id: a, agent: {prompt: "{% include x %}"}}'), "steps.0.agent.prompt", "include is not offered"),
        (steps('{id: a, agent: {prompt: "{{ inputs.name | attr(1) }}"}}'), "steps.0.agent.prompt", "no filter 'attr'"),
        (steps('{id: a, agent: {prompt: "{{ x"}}'), "steps.0.agent.prompt", "cannot be read"),
        (steps("{id: a, fan_out: {over: inputs.name}, " + LIST + "}"), "steps.0.fan_out.over", "string, no list"),
        (steps("{id: a, fan_out: {over: \"'abc'\"}, " + LIST + "}"), "steps.0.fan_out.over", "no list"),
        (steps("{id: a, fan_out: {over: inputs.files, items_max: 1001}, " + LIST + "}"), "steps.0.fan_out.items_max", "1000"),
        (steps("{id: a, fallback: b, " + LIST + "}", "{id: b, " + LIST + "}"), "steps.0", "never used"),
        (steps("{id: a, on_failure: fallback, " + LIST + "}"), "steps.0", "no fallback step"),
        (steps("{id: a, on_failure: fallback, fallback: b, " + LIST + "}", "{id: b, when: 'true', " + LIST + "}"), "steps.1.when", "fallback"),
        (steps("{id: a}"), "steps.0", "exactly one"),
        (steps("{id: a, agent: {prompt: x}, " + LIST + "}"), "steps.0", "exactly one"),
        (steps("{id: a, approval: {question: x}, " + LIST + "}"), "steps.0", "exactly one"),
        (steps("{id: a, approval: {question: x}, retry: {attempts: 2}}"), "steps.0", "no retry"),
        (steps("{id: a, approval: {question: x, default: maybe}}"), "steps.0.approval", "'maybe' is no option"),
        (steps('{id: a, approval: {question: "{{ inputs.nme }}"}}'), "steps.0.approval.question", "'nme'"),
        (steps("{id: a, approval: {question: x}}", '{id: b, needs: [a], agent: {prompt: "{{ steps.a.output.text }}"}}'), "steps.1.agent.prompt", "an approval has no 'text'"),
        (steps("{id: a, wait_for: {signal: go}, retry: {attempts: 2}}"), "steps.0", "waited for once"),
        (steps("{id: a, wait_for: {signal: Go}}"), "steps.0.wait_for.signal", "Go"),
        (steps("{id: a, signal: x, " + LIST + "}"), "steps.0.signal", "a schedule as a whole"),
        (steps("{id: a, timeout: 3, " + LIST + "}"), "steps.0.timeout", "no 'timeout'"),
        (steps("{id: a-b, " + LIST + "}"), "steps.0.id", "a-b"),
        ("schedule: daily\n" + GOOD, "schedule", "valid dictionary"),
        ("schedule: {cron: '0 6 * * * *'}\n" + GOOD, "schedule.cron", "five fields"),
        ("schedule: {cron: '0 6 * * *', timezone: CEST+1}\n" + GOOD, "schedule.timezone", "no such IANA"),
        ("schedule: {every: 60}\n" + GOOD, "schedule.every", "no 'every'"),
        ("schedule: {overlap: allow}\n" + GOOD, "schedule", "exactly one of cron and every_s"),
        ("budget_usd: 0\n" + GOOD, "budget_usd", "greater than 0"),
        ("deadline_s: 5000\n" + GOOD, "deadline_s", "above"),
        ("name: w\nsteps: []\n", "steps", "at least 1"),
        ("name: w\n", "steps", "missing"),
        ("name: w\nsteps: [" + "{id: a}, " * 501 + "]\n", "steps", "501"),
        ("name: w\nname: w\n", "", "'name' is there twice"),
        ("name: w\ninputs: {n: {type: integer, default: x}}\nsteps: [{id: a, " + LIST + "}]", "inputs.n.default", "'x'"),
        ("- 1\n", "", "not a table"),
        ("name: [\n", "", "line 2"),
        ("name: !!python/object/apply:os.system [x]\n", "", "not offered"),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_its_place(text: str, path: str, said: str) -> None:
    """Catches a fault that would only be found while the workflow runs, or told without place and remedy."""
    problems = found(text)
    assert path in problems, problems
    assert said in problems[path].message
    assert problems[path].hint


def test_all_problems_come_at_once_with_their_lines() -> None:
    """Catches a check that stops at the first problem, or that a broken step blinds."""
    text = """\
name: w
steps:
  - id: broken
    colour: red
    tool: {name: file_list}
  - id: b
    needs: [broken, nowhere]
    tool: {name: hammer}
"""
    problems = found(text)
    assert {(one.path, one.line) for one in problems.values()} == {
        ("steps.0.colour", 4), ("steps.1.needs", 7), ("steps.1.tool.name", 8),
    }  # fmt: skip


def test_one_fault_is_told_once() -> None:
    """Catches a wrong step that is reported a second time as too few steps."""
    assert set(found("name: w\nsteps:\n- {id: a}\n")) == {"steps.0"}


def test_an_output_that_may_be_missing_needs_a_default() -> None:
    """Catches the use of an output that is not there when its step was skipped, failed or is not waited for."""
    use = "agent: {prompt: '{{ steps.a.output.n }}'}"
    safe = "agent: {prompt: '{{ steps.a.output.n | default(0) }}'}"
    other = "{id: c, " + LIST + "}"
    assert (
        "does not wait"
        in found(steps("{id: a, " + LIST + "}", "{id: b, " + use + "}"))["steps.1.agent.prompt"].message
    )
    maybe = "{id: a, on_failure: continue, " + LIST + "}"
    assert (
        "may have no output"
        in found(steps(maybe, "{id: b, needs: [a], " + use + "}"))["steps.1.agent.prompt"].message
    )
    assert found(steps(maybe, "{id: b, needs: [a], " + safe + "}")) == {}
    skipped = "{id: a, when: inputs.name, " + LIST + "}"
    assert found(steps(skipped, "{id: b, needs: [a], " + use + "}")) == {}, "then b is skipped as well"
    joined = "{id: b, needs: [a, c], start_when: any, " + use + "}"
    assert "steps.2.agent.prompt" in found(steps(skipped, other, joined))
    assert (
        found(
            steps(
                "{id: a, " + LIST + "}",
                "{id: m, needs: [a], " + LIST + "}",
                "{id: b, needs: [m], " + use + "}",
            )
        )
        == {}
    )
    output = "outputs: {x: '{{ steps.a.output.n }}'}\n"
    assert "outputs.x" in found(steps(skipped) + output)
    assert found(steps("{id: a, " + LIST + "}") + output) == {}


def test_a_bomb_is_refused_before_it_is_built() -> None:
    """Catches aliases that multiply, deep nesting, an endless alias, and files that are too large."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(TooLarge, match="aliases"):
        parse_document("\n".join(lines), "yaml")
    for text in ("a: " + "[" * 60 + "]" * 60, "a: &a [*a]", "a: " + "[" * 5000):
        with pytest.raises(InvalidInput):
            parse_document(text, "yaml")
    with pytest.raises(InvalidInput):
        parse_document("a = " + "[" * 60 + "]" * 60, "toml")
    with pytest.raises(TooLarge):
        parse_document("#" * (FILE_MAX_BYTES + 1), "yaml")


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    """Catches a traceback in place of an error for a missing, misnamed, binary or huge file."""
    with pytest.raises(PathNotFound):
        read_workflow_file(tmp_path / "none.yaml")
    with pytest.raises(InvalidInput, match="no workflow file"):
        read_workflow_file(tmp_path / "x.json")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_workflow_file(tmp_path / "b.yaml")
    (tmp_path / "h.yaml").write_bytes(b"#" * (FILE_MAX_BYTES + 1))
    with pytest.raises(TooLarge):
        read_workflow_file(tmp_path / "h.yaml")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.from_regex(r"[a-z&*\[\]{}:,\-\n \"!<]{0,80}", fullmatch=True))
def test_any_text_is_answered(text: str) -> None:
    """Catches text that gets anything but problems or our errors out of the reader."""
    for written in ("yaml", "toml"):
        spec, problems = check_text(text, written, AROUND)  # pyright: ignore[reportArgumentType]
        assert spec is None
        assert problems


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"), max_size=3).map(tuple), max_size=6
    )
)
def test_a_cycle_is_found_when_there_is_one(needs: dict[str, tuple[str, ...]]) -> None:
    """Catches cycles that are missed or invented: each shown edge must be there."""
    cycle = find_cycle(needs)
    for one, following in itertools.pairwise(cycle):
        assert following in needs[one]
    reach = {name: {need for need in of if need in needs} for name, of in needs.items()}
    for _ in needs:
        reach = {name: of.union(*(reach[one] for one in of)) for name, of in reach.items()}
    assert bool(cycle) == any(name in of for name, of in reach.items())


def test_inputs_are_of_their_kinds() -> None:
    """Catches inputs that are unknown, missing or of another kind but taken."""
    spec, _ = check_text(GOOD, "yaml")
    assert spec is not None
    assert given_inputs(spec, {"files": []}) == {"files": [], "question": "Why?"}
    for wrong in ({}, {"files": "x"}, {"files": [], "fles": []}, {"files": [], "question": 3}):
        with pytest.raises(AgenticFlowError) as caught:
            given_inputs(spec, wrong)
        assert caught.value.details["problems"]
