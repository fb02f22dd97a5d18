"""Items and their ledgers as rows of the vector store, changed one by one by compare-and-set.

The ledger is written before the item, and the item's numbers are computed from it: a process that dies in
between leaves an item that is a little behind and catches up with the next change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Filter, Item, Page, Vector
from agentic_flow.memory.confidence import posterior
from agentic_flow.memory.ledger import LEDGERS, Ledger, outcomes, totals
from agentic_flow.memory.likeness import Sketch, lesson_text, read_sketch, stored_sketch
from agentic_flow.memory.records import ITEMS, MemoryItem

T = TypeVar("T")

SOURCES_IN_ROW_MAX = 6
"""Sources that the item's row carries: searches read many rows. The ledger has them all."""
TASKS_SEARCHED_MAX = 4
"""Different tasks of its sources that an item is found by."""
CHANGED_AT_ONCE = 64
"""Rows that are read together and written together: a write waits for the disk, however many rows it has."""
TRIES_MAX = 50
MERGES_FOLLOWED_MAX = 20

_SKETCH = "sketch"
"""Key of what a row has beside its item."""

_NO_VECTOR = Vector([1.0])


def searched_text(item: MemoryItem) -> str:
    """What an item is found by: what it says, and the tasks it comes from."""
    tasks = dict.fromkeys(source.task for source in reversed(item.sources) if source.task)
    return "\n".join(
        part
        for part in (item.title, item.description, item.content, *list(tasks)[:TASKS_SEARCHED_MAX])
        if part
    )


def as_row(item: MemoryItem) -> Item:
    """The item as it is stored."""
    kept = item.model_copy(update={"sources": item.sources[-SOURCES_IN_ROW_MAX:]})
    metadata = kept.model_dump(mode="json", exclude={"id"})
    metadata[_SKETCH] = stored_sketch(lesson_text(item))
    return Item(id=item.id, text=searched_text(kept), metadata=metadata)


def item_values(row: Item) -> dict[str, Any]:
    """Of the item of a row, by field."""
    values = {**row.metadata, "id": row.id}
    values.pop(_SKETCH, None)
    return values


def as_item(row: Item) -> MemoryItem:
    """The item of a row."""
    return MemoryItem.from_record(item_values(row))


def row_sketch(row: Item) -> Sketch:
    """What the item of a row says."""
    stored = row.metadata
    said = f"{stored['title']}\n{stored['description']}\n{stored['content']}"
    return read_sketch(said, stored.get(_SKETCH))


def as_ledger_row(item_id: str, ledger: Ledger) -> Item:
    """The ledger as it is stored."""
    return Item(id=item_id, metadata=ledger.model_dump(mode="json"), vector=_NO_VECTOR)


def projected(item: MemoryItem, ledger: Ledger, now_s: float, half_life_days: float) -> MemoryItem:
    """The item with the numbers of its ledger, refuted or rehabilitated by them."""
    sums = totals(ledger, now_s, half_life_days)
    used = [entry.at_s for entry in ledger.entries.values() if entry.kind == "use"]
    changed = item.model_copy(
        update={
            "successes": sums.successes,
            "failures": sums.failures,
            "outcomes": outcomes(ledger, now_s, half_life_days),
            "uses": sums.uses,
            "shown": max(ledger.shown, sums.uses),
            "sources": ledger.sources[-SOURCES_IN_ROW_MAX:],
            "sources_total": ledger.sources_total,
            "updated_at_s": now_s,
            "used_at_s": max(used, default=item.used_at_s),
        }
    )
    if changed.state not in ("active", "contradicted"):
        return changed
    if posterior(changed, now_s, half_life_days).refuted:
        return changed.model_copy(update={"state": "contradicted"})
    # What a rival contradicts is decided where the rival is known: by consolidation.
    if changed.state == "contradicted" and not changed.contradicts:
        return changed.model_copy(update={"state": "active"})
    return changed


