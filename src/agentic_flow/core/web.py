"""The web floor under every service: one app factory and the few functions its routes need.

A request passes, in this order: request id and trace, the check against DNS rebinding, authentication, the
tenant's rate limit, the body limit, the route. Whatever is raised on the way leaves as problem+json (or in
the shape a route asks for), and one canonical line says how it ended. `core.serve` puts apps on sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import PurePath
from typing import Any, TypeVar, cast

import orjson
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agentic_flow.core import sse
from agentic_flow.core.auth import Authenticator, Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    InvalidInput,
    NotFound,
    Unauthenticated,
    as_problem,
)
from agentic_flow.core.readiness import Ready
from agentic_flow.core.serve import serve as serve
from agentic_flow.core.settings import Settings
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.telemetry import product_version
from agentic_flow.core.web_floor import (
    CREDENTIAL_HINT,
    STALL_TIMEOUT_S,
    ErrorShape,
    Floor,
    RawHeaderMap,
    check_json_numbers,
    exact_routes,
    invalid_input,
    unexpected,
)
from agentic_flow.core.web_floor import (
    credential_of as credential_of,
)

Model = TypeVar("Model", bound=BaseModel)
AppLifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]

DEADLINE_HEADER = "x-deadline-s"
_DEADLINE_NAME = DEADLINE_HEADER.encode()
HEARTBEAT_S = 15.0
OPENS_AFTER_S = 30.0
"""A service that starts while a neighbour is away is sent requests after so long all the same."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.web")


