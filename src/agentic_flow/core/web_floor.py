"""What every request passes before and after its route: pure ASGI, so streams flow through unbuffered."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import math
import random
import re
import reprlib
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import structlog
from opentelemetry import context as otel
from opentelemetry import propagate, trace
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, reset_contextvars

from agentic_flow.core.auth import LOCAL_OWNER, Authenticator, Principal
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    RateLimited,
    TooLarge,
    Unauthenticated,
    Unavailable,
    as_problem,
)
from agentic_flow.core.histogram import BatchHistogram
from agentic_flow.core.http_server import EXTENSION, AsgiExchange, Exchange, WholeExchange
from agentic_flow.core.request_rate import RequestRate
from agentic_flow.core.settings import Settings
from agentic_flow.core.telemetry import is_secret_name, traces, writes_info

ErrorShape = Callable[[AgenticFlowError], dict[str, Any]]

RawHeaderMap = Mapping[bytes, bytes]
"""Headers by their names in lower case."""

Endpoint = Callable[[Request], Awaitable[Response]]
ExactRoutes = Mapping[tuple[str, str], tuple[Route, Endpoint | None]]
"""Path and method → the route that answers there, and what it calls; None: the route's own ASGI app."""

AHEAD = "ahead"
"""Under this name a scope's state holds the `Ahead` of a request that was begun without a task."""

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID_NAME = REQUEST_ID_HEADER.encode()
CREDENTIAL_HINT = "send a key or token as `Authorization: Bearer …`; see `agentic-flow keys create`"
# Probes and scrapers carry no credential and must be answered under load.
ALWAYS_OPEN = frozenset({"/health", "/health/accepting", "/health/live", "/health/ready", "/metrics"})

STALL_TIMEOUT_S = 30.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LOOK_EACH_S = 0.25
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TENANTS_MAX = 10_000
_ERRORS_SHOWN_MAX = 20
_CLIENT_CLOSED_REQUEST = 499
_NO_PARENT = otel.Context()
_NOTHING: Mapping[str, Any] = {}
_CREDENTIAL_NAMES = (b"authorization", b"x-api-key")

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.web")
_tracer = trace.get_tracer("agentic_flow.web")


