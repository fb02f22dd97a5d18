"""Anthropic Messages as a server speaks it: requests in, answers, events and errors out.

Translation only: a request for a provider that speaks this format itself passes through untouched. Marks for
the prompt cache are taken as said: providers of other formats cache by themselves. Thinking of theirs has no
signature; it is shown with an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, get_args

import orjson

from agentic_flow.core.errors import AgenticFlowError, ProviderProtocol
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    JsonObject,
    Message,
    Part,
    ReasoningEffort,
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
from agentic_flow.gateway.front.errors import anthropic_error
from agentic_flow.gateway.front.fields import Fields, entries, json_object, untranslatable, wrong
from agentic_flow.gateway.front.format import Call, tool_spec

_EFFORTS = tuple(effort for effort in get_args(ReasoningEffort) if effort not in ("none", "minimal"))
_REDACTED = "redacted:"
_STOPS: dict[StopReason, str] = {
    "end": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
}


# Requests


def decode_messages(body: JsonObject, *, counting: bool = False) -> Call:
    """The request of a body.

    Args:
        counting: Whether it is one for `count_tokens`, which names no limit.

    Raises:
        InvalidInput: a field is wrong or cannot be translated; `details["field"]` names it.
    """
    fields = Fields(body)
    system = _texts(fields, "system")
    turns = _turns(fields.take("messages"))
    limit = fields.integer("max_tokens", least=1)
    if limit is None and not counting:
        raise wrong("max_tokens", "must be a whole number, at least 1", None)
    tools = tuple(_tool(entry) for entry in fields.entries("tools"))
    choice, parallel = _tool_choice(fields, tools)
    effort, schema = _output_config(fields)
    request = CompletionRequest(
        model=fields.demand("model"),
        messages=((Message(role="system", parts=system),) if system else ()) + turns,
        tools=tools,
        tool_choice=choice,
        output_tokens_max=limit or 1,
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        stop=fields.texts("stop_sequences"),
        output_schema=schema,
        stream=fields.flag("stream") or False,
        parallel_tool_calls=parallel,
        reasoning_effort=_thinking(fields, effort),
        end_user=_end_user(fields),
    )
    _cache_control(fields)
    fields.only("service_tier", "auto")
    fields.finish()
    return Call(request)


def _texts(fields: Fields, key: str) -> tuple[TextPart, ...]:
    """A text that is a string or a list of text blocks."""
    value = fields.take(key)
    if value is None or isinstance(value, str):
        return (TextPart(text=value),) if value else ()
    return tuple(_text(block) for block in entries(value, fields.name(key)))


def _text(block: Fields) -> TextPart:
    kind = block.demand("type")
    if kind != "text":
        raise untranslatable(block.name("type"), kind)
    text = block.text("text")
    if text is None:
        raise wrong(block.name("text"), "must be a string", None)
    _cache_control(block)
    block.only("citations", [])
    block.finish()
    return TextPart(text=text)


def _cache_control(fields: Fields) -> None:
    control = fields.inner("cache_control")
    if control is not None:
        control.only("type", "ephemeral")
        control.only("ttl", "5m")
        control.finish()


def _end_user(fields: Fields) -> str | None:
    metadata = fields.inner("metadata")
    if metadata is None:
        return None
    user = metadata.text("user_id")
    metadata.finish()
    return user


def _output_config(fields: Fields) -> tuple[ReasoningEffort | None, JsonObject | None]:
    config = fields.inner("output_config")
    if config is None:
        return None, None
    effort = config.text("effort")
    if effort is not None and effort not in _EFFORTS:
        raise wrong(config.name("effort"), f"must be one of {', '.join(_EFFORTS)}", effort)
    form = config.inner("format")
    schema: JsonObject | None = None
    if form is not None:
        form.only("type", "json_schema")
        schema = form.object("schema")
        if schema is None:
            raise wrong(form.name("schema"), "must be an object", None)
        form.finish()
    config.finish()
    return cast(ReasoningEffort | None, effort), schema


def _thinking(fields: Fields, effort: ReasoningEffort | None) -> ReasoningEffort | None:
    thinking = fields.inner("thinking")
    if thinking is None:
        return effort
    kind = thinking.demand("type")
    if kind == "disabled":
        if effort is not None:
            raise untranslatable("output_config.effort", effort)
        effort = "none"
    elif kind == "adaptive":
        thinking.only("display", "summarized", "omitted")  # how much is shown is the provider's choice
    elif kind == "enabled":
        raise untranslatable("thinking.budget_tokens", thinking.take("budget_tokens"))
    else:
        raise untranslatable("thinking.type", kind)
    thinking.finish()
    return effort


def _tool(fields: Fields) -> ToolSpec:
    kind = fields.text("type")
    if kind not in (None, "custom"):
        raise untranslatable(fields.name("type"), kind)
    schema = fields.object("input_schema")
    if schema is None:
        raise wrong(fields.name("input_schema"), "must be an object", None)
    spec = tool_spec(fields, schema=schema)
    _cache_control(fields)
    fields.only("defer_loading", False)
    fields.only("eager_input_streaming", False, True)  # when the pieces come, not what is in them
    fields.finish()
    return spec


def _tool_choice(fields: Fields, tools: tuple[ToolSpec, ...]) -> tuple[str, bool | None]:
    choice = fields.inner("tool_choice")
    if choice is None:
        return "auto", None
    kind = choice.demand("type")
    chosen = {"auto": "auto", "none": "none", "any": "required", "tool": "tool"}.get(kind)
    if chosen is None:
        raise wrong("tool_choice.type", "must be auto, any, tool or none", kind)
    if not tools and chosen != "none":
        raise wrong("tool_choice", "needs tools", kind)
    if chosen == "tool":
        chosen = choice.demand("name")
        if chosen not in [tool.name for tool in tools] or chosen in ("auto", "none", "required"):
            raise wrong("tool_choice.name", "must name one of the tools", chosen)
    single = choice.flag("disable_parallel_tool_use")
    choice.finish()
    return chosen, None if single is None else not single


def _turns(value: object) -> tuple[Message, ...]:
    turns: list[Message] = []
    called: dict[str, str] = {}
    for fields in entries(value, "messages"):
        role = fields.demand("role")
        if role == "system":
            turns.append(Message(role="system", parts=_texts(fields, "content")))
        elif role in ("user", "assistant"):
            turns.append(_turn(fields, role == "user", called))
        else:
            raise wrong(fields.name("role"), "must be user, assistant or system", role)
        fields.finish()
    if not turns:
        raise wrong("messages", "must hold at least one message", value)
    if turns[-1].role == "assistant":
        raise untranslatable(f"messages.{len(turns) - 1}", "the beginning of the answer")
    return tuple(turns)


def _turn(fields: Fields, user: bool, called: dict[str, str]) -> Message:
    value = fields.take("content")
    parts: list[Part] = []
    if isinstance(value, str):
        parts.append(TextPart(text=value))
    else:
        blocks = entries(value, fields.name("content"))
        parts.extend(_user_part(b, called) if user else _assistant_part(b, called) for b in blocks)
    return Message(role="user" if user else "assistant", parts=tuple(parts))


def _user_part(block: Fields, called: Mapping[str, str]) -> Part:
    kind = block.demand("type")
    match kind:
        case "text":
            return _text_again(block)
        case "image":
            part: Part = _image(block)
        case "tool_result":
            part = _tool_result(block, called)
        case _:
            raise untranslatable(block.name("type"), kind)
    _cache_control(block)
    block.finish()
    return part


def _text_again(block: Fields) -> TextPart:
    """A text block whose type was read."""
    text = block.text("text")
    if text is None:
        raise wrong(block.name("text"), "must be a string", None)
    _cache_control(block)
    block.only("citations", [])
    block.finish()
    return TextPart(text=text)


def _image(block: Fields) -> ImagePart:
    source = block.inner("source") or Fields({}, block.name("source"))
    kind = source.demand("type")
    if kind == "base64":
        image = ImagePart(media_type=source.demand("media_type"), data=source.demand("data"))
    elif kind == "url":
        image = ImagePart(media_type="image/*", url=source.demand("url"))
    else:
        raise untranslatable(source.name("type"), kind)
    source.finish()
    return image


def _tool_result(block: Fields, called: Mapping[str, str]) -> ToolResultPart:
    call_id = block.demand("tool_use_id")
    name = called.get(call_id)
    if name is None:
        raise wrong(block.name("tool_use_id"), "must name a tool use of an earlier message", call_id)
    text = "\n".join(part.text for part in _texts(block, "content"))
    return ToolResultPart(id=call_id, name=name, content=text, is_error=block.flag("is_error") or False)


def _assistant_part(block: Fields, called: dict[str, str]) -> Part:
    kind = block.demand("type")
    match kind:
        case "text":
            return _text_again(block)
        case "thinking":
            part: Part = ThinkingPart(
                text=block.text("thinking") or "", signature=block.text("signature") or None
            )
        case "redacted_thinking":
            part = ThinkingPart(text="", signature=_REDACTED + block.demand("data"))
        case "tool_use":
            call_id, name = block.demand("id"), block.demand("name")
            part = ToolCallPart(
                id=call_id, name=name, arguments=json_object(block.take("input"), block.name("input"))
            )
            called[call_id] = name
            caller = block.inner("caller")
            if caller is not None:
                caller.only("type", "direct")
                caller.finish()
        case _:
            raise untranslatable(block.name("type"), kind)
    _cache_control(block)
    block.finish()
    return part


# Answers


def encode_message(completion: Completion, *, answer_id: str) -> bytes:
    """A whole answer."""
    return orjson.dumps(
        {
            "id": answer_id,
            "type": "message",
            "role": "assistant",
            "model": completion.model,
            "content": [_block(part) for part in completion.parts],
            "stop_reason": _STOPS[completion.stop_reason],
            "stop_sequence": None,
            "usage": encode_usage(completion.usage),
        }
    )


def _block(part: Part) -> JsonObject:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ThinkingPart(signature=signature) if signature is not None and signature.startswith(_REDACTED):
            return {"type": "redacted_thinking", "data": signature.removeprefix(_REDACTED)}
        case ThinkingPart():
            return {"type": "thinking", "thinking": part.text, "signature": part.signature or ""}
        case ToolCallPart():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
        case _:
            raise ProviderProtocol(f"an answer cannot hold a part of kind {part.kind!r}")


def encode_usage(usage: Usage) -> JsonObject:
    """The usage object; what was read from and written to the cache is counted apart."""
    return {
        "input_tokens": max(0, usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens),
        "cache_read_input_tokens": usage.cache_read_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


class MessageStream:
    """Encodes the events of one answer; clients rely on blocks that follow one another.

    Pieces of a tool call that come while another one is unfinished wait until it is their turn.

    Args:
        model: The model's name at the start.
        answer_id: Id of the message.
    """

    def __init__(self, model: str, *, answer_id: str) -> None:
        self._model = model
        self._answer_id = answer_id
        self._begun = False
        self._blocks = 0
        self._open: str | int | None = None  # "text", "thinking", or the index of a tool call
        self._arguments: list[str] = []
        self._waiting: dict[int, list[ToolCallDelta]] = {}

    def take(self, event: StreamEvent) -> bytes:
        """The events of one event of ours."""
        begin = b"" if self._begun else self._start()
        self._begun = True
        match event:
            case TextDelta():
                return begin + self._piece("text", {"type": "text_delta", "text": event.text})
            case ThinkingDelta():
                return begin + self._piece("thinking", {"type": "thinking_delta", "thinking": event.text})
            case ToolCallDelta():
                return begin + self._call(event)
            case StreamEnd():
                return begin + self._end(event.completion)

    def fail(self, error: AgenticFlowError) -> bytes:
        """The end of the stream where it broke."""
        return error_event(error)

    def _start(self) -> bytes:
        # Other formats say what was read at the end only; the last event replaces these counts.
        message: JsonObject = {
            "id": self._answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": encode_usage(Usage()),
        }
        return _event("message_start", {"message": message})

    def _piece(self, kind: str, delta: JsonObject) -> bytes:
        opening = b""
        if self._open != kind:
            empty = {"type": "text", "text": ""}
            if kind == "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
            opening = self._flush() + self._begin(kind, empty)
        return opening + self._delta(delta)

    def _call(self, event: ToolCallDelta) -> bytes:
        if event.index == self._open:
            return self._argument(event) + (self._next() if self._waiting else b"")
        if event.index in self._waiting or (isinstance(self._open, int) and not self._complete()):
            self._waiting.setdefault(event.index, []).append(event)
            return b""
        if event.id is None:
            raise ProviderProtocol(
                "a piece of a tool call came after its end", hint="the call can be repeated"
            )
        return self._close() + self._begin_call(event)

    def _begin_call(self, event: ToolCallDelta) -> bytes:
        block: JsonObject = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        return self._begin(event.index, block) + self._argument(event)

    def _argument(self, event: ToolCallDelta) -> bytes:
        if not event.arguments_json:
            return b""
        self._arguments.append(event.arguments_json)
        return self._delta({"type": "input_json_delta", "partial_json": event.arguments_json})

    def _complete(self) -> bool:
        """Whether the arguments of the open call are whole."""
        try:
            orjson.loads("".join(self._arguments))
        except orjson.JSONDecodeError:
            return False
        return True

    def _next(self) -> bytes:
        """The calls that waited for the open one, as far as they go."""
        sent: list[bytes] = []
        while self._waiting and self._complete():
            sent.append(self._begin_waiting())
        return b"".join(sent)

    def _begin_waiting(self) -> bytes:
        index = next(iter(self._waiting))
        first, *more = self._waiting.pop(index)
        sent = self._close() + self._begin_call(first)
        return sent + b"".join(self._argument(event) for event in more)

    def _flush(self) -> bytes:
        """Everything that waits, and the end of the open block."""
        sent: list[bytes] = []
        while self._waiting:
            sent.append(self._begin_waiting())
        return b"".join([*sent, self._close()])

    def _begin(self, kind: str | int, block: JsonObject) -> bytes:
        self._open, self._arguments = kind, []
        self._blocks += 1
        return _event("content_block_start", {"index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: JsonObject) -> bytes:
        return _event("content_block_delta", {"index": self._blocks - 1, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", {"index": self._blocks - 1})

    def _end(self, completion: Completion) -> bytes:
        ending = {
            "delta": {"stop_reason": _STOPS[completion.stop_reason], "stop_sequence": None},
            "usage": encode_usage(completion.usage),
        }
        return self._flush() + _event("message_delta", ending) + _event("message_stop", {})


def error_event(error: AgenticFlowError) -> bytes:
    """The end of a stream that broke. No `message_stop` follows, so nobody takes it for complete."""
    return b"event: error\ndata: " + orjson.dumps(anthropic_error(error)) + b"\n\n"


def _event(kind: str, content: JsonObject) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **content}) + b"\n\n"
