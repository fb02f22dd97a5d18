"""Connections to the primary and its replica: pools, transactions behind the tenants' wall, typed errors.

Every statement runs in a transaction that first becomes the application role and names its tenant, in one
round trip. Nothing of that outlives the transaction, so a pooler between may hand connections on.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import psycopg
import structlog
from pgvector.psycopg import register_vector_async
from psycopg import AsyncConnection, errors, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    DeadlineExceeded,
    Forbidden,
    InvalidSettings,
    StorageFull,
    Unavailable,
)
from agentic_flow.core.sql import ROOM_PROBE

log = structlog.get_logger()

T = TypeVar("T")
Job = Callable[[AsyncConnection], Awaitable[T]]

APP_ROLE = "agentic_flow_app"
EVERY_TENANT = "*"
"""Under this name a transaction sees the names of namespaces and nothing else."""

CONNECT_TIMEOUT_S = 10
RECONNECT_TIMEOUT_S = 2.0
"""How long one attempt to replace a connection goes on: longer pauses would only delay the first call
once the server is back."""
WRITE_STATEMENT_TIMEOUT_S = 600.0
"""Longest time of one statement of a write; waiting for locks is bounded by the query timeout."""
CONFLICT_RETRIES = 8
REPLICA_PAUSE_S = 5.0
"""How long a replica that failed is left alone."""
TENANTS_REMEMBERED = 10_000

_LOST = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.IdleInTransactionSessionTimeout,
)


class Repeat(Exception):
    """Raised by a write's job that found rows changed under it."""


def place(url: str) -> str:
    """Where a URL points to, without its credentials.

    Raises:
        InvalidSettings: it is no PostgreSQL URL. (The driver's own message may repeat a password.)
    """
    try:
        parts = conninfo_to_dict(url)
        int(parts.get("port") or 0)  # libpq only complains of it on connecting, and with its text
        if not url.startswith(("postgresql://", "postgres://")):
            raise ValueError
    except (psycopg.ProgrammingError, ValueError, TypeError):
        raise InvalidSettings(
            "the database URL cannot be read",
            hint="write postgresql://USER:PASSWORD@HOST:5432/DATABASE, special characters percent-encoded",
        ) from None
    return f"{parts.get('dbname') or 'the default database'!r} on {parts.get('host') or 'the local socket'!r}"


async def connect(url: str) -> AsyncConnection:
    """One connection outside any pool; used as a context manager it commits and closes.

    Raises:
        InvalidSettings: the URL is malformed, or names no such database or password.
        Unavailable: nothing answers there.
    """
    where = place(url)
    try:
        return await AsyncConnection.connect(url, connect_timeout=CONNECT_TIMEOUT_S, prepare_threshold=None)
    except psycopg.OperationalError as error:
        raise _not_connected(error, where) from error


def _not_connected(error: psycopg.Error, where: str) -> AgenticFlowError:
    text = str(error)
    if "password authentication failed" in text or "no password supplied" in text or "no pg_hba.conf" in text:
        return InvalidSettings(
            f"PostgreSQL refuses the credentials for database {where}",
            hint="check agentdb.database_url, or the password file it is read from",
        )
    if "does not exist" in text and ("database" in text or "role" in text):
        return InvalidSettings(
            f"database {where} or the role of the URL does not exist",
            hint="create it, or correct agentdb.database_url",
        )
    return Unavailable(
        f"PostgreSQL cannot be reached: database {where}",
        hint="start the server, or correct agentdb.database_url",
        retry_after_s=1.0,
    )


