"""The workflows of .github: valid, pinned, least permissions, and their shell is clean."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from agentic_flow.cli.main import app
from agentic_flow.deploy.spec import parse_spec

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def _tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not installed beside the interpreter: make setup-dev"
    return found


def _run(*command: str, stdin: str | None = None) -> None:
    outcome = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def _steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_each_fits_the_schema_of_workflows() -> None:
    """Catches a misspelt key, which the service would report only after a push."""
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "docker-publish.yml", "release.yml"]
    _run(_tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))


def test_zizmor_finds_nothing() -> None:
    """Catches wide permissions, injected expressions, kept credentials and poisoned caches."""
    _run(_tool("zizmor"), "--offline", "--persona", "pedantic", "--quiet", *map(str, WORKFLOWS))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_digest_with_its_version(path: Path) -> None:
    """Catches an action that whoever moves its tag could replace, and a digest that nobody can read."""
    used = re.findall(r"uses: (.+)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shell_of_the_steps_is_clean(path: Path) -> None:
    """Catches unquoted words and unset variables in scripts that no other run tries."""
    for step in _steps(path):
        if "run" in step:
            _run(_tool("shellcheck"), "--shell=bash", "--exclude=SC2154", "-", stdin=step["run"])


def test_the_images_are_the_targets_of_the_dockerfile() -> None:
    """Catches an image that the workflow builds from a target that is not there, and one that it forgets."""
    matrix = yaml.safe_load((ROOT / ".github/workflows/docker-publish.yml").read_text())["jobs"]["build"][
        "strategy"
    ]["matrix"]
    # The worker is the coordinator's image with another command.
    services = re.findall(r"^FROM service AS (\S+)", (ROOT / "deploy/docker/Dockerfile").read_text(), re.M)
    assert {entry["target"] for entry in matrix["include"]} == set(services)
    assert {entry["image"] for entry in matrix["include"]} == set(matrix["image"])


def _lines(path: Path) -> list[str]:
    """Every line of shell in a workflow, joined where it goes on in the next."""
    scripts = [step["run"] for step in _steps(path) if "run" in step]
    return [line for script in scripts for line in script.replace("\\\n", " ").splitlines()]


def test_every_command_of_ours_is_one_that_there_is() -> None:
    """Catches an option that the command line does not have, which only a push would have shown."""
    found = [
        re.split(r"\|\||&&|;", line.partition("agentic-flow ")[2])[0]
        for path in WORKFLOWS
        for line in _lines(path)
        if re.search(r"(^|/)agentic-flow ", line)
    ]
    assert len(found) >= 3
    for words in found:
        command, given = typer.main.get_command(app), shlex.split(words)
        context = command.make_context("agentic-flow", [*given])
        while (inner := getattr(command, "commands", None)) is not None:
            name, *given = given
            assert name in inner, f"{name!r} in {words!r}"
            command = inner[name]
            context = command.make_context(name, [*given], parent=context)


def test_every_target_of_make_is_one_that_there_is() -> None:
    """Catches a workflow that makes what the Makefile has not."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {
        word
        for path in WORKFLOWS
        for line in _lines(path)
        if line.startswith("make ")
        for word in line.split()[1:]
    }
    assert used
    assert used <= targets


def test_the_stack_of_the_workflow_is_of_what_it_has_built() -> None:
    """Catches an integration job that starts other images, or asks ports that its stack does not publish."""
    text = (ROOT / ".github/workflows/docker-publish.yml").read_text()
    (written,) = re.findall(r"echo '(.+)' > candidate.yaml", text)
    spec = parse_spec(yaml.safe_load(written))
    assert f'docker tag "$reference" "$image:{spec.images.tag}"' in text
    assert set(map(int, re.findall(r"https://localhost:(\d+)/", text))) == {
        spec.ports.platform,
        spec.ports.swarm,
    }
