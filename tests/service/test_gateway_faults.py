"""The gateway against a provider that misbehaves over real HTTP: what is retried, and what is said."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import SYSTEM_CLOCK, Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    CircuitOpen,
    DeadlineExceeded,
    InvalidSettings,
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
    UnknownModel,
)
from agentic_flow.core.messages import CompletionRequest, Message, StreamEvent, TextDelta, TextPart, ToolSpec
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.health import FAILURES_MAX, Health
from agentic_flow.gateway.keyring import RECHECK_S
from agentic_flow.gateway.providers import build_providers
from agentic_flow.gateway.retries import RetryPolicy
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.testing.fake_provider import FakeProvider, Fault, Reply, Script
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio
WIRES = ["anthropic", "openai"]
GOOD = Reply.text("the whole answer")


def gateway_for(fake: FakeProvider, **more: Any) -> Gateway:
    settings: dict[str, Any] = {
        "anthropic": {"base_url": fake.anthropic_url, "api_key": "sk-secret-key"},
        "openai": {"base_url": fake.openai_url, "api_key": "sk-secret-key"},
        "backoff_s": 0.0,
        "attempts": 4,
        "idle_timeout_s": 20.0,  # no machine stands still for so long
        **more,
    }
    return Gateway(GatewaySettings.model_validate(settings))


def request_for(wire: str, *, stream: bool, **more: Any) -> CompletionRequest:
    message = Message(role="user", parts=(TextPart(text="a question"),))
    return CompletionRequest(model=f"{wire}:fake-model", messages=(message,), stream=stream, **more)


async def ask(gateway: Gateway, request: CompletionRequest, timeout_s: float = 20.0) -> str:
    completion = await gateway.complete(
        request, principal=LOCAL_OWNER, deadline=Deadline.after(timeout_s), idempotency_key="step-1"
    )
    return completion.text


async def collect(stream: AsyncIterator[StreamEvent], seen: list[StreamEvent]) -> None:
    """Keep what came before an error."""
    async for event in stream:
        seen.append(event)  # noqa: PERF401 - a comprehension would lose it


async def error_with(script: Script, request: CompletionRequest, **more: Any) -> tuple[AgenticFlowError, int]:
    """The error of a call against this script, and how many requests the provider saw."""
    with FakeProvider(script) as fake:
        async with gateway_for(fake, **more) as gateway:
            try:
                answer = await ask(gateway, request)
            except AgenticFlowError as error:
                return error, len(fake.requests)
    raise AssertionError(f"no error but {answer!r}")


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "bad",
    [
        Reply.error(429, retry_after="0"),
        Reply.error(529),
        Reply.error(500),
        Reply.error(503),
        Reply.broken("broken_json"),
        Reply.broken("truncated"),
        Reply.broken("no_terminal"),
        Reply.broken("reset"),
        Reply.broken("wrong_content_type"),
        Reply.broken("empty"),
    ],
    ids=lambda reply: f"{reply.status}-{reply.fault or ''}",
)
async def test_a_passing_fault_is_retried(bad: Reply, wire: str, stream: bool) -> None:
    """Catches a fault that ends the call although the next try succeeds, and one that passes for success."""
    with FakeProvider([bad, GOOD]) as fake:
        async with gateway_for(fake) as gateway:
            assert await ask(gateway, request_for(wire, stream=stream)) == "the whole answer"
        assert len(fake.requests) == 2
        assert {seen.headers["idempotency-key"] for seen in fake.requests} == {"step-1"}


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (Reply.error(500), ProviderFailed),
        (Reply.error(429), ProviderOverloaded),
        (Reply.broken("broken_json"), ProviderProtocol),
        (Reply.broken("truncated"), ProviderProtocol),
        (Reply.broken("reset"), ProviderFailed),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value.fault or str(value.status),
)
async def test_a_lasting_fault_says_how_often_it_was_tried(
    bad: Reply, kind: type[AgenticFlowError], wire: str, stream: bool
) -> None:
    """Catches endless retries, and a final error that hides provider, tries or status."""
    error, seen = await error_with([bad] * 9, request_for(wire, stream=stream))
    assert type(error) is kind
    assert seen == 4
    assert f"{wire} failed after 4 tries" in error.message
    assert error.details["provider"] == wire
    assert error.details["tries"] == 4
    if bad.status != 200:
        assert error.details["last_status"] == bad.status
        assert "scripted error" in error.message


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, ProviderRejected, "scripted error"),
        (401, ProviderRejected, "_API_KEY"),
        (402, ProviderRejected, "credit"),
        (403, ProviderRejected, "_API_KEY"),
        (404, UnknownModel, "fake-model"),
        (413, ProviderRejected, "scripted error"),
        (422, ProviderRejected, "scripted error"),
    ],
)
async def test_refusals_are_not_retried(
    status: int, kind: type[AgenticFlowError], said: str, wire: str
) -> None:
    """Catches a hopeless call that is repeated, and a refusal without its remedy."""
    error, seen = await error_with([Reply.error(status)] * 4, request_for(wire, stream=True))
    assert type(error) is kind
    assert seen == 1
    assert said in f"{error.message} {error.hint}"


async def test_a_wrong_key_is_named_but_never_shown() -> None:
    """Catches a key quoted by the provider that travels into our logs, and a hint without the variable."""
    with FakeProvider([GOOD], api_key="another") as fake:
        async with gateway_for(fake) as gateway:
            with pytest.raises(ProviderRejected) as caught:
                await ask(gateway, request_for("anthropic", stream=False))
    assert "sk-secret-key" not in caught.value.message
    assert caught.value.hint is not None
    assert "ANTHROPIC_API_KEY" in caught.value.hint


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("fault", ["hang", "hang_mid"])
async def test_silence_ends_at_the_deadline(fault: Fault, stream: bool) -> None:
    """Catches a call that outlives its deadline because the provider neither answers nor closes."""
    with FakeProvider([Reply.broken(fault)] * 9) as fake:
        async with gateway_for(fake) as gateway:
            with pytest.raises(DeadlineExceeded, match="anthropic"):
                await ask(gateway, request_for("anthropic", stream=stream), timeout_s=0.4)


async def test_a_stall_is_cut_at_the_idle_limit_and_retried() -> None:
    """Catches a stalled stream that holds its agent until the total deadline."""
    # More tries than it takes: a machine may stand still for longer than the limit, again and again.
    with FakeProvider([Reply.broken("hang_mid"), Reply.broken("hang"), *[GOOD] * 30]) as fake:
        async with gateway_for(fake, idle_timeout_s=0.3, attempts=32) as gateway:
            assert await ask(gateway, request_for("openai", stream=True), 120) == "the whole answer"
        assert len(fake.requests) >= 3


async def test_an_answer_without_end_is_cut_at_the_size_limit() -> None:
    """Catches memory filled by a provider that never stops sending; trying again would fill it again."""
    for stream in (False, True):
        error, seen = await error_with(
            [Reply.broken("oversized")] * 4,
            request_for("openai", stream=stream),
            response_max_bytes=300_000,
        )
        assert type(error) is TooLarge
        assert seen == 1
        assert "300000" in error.message


async def test_nobody_listens() -> None:
    """Catches a refused connection that is not told apart from an answer."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # held, so that nobody else comes to listen there
        port = bound.getsockname()[1]
        settings = GatewaySettings.model_validate(
            {"openai": {"base_url": f"http://127.0.0.1:{port}/v1"}, "backoff_s": 0.0, "attempts": 2}
        )
        told = "openai failed after 2 tries: openai could not be reached"
        async with Gateway(settings) as gateway:
            with pytest.raises(ProviderFailed, match=told):
                await ask(gateway, request_for("openai", stream=False))


