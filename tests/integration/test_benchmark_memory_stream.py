"""The benchmark of the simulated stream works from the tasks to the report, at a size that takes seconds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.testing.memory_stream import Walked

if TYPE_CHECKING:
    from memory_stream import Figures

pytestmark = pytest.mark.timeout(300)  # a busy machine takes ten times as long as a quiet one

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> None:
    """The folder of benchmarks, importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import memory_stream  # noqa: F401


def test_every_arm_is_measured_in_pairs_and_the_report_tells_it_truly(tmp_path: Path) -> None:
    """Catches an arm that is left out, streams that are not of one world, figures that are not the streams',
    claims that are said to hold and do not."""
    import memory_stream

    figures = memory_stream.measured([200, 201], [memory_stream.ASIDE_ERROR], 24)
    assert {arm for arm, world, _ in figures if world == "usual"} == {*memory_stream.ARMS, "unweighed"}
    for (_, _, error), streams in figures.items():
        assert error == memory_stream.ASIDE_ERROR
        assert [len(one.success) for one in streams] == [24, 24]
    # Before anything is learned, all arms do the same.
    assert len({tuple(one.success[0] for one in streams) for (_, world, _), streams in figures.items()
                if world == "usual"}) == 1  # fmt: skip
    assert all(one.size == (24,) for one in figures["append", "usual", 0.1])
    assert all(0 < one.size[-1] < 24 for one in figures["ours", "usual", 0.1])

    table = memory_stream.table(figures)
    for arm, label in memory_stream.ARMS.items():
        solved = statistics.mean(statistics.mean(one.success) for one in figures[arm, "usual", 0.1])
        assert f"| 10% | {label} | {solved:.1%} |" in table
    text = " ".join(memory_stream.text_of(figures).split())
    problems = memory_stream.broken(figures)
    assert problems, "24 tasks are too few for the claims: the bank cannot be half of 24 by then"
    assert all(problem in text for problem in problems)
    assert "They hold." not in text

    path = tmp_path / "figures.json"
    memory_stream.kept(figures, path)
    assert memory_stream.read(path) == figures
    picture = tmp_path / "picture.svg"
    memory_stream.draw(figures, picture)
    assert all(label in picture.read_text("utf-8") for label in memory_stream.ARMS.values())


def figures_of(ours: int, others: int, harmed: int, size: int) -> Figures:
    """Figures of three seeds at one rate of wrong verdicts, 100 tasks each, all seeds alike.

    Args:
        ours: Tasks of a stream that ours solves.
        others: And each other arm.
        harmed: Tasks in which a wrong note harmed ours.
        size: Entries that ours keeps; the others 100.
    """
    import memory_stream

    def streams(solved: int, wrong: int, kept: int) -> list[Walked]:
        flags = [tuple(index < count for index in range(100)) for count in (solved, wrong)]
        return [Walked(flags[0], flags[1], (kept,)) for _ in range(3)]

    found = {(arm, "usual", 0.2): streams(others, 0, 100) for arm in memory_stream.ARMS}
    found["ours", "usual", 0.2] = streams(ours, harmed, size)
    return found


def test_claims_that_hold_are_not_called_broken() -> None:
    """Catches a report that could not come out well, and so tells nothing when it does not."""
    import memory_stream

    assert memory_stream.broken(figures_of(80, 70, 5, 50)) == []


@given(
    ours=st.integers(0, 100), others=st.integers(0, 100), harmed=st.integers(0, 100), size=st.integers(1, 200)
)
def test_each_claim_that_does_not_hold_is_named(ours: int, others: int, harmed: int, size: int) -> None:
    """Catches a miss that is published as a success."""
    import memory_stream

    problems = memory_stream.broken(figures_of(ours, others, harmed, size))
    assert any("points more" in one for one in problems) == (ours <= others)
    assert any("wrong items" in one for one in problems) == (harmed > 5)
    assert any("the bank is" in one for one in problems) == (size > 50)
