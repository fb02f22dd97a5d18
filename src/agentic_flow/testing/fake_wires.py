"""The vendors' side of both wire formats, written from their documentation and not from our encoders.

Requests are checked by the rules the vendors state; answers and streams have the shapes their SDKs expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

Wire = Literal["anthropic", "openai"]
Json = Mapping[str, Any]
ANTHROPIC_VERSIONS = ("2023-06-01", "2026-10-21")
"""The first is what most clients send, the second what the vendor's SDK sends since its version 2."""


class Refusal(NamedTuple):
    """A request that broke the vendor's rules."""

    request: int
    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """One completion request as it arrived, with what scripts usually ask about."""

    wire: Wire
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    index: int
    key: str | None
    raw: bytes = b""

    @classmethod
    def parse(
        cls, wire: Wire, path: str, headers: Mapping[str, str], body: bytes, *, index: int
    ) -> SeenRequest:
        """The request of these bytes; what is no JSON object has an empty body, which no vendor takes."""
        try:
            value: object = json.loads(body)
        except ValueError:
            value = None
        key = headers.get("x-api-key")
        if wire == "openai":
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = token if scheme == "Bearer" and token else None
        fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
        return cls(wire, path, headers, fields, index, key, body)

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True

    @property
    def messages(self) -> list[dict[str, Any]]:
        value = self.body.get("messages")
        return cast(list[dict[str, Any]], value) if isinstance(value, list) else []

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools offered."""
        offered = cast(list[dict[str, Any]], self.body.get("tools") or [])
        if self.wire == "anthropic":
            return tuple(str(tool.get("name")) for tool in offered)
        return tuple(str(tool.get("function", {}).get("name")) for tool in offered)

    @property
    def system(self) -> str:
        """The system prompt's text."""
        if self.wire == "anthropic":
            return _text_of(self.body.get("system"))
        return "\n".join(_text_of(m.get("content")) for m in self.messages if m.get("role") == "system")

    @property
    def last_text(self) -> str:
        """The text of the last user message that has any."""
        for message in reversed(self.messages):
            if message.get("role") == "user" and (text := _text_of(message.get("content"))):
                return text
        return ""

    @property
    def text(self) -> str:
        """All that the model reads: system, turns, tool calls and tool results."""
        return json.dumps(
            [self.body.get("system"), self.messages], ensure_ascii=False, separators=(", ", ": ")
        )

    @property
    def tool_results(self) -> int:
        """How many tool results the conversation holds."""
        if self.wire == "openai":
            return sum(message.get("role") == "tool" for message in self.messages)
        return sum(
            block.get("type") == "tool_result"
            for message in self.messages
            for block in _blocks(message.get("content"))
        )


def _blocks(content: object) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        return []
    return [cast(dict[str, Any], block) for block in cast(list[object], content) if isinstance(block, dict)]


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(block.get("text", "")) for block in _blocks(content) if block.get("type") == "text")


# Rules of the Anthropic Messages API


def check_anthropic(seen: SeenRequest) -> str | None:
    """What the vendor would refuse, None when the request is good."""
    body = seen.body
    if seen.headers.get("anthropic-version") not in ANTHROPIC_VERSIONS:
        return "anthropic-version: header is required"
    if not isinstance(body.get("model"), str) or not body["model"]:
        return "model: Field required"
    limit = body.get("max_tokens")
    counting = seen.path.endswith("/count_tokens")
    if counting and ("max_tokens" in body or "stream" in body):
        return "max_tokens: Extra inputs are not permitted"
    if not counting and (not isinstance(limit, int) or limit < 1):
        return "max_tokens: Field required"
    if "system" in body and not isinstance(body["system"], str | list):
        return "system: Input should be a valid string or list"
    allowed = {"model", "max_tokens", "messages", "system", "tools", "tool_choice", "temperature", "top_p",
               "top_k", "stop_sequences", "stream", "metadata", "thinking", "output_config", "service_tier",
               "cache_control", "container", "inference_geo", "speed"}  # fmt: skip
    extra = sorted(set(body) - allowed)
    if extra:
        return f"{extra[0]}: Extra inputs are not permitted"
    return _check_anthropic_tools(body) or _check_anthropic_turns(seen.messages)


