"""One SQL database behind one URL: SQLite in WAL mode on one machine, PostgreSQL for many.

For stores whose statements both understand. A transaction holds SQLite's write lock from its first statement,
so that what it read is still true when it writes; on PostgreSQL lock rows with `FOR UPDATE` (`for_update`).
Calls block: run them in a thread. SQLAlchemy is imported with this module, so import it where it is used.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, Unavailable

_POOL_SIZE = 10
_BUSY_TIMEOUT_S = 30.0
_WAL_RETRY_S = 0.02


class SqlDatabase:
    """Connections to one database.

    Args:
        database_url: `postgresql://…`, or None for SQLite.
        file: The SQLite file.
        name: What it is called in errors (`run database`).
        setting: The setting that holds its URL, for errors.
        create: Idempotent statements that make the tables, for both kinds of database.
        pooled: Keep connections open until `close`; without it each is closed after use.
    """

    def __init__(
        self,
        database_url: str | None,
        file: Path,
        *,
        name: str,
        setting: str,
        create: Sequence[str],
        pooled: bool = True,
    ) -> None:
        self.file: Path | None = None if database_url else file
        self._database_url = database_url
        self._name = name
        self._setting = setting
        self._create = tuple(create)
        self._pool: dict[str, Any] = {"pool_size": _POOL_SIZE} if pooled else {"poolclass": sa.NullPool}
        self._engine: sa.Engine | None = None

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        if self._database_url is None:
            return f"sqlite:///{self.file}"
        scheme, _, rest = self._database_url.partition("://")
        return self._database_url if "+" in scheme else f"postgresql+psycopg://{rest}"

    @property
    def is_sqlite(self) -> bool:
        return self.file is not None

    @property
    def for_update(self) -> str:
        """What a SELECT ends with to lock its rows; SQLite's transactions hold the whole file anyway."""
        return "" if self.is_sqlite else " FOR UPDATE"

    @property
    def engine(self) -> sa.Engine:
        """The connection pool. On SQLite each connection is durable and waits for locks.

        Raises:
            Unavailable: the file cannot be opened.
            DataCorrupted: it is not a healthy SQLite file.
        """
        if self._engine is None:
            if self.file is None:
                self._engine = sa.create_engine(self.url, pool_pre_ping=True, **self._pool)
            else:
                _prepare_file(self.file)
                self._engine = sa.create_engine(self.url, **self._pool)
                event.listen(self._engine, "connect", _prepare_connection)
        return self._engine

    def create(self) -> None:
        """Make the tables. Idempotent, also when several processes do it together."""
        with self.transaction() as connection:
            if not self.is_sqlite:
                # PostgreSQL serialises the making of one database's tables by this number.
                lock = crc32(self._name.encode())
                connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({lock})"))
            for statement in self._create:
                connection.execute(sa.text(statement))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @contextmanager
    def transaction(self) -> Generator[sa.Connection]:
        """A transaction that holds SQLite's write lock from its first statement.

        Raises:
            Unavailable: the database cannot be used now.
            DataCorrupted: the file is damaged.
        """
        try:
            with self.engine.begin() as connection:
                if self.is_sqlite:
                    connection.execute(sa.text("BEGIN IMMEDIATE"))
                yield connection
        except SQLAlchemyError as error:
            raise self.translate(error) from error

    @contextmanager
    def reading(self) -> Generator[sa.Connection]:
        """A connection that takes no lock. Raises as `transaction` does."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise self.translate(error) from error

    def rows(self, statement: str, **bindings: Any) -> list[Sequence[Any]]:
        """Read; a collection among the bindings fills an `IN`."""
        with self.reading() as connection:
            return [tuple(row) for row in execute(connection, statement, **bindings)]

    def translate(self, error: SQLAlchemyError) -> AgenticFlowError:
        """What a database error means to a caller."""
        place = repr(str(self.file)) if self.file else f"at {self._setting}"
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        if "not a database" in cause or "malformed" in cause:
            return DataCorrupted(
                f"the {self._name} {place} is damaged: {cause}", hint="restore it from a backup"
            )
        return Unavailable(
            f"the {self._name} {place} cannot be used: {cause}", hint="start it, or check its address"
        )


def execute(connection: sa.Connection, statement: str, **bindings: Any) -> sa.CursorResult[Any]:
    """Run one statement; a tuple, list or set among the bindings fills an `IN`."""
    many = [key for key, value in bindings.items() if isinstance(value, list | tuple | set | frozenset)]
    for key in many:
        bindings[key] = list(bindings[key])
    expanding: list[sa.BindParameter[Any]] = [sa.bindparam(key, expanding=True) for key in many]
    return connection.execute(sa.text(statement).bindparams(*expanding), bindings)


def _prepare_connection(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = "IMMEDIATE"  # as DBOS sets it on engines of its own
    for pragma in (f"busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    if sqlite3.sqlite_version_info < (3, 42):
        # DBOS asks for unixepoch('subsec') on Python 3.12 and newer, which older SQLite answers with NULL.
        connection.create_function("unixepoch", 1, _unixepoch)


def _unixepoch(modifier: str) -> float:
    if modifier != "subsec":
        raise ValueError(f"unixepoch({modifier!r}) is not provided here")
    return time.time()


def _prepare_file(path: Path) -> None:
    """Switch the file to WAL, which it remembers, before DBOS sees it.

    SQLite does not wait for a lock here whatever the busy timeout says, so processes that open a new file
    together would fail each other without the loop.
    """
    give_up_at_s = time.monotonic() + _BUSY_TIMEOUT_S
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
            while True:
                try:
                    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                    break
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() >= give_up_at_s:
                        raise
                    time.sleep(_WAL_RETRY_S)
    except sqlite3.OperationalError as error:
        raise Unavailable(
            f"cannot open {str(path)!r} for writing: {error}", hint="check the folder's permissions"
        ) from error
    except sqlite3.DatabaseError as error:
        raise DataCorrupted(
            f"{str(path)!r} is not a healthy database: {error}", hint="restore it from a backup"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"the folder {str(path.parent)!r} cannot be made: {error.strerror}",
            hint="choose another data folder, or correct its permissions",
        ) from error
    if mode != "wal":
        raise Unavailable(
            f"{str(path)!r} cannot be opened in WAL mode (it stays in {mode!r})",
            hint="put the data folder on a local file system",
        )
