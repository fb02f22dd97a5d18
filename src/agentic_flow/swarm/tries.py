"""Several runs of one goal, and what their contrast teaches: memory-aware test-time scaling over real runs.

In parallel: all at the same time. In sequence: each is told how the earlier ones went, until one succeeds.

Source: MaTTS of "ReasoningBank", arXiv 2509.25140, section 3.3.
"""

from __future__ import annotations

import asyncio

from anyio import move_on_after

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput, NotFound, Unavailable
from agentic_flow.core.messages import Frozen
from agentic_flow.memory.answers import Contrasted, MemoryService
from agentic_flow.memory.matts import TRIES_MAX
from agentic_flow.memory.records import ANSWER_CHARS_MAX, Trajectory
from agentic_flow.swarm.experience import steps_of_run
from agentic_flow.swarm.runs import RunResult, RunService, RunSpec

_CANCEL_TIMEOUT_S = 10.0


class SeveralTries(Frozen):
    """The runs in order, and their contrast, which names the best. `problems`: tries nobody could judge."""

    runs: tuple[RunResult, ...]
    contrast: Contrasted
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> RunResult:
        """The best run."""
        return next(run for run in self.runs if run.run_id == self.contrast.best)


async def try_several(
    runs: RunService,
    memory: MemoryService,
    principal: Principal,
    spec: RunSpec,
    *,
    k: int,
    sequential: bool = False,
    judge_timeout_s: float = 60.0,
) -> SeveralTries:
    """Run a goal several times, compare the runs, and keep what that teaches.

    Cancelling it cancels the runs.

    Args:
        runs: Runs them, each with the whole of the spec's limits.
        memory: Judges and compares.
        principal: In whose name.
        spec: Of each run.
        k: Runs: in sequence at most so many.
        sequential: One after the other; each is told of the earlier ones, and a success is the last.
        judge_timeout_s: Of the judgement of one run, and of the contrast.

    Raises:
        InvalidInput: `k` is out of range.
        Unavailable: memory does not learn where it is asked.
        AgenticFlowError: what a submission raises.
    """
    if not 1 <= k <= TRIES_MAX:
        raise InvalidInput(f"{k!r} tries are out of range", hint=f"1 to {TRIES_MAX}")
    team = _Team(runs, memory, principal, judge_timeout_s)
    results: list[RunResult] = []
    if not sequential:
        async with asyncio.TaskGroup() as group:
            begun = [group.create_task(team.run(spec)) for _ in range(k)]
        results = [one.result() for one in begun]
        await asyncio.gather(*(team.judged(one) for one in results))
    else:
        for _ in range(k):
            earlier = tuple(one.run_id for one in results)
            results.append(await team.run(spec.model_copy(update={"refines": earlier})))
            if await team.judged(results[-1]):
                break
    tries = [await team.trajectory(one) for one in results]
    contrast = await memory.contrast(principal, tries, timeout_s=judge_timeout_s)
    return SeveralTries(runs=tuple(results), contrast=contrast, problems=tuple(team.problems))


class _Team:
    def __init__(
        self, runs: RunService, memory: MemoryService, principal: Principal, judge_timeout_s: float
    ) -> None:
        self._runs = runs
        self._memory = memory
        self._principal = principal
        self._judge_timeout_s = judge_timeout_s
        self.problems: list[str] = []

    async def run(self, spec: RunSpec) -> RunResult:
        """One run to its end."""
        run_id = await self._runs.submit(self._principal, spec)
        try:
            return await self._runs.wait(self._principal, run_id)
        except asyncio.CancelledError:
            with move_on_after(_CANCEL_TIMEOUT_S, shield=True):
                await self._runs.cancel(self._principal, run_id)
            raise

    async def judged(self, result: RunResult) -> bool:
        """Whether the run was judged a success. Its trajectory is learned from on the way, as any other."""
        try:
            found = await self._memory.assess(self._principal, result.run_id, timeout_s=self._judge_timeout_s)
        except (NotFound, Unavailable) as error:
            self.problems.append(error.message)
            return False
        return found.verdict.outcome == "success"

    async def trajectory(self, result: RunResult) -> Trajectory:
        """The run with all that its steps observed, of which memory keeps little once it was learned from."""
        steps = steps_of_run(result.run_id, await self._runs.steps(self._principal, result.run_id))
        try:
            kept = await self._memory.trajectory(self._principal, result.run_id)
        except NotFound:
            outcome = result.state if result.state in ("completed", "cancelled") else "failed"
            kept = Trajectory(
                id=result.run_id,
                run_id=result.run_id,
                task=result.goal,
                agent="team",
                model=result.model,
                topology=result.topology,
                outcome=outcome,
                error=str(result.error.get("detail")) if result.error else None,
                started_at_s=result.created_at_s,
                ended_at_s=result.updated_at_s,
            )
        return kept.model_copy(
            update={"steps": tuple(steps), "answer": result.answer[:ANSWER_CHARS_MAX], "compressed": False}
        )
