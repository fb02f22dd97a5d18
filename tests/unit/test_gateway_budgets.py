"""Budgets without a database: periods, accounts, a simulation of crashing workers and a failing ledger."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput
from agentic_flow.gateway.budgets.accounts import accounts_of, exceeded, usd
from agentic_flow.gateway.budgets.exchange import Answer, Books, Exchange, Slice, decide
from agentic_flow.gateway.budgets.periods import kept_until_s, span
from agentic_flow.gateway.budgets.slices import WAIT_S, Purses, Reservation, Waiter
from agentic_flow.gateway.policies import BudgetRule, Caller, Period

PERIODS: tuple[Period, ...] = get_args(Period)
MOMENTS = st.integers(0, 4_000_000_000) | st.floats(0, 4e9)

# Periods


@given(st.sampled_from(PERIODS), MOMENTS)
@example("month", 1_709_251_199)  # the last second of 29 February 2024
@example("month", 1_704_067_199.9)  # the end of a year
def test_a_period_holds_its_moment_and_the_next_one_begins_where_it_ends(
    period: Period, moment: float
) -> None:
    """Catches gaps, overlaps and moments that fall out of their own period."""
    start_s, end_s = span(period, moment)
    assert start_s <= moment
    assert span(period, start_s) == (start_s, end_s)
    if period == "total":
        assert (start_s, end_s) == (0, None)
        return
    assert end_s is not None
    assert moment < end_s
    assert span(period, end_s).start_s == end_s
    if start_s:
        assert span(period, start_s - 1).end_s == start_s


@given(st.sampled_from(PERIODS), MOMENTS)
def test_periods_begin_where_the_calendar_says(period: Period, moment: float) -> None:
    """Catches months of 30 days, weeks that begin on the epoch's Thursday, and local time."""
    if period == "total":
        return
    start_s, end_s = span(period, moment)
    assert end_s is not None
    start, end = datetime.fromtimestamp(start_s, UTC), datetime.fromtimestamp(end_s, UTC)
    now = datetime.fromtimestamp(int(moment), UTC)
    if period == "month":
        assert (start.year, start.month, start.day) == (now.year, now.month, 1)
        assert start.timetz() == end.timetz() == datetime.min.replace(tzinfo=UTC).timetz()
        assert end.day == 1
        assert 28 <= (end - start).days <= 31
        return
    lengths = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
    assert end - start == lengths.get(period, timedelta(days=7))
    if period == "week":
        assert start.isocalendar()[:2] == now.isocalendar()[:2]
        assert start.isoweekday() == 1
        assert (start.hour, start.minute, start.second) == (0, 0, 0)
    else:
        fields = {"minute": 5, "hour": 4, "day": 3}[period]
        assert start.timetuple()[:fields] == now.timetuple()[:fields]


@given(st.sampled_from(PERIODS), MOMENTS)
def test_accounts_outlive_their_period(period: Period, moment: float) -> None:
    """Catches retention that removes what still counts: a total, or a period within its grace."""
    end_s = span(period, moment).end_s
    kept = kept_until_s(period, end_s)
    assert (kept is None) == (end_s is None)
    if kept is not None and end_s is not None:
        assert kept >= end_s + 86_400


# Accounts

NAMES = st.text(min_size=1, max_size=4)
RULES = st.builds(
    BudgetRule,
    scope=st.sampled_from(["platform", "tenant", "key", "agent", "run"]),
    name=st.just("*") | NAMES,
    limit_usd=st.floats(0, 1e6),
    period=st.sampled_from(PERIODS),
    tenant=st.none() | NAMES,
)
CALLERS = st.builds(Caller, NAMES, NAMES, st.text(max_size=4), st.text(max_size=4))


@given(CALLERS, st.lists(RULES, max_size=6), RULES, st.floats(0, 1e6))
def test_account_ids_depend_on_their_own_rule_only(
    caller: Caller, rules: list[BudgetRule], other: BudgetRule, limit_usd: float
) -> None:
    """Catches an account that begins anew when another rule, the order or its own limit changes."""
    now = 1.7e9
    alone = {a.id for rule in rules for a in accounts_of(caller, [rule], now)}
    together = {a.id for a in accounts_of(caller, [other, *reversed(rules)], now)}
    assert together == alone | {a.id for a in accounts_of(caller, [other], now)}
    changed = [rule.model_copy(update={"limit_usd": limit_usd}) for rule in rules]
    assert {a.id for a in accounts_of(caller, changed, now)} == alone


