"""What a run takes from memory, and what it leaves there: the recall before it, its trajectory after it.

Memory never costs a run its answer: what goes wrong with it becomes a note of the run.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import Completion, Frozen, JsonObject, ToolCallPart
from agentic_flow.core.ports import RunEngine, StepRecord
from agentic_flow.memory.answers import EarlierTries, MemoryService
from agentic_flow.memory.records import (
    OBSERVATION_CHARS_MAX,
    Recall,
    Trajectory,
    TrajectoryStep,
    Verdict,
)
from agentic_flow.swarm.runs import RunMemory, RunNote, RunResult, RunSpec, RunStep, RunTry

# Steps of the run itself that are about memory: learning from them would be learning from itself.
_OWN = frozenset({"assign", "recall", "trajectory"})
_TOOL = "tool:"


class Shown(Frozen):
    """What memory had for a run, as the run recorded it. `given`: the agents were shown it.

    `asked`: memory was asked at all. `withheld`: something was kept back by chance, so the run is part of a
    comparison even if it was shown nothing. `problem`: memory could not be asked, and why.
    """

    asked: bool = True
    recall_id: str | None = None
    notes: tuple[RunNote, ...] = ()
    tries: tuple[RunTry, ...] = ()
    context: str = ""
    tokens: int = 0
    given: bool = False
    withheld: bool = False
    problem: str | None = None

    @classmethod
    def of(cls, recall: Recall, earlier: EarlierTries, *, given: bool) -> Shown:
        """What a recall brought, and what was made of earlier tries."""
        blocks = [block for block in (recall.context, earlier.context) if block] if given else []
        return cls(
            recall_id=recall.id if given and (recall.items or recall.withheld) else None,
            notes=tuple(RunNote(id=r.item.id, title=r.item.title, score=r.score) for r in recall.items),
            tries=tuple(RunTry(id=one.id, task=one.task) for one in earlier.tries),
            context="\n\n".join(blocks),
            tokens=recall.tokens + earlier.tokens if given else 0,
            given=bool(blocks),
            withheld=bool(recall.withheld),
        )

    @property
    def block(self) -> str:
        """The notes and tries for a prompt, or ''."""
        return self.context if self.given else ""

    @property
    def given_ids(self) -> tuple[str, ...]:
        """Ids that an agent can have used."""
        return tuple(one.id for one in (*self.notes, *self.tries)) if self.given else ()

    def notes_of(self, cited: Iterable[str]) -> tuple[str, ...]:
        """Those of the ids that are notes: only they are believed more or less by how runs end."""
        known = {note.id for note in self.notes}
        return tuple(one for one in cited if one in known)

    def as_result(self, cited: tuple[str, ...]) -> RunMemory:
        """What the run's result says of it."""
        return RunMemory(
            asked=self.asked,
            recall_id=self.recall_id,
            notes=self.notes,
            tries=self.tries,
            given=self.given,
            cited=cited,
            tokens=self.tokens,
        )


