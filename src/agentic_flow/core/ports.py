"""The Protocols through which services meet. A service gets its neighbours here, never by import.

Every implementation, in process or over HTTP, passes the same contract suite
(`agentic_flow.testing.contracts`). Tenants are mandatory arguments, never filters.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    ModelInfo,
    StreamEvent,
    ToolSpec,
)
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    NamespaceStats,
    Page,
    Quantization,
    SearchQuery,
    SearchResult,
    UpsertResult,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Completer(Protocol):
    """Answers model calls. The gateway is one; so is its HTTP twin."""

    async def complete(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> Completion:
        """One whole answer.

        Raises:
            UnknownModel: no configured provider serves `request.model`.
            ProviderError: the provider failed after the bounded retries.
            DeadlineExceeded: no answer in time.
        """
        ...

    def stream(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """The answer as it comes; the last event is StreamEnd, or an error is raised."""
        ...

    async def resolve(self, model: str | None, *, principal: Principal) -> ModelInfo:
        """The model that would serve this name now (None: the default one); its `id` is what to ask for.

        Raises:
            UnknownModel: nothing configured serves it.
        """
        ...

    async def models(self, *, principal: Principal) -> list[ModelInfo]:
        """The models that can be asked now, the default one first."""
        ...


class Embedder(Protocol):
    """Turns texts into vectors. `id` names model, version and dimension: equal ids, comparable vectors."""

    @property
    def id(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def semantic(self) -> bool:
        """Whether closeness means likeness of meaning, not only of spelling."""
        ...

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        """Unit vectors of shape (len(texts), dimension)."""
        ...


class VectorStore(Protocol):
    """Namespaces of items with vectors, text and metadata; writes are durable when they return."""

    async def create_namespace(
        self,
        tenant: str,
        name: str,
        *,
        metric: Metric = "cosine",
        dimension: int | None = None,
        embedder_id: str | None = None,
        quantization: Quantization | None = None,
    ) -> Namespace:
        """Create it, or return it when it exists with the same settings (else Conflict).

        Without `dimension` the store's embedder serves the namespace; with one, callers bring vectors, made
        by the embedder they may name. By default the store's vectors are kept as f16, callers' as f32.
        """
        ...

    async def namespaces(self, tenant: str) -> list[Namespace]: ...

    async def check(self) -> None:
        """Return when it can be read, and written to as far as it knows. Raises Unavailable, StorageFull."""
        ...

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        """Whether there was one to delete."""
        ...

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
        embedder_id: str | None = None,
    ) -> UpsertResult:
        """Insert or replace: all of the items or none.

        `embedder_id` says what made the items' vectors; one that is not the namespace's is refused.
        """
        ...

    async def restore(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        documents: Mapping[str, Fingerprint] | None = None,
    ) -> int:
        """Store items exactly as they are: version, times, vector and document included; how many.

        For import and migration, into a namespace whose rows nobody else writes. An item's `document` must be
        one that `documents` gives or that the namespace has.
        """
        ...

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        """The items that exist, in the order asked."""
        ...

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        """How many existed."""
        ...

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int: ...

    async def list_items(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
        vectors: bool = False,
    ) -> Page:
        """One page in id order. `vectors`: also those that the store's embedder made."""
        ...

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult: ...

    async def search_many(
        self, tenant: str, namespace: str, queries: Sequence[SearchQuery]
    ) -> list[SearchResult]:
        """Every query answered from one snapshot; cheaper than one call each."""
        ...

    async def stats(self, tenant: str) -> list[NamespaceStats]:
        """The tenant's namespaces by name, with sizes and the state of their indexes."""
        ...

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        """Replace each document's chunks, all in one transaction. Returns the number of chunks stored.

        A document without chunks whose hash is the stored one keeps its chunks: only its times are new.
        """
        ...

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        """Path → fingerprint of every document of the namespace."""
        ...

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int: ...

    async def erase_tenant(self, tenant: str) -> int:
        """Remove everything of a tenant; returns the number of items removed."""
        ...

    async def tenants_with(self, namespace: str) -> list[str]:
        """Tenants that have a namespace of this name, by name: for a service that finds its work again.

        Over HTTP only the operator (scope `platform:admin`) is told of other tenants than its own.
        """
        ...


