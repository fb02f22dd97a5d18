"""AgentDB through its embedded API, on each of its index tiers."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from agentdb_peers.rows import DIMENSION, TENANT, K, Query, Row, Rows, value_of
from agentdb_peers.system import System, folder_bytes

WHOLE, SMALL, SPACE = "whole", "small", "rows"
"""Tenants: one has every row, the other 1 % of them, in a namespace of its own."""
LOAD_ROWS = 1000


class AgentDBSystem(System):
    """AgentDB with vectors kept as float16."""

    graph_rows_min: ClassVar[int | None] = None
    durability = "SQLite WAL, synchronous=FULL: on disk (1 sync call each); full text in the same transaction"

    def imports(self) -> None:
        from agentic_flow.agentdb import service
        from agentic_flow.core import settings, vectors

        self._loop = asyncio.new_event_loop()
        self._service, self._values = service, vectors
        chosen = {} if self.graph_rows_min is None else {"graph_rows_min": self.graph_rows_min}
        self._settings = settings.AgentDBSettings.model_validate(chosen)
        # What a database loads on first use belongs to the imports here.
        import faiss  # noqa: F401
        import turbovec  # noqa: F401

    def create(self) -> None:
        self.open()
        for tenant in (WHOLE, SMALL):
            self._run(
                self._store.create_namespace(
                    tenant, SPACE, dimension=DIMENSION, embedder_id="caller", quantization="f16"
                )
            )

    def _run(self, job: Any) -> Any:
        return self._loop.run_until_complete(job)

    def _items(self, rows: Sequence[Row]) -> list[Any]:
        item, vector = self._values.Item, self._values.Vector
        return [
            item(id=row.id, text=row.text, metadata=row.metadata, vector=vector(data=row.vector.tobytes()))
            for row in rows
        ]

    def load(self, rows: Rows) -> None:
        for block in rows.blocks(LOAD_ROWS):
            self._run(self._store.upsert(WHOLE, SPACE, self._items(block)))
            few = [row for row in block if value_of("tenant", row.number) == TENANT]
            if few:
                self._run(self._store.upsert(SMALL, SPACE, self._items(few)))

    def build(self) -> None:
        self.settle()

    def rebuild(self) -> None:
        self.close()
        shutil.rmtree(self.folder / self._service.INDEXES)
        self.open()
        self.settle()

    def open(self) -> None:
        self._store = self._service.AgentDB(self.folder, self._settings)

    def settle(self) -> None:
        self._run(self._store.settle())

    def close(self) -> None:
        self._store.close()

    async def _search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        values = self._values
        tenant = SMALL if query.kind == "tenant" else WHOLE
        where = {query.kind: query.value} if query.kind in ("tenth", "hundredth") else None
        asked = values.SearchQuery(
            vector=values.Vector(data=query.vector.tobytes()), k=K, mode="vector", filter=where
        )
        found = await self._store.search(tenant, SPACE, asked)
        return [(hit.item.id, hit.item.text, hit.item.metadata) for hit in found.hits]

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        return self._run(self._search(query))

    def search_each(self, queries: Sequence[Query], until_s: float) -> list[Sequence[tuple[str, str, Any]]]:
        async def each() -> list[Sequence[tuple[str, str, Any]]]:
            found: list[Sequence[tuple[str, str, Any]]] = []
            for query in queries:
                found.append(await self._search(query))
                if time.perf_counter() > until_s and len(found) >= 3:
                    break
            return found

        return self._run(each())

    def upsert(self, rows: Sequence[Row]) -> None:
        self._run(self._store.upsert(WHOLE, SPACE, self._items(rows)))

    def upsert_each(self, batches: Sequence[Sequence[Row]], until_s: float) -> int:
        async def each() -> int:
            done = 0
            for batch in batches:
                await self._store.upsert(WHOLE, SPACE, self._items(batch))
                done += 1
                if time.perf_counter() > until_s:
                    break
            return done

        return self._run(each())

    def index_bytes(self) -> int | None:
        return folder_bytes(self.folder / self._service.INDEXES)

    def facts(self) -> dict[str, Any]:
        return {
            f"tier of tenant {tenant}": self._run(self._store.stats(tenant))[0].tier
            for tenant in (WHOLE, SMALL)
        }


class AgentDBScan(AgentDBSystem):
    name = "agentdb scan"
    about = "graph_rows_min above the number of rows, float16 rows"
    graph_rows_min = 10**9


class AgentDBGraph(AgentDBSystem):
    name = "agentdb graph"
    about = "graph_rows_min=4000, float16 rows"
    graph_rows_min = 4000


class AgentDBAuto(AgentDBSystem):
    name = "agentdb auto"
    about = "settings as they come, float16 rows"
