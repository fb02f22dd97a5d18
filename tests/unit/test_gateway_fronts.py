"""The server's side of both formats as pure functions: round trips, splits, refusals, and arbitrary JSON."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

import orjson
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import (
    InvalidInput,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    Unauthenticated,
    UnknownModel,
)
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    Message,
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
from agentic_flow.gateway.front.errors import FrontError, anthropic_error, openai_error
from agentic_flow.gateway.front.format import Call
from agentic_flow.gateway.front.routes import CHAT, MESSAGES, Front, renamed
from agentic_flow.gateway.wire.anthropic import AnthropicFormat
from agentic_flow.gateway.wire.format import WireFormat
from agentic_flow.gateway.wire.openai import OpenAIFormat
from agentic_flow.gateway.wire.passing import rename_model
from agentic_flow.testing.fake_provider import Reply
from agentic_flow.testing.fake_wires import SeenRequest, anthropic_events, openai_events

WIRES: dict[str, WireFormat] = {"anthropic": AnthropicFormat(), "openai": OpenAIFormat()}
FRONTS: dict[str, Front] = {"anthropic": MESSAGES, "openai": CHAT}
USER = Message(role="user", parts=(TextPart(text="hi"),))
TOOL = ToolSpec(
    name="look_up",
    description="Looks up.",
    input_schema={"type": "object", "properties": {"q": {"type": "string"}}},
)

texts = st.text(min_size=1, max_size=12)
arguments = st.dictionaries(
    st.text(max_size=4), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6), max_size=3
)
stops: st.SearchStrategy[StopReason] = st.sampled_from(["end", "length", "refusal"])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def request_of(**more: Any) -> CompletionRequest:
    return CompletionRequest(model="m", **{"messages": (USER,), "tools": (TOOL,), **more})


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    """Answers as either provider gives them: thinking, then text, then calls."""
    thinking = draw(st.none() | texts)
    text = draw(st.none() | texts)
    calls = tuple(
        ToolCallPart(id=f"c{n}", name="look_up", arguments=given)
        for n, given in enumerate(draw(st.lists(arguments, max_size=3)))
    )
    parts = (
        *(() if thinking is None else (ThinkingPart(text=thinking),)),
        *(() if text is None else (TextPart(text=text),)),
        *calls,
    )
    read, written, out = draw(st.integers(0, 50)), draw(st.integers(0, 50)), draw(st.integers(0, 99))
    usage = Usage(
        input_tokens=read + written + draw(st.integers(0, 99)),
        output_tokens=out,
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=draw(st.integers(0, out)),
        cost_usd=None,
    )
    return Completion(
        model="m",
        provider="x",
        parts=parts,
        stop_reason="tool_calls" if calls else draw(stops),
        usage=usage,
    )


def events_of(completion: Completion, size: int) -> list[StreamEvent]:
    """The answer as a stream of pieces of `size` characters."""
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


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def streamed(name: str, completion: Completion, size: int) -> bytes:
    encoder = FRONTS[name].encoder("m", "id", Call(request_of()))
    return b"".join(encoder.take(event) for event in events_of(completion, size))


def decoded(name: str, chunks: list[bytes], request: CompletionRequest) -> Completion:
    decoder = WIRES[name].decoder(request)
    for chunk in chunks:
        decoder.feed(chunk)
    return decoder.end().completion


# Answers


@pytest.mark.parametrize("name", FRONTS)
@given(completion=completions(), size=st.integers(1, 9))
def test_what_a_front_writes_the_wire_reads_back(name: str, completion: Completion, size: int) -> None:
    """Catches a part, a count or a stop reason that is lost between our two sides of one format."""
    request = request_of()
    whole = WIRES[name].decode(request, FRONTS[name].encode(completion, "id", Call(request)))
    expected = completion.model_copy(update={"provider": whole.completion.provider})
    assert whole.completion == expected
    assert not whole.usage_estimated
    stream = decoded(name, [streamed(name, completion, size)], request)
    assert stream == expected


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("back", FRONTS)
def test_tool_arguments_survive_every_split(front: str, back: str) -> None:
    """Catches arguments that change when the provider's stream is cut at any byte, within a character too."""
    calls = [
        {"name": "look_up", "arguments": {"q": 'Zürich "a\\b" 🙂\n'}},
        {"name": "look_up", "arguments": {}},
        {"name": "look_up", "arguments": {"n": [1, {"deep": None}]}},
    ]
    reply = asdict(Reply.tool_calls(calls, body_text="ü", chunk_chars=2))
    request = request_of()
    sent = WIRES[back].encode(request, stream=True)
    seen = SeenRequest.parse(back, sent.path, {}, sent.body, index=0)  # type: ignore[arg-type]
    body = b"".join((anthropic_events if back == "anthropic" else openai_events)(seen, reply))
    # Pieces of one byte end at every byte; the longer ones begin and end where those do not.
    for size in (1, 2, 3, 5, 7, 64, 997):
        decoder = WIRES[back].decoder(request)
        encoder = FRONTS[front].encoder("m", "id", Call(request))
        events = [e for at in range(0, len(body), size) for e in decoder.feed(body[at : at + size])]
        answer = b"".join(encoder.take(event) for event in [*events, decoder.end()])
        cut = [answer[at : at + size] for at in range(0, len(answer), size)]
        got = decoded(front, cut, request)
        assert [call.arguments for call in got.tool_calls] == [call["arguments"] for call in calls], size
        assert got.text == "ü"
        reader = WIRES[back].passing({})
        passed = b"".join(reader.feed(body[at : at + size]) for at in range(0, len(body), size))
        assert passed == body
        assert reader.done