@given(CALLERS, CALLERS, RULES)
def test_tenants_never_share_an_account_but_the_platforms(one: Caller, two: Caller, rule: BudgetRule) -> None:
    """Catches an agent, run or key that spends another tenant's money because the names are equal."""
    first, second = accounts_of(one, [rule], 1.7e9), accounts_of(two, [rule], 1.7e9)
    if first and second and first[0].id == second[0].id:
        assert rule.scope == "platform" or one.tenant == two.tenant


def test_the_lowest_of_equal_rules_counts_and_periods_differ() -> None:
    """Catches a rule given twice that is charged twice, and a period that keeps the last one's money."""
    caller = Caller("acme", "k")
    rules = [BudgetRule(scope="tenant", limit_usd=limit, period="day") for limit in (3, 1, 2)]
    (account,) = accounts_of(caller, rules, 0)
    assert account.rule.limit_usd == 1
    (tomorrow,) = accounts_of(caller, rules, 86_400)
    assert tomorrow.id != account.id
    assert not accounts_of(caller, [BudgetRule(scope="agent", limit_usd=1)], 0)
    assert not accounts_of(caller, [BudgetRule(scope="tenant", name="other", limit_usd=1)], 0)


def test_a_refusal_says_everything() -> None:
    """Catches a refusal that leaves the caller to guess which rule, how much, and until when."""
    rule = BudgetRule(scope="agent", name="bot", limit_usd=1.5, period="day")
    (account,) = accounts_of(Caller("acme", "k", "bot"), [rule], 1.5)
    error = exceeded(account, 1_500_000_000, 1, 2_000_000_000, 1.5)
    for words in ("agent 'bot'", "1.5 USD per day", "0.000000001 USD left", "cost 2 USD", "1970-01-02 00:00"):
        assert words in error.message
    assert error.retry_after_s == pytest.approx(86_398.5)
    total = rule.model_copy(update={"period": "total"})
    (account,) = accounts_of(Caller("acme", "k", "bot"), [total], 1.5)
    assert exceeded(account, 1, 0, 1, 1.5).retry_after_s is None


@given(st.integers(-(10**19), 10**19))
def test_dollars_are_not_rounded(nano: int) -> None:
    """Catches money shown through a float."""
    whole, _, fraction = usd(nano).lstrip("-").partition(".")
    assert int(whole) * 10**9 + int(fraction.ljust(9, "0")) == abs(nano)


# The simulation


class FakeLedger:
    """Rows in dictionaries, and the real decision."""

    def __init__(self) -> None:
        self.settled: dict[str, int] = defaultdict(int)
        self.held: dict[str, int] = defaultdict(int)
        self.slices: dict[str, dict[int, Slice]] = defaultdict(dict)
        self.live: set[int] = set()

    def exchange(self, worker: int, exchange: Exchange) -> tuple[dict[str, Answer], int]:
        self.live.add(worker)
        books = {ask.account.id: self.books(ask.account.id, worker) for ask in exchange.asks}
        decision = decide(exchange, books, len(self.live))
        for ask in exchange.asks:
            account_id = ask.account.id
            change = decision.changes[account_id]
            self.settled[account_id], self.held[account_id] = change.settled_nano, change.held_nano
            if change.own is None:
                self.slices[account_id].pop(worker, None)
            else:
                self.slices[account_id][worker] = change.own
            floor = max(ask.ceiling_nano, ask.spent_nano + ask.reserved_nano)
            ceiling = decision.answers[account_id].ceiling_nano
            assert ceiling >= floor, "a worker's own money was taken from it"
            if ceiling > floor:
                assert change.settled_nano + change.held_nano <= ask.limit_nano, (
                    "more was drawn than there is"
                )
        return decision.answers, len(self.live)

    def books(self, account_id: str, worker: int) -> Books:
        others = [s for w, s in self.slices[account_id].items() if w != worker and w in self.live]
        return Books(
            self.settled[account_id],
            self.held[account_id],
            self.slices[account_id].get(worker),
            sum(max(0, s.held_nano - s.reserved_nano) for s in others),
            any(s.wanted_nano for s in others),
        )

    def wanted(self, worker: int) -> list[str]:
        return [a for a, slices in self.slices.items() if worker in slices and self.books(a, worker).wanted]

    def reconcile(self, worker: int) -> None:
        self.live.discard(worker)
        for account_id, slices in self.slices.items():
            if worker in slices and slices[worker].held_nano > 0:
                held = slices[worker].held_nano
                self.held[account_id] -= held
                self.settled[account_id] += held
                ceiling = slices[worker].ceiling_nano
                slices[worker] = Slice(ceiling, ceiling)


