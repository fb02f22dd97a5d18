"""Keeps one process of ours running: `python -m agentic_flow.deploy.supervisor FOLDER`.

Started by `agentic-flow up --embedded`. It holds a lock on `embedded.pid` for as long as it lives, so that no
process number that was given to somebody else is ever taken for ours; begins the server again when it dies,
with pauses that grow; and keeps its log bounded. `embedded.json` tells others what there is.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from agentic_flow.core.secrets import write_private

PID_FILE, STATE_FILE, LOG_FILE = "embedded.pid", "embedded.json", "embedded.log"
LOG_MAX_BYTES, LOGS_KEPT = 10 * 1024 * 1024, 3
FAILURES_MAX = 5
_STEADY_S = 60.0
_PAUSE_S, _PAUSE_MAX_S = 0.5, 10.0
# Wrong input, a taken port, damaged data: nothing that another try puts right.
_HOPELESS = frozenset({2, 3, 7, 9})


@dataclass
class EmbeddedState:
    """What the supervisor tells.

    Args:
        pid: Its own.
        server_pid: Of the server; None between two of them.
        addresses: Service → URL, once the server listens.
        restarts: How often it was begun again.
        ended: How the last server ended, in words.
    """

    pid: int
    version: str
    started_at_s: float
    server_pid: int | None = None
    addresses: dict[str, str] = field(default_factory=dict[str, str])
    restarts: int = 0
    ended: str | None = None


class Supervisor:
    """One server process and its successors.

    Args:
        folder: Of the pid file, the state and the log.
        command: The server; it prints `{"listening": {…}}` on stdout when it listens.
    """

    def __init__(self, folder: Path, command: Sequence[str], version: str) -> None:
        self._folder = folder
        self._command = list(command)
        self._stopping = threading.Event()
        self._server: subprocess.Popen[bytes] | None = None
        self._log = logging.handlers.RotatingFileHandler(
            folder / LOG_FILE, maxBytes=LOG_MAX_BYTES, backupCount=LOGS_KEPT, encoding="utf-8"
        )
        self._log.setFormatter(logging.Formatter("%(message)s"))
        self._log.terminator = "\n"
        self.state = EmbeddedState(os.getpid(), version, time.time())

    def stop(self, *_: object) -> None:
        """Ask the server to end; it drains. The signal handler of SIGTERM and SIGINT."""
        self._stopping.set()
        server = self._server
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Until it is stopped or trying again is no use; the exit code."""
        try:
            return self._run()
        finally:
            self._log.close()

    def _run(self) -> int:
        failures = 0
        while True:
            began_s = time.monotonic()
            code = self._serve()
            lived_s = time.monotonic() - began_s
            if self._stopping.is_set():
                return 0
            failures = 1 if lived_s >= _STEADY_S else failures + 1
            self.state.ended = f"ended with {code} after {lived_s:.1f} s"
            hopeless = code in _HOPELESS and not self.state.addresses
            self._say(f"the server {self.state.ended}")
            self.state.addresses = {}
            self._tell()
            if hopeless or failures >= FAILURES_MAX:
                self._say("it is not begun again: see the lines above")
                return code or 1
            self._stopping.wait(min(_PAUSE_S * 2 ** (failures - 1), _PAUSE_MAX_S))
            if self._stopping.is_set():
                return 0
            self.state.restarts += 1

    def _serve(self) -> int:
        self._server = server = subprocess.Popen(  # noqa: S603 - our own program
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.state.server_pid = server.pid
        self._tell()
        if self._stopping.is_set():  # it came between the start and the line above
            server.send_signal(signal.SIGTERM)
        readers = [
            threading.Thread(target=read, args=(server,), daemon=True) for read in (self._out, self._err)
        ]
        for reader in readers:
            reader.start()
        code = server.wait()
        for reader, stream in zip(readers, (server.stdout, server.stderr), strict=True):
            reader.join(5.0)
            if stream is not None and not reader.is_alive():  # else a child of the server still has it
                stream.close()
        self.state.server_pid = None
        return code

    def _out(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdout is not None
        for line in server.stdout:
            try:
                told: Any = json.loads(line)
            except ValueError:
                told = None
            if isinstance(told, dict) and "listening" in told:
                self.state.addresses = dict(cast(dict[str, dict[str, str]], told)["listening"])
                self._tell()
            else:
                self._say(line.decode(errors="replace").rstrip())

    def _err(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stderr is not None
        for line in server.stderr:
            self._say(line.decode(errors="replace").rstrip())

    def _say(self, text: str) -> None:
        self._log.emit(logging.makeLogRecord({"msg": text}))

    def _tell(self) -> None:
        write_private(self._folder / STATE_FILE, json.dumps(asdict(self.state)).encode() + b"\n")


def hold(folder: Path) -> int | None:
    """The lock that says that a supervisor of this folder lives, or None when another has it."""
    import fcntl

    descriptor = os.open(folder / PID_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def read_state(folder: Path) -> EmbeddedState | None:
    """What the supervisor of a folder told last; None: nothing, or not to be read."""
    try:
        document: Mapping[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
        return EmbeddedState(**document)
    except (OSError, ValueError, TypeError):
        return None


def main(arguments: Sequence[str]) -> int:
    """Supervise: FOLDER COMMAND…"""
    from agentic_flow.core.version import __version__

    folder = Path(arguments[0])
    lock = hold(folder)
    if lock is None:
        return 1
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    supervisor = Supervisor(folder, arguments[1:], __version__)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
