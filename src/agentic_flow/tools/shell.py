"""shell_run: one allowed program, by argv, with limits, and nothing left behind.

Never a shell: the words go to the program as they are. This bounds what a command costs; it does not
imprison it. A program on the allow-list can do what the user of this process can, which is why the list is
empty by default and why a run with path restrictions gets no commands at all.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import Field, StringConstraints

from agentic_flow.core.errors import Forbidden, InvalidInput, NotFound, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.core.toolkit import Stop, Tool, ToolCall, ToolInput, in_thread
from agentic_flow.tools.confine import Confinement
from agentic_flow.tools.file_arguments import CanonicalPath

_WORKER = Path(__file__).with_name("shell_worker.py")
_ENVELOPE_BYTES = 4096  # room for the keys and the argv around the output
_MARGIN_S = 0.5  # a command is ended a little before its call would be, so that its output is not lost
_END_TIMEOUT_S = 8.0
_READ_BYTES = 65536

Word = Annotated[str, StringConstraints(max_length=100_000, pattern=r"^[^\x00]*$")]


@dataclass(frozen=True, slots=True)
class ShellLimits:
    """What one command may use. `memory_max_bytes` is address space, per process."""

    memory_max_bytes: int = 4 * 1024**3
    file_max_bytes: int = 256 * 1024**2
    open_files_max: int = 1024
    core_max_bytes: int = 0


class ShellRun(ToolInput):
    argv: Annotated[
        tuple[Word, ...],
        Field(min_length=1, max_length=256, description="Program and arguments, one word each. No shell."),
    ]
    cwd: Annotated[CanonicalPath, Field(description="Folder to run in. Default: the root.")] = ""
    timeout_s: Annotated[float, Field(gt=0, le=600, description="Time after which it is killed.")] | None = (
        None
    )


def shell_tools(settings: ToolsSettings, *, limits: ShellLimits | None = None) -> list[Tool[Any]]:
    """shell_run for the programs of `tools.shell_allowed`; no tool at all when none is allowed."""
    if not settings.shell_allowed:
        return []
    allowed = frozenset(settings.shell_allowed)
    bounds = limits or ShellLimits()

    async def shell_run(call: ToolCall[ShellRun]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _run(call, allowed, bounds, stop), settle=True)

    return [
        Tool(
            "shell_run",
            f"Run a program without a shell. Allowed: {', '.join(sorted(allowed))}. Returns exit_code or "
            "signal, stdout and stderr (the middle of long output is left out).",
            ShellRun,
            shell_run,
            kind="destructive",
            idempotent=False,
            open_world=True,
        )
    ]


def resolve_program(
    name: str, allowed: Collection[str], search_path: str, roots: Iterable[Path] = ()
) -> tuple[str, str]:
    """(absolute path of the program, the PATH it was found on).

    Relative entries of the search path and folders inside `roots` are left out: what a tool could write
    there must not become a program.

    Raises:
        Forbidden: the name is not on the allow-list (or is a path).
        NotFound: it is, but there is no such program.
    """
    if name not in allowed or "/" in name:
        raise Forbidden(
            f"program {name!r} is not allowed",
            hint=f"allowed are {', '.join(sorted(allowed)) or 'none'}; tools.shell_allowed adds more",
        )
    inside = [os.path.realpath(root) for root in roots]
    folders: list[str] = []
    for folder in search_path.split(os.pathsep):
        real = os.path.realpath(folder)
        if os.path.isabs(folder) and not any(os.path.commonpath([real, root]) == root for root in inside):
            folders.append(folder)
    for folder in folders:
        candidate = os.path.join(folder, name)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate, os.pathsep.join(folders)
    raise NotFound(f"program {name!r} is allowed but not installed", hint="install it, or use another one")


def _run(call: ToolCall[ShellRun], allowed: Collection[str], limits: ShellLimits, stop: Stop) -> JsonObject:
    asked, scope = call.arguments, call.scope
    if scope.paths_allowed or scope.paths_forbidden:
        raise Forbidden(
            "this run has path restrictions, which a command could not be held to",
            hint="use the file tools, or start the run without allowed and forbidden paths",
        )
    program, path = resolve_program(
        asked.argv[0], allowed, os.environ.get("PATH", os.defpath), scope.roots.values()
    )
    timeout_s = min(asked.timeout_s or math.inf, max(0.0, call.deadline.remaining_s - _MARGIN_S))
    confinement = Confinement(scope)
    with (
        confinement.open_folder(confinement.locate(asked.cwd)) as folder,
        tempfile.TemporaryDirectory(prefix="agentic-flow-shell-", ignore_cleanup_errors=True) as home,
        _Supervised(
            {
                "argv": asked.argv,
                "path": program,
                "env": {"PATH": path, "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home},
                "folder": folder,
                "limits": {
                    "RLIMIT_CPU": math.ceil(timeout_s) + 1,
                    "RLIMIT_AS": limits.memory_max_bytes,
                    "RLIMIT_FSIZE": limits.file_max_bytes,
                    "RLIMIT_NOFILE": limits.open_files_max,
                    "RLIMIT_CORE": limits.core_max_bytes,
                },
            },
            folder,
            stop,
            keep_bytes=max(call.result_max_bytes - _ENVELOPE_BYTES, _ENVELOPE_BYTES) // 2,
        ) as command,
    ):
        timed_out = command.wait(timeout_s)
    stop.check()
    if command.error:
        raise InvalidInput(f"program {program!r} cannot be started: {command.error}")
    return command.result(asked.cwd, timed_out=timed_out)


class _Output:
    """The beginning and the end of a stream, and its length; memory stays within `keep_bytes`."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep = keep_bytes
        self._head = bytearray()
        self._tail = bytearray()
        self.size_bytes = 0

    def add(self, chunk: bytes) -> None:
        self.size_bytes += len(chunk)
        room = self._keep // 2 - len(self._head)
        self._head += chunk[:room] if room > 0 else b""
        self._tail += chunk[max(room, 0) :]
        if len(self._tail) > self._keep:
            del self._tail[: len(self._tail) - self._keep // 2]

    def text(self) -> tuple[str, bool]:
        """The text within `keep_bytes` of JSON, and whether its middle was left out."""
        keep = self._keep
        while True:
            half = keep // 2
            whole = bytes(self._head + self._tail)
            if len(whole) == self.size_bytes and self.size_bytes <= keep:
                text, cut = whole.decode("utf-8", "replace"), False
            else:
                head, tail = bytes(self._head[:half]), bytes(self._tail[-half:] if half else b"")
                left_out = self.size_bytes - len(head) - len(tail)
                text = (
                    head.decode("utf-8", "replace")
                    + f"\n… {left_out} bytes left out …\n"
                    + tail.decode("utf-8", "replace")
                )
                cut = True
            size = len(orjson.dumps(text))
            if size <= self._keep + 64:
                return text, cut
            keep = min(keep - 1, keep * self._keep // size)  # escapes and U+FFFD take more than their byte


class _Supervised:
    """A command under its supervisor (see `shell_worker`), read until it and all its children are gone."""

    def __init__(self, job: JsonObject, folder: int, stop: Stop, *, keep_bytes: int) -> None:
        self._job = job
        self._folder = folder
        self._stop = stop
        self._out = _Output(keep_bytes)
        self._err = _Output(keep_bytes)
        self._report = bytearray()
        self._duration_s = 0.0
        self.error: str | None = None
        self.status: int | None = None

    def __enter__(self) -> _Supervised:
        self._report_read, report_write = os.pipe()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._started_s = time.monotonic()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own script by our own interpreter
                [sys.executable, "-I", "-S", str(_WORKER), str(report_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(report_write, self._folder),
                start_new_session=True,
                cwd="/",
                env={},
            )
        except OSError as error:
            self._close_pipes()
            raise Unavailable(f"no process can be started: {error.strerror}") from None
        finally:
            os.close(report_write)
        self._stop.on_set(self._wake)
        assert self._process.stdin
        job = orjson.dumps(self._job)
        with suppress(BrokenPipeError):  # then the report's end tells
            self._process.stdin.write(len(job).to_bytes(4, "big") + job)
            self._process.stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream
            stream.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it is stuck in the kernel; its command dies with it
            self._process.kill()
            self._process.wait()
        self._stop.forget(self._wake)
        self._close_pipes()

    def wait(self, timeout_s: float) -> bool:
        """Read until the command has ended or time is up or nobody waits; whether time was up."""
        timed_out = self._pump(self._started_s + timeout_s, wakeable=True)
        self._end()
        if not self._pump(time.monotonic() + _END_TIMEOUT_S, wakeable=False):
            answer: JsonObject = orjson.loads(self._report or b"{}")
            self.error, self.status = answer.get("error"), answer.get("status")
        self._duration_s = time.monotonic() - self._started_s
        return timed_out and self.status is None

    def result(self, cwd: str, *, timed_out: bool) -> JsonObject:
        """What the model reads."""
        stdout, cut_out = self._out.text()
        stderr, cut_err = self._err.text()
        exit_code: int | None = None
        ended_by: str | None = "SIGKILL"
        if self.status is not None:
            code = os.waitstatus_to_exitcode(self.status)
            exit_code = code if code >= 0 else None
            ended_by = None if code >= 0 else _signal_name(-code)
        return {
            "exit_code": exit_code,
            "signal": ended_by,
            "timed_out": timed_out,
            "stdout": stdout,
            "stderr": stderr,
            "stdout_bytes": self._out.size_bytes,
            "stderr_bytes": self._err.size_bytes,
            "truncated": cut_out or cut_err,
            "cwd": cwd,
            "duration_s": round(self._duration_s, 3),
        }

    def _pump(self, until_s: float, *, wakeable: bool) -> bool:
        """Move output until every pipe is at its end; True when stopped by time or by a wake-up before."""
        assert self._process.stdout
        assert self._process.stderr
        sinks = {
            self._process.stdout.fileno(): self._out.add,
            self._process.stderr.fileno(): self._err.add,
            self._report_read: self._report.extend,
        }
        poll = select.poll()
        for descriptor in sinks:
            poll.register(descriptor, select.POLLIN)
        if wakeable:
            poll.register(self._wake_read, select.POLLIN)
        while sinks:
            left_s = until_s - time.monotonic()
            ready = poll.poll(max(0.0, left_s) * 1000)
            if left_s <= 0 or any(descriptor == self._wake_read for descriptor, _ in ready):
                return True
            for descriptor, _ in ready:
                chunk = os.read(descriptor, _READ_BYTES)
                if chunk:
                    sinks[descriptor](chunk)
                else:
                    poll.unregister(descriptor)
                    del sinks[descriptor]
        return False

    def _end(self) -> None:
        """Tell the supervisor to kill everything; nothing happens when it has already."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_write, b"!")

    def _close_pipes(self) -> None:
        for descriptor in (self._report_read, self._wake_read, self._wake_write):
            os.close(descriptor)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
