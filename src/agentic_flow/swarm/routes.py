"""HTTP face of runs, workflows and schedules. Thin: each handler reads, calls the service, encodes.

`operations` is the table of all of it; the routes and the OpenAPI document are made from it. Reading demands
the scope `runs:read`, everything else `runs:write`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, cast, get_args
from urllib.parse import quote

from pydantic import Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput, NotFound
from agentic_flow.core.messages import Frozen, JsonObject
from agentic_flow.core.openapi import Operation, document, routes_of
from agentic_flow.core.ports import RunState
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.web import event_stream, json_response, principal_of
from agentic_flow.memory.records import Id
from agentic_flow.swarm.artifacts import NAME_CHARS_MAX
from agentic_flow.swarm.picture import picture
from agentic_flow.swarm.questions import AnswerRequest, Question
from agentic_flow.swarm.runs import (
    Artifact,
    ArtifactContent,
    Purged,
    PurgeRequest,
    RetryRequest,
    RunEvent,
    RunEventKind,
    RunResult,
    RunService,
    RunSpec,
    RunStep,
    SignalRequest,
)
from agentic_flow.swarm.schedules import Schedule, ScheduleRequest
from agentic_flow.swarm.workflow_spec import Validation, WorkflowRequest, WorkflowSource

DOCUMENT_PATH = "/v1/runs/openapi.json"
READ, WRITE = "runs:read", "runs:write"

_LIST_MAX = 500
_NUMBER_MAX = 2**63 - 1  # of the integers that SQLite and PostgreSQL can hold
_RUN = "/v1/runs/{run_id}"
_SCHEDULE = "/v1/schedules/{schedule}"
_DESCRIPTION = (
    "Durable runs of teams of agents, workflows and schedules, for the tenant of the caller and no other. "
    "What an answer acknowledges is on disk, and survives the end of every process."
)
_KEY: JsonObject = {
    "Idempotency-Key": {
        "type": "string",
        "maxLength": 200,
        "description": "The same key again answers as the first time; with another body it is refused.",
    }
}
_AFTER: JsonObject = {
    "Last-Event-ID": {"type": "string", "description": "As `after`; a browser sends it when it comes back."}
}

_KNOWN: JsonObject = {
    "If-None-Match": {"type": "string", "description": "Tags (`ETag`) that the caller has: 304 if it is one."}
}


class RunList(Frozen):
    """Runs, newest first."""

    runs: tuple[RunResult, ...]


class Accepted(Frozen):
    """The id of a run that is now kept, whatever happens. `retry_of`: of the run that it does again."""

    run_id: str
    retry_of: str | None = None


class Steps(Frozen):
    """Recorded steps, in the order in which they ended."""

    steps: tuple[RunStep, ...]


class ArtifactList(Frozen):
    """Artifacts by name, or every version in order of storing."""

    artifacts: tuple[Artifact, ...]


class Cancelled(Frozen):
    """False: it had ended before."""

    cancelled: bool


class Paused(Frozen):
    """False: it was paused already, or had ended."""

    paused: bool


class Resumed(Frozen):
    """False: there was nothing to resume."""

    resumed: bool


class Questions(Frozen):
    """What a run asked people, and what was answered."""

    questions: tuple[Question, ...]


class Answered(Frozen):
    """The answer that counts. `is_new` False: it was there before."""

    question_id: str
    answer: str
    is_new: bool


class Signalled(Frozen):
    """`is_new` False: the key was known, and nothing was sent."""

    signal: str
    is_new: bool


class ScheduleList(Frozen):
    """Schedules by name."""

    schedules: tuple[Schedule, ...]


class Removed(Frozen):
    """It is gone."""

    removed: bool


class _AsText:
    """JSON Schema of a value that travels as the text of its JSON."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shape = handler(core_schema)
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": shape}


class EventFrame(Frozen):
    """One server-sent event: `id` is the sequence number, `event` the kind."""

    id: str
    event: RunEventKind
    data: Annotated[RunEvent, _AsText()]


class RunOptions(Frozen):
    """Which runs."""

    state: str = Field(
        default="", description=f"Only those in these states, by commas: {', '.join(get_args(RunState))}."
    )
    limit: Annotated[int, Field(ge=1, le=_LIST_MAX)] = Field(default=50, description="Most runs.")


