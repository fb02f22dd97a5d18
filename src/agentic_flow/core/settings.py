"""All settings, read once: flag > environment > `.env` > `./agentic-flow.toml` > user config > default.

Each service gets its own section and no more. Every section refuses unknown keys; an environment variable
that starts with `AGENTIC_FLOW_` and names no setting is refused too, because a typing error that is silently
ignored is worse than one that stops the program. Secrets have a `_file` form beside the plain one.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from agentic_flow.core.errors import Conflict, InvalidInput, InvalidSettings, PathNotFound

ENV_PREFIX = "AGENTIC_FLOW_"
CONFIG_FILE = "agentic-flow.toml"

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

MIB = 1024 * 1024


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeSettings(Section):
    """Where the services listen. Port 0 takes any free port."""

    host: str = Field(
        default="127.0.0.1", description="Address to bind; wider than loopback demands auth.required."
    )
    platform_port: Port = Field(default=3000, description="Platform: runs API, gateway, identity.")
    agentdb_port: Port = Field(default=5432, description="AgentDB.")
    swarm_port: Port = Field(default=9000, description="Swarm coordinator.")
    worker_port: Port | None = Field(
        default=None, description="Health and metrics of `agentic-flow worker`. Unset: it has no port."
    )
    drain_timeout_s: Positive = Field(
        default=10.0, description="Seconds given to requests in flight after SIGTERM."
    )
    linger_s: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Seconds after SIGTERM for which the ports stay open, while health says that they close "
        "and answers ask for new connections. For services behind a proxy or called by others; callers must "
        "keep no connection idle for so long.",
    )
    body_max_bytes: Count = Field(default=16 * MIB, description="Largest accepted request body.")
    requests_per_minute: Count = Field(default=6000, description="Rate limit per tenant and service.")
    disk_free_min_bytes: Count = Field(
        default=16 * MIB,
        description="Free space of the data folder's disk below which services say that they are not ready.",
    )


class PeerSettings(Section):
    """Where a neighbour runs when it is not in this process. Unset: in this process."""

    platform_url: str | None = Field(default=None, description="Base URL of the platform service.")
    agentdb_url: str | None = Field(default=None, description="Base URL of the AgentDB service.")
    swarm_url: str | None = Field(default=None, description="Base URL of the swarm coordinator.")
    token: SecretStr | None = Field(default=None, description="API key this process shows to its neighbours.")
    token_file: Path | None = Field(
        default=None, description="File that holds the API key; re-read on change."
    )
    timeout_s: Positive = Field(default=30.0, description="Deadline of one call to a neighbour.")
    attempts: Count = Field(default=3, description="Tries of one idempotent call, the first included.")
    breaker_failures: Count = Field(default=5, description="Failures in a row that open the circuit.")
    breaker_open_s: Positive = Field(
        default=5.0,
        description="Seconds before an open circuit is probed, and before a probe without an answer is "
        "followed by another.",
    )


class AuthSettings(Section):
    """Who may call."""

    required: bool = Field(
        default=False, description="Demand a credential on every route but health and metrics."
    )
    token_ttl_s: Positive = Field(
        default=300.0, description="Lifetime of the tokens that the platform issues."
    )
    revocation_poll_s: Positive = Field(default=1.0, description="How often services fetch revocations.")
    owner_key_file: Path | None = Field(
        default=None,
        description="File with a key that the platform takes as the owner's, instead of making one and "
        "showing it; a new one in its place replaces it.",
    )
    service_key_file: Path | None = Field(
        default=None,
        description="The same for the key that services show (their peers.token_file): it acts for others.",
    )


class TlsSettings(Section):
    """Certificates for every port, and for calls to neighbours."""

    certificate_file: Path | None = Field(default=None, description="PEM certificate chain of the servers.")
    key_file: Path | None = Field(default=None, description="PEM private key of the servers.")
    ca_file: Path | None = Field(
        default=None, description="PEM bundle that neighbours' certificates must chain to."
    )
    mutual: bool = Field(default=False, description="Demand a client certificate signed by tls.ca_file.")
    reload_s: Positive = Field(
        default=5.0, description="How often these files are looked at; renewed ones are taken up then."
    )

    @model_validator(mode="after")
    def _complete(self) -> TlsSettings:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together: set both or none")
        if self.mutual and not (self.certificate_file and self.ca_file):
            raise ValueError("mutual needs certificate_file, key_file and ca_file")
        return self


class ProviderSettings(Section):
    """One model provider."""

    base_url: str = Field(default="", description="API root, without the endpoint's name.")
    api_key: SecretStr | None = Field(default=None, description="Key; the vendor's usual variable works too.")
    api_key_file: Path | None = Field(default=None, description="File that holds the key; re-read on change.")


class OnnxSettings(Section):
    """Models in folders on this machine, run by onnxruntime-genai (the extra `onnx-genai`)."""

    models_dir: Path | None = Field(
        default=None, description="Folder of model folders, each with a `genai_config.json`."
    )
    threads: Count | None = Field(default=None, description="Threads of a model. Unset: the library decides.")
    concurrent_max: Count = Field(default=2, description="Answers generated at once; more of them wait.")
    loaded_max: Count = Field(default=1, description="Models kept in memory at once.")


class GatewaySettings(Section):
    """Models and how they are called."""

    model: str | None = Field(
        default=None,
        description="Default model, `provider:model` or a bare name. Unset: the first provider's.",
    )
    anthropic: ProviderSettings = Field(
        default=ProviderSettings(base_url="https://api.anthropic.com"), description="Anthropic."
    )
    openrouter: ProviderSettings = Field(
        default=ProviderSettings(base_url="https://openrouter.ai/api/v1"), description="OpenRouter."
    )
    openai: ProviderSettings = Field(
        default=ProviderSettings(base_url="https://api.openai.com/v1"),
        description="OpenAI, or any endpoint that speaks its Chat Completions (Ollama, vLLM, llama.cpp).",
    )
    onnx: OnnxSettings = Field(default=OnnxSettings(), description="Local models through onnxruntime-genai.")
    database_url: SecretStr | None = Field(
        default=None,
        description="`postgresql://…` of policies, budgets and usage, for several gateways. Unset: SQLite in "
        "the data folder.",
    )
    database_url_file: Path | None = Field(
        default=None, description="File that holds the URL, in place of database_url; read at the start."
    )
    stream: bool = Field(default=True, description="Use the provider's streaming format for agents' calls.")
    timeout_s: Positive = Field(default=120.0, description="Deadline of one provider call, retries included.")
    idle_timeout_s: Positive = Field(default=60.0, description="Longest silence within an answer.")
    attempts: Count = Field(default=4, description="Tries of one provider call, the first included.")
    backoff_s: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="First pause between tries; doubles."
    )
    response_max_bytes: Count = Field(default=32 * MIB, description="Largest accepted provider answer.")
    concurrent_max: Count = Field(default=512, description="Calls under way at once; more of them wait.")
    queue_max: Annotated[int, Field(ge=0)] = Field(
        default=1024, description="Calls that may wait for their turn; more are refused at once with 503."
    )
    queue_timeout_s: Positive = Field(default=10.0, description="Longest wait for a call's turn.")
    breaker_open_s: Positive = Field(
        default=5.0, description="First pause of a provider's key and model that fails; doubles up to 60 s."
    )
    slow_call_s: Positive = Field(
        default=60.0,
        description="A first token that takes longer counts as a failure for the breaker, and a route then "
        "asks its next target.",
    )
    prices_usd_per_mtok: dict[str, tuple[float, float]] = Field(
        default_factory=dict[str, tuple[float, float]],
        description="Own prices: model → (input, output), USD per million tokens.",
    )


class EmbeddingSettings(Section):
    """Where the embedders `openai` and `onnx-minilm` find their model."""

    base_url: str = Field(
        default="https://api.openai.com/v1", description="OpenAI-compatible endpoint, without `/embeddings`."
    )
    model: str = Field(default="text-embedding-3-small", description="Model that the endpoint embeds with.")
    dimension: Annotated[int, Field(ge=1, le=16_384)] | None = Field(
        default=None, description="Dimension to ask the endpoint for. Unset: the model's own."
    )
    api_key: SecretStr | None = Field(default=None, description="Key of the endpoint.")
    api_key_file: Path | None = Field(default=None, description="File that holds the key; re-read on change.")
    timeout_s: Positive = Field(default=30.0, description="Deadline of one call to the endpoint.")
    attempts: Count = Field(default=4, description="Tries of one call, the first included.")
    batch_max: Count = Field(default=128, description="Most texts of one call.")


class AgentDBSettings(Section):
    """The vector database and the reading of folders."""

    database_url: SecretStr | None = Field(
        default=None,
        description="`postgresql://…` with pgvector as the store. Unset: SQLite in the data folder.",
    )
    database_url_file: Path | None = Field(
        default=None, description="File that holds the URL, in place of database_url; read at the start."
    )
    replica_url: SecretStr | None = Field(
        default=None, description="`postgresql://…` of a read replica that searches may use."
    )
    replica_url_file: Path | None = Field(
        default=None, description="File that holds the URL, in place of replica_url; read at the start."
    )
    pool_max: Count = Field(default=10, description="Most PostgreSQL connections of one process.")
    embedder: str = Field(
        default="hashed-ngram",
        description="Embedder of new namespaces: hashed-ngram, openai, onnx-minilm, or a plug-in's name.",
    )
    embedding_dimension: Annotated[int, Field(ge=256, le=4096)] = Field(
        default=1024, description="Dimension of the hashed n-gram embedder."
    )
    embedding: EmbeddingSettings = EmbeddingSettings()
    index: Literal["auto", "exact", "scan", "graph"] = Field(
        default="auto", description="Index tier of every namespace; auto chooses by its number of rows."
    )
    scan_library: Literal["turbovec", "faiss"] = Field(
        default="turbovec",
        description="What scans: turbovec in 4-bit codes, or faiss, slower and larger; faiss serves where "
        "turbovec cannot (Euclidean distance, fewer than 64 dimensions).",
    )
    scan_rows_min: Count = Field(
        default=4000, description="Rows from which auto scans quantized vectors instead of all of them."
    )
    graph_rows_min: Count = Field(default=200_000, description="Rows from which auto uses a graph.")
    index_memory_max_bytes: Count = Field(
        default=2048 * MIB, description="Indexes kept in memory; the least recently used are let go past it."
    )
    history_dir: Path | None = Field(
        default=None,
        description="Folder for the sealed log of all changes, for point-in-time recovery. Unset: none.",
    )
    history_seal_s: Positive = Field(
        default=10.0, description="Longest time that a change waits to be sealed into the history."
    )
    backups_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Folders in which backups are kept, up to four deep. Erasing a tenant says which of them "
        "still hold it, beside those that `db backup` of this data folder made elsewhere.",
    )
    query_timeout_s: Positive = Field(default=30.0, description="Longest time of one search.")
    queries_max: Count = Field(default=256, description="Most queries of one batched search.")
    file_max_bytes: Count = Field(default=16 * MIB, description="Larger files are skipped and counted.")
    files_max: Count = Field(default=200_000, description="Most files of one ingestion.")
    chunk_lines_max: Count = Field(default=60, description="Most lines of one chunk.")
    chunk_chars_max: Count = Field(default=4000, description="Most characters of one chunk.")


class ToolsSettings(Section):
    """Limits and policy of tool calls."""

    timeout_s: Positive = Field(default=30.0, description="Deadline of one tool call.")
    result_max_bytes: Count = Field(default=64 * 1024, description="Larger results are cut and marked.")
    shell_allowed: tuple[str, ...] = Field(
        default=(), description="Programs that shell_run may start, by name. Empty: none."
    )
    policy_file: Path | None = Field(default=None, description="TOML file of allow, ask and deny rules.")
    approval_timeout_s: Positive = Field(
        default=900.0,
        description="How long a run waits for a yes where the policy asks; then the call is refused.",
    )


BUILT_IN_TOPOLOGIES = ("adaptive", "hierarchical", "mesh", "pipeline", "ring", "star")


class SwarmSettings(Section):
    """Runs and the agents that do them."""

    database_url: SecretStr | None = Field(
        default=None, description="`postgresql://…` for the run database. Unset: SQLite in the data folder."
    )
    database_url_file: Path | None = Field(
        default=None, description="File that holds the URL, in place of database_url; read at the start."
    )
    topology: str = Field(
        default="hierarchical",
        description="Who talks to whom: adaptive, hierarchical, mesh, pipeline, ring, star or a plug-in's.",
    )
    agents_max: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="Worker agents of one run.")
    batch_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=64, description="Agents of one run that work at once; more of them work in waves."
    )
    parallel: bool = Field(
        default=True, description="Whether agents work at once at all; false: one after the other."
    )
    delegation_depth_max: Annotated[int, Field(ge=0, le=8)] = Field(
        default=2, description="How deep questions of agents to other roles may be nested; 0: none."
    )
    delegations_max: Count = Field(default=4, description="Questions that one agent may pass to other roles.")
    steps_max: Count = Field(default=12, description="Model calls of one agent before it must answer.")
    tool_calls_max: Count = Field(default=40, description="Tool calls of one agent.")
    output_tokens_max: Count = Field(default=4096, description="Output tokens of one model call.")
    tokens_max: Count = Field(default=2_000_000, description="Tokens of one run, all agents together.")
    run_timeout_s: Positive = Field(default=1800.0, description="Wall time of one run.")
    input_roots: tuple[Path, ...] = Field(
        default=(),
        description="Folders that callers with a credential may name as inputs. The local owner needs none.",
    )
    citations_max: Count = Field(default=10, description="Citations in the merged answer.")
    benchmark_mode: bool = Field(
        default=False, description="Whether `swarm bench` repeats every run, and compares the repetitions."
    )
    iterations: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=10, description="How often it does then, unless it is told by --iterations."
    )
    runs_parallel_max: Annotated[int, Field(ge=0)] = Field(
        default=16,
        description="Runs of one process at a time; more wait. 0: it only accepts, and workers do them.",
    )
    queues: tuple[str, ...] = Field(
        default=("default",), description="Shared queues that a server or worker takes runs from."
    )
    queue_runs_max: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict[str, int],
        description="Queue → runs of it at a time, over all processes with this setting; else any number.",
    )
    queue_starts_per_minute: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict[str, int],
        description="Queue → runs of it that begin in any minute, over all such processes; more wait.",
    )
    tenant_runs_max: Count | None = Field(
        default=None, description="Runs of one tenant at a time that come from shared queues. Unset: any."
    )
    drain_s: Annotated[float, Field(ge=0.0, le=86_400.0)] = Field(
        default=20.0,
        description="Longest time that a server or worker finishes runs after SIGTERM; others do the rest.",
    )
    peer_patience_s: Annotated[float, Field(ge=0.0, le=86_400.0)] = Field(
        default=300.0,
        description="Longest time that a step of a run waits for a service of ours that is away.",
    )
    failure_pause_s: Annotated[float, Field(ge=0.0, le=3600.0)] = Field(
        default=0.0,
        description="Seconds that `run` and `swarm bench` wait before they end with an error: for who begins "
        "them again at once, as a container engine does.",
    )
    lease_s: Positive = Field(default=10.0, description="A process silent for this long has lost its runs.")
    artifact_max_bytes: Annotated[int, Field(ge=1, le=128 * MIB)] = Field(
        default=16 * MIB, description="Bytes of one artifact of a run."
    )
    artifacts_max_bytes: Count = Field(
        default=64 * MIB, description="Bytes of all artifacts of one run, every version counted."
    )
    artifacts_max: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=200, description="Artifacts of one run, every version counted."
    )
    keep_days: Positive | None = Field(
        default=None, description="Age at which runs that have ended are removed. Unset: they stay."
    )
    keep_bytes: Count | None = Field(
        default=None,
        description="What the ended runs of one tenant may take; past it the oldest go. Unset: no limit.",
    )

    @field_validator("topology")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BUILT_IN_TOPOLOGIES:
            from agentic_flow.core import plugins  # reads every distribution: only when it must

            others = plugins.names("agentic_flow.topologies")
            if name not in others:
                raise ValueError(f"use one of {', '.join([*BUILT_IN_TOPOLOGIES, *others])}")
        return name


class MemorySettings(Section):
    """What agents learn from their runs."""

    enabled: bool = Field(
        default=True, description="Whether runs recall what was learned, and leave their trajectories."
    )
    judge_model: str | None = Field(
        default=None,
        description="Model that judges and distils. Unset: the run's own; mechanically if it writes nothing.",
    )
    items_recalled: Annotated[int, Field(ge=1, le=20)] = Field(
        default=3, description="Items that a task is given at most."
    )
    context_tokens_max: Count = Field(default=1500, description="Tokens of the block that carries them.")
    skills_recalled: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1, description="Skills that a task is given beside them at most, in the same block."
    )
    tries_recalled: Annotated[int, Field(ge=0, le=10)] = Field(
        default=2, description="Reflections on failed tries of like tasks that a task is given at most."
    )
    tries_tokens_max: Count = Field(default=800, description="Tokens of the block that carries them.")
    mmr_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.75, description="1 chooses items by relevance alone, less avoids items that say the same."
    )
    recency_half_life_days: Positive = Field(
        default=60.0, description="Age at which an item's recency, and its old evidence, count half."
    )
    withheld_share: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        default=0.0,
        description="Chance that an item is kept back from a recall, which measures what it does.",
    )
    retention_days: Positive = Field(default=30.0, description="Age at which trajectories are removed.")
    attempts_max: Count = Field(
        default=5, description="Tries to learn from a trajectory before it is shelved and reported."
    )
    learners_max: Annotated[int, Field(ge=1, le=32)] = Field(
        default=2, description="Trajectories of one process that are learned from at a time."
    )
    learn_at_end_s: Annotated[float, Field(ge=0.0, le=600.0)] = Field(
        default=20.0,
        description="Longest time that a run of the command line learns after its answer; 0: not at all.",
    )
    items_max: Count = Field(
        default=100_000, description="Items of one tenant; past it the least believed and used go first."
    )


class TelemetrySettings(Section):
    """Logs and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="warning", description="Least severe."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto: text on a terminal."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OTLP/HTTP endpoint for traces and metrics. Unset: none sent."
    )


