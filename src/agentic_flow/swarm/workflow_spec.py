"""What a workflow is: typed inputs, steps in a graph, outputs; and everything that is wrong with one.

The models are the Python API and the file format at once. `check_workflow` finds every problem that can be
known before anything runs, all at once, each with its place (`steps.3.needs`), its line, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import Frozen, JsonObject, Record
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.questions import OPTIONS_MAX, check_question
from agentic_flow.swarm.runs import After, AgentName, Count, Priority, QueueName, RunSpec, StepKind
from agentic_flow.swarm.schedule_rule import ScheduleRule
from agentic_flow.swarm.topology import Role
from agentic_flow.swarm.workflow_file import Document, Format, bounded_document, parse_document
from agentic_flow.swarm.workflow_text import SOURCE_CHARS_MAX

STEPS_MAX = 500
INPUTS_MAX = 100
OUTPUTS_MAX = 100
ITEMS_MAX = 1_000
ATTEMPTS_MAX = 10
PATTERNS_MAX = 16
DENY = "deny"
"""The answer to an approval that fails its step."""
RESERVED = frozenset({"inputs", "steps", "item", "index", "loop", "true", "false", "none"})

Id = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=SOURCE_CHARS_MAX)]
Expression = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
Kind = Literal["string", "integer", "number", "boolean", "list", "object", "path"]
StepState = Literal["completed", "failed", "skipped"]


class InputSpec(Record):
    """One input. Without a `default` it must be given. A `path` is a file or folder."""

    type: Kind = "string"
    description: str = ""
    default: Any = None

    @property
    def required(self) -> bool:
        """Whether a run must give it."""
        return "default" not in self.model_fields_set


class AgentWork(Record):
    """One agent with a prompt. `definition` names an agent definition; without, `role` chooses one.

    `prompt` is a template. `model` and `tools` stand in place of the definition's. The output of the step is
    {text, citations, model}.
    """

    prompt: Text
    role: Role = "worker"
    definition: AgentName | None = None
    model: str | None = None
    tools: Annotated[tuple[str, ...], Field(max_length=100)] | None = None
    steps_max: Count | None = None
    tool_calls_max: Count | None = None
    output_tokens_max: Count | None = None


class ToolWork(Record):
    """One call of a tool. The texts in `arguments` are templates; the tool's result is the output."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])


class ApprovalWork(Record):
    """A question to a person; the step waits for the answer. `question` is a template.

    `options` are the answers that are taken; none: any text. The answer "deny" fails the step. When the
    `timeout_s` of the step is over it goes on with `default`, or fails without one. The output of the step is
    {answer, by, timed_out}.
    """

    question: Text
    options: Annotated[tuple[Text, ...], Field(max_length=OPTIONS_MAX)] = ("approve", DENY)
    default: Text | None = None

    @model_validator(mode="after")
    def _can_be_answered(self) -> Self:
        try:
            check_question("?", self.options, self.default)
        except InvalidInput as error:
            raise ValueError(error.message) from error
        return self


class SignalWork(Record):
    """A wait for a signal to the run. Every step that waits for it receives it, also one that begins later.

    When the `timeout_s` of the step is over it goes on with the `default` value, or fails without one (null
    is none). The output of the step is {value, by, timed_out}.
    """

    signal: Id
    default: Any = None


class FanOut(Record):
    """The step once for each entry of a list, as `item` and `index` (from 0); it gives the list of outputs.

    More entries than `items_max` are refused, none left out.
    """

    over: Expression
    parallel_max: Annotated[int, Field(ge=1, le=64)] = 8
    items_max: Annotated[int, Field(ge=1, le=ITEMS_MAX)] = ITEMS_MAX


class Retry(Record):
    """`attempts` in all, `backoff_s` before the second, doubled before each one after it."""

    attempts: Annotated[int, Field(ge=1, le=ATTEMPTS_MAX)] = 3
    backoff_s: Annotated[float, Field(ge=0, le=3600)] = 1.0


