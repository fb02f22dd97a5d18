"""Sixteen faults of a provider, each ending as it should: alone, and with another provider to take over.

The list is that of the suite failoverbench. The gateway, the fronts, the providers and the faults are real
and on sockets; the clock of breakers, keys and pauses is set by hand, so that nothing is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import aiohttp
import anthropic
import openai
import pytest
from test_gateway_transport import self_signed

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.health import CALLS_MIN
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.service import Gateway
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

Mode = Literal["json", "sse"]
End = int | Literal["event", "broken"]
MODES: tuple[Mode, ...] = ("json", "sse")
FRONTS = ("openai", "anthropic")
PAIRS = [(front, back) for front in FRONTS for back in FRONTS]
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
WHOLE = "an answer that arrives whole"
HOST = "model-provider.invalid"
WAIT_S = 30.0
"""Longer than anything here takes: what passes it hangs."""
_TLS = ssl.create_default_context()


class HandSetClock:
    """The system's clock, moved on by hand; pauses are noted and skipped."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self._ahead_s = 0.0

    def time_s(self) -> float:
        return SYSTEM_CLOCK.time_s() + self._ahead_s

    def monotonic_s(self) -> float:
        return SYSTEM_CLOCK.monotonic_s() + self._ahead_s

    async def sleep(self, duration_s: float) -> None:
        self.pauses.append(duration_s)
        self.advance(duration_s)
        await asyncio.sleep(0)

    def advance(self, duration_s: float) -> None:
        self._ahead_s += duration_s


class Upstream:
    """A provider with a fault, until it is healed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls = 0
        """How often it was touched while it had its fault."""
        self.healed = False

    def heal(self) -> None:
        self.healed = True


Start = Callable[[Path, pytest.MonkeyPatch], contextlib.AbstractAsyncContextManager[Upstream]]


def replies(*bad: Reply) -> Start:
    """A provider that answers with these in turn, over and over."""

    @asynccontextmanager
    async def start(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
        upstream = Upstream("")

        def reply(seen: object) -> Reply:
            if upstream.healed:
                return Reply.text(WHOLE)
            upstream.calls += 1
            return bad[(upstream.calls - 1) % len(bad)]

        with FakeProvider(reply) as fake:
            upstream.url = fake.url
            yield upstream

    return start


@asynccontextmanager
async def refused(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
    """A port where nobody listens, until somebody does."""
    connect = asyncio.get_running_loop().sock_connect
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        upstream = Upstream(f"http://127.0.0.1:{port}")

        async def counted(sock: socket.socket, address: Any) -> None:
            upstream.calls += address[1] == port and not upstream.healed
            await connect(sock, address)

        def heal() -> None:
            taken.close()
            stack.enter_context(FakeProvider(lambda seen: Reply.text(WHOLE), port=port))
            upstream.healed = True

        # A refused connection leaves no trace at its target.
        patch.setattr(asyncio.get_running_loop(), "sock_connect", counted)
        upstream.heal = heal  # type: ignore[method-assign]
        yield upstream


@asynccontextmanager
async def unresolved(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
    """A name without an address, until it has one."""
    look_up = socket.getaddrinfo
    with FakeProvider(lambda seen: Reply.text(WHOLE)) as fake:
        upstream = Upstream(f"http://{HOST}:{fake.url.rpartition(':')[2]}")

        def getaddrinfo(host: Any, *about: Any, **more: Any) -> Any:
            if host != HOST:
                return look_up(host, *about, **more)
            if upstream.healed:
                return look_up("127.0.0.1", *about, **more)
            upstream.calls += 1
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield upstream


@asynccontextmanager
async def untrusted(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
    """A server whose certificate nobody trusts. It cannot heal: trust is read when a process starts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(folder))
    upstream = Upstream("")

    async def shake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.calls += 1
        with contextlib.suppress(ssl.SSLError, OSError):
            await writer.start_tls(context)
        writer.close()

    server = await asyncio.start_server(shake, "127.0.0.1", 0)
    upstream.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield upstream
    finally:
        server.close()


