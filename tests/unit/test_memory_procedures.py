"""Procedures from runs: what stays, what becomes a hole, where its values come from, and filling them in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput
from agentic_flow.memory.procedures import (
    HOLES_MAX,
    Procedure,
    Trace,
    TraceStep,
    fill,
    generalise,
    likeness,
    read_task,
    shown,
    trace_of,
    written,
)
from agentic_flow.memory.records import Trajectory, TrajectoryStep


def trace(
    task: str, *steps: tuple[str, str | dict[str, Any]] | tuple[str, str | dict[str, Any], str]
) -> Trace:
    return Trace(
        trajectory_id=task,
        task=task,
        steps=tuple(
            TraceStep(
                tool=step[0],
                action=step[1] if isinstance(step[1], str) else json.dumps(step[1]),
                observation=step[2] if len(step) == 3 else "",
            )
            for step in steps
        ),
    )


def procedure_of(*traces: Trace) -> Procedure:
    found = generalise(traces)
    assert found is not None
    return found.procedure


def invoice(customer: str, number: str) -> Trace:
    return trace(
        f"Send the invoice of {customer}",
        ("lookup", {"name": customer, "limit": 1, "fuzzy": True}, f"id of {customer}: {number}"),
        ("mail", {"to": number, "subject": f"Invoice for {customer}"}),
    )


INVOICES = procedure_of(invoice("Ada", "c-17"), invoice("Grace", "c-4"), invoice("Barbara", "c-230"))


def test_what_differs_becomes_one_hole_with_its_origin() -> None:
    """Catches a constant taken for a hole, two holes for one thing, and an origin that is not true."""
    assert {hole.name: (hole.source, hole.step) for hole in INVOICES.holes} == {
        "name": ("task", None),
        "to": ("observation", 1),
    }
    assert shown(INVOICES.task) == "Send the invoice of {name}"
    assert written(INVOICES).splitlines()[:2] == [
        "1. lookup(name={name}, limit=1, fuzzy=true)",
        "2. mail(to={to}, subject=Invoice for {name})",
    ]
    assert "{to}: from what step 1 returned, like c-17, c-4, c-230" in written(INVOICES)


def test_a_procedure_is_filled_in() -> None:
    """Catches numbers that become text, a missing value that passes, an observation's that is demanded."""
    first, second = fill(INVOICES, {"name": "Hedy"})
    assert first.arguments == {"name": "Hedy", "limit": 1, "fuzzy": True}
    assert second.arguments == {"to": "{to}", "subject": "Invoice for Hedy"}
    assert (first.pending, second.pending) == ({}, {"to": 1})
    assert fill(INVOICES, {"name": "Hedy", "to": "c-9"})[1].arguments["to"] == "c-9"
    with pytest.raises(InvalidInput, match="'name'"):
        fill(INVOICES, {})
    with pytest.raises(InvalidInput, match="'colour'"):
        fill(INVOICES, {"name": "x", "colour": "red"})


def test_commands_are_text_with_holes() -> None:
    """Catches two differing words of a command line merged into one hole, or a shape that is not shared."""
    found = procedure_of(
        trace("count foo", ("shell", "grep -c foo src/a.py")),
        trace("count bar", ("shell", "grep -c bar src/b.py")),
    )
    assert written(found).startswith("1. shell(grep -c {shell} src/{shell_2}.py)")
    assert [step.text for step in fill(found, {"shell": "x", "shell_2": "y"})] == ["grep -c x src/y.py"]
    ragged = procedure_of(
        trace("a", ("shell", "ls -l one")),
        trace("b", ("shell", "ls -l two three")),
        trace("c", ("shell", "ls -l")),
    )
    assert shown(ragged.steps[0].arguments[0].pieces) == "ls -l{shell}"


def test_values_that_are_no_text_stay_what_they_are() -> None:
    """Catches a number or list that comes out as a string, and arguments of only some runs being demanded."""
    found = procedure_of(
        trace("take 3 of it", ("take", {"n": 3, "tags": ["a"], "note": "x"})),
        trace("take 5 of it", ("take", {"n": 5, "tags": ["a"]})),
    )
    assert found.steps[0].optional == ("note",)
    assert [hole.source for hole in found.holes] == ["task"]
    assert fill(found, {"n": 7})[0].arguments == {"n": 7, "tags": ["a"]}
    assert read_task(found, "take 12 of it") == {"n": "12"}
    assert fill(found, {"n": "12"})[0].arguments == {"n": 12, "tags": ["a"]}