class LeftArtifact(Protocol):
    """What became of an artifact that a step leaves. `is_new` False: its newest version is the same."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def media_type(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def is_new(self) -> bool: ...


class RunArtifacts(Protocol):
    """The artifacts of a run, as one step of it reads and leaves them."""

    @property
    def max_bytes(self) -> int:
        """Of one artifact."""
        ...

    async def every(self) -> list[ArtifactRecord]:
        """What is stored, every version, in order of storing."""
        ...

    async def content(self, record: ArtifactRecord) -> bytes: ...

    async def leave(self, artifact: NewArtifact, *, expected_version: int | None = None) -> LeftArtifact:
        """Leave something, stored when the step is, as the next version of its name.

        Args:
            artifact: The name, the media type and the bytes.
            expected_version: The version that is there; 0: none. None: whatever this agent itself left.

        Raises:
            InvalidInput: the name is none.
            TooLarge, LimitExceeded: it, or all of the run, are more than may be.
            Conflict: another version is there than was expected.
        """
        ...


@dataclass(frozen=True, slots=True)
class ToolScope:
    """What the tools of one run (or one caller) may touch.

    `roots` maps the name a model uses for a folder to the real folder; a path a tool takes is
    `ROOTNAME/relative/path`, or just `relative/path` while there is a single root. `paths_allowed` and
    `paths_forbidden` are gitignore-style patterns against that relative path; forbidden wins.
    `tools_allowed` None means every tool that policy allows. `namespace` is the memory of the run, `board`
    the blackboard that its agent shares with others, `artifacts` what the run leaves, as the step that calls
    sees it; None: it has none.
    """

    roots: Mapping[str, Path] = field(default_factory=dict[str, Path])
    paths_allowed: tuple[str, ...] = ()
    paths_forbidden: tuple[str, ...] = ()
    tools_allowed: frozenset[str] | None = None
    namespace: str | None = None
    run_id: str | None = None
    agent: str | None = None
    board: str | None = None
    artifacts: RunArtifacts | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returned: a JSON object within the size limit, `truncated` when the rest was cut."""

    content: JsonObject
    is_error: bool = False
    truncated: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Approval:
    """What somebody said to a tool call for which the policy asks. `by` None: nobody answered in time."""

    granted: bool
    by: str | None


class ToolBox(Protocol):
    """Validates, authorises, runs and audits tool calls. MCP, agents and the CLI use this one call."""

    def specs(self, principal: Principal, scope: ToolScope) -> list[ToolSpec]:
        """The tools this principal may call in this scope, in name order."""
        ...

    def asks(
        self, principal: Principal, name: str, arguments: Mapping[str, Any], scope: ToolScope
    ) -> JsonObject | None:
        """What to show to whoever must say yes to this call: `{"tool": …, "arguments": …, "reason": …}`; None
        where it needs no yes. Wrong calls need none: they are refused anyway."""
        ...

    async def call(
        self,
        principal: Principal,
        name: str,
        arguments: Mapping[str, Any],
        *,
        deadline: Deadline,
        scope: ToolScope,
        idempotency_key: str | None = None,
        approval: Approval | None = None,
    ) -> ToolResult:
        """Run one tool. A refused or failed call is a result with `is_error`, which a model can read.

        Args:
            principal: Who calls.
            name: The tool.
            arguments: For it.
            deadline: When it must have ended.
            scope: What it may touch.
            idempotency_key: The same for a call that is made again.
            approval: What somebody said to it, where `asks` says that this is needed.

        Raises:
            NotFound: no tool has this name in this scope.
            Unavailable: a service of ours that the tool needs is away (`peer`).
        """
        ...


StepFunction = Callable[["StepContext"], Awaitable[JsonObject]]
Workflow = Callable[["WorkflowContext", JsonObject], Awaitable[JsonObject]]

RunState = Literal["queued", "running", "paused", "interrupted", "completed", "failed", "cancelled"]
"""`paused`: held before its next step until somebody lets it go on. `interrupted`: accepted and unfinished,
and the process that ran it is gone; it can be resumed."""


