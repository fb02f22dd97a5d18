"""The memory service: retrieve, act, judge, distil, consolidate, over a vector store and models.

Source: "ReasoningBank: Scaling Agent Self-Evolving with Reasoning Memory", arXiv 2509.25140.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections.abc import Sequence

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.redaction import redact
from agentic_flow.core.settings import MemorySettings
from agentic_flow.memory.answers import (
    Edit,
    Finish,
    ItemPage,
    ItemState,
    Kept,
    LearnReport,
    MemoryStatus,
    Note,
    TrajectoryOutcome,
    TrajectoryPage,
    TrajectoryState,
)
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.beliefs import Explanation
from agentic_flow.memory.certificates import Certificates, Verification
from agentic_flow.memory.confidence import fading, posterior
from agentic_flow.memory.consolidation import ConsolidationReport
from agentic_flow.memory.importing import ImportReport, LeftOut, MemoryFile
from agentic_flow.memory.know_how import READ, WRITE, KnowHow, check_task
from agentic_flow.memory.ranking import Note as PackedNote
from agentic_flow.memory.ranking import pack, score
from agentic_flow.memory.records import (
    CONTENT_CHARS_MAX,
    DESCRIPTION_CHARS_MAX,
    EPISODES,
    RECALLS,
    TITLE_CHARS_MAX,
    TRAJECTORIES,
    MemoryItem,
    Recall,
    RecalledItem,
    Trajectory,
    TrajectoryStep,
    Verdict,
)
from agentic_flow.memory.series import MemorySeries, memory_series
from agentic_flow.memory.skills import SKILL_ID, FoundSkill, Skills, as_item, explained
from agentic_flow.memory.trajectories import Trajectories
from agentic_flow.memory.uplift import Exposure, Uplift, UpliftReport, assign

_DAY_S = 86_400.0
_PAGE = 500
_PROBLEMS_MAX = 10
# Those that are few; the rest is learned.
_COUNTED: tuple[TrajectoryState, ...] = ("open", "pending", "shelved")


class RecallRetention:
    """Keeps the certificates of recalls as long as trajectories, and those of what is left of these longer.

    Args:
        store: Knows the tenants.
        certificates: Prunes them.
        trajectories: Tell which recalls are still needed.
        settings: `retention_days`.
        clock: Time.
    """

    def __init__(
        self,
        store: VectorStore,
        certificates: Certificates,
        trajectories: Trajectories,
        settings: MemorySettings,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._store = store
        self._certificates = certificates
        self._trajectories = trajectories
        self._settings = settings
        self._clock = clock

    async def tenants(self) -> list[str]:
        """Tenants that have certificates, as far as this process may know them."""
        return await self._store.tenants_with(RECALLS)

    async def expire(self, tenant: str) -> int:
        """Prune a tenant's chain; how many certificates went."""
        cut_s = self._clock.time_s() - self._settings.retention_days * _DAY_S
        # A run starts soon after its recall: those that started much later need none from before the cut.
        keep = await self._trajectories.recalls(tenant, started_before_s=cut_s + _DAY_S)
        return await self._certificates.prune(tenant, cut_s, keep=keep)


class ShownItems:
    """What certificates speak of, as it is now: items of the bank, and skills."""

    def __init__(self, bank: Bank, skills: Skills) -> None:
        self._bank = bank
        self._skills = skills

    async def get(self, tenant: str, ids: Sequence[str]) -> list[MemoryItem]:
        """Those that exist."""
        found = await self._bank.get(tenant, ids)
        known = {one.id for one in found}
        named = [one for one in ids if one.startswith(SKILL_ID) and one not in known]
        return [*found, *map(as_item, await self._skills.get_many(tenant, named) if named else ())]


