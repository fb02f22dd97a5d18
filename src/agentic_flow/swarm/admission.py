"""What is refused before a run is stored: impossible shapes, limits beyond the settings', unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.criteria import Question
from agentic_flow.swarm.delegation import TOOLS as DELEGATION_TOOLS
from agentic_flow.swarm.payloads import Brief
from agentic_flow.swarm.runs import RunSpec
from agentic_flow.swarm.topology import agents_min, topology_named

_LIMITS = ("steps_max", "tool_calls_max", "tokens_max", "output_tokens_max")


def check_spec(spec: RunSpec, settings: SwarmSettings) -> None:
    """Whether such a run can be.

    Raises:
        InvalidInput: an option does not fit the topology or another one, or a limit is above the setting's.
    """
    topology_named(spec.topology)
    _check_shape(spec)
    for name in _LIMITS:
        asked, most = getattr(spec, name), getattr(settings, name)
        if asked is not None and asked > most:
            raise InvalidInput(
                f"{name} {asked!r} is above the setting swarm.{name}, which is {most}",
                hint=f"ask for {most} at most, or have the operator raise it",
            )
    if spec.deadline_s is not None and spec.deadline_s > settings.run_timeout_s:
        raise InvalidInput(
            f"deadline_s {spec.deadline_s!r} is above the setting swarm.run_timeout_s, which is "
            f"{settings.run_timeout_s:g}",
            hint=f"ask for {settings.run_timeout_s:g} at most, or have the operator raise it",
        )


def _check_shape(spec: RunSpec) -> None:
    if spec.teams and spec.topology not in ("hierarchical", "adaptive"):
        raise InvalidInput(
            f"topology {spec.topology!r} has no teams {spec.teams!r}",
            hint="only a hierarchical run has leads",
        )
    if spec.agents < agents_min(spec.teams):
        raise InvalidInput(
            f"{spec.agents} agents are too few for teams {spec.teams!r}",
            hint=f"ask for {agents_min(spec.teams)} agents or more: each lead counts, and needs a worker",
        )
    if bool(spec.stages) != (spec.topology == "pipeline"):
        raise InvalidInput(
            f"topology {spec.topology!r} with {len(spec.stages)} stages",
            hint="a pipeline needs stages, and only a pipeline has them",
        )
    if spec.reviewers > 1 and spec.topology == "star":
        raise InvalidInput(
            f"a star has no {spec.reviewers} reviewers: its hub reviews", hint="take another topology"
        )
    voices = spec.agents if spec.topology in ("mesh", "adaptive") else spec.reviewers
    if spec.quorum is not None and spec.quorum > max(voices, spec.reviewers):
        raise InvalidInput(
            f"a quorum of {spec.quorum} cannot be reached by {max(voices, spec.reviewers)} voices",
            hint="lower the quorum, or add reviewers or peers",
        )


def check_tools(spec: RunSpec, known: Collection[str]) -> None:
    """Whether the tools that roles are given exist.

    Raises:
        InvalidInput: one does not, or the caller may not use it; the hint names the closest.
    """
    names = {*known, *DELEGATION_TOOLS}
    for role, choice in spec.roles.items():
        for tool in choice.tools or ():
            if tool not in names:
                close = difflib.get_close_matches(tool, sorted(names), n=1)
                raise InvalidInput(
                    f"role {role!r} asks for the tool {tool!r}, which is not there or not permitted",
                    hint=f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(names))}",
                )


def check_criteria(spec: RunSpec, briefs: Mapping[str, Brief]) -> None:
    """Whether the acceptance criteria can be checked at all.

    Raises:
        InvalidInput: a question, and the reviewer's model cannot judge.
    """
    if briefs["reviewer"].generative:
        return
    for criterion in spec.acceptance:
        if isinstance(criterion, Question):
            raise InvalidInput(
                f"the criterion {criterion.text!r} is a question, and the reviewer's model "
                f"{briefs['reviewer'].model!r} judges nothing",
                hint="choose a model that writes for the role reviewer, or another kind of criterion",
            )
