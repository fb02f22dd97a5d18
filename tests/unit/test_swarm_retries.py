"""What a retry keeps of a run: decided from its numbered steps and children, without a database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.swarm.retries import Kept, Part, kept_of


@st.composite
def runs(draw: st.DrawFn) -> list[Part]:
    """Steps and waves of children as the engine numbers them: a child takes two numbers."""
    parts: list[Part] = []
    number = 1
    for turn in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            parts.append(Part(number, f"s{turn}", draw(st.sampled_from(("completed", "failed")))))
            number += 1
            continue
        count = draw(st.integers(1, 4))
        for child in range(count):
            status = draw(st.sampled_from(("completed", "failed", "cancelled", "running")))
            key = f"w{turn}-{child + 1}"
            parts.append(Part(number + child, key, status, f"run.{key}", float(turn)))
        number += 2 * count
    return parts


@given(runs(), st.data())
def test_nothing_that_could_have_needed_the_step_is_kept(parts: list[Part], data: st.DataObject) -> None:
    """Catches a kept result that came after the step, one that never came, and the step itself kept."""
    first = data.draw(st.sampled_from(parts))
    kept = kept_of("run", "failed", parts, first.name)
    assert (kept.from_step, kept.before) == (first.name, first.number)
    for part in parts:
        if part.child_id in kept.children:
            assert part != first
            assert part.status in ("completed", "failed")
            assert part.number < first.number or (
                part.started_at_s == first.started_at_s and part.status == "completed"
            )
        elif part.child_id is not None and part.status == "completed":
            assert part.number >= first.number
            assert part == first or first.child_id is None or part.started_at_s != first.started_at_s


@given(runs())
def test_the_first_that_did_not_complete_is_done_again(parts: list[Part]) -> None:
    """Catches a retry that begins too late or too early, or that begins where nothing has failed."""
    failed = [part for part in parts if part.status != "completed"]
    if not failed:
        with pytest.raises(Conflict):
            kept_of("run", "failed", parts, None)
        return
    kept = kept_of("run", "failed", parts, None)
    assert kept.before == min(part.number for part in failed)
    assert {part.child_id for part in failed}.isdisjoint(kept.children)


def test_names() -> None:
    """Catches an item that stands for all, a fan-out of which one item stays, and hints without names."""
    parts = [
        Part(1, "plan", "completed"),
        Part(2, "find-1", "completed", "r.find-1", 1.0),
        Part(3, "find-2", "completed", "r.find-2", 1.0),
        Part(4, "other", "completed", "r.other", 1.0),
        Part(8, "end-1", "completed"),
    ]
    assert kept_of("r", "completed", parts, "find") == Kept("find", 2, ("r.other",))
    assert kept_of("r", "completed", parts, "find-2") == Kept("find-2", 3, ("r.find-1", "r.other"))
    assert kept_of("r", "cancelled", parts, None).children == ("r.find-1", "r.find-2", "r.other")
    with pytest.raises(NotFound) as unknown:
        kept_of("r", "completed", parts, "end")
    assert unknown.value.hint == "there are plan, find-1, find-2, other, end-1"
    with pytest.raises(NotFound):
        kept_of("r", "completed", [], "x")
