"""Fusing, aggregating and diversifying scores. Pure functions over arrays; no database, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLLOWING_WEIGHT = 0.2
"""A document's n-th best passage adds this to the power n: breadth counts, bulk does not."""
FOLLOWING_MAX = 3
DOCUMENT_WEIGHT = 0.5
"""Weight of how well the document as a whole matches, beside its passage."""


@dataclass(frozen=True, slots=True)
class Fused:
    """Scores of candidates, higher is better, and what the documents they belong to added."""

    scores: Floats
    evidence: Floats


def z_scores(values: Floats) -> Floats:
    """Distance from the mean in standard deviations; zeros when all are alike."""
    if not len(values):
        return values
    deviation = float(values.std())
    return (values - values.mean()) / deviation if deviation > 1e-12 else np.zeros_like(values)


def fuse(
    text: Floats | None,
    vector: Floats | None,
    *,
    vector_weight: float,
    documents: Ints,
    document_scores: Floats,
) -> Fused:
    """Combine the sides into one score per candidate.

    Passages: z-scores of both sides, added. A passage that the text side did not find has its score 0.
    Documents: what a document's other good passages and its whole text say is added to each of its passages.
    It is the file that answers a question; one lucky paragraph elsewhere is weak evidence.

    Args:
        text: Full-text scores (0: not found), None without that side.
        vector: Similarities, None without that side.
        vector_weight: Weight of the vector side; the text side weighs 1.
        documents: Document of each candidate, 0 for none.
        document_scores: Full-text score of that document as a whole (0: none).
    """
    total = np.zeros(len(documents), np.float64)
    if text is not None:
        total += z_scores(text)
    if vector is not None:
        total += vector_weight * z_scores(vector) if text is not None else z_scores(vector)
    passages = _to_unit(total)
    evidence = following(passages, documents)
    best = float(document_scores.max(initial=0.0))
    if best > 0:
        evidence = evidence + DOCUMENT_WEIGHT * document_scores / best
    return Fused(passages + evidence, evidence)


def following(passages: Floats, documents: Ints) -> Floats:
    """For each candidate, the discounted sum of its document's second to fourth best passages."""
    added = np.zeros_like(passages)
    order = np.lexsort((-passages, documents))
    ranked = documents[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)
    position = np.arange(len(ranked)) - np.repeat(starts, np.diff(np.r_[starts, len(ranked)]))
    counted = (position >= 1) & (position <= FOLLOWING_MAX) & (ranked > 0)
    share = np.where(counted, passages[order] * FOLLOWING_WEIGHT ** position.clip(max=FOLLOWING_MAX), 0.0)
    sums = np.bincount(np.unique(ranked, return_inverse=True)[1], share) if len(ranked) else share
    added[order] = np.repeat(sums, np.diff(np.r_[starts, len(ranked)]))
    return added


def _to_unit(values: Floats) -> Floats:
    """Shifted and scaled to 0..1; ones when all are alike."""
    if not len(values):
        return values
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high - low > 1e-12 else np.ones_like(values)


def as_relevance(scores: Floats) -> Floats:
    """Scores as relevance in 0..1: as shares of the best where they have a zero, else shifted to one."""
    low, high = float(scores.min(initial=0.0)), float(scores.max(initial=0.0))
    return scores / high if low >= 0 and high > 0 else _to_unit(scores)


def mmr(relevance: Floats, similarity: NDArray[np.floating], k: int, lambda_: float) -> list[int]:
    """Maximal marginal relevance: indices of `k` candidates, picked one by one.

    Source: J. Carbonell and J. Goldstein, "The Use of MMR, Diversity-Based Reranking" (SIGIR 1998).

    Args:
        relevance: Shape (n,), in 0..1.
        similarity: Shape (n, n), in -1..1.
        k: How many to pick; fewer when there are not so many.
        lambda_: 1 is pure relevance, 0 pure novelty.
    """
    chosen: list[int] = []
    left = np.ones(len(relevance), bool)
    nearest = np.full(len(relevance), -np.inf)
    while left.any() and len(chosen) < k:
        novelty = np.where(np.isfinite(nearest), nearest, 0.0)
        gain = np.where(left, lambda_ * relevance - (1 - lambda_) * novelty, -np.inf)
        pick = int(gain.argmax())
        chosen.append(pick)
        left[pick] = False
        nearest = np.maximum(nearest, similarity[pick])
    return chosen


def limit_per_document(order: Sequence[int], documents: Ints, limit: int) -> list[int]:
    """The order without what exceeds `limit` candidates of one document (0: no limit)."""
    if not limit:
        return list(order)
    seen: dict[int, int] = {}
    kept: list[int] = []
    for index in order:
        document = int(documents[index])
        seen[document] = seen.get(document, 0) + 1
        if document == 0 or seen[document] <= limit:
            kept.append(index)
    return kept
