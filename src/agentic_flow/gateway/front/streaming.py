"""The answer of a streamed model call: bytes of events as they come, and an honest end in every case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.sse import encode_comment
from agentic_flow.core.web_floor import unexpected

HEARTBEAT_S = 15.0

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
        gone = asyncio.create_task(_disconnected(receive))
        upcoming: asyncio.Task[bytes | None] | None = None

        async def give(chunk: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            await give(self._first)
            while True:
                upcoming = upcoming or asyncio.create_task(_next(self._rest))
                done, _ = await asyncio.wait(
                    (upcoming, gone), timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    return
                if not done:
                    await give(encode_comment("heartbeat"))
                    continue
                chunk = upcoming.result()
                upcoming = None
                if chunk is None:
                    break
                await give(chunk)
            await give(b"", more=False)
        except AgenticFlowError as error:
            _log.warning("stream_broken", code=error.code, error=error.message)
            await give(self._last_words(error), more=False)
        except asyncio.CancelledError:
            # The server stops and its patience is over.
            await give(self._last_words(Unavailable("the server is stopping", hint="try again")), more=False)
            raise
        except Exception:  # noqa: BLE001 - a bug of ours: logged, and told without internals
            _log.exception("stream_failed")
            await give(self._last_words(unexpected()), more=False)
        finally:
            await _cancel(*([gone] if upcoming is None else [gone, upcoming]))
            await self._rest.aclose()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _cancel(task, gone)


async def _next(source: AsyncGenerator[bytes]) -> bytes | None:
    return await anext(source, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait. What they raise was either seen already or has no reader any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