@dataclass(frozen=True)
class Scenario:
    """One fault.

    Args:
        name: As the suite calls it.
        start: Begins a provider that has it.
        json, sse: How a call ends that nobody else can take: a status; `event` for an error event after the
            first tokens; `broken` for that, or 502 where the fault comes in one packet with the first tokens.
        status: Statuses by front, where they differ.
        retry_after: The header that the caller sees.
        calls_max: Calls after which the provider must be left alone.
        recovers: Whether it can.
        settings: Of the gateway.
    """

    name: str
    start: Start
    json: int = 502
    sse: End = 502
    status: dict[str, int] = field(default_factory=dict[str, int])
    retry_after: str | None = None
    calls_max: int = 6
    recovers: bool = True
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def expected(self, front: str, mode: Mode) -> End:
        return self.status.get(front, self.json if mode == "json" else self.sse)


IMPATIENT = {"idle_timeout_s": 0.4, "slow_call_s": 0.4}
# Whole answers are silent until the deadline. Streams are so for two tries, which end before it, also where
# the machine stands still meanwhile.
MUTE = {**IMPATIENT, "timeout_s": 2.4}
SCENARIOS = [
    Scenario("connect refused", refused),
    Scenario("DNS", unresolved),
    Scenario("TLS", untrusted, recovers=False),
    Scenario("slow headers", replies(Reply.broken("hang")), json=504, settings=MUTE),
    Scenario("stall mid-stream", replies(Reply.broken("hang_mid")), sse="event", settings=IMPATIENT),
    Scenario("reset mid-stream", replies(Reply.broken("reset_mid")), sse="broken"),
    Scenario("truncated SSE", replies(Reply.broken("no_terminal")), sse="broken"),
    Scenario("429 with Retry-After", replies(Reply.error(429, retry_after="90")), 429, 429, retry_after="90"),
    Scenario("429 without Retry-After", replies(Reply.error(429)), 429, 429),
    Scenario("500", replies(Reply.error(500))),
    Scenario("503", replies(Reply.error(503))),
    Scenario("529", replies(Reply.error(529)), status={"openai": 503, "anthropic": 529}),
    Scenario("malformed JSON", replies(Reply.broken("broken_json")), sse="broken"),
    Scenario("wrong content type", replies(Reply.broken("wrong_content_type"))),
    Scenario("empty body", replies(Reply.broken("empty"))),
    Scenario("auth failure", replies(Reply.error(401))),
    Scenario("flapping", replies(Reply.error(500), Reply.text(WHOLE)), 200, 200, calls_max=30),
]
EACH = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


class Keys:
    """Takes every key."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("t", credential, frozenset({"models:use"}))


@asynccontextmanager
async def gateway_at(
    clock: HandSetClock, policies: dict[str, Any] | None = None, **configured: Any
) -> AsyncIterator[str]:
    """A gateway with the fronts of the platform, and its URL."""
    told: dict[str, Any] = {"timeout_s": 20.0, "attempts": 2, **configured}

    async def ready() -> dict[str, bool]:
        return {}

    async with Gateway(
        GatewaySettings.model_validate(told),
        policies=GatewayPolicies.model_validate(policies or {}),
        clock=clock,
    ) as gateway:
        app = create_app(
            "platform",
            build_front_routes(gateway),
            authenticator=Keys(),
            settings=Settings(),
            ready=ready,
            error_shapes=ERROR_SHAPES,
        )
        async with serving(app) as (url,):
            yield url


def provider(wire: str, url: str) -> dict[str, Any]:
    return {"base_url": url if wire == "anthropic" else f"{url}/v1", "api_key": "upstream-key"}


class Answer(NamedTuple):
    """What a client has at the end: the status, the text, and how it ended."""

    status: int
    text: str
    end: Literal["whole", "error", "nothing"]
    headers: dict[str, str]


def question(model: str, mode: Mode) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": model, "messages": messages, "max_tokens": 50, "stream": mode == "sse"}


async def ask(session: aiohttp.ClientSession, front: str, mode: Mode, model: str) -> Answer:
    """Ask with nothing but HTTP, so that the very last event is seen."""
    async with asyncio.timeout(WAIT_S), session.post(PATHS[front], json=question(model, mode)) as answer:
        content = (await answer.read()).decode()
    headers = {name.lower(): value for name, value in answer.headers.items()}
    if answer.status != 200 or mode == "json":
        body = json.loads(content)
        if answer.status != 200:
            assert body["error"]["message"]
            assert front == "openai" or body["type"] == "error"
            return Answer(answer.status, "", "error", headers)
        text = body["choices"][0]["message"]["content"] if front == "openai" else body["content"][0]["text"]
        return Answer(200, text, "whole", headers)
    events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
    return Answer(200, *_read_events(front, events), headers)


def _read_events(front: str, events: list[str]) -> tuple[str, Literal["whole", "error", "nothing"]]:
    text = ""
    end: Literal["whole", "error", "nothing"] = "nothing"
    for event in events:
        assert end == "nothing", f"{event!r} comes after the end"
        if event == "[DONE]":
            end = "whole"
            continue
        value = json.loads(event)
        if "error" in value:
            end = "error"
        elif value.get("type") == "message_stop":
            end = "whole"
        elif front == "openai":
            text += "".join(choice["delta"].get("content") or "" for choice in value["choices"])
        else:
            text += value.get("delta", {}).get("text", "")
    return text, end


def test_all_of_the_list_is_here() -> None:
    """Catches a scenario that was lost; in the suite's list the two kinds of 429 are one."""
    assert len({scenario.name.replace("without", "with") for scenario in SCENARIOS}) == 16


