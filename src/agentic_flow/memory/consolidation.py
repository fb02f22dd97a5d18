"""Consolidation: equal lessons become one item, contradictions are settled by outcomes, the rest is pruned.

Like pairs come from hashing, never from comparing all with all, so that time grows about as the number of
items. Every change is one atomic write that may be repeated: a consolidation that is interrupted leaves
nothing half done, and the next one goes on. Evidence fades by itself, when it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from agentic_flow.core.messages import Frozen
from agentic_flow.core.settings import MemorySettings
from agentic_flow.core.vectors import Item, SearchQuery
from agentic_flow.memory.bank_rows import CHANGED_AT_ONCE, BankRows, as_item, row_sketch
from agentic_flow.memory.confidence import DAY_S, Belief, posterior
from agentic_flow.memory.ledger import Ledger, absorbed, moved
from agentic_flow.memory.likeness import Sketch, like_pairs, near_pairs, same_words
from agentic_flow.memory.records import ITEMS, MemoryItem

MARGIN = 0.1
"""How much better a contradicting item must be believed to silence the other."""
CONTRADICTS_MAX = 8
DELETED_AT_ONCE = 500

_COMPARED = ("active", "contradicted")
"""States of items that take part."""


class ConsolidationReport(Frozen):
    """What a consolidation did, in items, and how long it took."""

    scanned: int = 0
    compared: int = 0
    merged: int = 0
    contradictions: int = 0
    silenced: int = 0
    revived: int = 0
    pruned: int = 0
    deleted: int = 0
    active: int = 0
    duration_s: float = 0.0


@dataclass(slots=True)
class _Entry:
    """What is kept in memory of an item."""

    id: str
    lesson: str
    state: str
    revision: int
    created_at_s: float
    touched_at_s: float
    belief: Belief
    contradicts: tuple[str, ...]
    sketch: Sketch
    vector: NDArray[np.float16] | None


@dataclass(slots=True)
class _Plan:
    """Merges as (from, into), and pairs that contradict each other, as places among the entries."""

    compared: int = 0
    merges: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    opposed: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


async def consolidate(rows: BankRows, tenant: str, settings: MemorySettings) -> ConsolidationReport:
    """Put a tenant's bank in order.

    Args:
        rows: Its rows.
        tenant: Whose.
        settings: Say how many items are kept, and how long what is not recalled stays.
    """
    clock = rows.clock
    began_s = clock.monotonic_s()
    now_s = clock.time_s()
    old_s = now_s - settings.retention_days * DAY_S
    semantic = await _semantic(rows, tenant)
    entries, stale, scanned = await _read(rows, tenant, now_s, old_s, semantic)
    plan = await asyncio.to_thread(_planned, entries, semantic)
    gone: set[int] = set()
    for start in range(0, len(plan.merges), CHANGED_AT_ONCE):
        gone |= await _merge(rows, tenant, entries, plan.merges[start : start + CHANGED_AT_ONCE])
    left = [index for index in range(len(entries)) if index not in gone]
    fresh = await _reread(rows, tenant, entries, {winner for _, winner in plan.merges})
    for index, belief in fresh.items():
        entries[index].belief = belief
    silenced, rivals = await _settle(rows, tenant, entries, plan.opposed, gone)
    revived, refuted = await _review(rows, tenant, entries, left, rivals)
    pruned = await _prune(rows, tenant, [entries[index] for index in left], settings, old_s)
    deleted = 0
    for start in range(0, len(stale), DELETED_AT_ONCE):
        deleted += await rows.delete(tenant, stale[start : start + DELETED_AT_ONCE])
    active = sum(entries[index].state == "active" for index in left)
    return ConsolidationReport(
        scanned=scanned,
        compared=plan.compared,
        merged=len(gone),
        contradictions=sum(map(len, rivals.values())) // 2,
        silenced=silenced + refuted,
        revived=revived,
        pruned=pruned,
        deleted=deleted,
        active=active,
        duration_s=clock.monotonic_s() - began_s,
    )


async def _semantic(rows: BankRows, tenant: str) -> bool:
    """Whether vectors of the items tell meaning."""
    page = await rows.page(tenant, ITEMS, limit=1)
    if not page.items:
        return False
    query = SearchQuery(text=page.items[0].metadata["title"], k=1, mode="vector")
    return (await rows.store.search(tenant, ITEMS, query)).semantic


async def _read(
    rows: BankRows, tenant: str, now_s: float, old_s: float, semantic: bool
) -> tuple[list[_Entry], list[str], int]:
    """Items to be compared; ids of those that have been out of use for long; how many there are in all."""
    entries: list[_Entry] = []
    stale: list[str] = []
    scanned = 0
    cursor: str | None = None
    while True:
        page = await rows.page(tenant, ITEMS, cursor=cursor, vectors=semantic)
        scanned += len(page.items)
        made, gone = await asyncio.to_thread(
            _entries, page.items, now_s, old_s, rows.half_life_days, semantic
        )
        entries += made
        stale += gone
        cursor = page.cursor
        if cursor is None:
            return entries, stale, scanned


def _entries(
    page: Iterable[Item], now_s: float, old_s: float, half_life_days: float, semantic: bool
) -> tuple[list[_Entry], list[str]]:
    entries: list[_Entry] = []
    stale: list[str] = []
    for row in page:
        item = as_item(row)
        if item.state in ("merged", "pruned"):
            if item.updated_at_s < old_s:
                stale.append(item.id)
            continue
        vector = None
        if semantic and row.vector is not None:
            vector = np.frombuffer(row.vector.data, "<f4").astype(np.float16)
        entries.append(
            _Entry(
                id=item.id,
                lesson=item.lesson,
                state=item.state,
                revision=item.revision,
                created_at_s=item.created_at_s,
                touched_at_s=max(item.created_at_s, item.used_at_s or 0.0),
                belief=posterior(item, now_s, half_life_days),
                contradicts=item.contradicts,
                sketch=row_sketch(row),
                vector=vector,
            )
        )
    return entries, stale


def _planned(entries: list[_Entry], semantic: bool) -> _Plan:
    """Which items to merge and which contradict each other. The older item of a pair stays: every process
    that looks at the pair decides the same, so two can never merge a pair both ways."""
    # In the order of age, so that the earlier of a pair is the one that stays.
    order = sorted(range(len(entries)), key=lambda index: (entries[index].created_at_s, entries[index].id))
    plan = _Plan()
    leader = list(range(len(entries)))
    pairs = list(like_pairs([entries[index].sketch for index in order]))
    halves = [half for index in order if (half := entries[index].vector) is not None]
    if semantic and entries and len(halves) == len(entries):
        vectors = np.stack(halves).astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        pairs += near_pairs(vectors)
    for older, newer in sorted(set(pairs), key=lambda pair: (pair[1], pair[0])):
        first, second = order[older], order[newer]
        plan.compared += 1
        one, other = entries[first], entries[second]
        if one.lesson == other.lesson:
            first = leader[first]
            one = entries[first]
            if leader[second] != second:
                continue
            if one.sketch.negations == other.sketch.negations and same_words(
                one.sketch, other.sketch, _meaning(one, other)
            ):
                leader[second] = first
                plan.merges.append((second, first))
        elif same_words(one.sketch, other.sketch, _meaning(one, other)):
            plan.opposed.append((first, second))
    plan.opposed = sorted(
        {(min(a, b), max(a, b)) for a, b in ((leader[x], leader[y]) for x, y in plan.opposed)}
    )
    return plan


def _meaning(one: _Entry, other: _Entry) -> float | None:
    if one.vector is None or other.vector is None:
        return None
    a, b = one.vector.astype(np.float32), other.vector.astype(np.float32)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else None


async def _merge(
    rows: BankRows, tenant: str, entries: list[_Entry], merges: Sequence[tuple[int, int]]
) -> set[int]:
    """Give items' evidence to others and mark them; which of them were there to do it. No item that is merged
    into is itself merged."""
    states = await rows.items(
        tenant, [entries[index].id for index in {one for pair in merges for one in pair}]
    )
    into = {
        entries[loser].id: entries[winner].id
        for loser, winner in merges
        if all(
            (item := states.get(entries[index].id)) is not None
            and item.state in _COMPARED
            and item.revision == entries[index].revision
            for index in (loser, winner)
        )
    }
    # From here on what comes for one that is merged goes where its evidence goes.
    others = await rows.change_ledgers(
        tenant,
        {
            loser: partial(moved, into=winner, revision=states[loser].revision)
            for loser, winner in into.items()
        },
    )
    losers: dict[str, list[str]] = {}
    for loser, winner in into.items():
        losers.setdefault(winner, []).append(loser)

    def joined(ledger: Ledger, winner: str) -> Ledger:
        for loser in losers[winner]:
            ledger = absorbed(ledger, loser, others[loser], rows.half_life_days)
        return ledger

    # In this order, so that an interrupted merge is found, and done, again: evidence is absorbed once.
    await rows.change_evidences(tenant, {winner: partial(joined, winner=winner) for winner in losers})
    there = await rows.change_items(tenant, dict.fromkeys(losers))
    marked = await rows.change_items(
        tenant,
        {
            loser: partial(_marked_merged, into=winner, revision=states[loser].revision)
            for loser, winner in into.items()
            if winner in there
        },
    )
    merged = {one for one, item in marked.items() if item.state == "merged"}
    return {loser for loser, _ in merges if entries[loser].id in merged}


def _marked_merged(item: MemoryItem, into: str, revision: int) -> MemoryItem:
    """The item, merged into another unless it says something else by now."""
    if item.state not in _COMPARED or item.revision != revision:
        return item
    return item.model_copy(update={"state": "merged", "merged_into": into})


def _with(*states: str, **update: object) -> Callable[[MemoryItem], MemoryItem]:
    """A change that sets these fields, if the item is (still) in one of the states."""
    return lambda item: item.model_copy(update=update) if item.state in states else item


async def _reread(rows: BankRows, tenant: str, entries: list[_Entry], changed: set[int]) -> dict[int, Belief]:
    """Beliefs of those that others were merged into."""
    now_s = rows.clock.time_s()
    places = sorted(changed)
    items = await rows.items(tenant, [entries[index].id for index in places])
    return {
        index: posterior(items[entries[index].id], now_s, rows.half_life_days)
        for index in places
        if entries[index].id in items
    }


async def _settle(
    rows: BankRows,
    tenant: str,
    entries: list[_Entry],
    opposed: list[tuple[int, int]],
    gone: set[int],
) -> tuple[int, dict[str, set[str]]]:
    """Silence the clearly less believed side of contradictions; how many, and who contradicts whom."""
    rivals: dict[str, set[str]] = {}
    quiet: set[str] = set()
    by_id: dict[str, _Entry] = {}
    for first, second in opposed:
        if first in gone or second in gone:
            continue
        one, other = entries[first], entries[second]
        by_id |= {one.id: one, other.id: other}
        rivals.setdefault(one.id, set()).add(other.id)
        rivals.setdefault(other.id, set()).add(one.id)
        if abs(one.belief.mean - other.belief.mean) >= MARGIN:
            quiet.add((one if one.belief.mean < other.belief.mean else other).id)
    changes: dict[str, Callable[[MemoryItem], MemoryItem]] = {}
    for item_id, entry in by_id.items():
        wanted = tuple(sorted(rivals[item_id]))[:CONTRADICTS_MAX]
        silence = item_id in quiet and entry.state != "contradicted"
        if silence or entry.contradicts != wanted:
            changes[item_id] = partial(_marked, contradicts=wanted, silence=item_id in quiet)
    silenced = 0
    for item_id, changed in (await rows.change_items(tenant, changes)).items():
        entry = by_id[item_id]
        silenced += entry.state == "active" and changed.state == "contradicted"
        entry.contradicts, entry.state = changed.contradicts, changed.state
    return silenced, rivals


def _marked(item: MemoryItem, contradicts: tuple[str, ...], silence: bool) -> MemoryItem:
    """The item with those that contradict it, and silenced by them if so."""
    update: dict[str, object] = {"contradicts": contradicts}
    if silence and item.state == "active":
        update["state"] = "contradicted"
    return item.model_copy(update=update)


async def _review(
    rows: BankRows, tenant: str, entries: list[_Entry], left: list[int], rivals: dict[str, set[str]]
) -> tuple[int, int]:
    """Bring back what nothing speaks against any more, silence what outcomes refute; how many of each."""
    by_id = {entries[index].id: entries[index] for index in left}
    changes: dict[str, Callable[[MemoryItem], MemoryItem] | None] = {}
    for entry in by_id.values():
        against = [by_id[one] for one in rivals.get(entry.id, ()) if one in by_id]
        beaten = any(
            not other.belief.refuted and other.belief.mean >= entry.belief.mean + MARGIN for other in against
        )
        if entry.state == "contradicted" and not beaten and not entry.belief.refuted:
            keep = tuple(sorted(other.id for other in against))[:CONTRADICTS_MAX]
            changes[entry.id] = _with("contradicted", state="active", contradicts=keep)
        elif entry.state == "active" and entry.belief.refuted:
            changes[entry.id] = None
    revived = refuted = 0
    for item_id, changed in (await rows.change_items(tenant, changes)).items():
        entry = by_id[item_id]
        revived += entry.state == "contradicted" and changed.state == "active"
        refuted += entry.state == "active" and changed.state == "contradicted"
        entry.state = changed.state
    return revived, refuted


async def _prune(
    rows: BankRows, tenant: str, entries: list[_Entry], settings: MemorySettings, old_s: float
) -> int:
    """Retire what has been silenced for long, and the least worth of what is too much; how many."""
    retired = [entry for entry in entries if entry.state == "contradicted" and entry.touched_at_s < old_s]
    retired_ids = {entry.id for entry in retired}
    kept = [entry for entry in entries if entry.id not in retired_ids]
    surplus = len(kept) - settings.items_max
    if surplus > 0:
        kept.sort(key=lambda entry: (entry.belief.mean, entry.belief.evidence, entry.touched_at_s, entry.id))
        retired += kept[:surplus]
    await rows.change_items(tenant, {entry.id: _with(*_COMPARED, state="pruned") for entry in retired})
    for entry in retired:
        entry.state = "pruned"
    return len(retired)