class Connections:
    """Bounded pools to a primary and perhaps a replica.

    Args:
        url: The primary.
        replica_url: A standby that reads may use; this process still reads what it wrote itself.
        pool_max: Most connections to each.
        query_timeout_s: Longest time of one statement of a read, and that a write waits for a lock.
    """

    def __init__(
        self,
        url: str,
        replica_url: str | None,
        *,
        pool_max: int,
        query_timeout_s: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.where = place(url)
        self._clock = clock
        self._timeout_s = query_timeout_s
        self._pool_max = pool_max
        self._vector_schema = "public"
        self._primary = self._pool(url, "agentdb")
        self._replica = self._pool(replica_url, "agentdb-replica") if replica_url else None
        self._replica_from_s = 0.0
        self._lacked_room = False
        self._written: OrderedDict[str, str] = (
            OrderedDict()
        )  # tenant → position in the log after its last write
        self._written_floor: str | None = None  # at least the position of every tenant forgotten above

    def _pool(self, url: str, name: str) -> AsyncConnectionPool[AsyncConnection]:
        return AsyncConnectionPool(
            url,
            kwargs={
                "autocommit": True,  # transactions are begun by hand, with their settings
                "prepare_threshold": None,  # plans must know the values: partitions, selectivity
                "connect_timeout": CONNECT_TIMEOUT_S,
                "application_name": name,
            },
            min_size=1,
            max_size=self._pool_max,
            max_waiting=1000,
            reconnect_timeout=RECONNECT_TIMEOUT_S,
            timeout=min(self._timeout_s, 30.0),
            configure=self._configure,
            open=False,
            name=name,
        )

    async def open(self, vector_schema: str) -> None:
        """Start the pools; `vector_schema` is where the extension lives."""
        self._vector_schema = vector_schema
        await self._primary.open()
        if self._replica is not None:
            await self._replica.open()

    async def close(self) -> None:
        """Idempotent."""
        await self._primary.close()
        if self._replica is not None:
            await self._replica.close()

    async def _configure(self, connection: AsyncConnection) -> None:
        # Looks the types up by name, so they must be on the path.
        await connection.execute(
            "SELECT set_config('search_path', quote_ident(%s), false)", (self._vector_schema,)
        )
        await register_vector_async(connection)

    # Transactions

    async def read(self, tenant: str, job: Job[T]) -> T:
        """Run `job` in a read-only transaction of one snapshot, on the replica when it is new enough.

        A connection that breaks is replaced and the job begun again, once.
        """
        if self._replica is not None and self._clock.monotonic_s() >= self._replica_from_s:
            try:
                return await self._once(
                    self._replica, tenant, job, write=False, written=self._position(tenant)
                )
            except _Behind:
                pass  # the primary knows it
            except (Unavailable, InvalidSettings) as error:
                self._replica_from_s = self._clock.monotonic_s() + REPLICA_PAUSE_S
                log.warning("replica_left", error=error.message, pause_s=REPLICA_PAUSE_S)
        repeated = False
        while True:
            try:
                return await self._fresh(tenant, job, write=False)
            except _Lost as lost:
                if repeated:
                    raise lost.error from lost
                repeated = True

    async def write(self, tenant: str, job: Job[T]) -> T:
        """Run `job` in a transaction; it is durable on return.

        A deadlock, or a row that another transaction inserted first, begins it again: nothing was written.

        Raises:
            Unavailable: the connection broke. It is only unknown whether the call was applied when that
                happened while committing; an idempotency key makes repeating it safe either way.
        """
        for attempt in range(CONFLICT_RETRIES + 1):
            try:
                return await self._fresh(tenant, job, write=True)
            except _Lost as lost:
                raise lost.error from lost
            except (errors.DeadlockDetected, errors.SerializationFailure, Repeat) as error:
                if attempt == CONFLICT_RETRIES:
                    raise Unavailable(
                        "too many writers change the same rows", hint="retry after a pause", retry_after_s=0.5
                    ) from error
                await self._clock.sleep(random.random() * 0.01 * 2**attempt)
        raise AssertionError("unreachable")

    async def check_room(self) -> None:
        """Return when there is room, if a write found none since.

        Raises:
            StorageFull: there still is none.
        """

        async def probe(connection: AsyncConnection) -> None:
            for statement in ROOM_PROBE:
                await connection.execute(statement.encode())

        if not self._lacked_room:
            return
        try:
            await self.write(EVERY_TENANT, probe)
        except Forbidden as error:  # without the right to temporary tables: the next write will tell
            log.warning("room_not_tried", error=error.message)
        self._lacked_room = False

    async def _fresh(self, tenant: str, job: Job[T], *, write: bool) -> T:
        """On a connection that lives: a restarted server leaves dead ones in the pool."""
        for attempt in range(self._pool_max + 1):
            try:
                return await self._once(self._primary, tenant, job, write=write)
            except _Stale as stale:
                if attempt == self._pool_max:
                    raise _Lost(stale.error) from stale
        raise AssertionError("unreachable")

    async def _once(
        self,
        pool: AsyncConnectionPool[AsyncConnection],
        tenant: str,
        job: Job[T],
        *,
        write: bool,
        written: str | None = None,
    ) -> T:
        phase: type[_Broken] = _Stale
        replica = pool is self._replica
        try:
            async with _checked_out(pool) as connection:
                if replica:  # before the snapshot is taken: replaying goes on while a statement looks at it
                    await _check_replayed(connection, written)
                await connection.execute(self._opening(tenant, write=write))
                phase = _Lost
                result = await job(connection)
                await connection.execute("COMMIT")
                if write and self._replica is not None:
                    await self._remember(connection, tenant)
                return result
        except (errors.DeadlockDetected, errors.SerializationFailure):
            if replica:  # a standby cancels reads whose rows the primary has cleaned up
                raise _Behind from None
            raise
        except (PoolTimeout, TooManyRequests, PoolClosed) as error:
            raise Unavailable(
                f"no connection to PostgreSQL became free in time: database {self.where}",
                hint="the server is down or busy; retry, or raise agentdb.pool_max",
                retry_after_s=1.0,
            ) from error
        except psycopg.Error as error:
            known = translate(error, self.where, self._timeout_s)
            self._lacked_room = self._lacked_room or isinstance(known, StorageFull)
            if replica and isinstance(known, Unavailable):
                raise known from error
            if is_lost(error):
                raise phase(known) from error
            raise known from error

    def _opening(self, tenant: str, *, write: bool) -> sql.Composed:
        mode = "READ WRITE" if write else "ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        return sql.SQL(
            "BEGIN TRANSACTION {mode}; SET LOCAL ROLE {role}; SET LOCAL agentic_flow.tenant = {tenant}; "
            "SET LOCAL search_path = {schema}; SET LOCAL statement_timeout = {statement_ms}; "
            "SET LOCAL lock_timeout = {lock_ms}; SET LOCAL jit = off"
        ).format(
            mode=sql.SQL(mode),
            role=sql.Identifier(APP_ROLE),
            tenant=sql.Literal(tenant),
            schema=sql.Identifier(self._vector_schema),
            statement_ms=sql.Literal(_ms(WRITE_STATEMENT_TIMEOUT_S if write else self._timeout_s)),
            lock_ms=sql.Literal(_ms(self._timeout_s) if write else 0),
        )

    # Reading one's own writes from a replica

    async def _remember(self, connection: AsyncConnection, tenant: str) -> None:
        cursor = await connection.execute("SELECT pg_current_wal_insert_lsn()::text")
        row = await cursor.fetchone()
        if row is None:
            return
        # Of two writes at once, the later one may be told first.
        self._written[tenant] = max(self._written.get(tenant, row[0]), row[0], key=_log_position)
        self._written.move_to_end(tenant)
        if len(self._written) > TENANTS_REMEMBERED:
            _, position = self._written.popitem(last=False)
            self._written_floor = max(self._written_floor or position, position, key=_log_position)

    def _position(self, tenant: str) -> str | None:
        return self._written.get(tenant, self._written_floor)


