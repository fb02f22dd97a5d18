"""The gateway as the vendors' SDKs know it, on their paths.

POST /v1/chat/completions      OpenAI Chat Completions, JSON and SSE
POST /v1/responses             OpenAI Responses, JSON and SSE
POST /v1/messages              Anthropic Messages, JSON and SSE
POST /v1/messages/count_tokens exact where the model's provider counts, else an estimate; a header says which

Where the model's provider speaks the caller's format, the request passes through with nothing but the model's
name rewritten, and the answer untouched. Otherwise both are translated, and what cannot be is refused. One
exception: a stream of Chat Completions is asked for its usage in any case, because what was billed must be
known; callers who did not ask for it do not see it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, InvalidInput, ProviderProtocol
from agentic_flow.core.messages import Completion, CompletionRequest, JsonObject, StreamEvent
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
from agentic_flow.gateway.questions import BodyQuestion, Destination, tokens_of
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.walk import Walk
from agentic_flow.gateway.wire.openai import ask_usage, wants_usage
from agentic_flow.gateway.wire.passing import PassingRequest, rename_model

SCOPE = "models:use"
IDEMPOTENCY_HEADER = "idempotency-key"
COUNT_HEADER = "x-agentic-flow-token-count"
# The gateway's own setting is the limit that matters; this one bounds a caller who names none.
TIMEOUT_MAX_S = 3600.0
# What Anthropic's clients say about the API itself; everything else they send concerns this server.
_PASSED_HEADERS = ("anthropic-version", "anthropic-beta")
# Who asks within the caller's house, and what belongs together.
_LABEL_HEADERS = {name: f"x-agentic-flow-{name}" for name in ("agent", "run", "conversation")}
_LABEL = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")


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


class _VendorQuestion(BodyQuestion):
    """A request in the format of a front."""

    def __init__(self, front: Front, request: Request, body: bytes, sent: JsonObject, asked: str) -> None:
        given = request.headers
        super().__init__(
            body,
            sent,
            asked,
            wire=front.wire,
            stream=Fields(sent).flag("stream") or False,
            **labels_of(request),
        )
        self._front = front
        self._headers = {name: given[name] for name in _PASSED_HEADERS if name in given}
        self._query: str = request.scope["query_string"].decode("latin-1")
        self._call: Call | None = None

    def call(self) -> Call:
        """The decoded request; decoded once.

        Raises:
            InvalidInput: a field cannot be translated; names it.
        """
        if self._call is None:
            call = self._front.decode(self._sent)
            asked = call.request.model_copy(update={"agent": self.agent, "run": self.run})
            self._call = call._replace(request=asked)
        return self._call

    def request(self) -> CompletionRequest:
        return self.call().request

    def also(self) -> Mapping[str, str]:
        told = {**self._headers, "query": self._query}
        # A stream with its usage is another answer than one without.
        return {**told, "usage": "hidden"} if self._hides_usage() else told

    def passing(self, destination: Destination) -> PassingRequest:
        self._front.check(self._sent)
        sent = self.to_path(destination, self._front.path)
        if self._hides_usage():
            return sent._replace(body=ask_usage(sent.body, self._sent), hides_usage=True)
        return sent

    def _hides_usage(self) -> bool:
        """Whether the caller wants a stream without its usage, which the books need all the same."""
        return self.stream and self.wire == CHAT.wire and not wants_usage(self._sent)

    def to_path(self, destination: Destination, path: str) -> PassingRequest:
        """The same, for another endpoint of the provider."""
        native = destination.model
        return PassingRequest(
            path=f"{path}?{self._query}" if self._query else path,
            headers=self._headers,
            body=self._body if self.asked == native else rename_model(self._body, native),
            sent=self._sent,
            stream=self.stream,
        )


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
        question = await self._question()
        walk = self._gateway.walk(
            question,
            principal=self._principal,
            deadline=self._deadline,
            idempotency_key=self._request.headers.get(IDEMPOTENCY_HEADER),
            request_id=self._id,
        )
        if question.stream:
            return await self._streamed(question, walk)
        whole = await unless_gone(self._request, walk.whole())
        body = whole.body
        if body is None:
            body = self._front.encode(whole.completion, self._id, question.call())
        return self._json(body, **walk.headers)

    async def count(self) -> Response:
        """The tokens of a request: counted by the provider, or estimated where it cannot be asked."""
        question = await self._question()
        destination = await self._gateway.destination(question.asked)
        if destination.wire == self._front.wire:
            passing = question.to_path(destination, f"{self._front.path}/count_tokens")
            work = self._gateway.pass_count(
                destination, passing, principal=self._principal, deadline=self._deadline
            )
            return self._json(await unless_gone(self._request, work), **{COUNT_HEADER: "exact"})
        tokens = tokens_of(anthropic_messages.decode_messages(question.sent(), counting=True).request)
        headers = {**self._headers(), COUNT_HEADER: "estimated"}
        return json_response({"input_tokens": tokens}, headers=headers)

    async def _question(self) -> _VendorQuestion:
        body = await self._request.body()
        sent = read_body(body)
        return _VendorQuestion(self._front, self._request, body, sent, Fields(sent).demand("model"))

    def _headers(self) -> dict[str, str]:
        # Anthropic's clients look for the request's id under this name; the floor adds the other one.
        return {"request-id": self._id} if self._front.wire == "anthropic" else {}

    def _json(self, body: bytes, **headers: str) -> Response:
        return Response(body, media_type="application/json", headers={**self._headers(), **headers})

    async def _streamed(self, question: _VendorQuestion, walk: Walk) -> Response:
        """The answer, once its first event is there: until then a failure has a status of its own."""
        source = _Encoded(self._front, question, walk, self._id)
        chunks = source.chunks()
        try:
            first = await unless_gone(self._request, _first(chunks))
        except BaseException:
            await chunks.aclose()
            raise
        headers = {**self._headers(), **walk.headers}
        return ModelStream(first, chunks, last_words=source.last_words, headers=headers)


class _Encoded:
    """A streamed answer in its caller's format: passed through, or encoded event by event."""

    def __init__(self, front: Front, question: _VendorQuestion, walk: Walk, request_id: str) -> None:
        self._front = front
        self._question = question
        self._walk = walk
        self._id = request_id
        self._encoder: Encoder | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        async with aclosing(self._walk.stream()) as events:
            async for event in events:
                if isinstance(event, bytes):
                    yield event
                    continue
                if self._encoder is None:
                    self._encoder = self._front.encoder(self._walk.model, self._id, self._question.call())
                chunk = self._encoder.take(event)
                if chunk:
                    yield chunk

    def last_words(self, error: AgenticFlowError) -> bytes:
        """How an error ends what was sent so far."""
        return self._front.last_words(error) if self._encoder is None else self._encoder.fail(error)


def labels_of(request: Request) -> dict[str, str | None]:
    """What a caller's headers say of agent, run and conversation.

    Raises:
        InvalidInput: one is too long or has characters that no name has.
    """
    found: dict[str, str | None] = {}
    for label, header in _LABEL_HEADERS.items():
        value = found[label] = request.headers.get(header)
        if value is not None and not _LABEL.fullmatch(value):
            raise InvalidInput(
                f"the header {header} is {value[:140]!r}", hint="use 1 to 128 letters, digits and . _ : / @ -"
            )
    return found


async def _first(source: AsyncGenerator[bytes]) -> bytes:
    async for chunk in source:
        return chunk
    raise ProviderProtocol("the stream ended before it began", hint="the call can be repeated")
