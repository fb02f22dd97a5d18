"""Certificates of a stack: an authority of its own, and one certificate for each service.

A folder holds `ca.crt`, `ca.key`, and `NAME.crt` with `NAME.key` for each service. Certificates serve both
sides of a call (server and client authentication), so that mutual TLS needs nothing else. Files that are
renewed keep their inode: containers that mount a single file see what is written into it, never what replaces
it. The servers take renewed files up by themselves (`core.tls`).

Source: RFC 5280 (profile of certificates), RFC 6125 (names of services).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, NotFound, PathNotFound
from agentic_flow.core.secrets import write_private

SERVICES = ("platform", "agentdb", "swarm", "worker")
AUTHORITY = "ca"
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
RENEW_WITHIN_DAYS = 30
_DAYS_MAX = 36_500
_SKEW = timedelta(minutes=5)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(
    r"(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.IGNORECASE
)
_LOCAL = ("localhost", "127.0.0.1", "::1")

Fault = Literal["expired", "not_yet_valid", "key_missing", "key_of_another", "other_authority", "unreadable"]


@dataclass(frozen=True, slots=True)
class CertificateState:
    """One certificate of the folder, as it is on disk.

    Args:
        name: The service's, or `ca`.
        path: Of the certificate.
        subject: Its distinguished name, RFC 4514.
        names: DNS names and addresses that it is good for.
        not_before_s: Start of its validity, Unix seconds.
        not_after_s: Its end.
        days_left: Whole days until then; negative when it is over.
        fault: Why it cannot be used; None: it can.
    """

    name: str
    path: str
    subject: str
    names: tuple[str, ...]
    not_before_s: float
    not_after_s: float
    days_left: int
    fault: Fault | None


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one certificate: `made`, `kept` as it was, or `renewed`, and why."""

    name: str
    outcome: Literal["made", "kept", "renewed"]
    why: str


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class CertificateFolder:
    """The certificates of one stack.

    Args:
        folder: Made when the first certificate is.
        mounted: Whether containers mount the files: their user has a number that the host does not know, so
            the services' keys can be read by all, in a folder that is its owner's alone. Else each key is its
            owner's alone, as the authority's ever is. What is renewed keeps its mode.
        now: The present; the clock's by default.
    """

    def __init__(self, folder: Path, *, mounted: bool = False, now: datetime | None = None) -> None:
        self._folder = folder
        self._mounted = mounted
        self._given_now = now

    def init(
        self,
        services: Sequence[str] = SERVICES,
        *,
        hosts: Mapping[str, Sequence[str]] | None = None,
        days: int = CERTIFICATE_DAYS,
        authority_days: int = AUTHORITY_DAYS,
        force: bool = False,
    ) -> list[Change]:
        """Make the authority and the certificates that are not there. What is there and can be used is kept.

        Args:
            services: Names of the certificates.
            hosts: Further names and addresses by service; those under `*` go into every certificate.
            days: Validity of the services' certificates; cut to the authority's.
            authority_days: Validity of the authority.
            force: Make the services' certificates anew, whatever is there.

        Raises:
            InvalidInput: a name, an address or a number of days is none.
            Conflict: a certificate that is there cannot be used or lacks a name. Nothing was changed.
            PathNotFound: the folder cannot be written.
        """
        _check(services, days, authority_days)
        wanted = {name: _names(name, hosts or {}) for name in services}
        with self._exclusive():
            kept = {} if force else self._usable(wanted)
            changes = [self._make_authority(authority_days)]
            authority = self._authority() if len(kept) < len(wanted) else None
            for name, names in wanted.items():
                if authority is None or name in kept:
                    changes.append(Change(name, "kept", _good_for(kept[name])))
                    continue
                there = self._path(name, "crt").exists()
                self._issue(authority, name, names, days)
                changes.append(
                    Change(name, *(("renewed", "as told") if there else ("made", "was not there")))
                )
            return changes

    def renew(
        self,
        services: Sequence[str] = (),
        *,
        within_days: int = RENEW_WITHIN_DAYS,
        days: int = CERTIFICATE_DAYS,
        authority_days: int = AUTHORITY_DAYS,
    ) -> list[Change]:
        """Make anew what expires soon or cannot be used, for the names that it had. Keys are made anew too.

        The authority keeps its key and its name: certificates that it signed before stay good.

        Args:
            services: Only these; all that are in the folder when empty.
            within_days: What has fewer days left is renewed.
            days: Validity from now of what is renewed.
            authority_days: That of the authority.

        Raises:
            NotFound: there is no authority here, or no certificate of a name.
            DataCorrupted: the authority's key is not that of its certificate.
        """
        _check(services, days, authority_days)
        if within_days < 0:
            raise InvalidInput(f"{within_days!r} is no number of days", hint="give 0 or more")
        self.states()  # a folder that is none is not made one
        with self._exclusive():
            authority = self._authority()
            states = {state.name: state for state in self.states()}
            for name in services:
                if name not in states:
                    raise NotFound(
                        f"there is no certificate of {name!r} in {str(self._folder)!r}",
                        hint=f"make it with `agentic-flow certs init {name}`",
                    )
            changes: list[Change] = []
            why = _why_renew(states[AUTHORITY], within_days)
            if why is not None:
                authority = self._extend_authority(authority, authority_days)
            changes.append(
                Change(AUTHORITY, "renewed" if why else "kept", why or _good_for(states[AUTHORITY]))
            )
            for name in services or [one for one in states if one != AUTHORITY]:
                why = _why_renew(states[name], within_days)
                if why is not None:
                    self._issue(authority, name, self._names_before(name, states[name]), days)
                changes.append(Change(name, "renewed" if why else "kept", why or _good_for(states[name])))
            return changes

    def states(self) -> list[CertificateState]:
        """Every certificate of the folder, the authority first.

        Raises:
            NotFound: there is no authority in the folder.
        """
        if not self._path(AUTHORITY, "crt").is_file():
            raise NotFound(
                f"there is no authority in {str(self._folder)!r}",
                hint="make one with `agentic-flow certs init`",
            )
        names = sorted(path.stem for path in self._folder.glob("*.crt") if path.stem != AUTHORITY)
        try:
            authority = x509.load_pem_x509_certificate(self._path(AUTHORITY, "crt").read_bytes())
        except (OSError, ValueError):
            authority = None
        return [self._state(name, authority) for name in (AUTHORITY, *names)]

    def _state(self, name: str, authority: x509.Certificate | None) -> CertificateState:
        path = self._path(name, "crt")
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            return CertificateState(name, str(path), "", (), 0.0, 0.0, 0, "unreadable")
        left = certificate.not_valid_after_utc - self._now()
        return CertificateState(
            name,
            str(path),
            certificate.subject.rfc4514_string(),
            _names_of(certificate),
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
            left.days,
            self._fault(name, certificate, authority),
        )

    def _fault(
        self, name: str, certificate: x509.Certificate, authority: x509.Certificate | None
    ) -> Fault | None:
        now = self._now()
        if certificate.not_valid_after_utc <= now:
            return "expired"
        if certificate.not_valid_before_utc > now:
            return "not_yet_valid"
        if authority is None or not _is_signed_by(certificate, authority):
            return "other_authority"
        key_path = self._path(name, "key")
        if not key_path.exists():
            # An authority whose key is kept elsewhere still serves those who trust it.
            return None if name == AUTHORITY else "key_missing"
        try:
            key = _read_key(key_path)
        except PermissionError:
            return None  # somebody else's to read, as it should be
        except (OSError, ValueError):
            return "key_of_another"
        return None if key.public_key() == certificate.public_key() else "key_of_another"

    def _usable(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, CertificateState]:
        """Those of the wanted that are there and will do.

        Raises:
            Conflict: one is there and will not.
        """
        if not self._path(AUTHORITY, "crt").exists():
            for name in (AUTHORITY, *wanted):
                for ending in ("crt", "key"):
                    if self._path(name, ending).exists():
                        raise Conflict(
                            f"{str(self._path(name, ending))!r} is there, but no authority",
                            hint="bring ca.crt and ca.key back, or give another folder with --dir",
                        )
            return {}
        found = {state.name: state for state in self.states() if state.name in wanted}
        for name, state in found.items():
            if state.fault is not None:
                raise Conflict(
                    f"{state.path!r} is there and cannot be used: {said(state.fault)}",
                    hint=f"make it anew with `agentic-flow certs renew {name}`",
                )
            lacking = [one for one in wanted[name] if one not in state.names]
            if lacking:
                raise Conflict(
                    f"{state.path!r} is there and not good for {', '.join(lacking)}",
                    hint="make it anew with `agentic-flow certs init --force` and the same hosts",
                )
        return found

    def _names_before(self, name: str, state: CertificateState) -> tuple[str, ...]:
        return state.names or _names(name, {})

    def _make_authority(self, days: int) -> Change:
        if self._path(AUTHORITY, "crt").exists():
            state = self.states()[0]
            if state.fault is not None:
                raise Conflict(
                    f"{state.path!r} is there and cannot be used: {said(state.fault)}",
                    hint="make it anew with `agentic-flow certs renew`, or give another folder with --dir",
                )
            return Change(AUTHORITY, "kept", _good_for(state))
        key = ec.generate_private_key(ec.SECP256R1())
        # Two stacks on one machine must not have authorities of the same name.
        serial = x509.random_serial_number()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Agentic Flow"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"Agentic Flow CA {serial % 2**32:08x}"),
            ]
        )
        certificate = self._authority_certificate(subject, key, serial, days)
        self._write(AUTHORITY, "key", _key_pem(key), mode=0o600)
        self._write_certificate(AUTHORITY, certificate)
        return Change(AUTHORITY, "made", "was not there")

    def _extend_authority(self, authority: _Pair, days: int) -> _Pair:
        certificate = self._authority_certificate(
            authority.certificate.subject, authority.key, x509.random_serial_number(), days
        )
        self._write_certificate(AUTHORITY, certificate)
        return _Pair(certificate, authority.key)

    def _authority_certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, serial: int, days: int
    ) -> x509.Certificate:
        now = self._now()
        public = key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(public)
            .serial_number(serial)
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )

    def _issue(self, authority: _Pair, name: str, names: Sequence[str], days: int) -> None:
        """A new key and a certificate of it for `names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [
                        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Agentic Flow"),
                        x509.NameAttribute(NameOID.COMMON_NAME, name),
                    ]
                )
            )
            .issuer_name(authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + timedelta(days=days), authority.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([_general_name(one) for one in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
            )
            .sign(authority.key, hashes.SHA256())
        )
        # Servers take up a pair only when it is one, so it matters little which comes first.
        self._write(name, "key", _key_pem(key), mode=0o644 if self._mounted else 0o600)
        self._write_certificate(name, certificate)

    def _authority(self) -> _Pair:
        """The authority with its key.

        Raises:
            NotFound: the certificate or the key is not here.
            DataCorrupted: they do not belong together.
        """
        self.states()
        certificate_path, key_path = self._path(AUTHORITY, "crt"), self._path(AUTHORITY, "key")
        try:
            pair = _Pair(x509.load_pem_x509_certificate(certificate_path.read_bytes()), _read_key(key_path))
        except FileNotFoundError:
            raise NotFound(
                f"the authority's key {str(key_path)!r} is not there, so nothing can be signed",
                hint="bring it back for as long as this takes",
            ) from None
        except (OSError, ValueError) as error:
            raise DataCorrupted(
                f"{str(certificate_path)!r} or its key cannot be read: {error}",
                hint="bring the right files back, or begin in another folder with --dir",
            ) from None
        if pair.key.public_key() != pair.certificate.public_key():
            raise DataCorrupted(
                f"{str(key_path)!r} is not the key of {str(certificate_path)!r}",
                hint="bring the right files back, or begin in another folder with --dir",
            )
        return pair

    def _write_certificate(self, name: str, certificate: x509.Certificate) -> None:
        self._write(name, "crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)

    def _write(self, name: str, ending: str, content: bytes, *, mode: int) -> None:
        path = self._path(name, ending)
        try:
            if path.exists():
                _write_within(path, content)
            else:
                write_private(path, content)
                os.chmod(path, mode)
        except OSError as error:
            raise PathNotFound(
                f"{str(path)!r} cannot be written: {error.strerror}", hint="check the folder's permissions"
            ) from error

    def _path(self, name: str, ending: str) -> Path:
        return self._folder / f"{name}.{ending}"

    def _now(self) -> datetime:
        return self._given_now or datetime.now(UTC)

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        """One command at a time works on the folder."""
        import fcntl

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._mounted:
                self._folder.chmod(0o700)
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise PathNotFound(
                f"{str(self._folder)!r} cannot be written: {error.strerror}",
                hint="give a folder that you may write to with --dir",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write_within(path: Path, content: bytes) -> None:
    """Change what is in a file; its inode, by which containers have it, and its mode stay."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def said(fault: Fault) -> str:
    """A fault in words."""
    return {
        "expired": "it has expired",
        "not_yet_valid": "it is not valid yet",
        "key_missing": "its key is missing",
        "key_of_another": "its key is not the one beside it",
        "other_authority": "another authority signed it",
        "unreadable": "it is no certificate",
    }[fault]


