"""Records that processes of two builds share: what the other one knows more of survives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import NeedsNewer, as_problem, from_problem
from agentic_flow.core.messages import READER, Completion, JsonObject
from agentic_flow.swarm.payloads import Account, AgentPayload, Brief, RunPayload, as_record, from_record
from agentic_flow.swarm.runs import RunEvent, RunSpec
from agentic_flow.swarm.topology import Assignment
from agentic_flow.swarm.workflow_run import WorkflowPayload
from agentic_flow.swarm.workflow_spec import WorkflowSpec

SPEC = RunSpec.model_validate(
    {
        "goal": "Who checks?",
        "roles": {"worker": {"agent": "reader"}},
        "stages": [{"agent": "reader", "task": "read"}],
        "acceptance": [{"kind": "max_words", "n": 3}],
    }
)
BRIEF = Brief(system="s", model="m", generative=True)
RUN = RunPayload(
    spec=SPEC,
    subject="s",
    tenant="t",
    scopes=("runs:read",),
    folder={"root": "/x"},
    briefs={"worker": BRIEF},
    started_at_s=1.0,
)
AGENT = AgentPayload(
    run_id="r",
    agent="worker-1",
    role="worker",
    question="q",
    prompt="p",
    brief=BRIEF,
    run=RUN.model_copy(update={"account": Account(run_id="r", payload=RUN)}),
)
FLOW = WorkflowPayload(
    workflow=WorkflowSpec.model_validate(
        {
            "name": "w",
            "schedule": {"every_s": 600},
            "inputs": {"i": {"type": "string"}},
            "steps": [{"id": "a", "agent": {"prompt": "x"}, "retry": {"attempts": 2}}],
        }
    ),
    inputs={},
    run=RUN,
    agents={"a": BRIEF},
    teams={},
)
FREE = {"folder", "inputs"}
"""Fields that are JSON of whatever kind: what is in them is no record."""
JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda one: st.lists(one, max_size=2))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a dumped record a newer build may have put more."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        if not path or path[-1] not in ("briefs", "roles", "agents", "teams", "with", "outputs"):
            found.append(path)
        for key, below in value.items():
            if key not in FREE:
                found += places(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            found += places(below, (*path, number))
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("record", [RUN, AGENT, FLOW], ids=lambda one: type(one).__name__)
@given(data=st.data())
def test_what_is_not_known_is_kept(record: RunPayload | AgentPayload | WorkflowPayload, data: Any) -> None:
    """Catches a key of a newer build that is refused, or lost when the record is written again."""
    kind = type(record)
    stored = kind.model_validate(record.model_dump(mode="json")).model_dump(mode="json")
    for path in data.draw(st.lists(st.sampled_from(places(stored)), min_size=1, max_size=6)):
        at(stored, path)[f"newer_{data.draw(st.integers(0, 3))}"] = data.draw(JSON)
    read = kind.from_record(stored)
    assert read.model_dump(mode="json") == stored
    assert kind.model_validate_json(record.model_dump_json()) == record
    changed = read.model_copy(update={"run_id": "other"} if kind is AgentPayload else {})
    assert set(changed.model_dump(mode="json")) == set(stored)
    assert kind.from_record(stored, keep=False) == kind.from_record(record.model_dump(mode="json"))


def test_callers_are_not_readers() -> None:
    """Catches tolerance towards what callers send: a misspelt limit must not be passed over."""
    with pytest.raises(ValueError, match="newer"):
        RunSpec.model_validate({"goal": "g", "newer": 1})


@pytest.mark.parametrize("number", [READER + 1, 10**9])
def test_a_record_says_who_must_leave_it_alone(number: int) -> None:
    """Catches a build that goes on with a record in which something it does not know matters."""
    stored = SPEC.model_dump(mode="json")
    assert RunSpec.from_record(stored | {"reader_min": READER}).goal == SPEC.goal
    with pytest.raises(NeedsNewer, match=re.escape(f"number {number}")) as refused:
        RunSpec.from_record(stored | {"reader_min": number})
    again = from_problem(as_problem(refused.value))
    assert type(again) is NeedsNewer
    assert again.hint


@pytest.mark.parametrize("stored", [None, [], {"goal": 3}, {"goal": "g", "agents": "many"}])
def test_what_cannot_be_read_says_so(stored: Any) -> None:
    """Catches a library's error for a record in another form."""
    with pytest.raises(NeedsNewer, match="RunSpec"):
        RunSpec.from_record(stored)


def test_recorded_steps_of_a_newer_build() -> None:
    """Catches a recorded step that a newer build says more in, and that ends the run here."""
    record = as_record(Assignment("work-1", "worker-1", "worker", "q", ("plan",)))
    assert from_record(record | {"newer": 1}) == from_record(record)
    completion: JsonObject = {
        "model": "m",
        "provider": "p",
        "parts": [{"kind": "text", "text": "t", "newer": 1}],
        "newer": 2,
    }
    assert Completion.from_record(completion | {"stop_reason": "end", "usage": {}}).text == "t"


def test_events_of_a_newer_build() -> None:
    """Catches a stream that ends at an event of a kind that this build does not know."""
    told: JsonObject = {"sequence": 1, "kind": "run_polished", "at_s": 1.0, "data": {"x": 1}}
    event = RunEvent.told(told)
    assert (event.kind, event.data) == ("other", {"x": 1, "kind": "run_polished"})
    assert RunEvent.told(told | {"kind": "run_paused"}).kind == "run_paused"
