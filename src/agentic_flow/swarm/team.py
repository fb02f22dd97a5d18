"""The main job as durable workflows: a run, and each of its agents as a child of the run.

    run:    recall → ingest → (topology says who is next → agents in waves)* → check → accept → result
    agent:  see `member`

Every effect is a step of the engine: asking memory, reading the folder, saying who is next, checking
citations, storing the trajectory. What stands between the steps is pure, so a resumed run walks the recorded
path and goes on where it stopped. An agent is a workflow of its own because its steps are numbered in its own
order, whatever its siblings do meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agentic_flow.agentdb.ingest import IngestReport
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    NeedsNewer,
    NotAccepted,
    from_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunEngine, StepContext, WorkflowContext
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm import findings, prompts
from agentic_flow.swarm.acceptance import Acceptance, Answer
from agentic_flow.swarm.citations import Claim, Rejected, parse_claims, rank, verify
from agentic_flow.swarm.criteria import Checked, name_of
from agentic_flow.swarm.experience import RunExperience, Shown
from agentic_flow.swarm.inputs import Folder, Inputs
from agentic_flow.swarm.member import Budgets, report_of
from agentic_flow.swarm.payloads import (
    AGENT,
    RUN,
    AgentOutput,
    AgentPayload,
    RunPayload,
    as_record,
    from_record,
    shape_of,
)
from agentic_flow.swarm.runs import AgentReport, Citation, RunResult, RunSpec, RunUsage
from agentic_flow.swarm.topology import (
    MERGE,
    PLAN,
    REVIEW,
    Agreement,
    Assignment,
    Reviewed,
    Task,
    TeamState,
    checked,
    phases,
    topology_named,
)
from agentic_flow.swarm.tracing import working
from agentic_flow.swarm.voting import agreement, majority_of

DEFAULT_TOOLS = ("file_find", "file_list", "file_read", "file_search", "memory_search")
"""Tools of an agent whose definition lists none: enough to investigate, nothing that changes anything."""


@dataclass
class _Progress:
    """The state of one run between its steps; rebuilt by replay, never stored."""

    assigned: dict[str, Assignment] = field(default_factory=dict[str, Assignment])
    outputs: dict[str, str] = field(default_factory=dict[str, str])
    claims: dict[str, list[Claim]] = field(default_factory=dict[str, list[Claim]])
    verified: set[str] = field(default_factory=set[str])
    done: dict[str, bool] = field(default_factory=dict[str, bool])
    plans: dict[str, tuple[Task, ...]] = field(default_factory=dict[str, tuple[Task, ...]])
    ballots: dict[str, Agreement] = field(default_factory=dict[str, Agreement])
    reviews: dict[str, Reviewed] = field(default_factory=dict[str, Reviewed])
    verdicts: list[findings.Verdicts | None] = field(default_factory=list["findings.Verdicts | None"])
    reports: list[AgentReport] = field(default_factory=list[AgentReport])
    errors: list[AgenticFlowError] = field(default_factory=list[AgenticFlowError])
    notes: list[str] = field(default_factory=list[str])
    reviewed: list[Claim] = field(default_factory=list[Claim])
    fell: int = 0
    shown: Shown = field(default_factory=Shown)
    ingest: IngestReport | None = None
    cited: dict[str, None] = field(default_factory=dict[str, None])

    def worked(self) -> list[str]:
        """Keys of what agents other than planners and reviewers left, in order."""
        return [key for key in self.outputs if key != MERGE and self.assigned[key].role == "worker"]


class Team:
    """The workflow of a run over the ports it needs; registers itself with the engine."""

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        engine: RunEngine,
        inputs: Inputs,
        experience: RunExperience,
        budgets: Budgets,
        acceptance: Acceptance,
        on_ingest: Callable[[str, int, int], None],
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._experience = experience
        self._budgets = budgets
        self._acceptance = acceptance
        self._on_ingest = on_ingest
        engine.register(RUN, self.run)

    # ---- the run -----------------------------------------------------------------------------------------

    async def run(self, context: WorkflowContext, data: JsonObject) -> JsonObject:
        """The workflow of a run; returns a RunResult as JSON."""
        payload = RunPayload.from_record(data)
        attributes = {
            "agentic_flow.run_id": context.workflow_id,
            "agentic_flow.tenant": payload.tenant,
            "agentic_flow.topology": payload.spec.topology,
        }
        with working("run", attributes, traceparent=payload.traceparent, linked=payload.retry_traceparent):
            return await self._run(context, payload)

    async def _run(self, context: WorkflowContext, payload: RunPayload) -> JsonObject:
        run_id = context.workflow_id
        progress = _Progress()
        result: RunResult | None = None
        _check_topology(payload.spec.topology)
        try:
            await self._budgets.of(run_id, payload)
            async with asyncio.timeout(payload.time_left_s(self._settings)):
                result = await self._work(context, payload, progress)
        except TimeoutError:
            failure: AgenticFlowError = self._out_of_time(payload.spec)
        except NeedsNewer:
            raise  # not the run's failure: others go on with it
        except AgenticFlowError as error:
            failure = error
        else:
            unmet = [entry for entry in result.acceptance if not entry.met]
            if not unmet:
                await self._record(context, payload, progress, result)
                return result.model_copy(update={"notes": tuple(progress.notes)}).model_dump(mode="json")
            failure = _not_accepted(unmet)
        finally:
            self._budgets.forget(run_id)
        # Perhaps there is an answer that is just not what was asked for; else what its agents did.
        result = result or self._result(context, payload, progress, state="failed")
        await self._record(context, payload, progress, result, failure)
        result = result.model_copy(update={"state": "failed", "notes": tuple(progress.notes)})
        failure.details["result"] = result.model_dump(mode="json")
        raise failure

    def _out_of_time(self, spec: RunSpec) -> AgenticFlowError:
        if spec.deadline_s is not None and spec.deadline_s <= self._settings.run_timeout_s:
            return DeadlineExceeded(
                f"the run did not end within its deadline of {spec.deadline_s:g} s",
                hint="give it more time, or ask for less",
            )
        return LimitExceeded(
            f"the run did not end within {self._settings.run_timeout_s:g} s",
            hint="raise swarm.run_timeout_s, or ask for less",
        )

    async def _work(self, context: WorkflowContext, payload: RunPayload, progress: _Progress) -> RunResult:
        spec = payload.spec
        progress.shown = await self._recall(context, payload)
        if progress.shown.problem is not None:
            progress.notes.append(f"memory was not asked: {progress.shown.problem}")
        progress.ingest = await self._ingest(context, payload)
        if not payload.briefs["planner"].generative:
            tasks = prompts.split_goal(spec.goal, spec.agents)
            progress.plans[PLAN] = tuple(Task(question) for question in tasks)
            progress.notes.append(
                f"model {payload.briefs['planner'].model!r} plans nothing: "
                f"the goal was split by its clauses into {len(tasks)} task(s)"
            )
        while batch := await self._next(context, payload, progress):
            await self._run_batch(context, payload, batch, progress)
        return await self._conclude(context, payload, progress)

    async def _next(
        self, context: WorkflowContext, payload: RunPayload, progress: _Progress
    ) -> list[Assignment]:
        """Who works next, as recorded: a topology that is a stranger's code may not answer the same twice."""
        spec = payload.spec

        async def assign(_: StepContext) -> JsonObject:
            state = TeamState(
                spec.goal,
                shape_of(spec),
                progress.plans,
                progress.done,
                progress.ballots,
                progress.reviews,
            )
            batch = checked(spec.topology, topology_named(spec.topology)(state), progress.done)
            record: JsonObject = {"assignments": [as_record(assignment) for assignment in batch]}
            if spec.topology == "adaptive":
                phase = phases(state)[-1]
                record |= {"shape": phase.topology, "phase": phase.number, "reason": phase.reason}
            return record

        recorded = await context.step("assign", assign)
        if recorded.get("reason"):
            note = f"the team changed to {recorded['shape']}: {recorded['reason']}"
            if note not in progress.notes:
                progress.notes.append(note)
        return [from_record(entry) for entry in recorded["assignments"]]

    async def _recall(self, context: WorkflowContext, payload: RunPayload) -> Shown:
        """What memory has for the goal. A model that only selects passages is told none of it.

        The step waits for a memory that is away; without one that answers the team works all the same.
        """

        async def ask(_: StepContext) -> JsonObject:
            shown = await self._experience.recall(
                payload.principal, context.workflow_id, payload.spec, given=payload.generative
            )
            return shown.model_dump(mode="json")

        try:
            return Shown.from_record(await context.step("recall", ask))
        except AgenticFlowError as error:
            return Shown(problem=error.message)

    async def _record(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        progress: _Progress,
        result: RunResult,
        failure: AgenticFlowError | None = None,
    ) -> None:
        """The run as experience, judged in the background later. The step waits for a memory that is away."""

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

        try:
            problem = (await context.step("trajectory", record)).get("problem")  # of earlier builds
        except AgenticFlowError as error:
            problem = error.message
        if problem:
            progress.notes.append(f"memory did not keep this run: {problem}")

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

        return IngestReport.from_record(await context.step("ingest", read_in))

    # ---- a batch -----------------------------------------------------------------------------------------

    async def _run_batch(
        self, context: WorkflowContext, payload: RunPayload, batch: Sequence[Assignment], progress: _Progress
    ) -> None:
        """One round: agents in waves, then what their words are worth."""
        progress.assigned |= {assignment.key: assignment for assignment in batch}
        reviews = [assignment for assignment in batch if assignment.role == "reviewer"]
        if reviews:
            await self._check_citations(context, payload, reviews[0].sees, progress)
            claims = [claim for key in reviews[0].sees for claim in progress.claims.get(key, [])]
            progress.reviewed = findings.by_votes(claims)
            progress.verdicts = []
        to_run: dict[str, JsonObject] = {}
        for assignment in batch:
            prompt = await self._prompt(context, payload, assignment, progress)
            if prompt is None:  # the role is played without a model
                progress.done[assignment.key] = True
                continue
            to_run[assignment.key] = AgentPayload(
                run_id=context.workflow_id,
                agent=assignment.agent,
                role=assignment.role,
                question=assignment.question or payload.spec.goal,
                prompt=prompt,
                brief=payload.brief(assignment),
                run=payload,
                room=_room(payload.spec, assignment),
            ).model_dump(mode="json")
        results = await self._waves(context, payload.spec, to_run)
        for assignment in batch:
            if assignment.key in results:
                self._take(assignment, payload, results[assignment.key], progress)
        if reviews:
            self._apply_verdicts(reviews, payload, progress)
        await self._count_ballots(context, payload, batch, progress)

    async def _waves(
        self, context: WorkflowContext, spec: RunSpec, to_run: Mapping[str, JsonObject]
    ) -> dict[str, JsonObject]:
        """All results. Every prompt was made before, so how many work at once changes none of them."""
        size = 1 if not self._settings.parallel else min(spec.batch_size or 64, self._settings.batch_size)
        keys = list(to_run)
        results: dict[str, JsonObject] = {}
        for start in range(0, len(keys), size):
            wave = {key: to_run[key] for key in keys[start : start + size]}
            results |= await context.children(AGENT, wave)
        return results

    async def _prompt(
        self, context: WorkflowContext, payload: RunPayload, assignment: Assignment, progress: _Progress
    ) -> str | None:
        """What the agent is told; None when a model has no part in this role."""
        goal = payload.spec.goal
        generative = payload.brief(assignment).generative
        question = assignment.question or goal
        match assignment.role:
            case "planner":
                if not generative:
                    if assignment.key != PLAN:
                        tasks = prompts.split_goal(question, assignment.tasks_max)
                        progress.plans[assignment.key] = tuple(Task(task) for task in tasks)
                    return None
                paths = await self._paths(context, payload)
                dependent = payload.spec.topology == "adaptive"
                return prompts.planner_prompt(
                    question, assignment.tasks_max, paths, progress.shown.block, dependent=dependent
                )
            case "worker":
                seen = [key for key in assignment.sees if progress.assigned[key].role != "planner"]
                if not generative:
                    claims = [claim for key in seen for claim in progress.claims.get(key, [])]
                    return prompts.passages_prompt(question, rank(claims, limit=50))
                found = [(key, progress.outputs[key]) for key in seen if key in progress.outputs]
                return prompts.worker_prompt(goal, question, found, progress.shown.block)
            case "reviewer":
                if not generative or not progress.reviewed:
                    return None
                return prompts.reviewer_prompt(goal, progress.reviewed)
            case "synthesizer":
                return await self._merge_prompt(context, payload, assignment, progress)

    async def _merge_prompt(
        self, context: WorkflowContext, payload: RunPayload, assignment: Assignment, progress: _Progress
    ) -> str | None:
        """For the answer the claims that stood; for a lead's report those of its own team."""
        claims = progress.reviewed
        question = payload.spec.goal
        if assignment.key != MERGE or not progress.reviews:  # a plug-in's team may have no reviewer
            await self._check_citations(context, payload, assignment.sees, progress)
            claims = findings.by_votes([c for key in assignment.sees for c in progress.claims.get(key, [])])
        if assignment.key == MERGE:
            progress.reviewed = claims
        else:
            question = assignment.question or question
        if not claims:
            return None
        if not payload.brief(assignment).generative:
            return prompts.passages_prompt(question, rank(claims, limit=50))
        return prompts.synthesizer_prompt(question, claims)

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
            usage = RunUsage.from_record(error.details.get("usage", {}))
            delegates = [AgentReport.from_record(one) for one in error.details.get("delegates", [])]
            model = payload.brief(assignment).model
            self._fail(assignment, error, model, usage, delegates, progress)
            return
        output = AgentOutput.from_record(result)
        text, cited = prompts.without_note_ids(output.text, progress.shown.given_ids)
        if not text.strip():
            error = LimitExceeded(f"agent {name!r} said nothing", hint="try another model or a clearer goal")
            self._fail(assignment, error, output.model, output.usage, output.delegates, progress)
            return
        progress.cited.update(dict.fromkeys(cited))
        progress.outputs[key] = text
        progress.done[key] = True
        progress.reports.append(report_of(name, role, output.model, "completed", output.usage, None))
        progress.reports += output.delegates
        if role == "planner":
            plan = prompts.read_plan(text, assignment.tasks_max)
            progress.plans[key] = plan.tasks or (Task(assignment.question or payload.spec.goal),)
            progress.notes += [f"{name}: {note}" for note in plan.notes]
        elif role == "reviewer":
            progress.verdicts.append(prompts.parse_verdicts(text))
        elif key != MERGE:
            progress.claims[key] = parse_claims(text, author=name)

    def _fail(
        self,
        assignment: Assignment,
        error: AgenticFlowError,
        model: str,
        usage: RunUsage,
        delegates: Sequence[AgentReport],
        progress: _Progress,
    ) -> None:
        progress.errors.append(error)
        progress.done[assignment.key] = False
        name, role = assignment.agent, assignment.role
        progress.reports.append(report_of(name, role, model, "failed", usage, error))
        progress.reports += delegates
        progress.notes.append(f"{name} failed: {error.message}")

    # ---- what words are worth ----------------------------------------------------------------------------

    async def _check_citations(
        self, context: WorkflowContext, payload: RunPayload, keys: Sequence[str], progress: _Progress
    ) -> None:
        """The reviewer's mechanical half: every citation of these outputs against its file, once."""
        unchecked = [key for key in keys if key not in progress.verified]
        progress.fell = 0
        if not unchecked:
            return
        claims = [replace(claim, author=key) for key in unchecked for claim in progress.claims.get(key, [])]
        kept, fallen = await self._verified(context, payload, "check_citations", claims)
        for key in unchecked:
            agent = progress.assigned[key].agent
            progress.claims[key] = [replace(claim, author=agent) for claim in kept if claim.author == key]
        progress.verified.update(unchecked)
        progress.fell = len(fallen)
        progress.notes += [f"citation dropped: [{entry.label}]: {entry.reason}" for entry in fallen[:20]]

    def _apply_verdicts(
        self, reviews: Sequence[Assignment], payload: RunPayload, progress: _Progress
    ) -> None:
        """What the reviewers' votes leave of the claims."""
        asked = [assignment for assignment in reviews if assignment.key in progress.outputs]
        unread = sum(1 for entry in progress.verdicts if entry is None)
        if asked and unread == len(progress.verdicts):
            progress.notes.append(
                "the reviewer's answer held no verdicts: citations were checked by the files only"
            )
        elif unread:
            progress.notes.append(f"{unread} of {len(asked)} reviewers gave no verdicts: they abstain")
        needed = min(payload.spec.quorum or majority_of(len(reviews)), len(reviews))
        kept = findings.voted(progress.reviewed, progress.verdicts, needed)
        dropped = len(progress.reviewed) - len(kept)
        if dropped:
            who = "the reviewer" if len(reviews) == 1 else f"{len(reviews)} reviewers (quorum {needed})"
            progress.notes.append(f"{who} rejected {dropped} claim(s) that their lines do not support")
        progress.reviewed = kept
        name = reviews[0].key.partition(REVIEW)[0] + REVIEW
        progress.reviews[name] = Reviewed(len(kept), dropped + progress.fell)

    async def _count_ballots(
        self, context: WorkflowContext, payload: RunPayload, batch: Sequence[Assignment], progress: _Progress
    ) -> None:
        """How far the peers of a round agree: on lines that they cite and that stand, else on words."""
        for ballot in dict.fromkeys(assignment.ballot for assignment in batch if assignment.ballot):
            voters = [assignment for assignment in batch if assignment.ballot == ballot]
            usable = [assignment.key for assignment in voters if progress.done[assignment.key]]
            await self._check_citations(context, payload, usable, progress)
            positions = {
                voter.key: findings.position(
                    progress.outputs.get(voter.key), progress.claims.get(voter.key, [])
                )
                for voter in voters
            }
            needed = payload.spec.quorum or majority_of(len(voters))
            counted = progress.ballots[ballot] = agreement(positions, needed)
            if len(voters) > 1:
                progress.notes.append(
                    f"vote {ballot}: {counted.agree} of {counted.voters} agree (quorum {counted.quorum})"
                )

    async def _verified(
        self, context: WorkflowContext, payload: RunPayload, name: str, claims: Sequence[Claim]
    ) -> tuple[list[Claim], list[Rejected]]:
        async def check(_: StepContext) -> JsonObject:
            if payload.folder is None:
                labels = [citation.label for claim in claims for citation in claim.citations]
                kept = list[Claim]()
                fallen = [Rejected(label, "the run has no input folder") for label in labels]
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
                tuple(Citation.from_record(citation) for citation in entry["citations"]),
                entry["author"],
            )
            for number, entry in enumerate(recorded["kept"], start=1)
        ]
        return kept, [Rejected(entry["label"], entry["reason"]) for entry in recorded["fallen"]]

    # ---- the end -----------------------------------------------------------------------------------------

    async def _conclude(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        progress: _Progress,
    ) -> RunResult:
        """The answer, its citations checked once more, what was asked of it, and the account of the run."""
        if not progress.worked():
            raise progress.errors[0] if progress.errors else LimitExceeded("no agent produced an answer")
        if MERGE not in progress.outputs and progress.reviewed:
            # The merge itself failed: an answer without it would claim a review that did not happen.
            raise progress.errors[-1]
        answer = await self._answer(context, payload, progress)
        answer, acceptance, reports = await self._acceptance.check(
            context, payload, answer, self._candidates(progress)
        )
        progress.reports += reports
        progress.notes += answer.notes
        progress.notes += [
            f"criterion {name_of(entry.criterion)} is {'met' if entry.met else 'not met'}: {entry.reason}"
            for entry in acceptance
        ]
        result = self._result(context, payload, progress, state="completed")
        return result.model_copy(
            update={
                "answer": answer.text,
                "citations": answer.citations,
                "acceptance": tuple(acceptance),
            }
        )

    def _result(
        self,
        context: WorkflowContext,
        payload: RunPayload,
        progress: _Progress,
        *,
        state: Literal["completed", "failed"],
    ) -> RunResult:
        """The account of the run, without its answer."""
        return RunResult(
            run_id=context.workflow_id,
            state=state,
            goal=payload.spec.goal,
            topology=payload.spec.topology,
            model=payload.briefs["worker"].model,
            answer="",
            usage=findings.total(progress.reports, time.time() - payload.started_at_s),
            agents=tuple(progress.reports),
            ingest=progress.ingest,
            notes=tuple(progress.notes),
            memory=progress.shown.as_result(tuple(progress.cited)),
            created_at_s=payload.started_at_s,
        )

    async def _answer(self, context: WorkflowContext, payload: RunPayload, progress: _Progress) -> Answer:
        """The merged answer with the citations that stand; without one, the fact and the agents' words."""
        limit = self._settings.citations_max
        text = progress.outputs.get(MERGE)
        if text is None:
            words = [f"{progress.assigned[key].agent}: {progress.outputs[key]}" for key in progress.worked()]
            said = ["No evidence was found: no citation stood the check against the files.", *words]
            return Answer("\n\n".join(said), ())
        stated, fallen = await self._verified(context, payload, "check_answer", parse_claims(text))
        notes = [f"citation of the answer does not stand: [{f.label}]: {f.reason}" for f in fallen]
        citations = rank(stated, limit=limit)
        if not citations:
            citations = rank(progress.reviewed, limit=limit)
            notes.append("the merged answer cites nothing that stands: these are the workers' citations")
        return Answer(text, tuple(citations), notes=tuple(notes))

    def _candidates(self, progress: _Progress) -> list[Answer]:
        """What else could be the answer: the words of single agents, with their citations that stood."""
        limit = self._settings.citations_max
        return [
            Answer(
                progress.outputs[key],
                tuple(rank(progress.claims.get(key, []), limit=limit)),
                progress.assigned[key].agent,
            )
            for key in progress.worked()
            if key in progress.verified
        ]


def _room(spec: RunSpec, assignment: Assignment) -> str | None:
    """The blackboard of whoever does this, by what the run's caller opened."""
    if spec.board == "all":
        return "all"
    return assignment.room if spec.board == "topology" else None


def _check_topology(name: str) -> None:
    """It was there where the run was accepted."""
    try:
        topology_named(name)
    except InvalidInput as error:
        raise NeedsNewer(error.message, hint="leave the run to processes that have it") from None


def _not_accepted(unmet: Sequence[Checked]) -> NotAccepted:
    names = "; ".join(f"{name_of(entry.criterion)}: {entry.reason}" for entry in unmet)
    return NotAccepted(
        f"{len(unmet)} acceptance criteria are not met: {names}",
        hint="the answer is kept with the run: `agentic-flow runs show` prints it",
        details={"unmet": [entry.model_dump(mode="json") for entry in unmet]},
    )
