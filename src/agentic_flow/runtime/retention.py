"""Removes ended runs past `swarm.keep_days` and `swarm.keep_bytes` while a server works, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.retention import Retention, kept_by

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.serve")

INTERVAL_S = 600.0


class RunRetention:
    """Keeps the runs of all tenants within the settings, now and every ten minutes. Needs no run engine.

    Several processes may do it on one run database: what one has removed the others no longer find.

    Args:
        settings: The section `swarm`.
        data_dir: Folder of local state.
        removed: Told of a tenant some of whose runs went.
        clock: Tells their age, and waits.
    """

    def __init__(
        self,
        settings: SwarmSettings,
        data_dir: Path,
        *,
        removed: Callable[[str], Awaitable[object]],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        url = settings.database_url.get_secret_value() if settings.database_url else None
        self._database = RunDatabase(url, data_dir, pooled=False)
        self._retention = Retention(self._database, clock)
        self._older_than_s, self._keep_bytes = kept_by(settings)
        self._removed = removed
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    @property
    def has_limits(self) -> bool:
        """Whether anything may go at all."""
        return self._older_than_s is not None or self._keep_bytes is not None

    def start(self) -> None:
        """Begin, if there is a limit."""
        if self.has_limits:
            self._task = asyncio.create_task(self._keep_removing(), name="run-retention")

    async def close(self) -> None:
        """End after the transaction under way. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def remove(self) -> None:
        """Bring the runs of every tenant within the limits, once."""
        for tenant in await asyncio.to_thread(self._retention.tenants):
            gone = await asyncio.to_thread(
                self._retention.purge, tenant, older_than_s=self._older_than_s, keep_bytes=self._keep_bytes
            )
            if gone.runs:
                _log.info(
                    "runs_purged", tenant=tenant, runs=gone.runs, steps=gone.steps, size_bytes=gone.size_bytes
                )
                await self._removed(tenant)

    async def _keep_removing(self) -> None:
        while True:
            try:
                await self.remove()
            except AgenticFlowError as error:
                _log.warning("run_retention_failed", error=error.message)
            except Exception:  # noqa: BLE001 - the next round must come, whatever happened in this one
                _log.exception("run_retention_failed")
            await self._clock.sleep(INTERVAL_S)
