"""The transport on real sockets: each way in which a connection fails is an error of its own, soon."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    ProviderFailed,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
)
from agentic_flow.gateway.transport import HttpTransport

pytestmark = pytest.mark.anyio
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@asynccontextmanager
async def server(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncGenerator[int]:
    """A server that does what `handler` does after the request's head; its port."""
    at_work: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        at_work[task] = writer
        try:
            await reader.readuntil(b"\r\n\r\n")
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()
        except (asyncio.IncompleteReadError, OSError):
            return  # the client has left
        finally:
            writer.transport.abort()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in at_work:
            task.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)
        await asyncio.sleep(0)  # an aborted connection is closed by the loop's next turn


async def get(
    url: str,
    *,
    deadline_s: float = 20.0,
    patience_s: float | None = None,
    forwarded: bool = False,
    **more: float,
) -> bytes:
    """The body of an answer, by a transport of its own, read or forwarded."""
    settings = {"idle_timeout_s": 10.0, "response_max_bytes": 10_000, **more}
    transport = HttpTransport(**settings)  # type: ignore[arg-type]
    try:
        async with transport.open(
            "GET",
            url,
            provider="p",
            headers={},
            body=None,
            deadline=Deadline.after(deadline_s),
            patience_s=patience_s,
        ) as answer:
            if not forwarded:
                return await answer.read()
            pieces: list[bytes] = []

            def take(piece: bytes) -> bool:
                pieces.append(piece)
                return True

            await answer.forward(take)
            return b"".join(pieces)
    finally:
        await transport.close()


EACH_WAY = pytest.mark.parametrize("forwarded", [False, True], ids=["read", "forwarded"])


async def failure(url: str, *, forwarded: bool = False, **more: float) -> AgenticFlowError:
    with pytest.raises(AgenticFlowError) as caught:
        await get(url, forwarded=forwarded, **more)
    assert caught.value.details["provider"] == "p"
    return caught.value


@contextmanager
def taken_port(*, full: bool) -> Generator[int]:
    """A port where nobody listens, or where the queue of connections is full: then nothing answers."""
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(socket.socket())
        bound.bind(("127.0.0.1", 0))
        if full:
            bound.listen(0)
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(bound.getsockname())
        yield bound.getsockname()[1]


async def test_refused_and_unanswered_connections_are_told_apart() -> None:
    """Catches a dead provider that holds each call for the length of its deadline."""
    with taken_port(full=False) as port:
        refused = await failure(f"http://127.0.0.1:{port}/")
    assert type(refused) is ProviderFailed
    assert refused.details["reason"] == "refused"
    with taken_port(full=True) as port:
        mute = await failure(f"http://127.0.0.1:{port}/", connect_timeout_s=0.2)
        late = await failure(f"http://127.0.0.1:{port}/", deadline_s=0.2)
    assert type(mute) is ProviderFailed
    assert mute.details["reason"] == "connect_timeout"
    assert "within 0.2 s" in mute.message
    assert type(late) is DeadlineExceeded


