"""The usage ledger: one row for each call, for tables and bills after the fact.

What a call costs the caller in time is an append to a bounded buffer; a background task writes groups. A
process that is killed (`kill -9`) loses the calls of the last half second, and those that wait while the
database is away. Budgets are not affected: they reserve before the call, in a ledger of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.sql import SqlDatabase, execute
from agentic_flow.gateway.usage_table import UsageKey, UsageReport, UsageRow, usage_report, usage_table

_log = structlog.get_logger(__name__)

RETENTION_S = 90 * 86_400.0
GROUP_MAX = 500
INTERVAL_S = 0.5
PENDING_MAX = 20_000
"""Records that may wait in memory, some ten megabytes of them."""
PRUNE_EVERY_S = 3600.0
_PRUNE_BATCH = 1000
_RETRY_FIRST_S, _RETRY_MAX_S = 0.5, 5.0
# What a provider or a caller states is bounded, or one absurd value would break every sum it is part of.
TOKENS_MAX = 2**40
COST_MAX_NANO_USD = 2**50
TEXT_CHARS_MAX = 256

TABLES: tuple[str, ...] = (
    """CREATE TABLE IF NOT EXISTS gw_usage (
        writer BIGINT NOT NULL,
        sequence BIGINT NOT NULL,
        at_s DOUBLE PRECISION NOT NULL,
        hour BIGINT NOT NULL,
        request_id TEXT NOT NULL,
        tenant TEXT NOT NULL,
        key_id TEXT NOT NULL,
        agent TEXT NOT NULL,
        run TEXT NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        asked TEXT NOT NULL,
        wire TEXT NOT NULL,
        input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        cache_read_tokens BIGINT NOT NULL,
        cache_write_tokens BIGINT NOT NULL,
        reasoning_tokens BIGINT NOT NULL,
        cost_nano_usd BIGINT,
        latency_s DOUBLE PRECISION NOT NULL,
        first_token_s DOUBLE PRECISION,
        status TEXT NOT NULL,
        tries BIGINT NOT NULL,
        cached SMALLINT NOT NULL,
        estimated SMALLINT NOT NULL,
        streamed SMALLINT NOT NULL,
        PRIMARY KEY (writer, sequence)
    )""",
    "CREATE INDEX IF NOT EXISTS gw_usage_by_tenant ON gw_usage (tenant, at_s)",
    "CREATE INDEX IF NOT EXISTS gw_usage_by_time ON gw_usage (at_s)",
)


class UsageRecord(NamedTuple):
    """One call, when it has ended.

    Args:
        at_s: Unix time of its end.
        tenant, key, agent, run: Who asked; see `Caller`.
        provider, model: Who answered, or was asked last; "" when the call was refused before.
        asked: The name that was asked for: a model, an alias or a route.
        wire: The format of the front end.
        input_tokens: Cache reads and writes included.
        output_tokens: Reasoning included.
        cost_nano_usd: What it cost; 0 when nothing was sent to a provider, None when it is not known.
        latency_s: From the request to the end of the answer.
        first_token_s: From the request to the first piece of a streamed answer.
        status: `ok`, `cancelled`, or an error's code.
        tries: Calls to providers.
        cached: Answered by the response cache.
        estimated: The provider billed nothing; the tokens are counted here.
    """

    at_s: float
    request_id: str
    tenant: str
    key: str
    agent: str
    run: str
    provider: str
    model: str
    asked: str
    wire: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    cost_nano_usd: int | None
    latency_s: float
    first_token_s: float | None
    status: str
    tries: int
    cached: bool = False
    estimated: bool = False
    streamed: bool = False


_COLUMNS = (
    "writer, sequence, at_s, hour, request_id, tenant, key_id, agent, run, provider, model, asked, wire, "
    "input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_nano_usd, "
    "latency_s, first_token_s, status, tries, cached, estimated, streamed"
)


class UsageLedger:
    """Records of calls, and tables of them.

    `record` may be called from any thread. The other methods without `async` block: call them in a thread.
    Each record is written once, also when the database commits a group and the answer to that is lost.

    Args:
        database: With `TABLES` in it; stays the caller's.
        retention_s: Older records are pruned by the background task; None keeps them.
        pending_max: Records that may wait in memory; past it the oldest are lost, and counted.
        group_max: Records written in one transaction, and the number that does not wait for `interval_s`.
        interval_s: Longest wait of a record for its group.
        writer: Number of this writer among all that write to this database.
    """

    def __init__(
        self,
        database: SqlDatabase,
        clock: Clock = SYSTEM_CLOCK,
        *,
        retention_s: float | None = RETENTION_S,
        pending_max: int = PENDING_MAX,
        group_max: int = GROUP_MAX,
        interval_s: float = INTERVAL_S,
        writer: int | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._retention_s = retention_s
        self._pending_max = pending_max
        self._group_max = group_max
        self._interval_s = interval_s
        self._writer = secrets.randbits(62) if writer is None else writer
        self._sequence = itertools.count()
        self._pending: deque[tuple[int, UsageRecord]] = deque()
        self._in_flight = 0
        self._pending_lock = threading.Lock()
        # Held while a group is on its way, so that an erasure cannot be overtaken by one.
        self._writing_lock = threading.Lock()
        self._file_identity: tuple[int, int] | None = None
        self._away = False
        self._closed = False
        self._lost = 0
        self._lost_told = 0
        self._written = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # Recording

    @property
    def lost(self) -> int:
        """Records that were given up because too many waited, or at the end with the database away."""
        return self._lost

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        with self._pending_lock:
            return len(self._pending) + self._in_flight

    @property
    def written(self) -> int:
        """Records that this process has written."""
        return self._written

    def record(self, record: UsageRecord) -> None:
        """Take a record; it is written within `interval_s`. Never blocks, never fails."""
        with self._pending_lock:
            if self._closed:
                self._lost += 1
                return
            if len(self._pending) + self._in_flight >= self._pending_max and self._pending:
                self._pending.popleft()
                self._lost += 1
            self._pending.append((next(self._sequence), record))
            count = len(self._pending)
        if self._loop is not None and (count == 1 or count == self._group_max):
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._arrived.set()
        if len(self._pending) >= self._group_max:
            self._full.set()

    async def start(self) -> None:
        """Begin to write in the background, and to prune."""
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._keep_writing(), name="usage-ledger-writing"))
        if self._retention_s is not None:
            self._tasks.append(
                asyncio.create_task(self._keep_pruning(self._retention_s), name="usage-ledger-pruning")
            )
        self._wake()

    async def flush(self) -> None:
        """Write what waits now.

        Raises:
            Unavailable, DataCorrupted: the database cannot be written; the records wait on.
        """
        await asyncio.to_thread(self._write_pending)

    async def close(self) -> None:
        """Write everything and stop. What cannot be written is lost, counted and logged."""
        with self._pending_lock:
            self._closed = True
        self._loop = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        try:
            await self.flush()
        except AgenticFlowError:  # logged by _write_pending
            with self._pending_lock:
                self._lost += len(self._pending)
                self._pending.clear()
        self._tell_lost()

    async def _keep_writing(self) -> None:
        retry_s = 0.0
        while True:
            await self._arrived.wait()
            if retry_s:
                await self._clock.sleep(retry_s)
            else:
                await self._group_due()
            self._arrived.clear()
            self._full.clear()
            try:
                await self.flush()
                retry_s = 0.0
            except AgenticFlowError:  # logged by _write_pending
                retry_s = min(_RETRY_MAX_S, retry_s * 2 or _RETRY_FIRST_S)
            except Exception:  # noqa: BLE001 - a flaw of ours must not end the task: the records wait on
                _log.exception("usage_write_failed")
                retry_s = _RETRY_MAX_S
            if self._pending:
                self._wake()

    async def _group_due(self) -> None:
        """Wait until a group is full, or its time is up."""
        waits = [asyncio.ensure_future(self._full.wait()), asyncio.ensure_future(self._pause())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _pause(self) -> bool:
        await self._clock.sleep(self._interval_s)
        return True

    def _write_pending(self) -> None:
        """Write as many records as wait at the beginning, in groups."""
        with self._writing_lock:
            left = len(self._pending)
            while left > 0:
                with self._pending_lock:
                    size = min(self._group_max, len(self._pending))
                    group = [self._pending.popleft() for _ in range(size)]
                    self._in_flight = len(group)
                if not group:
                    break
                try:
                    self._write(group)
                except BaseException as error:
                    self._put_back(group, error)
                    raise
                with self._pending_lock:
                    self._in_flight = 0
                    self._written += len(group)
                left -= len(group)
                if self._away:
                    self._away = False
                    _log.info("usage_ledger_recovered", waiting=len(self._pending))
                self._tell_lost()

    def _put_back(self, group: list[tuple[int, UsageRecord]], error: BaseException) -> None:
        with self._pending_lock:
            self._pending.extendleft(reversed(group))
            self._in_flight = 0
            while len(self._pending) > self._pending_max:
                self._pending.popleft()
                self._lost += 1
        if not self._away:
            self._away = True
            reason = error.message if isinstance(error, AgenticFlowError) else repr(error)
            _log.warning("usage_ledger_unavailable", waiting=len(self._pending), error=reason)

    def _tell_lost(self) -> None:
        """Log, once for each outage, how many records it cost."""
        if self._lost > self._lost_told:
            _log.error("usage_records_lost", lost=self._lost - self._lost_told, lost_total=self._lost)
            self._lost_told = self._lost

    def _write(self, group: Sequence[tuple[int, UsageRecord]]) -> None:
        self._check_file()
        rows = [_row(self._writer, sequence, record) for sequence, record in group]
        mark = "?" if self._database.is_sqlite else "%s"
        marks = ", ".join([mark] * len(rows[0]))
        with self._database.transaction() as connection:
            connection.exec_driver_sql(
                # A group whose commit went through unheard is not written twice.
                f"INSERT INTO gw_usage ({_COLUMNS}) VALUES ({marks}) ON CONFLICT DO NOTHING",  # noqa: S608 - constants
                rows,
            )

    def _check_file(self) -> None:
        """SQLite would go on writing to a file that was deleted or replaced, and nobody would ever read it.

        Raises:
            Unavailable: the file is gone.
        """
        file = self._database.file
        if file is None:
            return
        try:
            status = file.stat()
        except OSError as error:
            self._database.close()
            raise Unavailable(
                f"the gateway database {str(file)!r} cannot be used: {error.strerror}",
                hint="put it back, or restart",
            ) from error
        identity = (status.st_dev, status.st_ino)
        if self._file_identity not in (None, identity):
            self._database.close()
            self._database.create()
        self._file_identity = identity

    # Reading

    def table(
        self,
        tenant: str | None,
        by: Sequence[UsageKey] = (),
        since_s: float = 0.0,
        until_s: float = math.inf,
        limit: int = 1000,
    ) -> list[UsageRow]:
        """What the calls of a span of time add up to, in groups.

        Args:
            tenant: Only this one's calls; None: everybody's.
            by: What makes a group; none: one row of everything.
            since_s, until_s: Unix times; the first is part of the span, the second is not.
            limit: Most rows; the newest and costliest groups come first.

        Raises:
            InvalidInput: an unknown or repeated key of `by`, or a limit out of range.
            Unavailable: the database cannot be read.
        """
        return usage_table(self._database, tenant, by, since_s, until_s, limit)

    def report(
        self, tenant: str | None, by: Sequence[UsageKey], since_s: float, until_s: float, limit: int
    ) -> UsageReport:
        """The table with its totals; see `usage_report`."""
        return usage_report(self._database, tenant, by, since_s, until_s, limit)

    # Forgetting

    def prune(self, older_than_s: float = RETENTION_S) -> int:
        """Delete records older than that, in small transactions; how many there were."""
        return self._delete("at_s < :before_s", before_s=self._clock.time_s() - older_than_s)

    def erase_tenant(self, tenant: str) -> int:
        """Delete a tenant's records, those that wait here included; how many there were.

        Other workers may hold records of its last half second: revoke its keys first, and erase it a
        second later.
        """
        tenant = _text(tenant)
        with self._writing_lock:
            with self._pending_lock:
                kept = [entry for entry in self._pending if _text(entry[1].tenant) != tenant]
                dropped = len(self._pending) - len(kept)
                self._pending.clear()
                self._pending.extend(kept)
            return dropped + self._delete("tenant = :tenant", tenant=tenant)

    def _delete(self, condition: str, **bindings: object) -> int:
        deleted = 0
        while True:
            with self._database.transaction() as connection:
                batch = execute(
                    connection,
                    "DELETE FROM gw_usage WHERE (writer, sequence) IN (SELECT writer, sequence FROM gw_usage "  # noqa: S608 - constants
                    f"WHERE {condition} LIMIT :batch)",
                    batch=_PRUNE_BATCH,
                    **bindings,
                ).rowcount
            deleted += batch
            if batch < _PRUNE_BATCH:
                return deleted

    async def _keep_pruning(self, retention_s: float) -> None:
        while True:
            try:
                pruned = await asyncio.to_thread(self.prune, retention_s)
                if pruned:
                    _log.info("usage_pruned", records=pruned, older_than_s=retention_s)
            except AgenticFlowError as error:
                _log.warning("usage_prune_failed", error=error.message)
            await self._clock.sleep(PRUNE_EVERY_S)


def _row(writer: int, sequence: int, record: UsageRecord) -> tuple[object, ...]:
    """A record as the table holds it, made fit for it: names come from callers, numbers from providers."""
    names, tokens = record[1:10], record[10:15]
    status = record.status
    # One look at all of them together; nearly always nothing has to be done.
    joined = "".join(names) + status
    if len(joined) > TEXT_CHARS_MAX or not joined.isascii() or "\0" in joined:
        names, status = tuple(map(_text, names)), _text(status)
    if min(tokens) < 0 or max(tokens) > TOKENS_MAX:
        tokens = tuple(min(max(count, 0), TOKENS_MAX) for count in tokens)
    at_s, cost, first = _seconds(record.at_s), record.cost_nano_usd, record.first_token_s
    return (
        writer,
        sequence,
        at_s,
        int(at_s // 3600),
        *names,
        *tokens,
        None if cost is None else min(max(cost, 0), COST_MAX_NANO_USD),
        _seconds(record.latency_s),
        None if first is None else _seconds(first),
        status,
        min(max(record.tries, 0), TOKENS_MAX),
        int(record.cached),
        int(record.estimated),
        int(record.streamed),
    )


def _text(value: str) -> str:
    """At most TEXT_CHARS_MAX characters, none that a database refuses."""
    if len(value) > TEXT_CHARS_MAX:
        value = value[:TEXT_CHARS_MAX]
    if value.isascii():
        return value.replace("\0", "?") if "\0" in value else value
    return value.replace("\0", "?").encode("utf-8", "replace").decode()


def _seconds(value: float) -> float:
    return value if 0.0 <= value < 1e12 else 0.0
