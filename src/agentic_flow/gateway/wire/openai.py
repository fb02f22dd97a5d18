"""OpenAI Chat Completions (`POST /chat/completions`), JSON and SSE, as OpenAI and its imitators speak it.

Reasoning of earlier turns is left out of the history: Chat Completions has no place for it. A tool result
that is an error is marked in its text, since a tool message has no such field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson
from pydantic import ValidationError

from agentic_flow.core.errors import (
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
)
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    JsonObject,
    Message,
    Part,
    StopReason,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    ToolCallDelta,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    Usage,
)
from agentic_flow.gateway.wire.format import (
    Answer,
    ProviderFault,
    ToolCallDraft,
    WireRequest,
    check_image,
    check_structured,
    check_tool_choice,
    count,
    estimated_usage,
    items,
    load_object,
    mapping,
    misplaced,
    text_of,
)
from agentic_flow.gateway.wire.passing import Glance, PassingReader
from agentic_flow.gateway.wire.sse import SseEvent, SseParser

_EVENT = re.compile(rb".*?(?:\r\n\r\n|\n\n|\r\r)", re.DOTALL)

TOOL_ERROR_PREFIX = "Error: "
SCHEMA_NAME = "answer"

_STOP_REASONS: dict[str, StopReason] = {
    "stop": "end",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "refusal",
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where endpoints that speak this format differ.

    Args:
        max_tokens_field: OpenAI wants `max_completion_tokens`; most others know only `max_tokens`.
        reports_cost: `usage.cost` is the USD amount billed (OpenRouter).
    """

    max_tokens_field: str = "max_tokens"
    reports_cost: bool = False


OPENAI = Dialect(max_tokens_field="max_completion_tokens")
OPENROUTER = Dialect(reports_cost=True)
COMPATIBLE = Dialect()


class OpenAIFormat:
    """`WireFormat` of Chat Completions in one dialect."""

    name = "openai"

    def __init__(self, dialect: Dialect = COMPATIBLE, *, provider: str = "openai") -> None:
        self._dialect = dialect
        self._provider = provider

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    def encode(self, request: CompletionRequest, *, stream: bool) -> WireRequest:
        check_tool_choice(request)
        body: JsonObject = {
            "model": request.model,
            "messages": [encoded for message in request.messages for encoded in _encode_message(message)],
            self._dialect.max_tokens_field: request.output_tokens_max,
        }
        if request.tools:
            body["tools"] = [_encode_tool(tool) for tool in request.tools]
            if request.parallel_tool_calls is not None:
                body["parallel_tool_calls"] = request.parallel_tool_calls
            if request.tool_choice in ("none", "required"):
                body["tool_choice"] = request.tool_choice
            elif request.tool_choice != "auto":
                body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
        if request.output_schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": SCHEMA_NAME,
                    "schema": request.output_schema,
                    "strict": _is_strict(request.output_schema),
                },
            }
        for name, value in (
            ("temperature", request.temperature),
            ("top_p", request.top_p),
            ("seed", request.seed),
            ("stop", list(request.stop) or None),
            ("reasoning_effort", request.reasoning_effort),
            ("user", request.end_user),
            ("logprobs", None if request.logprobs is None else True),
            ("top_logprobs", request.logprobs or None),
        ):
            if value is not None:
                body[name] = value
        if stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        return WireRequest("/chat/completions", {"content-type": "application/json"}, orjson.dumps(body))

    def decode(self, request: CompletionRequest, body: bytes) -> Answer:
        answer = load_object(body, f"the answer of {self._provider}")
        assembly = _Assembly(request, self._provider, self._dialect)
        assembly.refuse_error(answer)
        choices = items(answer.get("choices"))
        if not choices:
            raise ProviderProtocol(f"the answer of {self._provider} has no choices")
        assembly.start(answer)
        assembly.add(mapping(choices[0].get("message")), choices[0].get("logprobs"))
        assembly.stop(choices[0].get("finish_reason"))
        assembly.set_usage(answer.get("usage"))
        return Answer(assembly.completion(), assembly.usage_estimated)

    def decoder(self, request: CompletionRequest) -> OpenAIDecoder:
        return OpenAIDecoder(request, self._provider, self._dialect)

    def passing(self, sent: JsonObject) -> OpenAIPassing:
        return OpenAIPassing(self._provider, sent, self._dialect)

    def glance(self, body: bytes) -> Glance | None:
        """What `passing` would read in a whole answer, if that is an ordinary one; None: it must."""
        if self._dialect.reports_cost:
            return None
        try:
            answer: Any = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if answer.__class__ is not dict or answer.get("error"):
            return None
        model, choices, usage = answer.get("model"), answer.get("choices"), answer.get("usage")
        if model.__class__ is not str or choices.__class__ is not list or usage.__class__ is not dict:
            return None
        stop: StopReason = "end"
        for choice in choices:
            if choice.__class__ is not dict:
                return None
            reason = choice.get("finish_reason")
            if reason.__class__ is str:
                stop = _STOP_REASONS.get(reason, "end") if reason else stop
        prompt = usage.get("prompt_tokens_details") or _NOTHING
        completion = usage.get("completion_tokens_details") or _NOTHING
        if prompt.__class__ is not dict or completion.__class__ is not dict:
            return None
        counts = (
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            prompt.get("cached_tokens") or 0,
            prompt.get("cache_write_tokens") or 0,
            completion.get("reasoning_tokens") or 0,
        )
        for found in counts:
            if found.__class__ is not int or found < 0:
                return None
        return Glance(model, stop, *counts) if model and choices else None

    def fault(self, body: bytes) -> ProviderFault | None:
        try:
            whole = mapping(orjson.loads(body))
        except orjson.JSONDecodeError:
            return None
        error = whole.get("error")
        if isinstance(error, str):
            return ProviderFault("", error)
        if isinstance(error, dict):
            fields = mapping(cast(object, error))
            kind = fields.get("code") or fields.get("type") or ""
            return ProviderFault(str(kind), text_of(fields.get("message")))
        # vLLM puts the fields at the top; FastAPI servers answer with `detail`.
        message = whole.get("message") or whole.get("detail")
        if message is None:
            return None
        return ProviderFault(
            str(whole.get("type") or ""), message if isinstance(message, str) else str(message)
        )


