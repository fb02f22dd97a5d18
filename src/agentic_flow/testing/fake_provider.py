"""A model provider for tests: a real HTTP server that speaks Anthropic Messages and OpenAI Chat Completions.

In a test, in this process (its own thread and event loop, so sync and async tests can use it):

    with FakeProvider([Reply.text("4")]) as fake:
        ...                      # fake.anthropic_url, fake.openai_url
        assert fake.requests[0].last_text == "2 + 2?"

In a child process, printing its URL as the first line:

    python -m agentic_flow.testing.fake_provider --script rules.json --port 0 --log seen.jsonl

A script is a list of replies taken in order, a function from the request to a reply, or a list of rules (the
form of script files): `[{"when": {"contains": "sum"}, "reply": {"text": "4"}, "times": 2}]`. Requests are
checked as strictly as the vendors document; what they would refuse is refused in their error shape.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from aiohttp import web

from agentic_flow.testing.fake_wires import (
    Refusal,
    SeenRequest,
    Wire,
    anthropic_answer,
    anthropic_events,
    anthropic_refusal,
    check_anthropic,
    check_openai,
    openai_answer,
    openai_events,
    openai_refusal,
)

Fault = Literal[
    "broken_json",  # the body is not JSON (streaming: one event is not)
    "truncated",  # the connection closes in the middle of the body
    "no_terminal",  # the body ends properly, without the terminal event
    "hang",  # nothing is sent, ever
    "hang_mid",  # the answer begins and then stalls
    "reset",  # the connection is reset before any answer
    "reset_mid",  # the answer begins, and then the connection is reset
    "wrong_content_type",  # a login page
    "oversized",  # megabytes without end
    "empty",  # status 200 and no body
    "bad_arguments",  # tool arguments that are no JSON object
]
START_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. Build it with `text`, `tool_calls` or `error`, and refine it with `but`.

    Args:
        body_text: The text of the answer.
        calls: Tool calls: `{"name": …, "arguments": {…}}`, `id` optional.
        thinking: Reasoning shown before the answer.
        model: Model named in the answer; the requested one by default.
        stop_reason: In our vocabulary; by default what follows from the content.
        input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens: Usage
            reported. `input_tokens` counts all input, as in `core.messages.Usage`.
        omit_usage: Report none.
        status: HTTP status; anything but 200 is an error answer with `body_text` as its message.
        error_type: The vendor's type of that error.
        retry_after: Value of the Retry-After header.
        delay_s: Wait before the first byte.
        chunk_delay_s: Wait between the events of a stream.
        chunk_chars: Characters of text or argument JSON in one event.
        chunk_bytes: Cut the stream into pieces of this many bytes, regardless of events.
        fault: What goes wrong.
        stream_error: End a stream with the vendor's error event of this type.
        extra: Fields beside those that are known: of an answer, of Anthropic's `message_start`, of every
            chunk of OpenAI's.
    """

    body_text: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    thinking: str = ""
    model: str | None = None
    stop_reason: str | None = None
    input_tokens: int = 20
    output_tokens: int = 10
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    omit_usage: bool = False
    status: int = 200
    error_type: str | None = None
    retry_after: str | None = None
    delay_s: float = 0.0
    chunk_delay_s: float = 0.0
    chunk_chars: int = 7
    chunk_bytes: int | None = None
    fault: Fault | None = None
    stream_error: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def text(cls, text: str, **more: Any) -> Reply:
        return cls(body_text=text, **more)

    @classmethod
    def tool_calls(cls, calls: Sequence[Mapping[str, Any]], **more: Any) -> Reply:
        return cls(calls=tuple(calls), **more)

    @classmethod
    def error(cls, status: int, message: str = "scripted error", **more: Any) -> Reply:
        return cls(status=status, body_text=message, **more)

    @classmethod
    def broken(cls, fault: Fault, **more: Any) -> Reply:
        return cls(body_text=more.pop("text", "an answer that never arrives whole"), fault=fault, **more)

    def but(self, **changes: Any) -> Reply:
        return replace(self, **changes)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reply:
        """A reply of a script file: `text`, `tool_calls` and the other fields by name."""
        given = dict(value)
        given["body_text"] = given.pop("text", given.pop("body_text", ""))
        given["calls"] = tuple(given.pop("tool_calls", given.pop("calls", ())))
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"unknown reply fields {unknown!r}; known: {sorted(known)!r}")
        return cls(**given)