class _Broken(Exception):
    def __init__(self, error: AgenticFlowError) -> None:
        super().__init__(error.message)
        self.error = error


class _Stale(_Broken):
    """The connection was dead before the transaction began."""


class _Lost(_Broken):
    """It died later."""


class _Behind(Exception):
    """The replica has not replayed what this process wrote."""


@asynccontextmanager
async def _checked_out(pool: AsyncConnectionPool[AsyncConnection]) -> AsyncGenerator[AsyncConnection]:
    """A connection whose open transaction is rolled back on the way back, whatever happened."""
    connection = await pool.getconn()
    try:
        yield connection
    finally:
        # A cancellation must not leak it.
        await asyncio.shield(asyncio.ensure_future(_give_back(pool, connection)))


async def _give_back(pool: AsyncConnectionPool[AsyncConnection], connection: AsyncConnection) -> None:
    status = connection.info.transaction_status
    if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
        with suppress(psycopg.Error):  # it broke: the pool replaces it
            await connection.rollback()
    await pool.putconn(connection)


async def _check_replayed(connection: AsyncConnection, written: str | None) -> None:
    cursor = await connection.execute(
        "SELECT pg_is_in_recovery() AND (%s::pg_lsn IS NULL OR pg_last_wal_replay_lsn() >= %s::pg_lsn)",
        (written, written),
    )
    row = await cursor.fetchone()
    if row is None or not row[0]:
        raise _Behind


