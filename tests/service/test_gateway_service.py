"""The gateway on real sockets: choosing by name, listing, plug-ins, scopes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import capture_logs

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import ProviderFailed, Unauthenticated, UnknownModel
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Message,
    ModelInfo,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    Usage,
)
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.metrics import GatewayMetrics
from agentic_flow.gateway.routes import build_routes
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio


def request_for(model: str, **more: Any) -> CompletionRequest:
    return CompletionRequest(
        model=model, messages=(Message(role="user", parts=(TextPart(text="hi"),)),), **more
    )


async def ask(gateway: Gateway, model: str) -> Completion:
    return await gateway.complete(request_for(model), principal=LOCAL_OWNER, deadline=Deadline.after(20))


async def test_an_endpoint_without_a_key_serves_its_first_model_by_default() -> None:
    """Catches Ollama and its kin refused for want of a key, or asked for a model of OpenAI's."""
    with FakeProvider([Reply.text("a"), Reply.text("b")], keyless=True, models=["llama3.1:8b"]) as fake:
        async with Gateway(
            GatewaySettings.model_validate({"openai": {"base_url": fake.openai_url}})
        ) as gateway:
            assert gateway.default_model() == "openai:"
            assert (await ask(gateway, gateway.default_model())).model == "llama3.1:8b"
            assert (await ask(gateway, "llama3.1:8b")).text == "b"
            listed = await gateway.models(principal=LOCAL_OWNER)
        assert [info.id for info in listed] == ["llama3.1:8b", "extractive"]
        assert [seen.body["model"] for seen in fake.requests] == ["llama3.1:8b"] * 2
        assert all("max_tokens" in seen.body for seen in fake.requests)


async def test_bare_names_go_to_their_owners() -> None:
    """Catches a model asked at the wrong vendor, and a local price invented for it."""
    with FakeProvider(lambda seen: Reply.text(seen.wire)) as fake:
        settings = GatewaySettings.model_validate(
            {
                "anthropic": {"base_url": f"{fake.url}/v1", "api_key": "a"},
                "openrouter": {"base_url": fake.openai_url, "api_key": "r"},
                "openai": {"base_url": fake.openai_url, "api_key": "o"},
            }
        )
        async with Gateway(settings) as gateway:
            assert gateway.default_model() == "anthropic:claude-sonnet-5-5"
            served = [
                ((await ask(gateway, name)).provider, fake.requests[-1].body["model"], fake.requests[-1].key)
                for name in ("sonnet", "claude:", "deepseek/deepseek-chat:free", "qwen3", "openrouter:")
            ]
            free = await ask(gateway, "some-local-model")
    assert served == [
        ("anthropic", "claude-sonnet-5-5", "a"),
        ("anthropic", "claude-sonnet-5-5", "a"),
        ("openrouter", "deepseek/deepseek-chat:free", "r"),
        ("openai", "qwen3", "o"),
        ("openrouter", "anthropic/claude-sonnet-5.5", "r"),
    ]
    assert free.usage.cost_usd is None


async def test_a_provider_that_cannot_list_does_not_spoil_the_list() -> None:
    """Catches `models list` failing because one of several providers is down."""
    with FakeProvider(api_key="right") as fake:
        settings = GatewaySettings.model_validate(
            {"anthropic": {"base_url": fake.url, "api_key": "wrong"}, "model": "extractive"}
        )
        async with Gateway(settings) as gateway:
            with capture_logs() as logs:
                listed = await gateway.models(principal=LOCAL_OWNER)
    assert [info.id for info in listed] == ["extractive", "claude-sonnet-5-5"]
    assert not listed[0].generative
    assert listed[1].input_usd_per_mtok == 2.0
    assert [entry["provider"] for entry in logs if entry["event"] == "models_unavailable"] == ["anthropic"]


async def always_ready() -> dict[str, bool]:
    return {}


