"""OpenAI Responses and Embeddings by the unmodified SDK, against the gateway on a real socket."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from structlog.testing import capture_logs

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import RateLimited, Unauthenticated
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.openai_embeddings import INPUTS_MAX, SEMANTIC_HEADER, build_embedding_routes
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.providers import HttpProvider, Provider, openai_provider
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.stores import GatewayStores, gateway_database
from agentic_flow.gateway.usage_table import usage_report
from agentic_flow.testing.fake_provider import FakeProvider, Reply, Script
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio
BACKS = ("openai", "anthropic")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
LOOK_UP: dict[str, Any] = {
    "type": "function",
    "name": "look_up",
    "description": "Looks up.",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    "strict": False,
}
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


class Place(BaseModel):
    city: str


@asynccontextmanager
async def gateway_at(
    openai_url: str,
    anthropic_url: str = "http://127.0.0.1:9",
    *,
    responses: bool = False,
    policies: GatewayPolicies | None = None,
    data_dir: Path | None = None,
    **more: Any,
) -> AsyncIterator[str]:
    """A gateway over these endpoints, the first of which may speak Responses itself; with a folder, it keeps
    books."""
    configured = GatewaySettings.model_validate(
        {
            "anthropic": {"base_url": anthropic_url, "api_key": "upstream-key"},
            "openai": {"base_url": openai_url, "api_key": "upstream-key"},
            "attempts": 1,
            "backoff_s": 0.0,
            **more,
        }
    )

    def speaks_responses(given_settings: GatewaySettings, transport: Any) -> Provider:
        provider = openai_provider(given_settings, transport)
        assert isinstance(provider, HttpProvider)
        # What the official address alone has by itself.
        provider._profile = replace(provider._profile, responses=True)
        return provider

    async def ready() -> dict[str, bool]:
        return {}

    extra = {"openai": speaks_responses} if responses else {}
    stores = None if data_dir is None else GatewayStores(configured, data_dir)
    async with Gateway(configured, extra_providers=extra, policies=policies, stores=stores) as gateway:
        app = create_app(
            "platform",
            [*build_front_routes(gateway), *build_embedding_routes(gateway, HashedNgramEmbedder())],
            authenticator=Keys(),
            settings=Settings.model_validate({"auth": {"required": True}}),
            ready=ready,
            error_shapes=ERROR_SHAPES,
        )
        async with serving(app) as (url,):
            yield url


@asynccontextmanager
async def client_of(url: str, key: str = "good") -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(verify=_TLS),
    )
    async with client:
        yield client


@asynccontextmanager
async def asking(
    script: Script, *, key: str = "good", models: Sequence[str] | None = None, **more: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeProvider]]:
    with FakeProvider(script, api_key="upstream-key", models=models) as fake:
        async with (
            gateway_at(fake.openai_url, fake.anthropic_url, **more) as url,
            client_of(url, key) as client,
        ):
            yield client, fake


async def ask(client: openai.AsyncOpenAI, model: str, *, stream: bool = False, **more: Any) -> Any:
    """The response, whole or as the SDK makes it of a stream."""
    about = {"input": "hi", **more}
    if not stream:
        return await client.responses.create(model=model, **about)
    async with client.responses.stream(model=model, **about) as events:
        return await events.get_final_response()


# What is asked and answered


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("back", BACKS)
async def test_text_and_usage(back: str, stream: bool) -> None:
    """Catches text, status or token counts that change on the way through."""
    reply = Reply.text(
        "Grüße 🙂 of 4", input_tokens=50, output_tokens=12, cache_read_tokens=30, reasoning_tokens=3
    )
    async with asking([reply]) as (client, fake):
        answer = await ask(
            client, f"{back}:fake-model", stream=stream, instructions="Be brief.", temperature=0.5
        )
    assert (answer.output_text, answer.status, answer.object) == ("Grüße 🙂 of 4", "completed", "response")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (50, 12, 62)
    assert answer.usage.input_tokens_details.cached_tokens == 30
    assert answer.usage.output_tokens_details.reasoning_tokens == 3
    assert (answer.instructions, answer.temperature, answer.model) == ("Be brief.", 0.5, "fake-model")
    assert answer.model_dump()["store"] is False
    assert [(seen.wire, seen.model, seen.stream) for seen in fake.requests] == [(back, "fake-model", stream)]
    assert "Be brief." in fake.requests[0].system
    assert fake.requests[0].body["temperature"] == 0.5
    assert fake.refused == []


@pytest.mark.parametrize("back", BACKS)
async def test_an_answer_that_was_cut_says_so(back: str) -> None:
    """Catches half an answer that calls itself completed."""
    cut = Reply.text("half of", stop_reason="length")
    async with asking([cut, cut]) as (client, fake):
        whole = await ask(client, f"{back}:fake-model", max_output_tokens=20)
        kinds = []
        last: Any = None
        async for event in await client.responses.create(
            model=f"{back}:fake-model", input="hi", max_output_tokens=20, stream=True
        ):
            kinds.append(event.type)
            last = event
    for answer in (whole, last.response):
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (answer.output_text, answer.output[0].status) == ("half of", "incomplete")
    assert kinds[-1] == "response.incomplete"
    limits = {fake.requests[0].body.get(name) for name in ("max_tokens", "max_completion_tokens")}
    assert 20 in limits


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("back", BACKS)
async def test_an_agents_loop_with_parallel_tools(back: str, stream: bool, chunk_bytes: int | None) -> None:
    """Catches arguments cut where the network cuts, lost results, and thinking that cannot come back."""
    first = Reply.tool_calls(CALLS, body_text="I look.", thinking="where then", chunk_bytes=chunk_bytes)
    second = Reply.tool_calls([CALLS[0]], chunk_bytes=chunk_bytes)
    async with asking([first, second, Reply.text("done")]) as (client, fake):
        history: list[Any] = [{"role": "user", "content": "look up"}]
        answers = []
        for _ in range(3):
            answer = await ask(
                client, f"{back}:fake-model", stream=stream, input=history, tools=[LOOK_UP], store=False
            )
            answers.append(answer)
            # As agents do it: everything that was said goes back, with the results after it.
            history += answer.output
            history += [
                {"type": "function_call_output", "call_id": item.call_id, "output": f"found {item.call_id}"}
                for item in answer.output
                if item.type == "function_call"
            ]
    kinds = [item.type for item in answers[0].output]
    assert kinds == ["reasoning", "message", "function_call", "function_call", "function_call"]
    calls = [item for item in answers[0].output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [call["arguments"] for call in CALLS]
    assert len({call.call_id for call in calls}) == 3
    assert answers[0].output_text == "I look."
    assert answers[0].output[0].summary[0].text == "where then"
    assert answers[2].output_text == "done"
    assert fake.refused == []
    assert fake.requests[0].tools == ("look_up",)
    assert [seen.tool_results for seen in fake.requests] == [0, 3, 4]
    assert f"found {calls[1].call_id}" in fake.requests[2].text
    if back == "anthropic":
        block = fake.requests[2].messages[1]["content"][0]
        assert block == {"type": "thinking", "thinking": "where then", "signature": "sig-0"}


@pytest.mark.parametrize("back", BACKS)
async def test_structured_output(back: str) -> None:
    """Catches a schema that does not reach the provider, and an answer that is no longer its JSON."""
    reply = Reply.text('{"city": "Bern"}')
    async with asking([reply, reply]) as (client, fake):
        model = f"{back}:fake-model"
        parsed = await client.responses.parse(model=model, input="where?", text_format=Place)
        async with client.responses.stream(model=model, input="where?", text_format=Place) as events:
            streamed = await events.get_final_response()
    assert parsed.output_parsed == streamed.output_parsed == Place(city="Bern")
    for seen in fake.requests:
        assert '"city"' in json.dumps(seen.body)
        assert '"additionalProperties": false' in json.dumps(seen.body)
    assert fake.refused == []


@pytest.mark.parametrize("back", BACKS)
async def test_images_and_instructions(back: str) -> None:
    """Catches an image or an instruction that does not arrive."""
    url = "http://127.0.0.1:9/cat.png"
    pictures = [f"data:image/png;base64,{PIXEL}", url]
    content: list[Any] = [{"type": "input_text", "text": "What is it?"}]
    content += [{"type": "input_image", "image_url": picture, "detail": "auto"} for picture in pictures]
    given_input: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"type": "message", "role": "user", "content": content},
    ]
    async with asking([Reply.text("a cat")]) as (client, fake):
        answer = await ask(client, f"{back}:fake-model", instructions="Be brief.", input=given_input)
    assert answer.output_text == "a cat"
    seen = fake.requests[0]
    assert fake.refused == []
    for wanted in (PIXEL, url, "Be brief.", "Be kind."):
        assert wanted in seen.text
    assert seen.last_text == "What is it?"


async def test_the_built_in_model_answers_too() -> None:
    """Catches a front that only works over HTTP providers."""
    async with asking([]) as (client, fake):
        answer = await ask(client, "extractive", stream=True, input="What is in a name?")
    assert answer.status == "completed"
    assert answer.output_text
    assert fake.requests == []


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_probabilities_of_tokens(stream: bool, top: int, chunk_bytes: int | None) -> None:
    """Catches probabilities that are lost or beside the wrong token, and answers that cannot go back."""
    text = "Grüße 🙂 of 4"
    reply = Reply.text(text, chunk_chars=2, chunk_bytes=chunk_bytes)
    wanted: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": top}
    async with asking([reply, reply, reply]) as (client, fake):
        model = "openai:fake-model"
        answer = await ask(client, model, stream=stream, **wanted)
        history: list[Any] = [{"role": "user", "content": "hi"}, *answer.output]
        again = await ask(client, model, input=[*history, {"role": "user", "content": "and now?"}])
        deltas = [
            event
            async for event in await client.responses.create(model=model, input="hi", stream=True, **wanted)
            if event.type == "response.output_text.delta"
        ]
    told = answer.output[0].content[0].logprobs
    assert "".join(entry.token for entry in told) == answer.output_text == text
    assert b"".join(bytes(entry.bytes) for entry in told).decode() == text
    assert [entry.logprob for entry in told] == [-(n + 1) / 8 for n in range(len(told))]
    assert [len(entry.top_logprobs) for entry in told] == [top] * len(told)
    if top:
        assert [entry.top_logprobs[0].token for entry in told] == [entry.token for entry in told]
    assert answer.top_logprobs == top
    assert [[entry.token for entry in event.logprobs] for event in deltas] == [
        [event.delta] for event in deltas
    ]
    assert again.output[0].content[0].logprobs == []
    assert [seen.body.get("logprobs") for seen in fake.requests] == [True, None, True]
    assert [seen.body.get("top_logprobs") for seen in fake.requests] == [top or None, None, top or None]
    assert fake.refused == []


CHECKED = GatewayPolicies.model_validate(
    {
        "routes": {
            "checked": {
                "targets": [{"model": "openai:fake-model"}],
                "escalation": {"checker": "length", "options": {"min_chars": 1}},
            }
        },
        "cache": {"mode": "exact"},
    }
)


@pytest.mark.parametrize("stream", [False, True])
async def test_probabilities_of_tokens_in_chat(stream: bool) -> None:
    """Catches a checker, or the cache behind it, that costs an OpenAI client its probabilities."""
    text = "Grüße 🙂 of 4"
    async with asking([Reply.text(text, chunk_chars=2)], policies=CHECKED) as (client, fake):
        told = [await _chat_logprobs(client, stream, top_logprobs=2) for _ in range(2)]
        for wrong in ({"logprobs": False, "top_logprobs": 1}, {"top_logprobs": 21}):
            with pytest.raises(openai.BadRequestError) as caught:
                await _chat_logprobs(client, stream, **wrong)
            assert caught.value.param == "top_logprobs"
    assert told[0] == told[1], "the second one is the cache's"
    assert "".join(entry.token for entry in told[0]) == text
    assert [entry.logprob for entry in told[0]] == [-(n + 1) / 8 for n in range(len(told[0]))]
    assert {len(entry.top_logprobs) for entry in told[0]} == {2}
    assert [(seen.body["logprobs"], seen.body["top_logprobs"]) for seen in fake.requests] == [(True, 2)]
    assert fake.refused == []


async def _chat_logprobs(client: openai.AsyncOpenAI, stream: bool, **more: Any) -> list[Any]:
    about: dict[str, Any] = {"model": "checked", "messages": [{"role": "user", "content": "hi"}]}
    about |= {"logprobs": True, **more}
    if not stream:
        return (await client.chat.completions.create(**about)).choices[0].logprobs.content
    return [
        entry
        async for chunk in await client.chat.completions.create(stream=True, **about)
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]


# Errors


async def test_wrong_keys_and_missing_scopes() -> None:
    """Catches a call without a valid key, and errors that the SDK cannot classify."""
    with FakeProvider([], api_key="upstream-key") as fake:
        async with gateway_at(fake.openai_url, fake.anthropic_url) as url:
            for key, kind in (
                ("wrong", openai.AuthenticationError),
                ("poor", openai.PermissionDeniedError),
                ("busy", openai.RateLimitError),
            ):
                async with client_of(url, key) as client:
                    with pytest.raises(kind):
                        await ask(client, "openai:fake-model")
                    with pytest.raises(kind):
                        await client.embeddings.create(model="local", input="x")
    assert fake.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("back", BACKS)
async def test_errors_of_the_provider(back: str, stream: bool) -> None:
    """Catches a refusal that reaches the client with another class, without its reason or its pause."""
    # The last two say something of the gateway's key, which rests after them.
    replies = [
        Reply.error(500, "it broke"),
        Reply.error(400, "temperature is too warm"),
        Reply.error(429, "slow down", retry_after="9"),
    ]
    model = f"{back}:fake-model"
    async with asking(replies, models=["fake-model"]) as (client, _):
        with pytest.raises(openai.NotFoundError, match="not configured"):
            await ask(client, "openrouter:no/key", stream=stream)
        with pytest.raises(openai.InternalServerError, match="it broke"):
            await ask(client, model, stream=stream)
        with pytest.raises(openai.BadRequestError, match="too warm"):
            await ask(client, model, stream=stream)
        with pytest.raises(openai.RateLimitError, match="slow down") as limited:
            await ask(client, model, stream=stream)
        assert limited.value.response.headers["retry-after"] == "9"
    async with asking([Reply.error(401, "your upstream-key is revoked")]) as (client, _):
        # The gateway's own key is wrong, which is not the caller's fault and must not be shown to it.
        with pytest.raises(openai.InternalServerError) as keyless:
            await ask(client, model, stream=stream)
        assert "upstream-key" not in str(keyless.value)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"background": True}, "background"),
        ({"extra_body": {"not_known_yet": 1}}, "not_known_yet"),
        ({"include": ["message.output_text.logprobs"]}, "logprobs"),
        ({"top_logprobs": 2}, "logprobs"),
    ],
)
async def test_what_cannot_be_translated_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    """Catches a setting that is dropped without a word."""
    async with asking([Reply.text("never")]) as (client, fake):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, "anthropic:fake-model", **more)
    assert caught.value.param == field
    assert fake.requests == []


# Streams that end badly


@pytest.mark.parametrize("fault", ["truncated", "no_terminal", "broken_json", None])
@pytest.mark.parametrize("back", BACKS)
async def test_a_broken_stream_is_not_taken_for_complete(back: str, fault: Any) -> None:
    """Catches half an answer that ends like a whole one, and an error that the SDK does not raise."""
    text = "an answer of many words that breaks off"
    reply = Reply.text(text, chunk_chars=3, fault=fault, stream_error=None if fault else "server_error")
    async with asking([reply]) as (client, _):
        seen: list[Any] = []
        with pytest.raises(openai.APIError) as caught:
            await _read(client, f"{back}:fake-model", seen)
    assert not isinstance(caught.value, openai.APIConnectionError)
    assert text.startswith("".join(e.delta for e in seen if e.type == "response.output_text.delta"))
    kinds = [event.type for event in seen]
    assert "response.completed" not in kinds
    # What breaks within the first bytes has a status of its own, and no stream.
    assert kinds[-1:] in ([], ["response.failed"])
    assert fault in ("broken_json", None) or kinds


async def _read(client: openai.AsyncOpenAI, model: str, seen: list[Any]) -> None:
    """Read a stream to its end, noting its events."""
    async for event in await client.responses.create(model=model, input="hi", stream=True):
        seen.append(event)  # noqa: PERF401 - kept when it breaks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("back", BACKS)
async def test_a_client_that_leaves_ends_the_call_upstream(back: str, stream: bool) -> None:
    """Catches a provider that keeps writing, and billing, for nobody."""
    reply = Reply.broken("hang_mid" if stream else "hang", text="word " * 20)
    seen: list[Any] = []
    async with asking([reply]) as (client, fake):
        model = f"{back}:fake-model"
        task = asyncio.create_task(_read(client, model, seen) if stream else ask(client, model))
        async with asyncio.timeout(WAIT_S):
            while not (seen if stream else fake.requests):
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.wait_until_left, WAIT_S)


# The same format on both sides


class Vendor:
    """An endpoint that gives prepared bytes and keeps what it was sent."""

    def __init__(self, answer: bytes, content_type: str = "application/json") -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._answer = answer
        self._content_type = content_type

    @asynccontextmanager
    async def at(self) -> AsyncIterator[str]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.sent.append((request.path, await request.read()))
            response = web.StreamResponse(headers={"content-type": self._content_type})
            await response.prepare(request)
            for at in range(0, len(self._answer), 5):
                await response.write(self._answer[at : at + 5])
            await response.write_eof()
            return response

        app = web.Application()
        app.router.add_post("/v1/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()


USAGE = {
    "input_tokens": 1000,
    "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 0},
    "output_tokens": 100,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 1100,
}
ENDED = {
    "id": "resp_x",
    "status": "completed",
    "model": "gpt-x",
    "output": [],
    "usage": USAGE,
    "not_known_yet": [1.0],
}
EVENTS: list[dict[str, Any]] = [
    {"type": "response.created", "response": {**ENDED, "status": "in_progress", "usage": None}},
    {"type": "response.not_known_yet", "x": "ü"},
    {"type": "response.completed", "response": ENDED},
]


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_pass_through_to_those_who_speak_them(stream: bool) -> None:
    """Catches a request or an answer rewritten although both sides speak Responses, or one unrecorded."""
    if stream:
        answer = b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in EVENTS)
        vendor = Vendor(answer, "text/event-stream")
    else:
        answer = json.dumps(ENDED, indent=1).encode()
        vendor = Vendor(answer)
    sent = (
        '{ "tools":[{"type":"web_search"}], "previous_response_id": "resp_1", "input" : "\\u00fc",'
        f'"model"  :"openai:gpt-x","stream":{str(stream).lower()}\n}}'
    )
    headers = {"authorization": "Bearer good", "content-type": "application/json"}
    async with (
        vendor.at() as vendor_url,
        gateway_at(vendor_url, responses=True, prices_usd_per_mtok={"gpt-x": (1.0, 10.0)}) as url,
        aiohttp.ClientSession() as session,
    ):
        with capture_logs() as logs:
            async with session.post(f"{url}/v1/responses", data=sent, headers=headers) as got:
                assert got.status == 200
                body = await got.read()
        later = json.dumps({"model": "openai:gpt-x", "input": "hi", "background": True})
        async with session.post(f"{url}/v1/responses", data=later, headers=headers) as refused:
            # Its answer could not be fetched here, nor priced.
            assert refused.status == 400
            assert (await refused.json())["error"]["param"] == "background"
    assert body == answer
    assert vendor.sent == [("/v1/responses", sent.replace("openai:gpt-x", "gpt-x").encode())]
    done = next(entry for entry in logs if entry["event"] == "completion_finished")
    assert (done["input_tokens"], done["output_tokens"], done["cache_read_tokens"]) == (1000, 100, 10)
    assert done["cost_usd"] > 0


async def test_a_passing_stream_that_breaks_is_ended_by_an_error() -> None:
    """Catches a stream of the vendor's that stops short and ends like a whole one."""
    half = b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in EVENTS[:2])
    async with (
        Vendor(half, "text/event-stream").at() as vendor_url,
        gateway_at(vendor_url, responses=True) as url,
        client_of(url) as client,
    ):
        with pytest.raises(openai.APIError, match="incomplete"):
            async for _ in await client.responses.create(model="openai:gpt-x", input="hi", stream=True):
                pass


