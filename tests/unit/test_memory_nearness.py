"""Evidence counts as far as the task where it came about is like the task at hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.memory.confidence import DAY_S, TAUGHT_WEIGHT, Credit, believed
from agentic_flow.memory.ledger import OUTCOMES_MAX, Ledger, absorbed, credited, outcomes, retracted, taught
from agentic_flow.memory.likeness import sketch, task_words, words_of
from agentic_flow.memory.ranking import (
    ALIKE_NONE,
    ALIKE_WHOLE,
    NEARNESS_NONE,
    NEARNESS_WHOLE,
    Claim,
    pooled,
)
from agentic_flow.memory.records import Source

HALF_LIFE_DAYS = 60.0
MILL, BRIDGE = "Mend the old mill gate, number 7", "Mend the old toll bridge, number 8"
weights = st.floats(0.0, 50.0)


def claim(
    text: str,
    lesson: Any,
    balance: float,
    similarity: float = 1.0,
    *tried: tuple[str, float],
    share: float = 1.0,
) -> Claim:
    """One item under an even prior; `tried`: tasks with what the item came to there."""
    told = [(words_of(task_words(task)), weight) for task, weight in tried]
    return Claim(lesson, sketch(text), similarity, 0.0, balance, told, share)


def words(task: str) -> frozenset[str]:
    return words_of(task_words(task))


def test_what_worked_elsewhere_gives_way_to_what_failed_here() -> None:
    """Catches a lesson, proven at tasks that only sound alike, that is believed against what failed here."""
    far = 0.9 * (NEARNESS_NONE + 0.1 * (NEARNESS_WHOLE - NEARNESS_NONE))
    here = claim("Avoid `north` for the old mill gate", "avoid", 1.0, 0.9)
    elsewhere = claim("Take `north` for the old mill bridge", "do", 10.0, far)
    avoid, do = pooled([here, elsewhere])
    assert avoid.belief == pytest.approx(0.5)  # a tenth of the ten uses counts against it
    assert do.belief == pytest.approx(0.5)
    assert not avoid.told
    assert not do.told


def test_evidence_counts_where_it_came_about() -> None:
    """Catches a lesson that is told for what it never was tried at, however often it worked elsewhere, and
    one that is no longer told for its own tasks because it failed at others."""
    says = "Take `north` for the old mill gate"
    other = claim("Take `south` for the toll bridge", "do", 0.0)
    mixed = claim(says, "do", 3 * TAUGHT_WEIGHT - 4 * TAUGHT_WEIGHT, 1.0, (MILL, 2.4), (BRIDGE, -3.2))
    own, _ = pooled([mixed, other], words("Mend the old mill gate, number 9"))
    assert own == (pytest.approx(believed(2.4)), True)
    twin, _ = pooled([mixed, other], words("Mend the old toll bridge, number 9"))
    assert twin.belief < 0.05
    often = claim(says, "do", 40.0, 1.0, (MILL, 40.0))
    for near in (0.1, 1.0):
        elsewhere, _ = pooled([often._replace(similarity=near), other], words("Paint the toll bridge"))
        assert elsewhere == (0.5, False)


def test_details_of_which_no_lesson_speaks_take_no_part() -> None:
    """Catches tasks of one kind that are taken for different ones because of names, numbers and places."""
    lesson = claim("Take `north` for the old mill gate", "do", 0.8, 1.0, (f"{MILL} for Anna Smith", 0.8))
    other = claim("Take `south` for the toll bridge", "do", 0.0)
    told, _ = pooled([lesson, other], words("Mend the old mill gate, number 123 for Bob Jones of York"))
    assert told == (pytest.approx(0.8, abs=0.001), True)


@pytest.mark.parametrize(
    ("task", "belief"),
    [
        ("Mend the old mill gate", 0.8),
        (
            "Mend the old mill sluice",
            believed(TAUGHT_WEIGHT * (2 / 3 - ALIKE_NONE) / (ALIKE_WHOLE - ALIKE_NONE)),
        ),
        ("Mend the grey mill sluice", 0.5),  # one of three words that a lesson speaks of
    ],
)
@pytest.mark.parametrize("lesson", ["do", "avoid"])
def test_the_less_alike_the_less_is_known(task: str, belief: float, lesson: str) -> None:
    """Catches a verdict that is taken for knowledge about tasks that are hardly like its own, and one that
    is worth nothing as soon as a word differs."""
    other = claim("Take `south` for the grey sluice", "do", 0.0)
    one = claim("Take `north` for the old mill gate", lesson, TAUGHT_WEIGHT, 1.0, (MILL, TAUGHT_WEIGHT))
    found = pooled([one, other], words(task))[0]
    assert found == (pytest.approx(belief, abs=0.001), belief > 0.5)


def test_where_words_tell_nothing_likeness_does() -> None:
    """Catches a bank that falls silent when tasks have no word of any lesson, or under an embedder that
    understands more than words."""
    lesson = claim("Take `north` for the old mill gate", "do", 0.8, 0.9, (MILL, 0.8))
    other = claim("Take `south` for the toll bridge", "do", 0.0, 0.9 * NEARNESS_NONE)
    for task, semantic in (("Repair the water wheel's door", False), ("Toll bridge sluice repair", True)):
        assert pooled([lesson, other], words(task), semantic=semantic)[0] == (
            pytest.approx(0.8, abs=0.001),
            True,
        )
    assert not pooled([lesson, other], words("Toll bridge sluice repair"))[0].told


def test_what_is_old_is_told_unless_something_speaks_against_it() -> None:
    """Catches a lesson that is forgotten because nobody needed it for a year, and an old one that outweighs
    what was learned since."""
    old = claim("Take `north` for the old mill gate", "do", 4.0, share=0.05)
    assert pooled([old])[0] == (pytest.approx(believed(0.2)), True)
    since = claim("Avoid `north` for the old mill gate", "avoid", 1.6)
    before, now = pooled([old, since])
    assert not before.told
    assert now == (pytest.approx(believed(1.4)), True)


@given(
    st.lists(st.sampled_from("old mill gate toll bridge stone".split()), min_size=2, max_size=6, unique=True),
    st.lists(st.sampled_from("old mill gate toll bridge stone".split()), min_size=2, max_size=6, unique=True),
    weights,
)
def test_belief_follows_the_words_in_common(here: list[str], there: list[str], balance: float) -> None:
    """Catches evidence that counts though the tasks are unlike, not though they are alike, or beyond its
    weight."""
    spoken = claim("Take `south` for the old mill gate, toll bridge and stone", "do", 0.0)
    tried = claim("Take `north` for it", "do", balance, 1.0, (" ".join(there), balance))
    common = len(set(here) & set(there)) / (len(here) * len(there)) ** 0.5
    found = pooled([tried, spoken], words(" ".join(here)))[0].belief
    assert 0.5 <= found <= believed(balance) + 1e-9
    if common <= ALIKE_NONE:
        assert found == 0.5
    if common >= ALIKE_WHOLE:
        assert found == pytest.approx(believed(balance))


@given(successes=weights, failures=weights, nearer=st.floats(0.7, 1.0), further=st.floats(0.0, 1.0))
def test_the_further_off_the_less_is_known(
    successes: float, failures: float, nearer: float, further: float
) -> None:
    """Catches beliefs that get bolder with distance, or leave the side that the evidence is on."""
    best = claim("Take `south` for the tide", "do", 0.0)
    text = "Take `north` for the old mill bridge"
    near = pooled([best, claim(text, "do", successes - failures, nearer)])[1].belief
    far = pooled([best, claim(text, "do", successes - failures, nearer * further)])[1].belief
    assert abs(far - 0.5) <= abs(near - 0.5) + 1e-9
    assert (far - 0.5) * (near - 0.5) >= -1e-9


# Where it came about


def credit(run: str, outcome: str, task: str, at_s: float, ledger: Ledger) -> Ledger:
    return credited(ledger, Credit("a", run, outcome, 1.0, task=task), at_s, HALF_LIFE_DAYS)  # type: ignore[arg-type]


def balances(ledger: Ledger, now_s: float = 0.0) -> list[tuple[str, Any]]:
    return [(one.words, pytest.approx(one.balance)) for one in outcomes(ledger, now_s, HALF_LIFE_DAYS)]


def test_outcomes_are_kept_by_the_words_of_their_tasks() -> None:
    """Catches outcomes that are lost, not faded, kept beside a verdict that replaced them or after what
    taught it was taken back."""
    source = Source(trajectory_id="run1", outcome="success", task=MILL, at_s=0.0)
    ledger = taught(Ledger(), source, HALF_LIFE_DAYS)
    assert balances(ledger) == [(task_words(MILL), TAUGHT_WEIGHT)]
    ledger = credit("run2", "failure", BRIDGE, 1.0, ledger)
    ledger = credit("run3", "success", MILL, 2.0, ledger)
    later = HALF_LIFE_DAYS * DAY_S
    assert balances(ledger, later) == [(task_words(BRIDGE), -0.5), (task_words(MILL), 0.9)]
    better = credited(ledger, Credit("a", "run2", "success", 1.0, "person", BRIDGE), 1.0, HALF_LIFE_DAYS)
    assert balances(better)[0] == (task_words(BRIDGE), 1.0)
    assert balances(retracted(ledger, "run1"))[1] == (task_words(MILL), 1.0)
    unknown = credit("run4", "success", "", 3.0, ledger)
    assert balances(unknown) == balances(ledger)


def test_outcomes_move_with_a_merge_and_are_bounded() -> None:
    """Catches a merge that forgets where the other held, and rows that grow with each task."""
    one = credit("run1", "success", MILL, 0.0, Ledger())
    other = credit("run2", "success", BRIDGE, 1.0, Ledger())
    assert [words for words, _ in balances(absorbed(one, "b", other, HALF_LIFE_DAYS))] == [
        task_words(MILL),
        task_words(BRIDGE),
    ]
    many = Ledger()
    for number in range(3 * OUTCOMES_MAX):
        many = credit(f"run{number}", "success", f"task {'x' * (number + 1)}", float(number), many)
    kept = [words for words, _ in balances(many)]
    assert len(kept) == OUTCOMES_MAX
    assert kept[-1] == task_words(f"task {'x' * 3 * OUTCOMES_MAX}")
