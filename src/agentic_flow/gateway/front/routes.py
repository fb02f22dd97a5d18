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
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import orjson
import structlog
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, ProviderProtocol
from agentic_flow.core.messages import Completion, CompletionRequest, JsonObject, StreamEvent
from agentic_flow.core.web import deadline_in, known_principal, to_json
from agentic_flow.core.web_floor import AHEAD, Ahead, DirectRoute, IncomingBody, OutgoingAnswer, RawHeaderMap
from agentic_flow.gateway.calls import changed
from agentic_flow.gateway.front import (
    anthropic_messages,
    openai_chat,
    openai_responses,
    openai_responses_answers,
)
from agentic_flow.gateway.front.errors import FrontError
from agentic_flow.gateway.front.fields import Fields, read_body
from agentic_flow.gateway.front.format import Call
from agentic_flow.gateway.front.streaming import send_stream, unless_left
from agentic_flow.gateway.questions import BodyQuestion, Destination, tokens_of
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.straight import NotOrdinary, StraightWalk
from agentic_flow.gateway.walk import Walk
from agentic_flow.gateway.wire.openai import ask_usage, wants_usage
from agentic_flow.gateway.wire.passing import PassingRequest, rename_model

_log = structlog.get_logger(__name__)

SCOPE = "models:use"
IDEMPOTENCY_HEADER = "idempotency-key"
_IDEMPOTENCY_NAME = IDEMPOTENCY_HEADER.encode()
_JSON_TYPE = (b"content-type", b"application/json")
_JSON_LINE = b"content-type: application/json"
COUNT_HEADER = "x-agentic-flow-token-count"
# The gateway's own setting is the limit that matters; this one bounds a caller who names none.
TIMEOUT_MAX_S = 3600.0
# What Anthropic's clients say about the API itself; everything else they send concerns this server.
_PASSED_HEADERS = {name: name.encode() for name in ("anthropic-version", "anthropic-beta")}
_PASSED_SET = frozenset(_PASSED_HEADERS.values())
# Who asks within the caller's house, and what belongs together.
_LABEL_NAMES = tuple(
    (f"x-agentic-flow-{label}".encode(), label) for label in ("agent", "run", "conversation")
)
_LABEL_SET = frozenset(name for name, _ in _LABEL_NAMES)
_NAMED = re.compile(rb"\s*:\s*")
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
    check: Callable[[JsonObject], None] | None = None


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

    async def chat(exchange: _Exchange) -> None:
        await exchange.answer()

    async def count(exchange: _Exchange) -> None:
        await exchange.count()

    def answering(path: str, front: Front) -> Route:
        return DirectRoute(
            path,
            _FrontApp(gateway, front, chat),
            methods=["POST"],
            ahead=partial(_begin, gateway, front),
        )

    return [
        answering("/v1/chat/completions", CHAT),
        answering("/v1/responses", RESPONSES),
        answering("/v1/messages", MESSAGES),
        DirectRoute("/v1/messages/count_tokens", _FrontApp(gateway, MESSAGES, count), methods=["POST"]),
    ]


def _begin(gateway: Gateway, front: Front, ahead: Ahead) -> bool:
    """Begin to answer a request on the straight path, if it is ordinary."""
    given = ahead.headers
    body = ahead.body()
    if body is None or ahead.exchange.scope["query_string"] or _IDEMPOTENCY_NAME in given:
        return False
    ahead.principal.demand(SCOPE)
    question = _VendorQuestion(front, given, b"", body, read_body(body))
    if question.stream:
        return False
    walk = gateway.straight.walk(
        question,
        principal=ahead.principal,
        deadline=deadline_in(given, TIMEOUT_MAX_S),
        request_id=ahead.request_id,
    )
    if walk is None:
        return False
    ahead.count()
    ahead.route_state = answer = _StraightAnswer(front, question, walk, ahead)
    answer.begin()
    return True


