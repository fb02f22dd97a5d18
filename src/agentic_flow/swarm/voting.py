"""Voting and comparing: how several agents' words become one decision. Pure functions, ties defined.

Three rules count votes: `majority` (more than half of those who voted), `weighted` (more than half of the
weight that voted) and `quorum` (a number of voices). An abstention is None: it is not counted as a voice for
anything, and a quorum is not lowered by it. A tie decides nothing, whatever the order in which votes came.

What agents of unequal strength say is not voted on by loudness: `compare` puts the candidates in the order in
which they pass checks, and only then asks who said so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agentic_flow.swarm.topology import Agreement

T = TypeVar("T", bound=Hashable)
C = TypeVar("C")

OVERLAP_MIN = 0.5
"""Share of the smaller set that two positions must have in common to count as agreeing."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a vote came to.

    Args:
        choice: What won, or None.
        weight: Of each choice; votes when votes are equal.
        voted: Weight of those who voted.
        abstained: Number of those who did not.
        tied: Whether two or more choices share the greatest weight.
    """

    choice: T | None
    weight: Mapping[T, float]
    voted: float
    abstained: int
    tied: bool


def majority(votes: Mapping[str, T | None]) -> Outcome[T]:
    """What more than half of those who voted chose; None when nothing did."""
    return weighted(votes, {})


def weighted(votes: Mapping[str, T | None], weights: Mapping[str, float]) -> Outcome[T]:
    """What more than half of the weight that voted chose.

    Args:
        votes: Voter → choice, None for an abstention.
        weights: Voter → weight, 1 where none is given; a voter without weight (0 or less) does not count.
    """
    counted = _count(votes, weights)
    return _decide(votes, counted, sum(counted.values()) / 2)


def quorum(votes: Mapping[str, T | None], needed: int) -> Outcome[T]:
    """What at least `needed` voters chose, when only one choice got so far.

    Args:
        needed: Voices, from 1. Abstentions do not lower it: with too few voters nothing is decided.
    """
    assert needed >= 1, needed
    counted = _count(votes, {})
    return _decide(votes, counted, needed - 0.5)


def _count(votes: Mapping[str, T | None], weights: Mapping[str, float]) -> dict[T, float]:
    counted: dict[T, float] = {}
    for voter in sorted(votes):
        choice, weight = votes[voter], weights.get(voter, 1.0)
        if choice is not None and weight > 0:
            counted[choice] = counted.get(choice, 0.0) + weight
    return counted


def _decide(votes: Mapping[str, T | None], counted: dict[T, float], above: float) -> Outcome[T]:
    most = max(counted.values(), default=0.0)
    leaders = [choice for choice, weight in counted.items() if weight == most]
    return Outcome(
        choice=leaders[0] if len(leaders) == 1 and most > above else None,
        weight=counted,
        voted=sum(counted.values()),
        abstained=sum(1 for choice in votes.values() if choice is None),
        tied=len(leaders) > 1,
    )


def majority_of(voters: int) -> int:
    """The smallest number that is more than half."""
    return voters // 2 + 1


@dataclass(frozen=True, slots=True)
class Position:
    """What one peer stands for: the (path, line) pairs it cites, or, when it cites nothing, its words."""

    places: frozenset[tuple[str, int]] = frozenset()
    words: frozenset[str] = frozenset()

    def agrees(self, other: Position) -> bool:
        """Whether both point at the same lines; without lines on either side, at the same words."""
        if self.places or other.places:
            return _overlap(self.places, other.places) >= OVERLAP_MIN
        return _overlap(self.words, other.words) >= OVERLAP_MIN


def _overlap(a: frozenset[T], b: frozenset[T]) -> float:
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def agreement(positions: Mapping[str, Position | None], needed: int) -> Agreement:
    """How many peers at most agree with one of them, itself counted.

    Args:
        positions: Peer → where it stands; None: it said nothing, which is an abstention.
        needed: Voices that count as agreement, from 1; more than there are peers means all of them.
    """
    stated = [position for _, position in sorted(positions.items()) if position is not None]
    most = max((sum(1 for other in stated if one.agrees(other) or one is other) for one in stated), default=0)
    return Agreement(most, len(positions), min(needed, len(positions)))


def stands(verdicts: Sequence[bool | None], needed: int) -> bool:
    """Whether a claim stands: at least `needed` reviewers support it.

    A reviewer who says nothing of a claim abstains. When all abstain the claim stands: the files have spoken
    for it and nobody against it. When fewer than `needed` gave a verdict, all who did must support it.
    """
    given = [verdict for verdict in verdicts if verdict is not None]
    return sum(given) >= min(needed, len(given))


@dataclass(frozen=True, slots=True)
class Ranked(Generic[C]):
    """A candidate with the names of the checks it passed and failed."""

    candidate: C
    passed: tuple[str, ...]
    failed: tuple[str, ...]


def compare(candidates: Sequence[C], checks: Mapping[str, Callable[[C], float]]) -> list[Ranked[C]]:
    """Candidates, the best first, by what can be checked.

    Args:
        candidates: What is compared.
        checks: Name → how well a candidate does, 0 being failure. Earlier checks outweigh later ones, as
            in a dictionary's order; the number passed comes before all of them.

    Returns:
        All of them. Equal candidates keep their order.
    """
    measured = [
        (candidate, {name: check(candidate) for name, check in checks.items()}) for candidate in candidates
    ]
    ordered = sorted(
        measured,
        key=lambda entry: (-sum(1 for v in entry[1].values() if v > 0), *(-v for v in entry[1].values())),
    )
    return [
        Ranked(
            candidate,
            tuple(name for name, value in values.items() if value > 0),
            tuple(name for name, value in values.items() if value <= 0),
        )
        for candidate, values in ordered
    ]
