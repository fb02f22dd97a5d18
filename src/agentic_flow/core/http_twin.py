"""The client side of our own services: what every HTTP twin is built on.

One deadline covers a call with all its tries. A try is repeated when the peer cannot have acted on it (the
connection was refused, or it answered 429), or when the call is idempotent and the failure may pass.
"""

from __future__ import annotations

import asyncio
import io
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import orjson
from opentelemetry import propagate

from agentic_flow.core.auth import LOCAL_OWNER, Principal, TokenSource
from agentic_flow.core.breaker import Breaker, Permit
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    CircuitOpen,
    DeadlineExceeded,
    InvalidInput,
    InvalidSettings,
    RateLimited,
    StorageFull,
    TooLarge,
    Unauthenticated,
    Unavailable,
    from_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.settings import MIB, PeerSettings, TlsSettings
from agentic_flow.core.sse import ServerEvent, SseParser

if TYPE_CHECKING:
    import ssl

    import aiohttp

    from agentic_flow.core.tls import ClientTls

T = TypeVar("T")

DEADLINE_HEADER = "x-deadline-s"
IDEMPOTENCY_HEADER = "idempotency-key"

_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_ANSWER_MAX_BYTES = 256 * MIB
# Calls at once to one peer; more wait. Streams may last for hours, and must not take the calls' places.
_CALLS_MAX = 100
_STREAMS_MAX = 500
# Less than the stacks' `serve.linger_s`: a service that goes closes what was idle for so long.
_IDLE_CONNECTION_S = 2.0
_CONNECT_S = 5.0
# A service that is replaced has another address, and the old one is soon nobody's.
_ADDRESSES_S = 1
# Three missed heartbeats of the web floor.
_STREAM_SILENCE_S = 45.0
# A machine that is gone without a word, or behind a cut cable, answers no probe: the call then ends after
# these seconds instead of with its deadline. One that only takes its time does answer them.
_PROBE_AFTER_S, _PROBE_EVERY_S, _PROBES_MAX = 5, 2, 3
_UNACKNOWLEDGED_MAX_S = 10
_BACKOFF_S = 0.1
_BACKOFF_MAX_S = 5.0
_CREDENTIAL_MARGIN_S = 5.0
# A caller in a greater hurry than this learns nothing about the peer's health from being late.
_FAIR_CHANCE_S = 1.0


class NoTokens:
    """For a process without an identity of its own: its neighbours on this machine ask for none."""

    async def token(self, principal: Principal) -> str | None:
        return None

    def forget(self, principal: Principal) -> None:
        return None


