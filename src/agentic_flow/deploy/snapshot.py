"""Several SQLite databases as they are at one moment, without the help of those who write them.

For a few milliseconds this process holds the write lock of every file at once; meanwhile nothing can change
anywhere, and it opens a read transaction on each. Then writers go on, while the readers still see that moment
for as long as the copying takes. Writers wait for the lock as they do for each other's commits (10 s and
more), so none of them sees an error. What is copied is what a power cut at that moment would have left, in
all files.

It works across processes and containers of one machine, since SQLite's locks belong to the file. Nothing else
in this process may open these files meanwhile: POSIX drops a process's locks on a file when it closes any
descriptor of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import apsw

from agentic_flow.core.db import rows
from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, StorageFull, Unavailable

WAIT_S = 60.0
_ATTEMPT_S = 0.5
_POLL_S = 0.0005
_AGAIN_S = 0.05
_STEP_PAGES = 2048
_MAGIC = b"SQLite format 3\0"

Copied = Callable[[int, int], None]
"""Called with the pages that are copied and all that there are."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of several databases.

    Args:
        at_s: Unix time of the moment.
        pause_s: For how long writers were held.
        attempts: How often the locks were asked for.
    """

    at_s: float
    pause_s: float
    attempts: int
    _readers: dict[Path, apsw.Connection]

    def copy(self, file: Path, target: Path, *, clean: str = "", progress: Copied | None = None) -> None:
        """Write the database of that moment as one compact, checked file.

        Args:
            file: One of those that the snapshot is of.
            target: A new file; durable when this returns.
            clean: Statements for the copy alone, such as for leaving out what shall not be in it.
            progress: Told of pages.

        Raises:
            DataCorrupted: the database is damaged.
            Unavailable: the copy cannot be written, as on a full disk.
        """
        try:
            copy = apsw.Connection(str(target))
            try:
                # Nobody sees this file before it is whole: there is nothing to roll back to.
                rows(copy, "PRAGMA synchronous=OFF")
                _pages(self._readers[file], copy, progress)
                rows(copy, "PRAGMA journal_mode=OFF")
                rows(copy, "PRAGMA secure_delete=OFF")
                if clean:
                    rows(copy, clean)
                # Without what was deleted, which pages still hold.
                rows(copy, "VACUUM")
                wrong = rows(copy, "PRAGMA quick_check(1)")[0][0]
            finally:
                copy.close()
            if wrong != "ok":
                raise DataCorrupted(
                    f"{str(file)!r} is damaged: {wrong}", hint="keep it, and restore the newest whole backup"
                )
            sync(target)
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise DataCorrupted(
                f"{str(file)!r} is damaged: {error}", hint="keep it, and restore the newest whole backup"
            ) from error
        except (apsw.Error, OSError) as error:
            kind = StorageFull if isinstance(error, apsw.FullError) else Unavailable
            raise kind(
                f"{str(file)!r} cannot be copied to {str(target.parent)!r}: {error}",
                hint="make room there; nothing is left of the backup",
            ) from error

    def read(self, file: Path, sql: str) -> list[tuple[Any, ...]]:
        """What a query says of that moment."""
        return rows(self._readers[file], sql)


@contextlib.contextmanager
def one_moment(
    files: Sequence[Path], *, wait_s: float = WAIT_S, at_moment: Callable[[], None] | None = None
) -> Generator[Snapshot]:
    """Fix one moment of all these databases, which can be copied until the block ends.

    Args:
        files: SQLite databases on local disks of this machine.
        wait_s: Longest wait for others' transactions to end.
        at_moment: Called while nothing can change, to fix the moment of something else as well. Its time is
            part of the pause.

    Raises:
        Unavailable: somebody writes without end, or a file cannot be written (a lock is a write).
        DataCorrupted: a file is no healthy database.
    """
    with contextlib.ExitStack() as stack:
        lockers = {file: stack.enter_context(_opened(file)) for file in files}
        readers = {file: stack.enter_context(_opened(file)) for file in files}
        at_s, pause_s, attempts = _fix(lockers, readers, wait_s, at_moment)
        for locker in lockers.values():
            locker.close()
        yield Snapshot(at_s, pause_s, attempts, readers)


def _fix(
    lockers: dict[Path, apsw.Connection],
    readers: dict[Path, apsw.Connection],
    wait_s: float,
    at_moment: Callable[[], None] | None,
) -> tuple[float, float, int]:
    give_up_at_s = time.monotonic() + wait_s
    order = list(lockers)
    attempts = 0
    while True:
        attempts += 1
        began_s = time.monotonic()
        busy = _lock_all(lockers, order)
        try:
            at_s = _look(readers, at_moment) if busy is None else 0.0
        finally:
            for locker in lockers.values():
                if locker.in_transaction:
                    rows(locker, "ROLLBACK")
        if busy is None:
            return at_s, time.monotonic() - began_s, attempts
        if time.monotonic() >= give_up_at_s:
            raise Unavailable(
                f"{str(busy)!r} was being written for {wait_s:g} s without a pause",
                hint="somebody is at a long transaction, such as erasing a tenant: try again when it is done",
            )
        # Who keeps us waiting is asked first, so that nobody else is held up by it.
        order.remove(busy)
        order.insert(0, busy)
        time.sleep(_AGAIN_S)


def _look(readers: dict[Path, apsw.Connection], at_moment: Callable[[], None] | None) -> float:
    """Begin all read transactions; the time."""
    for reader in readers.values():
        rows(reader, "BEGIN")
        rows(reader, "SELECT count(*) FROM sqlite_master")  # it begins with its first read
    at_s = time.time()
    if at_moment is not None:
        at_moment()
    return at_s


def _lock_all(lockers: dict[Path, apsw.Connection], order: Sequence[Path]) -> Path | None:
    """Take every file's write lock; the file that could not be had, when that is so.

    A writer may hold one file and wait for another: whoever has to wait here lets go of all, and tries again.
    """
    give_up_at_s = time.monotonic() + _ATTEMPT_S
    for file in order:
        while True:
            try:
                rows(lockers[file], "BEGIN IMMEDIATE")
                break
            except apsw.BusyError:
                if time.monotonic() >= give_up_at_s:
                    return file
                time.sleep(_POLL_S)
            except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.IOError, apsw.FullError) as error:
                raise _unusable(file, error) from error
    return None


@contextlib.contextmanager
def _opened(file: Path) -> Generator[apsw.Connection]:
    """A connection that waits for nobody in a transaction, on a file in WAL mode."""
    try:
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.Error as error:
        raise _unusable(file, error) from error
    try:
        try:
            connection.set_busy_timeout(10_000)  # a process that has just died left its log to be read
            rows(connection, "SELECT count(*) FROM sqlite_master")
            mode = rows(connection, "PRAGMA journal_mode=WAL")[0][0]
            connection.set_busy_timeout(0)
        except apsw.Error as error:
            raise _unusable(file, error) from error
        if mode != "wal":
            raise Unavailable(
                f"{str(file)!r} stays in the mode {mode!r}", hint="put the data on a local file system"
            )
        yield connection
    finally:
        connection.close()


def _unusable(file: Path, error: apsw.Error) -> AgenticFlowError:
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return DataCorrupted(
            f"{str(file)!r} is no healthy database: {error}",
            hint="keep it, and restore the newest whole backup",
        )
    return Unavailable(
        f"{str(file)!r} cannot be locked: {error}",
        hint="run this as the user who owns the data, on a folder that can be written",
    )


def _pages(source: apsw.Connection, target: apsw.Connection, progress: Copied | None) -> None:
    with cast(Any, target).backup("main", source, "main") as work:
        while not work.done:
            work.step(_STEP_PAGES)
            if progress is not None:
                progress(work.page_count - work.remaining, work.page_count)


def is_database(path: Path) -> bool:
    """Whether a file begins as SQLite's do. Not while its locks are held."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def in_use(file: Path) -> bool:
    """Whether another process has the database open. Moves what its log holds into it, if nobody has.

    Raises:
        apsw.Error: it cannot be asked, as when it is damaged.
    """
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(0)
        # Leaving WAL mode takes that nobody else has the file open.
        rows(connection, "PRAGMA journal_mode=DELETE")
    except (apsw.BusyError, apsw.LockedError):
        return True
    finally:
        connection.close()
    return False


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