def default_data_dir() -> Path:
    """The platform's folder for user data."""
    from platformdirs import user_data_path

    return user_data_path("agentic-flow", appauthor=False)


def user_config_path() -> Path:
    """The user's own configuration file."""
    from platformdirs import user_config_path as platform_config_path

    return platform_config_path("agentic-flow", appauthor=False) / "config.toml"


class Settings(Section):
    """The whole configuration, frozen."""

    data_dir: Path = Field(default_factory=default_data_dir, description="Folder of all local state.")
    agents_dir: Path | None = Field(
        default=None,
        description="Folder of agent definitions (*.md) beside `.claude/agents` and the built-in ones.",
    )
    serve: ServeSettings = ServeSettings()
    peers: PeerSettings = PeerSettings()
    auth: AuthSettings = AuthSettings()
    tls: TlsSettings = TlsSettings()
    gateway: GatewaySettings = GatewaySettings()
    agentdb: AgentDBSettings = AgentDBSettings()
    tools: ToolsSettings = ToolsSettings()
    memory: MemorySettings = MemorySettings()
    swarm: SwarmSettings = SwarmSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


@dataclass(frozen=True)
class Loaded:
    """Settings with the place that each value came from, keyed by dotted name (`gateway.model`)."""

    settings: Settings
    origins: dict[str, str]


