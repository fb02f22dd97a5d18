"""The gateway's HTTP twin: the same `Completer`, when the platform runs elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.messages import Completion, CompletionRequest, ModelInfo, StreamEnd, StreamEvent

_EVENT: TypeAdapter[StreamEvent] = TypeAdapter(StreamEvent)
_COMPLETION = TypeAdapter(Completion)
_MODEL = TypeAdapter(ModelInfo)
_MODELS = TypeAdapter(list[ModelInfo])


class _ModelList(TypedDict):
    data: list[dict[str, Any]]


_LIST = TypeAdapter(_ModelList)

Value = TypeVar("Value")


class RemoteGateway(HttpTwin):
    """`Completer` over HTTP; constructed like every HttpTwin.

    The far side does the retries towards the provider. The twin repeats a call only when it was never
    received, because a repeated model call is paid twice.
    """

    async def complete(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> Completion:
        """See `Completer`. Also raises Unavailable when the platform cannot be reached."""
        answer = await self.call(
            "POST",
            "/v1/complete",
            body=request.model_dump_json().encode(),
            principal=principal,
            deadline=deadline,
            idempotent=False,
            idempotency_key=idempotency_key,
        )
        return _read(_COMPLETION, answer)

    async def stream(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """See `Completer`. A stream that ends without StreamEnd raises Unavailable."""
        events = self.stream_events(
            "POST",
            "/v1/complete/stream",
            body=request.model_dump_json().encode(),
            principal=principal,
            deadline=deadline,
            idempotency_key=idempotency_key,
        )
        async with aclosing(events) as reading:
            async for sent in reading:
                try:
                    event = _EVENT.validate_json(sent.data, extra="ignore")
                except ValidationError as error:
                    raise _not_ours(error) from error
                yield event
                if isinstance(event, StreamEnd):
                    return
        raise Unavailable(
            "the stream of the platform ended before the answer did", hint="the call can be repeated"
        )

    async def resolve(self, model: str | None, *, principal: Principal) -> ModelInfo:
        """See `Completer`."""
        params = {} if model is None else {"model": model}
        return _read(_MODEL, await self.call("GET", "/v1/resolve", params=params, principal=principal))

    async def models(self, *, principal: Principal) -> list[ModelInfo]:
        """See `Completer`."""
        answer = await self.call("GET", "/v1/models", principal=principal)
        listed = _read(_LIST, answer)["data"]
        known = ModelInfo.model_fields
        return _read(_MODELS, [{k: v for k, v in entry.items() if k in known} for entry in listed])


def _read(adapter: TypeAdapter[Value], answer: Any) -> Value:
    try:
        return adapter.validate_python(answer, extra="ignore")  # a newer platform may say more
    except ValidationError as error:
        raise _not_ours(error) from error


def _not_ours(error: ValidationError) -> Unavailable:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return Unavailable(
        f"the platform answered with something that is no answer of a gateway ({where}: {first['msg']})",
        hint="check that peers.platform_url names a platform of this version",
    )