def _log_position(text: str) -> tuple[int, int]:
    high, _, low = text.partition("/")
    return int(high, 16), int(low, 16)


def _ms(duration_s: float) -> int:
    return max(1, min(int(duration_s * 1000), 2**31 - 1))


def is_lost(error: psycopg.Error) -> bool:
    """Whether the connection is gone."""
    return isinstance(error, _LOST) or (
        isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    )


def translate(error: psycopg.Error, where: str, timeout_s: float) -> AgenticFlowError:
    """The driver's error as ours. Values of a statement never stand in the message."""
    if is_lost(error):
        return Unavailable(
            f"the connection to PostgreSQL broke: database {where}",
            hint="repeat the call, with the same idempotency key where it writes",
            retry_after_s=0.5,
        )
    said = error.diag.message_primary or type(error).__name__
    if isinstance(error, errors.QueryCanceled):
        return DeadlineExceeded(
            f"PostgreSQL needed more than {timeout_s!r} s",
            hint="narrow the call, or raise agentdb.query_timeout_s",
        )
    if isinstance(error, errors.LockNotAvailable):
        return Unavailable(
            "another call holds the rows for too long", hint="retry after a pause", retry_after_s=1.0
        )
    if isinstance(error, errors.InsufficientPrivilege):
        return Forbidden(
            f"PostgreSQL refuses it: {said}", hint=f"GRANT {APP_ROLE} TO the role of agentdb.database_url"
        )
    if isinstance(error, errors.UndefinedTable | errors.UndefinedFunction | errors.InvalidSchemaName):
        return Conflict(
            f"the PostgreSQL schema is not what this program knows: {said}",
            hint="run 'agentic-flow db migrate-schema'",
        )
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return Unavailable(
            f"PostgreSQL takes no writes: {said}",
            hint="agentdb.database_url must name the primary, not a replica",
        )
    if isinstance(error, errors.DataCorrupted | errors.IndexCorrupted):
        return DataCorrupted(
            f"PostgreSQL reports corruption: {said}", hint="restore the database from a backup"
        )
    if isinstance(error, errors.DiskFull):
        return StorageFull(
            f"PostgreSQL has no room: {said}",
            hint="nothing was written: make room where it keeps its data, then try again",
        )
    if isinstance(error, psycopg.OperationalError):  # out of memory, too many connections, …
        return Unavailable(
            f"PostgreSQL cannot do it now: {said}", hint="see the server's log", retry_after_s=1.0
        )
    return AgenticFlowError(
        f"PostgreSQL refused a statement: {said}", details={"sqlstate": error.sqlstate or ""}
    )


async def fetch(
    connection: AsyncConnection, statement: str, bindings: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """Run one statement and fetch all it returns."""
    cursor = await connection.execute(statement.encode(), bindings)
    return await cursor.fetchall()
