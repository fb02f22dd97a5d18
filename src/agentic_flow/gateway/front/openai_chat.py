"""OpenAI Chat Completions as a server speaks it: requests in, answers, chunks and errors out.

Translation only: a request for a provider that speaks this format itself passes through untouched. Thinking
is shown as compatible servers do, in `reasoning_content`, and with its signatures in `reasoning_details`,
which clients send back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import (
    TOP_LOGPROBS_MAX,
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
from agentic_flow.gateway.front.errors import openai_error
from agentic_flow.gateway.front.fields import Fields, entries, untranslatable, wrong
from agentic_flow.gateway.front.format import (
    OUTPUT_TOKENS_DEFAULT,
    Call,
    arguments_of,
    effort_of,
    image_of,
    tool_spec,
)

_REDACTED = "redacted:"
_FINISH: dict[StopReason, str] = {
    "end": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "stop_sequence": "stop",
    "refusal": "content_filter",
}


# Requests


def decode_chat(body: JsonObject) -> Call:
    """The request of a body.

    Raises:
        InvalidInput: a field is wrong or cannot be translated; `details["field"]` names it.
    """
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    stream = fields.flag("stream") or False
    tools = tuple(_tool(entry) for entry in fields.entries("tools"))
    request = CompletionRequest(
        model=fields.demand("model"),
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(fields, tools),
        output_tokens_max=_output_tokens_max(fields),
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        stop=_stop(fields),
        output_schema=_output_schema(fields),
        seed=fields.integer("seed", least=-(2**63)),
        stream=stream,
        parallel_tool_calls=fields.flag("parallel_tool_calls") if tools else None,
        reasoning_effort=effort_of(fields, "reasoning_effort"),
        end_user=fields.text("safety_identifier") or fields.text("user"),
        logprobs=_logprobs(fields),
    )
    include_usage = _stream_options(fields)
    # What these ask for is what happens anyway.
    harmless: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("n", (1,)),
        ("frequency_penalty", (0, 0.0)),
        ("presence_penalty", (0, 0.0)),
        ("logit_bias", ({},)),
        ("store", (False,)),
        ("service_tier", ("auto", "default")),
        ("modalities", (["text"],)),
        ("verbosity", ("medium",)),
        ("parallel_tool_calls", (True, False)),
    )
    for name, values in harmless:
        fields.only(name, *values)
    if fields.take("user") not in (None, request.end_user):
        raise untranslatable("user", "beside safety_identifier")
    fields.finish()
    return Call(request, include_usage)


def _output_tokens_max(fields: Fields) -> int:
    newer = fields.integer("max_completion_tokens", least=1)
    older = fields.integer("max_tokens", least=1)
    if newer is not None and older is not None and newer != older:
        raise wrong("max_tokens", "contradicts max_completion_tokens", older)
    return newer or older or OUTPUT_TOKENS_DEFAULT


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", least=0)
    if top is not None and top > TOP_LOGPROBS_MAX:
        raise wrong("top_logprobs", f"must be at most {TOP_LOGPROBS_MAX}", top)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs to be true", top)
    return (top or 0) if wanted else None


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    return (value,) if isinstance(value, str) else Fields({"stop": value}).texts("stop")


def _stream_options(fields: Fields) -> bool:
    options = fields.inner("stream_options")
    if options is None:
        return False
    include_usage = options.flag("include_usage") or False
    options.only("include_obfuscation", False, True)
    options.finish()
    return include_usage


def _output_schema(fields: Fields) -> JsonObject | None:
    form = fields.inner("response_format")
    if form is None:
        return None
    kind = form.demand("type")
    schema: JsonObject | None = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        described = form.inner("json_schema")
        if described is None:
            raise wrong(form.name("json_schema"), "must be an object", None)
        described.demand("name")
        schema = described.object("schema") or {"type": "object"}
        if description := described.text("description"):
            schema = {"description": description, **schema}
        described.only("strict", True, False)  # the provider holds the model to the schema in either case
        described.finish()
    elif kind != "text":
        raise untranslatable(form.name("type"), kind)
    form.finish()
    return schema


def _tool(fields: Fields) -> ToolSpec:
    kind = fields.demand("type")
    if kind != "function":
        raise untranslatable(fields.name("type"), kind)
    function = fields.inner("function")
    if function is None:
        raise wrong(fields.name("function"), "must be an object", None)
    fields.finish()
    spec = tool_spec(function, schema=function.object("parameters") or {"type": "object", "properties": {}})
    function.finish()
    return spec


def _tool_choice(fields: Fields, tools: tuple[ToolSpec, ...]) -> str:
    value = fields.take("tool_choice")
    if value is None:
        return "auto"
    if not tools and value != "none":
        raise wrong("tool_choice", "needs tools", value)
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise wrong("tool_choice", "must be auto, none, required or an object", value)
        return value
    choice = Fields(value, "tool_choice")
    kind = choice.demand("type")
    if kind != "function":
        raise untranslatable("tool_choice.type", kind)
    function = choice.inner("function") or Fields({}, "tool_choice.function")
    name = function.demand("name")
    function.finish()
    choice.finish()
    if name not in [tool.name for tool in tools] or name in ("auto", "none", "required"):
        raise wrong("tool_choice.function.name", "must name one of the tools", name)
    return name


# Messages


def _messages(value: object) -> tuple[Message, ...]:
    found: list[Message] = []
    called: dict[str, str] = {}
    for fields in entries(value, "messages"):
        role = fields.demand("role")
        match role:
            case "system" | "developer":
                found.append(Message(role="system", parts=tuple(_content(fields, images=False))))
            case "user":
                found.append(Message(role="user", parts=tuple(_content(fields, images=True))))
            case "assistant":
                found.append(_assistant(fields, called))
            case "tool":
                found.append(_tool_result(fields, called))
            case _:
                raise untranslatable(fields.name("role"), role)
        fields.finish()
    if not found:
        raise wrong("messages", "must hold at least one message", value)
    if found[-1].role == "assistant":
        raise untranslatable(f"messages.{len(found) - 1}", "an assistant message at the end")
    return tuple(found)


def _content(fields: Fields, *, images: bool) -> list[Part]:
    value = fields.take("content")
    if isinstance(value, str):
        return [TextPart(text=value)]
    parts: list[Part] = []
    for part in entries(value, fields.name("content")):
        kind = part.demand("type")
        if kind == "text":
            text = part.text("text")
            if text is None:
                raise wrong(part.name("text"), "must be a string", None)
            parts.append(TextPart(text=text))
        elif kind == "image_url" and images:
            parts.append(_image(part))
        else:
            raise untranslatable(part.name("type"), kind)
        part.finish()
    return parts


def _image(part: Fields) -> ImagePart:
    image = part.inner("image_url") or Fields({}, part.name("image_url"))
    url = image.demand("url")
    image.only("detail", "auto")
    image.finish()
    return image_of(url, image.name("url"))


def _assistant(fields: Fields, called: dict[str, str]) -> Message:
    parts: list[Part] = _thinking(fields)
    value = fields.take("content")
    if isinstance(value, str):
        parts.append(TextPart(text=value))
    elif value is not None:
        for part in entries(value, fields.name("content")):
            kind = part.demand("type")
            if kind not in ("text", "refusal"):
                raise untranslatable(part.name("type"), kind)
            parts.append(TextPart(text=part.text(kind) or ""))
            part.finish()
    refusal = fields.text("refusal")
    if refusal:
        parts.append(TextPart(text=refusal))
    # Lists that clients echo from answers of ours and of others.
    fields.only("annotations", [])
    for call in fields.entries("tool_calls"):
        part = _tool_call(call)
        called[part.id] = part.name
        parts.append(part)
    return Message(role="assistant", parts=tuple(parts))


def _thinking(fields: Fields) -> list[Part]:
    """Thinking of an earlier answer, with the signatures that its provider wants back."""
    texts = [fields.text("reasoning_content"), fields.text("reasoning")]
    parts: list[Part] = []
    for detail in fields.entries("reasoning_details"):
        kind = detail.demand("type")
        if kind == "reasoning.encrypted":
            parts.append(ThinkingPart(text="", signature=_REDACTED + detail.demand("data")))
        elif kind == "reasoning.text":
            parts.append(ThinkingPart(text=detail.text("text") or "", signature=detail.text("signature")))
        else:
            raise untranslatable(detail.name("type"), kind)
        for name in ("format", "id", "index"):
            detail.take(name)  # labels of the entry; the provider is told its content
        detail.finish()
    text = next((text for text in texts if text), "")
    return parts or ([ThinkingPart(text=text)] if text else [])


def _tool_call(fields: Fields) -> ToolCallPart:
    kind = fields.text("type") or "function"
    if kind != "function":
        raise untranslatable(fields.name("type"), kind)
    function = fields.inner("function") or Fields({}, fields.name("function"))
    call_id, name = fields.demand("id"), function.demand("name")
    text = function.text("arguments") or ""
    arguments = arguments_of(text, function.name("arguments"))
    fields.only("index", *range(128))
    function.finish()
    fields.finish()
    return ToolCallPart(id=call_id, name=name, arguments=arguments)


def _tool_result(fields: Fields, called: Mapping[str, str]) -> Message:
    call_id = fields.demand("tool_call_id")
    name = called.get(call_id)
    if name is None:
        raise wrong(fields.name("tool_call_id"), "must name a tool call of an earlier message", call_id)
    parts = _content(fields, images=False)
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    fields.only("name", name)
    return Message(role="user", parts=(ToolResultPart(id=call_id, name=name, content=text),))


# Answers


def encode_chat(completion: Completion, *, answer_id: str, created_s: int) -> bytes:
    """A whole answer."""
    text = "".join(part.text for part in completion.parts if isinstance(part, TextPart))
    calls = completion.tool_calls
    message: JsonObject = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    thinking = "".join(part.text for part in completion.parts if isinstance(part, ThinkingPart))
    if thinking:
        message["reasoning_content"] = thinking
    if details := _reasoning_details(completion):
        message["reasoning_details"] = details
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": orjson.dumps(call.arguments).decode()},
            }
            for call in calls
        ]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _shown_logprobs(completion.logprobs),
        "finish_reason": _FINISH[completion.stop_reason],
    }
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "chat.completion",
            "created": created_s,
            "model": completion.model,
            "choices": [choice],
            "usage": encode_usage(completion.usage),
        }
    )


def _shown_logprobs(logprobs: Sequence[TokenLogprob]) -> JsonObject | None:
    """What a choice says of its tokens."""
    return {"content": [_logprob(entry) for entry in logprobs], "refusal": None} if logprobs else None


def _logprob(entry: TokenLogprob) -> JsonObject:
    """A token and its alternatives, as both of OpenAI's formats write them."""
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": entry.utf8,
        "top_logprobs": [
            {"token": other.token, "logprob": other.logprob, "bytes": other.utf8} for other in entry.top
        ],
    }