# Names that vendors and operators already use, for settings of ours. Our own names win over them.
ALIASES = {
    "ANTHROPIC_API_KEY": "gateway.anthropic.api_key",
    "ANTHROPIC_BASE_URL": "gateway.anthropic.base_url",
    "OPENROUTER_API_KEY": "gateway.openrouter.api_key",
    "OPENROUTER_BASE_URL": "gateway.openrouter.base_url",
    "OPENAI_API_KEY": "gateway.openai.api_key",
    "OPENAI_BASE_URL": "gateway.openai.base_url",
    "SWARM_TOPOLOGY": "swarm.topology",
    "MAX_AGENTS": "swarm.agents_max",
    "BATCH_SIZE": "swarm.batch_size",
    "ENABLE_PARALLEL_EXECUTION": "swarm.parallel",
    "BENCHMARK_MODE": "swarm.benchmark_mode",
    "ITERATIONS": "swarm.iterations",
}

# Read by the shell-completion machinery and by tests, not settings of the product.
_NOT_SETTINGS = frozenset({"AGENTIC_FLOW_COMPLETE"})


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    user_config: Path | None = None,
) -> Loaded:
    """Read every source once.

    Args:
        flags: Dotted setting name → value, from the command line; None values are ignored.
        environ: Environment; the process's by default.
        directory: Where `.env` and `agentic-flow.toml` are looked for; the working folder by default.
        user_config: The user's file; the platform's usual place by default.

    Raises:
        InvalidSettings: an unknown name or a value of the wrong kind; names it and where it came from.
    """
    environ = os.environ if environ is None else environ
    directory = directory or Path.cwd()
    user_config = user_config or user_config_path()
    project_config = directory / CONFIG_FILE
    layers: list[tuple[str, dict[str, Any]]] = [
        (str(user_config), _from_toml(user_config)),
        (str(project_config), _from_toml(project_config)),
        (str(directory / ".env"), _from_environment(_read_dotenv(directory / ".env"), ".env")),
        ("environment", _from_environment(environ, "the environment")),
        ("flag", {name: value for name, value in (flags or {}).items() if value is not None}),
    ]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            merged[name] = value
            origins[name] = origin
    _refuse_unknown(merged, origins)
    try:
        settings = Settings.model_validate(_nested(merged), strict=False)
    except ValidationError as error:
        raise _explain(error, origins) from None
    return Loaded(_with_url_files(settings), origins)


