"""What became of routed calls: the log that the learned router learns from.

A row holds no prompt, only its embedding (hashed n-grams, see `learned`), and belongs to one tenant. It is
written in groups in the background: `kill -9` loses what was added since the last group, `flush_s` at most
while the database answers. Outcomes are evidence, not accounts; money is counted in the ledger.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.sql import SqlDatabase, execute

# SQLite takes any name of a type: BYTEA holds a blob there too.
TABLES: tuple[str, ...] = (
    """CREATE TABLE IF NOT EXISTS gw_outcomes (
        tenant TEXT NOT NULL,
        at_s DOUBLE PRECISION NOT NULL,
        id TEXT NOT NULL,
        embedding BYTEA NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        propensity DOUBLE PRECISION NOT NULL,
        verdict DOUBLE PRECISION NOT NULL,
        cost_nano_usd BIGINT,
        latency_s DOUBLE PRECISION NOT NULL,
        tries_before INTEGER NOT NULL,
        PRIMARY KEY (tenant, at_s, id))""",
    "CREATE INDEX IF NOT EXISTS gw_outcomes_at ON gw_outcomes (at_s)",
)

QUEUE_MAX = 10_000
GROUP_MAX = 1000
_AGE_CHECKED_S = 3600.0
_ALL_ROWS = 2**62

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and what a checker said of it.

    Args:
        at_s: Seconds since the Unix epoch.
        tenant: Whose call it was.
        embedding: float16 bytes of the prompt's embedding (`learned.packed`), never the prompt.
        provider, model: Who answered.
        propensity: Probability with which this model came first, from `Decision`.
        verdict: The checker's score, 0 to 1.
        cost_nano_usd: None when no price is known.
        latency_s: Of this answer alone.
        tries_before: How many models were asked for the same call before: their answers were not accepted,
            so this prompt is harder than most.
    """

    at_s: float
    tenant: str
    embedding: bytes
    provider: str
    model: str
    propensity: float
    verdict: float
    cost_nano_usd: int | None
    latency_s: float
    tries_before: int = 0


class Kept(NamedTuple):
    """How much of a tenant is stored, and when its newest outcome was."""

    outcomes: int
    newest_at_s: float