class _StraightAnswer:
    """One request on the straight path, and its answer.

    Whatever happens, it ends in one of two ways: answered, or handed over.
    """

    __slots__ = ("_ahead", "_done", "_front", "failure", "question", "walk")

    def __init__(self, front: Front, question: _VendorQuestion, walk: StraightWalk, ahead: Ahead) -> None:
        self._front = front
        self._ahead = ahead
        self._done = False
        self.failure: Exception | None = None
        """Why an answer that is paid for could not be given."""
        self.question = question
        self.walk = walk

    def begin(self) -> None:
        """Ask the provider, or hand it over."""
        if self.walk.begin(self._news):
            self._ahead.exchange.on_end(self._leave)
        else:
            self._leave()

    def _news(self) -> None:
        """Something came of the answer, or nothing will."""
        ahead, walk = self._ahead, self.walk
        bound = ahead.log_context.set(ahead.request_id)
        try:
            whole = walk.look()
            if whole is None:
                return
            body = whole.body
            if whole.completion is not None:
                body = self._front.encode(whole.completion, ahead.request_id, self.question.call())
            assert body is not None, "an answer passes through, or is translated"
            walk.commit(whole.ended)
            lines = [_JSON_LINE]
            for name, value in walk.headers.items():
                lines.append(f"{name}: {value}".encode("latin-1", "replace"))
            if self._front.wire == "anthropic":
                lines.append(b"request-id: " + ahead.request_id.encode())  # see `_headers_of`
        except (NotOrdinary, AgenticFlowError):
            self._leave()  # the general walk meets it too, and explains it
            return
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and the general walk is still there
            _log.exception("straight_path_failed")
            self._leave()
            return
        finally:
            ahead.log_context.reset(bound)
        self._done = True
        try:
            ahead.finish(lines, body)
        except Exception as error:  # noqa: BLE001 - raised again where a request's failures are recorded
            self.failure = error
            ahead.hand_over()

    def _leave(self) -> None:
        if not self._done:
            self._done = True
            self.walk.leave()
            self._ahead.hand_over()


class _FrontApp:
    """A front's path, as ASGI has it."""

    def __init__(self, gateway: Gateway, front: Front, work: Callable[[_Exchange], Awaitable[None]]) -> None:
        self._gateway = gateway
        self._front = front
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._work(_Exchange(self._gateway, self._front, scope))
        except AgenticFlowError as error:
            raise FrontError(error, self._front.wire) from error


