"""Fusing, aggregating and diversifying scores. Pure functions over arrays; no database, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agentic_flow.core.products import inner_products

Floats = NDArray[np.float64]
AnyFloats = NDArray[np.floating]
Ints = NDArray[np.int64]

FOLLOWING_WEIGHT = 0.2
"""A document's n-th best passage adds this to the power n: breadth counts, bulk does not."""
FOLLOWING_MAX = 3
DOCUMENT_WEIGHT = 0.5
"""Weight of how well the document as a whole matches, beside its passage."""


RRF_K = 60
"""Constant of reciprocal rank fusion: how little the first ranks stand out from the next."""
GRAM_SHARE = 16
ROWS_MAX = 16_384
"""Where at least one of GRAM_SHARE candidates is picked, and more than ROWS_MAX similarities are needed, all
at once cost less than row by row. For fewer, the threads that share the product cost more than it saves."""

Method = Literal["zscore", "rrf"]


@dataclass(frozen=True, slots=True)
class Fused:
    """Scores of candidates, higher is better, and what they were made of.

    Args:
        scores: One a candidate.
        evidence: What the document that each belongs to added.
        parts: By name, what fusion made of each side; NaN where the candidate has no such part.
    """

    scores: Floats
    evidence: Floats
    parts: Mapping[str, Floats] = field(default_factory=dict[str, Floats])

    def explanation(self, index: int) -> dict[str, float]:
        """The parts of one candidate, without those it has not."""
        values = ((name, float(values[index])) for name, values in self.parts.items())
        return {name: value for name, value in values if value == value}


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
    method: Method = "zscore",
) -> Fused:
    """Combine the sides into one score per candidate.

    "zscore": z-scores of both sides, added and scaled to 0..1. A passage that the text side did not find has
    its score 0. Then what a document's other good passages and its whole text say is added to each of its
    passages: it is the file that answers a question; one lucky paragraph elsewhere is weak evidence.

    "rrf": reciprocal rank fusion, see `reciprocal_ranks`; documents take no part.

    The parts are `text_z` and `vector_z`, or `text_rank` and `vector_rank` (from 1; equals share the best),
    of the sides there are, and `vector_weight`.

    Args:
        text: Full-text scores (0: not found), shape (n,); None without that side.
        vector: Similarities, shape (n,); None without that side.
        vector_weight: Weight of the vector side; the text side weighs 1. Alone, a side weighs 1.
        documents: Document of each candidate, 0 for none.
        document_scores: Full-text score of that document as a whole (0: none).
    """
    count = len(documents)
    weight = vector_weight if text is not None else 1.0
    if method == "rrf":
        text_rank = None if text is None else ranks(text, text > 0)
        vector_rank = None if vector is None else ranks(vector)
        scores = reciprocal_ranks(text_rank, vector_rank, count, weight)
        parts = {"text_rank": text_rank, "vector_rank": vector_rank}
        return Fused(scores, np.zeros(count), _present(parts, weight, count))
    text_z = None if text is None else z_scores(text)
    vector_z = None if vector is None else z_scores(vector)
    total = np.zeros(count)
    if text_z is not None:
        total += text_z
    if vector_z is not None:
        total += weight * vector_z
    passages = _to_unit(total)
    evidence = following(passages, documents)
    best = float(document_scores.max(initial=0.0))
    if best > 0:
        evidence = evidence + DOCUMENT_WEIGHT * document_scores / best
    parts = {"text_z": text_z, "vector_z": vector_z}
    return Fused(passages + evidence, evidence, _present(parts, weight, count))


def _present(parts: Mapping[str, Floats | None], weight: float, count: int) -> dict[str, Floats]:
    present = {name: values for name, values in parts.items() if values is not None}
    return {**present, "vector_weight": np.full(count, weight)}


def ranks(values: Floats, found: NDArray[np.bool_] | None = None) -> Floats:
    """Place of each value from 1, the highest first; equal values share the best place they take.

    Args:
        values: Shape (n,).
        found: Which of them take part, all by default; the others get NaN.
    """
    places = np.full(len(values), np.nan)
    taking = np.ones(len(values), bool) if found is None else found
    falling = -values[taking]
    places[taking] = 1 + np.searchsorted(np.sort(falling), falling)
    return places


def reciprocal_ranks(
    text_rank: Floats | None, vector_rank: Floats | None, count: int, vector_weight: float
) -> Floats:
    """Reciprocal rank fusion: the sum of weight / (60 + rank) over the sides that found the candidate.

    Source: G. V. Cormack, C. L. A. Clarke, S. Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and
    individual Rank Learning Methods" (SIGIR 2009), here with a weight.
    """
    scores = np.zeros(count)
    if text_rank is not None:
        scores += np.nan_to_num(1.0 / (RRF_K + text_rank))
    if vector_rank is not None:
        scores += np.nan_to_num(vector_weight / (RRF_K + vector_rank))
    return scores


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


def mmr(
    relevance: Floats, similarity: AnyFloats | Callable[[int], AnyFloats], k: int, lambda_: float
) -> list[int]:
    """Maximal marginal relevance: indices of `k` candidates, picked one by one.

    The first is the most relevant; each next one has the largest
    `lambda_ * relevance - (1 - lambda_) * (largest similarity to one already picked)`, the first of equals.

    Source: J. Carbonell and J. Goldstein, "The Use of MMR, Diversity-Based Reranking" (SIGIR 1998).

    Args:
        relevance: Shape (n,), in 0..1.
        similarity: Of all to all, shape (n, n), in -1..1; or what gives one candidate's row of it.
        k: How many to pick; fewer when there are not so many.
        lambda_: 1 is pure relevance, 0 pure novelty.
    """
    count = min(k, len(relevance))
    if count <= 0:
        return []
    row = similarity if callable(similarity) else similarity.__getitem__
    pick = int(relevance.argmax())
    chosen = [pick]
    worth = lambda_ * relevance
    worth[pick] = -np.inf
    nearest = row(pick).astype(np.float64)
    while len(chosen) < count:
        pick = int((worth - (1 - lambda_) * nearest).argmax())
        chosen.append(pick)
        worth[pick] = -np.inf
        np.maximum(nearest, row(pick), out=nearest)
    return chosen


def similarity_rows(unit: AnyFloats, picks: int) -> Callable[[int], AnyFloats]:
    """Cosines of one candidate to all, for `mmr`: computed when asked for, or for many from one matrix.

    Args:
        unit: Vectors of length 1, shape (n, dimension).
        picks: How many rows will be asked for, about.
    """
    if picks * GRAM_SHARE < len(unit) or picks * len(unit) <= ROWS_MAX:
        return lambda index: inner_products(unit, unit[index])
    return (unit @ unit.T).__getitem__


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
