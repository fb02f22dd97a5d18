"""Workflows as durable work: rounds of steps, each step a child, each effect of a step recorded.

    workflow:  ingest → (plan → the steps that may start, as children)* → outputs
    step:      (attempt: a tool call | an agent as a child | a team's run as a child | a question)* → output

What is next is decided by `advance`, which is pure; it is recorded as the step `plan` only so that others
can follow. Steps of one round run at once, and the next round begins when all of them have ended: the engine
numbers what a workflow does, so nothing may hang on which of them was faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from agentic_flow.agentdb.ingest import IngestReport
from agentic_flow.core.errors import (
    AgenticFlowError,
    BudgetExceeded,
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    NeedsNewer,
    NotAccepted,
    as_problem,
    from_problem,
)
from agentic_flow.core.messages import JsonObject, Record
from agentic_flow.core.ports import Approval, RunEngine, StepContext, ToolBox, WorkflowContext
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm import findings
from agentic_flow.swarm.approvals import answer_to, asking
from agentic_flow.swarm.artifact_files import keep_files
from agentic_flow.swarm.artifacts import StepArtifacts
from agentic_flow.swarm.citations import parse_claims, rank, verify
from agentic_flow.swarm.inputs import Folder, Inputs
from agentic_flow.swarm.member import Budgets, report_of
from agentic_flow.swarm.payloads import AGENT, RUN, Account, AgentOutput, AgentPayload, Brief, RunPayload
from agentic_flow.swarm.questions import SIGNAL
from agentic_flow.swarm.runs import (
    AgentReport,
    RunResult,
    RunSpec,
    RunUsage,
    WorkflowReport,
    WorkflowStepReport,
)
from agentic_flow.swarm.tracing import working
from agentic_flow.swarm.workflow_plan import Outcome, Plan, Start, advance, conclude
from agentic_flow.swarm.workflow_spec import DENY, Step, WorkflowSpec
from agentic_flow.swarm.workflow_text import as_text

WORKFLOW = "workflow"
STEP = "workflow_step"
_FINAL = (BudgetExceeded, Cancelled, NeedsNewer)
"""Failures that another attempt cannot mend."""
_SEARCHES = "memory_search"


class WorkflowPayload(Record):
    """All that a workflow needs to be done again elsewhere.

    `run` has its folder, budget and principal; `agents` the persona of each agent step, `teams` those of each
    team step.
    """

    workflow: WorkflowSpec
    inputs: JsonObject
    run: RunPayload
    agents: dict[str, Brief]
    teams: dict[str, dict[str, Brief]]


class StepPayload(Record):
    """One step, or one item of a fan-out, with its texts filled in."""

    workflow_id: str
    key: str
    step: Step
    work: Any
    run: RunPayload
    brief: Brief | None = None
    briefs: dict[str, Brief] | None = None
    artifacts: tuple[str, ...] = ()


@dataclass
class _Progress:
    """The state of one workflow between its rounds; rebuilt by replay, never stored."""

    results: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    reports: list[AgentReport] = field(default_factory=list[AgentReport])
    plan: Plan = field(default_factory=lambda: Plan((), {}, over=False))
    ingest: IngestReport | None = None


class Workflows:
    """The workflows of workflow files, over the ports they need; registers them with the engine.

    Args:
        settings: The `swarm` section.
        engine: Durable workflows.
        toolbox: Runs the tool steps.
        inputs: Reads folders.
        budgets: One for each workflow.
        tool_timeout_s: Deadline of one tool call whose step names none.
        approval_timeout_s: So long a call waits for the yes that the policy asks for.
        on_ingest: Told of progress: run id, files done, files in all.
    """

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        engine: RunEngine,
        toolbox: ToolBox,
        inputs: Inputs,
        budgets: Budgets,
        tool_timeout_s: float,
        approval_timeout_s: float,
        on_ingest: Callable[[str, int, int], None],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._approval_timeout_s = approval_timeout_s
        self._toolbox = toolbox
        self._inputs = inputs
        self._budgets = budgets
        self._tool_timeout_s = tool_timeout_s
        self._on_ingest = on_ingest
        engine.register(WORKFLOW, self.run)
        engine.register(STEP, self.step)

    # ---- the workflow ------------------------------------------------------------------------------------

    async def run(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """The workflow itself; returns a RunResult as JSON. A failure carries what there is of it."""
        payload = WorkflowPayload.from_record(data)
        own = payload.run
        attributes = {
            "agentic_flow.run_id": context.workflow_id,
            "agentic_flow.tenant": own.tenant,
            "agentic_flow.workflow": payload.workflow.name,
        }
        with working("workflow", attributes, traceparent=own.traceparent, linked=own.retry_traceparent):
            return await self._run(context, payload)

    async def _run(self, context: WorkflowContext, payload: WorkflowPayload) -> JsonObject:
        run_id = context.workflow_id
        progress = _Progress()
        outputs: dict[str, Any] = {}
        failure: AgenticFlowError | None = None
        try:
            await self._budgets.of(run_id, payload.run)
            async with asyncio.timeout(payload.run.time_left_s(self._settings)):
                await self._work(context, payload, progress)
            outputs, failure = conclude(payload.workflow, payload.inputs, progress.plan.outcomes)
        except TimeoutError:
            failure = self._out_of_time(payload.workflow)
        except NeedsNewer:
            raise  # not the run's failure: others go on with it
        except AgenticFlowError as error:
            failure = error
        finally:
            self._budgets.forget(run_id)
        result = _result(run_id, payload, progress, outputs, failed=failure is not None)
        if failure is None:
            return result.model_dump(mode="json")
        failure.details["result"] = result.model_dump(mode="json")
        raise failure

    async def _work(self, context: WorkflowContext, payload: WorkflowPayload, progress: _Progress) -> None:
        if _reads_memory(payload):
            progress.ingest = await self._ingest(context, payload.run)
        spec = payload.workflow
        steps = {step.id: step for step in spec.steps}
        while True:
            plan = progress.plan = advance(spec, payload.inputs, progress.results)
            if plan.over:
                return

            async def note(_: StepContext, plan: Plan = plan) -> JsonObject:
                ended = {name: outcome.state for name, outcome in plan.outcomes.items()}
                # For the picture of the run: whose results each of them is given.
                of = {s.key: {"step": s.step, "needs": list(steps[s.step].needs)} for s in plan.start}
                return {"start": [start.key for start in plan.start], "ended": ended, "of": of}

            await context.step("plan", note)
            children = {
                start.key: _step_payload(context.workflow_id, payload, steps[start.step], start).model_dump(
                    mode="json"
                )
                for start in plan.start
            }
            for key, result in (await context.children(STEP, children)).items():
                _take(key, result, progress)

    async def _ingest(self, context: WorkflowContext, run: RunPayload) -> IngestReport:
        assert run.folder is not None
        folder = Folder.from_json(run.folder)

        async def read_in(_: StepContext) -> JsonObject:
            report = await self._inputs.ingest(
                run.tenant, folder, lambda done, total: self._on_ingest(context.workflow_id, done, total)
            )
            return report.model_dump(mode="json")

        return IngestReport.from_record(await context.step("ingest", read_in))

    def _out_of_time(self, spec: WorkflowSpec) -> AgenticFlowError:
        if spec.deadline_s is not None and spec.deadline_s <= self._settings.run_timeout_s:
            return DeadlineExceeded(
                f"the workflow did not end within its deadline of {spec.deadline_s:g} s",
                hint="give it more time, or ask for less",
            )
        return LimitExceeded(
            f"the workflow did not end within {self._settings.run_timeout_s:g} s",
            hint="raise swarm.run_timeout_s, or ask for less",
        )

    # ---- a step ------------------------------------------------------------------------------------------

    async def step(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """One step with its attempts; returns `output` and what agents did. A failure carries the latter."""
        payload = StepPayload.from_record(data)
        step, reports = payload.step, list[AgentReport]()
        failure: AgenticFlowError | None = None
        for attempt in range(1, step.retry.attempts + 1):
            if attempt > 1 and step.retry.backoff_s > 0:
                await self._pause(context, step.retry.backoff_s * 2 ** (attempt - 2))
            try:
                output = await self._attempt(context, payload, attempt, reports)
                if payload.artifacts:
                    await self._keep_files(context, payload)
            except AgenticFlowError as error:
                failure = error
                if isinstance(error, _FINAL):
                    break
            else:
                return {"output": output, "reports": _dumped(reports)}
        assert failure is not None
        failure.details = {**_without(failure.details), "reports": _dumped(reports)}
        raise failure

    async def _keep_files(self, context: WorkflowContext, payload: StepPayload) -> None:
        """Keep what the step has left in the folders, as a step of its own with the files."""
        assert payload.run.folder is not None, "the check has let it pass"
        scope = Folder.from_json(payload.run.folder).scope(payload.workflow_id, payload.key)

        async def keep(step: StepContext) -> JsonObject:
            budget = await self._budgets.of(payload.workflow_id, payload.run)
            artifacts = StepArtifacts(self._engine, self._settings, step, budget.staged)
            try:
                left = await keep_files(artifacts, scope, payload.artifacts, budget.deadline)
            except AgenticFlowError:
                artifacts.discard()
                raise
            return {"artifacts": [asdict(one) for one in left]}

        await context.step("artifacts", keep)

    async def _pause(self, context: WorkflowContext, pause_s: float) -> None:
        """A recorded wait: a resumed step does not wait again for attempts that it has made."""

        async def wait(_: StepContext) -> JsonObject:
            await asyncio.sleep(pause_s)
            return {"waited_s": pause_s}

        await context.step("backoff", wait)

    async def _attempt(
        self, context: WorkflowContext, payload: StepPayload, attempt: int, reports: list[AgentReport]
    ) -> Any:
        step = payload.step
        if step.tool is not None:
            return await self._tool(context, payload)
        if step.approval is not None:
            return await self._approval(context, payload)
        if step.wait_for is not None:
            return await self._wait_for(context, payload)
        try:
            async with asyncio.timeout(step.timeout_s):
                if step.agent is not None:
                    return await self._agent(context, payload, attempt, reports)
                return await self._team(context, payload, attempt, reports)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"step {step.id!r} did not end within {step.timeout_s:g} s",
                hint="raise its timeout_s, or ask for less",
            ) from error

    async def _tool(self, context: WorkflowContext, payload: StepPayload) -> JsonObject:
        tool = payload.step.tool
        assert tool is not None
        folder = Folder.from_json(payload.run.folder) if payload.run.folder else Folder({}, "none", (), ())

        scope = folder.scope(payload.workflow_id, payload.key, (tool.name,))
        approval: Approval | None = None

        async def call(step: StepContext) -> JsonObject:
            if approval is None:
                asked = self._toolbox.asks(payload.run.principal, tool.name, payload.work, scope)
                if asked is not None:
                    return asking(f"step {payload.step.id}", asked)
            budget = await self._budgets.of(payload.workflow_id, payload.run)
            budget.deadline.check(f"step {payload.step.id!r}")
            artifacts = StepArtifacts(self._engine, self._settings, step, budget.staged)
            try:
                result = await self._toolbox.call(
                    payload.run.principal,
                    tool.name,
                    payload.work,
                    deadline=budget.deadline.earliest(payload.step.timeout_s or self._tool_timeout_s),
                    scope=replace(scope, artifacts=artifacts),
                    idempotency_key=step.idempotency_key,
                    approval=approval,
                )
            except AgenticFlowError:
                artifacts.discard()
                raise
            if result.is_error:
                artifacts.discard()
                said = result.content.get("message") or result.content.get("detail") or "it failed"
                raise from_problem(
                    {
                        "code": result.content.get("code") or "invalid_input",
                        "detail": f"step {payload.step.id!r}: {tool.name} failed: {said}",
                        "hint": result.content.get("hint"),
                    }
                )
            return {**result.content, "truncated": True} if result.truncated else dict(result.content)

        output = await context.step(f"tool:{tool.name}", call)
        approval = await answer_to(context, output, self._approval_timeout_s)
        return output if approval is None else await context.step(f"tool:{tool.name}", call)

    async def _approval(self, context: WorkflowContext, payload: StepPayload) -> JsonObject:
        """The wait has no place of its process, and goes on elsewhere with the same deadline."""
        approval = payload.step.approval
        assert approval is not None
        given = await context.ask(
            as_text(payload.work),
            options=approval.options,
            timeout_s=payload.step.timeout_s,
            default=approval.default,
        )
        if given["answer"] == DENY:
            how = "was approved by nobody in time" if given["timed_out"] else f"was denied by {given['by']!r}"
            raise NotAccepted(
                f"step {payload.step.id!r} {how}", hint="start the workflow again when it may go on"
            )
        return given

    async def _wait_for(self, context: WorkflowContext, payload: StepPayload) -> JsonObject:
        """As an approval waits. Every step that waits for a signal receives it, each for itself."""
        awaited = payload.step.wait_for
        assert awaited is not None
        instead = {"value": awaited.default, "by": None} if awaited.default is not None else None
        given = await context.receive(
            f"{SIGNAL}{awaited.signal}", timeout_s=payload.step.timeout_s, default=instead
        )
        return {"value": given["value"], "by": given["by"], "timed_out": given["by"] is None}

    async def _agent(
        self, context: WorkflowContext, payload: StepPayload, attempt: int, reports: list[AgentReport]
    ) -> JsonObject:
        agent, brief = payload.step.agent, payload.brief
        assert agent is not None
        assert brief is not None
        limits = {
            name: value
            for name in ("steps_max", "tool_calls_max", "output_tokens_max")
            if (value := getattr(agent, name)) is not None
        }
        prompt = as_text(payload.work)
        child = AgentPayload(
            run_id=payload.workflow_id,
            agent=payload.key,
            role=agent.role,
            question=prompt,
            prompt=prompt,
            brief=brief,
            run=payload.run.model_copy(update={"spec": payload.run.spec.model_copy(update=limits)}),
        )
        key = f"try-{attempt}"
        result = (await context.children(AGENT, {key: child.model_dump(mode="json")}))[key]
        if "error" in result:
            error = from_problem(result["error"])
            used = RunUsage.from_record(error.details.get("usage", {}))
            reports.append(report_of(payload.key, agent.role, brief.model, "failed", used, error))
            reports += [AgentReport.from_record(one) for one in error.details.get("delegates", [])]
            raise error
        output = AgentOutput.from_record(result)
        reports.append(report_of(payload.key, agent.role, output.model, "completed", output.usage, None))
        reports += output.delegates
        if not output.text.strip():
            raise LimitExceeded(f"step {payload.step.id!r}: the agent said nothing", hint="try another model")
        checked = await self._citations(context, payload, output.text)
        return {"text": output.text, "model": output.model, **checked}

    async def _citations(self, context: WorkflowContext, payload: StepPayload, text: str) -> JsonObject:
        """The citations of an agent's words that stand the check against the files."""
        if payload.run.folder is None:
            return {"citations": []}
        folder = Folder.from_json(payload.run.folder)

        async def check(_: StepContext) -> JsonObject:
            read = self._inputs.read_lines(folder, payload.workflow_id)
            kept, fallen = await asyncio.to_thread(verify, parse_claims(text, author=payload.key), read)
            cited = rank(kept, limit=self._settings.citations_max)
            return {
                "citations": [citation.model_dump(mode="json") for citation in cited],
                "fallen": [{"label": entry.label, "reason": entry.reason} for entry in fallen],
            }

        return {"citations": (await context.step("check_citations", check))["citations"]}

    async def _team(
        self, context: WorkflowContext, payload: StepPayload, attempt: int, reports: list[AgentReport]
    ) -> JsonObject:
        team, run = payload.step.team, payload.run
        assert team is not None

        async def begin(_: StepContext) -> JsonObject:
            return {"at_s": time.time()}

        key = f"try-{attempt}"
        own = RunPayload(
            spec=_team_spec(payload.step, team, run.spec, as_text(payload.work)),
            subject=run.subject,
            tenant=run.tenant,
            scopes=run.scopes,
            folder=run.folder,
            briefs=payload.briefs or {},
            started_at_s=(await context.step("begin", begin))["at_s"],
            account=Account(run_id=payload.workflow_id, payload=run),
        )
        result = (await context.children(RUN, {key: own.model_dump(mode="json")}))[key]
        if result.get("error") is not None:  # a result has the field as well, and it is empty there
            error = from_problem(result["error"])
            kept: JsonObject = error.details.get("result") or {}
            reports += [AgentReport.from_record(one) for one in kept.get("agents", ())]
            raise error
        ended = RunResult.from_record(result)
        reports += [
            report.model_copy(update={"name": f"{payload.key}.{report.name}"}) for report in ended.agents
        ]
        return {
            "answer": ended.answer,
            "citations": [citation.model_dump(mode="json") for citation in ended.citations],
            "run_id": ended.run_id,
            "topology": ended.topology,
        }


