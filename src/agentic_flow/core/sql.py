"""One SQL database behind one URL: SQLite in WAL mode on one machine, PostgreSQL for many.

For stores whose statements both understand. A transaction holds SQLite's write lock from its first statement,
so that what it read is still true when it writes; on PostgreSQL lock rows with `FOR UPDATE` (`for_update`).
Calls block: run them in a thread.

SQLite is asked through the standard library. SQLAlchemy, which takes half a second of CPU time and 15 MB to
import, comes with PostgreSQL.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import structlog

from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, StorageFull, Unavailable

if TYPE_CHECKING:
    import sqlalchemy as sa

log = structlog.get_logger()

_POOL_SIZE = 10
_CONNECTIONS_MAX = 20
_BUSY_TIMEOUT_S = 30.0
_SILENT_TRANSACTION_MS = 5000
"""PostgreSQL ends a transaction that is silent for so long: one whose process was cut off, or stands still,
would keep its rows locked for as long as TCP takes to notice, which is hours."""
_CONNECTION_OPTIONS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""Of libpq, in seconds, the last in milliseconds: a server out of reach is an error, not a silence."""
_WAL_RETRY_S = 0.02
_NAME = re.compile(r"(?<![:\w]):([a-z_][a-z0-9_]*)", re.IGNORECASE)
_MADE = re.compile(r"CREATE (?:UNIQUE )?(?:TABLE|INDEX) IF NOT EXISTS (\w+)")
_DISK_FULL = "53100"  # PostgreSQL's SQLSTATE
ROOM_PROBE = (
    "CREATE TEMP TABLE agentic_flow_room (filler text) ON COMMIT DROP",
    "INSERT INTO agentic_flow_room VALUES ('')",
)
"""What only a server with room on its disk does, in a transaction: nobody is told how much it has."""
_without_room: set[str] = set()
"""URLs of servers that had no room for a write of this process, by whichever of its objects, since."""
_NO_VALUES = "(SELECT 1 WHERE 1 != 1)"

Bindings = Mapping[str, Any]
Row = Sequence[Any]


class Result:
    """What one statement gave.

    Args:
        rows: Its rows; none for a statement that only changes.
        rowcount: How many rows it changed.
    """

    def __init__(self, rows: Sequence[Row], rowcount: int) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def first(self) -> Row | None:
        """The first row, if there is one."""
        return self._rows[0] if self._rows else None

    def scalar_one(self) -> Any:
        """The one value of the one row."""
        ((value,),) = self._rows
        return value


