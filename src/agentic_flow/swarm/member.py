"""One agent of a run as a durable workflow: prompt → (model call | tool call | question to another)* → text.

Each model call and each tool call is a step of the engine, recorded once and replayed for free. A question to
another role is a child workflow of the agent's own. All agents of a run share its budget.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Literal

import orjson

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, Unavailable, as_problem, as_tool_error, from_problem
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    ModelInfo,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    Usage,
)
from agentic_flow.core.ports import (
    Approval,
    Completer,
    RunEngine,
    StepContext,
    ToolBox,
    ToolScope,
    WorkflowContext,
)
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm import delegation, prompts
from agentic_flow.swarm.agent_loop import AgentLoop, AgentTask
from agentic_flow.swarm.approvals import answer_to, asking
from agentic_flow.swarm.artifacts import StepArtifacts
from agentic_flow.swarm.blackboard import TOOLS as BOARD_TOOLS
from agentic_flow.swarm.blackboard import board_name
from agentic_flow.swarm.budget import RunBudget
from agentic_flow.swarm.inputs import Folder
from agentic_flow.swarm.payloads import AGENT, AgentOutput, AgentPayload, RunPayload
from agentic_flow.swarm.runs import AgentReport, RunUsage
from agentic_flow.swarm.topology import Role
from agentic_flow.swarm.tracing import working


class Budgets:
    """The one budget of each run in this process. A resumed agent may ask for it before its run does."""

    def __init__(self, settings: SwarmSettings, completer: Completer, engine: RunEngine) -> None:
        self._settings = settings
        self._completer = completer
        self._engine = engine
        self._opening: dict[str, asyncio.Task[RunBudget]] = {}

    async def of(self, run_id: str, payload: RunPayload) -> RunBudget:
        """The budget of this run, or of the workflow that it is a step of, with what was spent already."""
        if payload.account is not None:
            run_id, payload = payload.account.run_id, payload.account.payload
        task = self._opening.get(run_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._opening[run_id] = asyncio.create_task(self._open(run_id, payload))
        return await asyncio.shield(task)

    def forget(self, run_id: str) -> None:
        """The run has ended here."""
        self._opening.pop(run_id, None)

    async def _open(self, run_id: str, payload: RunPayload) -> RunBudget:
        spent = Usage()
        # What a retry has taken over was done, and paid, before it was accepted.
        since_s = payload.started_at_s if payload.retry_of is not None else 0.0
        for step in await self._engine.steps(run_id):
            if step.name == "model" and step.output and (step.completed_at_s or 0.0) >= since_s:
                spent = spent + Completion.from_record(step.output).usage
        prices: dict[str, ModelInfo] = {}
        if payload.spec.budget_usd is not None:
            for model in {brief.model for brief in payload.briefs.values()}:
                prices[model] = await self._completer.resolve(model, principal=payload.principal)
        return RunBudget(
            budget_usd=payload.spec.budget_usd,
            tokens_max=payload.spec.tokens_max or self._settings.tokens_max,
            prices=prices,
            deadline=Deadline.after(payload.time_left_s(self._settings)),
            spent=spent,
        )


class Members:
    """The workflow of every agent, over the ports it needs; registers itself with the engine."""

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        completer: Completer,
        toolbox: ToolBox,
        engine: RunEngine,
        budgets: Budgets,
        loop: AgentLoop,
        stream: bool,
        tool_timeout_s: float,
        approval_timeout_s: float,
    ) -> None:
        self.settings = settings
        self.approval_timeout_s = approval_timeout_s
        self._completer = completer
        self._toolbox = toolbox
        self._engine = engine
        self._budgets = budgets
        self._loop = loop
        self._stream = stream
        self._tool_timeout_s = tool_timeout_s
        engine.register(AGENT, self.agent)

    async def agent(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """The workflow of one agent; returns an AgentOutput as JSON. Its errors carry its usage so far."""
        payload = AgentPayload.from_record(data)
        calls = _RecordedCalls(self, context, payload)
        started = time.monotonic()
        spec, settings = payload.run.spec, self.settings
        task = AgentTask(
            system=payload.brief.system,
            prompt=payload.prompt,
            model=payload.brief.model,
            tools=tuple(self._tools(payload, calls.scope)),
            steps_max=spec.steps_max or settings.steps_max,
            tool_calls_max=spec.tool_calls_max or settings.tool_calls_max,
            output_tokens_max=spec.output_tokens_max or settings.output_tokens_max,
            stream=self._stream,
        )
        attributes = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": payload.agent,
            "gen_ai.request.model": task.model,
            "agentic_flow.run_id": payload.run_id,
        }
        try:
            with working(f"invoke_agent {payload.agent}", attributes):
                text = await self._loop.run(task, calls)
        except AgenticFlowError as error:
            error.details["usage"] = calls.usage(time.monotonic() - started).model_dump(mode="json")
            error.details["delegates"] = [report.model_dump(mode="json") for report in calls.delegates]
            raise
        return AgentOutput(
            text=text,
            model=calls.model or payload.brief.model,
            steps=calls.model_calls,
            usage=calls.usage(time.monotonic() - started),
            delegates=tuple(calls.delegates),
        ).model_dump(mode="json")

    def _tools(self, payload: AgentPayload, scope: ToolScope) -> list[ToolSpec]:
        names = scope.tools_allowed or frozenset()
        offered = self._toolbox.specs(payload.run.principal, scope) if names else []
        known = [spec for spec in offered if spec.name in names]
        return [
            *known,
            *delegation.specs(payload.brief.tools, len(payload.asked), self.settings.delegation_depth_max),
        ]

    async def complete(
        self, payload: AgentPayload, request: CompletionRequest, step: StepContext
    ) -> Completion:
        """One model call within the run's budget; executed inside a step."""
        budget = await self._budgets.of(payload.run_id, payload.run)
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

    async def call_tool(
        self,
        payload: AgentPayload,
        scope: ToolScope,
        call: ToolCallPart,
        step: StepContext,
        approval: Approval | None = None,
    ) -> JsonObject:
        """One tool call; executed inside a step. Refusals and failures are results a model can read.

        One that needs somebody's yes is not made without: the output says what to ask.
        """
        if approval is None:
            asked = self._toolbox.asks(payload.run.principal, call.name, call.arguments, scope)
            if asked is not None:
                return asking(f"agent {payload.agent}", asked)
        budget = await self._budgets.of(payload.run_id, payload.run)
        artifacts = StepArtifacts(self._engine, self.settings, step, budget.staged)
        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": call.name}
        try:
            with working(f"execute_tool {call.name}", attributes):
                result = await self._toolbox.call(
                    payload.run.principal,
                    call.name,
                    call.arguments,
                    deadline=budget.deadline.earliest(self._tool_timeout_s),
                    scope=replace(scope, artifacts=artifacts),
                    idempotency_key=step.idempotency_key,
                    approval=approval,
                )
        except AgenticFlowError as error:
            artifacts.discard()
            if isinstance(error, Unavailable) and error.peer is not None:
                raise  # the step waits for it, as with model calls
            return {"content": as_problem(error), "is_error": True, "truncated": False}
        if result.is_error:
            artifacts.discard()
        return {"content": result.content, "is_error": result.is_error, "truncated": result.truncated}