@dataclass(slots=True)
class Rule:
    """`reply` to requests that match every condition of `when`, `times` times (None: always)."""

    when: Mapping[str, Any]
    reply: Reply
    times: int | None = None
    used: int = 0

    CONDITIONS = (
        *("contains", "last_contains", "system_contains"),
        *("wire", "model", "path", "stream", "has_tools", "tool_results"),
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.when) - set(self.CONDITIONS))
        if unknown:
            raise ValueError(f"unknown conditions {unknown!r}; known: {sorted(self.CONDITIONS)!r}")

    def matches(self, request: SeenRequest) -> bool:
        """Whether every condition holds and the rule is not used up."""
        if self.times is not None and self.used >= self.times:
            return False
        seen = {
            "wire": request.wire,
            "model": request.model,
            "path": request.path,
            "stream": request.stream,
            "has_tools": bool(request.tools),
            "tool_results": request.tool_results,
        }
        texts = {
            "contains": request.text,
            "last_contains": request.last_text,
            "system_contains": request.system,
        }
        return all(
            wanted in texts[name] if name in texts else seen[name] == wanted
            for name, wanted in self.when.items()
        )


Script = Sequence[Reply] | Callable[[SeenRequest], Reply] | Sequence[Rule]


def load_rules(path: Path) -> list[Rule]:
    """The rules of a script file."""
    return [
        Rule(entry.get("when", {}), Reply.from_json(entry["reply"]), entry.get("times"))
        for entry in json.loads(path.read_text("utf-8"))
    ]