class OutcomeLog:
    """Outcomes of all tenants in one table, each tenant's bounded by count and age.

    Args:
        database: Made with `TABLES` among its tables.
        per_tenant_max: Outcomes kept of each tenant, the newest.
        age_max_s: Older ones are deleted; looked after once an hour.
        flush_s: Seconds between two groups.
        queue_max: Outcomes waiting at most; further ones are dropped and counted.
        clock: Time, and the pause between groups.
    """

    def __init__(
        self,
        database: SqlDatabase,
        *,
        per_tenant_max: int = 20_000,
        age_max_s: float = 90 * 86_400.0,
        flush_s: float = 1.0,
        queue_max: int = QUEUE_MAX,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._database = database
        self._per_tenant_max = per_tenant_max
        self._age_max_s = age_max_s
        self._flush_s = flush_s
        self._queue_max = queue_max
        self._clock = clock
        self._queue: deque[Outcome] = deque()
        self._waiting = asyncio.Event()
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._written: Counter[str] = Counter()
        self._age_checked_s: float | None = None
        # Orders what has one time stamp; the token keeps two workers' ids apart.
        self._numbers = itertools.count()
        self._token = secrets.token_hex(6)
        self.dropped = 0
        """Outcomes that found the queue full."""

    def add(self, outcome: Outcome) -> None:
        """Have an outcome stored. Never waits; call it in the event loop."""
        if len(self._queue) >= self._queue_max:
            self.dropped += 1
            return
        self._queue.append(outcome)
        self._waiting.set()

    def start(self) -> None:
        """Begin to write in the background. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._flush_forever(), name="outcome-log")

    async def close(self) -> None:
        """Write what waits, and stop.

        Raises:
            Unavailable: the database does not answer; what waited is lost.
        """
        task, self._task = self._task, None
        if task is not None:
            async with self._writing:  # a group on its way is waited for, not abandoned
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.flush()

    async def flush(self) -> None:
        """Write all that waits now. Raises as the database does; what was not written waits on."""
        while self._queue:
            async with self._writing:
                group = [self._queue.popleft() for _ in range(min(GROUP_MAX, len(self._queue)))]
                try:
                    await asyncio.to_thread(self._write, group)
                except AgenticFlowError:
                    self._queue.extendleft(reversed(group))
                    raise
        self._waiting.clear()

    async def recent(self, tenant: str, limit: int) -> list[Outcome]:
        """The newest outcomes of one tenant, newest first, as far as they are written."""
        rows = await asyncio.to_thread(
            self._database.rows,
            "SELECT at_s, tenant, embedding, provider, model, propensity, verdict, cost_nano_usd, latency_s,"
            " tries_before FROM gw_outcomes WHERE tenant = :tenant ORDER BY at_s DESC, id DESC LIMIT :limit",
            tenant=tenant,
            limit=limit,
        )
        return [_outcome(row) for row in rows]

    async def tenants(self) -> dict[str, Kept]:
        """Every tenant with outcomes."""
        rows = await asyncio.to_thread(
            self._database.rows, "SELECT tenant, COUNT(*), MAX(at_s) FROM gw_outcomes GROUP BY tenant"
        )
        return {str(tenant): Kept(int(count), float(newest)) for tenant, count, newest in rows}

    async def erase_tenant(self, tenant: str) -> int:
        """Delete all of a tenant, waiting outcomes too; how many stored ones there were."""
        async with self._writing:
            self._queue = deque(outcome for outcome in self._queue if outcome.tenant != tenant)
            self._written.pop(tenant, None)
            return await asyncio.to_thread(self._erase, tenant)

    async def _flush_forever(self) -> None:
        while True:
            await self._waiting.wait()
            await self._clock.sleep(self._flush_s)
            try:
                await self.flush()
            except AgenticFlowError as error:
                _log.warning("outcomes_delayed", waiting=len(self._queue), error=error.message)
            if self.dropped:
                dropped, self.dropped = self.dropped, 0
                _log.warning("outcomes_dropped", count=dropped, queue_max=self._queue_max)

    def _write(self, group: Sequence[Outcome]) -> None:
        rows = [self._row(outcome) for outcome in group]
        now_s = self._clock.time_s()
        with self._database.transaction() as connection:
            connection.execute(_INSERT, rows)
            for tenant, count in Counter(outcome.tenant for outcome in group).items():
                first = tenant not in self._written
                self._written[tenant] += count
                # Not at every group: a tenant may exceed its share by a tenth until the next look.
                if first or self._written[tenant] >= self._per_tenant_max // 10:
                    self._written[tenant] = 0
                    execute(connection, _TRIM, tenant=tenant, kept=self._per_tenant_max, all=_ALL_ROWS)
            if self._age_checked_s is None or now_s - self._age_checked_s >= _AGE_CHECKED_S:
                execute(
                    connection, "DELETE FROM gw_outcomes WHERE at_s < :oldest", oldest=now_s - self._age_max_s
                )
                self._age_checked_s = now_s

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "tenant": outcome.tenant,
            "at_s": outcome.at_s,
            "id": f"{next(self._numbers):012x}{self._token}",
            "embedding": outcome.embedding,
            "provider": outcome.provider,
            "model": outcome.model,
            "propensity": outcome.propensity,
            "verdict": outcome.verdict,
            "cost_nano_usd": outcome.cost_nano_usd,
            "latency_s": outcome.latency_s,
            "tries_before": outcome.tries_before,
        }

    def _erase(self, tenant: str) -> int:
        with self._database.transaction() as connection:
            return execute(
                connection, "DELETE FROM gw_outcomes WHERE tenant = :tenant", tenant=tenant
            ).rowcount


_INSERT = (
    "INSERT INTO gw_outcomes (tenant, at_s, id, embedding, provider, model, propensity, verdict,"
    " cost_nano_usd, latency_s, tries_before) VALUES (:tenant, :at_s, :id, :embedding, :provider, :model,"
    " :propensity, :verdict, :cost_nano_usd, :latency_s, :tries_before)"
)
_TRIM = (
    "DELETE FROM gw_outcomes WHERE tenant = :tenant AND id IN (SELECT id FROM gw_outcomes"
    " WHERE tenant = :tenant ORDER BY at_s DESC, id DESC LIMIT :all OFFSET :kept)"
)


def _outcome(row: Sequence[Any]) -> Outcome:
    at_s, tenant, embedding, *others = row
    return Outcome(at_s, tenant, bytes(embedding), *others)
