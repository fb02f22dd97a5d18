"""A server that is told to stop, and lingers: its clients lose nothing, and learn that it will be gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from cli_process import Place
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from test_cli_serve import get
from tls_files import make_certificate

from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.settings import Settings, TlsSettings
from agentic_flow.core.web import create_app
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

LINGER_S = 2.0
LONG_S = 3.0
"""Where several requests must come through meanwhile, on a machine that stands still now and then, too."""
CLIENTS = 24
SILENT = 400
_PROGRAM = """
import asyncio, sys
from pathlib import Path
from starlette.routing import Route
from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.serve import run, serve
from agentic_flow.core.settings import Settings, TlsSettings
from agentic_flow.core.telemetry import configure
from agentic_flow.core.web import create_app, json_response

async def ready(): return {}
async def write(request):
    body = await request.body()
    await asyncio.sleep(0.01)
    return json_response({"bytes": len(body)})

async def block(request):
    print("blocked", flush=True)
    sys.stdin.readline()  # the event loop stands still meanwhile
    return json_response({})

settings = Settings.model_validate({"serve": {"requests_per_minute": 1_000_000}})
configure(settings.telemetry, "platform")
app = create_app(
    "platform",
    [Route("/write", write, methods=["POST"]), Route("/block", block)],
    authenticator=NoCredentials(),
    settings=settings,
    ready=ready,
)
folder = Path(sys.argv[1])
tls = TlsSettings(certificate_file=folder / "server.pem", key_file=folder / "server.key")
def show(addresses): print(addresses[0][1], flush=True)
run(serve([(app, "127.0.0.1", 0)], tls=tls, on_ready=show, linger_s=float(sys.argv[2]), drain_timeout_s=30))
print("clean", flush=True)
"""


@contextlib.asynccontextmanager
async def _process(folder: Path, linger_s: float) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A server with TLS in a process of its own."""
    make_certificate("server", folder)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROGRAM, str(folder), str(linger_s)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, f"https://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _write_until_refused(
    url: str, folder: Path, seen: Counter[str], *, keeps_connections: bool, pause_s: float
) -> None:
    """Writes, one after the other, none of which may be repeated by whoever cannot know what became of it."""
    context = ssl.create_default_context(cafile=str(folder / "server.pem"))
    connector = aiohttp.TCPConnector(
        ssl=context,
        force_close=not keeps_connections,
        **({"keepalive_timeout": LINGER_S / 2} if keeps_connections else {}),
    )
    async with aiohttp.ClientSession(connector=connector) as session:
        while True:
            try:
                async with session.post(f"{url}/write", data=b"x" * 1000) as answer:
                    said = (await answer.json())["bytes"]
                    seen["answered" if (answer.status, said) == (200, 1000) else f"{answer.status}"] += 1
            except aiohttp.ClientConnectorError as error:
                if isinstance(error.os_error, ConnectionRefusedError):
                    return
                seen[f"in connecting: {error!r}"] += 1
            except aiohttp.ClientError as error:
                seen[f"in asking: {error!r}"] += 1
            await asyncio.sleep(pause_s)


async def test_no_write_is_lost_when_a_server_goes(tmp_path: Path) -> None:
    """Catches connections that are closed while a request is on its way, and such as were made and never
    taken: of all writes, each is answered, or its connection refused, so that it can go elsewhere."""
    seen = Counter[str]()
    async with _process(tmp_path, LINGER_S) as (process, url):
        assert process.stdout is not None
        async with asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                # Some are seldom idle, and some about as long as they keep their connections.
                pause_s = LINGER_S * (0.45 if number % 8 == 0 else 0.005)
                clients.create_task(
                    _write_until_refused(
                        url, tmp_path, seen, keeps_connections=number % 2 == 0, pause_s=pause_s
                    )
                )
            while seen["answered"] < CLIENTS * 4:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        assert await process.stdout.readline() == b"clean\n"
        assert await process.wait() == 0
    assert set(seen) == {"answered"}, seen


