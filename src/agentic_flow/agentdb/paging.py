"""Walking a whole namespace in memory that does not grow with it, and drawing samples from it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable

from agentic_flow.agentdb.schema import PAGE_ITEMS_MAX
from agentic_flow.core.errors import NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Filter, Item, Namespace

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is (0: nobody knows)."""

PAGE_BYTES = 8 * 1024 * 1024
_FIRST_PAGE_ITEMS = 64


def no_progress(done: int, total: int) -> None:
    """For callers that do not watch."""


async def find_namespace(store: VectorStore, tenant: str, name: str) -> Namespace:
    """The namespace of this name.

    Raises:
        NotFound: the tenant has none.
    """
    for namespace in await store.namespaces(tenant):
        if namespace.name == name:
            return namespace
    raise NotFound(f"there is no namespace {name!r}", hint="see `agentic-flow db namespaces`")


async def pages(
    store: VectorStore, tenant: str, namespace: str, *, where: Filter | None = None, vectors: bool = True
) -> AsyncIterator[tuple[Item, ...]]:
    """All items in id order, in pages of about PAGE_BYTES.

    Every page is a snapshot of its own: of rows that change meanwhile, what the page finds counts. Rows that
    nobody touches are given exactly once.
    """
    cursor: str | None = None
    limit = _FIRST_PAGE_ITEMS
    while True:
        page = await store.list_items(
            tenant, namespace, where=where, cursor=cursor, limit=limit, vectors=vectors
        )
        if page.items:
            yield page.items
        cursor = page.cursor
        if cursor is None:
            return
        size = sum(map(item_bytes, page.items)) // max(1, len(page.items))
        limit = max(1, min(PAGE_ITEMS_MAX, PAGE_BYTES // max(1, size)))


def item_bytes(item: Item) -> int:
    """About what an item takes in memory; metadata are guessed by their number."""
    return 500 + 100 * len(item.metadata) + len(item.text) + (4 * len(item.vector) if item.vector else 0)


async def sample_items(
    store: VectorStore,
    tenant: str,
    namespace: Namespace,
    count: int,
    *,
    where: Filter | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[list[Item], int]:
    """Up to `count` items with their vectors, each as likely as any other, and how many there were to choose.

    Reads the namespace once from end to end (Algorithm R, Vitter 1985). The same seed draws the same rows.
    """
    chosen: list[Item] = []
    seen = 0
    draw = random.Random(seed)
    async for page in pages(store, tenant, namespace.name, where=where):
        for item in page:
            seen += 1
            if len(chosen) < count:
                chosen.append(item)
            elif (place := draw.randrange(seen)) < count:
                chosen[place] = item
        progress(seen, max(seen, namespace.items))
    return chosen, seen
