"""HTTP to providers: one aiohttp session, every wait bounded, every failure an error of ours."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import aiohttp

# Calls are bounded by the gateway; a wait for a free connection would look like a peer out of reach.
CONNECTIONS_MAX = 4096
# Name, connection and TLS together. A provider that takes longer is down, and another may be up.
CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 30.0
_GRACE_AFTER_END_S = 0.05
_CONNECTION_CLOSED = "Connection closed."  # aiohttp's RuntimeError for reading from a lost connection


class HttpAnswer:
    """An answer whose body is still to be read."""

    __slots__ = (
        "_deadline", "_provider", "_received", "_response", "_transport", "_watch", "headers", "status",
    )  # fmt: skip

    def __init__(
        self, response: aiohttp.ClientResponse, provider: str, deadline: Deadline, transport: HttpTransport
    ) -> None:
        self._response = response
        self._provider = provider
        self._deadline = deadline
        self._transport = transport
        self._received = 0
        self._watch: _Watch | None = None
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        """Names in any case."""

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
        content = self._response.content
        try:
            chunk = content.read_nowait()
            if not chunk and not content.at_eof():
                chunk = await self._wait(content)
        except _Overdue as error:
            assert self._watch is not None
            raise self._watch.verdict() from error
        except (OSError, _client_error()) as error:
            raise _explain(self._provider, error) from error
        except RuntimeError as error:
            if str(error) != _CONNECTION_CLOSED:
                raise
            raise _explain(self._provider, error) from error
        self._received += len(chunk)
        limit = self._transport.response_max_bytes
        if self._received > limit:
            raise TooLarge(
                f"the answer of {self._provider} is larger than {limit} bytes",
                hint="lower output_tokens_max, or raise gateway.response_max_bytes",
                details={"provider": self._provider},
            )
        return chunk

    async def _wait(self, content: aiohttp.StreamReader) -> bytes:
        watch = self._watch
        if watch is None:
            watch = self._watch = _Watch(
                content, self._provider, self._deadline, self._transport.idle_timeout_s
            )
        watch.begin()
        chunk = await content.readany()
        watch.end()
        return chunk

    async def read(self) -> bytes:
        """The whole body, with the limits of `chunk`."""
        chunks: list[bytes] = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        if self._watch is not None:
            self._watch.close()
        self._response.release()

    async def settle(self) -> None:
        """Take the end of a body whose meaning is complete, so that the connection can be used again.

        A server that says nothing more and does not end the body loses the connection, not the answer.
        """
        content = self._response.content
        try:
            if content.at_eof():
                return
            async with asyncio.timeout(_GRACE_AFTER_END_S):
                while await content.readany():
                    pass
        except (TimeoutError, OSError, RuntimeError, _client_error()):
            self._response.close()


class HttpTransport:
    """The one session behind all providers of a gateway. It belongs to the event loop that first uses it."""

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
        self._session: aiohttp.ClientSession | None = None

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
        """Send a request and give its answer once the headers are there.

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
        session = self._opened()
        with _errors_of(provider):
            async with _patience(provider, deadline, patience_s, self._connect_timeout_s):
                response = await session.request(
                    method, url, headers=headers, data=body, allow_redirects=False
                )
        answer = HttpAnswer(response, provider, deadline, self)
        try:
            yield answer
        finally:
            answer.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            # Deadlines are set around each wait, from the caller's clock; aiohttp's own would be a second
            # opinion. Cookies of a provider must not travel from one caller's request to another's.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": "agentic-flow"},
            )
        return self._session

    async def close(self) -> None:
        """Close the session; the transport can be used again and opens another."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@asynccontextmanager
async def _patience(
    provider: str, deadline: Deadline, patience_s: float | None, connect_timeout_s: float
) -> AsyncGenerator[None]:
    """Bound the wait for the headers by the deadline and by patience, and say which of them ended it."""
    left_s = deadline.remaining_s
    if left_s <= 0:
        raise _too_late(provider)
    impatient = patience_s is not None and patience_s < left_s
    try:
        async with asyncio.timeout(patience_s if impatient else left_s):
            yield
    except TimeoutError as error:
        if isinstance(error, _connect_timeout()):
            raise ProviderFailed(
                f"{provider} could not be reached within {connect_timeout_s:g} s",
                hint="check the network and the base URL",
                details={"provider": provider, "reason": "connect_timeout"},
            ) from error
        raise (_silent(provider, patience_s or 0.0) if impatient else _too_late(provider)) from error


class _Overdue(TimeoutError):
    """Put into a stream that nothing came from for too long."""


class _Watch:
    """Bounds every wait within one body by the deadline and the idle limit, with one timer for all of them.

    A timer that fires early, because something came in the meantime, is set again: that is far cheaper than
    a timer for each chunk.
    """

    __slots__ = ("_armed_s", "_content", "_deadline", "_due_s", "_idle_s", "_loop", "_patient", "_provider",
                 "_timer")  # fmt: skip

    def __init__(
        self, content: aiohttp.StreamReader, provider: str, deadline: Deadline, idle_s: float
    ) -> None:
        self._content = content
        self._provider = provider
        self._deadline = deadline
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_s = 0.0
        self._due_s: float | None = None
        self._patient = False  # whether it is the deadline that ends the wait

    def begin(self) -> None:
        """A wait begins.

        Raises:
            DeadlineExceeded: no time is left for it.
        """
        left_s = self._deadline.remaining_s
        if left_s <= 0:
            raise _too_late(self._provider)
        self._patient = left_s <= self._idle_s
        self._due_s = self._loop.time() + min(left_s, self._idle_s)
        if self._timer is None or self._armed_s > self._due_s:
            self._arm(self._due_s)

    def end(self) -> None:
        """Something came."""
        self._due_s = None

    def close(self) -> None:
        """Nothing is waited for any more."""
        self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def verdict(self) -> AgenticFlowError:
        """Which of the limits ended the wait."""
        return _too_late(self._provider) if self._patient else _silent(self._provider, self._idle_s)

    def _arm(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_s = due_s
        self._timer = self._loop.call_at(due_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._due_s is None:
            return
        if self._due_s > self._armed_s:
            self._arm(self._due_s)
        else:
            self._content.set_exception(_Overdue())


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


class _errors_of:  # noqa: N801 - reads as a statement: `with _errors_of(provider):`
    """Turn aiohttp's exceptions into ours."""

    def __init__(self, provider: str) -> None:
        self._provider = provider

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, AgenticFlowError):
            return
        if isinstance(error, OSError | _client_error()):
            raise _explain(self._provider, error) from error


