"""Schedules: kept in the run database, fired once by whichever process lives, on a clock of the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Conflict, InvalidInput, NotFound, Unavailable
from agentic_flow.core.ports import RunState
from agentic_flow.swarm.leases import Leases, RunDatabase
from agentic_flow.swarm.schedule_rows import is_any_due
from agentic_flow.swarm.schedule_store import ScheduleStore
from agentic_flow.swarm.scheduler import Scheduler
from agentic_flow.swarm.schedules import ScheduleRequest
from agentic_flow.swarm.workflow_bound import workflow_of
from agentic_flow.swarm.workflow_spec import WorkflowRequest

pytestmark = pytest.mark.anyio
OWNER = Principal("a", "s", frozenset({"runs:read", "runs:write"}))
DAY_S = 86_400.0
START_S = 20_000 * DAY_S  # 2024-10-04, midnight UTC


@dataclass
class SetClock:
    """A clock that stands where it is put."""

    now_s: float = START_S

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(0)


@dataclass
class Accepted:
    workflow: Any


@dataclass
class Runs:
    """What is submitted, once per key, as the coordinator does it."""

    made: dict[str, WorkflowRequest] = field(default_factory=dict[str, WorkflowRequest])
    states: dict[str, RunState] = field(default_factory=dict[str, RunState])
    calls: int = 0
    fails: Exception | None = None
    dies: bool = False

    async def admit(self, principal: Principal, request: WorkflowRequest, started_at_s: float) -> Any:
        return Accepted(workflow_of(request))

    async def submit(
        self, principal: Principal, request: WorkflowRequest, *, idempotency_key: str | None = None
    ) -> str:
        assert principal == OWNER
        assert idempotency_key is not None
        self.calls += 1
        await asyncio.sleep(0)  # another process comes in between
        if self.fails is not None:
            raise self.fails
        self.made[idempotency_key] = request
        self.states.setdefault(f"run {idempotency_key}", "completed")
        if self.dies:
            raise asyncio.CancelledError
        return f"run {idempotency_key}"

    async def state_of(self, run_id: str) -> RunState | None:
        return self.states.get(run_id)


@asynccontextmanager
async def process(
    folder: Path, runs: Runs, clock: SetClock, url: str | None = None
) -> AsyncGenerator[Scheduler]:
    """What one process does about schedules."""
    store = ScheduleStore(url, folder, clock)
    with store.open():
        yield Scheduler(store, admit=runs.admit, submit=runs.submit, state_of=runs.state_of)


def flow(rule: str, name: str = "nightly", **more: Any) -> ScheduleRequest:
    steps = "[{id: a, wait_for: {signal: go}}]"
    return ScheduleRequest(text=f"{{name: {name}, schedule: {{{rule}}}, steps: {steps}}}", **more)


async def test_fires_at_its_times(tmp_path: Path) -> None:
    """Catches a time that is early, late, doubled or forgotten, and figures that do not tell of it."""
    runs, clock = Runs(), SetClock()
    async with process(tmp_path, runs, clock) as one:
        added = await one.add(OWNER, flow("cron: '0 6 * * *', timezone: Europe/Vienna", queue="q"))
        assert (added.name, added.state, added.next_at_s) == ("nightly", "active", START_S + 4 * 3600)
        for _ in range(60):
            clock.now_s += 3600
            await one.fire_due()
            await one.fire_due()
        shown = await one.show(OWNER, "nightly")
    assert len(runs.made) == 3
    assert (shown.fired, shown.skipped) == (3, 0)
    assert (shown.last_at_s, shown.next_at_s) == (START_S + 52 * 3600, START_S + 76 * 3600)
    assert {request.queue for request in runs.made.values()} == {"q"}


async def check_two_processes_fire_once(folder: Path, url: str | None = None) -> None:
    """See `test_two_processes_fire_once`."""
    runs, clock = Runs(), SetClock()
    async with process(folder, runs, clock, url) as one, process(folder, runs, clock, url) as other:
        await one.add(OWNER, flow("every_s: 60"))
        for number in range(1, 21):
            clock.now_s = START_S + 60 * number + 1
            await asyncio.gather(one.fire_due(), other.fire_due())
            await asyncio.gather(one.fire_due(), other.fire_due())
            assert len(runs.made) == number
        assert (await other.show(OWNER, "nightly")).fired == 20


async def test_two_processes_fire_once(tmp_path: Path) -> None:
    """Catches a due time that runs twice because two processes found it, or that both left to the other."""
    await check_two_processes_fire_once(tmp_path)


async def check_a_process_dies_while_it_fires(folder: Path, url: str | None = None) -> None:
    """See `test_a_process_dies_while_it_fires`."""
    runs, clock = Runs(dies=True), SetClock()
    async with process(folder, runs, clock, url) as one, process(folder, runs, clock, url) as other:
        await one.add(OWNER, flow("every_s: 60"))
        clock.now_s += 61
        with pytest.raises(asyncio.CancelledError):
            await one.fire_due()
        assert (await other.show(OWNER, "nightly")).fired == 0
        runs.dies = False
        clock.now_s += 5
        await other.fire_due()
        shown = await other.show(OWNER, "nightly")
        assert (shown.fired, shown.last_at_s, len(runs.made), runs.calls) == (1, START_S + 60, 1, 2)
        await one.fire_due()
        assert runs.calls == 2


async def test_a_process_dies_while_it_fires(tmp_path: Path) -> None:
    """Catches a time lost, or run twice, when a process ends between the writes around a submission."""
    await check_a_process_dies_while_it_fires(tmp_path)


async def test_overlap_and_missed_times(tmp_path: Path) -> None:
    """Catches runs that pile up, a night that ends in many of them, and a skip that nobody is told of."""
    runs, clock = Runs(), SetClock()
    async with process(tmp_path, runs, clock) as one:
        await one.add(OWNER, flow("every_s: 3600", "alone"))
        await one.add(OWNER, flow("every_s: 3600, overlap: allow", "many"))
        clock.now_s += 3600
        await one.fire_due()
        alone = await one.show(OWNER, "alone")
        for busy in ("running", "interrupted"):
            runs.states = dict.fromkeys(runs.states, busy)
            clock.now_s += 3600
            await one.fire_due()
        held = await one.show(OWNER, "alone")
        assert (held.fired, held.skipped) == (1, 2)
        assert held.note == f"at 2024-10-04T03:00:00Z run {alone.last_run_id} was interrupted"
        assert ((await one.show(OWNER, "many")).fired, len(runs.made)) == (3, 4)
        runs.states = dict.fromkeys(runs.states, "failed")
        clock.now_s += 10 * 3600 + 1800  # half an hour late for the newest: within the bound
        await one.fire_due()
        await one.fire_due()
        assert ((await one.show(OWNER, "alone")).fired, (await one.show(OWNER, "many")).fired) == (2, 4)
        await one.add(OWNER, flow("cron: '0 0 * * *'", "daily"))
        clock.now_s = START_S + 3 * DAY_S + 7200  # two hours late: past the bound
        await one.fire_due()
        daily = await one.show(OWNER, "daily")
        assert (daily.fired, daily.skipped, daily.next_at_s) == (0, 1, START_S + 4 * DAY_S)
        assert daily.note.startswith("nobody was there at 2024-10-05T00:00:00Z")


async def test_the_clock_jumps(tmp_path: Path) -> None:
    """Catches a schedule that waits for years, or repeats a day, because a clock was wrong for a moment."""
    runs, clock = Runs(), SetClock()
    async with process(tmp_path, runs, clock) as one:
        await one.add(OWNER, flow("every_s: 600"))
        clock.now_s = START_S + 365 * DAY_S
        await one.fire_due()
        assert len(runs.made) == 1
        clock.now_s = START_S + 60
        await one.fire_due()
        shown = await one.show(OWNER, "nightly")
        assert (shown.next_at_s, shown.note) == (START_S + 600, "the clock was set back")
        clock.now_s = START_S + 601
        await one.fire_due()
        assert len(runs.made) == 2
        clock.now_s = START_S + 300  # back by less than an hour: what has run does not run again
        await one.fire_due()
        clock.now_s = START_S + 601
        await one.fire_due()
        assert len(runs.made) == 2
        clock.now_s = START_S + 1201
        await one.fire_due()
        assert len(runs.made) == 3


async def test_what_cannot_be_started(tmp_path: Path) -> None:
    """Catches a failure that stops the schedule, is not told, or is given up though it would pass."""
    runs, clock = Runs(), SetClock()
    async with process(tmp_path, runs, clock) as one:
        await one.add(OWNER, flow("every_s: 600, catch_up_s: 600", "one"))
        runs.fails = InvalidInput("the folder is gone", hint="make it")
        clock.now_s += 600
        await one.fire_due()
        shown = await one.show(OWNER, "one")
        assert (shown.fired, shown.skipped) == (0, 1)
        assert shown.note == "at 2024-10-04T00:10:00Z: the folder is gone"
        runs.fails = Unavailable("the model gateway is away", hint="start it")
        clock.now_s += 600
        await one.fire_due()
        runs.fails = None
        await one.fire_due()
        assert ((await one.show(OWNER, "one")).fired, len(runs.made)) == (1, 1)
        runs.fails = Unavailable("the model gateway is away", hint="start it")
        for _ in range(3):
            clock.now_s += 601
            await one.fire_due()
        assert (await one.show(OWNER, "one")).skipped > 1


async def check_pause_resume_remove_and_names(folder: Path, url: str | None = None) -> None:
    """See `test_pause_resume_remove_and_names`."""
    runs, clock = Runs(), SetClock()
    stranger = Principal("b", "s", OWNER.scopes)
    database = RunDatabase(url, folder)
    async with process(folder, runs, clock, url) as one:
        assert await one.every(OWNER) == []
        await one.add(OWNER, flow("every_s: 60"))
        for asked, told in ((flow("every_s: 60"), Conflict), (flow("every_s: 0"), InvalidInput)):
            with pytest.raises(told):
                await one.add(OWNER, asked)
        with pytest.raises(InvalidInput, match="has no schedule"):
            await one.add(OWNER, ScheduleRequest(text="{name: w, steps: [{id: a, wait_for: {signal: go}}]}"))
        await one.add(OWNER, flow("every_s: 60", "other"))
        for touch in (one.show, one.pause, one.resume, one.remove):
            with pytest.raises(NotFound):
                await touch(stranger, "nightly")
        assert await one.every(stranger) == []
        assert [await one.pause(OWNER, "nightly") for _ in range(2)] == [True, False]
        await one.remove(OWNER, "other")
        clock.now_s += 90
        assert not is_any_due(database, clock)
        await one.fire_due()
        assert [await one.resume(OWNER, "nightly") for _ in range(2)] == [True, False]
        await one.fire_due()
        assert runs.calls == 0
        clock.now_s += 30
        assert is_any_due(database, clock)
        await one.fire_due()
        assert [one.name for one in await one.every(OWNER)] == ["nightly"]
        assert len(runs.made) == 1
        Leases(database, lease_s=5.0, clock=clock).erase_tenant("a")
        assert await one.every(OWNER) == []
    database.close()


async def test_pause_resume_remove_and_names(tmp_path: Path) -> None:
    """Catches a pause that fires or is made up for, and a schedule of another tenant that can be touched."""
    await check_pause_resume_remove_and_names(tmp_path)
