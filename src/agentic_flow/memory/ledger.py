"""The evidence of one item, run by run: what the belief in it is computed from, and what `explain` shows.

An item's `successes`, `failures`, `shown` and `uses` are a projection of its ledger. Each trajectory has one
entry, so that a credit that comes twice counts once and a better verdict replaces a worse one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agentic_flow.core.messages import Frozen, Record
from agentic_flow.memory.confidence import TAUGHT_WEIGHT, Credit, fading
from agentic_flow.memory.likeness import task_words
from agentic_flow.memory.records import SOURCES_MAX, Outcomes, Source

LEDGERS = "memory.ledgers"
"""Namespace: one row an item, under the item's id; never searched by meaning."""

ENTRIES_MAX = 400
"""Entries of an item that are kept one by one; older ones are folded into a sum."""

OUTCOMES_MAX = 12
"""Wordings of tasks whose outcomes an item carries; each search reads them."""

TAUGHT_RANK = -1
"""Trust in an entry that only says where the item came from: any verdict on its use replaces it."""


class Entry(Record):
    """What one trajectory says of the item: `counts` for it, against it, or neither way. `words` are those of
    its task, empty when that is not known."""

    kind: Literal["taught", "use"]
    counts: Literal["for", "against", "neither"]
    weight: float
    rank: int
    at_s: float
    words: str = ""


class Moved(Record):
    """That the item, as it was in this revision, is merged `into` another: what comes goes there."""

    into: str
    revision: int


class Totals(Frozen):
    """A ledger's evidence as it weighs at one time."""

    successes: float
    failures: float
    uses: int


class Ledger(Record):
    """All evidence of an item. `absorbed` are items that were merged into it, with theirs.

    A merge begins with `moved`, in one write: evidence that comes before it is moved along, evidence that
    comes after it finds its way, and none falls in between.
    """

    entries: dict[str, Entry] = Field(default_factory=dict[str, Entry])
    folded_successes: float = 0.0
    folded_failures: float = 0.0
    folded_at_s: float = 0.0
    folded_uses: int = 0
    shown: int = 0
    sources: tuple[Source, ...] = ()
    sources_total: int = 0
    absorbed: tuple[str, ...] = ()
    moved: Moved | None = None


def taught(ledger: Ledger, source: Source, half_life_days: float, *, speaks: bool = True) -> Ledger:
    """The ledger with a trajectory that taught the item; unchanged when it has one of that trajectory.

    Args:
        ledger: Of the item.
        source: The trajectory.
        half_life_days: Age at which evidence counts half.
        speaks: Whether its outcome speaks for the item; not so where it counts elsewhere already.
    """
    if any(known.trajectory_id == source.trajectory_id for known in ledger.sources):
        return ledger
    sources = tuple(sorted((*ledger.sources, source), key=lambda one: (one.at_s, one.trajectory_id)))
    changed = ledger.model_copy(
        update={"sources": sources[-SOURCES_MAX:], "sources_total": ledger.sources_total + 1}
    )
    if source.trajectory_id in ledger.entries:
        return changed
    speaks = speaks and source.outcome in ("success", "failure")
    entry = Entry(
        kind="taught",
        counts="for" if speaks else "neither",
        weight=(1.0 if source.sure else TAUGHT_WEIGHT) if speaks else 0.0,
        rank=TAUGHT_RANK,
        at_s=source.at_s,
        words=task_words(source.task),
    )
    return _bounded(_with(changed, source.trajectory_id, entry), half_life_days)


def credited(ledger: Ledger, credit: Credit, at_s: float, half_life_days: float) -> Ledger:
    """The ledger with a run's outcome; unchanged when it has that, or a more trusted one, of the run."""
    known = ledger.entries.get(credit.trajectory_id)
    if known is not None and known.rank > credit.rank:
        return ledger
    counts: Literal["for", "against", "neither"] = "neither"
    if credit.outcome in ("success", "failure") and credit.weight > 0:
        counts = "for" if credit.outcome == "success" else "against"
    entry = Entry(
        kind="use",
        counts=counts,
        weight=credit.weight if counts != "neither" else 0.0,
        rank=credit.rank,
        at_s=at_s,
        words=task_words(credit.task),
    )
    if known is not None and known.model_copy(update={"at_s": at_s}) == entry:
        return ledger
    return _bounded(_with(ledger, credit.trajectory_id, entry), half_life_days)


def retracted(ledger: Ledger, trajectory_id: str) -> Ledger:
    """The ledger without what the trajectory taught; an outcome of it stays."""
    entry = ledger.entries.get(trajectory_id)
    sources = tuple(one for one in ledger.sources if one.trajectory_id != trajectory_id)
    entries = dict(ledger.entries)
    if entry is not None and entry.kind == "taught":
        del entries[trajectory_id]
    total = ledger.sources_total - (len(ledger.sources) - len(sources))
    return ledger.model_copy(update={"entries": entries, "sources": sources, "sources_total": total})


