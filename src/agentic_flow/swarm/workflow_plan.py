"""What a workflow does next: a pure function of its text, its inputs and what has ended so far.

Nothing is remembered between calls: who was skipped, whose output stands in whose place and whether all is
over follows anew from the recorded outcomes, so a resumed workflow decides as the one that died did.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, NotAccepted, as_problem, from_problem
from agentic_flow.core.messages import JsonObject
from agentic_flow.swarm.workflow_check import topological
from agentic_flow.swarm.workflow_spec import Step, StepState, WorkflowSpec
from agentic_flow.swarm.workflow_text import as_text, expression, is_template, template


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step, or one item of a fan-out, ended.

    `output` when it completed; `error` (a problem) when it failed; `reason` why it was skipped, or what else
    there is to say. `items` of a fan-out.
    """

    state: StepState
    output: Any = None
    error: JsonObject | None = None
    reason: str = ""
    items: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """A step, or an item of one, to run now. `work`: its prompt, its goal or its arguments, filled in.

    `artifacts`: the patterns of the files that it leaves, filled in.
    """

    key: str
    step: str
    index: int | None
    work: Any
    artifacts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is next. `outcomes` of the steps that have ended; `over`: nothing runs and nothing will."""

    start: tuple[Start, ...]
    outcomes: Mapping[str, Outcome]
    over: bool


def key_of(step_id: str, index: int | None) -> str:
    """The name of a step's work among the workflow's children. (Ids of steps have no hyphens.)"""
    return step_id if index is None else f"{step_id}-{index + 1}"


def advance(
    spec: WorkflowSpec,
    inputs: Mapping[str, Any],
    results: Mapping[str, Outcome],
    running: Collection[str] = (),
) -> Plan:
    """What to start now.

    Args:
        spec: A workflow without problems.
        inputs: All its inputs.
        results: Key → how the work of that key ended.
        running: Keys that were started and have not ended.
    """
    return _Turn(spec, inputs, results, frozenset(running)).plan()


@lru_cache(64)
def _order(needs: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str, ...]:
    return tuple(topological(dict(needs)))


@dataclass
class _Turn:
    """One call of `advance`."""

    spec: WorkflowSpec
    inputs: Mapping[str, Any]
    results: Mapping[str, Outcome]
    running: frozenset[str]
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    waiting: dict[str, list[Start]] = field(default_factory=dict[str, "list[Start]"])
    broken: str | None = None
    seen: dict[str, Any] = field(default_factory=dict[str, Any])

    def plan(self) -> Plan:
        """Every step in the order of the graph: ended, to be started, or neither yet."""
        steps = {step.id: step for step in self.spec.steps}
        fallbacks = self.spec.fallbacks
        for name in _order(tuple((step.id, step.needs) for step in self.spec.steps)):
            if name not in fallbacks:
                self._consider(steps[name], steps)
        if self.broken is None:
            return self._starts(steps)
        for name, step in steps.items():
            if name not in self.outcomes and not self._is_running(step):
                self.outcomes[name] = Outcome("skipped", reason=f"step {self.broken!r} has failed")
        return Plan((), self.outcomes, not self.running)

    def _starts(self, steps: Mapping[str, Step]) -> Plan:
        """As many as may run at once, in the order of the file."""
        start: list[Start] = []
        room = self.spec.parallel_max - len(self.running)
        for name, step in steps.items():
            some = self.waiting.get(name, [])
            if step.fan_out is not None:
                here = sum(1 for key in self.running if key.partition("-")[0] == name)
                some = some[: max(0, step.fan_out.parallel_max - here)]
            start += some[: max(0, room - len(start))]
        over = not start and not self.running
        if over:
            for name, owner in self.spec.fallbacks.items():
                reason = f"step {owner!r} did not fail"
                self.outcomes.setdefault(name, Outcome("skipped", reason=reason))
            assert len(self.outcomes) == len(steps), "a step is neither ended nor to be started"
        return Plan(tuple(start), self.outcomes, over)

    def _is_running(self, step: Step) -> bool:
        return any(key.partition("-")[0] == step.id for key in self.running)

    def _end(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.id] = outcome
        self.seen[step.id] = _seen(outcome)
        if outcome.state == "failed" and step.on_failure != "continue" and self.broken is None:
            self.broken = step.id

    # ---- one step ----------------------------------------------------------------------------------------

    def _consider(self, step: Step, steps: Mapping[str, Step]) -> None:
        ended = [self.outcomes.get(need) for need in step.needs]
        if any(outcome is None for outcome in ended):
            return
        stopped = self._stopped(step, cast(list[Outcome], ended), steps)
        if stopped is not None:
            self._end(step, stopped)
            return
        try:
            if step.when is not None and not expression(step.when).value(self._scope()):
                self._end(step, Outcome("skipped", reason=f"its condition is not met: {step.when}"))
                return
            outcome = self._worked(step) if step.fan_out is None else self._fanned(step)
        except InvalidInput as error:
            outcome = Outcome("failed", error=_problem(step, error))
        if outcome is None:
            return
        if outcome.state == "failed" and step.fallback is not None:
            outcome = self._fallen_back(step, steps[step.fallback], outcome)
            if outcome is None:
                return
        self._end(step, outcome)

    def _stopped(self, step: Step, ended: Sequence[Outcome], steps: Mapping[str, Step]) -> Outcome | None:
        """Why it does not start, by what became of those it needs; None: it does."""
        if step.start_when == "ended" or not ended:
            return None
        states = dict(zip(step.needs, ended, strict=True))
        if step.start_when == "any":
            if any(outcome.state == "completed" for outcome in ended):
                return None
            return Outcome("skipped", reason="no step that it needs completed")
        for need, outcome in states.items():
            passes = outcome.state == "failed" and steps[need].on_failure == "continue"
            if outcome.state != "completed" and not passes:
                return Outcome("skipped", reason=f"step {need!r} was {outcome.state}")
        return None

    def _worked(self, step: Step) -> Outcome | None:
        if step.id in self.results:
            return self.results[step.id]
        if step.id not in self.running:
            self.waiting[step.id] = [_start(step, None, self._scope())]
        return None

    def _fallen_back(self, step: Step, fallback: Step, failed: Outcome) -> Outcome | None:
        """The outcome of a failed step by its fallback's; None: that is still to come."""
        ended = self.results.get(fallback.id)
        if ended is None:
            if fallback.id in self.running:
                return None
            scope = {"inputs": self.inputs, "steps": self.seen | {step.id: _seen(failed)}}
            try:
                self.waiting[fallback.id] = [_start(fallback, None, scope)]
            except InvalidInput as error:
                ended = Outcome("failed", error=_problem(fallback, error))
            else:
                return None
        self.outcomes[fallback.id] = ended
        why = f"{_detail(failed.error)}; {fallback.id!r} ran in its place"
        return Outcome(ended.state, ended.output, ended.error, reason=why)

    def _fanned(self, step: Step) -> Outcome | None:
        assert step.fan_out is not None
        scope = self._scope()
        items = expression(step.fan_out.over).value(scope)
        if not isinstance(items, list):
            raise InvalidInput(
                f"{step.fan_out.over!r} is {str(items)[:100]!r}, no list", hint="fan out over a list"
            )
        entries = cast(list[Any], items)
        if len(entries) > step.fan_out.items_max:
            raise InvalidInput(
                f"{step.fan_out.over!r} has {len(entries)} entries, and at most {step.fan_out.items_max} "
                "are taken",
                hint="cut the list, or raise items_max (1000 at most)",
            )
        ended: list[Outcome] = []
        waiting: list[Start] = []
        for index, item in enumerate(entries):
            if len(waiting) == step.fan_out.parallel_max:
                break  # no more can start now; that there are more keeps the step from ending
            key = key_of(step.id, index)
            if key in self.results:
                ended.append(self.results[key])
            elif key not in self.running:
                try:
                    waiting.append(_start(step, index, scope | {"item": item, "index": index}))
                except InvalidInput as error:
                    ended.append(Outcome("failed", error=_problem(step, error)))
        if step.on_failure != "continue" and any(one.state == "failed" for one in ended):
            if any(self._of(step, key) for key in self.running):
                return None  # what runs is seen to its end; nothing more begins
            return _gathered(step, ended)
        if len(ended) < len(entries):
            self.waiting[step.id] = waiting
            return None
        return _gathered(step, ended)

    @staticmethod
    def _of(step: Step, key: str) -> bool:
        return key.partition("-")[0] == step.id

    def _scope(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "steps": self.seen}


