"""Acceptance: the criteria of a run, really checked over its answer when it has one.

What needs no model and no tool is checked first, also over the words of single agents: when the merged answer
misses something that one of them has, the better one becomes the answer. Then commands run, through the
ToolBox and its policy, and questions go to the reviewer's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from agentic_flow.core.errors import AgenticFlowError, from_problem
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, ToolBox, WorkflowContext
from agentic_flow.swarm import prompts
from agentic_flow.swarm.criteria import (
    Checked,
    Cites,
    Command,
    Contains,
    MaxWords,
    Mechanical,
    MinCitations,
    Question,
    check,
    name_of,
)
from agentic_flow.swarm.inputs import Folder
from agentic_flow.swarm.member import Budgets, report_of
from agentic_flow.swarm.payloads import AGENT, AgentOutput, AgentPayload, RunPayload
from agentic_flow.swarm.runs import AgentReport, Citation, RunUsage
from agentic_flow.swarm.voting import compare

SHELL = "shell_run"


@dataclass(frozen=True, slots=True)
class Answer:
    """What could be the answer of a run. `author` is the agent whose words it is, '' for the merged one."""

    text: str
    citations: tuple[Citation, ...]
    author: str = ""
    notes: tuple[str, ...] = ()


def _met(criterion: Contains | Cites | MinCitations | MaxWords, answer: Answer) -> Checked:
    return check(criterion, answer.text, [citation.path for citation in answer.citations])


def best(
    answer: Answer,
    candidates: Sequence[Answer],
    criteria: Sequence[Contains | Cites | MinCitations | MaxWords],
) -> Answer:
    """The merged answer, unless it misses a criterion and somebody's words meet more.

    What decides is the number of criteria that are met and then the citations that stand, never length or who
    was first.
    """
    if not criteria or all(_met(criterion, answer).met for criterion in criteria):
        return answer

    def score(criterion: Contains | Cites | MinCitations | MaxWords, candidate: Answer) -> float:
        return float(_met(criterion, candidate).met)

    checks = {f"{i} {name_of(one)}": partial(score, one) for i, one in enumerate(criteria)}
    ranked = compare([answer, *candidates], checks)
    counts = {id(entry.candidate): len(entry.passed) for entry in ranked}
    leaders = [entry for entry in ranked if len(entry.passed) == len(ranked[0].passed)]
    leader = max(leaders, key=lambda entry: len(entry.candidate.citations))
    if counts[id(leader.candidate)] <= counts[id(answer)]:
        return answer
    missed = ", ".join(name_of(one) for one in criteria if not _met(one, answer).met)
    note = f"the merged answer missed {missed}: the words of {leader.candidate.author} stand in its place"
    return replace(leader.candidate, notes=(*answer.notes, note))


class Acceptance:
    """Checks a run's criteria.

    Args:
        toolbox: Runs commands, under its policy.
        budgets: Deadlines of runs.
        tool_timeout_s: Longest time of one command.
    """

    def __init__(self, toolbox: ToolBox, budgets: Budgets, *, tool_timeout_s: float) -> None:
        self._toolbox = toolbox
        self._budgets = budgets
        self._tool_timeout_s = tool_timeout_s

    async def check(
        self, context: WorkflowContext, payload: RunPayload, answer: Answer, candidates: Sequence[Answer]
    ) -> tuple[Answer, list[Checked], list[AgentReport]]:
        """The answer that does best, every criterion with what became of it, and who was asked for it."""
        criteria = payload.spec.acceptance
        answer = best(answer, candidates, [one for one in criteria if isinstance(one, Mechanical)])
        results: list[Checked] = []
        reports: list[AgentReport] = []
        for number, criterion in enumerate(criteria, start=1):
            match criterion:
                case Command():
                    results.append(await self._command(context, payload, criterion))
                case Question():
                    result, report = await self._question(context, payload, number, criterion, answer)
                    results.append(result)
                    reports += report
                case _:
                    results.append(_met(criterion, answer))
        return answer, results, reports

    async def _command(self, context: WorkflowContext, payload: RunPayload, criterion: Command) -> Checked:
        async def execute(step: StepContext) -> JsonObject:
            budget = await self._budgets.of(context.workflow_id, payload)
            folder = Folder.from_json(payload.folder) if payload.folder else Folder({}, "none", (), ())
            try:
                result = await self._toolbox.call(
                    payload.principal,
                    SHELL,
                    {"argv": list(criterion.argv)},
                    deadline=budget.deadline.earliest(self._tool_timeout_s),
                    scope=folder.scope(context.workflow_id, "acceptance", (SHELL,)),
                    idempotency_key=step.idempotency_key,
                )
            except AgenticFlowError as error:
                return {"met": False, "reason": error.message}
            if result.is_error:
                return {"met": False, "reason": f"it could not be run: {result.content.get('message')}"}
            code = result.content.get("exit_code")
            ended = f"it ended with {code}" if code is not None else "it did not end by itself"
            said = str(result.content.get("stderr") or result.content.get("stdout") or "").strip()
            last = said.splitlines()[-1][:200] if said and code != 0 else ""
            return {"met": code == 0, "reason": f"{ended}: {last}" if last else ended}

        recorded = await context.step("accept:command", execute)
        return Checked(criterion=criterion, met=recorded["met"], reason=recorded["reason"])

    async def _question(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        number: int,
        criterion: Question,
        answer: Answer,
    ) -> tuple[Checked, list[AgentReport]]:
        key, brief = f"accept-{number}", payload.briefs["reviewer"]
        agent = AgentPayload(
            run_id=context.workflow_id,
            agent=key,
            role="reviewer",
            question=criterion.text,
            prompt=prompts.acceptance_prompt(
                payload.spec.goal, criterion.text, answer.text, answer.citations
            ),
            brief=brief,
            run=payload,
        )
        result = (await context.children(AGENT, {key: agent.model_dump(mode="json")}))[key]
        if "error" in result:
            error = from_problem(result["error"])
            usage = RunUsage.from_record(error.details.get("usage", {}))
            failed = report_of(key, "reviewer", brief.model, "failed", usage, error)
            return Checked(criterion=criterion, met=False, reason=f"nobody could say: {error.message}"), [
                failed
            ]
        output = AgentOutput.from_record(result)
        report = report_of(key, "reviewer", output.model, "completed", output.usage, None)
        verdict = (prompts.parse_verdicts(output.text) or {}).get(1)
        met, reason = verdict or (False, "the reviewer's answer held no verdict")
        return Checked(criterion=criterion, met=met, reason=reason or "without a reason"), [
            report,
            *output.delegates,
        ]
