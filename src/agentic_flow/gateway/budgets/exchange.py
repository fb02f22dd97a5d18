"""What a worker and the ledger say to each other, and how the ledger decides. Pure: no clock, no database.

A slice is two numbers that only their worker moves: `spent`, all that it ever settled on the account, and the
`ceiling` up to which it may spend. What lies between them is held, and gone for everybody else. A worker
sends absolute values, so that an exchange whose answer was lost is simply made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentic_flow.gateway.budgets.accounts import Account


@dataclass(frozen=True, slots=True)
class Ask:
    """What a worker says of one account.

    Args:
        limit_nano: The limit as the worker's policies have it.
        spent_nano: All that it settled on its slice, ever.
        told_spent_nano: The part of it that the ledger has confirmed; counts where the slice's row is gone.
        reserved_nano: What its calls in flight may still cost.
        ceiling_nano: It will not pass this while the exchange lasts, whatever the answer. Less than the
            ledger's ceiling hands the difference back.
        wish_nano: What it would like to hold unreserved.
        deficit: It settled more than it held.
        close: It has no more use for the slice.
    """

    account: Account
    limit_nano: int
    spent_nano: int
    told_spent_nano: int
    reserved_nano: int
    ceiling_nano: int
    wish_nano: int = 0
    deficit: bool = False
    close: bool = False


@dataclass(frozen=True, slots=True)
class Want:
    """A call that waits: each of these accounts must give it `nano` (1 where it must only not be empty)."""

    account_ids: tuple[str, ...]
    nano: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """One worker's turn at the ledger: all or nothing."""

    asks: tuple[Ask, ...]
    wants: tuple[Want, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the ledger says of one account, after the exchange.

    Args:
        ceiling_nano: The worker's ceiling now.
        settled_nano: Spent by all workers, as far as they have said.
        others_held_nano: Held by the other workers' slices.
        others_free_nano: The part of it that live workers reported as not reserved.
        wanted: Another worker waits for money of this account.
        over_nano: By how much spent and held are past the limit.
        closed: The worker's slice is gone. One that was asked to be closed stays while a call of the worker
            waits for money of the account.
    """

    ceiling_nano: int
    settled_nano: int
    others_held_nano: int
    others_free_nano: int
    wanted: bool
    over_nano: int
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice's row. `reserved_nano` is what its worker last reported; `wanted_nano` what it lacks."""

    ceiling_nano: int = 0
    spent_nano: int = 0
    reserved_nano: int = 0
    wanted_nano: int = 0

    @property
    def held_nano(self) -> int:
        return self.ceiling_nano - self.spent_nano


@dataclass(frozen=True, slots=True)
class Books:
    """The ledger's rows of one account, locked.

    Args:
        own: The asking worker's slice; None: there is none.
        others_free_nano: As in `Answer`.
        wanted: As in `Answer`.
    """

    settled_nano: int = 0
    held_nano: int = 0
    own: Slice | None = None
    others_free_nano: int = 0
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """The rows after the decision; `own` None deletes the slice."""

    settled_nano: int
    held_nano: int
    own: Slice | None


@dataclass(slots=True)
class _Draft:
    """An account while the decision is made. `room` could be drawn (it may be negative), `free` is kept."""

    ask: Ask
    books: Books
    settled: int
    others_held: int
    room: int
    free: int
    taken: int = 0
    lacking: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    changes: dict[str, Change] = field(default_factory=dict[str, Change])


def decide(exchange: Exchange, books: Mapping[str, Books], live_workers: int) -> Decision:
    """Settle, hand back and draw, for one worker.

    For each account, what is settled and held by all slices stays within the limit, with two exceptions that
    are facts already: calls in flight, and calls that cost more than was reserved for them.

    Waiting calls are served in order, each from all of its accounts or from none, so that two workers cannot
    keep from each other what both need. What is drawn beyond that is a share of the rest, the smaller the
    less there is, and nothing where another worker waits.

    Args:
        exchange: What the worker says.
        books: Rows by account id. An account that is missing was removed, and gets no answer.
        live_workers: How many share what is left, this one included.
    """
    drafts = {
        ask.account.id: _draft(ask, books[ask.account.id]) for ask in exchange.asks if ask.account.id in books
    }
    for want in exchange.wants:
        _serve(want, drafts)
    decision = Decision()
    for account_id, draft in drafts.items():
        _close(account_id, draft, live_workers, decision)
    return decision


def _draft(ask: Ask, books: Books) -> _Draft:
    own = books.own or Slice(ask.told_spent_nano, ask.told_spent_nano)
    settled = books.settled_nano + ask.spent_nano - own.spent_nano
    others_held = books.held_nano - own.held_nano
    ceiling = max(ask.ceiling_nano, ask.spent_nano + ask.reserved_nano)
    room = ask.limit_nano - settled - others_held - (ceiling - ask.spent_nano)
    return _Draft(ask, books, settled, others_held, room, ceiling - ask.spent_nano - ask.reserved_nano)


def _serve(want: Want, drafts: Mapping[str, _Draft]) -> None:
    """Set a waiting call's money aside, or note what it lacks. Accounts not asked about have enough."""
    asked = [drafts[account_id] for account_id in want.account_ids if account_id in drafts]
    short = [draft for draft in asked if draft.taken + want.nano > draft.free + max(0, draft.room)]
    if short:
        for draft in short:
            lacks = draft.taken + want.nano - draft.free - max(0, draft.room)
            draft.lacking = max(draft.lacking, lacks)
        return
    for draft in asked:
        draft.taken += want.nano


def _close(account_id: str, draft: _Draft, live_workers: int, decision: Decision) -> None:
    ask, books = draft.ask, draft.books
    drawn = max(0, draft.taken - draft.free)
    if not books.wanted and not ask.close:
        share = max(0, draft.room - drawn) // (2 * max(1, live_workers))
        drawn += min(share, max(0, ask.wish_nano + draft.taken - draft.free - drawn))
    held = ask.reserved_nano + draft.free + drawn
    total_held = draft.others_held + held
    gone = ask.close and held == 0 and draft.lacking == 0
    decision.answers[account_id] = Answer(
        ceiling_nano=ask.spent_nano + held,
        settled_nano=draft.settled,
        others_held_nano=draft.others_held,
        others_free_nano=books.others_free_nano,
        wanted=books.wanted,
        over_nano=max(0, draft.settled + total_held - ask.limit_nano),
        closed=gone,
    )
    own = Slice(ask.spent_nano + held, ask.spent_nano, ask.reserved_nano + draft.taken, draft.lacking)
    decision.changes[account_id] = Change(draft.settled, total_held, None if gone else own)
