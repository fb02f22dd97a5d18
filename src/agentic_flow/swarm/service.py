"""The swarm coordinator: accepts runs, shows them, cancels and resumes them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import structlog

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    Forbidden,
    InvalidInput,
    NeedsNewer,
    NotFound,
    Unavailable,
    as_problem,
)
from agentic_flow.core.messages import Completion, JsonObject, ModelInfo
from agentic_flow.core.ports import (
    ArtifactRecord,
    Completer,
    EngineHealth,
    EventRecord,
    QueueDepth,
    RunEngine,
    RunState,
    StepRecord,
    ToolBox,
    ToolScope,
    VectorStore,
    WorkflowRecord,
)
from agentic_flow.core.settings import AgentDBSettings, SwarmSettings
from agentic_flow.memory.answers import MemoryService
from agentic_flow.swarm.acceptance import Acceptance
from agentic_flow.swarm.admission import check_criteria, check_spec, check_tools
from agentic_flow.swarm.agent_loop import AgentLoop, PydanticAgentLoop
from agentic_flow.swarm.artifacts import newest, version_of
from agentic_flow.swarm.blackboard import clear_boards
from agentic_flow.swarm.definitions import AgentDefinition, DefinitionCatalog
from agentic_flow.swarm.experience import RunExperience, Shown, memory_of
from agentic_flow.swarm.heartbeat import keep
from agentic_flow.swarm.inputs import Folder, Inputs
from agentic_flow.swarm.member import Budgets, Members
from agentic_flow.swarm.payloads import RUN, Brief, RunPayload, from_record
from agentic_flow.swarm.questions import ANSWER, QUESTION, SIGNAL, Question, check_answer, questions_of
from agentic_flow.swarm.retention import kept_by
from agentic_flow.swarm.runs import (
    AgentReport,
    Artifact,
    ArtifactContent,
    Purged,
    PurgeRequest,
    RoleChoice,
    RunEvent,
    RunEventKind,
    RunResult,
    RunSpec,
    RunStep,
    RunUsage,
)
from agentic_flow.swarm.schedule_store import ScheduleStore
from agentic_flow.swarm.scheduler import Scheduler
from agentic_flow.swarm.scheduling import DEFAULT_QUEUE
from agentic_flow.swarm.team import DEFAULT_TOOLS, Team
from agentic_flow.swarm.topology import Assignment, Role
from agentic_flow.swarm.tracing import accepting
from agentic_flow.swarm.workflow_admission import WorkflowAdmission
from agentic_flow.swarm.workflow_run import WORKFLOW, WorkflowPayload, Workflows
from agentic_flow.swarm.workflow_spec import Validation, WorkflowRequest, WorkflowSource

log = structlog.get_logger()

PLAYED_BY: dict[Role, str] = {
    "planner": "planner",
    "worker": "researcher",
    "reviewer": "reviewer",
    "synthesizer": "synthesizer",
}
"""Which agent definition plays which role of a topology."""

_ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})
_POLL_S = 0.25
_SCHEDULES_S = 1.0
_INGEST_EVENT_INTERVAL_S = 0.1


class Swarm:
    """Runs of agent teams over the ports of their neighbours.

    Args:
        settings: The `swarm` section.
        completer: Model calls.
        store: What the inputs are read into.
        memory: What runs learn from and leave their trajectories in.
        memory_enabled: Whether they do.
        toolbox: Tools of the agents.
        engine: Durable workflows; this service registers its own with it.
        catalog: Agent definitions.
        schedules: Where the schedules are.
        ingest_settings: The `agentdb` section: how folders are read.
        stream: Whether agents' model calls use the provider's streaming format.
        tool_timeout_s: Deadline of one tool call.
        approval_timeout_s: So long a tool call waits for the yes that the policy asks for.
        loop: The agent loop.
    """

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        completer: Completer,
        store: VectorStore,
        memory: MemoryService,
        toolbox: ToolBox,
        engine: RunEngine,
        catalog: DefinitionCatalog,
        schedules: ScheduleStore,
        ingest_settings: AgentDBSettings,
        memory_enabled: bool = True,
        stream: bool = True,
        tool_timeout_s: float = 30.0,
        approval_timeout_s: float = 900.0,
        loop: AgentLoop | None = None,
    ) -> None:
        self._settings = settings
        self._completer = completer
        self._engine = engine
        self._store = store
        self._catalog = catalog
        self._experience = RunExperience(memory, engine, enabled=memory_enabled)
        self._firing: asyncio.Task[None] | None = None
        self._ingest_progress: dict[str, tuple[int, int]] = {}
        self._toolbox = toolbox
        budgets = Budgets(settings, completer, engine)
        self._members = Members(
            settings,
            completer=completer,
            toolbox=toolbox,
            engine=engine,
            budgets=budgets,
            loop=loop or PydanticAgentLoop(),
            stream=stream,
            tool_timeout_s=tool_timeout_s,
            approval_timeout_s=approval_timeout_s,
        )
        inputs = Inputs(store, ingest_settings)
        self._workflows = Workflows(
            settings,
            engine=engine,
            toolbox=toolbox,
            inputs=inputs,
            budgets=budgets,
            tool_timeout_s=tool_timeout_s,
            approval_timeout_s=approval_timeout_s,
            on_ingest=self._note_ingest,
        )
        self._admission = WorkflowAdmission(
            settings,
            completer=completer,
            toolbox=toolbox,
            catalog=catalog,
            briefs=self._briefs,
            brief=self._brief,
            permit=self._check_inputs,
        )
        self._schedule_store = schedules
        self.schedules = Scheduler(
            schedules, admit=self._admission.admit, submit=self.submit_workflow, state_of=self._state_of
        )
        self._team = Team(
            settings,
            engine=engine,
            inputs=inputs,
            experience=self._experience,
            budgets=budgets,
            acceptance=Acceptance(toolbox, budgets, tool_timeout_s=tool_timeout_s),
            on_ingest=self._note_ingest,
        )

    @asynccontextmanager
    async def open(self, *, takeover: bool = False) -> AsyncGenerator[Swarm]:
        """Start working.

        With `takeover` it continues interrupted runs, now and whenever one appears, takes runs from the
        shared queues of the setting `swarm.queues`, and makes the runs of schedules.
        """
        async with self._engine.open(takeover=takeover, queues=self._settings.queues if takeover else ()):
            if not takeover:
                yield self
                return
            with self._schedule_store.open():
                self._firing = keep(_SCHEDULES_S, self.schedules.fire_due)
                try:
                    yield self
                finally:
                    await self._fire_no_more()

    async def _fire_no_more(self) -> None:
        if (firing := self._firing) is not None:
            self._firing = None
            firing.cancel()
            await asyncio.wait([firing])

    async def drain(self, timeout_s: float) -> int:
        """Begin no more runs and let those at work end; how many are left to others. See RunEngine."""
        await self._fire_no_more()
        return await self._engine.drain(timeout_s)

    @property
    def working(self) -> int:
        """How many runs have a place in this process now. See RunEngine."""
        return self._engine.working

    async def health(self) -> EngineHealth:
        """How this process is. See RunEngine."""
        return await self._engine.health()

    async def check_served(self, queue: str) -> None:
        """Refuse a queue from which no process that lives takes runs.

        Raises:
            Unavailable: there is none.
        """
        if not await self._engine.is_served(queue):
            raise Unavailable(
                f"no process takes runs from the queue {queue!r}",
                hint=f"start `agentic-flow worker --queue {queue}` or a server on this run database",
            )

    async def queue_of_detached(self, queue: str | None) -> str:
        """The queue of a run that another process is to do, by default `DEFAULT_QUEUE`.

        Raises:
            Unavailable: see `check_served`.
        """
        queue = queue or DEFAULT_QUEUE
        await self.check_served(queue)
        return queue

    async def queue_depths(self) -> list[QueueDepth]:
        """How the shared queues stand. See RunEngine."""
        return await self._engine.queue_depths()

    async def submit(self, principal: Principal, spec: RunSpec, *, idempotency_key: str | None = None) -> str:
        """See RunService. Everything that can be refused is refused before anything is stored."""
        principal.demand("runs:write")
        check_spec(spec, self._settings)
        self._check_inputs(principal, spec)
        check_tools(spec, [tool.name for tool in self._toolbox.specs(principal, ToolScope())])
        folder = await asyncio.to_thread(Folder.of, spec) if spec.inputs else None
        default = await self._completer.resolve(spec.model, principal=principal)
        briefs = await self._briefs(spec, default, principal)
        check_criteria(spec, briefs)
        payload = RunPayload(
            spec=spec,
            subject=principal.subject,
            tenant=principal.tenant,
            scopes=tuple(sorted(principal.scopes)),
            folder=folder.as_json() if folder else None,
            briefs=briefs,
            started_at_s=time.time(),
        )
        run_id = _run_id(principal.tenant, idempotency_key)
        with accepting(run_id) as traceparent:
            accepted = await self._engine.start(
                RUN,
                run_id,
                payload.model_copy(update={"traceparent": traceparent}).model_dump(mode="json"),
                tenant=principal.tenant,
                queue=spec.queue,
                priority=spec.priority,
                deadline_s=None if spec.deadline_s is None else payload.started_at_s + spec.deadline_s,
                after=spec.after,
                after_any_end=spec.after_any_end,
            )
        if not accepted:
            record = await self._record(principal, run_id)
            if record.name != RUN or not _is_same(record.payload.get("spec"), spec):
                raise _other_run(idempotency_key, run_id)
        return run_id

    async def validate_workflow(self, principal: Principal, source: WorkflowSource) -> Validation:
        """See RunService."""
        principal.demand("runs:read")
        return await self._admission.validate(principal, source)

    async def submit_workflow(
        self, principal: Principal, request: WorkflowRequest, *, idempotency_key: str | None = None
    ) -> str:
        """See RunService. As with runs, what can be refused is refused before anything is stored."""
        principal.demand("runs:write")
        payload = await self._admission.admit(principal, request, time.time())
        run_id = _run_id(principal.tenant, idempotency_key)
        deadline_s = payload.workflow.deadline_s
        with accepting(run_id) as traceparent:
            run = payload.run.model_copy(update={"traceparent": traceparent})
            accepted = await self._engine.start(
                WORKFLOW,
                run_id,
                payload.model_copy(update={"run": run}).model_dump(mode="json"),
                tenant=principal.tenant,
                queue=request.queue,
                priority=request.priority,
                deadline_s=None if deadline_s is None else payload.run.started_at_s + deadline_s,
                after=request.after,
                after_any_end=request.after_any_end,
            )
        if not accepted:
            record = await self._record(principal, run_id)
            if record.name != WORKFLOW:
                raise _other_run(idempotency_key, run_id)
            known = WorkflowPayload.from_record(record.payload, keep=False)
            before = (known.run.spec.after, known.run.spec.after_any_end)
            same = before == (request.after, request.after_any_end)
            if not same or (known.workflow, known.inputs) != (payload.workflow, payload.inputs):
                raise _other_run(idempotency_key, run_id)
        return run_id

    async def wait(self, principal: Principal, run_id: str) -> RunResult:
        await self._record(principal, run_id)
        return await self._result(await self._engine.wait(run_id))

    async def show(self, principal: Principal, run_id: str) -> RunResult:
        return await self._result(await self._record(principal, run_id))

    async def list_runs(
        self, principal: Principal, *, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[RunResult]:
        principal.demand("runs:read")
        records: list[WorkflowRecord] = []
        for name in (RUN, WORKFLOW):
            records += await self._engine.list_workflows(
                principal.tenant, name=name, states=states, limit=limit
            )
        records.sort(key=lambda record: record.created_at_s, reverse=True)
        return [summary_of(record) for record in records[:limit]]

    async def steps(self, principal: Principal, run_id: str) -> list[RunStep]:
        await self._record(principal, run_id)
        return [_step(run_id, step) for step in await self._engine.steps(run_id)]

    async def artifacts(self, principal: Principal, run_id: str, *, versions: bool = False) -> list[Artifact]:
        """See RunService."""
        await self._record(principal, run_id)
        found = await self._engine.artifacts(run_id)
        return [_artifact(run_id, one) for one in (found if versions else newest(found))]

    async def artifact(
        self, principal: Principal, run_id: str, name: str, *, version: int | None = None
    ) -> ArtifactContent:
        """See RunService."""
        await self._record(principal, run_id)
        found = version_of(await self._engine.artifacts(run_id), name, version)
        data = await self._engine.artifact_content(run_id, found.number)
        if data is None:  # removed, between the two
            raise _no_run(run_id)
        return ArtifactContent(artifact=_artifact(run_id, found), data=data)

    async def questions(self, principal: Principal, run_id: str) -> list[Question]:
        """See RunService."""
        await self._record(principal, run_id)
        steps = await self._engine.steps(run_id)
        ended: set[str] = set()
        for asking in {step.workflow_id for step in steps if step.name.startswith(QUESTION)}:
            record = await self._engine.get(asking)
            if record is None or record.state in _ENDED:
                ended.add(asking)
        messages = await self._engine.messages(run_id)
        return questions_of(run_id, steps, messages, now_s=time.time(), ended=ended)

    async def answer(self, principal: Principal, run_id: str, question_id: str, answer: str) -> bool:
        """See RunService."""
        principal.demand("runs:write")
        asked = await self.questions(principal, run_id)
        question = next((one for one in asked if one.id == question_id), None)
        if question is None:
            raise NotFound(
                f"run {run_id!r} has asked no question {question_id!r}",
                hint=f"list them with `agentic-flow runs questions {run_id}`",
            )
        if question.scope is not None and not principal.allows("platform:admin"):
            principal.demand(question.scope)
        check_answer(question, answer)
        return await self._engine.send(
            run_id,
            f"{ANSWER}{question_id}",
            {"answer": answer},
            key="answer",
            sender=principal.subject,
            before_s=question.until_s,
        )

    async def resume(self, principal: Principal, run_id: str) -> bool:
        """See RunService.

        Raises:
            NeedsNewer: this build cannot go on with it.
        """
        principal.demand("runs:write")
        record = await self._record(principal, run_id)
        if record.state not in _ENDED:
            _run_payload(record)
        was_paused = await self._engine.unpause(run_id, by=principal.subject)
        return await self._engine.resume(run_id) or was_paused

    async def pause(self, principal: Principal, run_id: str) -> bool:
        """See RunService."""
        principal.demand("runs:write")
        await self._record(principal, run_id)
        return await self._engine.pause(run_id, by=principal.subject)

    async def cancel(self, principal: Principal, run_id: str) -> bool:
        principal.demand("runs:write")
        record = await self._record(principal, run_id)
        cancelled = await self._engine.cancel(run_id)
        if cancelled:
            await self._keep_cancelled(record)
        return cancelled

    async def signal(
        self, principal: Principal, run_id: str, name: str, value: Any = None, *, key: str | None = None
    ) -> bool:
        """See RunService."""
        principal.demand("runs:write")
        await self._record(principal, run_id)
        if not name or (key is not None and not key):
            raise InvalidInput(f"the signal {name!r} with key {key!r}", hint="give both a name, or no key")
        return await self._engine.send(
            run_id,
            f"{SIGNAL}{name}",
            {"value": value, "by": principal.subject},
            key=key or secrets.token_hex(16),
            sender=principal.subject,
        )

    async def retry(
        self,
        principal: Principal,
        run_id: str,
        *,
        from_step: str | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """See RunService."""
        principal.demand("runs:write")
        record = await self._record(principal, run_id)
        old = _run_payload(record)
        self._check_inputs(principal, old.spec)
        new_id = _run_id(principal.tenant, idempotency_key)
        with accepting(new_id) as traceparent:
            new = old.model_copy(
                update={
                    "subject": principal.subject,
                    "scopes": tuple(sorted(principal.scopes)),
                    "started_at_s": time.time(),
                    "retry_of": run_id,
                    "retry_from": from_step,
                    "traceparent": traceparent,
                    "retry_traceparent": old.traceparent,
                }
            ).model_dump(mode="json")
            payload = record.payload | {"run": new} if record.name == WORKFLOW else new
            accepted = await self._engine.retry(run_id, new_id, payload, from_step=from_step)
        if not accepted:
            known = _run_payload(await self._record(principal, new_id))
            if (known.retry_of, known.retry_from) != (run_id, from_step):
                raise _other_run(idempotency_key, new_id)
        return new_id

    async def purge(self, principal: Principal, request: PurgeRequest) -> Purged:
        """See RunService."""
        principal.demand("runs:write")
        tenant = request.tenant or principal.tenant
        if tenant != principal.tenant and principal != LOCAL_OWNER:
            principal.demand("platform:admin")
        older_than_s, keep_bytes = request.older_than_s, request.keep_bytes
        if older_than_s is None and keep_bytes is None:
            older_than_s, keep_bytes = kept_by(self._settings)
            if older_than_s is None and keep_bytes is None:
                raise InvalidInput(
                    "nothing says which runs are to go",
                    hint="say how old they must be (--older-than 30d, older_than_s), or set swarm.keep_days",
                )
        found = await self._engine.purge(
            tenant, older_than_s=older_than_s, keep_bytes=keep_bytes, dry_run=request.dry_run
        )
        cleared = 0
        if found.runs and not request.dry_run:
            cleared = await clear_boards(self._store, tenant, self._is_gone)
        return Purged(tenant=tenant, board_entries=cleared, **asdict(found))

    async def _state_of(self, run_id: str) -> RunState | None:
        record = await self._engine.get(run_id)
        return None if record is None else record.state

    async def _is_gone(self, run_id: str) -> bool:
        return await self._engine.get(run_id) is None

    async def events(self, principal: Principal, run_id: str, *, after: int = 0) -> AsyncIterator[RunEvent]:
        shown_ingest: tuple[int, int] | None = None
        has_begun = False
        while True:
            # Read before its events: what they miss of an end that this record tells of, nobody will add.
            record = await self._record(principal, run_id)
            ingest = self._ingest_progress.get(run_id)
            if ingest is not None and ingest != shown_ingest:
                shown_ingest = ingest
                data = {"done": ingest[0], "total": ingest[1]}
                yield RunEvent(sequence=after, kind="ingest_progress", at_s=time.time(), data=data)
            found = await self._engine.events(run_id, after)
            for event in await self._run_events(record, found):
                after = event.sequence
                has_begun = has_begun or event.kind == "step_finished"
                yield event
                if event.kind == "run_finished":
                    return
            if record.state in _ENDED and not found:
                return  # the caller has seen the end
            if not found:
                await asyncio.sleep(_POLL_S if has_begun else _INGEST_EVENT_INTERVAL_S)

    async def _run_events(self, record: WorkflowRecord, found: Sequence[EventRecord]) -> list[RunEvent]:
        """As callers see them; the last is left for later when only a later record can say what it is."""
        assignments: dict[tuple[str, int], JsonObject] = {}
        if any(event.name == "assign" for event in found):
            steps = await self._engine.steps(record.workflow_id)
            assignments = {
                (s.workflow_id, s.index): s.output for s in steps if s.name == "assign" and s.output
            }
        shown: list[RunEvent] = []
        for event in found:
            is_cancelled = event.kind == "cancelled" and not event.agent and event is found[-1]
            if event.kind != "ended" and not is_cancelled:
                shown.append(_run_event(event, assignments))
            elif record.state in _ENDED:
                result = await self._result(record)
                data = {"state": result.state, "error": result.error}
                shown.append(
                    RunEvent(sequence=event.sequence, kind="run_finished", at_s=event.at_s, data=data)
                )
        return shown

    async def _keep_cancelled(self, record: WorkflowRecord) -> None:
        """What a cancelled run did is experience as well; nothing runs in it that could still store that."""
        if record.name != RUN:
            return
        payload = RunPayload.from_record(record.payload)
        steps = await self._engine.steps(record.workflow_id)
        recalled = next((step.output for step in steps if step.name == "recall" and step.output), None)
        try:
            await self._experience.record(
                payload.principal,
                record.workflow_id,
                payload.spec,
                model=payload.briefs["worker"].model,
                started_at_s=payload.started_at_s,
                shown=Shown.from_record(recalled) if recalled else Shown(),
                cited=(),
                result=None,
                failure=None,
                cancelled=True,
            )
        except AgenticFlowError as error:  # it is cancelled all the same
            log.warning("trajectory_not_kept", run_id=record.workflow_id, error=error.message)

    # ---- parts -------------------------------------------------------------------------------------------

    def _note_ingest(self, run_id: str, done: int, total: int) -> None:
        if done >= total:
            self._ingest_progress.pop(run_id, None)
        else:
            self._ingest_progress[run_id] = (done, total)

    def _check_inputs(self, principal: Principal, spec: RunSpec) -> None:
        """A credential of a tenant is no key to this machine's files: only folders opened to callers."""
        if principal == LOCAL_OWNER or principal.allows("platform:admin"):
            return
        roots = [root.resolve() for root in self._settings.input_roots]
        for text in spec.inputs:
            if not any(Path(text).resolve().is_relative_to(root) for root in roots):
                raise Forbidden(
                    f"input {text!r} is outside the folders that callers may name",
                    hint="ask the operator to add it to swarm.input_roots",
                )

    async def _briefs(self, spec: RunSpec, default: ModelInfo, principal: Principal) -> dict[str, Brief]:
        """The personas of the roles, and of the stages of a pipeline, as this run wants them."""
        briefs: dict[str, Brief] = {}
        for role, agent in PLAYED_BY.items():
            choice = spec.roles.get(role, RoleChoice())
            briefs[role] = await self._brief(role, choice.agent or agent, choice, default, principal)
        for number, stage in enumerate(spec.stages, start=1):
            choice = spec.roles.get("worker", RoleChoice())
            briefs[f"stage-{number}"] = await self._brief("worker", stage.agent, choice, default, principal)
        return briefs

    async def _brief(
        self, role: Role, agent: str | None, choice: RoleChoice, default: ModelInfo, principal: Principal
    ) -> Brief:
        definition: AgentDefinition = self._catalog.get(agent or PLAYED_BY[role])
        name = choice.model or (None if definition.model == "inherit" else definition.model)
        model = default if name is None else await self._completer.resolve(name, principal=principal)
        tools = definition.tools if choice.tools is None else choice.tools
        if tools is None:
            tools = DEFAULT_TOOLS if role == "worker" else ()
        return Brief(
            system=definition.prompt, model=model.id, generative=model.generative, tools=tuple(tools)
        )

    async def _record(self, principal: Principal, run_id: str) -> WorkflowRecord:
        principal.demand("runs:read")
        record = await self._engine.get(run_id)
        if record is None or record.tenant != principal.tenant or record.name not in (RUN, WORKFLOW):
            raise _no_run(run_id)
        return record

    async def _result(self, record: WorkflowRecord) -> RunResult:
        if record.state == "completed":
            result = summary_of(record)
        else:
            steps = await self._engine.steps(record.workflow_id)
            events = await self._engine.events(record.workflow_id)
            result = partial_result(record, steps, _ends_of(events))
        left = newest(await self._engine.artifacts(record.workflow_id))
        artifacts = tuple(_artifact(record.workflow_id, one) for one in left)
        return result.model_copy(update={"artifacts": artifacts})


