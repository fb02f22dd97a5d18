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
    for index, (text_z, vector_z) in enumerate(zip(plain_z(text), plain_z(near), strict=True)):
        assert fused.explanation(index) == pytest.approx(
            {"text_z": text_z, "vector_z": vector_z, "vector_weight": weight}, abs=1e-6
        )


def plain_rank(values: list[float], value: float) -> int:
    return 1 + sum(other > value for other in values)


@settings(max_examples=300, deadline=None)
@given(candidates(), st.sampled_from([0.25, 1.0]))
def test_reciprocal_rank_fusion(
    drawn: tuple[list[float], list[float], list[int], list[float]], weight: float
) -> None:
    """Catches ranks from 0, equals told apart by their place, and credit for what a side did not find."""
    text, near, documents, document_scores = drawn
    fused = ranking.fuse(
        np.array(text, np.float64),
        np.array(near, np.float64),
        vector_weight=weight,
        documents=np.array(documents, np.int64),
        document_scores=np.array(document_scores, np.float64),
        method="rrf",
    )
    found = [score for score in text if score > 0]
    for index, (words, likeness) in enumerate(zip(text, near, strict=True)):
        parts = {"vector_rank": plain_rank(near, likeness), "vector_weight": weight}
        score = weight / (60 + plain_rank(near, likeness))
        if words > 0:
            parts["text_rank"] = plain_rank(found, words)
            score += 1 / (60 + plain_rank(found, words))
        assert fused.explanation(index) == parts
        assert fused.scores[index] == pytest.approx(score, abs=1e-12)
    assert not fused.evidence.any()


@pytest.mark.parametrize("method", ["zscore", "rrf"])
@given(candidates(), st.booleans())
def test_one_side_alone_keeps_its_order(
    method: ranking.Method, drawn: tuple[list[float], list[float], list[int], list[float]], words: bool
) -> None:
    """Catches a missing side that counts, a weight of the only side, and parts of a missing one."""
    text, near, documents, _ = drawn
    side = np.array([score + 1 for score in text] if words else near, np.float64)
    fused = ranking.fuse(
        side if words else None,
        None if words else side,
        vector_weight=0.25,
        documents=np.zeros(len(documents), np.int64),
        document_scores=np.zeros(len(documents)),
        method=method,
    )
    assert ranking.ranks(fused.scores.round(9)).tolist() == ranking.ranks(side).tolist()
    kind = "rank" if method == "rrf" else "z"
    for index in range(len(side)):
        assert fused.explanation(index).keys() == {f"{'text' if words else 'vector'}_{kind}", "vector_weight"}
        assert fused.explanation(index)["vector_weight"] == (0.25 if words else 1.0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1).map(lambda v: round(v, 3)), st.integers(0, 4)), max_size=15))
def test_following(pairs: list[tuple[float, int]]) -> None:
    """Catches evidence leaking between documents, and to items that belong to none."""
    passages, documents = [p for p, _ in pairs], [d for _, d in pairs]
    got = ranking.following(np.array(passages, np.float64), np.array(documents, np.int64))
    np.testing.assert_allclose(got, plain_following(passages, documents), atol=1e-9)


def plain_gain(
    candidate: int, chosen: list[int], relevance: list[float], similarity: list[list[float]], lambda_: float
) -> float:
    """What picking the candidate next is worth, by definition."""
    nearest = max((similarity[candidate][other] for other in chosen), default=0.0)
    return lambda_ * relevance[candidate] - (1 - lambda_) * nearest


@pytest.mark.parametrize("given_as", ["matrix", "rows"])
@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 40),
    k=st.integers(0, 42),
    lambda_=st.floats(0, 1),
    alike=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_mmr(given_as: str, count: int, k: int, lambda_: float, alike: bool, seed: int) -> None:
    """Catches a pick that is not the best trade of relevance and novelty, one pick made twice, NaN."""
    rng = np.random.default_rng(seed)
    unit = np.ones((count, 3)) if alike else rng.normal(size=(count, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) if count else 1
    relevance, similarity = rng.random(count), unit @ unit.T
    before = relevance.copy()
    rows = similarity if given_as == "matrix" else ranking.similarity_rows(unit, k)
    picked = ranking.mmr(relevance, rows, k, lambda_)
    assert len(set(picked)) == len(picked) == min(k, count)
    assert (relevance == before).all(), "what was passed in was changed"
    # Each pick must be the best there was; equals may be taken in any order.
    plain = (relevance.tolist(), similarity.tolist(), lambda_)
    for place, pick in enumerate(picked):
        chosen = picked[:place]
        best = max(plain_gain(other, chosen, *plain) for other in range(count) if other not in chosen)
        assert plain_gain(pick, chosen, *plain) == pytest.approx(best, abs=1e-9)


@given(st.lists(SCORES, min_size=1, max_size=20), st.sampled_from([0.0, 0.3, 1.0]))
def test_relevance_leads(scores: list[float], lambda_: float) -> None:
    """Catches lambda read the wrong way round: 1 must be the order of relevance, and the best comes first."""
    relevance = ranking.as_relevance(np.array(scores, np.float64))
    picked = ranking.mmr(relevance, np.eye(len(scores)), len(scores), lambda_)
    assert relevance[picked[0]] == relevance.max()
    if lambda_ == 1:
        assert relevance[picked].tolist() == sorted(relevance.tolist(), reverse=True)


@pytest.mark.parametrize("picks", [1, 16, 64, 65, 1000])
def test_similarity_rows(picks: int) -> None:
    """Catches a row that depends on whether it was taken from one matrix or computed alone."""
    unit = np.random.default_rng(3).normal(size=(1024, 5)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    row = ranking.similarity_rows(unit, picks)
    for index in (0, 7, 1023):
        np.testing.assert_allclose(row(index), unit @ unit[index], atol=1e-6)


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
