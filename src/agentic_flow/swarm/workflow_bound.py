"""Workflows for one caller, from files or objects: `client.workflows`, awaited or waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput
from agentic_flow.swarm.runs import RunResult, RunService
from agentic_flow.swarm.workflow_check import check_text
from agentic_flow.swarm.workflow_file import read_workflow_file
from agentic_flow.swarm.workflow_spec import (
    InputSpec,
    Validation,
    WorkflowRequest,
    WorkflowSource,
    WorkflowSpec,
    refusal,
)

T = TypeVar("T")
Request = TypeVar("Request", bound=BaseModel)
Workflow = str | Path | WorkflowSpec
"""The path of a file, or the workflow itself."""


class Waits(Protocol):
    """Runs what is awaited elsewhere and gives its result."""

    def __call__(self, function: Callable[[], Awaitable[T]], /) -> T: ...


class BoundWorkflows:
    """`client.workflows`.

    Args:
        open: Gives the service at work and the caller.
    """

    def __init__(self, open: Callable[[], Awaitable[tuple[RunService, Principal]]]) -> None:
        self._open = open

    async def validate(self, workflow: Workflow) -> Validation:
        """Everything that is wrong with a workflow where it would run.

        Raises:
            PathNotFound, TooLarge, InvalidInput: the file cannot be read at all.
        """
        source = await asyncio.to_thread(source_of, workflow)
        runs, principal = await self._open()
        return await runs.validate_workflow(principal, source)

    async def submit(
        self,
        workflow: Workflow,
        inputs: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        after: Sequence[str] = (),
        after_any_end: bool = False,
        detached: bool = False,
    ) -> str:
        """Accept a workflow durably and return the id of its run; follow it as any run (`client.runs`).

        Args:
            workflow: The path of a file, or the workflow itself.
            inputs: By name. Inputs of the type `path` are taken from the current folder.
            idempotency_key: The same key, workflow and inputs give the same run.
            queue: The shared queue from which a worker takes it.
            priority: -100 to 100; high ones go first.
            after: Runs that must have completed before it begins; it fails when one does not.
            after_any_end: It is enough that they have ended.
            detached: Another process is to do it: a client without a server puts it into a shared queue, by
                default `default`.

        Raises:
            InvalidInput: the workflow or an input is wrong; `details["problems"]` has all that is.
            Unavailable: detached, and no process that lives takes runs from the queue.
            PathNotFound: the file or a folder does not exist.
            Conflict: the key was used for another run.
        """
        source = await asyncio.to_thread(source_of, workflow)
        fields: dict[str, Any] = {
            **source.model_dump(exclude_unset=True),
            "inputs": with_absolute_paths(workflow_of(source), inputs or {}),
        }
        if queue is not None or priority:
            fields |= {"queue": queue, "priority": priority}
        if after:
            fields |= {"after": tuple(after), "after_any_end": after_any_end}
        request = request_of(WorkflowRequest, fields)
        runs, principal = await self._open()
        if detached:
            from agentic_flow.swarm.service import Swarm

            if isinstance(runs, Swarm):  # else the server that is asked does it, or knows who does
                request = request.model_copy(update={"queue": await runs.queue_of_detached(queue)})
        return await runs.submit_workflow(principal, request, idempotency_key=idempotency_key)

    async def run(
        self,
        workflow: Workflow,
        inputs: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> RunResult:
        """Run a workflow to its end; one that failed is returned, not raised. Arguments as in `submit`."""
        run_id = await self.submit(workflow, inputs, idempotency_key=idempotency_key)
        runs, principal = await self._open()
        return await runs.wait(principal, run_id)


class WaitedWorkflows:
    """`BoundWorkflows` for code without an event loop.

    Args:
        bound: The workflows.
        wait: Waits for what they do.
    """

    def __init__(self, bound: BoundWorkflows, wait: Waits) -> None:
        self._bound = bound
        self._wait = wait

    def validate(self, workflow: Workflow) -> Validation:
        """See `BoundWorkflows.validate`."""
        return self._wait(lambda: self._bound.validate(workflow))

    def submit(self, workflow: Workflow, inputs: Mapping[str, Any] | None = None, **options: Any) -> str:
        """See `BoundWorkflows.submit`."""
        return self._wait(lambda: self._bound.submit(workflow, inputs, **options))

    def run(self, workflow: Workflow, inputs: Mapping[str, Any] | None = None, **options: Any) -> RunResult:
        """See `BoundWorkflows.run`."""
        return self._wait(lambda: self._bound.run(workflow, inputs, **options))


def source_of(workflow: Workflow) -> WorkflowSource:
    """What is handed over of a file or a workflow.

    Raises:
        PathNotFound, TooLarge, InvalidInput: the file cannot be read.
    """
    if isinstance(workflow, WorkflowSpec):
        return WorkflowSource(workflow=workflow.model_dump(mode="json", exclude_unset=True))
    text, written = read_workflow_file(Path(workflow))
    return WorkflowSource(text=text, format=written)


def workflow_of(source: WorkflowSource) -> WorkflowSpec:
    """The workflow, checked as far as it tells by itself.

    Raises:
        InvalidInput: it is wrong.
    """
    if source.text is not None:
        spec, problems = check_text(source.text, source.format)
        if spec is None:
            raise refusal(problems)
        return spec
    return WorkflowSpec.model_validate(source.workflow)


def request_of(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """A request of these fields.

    Raises:
        InvalidInput: a field is wrong; names it.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        raise InvalidInput(
            f"{name} {fields.get(name)!r} is refused: {problem['msg']}", hint=f"give another {name}"
        ) from None


def with_absolute_paths(spec: WorkflowSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with those of the type `path`, given or by default, as absolute paths of this machine."""
    filled = dict(inputs)
    for name, declared in spec.inputs.items():
        if declared.type == "path":
            value = filled.get(name, None if declared.required else declared.default)
            if isinstance(value, str | Path):
                filled[name] = str(Path(value).expanduser().absolute())
    return filled


def parsed_inputs(spec: WorkflowSpec, words: Mapping[str, str]) -> dict[str, Any]:
    """Inputs given as texts, as on a command line: a number, truth value, list or table is written as JSON.

    Raises:
        InvalidInput: a text does not fit the input's type.
    """
    return {name: _parsed(name, spec.inputs.get(name), text) for name, text in words.items()}


def _parsed(name: str, declared: InputSpec | None, text: str) -> Any:
    if declared is None or declared.type in ("string", "path"):
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            f"the input {name!r} is {text[:200]!r}, which is no {declared.type}",
            hint='write it as JSON, such as 3, true or \'["a", "b"]\'',
        ) from error