class EventOptions(Frozen):
    """From where on."""

    after: Annotated[int, Field(ge=0, le=_NUMBER_MAX)] | None = Field(
        default=None, description="Sequence number of the last event that was seen."
    )


class ArtifactsOptions(Frozen):
    """Which artifacts."""

    versions: bool = Field(default=False, description="Every version, not only the newest of each name.")


class ArtifactOptions(Frozen):
    """Which version."""

    version: Annotated[int, Field(ge=1, le=_NUMBER_MAX)] | None = Field(
        default=None, description="Without it the newest."
    )


def build_routes(runs: RunService) -> list[Route]:
    """The routes of a run service, and its OpenAPI document at DOCUMENT_PATH, which is public."""
    shown = json_response(openapi_document())

    async def show(request: Request) -> Response:
        return shown

    return [Route(DOCUMENT_PATH, show), *routes_of(operations(runs))]


def openapi_document() -> JsonObject:
    """The OpenAPI document of runs, workflows and schedules."""
    path_types = {
        "run_id": Id,
        "question_id": Id,
        "artifact": Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)],
        "name": str,
        "schedule": str,
    }
    return document(operations(None), title="Runs", description=_DESCRIPTION, path_types=path_types)


def operations(runs: RunService | None) -> list[Operation]:
    """The table. Without a service it can be read and not served."""
    faces: Any = runs
    return [
        *_run_operations(_Runs(faces)),
        *_steering_operations(_Steering(faces)),
        *_workflow_operations(_Workflows(faces)),
        *_schedule_operations(_Schedules(faces)),
    ]


def _id(request: Request) -> str:
    return str(request.path_params["run_id"])


# Runs


class _Runs:
    def __init__(self, runs: RunService) -> None:
        self._runs = runs

    async def submit(self, request: Request, body: RunSpec) -> Response:
        key = request.headers.get("idempotency-key")
        return _accepted(await self._runs.submit(principal_of(request), body, idempotency_key=key))

    async def listed(self, request: Request, query: RunOptions) -> Response:
        states = _states(query.state)
        found = await self._runs.list_runs(principal_of(request), states=states, limit=query.limit)
        return json_response({"runs": found})

    async def show(self, request: Request) -> Response:
        return json_response(await self._runs.show(principal_of(request), _id(request)))

    async def steps(self, request: Request) -> Response:
        return json_response({"steps": await self._runs.steps(principal_of(request), _id(request))})

    async def artifacts(self, request: Request, query: ArtifactsOptions) -> Response:
        principal = principal_of(request)
        found = await self._runs.artifacts(principal, _id(request), versions=query.versions)
        return json_response({"artifacts": found})

    async def artifact(self, request: Request, query: ArtifactOptions) -> Response:
        principal, name = principal_of(request), str(request.path_params["artifact"])
        found = await self._runs.artifact(principal, _id(request), name, version=query.version)
        return _file(found, request.headers.get("if-none-match"))

    async def picture_svg(self, request: Request) -> Response:
        principal = principal_of(request)
        result = await self._runs.show(principal, _id(request))
        drawn = picture(result, await self._runs.steps(principal, _id(request)))
        # A picture that is opened by itself is a document: it may load and run nothing.
        headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(drawn, media_type="image/svg+xml", headers=headers)

    async def events(self, request: Request, query: EventOptions) -> Response:
        principal = principal_of(request)
        after = query.after if query.after is not None else _last_seen(request)
        await self._runs.show(principal, _id(request))  # an unknown run is a 404, not a stream that fails
        return event_stream(_events(self._runs, principal, _id(request), after))

    async def purge(self, request: Request, body: PurgeRequest) -> Response:
        return json_response(await self._runs.purge(principal_of(request), body))