def _encode_tool(tool: ToolSpec) -> JsonObject:
    function: JsonObject = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _is_strict(schema: object) -> bool:
    """Whether OpenAI's strict mode takes this schema: closed objects with every property required."""
    if isinstance(schema, list):
        return all(_is_strict(entry) for entry in cast(list[object], schema))
    if not isinstance(schema, dict):
        return True
    node = cast(dict[str, object], schema)
    if node.get("type") == "object" or "properties" in node:
        properties, required = node.get("properties"), node.get("required")
        if node.get("additionalProperties") is not False or not isinstance(properties, dict):
            return False
        names = set(cast(dict[str, object], properties))
        if not isinstance(required, list) or set(cast(list[str], required)) != names:
            return False
    return all(_is_strict(value) for value in node.values())


def _encode_message(message: Message) -> list[JsonObject]:
    if message.role == "system":
        for part in message.parts:
            if not isinstance(part, TextPart):
                raise misplaced(part, "system")
        return [{"role": "system", "content": message.text}]
    return [_encode_assistant(message)] if message.role == "assistant" else _encode_user(message)


def _encode_assistant(message: Message) -> JsonObject:
    texts: list[str] = []
    calls: list[JsonObject] = []
    for part in message.parts:
        match part:
            case TextPart():
                texts.append(part.text)
            case ThinkingPart():
                continue
            case ToolCallPart():
                arguments = orjson.dumps(part.arguments).decode()
                calls.append(
                    {
                        "id": part.id,
                        "type": "function",
                        "function": {"name": part.name, "arguments": arguments},
                    }
                )
            case _:
                raise misplaced(part, "assistant")
    encoded: JsonObject = {"role": "assistant", "content": "\n".join(texts) if texts else None}
    if calls:
        encoded["tool_calls"] = calls
    elif not texts:
        encoded["content"] = ""
    return encoded


def _encode_user(message: Message) -> list[JsonObject]:
    results: list[JsonObject] = []
    content: list[JsonObject] = []
    for part in message.parts:
        match part:
            case TextPart():
                content.append({"type": "text", "text": part.text})
            case ImagePart():
                check_image(part)
                url = part.url if part.url is not None else f"data:{part.media_type};base64,{part.data}"
                content.append({"type": "image_url", "image_url": {"url": url}})
            case ToolResultPart():
                text = f"{TOOL_ERROR_PREFIX}{part.content}" if part.is_error else part.content
                results.append({"role": "tool", "tool_call_id": part.id, "content": text})
            case _:
                raise misplaced(part, "user")
    if not content:
        return results
    # Many servers know only plain strings; the list form is kept for what needs it.
    plain = len(content) == 1 and content[0]["type"] == "text"
    return [*results, {"role": "user", "content": content[0]["text"] if plain else content}]


