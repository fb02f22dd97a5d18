"""Scores of candidates: fusing two rankings, evidence of whole documents, diversity. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def z_scores(values: Scores) -> Scores:
    """Distances from the mean in standard deviations; zeros when all values are alike."""
    if len(values) == 0:
        return values
    deviation = float(values.std())
    if deviation < 1e-12:
        return np.zeros_like(values)
    return (values - values.mean()) / deviation


def fuse(vector: Scores, text: Scores, *, text_weight: float) -> Scores:
    """Weighted sum of z-scores. Ranks would throw away how much better the best one is."""
    return (1 - text_weight) * z_scores(vector) + text_weight * z_scores(text)


def document_evidence(scores: Scores, documents: Sequence[object], *, decay: float) -> Scores:
    """For each candidate, what its whole document says: its chunks' scores, best first, each worth `decay`
    of the one before.

    A file whose many parts match is likelier the right one than a file with one lucky passage. The decay
    keeps long files from winning by length.
    """
    order = np.argsort(-scores, kind="stable")
    floor = float(scores.min()) if len(scores) else 0.0
    weight: dict[object, float] = {}
    total: dict[object, float] = {}
    for index in order:
        document = documents[index]
        share = weight.get(document, 1.0)
        total[document] = total.get(document, 0.0) + share * (float(scores[index]) - floor)
        weight[document] = share * decay
    return np.array([total[document] for document in documents], dtype=np.float64)


def diversify(relevance: Scores, vectors: NDArray[np.float32], k: int, mmr_lambda: float) -> list[int]:
    """Maximal marginal relevance: indices of k picks, each the best of `λ·relevance - (1-λ)·likeness`.

    Relevance is scaled to 0..1 so that λ means the same for every query. Source: Carbonell and Goldstein,
    "The Use of MMR, Diversity-Based Reranking", 1998.
    """
    count = len(relevance)
    if count == 0:
        return []
    spread = float(relevance.max() - relevance.min())
    scaled = (relevance - relevance.min()) / spread if spread > 0 else np.ones(count)
    likeness = np.zeros(count)
    left = np.ones(count, dtype=bool)
    picks: list[int] = []
    while len(picks) < min(k, count):
        gain = mmr_lambda * scaled - (1 - mmr_lambda) * likeness
        best = int(np.argmax(np.where(left, gain, -np.inf)))
        picks.append(best)
        left[best] = False
        likeness = np.maximum(likeness, vectors @ vectors[best])
    return picks
