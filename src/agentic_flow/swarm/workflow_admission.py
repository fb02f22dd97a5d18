"""What becomes of a workflow before it is stored: checked against what is here, its personas fixed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.messages import ModelInfo
from agentic_flow.core.ports import Completer, ToolBox, ToolScope
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.definitions import DefinitionCatalog
from agentic_flow.swarm.inputs import Folder
from agentic_flow.swarm.payloads import Brief, RunPayload
from agentic_flow.swarm.runs import RoleChoice, RunSpec
from agentic_flow.swarm.topology import Role
from agentic_flow.swarm.workflow_check import check_document
from agentic_flow.swarm.workflow_file import Document
from agentic_flow.swarm.workflow_plan import filled
from agentic_flow.swarm.workflow_run import WorkflowPayload, account_of
from agentic_flow.swarm.workflow_spec import (
    AgentWork,
    Problem,
    Surroundings,
    Validation,
    WorkflowRequest,
    WorkflowSource,
    WorkflowSpec,
    given_inputs,
    refusal,
)
from agentic_flow.swarm.workflow_text import as_text

_MODELS_MAX = 100


Briefs = Callable[[RunSpec, ModelInfo, Principal], Awaitable[dict[str, Brief]]]
"""The personas of all roles of a run, with the model that plays those for which nothing names one."""
BriefOf = Callable[[Role, str | None, RoleChoice, ModelInfo, Principal], Awaitable[Brief]]
"""One persona; the agent definition None: the one that plays the role."""


class WorkflowAdmission:
    """Checks workflows and makes what is stored of them.

    Args:
        settings: The `swarm` section.
        completer: Knows the models.
        toolbox: Knows the tools.
        catalog: Agent definitions.
        briefs: Chooses who plays the roles of a team.
        brief: Chooses who plays one.
        permit: Refuses folders that a caller may not name.
    """

    def __init__(
        self,
        settings: SwarmSettings,
        *,
        completer: Completer,
        toolbox: ToolBox,
        catalog: DefinitionCatalog,
        briefs: Briefs,
        brief: BriefOf,
        permit: Callable[[Principal, RunSpec], None],
    ) -> None:
        self._settings = settings
        self._completer = completer
        self._toolbox = toolbox
        self._catalog = catalog
        self._briefs = briefs
        self._brief = brief
        self._permit = permit

    async def validate(self, principal: Principal, source: WorkflowSource) -> Validation:
        """Every problem that can be known before it runs."""
        try:
            document = source.document()
        except AgenticFlowError as error:
            problem = Problem(path="", message=error.message, hint=error.hint or "correct it")
            return Validation(valid=False, problems=(problem,))
        spec, problems = await self._checked(principal, document)
        name: Any = document.data.get("name")
        steps: Any = document.data.get("steps")
        return Validation(
            valid=spec is not None,
            name=name if isinstance(name, str) else None,
            steps=len(cast(list[Any], steps)) if isinstance(steps, list) else 0,
            problems=tuple(problems),
        )

    async def admit(
        self, principal: Principal, request: WorkflowRequest, started_at_s: float
    ) -> WorkflowPayload:
        """What is stored of a workflow that may run.

        Raises:
            InvalidInput: it or its inputs are wrong; all problems are in the details.
            PathNotFound: a folder does not exist.
            Forbidden: a folder is not the caller's to name.
        """
        spec, problems = await self._checked(principal, request.document())
        if spec is None:
            raise refusal(problems)
        inputs = given_inputs(spec, request.inputs)
        begins = {"after": request.after, "after_any_end": request.after_any_end}
        whole = account_of(spec, _folders(spec, inputs)).model_copy(update=begins)
        self._permit(principal, whole)
        folder = await asyncio.to_thread(Folder.of, whole) if whole.inputs else None
        default = await self._completer.resolve(spec.model, principal=principal)
        return WorkflowPayload(
            workflow=spec,
            inputs=inputs,
            run=RunPayload(
                spec=whole,
                subject=principal.subject,
                tenant=principal.tenant,
                scopes=tuple(sorted(principal.scopes)),
                folder=folder.as_json() if folder else None,
                briefs=await self._briefs(whole, default, principal),
                started_at_s=started_at_s,
            ),
            agents={
                step.id: await self._agent(step.agent, default, principal)
                for step in spec.steps
                if step.agent is not None
            },
            teams={
                step.id: await self._team(step.team, default, principal)
                for step in spec.steps
                if step.team is not None
            },
        )

    async def _agent(self, agent: AgentWork, default: ModelInfo, principal: Principal) -> Brief:
        choice = RoleChoice(model=agent.model, tools=agent.tools)
        return await self._brief(agent.role, agent.definition, choice, default, principal)

    async def _team(self, team: RunSpec, default: ModelInfo, principal: Principal) -> dict[str, Brief]:
        if team.model is not None:
            default = await self._completer.resolve(team.model, principal=principal)
        return await self._briefs(team, default, principal)

    async def _checked(
        self, principal: Principal, document: Document
    ) -> tuple[WorkflowSpec | None, list[Problem]]:
        around = Surroundings(
            tools={tool.name: tool.input_schema for tool in self._toolbox.specs(principal, ToolScope())},
            agents=frozenset(definition.name for definition in self._catalog.list()),
            refused_models=await self._refused(principal, document),
            settings=self._settings,
        )
        return await asyncio.to_thread(check_document, document, around)

    async def _refused(self, principal: Principal, document: Document) -> Mapping[str, str]:
        """Models that the document names and nothing serves, with the reason."""
        refused: dict[str, str] = {}
        for name in list(dict.fromkeys(_models(document.data)))[:_MODELS_MAX]:
            try:
                await self._completer.resolve(name, principal=principal)
            except InvalidInput as error:
                refused[name] = error.message
        return refused


def _models(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in cast(dict[str, Any], value).items():
            if key == "model" and isinstance(inner, str):
                yield inner
            elif key != "arguments":
                yield from _models(inner)
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from _models(inner)


def _folders(spec: WorkflowSpec, inputs: Mapping[str, Any]) -> list[str]:
    """The folders with inputs filled in; absolute, for the service has no folder of its own to start from."""
    folders = [as_text(filled(source, {"inputs": inputs, "steps": {}})) for source in spec.folders]
    for folder in folders:
        if not Path(folder).is_absolute():
            raise InvalidInput(
                f"the folder {folder!r} is not absolute",
                hint="give it as an input of the type path, which is taken from where you are",
            )
    return folders