@dataclass(frozen=True)
class NewArtifact:
    """Bytes under a name that a step leaves besides its result."""

    name: str
    media_type: str
    content: bytes

    @cached_property
    def sha256(self) -> str:
        """Digest of the bytes, in hexadecimal digits; made once, because it takes its time."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class StepContext:
    """Given to a step while it executes.

    `idempotency_key` is the same on every attempt of this step. `artifacts`: what it appends here is stored
    together with its result (of a name the last), or, if it fails or another process has its workflow by
    then, not at all.
    """

    idempotency_key: str
    artifacts: list[NewArtifact] = field(default_factory=list[NewArtifact])


class WorkflowContext(Protocol):
    """What a workflow may do besides pure computing. Everything else belongs inside a step."""

    @property
    def workflow_id(self) -> str: ...

    async def step(self, name: str, function: StepFunction) -> JsonObject:
        """Run `function` once, record its result durably, and return the record on every replay.

        An AgenticFlowError raised by it is recorded as well and raised again on replay.
        """
        ...

    async def children(self, name: str, payloads: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
        """Run one child workflow per key in parallel, each with the id `{workflow_id}.{key}`; all results.

        A failed child yields `{"error": problem}` instead of a result: one agent's failure is data.

        Args:
            name: Of the workflow that each child is.
            payloads: By key: words without a dot, each used once in the life of this workflow.

        Raises:
            InvalidInput: a key was used before; nothing was begun.
        """
        ...

    async def receive(
        self, topic: str, *, timeout_s: float | None = None, default: JsonObject | None = None
    ) -> JsonObject:
        """The payload of the oldest message of this topic that this workflow has not had yet; recorded.

        It waits through restarts: the deadline is recorded when the wait begins. Meanwhile the workflow needs
        none of the places of its process. A child receives what is sent to its top-level workflow; every
        workflow of a tree reads all of its messages.

        Args:
            topic: What the message must be about.
            timeout_s: So long it waits; None: for ever.
            default: The payload to go on with when none came.

        Raises:
            DeadlineExceeded: none came in time, and there is no default.
        """
        ...

    async def ask(
        self,
        question: str,
        *,
        options: Sequence[str] = (),
        timeout_s: float | None = None,
        default: str | None = None,
        scope: str | None = None,
    ) -> JsonObject:
        """Ask a person, and wait as `receive` does: `{"answer": …, "by": sender, "timed_out": false}`.

        Args:
            question: What to ask.
            options: The only answers that are taken; empty: any text.
            timeout_s: So long it waits; None: for ever.
            default: The answer to go on with when none came.
            scope: What whoever answers must hold; None: what answers need anyway.

        Raises:
            InvalidInput: no question, or a default that is no option.
            DeadlineExceeded: nobody answered in time, and there is no default.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One recorded step of a workflow, in order."""

    workflow_id: str
    index: int
    name: str
    output: JsonObject | None
    error: JsonObject | None
    started_at_s: float | None
    completed_at_s: float | None


EventKind = Literal[
    "accepted",
    "started",
    "step_finished",
    "child_started",
    "child_ended",
    "taken_over",
    "handed_back",
    "given_up",
    "cancelled",
    "paused",
    "unpaused",
    "message",
    "question",
    "ended",
]


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened in a workflow or below it. `sequence` counts from 1 without gaps.

    `agent` is the part of the workflow's id below the top-level one, "" for that itself; `name` is the step's
    or the workflow's. `data`: `retry_of` and `from_step` of an `accepted` that is a retry (events of what it
    keeps follow it, with their first times); `index` and perhaps `error` of a step; `state` (and a child's
    `error`) of an end; `asked` (somebody resumed it) and `epoch` of `taken_over` and, unless its process let
    it go on purpose, of `handed_back` (it waits in its shared queue again); `by` of `paused` and `unpaused`;
    `key` and `sender` of a `message`, whose name is its topic; `id`, `text`, `options`, `default` and
    `until_s` of a `question`.
    """

    workflow_id: str
    sequence: int
    kind: EventKind
    at_s: float
    agent: str
    name: str
    data: JsonObject