class Memory(KnowHow):
    """What agents learn, by tenant. See MemoryService for each method.

    Args:
        store: Keeps everything, in the tenants' namespaces that begin with `memory.`.
        settings: The `memory` section.
        clock: Time.
        rng: Draws what is kept back from a recall.
    """

    def __init__(
        self,
        store: VectorStore,
        settings: MemorySettings,
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> None:
        bank = Bank(store, settings, clock=clock)
        super().__init__(store, settings, Trajectories(store, settings, clock=clock), bank, clock=clock)
        self._store = store
        self._rng = rng or random.SystemRandom()
        self.certificates = Certificates(store, ShownItems(self.bank, self.skills), clock=clock)
        self.outcomes = Uplift(store, clock=clock)
        self.recalls = RecallRetention(store, self.certificates, self.records, settings, clock=clock)

    async def shown(self, tenant: str, recall_id: str) -> Sequence[str]:
        """Ids of the items that a recall showed."""
        certificate = await self.certificates.get(tenant, recall_id)
        return () if certificate is None else certificate.shown

    async def note_outcome(self, principal: Principal, trajectory: Trajectory, verdict: Verdict) -> None:
        """Let a judged run count in the comparison of runs with and without the items of its recall."""
        if trajectory.recall_id is None:
            return
        certificate = await self.certificates.get(principal.tenant, trajectory.recall_id)
        if certificate is not None:
            exposure = Exposure.of(certificate, cited=trajectory.cited, stratum=trajectory.agent)
            await self.outcomes.record(principal.tenant, exposure, verdict)

    async def rate_skills(self, principal: Principal, trajectory: Trajectory, verdict: Verdict) -> None:
        """Let a judged run count for or against the skills that its recall showed, if it used them."""
        if trajectory.recall_id is None:
            return
        certificate = await self.certificates.get(principal.tenant, trajectory.recall_id)
        for one in certificate.items if certificate is not None else ():
            if one.id.startswith(SKILL_ID):
                await self.skills.rate(principal.tenant, one.id, trajectory, verdict, version=one.revision)

    # ---- before a run ------------------------------------------------------------------------------------

    async def recall(
        self,
        principal: Principal,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        tags: Sequence[str] = (),
        recall_id: str | None = None,
        explain: bool = False,
        preview: bool = False,
    ) -> Recall:
        """See MemoryService. What is kept back by chance is not replaced by something else."""
        principal.demand(READ)
        check_task(task)
        tenant = principal.tenant
        found = await self.bank.recall(tenant, task, k=k, tokens_max=tokens_max, tags=tags, explain=explain)
        if self.settings.skills_recalled and not tags:
            found = await self._with_skills(tenant, found, tokens_max)
        if preview:
            return found.model_copy(update={"id": "preview"})
        share = self.settings.withheld_share
        withheld = assign(self._rng, [one.item.id for one in found.items], share)
        if withheld:
            kept = [one for one in found.items if one.item.id not in withheld]
            found = self._packed(found, kept, tokens_max).model_copy(update={"withheld": tuple(withheld)})
        recall = found.model_copy(update={"id": recall_id or f"recall-{secrets.token_hex(10)}"})
        if not recall.items and not recall.withheld:
            # Nothing was found, so there is nothing to attest; an empty bank writes nothing.
            return recall
        try:
            await self.certificates.issue(tenant, recall, withheld_share=share)
        except Conflict:
            # The step that asked died before it was recorded, and the bank has changed since.
            recall = recall.model_copy(update={"id": f"{recall.id}.{secrets.token_hex(4)}"})
            await self.certificates.issue(tenant, recall, withheld_share=share)
        await self.bank.note_shown(tenant, [one.item.id for one in recall.items])
        return recall

    async def _with_skills(self, tenant: str, found: Recall, tokens_max: int | None) -> Recall:
        """The recall with the best skills: ahead of the items if the task has their form, else behind. The
        block keeps its size, so that they may take the place of an item, or find none."""
        skills = await self.skills.find(tenant, found.task, k=self.settings.skills_recalled)
        if not skills:
            return found
        ahead = [self._recalled(one) for one in skills if one.parameters is not None]
        behind = [self._recalled(one) for one in skills if one.parameters is None]
        return self._packed(found, [*ahead, *found.items, *behind], tokens_max)

    def _recalled(self, found: FoundSkill) -> RecalledItem:
        item = as_item(found.skill)
        now_s, half_life_days = self._clock.time_s(), self.settings.recency_half_life_days
        parts = {
            "similarity": found.likeness,
            "recency": fading(now_s - item.updated_at_s, half_life_days),
            "confidence": posterior(item, now_s, half_life_days).mean,
        }
        return RecalledItem(item=item, score=score(**parts), score_parts=parts)

    def _packed(self, found: Recall, items: Sequence[RecalledItem], tokens_max: int | None) -> Recall:
        """The recall with these items, as far as they fit."""
        packed = pack(
            [PackedNote(one.item, one.score_parts["confidence"]) for one in items],
            self.settings.context_tokens_max if tokens_max is None else tokens_max,
        )
        carried = set(packed.ids)
        return found.model_copy(
            update={
                "items": tuple(one for one in items if one.item.id in carried),
                "context": packed.context,
                "tokens": packed.tokens,
            }
        )

    # ---- runs --------------------------------------------------------------------------------------------

    async def start(self, principal: Principal, trajectory: Trajectory) -> Trajectory:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.records.start(principal.tenant, trajectory)

    async def append(
        self,
        principal: Principal,
        trajectory_id: str,
        steps: Sequence[TrajectoryStep],
        *,
        key: str | None = None,
    ) -> None:
        """See MemoryService."""
        principal.demand(WRITE)
        await self.records.append(principal.tenant, trajectory_id, steps, key=key)

    async def finish(self, principal: Principal, trajectory_id: str, end: Finish) -> Trajectory:
        """See MemoryService."""
        principal.demand(WRITE)
        ended = await self.records.finish(
            principal.tenant,
            trajectory_id,
            outcome=end.outcome,
            answer=end.answer,
            error=end.error,
            usage=end.usage,
            cited=end.cited,
            verdict=end.verdict,
        )
        self._wake(principal.tenant)
        return ended

    async def record(self, principal: Principal, trajectory: Trajectory) -> None:
        """See MemoryService."""
        principal.demand(WRITE)
        # How far it was learned from is ours to say.
        fresh = trajectory.model_copy(update={"item_ids": (), "attempts": 0, "problem": None})
        await self.records.record(principal.tenant, fresh)
        self._wake(principal.tenant)

    async def trajectory(self, principal: Principal, trajectory_id: str) -> Trajectory:
        """See MemoryService."""
        principal.demand(READ)
        found = await self.records.get(principal.tenant, trajectory_id)
        if found is None:
            raise NotFound(
                f"there is no trajectory {trajectory_id!r}",
                hint="list them with `agentic-flow memory trajectories`",
            )
        return found

    async def trajectories(
        self,
        principal: Principal,
        *,
        state: TrajectoryState | None = None,
        outcome: TrajectoryOutcome | None = None,
        agent: str | None = None,
        since_s: float | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> TrajectoryPage:
        """See MemoryService."""
        principal.demand(READ)
        found, following = await self.records.list_trajectories(
            principal.tenant,
            state=state,
            outcome=outcome,
            agent=agent,
            since_s=since_s,
            cursor=cursor,
            limit=limit,
        )
        return TrajectoryPage(trajectories=tuple(found), cursor=following)

    async def similar(self, principal: Principal, task: str, *, k: int = 5) -> list[Trajectory]:
        """See MemoryService."""
        principal.demand(READ)
        check_task(task)
        return await self.records.similar(principal.tenant, task, k=k)

    async def add_verdict(self, principal: Principal, trajectory_id: str, verdict: Verdict) -> Trajectory:
        """See MemoryService."""
        principal.demand(WRITE)
        judged = await self.records.add_verdict(principal.tenant, trajectory_id, verdict)
        self._wake(principal.tenant)
        return judged

    def _wake(self, tenant: str) -> None:
        if self.learner is not None:
            self.learner.wake(tenant)

    async def learn(self, principal: Principal, *, timeout_s: float = 60.0) -> LearnReport:
        """See MemoryService."""
        principal.demand(WRITE)
        learner = self._learning()
        tenant = principal.tenant
        before, _ = await self.records.list_trajectories(tenant, state="pending", limit=_PAGE)
        settled = True
        try:
            async with asyncio.timeout(timeout_s):
                await learner.settle(tenant)
        except TimeoutError:
            settled = False
        report = LearnReport(settled=settled, waiting=await self.records.waiting(tenant))
        for one in before:
            after = await self.records.get(tenant, one.id)
            if after is not None and after.state == "learned":
                report = report.model_copy(
                    update={"learned": report.learned + 1, "items": report.items + len(after.item_ids)}
                )
            elif after is not None and after.problem is not None:
                report = report.model_copy(update={"failed": report.failed + 1})
        return report

    async def retry(self, principal: Principal) -> list[str]:
        """See MemoryService."""
        principal.demand(WRITE)
        again = await self.records.retry_shelved(principal.tenant)
        self._wake(principal.tenant)
        return again

    # ---- items -------------------------------------------------------------------------------------------

    async def add(self, principal: Principal, note: Note) -> Kept:
        """See MemoryService."""
        principal.demand(WRITE)
        now_s = self._clock.time_s()
        by_model = note.written_by == "model"
        said = redact if by_model else str
        # An id of the key's: what is sent twice is one item.
        name = (
            secrets.token_hex(6) if note.key is None else hashlib.sha256(note.key.encode()).hexdigest()[:24]
        )
        item = MemoryItem(
            id=f"note-{name}",
            title=said(note.title)[:TITLE_CHARS_MAX],
            description=said(note.description)[:DESCRIPTION_CHARS_MAX],
            content=said(note.content)[:CONTENT_CHARS_MAX],
            lesson=note.lesson,
            origin=note.written_by,
            tags=note.tags,
            created_at_s=now_s,
            updated_at_s=now_s,
        )
        (done,) = await self.bank.add(principal.tenant, [item], idempotency_key=item.id)
        return Kept(id=done.id, merged_into=done.merged_into)

    async def items(
        self,
        principal: Principal,
        *,
        state: ItemState | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> ItemPage:
        """See MemoryService."""
        principal.demand(READ)
        found, following = await self.bank.list_items(
            principal.tenant, state=state, cursor=cursor, limit=limit
        )
        return ItemPage(items=tuple(found), cursor=following)

    async def explain(self, principal: Principal, item_id: str) -> Explanation:
        """See MemoryService."""
        principal.demand(READ)
        if item_id.startswith(SKILL_ID):
            for skill in await self.skills.get_many(principal.tenant, [item_id]):
                return explained(skill, self._clock.time_s(), self.settings.recency_half_life_days)
        return await self.bank.explain(principal.tenant, item_id)

    async def edit(self, principal: Principal, item_id: str, edit: Edit) -> MemoryItem:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.bank.edit(
            principal.tenant,
            item_id,
            title=edit.title,
            description=edit.description,
            content=edit.content,
            tags=edit.tags,
        )

    async def forget(self, principal: Principal, item_id: str) -> bool:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.bank.remove(principal.tenant, item_id)

    async def consolidate(self, principal: Principal) -> ConsolidationReport:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.bank.consolidate(principal.tenant)

    # ---- evidence ----------------------------------------------------------------------------------------

    async def uplift(self, principal: Principal, *, item_id: str | None = None) -> UpliftReport:
        """See MemoryService."""
        principal.demand(READ)
        wanted = None if item_id is None else [item_id]
        return await self.outcomes.report(principal.tenant, item_ids=wanted)

    async def verify(self, principal: Principal, recall_id: str | None = None) -> Verification:
        """See MemoryService."""
        principal.demand(READ)
        return await self.certificates.verify(principal.tenant, recall_id)

    async def series(self, principal: Principal) -> MemorySeries:
        """See MemoryService."""
        principal.demand(READ)
        tenant = principal.tenant
        ended: list[Trajectory] = []
        cursor: str | None = None
        while True:
            part, cursor = await self.records.list_trajectories(tenant, cursor=cursor, limit=_PAGE)
            # Only what the curves need: steps and answers are the most of it.
            ended += [one.model_copy(update={"steps": (), "answer": ""}) for one in part]
            if cursor is None:
                break
        items: list[MemoryItem] = []
        while True:
            some, cursor = await self.bank.list_items(tenant, cursor=cursor, limit=_PAGE)
            items += some
            if cursor is None:
                break
        shown: dict[str, bool] = {}
        for one in ended:
            if one.recall_id is not None:
                certificate = await self.certificates.get(tenant, one.recall_id)
                shown[one.recall_id] = certificate is not None and bool(certificate.shown)
        now_s, half_life_days = self._clock.time_s(), self.settings.recency_half_life_days
        return memory_series(
            ended,
            items,
            shown=shown,
            belief=lambda item: posterior(item, now_s, half_life_days).mean,
            now_s=now_s,
        )

    async def take_in(self, principal: Principal, found: MemoryFile, *, learn: bool = False) -> ImportReport:
        """See MemoryService. A file that is taken in again adds nothing."""
        principal.demand(WRITE)
        tenant = principal.tenant
        ids = [item.id for item in found.items]
        here = {
            item.id
            for start in range(0, len(ids), _PAGE)
            for item in await self.bank.get(tenant, ids[start : start + _PAGE])
        }
        fresh = [item for item in found.items if item.id not in here]
        merged = 0
        for start in range(0, len(fresh), _PAGE):
            part = fresh[start : start + _PAGE]
            done = await self.bank.add(tenant, part, idempotency_key=f"import-{part[0].id}-{len(part)}")
            merged += sum(one.merged_into is not None for one in done)
        left_out = list(found.left_out)
        added = present = old = 0
        cut_s = self._clock.time_s() - self.settings.retention_days * _DAY_S
        for trajectory in found.trajectories:
            if not learn and (trajectory.ended_at_s or trajectory.started_at_s) < cut_s:
                old += 1
            elif learn and await self.records.get(tenant, trajectory.id) is None:
                await self.records.record(tenant, trajectory)
                added += 1
            elif not learn and await self.records.keep(tenant, trajectory):
                added += 1
            else:
                present += 1
        if old:
            days = f"{self.settings.retention_days:g}"
            left_out.append(
                LeftOut(where="trajectories", count=old, why=f"older than memory.retention_days ({days})")
            )
        if learn and added:
            self._wake(tenant)
        return ImportReport(
            format=found.format,
            items_added=len(fresh) - merged,
            items_merged=merged,
            items_present=len(found.items) - len(fresh),
            trajectories_added=added,
            trajectories_present=present,
            left_out=tuple(left_out),
        )

    async def status(self, principal: Principal) -> MemoryStatus:
        """See MemoryService."""
        principal.demand(READ)
        tenant = principal.tenant
        rows = {one.name: one.items for one in await self._store.stats(tenant)}
        counts: dict[str, int] = {}
        problems: list[str] = []
        for state in _COUNTED:
            counts[state] = 0
            cursor: str | None = None
            while True:
                page, cursor = await self.records.list_trajectories(
                    tenant, state=state, cursor=cursor, limit=_PAGE
                )
                counts[state] += len(page)
                problems += [f"{one.id}: {one.problem}" for one in page if state == "shelved"]
                if cursor is None:
                    break
        counts["learned"] = max(0, rows.get(TRAJECTORIES, 0) - sum(counts.values()))
        return MemoryStatus(
            enabled=self.settings.enabled,
            learns=self.learner is not None,
            judge=None if self.learner is None else await self.learner.judging_model(principal),
            bank=await self.bank.stats(tenant),
            trajectories=counts,
            recalls=(await self.certificates.head(tenant)).sequence,
            skills=await self.skills.count(tenant),
            episodes=rows.get(EPISODES, 0),
            problems=tuple(problems[:_PROBLEMS_MAX]),
        )
