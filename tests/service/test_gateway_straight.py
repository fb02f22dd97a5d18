"""The straight path of ordinary requests: it is taken, and nobody can tell it from the general walk."""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from agentic_flow.core.auth import Principal
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.metrics import GatewayMetrics
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.stores import GatewayStores
from agentic_flow.gateway.straight import StraightCounts
from agentic_flow.gateway.wire.openai import OPENAI, OPENROUTER, OpenAIFormat
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
PRICES = {"cheap": (1.0, 2.0), "claude-cheap": (1.0, 2.0)}
POLICIES: dict[str, Any] = {
    "budgets": [{"scope": "key", "limit_usd": 50.0, "period": "day"}],
    "limits": [{"scope": "key", "requests_per_minute": 1000, "tokens_per_minute": 1_000_000}],
}
WAIT_S = 30.0


class StoppedClock:
    """Time stands still, so that two gateways tell the same of it."""

    def time_s(self) -> float:
        return 1_790_000_000.0

    def monotonic_s(self) -> float:
        return 5000.0

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(min(duration_s, 0.01) or 0.01)


class Keys:
    """A key is the name of its tenant."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal(
            credential, f"{credential}-user", frozenset({"models:use"}), key_id=f"{credential}-key"
        )


class KnownKeys(Keys):
    """The same, known without waiting."""

    def known(self, credential: str) -> Principal:
        return Principal(
            credential, f"{credential}-user", frozenset({"models:use"}), key_id=f"{credential}-key"
        )


class House:
    """A gateway on a port with everything behind it."""

    def __init__(
        self, url: str, gateway: Gateway, stores: GatewayStores, registry: CollectorRegistry
    ) -> None:
        self.url = url
        self.gateway = gateway
        self.stores = stores
        self.registry = registry
        self.session = aiohttp.ClientSession(url)

    @property
    def counts(self) -> StraightCounts:
        return self.gateway.straight.counts

    async def ask(
        self, path: str, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        about = {"authorization": "Bearer alpha", "content-type": "application/json", **(headers or {})}
        async with asyncio.timeout(WAIT_S), self.session.post(path, data=data, headers=about) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read()

    async def rows(self) -> list[tuple[Any, ...]]:
        """The usage ledger without who wrote it."""
        await self.stores.usage.flush()
        names = (
            "at_s, request_id, tenant, key_id, agent, run, provider, model, asked, wire, input_tokens, "
            "output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_nano_usd, "
            "latency_s, first_token_s, status, tries, cached, estimated, streamed"
        )
        statement = f"SELECT {names} FROM gw_usage ORDER BY sequence"
        return [tuple(row) for row in await asyncio.to_thread(self.stores.database.rows, statement)]

    async def budgets(self, rules: GatewayPolicies) -> list[tuple[int, int]]:
        """Spent and reserved of each account, when all is settled."""
        await self.stores.budgets.close()
        return [(s.spent_nano, s.reserved_nano) for s in await self.stores.budgets.report(rules.budgets)]

    def metrics(self) -> list[str]:
        """What is counted, without the real durations of HTTP and the times of creation."""
        lines = generate_latest(self.registry).decode().splitlines()
        hidden = re.compile(r"http_request_duration_seconds_(bucket|sum)|_created|budget_left|^#")
        return sorted(line for line in lines if not hidden.search(line))


@asynccontextmanager
async def house(
    folder: Path,
    fake: FakeProvider,
    policies: dict[str, Any] | None = None,
    *,
    keys: Keys | None = None,
    stopped: bool = False,
    stop: asyncio.Event | None = None,
    drain_timeout_s: float = 1.0,
    **configured: Any,
) -> AsyncIterator[House]:
    """A gateway whose providers are one fake."""
    told = GatewaySettings.model_validate(
        {
            "openai": {"base_url": fake.openai_url, "api_key": "k"},
            "anthropic": {"base_url": fake.anthropic_url, "api_key": "k"},
            "prices_usd_per_mtok": PRICES,
            "attempts": 2,
            "backoff_s": 0.001,
            **configured,
        }
    )
    clock: dict[str, Any] = {"clock": StoppedClock()} if stopped else {}
    rules = GatewayPolicies.model_validate(POLICIES if policies is None else policies)
    stores, registry = GatewayStores(told, folder, **clock), CollectorRegistry()

    async def ready() -> dict[str, bool]:
        return {}

    async with Gateway(
        told, policies=rules, stores=stores, metrics=GatewayMetrics(registry), **clock
    ) as gateway:
        await gateway.open()
        app = create_app(
            "platform",
            build_front_routes(gateway),
            authenticator=keys or KnownKeys(),
            settings=Settings.model_validate({"auth": {"required": True}}),
            ready=ready,
            metrics=registry,
            error_shapes=ERROR_SHAPES,
        )
        async with serving(app, stop=stop, drain_timeout_s=drain_timeout_s) as (url,):
            made = House(url, gateway, stores, registry)
            async with made.session:
                yield made


def asked(model: str = "openai:cheap", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, **more}


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (CHAT, "openai:cheap"),
        (MESSAGES, "openai:cheap"),
        (CHAT, "anthropic:claude-cheap"),
        (MESSAGES, "anthropic:claude-cheap"),
    ],
)
async def test_ordinary_requests_go_straight(tmp_path: Path, path: str, model: str) -> None:
    """Catches a path that nobody takes: all but the first request, which has no connection yet."""
    with FakeProvider(lambda _: Reply.text("good day")) as fake:
        async with house(tmp_path, fake) as made:
            for _ in range(4):
                status, headers, body = await made.ask(path, asked(model))
                assert status == 200
                assert b"good day" in body
                assert headers["x-agentic-flow-model"] == model
            counts = made.counts
            assert (counts.begun, counts.finished, counts.handed_over) == (4, 3, 1)


class Asked(NamedTuple):
    """A request, and what the provider answers to it, try by try."""

    path: str
    body: Any
    headers: dict[str, str]
    replies: tuple[Reply, ...]


_replies = st.one_of(
    st.builds(
        lambda text, tokens, model, omit: Reply.text(
            text, input_tokens=tokens, cache_read_tokens=tokens // 3, model=model, omit_usage=omit
        ),
        st.text(max_size=20),
        st.integers(0, 5000),
        st.sampled_from([None, "cheap-2026-01-01", "somebody-else"]),
        st.booleans(),
    ),
    st.just(Reply.tool_calls([{"name": "look", "arguments": {"at": 1}, "id": "call_1"}])),
    st.just(Reply.text("x" * 300_000)),
    st.sampled_from([400, 401, 403, 404, 429, 500, 503]).map(Reply.error),
    st.just(Reply.error(429, retry_after="0")),
    st.sampled_from(["broken_json", "truncated", "reset", "wrong_content_type", "empty"]).map(
        lambda fault: Reply.broken(fault)  # pyright: ignore[reportArgumentType]
    ),
)
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_MODELS = ["openai:cheap", "cheap", "claude-cheap", "named", "routed", "nobody:serves", ""]
_bodies = st.one_of(
    st.sampled_from(_MODELS).map(asked),
    st.sampled_from(
        [
            asked(max_tokens=0),
            asked(temperature=0.5, n=2),
            asked(unknown_field=1),
            asked(stream=False),
            asked(stream="yes"),
            asked(tools=[_TOOL]),
            asked(messages=[]),
            asked(messages=[{"role": "user", "content": "é" * 3000}]),
            b"{",
            b"[]",
        ]
    ),
)
_headers = st.sampled_from(
    [
        {},
        {},
        {},
        {"x-agentic-flow-agent": "scout", "x-agentic-flow-run": "r1"},
        {"x-agentic-flow-agent": "no name at all"},
        {"x-deadline-s": "20"},
        {"x-deadline-s": "soon"},
        {"idempotency-key": "once"},
        {"anthropic-version": "2023-06-01", "anthropic-beta": "some"},
        {"authorization": "Basic YTpi"},
    ]
)
_asked = st.builds(
    Asked, st.sampled_from([CHAT, MESSAGES, CHAT, MESSAGES, RESPONSES]), _bodies, _headers,
    st.lists(_replies, min_size=1, max_size=2).map(tuple),
)  # fmt: skip
_NAMES: dict[str, Any] = {
    "aliases": {"named": "openai:cheap"},
    "routes": {"routed": {"targets": [{"model": "openai:cheap"}, {"model": "anthropic:claude-cheap"}]}},
}
_policies = st.sampled_from(
    [
        {**POLICIES, **_NAMES},
        {**POLICIES, **_NAMES},
        _NAMES,
        {**POLICIES, **_NAMES, "budgets": [{"scope": "key", "limit_usd": 0.0003, "period": "day"}]},
        {**POLICIES, **_NAMES, "limits": [{"scope": "key", "requests_per_minute": 3}]},
        {**POLICIES, **_NAMES, "limits": [{"scope": "model", "tokens_per_minute": 200}]},
        {**POLICIES, **_NAMES, "cache": {"mode": "exact"}},
        {**POLICIES, **_NAMES, "guardrails": [{"name": "size", "options": {"input_chars_max": 100}}]},
    ]
)


async def _seen(folder: Path, calls: Sequence[Asked], policies: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """All that can be seen of these calls."""
    turn: list[Reply] = []

    def script(_: Any) -> Reply:
        return turn.pop(0) if len(turn) > 1 else turn[0]

    with FakeProvider(script) as fake:
        async with house(folder, fake, policies, keys=keys, stopped=True) as made:
            answers: list[Any] = []
            for number, call in enumerate([Asked(CHAT, asked(), {}, (Reply.text("first"),)), *calls]):
                turn[:] = call.replies
                status, headers, body = await made.ask(
                    call.path, call.body, {"x-request-id": f"r{number}", **call.headers}
                )
                shown = {k: v for k, v in headers.items() if k not in ("date", "retry-after")}
                body = re.sub(rb'"(created|created_at)": ?[\d.]+', b"", body)
                shown.pop("content-length", None)
                answers.append((status, shown, body))
            return {
                "answers": answers,
                "asked": [(seen.path, seen.body, seen.headers) for seen in fake.requests],
                "rows": await made.rows(),
                "metrics": made.metrics(),
                "budgets": await made.budgets(GatewayPolicies.model_validate(policies)),
                "inside": (made.gateway._door.inside, made.gateway._door.waiting),  # pyright: ignore[reportPrivateUsage]
                "begun": made.counts.begun,
            }


_ORDINARY = [Asked(path, asked(), {}, (Reply.text("well"),)) for path in (CHAT, MESSAGES, CHAT, CHAT)]


@example(calls=_ORDINARY, policies={"limits": [{"scope": "key", "requests_per_minute": 3}]})
@example(calls=_ORDINARY, policies={"limits": [{"scope": "key", "tokens_per_minute": 120}]})
@example(calls=_ORDINARY, policies={"budgets": [{"scope": "key", "limit_usd": 0.0003, "period": "day"}]})
@example(
    calls=[_ORDINARY[0], Asked(CHAT, asked(), {}, (Reply.error(500), Reply.text("after all")))],
    policies=POLICIES,
)
@example(
    calls=[
        _ORDINARY[0],
        Asked(MESSAGES, asked(), {}, (Reply.error(429, retry_after="0"), Reply.text("yes"))),
    ],
    policies=POLICIES,
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(_asked, min_size=1, max_size=4), policies=_policies)
def test_both_ways_look_the_same(calls: list[Asked], policies: dict[str, Any]) -> None:
    """Catches a difference to the general walk in answers, provider, ledger, budgets or metrics."""

    async def both() -> tuple[dict[str, Any], dict[str, Any]]:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            return (
                await _seen(Path(one), calls, policies, KnownKeys()),
                await _seen(Path(two), calls, policies, Keys()),
            )

    straight, general = asyncio.run(both())
    assert general["begun"] == 0
    for name in general:
        if name != "begun":
            shown = [re.sub(r"127\.0\.0\.1:\d+", "HOST", repr(at[name])) for at in (straight, general)]
            assert shown[0] == shown[1], name
    assert straight["inside"] == (0, 0)


_odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(0, 9),
    st.text(max_size=3),
    st.lists(st.integers()),
    st.fixed_dictionaries(
        {}, optional={"cached_tokens": st.one_of(st.integers(-1, 5), st.none(), st.booleans())}
    ),
)
_usage = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": st.one_of(st.integers(0, 99), _odd),
        "completion_tokens": st.one_of(st.integers(0, 99), _odd),
        "prompt_tokens_details": _odd,
        "completion_tokens_details": _odd,
        "cost": st.floats(0, 1),
    },
)
_choice = st.fixed_dictionaries(
    {"message": st.just({"role": "assistant", "content": "hi"})},
    optional={"finish_reason": st.one_of(_odd, st.sampled_from(["stop", "length", "tool_calls", "new"]))},
)
_whole_answers = st.fixed_dictionaries(
    {},
    optional={
        "model": st.one_of(st.just("cheap"), _odd),
        "choices": st.one_of(st.lists(st.one_of(_choice, _choice, _odd), max_size=3), _odd),
        "usage": st.one_of(_usage, _usage, _odd),
        "error": _odd,
    },
)


_details = st.one_of(st.none(), st.fixed_dictionaries({}, optional={"cached_tokens": st.integers(0, 5)}))
_ordinary_answers = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["cheap", "other"]),
        "choices": st.lists(_choice, min_size=1, max_size=3),
        "usage": st.fixed_dictionaries(
            {"prompt_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99)},
            optional={
                "prompt_tokens_details": _details,
                "completion_tokens_details": st.fixed_dictionaries({"reasoning_tokens": st.integers(0, 5)}),
                "cost": st.floats(0, 1),
            },
        ),
    },
    optional={"error": st.none()},
)


def _compared(wire: OpenAIFormat, answer: dict[str, Any]) -> bool:
    """Whether a glance suffices; if so, it saw what a reader reads."""
    seen = wire.glance(json.dumps(answer).encode())
    if seen is None:
        return False
    reader = wire.passing(asked())
    reader.take_answer(answer)
    read = reader.usage
    assert read is not None
    assert (seen.model, seen.stop_reason) == (reader.model, reader.stop_reason)
    assert {name: getattr(seen, name) for name in read.model_dump()} == read.model_dump()
    return True


@settings(max_examples=200)
@given(answer=_ordinary_answers)
def test_a_glance_sees_what_a_reader_reads(answer: dict[str, Any]) -> None:
    """Catches books that differ by who read the answer, and ordinary answers that a glance does not take."""
    assert _compared(OpenAIFormat(OPENAI), answer)
    assert not _compared(OpenAIFormat(OPENROUTER), answer)  # its prices are in the answer


@settings(max_examples=400)
@given(
    answer=st.one_of(
        _whole_answers, st.tuples(_ordinary_answers, _whole_answers).map(lambda two: {**two[0], **two[1]})
    )
)
def test_a_glance_does_not_take_what_it_cannot_read(answer: dict[str, Any]) -> None:
    """Catches odd answers whose glance says something else than a reader, or takes what a reader refuses."""
    for dialect in (OPENAI, OPENROUTER):
        _compared(OpenAIFormat(dialect), answer)


# Ways out of it


async def _under_way(stack: AsyncExitStack, made: House, path: str = CHAT) -> asyncio.Task[Any]:
    """A request that the provider has and does not answer, on the straight path."""
    await made.ask(path, asked())
    begun = made.counts.begun
    task = asyncio.create_task(made.ask(path, asked()))
    stack.callback(task.cancel)
    while made.counts.begun == begun:
        await asyncio.sleep(0.005)
    return task


def _hangs_after_the_first() -> Any:
    return lambda seen: Reply.text("first") if seen.index == 0 else Reply.broken("hang")


async def test_a_client_that_leaves_ends_its_call(tmp_path: Path) -> None:
    """Catches a call that goes on, or keeps its place and its money, when nobody waits for it any more."""
    with FakeProvider(_hangs_after_the_first()) as fake:
        async with house(tmp_path, fake) as made, AsyncExitStack() as stack:
            task = await _under_way(stack, made)
            task.cancel()
            assert await asyncio.to_thread(fake.wait_until_left, WAIT_S)
            while len(rows := await made.rows()) < 2:
                await asyncio.sleep(0.01)
            assert (rows[1][18], rows[1][19]) == ("cancelled", 1)
            assert made.counts.handed_over == 2
            assert made.gateway._door.inside == 0  # pyright: ignore[reportPrivateUsage]
            ((spent, reserved),) = await made.budgets(GatewayPolicies.model_validate(POLICIES))
            assert reserved == 0
            assert spent >= 40_000


async def test_the_deadline_ends_it(tmp_path: Path) -> None:
    """Catches a request that waits for ever because no task of its own keeps its time."""
    with FakeProvider(_hangs_after_the_first()) as fake:
        async with house(tmp_path, fake) as made:
            await made.ask(CHAT, asked())
            status, _, body = await made.ask(CHAT, asked(), {"x-deadline-s": "1.0"})
            assert status == 504
            assert b"1 try made" in body
            assert (made.counts.begun, made.counts.handed_over) == (2, 2)


async def test_a_server_that_stops_tells_its_callers(tmp_path: Path) -> None:
    """Catches a request without a task that a drain does not see, and cuts without a word."""
    stop = asyncio.Event()
    with FakeProvider(_hangs_after_the_first()) as fake:
        async with (
            house(tmp_path, fake, stop=stop, drain_timeout_s=1.0) as made,
            AsyncExitStack() as stack,
        ):
            task = await _under_way(stack, made)
            stop.set()
            status, _, body = await asyncio.wait_for(task, WAIT_S)
            assert status == 503
            assert b"stopping" in body


async def test_an_answer_in_pieces_is_waited_for(tmp_path: Path) -> None:
    """Catches an answer that is handed over, or given in part, because it did not come at once."""

    async def provider(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = json.dumps(
            {
                "model": "cheap",
                "choices": [{"index": 0, "message": {"content": "good day"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            }
        ).encode()
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()
                return
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(answer))
            for at in range(0, len(answer), 40):
                await writer.drain()
                await asyncio.sleep(0.001)
                writer.write(answer[at : at + 40])

    server = await asyncio.start_server(provider, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with FakeProvider() as fake:
        async with (
            server,
            house(tmp_path, fake, openai={"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "k"}) as made,
        ):
            for _ in range(3):
                status, _, body = await made.ask(CHAT, asked())
                assert (status, json.loads(body)["usage"]["prompt_tokens"]) == (200, 3)
            assert (made.counts.begun, made.counts.finished) == (3, 2)
            await made.session.close()


async def test_requests_behind_each_other_on_a_connection(tmp_path: Path) -> None:
    """Catches answers in the wrong order, or bodies that run into each other, when a client does not wait."""
    with FakeProvider(lambda seen: Reply.text(seen.last_text)) as fake:
        async with house(tmp_path, fake) as made:
            await made.ask(CHAT, asked())
            host, port = made.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for number in range(5):
                body = json.dumps(asked(messages=[{"role": "user", "content": f"number {number}"}])).encode()
                head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alpha\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            for number in range(5):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                body = await reader.readexactly(int(length[1]))
                assert json.loads(body)["choices"][0]["message"]["content"] == f"number {number}"
            writer.close()


async def test_a_body_in_pieces_goes_straight_too(tmp_path: Path) -> None:
    """Catches clients that send head and body apart (httpx does), and never go the straight path for it."""
    with FakeProvider(lambda _: Reply.text("good day")) as fake:
        async with house(tmp_path, fake) as made:
            await made.ask(CHAT, asked())
            host, port = made.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps(asked()).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alpha\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.write(body)
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
            writer.close()
            assert made.counts.finished == 1


async def test_a_name_that_no_header_takes_ends_the_connection_alone(tmp_path: Path) -> None:
    """Catches a failure within the loop's callbacks that leaves a caller waiting, or the gateway broken."""
    with FakeProvider(lambda _: Reply.text("good day")) as fake:
        async with house(tmp_path, fake, {}) as made:
            await made.ask(CHAT, asked())
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await made.ask(CHAT, asked("openai:a\nb"))
            assert (await made.ask(CHAT, asked()))[0] == 200
            assert [row[18] for row in await made.rows()] == ["ok", "ok", "ok"]


