"""HTTP twin of the swarm coordinator: the same RunService, in another process."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import orjson

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import DataCorrupted, Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.ports import RunState
from agentic_flow.swarm.questions import Question
from agentic_flow.swarm.runs import (
    Artifact,
    ArtifactContent,
    Purged,
    PurgeRequest,
    RunEvent,
    RunResult,
    RunSpec,
    RunStep,
)
from agentic_flow.swarm.schedules import Schedule, ScheduleRequest
from agentic_flow.swarm.workflow_spec import Validation, WorkflowRequest, WorkflowSource

_ENDED = frozenset({"completed", "failed", "cancelled"})
_RECONNECT_PAUSE_S = 0.5


class RemoteSwarm(HttpTwin):
    """RunService over HTTP; constructed like any HttpTwin."""

    @property
    def schedules(self) -> RemoteSchedules:
        """See RunService."""
        return RemoteSchedules(self)

    async def submit(self, principal: Principal, spec: RunSpec, *, idempotency_key: str | None = None) -> str:
        """See RunService. Without a key of the caller's it makes one, so that a retry cannot run twice."""
        answer = await self.call(
            "POST",
            "/v1/runs",
            body=spec.model_dump(mode="json"),
            principal=principal,
            idempotency_key=idempotency_key or secrets.token_hex(16),
        )
        return str(answer["run_id"])

    async def validate_workflow(self, principal: Principal, source: WorkflowSource) -> Validation:
        body = source.model_dump(mode="json", exclude_unset=True)
        answer = await self.call(
            "POST", "/v1/workflows/validate", body=body, principal=principal, idempotent=True
        )
        return Validation.from_record(answer)

    async def submit_workflow(
        self, principal: Principal, request: WorkflowRequest, *, idempotency_key: str | None = None
    ) -> str:
        """See RunService. Keys as in `submit`."""
        answer = await self.call(
            "POST",
            "/v1/workflows",
            body=request.model_dump(mode="json", exclude_unset=True),
            principal=principal,
            idempotency_key=idempotency_key or secrets.token_hex(16),
        )
        return str(answer["run_id"])

    async def wait(self, principal: Principal, run_id: str) -> RunResult:
        """See RunService. Survives restarts of the service while it waits."""
        while True:
            result = await self.show(principal, run_id)
            if result.state in _ENDED:
                return result
            async for _ in self.events(principal, run_id):
                pass

    async def show(self, principal: Principal, run_id: str) -> RunResult:
        return RunResult.from_record(await self.call("GET", _path(run_id), principal=principal))

    async def list_runs(
        self, principal: Principal, *, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[RunResult]:
        params: dict[str, str | int | float] = {"limit": limit}
        if states:
            params["state"] = ",".join(states)
        answer = await self.call("GET", "/v1/runs", params=params, principal=principal)
        return [RunResult.from_record(run) for run in answer["runs"]]

    async def steps(self, principal: Principal, run_id: str) -> list[RunStep]:
        answer = await self.call("GET", f"{_path(run_id)}/steps", principal=principal)
        return [RunStep.from_record(step) for step in answer["steps"]]

    async def artifacts(self, principal: Principal, run_id: str, *, versions: bool = False) -> list[Artifact]:
        params = {"versions": "true"} if versions else None
        answer = await self.call("GET", f"{_path(run_id)}/artifacts", params=params, principal=principal)
        return [Artifact.from_record(one) for one in answer["artifacts"]]

    async def artifact(
        self, principal: Principal, run_id: str, name: str, *, version: int | None = None
    ) -> ArtifactContent:
        """See RunService. Two requests: what there is, and the bytes of the version that was found."""
        found = [
            one
            for one in await self.artifacts(principal, run_id, versions=True)
            if one.name == name and version in (None, one.version)
        ]
        asked = found[-1].version if found else version  # of one that is not listed it tells what is wrong
        params = None if asked is None else {"version": asked}
        path = f"{_path(run_id)}/artifacts/{quote(name)}"
        data = await self.fetch(path, params=params, principal=principal)
        if not found or hashlib.sha256(data).hexdigest() != found[-1].sha256:
            raise DataCorrupted(
                f"artifact {name!r} of run {run_id!r} did not arrive as it is listed", hint="fetch it again"
            )
        return ArtifactContent(artifact=found[-1], data=data)

    async def questions(self, principal: Principal, run_id: str) -> list[Question]:
        answer = await self.call("GET", f"{_path(run_id)}/questions", principal=principal)
        return [Question.from_record(one) for one in answer["questions"]]

    async def answer(self, principal: Principal, run_id: str, question_id: str, answer: str) -> bool:
        given = await self.call(
            "POST",
            f"{_path(run_id)}/questions/{quote(question_id, safe='')}",
            body={"answer": answer},
            principal=principal,
            idempotent=True,
        )
        return bool(given["is_new"])

    async def resume(self, principal: Principal, run_id: str) -> bool:
        answer = await self.call("POST", f"{_path(run_id)}/resume", principal=principal, idempotent=True)
        return bool(answer["resumed"])

    async def pause(self, principal: Principal, run_id: str) -> bool:
        answer = await self.call("POST", f"{_path(run_id)}/pause", principal=principal, idempotent=True)
        return bool(answer["paused"])

    async def cancel(self, principal: Principal, run_id: str) -> bool:
        answer = await self.call("POST", f"{_path(run_id)}/cancel", principal=principal, idempotent=True)
        return bool(answer["cancelled"])

    async def signal(
        self, principal: Principal, run_id: str, name: str, value: Any = None, *, key: str | None = None
    ) -> bool:
        """See RunService. Without a key of the caller's it makes one, so that a retry is no second signal."""
        given = await self.call(
            "POST",
            f"{_path(run_id)}/signals/{quote(name, safe='')}",
            body={"value": value},
            principal=principal,
            idempotency_key=key or secrets.token_hex(16),
        )
        return bool(given["is_new"])

    async def retry(
        self,
        principal: Principal,
        run_id: str,
        *,
        from_step: str | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """See RunService. Keys as in `submit`."""
        answer = await self.call(
            "POST",
            f"{_path(run_id)}/retry",
            body={"from_step": from_step},
            principal=principal,
            idempotency_key=idempotency_key or secrets.token_hex(16),
        )
        return str(answer["run_id"])

    async def purge(self, principal: Principal, request: PurgeRequest) -> Purged:
        body = request.model_dump(mode="json")
        answer = await self.call("POST", "/v1/runs/purge", body=body, principal=principal)
        return Purged.from_record(answer)

    async def events(self, principal: Principal, run_id: str, *, after: int = 0) -> AsyncIterator[RunEvent]:
        """See RunService. A stream that breaks is opened again after the last event seen."""
        failures = 0
        while True:
            came = False
            try:
                async with aclosing(
                    self.stream_events(
                        "GET", f"{_path(run_id)}/events", params={"after": after}, principal=principal
                    )
                ) as stream:
                    async for sent in stream:
                        failures, came = 0, True
                        event = RunEvent.told(orjson.loads(sent.data))
                        yield event
                        if event.kind == "run_finished":
                            return
                        after = max(after, event.sequence)
                if not came and (await self.show(principal, run_id)).state in _ENDED:
                    return  # nothing is above `after`, and nothing will be
            except Unavailable:
                failures += 1
                if failures >= self._attempts:
                    raise
            await asyncio.sleep(_RECONNECT_PAUSE_S)


class RemoteSchedules:
    """ScheduleService over HTTP.

    Args:
        twin: Makes the calls.
    """

    def __init__(self, twin: HttpTwin) -> None:
        self._twin = twin

    async def add(self, principal: Principal, request: ScheduleRequest) -> Schedule:
        """See ScheduleService. Not repeated by itself: a second time there is one of the name."""
        body = request.model_dump(mode="json", exclude_unset=True)
        answer = await self._twin.call("POST", "/v1/schedules", body=body, principal=principal)
        return Schedule.from_record(answer)

    async def every(self, principal: Principal) -> list[Schedule]:
        answer = await self._twin.call("GET", "/v1/schedules", principal=principal)
        return [Schedule.from_record(one) for one in answer["schedules"]]

    async def show(self, principal: Principal, name: str) -> Schedule:
        return Schedule.from_record(await self._twin.call("GET", _schedule(name), principal=principal))

    async def pause(self, principal: Principal, name: str) -> bool:
        return bool((await self._post(principal, name, "pause"))["paused"])

    async def resume(self, principal: Principal, name: str) -> bool:
        return bool((await self._post(principal, name, "resume"))["resumed"])

    async def remove(self, principal: Principal, name: str) -> None:
        await self._twin.call("DELETE", _schedule(name), principal=principal, idempotent=False)

    async def _post(self, principal: Principal, name: str, what: str) -> Any:
        path = f"{_schedule(name)}/{what}"
        return await self._twin.call("POST", path, principal=principal, idempotent=True)


def _schedule(name: str) -> str:
    return f"/v1/schedules/{quote(name, safe='')}"


def _path(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"