def summary_of(record: WorkflowRecord) -> RunResult:
    """A run without reading its steps: the stored result, or what its specification says."""
    if record.state == "completed" and record.output is not None:
        result = RunResult.from_record(record.output)
    else:
        result = _begun(record)
        kept = (record.error or {}).get("details", {}).get("result")
        if kept is not None and record.error is not None:  # it has an answer that was not accepted
            details = {name: value for name, value in record.error["details"].items() if name != "result"}
            error = record.error | {"details": details}
            result = RunResult.from_record(kept).model_copy(update={"error": error})
    # Read as it is: a list must not check every payload again.
    run: JsonObject = record.payload.get("run", {}) if record.name == WORKFLOW else record.payload
    return result.model_copy(
        update={
            "retry_of": run.get("retry_of"),
            "queue": record.queue,
            "priority": record.priority,
            "after": tuple(run.get("spec", {}).get("after", ())),
            "deadline_at_s": record.deadline_s,
            "created_at_s": record.created_at_s,
            "updated_at_s": record.updated_at_s,
        }
    )


def _begun(record: WorkflowRecord) -> RunResult:
    """A run without a result, as far as it can be read here: a list must show the others as well."""
    error = record.error
    try:
        payload = _run_payload(record)
        goal, topology, model = payload.spec.goal, payload.spec.topology, payload.briefs["worker"].model
    except NeedsNewer as newer:
        goal, topology, model, error = "", _UNREADABLE, _UNREADABLE, error or as_problem(newer)
    return RunResult(
        run_id=record.workflow_id,
        state=record.state,
        goal=goal,
        topology=WORKFLOW if record.name == WORKFLOW else topology,
        model=model,
        answer="",
        error=error,
    )