async def test_changed_policies_hold_at_once(tmp_path: Path) -> None:
    """Catches what was remembered of a name being believed after the operator changed what it means."""
    with FakeProvider(lambda seen: Reply.text(str(seen.model))) as fake:
        async with house(tmp_path, fake, {"aliases": {"named": "openai:cheap"}}) as made:
            for _ in range(3):
                assert b"cheap" in (await made.ask(CHAT, asked("named")))[2]
            changed = GatewayPolicies.model_validate({"aliases": {"named": "anthropic:claude-cheap"}})
            made.gateway._policies.policies = changed  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            _, headers, _ = await made.ask(CHAT, asked("named"))
            assert headers["x-agentic-flow-model"] == "anthropic:claude-cheap"


@pytest.mark.parametrize("way", ["whole", "stream", "handed over"])
async def test_no_request_waits_for_the_garbage_collector(tmp_path: Path, way: str) -> None:
    """Catches requests that hold themselves in a ring, which only the garbage collector could free."""

    def watched() -> list[object]:
        kinds = ("IncomingBody", "OutgoingAnswer", "_Cycle")
        return [found for found in gc.get_objects() if type(found).__name__ in kinds]

    body = asked(stream=True) if way == "stream" else asked()
    with FakeProvider(lambda _: Reply.text("good day")) as fake:
        async with house(tmp_path, fake) as made:
            await made.ask(CHAT, body)
            gc.collect()
            # Held, so that no id is given again; a server of another test may be among them.
            before = watched()
            gc.disable()
            try:
                for number in range(12):
                    # An idempotency key is nothing for the straight path.
                    headers = {"idempotency-key": f"k{number}"} if way == "handed over" else None
                    status, _, _ = await made.ask(CHAT, body, headers)
                    assert status == 200
                known = {id(held) for held in before}
                left = collections.Counter(type(new).__name__ for new in watched() if id(new) not in known)
            finally:
                gc.enable()
    # A connection keeps its last request.
    assert {kind: count for kind, count in left.items() if count > 2} == {}
