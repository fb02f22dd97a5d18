"""The HTTP twin against real servers: ours, and hand-made ones that break the protocol in chosen ways."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Credential, NoCredentials, Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    OF_REQUEST,
    AgenticFlowError,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    InvalidSettings,
    ProviderOverloaded,
    RateLimited,
    StorageFull,
    Unavailable,
)
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import PeerSettings, Settings
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.web import EventStream, create_app, deadline_of, json_response
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio


class CountingClock:
    """The real clock, but pauses are noted and not taken."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.ahead_s = 0.0

    def time_s(self) -> float:
        return self.monotonic_s()

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s

    async def sleep(self, duration_s: float) -> None:
        self.pauses.append(duration_s)
        await asyncio.sleep(0)


class Holding:
    """A route that is down for some methods, and keeps a PUT back until it is released."""

    def __init__(self, *down: str) -> None:
        self._down = down
        self.entered, self.released = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: Request) -> Response:
        if request.method in self._down:
            raise Unavailable("down")
        if request.method == "PUT":
            self.entered.set()
            await self.released.wait()
        return json_response({"method": request.method})


class Scripted:
    """A route that answers with one scripted error after another, then with its request."""

    def __init__(self, *errors: AgenticFlowError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self, request: Request) -> Response:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return json_response(
            {
                "method": request.method,
                "query": dict(request.query_params),
                "body": await request.json() if await request.body() else None,
                "headers": dict(request.headers),
                "remaining_s": deadline_of(request, 1e6).remaining_s,
            }
        )


async def _ready() -> dict[str, bool]:
    return {}


def app_of(route: Callable[[Request], Awaitable[Response]]) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return await route(request)

    return create_app(
        "agentdb",
        [Route("/x", endpoint, methods=["GET", "POST", "PUT", "DELETE"])],
        authenticator=NoCredentials(),
        settings=Settings(),
        ready=_ready,
    )


@contextlib.asynccontextmanager
async def twin_of(
    route: Callable[[Request], Awaitable[Response]], **peers: Any
) -> AsyncIterator[tuple[HttpTwin, CountingClock]]:
    clock = CountingClock()
    async with serving(app_of(route)) as (url,), HttpTwin(url, PeerSettings(**peers), clock=clock) as twin:
        yield twin, clock


async def test_a_call_carries_body_query_deadline_and_trace() -> None:
    """Catches a call that arrives without what it was given."""
    async with twin_of(Scripted()) as (twin, clock):
        seen = await twin.call(
            "POST",
            "/x",
            body={"a": [1, "ü"]},
            params={"q": "a b&c", "n": 2},
            deadline=Deadline.after(20, clock),
            idempotency_key="k1",
        )
    assert (seen["method"], seen["body"]) == ("POST", {"a": [1, "ü"]})
    assert seen["query"] == {"q": "a b&c", "n": "2"}
    assert 10 < seen["remaining_s"] <= 20
    assert seen["headers"]["idempotency-key"] == "k1"
    assert "authorization" not in seen["headers"]


@pytest.mark.parametrize(
    "error",
    [
        Conflict("version 3", hint="read again", details={"stored": 3}),
        ProviderOverloaded("busy", retry_after_s=900.0),
        AgenticFlowError("a bug"),
    ],
)
async def test_errors_come_back_as_they_were_raised(error: AgenticFlowError) -> None:
    """Catches an error that loses its kind, hint, details or pause between two processes."""
    async with twin_of(Scripted(error), attempts=1) as (twin, _):
        with pytest.raises(AgenticFlowError) as caught:
            await twin.call("POST", "/x")
    found = caught.value
    assert (type(found), found.message, found.hint) == (type(error), error.message, error.hint)
    assert (found.details, found.retry_after_s) == (error.details, error.retry_after_s)


@pytest.mark.parametrize(
    ("error", "method", "key", "calls"),
    [
        (Unavailable("down"), "GET", None, 3),
        (Unavailable("down"), "POST", None, 1),
        (Unavailable("down"), "POST", "k", 3),
        (RateLimited("slow down"), "POST", None, 3),
        (Conflict("no"), "GET", None, 1),
        (CircuitOpen("held back"), "GET", None, 1),
    ],
)
async def test_only_what_may_be_repeated_is_repeated(
    error: AgenticFlowError, method: str, key: str | None, calls: int
) -> None:
    """Catches a write done twice, an error retried in vain, and a read that gives up at once."""
    route = Scripted(*[error] * 10)
    async with twin_of(route, attempts=3) as (twin, clock):
        with pytest.raises(type(error)):
            await twin.call(method, "/x", idempotency_key=key)
    assert route.calls == calls
    assert len(clock.pauses) == calls - 1