class FakeProvider:
    """The server. A context manager, or `start` and `close`.

    Args:
        script: See the module. Past the end of a list every request is refused with status 400.
        port: 0 takes any free port.
        host: Address to bind; wider than loopback for clients in containers.
        log: Every request is appended here as a JSON line, on disk before it is answered, so that calls
            can be counted across crashes.
        api_key: When given, any other key is refused with 401. Without it any key will do.
        keyless: Take requests without a key too, like a server on one's own machine.
        models: What it serves; any other is refused with 404. None serves every name.
    """

    def __init__(
        self,
        script: Script = (),
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        log: Path | None = None,
        api_key: str | None = None,
        keyless: bool = False,
        models: Sequence[str] | None = None,
    ) -> None:
        self._script = script
        self._port = port
        self._host = host
        self._log = log
        self._api_key = api_key
        self._keyless = keyless
        self._models = None if models is None else list(models)
        self._lock = threading.Lock()
        self._requests: list[SeenRequest] = []
        self._refused: list[Refusal] = []
        self._left = threading.Event()
        self._closing: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    @property
    def anthropic_url(self) -> str:
        """For ANTHROPIC_BASE_URL."""
        return self.url

    @property
    def openai_url(self) -> str:
        """For OPENAI_BASE_URL and OPENROUTER_BASE_URL."""
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[SeenRequest]:
        """The completion requests so far, in order of arrival, refused ones included."""
        with self._lock:
            return list(self._requests)

    @property
    def refused(self) -> list[Refusal]:
        """What was wrong with the requests that broke the vendor's rules."""
        with self._lock:
            return list(self._refused)

    def wait_until_left(self, timeout_s: float) -> bool:
        """Wait until a client has closed its connection before its answer was whole; whether one did."""
        return self._left.wait(timeout_s)

    def start(self) -> Self:
        """Begin to serve in a thread of its own; `url` is set when this returns."""
        started: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fake-provider", daemon=True)
        self._thread.start()
        self.url = started.result(START_TIMEOUT_S)
        return self

    def close(self) -> None:
        """End the server and everything that hangs in it."""
        loop, closing, thread = self._loop, self._closing, self._thread
        if loop is not None and closing is not None and thread is not None:
            loop.call_soon_threadsafe(closing.set)
            thread.join(START_TIMEOUT_S)
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, started: Future[str]) -> None:
        asyncio.run(self.serve(started))

    async def serve(self, started: Future[str]) -> None:
        """Serve until `close`; the URL, or the reason why there is none, goes to `started`."""
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=256 * 1024 * 1024)
        app.router.add_post("/v1/messages", self._answer("anthropic", check_anthropic))
        app.router.add_post("/v1/messages/count_tokens", self._answer("anthropic", check_anthropic))
        app.router.add_post("/v1/chat/completions", self._answer("openai", check_openai))
        app.router.add_get("/v1/models", self._list_models)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=0.1,
            handler_cancellation=True,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host, self._port)
            await site.start()
            started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
            await self._closing.wait()
        except OSError as error:
            started.set_exception(error)
        finally:
            await runner.cleanup()

    def _answer(self, wire: Wire, check: Callable[[SeenRequest], str | None]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            seen, problem = self._take(wire, request, body, check)
            if problem is not None:
                return _refuse(wire, *problem)
            if request.path.endswith("/count_tokens"):
                return web.json_response({"input_tokens": -(-len(body) // 5)})
            try:
                return await self._send(request, seen, self._next_reply(seen))
            except (asyncio.CancelledError, ConnectionError):
                self._left.set()
                raise

        return handle

    def _take(
        self, wire: Wire, request: web.Request, body: bytes, check: Callable[[SeenRequest], str | None]
    ) -> tuple[SeenRequest, tuple[int, str] | None]:
        """Record the request, then judge it."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        with self._lock:
            seen = SeenRequest.parse(wire, request.path, headers, body, index=len(self._requests))
            self._requests.append(seen)
            if self._log is not None:
                self._append(seen)
            problem = self._judge(seen, check)
            if problem is not None:
                self._refused.append(Refusal(seen.index, *problem))
        return seen, problem

    def _judge(self, seen: SeenRequest, check: Callable[[SeenRequest], str | None]) -> tuple[int, str] | None:
        if seen.key is None and not self._keyless:
            return 401, "no API key was sent"
        if self._api_key is not None and seen.key != self._api_key:
            return 401, f"invalid API key: {seen.key}"
        try:
            wrong = check(seen)
        except (AttributeError, KeyError, TypeError):
            wrong = "a field has the wrong type"  # the rules were written for requests of a sane shape
        if wrong is not None:
            return 400, wrong
        if self._models is not None and seen.model not in self._models:
            return 404, f"model: {seen.model}"
        return None

    def _append(self, seen: SeenRequest) -> None:
        assert self._log is not None
        line = {"index": seen.index, "wire": seen.wire, "path": seen.path, "body": seen.body, "key": seen.key,
                "idempotency_key": seen.headers.get("idempotency-key")}  # fmt: skip
        with self._log.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _next_reply(self, seen: SeenRequest) -> Reply:
        script = self._script
        if callable(script):
            return script(seen)
        with self._lock:
            if script and isinstance(script[0], Rule):
                for rule in cast(Sequence[Rule], script):
                    if rule.matches(seen):
                        rule.used += 1
                        return rule.reply
                return Reply.error(400, f"no rule of the script matches request {seen.index}")
            answered = len(self._requests) - len(self._refused)
            if answered <= len(script):
                return cast(Sequence[Reply], script)[answered - 1]
        return Reply.error(400, f"the script has no reply for request {seen.index}")

    async def _list_models(self, request: web.Request) -> web.Response:
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix(
            "Bearer "
        )
        if self._api_key is not None and key != self._api_key:
            wire: Wire = "anthropic" if "x-api-key" in request.headers else "openai"
            return _refuse(wire, 401, "invalid API key")
        return web.json_response(
            {
                "object": "list",
                "data": [{"id": name, "object": "model"} for name in self._models or ("fake-model",)],
            }
        )

    async def _send(self, request: web.Request, seen: SeenRequest, reply: Reply) -> web.StreamResponse:
        assert self._closing is not None
        if reply.delay_s:
            await self._pause(reply.delay_s)
        if reply.fault == "hang":
            await self._closing.wait()
        if reply.fault == "reset":
            return _reset(request)
        if reply.status != 200:
            headers = {"retry-after": reply.retry_after} if reply.retry_after is not None else {}
            return _refuse(seen.wire, reply.status, reply.body_text, kind=reply.error_type, headers=headers)
        if reply.fault == "empty":
            return web.Response(body=b"", content_type="application/json")
        if reply.fault == "wrong_content_type":
            return web.Response(text="<html><body>Please log in</body></html>", content_type="text/html")
        return await (self._send_stream if seen.stream else self._send_json)(request, seen, reply)

    async def _send_json(self, request: web.Request, seen: SeenRequest, reply: Reply) -> web.StreamResponse:
        assert self._closing is not None
        make = anthropic_answer if seen.wire == "anthropic" else openai_answer
        body = json.dumps(make(seen, asdict(reply))).encode()
        if reply.fault == "broken_json":
            body = body[: len(body) // 2] + b'"]]'
        if reply.fault in ("truncated", "no_terminal", "hang_mid", "reset_mid"):
            response = web.StreamResponse(headers={"content-type": "application/json"})
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            return await self._stall(request, response, reply)
        if reply.fault == "oversized":
            return await self._flood(request, "application/json", b'{"padding": "', b"x" * 65536)
        return web.Response(body=body, content_type="application/json")

    async def _send_stream(self, request: web.Request, seen: SeenRequest, reply: Reply) -> web.StreamResponse:
        if reply.fault == "oversized":
            return await self._flood(
                request, "text/event-stream", b"", b": padding\n\n" + b":" * 65536 + b"\n"
            )
        make = anthropic_events if seen.wire == "anthropic" else openai_events
        events = make(seen, asdict(reply))
        if reply.fault == "broken_json":
            events.insert(len(events) // 2, b'data: {"type": "content_block_delta", "choices": [\n\n')
        if reply.fault in ("truncated", "hang_mid", "reset_mid"):
            whole = b"".join(events)
            events = [whole[: len(whole) // 2]]
        elif reply.fault == "no_terminal":
            events = events[:-1]
        if reply.chunk_bytes is not None:
            whole = b"".join(events)
            events = [whole[i : i + reply.chunk_bytes] for i in range(0, len(whole), reply.chunk_bytes)]
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        )
        await response.prepare(request)
        for position, event in enumerate(events):
            if position and reply.chunk_delay_s:
                await self._pause(reply.chunk_delay_s)
            await response.write(event)
        if reply.fault in ("truncated", "hang_mid", "reset_mid"):
            return await self._stall(request, response, reply)
        await response.write_eof()
        return response

    async def _stall(
        self, request: web.Request, response: web.StreamResponse, reply: Reply
    ) -> web.StreamResponse:
        """Leave an answer unfinished: by silence, or by closing the connection."""
        assert self._closing is not None
        if reply.fault == "hang_mid":
            await self._closing.wait()
        if reply.fault == "reset_mid":
            _reset(request)
        elif request.transport is not None:
            request.transport.close()
        return response

    async def _flood(
        self, request: web.Request, content_type: str, head: bytes, piece: bytes
    ) -> web.StreamResponse:
        assert self._closing is not None
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        await response.write(head)
        try:
            while not self._closing.is_set():
                await response.write(piece)
        except ConnectionError:
            return response  # the client had enough, which is what this fault is for
        return response

    async def _pause(self, duration_s: float) -> None:
        assert self._closing is not None
        try:
            async with asyncio.timeout(duration_s):
                await self._closing.wait()
        except TimeoutError:
            return


def _refuse(
    wire: Wire,
    status: int,
    message: str,
    *,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    make = anthropic_refusal if wire == "anthropic" else openai_refusal
    return web.json_response(make(status, message, kind), status=status, headers=dict(headers or {}))


def _reset(request: web.Request) -> web.Response:
    """Close with a TCP reset: lingering for zero seconds drops what was not sent."""
    transport = request.transport
    if transport is not None:
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()


async def _serve_until_told(fake: FakeProvider) -> None:
    started: Future[str] = Future()
    serving = asyncio.create_task(fake.serve(started))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    url = await asyncio.wrap_future(started)
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()
    try:
        await serving
    except asyncio.CancelledError:
        return  # the signal that was asked for


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a script file until SIGTERM; the first line printed is the URL."""
    parser = argparse.ArgumentParser(prog="python -m agentic_flow.testing.fake_provider")
    parser.add_argument("--script", type=Path, required=True, help="JSON file of rules")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--log", type=Path, help="append every request here as a JSON line")
    parser.add_argument("--api-key", help="refuse any other key")
    parser.add_argument("--models", nargs="+", help="serve only these")
    chosen = parser.parse_args(arguments)
    fake = FakeProvider(
        load_rules(chosen.script),
        port=chosen.port,
        log=chosen.log,
        api_key=chosen.api_key,
        models=chosen.models,
    )
    asyncio.run(_serve_until_told(fake))


if __name__ == "__main__":
    main()