async def test_a_base_url_that_is_no_api_is_named() -> None:
    """Catches a 404 of some other server reported as an unknown model."""
    with FakeProvider() as fake:
        settings = GatewaySettings.model_validate({"openai": {"base_url": f"{fake.url}/elsewhere"}})
        async with Gateway(settings) as gateway:
            with pytest.raises(ProviderRejected) as caught:
                await ask(gateway, request_for("openai", stream=False))
    assert "OPENAI_BASE_URL" in (caught.value.hint or "")


class RecordedPauses:
    """The system's clock, except that pauses are noted instead of slept."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def time_s(self) -> float:
        return SYSTEM_CLOCK.time_s()

    def monotonic_s(self) -> float:
        return SYSTEM_CLOCK.monotonic_s()

    async def sleep(self, duration_s: float) -> None:
        self.pauses.append(duration_s)


class SteppingClock(RecordedPauses):
    """The same, and time has passed after each pause."""

    def time_s(self) -> float:
        return SYSTEM_CLOCK.time_s() + sum(self.pauses)

    def monotonic_s(self) -> float:
        return SYSTEM_CLOCK.monotonic_s() + sum(self.pauses)


@asynccontextmanager
async def stepping(
    clock: SteppingClock, fake: FakeProvider, keys: str = "k", **more: Any
) -> AsyncGenerator[Gateway]:
    """A gateway whose keys, circuits and pauses all go by `clock`."""
    settings = GatewaySettings.model_validate(
        {"openai": {"base_url": fake.openai_url, "api_key": keys}, "backoff_s": 0.5, **more}
    )
    transport = HttpTransport(idle_timeout_s=5.0, response_max_bytes=1_000_000)
    health = Health.of(settings, clock=clock, rng=random.Random(1))
    providers = build_providers(settings, transport, health=health)
    try:
        async with Gateway(settings, providers=providers.values(), clock=clock) as gateway:
            yield gateway
    finally:
        await transport.close()


async def test_retry_after_is_honoured() -> None:
    """Catches a client that hammers a provider which asked for a pause."""
    clock = SteppingClock()
    with FakeProvider([Reply.error(429, retry_after="7"), GOOD]) as fake:
        async with stepping(clock, fake) as gateway:
            assert await ask(gateway, request_for("openai", stream=False), 60) == "the whole answer"
    assert clock.pauses == [7.0]


@pytest.mark.parametrize("status", [401, 402, 403, 429])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
async def test_another_key_takes_over_without_a_pause(status: int, stream: bool) -> None:
    """Catches a call that fails or waits although a second key is free, and a bad key that is used again."""
    clock = SteppingClock()
    bad = Reply.error(status, retry_after="30" if status == 429 else None)

    def answer(seen: SeenRequest) -> Reply:
        return bad if seen.key == "one" else GOOD

    with FakeProvider(answer) as fake:
        async with stepping(clock, fake, "one, two") as gateway:
            for _ in range(4):
                assert await ask(gateway, request_for("openai", stream=stream)) == "the whole answer"
        assert [seen.key for seen in fake.requests] == ["one", "two", "two", "two", "two"]
    assert clock.pauses == []


async def test_a_refused_key_is_probed_by_one_call_and_taken_back() -> None:
    """Catches a key that a passing 401 has taken out of use for good."""
    clock = SteppingClock()
    wrong = {"one"}

    def answer(seen: SeenRequest) -> Reply:
        return Reply.error(401) if seen.key in wrong else GOOD

    with FakeProvider(answer) as fake:
        async with stepping(clock, fake, "one two") as gateway:
            for _ in range(3):
                await ask(gateway, request_for("openai", stream=False))
            wrong.clear()
            await clock.sleep(30)
            for _ in range(4):
                await ask(gateway, request_for("openai", stream=False))
        keys = [seen.key for seen in fake.requests]
    assert keys[:4] == ["one", "two", "two", "two"]
    assert sorted(str(key) for key in keys[4:]) == ["one", "one", "two", "two"]


async def test_a_request_that_every_key_is_forbidden_costs_no_key() -> None:
    """Catches one caller's forbidden request that takes the keys from everybody."""
    clock = SteppingClock()

    def answer(seen: SeenRequest) -> Reply:
        return Reply.error(403) if seen.last_text == "forbidden" else GOOD

    with FakeProvider(answer) as fake:
        async with stepping(clock, fake, "one two") as gateway:
            message = Message(role="user", parts=(TextPart(text="forbidden"),))
            refused = CompletionRequest(model="openai:fake-model", messages=(message,), stream=False)
            with pytest.raises(ProviderRejected):
                await ask(gateway, refused)
            for _ in range(4):
                await ask(gateway, request_for("openai", stream=False))
        assert sorted(str(seen.key) for seen in fake.requests) == ["one"] * 3 + ["two"] * 3


