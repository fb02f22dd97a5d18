"""What a run is: its specification, its result, and the events it leaves while it goes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

from pydantic import Field, StringConstraints

from agentic_flow.agentdb.ingest import IngestReport
from agentic_flow.core.auth import Principal
from agentic_flow.core.messages import Completion, Frozen, JsonObject, Record, Usage
from agentic_flow.core.ports import RunState
from agentic_flow.memory.records import Id
from agentic_flow.swarm.criteria import CRITERIA_MAX, Checked, Criterion
from agentic_flow.swarm.topology import Role

if TYPE_CHECKING:
    from agentic_flow.swarm.questions import Question
    from agentic_flow.swarm.schedules import ScheduleService
    from agentic_flow.swarm.workflow_spec import Validation, WorkflowRequest, WorkflowSource

TEAM_LEVELS_MAX = 3

TopologyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Priority = Annotated[int, Field(ge=-100, le=100)]
After = Annotated[tuple[Id, ...], Field(max_length=64)]
AgentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class RoleChoice(Record):
    """How a role is played in one run; what is None stays as it is by default.

    `agent` names an agent definition, `model` a model, `tools` the tools in place of the definition's.
    """

    agent: AgentName | None = None
    model: str | None = None
    tools: Annotated[tuple[str, ...], Field(max_length=100)] | None = None


class Stage(Record):
    """One stage of a pipeline: an agent definition, and its task (None: the run's goal)."""

    agent: AgentName
    task: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)] | None = (
        None
    )