class Connection(Protocol):
    """A connection in use."""

    def execute(self, statement: str, bindings: Bindings | Sequence[Bindings] = ()) -> Result:
        """Run one statement with names like `:this`, or once for each of several bindings.

        A list among the values of single bindings fills an `IN`.
        """
        ...

    def exec_driver_sql(self, statement: str, rows: Sequence[Row] = ((),)) -> None:
        """Run one statement for each row, with the driver's own marks (`?`, on PostgreSQL `%s`)."""
        ...


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
        self._pooled = pooled
        self._engine: sa.Engine | None = None
        self._files: _FilePool | None = None
        self._opening = threading.Lock()

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the server's database."""
        assert self._database_url is not None
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
        """SQLAlchemy's connection pool, on PostgreSQL."""
        with self._opening:
            if self._engine is None:
                import sqlalchemy as sa
                from sqlalchemy import event

                pool: dict[str, Any] = (
                    {"pool_size": _POOL_SIZE} if self._pooled else {"poolclass": sa.NullPool}
                )
                asked = sa.make_url(self.url).query  # what the URL says goes first
                options = {key: value for key, value in _CONNECTION_OPTIONS.items() if key not in asked}
                self._engine = sa.create_engine(self.url, pool_pre_ping=True, connect_args=options, **pool)
                event.listen(self._engine, "connect", _end_silent_transactions)  # pyright: ignore[reportUnknownMemberType]
            return self._engine

    def _file_pool(self, file: Path) -> _FilePool:
        with self._opening:
            if self._files is None:
                _prepare_file(file)
                self._files = _FilePool(file, idle_max=_POOL_SIZE if self._pooled else 0, name=self._name)
            return self._files

    def create(self) -> None:
        """Make the tables. Idempotent, also when several processes do it together, and others are at work."""
        if self.is_sqlite:
            with self.transaction() as connection:
                for statement in self._create:
                    connection.execute(statement)
            return
        for statement in self._not_made():
            # One table's lock at a time: a transaction with those of several would deadlock with writers.
            with self.transaction() as connection:
                # PostgreSQL serialises the making of one database's tables by this number.
                connection.execute(f"SELECT pg_advisory_xact_lock({crc32(self._name.encode())})")
                connection.execute(statement)

    def _not_made(self) -> list[str]:
        """The statements whose tables and indexes are not there: on PostgreSQL, to ask for an index that is
        there waits for all who write to its table, and keeps them waiting.
        """
        made = [(statement, _MADE.match(statement)) for statement in self._create]
        names = {match[1] for _, match in made if match}
        with self.reading() as connection:
            there = {
                name
                for name in names
                if connection.execute("SELECT to_regclass(:name)", {"name": name}).scalar_one() is not None
            }
        return [statement for statement, match in made if match is None or match[1] not in there]

    def columns(self, connection: Connection, table: str) -> list[str]:
        """The names of a table's columns, in their order; a newer build may have added some."""
        if self.is_sqlite:
            found = connection.execute("SELECT name FROM pragma_table_info(:name)", {"name": table})
        else:
            found = connection.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:name) AND attnum > 0 "
                "AND NOT attisdropped ORDER BY attnum",
                {"name": table},
            )
        return [str(row[0]) for row in found]

    def close(self) -> None:
        with self._opening:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None
            if self._files is not None:
                self._files.close()
                self._files = None

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        """A transaction that holds SQLite's write lock from its first statement.

        Raises:
            Unavailable: the database cannot be used now.
            DataCorrupted: the file is damaged.
        """
        if self.file is None:
            with self._translated(), self._connected() as connection, connection.begin():
                yield _ServerConnection(connection)
            return
        with self._translated(), self._file_pool(self.file).connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield _FileConnection(connection)
                connection.commit()
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A connection that takes no lock. Raises as `transaction` does."""
        if self.file is None:
            with self._translated(), self._connected() as connection:
                yield _ServerConnection(connection)
            return
        with self._translated(), self._file_pool(self.file).connection() as connection:
            yield _FileConnection(connection)

    @contextmanager
    def _connected(self) -> Generator[sa.Connection]:
        engine = self.engine
        with engine.connect() as connection:
            try:
                yield connection
            finally:
                if engine is not self._engine and not (connection.closed or connection.invalidated):
                    connection.detach()  # `close` came meanwhile: back in its pool, nobody would close it

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self.translate(error) from error
        except Exception as error:
            if self.file is None and _is_of_sqlalchemy(error):
                raise self.translate(error) from error
            raise

    def rows(self, statement: str, **bindings: Any) -> list[Sequence[Any]]:
        """Read; a collection among the bindings fills an `IN`."""
        with self.reading() as connection:
            return [tuple(row) for row in execute(connection, statement, **bindings)]

    def check(self, statement: str = "SELECT 1") -> None:
        """Return when it can be read; and written, if a server had no room for a write of ours since.

        Args:
            statement: What to read.

        Raises:
            StorageFull: there still is none.
            Unavailable: the database cannot be used now.
            DataCorrupted: the file is damaged.
        """
        self.rows(statement)
        if self._database_url not in _without_room:
            return
        try:
            with self.transaction() as connection:
                for probe in ROOM_PROBE:
                    connection.execute(probe)
        except StorageFull:
            raise
        except Unavailable as error:  # no right to temporary tables, perhaps: the next write will tell
            log.warning("room_not_tried", error=error.message)
        _without_room.discard(self._database_url)

    def translate(self, error: Exception) -> AgenticFlowError:
        """What an error of SQLite or SQLAlchemy means to a caller."""
        place = repr(str(self.file)) if self.file else f"at {self._setting}"
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        if "not a database" in cause or "malformed" in cause:
            return DataCorrupted(
                f"the {self._name} {place} is damaged: {cause}", hint="restore it from a backup"
            )
        told = f"the {self._name} {place} cannot be used: {cause}"
        if _is_of_a_full_disk(error):
            if self._database_url:
                _without_room.add(self._database_url)
            return StorageFull(told, hint="nothing was written: make room on its disk, then try again")
        hint = "check the disk, and the file's permissions" if self.file else "start it, or check its address"
        return Unavailable(told, hint=hint)


def _is_of_a_full_disk(error: Exception) -> bool:
    """Whether SQLite or PostgreSQL had no room for a write."""
    driver = getattr(error, "orig", None) or error
    return (
        getattr(driver, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        or getattr(driver, "sqlstate", None) == _DISK_FULL
    )


def execute(connection: Connection, statement: str, **bindings: Any) -> Result:
    """Run one statement; a tuple, list or set among the bindings fills an `IN`."""
    return connection.execute(
        statement,
        {
            key: list(value) if isinstance(value, tuple | set | frozenset) else value  # pyright: ignore[reportUnknownArgumentType]
            for key, value in bindings.items()
        },
    )


def _end_silent_transactions(connection: Any, _: object) -> None:
    """See `_SILENT_TRANSACTION_MS`. Called with each new connection of the driver."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_SILENT_TRANSACTION_MS}")
    connection.commit()


