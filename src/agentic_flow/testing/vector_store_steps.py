"""What scenarios of the `VectorStore` contract are made of: filling a store, asking it, expecting errors."""

from __future__ import annotations

import math
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, SearchResult, Vector

SPACE = "notes"

Scenario = Callable[[VectorStore], Awaitable[None]]


def document(path: str, texts: Sequence[str], sha256: str = "a") -> Document:
    """A document of one chunk per text."""
    chunks = tuple(
        Item(
            id=f"{path}:{line}-{line}",
            text=text,
            metadata={"path": path, "line_start": line, "line_end": line},
        )
        for line, text in enumerate(texts, 1)
    )
    return Document(
        path=path,
        fingerprint=Fingerprint(size_bytes=len(texts), mtime_ns=2**60 + 1, sha256=sha256),
        chunks=chunks,
    )


async def fails(kind: type[AgenticFlowError], call: Awaitable[Any]) -> AgenticFlowError:
    """Await a call that must raise exactly this kind, saying what was wrong; the error."""
    raised: AgenticFlowError | None = None
    result: Any = None
    try:
        result = await call
    except AgenticFlowError as error:
        raised = error
    assert raised is not None, f"{result!r} instead of {kind.__name__}"
    assert type(raised) is kind, f"{raised!r} instead of {kind.__name__}"
    assert raised.message, "an error without a message"
    return raised


async def upsert_one(
    store: VectorStore, tenant: str, item_id: str, text: str, expected_version: int | None
) -> int:
    """The version that one item got."""
    item = Item(id=item_id, text=text)
    return (await store.upsert(tenant, SPACE, [item], expected_version=expected_version)).versions[0]


async def ids_of(store: VectorStore, tenant: str, *, where: dict[str, Any] | None = None) -> list[str]:
    """Ids of one page that holds everything."""
    page = await store.list_items(tenant, SPACE, where=where, limit=1000)
    assert page.cursor is None
    return [item.id for item in page.items]


async def found_by(store: VectorStore, tenant: str, **query: Any) -> list[str]:
    """Ids of the hits, best first."""
    result: SearchResult = await store.search(tenant, SPACE, SearchQuery.model_validate(query))
    return [hit.item.id for hit in result.hits]


async def all_of(
    store: VectorStore, tenant: str, namespace: str = SPACE, *, vectors: bool = False
) -> list[Item]:
    """Every item, page by page."""
    items: list[Item] = []
    cursor: str | None = None
    while True:
        page = await store.list_items(tenant, namespace, cursor=cursor, limit=1000, vectors=vectors)
        items += page.items
        if (cursor := page.cursor) is None:
            return items


async def fill(store: VectorStore, tenant: str, count: int) -> list[Item]:
    """Items that all match "common word", with metadata of several kinds, as stored; three are rare."""
    await store.create_namespace(tenant, SPACE)
    items: list[Item] = []
    for i in range(count):
        metadata: dict[str, Any] = {"lang": ("py", "md", "txt")[i % 3], "size": i % 12}
        if i % 5 == 0:
            metadata["note"] = None if i % 2 else f"note {i}"
        if i % 4 == 0:
            metadata["title"] = (
                f"The {('Red', 'brown')[i % 8 // 4]} fox, {'' if i % 12 else 'Straße'} no. {i}"
            )
            metadata["due"] = 1795521600 + i if i % 8 else f"2026-11-24T{i % 24:02}:30:00+01:00"
            metadata["@kind"] = i % 3
        if i in (7, 31, 53 % count):
            metadata["rare"] = True
        # The rare ones match worst: a ranking cut before the filter would lose them.
        text = "common word " + ("filler text that dilutes " * 20 if "rare" in metadata else f"number {i}")
        items.append(Item(id=f"i{i:04}", text=text, metadata=metadata))
    await store.upsert(tenant, SPACE, items)
    await store.upsert(tenant, SPACE, items[:3])
    return await all_of(store, tenant)


def similarity(metric: str, one: Sequence[float], other: Sequence[float]) -> float:
    """The metric in plain Python; higher is closer."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    if metric == "dot":
        return product
    if metric == "cosine":
        return product / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5
    return -(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5)


def half(values: Sequence[float]) -> tuple[float, ...]:
    """The values as IEEE 754 half precision keeps them."""
    packing = f"<{len(values)}e"
    return struct.unpack(packing, struct.pack(packing, *values))


def unit(values: Sequence[float]) -> Vector:
    """The values scaled to length 1."""
    length = math.sqrt(sum(value * value for value in values))
    return Vector([value / length for value in values])
