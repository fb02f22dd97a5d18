"""TLS contexts for our servers and for calls to our neighbours."""

from __future__ import annotations

import ssl
from pathlib import Path

from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.settings import TlsSettings


def server_context(tls: TlsSettings) -> ssl.SSLContext | None:
    """The context of a port, or None when no certificate is set. With `mutual`, clients must show one too.

    Raises:
        InvalidSettings: a file is missing or is not what it should be.
    """
    if tls.certificate_file is None or tls.key_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, tls.certificate_file, tls.key_file)
    if tls.mutual and tls.ca_file is not None:
        _load_authorities(context, tls.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
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
