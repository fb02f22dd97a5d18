"""The run database on a connection that is cut in the middle of a conversation, with the server at work.

A wire between the engine and PostgreSQL is cut when a certain statement passes: before the server gets it, or
when it has committed and before its answer is there.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import pytest

from agentic_flow.core.errors import Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from postgres_server import new_database, postgres_server

pytestmark = pytest.mark.timeout(120)

HISTORY = b"SELECT step_index, name, output, error FROM af_steps"
ACCEPTANCE = b"INSERT INTO af_workflows"
CLAIM = b"SELECT status, executor_id, epoch, takeovers"
TIMEOUT_S = 30.0

Side = Literal["question", "answer"]


class Wire:
    """Forwards a TCP port to a server's Unix socket, and is cut where it is told to.

    Args:
        url: Of a database on a Unix socket.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        (folder,) = parse_qs(parts.query)["host"]
        (self._far,) = Path(folder).glob(".s.PGSQL.*[0-9]")
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{port}{parts.path}?sslmode=disable"
        self.cuts = 0
        self._cut: tuple[bytes, Side, int] = (b"", "question", 0)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, statement: bytes, side: Side, times: int) -> None:
        """Cut connections: as this is asked, or as the transaction in which it was has committed."""
        self._cut, self.cuts = (statement, side, times), 0

    def close(self) -> None:
        for end in [self._listener, *self._open]:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._far))
                self._open += [near, far]
                threading.Thread(target=self._talk, args=(near, far), daemon=True).start()

    def _talk(self, near: socket.socket, far: socket.socket) -> None:
        deaf = threading.Event()
        threading.Thread(target=self._answer, args=(near, far, deaf), daemon=True).start()
        is_meant = False
        with suppress(OSError):
            while data := near.recv(1 << 20):
                statement, side, times = self._cut
                wanted = self.cuts < times
                is_meant = is_meant or (wanted and statement in data)
                if is_meant and side == "question":
                    self.cuts += 1
                    break
                if is_meant and b"COMMIT" in data:
                    deaf.set()
                far.sendall(data)
        self._end(near, far)

    def _answer(self, near: socket.socket, far: socket.socket, deaf: threading.Event) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 20):
                if deaf.is_set():
                    self.cuts += 1
                    break
                near.sendall(data)
        self._end(near, far)

    @staticmethod
    def _end(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
def wire(server: str) -> Generator[Wire]:
    made = Wire(new_database(server))
    yield made
    made.close()


class Held:
    """A workflow of one step, which waits until it is told to end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def __call__(self, context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def held(_: StepContext) -> JsonObject:
            self.begun.set()
            await self.goes_on.wait()
            return {"done": True}

        return await context.step("held", held)


def engine_on(wire: Wire, folder: Path, flow: Held) -> SqlRunEngine:
    engine = SqlRunEngine(wire.url, folder, lease_s=1.0, runs_parallel_max=8)
    engine.register("flow", flow)
    return engine


@pytest.mark.parametrize(
    ("statement", "side"),
    [(HISTORY, "question"), (CLAIM, "question"), (CLAIM, "answer")],
    ids=["history", "claim", "claim-answer"],
)
def test_a_run_taken_over_on_a_cut_connection_goes_on(
    statement: bytes, side: Side, wire: Wire, tmp_path: Path
) -> None:
    """Catches a run that is recorded as failed because its history could not be read, and one that a living
    process has taken over without knowing it."""

    async def main() -> None:
        flow = Held()
        first = engine_on(wire, tmp_path, flow)
        async with first.open():
            await first.start("flow", "run", {}, tenant="t")
            await flow.begun.wait()
        flow.goes_on.set()
        wire.cut_at(statement, side, 1)
        second = engine_on(wire, tmp_path, flow)
        async with second.open(takeover=True), asyncio.timeout(TIMEOUT_S):
            record = await second.wait("run")
        assert (record.state, record.output) == ("completed", {"done": True})
        assert wire.cuts == 1, "it was never cut"

    asyncio.run(main())


def test_what_was_accepted_on_a_cut_connection_is_executed(wire: Wire, tmp_path: Path) -> None:
    """Catches a run that is in the store, of a process that lives, and that nobody ever executes: it was
    committed and the answer lost, until the engine gave up; then the caller asks again."""

    async def main() -> None:
        flow = Held()
        flow.goes_on.set()
        engine = engine_on(wire, tmp_path, flow)
        async with engine.open(takeover=True):
            wire.cut_at(ACCEPTANCE, "answer", 1000)
            with pytest.raises(Unavailable):
                await engine.start("flow", "run", {}, tenant="t")
            assert wire.cuts > 0
            wire.cut_at(b"", "question", 0)
            assert not await engine.start("flow", "run", {}, tenant="t"), "it is there already"
            async with asyncio.timeout(TIMEOUT_S):
                assert (await engine.wait("run")).output == {"done": True}

    asyncio.run(main())
