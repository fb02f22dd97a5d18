"""The vendors' own SDKs, unmodified, against the gateway on a real socket, in all pairings of formats."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
import anthropic
import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from structlog.testing import capture_logs

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import RateLimited, Unauthenticated
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.routes import COUNT_HEADER, build_front_routes
from agentic_flow.gateway.routes import build_routes
from agentic_flow.gateway.service import Gateway
from agentic_flow.runtime.platform import serve_services
from agentic_flow.testing.fake_provider import FakeProvider, Reply, Script
from agentic_flow.testing.fake_wires import anthropic_answer, anthropic_events, openai_answer, openai_events
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio
BACKS = ("openai", "anthropic")
PAIRS = [(front, back) for front in ("openai", "anthropic") for back in BACKS]
CROSSED = [("openai", "anthropic"), ("anthropic", "openai")]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
LOOK_UP = {"type": "object", "properties": {"q": {"type": "string"}}}
CALLS = [
    {"name": "look_up", "arguments": {"q": 'Zürich "a\\b" 🙂'}},
    {"name": "look_up", "arguments": {"q": "x", "n": [1, {"deep": None}]}},
    {"name": "look_up", "arguments": {}},
]
WAIT_S = 20.0
# Reading the system's certificates for each client would be most of what these tests do.
_TLS = ssl.create_default_context()


class Keys:
    """Knows one good key, one without the scope, and one that is over its limit."""

    async def authenticate(self, credential: str) -> Principal:
        if credential == "busy":
            raise RateLimited("too many requests", retry_after_s=7)
        if credential not in ("good", "poor"):
            raise Unauthenticated("no such key")
        return Principal("t", credential, frozenset({"models:use"} if credential == "good" else ()))


class Answer(NamedTuple):
    """What either SDK understood, in one form."""

    text: str
    calls: list[tuple[str, dict[str, Any]]]
    stop: str
    tokens: tuple[int, int]
    ids: list[str]


class Front:
    """One SDK pointed at a gateway, asked in one way whatever the vendor."""

    def __init__(self, name: str, url: str, key: str = "good") -> None:
        self.name = name
        self.url = url
        self.errors: Any = openai if name == "openai" else anthropic
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=_TLS),
        )
        self.anthropic = anthropic.AsyncAnthropic(
            base_url=url,
            api_key=key,
            max_retries=0,
            http_client=anthropic.DefaultAsyncHttpxClient(verify=_TLS),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *about: object) -> None:
        await self.openai.close()
        await self.anthropic.close()

    async def ask(self, model: str, *, stream: bool = False, messages: Any = None, **more: Any) -> Answer:
        given = messages or [{"role": "user", "content": "hi"}]
        if self.name == "openai":
            return await self._ask_openai(model, stream, given, more)
        return await self._ask_anthropic(model, stream, given, more)

    async def _ask_openai(self, model: str, stream: bool, messages: Any, more: dict[str, Any]) -> Answer:
        if not stream:
            whole = await self.openai.chat.completions.create(model=model, messages=messages, **more)
        else:
            about = {"stream_options": {"include_usage": True}, **more}
            # The SDK's own assembly of chunks; its `stream` helper refuses answers cut by their limit.
            state: Any = ChatCompletionStreamState()
            async for chunk in await self.openai.chat.completions.create(
                model=model, messages=messages, stream=True, **about
            ):
                state.handle_chunk(chunk)
            whole = state.current_completion_snapshot
        message, usage = whole.choices[0].message, whole.usage
        assert usage is not None
        calls = message.tool_calls or []
        return Answer(
            message.content or "",
            [(call.function.name, json.loads(call.function.arguments)) for call in calls],
            str(whole.choices[0].finish_reason),
            (usage.prompt_tokens, usage.completion_tokens),
            [call.id for call in calls],
        )

    async def _ask_anthropic(self, model: str, stream: bool, messages: Any, more: dict[str, Any]) -> Answer:
        about: dict[str, Any] = {"max_tokens": 100, **more}
        if not stream:
            whole = await self.anthropic.messages.create(model=model, messages=messages, **about)
        else:
            async with self.anthropic.messages.stream(model=model, messages=messages, **about) as events:
                whole = await events.get_final_message()
        calls = [block for block in whole.content if block.type == "tool_use"]
        usage = whole.usage
        read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        return Answer(
            "".join(block.text for block in whole.content if block.type == "text"),
            [(call.name, dict(call.input)) for call in calls],
            str(whole.stop_reason),
            (read + (usage.cache_creation_input_tokens or 0), usage.output_tokens),
            [call.id for call in calls],
        )

    def tools(self) -> list[Any]:
        if self.name == "anthropic":
            return [{"name": "look_up", "description": "Looks up.", "input_schema": LOOK_UP}]
        function = {"name": "look_up", "description": "Looks up.", "parameters": LOOK_UP}
        return [{"type": "function", "function": function}]

    def after_calls(self, answer: Answer, results: Sequence[str]) -> list[Any]:
        """The conversation with the results of an answer's calls."""
        asked: dict[str, Any] = {"role": "user", "content": "look up"}
        pairs = list(zip(answer.ids, answer.calls, strict=True))
        if self.name == "openai":
            calls = [
                {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                for i, (n, a) in pairs
            ]
            said = [
                {"role": "tool", "tool_call_id": i, "content": r}
                for (i, _), r in zip(pairs, results, strict=True)
            ]
            return [asked, {"role": "assistant", "content": None, "tool_calls": calls}, *said]
        uses = [{"type": "tool_use", "id": i, "name": n, "input": a} for i, (n, a) in pairs]
        back = [
            {"type": "tool_result", "tool_use_id": i, "content": r}
            for (i, _), r in zip(pairs, results, strict=True)
        ]
        return [asked, {"role": "assistant", "content": uses}, {"role": "user", "content": back}]


@asynccontextmanager
async def gateway_at(
    fake: FakeProvider, *, stop: asyncio.Event | None = None, drain_timeout_s: float = 1.0, **more: Any
) -> AsyncIterator[str]:
    """A gateway over `fake`, with the routes and error shapes of the platform."""
    configured = GatewaySettings.model_validate(
        {
            "anthropic": {"base_url": fake.anthropic_url, "api_key": "upstream-key"},
            "openai": {"base_url": fake.openai_url, "api_key": "upstream-key"},
            "attempts": 1,
            "backoff_s": 0.0,
            **more,
        }
    )

    async def ready() -> dict[str, bool]:
        return {}

    async with Gateway(configured) as gateway:
        app = create_app(
            "platform",
            [*build_routes(gateway), *build_front_routes(gateway)],
            authenticator=Keys(),
            settings=Settings.model_validate({"auth": {"required": True}}),
            ready=ready,
            error_shapes=ERROR_SHAPES,
        )
        async with serving(app, stop=stop, drain_timeout_s=drain_timeout_s) as (url,):
            yield url


@asynccontextmanager
async def asking(
    front: str, script: Script, *, key: str = "good", models: Sequence[str] | None = None, **more: Any
) -> AsyncIterator[tuple[Front, FakeProvider]]:
    with FakeProvider(script, api_key="upstream-key", models=models) as fake:
        async with gateway_at(fake, **more) as url, Front(front, url, key) as sdk:
            yield sdk, fake


STOPS = {
    "openai": {"end": "stop", "tool_calls": "tool_calls", "length": "length"},
    "anthropic": {"end": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_text_and_usage(front: str, back: str, stream: bool) -> None:
    """Catches text, stop reason or token counts that change on the way through."""
    reply = Reply.text("Grüße 🙂 of 4", input_tokens=50, output_tokens=12, cache_read_tokens=30)
    async with asking(front, [reply, reply.but(stop_reason="length")]) as (sdk, fake):
        answer = await sdk.ask(f"{back}:fake-model", stream=stream)
        # Anthropic's SDK no longer knows the field; its API still takes it.
        cut = await sdk.ask(f"{back}:fake-model", stream=stream, extra_body={"temperature": 0.5})
    assert answer == Answer("Grüße 🙂 of 4", [], STOPS[front]["end"], (50, 12), [])
    assert cut.stop == STOPS[front]["length"]
    assert [(seen.wire, seen.model, seen.stream) for seen in fake.requests] == [
        (back, "fake-model", stream)
    ] * 2
    assert fake.requests[1].body["temperature"] == 0.5
    assert fake.refused == []


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_parallel_tools_and_their_results(
    front: str, back: str, stream: bool, chunk_bytes: int | None
) -> None:
    """Catches tool calls merged, arguments cut where the network cuts, and results that lose their call."""
    replies = [Reply.tool_calls(CALLS, body_text="I look.", chunk_bytes=chunk_bytes), Reply.text("done")]
    async with asking(front, replies) as (sdk, fake):
        choice: Any = "auto" if front == "openai" else {"type": "auto"}
        more = {"tools": sdk.tools(), "tool_choice": choice}
        answer = await sdk.ask(f"{back}:fake-model", stream=stream, **more)
        history = sdk.after_calls(answer, ["one", "two", "three"])
        final = await sdk.ask(f"{back}:fake-model", stream=stream, messages=history, **more)
    assert answer.calls == [(call["name"], call["arguments"]) for call in CALLS]
    assert answer.text == "I look."
    assert answer.stop == STOPS[front]["tool_calls"]
    assert len(set(answer.ids)) == 3
    assert final.text == "done"
    assert fake.refused == []
    assert fake.requests[0].tools == ("look_up",)
    assert fake.requests[1].tool_results == 3
    assert '"two"' in fake.requests[1].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_structured_output(front: str, back: str, stream: bool) -> None:
    """Catches a schema that does not reach the provider, and an answer that is no longer its JSON."""
    more: dict[str, Any] = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    if front == "openai":
        form = {"name": "place", "schema": SCHEMA, "strict": True}
        more = {"response_format": {"type": "json_schema", "json_schema": form}}
    async with asking(front, [Reply.text('{"city": "Bern"}')]) as (sdk, fake):
        answer = await sdk.ask(f"{back}:fake-model", stream=stream, **more)
    assert json.loads(answer.text) == {"city": "Bern"}
    assert answer.stop == STOPS[front]["end"]
    assert answer.calls == []
    assert json.dumps(SCHEMA) in json.dumps(fake.requests[0].body)
    assert fake.refused == []


@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_images_and_system_messages(front: str, back: str) -> None:
    """Catches an image or an instruction that does not arrive."""
    url = "http://127.0.0.1:9/cat.png"
    if front == "openai":
        pictures = [f"data:image/png;base64,{PIXEL}", url]
        parts: list[Any] = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        extra: list[Any] = [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        ]
        more: dict[str, Any] = {}
    else:
        sources = [
            {"type": "base64", "media_type": "image/png", "data": PIXEL},
            {"type": "url", "url": url},
        ]
        parts = [{"type": "image", "source": source} for source in sources]
        more = {"system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]}
        extra = []
    turn = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}
    async with asking(front, [Reply.text("a cat")]) as (sdk, fake):
        answer = await sdk.ask(f"{back}:fake-model", messages=[*extra, turn], **more)
    assert answer.text == "a cat"
    seen = fake.requests[0]
    assert fake.refused == []
    assert PIXEL in seen.text
    assert url in seen.text
    assert "Be brief." in seen.text
    assert "Be kind." in seen.text
    assert seen.last_text == "What is it?"


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_and_its_signature_survive_a_round(stream: bool) -> None:
    """Catches thinking that is lost, or that comes back without the signature its provider demands."""
    replies = [Reply.text("4", thinking="two and two", reasoning_tokens=3), Reply.text("5")]
    async with asking("openai", replies) as (sdk, fake):
        create = sdk.openai.chat.completions.create
        ask: Any = {"role": "user", "content": "2 + 2?"}
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        about: Any = {"model": "anthropic:fake-model", "reasoning_effort": "high"}
        if stream:
            async for chunk in await create(messages=[ask], stream=True, **about):
                delta = chunk.choices[0].delta.model_dump(exclude_none=True)
                message["content"] += delta.get("content", "")
                if "reasoning_content" in delta:
                    held = message.get("reasoning_content", "")
                    message["reasoning_content"] = held + delta["reasoning_content"]
                if "reasoning_details" in delta:
                    message["reasoning_details"] = delta["reasoning_details"]
        else:
            whole = await create(messages=[ask], **about)
            message = whole.choices[0].message.model_dump(exclude_none=True)
            assert whole.usage is not None
            assert whole.usage.completion_tokens_details is not None
            assert whole.usage.completion_tokens_details.reasoning_tokens == 3
        await create(messages=[ask, message, {"role": "user", "content": "+ 1?"}], **about)  # type: ignore[list-item]
    assert message["reasoning_content"] == "two and two"
    block = fake.requests[1].messages[1]["content"][0]
    assert block == {"type": "thinking", "thinking": "two and two", "signature": "sig-0"}
    assert fake.requests[0].body["thinking"] == {"type": "adaptive"}
    assert fake.requests[0].body["output_config"] == {"effort": "high"}


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_of_compatible_servers_is_shown_to_anthropics_clients(stream: bool) -> None:
    """Catches reasoning that is dropped, and thinking blocks that the client may not send back."""
    replies = [Reply.text("4", thinking="two and two"), Reply.text("5")]
    async with asking("anthropic", replies) as (sdk, fake):
        about: Any = {"model": "openai:fake-model", "max_tokens": 50}
        ask: Any = {"role": "user", "content": "2 + 2?"}
        if stream:
            async with sdk.anthropic.messages.stream(messages=[ask], **about) as events:
                first = await events.get_final_message()
        else:
            first = await sdk.anthropic.messages.create(messages=[ask], **about)
        history: Any = [ask, {"role": "assistant", "content": first.content}, ask]
        await sdk.anthropic.messages.create(messages=history, **about)
    assert [block.type for block in first.content] == ["thinking", "text"]
    assert first.content[0].thinking == "two and two"  # type: ignore[union-attr]
    assert fake.refused == []


# The same format on both sides


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", BACKS)
async def test_bytes_pass_through_untouched(wire: str, stream: bool) -> None:
    """Catches a request or an answer that is rewritten although both sides speak the same format."""
    reply = Reply.tool_calls(CALLS, body_text="ü", extra={"not_known_yet": {"a": [1.0, None]}}, chunk_bytes=3)
    model = f"{wire}:fake-model"
    new = '"speed": "fast",' if wire == "anthropic" else '"verbosity":"low", "logprobs" : true,'
    if wire == "openai" and stream:
        new += '"stream_options" :{"include_usage":true},'  # else the gateway asks for it
    sent = (
        f'{{ {new} "messages":[{{"role":"user","content":"\\u00fc \\"model\\": 1.0"}}],'
        f'"model"  :"{model}","max_tokens":5,"stream":{str(stream).lower()}\n}}'
    )
    path = "/v1/messages" if wire == "anthropic" else "/v1/chat/completions"
    with FakeProvider([reply], api_key="upstream-key") as fake:
        async with gateway_at(fake) as url, aiohttp.ClientSession() as session:
            headers = {
                "x-api-key": "good",
                "anthropic-version": "2023-06-01",
                "anthropic-beta": "new-thing",
                "content-type": "application/json",
            }
            async with session.post(f"{url}{path}?beta=true", data=sent, headers=headers) as answer:
                assert answer.status == 200
                got = await answer.read()
    seen = fake.requests[0]
    assert seen.raw.decode() == sent.replace(model, "fake-model")
    assert seen.headers["anthropic-beta"] == "new-thing"
    whole, events = (
        (anthropic_answer, anthropic_events) if wire == "anthropic" else (openai_answer, openai_events)
    )
    told = asdict(reply)
    assert got == (b"".join(events(seen, told)) if stream else json.dumps(whole(seen, told)).encode())


async def test_what_passes_is_priced_from_what_was_billed() -> None:
    """Catches calls that pass through unrecorded, or recorded without their tokens and cost."""
    reply = Reply.text("four", input_tokens=1000, output_tokens=100)
    replies = [reply, reply, reply, reply.but(omit_usage=True)]
    prices = {"fake-model": (1.0, 10.0)}
    async with asking("openai", replies, prices_usd_per_mtok=prices) as (sdk, _):
        with capture_logs() as logs:
            for stream in (False, True):
                await sdk.ask("openai:fake-model", stream=stream)
            for _ in range(2):
                async for chunk in await sdk.openai.chat.completions.create(
                    model="openai:fake-model", messages=[{"role": "user", "content": "x" * 40}], stream=True
                ):
                    assert chunk.usage is None  # it was not asked for
    done = [entry for entry in logs if entry["event"] == "completion_finished"]
    assert [(e["input_tokens"], e["output_tokens"]) for e in done[:3]] == [(1000, 100)] * 3
    assert done[0]["cost_usd"] == pytest.approx(0.002)
    assert sum(entry["event"] == "usage_estimated" for entry in logs) == 1
    # Nobody counted the last: forty characters in, four out.
    assert (done[3]["input_tokens"], done[3]["output_tokens"]) == (10, 1)


# Errors


@pytest.mark.parametrize("front", BACKS)
async def test_wrong_keys_and_missing_scopes(front: str) -> None:
    """Catches a call without a valid key, and errors that the SDKs cannot classify."""
    async with asking(front, [Reply.text("never")], key="wrong") as (sdk, fake):
        with pytest.raises(sdk.errors.AuthenticationError) as caught:
            await sdk.ask("openai:fake-model")
        assert caught.value.request_id
        async with Front(front, sdk.url, "poor") as poor:
            with pytest.raises(sdk.errors.PermissionDeniedError, match="models:use"):
                await poor.ask("openai:fake-model")
        async with Front(front, sdk.url, "busy") as busy:
            with pytest.raises(sdk.errors.RateLimitError) as limited:
                await busy.ask("openai:fake-model")
        assert limited.value.response.headers["retry-after"] == "7"
        for lister in (sdk.openai.models.list(), sdk.anthropic.models.list()):
            with pytest.raises((openai.AuthenticationError, anthropic.AuthenticationError)):
                await lister
        with pytest.raises(openai.AuthenticationError) as shaped:
            await sdk.openai.models.retrieve("fake-model")
        assert shaped.value.code == "invalid_api_key"
    assert fake.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_errors_of_the_provider(front: str, back: str, stream: bool) -> None:
    """Catches a refusal that reaches the client with another class, without its reason or its pause."""
    replies = [
        Reply.error(500, "it broke"),
        Reply.error(529, "overloaded"),
        Reply.error(400, "temperature is too warm"),
        Reply.error(401, "your upstream-key is revoked"),
        Reply.error(429, "slow down", retry_after="9"),
    ]
    async with asking(front, replies, models=["fake-model"]) as (sdk, _):
        model = f"{back}:fake-model"
        with pytest.raises(sdk.errors.InternalServerError, match="it broke"):
            await sdk.ask(model, stream=stream)
        with pytest.raises(sdk.errors.InternalServerError) as overloaded:
            await sdk.ask(model, stream=stream)
        assert overloaded.value.status_code == (529 if front == "anthropic" else 503)
        with pytest.raises(sdk.errors.BadRequestError, match="too warm"):
            await sdk.ask(model, stream=stream)
        # The gateway's own key is wrong, which is not the caller's fault and must not be shown to it.
        with pytest.raises(sdk.errors.InternalServerError) as keyless:
            await sdk.ask(model, stream=stream)
        assert "upstream-key" not in str(keyless.value)
        # Last, for the key rests afterwards.
        with pytest.raises(sdk.errors.RateLimitError, match="slow down") as limited:
            await sdk.ask(model, stream=stream)
        assert limited.value.response.headers["retry-after"] == "9"
        with pytest.raises(sdk.errors.NotFoundError):
            await sdk.ask(f"{back}:other", stream=stream)
        with pytest.raises(sdk.errors.NotFoundError, match="not configured"):
            await sdk.ask("openrouter:no/key", stream=stream)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("openai", {"logprobs": True}, "logprobs"),
    ("openai", {"n": 2}, "n"),
    ("openai", {"logit_bias": {"1": 2}}, "logit_bias"),
    ("openai", {"seed": 7}, "seed"),
    ("openai", {"reasoning_effort": "minimal"}, "reasoning_effort"),
    ("openai", {"extra_body": {"not_known_yet": 1}}, "not_known_yet"),
    ("openai", {"modalities": ["text", "audio"]}, "modalities"),
    ("openai", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
    ("anthropic", {"extra_body": {"top_k": 4}}, "top_k"),
    ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
    ("anthropic", {"extra_body": {"not_known_yet": 1}}, "not_known_yet"),
    ("anthropic", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    ("anthropic", {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, "cache_control.ttl"),
    ("anthropic", {"service_tier": "standard_only"}, "service_tier"),
]


@pytest.mark.parametrize(("front", "more", "field"), REFUSED)
async def test_what_cannot_be_translated_is_refused_by_name(
    front: str, more: dict[str, Any], field: str
) -> None:
    """Catches a setting that is dropped without a word when formats differ."""
    back = "anthropic" if front == "openai" else "openai"
    async with asking(front, [Reply.text("never")]) as (sdk, fake):
        with pytest.raises(sdk.errors.BadRequestError, match=field.replace(".", r"\.")) as caught:
            await sdk.ask(f"{back}:fake-model", **more)
        if front == "openai":
            assert caught.value.param == field
    assert fake.requests == []


# Streams that end badly


@pytest.mark.parametrize("fault", ["truncated", "no_terminal", "broken_json"])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_a_broken_stream_is_not_taken_for_complete(front: str, back: str, fault: Any) -> None:
    """Catches half an answer that ends like a whole one."""
    reply = Reply.broken(fault, text="an answer of many words that breaks off", chunk_chars=3)
    async with asking(front, [reply]) as (sdk, _):
        pieces: list[str] = []
        with pytest.raises(sdk.errors.APIError) as caught:
            await _read(sdk, f"{back}:fake-model", pieces)
    assert "an answer of many words that breaks off".startswith("".join(pieces))
    assert not isinstance(caught.value, sdk.errors.APIConnectionError)


@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_an_error_within_the_stream_reaches_the_client(front: str, back: str) -> None:
    """Catches a provider's error event that is swallowed."""
    kind = "overloaded_error" if back == "anthropic" else "server_error"
    async with asking(front, [Reply.text("half of", stream_error=kind)]) as (sdk, _):
        pieces: list[str] = []
        with pytest.raises(sdk.errors.APIError, match="scripted error"):
            await _read(sdk, f"{back}:fake-model", pieces)
    assert "half of".startswith("".join(pieces))


@pytest.mark.parametrize("back", BACKS)
async def test_what_fails_before_the_first_event_is_tried_again(back: str) -> None:
    """Catches a stream given up although nothing of it had been passed on."""
    replies = [Reply.error(503), Reply.broken("empty"), Reply.text("whole")]
    async with asking(back, replies, attempts=3) as (sdk, fake):
        assert (await sdk.ask(f"{back}:fake-model", stream=True)).text == "whole"
    assert len(fake.requests) == 3


async def _read(sdk: Front, model: str, pieces: list[str]) -> None:
    """Read a stream to its end, noting its text."""
    messages: Any = [{"role": "user", "content": "hi"}]
    if sdk.name == "openai":
        async for chunk in await sdk.openai.chat.completions.create(
            model=model, messages=messages, stream=True
        ):
            pieces.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - kept when it breaks
        return
    async with sdk.anthropic.messages.stream(model=model, messages=messages, max_tokens=9) as events:
        async for text in events.text_stream:
            pieces.append(text)  # noqa: PERF401 - likewise


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("front", "back"), PAIRS)
async def test_a_client_that_leaves_ends_the_call_upstream(front: str, back: str, stream: bool) -> None:
    """Catches a provider that keeps writing, and billing, for nobody."""
    reply = Reply.broken("hang_mid" if stream else "hang", text="word " * 20)
    async with asking(front, [reply]) as (sdk, fake):
        pieces: list[str] = []
        work = sdk.ask(f"{back}:fake-model") if not stream else _read(sdk, f"{back}:fake-model", pieces)
        task = asyncio.create_task(work)
        async with asyncio.timeout(WAIT_S):
            while not (pieces if stream else fake.requests):
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.wait_until_left, WAIT_S)


async def test_a_server_that_stops_lets_streams_finish_or_says_that_it_cut_them() -> None:
    """Catches a stream that ends at a restart as if it were complete."""
    for reply, whole in (
        (Reply.text("all of it", chunk_delay_s=0.02), True),
        (Reply.broken("hang_mid", text="word " * 20), False),
    ):
        pieces: list[str] = []
        stop = asyncio.Event()
        with FakeProvider([reply], api_key="upstream-key") as fake:
            drain_s = WAIT_S if whole else 1.0
            async with (
                gateway_at(fake, stop=stop, drain_timeout_s=drain_s) as url,
                Front("openai", url) as sdk,
            ):
                task = asyncio.create_task(_read(sdk, "anthropic:fake-model", pieces))
                async with asyncio.timeout(WAIT_S):
                    while not pieces:
                        await asyncio.sleep(0)
                stop.set()
                if whole:
                    await task
                    assert "".join(pieces) == "all of it"
                else:
                    with pytest.raises(openai.APIError, match="the server is stopping"):
                        await task


# Counting and listing


async def test_tokens_are_counted_or_estimated_and_the_answer_says_which() -> None:
    """Catches an estimate that passes for a count."""
    async with asking("anthropic", []) as (sdk, _):
        about: Any = {"messages": [{"role": "user", "content": "x" * 400}]}
        raw = sdk.anthropic.messages.with_raw_response
        exact = await raw.count_tokens(model="anthropic:fake-model", **about)
        guess = await raw.count_tokens(model="openai:fake-model", **about)
        assert exact.headers[COUNT_HEADER] == "exact"
        assert (await exact.parse()).input_tokens > 80
        assert guess.headers[COUNT_HEADER] == "estimated"
        assert (await guess.parse()).input_tokens == 100


async def test_both_vendors_clients_list_the_models() -> None:
    """Catches a list that one of the SDKs cannot read, page through or find a model in."""
    async with asking("openai", [], models=["a/b", "claude-x", "m1"]) as (sdk, _):
        listed = [model.id async for model in sdk.openai.models.list()]
        assert {"a/b", "claude-x", "m1", "extractive"} <= set(listed)
        assert (await sdk.openai.models.retrieve("a/b")).owned_by
        paged = [model.id async for model in sdk.anthropic.models.list(limit=2)]
        # Both providers serve these, so their names alone would not tell them apart.
        assert len(paged) == len(set(paged)) == len(listed)
        assert {"anthropic:a/b", "openai:a/b", "extractive"} <= set(paged)
        found = await sdk.anthropic.models.retrieve("claude-x")
        assert (found.type, found.lifecycle) == ("model", "active")
        with pytest.raises(openai.NotFoundError):
            await sdk.openai.models.retrieve("nobody")
        with pytest.raises(anthropic.NotFoundError):
            await sdk.anthropic.models.retrieve("nobody")


# Whatever arrives

NAMES = st.sampled_from(
    "messages stream max_tokens temperature stop tools tool_choice response_format system thinking role "
    "content type text name n stream_options output_config metadata user logprobs stop_sequences".split()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)
MODELS = st.sampled_from(["openai:fake-model", "anthropic:fake-model", "extractive", "nobody"])
BODIES = st.binary(max_size=40) | st.builds(
    lambda model, more, whole: json.dumps(
        {
            **({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9} if whole else {}),
            "model": model,
            **more,
        }
    ).encode(),
    MODELS | VALUES,
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.booleans(),
)


@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(bodies=st.lists(BODIES, min_size=25, max_size=25))
async def test_no_body_gives_a_500_or_a_hang(bodies: list[bytes]) -> None:
    """Catches a request that ends in a bug of ours, or that is never answered."""
    headers = {"x-api-key": "good", "anthropic-version": "2023-06-01"}
    with FakeProvider(lambda seen: Reply.text("{}"), api_key="upstream-key") as fake:
        async with gateway_at(fake) as url, aiohttp.ClientSession(url, headers=headers) as session:
            for body in bodies:
                for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
                    async with asyncio.timeout(WAIT_S), session.post(path, data=body) as answer:
                        content = await answer.read()
                    assert answer.status in (200, 400, 404), (path, body, content)
                    if answer.status != 200:
                        assert "error" in json.loads(content)


# The platform itself


async def test_the_platform_serves_both_sdks_with_its_own_keys(tmp_path: Path) -> None:
    """Catches routes that are not on port 3000, and the platform's keys not taken in either header."""
    with FakeProvider(lambda seen: Reply.text(f"from {seen.wire}"), api_key="upstream-key") as fake:
        configured = Settings.model_validate(
            {
                "data_dir": tmp_path / "data",
                "auth": {"required": True},
                "serve": {"platform_port": 0},
                "gateway": {
                    "anthropic": {"base_url": fake.anthropic_url, "api_key": "upstream-key"},
                    "openai": {"base_url": fake.openai_url, "api_key": "upstream-key"},
                },
            }
        )
        stop, ready, keys = asyncio.Event(), asyncio.get_running_loop().create_future(), list[str]()
        server = asyncio.create_task(
            serve_services(
                configured, ["platform"], on_ready=ready.set_result, on_owner_key=keys.append, stop=stop
            )
        )
        await asyncio.wait((server, ready), return_when=asyncio.FIRST_COMPLETED)
        try:
            url = ready.result()["platform"]
            for front, back in PAIRS:
                async with Front(front, url, keys[0]) as sdk, Front(front, url, "af_wrong") as stranger:
                    answer = await sdk.ask(f"{back}:fake-model", stream=True)
                    assert answer.text == f"from {back}"
                    with pytest.raises(sdk.errors.AuthenticationError):
                        await stranger.ask(f"{back}:fake-model")
        finally:
            stop.set()
            await server
