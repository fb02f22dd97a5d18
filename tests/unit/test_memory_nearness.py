"""An item's own evidence counts as far as the item is about the task at hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.memory.likeness import sketch
from agentic_flow.memory.ranking import NEARNESS_NONE, NEARNESS_WHOLE, Claim, pooled

weights = st.floats(0.0, 50.0)


def claim(text: str, lesson: str, successes: float, failures: float, similarity: float) -> Claim:
    """One item under an even prior."""
    return Claim(lesson, sketch(text), similarity, 1.0 + successes, 1.0 + failures, successes, failures)


def test_what_worked_elsewhere_gives_way_to_what_failed_here() -> None:
    """Catches a lesson, proven at tasks that only sound alike, that is believed against what failed here."""
    far = 0.9 * (NEARNESS_NONE + 0.1 * (NEARNESS_WHOLE - NEARNESS_NONE))
    here = claim("Avoid `north` for the old mill gate", "avoid", 1.0, 0.0, 0.9)
    elsewhere = claim("Take `north` for the old mill bridge", "do", 10.0, 0.0, far)
    (avoid, _), (do, disputed) = pooled([here, elsewhere])
    assert disputed
    assert avoid == pytest.approx(0.5)  # a tenth of the ten uses counts against it
    assert do == pytest.approx(0.5)


@given(successes=weights, failures=weights, nearer=st.floats(0.7, 1.0), further=st.floats(0.0, 1.0))
def test_the_further_off_the_less_is_known(
    successes: float, failures: float, nearer: float, further: float
) -> None:
    """Catches beliefs that get bolder with distance, or leave the side that the evidence is on."""
    best = claim("Take `south` for the tide", "do", 0.0, 0.0, 1.0)
    text = "Take `north` for the old mill bridge"
    near = pooled([best, claim(text, "do", successes, failures, nearer)])[1][0]
    far = pooled([best, claim(text, "do", successes, failures, nearer * further)])[1][0]
    assert abs(far - 0.5) <= abs(near - 0.5) + 1e-9
    assert (far - 0.5) * (near - 0.5) >= -1e-9
