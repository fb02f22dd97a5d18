"""The gateway as the vendors' SDKs know it, on their paths.

POST /v1/chat/completions      OpenAI Chat Completions, JSON and SSE
POST /v1/responses             OpenAI Responses, JSON and SSE
POST /v1/messages              Anthropic Messages, JSON and SSE
POST /v1/messages/count_tokens exact where the model's provider counts, else an estimate; a header says which

Where the model's provider speaks the caller's format, the request passes through with nothing but the model's
name rewritten, and the answer untouched. Otherwise both are translated, and what cannot be is refused.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, ProviderProtocol
from agentic_flow.core.messages import Completion, JsonObject, StreamEvent
from agentic_flow.core.web import deadline_of, json_response, require
from agentic_flow.gateway.front import (
    anthropic_messages,
    openai_chat,
    openai_responses,
    openai_responses_answers,
)
from agentic_flow.gateway.front.errors import FrontError
from agentic_flow.gateway.front.fields import Fields, read_body
from agentic_flow.gateway.front.format import Call
from agentic_flow.gateway.front.streaming import ModelStream, unless_gone
from agentic_flow.gateway.service import Destination, Gateway
from agentic_flow.gateway.wire.format import CHARS_PER_TOKEN, IMAGE_TOKENS, request_chars, request_images
from agentic_flow.gateway.wire.passing import PassingRequest, rename_model

SCOPE = "models:use"
IDEMPOTENCY_HEADER = "idempotency-key"
COUNT_HEADER = "x-agentic-flow-token-count"
# The gateway's own setting is the limit that matters; this one bounds a caller who names none.
TIMEOUT_MAX_S = 3600.0
# What Anthropic's clients say about the API itself; everything else they send concerns this server.
_PASSED_HEADERS = ("anthropic-version", "anthropic-beta")


class Encoder(Protocol):
    """Encodes the events of one streamed answer."""

    def take(self, event: StreamEvent) -> bytes: ...

    def fail(self, error: AgenticFlowError) -> bytes:
        """How an error ends what was encoded so far."""
        ...


@dataclass(frozen=True, slots=True)
class Front:
    """One vendor's format, seen from its clients.

    Args:
        wire: Its name, which is also that of the providers' format.
        path: Where providers of the format take such a request, below their base URL.
        decode: The request of a body.
        encode: A completion, the request's id, the call → an answer.
        encoder: Model, request id, call → what encodes a stream.
        last_words: How an error ends a stream that passed through.
        check: Refuses what the gateway cannot do even where a request passes through.
    """

    wire: str
    path: str
    decode: Callable[[JsonObject], Call]
    encode: Callable[[Completion, str, Call], bytes]
    encoder: Callable[[str, str, Call], Encoder]
    last_words: Callable[[AgenticFlowError], bytes]
    check: Callable[[JsonObject], None] = lambda sent: None


CHAT = Front(
    wire="openai",
    path="/chat/completions",
    decode=openai_chat.decode_chat,
    encode=lambda completion, request_id, call: openai_chat.encode_chat(
        completion, answer_id=f"chatcmpl-{request_id}", created_s=int(time.time())
    ),
    encoder=lambda model, request_id, call: openai_chat.ChatStream(
        model,
        answer_id=f"chatcmpl-{request_id}",
        created_s=int(time.time()),
        include_usage=call.include_usage,
    ),
    last_words=openai_chat.error_event,
)
RESPONSES = Front(
    wire="responses",
    path="/responses",
    decode=openai_responses.decode_responses,
    encode=lambda completion, request_id, call: openai_responses_answers.encode_response(
        completion, answer_id=f"resp_{request_id}", created_s=int(time.time()), echo=call.echo
    ),
    encoder=lambda model, request_id, call: openai_responses_answers.ResponseStream(
        model, answer_id=f"resp_{request_id}", created_s=int(time.time()), echo=call.echo
    ),
    last_words=openai_responses_answers.error_event,
    check=openai_responses.check_passing,
)
MESSAGES = Front(
    wire="anthropic",
    path="/v1/messages",
    decode=anthropic_messages.decode_messages,
    encode=lambda completion, request_id, call: anthropic_messages.encode_message(
        completion, answer_id=f"msg_{request_id}"
    ),
    encoder=lambda model, request_id, call: anthropic_messages.MessageStream(
        model, answer_id=f"msg_{request_id}"
    ),
    last_words=anthropic_messages.error_event,
)


def build_front_routes(gateway: Gateway) -> list[Route]:
    """The routes that the vendors' SDKs call; each demands the scope `models:use`."""

    async def chat(request: Request) -> Response:
        return await _answered(CHAT, _Exchange(gateway, CHAT, request).answer())

    async def responses(request: Request) -> Response:
        return await _answered(RESPONSES, _Exchange(gateway, RESPONSES, request).answer())

    async def messages(request: Request) -> Response:
        return await _answered(MESSAGES, _Exchange(gateway, MESSAGES, request).answer())

    async def count_tokens(request: Request) -> Response:
        return await _answered(MESSAGES, _Exchange(gateway, MESSAGES, request).count())

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


