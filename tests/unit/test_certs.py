"""Certificates of a stack on disk: what they are good for, when they are renewed, and what is refused."""

from __future__ import annotations

import stat
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted, InvalidInput, NotFound
from agentic_flow.deploy.certs import SERVICES, CertificateFolder, read_hosts

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verifies(folder: Path, name: str, host: str, at: datetime) -> bool:
    """By the rules of the web PKI, as another implementation than OpenSSL reads them."""
    subject: x509.DNSName | x509.IPAddress
    try:
        subject = x509.IPAddress(ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    policy = PolicyBuilder().store(Store([certificate(folder / "ca.crt")])).time(at)
    try:
        policy.build_server_verifier(subject).verify(certificate(folder / f"{name}.crt"), [])
    except VerificationError:
        return False
    return True


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_service_gets_a_certificate_for_its_names_alone(tmp_path: Path) -> None:
    """Catches a certificate that a strict verifier refuses, or that is good for another service's name."""
    CertificateFolder(tmp_path, now=NOW).init(hosts=read_hosts(["flow.example", "platform=192.0.2.7"]))
    for service in SERVICES:
        for host in (service, "localhost", "127.0.0.1", "::1", "flow.example"):
            assert verifies(tmp_path, service, host, NOW), (service, host)
        for other in SERVICES:
            assert verifies(tmp_path, service, other, NOW) == (other == service)
        assert verifies(tmp_path, service, "192.0.2.7", NOW) == (service == "platform")
        assert verifies(tmp_path, service, service, NOW + timedelta(days=364))
        assert not verifies(tmp_path, service, service, NOW + timedelta(days=366))


LABEL = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=12)
HOST = st.lists(LABEL.filter(lambda label: not label.isdigit()), min_size=1, max_size=4).map(".".join)
ADDRESS = st.ip_addresses().map(str)


@settings(max_examples=20)  # each makes four keys and writes them to disk
@given(st.lists(HOST | ADDRESS, max_size=6))
def test_names_survive_making_and_renewing(
    tmp_path_factory: pytest.TempPathFactory, hosts: list[str]
) -> None:
    """Catches a name that is lost, doubled or changed on its way into a certificate or through a renewal."""
    folder = tmp_path_factory.mktemp("names")
    certificates = CertificateFolder(folder, now=NOW)
    certificates.init(["swarm"], hosts={"*": hosts})
    before = certificates.states()[1]
    assert list(before.names) == list(dict.fromkeys(["swarm", "localhost", "127.0.0.1", "::1", *hosts]))
    certificates.renew(within_days=400)
    after = certificates.states()[1]
    assert after.names == before.names
    assert after.fault is None


def test_a_second_init_changes_nothing_and_force_only_the_services(tmp_path: Path) -> None:
    """Catches an authority that is replaced, with every certificate that clients trust by it."""
    certificates = CertificateFolder(tmp_path)
    assert {change.outcome for change in certificates.init()} == {"made"}
    first = content(tmp_path)
    assert {change.outcome for change in certificates.init()} == {"kept"}
    assert content(tmp_path) == first
    added = certificates.init([*SERVICES, "caddy"])
    assert [change.name for change in added if change.outcome != "kept"] == ["caddy"]
    forced = certificates.init(force=True)
    assert [change.name for change in forced if change.outcome == "renewed"] == list(SERVICES)
    now = content(tmp_path)
    assert {name for name in first if first[name] != now[name]} == {
        f"{name}.{ending}" for name in SERVICES for ending in ("crt", "key")
    }


def test_without_the_authoritys_key_what_is_there_still_serves(tmp_path: Path) -> None:
    """Catches a folder that is unusable where the authority's key is kept on another machine."""
    certificates = CertificateFolder(tmp_path)
    certificates.init()
    (tmp_path / "ca.key").unlink()
    assert {change.outcome for change in certificates.init()} == {"kept"}
    assert [state.fault for state in certificates.states()] == [None] * 5
    for sign in (lambda: certificates.init(["caddy"]), certificates.renew):
        with pytest.raises(NotFound, match=r"ca\.key"):
            sign()


def other_key(folder: Path) -> None:
    (folder / "swarm.key").write_bytes((folder / "agentdb.key").read_bytes())


