"""The answer of a streamed model call: bytes of events as they come, and an honest end in every case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.sse import encode_comment
from agentic_flow.core.web_floor import unexpected

HEARTBEAT_S = 15.0
WATCHED_AFTER_S = 0.1
"""A call that is answered sooner is not watched: to notice that its caller left would save nothing."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Result = TypeVar("Result")


class ModelStream(Response):
    """Sends whole events as they come.

    A source that fails, and a server that is stopped before the end, leave an error event as the last one. A
    client that leaves ends the source, and with it the call to the provider. While a server drains, streams
    may finish.

    Args:
        first: Bytes that are there already; their call has begun well.
        rest: What follows; closed in every case.
        last_words: How an error looks as an event.
        headers: Headers of the answer.
        heartbeat_s: A comment is sent after this much silence.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        *,
        last_words: Callable[[AgenticFlowError], bytes],
        headers: Mapping[str, str],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]  # it is not known beforehand
        self._first = first
        self._rest = rest
        self._last_words = last_words
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def give(chunk: bytes, *, more: bool = True) -> None:
            watch.gave()
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        async def beat() -> None:
            await send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})

        watch = _Watch(receive, heartbeat_s=self._heartbeat_s, beat=beat)
        try:
            await give(self._first)
            async for chunk in self._rest:
                await give(chunk)
            watch.close()
            await give(b"", more=False)
        except AgenticFlowError as error:
            watch.close()
            _log.warning("stream_broken", code=error.code, error=error.message)
            await give(self._last_words(error), more=False)
        except asyncio.CancelledError:
            if watch.left():
                return
            # The server stops and its patience is over.
            watch.close()
            await give(self._last_words(Unavailable("the server is stopping", hint="try again")), more=False)
            raise
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and told without internals
            watch.close()
            _log.exception("stream_failed")
            await give(self._last_words(unexpected()), more=False)
        finally:
            watch.close()
            await self._rest.aclose()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client left.
    """
    watch = _Watch(request.receive)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.left():
            raise ClientDisconnect from None
        raise
    finally:
        watch.close()


class _Watch:
    """Cancels the task that made it when the client leaves; between times it keeps a silent stream alive.

    The work itself stays in its own task and is awaited directly: a task for each step of it, to be able to
    wait for the client as well, cost more than everything else that a chunk of a stream needs.

    Args:
        receive: Of the request, whose body was read.
        heartbeat_s: `beat` is called after this much silence; None: never.
        beat: Sends something.
    """

    def __init__(
        self,
        receive: Receive,
        *,
        heartbeat_s: float | None = None,
        beat: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._receive = receive
        self._heartbeat_s = heartbeat_s
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._gave_at_s = self._loop.time()
        self._left = False
        self._watched = asyncio.current_task()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(WATCHED_AFTER_S, self._begin)

    def gave(self) -> None:
        """Something was sent."""
        self._gave_at_s = self._loop.time()

    def left(self) -> bool:
        """Whether the client left, and that alone is why the task is cancelled: it may then go on."""
        return self._left and self._watched is not None and self._watched.uncancel() == 0

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._attend())

    async def _attend(self) -> None:
        while not await self._gone():
            assert self._beat is not None
            self._gave_at_s = self._loop.time()
            await self._beat()
        self._left = True
        if self._watched is not None:
            self._watched.cancel()

    async def _gone(self) -> bool:
        """Wait for the client to leave; False: it is time for a heartbeat."""
        while True:
            due_s = None if self._heartbeat_s is None else self._gave_at_s + self._heartbeat_s
            try:
                async with asyncio.timeout_at(due_s):
                    while (await self._receive())["type"] != "http.disconnect":
                        pass
                return True
            except TimeoutError:
                if self._heartbeat_s is not None and self._loop.time() >= self._gave_at_s + self._heartbeat_s:
                    return False


_HEARTBEAT = encode_comment("heartbeat")