@pytest.mark.parametrize("name", FRONTS)
@given(order=st.permutations([0, 0, 0, 1, 1, 1, 2, 2]), data=st.data())
def test_calls_that_arrive_interleaved_stay_apart(name: str, order: list[int], data: st.DataObject) -> None:
    """Catches arguments given to the wrong call, or blocks that overlap, when a provider mixes its calls."""
    given_arguments: list[dict[str, Any]] = [{"a": "first"}, {"b": 2, "c": [3]}, {"d": None}]
    left = {}
    for index, value in enumerate(given_arguments):
        text, count = orjson.dumps(value).decode(), order.count(index)
        cuts = sorted(data.draw(st.integers(1, len(text) - 1)) for _ in range(count - 1))
        left[index] = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    calls = tuple(
        ToolCallPart(id=f"c{n}", name="look_up", arguments=value) for n, value in enumerate(given_arguments)
    )
    encoder = FRONTS[name].encoder("m", "id", Call(request_of()))
    begun: set[int] = set()
    body = b""
    for index in order:
        first = index not in begun
        begun.add(index)
        body += encoder.take(
            ToolCallDelta(
                index=index,
                id=f"c{index}" if first else None,
                name="look_up" if first else None,
                arguments_json=left[index].pop(0),
            )
        )
    completion = Completion(
        model="m", provider="x", parts=calls, stop_reason="tool_calls", usage=Usage(cost_usd=None)
    )
    body += encoder.take(StreamEnd(completion=completion))
    found = decoded(name, [body], request_of())
    assert {call.id: call.arguments for call in found.tool_calls} == {c.id: c.arguments for c in calls}
    if name == "anthropic":
        kinds = [line for line in body.split(b"\n") if line.startswith(b"event: content_block_st")]
        assert kinds == [b"event: content_block_start", b"event: content_block_stop"] * 3


@pytest.mark.parametrize("name", FRONTS)
def test_a_stream_cut_anywhere_is_not_complete(name: str) -> None:
    """Catches a terminal event that comes before the answer is whole."""
    completion = Completion(
        model="m", provider="x", parts=(TextPart(text="four"),), stop_reason="end", usage=Usage(cost_usd=None)
    )
    encoder = FRONTS[name].encoder("m", "id", Call(request_of()))
    sent = [encoder.take(event) for event in events_of(completion, 2)]
    error = FRONTS[name].last_words(ProviderFailed("it broke"))
    for end in range(len(sent)):
        with pytest.raises((ProviderFailed, ProviderRejected, ProviderProtocol)):
            decoded(name, [*sent[:end], error], request_of())


