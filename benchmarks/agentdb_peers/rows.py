"""The rows that every system gets, the queries, and the exact answers; kept in a folder as `.npy` files.

Rows: unit vectors around `rows / 100` centres, that is centre + 0.6 × noise, both standard normal in each
dimension. Queries are drawn the same way and are not rows. A row's attributes follow from its number:
`tenth` (10 values), `hundredth` (100 values) and `tenant` (100 tenants). Its text is ten words from a
vocabulary of 5,000 whose frequencies fall off as in a language.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DIMENSION, K, SEED = 384, 10, 20261129
BLOCK_ROWS = 10_000
ROWS_PER_CLUSTER = 100
NOISE = 0.6
WORDS_PER_TEXT, VOCABULARY = 10, 5000
TENANT = 7
"""The tenant that is asked about; it has 1 % of the rows."""

Kind = Literal["all", "tenth", "hundredth", "tenant"]
KINDS: tuple[Kind, ...] = ("all", "tenth", "hundredth", "tenant")
Floats = NDArray[np.float32]


def value_of(kind: Kind, number: int) -> int:
    """The value of a row's attribute."""
    return {"all": 0, "tenth": number % 10, "hundredth": number // 10 % 100, "tenant": number // 3 % 100}[
        kind
    ]


def row_id(number: int) -> str:
    """External id of a row."""
    return f"row-{number:07d}"


def row_number(item_id: str) -> int:
    """The row that has this id."""
    return int(item_id[4:])


@dataclass(frozen=True, slots=True)
class Row:
    """One row to store."""

    number: int
    text: str
    vector: Floats

    @property
    def id(self) -> str:
        return row_id(self.number)

    @property
    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = {kind: value_of(kind, self.number) for kind in KINDS[1:]}
        return {**found, "source": f"note-{self.number // 20}.md"}


@dataclass(frozen=True, slots=True)
class Query:
    """One question: the nearest `K` rows, of those whose attribute `kind` has `value`."""

    vector: Floats
    kind: Kind
    value: int


class Rows:
    """Generated rows in a folder.

    Args:
        folder: Where they are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        about = json.loads((folder / "about.json").read_text("utf-8"))
        self.count: int = about["rows"]
        self.queries: Floats = np.load(folder / "queries.npy")
        self._truth: dict[str, NDArray[np.int64]] = dict(np.load(folder / "truth.npz"))

    @property
    def vectors(self) -> Floats:
        """All vectors, mapped from the file."""
        return np.load(self._folder / "vectors.npy", mmap_mode="r")

    def block(self, start: int, stop: int) -> list[Row]:
        """Rows start … stop, read (not mapped: a mapped file would count as memory of the system)."""
        with (self._folder / "vectors.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(start * DIMENSION * 4, 1)
            vectors = np.fromfile(file, np.float32, (stop - start) * DIMENSION).reshape(-1, DIMENSION)
        texts = make_texts(start, stop)
        return [Row(start + i, texts[i], vectors[i]) for i in range(stop - start)]

    def blocks(self, size: int = 1000) -> Iterator[list[Row]]:
        """All rows in order."""
        for start in range(0, self.count, size):
            yield self.block(start, min(start + size, self.count))

    def query(self, kind: Kind, position: int) -> Query:
        """The query at a position (they repeat), with the value that its filter asks for."""
        values = {"all": 1, "tenth": 10, "hundredth": 100, "tenant": 1}[kind]
        value = TENANT if kind == "tenant" else position % len(self.queries) % values
        return Query(self.queries[position % len(self.queries)], kind, value)

    def truth(self, kind: Kind, position: int) -> set[int]:
        """Numbers of the rows that are nearest."""
        return set(self._truth[kind][position % len(self.queries)].tolist())


def make_rows(folder: Path, count: int, queries: int) -> Rows:
    """Generate rows, queries and exact answers, unless the folder has them already."""
    wanted = {"rows": count, "queries": queries, "seed": SEED, "dimension": DIMENSION, "noise": NOISE}
    about = folder / "about.json"
    if about.exists() and json.loads(about.read_text("utf-8")) == wanted:
        return Rows(folder)
    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng([SEED, 0]).standard_normal(
        (max(count // ROWS_PER_CLUSTER, 1), DIMENSION), np.float32
    )
    asked = _around(centres, np.random.default_rng([SEED, 1]), queries)
    np.save(folder / "queries.npy", asked)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (count, DIMENSION))
    nearest = {kind: _Nearest(queries) for kind in KINDS}
    positions = np.arange(queries)
    for start in range(0, count, BLOCK_ROWS):
        numbers = np.arange(start, min(start + BLOCK_ROWS, count))
        block = _around(centres, np.random.default_rng([SEED, 2, start]), len(numbers))
        vectors[start : start + len(numbers)] = block
        scores = asked @ block.T
        for kind, values in (("all", 1), ("tenth", 10), ("hundredth", 100), ("tenant", 1)):
            of_rows = {"all": numbers * 0, "tenth": numbers % 10, "hundredth": numbers // 10 % 100}.get(
                kind, numbers // 3 % 100
            )
            of_queries = positions * 0 + TENANT if kind == "tenant" else positions % values
            nearest[kind].take(np.where(of_queries[:, None] == of_rows, scores, -np.inf), numbers)
    vectors.flush()
    np.savez(folder / "truth.npz", **{kind: found.numbers for kind, found in nearest.items()})
    about.write_text(json.dumps(wanted), "utf-8")
    return Rows(folder)


class _Nearest:
    """The best `K` rows of each query so far."""

    def __init__(self, queries: int) -> None:
        self.numbers = np.full((queries, K), -1, np.int64)
        self._scores = np.full((queries, K), -np.inf, np.float32)

    def take(self, scores: Floats, numbers: NDArray[np.int64]) -> None:
        both = np.concatenate([self._scores, scores], axis=1)
        all_numbers = np.concatenate([self.numbers, np.broadcast_to(numbers, scores.shape)], axis=1)
        order = (
            np.argsort(-both, axis=1)[:, :K]
            if both.shape[1] <= K
            else np.argpartition(-both, K, axis=1)[:, :K]
        )
        self._scores = np.take_along_axis(both, order, axis=1)
        self.numbers = np.take_along_axis(all_numbers, order, axis=1)


def _around(centres: Floats, rng: np.random.Generator, count: int) -> Floats:
    noise = rng.standard_normal((count, DIMENSION), np.float32)
    found = centres[rng.integers(0, len(centres), count)] + np.float32(NOISE) * noise
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def make_texts(start: int, stop: int) -> list[str]:
    """Texts of rows start … stop; the same wherever the blocks begin."""
    texts: list[str] = []
    for block in range(start // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS + 1):
        rng = np.random.default_rng([SEED, 3, block])
        ranks = (rng.random((BLOCK_ROWS, WORDS_PER_TEXT)) ** 3 * VOCABULARY).astype(int)
        first = block * BLOCK_ROWS
        wanted = ranks[max(start - first, 0) : max(min(stop - first, BLOCK_ROWS), 0)].tolist()
        texts += [" ".join(map(_word, ranks_of_row)) for ranks_of_row in wanted]
    return texts


_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def _word(rank: int) -> str:
    """A pronounceable word; frequent ones are short."""
    word = ""
    rank += len(_SYLLABLES)
    while rank:
        rank, rest = divmod(rank, len(_SYLLABLES))
        word += _SYLLABLES[rest]
    return word
