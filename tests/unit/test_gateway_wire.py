"""Wire formats as pure functions: splits of the byte stream, round trips, truncation, odd servers."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import (
    InvalidInput,
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
)
from agentic_flow.core.messages import (
    CompletionRequest,
    ImagePart,
    Message,
    StreamEnd,
    StreamEvent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.gateway.wire.anthropic import AnthropicFormat
from agentic_flow.gateway.wire.format import WireFormat
from agentic_flow.gateway.wire.openai import (
    COMPATIBLE,
    OPENAI,
    OPENROUTER,
    OpenAIFormat,
    ask_usage,
    wants_usage,
)
from agentic_flow.gateway.wire.sse import SseEvent, SseParser, encode_event
from agentic_flow.testing.fake_provider import Reply
from agentic_flow.testing.fake_wires import (
    SeenRequest,
    anthropic_answer,
    anthropic_events,
    check_anthropic,
    check_openai,
    openai_answer,
    openai_events,
)

FORMATS: dict[str, WireFormat] = {"anthropic": AnthropicFormat(), "openai": OpenAIFormat()}
TOOL = ToolSpec(
    name="look_up",
    description="Look something up.",
    input_schema={"type": "object", "properties": {"q": {"type": "string"}}},
)


def request_of(*messages: Message, **more: Any) -> CompletionRequest:
    given_messages = messages or (Message(role="user", parts=(TextPart(text="hi"),)),)
    return CompletionRequest(model="m", messages=given_messages, **more)


def seen_of(wire: str, request: CompletionRequest, *, stream: bool = False) -> SeenRequest:
    sent = FORMATS[wire].encode(request, stream=stream)
    headers = {**sent.headers, "x-api-key": "k", "authorization": "Bearer k"}
    return SeenRequest.parse(wire, sent.path, headers, sent.body, index=0)  # type: ignore[arg-type]


def stream_bytes(wire: str, request: CompletionRequest, reply: Reply) -> bytes:
    make = anthropic_events if wire == "anthropic" else openai_events
    return b"".join(make(seen_of(wire, request, stream=True), asdict(reply)))


def decode_stream(wire: str, request: CompletionRequest, chunks: list[bytes]) -> list[StreamEvent]:
    decoder = FORMATS[wire].decoder(request)
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return [*events, decoder.end()]


# Server-sent events

lines = st.text(alphabet=st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(
    st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r", "\r\n"]),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
)
def test_sse_survives_any_split(events: list[list[str]], end: str, cuts: list[int], bom: bool) -> None:
    """Catches events lost or doubled when CR, LF, CRLF, UTF-8 or the BOM is cut by the network."""
    text = "".join(
        f": ping{end}event: e{end}" + "".join(f"data: {line}{end}" for line in data) + end for data in events
    )
    body = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    expected = [SseEvent("e", "\n".join(data).encode()) for data in events]
    parser = SseParser()
    points = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    found = [e for a, b in itertools.pairwise(points) for e in parser.feed(body[a:b])]
    assert found == expected
    assert parser.flush() == []


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([b"data: a\n", b"data:b\n", b"data: \n", b"event: e\n", b": c\n", b"\n", b"\r\n"])
    )
)
def test_sse_reads_whole_events_as_it_reads_bytes(lines: list[bytes]) -> None:
    """Catches the short way for events that come whole seeing others than the long one does."""
    body = b"".join(lines)
    parsers = SseParser(), SseParser(), SseParser()
    by_byte = [event for i in range(len(body)) for event in parsers[0].feed(body[i : i + 1])]
    by_line = [event for line in lines for event in parsers[1].feed(line)]
    assert parsers[2].feed(body) == by_line == by_byte
    assert parsers[2].flush() == parsers[1].flush() == parsers[0].flush()


def test_sse_reads_byte_by_byte_and_ends_without_a_blank_line() -> None:
    """Catches a last event that is dropped because the server did not close it."""
    parser = SseParser()
    body = b"data:no space\ndata\ndata: x\r\n\r\n\r\n:comment\nid: 1\nretry: 5\ndata: last"
    found = [event for i in range(len(body)) for event in parser.feed(body[i : i + 1])]
    assert found == [SseEvent("message", b"no space\n\nx")]
    assert parser.flush() == [SseEvent("message", b"last")]


@settings(deadline=None)
@given(st.binary(max_size=60).filter(lambda data: b"\r" not in data))
def test_sse_encoder_and_parser_agree(data: bytes) -> None:
    """Catches data with line ends that does not come back."""
    assert SseParser().feed(encode_event(data, event="k")) == [SseEvent("k", data)]


# Streams of the providers

REPLY = Reply.tool_calls(
    [
        {"name": "look_up", "arguments": {"q": 'ü "quoted" \\ 🎻\n', "deep": {"a": [1, None, True]}}},
        {"name": "look_up", "arguments": {}},
    ],
    body_text="Some text, ünïcode 🎻",
    thinking="hmm, let me think",
    chunk_chars=5,
)


@pytest.mark.parametrize("wire", FORMATS)
def test_every_cut_of_a_stream_gives_the_same_answer(wire: str) -> None:
    """Catches tool arguments damaged when the upstream splits its events at any byte boundary."""
    request = request_of(tools=(TOOL,))
    body = stream_bytes(wire, request, REPLY)
    whole = decode_stream(wire, request, [body])
    end = whole[-1]
    assert isinstance(end, StreamEnd)
    assert [call.arguments for call in end.completion.tool_calls] == [
        dict(call["arguments"]) for call in REPLY.calls
    ]
    for cut in range(1, len(body)):
        assert decode_stream(wire, request, [body[:cut], body[cut:]]) == whole
    assert decode_stream(wire, request, [body[i : i + 1] for i in range(len(body))]) == whole


@pytest.mark.parametrize("wire", FORMATS)
def test_every_truncation_is_noticed(wire: str) -> None:
    """Catches a truncated stream that passes for complete."""
    request = request_of(tools=(TOOL,))
    body = stream_bytes(wire, request, REPLY)
    terminal = b"event: message_stop" if wire == "anthropic" else b"data: [DONE]"
    last = body.rindex(terminal)
    for cut in range(last):
        with pytest.raises(ProviderProtocol):
            decode_stream(wire, request, [body[:cut]])


@pytest.mark.parametrize("wire", FORMATS)
@settings(deadline=None)
@given(
    text=st.text(max_size=40),
    thinking=st.text(max_size=20),
    arguments=st.lists(
        st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=9), max_size=3), max_size=3
    ),
    size=st.integers(1, 9),
)
def test_json_and_stream_say_the_same(
    wire: str, text: str, thinking: str, arguments: list[dict[str, Any]], size: int
) -> None:
    """Catches the two forms of one answer drifting apart."""
    request = request_of(tools=(TOOL,))
    calls = [{"name": "look_up", "arguments": given} for given in arguments]
    reply = Reply.tool_calls(calls, body_text=text, thinking=thinking, chunk_chars=size)
    make = anthropic_answer if wire == "anthropic" else openai_answer
    answer = orjson.dumps(make(seen_of(wire, request), asdict(reply)))
    decoded = FORMATS[wire].decode(request, answer)
    streamed = decode_stream(wire, request, [stream_bytes(wire, request, reply)])[-1]
    assert isinstance(streamed, StreamEnd)
    assert streamed.completion == decoded.completion
    assert decoded.completion.text == text
    assert [call.arguments for call in decoded.completion.tool_calls] == arguments
    assert not decoded.usage_estimated


# Requests

texts = st.text(min_size=1, max_size=10)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Conversations that any provider must accept: turns alternate and every call gets its result."""
    messages = [Message(role="system", parts=(TextPart(text=draw(texts)),))] if draw(st.booleans()) else []
    messages.append(Message(role="user", parts=(TextPart(text=draw(texts)),)))
    for turn in range(draw(st.integers(0, 3))):
        count = draw(st.integers(0, 3))
        calls = tuple(
            ToolCallPart(id=f"c{turn}_{n}", name="look_up", arguments={"q": draw(texts)})
            for n in range(count)
        )
        said = (TextPart(text=draw(texts)),) if draw(st.booleans()) or not calls else ()
        messages.append(Message(role="assistant", parts=(*said, *calls)))
        results = tuple(
            ToolResultPart(id=call.id, name=call.name, content=draw(texts), is_error=draw(st.booleans()))
            for call in calls
        )
        more = (TextPart(text=draw(texts)),) if draw(st.booleans()) or not results else ()
        picture = (ImagePart(media_type="image/png", data="aGk="),) if draw(st.booleans()) else ()
        messages.append(Message(role="user", parts=(*more, *results, *picture)))
    return tuple(messages)


