"""The history of all changes: what each call changed is stored with it, then sealed into files.

A change is written to `changes` in the transaction that makes it, so it is there exactly if the call is. A
thread of the process that writes seals what waits there into segments (see `sealing`). When that cannot be
done (full disk, folder gone) writes go on and their changes wait, up to a limit.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import apsw
import structlog

from agentic_flow.agentdb.erasure import Mark
from agentic_flow.agentdb.patches import Capture, encode_dropped
from agentic_flow.agentdb.sealing import SEGMENT_MAX_BYTES, Sealer, pack_waiting, waiting_bytes
from agentic_flow.agentdb.segment_files import failure
from agentic_flow.agentdb.segments import Kind
from agentic_flow.core.db import Database, rows
from agentic_flow.core.errors import AgenticFlowError, TooLarge, Unavailable

_log = structlog.get_logger(__name__)

PATCH_MAX_BYTES = 512 * 1024 * 1024
"""What one call may change; SQLite holds no value past a billion bytes."""
WAITING_MAX_BYTES = 1024 * 1024 * 1024
_CLOSE_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class HistoryStatus:
    """How the history of a database is doing.

    Args:
        folder: Where its segments are.
        sealed_sequence: Last operation in them, as far as this process knows.
        waiting_bytes: What waits in the database to be sealed.
        error: Why sealing does not work now; None when it does.
    """

    folder: Path
    sealed_sequence: int
    waiting_bytes: int
    error: str | None


class History:
    """Records and seals the changes of one database.

    Args:
        history_dir: The segments go to a folder in it that has the database's id for a name.
        database: The AgentDB file.
        seal_s: Longest time that a change waits, if all is well.
        waiting_max_bytes: Changes that may wait in the database; past it new writes are refused.
        segment_max_bytes: Size from which a new segment is begun.

    Raises:
        Unavailable: the folder cannot be made.
    """

    def __init__(
        self,
        history_dir: Path,
        database: Database,
        *,
        seal_s: float = 10.0,
        waiting_max_bytes: int = WAITING_MAX_BYTES,
        segment_max_bytes: int = SEGMENT_MAX_BYTES,
    ) -> None:
        self.database_id = database.read_sync(read_database_id)
        self._database = database
        self._folder = history_dir / self.database_id
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"the folder {str(self._folder)!r} cannot be made: {error.strerror}",
                hint="correct agentdb.history_dir or its permissions",
            ) from error
        self._sealer = Sealer(
            self._folder,
            self.database_id,
            database.read_sync,
            database.write_sync,
            segment_max_bytes=segment_max_bytes,
        )
        self._seal_s = seal_s
        self._waiting_max_bytes = waiting_max_bytes
        self._segment_max_bytes = segment_max_bytes
        self._waiting_bytes = database.read_sync(waiting_bytes)
        self._sealed_sequence = 0
        self._error: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to seal in the background."""
        self._thread = threading.Thread(target=self._run, name="agentdb-history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Seal what waits, if that is possible, and stop; before the database is closed. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._attempt(wait_s=_CLOSE_WAIT_S)

    def status(self) -> HistoryStatus:
        """How sealing is doing."""
        return HistoryStatus(self._folder, self._sealed_sequence, self._waiting_bytes, self._error)

    def seal(self, *, wait_s: float = _CLOSE_WAIT_S) -> int:
        """Seal everything that is committed now. Returns the last sealed sequence.

        Raises:
            Unavailable: it cannot be written now; the changes wait in the database.
            DataCorrupted: the folder's last segment is damaged, or not of this database.
        """
        try:
            self._seal(wait_s)
        except OSError as error:
            raise Unavailable(
                f"the history in {str(self._folder)!r} cannot be written: {error.strerror or error}",
                hint="make room or bring the folder back; changes wait in the database meanwhile",
            ) from error
        return self._sealed_sequence

    @contextmanager
    def recording(
        self,
        connection: apsw.Connection,
        tenant: str,
        now_s: float,
        *,
        drops: str | None = None,
        erases: bool = False,
    ) -> Generator[None]:
        """Store what the block changes as one call of the history; for the writer's transaction.

        A block that raises leaves nothing: its rows are rolled back with it.

        Args:
            connection: The writer's.
            tenant: Whose call it is.
            now_s: Unix seconds of the call.
            drops: The block removes this namespace of the tenant and does nothing else. Its rows are then not
                collected one by one.
            erases: The block removes all namespaces of the tenant and does nothing else. What its earlier
                calls wrote goes from the history: at once from what waits, with the next sealing from the
                segments, so call `seal` before telling that it is done.

        Raises:
            Unavailable: too much waits to be sealed.
            TooLarge: the call changes more than fits into one record.
        """
        before = _newest_operation(connection)
        if erases or drops is not None:
            dropped = _namespace_ids(connection, tenant, None if erases else drops)
            yield
            patch = encode_dropped(dropped)
        else:
            with Capture(connection) as capture:
                yield
            patch = capture.encode()
        after = _newest_operation(connection)
        if patch is None and after == before and not erases:
            return
        if after == before:
            # Every change has a sequence of its own, also one that no index needs to hear of.
            after = _add_operation(connection, now_s)
        if erases:
            _erase_waiting(connection, tenant)
            waiting = pack_waiting(Kind.ERASURE, before + 1, Mark.of(tenant).payload())
        else:
            self._demand_room(patch or b"")
            waiting = pack_waiting(Kind.PATCH, before + 1, patch or b"")
        rows(
            connection,
            "INSERT INTO changes (sequence, tenant, at_s, patch) VALUES (?, ?, ?, ?)",
            (after, "" if erases else tenant, now_s, waiting),
        )
        # Counted before it is committed: should it not be, the next sealing counts anew.
        self._waiting_bytes += len(waiting)
        if self._waiting_bytes >= self._segment_max_bytes:
            self._wake.set()

    def _demand_room(self, patch: bytes) -> None:
        if self._waiting_bytes > self._waiting_max_bytes:
            # Callers from elsewhere read this: where the folder is and what ails it, status and log tell.
            raise Unavailable(
                f"{self._waiting_bytes!r} bytes of changes wait to be sealed into the history: "
                f"{'sealing is slower than writing' if self._error is None else 'it cannot be written'}",
                hint="nothing was written; the operator sees in the server's log what keeps the history back",
                retry_after_s=self._seal_s,
            )
        if len(patch) > PATCH_MAX_BYTES:
            raise TooLarge(
                f"the call changes {len(patch)!r} bytes",
                hint=f"with a history at most {PATCH_MAX_BYTES} a call; send less at once",
            )

    def _run(self) -> None:
        while True:
            # A full segment is sealed at once; but while sealing fails, the interval is a pause.
            (self._wake if self._error is None else self._stop).wait(self._seal_s)
            self._wake.clear()
            if self._stop.is_set():
                return
            self._attempt(wait_s=0.0)

    def _attempt(self, *, wait_s: float) -> None:
        """Seal; what goes wrong is told once, and again when it is right."""
        try:
            self._seal(wait_s)
        except BlockingIOError:
            # Another process is at it, and takes our changes along.
            return
        except (AgenticFlowError, OSError, apsw.Error) as error:
            reason = failure(error, self._folder)
            if self._error is None:
                _log.error("history_seal_failed", folder=str(self._folder), error=reason)
            self._error = reason
        else:
            if self._error is not None:
                _log.info("history_seal_recovered", folder=str(self._folder))
            self._error = None

    def _seal(self, wait_s: float) -> None:
        try:
            self._sealed_sequence = self._sealer.seal(wait_s=wait_s)
        finally:
            self._waiting_bytes = self._database.read_sync(waiting_bytes)


def read_database_id(connection: apsw.Connection) -> str:
    """The id that was given to this database when it was made or restored."""
    return rows(connection, "SELECT value FROM about WHERE name = 'database_id'")[0][0]


def _newest_operation(connection: apsw.Connection) -> int:
    found = rows(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'operations'")
    return found[0][0] if found else 0


def _namespace_ids(connection: apsw.Connection, tenant: str, name: str | None) -> list[int]:
    found = rows(
        connection,
        "SELECT id FROM namespaces WHERE tenant = ? AND (? IS NULL OR name = ?)",
        (tenant, name, name),
    )
    return [namespace_id for (namespace_id,) in found]


def _add_operation(connection: apsw.Connection, now_s: float) -> int:
    rows(
        connection,
        "INSERT INTO operations (namespace_id, kind, keys, at_s) VALUES (0, 'tidy', x'', ?)",
        (now_s,),
    )
    return connection.last_insert_rowid()


def _erase_waiting(connection: apsw.Connection, tenant: str) -> None:
    """Take the tenant's content out of the changes that wait."""
    found = rows(connection, "SELECT sequence, substr(patch, 1, 9) FROM changes WHERE tenant = ?", (tenant,))
    secure: int = rows(connection, "PRAGMA secure_delete")[0][0]
    rows(connection, "PRAGMA secure_delete=ON")
    try:
        for sequence, head in found:
            first = int.from_bytes(head[1:], "little")
            rows(
                connection,
                "UPDATE changes SET tenant = '', patch = ? WHERE sequence = ?",
                (pack_waiting(Kind.ERASED, first, b""), sequence),
            )
    finally:
        rows(connection, f"PRAGMA secure_delete={('OFF', 'ON', 'FAST')[secure]}")
