"""A worker's side of the budgets: what it may reserve, and what it must say to the ledger. Pure: no I/O.

Time comes in as an argument. `Purse` is one account's slice in this worker; `Purses` all of
them, and the exchange with the ledger that is under way, of which there is one at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentic_flow.core.errors import InvalidInput
from agentic_flow.gateway.budgets.accounts import NANO_USD, NANO_USD_MAX, Account, accounts_of
from agentic_flow.gateway.budgets.exchange import Answer, Ask, Exchange, Want
from agentic_flow.gateway.policies import BudgetRule, Caller

SLICE_MAX_NANO = 10 * NANO_USD
"""No more than this is drawn ahead of need, for one account by one worker."""
AHEAD_S = 2.0
"""So many seconds of recent demand are drawn ahead."""
IDLE_S = 1.0
"""A slice that nothing was reserved from for so long is handed back."""
REFUSED_S = 0.1
"""A refusal by the ledger is believed for so long, so that a flood of calls without money costs little."""
WAIT_S = 2.0
"""How long a call waits for money that other workers hold and may hand back."""
REPORT_S = 0.5
"""By then all workers have said what they reserved at the moment when a call began to wait."""
FORGET_S = 300.0
"""An account without a slice is remembered for so long after its last use."""
ACCOUNTS_MAX = 500
"""Accounts in one exchange."""
WAITERS_MAX = 2000
"""Waiting calls in one exchange."""
_AHEAD_CALLS = 4
_ALREADY_WANTED_S = 3.0


class Purse:
    """One account's slice. `free_nano` is `ceiling - spent - reserved`, kept at hand for the fast path."""

    __slots__ = (
        "account",
        "as_of_s",
        "blocked_left_nano",
        "blocked_until_s",
        "ceiling_nano",
        "dirty",
        "free_nano",
        "gone",
        "limit_nano",
        "must_return",
        "open_calls",
        "others_free_nano",
        "others_held_nano",
        "rate_nano_s",
        "recent_nano",
        "reserved_nano",
        "settled_nano",
        "spent_nano",
        "told_spent_nano",
        "used_at_s",
        "wanted_until_s",
    )

    def __init__(self, account: Account, now_s: float) -> None:
        self.account = account
        self.limit_nano = account.rule.limit_nano_usd
        self.ceiling_nano = 0
        self.spent_nano = 0
        self.told_spent_nano = 0
        self.reserved_nano = 0
        self.free_nano = 0
        self.open_calls = 0
        self.dirty = False
        self.must_return = False
        self.gone = False
        self.used_at_s = now_s
        self.recent_nano = 0
        self.rate_nano_s = 0.0
        self.wanted_until_s = 0.0
        self.blocked_until_s = 0.0
        self.blocked_left_nano = 0
        # The ledger's word of all workers, from the last exchange.
        self.as_of_s: float | None = None
        self.settled_nano = 0
        self.others_held_nano = 0
        self.others_free_nano = 0

    @property
    def left_nano(self) -> int:
        """Of the limit, what neither was spent nor is reserved here or held elsewhere, as far as is known."""
        settled = self.settled_nano + self.spent_nano - self.told_spent_nano
        return self.limit_nano - settled - self.others_held_nano - self.reserved_nano

    def change_limit(self, limit_nano: int) -> None:
        """A lower limit takes the slice out of use until the ledger has seen it."""
        if limit_nano < self.limit_nano:
            self.must_return = True
            self.freeze()
        self.limit_nano = limit_nano
        self.blocked_until_s = 0.0

    def freeze(self) -> int:
        """Lower the ceiling to what is spent and reserved; returns what was free."""
        free = max(0, self.free_nano)
        self.ceiling_nano -= free
        self.free_nano -= free
        return free

    def ask(self, *, wish_nano: int = 0, close: bool = False) -> Ask:
        return Ask(
            account=self.account,
            limit_nano=self.limit_nano,
            spent_nano=self.spent_nano,
            told_spent_nano=self.told_spent_nano,
            reserved_nano=self.reserved_nano,
            ceiling_nano=self.ceiling_nano,
            wish_nano=wish_nano,
            deficit=self.free_nano < 0,
            close=close,
        )

    def start_again(self) -> None:
        """The ledger has no row of this slice any more, and all that was spent is told."""
        self.ceiling_nano = self.spent_nano = self.told_spent_nano = self.free_nano = 0

    def set_ceiling(self, ceiling_nano: int) -> None:
        self.free_nano += ceiling_nano - self.ceiling_nano
        self.ceiling_nano = ceiling_nano


