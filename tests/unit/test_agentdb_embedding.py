"""The hashed n-gram embedder and the words that search sees."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys

import apsw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb import analysis
from agentic_flow.agentdb.embedding import HashedNgramEmbedder

SAMPLE = ["def parseConfigFile(path): return {}", "Ünïcode wörds and 日本語", "", "the of and", "x" * 5000]
# The digest below is part of the promise: vectors stored by one machine are compared on another.
DIGEST = "73527623e3720de8"


def digest_of(vectors: np.ndarray) -> str:
    """Hash of the vectors as the database stores them, rounded so that no CPU's last bit matters."""
    return hashlib.sha256(np.round(vectors.astype(np.float64), 4).astype("<f4").tobytes()).hexdigest()[:16]


def test_vectors_are_unit_or_zero() -> None:
    """Catches a vector that cosine comparison would misjudge."""
    embedder = HashedNgramEmbedder(512)
    vectors = asyncio.run(embedder.embed(SAMPLE))
    assert vectors.shape == (len(SAMPLE), 512)
    assert vectors.dtype == np.float32
    norms = np.linalg.norm(vectors, axis=1)
    assert norms == pytest.approx([1, 1, 0, 0, 1], abs=1e-5)
    assert (embedder.id, embedder.dimension, embedder.semantic) == ("hashed-ngram-v1-512", 512, False)
    assert asyncio.run(embedder.embed([])).shape == (0, 512)


def test_vectors_are_the_same_everywhere() -> None:
    """Catches a change of the hashing under an unchanged id, or one that depends on the process."""
    own = digest_of(HashedNgramEmbedder(1024).embed_now(SAMPLE))
    script = (
        "import sys, hashlib, numpy as np\n"
        "from agentic_flow.agentdb.embedding import HashedNgramEmbedder\n"
        f"v = HashedNgramEmbedder(1024).embed_now({SAMPLE!r})\n"
        "print(hashlib.sha256(np.round(v.astype(np.float64), 4).astype('<f4').tobytes()).hexdigest()[:16])"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == own == DIGEST


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_batches_do_not_matter(texts: list[str]) -> None:
    """Catches a text whose vector depends on its neighbours in the batch."""
    embedder = HashedNgramEmbedder(256)
    together = embedder.embed_now(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.array_equal(HashedNgramEmbedder(256).embed_now([text])[0], vector)


def test_likeness_of_spelling() -> None:
    """Catches n-grams that carry no weight: a misspelt word must stay near the word."""
    right, wrong, other = HashedNgramEmbedder(1024).embed_now(["serialization", "serialisation", "elephant"])
    assert float(right @ wrong) > 0.15 > 0.1 > abs(float(right @ other))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parseHTTPHeader_v2", ["parse", "http", "header", "v", "2"]),
        ("snake_case SCREAMING_CASE", ["snake", "case", "screaming", "case"]),
        ("EST5EDT,M3.2.0", ["est", "5", "edt", "m", "3", "2", "0"]),
        ("naïve 日本", ["naïve", "日本"]),
        ("--", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    """Catches identifiers that are not split, or split where they should not be."""
    assert analysis.words(text) == expected


def test_query_words() -> None:
    """Catches stop words that drown a question, and a question of stop words that finds nothing."""
    assert analysis.query_words("How does parseConfig work with the parseConfig file?") == [
        "parse", "config", "parseconfig", "file",
    ]  # fmt: skip
    assert analysis.query_words("What is this?") == ["what", "is", "this"]
    assert analysis.match_expression('say "hi" OR (x*') == '"say" OR "hi"'
    assert analysis.match_expression("?!") is None
    assert len(analysis.query_words(" ".join(f"word{n}" for n in range(500)))) == analysis.QUERY_WORDS_MAX


@given(st.text(max_size=20))
def test_any_question_is_a_valid_expression(text: str) -> None:
    """Catches a character that means something to the full-text query language."""
    expression = analysis.match_expression(text)
    if expression is not None:
        with apsw.Connection(":memory:") as connection:
            connection.execute("CREATE VIRTUAL TABLE t USING fts5(x, tokenize='porter unicode61')")
            connection.execute("SELECT * FROM t WHERE t MATCH ?", (expression,)).fetchall()
        connection.close()