@pytest.mark.parametrize(
    ("error", "peer"),
    [
        (Unavailable("the database is away"), "agentdb"),
        (StorageFull("no room"), "agentdb"),
        (CircuitOpen("a provider is held back"), None),
        (Unavailable("too long a prompt for this memory", details=OF_REQUEST), None),
    ],
)
async def test_a_peer_that_cannot_serve_is_named(error: Unavailable, peer: str | None) -> None:
    """Catches a durable step that fails because its neighbour's database is restarted (steps wait for a
    `peer`), and one that waits for minutes for somebody who is no neighbour of ours."""
    async with serving(app_of(Scripted(error))) as (url,), HttpTwin(url, peer="agentdb") as twin:
        with pytest.raises(Unavailable) as caught:
            await twin.call("POST", "/x")
    assert caught.value.peer == peer


async def test_what_one_tenants_requests_meet_holds_nobody_else_back() -> None:
    """Catches a circuit for all that one tenant opens, and keeps open, with requests that only it makes."""

    async def route(request: Request) -> Response:
        if request.method == "POST":
            raise Unavailable("too long a prompt for this memory", details=OF_REQUEST)
        return json_response({})

    async with twin_of(route, attempts=1, breaker_failures=2) as (twin, _):
        for _ in range(5):
            with pytest.raises(Unavailable, match="too long"):
                await twin.call("POST", "/x")
        assert await twin.call("GET", "/x") == {}


async def test_a_passing_failure_is_ridden_out_with_the_pause_the_peer_asked_for() -> None:
    """Catches retries that ignore Retry-After, and unbounded pauses of our own."""
    route = Scripted(RateLimited("slow", retry_after_s=2.5), Unavailable("down"))
    async with twin_of(route, attempts=3) as (twin, clock):
        assert (await twin.call("GET", "/x"))["method"] == "GET"
    assert clock.pauses[0] == 2.5
    assert 0 <= clock.pauses[1] <= 0.2


async def test_a_pause_past_the_deadline_is_not_taken() -> None:
    """Catches a caller that waits longer than it said it would."""
    async with twin_of(Scripted(RateLimited("slow", retry_after_s=50.0))) as (twin, clock):
        with pytest.raises(RateLimited):
            await twin.call("GET", "/x", deadline=Deadline.after(20, clock))
        assert clock.pauses == []


async def test_a_deadline_ends_the_call() -> None:
    """Catches a hung peer that hangs its callers."""
    released = asyncio.Event()

    async def slow(request: Request) -> Response:
        await released.wait()
        return json_response({})

    async with twin_of(slow) as (twin, clock):
        with pytest.raises(DeadlineExceeded, match="did not answer"):
            await twin.call("GET", "/x", deadline=Deadline.after(0.1, clock))
        with pytest.raises(DeadlineExceeded):
            await twin.call("GET", "/x", deadline=Deadline.after(-1, clock))
        released.set()


async def test_a_refused_connection_is_tried_again_even_for_a_write() -> None:
    """Catches a write lost to a server that was restarting, and an error without an address."""
    clock = CountingClock()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # held, so that nobody else comes to listen there
        port = bound.getsockname()[1]
        async with HttpTwin(
            f"http://127.0.0.1:{port}", PeerSettings(attempts=3), clock=clock, peer="agentdb"
        ) as twin:
            with pytest.raises(Unavailable, match=f"'agentdb' cannot be reached at http://127.0.0.1:{port}"):
                await twin.call("POST", "/x")
    assert len(clock.pauses) == 2


async def test_the_circuit_opens_and_closes_again() -> None:
    """Catches a breaker that hammers a dead peer, that counts a caller's mistakes, or that never recovers."""
    route = Scripted(*[Conflict("no")] * 5, *[Unavailable("down")] * 3)
    async with twin_of(route, attempts=1, breaker_failures=3, breaker_open_s=5) as (twin, clock):
        for _ in range(5):
            with pytest.raises(Conflict):
                await twin.call("GET", "/x")
        for _ in range(3):
            with pytest.raises(Unavailable):
                await twin.call("GET", "/x")
        with pytest.raises(CircuitOpen) as caught:
            await twin.call("GET", "/x")
        assert route.calls == 8
        assert caught.value.retry_after_s is not None
        clock.ahead_s += 5
        await asyncio.gather(*(twin.call("GET", "/x") for _ in range(1)))
        await asyncio.gather(*(twin.call("GET", "/x") for _ in range(5)))


async def test_a_cancelled_probe_leaves_the_circuit_able_to_close() -> None:
    """Catches the probe slot that a cancelled call takes with it."""
    entered = asyncio.Event()
    hang = True

    async def route(request: Request) -> Response:
        if request.method == "POST":
            raise Unavailable("down")
        entered.set()
        if hang:
            await asyncio.Event().wait()
        return json_response({"fine": True})

    async with twin_of(route, attempts=1, breaker_failures=1, breaker_open_s=5) as (twin, clock):
        with pytest.raises(Unavailable):
            await twin.call("POST", "/x")
        clock.ahead_s += 5
        probe = asyncio.create_task(twin.call("GET", "/x"))
        await entered.wait()
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        hang = False
        assert await twin.call("GET", "/x") == {"fine": True}


