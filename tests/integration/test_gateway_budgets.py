"""Budgets from outside: real processes with hundreds of calls at once on one database, some killed."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from gateway_budgets_worker import LIMIT_USD, RULES, database

from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import BudgetExceeded, Conflict, NotFound, Unavailable
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.budgets import ledger as ledgers
from agentic_flow.gateway.budgets.service import LEASE_S, Budgets, Reservation
from agentic_flow.gateway.budgets.slices import WAIT_S
from agentic_flow.gateway.policies import BudgetRule, Caller
from postgres_server import Cluster, new_database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("gateway_budgets_worker.py")
LIMIT = int(LIMIT_USD * 1e9)
CALLS = 250


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A PostgreSQL of this module's own."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the ledger is, with its tables."""
    if request.param == "sqlite":
        place = str(tmp_path / "gateway.db")
    else:
        place = new_database(request.getfixturevalue("server"))
    store = database(place)
    store.create()
    store.close()
    return place


@dataclass
class Heard:
    """What a worker process said.

    Args:
        reserved: Reserved and not settled: its provider may have been asked.
        spent: Settled.
    """

    worker_id: str = ""
    reserved: int = 0
    spent: int = 0
    reservations: int = 0
    refused: int = 0
    unavailable: int = 0
    done: bool = False

    def hear(self, line: str) -> None:
        word, *numbers = line.split()
        if word == "ready":
            self.worker_id = numbers[0]
        elif word == "reserve":
            self.reserved += int(numbers[0])
            self.reservations += 1
        elif word == "settle":
            self.spent += int(numbers[0])
            self.reserved -= int(numbers[1])
        elif word == "refused":
            self.refused += 1
        elif word == "unavailable":
            self.unavailable += 1
        elif word == "done":
            self.done = True


@dataclass
class Process:
    """A worker process, and what it said so far."""

    process: asyncio.subprocess.Process
    heard: Heard

    async def until(self, word: str, times: int = 1) -> None:
        assert self.process.stdout is not None
        while times:
            line = (await self.process.stdout.readline()).decode()
            assert line, "the worker ended early"
            self.heard.hear(line)
            times -= line.startswith(word)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def rest(self) -> None:
        """All that it still says, to its end."""
        assert self.process.stdout is not None
        while line := (await self.process.stdout.readline()).decode():
            if line.endswith("\n"):
                self.heard.hear(line)
        await self.process.wait()