def _with_url_files(settings: Settings) -> Settings:
    """The settings with the database addresses of their files, which win over those given by value."""
    from agentic_flow.core.secrets import FileSecret

    changes: dict[str, dict[str, SecretStr]] = {}
    for name in secret_names():
        section, _, leaf = name.rpartition(".")
        if not leaf.endswith("_url"):
            continue
        file: Path | None = getattr(getattr(settings, section), f"{leaf}_file")
        if file is not None:
            changes.setdefault(section, {})[leaf] = SecretStr(FileSecret(file).get())
    sections = {name: getattr(settings, name).model_copy(update=update) for name, update in changes.items()}
    return settings.model_copy(update=sections) if sections else settings


def setting_names(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic FieldInfo), leaves only."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def secret_names() -> list[str]:
    """The settings that hold secrets; the encrypted store can hold each under this name."""
    return [name for name, info in setting_names() if SecretStr in get_args(info.annotation)]


def check_secret_name(name: str) -> None:
    """Raise InvalidInput unless `name` is a setting that holds a secret."""
    known = secret_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise InvalidInput(
            f"{name!r} is not a setting that holds a secret",
            hint=f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}",
        )


def env_name(dotted: str) -> str:
    """The environment variable of a setting: `gateway.model` → `AGENTIC_FLOW_GATEWAY__MODEL`."""
    return ENV_PREFIX + dotted.replace(".", "__").upper()


