"""Which tasks are of one kind, by the words that they are told in.

Two tasks of one kind are rarely told in the same words, and tasks of two kinds may have half of their words
in common. What tells them apart is the company that words keep: the words in which two tasks of one kind
differ occur together in others of it; those of two kinds never do, however often each of them occurs. Looked
at for this are the tasks in which the lessons of one recall were tried: it takes some to tell, and no index.

Source: likeness of words by the words that they occur with is Z. Harris, "Distributional Structure" (1954).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from agentic_flow.memory.likeness import cosine

MET_WEIGHT = 0.3
"""What words that occur together elsewhere count for, where two tasks have not the same ones."""
APART_HALF = 10
"""Tasks that each of two words must have occurred in, and never together, to be half apart."""


class Wordings:
    """Tasks in which lessons were tried, to compare one task with each of them.

    Args:
        task: Words of the task.
        tried: Words of the others; what was told in the same words twice is one.
        least: Likeness up to which it does not matter how much there is: nobody looks at it closer.
    """

    def __init__(self, task: frozenset[str], tried: Iterable[frozenset[str]], *, least: float = 0.0) -> None:
        self._task = task
        self._tried = tried
        self._least = least
        self._known: dict[frozenset[str], float] = {}

    @cached_property
    def _company(self) -> tuple[Counter[str], dict[str, set[str]]]:
        """How many of the others have a word, and the words that occur with it; made when first asked for."""
        seen: Counter[str] = Counter()
        company: dict[str, set[str]] = {}
        for words in set(self._tried):
            seen.update(words)
            for word in words:
                company.setdefault(word, set()).update(words)
        return seen, company

    def alike(self, other: frozenset[str]) -> float:
        """Likeness of the task and one of the others: 0 to 1.

        The cosine of their words; more where the words in which they differ keep company elsewhere, less
        where these often occur and never with each other.
        """
        found = self._known.get(other)
        if found is None:
            found = self._known[other] = self._compared(other)
        return found

    def _compared(self, other: frozenset[str]) -> float:
        same = cosine(self._task, other)
        ours, theirs = self._task - other, other - self._task
        if same + MET_WEIGHT * (1.0 - same) <= self._least or not (same and ours and theirs):
            return same
        seen, company = self._company
        strangers = [
            min(seen[word], seen[one]) for word in ours for one in theirs.difference(company.get(word, ()))
        ]
        pairs = len(ours) * len(theirs)
        met = 1.0 - len(strangers) / pairs
        # Words come in any order: a plain sum would differ by the last digit from run to run.
        apart = math.fsum(1.0 - 0.5 ** (times / APART_HALF) for times in strangers) / pairs
        return (same + MET_WEIGHT * met * (1.0 - same)) * (1.0 - apart)
