"""Topologies: pure functions from what a team has produced to who works next, and on whose output.

A run is a graph of assignments. Each assignment has a key, an agent, a role, and the keys of the earlier
outputs it is shown; nothing else reaches the agent, so `sees` *is* the message graph. A topology looks at
the outputs so far and returns the next batch; the batch runs in parallel; an empty batch ends the run.
The last assignment's role is always `synthesizer`: its output is the answer.

    hierarchical  planner → workers → reviewer → synthesizer
    star          hub → spokes → hub (reviews and merges; spokes never see each other)
    mesh          everybody works on the goal → everybody sees everybody and revises → reviewer → synthesizer
    ring          each agent refines the work of the one before it → reviewer → synthesizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["planner", "worker", "reviewer", "synthesizer"]

PLAN = "plan"
REVIEW = "review"
MERGE = "merge"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One piece of work. `key` is unique in the run; `question` is None when the role implies it."""

    key: str
    agent: str
    role: Role
    question: str | None = None
    sees: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TeamState:
    """What a topology may look at.

    Args:
        goal: The run's goal.
        agents: Number of workers asked for.
        tasks: Questions of the plan; empty until there is one.
        done: Keys of finished assignments → whether they produced something usable.
    """

    goal: str
    agents: int
    tasks: tuple[str, ...]
    done: Mapping[str, bool]

    def usable(self, prefix: str) -> tuple[str, ...]:
        """Keys of usable outputs that start with `prefix`, in key order."""
        return tuple(sorted((k for k, ok in self.done.items() if ok and k.startswith(prefix)), key=_natural))

    def question(self, number: int) -> str:
        """What worker `number` (from 1) works on when the topology gives everybody the whole goal."""
        return self.tasks[(number - 1) % len(self.tasks)] if self.tasks else self.goal

    def finished(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.done)


Topology = Callable[[TeamState], tuple[Assignment, ...]]


def hierarchical(state: TeamState) -> tuple[Assignment, ...]:
    """A planner splits the goal, workers answer the parts, a reviewer checks, a synthesizer merges."""
    if not state.finished(PLAN):
        return (Assignment(PLAN, "planner", "planner", state.goal),)
    if not state.finished("work-"):
        return tuple(
            Assignment(f"work-{i}", f"worker-{i}", "worker", task, (PLAN,))
            for i, task in enumerate(state.tasks[: state.agents], start=1)
        )
    return _review_and_merge(state, state.usable("work-"))


def star(state: TeamState) -> tuple[Assignment, ...]:
    """One hub plans, reviews and merges; spokes work alone and speak to the hub only."""
    if not state.finished(PLAN):
        return (Assignment(PLAN, "hub", "planner", state.goal),)
    if not state.finished("work-"):
        return tuple(
            Assignment(f"work-{i}", f"spoke-{i}", "worker", task, (PLAN,))
            for i, task in enumerate(state.tasks[: state.agents], start=1)
        )
    return _review_and_merge(state, state.usable("work-"), reviewer="hub", synthesizer="hub")


def mesh(state: TeamState) -> tuple[Assignment, ...]:
    """All peers answer the goal, then each revises in sight of all the others; agreement counts."""
    peers = range(1, state.agents + 1)
    if not state.finished("draft-"):
        return tuple(Assignment(f"draft-{i}", f"peer-{i}", "worker", state.question(i)) for i in peers)
    if state.agents > 1 and state.usable("draft-") and not state.finished("work-"):
        drafts = state.usable("draft-")
        return tuple(Assignment(f"work-{i}", f"peer-{i}", "worker", state.question(i), drafts) for i in peers)
    return _review_and_merge(state, state.usable("work-") or state.usable("draft-"))


def ring(state: TeamState) -> tuple[Assignment, ...]:
    """Agent i sees only what agent i - 1 handed over, refines it, and hands it on; once around."""
    for i in range(1, state.agents + 1):
        if f"work-{i}" not in state.done:
            handed_over = state.usable("work-")[-1:]
            return (Assignment(f"work-{i}", f"link-{i}", "worker", state.question(i), handed_over),)
    return _review_and_merge(state, state.usable("work-")[-1:])


def _review_and_merge(
    state: TeamState,
    findings: tuple[str, ...],
    *,
    reviewer: str = "reviewer",
    synthesizer: str = "synthesizer",
) -> tuple[Assignment, ...]:
    if not findings:
        return ()  # nothing to review: the run fails, and says whose errors led there
    if not state.finished(REVIEW):
        return (Assignment(REVIEW, reviewer, "reviewer", state.goal, findings),)
    if not state.finished(MERGE):
        return (Assignment(MERGE, synthesizer, "synthesizer", state.goal, (*findings, REVIEW)),)
    return ()


def _natural(key: str) -> tuple[str, int]:
    stem, _, number = key.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (key, 0)


TOPOLOGIES: dict[str, Topology] = {
    "hierarchical": hierarchical,
    "star": star,
    "mesh": mesh,
    "ring": ring,
}