def account_of(spec: WorkflowSpec, folders: Sequence[str]) -> RunSpec:
    """What a workflow asks for as a whole, in the words of a run: folders, rules, limits."""
    return RunSpec(
        goal=spec.description.strip() or f"Workflow {spec.name}",
        inputs=tuple(folders),
        model=spec.model,
        budget_usd=spec.budget_usd,
        tokens_max=spec.tokens_max,
        deadline_s=spec.deadline_s,
        paths_allowed=spec.paths_allowed,
        paths_forbidden=spec.paths_forbidden,
    )


def _team_spec(step: Step, team: RunSpec, whole: RunSpec, goal: str) -> RunSpec:
    """The run of a team step: its own shape, the workflow's folders and rules."""
    fields = team.model_dump(mode="json", exclude_unset=True) | {"goal": goal}
    fields |= {
        "inputs": whole.inputs,
        "paths_allowed": whole.paths_allowed,
        "paths_forbidden": whole.paths_forbidden,
    }
    fields.setdefault("model", whole.model)
    try:
        return RunSpec.model_validate(fields, extra="allow")  # a newer build's keys were stored with it
    except ValidationError as error:
        raise InvalidInput(
            f"step {step.id!r}: {error.errors()[0]['msg']}: goal {goal[:100]!r}",
            hint="a goal has 1 to 20,000 characters",
        ) from None


