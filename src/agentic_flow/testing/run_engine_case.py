"""What the checks of `run_engine_contract` are made with: a store, engines on it, a journal of effects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunEngine, RunState, StepContext, Workflow

TIMEOUT_S = 30.0
TENANT = "tenant-a"


class MakeEngine(Protocol):
    """Gives an unopened engine on the store of the case."""

    def __call__(
        self,
        *,
        runs_parallel_max: int = 8,
        queue_runs_max: Mapping[str, int] | None = None,
        tenant_runs_max: int | None = None,
        queue_starts_per_minute: Mapping[str, int] | None = None,
        minute_s: float = 60.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> RunEngine: ...


class WrongClock:
    """The machine's clock, so many seconds ahead (or, below zero, behind)."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def time_s(self) -> float:
        return time.time() + self.ahead_s

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


@dataclass
class RunEngineCase:
    """One store, and names that no other check on it uses."""

    make: MakeEngine
    prefix: str

    def id(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    @asynccontextmanager
    async def engine(
        self, takeover: bool = False, runs_parallel_max: int = 8, /, **workflows: Workflow
    ) -> AsyncGenerator[RunEngine]:
        """An open engine that knows these workflows; each has the case's prefix in its name."""
        engine = self.make(runs_parallel_max=runs_parallel_max)
        for name, workflow in workflows.items():
            engine.register(self.id(name), workflow)
        async with engine.open(takeover=takeover):
            yield engine

    @asynccontextmanager
    async def worker(
        self, runs_parallel_max: int = 8, tenant_runs_max: int | None = None, /, **workflows: Workflow
    ) -> AsyncGenerator[RunEngine]:
        """An open engine that works for the queue `self.id("queue")`."""
        engine = self.make(runs_parallel_max=runs_parallel_max, tenant_runs_max=tenant_runs_max)
        for name, workflow in workflows.items():
            engine.register(self.id(name), workflow)
        async with engine.open(takeover=True, queues=[self.id("queue")]):
            yield engine


@dataclass
class Journal:
    """What happened outside the store: how often which step ran, and with which key."""

    calls: list[str] = field(default_factory=list[str])
    keys: list[str] = field(default_factory=list[str])
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, name: str) -> Callable[[StepContext], Awaitable[JsonObject]]:
        """A step that notes its execution."""

        async def run(step: StepContext) -> JsonObject:
            self.calls.append(name)
            self.keys.append(step.idempotency_key)
            return {"name": name, "nth": self.calls.count(name)}

        return run

    def hold(self, name: str) -> Callable[[StepContext], Awaitable[JsonObject]]:
        """A step that says it has begun and ends when the gate is open."""

        async def run(step: StepContext) -> JsonObject:
            self.calls.append(name)
            self.keys.append(step.idempotency_key)
            self.begun.set()
            await self.gate.wait()
            return {"name": name, "nth": self.calls.count(name)}

        return run


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll what no event announces, for a bounded time."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await condition():  # noqa: ASYNC110 - the store raises no events
            await asyncio.sleep(0.02)


async def refused(operation: Awaitable[object], kind: type[AgenticFlowError]) -> None:
    """The operation must raise this error, with a hint for the reader."""
    try:
        await operation
    except kind as error:
        if error.hint is None:
            raise AssertionError(f"{error.message!r} says not what to do") from error
        return
    raise AssertionError(f"{kind.__name__} was expected")


async def state_of(engine: RunEngine, workflow_id: str) -> RunState:
    record = await engine.get(workflow_id)
    assert record is not None, workflow_id
    return record.state
