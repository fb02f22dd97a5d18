"""Claims and citations: what is parsed, what stands the check against the files, what falls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import PathNotFound
from agentic_flow.swarm.citations import Claim, parse_claims, rank, verify
from agentic_flow.swarm.runs import Citation

FILES = {
    "locks.py": ["import collections", "class Lock:", "    # wakes the waiters in FIFO order", "", "x = 1"],
    "a b/ünï.md": ["# Title", "Some prose about scheduling"],
}


def read_lines(path: str) -> list[str]:
    if path not in FILES:
        raise PathNotFound(f"{path!r} does not exist")
    return FILES[path]


def labels(claims: list[Claim]) -> list[list[str]]:
    return [[c.label for c in claim.citations] for claim in claims]


def test_claims_take_the_words_before_their_brackets() -> None:
    """Catches a citation credited to the wrong claim, or a claim that swallows its neighbour's words."""
    text = "Waiters are woken in order [locks.py:2-3] [locks.py:5]. Titles [a b/ünï.md:1].\n\nUncited words."
    claims = parse_claims(text)
    assert [c.text for c in claims] == ["Waiters are woken in order", "Titles"]
    assert labels(claims) == [["locks.py:2-3", "locks.py:5-5"], ["a b/ünï.md:1-1"]]


def test_quoted_lines_are_evidence_not_claims() -> None:
    """Catches a bracket inside quoted source (`x[a:1-2]`) taken for a citation."""
    text = "A claim [locks.py:1]\n    data = grid[locks.py:9-10]\n```\nother[locks.py:7]\n```\n"
    assert labels(parse_claims(text)) == [["locks.py:1-1"]]


def test_what_does_not_stand_falls_with_its_reason() -> None:
    """Catches invented files, lines past the end, empty ranges, blank lines and unrelated lines."""
    text = "\n\n".join(
        [
            "The lock wakes waiters [locks.py:2-3]",
            "Invented lock [nothere.py:1-2]",
            "The lock again [locks.py:4-400]",
            "Backwards lock [locks.py:3-2]",
            "Blank lock [locks.py:4-4]",
            "Bananas are yellow [locks.py:1-1]",
        ]
    )
    kept, fallen = verify(parse_claims(text), read_lines)
    assert labels(kept) == [["locks.py:2-3"]]
    assert kept[0].citations[0].quote == "class Lock:\n    # wakes the waiters in FIFO order"
    reasons = [entry.reason for entry in fallen]
    assert "does not exist" in reasons[0]
    assert reasons[1] == "the file has 5 lines"
    assert reasons[2] == "its line range is empty"
    assert reasons[3] == "those lines are blank"
    assert reasons[4] == "those lines do not speak of the claim"


def test_ranking_keeps_order_and_merges_overlap() -> None:
    """Catches the same evidence listed twice, or a list past its limit."""

    def cite(path: str, start: int, end: int) -> Citation:
        return Citation(path=path, line_start=start, line_end=end, quote="q")

    claims = [
        Claim(1, "a", (cite("x", 5, 9), cite("y", 1, 2))),
        Claim(2, "b", (cite("x", 9, 12), cite("x", 1, 4))),
    ]
    assert [c.label for c in rank(claims, limit=10)] == ["x:5-9", "y:1-2", "x:1-4"]
    assert len(rank(claims, limit=2)) == 2


@given(st.text(max_size=400))
def test_any_text_is_parsed(text: str) -> None:
    """Catches a crash on whatever a model may say; every parsed claim cites something."""
    for claim in parse_claims(text):
        assert claim.citations


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(categories=("L", "N"), include_characters="/._- "), min_size=1).filter(
                lambda s: s.strip() == s
            ),
            st.integers(1, 9_999_999),
            st.integers(1, 9_999_999),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_labels_round_trip(places: list[tuple[str, int, int]]) -> None:
    """Catches a path or range that our own printed label does not parse back to."""
    wanted = [Citation(path=p, line_start=a, line_end=b, quote="").label for p, a, b in places]
    text = "Claim " + " ".join(f"[{label}]" for label in wanted)
    assert [label for group in labels(parse_claims(text)) for label in group] == wanted
