"""The target compose: a plan as Compose files.

`compose.yaml` is the stack on folders. PostgreSQL and observability are overlays: what the whole plan has
beyond it, so that the two files together are that plan. Providers and parallel teams are stacks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentic_flow.deploy import prometheus, variants
from agentic_flow.deploy.caddy import caddyfile
from agentic_flow.deploy.dashboards import dashboard
from agentic_flow.deploy.parts import DATA_DIR, FILES_GROUP, INPUTS_DIR, Part, Published, certificate_files
from agentic_flow.deploy.plan import StackPlan, checked_plan
from agentic_flow.deploy.spec import ServiceSpec, StackSpec
from agentic_flow.deploy.yaml_text import to_yaml

CERTIFICATES_DIR = "certs"
SECRETS_DIR = "secrets"
"""Folders beside the files, which `agentic-flow up` fills."""
MAIN, POSTGRES, OBSERVABILITY = "compose.yaml", "compose.postgres.yaml", "compose.observability.yaml"
PROVIDERS, PARALLEL, AGENT = "compose.providers.yaml", "compose.parallel.yaml", "compose.agent.yaml"
WORKERS = 2
"""Workers of the PostgreSQL overlay, where the spec names none."""

NOTICE = "# written by agentic-flow deploy render; do not edit"
_MOUNTED = "noexec,nosuid,nodev"
_SCRATCH = f"size=64m,mode=1777,{_MOUNTED}"
# Over a folder of the image Docker takes that folder's mode, not ours, but never its owner.
_OWN_SCRATCH = f"size=256m,uid={FILES_GROUP},gid={FILES_GROUP},mode=0750,{_MOUNTED}"
_PROBE_EVERY_S, _PROBE_TIMEOUT_S, _PROBE_TRIES = 2, 3, 3
# Compose gives up on a stack as soon as one is unhealthy. On a very busy machine a start took 50 s.
_PROBE_START_S = 90
# Merged by Compose as a whole, not item by item.
_WHOLE_LISTS = frozenset({"command", "entrypoint", "test"})


def render(spec: StackSpec) -> dict[str, str]:
    """Every file of a spec: path → text.

    Raises:
        InvalidInput: as `checked_plan`.
    """
    checked_plan(spec)
    base = checked_plan(_on_folders(spec))
    on_postgres = checked_plan(_on_postgres(spec))
    observed = checked_plan(_on_folders(spec).model_copy(update={"observability": True}))
    main = document(base.spec.name, base.parts, base.networks, base.published, spec)
    files = {
        MAIN: _file(main, "The main stack: platform, AgentDB and swarm coordinator behind a proxy."),
        POSTGRES: _file(
            _overlay(main, _whole(on_postgres)),
            "PostgreSQL with pgvector as the store, and workers:",
            f"docker compose -f {MAIN} -f {POSTGRES} up",
        ),
        OBSERVABILITY: _file(
            _overlay(main, _whole(observed)),
            "Prometheus with rules, and an OpenTelemetry collector:",
            f"docker compose -f {MAIN} [-f {POSTGRES}] -f {OBSERVABILITY} up",
        ),
        "Caddyfile": caddyfile(base.published, NOTICE),
        "Caddyfile.observability": caddyfile(observed.published, NOTICE),
        **_sides(spec),
        "observability/prometheus.yml": to_yaml(prometheus.configuration(), NOTICE),
        "observability/alerts.yml": to_yaml(prometheus.rules(), NOTICE),
        "observability/collector.yaml": to_yaml(prometheus.collector(), NOTICE),
        "observability/dashboards/agentic-flow.json": dashboard(),
    }
    return dict(sorted(files.items()))


def files_of(spec: StackSpec) -> tuple[str, ...]:
    """The Compose files that together are the stack of this spec, in the order of `-f`."""
    overlays = (POSTGRES,) * (spec.store == "postgresql") + (OBSERVABILITY,) * spec.observability
    return (MAIN, *overlays)


def _on_folders(spec: StackSpec) -> StackSpec:
    services = {name: ServiceSpec() for name in ("platform", "agentdb", "swarm")}
    return spec.model_copy(update={"store": "directory", "services": services, "observability": False})


def _on_postgres(spec: StackSpec) -> StackSpec:
    services = dict(spec.services)
    services.setdefault("worker", ServiceSpec(replicas=WORKERS))
    return spec.model_copy(update={"store": "postgresql", "services": services, "observability": False})


def _sides(spec: StackSpec) -> dict[str, str]:
    providers, parallel = variants.providers(spec), variants.parallel(spec)
    origin = _service(providers.origin, (), (), spec)
    return {
        AGENT: _file(
            {"services": {variants.AGENT: origin}},
            f"One process with every service. {PROVIDERS} and {PARALLEL} extend it.",
        ),
        PROVIDERS: _file(
            _side(providers, origin, spec),
            "A platform for each model provider, behind one proxy:",
            f"docker compose -f {PROVIDERS} up",
        ),
        PARALLEL: _file(
            _side(parallel, origin, spec),
            "Teams of each topology and a benchmark in parallel, on the folder of inputs, without a network:",
            f"docker compose -f {PARALLEL} up",
        ),
        "Caddyfile.providers": caddyfile(providers.published, NOTICE),
    }


def _file(data: Mapping[str, Any], *about: str) -> str:
    return to_yaml(data, "\n".join([NOTICE, *(f"# {line}" for line in about)]))


def _whole(plan: StackPlan) -> dict[str, Any]:
    return document(plan.spec.name, plan.parts, plan.networks, plan.published, plan.spec)


def document(
    name: str,
    parts: Sequence[Part],
    networks: Sequence[tuple[str, ...]],
    published: Sequence[Published],
    spec: StackSpec,
) -> dict[str, Any]:
    """One Compose document with everything in it.

    Args:
        name: The project's.
        parts: Its services.
        networks: Groups of parts that share an internal network.
        published: Ports of the proxy.
        spec: For the host's address and folders.
    """
    services = {part.name: _service(part, networks, published, spec) for part in parts}
    found: dict[str, Any] = {"name": name, "services": services}
    top: dict[str, Any] = {
        "networks": _networks(parts, networks, published),
        "volumes": {part.data.name: {} for part in parts if part.data is not None},
        "secrets": _secret_files(parts),
        "configs": {
            _config_name(inside): {"file": f"./{path}"}
            for part in parts
            for inside, path in part.files.items()
        },
    }
    found.update({key: value for key, value in top.items() if value})
    return found


def _side(side: variants.SidePlan, origin: Mapping[str, Any], spec: StackSpec) -> dict[str, Any]:
    whole = document(side.name, side.parts, side.networks, side.published, spec)
    for part in side.parts:
        if part.ours:
            beyond = _overlay(origin, whole["services"][part.name])
            whole["services"][part.name] = {
                "extends": {"file": AGENT, "service": variants.AGENT},
                **beyond,
            }
    return whole


def _service(
    part: Part,
    networks: Sequence[tuple[str, ...]],
    published: Sequence[Published],
    spec: StackSpec,
) -> dict[str, Any]:
    found: dict[str, Any] = {"image": f"{part.image}:{_tag(part)}"}
    if part.entry is not None:
        found["entrypoint"] = _literal(part.entry)
    if part.command is not None:
        found["command"] = _literal(part.command)
    found["init"] = False  # tini is in the image
    if part.user is not None:
        found["user"] = part.user
    if part.groups:
        found["group_add"] = [str(group) for group in part.groups]
    found |= {"read_only": True, "cap_drop": ["ALL"]}
    if part.capabilities:
        found["cap_add"] = list(part.capabilities)
    found["security_opt"] = ["no-new-privileges:true"]
    settings = {name: value.replace("$", "$$") for name, value in part.environment.items()}
    environment = {**settings, **{name: f"${{{name}:-{settings.get(name, '')}}}" for name in part.passed}}
    if environment:
        found["environment"] = environment
    if secrets := _secret_names(part):
        found["secrets"] = secrets
    if part.files:
        found["configs"] = [{"source": _config_name(path), "target": path} for path in part.files]
    if volumes := _mounts(part, spec):
        found["volumes"] = volumes
    found["tmpfs"] = [f"{path}:{_OWN_SCRATCH if path == DATA_DIR else _SCRATCH}" for path in part.scratch]
    joined = _joined(part, networks, published)
    if joined:
        found["networks"] = {name: {} for name in joined}
    elif part.tries is not None:
        found["network_mode"] = "none"
    if part.name == "proxy":
        host = f"[{spec.address}]" if ":" in spec.address else spec.address
        found["ports"] = [f"{host}:{one.port}:{one.port}" for one in published]
    if part.waits_for:
        found["depends_on"] = {name: {"condition": "service_healthy"} for name in part.waits_for}
    if part.probe is not None:
        found["healthcheck"] = _probe(part.probe)
    found["restart"] = "unless-stopped" if part.tries is None else f"on-failure:{part.tries}"
    found["stop_grace_period"] = f"{part.stop_s}s"
    found["deploy"] = _deploy(part)
    found["logging"] = {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}
    return found


def _literal(words: Sequence[str]) -> list[str]:
    """Words in which Compose is to put nothing in place of a `$`."""
    return [word.replace("$", "$$") for word in words]


def _tag(part: Part) -> str:
    return f"${{IMAGE_TAG:-{part.tag}}}" if part.ours else part.tag


def _probe(command: Sequence[str]) -> dict[str, Any]:
    return {
        "test": ["CMD", *_literal(command)],
        "interval": f"{_PROBE_EVERY_S}s",
        "timeout": f"{_PROBE_TIMEOUT_S}s",
        "retries": _PROBE_TRIES,
        "start_period": f"{_PROBE_START_S}s",
    }


def _deploy(part: Part) -> dict[str, Any]:
    limits = part.limits
    return {
        **({"replicas": part.replicas} if part.replicas != 1 else {}),
        "resources": {
            "limits": {
                "cpus": f"{limits.cpus:g}",
                "memory": f"{limits.memory_mib}M",
                "pids": limits.pids,
            }
        },
    }


def _mounts(part: Part, spec: StackSpec) -> list[Any]:
    found: list[Any] = []
    if part.data is not None:
        found.append(f"{part.data.name}:{part.data.path}")
    if part.reads_inputs:
        found.append(
            {
                "type": "bind",
                "source": f"${{INPUTS_DIR:-{spec.inputs_dir}}}",
                "target": INPUTS_DIR,
                "read_only": True,
                "bind": {"create_host_path": True},
            }
        )
    return found


def _secret_names(part: Part) -> list[str]:
    paths = certificate_files(part.name) if part.has_certificate else ()
    return [*(path.rpartition("/")[2] for path in paths), *(secret.name for secret in part.secrets)]


def _secret_files(parts: Sequence[Part]) -> dict[str, Any]:
    certificates = {
        path.rpartition("/")[2]: {"file": f"./{CERTIFICATES_DIR}/{path.rpartition('/')[2]}"}
        for part in parts
        if part.has_certificate
        for path in certificate_files(part.name)
    }
    others = {
        secret.name: {"file": f"./{SECRETS_DIR}/{secret.name}"} for part in parts for secret in part.secrets
    }
    return {**certificates, **others}


def _config_name(path: str) -> str:
    return path.rpartition("/")[2]


def network_name(group: Sequence[str]) -> str:
    """The internal network of a group of parts."""
    return "-".join(group)


def _joined(part: Part, networks: Sequence[tuple[str, ...]], published: Sequence[Published]) -> list[str]:
    found = [network_name(group) for group in networks if part.name in group]
    if part.name == "proxy" and published:
        found.append("ingress")
    if part.way_out:
        found.append(f"egress-{part.name}")
    return found


def _networks(
    parts: Sequence[Part], networks: Sequence[tuple[str, ...]], published: Sequence[Published]
) -> dict[str, Any]:
    internal = {network_name(group): {"internal": True} for group in networks}
    # Docker publishes no port of an internal network; nobody else is on this one.
    ingress: dict[str, Any] = {"ingress": {}} if published else {}
    return {**internal, **ingress, **{f"egress-{part.name}": {} for part in parts if part.way_out}}


def _overlay(base: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What to lay over `base` so that Compose's merge of the two has all that `whole` has."""
    found: dict[str, Any] = {}
    for key, value in whole.items():
        if key not in base:
            found[key] = value
            continue
        before = base[key]
        if before == value:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            found[key] = _overlay(cast(Mapping[str, Any], before), cast(Mapping[str, Any], value))
        elif isinstance(value, list) and isinstance(before, list) and key not in _WHOLE_LISTS:
            found[key] = [item for item in cast(list[Any], value) if item not in before]
        else:
            found[key] = value
    return found