@settings(deadline=None)
@given(conversations(), st.booleans(), st.sampled_from(["auto", "none", "required", "look_up"]))
def test_conversations_obey_the_vendors_rules(
    messages: tuple[Message, ...], stream: bool, choice: str
) -> None:
    """Catches encodings that a vendor would answer with 400."""
    request = request_of(*messages, tools=(TOOL,), tool_choice=choice, stop=("END",), top_p=0.5)
    assert check_anthropic(seen_of("anthropic", request, stream=stream)) is None
    assert check_openai(seen_of("openai", request, stream=stream)) is None


def test_anthropic_thinking_comes_back_signed() -> None:
    """Catches a signature lost on the way, with which the vendor refuses the next turn."""
    request = request_of()
    body = stream_bytes("anthropic", request, REPLY.but(calls=()))
    end = decode_stream("anthropic", request, [body])[-1]
    assert isinstance(end, StreamEnd)
    assert end.completion.parts[0] == ThinkingPart(text="hmm, let me think", signature="sig-0")
    redacted = {
        "type": "message",
        "content": [{"type": "redacted_thinking", "data": "abc"}, {"type": "text", "text": "x"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    decoded = FORMATS["anthropic"].decode(request, orjson.dumps(redacted)).completion
    history = (
        *request.messages,
        Message(role="assistant", parts=(*end.completion.parts, *decoded.parts)),
        Message(role="user", parts=(TextPart(text="go on"),)),
    )
    blocks = orjson.loads(FORMATS["anthropic"].encode(request_of(*history), stream=False).body)["messages"][1]
    assert blocks["content"][0] == {
        "type": "thinking",
        "thinking": "hmm, let me think",
        "signature": "sig-0",
    }
    assert {"type": "redacted_thinking", "data": "abc"} in blocks["content"]


def test_what_cannot_be_said_is_refused_by_name() -> None:
    """Catches settings that are dropped silently."""
    with pytest.raises(InvalidInput, match="seed 7"):
        FORMATS["anthropic"].encode(request_of(seed=7), stream=False)
    with pytest.raises(InvalidInput, match="names no tool"):
        FORMATS["openai"].encode(request_of(tools=(TOOL,), tool_choice="other"), stream=False)
    misplaced = Message(role="user", parts=(ToolCallPart(id="1", name="x", arguments={}),))
    for wire in FORMATS.values():
        with pytest.raises(InvalidInput, match="tool_call"):
            wire.encode(request_of(misplaced), stream=False)
        picture = Message(role="user", parts=(ImagePart(media_type="image/png"),))
        with pytest.raises(InvalidInput, match="either data or url"):
            wire.encode(request_of(picture), stream=False)


def test_dialects_name_the_output_limit_their_way() -> None:
    """Catches `max_tokens` sent to OpenAI's reasoning models, and the new name sent to older servers."""
    official = orjson.loads(OpenAIFormat(OPENAI).encode(request_of(), stream=True).body)
    assert official["max_completion_tokens"] == 4096
    assert official["stream_options"] == {"include_usage": True}
    other = orjson.loads(OpenAIFormat(COMPATIBLE).encode(request_of(), stream=False).body)
    assert other["max_tokens"] == 4096
    assert "stream_options" not in other


# Answers of imperfect servers


def openai_message(**message: Any) -> bytes:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return orjson.dumps({"model": "m", "choices": [choice]})


def test_compatible_servers_with_odd_tool_calls() -> None:
    """Catches refusing what Ollama and others send: object arguments, no ids, finish_reason stop."""
    calls = [{"function": {"name": "look_up", "arguments": {"q": "x"}}}, {"function": {"name": "look_up"}}]
    answer = FORMATS["openai"].decode(request_of(tools=(TOOL,)), openai_message(tool_calls=calls))
    assert answer.usage_estimated
    assert answer.completion.stop_reason == "tool_calls"
    assert [call.arguments for call in answer.completion.tool_calls] == [{"q": "x"}, {}]
    assert len({call.id for call in answer.completion.tool_calls}) == 2
    assert answer.completion.usage.input_tokens > 0
    assert answer.completion.usage.cost_usd is None


def test_parallel_calls_that_share_an_index_stay_apart() -> None:
    """Catches arguments of two calls glued together when a server numbers them all 0."""
    events = b""
    for call_id, text in (("a", '{"q": 1}'), ("b", '{"q": 2}')):
        call = {"index": 0, "id": call_id, "function": {"name": "look_up", "arguments": text}}
        events += encode_event(orjson.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}))
    events += encode_event(orjson.dumps({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}))
    end = decode_stream("openai", request_of(tools=(TOOL,)), [events + b"data: [DONE]\n\n"])[-1]
    assert isinstance(end, StreamEnd)
    assert [(call.id, call.arguments) for call in end.completion.tool_calls] == [
        ("a", {"q": 1}),
        ("b", {"q": 2}),
    ]


@pytest.mark.parametrize("arguments", ['"text"', "[1]", "{broken", "null"])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    """Catches a tool called with something that is not an object."""
    calls = [{"id": "1", "function": {"name": "look_up", "arguments": arguments}}]
    with pytest.raises(ProviderProtocol, match="look_up"):
        FORMATS["openai"].decode(request_of(tools=(TOOL,)), openai_message(tool_calls=calls))


def test_arguments_cut_by_the_limit_are_not_retried() -> None:
    """Catches paying for the same cut answer again and again."""
    call = {"id": "1", "function": {"name": "look_up", "arguments": '{"q": "unfini'}}
    body = {"choices": [{"message": {"tool_calls": [call]}, "finish_reason": "length"}]}
    with pytest.raises(ProviderRejected, match="4096 output tokens"):
        FORMATS["openai"].decode(request_of(tools=(TOOL,)), orjson.dumps(body))


@pytest.mark.parametrize(
    ("wire", "event", "kind"),
    [
        ("anthropic", {"type": "error", "error": {"type": "overloaded_error"}}, ProviderOverloaded),
        ("anthropic", {"type": "error", "error": {"type": "api_error"}}, ProviderFailed),
        ("anthropic", {"type": "error", "error": {"type": "invalid_request_error"}}, ProviderRejected),
        ("openai", {"error": {"code": 429, "message": "slow"}}, ProviderOverloaded),
        ("openai", {"error": {"code": 502, "message": "bad gateway"}}, ProviderFailed),
        ("openai", {"error": {"code": 400, "message": "no"}}, ProviderRejected),
        ("openai", {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}, ProviderProtocol),
        ("anthropic", {"type": "content_block_delta", "index": 0, "delta": {}}, ProviderProtocol),
    ],
)
def test_errors_within_a_stream(wire: str, event: dict[str, Any], kind: type[ProviderError]) -> None:
    """Catches an error event that is skipped, so that half an answer passes for one."""
    with pytest.raises(kind) as caught:
        decode_stream(wire, request_of(), [encode_event(orjson.dumps(event))])
    assert type(caught.value) is kind


@pytest.mark.parametrize("wire", FORMATS)
@settings(deadline=None)
@given(st.binary(max_size=80))
def test_garbage_never_raises_anything_else(wire: str, body: bytes) -> None:
    """Catches a decoder that dies of a KeyError on what is no answer at all."""
    with pytest.raises(ProviderError):
        FORMATS[wire].decode(request_of(), body)
    with pytest.raises(ProviderError):
        decode_stream(wire, request_of(), [body, b"\n\n"])


def test_openrouter_reports_its_own_price() -> None:
    """Catches a list price where the billed one is known, and a foreign `cost` field taken for dollars."""
    body = orjson.loads(openai_message(content="x"))
    body["usage"] = {"prompt_tokens": 5, "completion_tokens": 1, "cost": 0.25}
    routed = OpenAIFormat(OPENROUTER, provider="openrouter").decode(request_of(), orjson.dumps(body))
    assert routed.completion.usage.cost_usd == 0.25
    assert FORMATS["openai"].decode(request_of(), orjson.dumps(body)).completion.usage.cost_usd is None


@given(
    model=st.text(max_size=8),
    more=st.dictionaries(
        st.text(max_size=4),
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4),  # as JSON is read throughout
        max_size=3,
    ),
    options=st.none()
    | st.dictionaries(st.sampled_from(["include_usage", "include_obfuscation"]), st.booleans()),
    space=st.sampled_from([b"", b" ", b"\n\t"]),
)
def test_asking_for_usage_changes_nothing_else(
    model: str, more: dict[str, Any], options: dict[str, bool] | None, space: bytes
) -> None:
    """Catches a request that is not the caller's any more once the usage is asked for."""
    sent = {**more, "model": model} | ({} if options is None else {"stream_options": options})
    body = space + json.dumps(sent).encode() + space
    asked = json.loads(ask_usage(body, sent))
    assert asked == {**sent, "stream_options": {**(options or {}), "include_usage": True}}
    assert wants_usage(asked)
