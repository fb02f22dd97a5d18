"""Large namespaces get a partition and a graph index of their own; deleted ones give theirs back."""

from __future__ import annotations

import asyncio

import structlog
from psycopg import AsyncConnection

from agentic_flow.agentdb.postgres.connections import Connections, fetch
from agentic_flow.agentdb.postgres.rows import NamespaceRow
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.settings import AgentDBSettings

log = structlog.get_logger()

NAMESPACES_KNOWN_MAX = 10_000
LOOKS = 10
"""How often the size of a namespace is looked at while it grows to the size at which it moves."""


class Growth:
    """Watches what this process writes.

    Args:
        database: Where the namespaces are.
        settings: `index` and `scan_rows_min` say from which size on a namespace gets a graph.
    """

    def __init__(self, database: Connections, settings: AgentDBSettings) -> None:
        self._db = database
        self._least = {"exact": None, "graph": 1}.get(settings.index, settings.scan_rows_min)
        self._unseen: dict[int, int] = {}  # namespace → rows written since its size was looked at
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Give up what is under way: a move is one transaction, and is begun again by later writes."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def settle(self) -> None:
        """Return once nothing is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks.values())

    def written(self, tenant: str, row: NamespaceRow, rows_written: int) -> None:
        """Look at the size of a namespace now and then, and move it in the background once it is large."""
        least = self._least
        if least is None or row.graph or not row.may_have_graph or not rows_written:
            return
        unseen = self._unseen.get(row.id)
        if unseen is not None and unseen + rows_written < least / LOOKS:
            self._unseen[row.id] = unseen + rows_written
            return
        if len(self._unseen) >= NAMESPACES_KNOWN_MAX:
            self._unseen.clear()
        self._unseen[row.id] = 0
        if row.id not in self._tasks:
            self._tasks[row.id] = asyncio.create_task(self._promote_when_large(tenant, row, least))
            self._tasks[row.id].add_done_callback(lambda _: self._tasks.pop(row.id, None))

    async def promote(self, tenant: str, row: NamespaceRow) -> bool:
        """Move a namespace to a partition of its own. Its writers wait meanwhile, its readers do not.

        Returns:
            Whether it was done: not for a namespace that has one, or whose vectors are too long for one.
        """
        if row.graph or not row.may_have_graph:
            return False

        async def job(connection: AsyncConnection) -> bool:
            await connection.execute("SET LOCAL statement_timeout = 0")
            found = await fetch(
                connection,
                "SELECT agentic_flow.promote(%s, %s, %s)",
                (row.id, row.index_type, row.index_operators),
            )
            return bool(found[0][0])

        return await self._db.write(tenant, job)

    async def sweep(self, tenant: str) -> None:
        """Drop the partitions of deleted namespaces. Their rows are gone; the tables can wait."""

        async def job(connection: AsyncConnection) -> None:
            await fetch(connection, "SELECT agentic_flow.sweep()")

        try:
            await self._db.write(tenant, job)
        except AgenticFlowError as error:
            log.info("partitions_left", error=error.message)

    async def _promote_when_large(self, tenant: str, row: NamespaceRow, least: int) -> None:
        async def job(connection: AsyncConnection) -> int:
            found = await fetch(
                connection,
                "SELECT count(*) FROM (SELECT 1 FROM agentic_flow.items AS i WHERE i.shard = 0 "
                "AND i.namespace_id = %s LIMIT %s) AS found",
                (row.id, least),
            )
            return int(found[0][0])

        try:
            if await self._db.read(tenant, job) >= least and await self.promote(tenant, row):
                log.info("namespace_promoted", namespace=row.name, rows_min=least)
        except AgenticFlowError as error:
            # It works without; the next rows written try again.
            log.warning("namespace_not_promoted", namespace=row.name, error=error.message)
