"""OpenAI Responses and Embeddings as pure functions, held against the types of the vendor's own SDK."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from agentic_flow.core.errors import (
    AgenticFlowError,
    InvalidInput,
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    RateLimited,
)
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Message,
    Part,
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
from agentic_flow.gateway.front.format import Call
from agentic_flow.gateway.front.openai_embeddings import INPUT_CHARS_MAX, decode_embeddings
from agentic_flow.gateway.front.openai_responses import decode_responses
from agentic_flow.gateway.front.openai_responses_answers import ResponseStream, encode_response
from agentic_flow.gateway.wire.anthropic import AnthropicFormat
from agentic_flow.gateway.wire.format import WireFormat
from agentic_flow.gateway.wire.openai import OpenAIFormat
from agentic_flow.gateway.wire.responses_passing import EmbeddingsPassing, ResponsesPassing, reader_of
from agentic_flow.gateway.wire.sse import SseParser
from agentic_flow.testing.fake_provider import Reply
from agentic_flow.testing.fake_wires import SeenRequest, anthropic_events, openai_events

WIRES: dict[str, WireFormat] = {"anthropic": AnthropicFormat(), "openai": OpenAIFormat()}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look_up",
    "parameters": {"type": "object"},
    "strict": None,
}
MINIMAL: dict[str, Any] = {"model": "m", "input": "hi"}
USER = Message(role="user", parts=(TextPart(text="hi"),))

texts = st.text(min_size=1, max_size=12)
arguments = st.dictionaries(
    st.text(max_size=4), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6), max_size=3
)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    """Answers as providers give them: thinking with and without signatures, text, then calls."""
    parts: list[Part] = []
    if draw(st.booleans()):
        parts.append(ThinkingPart(text=draw(texts), signature=draw(st.none() | st.just("c2ln"))))
    if draw(st.booleans()):
        parts.append(ThinkingPart(text="", signature="redacted:" + draw(texts)))
    if draw(st.booleans()):
        parts.append(TextPart(text=draw(texts)))
    calls = draw(st.lists(arguments, max_size=3))
    parts += [ToolCallPart(id=f"c{n}", name="look_up", arguments=a) for n, a in enumerate(calls)]
    read, out = draw(st.integers(0, 50)), draw(st.integers(0, 99))
    usage = Usage(
        input_tokens=read + draw(st.integers(0, 99)),
        output_tokens=out,
        cache_read_tokens=read,
        reasoning_tokens=draw(st.integers(0, out)),
        cost_usd=None,
    )
    stop: Any = (
        "tool_calls" if calls else draw(st.sampled_from(["end", "length", "refusal", "stop_sequence"]))
    )
    return Completion(model="m", provider="x", parts=tuple(parts), stop_reason=stop, usage=usage)


def pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def events_of(completion: Completion, size: int) -> list[StreamEvent]:
    """The answer as a stream of pieces of `size` characters; signatures come with the end."""
    events: list[StreamEvent] = []
    index = 0
    for part in completion.parts:
        match part:
            case ThinkingPart():
                events += [ThinkingDelta(text=piece) for piece in pieces(part.text, size)]
            case TextPart():
                events += [TextDelta(text=piece) for piece in pieces(part.text, size)]
            case ToolCallPart():
                text = orjson.dumps(part.arguments).decode() if part.arguments else ""
                events.append(ToolCallDelta(index=index, id=part.id, name=part.name))
                events += [ToolCallDelta(index=index, arguments_json=piece) for piece in pieces(text, size)]
                index += 1
            case _:
                raise AssertionError(part)
    return [*events, StreamEnd(completion=completion)]


def encoder() -> ResponseStream:
    return ResponseStream("m", answer_id="resp_1", created_s=7, echo=decode_responses(MINIMAL).echo)


def streamed(completion: Completion, size: int) -> bytes:
    stream = encoder()
    return b"".join(stream.take(event) for event in events_of(completion, size))


def whole_of(completion: Completion) -> dict[str, Any]:
    echo = decode_responses(MINIMAL).echo
    return json.loads(encode_response(completion, answer_id="resp_1", created_s=7, echo=echo))


def read_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each checked by the SDK's own type and named by its SSE event."""
    events = []
    for sent in SseParser().feed(body):
        event = json.loads(sent.data)
        assert sent.event == event["type"]
        checked = EVENT.validate_json(sent.data, strict=True)
        assert type(checked).model_fields["type"].annotation.__args__ == (event["type"],)
        events.append(event)
    return events


