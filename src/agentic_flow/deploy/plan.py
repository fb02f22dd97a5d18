"""The checked plan: what follows from a spec, still free of any target's words.

Every part of the stack with its program, settings, secrets, data, bounds and neighbours. A spec that makes
no sense is refused here, with a hint, and nowhere later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.settings import ServeSettings, SwarmSettings, env_name
from agentic_flow.deploy import infrastructure
from agentic_flow.deploy.edges import OURS, WAYS_OUT, Edge, edges_among, segments
from agentic_flow.deploy.parts import (
    DATA_DIR,
    FILES_DIR,
    INPUTS_DIR,
    Limits,
    Part,
    Published,
    Secret,
    Volume,
    file_setting,
    tls_environment,
)
from agentic_flow.deploy.spec import Provider, StackSpec, Tier

SERVE = ServeSettings()
SWARM = SwarmSettings()
PORTS = {
    "platform": SERVE.platform_port,
    "agentdb": SERVE.agentdb_port,
    "swarm": SERVE.swarm_port,
    "worker": infrastructure.WORKER_PORT,
}
"""Port of each service of ours within the stack; a worker's is for health and metrics alone."""

INSTANCES_MAX = {"small": 3, "medium": 10, "large": 50}
"""Most replicas of one service, by tier."""
LIMITS: dict[Tier, dict[str, Limits]] = {
    "small": {
        "platform": Limits(1024, 1.0, 512),
        "agentdb": Limits(256, 1.0, 256),
        "swarm": Limits(512, 1.0, 512),
        "worker": Limits(512, 1.0, 512),
    },
    "medium": {
        "platform": Limits(2048, 2.0, 512),
        "agentdb": Limits(1024, 2.0, 256),
        "swarm": Limits(2048, 2.0, 512),
        "worker": Limits(2048, 2.0, 512),
    },
    "large": {
        "platform": Limits(4096, 4.0, 1024),
        "agentdb": Limits(2048, 4.0, 512),
        "swarm": Limits(4096, 4.0, 1024),
        "worker": Limits(4096, 4.0, 1024),
    },
}
_INDEX_SHARE = 0.4
"""Part of AgentDB's memory that indexes may take; the rest is the process, SQLite's pages and requests."""
LINGER_S = 3
"""How long a service that is to stop takes requests still: the proxy sees it after half a second and keeps no
connection idle for more than two, as callers of ours do."""
_GRACE_S = 5
"""Seconds past the drain before a part is killed."""

IMAGES = {
    "platform": "agentic-flow",
    "agentdb": "agentic-flow-agentdb",
    "swarm": "agentic-flow-swarm",
    "worker": "agentic-flow-swarm",
}
VOLUMES = {"platform": "platform-data", "agentdb": "agent-memory", "swarm": "swarm-data"}
"""What a service keeps, under the names that operators of such stacks know."""
PROVIDER_KEYS = {
    "local": (),
    "claude": ("anthropic",),
    "openrouter": ("openrouter",),
    "multi-model": ("anthropic", "openrouter"),
}
"""Providers whose keys a variant needs."""
_DEFAULT_PROVIDER = {"local": "extractive", "claude": "anthropic", "openrouter": "openrouter"}
FAMILIAR = ("SWARM_TOPOLOGY", "MAX_AGENTS", "BATCH_SIZE", "ENABLE_PARALLEL_EXECUTION")
"""Variables of the operator's environment that the coordinator and its workers take as they are."""


@dataclass(frozen=True, slots=True)
class StackPlan:
    """A spec that makes sense, worked out."""

    spec: StackSpec
    parts: tuple[Part, ...]
    edges: tuple[Edge, ...]
    networks: tuple[tuple[str, ...], ...]
    published: tuple[Published, ...]
    secrets: tuple[Secret, ...]
    volumes: tuple[Volume, ...]

    def part(self, name: str) -> Part:
        """The part of this name; KeyError when there is none."""
        return next(part for part in self.parts if part.name == name)

    @property
    def certificates(self) -> tuple[str, ...]:
        """The parts that show a certificate."""
        return tuple(part.name for part in self.parts if part.has_certificate)