def _seen(outcome: Outcome) -> JsonObject:
    """A step as templates see it."""
    seen: JsonObject = {"state": outcome.state}
    if outcome.state == "completed":
        seen["output"] = outcome.output
    if outcome.error is not None:
        seen["error"] = outcome.error
    return seen


def _gathered(step: Step, ended: Sequence[Outcome]) -> Outcome:
    """A fan-out by its items: one failure fails it, unless it goes on; then not all may have failed."""
    failed = [one for one in ended if one.state == "failed"]
    if failed and (step.on_failure != "continue" or len(failed) == len(ended)):
        reason = f"{len(failed)} of {len(ended)} items failed"
        return Outcome("failed", error=failed[0].error, reason=reason, items=len(ended))
    reason = f"{len(failed)} of {len(ended)} items failed: null stands for them" if failed else ""
    return Outcome("completed", [one.output for one in ended], reason=reason, items=len(ended))


def _start(step: Step, index: int | None, scope: Mapping[str, Any]) -> Start:
    """A step, or an item of it, with its texts filled in.

    Raises:
        InvalidInput: one of them names what has no value.
    """
    artifacts = tuple(as_text(filled(pattern, scope)) for pattern in step.artifacts)
    return Start(key_of(step.id, index), step.id, index, _work(step, scope), artifacts)