def _from_environment(environ: Mapping[str, str], where: str) -> dict[str, Any]:
    by_variable = {env_name(name): name for name, _ in setting_names()}
    found: dict[str, Any] = {}
    for variable, name in ALIASES.items():
        if environ.get(variable):
            found[name] = environ[variable]
    provider = environ.get("MODEL_PROVIDER")
    if provider and provider not in ("auto", "multi"):
        found["gateway.model"] = f"{provider}:"
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _NOT_SETTINGS:
            continue
        name = by_variable.get(variable)
        if name is None:
            close = difflib.get_close_matches(variable, by_variable, n=1)
            raise InvalidSettings(
                f"{variable!r} in {where} is not a setting",
                hint=f"did you mean {close[0]!r}?" if close else "see `agentic-flow config show`",
            )
        found[name] = _parse_env(value)
    return found


def _parse_env(value: str) -> Any:
    """Lists and tables are written as JSON in the environment; all else is taken as text."""
    if value[:1] in "[{" and value:
        import orjson

        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    return {name: value for name, value in dotenv_values(path).items() if value is not None}


def _from_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(
            f"{str(path)!r} is not valid TOML: {error}", hint="correct that line"
        ) from error
    except OSError as error:
        raise InvalidSettings(
            f"{str(path)!r} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    return dict(_flatten(data))


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    leaves = {name for name, _ in setting_names()}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in leaves:
            yield from _flatten(cast(dict[str, Any], value), f"{name}.")
        else:
            yield name, value


def _refuse_unknown(merged: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    known = {name for name, _ in setting_names()}
    for name in merged:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InvalidSettings(
                f"{name!r} in {origins[name]} is not a setting",
                hint=f"did you mean {close[0]!r}?" if close else "see `agentic-flow config show`",
            )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in flat.items():
        node = root
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    # A provider given in part keeps its other defaults (its base_url above all).
    gateway = root.get("gateway", {})
    for name in ("anthropic", "openrouter", "openai"):
        if name in gateway:
            default: ProviderSettings = GatewaySettings.model_fields[name].default
            gateway[name] = {"base_url": default.base_url, **gateway[name]}
    return root


def _explain(error: ValidationError, origins: Mapping[str, str]) -> InvalidSettings:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "settings"
    origin = next(
        (where for known, where in origins.items() if known == name or known.startswith(f"{name}.")),
        "default",
    )
    secret = any(word in name for word in ("key", "token", "secret", "url"))
    shown = "" if secret else f" = {first['input']!r}"
    return InvalidSettings(
        f"setting {name}{shown} (from {origin}) is refused: {first['msg']}",
        hint=f"set {env_name(name)} or correct {name!r} in {CONFIG_FILE}",
    )


@dataclass(frozen=True)
class SettingValue:
    """One setting as `config show` prints it; a secret's value is masked."""

    name: str
    value: Any
    origin: str
    variable: str
    description: str


def describe(loaded: Loaded) -> list[SettingValue]:
    """Every setting with its value, where that came from, and the variable that sets it."""
    return [
        SettingValue(
            name, shown(_value_at(loaded.settings, name)), origin, env_name(name), info.description or ""
        )
        for name, info in setting_names()
        for origin in (loaded.origins.get(name, "default"),)
    ]


def shown(value: Any) -> Any:
    """A setting's value as JSON can hold it, secrets masked."""
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [shown(item) for item in cast(tuple[Any, ...], value)]
    return value


def template() -> str:
    """A configuration file with every setting, its default and its meaning, all commented out."""
    defaults = Settings()
    lines = [
        "# Settings of Agentic Flow. Take away the # of a line to change it.",
        "# Flags and environment variables win over this file; see `agentic-flow config show --origin`.",
    ]
    # In TOML the root's keys come before the first table, and a table's own keys before those of the next.
    tables: dict[str, list[str]] = {"": []}
    for name, info in setting_names():
        table, _, key = name.rpartition(".")
        entry = f"\n# {info.description}\n#{key} = {_toml(_value_at(defaults, name))}"
        tables.setdefault(table, []).append(entry)
    for table, entries in tables.items():
        lines += [f"\n[{table}]"] * bool(table) + entries
    return "\n".join(lines) + "\n"


def write_template(path: Path) -> None:
    """Write the template to a new file, readable by its owner alone because keys may be put there.

    Raises:
        Conflict: the file exists.
        PathNotFound: its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            raise Conflict(f"{str(path)!r} exists", hint="edit it, or move it away first") from None
        raise PathNotFound(
            f"{str(path)!r} cannot be written: {error.strerror}", hint="choose a folder that you may write to"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(template())


def _value_at(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _toml(value: Any) -> str:
    """A default as TOML. Text in JSON's quotes is valid TOML too; an unset value shows an empty string."""
    value = shown(value)
    if value is None:
        return '""'
    if isinstance(value, dict):
        return "{}"
    return json.dumps(value)
