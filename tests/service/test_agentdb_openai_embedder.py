"""The OpenAI embedder against a real server that errs in every way a script can say."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from pydantic import SecretStr

from agentic_flow.agentdb.embedders.openai import CALLS_AT_ONCE, OpenAIEmbedder
from agentic_flow.agentdb.embedders.registry import open_embedder
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import (
    AgenticFlowError,
    CircuitOpen,
    DeadlineExceeded,
    InvalidInput,
    InvalidSettings,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
    UnknownModel,
)
from agentic_flow.core.settings import AgentDBSettings, EmbeddingSettings
from agentic_flow.testing.fake_embeddings import FakeEmbeddings, Fault, Reply, vector_of

pytestmark = pytest.mark.anyio

TEXTS = ("red fox", "blue whale", "green frog")


class Hurried(SystemClock):
    """A clock that stands still, whatever the machine's speed: pauses are written down instead of waited for,
    and each takes `pause_takes_s` of its time."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []
        self.pause_takes_s = 0.0
        self._now_s = super().monotonic_s()

    def monotonic_s(self) -> float:
        return self._now_s

    async def sleep(self, duration_s: float) -> None:
        self.pauses_s.append(duration_s)
        self._now_s += self.pause_takes_s
        await asyncio.sleep(0)


class Opened:
    """An embedder on a fake; closed on exit."""

    def __init__(self, fake: FakeEmbeddings | None = None, **settings: Any) -> None:
        if fake is not None:
            settings.setdefault("base_url", fake.base_url)
        settings.setdefault("model", "a-model")
        self.clock = Hurried()
        self.embedder = OpenAIEmbedder(EmbeddingSettings(**settings), clock=self.clock, rng=random.Random(7))

    async def __aenter__(self) -> Opened:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.embedder.close()


def expected(texts: tuple[str, ...], dimension: int) -> np.ndarray:
    """What the fake's vectors are at unit length."""
    vectors = np.stack([vector_of(text, dimension) for text in texts]).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# What is asked


@pytest.mark.parametrize("base64", ["honours", "ignores", "refuses"])
async def test_both_encodings_give_the_same_vectors(base64: Any) -> None:
    """Catches a server without base64 that cannot be used, or one asked for it again after it refused."""
    with FakeEmbeddings(dimension=8, base64=base64) as fake:
        async with Opened(fake) as opened:
            assert await opened.embedder.embed(TEXTS) == pytest.approx(expected(TEXTS, 8), abs=1e-6)
            await opened.embedder.embed(TEXTS)
        asked = ["encoding_format" in request.body for request in fake.requests]
        # The first request is the probe for the dimension.
        assert asked == {"refuses": [True, False, False, False]}.get(base64, [True, True, True])
        assert fake.requests[-1].body["model"] == "a-model"
        assert "dimensions" not in fake.requests[-1].body


async def test_dimensions_are_asked_for_when_set() -> None:
    """Catches a set dimension that the endpoint never hears of, and a probe that is not needed."""
    with FakeEmbeddings(dimension=64) as fake:
        async with Opened(fake, dimension=8) as opened:
            assert (opened.embedder.dimension, opened.embedder.id) == (8, "openai:a-model-8")
            assert (await opened.embedder.embed(TEXTS)).shape == (3, 8)
        assert [request.body["dimensions"] for request in fake.requests] == [8]


async def test_a_server_that_refuses_dimensions_is_asked_without() -> None:
    """Catches a model of fixed dimension that cannot be named in the settings."""
    with FakeEmbeddings(dimension=8, dimensions="refuses", base64="refuses") as fake:
        async with Opened(fake, dimension=8) as opened:
            assert (await opened.embedder.embed(TEXTS)).shape == (3, 8)
        assert len(fake.requests) == 3
        assert set(fake.requests[-1].body) == {"model", "input"}


@pytest.mark.parametrize("dimensions", ["ignores", "refuses"])
async def test_another_dimension_than_the_set_one_is_an_error(dimensions: Any) -> None:
    """Catches vectors of another dimension stored under an id that promises this one."""
    with FakeEmbeddings(dimension=64, dimensions=dimensions) as fake:
        async with Opened(fake, dimension=8) as opened:
            with pytest.raises(ProviderRejected, match="answers with 64 numbers a vector") as caught:
                await opened.embedder.embed(TEXTS)
            assert "agentdb.embedding.dimension to 64" in (caught.value.hint or "")


