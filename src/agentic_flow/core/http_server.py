"""uvicorn's HTTP/1.1 protocol with less work for each request, and a way around ASGI where it costs most.

What uvicorn does for a request is half parsing and half bookkeeping: a timer for each pause between requests,
two regular expressions for each header, two writes, and so two system calls and two wakings of the client,
for each answer. Here the head waits for the first of the body, one timer serves a connection for all of its
life, and an app that knows `Exchange` can answer at once. Everything else is uvicorn's: parsing, pipelining,
flow control, draining, TLS.

Source: uvicorn 0.54, `uvicorn/protocols/http/httptools_impl.py`.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Protocol, cast

import httptools
from starlette.types import Message, Receive, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

EXTENSION = "agentic_flow.exchange"
"""Under this name the scope's `extensions` hold the `Exchange`."""

HELD_S = 0.2
"""A request that may be answered without a task waits so long for the rest of its body before it gets one."""

RawHeaders = Iterable[tuple[bytes, bytes]]
# Paths that came before, as texts: the same few come all the time.
_PATHS: dict[bytes, str] = {}
_PATHS_MAX, _PATH_KEPT_MAX_BYTES = 256, 128
_PLAIN_PATH = frozenset(range(0x21, 0x7F)) - frozenset(b"%#")
_OK = STATUS_LINE[200][:-2]


class Exchange(Protocol):
    """A request and its answer, beside ASGI: what is there already is had without waiting for it."""

    def whole_body(self) -> bytes | None:
        """The request's body, if all of it is there; None: receive it by ASGI. Only before the first
        `receive`."""
        ...

    def begin(self, status: int, headers: RawHeaders) -> None:
        """The head of an answer. It is sent with what comes next, or by itself in the loop's next turn."""
        ...

    def put(self, data: bytes, *, more: bool) -> bool:
        """A piece of the answer's body, after `begin`. False: more than enough waits to be sent; await
        `drained` before the next one. What is put after the client has left goes nowhere."""
        ...

    async def drained(self) -> None:
        """Wait until the client has taken enough of what was put."""
        ...

    def on_gone(self, told: Callable[[], None] | None) -> None:
        """Call this once if the client leaves before its answer is complete; at once if it has left."""
        ...


class WholeExchange(Exchange, Protocol):
    """An `Exchange` whose request is there to its end, and for which no task was made."""

    @property
    def scope(self) -> Any:
        """As ASGI has it."""
        ...

    @property
    def body(self) -> bytes | bytearray:
        """The request's body, until `whole_body` took it."""
        ...

    @property
    def flow(self) -> FlowControl:
        """Tells by `write_paused` whether the client has not taken enough of earlier answers yet."""
        ...

    def on_end(self, told: Callable[[], None] | None) -> None:
        """`on_gone`; and call it as well if the server is told to stop before the answer is complete."""
        ...

    def give(self, lines: list[bytes], body: bytes) -> None:
        """A whole answer with status 200, instead of `begin` and `put`.

        Args:
            lines: Of its head, without their ends; the body's length is added.
        """
        ...

    def run(self) -> None:
        """Answer with the app after all, in a task."""
        ...


class AtOnce(Protocol):
    """What an app offers that can answer without a task; the app has it as its attribute `at_once`."""

    @property
    def places(self) -> Container[tuple[str, str]]:
        """Path and method of the requests that may be answered so."""
        ...

    def take(self, exchange: WholeExchange) -> bool:
        """Answer it, now or later. False: it needs a task, and nothing was done. Raises nothing."""
        ...


