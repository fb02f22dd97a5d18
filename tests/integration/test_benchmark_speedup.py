# pyright: basic, reportMissingImports=false
"""The benchmark of a team's speed-up: the part that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def test_the_scheduler_is_measured_at_a_thousand_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark of the scheduler that no longer runs, or schedules fewer than it says."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import swarm_speedup

    figures = swarm_speedup.measure_scheduler()
    assert figures["assignments"] >= swarm_speedup.STEP_AGENTS
    assert figures["cpu_ms_per_step"] > 0
    tests = {n: {"wall_s": 8.0 / n, "cpu_s": 4.0} for n in swarm_speedup.WORKERS}
    text = swarm_speedup.tables(tests, {n: 1.0 + n / 64 for n in swarm_speedup.AGENTS}, figures)
    assert "| 4 | 2.0 | 4.0 | 4.00 |" in text
    assert "| 64 | 2.00 | 32.5 | 51 % |" in text