async def test_a_dimension_is_learned_or_known() -> None:
    """Catches an id that is guessed, and a probe for a model whose dimension everybody knows."""
    with FakeEmbeddings(dimension=24) as fake:
        async with Opened(fake) as opened:
            with pytest.raises(InvalidSettings, match="not known yet"):
                _ = opened.embedder.id
            await opened.embedder.prepare()
            await opened.embedder.prepare()
            assert opened.embedder.id == "openai:a-model-24"
            assert len(fake.requests) == 1
        async with Opened(fake, model="text-embedding-3-small") as opened:
            await opened.embedder.prepare()
            assert opened.embedder.id == "openai:text-embedding-3-small-1536"
        assert len(fake.requests) == 1


async def test_batches_are_bounded_and_in_order() -> None:
    """Catches a call with more texts than allowed, too many calls at once, and results that swap places."""
    texts = tuple(f"text {number}" if number % 5 else " " for number in range(60))
    with FakeEmbeddings(dimension=8, base64="ignores") as fake:
        async with Opened(fake, dimension=8, batch_max=3) as opened:
            vectors = await opened.embedder.embed(texts)
        assert max(len(request.texts) for request in fake.requests) == 3
        assert sum(len(request.texts) for request in fake.requests) == 48
        assert 1 <= fake.most_in_flight <= CALLS_AT_ONCE
    wanted = expected(texts, 8)
    wanted[::5] = 0  # a text without any sign is not sent
    assert vectors == pytest.approx(wanted, abs=1e-6)


async def test_a_call_of_nothing_sends_nothing() -> None:
    """Catches an empty request, which every server refuses."""
    with FakeEmbeddings() as fake:
        async with Opened(fake, dimension=16) as opened:
            assert (await opened.embedder.embed([])).shape == (0, 16)
            assert not (await opened.embedder.embed(["", "\n"])).any()
        assert fake.requests == []


async def test_text_that_is_not_unicode() -> None:
    """Catches an encoder's error that does not say which text it was."""
    with FakeEmbeddings() as fake:
        async with Opened(fake, dimension=16) as opened:
            with pytest.raises(InvalidInput, match="text 2 is not Unicode"):
                await opened.embedder.embed(["fine", "", "broken \ud800"])
        assert fake.requests == []


# What goes wrong


@pytest.mark.parametrize(
    "fault", ["broken_json", "truncated", "reset", "empty", "wrong_count", "ragged", "nan", "zeros"]
)
@pytest.mark.parametrize("base64", ["honours", "ignores"])
async def test_a_fault_that_passes_is_tried_again(fault: Fault, base64: Any) -> None:
    """Catches a broken answer that is stored, or that fails a call which a second try saves."""
    with FakeEmbeddings([Reply.broken(fault)] * 2, dimension=8, base64=base64) as fake:
        async with Opened(fake, dimension=8) as opened:
            assert await opened.embedder.embed(TEXTS) == pytest.approx(expected(TEXTS, 8), abs=1e-6)
            assert len(opened.clock.pauses_s) == 2
            assert all(0 <= pause_s <= 1 for pause_s in opened.clock.pauses_s)
        assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("broken_json", ProviderProtocol, "broken JSON"),
        ("truncated", ProviderProtocol, "broke off"),
        ("reset", ProviderFailed, "connection"),
        ("empty", ProviderProtocol, "broken JSON"),
        ("wrong_count", ProviderProtocol, "2 embeddings for 3 texts"),
        ("wrong_dimension", ProviderRejected, "9 numbers a vector"),
        ("ragged", ProviderProtocol, "different sizes"),
        ("nan", ProviderProtocol, "NaN or infinity"),
        ("zeros", ProviderProtocol, "zeros only"),
        ("index_twice", ProviderProtocol, "index 0, wrong or given twice"),
        ("no_index", ProviderProtocol, "index None"),
        ("not_base64", ProviderProtocol, "neither numbers nor base64"),
        ("oversized", ProviderRejected, "is larger than"),
    ],
)
async def test_a_fault_that_stays_is_a_typed_error(
    fault: Fault, kind: type[AgenticFlowError], words: str
) -> None:
    """Catches vectors made of a wrong answer, endless tries, and an error that says nothing."""
    with FakeEmbeddings([Reply.broken(fault)] * 9, dimension=8) as fake:
        async with Opened(fake, dimension=8, attempts=3) as opened:
            with pytest.raises(kind, match=words) as caught:
                await opened.embedder.embed(TEXTS)
        tries = 3 if kind.retryable else 1
        assert len(fake.requests) == tries
        assert caught.value.hint
        assert caught.value.details.get("tries", 1) == tries
        assert caught.value.details["provider"] == fake.base_url.split("/")[2]


