"""All services in one process in the background, for machines without a container engine."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from agentic_flow.core.errors import AgenticFlowError, Conflict, DeadlineExceeded, Unavailable
from agentic_flow.core.settings import TlsSettings
from agentic_flow.core.tls import client_context
from agentic_flow.deploy.supervisor import LOG_FILE, PID_FILE, EmbeddedState, hold, read_state

SERVER = (sys.executable, "-m", "agentic_flow", "serve", "all", "--json")
_POLL_S = 0.1
_PROBE_S = 2.0
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class EmbeddedStatus:
    """Whether it runs, and what its ports say: service → `ready` or what is wrong."""

    state: EmbeddedState | None
    running: bool
    health: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether it runs and every port is ready."""
        return self.running and bool(self.health) and set(self.health.values()) == {"ready"}


class Embedded:
    """The background process of one data folder.

    Args:
        folder: Where its pid file, state and log are: the data folder.
        tls: How it is asked when it speaks TLS.
    """

    def __init__(self, folder: Path, *, tls: TlsSettings | None = None) -> None:
        self.folder = folder.absolute()
        self._tls = tls or TlsSettings()

    @property
    def log_file(self) -> Path:
        """What it wrote; older parts are beside it with a number."""
        return self.folder / LOG_FILE

    def is_running(self) -> bool:
        """Whether its supervisor lives: by the lock that it holds, not by a number."""
        if not (self.folder / PID_FILE).exists():
            return False
        lock = hold(self.folder)
        if lock is None:
            return True
        os.close(lock)
        return False

    def up(
        self,
        environment: Mapping[str, str],
        *,
        timeout_s: float,
        progress: Callable[[str, str, float], None],
        command: Sequence[str] = SERVER,
    ) -> dict[str, str]:
        """Start it and wait until every port is ready; the addresses by service.

        Args:
            environment: Of the server, whole.

        Raises:
            Conflict: it runs already.
            Unavailable: it ended; with the last lines of its log.
            DeadlineExceeded: it was not ready in time. It is left running.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_running():
            raise Conflict(
                f"the server of {str(self.folder)!r} runs already", hint="see `agentic-flow status`"
            )
        began_s = time.monotonic()
        seen: dict[str, str] = {}
        supervisor = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "agentic_flow.deploy.supervisor", str(self.folder), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while time.monotonic() - began_s < timeout_s:
            state = read_state(self.folder)
            told = state is not None and state.pid == supervisor.pid
            health = self._health(state) if told and state is not None else {}
            for service, condition in health.items():
                if seen.get(service) != condition:
                    seen[service] = condition
                    progress(service, condition, time.monotonic() - began_s)
            if health and set(health.values()) == {"ready"}:
                assert state is not None
                return dict(state.addresses)
            code = supervisor.poll()
            if code is not None:
                raise self._ended(code)
            time.sleep(_POLL_S)
        raise DeadlineExceeded(
            f"the server was not ready within {timeout_s:g} s",
            hint=f"see {str(self.log_file)!r} and `agentic-flow status`",
            details={"health": seen},
        )

    def down(self, *, timeout_s: float) -> bool:
        """Stop it after its requests; whether there was one.

        Raises:
            DeadlineExceeded: it does not end.
        """
        state = read_state(self.folder)
        if not self.is_running() or state is None:
            return False
        os.kill(state.pid, signal.SIGTERM)
        began_s = time.monotonic()
        while self.is_running():
            if time.monotonic() - began_s > timeout_s:
                raise DeadlineExceeded(
                    f"the server (pid {state.pid}) did not end within {timeout_s:g} s",
                    hint="wait for its requests, or end it yourself",
                )
            time.sleep(_POLL_S)
        return True

    def status(self) -> EmbeddedStatus:
        """What its supervisor told last, and what its ports say now."""
        state, running = read_state(self.folder), self.is_running()
        return EmbeddedStatus(state, running, self._health(state) if running and state is not None else {})

    def _health(self, state: EmbeddedState) -> dict[str, str]:
        return {service: self._ask(url) for service, url in state.addresses.items()}

    def _ask(self, url: str) -> str:
        parts = urlsplit(url)
        host, port = str(parts.hostname), parts.port
        if parts.scheme == "https":
            context = client_context(self._tls)
            # Asked on this machine, by an address that the certificate need not name.
            context.check_hostname = False
            connection = http.client.HTTPSConnection(host, port, timeout=_PROBE_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_PROBE_S)
        try:
            connection.request("GET", "/health/ready")
            answer = connection.getresponse()
            answer.read()
            return "ready" if answer.status == 200 else f"not ready ({answer.status})"
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        finally:
            connection.close()

    def log_lines(self, lines: int) -> list[str]:
        """The last lines of the log."""
        try:
            return self.log_file.read_text("utf-8", errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    def _ended(self, code: int) -> AgenticFlowError:
        log = self.log_lines(_LOG_LINES)
        told = [line for line in log if line.startswith(("error: ", "hint: "))]
        last = told[-2:] or [line for line in log if line.strip()][-1:]
        return Unavailable(
            f"the server ended with {code}: {' '.join(last)[-400:] or 'it wrote nothing'}",
            hint=f"see {str(self.log_file)!r}",
            details={"log": log},
        )
