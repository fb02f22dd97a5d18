"""HTTP/1.1 to providers: connections that are kept and used again, on an asyncio protocol with httptools.

A general client's sessions, URLs, cookies, redirects and hooks are most of what a small request through a
gateway costs; none of them is wanted here. What is: every answer whole or known to be broken, one connection
never giving the rest of one answer to the next, bounded buffers. Errors are those of Python (`OSError`,
`ssl.SSLError`) and the two below; `transport.py` says what they mean.

Sources: RFC 9112 (HTTP/1.1), sections 6, 8 and 9; RFC 8305 (Happy Eyeballs).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs
import httptools

KEEPALIVE_S = 30.0
"""How long a connection is kept that nothing is asked over."""
_OTHER_ADDRESS_AFTER_S = 0.25
_HEAD_MAX_BYTES = 256 * 1024
_BUFFERED_MAX_BYTES = 256 * 1024
# Small bodies go in one write with their head.
_JOINED_MAX_BYTES = 64 * 1024
_PATH_SAFE = "%/:=&?~+!$,;'@()*[]"


_HEADER_NAMES = {
    name: name.decode().lower()
    for lower in (b"content-type", b"content-length", b"date", b"server", b"connection", b"transfer-encoding")
    for name in (lower, lower.title())
}


class Malformed(Exception):
    """What came is no HTTP/1.1 answer."""


class Truncated(Exception):
    """The connection ended before the answer did."""


class Origin(NamedTuple):
    """Where connections go."""

    host: str
    port: int
    tls: bool


class Target(NamedTuple):
    """A URL taken apart.

    Args:
        origin: Where to connect.
        path: As it stands in the request, query included.
        head: The header lines that belong to it: the host, and credentials that stand in the URL.
    """

    origin: Origin
    path: str
    head: str


@functools.lru_cache(maxsize=1024)
def target_of(url: str) -> Target:
    """Take a URL apart.

    Raises:
        ValueError: it is none that can be asked.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(url)
    tls = parts.scheme == "https"
    host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
    port = parts.port or (443 if tls else 80)
    shown = f"[{host}]" if ":" in host else host
    head = f"host: {shown}{'' if parts.port is None else f':{port}'}\r\n"
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        head += f"authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"
    path = quote(parts.path or "/", safe=_PATH_SAFE)
    if parts.query:
        path += "?" + quote(parts.query, safe=_PATH_SAFE)
    return Target(Origin(host, port, tls), path, head)


def request_head(method: str, target: Target, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """The head of a request.

    Raises:
        ValueError: a header's value would begin another line.
    """
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}\r\n")
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines):
        raise ValueError("a header has a line break in it")
    # No other encoding is asked for: answers are read, or passed on to callers, as they come.
    common = "user-agent: agentic-flow\r\naccept-encoding: identity\r\n"
    return f"{method} {target.path} HTTP/1.1\r\n{target.head}{common}{text}\r\n".encode()