# One provider, nobody to take over


@pytest.mark.parametrize(("front", "back"), PAIRS)
@EACH
async def test_with_one_provider_the_caller_learns_of_it(
    scenario: Scenario, front: str, back: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault that hangs, that has the wrong status, or whose half answer passes for a whole one."""
    clock = HandSetClock()
    for mode in MODES:
        async with scenario.start(tmp_path, monkeypatch) as upstream:
            configured = {back: provider(back, upstream.url), **scenario.settings}
            async with gateway_at(clock, **configured) as url, aiohttp.ClientSession(url) as session:
                answer = await ask(session, front, mode, f"{back}:fake-model")
                expected = scenario.expected(front, mode)
                if isinstance(expected, str):
                    assert answer.end == "error", mode
                    assert answer.status == 200 or (expected, answer.status) == ("broken", 502), mode
                    assert answer.text != WHOLE
                else:
                    assert answer.status == expected, mode
                    assert answer.end == ("whole" if expected == 200 else "error"), mode
                assert answer.headers.get("retry-after") == scenario.retry_after
                assert upstream.calls > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("front", FRONTS)
@EACH
async def test_the_sdks_raise_what_they_raise_at_the_vendor(
    scenario: Scenario, front: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error that the vendors' own SDKs take for something else, or for the end of the answer."""
    clock = HandSetClock()
    async with scenario.start(tmp_path, monkeypatch) as upstream:
        configured = {front: provider(front, upstream.url), **scenario.settings}
        async with gateway_at(clock, **configured) as url:
            got: list[str] = []
            kinds: Any = openai if front == "openai" else anthropic
            try:
                async with asyncio.timeout(WAIT_S):
                    await (_ask_openai if front == "openai" else _ask_anthropic)(url, mode, got)
            except kinds.APIError as error:
                status = getattr(error, "status_code", None)
                raised: Any = error
            else:
                status, raised = 200, None
    expected = scenario.expected(front, mode)
    if expected == 200:
        assert (raised, "".join(got)) == (None, WHOLE)
        return
    assert raised is not None, f"{got!r} passed for a whole answer"
    if isinstance(expected, str):
        assert status in (None, 200) or (expected, status) == ("broken", 502)
        return
    assert status == expected
    assert isinstance(raised, kinds.RateLimitError if expected == 429 else kinds.InternalServerError)
    assert raised.response.headers.get("retry-after") == scenario.retry_after


async def _ask_openai(url: str, mode: Mode, got: list[str]) -> None:
    http = openai.DefaultAsyncHttpxClient(verify=_TLS)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="k", max_retries=0, http_client=http
    ) as client:
        create = cast(Any, client.chat.completions.create)
        asked = await create(**question("openai:fake-model", mode))
        if mode == "json":
            got.append(asked.choices[0].message.content)
            return
        async for chunk in asked:
            got += [choice.delta.content or "" for choice in chunk.choices]