class HttpTwin:
    """Calls one service.

    The credential is the principal's own token while it is valid, else one from `tokens`.

    Args:
        base_url: Root of the service, such as `http://127.0.0.1:5432`.
        peers: Timeout, tries and breaker.
        tls: Authorities to trust and the certificate to show.
        tokens: Gives tokens to act for a principal; none are sent without it.
        peer: Name of the service in errors.

    Raises:
        InvalidSettings: `base_url` is not an http or https address.
    """

    def __init__(
        self,
        base_url: str,
        peers: PeerSettings | None = None,
        *,
        tls: TlsSettings | None = None,
        tokens: TokenSource | None = None,
        peer: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InvalidSettings(
                f"{base_url!r} is not the address of a service", hint="write it as http://HOST:PORT"
            )
        peers = peers or PeerSettings()
        self._base_url = base_url.rstrip("/")
        self._peer = peer or base_url
        self._timeout_s = peers.timeout_s
        self._attempts = peers.attempts
        self._is_https = base_url.startswith("https://")
        self._tls = tls or TlsSettings()
        self._client_tls: ClientTls | None = None
        self._tokens = tokens or NoTokens()
        self._clock = clock
        self._breaker = Breaker(
            self._peer, failures_max=peers.breaker_failures, open_s=peers.breaker_open_s, clock=clock
        )
        self._calls = asyncio.Semaphore(_CALLS_MAX)
        self._streams = asyncio.Semaphore(_STREAMS_MAX)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpTwin:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str | int | float] | None = None,
        principal: Principal = LOCAL_OWNER,
        deadline: Deadline | None = None,
        idempotent: bool | None = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One call; its parsed JSON answer (None when it is empty).

        Args:
            body: JSON-compatible, or bytes that are JSON already.
            deadline: When the answer must be here; `peers.timeout_s` from now by default.
            idempotent: Whether doing it twice is doing it once. By default GET, PUT, DELETE and calls with
                an idempotency key.

        Raises:
            AgenticFlowError: what the service answered, as the error it raised.
            Unavailable: it cannot be reached; CircuitOpen: it was not tried.
            DeadlineExceeded: no answer in time.
        """
        again = idempotent if idempotent is not None else method in _IDEMPOTENT or idempotency_key is not None
        extra = dict(headers or {})
        if idempotency_key is not None:
            extra[IDEMPOTENCY_HEADER] = idempotency_key
        content, deadline = _content(body), deadline or Deadline.after(self._timeout_s, self._clock)
        return await self._answered(
            method,
            path,
            content,
            params,
            principal,
            deadline,
            extra,
            again=again,
            read=lambda answer: _parsed(answer, self._peer),
        )

    async def fetch(
        self,
        path: str,
        *,
        params: Mapping[str, str | int | float] | None = None,
        principal: Principal = LOCAL_OWNER,
        deadline: Deadline | None = None,
    ) -> bytes:
        """What the service answers to a GET, as it is. Raises as `call` does."""
        deadline = deadline or Deadline.after(self._timeout_s, self._clock)
        return await self._answered(
            "GET", path, None, params, principal, deadline, {}, again=True, read=lambda answer: answer
        )

    async def _answered(
        self,
        method: str,
        path: str,
        content: bytes | None,
        params: Mapping[str, str | int | float] | None,
        principal: Principal,
        deadline: Deadline,
        extra: Mapping[str, str],
        *,
        again: bool,
        read: Callable[[bytes], T],
    ) -> T:
        """One call with its tries; `read` gives what the answer says."""
        attempt = 0
        renewed = False
        while True:
            attempt += 1
            try:
                async with (
                    self._place(deadline),
                    self._exchange(method, path, content, params, principal, deadline, extra) as answer,
                ):
                    return read(await _bounded(answer, self._peer))
            except Unauthenticated:
                # A token can be revoked or its signing key gone before it expires; ask once for a new one.
                if renewed or self._own_token(principal) is not None or isinstance(self._tokens, NoTokens):
                    raise
                self._tokens.forget(principal)
                renewed = True
            except AgenticFlowError as error:
                if attempt >= self._attempts or not _may_repeat(error, again):
                    raise
                await self._pause(error, attempt, deadline)

    async def stream_events(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str | int | float] | None = None,
        principal: Principal = LOCAL_OWNER,
        deadline: Deadline | None = None,
        idempotency_key: str | None = None,
        last_event_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[ServerEvent]:
        """The events of a stream as they come, until the service ends it. Close it (`aclosing`) when done.

        Opened once: only a refused connection is tried again. To go on after a break, call again with
        `last_event_id`. Without `deadline` it may last as long as heartbeats come.

        Raises:
            AgenticFlowError: what the service answered, also as an `error` event within the stream.
            Unavailable: it cannot be reached, fell silent, or the stream was cut.
        """
        extra = {"accept": "text/event-stream", **(headers or {})}
        if last_event_id is not None:
            extra["last-event-id"] = last_event_id
        if idempotency_key is not None:
            extra[IDEMPOTENCY_HEADER] = idempotency_key
        attempt = 0
        opened = False
        while True:
            attempt += 1
            try:
                async with (
                    self._place(deadline, is_stream=True),
                    self._exchange(
                        method, path, _content(body), params, principal, deadline, extra, has_heartbeats=True
                    ) as answer,
                ):
                    opened = True
                    async for event in self._events(answer):
                        yield event
                    return
            except AgenticFlowError as error:
                if opened or attempt >= self._attempts or not _may_repeat(error, False):
                    raise
                await self._pause(error, attempt, deadline or Deadline.after(self._timeout_s, self._clock))

    async def _events(self, answer: aiohttp.ClientResponse) -> AsyncIterator[ServerEvent]:
        parser = SseParser()
        async for chunk in answer.content.iter_any():
            for event in parser.feed(chunk):
                if event.event == "error":
                    raise _problem(event.data.encode(), answer.status, self._peer)
                yield event
        if parser.unfinished:
            raise Unavailable(f"the stream from {self._peer!r} was cut", hint="open it again")

    @asynccontextmanager
    async def _place(self, deadline: Deadline | None, *, is_stream: bool = False) -> AsyncGenerator[None]:
        """A place among those that talk to the peer.

        To wait for one says nothing of the peer, so that the breaker is not told.
        """
        places, most = (self._streams, _STREAMS_MAX) if is_stream else (self._calls, _CALLS_MAX)
        what = f"{most!r} {'streams from' if is_stream else 'calls to'} {self._peer!r}"
        if deadline is None and places.locked():
            raise Unavailable(
                f"{what} are open in this process",
                hint="close those that nobody reads, or ask another process",
            )
        allowed_s = None if deadline is None else deadline.remaining_s
        try:
            async with asyncio.timeout(allowed_s):
                await places.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{what} were under way for {allowed_s:.3g} s",
                hint="give it a longer timeout, or make fewer calls at once",
            ) from None
        try:
            yield
        finally:
            places.release()

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        content: bytes | None,
        params: Mapping[str, str | int | float] | None,
        principal: Principal,
        deadline: Deadline | None,
        extra: Mapping[str, str],
        *,
        has_heartbeats: bool = False,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One try: the breaker's permit, the request, and errors of the transport as errors of ours."""
        import aiohttp

        if deadline is not None:
            deadline.check(f"a call to {self._peer!r}")
        headers = await self._headers(principal, deadline, extra, content)
        try:
            permit = self._breaker.acquire()
        except CircuitOpen as error:
            error.peer = self._peer
            raise
        allowed_s = deadline.remaining_s if deadline is not None else None
        timeout = aiohttp.ClientTimeout(
            total=allowed_s,
            sock_connect=_CONNECT_S,
            sock_read=_STREAM_SILENCE_S if has_heartbeats or allowed_s is None else None,
        )
        try:
            async with self._open_session().request(
                method,
                self._base_url + path,
                data=None if content is None else io.BytesIO(content),  # aiohttp warns of large bytes
                params=params,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                ssl=self._tls_context(),
            ) as answer:
                if answer.status >= 300:
                    raise _problem(
                        await _bounded(answer, self._peer), answer.status, self._peer, answer.headers
                    )
                permit.answered()  # a stream may last for hours; the circuit need not wait for its end
                yield answer
                permit.succeeded()
        except AgenticFlowError as error:
            _judge(permit, error)
            if isinstance(error, StorageFull) or _is_away(error):
                error.peer = self._peer
            raise
        except aiohttp.ConnectionTimeoutError as error:
            permit.failed()
            raise self._away(
                _Unreached(
                    f"{self._peer!r} did not take a connection at {self._base_url} within {_CONNECT_S!r} s",
                    hint="check its address in the section peers, and the network between",
                )
            ) from error
        except TimeoutError as error:
            if allowed_s is not None and deadline is not None and deadline.remaining_s <= 0:
                if allowed_s >= _FAIR_CHANCE_S:
                    permit.failed()
                raise DeadlineExceeded(
                    f"{self._peer!r} did not answer within {allowed_s:.3g} s", hint="give it a longer timeout"
                ) from error
            permit.failed()
            raise self._away(
                Unavailable(f"{self._peer!r} fell silent", hint=f"check that it runs at {self._base_url}")
            ) from error
        except aiohttp.ClientConnectorError as error:
            permit.failed()
            raise self._away(
                _Unreached(
                    f"{self._peer!r} cannot be reached at {self._base_url}: {error.strerror or error}",
                    hint="start it, or correct its address in the section peers",
                )
            ) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            permit.failed()
            raise self._away(
                Unavailable(f"the connection to {self._peer!r} broke: {error}", hint="try again")
            ) from error
        finally:
            # Cancelled, or the reader of a stream went away: nothing more was learned.
            permit.abandoned()

    def _away(self, error: Unavailable) -> Unavailable:
        error.peer = self._peer
        return error

    async def _headers(
        self, principal: Principal, deadline: Deadline | None, extra: Mapping[str, str], content: bytes | None
    ) -> dict[str, str]:
        headers = dict(extra)
        if content is not None:
            headers.setdefault("content-type", "application/json")
        if deadline is not None:
            headers[DEADLINE_HEADER] = f"{deadline.remaining_s:.3f}"
        token = self._own_token(principal) or await self._tokens.token(principal)
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        propagate.inject(headers)
        return headers

    def _own_token(self, principal: Principal) -> str | None:
        own = principal.credential
        if own is None or own.expires_at_s - self._clock.time_s() < _CREDENTIAL_MARGIN_S:
            return None
        return own.value

    async def _pause(self, error: AgenticFlowError, attempt: int, deadline: Deadline) -> None:
        """Wait before the next try: as long as the peer asked, else exponentially with full jitter.

        Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        """
        ceiling_s = min(_BACKOFF_MAX_S, _BACKOFF_S * 2 ** (attempt - 1))
        pause_s = error.retry_after_s if error.retry_after_s is not None else random.uniform(0, ceiling_s)
        if pause_s >= deadline.remaining_s:
            raise error
        await self._clock.sleep(pause_s)

    def _tls_context(self) -> ssl.SSLContext | bool:
        """Of the next connection. One that is open with an older context is not used again."""
        if not self._is_https:
            return True
        if self._client_tls is None:
            from agentic_flow.core.tls import ClientTls

            self._client_tls = ClientTls(self._tls, self._clock)
        return self._client_tls.context()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # see `_place`
                    keepalive_timeout=_IDLE_CONNECTION_S,
                    ttl_dns_cache=_ADDRESSES_S,
                    socket_factory=_probing_socket,
                ),
                # Neighbours are ours; a proxy of the environment is for the world outside.
                trust_env=False,
                auto_decompress=True,
            )
        return self._session


