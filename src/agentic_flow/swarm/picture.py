"""A run as a picture and as text, from its record alone: who heard whom, and who did what when at what cost.

Everything comes from the recorded steps: the steps `assign` say who worked on whose words, the others when
and for how much. So there is a picture of a run under way, of one that failed and of one that ended long ago.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from agentic_flow.swarm.payloads import from_record
from agentic_flow.swarm.runs import RunResult, RunStep
from agentic_flow.swarm.topology import Assignment, Edge, MessageGraph, Node, message_graph

_ATTEMPT = re.compile(r"\.try-\d+(?=\.|$)")
WIDTH = 960
_MARGIN, _ROW, _LABEL, _COST = 24, 22, 170, 190
_LAYER, _BOX_WIDTH, _BOX_HEIGHT = 84, 118, 30
_COLOURS = {
    "planner": "#7b4fb5",
    "worker": "#2f6fb0",
    "reviewer": "#b5473c",
    "synthesizer": "#1f8a70",
    "run": "#6b7280",
}
_BARS = {"model": "#2f6fb0", "tool": "#d9902f", "other": "#9aa3ae", "failed": "#b5473c"}


@dataclass
class Lane:
    """One agent's part of the timeline; times are Unix seconds."""

    agent: str
    role: str
    steps: list[RunStep] = field(default_factory=list[RunStep])
    tokens: int = 0
    cost_usd: float | None = 0.0
    failed: bool = False


def assignments_of(steps: Sequence[RunStep]) -> list[Assignment]:
    """Every assignment of a run, in the order in which they were made."""
    return [
        from_record(entry)
        for step in steps
        if step.agent == "run" and step.name == "assign" and step.output
        for entry in step.output["assignments"]
    ]


def graph_of(steps: Sequence[RunStep]) -> MessageGraph:
    """Who heard whom; questions that agents passed on to others are messages there and back.

    Of a workflow the steps are the agents: each hears those that it needs.
    """
    assigned = {assignment.key: assignment for assignment in assignments_of(steps)}
    graph = message_graph(assigned.values())
    nodes = {node.agent: node for node in graph.nodes}
    edges = list(graph.edges)
    of_step: dict[str, list[str]] = {}
    for key, step, needs in _workflow_steps(steps):
        nodes[key] = Node(key, "worker", (key,))
        edges += [Edge(speaker, key, 1) for need in needs for speaker in of_step.get(need, ())]
        of_step.setdefault(step, []).append(key)
    for path in dict.fromkeys(_without_attempts(step.agent) for step in steps):
        parts = path.split(".")
        for depth in range(1, len(parts)):  # whoever is between has perhaps no step of its own
            above = agent_name(".".join(parts[:depth]), assigned)
            asked = agent_name(".".join(parts[: depth + 1]), assigned)
            nodes.setdefault(above, Node(above, "worker", (above,)))
            if asked not in nodes:
                nodes[asked] = Node(asked, "worker", (".".join(parts[: depth + 1]),))
                edges += [Edge(above, asked, 1), Edge(asked, above, 1)]
    return MessageGraph(tuple(nodes.values()), tuple(edges))


def _workflow_steps(steps: Sequence[RunStep]) -> Iterator[tuple[str, str, list[str]]]:
    """Of a workflow: key, step and needed steps of what was begun, in order. Older records have no needs."""
    for plan in steps:
        if plan.agent == "run" and plan.name == "plan" and plan.output:
            of = plan.output.get("of", {})
            for key in plan.output.get("start", ()):
                about = of.get(key, {})
                yield key, about.get("step", key), about.get("needs", [])


def _without_attempts(workflow: str) -> str:
    """`sum.try-2` is `sum` once more, not somebody else."""
    return _ATTEMPT.sub("", workflow)


def agent_name(workflow: str, assigned: dict[str, Assignment]) -> str:
    """The agent behind a step's `agent` (`work-1`, `work-1.ask-2`)."""
    key, _, below = _without_attempts(workflow).partition(".")
    name = assigned[key].agent if key in assigned else key
    return f"{name}-{below.replace('.', '-')}" if below else name


