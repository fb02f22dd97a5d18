"""OpenAI Responses as a server reads it: requests in. Answers are written by `openai_responses_answers`.

Translation only: a request for a provider that speaks this format itself passes through untouched. Nothing is
stored, whatever `store` says, and answers say `store: false`; the history travels in `input`. Thinking comes
back in reasoning items, its signature in their `encrypted_content`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import orjson

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import (
    TOP_LOGPROBS_MAX,
    CompletionRequest,
    JsonObject,
    Message,
    Part,
    ReasoningEffort,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.gateway.front.fields import Fields, entries, untranslatable, wrong
from agentic_flow.gateway.front.format import (
    OUTPUT_TOKENS_DEFAULT,
    Call,
    arguments_of,
    effort_of,
    image_of,
    tool_spec,
)

SIGNED = "agentic-flow:"
"""Begins the `encrypted_content` that this gateway wrote; only that can be read here."""

LOGPROBS = "message.output_text.logprobs"
"""What `include` calls the probabilities of the tokens of the text."""

_METADATA_MAX = 16
_METADATA_KEY_CHARS_MAX, _METADATA_VALUE_CHARS_MAX = 64, 512
_STATUSES = ("in_progress", "completed", "incomplete")
_SUMMARIES = ("auto", "concise", "detailed")


def decode_responses(body: JsonObject) -> Call:
    """The request of a body.

    Raises:
        InvalidInput: a field is wrong or cannot be translated; `details["field"]` names it.
    """
    fields = Fields(body)
    _no_memory(fields)
    instructions = fields.text("instructions")
    turns = _turns(fields.take("input"))
    told = body.get("tools")
    tools = tuple(_tool(entry) for entry in fields.entries("tools"))
    choice = fields.take("tool_choice")
    parallel = fields.flag("parallel_tool_calls")
    form = _text(fields)
    thinking = _reasoning(fields)
    logprobs = _logprobs(fields)
    user, safety_identifier = fields.text("user"), fields.text("safety_identifier")
    if user and safety_identifier and user != safety_identifier:
        raise untranslatable("user", "beside safety_identifier")
    system = (Message(role="system", parts=(TextPart(text=instructions),)),) if instructions else ()
    request = CompletionRequest(
        model=fields.demand("model"),
        messages=system + turns,
        tools=tools,
        tool_choice=_tool_choice(choice, tools),
        output_tokens_max=fields.integer("max_output_tokens", least=1) or OUTPUT_TOKENS_DEFAULT,
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        output_schema=form.schema,
        stream=fields.flag("stream") or False,
        parallel_tool_calls=parallel if tools else None,
        reasoning_effort=thinking.effort,
        end_user=safety_identifier or user,
        logprobs=logprobs,
    )
    metadata = _metadata(fields)
    cache_key = fields.text("prompt_cache_key")  # where a provider caches is its own affair
    _harmless(fields)
    fields.finish()
    echo: JsonObject = {
        "instructions": instructions,
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": metadata,
        "parallel_tool_calls": parallel is not False,
        "prompt_cache_key": cache_key,
        "reasoning": thinking.shown,
        "safety_identifier": safety_identifier,
        "temperature": request.temperature,
        "text": form.shown,
        "tool_choice": "auto" if choice is None else choice,
        "tools": told or [],
        "top_logprobs": logprobs or 0,
        "top_p": request.top_p,
        "user": user,
    }
    return Call(request, echo=echo)


def _no_memory(fields: Fields) -> None:
    """Refuse what asks for things that were stored, or for an answer that is to be."""
    for name in ("previous_response_id", "conversation", "prompt"):
        value = fields.take(name)
        if value is not None:
            raise _not_stored(name, value)
    _in_the_foreground(fields)
    fields.flag("store")


def _in_the_foreground(fields: Fields) -> None:
    if fields.flag("background"):
        raise InvalidInput(
            "the field 'background' cannot be true: this gateway keeps no answers to be fetched later",
            hint="leave it out, and stream the answer if it takes long",
            details={"field": "background"},
        )


def check_passing(body: JsonObject) -> None:
    """Refuse what cannot be had through this gateway although the provider would take it.

    Raises:
        InvalidInput: the answer would have to be fetched later, unseen by the books.
    """
    _in_the_foreground(Fields(body))


def _not_stored(field: str, value: object) -> InvalidInput:
    return InvalidInput(
        f"the field {field!r} names something that would have to be stored (got {value!r:.80}); "
        "this gateway stores nothing",
        hint="send the history in `input`: the items of earlier answers and the new ones",
        details={"field": field},
    )


def _logprobs(fields: Fields) -> int | None:
    """How many alternatives to each token are wanted; None: no probabilities at all."""
    wanted = False
    for position, name in enumerate(fields.texts("include")):
        if name == LOGPROBS:
            wanted = True
        elif name != "reasoning.encrypted_content":
            raise untranslatable(f"include.{position}", name)
    top = fields.integer("top_logprobs", least=0) or 0
    if top > TOP_LOGPROBS_MAX:
        raise wrong("top_logprobs", f"must be at most {TOP_LOGPROBS_MAX}", top)
    # Who names a number of alternatives wants to see them.
    return top if wanted or top else None


def _harmless(fields: Fields) -> None:
    """Fields that ask for what happens anyway."""
    options = fields.inner("stream_options")
    if options is not None:
        options.only("include_obfuscation", False, True)
        options.finish()
    harmless: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("truncation", ("disabled",)),
        ("service_tier", ("auto", "default")),
        ("prompt_cache_retention", ("in_memory",)),
        ("context_management", ([],)),
    )
    for name, values in harmless:
        fields.only(name, *values)


def _metadata(fields: Fields) -> JsonObject:
    """The caller's own notes, which the answer repeats."""
    metadata = fields.object("metadata") or {}
    if len(metadata) > _METADATA_MAX:
        raise wrong("metadata", f"must have at most {_METADATA_MAX} entries", metadata)
    for key, value in metadata.items():
        if len(key) > _METADATA_KEY_CHARS_MAX:
            raise wrong("metadata", f"must have keys of at most {_METADATA_KEY_CHARS_MAX} characters", key)
        if not isinstance(value, str) or len(value) > _METADATA_VALUE_CHARS_MAX:
            must = f"must be a string of at most {_METADATA_VALUE_CHARS_MAX} characters"
            raise wrong(f"metadata.{key}", must, value)
    return metadata


