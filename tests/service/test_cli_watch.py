# pyright: basic, reportMissingImports=false
"""`agentic-flow swarm watch` from outside: on a real terminal, through cuts, and beside a real server."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import pytest
from cli_process import COMMAND, TIMEOUT_S, Place
from scripted_team import GOAL, make_folder, team

from agentic_flow.client import Client
from agentic_flow.core.settings import load
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

HELD_MAX_S = 250.0
"""Longer than servers take to start, and a circuit to close, on a busy machine."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a pseudo-terminal of 30 lines and 100 columns."""

    def __init__(self, place: Place, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            cwd=place.folder,
            env={**place.environment, "TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.raw = ""
        # One reading ends anywhere, also within a sign.
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def until(self, wanted: str) -> None:
        """Read on until this was shown."""
        start = len(self.raw)
        while wanted not in _ESCAPES.sub("", self.raw[start:]):
            read = os.read(self._ours, 65536)
            assert read, self.raw
            self.raw += self._decoder.decode(read)

    def end(self) -> int:
        """Read to the end; the exit code."""
        with suppress(OSError):  # how Linux tells that nobody has the other side any more
            while read := os.read(self._ours, 65536):
                self.raw += self._decoder.decode(read)
        os.close(self._ours)
        return self.process.wait(TIMEOUT_S)


class Piped:
    """A command whose output, both streams of it, is read as it comes."""

    def __init__(self, place: Place, *words: str) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, *words],
            cwd=place.folder,
            env=place.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        self._stream = self._process.stdout
        self.out = ""

    def until(self, wanted: str) -> None:
        """Read on until a line has this."""
        for line in self._stream:
            self.out += line
            if wanted in line:
                return
        raise AssertionError(f"ended without saying {wanted!r}: {self.out}")

    def end(self) -> int:
        """Read to the end; the exit code."""
        with self._stream:
            self.out += self._stream.read()
        return self._process.wait(TIMEOUT_S)


class Proxy:
    """Forwards a port of ours to `target`, which may change."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in [self._listener, *self._open]:
            each.close()


@pytest.fixture
def gate() -> Generator[Event]:
    """Workers answer when it is set."""
    event = Event()
    yield event
    event.set()


def held(gate: Event) -> Callable[[SeenRequest], Reply]:
    def script(request: SeenRequest) -> Reply:
        if "Your question:" in request.last_text:
            gate.wait(HELD_MAX_S)
        return team(request)

    return script


@contextmanager
def serving(tmp_path: Path, gate: Event) -> Generator[tuple[Place, Path]]:
    """A place whose models are held by the gate, and a folder to work on."""
    with FakeProvider(held(gate)) as provider:
        yield (
            Place(
                tmp_path,
                OPENAI_BASE_URL=provider.openai_url,
                OPENAI_API_KEY="test-key",
                AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
                AGENTIC_FLOW_SWARM__LEASE_S="5",
            ),
            make_folder(tmp_path),
        )


def client_of(tmp_path: Path, url: str) -> Client:
    settings = load(
        {"data_dir": str(tmp_path / "client")},
        environ={},
        directory=tmp_path,
        user_config=tmp_path / "none.toml",
    ).settings
    return Client(url, settings=settings)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^#(\d+) ", text, re.MULTILINE)]


def test_a_live_view_on_a_terminal(tmp_path: Path, gate: Event) -> None:
    """Catches a view that shows no agents at work, no progress, no end, or another exit code."""
    with serving(tmp_path, gate) as (place, folder), place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        with client_of(tmp_path, url) as client:
            run_id = client.runs.submit(GOAL, input=folder, agents=2)
            terminal = Terminal(place, "swarm", "watch", run_id, "--url", url)
            terminal.until("▶ working")
            terminal.until("assignments known so far")
            assert terminal.process.poll() is None
            gate.set()
            assert terminal.end() == 0, terminal.raw
            shown = client.runs.wait(run_id)
    last = _ESCAPES.sub("", terminal.raw[terminal.raw.rindex(f"{run_id}  ") :])
    assert "▶" not in last
    assert re.search(r"worker-1\s+✓ completed\s+model\s+\d+\s+(\d+ min )?[\d.]+ s\s+\d+\s+", last), last
    tokens = shown.usage.input_tokens + shown.usage.output_tokens
    assert f"{tokens} tokens" in terminal.raw
    assert f"run {run_id} completed" in last


def test_a_cut_connection_goes_on_where_it_was(tmp_path: Path, gate: Event) -> None:
    """Catches events lost or repeated when the server is killed and another takes the run over."""
    with serving(tmp_path, gate) as (place, folder):
        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]
            proxy = Proxy(int(url.rpartition(":")[2]))
            with client_of(tmp_path, url) as client:
                run_id = client.runs.submit(GOAL, input=folder, agents=2)
            watching = Piped(place, "swarm", "watch", run_id, "--url", proxy.url, "--reconnect-s", "250")
            watching.until("worker-1: begins")
            server.signal(signal.SIGKILL)
            server.end()
        watching.until("connection lost, trying again")
        with place.start("serve", "platform") as server:
            proxy.target = int(server.addresses(1)["platform"].rpartition(":")[2])
            watching.until("connected again")
            gate.set()
            code = watching.end()
            proxy.close()
    assert code == 0, watching.out
    seen = numbers(watching.out)
    assert seen == list(range(1, len(seen) + 1))
    assert "run: taken over" in watching.out
    assert "run: completed" in watching.out.splitlines()[-2]


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_return(tmp_path: Path, gate: Event) -> None:
    """Catches a watcher who cancels what he watches, and a return that repeats or misses lines."""
    with serving(tmp_path, gate) as (place, folder), place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        with client_of(tmp_path, url) as client:
            run_id = client.runs.submit(GOAL, input=folder, agents=2)
            terminal = Terminal(place, "swarm", "watch", run_id, "--url", url)
            terminal.until("▶ working")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.end() == 130
            assert f"agentic-flow swarm watch {run_id} --url {url}" in terminal.raw
            assert client.runs.show(run_id).state == "running"
            gate.set()
            assert client.runs.wait(run_id).state == "completed"
        whole = place.run("swarm", "watch", run_id, "--url", url)
        rest = place.run("swarm", "watch", run_id, "--url", url, "--after", "9", "--json")
    assert (whole.code, rest.code) == (0, 0)
    assert [int(n) for n in re.findall(r'"sequence":(\d+)', rest.out)] == numbers(whole.out)[9:]


def test_the_exit_code_tells_how_a_run_ended(tmp_path: Path) -> None:
    """Catches failure that looks like success to a script, and a `run --watch` that shows something else."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    failed = place.run(
        "run", "What is hot?", "-i", folder, "--accept", "min_citations:99", "--json", "--watch"
    )
    seen = numbers(failed.err)
    assert seen == list(range(1, len(seen) + 1))
    watched = place.run("swarm", "watch", failed.data["run_id"])
    assert failed.code != 0
    assert numbers(watched.out) == seen
    assert watched.code == failed.code
    assert "run: failed" in watched.out
    assert watched.problem == failed.problem
    unknown = place.run("swarm", "watch", "run-none")
    assert (unknown.code, unknown.out) == (4, "")