class Floor:
    """ASGI middleware: identity, limits, errors, and the record of a request.

    Args:
        app: What it wraps.
        service: Name in logs and metrics.
        authenticator: Checks every credential that is sent.
        settings: The sections `serve` and `auth` are read.
        registry: Where the duration histogram is registered.
        public_paths: Exact paths that need no credential.
        error_shapes: Exact path, or the beginning of one with a slash at its end → the shape of an error.
        exact: Routes that are called without Starlette's router and its layers, which cost more than all of
            this one does.
        http_error: What Starlette's own refusals look like.
        stall_timeout_s: Longest silence within a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: str,
        authenticator: Authenticator,
        settings: Settings,
        registry: CollectorRegistry,
        public_paths: frozenset[str],
        error_shapes: Mapping[str, ErrorShape],
        exact: ExactRoutes,
        http_error: Callable[[Request, Exception], Response],
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._app = app
        self._service = service
        self._authenticator = authenticator
        self._auth_required = settings.auth.required
        self.body_max_bytes = settings.serve.body_max_bytes
        self._stall_timeout_s = stall_timeout_s
        self._public_paths = public_paths | ALWAYS_OPEN
        self._error_shapes = error_shapes
        self._exact = exact
        self._ahead = {
            place: route.ahead
            for place, (route, _) in exact.items()
            if isinstance(route, DirectRoute) and route.ahead is not None
        }
        # Who it is, where that can be told without waiting; only some authenticators can.
        self._known: Callable[[str], Principal | None] | None = getattr(authenticator, "known", None)
        self._http_error = http_error
        self._requests_per_minute = settings.serve.requests_per_minute
        self._rate = RequestRate(self._requests_per_minute, names_max=_TENANTS_MAX)
        self._trace_headers = frozenset(name.encode() for name in propagate.get_global_textmap().fields)
        self._duration = BatchHistogram(
            "agentic_flow_http_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("service", "method", "route", "status"),
            registry=registry,
        )
        # What `bind_contextvars(request_id=…)` binds for log lines, without its bookkeeping.
        first = bind_contextvars(request_id="")
        self.log_context: ContextVar[Any] = first["request_id"].var
        reset_contextvars(**first)
        # By method, route and status: looking a series up costs three times what counting in it does.
        self._observe: dict[tuple[str, str, int], Callable[[float], None]] = {}
        # Whether anybody wants spans or lines, as it was at that time: for requests without a task.
        self._traces = self._writes = True
        self._looked_at_s = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # No service of ours speaks it on these ports; an unauthenticated upgrade must not slip through.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: RawHeaderMap = dict(reversed(scope["headers"]))  # the first of each
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        exchange = scope.get("extensions", _NOTHING).get(EXTENSION) or AsgiExchange(receive, send)
        state = scope.setdefault("state", {})
        ahead: Ahead | None = state.get(AHEAD)
        answer = OutgoingAnswer(exchange, send, _request_id(headers) if ahead is None else ahead.request_id)
        state["request_id"], state["principal"] = answer.request_id, None
        state["headers"], state["answer"] = headers, answer
        started_s = time.perf_counter() if ahead is None else ahead.started_s
        bound = self.log_context.set(answer.request_id)
        traced = not self._trace_headers.isdisjoint(headers)
        span = (
            _tracer.start_span(
                method,
                context=propagate.extract(_texts(headers)) if traced else _NO_PARENT,
                kind=trace.SpanKind.SERVER,
            )
            if traced or traces()
            else trace.INVALID_SPAN
        )
        token = otel.attach(trace.set_span_in_context(span)) if span.get_span_context().is_valid else None
        try:
            await self._answer(scope, headers, receive, answer)
        finally:
            # Also when the work was cancelled: the line is written, the cancellation goes on.
            route = str(getattr(scope.get("route"), "path", "unmatched"))
            self._record(
                method, route, answer.status, time.perf_counter() - started_s, answer.request_id,
                state["principal"], span, answer.error_code,
            )  # fmt: skip
            span.end()
            if token is not None:
                otel.detach(token)
            self.log_context.reset(bound)
            # What is in there holds the server's request, and that holds the scope: a ring for each request,
            # which only the garbage collector could free.
            state.clear()

    async def _answer(
        self, scope: Scope, headers: RawHeaderMap, receive: Receive, answer: OutgoingAnswer
    ) -> None:
        try:
            await self._admit(scope, headers)
            body = scope["state"]["body"] = IncomingBody(
                receive, answer, headers.get(b"content-length"), self.body_max_bytes, self._stall_timeout_s
            )
            found = self._exact.get((scope["path"], scope["method"]))
            if found is None:
                await self._app(scope, body.receive, answer.send)
                return
            route, endpoint = found
            scope["route"], scope["path_params"] = route, {}
            if endpoint is None:
                await route.app(scope, body.receive, answer.send)
            else:
                await self._answer_exactly(endpoint, scope, body.receive, answer.send)
        except AgenticFlowError as error:
            await self._refuse(scope, answer, error)
        except ValidationError as error:
            await self._refuse(scope, answer, invalid_input(error))
        except asyncio.CancelledError:
            # Only a drain past its limit cancels requests. The caller may try another server.
            await self._refuse(
                scope, answer, Unavailable("the server is stopping", hint="try again", retry_after_s=1.0)
            )
            raise
        except ClientDisconnect:
            answer.status = _CLIENT_CLOSED_REQUEST
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and told without internals
            _log.exception("request_failed", service=self._service, path=scope["path"])
            await self._refuse(scope, answer, unexpected())

    async def _answer_exactly(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        scope["endpoint"] = endpoint
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except HTTPException as error:
            response = self._http_error(request, error)
        await response(scope, receive, send)

    # Without a task

    @property
    def places(self) -> Container[tuple[str, str]]:
        """See `core.http_server.AtOnce`."""
        return self._ahead

    def take(self, exchange: WholeExchange) -> bool:
        """See `core.http_server.AtOnce`."""
        scope = exchange.scope
        headers: RawHeaderMap = dict(reversed(scope["headers"]))
        started_s = time.perf_counter()
        if started_s - self._looked_at_s > _LOOK_EACH_S:
            self._looked_at_s = started_s
            self._traces, self._writes = traces(), writes_info()
        if exchange.flow.write_paused or self._traces or not self._trace_headers.isdisjoint(headers):
            return False
        try:
            if not self._auth_required:
                _check_origin_of(headers, scope["scheme"])
            credential = _credential_in(headers)
            if credential is not None:
                principal = None if self._known is None else self._known(credential)
            else:
                principal = None if self._auth_required else LOCAL_OWNER
            if principal is None:
                return False
            begin = self._ahead[scope["path"], scope["method"]]
            return begin(Ahead(self, exchange, headers, principal, started_s))
        except AgenticFlowError:
            return False  # whatever it is, the way with a task says it again
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and the other way is still open
            _log.exception("request_not_begun", service=self._service, path=scope["path"])
            return False

    def count(self, key: str) -> None:
        """Count a request of a caller.

        Raises:
            RateLimited: it was one too many, and is not counted.
        """
        wait_s = self._rate.take(key)
        if wait_s is not None:
            raise RateLimited(
                f"more than {self._requests_per_minute!r} requests per minute from {key}",
                hint="slow down, or raise serve.requests_per_minute",
                retry_after_s=round(wait_s, 3),
            )

    def finished(self, ahead: Ahead) -> None:
        """Record a request that was answered with status 200."""
        scope = ahead.exchange.scope
        method, path = scope["method"], scope["path"]
        duration_s = time.perf_counter() - ahead.started_s
        observe = self._observe.get((method, path, 200))
        if observe is not None and not self._writes:
            observe(duration_s)  # what `_record` would do
            return
        self._record(
            method, path, 200, duration_s, ahead.request_id, ahead.principal, trace.INVALID_SPAN, None
        )

    async def _admit(self, scope: Scope, headers: RawHeaderMap) -> None:
        if not self._auth_required:
            _check_origin_of(headers, scope["scheme"])
        ahead: Ahead | None = scope["state"].get(AHEAD)
        if ahead is not None:
            scope["state"]["principal"] = ahead.principal  # admitted and counted before
            return
        path: str = scope["path"]
        if path in ALWAYS_OPEN:
            return
        credential = _credential_in(headers)
        principal: Principal | None = None
        if credential is not None:
            principal = await self._authenticator.authenticate(credential)
        elif not self._auth_required:
            principal = LOCAL_OWNER
        elif path not in self._public_paths:
            raise Unauthenticated("this needs a credential and none was sent", hint=CREDENTIAL_HINT)
        scope["state"]["principal"] = principal
        client = scope.get("client")
        self.count(f"tenant {principal.tenant}" if principal else f"address {client and client[0]}")

    async def _refuse(self, scope: Scope, answer: OutgoingAnswer, error: AgenticFlowError) -> None:
        answer.error_code = error.code
        if answer.status is not None:
            # Half an answer is out. Ending here makes the server cut the connection, which a client notices.
            _log.warning("response_cut", service=self._service, path=scope["path"], code=error.code)
            return
        shape = self._shape(scope["path"])
        body, media_type = (
            (as_problem(error, instance=f"urn:request:{answer.request_id}"), b"application/problem+json")
            if shape is None
            else (shape(error), b"application/json")
        )
        content = orjson.dumps(body, default=str)
        headers = [(b"content-type", media_type), (b"content-length", str(len(content)).encode())]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
        if shape is not None:
            # Under this name Anthropic's clients look for it; other shapes are not disturbed by it.
            headers.append((b"request-id", answer.request_id.encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        headers += [(name.encode(), value.encode()) for name, value in error.answer_headers.items()]
        await answer.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await answer.send({"type": "http.response.body", "body": content})

    def _shape(self, path: str) -> ErrorShape | None:
        """The shape of an error at `path`: its own, or that of what begins it and ends in a slash."""
        exact = self._error_shapes.get(path)
        if exact is not None:
            return exact
        shapes = self._error_shapes.items()
        return next(
            (shape for start, shape in shapes if start.endswith("/") and path.startswith(start)), None
        )

    def _record(
        self,
        method: str,
        route: str,
        answered: int | None,
        duration_s: float,
        request_id: str,
        principal: Principal | None,
        span: trace.Span,
        error_code: str | None,
    ) -> None:
        status = answered or _CLIENT_CLOSED_REQUEST
        observe = self._observe.get((method, route, status))
        if observe is None:
            observe = self._duration.labels(self._service, method, route, str(status)).observe
            self._observe[method, route, status] = observe
        observe(duration_s)
        if span is not trace.INVALID_SPAN and span.is_recording():
            span.update_name(f"{method} {route}")
            span.set_attributes(
                {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": status,
                    "service.name": self._service,
                }
            )
            if status >= 500:
                span.set_status(trace.StatusCode.ERROR)
        if not writes_info():
            return
        context = span.get_span_context()
        line = _log.debug if route in ALWAYS_OPEN else _log.info
        line(
            "request_finished",
            service=self._service,
            method=method,
            route=route,
            status=status,
            code=error_code,
            duration_ms=round(duration_s * 1000, 3),
            tenant=principal.tenant if principal else None,
            request_id=request_id,
            trace_id=format(context.trace_id, "032x") if context.is_valid else None,
        )


class DirectRoute(Route):
    """A route whose app is ASGI's, called without Starlette's requests and responses in between, which cost a
    busy route more than all that it does.

    The app finds in `scope["state"]`: `headers`, the first of each by its name in lower case, as bytes;
    `principal`; `request_id`; `body`, an IncomingBody; `answer`, an OutgoingAnswer.

    Args:
        path: Exact.
        app: An object that is called as ASGI has it (a bare function would be taken for an endpoint).
        methods: That it answers to.
        ahead: Begins to answer a whole request without a task, where it can; see `Ahead`.
    """

    def __init__(
        self,
        path: str,
        app: ASGIApp,
        *,
        methods: Sequence[str],
        ahead: Callable[[Ahead], bool] | None = None,
    ) -> None:
        super().__init__(path, cast(Any, app), methods=list(methods))
        self.ahead = ahead


class Ahead:
    """A whole request that is answered in the event loop's callbacks, as far as that goes.

    A route's `ahead` says False, or raises, as long as it has done nothing; the request then gets a task as
    any other. From `count` on it must see to the answer itself: by `finish`, or by `hand_over`, after which
    the route's app finds this object in the state of the scope.
    """

    __slots__ = (
        "_floor",
        "exchange",
        "headers",
        "log_context",
        "principal",
        "request_id",
        "route_state",
        "started_s",
    )

    def __init__(
        self,
        floor: Floor,
        exchange: WholeExchange,
        headers: RawHeaderMap,
        principal: Principal,
        started_s: float,
    ) -> None:
        self._floor = floor
        self.log_context = floor.log_context
        """Have log lines name a request by setting its id; `reset` it afterwards."""
        self.exchange = exchange
        self.headers = headers
        self.principal = principal
        self.request_id = _request_id(headers)
        self.started_s = started_s
        self.route_state: Any = None
        """What the route keeps."""

    def body(self) -> bytes | None:
        """The request's body, which stays where it is; None: it is too large, or the client has left."""
        body = self.exchange.body
        return bytes(body) if len(body) <= self._floor.body_max_bytes else None

    def count(self) -> None:
        """Count the request: it will be answered.

        Raises:
            RateLimited: it was one too many, and nothing was done.
        """
        self._floor.count(f"tenant {self.principal.tenant}")
        self.exchange.whole_body()

    def finish(self, lines: list[bytes], body: bytes) -> None:
        """Answer with status 200, and record it.

        Args:
            lines: Of its head, without their ends; the request's id and the body's length are added.
        """
        lines.append(_REQUEST_ID_NAME + b": " + self.request_id.encode())
        self.exchange.give(lines, body)
        self.route_state = None  # or the two would hold each other
        self._floor.finished(self)

    def hand_over(self) -> None:
        """Go on in a task, through the app of the route."""
        self.exchange.on_end(None)
        self.exchange.scope["state"][AHEAD] = self
        self.exchange.run()


