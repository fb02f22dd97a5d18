"""The proxy with its configuration as stacks have it, in front of a service that answers at once."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from answering import LAST
from container import Project
from engine import NEIGHBOURS, Engine
from stacks import free_ports

from agentic_flow.deploy.caddy import caddyfile
from agentic_flow.deploy.certs import CertificateFolder
from agentic_flow.deploy.parts import Published, certificate_files

STREAMS = 3000
AT_ONCE = 30
PROMPT = b"a prompt. " * 800
THREADS = 8
"""Of the proxy: more than there are processors, so that some have to wait, as on a busy machine."""
START_TIMEOUT_S = 60.0


@pytest.fixture
def answering() -> Iterator[int]:
    """The port of a service that answers at once."""
    script = Path(__file__).with_name("answering.py")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def streamed(url: str, context: ssl.SSLContext) -> Counter[str]:
    """How many streams came to which end."""
    ends: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=AT_ONCE, ssl=context)
    # By default a request may take 300 s, of which here it waits in line for most.
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _is_there(session):
                await asyncio.sleep(0.1)

        async def one() -> None:
            try:
                async with session.post("/v1/messages", data=PROMPT) as got:
                    ends["whole" if (await got.read()).endswith(LAST) else "cut"] += 1
            except aiohttp.ClientError as error:
                ends[type(error).__name__] += 1

        await asyncio.gather(*(one() for _ in range(STREAMS)))
    return ends


async def _is_there(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/") as got:
            return got.status == 200
    except aiohttp.ClientError:
        return False


def test_no_stream_is_cut_though_it_begins_at_once(
    engine: Engine, project: Project, answering: int, tmp_path: Path
) -> None:
    """Catches a proxy that asks a request's body once more after its last byte was sent: one of a hundred
    answers has begun by then, and is cut (docs/decisions/0034)."""
    certificates = tmp_path / "certs"
    CertificateFolder(certificates, mounted=True).init(["proxy"])
    name, (port,) = project(), free_ports(1)
    file = tmp_path / "Caddyfile"
    file.write_text(caddyfile([Published("platform", port, answering, tls=False)], "# of a test"))
    authority, *own = (Path(path) for path in certificate_files("proxy"))
    mounted = {file: "/etc/caddy/Caddyfile", **{certificates / path.name: path for path in own}}
    engine.run(
        *("run", "--detach", f"--name={name}", "--add-host=platform:host-gateway"),
        *(f"--publish=127.0.0.1:{port}:{port}", f"--env=GOMAXPROCS={THREADS}"),
        *(f"--volume={here}:{there}:ro" for here, there in mounted.items()),
        NEIGHBOURS["caddy"],
    )
    context = ssl.create_default_context(cafile=certificates / authority.name)
    ends = asyncio.run(streamed(f"https://localhost:{port}", context))
    assert ends == {"whole": STREAMS}, f"{ends}\n{engine.run('logs', name).stderr[-2000:]}"
