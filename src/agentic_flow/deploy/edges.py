"""Who may call whom: the one list that networks, rules and probes of every target follow from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

OURS = ("platform", "agentdb", "swarm", "worker")
"""Services of ours, in the order in which they are named."""
ORDER = ("proxy", *OURS, "postgres", "prometheus", "collector")
"""Every part of a stack, in the order in which it is named."""


@dataclass(frozen=True, slots=True)
class Edge:
    """`caller` may open connections to `callee`, and why."""

    caller: str
    callee: str
    why: str


EDGES = (
    Edge("proxy", "platform", "requests of clients"),
    Edge("proxy", "swarm", "requests of clients that want the coordinator itself"),
    Edge("proxy", "agentdb", "requests of clients that want the database itself"),
    Edge("proxy", "prometheus", "people who look at metrics"),
    Edge("platform", "agentdb", "memory"),
    Edge("platform", "swarm", "runs"),
    Edge("platform", "postgres", "budgets and usage"),
    Edge("agentdb", "platform", "keys and revocations"),
    Edge("agentdb", "postgres", "rows and vectors"),
    Edge("swarm", "platform", "model calls, keys and revocations"),
    Edge("swarm", "agentdb", "memory of runs"),
    Edge("swarm", "postgres", "runs and their steps"),
    Edge("worker", "platform", "model calls and keys"),
    Edge("worker", "agentdb", "memory of runs"),
    Edge("worker", "postgres", "runs and their steps"),
    Edge("prometheus", "platform", "metrics"),
    Edge("prometheus", "agentdb", "metrics"),
    Edge("prometheus", "swarm", "metrics"),
    Edge("prometheus", "worker", "metrics"),
    Edge("platform", "collector", "traces"),
    Edge("agentdb", "collector", "traces"),
    Edge("swarm", "collector", "traces"),
    Edge("worker", "collector", "traces"),
)
"""All of them; a plan takes those whose two ends it has and publishes."""

WAYS_OUT = {"platform": "model providers"}
"""Who may call the world outside, and whom there. Nobody else has a way out."""


def edges_among(present: Collection[str], *, published: Collection[str]) -> tuple[Edge, ...]:
    """The edges of a stack.

    Args:
        present: Its parts.
        published: Those that the proxy passes requests on to.
    """
    return tuple(
        edge
        for edge in EDGES
        if {edge.caller, edge.callee} <= set(present) and (edge.caller != "proxy" or edge.callee in published)
    )


def segments(edges: Sequence[Edge]) -> tuple[tuple[str, ...], ...]:
    """Groups of parts such that two share a group exactly when an edge joins them.

    Each group is a clique of the graph, made as large as it goes: fewer networks than one per edge, and
    still nobody reaches whom no edge names. Deterministic: first edge first, parts in ORDER.
    """
    joined = {frozenset((edge.caller, edge.callee)) for edge in edges}
    parts = sorted({name for pair in joined for name in pair}, key=ORDER.index)
    covered: set[frozenset[str]] = set()
    groups: list[tuple[str, ...]] = []
    for edge in edges:
        if frozenset((edge.caller, edge.callee)) in covered:
            continue
        group = {edge.caller, edge.callee}
        for part in parts:
            if part not in group and all(frozenset((part, member)) in joined for member in group):
                group.add(part)
        covered |= {frozenset((one, other)) for one in group for other in group if one != other}
        groups.append(tuple(sorted(group, key=ORDER.index)))
    return tuple(groups)
