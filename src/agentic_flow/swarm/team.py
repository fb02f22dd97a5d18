"""The main job as two durable workflows: a run, and each of its agents as a child of the run.

    run:    recall → ingest → (topology says who is next → agents in parallel)* → check citations → result
    agent:  prompt → (model call | tool call)* → text

Every effect is a step of the engine: asking memory, reading the folder, a model call, a tool call, checking
citations, storing the trajectory. What stands between the steps is pure, so a resumed run walks the recorded
path and goes on where it stopped. An agent is a workflow of its own because its steps are numbered in its own
order, whatever its siblings do meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from agentic_flow.agentdb.ingest import IngestReport
from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, LimitExceeded, as_problem, from_problem
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Frozen,
    JsonObject,
    ModelInfo,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.core.ports import Completer, RunEngine, StepContext, ToolBox, WorkflowContext
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm import prompts
from agentic_flow.swarm.agent_loop import AgentLoop, AgentTask
from agentic_flow.swarm.budget import RunBudget
from agentic_flow.swarm.citations import Claim, Rejected, parse_claims, rank, verify
from agentic_flow.swarm.experience import RunExperience, Shown
from agentic_flow.swarm.inputs import Folder, Inputs
from agentic_flow.swarm.runs import AgentReport, Citation, RunResult, RunSpec, RunUsage
from agentic_flow.swarm.topology import PLAN, TOPOLOGIES, Assignment, Role, TeamState

RUN = "run"
AGENT = "agent"
DEFAULT_TOOLS = ("file_find", "file_list", "file_read", "file_search", "memory_search")
"""Tools of an agent whose definition lists none: enough to investigate, nothing that changes anything."""


class Brief(Frozen):
    """The persona of one role, fixed when the run is accepted so that a resume uses the same words."""

    system: str
    model: str
    generative: bool
    tools: tuple[str, ...] = ()


class RunPayload(Frozen):
    """All that a run needs to be done again elsewhere; what the engine stores as its input."""

    spec: RunSpec
    subject: str
    tenant: str
    scopes: tuple[str, ...]
    folder: JsonObject | None
    briefs: dict[Role, Brief]
    started_at_s: float

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant, self.subject, frozenset(self.scopes))


class AgentPayload(Frozen):
    """One assignment with everything its agent may use."""

    run_id: str
    agent: str
    role: Role
    prompt: str
    brief: Brief
    run: RunPayload


class AgentOutput(Frozen):
    """What an agent left: its words and what they cost."""

    text: str
    model: str
    steps: int = 0
    usage: RunUsage = RunUsage()


@dataclass
class _Progress:
    """The state of one run between its steps; rebuilt by replay, never stored."""

    outputs: dict[str, str] = field(default_factory=dict[str, str])
    authors: dict[str, str] = field(default_factory=dict[str, str])
    claims: dict[str, list[Claim]] = field(default_factory=dict[str, list[Claim]])
    done: dict[str, bool] = field(default_factory=dict[str, bool])
    tasks: tuple[str, ...] = ()
    reports: list[AgentReport] = field(default_factory=list[AgentReport])
    errors: list[AgenticFlowError] = field(default_factory=list[AgenticFlowError])
    notes: list[str] = field(default_factory=list[str])
    reviewed: list[Claim] = field(default_factory=list[Claim])
    rejected: int = 0
    shown: Shown = field(default_factory=Shown)
    cited: dict[str, None] = field(default_factory=dict[str, None])


class Team:
    """The two workflows over the ports they need."""

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        completer: Completer,
        toolbox: ToolBox,
        engine: RunEngine,
        inputs: Inputs,
        experience: RunExperience,
        loop: AgentLoop,
        stream: bool,
        tool_timeout_s: float,
        on_ingest: Callable[[str, int, int], None],
    ) -> None:
        self._settings = settings
        self._completer = completer
        self._toolbox = toolbox
        self._engine = engine
        self._inputs = inputs
        self._experience = experience
        self._loop = loop
        self._stream = stream
        self._tool_timeout_s = tool_timeout_s
        self._on_ingest = on_ingest
        self._budgets: dict[str, asyncio.Task[RunBudget]] = {}
        engine.register(RUN, self.run)
        engine.register(AGENT, self.agent)

    # ---- the run -----------------------------------------------------------------------------------------

    async def run(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """The workflow of a run; returns a RunResult as JSON."""
        payload = RunPayload.model_validate(data)
        run_id = context.workflow_id
        progress = _Progress()
        try:
            await self._budget(run_id, payload)
            async with asyncio.timeout(self._settings.run_timeout_s):
                result = await self._work(context, payload, progress)
        except TimeoutError:
            failure: AgenticFlowError = LimitExceeded(
                f"the run did not end within {self._settings.run_timeout_s:g} s",
                hint="raise swarm.run_timeout_s, or ask for less",
            )
        except AgenticFlowError as error:
            failure = error
        else:
            await self._record(context, payload, progress, result, None)
            return result.model_copy(update={"notes": tuple(progress.notes)}).model_dump(mode="json")
        finally:
            self._budgets.pop(run_id, None)
        await self._record(context, payload, progress, None, failure)
        raise failure

    async def _work(self, context: WorkflowContext, payload: RunPayload, progress: _Progress) -> RunResult:
        spec = payload.spec
        progress.shown = await self._recall(context, payload)
        if progress.shown.problem is not None:
            progress.notes.append(f"memory was not asked: {progress.shown.problem}")
        ingest = await self._ingest(context, payload)
        if not payload.briefs["planner"].generative:
            progress.tasks = prompts.split_goal(spec.goal, spec.agents)
            progress.notes.append(
                f"model {payload.briefs['planner'].model!r} plans nothing: "
                f"the goal was split by its clauses into {len(progress.tasks)} task(s)"
            )
        while batch := TOPOLOGIES[spec.topology](self._state(spec, progress)):
            await self._run_batch(context, payload, batch, progress)
        return await self._conclude(context, payload, progress, ingest)

    async def _recall(self, context: WorkflowContext, payload: RunPayload) -> Shown:
        """What memory has for the goal. A model that only selects passages is told none of it."""
        generative = any(brief.generative for brief in payload.briefs.values())

        async def ask(_: StepContext) -> JsonObject:
            shown = await self._experience.recall(
                payload.principal, context.workflow_id, payload.spec, given=generative
            )
            return shown.model_dump(mode="json")

        return Shown.model_validate(await context.step("recall", ask))

    async def _record(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        progress: _Progress,
        result: RunResult | None,
        failure: AgenticFlowError | None,
    ) -> None:
        """The run as experience; judged in the background, later."""

        async def record(_: StepContext) -> JsonObject:
            return await self._experience.record(
                payload.principal,
                context.workflow_id,
                payload.spec,
                model=payload.briefs["worker"].model,
                started_at_s=payload.started_at_s,
                shown=progress.shown,
                cited=tuple(progress.cited),
                result=result,
                failure=failure,
            )

        recorded = await context.step("trajectory", record)
        if recorded.get("problem"):
            progress.notes.append(f"memory did not keep this run: {recorded['problem']}")

    def _state(self, spec: RunSpec, progress: _Progress) -> TeamState:
        return TeamState(spec.goal, spec.agents, progress.tasks, progress.done)

    async def _ingest(self, context: WorkflowContext, payload: RunPayload) -> IngestReport | None:
        if payload.folder is None:
            return None
        folder = Folder.from_json(payload.folder)
        run_id = context.workflow_id

        async def read_in(_: StepContext) -> JsonObject:
            report = await self._inputs.ingest(
                payload.tenant, folder, lambda done, total: self._on_ingest(run_id, done, total)
            )
            return report.model_dump(mode="json")

        return IngestReport.model_validate(await context.step("ingest", read_in))

    async def _run_batch(
        self, context: WorkflowContext, payload: RunPayload, batch: Sequence[Assignment], progress: _Progress
    ) -> None:
        """One round: agents in parallel, then what their words are worth."""
        to_run: dict[str, JsonObject] = {}
        for assignment in batch:
            if assignment.role == "reviewer":
                await self._check_citations(context, payload, assignment, progress)
            prompt = await self._prompt(context, payload, assignment, progress)
            if prompt is None:  # the role is played without a model
                progress.done[assignment.key] = True
                continue
            to_run[assignment.key] = AgentPayload(
                run_id=context.workflow_id,
                agent=assignment.agent,
                role=assignment.role,
                prompt=prompt,
                brief=payload.briefs[assignment.role],
                run=payload,
            ).model_dump(mode="json")
        results = await context.children(AGENT, to_run) if to_run else {}
        for assignment in batch:
            if assignment.key in results:
                self._take(assignment, payload, results[assignment.key], progress)

    async def _prompt(
        self, context: WorkflowContext, payload: RunPayload, assignment: Assignment, progress: _Progress
    ) -> str | None:
        """What the agent is told; None when a model has no part in this role."""
        goal = payload.spec.goal
        generative = payload.briefs[assignment.role].generative
        question = assignment.question or goal
        match assignment.role:
            case "planner":
                if not generative:
                    return None
                paths = await self._paths(context, payload)
                return prompts.planner_prompt(goal, payload.spec.agents, paths, progress.shown.block)
            case "worker":
                seen = [key for key in assignment.sees if key != PLAN]
                if not generative:
                    claims = [claim for key in seen for claim in progress.claims.get(key, [])]
                    return prompts.passages_prompt(question, rank(claims, limit=50))
                findings = [(key, progress.outputs[key]) for key in seen if key in progress.outputs]
                return prompts.worker_prompt(goal, question, findings, progress.shown.block)
            case "reviewer":
                if not generative or not progress.reviewed:
                    return None
                return prompts.reviewer_prompt(goal, progress.reviewed)
            case "synthesizer":
                if not progress.reviewed:
                    return None
                if not generative:
                    evidence = rank(progress.reviewed, limit=50)
                    return prompts.passages_prompt(goal, evidence)
                return prompts.synthesizer_prompt(goal, progress.reviewed)

    async def _paths(self, context: WorkflowContext, payload: RunPayload) -> list[str]:
        if payload.folder is None:
            return []
        folder = Folder.from_json(payload.folder)

        async def overview(_: StepContext) -> JsonObject:
            paths = await self._inputs.paths(payload.tenant, folder)
            return {"paths": paths[: prompts.OVERVIEW_PATHS_MAX], "total": len(paths)}

        return (await context.step("overview", overview))["paths"]

    def _take(
        self, assignment: Assignment, payload: RunPayload, result: JsonObject, progress: _Progress
    ) -> None:
        """Note what one agent did, and read its words by its role."""
        key, name, role = assignment.key, assignment.agent, assignment.role
        if "error" in result:
            error = from_problem(result["error"])
            progress.errors.append(error)
            progress.done[key] = False
            usage = RunUsage.model_validate(result["error"].get("details", {}).get("usage", {}))
            progress.reports.append(
                _report(assignment, payload.briefs[role].model, "failed", usage, error.message)
            )
            progress.notes.append(f"{name} failed: {error.message}")
            return
        output = AgentOutput.model_validate(result)
        text, cited = prompts.without_note_ids(output.text, progress.shown.given_ids)
        progress.cited.update(dict.fromkeys(cited))
        progress.outputs[key] = text
        progress.authors[key] = name
        progress.done[key] = True
        progress.reports.append(_report(assignment, output.model, "completed", output.usage, None))
        if role == "planner":
            progress.tasks = prompts.parse_plan(text, payload.spec.agents)
            if not progress.tasks:
                progress.tasks = (payload.spec.goal,)
                progress.notes.append("the planner's answer held no tasks: one worker takes the whole goal")
        elif role == "worker":
            progress.claims[key] = parse_claims(text, author=name)
        elif role == "reviewer":
            self._apply_verdicts(text, progress)

    def _apply_verdicts(self, text: str, progress: _Progress) -> None:
        verdicts = prompts.parse_verdicts(text)
        if verdicts is None:
            progress.notes.append(
                "the reviewer's answer held no verdicts: citations were checked by the files only"
            )
            return
        kept = [claim for claim in progress.reviewed if verdicts.get(claim.number, (True, ""))[0]]
        dropped = len(progress.reviewed) - len(kept)
        if dropped:
            progress.notes.append(f"the reviewer rejected {dropped} claim(s) that their lines do not support")
        progress.reviewed = kept

    async def _check_citations(
        self, context: WorkflowContext, payload: RunPayload, assignment: Assignment, progress: _Progress
    ) -> None:
        """The reviewer's mechanical half: every citation of every finding against its file."""
        claims = [claim for key in assignment.sees for claim in progress.claims.get(key, [])]
        kept, fallen = await self._verified(context, payload, "check_citations", claims)
        progress.reviewed = _by_votes(kept)
        progress.rejected += len(fallen)
        progress.notes += [f"citation dropped: [{entry.label}]: {entry.reason}" for entry in fallen[:20]]

    async def _verified(
        self, context: WorkflowContext, payload: RunPayload, name: str, claims: Sequence[Claim]
    ) -> tuple[list[Claim], list[Rejected]]:
        async def check(_: StepContext) -> JsonObject:
            if payload.folder is None:
                kept, fallen = (
                    [],
                    [
                        Rejected(c.label, "the run has no input folder")
                        for claim in claims
                        for c in claim.citations
                    ],
                )
            else:
                read = self._inputs.read_lines(Folder.from_json(payload.folder), context.workflow_id)
                kept, fallen = await asyncio.to_thread(verify, claims, read)
            return {
                "kept": [
                    {
                        "text": claim.text,
                        "author": claim.author,
                        "citations": [citation.model_dump(mode="json") for citation in claim.citations],
                    }
                    for claim in kept
                ],
                "fallen": [{"label": entry.label, "reason": entry.reason} for entry in fallen],
            }

        recorded = await context.step(name, check)
        kept = [
            Claim(
                number,
                entry["text"],
                tuple(Citation.model_validate(citation) for citation in entry["citations"]),
                entry["author"],
            )
            for number, entry in enumerate(recorded["kept"], start=1)
        ]
        return kept, [Rejected(entry["label"], entry["reason"]) for entry in recorded["fallen"]]

    async def _conclude(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        progress: _Progress,
        ingest: IngestReport | None,
    ) -> RunResult:
        """The merged answer, its citations checked once more, and the account of the run."""
        if not any(ok and key.startswith(("work-", "draft-")) for key, ok in progress.done.items()):
            raise progress.errors[0] if progress.errors else LimitExceeded("no agent produced an answer")
        answer = progress.outputs.get("merge")
        if answer is None and progress.reviewed:
            # The merge itself failed: an answer without it would claim a review that did not happen.
            raise progress.errors[-1]
        if answer is None:
            answer = _without_evidence(progress)
            citations: list[Citation] = []
        else:
            stated, fallen = await self._verified(context, payload, "check_answer", parse_claims(answer))
            progress.rejected += len(fallen)
            progress.notes += [
                f"citation of the answer does not stand: [{f.label}]: {f.reason}" for f in fallen
            ]
            citations = rank(stated, limit=self._settings.citations_max)
            if not citations:
                citations = rank(progress.reviewed, limit=self._settings.citations_max)
                progress.notes.append(
                    "the merged answer cites nothing that stands: these are the workers' citations"
                )
        usage = _total(progress.reports, time.time() - payload.started_at_s)
        return RunResult(
            run_id=context.workflow_id,
            state="completed",
            goal=payload.spec.goal,
            topology=payload.spec.topology,
            model=payload.briefs["worker"].model,
            answer=answer,
            citations=tuple(citations),
            usage=usage,
            agents=tuple(progress.reports),
            ingest=ingest,
            notes=tuple(progress.notes),
            memory=progress.shown.as_result(tuple(progress.cited)),
            created_at_s=payload.started_at_s,
        )

    # ---- an agent ----------------------------------------------------------------------------------------

    async def agent(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """The workflow of one agent; returns an AgentOutput as JSON. Its errors carry its usage so far."""
        payload = AgentPayload.model_validate(data)
        calls = _RecordedCalls(self, context, payload)
        started = time.monotonic()
        specs = self._toolbox.specs(payload.run.principal, calls.scope) if payload.brief.tools else []
        task = AgentTask(
            system=payload.brief.system,
            prompt=payload.prompt,
            model=payload.brief.model,
            tools=tuple(spec for spec in specs if spec.name in payload.brief.tools),
            steps_max=self._settings.steps_max,
            tool_calls_max=self._settings.tool_calls_max,
            output_tokens_max=self._settings.output_tokens_max,
            stream=self._stream,
        )
        try:
            text = await self._loop.run(task, calls)
        except AgenticFlowError as error:
            error.details["usage"] = calls.usage(time.monotonic() - started).model_dump(mode="json")
            raise
        return AgentOutput(
            text=text,
            model=calls.model or payload.brief.model,
            steps=calls.model_calls,
            usage=calls.usage(time.monotonic() - started),
        ).model_dump(mode="json")

    async def complete(
        self, payload: AgentPayload, request: CompletionRequest, step: StepContext
    ) -> Completion:
        """One model call within the run's budget; executed inside a step."""
        budget = await self._budget(payload.run_id, payload.run)
        budget.deadline.check(f"a model call of {payload.agent!r}")
        reservation = budget.reserve(request)
        try:
            completion = await self._completer.complete(
                # The gateway's budgets and books are also kept by agent and by run.
                request.model_copy(update={"agent": payload.agent, "run": payload.run_id}),
                principal=payload.run.principal,
                deadline=budget.deadline,
                idempotency_key=step.idempotency_key,
            )
        except BaseException:
            budget.release(reservation)
            raise
        budget.settle(reservation, completion.usage)
        return completion

    async def call_tool(self, payload: AgentPayload, call: ToolCallPart, step: StepContext) -> JsonObject:
        """One tool call; executed inside a step. Refusals and failures are results a model can read."""
        budget = await self._budget(payload.run_id, payload.run)
        try:
            result = await self._toolbox.call(
                payload.run.principal,
                call.name,
                call.arguments,
                deadline=budget.deadline.earliest(self._tool_timeout_s),
                scope=_scope(payload),
                idempotency_key=step.idempotency_key,
            )
        except AgenticFlowError as error:
            return {"content": as_problem(error), "is_error": True, "truncated": False}
        return {"content": result.content, "is_error": result.is_error, "truncated": result.truncated}

    async def _budget(self, run_id: str, payload: RunPayload) -> RunBudget:
        """The one budget of a run in this process. A resumed agent may ask for it before its run does."""
        task = self._budgets.get(run_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._budgets[run_id] = asyncio.create_task(self._open_budget(run_id, payload))
        return await asyncio.shield(task)

    async def _open_budget(self, run_id: str, payload: RunPayload) -> RunBudget:
        spent = Usage()
        for step in await self._engine.steps(run_id):
            if step.name == "model" and step.output:
                spent = spent + Completion.model_validate(step.output).usage
        prices: dict[str, ModelInfo] = {}
        if payload.spec.budget_usd is not None:
            for model in {brief.model for brief in payload.briefs.values()}:
                prices[model] = await self._completer.resolve(model, principal=payload.principal)
        return RunBudget(
            budget_usd=payload.spec.budget_usd,
            tokens_max=self._settings.tokens_max,
            prices=prices,
            deadline=Deadline.after(self._settings.run_timeout_s),
            spent=spent,
        )


class _RecordedCalls:
    """AgentCalls whose every call is a step: recorded once, replayed for free."""

    def __init__(self, team: Team, context: WorkflowContext, payload: AgentPayload) -> None:
        self._team = team
        self._context = context
        self._payload = payload
        self._used = Usage()
        self.scope = _scope(payload)
        self.model: str | None = None
        self.model_calls = 0
        self.tool_calls = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        async def call(step: StepContext) -> JsonObject:
            return (await self._team.complete(self._payload, request, step)).model_dump(mode="json")

        completion = Completion.model_validate(await self._context.step("model", call))
        self._used = self._used + completion.usage
        self.model = completion.model
        self.model_calls += 1
        return completion

    async def call_tool(self, call: ToolCallPart) -> ToolResultPart:
        async def execute(step: StepContext) -> JsonObject:
            return await self._team.call_tool(self._payload, call, step)

        recorded = await self._context.step(f"tool:{call.name}", execute)
        self.tool_calls += 1
        content = dict(recorded["content"])
        if recorded["truncated"]:
            content["truncated"] = True
        return ToolResultPart(
            id=call.id, name=call.name, content=orjson.dumps(content).decode(), is_error=recorded["is_error"]
        )

    def usage(self, time_s: float) -> RunUsage:
        return RunUsage(
            input_tokens=self._used.input_tokens,
            output_tokens=self._used.output_tokens,
            cost_usd=self._used.cost_usd,
            model_calls=self.model_calls,
            tool_calls=self.tool_calls,
            time_s=time_s,
        )


def _scope(payload: AgentPayload) -> Any:
    folder = Folder.from_json(payload.run.folder) if payload.run.folder else Folder({}, "none", (), ())
    return folder.scope(payload.run_id, payload.agent, payload.brief.tools)


def _report(
    assignment: Assignment,
    model: str,
    state: Literal["completed", "failed"],
    usage: RunUsage,
    error: str | None,
) -> AgentReport:
    return AgentReport(
        name=assignment.agent,
        role=assignment.role,
        model=model,
        state=state,
        steps=usage.model_calls + usage.tool_calls,
        usage=usage,
        error=error,
    )


def _total(reports: Sequence[AgentReport], time_s: float) -> RunUsage:
    costs = [report.usage.cost_usd for report in reports]
    return RunUsage(
        input_tokens=sum(report.usage.input_tokens for report in reports),
        output_tokens=sum(report.usage.output_tokens for report in reports),
        cost_usd=None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs),
        model_calls=sum(report.usage.model_calls for report in reports),
        tool_calls=sum(report.usage.tool_calls for report in reports),
        time_s=time_s,
    )


def _by_votes(claims: Sequence[Claim]) -> list[Claim]:
    """Claims in an order that honours agreement: cited lines that several authors found come first.

    Within equal votes the order is by each author's own rank, authors taking turns.
    """
    rank_of: dict[int, int] = {}
    seen: dict[str, int] = {}
    for claim in claims:
        rank_of[claim.number] = seen[claim.author] = seen.get(claim.author, -1) + 1
    votes = {claim.number: _votes(claim, claims) for claim in claims}
    ordered = sorted(claims, key=lambda claim: (rank_of[claim.number] - votes[claim.number], claim.number))
    return [Claim(n, claim.text, claim.citations, claim.author) for n, claim in enumerate(ordered, start=1)]


def _votes(claim: Claim, claims: Sequence[Claim]) -> int:
    """Number of other authors who cite overlapping lines."""
    places = {(c.path, line) for c in claim.citations for line in range(c.line_start, c.line_end + 1)}
    return len(
        {
            other.author
            for other in claims
            if other.author != claim.author
            and any((c.path, line) in places for c in other.citations for line in (c.line_start, c.line_end))
        }
    )


def _without_evidence(progress: _Progress) -> str:
    """What the team says when no citation stood: the fact, and the uncited words of its workers."""
    words = [
        f"{progress.authors[key]}: {text}"
        for key, text in progress.outputs.items()
        if key.startswith(("work-", "draft-"))
    ]
    return "\n\n".join(["No evidence was found: no citation stood the check against the files.", *words])
