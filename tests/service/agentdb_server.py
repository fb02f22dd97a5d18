"""AgentDB served on a real port for tests, and the ways in which they talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from agentic_flow.agentdb.routes import PUBLIC_PATHS, build_document_route, build_routes
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import Unauthenticated
from agentic_flow.core.settings import Settings
from agentic_flow.core.vectors import Fingerprint
from agentic_flow.core.web import create_app
from agentic_flow.testing.serving import serving

TENANT, SPACE = "ann", "notes"
PLACE = f"/v1/namespaces/{SPACE}"
NDJSON = {"content-type": "application/x-ndjson"}
JSON = {"content-type": "application/json"}
MARK = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")


class TenantTokens:
    """Both ends of a trust: the token names the tenant."""

    async def token(self, principal: Principal) -> str | None:
        return f"tenant.{principal.tenant}"

    def forget(self, principal: Principal) -> None:
        raise AssertionError(f"the token of {principal.tenant!r} was refused")

    async def authenticate(self, credential: str) -> Principal:
        kind, _, tenant = credential.partition(".")
        if kind == "reader":
            return Principal(tenant, "reader", frozenset({"memory:read"}))
        if kind != "tenant":
            raise Unauthenticated("no token of ours")
        return Principal(tenant, "service", frozenset({"memory:*"}))


class Served:
    """A running AgentDB: its address, the store behind it, and calls made as a tenant."""

    def __init__(self, url: str, store: AgentDB, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.store = store
        self._session = session

    async def call(
        self, method: str, path: str, *, token: str = f"tenant.{TENANT}", **options: Any
    ) -> tuple[int, Any]:
        """Status and parsed answer."""
        headers = {"authorization": f"Bearer {token}", **options.pop("headers", {})}
        async with self._session.request(method, self.url + path, headers=headers, **options) as answer:
            content = await answer.read()
            if answer.content_type == "application/x-ndjson":
                return answer.status, [json.loads(line) for line in content.splitlines()]
            return answer.status, json.loads(content)

    async def ids(self) -> list[str]:
        """What the store holds."""
        return [item.id for item in (await self.store.list_items(TENANT, SPACE, limit=1000)).items]


@contextlib.asynccontextmanager
async def served(
    folder: Path, *, dimension: int | None = 3, stall_timeout_s: float = 30.0, **serve: Any
) -> AsyncGenerator[Served]:
    settings = Settings.model_validate({"auth": {"required": True}, "serve": serve})

    async def ready() -> dict[str, bool]:
        return {"agentdb": True}

    async with AgentDB(folder, settings.agentdb) as store:
        if dimension is not None:
            await store.create_namespace(TENANT, SPACE, dimension=dimension)
        app = create_app(
            "agentdb",
            [*build_routes(store, settings.agentdb), build_document_route()],
            authenticator=TenantTokens(),
            settings=settings,
            ready=ready,
            public_paths=PUBLIC_PATHS,
            stall_timeout_s=stall_timeout_s,
        )
        async with serving(app) as (url,), aiohttp.ClientSession() as session:
            yield Served(url, store, session)


def ndjson(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"r{i:05}", "vector": [1.0, float(i), 0.5]} for i in range(start, start + count)]


async def pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    """A chunked body."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


@contextlib.asynccontextmanager
async def sending(
    url: str, path: str, headers: dict[str, str], content_length: int | None = None
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which a request has begun; closed without an end when the block ends."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    length = "transfer-encoding: chunked" if content_length is None else f"content-length: {content_length}"
    lines: Sequence[str] = [
        f"POST {path} HTTP/1.1",
        f"host: {parts.netloc}",
        f"authorization: Bearer tenant.{TENANT}",
        *(f"{name}: {value}" for name, value in headers.items()),
        length,
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def write_chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


async def answered(reader: asyncio.StreamReader) -> tuple[bytes, Any]:
    """Head and parsed body of an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return head, json.loads(await reader.readexactly(length))


async def until_stored(db: Served, count: int) -> None:
    """Return when the store holds so many items."""
    while (await db.store.namespaces(TENANT))[0].items < count:
        await asyncio.sleep(0)
