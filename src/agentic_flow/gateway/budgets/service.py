"""Hard budgets, shared by all workers and replicas through one ledger.

The fast path reserves from slices that this worker has drawn before: no await, no lock, no database. One
background task speaks to the ledger: it settles in groups, draws what calls wait for, hands back what is idle
or wanted elsewhere, and keeps the worker's lease.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, InvalidInput, Unavailable
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.budgets.accounts import (
    NANO_USD_MAX,
    Account,
    BudgetState,
    accounts_of,
    exceeded,
    rule_identity,
    usd,
)
from agentic_flow.gateway.budgets.exchange import Exchange
from agentic_flow.gateway.budgets.ledger import (
    DEAD_AFTER_S,
    REMOVED_MAX,
    TABLES,
    ExchangeFailed,
    Ledger,
    Outcome,
    Reconciled,
    WorkerState,
)
from agentic_flow.gateway.budgets.slices import Plan, Purse, Purses, Refused, Reservation, Waiter
from agentic_flow.gateway.policies import BudgetRule, Caller

__all__ = ["TABLES", "BudgetState", "Budgets", "Reconciled", "Reservation", "WorkerState"]

FLUSH_S = 0.2
"""Settlements are told to the ledger in groups, so often."""
RETRY_S = 0.1
"""A call that waits for other workers' money asks again after so long."""
HEARTBEAT_S = 2.0
LEASE_S = 45.0
"""Without a word from the ledger for so long, nothing more is reserved: it may take this worker for dead."""
LEDGER_TIMEOUT_S = 5.0
"""A call waits for the ledger no longer than this."""
TIDY_S = 60.0
PLANS_MAX = 20_000

_Result = TypeVar("_Result")

_log = structlog.get_logger(__name__)


