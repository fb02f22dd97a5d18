"""Acceptance criteria: what must hold of a run's answer, checked when it has one. Models and pure checks.

Four kinds are checked by this module alone; `command` and `question` need a tool and a model, and the team
runs them. A criterion that could not be checked is not met, and says why.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from agentic_flow.core.messages import Frozen, Record

CRITERIA_MAX = 50

_Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


class Contains(Record):
    """The answer has this text in it; upper and lower case are the same."""

    kind: Literal["contains"] = "contains"
    text: _Text


class Cites(Record):
    """A citation of the answer that stands is of a path that fits this glob."""

    kind: Literal["cites"] = "cites"
    path: _Text


class MinCitations(Record):
    """At least so many citations of the answer stand."""

    kind: Literal["min_citations"] = "min_citations"
    n: Annotated[int, Field(ge=1, le=1000)]


class MaxWords(Record):
    """The answer has no more words than this."""

    kind: Literal["max_words"] = "max_words"
    n: Annotated[int, Field(ge=1, le=1_000_000)]


class Command(Record):
    """This program ends with 0, started by `shell_run` in the run's folder under its policy."""

    kind: Literal["command"] = "command"
    argv: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=100)]


class Question(Record):
    """The reviewer's model says that this is true of the answer."""

    kind: Literal["question"] = "question"
    text: _Text


Criterion = Annotated[
    Contains | Cites | MinCitations | MaxWords | Command | Question, Field(discriminator="kind")
]
Mechanical = (Contains, Cites, MinCitations, MaxWords)


class Checked(Frozen):
    """A criterion and what became of it; `reason` says why it is not met, or what met it."""

    criterion: Criterion
    met: bool
    reason: str


def name_of(criterion: Criterion) -> str:
    """The criterion in a few words, for notes and errors."""
    match criterion:
        case Contains(text=text) | Question(text=text):
            return f"{criterion.kind} {text!r}"
        case Cites(path=path):
            return f"cites {path!r}"
        case MinCitations(n=n) | MaxWords(n=n):
            return f"{criterion.kind} {n}"
        case Command(argv=argv):
            return f"command {' '.join(argv)!r}"


def check(
    criterion: Contains | Cites | MinCitations | MaxWords, answer: str, paths: Sequence[str]
) -> Checked:
    """Whether an answer meets a criterion that needs nothing else.

    Args:
        criterion: Which.
        answer: The text.
        paths: Path of each citation of the answer that stands.
    """
    match criterion:
        case Contains(text=text):
            met = text.casefold() in answer.casefold()
            reason = "it is there" if met else "the answer does not have it"
        case Cites(path=pattern):
            fitting = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
            met = bool(fitting)
            reason = f"{fitting[0]!r} is cited" if met else f"{len(paths)} other citations stand"
        case MinCitations(n=n):
            met = len(paths) >= n
            reason = f"{len(paths)} stand"
        case MaxWords(n=n):
            words = len(answer.split())
            met = words <= n
            reason = f"it has {words}"
    return Checked(criterion=criterion, met=met, reason=reason)
