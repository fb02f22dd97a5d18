"""What a team has found, as pure values: claims in the order of agreement, where each peer stands, totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentic_flow.swarm.citations import Claim, content_words
from agentic_flow.swarm.runs import AgentReport, RunUsage
from agentic_flow.swarm.voting import Position, stands

Verdicts = Mapping[int, tuple[bool, str]]


def by_votes(claims: Sequence[Claim]) -> list[Claim]:
    """Claims in an order that honours agreement: cited lines that several authors found come first.

    Within equal votes the order is by each author's own rank, authors taking turns.
    """
    rank_of: dict[int, int] = {}
    seen: dict[str, int] = {}
    for number, claim in enumerate(claims):
        rank_of[number] = seen[claim.author] = seen.get(claim.author, -1) + 1
    votes = [_votes(claim, claims) for claim in claims]
    ordered = sorted(range(len(claims)), key=lambda number: (rank_of[number] - votes[number], number))
    return [
        Claim(number, claims[i].text, claims[i].citations, claims[i].author)
        for number, i in enumerate(ordered, start=1)
    ]


def _votes(claim: Claim, claims: Sequence[Claim]) -> int:
    """Number of other authors who cite overlapping lines."""
    places = {(c.path, line) for c in claim.citations for line in range(c.line_start, c.line_end + 1)}
    return len(
        {
            other.author
            for other in claims
            if other.author != claim.author
            and any((c.path, line) in places for c in other.citations for line in (c.line_start, c.line_end))
        }
    )


def position(text: str | None, claims: Sequence[Claim]) -> Position | None:
    """Where an agent stands: the lines that its claims cite, else its words; None when it said nothing.

    Args:
        text: Its words; None when it failed.
        claims: Those of its claims whose citations stand.
    """
    if text is None or not text.strip():
        return None
    places = frozenset(
        (c.path, line)
        for claim in claims
        for c in claim.citations
        for line in range(c.line_start, c.line_end + 1)
    )
    return Position(places, frozenset(content_words(text)))


def voted(claims: Sequence[Claim], verdicts: Sequence[Verdicts | None], needed: int) -> list[Claim]:
    """The claims that stand after the reviewers' verdicts.

    Args:
        claims: What was reviewed.
        verdicts: One entry for each reviewer; None: its answer could not be read.
        needed: Voices that a claim needs.
    """
    read = [entry for entry in verdicts if entry is not None]
    return [
        claim
        for claim in claims
        if stands([entry[claim.number][0] if claim.number in entry else None for entry in read], needed)
    ]


def total(reports: Sequence[AgentReport], time_s: float) -> RunUsage:
    """What all agents together used in `time_s` seconds of the run."""
    costs = [report.usage.cost_usd for report in reports]
    return RunUsage(
        input_tokens=sum(report.usage.input_tokens for report in reports),
        output_tokens=sum(report.usage.output_tokens for report in reports),
        cost_usd=None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs),
        model_calls=sum(report.usage.model_calls for report in reports),
        tool_calls=sum(report.usage.tool_calls for report in reports),
        time_s=time_s,
        delegations=sum(report.usage.delegations for report in reports),
        delegation_depth=max((report.usage.delegation_depth for report in reports), default=0),
    )
