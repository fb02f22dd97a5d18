#!/usr/bin/env python3
"""Check the question set and measure how much each question gives away.

Usage: ``python check.py [STDLIB]``, where STDLIB is the folder of a Python
standard library (default: that of the running interpreter).

A question gives something away when it repeats words that a search could take
straight from the right file's name or docstrings.  The *overlap* of a question
is the set of content words that it shares with

* the parts of the file's relative path, split on ``/``, ``.`` and ``_``, and
* every docstring in the file (module, classes, functions).

A *content word* is a lower-cased alphabetic token of three letters or more
that is not a stop word.  Identifiers are split on ``_`` and at camelCase humps
(the unsplit word counts too: "SQLite"), and words are compared after light
stemming (see ``stem``).

Exit status: 0 when all invariants hold and at least half of the questions
have an overlap of one word or none; 1 otherwise.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

QUESTIONS_FILE = Path(__file__).resolve().parent / "stdlib.jsonl"

MIN_QUESTIONS = 40
MIN_LENGTH = 20
MAX_LENGTH = 300
LOW_OVERLAP = 1
MIN_LOW_SHARE = 0.5
DEV_SIZE = 30
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})

STOP_WORDS = frozenset(
    """
    about above after again against all also although always among and another any
    anybody anyone anything are around because been before behind being below beside
    between beyond both but can cannot could did does doing done down during each
    either else even ever every everybody everyone everything few for from further
    had has have having her here hers herself him himself his how however into its
    itself just least less like many may maybe might mine more most much must myself
    neither never nobody none nor not nothing off once one ones only onto other others
    our ours ourselves out over own perhaps quite rather really shall she should since
    some somebody someone something still such than that the their theirs them
    themselves then there these they this those though through thus too toward towards
    under unless until upon very was were what whatever when whenever where wherever
    whether which while who whoever whom whose why will with within without would yet
    you your yours yourself yourselves
    """.split()
)
"""English function words: articles, pronouns, prepositions, conjunctions,
auxiliaries, question words and plain adverbs.  No technical word is in it, nor
a common verb such as "use" or "return": those count as content."""

_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[a-z]{3,}")
_VOWEL = re.compile(r"[aeiouy]")
_DOUBLED = re.compile(r"([bdfglmnprtz])\1$")


@dataclass(frozen=True)
class Question:
    """One question, the file that answers it best and other correct files."""

    id: str
    question: str
    file: str
    also: tuple[str, ...] = ()


def default_stdlib() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_questions(path: Path = QUESTIONS_FILE) -> list[Question]:
    """Read the questions, in file order, from a JSON Lines file."""
    questions = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                also = tuple(record.pop("also", ()))
                questions.append(Question(**record, also=also))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    return questions


def stem(word: str) -> str:
    """Strip a plural s/es, then ing or ed, then ly from a lower-case word.

    What is left must keep a vowel, so that "string" stays whole.  Endings that
    differ only in spelling are made alike: "running" meets "run", "caches"
    meets "cache" and "entries" meets "entry".  The result is a key for
    comparison and need not be an English word.
    """
    if not word.endswith("ss"):
        word = re.sub(r"(?<=ss|sh|ch)es$|(?<=[xz])es$|s$", "", word)
    for suffix in ("ing", "ed", "ly"):
        base = word.removesuffix(suffix)
        if len(base) > 1 and _VOWEL.search(base) and not word.endswith("eed"):
            word = base
    word = _DOUBLED.sub(r"\1", word.removesuffix("e"))
    return word[:-1] + "i" if word.endswith("y") else word


def content_words(text: str) -> set[str]:
    """Return the stemmed content words of a text, a path or an identifier."""
    tokens = _WORD.findall(f"{text} {_HUMP.sub(' ', text)}".lower())
    return {stem(token) for token in tokens if token not in STOP_WORDS}


def docstrings(source: str) -> list[str]:
    """Return all docstrings (module, classes, functions) of Python source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


@cache
def file_words(file_path: str, stdlib: Path) -> frozenset[str]:
    """Return the content words of a file's relative path and its docstrings."""
    with tokenize.open(stdlib / file_path) as file:
        source = file.read()
    return frozenset(content_words(" ".join([file_path, *docstrings(source)])))


def overlap(question: str, file_path: str, stdlib: Path | None = None) -> set[str]:
    """Return the content words that a question shares with a file.

    ``file_path`` is relative to ``stdlib`` (default: the running
    interpreter's).  Only its name parts and docstrings count, not its code.
    """
    return content_words(question) & file_words(file_path, stdlib or default_stdlib())


def problems(questions: Sequence[Question], stdlib: Path) -> list[str]:
    """Return a line for every invariant that does not hold."""
    found = []
    if len(questions) < MIN_QUESTIONS:
        found.append(f"only {len(questions)} questions, expected {MIN_QUESTIONS} or more")
    for field in ("id", "question"):
        counts = Counter(getattr(question, field) for question in questions)
        found += [f"{field} is not unique: {value}" for value, n in counts.items() if n > 1]
    for question in questions:
        if not MIN_LENGTH <= len(question.question) <= MAX_LENGTH:
            found.append(f"{question.id}: question has {len(question.question)} characters")
        if question.file in question.also:
            found.append(f"{question.id}: {question.file} is in `file` and in `also`")
        for name in (question.file, *question.also):
            if not (stdlib / name).is_file():
                found.append(f"{question.id}: no such file: {name}")
            elif EXCLUDED_FOLDERS.intersection(Path(name).parts):
                found.append(f"{question.id}: file is not part of the corpus: {name}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Check the set, print a summary and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the benchmark questions.")
    parser.add_argument(
        "stdlib",
        nargs="?",
        type=Path,
        default=default_stdlib(),
        help="standard library folder (default: the running interpreter's)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="list every question with the words it shares"
    )
    options = parser.parse_args(argv)

    try:
        questions = load_questions()
    except (OSError, ValueError) as error:
        print(f"FAIL  {error}")
        return 1
    found = problems(questions, options.stdlib)
    for problem in found:
        print(f"FAIL  {problem}")

    shared = {
        question.id: overlap(question.question, question.file, options.stdlib)
        for question in questions
        if (options.stdlib / question.file).is_file()
    }
    if options.verbose:
        for question in questions:
            words = sorted(shared.get(question.id, ()))
            print(f"{question.id}  {len(words)}  {question.file:<36} {' '.join(words)}")
        print()

    sizes = {name: len(words) for name, words in shared.items()}
    low = sum(size <= LOW_OVERLAP for size in sizes.values())
    halves = [
        sum(sizes[question.id] <= LOW_OVERLAP for question in half if question.id in sizes)
        for half in (questions[:DEV_SIZE], questions[DEV_SIZE:])
    ]
    histogram = Counter(sizes.values())
    rows = [
        ("questions", f"{len(questions)}"),
        ("files", f"{len({question.file for question in questions})}"),
        ("with other correct files", f"{sum(bool(question.also) for question in questions)}"),
        ("overlap of 0 or 1 word", f"{low}"),
        ("  in the dev half", f"{halves[0]}"),
        ("  in the held-out half", f"{halves[1]}"),
        ("words shared: questions", "  ".join(f"{k}: {histogram[k]}" for k in sorted(histogram))),
    ]
    for label, value in rows:
        print(f"{label:<26} {value}")

    if low < MIN_LOW_SHARE * len(questions):
        print("FAIL  fewer than half of the questions have an overlap of 0 or 1 word")
        return 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
