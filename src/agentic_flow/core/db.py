"""SQLite as the store of truth: one writer thread with group commit, many readers, explicit migrations.

Durability: WAL with `synchronous=FULL`; `write` returns after the commit that holds it is on disk. Callers
that arrive while a commit is under way share the next one, which is what makes single writes cheap.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import apsw

from agentic_flow.core.errors import Conflict, DataCorrupted, StorageFull, Unavailable

T = TypeVar("T")
C = TypeVar("C", bound=apsw.Connection)
Job = Callable[[apsw.Connection], Any]

_BATCH_MAX = 256
_QUEUE_MAX = 10_000
_PASSING_CACHE_KIB = 2048
_WAL_RETRY_S = 0.01


def rows(
    connection: apsw.Connection, sql: str, bindings: Sequence[Any] | dict[str, Any] = ()
) -> list[tuple[Any, ...]]:
    """Run one statement and fetch all it returns. (apsw's own stubs type rows as partly unknown.)"""
    return cast(Any, connection).execute(sql, bindings).fetchall()


def execute_many(connection: apsw.Connection, sql: str, bindings: Iterable[Sequence[Any]]) -> None:
    """Run one statement for each row of bindings."""
    cast(Any, connection).executemany(sql, bindings)


class _Writer(apsw.Connection):
    """The connection of the writer thread, and what its jobs left for the end of their transaction."""

    deferred: list[Callable[[apsw.Connection], None]]


def at_commit(connection: apsw.Connection, work: Callable[[apsw.Connection], None]) -> None:
    """Do `work` once, in order, just before the transaction of a group of jobs commits; elsewhere at once.

    For tables that make each savepoint dear: full-text tables write out what they hold at every one of them.
    The job whose work this is must not read what it does.
    """
    if isinstance(connection, _Writer):
        connection.deferred.append(work)
    else:
        work(connection)


@dataclass(frozen=True, slots=True)
class _Queued:
    """A job of the writer thread; `alone`: it runs outside of a transaction."""

    job: Job
    future: Future[Any]
    alone: bool


def _vacuum(connection: apsw.Connection) -> None:
    rows(connection, "PRAGMA temp_store=FILE")  # the copy may be larger than memory
    try:
        rows(connection, "VACUUM")
    finally:
        rows(connection, "PRAGMA temp_store=MEMORY")


class Database:
    """One SQLite file.

    Args:
        path: The file; its folder is created.
        migrations: SQL scripts; script i brings `user_version` from i to i + 1. Never edit one that shipped.
        readers: Number of reader threads, each with its own connection.
        busy_timeout_s: How long to wait for another process's write lock.
        mmap_max_bytes: How much of the file readers map into memory instead of copying pages from it.
        prepare: Called with each new connection, to register functions.

    Raises:
        Conflict: the file was written by a newer version of the product.
        DataCorrupted: it is not a healthy SQLite file.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        readers: int = 4,
        busy_timeout_s: float = 10.0,
        mmap_max_bytes: int = 0,
        prepare: Callable[[apsw.Connection], None] | None = None,
    ) -> None:
        self.path = path
        self._mmap_max_bytes = mmap_max_bytes
        self._prepare = prepare
        self._busy_timeout_s = busy_timeout_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"the folder {str(path.parent)!r} cannot be made: {error.strerror}",
                hint="choose another data folder, or correct its permissions",
            ) from error
        try:
            self._writer = self._connect(_Writer)
            self._writer.deferred = []
            try:
                self._switch_to_wal()
                self._migrate(migrations)
            except BaseException:
                self._writer.close()
                raise
        except apsw.Error as error:
            raise self._explained(error) from error
        self._jobs: queue.Queue[_Queued | None] = queue.Queue(_QUEUE_MAX)
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._write_loop, name=f"db-writer-{path.name}", daemon=True)
        self._thread.start()
        self._local = threading.local()
        self._read_connections: list[apsw.Connection] = []
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"db-reader-{path.name}")

    async def write(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in a transaction of the writer thread; returns once it is durable.

        A job that raises is rolled back alone; the others of its group commit.
        """
        return await asyncio.wrap_future(self.submit(job))

    def write_sync(self, job: Callable[[apsw.Connection], T]) -> T:
        """`write` for callers without an event loop."""
        return self.submit(job).result()

    def submit(self, job: Callable[[apsw.Connection], T]) -> Future[T]:
        """Queue a write; the future resolves after the commit."""
        return self._queue(job)

    def _queue(self, job: Callable[[apsw.Connection], T], *, alone: bool = False) -> Future[T]:
        future: Future[T] = Future()
        # Under the lock, so that no job can land behind the mark that ends the writer thread.
        with self._closing:
            if self._closed:
                raise Unavailable(f"{self.path.name!r} is closed")
            try:
                self._jobs.put_nowait(_Queued(job, future, alone))
            except queue.Full:
                raise Unavailable(
                    f"{self.path.name!r} has {_QUEUE_MAX} writes waiting",
                    hint="retry after a pause",
                    retry_after_s=1.0,
                ) from None
        return future

    async def vacuum(self) -> None:
        """Write the file anew from its rows. SQLite overwrites what is deleted, but not the copies that stay
        in the unused space of pages when it moves rows between them; after this there are none.

        Writes wait meanwhile, and the disk needs room for two more copies.

        Raises:
            Unavailable: there is no room, or another process writes all the time; nothing has changed.
        """
        await asyncio.wrap_future(self._queue(_vacuum, alone=True))

    async def read(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in a read transaction of a reader thread: one consistent snapshot."""
        return await asyncio.wrap_future(self._submit_read(job))

    def read_here(self, job: Callable[[apsw.Connection], T]) -> T:
        """`read` on the calling thread: for what ends sooner than another thread could be asked."""
        with self._closing:
            if self._closed:
                raise Unavailable(f"{self.path.name!r} is closed")
        return self._read(job)

    def read_sync(self, job: Callable[[apsw.Connection], T]) -> T:
        """`read` for callers without an event loop."""
        return self._submit_read(job).result()

    def read_apart(self, job: Callable[[apsw.Connection], T]) -> T:
        """`read` on the calling thread, for jobs that pass over much of the file once: it is not mapped, and
        hardly any of it is kept."""
        with self._closing:
            if self._closed:
                raise Unavailable(f"{self.path.name!r} is closed")
        try:
            connection = self._connect(apsw.Connection)
        except apsw.Error as error:
            raise self._explained(error) from error
        try:
            rows(connection, "PRAGMA query_only=ON")
            rows(connection, f"PRAGMA cache_size=-{_PASSING_CACHE_KIB}")
            return self._transacted(connection, job)
        finally:
            connection.close()

    def close(self) -> None:
        """Finish queued writes, then close. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._jobs.put(None)
        self._thread.join()
        self._readers.shutdown(wait=True)
        for connection in self._read_connections:
            connection.close()
        self._writer.close()

    def _connect(self, kind: type[C]) -> C:
        connection = kind(str(self.path))
        connection.set_busy_timeout(int(self._busy_timeout_s * 1000))
        for pragma in (
            "synchronous=FULL",
            "foreign_keys=ON",
            "temp_store=MEMORY",
            "cache_size=-16384",
        ):
            rows(connection, f"PRAGMA {pragma}")
        if self._prepare is not None:
            self._prepare(connection)
        return connection

    def _switch_to_wal(self) -> None:
        """The file remembers this mode. SQLite does not wait for a lock here whatever the busy timeout says,
        so processes that open a new file together would fail each other without the loop."""
        give_up_at_s = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                mode = rows(self._writer, "PRAGMA journal_mode=WAL")[0][0]
                break
            except (apsw.BusyError, apsw.LockedError):
                if time.monotonic() >= give_up_at_s:
                    raise
                time.sleep(_WAL_RETRY_S)
        if mode != "wal":
            raise Unavailable(
                f"{str(self.path)!r} cannot be opened in WAL mode (it stays in {mode!r})",
                hint="put the data folder on a local file system",
            )

    def _migrate(self, migrations: Sequence[str]) -> None:
        rows(self._writer, "BEGIN IMMEDIATE")
        try:
            version = int(rows(self._writer, "PRAGMA user_version")[0][0])
            if version > len(migrations):
                raise Conflict(
                    f"{str(self.path)!r} has schema version {version}, this program knows {len(migrations)}",
                    hint="use the version of agentic-flow that wrote it, or a newer one",
                )
            for script in migrations[version:]:
                rows(self._writer, script)
            rows(self._writer, f"PRAGMA user_version={len(migrations)}")
            rows(self._writer, "COMMIT")
        except BaseException:
            self._roll_back(self._writer)
            raise

    def _submit_read(self, job: Callable[[apsw.Connection], T]) -> Future[T]:
        with self._closing:
            if self._closed:
                raise Unavailable(f"{self.path.name!r} is closed")
            return self._readers.submit(self._read, job)

    def _read(self, job: Callable[[apsw.Connection], T]) -> T:
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect(apsw.Connection)
            rows(connection, "PRAGMA query_only=ON")
            rows(connection, f"PRAGMA mmap_size={self._mmap_max_bytes:d}")
            self._local.connection = connection
            self._read_connections.append(connection)
        return self._transacted(connection, job)

    def _transacted(self, connection: apsw.Connection, job: Callable[[apsw.Connection], T]) -> T:
        try:
            rows(connection, "BEGIN")
            result = job(connection)
            rows(connection, "COMMIT")
        except apsw.Error as error:
            if getattr(error, "extendedresult", 0) == apsw.SQLITE_READONLY:
                raise  # a job that tried to write
            raise self._explained(error) from error
        finally:
            self._roll_back(connection)
        return result

    @staticmethod
    def _roll_back(connection: apsw.Connection) -> None:
        """End the transaction, if SQLite has not done so itself, as it does when the disk fails it."""
        if connection.in_transaction:
            rows(connection, "ROLLBACK")

    def _write_loop(self) -> None:
        following: _Queued | None = None
        while (first := following or self._jobs.get()) is not None:
            following = None
            if first.alone:
                self._run_alone(first)
                continue
            group = [first]
            last = False
            while len(group) < _BATCH_MAX:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                last = following is None
                if following is None or following.alone:
                    break
                group.append(following)
                following = None
            self._commit_group(group)
            if last:
                return

    def _run_alone(self, queued: _Queued) -> None:
        """A job that is no part of a transaction."""
        if not queued.future.set_running_or_notify_cancel():
            return
        try:
            queued.future.set_result(queued.job(self._writer))
        except apsw.Error as error:
            queued.future.set_exception(self._explained(error))
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller; the next job must go on
            queued.future.set_exception(error)

    def _commit_group(self, group: list[_Queued]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        writer, deferred = self._writer, self._writer.deferred
        deferred.clear()
        try:
            rows(writer, "BEGIN IMMEDIATE")
            for queued in group:
                if queued.future.set_running_or_notify_cancel():
                    self._run_job(queued.job, queued.future, done)
            for work in deferred:
                work(writer)
            rows(writer, "COMMIT")
        except BaseException as error:  # noqa: BLE001 - it belongs to the callers; the next group must go on
            self._roll_back(writer)
            failure = (
                self._explained(error, "nothing was written: ") if isinstance(error, apsw.Error) else error
            )
            for queued in group:
                if not queued.future.done():
                    queued.future.set_exception(failure)
            return
        for future, result in done:
            future.set_result(result)

    def _run_job(self, job: Job, future: Future[Any], done: list[tuple[Future[Any], Any]]) -> None:
        """One job of a group in a savepoint of its own; its result waits in `done` for the commit."""
        writer, deferred = self._writer, self._writer.deferred
        before = len(deferred)
        rows(writer, "SAVEPOINT job")
        try:
            result = job(writer)
        except BaseException as error:
            if not writer.in_transaction:
                raise  # SQLite gave up the whole transaction: nobody's job is in it any more
            del deferred[before:]
            rows(writer, "ROLLBACK TO job")
            rows(writer, "RELEASE job")
            if isinstance(error, apsw.Error):
                future.set_exception(self._explained(error, "nothing was written: "))
            else:
                future.set_exception(error)
        else:
            rows(writer, "RELEASE job")
            done.append((future, result))

    def _explained(self, error: apsw.Error, effect: str = "") -> Exception:
        """What SQLite met, as an error of ours if the file, the disk or a lock is to blame.

        Args:
            effect: What became of the call, to begin the hint with.
        """
        name = repr(str(self.path))
        told: Exception
        if isinstance(error, apsw.CorruptError | apsw.NotADBError):
            told = DataCorrupted(
                f"{name} is not a healthy database: {error}", hint=f"{effect}restore it from a backup"
            )
        elif isinstance(error, apsw.FullError | apsw.IOError):
            kind = StorageFull if isinstance(error, apsw.FullError) else Unavailable
            told = kind(
                f"{name} cannot be used: {error}",
                hint=f"{effect}make room on the disk (or check it), then try again",
            )
        elif isinstance(error, apsw.BusyError | apsw.LockedError):
            told = Unavailable(
                f"{name} is locked by another process",
                hint=f"{effect}another process holds it; try again, or stop that one",
            )
        elif isinstance(error, apsw.CantOpenError | apsw.ReadOnlyError | apsw.PermissionsError):
            told = Unavailable(
                f"{name} cannot be opened for writing: {error}",
                hint=f"{effect}check the permissions of the file and its folder",
            )
        else:
            return error  # a fault of the program's own
        told.__cause__ = error
        return told