async def test_a_probe_that_is_lost_holds_nobody_back_until_its_deadline() -> None:
    """Catches a peer that is well again and still refused, for as long as one call to it may take: the probe
    that it swallowed while it stood still, or that it takes minutes to answer."""
    route = Holding("POST")
    async with twin_of(route, attempts=1, breaker_failures=1, breaker_open_s=5) as (twin, clock):
        with pytest.raises(Unavailable):
            await twin.call("POST", "/x")
        clock.ahead_s += 5
        probe = asyncio.create_task(twin.call("PUT", "/x", deadline=Deadline.after(600, clock)))
        await route.entered.wait()
        with pytest.raises(CircuitOpen):
            await twin.call("GET", "/x")
        clock.ahead_s += 5
        answers = [await twin.call("GET", "/x") for _ in range(3)]
        assert answers == [{"method": "GET"}] * 3
        route.released.set()
        assert await probe == {"method": "PUT"}


async def test_a_late_answer_is_given_though_the_circuit_is_open_again() -> None:
    """Catches a write that was done and answered, and is told to its caller as one that was not tried."""
    route = Holding("POST", "GET")
    async with twin_of(route, attempts=1, breaker_failures=1, breaker_open_s=5) as (twin, clock):
        with pytest.raises(Unavailable):
            await twin.call("POST", "/x")
        clock.ahead_s += 5
        write = asyncio.create_task(twin.call("PUT", "/x", deadline=Deadline.after(600, clock)))
        await route.entered.wait()
        clock.ahead_s += 5
        with pytest.raises(Unavailable, match="down"):
            await twin.call("GET", "/x")
        with pytest.raises(CircuitOpen):
            await twin.call("GET", "/x")
        route.released.set()
        assert await write == {"method": "PUT"}


async def test_many_callers_of_a_peer_that_comes_back_are_all_served() -> None:
    """Catches callers at the same moment that leave the circuit open between them: some give up, one probes,
    and the rest come when it has closed."""
    entered, well = asyncio.Event(), False

    async def route(request: Request) -> Response:
        if request.method == "POST":
            raise Unavailable("down")
        entered.set()
        if not well:
            await asyncio.Event().wait()
        return json_response({})

    async with twin_of(route, attempts=1, breaker_failures=1, breaker_open_s=5) as (twin, clock):
        with pytest.raises(Unavailable):
            await twin.call("POST", "/x")
        clock.ahead_s += 5
        for _ in range(3):
            entered.clear()
            calls = [asyncio.create_task(twin.call("GET", "/x")) for _ in range(20)]
            await entered.wait()
            for call in calls:
                call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(end) for end in ends} <= {CircuitOpen, asyncio.CancelledError}
        well = True
        assert await twin.call("GET", "/x") == {}
        assert await asyncio.gather(*(twin.call("GET", "/x") for _ in range(20))) == [{}] * 20


