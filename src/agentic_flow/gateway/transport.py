"""HTTP to providers: one aiohttp session, every wait bounded, every failure an error of ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    ProviderFailed,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
)

if TYPE_CHECKING:
    import aiohttp

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 30.0
_GRACE_AFTER_END_S = 0.05


class HttpAnswer:
    """An answer whose body is still to be read."""

    def __init__(
        self, response: aiohttp.ClientResponse, provider: str, deadline: Deadline, transport: HttpTransport
    ) -> None:
        self._response = response
        self._provider = provider
        self._deadline = deadline
        self._transport = transport
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            ProviderFailed: silence past the idle limit, or a broken connection.
            ProviderProtocol: the body ended before its announced end.
            TooLarge: more bytes than the limit.
            DeadlineExceeded: the time ended.
        """
        limit = self._transport.response_max_bytes
        received = 0
        while True:
            with _errors_of(self._provider):
                async with _patience(self._provider, self._deadline, self._transport.idle_timeout_s):
                    chunk = await self._response.content.readany()
            if not chunk:
                return
            received += len(chunk)
            if received > limit:
                raise TooLarge(
                    f"the answer of {self._provider} is larger than {limit} bytes",
                    hint="lower output_tokens_max, or raise gateway.response_max_bytes",
                    details={"provider": self._provider},
                )
            yield chunk

    async def read(self) -> bytes:
        """The whole body, with the limits of `chunks`."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def settle(self) -> None:
        """Take the end of a body whose meaning is complete, so that the connection can be used again.

        A server that says nothing more and does not end the body loses the connection, not the answer.
        """
        try:
            async with asyncio.timeout(_GRACE_AFTER_END_S):
                while await self._response.content.readany():
                    pass
        except (TimeoutError, OSError, _client_error()):
            self._response.close()


class HttpTransport:
    """The one session behind all providers of a gateway. It belongs to the event loop that first uses it."""

    def __init__(self, *, idle_timeout_s: float, response_max_bytes: int) -> None:
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
            async with _patience(provider, deadline, patience_s):
                response = await session.request(
                    method, url, headers=dict(headers), data=body, allow_redirects=False
                )
        try:
            yield HttpAnswer(response, provider, deadline, self)
        finally:
            response.release()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            # Deadlines are set around each wait, from the caller's clock; aiohttp's own would be a second
            # opinion. Cookies of a provider must not travel from one caller's request to another's.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
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
async def _patience(provider: str, deadline: Deadline, patience_s: float | None) -> AsyncGenerator[None]:
    """Bound one wait by the deadline and by patience, and say which of them ended it."""
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
                f"{provider} could not be reached within {CONNECT_TIMEOUT_S:g} s",
                hint="check the network and the base URL",
                details={"provider": provider},
            ) from error
        if impatient:
            raise ProviderFailed(
                f"{provider} sent nothing for {patience_s:g} s",
                hint="it is tried again; raise gateway.idle_timeout_s if the model is just slow",
                details={"provider": provider},
            ) from error
        raise _too_late(provider) from error


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
    import aiohttp

    details = {"provider": provider}
    said = str(error) or type(error).__name__
    if isinstance(error, aiohttp.InvalidURL):
        return ProviderRejected(
            f"the base URL of {provider} is not a URL: {said!r}", hint="correct it", details=details
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return ProviderRejected(
            f"TLS with {provider} failed: {said}",
            hint="its certificate is not trusted here; check the base URL and the system's CA store",
            details=details,
        )
    if isinstance(error, aiohttp.ClientConnectorError):
        return ProviderFailed(
            f"{provider} could not be reached: {said}",
            hint="check the network and the base URL",
            details=details,
        )
    if isinstance(error, aiohttp.ClientPayloadError):
        return ProviderProtocol(
            f"the answer of {provider} broke off: {said}", hint="the call can be repeated", details=details
        )
    if isinstance(error, aiohttp.ClientResponseError):
        return ProviderProtocol(
            f"{provider} sent no proper HTTP answer: {said}", hint="check the base URL", details=details
        )
    return ProviderFailed(
        f"the connection to {provider} broke: {said}", hint="the call can be repeated", details=details
    )


def _client_error() -> type[Exception]:
    from aiohttp import ClientError

    return ClientError


def _connect_timeout() -> type[Exception]:
    from aiohttp import ServerTimeoutError

    return ServerTimeoutError