class _Assembly:
    """Collects an answer's text, calls, usage and finish reason; whole answers and streams meet here."""

    def __init__(self, request: CompletionRequest, provider: str, dialect: Dialect) -> None:
        self._request = request
        self._provider = provider
        self._dialect = dialect
        self._model = ""
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._refused = False
        self._calls: list[ToolCallDraft] = []
        self._slots: dict[int, int] = {}  # index on the wire → position in _calls
        self._usage: Mapping[str, Any] | None = None
        self._finish: str | None = None
        self._logprobs: list[TokenLogprob] = []
        self._early: list[TokenLogprob] = []  # of tokens whose text comes with a later piece
        self.usage_estimated = False

    @property
    def finished(self) -> bool:
        return self._finish is not None

    def refuse_error(self, answer: Mapping[str, Any]) -> None:
        """Some gateways report a failure inside a 200 answer or a stream."""
        if answer.get("error"):
            raise _embedded_error(self._provider, answer["error"])

    def start(self, answer: Mapping[str, Any]) -> None:
        self._model = self._model or text_of(answer.get("model"))

    def stop(self, reason: object) -> None:
        if isinstance(reason, str) and reason:
            self._finish = reason

    def set_usage(self, usage: object) -> None:
        if isinstance(usage, dict):
            self._usage = mapping(cast(object, usage))

    def add(self, message: Mapping[str, Any], logprobs: object = None) -> list[StreamEvent]:
        """A message, or a piece of one, and what is said of its tokens."""
        events: list[StreamEvent] = []
        thinking = text_of(message.get("reasoning_content")) or text_of(message.get("reasoning"))
        if thinking:
            self._thinking.append(thinking)
            events.append(ThinkingDelta(text=thinking))
        refusal = text_of(message.get("refusal"))
        self._refused = self._refused or bool(refusal)
        text = text_of(message.get("content")) or refusal
        if logprobs and self._request.logprobs is not None:
            self._early += _logprobs(mapping(logprobs), self._provider)
        if text:
            self._text.append(text)
            self._logprobs += self._early
            events.append(TextDelta(text=text, logprobs=tuple(self._early)))
            self._early.clear()
        elif thinking or message.get("tool_calls"):
            self._early.clear()  # some servers tell of the tokens of thinking and calls, which are no text
        for position, call in enumerate(items(message.get("tool_calls"))):
            events.extend(self._add_call(position, call))
        return events

    def _add_call(self, position: int, call: Mapping[str, Any]) -> list[StreamEvent]:
        index = call.get("index")
        wire_index = index if isinstance(index, int) else position
        function = mapping(call.get("function"))
        call_id, name = text_of(call.get("id")), text_of(function.get("name"))
        arguments = function.get("arguments")
        # Some servers send the arguments as an object instead of its text.
        text = orjson.dumps(arguments).decode() if isinstance(arguments, dict) else text_of(arguments)
        slot = self._slots.get(wire_index)
        # Some servers give parallel calls the same index; a new id then means a new call.
        if slot is None or (call_id and call_id != self._calls[slot].id):
            if not name:
                raise ProviderProtocol(f"{self._provider} sent a tool call without a name")
            slot = self._slots[wire_index] = len(self._calls)
            # An id made of the turn and the position is unique within the conversation.
            call_id = call_id or f"call_{len(self._request.messages)}_{slot}"
            self._calls.append(ToolCallDraft(call_id, name, [text]))
            return [ToolCallDelta(index=slot, id=call_id, name=name, arguments_json=text)]
        self._calls[slot].arguments.append(text)
        return [ToolCallDelta(index=slot, arguments_json=text)] if text else []

    def completion(self) -> Completion:
        reason = self._stop_reason()
        parts: list[Part] = []
        if self._thinking:
            parts.append(ThinkingPart(text="".join(self._thinking)))
        if self._text:
            parts.append(TextPart(text="".join(self._text)))
        parts.extend(call.finish(self._request, reason) for call in self._calls)
        check_structured(self._request, parts, reason)
        return Completion(
            model=self._model or self._request.model,
            provider=self._provider,
            parts=tuple(parts),
            stop_reason=reason,
            usage=self._final_usage(parts),
            logprobs=tuple(self._logprobs),
        )

    def _stop_reason(self) -> StopReason:
        if self._finish is None:
            raise ProviderProtocol(f"the answer of {self._provider} has no finish_reason")
        if self._finish == "error":
            raise ProviderFailed(f"{self._provider} broke its answer off with finish_reason 'error'")
        reason = _STOP_REASONS.get(self._finish)
        if reason is None:
            raise ProviderProtocol(f"{self._provider} finished for an unknown reason: {self._finish!r}")
        if reason == "end" and self._calls:
            return "tool_calls"  # several servers say "stop" after tool calls
        return "refusal" if reason == "end" and self._refused else reason

    def _final_usage(self, parts: list[Part]) -> Usage:
        billed = _billed(self._usage, self._dialect)
        if billed is None:
            self.usage_estimated = True
            return estimated_usage(self._request, parts)
        return billed