# Embeddings


async def test_the_platforms_own_embedder_answers_the_sdk() -> None:
    """Catches vectors in another order or of other values than the embedder's, in either encoding."""
    embedder = HashedNgramEmbedder()
    texts = ["a cat sat", "Zürich 🙂", "the third"]
    expected = await embedder.embed(texts)
    async with asking([]) as (client, _):
        packed = await client.embeddings.create(model="local", input=texts)
        plain = await client.embeddings.create(
            model=embedder.id, input=texts, encoding_format="float", dimensions=embedder.dimension
        )
        single = await client.embeddings.with_raw_response.create(model="local", input=texts[1], user="u")
        raw = await client.embeddings.with_raw_response.create(
            model="local", input=texts[0], encoding_format="base64"
        )
    for answer in (packed, plain):
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert answer.model == embedder.id
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
        np.testing.assert_array_equal(
            np.array([entry.embedding for entry in answer.data], dtype=np.float32), expected
        )
    assert single.headers[SEMANTIC_HEADER] == ("true" if embedder.semantic else "false")
    np.testing.assert_array_equal(np.array(single.parse().data[0].embedding, dtype=np.float32), expected[1])
    written = json.loads(raw.content)["data"][0]["embedding"]
    assert base64.b64decode(written) == expected[0].astype("<f4").tobytes()


