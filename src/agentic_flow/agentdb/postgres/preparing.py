"""What is done with queries and items before the database sees them: checked, embedded, encoded."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb import schema as limits
from agentic_flow.agentdb.postgres.conditions import compile_filter
from agentic_flow.agentdb.postgres.encoding import Prepared, prepare
from agentic_flow.agentdb.postgres.rows import NamespaceRow
from agentic_flow.agentdb.postgres.search import SPELLING_WEIGHT, Mode, Request
from agentic_flow.agentdb.records import check_item, check_vectors
from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.ports import Embedder
from agentic_flow.core.vectors import Item, SearchQuery

T = TypeVar("T")

PREPARED_HERE_MAX = 8


async def prepare_requests(
    embedder: Embedder, row: NamespaceRow, queries: Sequence[SearchQuery], now_s: float
) -> list[Request]:
    """What the database needs of each query: modes decided, texts embedded, filters compiled.

    Raises:
        InvalidInput: a query gives nothing that its mode can search with, or its filter is malformed.
        Conflict: the namespace's embedder is not this one.
    """
    modes: list[Mode] = [_mode(embedder, row, query) for query in queries]
    bare = [
        position
        for position, (query, mode) in enumerate(zip(queries, modes, strict=True))
        if mode != "text" and query.vector is None
    ]
    vectors: dict[int, NDArray[np.float32]] = {}
    if bare:
        texts = [queries[position].text[: limits.QUERY_CHARS_MAX] for position in bare]
        embedded = await embedder.embed(texts, kind="query")
        vectors = dict(zip(bare, embedded, strict=True))
    semantic = not row.callers_vectors and embedder.semantic
    requests: list[Request] = []
    for position, (query, mode) in enumerate(zip(queries, modes, strict=True)):
        vector = vectors.get(position)
        if mode != "text" and query.vector is not None:
            checked = check_vectors([query.vector], row.layout, lambda _: "the query")
            vector = row.layout.comparable(checked)[0]
        requests.append(
            Request(
                query=query,
                mode=mode,
                vector=vector,
                vector_weight=1.0 if row.callers_vectors or semantic else SPELLING_WEIGHT,
                where=compile_filter(query.filter) if query.filter else None,
                now_s=now_s,
            )
        )
    return requests


def _mode(embedder: Embedder, row: NamespaceRow, query: SearchQuery) -> Mode:
    """Which sides of the search take part."""
    if query.at_s is not None and not math.isfinite(query.at_s):
        raise InvalidInput(f"the query asks for time {query.at_s!r}", hint="give Unix seconds")
    text = bool(query.text.strip())
    given = query.vector is not None or (text and not row.callers_vectors)
    if query.mode == "text":
        given = False
    elif not row.callers_vectors and row.embedder_id != embedder.id:
        raise _other_embedder(embedder, row)
    if query.mode == "vector" or (query.mode == "hybrid" and not text):
        if not given:
            raise InvalidInput(
                "the query has no vector and nothing to make one from",
                hint="give it a vector" if row.callers_vectors else "give it a text or a vector",
            )
        return "vector"
    if not text:
        raise InvalidInput("the query has no text", hint="give it one, or search by vector")
    return "hybrid" if given else "text"


async def prepare_items(
    embedder: Embedder, row: NamespaceRow, items: Sequence[Item], *, restored: bool = False
) -> list[Prepared]:
    """Check, embed and encode, away from the event loop.

    Args:
        restored: The items come from a store, and are to be what they were.

    Raises:
        InvalidInput, TooLarge: an item does not fit the namespace or its limit.
        Conflict: items need embedding, and the namespace's embedder is not this one.
    """
    layout = row.layout
    bare = [position for position, item in enumerate(items) if item.vector is None]
    if bare and row.callers_vectors:
        raise InvalidInput(
            f"item {items[bare[0]].id!r} has no vector", hint=f"namespace {row.name!r} takes your vectors"
        )
    if bare and row.embedder_id != embedder.id:
        raise _other_embedder(embedder, row)
    brought = [position for position, item in enumerate(items) if item.vector is not None]

    def check() -> tuple[list[bytes], NDArray[np.float32]]:
        metadata = [check_item(item) for item in items]
        return metadata, _brought_vectors(row, [items[position] for position in brought], restored=restored)

    metadata, checked = await _threaded(len(items), check)
    vectors = np.empty((len(items), layout.dimension), np.float32)
    vectors[brought] = checked
    if bare:
        vectors[bare] = await embedder.embed([items[position].text for position in bare])
    return await _threaded(len(items), lambda: prepare(items, metadata, vectors))


def _brought_vectors(row: NamespaceRow, items: Sequence[Item], *, restored: bool) -> NDArray[np.float32]:
    """The vectors that come with items, shape (len(items), dimension), as they are to be stored."""
    layout = row.layout
    vectors = [vector for item in items if (vector := item.vector) is not None]
    matrix = np.zeros((len(items), layout.dimension), np.float32)
    # Of a text without words the store's own embedder makes the zero vector; back it comes as that.
    made_here = restored and not row.callers_vectors
    blank = bytes(4 * layout.dimension)
    chosen = [at for at, vector in enumerate(vectors) if not (made_here and vector.data == blank)]
    if not chosen:
        return matrix
    checked = check_vectors(
        [vectors[at] for at in chosen], layout, lambda position: f"item {items[chosen[position]].id!r}"
    )
    if restored and layout.quantization == "f16":
        # Numbers that are half precision already are stored as they are, not made unit vectors once more.
        given = np.stack([np.frombuffer(vectors[at].data, "<f4") for at in chosen])
        with np.errstate(over="ignore"):
            exact = (given.astype(np.float16) == given).all(axis=1)
        checked = np.where(exact[:, None], given, checked)
    matrix[chosen] = checked
    return matrix


async def _threaded(items: int, work: Callable[[], T]) -> T:
    """Do it in another thread, where it takes longer than going there and back."""
    return work() if items <= PREPARED_HERE_MAX else await asyncio.to_thread(work)


def _other_embedder(embedder: Embedder, row: NamespaceRow) -> Conflict:
    return Conflict(
        f"namespace {row.name!r} was embedded by {row.embedder_id!r}, this store embeds with {embedder.id!r}",
        hint="configure that embedder, or delete the namespace and fill it again",
    )