def _run_operations(faces: _Runs) -> list[Operation]:
    return [
        Operation(
            name="submit_run",
            method="POST",
            path="/v1/runs",
            summary="Accept a run. It goes on whatever becomes of the caller.",
            scope=WRITE,
            body=RunSpec,
            headers=_KEY,
            handler=faces.submit,
            answer=Accepted,
            status=202,
            errors=(NotFound,),  # a run that it shall begin after
        ),
        Operation(
            name="list_runs",
            method="GET",
            path="/v1/runs",
            summary="Runs, newest first.",
            scope=READ,
            query=RunOptions,
            handler=faces.listed,
            answer=RunList,
        ),
        Operation(
            name="purge_runs",
            method="POST",
            path="/v1/runs/purge",
            summary="Remove runs that have ended, with all that is stored of them.",
            notes="Those of another tenant need the scope `platform:admin` too.",
            scope=WRITE,
            body=PurgeRequest,
            handler=faces.purge,
            answer=Purged,
        ),
        Operation(
            name="show_run",
            method="GET",
            path=_RUN,
            summary="A run as the store has it: state, answer, citations, what it cost.",
            scope=READ,
            handler=faces.show,
            answer=RunResult,
        ),
        Operation(
            name="run_steps",
            method="GET",
            path=f"{_RUN}/steps",
            summary="Every recorded step: model calls with their usage, tool calls, and the run's own.",
            scope=READ,
            handler=faces.steps,
            answer=Steps,
        ),
        Operation(
            name="run_events",
            method="GET",
            path=f"{_RUN}/events",
            summary="What happens in a run, from any number on, until it has ended.",
            notes="Comments keep the connection open where nothing happens for a while.",
            scope=READ,
            query=EventOptions,
            headers=_AFTER,
            handler=faces.events,
            answer=EventFrame,
            answer_media_type="text/event-stream",
        ),
        Operation(
            name="run_artifacts",
            method="GET",
            path=f"{_RUN}/artifacts",
            summary="The files that a run has left so far.",
            scope=READ,
            query=ArtifactsOptions,
            handler=faces.artifacts,
            answer=ArtifactList,
        ),
        Operation(
            name="run_artifact",
            method="GET",
            path=f"{_RUN}/artifacts/{{artifact:path}}",
            summary="The bytes of one of them, as a file to keep.",
            notes="The name may have slashes. `Content-Type` is what the run says it is, `ETag` the SHA-256.",
            scope=READ,
            query=ArtifactOptions,
            headers=_KNOWN,
            handler=faces.artifact,
            answer=bytes,
            answer_media_type="*/*",
        ),
        Operation(
            name="run_picture",
            method="GET",
            path=f"{_RUN}/picture.svg",
            summary="The message graph of a run and the timeline of its agents.",
            scope=READ,
            handler=faces.picture_svg,
            answer=str,
            answer_media_type="image/svg+xml",
        ),
    ]


# What is done to a run that goes on, or has ended


class _Steering:
    def __init__(self, runs: RunService) -> None:
        self._runs = runs

    async def cancel(self, request: Request) -> Response:
        return json_response({"cancelled": await self._runs.cancel(principal_of(request), _id(request))})

    async def pause(self, request: Request) -> Response:
        return json_response({"paused": await self._runs.pause(principal_of(request), _id(request))})

    async def resume(self, request: Request) -> Response:
        return json_response({"resumed": await self._runs.resume(principal_of(request), _id(request))})

    async def retry(self, request: Request, body: RetryRequest) -> Response:
        principal, key = principal_of(request), request.headers.get("idempotency-key")
        run_id = await self._runs.retry(
            principal, _id(request), from_step=body.from_step, idempotency_key=key
        )
        return _accepted(run_id, retry_of=_id(request))

    async def questions(self, request: Request) -> Response:
        return json_response({"questions": await self._runs.questions(principal_of(request), _id(request))})

    async def answer(self, request: Request, body: AnswerRequest) -> Response:
        question_id = str(request.path_params["question_id"])
        is_new = await self._runs.answer(principal_of(request), _id(request), question_id, body.answer)
        return json_response({"question_id": question_id, "answer": body.answer, "is_new": is_new})

    async def signal(self, request: Request, body: SignalRequest) -> Response:
        name, key = str(request.path_params["name"]), request.headers.get("idempotency-key")
        is_new = await self._runs.signal(principal_of(request), _id(request), name, body.value, key=key)
        return json_response({"signal": name, "is_new": is_new})


