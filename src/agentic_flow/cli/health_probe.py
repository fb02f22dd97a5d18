"""Asks a service how it is, at next to no cost: container engines do so every few seconds, in a new process.

So nothing of the product, and no library, is imported here: the few settings that matter are read from the
environment. Where a file might hold some of them, `values_of_environment` says so, and the command reads all
settings the usual way (`cli.health`).
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

PORTS = {
    "platform": "serve.platform_port",
    "agentdb": "serve.agentdb_port",
    "swarm": "serve.swarm_port",
    "worker": "serve.worker_port",
}
"""Service → the setting of its port."""
NAMES = ("serve.host", *PORTS.values(), "tls.certificate_file", "tls.key_file", "tls.ca_file")
"""The settings that a probe needs."""
DEFAULT_SERVICE = "platform"
TIMEOUT_S = 2.5
"""Below the 3 s after which the images' health checks are ended, so that there is a line of what is wrong."""

_DEFAULTS = {
    "serve.host": "127.0.0.1",
    "serve.platform_port": "3000",
    "serve.agentdb_port": "5432",
    "serve.swarm_port": "9000",
}
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is bound to all addresses is asked at its own
_PATH = "/health/ready"
_ANSWER_MAX_BYTES = 64 * 1024


def main(words: Sequence[str]) -> int | None:
    """`agentic-flow health [TARGET]` with the settings of the environment; its exit code.

    Returns:
        0 when it is ready, 1 when it is not; None when files may hold settings, and nothing was asked.
    """
    values = values_of_environment(os.environ)
    if values is None:
        return None
    healthy, message = ask(words[0] if words else DEFAULT_SERVICE, values)
    print(message)
    return 0 if healthy else 1


def values_of_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The settings of NAMES as the environment has them; None when some might come from a file."""
    if sys.platform != "linux":
        return None  # the user's file lies elsewhere
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    for path in (".env", "agentic-flow.toml", os.path.join(home, "agentic-flow", "config.toml")):
        if os.path.exists(path):
            return None
    values = dict(_DEFAULTS)
    for name in NAMES:
        value = environ.get("AGENTIC_FLOW_" + name.replace(".", "__").upper())
        if value is not None:
            values[name] = value
    return values


def ask(target: str, values: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Whether a service is ready, and one line about it.

    Args:
        target: A service of PORTS, which is asked on this machine; or a base URL.
        values: The settings of NAMES that are set.
        timeout_s: Longest time it may take to answer.
    """
    place = target
    try:
        if "://" in target:
            secure, host, port, path = _parts(target)
        else:
            secure, host, port, path = _place(target, values)
            place = f"{target} on {_authority(host, port)}"
        context = _context(values, own=target in PORTS) if secure else None
        status, body = _get(host, port, path, context, time.monotonic() + timeout_s)
    except ValueError as error:
        return False, str(error)
    except TimeoutError:
        return False, f"{place} did not answer within {timeout_s:g} s"
    except OSError as error:
        return False, f"{place} does not answer: {getattr(error, 'verify_message', '') or error}"
    if status == 200:
        return True, f"{place} is ready"
    return False, f"{place} is not ready: {_reason(status, body)}"


def _place(service: str, values: Mapping[str, str]) -> tuple[bool, str, int, str]:
    """Where a service of this machine listens, by its settings."""
    if service not in PORTS:
        raise ValueError(f"{service!r} is no service and no URL: use one of {', '.join(PORTS)}, or https://…")
    port = values.get(PORTS[service])
    if not port:
        raise ValueError(f"the {service} has no port: set {PORTS[service]}")
    if not port.isascii() or not port.isdigit():
        raise ValueError(f"{PORTS[service]} is {port!r}, which is no port")
    host = values["serve.host"].strip("[]")
    return bool(values.get("tls.certificate_file")), _HERE.get(host, host), int(port), _PATH


def _parts(url: str) -> tuple[bool, str, int, str]:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    secure = parts.scheme == "https"
    return secure, parts.hostname, parts.port or (443 if secure else 80), f"{parts.path.rstrip('/')}{_PATH}"


def _context(values: Mapping[str, str], *, own: bool) -> ssl.SSLContext:
    """The TLS context of a probe.

    A service of this machine must show a certificate of ours, whatever name stands in it: the one that is
    configured here, or another of the same authority, when it was just renewed.
    """
    import ssl

    certificate, key, authority = (values.get(f"tls.{name}_file") for name in ("certificate", "key", "ca"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if own:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(certificate)
    if authority:
        context.load_verify_locations(authority)
    elif not own:
        context.load_default_certs()
    if certificate and key:
        context.load_cert_chain(certificate, key)
    return context


def _get(host: str, port: int, path: str, context: ssl.SSLContext | None, end_s: float) -> tuple[int, bytes]:
    """Status and body of one GET.

    Raises:
        TimeoutError: it took longer than to `end_s` of the monotonic clock.
        OSError: it cannot be reached, or shows the wrong certificate.
        ValueError: what answers does not speak HTTP.
    """
    # As bytes: of text it would import what encodes international names, a tenth of the whole probe.
    address: str | bytes = host.encode() if host.isascii() else host
    with socket.create_connection((address, port), timeout=_left(end_s)) as plain:  # pyright: ignore[reportArgumentType]
        connection = plain if context is None else context.wrap_socket(plain, server_hostname=host)
        with connection:
            head = f"GET {path} HTTP/1.1\r\nHost: {_authority(host, port)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode("idna" if not head.isascii() else "ascii"))
            answer = b""
            while len(answer) < _ANSWER_MAX_BYTES:
                connection.settimeout(_left(end_s))
                piece = connection.recv(_ANSWER_MAX_BYTES)
                if not piece:
                    break
                answer += piece
    line, _, rest = answer.partition(b"\r\n")
    words = line.split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ValueError(f"what listens on {_authority(host, port)} does not speak HTTP: {line[:60]!r}")
    return int(words[1]), rest.partition(b"\r\n\r\n")[2]


def _left(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(status: int, body: bytes) -> str:
    """What a service says of itself, in a few words."""
    import json

    try:
        failing: list[object] = json.loads(body)["failing"]
        return ", ".join(str(name) for name in failing)
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