def _probing_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices when the other side is gone (`tcp(7)`)."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # What a system lacks it does by its own figures.
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_AFTER_S),
        ("TCP_KEEPINTVL", _PROBE_EVERY_S),
        ("TCP_KEEPCNT", _PROBES_MAX),
        ("TCP_USER_TIMEOUT", _UNACKNOWLEDGED_MAX_S * 1000),
    ):
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


class _Unreached(Unavailable):
    """No connection was made, so nothing can have happened: any call may be repeated."""


def _content(body: Any) -> bytes | None:
    if body is None or isinstance(body, bytes):
        return body
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise InvalidInput(
            f"the call cannot be sent as JSON: {error}", hint="use Unicode text and 64-bit integers"
        ) from None


async def _bounded(answer: aiohttp.ClientResponse, peer: str) -> bytes:
    content = bytearray()
    async for chunk in answer.content.iter_any():
        content += chunk
        if len(content) > _ANSWER_MAX_BYTES:
            raise TooLarge(f"the answer of {peer!r} is larger than {_ANSWER_MAX_BYTES!r} bytes")
    return bytes(content)


def _parsed(content: bytes, peer: str) -> Any:
    if not content:
        return None
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Unavailable(
            f"{peer!r} answered with broken JSON: {error}", hint="is another program listening there?"
        ) from error


