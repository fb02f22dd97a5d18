"""The least that a gateway in Python costs: a relay that only hands bytes on, with nothing read or kept.

It stands on the same loop (uvloop) and parser (httptools) as ours, takes a whole request, sends it on over a
kept connection, and writes on whatever comes back in the callback that it came in. No key is checked, no
price known, no error explained: what ours costs beyond it is what ours does.

Usage: python benchmarks/gateway_floor.py UPSTREAM_HOST UPSTREAM_PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import httptools
import uvloop

_HEAD = b"POST %s HTTP/1.1\r\nhost: provider\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class _Provider(asyncio.Protocol):
    """A connection to the provider."""

    def __init__(self, idle: list[_Provider]) -> None:
        self._idle = idle
        self._client: asyncio.Transport | None = None
        self.transport: asyncio.Transport | None = None
        self._parser: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, url: bytes, body: bytes, client: asyncio.Transport) -> None:
        """Send a request whose answer goes to this client, as it comes."""
        assert self.transport is not None
        self._client = client
        self._parser = cast(Any, httptools).HttpResponseParser(self)
        self.transport.write(_HEAD % (url, len(body)) + body)

    def data_received(self, data: bytes) -> None:
        client = self._client
        if client is not None and not client.is_closing():
            client.write(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._client = None
        self._idle.append(self)


class _Client(asyncio.Protocol):
    """A connection of a client."""

    def __init__(self, host: str, port: int, idle: list[_Provider]) -> None:
        self._host, self._port, self._idle = host, port, idle
        self._loop = asyncio.get_running_loop()
        self._parser: Any = cast(Any, httptools).HttpRequestParser(self)
        self._body: list[bytes] = []
        self._url = b""
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        if self._idle:
            self._idle.pop().ask(self._url, body, self._transport)
        else:
            self._connecting = self._loop.create_task(self._connect(self._url, body))

    async def _connect(self, url: bytes, body: bytes) -> None:
        _, provider = await self._loop.create_connection(
            lambda: _Provider(self._idle), self._host, self._port
        )
        provider.ask(url, body, self._transport)


async def _serve(host: str, port: int) -> None:
    idle: list[_Provider] = []
    server = await asyncio.get_running_loop().create_server(lambda: _Client(host, port, idle), "127.0.0.1", 0)
    print(f"listens on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Relay until it is ended."""
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    main()
