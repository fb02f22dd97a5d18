"""Anthropic Messages (`POST /v1/messages`), version 2023-06-01, JSON and SSE.

A structured answer is asked for as a forced tool call, which every model of the API accepts whatever the
schema; it comes back as the text of the answer. Thinking of other providers carries no signature and is left
out of the history, because the API takes back only its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import orjson

from agentic_flow.core.errors import (
    InvalidInput,
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
    check_no_logprobs,
    check_structured,
    check_tool_choice,
    count,
    estimated_usage,
    items,
    load_object,
    mapping,
    misplaced,
    system_and_turns,
    text_of,
)
from agentic_flow.gateway.wire.passing import PassingReader
from agentic_flow.gateway.wire.sse import SseEvent, SseParser

API_VERSION = "2023-06-01"
OUTPUT_TOOL = "structured_output"
# Thinking that the provider encrypts has no text; this mark in our `signature` brings it back as what it was.
_REDACTED = "redacted:"

_STOP_REASONS: dict[str, StopReason] = {
    "end_turn": "end",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
    "pause_turn": "end",
}
_OVERLOADED = {"overloaded_error", "rate_limit_error"}
_FAILED = {"api_error", "timeout_error"}


class AnthropicFormat:
    """`WireFormat` of the Messages API."""

    name = "anthropic"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"x-api-key": key}

    def encode(self, request: CompletionRequest, *, stream: bool) -> WireRequest:
        check_tool_choice(request)
        check_no_logprobs(request, "Anthropic Messages")
        if request.seed is not None:
            raise InvalidInput(
                f"seed {request.seed!r} cannot be sent: Anthropic Messages has none",
                hint="leave seed out",
                details={"field": "seed"},
            )
        system, turns = system_and_turns(request.messages)
        body: JsonObject = {
            "model": request.model,
            "max_tokens": request.output_tokens_max,
            "messages": [message for turn in turns if (message := _encode_turn(turn))],
        }
        if system:
            body["system"] = [{"type": "text", "text": text} for text in system if text]
        tools = [_encode_tool(tool) for tool in request.tools]
        choice: JsonObject = _encode_choice(request.tool_choice)
        body.update(_encode_reasoning(request))
        if request.output_schema is not None and _thinks(request):
            # The API refuses a forced tool while the model thinks.
            body["output_config"]["format"] = {"type": "json_schema", "schema": request.output_schema}
        elif request.output_schema is not None:
            if any(tool.name == OUTPUT_TOOL for tool in request.tools):
                raise InvalidInput(
                    f"tool name {OUTPUT_TOOL!r} is taken by structured output", hint="rename it"
                )
            tools.append(
                {
                    "name": OUTPUT_TOOL,
                    "description": "Give the answer in this form.",
                    "input_schema": request.output_schema,
                }
            )
            if not request.tools or request.tool_choice == "none":
                choice = {"type": "tool", "name": OUTPUT_TOOL}
            elif request.tool_choice == "auto":
                choice = {"type": "any"}
        if tools:
            body["tools"] = tools
            if request.parallel_tool_calls is False and choice["type"] != "none":
                choice["disable_parallel_tool_use"] = True
            if choice != {"type": "auto"}:
                body["tool_choice"] = choice
        for name, value in (("temperature", request.temperature), ("top_p", request.top_p)):
            if value is not None:
                body[name] = value
        if request.stop:
            body["stop_sequences"] = list(request.stop)
        if request.end_user is not None:
            body["metadata"] = {"user_id": request.end_user}
        if stream:
            body["stream"] = True
        headers = {"content-type": "application/json", "anthropic-version": API_VERSION}
        return WireRequest("/v1/messages", headers, orjson.dumps(body))

    def decode(self, request: CompletionRequest, body: bytes) -> Answer:
        answer = load_object(body, "Anthropic's answer")
        if answer.get("type") == "error":
            raise _stream_error(answer)
        if answer.get("type") != "message" or not isinstance(answer.get("content"), list):
            raise ProviderProtocol(f"Anthropic's answer is no message but {str(answer.get('type'))!r}")
        assembly = _Assembly(request)
        assembly.start(answer)
        for index, block in enumerate(items(answer["content"])):
            assembly.open_block(index, block)
        assembly.stop(answer.get("stop_reason"))
        return Answer(assembly.completion(), assembly.usage_estimated)

    def decoder(self, request: CompletionRequest) -> AnthropicDecoder:
        return AnthropicDecoder(request)

    def passing(self, sent: JsonObject) -> AnthropicPassing:
        return AnthropicPassing("anthropic", sent)

    def fault(self, body: bytes) -> ProviderFault | None:
        try:
            error = mapping(orjson.loads(body)).get("error")
        except orjson.JSONDecodeError:
            return None
        if not isinstance(error, dict):
            return None
        fields = mapping(cast(object, error))
        return ProviderFault(text_of(fields.get("type")), text_of(fields.get("message")))


def _thinks(request: CompletionRequest) -> bool:
    return request.reasoning_effort not in (None, "none")


def _encode_reasoning(request: CompletionRequest) -> JsonObject:
    effort = request.reasoning_effort
    if effort is None:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if effort == "minimal":
        raise InvalidInput(
            "reasoning_effort 'minimal' cannot be sent: Anthropic Messages has no such effort",
            hint="use none, low, medium, high, xhigh or max",
            details={"field": "reasoning_effort"},
        )
    return {"thinking": {"type": "adaptive"}, "output_config": {"effort": effort}}


def _encode_tool(tool: ToolSpec) -> JsonObject:
    encoded: JsonObject = {"name": tool.name, "input_schema": tool.input_schema}
    if tool.description:
        encoded["description"] = tool.description
    if tool.strict is not None:
        encoded["strict"] = tool.strict
    return encoded


def _encode_choice(choice: str) -> JsonObject:
    if choice in ("auto", "none"):
        return {"type": choice}
    return {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}


def _encode_turn(turn: Message) -> JsonObject | None:
    encode = _encode_user_part if turn.role == "user" else _encode_assistant_part
    blocks = [block for part in turn.parts if (block := encode(part)) is not None]
    if turn.role == "user":
        # The API wants the results of a turn's tool calls before anything else in the next turn.
        blocks.sort(key=lambda block: block["type"] != "tool_result")
    return {"role": turn.role, "content": blocks} if blocks else None


def _encode_user_part(part: Part) -> JsonObject | None:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text} if part.text else None
        case ImagePart():
            check_image(part)
            source = (
                {"type": "url", "url": part.url}
                if part.url is not None
                else {"type": "base64", "media_type": part.media_type, "data": part.data}
            )
            return {"type": "image", "source": source}
        case ToolResultPart():
            block: JsonObject = {"type": "tool_result", "tool_use_id": part.id, "content": part.content}
            if part.is_error:
                block["is_error"] = True
            return block
        case _:
            raise misplaced(part, "user")


def _encode_assistant_part(part: Part) -> JsonObject | None:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text} if part.text else None
        case ThinkingPart():
            if part.signature is None:
                return None
            if part.signature.startswith(_REDACTED):
                return {"type": "redacted_thinking", "data": part.signature.removeprefix(_REDACTED)}
            return {"type": "thinking", "thinking": part.text, "signature": part.signature}
        case ToolCallPart():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
        case _:
            raise misplaced(part, "assistant")


class _Block:
    """One content block while it arrives."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.text: list[str] = []
        self.signature = ""
        self.call: ToolCallDraft | None = None
        self.call_index = 0