class AsgiExchange:
    """An `Exchange` over plain ASGI, for other servers and for clients in tests: what is put is sent by
    `drained`.

    Args:
        receive, send: Of the request.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._waiting: list[Message] = []
        self._watching: asyncio.Task[None] | None = None

    def whole_body(self) -> bytes | None:
        """See `Exchange`."""
        return None

    def begin(self, status: int, headers: RawHeaders) -> None:
        """See `Exchange`."""
        self._waiting.append({"type": "http.response.start", "status": status, "headers": list(headers)})

    def put(self, data: bytes, *, more: bool) -> bool:
        """See `Exchange`."""
        self._waiting.append({"type": "http.response.body", "body": data, "more_body": more})
        return False

    async def drained(self) -> None:
        """See `Exchange`."""
        while self._waiting:
            await self._send(self._waiting.pop(0))

    def on_gone(self, told: Callable[[], None] | None) -> None:
        """See `Exchange`. The request's body must have been received."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if told is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watch(told))

    async def _watch(self, told: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        told()


class _Cycle(RequestResponseCycle):
    """uvicorn's request and answer, as an `Exchange` too."""

    # As they begin; most requests change few of them.
    disconnected = False
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding: bool | None = None
    expected_content_length = 0
    start: Callable[[_Cycle], None] | None = None
    """Makes the task; None once it was made."""
    _event: asyncio.Event | None = None
    _taken = False
    _head: Sequence[bytes] = ()
    _told: Callable[[], None] | None = None
    _stopping: Callable[[], None] | None = None

    def __init__(self, protocol: ServerProtocol, scope: Any, keep_alive: bool) -> None:
        # What uvicorn's own sets, without its many arguments and the event that most requests never need.
        self.scope = scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.logger = protocol.logger
        self.access_logger = protocol.access_logger
        self.access_log = protocol.access_log
        self.default_headers = protocol.server_state.default_headers
        self.on_response = protocol.on_response_complete
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.body = bytearray()

    @property
    def message_event(self) -> asyncio.Event:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Wakes `receive`; made when somebody waits, or has something to wake for."""
        event = self._event
        if event is None:
            event = self._event = asyncio.Event()
            told = not self._taken and (not self.more_body or bool(self.body))
            if told or self.disconnected or self.response_complete:
                event.set()
        return event

    # WholeExchange

    def on_end(self, told: Callable[[], None] | None) -> None:
        """See `WholeExchange`."""
        self._told = self._stopping = told
        if told is not None and self.disconnected:
            self.gone()

    def stop(self) -> None:
        """The server is told to stop."""
        told, self._stopping = self._stopping, None
        if told is not None:
            told()

    def run(self) -> None:
        """See `WholeExchange`."""
        start, self.start, self._stopping = self.start, None, None
        assert start is not None, "a request gets one task"
        start(self)

    def give(self, lines: list[bytes], body: bytes) -> None:
        """See `WholeExchange`."""
        if self.response_started:
            raise RuntimeError("an answer begins once")
        self.response_started = True
        if self.disconnected:
            return
        head = [_OK, *lines]
        for name, value in self.default_headers:
            head.append(name + b": " + value)
        head.append(b"content-length: %d" % len(body))
        if not self.keep_alive:
            head.append(b"connection: close")
        text = b"\r\n".join(head)
        ends = len(head) - 1
        if text.count(b"\n") != ends or text.count(b"\r") != ends or b"\0" in text:
            raise RuntimeError("a header has a line break in it")
        shown = b"" if self.scope["method"] == "HEAD" else body
        self.transport.write(b"%b\r\n\r\n%b" % (text, shown))
        self._end()

    # Exchange

    def whole_body(self) -> bytes | None:
        """See `Exchange`."""
        if self.more_body or self.disconnected:
            return None
        body = bytes(self.body)
        self.body = bytearray()
        self._taken = True
        if self._event is not None:
            self._event.clear()  # what `receive` waits for now is the end of the connection
        if self.flow.read_paused:
            self.flow.resume_reading()
        return body

    def begin(self, status: int, headers: RawHeaders) -> None:
        """See `Exchange`."""
        if self.response_started:
            raise RuntimeError("an answer begins once")
        self.response_started = True
        self.waiting_for_100_continue = False
        lines = [STATUS_LINE[status]]
        for name, value in (*self.default_headers, *headers):
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"transfer-encoding":
                self.chunked_encoding = value.lower() == b"chunked"
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                continue
            lines.append(name + b": " + value + b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header has a line break in it")
        self._head = [head, b"\r\n"]

    def put(self, data: bytes, *, more: bool) -> bool:
        """See `Exchange`."""
        if self.disconnected:
            return True
        pieces, self._head = [*self._head], ()
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif self.chunked_encoding:
            if data:
                pieces += (b"%x\r\n" % len(data), data, b"\r\n" if more else b"\r\n0\r\n\r\n")
            elif not more:
                pieces.append(b"0\r\n\r\n")
        else:
            self.expected_content_length -= len(data)
            if self.expected_content_length < 0:
                raise RuntimeError("the body is longer than its content-length")
            pieces.append(data)
        # One write is one system call, and one waking of the client.
        self.transport.write(b"".join(pieces))
        if not more:
            self._complete()
        return not self.flow.write_paused

    async def drained(self) -> None:
        """See `Exchange`."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()

    def on_gone(self, told: Callable[[], None] | None) -> None:
        """See `Exchange`."""
        self._told = told
        if told is not None and self.disconnected:
            self.gone()

    def gone(self) -> None:
        """The client has left."""
        told, self._told = self._told, None
        if told is not None:
            told()

    # ASGI

    async def send(self, message: Any) -> None:
        """As ASGI has it."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if not self.response_started:
            if kind != "http.response.start":
                raise RuntimeError(f"an answer begins with its head, not with {kind!r}")
            self.begin(message["status"], message.get("headers", ()))
            asyncio.get_running_loop().call_soon(self._send_head)
        elif self.response_complete or kind != "http.response.body":
            raise RuntimeError(f"{kind!r} has no place here")
        else:
            self.put(message.get("body", b""), more=message.get("more_body", False))

    def _send_head(self) -> None:
        """Nothing came that it could be sent with."""
        if self._head and not self.transport.is_closing():
            self.transport.write(b"".join(self._head))
        self._head = ()

    def _complete(self) -> None:
        if self.expected_content_length != 0:
            raise RuntimeError("the body is shorter than its content-length")
        self._end()

    def _end(self) -> None:
        self.response_complete = True
        # Or the scope and this would hold each other, and only the garbage collector could free them.
        self.scope["extensions"] = {}
        self._told = self._stopping = self.start = None
        if self._event is not None:
            self._event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class Connections(ServerState):
    """What the connections of one server share.

    Args:
        linger_s: Set once the server is to stop: how long a connection may be idle from then on.
        is_over: Whether the server has drained, so that nothing is begun any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linger_s: float | None = None
        self.is_over = False


class ServerProtocol(HttpToolsProtocol):
    """One connection of a client."""

    server_state: Connections

    def __init__(self, *given: Any, **about: Any) -> None:
        super().__init__(*given, **about)
        self._idle_since_s: float | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._held: _Cycle | None = None
        self._held_timer: asyncio.TimerHandle | None = None
        self._at_once: AtOnce | None = None
        self._places: Container[tuple[str, str]] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if self.server_state.is_over:
            transport.abort()
        elif self.server_state.linger_s is not None:
            self.leave()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.server_state.is_over:
            return
        self._idle_since_s = None
        parser: Any = self.parser
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse(error)
        held = self._held
        if held is not None:
            self._begin(held)

    def _refuse(self, error: Exception) -> None:
        """What uvicorn does with what is no request, and with the wish for another protocol."""
        if isinstance(error, httptools.HttpParserUpgrade):
            self._unsupported_upgrade_warning()  # no other protocol is spoken here
            return
        said = "Invalid HTTP request received."
        self.logger.warning(said)
        self.send_400_response(said)

    def _begin(self, held: _Cycle) -> None:
        """Answer a request that was held until it is whole, or go on waiting for the rest of it."""
        if not held.more_body:
            at_once = self._at_once
            self._held = None
            if self._held_timer is not None:
                self._release()
            # One that others wait behind gets a task: the protocol looks after the last one only.
            if at_once is None or held is not self.cycle or not at_once.take(held):
                held.run()
        elif self.flow.read_paused or self.transport.is_closing():
            self._run_held()
        elif self._held_timer is None:
            self._held_timer = self.loop.call_later(HELD_S, self._run_held)

    def _release(self) -> None:
        self._held = None
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None

    def _run_held(self) -> None:
        held = self._held
        self._release()
        if held is not None:
            held.run()

    def leave(self) -> None:
        """The server is to stop: close after the next answer, or when nothing was asked for long enough.

        An answer that has begun without telling so leaves the connection open after it: who sends the next
        request in that moment could not know.
        """
        assert self.server_state.linger_s is not None
        self.timeout_keep_alive = self.server_state.linger_s
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        cycle = cast(_Cycle | None, self.cycle)
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = cycle.keep_alive and cycle.response_started
        else:
            self._begin_idle()

    def shutdown(self) -> None:
        """What goes on without a task gets one, which the server waits for and can cancel."""
        if self.server_state.linger_s is None:
            super().shutdown()
        self._run_held()
        cycle = cast(_Cycle | None, self.cycle)
        if cycle is not None:
            cycle.stop()

    def end(self) -> None:
        """The server has drained: close, now or after the last words of an answer that was cut."""
        HttpToolsProtocol.shutdown(self)

    def _run(self, cycle: _Cycle) -> None:
        self._start_asgi_task(cycle, cast(Any, self).app)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        extensions: Any = {EXTENSION: cycle}
        cycle.scope["extensions"] = extensions
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._run_held()  # it finds that the client has left
        cycle = cast(_Cycle | None, self.cycle)
        if cycle is not None and not cycle.response_complete:
            cycle.gone()

    def on_headers_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        parser: Any = self.parser
        connection: Any = self
        app = connection.app
        scope: Any = self.scope
        url = self.url
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
        known = _PATHS.get(url)
        if known is not None:
            path, raw_path, query = known, url, b""
        elif url.startswith(b"/") and _PLAIN_PATH.issuperset(url):
            raw_path, _, query = url.partition(b"?")
            path = raw_path.decode("ascii")
            if not query and len(_PATHS) < _PATHS_MAX and len(url) < _PATH_KEPT_MAX_BYTES:
                _PATHS[url] = path
        else:
            parsed = httptools.parse_url(url)
            raw_path, query = parsed.path, parsed.query or b""
            path = urllib.parse.unquote(raw_path.decode("ascii"))
        scope["path"] = path
        scope["raw_path"] = raw_path
        scope["query_string"] = query
        before: Any = self.cycle
        stays = self.server_state.linger_s is None
        cycle = _Cycle(self, scope, stays and version != "1.0" and parser.should_keep_alive())
        self.cycle = cycle
        if before is None or before.response_complete:
            if self._at_once is None:
                at_once: AtOnce | None = getattr(app, "at_once", None)
                if at_once is not None:
                    self._at_once, self._places = at_once, at_once.places
            if (path, scope["method"]) in self._places and not self.expect_100_continue:
                cycle.start = self._run
                self._held = cycle
            else:
                self._start_asgi_task(cycle, app)
        else:
            before.stop()
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))

    # One timer for all pauses of a connection: setting one for each is a tenth of a small request.

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = None

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        held = self._held
        if held is None or held is not self.cycle:
            super().on_body(body)
            return
        held.body += body
        if len(held.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        held = self._held
        if held is None or held is not self.cycle:
            super().on_message_complete()
        else:
            held.more_body = False

    def on_response_complete(self) -> None:
        """Go on with what waits, or wait for the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._begin_idle()

    def _begin_idle(self) -> None:
        self._idle_since_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since_s is None:
            return  # the end of the request that is under way sets it again
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._idle_timer = self.loop.call_later(left_s, self._look_idle)
