"""HTTP to providers: kept connections, every wait bounded, every failure an error of ours."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    ProviderError,
    ProviderFailed,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
)
from agentic_flow.gateway.http1 import (
    Connection,
    ConnectionPool,
    Malformed,
    Origin,
    Target,
    Truncated,
    request_head,
    target_of,
)

# Name, connection and TLS together. A provider that takes longer is down, and another may be up.
CONNECT_TIMEOUT_S = 3.0
_GRACE_AFTER_END_S = 0.05
_IDENTITY = frozenset({"", "identity"})
_CLOCK_RESOLUTION_S = 0.002
_JSON = "application/json"


class HttpAnswer:
    """An answer whose body is still to be read."""

    __slots__ = ("_connection", "_provider", "_received", "_transport", "_watch", "headers", "status")

    def __init__(
        self, connection: Connection, watch: _Watch, provider: str, transport: HttpTransport
    ) -> None:
        self._connection = connection
        self._watch = watch
        self._provider = provider
        self._transport = transport
        self._received = 0
        self.status = connection.status
        self.headers: Mapping[str, str] = connection.headers
        """By lower-case names."""

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def chunk(self) -> bytes:
        """The next bytes of the body as they come, none at its end.

        Raises:
            ProviderFailed: silence past the idle limit, or a broken connection.
            ProviderProtocol: the body ended before its announced end.
            TooLarge: more bytes than the limit.
            DeadlineExceeded: the time ended.
        """
        chunk = self._connection.buffered()
        if not chunk and not self._connection.complete:
            chunk = await self._wait()
        self._received += len(chunk)
        limit = self._transport.response_max_bytes
        if self._received > limit:
            raise self._too_large(limit)
        return chunk

    async def _wait(self) -> bytes:
        watch = self._watch
        watch.begin(self._transport.idle_timeout_s)
        try:
            chunk = await self._connection.chunk()
        except _Overdue as error:
            raise watch.verdict() from error
        except (OSError, Truncated, Malformed) as error:
            raise _broke(self._provider, error) from error
        watch.end()
        return chunk

    async def forward(self, sink: Callable[[bytes], bool]) -> None:
        """Give the body to `sink` as it comes, with the limits of `chunk`, until it says False or it ends.

        Args:
            sink: Called within the loop's callbacks. What it raises is raised here.
        """
        watch, limit = self._watch, self._transport.response_max_bytes
        again = watch.again

        def take(chunk: bytes) -> bool:
            self._received += len(chunk)
            if self._received > limit:
                raise self._too_large(limit)
            again()
            return sink(chunk)

        watch.begin(self._transport.idle_timeout_s)
        try:
            await self._connection.forward(take)
        except _Overdue as error:
            raise watch.verdict() from error
        except (OSError, Truncated, Malformed) as error:
            raise _broke(self._provider, error) from error
        watch.end()

    def _too_large(self, limit: int) -> TooLarge:
        return TooLarge(
            f"the answer of {self._provider} is larger than {limit} bytes",
            hint="lower output_tokens_max, or raise gateway.response_max_bytes",
            details={"provider": self._provider},
        )

    async def read(self) -> bytes:
        """The whole body, with the limits of `chunk`."""
        chunks: list[bytes] = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        self._watch.close()
        self._transport.pool.give(self._connection)

    async def settle(self) -> None:
        """Take the end of a body whose meaning is complete, so that the connection can be used again.

        A server that says nothing more and does not end the body loses the connection, not the answer.
        """
        connection = self._connection
        connection.buffered()
        if connection.complete:
            return
        try:
            async with asyncio.timeout(_GRACE_AFTER_END_S):
                while await connection.chunk():
                    pass
        except (TimeoutError, OSError, Truncated, Malformed):
            connection.abort()


class Pending:
    """A request that was sent, and the answer as far as it has come."""

    __slots__ = ("_transport", "connection", "provider", "watch")

    def __init__(
        self, connection: Connection, watch: _Watch, provider: str, transport: HttpTransport
    ) -> None:
        self.connection = connection
        self.watch = watch
        self.provider = provider
        self._transport = transport

    def whole(self) -> bytes | None:
        """The body of a good answer (JSON with status 200) that is there to its end, which stays where it
        is; None: it is not there, or is another one, which `HttpTransport.received` tells of."""
        connection = self.connection
        if not connection.complete or connection.status != 200:
            return None
        headers = connection.headers
        coding = headers.get("content-encoding")
        if coding and coding.strip().lower() not in _IDENTITY:
            return None
        if headers.get("content-type") != _JSON and not _is_json(headers):
            return None
        body = connection.peek()
        return body if 0 < len(body) <= self._transport.response_max_bytes else None

    def waits(self) -> bool:
        """Whether more of a good answer is to come; if so, as much patience begins anew.

        Raises:
            DeadlineExceeded: no time is left for it.
        """
        connection = self.connection
        if not connection.flows:
            return False
        if connection.status:
            self.watch.begin(self._transport.idle_timeout_s)
        return True

    def taken(self) -> None:
        """The body was used: the connection goes back."""
        self.connection.buffered()
        self.watch.close()
        self._transport.pool.give(self.connection)

    def release(self) -> None:
        """Give the connection back, or close it when the answer did not come to its end."""
        self.watch.close()
        self._transport.pool.give(self.connection)


class HttpTransport:
    """The connections behind all providers of a gateway. They belong to the loop that first uses them."""

    def __init__(
        self,
        *,
        idle_timeout_s: float,
        response_max_bytes: int,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.response_max_bytes = response_max_bytes
        self.pool = ConnectionPool()
        self._alarm: _Alarm | None = None

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        *,
        provider: str,
        headers: Mapping[str, str],
        body: bytes | None,
        deadline: Deadline,
        patience_s: float | None,
    ) -> AsyncGenerator[HttpAnswer]:
        """`send`, with the answer closed in every case."""
        answer = await self.send(
            method,
            url,
            provider=provider,
            headers=headers,
            body=body,
            deadline=deadline,
            patience_s=patience_s,
        )
        try:
            yield answer
        finally:
            answer.close()

    async def send(
        self,
        method: str,
        url: str,
        *,
        provider: str,
        headers: Mapping[str, str],
        body: bytes | None,
        deadline: Deadline,
        patience_s: float | None,
    ) -> HttpAnswer:
        """Send a request and give its answer once the headers are there; it must be closed.

        Args:
            method: HTTP method.
            url: Absolute URL.
            provider: Named in errors.
            headers: Request headers.
            body: Request body.
            deadline: Of the whole exchange.
            patience_s: Longest wait for the headers; None waits until the deadline.

        Raises:
            ProviderFailed: refused, reset, unresolved or silent.
            ProviderRejected: the URL or the certificate is wrong.
            DeadlineExceeded: the time ended.
        """
        try:
            target = target_of(url)
        except ValueError as error:
            message = f"the base URL of {provider} is not a URL: {url!r}"
            raise _broken(ProviderRejected, provider, "url", message, "correct it") from error
        try:
            head = request_head(method, target, headers, body)
        except ValueError as error:
            message = f"the request to {provider} cannot be sent: {error}"
            hint = "check the provider's key for line breaks"
            raise _broken(ProviderRejected, provider, "header", message, hint) from error
        connection = self.pool.take(target.origin)
        if connection is None:
            connection = await self._connected(target, provider, deadline, patience_s)
        return await self.received(self._asked(connection, head, body, provider, deadline, patience_s))

    def send_at_once(
        self, origin: Origin, head: bytes, body: bytes, *, provider: str, deadline: Deadline
    ) -> Pending | None:
        """Send a request over a connection that is there already; None: there is none.

        Args:
            origin: Where it goes.
            head, body: The request, as `request_head` writes it.
            provider, deadline: As for `send`; headers are waited for until the deadline.

        Raises:
            DeadlineExceeded: no time is left.
        """
        connection = self.pool.take(origin)
        return None if connection is None else self._asked(connection, head, body, provider, deadline, None)

    def _asked(
        self,
        connection: Connection,
        head: bytes,
        body: bytes | None,
        provider: str,
        deadline: Deadline,
        patience_s: float | None,
    ) -> Pending:
        alarm = self._alarm
        if alarm is None or alarm.loop is not asyncio.get_running_loop():
            alarm = self._alarm_here()
        watch = _Watch(alarm, connection, provider, deadline)
        try:
            watch.begin(patience_s)
            connection.ask(head, body)
        except BaseException:
            watch.close()
            connection.abort()
            raise
        return Pending(connection, watch, provider, self)

    async def received(self, pending: Pending) -> HttpAnswer:
        """The answer to what was sent, once its headers are there; raises as `send`."""
        connection, watch, provider = pending.connection, pending.watch, pending.provider
        try:
            await connection.begun()
            watch.end()
            coding = connection.headers.get("content-encoding")
            if coding and coding.strip().lower() not in _IDENTITY:
                raise Malformed(f"it has the content coding {coding!r}, which was not asked for")
        except BaseException as error:
            watch.close()
            connection.abort()
            if isinstance(error, _Overdue):
                raise watch.verdict() from error
            if isinstance(error, OSError | Truncated | Malformed):
                raise _broke(provider, error) from error
            raise
        return HttpAnswer(connection, watch, provider, self)

    def _alarm_here(self) -> _Alarm:
        loop = asyncio.get_running_loop()
        if self._alarm is None or self._alarm.loop is not loop:
            self._alarm = _Alarm(loop)
        return self._alarm

    async def _connected(
        self, target: Target, provider: str, deadline: Deadline, patience_s: float | None
    ) -> Connection:
        """A new connection, within the deadline, the caller's patience, and the time that one may take."""
        left_s = deadline.remaining_s
        if left_s <= 0:
            raise _too_late(provider)
        limit_s = min(
            left_s, self._connect_timeout_s, self._connect_timeout_s if patience_s is None else patience_s
        )
        try:
            async with asyncio.timeout(limit_s):
                return await self.pool.connect(target.origin)
        except TimeoutError as error:
            if limit_s == left_s:
                raise _too_late(provider) from error
            if patience_s is not None and limit_s == patience_s:
                raise _silent(provider, patience_s) from error
            raise ProviderFailed(
                f"{provider} could not be reached within {self._connect_timeout_s:g} s",
                hint="check the network and the base URL",
                details={"provider": provider, "reason": "connect_timeout"},
            ) from error
        except OSError as error:
            raise _unreached(provider, target.origin.host, error) from error

    async def close(self) -> None:
        """Close the connections that are idle; the transport can be used again and opens others."""
        self.pool.close()
        if self._alarm is not None and not self._alarm.watches:
            self._alarm.cancel()
        await asyncio.sleep(0)  # the loop closes sockets in its next turn