def checked_plan(spec: StackSpec) -> StackPlan:
    """The plan of a spec.

    Raises:
        InvalidInput: the spec contradicts itself; says what to change.
    """
    _check_services(spec)
    published = _published(spec)
    _check_ports(spec)
    names = [name for name in OURS if _replicas(spec, name)]
    extra = ["postgres"] * (spec.store == "postgresql") + ["prometheus", "collector"] * spec.observability
    present = ("proxy", *names, *extra)
    edges = edges_among(present, published={one.part for one in published})
    parts = [_service(spec, name) for name in names]
    if spec.store == "postgresql":
        parts.append(infrastructure.postgres(spec.tier))
    if spec.observability:
        parts += [infrastructure.prometheus(spec.tier), infrastructure.collector(spec.tier)]
    parts.insert(0, infrastructure.proxy(_config(spec), published, [part.name for part in parts]))
    return StackPlan(
        spec=spec,
        parts=tuple(parts),
        edges=edges,
        networks=segments(edges),
        published=published,
        secrets=_distinct_secrets(parts),
        volumes=tuple(part.data for part in parts if part.data is not None),
    )


def _replicas(spec: StackSpec, name: str) -> int:
    service = spec.services.get(name)
    return service.replicas if service is not None else 0


def _refuse(message: str, hint: str) -> NoReturn:
    raise InvalidInput(message, hint=hint)


def _check_services(spec: StackSpec) -> None:
    for name in spec.services:
        if name not in OURS:
            _refuse(f"{name!r} is not a service", f"use {', '.join(OURS)}")
    for name in ("platform", "agentdb", "swarm"):
        if not _replicas(spec, name):
            _refuse(
                f"the stack has no {name}", f"add it to services, or leave out its `replicas: 0`: {name!r}"
            )
    most = INSTANCES_MAX[spec.tier]
    for name, service in spec.services.items():
        if service.replicas > most:
            _refuse(
                f"services.{name}.replicas = {service.replicas!r} is more than the tier {spec.tier!r} has",
                f"use at most {most}, or a larger tier",
            )
        if spec.store == "directory" and (service.replicas > 1 or (name == "worker" and service.replicas)):
            what = "a worker" if name == "worker" else f"{service.replicas} of {name}"
            _refuse(
                f"{what} with store = {spec.store!r}: a folder of one service is not shared",
                "needs postgresql://: set `store: postgresql`, or leave the replicas out",
            )


def _published(spec: StackSpec) -> tuple[Published, ...]:
    ports = {"platform": spec.ports.platform, "swarm": spec.ports.swarm, "agentdb": spec.ports.agentdb}
    found = [Published(name, port, PORTS[name]) for name, port in ports.items() if port is not None]
    if spec.observability and spec.ports.metrics is not None:
        found.append(Published("prometheus", spec.ports.metrics, infrastructure.PROMETHEUS_PORT, tls=False))
    if not found:
        _refuse("no port is published, so nobody can reach the stack", "set ports.platform")
    return tuple(found)


def _check_ports(spec: StackSpec) -> None:
    seen: dict[int, str] = {}
    for name, port in spec.ports.model_dump().items():
        if port is None:
            continue
        if port in seen:
            _refuse(f"ports.{seen[port]} and ports.{name} are both {port!r}", "give each a port of its own")
        seen[port] = name


def _service(spec: StackSpec, name: str) -> Part:
    environment, secrets = _environment(spec, name)
    linger_s = _linger_s(spec, name)
    if linger_s:
        environment[env_name("serve.linger_s")] = str(linger_s)
    limits = LIMITS[spec.tier][name]
    drain_s = SWARM.drain_s if name == "worker" else SERVE.drain_timeout_s
    keeps = VOLUMES.get(name)
    return Part(
        name=name,
        image=f"{spec.images.prefix}{IMAGES[name]}",
        tag=spec.images.tag,
        command=("worker",) if name == "worker" else ("serve", name),
        replicas=_replicas(spec, name),
        environment=environment,
        passed=_passed(spec, name),
        secrets=secrets,
        has_certificate=True,
        data=Volume(keeps, DATA_DIR) if keeps else None,
        # A worker keeps nothing of its own: its runs are in the database.
        scratch=("/tmp",) if keeps else ("/tmp", DATA_DIR),  # noqa: S108 - inside the container
        reads_inputs=name in ("swarm", "worker"),
        limits=limits,
        probe=("agentic-flow", "health", name),
        stop_s=linger_s + int(drain_s) + _GRACE_S,
        way_out=name in WAYS_OUT,
        waits_for=_waits_for(spec, name),
    )