def _check_anthropic_tools(body: Json) -> str | None:
    tools = cast(list[dict[str, Any]], body.get("tools") or [])
    names = [tool.get("name") for tool in tools]
    for position, tool in enumerate(tools):
        schema = tool.get("input_schema")
        if not isinstance(schema, dict) or cast(Json, schema).get("type") != "object":
            return f"tools.{position}.input_schema.type: Field required"
        if set(tool) - {"name", "description", "input_schema", "cache_control", "strict"}:
            return f"tools.{position}: Extra inputs are not permitted"
    if len(set(names)) != len(names):
        return "tools: Tool names must be unique."
    choice = body.get("tool_choice")
    if choice is not None:
        if not tools:
            return "tool_choice: tools must be specified"
        if cast(Json, choice).get("type") not in ("auto", "any", "tool", "none"):
            return "tool_choice: Input tag is invalid"
        if cast(Json, choice).get("type") == "tool" and cast(Json, choice).get("name") not in names:
            return "tool_choice: tool not found in tools"
    return None


def _check_anthropic_turns(messages: Sequence[Json]) -> str | None:
    if not messages:
        return "messages: at least one message is required"
    if messages[0].get("role") != "user":
        return "messages: first message must use the user role"
    pending: list[str] = []
    previous: object = None
    for position, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        where = f"messages.{position}"
        if role not in ("user", "assistant"):
            return f"{where}.role: Input should be 'user' or 'assistant'"
        if role == previous:
            return f"{where}: roles must alternate between user and assistant"
        previous = role
        if not content:
            return f"{where}: all messages must have non-empty content"
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else _blocks(content)
        wrong = _check_anthropic_blocks(where, str(role), blocks)
        if wrong:
            return wrong
        results = [str(b.get("tool_use_id")) for b in blocks if b.get("type") == "tool_result"]
        if role == "user":
            if any(result not in pending for result in results):
                return f"{where}: unexpected `tool_use_id` found in `tool_result` blocks"
            if set(pending) - set(results):
                return f"{where}: `tool_use` ids were found without `tool_result` blocks immediately after"
            kinds = [b.get("type") == "tool_result" for b in blocks]
            if kinds != sorted(kinds, reverse=True):
                return f"{where}: tool_result blocks must come first in the content"
            pending = []
        else:
            pending = [str(b.get("id")) for b in blocks if b.get("type") == "tool_use"]
            if len(set(pending)) != len(pending):
                return f"{where}: `tool_use` ids must be unique"
    if pending:
        return "messages: the last assistant message has `tool_use` without `tool_result`"
    return None