def test_secrets_are_holes_without_examples() -> None:
    """Catches a key from a run that ends up in the procedure everybody reads."""
    key = "sk-proj-" + "a1B2c3D4e5F6g7H8" * 2
    steps = (
        TrajectoryStep(name="model", observation="thinking"),
        TrajectoryStep(
            name="tool:call", action=json.dumps({"auth": key, "path": "/x"}), observation=f"used {key}"
        ),
        TrajectoryStep(name="tool:call", action="{}", error="refused"),
    )
    traces = [
        trace_of(Trajectory(id=f"t{number}", task=f"call {number}", steps=steps, steps_total=3))
        for number in range(3)
    ]
    assert all(one is not None and one.tools == ("call",) for one in traces)
    found = generalise([one for one in traces if one is not None])
    assert found is not None
    assert key not in found.procedure.model_dump_json()
    assert [(hole.source, hole.examples) for hole in found.procedure.holes if hole.name == "auth"] == [
        ("secret", ())
    ]


def test_runs_that_are_no_procedure() -> None:
    """Catches an endless or compressed run, or one in which everything differs, taken for a procedure."""
    step = TrajectoryStep(name="tool:x", action="y")
    assert trace_of(Trajectory(id="t", task="t", steps=(step,) * 13, steps_total=13)) is None
    assert trace_of(Trajectory(id="t", task="t", steps=(step,) * 3, steps_total=9)) is None, (
        "steps are missing"
    )
    assert (
        trace_of(Trajectory(id="t", task="t", steps=(TrajectoryStep(name="model"),), steps_total=1)) is None
    )
    many = [trace("t", ("x", {f"k{n}": f"{run}{n}" for n in range(HOLES_MAX + 1)})) for run in range(2)]
    assert generalise(many) is None
    with pytest.raises(ValueError, match="same tools"):
        generalise([trace("t", ("x", "1")), trace("t", ("y", "1"))])


def test_tasks_are_read_by_their_form() -> None:
    """Catches a task of another form that is taken, and a value cut in the wrong place."""
    copies = procedure_of(
        trace("Copy a.txt to /tmp please", ("cp", {"from": "a.txt", "to": "/tmp"})),
        trace("Copy b.md to /var please", ("cp", {"from": "b.md", "to": "/var"})),
    )
    assert read_task(copies, "copy  my c.csv to /srv/x PLEASE ") == {"from": "my c.csv", "to": "srv/x"}
    assert read_task(copies, "move c.csv to /srv please") is None
    assert read_task(copies, "copy to /srv please") is None
    assert read_task(copies, "copy c.csv to /srv please now") is None
    assert read_task(INVOICES, "Send the invoice of Ada Lovelace") == {"name": "Ada Lovelace"}
    assert read_task(INVOICES, "Send the invoice of ") is None


words = st.text(alphabet="abcdefgh", min_size=1, max_size=6)
values = st.one_of(
    st.lists(words, min_size=1, max_size=5).map(" ".join),
    st.lists(words, min_size=1, max_size=4).map("/".join),
    st.integers(-5, 5),
    st.booleans(),
    st.none(),
    st.lists(st.integers(0, 3), max_size=2),
    st.text(max_size=8),
)


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_filled_with_its_own_values_it_is_the_run(
    data: st.DataObject, runs: int, steps: int, plain: bool
) -> None:
    """Catches a generalisation that does not cover a run it was made from, to the last character."""
    actions: list[list[Any]] = [
        [
            data.draw(st.text(min_size=1, max_size=20).filter(lambda text: text[0] != "{"))
            if plain
            else {"a": data.draw(values), "b": data.draw(values)}
            for _ in range(steps)
        ]
        for _ in range(runs)
    ]
    traces = [trace(f"task {run}", *(("tool", action) for action in actions[run])) for run in range(runs)]
    found = generalise(traces)
    assert found is not None
    for run in range(runs):
        filled = fill(found.procedure, found.values[run])
        assert [step.text if plain else step.arguments for step in filled] == actions[run]


@given(st.lists(words, min_size=3, max_size=6), words, words)
def test_a_task_gives_its_values_back(fixed: list[str], one: str, other: str) -> None:
    """Catches a reader of tasks that misses the tasks a procedure was made from."""
    tasks = [" ".join([fixed[0], value, *fixed[1:]]) for value in (one, other)]
    found = procedure_of(*(trace(task, ("x", {"v": task.split()[1]})) for task in tasks))
    for task, value in zip(tasks, (one, other), strict=True):
        read = read_task(found, task)
        assert read is not None
        assert read == ({"v": value} if one != other else {})
        assert likeness(task, task) == 1.0