def _is_same(stored: object, spec: RunSpec) -> bool:
    """Whether a stored specification is this one, as far as this build knows what may be in one."""
    return RunSpec.from_record(stored, keep=False) == spec


def _run_payload(record: WorkflowRecord) -> RunPayload:
    """What a run was accepted with; a workflow's as a whole."""
    return RunPayload.from_record(record.payload["run"] if record.name == WORKFLOW else record.payload)


def partial_result(
    record: WorkflowRecord, steps: Sequence[StepRecord], ends: Mapping[str, JsonObject]
) -> RunResult:
    """What a run without a result has done, from its recorded steps and how its agents ended."""
    base = summary_of(record)
    if base.workflow is not None:
        return base
    assigned: dict[str, Assignment] = {}
    by_agent: dict[str, list[StepRecord]] = {}
    for step in steps:
        if step.workflow_id != record.workflow_id:
            by_agent.setdefault(step.workflow_id.removeprefix(f"{record.workflow_id}."), []).append(step)
        elif step.name == "assign" and step.output:
            assigned |= {entry["key"]: from_record(entry) for entry in step.output["assignments"]}
    known = {agent.name for agent in base.agents}  # by a run that failed; not those that were at work then
    more = [
        _agent_so_far(_agent_name(key, assigned), key, assigned.get(key), own, base.model, ends.get(key, {}))
        for key, own in sorted(by_agent.items())
        if _agent_name(key, assigned) not in known
    ]
    if base.agents and not more:
        return base
    agents = (*base.agents, *more)
    usage = RunUsage(
        input_tokens=sum(agent.usage.input_tokens for agent in agents),
        output_tokens=sum(agent.usage.output_tokens for agent in agents),
        cost_usd=_sum_cost([agent.usage.cost_usd for agent in agents]),
        model_calls=sum(agent.usage.model_calls for agent in agents),
        tool_calls=sum(agent.usage.tool_calls for agent in agents),
        time_s=max(0.0, record.updated_at_s - record.created_at_s),
    )
    return base.model_copy(
        update={"agents": agents, "usage": usage, "memory": base.memory or memory_of(steps)}
    )


