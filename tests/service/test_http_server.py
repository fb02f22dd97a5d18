"""The server's own protocol on real sockets: whole answers, streams, lines of headers, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.settings import Settings
from agentic_flow.core.web import create_app
from agentic_flow.core.web_floor import DirectRoute, OutgoingAnswer
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

Work = Callable[[Scope, Receive, Send], Awaitable[None]]


class _App:
    """An ASGI app of one function."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._work(scope, receive, send)


def _app(**routes: Work) -> Starlette:
    async def ready() -> dict[str, bool]:
        return {}

    return create_app(
        "platform",
        [
            DirectRoute(f"/{name}", _App(work), methods=["GET", "HEAD", "POST"])
            for name, work in routes.items()
        ],
        authenticator=NoCredentials(),
        settings=Settings.model_validate({"serve": {"body_max_bytes": 1000}}),
        ready=ready,
    )


@asynccontextmanager
async def _connected(**routes: Work) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to a server of these routes."""
    async with serving(_app(**routes)) as (url,):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        try:
            yield reader, writer
        finally:
            writer.close()


def _request(path: str, method: str = "GET", body: bytes = b"", more: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an answer with a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [line[16:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
    return head, await reader.readexactly(int(length))


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    state: dict[str, Any] = scope["state"]
    body: bytes = await state["body"].whole()
    await state["answer"].give(200, [(b"x-path", scope["raw_path"])], scope["query_string"] + b"|" + body)


async def test_requests_one_after_the_other() -> None:
    """Catches answers mixed up, lost or cut where a client sends requests before it has its answers."""
    async with _connected(echo=_echo) as (reader, writer):
        writer.write(_request("/echo?a=%20b", "POST", b"one") + _request("/echo", "POST", b"two"))
        assert (await _answer(reader))[1] == b"a=%20b|one"
        assert (await _answer(reader))[1] == b"|two"
        for piece in (_request("/echo", "POST", b"three")[:-2], b"ee"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await _answer(reader))[1] == b"|three"


async def test_head_has_a_length_and_no_body() -> None:
    """Catches a body behind the head of HEAD, which the client would take for the next answer."""
    async with _connected(echo=_echo) as (reader, writer):
        writer.write(_request("/echo?x", "HEAD") + _request("/echo?y"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 2\r\n" in head
        assert (await _answer(reader))[1] == b"y|"


async def test_too_large_is_refused_before_it_is_read() -> None:
    """Catches a limit of bodies that the direct way around ASGI forgets."""
    async with _connected(echo=_echo) as (reader, writer):
        writer.write(_request("/echo", "POST", b"x" * 1001))
        head, body = await _answer(reader)
        assert head.startswith(b"HTTP/1.1 413 "), head
        assert b"1000 bytes" in body


async def test_a_line_break_in_a_header_reaches_nobody() -> None:
    """Catches a value with a line break that becomes a header of its own."""

    async def split(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["answer"].give(200, [(b"x-model", b"m\r\nset-cookie: a=b")], b"")

    async with _connected(split=split) as (reader, writer):
        writer.write(_request("/split"))
        assert b"set-cookie" not in await reader.read()


async def test_a_head_does_not_wait_for_its_body() -> None:
    """Catches a stream whose client learns nothing until its first event is there."""
    seen = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await seen.wait()
        for piece in (b"a", b"", b"b"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"c"})

    async with _connected(slow=slow) as (reader, writer):
        writer.write(_request("/slow", more="connection: close\r\n"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding: chunked\r\n" in head
        assert b"connection: close\r\n" in head
        seen.set()
        assert await reader.read() == b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n"


@pytest.mark.parametrize("early", [False, True])
async def test_a_client_that_leaves_is_noticed_at_once(early: bool) -> None:
    """Catches a call to a provider that goes on, and costs, for a client that has left."""
    asked, gone, told = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        answer: OutgoingAnswer = scope["state"]["answer"]
        await scope["state"]["body"].whole()
        if early:
            answer.on_gone(told.set)
        asked.set()
        await gone.wait()
        if not early:
            while (await receive())["type"] != "http.disconnect":
                pass
            answer.on_gone(told.set)
        await told.wait()
        assert answer.put(b"to nobody", more=True), "nobody is waited for"

    async with _connected(wait=wait) as (_, writer):
        writer.write(_request("/wait"))
        await asked.wait()
        writer.close()
        gone.set()
        async with asyncio.timeout(30):
            await told.wait()


async def test_over_plain_asgi() -> None:
    """Catches direct routes that answer only behind our own server."""
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=_app(echo=_echo)), base_url="http://localhost"
    ) as client:
        answer = await client.post("/echo?q", content=b"body")
        assert (answer.status_code, answer.content) == (200, b"q|body")
        assert answer.headers["x-request-id"]
