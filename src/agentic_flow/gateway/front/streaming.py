"""The answer of a streamed model call: bytes of events as they come, and an honest end in every case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request

from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.sse import encode_comment
from agentic_flow.core.web_floor import OutgoingAnswer, unexpected
from agentic_flow.gateway.onward import Onward

HEARTBEAT_S = 15.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Result = TypeVar("Result")
Event = TypeVar("Event")


async def send_stream(
    answer: OutgoingAnswer,
    first: bytes,
    rest: AsyncGenerator[Event],
    *,
    encode: Callable[[Event], bytes],
    last_words: Callable[[AgenticFlowError], bytes],
    headers: list[tuple[bytes, bytes]],
    onward: Onward,
    heartbeat_s: float = HEARTBEAT_S,
) -> None:
    """Send whole events as they come.

    A source that fails, and a server that is stopped before the end, leave an error event as the last one. A
    client that leaves ends the source, and with it the call to the provider. While a server drains, streams
    may finish.

    Args:
        answer: Where they go; its body must have been received.
        first: Bytes that are there already; their call has begun well.
        rest: What follows; closed in every case.
        encode: An event as bytes; none where it is nothing to its readers.
        last_words: How an error looks as an event.
        headers: Headers of the answer.
        onward: Opened once `first` was sent, and closed before the end; what it is given is a piece for
            `encode`, or a list of such.
        heartbeat_s: A comment is sent after this much silence.
    """
    answer.begin(200, [*_STREAM_HEADERS, *headers])
    put, drained = answer.put, answer.drained
    watch = _Watch(answer)
    pulse = _Pulse(answer, heartbeat_s)

    now_s = asyncio.get_running_loop().time

    def send(pieces: bytes | list[Event]) -> bool:
        chunk = b"".join(map(encode, pieces)) if isinstance(pieces, list) else pieces
        if not chunk:
            return True
        pulse.gave_at_s = now_s()  # what `gave` does, without a call for each piece
        return put(chunk, more=True)

    async def end(data: bytes) -> None:
        onward.close()
        watch.close()
        pulse.close()
        if not put(data, more=False):
            await drained()

    try:
        if not put(first, more=True):
            await drained()
        onward.open(send, drained)
        async for event in rest:
            chunk = encode(event)
            if not chunk:
                continue
            pulse.gave()
            if not put(chunk, more=True):
                await drained()
        await end(b"")
    except AgenticFlowError as error:
        _log.warning("stream_broken", code=error.code, error=error.message)
        await end(last_words(error))
    except asyncio.CancelledError:
        if watch.left():
            return
        # The server stops and its patience is over.
        await end(last_words(Unavailable("the server is stopping", hint="try again")))
        raise
    except Exception:  # noqa: BLE001 - a bug of ours: logged, and told without internals
        _log.exception("stream_failed")
        await end(last_words(unexpected()))
    finally:
        onward.close()
        watch.close()
        pulse.close()
        await rest.aclose()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client left.
    """
    return await unless_left(request.state.answer, work)


async def unless_left(answer: OutgoingAnswer, work: Coroutine[Any, Any, Result]) -> Result:
    """The same, by the answer that the client waits for."""
    watch = _Watch(answer)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.left():
            raise ClientDisconnect from None
        raise
    finally:
        watch.close()


class _Watch:
    """Cancels the task that made it when the client leaves."""

    __slots__ = ("_answer", "_left", "_watched")

    def __init__(self, answer: OutgoingAnswer) -> None:
        self._answer = answer
        self._left = False
        self._watched = asyncio.current_task()
        answer.on_gone(self._gone)

    def left(self) -> bool:
        """Whether the client left, and that alone is why the task is cancelled: it may then go on."""
        return self._left and self._watched is not None and self._watched.uncancel() == 0

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        self._answer.on_gone(None)

    def _gone(self) -> None:
        self._left = True
        if self._watched is not None:
            self._watched.cancel()


class _Pulse:
    """Keeps a silent stream alive: sends a comment after so much silence."""

    __slots__ = ("_answer", "_every_s", "_loop", "_sending", "_timer", "gave_at_s")

    def __init__(self, answer: OutgoingAnswer, every_s: float) -> None:
        self._answer = answer
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._sending: asyncio.Task[None] | None = None
        self.gave_at_s = self._loop.time()
        self._timer = self._loop.call_later(every_s, self._look)

    def gave(self) -> None:
        """Something was sent."""
        self.gave_at_s = self._loop.time()

    def close(self) -> None:
        """Beat no longer. Idempotent."""
        self._timer.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        due_s = self.gave_at_s + self._every_s
        if now_s >= due_s:
            self.gave_at_s = now_s
            due_s = now_s + self._every_s
            if not self._answer.put(_HEARTBEAT, more=True):
                self._sending = self._loop.create_task(self._answer.drained())
        self._timer = self._loop.call_at(due_s, self._look)


_HEARTBEAT = encode_comment("heartbeat")
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