@dataclass(frozen=True, slots=True)
class MessageRecord:
    """A message to a top-level workflow."""

    workflow_id: str
    topic: str
    key: str
    payload: JsonObject
    sender: str
    at_s: float


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """Bytes that a step of a tree has left, without the bytes.

    `index` and `step` are those of the step; `number` is its own in the tree, in order of storing; `version`
    counts those of its name, from 1.
    """

    workflow_id: str
    index: int
    step: str
    number: int
    name: str
    version: int
    media_type: str
    size_bytes: int
    sha256: str
    created_at_s: float


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """One workflow as the store has it; `state` is derived from the store and the owner's lease."""

    workflow_id: str
    name: str
    tenant: str
    state: RunState
    payload: JsonObject
    output: JsonObject | None
    error: JsonObject | None
    created_at_s: float
    updated_at_s: float
    owner: str | None
    queue: str | None = None
    """The shared queue it was put into."""
    priority: int = 0
    not_before_s: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How a queue stands: the signal to scale workers by.

    Args:
        queue: Its name.
        waiting: Runs that may begin and wait for a worker.
        oldest_s: Since how many seconds the oldest of them waits; 0 when none does.
        delayed: Runs that may not begin yet: before a time, or before other runs have ended.
        running: Unfinished runs that processes have taken from it.
    """

    queue: str
    waiting: int
    oldest_s: float
    delayed: int
    running: int


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """How a process that executes workflows is.

    Args:
        database: Whether the run database answers now.
        heartbeat: Whether the database has a sign of life of this process that is younger than its lease.
    """

    database: bool
    heartbeat: bool


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What was removed of ended workflows, or would be (`dry_run`).

    `runs` are top-level workflows, `agents` those below them, `artifacts` all their versions; `size_bytes`
    counts stored text and the bytes of artifacts.
    """

    runs: int = 0
    agents: int = 0
    steps: int = 0
    events: int = 0
    messages: int = 0
    artifacts: int = 0
    size_bytes: int = 0
    dry_run: bool = False


