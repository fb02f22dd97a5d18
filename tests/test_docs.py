"""The documents are true: their commands run and print what is shown, references match the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/quickstart.md",
    *sorted(
        f"docs/{folder}/{page.name}"
        for folder in ("guides", "operations")
        for page in (ROOT / "docs" / folder).glob("*.md")
    ),
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"^```(?:python|yaml)\n# (\w+\.(?:py|yaml))\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A file that the reader saves under the name in its first line, and uses in a command of the page."""
_LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PORTS = (3000, 5432, 9000)
_PORTS_FROM = 20_000
"""Below those that the system gives to whoever asks for any: tests beside these ask for many."""
_READY = "listens on"
_WORKS = "takes runs from"
_COMMAND_TIMEOUT_S = 100


@dataclass
class Shown:
    """A command of a page, and the output that the page shows under it."""

    command: str
    lines: list[str] = field(default_factory=list[str])


def commands(page: str) -> list[Shown]:
    """Commands of the page's `console` blocks, in order; `…` in a shown line stands for anything."""
    found: list[Shown] = []
    for language, body in _FENCE.findall((ROOT / page).read_text("utf-8")):
        if language != "console":
            continue
        for line in body.splitlines():
            if line.startswith("$ "):
                found.append(Shown(line[2:]))
            elif found and found[-1].command.endswith("\\"):
                found[-1].command = found[-1].command[:-1] + line.strip()
            elif line.strip():
                found[-1].lines.append(line)
    return found


def pattern(line: str) -> re.Pattern[str]:
    """A shown line as a pattern: numbers may differ, `…` is anything, spaces do not count."""
    words = re.escape(" ".join(line.split()))
    loose = words.replace("…", ".*").replace(r"\ ", r"\s+")
    return re.compile(re.sub(r"\d+(\\\.\d+)?", r"[\\d.,]+", loose))


@dataclass
class Shell:
    """One folder in which a page is followed from top to bottom."""

    folder: Path
    environment: dict[str, str]
    servers: list[subprocess.Popen[str]] = field(default_factory=list[subprocess.Popen[str]])

    def run(self, shown: Shown) -> str:
        """Run a command as the reader would; a server keeps running until the page ends."""
        command = self.at_free_ports(shown.command)
        if command.startswith(("agentic-flow serve", "agentic-flow worker")):
            return self.serve(command)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def serve(self, command: str) -> str:
        server = subprocess.Popen(
            shlex.split(command.removesuffix("&")),
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.servers.append(server)
        assert server.stderr is not None
        said = []
        services = len(_PORTS) if "serve all" in command else 1
        for line in server.stderr:
            said.append(line)
            if _WORKS in line or sum(_READY in earlier for earlier in said) == services:
                return "".join(said)
        raise AssertionError(f"{command} ended: {''.join(said)}")

    def at_free_ports(self, command: str) -> str:
        for port in _PORTS:
            command = command.replace(f":{port}", f":{self.environment[f'DOCS_PORT_{port}']}")
        return command

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            assert server.wait(_COMMAND_TIMEOUT_S) == 0
            assert server.stderr is not None
            server.stderr.close()


def free_ports() -> list[int]:
    """A port for each service that nobody has, and that nobody takes before the page's server begins."""
    first = _PORTS_FROM + os.getpid() % 100 * 100  # no two processes of a test run have the same hundred
    found: list[int] = []
    for port in range(first, first + 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found[: len(_PORTS)]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    programs = tmp_path / "bin"
    programs.mkdir()
    # Scripts, because a symbolic link would start the interpreter outside its environment.
    for name, what in (("agentic-flow", " -m agentic_flow"), ("python", "")):
        command = programs / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{what} "$@"\n')
        command.chmod(0o755)
    folder = tmp_path / "reader"
    folder.mkdir()
    for shared in ("examples", "docs"):  # what the pages ask about, as in a clone
        shutil.copytree(ROOT / shared, folder / shared)
    environment = {
        **{k: v for k, v in os.environ.items() if k in ("LANG", "LC_ALL", "TMPDIR", "PYTHONPATH")},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "AGENTIC_FLOW_DATA_DIR": str(tmp_path / "data"),
        "NO_COLOR": "1",
    }
    services = ("PLATFORM", "AGENTDB", "SWARM")
    for port, service, free in zip(_PORTS, services, free_ports(), strict=True):
        environment[f"DOCS_PORT_{port}"] = environment[f"AGENTIC_FLOW_SERVE__{service}_PORT"] = str(free)
    # These are settings, and the product refuses names that it does not know; ours begin otherwise.
    shell = Shell(folder, environment)
    try:
        yield shell
    finally:
        shell.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_and_prints_what_is_shown(page: str, shell: Shell) -> None:
    """Catches a command in the documents that fails, and shown output that is not what gets printed."""
    found = commands(page)
    assert found, f"{page} shows no command"
    for name, body in _PROGRAM.findall((ROOT / page).read_text("utf-8")):
        (shell.folder / name).write_text(shell.at_free_ports(body), "utf-8")
    for shown in found:
        words = shlex.split(shown.command)
        if words[0] in ("git", "cd"):
            continue  # how to get the repository that this test runs in
        if words[0] == "make":
            # .ci/run runs them for real; here, that they exist and what they would do.
            subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            continue
        output = " ".join(shell.run(shown).split())
        for line in shown.lines:
            assert pattern(line).search(output), f"{page}: {shown.command}\nshown: {line}\ngot: {output}"


def test_the_python_example_of_the_readme_runs(shell: Shell) -> None:
    """Catches an example that a reader would paste in vain."""
    blocks = [
        body
        for language, body in _FENCE.findall((ROOT / "README.md").read_text("utf-8"))
        if language == "python"
    ]
    assert blocks
    for body in blocks:
        done = subprocess.run(
            [sys.executable, "-c", body],
            cwd=shell.folder,
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "the example prints nothing"


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(example: str, shell: Shell) -> None:
    """Catches an example that no longer works."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        cwd=shell.folder,
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_references_match_the_code() -> None:
    """Catches a command, setting or error that changed without its reference page."""
    done = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_is_in_the_reference() -> None:
    """Catches a setting that nobody could find out about."""
    from agentic_flow.core.settings import env_name, setting_names

    page = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    missing = [name for name, _ in setting_names() if f"`{name}`" not in page or env_name(name) not in page]
    assert not missing


def anchors(page: Path) -> set[str]:
    """What links to headings of a page may say after the #, by GitHub's rule."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    """Catches a link to a page or heading that was moved, renamed or never written."""
    broken: list[str] = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target, anchor in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
            if target.startswith(("https://", "http://")):
                continue
            place = page.parent / target if target else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{page.relative_to(ROOT)} → {target}#{anchor}")
    assert not broken


def test_each_decision_has_a_number_of_its_own() -> None:
    """Catches two decisions under one number, and a heading that names another than the file."""
    numbers: list[str] = []
    for page in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        number = page.name.partition("-")[0]
        assert re.match(rf"# 0*{int(number)}[.:] ", page.read_text("utf-8")), page.name
        numbers.append(number)
    assert numbers == [f"{one:04}" for one in range(1, len(numbers) + 1)]
