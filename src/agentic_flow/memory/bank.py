"""The bank of items: what agents learned, found by task, believed as far as outcomes bear it out.

Source: S. Ouyang et al., "ReasoningBank: Scaling Agent Self-Evolving with Reasoning Memory"
(arXiv 2509.25140). Its reference keeps everything and believes all of it alike; here equal lessons are one
item, and what is recalled follows what its uses came to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, InvalidInput, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import MemorySettings
from agentic_flow.core.vectors import Hit, SearchQuery, SearchResult
from agentic_flow.memory import ranking
from agentic_flow.memory.bank_rows import (
    BankRows,
    as_item,
    as_ledger_row,
    as_row,
    projected,
    row_sketch,
    searched_text,
)
from agentic_flow.memory.beliefs import BankStats, Explanation, explanation, tallied
from agentic_flow.memory.confidence import PRIORS, Credit, fading
from agentic_flow.memory.consolidation import ConsolidationReport, consolidate
from agentic_flow.memory.ledger import LEDGERS, Ledger, absorbed, credited, retracted, taught
from agentic_flow.memory.likeness import (
    Sketch,
    confirms,
    cosine,
    lesson_text,
    same_lesson,
    same_matter,
    same_words,
    sketch,
    words_of,
)
from agentic_flow.memory.records import ITEMS, MemoryItem, Recall, RecalledItem

CANDIDATES = 16
"""Items that a task is compared with, from which those that are recalled are chosen."""
CANDIDATES_MAX = 1000
CLAIMS = 16
"""Candidates whose words are looked at, and whose evidence counts: so many that may be recalled, and so many
that may not."""
NAMED = 8
"""Candidates that full text adds for the codes in a task."""
FINALISTS = 8
"""Candidates whose words are compared with each other."""
NEIGHBOURS = 16
"""Stored items that a new one is compared with."""
ADDED_AT_ONCE = 128
TASK_CHARS_SEARCHED = 4000
ITEMS_PER_CALL_MAX = 10_000

_FADED_MIN = 1e-6
"""Share of its weight below which evidence is taken for none."""
_HEARD = ("active", "contradicted")
"""States of items whose evidence counts, whether or not they are recalled."""


@dataclass(frozen=True, slots=True)
class Added:
    """What became of an item: stored under its id, or merged into another that taught the same."""

    id: str
    merged_into: str | None = None


@dataclass(frozen=True, slots=True)
class _Scored:
    hit: Hit
    candidate: ranking.Candidate
    says: Sketch


@dataclass(frozen=True, slots=True)
class _Found:
    """What a search gave: hits whose evidence counts, the ids of those that may be recalled, and the codes of
    the task that only few items have."""

    result: SearchResult
    hits: list[Hit]
    may: set[str]
    codes: str


class Bank:
    """Items of all tenants; each call sees one tenant's only.

    Args:
        store: Keeps them, in the namespaces `memory.items` and `memory.ledgers`.
        settings: The `memory` section.
        clock: Tells the age of evidence.
    """

    def __init__(self, store: VectorStore, settings: MemorySettings, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._rows = BankRows(store, settings.recency_half_life_days, clock)
        self._adding: dict[str, asyncio.Lock] = {}

    # Writing

    async def add(
        self,
        tenant: str,
        items: Sequence[MemoryItem],
        *,
        idempotency_key: str,
        used: Collection[str] = (),
    ) -> list[Added]:
        """Store items, one for each lesson: what teaches the same as a stored item becomes evidence for that.

        An item whose id is stored with the same words is not stored again. With other words it replaces the
        stored one, unless that rests on more than the same trajectory or was written by a person: then it is
        stored beside it.

        Args:
            tenant: Whose.
            items: In the order of preference; at most 10,000.
            idempotency_key: The same for a repeated call; at most 200 characters.
            used: Ids of stored items that the run which taught these used: what only says again what one of
                them says is merged into it. The run's outcome is credited to what it used, and so is no
                evidence, a second time, for what it taught about the same matter.

        Returns:
            One a given item, in the order given.

        Raises:
            InvalidInput: an id occurs twice, or there are too many.
        """
        if len({item.id for item in items}) != len(items):
            raise InvalidInput("an item id occurs twice in one call", hint="send each item once")
        if len(items) > ITEMS_PER_CALL_MAX:
            raise InvalidInput(f"{len(items)!r} items in one call", hint=f"at most {ITEMS_PER_CALL_MAX}")
        done: list[Added] = []
        # Within a process two writers of the same lesson take turns; across processes consolidation merges.
        async with self._adding.setdefault(tenant, asyncio.Lock()):
            await self._rows.make(tenant)
            for start in range(0, len(items), ADDED_AT_ONCE):
                part = items[start : start + ADDED_AT_ONCE]
                done += await self._added(tenant, part, f"{idempotency_key}:{start}", used)
        return done

    async def _added(
        self, tenant: str, items: Sequence[MemoryItem], key: str, used: Collection[str] = ()
    ) -> list[Added]:
        stored = await self._rows.items(tenant, [item.id for item in items])
        matches = await self._matches(tenant, items)
        there = [found for one in used if (found := await self._rows.survivor(tenant, one)) is not None]
        heard = {item.id for item in items if any(_same_matter(item, one) for one in there)}
        for item in items:
            again = next((one.id for one in there if one.state in _HEARD and confirms(item, one)), None)
            if again is not None:
                matches.setdefault(item.id, again)
        fresh = _Batch()
        done: dict[str, Added] = {}
        for item in items:
            known = stored.get(item.id)
            if known is not None:
                done[item.id] = await self._again(tenant, known, item, key, heard)
                continue
            match = matches.get(item.id) or fresh.like(item)
            if match is None:
                fresh.put(item)
                done[item.id] = Added(item.id)
            else:
                done[item.id] = Added(item.id, match)
        await self._insert(tenant, list(fresh.items.values()), key, heard)
        for item in items:
            into = done[item.id].merged_into
            if into is not None and item.id not in stored:
                await self._absorb(tenant, into, item, heard)
        return [done[item.id] for item in items]

    async def _again(
        self, tenant: str, known: MemoryItem, item: MemoryItem, key: str, heard: Collection[str]
    ) -> Added:
        """An item whose id is taken."""
        if known.state == "merged":
            survivor = await self._rows.survivor(tenant, known.id)
            if survivor is not None and survivor.lesson == item.lesson:
                return Added(item.id, survivor.id)
        if _words(known) == _words(item):
            await self._rows.change_item(tenant, known.id)
            return Added(item.id)
        own = {source.trajectory_id for source in item.sources}
        others = {source.trajectory_id for source in known.sources} - own
        if known.origin == "person" or others or known.state == "merged":
            beside = item.model_copy(update={"id": f"{item.id}.r{known.revision + 1}"})
            return (await self._added(tenant, [beside], f"{key}:beside"))[0]
        now_s = self._clock.time_s()
        await self._rows.change_ledger(tenant, known.id, lambda _: self._opening(item, heard))
        await self._rows.change_item(
            tenant,
            known.id,
            lambda was: item.model_copy(
                update={
                    "revision": was.revision + 1,
                    "state": "active",
                    "created_at_s": item.created_at_s or now_s,
                }
            ),
        )
        return Added(item.id)

    async def _matches(self, tenant: str, items: Sequence[MemoryItem]) -> dict[str, str]:
        """For items that teach the same as a stored one, that one's id."""
        queries = [
            SearchQuery(text=searched_text(item)[:TASK_CHARS_SEARCHED], k=NEIGHBOURS, mode="vector")
            for item in items
        ]
        try:
            results = await self._store.search_many(tenant, ITEMS, queries)
        except NotFound:
            # The tenant was erased since its namespaces were made.
            return {}
        found: dict[str, str] = {}
        for item, result in zip(items, results, strict=True):
            for hit in result.hits:
                other = as_item(hit.item)
                meaning = hit.score_parts.get("vector") if result.semantic else None
                if (
                    other.id != item.id
                    and other.state in ("active", "contradicted")
                    and same_lesson(item, other, meaning)
                ):
                    found[item.id] = other.id
                    break
        return found

    async def _insert(
        self, tenant: str, items: Sequence[MemoryItem], key: str, heard: Collection[str]
    ) -> None:
        if not items:
            return
        now_s = self._clock.time_s()
        ready: list[MemoryItem] = []
        ledgers: list[Ledger] = []
        for item in items:
            ledger = self._opening(item, heard)
            created = item.model_copy(
                update={"created_at_s": item.created_at_s or now_s, "revision": max(1, item.revision)}
            )
            ledgers.append(ledger)
            ready.append(self._projected(created, ledger, now_s))
        # Ledgers first; what a dead process left of them is the same.
        await self._rows.write(
            tenant,
            LEDGERS,
            [as_ledger_row(item.id, ledger) for item, ledger in zip(ready, ledgers, strict=True)],
            expected_version=None,
        )
        try:
            await self._rows.write(
                tenant, ITEMS, [as_row(item) for item in ready], expected_version=0, idempotency_key=key[:250]
            )
        except Conflict:
            # Another process stored one of them meanwhile: one by one, so that it keeps the others.
            stored = await self._rows.items(tenant, [item.id for item in ready])
            for item in ready:
                if item.id not in stored:
                    await self._rows.write(tenant, ITEMS, [as_row(item)], expected_version=0)

    async def _absorb(self, tenant: str, into: str, item: MemoryItem, heard: Collection[str]) -> None:
        half_life_days = self._settings.recency_half_life_days
        opening = self._opening(item, heard)
        done = await self._rows.change_evidence(
            tenant, into, lambda ledger: absorbed(ledger, item.id, opening, half_life_days)
        )
        if done is not None:
            await self._rows.change_item(tenant, done[0])

    def _opening(self, item: MemoryItem, heard: Collection[str]) -> Ledger:
        """The ledger that a new item begins with: where it comes from, and evidence that it brings along.

        `heard` are the ids of items whose runs' outcomes are credited to what they used.
        """
        now_s = self._clock.time_s()
        ledger = Ledger(
            folded_successes=item.successes,
            folded_failures=item.failures,
            folded_at_s=item.updated_at_s or now_s,
            folded_uses=item.uses,
            shown=item.shown,
        )
        for source in item.sources:
            dated = source if source.at_s else source.model_copy(update={"at_s": now_s})
            ledger = taught(ledger, dated, self._settings.recency_half_life_days, speaks=item.id not in heard)
        return ledger.model_copy(update={"sources_total": max(ledger.sources_total, item.sources_total)})

    def _projected(self, item: MemoryItem, ledger: Ledger, now_s: float) -> MemoryItem:
        return projected(item, ledger, now_s, self._settings.recency_half_life_days)

    async def credit(self, tenant: str, credits: Sequence[Credit]) -> None:
        """Let outcomes count for or against the items that runs were shown.

        Each run counts once an item: the same credit again changes nothing, and one by a verdict that is at
        least as trusted replaces the earlier one. Credit of an item that was merged goes to what it was
        merged into; of one that is gone, nowhere.
        """
        half_life_days = self._settings.recency_half_life_days
        for one in credits:
            now_s = self._clock.time_s()

            def count(ledger: Ledger, one: Credit = one, now_s: float = now_s) -> Ledger:
                return credited(ledger, one, now_s, half_life_days)

            done = await self._rows.change_evidence(tenant, one.item_id, count)
            if done is not None:
                await self._rows.change_item(tenant, done[0])

    async def retract(self, tenant: str, trajectory_id: str, item_ids: Sequence[str]) -> list[str]:
        """Take back what a trajectory taught, because its verdict was wrong; ids of items that were removed,
        because they rest on nothing else.

        Args:
            tenant: Whose.
            trajectory_id: The trajectory.
            item_ids: What was distilled from it; where that was merged into another, the other.
        """
        removed: list[str] = []
        for item_id in item_ids:

            def without(ledger: Ledger, item_id: str = item_id) -> Ledger:
                kept = tuple(
                    one
                    for one in ledger.absorbed
                    if one != item_id and not one.startswith(f"{trajectory_id}.")
                )
                return retracted(ledger, trajectory_id).model_copy(update={"absorbed": kept})

            done = await self._rows.change_evidence(tenant, item_id, without)
            if done is None:
                continue
            kept_id, ledger = done
            item = (await self._rows.items(tenant, [kept_id])).get(kept_id)
            if item is None:
                continue
            if not ledger.sources and not ledger.entries and item.origin in ("model", "mechanical"):
                await self._rows.delete(tenant, [kept_id])
                removed.append(kept_id)
            else:
                await self._rows.change_item(tenant, kept_id)
        return removed

    async def note_shown(self, tenant: str, item_ids: Sequence[str]) -> None:
        """Count that a run was given these items. The items' own numbers follow with their next change."""
        there = await self._rows.read(tenant, ITEMS, list(dict.fromkeys(item_ids)))
        await self._rows.change_evidences(
            tenant,
            dict.fromkeys(there, lambda ledger: ledger.model_copy(update={"shown": ledger.shown + 1})),
        )

    async def edit(
        self,
        tenant: str,
        item_id: str,
        *,
        title: str | None = None,
        description: str | None = None,
        content: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> MemoryItem:
        """Change an item's words; its revision grows, its evidence stays, and it counts as a person's.

        Raises:
            NotFound: there is no such item.
            InvalidInput: a text is empty or too long, or nothing is given.
        """
        given = {"title": title, "description": description, "content": content}
        changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        if tags is not None:
            changes["tags"] = tuple(tags)
        if not changes:
            raise InvalidInput(
                "nothing to change was given", hint="give a title, description, content or tags"
            )

        def change(item: MemoryItem) -> MemoryItem:
            return _validated(
                {**item.model_dump(), **changes, "revision": item.revision + 1, "origin": "person"}
            )

        changed = await self._rows.change_item(tenant, item_id, change)
        if changed is None:
            raise _unknown(item_id)
        return changed

    async def remove(self, tenant: str, item_id: str) -> bool:
        """Delete an item with its evidence; whether there was one."""
        return await self._rows.delete(tenant, [item_id]) > 0

    async def consolidate(self, tenant: str) -> ConsolidationReport:
        """Merge equal lessons, settle contradictions, prune. See `consolidation`."""
        return await consolidate(self._rows, tenant, self._settings)

    # Reading

    async def recall(
        self,
        tenant: str,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        exclude: Collection[str] = (),
        tags: Collection[str] = (),
        explain: bool = False,
    ) -> Recall:
        """The items that are worth knowing for a task, and the block of text that carries them.

        Only active items that are believed enough and near enough to the task; perhaps none.

        Args:
            tenant: Whose.
            task: What is to be done.
            k: Items at most; by default `memory.items_recalled`.
            tokens_max: Size of the block; by default `memory.context_tokens_max`.
            exclude: Ids that are left out.
            tags: An item must have them all.
            explain: Adds `score_parts`: cosine, words, belief's weights.

        Raises:
            InvalidInput: `k` is out of range.
        """
        count = self._settings.items_recalled if k is None else k
        if not 1 <= count <= ranking.ITEMS_RECALLED_MAX:
            raise InvalidInput(f"k {count!r} is out of range", hint=f"1 to {ranking.ITEMS_RECALLED_MAX}")
        now_s = self._clock.time_s()
        text = task[:TASK_CHARS_SEARCHED]
        if not ranking.has_words(text):
            return Recall(id="", task=task, at_s=now_s)
        try:
            found = await self._candidates(tenant, text, count, exclude, tags)
        except NotFound:
            return Recall(id="", task=task, at_s=now_s)
        scored = self._scored(text, found, count, now_s)
        picked = self._picked(scored, count, found.result.semantic)
        recalled = [
            RecalledItem.trusted(
                item=as_item(one.hit.item), score=one.candidate.score, score_parts=_parts(one, explain)
            )
            for one in picked
        ]
        notes = [
            ranking.Note(item.item, one.candidate.confidence)
            for item, one in zip(recalled, picked, strict=True)
        ]
        packed = ranking.pack(notes, self._settings.context_tokens_max if tokens_max is None else tokens_max)
        carried = set(packed.ids)
        return Recall(
            id="",
            task=task,
            items=tuple(item for item in recalled if item.item.id in carried),
            context=packed.context,
            tokens=packed.tokens,
            embedder_id=found.result.embedder_id,
            semantic=found.result.semantic,
            at_s=now_s,
        )

    async def _candidates(
        self, tenant: str, text: str, k: int, exclude: Collection[str], tags: Collection[str]
    ) -> _Found:
        """What speaks of the task. Filters are applied here, not by the store, as long as enough is left:
        most items are active, and an unfiltered search is the cheapest."""
        codes = ranking.codes(text)
        wanted = max(CANDIDATES, 2 * k)
        state: dict[str, str] | None = None
        hits: dict[str, Hit] = {}
        while True:
            queries = [SearchQuery(text=text, k=wanted, mode="vector", filter=state)]
            if codes:
                queries.append(SearchQuery(text=codes, k=NAMED, mode="text", filter=state))
            near, *by_code = await self._store.search_many(tenant, ITEMS, queries)
            named = [hit for result in by_code for hit in result.hits]
            hits |= {hit.item.id: hit for hit in (*named, *near.hits)}
            may = {one for one, hit in hits.items() if _eligible(hit, exclude, tags)}
            if len(near.hits) < wanted or wanted >= CANDIDATES_MAX or len(may) >= wanted // 2:
                heard = [hit for hit in hits.values() if hit.item.metadata["state"] in _HEARD]
                # A code that many items have tells nothing.
                return _Found(near, heard, may, codes if len(named) < NAMED else "")
            wanted, state = min(CANDIDATES_MAX, wanted * 8), {"state": "active"}

    def _scored(self, task: str, found: _Found, k: int, now_s: float) -> list[_Scored]:
        """Believed and similar enough candidates, the best first."""
        half_life_days = self._settings.recency_half_life_days
        texts = [hit.item.text for hit in found.hits]
        likeness = ranking.similarities(
            [hit.score_parts.get("vector", 0.0) for hit in found.hits],
            ranking.coverages(task, texts),
            ranking.coverages(found.codes, texts) if found.codes else [0.0] * len(texts),
            found.result.semantic,
        )
        floor = ranking.similarity_min(found.result.semantic)
        near = [pair for pair in zip(found.hits, likeness, strict=True) if pair[1] >= floor]
        near.sort(key=lambda pair: (-pair[1], pair[0].item.id))
        able = [pair for pair in near if pair[0].item.id in found.may]
        if not able:
            return []
        # What is further off is not recalled, but heard: tasks of one kind may be told in words that differ.
        least, heard = ranking.RELATIVE_MIN * able[0][1], ranking.HEARD_MIN * able[0][1]
        able = [pair for pair in able if pair[1] >= heard][: max(CLAIMS, k)]
        rest = [pair for pair in near if pair[1] >= heard and pair[0].item.id not in found.may]
        claims = [_claim(*pair, now_s, half_life_days) for pair in (*able, *rest[:CLAIMS])]
        scored: list[_Scored] = []
        beliefs = ranking.pooled(claims, sketch(task).words, semantic=found.result.semantic)
        for (hit, similarity), claim, (mean, told) in zip(able, claims, beliefs, strict=False):
            if not told or similarity < least:
                continue
            stored = hit.item.metadata
            fresh_s = max(stored["created_at_s"], stored["used_at_s"] or 0.0)
            recency = fading(now_s - fresh_s, half_life_days)
            candidate = ranking.Candidate(hit.item.id, similarity, recency, mean)
            scored.append(_Scored(hit, candidate, claim.says))
        scored.sort(key=lambda one: (-one.candidate.score, one.candidate.id))
        return scored

    def _picked(self, scored: Sequence[_Scored], k: int, semantic: bool) -> list[_Scored]:
        finalists = scored[: max(FINALISTS, 2 * k)]
        words = [one.says.words for one in finalists]
        order = ranking.select(
            [one.candidate for one in finalists],
            lambda a, b: cosine(words[a], words[b]),
            k,
            self._settings.mmr_lambda,
            floor=ranking.similarity_min(semantic),
        )
        return [finalists[index] for index in order]

    async def get(self, tenant: str, ids: Sequence[str]) -> list[MemoryItem]:
        """The items that exist, in the order asked, with all sources that are kept."""
        items = await self._rows.items(tenant, ids)
        ledgers = await self._rows.ledgers(tenant, list(items))
        return [
            items[one].model_copy(update={"sources": ledgers[one].sources}) if one in ledgers else items[one]
            for one in ids
            if one in items
        ]

    async def list_items(
        self, tenant: str, *, state: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> tuple[list[MemoryItem], str | None]:
        """One page of items in id order and the cursor of the next; of their sources, the newest few."""
        where = None if state is None else {"state": state}
        page = await self._rows.page(tenant, ITEMS, where=where, cursor=cursor, limit=limit)
        return [as_item(row) for row in page.items], page.cursor

    async def explain(self, tenant: str, item_id: str) -> Explanation:
        """Why an item is believed as far as it is, and whether it is recalled.

        Raises:
            NotFound: there is no such item.
        """
        found = await self.get(tenant, [item_id])
        if not found:
            raise _unknown(item_id)
        ledger = (await self._rows.ledgers(tenant, [item_id])).get(item_id, Ledger())
        rivals = await self._rows.items(tenant, found[0].contradicts)
        return explanation(
            found[0], ledger, rivals, self._clock.time_s(), self._settings.recency_half_life_days
        )

    async def stats(self, tenant: str) -> BankStats:
        """Numbers of the tenant's bank, by reading all of it."""
        now_s = self._clock.time_s()
        cursor: str | None = None
        stats = BankStats()
        while True:
            items, cursor = await self.list_items(tenant, cursor=cursor, limit=1000)
            stats = tallied(stats, items, now_s, self._settings.recency_half_life_days)
            if cursor is None:
                return stats


class _Batch:
    """New items of one call, by what they teach."""

    def __init__(self) -> None:
        self.items: dict[str, MemoryItem] = {}
        self._sketches: dict[tuple[object, ...], list[tuple[str, Sketch]]] = {}

    def like(self, item: MemoryItem) -> str | None:
        """The id of one that teaches the same."""
        made = sketch(lesson_text(item))
        for other, known in self._sketches.get((item.lesson, made.marks, made.negations), []):
            if same_words(made, known):
                return other
        return None

    def put(self, item: MemoryItem) -> None:
        made = sketch(lesson_text(item))
        self._sketches.setdefault((item.lesson, made.marks, made.negations), []).append((item.id, made))
        self.items[item.id] = item


def _claim(hit: Hit, similarity: float, now_s: float, half_life_days: float) -> ranking.Claim:
    """What an item says, from its bare row: to validate every candidate costs more than to search."""
    stored = hit.item.metadata
    alpha, beta = PRIORS[stored["origin"]]
    # As it was when the last of it came.
    learned_s = max((source["at_s"] for source in stored["sources"]), default=0.0)
    last_s = max(stored["created_at_s"], stored["used_at_s"] or 0.0, learned_s)
    then = 1.0 / max(_FADED_MIN, fading(stored["updated_at_s"] - last_s, half_life_days))
    return ranking.Claim(
        lesson=stored["lesson"],
        says=row_sketch(hit.item),
        similarity=similarity,
        prior=alpha - beta,
        balance=(stored["successes"] - stored["failures"]) * then,
        outcomes=[(words_of(one["words"]), one["balance"] * then) for one in stored.get("outcomes", ())],
        share=fading(now_s - last_s, half_life_days),
    )


def _eligible(hit: Hit, exclude: Collection[str], tags: Collection[str]) -> bool:
    stored = hit.item.metadata
    return (
        stored["state"] == "active"
        and hit.item.id not in exclude
        and (not tags or set(tags) <= set(stored["tags"]))
    )


def _parts(one: _Scored, explain: bool) -> dict[str, float]:
    candidate = one.candidate
    parts = {
        "similarity": candidate.similarity,
        "recency": candidate.recency,
        "confidence": candidate.confidence,
    }
    if explain:
        stored = one.hit.item.metadata
        parts |= {
            "cosine": one.hit.score_parts.get("vector", 0.0),
            "successes": stored["successes"],
            "failures": stored["failures"],
        }
    return parts


def _same_matter(one: MemoryItem, other: MemoryItem) -> bool:
    """Whether both speak of the same thing, be it for and against."""
    return same_matter(sketch(lesson_text(one)), sketch(lesson_text(other)))


def _words(item: MemoryItem) -> tuple[str, str, str, str]:
    return item.lesson, item.title, item.description, item.content


def _validated(values: Mapping[str, object]) -> MemoryItem:
    try:
        return MemoryItem.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            f"the item's {'.'.join(map(str, first['loc']))} does not fit: {first['msg']}",
            hint="see the limits of items",
        ) from error


def _unknown(item_id: str) -> NotFound:
    return NotFound(f"there is no item {item_id!r}", hint="`agentic-flow memory items` lists them")