def _reads_memory(payload: WorkflowPayload) -> bool:
    return payload.run.folder is not None and any(_SEARCHES in one.tools for one in payload.agents.values())


def _step_payload(workflow_id: str, payload: WorkflowPayload, step: Step, start: Start) -> StepPayload:
    return StepPayload(
        workflow_id=workflow_id,
        key=start.key,
        step=step,
        work=start.work,
        run=payload.run,
        brief=payload.agents.get(step.id),
        briefs=payload.teams.get(step.id),
        artifacts=start.artifacts,
    )


def _take(key: str, result: JsonObject, progress: _Progress) -> None:
    """Note how one step's child ended."""
    if "error" in result:
        error: JsonObject = result["error"]
        told: Mapping[str, Any] = error.get("details") or {}
        progress.reports += [AgentReport.from_record(one) for one in told.get("reports", ())]
        kept = as_problem(from_problem(error | {"details": _without(told)}))
        progress.results[key] = Outcome("failed", error=kept)
        return
    progress.reports += [AgentReport.from_record(one) for one in result["reports"]]
    progress.results[key] = Outcome("completed", result["output"])


def _without(details: Mapping[str, Any]) -> dict[str, Any]:
    """Details that tell why; not those that tell what was used, which is kept elsewhere."""
    return {k: v for k, v in details.items() if k not in ("reports", "usage", "delegates", "result")}