class _VendorQuestion(BodyQuestion):
    """A request in the format of a front."""

    def __init__(
        self, front: Front, given: RawHeaderMap, query: bytes, body: bytes, sent: JsonObject
    ) -> None:
        asked, stream = sent.get("model"), sent.get("stream")
        if not (isinstance(asked, str) and asked):
            asked = Fields(sent).demand("model")  # says what is wrong with it
        if not (stream is None or isinstance(stream, bool)):
            stream = Fields(sent).flag("stream")
        if _LABEL_SET.isdisjoint(given):
            super().__init__(body, sent, asked, wire=front.wire, stream=stream or False)
        else:
            super().__init__(body, sent, asked, wire=front.wire, stream=stream or False, **labels_in(given))
        self._front = front
        self._headers: dict[str, str] = (
            {}
            if _PASSED_SET.isdisjoint(given)
            else {name: given[raw].decode("latin-1") for name, raw in _PASSED_HEADERS.items() if raw in given}
        )
        self._query = query.decode("latin-1")
        self._call: Call | None = None

    def call(self) -> Call:
        """The decoded request; decoded once.

        Raises:
            InvalidInput: a field cannot be translated; names it.
        """
        if self._call is None:
            call = self._front.decode(self._sent)
            if self.agent is not None or self.run is not None:
                call = call._replace(request=changed(call.request, agent=self.agent, run=self.run))
            self._call = call
        return self._call

    def request(self) -> CompletionRequest:
        return self.call().request

    def also(self) -> Mapping[str, str]:
        told = {**self._headers, "query": self._query}
        # A stream with its usage is another answer than one without.
        return {**told, "usage": "hidden"} if self._hides_usage() else told

    def passing(self, destination: Destination) -> PassingRequest:
        if self._front.check is not None:
            self._front.check(self._sent)
        sent = self.to_path(destination, self._front.path)
        if self.stream and self._hides_usage():
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
            body=self._body if self.asked == native else renamed(self._body, self.asked, native),
            sent=self._sent,
            stream=self.stream,
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, front: Front, scope: Scope) -> None:
        state: dict[str, Any] = scope["state"]
        self._gateway = gateway
        self._front = front
        self._given: RawHeaderMap = state["headers"]
        self._query: bytes = scope["query_string"]
        self._body: IncomingBody = state["body"]
        self._answer: OutgoingAnswer = state["answer"]
        self._id: str = state["request_id"]
        self._begun: Ahead | None = state.get(AHEAD)
        self._principal = known_principal(state["principal"])
        self._principal.demand(SCOPE)
        self._deadline = deadline_in(self._given, TIMEOUT_MAX_S)

    async def answer(self) -> None:
        if self._begun is not None:
            straight: _StraightAnswer = self._begun.route_state
            if straight.failure is not None:
                raise straight.failure
            await self._give(straight.question, straight.walk)
            return
        question = await self._question()
        key = self._given.get(_IDEMPOTENCY_NAME)
        walk = self._gateway.walk(
            question,
            principal=self._principal,
            deadline=self._deadline,
            idempotency_key=None if key is None else key.decode("latin-1"),
            request_id=self._id,
        )
        if question.stream:
            await self._stream(question, walk)
            return
        await self._give(question, walk)

    async def _give(self, question: _VendorQuestion, walk: Walk) -> None:
        whole = await unless_left(self._answer, walk.whole())
        body = whole.body
        if body is None:
            body = self._front.encode(whole.completion, self._id, question.call())
        await self._answer.give(200, [_JSON_TYPE, *self._headers(walk.headers)], body)

    async def count(self) -> None:
        """The tokens of a request: counted by the provider, or estimated where it cannot be asked."""
        question = await self._question()
        destination = await self._gateway.destination(question.asked)
        if destination.wire == self._front.wire:
            passing = question.to_path(destination, f"{self._front.path}/count_tokens")
            work = self._gateway.pass_count(
                destination, passing, principal=self._principal, deadline=self._deadline
            )
            body, how = await unless_left(self._answer, work), "exact"
        else:
            tokens = tokens_of(anthropic_messages.decode_messages(question.sent(), counting=True).request)
            body, how = to_json({"input_tokens": tokens}), "estimated"
        await self._answer.give(200, [_JSON_TYPE, *self._headers({COUNT_HEADER: how})], body)

    async def _question(self) -> _VendorQuestion:
        body = await self._body.whole()
        return _VendorQuestion(self._front, self._given, self._query, body, read_body(body))

    def _headers(self, more: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        return _headers_of(self._front, more, self._id)

    async def _stream(self, question: _VendorQuestion, walk: Walk) -> None:
        """The answer, once its first event is there: until then a failure has a status of its own."""
        encoding = _Encoding(self._front, question, walk, self._id)
        events = walk.stream()
        try:
            first = await unless_left(self._answer, _first(events, encoding.take))
        except BaseException:
            await events.aclose()
            raise
        await send_stream(
            self._answer,
            first,
            events,
            encode=encoding.take,
            last_words=encoding.last_words,
            headers=self._headers(walk.headers),
            onward=walk.onward,
        )


def _headers_of(front: Front, more: Mapping[str, str], request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers of an answer."""
    # Header lines are latin-1; a model may have any name.
    found: list[tuple[bytes, bytes]] = []
    for name, value in more.items():
        found.append((name.encode(), value.encode("latin-1", "replace")))
    if front.wire == "anthropic":
        # Anthropic's clients look for the request's id under this name; the floor adds the other one.
        found.append((b"request-id", request_id.encode()))
    return found


class _Encoding:
    """Puts a streamed answer into its caller's format: as it passed through, or event by event."""

    def __init__(self, front: Front, question: _VendorQuestion, walk: Walk, request_id: str) -> None:
        self._front = front
        self._question = question
        self._walk = walk
        self._id = request_id
        self._encoder: Encoder | None = None

    def take(self, event: bytes | StreamEvent) -> bytes:
        """An event as bytes, none for one that the format does not show."""
        if isinstance(event, bytes):
            return event
        if self._encoder is None:
            self._encoder = self._front.encoder(self._walk.model, self._id, self._question.call())
        return self._encoder.take(event)

    def last_words(self, error: AgenticFlowError) -> bytes:
        """How an error ends what was sent so far."""
        return self._front.last_words(error) if self._encoder is None else self._encoder.fail(error)


def renamed(body: bytes, asked: str, native: str) -> bytes:
    """The body of a request for the model `asked`, naming `native`; every other byte as it was."""
    if asked.isascii() and asked.isprintable() and body.count(b'"model"') == 1 and b"\\u00" not in body:
        # A key can be written with escapes (`\u006d`), and a text can end so (`\"model"`). Where neither is,
        # the one place that reads `"model"` is the key, if the name follows.
        at = body.index(b'"model"')
        start = at + len(b'"model"')
        written = b'"%b"' % asked.encode()
        found = _NAMED.match(body, start)
        if found is not None and body.startswith(written, found.end()) and not body.endswith(b"\\", 0, at):
            return body[: found.end()] + orjson.dumps(native) + body[found.end() + len(written) :]
    return rename_model(body, native)


def labels_of(request: Request) -> dict[str, str]:
    """What a caller's headers say of agent, run and conversation; see `labels_in`."""
    return labels_in(request.state.headers)


def labels_in(headers: RawHeaderMap) -> dict[str, str]:
    """What a caller's headers say of agent, run and conversation, where they say anything.

    Raises:
        InvalidInput: one is too long or has characters that no name has.
    """
    found: dict[str, str] = {}
    for name, label in _LABEL_NAMES:
        raw = headers.get(name)
        if raw is None:
            continue
        value = found[label] = raw.decode("latin-1")
        if not _LABEL.fullmatch(value):
            raise InvalidInput(
                f"the header {name.decode()} is {value[:140]!r}",
                hint="use 1 to 128 letters, digits and . _ : / @ -",
            )
    return found


async def _first(
    events: AsyncGenerator[bytes | StreamEvent], encode: Callable[[bytes | StreamEvent], bytes]
) -> bytes:
    async for event in events:
        if chunk := encode(event):
            return chunk
    raise ProviderProtocol("the stream ended before it began", hint="the call can be repeated")
