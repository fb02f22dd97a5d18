"""Tasks of one kind are told by the company that their words keep."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.memory.likeness import cosine
from agentic_flow.memory.wordings import MET_WEIGHT, Wordings

SHARED = ("gate", "bolt", "hinge")
MILL, TOLL = ("mill", "wheel", "sluice"), ("toll", "bridge", "barrier")

words = st.frozensets(st.sampled_from("abcdefgh"), max_size=6)


def of_kind(own: tuple[str, ...]) -> list[frozenset[str]]:
    """All ways to tell a task of the kind: two words of its own, two that another kind has, too."""
    return [
        frozenset((*two, *shared))
        for two in itertools.combinations(own, 2)
        for shared in itertools.combinations(SHARED, 2)
    ]


def test_kinds_that_sound_alike_are_told_apart() -> None:
    """Catches what worked in one kind of task being taken for knowledge of another because half of the words
    are the same, and tasks of one kind being strangers because half of them are not."""
    task = frozenset(("mill", "wheel", "gate", "bolt"))
    kin, twin = frozenset(("mill", "sluice", "gate", "hinge")), frozenset(("toll", "bridge", "gate", "bolt"))
    assert cosine(task, kin) == cosine(task, twin) == 0.5
    seen = Wordings(task, of_kind(MILL) + of_kind(TOLL))
    assert seen.alike(kin) == pytest.approx(0.5 + 0.5 * MET_WEIGHT)
    assert seen.alike(twin) < 0.4
    # With few tasks seen, little is known of who keeps company; the more, the more.
    few = [Wordings(task, of_kind(MILL)[:n] + of_kind(TOLL)[:n]).alike(twin) for n in (0, 1, 3, 9)]
    assert few == sorted(few, reverse=True)
    assert few[0] == 0.5 > few[-1]


def test_every_two_tasks_of_one_kind_are_nearer_than_of_two() -> None:
    """Catches a likeness that depends on which words a task happens to be told in."""
    mill, toll = of_kind(MILL), of_kind(TOLL)
    for task in mill:
        seen = Wordings(task, mill + toll)
        assert min(map(seen.alike, mill)) > max(map(seen.alike, toll))


@given(words, st.lists(words, max_size=12), words)
def test_likeness_is_the_cosine_bent_by_what_was_seen(
    task: frozenset[str], tried: list[frozenset[str]], other: frozenset[str]
) -> None:
    """Catches likeness outside of 0 to 1, of nothing in common, less than whole of the same words, that
    depends on which of two comes first or on how often one wording was tried."""
    found = Wordings(task, tried).alike(other)
    plain = cosine(task, other)
    assert 0.0 <= found <= plain + MET_WEIGHT * (1.0 - plain)
    assert (found > 0.0) == (plain > 0.0) or found < plain
    assert Wordings(other, tried).alike(task) == pytest.approx(found)
    assert Wordings(task, tried + tried).alike(other) == found
    assert Wordings(task, tried, least=0.5).alike(other) == found or found <= 0.5 >= plain
    if task == other or not tried:
        assert found == plain


def test_long_tasks_are_compared_as_well() -> None:
    """Catches sums over pairs of words that go wrong where there are many."""
    chance = random.Random(5)
    vocabulary = [f"word{number}" for number in range(60)]
    tried = [frozenset(chance.sample(vocabulary, 32)) for _ in range(400)]
    seen = Wordings(tried[0], tried)
    # Of 400 tasks that draw their words from one vocabulary, any two words have met.
    for other in tried[1:]:
        plain = cosine(tried[0], other)
        assert seen.alike(other) == pytest.approx(plain + MET_WEIGHT * (1.0 - plain))
