"""The benchmark of memory in MiniGrid works from the houses to the report, at a size that takes seconds.

What walks in MiniGrid needs an interpreter that has it, which `make test-integration` makes, and is skipped
without it.
"""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(300)  # a busy machine takes ten times as long as a quiet one

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
WORLD_PYTHON = BENCHMARKS.parent / ".venv-bench-minigrid" / "bin" / "python"
walks_in_minigrid = pytest.mark.skipif(
    not WORLD_PYTHON.exists(), reason="make test-integration makes its environment"
)


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> None:
    """The folder of benchmarks, importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import memory_minigrid  # noqa: F401
        import memory_minigrid_notes  # noqa: F401


@walks_in_minigrid
def test_the_whole_memory_learns_from_walks_and_the_report_judges_it() -> None:
    """Catches a memory that no longer learns from what tools returned, arms that are not paired, a control
    with other counts, a table without an arm."""
    import memory_minigrid

    (run,) = asyncio.run(memory_minigrid.measured([200], 60))
    assert run["random"].notes == run["memory"].notes
    assert run["none"].notes == [0] * 60
    assert run["memory"].success[0] == run["none"].success[0]
    assert all(steps <= memory_minigrid.STEPS_MAX for walks in run.values() for steps in walks.steps)
    ours, none = statistics.mean(run["memory"].success), statistics.mean(run["none"].success)
    assert ours >= none + 0.15, (ours, none)
    assert 0 < run["memory"].kept < run["append"].kept
    text = memory_minigrid.text_of(memory_minigrid.compared([run, run]))
    assert all(f"| {label} |" in text for label in memory_minigrid.ARMS.values())


@walks_in_minigrid
def test_a_seed_decides_the_houses_and_the_walks() -> None:
    """Catches chance from elsewhere than the seed: arms would walk other houses than they are compared in."""
    import memory_minigrid

    def walks(seed: int) -> tuple[list[str], list[object]]:
        with memory_minigrid.Houses(seed, 4) as houses:
            return houses.missions, [houses.walk(episode, ()) for episode in (3, 0, 1)]

    assert walks(5) == walks(5)
    assert walks(5)[0] != walks(6)[0]


@walks_in_minigrid
def test_right_advice_leads_to_the_goal_and_is_said_to_be_used() -> None:
    """Catches an agent that does not read notes, and credit for notes that it did not follow."""
    import memory_minigrid
    from agentic_flow.memory.records import MemoryItem

    def note(colour: str) -> MemoryItem:
        return MemoryItem(id=colour, title="t", content=f"- open the {colour} door → the goal is there")

    with memory_minigrid.Houses(7, 1) as houses:
        tries = {colour: houses.walk(0, [note(colour)]) for colour in memory_minigrid_colours()}
        right = [c for c, done in tries.items() if done["log"][0]["observation"] == "the goal is there"]
        assert len(right) == 1
        both = houses.walk(0, [note(right[0]), *(note(c) for c in tries if c not in right)])
    assert tries[right[0]]["success"]
    assert all(done["log"][0]["action"] == f"the {colour} door" for colour, done in tries.items())
    assert both["used"] == (right[0],)


def memory_minigrid_colours() -> tuple[str, ...]:
    import memory_minigrid_notes

    return memory_minigrid_notes.COLOURS


def test_a_missing_interpreter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report that dies of it, or that keeps quiet about what was not measured."""
    import memory_minigrid

    async def missing(seeds: object, episodes: object) -> object:
        return memory_minigrid.Houses(0, 1, tmp_path / "no-such-python")

    monkeypatch.setattr(memory_minigrid, "measured", missing)
    assert memory_minigrid.section().startswith(f"Not measured: {tmp_path / 'no-such-python'} is missing")


def test_what_is_not_reached_is_said() -> None:
    """Catches a report that claims what its figures do not show, and a control that is not looked at."""
    import memory_minigrid
    from memory_minigrid import Walks

    def walks(successes: int, steps: int) -> Walks:
        return Walks([index < successes for index in range(10)] * 2, [steps] * 20, [1] * 20, 5)

    def runs(memory: Walks, control: Walks) -> list[dict[str, Walks]]:
        none = [walks(4, 50), walks(5, 50), walks(5, 52)]
        return [{"none": one, "memory": memory, "random": control, "append": memory} for one in none]

    same, better = walks(5, 50), walks(9, 25)
    assert memory_minigrid.broken(memory_minigrid.compared(runs(better, same))) == []
    assert "They hold." in memory_minigrid.text_of(memory_minigrid.compared(runs(better, same)))
    weak = memory_minigrid.broken(memory_minigrid.compared(runs(same, same)))
    assert len(weak) == 3
    assert "points higher, not 15" in weak[0]
    leaky = memory_minigrid.compared(runs(better, better))
    assert "random notes gain" in memory_minigrid.text_of(leaky)


def test_intervals_are_those_of_student() -> None:
    """Catches a wrong quantile: the table of Student's t has 2.262 for 10 values and 4.303 for 3."""
    from memory_minigrid import mean_of

    for values, t in (([0.0, 1.0] * 5, 2.262), ([0.0, 1.0, 2.0], 4.303)):
        found = mean_of(values)
        half = t * statistics.stdev(values) / len(values) ** 0.5
        assert found.value == pytest.approx(statistics.mean(values))
        assert found.high - found.value == pytest.approx(half, rel=1e-3)
        assert found.value - found.low == pytest.approx(half, rel=1e-3)


colours = st.sampled_from(("blue", "green", "grey", "purple", "red", "yellow", "pink"))
lines = st.builds(
    lambda colour, saw: f"- open the {colour} door{saw}",
    colours,
    st.sampled_from(["", " → the goal is there", " → an empty room"]),
)


@given(st.lists(st.tuples(st.sampled_from(["do", "avoid"]), st.lists(lines, max_size=4)), max_size=4))
def test_notes_are_read_by_what_they_say(given_notes: list[tuple[str, list[str]]]) -> None:
    """Catches a reader that turns a note around, invents a door, or puts one both first and last."""
    from memory_minigrid_notes import COLOURS, Note, advice_of, told, used

    notes = [Note(lesson, "\n".join(said)) for lesson, said in given_notes]
    advice = advice_of(notes)
    assert not set(advice.first) & set(advice.last)
    mentioned = {colour for colour in COLOURS if any(f" {colour} " in note.text for note in notes)}
    assert {*advice.first, *advice.last} == mentioned
    for note in notes:
        says = told(note)
        last_lines = {line.split()[3]: line for line in note.text.splitlines()}
        for colour, good in says.items():
            line = last_lines[colour]
            assert good == ("goal" in line or (note.lesson == "do" and "empty" not in line))
    nothing_opened = used(notes, [])
    assert nothing_opened == [
        i for i, note in enumerate(notes) if told(note) and not any(told(note).values())
    ]
