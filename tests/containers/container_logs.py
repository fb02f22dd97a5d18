"""What a stack's containers write while something happens to it, also those that are gone afterwards."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from engine import Engine

QUIET = frozenset({"debug", "info"})
TOLD_MAX_CHARS = 20_000
_END_TIMEOUT_S = 20.0


class ContainerLogs:
    """Follows the logs of a project's containers, new ones included, until the block ends.

    Args:
        engine: Where they run.
        project: Name of the stack.
    """

    def __init__(self, engine: Engine, project: str) -> None:
        self._engine = engine
        self._chosen = ("--filter", f"label=com.docker.compose.project={project}")
        self._folder = tempfile.TemporaryDirectory(prefix="container-logs-")
        self._followers: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._since_s = 0.0
        self.lines: list[tuple[str, str, str]] = []
        """Time (RFC 3339, UTC), container and text of each line, in their order, once the block ended."""

    def __enter__(self) -> Self:
        self._since_s = time.time()
        # Those that start from now on; asked for before those that are there, so that none is between.
        self._starts = subprocess.Popen(
            [self._engine.docker, "events", "--filter=type=container", "--filter=event=start", *self._chosen,
             "--since", f"{self._since_s:.3f}", "--format", "{{.ID}} {{.Actor.Attributes.name}}"],
            env=self._engine.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in self._engine.output("ps", *self._chosen, "--format", "{{.ID}} {{.Names}}").splitlines():
            self._follow(line)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._starts is not None
        self._starts.terminate()
        self._starts.wait(_END_TIMEOUT_S)
        self._thread.join(_END_TIMEOUT_S)
        for follower in self._followers.values():
            follower.terminate()
            follower.wait(_END_TIMEOUT_S)
        for path in Path(self._folder.name).iterdir():
            for line in path.read_text("utf-8", "replace").splitlines():
                at, _, text = line.partition(" ")
                self.lines.append((at, path.name, text))
        self.lines.sort(key=lambda line: line[0])
        self._folder.cleanup()

    def told(self) -> str:
        """Warnings, errors, and what is no record of a log, with their times."""
        loud = [f"{at} {name} {text}" for at, name, text in self.lines if _level(text) not in QUIET]
        told = "\n".join(loud)
        return told if len(told) <= TOLD_MAX_CHARS else f"…{told[-TOLD_MAX_CHARS:]}"

    def _watch(self) -> None:
        assert self._starts is not None
        assert self._starts.stdout is not None
        with self._starts.stdout as lines:
            for line in lines:
                self._follow(line)

    def _follow(self, line: str) -> None:
        container, name = line.split()
        container = container[:12]
        if container in self._followers:
            return
        with (Path(self._folder.name) / f"{name}-{container}").open("wb") as file:
            self._followers[container] = subprocess.Popen(
                [self._engine.docker, "logs", "--follow", "--timestamps",
                 "--since", f"{self._since_s:.3f}", container],
                env=self._engine.environment, stdout=file, stderr=file,
            )  # fmt: skip


def _level(text: str) -> str:
    """Of a record as our services and Caddy write them; of anything else, nothing."""
    try:
        return str(json.loads(text)["level"]).lower()
    except (ValueError, KeyError, TypeError):
        return ""