async def test_connections_that_wait_to_be_taken_are_not_reset(tmp_path: Path) -> None:
    """Catches a port that is closed over connections that the kernel has accepted and the server has not."""
    async with _process(tmp_path, LONG_S) as (process, url):
        assert process.stdout is not None
        assert process.stdin is not None
        context = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            process.send_signal(signal.SIGTERM)
            while (await session.get(f"{url}/health/accepting")).status == 200:
                pass
            blocking = asyncio.create_task(session.get(f"{url}/block"))
            assert await process.stdout.readline() == b"blocked\n"
            await asyncio.sleep(LONG_S)  # so that it is over when the event loop goes on
            # The kernel gives them in their order: those who ask are the last of very many.
            silent = [socket.create_connection(address) for _ in range(SILENT)]
            waiting = [socket.create_connection(address) for _ in range(CLIENTS)]
            process.stdin.write(b"\n")
            assert (await blocking).status == 200

        async def ask(connection: socket.socket) -> list[str]:
            reader, writer = await asyncio.open_connection(
                sock=connection, ssl=context, server_hostname="127.0.0.1"
            )
            with contextlib.closing(writer):
                writer.write(b"POST /write HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
                return await _head(reader)

        answers = await asyncio.gather(*map(ask, waiting))
        assert answers == [["200 ok", "connection: close"]] * CLIENTS
        for connection in silent:
            connection.close()
        assert await process.stdout.readline() == b"clean\n"


async def _head(reader: asyncio.StreamReader) -> list[str]:
    """First line and `connection` of an answer whose body is read too."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    (length,) = [line.partition(": ")[2] for line in head if line.startswith("content-length: ")]
    await reader.readexactly(int(length))
    return [head[0].partition(" ")[2], *(line for line in head if line.startswith("connection: "))]


def _app() -> Starlette:
    async def ready() -> dict[str, bool]:
        return {}

    return create_app("platform", [], authenticator=NoCredentials(), settings=Settings(), ready=ready)


async def test_it_says_that_it_goes_and_closes_what_it_said_so_on() -> None:
    """Catches a proxy that goes on sending requests to a server that is to stop, and a probe of life that
    has it killed meanwhile."""
    stop = asyncio.Event()
    async with (
        contextlib.AsyncExitStack() as open_still,
        serving(_app(), stop=stop, linger_s=LONG_S) as (url,),
    ):
        port = int(url.rpartition(":")[2])

        async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            open_still.callback(writer.close)
            return reader, writer

        async def ask(path: str) -> tuple[list[str], asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await connected()
            writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            return await _head(reader), reader, writer

        said, kept, asks = await ask("/health/accepting")
        assert said == ["200 ok"]
        silent, _ = await connected()
        stop.set()
        while (await ask("/health/accepting"))[0][0] == "200 ok":
            pass
        asks.write(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert await _head(kept) == ["200 ok", "connection: close"]
        assert await kept.read() == b""
        for path in ("/health/ready", "/health/accepting"):
            said, reader, _ = await ask(path)
            assert said == ["503 service unavailable", "connection: close"]
            assert await reader.read() == b""
        assert await silent.read() == b""  # whoever asks for nothing is not waited for


async def test_it_is_sent_nothing_before_its_neighbours_let_it_in() -> None:
    """Catches a proxy that sends requests to a service whose neighbours do not know it yet, and one that
    sends none any more because a neighbour of a service that does much by itself has failed since."""
    neighbours = False

    async def works() -> dict[str, bool]:
        return {"neighbours": neighbours}

    app = create_app("platform", [], authenticator=NoCredentials(), settings=Settings(), ready=works)
    async with serving(app) as (url,), aiohttp.ClientSession() as session:

        async def status(path: str) -> int:
            async with session.get(f"{url}/health/{path}") as answer:
                return answer.status

        assert [await status(path) for path in ("live", "ready", "accepting")] == [200, 503, 503]
        neighbours = True
        assert await status("accepting") == 200
        neighbours = False
        assert [await status(path) for path in ("ready", "accepting")] == [503, 200]


def test_it_does_not_listen_before_it_can_let_anybody_in(tmp_path: Path) -> None:
    """Catches a service that is reached as soon as it runs, beside the one that it takes the place of, and
    turns callers away because it does not have the platform's keys yet."""
    (tmp_path / "other").mkdir()
    place = Place(tmp_path)
    with place.start("serve", "platform") as first:
        url = first.addresses(1)["platform"]
        first.signal(signal.SIGTERM)
        assert first.end().code == 0
    lonely = {"AGENTIC_FLOW_PEERS__PLATFORM_URL": url}
    with (
        socket.socket() as held,
        place.start("serve", "agentdb", **lonely, AGENTIC_FLOW_SERVE__LINGER_S="0.1") as waits,
    ):
        # Nobody else is given the port meanwhile, and whoever asks for it by its number may listen there.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        with Place(tmp_path / "other").start("serve", "agentdb", **lonely) as witness:
            witness.addresses(1)  # began later, and listens whatever it lacks
        assert not [line for line in waits.unread() if " listens on " in line]
        with place.start("serve", "platform", AGENTIC_FLOW_SERVE__PLATFORM_PORT=url.rpartition(":")[2]):
            address = waits.addresses(1)["agentdb"]
            assert get(f"{address}/health/ready")[0] == 200


class _Slow:
    """A service that says when it is asked and when it is closed, and a client whose handshake takes long.

    Args:
        folder: For the certificate.
    """

    def __init__(self, folder: Path) -> None:
        make_certificate("server", folder)
        self.tls = TlsSettings(certificate_file=folder / "server.pem", key_file=folder / "server.key")
        self._context = ssl.create_default_context(cafile=str(folder / "server.pem"))
        self.asked: list[str] = []
        self.is_closed = asyncio.Event()
        self.may_end = asyncio.Event()

    def app(self) -> Starlette:
        async def stream(request: Request) -> Response:
            self.asked.append("after the end" if self.is_closed.is_set() else "in time")

            async def pieces() -> AsyncGenerator[bytes]:
                yield b"first "
                await asyncio.sleep(0.2)
                yield b"last"

            return StreamingResponse(pieces())

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncGenerator[None]:
            yield
            self.is_closed.set()
            await self.may_end.wait()

        async def ready() -> dict[str, bool]:
            return {}

        return create_app(
            "platform",
            [Route("/stream", stream, methods=["POST"])],
            authenticator=NoCredentials(),
            settings=Settings(),
            ready=ready,
            lifespan=lifespan,
        )

    async def ask(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> bytes:
        """All that comes of a request over a connection that was made before, and is to become TLS."""
        answer = b""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.start_tls(self._context, server_hostname="127.0.0.1")
            writer.write(b"POST /stream HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
            while piece := await reader.read(1024):
                answer += piece
        return answer


async def test_a_handshake_that_takes_long_is_waited_for(tmp_path: Path) -> None:
    """Catches a request that is begun by a service which has closed already, because the TLS handshake of its
    connection was not done when nothing else was left: its stream is cut by the end of the process."""
    stop, slow = asyncio.Event(), _Slow(tmp_path)
    slow.may_end.set()
    async with serving(slow.app(), tls=slow.tls, stop=stop, linger_s=0.1, drain_timeout_s=60) as (url,):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        stop.set()
        # Longer than anything but this connection is waited for.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(slow.is_closed.wait(), 2.0)
        answer = await asyncio.wait_for(slow.ask(writer, reader), 30)
    assert slow.asked == ["in time"]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert body == b"6\r\nfirst \r\n4\r\nlast\r\n0\r\n\r\n"


async def test_nothing_is_begun_after_the_drain(tmp_path: Path) -> None:
    """Catches a request that is let in when the patience of the drain is over, and cut after its first
    words."""
    stop, slow = asyncio.Event(), _Slow(tmp_path)
    async with serving(slow.app(), tls=slow.tls, stop=stop, linger_s=0.1, drain_timeout_s=0.1) as (url,):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        stop.set()
        await slow.is_closed.wait()
        answer = await asyncio.wait_for(slow.ask(writer, reader), 30)
        slow.may_end.set()
    assert (slow.asked, answer) == ([], b"")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/responses"])
def test_a_stream_that_outlasts_the_drain_ends_with_an_error(tmp_path: Path, path: str) -> None:
    """Catches a process that ends before the last words of a stream that it cuts are out: a proxy may have
    its clients take what they got for whole."""
    make_certificate("server", tmp_path)
    context = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
    hi = [{"role": "user", "content": "hi"}]
    asks = {"input": "hi"} if path.endswith("responses") else {"messages": hi, "max_tokens": 50}
    body = {"model": "anthropic:m", "stream": True, **asks}
    with FakeProvider([Reply.broken("hang_mid", text="word " * 20)]) as provider:
        place = Place(
            tmp_path,
            ANTHROPIC_BASE_URL=provider.anthropic_url,
            ANTHROPIC_API_KEY="test-key",
            AGENTIC_FLOW_TLS__CERTIFICATE_FILE=str(tmp_path / "server.pem"),
            AGENTIC_FLOW_TLS__KEY_FILE=str(tmp_path / "server.key"),
            AGENTIC_FLOW_SERVE__LINGER_S="0.1",
            AGENTIC_FLOW_SERVE__DRAIN_TIMEOUT_S="0.5",
        )
        with place.start("serve", "platform") as server:
            request = urllib.request.Request(
                f"{server.addresses(1)['platform']}{path}",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, context=context, timeout=60) as answer:
                read = answer.readline()
                server.signal(signal.SIGTERM)
                read += answer.read()
            assert server.end().code == 0
    last = json.loads(read.decode().strip().splitlines()[-1].removeprefix("data: "))
    assert "the server is stopping" in json.dumps(last)
