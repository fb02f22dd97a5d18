"""The embedder that needs no download: hashed words and character n-grams.

Spelling, not meaning: texts that share words or parts of words come out close ("cancelled", "cancelling"),
synonyms do not. It says so (`semantic` is False). Features are hashed into a fixed dimension with a sign, so
that collisions cancel on average (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
2009); term frequencies are dampened by a logarithm.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.text import STOP_WORDS, terms

_NGRAMS = (3, 4)
_WORD_WEIGHT, _NGRAM_WEIGHT = 1.0, 0.35
_CACHE_MAX = 200_000

Features = tuple[NDArray[np.int32], NDArray[np.float32]]


class HashedNgramEmbedder:
    """Embedder of hashed features.

    Args:
        dimension: Length of the vectors, 256 to 4096.
    """

    def __init__(self, dimension: int = 1024) -> None:
        self._dimension = dimension
        self._features: dict[str, Features] = {}

    @property
    def id(self) -> str:
        return f"hashed-ngram-v1-{self._dimension}"

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def semantic(self) -> bool:
        return False

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        """Unit vectors of shape (len(texts), dimension); a text without words gives zeros."""
        return await asyncio.to_thread(self.embed_now, texts)

    def embed_now(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`embed` for callers that are in a thread already."""
        vectors = np.zeros((len(texts), self._dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            counts = Counter(term for term in terms(text) if term not in STOP_WORDS)
            if not counts:
                continue
            features = [self._features_of(term) for term in counts]
            tf = np.log1p(np.fromiter(counts.values(), dtype=np.float32, count=len(counts)))
            weights = np.concatenate([pair[1] for pair in features])
            weights *= np.repeat(tf, [len(pair[1]) for pair in features])
            indices = np.concatenate([pair[0] for pair in features])
            vectors[row] = np.bincount(indices, weights=weights, minlength=self._dimension)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, norms, out=vectors, where=norms > 0)
        return vectors

    def _features_of(self, term: str) -> Features:
        known = self._features.get(term)
        if known is None:
            if len(self._features) > _CACHE_MAX:
                self._features.clear()
            known = self._features[term] = self._hash(term)
        return known

    def _hash(self, term: str) -> Features:
        padded = f"<{term}>"
        grams = [padded[i : i + n] for n in _NGRAMS for i in range(len(padded) - n + 1)]
        hashes = [zlib.crc32(feature.encode()) for feature in (term, *grams)]
        scale = _NGRAM_WEIGHT / max(1, len(grams)) ** 0.5
        weights = np.full(len(hashes), scale, dtype=np.float32)
        weights[0] = _WORD_WEIGHT
        # The sign comes from bits that the index does not use.
        signs = np.fromiter((1 if h & 0x8000_0000 else -1 for h in hashes), dtype=np.float32)
        indices = np.fromiter((h % self._dimension for h in hashes), dtype=np.int32)
        return indices, weights * signs
