"""Workflow files as people write them: YAML or TOML in, plain data and the line of each part out.

YAML is read safely and strictly: no tags beyond JSON's kinds, no key twice, `off` is a word, and aliases that
would make the document large (a "bomb") are refused before it is built.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from agentic_flow.core.errors import InvalidInput, PathNotFound, TooLarge

Format = Literal["yaml", "toml"]
Place = tuple[str | int, ...]
SUFFIXES: Mapping[str, Format] = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
FILE_MAX_BYTES = 1_000_000
NESTING_MAX = 32
PARTS_MAX = 50_000


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says. `lines`: place → line, from 1, of what stands there; empty for TOML."""

    data: dict[str, Any]
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int | None:
        """The line of a place, or of the nearest part of the document around it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return None


def read_workflow_file(path: Path) -> tuple[str, Format]:
    """The text of a workflow file and its format, by the suffix.

    Raises:
        PathNotFound: it cannot be read.
        TooLarge: it has more than `FILE_MAX_BYTES`.
        InvalidInput: another suffix, or no UTF-8.
    """
    written = SUFFIXES.get(path.suffix.lower())
    if written is None:
        raise InvalidInput(f"{str(path)!r} is no workflow file", hint=f"name it {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            content = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise PathNotFound(
            f"{str(path)!r} cannot be read: {error.strerror}", hint="name an existing file"
        ) from error
    if len(content) > FILE_MAX_BYTES:
        raise TooLarge(f"{str(path)!r} is too large", hint=f"the limit is {FILE_MAX_BYTES} bytes")
    try:
        return content.decode("utf-8-sig"), written
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{str(path)!r} is no UTF-8: {error.reason}", hint="save it as UTF-8") from error


def parse_document(text: str, written: Format) -> Document:
    """The data that a text stands for.

    Raises:
        TooLarge: it has more than `FILE_MAX_BYTES`, or more than `PARTS_MAX` parts with its aliases.
        InvalidInput: it is not of its format, no table, has a key twice, or is nested deeper than
            `NESTING_MAX`.
    """
    if len(text.encode("utf-8", "surrogatepass")) > FILE_MAX_BYTES:
        raise TooLarge("the workflow is too large", hint=f"the limit is {FILE_MAX_BYTES} bytes")
    try:
        if written == "toml":
            data = _bounded(tomllib.loads(text))
            return Document(cast(dict[str, Any], data), {})
        return _from_yaml(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the workflow is no TOML: {error}", hint="correct it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise InvalidInput(f"{line}{error.problem or error.context}", hint="correct the YAML") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInput(
            f"the workflow is no {written.upper()}: {' '.join(str(error).split())}", hint="correct it"
        ) from error
    except RecursionError as error:
        raise _too_deep() from error


def bounded_document(data: Mapping[str, Any]) -> Document:
    """Data that was parsed elsewhere, within the same bounds.

    Raises:
        TooLarge, InvalidInput: see `parse_document`.
    """
    return Document(cast(dict[str, Any], _bounded(dict(data))), {})


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a boolean, and only JSON's kinds: no dates, no binary."""


_KEPT = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge")}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in _KEPT and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}


def _from_yaml(text: str) -> Document:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Document({}, {})
        reader = _Reader(loader)
        data = reader.value(root, ())
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise InvalidInput(
            f"the workflow is {type(data).__name__}, not a table of fields", hint="begin with `name: …`"
        )
    return Document(cast(dict[str, Any], data), reader.lines)


class _Reader:
    """Builds plain data from YAML's nodes, counting every part as often as an alias repeats it."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._parts = 0
        self.lines: dict[Place, int] = {}

    def value(self, node: yaml.Node, place: Place) -> Any:
        """The data of a node; notes its line."""
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise _too_many()
        if len(place) > NESTING_MAX:
            raise _too_deep()
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            entries = cast(list[yaml.Node], node.value)
            return [self.value(entry, (*place, index)) for index, entry in enumerate(entries)]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._table(node, place)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._loader.construct_object(node)  # pyright: ignore[reportUnknownMemberType]
        raise _marked(node, f"a value of the kind {node.tag!r} is not offered")

    def _table(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, inner in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            if not isinstance(key, yaml.ScalarNode) or not isinstance(key.value, str):
                raise _marked(key, "a key must be a word")
            name = key.value
            if name == "<<":
                raise _marked(key, "merging tables with << is not offered")
            if name in table:
                raise _marked(key, f"{name!r} is there twice")
            self.lines[(*place, name)] = key.start_mark.line + 1
            table[name] = self.value(inner, (*place, name))
        return table


def _marked(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _bounded(data: Any) -> Any:
    """Data with bounded depth and parts, as YAML's are; TOML's dates become texts."""
    parts = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal parts
        parts += 1
        if parts > PARTS_MAX:
            raise _too_many()
        if depth > NESTING_MAX:
            raise _too_deep()
        if isinstance(value, dict):
            table = cast(dict[str, Any], value)
            return {key: walk(inner, depth + 1) for key, inner in table.items()}
        if isinstance(value, list):
            return [walk(inner, depth + 1) for inner in cast(list[Any], value)]
        return value if value is None or isinstance(value, str | int | float | bool) else str(value)

    return walk(data, 0)


def _too_many() -> TooLarge:
    return TooLarge(
        f"the workflow has more than {PARTS_MAX} parts, its aliases counted",
        hint="take aliases of aliases out, or split it",
    )


def _too_deep() -> InvalidInput:
    return InvalidInput(f"the workflow is nested deeper than {NESTING_MAX}", hint="flatten it")