class _Assembly:
    """Collects an answer's blocks, usage and stop reason; whole answers and streams meet here."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        self._blocks: dict[int, _Block] = {}
        self._calls = 0
        self._model = ""
        self._usage: dict[str, Any] = {}
        self._stop_reason: str | None = None
        self.usage_estimated = False

    def start(self, message: Mapping[str, Any]) -> None:
        self._model = text_of(message.get("model"))
        self.add_usage(message.get("usage"))

    def add_usage(self, usage: object) -> None:
        # Counts in later events are cumulative: they replace the earlier ones.
        self._usage.update({key: value for key, value in mapping(usage).items() if value is not None})

    def stop(self, reason: object) -> None:
        if isinstance(reason, str):
            self._stop_reason = reason

    def open_block(self, index: int, block: Mapping[str, Any]) -> list[StreamEvent]:
        kind = text_of(block.get("type"))
        opened = self._blocks[index] = _Block(kind)
        match kind:
            case "text":
                return self.add_text(index, text_of(block.get("text")))
            case "thinking":
                opened.signature = text_of(block.get("signature"))
                return self.add_text(index, text_of(block.get("thinking")))
            case "redacted_thinking":
                opened.signature = _REDACTED + text_of(block.get("data"))
                return []
            case "tool_use":
                return self._open_call(opened, block)
            case _:
                raise ProviderProtocol(f"Anthropic sent a content block of unknown type {kind!r}")

    def _open_call(self, opened: _Block, block: Mapping[str, Any]) -> list[StreamEvent]:
        name, call_id = text_of(block.get("name")), text_of(block.get("id"))
        if not name or not call_id:
            raise ProviderProtocol("Anthropic sent a tool call without a name or an id")
        opened.call = ToolCallDraft(call_id, name)
        given = block.get("input")
        arguments = orjson.dumps(given).decode() if given else ""
        opened.call.arguments.append(arguments)
        if self._is_output(opened):
            return [TextDelta(text=arguments)] if arguments else []
        opened.call_index = self._calls
        self._calls += 1
        return [ToolCallDelta(index=opened.call_index, id=call_id, name=name, arguments_json=arguments)]

    def add_text(self, index: int, text: str) -> list[StreamEvent]:
        block = self._block(index)
        if not text:
            return []
        block.text.append(text)
        return [TextDelta(text=text) if block.kind == "text" else ThinkingDelta(text=text)]

    def add_signature(self, index: int, signature: str) -> None:
        self._block(index).signature += signature

    def add_arguments(self, index: int, text: str) -> list[StreamEvent]:
        block = self._block(index)
        if block.call is None:
            raise ProviderProtocol(
                f"Anthropic sent tool arguments for block {index}, which is {block.kind!r}"
            )
        if not text:
            return []
        block.call.arguments.append(text)
        if self._is_output(block):
            return [TextDelta(text=text)]
        return [ToolCallDelta(index=block.call_index, arguments_json=text)]

    def _block(self, index: int) -> _Block:
        block = self._blocks.get(index)
        if block is None:
            raise ProviderProtocol(f"Anthropic sent a delta for content block {index}, which it never opened")
        return block

    def _is_output(self, block: _Block) -> bool:
        return (
            self._request.output_schema is not None
            and block.call is not None
            and block.call.name == OUTPUT_TOOL
        )

    def completion(self) -> Completion:
        if self._stop_reason is None:
            raise ProviderProtocol("Anthropic's answer has no stop_reason", hint="the call is tried again")
        reason = _STOP_REASONS.get(self._stop_reason)
        if reason is None:
            raise ProviderProtocol(f"Anthropic stopped for an unknown reason: {self._stop_reason!r}")
        parts = [part for _, block in sorted(self._blocks.items()) if (part := self._part(block, reason))]
        if reason == "tool_calls" and not any(isinstance(part, ToolCallPart) for part in parts):
            reason = "end"  # the only call was the structured answer
        check_structured(self._request, parts, reason)
        return Completion(
            model=self._model or self._request.model,
            provider="anthropic",
            parts=tuple(parts),
            stop_reason=reason,
            usage=self._final_usage(parts),
        )

    def _part(self, block: _Block, reason: StopReason) -> Part | None:
        text = "".join(block.text)
        if block.call is not None:
            if self._is_output(block):
                return TextPart(text="".join(block.call.arguments) or "{}")
            return block.call.finish(self._request, reason)
        if block.kind == "text":
            return TextPart(text=text) if text else None
        return ThinkingPart(text=text, signature=block.signature or None)

    def _final_usage(self, parts: list[Part]) -> Usage:
        billed = _billed(self._usage)
        if billed is None:
            self.usage_estimated = True
            return estimated_usage(self._request, parts)
        return billed


def _billed(usage: Mapping[str, Any]) -> Usage | None:
    """The usage of an answer, all its events together; None when it says nothing."""
    if "output_tokens" not in usage or "input_tokens" not in usage:
        return None
    read = count(usage.get("cache_read_input_tokens"))
    written = count(usage.get("cache_creation_input_tokens"))
    details = mapping(usage.get("output_tokens_details"))
    return Usage(
        input_tokens=count(usage.get("input_tokens")) + read + written,
        output_tokens=count(usage.get("output_tokens")),
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count(details.get("thinking_tokens")),
        cost_usd=None,
    )


class AnthropicDecoder:
    """`StreamDecoder` of the Messages API."""

    def __init__(self, request: CompletionRequest) -> None:
        self._sse = SseParser()
        self._assembly = _Assembly(request)
        self._started = False
        self._stopped = False

    @property
    def usage_estimated(self) -> bool:
        return self._assembly.usage_estimated

    @property
    def done(self) -> bool:
        return self._stopped

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        return [event for sent in self._sse.feed(chunk) for event in self._take(sent)]

    def end(self) -> StreamEnd:
        for sent in self._sse.flush():
            self._take(sent)
        if not self._stopped:
            raise ProviderProtocol(
                "Anthropic's stream ended without message_stop: the answer is incomplete",
                hint="the connection broke; the call can be repeated",
            )
        return StreamEnd(completion=self._assembly.completion())

    def _take(self, sent: SseEvent) -> list[StreamEvent]:
        event = load_object(sent.data, "an event of Anthropic's stream")
        kind = text_of(event.get("type"))
        if kind == "error":
            raise _stream_error(event)
        if kind == "message_start":
            self._started = True
            self._assembly.start(mapping(event.get("message")))
            return []
        if not self._started and kind.startswith(("content_block", "message")):
            raise ProviderProtocol(f"Anthropic's stream began with {kind!r} instead of 'message_start'")
        index = event.get("index")
        if kind == "content_block_start":
            if not isinstance(index, int):
                raise ProviderProtocol("Anthropic opened a content block without an index")
            return self._assembly.open_block(index, mapping(event.get("content_block")))
        if kind == "content_block_delta":
            if not isinstance(index, int):
                raise ProviderProtocol("Anthropic sent a delta without an index")
            return self._take_delta(index, mapping(event.get("delta")))
        if kind == "message_delta":
            self._assembly.add_usage(event.get("usage"))
            self._assembly.stop(mapping(event.get("delta")).get("stop_reason"))
        elif kind == "message_stop":
            self._stopped = True
        return []  # ping, content_block_stop, and what the API adds later: its rules say to ignore those

    def _take_delta(self, index: int, delta: Mapping[str, Any]) -> list[StreamEvent]:
        match delta.get("type"):
            case "text_delta":
                return self._assembly.add_text(index, text_of(delta.get("text")))
            case "thinking_delta":
                return self._assembly.add_text(index, text_of(delta.get("thinking")))
            case "signature_delta":
                self._assembly.add_signature(index, text_of(delta.get("signature")))
                return []
            case "input_json_delta":
                return self._assembly.add_arguments(index, text_of(delta.get("partial_json")))
            case _:
                return []


class AnthropicPassing(PassingReader):
    """`PassingReader` of the Messages API."""

    def __init__(self, provider: str, sent: JsonObject) -> None:
        super().__init__(provider, sent)
        self._counts: dict[str, Any] = {}

    def take_event(self, sent: SseEvent) -> None:
        """See `PassingReader`."""
        event = load_object(sent.data, "an event of Anthropic's stream")
        match event.get("type"):
            case "error":
                self.error = _stream_error(event)
            case "message_start":
                self._take(mapping(event.get("message")))
            case "content_block_delta":
                self.count_written(event.get("delta"))
            case "message_delta":
                self._take({**mapping(event.get("delta")), "usage": event.get("usage")})
            case "message_stop":
                self.done = True
            case _:
                pass  # what the API adds later passes through; its rules say to ignore the unknown

    def take_answer(self, answer: JsonObject) -> None:
        """See `PassingReader`."""
        if answer.get("type") == "error":
            raise _stream_error(answer)
        if answer.get("type") != "message":
            raise ProviderProtocol(f"Anthropic's answer is no message but {str(answer.get('type'))!r}")
        self.count_written(answer.get("content"))
        self._take(answer)

    def _take(self, message: Mapping[str, Any]) -> None:
        self.model = self.model or text_of(message.get("model"))
        # Counts in later events are cumulative: they replace the earlier ones.
        self._counts.update({k: v for k, v in mapping(message.get("usage")).items() if v is not None})
        self.usage = _billed(self._counts)
        self.stop_reason = _STOP_REASONS.get(text_of(message.get("stop_reason")), self.stop_reason)


def _stream_error(event: Mapping[str, Any]) -> ProviderError:
    error = mapping(event.get("error"))
    kind, message = text_of(error.get("type")), text_of(error.get("message"))
    said = f"Anthropic sent the error {kind!r}: {message[:500]}"
    if kind in _OVERLOADED:
        return ProviderOverloaded(said, hint="it is tried again after a pause")
    if kind in _FAILED or not kind:
        return ProviderFailed(said, hint="it is tried again after a pause")
    return ProviderRejected(said, hint="correct the request")