class Step(Record):
    """One step: exactly one of `agent`, `team`, `tool`, `approval` and `wait_for`.

    `needs` are the steps before it. `start_when`: "all" of them completed (else it is skipped), "any" of them
    (once all have ended), or "ended", however they did. `when` false skips it. `on_failure`: "fail" ends the
    workflow, "continue" goes on without an output, "fallback" runs the step `fallback` in its place.
    `timeout_s` bounds one attempt. An approval is asked once, a signal waited for once. `artifacts` are
    patterns (templates) of files in the workflow's folders that the run keeps once the step is done; each
    must match a file then, or the step has failed.

    In `team` the goal is a template; folders, path rules, budget and deadline are the workflow's.
    """

    id: Id
    description: Annotated[str, StringConstraints(max_length=2_000)] = ""
    needs: Annotated[tuple[Id, ...], Field(max_length=STEPS_MAX)] = ()
    start_when: Literal["all", "any", "ended"] = "all"
    agent: AgentWork | None = None
    team: RunSpec | None = None
    tool: ToolWork | None = None
    approval: ApprovalWork | None = None
    wait_for: SignalWork | None = None
    fan_out: FanOut | None = None
    when: Expression | None = None
    retry: Retry = Retry(attempts=1)
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    artifacts: Annotated[tuple[Pattern, ...], Field(max_length=PATTERNS_MAX)] = ()
    on_failure: Literal["fail", "continue", "fallback"] = "fail"
    fallback: Id | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        kinds = [name for name in get_args(StepKind) if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                "give exactly one of agent, team, tool, approval and wait_for, not "
                f"{' and '.join(kinds) or 'none'}"
            )
        if self.wait_for is not None and self.retry.attempts > 1:
            raise ValueError("a signal is waited for once: wait_for has no retry")
        if self.approval is not None and self.retry.attempts > 1:
            raise ValueError("a person is asked once: an approval has no retry")
        if self.artifacts and (self.wait_for is not None or self.approval is not None):
            raise ValueError(f"a step {kinds[0]} leaves no files, so it has no artifacts")
        if self.on_failure == "fallback" and self.fallback is None:
            raise ValueError("on_failure is 'fallback' and no fallback step is named")
        if self.fallback is not None and self.on_failure != "fallback":
            raise ValueError(
                f"the fallback {self.fallback!r} is never used: on_failure is {self.on_failure!r}"
            )
        return self

    @property
    def kind(self) -> StepKind:
        """What it does."""
        return next(name for name in get_args(StepKind) if getattr(self, name) is not None)


class WorkflowSpec(Record):
    """A whole workflow.

    `folders` (templates) are what tools and agents may touch, within `paths_allowed` and `paths_forbidden`.
    `budget_usd`, `tokens_max` and `deadline_s` (from acceptance) hold for all steps together. `parallel_max`
    bounds what works at once. `schedule` says when it runs by itself, for `agentic-flow schedules add`.
    `outputs` are templates over the steps; without any, the outputs of the final steps are the result.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    version: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "1"
    description: Annotated[str, StringConstraints(max_length=2_000)] = ""
    inputs: Annotated[dict[Id, InputSpec], Field(max_length=INPUTS_MAX)] = Field(
        default_factory=dict[str, InputSpec]
    )
    folders: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    paths_allowed: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    paths_forbidden: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    model: str | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    tokens_max: Count | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    parallel_max: Annotated[int, Field(ge=1, le=64)] = 16
    schedule: ScheduleRule | None = None
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=STEPS_MAX)]
    outputs: Annotated[dict[Id, Any], Field(max_length=OUTPUTS_MAX)] = Field(default_factory=dict[str, Any])

    def step(self, step_id: str) -> Step:
        """The step of this id, which must exist."""
        return next(step for step in self.steps if step.id == step_id)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Fallback step → the step in whose place it runs."""
        return {step.fallback: step.id for step in self.steps if step.fallback is not None}

    @property
    def final(self) -> tuple[str, ...]:
        """Steps that no other step needs."""
        needed = {need for step in self.steps for need in step.needs}
        fallbacks = self.fallbacks
        return tuple(s.id for s in self.steps if s.id not in needed and s.id not in fallbacks)