async def test_keys_that_all_rest_say_when_the_first_is_back() -> None:
    """Catches a pause longer than needed, and a provider that is asked although every key rests."""
    clock = SteppingClock()
    pauses = {"one": "40", "two": "9"}

    def answer(seen: SeenRequest) -> Reply:
        return Reply.error(429, retry_after=pauses[str(seen.key)])

    with FakeProvider(answer) as fake:
        async with stepping(clock, fake, "one two", attempts=1) as gateway:
            for _ in range(2):
                with pytest.raises(ProviderOverloaded) as caught:
                    await ask(gateway, request_for("openai", stream=False))
                assert 0 < (caught.value.retry_after_s or 0) <= 9
        assert len(fake.requests) == 2


@pytest.mark.parametrize(
    ("bad", "stream"),
    [
        (Reply.error(500), False),
        (Reply.error(529), True),
        (Reply.broken("reset"), True),
        (Reply.broken("truncated"), True),
        (Reply.broken("broken_json"), False),
        (Reply.broken("no_terminal"), True),
        (Reply.text("half", stream_error="overloaded_error"), True),
    ],
    ids=lambda value: str(value.status) + (value.fault or "") if isinstance(value, Reply) else str(value),
)
async def test_a_provider_that_fails_is_left_alone_and_taken_back(bad: Reply, stream: bool) -> None:
    """Catches a breaker that does not see streams break, that never opens, or that never closes."""
    clock = SteppingClock()
    replies = [bad] * FAILURES_MAX + [GOOD] * 3
    with FakeProvider(replies) as fake:
        async with stepping(clock, fake, attempts=1) as gateway:
            for _ in range(FAILURES_MAX):
                with pytest.raises(ProviderError):
                    await ask(gateway, request_for("openai", stream=stream))
            with pytest.raises(CircuitOpen) as caught:
                await ask(gateway, request_for("openai", stream=stream))
            assert len(fake.requests) == FAILURES_MAX
            assert 0 < (caught.value.retry_after_s or 0) <= 5
            await clock.sleep(5)
            for _ in range(3):
                assert await ask(gateway, request_for("openai", stream=stream)) == "the whole answer"


