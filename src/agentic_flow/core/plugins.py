"""Extension points: entry-point groups in which other distributions register parts.

    [project.entry-points."agentic_flow.providers"]
    my-models = "my_package.models:build"        # (GatewaySettings, HttpTransport) -> Provider

    [project.entry-points."agentic_flow.checkers"]
    my-checker = "my_package.checks:make"        # (options of the route) -> Checker

    [project.entry-points."agentic_flow.toolsets"]
    my-tools = "my_package.tools:build"          # () -> list[Tool]

    [project.entry-points."agentic_flow.embedders"]
    my-embedder = "my_package.embedders:make"    # (AgentDBSettings) -> Embedder

    [project.entry-points."agentic_flow.guardrails"]
    my-guardrail = "my_package.guardrails:make"  # (options of the rule) -> Guardrail

    [project.entry-points."agentic_flow.topologies"]
    my-topology = "my_package.topologies:next"   # (TeamState) -> tuple of Assignment

A provider is built by the same kind of function as the built-in ones, and may replace one of the same name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Literal, cast

from agentic_flow.core.errors import Conflict, InvalidSettings, NotFound

Group = Literal[
    "agentic_flow.checkers",
    "agentic_flow.embedders",
    "agentic_flow.guardrails",
    "agentic_flow.providers",
    "agentic_flow.toolsets",
    "agentic_flow.topologies",
]


def names(group: Group) -> list[str]:
    """The names registered in a group, sorted. Nothing is imported."""
    return sorted(_registered(group))


def load(group: Group, name: str) -> Any:
    """The object registered under `name`.

    Raises:
        NotFound: nothing is.
        Conflict: two distributions register it.
        InvalidSettings: it cannot be imported; names the distribution and the entry point.
    """
    registered = _registered(group)
    if name not in registered:
        raise NotFound(
            f"no plugin {name!r} in the group {group!r}",
            hint=f"installed: {', '.join(sorted(registered)) or 'none'}",
        )
    return _loaded(registered[name])


def load_all(group: Group) -> dict[str, Any]:
    """Every object of a group by name; raises as `load` does."""
    return {name: _loaded(point) for name, point in sorted(_registered(group).items())}


def _registered(group: Group) -> dict[str, EntryPoint]:
    return by_name(_installed(tuple(sys.path)).select(group=group))


@lru_cache(maxsize=1)
def _installed(_: tuple[str, ...]) -> EntryPoints:
    """All entry points on the import path: read once, for it opens a file of every distribution."""
    # Python 3.11 answers in an older form, which has the one method that is asked for here.
    return cast(EntryPoints, entry_points())


def by_name(points: Iterable[EntryPoint]) -> dict[str, EntryPoint]:
    """Entry points by name; Conflict when two distributions claim one name."""
    found: dict[str, EntryPoint] = {}
    for point in points:
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise Conflict(
                f"{_origin(other)!r} and {_origin(point)!r} both register {point.name!r} in {point.group!r}",
                hint="uninstall one of them",
            )
    return found


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # a stranger's module may raise anything
        raise InvalidSettings(
            f"the plugin {point.name!r} ({point.value}) of {_origin(point)!r} cannot be loaded: "
            f"{type(error).__name__}: {error}",
            hint="repair or uninstall that distribution",
        ) from error


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
