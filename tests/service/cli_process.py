"""The command line as users meet it: child processes of `python -m agentic_flow` in a place of their own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from command_done import Done

COMMAND = [sys.executable, "-m", "agentic_flow"]
TIMEOUT_S = 90.0


class Place:
    """A folder with its own data, home and settings; commands run in it.

    Args:
        folder: An empty folder.
        variables: Environment beside the bare minimum.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "TMPDIR")},
            "HOME": str(folder),
            "AGENTIC_FLOW_DATA_DIR": str(self.data_dir),
            "AGENTIC_FLOW_SERVE__PLATFORM_PORT": "0",
            "AGENTIC_FLOW_SERVE__AGENTDB_PORT": "0",
            "AGENTIC_FLOW_SERVE__SWARM_PORT": "0",
            **variables,
        }

    def run(self, *words: str | Path, **variables: str) -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str | Path, **variables: str) -> Process:
        """Start a command and leave it running."""
        return Process([*COMMAND, *map(str, words)], self.folder, {**self.environment, **variables})

    def run_ids(self) -> list[str]:
        """The runs that are stored."""
        listed = self.run("runs", "list", "--json")
        assert listed.code == 0, listed.err
        return [run["run_id"] for run in listed.data]


class Process:
    """A command under way; use it with `with`: whatever still runs at the end is killed."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: queue.Queue[str | None] = queue.Queue()
        self._out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_out, daemon=True),
            threading.Thread(target=self._read_err, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self._process.stdout is not None
        self._out.extend(self._process.stdout)

    def _read_err(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.put(line)
        self._said.put(None)

    def until(self, wanted: Callable[[str], bool]) -> str:
        """The next line on stderr that is wanted."""
        while (line := self._said.get(timeout=TIMEOUT_S)) is not None:
            self.err.append(line)
            if wanted(line):
                return line
        raise AssertionError(f"ended without saying it: {''.join(self.err)}")

    def unread(self) -> list[str]:
        """The lines on stderr so far that `until` has not come to."""
        return [line for line in list(self._said.queue) if line is not None]

    def addresses(self, services: int = 3) -> dict[str, str]:
        """Service → URL, once all of them listen."""
        found: dict[str, str] = {}
        while len(found) < services:
            words = self.until(lambda line: " listens on " in line).split()
            found[words[0]] = words[-1]
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> Done:
        """Wait for its end."""
        code = self._process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        while not self._said.empty():
            line = self._said.get()
            self.err += [line] if line is not None else []
        return Done(code, "".join(self._out), "".join(self.err))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.end()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