class _Overdue(TimeoutError):
    """Ends an answer that nothing came of for too long."""


class _Watch:
    """Bounds every wait for one answer by the deadline and a limit.

    The timer is the transport's: one for each answer, or each chunk, would cost far more.
    """

    __slots__ = (
        "_alarm",
        "_connection",
        "_deadline",
        "_idle_s",
        "_patient",
        "_provider",
        "_until_s",
        "due_s",
    )

    def __init__(self, alarm: _Alarm, connection: Connection, provider: str, deadline: Deadline) -> None:
        self._alarm = alarm
        self._connection = connection
        self._provider = provider
        self._deadline = deadline
        self._idle_s = 0.0
        self._patient = False  # whether it is the deadline that ends the wait
        self._until_s = 0.0  # the deadline, by the loop's time
        self.due_s = float("inf")
        """When the wait must be over, by the loop's time."""
        alarm.watches.add(self)

    def begin(self, limit_s: float | None) -> None:
        """A wait begins, of at most `limit_s`; None: until the deadline.

        Raises:
            DeadlineExceeded: no time is left for it.
        """
        deadline = self._deadline
        left_s = deadline.at_s - deadline.clock.monotonic_s()
        if left_s <= 0:
            raise _too_late(self._provider)
        idle_s = self._idle_s = left_s if limit_s is None else limit_s
        self._patient = left_s <= idle_s
        now_s = self._alarm.loop.time()
        self._until_s = now_s + left_s
        self.due_s = self._until_s if self._patient else now_s + idle_s
        if self.due_s < self._alarm.armed_s:
            self._alarm.arm(self.due_s)

    def again(self) -> None:
        """Something came, and as much patience begins anew; what `begin` does, for each piece of a stream.

        Raises:
            DeadlineExceeded: no time is left for it.
        """
        now_s = self._alarm.loop.time()
        left_s = self._until_s - now_s
        if left_s <= 0:
            raise _too_late(self._provider)
        self._patient = left_s <= self._idle_s
        self.due_s = self._until_s if self._patient else now_s + self._idle_s

    def end(self) -> None:
        """Something came."""
        self.due_s = float("inf")

    def close(self) -> None:
        """Nothing is waited for any more."""
        self._alarm.watches.discard(self)

    def verdict(self) -> AgenticFlowError:
        """Which of the limits ended the wait."""
        return _too_late(self._provider) if self._patient else _silent(self._provider, self._idle_s)

    def ring(self) -> None:
        """The wait took too long."""
        self._connection.fail(_Overdue())


