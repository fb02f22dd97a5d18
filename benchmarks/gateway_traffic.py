"""The two ends of the gateway benchmark: a provider that answers at once, and clients that ask all the time.

Each is a process of its own, started by `gateway_systems.py`, on raw asyncio protocols with httptools, so
that neither is what limits a gateway between them.

Usage: python benchmarks/gateway_traffic.py upstream
       python benchmarks/gateway_traffic.py load URL CASE --clients N (--seconds S | --requests N)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

FAST_MODEL, SLOW_MODEL = "gpt-4o-mini", "gpt-4o"
DELAY_S = 0.05
"""What the slow model takes for an answer."""
CHUNKS = 20
GAP_S = 0.005
"""Between the chunks of a stream: a model that writes 200 tokens a second."""
WORDS = "The quick brown fox jumps over the lazy dog while the band plays on. " * 8


class Case(NamedTuple):
    """A kind of request.

    Args:
        path: Where it goes.
        model: Which model it names.
        stream: Whether the answer is streamed.
    """

    path: str
    model: str
    stream: bool


CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
CASES = {
    "whole same": Case(CHAT, FAST_MODEL, False),
    "whole translated": Case(MESSAGES, FAST_MODEL, False),
    "stream same": Case(CHAT, FAST_MODEL, True),
    "stream translated": Case(MESSAGES, FAST_MODEL, True),
    "latency": Case(CHAT, SLOW_MODEL, False),
}


def request_body(case: Case, model: str) -> bytes:
    """The body of a request: about a kilobyte, as a chat's first turn has."""
    body: dict[str, Any] = {"model": model, "max_tokens": 256, "messages": []}
    if case.path == MESSAGES:
        body["system"] = "You answer briefly."
    else:
        body["messages"].append({"role": "system", "content": "You answer briefly."})
    body["messages"].append({"role": "user", "content": f"Continue: {WORDS}"})
    if case.stream:
        body["stream"] = True
    return json.dumps(body).encode()


# The provider


def _answer(model: str) -> bytes:
    return json.dumps(
        {
            "id": "chatcmpl-benchmark",
            "object": "chat.completion",
            "created": 1_780_000_000,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": WORDS[:280], "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 150, "completion_tokens": 60, "total_tokens": 210},
        }
    ).encode()


def _chunks(model: str) -> list[bytes]:
    """CHUNKS events with text, the last of them with the end, the usage and the marker behind it."""

    def event(choices: list[Any], **more: Any) -> bytes:
        about = {
            "id": "chatcmpl-benchmark",
            "object": "chat.completion.chunk",
            "created": 1_780_000_000,
            "model": model,
        }
        return b"data: " + json.dumps({**about, "choices": choices, **more}).encode() + b"\n\n"

    def delta(content: dict[str, Any], finish: str | None = None) -> list[Any]:
        return [{"index": 0, "delta": content, "logprobs": None, "finish_reason": finish}]

    first = event(delta({"role": "assistant", "content": ""}))
    texts = [event(delta({"content": WORDS[i * 12 : i * 12 + 12]})) for i in range(CHUNKS)]
    usage = {"prompt_tokens": 150, "completion_tokens": 60, "total_tokens": 210}
    last = event(delta({}, "stop")) + event([], usage=usage) + b"data: [DONE]\n\n"
    return [first + texts[0], *texts[1:-1], texts[-1] + last]


_MODELS = (FAST_MODEL, SLOW_MODEL)
_WHOLE = {
    model: b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    % (len(body), body)
    for model in _MODELS
    for body in [_answer(model)]
}
_STREAM = {model: [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in _chunks(model)] for model in _MODELS}
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"


class _Upstream(asyncio.Protocol):
    """One connection of the provider."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._url = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        if b"chat/completions" not in self._url:
            self._transport.write(_EMPTY)  # traces and metrics that are sent here, and whatever else is tried
            return
        asked = json.loads(body)
        model = asked["model"]
        if asked.get("stream"):
            self._transport.write(_STREAM_HEAD)
            self._give(_STREAM[model], 0)
        elif model == SLOW_MODEL:
            self._loop.call_later(DELAY_S, self._write, _WHOLE[model])
        else:
            self._transport.write(_WHOLE[model])

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _give(self, chunks: list[bytes], number: int) -> None:
        if number == len(chunks) - 1:
            self._write(chunks[number] + b"0\r\n\r\n")
        else:
            self._write(chunks[number])
            self._loop.call_later(GAP_S, self._give, chunks, number + 1)


async def _serve_upstream() -> None:
    from agentic_flow.core.serve import bind

    listener = bind("upstream", "127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(_Upstream, sock=listener)
    print(listener.getsockname()[1], flush=True)
    await server.serve_forever()


# The clients


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, request: bytes, ends: bytes, more: Callable[[float], bool]) -> None:
        self._request = request
        self._ends = ends
        self._more = more
        self._status = 0
        self._tail = b""
        self._started_s = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._tail = b""
        self._started_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._tail = (self._tail + body)[-4096:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200 or self._ends not in self._tail:
            self._fail(RuntimeError(f"{status} {self._tail.decode('utf-8', 'replace')}"))
        elif self._more(time.perf_counter() - self._started_s):
            self._ask()
        else:
            self._transport.close()

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None) if exc is None else self.done.set_exception(exc)


async def load(
    url: str,
    case: Case,
    *,
    model: str,
    headers: dict[str, str],
    clients: int,
    seconds: float | None,
    requests: int | None,
) -> dict[str, float]:
    """Ask for so long, or so often; how many answers came, and how long they took."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    body = request_body(case, model)
    lines = {
        "host": parts.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers,
    }
    head = f"POST {case.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    ends = (b"message_stop" if case.path == MESSAGES else b"[DONE]") if case.stream else b"}"
    took_s: list[float] = []
    left = requests
    until_s = None if seconds is None else time.perf_counter() + seconds

    def more(answer_s: float) -> bool:
        nonlocal left
        took_s.append(answer_s)
        if left is not None:
            left -= 1
            return left >= clients
        return until_s is not None and time.perf_counter() < until_s

    loop = asyncio.get_running_loop()
    started_s = time.perf_counter()
    found = [
        await loop.create_connection(
            lambda: _Client(f"{head}\r\n".encode() + body, ends, more), parts.hostname, parts.port
        )
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.done for _, client in found))
    elapsed_s = time.perf_counter() - started_s
    took_s.sort()
    count = len(took_s)
    return {
        "requests": count,
        "per_s": count / elapsed_s,
        "p50_ms": 1000 * took_s[count // 2],
        "p99_ms": 1000 * took_s[min(count - 1, count * 99 // 100)],
    }


def main() -> None:
    """Run one end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    ends = parser.add_subparsers(dest="end", required=True)
    ends.add_parser("upstream")
    asking = ends.add_parser("load")
    asking.add_argument("url")
    asking.add_argument("case", choices=list(CASES))
    asking.add_argument("--model")
    asking.add_argument("--header", action="append", default=[], help="NAME: VALUE")
    asking.add_argument("--clients", type=int, default=16)
    asking.add_argument("--seconds", type=float)
    asking.add_argument("--requests", type=int)
    options = parser.parse_args()
    if options.end == "upstream":
        asyncio.run(_serve_upstream())
        return
    case = CASES[options.case]
    figures = asyncio.run(
        load(
            options.url,
            case,
            model=options.model or case.model,
            headers=dict(line.split(": ", 1) for line in options.header),
            clients=options.clients,
            seconds=options.seconds,
            requests=options.requests,
        )
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