def _linger_s(spec: StackSpec, name: str) -> int:
    """Whoever is called by the proxy lingers, and whoever another takes the place of while it stops."""
    is_published = getattr(spec.ports, name, None) is not None
    return LINGER_S if name != "worker" and (is_published or spec.store == "postgresql") else 0


def _waits_for(spec: StackSpec, name: str) -> tuple[str, ...]:
    """Whose health a part waits for. Platform, AgentDB and swarm need each other and start together: each
    is ready once it reaches the two others."""
    found = ("postgres",) if spec.store == "postgresql" else ()
    return (*found, "platform", "agentdb") if name == "worker" else found


def _environment(spec: StackSpec, name: str) -> tuple[dict[str, str], tuple[Secret, ...]]:
    own = {
        "data_dir": DATA_DIR,
        "auth.required": "true",
        "telemetry.log_format": "json",
    }
    environment: dict[str, str] = {env_name(setting): value for setting, value in own.items()}
    secrets: list[Secret] = []

    def has(secret: Secret, *settings: str) -> None:
        secrets.append(secret)
        environment.update({env_name(setting): f"{FILES_DIR}/{secret.name}" for setting in settings})

    environment[env_name("serve.host")] = "0.0.0.0"  # noqa: S104 - segmented networks, with credentials
    environment[env_name(f"serve.{name}_port")] = str(PORTS[name])
    environment |= tls_environment(name)
    for peer in _peers(name):
        environment[env_name(f"peers.{peer}_url")] = f"https://{peer}:{PORTS[peer]}"
    if name == "platform":
        has(Secret("owner_key", "api_key"), "auth.owner_key_file")
        has(Secret("service_key", "api_key"), "auth.service_key_file")
        environment |= model_environment(spec.provider, spec.model)
        for provider in PROVIDER_KEYS[spec.provider]:
            has(Secret(f"{provider}_api_key", "provider_key"), f"gateway.{provider}.api_key_file")
    if name in ("swarm", "worker"):
        has(Secret("service_key", "api_key"), "peers.token_file")
        environment[env_name("swarm.input_roots")] = f'["{INPUTS_DIR}"]'
    if name == "agentdb":
        memory_bytes = LIMITS[spec.tier][name].memory_mib * 1024 * 1024
        environment[env_name("agentdb.index_memory_max_bytes")] = str(int(memory_bytes * _INDEX_SHARE))
    if spec.store == "postgresql":
        has(Secret("database_url", "database_url"), file_setting(name))
        if name == "swarm" and _replicas(spec, "worker"):
            environment[env_name("swarm.runs_parallel_max")] = "0"  # it accepts, workers do
    if spec.observability:
        environment |= infrastructure.trace_environment(name)
        environment[env_name("telemetry.otlp_endpoint")] = infrastructure.COLLECTOR_URL
    return environment, tuple(secrets)


def _peers(name: str) -> tuple[str, ...]:
    """The services that a service calls, and so must find."""
    return {
        "platform": ("agentdb", "swarm"),
        "agentdb": ("platform",),
        "swarm": ("platform", "agentdb"),
        "worker": ("platform", "agentdb"),
    }[name]


def model_environment(provider: Provider, model: str | None) -> dict[str, str]:
    """The settings that choose the default model."""
    if model is not None:
        return {env_name("gateway.model"): model}
    return {"MODEL_PROVIDER": _DEFAULT_PROVIDER[provider]} if provider in _DEFAULT_PROVIDER else {}


def provider_addresses(provider: Provider) -> tuple[str, ...]:
    """The operator's variables that may point providers elsewhere, such as to a gateway of the house."""
    return tuple(f"{name.upper()}_BASE_URL" for name in PROVIDER_KEYS[provider])


def _passed(spec: StackSpec, name: str) -> tuple[str, ...]:
    return (
        provider_addresses(spec.provider) if name == "platform" else FAMILIAR * (name in ("swarm", "worker"))
    )


def _config(spec: StackSpec) -> str:
    return "Caddyfile.observability" if spec.observability else "Caddyfile"


def _distinct_secrets(parts: list[Part]) -> tuple[Secret, ...]:
    return tuple(dict.fromkeys(secret for part in parts for secret in part.secrets))
