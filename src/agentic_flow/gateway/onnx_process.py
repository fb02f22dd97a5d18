"""The gateway's side of a model's process: starting it, sending generations, noticing its death."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from agentic_flow.core.errors import OF_REQUEST, AgenticFlowError, DataCorrupted, InvalidSettings, Unavailable

Json = dict[str, Any]
Sink = Callable[[Json], None]
INSTALL = "pip install 'agentic-flow[onnx-genai]'"
LOAD_TIMEOUT_S = 900.0
EXIT_TIMEOUT_S = 5.0
_STDERR_LINES = 20


class ModelProcess:
    """One loaded model in a process of its own. `start` makes it.

    Sinks are called in the reading thread; the last event that one gets is `end`, `error` or `died`.
    """

    def __init__(self, process: subprocess.Popen[bytes], lines: deque[str]) -> None:
        self._process = process
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._dead: Json | None = None
        self._lines = lines
        # A full pipe must not hold up an event loop, so a thread writes.
        self._commands: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        assert process.stdin is not None
        threading.Thread(target=_write, args=(self._commands, process.stdin), daemon=True).start()
        self._finalizer = weakref.finalize(self, _finish, process, self._commands)

    @classmethod
    def start(cls, folder: Path, threads: int | None) -> ModelProcess:
        """Load the model of a folder; blocks while it loads.

        Raises:
            InvalidSettings: the library is not installed.
            DataCorrupted: the folder's files cannot be loaded, or loading them crashed the process.
            Unavailable: there was not enough memory, or it took too long.
        """
        words = [sys.executable, "-m", "agentic_flow.gateway.onnx_worker", str(folder)]
        process = subprocess.Popen(  # noqa: S603 - our own module, and a path of the operator's
            [*words, *([str(threads)] if threads is not None else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        lines: deque[str] = deque(maxlen=_STDERR_LINES)
        complaints = threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True)
        complaints.start()
        timer = threading.Timer(LOAD_TIMEOUT_S, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        first: Json = json.loads(line) if line.endswith(b"\n") else {"event": "died"}
        if first["event"] != "loaded":
            _finish(process, None)
            process.stdout.close()
            complaints.join(EXIT_TIMEOUT_S)
            raise _load_error(folder, first, process.returncode, lines)
        started = cls(process, lines)
        reader = threading.Thread(target=_read, args=(weakref.ref(started), process.stdout), daemon=True)
        reader.start()
        return started

    @property
    def alive(self) -> bool:
        return self._dead is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def generations(self) -> int:
        """Answers under way."""
        return len(self._sinks)

    def generate(self, command: Json, sink: Sink) -> int:
        """Begin a generation; its events go to `sink`. Gives its id."""
        with self._lock:
            key = next(self._ids)
            dead = self._dead
            if dead is None:
                self._sinks[key] = sink
        if dead is not None:
            sink(dead)
        else:
            self._send({**command, "op": "generate", "id": key})
        return key

    def more(self, key: int, lines: int) -> None:
        """Allow so many more texts of a generation."""
        self._send({"op": "more", "id": key, "lines": lines})

    def cancel(self, key: int) -> None:
        """Have a generation end after the token that is being computed."""
        self._send({"op": "cancel", "id": key})

    def runs(self, key: int) -> bool:
        """Whether this generation has not ended."""
        return key in self._sinks

    def kill(self) -> None:
        """End the process at once, whatever it computes."""
        self._process.kill()

    def close(self) -> None:
        """End the process: politely, then at once. Blocks until it is gone."""
        self._finalizer()

    def _send(self, command: Json) -> None:
        self._commands.put(command)

    def dispatch(self, event: Json) -> None:
        """Hand an event to its generation."""
        key = event["id"]
        with self._lock:
            last = event["event"] in ("end", "error")
            sink = self._sinks.pop(key, None) if last else self._sinks.get(key)
        if sink is not None:
            sink(event)

    def died(self) -> None:
        """Tell every generation that the process is gone."""
        code = self._process.wait()
        with self._lock:
            self._dead = {"event": "died", "message": f"{_ending(code)}{_said(self._lines)}"}
            sinks, self._sinks = list(self._sinks.values()), {}
        for sink in sinks:
            sink(self._dead)


def post_to(loop: asyncio.AbstractEventLoop, take: Callable[[Json], None]) -> Sink:
    """A sink that hands events to `take` in an event loop."""

    def sink(event: Json) -> None:
        try:
            loop.call_soon_threadsafe(take, event)
        except RuntimeError:
            return  # the loop is closed, and with it whoever waited

    return sink


def _read(process: weakref.ref[ModelProcess], output: IO[bytes]) -> None:
    # Holds no strong reference while it waits, so that a forgotten process is finished with its object.
    with output:
        for line in output:
            reader = process()
            if reader is None:
                return
            reader.dispatch(cast(Json, json.loads(line)))
            del reader
    reader = process()
    if reader is not None:
        reader.died()


def _collect(errors: IO[bytes], lines: deque[str]) -> None:
    with errors:
        for line in errors:
            lines.append(line.decode("utf-8", "replace").strip()[:500])


def _write(commands: queue.SimpleQueue[Json | None], stdin: IO[bytes]) -> None:
    try:
        with stdin:
            while (command := commands.get()) is not None:
                stdin.write(json.dumps(command).encode() + b"\n")
                stdin.flush()
    except BrokenPipeError:
        return  # the process is gone: the reading thread tells every sink


def _finish(process: subprocess.Popen[bytes], commands: queue.SimpleQueue[Json | None] | None) -> None:
    if commands is None:
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
    else:
        commands.put(None)  # the end of its input ends it
    try:
        process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


def _said(lines: deque[str]) -> str:
    said = [line for line in list(lines) if line]
    return f"; it said {said[-1][:300]!r}" if said else ""


def _load_error(folder: Path, first: Json, code: int | None, lines: deque[str]) -> AgenticFlowError:
    message = str(first.get("message", ""))
    match first.get("kind", "died"):
        case "missing":
            return InvalidSettings(
                f"the provider 'onnx' needs onnxruntime-genai, which is not installed ({message})",
                hint=INSTALL,
            )
        case "memory":
            return _no_memory(folder, message)
        case "broken":
            return DataCorrupted(
                f"the model in {str(folder)!r} cannot be loaded: {message}",
                hint="download the folder again, whole; onnxruntime-genai must know this kind of model",
            )
        case _ if code == -signal.SIGKILL:
            return _no_memory(folder, "its process was killed, by the system or because it took too long")
        case _:
            return DataCorrupted(
                f"loading the model in {str(folder)!r} crashed its process: {_ending(code)}{_said(lines)}",
                hint="download the folder again, whole; onnxruntime-genai must know this kind of model",
            )


def _no_memory(folder: Path, message: str) -> Unavailable:
    return Unavailable(
        f"the model in {str(folder)!r} could not be loaded: {message}",
        hint="it needs as much free memory as its files have bytes, and more for long prompts; lower "
        "gateway.onnx.loaded_max or use a smaller model",
        details=OF_REQUEST,
    )
