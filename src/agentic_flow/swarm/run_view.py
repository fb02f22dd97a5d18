"""A run as its events tell of it: agents in a tree, what each does, how far it is, in words and numbers.

Pure: folds events in their order, and the account of who used what, into a `RunView`; whoever shows it has
the clock and the terminal. Events that come twice (a stream opened again) are taken once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from agentic_flow.core.messages import JsonObject
from agentic_flow.swarm.runs import RunEvent, RunResult

RECENT_MAX = 50
_RUN = "run"
_STATES = {
    "run_accepted": "queued",
    "run_started": "running",
    "run_taken_over": "running",
    "run_handed_back": "queued",
    "run_cancelled": "cancelled",
    "run_paused": "paused",
    "run_unpaused": "running",
}


@dataclass
class AgentRow:
    """One agent, or one step of a workflow, with all its assignments. Times are Unix seconds.

    Args:
        name: Of the agent.
        above: Path of what it works for (`""`: the run itself).
        role: As assigned, or "".
        path: Of its latest assignment: the `agent` of its events.
        state: "waiting" (assigned), "working", "completed", "failed", "cancelled", "unfinished" or "no part":
            a role that was played without a model.
        doing: The last step that it finished.
        steps: Recorded steps.
        begun_at_s: Of the present assignment; None when it does not work.
        worked_s: In assignments that ended.
        ended_as: State that its last assignment left it in.
        tokens: None: not known yet.
    """

    name: str
    above: str
    role: str
    path: str
    state: str = "waiting"
    doing: str = ""
    steps: int = 0
    failures: int = 0
    begun_at_s: float | None = None
    worked_s: float = 0.0
    ended_as: str = "no part"
    tokens: int | None = None
    cost_usd: float | None = 0.0

    def elapsed_s(self, now_s: float) -> float:
        """How long it has worked."""
        return self.worked_s + (max(0.0, now_s - self.begun_at_s) if self.begun_at_s is not None else 0.0)


@dataclass
class RunView:
    """A run so far; `take` its events in order, `account` for what it used."""

    run_id: str
    state: str = "queued"
    sequence: int = 0
    goal: str = ""
    topology: str = ""
    shape: str = ""
    begun_at_s: float | None = None
    ended_at_s: float | None = None
    reading: tuple[int, int] | None = None
    error: JsonObject | None = None
    tokens: int | None = None
    cost_usd: float | None = 0.0
    recent: deque[tuple[int, str]] = field(default_factory=lambda: deque[tuple[int, str]](maxlen=RECENT_MAX))
    _rows: dict[tuple[str, str], AgentRow] = field(default_factory=dict[tuple[str, str], AgentRow])
    _by_path: dict[str, AgentRow] = field(default_factory=dict[str, AgentRow])
    _assigned: set[str] = field(default_factory=set[str])
    _ended: set[str] = field(default_factory=set[str])

    # ---- what comes in -----------------------------------------------------------------------------------

    def take(self, event: RunEvent) -> str | None:
        """Fold one event in; the line that tells of it, or None when there is nothing to tell."""
        if event.kind == "ingest_progress":  # not stored, so it has no number of its own
            self.reading = (int(event.data["done"]), int(event.data["total"]))
            return None
        if event.sequence <= self.sequence:
            return None
        self.sequence = event.sequence
        if self.begun_at_s is None:
            self.begun_at_s = event.at_s
        line = self._fold(event)
        self.recent.append((event.sequence, line))
        return line

    def account(self, result: RunResult) -> None:
        """What the store says of the run and of what its agents used so far."""
        self.goal, self.topology = result.goal, result.topology
        if self.ended_at_s is None:
            self.state = result.state
        self.tokens = result.usage.input_tokens + result.usage.output_tokens
        self.cost_usd = result.usage.cost_usd
        rows: dict[str, AgentRow] = {}
        for row in self._rows.values():
            # A running one is reported under its path, an ended one under its name.
            rows[row.path.replace(".", "-")] = rows[row.name] = row
        counted: set[int] = set()
        for report in result.agents:
            row = rows.get(report.name)
            if row is None:
                continue
            if id(row) not in counted:
                row.tokens, row.cost_usd = 0, 0.0
                counted.add(id(row))
            row.tokens = (row.tokens or 0) + report.usage.input_tokens + report.usage.output_tokens
            known = row.cost_usd is not None and report.usage.cost_usd is not None
            row.cost_usd = (row.cost_usd or 0.0) + (report.usage.cost_usd or 0.0) if known else None

    # ---- what can be seen --------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether its last event has been taken."""
        return self.ended_at_s is not None

    def elapsed_s(self, now_s: float) -> float:
        """Since it was accepted, or until it ended."""
        if self.begun_at_s is None:
            return 0.0
        return max(0.0, (self.ended_at_s if self.ended_at_s is not None else now_s) - self.begun_at_s)

    def progress(self) -> tuple[int, int]:
        """Assignments that ended, and that are known. A topology does not say how many will follow."""
        return len(self._ended & self._assigned), len(self._assigned)

    def tree(self) -> list[tuple[int, AgentRow]]:
        """Rows with their depth, each below what it works for, in the order in which they appeared."""
        below: dict[str, list[AgentRow]] = {}
        for row in self._rows.values():
            below.setdefault(row.above, []).append(row)
        shown: list[tuple[int, AgentRow]] = []
        pending = [(0, row) for row in reversed(below.get("", []))]
        paths: dict[int, list[str]] = {}
        for path, row in self._by_path.items():
            paths.setdefault(id(row), []).append(path)
        while pending:
            depth, row = pending.pop()
            shown.append((depth, row))
            for path in reversed(paths[id(row)]):
                pending += [(depth + 1, lower) for lower in reversed(below.get(path, []))]
        return shown

    # ---- events ------------------------------------------------------------------------------------------

    def _fold(self, event: RunEvent) -> str:
        kind, path = event.kind, "" if event.agent in (None, _RUN) else str(event.agent)
        if kind in _STATES:
            self.state = _STATES[kind]
        match kind:
            case "agent_started":
                return self._begin(path, event)
            case "agent_finished":
                return self._finish(path, event)
            case "step_finished":
                return self._step(path, event)
            case "run_finished":
                return self._end(event)
            case _:
                words = kind.removeprefix("run_").replace("_", " ")
                return f"{self._name(path)}: {words}{_text_of(event.data.get('text'))}"

    def _begin(self, path: str, event: RunEvent) -> str:
        row = self._row(path)
        row.path, row.state, row.begun_at_s = path, "working", event.at_s
        self._assigned.add(path)
        return f"{row.name}: begins{'' if path.endswith(row.name) else f' {_leaf(path)}'}"

    def _finish(self, path: str, event: RunEvent) -> str:
        row = self._row(path)
        row.state = row.ended_as = str(event.data.get("state", "completed"))
        row.worked_s = row.elapsed_s(event.at_s)
        row.begun_at_s = None
        self._ended.add(path)
        return f"{row.name}: {row.state}{_problem(event.data.get('error'))}"

    def _step(self, path: str, event: RunEvent) -> str:
        name = event.name or ""
        if "assignments" in event.data:
            return self._assign(path, event.data)
        if path == "" and name == "ingest":
            self.reading = None
        problem = event.data.get("error")
        if path in self._by_path:
            row = self._by_path[path]
            row.steps += 1
            row.doing = name
            row.failures += problem is not None
        return f"{self._name(path)}: {name}{_problem(problem)}"

    def _assign(self, path: str, data: JsonObject) -> str:
        """Who works next. Agents are known from here; without it a row has its assignment's name."""
        self._close_batch(path)
        names: list[str] = []
        for entry in cast(list[JsonObject], data["assignments"]):
            below = f"{path}.{entry['key']}" if path else str(entry["key"])
            self._row(below, name=str(entry["agent"]), role=str(entry.get("role", "")))
            self._assigned.add(below)
            names.append(str(entry["agent"]))
        shape = str(data.get("shape") or "")
        said = f"{self._name(path)}: {f'next {_listed(names)}' if names else 'nobody is left'}"
        if shape and shape != self.shape:
            reason = data.get("reason")
            said += f"; {shape}{f' because {reason}' if reason else ''}"
            self.shape = shape
        return said

    def _end(self, event: RunEvent) -> str:
        self.state = str(event.data.get("state"))
        self.error = cast("JsonObject | None", event.data.get("error"))
        self.ended_at_s = event.at_s
        for row in self._rows.values():
            if row.begun_at_s is not None:
                row.worked_s, row.begun_at_s = row.elapsed_s(event.at_s), None
                row.state = "cancelled" if self.state == "cancelled" else "unfinished"
            elif row.state == "waiting" and self.state != "completed":
                row.state = "unfinished"
        if self.state == "completed":
            self._close_batch(None)
        return f"run: {self.state}{_problem(self.error)}"

    def _close_batch(self, above: str | None) -> None:
        """A batch is over when the next is made: what had no workflow of its own needed none."""
        for path in self._assigned - self._ended:
            row = self._by_path[path]
            if row.state == "waiting" and above in (None, path.rpartition(".")[0]):
                row.state = row.ended_as
                self._ended.add(path)

    def _row(self, path: str, *, name: str | None = None, role: str = "") -> AgentRow:
        if path in self._by_path:
            return self._by_path[path]
        above, _, leaf = path.rpartition(".")
        named = name or leaf
        row = self._rows.get((above, named))
        if row is None:
            row = self._rows[(above, named)] = AgentRow(named, above, role, path)
        elif row.begun_at_s is None:
            row.path, row.state = path, "waiting"
        self._by_path[path] = row
        return row

    def _name(self, path: str) -> str:
        return self._by_path[path].name if path in self._by_path else _leaf(path) or _RUN


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _problem(error: Any) -> str:
    if not isinstance(error, dict):
        return ""
    return f" failed: {' '.join(str(cast(JsonObject, error).get('detail')).split())}"


def _text_of(value: Any) -> str:
    return f": {' '.join(str(value).split())}" if value else ""