def _agent_name(key: str, assigned: Mapping[str, Assignment]) -> str:
    """Whoever has a topology's task is named by it; one that was asked by another, after that one."""
    if key in assigned:
        return assigned[key].agent
    asker, _, own = key.rpartition(".")
    return f"{_agent_name(asker, assigned)}-{own}" if asker else key


def _agent_so_far(
    name: str,
    key: str,
    assignment: Assignment | None,
    steps: Sequence[StepRecord],
    model: str,
    end: JsonObject,
) -> AgentReport:
    completions = [Completion.from_record(s.output) for s in steps if s.name == "model" and s.output]
    problem: JsonObject | None = end.get("error")
    if problem is None:
        problem = next((s.error for s in reversed(steps) if s.error), None)
    state: Literal["completed", "failed", "unfinished"] = "failed" if problem else "unfinished"
    if end.get("state") == "completed":
        state, problem = "completed", None
    stamps = [t for s in steps for t in (s.started_at_s, s.completed_at_s) if t is not None]
    return AgentReport(
        name=name,
        role=assignment.role if assignment else key.rpartition(".")[2].partition("-")[0],
        model=completions[-1].model if completions else model,
        state=state,
        steps=len(steps),
        usage=RunUsage(
            input_tokens=sum(c.usage.input_tokens for c in completions),
            output_tokens=sum(c.usage.output_tokens for c in completions),
            cost_usd=_sum_cost([c.usage.cost_usd for c in completions]),
            model_calls=sum(1 for s in steps if s.name == "model"),
            tool_calls=sum(1 for s in steps if s.name.startswith("tool:")),
            time_s=max(stamps) - min(stamps) if stamps else 0.0,
        ),
        error=None if problem is None else str(problem.get("detail")),
        hint=None if problem is None else problem.get("hint"),
    )