class RunEngine(Protocol):
    """Durable workflows: a recorded step never runs again, an accepted workflow is never lost."""

    def register(self, name: str, workflow: Workflow) -> None:
        """Make a workflow known under a stable name, before `open`."""
        ...

    def open(
        self, *, takeover: bool = False, queues: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[None]:
        """Connect and start; on exit, stop taking work and let go of what was not finished.

        What came from a shared queue goes back to it on exit, for others to go on with at once.

        Args:
            takeover: Continue, now and later, every workflow whose owner has died; one that came from a
                shared queue goes back to it instead.
            queues: Shared queues that this process takes workflows from while it has free places.
        """
        ...

    async def start(
        self,
        name: str,
        workflow_id: str,
        payload: JsonObject,
        *,
        tenant: str,
        queue: str | None = None,
        priority: int = 0,
        not_before_s: float | None = None,
        deadline_s: float | None = None,
        after: Sequence[str] = (),
        after_any_end: bool = False,
    ) -> bool:
        """Accept a workflow durably, and begin it here unless it is to wait in a shared queue.

        Args:
            name: A registered workflow.
            workflow_id: Its id; it must contain no dot.
            payload: What it is given.
            tenant: Whose it is.
            queue: The shared queue, from which a process that works for it takes it. None: this process
                executes it; if it has no places at all it goes to the queue `default`.
            priority: -100 to 100; high ones go first.
            not_before_s: It is not begun before, in seconds since 1970; without a queue it goes to `default`.
            deadline_s: From this time on it is not begun any more, but fails, in seconds since 1970.
            after: Top-level workflows of this tenant. It is not begun, and takes no place, before all of them
                have completed; when one fails, is cancelled or given up instead, it fails.
            after_any_end: It is enough that they end, in whichever way.

        Returns:
            False when this id was accepted before.

        Raises:
            InvalidInput: the priority is out of range.
            NotFound: one of `after` is no workflow of the tenant.
        """
        ...

    async def drain(self, timeout_s: float) -> int:
        """Take no more from queues, begin nothing more, and let what works end; how many did not.

        What is unfinished then is let go when the engine is closed. Those that wait for messages are not
        waited for.

        Args:
            timeout_s: So long it may take.
        """
        ...

    @property
    def working(self) -> int:
        """Top-level workflows that have a place in this process now."""
        ...

    async def health(self) -> EngineHealth:
        """How this process is; answered within seconds also when the database is away."""
        ...

    async def is_served(self, queue: str) -> bool:
        """Whether a process that lives, this one or another, takes workflows from this shared queue."""
        ...

    async def queue_depths(self) -> list[QueueDepth]:
        """Every shared queue that has unfinished workflows, by name."""
        ...

    async def wait(self, workflow_id: str) -> WorkflowRecord:
        """Return when it has ended."""
        ...

    async def get(self, workflow_id: str) -> WorkflowRecord | None: ...

    async def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[WorkflowRecord]:
        """Newest first."""
        ...

    async def steps(self, workflow_id: str) -> list[StepRecord]:
        """Recorded steps of the workflow and of its children, in order of completion."""
        ...

    async def events(self, workflow_id: str, after: int = 0) -> list[EventRecord]:
        """What happened in a top-level workflow and below it, with a sequence number above `after`, in order.

        An event is stored together with what it tells of: whoever has seen number n misses nothing by asking
        for those above n, in whichever process.
        """
        ...

    async def artifacts(self, workflow_id: str) -> list[ArtifactRecord]:
        """What steps of the workflow and of its children have left, every version, in order of storing."""
        ...

    async def artifact_content(self, workflow_id: str, number: int) -> bytes | None:
        """The bytes of one of them, or None when the tree has none of this number.

        Raises:
            DataCorrupted: they are not those that were stored.
        """
        ...

    async def send(
        self,
        workflow_id: str,
        topic: str,
        payload: JsonObject,
        *,
        key: str,
        sender: str = "",
        before_s: float | None = None,
    ) -> bool:
        """Store a message for a top-level workflow, in whichever process it runs. False when it has the key.

        Args:
            workflow_id: The workflow.
            topic: What the message is about.
            payload: What it says.
            key: Its name among those of the topic: to send it again does nothing.
            sender: Who sends it.
            before_s: Refuse it from this time on, in seconds since 1970.

        Raises:
            NotFound: there is no such workflow.
            Conflict: it has another message with this key, or has ended.
            DeadlineExceeded: it is too late.
            InvalidInput: the topic or the key is empty or too long, or the payload too large.
            LimitExceeded: it has too many messages.
        """
        ...

    async def pause(self, workflow_id: str, *, by: str = "") -> bool:
        """Hold a top-level workflow, and all below it, before the next step of each; durably.

        Steps under way end and are recorded. Who takes it over holds it as well. False when it has ended or
        was paused already.

        Raises:
            NotFound: there is no such workflow.
        """
        ...

    async def unpause(self, workflow_id: str, *, by: str = "") -> bool:
        """Let it go on. False when it was not paused.

        Raises:
            NotFound: there is no such workflow.
        """
        ...

    async def messages(self, workflow_id: str) -> list[MessageRecord]:
        """All messages that were sent to a top-level workflow, in order."""
        ...

    async def resume(self, workflow_id: str) -> bool:
        """Continue an interrupted or cancelled workflow here. False when it ended or is alive elsewhere."""
        ...

    async def resume_interrupted(self) -> list[str]:
        """Take over every unfinished workflow whose owner is dead; returns their ids."""
        ...

    async def cancel(self, workflow_id: str) -> bool:
        """Cancel it and its children. False when it had already ended."""
        ...

    async def retry(
        self, workflow_id: str, new_id: str, payload: JsonObject, *, from_step: str | None = None
    ) -> bool:
        """Accept a new workflow that has the records of an ended one before a step, and begin it here.

        What is recorded of those steps and children is not done again. False when the new id is taken.

        Args:
            workflow_id: The one that has ended; top-level.
            new_id: The new one's id.
            payload: Its input; the kept records must fit it.
            from_step: The step, or the key of the child, that is done again, and what came after it; `name`
                stands for children `name-1`, `name-2`, … too. None: the first that did not complete; of a
                cancelled workflow also what it had not recorded yet.

        Raises:
            NotFound: there is no such workflow, or no such step in it.
            Conflict: it has not ended, or none of its steps failed and none is named.
        """
        ...

    async def purge(
        self, tenant: str, *, older_than_s: float | None, keep_bytes: int | None, dry_run: bool = False
    ) -> PurgeReport:
        """Remove top-level workflows of a tenant that have ended, with all that is stored of them.

        One that is named in the payload of an unfinished workflow of the tenant stays.

        Args:
            tenant: Whose.
            older_than_s: Those that ended so long ago.
            keep_bytes: The oldest of those that ended, so that the rest takes no more.
            dry_run: Only tell what would go.
        """
        ...


class Bus(Protocol):
    """Publishes events to whoever listens; delivery is the subscriber's business, truth lives elsewhere."""

    async def publish(self, subject: str, payload: JsonObject) -> None: ...

    def subscribe(self, subject: str) -> AsyncIterator[JsonObject]: ...