def _work(step: Step, scope: Mapping[str, Any]) -> Any:
    """The prompt, the goal, the question or the arguments of a step, filled in."""
    if step.agent is not None:
        return as_text(filled(step.agent.prompt, scope))
    if step.team is not None:
        return as_text(filled(step.team.goal, scope))
    if step.approval is not None:
        return as_text(filled(step.approval.question, scope))
    if step.wait_for is not None:
        return step.wait_for.signal
    assert step.tool is not None
    return filled(step.tool.arguments, scope)


def filled(value: Any, scope: Mapping[str, Any]) -> Any:
    """A value with every template in it filled in."""
    if isinstance(value, str):
        return template(value).value(scope) if is_template(value) else value
    if isinstance(value, Mapping):
        return {key: filled(inner, scope) for key, inner in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [filled(inner, scope) for inner in cast(Sequence[Any], value)]
    return value


def _problem(step: Step, error: AgenticFlowError) -> JsonObject:
    return as_problem(InvalidInput(f"step {step.id!r}: {error.message}", hint=error.hint))


def _detail(error: JsonObject | None) -> str:
    return str((error or {}).get("detail") or "it failed")


# ---- the end ---------------------------------------------------------------------------------------------


def conclude(
    spec: WorkflowSpec, inputs: Mapping[str, Any], outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, Any], AgenticFlowError | None]:
    """The outputs of a workflow that is over, and why it has failed; None: it completed.

    It completes when no step failed whose failure ends it, when at least one of the steps that its result
    rests on completed, and when its outputs can be filled in.
    """
    for step in spec.steps:
        outcome = outcomes[step.id]
        if outcome.state == "failed" and step.on_failure != "continue" and step.id not in spec.fallbacks:
            assert outcome.error is not None
            return {}, from_problem(outcome.error)
    rests_on = _rests_on(spec)
    if not any(outcomes[name].state == "completed" for name in rests_on):
        told = "; ".join(f"{name}: {outcomes[name].state}" for name in rests_on[:10])
        error = next((outcomes[n].error for n in rests_on if outcomes[n].error is not None), None)
        if error is not None:
            return {}, from_problem(error)
        return {}, NotAccepted(
            f"no step that the result rests on was done ({told})",
            hint="see why each was skipped with `agentic-flow runs show ID --json`",
        )
    if not spec.outputs:
        done = {name: outcomes[name] for name in rests_on}
        return {name: one.output for name, one in done.items() if one.state == "completed"}, None
    scope = {"inputs": inputs, "steps": {name: _seen(one) for name, one in outcomes.items()}}
    outputs: dict[str, Any] = {}
    for name, value in spec.outputs.items():
        try:
            outputs[name] = filled(value, scope)
        except InvalidInput as error:
            return {}, InvalidInput(f"the output {name!r}: {error.message}", hint=error.hint)
    return outputs, None


def _rests_on(spec: WorkflowSpec) -> tuple[str, ...]:
    """Steps that the outputs name, or the final ones."""
    named: dict[str, None] = {}
    for value in _texts(spec.outputs):
        if is_template(value):
            named |= {r.path[1]: None for r in template(value).references if r.path[0] == "steps"}
    return tuple(named) or spec.final


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for inner in cast(Mapping[str, Any], value).values() for text in _texts(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in cast(Sequence[Any], value) for text in _texts(inner)]
    return []