async def test_a_name_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong host name that looks like a broken connection."""

    def unknown(*about: object, **more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    # A name server that is out of reach would let the time for a connection pass first.
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = await failure("http://no-such-host.invalid/")
    assert type(error) is ProviderFailed
    assert error.details["reason"] == "dns"
    assert "no-such-host.invalid" in error.message


async def test_tls_failures_are_not_retried(tmp_path: Path) -> None:
    """Catches an untrusted certificate, or a port without TLS, that is tried again and again."""
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def unreached(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 0\r\n\r\n")

    async with server(unreached, context) as port:
        untrusted = await failure(f"https://127.0.0.1:{port}/")

    async with plain_server() as port:
        no_tls = await failure(f"https://127.0.0.1:{port}/")
    for error in (untrusted, no_tls):
        assert type(error) is ProviderRejected
        assert error.details["reason"] == "tls"
        assert not error.retryable


@asynccontextmanager
async def plain_server() -> AsyncGenerator[int]:
    """A server that does not speak TLS: it answers whatever comes with a refusal of HTTP."""
    writers: list[asyncio.StreamWriter] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    listening = await asyncio.start_server(refuse, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


def self_signed(folder: Path) -> Path:
    """A certificate and its key in one file, which nobody trusts."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def sends(*pieces: bytes, then: str = "close") -> Handler:
    """Write the pieces, then close, reset or hang."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if then == "reset":
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif then == "hang":
            await reader.read()

    return handle


@pytest.mark.parametrize(
    ("handler", "kind", "reason"),
    [
        (sends(), ProviderFailed, "reset"),
        (sends(then="reset"), ProviderFailed, "reset"),
        (sends(b"this is not HTTP\r\n\r\n"), ProviderProtocol, "http"),
        (sends(HEAD + b"content-length: 100\r\n\r\nhalf"), ProviderProtocol, "truncated"),
        (sends(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhel"), ProviderProtocol, "truncated"),
        (sends(HEAD + b"transfer-encoding: chunked\r\n\r\nno chunk\r\n"), ProviderProtocol, "http"),
        (sends(then="hang"), ProviderFailed, "silent"),
        (sends(HEAD, then="hang"), ProviderFailed, "silent"),
        (sends(HEAD + b"content-length: 9\r\n\r\nhalf", then="hang"), ProviderFailed, "silent"),
    ],
    ids=[
        *("closed", "reset", "no-http", "short", "short-chunk", "bad-chunk"),
        *("mute", "half-head", "stall"),
    ],
)
@EACH_WAY
async def test_broken_answers_are_told_apart(
    handler: Handler, kind: type[AgenticFlowError], reason: str, forwarded: bool
) -> None:
    """Catches a failure under the wrong name: what may be repeated, and what is said, depend on it."""
    # Where something is to come, a machine that stands still for a moment must not be taken for silence.
    limit_s = 0.2 if reason == "silent" else 10.0
    async with server(handler) as port:
        url = f"http://127.0.0.1:{port}/"
        error = await failure(url, patience_s=limit_s, idle_timeout_s=limit_s, forwarded=forwarded)
    assert type(error) is kind
    assert error.details["reason"] == reason


@EACH_WAY
async def test_a_reset_within_the_body_is_a_failure(forwarded: bool) -> None:
    """Catches a connection lost in the middle that ends the answer as if it were whole."""
    async with server(sends(HEAD + b"content-length: 9\r\n\r\nhalf", then="reset")) as port:
        error = await failure(f"http://127.0.0.1:{port}/", forwarded=forwarded)
    assert type(error) in (ProviderFailed, ProviderProtocol)
    assert error.retryable


@EACH_WAY
async def test_one_timer_bounds_every_wait_anew(forwarded: bool) -> None:
    """Catches an idle limit that counts from the start of the answer, and a deadline that chunks put off."""

    async def drips(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 40\r\n\r\n")
        for _turn in range(40):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.06)

    async with server(drips) as port:
        url = f"http://127.0.0.1:{port}/"
        # Shorter than the whole answer, and longer than a busy machine stands still.
        assert await get(url, idle_timeout_s=2.0, forwarded=forwarded) == b"x" * 40
        late = await failure(url, idle_timeout_s=2.0, deadline_s=0.3, forwarded=forwarded)
    assert type(late) is DeadlineExceeded


@EACH_WAY
async def test_the_size_limit_holds_for_every_body(forwarded: bool) -> None:
    """Catches a body that is read whole before its size is looked at."""
    async with server(sends(HEAD + b"content-length: 50000\r\n\r\n", b"x" * 50_000)) as port:
        error = await failure(f"http://127.0.0.1:{port}/", forwarded=forwarded)
    assert type(error) is TooLarge


async def test_what_is_forwarded_stops_where_it_is_told_to_and_can_be_read_on() -> None:
    """Catches pieces that are lost or doubled between forwarding and reading, and an error of whoever takes
    them that is lost in the loop."""
    more = asyncio.Event()

    async def halves(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"connection: close\r\ncontent-length: 8\r\n\r\nhalf")
        await more.wait()
        writer.write(b"rest")
        await writer.drain()

    transport = HttpTransport(idle_timeout_s=5, response_max_bytes=1000)
    try:
        async with server(halves) as port:
            url, given = f"http://127.0.0.1:{port}/", list[bytes]()

            def first(piece: bytes) -> bool:
                given.append(piece)
                more.set()
                return False

            async with transport.open(
                "GET", url, provider="p", headers={}, body=None, deadline=Deadline.after(10), patience_s=None
            ) as answer:
                await answer.forward(first)
                assert b"".join(given) + await answer.read() == b"halfrest"

            def refuses(piece: bytes) -> bool:
                raise ValueError(piece)

            with pytest.raises(ValueError, match="half"):
                async with transport.open(
                    "GET",
                    url,
                    provider="p",
                    headers={},
                    body=None,
                    deadline=Deadline.after(10),
                    patience_s=None,
                ) as answer:
                    await answer.forward(refuses)
    finally:
        await transport.close()


async def test_a_connection_is_used_again_after_a_whole_answer_only() -> None:
    """Catches the rest of one answer read as the beginning of the next one's."""
    connections = 0

    async def two(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            writer.write(HEAD + b"content-length: 5\r\n\r\nwhole")
            await writer.drain()
            await reader.readuntil(b"\r\n\r\n")

    transport = HttpTransport(idle_timeout_s=5, response_max_bytes=1000)
    try:
        async with server(two) as port:

            async def ask(read: bool) -> bytes:
                async with transport.open(
                    "GET",
                    f"http://127.0.0.1:{port}/",
                    provider="p",
                    headers={},
                    body=None,
                    deadline=Deadline.after(10),
                    patience_s=None,
                ) as answer:
                    return await answer.read() if read else b""

            for _ in range(5):
                assert await ask(True) == b"whole"
            assert connections == 1
    finally:
        await transport.close()