# Requests


@st.composite
def requests(draw: st.DrawFn) -> CompletionRequest:
    """Requests that both formats can say."""
    messages = [Message(role="system", parts=(TextPart(text=draw(texts)),))] if draw(st.booleans()) else []
    messages.append(Message(role="user", parts=(TextPart(text=draw(texts)),)))
    for turn in range(draw(st.integers(0, 2))):
        calls = tuple(
            ToolCallPart(id=f"c{turn}_{n}", name="look_up", arguments=draw(arguments))
            for n in range(draw(st.integers(0, 2)))
        )
        said = (TextPart(text=draw(texts)),) if draw(st.booleans()) or not calls else ()
        messages.append(Message(role="assistant", parts=(*said, *calls)))
        results = tuple(ToolResultPart(id=c.id, name=c.name, content=draw(texts)) for c in calls)
        picture = ImagePart(media_type="image/png", data="aGk=")
        link = ImagePart(media_type="image/*", url="http://x/y.png")
        more = (TextPart(text=draw(texts)), picture, link) if draw(st.booleans()) or not results else ()
        messages.append(Message(role="user", parts=(*results, *more)))
    return request_of(
        messages=tuple(messages),
        tool_choice=draw(st.sampled_from(["auto", "none", "required", "look_up"])),
        output_tokens_max=draw(st.integers(1, 9999)),
        temperature=draw(st.none() | st.floats(0, 1)),
        top_p=draw(st.none() | st.floats(0, 1)),
        stop=tuple(draw(st.lists(texts, max_size=2))),
        stream=draw(st.booleans()),
        parallel_tool_calls=draw(st.sampled_from([None, False])),
        reasoning_effort=draw(st.sampled_from([None, "none", "low", "high", "max"])),
        end_user=draw(st.none() | texts),
        tools=(TOOL, TOOL.model_copy(update={"name": "other", "strict": draw(st.none() | st.booleans())})),
    )


@pytest.mark.parametrize("name", FRONTS)
@given(request=requests())
def test_what_the_wire_writes_a_front_reads_back(name: str, request: CompletionRequest) -> None:
    """Catches a request that means something else on the other side, with no word about it."""
    if name == "anthropic" and request.tool_choice == "none" and request.parallel_tool_calls is False:
        # No call at all is also no call beside another; the format has one place for both.
        request = request.model_copy(update={"parallel_tool_calls": None})
    body = orjson.loads(WIRES[name].encode(request, stream=request.stream).body)
    read = FRONTS[name].decode(body).request
    if name == "openai":  # it has a message for each result, and another for the rest of the turn
        joined: list[Message] = []
        for message in read.messages:
            if joined and joined[-1].role == message.role == "user":
                joined[-1] = Message(role="user", parts=(*joined[-1].parts, *message.parts))
            else:
                joined.append(message)
        read = read.model_copy(update={"messages": tuple(joined)})
    assert read == request


