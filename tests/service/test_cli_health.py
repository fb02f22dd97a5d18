"""`agentic-flow health`: asked of real servers, with and without TLS, and without them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cli_process import Done, Place
from tls_files import make_certificate

AGENTDB = {"AGENTIC_FLOW_SERVE__AGENTDB_PORT": "0"}


def port_of(url: str) -> str:
    """The port in a base URL."""
    return str(urlsplit(url).port)


def health(place: Place, *words: str, **variables: str) -> Done:
    """`agentic-flow health …`, once more where the machine was too busy for an answer in time: the service's,
    or that of a database to the service."""
    for _ in range(20):
        done = place.run("health", *words, **variables)
        if "did not answer within" not in done.out and "database" not in done.out:
            break
    return done


def test_a_service_is_asked_at_the_port_and_host_of_its_settings(tmp_path: Path) -> None:
    """Catches a probe that asks elsewhere than where the service listens, or says ready when nobody does."""
    place = Place(tmp_path)
    open_to_all = {"AGENTIC_FLOW_SERVE__HOST": "0.0.0.0", "AGENTIC_FLOW_AUTH__REQUIRED": "true"}
    with place.start("serve", "agentdb", **open_to_all) as server:
        url = server.addresses(1)["agentdb"]
        port = {"AGENTIC_FLOW_SERVE__AGENTDB_PORT": port_of(url), **open_to_all}
        done = health(place, "agentdb", **port)
        assert (done.code, done.out) == (0, f"agentdb on 127.0.0.1:{port_of(url)} is ready\n")
        assert health(place, f"http://127.0.0.1:{port_of(url)}").code == 0
        listed = health(place, "agentdb", "--json", **port)
        assert (listed.code, listed.data["healthy"]) == (0, True)
        server.signal(signal.SIGTERM)
        server.end()
    done = health(place, "agentdb", **port)
    assert done.code == 1
    assert "agentdb on 127.0.0.1" in done.out
    assert "refused" in done.out
    assert done.out.count("\n") == 1
    assert done.err == ""


def test_settings_in_a_file_count(tmp_path: Path) -> None:
    """Catches the quick way through the environment being taken although a file names the port."""
    place = Place(tmp_path)
    del place.environment["AGENTIC_FLOW_SERVE__AGENTDB_PORT"]
    with place.start("serve", "agentdb", **AGENTDB) as server:
        port = port_of(server.addresses(1)["agentdb"])
        (tmp_path / "agentic-flow.toml").write_text(f"[serve]\nagentdb_port = {port}\n", "utf-8")
        assert health(place, "agentdb").code == 0


def test_what_fails_is_named(tmp_path: Path) -> None:
    """Catches an unready service without a word about which neighbour is missing."""
    place = Place(tmp_path, AGENTIC_FLOW_PEERS__AGENTDB_URL="http://127.0.0.1:1")
    with place.start("serve", "swarm") as server:
        url = server.addresses(1)["swarm"]
        done = health(place, "swarm", AGENTIC_FLOW_SERVE__SWARM_PORT=port_of(url))
    assert (done.code, done.out) == (1, f"swarm on 127.0.0.1:{port_of(url)} is not ready: agentdb\n")


def test_mutual_tls_is_spoken_with_the_certificate_of_the_settings(tmp_path: Path) -> None:
    """Catches a probe that takes any certificate, demands a name that is in none, or shows none."""
    authority, stranger = make_certificate("ca", tmp_path), make_certificate("stranger-ca", tmp_path)
    for name, issuer in (("server", authority), ("renewed", authority), ("other", stranger)):
        make_certificate(name, tmp_path, issuer)

    def files(name: str, authority: str = "ca") -> dict[str, str]:
        return {
            "AGENTIC_FLOW_TLS__CERTIFICATE_FILE": str(tmp_path / f"{name}.pem"),
            "AGENTIC_FLOW_TLS__KEY_FILE": str(tmp_path / f"{name}.key"),
            "AGENTIC_FLOW_TLS__CA_FILE": str(tmp_path / f"{authority}.pem"),
        }

    place = Place(tmp_path)
    with place.start("serve", "agentdb", **files("server"), AGENTIC_FLOW_TLS__MUTUAL="true") as server:
        url = server.addresses(1)["agentdb"]
        port = {"AGENTIC_FLOW_SERVE__AGENTDB_PORT": port_of(url)}
        assert health(place, "agentdb", **port, **files("server")).code == 0
        assert health(place, "agentdb", **port, **files("renewed")).code == 0
        assert health(place, url, **files("server")).code == 0
        wrong = health(place, "agentdb", **port, **files("other", "stranger-ca"))
        assert wrong.code == 1
        assert "certificate" in wrong.out
        plain = health(place, "agentdb", **port)
        assert plain.code == 1


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """A port that says this to whoever connects, or accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def speak() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                if answer is None:
                    over.wait(30)
                else:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join(30)


def test_silence_and_noise_are_no_health(tmp_path: Path) -> None:
    """Catches a probe that waits for ever, or takes whatever answers for a service."""
    place = Place(tmp_path)
    with listener(None) as url:
        silent = place.run("health", url, "--timeout-s", "0.3")
        assert (silent.code, silent.out) == (1, f"{url} did not answer within 0.3 s\n")
    with listener(b"220 mail.example ESMTP\r\n") as url:
        noise = place.run("health", url, "--timeout-s", "60")
        assert noise.code == 1
        assert "does not speak HTTP" in noise.out
    with listener(b"HTTP/1.1 503 Service Unavailable\r\n\r\n<html>") as url:
        refused = place.run("health", url, "--timeout-s", "60")
        assert refused.out == f"{url} is not ready: status 503\n"


@pytest.mark.parametrize("target", ["nobody", "ftp://127.0.0.1", "http://"])
def test_a_target_that_is_none_is_refused(tmp_path: Path, target: str) -> None:
    """Catches a typing error in a health check that would look like a service that is down."""
    done = Place(tmp_path).run("health", target)
    assert done.code == 1
    assert repr(target) in done.out


def test_a_worker_without_a_port_says_so(tmp_path: Path) -> None:
    """Catches a worker's health check that asks a port which no setting names."""
    done = Place(tmp_path).run("health", "worker")
    assert (done.code, done.out) == (1, "the worker has no port: set serve.worker_port\n")


def test_the_probe_loads_no_library(tmp_path: Path) -> None:
    """Catches an import that makes every container pay for a command line every two seconds."""
    probe = """
import sys
from agentic_flow.__main__ import main
sys.argv[1:] = ["health", "agentdb"]
code = main()
print("modules:", *sys.modules)
raise SystemExit(code)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", probe],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PYTHONPATH": os.environ["PYTHONPATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.rpartition("modules: ")[2].split()}
    assert "agentic_flow" in loaded
    assert not loaded & {"typer", "pydantic", "click", "asyncio", "json", "email", "http", "dataclasses"}