def other_authority(folder: Path) -> None:
    stranger = folder / "stranger"
    CertificateFolder(stranger, now=NOW).init()
    for ending in ("crt", "key"):
        (folder / f"swarm.{ending}").write_bytes((stranger / f"swarm.{ending}").read_bytes())


FAULTS: list[tuple[str, Callable[[Path], object]]] = [
    ("key_missing", lambda folder: (folder / "swarm.key").unlink()),
    ("key_of_another", other_key),
    ("key_of_another", lambda folder: (folder / "swarm.key").write_text("torn")),
    ("other_authority", other_authority),
    ("unreadable", lambda folder: (folder / "swarm.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nMIIB")),
]


@pytest.mark.parametrize(("fault", "damage"), FAULTS)
def test_a_fault_is_named_refused_by_init_and_put_right_by_renew(
    tmp_path: Path, fault: str, damage: Callable[[Path], object]
) -> None:
    """Catches a broken pair that is called good, written over by `init` in silence, or left by `renew`."""
    certificates = CertificateFolder(tmp_path, now=NOW)
    certificates.init()
    damage(tmp_path)
    assert {state.name: state.fault for state in certificates.states()}["swarm"] == fault
    before = content_of_files(tmp_path)
    with pytest.raises(Conflict, match=r"swarm\.crt"):
        certificates.init()
    assert content_of_files(tmp_path) == before
    renewed = certificates.renew()
    assert [change.name for change in renewed if change.outcome == "renewed"] == ["swarm"]
    assert [state.fault for state in certificates.states()] == [None] * 5
    assert verifies(tmp_path, "swarm", "swarm", NOW)


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_only_what_expires_soon_is_renewed(tmp_path: Path) -> None:
    """Catches a renewal that comes after the expiry, or one of everything each time it is asked for."""
    CertificateFolder(tmp_path, now=NOW).init(["agentdb"], days=20)
    CertificateFolder(tmp_path, now=NOW).init(["agentdb", "swarm"], days=90)
    soon = CertificateFolder(tmp_path, now=NOW)
    assert outcomes(soon, within_days=20) == {"ca": "kept", "agentdb": "kept", "swarm": "kept"}
    assert outcomes(soon, within_days=21) == {"ca": "kept", "agentdb": "renewed", "swarm": "kept"}
    later = CertificateFolder(tmp_path, now=NOW + timedelta(days=91))
    assert {s.name: s.fault for s in later.states()} == {"ca": None, "agentdb": None, "swarm": "expired"}
    assert outcomes(later, within_days=0) == {"ca": "kept", "agentdb": "kept", "swarm": "renewed"}
    with pytest.raises(NotFound, match="caddy"):
        later.renew(["caddy"])


def outcomes(certificates: CertificateFolder, *, within_days: int) -> dict[str, str]:
    return {change.name: change.outcome for change in certificates.renew(within_days=within_days)}


def test_a_renewed_authority_leaves_what_it_signed_good(tmp_path: Path) -> None:
    """Catches a new key or name of the authority, which cuts every service off until all have restarted."""
    CertificateFolder(tmp_path, now=NOW).init(["swarm"], days=300, authority_days=100)
    old = certificate(tmp_path / "ca.crt")
    assert certificate(tmp_path / "swarm.crt").not_valid_after_utc == old.not_valid_after_utc
    at = NOW + timedelta(days=80)
    late = CertificateFolder(tmp_path, now=at)
    swarm = (tmp_path / "swarm.crt").read_bytes()
    late.renew(["swarm"], within_days=10)
    assert (tmp_path / "swarm.crt").read_bytes() == swarm
    assert outcomes(late, within_days=30) == {"ca": "renewed", "swarm": "renewed"}
    assert verifies(tmp_path, "swarm", "swarm", NOW + timedelta(days=200))
    (tmp_path / "swarm.crt").write_bytes(swarm)
    assert verifies(tmp_path, "swarm", "swarm", at)  # signed before, checked with the authority of now