def bare(item: dict[str, Any]) -> dict[str, Any]:
    """An item for comparison: the stream may number the items that nobody was shown differently."""
    kept = {key: value for key, value in item.items() if key != "id"}
    if "arguments" in kept:
        kept["arguments"] = json.loads(kept["arguments"])
    return kept


# Answers


@given(completion=completions(), size=st.integers(1, 9))
@example(
    completion=Completion(
        model="m",
        provider="x",
        parts=(ThinkingPart(text="", signature="redacted:0"), TextPart(text="cut")),
        stop_reason="length",
        usage=Usage(cost_usd=None),
    ),
    size=1,
)
def test_answers_and_events_are_the_sdks_and_agree(completion: Completion, size: int) -> None:
    """Catches objects the SDK's types refuse, events out of order, and a stream that says another answer."""
    whole = whole_of(completion)
    Response.model_validate_json(json.dumps(whole), strict=True)
    events = read_events(streamed(completion, size))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    ended = last["response"]
    unlike = ("output",)
    assert {k: v for k, v in ended.items() if k not in unlike} == {
        k: v for k, v in whole.items() if k not in unlike
    }
    # What a provider hid comes at a stream's end, joined to the thinking that it showed, if any.
    seen = [bare(item) for item in ended["output"] if item["type"] != "reasoning"]
    assert seen == [bare(item) for item in whole["output"] if item["type"] != "reasoning"]
    _follow(events, ended["output"])


def _follow(events: list[dict[str, Any]], output: list[dict[str, Any]]) -> None:
    """The pieces of each item must add up to what its ends say, and every item must end once."""
    built: dict[int, str] = {}
    done: dict[int, dict[str, Any]] = {}
    for event in events:
        at = event.get("output_index")
        match event["type"]:
            case "response.output_item.added":
                assert at == len(built)
                built[at] = ""
            case kind if kind.endswith(".delta"):
                assert at not in done
                built[at] += event["delta"]
            case "response.output_text.done" | "response.reasoning_summary_text.done":
                assert built[at] == event["text"]
            case "response.function_call_arguments.done":
                assert built[at] == event["arguments"]
            case "response.output_item.done":
                assert at not in done
                done[at] = event["item"]
            case _:
                pass
    assert [done[at] for at in sorted(done)] == output


@given(completion=completions(), size=st.integers(1, 9))
def test_the_sdk_assembles_the_stream(completion: Completion, size: int) -> None:
    """Catches a stream that the SDK's own assembly refuses, or from which it makes another answer."""
    state: Any = ResponseStreamState(text_format=omit, input_tools=omit)
    for event in read_events(streamed(completion, size)):
        state.handle_event(EVENT.validate_python(event))
    final = state._completed_response
    if completion.stop_reason in ("length", "refusal"):
        assert final is None
        return
    assert final.output_text == completion.text
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(c.call_id, json.loads(c.arguments)) for c in calls] == [
        (c.id, c.arguments) for c in completion.tool_calls
    ]


@pytest.mark.parametrize("stream", [False, True])
@given(completion=completions(), size=st.integers(1, 9))
@example(
    completion=Completion(
        model="m",
        provider="x",
        parts=(
            ThinkingPart(text="ab", signature="s1"),
            ThinkingPart(text="", signature="redacted:x"),
            ThinkingPart(text="cd", signature="s2"),
            TextPart(text="t"),
            ToolCallPart(id="c0", name="look_up", arguments={}),
        ),
        stop_reason="tool_calls",
        usage=Usage(cost_usd=None),
    ),
    size=1,
)
def test_an_answer_comes_back_as_it_was(stream: bool, completion: Completion, size: int) -> None:
    """Catches thinking, signatures, text or calls that change when a client sends an answer's items back."""
    if stream:
        output = read_events(streamed(completion, size))[-1]["response"]["output"]
    else:
        output = whole_of(completion)["output"]
    results = [
        {"type": "function_call_output", "call_id": call.id, "output": f"r{call.id}"}
        for call in completion.tool_calls
    ]
    more = [{"role": "user", "content": "go on"}]
    sent = {**MINIMAL, "input": [{"role": "user", "content": "hi"}, *output, *results, *more]}
    messages = decode_responses(sent).request.messages
    expected = [USER]
    if completion.parts:
        expected.append(Message(role="assistant", parts=completion.parts))
    if results:
        answered = tuple(
            ToolResultPart(id=c.id, name=c.name, content=f"r{c.id}") for c in completion.tool_calls
        )
        expected.append(Message(role="user", parts=answered))
    expected.append(Message(role="user", parts=(TextPart(text="go on"),)))
    assert list(messages) == expected