class Anthropic:
    """An endpoint that answers messages; lists and counts fail. Messages fail as well when told to."""

    def __init__(self) -> None:
        self.down = False
        self.asked: list[str] = []

    @asynccontextmanager
    async def at(self) -> AsyncIterator[str]:
        async def handle(request: web.Request) -> web.Response:
            self.asked.append(request.path)
            if self.down or request.path != "/v1/messages":
                return web.json_response({"type": "error", "error": {"type": "api_error"}}, status=500)
            content = [{"type": "text", "text": "hi"}]
            usage = {"input_tokens": 1, "output_tokens": 1}
            answer = {"type": "message", "role": "assistant", "model": "m", "content": content}
            return web.json_response({**answer, "stop_reason": "end_turn", "usage": usage})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def test_lists_and_counts_have_no_circuit_of_their_own() -> None:
    """Catches circuits that are no model's, a count that opens or closes a model's, and a provider that is
    down and asked for its list, or to count, all the same."""
    vendor, registry = Anthropic(), CollectorRegistry()
    body = {"model": "anthropic:m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}

    def circuits() -> dict[str, float]:
        lines = generate_latest(registry).decode().splitlines()
        found = [line for line in lines if line.startswith("agentic_flow_gateway_breaker_state{")]
        return {re.findall(r'model="([^"]*)"', line)[0]: float(line.split()[-1]) for line in found}

    async with vendor.at() as base_url:
        told = {"anthropic": {"base_url": base_url, "api_key": "k"}, "attempts": 1, "breaker_open_s": 600}
        settings = GatewaySettings.model_validate(told)
        async with Gateway(settings, metrics=GatewayMetrics(registry)) as gateway:
            routes = [*build_routes(gateway), *build_front_routes(gateway)]
            app = create_app(
                "platform", routes, authenticator=OneKey(), settings=Settings(), ready=always_ready
            )
            key = {"authorization": "Bearer good"}
            async with serving(app) as (url,), aiohttp.ClientSession(url, headers=key) as session:

                async def post(path: str) -> int:
                    async with session.post(path, json=body) as answer:
                        return answer.status

                for _ in range(6):
                    assert await post("/v1/messages/count_tokens") in (500, 502)
                    async with session.get("/v1/models") as listed:
                        assert listed.status == 200
                assert (
                    vendor.asked
                    == ["/v1/messages/count_tokens", "/v1/models"] + ["/v1/messages/count_tokens"] * 5
                )
                assert await post("/v1/messages") == 200
                assert circuits() == {"m": 0}
                vendor.down = True
                for _ in range(5):
                    assert await post("/v1/messages") in (500, 502)
                assert circuits() == {"m": 2}
                touched = len(vendor.asked)
                assert await post("/v1/messages/count_tokens") in (503, 529)
                assert len(vendor.asked) == touched


class Parrot:
    """A plug-in provider; its stream breaks when told to."""

    name = "parrot"
    default_model = "grey"
    configured = True
    setup_hint = "nothing to set"

    def owns(self, model: str) -> bool:
        return model == "grey"

    async def models(self, *, deadline: Deadline) -> list[ModelInfo]:
        return [ModelInfo(id="grey", provider="parrot")]

    async def complete(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> Completion:
        return Completion(
            model="grey",
            provider="parrot",
            parts=request.messages[-1].parts,
            stop_reason="end",
            usage=Usage(input_tokens=1_000_000, output_tokens=1_000_000, cost_usd=None),
        )

    async def stream(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> AsyncIterator[StreamEvent]:
        yield TextDelta(text="hi")
        if request.stop:
            raise ProviderFailed("the parrot flew off")
        yield StreamEnd(completion=await self.complete(request, deadline=deadline))


def parrot(settings: GatewaySettings, transport: HttpTransport) -> Parrot:
    return Parrot()


async def test_plug_ins_are_providers_like_any_other() -> None:
    """Catches a plug-in that is not chosen, listed or priced by the user's own prices."""
    settings = GatewaySettings(prices_usd_per_mtok={"grey": (3.0, 4.0)})
    async with Gateway(settings, extra_providers={"parrot": parrot}) as gateway:
        assert gateway.default_model() == "parrot:grey"
        assert (await ask(gateway, "grey")).usage.cost_usd == pytest.approx(7.0)
        assert (await gateway.resolve("grey", principal=LOCAL_OWNER)).generative
        assert not (await gateway.resolve("extractive", principal=LOCAL_OWNER)).generative
        listed = await gateway.models(principal=LOCAL_OWNER)
    assert [info.id for info in listed] == ["grey", "extractive"]


class OneKey:
    async def authenticate(self, credential: str) -> Principal:
        if credential == "good":
            return Principal("t", "s", frozenset({"models:use"}))
        if credential == "poor":
            return Principal("t", "s", frozenset({"runs:read"}))
        raise Unauthenticated("no")


async def test_routes_demand_their_scope_and_report_errors() -> None:
    """Catches models given to a key without the scope, and a broken stream that ends as if complete."""

    async def ready() -> dict[str, bool]:
        return {}

    async with Gateway(GatewaySettings(), extra_providers={"parrot": parrot}) as gateway:
        app = create_app(
            "platform", build_routes(gateway), authenticator=OneKey(), settings=Settings(), ready=ready
        )
        async with serving(app) as (url,), aiohttp.ClientSession(url) as session:
            poor, good = ({"authorization": f"Bearer {key}"} for key in ("poor", "good"))
            for path in ("/v1/complete", "/v1/complete/stream"):
                async with session.post(path, json={}, headers=poor) as answer:
                    assert answer.status == 403
                async with session.post(path, json={"model": "x", "nonsense": 1}, headers=good) as answer:
                    assert answer.status == 400
                huge = {**request_for("grey").model_dump(mode="json"), "seed": 10**30}
                async with session.post(path, json=huge, headers=good) as answer:
                    assert answer.status == 400
            async with session.get("/v1/models", headers=good) as answer:
                body = await answer.json()
            assert body["object"] == "list"
            assert body["data"][0]["owned_by"] == "parrot"
            wanted = request_for("nobody").model_dump(mode="json")
            async with session.post("/v1/complete", json=wanted, headers=good) as answer:
                assert answer.status == UnknownModel("x").status
                assert (await answer.json())["code"] == "unknown_model"
            broken = request_for("grey", stop=("x",)).model_dump(mode="json")
            async with session.post("/v1/complete/stream", json=broken, headers=good) as answer:
                text = await answer.text()
    assert text.count("event: text_delta") == 1
    assert "event: error" in text
    assert "provider_failed" in text
    assert "event: end" not in text