class IncomingBody:
    """The way in: counts what arrives, for a length may be missing or a lie, and ends a body that stalls.

    A route that reads a stream piece by piece sets `whole_is_bounded` to False and keeps `max_bytes` for each
    of its pieces.
    """

    __slots__ = (
        "_announced",
        "_answer",
        "_complete",
        "_receive",
        "_size_bytes",
        "_stall_s",
        "max_bytes",
        "whole_is_bounded",
    )

    def __init__(
        self,
        receive: Receive,
        answer: OutgoingAnswer,
        announced: bytes | None,
        max_bytes: int,
        stall_s: float,
    ) -> None:
        self._receive = receive
        self._answer = answer
        self._announced = int(announced) if announced is not None and announced.isdigit() else 0
        self._stall_s = stall_s
        self._size_bytes = 0
        self._complete = False
        self.max_bytes = max_bytes
        self.whole_is_bounded = True

    async def whole(self) -> bytes:
        """All of it.

        Raises:
            TooLarge, DeadlineExceeded: as `receive`.
            ClientDisconnect: the client left before its end.
        """
        self._check(self._announced)
        body = self._answer.whole_body()
        if body is not None:
            self._check(len(body))
            self._complete = True
            return body
        pieces: list[bytes] = []
        while not self._complete:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            pieces.append(message.get("body", b""))
        return b"".join(pieces)

    async def receive(self) -> Message:
        """As ASGI has it.

        Raises:
            TooLarge: the body is, or says it is, larger than the limit.
            DeadlineExceeded: nothing of it came for too long.
        """
        if self._complete:
            # Only the end of the connection is left to come, and for that there is no hurry.
            return await self._receive()
        self._check(self._announced)
        try:
            async with asyncio.timeout(self._stall_s):
                message = await self._receive()
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing of the body came for {self._stall_s!r} s, after {self._size_bytes!r} bytes",
                hint="send it again without a pause",
            ) from None
        if message["type"] == "http.request":
            self._size_bytes += len(message.get("body", b""))
            self._check(self._size_bytes)
            self._complete = not message.get("more_body", False)
        return message

    def _check(self, size_bytes: int) -> None:
        if self.whole_is_bounded and size_bytes > self.max_bytes:
            raise TooLarge(
                f"the request body is larger than {self.max_bytes!r} bytes",
                hint="send less, or raise serve.body_max_bytes",
            )


