"""Policies as files that people write: YAML, TOML or JSON in, YAML or JSON out; and what differs in two."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml

from agentic_flow.core.errors import DataCorrupted, InvalidInput, PathNotFound, TooLarge
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_store import DOCUMENT_MAX_BYTES, PolicyStore, parse_policies

Format = Literal["yaml", "toml", "json"]
_SUFFIXES: dict[str, Format] = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}
_ABSENT = object()


class Change(NamedTuple):
    """One field that differs; `kind` tells which of the two values means something."""

    kind: Literal["added", "removed", "changed"]
    field: str
    before: Any
    after: Any


class Replaced(NamedTuple):
    """What storing policies did.

    Args:
        version: The new one.
        before: The one that it replaced.
        changes: What differs.
        unreadable: Why the replaced one could not be read, and counts as empty; None: it could.
    """

    version: int
    before: int
    changes: list[Change]
    unreadable: str | None = None


def replace_policies(
    store: PolicyStore, policies: GatewayPolicies, *, expected_version: int | None, by: str, reason: str
) -> Replaced:
    """Store policies in the place of those in force; arguments and errors as `PolicyStore.put`."""
    version = store.put(policies, expected_version=expected_version, by=by, reason=reason)
    old, unreadable = GatewayPolicies(), None
    if version > 1:
        try:
            old = store.get(version - 1).policies
        except DataCorrupted as error:
            unreadable = error.message
    return Replaced(version, version - 1, changes(old, policies), unreadable)


def read_policy_file(path: Path) -> GatewayPolicies:
    """The policies that a file holds.

    Args:
        path: Its suffix tells the format: .yaml, .yml, .toml or .json.

    Raises:
        PathNotFound: it cannot be read.
        TooLarge: it has more than `DOCUMENT_MAX_BYTES`.
        InvalidInput: another suffix, not of its format, or a field is unknown or wrong; names the field.
    """
    source = str(path)
    written = _SUFFIXES.get(path.suffix.lower())
    if written is None:
        raise InvalidInput(f"{source!r} is no policies file", hint=f"name it {', '.join(_SUFFIXES)}")
    try:
        with path.open("rb") as file:
            content = file.read(DOCUMENT_MAX_BYTES + 1)
    except OSError as error:
        raise PathNotFound(f"{source!r} cannot be read: {error.strerror}", hint="name a file") from error
    if len(content) > DOCUMENT_MAX_BYTES:
        raise TooLarge(f"{source!r} is too large", hint=f"the limit is {DOCUMENT_MAX_BYTES} bytes")
    try:
        return parse_policies(_document(content.decode("utf-8-sig"), written), source=source)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"{source!r} is not valid {written.upper()}: {reason}", hint="correct it"
        ) from error


def as_document(policies: GatewayPolicies) -> dict[str, Any]:
    """What their operator wrote, without defaults."""
    return policies.model_dump(mode="json", exclude_unset=True)


def as_yaml(policies: GatewayPolicies) -> str:
    """The document as YAML; `read_policy_file` reads it back to equal policies."""
    return yaml.safe_dump(as_document(policies), sort_keys=False, allow_unicode=True)


def changes(before: GatewayPolicies, after: GatewayPolicies) -> list[Change]:
    """What differs, field by field, sorted by field; defaults count as what they are.

    Lists of rules are compared rule by rule, at their places.
    """
    old, new = dict(_fields(before.model_dump(mode="json"))), dict(_fields(after.model_dump(mode="json")))
    found: list[Change] = []
    for field in sorted(old.keys() | new.keys()):
        was, now = old.get(field, _ABSENT), new.get(field, _ABSENT)
        if was is _ABSENT:
            found.append(Change("added", field, None, now))
        elif now is _ABSENT:
            found.append(Change("removed", field, was, None))
        elif was != now:
            found.append(Change("changed", field, was, now))
    return found


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in cast(dict[str, Any], value).items():
            yield from _fields(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(cast(list[Any], value)):
            yield from _fields(inner, f"{path}[{index}]")
    elif value not in ({}, [], None):
        yield path, value


def _document(text: str, written: Format) -> Mapping[str, Any]:
    data: Any
    match written:
        case "toml":
            data = tomllib.loads(text)
        case "json":
            data = json.loads(text, object_pairs_hook=_once_each)
        case "yaml":
            data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"it is {type(data).__name__}, not a table of fields")
    return cast(dict[str, Any], data)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a boolean, so that `mode: off` is a word, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A table; refuses a key that is there twice, of which YAML would take the last."""
        seen: set[str] = set()
        for key, _ in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            if isinstance(key, yaml.ScalarNode):
                name = str(key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} is there twice", key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
