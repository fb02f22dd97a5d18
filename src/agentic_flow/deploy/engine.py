"""The container engine, as its command line tells of it: calls of bounded time, typed errors, plain facts.

The engine is asked through `docker` because that is what operators have, with their contexts, sockets and
credentials. What it says in prose is matched against what it is known to say; the rest is passed on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    PortInUse,
    Unavailable,
)

CALL_TIMEOUT_S = 60.0
PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
_SAID_MAX = 500


@dataclass(frozen=True, slots=True)
class Container:
    """One container as the engine has it.

    Args:
        state: created, running, paused, restarting, removing, exited or dead.
        health: starting, healthy or unhealthy; None: it has no check.
        health_said: What the last check printed.
        exit_code: Of the last end; 0 while it runs.
        networks: Name of the network → the container's address there.
        volumes: Named volumes: name → place inside.
        image: As it was asked for.
        image_id: What that was then.
        oneoff: Whether somebody ran it beside the stack (`compose run`).
    """

    id: str
    name: str
    service: str
    state: str
    health: str | None
    health_said: str
    exit_code: int
    out_of_memory: bool
    restarts: int
    started_at_s: float | None
    image: str
    image_id: str
    networks: Mapping[str, str] = field(default_factory=dict[str, str])
    volumes: Mapping[str, str] = field(default_factory=dict[str, str])
    oneoff: bool = False

    @property
    def ready(self) -> bool:
        """Whether it runs and its check, if it has one, passes."""
        return self.state == "running" and self.health in (None, "healthy")

    @property
    def condition(self) -> str:
        """State and health in a word or two."""
        if self.state == "running":
            return self.health or "running"
        if self.state in ("exited", "dead"):
            why = "out of memory" if self.out_of_memory else f"code {self.exit_code}"
            return f"{self.state} ({why})"
        return self.state


class Engine:
    """The `docker` command.

    Args:
        program: Its name or path.
        environment: Variables beside the process's own.
    """

    def __init__(self, program: str = "docker", environment: Mapping[str, str] | None = None) -> None:
        self._program = program
        self._environment = {**os.environ, **(environment or {}), "COMPOSE_ANSI": "never", "LC_ALL": "C"}

    def call(
        self,
        *words: str,
        folder: Path | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> str:
        """Standard output of one command, to its end.

        Raises:
            DeadlineExceeded: it was not done in time, and was ended.
            Unavailable, Forbidden, NotFound, PortInUse: what the engine said.
        """
        try:
            done = subprocess.run(  # noqa: S603 - a program that the operator named
                [self._program, *words],
                cwd=folder,
                env={**self._environment, **(environment or {})},
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise _no_program(self._program) from None
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(
                f"`{_shown(self._program, words)}` was not done within {timeout_s:g} s",
                hint="look whether the engine is busy, and try again",
                details={"said": _tail(error.stderr)},
            ) from None
        if done.returncode != 0:
            raise failure(done.stderr.decode(errors="replace"), _shown(self._program, words))
        return done.stdout.decode(errors="replace")

    def start(
        self, *words: str, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Begin a command whose end the caller waits for. What it says is one stream, on `stdout`."""
        try:
            return subprocess.Popen(  # noqa: S603
                [self._program, *words],
                cwd=folder,
                env={**self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise _no_program(self._program) from None

    def streams(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command on three streams of its own, which the caller reads, writes and closes."""
        try:
            return subprocess.Popen(  # noqa: S603
                [self._program, *words],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError:
            raise _no_program(self._program) from None

    def pass_through(self, *words: str, folder: Path | None = None) -> int:
        """Run a command on this process's own streams, for as long as it takes; its exit code."""
        try:
            return subprocess.run(  # noqa: S603
                [self._program, *words], cwd=folder, env=self._environment, check=False
            ).returncode
        except FileNotFoundError:
            raise _no_program(self._program) from None

    def check(self) -> str:
        """Version of the daemon, when it answers and Compose v2 is there.

        Raises:
            Unavailable, Forbidden: it does not, or is not ours to use.
        """
        version = self.call("version", "--format", "{{.Server.Version}}", timeout_s=10.0).strip()
        self.call("compose", "version", "--short", timeout_s=10.0)
        return version

    def containers(self, project: str) -> list[Container]:
        """All containers of a Compose project, those that do not run too."""
        ids = self.call("ps", "-aq", "--no-trunc", "--filter", f"label={PROJECT_LABEL}={project}").split()
        if not ids:
            return []
        try:
            documents = json.loads(self.call("inspect", "--type", "container", *ids))
        except NotFound:
            return self.containers(project)  # one of them went away in between
        found = [_container(cast(dict[str, Any], document)) for document in documents]
        return sorted(found, key=lambda one: (one.service, one.name))

    def log_lines(self, container: str, lines: int) -> list[str]:
        """The last lines that a container wrote, on both streams."""
        try:
            done = subprocess.run(  # noqa: S603
                [self._program, "logs", "--tail", str(lines), container],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=CALL_TIMEOUT_S,
                check=False,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            return [f"(its log cannot be read: {type(error).__name__})"]
        return done.stdout.decode(errors="replace").splitlines()[-lines:]

    def has_image(self, image: str) -> bool:
        """Whether the engine holds an image of this name."""
        try:
            self.call("image", "inspect", "--format", "{{.Id}}", image)
        except NotFound:
            return False
        return True


def _container(document: Mapping[str, Any]) -> Container:
    labels: dict[str, str] = document["Config"].get("Labels") or {}
    state: dict[str, Any] = document["State"]
    health: dict[str, Any] | None = state.get("Health")
    log: list[dict[str, Any]] = (health or {}).get("Log") or []
    mounts: list[dict[str, Any]] = document.get("Mounts") or []
    networks: dict[str, dict[str, Any]] = document["NetworkSettings"].get("Networks") or {}
    return Container(
        id=document["Id"],
        name=str(document["Name"]).lstrip("/"),
        service=labels.get(SERVICE_LABEL, ""),
        state=state["Status"],
        health=health["Status"] if health is not None and health.get("Status") != "none" else None,
        health_said=str(log[-1].get("Output", "")).strip() if log else "",
        exit_code=int(state.get("ExitCode", 0)),
        out_of_memory=bool(state.get("OOMKilled")),
        restarts=int(document.get("RestartCount", 0)),
        started_at_s=_moment(str(state.get("StartedAt", ""))),
        image=str(document["Config"].get("Image", "")),
        image_id=str(document.get("Image", "")),
        networks={name: str(entry.get("IPAddress", "")) for name, entry in networks.items()},
        volumes={str(m["Name"]): str(m["Destination"]) for m in mounts if m.get("Type") == "volume"},
        oneoff=labels.get("com.docker.compose.oneoff") == "True",
    )


def _moment(text: str) -> float | None:
    """The engine writes nanoseconds, and the year 1 for never."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?", text)
    if found is None or text.startswith("0001"):
        return None
    return datetime.fromisoformat(found[1] + (found[2] or "")).replace(tzinfo=UTC).timestamp()


Make = Callable[[str], AgenticFlowError]

_KNOWN: tuple[tuple[str, Make], ...] = (
    (
        r"permission denied while trying to connect|dial unix .*: permission denied",
        lambda said: Forbidden(
            f"this user may not use the container engine: {said}",
            hint="join the group of its socket (usually `docker`), or run as a user who is in it",
        ),
    ),
    (
        r"Cannot connect to the Docker daemon|failed to connect to the docker API|error during connect",
        lambda said: Unavailable(
            f"the container engine does not answer: {said}",
            hint="start it (`systemctl start docker`), or point DOCKER_HOST at one that runs",
        ),
    ),
    (
        r"'compose' is not a docker command|unknown command: docker compose|unknown shorthand flag",
        lambda said: Unavailable(
            f"Compose v2 is not there: {said}",
            hint="install Docker's plug-in `docker compose`, 2.17 or newer",
        ),
    ),
    (
        r"port is already allocated|address already in use|ports are not available",
        lambda said: PortInUse(
            f"a port of the stack is taken: {said}",
            hint="stop what listens there, or set another in the spec (ports.platform and the like)",
        ),
    ),
    (
        r"No such image|pull access denied|manifest unknown|manifest for .* not found|repository does not",
        lambda said: NotFound(
            f"an image is missing: {said}",
            hint="build it from deploy/docker/Dockerfile, or set images.prefix and images.tag",
        ),
    ),
    (
        r"No such (object|container|volume|network)",
        lambda said: NotFound(said, hint="it may have been removed in between; try again"),
    ),
    (
        r"no space left on device",
        lambda said: Unavailable(
            f"the engine's disk is full: {said}", hint="make room where it keeps images and volumes"
        ),
    ),
)


def failure(text: str, command: str) -> AgenticFlowError:
    """What the engine said, as an error of ours.

    Args:
        text: All that it said; the last lines tell what went wrong.
        command: What was asked, for an error that is not known.
    """
    said = _tail(text.encode())
    for pattern, make in _KNOWN:
        found = re.search(f"[^\n]*(?:{pattern})[^\n]*", text, re.IGNORECASE)
        if found is not None:
            return make(found[0].strip()[-_SAID_MAX:])
    return Unavailable(f"`{command}` failed: {said or 'it said nothing'}", hint="see what the engine said")


def _no_program(program: str) -> AgenticFlowError:
    return Unavailable(
        f"there is no program {program!r} here",
        hint="install Docker Engine with Compose v2, or use --embedded, which needs neither",
    )


def _shown(program: str, words: Sequence[str]) -> str:
    """A command without its longest parts."""
    return " ".join((program, *words[:6], *(["…"] if len(words) > 6 else [])))


def _tail(said: bytes | str | None) -> str:
    text = said.decode(errors="replace") if isinstance(said, bytes) else (said or "")
    return " ".join(text.split())[-_SAID_MAX:]


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What a command says, as it says it."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.decode(errors="replace").rstrip()
