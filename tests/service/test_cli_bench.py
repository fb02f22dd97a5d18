# pyright: basic, reportMissingImports=false
"""`agentic-flow swarm bench` from outside: it really runs tests, and prints no success without work."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tests that leave a mark when they are run: one passes, one fails, one cannot be imported."""
    folder = tmp_path / "project"
    folder.mkdir()
    mark = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').write_text('yes')\n"
    (folder / "test_good.py").write_text(f"{mark}\ndef test_good():\n    assert True\n", "utf-8")
    (folder / "test_bad.py").write_text(f"{mark}\ndef test_bad():\n    assert False\n", "utf-8")
    (folder / "test_broken.py").write_text("import no_such_module\n", "utf-8")
    return folder


def test_failing_tests_are_reported_as_failing(tmp_path: Path, folder: Path) -> None:
    """Catches results of tests that nobody ran, failures among the successes, and an exit code of 0."""
    place = Place(tmp_path)
    done = place.run(
        "swarm", "bench", "-i", folder, "--task", "tests", "--topology", "star", "--agents", "2", "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 1
    assert "2 test files fail" in done.problem
    (measured,) = done.data
    assert (measured["verdict"], measured["state"], measured["topology"]) == ("ok", "completed", "star")
    outcomes = {file["path"]: (file["outcome"], file["runs"]) for file in measured["files"]}
    assert outcomes == {
        "test_good.py": ("passed", 1),
        "test_bad.py": ("failed", 2),  # the hub, who reviews, has run it again
        "test_broken.py": ("broken", 1),
    }
    assert {path.stem for path in folder.glob("*.ran")} == {"test_good", "test_bad"}
    assert len({file["agent"] for file in measured["files"]}) == 2
    assert measured["messages"] > 0
    assert measured["cpu_s"] > 0
    assert (tmp_path / "out" / "tests-star-1.svg").read_text("utf-8").startswith("<svg")
    assert not place.data_dir.exists() or not (place.data_dir / "runs").exists()


def test_the_familiar_variables_repeat_a_run(tmp_path: Path, folder: Path) -> None:
    """Catches variables without effect, and a read folder whose passages cannot be found."""
    done = Place(tmp_path, BENCHMARK_MODE="true", ITERATIONS="2").run(
        "swarm", "bench", "-i", folder, "--task", "index", "--topology", "ring", "--agents", "2", "--json",
        "--question", "What does test_good assert?",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [(one["iteration"], one["verdict"]) for one in done.data] == [(1, "ok"), (2, "ok")]
    assert all(one["recall"] == 1.0 and one["files_read"] == 3 and one["at_once"] == 1 for one in done.data)


def test_work_that_was_not_done_is_no_success(tmp_path: Path) -> None:
    """Catches figures of an empty folder, and a task that is left out although it was asked for."""
    place = Place(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = place.run("swarm", "bench", "-i", empty, "--topology", "star")
    assert done.code == 1
    assert "left out: there are no test files" in done.err
    assert "0 of 1 ok: " in done.out
    assert place.run("swarm", "bench", "-i", empty, "--task", "tests").code == 2
    unknown = place.run("swarm", "bench", "-i", empty, "--topology", "tree")
    assert unknown.code == 2
    assert "'tree'" in unknown.problem