class BankRows:
    """The rows of one bank.

    Args:
        store: Where they are.
        half_life_days: Age at which evidence counts half.
        clock: Tells when evidence comes.
    """

    def __init__(self, store: VectorStore, half_life_days: float, clock: Clock) -> None:
        self.store = store
        self.half_life_days = half_life_days
        self.clock = clock
        self._made: set[str] = set()

    async def make(self, tenant: str, *, again: bool = False) -> None:
        """Create the namespaces of a tenant that has none yet."""
        if tenant in self._made and not again:
            return
        await self.store.create_namespace(tenant, ITEMS)
        await self.store.create_namespace(tenant, LEDGERS, dimension=1)
        self._made.add(tenant)

    async def write(
        self,
        tenant: str,
        namespace: str,
        rows: Sequence[Item],
        *,
        expected_version: int | None,
        idempotency_key: str | None = None,
    ) -> None:
        """Upsert, into namespaces that are made if the tenant was erased meanwhile.

        Raises:
            Conflict: a row is at another version.
        """
        await self.make(tenant)
        for last in (False, True):
            try:
                await self.store.upsert(
                    tenant,
                    namespace,
                    rows,
                    expected_version=expected_version,
                    idempotency_key=idempotency_key,
                )
                return
            except NotFound:
                if last:
                    raise
                await self.make(tenant, again=True)

    async def read(self, tenant: str, namespace: str, ids: Sequence[str]) -> dict[str, Item]:
        """Rows by id; none in a namespace that is not there."""
        if not ids:
            return {}
        try:
            return {row.id: row for row in await self.store.get(tenant, namespace, list(ids))}
        except NotFound:
            return {}

    async def items(self, tenant: str, ids: Sequence[str]) -> dict[str, MemoryItem]:
        """Items by id."""
        return {one: as_item(row) for one, row in (await self.read(tenant, ITEMS, ids)).items()}

    async def ledgers(self, tenant: str, ids: Sequence[str]) -> dict[str, Ledger]:
        """Ledgers by the id of their item."""
        found = await self.read(tenant, LEDGERS, ids)
        return {one: Ledger.from_record(row.metadata) for one, row in found.items()}

    async def page(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 1000,
        vectors: bool = False,
    ) -> Page:
        """One page of rows in id order; empty in a namespace that is not there."""
        try:
            return await self.store.list_items(
                tenant, namespace, where=where, cursor=cursor, limit=limit, vectors=vectors
            )
        except NotFound:
            return Page(items=(), cursor=None)

    async def change_ledger(self, tenant: str, item_id: str, change: Callable[[Ledger], Ledger]) -> Ledger:
        """The ledger after a change, which may be asked for more than once and must be pure."""

        async def once() -> Ledger:
            row = (await self.read(tenant, LEDGERS, [item_id])).get(item_id)
            ledger = Ledger() if row is None else Ledger.from_record(row.metadata)
            changed = change(ledger)
            if row is None or changed != ledger:
                await self.write(
                    tenant,
                    LEDGERS,
                    [as_ledger_row(item_id, changed)],
                    expected_version=0 if row is None else row.version,
                )
            return changed

        return await retried(once)

    async def change_evidence(
        self, tenant: str, item_id: str, change: Callable[[Ledger], Ledger]
    ) -> tuple[str, Ledger] | None:
        """`change_ledger` of the item, or of the one that it is merged into, be it at this moment.

        Returns:
            The id of the item whose ledger was changed, and that; None when there is no such item (any more).
        """
        leaving: str | None = None
        for _ in range(MERGES_FOLLOWED_MAX):
            item = await self.survivor(tenant, item_id)
            if item is None and leaving is not None:
                # Its merge never came to an end, and what it was to be merged into is gone: it stays.
                return leaving, await self.change_ledger(
                    tenant, leaving, lambda ledger: change(ledger.model_copy(update={"moved": None}))
                )
            if item is None:
                return None
            ledger = await self.change_ledger(
                tenant, item.id, partial(_unless_moved, change=change, revision=item.revision)
            )
            if ledger.moved is None:
                return item.id, ledger
            leaving, item_id = item.id, ledger.moved.into
        return None

    async def change_evidences(self, tenant: str, changes: Mapping[str, Callable[[Ledger], Ledger]]) -> None:
        """`change_evidence` of many, by their items' ids, in few writes."""
        # Which revision it was is looked up for the few that have moved only.
        after = await self.change_ledgers(
            tenant, {one: partial(_unless_moved, change=change) for one, change in changes.items()}
        )
        for one, ledger in after.items():
            if ledger.moved is not None:
                await self.change_evidence(tenant, one, changes[one])

    async def change_item(
        self, tenant: str, item_id: str, change: Callable[[MemoryItem], MemoryItem] | None = None
    ) -> MemoryItem | None:
        """The item after a change (pure) and with the numbers of its ledger; None when it is gone."""

        async def once() -> MemoryItem | None:
            # The item before the ledger: who wrote the item with an older ledger makes us read again.
            row = (await self.read(tenant, ITEMS, [item_id])).get(item_id)
            if row is None:
                return None
            ledger = (await self.ledgers(tenant, [item_id])).get(item_id, Ledger())
            changed = self._changed(row, ledger, change)
            if changed is None:
                return as_item(row)
            await self.write(tenant, ITEMS, [as_row(changed)], expected_version=row.version)
            return changed

        return await retried(once)

    async def change_ledgers(
        self, tenant: str, changes: Mapping[str, Callable[[Ledger], Ledger]]
    ) -> dict[str, Ledger]:
        """`change_ledger` of many, by their items' ids, in few writes; the ledgers after it."""
        done: dict[str, Ledger] = {}
        ids = list(changes)
        for start in range(0, len(ids), CHANGED_AT_ONCE):
            part = ids[start : start + CHANGED_AT_ONCE]
            found = await self.read(tenant, LEDGERS, part)
            batches: dict[int, list[Item]] = {}
            for one in part:
                row = found.get(one)
                ledger = Ledger() if row is None else Ledger.from_record(row.metadata)
                changed = done[one] = changes[one](ledger)
                if row is None or changed != ledger:
                    version = 0 if row is None else row.version
                    batches.setdefault(version, []).append(as_ledger_row(one, changed))
            for one in await self._disturbed(tenant, LEDGERS, batches):
                done[one] = await self.change_ledger(tenant, one, changes[one])
        return done

    async def change_items(
        self, tenant: str, changes: Mapping[str, Callable[[MemoryItem], MemoryItem] | None]
    ) -> dict[str, MemoryItem]:
        """`change_item` of many, in few writes; the items after it, without those that are gone."""
        done: dict[str, MemoryItem] = {}
        ids = list(changes)
        for start in range(0, len(ids), CHANGED_AT_ONCE):
            found = await self.read(tenant, ITEMS, ids[start : start + CHANGED_AT_ONCE])
            ledgers = await self.ledgers(tenant, list(found))
            batches: dict[int, list[Item]] = {}
            for one, row in found.items():
                changed = self._changed(row, ledgers.get(one, Ledger()), changes[one])
                done[one] = changed or as_item(row)
                if changed is not None:
                    batches.setdefault(row.version, []).append(as_row(changed))
            for one in await self._disturbed(tenant, ITEMS, batches):
                again = await self.change_item(tenant, one, changes[one])
                if again is None:
                    del done[one]
                else:
                    done[one] = again
        return done

    def _changed(
        self, row: Item, ledger: Ledger, change: Callable[[MemoryItem], MemoryItem] | None
    ) -> MemoryItem | None:
        """The item of a row after a change and with the numbers of its ledger; None when that is the same."""
        item = as_item(row)
        changed = change(item) if change is not None else item
        changed = projected(changed, ledger, self.clock.time_s(), self.half_life_days)
        return None if _same(item, changed, self.half_life_days) else changed

    async def _disturbed(
        self, tenant: str, namespace: str, batches: Mapping[int, Sequence[Item]]
    ) -> list[str]:
        """Write rows that are at these versions; ids of those that are not written, for somebody else wrote
        one of their batch meanwhile."""
        left: list[str] = []
        for version, batch in batches.items():
            try:
                await self.write(tenant, namespace, batch, expected_version=version)
            except Conflict:
                left += [row.id for row in batch]
        return left

    async def survivor(self, tenant: str, item_id: str) -> MemoryItem | None:
        """The item, or the one that it was merged into; None when there is none (any more)."""
        for _ in range(MERGES_FOLLOWED_MAX):
            item = (await self.items(tenant, [item_id])).get(item_id)
            if item is None or item.state != "merged" or item.merged_into is None:
                return item
            item_id = item.merged_into
        return None

    async def delete(self, tenant: str, ids: Sequence[str]) -> int:
        """Remove items with their ledgers; how many items there were."""
        if not ids:
            return 0
        try:
            removed = await self.store.delete(tenant, ITEMS, list(ids))
            await self.store.delete(tenant, LEDGERS, list(ids))
        except NotFound:
            return 0
        return removed