def _explain(provider: str, error: BaseException) -> AgenticFlowError:
    """What an exception of aiohttp or the system means; `details["reason"]` says it in a word."""
    import aiohttp

    said = str(error) or type(error).__name__
    again = "the call can be repeated"
    if isinstance(error, aiohttp.InvalidURL):
        message = f"the base URL of {provider} is not a URL: {said!r}"
        return _broken(ProviderRejected, provider, "url", message, "correct it")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        hint = "its certificate is not trusted here; check the base URL and the system's CA store"
        return _broken(ProviderRejected, provider, "tls", f"TLS with {provider} failed: {said}", hint)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        message = f"{provider} could not be reached: its name has no address: {said}"
        return _broken(ProviderFailed, provider, "dns", message, "check the base URL and the name service")
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = isinstance(error.os_error, ConnectionRefusedError)
        message = f"{provider} could not be reached: {said}"
        reason = "refused" if refused else "connect"
        return _broken(ProviderFailed, provider, reason, message, "check the network and the base URL")
    if isinstance(error, aiohttp.ClientPayloadError):
        message = f"the answer of {provider} broke off: {said}"
        return _broken(ProviderProtocol, provider, "truncated", message, again)
    if isinstance(error, aiohttp.ClientResponseError):
        message = f"{provider} sent no proper HTTP answer: {said}"
        return _broken(ProviderProtocol, provider, "http", message, "check the base URL")
    return _broken(ProviderFailed, provider, "reset", f"the connection to {provider} broke: {said}", again)


def _broken(kind: type[ProviderError], provider: str, reason: str, message: str, hint: str) -> ProviderError:
    return kind(message, hint=hint, details={"provider": provider, "reason": reason})


@functools.cache
def _client_error() -> type[Exception]:
    from aiohttp import ClientError

    return ClientError


@functools.cache
def _connect_timeout() -> type[Exception]:
    from aiohttp import ServerTimeoutError

    return ServerTimeoutError
