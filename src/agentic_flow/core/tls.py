"""TLS of our servers and of calls to our neighbours. Renewed files are taken up while processes run.

Files are looked at every `tls.reload_s`, and each new connection uses the newest that were whole. Files that
do not belong together (a renewal half way) are passed over with a warning; what was loaded before goes on.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.settings import TlsSettings

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.tls")

Stamps = tuple[tuple[int, int, int] | None, ...]


class _Renewed:
    """A context that is made again when one of its files changes.

    Args:
        tls: Names the files.
        make: Makes the context of them.

    Raises:
        InvalidSettings: the files cannot be used at the start. Later ones that cannot are logged.
    """

    def __init__(self, tls: TlsSettings, make: Callable[[TlsSettings], ssl.SSLContext]) -> None:
        self._tls = tls
        self._make = make
        self._seen = _stamps(tls)
        self.context = make(tls)

    def look(self) -> None:
        """Take up files that changed since the last look."""
        # Taken before the files are read: a change in between is seen as one at the next look.
        seen = _stamps(self._tls)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context = self._make(self._tls)
        except InvalidSettings as error:
            _log.warning("tls_reload_failed", error=error.message)
        else:
            _log.info("tls_reloaded", certificate_file=str(self._tls.certificate_file))


class ServerTls:
    """The TLS of a port, for as long as the port is open.

    Args:
        tls: With `certificate_file` and `key_file`.

    Raises:
        InvalidSettings: a file is missing or is not what it should be.
    """

    def __init__(self, tls: TlsSettings) -> None:
        self._reload_s = tls.reload_s
        self._renewed = _Renewed(tls, server_context)
        self.context = self._renewed.context
        """What the server is made with; each handshake goes on with the newest, its authorities too."""
        # OpenSSL calls this for every ClientHello, whether it names a server or not.
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        if self._renewed.context is not self.context:
            connection.context = self._renewed.context

    def look(self) -> None:
        """Take up files that changed since the last look."""
        self._renewed.look()

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(self._reload_s)
            self.look()


class ClientTls:
    """The TLS of calls to a neighbour.

    Args:
        tls: Authorities to trust and the certificate to show.

    Raises:
        InvalidSettings: a file is missing or is not what it should be.
    """

    def __init__(self, tls: TlsSettings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._reload_s = tls.reload_s
        self._clock = clock
        self._renewed = _Renewed(tls, client_context)
        self._look_at_s = clock.monotonic_s() + tls.reload_s

    def context(self) -> ssl.SSLContext:
        """The context of the next connection: one and the same until a file changes."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + self._reload_s
            self._renewed.look()
        return self._renewed.context


def _stamps(tls: TlsSettings) -> Stamps:
    """What tells a changed file from the same: some tools replace it, some write into it."""

    def stamp(path: Path) -> tuple[int, int, int] | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    return tuple(
        stamp(path) for path in (tls.certificate_file, tls.key_file, tls.ca_file) if path is not None
    )


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """The context of a port. With `mutual`, clients must show a certificate too.

    Raises:
        InvalidSettings: a file is missing or is not what it should be.
    """
    if tls.certificate_file is None or tls.key_file is None:
        raise InvalidSettings(
            "a TLS port needs a certificate", hint="set tls.certificate_file and tls.key_file"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, tls.certificate_file, tls.key_file)
    if tls.mutual and tls.ca_file is not None:
        _load_authorities(context, tls.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session would not show its certificate again, though its authority may be gone by then.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


def client_context(tls: TlsSettings) -> ssl.SSLContext:
    """The context of calls to neighbours: their certificates must chain to `ca_file` (else to the system's
    authorities); our own certificate is shown when there is one.

    Raises:
        InvalidSettings: a file is missing or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca_file is None:
        context.load_default_certs()
    else:
        _load_authorities(context, tls.ca_file)
    if tls.certificate_file is not None and tls.key_file is not None:
        _load_chain(context, tls.certificate_file, tls.key_file)
    return context


def _load_chain(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    for name, path in (("certificate_file", certificate_file), ("key_file", key_file)):
        _must_read(name, path)
    try:
        context.load_cert_chain(certificate_file, key_file)
    except (ssl.SSLError, OSError) as error:
        raise InvalidSettings(
            f"tls.certificate_file {str(certificate_file)!r} and tls.key_file {str(key_file)!r} "
            f"are no pair: {error}",
            hint="both are PEM files, and the key belongs to the first certificate",
        ) from error


def _load_authorities(context: ssl.SSLContext, ca_file: Path) -> None:
    _must_read("ca_file", ca_file)
    try:
        context.load_verify_locations(ca_file)
    except (ssl.SSLError, OSError) as error:
        raise InvalidSettings(
            f"tls.ca_file {str(ca_file)!r} holds no certificates: {error}", hint="give a PEM bundle"
        ) from error


def _must_read(name: str, path: Path) -> None:
    # OpenSSL's own error does not say which file it could not read.
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidSettings(
            f"tls.{name} {str(path)!r} cannot be read: {error.strerror}",
            hint="check the path and its permissions",
        ) from error
