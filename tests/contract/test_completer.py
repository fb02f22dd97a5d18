"""The Completer contract on the gateway over both wire formats, the extractive model, and the HTTP twin."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.settings import GatewaySettings, PeerSettings, ProviderSettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.remote import RemoteGateway
from agentic_flow.gateway.routes import build_routes
from agentic_flow.gateway.service import Gateway
from agentic_flow.testing.completer_contract import CompleterCase, run_all
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio


def settings_for(fake: FakeProvider) -> GatewaySettings:
    return GatewaySettings.model_validate(
        {
            "anthropic": {"base_url": fake.anthropic_url, "api_key": "key-a"},
            "openai": {"base_url": fake.openai_url, "api_key": "key-o"},
            "openrouter": ProviderSettings(base_url=fake.openai_url),
            "backoff_s": 0.0,
            "attempts": 2,
        }
    )


class Player:
    """A script whose next replies a check sets."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def play(self, replies: list[Reply]) -> None:
        assert not self.replies, "the check before left replies that nobody asked for"
        self.replies = list(replies)

    def __call__(self, request: SeenRequest) -> Reply:
        return self.replies.pop(0)


@asynccontextmanager
async def near_or_far(gateway: Gateway, far: bool) -> AsyncGenerator[Gateway | RemoteGateway]:
    if not far:
        yield gateway
        return

    async def ready() -> dict[str, bool]:
        return {"gateway": True}

    app = create_app(
        "platform", build_routes(gateway), authenticator=NoCredentials(), settings=Settings(), ready=ready
    )
    async with serving(app) as (url,), RemoteGateway(url, PeerSettings()) as remote:
        yield remote


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("model", ["anthropic:fake-model", "openai:fake-model"])
async def test_providers_over_http(model: str, stream: bool, far: bool) -> None:
    """Catches any difference between wire formats, streaming or not, in process or remote."""
    player = Player()
    with FakeProvider(player, models=["fake-model"]) as fake:
        async with Gateway(settings_for(fake)) as gateway, near_or_far(gateway, far) as completer:
            ran = await run_all(CompleterCase(completer, model, player.play, stream))
        assert len(ran) == 12
        malformed = [refused for refused in fake.refused if refused.status != 404]
        assert not malformed, "the vendor would have refused these requests"


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
async def test_extractive_model(far: bool) -> None:
    """Catches the keyless model behaving unlike a provider, in process or remote."""
    async with Gateway(GatewaySettings()) as gateway, near_or_far(gateway, far) as completer:
        assert len(await run_all(CompleterCase(completer, "extractive"))) == 7