async def test_open_streams_and_calls_that_wait_their_turn_open_no_circuit() -> None:
    """Catches a peer that is taken for dead because this process keeps all of its own connections busy: with
    streams that last for hours, or with many long calls."""
    inside, all_in, released = 0, asyncio.Event(), asyncio.Event()

    async def route(request: Request) -> Response:
        nonlocal inside
        if request.method == "POST":
            return EventStream(silence())
        if request.method == "PUT":
            inside += 1
            if inside == 100:
                all_in.set()
            await released.wait()
        return json_response({})

    async def silence() -> AsyncIterator[ServerEvent]:
        yield ServerEvent("hello")
        await released.wait()

    async with (
        twin_of(route, attempts=1, breaker_failures=1) as (twin, clock),
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(110):
            stream = twin.stream_events("POST", "/x")
            await stack.enter_async_context(contextlib.aclosing(stream))
            assert (await anext(stream)).data == "hello"
        assert await twin.call("GET", "/x") == {}
        long = [asyncio.create_task(twin.call("PUT", "/x")) for _ in range(100)]
        await all_in.wait()
        with pytest.raises(DeadlineExceeded, match="100 calls"):
            await twin.call("GET", "/x", deadline=Deadline.after(1.1, clock))
        released.set()
        assert await asyncio.gather(*long) == [{}] * 100
        assert await twin.call("GET", "/x") == {}


async def test_a_stream_for_which_there_is_no_place_is_refused_or_waits() -> None:
    """Catches a watcher that hangs without a word because others hold every place, and a model's stream that
    is refused though it has time to wait."""
    released = asyncio.Event()

    async def events() -> AsyncIterator[ServerEvent]:
        yield ServerEvent("hello")
        await released.wait()

    async def route(request: Request) -> Response:
        return EventStream(events())

    async def first(deadline: Deadline | None) -> str:
        async with contextlib.aclosing(twin.stream_events("GET", "/x", deadline=deadline)) as stream:
            return (await anext(stream)).data

    async with twin_of(route) as (twin, clock):
        twin._streams = asyncio.Semaphore(1)  # pyright: ignore[reportPrivateUsage]
        async with contextlib.aclosing(twin.stream_events("GET", "/x")) as stream:
            await anext(stream)
            with pytest.raises(Unavailable, match="are open in this process"):
                await first(None)
            waits = asyncio.create_task(first(Deadline.after(30, clock)))
            assert (await asyncio.wait({waits}, timeout=0.1)) == (set(), {waits})
        assert await waits == "hello"
        released.set()


async def test_events_arrive_one_by_one_and_errors_within_are_raised() -> None:
    """Catches a stream that is buffered, and a failed stream that ends like a finished one."""
    gate = asyncio.Event()

    async def events() -> AsyncIterator[ServerEvent]:
        yield ServerEvent('{"n": 1}', "step", "1")
        await gate.wait()
        yield ServerEvent("two\nlines")
        raise Conflict("cancelled by somebody")

    async def route(request: Request) -> Response:
        assert request.headers["last-event-id"] == "0"
        return EventStream(events())

    async with twin_of(route) as (twin, _):
        stream = twin.stream_events("GET", "/x", last_event_id="0")
        assert await anext(stream) == ServerEvent('{"n": 1}', "step", "1")
        gate.set()
        assert (await anext(stream)).data == "two\nlines"
        with pytest.raises(Conflict, match="by somebody"):
            await anext(stream)


async def test_a_reader_that_leaves_ends_the_stream_at_its_source() -> None:
    """Catches sources and connections that live on after their reader."""
    closed = asyncio.Event()

    async def events() -> AsyncIterator[ServerEvent]:
        try:
            while True:
                yield ServerEvent("x")
                await asyncio.sleep(0)
        finally:
            closed.set()

    async def route(request: Request) -> Response:
        return EventStream(events())

    async with twin_of(route) as (twin, _):
        async with contextlib.aclosing(twin.stream_events("GET", "/x")) as stream:
            await anext(stream)
        await asyncio.wait_for(closed.wait(), 10)


@contextlib.asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """Sends the same bytes to every request and closes the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", Unavailable),
        (_OK + b"content-length: 50\r\n\r\n{", Unavailable),
        (_OK + b"content-length: 1\r\n\r\n{", Unavailable),
        (b"nonsense\r\n\r\n", Unavailable),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 5\r\n\r\noops!", Unavailable),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", Unavailable),
        (b"HTTP/1.1 429 Slow\r\nretry-after: 900\r\ncontent-length: 0\r\n\r\n", RateLimited),
    ],
)
async def test_what_is_not_our_protocol_is_an_error_of_ours(
    answer: bytes, kind: type[AgenticFlowError]
) -> None:
    """Catches raw aiohttp errors, followed redirects, and half answers taken for whole ones."""
    async with raw_server(answer) as url, HttpTwin(url, PeerSettings(attempts=1)) as twin:
        with pytest.raises(kind):
            await twin.call("GET", "/x")


@pytest.mark.parametrize(
    "body", [b"5\r\ndata:\r\n", b"9\r\ndata: 1\n\n\r\n7\r\ndata: 2\r\n0\r\n\r\n", b"9\r\ndata: 1\n\n\r\n"]
)
async def test_a_cut_stream_is_an_error(body: bytes) -> None:
    """Catches a truncated stream reported as complete."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    async with raw_server(head + body) as url, HttpTwin(url, PeerSettings(attempts=1)) as twin:
        with pytest.raises(Unavailable):
            async for _ in twin.stream_events("GET", "/x"):
                pass


async def test_the_callers_own_token_is_shown_until_it_expires() -> None:
    """Catches calls made without the caller's identity, or with a token that is about to die."""
    seen: list[str | None] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        lines = [line for line in head.split("\r\n") if line.startswith("authorization")]
        seen.append(lines[0] if lines else None)
        writer.write(_OK + b"content-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        clock = CountingClock()
        async with HttpTwin(url, clock=clock) as twin:
            for left_s in (60.0, 1.0):
                credential = Credential("token-of-ann", clock.time_s() + left_s)
                await twin.call("GET", "/x", principal=Principal("t", "ann", frozenset(), credential))
    assert seen == ["authorization: bearer token-of-ann", None]


@pytest.mark.parametrize("url", ["127.0.0.1:5432", "ftp://x", ""])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    """Catches a wrong setting that only shows at the first call."""
    with pytest.raises(InvalidSettings):
        HttpTwin(url)