def create_app(
    service: str,
    routes: Sequence[BaseRoute],
    *,
    authenticator: Authenticator,
    settings: Settings,
    ready: Ready,
    opens: Ready | None = None,
    lifespan: AppLifespan | None = None,
    metrics: CollectorRegistry | None = None,
    public_paths: Collection[str] = (),
    error_shapes: Mapping[str, ErrorShape] | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> Starlette:
    """A service as an ASGI app.

    Args:
        service: Its name in logs, metrics and health (`platform`, `agentdb`, `swarm`).
        routes: Its routes; health and metrics are added.
        authenticator: Checks credentials. One that is sent is always checked; where none is sent and
            `auth.required` is off, the caller is the local owner.
        settings: The sections `serve` and `auth` are read.
        ready: Names each thing the service needs and whether it works; all true means ready.
        opens: What must work before a proxy sends the first requests; `ready` by default. What fails later
            is for those to say who miss it. After OPENS_AFTER_S it is open in any case.
        lifespan: Entered by `core.serve.serve` before the first request.
        metrics: The service's own metrics, shown on `/metrics` beside the floor's; never the global registry.
        public_paths: Exact paths that need no credential.
        error_shapes: Exact path, or the beginning of one with a slash at its end → how an error looks there
            (`as_openai`, `as_anthropic`); else problem+json.
        stall_timeout_s: Longest silence within a request's body.
    """
    registry = metrics or CollectorRegistry()
    started_s = time.monotonic()
    opening = _Opening(opens or ready)

    async def live(request: Request) -> Response:
        return json_response({"status": "live"})

    async def checks_now() -> dict[str, bool]:
        return {"accepting": not app.state.leaving.is_set(), **await ready()}

    async def accepting(request: Request) -> Response:
        """For a proxy: whether to send requests here, or to hold them."""
        is_accepting = not app.state.leaving.is_set() and await opening.is_done()
        return json_response({"accepting": is_accepting}, 200 if is_accepting else 503)

    async def readiness(request: Request) -> Response:
        checks = await checks_now()
        failing = sorted(name for name, good in checks.items() if not good)
        body: dict[str, Any] = {"status": "unready" if failing else "ready", "checks": checks}
        if failing:
            body["failing"] = failing
        return json_response(body, 503 if failing else 200)

    async def health(request: Request) -> Response:
        checks = await checks_now()
        return json_response(
            {
                "service": service,
                "status": "ready" if all(checks.values()) else "unready",
                "version": product_version(),
                "uptime_s": round(time.monotonic() - started_s, 3),
                "checks": checks,
            }
        )

    async def exposition(request: Request) -> Response:
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(registry), headers={"content-type": content_type})

    every = [
        Route("/health/live", live),
        Route("/health/accepting", accepting),
        Route("/health/ready", readiness),
        Route("/health", health),
        Route("/metrics", exposition),
        *routes,
    ]
    app = _App(
        routes=every,
        lifespan=lifespan,
        middleware=[
            Middleware(
                Floor,
                service=service,
                authenticator=authenticator,
                settings=settings,
                registry=registry,
                public_paths=frozenset(public_paths),
                error_shapes=dict(error_shapes or {}),
                http_error=_http_error,
                exact=exact_routes(every),
                stall_timeout_s=stall_timeout_s,
            )
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.middleware_stack = app.build_middleware_stack()
    app.state.service = service
    app.state.auth_required = settings.auth.required
    app.state.leaving = asyncio.Event()  # it is to stop, and takes requests for `serve.linger_s` more
    app.state.draining = asyncio.Event()  # it takes none
    return app


class _Opening:
    """Whether a service that has started is one to send requests to: once it is, it stays so."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self._until_s = time.monotonic() + OPENS_AFTER_S
        self._is_done = False

    async def is_done(self) -> bool:
        if not self._is_done:
            self._is_done = time.monotonic() >= self._until_s or all((await self._ready()).values())
        return self._is_done


class _App(Starlette):
    """Starlette with the floor outermost, which answers for every error, so that a layer for that is none."""

    at_once: Floor | None = None
    """See `core.http_server.AtOnce`."""

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        assert isinstance(stack, ServerErrorMiddleware)
        if isinstance(stack.app, Floor):
            self.at_once = stack.app
        return stack.app


# What routes use


class _JsonResponse(Response):
    media_type = "application/json"


def json_response(content: Any, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response of a pydantic model, a dataclass, or plain values that contain them."""
    return _JsonResponse(
        to_json(content), status_code=status, headers=None if headers is None else dict(headers)
    )


def to_json(content: Any) -> bytes:
    """JSON of a pydantic model, a dataclass, or plain values that contain them."""
    return orjson.dumps(content, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)


async def parse(request: Request, model: type[Model], *, strict: bool = False) -> Model:
    """The request's body as `model`.

    Args:
        strict: Whether a value of another JSON type is refused even if it could be converted.

    Raises:
        InvalidInput: it is not JSON, or a field is wrong; names the field.
        TooLarge: it is past `serve.body_max_bytes`.
    """
    body = await request.body()
    check_json_numbers(body)
    try:
        return model.model_validate_json(body, strict=strict or None)
    except ValidationError as error:
        raise invalid_input(error) from None


def stream_body(request: Request) -> AsyncGenerator[bytes]:
    """The body piece by piece, whatever its length: `serve.body_max_bytes` is the caller's to keep for what
    it collects (`body_max_bytes`). Reading no further holds the sender back.

    Raises:
        ClientDisconnect: the client left before the end.
        DeadlineExceeded: nothing came for too long.
    """
    request.state.body.whole_is_bounded = False
    return request.stream()


def body_max_bytes(request: Request) -> int:
    """The limit `serve.body_max_bytes` of the service that serves this request."""
    limit: int = request.state.body.max_bytes
    return limit


def principal_of(request: Request) -> Principal:
    """Who makes this request.

    Raises:
        Unauthenticated: the path is public and no credential was sent.
    """
    return known_principal(request.state.principal)


def known_principal(principal: Principal | None) -> Principal:
    """The principal that the floor found.

    Raises:
        Unauthenticated: there is none.
    """
    if principal is None:
        raise Unauthenticated("this needs a credential", hint=CREDENTIAL_HINT)
    return principal


def require(request: Request, scope: str) -> Principal:
    """The principal, once it holds `scope`; else Forbidden."""
    principal = principal_of(request)
    principal.demand(scope)
    return principal


def deadline_of(request: Request, timeout_s: float) -> Deadline:
    """The caller's deadline (`x-deadline-s`, seconds that remain), at most `timeout_s` from now."""
    return deadline_in(request.state.headers, timeout_s)


def deadline_in(headers: RawHeaderMap, timeout_s: float) -> Deadline:
    """The same, of the raw headers of a request."""
    given = headers.get(_DEADLINE_NAME)
    if given is None:
        return Deadline.after(timeout_s)
    raw = given.decode("latin-1")
    try:
        remaining_s = float(raw)
    except ValueError:
        remaining_s = -1.0
    # A NaN fails this comparison as well.
    if not remaining_s >= 0:
        raise InvalidInput(f"the header {DEADLINE_HEADER} is {raw!r}", hint="send seconds, such as 30")
    return Deadline.after(min(remaining_s, timeout_s))


class EventStream(Response):
    """Server-sent events as they come; ends with its source, when the client leaves, or on drain.

    An error of the source becomes a last event (by default `error` with a problem document): the status
    line is long gone. Between events a comment is sent every `heartbeat_s`.

    Args:
        events: The source; closed in every case.
        error_event: How an error looks as an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[ServerEvent],
        *,
        heartbeat_s: float = HEARTBEAT_S,
        error_event: Callable[[AgenticFlowError], ServerEvent] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        # The length is not known beforehand.
        del self.headers["content-length"]
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._error_event = error_event or _problem_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        draining: asyncio.Event = scope["app"].state.draining
        leaving = [asyncio.create_task(_disconnected(receive)), asyncio.create_task(draining.wait())]
        try:
            async with aclosing(self._chunks(leaving)) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(leaving)
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _chunks(self, leaving: Sequence[asyncio.Task[Any]]) -> AsyncGenerator[bytes]:
        upcoming = asyncio.create_task(_next(self._events))
        try:
            while True:
                done, _ = await asyncio.wait(
                    (upcoming, *leaving), timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    yield sse.encode_comment("heartbeat")
                elif any(task in done for task in leaving):
                    # Asked first: a source that always has an event ready must end as well.
                    return
                elif (event := upcoming.result()) is None:
                    return
                else:
                    yield sse.encode(event)
                    upcoming = asyncio.create_task(_next(self._events))
        except AgenticFlowError as error:
            yield sse.encode(self._error_event(error))
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and told without internals
            _log.exception("stream_failed")
            yield sse.encode(self._error_event(unexpected()))
        finally:
            await _cancel([upcoming])


def event_stream(
    events: AsyncIterator[ServerEvent],
    *,
    heartbeat_s: float = HEARTBEAT_S,
    error_event: Callable[[AgenticFlowError], ServerEvent] | None = None,
) -> Response:
    """A response that sends `events` as they come; see EventStream."""
    return EventStream(events, heartbeat_s=heartbeat_s, error_event=error_event)


async def _next(events: AsyncIterator[ServerEvent]) -> ServerEvent | None:
    return await anext(events, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel and wait. What they raise was either seen already or has no reader any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _problem_event(error: AgenticFlowError) -> ServerEvent:
    return ServerEvent(orjson.dumps(as_problem(error), default=str).decode(), "error")


def _plain(value: Any) -> Any:
    """What orjson does not know by itself."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, frozenset | set):
        return sorted(cast(frozenset[Any], value))
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such route, wrong method, a malformed form) as errors of ours."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        raise NotFound(f"there is no {path!r} here", hint="check the path; /health names the service")
    if error.status_code == 405:
        refusal = InvalidInput(f"{path!r} does not take {request.method!r}", hint="see the Allow header")
    elif error.status_code == 415:
        refusal = InvalidInput(
            f"{path!r} does not take this body: {error.detail}", hint="see the Accept header"
        )
    else:
        raise InvalidInput(f"{path!r} refused the request: {error.detail}")
    # The table has neither status, whose headers HTTP demands (RFC 9110, sections 15.5.6 and 15.5.16).
    return json_response(
        {**as_problem(refusal), "status": error.status_code},
        error.status_code,
        headers={**(error.headers or {}), "content-type": "application/problem+json"},
    )