async def test_a_shuffled_answer_is_put_in_order() -> None:
    """Catches vectors taken in the order of arrival instead of by their index."""
    with FakeEmbeddings([Reply.broken("shuffled")], dimension=8) as fake:
        async with Opened(fake, dimension=8) as opened:
            assert await opened.embedder.embed(TEXTS) == pytest.approx(expected(TEXTS, 8), abs=1e-6)
        assert len(fake.requests) == 1


async def test_retry_after_is_honoured() -> None:
    """Catches a server that asked for a pause and is hammered instead."""
    script = [Reply.error(429, retry_after="7"), Reply.error(503, retry_after="3"), Reply.error(500)]
    with FakeEmbeddings(script, dimension=8) as fake:
        async with Opened(fake, dimension=8) as opened:
            assert (await opened.embedder.embed(TEXTS)).shape == (3, 8)
            first, second, third = opened.clock.pauses_s
        assert first == 7
        assert second == 3
        assert third <= 2


async def test_a_pause_past_the_deadline_is_not_waited_for() -> None:
    """Catches a caller kept waiting for what is known to fail."""
    with FakeEmbeddings([Reply.error(429, "slow down", retry_after="3600")]) as fake:
        async with Opened(fake, dimension=16) as opened:
            with pytest.raises(ProviderOverloaded, match="after the deadline") as caught:
                await opened.embedder.embed(TEXTS)
            assert opened.clock.pauses_s == []
            assert caught.value.retry_after_s == 3600
        assert len(fake.requests) == 1


@pytest.mark.parametrize("fault", ["hang", "hang_mid"])
async def test_a_stall_ends_at_the_deadline(fault: Fault) -> None:
    """Catches a call that hangs with its server, and an error that hides what was seen before."""
    with FakeEmbeddings([Reply.error(500, "dropped it"), Reply.broken(fault)], dimension=8) as fake:
        async with Opened(fake, dimension=8, timeout_s=60) as opened:
            opened.clock.pause_takes_s = 57.0  # each try has a minute, but for the one that stalls
            with pytest.raises(DeadlineExceeded, match=r"2 tries made; before that: .*dropped it"):
                await opened.embedder.embed(TEXTS)
            # The connection of the stalled answer is not used again.
            assert (await opened.embedder.embed(TEXTS)).shape == (3, 8)


async def test_a_failed_batch_ends_the_others() -> None:
    """Catches calls that go on, and cost money, after the whole has failed."""
    script = [Reply.broken("hang"), Reply.error(400, "no"), *[Reply.broken("hang")] * 8]
    with FakeEmbeddings(script, dimension=8) as fake:
        async with Opened(fake, dimension=8, batch_max=1) as opened:
            with pytest.raises(ProviderRejected, match="no"):
                await opened.embedder.embed([f"text {number}" for number in range(10)])
        assert len(fake.requests) <= CALLS_AT_ONCE + 1


async def test_a_cancelled_call_is_cancelled() -> None:
    """Catches a cancellation that is retried or swallowed, slots that it keeps, and more calls than slots."""
    with FakeEmbeddings([Reply.broken("hang")] * CALLS_AT_ONCE, dimension=8) as fake:
        async with Opened(fake, dimension=8, batch_max=1) as opened:
            call = asyncio.create_task(opened.embedder.embed([f"{n}" for n in range(3 * CALLS_AT_ONCE)]))
            while len(fake.requests) < CALLS_AT_ONCE:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert len(fake.requests) == CALLS_AT_ONCE
            assert (await opened.embedder.embed(TEXTS)).shape == (3, 8)


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (Reply.error(404, "The model 'a-model' does not exist", code="x"), UnknownModel, "'a-model'"),
        (Reply.error(429, "no money", code="insufficient_quota"), ProviderRejected, "no money"),
        (Reply.error(422, "what?"), ProviderRejected, "answered 422: what?"),
        (Reply(redirect_to="http://127.0.0.1:1/v1/embeddings"), ProviderRejected, "answered 307"),
    ],
)
async def test_what_no_retry_can_help_is_asked_once(
    reply: Reply, kind: type[AgenticFlowError], words: str
) -> None:
    """Catches tries that only cost time, and a redirect that carries the key to another host."""
    with FakeEmbeddings([reply]) as fake:
        async with Opened(fake, dimension=16, api_key=SecretStr("key-1")) as opened:
            with pytest.raises(kind, match=words):
                await opened.embedder.embed(TEXTS)
        assert len(fake.requests) == 1