class Budgets:
    """One worker's door to the budgets.

    Args:
        database: Holds the ledger; `TABLES` are made already. It is not closed here.
        worker_id: Shown to operators; a random part is added, since an id must never be used twice.
        clock: Its wall-clock time decides to which period a call belongs. Workers whose clocks differ charge
            calls at a border to different periods, each within its own limit.
        flush_s: Seconds between two groups of settlements.
        dead_after_s: A worker that was silent for so long may be reconciled; more than `LEASE_S`, or money of
            one that lives could be given away.
    """

    def __init__(
        self,
        database: SqlDatabase,
        *,
        worker_id: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        flush_s: float = FLUSH_S,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self.worker_id = (
            f"{(worker_id or f'{socket.gethostname()}-{os.getpid()}')[:47]}-{secrets.token_hex(8)}"
        )
        self._clock = clock
        self._flush_s = flush_s
        self._ledger = Ledger(database, self.worker_id, clock, dead_after_s=dead_after_s)
        self._purses = Purses()
        self._plans: dict[Caller, Plan] = {}
        self._waiters: dict[Waiter, asyncio.Future[Reservation]] = {}
        self._lease_until_s = float("-inf")
        self._heard_at_s = float("-inf")
        self._tidy_at_s = 0.0
        self._wake = asyncio.Event()
        self._turn_taken = asyncio.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._task: asyncio.Task[None] | None = None
        self._away = False

    async def start(self) -> None:
        """Make this worker known to the ledger.

        Raises:
            Unavailable: the database cannot be used.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budgets")
        self._tidy_at_s = self._clock.monotonic_s() + TIDY_S * random.random()
        try:
            await self._exchange(None)
        except ExchangeFailed as failed:
            self._thread.shutdown(wait=False)
            self._thread = None
            raise failed.error from failed
        self._task = asyncio.create_task(self._run(), name="budgets")

    async def close(self) -> None:
        """Settle what is settled and hand everything back. What calls in flight reserved stays counted."""
        task, self._task = self._task, None
        if task is None or self._thread is None:
            return
        self._lease_until_s = float("-inf")
        self._wake.set()
        await task
        self._fail_waiters(Unavailable("the budgets are closing", hint="ask another worker"))
        try:
            while (exchange := self._purses.prepare([], self._clock.monotonic_s(), closing=True)) is not None:
                self._apply(await self._exchange(exchange))
            await self._in_thread(self._ledger.leave)
        except ExchangeFailed as failed:
            self._purses.fail(applied=failed.applied)
            _log.error("budget_slices_kept", worker=self.worker_id, error=failed.error.message)
        except AgenticFlowError as error:
            _log.error("budget_worker_kept", worker=self.worker_id, error=error.message)
        if self._purses.open_accounts:
            _log.warning(
                "budget_closed_with_calls", worker=self.worker_id, accounts=self._purses.open_accounts
            )
        self._lease_until_s = float("-inf")
        self._thread.shutdown(wait=True)
        self._thread = None

    async def reserve(self, caller: Caller, rules: Sequence[BudgetRule], nano_usd: int) -> Reservation:
        """Set aside what a call can cost, under all matching rules or under none.

        Args:
            caller: Who pays.
            rules: All rules in force, as a tuple that stays the same object until they change.
            nano_usd: The most that the call can cost. 0 needs accounts that have something left.

        Raises:
            BudgetExceeded: an account does not have it; with `retry_after_s` until its period ends.
            Unavailable: the slices here do not suffice and the ledger cannot be asked.
            InvalidInput: the amount is negative or absurd.
        """
        reservation = self.at_once(caller, rules, nano_usd)
        if reservation is not None:
            return reservation
        if 0 <= nano_usd <= NANO_USD_MAX:
            time_s, now_s = self._clock.time_s(), self._clock.monotonic_s()
            plan = self._plans.get(caller)
            if (
                plan is None
                or plan.gone
                or plan.rules is not rules
                or not plan.until_s > time_s >= plan.from_s
            ):
                plan = self._plan(caller, rules, time_s, now_s)
            return await self._wait(plan, nano_usd, time_s, now_s)
        raise InvalidInput(
            f"a call cannot cost {nano_usd!r} nano-USD", hint=f"give 0 to {NANO_USD_MAX}, in whole nano-USD"
        )

    def at_once(self, caller: Caller, rules: Sequence[BudgetRule], nano_usd: int) -> Reservation | None:
        """What `reserve` does, where the slices here suffice; None: `reserve` must wait, or refuse."""
        time_s = self._clock.time_s()
        now_s = self._clock.monotonic_s()
        plan = self._plans.get(caller)
        if plan is None or plan.rules is not rules or not plan.from_s <= time_s < plan.until_s:
            plan = self._plan(caller, rules, time_s, now_s)
        if 0 <= nano_usd <= NANO_USD_MAX and (now_s < self._lease_until_s or not plan.entries):
            return plan.take(nano_usd, now_s)
        return None

    def left(self, caller: Caller, rules: Sequence[BudgetRule]) -> list[BudgetState]:
        """What this worker knows of the caller's accounts now, without asking the ledger."""
        return [
            _state(account, account.rule.limit_nano_usd, self._purses.purses.get(account.id))
            for account in accounts_of(caller, rules, self._clock.time_s())
        ]

    def known(self, rules: Sequence[BudgetRule]) -> list[BudgetState]:
        """What this worker knows of these rules' accounts that it used lately, without asking the ledger."""
        time_s = self._clock.time_s()
        limits: dict[str, int] = {}
        for rule in rules:
            rule_id, limit = rule_identity(rule), rule.limit_nano_usd
            limits[rule_id] = min(limits.get(rule_id, limit), limit)
        return [
            _state(purse.account, limits[purse.account.rule_id], purse)
            for purse in list(self._purses.purses.values())
            if purse.account.rule_id in limits
            and (purse.account.end_s is None or time_s < purse.account.end_s)
        ]

    async def report(self, rules: Sequence[BudgetRule], *, tenant: str | None = None) -> list[BudgetState]:
        """All accounts of these rules in the ledger whose periods have not ended, the fullest first.

        What workers have settled in the last `flush_s` shows as reserved.

        Args:
            rules: Those in force.
            tenant: Only the accounts of this tenant; None: all.
        """
        return await asyncio.to_thread(self._ledger.report, rules, self._clock.time_s(), tenant)

    async def workers(self) -> list[WorkerState]:
        """All workers that the ledger knows, with what they hold."""
        return await asyncio.to_thread(self._ledger.workers)

    async def reconcile(
        self, worker_id: str | None = None, *, spent_nano: int | None = None, account_id: str | None = None
    ) -> list[Reconciled]:
        """Close the books of a dead worker.

        By default all that it held counts as spent: after `kill -9` nobody knows how much of it was reserved
        for calls whose cost the provider bills all the same. What a worker knew that it did not need it has
        handed back already.

        Args:
            worker_id: A worker that was silent for a minute; None: all of them.
            spent_nano: The operator's or the usage ledger's word: the worker spent at most this beyond
                what it had settled. Of each account at most this counts as spent, the rest is given back.
            account_id: Only this account.

        Raises:
            NotFound: the ledger knows no such worker.
            Conflict: the worker is alive.
            InvalidInput: `spent_nano` is negative.
        """
        if spent_nano is not None and spent_nano < 0:
            raise InvalidInput(f"spent_nano cannot be {spent_nano!r}", hint="give 0 or more nano-USD")
        return await asyncio.to_thread(self._ledger.reconcile, worker_id, spent_nano, account_id)

    async def erase_tenant(self, tenant: str) -> int:
        """Remove a tenant's accounts here and in the ledger. Returns how many the ledger had."""
        async with self._turn_taken:
            self._purses.erase(tenant)
            for caller in [caller for caller in self._plans if caller.tenant == tenant]:
                del self._plans[caller]
            return await asyncio.to_thread(self._ledger.erase_tenant, tenant)

    def _plan(self, caller: Caller, rules: Sequence[BudgetRule], time_s: float, now_s: float) -> Plan:
        plan = self._purses.plan(caller, rules, time_s, now_s)
        if isinstance(rules, tuple):  # anything else may change under us
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            self._plans[caller] = plan
        return plan

    async def _wait(self, plan: Plan, nano: int, time_s: float, now_s: float) -> Reservation:
        plan.use(now_s)
        refused = self._purses.refused_at_once(plan, nano, now_s)
        if refused is not None:
            raise _exceeded(refused, nano, time_s)
        if self._task is None:
            raise Unavailable("the budgets are not open", hint="ask another worker")
        waiter = Waiter(plan, nano, now_s)
        future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = future
        self._wake.set()
        try:
            await asyncio.wait((future,), timeout=LEDGER_TIMEOUT_S)
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                future.result().release()
            raise
        finally:
            self._waiters.pop(waiter, None)
        if not future.done():
            raise Unavailable(
                f"the budget ledger did not answer within {LEDGER_TIMEOUT_S:.0f} s",
                hint="check the gateway's database",
                retry_after_s=1.0,
            )
        return future.result()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._task is not None:
            timer = loop.call_later(RETRY_S if self._waiters else self._flush_s, self._wake.set)
            await self._wake.wait()
            timer.cancel()
            self._wake.clear()
            async with self._turn_taken:
                await self._turn()

    async def _turn(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._lease_until_s:
            self._purses.freeze_all()
        try:
            if self._purses.live_workers > 1 and self._purses.holds_free:
                self._purses.mark_wanted(await self._in_thread(self._ledger.wanted), now_s)
            if now_s >= self._tidy_at_s and not self._waiters:
                await self._tidy(now_s)
            exchange = self._purses.prepare(list(self._waiters), self._clock.monotonic_s())
            if exchange is None and not self._waiters and now_s - self._heard_at_s < HEARTBEAT_S:
                return
            self._apply(await self._exchange(exchange))
        except ExchangeFailed as failed:
            self._failed(failed.error, applied=failed.applied)
        except AgenticFlowError as error:
            self._failed(error, applied=False)
        except Exception as error:  # noqa: BLE001 - a flaw of ours must not end the task that all wait for
            _log.exception("budget_exchange_broken", worker=self.worker_id)
            self._failed(Unavailable(f"the budget exchange broke: {error!r}"), applied=True)

    async def _exchange(self, exchange: Exchange | None) -> Outcome:
        begun_s = self._clock.monotonic_s()
        outcome = await self._in_thread(lambda: self._ledger.exchange(exchange))
        self._lease_until_s = begun_s + LEASE_S
        self._heard_at_s = begun_s
        if self._away:
            self._away = False
            _log.info("budget_ledger_back", worker=self.worker_id)
        return outcome

    def _apply(self, outcome: Outcome) -> None:
        now_s = self._clock.monotonic_s()
        time_s = self._clock.time_s()
        for over in self._purses.apply(outcome.answers, outcome.live_workers, now_s, time_s):
            _log.warning(
                "budget_exceeded_by_settlement",
                account=over.purse.account.name,
                account_id=over.purse.account.id,
                limit_usd=usd(over.purse.limit_nano),
                over_usd=usd(over.over_nano),
            )
        for waiter, future in list(self._waiters.items()):
            if future.done():
                continue
            reservation = waiter.plan.take(waiter.nano, now_s)
            if reservation is not None:
                future.set_result(reservation)
                continue
            refused = self._purses.refused(waiter, now_s)
            if refused is not None:
                future.set_exception(_exceeded(refused, waiter.nano, time_s))

    def _failed(self, error: AgenticFlowError, *, applied: bool) -> None:
        self._purses.fail(applied=applied)
        if not self._away:
            self._away = True
            _log.error("budget_ledger_away", worker=self.worker_id, error=error.message)
        self._fail_waiters(
            Unavailable(
                f"the budget ledger cannot be asked: {error.message}",
                hint="check the gateway's database; no call is let through without its money",
                retry_after_s=1.0,
            )
        )

    def _fail_waiters(self, error: Unavailable) -> None:
        for future in self._waiters.values():
            if not future.done():
                future.set_exception(error)

    async def _tidy(self, now_s: float) -> None:
        removed = await self._in_thread(lambda: self._ledger.tidy(self._clock.time_s()))
        if removed < REMOVED_MAX:
            self._tidy_at_s = now_s + TIDY_S * (1 + random.random())

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _state(account: Account, limit_nano: int, purse: Purse | None) -> BudgetState:
    spent = reserved = 0
    if purse is not None:
        spent = purse.settled_nano + purse.spent_nano - purse.told_spent_nano
        reserved = purse.reserved_nano + purse.others_held_nano
    return BudgetState(
        rule=account.rule,
        account=account.name,
        account_id=account.id,
        limit_nano=limit_nano,
        spent_nano=spent,
        reserved_nano=reserved,
        period_start_s=account.start_s,
        period_end_s=account.end_s,
        as_of_s=purse.as_of_s if purse is not None else None,
        tenant=account.tenant,
    )


def _exceeded(refused: Refused, nano: int, time_s: float) -> AgenticFlowError:
    purse = refused.purse
    return exceeded(purse.account, purse.limit_nano, refused.left_nano, nano, time_s)