async def _answered(front: Front, work: Coroutine[Any, Any, Response]) -> Response:
    try:
        return await work
    except AgenticFlowError as error:
        raise FrontError(error, front.wire) from error


class _Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, front: Front, request: Request) -> None:
        self._gateway = gateway
        self._front = front
        self._request = request
        self._principal: Principal = require(request, SCOPE)
        self._deadline: Deadline = deadline_of(request, TIMEOUT_MAX_S)
        self._id: str = request.state.request_id

    async def answer(self) -> Response:
        body = await self._request.body()
        sent = read_body(body)
        fields = Fields(sent)
        model, stream = fields.demand("model"), fields.flag("stream") or False
        destination = await self._gateway.destination(model)
        if self._front.wire in destination.passes:
            self._front.check(sent)
            passing = self._passing(destination, body, sent, stream, self._front.path)
            if stream:
                return await self._streamed(self._pass_stream(destination, passing), self._front.last_words)
            work = self._gateway.pass_whole(destination, passing, **self._about)
            return self._json(await unless_gone(self._request, work))
        call = self._front.decode(sent)
        asked = call.request.model_copy(update={"model": f"{destination.provider}:{destination.model}"})
        call = call._replace(request=asked)
        if stream:
            encoder = self._front.encoder(destination.model, self._id, call)
            return await self._streamed(self._translate_stream(encoder, call), encoder.fail)
        completion = await unless_gone(self._request, self._gateway.complete(asked, **self._about))
        return self._json(self._front.encode(completion, self._id, call))

    async def count(self) -> Response:
        """The tokens of a request: counted by the provider, or estimated where it cannot be asked."""
        body = await self._request.body()
        sent = read_body(body)
        destination = await self._gateway.destination(Fields(sent).demand("model"))
        if destination.wire == self._front.wire:
            passing = self._passing(destination, body, sent, False, f"{self._front.path}/count_tokens")
            work = self._gateway.pass_count(
                destination, passing, principal=self._principal, deadline=self._deadline
            )
            return self._json(await unless_gone(self._request, work), **{COUNT_HEADER: "exact"})
        request = anthropic_messages.decode_messages(sent, counting=True).request
        tokens = -(-request_chars(request) // CHARS_PER_TOKEN) + IMAGE_TOKENS * request_images(request)
        headers = {**self._headers(), COUNT_HEADER: "estimated"}
        return json_response({"input_tokens": tokens}, headers=headers)

    @property
    def _about(self) -> Mapping[str, Any]:
        return {
            "principal": self._principal,
            "deadline": self._deadline,
            "idempotency_key": self._request.headers.get(IDEMPOTENCY_HEADER),
        }

    def _headers(self) -> dict[str, str]:
        # Anthropic's clients look for the request's id under this name; the floor adds the other one.
        return {"request-id": self._id} if self._front.wire == "anthropic" else {}

    def _json(self, body: bytes, **headers: str) -> Response:
        return Response(body, media_type="application/json", headers={**self._headers(), **headers})

    def _passing(
        self, destination: Destination, body: bytes, sent: JsonObject, stream: bool, path: str
    ) -> PassingRequest:
        given = self._request.headers
        query = self._request.url.query
        return PassingRequest(
            path=f"{path}?{query}" if query else path,
            headers={name: given[name] for name in _PASSED_HEADERS if name in given},
            body=body if sent["model"] == destination.model else rename_model(body, destination.model),
            sent=sent,
            stream=stream,
        )

    async def _streamed(
        self, source: AsyncGenerator[bytes], last_words: Callable[[AgenticFlowError], bytes]
    ) -> Response:
        """The answer, once its first event is there: until then a failure has a status of its own."""
        try:
            first = await unless_gone(self._request, _first(source))
        except BaseException:
            await source.aclose()
            raise
        return ModelStream(first, source, last_words=last_words, headers=self._headers())

    def _pass_stream(self, destination: Destination, passing: PassingRequest) -> AsyncGenerator[bytes]:
        return self._gateway.pass_stream(destination, passing, **self._about)

    async def _translate_stream(self, encoder: Encoder, call: Call) -> AsyncGenerator[bytes]:
        events = self._gateway.stream(call.request, **self._about)
        async with aclosing(cast(AsyncGenerator[StreamEvent], events)) as reading:
            async for event in reading:
                chunk = encoder.take(event)
                if chunk:
                    yield chunk


async def _first(source: AsyncGenerator[bytes]) -> bytes:
    async for chunk in source:
        return chunk
    raise ProviderProtocol("the stream ended before it began", hint="the call can be repeated")