async def test_what_callers_do_wrong_does_not_open_the_circuit() -> None:
    """Catches one caller's bad requests that close a model to everybody."""
    clock = SteppingClock()
    replies = [Reply.error(400), Reply.error(404), Reply.error(422)] * 4 + [GOOD]
    with FakeProvider(replies) as fake:
        async with stepping(clock, fake, attempts=1) as gateway:
            for _ in range(12):
                with pytest.raises((ProviderRejected, UnknownModel)):
                    await ask(gateway, request_for("openai", stream=False))
            assert await ask(gateway, request_for("openai", stream=False)) == "the whole answer"


async def test_callers_who_leave_do_not_open_the_circuit() -> None:
    """Catches cancelled calls and short deadlines that count as the provider's failures."""
    clock = SteppingClock()
    hangs = [True]
    with FakeProvider(lambda _: Reply.broken("hang") if hangs[0] else GOOD) as fake:

        def seen(*, stream: bool) -> int:
            return sum(request.stream is stream for request in fake.requests)

        async with stepping(clock, fake, attempts=1) as gateway, asyncio.timeout(60):
            for turn in range(1, 7):
                call = asyncio.ensure_future(ask(gateway, request_for("openai", stream=True)))
                while seen(stream=True) < turn:
                    await asyncio.sleep(0.005)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                timeout_s = 0.05
                while seen(stream=False) < turn:  # on a busy machine it may pass before the request is sent
                    with pytest.raises(DeadlineExceeded):
                        await ask(gateway, request_for("openai", stream=False), timeout_s)
                    timeout_s *= 2
            hangs[0] = False
            assert await ask(gateway, request_for("openai", stream=False)) == "the whole answer"