class Worker:
    """One worker: real purses, calls that wait, calls in flight, and one exchange at a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.purses = Purses()
        self.waiters: list[Waiter] = []
        self.calls: list[tuple[Reservation, tuple[str, ...]]] = []
        self.answer: tuple[dict[str, Answer], int] | None = None
        self.in_flight = False
        self.refused = 0


class World:
    """N workers on one ledger, a clock, and the truth that only a simulation knows."""

    def __init__(self, seed: int, *, workers: int = 3, limits_change: bool = False, overruns: bool = False):
        self.random = random.Random(seed)
        self.ledger = FakeLedger()
        self.now = 0.0
        self.limits_change = limits_change
        self.overruns = overruns
        self.rules = self.new_rules()
        self.workers = [Worker(number) for number in range(workers)]
        self.made = workers
        self.spent: dict[str, int] = defaultdict(int)
        self.lost: dict[str, int] = defaultdict(int)
        """Reserved by calls of crashed workers: the provider may bill them."""
        self.limits: dict[str, int] = {}

    def new_rules(self) -> tuple[BudgetRule, ...]:
        def limit() -> float:
            return self.random.randint(0, 400) * 1e-9

        return (
            BudgetRule(scope="platform", limit_usd=limit(), period="minute"),
            BudgetRule(scope="tenant", limit_usd=limit(), period="hour"),
            BudgetRule(scope="key", limit_usd=limit(), period="total"),
        )

    def step(self) -> None:
        draw = self.random
        worker = draw.choice(self.workers)
        action = draw.random()
        if action < 0.35:
            self.reserve(worker)
        elif action < 0.6:
            self.settle(worker)
        elif action < 0.85:
            self.exchange(worker)
        elif action < 0.93:
            self.now += draw.choice([0.05, 0.2, 1.0, 2.5, 30.0])
        elif action < 0.97:
            worker.purses.mark_wanted(self.ledger.wanted(worker.number), self.now)
        elif action < 0.985:
            self.crash(worker)
        elif self.limits_change:
            self.rules = self.new_rules()
        self.check()

    def reserve(self, worker: Worker) -> None:
        caller = Caller(self.random.choice(["a", "b"]), self.random.choice(["k1", "k2"]))
        plan = worker.purses.plan(caller, self.rules, self.now, self.now)
        for purse, limit in plan.entries:
            self.limits[purse.account.id] = limit
        nano = self.random.choice([0, 1, 7, 40, 200])
        reservation = plan.take(nano, self.now)
        if reservation is not None:
            self.begin(worker, reservation, plan.entries)
        elif worker.purses.refused_at_once(plan, nano, self.now) is None:
            worker.waiters.append(Waiter(plan, nano, self.now))

    def begin(self, worker: Worker, reservation: Reservation, entries: Sequence[tuple[object, int]]) -> None:
        worker.calls.append((reservation, tuple(purse.account.id for purse, _ in entries)))  # type: ignore[attr-defined]

    def settle(self, worker: Worker) -> None:
        if not worker.calls:
            return
        reservation, ids = worker.calls.pop(self.random.randrange(len(worker.calls)))
        cost = self.random.randint(0, reservation.nano_usd)
        if self.overruns and self.random.random() < 0.2:
            cost = reservation.nano_usd + self.random.randint(1, 30)
        if self.random.random() < 0.2:
            reservation.release()
            cost = 0
        reservation.settle(cost)
        reservation.settle(5)  # the second word does not count
        for account_id in ids:
            self.spent[account_id] += cost

    def exchange(self, worker: Worker) -> None:
        """Begin one, or let the answer of the one that is under way arrive, or be lost."""
        if not worker.in_flight:
            exchange = worker.purses.prepare(worker.waiters, self.now)
            if exchange is None:
                return
            worker.in_flight = True
            worker.answer = None
            if self.random.random() < 0.85:
                worker.answer = self.ledger.exchange(worker.number, exchange)
            return
        worker.in_flight = False
        if worker.answer is None or self.random.random() < 0.1:
            worker.purses.fail(applied=worker.answer is not None or self.random.random() < 0.5)
            worker.waiters.clear()
            return
        answers, live = worker.answer
        worker.purses.apply(answers, live, self.now, self.now)
        for waiter in list(worker.waiters):
            reservation = waiter.plan.take(waiter.nano, self.now)
            if reservation is not None:
                self.begin(worker, reservation, waiter.plan.entries)
                worker.waiters.remove(waiter)
            elif worker.purses.refused(waiter, self.now) is not None:
                worker.refused += 1
                worker.waiters.remove(waiter)

    def crash(self, worker: Worker) -> None:
        for reservation, ids in worker.calls:
            for account_id in ids:
                self.lost[account_id] += reservation.nano_usd
        self.workers.remove(worker)
        self.ledger.live.discard(worker.number)
        if self.random.random() < 0.5:
            self.ledger.reconcile(worker.number)
        self.workers.append(Worker(self.made))
        self.made += 1

    def truth(self) -> dict[str, int]:
        """What was spent, may still be spent by calls in flight, or was lost in crashes."""
        truth: dict[str, int] = defaultdict(int)
        for ledger in (self.spent, self.lost):
            for account_id, nano in ledger.items():
                truth[account_id] += nano
        for worker in self.workers:
            for reservation, ids in worker.calls:
                for account_id in ids:
                    truth[account_id] += reservation.nano_usd
        return truth

    def check(self) -> None:
        for account_id, slices in self.ledger.slices.items():
            held = sum(own.held_nano for own in slices.values())
            assert self.ledger.held[account_id] == held, "the account and its slices disagree"
        for worker in self.workers:
            for account_id, purse in worker.purses.purses.items():
                assert purse.free_nano == purse.ceiling_nano - purse.spent_nano - purse.reserved_nano
                own = self.ledger.slices[account_id].get(worker.number, Slice())
                if purse.ceiling_nano > purse.told_spent_nano and not worker.in_flight:
                    assert purse.ceiling_nano <= own.ceiling_nano, "a worker spends what it does not hold"
        if self.overruns:
            return
        for account_id, nano in self.truth().items():
            said = self.ledger.settled[account_id] + self.ledger.held[account_id]
            assert nano <= said, "money was spent that the ledger does not know of"
            if not self.limits_change:
                assert nano <= self.limits[account_id], "a budget was exceeded"

    def drain(self) -> None:
        """All calls end, all exchanges arrive, all workers close."""
        for worker in self.workers:
            while worker.calls:
                self.settle(worker)
            worker.waiters.clear()
            if worker.in_flight:
                worker.in_flight = False
                if worker.answer is None:
                    worker.purses.fail(applied=False)
                else:
                    worker.purses.apply(*worker.answer, self.now, self.now)
            for _ in range(5):
                exchange = worker.purses.prepare([], self.now, closing=True)
                if exchange is None:
                    break
                worker.purses.apply(*self.ledger.exchange(worker.number, exchange), self.now, self.now)
            else:
                raise AssertionError("closing does not end")
            self.ledger.live.discard(worker.number)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_no_budget_is_exceeded_whatever_happens(seed: int, workers: int) -> None:
    """Catches one nano too much: concurrency, lost answers, crashes, idle slices, ends of periods."""
    world = World(seed, workers=workers)
    for _ in range(250):
        world.step()
    world.drain()
    world.check()


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_changed_limits_are_kept_too(seed: int) -> None:
    """Catches a slice that goes on under the old limit, and draws past a limit that was lowered."""
    world = World(seed, limits_change=True)
    for _ in range(250):
        world.step()
    world.drain()
    world.check()


@settings(max_examples=40)
@example(75806)  # a slice that was to be closed stayed, for a call that waited
@given(st.integers(0, 2**32))
def test_nothing_is_lost_or_counted_twice(seed: int) -> None:
    """Catches settlements lost or told twice (lost answers, removed slices), overruns too."""
    world = World(seed, limits_change=True, overruns=True)
    world.crash = lambda worker: None  # type: ignore[method-assign]
    for _ in range(250):
        world.step()
    world.drain()
    for account_id, nano in world.spent.items():
        assert world.ledger.settled[account_id] == nano
    assert not any(world.ledger.held.values())


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_nobody_starves_while_there_is_money(seed: int) -> None:
    """Catches slices that workers keep from each other: what is not reserved can be had within the wait."""
    world = World(seed, workers=3)
    world.crash = lambda worker: None  # type: ignore[method-assign]
    for _ in range(150):
        world.step()
    for worker in world.workers:
        worker.waiters.clear()
        while worker.in_flight:
            world.exchange(worker)
    caller = Caller("a", "k1")
    asker = world.workers[0]
    plan = asker.purses.plan(caller, world.rules, world.now, world.now)
    truth = world.truth()
    most = min(limit - truth[purse.account.id] for purse, limit in plan.entries)
    if most <= 0:
        return
    for purse, limit in plan.entries:
        world.limits[purse.account.id] = limit
        purse.blocked_until_s = 0.0
    waiter = Waiter(plan, most, world.now)
    calls = len(asker.calls)
    asker.waiters.append(waiter)
    world.random.random = lambda: 0.5  # type: ignore[method-assign]  # from here on nothing fails
    while world.now < waiter.since_s + WAIT_S - 0.2 and asker.waiters:
        for worker in world.workers:
            worker.purses.mark_wanted(world.ledger.wanted(worker.number), world.now)
            world.exchange(worker)
            if worker.in_flight:
                world.exchange(worker)
            world.check()
        world.now += 0.1
    assert len(asker.calls) == calls + 1, "starved"


def test_waiting_calls_take_from_all_accounts_or_none() -> None:
    """Catches two workers that each keep half of what both need."""
    world = World(0, workers=2)
    world.rules = (
        BudgetRule(scope="tenant", limit_usd=10e-9, period="total"),
        BudgetRule(scope="key", limit_usd=10e-9, period="total"),
    )
    world.random.random = lambda: 0.5  # type: ignore[method-assign]
    one, two = world.workers
    halves = [
        (one, BudgetRule(scope="tenant", limit_usd=10e-9, period="total")),
        (two, BudgetRule(scope="key", limit_usd=10e-9, period="total")),
    ]
    for worker, rule in halves:  # each holds all of one account, unreserved
        plan = worker.purses.plan(Caller("t", "k"), (rule,), 0, 0)
        worker.waiters.append(Waiter(plan, 10, 0))
        world.exchange(worker)
        world.exchange(worker)
        worker.calls.pop()[0].release()
    for worker in world.workers:
        plan = worker.purses.plan(Caller("t", "k"), world.rules, 0, 0)
        worker.waiters.append(Waiter(plan, 10, 0))
    for _ in range(15):
        for worker in world.workers:
            worker.purses.mark_wanted(world.ledger.wanted(worker.number), world.now)
            world.exchange(worker)
            if worker.in_flight:
                world.exchange(worker)
        world.now += 0.1
    assert len(one.calls) + len(two.calls) == 1
    assert one.refused + two.refused == 1


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_lowered_limit_takes_the_slice_out_of_use(when: str) -> None:
    """Catches a slice drawn under the old limit that is spent under the new one, also drawn just now."""
    ledger, purses, caller = FakeLedger(), Purses(), Caller("t", "k")
    wide = purses.plan(caller, (BudgetRule(scope="tenant", limit_usd=1000e-9, period="total"),), 0, 0)
    exchange = purses.prepare([Waiter(wide, 1000, 0)], 0)
    assert exchange is not None
    answers, live = ledger.exchange(1, exchange)
    if when == "before":
        purses.apply(answers, live, 0, 0)
    narrow = purses.plan(caller, (BudgetRule(scope="tenant", limit_usd=100e-9, period="total"),), 0, 0)
    if when == "during":
        purses.apply(answers, live, 0, 0)
    assert narrow.take(1, 0) is None, "the ledger has not said that there is something left under this limit"
    waiter = Waiter(narrow, 101, 0)
    exchange = purses.prepare([waiter], 0)
    assert exchange is not None
    purses.apply(*ledger.exchange(1, exchange), 0, 0)
    assert narrow.take(101, 0) is None
    assert purses.refused(waiter, 0) is not None


def test_impossible_costs_are_refused() -> None:
    """Catches a negative settlement, which would hand money out."""
    purses = Purses()
    plan = purses.plan(Caller("t", "k"), (BudgetRule(scope="tenant", limit_usd=0),), 0, 0)
    reservation = plan.take(0, 0)
    assert reservation is not None, "a call that costs nothing is let through by a limit of 0"
    for cost in (-1, 10**18 + 1):
        with pytest.raises(InvalidInput):
            reservation.settle(cost)
    assert reservation.open
    assert plan.take(1, 0) is None