@pytest.mark.parametrize("name", FRONTS)
def test_structured_output_is_read(name: str) -> None:
    """Catches a schema that is taken for something else."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    given_bodies: dict[str, dict[str, Any]] = {
        "openai": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        },
        "anthropic": {
            "output_config": {"format": {"type": "json_schema", "schema": schema}},
            "max_tokens": 1,
        },
    }
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **given_bodies[name]}
    assert FRONTS[name].decode(body).request.output_schema == schema


OPENAI_FIELDS = st.sampled_from(
    "messages model stream stream_options max_tokens max_completion_tokens temperature top_p stop n tools "
    "tool_choice response_format seed reasoning_effort user safety_identifier logprobs store".split()
)
ANTHROPIC_FIELDS = st.sampled_from(
    "messages model stream max_tokens temperature top_p top_k stop_sequences system tools tool_choice "
    "thinking output_config metadata cache_control service_tier".split()
)
INNER = st.sampled_from(
    "role content type text image_url url source data media_type tool_calls function name arguments id input "
    "tool_call_id tool_use_id tool_result schema json_schema input_schema format effort reasoning_details "
    "user assistant tool system image thinking auto none base64 parameters".split()
)
WORDS = st.dictionaries(INNER | st.text(max_size=4), st.deferred(lambda: LIKELY), max_size=4)
LIKELY: st.SearchStrategy[Any] = st.deferred(
    lambda: st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | INNER | WORDS
    | st.lists(WORDS, max_size=3)
)  # fmt: skip


@pytest.mark.parametrize("name", FRONTS)
@settings(max_examples=200)
@given(data=st.data())
def test_arbitrary_requests_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """Catches a body that ends in a bug instead of an answer with status 400 and the field's name."""
    keys = OPENAI_FIELDS if name == "openai" else ANTHROPIC_FIELDS
    body = data.draw(st.dictionaries(keys | st.text(max_size=4), LIKELY | json_values, max_size=6))
    body = data.draw(
        st.sampled_from(
            [
                body,
                {
                    "model": "m",
                    "max_tokens": 5,
                    "messages": [{"role": "user", "content": "hi"}],
                    **body,
                },
            ]
        )
    )
    refusal = None
    try:
        request = FRONTS[name].decode(body).request
    except InvalidInput as error:
        refusal = error
    else:
        for wire in WIRES.values():
            with contextlib.suppress(InvalidInput):
                wire.encode(request, stream=request.stream)
    assert refusal is None or "field" in refusal.details


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize("name", FRONTS)
def test_deep_nesting_is_refused(name: str) -> None:
    """Catches a schema so deep that reading or writing it ends in a recursion error."""
    tools: dict[str, Any] = {
        "openai": [{"type": "function", "function": {"name": "t", "parameters": nested(200)}}],
        "anthropic": [{"name": "t", "input_schema": nested(200)}],
    }
    body = {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": tools[name],
    }
    with pytest.raises(InvalidInput, match="nested deeper"):
        FRONTS[name].decode(body)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("openai", {"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages.0.tool_call_id"),
        ("openai", {"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name"),
        ("openai", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("openai", {"tool_choice": "required"}, "tool_choice"),
        ("anthropic", {"max_tokens": None}, "max_tokens"),
        ("anthropic", {"messages": [{"role": "assistant", "content": "x"}]}, "messages.0"),
        (
            "anthropic",
            {"messages": [{"role": "user", "content": [{"type": "x"}]}]},
            "messages.0.content.0.type",
        ),
    ],
)
def test_refusals_name_the_field(name: str, change: dict[str, Any], field: str) -> None:
    """Catches an error that leaves the caller to guess which part of the request it means."""
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **change}
    with pytest.raises(InvalidInput) as caught:
        FRONTS[name].decode(body)
    assert caught.value.details["field"] == field


# Errors and names


def test_a_name_in_another_spelling_is_renamed_and_its_like_is_not() -> None:
    """Catches a nested `model` renamed in place of the real one, whose key is written with an escape."""
    body = b'{"a": {"model": "m"}, "mod\\u0065l": "m", "b": "\\"model\\": \\"m\\""}'
    assert rename_model(body, "n") == body.replace(b'l": "m"', b'l": "n"').replace(
        b'{"model": "n"}', b'{"model": "m"}'
    )
    assert rename_model(b'{"model":"m", "model" : "m"}', "n") == b'{"model":"n", "model" : "n"}'