def absorbed(ledger: Ledger, item_id: str, other: Ledger, half_life_days: float) -> Ledger:
    """The ledger with all of another item's evidence; unchanged when it has that item's already.

    A run that has an entry in both keeps the more trusted one, then the weightier one.
    """
    if item_id in ledger.absorbed:
        return ledger
    entries = dict(ledger.entries)
    for trajectory_id, entry in other.entries.items():
        known = entries.get(trajectory_id)
        if known is None or (entry.rank, entry.weight) > (known.rank, known.weight):
            entries[trajectory_id] = entry
    known_sources = {one.trajectory_id for one in ledger.sources}
    fresh = [one for one in other.sources if one.trajectory_id not in known_sources]
    overlap = len(other.sources) - len(fresh)
    sources = sorted((*ledger.sources, *fresh), key=lambda one: (one.at_s, one.trajectory_id))
    folded_at_s = max(ledger.folded_at_s, other.folded_at_s)
    mine = fading(folded_at_s - ledger.folded_at_s, half_life_days)
    theirs = fading(folded_at_s - other.folded_at_s, half_life_days)
    joined = Ledger(
        entries=entries,
        folded_successes=ledger.folded_successes * mine + other.folded_successes * theirs,
        folded_failures=ledger.folded_failures * mine + other.folded_failures * theirs,
        folded_at_s=folded_at_s,
        folded_uses=ledger.folded_uses + other.folded_uses,
        shown=ledger.shown + other.shown,
        sources=tuple(sources[-SOURCES_MAX:]),
        sources_total=ledger.sources_total + other.sources_total - overlap,
        absorbed=(*ledger.absorbed, item_id, *other.absorbed),
        moved=ledger.moved,
    )
    return _bounded(joined, half_life_days)


def moved(ledger: Ledger, into: str, revision: int) -> Ledger:
    """The ledger of an item that is merged into another."""
    return ledger.model_copy(update={"moved": Moved(into=into, revision=revision)})


def totals(ledger: Ledger, now_s: float, half_life_days: float) -> Totals:
    """What the evidence weighs at `now_s`."""
    share = fading(now_s - ledger.folded_at_s, half_life_days)
    sums = {"for": ledger.folded_successes * share, "against": ledger.folded_failures * share}
    uses = ledger.folded_uses
    for entry in ledger.entries.values():
        if entry.counts == "neither":
            continue
        sums[entry.counts] += entry.weight * fading(now_s - entry.at_s, half_life_days)
        uses += entry.kind == "use"
    return Totals(successes=sums["for"], failures=sums["against"], uses=uses)


def outcomes(ledger: Ledger, now_s: float, half_life_days: float) -> tuple[Outcomes, ...]:
    """In which tasks the evidence came about, as it weighs at `now_s`; of many wordings the latest."""
    balances: dict[str, float] = {}
    for _, entry in sorted(ledger.entries.items(), key=lambda pair: (pair[1].at_s, pair[0])):
        if entry.counts != "neither" and entry.words:
            weight = entry.weight * fading(now_s - entry.at_s, half_life_days)
            signed = weight if entry.counts == "for" else -weight
            balances[entry.words] = balances.pop(entry.words, 0.0) + signed
    latest = list(balances.items())[-OUTCOMES_MAX:]
    return tuple(Outcomes(words=words, balance=balance) for words, balance in latest)


def _with(ledger: Ledger, trajectory_id: str, entry: Entry) -> Ledger:
    return ledger.model_copy(update={"entries": {**ledger.entries, trajectory_id: entry}})


def _bounded(ledger: Ledger, half_life_days: float) -> Ledger:
    """The ledger with its oldest entries folded into the sum once there are too many."""
    surplus = len(ledger.entries) - ENTRIES_MAX
    if surplus <= 0:
        return ledger
    oldest = sorted(ledger.entries, key=lambda one: (ledger.entries[one].at_s, one))[:surplus]
    gone = {one: ledger.entries[one] for one in oldest}
    at_s = max(ledger.folded_at_s, *(entry.at_s for entry in gone.values()))
    carried = ledger.model_copy(update={"entries": gone})
    sums = totals(carried, at_s, half_life_days)
    return ledger.model_copy(
        update={
            "entries": {one: entry for one, entry in ledger.entries.items() if one not in gone},
            "folded_successes": sums.successes,
            "folded_failures": sums.failures,
            "folded_at_s": at_s,
            "folded_uses": sums.uses,
        }
    )