@pytest.mark.parametrize("back", WIRES)
def test_tool_arguments_survive_every_split(back: str) -> None:
    """Catches arguments that change when the provider's stream is cut at any byte, within a character too."""
    calls = [
        {"name": "look_up", "arguments": {"q": 'Zürich "a\\b" 🙂\n'}},
        {"name": "look_up", "arguments": {}},
        {"name": "look_up", "arguments": {"n": [1, {"deep": None}]}},
    ]
    reply = asdict(Reply.tool_calls(calls, body_text="ü", chunk_chars=2))
    spec = ToolSpec(name="look_up", description="", input_schema={"type": "object"})
    request = CompletionRequest(model="m", messages=(USER,), tools=(spec,))
    sent = WIRES[back].encode(request, stream=True)
    seen = SeenRequest.parse(back, sent.path, {}, sent.body, index=0)  # type: ignore[arg-type]
    body = b"".join((anthropic_events if back == "anthropic" else openai_events)(seen, reply))
    for size in (1, 2, 3, 5, 7, 64, 997):
        decoder, stream = WIRES[back].decoder(request), encoder()
        events = [e for at in range(0, len(body), size) for e in decoder.feed(body[at : at + size])]
        answer = b"".join(stream.take(event) for event in [*events, decoder.end()])
        reader = ResponsesPassing("x", {})
        cut = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert b"".join(reader.feed(piece) for piece in cut) == answer
        assert reader.done
        output = read_events(answer)[-1]["response"]["output"]
        found = [json.loads(item["arguments"]) for item in output if item["type"] == "function_call"]
        assert found == [call["arguments"] for call in calls], size


@given(order=st.permutations([0, 0, 0, 1, 1, 1, 2, 2]), data=st.data())
def test_calls_that_arrive_interleaved_stay_apart(order: list[int], data: st.DataObject) -> None:
    """Catches arguments given to the wrong call when a provider mixes its calls."""
    values: list[dict[str, Any]] = [{"a": "first"}, {"b": 2, "c": [3]}, {"d": None}]
    left: dict[int, list[str]] = {}
    for index, value in enumerate(values):
        text, times = orjson.dumps(value).decode(), order.count(index)
        cuts = sorted(data.draw(st.integers(1, len(text) - 1)) for _ in range(times - 1))
        left[index] = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts = tuple(ToolCallPart(id=f"c{n}", name="look_up", arguments=v) for n, v in enumerate(values))
    stream, begun, body = encoder(), set[int](), b""
    for index in order:
        first = index not in begun
        begun.add(index)
        body += stream.take(
            ToolCallDelta(
                index=index,
                id=f"c{index}" if first else None,
                name="look_up" if first else None,
                arguments_json=left[index].pop(0),
            )
        )
    end = Completion(
        model="m", provider="x", parts=parts, stop_reason="tool_calls", usage=Usage(cost_usd=None)
    )
    events = read_events(body + stream.take(StreamEnd(completion=end)))
    output = events[-1]["response"]["output"]
    assert {i["call_id"]: json.loads(i["arguments"]) for i in output} == {c.id: c.arguments for c in parts}
    _follow(events, output)


@pytest.mark.parametrize("error", [ProviderFailed("it broke"), RateLimited("slow down")])
@given(completion=completions(), size=st.integers(1, 9), data=st.data())
def test_a_stream_that_breaks_ends_with_its_error(
    error: AgenticFlowError, completion: Completion, size: int, data: st.DataObject
) -> None:
    """Catches half an answer that ends like a whole one, and last words that the SDK cannot read."""
    sent = events_of(completion, size)
    stream = encoder()
    cut = data.draw(st.integers(0, len(sent) - 1))
    body = b"".join(stream.take(event) for event in sent[:cut]) + stream.fail(error)
    events = read_events(body)
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "error"
    assert ("response.failed" in kinds) == (cut > 0)
    assert not {"response.completed", "response.incomplete"} & set(kinds)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert error.message in events[-1]["message"]
    reader = ResponsesPassing("x", {})
    reader.feed(body)
    assert not reader.done
    assert isinstance(reader.error, ProviderOverloaded if isinstance(error, RateLimited) else ProviderFailed)


# Requests