def lanes_of(steps: Sequence[RunStep]) -> list[Lane]:
    """The steps by agent, agents in the order in which they began."""
    assigned = {assignment.key: assignment for assignment in assignments_of(steps)}
    lanes: dict[str, Lane] = {}
    for step in sorted(steps, key=lambda step: step.started_at_s or step.completed_at_s or 0.0):
        name = agent_name(step.agent, assigned)
        key = step.agent.partition(".")[0]
        role = assigned[key].role if key in assigned else "run" if name == "run" else "worker"
        lane = lanes.setdefault(name, Lane(name, role))
        lane.steps.append(step)
        lane.failed |= step.error is not None
        if (usage := step.usage) is not None:
            lane.tokens += usage.input_tokens + usage.output_tokens
            known = lane.cost_usd is not None and usage.cost_usd is not None
            lane.cost_usd = (lane.cost_usd or 0.0) + (usage.cost_usd or 0.0) if known else None
    return list(lanes.values())


def graph_text(result: RunResult, steps: Sequence[RunStep]) -> str:
    """The message graph in words, one agent a line."""
    graph = graph_of(steps)
    heard: dict[str, list[str]] = {node.agent: [] for node in graph.nodes}
    for edge in graph.edges:
        times = f" ({edge.messages})" if edge.messages > 1 else ""
        heard[edge.listener].append(f"{edge.speaker}{times}")
    width = max((len(node.agent) for node in graph.nodes), default=0)
    lines = [f"{result.topology}: {len(graph.nodes)} agents, {len(graph.edges)} connections"]
    lines += [
        f"  {node.agent:<{width}}  {node.role:<11}  hears {', '.join(heard[node.agent]) or 'nobody'}"
        for node in graph.nodes
    ]
    changes = dict.fromkeys(
        f"changed to {step.output['shape']}: {step.output['reason']}"
        for step in steps
        if step.agent == "run" and step.name == "assign" and step.output and step.output.get("reason")
    )
    return "\n".join([*lines, *changes])


def picture(result: RunResult, steps: Sequence[RunStep]) -> str:
    """The message graph above the timeline, as one SVG document of its own (no script, no outside fonts)."""
    graph = graph_of(steps)
    lanes = lanes_of(steps)
    places, graph_height = _layout(graph)
    top = 56
    body = [
        _text(_MARGIN, 28, f"Run {result.run_id}", size=16, bold=True),
        _text(
            _MARGIN, 46, f"{result.topology}, {result.state}: {_short(result.goal, 110)}", colour="#4b5563"
        ),
        *_edges(graph, places, top),
        *_nodes(graph, places, top, {lane.agent for lane in lanes if lane.failed}),
    ]
    timeline, timeline_height = _timeline(lanes, top + graph_height + 16)
    height = top + graph_height + 16 + timeline_height + _MARGIN
    title = f"Message graph and timeline of run {result.run_id}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="#8a93a0"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            *timeline,
            "</svg>\n",
        ]
    )


# ---- the graph -------------------------------------------------------------------------------------------