async def retried(once: Callable[[], Any]) -> Any:
    """The result of an attempt, which is repeated as long as somebody else was faster.

    Raises:
        Conflict: somebody always was.
    """
    for _ in range(TRIES_MAX - 1):
        try:
            return await once()
        except Conflict:
            continue
    return await once()


def _unless_moved(
    ledger: Ledger, *, change: Callable[[Ledger], Ledger], revision: int | None = None
) -> Ledger:
    """The ledger after the change; as it is when its item is merged into another. Not so when the item, by
    now of this revision, has got other words since: then nobody marked it, and the merge is off."""
    if ledger.moved is None:
        return change(ledger)
    if revision is not None and revision > ledger.moved.revision:
        return change(ledger.model_copy(update={"moved": None}))
    return ledger


def _same(before: MemoryItem, after: MemoryItem, half_life_days: float) -> bool:
    """Whether nothing but the age of the evidence differs."""
    share = 0.5 ** ((after.updated_at_s - before.updated_at_s) / (half_life_days * 86_400.0))
    faded: Mapping[str, float] = {
        "successes": before.successes * share,
        "failures": before.failures * share,
    }
    if any(abs(getattr(after, name) - value) > 1e-9 for name, value in faded.items()):
        return False
    if [one.words for one in after.outcomes] != [one.words for one in before.outcomes] or any(
        abs(new.balance - old.balance * share) > 1e-9
        for new, old in zip(after.outcomes, before.outcomes, strict=True)
    ):
        return False
    numbers = {
        "successes": after.successes,
        "failures": after.failures,
        "outcomes": after.outcomes,
        "updated_at_s": after.updated_at_s,
    }
    return before.model_copy(update=numbers) == after.model_copy(update={})