async def _ask_anthropic(url: str, mode: Mode, got: list[str]) -> None:
    http = anthropic.DefaultAsyncHttpxClient(verify=_TLS)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0, http_client=http) as client:
        asked = await cast(Any, client.messages.create)(**question("anthropic:fake-model", mode))
        if mode == "json":
            got.append(asked.content[0].text)
            return
        async for event in asked:
            if event.type == "content_block_delta":
                got.append(event.delta.text)  # noqa: PERF401 - what came before an error counts


@EACH
async def test_a_lasting_outage_costs_no_time(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a provider that is known to be down and yet asked, or waited for, by every further call."""
    clock = HandSetClock()
    for mode in MODES:
        async with scenario.start(tmp_path, monkeypatch) as upstream:
            configured = {"openai": provider("openai", upstream.url), **scenario.settings}
            async with gateway_at(clock, **configured) as url, aiohttp.ClientSession(url) as session:
                call = functools.partial(ask, session, "openai", mode, "openai:m")
                answers = await until_left_alone(upstream, call, scenario)
                # A retry gets the answer of one that flaps, until half of enough calls have failed.
                served = CALLS_MIN // 2 if scenario.name == "flapping" else 0
                assert sum(answer.end == "whole" for answer in answers) == served
                touched, pauses = upstream.calls, len(clock.pauses)
                for _ in range(3):
                    answer = await call()
                    assert answer.status in (429, 503)
                    assert int(answer.headers["retry-after"]) >= 1
                assert (upstream.calls, len(clock.pauses)) == (touched, pauses)


async def until_left_alone(upstream: Upstream, call: Callable[[], Any], scenario: Scenario) -> list[Any]:
    """Call until the provider is not touched by it; what the calls gave."""
    answers: list[Any] = []
    for _ in range(scenario.calls_max):
        before = upstream.calls
        answers.append(await call())
        if upstream.calls == before:
            return answers
    raise AssertionError(f"{scenario.name}: still asked after {scenario.calls_max} calls")


# Two providers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("front", FRONTS)
@EACH
async def test_another_provider_takes_over_at_once(
    scenario: Scenario, front: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a call lost although another provider could serve it, a pause before that one is asked, a
    broken provider that is asked for ever, and one that is never asked again when it is well."""
    clock = HandSetClock()
    route = {"targets": [{"model": f"{front}:first"}, {"model": "openrouter:second/model"}]}
    begins = isinstance(scenario.expected(front, mode), str)
    async with scenario.start(tmp_path, monkeypatch) as upstream:
        with FakeProvider(lambda seen: Reply.text(WHOLE)) as good:
            configured = {
                front: provider(front, upstream.url),
                "openrouter": provider("openrouter", good.url),
                **scenario.settings,
            }
            async with (
                gateway_at(clock, {"routes": {"main": route}}, **configured) as url,
                aiohttp.ClientSession(url) as session,
            ):

                async def call() -> None:
                    touched, asked = upstream.calls, len(good.requests)
                    answer = await ask(session, front, mode, "main")
                    if begins and answer.end == "error":
                        # The caller has the first tokens of the other one: there is no way back.
                        assert answer.status == 200
                        assert answer.text != WHOLE
                        assert (upstream.calls, len(good.requests)) == (touched + 1, asked)
                    else:
                        assert (answer.status, answer.text, answer.end) == (200, WHOLE, "whole")
                        served = answer.headers["x-agentic-flow-model"].partition(":")[0]
                        assert len(good.requests) == asked + (served == "openrouter")
                        assert upstream.calls - touched <= 1

                await until_left_alone(upstream, call, scenario)
                await call()
                upstream.heal()
                clock.advance(120.0)
                touched = upstream.calls
                for _ in range(2):
                    answer = await ask(session, front, mode, "main")
                    assert (answer.status, answer.text, answer.end) == (200, WHOLE, "whole")
                if scenario.recovers:
                    assert answer.headers["x-agentic-flow-model"] == f"{front}:first"
                else:
                    assert upstream.calls > touched, "it is not even tried again"
    assert clock.pauses == []