def _layout(graph: MessageGraph) -> tuple[dict[str, tuple[float, float]], int]:
    """Where each agent stands, and how high the whole is.

    Agents stand in layers by the longest way to them; workers that speak to each other stand in a circle.
    """
    talking = _circle(graph)
    depths = _depths(graph, talking)
    places: dict[str, tuple[float, float]] = {}
    y = 20.0
    for depth in sorted(set(depths.values())):
        members = [node.agent for node in graph.nodes if depths[node.agent] == depth]
        if len(talking.intersection(members)) > 2:
            radius = max(90.0, len(members) * (_BOX_WIDTH * 0.8) / (2 * math.pi))
            for i, agent in enumerate(members):
                angle = 2 * math.pi * i / len(members) - math.pi / 2
                across = min(radius * 1.7, WIDTH / 2 - _BOX_WIDTH)
                places[agent] = (WIDTH / 2 + across * math.cos(angle), y + radius * (1 + math.sin(angle)))
            y += 2 * radius + _LAYER
            continue
        in_row = max(1, (WIDTH - 2 * _MARGIN) // (_BOX_WIDTH + 8))
        for start in range(0, len(members), in_row):
            row = members[start : start + in_row]
            for i, agent in enumerate(row):
                places[agent] = (WIDTH * (i + 0.5) / len(row), y)
            y += _BOX_HEIGHT + 14 if start + in_row < len(members) else _LAYER
    return places, int(y - _LAYER + _BOX_HEIGHT + 20) if graph.nodes else 0


def _circle(graph: MessageGraph) -> set[str]:
    """Workers that speak to other workers: peers of a mesh, links of a ring."""
    workers = {node.agent for node in graph.nodes if node.role == "worker" and "." not in node.keys[0]}
    among = [e for e in graph.edges if {e.speaker, e.listener} <= workers and e.speaker != e.listener]
    return {agent for edge in among for agent in (edge.speaker, edge.listener)}


def _depths(graph: MessageGraph, talking: set[str]) -> dict[str, int]:
    """Layer of each agent: one below the deepest of those whose words it heard when it first worked."""
    depths: dict[str, int] = {}
    order = {node.agent: number for number, node in enumerate(graph.nodes)}
    level = 0
    for node in graph.nodes:
        above = [
            depths[edge.speaker]
            for edge in graph.edges
            if edge.listener == node.agent and order[edge.speaker] < order[node.agent]
        ]
        depths[node.agent] = max(above, default=-1) + 1
        if node.agent in talking:
            level = max(level, min(depths[node.agent], level or depths[node.agent]))
    for agent in talking:
        depths[agent] = level
    last = ("reviewer", "synthesizer")
    deepest = max((depths[node.agent] for node in graph.nodes if node.role not in last), default=-1)
    for node in graph.nodes:
        if node.role in last:
            depths[node.agent] = deepest + 1 + last.index(node.role)
    return depths


def _edges(graph: MessageGraph, places: dict[str, tuple[float, float]], top: float) -> list[str]:
    drawn: list[str] = []
    both = {(edge.speaker, edge.listener) for edge in graph.edges}
    for edge in graph.edges:
        (x1, y1), (x2, y2) = places[edge.speaker], places[edge.listener]
        if edge.speaker == edge.listener:
            continue  # everybody hears itself
        x1, y1, x2, y2 = _to_borders(x1, y1 + top, x2, y2 + top)
        bend = 10 if (edge.listener, edge.speaker) in both else 0
        length = math.hypot(x2 - x1, y2 - y1) or 1.0
        mx = (x1 + x2) / 2 - bend * (y2 - y1) / length
        my = (y1 + y2) / 2 + bend * (x2 - x1) / length
        width = min(1.0 + 0.4 * (edge.messages - 1), 3.0)
        tip = f"{edge.speaker} to {edge.listener}: {edge.messages}"
        drawn.append(
            f'<path d="M{x1:.1f} {y1:.1f} Q{mx:.1f} {my:.1f} {x2:.1f} {y2:.1f}" fill="none" stroke="#8a93a0" '
            f'stroke-width="{width:.1f}" marker-end="url(#tip)"><title>{escape(tip)}</title></path>'
        )
    return drawn


def _to_borders(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float, float]:
    """The line between two boxes' centres, cut where it leaves one and enters the other."""
    dx, dy = x2 - x1, y2 - y1
    across = (_BOX_WIDTH / 2 + 2) / abs(dx) if dx else math.inf
    down = (_BOX_HEIGHT / 2 + 2) / abs(dy) if dy else math.inf
    cut = min(across, down, 0.45)
    return x1 + dx * cut, y1 + dy * cut, x2 - dx * cut, y2 - dy * cut


def _nodes(
    graph: MessageGraph, places: dict[str, tuple[float, float]], top: float, failed: set[str]
) -> list[str]:
    drawn: list[str] = []
    for node in graph.nodes:
        x, y = places[node.agent]
        left, upper = x - _BOX_WIDTH / 2, y + top - _BOX_HEIGHT / 2
        dash = ' stroke-dasharray="4 3"' if node.agent in failed else ""
        colour = _COLOURS[node.role]
        tip = f"{node.agent}, {node.role}: {', '.join(node.keys)}"
        drawn.append(
            f'<g><title>{escape(tip)}</title><rect x="{left:.1f}" y="{upper:.1f}" width="{_BOX_WIDTH}" '
            f'height="{_BOX_HEIGHT}" rx="6" fill="#ffffff" stroke="{colour}" stroke-width="1.5"{dash}/>'
            f"{_text(x, y + top + 4, _short(node.agent, 17), colour=colour, anchor='middle')}</g>"
        )
    return drawn


# ---- the timeline ----------------------------------------------------------------------------------------


def _timeline(lanes: Sequence[Lane], top: float) -> tuple[list[str], int]:
    stamps = [
        stamp
        for lane in lanes
        for step in lane.steps
        for stamp in (step.started_at_s, step.completed_at_s)
        if stamp is not None
    ]
    if not stamps:
        return [_text(_MARGIN, top + 16, "Nothing has been recorded yet.", colour="#4b5563")], 24
    begin, end = min(stamps), max(stamps)
    span = max(end - begin, 1e-3)
    left, width = _MARGIN + _LABEL, WIDTH - 2 * _MARGIN - _LABEL - _COST
    drawn: list[str] = []
    bottom = top + 22 + len(lanes) * _ROW
    for i in range(5):
        x, at = left + width * i / 4, span * i / 4
        drawn.append(
            f'<line x1="{x:.1f}" y1="{top + 12:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#e5e7eb"/>'
        )
        drawn.append(_text(x, top + 8, f"{at:.3g} s", size=10, colour="#6b7280", anchor="middle"))
    for number, lane in enumerate(lanes):
        y = top + 22 + number * _ROW
        drawn.append(_text(_MARGIN, y + 11, _short(lane.agent, 26), colour=_COLOURS[lane.role]))
        drawn += [_bar(step, begin, span, left, width, y) for step in lane.steps]
        cost = "no price" if lane.cost_usd is None else f"${lane.cost_usd:.4f}"
        said = f"{lane.tokens} tokens, {cost}" if any(s.name == "model" for s in lane.steps) else ""
        drawn.append(_text(WIDTH - _MARGIN, y + 11, said, size=11, colour="#4b5563", anchor="end"))
    legend = [("model call", "model"), ("tool call", "tool"), ("other step", "other"), ("failed", "failed")]
    for i, (label, name) in enumerate(legend):
        x = left + i * 110
        drawn.append(f'<rect x="{x}" y="{bottom + 10:.1f}" width="10" height="10" fill="{_BARS[name]}"/>')
        drawn.append(_text(x + 15, bottom + 19, label, size=11, colour="#4b5563"))
    return drawn, int(bottom + 24 - top)


def _bar(step: RunStep, begin: float, span: float, left: float, width: float, y: float) -> str:
    started = step.started_at_s if step.started_at_s is not None else step.completed_at_s
    ended = step.completed_at_s if step.completed_at_s is not None else started
    if started is None or ended is None:
        return ""
    kind = "model" if step.name == "model" else "tool" if step.name.startswith("tool:") else "other"
    colour = _BARS["failed" if step.error else kind]
    x = left + width * (started - begin) / span
    wide = max(width * (ended - started) / span, 1.5)
    tip = f"{step.name}, {ended - started:.3f} s"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="14" rx="2" fill="{colour}" '
        f'fill-opacity="0.85"><title>{escape(tip)}</title></rect>'
    )


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    colour: str = "#111827",
    anchor: str = "start",
    bold: bool = False,
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def _short(words: str, chars_max: int) -> str:
    line = "".join(c if c.isprintable() else " " for c in " ".join(words.split()))
    return line if len(line) <= chars_max else f"{line[: chars_max - 1]}…"