async def test_a_slow_first_token_counts_as_a_failure() -> None:
    """Catches a provider that crawls and is asked on and on."""
    settings = {"slow_call_s": 0.02, "attempts": 1}
    with FakeProvider([Reply.text("late", delay_s=0.05)] * FAILURES_MAX) as fake:
        async with gateway_for(fake, **settings) as gateway:
            for _ in range(FAILURES_MAX):
                assert await ask(gateway, request_for("openai", stream=True)) == "late"
            with pytest.raises(CircuitOpen):
                await ask(gateway, request_for("openai", stream=True))


async def test_a_circuit_that_opens_under_a_call_is_waited_for() -> None:
    """Catches a call that gives up within its retries because its own failures opened the circuit."""
    clock = SteppingClock()
    with FakeProvider([Reply.error(503)] * FAILURES_MAX + [GOOD]) as fake:
        async with stepping(clock, fake, attempts=FAILURES_MAX + 2) as gateway:
            assert await ask(gateway, request_for("openai", stream=False), 90) == "the whole answer"
        assert len(fake.requests) == FAILURES_MAX + 1


async def test_a_pause_past_the_deadline_is_not_waited_for() -> None:
    """Catches time spent waiting for a try that can no longer be made."""
    error, seen = await error_with([Reply.error(429, retry_after="3600")], request_for("openai", stream=True))
    assert type(error) is ProviderOverloaded
    assert seen == 1
    assert error.retry_after_s == 3600
    assert "after the deadline" in error.message


async def test_pauses_grow_with_full_jitter() -> None:
    """Catches retries of many agents that fall on the same moments."""
    clock = RecordedPauses()
    policy = RetryPolicy(6, 1.0, clock, random.Random(1))

    async def fails() -> None:
        raise ProviderFailed("no")

    with pytest.raises(ProviderFailed, match="after 6 tries"):
        await policy.run(fails, provider="p", deadline=Deadline.after(1000))
    assert len(clock.pauses) == 5
    assert all(0 <= pause <= 2**n for n, pause in enumerate(clock.pauses))
    assert len({round(pause, 6) for pause in clock.pauses}) == 5


@pytest.mark.parametrize("wire", WIRES)
async def test_streaming_callers_get_no_retry_after_the_first_event(wire: str) -> None:
    """Catches a stream that starts over after its caller has seen half an answer, or ends as if complete."""
    script = [Reply.error(500), Reply.broken("truncated", text="one two three four " * 20), GOOD]
    seen: list[StreamEvent] = []
    with FakeProvider(script) as fake:
        async with gateway_for(fake) as gateway:
            stream = gateway.stream(
                request_for(wire, stream=True), principal=LOCAL_OWNER, deadline=Deadline.after(20)
            )
            with pytest.raises(ProviderProtocol):
                await collect(stream, seen)
        assert len(fake.requests) == 2, "one retry before the first event, none after it"
    assert seen
    assert all(isinstance(event, TextDelta) for event in seen)


