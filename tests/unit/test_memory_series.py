"""The curves of memory and their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput
from agentic_flow.memory.plots import PICTURES, draw, plot_kind
from agentic_flow.memory.records import MemoryItem, Outcome, Trajectory, Verdict
from agentic_flow.memory.series import MemorySeries, memory_series, wilson

NOW_S = 1_790_000_000.0
DAY_S = 86_400.0


def trajectory(number: int, at_s: float, outcome: Outcome | None, recall_id: str | None = None) -> Trajectory:
    verdicts = () if outcome is None else (Verdict(outcome=outcome, source="test"),)
    return Trajectory(
        id=f"t{number}",
        task="x",
        outcome="completed",
        verdicts=verdicts,
        recall_id=recall_id,
        started_at_s=at_s - 5,
        ended_at_s=at_s,
    )


def item(number: int, at_s: float, *, uses: int = 0) -> MemoryItem:
    return MemoryItem(id=f"i{number}", title="t", content="c", created_at_s=at_s, uses=uses)


_outcomes = st.sampled_from(["success", "failure", "impossible", "unknown", None])
_runs = st.lists(st.tuples(st.floats(0, 700 * DAY_S), _outcomes, st.sampled_from([None, "shown", "empty"])))


@settings(max_examples=80, deadline=None)
@given(_runs, st.lists(st.floats(0, 700 * DAY_S)))
def test_every_recent_judged_run_is_counted_once(
    runs: list[tuple[float, Outcome | None, str | None]], ages: list[float]
) -> None:
    """Catches a run that falls between two periods, into two or into the wrong arm; curves that shrink."""
    trajectories = [
        trajectory(n, NOW_S - age, outcome, recall) for n, (age, outcome, recall) in enumerate(runs)
    ]
    items = [item(n, NOW_S - age, uses=n % 2) for n, age in enumerate(ages)]
    found = memory_series(
        trajectories, items, shown={"shown": True, "empty": False}, belief=lambda _: 0.55, now_s=NOW_S
    )
    judged = [(age, o, r) for age, o, r in runs if o in ("success", "failure")]
    assert (found.judged, found.unjudged) == (len(judged), len(runs) - len(judged))
    for arm in ("with", "without"):
        own = [o for _, o, r in judged if (r == "shown") == (arm == "with")]
        points = [point for point in found.success if point.arm == arm]
        assert sum(point.runs for point in points) == len(own)
        assert sum(point.successes for point in points) == own.count("success")
        assert all(point.low <= point.share <= point.high for point in points)
    counts = [point.items for point in found.growth]
    assert counts == sorted(counts)
    if found.growth:
        assert (counts[-1], found.growth[-1].trajectories) == (len(items), len(runs))
    assert sum(b.tested for b in found.confidence) == sum(one.uses for one in items)
    assert sum(b.tested + b.untested for b in found.confidence) == len(items)


def test_wilson_interval() -> None:
    """Catches a formula that is off: 8 of 10 is .49 to .94 in Wilson's own table."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_pictures(tmp_path: Path, ending: str) -> None:
    """Catches a picture that is empty, says the wrong counts, or cannot be drawn while there is no data."""
    pytest.importorskip("matplotlib")
    trajectories = [
        trajectory(n, NOW_S - n * DAY_S, "success" if n % 3 else "failure", "r" if n % 2 else None)
        for n in range(12)
    ]
    found = memory_series(
        trajectories,
        [item(n, NOW_S - n * DAY_S, uses=1) for n in range(7)],
        shown={"r": True},
        belief=lambda one: int(one.id[1:]) / 7,
        now_s=NOW_S,
    )
    for name, series in (("full", found), ("empty", MemorySeries(period_s=60.0))):
        path = tmp_path / f"{name}{ending}"
        draw(path, plot_kind(path), series, PICTURES)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if ending == ".png" else b"<?xml")
        if ending == ".svg":
            text = content.decode()
            assert ("shown items (6 runs" in text) == (name == "full")
            assert ("no run was judged yet" in text) == (name == "empty")
            draw(tmp_path / "again.svg", "svg", series, PICTURES)
            assert (tmp_path / "again.svg").read_bytes() == content, "the same numbers, the same file"


def test_other_endings_are_refused() -> None:
    """Catches a picture of a kind that nobody asked for."""
    with pytest.raises(InvalidInput):
        plot_kind(Path("a.gif"))