async def test_a_text_that_is_too_long_is_named() -> None:
    """Catches an error about `input[1]` of a batch that the caller never saw."""
    with FakeEmbeddings(text_chars_max=100) as fake:
        async with Opened(fake, dimension=16, batch_max=2) as opened:
            with pytest.raises(TooLarge, match="maximum context length") as caught:
                await opened.embedder.embed(["a", "", "b", "c", "d" * 101])
    assert caught.value.hint == "split text 4 of this call (101 characters)"
    assert caught.value.details["text"] == 4


async def test_an_endpoint_that_is_not_there() -> None:
    """Catches a refused connection that is not retried or not explained, and a circuit that never opens."""
    with socket.socket() as bound:  # taken, but nobody listens
        bound.bind(("127.0.0.1", 0))
        peer = f"127.0.0.1:{bound.getsockname()[1]}"
        async with Opened(base_url=f"http://{peer}/v1", dimension=8, attempts=2) as opened:
            for _ in range(5):
                with pytest.raises(ProviderFailed, match=f"^{peer} could not be reached.* after 2 tries"):
                    await opened.embedder.embed(TEXTS)
            with pytest.raises(CircuitOpen, match=peer):
                await opened.embedder.embed(TEXTS)


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://host/v1",
        "https:///v1",
        "https://host:99999/v1",
        "https://user:password@host/v1",
        "https://host/v1?key=password",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    """Catches an address that fails only at the first call, and one quoted with the password in it."""
    with pytest.raises(InvalidSettings, match=r"agentdb\.embedding\.base_url") as caught:
        OpenAIEmbedder(EmbeddingSettings(base_url=url))
    assert "password" not in f"{caught.value.message} {caught.value.hint}"


# The key


async def test_a_key_file_is_read_again(tmp_path: Path) -> None:
    """Catches a rotated key that needs a restart."""
    file = tmp_path / "key"
    file.write_text("key-1\n")
    with FakeEmbeddings(api_key="key-1") as fake:
        async with Opened(fake, dimension=16, api_key_file=file) as opened:
            await opened.embedder.embed(TEXTS)
            fake.api_key = "key-2"
            with pytest.raises(ProviderRejected, match="answered 401") as caught:
                await opened.embedder.embed(TEXTS)
            assert "api_key" in (caught.value.hint or "")
            (tmp_path / "new").write_text("key-2\n")
            os.replace(tmp_path / "new", file)
            await opened.embedder.embed(TEXTS)
        assert [request.key for request in fake.requests] == ["key-1", "key-1", "key-2"]


async def test_the_key_stays_inside() -> None:
    """Catches a key in a message or a log line, also when the server quotes it."""
    script = [Reply.error(500, "lost key-in-use-1234"), Reply.error(401, "bad key: key-in-use-1234")]
    with structlog.testing.capture_logs() as logs, FakeEmbeddings(script) as fake:
        async with Opened(fake, dimension=16, api_key=SecretStr("key-in-use-1234")) as opened:
            with pytest.raises(ProviderRejected) as caught:
                await opened.embedder.embed(TEXTS)
        assert fake.requests[0].key == "key-in-use-1234"
    assert [line["event"] for line in logs] == ["embedding_retried"]
    assert "key-in-use" not in f"{logs} {caught.value.message} {caught.value.details} {caught.value.hint}"


async def test_a_key_that_no_header_takes() -> None:
    """Catches a pasted line break that ends as an error of the HTTP library, or splits the request."""
    with FakeEmbeddings() as fake:
        async with Opened(fake, dimension=16, api_key=SecretStr("key\r\nx-evil: 1")) as opened:
            with pytest.raises(InvalidSettings, match="api_key") as caught:
                await opened.embedder.embed(TEXTS)
        assert fake.requests == []
    assert "evil" not in caught.value.message


# As the composition root uses it


async def test_opened_by_name() -> None:
    """Catches an embedder that is handed out unprepared, and connections that outlive it."""
    with FakeEmbeddings(dimension=24) as fake:
        settings = AgentDBSettings(
            embedder="openai", embedding=EmbeddingSettings(base_url=fake.base_url, model="a-model")
        )
        async with open_embedder(settings) as embedder:
            assert embedder.id == "openai:a-model-24"
            assert embedder.semantic
            assert (await embedder.embed(TEXTS)).shape == (3, 24)
