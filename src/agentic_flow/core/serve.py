"""Puts apps on sockets: several uvicorn servers in one event loop, bound together and drained together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import ipaddress
import math
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, TypeVar, cast

import structlog
import uvicorn
from starlette.applications import Starlette

from agentic_flow.core.errors import InvalidSettings, PortInUse
from agentic_flow.core.http_server import Connections, ServerProtocol
from agentic_flow.core.settings import TlsSettings, env_name
from agentic_flow.core.tls import ServerTls

Listener = tuple[Starlette, str, int]
"""An app made by `create_app`, the host to bind, and the port (0: any free one)."""

_BACKLOG = 2048
# Longer than any client of ours keeps an idle connection, so that it is never we who close one in use.
_KEEP_ALIVE_S = 75
_UNWIND_S = 2.0
_COLLECT_AFTER = 10_000
# From the last new connection to its being accepted, with its TLS handshake begun.
_ARRIVAL_S = 0.1
# For all that wait to be accepted: uvloop accepts one in a turn of its loop.
_ACCEPTED_S = 5.0
# How long whoever arrives in the drain may be silent.
_SILENT_S = 1.0
_SO_ATTACH_FILTER = 26  # Linux, asm-generic/socket.h
# Linux, linux/tcp.h: tcp_info.tcpi_unacked, which for a listener counts those that wait to be accepted.
_UNACKED = struct.Struct("24xI")

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.serve")

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` for a process that serves: on uvloop where there is one.

    Half of what a small request costs is the event loop's: uvloop does it in C, and joins what is written to
    a socket within one turn into one system call, such as the head and the body of an answer.
    """
    try:
        from uvloop import new_event_loop
    except ImportError:  # it has no wheels for this platform
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def serve(
    apps: Sequence[Listener],
    *,
    tls: TlsSettings | None = None,
    drain_timeout_s: float = 10.0,
    linger_s: float = 0.0,
    on_ready: Callable[[list[tuple[str, int]]], None] | None = None,
    on_drain: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
    signals: bool = True,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then accept nothing more and finish what is in flight.

    All sockets are bound before any app's lifespan starts, so nothing is ever half-started. On the way out
    event streams end, other requests get `drain_timeout_s` and are then cancelled, and the lifespans exit in
    reverse order. A second signal ends the process at once: what was acknowledged is on disk anyway.

    Between the signal and that, the ports are open for `linger_s` more: health says that they are about to
    close, and each answer asks the client to close its connection. Whoever keeps no connection idle for so
    long, and looks at the health or takes a refused connection for what it is, loses no request.

    Args:
        apps: Each with its host and port.
        tls: Certificates for every port, looked at again while it serves; none set means plain HTTP.
        drain_timeout_s: Seconds given to requests in flight.
        linger_s: Seconds for which requests are taken still once it is to stop.
        on_ready: Called once with the real addresses, in order, when every port answers.
        on_drain: Called when it has lingered, and takes no new connections.
        stop: Set it to stop, for tests and embedders.
        signals: Whether to take SIGTERM and SIGINT (only possible in the main thread).

    Raises:
        PortInUse: another process listens on one of the ports.
        InvalidSettings: a host cannot be bound, is wider than loopback while auth is off, or a TLS file is
            wrong.
    """
    stop = stop or asyncio.Event()
    ports_tls = ServerTls(tls) if tls is not None and tls.certificate_file is not None else None
    context = ports_tls.context if ports_tls is not None else None
    with ExitStack() as bound:
        for app, host, _ in apps:
            check_host(app.state.service, host, auth_required=app.state.auth_required)
        sockets = [bound.enter_context(bind(app.state.service, host, port)) for app, host, port in apps]
        async with AsyncExitStack() as lifespans:
            for app, _, _ in apps:
                await lifespans.enter_async_context(app.router.lifespan_context(app))
            servers = [_server(app, context, drain_timeout_s) for app, _, _ in apps]
            watching = asyncio.create_task(ports_tls.watch()) if ports_tls is not None else None
            try:
                with stop_on_signals(stop) if signals else contextlib.nullcontext():
                    await _run(servers, sockets, apps, stop, on_ready, linger_s, on_drain)
            finally:
                if watching is not None:
                    watching.cancel()


def bind(service: str, host: str, port: int) -> socket.socket:
    """A listening TCP socket. Connections wait in its backlog until the server accepts them.

    Raises:
        PortInUse: it is taken.
        InvalidSettings: the host is not one of this machine, or the port needs rights we lack.
    """
    variable = env_name(f"serve.{service}_port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise InvalidSettings(
            f"{service} cannot listen on {host!r}: {error.strerror}",
            hint=f"set {env_name('serve.host')} to an address of this machine, such as 127.0.0.1",
        ) from error
    # "localhost" may resolve to both families; clients of ours are told 127.0.0.1.
    family, kind, _, _, address = sorted(found, key=lambda info: info[0] != socket.AF_INET)[0]
    # asyncio turns Nagle's algorithm off only on sockets that name their protocol.
    listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Two sockets with SO_REUSEADDR may both bind; only listening tells who has the port.
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"{service} cannot listen on {host}:{port}: the port is in use",
                hint=f"stop what listens there, or choose another with {variable} (0 takes any free one)",
                details={"service": service, "host": host, "port": port},
            ) from error
        raise InvalidSettings(
            f"{service} cannot listen on {host}:{port}: {error.strerror}",
            hint=f"set {env_name('serve.host')} or {variable}",
        ) from error
    return listener


def check_host(service: str, host: str, *, auth_required: bool) -> None:
    """Refuse an address that others can reach while no credential is asked for.

    Raises:
        InvalidSettings: names the service and the address.
    """
    if auth_required or is_loopback(host):
        return
    raise InvalidSettings(
        f"{service} would listen on {host!r} for everybody, without authentication",
        hint=f"set {env_name('auth.required')}=true, or listen on 127.0.0.1",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, with an event that says when it accepts, and with patience."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.server_state: Connections = Connections()
        self.accepting = asyncio.Event()
        self._gone: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def leave(self, linger_s: float) -> None:
        """Ask clients to close their connections, from now on."""
        self.server_state.linger_s = linger_s
        for connection in list(self.server_state.connections):
            cast(ServerProtocol, connection).leave()

    async def close_listeners(self, sockets: Sequence[socket.socket]) -> None:
        """Take no more connections, and lose none of those that the kernel has accepted."""
        for listener in sockets:
            _take_no_more(listener)
        await asyncio.sleep(_ARRIVAL_S)
        now_s = asyncio.get_running_loop().time
        until_s = now_s() + _ACCEPTED_S
        while any(map(_waiting, sockets)) and now_s() < until_s:  # noqa: ASYNC110 - the kernel tells no event
            await asyncio.sleep(0)
        await self._watch()
        for server in self.servers:
            server.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in flight, and begin nothing after that."""
        await self._watch()
        try:
            await super().shutdown(sockets)
        finally:
            self.server_state.is_over = True
            for connection in list(self.server_state.connections):
                cast(ServerProtocol, connection).end()
            for gone in self._gone:
                gone.cancel()

    async def _wait_tasks_to_complete(self) -> None:
        # Whoever comes to the end of a handshake from now on is asked to close the connection, too.
        if self.server_state.linger_s is None:
            self.server_state.linger_s = _SILENT_S
        await super()._wait_tasks_to_complete()
        # uvicorn knows of a connection once its TLS handshake is done. On a machine that has no time one may
        # take seconds, and its request would be begun by a process about to end.
        await asyncio.gather(*self._gone)

    async def _watch(self) -> None:
        """Have the event loop tell when the last connection is gone; it must be asked before the listeners
        are closed."""
        if not self._gone:
            self._gone = [asyncio.create_task(server.wait_closed()) for server in self.servers]
        await asyncio.sleep(0)


def _take_no_more(listener: socket.socket) -> None:
    """Have the kernel overlook whoever begins a connection, while it completes those that have begun.

    To close the listener alone would reset connections that wait to be accepted, whose clients have sent a
    request already. Whoever is overlooked asks again after a second, and is refused then.

    Source: Linux, Documentation/networking/filter.rst.
    """
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (0x30, 0, 0, 13),  # load the byte of TCP's flags
            (0x54, 0, 0, 0x12),  # of it, SYN and ACK
            (0x15, 0, 1, 0x02),  # SYN alone?
            (0x06, 0, 0, 0),  # then drop it
            (0x06, 0, 0, 0xFFFF),  # else take it
        )
    )
    if sys.platform != "linux":
        return
    held = ctypes.create_string_buffer(program)
    # Where the kernel knows no such thing the listener is closed all the same, only less gently.
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program) // 8, ctypes.addressof(held))
        )