@asynccontextmanager
async def worker(where: str, calls: int, seed: int, mode: str = "spend") -> AsyncGenerator[Process]:
    """A process that is ready, and is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        where,
        str(calls),
        str(seed),
        mode,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    found = Process(process, Heard())
    try:
        await found.until("ready")
        yield found
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def account(store: SqlDatabase, scope: str = "platform") -> tuple[int, int]:
    """Settled and held of the only account of a scope."""
    ((settled, held),) = store.rows(
        "SELECT settled_nano, held_nano FROM gw_budget_accounts WHERE scope = :scope", scope=scope
    )
    return settled, held


async def test_500_calls_over_two_processes_spend_the_budget_and_no_more(where: str) -> None:
    """Catches overshoot under concurrency, budgets kept per process, and money that nobody can get."""
    async with worker(where, CALLS, 1) as one, worker(where, CALLS, 2) as two:
        one.go()
        two.go()
        await asyncio.gather(one.until("done"), two.until("done"))
        for each in (one, two):
            each.go()
            await each.rest()
            assert each.heard.refused == CALLS
            assert not each.heard.unavailable
            assert each.heard.reserved == 0
            assert each.heard.reservations > 20, "one worker had it all"
    spent = one.heard.spent + two.heard.spent
    assert spent <= LIMIT, "the budget was exceeded"
    assert spent >= LIMIT * 0.99, f"only {spent / LIMIT:.4f} of the budget could be used"
    store = database(where)
    assert account(store) == (spent, 0), "the ledger counts something else than what was spent"
    assert store.rows("SELECT * FROM gw_budget_slices WHERE ceiling_nano > spent_nano") == []
    store.close()


@pytest.mark.parametrize("reservations", [1, 60, 250])
async def test_a_killed_worker_costs_its_slice_and_never_more(where: str, reservations: int) -> None:
    """Catches money of a killed worker that is given out again while its calls may be billed."""
    async with worker(where, CALLS, 3) as victim, worker(where, CALLS, 4) as other:
        victim.go()
        other.go()
        await victim.until("reserve", reservations)
        victim.process.send_signal(signal.SIGKILL)
        await asyncio.gather(victim.rest(), other.until("done"))
        other.go()
        await other.rest()
    out = victim.heard.spent + victim.heard.reserved + other.heard.spent
    assert other.heard.reserved == 0
    assert out <= LIMIT, "the budget was exceeded"
    store = database(where)
    settled, held = account(store)
    assert out <= settled + held <= LIMIT, "the ledger lost what the killed worker spent"
    budgets = Budgets(store)
    await budgets.start()
    with pytest.raises(Conflict, match="was heard"):
        await budgets.reconcile(victim.heard.worker_id)
    operator = Budgets(store, dead_after_s=-1.0)
    (state,) = [w for w in await operator.workers() if w.id == victim.heard.worker_id]
    assert state.dead
    done = await operator.reconcile(victim.heard.worker_id)
    assert all(one.released_nano == 0 for one in done)
    assert account(store) == (settled + held, 0)
    with pytest.raises(NotFound):
        await budgets.reconcile(victim.heard.worker_id)
    await budgets.close()
    store.close()


async def test_an_operators_word_gives_the_rest_back(where: str) -> None:
    """Catches a reconciliation that ignores what the usage ledger says, or releases more than the rest."""
    async with worker(where, 10, 5, "hold") as victim:
        victim.go()
        await victim.until("done")
        victim.process.send_signal(signal.SIGKILL)
        await victim.rest()
    store = database(where)
    settled, held = account(store)
    assert settled == 0
    assert held >= victim.heard.reserved > 0
    budgets = Budgets(store, dead_after_s=-1.0)
    await budgets.start()
    done = await budgets.reconcile(victim.heard.worker_id, spent_nano=3)
    assert account(store) == (3, 0)
    assert sum(one.released_nano for one in done if one.account == "platform") == held - 3
    (state,) = await budgets.report(RULES[:1])
    assert (state.spent_nano, state.reserved_nano, state.left_nano) == (3, 0, LIMIT - 3)
    await budgets.close()
    store.close()


async def patient(budgets: Budgets, caller: Caller, rules: tuple[BudgetRule, ...], nano: int) -> Reservation:
    """Ask again after a refusal, which is believed for a moment; not for longer than a call would wait."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await budgets.reserve(caller, rules, nano)
            except BudgetExceeded:
                await asyncio.sleep(0.01)


async def test_idle_money_comes_to_the_worker_that_needs_it(where: str) -> None:
    """Catches a refusal while another worker holds the money unreserved."""
    store, rules, caller = database(where), RULES[:1], Caller("acme", "k")
    one, two = Budgets(store), Budgets(store)
    await one.start()
    await two.start()
    for number in range(4):
        holder, asker = (one, two) if number % 2 else (two, one)
        (await patient(holder, caller, rules, LIMIT)).release()
        reservation = await patient(asker, caller, rules, LIMIT)
        with pytest.raises(BudgetExceeded) as refused:
            await holder.reserve(caller, rules, 1)
        assert refused.value.details["left_usd"] == 0
        reservation.release()
    await one.close()
    await two.close()
    assert account(store) == (0, 0)
    store.close()


class ShiftedClock(SystemClock):
    """A machine that slept: its monotonic clock jumps."""

    shift_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.shift_s


