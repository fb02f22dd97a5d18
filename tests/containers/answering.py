"""A service that begins to stream its answer as soon as a request's last byte is there.

    python tests/containers/answering.py      prints its port, and serves until it is ended

It is a process of its own: a busy one would answer later.
"""

from __future__ import annotations

import asyncio

from agentic_flow.core.serve import run

FIRST, LAST = b"data: first\n\n", b"data: last\n\n"
BETWEEN_S = 0.03
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_HEAD_END = b"\r\n\r\n"


class Answering(asyncio.Protocol):
    """One connection. Requests come with a `Content-Length`, or without a body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `asyncio.Protocol`."""
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._received += data
        head, end, body = self._received.partition(_HEAD_END)
        lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        if not end or len(body) < sum(int(line.partition(b":")[2]) for line in lengths):
            return
        self._received = b""  # the next one is sent once this one is answered
        self._transport.write(_HEAD + _chunk(FIRST))
        asyncio.get_running_loop().call_later(BETWEEN_S, self._end)

    def _end(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_chunk(LAST) + _chunk(b""))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve() -> None:
    """Serve on a free port of every address: clients are in containers."""
    server = await asyncio.get_running_loop().create_server(Answering, "0.0.0.0", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    run(serve())