def read_hosts(words: Iterable[str]) -> dict[str, list[str]]:
    """`NAME` (for every service) and `SERVICE=NAME` as `init` takes them."""
    hosts: dict[str, list[str]] = {}
    for word in words:
        service, equals, name = word.partition("=")
        hosts.setdefault(service if equals else "*", []).append(name if equals else word)
    return hosts


def _check(services: Collection[str], *days: int) -> None:
    for name in services:
        if not _NAME.fullmatch(name) or name == AUTHORITY:
            raise InvalidInput(
                f"{name!r} is no name of a service", hint="use small letters, digits and -, and not ca"
            )
    for number in days:
        if not 1 <= number <= _DAYS_MAX:
            raise InvalidInput(f"{number!r} is no number of days", hint=f"give 1 to {_DAYS_MAX}")


def _names(service: str, hosts: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What a service's certificate is good for, each once, in order."""
    names = [service, *_LOCAL, *hosts.get("*", ()), *hosts.get(service, ())]
    return tuple(dict.fromkeys(_shown(_general_name(name)) for name in names))


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if len(text) > 253 or not _HOST.fullmatch(text):
            raise InvalidInput(
                f"{text!r} is no host name and no address", hint="write it as flow.example or 192.0.2.7"
            ) from None
    return x509.DNSName(text.lower())


def _shown(name: x509.GeneralName) -> str:
    return str(name.value)


def _names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(_shown(name) for name in found.value)


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _why_renew(state: CertificateState, within_days: int) -> str | None:
    if state.fault is not None:
        return said(state.fault)
    return f"{state.days_left} days were left" if state.days_left < within_days else None


def _good_for(state: CertificateState) -> str:
    return f"good for {state.days_left} days"


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} is no elliptic-curve key")
    return key