def _steering_operations(faces: _Steering) -> list[Operation]:
    return [
        Operation(
            name="cancel_run",
            method="POST",
            path=f"{_RUN}/cancel",
            summary="Cancel a run and its agents, wherever they work.",
            scope=WRITE,
            handler=faces.cancel,
            answer=Cancelled,
        ),
        Operation(
            name="pause_run",
            method="POST",
            path=f"{_RUN}/pause",
            summary="Hold a run before its next steps; those under way end.",
            scope=WRITE,
            handler=faces.pause,
            answer=Paused,
        ),
        Operation(
            name="resume_run",
            method="POST",
            path=f"{_RUN}/resume",
            summary="Continue a paused, interrupted or cancelled run after its last recorded step.",
            scope=WRITE,
            handler=faces.resume,
            answer=Resumed,
        ),
        Operation(
            name="retry_run",
            method="POST",
            path=f"{_RUN}/retry",
            summary="A new run that takes over the recorded steps of an ended one before `from_step`.",
            scope=WRITE,
            body=RetryRequest,
            headers=_KEY,
            handler=faces.retry,
            answer=Accepted,
            status=202,
        ),
        Operation(
            name="run_questions",
            method="GET",
            path=f"{_RUN}/questions",
            summary="What a run has asked people, and what was answered.",
            scope=READ,
            handler=faces.questions,
            answer=Questions,
        ),
        Operation(
            name="answer_question",
            method="POST",
            path=f"{_RUN}/questions/{{question_id}}",
            summary="Answer a question; the run goes on with it wherever it is.",
            scope=WRITE,
            body=AnswerRequest,
            handler=faces.answer,
            answer=Answered,
        ),
        Operation(
            name="signal_run",
            method="POST",
            path=f"{_RUN}/signals/{{name}}",
            summary="Send a signal, kept until a step waits for it.",
            scope=WRITE,
            body=SignalRequest,
            headers=_KEY,
            handler=faces.signal,
            answer=Signalled,
        ),
    ]


# Workflows


class _Workflows:
    def __init__(self, runs: RunService) -> None:
        self._runs = runs

    async def submit(self, request: Request, body: WorkflowRequest) -> Response:
        key = request.headers.get("idempotency-key")
        return _accepted(await self._runs.submit_workflow(principal_of(request), body, idempotency_key=key))

    async def validate(self, request: Request, body: WorkflowSource) -> Response:
        return json_response(await self._runs.validate_workflow(principal_of(request), body))


def _workflow_operations(faces: _Workflows) -> list[Operation]:
    return [
        Operation(
            name="submit_workflow",
            method="POST",
            path="/v1/workflows",
            summary="Accept a run of a workflow; it is a run like any other from then on.",
            scope=WRITE,
            body=WorkflowRequest,
            headers=_KEY,
            handler=faces.submit,
            answer=Accepted,
            status=202,
            errors=(NotFound,),  # a run that it shall begin after
        ),
        Operation(
            name="validate_workflow",
            method="POST",
            path="/v1/workflows/validate",
            summary="Every problem of a workflow, without running it.",
            scope=READ,
            body=WorkflowSource,
            handler=faces.validate,
            answer=Validation,
        ),
    ]


# Schedules


class _Schedules:
    def __init__(self, runs: RunService) -> None:
        self._runs = runs

    async def add(self, request: Request, body: ScheduleRequest) -> Response:
        added = await self._runs.schedules.add(principal_of(request), body)
        return json_response(added, 201, headers={"location": f"/v1/schedules/{added.name}"})

    async def listed(self, request: Request) -> Response:
        return json_response({"schedules": await self._runs.schedules.every(principal_of(request))})

    async def show(self, request: Request) -> Response:
        return json_response(await self._runs.schedules.show(principal_of(request), _schedule(request)))

    async def pause(self, request: Request) -> Response:
        paused = await self._runs.schedules.pause(principal_of(request), _schedule(request))
        return json_response({"paused": paused})

    async def resume(self, request: Request) -> Response:
        resumed = await self._runs.schedules.resume(principal_of(request), _schedule(request))
        return json_response({"resumed": resumed})

    async def remove(self, request: Request) -> Response:
        await self._runs.schedules.remove(principal_of(request), _schedule(request))
        return json_response({"removed": True})