class _Form:
    """What `text` asks for, and how the answer repeats it."""

    def __init__(self, schema: JsonObject | None, shown: JsonObject) -> None:
        self.schema = schema
        self.shown = {"format": shown}


def _text(fields: Fields) -> _Form:
    text = fields.inner("text")
    if text is None:
        return _Form(None, {"type": "text"})
    text.only("verbosity", "medium")
    form = text.inner("format")
    text.finish()
    if form is None:
        return _Form(None, {"type": "text"})
    kind = form.demand("type")
    shown: JsonObject = {"type": kind}
    schema: JsonObject | None = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        name, given = form.demand("name"), form.object("schema")
        if given is None:
            raise wrong(form.name("schema"), "must be an object", None)
        description = form.text("description")
        # The provider holds the model to the schema in either case.
        shown |= {"name": name, "schema": given, "strict": form.flag("strict"), "description": description}
        schema = {"description": description, **given} if description else given
    elif kind != "text":
        raise untranslatable(form.name("type"), kind)
    form.finish()
    return _Form(schema, shown)


class _Thinking:
    """What `reasoning` asks for, and how the answer repeats it."""

    def __init__(self, fields: Fields | None) -> None:
        self.effort: ReasoningEffort | None = None if fields is None else effort_of(fields, "effort")
        self.shown: JsonObject = {"effort": self.effort, "summary": None}
        if fields is None:
            return
        for name in ("summary", "generate_summary"):
            summary = fields.text(name)
            if summary is None:
                continue
            if summary not in _SUMMARIES:
                raise wrong(fields.name(name), f"must be one of {', '.join(_SUMMARIES)}", summary)
            self.shown["summary"] = summary  # how much is shown is the provider's choice
        fields.only("context", "auto")
        fields.only("mode", "standard")
        fields.finish()