class RunExperience:
    """Memory as runs use it.

    Args:
        memory: The service.
        engine: Has the recorded steps of runs.
        enabled: Whether runs use memory at all.
        clock: Dates verdicts.
    """

    def __init__(
        self, memory: MemoryService, engine: RunEngine, *, enabled: bool, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._memory = memory
        self._engine = engine
        self._enabled = enabled
        self._clock = clock

    async def recall(self, principal: Principal, run_id: str, spec: RunSpec, *, given: bool) -> Shown:
        """What memory has for a goal.

        Args:
            given: Whether the agents will be shown it; if not, this only looks.

        Raises:
            AgenticFlowError: memory cannot be asked; Unavailable with a `peer` when it is away.
        """
        if not self._enabled or not spec.memory:
            return Shown(asked=False)
        own = _for_memory(principal)
        recall = await self._memory.recall(own, spec.goal, recall_id=run_id, preview=not given)
        earlier = await self._memory.tries(own, spec.goal, of=spec.refines) if given else EarlierTries()
        return Shown.of(recall, earlier, given=given)

    async def record(
        self,
        principal: Principal,
        run_id: str,
        spec: RunSpec,
        *,
        model: str,
        started_at_s: float,
        shown: Shown,
        cited: tuple[str, ...],
        result: RunResult | None,
        failure: AgenticFlowError | None,
        cancelled: bool = False,
    ) -> JsonObject:
        """Keep an ended run as a trajectory; how many steps it has.

        Args:
            result: What it came to; of a failed run, as far as it came.
            failure: Why it failed.
            cancelled: It was cancelled, and has no result.

        Raises:
            AgenticFlowError: memory did not keep it; Unavailable with a `peer` when it is away.
        """
        if not self._enabled:
            return {"steps": 0}
        steps = trajectory_steps(run_id, await self._engine.steps(run_id))
        completed = result if failure is None else None
        trajectory = Trajectory(
            # A cancelled run can be resumed; what it comes to then is an experience of its own.
            id=f"{run_id}-cancelled" if cancelled else run_id,
            run_id=run_id,
            task=spec.goal,
            agent="team",
            model=model,
            topology=spec.topology,
            outcome="cancelled" if cancelled else "completed" if completed else "failed",
            steps=tuple(steps),
            steps_total=len(steps),
            answer=completed.answer if completed else "",
            error=failure.message if failure else None,
            usage=result.usage.model_dump(mode="json") if result else {},
            recall_id=shown.recall_id,
            cited=shown.notes_of(cited),
            verdicts=self._checked(spec, completed),
            started_at_s=started_at_s,
        )
        await self._memory.record(_for_memory(principal), trajectory)
        return {"steps": len(steps)}

    def _checked(self, spec: RunSpec, result: RunResult | None) -> tuple[Verdict, ...]:
        """What the check of the citations says: an answer about files that cites none of them has failed."""
        if result is None or not spec.inputs or result.citations:
            return ()
        return (
            Verdict(
                outcome="failure",
                confidence=0.8,
                reasons=("no citation of the answer stood the check against the files",),
                source="reviewer",
                subject="citation check",
                at_s=self._clock.time_s(),
            ),
        )


def _for_memory(principal: Principal) -> Principal:
    """Whoever may run may have what runs taught and leave what they did, in the same tenant."""
    return Principal(principal.tenant, principal.subject, frozenset({"memory:read", "memory:write"}))


def trajectory_steps(run_id: str, steps: Sequence[StepRecord]) -> list[TrajectoryStep]:
    """The steps in order. What a tool was called with stands in the model's answer before it.

    Args:
        run_id: Of the run; its agents' workflows are named after it.
        steps: Recorded steps of the run and its agents, in order of completion.
    """
    asked: dict[str, dict[str, deque[ToolCallPart]]] = defaultdict(lambda: defaultdict(deque))
    found: list[TrajectoryStep] = []
    for step in steps:
        agent = step.workflow_id.removeprefix(run_id).lstrip(".") or "run"
        if agent == "run" and step.name in _OWN:
            continue
        error = str(step.error.get("detail")) if step.error else None
        action, observation, cost_usd = "", "", 0.0
        if step.name == "model" and step.output:
            completion = Completion.from_record(step.output)
            for call in completion.tool_calls:
                asked[agent][call.name].append(call)
            action = ", ".join(call.name for call in completion.tool_calls)
            observation = completion.text
            cost_usd = completion.usage.cost_usd or 0.0
        elif step.name.startswith(_TOOL) and step.output:
            waiting = asked[agent][step.name.removeprefix(_TOOL)]
            if waiting:
                action = _json(waiting.popleft().arguments)
            observation = _json(step.output.get("content"))
            if step.output.get("is_error"):
                error = error or _detail(step.output.get("content")) or "the tool refused or failed"
        elif step.output:
            observation = _json(step.output)
        found.append(
            TrajectoryStep(
                agent=agent,
                name=step.name,
                action=action[:OBSERVATION_CHARS_MAX],
                observation=observation[:OBSERVATION_CHARS_MAX],
                error=error,
                cost_usd=cost_usd,
                at_s=step.completed_at_s or step.started_at_s or 0.0,
            )
        )
    return found


def memory_of(steps: Sequence[StepRecord]) -> RunMemory | None:
    """What memory had for a run that has not completed, from its recorded steps; None before it was asked."""
    recalled = next((step.output for step in steps if step.name == "recall" and step.output), None)
    return Shown.from_record(recalled).as_result(()) if recalled else None


def steps_of_run(run_id: str, steps: Sequence[RunStep]) -> list[TrajectoryStep]:
    """`trajectory_steps` of a run as callers see it."""
    return trajectory_steps(
        run_id,
        [
            StepRecord(
                workflow_id=run_id if one.agent == "run" else f"{run_id}.{one.agent}",
                index=one.index,
                name=one.name,
                output=one.output,
                error=one.error,
                started_at_s=one.started_at_s,
                completed_at_s=one.completed_at_s,
            )
            for one in steps
        ],
    )


def _json(value: Any) -> str:
    return orjson.dumps(value, default=str).decode()


def _detail(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    told: Any = content.get("detail")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - JSON
    return told if isinstance(told, str) else None
