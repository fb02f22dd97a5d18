"""What the workflows of a run and of its agents are given and leave: the records that a resume reads."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

from agentic_flow.core.auth import Principal
from agentic_flow.core.messages import JsonObject, Record
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.runs import AgentReport, RunSpec, RunUsage
from agentic_flow.swarm.topology import Assignment, Role, Shape

_FIELDS = frozenset(field.name for field in fields(Assignment))
RUN = "run"
AGENT = "agent"


class Brief(Record):
    """One persona, fixed when the run is accepted so that a resume uses the same words."""

    system: str
    model: str
    generative: bool
    tools: tuple[str, ...] = ()


class RunPayload(Record):
    """All that a run needs to be done again elsewhere; what the engine stores as its input.

    `briefs` has one persona for each role, and one for each stage of a pipeline (`stage-1`). `account`: whose
    budget it draws on; None: its own. `retry_of`: the run whose steps before `retry_from` it has taken over,
    and `retry_traceparent` its trace. `traceparent`: the trace that all work on it belongs to.
    """

    spec: RunSpec
    subject: str
    tenant: str
    scopes: tuple[str, ...]
    folder: JsonObject | None
    briefs: dict[str, Brief]
    started_at_s: float
    account: Account | None = None
    retry_of: str | None = None
    retry_from: str | None = None
    traceparent: str | None = None
    retry_traceparent: str | None = None

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant, self.subject, frozenset(self.scopes))

    def brief(self, assignment: Assignment) -> Brief:
        """The persona of whoever does this."""
        return self.briefs[assignment.persona or assignment.role]

    @property
    def generative(self) -> bool:
        """Whether any of its models writes."""
        return any(brief.generative for brief in self.briefs.values())

    def time_left_s(self, settings: SwarmSettings) -> float:
        """Wall time that the run may still take here; its deadline goes on while nobody works on it."""
        deadline_s = self.spec.deadline_s
        if deadline_s is None:
            return settings.run_timeout_s
        return max(0.0, min(settings.run_timeout_s, self.started_at_s + deadline_s - time.time()))


class Account(Record):
    """The workflow whose budget, tokens and deadline its steps share."""

    run_id: str
    payload: RunPayload


class AgentPayload(Record):
    """One assignment, or one question of an agent to another, with everything its agent may use.

    `asked` are the roles and questions above a delegated question, the outermost first; empty for an
    assignment. `room`: the blackboard's.
    """

    run_id: str
    agent: str
    role: Role
    question: str
    prompt: str
    brief: Brief
    run: RunPayload
    room: str | None = None
    asked: tuple[tuple[str, str], ...] = ()


class AgentOutput(Record):
    """What an agent left: its words, what they cost, and what those it asked did."""

    text: str
    model: str
    steps: int = 0
    usage: RunUsage = RunUsage()
    delegates: tuple[AgentReport, ...] = ()


def shape_of(spec: RunSpec) -> Shape:
    """What the run asks of its topology."""
    return Shape(
        agents=spec.agents,
        teams=spec.teams,
        rounds_max=spec.rounds_max,
        laps=spec.laps,
        stages=tuple((stage.agent.lower().replace("_", "-"), stage.task) for stage in spec.stages),
        reviewers=spec.reviewers,
    )


def as_record(assignment: Assignment) -> JsonObject:
    """An assignment as a recorded step has it; without what is as by default."""
    record: JsonObject = {"key": assignment.key, "agent": assignment.agent, "role": assignment.role}
    optional: dict[str, Any] = {
        "question": assignment.question,
        "sees": list(assignment.sees),
        "tasks_max": assignment.tasks_max,
        "persona": assignment.persona,
        "ballot": assignment.ballot,
        "room": assignment.room,
    }
    return record | {name: value for name, value in optional.items() if value}


def from_record(record: JsonObject) -> Assignment:
    """The inverse of `as_record`; what only a newer build knows of it is passed over."""
    known: dict[str, Any] = {name: record[name] for name in _FIELDS & record.keys()}
    known["sees"] = tuple(record.get("sees", ()))
    return Assignment(**known)
