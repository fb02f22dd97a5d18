"""The proxy with its configuration as stacks have it, in front of a service that answers at once."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from pathlib import Path

import aiohttp
from container import Project
from engine import NEIGHBOURS, Engine
from stack_place import free_port

from agentic_flow.deploy.caddy import caddyfile
from agentic_flow.deploy.certs import CertificateFolder
from agentic_flow.deploy.parts import Published, certificate_files

STREAMS = 6000
AT_ONCE = 100
BODY = b"a prompt. " * 800
FIRST, LAST = b"data: first\n\n", b"data: last\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BETWEEN_S = 0.03
START_TIMEOUT_S = 60.0


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begin each answer as soon as the last byte of its request is there, and end it a little later."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
            await reader.readexactly(sum(int(line.partition(b":")[2]) for line in lengths))
            writer.write(HEAD + _chunk(FIRST))
            await asyncio.sleep(BETWEEN_S)
            writer.write(_chunk(LAST) + _chunk(b""))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def streamed(url: str, context: ssl.SSLContext) -> Counter[str]:
    """How many streams came to which end."""
    ends: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=AT_ONCE, ssl=context)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _is_there(session):
                await asyncio.sleep(0.1)

        async def one() -> None:
            async with session.post("/v1/messages", data=BODY) as got:
                ends["whole" if (await got.read()).endswith(LAST) else "cut"] += 1

        await asyncio.gather(*(one() for _ in range(STREAMS)))
    return ends


async def _is_there(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/") as got:
            return got.status == 200
    except aiohttp.ClientError:
        return False


def test_no_stream_is_cut_though_it_begins_at_once(engine: Engine, project: Project, tmp_path: Path) -> None:
    """Catches a proxy that asks a request's body once more after its last byte was sent: of 1000 answers
    one or two have begun by then, and are cut (docs/decisions/0034)."""
    certificates = tmp_path / "certs"
    CertificateFolder(certificates, mounted=True).init(["proxy"])
    name, port = project(), free_port()
    authority, certificate, key = (Path(path) for path in certificate_files("proxy"))

    async def run() -> Counter[str]:
        server = await asyncio.start_server(answer, "0.0.0.0", 0)
        inner_port = server.sockets[0].getsockname()[1]
        file = tmp_path / "Caddyfile"
        file.write_text(caddyfile([Published("platform", port, inner_port, tls=False)], "# of a test"))
        mounts = [f"--volume={certificates / path.name}:{path}:ro" for path in (certificate, key)]
        await asyncio.to_thread(
            engine.run,
            *("run", "--detach", f"--name={name}", "--add-host=platform:host-gateway"),
            *(f"--publish=127.0.0.1:{port}:{port}", f"--volume={file}:/etc/caddy/Caddyfile:ro", *mounts),
            NEIGHBOURS["caddy"],
        )
        context = ssl.create_default_context(cafile=certificates / authority.name)
        async with server:
            ends = await streamed(f"https://localhost:{port}", context)
            await asyncio.to_thread(engine.run, "kill", name)
            while len(asyncio.all_tasks()) > 1:  # those that answer end with their connections
                await asyncio.sleep(0.01)
        return ends

    ends = asyncio.run(run())
    assert ends == {"whole": STREAMS}, f"{ends}\n{engine.run('logs', name).stderr[-2000:]}"