async def test_local_embeddings_are_held_to_the_rules_of_every_call(tmp_path: Path) -> None:
    """Catches calls to the platform's own embedder that no limit, budget, guardrail or ledger sees."""
    embedder = HashedNgramEmbedder().id
    # A thousand tokens, and at most the bytes of the body and a kilobyte more: a second one finds too little.
    text, tokens = "word " * 800, 1000
    rules = GatewayPolicies.model_validate(
        {
            "limits": [{"scope": "key", "requests_per_minute": 3}],
            "budgets": [{"scope": "tenant", "limit_usd": 0.006, "period": "total"}],
            "guardrails": [{"name": "max-size", "options": {"characters_max": 9000}}],
        }
    )
    told: dict[str, Any] = {"policies": rules, "data_dir": tmp_path}
    prices = {f"local:{embedder}": (1.0, 0.0)}
    async with (
        gateway_at("http://127.0.0.1:9", prices_usd_per_mtok=prices, **told) as url,
        client_of(url) as client,
    ):
        embed = client.embeddings.with_raw_response.create
        with pytest.raises(openai.PermissionDeniedError, match="max-size"):
            await embed(model="local", input="x" * 9001)
        done = await embed(model=embedder, input=text, extra_headers={"x-agentic-flow-agent": "reader"})
        assert done.headers["x-ratelimit-remaining-requests"] == "2"
        with pytest.raises(openai.APIStatusError, match="budget") as spent:
            await embed(model="local", input=text)
        assert spent.value.status_code == 402
    async with gateway_at("http://127.0.0.1:9", **told) as url, client_of(url) as client:
        # Without a price of the operator's own it is free.
        for _ in range(3):
            await client.embeddings.create(model="local", input=text)
        with pytest.raises(openai.RateLimitError) as limited:
            await client.embeddings.create(model="local", input=text)
        assert int(limited.value.response.headers["retry-after"]) >= 1

    database = gateway_database(GatewaySettings(), tmp_path)
    try:
        report = usage_report(database, "t", ("provider", "model", "agent", "status"), 0, 1e12, 9)
    finally:
        database.close()
    rows = {(row.keys["status"], row.keys["agent"]): row for row in report.rows}
    assert {(row.keys["provider"], row.keys["model"]) for row in report.rows} == {("local", embedder)}
    assert rows["ok", "reader"].cost_nano_usd == tokens * 1000
    assert (rows["ok", ""].calls, rows["ok", ""].input_tokens, rows["ok", ""].cost_usd) == (3, 3 * tokens, 0)
    refused = {status: row.calls for (status, _), row in rows.items() if status != "ok"}
    assert refused == {"policy_denied": 1, "budget_exceeded": 1, "rate_limited": 1}


