"""Votes: what wins, what a tie does, and that loudness and order change nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.voting import (
    Position,
    agreement,
    compare,
    majority,
    majority_of,
    quorum,
    stands,
    weighted,
)

VOTES = st.dictionaries(st.text(max_size=3), st.sampled_from(["a", "b", "c", None]), max_size=12)


@pytest.mark.parametrize(
    ("votes", "choice"),
    [
        ("aab", "a"),
        ("ab", None),
        ("aabb", None),
        ("aabc", None),
        ("a--", "a"),
        ("---", None),
        ("", None),
    ],
)
def test_a_majority_is_more_than_half_of_those_who_voted(votes: str, choice: str | None) -> None:
    """Catches a plurality or a tie taken for a majority, and abstentions counted as votes."""
    given_votes = {str(i): None if vote == "-" else vote for i, vote in enumerate(votes)}
    assert majority(given_votes).choice == choice


@given(VOTES)
def test_a_majority_is_sound(votes: dict[str, str | None]) -> None:
    """Catches a winner without more than half, or no winner where there is one."""
    voices = [vote for vote in votes.values() if vote is not None]
    expected = next((c for c in set(voices) if 2 * voices.count(c) > len(voices)), None)
    result = majority(votes)
    assert result.choice == expected
    assert (result.voted, result.abstained) == (len(voices), len(votes) - len(voices))


@given(VOTES, st.dictionaries(st.text(max_size=3), st.floats(-1, 5, allow_nan=False), max_size=12))
def test_a_weighted_winner_outweighs_all_the_others(
    votes: dict[str, str | None], weights: dict[str, float]
) -> None:
    """Catches weights that are ignored, and negative ones that count."""
    result = weighted(votes, weights)
    if result.choice is not None:
        own = sum(max(weights.get(v, 1.0), 0) for v, c in votes.items() if c == result.choice)
        others = sum(max(weights.get(v, 1.0), 0) for v, c in votes.items() if c not in (None, result.choice))
        assert own > others
    assert not (result.tied and result.choice)


@given(VOTES, st.integers(1, 13))
def test_a_quorum_needs_its_number_and_a_single_leader(votes: dict[str, str | None], needed: int) -> None:
    """Catches a quorum lowered by abstentions, and one that a tie decides."""
    voices = [vote for vote in votes.values() if vote is not None]
    result = quorum(votes, needed)
    if result.choice is not None:
        assert voices.count(result.choice) >= needed
        assert all(voices.count(c) < voices.count(result.choice) for c in set(voices) - {result.choice})
    elif voices and not result.tied:
        assert max(voices.count(c) for c in set(voices)) < needed


@given(st.permutations(["x", "y", "z", "u", "v"]), st.lists(st.sampled_from("ab-"), min_size=5, max_size=5))
def test_the_order_of_votes_changes_nothing(order: list[str], choices: list[str]) -> None:
    """Catches a vote that whoever answers first wins."""
    votes = {name: None if c == "-" else c for name, c in zip("xyzuv", choices, strict=True)}
    shuffled = {name: votes[name] for name in order}
    assert majority(votes) == majority(shuffled)
    assert quorum(votes, 2).choice == quorum(shuffled, 2).choice


def place(*lines: int) -> Position:
    return Position(frozenset(("f.py", line) for line in lines))


def words(text: str) -> Position:
    return Position(words=frozenset(text.split()))


def test_peers_agree_when_they_point_at_the_same_lines() -> None:
    """Catches agreement measured by words where there is evidence, and silence counted as agreement."""
    found = agreement({"p1": place(1, 2), "p2": place(2), "p3": place(9), "p4": None}, 3)
    assert (found.agree, found.voters, found.quorum, found.reached) == (2, 4, 3, False)
    assert agreement({"p1": place(1, 2), "p2": place(2), "p3": place(1)}, 2).reached
    assert agreement({"p1": words("a b c"), "p2": words("a b")}, 2).reached
    assert not agreement({"p1": words("a b c"), "p2": words("d")}, 2).reached
    assert not agreement({"p1": place(1), "p2": words("a")}, 2).reached
    assert not agreement({"p1": None, "p2": None}, 1).reached
    assert not agreement({}, 1).reached


@given(
    st.dictionaries(
        st.text(max_size=2),
        st.none() | st.sets(st.integers(1, 4)).map(lambda lines: place(*lines)),
        max_size=8,
    ),
    st.integers(1, 9),
)
def test_agreement_stays_within_its_bounds(positions: dict[str, Position | None], needed: int) -> None:
    """Catches more voices than voters and a quorum that could never be reached."""
    found = agreement(positions, needed)
    stated = sum(1 for position in positions.values() if position is not None)
    assert (stated > 0) <= found.agree <= stated <= found.voters
    assert found.quorum <= found.voters


@pytest.mark.parametrize(
    ("verdicts", "needed", "stood"),
    [
        ([True], 1, True),
        ([False], 1, False),
        ([None], 1, True),
        ([True, False, True], 2, True),
        ([True, False, False], 2, False),
        ([True, False, None], 2, False),
        ([True, None, None], 2, True),
        ([True, True, False], 3, False),
        ([], 1, True),
    ],
)
def test_a_claim_stands_by_its_reviewers(verdicts: list[bool | None], needed: int, stood: bool) -> None:
    """Catches one loud reviewer deciding for all, and silence taken for a rejection."""
    assert stands(verdicts, needed) is stood


@given(st.lists(st.sampled_from([True, False, None]), max_size=7), st.integers(1, 7))
def test_one_more_supporter_never_fells_a_claim(verdicts: list[bool | None], needed: int) -> None:
    """Catches a gate that is not monotone."""
    for i, verdict in enumerate(verdicts):
        if verdict is False and stands(verdicts, needed):
            assert stands([*verdicts[:i], True, *verdicts[i + 1 :]], needed)


def test_candidates_are_ordered_by_what_can_be_checked() -> None:
    """Catches the longest answer winning over the one whose citations stand."""
    loud = {"who": "loud", "citations": 0, "words": 900}
    plain = {"who": "plain", "citations": 2, "words": 20}
    strong = {"who": "strong", "citations": 3, "words": 10}
    ranked = compare(
        [loud, plain, strong],
        {"citations stand": lambda c: float(c["citations"]), "says something": lambda c: float(c["words"])},
    )
    assert [entry.candidate["who"] for entry in ranked] == ["strong", "plain", "loud"]
    assert ranked[-1].failed == ("citations stand",)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9))
def test_comparing_is_a_stable_order(candidates: list[tuple[int, int]]) -> None:
    """Catches candidates that are lost, or a better one placed behind a worse one."""
    checks = {"first": lambda c: float(c[0]), "second": lambda c: float(c[1])}
    ranked = [entry.candidate for entry in compare(candidates, checks)]
    assert sorted(ranked) == sorted(candidates)
    for better, worse in pairwise(ranked):
        assert not (worse[0] >= better[0] and worse[1] >= better[1] and worse != better)


@given(st.integers(0, 100))
def test_more_than_half(voters: int) -> None:
    """Catches half counted as a majority."""
    assert 2 * majority_of(voters) > voters >= 2 * (majority_of(voters) - 1)
