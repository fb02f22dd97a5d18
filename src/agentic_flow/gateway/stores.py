"""What the gateway keeps: policies, budgets, usage and outcomes, in one database for all its workers."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway import policy_store, usage
from agentic_flow.gateway.budgets import ledger
from agentic_flow.gateway.budgets.service import Budgets
from agentic_flow.gateway.policy_store import PolicyStore, PolicyWatch
from agentic_flow.gateway.routing import outcomes
from agentic_flow.gateway.routing.learned import LearnedRouter
from agentic_flow.gateway.routing.outcomes import OutcomeLog
from agentic_flow.gateway.usage import UsageLedger

FILE = "gateway.db"
REFIT_S = 60.0
TABLES: tuple[str, ...] = (*policy_store.TABLES, *ledger.TABLES, *usage.TABLES, *outcomes.TABLES)

_log = structlog.get_logger(__name__)


def gateway_database(settings: GatewaySettings, data_dir: Path) -> SqlDatabase:
    """The gateway's database: `gateway.database_url`, or `gateway.db` in the data folder."""
    url = settings.database_url
    return SqlDatabase(
        url.get_secret_value() if url else None,
        data_dir / FILE,
        name="gateway database",
        setting="gateway.database_url",
        create=TABLES,
    )


class GatewayStores:
    """Everything that is kept, at work between `open` and `close`.

    Args:
        settings: The section `gateway`.
        data_dir: Folder of local state.
        clock: Time and waiting.
    """

    def __init__(self, settings: GatewaySettings, data_dir: Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.database = gateway_database(settings, data_dir)
        self.policies = PolicyStore(self.database, clock=clock)
        self.watch = PolicyWatch(self.policies, clock=clock)
        self.budgets = Budgets(self.database, clock=clock)
        self.usage = UsageLedger(self.database, clock=clock)
        self.outcomes = OutcomeLog(self.database, clock=clock)
        self.learned = LearnedRouter(clock=clock)
        self._clock = clock
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._is_open = False

    async def open(self) -> None:
        """Open the database and begin the work in the background. Idempotent.

        Raises:
            Unavailable: the database cannot be used now.
            DataCorrupted: it is damaged, or its policies cannot be read.
        """
        async with self._opening:
            if self._is_open:
                return
            async with AsyncExitStack() as stack:
                stack.callback(self.database.close)
                await asyncio.to_thread(self.database.create)
                await self.watch.start()
                stack.push_async_callback(self.watch.close)
                await self.budgets.start()
                stack.push_async_callback(self.budgets.close)
                await self.usage.start()
                stack.push_async_callback(self.usage.close)
                self.outcomes.start()
                stack.push_async_callback(self.outcomes.close)
                learning = asyncio.create_task(self._keep_learning(), name="router-learning")
                stack.push_async_callback(_cancelled, learning)
                self._stack = stack.pop_all()
            self._is_open = True

    async def close(self) -> None:
        """Write what waits, hand unspent budgets back, and close the database."""
        self._is_open = False
        await self._stack.aclose()

    async def erase_tenant(self, tenant: str) -> int:
        """Remove a tenant's usage, budgets and outcomes; how many rows. Policies are the operators'."""
        removed = await asyncio.to_thread(self.usage.erase_tenant, tenant)
        removed += await self.outcomes.erase_tenant(tenant)
        self.learned.forget(tenant)
        return removed + await self.budgets.erase_tenant(tenant)

    async def _keep_learning(self) -> None:
        while True:
            try:
                await self.learned.refit(self.outcomes)
            except AgenticFlowError as error:
                _log.warning("router_not_refitted", error_code=error.code, error=error.message)
            await self._clock.sleep(REFIT_S)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
