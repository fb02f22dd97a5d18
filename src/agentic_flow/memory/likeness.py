"""When two items teach the same lesson, and when they contradict each other, by their words.

Merging two different lessons loses one for ever, keeping two equal ones costs a row; so the test is strict.
What tells lessons apart is often a single word in a long template ("press the red key", "press the blue
key"): names, numbers, negations and words of one closed class must agree, and where each side says something
the other does not, a meaning-aware embedder must find them close besides.

Near-linear search for like pairs: MinHash signatures in bands.

Sources: A. Broder, "On the resemblance and containment of documents" (1997); J. Leskovec, A. Rajaraman,
J. Ullman, "Mining of Massive Datasets", chapter 3 (banding).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.analysis import STOP_WORDS
from agentic_flow.memory.records import MemoryItem

_STEM, _MARK, _NEGATION, _NOTHING = range(4)

SAME_SHARE_MIN = 0.7
"""Share of the words of both that two texts must have in common, when one only adds to the other."""
MEANING_MIN = 0.93
"""Cosine of a semantic embedder from which two wordings of one lesson are taken as the same."""
MEANING_SHARE_MIN = 0.3
MATTER_SHARE_MIN = 0.5
"""Share of the words of both from which two texts with the same decisive words speak of the same matter."""

TASK_WORDS_MAX = 32
"""Words of a task that are kept with its outcome."""

SKETCH_FORMAT = 1
"""To be raised with every change of what `sketch` makes of a text: sketches that were kept count no more."""

HASHES, BANDS = 64, 16
"""16 bands of 4: a pair that shares 70 % of its words is missed once in 80, one that shares 85 % never."""
_BUCKET_MAX = 16
"""Members of a bucket that each new one is compared with: buckets of boilerplate stay linear."""

_NEGATIONS = frozenset(
    "no not never none neither nor without cannot dont doesnt didnt isnt wont cant".split()
)
_POLARITY = frozenset(
    "avoid avoided stop refrain fail failed fails failure succeed succeeded success work worked works".split()
)
_CLOSED_CLASSES = frozenset(
    """
    left right up down north south east west forward backward ahead behind above below inside outside
    top bottom first last next previous before after begin end early late open close opened closed lock
    unlock on off enable disable true false yes none always never only except unless min max
    minimum maximum
    increase decrease more less most least fast slow ascending descending read write get set put push pull
    add remove create delete start stop local remote sync async red green blue yellow purple grey gray black
    white orange pink brown one two three four five six seven eight nine ten
    """.split()
)
_WORD = re.compile(r"[^\W_]+(?:['_.:/-][^\W_]+)*")
_ASCII_WORD = re.compile(_WORD.pattern, re.ASCII)
"""The same, of texts that have no other letters: in half the time."""
_QUOTED = re.compile(r"`([^`\n]{1,80})`|\"([^\"\n]{1,40})\"")
_ORDINARY = re.compile(r"[a-z]+\Z")
_PUNCTUATION = re.compile(r"['’]")


@dataclass(frozen=True, slots=True)
class Sketch:
    """What a text says: stems of its content words, and marks, the words that tell lessons apart."""

    stems: frozenset[str]
    marks: frozenset[str]
    negations: frozenset[str]

    @property
    def words(self) -> frozenset[str]:
        """Stems and marks."""
        return self.stems | self.marks


def lesson_text(item: MemoryItem) -> str:
    """The words that say what an item teaches."""
    return f"{item.title}\n{item.description}\n{item.content}"


@lru_cache(maxsize=4096)
def sketch(text: str) -> Sketch:
    """The sketch of a text."""
    kinds: tuple[set[str], set[str], set[str], set[str]] = (set(), set(), set(), set())
    for code, quoted in _QUOTED.findall(text):
        kinds[_MARK].add((code or quoted).casefold())
    words = (_ASCII_WORD if text.isascii() else _WORD).findall(text)
    for kind, plain in map(_kind, set(words)):
        kinds[kind].add(plain)
    return Sketch(frozenset(kinds[_STEM]), frozenset(kinds[_MARK]), frozenset(kinds[_NEGATION]))


def stored_sketch(text: str) -> list[object]:
    """The sketch of a text as a JSON value, to be kept beside it: quicker to read than to make."""
    made = sketch(text)
    return [_check(text), *("\n".join(sorted(part)) for part in (made.stems, made.marks, made.negations))]


def read_sketch(text: str, stored: object) -> Sketch:
    """The sketch of a text from what was kept beside it; made anew unless that is of this very text."""
    match stored:
        case [int(check), str(stems), str(marks), str(negations)] if check == _check(text):
            return Sketch(_set(stems), _set(marks), _set(negations))
        case _:
            return sketch(text)


def _check(text: str) -> int:
    return zlib.crc32(text.encode(), SKETCH_FORMAT)


def _set(joined: str) -> frozenset[str]:
    return frozenset(joined.split("\n")) if joined else frozenset()


def task_words(task: str) -> str:
    """The words of a task that say what it is about, without bare numbers, to be kept and compared by
    `words_of`."""
    return " ".join([word for word in sorted(sketch(task).words) if not word.isdigit()][:TASK_WORDS_MAX])


@lru_cache(maxsize=16_384)
def words_of(kept: str) -> frozenset[str]:
    """The words that `task_words` gave."""
    return frozenset(kept.split())


@lru_cache(maxsize=65_536)
def _kind(word: str) -> tuple[int, str]:
    """What a word counts as, and in which form."""
    plain = _PUNCTUATION.sub("", word)
    folded = plain.casefold()
    if folded in _NEGATIONS:
        return _NEGATION, folded
    usual = plain.islower() or plain.istitle() or plain.isupper()
    if not usual or not _ORDINARY.match(folded) or folded in _CLOSED_CLASSES:
        # Numbers, identifiers, paths, mixed case; and words that exclude each other.
        return _MARK, folded
    if folded in _POLARITY or folded in STOP_WORDS:
        return _NOTHING, ""
    return _STEM, stem(folded)


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """The word without a common English ending; good enough to see that two forms are one word."""
    for ending in ("ations", "ation", "ings", "ing", "edly", "ed", "ies", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] in "ey" else word


def share(one: Sketch, other: Sketch) -> float:
    """Words in common, of the words of both: 0 to 1; marks count as words. 1 if neither has any."""
    ours, theirs = one.words, other.words
    union = len(ours | theirs)
    return len(ours & theirs) / union if union else 1.0


def same_words(one: Sketch, other: Sketch, meaning: float | None = None) -> bool:
    """Whether both say the same, polarity apart.

    Args:
        one: Of the one text.
        other: Of the other.
        meaning: Cosine of their vectors, if the embedder understands meaning.
    """
    if one.marks != other.marks:
        return False
    if not one.marks and not (one.stems and other.stems):
        return one.stems == other.stems
    common = share(one, other)
    if one.stems <= other.stems or other.stems <= one.stems:
        return common >= SAME_SHARE_MIN
    return meaning is not None and meaning >= MEANING_MIN and common >= MEANING_SHARE_MIN


def same_lesson(one: MemoryItem, other: MemoryItem, meaning: float | None = None) -> bool:
    """Whether two items teach the same, so that one of them is enough."""
    if one.lesson != other.lesson:
        return False
    ours, theirs = sketch(lesson_text(one)), sketch(lesson_text(other))
    return ours.negations == theirs.negations and same_words(ours, theirs, meaning)


def same_matter(one: Sketch, other: Sketch) -> bool:
    """Whether both speak of the same thing to do, for or against it: the same decisive words and many of the
    others; without decisive words, the same words."""
    if not one.marks or not other.marks:
        return same_words(one, other)
    return one.marks == other.marks and share(one, other) >= MATTER_SHARE_MIN


def confirms(one: MemoryItem, used: MemoryItem) -> bool:
    """Whether what a run taught says again what an item says that the run used."""
    if one.lesson != used.lesson:
        return False
    ours, theirs = sketch(lesson_text(one)), sketch(lesson_text(used))
    if ours.negations != theirs.negations or not same_matter(ours, theirs):
        return False
    return share(ours, theirs) >= SAME_SHARE_MIN


def opposed(one: MemoryItem, other: MemoryItem, meaning: float | None = None) -> bool:
    """Whether one item says to do what the other says to avoid."""
    return one.lesson != other.lesson and same_words(
        sketch(lesson_text(one)), sketch(lesson_text(other)), meaning
    )


def signatures(sketches: Sequence[Sketch]) -> NDArray[np.uint64]:
    """MinHash signatures, shape (n, HASHES); equal positions estimate the share of words in common."""
    made = np.full((len(sketches), HASHES), np.iinfo(np.uint64).max, np.uint64)
    for row, each in enumerate(sketches):
        words = sorted(each.words)
        if not words:
            continue
        hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
        mixed = (hashes[:, None] * _MULTIPLIERS + _ADDENDS) % _PRIME
        made[row] = mixed.min(axis=0)
    return made


def like_pairs(sketches: Sequence[Sketch]) -> Iterator[tuple[int, int]]:
    """Pairs that are likely to have the same words, each once; only such as have the same marks.

    The order depends on nothing but the input.
    """
    made = signatures(sketches)
    marks = [zlib.crc32(" ".join(sorted(each.marks)).encode()) for each in sketches]
    rows = HASHES // BANDS
    bands = (np.ascontiguousarray(made[:, start : start + rows]) for start in range(0, HASHES, rows))
    yield from _bucketed(
        [(mark, row.tobytes()) for mark, row in zip(marks, band, strict=True)] for band in bands
    )


def near_pairs(unit: NDArray[np.float32], seed: int = 7) -> Iterator[tuple[int, int]]:
    """Pairs of vectors that fall on the same side of many random planes, each once: likely close in angle.

    Args:
        unit: Unit vectors, shape (n, dimension).
        seed: Of the planes.

    Source: M. Charikar, "Similarity Estimation Techniques from Rounding Algorithms" (STOC 2002).
    """
    rng = np.random.default_rng(seed)
    weights = 1 << np.arange(_PLANES, dtype=np.int64)
    planes = (rng.standard_normal((unit.shape[1], _PLANES)).astype(np.float32) for _ in range(_TABLES))
    yield from _bucketed((((unit @ each) > 0) @ weights).tolist() for each in planes)


def _bucketed(tables: Iterable[Iterable[Hashable]]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose keys are equal in one of the tables, each once."""
    seen: set[tuple[int, int]] = set()
    for keys in tables:
        buckets: dict[Hashable, list[int]] = {}
        for index, key in enumerate(keys):
            members = buckets.setdefault(key, [])
            for member in members:
                pair = (member, index)
                if pair not in seen:
                    seen.add(pair)
                    yield pair
            if len(members) < _BUCKET_MAX:
                members.append(index)


def cosine(ours: frozenset[str], theirs: frozenset[str]) -> float:
    """Cosine of two sets of words: 0 to 1, 0 if either has none."""
    if not ours or not theirs:
        return 0.0
    return len(ours & theirs) / math.sqrt(len(ours) * len(theirs))


_PLANES, _TABLES = 12, 12
_PRIME = np.uint64(4_294_967_311)
_rng = np.random.default_rng(20_250_929)
_MULTIPLIERS = _rng.integers(1, 2**31, HASHES, dtype=np.uint64)
_ADDENDS = _rng.integers(0, 2**31, HASHES, dtype=np.uint64)
