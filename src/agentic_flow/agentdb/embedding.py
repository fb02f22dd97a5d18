"""The embedder that needs no download: hashed words and character n-grams, the same on every machine.

Closeness means likeness of spelling, not of meaning, and the embedder says so (`semantic` is False).

Source: K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (ICML 2009): the sign bit
of the hash keeps inner products unbiased under collisions.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from agentic_flow.agentdb.analysis import STOP_WORDS, words
from agentic_flow.core.later import Later
from agentic_flow.core.ports import Embedder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = Later("numpy")

_NGRAM_SIZES = (3, 4, 5)
_NGRAMS_WEIGHT = 0.7
_WORD_CHARS_MAX = 40
_WORDS_KEPT_MAX = 50_000
_TEXTS_AT_ONCE = 64
_CHARS_HERE_MAX = 1000

QUERIES_KNOWN_MAX = 64
"""Queries whose vectors are remembered."""


class HashedNgramEmbedder:
    """Sub-linear word counts over signed hashes of each word and of its character n-grams.

    Args:
        dimension: Length of the vectors.
    """

    semantic = False

    def __init__(self, dimension: int = 1024) -> None:
        self._dimension = dimension
        self._features: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    @property
    def id(self) -> str:
        return f"hashed-ngram-v1-{self._dimension}"

    @property
    def dimension(self) -> int:
        return self._dimension

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        """See Embedder. A text without words is the zero vector."""
        if sum(map(len, texts)) <= _CHARS_HERE_MAX:
            # To hand it to another thread takes as long as to do it.
            return self.embed_now(texts)
        return await asyncio.to_thread(self.embed_now, texts)

    def embed_now(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`embed` for callers in a worker thread."""
        vectors = np.zeros((len(texts), self._dimension), np.float32)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            self._fill(vectors[start : start + _TEXTS_AT_ONCE], texts[start : start + _TEXTS_AT_ONCE])
        return vectors

    def _fill(self, block: NDArray[np.float32], texts: Sequence[str]) -> None:
        slots: list[NDArray[np.int32]] = []
        values: list[NDArray[np.float32]] = []
        counts: list[float] = []
        rows: list[int] = []
        for row, text in enumerate(texts):
            for word, count in Counter(words(text)).items():
                if word in STOP_WORDS:
                    continue
                slot, value = self._features_of(word)
                slots.append(slot)
                values.append(value)
                counts.append(1.0 + math.log(count))
                rows.append(row)
        if not rows:
            return
        sizes = np.fromiter((len(slot) for slot in slots), np.int64, len(slots))
        positions = np.concatenate(slots) + np.repeat(np.asarray(rows, np.int64) * self._dimension, sizes)
        weights = np.concatenate(values) * np.repeat(np.asarray(counts, np.float32), sizes)
        summed = np.bincount(positions, weights, minlength=block.size)
        block += summed.reshape(block.shape).astype(np.float32)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        np.divide(block, norms, out=block, where=norms > 0)

    def _features_of(self, word: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        found = self._features.get(word)
        if found is None:
            found = self._hash(word)
            if len(self._features) >= _WORDS_KEPT_MAX:
                self._features.clear()
            self._features[word] = found
        return found

    def _hash(self, word: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        framed = f"^{word[:_WORD_CHARS_MAX]}$"
        grams = [
            framed[start : start + size]
            for size in _NGRAM_SIZES
            for start in range(len(framed) - size + 1)
            if len(word) >= size - 1
        ]
        hashes = np.array(
            [zlib.crc32(f"w{word}".encode()), *(zlib.crc32(f"g{gram}".encode()) for gram in grams)], np.int64
        )
        values = np.full(len(hashes), _NGRAMS_WEIGHT / math.sqrt(max(len(grams), 1)), np.float32)
        values[0] = 1.0
        # CRC-32 is linear, so near words get near values: multiply (Knuth) before taking bits.
        mixed = (hashes * 2_654_435_761) & 0xFFFF_FFFF
        mixed ^= mixed >> 15
        values[(mixed & 1) == 1] *= -1
        return ((mixed >> 1) % self._dimension).astype(np.int32), values


class QueryVectors:
    """Embeds queries, and remembers the last ones: who looks for one text in several namespaces, as a run
    does before it begins, pays for one embedding.

    Args:
        embedder: Makes the vectors.
    """

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: OrderedDict[tuple[str, str], NDArray[np.float32]] = OrderedDict()

    async def of(self, tenant: str, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Their vectors.

        Args:
            tenant: Whose queries. Each has its own: the time that an answer takes tells nobody what another
                tenant asked for.
            texts: The queries' texts.
        """
        known = self._known
        found = {text: known[tenant, text] for text in texts if (tenant, text) in known}
        fresh = list(dict.fromkeys(text for text in texts if text not in found))
        if fresh:
            found |= zip(fresh, await self._embedder.embed(fresh, kind="query"), strict=True)
        for text, vector in found.items():
            known[tenant, text] = vector
            known.move_to_end((tenant, text))
        while len(known) > QUERIES_KNOWN_MAX:
            known.popitem(last=False)
        return [found[text] for text in texts]

    def forget(self, tenant: str) -> None:
        """Let go of a tenant's queries."""
        for one in [key for key in self._known if key[0] == tenant]:
            del self._known[one]