class _ServerConnection:
    """Connection by SQLAlchemy."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, bindings: Bindings | Sequence[Bindings] = ()) -> Result:
        import sqlalchemy as sa

        text = sa.text(statement)
        if isinstance(bindings, Mapping):
            many = [key for key, value in bindings.items() if isinstance(value, list)]
            expanding: list[sa.BindParameter[Any]] = [sa.bindparam(key, expanding=True) for key in many]
            text = text.bindparams(*expanding)
        found = self._connection.execute(text, bindings or None)
        return Result(
            [tuple(row) for row in found] if found.returns_rows else (),
            found.rowcount,
        )

    def exec_driver_sql(self, statement: str, rows: Sequence[Row] = ((),)) -> None:
        self._connection.exec_driver_sql(statement, [tuple(row) for row in rows])


class _FileConnection:
    """Connection to SQLite."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, bindings: Bindings | Sequence[Bindings] = ()) -> Result:
        if not isinstance(bindings, Mapping):
            if not bindings:
                return self._result(self._connection.execute(statement))
            return self._result(self._connection.executemany(statement, bindings))
        for key in [key for key, value in bindings.items() if isinstance(value, list)]:
            statement, bindings = _expanded(statement, bindings, key)
        return self._result(self._connection.execute(statement, dict(bindings)))

    def exec_driver_sql(self, statement: str, rows: Sequence[Row] = ((),)) -> None:
        self._connection.executemany(statement, rows).close()

    def _result(self, cursor: sqlite3.Cursor) -> Result:
        with closing(cursor):
            # Read to the end at once: a statement half read holds the log back from being taken in.
            rows = cursor.fetchall() if cursor.description is not None else []
            return Result(rows, cursor.rowcount)


def _expanded(statement: str, bindings: Bindings, key: str) -> tuple[str, Bindings]:
    """The statement with one name for each value of a list."""
    values = bindings[key]
    rest = {name: value for name, value in bindings.items() if name != key}
    rest |= {f"{key}_{index}": value for index, value in enumerate(values)}
    marks = ", ".join(f":{key}_{index}" for index in range(len(values)))
    filled = f"({marks})" if values else _NO_VALUES
    return _NAME.sub(lambda found: filled if found[1] == key else found[0], statement), rest


class _FilePool:
    """Connections to one SQLite file, kept open between uses.

    Args:
        file: The file, prepared.
        idle_max: As many are kept.
        name: What the database is called in errors.
    """

    def __init__(self, file: Path, *, idle_max: int, name: str) -> None:
        self._file = file
        self._idle_max = idle_max
        self._name = name
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_CONNECTIONS_MAX)
        self._closed = False

    @contextmanager
    def connection(self) -> Generator[sqlite3.Connection]:
        """One for the caller alone.

        Raises:
            Unavailable: all are in use, and stay so.
            sqlite3.Error: the file cannot be opened.
        """
        if not self._places.acquire(timeout=_BUSY_TIMEOUT_S):
            raise Unavailable(
                f"the {self._name} {str(self._file)!r} has {_CONNECTIONS_MAX} connections, all in use",
                hint="try again later",
            )
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._opened()
            try:
                yield connection
            finally:
                self._give_back(connection)
        finally:
            self._places.release()

    def close(self) -> None:
        """Close those that are idle; one in use is closed after its use."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._file, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            _set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            # One whose end of a transaction failed is of no use to anybody else.
            if not (self._closed or connection.in_transaction) and len(self._idle) < self._idle_max:
                self._idle.append(connection)
                return
        connection.close()


def _is_of_sqlalchemy(error: Exception) -> bool:
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, SQLAlchemyError)


def _set_up(connection: sqlite3.Connection) -> None:
    """Durable, and patient with locks."""
    for pragma in (f"busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").fetchall()


def _prepare_file(path: Path) -> None:
    """Switch the file to WAL, which it remembers.

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