class OutgoingAnswer:
    """The way out: remembers what was sent and puts the request id on it.

    `put`, `drained`, `on_gone` and `whole_body` are those of the server's `Exchange`.
    """

    __slots__ = (
        "_exchange", "_send", "drained", "error_code", "on_gone", "put", "request_id", "status", "whole_body"
    )  # fmt: skip

    def __init__(self, exchange: Exchange, send: Send, request_id: str) -> None:
        self._exchange = exchange
        self._send = send
        self.put = exchange.put
        self.drained = exchange.drained
        self.on_gone = exchange.on_gone
        self.whole_body = exchange.whole_body
        self.request_id = request_id
        self.status: int | None = None
        self.error_code: str | None = None

    def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """See `Exchange`. The request id is added to the headers."""
        self.status = status
        headers.append((_REQUEST_ID_NAME, self.request_id.encode()))
        self._exchange.begin(status, headers)

    async def give(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer. Its length is added to the headers."""
        # Who asks many times and takes nothing must not fill the memory with answers.
        await self.drained()
        headers.append((b"content-length", b"%d" % len(body)))
        self.begin(status, headers)
        if not self.put(body, more=False):
            await self.drained()

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = (_REQUEST_ID_NAME, self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), extra]}
        await self._send(message)


def exact_routes(routes: Sequence[BaseRoute]) -> ExactRoutes:
    """Those of the routes that answer at one path, unless an earlier one would take the request from them."""
    found: dict[tuple[str, str], tuple[Route, Endpoint | None]] = {}
    for number, route in enumerate(routes):
        if (
            not isinstance(route, Route)
            or "{" in route.path
            or not (isinstance(route, DirectRoute) or inspect.iscoroutinefunction(route.endpoint))
        ):
            continue
        endpoint = None if isinstance(route, DirectRoute) else route.endpoint
        for method in route.methods or ():
            scope: Scope = {"type": "http", "path": route.path, "method": method, "root_path": ""}
            if all(earlier.matches(scope)[0] is not Match.FULL for earlier in routes[:number]):
                found[route.path, method] = (route, endpoint)
    return found


def credential_of(headers: Mapping[str, str]) -> str | None:
    """The bare credential of a request: `Authorization: Bearer …`, or `x-api-key` as Anthropic's clients do.

    Raises:
        Unauthenticated: an `Authorization` header of another kind.
    """
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    kind, _, value = authorization.partition(" ")
    if kind.lower() != "bearer" or not value.strip():
        raise Unauthenticated("the Authorization header is not of the kind Bearer", hint=CREDENTIAL_HINT)
    return value.strip()


def _credential_in(headers: RawHeaderMap) -> str | None:
    """The same, of raw headers."""
    authorization = headers.get(b"authorization")
    if authorization is not None and authorization.startswith(b"Bearer ") and len(authorization) < 4096:
        value = authorization[7:].strip()
        if value:
            return value.decode("latin-1").strip()  # as nearly always
    return credential_of(_texts(headers, _CREDENTIAL_NAMES))


def _check_origin_of(headers: RawHeaderMap, scheme: str) -> None:
    host, origin = headers.get(b"host"), headers.get(b"origin")
    check_origin(
        None if host is None else host.decode("latin-1"),
        None if origin is None else origin.decode("latin-1"),
        scheme,
    )


def check_origin(host: str | None, origin: str | None, scheme: str) -> None:
    """Refuse what a web page in the user's browser could send while no credential is demanded.

    A page cannot forge these headers: after DNS rebinding `Host` holds the page's own name, and a request
    across origins carries its `Origin`. So `Host` must name loopback and `Origin`, if any, must be ours.

    Raises:
        Forbidden: it is not so.
    """
    hint = "call it as http://127.0.0.1:PORT, or set auth.required and use a key"
    if host is None or not _names_loopback(host):
        raise Forbidden(f"the Host header {host!r} does not name this machine", hint=hint)
    if origin is not None and origin.lower() != f"{scheme}://{host}".lower():
        raise Forbidden(f"requests from the origin {origin!r} are refused", hint=hint)


def _names_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def invalid_input(error: ValidationError) -> InvalidInput:
    """A pydantic error as ours: the first field that is wrong, the rest in `details`."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"])
    fields = [
        {"field": ".".join(str(part) for part in problem["loc"]), "problem": problem["msg"]}
        for problem in problems[:_ERRORS_SHOWN_MAX]
    ]
    if first["type"] == "json_invalid":
        return InvalidInput(f"the body is refused: {first['msg']}", hint="send valid JSON")
    value = first["input"]
    # A missing field's "input" is the whole object around it.
    shown = "" if first["type"] == "missing" or is_secret_name(field) else f" (got {reprlib.repr(value)})"
    return InvalidInput(
        f"the field {field!r} is refused: {first['msg']}{shown}"
        if field
        else f"the body is refused: {first['msg']}",
        hint="correct it and send the request again",
        details={"errors": fields},
    )


def check_json_numbers(content: bytes) -> None:
    """Refuse NaN and Infinity, which are no JSON (RFC 8259, section 6) and which pydantic takes.

    Raises:
        InvalidInput: they are there, or it is no JSON at all.
    """
    if b"NaN" in content or b"Infinity" in content:
        try:
            orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise InvalidInput(f"the body is refused: {error}", hint="send valid JSON") from None


def unexpected() -> AgenticFlowError:
    """What a caller learns of a bug of ours."""
    return AgenticFlowError(
        "the server failed to answer this request", hint="its log has the cause under this request id"
    )


def _texts(headers: RawHeaderMap, names: Iterable[bytes] | None = None) -> dict[str, str]:
    """Headers as texts: all, or those of these names that are there."""
    if names is None:
        names = headers
    return {name.decode("latin-1"): headers[name].decode("latin-1") for name in names if name in headers}


def _request_id(headers: RawHeaderMap) -> str:
    given = headers.get(_REQUEST_ID_NAME)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    # Unique is enough, for nothing is decided by it: no system call for randomness that nobody can guess.
    return f"{random.getrandbits(128):032x}"