def _check_anthropic_blocks(where: str, role: str, blocks: Sequence[Json]) -> str | None:
    kinds = {
        "user": ("text", "image", "tool_result", "document"),
        "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    }[role]
    for number, block in enumerate(blocks):
        kind, at = block.get("type"), f"{where}.content.{number}"
        if kind not in kinds:
            return f"{at}: Input tag {kind!r} does not match any of the expected tags {kinds!r}"
        if kind == "text" and not str(block.get("text", "")):
            return f"{at}: text content blocks must be non-empty"
        if kind == "thinking" and not block.get("signature"):
            return f"{at}.thinking.signature: Field required"
        if kind == "tool_use" and not isinstance(block.get("input"), dict):
            return f"{at}.tool_use.input: Input should be a valid dictionary"
        if kind == "image":
            source = cast(Json, block.get("source") or {})
            good = {"base64": ("media_type", "data"), "url": ("url",)}.get(str(source.get("type")))
            if good is None or any(not source.get(name) for name in good):
                return f"{at}.image.source: Field required"
    return None


# Rules of OpenAI Chat Completions


def check_openai(seen: SeenRequest) -> str | None:
    """What the vendor would refuse, None when the request is good."""
    body = seen.body
    if not isinstance(body.get("model"), str) or not body["model"]:
        return "you must provide a model parameter"
    if "max_tokens" in body and "max_completion_tokens" in body:
        return "max_tokens and max_completion_tokens cannot both be set"
    if not isinstance(body.get("stream_options") or {}, dict):
        return "Invalid type for 'stream_options': expected an object."
    if "stream_options" in body and not seen.stream:
        return "The 'stream_options' parameter is only allowed when 'stream' is enabled."
    top = body.get("top_logprobs")
    if top is not None and not body.get("logprobs"):
        return "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
    if top is not None and not (isinstance(top, int) and 0 <= top <= 20):
        return f"Invalid value for 'top_logprobs': must be between 0 and 20, got {top!r}."
    allowed = {"model", "messages", "max_tokens", "max_completion_tokens", "tools", "tool_choice",
               "response_format", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n",
               "parallel_tool_calls", "user", "logprobs", "top_logprobs", "reasoning_effort", "verbosity",
               "logit_bias", "metadata", "store", "service_tier", "prompt_cache_key", "frequency_penalty",
               "presence_penalty", "safety_identifier"}  # fmt: skip
    extra = sorted(set(body) - allowed)
    if extra:
        return f"Unrecognized request argument supplied: {extra[0]}"
    return _check_openai_tools(body) or _check_openai_turns(seen.messages)


def _check_openai_tools(body: Json) -> str | None:
    tools = cast(list[dict[str, Any]], body.get("tools") or [])
    if "tools" in body and not tools:
        return "Invalid 'tools': empty array."
    names: list[Any] = []
    for position, tool in enumerate(tools):
        function = cast(Json, tool.get("function") or {})
        if tool.get("type") != "function" or not function.get("name"):
            return f"Missing required parameter: 'tools[{position}].function.name'."
        names.append(function["name"])
    choice = body.get("tool_choice")
    if choice is not None and not tools:
        return "'tool_choice' is only allowed when 'tools' are specified."
    if isinstance(choice, dict) and cast(Json, choice).get("function", {}).get("name") not in names:
        return "Tool choice: function not found in 'tools'."
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        return f"Invalid value: {choice!r} for 'tool_choice'."
    form = cast(Json, body.get("response_format") or {})
    if form.get("type") == "json_schema":
        described = cast(Json, form.get("json_schema") or {})
        if not described.get("name") or not isinstance(described.get("schema"), dict):
            return "Missing required parameter: 'response_format.json_schema.name'."
    return None


def _check_openai_turns(messages: Sequence[Json]) -> str | None:
    if not messages:
        return "Invalid 'messages': empty array."
    pending: list[str] = []
    for position, message in enumerate(messages):
        role, content, where = message.get("role"), message.get("content"), f"messages.[{position}]"
        if role == "tool":
            if message.get("tool_call_id") not in pending:
                return f"{where}: 'tool' must be a response to a preceding message with 'tool_calls'."
            if not isinstance(content, str | list):
                return f"Invalid type for '{where}.content'"
            pending.remove(str(message["tool_call_id"]))
            continue
        if pending:
            return "An assistant message with 'tool_calls' must be followed by tool messages for each call."
        if role not in ("system", "developer", "user", "assistant"):
            return f"Invalid value: {role!r} for '{where}.role'."
        calls = cast(list[dict[str, Any]], message.get("tool_calls") or [])
        if role == "assistant":
            if content is None and not calls:
                return f"Invalid value for '{where}.content': expected a string, got null."
            if "tool_calls" in message and not calls:
                return f"Invalid '{where}.tool_calls': empty array."
        elif not isinstance(content, str | list) or calls:
            return f"Invalid type for '{where}.content': expected a string or a list."
        wrong = _check_openai_calls(where, calls) or _check_openai_parts(where, cast(object, content))
        if wrong:
            return wrong
        pending = [str(call["id"]) for call in calls]
    if pending:
        return "An assistant message with 'tool_calls' must be followed by tool messages for each call."
    return None


def _check_openai_calls(where: str, calls: Sequence[Json]) -> str | None:
    for number, call in enumerate(calls):
        function = cast(Json, call.get("function") or {})
        if not call.get("id") or call.get("type") != "function" or not function.get("name"):
            return f"Missing required parameter: '{where}.tool_calls[{number}]'."
        if not isinstance(function.get("arguments"), str):
            return f"Invalid type for '{where}.tool_calls[{number}].function.arguments': expected a string."
    return None


def _check_openai_parts(where: str, content: object) -> str | None:
    for number, part in enumerate(_blocks(content)):
        kind = part.get("type")
        if kind == "text" and not isinstance(part.get("text"), str):
            return f"Missing required parameter: '{where}.content[{number}].text'."
        if kind == "image_url" and not str(part.get("image_url", {}).get("url", "")).startswith(
            ("http://", "https://", "data:image/")
        ):
            return f"Invalid '{where}.content[{number}].image_url.url'."
        if kind not in ("text", "image_url", "refusal"):
            return f"Invalid value: {kind!r} for '{where}.content[{number}].type'."
    return None


# Answers


def _pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), max(1, size))]


def _arguments(reply: Json, call: Json) -> str:
    if reply["fault"] == "bad_arguments":
        return '["not", "an", "object"]'
    return json.dumps(call.get("arguments", {}), ensure_ascii=False)