def _ends_of(events: Sequence[EventRecord]) -> dict[str, JsonObject]:
    """Agent → its state at its end, and its problem if it has one."""
    return {event.agent: event.data for event in events if event.kind == "child_ended"}


def _sum_cost(costs: Sequence[float | None]) -> float | None:
    return None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs)


def _no_run(run_id: str) -> NotFound:
    return NotFound(f"there is no run {run_id!r}", hint="list them with `agentic-flow runs list`")


def _below(run_id: str, workflow_id: str) -> str:
    """Who a workflow is in its run."""
    return workflow_id.removeprefix(run_id).lstrip(".") or "run"


def _artifact(run_id: str, record: ArtifactRecord) -> Artifact:
    return Artifact(
        name=record.name,
        version=record.version,
        media_type=record.media_type,
        size_bytes=record.size_bytes,
        sha256=record.sha256,
        agent=_below(run_id, record.workflow_id),
        step=record.step,
        created_at_s=record.created_at_s,
    )


def _step(run_id: str, step: StepRecord) -> RunStep:
    return RunStep(
        agent=_below(run_id, step.workflow_id),
        index=step.index,
        name=step.name,
        output=step.output,
        error=step.error,
        started_at_s=step.started_at_s,
        completed_at_s=step.completed_at_s,
    )


