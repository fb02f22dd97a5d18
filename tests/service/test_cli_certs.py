"""`agentic-flow certs` with real TLS servers: made, trusted, renewed while they serve, and withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cli_process import Place
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from agentic_flow.client import Client
from agentic_flow.core import http_twin
from agentic_flow.core.auth import NoCredentials
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import PeerSettings, Settings, TlsSettings, load
from agentic_flow.core.tls import ClientTls, ServerTls, client_context
from agentic_flow.core.web import create_app
from agentic_flow.deploy.certs import CertificateFolder
from agentic_flow.testing.serving import serving

ONCE = PeerSettings(attempts=1)


def tls(folder: Path, service: str, *, mutual: bool = False, reload_s: float = 0.02) -> TlsSettings:
    return TlsSettings(
        certificate_file=folder / f"{service}.crt",
        key_file=folder / f"{service}.key",
        ca_file=folder / "ca.crt",
        mutual=mutual,
        reload_s=reload_s,
    )


def on_disk(folder: Path, service: str) -> str:
    """Hash of a service's certificate in its folder."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert((folder / f"{service}.crt").read_text())).hexdigest()


def shown_by(url: str, context: ssl.SSLContext) -> str:
    """Hash of the certificate that a port shows to a new connection."""
    at = urlsplit(url)
    with (
        socket.create_connection((str(at.hostname), at.port or 0), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=str(at.hostname)) as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        return hashlib.sha256(certificate).hexdigest()


async def until_shown(url: str, folder: Path, service: str, context: ssl.SSLContext) -> None:
    """Connect again until the port shows what is on disk. Until then `context` may not trust it."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ssl.SSLCertVerificationError):
                if await asyncio.to_thread(shown_by, url, context) == on_disk(folder, service):
                    return
            await asyncio.sleep(0.02)


def app() -> Starlette:
    async def who(request: Request) -> JSONResponse:
        return JSONResponse({"port_of_caller": request.client.port if request.client else None})

    async def ready() -> dict[str, bool]:
        return {}

    return create_app(
        "platform", [Route("/who", who)], authenticator=NoCredentials(), settings=Settings(), ready=ready
    )


async def test_renewed_certificates_are_taken_up_and_open_connections_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a server or a client that needs a restart for a renewed certificate, or cuts calls for it."""
    # Until the new certificate is seen it is idle, for longer perhaps than calls keep such a connection.
    monkeypatch.setattr(http_twin, "_IDLE_CONNECTION_S", 600.0)
    certificates = CertificateFolder(tmp_path)
    certificates.init(["platform", "swarm"])
    context = client_context(tls(tmp_path, "swarm"))
    async with (
        serving(app(), tls=tls(tmp_path, "platform", mutual=True)) as (url,),
        # This one never looks at its files: its connection is the same before and after.
        HttpTwin(url, ONCE, tls=tls(tmp_path, "swarm", reload_s=1000.0)) as keeps,
        HttpTwin(url, ONCE, tls=tls(tmp_path, "swarm")) as follows,
    ):
        kept = await keeps.call("GET", "/who")
        first = await follows.call("GET", "/who")
        before = on_disk(tmp_path, "platform")
        assert await asyncio.to_thread(shown_by, url, context) == before
        certificates.renew(within_days=400)
        assert on_disk(tmp_path, "platform") != before
        await until_shown(url, tmp_path, "platform", context)
        assert await keeps.call("GET", "/who") == kept
        async with asyncio.timeout(60):
            while await follows.call("GET", "/who") == first:  # a new connection, with the new certificate
                await asyncio.sleep(0.02)


async def test_a_withdrawn_authority_is_trusted_no_longer(tmp_path: Path) -> None:
    """Catches authorities that only ever add up in a running server: a stolen key would be good for ever."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    CertificateFolder(ours).init(["platform", "swarm"])
    CertificateFolder(theirs).init(["platform", "swarm"])
    old = client_context(tls(theirs, "swarm"))
    old.load_verify_locations(ours / "ca.crt")
    live = tmp_path / "live"
    live.mkdir()
    for name in ("ca.crt", "platform.crt", "platform.key"):
        (live / name).write_bytes((theirs / name).read_bytes())
    async with serving(app(), tls=tls(live, "platform", mutual=True)) as (url,):
        async with HttpTwin(url, ONCE, tls=tls(theirs, "swarm")) as twin:
            await twin.call("GET", "/who")
        for name in ("ca.crt", "platform.crt", "platform.key"):
            (live / name).write_bytes((ours / name).read_bytes())
        await until_shown(url, live, "platform", client_context(tls(ours, "swarm")))
        async with HttpTwin(url, ONCE, tls=tls(ours, "swarm")) as twin:
            await twin.call("GET", "/who")
        # Shows a certificate of the withdrawn authority, and trusts the server's new one.
        (theirs / "ca.crt").write_bytes((ours / "ca.crt").read_bytes())
        async with HttpTwin(url, ONCE, tls=tls(theirs, "swarm")) as twin:
            with pytest.raises(Unavailable):
                await twin.call("GET", "/who")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str, bool]:
    """In memory: hash of the server's certificate, and whether the client could resume the session."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(up, down, server_side=True)
    here = client.wrap_bio(down, up, server_hostname="127.0.0.1")
    for _ in range(4):
        for end in (here, there):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        here.read(1)
    certificate = here.getpeercert(binary_form=True)
    assert certificate is not None
    return hashlib.sha256(certificate).hexdigest(), bool(here.session and here.session.has_ticket)


def test_half_a_renewal_changes_nothing_yet(tmp_path: Path) -> None:
    """Catches a port that is dead between the writing of a key and of its certificate."""
    certificates = CertificateFolder(tmp_path)
    certificates.init(["platform", "swarm"])
    server, client = ServerTls(tls(tmp_path, "platform")), client_context(tls(tmp_path, "swarm"))
    before = on_disk(tmp_path, "platform")
    key = (tmp_path / "platform.key").read_bytes()
    for damage in ((tmp_path / "swarm.key").read_bytes(), b"", None):
        if damage is None:
            (tmp_path / "platform.key").unlink()
        else:
            (tmp_path / "platform.key").write_bytes(damage)
        server.look()
        assert handshake(server.context, client)[0] == before
    (tmp_path / "platform.key").write_bytes(key)
    certificates.renew(within_days=400)
    assert handshake(server.context, client)[0] == before
    server.look()
    assert handshake(server.context, client)[0] == on_disk(tmp_path, "platform") != before


def test_no_session_outlives_its_certificate(tmp_path: Path) -> None:
    """Catches tickets of mutual TLS, with which a client gets in without showing a certificate again."""
    CertificateFolder(tmp_path).init(["platform", "swarm"])
    client = client_context(tls(tmp_path, "swarm"))
    assert handshake(ServerTls(tls(tmp_path, "platform")).context, client)[1]
    assert not handshake(ServerTls(tls(tmp_path, "platform", mutual=True)).context, client)[1]


def test_a_client_makes_no_context_without_need(tmp_path: Path) -> None:
    """Catches a context, and so a connection, for each call."""
    certificates = CertificateFolder(tmp_path)
    certificates.init(["swarm"])
    # Else what is renewed within a tick of the file system's clock has the same time and, by chance, size.
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    client = ClientTls(tls(tmp_path, "swarm", reload_s=1e-9))
    first = client.context()
    assert client.context() is first
    certificates.renew(within_days=400)
    assert client.context() is not first


def test_processes_follow_a_renewal_while_they_work(tmp_path: Path) -> None:
    """Catches commands whose files our servers cannot use, and a stack that needs restarts once a year."""
    place = Place(tmp_path)
    certs = tmp_path / "certs"
    made = place.run("certs", "init", "--json")
    assert [change["outcome"] for change in made.data["changes"]] == ["made"] * 5
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "kettle.md").write_text("The thermostat switches the kettle off.\n")
    common = {
        "AGENTIC_FLOW_TLS__CA_FILE": str(certs / "ca.crt"),
        "AGENTIC_FLOW_TLS__MUTUAL": "true",
        "AGENTIC_FLOW_TLS__RELOAD_S": "0.1",
    }

    def own(service: str) -> dict[str, str]:
        files = {"CERTIFICATE_FILE": f"{service}.crt", "KEY_FILE": f"{service}.key"}
        return {**common, **{f"AGENTIC_FLOW_TLS__{name}": str(certs / file) for name, file in files.items()}}

    settings = load(
        {
            "data_dir": str(tmp_path / "client"),
            "tls.ca_file": str(certs / "ca.crt"),
            "tls.certificate_file": str(certs / "worker.crt"),
            "tls.key_file": str(certs / "worker.key"),
        },
        environ={},
        directory=tmp_path,
        user_config=tmp_path / "none.toml",
    ).settings
    with place.start("serve", "agentdb", **own("agentdb")) as agentdb:
        at = agentdb.addresses(1)
        peers = {"AGENTIC_FLOW_PEERS__AGENTDB_URL": at["agentdb"]}
        with place.start("serve", "platform", "swarm", **own("platform"), **peers) as platform:
            at |= platform.addresses(2)
            assert all(url.startswith("https://") for url in at.values())
            question = "What switches the kettle off?"
            with Client(at["platform"], settings=settings) as client:
                assert "thermostat" in client.run(question, input=tmp_path / "notes").answer
                renewed = place.run("certs", "renew", "--within", "400")
                assert len(re.findall("renewed: 364 days were left", renewed.out)) == 4
                for service, files in (("agentdb", "agentdb"), ("platform", "platform")):
                    asyncio.run(until_shown(at[service], certs, files, client_context(settings.tls)))
                # The platform calls AgentDB, and we the platform, with what was renewed.
                assert "thermostat" in client.run(question, input=tmp_path / "notes").answer
            for server in (platform, agentdb):
                server.signal(signal.SIGTERM)
                assert server.end().code == 0
    shown = place.run("certs", "show", "--json")
    assert shown.code == 0
    assert [state["name"] for state in shown.data] == ["ca", "agentdb", "platform", "swarm", "worker"]


def test_an_unusable_certificate_is_an_exit_code(tmp_path: Path) -> None:
    """Catches a check in a script that passes with an expired or broken certificate."""
    place = Place(tmp_path)
    assert place.run("certs", "show").code == 4
    assert place.run("certs", "init", "swarm").code == 0
    (tmp_path / "certs" / "swarm.key").write_text("torn")
    shown = place.run("certs", "show")
    assert (shown.code, "its key is not the one beside it" in shown.out) == (1, True)
    assert place.run("certs", "init", "swarm").code == 5