class RunSpec(Record):
    """A goal and what may be used to reach it.

    `inputs` are absolute paths of files or folders on the machine that executes the run. `model` None takes
    the configured default. `paths_allowed` and `paths_forbidden` are gitignore-style patterns relative to
    the inputs, enforced by every tool; forbidden wins. `budget_usd` is a hard limit. `memory` False: the team
    is told nothing of earlier runs; what it does is kept and judged all the same, to compare with. `refines`
    are earlier runs of this goal, of which the team is told how they went, in this order.

    Shape: `topology` is a built-in one or a plug-in's name, `agents` the worker agents, of which `teams`
    makes some leads: (2,) with 8 agents are 2 leads of 3 workers. `rounds_max` are the rounds of a mesh,
    `laps` of a ring, `stages` of a pipeline. `reviewers` vote on each claim; `quorum` is how many voices a
    claim, or a round of a mesh, needs (None: more than half). `batch_size` bounds the agents at work at once.

    `roles` change how a role is played. `acceptance` must hold of the answer, or the run has failed. `board`:
    "topology" gives a blackboard to the agents who may speak to each other anyway, "all" one to everybody.

    `queue`: the shared queue from which a worker takes it; None: who accepts it does it, if it does any. A
    high `priority` goes first. It begins when all runs of `after` have completed, and fails when one of them
    does not; with `after_any_end` it begins when all have ended, in whichever way.

    Limits, each within the setting of that name: `deadline_s` from acceptance to the end, `steps_max` and
    `tool_calls_max` of one agent, `tokens_max` of the run, `output_tokens_max` of one model call.
    """

    goal: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]
    inputs: tuple[str, ...] = ()
    topology: TopologyName = "hierarchical"
    agents: Annotated[int, Field(ge=1, le=64)] = 4
    model: str | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    paths_allowed: tuple[str, ...] = ()
    paths_forbidden: tuple[str, ...] = ()
    memory: bool = True
    refines: Annotated[tuple[Id, ...], Field(max_length=16)] = ()
    teams: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(max_length=TEAM_LEVELS_MAX)] = ()
    rounds_max: Annotated[int, Field(ge=2, le=10)] = 2
    laps: Annotated[int, Field(ge=1, le=10)] = 1
    stages: Annotated[tuple[Stage, ...], Field(max_length=16)] = ()
    reviewers: Annotated[int, Field(ge=1, le=9)] = 1
    quorum: Annotated[int, Field(ge=1, le=64)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    roles: dict[Role, RoleChoice] = Field(default_factory=dict[Role, RoleChoice])
    acceptance: Annotated[tuple[Criterion, ...], Field(max_length=CRITERIA_MAX)] = ()
    board: Literal["none", "topology", "all"] = "none"
    queue: QueueName | None = None
    priority: Priority = 0
    after: After = ()
    after_any_end: bool = False
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    steps_max: Count | None = None
    tool_calls_max: Count | None = None
    tokens_max: Count | None = None
    output_tokens_max: Count | None = None


class Citation(Frozen):
    """Lines of a file that support the answer. Lines count from 1, both ends included."""

    path: str
    line_start: int
    line_end: int
    quote: str

    @property
    def label(self) -> str:
        return f"{self.path}:{self.line_start}-{self.line_end}"


class RunUsage(Frozen):
    """What a run (or an agent) consumed. `cost_usd` None: a model without a known price took part.

    `delegations` counts questions to other roles, `delegation_depth` how deep they went.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    model_calls: int = 0
    tool_calls: int = 0
    time_s: float = 0.0
    delegations: int = 0
    delegation_depth: int = 0


class AgentReport(Frozen):
    """One agent's share of a run."""

    name: str
    role: str
    model: str
    state: Literal["completed", "failed", "unfinished"]
    steps: int
    usage: RunUsage
    error: str | None = None
    hint: str | None = None
    """What to do about the error."""


class RunNote(Frozen):
    """A note from earlier runs that fits the goal of this one."""

    id: str
    title: str
    score: float


class RunTry(Frozen):
    """An earlier try of a task like this run's goal, which did not succeed. `id` is its trajectory's."""

    id: str
    task: str


class RunMemory(Frozen):
    """What memory had for a run.

    `asked`: whether the run looked at all; not with `memory` False, nor where memory is off.
    `given`: the agents were shown it, the notes under the certificate `recall_id`; a model that only selects
    passages reads none of it. `tries`: earlier ones, of which the agents were told what went wrong.
    `cited`: ids of the notes and tries that agents said they used.
    """

    asked: bool = True
    recall_id: str | None = None
    notes: tuple[RunNote, ...] = ()
    tries: tuple[RunTry, ...] = ()
    given: bool = False
    cited: tuple[str, ...] = ()
    tokens: int = 0


StepKind = Literal["agent", "team", "tool", "approval", "wait_for"]


class WorkflowStepReport(Frozen):
    """How one step of a workflow ended, or that it has not. `items` of a fan-out."""

    id: str
    kind: StepKind
    state: Literal["completed", "failed", "skipped", "unfinished"]
    reason: str = ""
    items: int | None = None


class WorkflowReport(Frozen):
    """What a run of a workflow came to: its outputs, and how each step ended."""

    name: str
    version: str
    outputs: dict[str, Any] = Field(default_factory=dict[str, Any])
    steps: tuple[WorkflowStepReport, ...] = ()


class Artifact(Frozen):
    """A file that a run has left, without its bytes.

    `version` counts those of its name, from 1; `agent` and `step` say which recorded step left it, in the
    words of `RunStep`; `media_type` is what the step says it is.
    """

    name: str
    version: int
    media_type: str
    size_bytes: int
    sha256: str
    agent: str
    step: str
    created_at_s: float


class ArtifactContent(Frozen):
    """An artifact with its bytes."""

    artifact: Artifact
    data: bytes

    @property
    def text(self) -> str:
        """The bytes as UTF-8 text; what is none becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")


class RunResult(Frozen):
    """A run as the store has it; the one object that `agentic-flow run --json` prints.

    `artifacts` has the newest version of each that it has left so far; lists of runs leave them out. `queue`
    is the shared queue it was put into, `after` the runs it was to begin after, `deadline_at_s` when it is
    too late for it to begin.
    """

    run_id: str
    state: RunState
    goal: str
    topology: TopologyName
    model: str
    answer: str
    citations: tuple[Citation, ...] = ()
    usage: RunUsage = RunUsage()
    agents: tuple[AgentReport, ...] = ()
    ingest: IngestReport | None = None
    artifacts: tuple[Artifact, ...] = ()
    notes: tuple[str, ...] = ()
    memory: RunMemory | None = None
    acceptance: tuple[Checked, ...] = ()
    workflow: WorkflowReport | None = None
    retry_of: str | None = None
    error: JsonObject | None = None
    queue: str | None = None
    priority: int = 0
    after: tuple[str, ...] = ()
    deadline_at_s: float | None = None
    created_at_s: float = 0.0
    updated_at_s: float = 0.0


RunEventKind = Literal[
    "run_accepted",
    "run_started",
    "run_taken_over",
    "run_handed_back",
    "run_given_up",
    "run_cancelled",
    "run_paused",
    "run_unpaused",
    "run_finished",
    "agent_started",
    "agent_finished",
    "step_finished",
    "message_received",
    "question_asked",
    "ingest_progress",
    "other",
]
EVENT_KINDS = frozenset[str](get_args(RunEventKind))


class RunEvent(Frozen):
    """Something that happened in a run. `sequence` counts the stored events of a run, from 1 without gaps.

    Kinds: `run_accepted`, `run_started`, `run_taken_over` (by another process, or resumed: `asked`),
    `run_handed_back` (its worker left or died, or it was resumed: it waits in its queue again),
    `agent_started`, `step_finished` (agent, name: a model or tool call or another recorded step; of a step
    `assign` the data say who works next, on whose words, in which shape, and why if it changed),
    `agent_finished` (state, error), `question_asked` (id, text, options, default, until_s),
    `message_received` (key, sender; name: its topic, `answer:ID` for an answer), `run_given_up` (taken over
    too often), `run_cancelled` (and resumed later), `run_paused` and `run_unpaused` (by), `run_finished`
    (state, error), which is the last. `other`: what a newer build tells of; `kind` in its data says what.
    `ingest_progress` (done, total files) is live only: it is not stored,
    and bears the number of the event before it.
    """

    sequence: int
    kind: RunEventKind
    at_s: float
    agent: str | None = None
    name: str | None = None
    data: dict[str, Any] = Field(default_factory=dict[str, Any])

    @classmethod
    def told(cls, event: JsonObject) -> RunEvent:
        """What a server has told, perhaps one of a newer build."""
        if event.get("kind") not in EVENT_KINDS:
            event = event | {"kind": "other", "data": {**event.get("data", {}), "kind": event.get("kind")}}
        return cls.from_record(event)


class RunStep(Frozen):
    """One recorded step of a run: a model call (`model`), a tool call (`tool:NAME`) or a step of its own."""

    agent: str
    index: int
    name: str
    output: JsonObject | None = None
    error: JsonObject | None = None
    started_at_s: float | None = None
    completed_at_s: float | None = None

    @property
    def usage(self) -> Usage | None:
        """What a model call consumed; None of any other step."""
        return Completion.from_record(self.output).usage if self.name == "model" and self.output else None


class SignalRequest(Frozen):
    """What a signal says: any JSON value."""

    value: Any = None


class RetryRequest(Frozen):
    """Where a retry begins: a step's name, or an agent's; None: with the first that did not complete."""

    from_step: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None


class PurgeRequest(Frozen):
    """Which runs are to go: those that ended `older_than_s` seconds ago, and the oldest past `keep_bytes`.

    Without both the settings `swarm.keep_days` and `swarm.keep_bytes` say it. `tenant` None: the caller's.
    `dry_run` only tells what would go.
    """

    older_than_s: Annotated[float, Field(ge=0)] | None = None
    keep_bytes: Annotated[int, Field(ge=0)] | None = None
    tenant: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    dry_run: bool = False


class Purged(Frozen):
    """What was removed, or would be (`dry_run`): runs with their agents, steps, events, messages, artifacts.

    `artifacts` counts every version. `board_entries` are those of the blackboards of runs that are gone; a
    dry run does not count them. `size_bytes` counts stored text and the bytes of artifacts, without them.
    """

    tenant: str
    runs: int
    agents: int
    steps: int
    events: int
    messages: int
    artifacts: int = 0
    board_entries: int = 0
    size_bytes: int
    dry_run: bool = False


class RunService(Protocol):
    """Runs as callers see them; the coordinator in this process or its HTTP twin.

    Every method answers for the principal's tenant only: a run of another tenant does not exist (NotFound).
    """

    @property
    def schedules(self) -> ScheduleService:
        """What makes runs by itself."""
        ...

    async def submit(self, principal: Principal, spec: RunSpec, *, idempotency_key: str | None = None) -> str:
        """Accept a run durably and return its id; the same key and spec give the same run.

        Raises:
            PathNotFound: an input does not exist.
            UnknownModel: nothing serves the model.
            Conflict: the key was used for another spec.
        """
        ...

    async def validate_workflow(self, principal: Principal, source: WorkflowSource) -> Validation:
        """Everything that is wrong with a workflow, as far as it can be known before it runs."""
        ...

    async def submit_workflow(
        self, principal: Principal, request: WorkflowRequest, *, idempotency_key: str | None = None
    ) -> str:
        """Accept a workflow durably and return the id of its run; keys as in `submit`.

        Raises:
            InvalidInput: the workflow or its inputs are wrong; `details["problems"]` has all that is.
            PathNotFound: a folder does not exist.
            Conflict: the key was used for another run.
        """
        ...

    async def wait(self, principal: Principal, run_id: str) -> RunResult:
        """The result, once the run has ended."""
        ...

    async def show(self, principal: Principal, run_id: str) -> RunResult:
        """The run as it stands."""
        ...

    async def list_runs(
        self, principal: Principal, *, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[RunResult]:
        """Newest first."""
        ...

    async def steps(self, principal: Principal, run_id: str) -> list[RunStep]: ...

    async def artifacts(self, principal: Principal, run_id: str, *, versions: bool = False) -> list[Artifact]:
        """What the run has left so far, by name; with `versions` every version, in order of storing."""
        ...

    async def artifact(
        self, principal: Principal, run_id: str, name: str, *, version: int | None = None
    ) -> ArtifactContent:
        """One of them with its bytes; without `version` the newest.

        Raises:
            NotFound: there is no such run, name or version.
            DataCorrupted: the bytes are not those that were stored.
        """
        ...

    async def questions(self, principal: Principal, run_id: str) -> list[Question]:
        """What the run has asked people, answered or not, in order."""
        ...

    async def answer(self, principal: Principal, run_id: str, question_id: str, answer: str) -> bool:
        """Answer a question of a run. False when it has this answer already.

        Raises:
            NotFound: the run has asked no such question.
            InvalidInput: the answer is none of the question's options.
            Conflict: it has another answer, or waits for none any more.
        """
        ...

    async def resume(self, principal: Principal, run_id: str) -> bool:
        """Continue a paused, interrupted or cancelled run. False when it has ended or is at work."""
        ...

    async def pause(self, principal: Principal, run_id: str) -> bool:
        """Hold a run before its next steps until it is resumed. False when it has ended or is paused."""
        ...

    async def cancel(self, principal: Principal, run_id: str) -> bool:
        """False when it had already ended."""
        ...

    async def signal(
        self, principal: Principal, run_id: str, name: str, value: Any = None, *, key: str | None = None
    ) -> bool:
        """Send a run a signal, which its steps that wait for it receive. False when it has one with this key.

        Without a key each call is a signal of its own.

        Raises:
            NotFound: there is no such run.
            Conflict: it has ended, or has another signal with this key.
            InvalidInput: the name or the key is empty or too long.
        """
        ...

    async def retry(
        self,
        principal: Principal,
        run_id: str,
        *,
        from_step: str | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Accept a new run with the recorded results of an ended one's steps before `from_step`; its id.

        The rest is executed, as the caller. Budget, tokens and deadline count anew.

        Raises:
            NotFound: no such run, or no such step in it.
            Conflict: it has not ended; none of its steps failed and none is named; or the key was used for
                another run.
        """
        ...

    async def purge(self, principal: Principal, request: PurgeRequest) -> Purged:
        """Remove runs that have ended. Runs that are alive stay, and those that an unfinished run names.

        Raises:
            InvalidInput: neither the request nor the settings say which.
            Forbidden: the runs are another tenant's, and the caller is no administrator.
        """
        ...

    def events(self, principal: Principal, run_id: str, *, after: int = 0) -> AsyncIterator[RunEvent]:
        """Events with a sequence number above `after`, then new ones until the run has ended."""
        ...
