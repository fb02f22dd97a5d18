"""HTTP face of runs. Thin: each route parses, calls the service, encodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.ports import RunState
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.web import event_stream, json_response, parse, require
from agentic_flow.swarm.picture import picture
from agentic_flow.swarm.questions import AnswerRequest
from agentic_flow.swarm.runs import PurgeRequest, RetryRequest, RunService, RunSpec, SignalRequest
from agentic_flow.swarm.schedules import ScheduleRequest
from agentic_flow.swarm.workflow_spec import WorkflowRequest, WorkflowSource

_LIST_MAX = 500


def build_routes(runs: RunService) -> list[Route]:
    """`/v1/runs`, `/v1/workflows` and `/v1/schedules` over a run service.

    POST /v1/runs takes a RunSpec and an optional `Idempotency-Key` header and answers 202 with the id; POST
    /v1/workflows does with a WorkflowRequest. POST /v1/workflows/validate takes a WorkflowSource, POST
    /v1/schedules a ScheduleRequest.
    """

    async def submit(request: Request) -> Response:
        principal = require(request, "runs:write")
        spec = await parse(request, RunSpec)
        key = request.headers.get("idempotency-key")
        run_id = await runs.submit(principal, spec, idempotency_key=key)
        return json_response({"run_id": run_id}, 202, headers={"location": f"/v1/runs/{run_id}"})

    async def submit_workflow(request: Request) -> Response:
        principal = require(request, "runs:write")
        asked = await parse(request, WorkflowRequest)
        key = request.headers.get("idempotency-key")
        run_id = await runs.submit_workflow(principal, asked, idempotency_key=key)
        return json_response({"run_id": run_id}, 202, headers={"location": f"/v1/runs/{run_id}"})

    async def validate_workflow(request: Request) -> Response:
        principal = require(request, "runs:read")
        source = await parse(request, WorkflowSource)
        return json_response(await runs.validate_workflow(principal, source))

    async def list_runs(request: Request) -> Response:
        principal = require(request, "runs:read")
        states = _states(request.query_params.get("state", ""))
        limit = _integer(request, "limit", 50, least=1, most=_LIST_MAX)
        return json_response({"runs": await runs.list_runs(principal, states=states, limit=limit)})

    async def show(request: Request) -> Response:
        principal = require(request, "runs:read")
        return json_response(await runs.show(principal, _id(request)))

    async def steps(request: Request) -> Response:
        principal = require(request, "runs:read")
        return json_response({"steps": await runs.steps(principal, _id(request))})

    async def picture_svg(request: Request) -> Response:
        principal = require(request, "runs:read")
        result = await runs.show(principal, _id(request))
        drawn = picture(result, await runs.steps(principal, _id(request)))
        # A picture that is opened by itself is a document: it may load and run nothing.
        headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(drawn, media_type="image/svg+xml", headers=headers)

    async def cancel(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response({"cancelled": await runs.cancel(principal, _id(request))})

    async def pause(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response({"paused": await runs.pause(principal, _id(request))})

    async def resume(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response({"resumed": await runs.resume(principal, _id(request))})

    async def questions(request: Request) -> Response:
        principal = require(request, "runs:read")
        return json_response({"questions": await runs.questions(principal, _id(request))})

    async def answer(request: Request) -> Response:
        principal = require(request, "runs:write")
        given = await parse(request, AnswerRequest)
        question_id = str(request.path_params["question_id"])
        is_new = await runs.answer(principal, _id(request), question_id, given.answer)
        return json_response({"question_id": question_id, "answer": given.answer, "is_new": is_new})

    async def signal(request: Request) -> Response:
        principal = require(request, "runs:write")
        given = await parse(request, SignalRequest)
        name, key = str(request.path_params["name"]), request.headers.get("idempotency-key")
        is_new = await runs.signal(principal, _id(request), name, given.value, key=key)
        return json_response({"signal": name, "is_new": is_new})

    async def retry(request: Request) -> Response:
        principal = require(request, "runs:write")
        asked = await parse(request, RetryRequest)
        key = request.headers.get("idempotency-key")
        run_id = await runs.retry(principal, _id(request), from_step=asked.from_step, idempotency_key=key)
        answer = {"run_id": run_id, "retry_of": _id(request)}
        return json_response(answer, 202, headers={"location": f"/v1/runs/{run_id}"})

    async def purge(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response(await runs.purge(principal, await parse(request, PurgeRequest)))

    async def add_schedule(request: Request) -> Response:
        principal = require(request, "runs:write")
        added = await runs.schedules.add(principal, await parse(request, ScheduleRequest))
        return json_response(added, 201, headers={"location": f"/v1/schedules/{added.name}"})

    async def list_schedules(request: Request) -> Response:
        principal = require(request, "runs:read")
        return json_response({"schedules": await runs.schedules.every(principal)})

    async def show_schedule(request: Request) -> Response:
        principal = require(request, "runs:read")
        return json_response(await runs.schedules.show(principal, _schedule(request)))

    async def pause_schedule(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response({"paused": await runs.schedules.pause(principal, _schedule(request))})

    async def resume_schedule(request: Request) -> Response:
        principal = require(request, "runs:write")
        return json_response({"resumed": await runs.schedules.resume(principal, _schedule(request))})

    async def remove_schedule(request: Request) -> Response:
        principal = require(request, "runs:write")
        await runs.schedules.remove(principal, _schedule(request))
        return json_response({"removed": True})

    async def events(request: Request) -> Response:
        principal = require(request, "runs:read")
        last = request.headers.get("last-event-id")
        after = _integer(request, "after", int(last) if last and last.isdigit() else 0, least=0)
        await runs.show(principal, _id(request))  # an unknown run is a 404, not a stream that fails
        return event_stream(_events(runs, principal, _id(request), after))

    return [
        Route("/v1/runs", submit, methods=["POST"]),
        Route("/v1/runs", list_runs, methods=["GET"]),
        Route("/v1/runs/purge", purge, methods=["POST"]),
        Route("/v1/workflows", submit_workflow, methods=["POST"]),
        Route("/v1/workflows/validate", validate_workflow, methods=["POST"]),
        Route("/v1/runs/{run_id}", show, methods=["GET"]),
        Route("/v1/runs/{run_id}/steps", steps, methods=["GET"]),
        Route("/v1/runs/{run_id}/events", events, methods=["GET"]),
        Route("/v1/runs/{run_id}/questions", questions, methods=["GET"]),
        Route("/v1/runs/{run_id}/questions/{question_id}", answer, methods=["POST"]),
        Route("/v1/runs/{run_id}/picture.svg", picture_svg, methods=["GET"]),
        Route("/v1/runs/{run_id}/cancel", cancel, methods=["POST"]),
        Route("/v1/runs/{run_id}/pause", pause, methods=["POST"]),
        Route("/v1/runs/{run_id}/signals/{name}", signal, methods=["POST"]),
        Route("/v1/runs/{run_id}/retry", retry, methods=["POST"]),
        Route("/v1/runs/{run_id}/resume", resume, methods=["POST"]),
        Route("/v1/schedules", add_schedule, methods=["POST"]),
        Route("/v1/schedules", list_schedules, methods=["GET"]),
        Route("/v1/schedules/{schedule}", show_schedule, methods=["GET"]),
        Route("/v1/schedules/{schedule}", remove_schedule, methods=["DELETE"]),
        Route("/v1/schedules/{schedule}/pause", pause_schedule, methods=["POST"]),
        Route("/v1/schedules/{schedule}/resume", resume_schedule, methods=["POST"]),
    ]


async def _events(
    runs: RunService, principal: Principal, run_id: str, after: int
) -> AsyncIterator[ServerEvent]:
    async for event in runs.events(principal, run_id, after=after):
        yield ServerEvent(event.model_dump_json(), event.kind, str(event.sequence))


def _id(request: Request) -> str:
    return str(request.path_params["run_id"])


def _schedule(request: Request) -> str:
    return str(request.path_params["schedule"])


def _states(raw: str) -> tuple[RunState, ...]:
    values = tuple(value for value in raw.split(",") if value)
    for value in values:
        if value not in get_args(RunState):
            raise InvalidInput(
                f"the query parameter state is {value!r}", hint=f"use one of {', '.join(get_args(RunState))}"
            )
    return cast(tuple[RunState, ...], values)


def _integer(request: Request, name: str, default: int, *, least: int, most: int | None = None) -> int:
    raw = request.query_params.get(name)
    if raw is None:
        return default
    if not raw.isdigit() or int(raw) < least or (most is not None and int(raw) > most):
        bounds = f"from {least}" + (f" to {most}" if most is not None else "")
        raise InvalidInput(f"the query parameter {name} is {raw!r}", hint=f"give a whole number {bounds}")
    return int(raw)