def _waiting(listener: socket.socket) -> int:
    """How many connections the kernel has accepted and the server has not; 0 where it does not tell."""
    if sys.platform != "linux":
        return 0
    told = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED.size)
    return int(_UNACKED.unpack(told)[0])


def _server(app: Starlette, context: Any, drain_timeout_s: float) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=ServerProtocol,
            ws="none",
            # Lifespans are ours: uvicorn answers a failed one with sys.exit inside the event loop.
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_timeout_s),
            ssl_context_factory=(lambda config, default: context) if context is not None else None,
        )
    )


async def _run(
    servers: Sequence[_Server],
    sockets: Sequence[socket.socket],
    apps: Sequence[Listener],
    stop: asyncio.Event,
    on_ready: Callable[[list[tuple[str, int]]], None] | None,
    linger_s: float,
    on_drain: Callable[[], None] | None,
) -> None:
    tasks = [
        asyncio.create_task(server.serve([listener]))
        for server, listener in zip(servers, sockets, strict=True)
    ]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.gather(*(_accepting(server, task) for server, task in zip(servers, tasks, strict=True)))
        if on_ready is not None:
            on_ready([(host, _port(listener)) for (_, host, _), listener in zip(apps, sockets, strict=True)])
        await asyncio.wait((stopping, *tasks), return_when=asyncio.FIRST_COMPLETED)
        for app, _, _ in apps:
            app.state.leaving.set()
        if linger_s > 0:
            await _linger(servers, sockets, linger_s)
    finally:
        stopping.cancel()
        if on_drain is not None:
            on_drain()
        for app, _, _ in apps:
            app.state.draining.set()
        for server in servers:
            server.should_exit = True
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cut = [task for server in servers for task in server.server_state.tasks]
        if cut:
            _log.warning("drain_incomplete", requests=len(cut))
            # uvicorn cancelled them; let them unwind before the services they use are closed.
            await asyncio.wait(cut, timeout=_UNWIND_S)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _linger(servers: Sequence[_Server], sockets: Sequence[socket.socket], linger_s: float) -> None:
    """Take requests for a while, and say that it is not for long; then take no more connections."""
    for server in servers:
        server.leave(linger_s)
    await asyncio.sleep(linger_s)
    await asyncio.gather(
        *(server.close_listeners([listener]) for server, listener in zip(servers, sockets, strict=True))
    )


def spare_the_collector() -> None:
    """Leave what was made at the start, some hundred thousand objects, out of all later collections.

    For processes that only serve, once they are ready. Modules and classes stay to the end anyway, and
    walking them took a tenth of a second at a time, in which no request went on, and a fifth of all CPU time.
    Requests make few cycles: fewer, larger collections suffice.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


async def _accepting(server: _Server, task: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(server.accepting.wait())
    await asyncio.wait((waiting, task), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _port(listener: socket.socket) -> int:
    return int(cast(tuple[Any, ...], listener.getsockname())[1])


@contextlib.contextmanager
def stop_on_signals(stop: asyncio.Event) -> Generator[None]:
    """Set `stop` at the first SIGTERM or SIGINT; the second ends the process at once. In the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    taken = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in taken}

    def on_signal() -> None:
        stop.set()
        # The next one is the kernel's business, and final.
        for number in taken:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in taken:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