_UNREADABLE = "unknown"
_KINDS: dict[str, RunEventKind] = {
    "accepted": "run_accepted",
    "started": "run_started",
    "taken_over": "run_taken_over",
    "handed_back": "run_handed_back",
    "given_up": "run_given_up",
    "cancelled": "run_cancelled",
    "step_finished": "step_finished",
    "paused": "run_paused",
    "unpaused": "run_unpaused",
    "message": "message_received",
    "question": "question_asked",
    "child_started": "agent_started",
    "child_ended": "agent_finished",
}


def _run_event(event: EventRecord, assignments: Mapping[tuple[str, int], JsonObject]) -> RunEvent:
    data = dict(event.data)
    if event.kind == "step_finished":
        index = int(data.pop("index"))
        below = f"{event.workflow_id}.{event.agent}" if event.agent else event.workflow_id
        data = data or assignments.get((below, index), {})
    kind = "agent_finished" if event.kind == "cancelled" and event.agent else _KINDS.get(event.kind, "other")
    if kind == "other":  # of a newer build
        data |= {"kind": event.kind}
    name = event.name if event.kind in ("step_finished", "message", "question") else None
    return RunEvent(
        sequence=event.sequence,
        kind=kind,
        at_s=event.at_s,
        agent=event.agent or "run",
        name=name,
        data=data,
    )


def _other_run(key: str | None, run_id: str) -> Conflict:
    return Conflict(
        f"idempotency key {key!r} was used for another run: {run_id!r}", hint="use a new key for a new run"
    )


def _run_id(tenant: str, idempotency_key: str | None) -> str:
    """Sortable by time and unguessable; or fixed by the caller's key, so that a repeat finds the first."""
    if idempotency_key is None:
        return f"run-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
    digest = hashlib.sha256(f"{tenant}\0{idempotency_key}".encode()).hexdigest()[:24]
    return f"run-{digest}"
