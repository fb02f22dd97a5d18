"""How coarse a namespace's codes may be, and how many candidates they must name: measured on its own rows.

A sample of the rows is searched for. What is truly nearest to each is found while the rows are walked to make
the codes anyway: among all of them, and among a tenth and a hundredth, as filters leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentic_flow.agentdb.index.codes import Codes, TurbovecCodes
from agentic_flow.agentdb.index.layout import Keys, Layout, Vectors
from agentic_flow.agentdb.index.sketch import Sketch

SAMPLE = 96
NEAREST = 10
RECALL_MIN = 0.998
"""Share of the nearest that must be among the candidates; above what is promised, as samples are small."""
SHARES = (1, 10, 100)
CODE_LISTS = {2: (30, 60, 90, 140, 200), 4: (20, 30, 50, 80, 140, 300)}
"""Bits a number → candidates for ten answers that are tried. Half the bits are read in half the time."""
SKETCH_LISTS = (50, 60, 70, 80, 100, 120, 140, 170, 200)
"""Of a small namespace, to compare what the sketch names is a good part of a search: the steps are small."""
SKETCH_DEEP_MAX = 4096
"""Candidates of the sketch past which the allowed among them are looked for in the codes instead."""
UNMEASURED_LIST = 30
"""Enough for 4 bits on all but hard data, and for codes that are nearly the vectors."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Candidates for ten answers.

    Args:
        short_list: Of the codes.
        sketch_list: Of the sketch, without a filter; 0: it does not find enough.
        sketch_allowed_list: Of the sketch, under a filter that keeps a tenth or more; 0: not enough.
        rows: How many there were when this was chosen.
    """

    short_list: int = UNMEASURED_LIST
    sketch_list: int = 0
    sketch_allowed_list: int = 0
    rows: int = 0


class Trial:
    """The true nearest of some rows, collected block by block.

    Args:
        layout: Of the vectors.
        keys, queries: The rows that are searched for, each of which is no answer to itself.
        gathered_max: Filters that keep no more rows than this never ask an index.
    """

    def __init__(self, layout: Layout, keys: Keys, queries: Vectors, gathered_max: int) -> None:
        self._layout = layout
        self._own, self._queries = keys, queries
        self._gathered_max = gathered_max
        self._seen = 0
        self._allowed: dict[int, list[Keys]] = {share: [] for share in SHARES}
        self._keys = {share: np.zeros((len(keys), 0), np.int64) for share in SHARES}
        self._scores = {share: np.zeros((len(keys), 0), np.float32) for share in SHARES}

    def see(self, keys: Keys, vectors: Vectors) -> None:
        """Take in the next rows of the namespace."""
        scores = self._queries @ vectors.T
        if self._layout.metric == "euclidean":
            scores -= np.einsum("ij,ij->i", vectors, vectors)[None, :] / 2
        scores[self._own[:, None] == keys[None, :]] = -np.inf
        for share in SHARES:
            part = slice(-self._seen % share, None, share)
            self._allowed[share].append(keys[part])
            among = np.concatenate([self._scores[share], scores[:, part]], axis=1)
            of = np.broadcast_to(keys[part], (len(self._own), len(keys[part])))
            of = np.concatenate([self._keys[share], of], axis=1)
            if among.shape[1] > NEAREST:
                best = np.argpartition(among, -NEAREST, axis=1)[:, -NEAREST:]
                among, of = np.take_along_axis(among, best, 1), np.take_along_axis(of, best, 1)
            self._keys[share], self._scores[share] = of, among
        self._seen += len(keys)

    def code_list(self, codes: Codes) -> int | None:
        """The least of CODE_LISTS with which the codes find enough, under every filter; None: none does."""
        if not isinstance(codes, TurbovecCodes):
            return UNMEASURED_LIST
        lists = CODE_LISTS[codes.bits]
        least = 0
        for share in SHARES:
            allowed = None if share == 1 else np.concatenate(self._allowed[share])
            if allowed is not None and len(allowed) <= self._gathered_max:
                continue
            needed = self._needed(share, codes.nearest_of_each(self._queries, lists[-1] + 1, allowed), lists)
            if needed is None:
                return None
            least = max(least, needed)
        return least

    def sketch_lists(self, sketch: Sketch) -> tuple[int, int]:
        """The same of a sketch without a filter, and under one that keeps a tenth; 0: none does."""
        found = sketch.nearest_of_each(self._queries, SKETCH_LISTS[-1] + 1)
        free = self._needed(1, found, SKETCH_LISTS) or 0
        tenth = np.sort(np.concatenate(self._allowed[10]))
        if len(tenth) <= self._gathered_max:
            return free, 0
        found = [keys[among(keys, tenth)] for keys in sketch.nearest_of_each(self._queries, SKETCH_DEEP_MAX)]
        return free, self._needed(10, found, SKETCH_LISTS) or 0

    def _needed(self, share: int, found: Sequence[Keys], lists: Sequence[int]) -> int | None:
        true = [
            {key for key, score in zip(keys.tolist(), scores.tolist(), strict=True) if score > -np.inf}
            for keys, scores in zip(self._keys[share], self._scores[share], strict=True)
        ]
        others = [keys[keys != own].tolist() for keys, own in zip(found, self._own, strict=True)]
        wanted = sum(map(len, true))
        for count in lists:
            right = sum(len(near & set(keys[:count])) for near, keys in zip(true, others, strict=True))
            if right >= RECALL_MIN * wanted:
                return count
        return None


def among(keys: Keys, allowed: Keys) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the keys are among the allowed ones, which are sorted."""
    places = np.searchsorted(allowed, keys)
    places[places == len(allowed)] = 0
    return allowed[places] == keys if len(allowed) else np.zeros(len(keys), bool)