def _logprobs(told: Mapping[str, Any], provider: str) -> list[TokenLogprob]:
    """The tokens of a `logprobs` object: of the text, or of the refusal that takes its place."""
    return [
        _token_logprob(entry, provider) for entry in items(told.get("content")) or items(told.get("refusal"))
    ]


def _token_logprob(entry: Mapping[str, Any], provider: str) -> TokenLogprob:
    token, logprob, utf8 = entry.get("token"), entry.get("logprob"), entry.get("bytes")
    if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
        raise ProviderProtocol(f"{provider} sent a log probability without its token or its number")
    try:
        return TokenLogprob(
            token=token,
            logprob=logprob,
            utf8=tuple(cast(list[int], utf8)) if isinstance(utf8, list) else None,
            top=tuple(_token_logprob(other, provider) for other in items(entry.get("top_logprobs"))),
        )
    except ValidationError:
        raise ProviderProtocol(f"{provider} sent bytes of a token that are none: {utf8!r:.80}") from None


_NOTHING: dict[str, Any] = {}


def _billed(usage: Mapping[str, Any] | None, dialect: Dialect) -> Usage | None:
    """The usage object of an answer, None when it says nothing."""
    if usage is None or "prompt_tokens" not in usage:
        return None
    given_prompt, given_completion = (
        usage.get("prompt_tokens_details"),
        usage.get("completion_tokens_details"),
    )
    if given_prompt is None and given_completion is None and not dialect.reports_cost:
        return Usage(
            input_tokens=count(usage.get("prompt_tokens")),
            output_tokens=count(usage.get("completion_tokens")),
            cost_usd=None,
        )
    prompt, completion = mapping(given_prompt), mapping(given_completion)
    cost = usage.get("cost") if dialect.reports_cost else None
    return Usage(
        input_tokens=count(usage.get("prompt_tokens")),
        output_tokens=count(usage.get("completion_tokens")),
        cache_read_tokens=count(prompt.get("cached_tokens")),
        cache_write_tokens=count(prompt.get("cache_write_tokens")),
        reasoning_tokens=count(completion.get("reasoning_tokens")),
        cost_usd=float(cost) if isinstance(cost, int | float) else None,
    )


class OpenAIDecoder:
    """`StreamDecoder` of Chat Completions. Complete means a finish_reason and the closing [DONE]."""

    def __init__(self, request: CompletionRequest, provider: str, dialect: Dialect) -> None:
        self._sse = SseParser()
        self._provider = provider
        self._assembly = _Assembly(request, provider, dialect)
        self._done = False

    @property
    def usage_estimated(self) -> bool:
        return self._assembly.usage_estimated

    @property
    def done(self) -> bool:
        return self._done

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        return [event for sent in self._sse.feed(chunk) for event in self._take(sent)]

    def end(self) -> StreamEnd:
        for sent in self._sse.flush():
            self._take(sent)
        if not (self._done and self._assembly.finished):
            missing = "[DONE]" if self._assembly.finished else "a finish_reason"
            raise ProviderProtocol(
                f"the stream of {self._provider} ended without {missing}: the answer is incomplete",
                hint="the connection broke; the call can be repeated",
            )
        return StreamEnd(completion=self._assembly.completion())

    def _take(self, sent: SseEvent) -> list[StreamEvent]:
        if sent.data.strip() == b"[DONE]":
            self._done = True
            return []
        chunk = load_object(sent.data, f"an event in the stream of {self._provider}")
        self._assembly.refuse_error(chunk)
        self._assembly.start(chunk)
        self._assembly.set_usage(chunk.get("usage"))
        events: list[StreamEvent] = []
        for choice in items(chunk.get("choices"))[:1]:
            events = self._assembly.add(mapping(choice.get("delta")), choice.get("logprobs"))
            self._assembly.stop(choice.get("finish_reason"))
        return events