class Connection(asyncio.Protocol):
    """One connection, over which one request after the other is asked.

    Args:
        origin: Where it goes.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.idle_since_s = 0.0
        self.status = 0
        """Of the answer; 0 until its headers are there."""
        self.headers: dict[str, str] = {}
        """Of the answer, by lower-case name; the first of each."""
        self.complete = True
        """Whether the answer is there to its end."""
        self._loop = asyncio.get_running_loop()
        self._parser: Any = cast(Any, httptools).HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._head_bytes = 0
        self._paused = False
        self._lost = False
        self._keep = False
        self._sink: Callable[[bytes], bool] | None = None
        self._refused: Exception | None = None  # what the sink said of a piece
        self.told: Callable[[], None] | None = None
        """Called whenever something of the answer came, or none will any more, instead of waking who waits.
        Nobody waits until it is None again."""

    # For who asks

    def ask(self, head: bytes, body: bytes | None) -> None:
        """Send a request. The answer before it must be complete."""
        assert self.complete, "one answer after the other"
        assert self._transport is not None
        self.status, self.headers, self.complete = 0, {}, False
        self._chunks.clear()
        self._buffered = self._head_bytes = 0
        self._keep = False
        if body is not None and len(body) <= _JOINED_MAX_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines([head, body or b""])

    async def begun(self) -> None:
        """Wait for the status and the headers.

        Raises:
            Malformed, ConnectionError: none will come.
        """
        while self.status == 0:
            if self._error is not None:
                raise self._error
            await self._something()

    @property
    def flows(self) -> bool:
        """Whether the answer goes on: neither complete nor broken, and nothing of it is held back."""
        return not self.complete and self._error is None and not self._lost and not self._paused

    def peek(self) -> bytes:
        """What has come of the body and was not taken; it stays."""
        if len(self._chunks) != 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0]

    def buffered(self) -> bytes:
        """What has come of the body since the last time, all at once."""
        chunks = self._chunks
        if not chunks:
            return b""
        found = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        if self._paused and self._transport is not None and not self._lost:
            self._paused = False
            self._transport.resume_reading()
        return found

    async def chunk(self) -> bytes:
        """The next bytes of the body as they come, none at its end.

        Raises:
            Truncated, Malformed, ConnectionError: the rest will not come.
        """
        while True:
            found = self.buffered()
            if found or self.complete:
                return found
            if self._error is not None:
                raise self._error
            await self._something()

    async def forward(self, sink: Callable[[bytes], bool]) -> None:
        """Give the body to `sink` as it comes, in the loop's own callbacks, until it says False or it ends.

        Args:
            sink: What it raises ends the answer, and is raised here.

        Raises:
            Truncated, Malformed, ConnectionError: the rest will not come.
        """
        found = self.buffered()
        if found and not sink(found):
            return
        self._sink = sink
        try:
            while self._sink is not None and not self.complete:
                if self._error is not None:
                    raise self._error
                await self._something()
        finally:
            self._sink = None
        error, self._refused = self._refused, None
        if error is not None:
            raise error

    def fail(self, error: BaseException) -> None:
        """End the answer with this error, unless it has ended."""
        if self._error is None and not self.complete:
            self._error = error
        self._wake()

    @property
    def reusable(self) -> bool:
        """Whether another request can be asked over it."""
        return (
            self.complete
            and self._keep
            and not self._lost
            and self._error is None
            and self._transport is not None
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return not self._lost and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Close it at once."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()

    async def _something(self) -> None:
        """Wait until something comes, or nothing will any more."""
        if self._lost:
            raise ConnectionResetError("the connection was closed")
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self.told is not None:
            self.told()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # For the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.complete:
            self.abort()  # nobody asked for this
            return
        if self.status == 0:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self.status == 0 and self._head_bytes > _HEAD_MAX_BYTES:
                raise Malformed(f"its headers are larger than {_HEAD_MAX_BYTES} bytes")
        except Malformed as error:
            self.fail(error)
        except httptools.HttpParserError as error:
            self.fail(Malformed(str(error)))
        else:
            if self.told is not None:
                self.told()
            elif self._sink is None:
                self._wake()
            else:
                self._pour(self._sink)

    def _pour(self, sink: Callable[[bytes], bool]) -> None:
        """Hand on what came; who waits is woken only if that was the last of it."""
        chunks = self._chunks
        if len(chunks) == 1 and not self._paused:  # what `buffered` does, without a call for each piece
            chunk = chunks.pop()
            self._buffered = 0
        else:
            chunk = self.buffered()
        try:
            if chunk and not sink(chunk):
                self._sink = None
        except Exception as error:  # noqa: BLE001 - raised again where the answer is waited for
            self._sink = None
            self._refused = error
        if self._sink is None or self.complete:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._lost = True
        if self.complete:
            return
        lengthless = "content-length" not in self.headers and "transfer-encoding" not in self.headers
        if self.status == 0:
            self.fail(
                ConnectionResetError(str(exc) if exc else "the connection was closed without an answer")
            )
        elif exc is not None:
            self.fail(ConnectionResetError(str(exc) or type(exc).__name__))
        elif lengthless:
            self.complete = True  # such a body ends with its connection
            self._wake()
        else:
            self.fail(Truncated("the connection was closed within the body"))

    # For the parser

    def on_message_begin(self) -> None:
        """See `httptools.HttpResponseParser`, as for all that follow."""
        if self.complete:
            self._keep = False  # what follows the answer in the same bytes is nobody's

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        if self.complete:
            return
        known = _HEADER_NAMES.get(name)
        if known is None:
            known = name.decode("latin-1").lower()
        if known not in self.headers:
            self.headers[known] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head of the answer, or of an interim one, is there."""
        if self.complete:
            return
        status: int = self._parser.get_status_code()
        if status >= 200:
            self.status = status
            self._keep = self._parser.should_keep_alive()
        else:
            self.headers = {}  # an interim answer: the real one follows

    def on_body(self, body: bytes) -> None:
        """A piece of the body, without what frames it."""
        if self.complete:
            return
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _BUFFERED_MAX_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The answer is there to its end."""
        if self.status:
            self.complete = True


class ConnectionPool:
    """Connections by origin. It belongs to the event loop that first uses it."""

    def __init__(self) -> None:
        self._idle: dict[Origin, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    def take(self, origin: Origin) -> Connection | None:
        """One that is there already, the last used first: the others may go."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_open:  # all else was so when it was given back, and nothing was asked since
                return connection
            connection.abort()
        return None

    async def connect(self, origin: Origin) -> Connection:
        """A new one.

        Raises:
            socket.gaierror: the host has no address.
            ssl.SSLError: there is no trust, or no TLS.
            OSError: it cannot be reached.
        """
        import socket

        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        # Its stubs leave out what an address is made of.
        start_connection: Any = cast(Any, aiohappyeyeballs).start_connection
        connected = await start_connection(found, happy_eyeballs_delay=_OTHER_ADDRESS_AFTER_S, loop=loop)
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(origin),
                sock=connected,
                ssl=self._context() if origin.tls else None,
                server_hostname=origin.host if origin.tls else None,
            )
        except BaseException:
            connected.close()
            raise
        return connection

    def give(self, connection: Connection) -> None:
        """Take one back: kept where it can be used again, else closed."""
        if not connection.reusable:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since_s = loop.time()
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._timer is None:
            self._timer = loop.call_later(KEEPALIVE_S, self._sweep, loop)

    def close(self) -> None:
        """Close those that are idle."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
        self._idle.clear()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close those that were idle for too long, or were closed at the other end."""
        before_s = loop.time() - KEEPALIVE_S
        kept: dict[Origin, list[Connection]] = {}
        for origin, idle in self._idle.items():
            for connection in idle:
                if connection.reusable and connection.idle_since_s > before_s:
                    kept.setdefault(origin, []).append(connection)
                else:
                    connection.abort()
        self._idle = kept
        self._timer = loop.call_later(KEEPALIVE_S / 2, self._sweep, loop) if kept else None

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls
