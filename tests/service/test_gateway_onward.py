"""A stream whose pieces are handed on in the loop's own callbacks: over a socket, by whoever takes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import CompletionRequest, Message, StreamEnd, TextDelta, TextPart
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.metrics import GatewayMetrics
from agentic_flow.gateway.questions import BodyQuestion, Destination, Question, TypedQuestion
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.walk import Walk
from agentic_flow.gateway.wire.passing import PassingRequest
from agentic_flow.testing.fake_provider import FakeProvider, Reply

pytestmark = pytest.mark.anyio
EACH_WAY = pytest.mark.parametrize("passes", [False, True], ids=["translated", "passed"])
TEXT = "every word of it arrives once and in its place"
# A piece of a stream comes by itself: the provider writes in the very loop that takes it, so that a machine
# which stands still joins no two of them.
SLOWLY: dict[str, Any] = {"chunk_delay_s": 0.01}
# A fault leaves half of a stream, which comes in these pieces.
HALF: dict[str, Any] = {"text": TEXT, "chunk_bytes": 200, **SLOWLY}
WAIT_S = 60.0


class Passing(BodyQuestion):
    """A request in OpenAI's format, which passes to the provider as it is."""

    def request(self) -> CompletionRequest:
        raise AssertionError("nothing is translated")

    def passing(self, destination: Destination) -> PassingRequest:
        return PassingRequest("/chat/completions", {}, self._body, self._sent, stream=True)


def question(passes: bool) -> Question:
    if not passes:
        message = Message(role="user", parts=(TextPart(text="a question"),))
        return TypedQuestion(CompletionRequest(model="openai:m", messages=(message,)), stream=True)
    sent: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "a question"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Passing(json.dumps(sent).encode(), sent, "openai:m", wire="openai", stream=True)


@asynccontextmanager
async def provider(reply: Reply) -> AsyncIterator[str]:
    """A provider in this event loop; its URL."""
    started: Future[str] = Future()
    serving = asyncio.create_task(FakeProvider([reply]).serve(started))
    try:
        yield await asyncio.wrap_future(started)
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


@asynccontextmanager
async def walking(reply: Reply, passes: bool) -> AsyncIterator[tuple[Walk, CollectorRegistry]]:
    async with provider(reply) as url:
        told = {"openai": {"base_url": f"{url}/v1", "api_key": "k"}, "attempts": 1}
        registry = CollectorRegistry()
        settings = GatewaySettings.model_validate(told)
        async with Gateway(settings, metrics=GatewayMetrics(registry)) as gateway:
            deadline = Deadline.after(WAIT_S)
            yield gateway.walk(question(passes), principal=LOCAL_OWNER, deadline=deadline), registry


def written(pieces: list[Any]) -> str:
    """The text of events of ours, or of bytes that passed."""
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    for line in b"".join(piece for piece in pieces if isinstance(piece, bytes)).splitlines():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            text += "".join(choice["delta"].get("content") or "" for choice in choices)
    return text


class Taker:
    """Takes pieces; after each of them it must be waited for when it is `slow`."""

    def __init__(self, *, slow: bool) -> None:
        self.pieces: list[Any] = []
        self.handed_on = 0
        self.waits = 0
        self.came = asyncio.Event()
        self._slow = slow
        self._full = False

    def put(self, piece: Any) -> bool:
        assert not self._full, "what is full is waited for"
        self.pieces += piece if isinstance(piece, list) else [piece]
        self.handed_on += 1
        self.came.set()
        self._full = self._slow
        return not self._full

    async def drained(self) -> None:
        self.waits += 1
        await asyncio.sleep(0)
        self._full = False

    async def take(self, walk: Walk) -> None:
        async with aclosing(walk.stream()) as events:
            self.pieces.append(await anext(events))
            walk.onward.open(self.put, self.drained)
            async for event in events:
                self.pieces.append(event)


@EACH_WAY
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
async def test_every_piece_goes_on_once_and_in_its_place(passes: bool, slow: bool) -> None:
    """Catches pieces lost, doubled or overtaken, a full way out that is put into, an end that is missed."""
    taker = Taker(slow=slow)
    async with walking(Reply.text(TEXT, **SLOWLY), passes) as (walk, registry):
        await taker.take(walk)
    assert written(taker.pieces) == TEXT
    assert taker.handed_on >= 3
    assert taker.waits == (taker.handed_on if slow else 0)
    if passes:
        assert taker.pieces[-1].endswith(b"data: [DONE]\n\n")
    else:
        assert isinstance(taker.pieces[-1], StreamEnd)
        assert taker.pieces[-1].completion.text == TEXT
    found = tokens(registry)
    assert (found["input"], found["output"]) == (20.0, 10.0)


@EACH_WAY
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
async def test_a_stream_that_breaks_off_while_it_is_handed_on_is_an_error(passes: bool, slow: bool) -> None:
    """Catches half an answer that ends as if it were whole, and one that is not billed."""
    taker = Taker(slow=slow)
    async with walking(Reply.broken("truncated", **HALF), passes) as (walk, registry):
        with pytest.raises(AgenticFlowError):
            await taker.take(walk)
    assert TEXT.startswith(written(taker.pieces))
    assert taker.handed_on > 0
    assert tokens(registry)["output"] > 0


@EACH_WAY
async def test_who_leaves_ends_what_is_handed_on(passes: bool) -> None:
    """Catches a call to a provider that outlives its caller, and one that nobody books."""
    taker = Taker(slow=False)
    async with walking(Reply.broken("hang_mid", **HALF), passes) as (
        walk,
        registry,
    ):
        call = asyncio.ensure_future(taker.take(walk))
        async with asyncio.timeout(WAIT_S):
            await taker.came.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        handed_on = taker.handed_on
    assert taker.handed_on == handed_on
    assert tokens(registry)["output"] > 0


def tokens(registry: CollectorRegistry) -> dict[str, float]:
    """What the metrics counted, by kind."""
    return {
        sample.labels["kind"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "agentic_flow_gateway_tokens_total"
    }