def _dumped(reports: Sequence[AgentReport]) -> list[JsonObject]:
    return [report.model_dump(mode="json") for report in reports]


def _result(
    run_id: str, payload: WorkflowPayload, progress: _Progress, outputs: dict[str, Any], *, failed: bool
) -> RunResult:
    spec = payload.workflow
    return RunResult(
        run_id=run_id,
        state="failed" if failed else "completed",
        goal=payload.run.spec.goal,
        topology=WORKFLOW,
        model=payload.run.briefs["worker"].model,
        answer="" if failed else _answer(outputs),
        usage=findings.total(progress.reports, time.time() - payload.run.started_at_s),
        agents=tuple(progress.reports),
        ingest=progress.ingest,
        notes=tuple(
            f"step {name} {outcome.state}: {outcome.reason or (outcome.error or {}).get('detail')}"
            for name, outcome in progress.plan.outcomes.items()
            if outcome.state != "completed" and name not in spec.fallbacks
        ),
        workflow=WorkflowReport(
            name=spec.name,
            version=spec.version,
            outputs=outputs,
            steps=tuple(_step_report(step, progress.plan.outcomes.get(step.id)) for step in spec.steps),
        ),
        created_at_s=payload.run.started_at_s,
    )


def _step_report(step: Step, outcome: Outcome | None) -> WorkflowStepReport:
    if outcome is None:
        return WorkflowStepReport(id=step.id, kind=step.kind, state="unfinished")
    reason = outcome.reason or str((outcome.error or {}).get("detail") or "")
    return WorkflowStepReport(
        id=step.id, kind=step.kind, state=outcome.state, reason=reason, items=outcome.items
    )


def _answer(outputs: Mapping[str, Any]) -> str:
    """The outputs as people read them: one alone as it is, several under their names."""
    if len(outputs) == 1:
        return as_text(next(iter(outputs.values())))
    return "\n\n".join(f"{name}: {as_text(value)}" for name, value in outputs.items())