@pytest.mark.parametrize("word", [None, 1000])
async def test_a_worker_thought_dead_goes_on_without_overshoot(where: str, word: int | None) -> None:
    """Catches a worker that wakes up after its slice was given away, and money counted twice or never."""
    store, rules, caller, clock = database(where), RULES[:1], Caller("acme", "k"), ShiftedClock()
    sleeper, other = Budgets(store, clock=clock), Budgets(store, dead_after_s=-1.0)
    await sleeper.start()
    await other.start()
    (await sleeper.reserve(caller, rules, LIMIT // 2)).settle(0)
    in_flight = await sleeper.reserve(caller, rules, 5000)
    clock.shift_s = LEASE_S + 1
    await other.reconcile(sleeper.worker_id, spent_nano=word)
    left = (await other.report(rules))[0].left_nano
    rest = await patient(other, caller, rules, left) if left else None
    if word is not None:
        with pytest.raises(BudgetExceeded):
            await sleeper.reserve(caller, rules, LIMIT // 4)
    in_flight.settle(4000)
    if rest is not None:
        rest.settle(left - 4000)
    await sleeper.close()
    await other.close()
    assert account(store) == (4000 + (left - 4000 if left else 0), 0)
    store.close()


async def test_settling_more_than_reserved_is_counted(where: str) -> None:
    """Catches a cost above its reservation that is forgotten, and one that lets others overshoot further."""
    store, rules, caller = database(where), RULES[:1], Caller("acme", "k")
    budgets = Budgets(store)
    await budgets.start()
    reservation = await budgets.reserve(caller, rules, LIMIT - 1)
    reservation.settle(LIMIT + 5)
    reservation.settle(1)
    reservation.release()
    with pytest.raises(BudgetExceeded):
        await budgets.reserve(caller, rules, 1)
    (state,) = budgets.left(caller, rules)
    assert (state.spent_nano, state.left_nano) == (LIMIT + 5, 0)
    await budgets.close()
    assert account(store) == (LIMIT + 5, 0)
    store.close()


async def test_a_changed_limit_applies_at_once_and_keeps_what_was_spent(where: str) -> None:
    """Catches a slice of the old limit that is spent under the new one, and an account that begins anew."""
    store, caller = database(where), Caller("acme", "k", "bot", "r\0\ud800")

    def rules(nano: int) -> tuple[BudgetRule, ...]:
        return (BudgetRule(scope="run", limit_usd=nano * 1e-9, period="total"),)

    budgets, other = Budgets(store), Budgets(store)
    await budgets.start()
    await other.start()
    wide, narrow = rules(1000), rules(100)
    (await budgets.reserve(caller, wide, 90)).settle(90)
    with pytest.raises(BudgetExceeded):
        await budgets.reserve(caller, narrow, 11)
    with pytest.raises(BudgetExceeded):
        await other.reserve(caller, narrow, 11)
    (await other.reserve(caller, narrow, 10)).settle(10)
    with pytest.raises(BudgetExceeded):
        await budgets.reserve(caller, narrow, 0)
    (await budgets.reserve(caller, wide, 900)).release()
    assert await budgets.erase_tenant("acme") == 1
    assert store.rows("SELECT * FROM gw_budget_slices") == []
    await budgets.close()
    await other.close()
    assert store.rows("SELECT * FROM gw_budget_accounts") == []
    store.close()


async def test_periods_long_over_are_removed(where: str) -> None:
    """Catches ledgers that grow for ever, and retention that takes what is still running."""
    store = database(where)
    rules = tuple(BudgetRule(scope="key", limit_usd=1, period=period) for period in ("minute", "total"))
    budgets = Budgets(store)
    await budgets.start()
    (await budgets.reserve(Caller("acme", "k"), rules, 5)).settle(5)
    await budgets.close()
    ledger = ledgers.Ledger(store, "tidy")
    now = store.rows("SELECT MAX(ends_at) FROM gw_budget_accounts")[0][0]
    assert ledger.tidy(now + 3600) == 0
    assert ledger.tidy(now + 90_000) == 1
    assert store.rows("SELECT settled_nano, ends_at FROM gw_budget_accounts") == [(5, None)]
    store.close()


async def test_without_the_database_nothing_is_let_through() -> None:
    """Catches a gateway that gives money away while its database is down, or that never recovers."""
    with tempfile.TemporaryDirectory(prefix="budgets") as folder:
        cluster = Cluster(Path(folder))
        cluster.start()
        store = database(cluster.url)
        store.create()
        budgets = Budgets(store)
        await budgets.start()
        rules, caller = RULES[:1], Caller("acme", "k")
        (await budgets.reserve(caller, rules, 1000)).settle(1000)
        cluster.stop("immediate")
        with pytest.raises(Unavailable):
            await budgets.reserve(caller, rules, LIMIT - 1000)
        with pytest.raises(BudgetExceeded):
            await budgets.reserve(caller, rules, LIMIT + 1)
        cluster.start()
        while True:
            try:
                reservation = await budgets.reserve(caller, rules, LIMIT - 1000)
                break
            except Unavailable:
                await asyncio.sleep(0.05)
        reservation.settle(7)
        await budgets.close()
        assert account(store) == (1007, 0)
        store.close()
        cluster.stop()