def _reasoning_details(completion: Completion) -> list[JsonObject]:
    """Thinking that carries a signature, in the form in which it can come back."""
    details: list[JsonObject] = []
    for part in completion.parts:
        if not isinstance(part, ThinkingPart) or part.signature is None:
            continue
        if part.signature.startswith(_REDACTED):
            details.append({"type": "reasoning.encrypted", "data": part.signature.removeprefix(_REDACTED)})
        else:
            details.append({"type": "reasoning.text", "text": part.text, "signature": part.signature})
    return details


def encode_usage(usage: Usage) -> JsonObject:
    """The usage object."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class ChatStream:
    """Encodes the events of one answer as chunks.

    Args:
        model: The model's name in every chunk.
        answer_id: Likewise.
        created_s: Likewise, Unix time.
        include_usage: Whether the caller asked for a chunk with the usage.
    """

    def __init__(self, model: str, *, answer_id: str, created_s: int, include_usage: bool) -> None:
        self._head = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": model,
        }
        self._include_usage = include_usage
        self._begun = False
        self._silent_calls: set[int] = set()

    def take(self, event: StreamEvent) -> bytes:
        """The chunks of one event."""
        begin = b"" if self._begun else self._delta({"role": "assistant", "content": ""})
        self._begun = True
        match event:
            case TextDelta():
                return begin + self._delta({"content": event.text}, logprobs=event.logprobs)
            case ThinkingDelta():
                return begin + self._delta({"reasoning_content": event.text})
            case ToolCallDelta():
                return begin + self._delta({"tool_calls": [self._call(event)]})
            case StreamEnd():
                return begin + self._end(event.completion)

    def fail(self, error: AgenticFlowError) -> bytes:
        """The end of the stream where it broke."""
        return error_event(error)

    def _call(self, event: ToolCallDelta) -> JsonObject:
        function: JsonObject = {"arguments": event.arguments_json}
        call: JsonObject = {"index": event.index, "function": function}
        if event.id is not None:
            self._silent_calls.add(event.index)
            function["name"] = event.name
            call |= {"id": event.id, "type": "function"}
        if event.arguments_json:
            self._silent_calls.discard(event.index)
        return call

    def _end(self, completion: Completion) -> bytes:
        # Clients parse the arguments of every call, and nothing at all is no JSON.
        ends = [
            self._delta({"tool_calls": [{"index": index, "function": {"arguments": "{}"}}]})
            for index in sorted(self._silent_calls)
        ]
        if details := _reasoning_details(completion):
            ends.append(self._delta({"reasoning_details": details}))
        ends.append(self._delta({}, _FINISH[completion.stop_reason]))
        if self._include_usage:
            ends.append(_data({**self._head, "choices": [], "usage": encode_usage(completion.usage)}))
        return b"".join([*ends, b"data: [DONE]\n\n"])

    def _delta(
        self, delta: JsonObject, finish: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        told = _shown_logprobs(logprobs)
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return _data(chunk)


def error_event(error: AgenticFlowError) -> bytes:
    """The end of a stream that broke. No `[DONE]` follows, so nobody takes it for complete."""
    return _data(openai_error(error))


def _data(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