def _calls(seen: SeenRequest, reply: Json) -> list[dict[str, Any]]:
    prefix = "toolu" if seen.wire == "anthropic" else "call"
    return [
        {
            "id": call.get("id") or f"{prefix}_{seen.index}_{number}",
            "name": call["name"],
            "arguments": _arguments(reply, call),
        }
        for number, call in enumerate(reply["calls"])
    ]


_ANTHROPIC_STOPS = {
    "end": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
}
_OPENAI_STOPS = {
    "end": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "stop_sequence": "stop",
    "refusal": "content_filter",
}


def _stop(reply: Json, names: Mapping[str, str]) -> str:
    given = reply["stop_reason"]
    if given is not None:
        return names.get(given, given)
    return names["tool_calls" if reply["calls"] else "end"]


def _anthropic_usage(reply: Json) -> dict[str, Any]:
    cached = reply["cache_read_tokens"] + reply["cache_write_tokens"]
    return {
        "input_tokens": reply["input_tokens"] - cached,
        "cache_read_input_tokens": reply["cache_read_tokens"],
        "cache_creation_input_tokens": reply["cache_write_tokens"],
        "output_tokens": reply["output_tokens"],
        "output_tokens_details": {"thinking_tokens": reply["reasoning_tokens"]},
    }


def _output_call(seen: SeenRequest, reply: Json) -> dict[str, Any] | None:
    """A request that forces one tool gets the scripted text as that tool's input, as the vendor would."""
    choice = cast(Json, seen.body.get("tool_choice") or {})
    if choice.get("type") != "tool" or reply["calls"]:
        return None
    try:
        value = json.loads(reply["body_text"])
    except ValueError:
        return None
    return {"id": f"toolu_{seen.index}_0", "name": choice["name"], "arguments": json.dumps(value)}


def anthropic_answer(seen: SeenRequest, reply: Json) -> dict[str, Any]:
    """A whole Messages answer."""
    content: list[dict[str, Any]] = []
    if reply["thinking"]:
        content.append({"type": "thinking", "thinking": reply["thinking"], "signature": f"sig-{seen.index}"})
    forced = _output_call(seen, reply)
    if reply["body_text"] and forced is None:
        content.append({"type": "text", "text": reply["body_text"]})
    content += [
        {"type": "tool_use", "id": call["id"], "name": call["name"], "input": json.loads(call["arguments"])}
        for call in ([forced] if forced else _calls(seen, reply))
    ]
    answer: dict[str, Any] = {
        "id": f"msg_{seen.index}",
        "type": "message",
        "role": "assistant",
        "model": reply["model"] or seen.model,
        "content": content,
        "stop_reason": "tool_use" if forced else _stop(reply, _ANTHROPIC_STOPS),
        "stop_sequence": None,
        **reply["extra"],
    }
    if not reply["omit_usage"]:
        answer["usage"] = _anthropic_usage(reply)
    return answer