def _reasoning(fields: Fields) -> _Thinking:
    return _Thinking(fields.inner("reasoning"))


# Tools


def _tool(fields: Fields) -> ToolSpec:
    kind = fields.demand("type")
    if kind != "function":
        raise untranslatable(fields.name("type"), kind)
    spec = tool_spec(fields, schema=fields.object("parameters") or {"type": "object", "properties": {}})
    fields.only("allowed_callers", ["direct"])
    fields.only("async", False)
    fields.only("defer_loading", False)
    fields.finish()
    return spec


def _tool_choice(value: object, tools: tuple[ToolSpec, ...]) -> str:
    if value is None:
        return "auto"
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise wrong("tool_choice", "must be auto, none, required or an object", value)
        # Clients send "auto" beside an empty list; without tools it asks for what happens anyway.
        if not tools and value == "required":
            raise wrong("tool_choice", "needs tools", value)
        return value if tools else "auto"
    choice = Fields(value, "tool_choice")
    kind = choice.demand("type")
    if kind != "function":
        raise untranslatable("tool_choice.type", kind)
    name = choice.demand("name")
    choice.finish()
    if name not in [tool.name for tool in tools] or name in ("auto", "none", "required"):
        raise wrong("tool_choice.name", "must name one of the tools", name)
    return name


# Input items


def _turns(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role="user", parts=(TextPart(text=value),)),)
    history = _History()
    for fields in entries(value, "input"):
        kind = fields.text("type") or "message"
        match kind:
            case "message":
                history.message(fields)
            case "function_call":
                history.add("assistant", history.call(fields))
            case "function_call_output":
                history.add("results", history.result(fields))
            case "reasoning":
                thinking = _thinking(fields)
                if thinking:
                    history.think(thinking)
            case "item_reference":
                raise _not_stored(fields.name("type"), kind)
            case _:
                raise untranslatable(fields.name("type"), kind)
        fields.take("id")  # the item's label where it came from
        fields.only("status", *_STATUSES)
        fields.finish()
    turns = history.turns()
    if not turns:
        raise wrong("input", "must be a text or hold at least one item", value)
    if turns[-1].role == "assistant":
        last = len(cast(list[object], value)) - 1
        raise untranslatable(f"input.{last}", "an item of the model at the end")
    return turns


class _History:
    """Turns made of items: what the model said in one answer is one turn, and so are the results after it."""

    def __init__(self) -> None:
        self._turns: list[tuple[str, list[Part]]] = []
        self._called: dict[str, str] = {}

    def turns(self) -> tuple[Message, ...]:
        return tuple(
            Message(role="user" if kind == "results" else cast(Any, kind), parts=tuple(parts))
            for kind, parts in self._turns
        )

    def add(self, kind: str, *parts: Part) -> None:
        """Add to the last turn where that is of the same kind and such turns can grow."""
        if self._turns and self._turns[-1][0] == kind and kind in ("assistant", "results"):
            self._turns[-1][1].extend(parts)
        else:
            self._turns.append((kind, list(parts)))

    def think(self, thoughts: list[Part]) -> None:
        """Add thinking. What was not shown in a stream came at its end, yet its provider wants it first."""
        self.add("assistant", *thoughts)
        if all(isinstance(part, ThinkingPart) and not part.text for part in thoughts):
            parts = self._turns[-1][1]
            parts.sort(key=lambda part: not isinstance(part, ThinkingPart))

    def message(self, fields: Fields) -> None:
        role = fields.demand("role")
        match role:
            case "system" | "developer":
                self.add("system", *_content(fields, "content", images=False))
            case "user":
                self.add("user", *_content(fields, "content", images=True))
            case "assistant":
                self.add("assistant", *_said(fields))
            case _:
                raise untranslatable(fields.name("role"), role)

    def call(self, fields: Fields) -> ToolCallPart:
        call_id, name = fields.demand("call_id"), fields.demand("name")
        arguments = arguments_of(fields.text("arguments") or "", fields.name("arguments"))
        _direct(fields)
        self._called[call_id] = name
        return ToolCallPart(id=call_id, name=name, arguments=arguments)

    def result(self, fields: Fields) -> ToolResultPart:
        call_id = fields.demand("call_id")
        name = self._called.get(call_id)
        if name is None:
            raise wrong(fields.name("call_id"), "must name a function call of an earlier item", call_id)
        parts = _content(fields, "output", images=False)
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        fields.only("name", name)
        _direct(fields)
        return ToolResultPart(id=call_id, name=name, content=text)


