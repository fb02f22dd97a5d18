"""What a plan is made of: the parts of a stack, and what they keep, show and are allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agentic_flow.core.settings import env_name

DATA_DIR = "/data"
"""The one folder that a part of ours writes to for good."""
FILES_DIR = "/run/secrets"
"""Where secrets and certificates are, one file each, inside a part."""
INPUTS_DIR = "/inputs"
"""Where the folders are that runs may read, inside a part."""

FILES_GROUP = 10_001
"""Group of our images' user: who is in it may read the keys of certificates."""

SecretKind = Literal["api_key", "provider_key", "password", "database_url"]


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret by its file's name. `kind` says how it is made: an `api_key` and a `password` at random, a
    `database_url` from the password, a `provider_key` by the provider."""

    name: str
    kind: SecretKind


@dataclass(frozen=True, slots=True)
class Volume:
    """Data that outlives its part, and where it is inside."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one replica."""

    memory_mib: int
    cpus: float
    pids: int


@dataclass(frozen=True, slots=True)
class Published:
    """A port of the host, and the part behind it.

    Args:
        part: Who answers.
        port: The host's port.
        inner_port: The part's own.
        tls: Whether the part speaks TLS within the stack.
    """

    part: str
    port: int
    inner_port: int
    tls: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """One program of the stack.

    Args:
        command: Its arguments; None: the image's own.
        entry: The program in place of the image's own.
        environment: Settings by their variables.
        passed: Variables of the operator's environment that it takes as they are; where one is absent or
            empty, that of `environment` holds.
        has_certificate: Whether it shows one of its own: `ca.crt`, `<name>.crt`, `<name>.key`.
        files: Content that it reads: path inside → path among the rendered files.
        scratch: Folders in memory, gone with the part.
        user: Numbers of user and group, where the image does not settle it.
        groups: Numbers of further groups, such as the one that may read certificates' keys.
        capabilities: What the kernel grants beyond nothing.
        probe: Command that tells whether it is ready; None: the image's own, or none.
        stop_s: Seconds from the request to stop to the kill.
        waits_for: Parts that must be ready before it starts.
        ours: Whether it is one of our images.
        reload: Command within it that makes it take up renewed certificates; None: it does so by itself.
        tries: How often a job that fails is begun again; None: it is no job and runs for ever.
    """

    name: str
    image: str
    tag: str
    limits: Limits
    command: tuple[str, ...] | None = None
    entry: tuple[str, ...] | None = None
    replicas: int = 1
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    passed: tuple[str, ...] = ()
    secrets: tuple[Secret, ...] = ()
    has_certificate: bool = False
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    data: Volume | None = None
    scratch: tuple[str, ...] = ("/tmp",)  # noqa: S108 - inside the container
    reads_inputs: bool = False
    user: str | None = None
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()
    probe: tuple[str, ...] | None = None
    stop_s: int = 15
    way_out: bool = False
    waits_for: tuple[str, ...] = ()
    ours: bool = True
    reload: tuple[str, ...] | None = None
    tries: int | None = None


def certificate_files(name: str) -> tuple[str, str, str]:
    """Paths inside a part of the authorities, its certificate and its key."""
    return f"{FILES_DIR}/ca.crt", f"{FILES_DIR}/{name}.crt", f"{FILES_DIR}/{name}.key"


def tls_environment(name: str) -> dict[str, str]:
    """Settings of a service of ours that speaks TLS with its neighbours only, both ways."""
    ca, certificate, key = certificate_files(name)
    settings = {
        "tls.certificate_file": certificate,
        "tls.key_file": key,
        "tls.ca_file": ca,
        "tls.mutual": "true",
    }
    return {env_name(setting): value for setting, value in settings.items()}


def file_setting(name: str) -> str:
    """The setting that names the file of a service's database address."""
    section = {"platform": "gateway", "agentdb": "agentdb", "swarm": "swarm", "worker": "swarm"}[name]
    return f"{section}.database_url_file"