def _problem(
    content: bytes, status: int, peer: str, headers: Mapping[str, str] | None = None
) -> AgenticFlowError:
    """The error of an answer: ours when it is a problem document of ours, else what its status says."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict) and "code" in document:
        return from_problem(cast(JsonObject, document))
    retry_after = (headers or {}).get("retry-after", "")
    retry_after_s = float(retry_after) if retry_after.isdecimal() else None
    message = f"{peer!r} answered with status {status!r}"
    if status == 429:
        return RateLimited(message, hint="slow down", retry_after_s=retry_after_s)
    if status == 401:
        return Unauthenticated(message, hint="check peers.token")
    return Unavailable(message, hint="is another program listening there?", retry_after_s=retry_after_s)


def _is_away(error: AgenticFlowError) -> TypeGuard[Unavailable]:
    """Whether an answer says that the peer itself cannot serve. A circuit of its own is about others, a full
    disk keeps it from writing only, and what is of one request is of nobody else's."""
    return type(error) is Unavailable and not error.is_of_request


def _judge(permit: Permit, error: AgenticFlowError) -> None:
    """What an answer says about the peer."""
    if _is_away(error):
        permit.failed()
    else:
        permit.succeeded()


def _may_repeat(error: AgenticFlowError, idempotent: bool) -> bool:
    if isinstance(error, _Unreached | RateLimited):
        return True
    # No time is left after a deadline, an open circuit fails fast, and nobody makes room within a second.
    in_vain = isinstance(error, DeadlineExceeded | CircuitOpen | StorageFull)
    return idempotent and error.retryable and not in_vain