def test_a_request_of_every_kind_of_item_is_read() -> None:
    """Catches a field that is read as something else."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    pixel = {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"}
    body = {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}, pixel]},
            {"role": "assistant", "content": "well"},
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "c",
                "name": "look_up",
                "arguments": '{"q":1}',
            },
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "look_up"},
        "parallel_tool_calls": False,
        "max_output_tokens": 7,
        "temperature": 0.5,
        "top_p": 1,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        "reasoning": {"effort": "high", "summary": "auto"},
        "safety_identifier": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "truncation": "disabled",
        "background": False,
        "previous_response_id": None,
    }
    call = decode_responses(body)
    request = call.request
    assert [m.role for m in request.messages] == ["system", "system", "user", "assistant", "user"]
    assert [len(m.parts) for m in request.messages] == [1, 1, 2, 2, 1]
    assert request.messages[3].parts[1] == ToolCallPart(id="c", name="look_up", arguments={"q": 1})
    assert request.messages[4].parts == (ToolResultPart(id="c", name="look_up", content="a\nb"),)
    assert (request.tool_choice, request.parallel_tool_calls, request.output_tokens_max) == (
        "look_up",
        False,
        7,
    )
    assert (request.temperature, request.top_p, request.output_schema) == (0.5, 1, schema)
    assert (request.reasoning_effort, request.end_user, request.stream) == ("high", "someone", True)
    assert call.echo is not None
    done = Completion(model="m", provider="x", parts=(), stop_reason="end", usage=Usage(cost_usd=None))
    shown = json.loads(encode_response(done, answer_id="resp_1", created_s=7, echo=call.echo))
    Response.model_validate_json(json.dumps(shown), strict=True)
    for name in ("instructions", "tools", "tool_choice", "parallel_tool_calls", "metadata", "temperature"):
        assert shown[name] == body[name]
    assert shown["store"] is False
    assert shown["text"]["format"]["schema"] == schema


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "y"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.results"]}, "include.0"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"reasoning": {"effort": "loads"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": "a", "safety_identifier": "b"}, "user"),
    ({"not_known_yet": 1}, "not_known_yet"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "assistant", "content": "x"}]}, "input.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, "input.0.phase"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input.0.call_id"),
    (
        {"input": [{"type": "reasoning", "id": "x", "summary": [], "encrypted_content": "gAAAA"}]},
        "input.0.encrypted_content",
    ),
    (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "agentic-flow:[[1]]"}]},
        "input.0.encrypted_content",
    ),
    (
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "data:x", "detail": "auto"}],
                }
            ]
        },
        "input.0.content.0.image_url",
    ),
]


@pytest.mark.parametrize(("more", "field"), REFUSED)
def test_what_cannot_be_translated_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    """Catches a setting that is dropped without a word."""
    with pytest.raises(InvalidInput) as caught:
        decode_responses({**MINIMAL, **more})
    assert caught.value.details["field"] == field
    assert caught.value.hint


FIELDS = st.sampled_from(
    "input model instructions tools tool_choice parallel_tool_calls max_output_tokens temperature text "
    "reasoning user metadata store include stream stream_options truncation background conversation".split()
)
INNER = st.sampled_from(
    "type role content text id call_id name arguments output summary encrypted_content status message "
    "function_call function_call_output reasoning input_text output_text input_image image_url detail user "
    "assistant system function parameters format json_schema schema effort agentic-flow:[] {} auto".split()
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | INNER,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(INNER | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=16,
)
items = st.lists(
    st.dictionaries(INNER, values, max_size=4).flatmap(
        lambda item: st.sampled_from(
            ["message", "function_call", "function_call_output", "reasoning", "other"]
        ).map(lambda kind: {**item, "type": kind})
    ),
    max_size=3,
)


@given(body=st.dictionaries(FIELDS, values, max_size=5), given_input=st.none() | items)
def test_arbitrary_requests_are_read_or_refused(body: dict[str, Any], given_input: Any) -> None:
    """Catches a request that ends in a bug of ours instead of a typed refusal."""
    sent = {**MINIMAL, **body, **({} if given_input is None else {"input": given_input})}
    try:
        call = decode_responses(sent)
    except InvalidInput as refused:
        named = refused.details["field"]
    else:
        named = _answerable(call)
    assert named


def _answerable(call: Call) -> bytes:
    done = Completion(model="m", provider="x", parts=(), stop_reason="end", usage=Usage())
    return encode_response(done, answer_id="resp_1", created_s=7, echo=call.echo)


# What is read while bytes pass


@given(completion=completions(), size=st.integers(1, 40), stream=st.booleans())
def test_the_books_read_what_passes(completion: Completion, size: int, stream: bool) -> None:
    """Catches an answer that passes unrecorded, or with other tokens than were billed."""
    reader = reader_of("/responses?x=1", "x", {"input": "hi"})
    assert reader is not None
    if stream:
        body = streamed(completion, 4)
        cut = [body[at : at + size] for at in range(0, len(body), size)]
        assert b"".join(reader.feed(piece) for piece in cut) + reader.finish() == body
    else:
        reader.take_answer(whole_of(completion))
    usage, estimated = reader.billed()
    assert (usage, estimated) == (completion.usage, False)
    assert reader.model == "m"
    stop = "end" if completion.stop_reason == "stop_sequence" else completion.stop_reason
    assert reader.stop_reason == stop


def test_a_passing_stream_cut_anywhere_is_not_complete() -> None:
    """Catches half an answer in the books as a whole one, and one without usage as free."""
    parts = (TextPart(text="four words are here"),)
    end = Completion(model="m", provider="x", parts=parts, stop_reason="end", usage=Usage(cost_usd=None))
    body = streamed(end, 4)
    for at in range(len(body) - 2):
        reader = ResponsesPassing("x", {})
        reader.feed(body[:at])
        with pytest.raises(ProviderProtocol):
            reader.finish()
    bare_events = [e for e in read_events(body) if e["type"] != "response.completed"]
    last = {"type": "response.completed", "response": {"status": "completed", "output": [], "usage": None}}
    reader = ResponsesPassing("x", {"instructions": "x" * 20, "input": "y" * 20})
    for event in [*bare_events, last]:
        reader.feed(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    usage, estimated = reader.billed()
    assert estimated
    assert (usage.input_tokens, usage.output_tokens) == (10, 5)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"error": {"code": "rate_limit_exceeded", "message": "x"}}, ProviderOverloaded),
        ({"error": {"code": "invalid_prompt", "message": "x"}}, ProviderRejected),
        ({"error": {"code": "server_error", "message": "x"}}, ProviderFailed),
        ({"status": "completed"}, ProviderProtocol),
        ({"status": "queued", "output": []}, ProviderProtocol),
    ],
)
def test_what_is_no_answer_is_not_passed_as_one(answer: dict[str, Any], kind: type[ProviderError]) -> None:
    """Catches a failure inside a 200 that is priced and recorded as an answer."""
    with pytest.raises(kind):
        ResponsesPassing("x", {}).take_answer(answer)


@pytest.mark.parametrize(
    ("given_input", "wanted"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2)]
)
def test_embeddings_that_pass_are_counted(given_input: Any, wanted: int) -> None:
    """Catches vectors that are missing, and tokens that nobody counts."""
    data = [{"index": n, "embedding": "AAAA"} for n in range(wanted)]
    answer = {"data": data, "model": "e", "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    reader = EmbeddingsPassing("x", {"input": given_input})
    reader.take_answer(answer)
    assert reader.billed() == (Usage(input_tokens=9, cost_usd=None), False)
    with pytest.raises(ProviderProtocol):
        EmbeddingsPassing("x", {"input": given_input}).take_answer({**answer, "data": data[1:]})


# Embeddings


class Letters:
    """An embedder that counts letters."""

    id = "letters-1-4"
    dimension = 4
    semantic = False

    async def embed(self, given_texts: Any, *, kind: str = "document") -> Any:
        return np.array([[text.count(c) for c in "abcd"] for text in given_texts], dtype=np.float32)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"input": [1, 2]}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", 1]}, "input.1"),
        ({"input": "x" * (INPUT_CHARS_MAX + 1)}, "input"),
        ({"input": ["x" * INPUT_CHARS_MAX] * 40}, "input.31"),
        ({"dimensions": 3}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"not_known_yet": 1}, "not_known_yet"),
    ],
)
def test_embeddings_refuse_by_name(more: dict[str, Any], field: str) -> None:
    """Catches vectors of something that was not asked, or of another size."""
    with pytest.raises(InvalidInput) as caught:
        decode_embeddings({"model": "local", "input": "a", **more}, Letters())
    assert caught.value.details["field"] == field


@given(
    body=st.dictionaries(
        st.sampled_from("model input dimensions encoding_format user other".split()), values, max_size=5
    )
)
def test_arbitrary_embedding_requests_are_read_or_refused(body: dict[str, Any]) -> None:
    """Catches a request that ends in a bug of ours instead of a typed refusal."""
    try:
        call = decode_embeddings({"model": "local", "input": "a", **body}, Letters())
    except InvalidInput as refused:
        good = bool(refused.details["field"])
    else:
        good = all(call.texts)
    assert good
