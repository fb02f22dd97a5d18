"""The web floor on real sockets: identity, limits, errors, streams, health, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import BaseModel, SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from structlog.testing import capture_logs

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.errors import Conflict, InvalidSettings, PortInUse, Unauthenticated, as_anthropic
from agentic_flow.core.serve import serve
from agentic_flow.core.settings import AuthSettings, ServeSettings, Settings
from agentic_flow.core.sse import ServerEvent
from agentic_flow.core.web import (
    EventStream,
    create_app,
    deadline_of,
    json_response,
    parse,
    principal_of,
    require,
)
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio


class Note(BaseModel):
    text: str
    count: int = 1
    api_key: SecretStr | None = None


class TwoKeys:
    """An authenticator with two fixed keys, one per tenant."""

    async def authenticate(self, credential: str) -> Principal:
        if credential == "key-a":
            return Principal("a", "ann", frozenset({"notes:read"}))
        if credential == "key-b":
            return Principal("b", "bob", frozenset({"notes:*"}))
        raise Unauthenticated("the key is wrong")


async def _echo(request: Request) -> Response:
    note = await parse(request, Note)
    return json_response({"note": note, "tenant": principal_of(request).tenant})


async def _who(request: Request) -> Response:
    principal = principal_of(request)
    return json_response({"tenant": principal.tenant, "subject": principal.subject})


async def _write(request: Request) -> Response:
    require(request, "notes:write")
    return json_response({"ok": True})


async def _bug(request: Request) -> Response:
    raise ZeroDivisionError("the inner secret of the house")


async def _conflict(request: Request) -> Response:
    raise Conflict("version 3 is stored", hint="read it again", details={"stored": 3})


async def _remaining(request: Request) -> Response:
    return json_response({"remaining_s": deadline_of(request, 30.0).remaining_s})


async def _all_good() -> dict[str, bool]:
    return {"database": True}


def app_of(
    *extra: Route, ready: Any = _all_good, required: bool = False, lifespan: Any = None, **serve_settings: Any
) -> Starlette:
    return create_app(
        "platform",
        [
            Route("/echo", _echo, methods=["POST"]),
            Route("/who/{name}", _who),
            Route("/write", _write, methods=["POST"]),
            Route("/bug", _bug),
            Route("/conflict", _conflict),
            Route("/v1/messages", _conflict, methods=["POST"]),
            Route("/remaining", _remaining),
            Route("/public", _who),
            *extra,
        ],
        authenticator=TwoKeys(),
        settings=Settings(
            auth=AuthSettings(required=required), serve=ServeSettings.model_validate(serve_settings)
        ),
        ready=ready,
        lifespan=lifespan,
        public_paths={"/public"},
        error_shapes={"/v1/messages": as_anthropic},
    )


@contextlib.asynccontextmanager
async def _open(app: Starlette, **options: Any) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    async with serving(app, **options) as (url,), aiohttp.ClientSession() as session:
        yield session, url


async def test_health_names_the_failing_check() -> None:
    """Catches a readiness route that is green while a need is down, or a liveness that follows it."""

    async def ready() -> dict[str, bool]:
        return {"database": False, "disk": True}

    async with _open(app_of(ready=ready, required=True)) as (session, url):
        async with session.get(f"{url}/health/ready") as answer:
            assert answer.status == 503
            assert (await answer.json())["failing"] == ["database"]
        async with session.get(f"{url}/health/live") as answer:
            assert answer.status == 200
        async with session.get(f"{url}/health") as answer:
            body = await answer.json()
            assert body["service"] == "platform"
            assert body["checks"] == {"accepting": True, "database": False, "disk": True}


async def test_metrics_count_by_route_template_and_not_by_path() -> None:
    """Catches label explosion (one series per path) and series shared between apps."""
    first, second = app_of(), app_of()
    async with serving(first, second) as (url, other), aiohttp.ClientSession() as session:
        for name in ("x", "y"):
            await (await session.get(f"{url}/who/{name}")).release()
        await (await session.get(f"{url}/nowhere")).release()
        text = await (await session.get(f"{url}/metrics")).text()
        quiet = await (await session.get(f"{other}/metrics")).text()
    wanted = (
        'agentic_flow_http_request_duration_seconds_count{method="GET",route="/who/{name}",'
        'service="platform",status="200"} 2.0'
    )
    assert wanted in text
    assert 'route="unmatched"' in text
    assert "/who/x" not in text
    assert "/who/" not in quiet


async def test_absent_credential_is_the_local_owner_only_while_auth_is_off() -> None:
    """Catches strangers let in once auth is required, or the owner locked out while it is not."""
    async with _open(app_of()) as (session, url), session.get(f"{url}/who/x") as answer:
        assert await answer.json() == {"tenant": LOCAL_OWNER.tenant, "subject": LOCAL_OWNER.subject}
    async with _open(app_of(required=True)) as (session, url), session.get(f"{url}/who/x") as answer:
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("header", "value", "tenant"),
    [
        ("authorization", "Bearer key-a", "a"),
        ("x-api-key", "key-b", "b"),
        ("authorization", "Bearer wrong", None),
        ("x-api-key", "wrong", None),
        ("authorization", "Basic key-a", None),
        ("authorization", "Bearer ", None),
    ],
)
async def test_a_credential_that_is_sent_is_checked(
    required: bool, header: str, value: str, tenant: str | None
) -> None:
    """Catches a wrong key that passes because authentication is off."""
    async with (
        _open(app_of(required=required)) as (session, url),
        session.get(f"{url}/who/x", headers={header: value}) as answer,
    ):
        assert answer.status == (200 if tenant else 401)
        if tenant:
            assert (await answer.json())["tenant"] == tenant


async def test_a_public_path_needs_no_credential_but_checks_one() -> None:
    """Catches a public path that is closed, that takes a wrong key, or that invents a principal."""
    async with _open(app_of(required=True)) as (session, url):
        async with session.get(f"{url}/public") as answer:
            assert (answer.status, (await answer.json())["detail"]) == (401, "this needs a credential")
        async with session.get(f"{url}/public", headers={"x-api-key": "wrong"}) as answer:
            assert (await answer.json())["detail"] == "the key is wrong"
        async with session.get(f"{url}/public", headers={"x-api-key": "key-a"}) as answer:
            assert answer.status == 200


async def test_scopes_are_demanded_by_name() -> None:
    """Catches a route that serves a principal without its scope."""
    async with _open(app_of(required=True)) as (session, url):
        async with session.post(f"{url}/write", headers={"x-api-key": "key-a"}) as answer:
            assert answer.status == 403
            assert "'notes:write'" in (await answer.json())["detail"]
        async with session.post(f"{url}/write", headers={"x-api-key": "key-b"}) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:3000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:3000", "origin": "http://localhost:3000"}, 200),
        ({"host": "localhost:3000", "origin": "http://localhost:8080"}, 403),
    ],
)
async def test_a_web_page_cannot_reach_a_server_without_auth(headers: dict[str, str], status: int) -> None:
    """Catches DNS rebinding and cross-origin requests while no credential is demanded."""
    async with _open(app_of()) as (session, url), session.get(f"{url}/who/x", headers=headers) as answer:
        assert answer.status == status


async def test_with_auth_any_host_name_is_served() -> None:
    """Catches the rebinding check being left on where it would break every real deployment."""
    headers = {"host": "flows.example", "x-api-key": "key-a"}
    async with (
        _open(app_of(required=True)) as (session, url),
        session.get(f"{url}/who/x", headers=headers) as answer,
    ):
        assert answer.status == 200


async def test_the_rate_limit_is_per_tenant() -> None:
    """Catches one tenant using up another's requests, and a 429 that does not say when to come back."""
    async with _open(app_of(requests_per_minute=3)) as (session, url):
        statuses: list[int] = []
        for key in ["key-a"] * 4 + ["key-b"]:
            async with session.get(f"{url}/who/x", headers={"x-api-key": key}) as answer:
                statuses.append(answer.status)
                if answer.status == 429:
                    assert 0 < int(answer.headers["retry-after"]) <= 20
                    assert 0 < (await answer.json())["retry_after_s"] <= 20
        assert statuses == [200, 200, 200, 429, 200]
        async with session.get(f"{url}/health/live") as answer:
            assert answer.status == 200