def test_keys_are_private_and_files_keep_their_inode(tmp_path: Path) -> None:
    """Catches a key that others can read, and a renewal that containers with a mounted file never see."""
    CertificateFolder(tmp_path).init(["swarm"])
    assert modes(tmp_path) == (0o600, 0o600, 0o644)
    before = {name: (tmp_path / name).stat().st_ino for name in ("swarm.key", "swarm.crt", "ca.crt")}
    first = content(tmp_path)
    CertificateFolder(tmp_path).renew(within_days=5000)
    assert {name: (tmp_path / name).stat().st_ino for name in before} == before
    assert all((tmp_path / name).read_bytes() != first[name] for name in before)
    assert modes(tmp_path) == (0o600, 0o600, 0o644)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(first)
    mounted = tmp_path / "mounted"
    CertificateFolder(mounted, mounted=True).init(["swarm"])
    CertificateFolder(mounted).renew(within_days=5000)
    assert modes(mounted) == (0o600, 0o644, 0o644)
    assert stat.S_IMODE(mounted.stat().st_mode) == 0o700


def modes(folder: Path) -> tuple[int, ...]:
    return tuple(
        stat.S_IMODE((folder / name).stat().st_mode) for name in ("ca.key", "swarm.key", "swarm.crt")
    )


def test_a_shorter_content_leaves_nothing_of_the_longer(tmp_path: Path) -> None:
    """Catches the tail of an old certificate behind a new one."""
    certificates = CertificateFolder(tmp_path)
    certificates.init(["swarm"], hosts={"*": [f"host-{number}.example" for number in range(20)]})
    before = (tmp_path / "swarm.crt").stat().st_size
    (tmp_path / "swarm.key").unlink()
    (tmp_path / "swarm.crt").write_bytes((tmp_path / "swarm.crt").read_bytes()[:100] + b"x" * before)
    certificates.renew()
    assert (tmp_path / "swarm.crt").read_bytes().endswith(b"-----END CERTIFICATE-----\n")
    assert (tmp_path / "swarm.crt").stat().st_size < before


def test_many_at_once_make_one_authority(tmp_path: Path) -> None:
    """Catches two commands that each make an authority, of which one's certificates are good for nothing."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: CertificateFolder(tmp_path).init(), range(8)))
    assert sum(change.outcome == "made" for changes in made for change in changes) == 1 + len(SERVICES)
    assert [state.fault for state in CertificateFolder(tmp_path).states()] == [None] * 5


def test_a_host_that_is_not_covered_is_told(tmp_path: Path) -> None:
    """Catches `init --host` that reports success and leaves a certificate without the name."""
    certificates = CertificateFolder(tmp_path)
    certificates.init(["swarm"])
    with pytest.raises(Conflict, match=r"flow\.example"):
        certificates.init(["swarm"], hosts={"*": ["flow.example"]})


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda folder: folder.init(["Swarm"]), InvalidInput),
        (lambda folder: folder.init(["../swarm"]), InvalidInput),
        (lambda folder: folder.init(["ca"]), InvalidInput),
        (lambda folder: folder.init(hosts={"*": ["no host"]}), InvalidInput),
        (lambda folder: folder.init(days=0), InvalidInput),
        (lambda folder: folder.init(authority_days=10**6), InvalidInput),
        (lambda folder: folder.renew(), NotFound),
        (lambda folder: folder.states(), NotFound),
    ],
)
def test_what_is_none_is_refused_and_nothing_written(
    tmp_path: Path, make: Callable[[CertificateFolder], object], error: type[AgenticFlowError]
) -> None:
    """Catches a name that leaves the folder, a certificate for nonsense, and files of a refused command."""
    with pytest.raises(error):
        make(CertificateFolder(tmp_path / "certs"))
    assert not list(tmp_path.glob("certs/*.*"))


def test_an_authority_with_another_key_signs_nothing(tmp_path: Path) -> None:
    """Catches certificates that nobody can verify, made with the key of another authority."""
    certificates = CertificateFolder(tmp_path)
    certificates.init(["swarm"])
    (tmp_path / "ca.key").write_bytes((tmp_path / "swarm.key").read_bytes())
    assert certificates.states()[0].fault == "key_of_another"
    with pytest.raises(DataCorrupted, match=r"ca\.key"):
        certificates.renew(within_days=400)
