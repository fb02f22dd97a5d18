"""An embeddings endpoint for tests: a real HTTP server that speaks OpenAI Embeddings, with scripted faults.

    with FakeEmbeddings([Reply.error(429, retry_after="0"), Reply()], dimension=8) as fake:
        ...                      # EmbeddingSettings(base_url=fake.base_url, …)
        assert fake.requests[0].texts == ("red fox",)

It runs in a thread with an event loop of its own, so sync and async tests can use it. Replies are taken in
order of arrival; past the end of the script every request is answered well. A vector depends on its text
alone (`vector_of`) and is not of unit length, so that who forgets to normalize is seen.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

Fault = Literal[
    "broken_json",  # the body is not JSON
    "truncated",  # the connection closes in the middle of the body
    "hang",  # nothing is sent, ever
    "hang_mid",  # the answer begins and then stalls
    "reset",  # the connection is reset before any answer
    "oversized",  # megabytes without end
    "empty",  # status 200 and no body
    "wrong_count",  # one embedding too few
    "wrong_dimension",  # one number more in each
    "ragged",  # one number more in the last one
    "nan",  # a number that is none
    "zeros",  # vectors without direction
    "shuffled",  # right, but in another order than the texts
    "index_twice",  # two embeddings for the first text
    "no_index",  # nothing says which text an embedding is of
    "not_base64",  # text that decodes to nothing
]
Taking = Literal["honours", "ignores", "refuses"]
"""What a server does with an optional field."""

START_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer.

    Args:
        status: HTTP status; anything but 200 is an error answer with `message` and `code`.
        message: Of the error.
        code: The vendor's code of the error.
        retry_after: Value of the Retry-After header.
        fault: What goes wrong.
        redirect_to: Answer 307 to this address.
    """

    status: int = 200
    message: str = "scripted error"
    code: str | None = None
    retry_after: str | None = None
    fault: Fault | None = None
    redirect_to: str | None = None

    @classmethod
    def error(cls, status: int, message: str = "scripted error", **more: Any) -> Reply:
        return cls(status=status, message=message, **more)

    @classmethod
    def broken(cls, fault: Fault) -> Reply:
        return cls(fault=fault)


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """One request as it arrived."""

    body: dict[str, Any]
    key: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.body["input"])


