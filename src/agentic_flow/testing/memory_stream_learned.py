"""The real memory as an arm of the simulated stream: AgentDB, bank, queue and learner, in virtual time.

Only what a model would do is scripted: the judge, who errs, and the distiller, who writes what `distil` says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.settings import AgentDBSettings, MemorySettings
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.distill import item_id
from agentic_flow.memory.learning import Learner
from agentic_flow.memory.records import MemoryItem, Source, Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.trajectories import Trajectories
from agentic_flow.testing.memory_stream import Note, Task, Tried, action_of, distil, topic_of

TENANT = "stream"
BEGAN_AT_S = 1_800_000_000.0
TASK_EVERY_S = 3600.0
JUDGE_CONFIDENCE = 0.8
"""What the judge says of its own verdicts, whatever its error rate: it does not know that."""


class VirtualClock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = BEGAN_AT_S

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


class LearnedMemory:
    """Recalls from the bank, records each task as a trajectory, and learns from it before the next one.

    Args:
        folder: Where AgentDB keeps everything.
        settings: The `memory` section.
        weigh: Whether the agent weighs a note by how far it is said to be believed.
    """

    def __init__(self, folder: Path, settings: MemorySettings | None = None, *, weigh: bool = True) -> None:
        self.clock = VirtualClock()
        chosen = settings or MemorySettings()
        self._store = AgentDB(folder, AgentDBSettings(), clock=self.clock)
        self.bank = Bank(self._store, chosen, clock=self.clock)
        self._trajectories = Trajectories(self._store, chosen, clock=self.clock)
        self._weigh = weigh
        self._verdicts: dict[str, bool] = {}
        self._shown: dict[str, tuple[str, ...]] = {}
        self._learner = Learner(
            self._trajectories,
            self.bank,
            self,
            self,
            chosen,
            clock=self.clock,
            shown=self._shown_by,
            rng=random.Random(7),
        )

    async def recall(self, task: Task, k: int) -> Sequence[Note]:
        """A note for each item of the recall, which may weigh as much as the prompt says it is believed."""
        self.clock.now_s += TASK_EVERY_S
        found = await self.bank.recall(TENANT, task.text, k=k)
        self._shown[_id(task)] = tuple(one.item.id for one in found.items)
        return [
            Note(
                one.item.id,
                one.item.lesson,
                action_of(one.item.content),
                topic_of(one.item.content),
                one.score_parts["confidence"] if self._weigh else 1.0,
            )
            for one in found.items
        ]

    async def learn(self, task: Task, notes: Sequence[Note], tried: Tried, verdict: bool) -> None:
        """Record the trajectory and let the learner work on it.

        Raises:
            RuntimeError: the learner did not learn from it.
        """
        name = _id(task)
        self._verdicts[name] = verdict
        await self._trajectories.record(
            TENANT,
            Trajectory(
                id=name,
                task=task.text,
                outcome="completed",
                steps=(TrajectoryStep(name="take", action=tried.action),),
                answer=tried.action,
                recall_id=name,
                cited=tried.cited,
            ),
        )
        if not await self._learner.learn_one(TENANT, name):
            raise RuntimeError(f"{name!r} was not learned from: {self._learner.stats.problem}")
        if (task.index + 1) % 100 == 0:
            await self.bank.consolidate(TENANT)

    async def size(self) -> int:
        """Items that a recall may return."""
        return (await self.bank.stats(TENANT)).active

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict:
        """What the noisy judge of the stream says."""
        outcome = "success" if self._verdicts[trajectory.id] else "failure"
        return Verdict(outcome=outcome, confidence=JUDGE_CONFIDENCE, source="judge", at_s=self.clock.time_s())

    async def judging_model(self, principal: Principal) -> str | None:
        return "scripted"

    async def distill(
        self, principal: Principal, trajectory: Trajectory, verdict: Verdict, deadline: Deadline
    ) -> list[MemoryItem]:
        """One item, in the words of `distil`."""
        lesson = distil(trajectory.task, trajectory.answer, verdict.outcome == "success")
        now_s = self.clock.time_s()
        source = Source(
            trajectory_id=trajectory.id, outcome=verdict.outcome, task=trajectory.task[:300], at_s=now_s
        )
        return [
            MemoryItem(
                id=item_id(trajectory.id, verdict.outcome, 1),
                title=lesson.title,
                description=lesson.description,
                content=lesson.content,
                lesson=lesson.lesson,
                sources=(source,),
                sources_total=1,
                created_at_s=now_s,
                updated_at_s=now_s,
            )
        ]

    async def _shown_by(self, tenant: str, recall_id: str) -> Sequence[str]:
        return self._shown.get(recall_id, ())


def _id(task: Task) -> str:
    return f"task-{task.index:05d}"