class Plan:
    """The purses that one caller's calls are charged to, under one set of rules, until a period ends."""

    __slots__ = ("entries", "from_s", "rules", "until_s")

    def __init__(
        self,
        rules: Sequence[BudgetRule],
        entries: tuple[tuple[Purse, int], ...],
        from_s: float,
        until_s: float,
    ) -> None:
        self.rules = rules
        self.entries = entries
        self.from_s = from_s
        self.until_s = until_s

    def take(self, nano: int, now_s: float) -> Reservation | None:
        """Reserve from all purses, or from none of them (None)."""
        # A call that costs nothing still needs an account with something left, unless nothing was given.
        need = nano or 1
        for purse, limit_nano in self.entries:
            if purse.limit_nano != limit_nano or purse.gone:
                if purse.gone:
                    return None
                purse.change_limit(limit_nano)
            if purse.free_nano < need and (nano or limit_nano):
                return None
        for purse, _ in self.entries:
            purse.free_nano -= nano
            purse.reserved_nano += nano
            purse.recent_nano += nano
            purse.open_calls += 1
            purse.used_at_s = now_s
        return Reservation(self.entries, nano)

    def use(self, now_s: float) -> None:
        """Put the limits of this plan's rules in force, and its purses in use."""
        for purse, limit_nano in self.entries:
            purse.used_at_s = now_s
            if purse.limit_nano != limit_nano:
                purse.change_limit(limit_nano)

    @property
    def gone(self) -> bool:
        """Whether a purse was forgotten: then the plan must be made again."""
        return any(purse.gone for purse, _ in self.entries)


class Reservation:
    """Money set aside for one call. Settle it with the cost, or release it; the first word counts."""

    __slots__ = ("_entries", "nano_usd", "open")

    def __init__(self, entries: tuple[tuple[Purse, int], ...], nano_usd: int) -> None:
        self._entries = entries
        self.nano_usd = nano_usd
        self.open = True

    def settle(self, nano_usd: int) -> None:
        """The call cost this much. More than was reserved is counted too, even where it goes over a limit.

        Raises:
            InvalidInput: the cost is negative or absurd; the reservation stays as it is.
        """
        if not 0 <= nano_usd <= NANO_USD_MAX:
            raise InvalidInput(
                f"a call cannot cost {nano_usd!r} nano-USD",
                hint=f"give 0 to {NANO_USD_MAX}, in whole nano-USD",
            )
        if not self.open:
            return
        self.open = False
        reserved = self.nano_usd
        for purse, _ in self._entries:
            purse.reserved_nano -= reserved
            purse.spent_nano += nano_usd
            purse.free_nano += reserved - nano_usd
            purse.open_calls -= 1
            purse.dirty = True

    def release(self) -> None:
        """The call did not happen, or cost nothing."""
        self.settle(0)