async def test_embeddings_pass_through_to_providers() -> None:
    """Catches an answer that is rewritten, uncounted tokens, and a name that is not the provider's."""
    vector = base64.b64encode(np.array([0.5, -1.0], dtype="<f4").tobytes()).decode()
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector, "extra": 1}],
        "model": "e-1",
        "usage": {"prompt_tokens": 2000, "total_tokens": 2000},
    }
    vendor = Vendor(json.dumps(answer).encode())
    async with vendor.at() as vendor_url, gateway_at(vendor_url) as url, client_of(url) as client:
        with capture_logs() as logs:
            got = await client.embeddings.create(model="openai:e-1", input=[1, 2, 3], dimensions=2)
    assert got.data[0].embedding == [0.5, -1.0]
    path, body = vendor.sent[0]
    assert path == "/v1/embeddings"
    sent = json.loads(body)
    assert (sent["model"], sent["input"], sent["dimensions"]) == ("e-1", [1, 2, 3], 2)
    done = next(entry for entry in logs if entry["event"] == "completion_finished")
    assert (done["input_tokens"], done["output_tokens"]) == (2000, 0)


@pytest.mark.parametrize(
    ("about", "status", "field", "said"),
    [
        ({"model": "anthropic:fake-model", "input": "x"}, 400, "model", "local"),
        ({"model": "extractive", "input": "x"}, 400, "model", "local"),
        ({"model": "openrouter:no/key", "input": "x"}, 404, None, "not configured"),
        ({"model": "local", "input": [1, 2]}, 400, "input", "input"),
        ({"model": "local", "input": "x", "dimensions": 3}, 400, "dimensions", "dimension"),
        ({"model": "local", "input": ["x"] * (INPUTS_MAX + 1)}, 413, "input", str(INPUTS_MAX)),
    ],
)
async def test_embeddings_that_cannot_be_had_are_refused_by_name(
    about: dict[str, Any], status: int, field: str | None, said: str
) -> None:
    """Catches vectors of something else, and refusals that do not say what would help."""
    async with asking([]) as (client, fake):
        with pytest.raises(openai.APIStatusError, match=said) as caught:
            await client.embeddings.create(**about)
    assert caught.value.status_code == status
    assert caught.value.param == field
    assert fake.requests == []