class _Alarm:
    """One timer for the waits of all answers under way: setting one for each is a fiftieth of a request.

    It may ring early, because what it was set for is over, and is then set for the next.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.watches: set[_Watch] = set()
        self.armed_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None

    def arm(self, due_s: float) -> None:
        """Ring at this time, by the loop's."""
        self.cancel()
        self.armed_s = due_s
        self._timer = self.loop.call_at(due_s, self._ring)

    def cancel(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.armed_s = float("inf")

    def _ring(self) -> None:
        now_s, self._timer, self.armed_s = self.loop.time(), None, float("inf")
        # A loop may ring some part of its clock's resolution too early.
        late = [watch for watch in self.watches if watch.due_s <= now_s + _CLOCK_RESOLUTION_S]
        for watch in late:
            watch.due_s = float("inf")
            watch.ring()
        next_s = min((watch.due_s for watch in self.watches), default=float("inf"))
        if next_s != float("inf"):
            self.arm(next_s)


def _is_json(headers: Mapping[str, str]) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == _JSON or kind.endswith("+json")


def _silent(provider: str, waited_s: float) -> ProviderFailed:
    return ProviderFailed(
        f"{provider} sent nothing for {waited_s:g} s",
        hint="it is tried again; raise gateway.idle_timeout_s if the model is just slow",
        details={"provider": provider, "reason": "silent"},
    )


def _too_late(provider: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{provider} gave no answer in time",
        hint="give the call longer (setting gateway.timeout_s)",
        details={"provider": provider},
    )


def _unreached(provider: str, host: str, error: OSError) -> AgenticFlowError:
    """Why there is no connection; `details["reason"]` says it in a word."""
    said = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLError):
        hint = "its certificate is not trusted here; check the base URL and the system's CA store"
        return _broken(ProviderRejected, provider, "tls", f"TLS with {provider} failed: {said}", hint)
    if isinstance(error, socket.gaierror):
        message = f"{provider} could not be reached: its name {host!r} has no address: {said}"
        return _broken(ProviderFailed, provider, "dns", message, "check the base URL and the name service")
    reason = "refused" if isinstance(error, ConnectionRefusedError) else "connect"
    message = f"{provider} could not be reached at {host!r}: {said}"
    return _broken(ProviderFailed, provider, reason, message, "check the network and the base URL")


def _broke(provider: str, error: BaseException) -> AgenticFlowError:
    """What ended an answer before its end."""
    again = "the call can be repeated"
    if isinstance(error, Truncated):
        message = f"the answer of {provider} broke off: {error}"
        return _broken(ProviderProtocol, provider, "truncated", message, again)
    if isinstance(error, Malformed):
        message = f"{provider} sent no proper HTTP answer: {error}"
        return _broken(ProviderProtocol, provider, "http", message, "check the base URL")
    message = f"the connection to {provider} broke: {error}"
    return _broken(ProviderFailed, provider, "reset", message, again)


def _broken(kind: type[ProviderError], provider: str, reason: str, message: str, hint: str) -> ProviderError:
    return kind(message, hint=hint, details={"provider": provider, "reason": reason})