class Problem(Frozen):
    """Something wrong with a workflow. `path` is its place, as in `steps.3.needs`; places count from 0."""

    path: str
    line: int | None = None
    message: str
    hint: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path or 'workflow'}: {self.message}; {self.hint}"


class Validation(Frozen):
    """What a check found; `name` and `steps` when the file could be read that far."""

    valid: bool
    name: str | None = None
    steps: int = 0
    problems: tuple[Problem, ...] = ()


class WorkflowSource(Frozen):
    """A workflow as it is handed over: its `text` in a format, or the `workflow` itself as data."""

    text: str | None = None
    format: Format = "yaml"
    workflow: JsonObject | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.text is None) == (self.workflow is None):
            raise ValueError("give exactly one of text and workflow")
        return self

    def document(self) -> Document:
        """Its data and lines.

        Raises:
            InvalidInput, TooLarge: see `parse_document`.
        """
        if self.text is not None:
            return parse_document(self.text, self.format)
        return bounded_document(self.workflow or {})


class WorkflowRequest(WorkflowSource):
    """A workflow to run, with its inputs; `queue`, `priority`, `after` and `after_any_end` as in RunSpec."""

    inputs: JsonObject = Field(default_factory=dict[str, Any])
    queue: QueueName | None = None
    priority: Priority = 0
    after: After = ()
    after_any_end: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a workflow may name where it would run.

    Args:
        tools: Tool → JSON schema of its arguments.
        agents: Names of agent definitions.
        refused_models: Model → why it cannot be asked.
        settings: The section `swarm`, which has the most that may be asked for.
    """

    tools: Mapping[str, Mapping[str, Any]]
    agents: frozenset[str]
    refused_models: Mapping[str, str]
    settings: SwarmSettings


def refusal(problems: tuple[Problem, ...] | list[Problem]) -> InvalidInput:
    """All problems as one error; the first in its message, all in its details."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidInput(
        f"the workflow is wrong: {first.path or 'workflow'}: {first.message}{more}",
        hint=first.hint if len(problems) == 1 else "`agentic-flow workflow validate` lists all of them",
        details={"problems": [problem.model_dump(mode="json") for problem in problems]},
    )


def given_inputs(spec: WorkflowSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a run: what was given, of the declared kinds, and defaults for the rest.

    Raises:
        InvalidInput: one is unknown, missing or of another kind; lists all such.
    """
    problems = [
        Problem(path=f"inputs.{name}", message=f"there is no input {name!r}", hint=_there_are(spec))
        for name in given
        if name not in spec.inputs
    ]
    values: dict[str, Any] = {}
    for name, declared in spec.inputs.items():
        if name not in given:
            if declared.required:
                problems.append(
                    Problem(
                        path=f"inputs.{name}",
                        message=f"the input {name!r} is missing",
                        hint=f"give a {declared.type}: --input {name}=…",
                    )
                )
            values[name] = declared.default
            continue
        values[name] = given[name]
        if not fits(declared.type, given[name]):
            problems.append(
                Problem(
                    path=f"inputs.{name}",
                    message=f"the input {name!r} is {given[name]!r}"[:300],
                    hint=f"give a {declared.type}",
                )
            )
    if problems:
        first = problems[0]
        raise InvalidInput(
            "; ".join(problem.message for problem in problems[:10]),
            hint=first.hint,
            details={"problems": [problem.model_dump(mode="json") for problem in problems]},
        )
    return values


def _there_are(spec: WorkflowSpec) -> str:
    return f"there are {', '.join(spec.inputs)}" if spec.inputs else "this workflow takes no inputs"


def fits(kind: Kind, value: Any) -> bool:
    """Whether a value is of a kind."""
    match kind:
        case "string" | "path":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "list":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