class FakeEmbeddings:
    """The server. A context manager, or `start` and `close`.

    Args:
        script: Replies in order of arrival.
        dimension: Of the model.
        api_key: When given, any other key is refused with 401. Without it none is needed.
        model: The one it serves; any other is refused with 404. None serves every name.
        base64, dimensions: What it does with the fields `encoding_format` and `dimensions`.
        text_chars_max: Longer texts are refused in OpenAI's words.
    """

    def __init__(
        self,
        script: Sequence[Reply] = (),
        *,
        dimension: int = 16,
        api_key: str | None = None,
        model: str | None = None,
        base64: Taking = "honours",
        dimensions: Taking = "honours",
        text_chars_max: int = 1_000_000,
    ) -> None:
        self._script = tuple(script)
        self._dimension = dimension
        self.api_key = api_key
        self._model = model
        self._base64: Taking = base64
        self._dimensions: Taking = dimensions
        self._text_chars_max = text_chars_max
        self._requests: list[SeenRequest] = []
        self._in_flight = 0
        self._most_in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    @property
    def base_url(self) -> str:
        """What goes into `agentdb.embedding.base_url`."""
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[SeenRequest]:
        """The requests so far, in order of arrival, refused ones included."""
        return list(self._requests)

    @property
    def most_in_flight(self) -> int:
        """The largest number of requests that were under way at one time."""
        return self._most_in_flight

    def start(self) -> Self:
        """Begin to serve; `url` is set when this returns."""
        started: Future[str] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="fake-embeddings", daemon=True
        )
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

    async def _serve(self, started: Future[str]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/embeddings", self._answer)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
            await self._closing.wait()
        except OSError as error:
            started.set_exception(error)
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        try:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            body: Any = json.loads(await request.read())
            seen = SeenRequest(cast(dict[str, Any], body), token if scheme == "Bearer" and token else None)
            self._requests.append(seen)
            number = len(self._requests)
            reply = self._script[number - 1] if number <= len(self._script) else Reply()
            return await self._send(request, seen, reply)
        finally:
            self._in_flight -= 1

    async def _send(self, request: web.Request, seen: SeenRequest, reply: Reply) -> web.StreamResponse:
        assert self._closing is not None
        if reply.fault == "hang":
            await self._closing.wait()
        if reply.fault == "reset":
            return _reset(request)
        if reply.redirect_to is not None:
            return web.Response(status=307, headers={"location": reply.redirect_to})
        refused = reply if reply.status != 200 else self._refusal(seen)
        if refused is not None:
            headers = {} if refused.retry_after is None else {"retry-after": refused.retry_after}
            error = {"message": refused.message, "type": "scripted", "param": None, "code": refused.code}
            return web.json_response({"error": error}, status=refused.status, headers=headers)
        if reply.fault == "empty":
            return web.Response(body=b"", content_type="application/json")
        body = json.dumps(self._document(seen, reply.fault)).encode()
        if reply.fault == "broken_json":
            body = body[: len(body) // 2] + b'"]]'
        if reply.fault in ("truncated", "hang_mid"):
            return await self._stop_halfway(request, body, wait=reply.fault == "hang_mid")
        if reply.fault == "oversized":
            return await self._flood(request)
        return web.Response(body=body, content_type="application/json")

    def _refusal(self, seen: SeenRequest) -> Reply | None:
        """What the vendor refuses."""
        texts = seen.body.get("input")
        if self.api_key is not None and seen.key != self.api_key:
            return Reply.error(401, f"Incorrect API key provided: {seen.key}", code="invalid_api_key")
        if self._model is not None and seen.body.get("model") != self._model:
            return Reply.error(404, f"The model {seen.body.get('model')!r} does not exist", code="not_found")
        if not isinstance(texts, list) or not texts or not all(cast(list[Any], texts)):
            return Reply.error(400, "'$.input' is invalid: it holds an empty string, or nothing")
        if seen.body.get("encoding_format") == "base64" and self._base64 == "refuses":
            return Reply.error(400, "Unsupported value for 'encoding_format': use float")
        if "dimensions" in seen.body and self._dimensions == "refuses":
            return Reply.error(400, "This model does not support specifying dimensions.")
        for place, text in enumerate(seen.texts):
            if len(text) > self._text_chars_max:
                return Reply.error(
                    400,
                    f"Invalid 'input[{place}]': maximum context length is {self._text_chars_max} tokens.",
                )
        return None

    def _document(self, seen: SeenRequest, fault: Fault | None) -> dict[str, Any]:
        dimension = self._dimension
        if self._dimensions == "honours":
            dimension = int(seen.body.get("dimensions", dimension))
        dimension += fault == "wrong_dimension"
        encoded = seen.body.get("encoding_format") == "base64" and self._base64 == "honours"
        data: list[dict[str, Any]] = []
        for index, text in enumerate(seen.texts):
            last = index == len(seen.texts) - 1
            vector = vector_of(text, dimension + (fault == "ragged" and last))
            if fault == "nan":
                vector[0] = np.nan
            if fault == "zeros":
                vector[:] = 0
            embedding: Any = [float(value) for value in vector]
            if encoded:
                embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if fault == "not_base64":
                embedding = "?" * 12
            data.append({"object": "embedding", "index": index, "embedding": embedding})
        if fault == "wrong_count":
            data.pop()
        if fault == "shuffled":
            data.reverse()
        if fault == "index_twice":
            data[-1]["index"] = 0
        if fault == "no_index":
            del data[-1]["index"]
        return {"object": "list", "model": seen.body.get("model"), "data": data, "usage": {"total_tokens": 1}}

    async def _stop_halfway(self, request: web.Request, body: bytes, *, wait: bool) -> web.StreamResponse:
        assert self._closing is not None
        response = web.StreamResponse(headers={"content-type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        if wait:
            await self._closing.wait()
        if request.transport is not None:
            request.transport.close()
        return response

    async def _flood(self, request: web.Request) -> web.StreamResponse:
        assert self._closing is not None
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        try:
            while not self._closing.is_set():
                await response.write(b" " * 65536)
        except ConnectionError:
            return response  # the client had enough, which is what this fault is for
        return response


def vector_of(text: str, dimension: int) -> NDArray[np.float32]:
    """The vector that the fake gives a text, before anybody normalizes it: shape (dimension,)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return (3 * np.random.default_rng(seed).normal(size=dimension)).astype(np.float32)


def _reset(request: web.Request) -> web.Response:
    """Close with a TCP reset: lingering for zero seconds drops what was not sent."""
    transport = request.transport
    if transport is not None:
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()