def anthropic_events(seen: SeenRequest, reply: Json) -> list[bytes]:
    """A Messages answer as SSE, one event per entry; the last is the terminal one."""

    def event(kind: str, **more: Any) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **more}, ensure_ascii=False)}\n\n".encode()

    size = reply["chunk_chars"]
    usage = None if reply["omit_usage"] else _anthropic_usage(reply)
    bare = anthropic_answer(seen, {**reply, "calls": (), "body_text": "", "thinking": ""})
    message: dict[str, Any] = {**bare, "content": [], "stop_reason": None}
    if usage is not None:
        message["usage"] = {**usage, "output_tokens": 1}
    events = [event("message_start", message=message), event("ping")]
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if reply["thinking"]:
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(reply["thinking"], size)]
        deltas.append({"type": "signature_delta", "signature": f"sig-{seen.index}"})
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, deltas))
    forced = _output_call(seen, reply)
    if reply["body_text"] and forced is None:
        deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(reply["body_text"], size)]
        blocks.append(({"type": "text", "text": ""}, deltas))
    for call in [forced] if forced else _calls(seen, reply):
        pieces = ["", *_pieces(call["arguments"], size)]
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        blocks.append(({"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}, deltas))
    for index, (block, deltas) in enumerate(blocks):
        events.append(event("content_block_start", index=index, content_block=block))
        events += [event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(event("content_block_stop", index=index))
    if reply["stream_error"]:
        error = {"type": reply["stream_error"], "message": "scripted error within the stream"}
        return [*events, event("error", error=error)]
    reason = "tool_use" if forced else _stop(reply, _ANTHROPIC_STOPS)
    ending: dict[str, Any] = {"delta": {"stop_reason": reason, "stop_sequence": None}}
    if usage is not None:
        ending["usage"] = {
            "output_tokens": usage["output_tokens"],
            "output_tokens_details": usage["output_tokens_details"],
        }
    return [*events, event("message_delta", **ending), event("message_stop")]


def anthropic_refusal(status: int, message: str, kind: str | None) -> dict[str, Any]:
    """The vendor's error object."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
             404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
             529: "overloaded_error"}  # fmt: skip
    return {"type": "error", "error": {"type": kind or kinds.get(status, "api_error"), "message": message}}


def _openai_usage(reply: Json) -> dict[str, Any]:
    return {
        "prompt_tokens": reply["input_tokens"],
        "completion_tokens": reply["output_tokens"],
        "total_tokens": reply["input_tokens"] + reply["output_tokens"],
        "prompt_tokens_details": {
            "cached_tokens": reply["cache_read_tokens"],
            "cache_write_tokens": reply["cache_write_tokens"],
        },
        "completion_tokens_details": {"reasoning_tokens": reply["reasoning_tokens"]},
    }


def openai_logprobs(seen: SeenRequest, pieces: Sequence[str], first: int = 0) -> dict[str, Any] | None:
    """What a choice says of its tokens, where that was asked for; each piece of the text is a token here."""
    if not seen.body.get("logprobs"):
        return None

    def token(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    told: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces, start=first):
        logprob = -(number + 1) / 8
        others = [token(piece, logprob), *(token(f"other {n}", logprob - n) for n in range(1, 20))]
        told.append({**token(piece, logprob), "top_logprobs": others[: seen.body.get("top_logprobs") or 0]})
    return {"content": told, "refusal": None}


def openai_answer(seen: SeenRequest, reply: Json) -> dict[str, Any]:
    """A whole Chat Completions answer."""
    message: dict[str, Any] = {"role": "assistant", "content": reply["body_text"] or None, "refusal": None}
    if reply["thinking"]:
        message["reasoning_content"] = reply["thinking"]
    calls = _calls(seen, reply)
    if calls:
        message["tool_calls"] = [
            {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
            for c in calls
        ]
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{seen.index}",
        "object": "chat.completion",
        "created": 0,
        "model": reply["model"] or seen.model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": openai_logprobs(seen, _pieces(reply["body_text"], reply["chunk_chars"])),
                "finish_reason": _stop(reply, _OPENAI_STOPS),
            }
        ],
        **reply["extra"],
    }
    if not reply["omit_usage"]:
        answer["usage"] = _openai_usage(reply)
    return answer


def openai_events(seen: SeenRequest, reply: Json) -> list[bytes]:
    """A Chat Completions answer as SSE, one event per entry; the last is `[DONE]`."""

    def chunk(choices: Sequence[Json], **more: Any) -> bytes:
        body = {
            "id": f"chatcmpl-{seen.index}",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": reply["model"] or seen.model,
            "choices": choices,
            **reply["extra"],
            **more,
        }
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()

    def delta(content: Json, finish: str | None = None, logprobs: Json | None = None) -> bytes:
        return chunk([{"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": finish}])

    size = reply["chunk_chars"]
    events = [delta({"role": "assistant", "content": ""})]
    events += [delta({"reasoning_content": piece}) for piece in _pieces(reply["thinking"], size)]
    events += [
        delta({"content": piece}, logprobs=openai_logprobs(seen, [piece], number))
        for number, piece in enumerate(_pieces(reply["body_text"], size))
    ]
    for index, call in enumerate(_calls(seen, reply)):
        function = {"name": call["name"], "arguments": ""}
        events.append(
            delta(
                {"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]}
            )
        )
        events += [
            delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
            for piece in _pieces(call["arguments"], size)
        ]
    if reply["stream_error"]:
        return [*events, chunk([], error={"code": reply["stream_error"], "message": "scripted error"})]
    events.append(delta({}, _stop(reply, _OPENAI_STOPS)))
    options = cast(Json, seen.body.get("stream_options") or {})
    if options.get("include_usage") and not reply["omit_usage"]:
        events.append(chunk([], usage=_openai_usage(reply)))
    return [*events, b"data: [DONE]\n\n"]


def openai_refusal(status: int, message: str, kind: str | None) -> dict[str, Any]:
    """The vendor's error object."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    fallback = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 else None
    return {
        "error": {
            "message": message,
            "type": kind or kinds.get(status, fallback),
            "param": None,
            "code": code,
        }
    }