@dataclass(eq=False, slots=True)
class Waiter:
    """A call that waits for money.

    Args:
        since_s: When it began to wait, by the monotonic clock.
    """

    plan: Plan
    nano: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The account that cannot give a waiting call its money, and what is left of it."""

    purse: Purse
    left_nano: int


@dataclass(frozen=True, slots=True)
class Over:
    """An account that a call took past its limit, by costing more than was reserved for it."""

    purse: Purse
    over_nano: int


class Purses:
    """All slices of one worker.

    One exchange is under way at most: `prepare` begins it, and `apply` or `fail` ends it. While it lasts the
    fast path goes on with the purses that were not frozen for it.
    """

    def __init__(self) -> None:
        self.purses: dict[str, Purse] = {}
        self.live_workers = 1
        self._frozen: dict[str, int] = {}
        self._sent: Exchange | None = None
        self._rated_at_s: float | None = None
        self._answered: frozenset[str] = frozenset()

    def plan(self, caller: Caller, rules: Sequence[BudgetRule], time_s: float, now_s: float) -> Plan:
        """Find or begin the purses of a caller.

        Args:
            time_s: Wall-clock time, which decides the periods.
            now_s: Monotonic time.
        """
        entries: list[tuple[Purse, int]] = []
        from_s, until_s = float("-inf"), float("inf")
        for account in accounts_of(caller, rules, time_s):
            purse = self.purses.get(account.id)
            if purse is None:
                purse = self.purses[account.id] = Purse(account, now_s)
            entries.append((purse, account.rule.limit_nano_usd))
            if account.end_s is not None:
                from_s, until_s = max(from_s, account.start_s), min(until_s, account.end_s)
        plan = Plan(rules, tuple(entries), from_s, until_s)
        plan.use(now_s)
        return plan

    def freeze_all(self) -> None:
        """Nothing is reserved until the ledger has spoken again: it may think that this worker is dead."""
        for purse in self.purses.values():
            if purse.free_nano > 0:
                purse.must_return = True
                purse.freeze()

    def erase(self, tenant: str) -> None:
        """Forget a tenant's accounts; calls of its that are in flight are charged to nothing."""
        for account_id, purse in list(self.purses.items()):
            if purse.account.tenant == tenant:
                purse.gone = True
                del self.purses[account_id]

    @property
    def holds_free(self) -> bool:
        """Whether another worker might want what this one has not reserved."""
        return any(purse.free_nano > 0 for purse in self.purses.values())

    @property
    def open_accounts(self) -> int:
        """Accounts with calls in flight."""
        return sum(purse.open_calls > 0 for purse in self.purses.values())

    def mark_wanted(self, account_ids: Sequence[str], now_s: float) -> None:
        """Another worker waits for money of these accounts."""
        for account_id in account_ids:
            purse = self.purses.get(account_id)
            if purse is not None:
                purse.wanted_until_s = now_s + _ALREADY_WANTED_S

    def prepare(self, waiters: Sequence[Waiter], now_s: float, *, closing: bool = False) -> Exchange | None:
        """What must be said to the ledger now; None: nothing."""
        assert self._sent is None, "one exchange at a time"
        self._rate(now_s)
        self._forget(now_s)
        lacking, wants = self._wants(waiters, now_s)
        asks: list[Ask] = []
        first = [self.purses[account_id] for account_id in lacking]
        for purse in [*first, *(p for p in self.purses.values() if p.account.id not in lacking)]:
            ask = self._ask(purse, now_s, lacking.get(purse.account.id), closing=closing)
            if ask is not None:
                asks.append(ask)
            if len(asks) == ACCOUNTS_MAX:
                break
        if not asks:
            return None
        self._sent = Exchange(tuple(asks), tuple(wants))
        return self._sent

    def apply(
        self, answers: Mapping[str, Answer], live_workers: int, now_s: float, time_s: float
    ) -> list[Over]:
        """The exchange took place. Returns what was settled past a limit.

        Args:
            answers: By account id; an account that is missing was removed from the ledger.
            live_workers: How many share the ledger, this one included.
            now_s: Monotonic time.
            time_s: Wall-clock time, for `BudgetState.as_of_s`.
        """
        self.live_workers = live_workers
        self._answered = frozenset(answers)
        if self._sent is None:  # only a heartbeat
            return []
        sent, self._sent = self._sent, None
        self._frozen.clear()
        over: list[Over] = []
        for ask in sent.asks:
            purse = self.purses.get(ask.account.id)
            if purse is None:
                continue
            answer = answers.get(ask.account.id)
            purse.told_spent_nano = ask.spent_nano
            if answer is None:
                purse.set_ceiling(purse.spent_nano + purse.reserved_nano)
                if purse.open_calls == 0 and not purse.dirty:
                    purse.start_again()
                continue
            purse.set_ceiling(answer.ceiling_nano)
            purse.settled_nano = answer.settled_nano
            purse.others_held_nano = answer.others_held_nano
            purse.others_free_nano = answer.others_free_nano
            purse.as_of_s = time_s
            if answer.wanted:
                purse.wanted_until_s = now_s + _ALREADY_WANTED_S
            if purse.must_return:  # the limit was lowered, or the lease ran out, while the ledger thought
                purse.freeze()
            if ask.deficit and answer.over_nano:
                over.append(Over(purse, answer.over_nano))
            # From zero only if the ledger did so too: told less than before, it would take money back.
            if answer.closed and purse.open_calls == 0 and purse.spent_nano == ask.spent_nano:
                purse.start_again()
        return over

    def fail(self, *, applied: bool) -> None:
        """The exchange did not take place, or (`applied`) nobody knows: then what was frozen stays so."""
        for ask in self._sent.asks if self._sent is not None else ():
            purse = self.purses.get(ask.account.id)
            if purse is None:
                continue
            purse.dirty = True
            if applied:
                purse.must_return = True
            elif not purse.must_return:
                purse.set_ceiling(purse.ceiling_nano + self._frozen.get(ask.account.id, 0))
        self._frozen.clear()
        self._sent = None

    def refused(self, waiter: Waiter, now_s: float) -> Refused | None:
        """Whether a call that the ledger could not serve has nothing to wait for."""
        for purse, _ in waiter.plan.entries:
            need = waiter.nano or 1
            if purse.free_nano >= need or not (waiter.nano or purse.limit_nano):
                continue
            if purse.account.id not in self._answered:
                continue  # the exchange was full
            left = max(0, purse.left_nano)
            waited_s = now_s - waiter.since_s
            # What other workers reserved may have been settled since they said so.
            theirs = purse.others_free_nano if waited_s >= REPORT_S else purse.others_held_nano
            unheld = left + max(0, theirs)
            if need > unheld:
                purse.blocked_until_s = now_s + REFUSED_S
                purse.blocked_left_nano = unheld
                return Refused(purse, left)
            if waited_s >= WAIT_S:
                return Refused(purse, left)
        return None

    def refused_at_once(self, plan: Plan, nano: int, now_s: float) -> Refused | None:
        """Whether a call need not ask: it costs more than the limit, or the ledger has just said no."""
        need = nano or 1
        for purse, limit_nano in plan.entries:
            if nano > limit_nano:
                return Refused(purse, max(0, min(limit_nano, purse.left_nano)))
            if purse.free_nano >= need or not (nano or limit_nano):
                continue
            if now_s < purse.blocked_until_s and need > purse.blocked_left_nano:
                return Refused(purse, max(0, purse.left_nano))
        return None

    def _ask(self, purse: Purse, now_s: float, need_nano: int | None, *, closing: bool) -> Ask | None:
        lacking = need_nano is not None
        wanted = now_s < purse.wanted_until_s
        idle = not lacking and (closing or now_s - purse.used_at_s >= IDLE_S)
        wish = (
            0
            if idle
            else min(SLICE_MAX_NANO, int(AHEAD_S * purse.rate_nano_s) + _AHEAD_CALLS * (need_nano or 0))
        )
        hands_back = purse.must_return or ((idle or wanted) and purse.free_nano > 0)
        low = not wanted and purse.free_nano < wish // 2
        # Only when the ledger knows all that was spent: told again, it would count twice without the row.
        closes = idle and purse.open_calls == 0 and purse.spent_nano == purse.told_spent_nano != 0
        if not (lacking or hands_back or low or closes or purse.dirty or purse.free_nano < 0):
            return None
        if lacking or hands_back or closes:
            self._frozen[purse.account.id] = purse.freeze()
        purse.must_return = False
        purse.dirty = False
        return purse.ask(wish_nano=wish, close=closes)

    def _wants(self, waiters: Sequence[Waiter], now_s: float) -> tuple[dict[str, int], list[Want]]:
        """The purses that waiting calls find too small, with the largest need, and what the calls want.

        All purses of a waiting call that another worker wants too are among them: they are drawn with the
        others or not at all.
        """
        lacking: dict[str, int] = {}
        wants: list[Want] = []
        for waiter in waiters[:WAITERS_MAX]:
            need = waiter.nano or 1
            entries = [purse for purse, limit_nano in waiter.plan.entries if waiter.nano or limit_nano]
            short = [p for p in entries if p.free_nano < need or now_s < p.wanted_until_s]
            if len(lacking) + len(short) > ACCOUNTS_MAX:
                break
            for purse in short:
                lacking[purse.account.id] = max(need, lacking.get(purse.account.id, 0))
            wants.append(Want(tuple(purse.account.id for purse in entries), need))
        return lacking, wants

    def _rate(self, now_s: float) -> None:
        passed_s = 1.0 if self._rated_at_s is None else now_s - self._rated_at_s
        if passed_s < 0.1:
            return
        self._rated_at_s = now_s
        for purse in self.purses.values():
            if purse.recent_nano or purse.rate_nano_s:
                latest = purse.recent_nano / max(passed_s, 0.1)
                purse.rate_nano_s = max(latest, purse.rate_nano_s * 0.7)
                purse.recent_nano = 0

    def _forget(self, now_s: float) -> None:
        old = [
            purse
            for purse in self.purses.values()
            if now_s - purse.used_at_s >= FORGET_S
            and purse.open_calls == 0
            and purse.ceiling_nano == 0
            and not purse.dirty
        ]
        for purse in old:
            purse.gone = True
            del self.purses[purse.account.id]