class OpenAIPassing(PassingReader):
    """`PassingReader` of Chat Completions. Any of several choices may hold the finish_reason."""

    def __init__(self, provider: str, sent: JsonObject, dialect: Dialect) -> None:
        super().__init__(provider, sent)
        self._dialect = dialect
        self._finished = False
        self.hides_usage = False
        """Whether a chunk that holds nothing but the usage is kept back: the caller did not ask for it."""

    def feed(self, chunk: bytes) -> bytes:
        """See `PassingReader`."""
        known = self.usage
        whole = super().feed(chunk)
        if not self.hides_usage or self.usage is known:
            return whole
        return b"".join(event for event in _EVENT.findall(whole) if not _only_usage(event))

    def take_event(self, sent: SseEvent) -> None:
        """See `PassingReader`."""
        if sent.data[:1] != b"{" and sent.data.strip() == b"[DONE]":
            if not self._finished:
                raise ProviderProtocol(
                    f"the stream of {self.provider} ended without a finish_reason: the answer is incomplete",
                    hint="the connection broke; the call can be repeated",
                )
            self.done = True
            return
        chunk: Any
        try:
            chunk = orjson.loads(sent.data)
        except orjson.JSONDecodeError:
            chunk = None
        if chunk.__class__ is not dict:
            chunk = load_object(sent.data, f"an event in the stream of {self.provider}")  # says what is wrong
        if chunk.get("error"):
            self.error = _embedded_error(self.provider, chunk["error"])
            return
        if self.model and chunk.get("usage") is None:
            choices: Any = chunk.get("choices")
            if choices.__class__ is list and len(choices) == 1:
                choice: Any = choices[0]
                if choice.__class__ is dict and choice.get("finish_reason") is None:  # as nearly every event
                    delta: Any = choice.get("delta")
                    content: Any = (
                        delta.get("content") if delta.__class__ is dict and len(delta) == 1 else None
                    )
                    if content.__class__ is str and content[:5] != "data:":
                        self._written_chars += len(content)  # what `count_written` does
                    else:
                        self.count_written(delta)
                    return
        self._take(chunk, "delta")

    def take_answer(self, answer: JsonObject) -> None:
        """See `PassingReader`."""
        if answer.get("error"):
            raise _embedded_error(self.provider, answer["error"])
        if not items(answer.get("choices")):
            raise ProviderProtocol(f"the answer of {self.provider} has no choices")
        self._take(answer, "message")

    def _take(self, answer: Mapping[str, Any], holder: str) -> None:
        self.model = self.model or text_of(answer.get("model"))
        usage: Any = answer.get("usage")
        if isinstance(usage, dict):
            self.usage = _billed(usage, self._dialect)  # pyright: ignore[reportUnknownArgumentType]
        for choice in items(answer.get("choices")):
            if self.usage is None:
                self.count_written(choice.get(holder))
            reason = choice.get("finish_reason")
            if isinstance(reason, str) and reason:
                self._finished = True
                self.stop_reason = _STOP_REASONS.get(reason, "end")


def wants_usage(sent: JsonObject) -> bool:
    """Whether a request for a stream asks for the usage at its end."""
    return mapping(sent.get("stream_options")).get("include_usage") is True


def ask_usage(body: bytes, sent: JsonObject) -> bytes:
    """The request `body`, which is `sent` parsed, asking for the usage at the end of its stream.

    Every byte stays as it was, except in a body that says of `stream_options` something else.
    """
    if sent.get("stream_options") is None and b"stream_options" not in body:
        start = body.index(b"{") + 1
        return body[:start] + b'"stream_options":{"include_usage":true},' + body[start:]
    options = {**mapping(sent.get("stream_options")), "include_usage": True}
    # The model's name may have been rewritten in the bytes, so these are read again.
    return orjson.dumps({**orjson.loads(body), "stream_options": options})


def _only_usage(event: bytes) -> bool:
    """Whether an event is the chunk that `include_usage` adds: it has usage and no choice."""
    if b'"usage"' not in event:
        return False
    for sent in SseParser().feed(event):
        if b'"usage"' in sent.data:
            chunk = mapping(orjson.loads(sent.data))
            return isinstance(chunk.get("usage"), dict) and not chunk.get("choices")
    return False


def _embedded_error(provider: str, error: object) -> ProviderError:
    fields = mapping(error)
    code = fields.get("code") or fields.get("type") or ""
    message = text_of(fields.get("message")) or str(error)
    said = f"{provider} sent the error {str(code)!r}: {message[:500]}"
    if str(code) in ("429", "529", "rate_limit_exceeded", "rate_limit_error", "overloaded_error"):
        return ProviderOverloaded(said, hint="it is tried again after a pause")
    if isinstance(code, int) and 400 <= code < 500 and code not in (408, 409, 425):
        return ProviderRejected(said, hint="correct the request")
    return ProviderFailed(said, hint="it is tried again after a pause")
