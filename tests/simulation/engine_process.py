"""A process of the real run engine on time that a simulation makes: its event loop, and what its threads did.

The engine, its claimer, its inbox, its leases, and their SQL on SQLite are the product's. Played are

- the event loop: asyncio's own, without a selector, turned by the simulation when it is its time;
- threads: what is given to one is a request, which the simulation carries out when it arrives;
- the checkpoint writer's and the heartbeat's own threads: tasks that make the same calls in the same order;
- the clocks.
"""

from __future__ import annotations

import asyncio
import functools
import random
import secrets
import socket
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.sql import Connection, SqlDatabase
from agentic_flow.swarm import checkpoints, claiming, heartbeat, leases
from agentic_flow.swarm.engine import SqlRunEngine

POLL_S = 0.5
"""How often a process looks into the queues: ten times rarer than on SQLite, to save the simulation work."""
_BATCH_MAX = 512


class Host(Protocol):
    """What a process needs of its world."""

    now_s: float
    folder: Path
    lease_s: float
    has_locks: bool
    rng: random.Random
    acting: Process | None

    def clock_s(self, machine: int) -> float: ...
    def store_clock_s(self) -> float: ...
    def push(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None: ...
    def arriving(self, process: Process, name: str) -> tuple[float, str]: ...
    def reached(self) -> None: ...
    def committed(self) -> None: ...
    def is_odd(self, what: str) -> None: ...


class _Nothing:
    """A selector in which nothing ever happens."""

    def select(self, timeout_s: float | None) -> list[Any]:
        return []


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop of one process. `turn` does what is due."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._selector = _Nothing()
        self.set_exception_handler(self._unexpected)

    def time(self) -> float:
        return self._process.host.now_s

    def _process_events(self, events: Sequence[Any]) -> None: ...

    def _write_to_self(self) -> None: ...

    def run_in_executor(
        self, executor: Any, func: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        self._process.request(functools.partial(func, *arguments), future)
        return future

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._process.host.is_odd(f"{context.get('message')} {context.get('exception')!r}")

    @property
    def next_s(self) -> float:
        """When there is something to do."""
        if self._ready:
            return self.time()
        return self._scheduled[0]._when if self._scheduled else float("inf")

    def turn(self) -> None:
        asyncio._set_running_loop(self)
        try:
            self._run_once()
        finally:
            asyncio._set_running_loop(None)


class MachineClock:
    """The clock of the machine that a process is on."""

    def __init__(self, host: Host, machine: int) -> None:
        self._host = host
        self._machine = machine

    def time_s(self) -> float:
        return self._host.clock_s(self._machine)

    def monotonic_s(self) -> float:
        return self._host.now_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


class Process:
    """One process with an engine.

    Args:
        host: Its world.
        machine: Which machine it is on.
        name: Of no other process.
        queues: Those it works for.
        settings: Of its engine.
    """

    def __init__(self, host: Host, machine: int, name: str, queues: Sequence[str], **settings: Any) -> None:
        self.host = host
        self.machine = machine
        self.name = name
        self.queues = queues
        self.lives = True
        self.is_open = False
        self.paused_until_s = 0.0
        self.clock = MachineClock(host, machine)
        self.loop = ProcessLoop(self)
        with self.acts():
            self.engine = SqlRunEngine(None, host.folder, lease_s=host.lease_s, clock=self.clock, **settings)
        self._leave: asyncio.Event | None = None
        self._remains: set[asyncio.Task[Any]] = set()
        self.executor_id = self.engine._executor_id

    def begin(self) -> None:
        self.spawn(self._life())

    async def _life(self) -> None:
        while True:
            self._leave = asyncio.Event()
            try:
                async with self.engine.open(takeover=True, queues=self.queues):
                    self.is_open = True
                    try:
                        await self._leave.wait()
                    finally:
                        self.is_open = False
                self.lives = False
                self._remains = asyncio.all_tasks(self.loop)
                return
            except AgenticFlowError:  # the store was away when it began: its supervisor starts it again
                await asyncio.sleep(1.0)

    def leave(self) -> None:
        """End in order."""
        if self._leave is not None:
            self.loop.call_soon(self._leave.set)

    def die(self) -> None:
        """As by `kill -9`: nothing of it is done any more, and the operating system drops its lock."""
        self.lives = False
        self.is_open = False
        self._remains = asyncio.all_tasks(self.loop)  # else the collector would clean up after it
        self.engine._present.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(work)

    @property
    def next_s(self) -> float:
        """When it has something to do."""
        return max(self.loop.next_s, self.paused_until_s) if self.lives else float("inf")

    @contextmanager
    def acts(self) -> Generator[None]:
        """Whatever is done meanwhile, this process does."""
        before, self.host.acting = self.host.acting, self
        try:
            yield
        finally:
            self.host.acting = before

    def turn(self) -> None:
        with self.acts():
            self.loop.turn()

    # ---- requests to the store ---------------------------------------------------------------------------

    def request(self, call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        name = _name_of(call)
        delay_s, fate = self.host.arriving(self, name)
        self.host.push(delay_s, self._arrive, call, name, future, fate)

    def _arrive(self, call: Callable[[], Any], name: str, future: asyncio.Future[Any], fate: str) -> None:
        """It is carried out, whatever has become of who asked; on SQLite that is the same process."""
        if not self.lives and (self.host.has_locks or name.startswith("SqlRunEngine.")):
            return
        answer: Any = None
        error: Exception | None = None
        with self.acts(), self.host.carrying_out(name, fate):
            try:
                answer = call()
            except Exception as raised:  # noqa: BLE001 - it is the answer to who asked
                error = raised
        late_s = 1.0 if isinstance(error, Unavailable) else 0.004
        self.host.push(late_s, self._answered, future, answer, error)

    def _answered(self, future: asyncio.Future[Any], answer: Any, error: Exception | None) -> None:
        if not self.lives:
            return
        if self.host.now_s < self.paused_until_s:
            self.host.push(self.paused_until_s - self.host.now_s, self._answered, future, answer, error)
        elif future.done():  # who asked has been cancelled
            return
        elif error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)

    # ---- the end of the simulation -----------------------------------------------------------------------

    def bury(self) -> None:
        """End what is left of it, out of every time, with a store that is away."""
        self.lives = True
        self.paused_until_s = 0.0
        for _ in range(50):
            left = asyncio.all_tasks(self.loop)
            if not left:
                break
            for task in left:
                task.cancel()
            for _ in range(50):
                self.turn()
        self.loop.set_exception_handler(lambda loop, context: None)
        self.loop.close()
        self.engine._present.close()
        self.engine._database.close()


def _name_of(call: Any) -> str:
    while isinstance(call, functools.partial):
        # `asyncio.to_thread` gives `context.run` the function as its first argument.
        call = call.args[0] if call.args and getattr(call.func, "__name__", "") == "run" else call.func
    return str(getattr(call, "__qualname__", call))


# ---- what stands in for the two threads ------------------------------------------------------------------


def _writer_begins(self: Any, database: SqlDatabase, *, patience_s: float) -> None:
    self._database = database
    self._patience_s = patience_s
    self._loop = asyncio.get_running_loop()
    self._pending = []
    self._line = []
    self._is_closing = False
    self._working = None


def _writer_hands_over(self: Any) -> None:
    self._line += self._pending
    self._pending = []
    if self._line and self._working is None:
        self._working = self._loop.create_task(_writer_works(self))


async def _writer_works(self: Any) -> None:
    while self._line:
        batch, self._line = self._line[:_BATCH_MAX], self._line[_BATCH_MAX:]
        operations = [operation for operation, _ in batch]
        checkpoints._resolve(batch, await _written(self, operations))
    self._working = None


async def _written(self: Any, operations: Sequence[Any]) -> list[Any]:
    """As `CheckpointWriter._patiently`."""
    give_up_at_s = self._loop.time() + self._patience_s
    pause_s = checkpoints._RETRY_FIRST_S
    again = False
    while True:
        try:
            return await asyncio.to_thread(checkpoints.write, self._database, operations, again=again)
        except Unavailable as error:
            if self._is_closing or self._loop.time() + pause_s > give_up_at_s:
                return [error] * len(operations)
        except Exception as error:  # noqa: BLE001 - likewise
            return [error] * len(operations)
        await asyncio.sleep(pause_s)
        again = True
        pause_s = min(pause_s * 2, checkpoints._RETRY_MOST_S)


async def _writer_closes(self: Any) -> None:
    self._is_closing = True
    _writer_hands_over(self)
    if self._working is not None:
        await self._working


def _heart_begins(self: Any) -> None:
    self._beat()
    self.has_begun = True
    loop = _host_of_all().acting.loop  # it is begun from a thread
    loop.create_task(_heart_beats(self))


async def _heart_beats(self: Any) -> None:
    while True:
        await asyncio.sleep(self._interval_s)
        if self._end.is_set():
            return
        try:
            await asyncio.to_thread(self._beat)
        except AgenticFlowError:
            continue


def _heart_stops(self: Any) -> None:
    self._end.set()


_HOSTS: list[Any] = []


def _host_of_all() -> Any:
    return _HOSTS[-1]


@contextmanager
def played(host: Any) -> Generator[None]:
    """Let the product's threads, clocks of the store and ways to it be those of this world."""
    transaction, reading = SqlDatabase.transaction, SqlDatabase.reading
    holds_lock = leases.Leases._holds_lock if host.has_locks else lambda self, executor_id: None

    @contextmanager
    def in_transaction(self: SqlDatabase) -> Generator[Connection]:
        host.reached()
        with transaction(self) as connection:
            yield connection
        host.committed()

    @contextmanager
    def while_reading(self: SqlDatabase) -> Generator[Connection]:
        host.reached()
        with reading(self) as connection:
            yield connection

    writer = {"__init__": _writer_begins, "_hand_over": _writer_hands_over, "close": _writer_closes}
    heart = {"start": _heart_begins, "stop": _heart_stops}
    _HOSTS.append(host)
    try:
        with (
            patch.multiple(checkpoints.CheckpointWriter, **writer),
            patch.multiple(heartbeat.Heartbeat, **heart),
            patch.multiple(SqlDatabase, transaction=in_transaction, reading=while_reading),
            patch.object(leases.Leases, "_holds_lock", holds_lock),
            patch.object(leases.RunDatabase, "now_s", lambda self, connection, clock: host.store_clock_s()),
            patch.object(claiming, "_POLL_FILE_S", POLL_S),
            patch.object(secrets, "token_hex", lambda size=None: host.acting.name),
            patch.object(socket, "gethostname", lambda: "sim"),
        ):
            yield
    finally:
        _HOSTS.pop()