def _schedule(request: Request) -> str:
    return str(request.path_params["schedule"])


def _schedule_operations(faces: _Schedules) -> list[Operation]:
    return [
        Operation(
            name="add_schedule",
            method="POST",
            path="/v1/schedules",
            summary="Run a workflow by itself at the times that its file names.",
            scope=WRITE,
            body=ScheduleRequest,
            handler=faces.add,
            answer=Schedule,
            status=201,
        ),
        Operation(
            name="list_schedules",
            method="GET",
            path="/v1/schedules",
            summary="Schedules by name, with their next times.",
            scope=READ,
            handler=faces.listed,
            answer=ScheduleList,
        ),
        Operation(
            name="show_schedule",
            method="GET",
            path=_SCHEDULE,
            summary="One schedule, and its latest runs.",
            scope=READ,
            handler=faces.show,
            answer=Schedule,
        ),
        Operation(
            name="remove_schedule",
            method="DELETE",
            path=_SCHEDULE,
            summary="Remove a schedule; its runs stay.",
            scope=WRITE,
            handler=faces.remove,
            answer=Removed,
        ),
        Operation(
            name="pause_schedule",
            method="POST",
            path=f"{_SCHEDULE}/pause",
            summary="Begin no further runs until it is resumed.",
            scope=WRITE,
            handler=faces.pause,
            answer=Paused,
        ),
        Operation(
            name="resume_schedule",
            method="POST",
            path=f"{_SCHEDULE}/resume",
            summary="Go on with the next time that is due from now.",
            scope=WRITE,
            handler=faces.resume,
            answer=Resumed,
        ),
    ]


def _accepted(run_id: str, *, retry_of: str | None = None) -> Response:
    accepted = Accepted(run_id=run_id, retry_of=retry_of)
    body = accepted.model_dump(exclude_none=True)
    return json_response(body, 202, headers={"location": f"/v1/runs/{run_id}"})


def _file(found: ArtifactContent, known: str | None) -> Response:
    """An artifact's bytes, as a file that no browser takes for anything else than it says, nor shows.

    Args:
        found: The artifact.
        known: The tags that the caller has.
    """
    tag = f'"{found.artifact.sha256}"'
    name = found.artifact.name.rpartition("/")[2]
    plain = "".join(one if one.isascii() and one not in '"%' else "_" for one in name)
    headers = {
        "etag": tag,
        "cache-control": "private, no-cache",
        "x-content-type-options": "nosniff",
        # The name in ASCII and in full: RFC 6266.
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
        # Whoever opens it in spite of all that: a document that may load and run nothing.
        "content-security-policy": "default-src 'none'; sandbox",
        "x-artifact-version": str(found.artifact.version),
    }
    if tag in {one.strip().removeprefix("W/") for one in (known or "").split(",")}:
        return Response(status_code=304, headers=headers)
    # As it is stored: Starlette would add a charset of its own to text.
    return Response(found.data, headers=headers | {"content-type": found.artifact.media_type})


def _last_seen(request: Request) -> int:
    """Sequence number that a client which comes back names, as browsers do by themselves; else 0.

    Raises:
        InvalidInput: it is none of ours.
    """
    last = request.headers.get("last-event-id", "")
    try:
        return EventOptions.model_validate_strings({"after": last} if last else {}).after or 0
    except ValidationError:
        raise InvalidInput(
            f"the header last-event-id is {last!r}, no sequence number of an event",
            hint="send the id of the last event that was seen, or no such header",
        ) from None


async def _events(
    runs: RunService, principal: Principal, run_id: str, after: int
) -> AsyncIterator[ServerEvent]:
    async for event in runs.events(principal, run_id, after=after):
        yield ServerEvent(event.model_dump_json(), event.kind, str(event.sequence))


def _states(raw: str) -> tuple[RunState, ...]:
    values = tuple(value for value in raw.split(",") if value)
    for value in values:
        if value not in get_args(RunState):
            raise InvalidInput(
                f"the query parameter state is {value!r}", hint=f"use one of {', '.join(get_args(RunState))}"
            )
    return cast(tuple[RunState, ...], values)