# Whatever arrives

NAMES = st.sampled_from(
    "input model stream tools tool_choice text reasoning metadata instructions max_output_tokens role "
    "content type name call_id output arguments message function_call reasoning encoding_format dimensions "
    "store include background user format local".split()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)
MODELS = st.sampled_from(["openai:fake-model", "anthropic:fake-model", "extractive", "local", "nobody"])
BODIES = st.binary(max_size=40) | st.builds(
    lambda model, more, whole: json.dumps(
        {**({"input": "hi"} if whole else {}), "model": model, **more}
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
    headers = {"authorization": "Bearer good"}
    with FakeProvider(lambda seen: Reply.text("{}"), api_key="upstream-key") as fake:
        async with (
            gateway_at(fake.openai_url, fake.anthropic_url) as url,
            aiohttp.ClientSession(url, headers=headers) as session,
        ):
            for body in bodies:
                for path in ("/v1/responses", "/v1/embeddings"):
                    async with asyncio.timeout(WAIT_S), session.post(path, data=body) as answer:
                        content = await answer.read()
                    # The fake provider has no embeddings: an endpoint without them is a 502 with its reason.
                    known = (200, 400, 404, 502) if path == "/v1/embeddings" else (200, 400, 404)
                    assert answer.status in known, (path, body, content)
                    if answer.status != 200:
                        assert "error" in json.loads(content)