def _direct(fields: Fields) -> None:
    caller = fields.inner("caller")
    if caller is not None:
        caller.only("type", "direct")
        caller.finish()
    fields.only("async", False)


def _content(fields: Fields, key: str, *, images: bool) -> list[Part]:
    """A text, or a list of texts and images, that is not the model's."""
    value = fields.take(key)
    if isinstance(value, str):
        return [TextPart(text=value)]
    parts: list[Part] = []
    for part in entries(value, fields.name(key)):
        kind = part.demand("type")
        if kind == "input_text":
            parts.append(TextPart(text=_string(part, "text")))
        elif kind == "input_image" and images:
            part.only("detail", "auto")
            parts.append(image_of(part.demand("image_url"), part.name("image_url")))
        else:
            raise untranslatable(part.name("type"), kind)
        part.finish()
    return parts


def _said(fields: Fields) -> list[Part]:
    """What the model wrote in an earlier answer."""
    value = fields.take("content")
    if isinstance(value, str):
        return [TextPart(text=value)]
    parts: list[Part] = []
    for part in entries(value, fields.name("content")):
        kind = part.demand("type")
        if kind not in ("output_text", "refusal"):
            raise untranslatable(part.name("type"), kind)
        parts.append(TextPart(text=_string(part, "text" if kind == "output_text" else "refusal")))
        # Lists that clients echo from answers of ours and of others. How likely a token was changes nothing.
        part.only("annotations", [])
        part.entries("logprobs")
        part.finish()
    return parts


def _string(part: Fields, key: str) -> str:
    text = part.text(key)
    if text is None:
        raise wrong(part.name(key), "must be a string", None)
    return text


def _thinking(fields: Fields) -> list[Part]:
    """Thinking of an earlier answer, with the signature that its provider wants back."""
    texts: Mapping[str, list[str]] = {
        key: [_thought(entry, kind) for entry in fields.entries(key)]
        for key, kind in (("content", "reasoning_text"), ("summary", "summary_text"))
    }
    text = "\n\n".join(texts["content"] or texts["summary"])
    sealed = fields.text("encrypted_content")
    at = fields.name("encrypted_content")
    if not sealed:
        return [ThinkingPart(text=text)] if text else []
    if not sealed.startswith(SIGNED):
        # Another provider's secret means nothing to the one that is asked now.
        raise untranslatable(at, sealed)
    signature = sealed.removeprefix(SIGNED)
    if signature.startswith("["):
        return _blocks(signature, at)
    return [ThinkingPart(text=text, signature=signature)] if signature else [ThinkingPart(text=text)]


def _blocks(sealed: str, at: str) -> list[Part]:
    """Several blocks of thinking that a stream showed as one item."""
    try:
        value: object = orjson.loads(sealed)
    except orjson.JSONDecodeError:
        raise wrong(at, "was changed since it was sent", sealed) from None
    parts: list[Part] = []
    for block in cast(list[object], value):
        match block:
            case [str(text), (str() | None) as signature]:
                parts.append(ThinkingPart(text=text, signature=signature))
            case _:
                raise wrong(at, "was changed since it was sent", sealed)
    return parts


def _thought(entry: Fields, kind: str) -> str:
    entry.only("type", kind)
    text = _string(entry, "text")
    entry.finish()
    return text