async def test_a_caller_who_leaves_ends_the_call() -> None:
    """Catches connections and tasks left behind by an abandoned stream or a cancelled call."""
    with FakeProvider([Reply.text("word " * 200, chunk_delay_s=0.01), Reply.broken("hang")]) as fake:
        async with gateway_for(fake) as gateway:
            request = request_for("openai", stream=True)
            stream = gateway.stream(request, principal=LOCAL_OWNER, deadline=Deadline.after(20))
            async with aclosing(cast(AsyncGenerator[StreamEvent], stream)) as reading:
                await anext(reading)
            call = asyncio.ensure_future(ask(gateway, request))
            async with asyncio.timeout(20):
                while len(fake.requests) < 2:
                    await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
    gc.collect()  # an unclosed connection would warn here, and warnings are errors


async def test_tool_arguments_that_are_no_object_fail_the_call() -> None:
    """Catches a tool called with a list."""
    tool = ToolSpec(name="t", description="d", input_schema={"type": "object"})
    for wire in WIRES:
        for stream in (False, True):
            bad = Reply.tool_calls([{"name": "t", "arguments": {}}], fault="bad_arguments")
            error, seen = await error_with([bad] * 4, request_for(wire, stream=stream, tools=(tool,)))
            assert type(error) is ProviderProtocol
            assert seen == 4


async def test_missing_usage_is_estimated_and_said() -> None:
    """Catches a call that counts as free because the endpoint reported no usage."""
    for wire in WIRES:
        with FakeProvider([GOOD.but(omit_usage=True)]) as fake, capture_logs() as logs:
            async with gateway_for(fake) as gateway:
                completion = await gateway.complete(
                    request_for(wire, stream=True), principal=LOCAL_OWNER, deadline=Deadline.after(20)
                )
        assert completion.usage.input_tokens == 3
        assert completion.usage.output_tokens == 4
        assert [entry["provider"] for entry in logs if entry["event"] == "usage_estimated"] == [wire]


async def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    """Catches a rotated key that takes a restart, and a file broken by a rotation that stops all calls."""
    key_file = tmp_path / "key"
    with FakeProvider(lambda _: GOOD) as fake:
        section = {"base_url": fake.anthropic_url, "api_key_file": key_file}
        async with gateway_for(fake, anthropic=section) as gateway:
            request = request_for("anthropic", stream=False)
            with pytest.raises(InvalidSettings, match="key"):
                await ask(gateway, request)
            key_file.write_text("# of the main account\nfirst\n")
            await ask(gateway, request)
            key_file.write_text("second\n")
            while fake.requests[-1].key != "second":
                await ask(gateway, request)
            for broken in ("", "# none\n", "k\u00e9y\n"):
                key_file.write_text(broken)
                await asyncio.sleep(RECHECK_S)
                await ask(gateway, request)
            key_file.unlink()
            await asyncio.sleep(RECHECK_S)
            await ask(gateway, request)
    assert {seen.key for seen in fake.requests} == {"first", "second"}
    assert {seen.key for seen in fake.requests[-4:]} == {"second"}


async def test_cost_comes_from_billed_usage_and_one_line_says_what_happened() -> None:
    """Catches cached input billed in full, and a call without its log line."""
    reply = Reply.text("x", input_tokens=1000, cache_read_tokens=800, output_tokens=100)
    with FakeProvider([reply]) as fake, capture_logs() as logs:
        async with gateway_for(fake) as gateway:
            request = request_for("anthropic", stream=True).model_copy(update={"model": "claude-sonnet-5-5"})
            completion = await gateway.complete(request, principal=LOCAL_OWNER, deadline=Deadline.after(20))
            estimate = gateway.estimate_cost(request)
    assert completion.usage.cost_usd == pytest.approx((200 * 2 + 800 * 0.1 + 100 * 10) / 1e6)
    assert estimate is not None
    assert estimate > 4096 * 10 / 1e6
    finished = [entry for entry in logs if entry["event"] == "completion_finished"]
    assert len(finished) == 1
    assert finished[0]["tries"] == 1
    assert finished[0]["cost_usd"] == completion.usage.cost_usd
