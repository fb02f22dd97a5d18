"""What a person says about a stack: a small typed description, free of any target's words.

`plan.checked_plan` says whether it makes sense and works out what follows from it.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentic_flow.core.errors import InvalidInput, PathNotFound
from agentic_flow.core.version import __version__

Port = Annotated[int, Field(ge=1, le=65535)]
Tier = Literal["small", "medium", "large"]
Store = Literal["directory", "postgresql"]
Provider = Literal["local", "claude", "openrouter", "multi-model"]

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(_LABEL)
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]*(?::[0-9]{1,5})?(?:/[a-z0-9][a-z0-9._-]*)*/")


class Part(BaseModel):
    """A frozen part of a spec that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServiceSpec(Part):
    """One service of ours."""

    replicas: Annotated[int, Field(ge=0, le=50)] = Field(default=1, description="How many run.")


class ImageSpec(Part):
    """Where the images come from."""

    prefix: str = Field(
        default="", description="Registry and path before the names, ending in a slash. Empty: local images."
    )
    tag: str = Field(default=__version__, description="Tag of all images of ours; `latest` is refused.")

    @field_validator("prefix")
    @classmethod
    def _is_prefix(cls, prefix: str) -> str:
        if prefix and not _PREFIX.fullmatch(prefix):
            raise ValueError("write it as registry.example/path/, ending in a slash")
        return prefix

    @field_validator("tag")
    @classmethod
    def _is_fixed_tag(cls, tag: str) -> str:
        if not _TAG.fullmatch(tag):
            raise ValueError("use letters, digits and . _ -")
        if tag == "latest":
            raise ValueError("`latest` does not say what runs: name a version")
        return tag


class PortsSpec(Part):
    """Ports of the host on which the proxy listens. An unset one is not published."""

    platform: Port | None = Field(default=3000, description="Platform: runs API, gateway, identity.")
    swarm: Port | None = Field(default=9000, description="Swarm coordinator.")
    agentdb: Port | None = Field(default=None, description="AgentDB.")
    metrics: Port | None = Field(default=9090, description="Prometheus, with observability.")
    claude: Port = Field(default=8081, description="Provider variant Claude.")
    llama: Port = Field(default=8082, description="Provider variant Llama by OpenRouter.")
    deepseek: Port = Field(default=8083, description="Provider variant DeepSeek by OpenRouter.")


class StackSpec(Part):
    """One stack. Everything has a default: the empty spec is the main stack, without a key, for clients of
    this machine only."""

    name: str = Field(default="agentic-flow", description="Name of the stack; a DNS label.")
    tier: Tier = Field(default="small", description="Bounds of memory and processors.")
    services: dict[str, ServiceSpec] = Field(
        default={"platform": ServiceSpec(), "agentdb": ServiceSpec(), "swarm": ServiceSpec()},
        description="Which services run, and how many of each: platform, agentdb, swarm, worker.",
    )
    store: Store = Field(
        default="directory", description="Where state is kept: folders of one machine, or PostgreSQL."
    )
    provider: Provider = Field(default="local", description="Whose models are called.")
    model: str | None = Field(
        default=None, description="Default model, `provider:model`. Unset: the provider's first."
    )
    observability: bool = Field(
        default=False, description="Whether metrics are gathered and traces received."
    )
    images: ImageSpec = ImageSpec()
    hostnames: tuple[str, ...] = Field(
        default=("localhost",), description="Names under which clients reach the stack."
    )
    address: str = Field(
        default="127.0.0.1", description="Address of the host on which published ports are bound."
    )
    ports: PortsSpec = PortsSpec()
    inputs_dir: str = Field(
        default="./inputs", description="Folder of the host that runs may read; inside it is /inputs."
    )

    @field_validator("name")
    @classmethod
    def _is_label(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("use 1 to 63 small letters, digits and hyphens, none at the ends")
        return name

    @field_validator("hostnames")
    @classmethod
    def _are_hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _HOST.fullmatch(name) and not _is_address(name):
                raise ValueError(f"{name!r} is no host name: small letters, digits, hyphens and dots")
        if not names:
            raise ValueError("name at least one, such as localhost")
        return names

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        if not _is_address(address):
            raise ValueError("give an IP address of the host, such as 127.0.0.1")
        return address

    @field_validator("inputs_dir")
    @classmethod
    def _is_folder(cls, folder: str) -> str:
        if not folder or not folder.isprintable() or any(sign in folder for sign in ":${}"):
            raise ValueError("give a path without colons, dollar signs and braces")
        return folder


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_spec(data: Mapping[str, Any], *, source: str = "the spec") -> StackSpec:
    """A spec from plain data.

    Args:
        data: What a YAML or TOML file holds.
        source: What to call it in an error.

    Raises:
        InvalidInput: an unknown key or a value of the wrong kind; names it.
    """
    try:
        return StackSpec.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        known = ", ".join(StackSpec.model_fields)
        hint = f"the keys are {known}" if first["type"] == "extra_forbidden" else f"correct {where!r}"
        said = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(
            f"{where} = {first['input']!r} in {source} is refused: {said}", hint=hint
        ) from None


def read_spec(path: Path) -> StackSpec:
    """A spec from a YAML or TOML file, by its ending.

    Raises:
        PathNotFound: it cannot be read. InvalidInput: it is no spec.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PathNotFound(f"{str(path)!r} cannot be read: {error}", hint="check the path") from error
    if path.suffix == ".toml":
        try:
            data: Any = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidInput(f"{str(path)!r} is not valid TOML: {error}", hint="correct it") from error
    elif path.suffix in (".yaml", ".yml"):
        data = _yaml(text, path)
    else:
        raise InvalidInput(f"{str(path)!r} is no spec", hint="write it as .yaml or .toml")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidInput(f"{str(path)!r} holds no table of keys", hint="write `tier: small` and the like")
    return parse_spec(cast(dict[str, Any], data), source=repr(str(path)))


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise InvalidInput(f"{str(path)!r} is not valid YAML: {said}", hint="correct it") from error