async def test_the_body_limit_counts_what_arrives() -> None:
    """Catches a limit that trusts Content-Length: a chunked body has none."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"text": "'
        for _ in range(10):
            yield b"x" * 100
        yield b'"}'

    async with _open(app_of(body_max_bytes=500)) as (session, url):
        async with session.post(f"{url}/echo", data=chunks()) as answer:
            assert (answer.status, (await answer.json())["code"]) == (413, "too_large")
        async with session.post(f"{url}/echo", data=b'{"text": "' + b"x" * 600 + b'"}') as answer:
            assert answer.status == 413
        async with session.post(f"{url}/echo", data=b'{"text": "ok"}') as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"text": 3}', ["'text'", "3"]),
        (b'{"count": 1}', ["'text'", "required"]),
        (b'{"text": "a", "count": "many"}', ["'count'", "'many'"]),
        (b"{", ["JSON"]),
        (b"", ["JSON"]),
        (b"[1]", ["body"]),
    ],
)
async def test_a_wrong_field_is_named(body: bytes, words: list[str]) -> None:
    """Catches a 400 that leaves the caller guessing."""
    async with _open(app_of()) as (session, url), session.post(f"{url}/echo", data=body) as answer:
        problem = await answer.json()
        assert (answer.status, problem["code"]) == (400, "invalid_input")
        for word in words:
            assert word in problem["detail"]


async def test_a_wrong_secret_is_not_shown_back() -> None:
    """Catches the value of a secret field in an error message."""
    async with _open(app_of()) as (session, url):
        async with session.post(f"{url}/echo", data=b'{"text": "a", "api_key": 123456}') as answer:
            text = await answer.text()
        assert answer.status == 400
        assert "123456" not in text


async def test_errors_leave_as_problems_with_their_facts() -> None:
    """Catches a status, hint or detail lost on the way out, and a shape that a path asked for."""
    async with _open(app_of()) as (session, url):
        async with session.get(f"{url}/conflict", headers={"x-request-id": "r-1"}) as answer:
            assert answer.headers["x-request-id"] == "r-1"
            assert await answer.json(content_type="application/problem+json") == {
                "type": "urn:agentic-flow:error:conflict",
                "title": "conflict",
                "status": 409,
                "detail": "version 3 is stored",
                "code": "conflict",
                "retryable": False,
                "hint": "read it again",
                "instance": "urn:request:r-1",
                "details": {"stored": 3},
            }
        async with session.post(f"{url}/v1/messages") as answer:
            assert answer.status == 409
            assert (await answer.json())["type"] == "error"
        async with session.get(f"{url}/nowhere") as answer:
            assert (answer.status, (await answer.json())["code"]) == (404, "not_found")
        async with session.get(f"{url}/echo") as answer:
            assert answer.status == 405
            assert answer.headers["allow"] == "POST"


async def test_a_bug_is_logged_once_and_told_without_internals() -> None:
    """Catches tracebacks in answers, and bugs that leave no trace or two."""
    with capture_logs() as logs:
        async with (
            _open(app_of()) as (session, url),
            session.get(f"{url}/bug", headers={"x-request-id": "odd id!"}) as answer,
        ):
            text = await answer.text()
            request_id = answer.headers["x-request-id"]
    assert answer.status == 500
    assert "secret of the house" not in text
    assert "ZeroDivision" not in text
    assert request_id != "odd id!"
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["request_failed"]


async def test_one_canonical_line_per_request() -> None:
    """Catches a request that leaves no line, two lines, or a line without who, what and how long."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with capture_logs() as logs:
        async with (
            _open(app_of()) as (session, url),
            session.get(f"{url}/who/x", headers={"x-api-key": "key-a", "traceparent": parent}) as answer,
        ):
            assert answer.status == 200
    (line,) = [line for line in logs if line["event"] == "request_finished"]
    assert line["service"] == "platform"
    assert (line["method"], line["route"], line["status"]) == ("GET", "/who/{name}", 200)
    assert line["tenant"] == "a"
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["duration_ms"] > 0
    assert line["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(("sent", "low", "high"), [("5", 1, 5), ("0", 0, 0), ("900", 20, 30), (None, 20, 30)])
async def test_the_callers_deadline_is_kept_within_ours(sent: str | None, low: float, high: float) -> None:
    """Catches a deadline header that is ignored, or that lifts the service's own limit."""
    headers = {} if sent is None else {"x-deadline-s": sent}
    async with _open(app_of()) as (session, url), session.get(f"{url}/remaining", headers=headers) as answer:
        assert low <= (await answer.json())["remaining_s"] <= high


@pytest.mark.parametrize("sent", ["soon", "-1", "nan"])
async def test_a_malformed_deadline_is_refused(sent: str) -> None:
    """Catches NaN or text that turns into no deadline at all."""
    async with (
        _open(app_of()) as (session, url),
        session.get(f"{url}/remaining", headers={"x-deadline-s": sent}) as answer,
    ):
        assert answer.status == 400


async def test_an_event_stream_is_not_buffered_and_ends_with_its_client() -> None:
    """Catches events held back until the end, and sources that run on after the reader has gone."""
    gate, closed = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[ServerEvent]:
        try:
            yield ServerEvent("1", id="e1")
            await gate.wait()
            yield ServerEvent("2", event="more")
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def stream(request: Request) -> Response:
        return EventStream(events(), heartbeat_s=0.02)

    async with _open(app_of(Route("/stream", stream))) as (session, url):
        async with session.get(f"{url}/stream") as answer:
            assert answer.content_type == "text/event-stream"
            assert await answer.content.readuntil(b"\n\n") == b"id: e1\ndata: 1\n\n"
            assert await answer.content.readuntil(b"\n\n") == b": heartbeat\n\n"
            gate.set()
            while (block := await answer.content.readuntil(b"\n\n")) == b": heartbeat\n\n":
                continue
            assert block == b"event: more\ndata: 2\n\n"
        await asyncio.wait_for(closed.wait(), 10)


@pytest.mark.parametrize(("raised", "code"), [(Conflict("taken"), "conflict"), (KeyError("x"), "internal")])
async def test_an_error_within_a_stream_is_its_last_event(raised: Exception, code: str) -> None:
    """Catches a failed stream that looks complete, or that shows internals."""

    async def events() -> AsyncIterator[ServerEvent]:
        yield ServerEvent("1")
        raise raised

    async def stream(request: Request) -> Response:
        return EventStream(events())

    async with (
        _open(app_of(Route("/stream", stream))) as (session, url),
        session.get(f"{url}/stream") as answer,
    ):
        text = await answer.text()
    assert text.startswith("data: 1\n\nevent: error\n")
    assert f'"code":"{code}"' in text
    assert "KeyError" not in text


async def test_drain_ends_streams_and_finishes_requests() -> None:
    """Catches a stop that cuts a request in flight, or that waits for a stream without end."""
    entered, release, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
    order: list[str] = []

    async def slow(request: Request) -> Response:
        entered.set()
        await release.wait()
        order.append("answered")
        return json_response({"done": True})

    async def events() -> AsyncIterator[ServerEvent]:
        yield ServerEvent("1")
        await asyncio.Event().wait()

    async def stream(request: Request) -> Response:
        return EventStream(events())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        order.append("closed")

    app = app_of(Route("/slow", slow), Route("/stream", stream), lifespan=lifespan)
    async with aiohttp.ClientSession() as session:
        async with serving(app, stop=stop, drain_timeout_s=30.0) as (url,):
            answer = await session.get(f"{url}/stream")
            waiting = asyncio.create_task(session.get(f"{url}/slow"))
            await entered.wait()
            stop.set()
            assert await answer.text() == "data: 1\n\n"
            release.set()
            async with await waiting as finished:
                assert await finished.json() == {"done": True}
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{url}/health/live")
    assert order == ["answered", "closed"]


async def test_a_request_past_the_drain_limit_is_cancelled_before_its_service_closes() -> None:
    """Catches a stop that hangs on a stuck request, or that closes the database under it."""
    entered, stop = asyncio.Event(), asyncio.Event()
    order: list[str] = []

    async def stuck(request: Request) -> Response:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("unwound")
        raise AssertionError

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        order.append("closed")

    async with aiohttp.ClientSession() as session:
        async with serving(
            app_of(Route("/stuck", stuck), lifespan=lifespan), stop=stop, drain_timeout_s=0.1
        ) as (url,):
            waiting = asyncio.create_task(session.get(f"{url}/stuck"))
            await entered.wait()
            stop.set()
        async with await waiting as answer:
            assert (answer.status, (await answer.json())["code"]) == (503, "unavailable")
    assert order == ["unwound", "closed"]


async def test_a_taken_port_is_named_and_nothing_is_started() -> None:
    """Catches a start that leaves half of the services running beside an error."""
    started: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        started.append("platform")
        yield

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        apps = [(app_of(lifespan=lifespan), "127.0.0.1", 0), (app_of(), "127.0.0.1", port)]
        with pytest.raises(PortInUse) as caught:
            await serve(apps, signals=False)
    assert f"127.0.0.1:{port}" in caught.value.message
    assert "AGENTIC_FLOW_SERVE__PLATFORM_PORT" in (caught.value.hint or "")
    assert started == []


async def test_a_port_that_is_bound_but_not_yet_listening_is_found_out() -> None:
    """Catches two servers that both bind one port because SO_REUSEADDR allows it."""
    stop = asyncio.Event()
    async with serving(app_of(), stop=stop) as (url,):
        port = int(url.rpartition(":")[2])
        with pytest.raises(PortInUse):
            await serve([(app_of(), "127.0.0.1", port)], signals=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
async def test_wider_than_loopback_demands_auth(host: str) -> None:
    """Catches an open door: a server that the network reaches and that asks for nothing."""
    with pytest.raises(InvalidSettings, match="without authentication"):
        await serve([(app_of(), host, 0)], signals=False)


async def test_a_failing_lifespan_is_raised_and_leaves_no_socket() -> None:
    """Catches start-up errors that end in sys.exit or that keep ports."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        raise Conflict("the database is newer")
        yield

    with socket.socket() as held:
        # Nobody else is given the port, and whoever asks for it by its number may listen there.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(Conflict):
            await serve([(app_of(lifespan=lifespan), "127.0.0.1", port)], signals=False)
        with socket.create_server(("127.0.0.1", port)):
            pass


_PROGRAM = """
import asyncio, sys
from starlette.routing import Route
from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.settings import Settings
from agentic_flow.core.telemetry import configure
from agentic_flow.core.web import create_app, json_response, serve

async def ready(): return {}
async def slow(request):
    print("entered", flush=True)
    await asyncio.sleep(float(request.query_params["s"]))
    return json_response({"done": True})

settings = Settings()
configure(settings.telemetry, "platform")
app = create_app(
    "platform", [Route("/slow", slow)], authenticator=NoCredentials(), settings=settings, ready=ready
)
def show(addresses): print(addresses[0][1], flush=True)
asyncio.run(serve([(app, "127.0.0.1", 0)], on_ready=show, drain_timeout_s=60))
print("clean", flush=True)
"""


@contextlib.asynccontextmanager
async def _process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, stdout=asyncio.subprocess.PIPE, env=dict(os.environ), cwd=Path.cwd()
    )
    assert process.stdout is not None
    try:
        yield process, f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_sigterm_drains_and_exits_with_zero() -> None:
    """Catches a server that dies of SIGTERM with requests in flight."""
    async with _process() as (process, url), aiohttp.ClientSession() as session:
        assert process.stdout is not None
        waiting = asyncio.create_task(session.get(f"{url}/slow?s=0.5"))
        assert await process.stdout.readline() == b"entered\n"
        process.send_signal(signal.SIGTERM)
        async with await waiting as answer:
            assert await answer.json() == {"done": True}
        assert await process.stdout.readline() == b"clean\n"
        assert await process.wait() == 0


async def test_a_second_signal_ends_the_process_at_once() -> None:
    """Catches a server that can only be stopped by kill -9 while a request hangs."""
    async with _process() as (process, url), aiohttp.ClientSession() as session:
        assert process.stdout is not None
        waiting = asyncio.create_task(session.get(f"{url}/slow?s=3600"))
        assert await process.stdout.readline() == b"entered\n"
        process.send_signal(signal.SIGINT)
        # The first signal was handled once new connections are refused.
        while True:
            try:
                await (await session.get(f"{url}/health/live")).release()
            except aiohttp.ClientConnectorError:
                break
            except aiohttp.ClientError:
                continue  # the port or the connection was closed under this very request
        process.send_signal(signal.SIGINT)
        assert await process.wait() == -signal.SIGINT
        with pytest.raises(aiohttp.ClientError):
            await waiting
