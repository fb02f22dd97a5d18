"""Rows of one of memory's namespaces, which is made by the first write and empty until then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from agentic_flow.core.errors import NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Filter, Hit, Item, SearchQuery, UpsertResult, Vector

PAGE_ITEMS = 500
UNSEARCHED = Vector((1.0,))
"""What rows carry in a namespace that is never searched by meaning, so that no embedder is paid."""


class Rows:
    """A namespace of the store, by tenant.

    Args:
        store: Keeps the rows.
        namespace: Its name.
        searched: Whether rows are found by the meaning of their text; if not, none is embedded.
    """

    def __init__(self, store: VectorStore, namespace: str, *, searched: bool) -> None:
        self._store = store
        self._namespace = namespace
        self._searched = searched

    async def get(self, tenant: str, ids: Sequence[str]) -> dict[str, Item]:
        """The rows that exist, by id."""
        try:
            return {item.id: item for item in await self._store.get(tenant, self._namespace, ids)}
        except NotFound:
            return {}

    async def put(
        self, tenant: str, items: Sequence[Item], *, expected_version: int | None = None
    ) -> UpsertResult:
        """Insert or replace all of them or none.

        Raises:
            Conflict: one is not at `expected_version`.
        """
        if not self._searched:
            items = [item.model_copy(update={"vector": UNSEARCHED}) for item in items]
        try:
            return await self._upsert(tenant, items, expected_version)
        except NotFound:
            await self._store.create_namespace(
                tenant, self._namespace, dimension=None if self._searched else len(UNSEARCHED)
            )
            return await self._upsert(tenant, items, expected_version)

    async def _upsert(self, tenant: str, items: Sequence[Item], expected_version: int | None) -> UpsertResult:
        return await self._store.upsert(tenant, self._namespace, items, expected_version=expected_version)

    async def all(self, tenant: str, *, where: Filter | None = None) -> AsyncIterator[Item]:
        """Every row in id order, read page by page."""
        cursor: str | None = None
        while True:
            try:
                page = await self._store.list_items(
                    tenant, self._namespace, where=where, cursor=cursor, limit=PAGE_ITEMS
                )
            except NotFound:
                return
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def page(
        self, tenant: str, *, where: Filter | None = None, cursor: str | None = None, limit: int = 100
    ) -> tuple[list[Item], str | None]:
        """One page in id order and the cursor of the next, None at the end."""
        try:
            page = await self._store.list_items(
                tenant, self._namespace, where=where, cursor=cursor, limit=limit
            )
        except NotFound:
            return [], None
        return list(page.items), page.cursor

    async def search(self, tenant: str, query: SearchQuery) -> tuple[Hit, ...]:
        """Hits, best first."""
        try:
            return (await self._store.search(tenant, self._namespace, query)).hits
        except NotFound:
            return ()

    async def delete(self, tenant: str, ids: Sequence[str]) -> int:
        """How many existed."""
        try:
            return await self._store.delete(tenant, self._namespace, ids)
        except NotFound:
            return 0
