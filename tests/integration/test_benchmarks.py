"""The benchmark of AgentDB works from load to report, at a size that takes seconds. Times are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)  # a busy machine takes ten times as long as a quiet one

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
ROWS = 5000
TIERS = ("agentdb scan", "agentdb graph")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of benchmarks, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """Figures of a quick run."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "agentdb.py"), "--quick", "--folder", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_part_measures_ours_and_the_report_judges_it(tmp_path: Path, benchmarks: None) -> None:
    """Catches a benchmark that no longer runs, recall that collapsed, a report that hides it."""
    import agentdb_report

    systems = [word for tier in TIERS for word in ("--system", tier)]
    parts = [word for part in ("build", "search", "reopen", "upsert", "million") for word in ("--part", part)]
    figures = run(tmp_path, "--rows", str(ROWS), *systems, *parts)
    for tier in TIERS:
        built = figures["build"][tier]
        assert built["facts"]["tier of tenant whole"] == tier.removeprefix("agentdb ")
        assert 0 < built["index_bytes"] < built["total_bytes"]
        assert built["rebuild"]["cpu_s"] > 0
        for kind in ("all", "tenth", "hundredth", "tenant"):
            found = figures["search"][tier][kind]
            assert found["recall"] >= 0.95, (tier, kind, found)
            assert found["short"] == 0, (tier, kind, found)
        assert figures["reopen"][tier]["wall_s"] > 0
        assert figures["upsert"][tier]["single"]["rows"] >= 1
        assert figures["upsert"][tier]["batch"]["rows"] % 100 == 0
    assert figures["million"]["agentdb auto"]["all"]["recall"] >= 0.95
    text = agentdb_report.text_of(agentdb_report.Figures(figures))
    assert "GB at most | reached" in agentdb_report.million_text_of(agentdb_report.Figures(figures))
    assert f"{figures['search']['agentdb scan']['all']['recall']:.4f} | reached" in text
    assert "No peer was measured." in text
    assert "not measured" in text


def test_a_peer_that_is_missing_is_named_with_the_reason(tmp_path: Path, benchmarks: None) -> None:
    """Catches a table that hides a peer which could not be run, or a run that dies of it."""
    import agentdb_report

    nowhere = str(tmp_path / "no-such-python")
    figures = run(tmp_path, "--rows", "200", "--system", "zvec", "--part", "build", "--peer-python", nowhere)
    assert nowhere in figures["build"]["zvec"]["failed"]
    text = agentdb_report.text_of(agentdb_report.Figures(figures))
    assert f"| zvec | failed: {nowhere} is missing" in text


def test_a_peer_that_is_ahead_is_stated(benchmarks: None) -> None:
    """Catches a report that praises us and is silent where a peer does better."""
    import agentdb_report

    def found(cpu_ms: float, recall: float) -> dict[str, Any]:
        return {
            "all": {"cpu_ms": cpu_ms, "first_cpu_ms": cpu_ms, "recall": recall, "short": 0, "queries": 10},
            "at": "2026-11-29T09:00:00+00:00",
            "load_average": 1.0,
        }

    figures = {"search": {"agentdb scan": found(0.5, 0.999), "zvec": found(0.3, 0.98), "chroma": found(2, 1)}}
    ahead = agentdb_report.text_of(agentdb_report.Figures(figures)).split("### Where a peer is ahead")[1]
    lines = ahead.split("###")[0].strip().splitlines()
    assert lines == [
        "- CPU per query, unfiltered (agentdb scan 0.500 ms): zvec (0.300 ms, recall 0.980).",
        "- recall, unfiltered (agentdb scan 0.999): chroma (1.000).",
    ]


def test_renewing_one_section_keeps_the_others(
    tmp_path: Path, benchmarks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a report that loses what other benchmarks measured."""
    import report

    before = report.split(report.RESULTS.read_text("utf-8"))
    copy = tmp_path / "RESULTS.md"
    copy.write_text(report.RESULTS.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(report, "RESULTS", copy)
    title, _ = report.SECTIONS["steps"]
    monkeypatch.setitem(report.SECTIONS, "steps", (title, lambda kept: "| new | figures |"))
    report.renew(["steps"])
    after = report.split(copy.read_text("utf-8"))
    assert after.pop(title).endswith("| new | figures |")
    before.pop(title)
    assert after == before


def test_the_gateway_benchmark_measures_ours_and_names_who_is_missing(benchmarks: None) -> None:
    """Catches a benchmark of the gateway that no longer runs, or a table that hides a case or a peer."""
    import gateway

    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gateway.py"), "--quick", "--json", "--system", "ours"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    ours = figures["systems"]["ours"]
    for case in gateway.CPU_CASES:
        assert ours["cases"][case]["requests"] > 0, ours
    assert ours["cases"]["latency"]["p50_ms"] >= 1000 * gateway.DELAY_S
    figures["systems"]["litellm"] = {"missing": "not installed"}
    text = gateway.text_of(figures)
    assert "| litellm | not run: not installed |" in text
    assert "against litellm | at least 30 times | not measured | **not reached** |" in text
    ours["cases"]["whole same"]["cpu_ms"] = 0.5
    figures["systems"]["relay"] = {
        "cases": {"whole same": {"cpu_ms": 0.05}},
        "memory_mb": 9,
        "start_cpu_s": 1,
    }
    assert "- CPU, whole same: 0.250 ms too many; the relay takes 0.050 ms (10%)." in gateway.text_of(figures)
    soaked = {"requests": 10, "growth_mb": 7.0, "memory_mb": [90.0, 97.0], "load_average": 1.0}
    assert "| at most 5 MB | 7.0 MB | **not reached** |" in gateway.soak_text_of(soaked)


def test_memory_is_followed_through_a_soak(benchmarks: None) -> None:
    """Catches a soak that asks nothing, or that reads the memory of another process."""
    import gateway

    figures = gateway.soak(requests=300, steps=2)
    assert len(figures["memory_mb"]) == 3
    assert all(memory > 50 for memory in figures["memory_mb"])
