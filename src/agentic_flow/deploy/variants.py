"""Stacks beside the main one: a whole platform per model provider, and teams of each topology in parallel.

Both are made of one part, a process that runs every service, extended by what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agentic_flow.core.settings import env_name
from agentic_flow.deploy import infrastructure
from agentic_flow.deploy.parts import (
    DATA_DIR,
    FILES_DIR,
    INPUTS_DIR,
    Part,
    Published,
    Secret,
    Volume,
    tls_environment,
)
from agentic_flow.deploy.plan import (
    IMAGES,
    LIMITS,
    LINGER_S,
    PORTS,
    model_environment,
    provider_addresses,
)
from agentic_flow.deploy.plan import SERVE as _SERVE
from agentic_flow.deploy.spec import Provider, StackSpec

AGENT = "agent"
TRIES, PAUSE_S = 3, 5
"""How often a job that fails is begun again, and the pause before, its own doing: Compose has none."""
_RESULTS = Volume("agent-metrics", DATA_DIR)
_SCRATCH = ("/tmp",)  # noqa: S108 - inside the container
QUESTION = "How is this software organised, and where is its main job done?"
"""What the teams in parallel are asked about the folder of inputs."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A platform of its own with one provider's model."""

    name: str
    provider: Provider
    model: str


VARIANTS = (
    Variant("claude", "claude", "anthropic:"),
    Variant("llama", "openrouter", "openrouter:meta-llama/llama-3.1-8b-instruct"),
    Variant("deepseek", "openrouter", "openrouter:deepseek/deepseek-chat"),
)


@dataclass(frozen=True, slots=True)
class Team:
    """A team to measure: its variables are the ones that operators of such stacks know."""

    name: str
    variables: dict[str, str]


TEAMS = (
    Team("mesh", {"SWARM_TOPOLOGY": "mesh", "MAX_AGENTS": "10", "BATCH_SIZE": "5"}),
    Team("hierarchical", {"SWARM_TOPOLOGY": "hierarchical", "MAX_AGENTS": "8"}),
    Team("ring", {"SWARM_TOPOLOGY": "ring", "MAX_AGENTS": "6"}),
)
BENCHMARK = Team("benchmark", {"BENCHMARK_MODE": "true", "ITERATIONS": "10"})


@dataclass(frozen=True, slots=True)
class SidePlan:
    """A stack beside the main one.

    Args:
        origin: The part that the others extend; it is not part of the stack.
    """

    name: str
    origin: Part
    parts: tuple[Part, ...]
    networks: tuple[tuple[str, ...], ...]
    published: tuple[Published, ...]


def agent(spec: StackSpec) -> Part:
    """One process with every service, its state in a folder: what the variants extend."""
    settings = {
        "data_dir": DATA_DIR,
        "telemetry.log_format": "json",
        "swarm.input_roots": f'["{INPUTS_DIR}"]',
    }
    return Part(
        name=AGENT,
        image=f"{spec.images.prefix}{IMAGES['platform']}",
        tag=spec.images.tag,
        environment={env_name(name): value for name, value in settings.items()},
        reads_inputs=True,
        limits=LIMITS[spec.tier]["platform"],
        stop_s=LINGER_S + int(_SERVE.drain_timeout_s) + 5,
    )


def providers(spec: StackSpec) -> SidePlan:
    """A platform for each provider, behind one proxy on ports 8081 to 8083."""
    origin = agent(spec)
    ports = spec.ports.model_dump()
    published = tuple(Published(one.name, ports[one.name], PORTS["platform"]) for one in VARIANTS)
    parts = [_served(origin, one) for one in VARIANTS]
    proxy = infrastructure.proxy("Caddyfile.providers", published, [part.name for part in parts])
    return SidePlan(
        name=f"{spec.name}-providers",
        origin=origin,
        parts=(proxy, *parts),
        networks=tuple(("proxy", one.name) for one in VARIANTS),
        published=published,
    )


def _served(origin: Part, variant: Variant) -> Part:
    key = {"claude": "anthropic", "openrouter": "openrouter"}[variant.provider]
    secrets = (Secret("owner_key", "api_key"), Secret(f"{key}_api_key", "provider_key"))
    settings = {
        "auth.required": "true",
        "auth.owner_key_file": f"{FILES_DIR}/owner_key",
        f"gateway.{key}.api_key_file": f"{FILES_DIR}/{key}_api_key",
        "serve.host": "0.0.0.0",  # noqa: S104 - a network of its own, with credentials
        "serve.linger_s": str(LINGER_S),
    }
    return replace(
        origin,
        name=variant.name,
        command=("serve", "all"),
        environment={
            **origin.environment,
            **{env_name(name): value for name, value in settings.items()},
            **tls_environment(variant.name),
            **model_environment(variant.provider, variant.model),
        },
        passed=provider_addresses(variant.provider),
        secrets=secrets,
        has_certificate=True,
        data=Volume(f"agent-memory-{variant.name}", DATA_DIR),
        probe=("agentic-flow", "health", "platform"),
        way_out=True,
    )


def parallel(spec: StackSpec) -> SidePlan:
    """Teams of three topologies and a benchmark at the same time, each a job without a network."""
    origin = agent(spec)
    asked = ("run", QUESTION, "--input", INPUTS_DIR, "--json")
    jobs = [_job(origin, team, asked) for team in TEAMS]
    measured = ("swarm", "bench", "--input", INPUTS_DIR, "--task", "index", "--out", f"{DATA_DIR}/results")
    bench = _job(origin, BENCHMARK, measured)
    jobs.append(replace(bench, passed=("ITERATIONS",), data=_RESULTS, scratch=_SCRATCH))
    return SidePlan(f"{spec.name}-parallel", origin, tuple(jobs), networks=(), published=())


def _job(origin: Part, team: Team, command: tuple[str, ...]) -> Part:
    variables = {"MODEL_PROVIDER": "extractive", "ENABLE_PARALLEL_EXECUTION": "true", **team.variables}
    variables[env_name("swarm.failure_pause_s")] = str(PAUSE_S)
    return replace(
        origin,
        name=team.name,
        command=command,
        environment={**origin.environment, **variables},
        scratch=("/tmp", DATA_DIR),  # noqa: S108
        tries=TRIES,
    )