@pytest.mark.parametrize(
    ("error", "openai_status", "anthropic_status", "openai_code", "anthropic_type"),
    [
        (Unauthenticated("x"), 401, 401, "invalid_api_key", "authentication_error"),
        (UnknownModel("x"), 404, 404, "model_not_found", "not_found_error"),
        (
            ProviderOverloaded("x", details={"last_status": 429}),
            429,
            429,
            "rate_limit_exceeded",
            "rate_limit_error",
        ),
        (
            ProviderOverloaded("x", details={"last_status": 529}),
            503,
            529,
            "rate_limit_exceeded",
            "overloaded_error",
        ),
        (
            ProviderRejected("x", details={"last_status": 400}),
            400,
            400,
            "provider_rejected",
            "invalid_request_error",
        ),
        (ProviderRejected("x", details={"last_status": 401}), 502, 502, "provider_rejected", "api_error"),
        (ProviderFailed("x", details={"last_status": 500}), 502, 502, "provider_failed", "api_error"),
    ],
)
def test_errors_have_the_vendors_statuses_and_words(
    error: Any, openai_status: int, anthropic_status: int, openai_code: str, anthropic_type: str
) -> None:
    """Catches a status or a type on which the vendors' SDKs act wrongly."""
    assert FrontError(error, "openai").status == openai_status
    assert FrontError(error, "anthropic").status == anthropic_status
    assert openai_error(FrontError(error, "openai"))["error"]["code"] == openai_code
    assert anthropic_error(FrontError(error, "anthropic"))["error"]["type"] == anthropic_type


@given(
    before=st.dictionaries(st.text(max_size=6), json_values, max_size=3),
    after=st.dictionaries(st.text(max_size=6), json_values, max_size=3),
    model=st.text(max_size=8),
    name=st.text(max_size=8),
    indent=st.none() | st.integers(0, 2),
)
@example(before={"a": {"model": "m"}}, after={}, model="m", name="n", indent=None)
@example(before={'x"model': "m"}, after={}, model="m", name="n", indent=0)
@example(before={"a": {"model": "x"}}, after={"b": ['"model": "y"', "\\"]}, model="m", name='"', indent=2)
def test_only_the_model_is_renamed(
    before: dict[str, Any], after: dict[str, Any], model: str, name: str, indent: int | None
) -> None:
    """Catches another byte of a request changed, or a `model` within a schema taken for the real one."""
    body = {**before, "model": model, **{k: v for k, v in after.items() if k != "model"}}
    assume(model != name)
    text = json.dumps(body, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    renamed = rename_model(text, name)
    # orjson and json write some characters differently; read, the value must be the name.
    assert json.loads(renamed.decode("utf-8", "surrogatepass")) == {**body, "model": name}
    was = json.dumps(model, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert len(renamed) - len(orjson.dumps(name)) == len(text) - len(was)


@given(
    before=st.dictionaries(st.text(max_size=6), json_values, max_size=3),
    after=st.dictionaries(st.text(max_size=6), json_values, max_size=3),
    model=st.text(min_size=1, max_size=8),
    name=st.text(max_size=8),
    ascii_only=st.booleans(),
    indent=st.none() | st.integers(0, 2),
)
@example(before={}, after={"b": 'say \\"model"'}, model="m", name="n", ascii_only=True, indent=None)
@example(before={'x"model': "m"}, after={}, model="m", name="n", ascii_only=True, indent=None)
@example(before={"a": {"model": "m"}}, after={}, model='m"', name="n", ascii_only=False, indent=1)
def test_the_short_way_renames_like_the_long_one(
    before: dict[str, Any],
    after: dict[str, Any],
    model: str,
    name: str,
    ascii_only: bool,
    indent: int | None,
) -> None:
    """Catches the front's short way around `rename_model` that finds another place than that one does."""
    body = {**before, "model": model, **{k: v for k, v in after.items() if k != "model"}}
    assume(model != name)
    text = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert renamed(text, model, name) == rename_model(text, name)


def test_a_key_in_escapes_is_the_model_too() -> None:
    """Catches a `model` within the request renamed because the real one is written with escapes."""
    body = rb'{"mod\u0065l": "m", "metadata": {"model": "m"}}'
    assert renamed(body, "m", "n") == rb'{"mod\u0065l": "n", "metadata": {"model": "m"}}'
