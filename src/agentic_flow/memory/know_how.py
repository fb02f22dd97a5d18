"""What memory keeps beside items: skills, episodes of failed tries, and the contrast of several tries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Clock, Deadline
from agentic_flow.core.errors import OF_REQUEST, InvalidInput, NotFound, Unavailable
from agentic_flow.core.ports import Completer, VectorStore
from agentic_flow.core.settings import MemorySettings
from agentic_flow.memory.answers import Assessment, Contrasted, EarlierTries, EpisodePage, Kept, SkillPage
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.episodes import (
    CHARS_PER_TOKEN,
    CRITIQUE_CHARS_MAX,
    Episode,
    Episodes,
    mechanical_reflection,
    pack_episodes,
)
from agentic_flow.memory.matts import Judging, Matts, Try
from agentic_flow.memory.procedures import FilledStep
from agentic_flow.memory.prompting import plain
from agentic_flow.memory.records import TASK_CHARS_MAX, VERDICT_RANK, Trajectory, Verdict
from agentic_flow.memory.skills import FoundSkill, Skill, Skills
from agentic_flow.memory.trajectories import Trajectories

READ, WRITE = "memory:read", "memory:write"

_ANSWER_CHARS_MAX = 600
_TASK_CHARS_MAX = 2_000


class Learner(Protocol):
    """What learns in the background."""

    def wake(self, tenant: str) -> None:
        """Something of this tenant may be due."""
        ...

    async def settle(self, tenant: str | None = None) -> None:
        """Learn from what is due, and return when nothing is."""
        ...

    async def learn_one(self, tenant: str, trajectory_id: str) -> bool:
        """Learn from one trajectory if it is due; whether that was done, by this call."""
        ...

    async def judging_model(self, principal: Principal) -> str | None:
        """The model that judges and distils, or None when that goes mechanically."""
        ...


class KnowHow:
    """Skills, episodes and contrasts of a memory. See MemoryService for each method."""

    learner: Learner | None
    """Learns in this process; None: it does not, though another one over the same store may."""

    def __init__(
        self,
        store: VectorStore,
        settings: MemorySettings,
        records: Trajectories,
        bank: Bank,
        *,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.learner = None
        self.records = records
        self.bank = bank
        self.skills = Skills(store, clock=clock)
        self.reflections = Episodes(
            store, None, model=None, retention_days=settings.retention_days, clock=clock
        )
        self._clock = clock
        self._matts: Matts | None = None

    def ask_models(self, completer: Completer, judge: Judging, reflections: Episodes) -> None:
        """Let models judge, reflect and compare, where any that write are served."""
        self.reflections = reflections
        self._matts = Matts(completer, _Judged(judge), model=self.settings.judge_model, clock=self._clock)

    # ---- skills ------------------------------------------------------------------------------------------

    async def list_skills(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> SkillPage:
        """See MemoryService."""
        principal.demand(READ)
        found, after = await self.skills.list_skills(principal.tenant, cursor=cursor, limit=limit)
        return SkillPage(skills=tuple(found), cursor=after)

    async def find_skills(self, principal: Principal, task: str, *, k: int = 3) -> list[FoundSkill]:
        """See MemoryService."""
        principal.demand(READ)
        check_task(task)
        return await self.skills.find(principal.tenant, task, k=k)

    async def show_skill(self, principal: Principal, skill_id: str) -> Skill:
        """See MemoryService."""
        principal.demand(READ)
        return await self.skills.get(principal.tenant, skill_id)

    async def use_skill(
        self,
        principal: Principal,
        skill_id: str,
        parameters: Mapping[str, object],
        *,
        version: int | None = None,
    ) -> list[FilledStep]:
        """See MemoryService."""
        principal.demand(READ)
        return await self.skills.use(principal.tenant, skill_id, parameters, version=version)

    async def record_skill_use(
        self,
        principal: Principal,
        skill_id: str,
        trajectory_id: str,
        verdict: Verdict,
        *,
        version: int | None = None,
    ) -> Skill:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.skills.record_use(
            principal.tenant, skill_id, trajectory_id, verdict, version=version
        )

    async def forget_skill(self, principal: Principal, skill_id: str) -> bool:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.skills.remove(principal.tenant, skill_id)

    # ---- episodes ----------------------------------------------------------------------------------------

    async def list_episodes(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> EpisodePage:
        """See MemoryService."""
        principal.demand(READ)
        found, after = await self.reflections.list_episodes(principal.tenant, cursor=cursor, limit=limit)
        return EpisodePage(episodes=tuple(found), cursor=after)

    async def show_episode(self, principal: Principal, episode_id: str) -> Episode:
        """See MemoryService."""
        principal.demand(READ)
        found = (await self.reflections.get(principal.tenant, [episode_id])).get(episode_id)
        if found is None:
            raise NotFound(
                f"there is no episode {episode_id!r}", hint="list them with `agentic-flow memory episodes`"
            )
        return found

    async def forget_episode(self, principal: Principal, episode_id: str) -> bool:
        """See MemoryService."""
        principal.demand(WRITE)
        return await self.reflections.remove(principal.tenant, episode_id)

    async def tries(
        self,
        principal: Principal,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        of: Sequence[str] = (),
    ) -> EarlierTries:
        """See MemoryService."""
        principal.demand(READ)
        check_task(task)
        tenant = principal.tenant
        most = self.settings.tries_recalled if k is None else k
        own = [told for one in dict.fromkeys(of) if (told := await self._told(tenant, one)) is not None]
        like: list[Episode] = []
        if most:
            found = await self.reflections.recall(tenant, task, k=most + len(own))
            like = [one for one in found if one.id not in of][:most]
        context, shown = pack_episodes(
            [*own, *like], self.settings.tries_tokens_max if tokens_max is None else tokens_max
        )
        tokens = -(-len(context) // CHARS_PER_TOKEN)
        return EarlierTries(tries=shown, context=context, tokens=tokens)

    async def _told(self, tenant: str, trajectory_id: str) -> Episode | None:
        """How one try went: what was made of it, or else what its record says."""
        trajectory = await self.records.get(tenant, trajectory_id)
        if trajectory is None:
            return None
        known = (await self.reflections.get(tenant, [trajectory_id])).get(trajectory_id)
        verdict = trajectory.verdict
        outcome = verdict.outcome if verdict else "unknown"
        said = mechanical_reflection(trajectory)
        told = known or Episode(
            id=trajectory.id,
            task=plain(trajectory.task, _TASK_CHARS_MAX) or "(no words)",
            critique=said.critique,
            next_try=said.next_try,
            outcome=outcome,
            origin="mechanical",
            at_s=trajectory.ended_at_s or trajectory.started_at_s,
        )
        answer = plain(" ".join(trajectory.answer.split()), _ANSWER_CHARS_MAX)
        lines = [f"It was judged: {outcome}.", *([f"It answered: {answer}"] if answer else []), told.critique]
        return told.model_copy(update={"critique": "\n".join(lines)[:CRITIQUE_CHARS_MAX]})

    # ---- several tries -----------------------------------------------------------------------------------

    async def assess(
        self, principal: Principal, trajectory_id: str, *, timeout_s: float = 60.0
    ) -> Assessment:
        """See MemoryService."""
        principal.demand(WRITE)
        learner = self._learning()
        tenant = principal.tenant
        try:
            async with asyncio.timeout(timeout_s):
                if not await learner.learn_one(tenant, trajectory_id):
                    await learner.settle(tenant)  # this process may be at it already
        except TimeoutError:
            problem = f"it was not judged within {timeout_s:g} s"
        else:
            problem = "nothing could judge it"
        found = await self.records.get(tenant, trajectory_id)
        if found is None:
            raise NotFound(
                f"there is no trajectory {trajectory_id!r}",
                hint="list them with `agentic-flow memory trajectories`",
            )
        if found.verdict is None:
            raise Unavailable(
                f"trajectory {trajectory_id!r}: {found.problem or problem}",
                hint="try again, or give a verdict with `agentic-flow memory verdict`",
                details=OF_REQUEST,
            )
        kept = await self.reflections.get(tenant, [trajectory_id])
        return Assessment(trajectory_id=trajectory_id, verdict=found.verdict, episode=kept.get(trajectory_id))

    async def contrast(
        self, principal: Principal, tries: Sequence[Trajectory], *, timeout_s: float = 120.0
    ) -> Contrasted:
        """See MemoryService."""
        principal.demand(WRITE)
        self._learning()
        if self._matts is None:
            raise Unavailable("this process asks no models", hint="ask the platform")
        if len({one.task for one in tries}) != 1:
            raise InvalidInput(
                f"{len(tries)!r} tries are not of one task", hint="give two or more tries of the same task"
            )
        if len({one.id for one in tries}) != len(tries):
            raise InvalidInput("one try is given twice", hint="give each try once")

        async def given(one: Try) -> Trajectory:
            return tries[one.number]

        found = await self._matts.parallel(
            principal, tries[0].task, given, len(tries), deadline=Deadline.after(timeout_s, self._clock)
        )
        kept: list[Kept] = []
        if found.items:
            key = found.items[0].id
            done = await self.bank.add(principal.tenant, found.items, idempotency_key=key)
            kept = [Kept(id=one.id, merged_into=one.merged_into) for one in done]
        return Contrasted(
            tries=tuple(
                Assessment(trajectory_id=one.trajectory.id, verdict=one.verdict) for one in found.tries
            ),
            best=found.best.trajectory.id,
            items=found.items,
            kept=tuple(kept),
            problems=found.problems,
        )

    def _learning(self) -> Learner:
        if self.learner is None:
            raise Unavailable(
                "this process does not learn", hint="ask the platform, or run the command where runs run"
            )
        return self.learner


class _Judged:
    """Judges tries that nobody has judged yet: a verdict that was paid for is not asked for again."""

    def __init__(self, judge: Judging) -> None:
        self._judge = judge

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict:
        known = trajectory.verdict
        if known is not None and VERDICT_RANK[known.source] >= VERDICT_RANK["judge"]:
            return known
        return await self._judge.judge(principal, trajectory, deadline)


def check_task(task: str) -> None:
    """Refuse a task without words, or with too many.

    Raises:
        InvalidInput: it is so.
    """
    if not task.strip():
        raise InvalidInput("the task is empty", hint="say in a sentence what is to be done")
    if len(task) > TASK_CHARS_MAX:
        raise InvalidInput(
            f"the task has {len(task)!r} characters, more than {TASK_CHARS_MAX!r}", hint="shorten it"
        )
