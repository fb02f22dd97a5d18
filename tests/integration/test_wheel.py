"""The wheel: built from the tree, installed with the locked wheels in a clean environment, run there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its standard output."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=dict(environment or os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the source archive, so that the archive is known to be complete."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Catches data files that were left out (built-in agents, py.typed) and tests that slipped in."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "agentic_flow/py.typed" in names
    assert "agentic_flow/swarm/builtin_agents/planner.md" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"agentic_flow", next(top for top in tops if top.endswith(".dist-info"))}
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert source <= set(names)


def test_a_clean_environment_can_do_the_main_job(wheel: Path, tmp_path: Path) -> None:
    """Catches a dependency that only the developer's environment has, and a script that does not start."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = (home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q")
    locked = ("--only-binary", ":all:", "--require-hashes", "-r", ROOT / "requirements" / "runtime.txt")
    run(*pip, *locked, cwd=tmp_path)
    run(*pip, "--no-deps", wheel, cwd=tmp_path)
    environment = {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    run(home / "bin" / "python", "-m", "pip", "check", cwd=tmp_path)
    command = home / "bin" / "agentic-flow"
    version = json.loads(run(command, "version", "--json", cwd=tmp_path, environment=environment))
    assert version["agentic-flow"] in wheel.name
    result = json.loads(
        run(
            command,
            "run",
            "How does a timeout cancel a task?",
            "--input",
            Path(asyncio.__file__).parent,
            "--data-dir",
            tmp_path / "data",
            "--json",
            cwd=tmp_path,
            environment=environment,
        )
    )
    assert result["state"] == "completed"
    assert result["citations"]