class _RecordedCalls:
    """AgentCalls whose every call is a step, or a child workflow: recorded once, replayed for free."""

    def __init__(self, members: Members, context: WorkflowContext, payload: AgentPayload) -> None:
        self._members = members
        self._context = context
        self._payload = payload
        self._used = Usage()
        self.scope = _scope(payload)
        self.model: str | None = None
        self.model_calls = 0
        self.tool_calls = 0
        self.delegates: list[AgentReport] = []
        self._asked = 0
        self._depth = 0
        self._handed_over: str | None = None

    async def complete(self, request: CompletionRequest) -> Completion:
        if self._handed_over is not None:  # nothing is left for this agent to say
            return Completion(
                model=self.model or request.model,
                provider="agentic-flow",
                parts=(TextPart(text=self._handed_over),),
                stop_reason="end",
                usage=Usage(),
            )

        async def call(step: StepContext) -> JsonObject:
            return (await self._members.complete(self._payload, request, step)).model_dump(mode="json")

        completion = Completion.from_record(await self._context.step("model", call))
        self._used = self._used + completion.usage
        self.model = completion.model
        self.model_calls += 1
        return completion

    async def call_tool(self, call: ToolCallPart) -> ToolResultPart:
        if call.name in delegation.TOOLS:
            return await self._pass_on(call)

        approval: Approval | None = None

        async def execute(step: StepContext) -> JsonObject:
            return await self._members.call_tool(self._payload, self.scope, call, step, approval)

        recorded = await self._context.step(f"tool:{call.name}", execute)
        approval = await answer_to(self._context, recorded, self._members.approval_timeout_s)
        if approval is not None:
            recorded = await self._context.step(f"tool:{call.name}", execute)
        self.tool_calls += 1
        content = dict(recorded["content"])
        if recorded["truncated"]:
            content["truncated"] = True
        return _result(call, content, is_error=recorded["is_error"])

    async def _pass_on(self, call: ToolCallPart) -> ToolResultPart:
        """Another role's answer to a question. Nothing here but the child is an effect, and it is durable."""
        payload, settings = self._payload, self._members.settings
        self.tool_calls += 1
        try:
            asked = delegation.admitted(
                call.arguments,
                payload.asked,
                own=payload.question,
                made=self._asked,
                depth_max=settings.delegation_depth_max,
                delegations_max=settings.delegations_max,
            )
        except AgenticFlowError as error:
            return _result(call, as_tool_error(error), is_error=True)
        self._asked += 1
        key = f"ask-{self._asked}"
        child = AgentPayload(
            run_id=payload.run_id,
            agent=f"{payload.agent}-{key}",
            role=asked.role,
            question=asked.question,
            prompt=prompts.worker_prompt(payload.run.spec.goal, asked.question, []),
            brief=payload.run.briefs[asked.role],
            run=payload.run,
            asked=(*payload.asked, (payload.role, payload.question)),
        )
        result = (await self._context.children(AGENT, {key: child.model_dump(mode="json")}))[key]
        self._depth = max(self._depth, 1)
        if "error" in result:
            error = from_problem(result["error"])
            self._note(child, "failed", error.details.get("usage", {}), error)
            self._adopt([AgentReport.from_record(one) for one in error.details.get("delegates", [])])
            return _result(call, as_tool_error(error), is_error=True)
        output = AgentOutput.from_record(result)
        self._note(child, "completed", output.usage.model_dump(), None)
        self._adopt(output.delegates)
        if call.name == delegation.HANDOFF:
            self._handed_over = output.text
        return _result(call, {"answer": output.text, "answered_by": child.agent}, is_error=False)

    def _note(
        self,
        child: AgentPayload,
        state: Literal["completed", "failed"],
        usage: JsonObject,
        error: AgenticFlowError | None,
    ) -> None:
        used = RunUsage.from_record(usage)
        self._depth = max(self._depth, 1 + used.delegation_depth)
        self.delegates.append(report_of(child.agent, child.role, child.brief.model, state, used, error))

    def _adopt(self, reports: list[AgentReport] | tuple[AgentReport, ...]) -> None:
        """Those that the one who was asked has asked in turn."""
        self.delegates.extend(reports)

    def usage(self, time_s: float) -> RunUsage:
        """What this agent itself used; those it asked report for themselves."""
        return RunUsage(
            input_tokens=self._used.input_tokens,
            output_tokens=self._used.output_tokens,
            cost_usd=self._used.cost_usd,
            model_calls=self.model_calls,
            tool_calls=self.tool_calls,
            time_s=time_s,
            delegations=self._asked,
            delegation_depth=self._depth,
        )


def report_of(
    name: str,
    role: Role,
    model: str,
    state: Literal["completed", "failed"],
    usage: RunUsage,
    error: AgenticFlowError | None,
) -> AgentReport:
    """An agent's share of a run."""
    return AgentReport(
        name=name,
        role=role,
        model=model,
        state=state,
        steps=usage.model_calls + usage.tool_calls,
        usage=usage,
        error=None if error is None else error.message,
        hint=None if error is None else error.hint,
    )


def _scope(payload: AgentPayload) -> ToolScope:
    folder = Folder.from_json(payload.run.folder) if payload.run.folder else Folder({}, "none", (), ())
    room = payload.room
    tools = [tool for tool in payload.brief.tools if room is not None or tool not in BOARD_TOOLS]
    if room is not None:
        tools = [*dict.fromkeys([*tools, *BOARD_TOOLS])]
    board = board_name(payload.run_id, room) if room is not None else None
    return folder.scope(payload.run_id, payload.agent, tools, board=board)


def _result(call: ToolCallPart, content: JsonObject, *, is_error: bool) -> ToolResultPart:
    return ToolResultPart(
        id=call.id, name=call.name, content=orjson.dumps(content).decode(), is_error=is_error
    )
