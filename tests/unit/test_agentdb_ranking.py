"""Ranking: the array code means what a few lines of plain Python say."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.agentdb import ranking

SCORES = st.floats(-50, 50).map(lambda value: round(value, 3))


@st.composite
def candidates(draw: st.DrawFn) -> tuple[list[float], list[float], list[int], list[float]]:
    """Text scores, similarities, documents and the score of each candidate's document."""
    count = draw(st.integers(0, 12))
    text = draw(st.lists(st.floats(0, 30).map(lambda v: round(v, 3)), min_size=count, max_size=count))
    near = draw(st.lists(st.floats(-1, 1).map(lambda v: round(v, 3)), min_size=count, max_size=count))
    documents = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    of_document = {0: 0.0, **{i: draw(st.sampled_from([0.0, 1.0, 2.5, 7.0])) for i in range(1, 5)}}
    return text, near, documents, [of_document[document] for document in documents]


def plain_z(values: list[float]) -> list[float]:
    spread = statistics.pstdev(values) if values else 0.0
    if spread <= 1e-12:
        return [0.0] * len(values)
    mean = statistics.fmean(values)
    return [(value - mean) / spread for value in values]


def plain_following(passages: list[float], documents: list[int]) -> list[float]:
    added: list[float] = []
    for document in documents:
        own = sorted((p for p, d in zip(passages, documents, strict=True) if d == document), reverse=True)
        rest = own[1 : 1 + ranking.FOLLOWING_MAX] if document else []
        added.append(sum(p * ranking.FOLLOWING_WEIGHT**n for n, p in enumerate(rest, 1)))
    return added


def plain_fuse(
    text: list[float], near: list[float], documents: list[int], document_scores: list[float], weight: float
) -> list[float]:
    total = [a + weight * b for a, b in zip(plain_z(text), plain_z(near), strict=True)]
    if not total:
        return []
    low, high = min(total), max(total)
    passages = [(value - low) / (high - low) if high - low > 1e-12 else 1.0 for value in total]
    best = max(document_scores)
    return [
        passage + more + (ranking.DOCUMENT_WEIGHT * score / best if best > 0 else 0.0)
        for passage, more, score in zip(
            passages, plain_following(passages, documents), document_scores, strict=True
        )
    ]


@settings(max_examples=300, deadline=None)
@given(candidates(), st.sampled_from([0.25, 1.0]))
def test_fuse(drawn: tuple[list[float], list[float], list[int], list[float]], weight: float) -> None:
    """Catches scores given to the wrong candidate, wrong weights, NaN when all are alike."""
    text, near, documents, document_scores = drawn
    fused = ranking.fuse(
        np.array(text, np.float64),
        np.array(near, np.float64),
        vector_weight=weight,
        documents=np.array(documents, np.int64),
        document_scores=np.array(document_scores, np.float64),
    )
    expected = plain_fuse(text, near, documents, document_scores, weight)
    np.testing.assert_allclose(fused.scores, expected, atol=1e-6)
    assert (fused.evidence >= -1e-12).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1).map(lambda v: round(v, 3)), st.integers(0, 4)), max_size=15))
def test_following(pairs: list[tuple[float, int]]) -> None:
    """Catches evidence leaking between documents, and to items that belong to none."""
    passages, documents = [p for p, _ in pairs], [d for _, d in pairs]
    got = ranking.following(np.array(passages, np.float64), np.array(documents, np.int64))
    np.testing.assert_allclose(got, plain_following(passages, documents), atol=1e-9)


def plain_mmr(relevance: list[float], similarity: list[list[float]], k: int, lambda_: float) -> list[float]:
    """The gain of each pick, by definition: ties may be broken either way."""
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < min(k, len(relevance)):
        gain = {
            i: lambda_ * relevance[i] - (1 - lambda_) * max((similarity[i][j] for j in chosen), default=0.0)
            for i in range(len(relevance))
            if i not in chosen
        }
        pick = max(gain, key=lambda i: (gain[i], -i))
        chosen.append(pick)
        gains.append(gain[pick])
    return gains


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8), st.integers(1, 10), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_mmr(count: int, k: int, lambda_: float, seed: int) -> None:
    """Catches a pick that is not the best trade of relevance and novelty, and picks made twice."""
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(count, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) if count else 1
    relevance, similarity = rng.random(count), unit @ unit.T
    picked = ranking.mmr(relevance, similarity, k, lambda_)
    assert len(set(picked)) == len(picked) == min(k, count)
    gains = [
        lambda_ * relevance[i] - (1 - lambda_) * max((similarity[i][j] for j in picked[:n]), default=0.0)
        for n, i in enumerate(picked)
    ]
    np.testing.assert_allclose(
        gains, plain_mmr(relevance.tolist(), similarity.tolist(), k, lambda_), atol=1e-9
    )


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 4))
def test_limit_per_document(documents: list[int], limit: int) -> None:
    """Catches a changed order, too many of one document, or loose items that are limited."""
    order = list(range(len(documents)))[::-1]
    kept = ranking.limit_per_document(order, np.array(documents, np.int64), limit)
    expected = [
        index
        for place, index in enumerate(order)
        if not limit
        or documents[index] == 0
        or sum(documents[other] == documents[index] for other in order[:place]) < limit
    ]
    assert kept == expected


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 4.0]])
def test_z_scores(values: list[float]) -> None:
    """Catches a division by zero when all scores are alike."""
    got = ranking.z_scores(np.array(values, np.float64)).tolist()
    assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(got, plain_z(values), strict=True))
