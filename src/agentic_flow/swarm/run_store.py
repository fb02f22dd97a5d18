"""The run database: who owns which workflow, and reading what the engine has stored.

DBOS keeps workflows and steps in its own tables; this module reads them with plain SQL, so that listing runs
needs no launch of DBOS and no import of it. The layout belongs to the pinned version of DBOS; the contract
suite of the engine runs before that pin moves. Two tables are ours:

    af_executors  one row per process, with its last heartbeat
    af_leases     one row per top-level workflow: its owner, and an epoch that grows when it changes hands

An owner is alive while its heartbeat is fresh and, on SQLite, while it holds the lock on its lock file: the
operating system drops that at once when the process dies, which makes `kill -9` visible without waiting.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import orjson

# ruff: noqa: S608 - what is interpolated into SQL here is the schema's prefix and integers; values are bound.
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunState, StepRecord, WorkflowRecord

if TYPE_CHECKING:
    import sqlalchemy as sa

_STATES: dict[str, RunState] = {
    "SUCCESS": "completed",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "cancelled",
}
ERROR_KEY = "$error"
"""Marks a stored value as an error, with its problem document."""

_INTERNAL_STEP_PREFIX = "DBOS."
_CREATE = (
    """CREATE TABLE IF NOT EXISTS af_executors (
        executor_id TEXT PRIMARY KEY, heartbeat_at_s DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS af_leases (
        workflow_id TEXT PRIMARY KEY, executor_id TEXT NOT NULL, epoch INTEGER NOT NULL,
        started INTEGER NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS af_leases_by_tenant ON af_leases (tenant, name)",
)


class RunStore:
    """The tables of one run database.

    Args:
        database_url: `postgresql://…`, or None for SQLite at `<data_dir>/runs/runs.db`.
        data_dir: Folder of local state.
        lease_s: Seconds after which a silent owner counts as dead.
    """

    def __init__(self, database_url: str | None, data_dir: Path, *, lease_s: float) -> None:
        self._lease_s = lease_s
        self._folder = data_dir / "runs"
        self.file: Path | None = None if database_url else self._folder / "runs.db"
        self._database_url = database_url
        self._engine: sa.Engine | None = None

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        if self._database_url is None:
            return f"sqlite:///{self.file}"
        return self._database_url.replace("postgresql://", "postgresql+psycopg://", 1)

    @property
    def exists(self) -> bool:
        """False while a local database has not been created: there are no runs then."""
        return self.file is None or self.file.exists()

    @property
    def engine(self) -> sa.Engine:
        """The connection pool, shared with DBOS. On SQLite each connection is durable and waits for locks."""
        if self._engine is None:
            self._engine = self._connect()
        return self._engine

    def create(self) -> None:
        """Make our tables. Idempotent."""
        import sqlalchemy as sa

        with self._transaction() as connection:
            for statement in _CREATE:
                connection.execute(sa.text(statement))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    # ---- ownership ---------------------------------------------------------------------------------------

    @contextmanager
    def presence(self, executor_id: str) -> Generator[None]:
        """Be seen as alive by other processes: the lock file, and the row that `beat` keeps fresh."""
        if self.file is None:
            yield
            return
        folder = self._folder / "executors"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{executor_id}.lock"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def beat(self, executor_id: str) -> None:
        """Renew this process's heartbeat."""
        self._execute(
            "INSERT INTO af_executors VALUES (:id, :now) "
            "ON CONFLICT (executor_id) DO UPDATE SET heartbeat_at_s = :now",
            id=executor_id,
            now=time.time(),
        )

    def leave(self, executor_id: str) -> None:
        """Say that this process has let go of everything, so that others need not wait."""
        self._execute("DELETE FROM af_executors WHERE executor_id = :id", id=executor_id)

    def is_alive(self, executor_id: str) -> bool:
        """Whether the process with this id still works."""
        row = self._one("SELECT heartbeat_at_s FROM af_executors WHERE executor_id = :id", id=executor_id)
        if row is None or row[0] < time.time() - self._lease_s:
            return False
        return self.file is None or self._holds_lock(executor_id)

    def take_new(self, workflow_id: str, executor_id: str, tenant: str, name: str) -> bool:
        """Own a workflow nobody has heard of. False when it is known."""
        return (
            self._execute(
                "INSERT INTO af_leases VALUES (:id, :executor, 1, 0, :tenant, :name) "
                "ON CONFLICT (workflow_id) DO NOTHING",
                id=workflow_id,
                executor=executor_id,
                tenant=tenant,
                name=name,
            )
            == 1
        )

    def take_over(self, workflow_id: str, executor_id: str, *, even_from_the_living: bool = False) -> bool:
        """Own a workflow whose owner is dead. Of several processes that try, exactly one gets it."""
        row = self._one("SELECT executor_id, epoch FROM af_leases WHERE workflow_id = :id", id=workflow_id)
        if row is None:
            return False
        if row[0] != executor_id and not even_from_the_living and self.is_alive(row[0]):
            return False
        return (
            self._execute(
                "UPDATE af_leases SET executor_id = :executor, epoch = epoch + 1, started = 0 "
                "WHERE workflow_id = :id AND epoch = :epoch",
                id=workflow_id,
                executor=executor_id,
                epoch=row[1],
            )
            == 1
        )

    def note_started(self, workflow_id: str) -> None:
        """The workflow has left the queue and works."""
        self._execute("UPDATE af_leases SET started = 1 WHERE workflow_id = :id", id=workflow_id)

    def owned_by(self, executor_id: str) -> set[str]:
        """Top-level workflows whose lease this process holds."""
        rows = self._all("SELECT workflow_id FROM af_leases WHERE executor_id = :id", id=executor_id)
        return {str(row[0]) for row in rows}

    def orphans(self) -> list[str]:
        """Unfinished top-level workflows whose owner is dead, oldest first."""
        rows = self._all(
            f"SELECT w.workflow_uuid, l.executor_id FROM {self._t('workflow_status')} w "
            "JOIN af_leases l ON l.workflow_id = w.workflow_uuid "
            "WHERE w.status IN ('PENDING', 'ENQUEUED', 'DELAYED') ORDER BY w.created_at, w.workflow_uuid"
        )
        alive = {owner: self.is_alive(owner) for owner in {str(row[1]) for row in rows}}
        return [str(row[0]) for row in rows if not alive[str(row[1])]]

    def unfinished_tree(self, workflow_id: str) -> list[str]:
        """The workflow and its children that have neither completed nor failed, children first."""
        rows = self._all(
            f"SELECT workflow_uuid FROM {self._t('workflow_status')} "
            "WHERE (workflow_uuid = :id OR parent_workflow_id = :id) AND status NOT IN ('SUCCESS', 'ERROR') "
            "ORDER BY parent_workflow_id IS NULL, workflow_uuid",
            id=workflow_id,
        )
        return [str(row[0]) for row in rows]

    def cancelled_among(self, workflow_ids: Sequence[str]) -> set[str]:
        """Which of these somebody has cancelled."""
        found: set[str] = set()
        for workflow_id in workflow_ids:
            row = self._one(
                f"SELECT status FROM {self._t('workflow_status')} WHERE workflow_uuid = :id", id=workflow_id
            )
            if row is not None and row[0] == "CANCELLED":
                found.add(workflow_id)
        return found

    # ---- reading -----------------------------------------------------------------------------------------

    def get(self, workflow_id: str) -> WorkflowRecord | None:
        """One workflow, or None."""
        found = self._records("w.workflow_uuid = :id", "w.workflow_uuid", 1, id=workflow_id)
        return found[0] if found else None

    def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState], limit: int
    ) -> list[WorkflowRecord]:
        """Workflows of a tenant, newest first. States are derived, so they are filtered after reading."""
        where = "l.tenant = :tenant AND l.name = :name"
        order = "w.created_at DESC, w.workflow_uuid DESC"
        if not states:
            return self._records(where, order, limit, tenant=tenant, name=name)
        found: list[WorkflowRecord] = []
        offset, page = 0, max(limit, 100)
        while len(found) < limit:
            records = self._records(where, order, page, offset, tenant=tenant, name=name)
            found += [record for record in records if record.state in states]
            if len(records) < page:
                break
            offset += page
        return found[:limit]

    def steps(self, workflow_id: str) -> list[StepRecord]:
        """Recorded steps of the workflow and its children, in order of completion."""
        rows = self._all(
            "SELECT o.workflow_uuid, o.function_id, o.function_name, o.output, o.error, "
            f"o.started_at_epoch_ms, o.completed_at_epoch_ms FROM {self._t('operation_outputs')} o "
            f"JOIN {self._t('workflow_status')} w ON w.workflow_uuid = o.workflow_uuid "
            "WHERE (w.workflow_uuid = :id OR w.parent_workflow_id = :id) AND o.child_workflow_id IS NULL "
            "ORDER BY o.completed_at_epoch_ms, o.workflow_uuid, o.function_id",
            id=workflow_id,
        )
        return [
            StepRecord(
                workflow_id=row[0],
                index=row[1],
                name=row[2],
                output=_decoded(row[3]),
                error=_decoded_error(row[4]),
                started_at_s=row[5] / 1000 if row[5] is not None else None,
                completed_at_s=row[6] / 1000 if row[6] is not None else None,
            )
            for row in rows
            if not str(row[2]).startswith(_INTERNAL_STEP_PREFIX)
        ]

    def _records(
        self, where: str, order: str, limit: int, offset: int = 0, **bindings: Any
    ) -> list[WorkflowRecord]:
        rows = self._all(
            "SELECT w.workflow_uuid, l.name, l.tenant, w.status, i.inputs, o.output, o.error, w.created_at, "
            f"w.updated_at, l.executor_id, l.started FROM {self._t('workflow_status')} w "
            "JOIN af_leases l ON l.workflow_id = w.workflow_uuid "
            f"LEFT JOIN {self._t('workflow_input')} i ON i.workflow_uuid = w.workflow_uuid "
            f"LEFT JOIN {self._t('workflow_output')} o ON o.workflow_uuid = w.workflow_uuid "
            f"WHERE {where} ORDER BY {order} LIMIT {int(limit)} OFFSET {int(offset)}",
            **bindings,
        )
        unfinished = {str(row[9]) for row in rows if row[3] not in _STATES}
        alive = {owner: self.is_alive(owner) for owner in unfinished}
        return [
            WorkflowRecord(
                workflow_id=row[0],
                name=row[1],
                tenant=row[2],
                state=_STATES.get(row[3]) or _unfinished_state(alive[row[9]], bool(row[10])),
                payload=_payload(row[4]),
                output=_decoded(row[5]),
                error=_decoded_error(row[6]),
                created_at_s=row[7] / 1000,
                updated_at_s=row[8] / 1000,
                owner=row[9],
            )
            for row in rows
        ]

    # ---- plumbing ----------------------------------------------------------------------------------------

    def _connect(self) -> sa.Engine:
        import sqlalchemy as sa
        from sqlalchemy import event

        if self.file is None:
            return sa.create_engine(self.url, pool_pre_ping=True, pool_size=10)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(self.url, pool_size=10)

        def prepare(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = "IMMEDIATE"  # as DBOS sets it on engines of its own
            for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").fetchall()

        event.listen(engine, "connect", prepare)
        return engine

    @contextmanager
    def _transaction(self) -> Generator[sa.Connection]:
        from sqlalchemy.exc import InterfaceError, OperationalError

        try:
            with self.engine.begin() as connection:
                yield connection
        except (OperationalError, InterfaceError) as error:
            place = str(self.file) if self.file else "at swarm.database_url"
            raise Unavailable(
                f"the run database {place!r} cannot be used: {error.orig}",
                hint="start it, or check its address",
            ) from error

    def _execute(self, statement: str, **bindings: Any) -> int:
        import sqlalchemy as sa

        with self._transaction() as connection:
            return connection.execute(sa.text(statement), bindings).rowcount

    def _all(self, statement: str, **bindings: Any) -> list[Sequence[Any]]:
        import sqlalchemy as sa

        with self._transaction() as connection:
            return cast("list[Sequence[Any]]", connection.execute(sa.text(statement), bindings).fetchall())

    def _one(self, statement: str, **bindings: Any) -> Sequence[Any] | None:
        rows = self._all(statement, **bindings)
        return rows[0] if rows else None

    def _t(self, table: str) -> str:
        return table if self.file is not None else f"dbos.{table}"

    def _holds_lock(self, executor_id: str) -> bool:
        path = self._folder / "executors" / f"{executor_id}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)


def _unfinished_state(alive: bool, started: bool) -> RunState:
    if not alive:
        return "interrupted"
    return "running" if started else "queued"


def _payload(text: str | None) -> JsonObject:
    """The workflow's payload from what DBOS stored as the arguments of our one entry point."""
    if text is None:
        return {}
    return cast(JsonObject, orjson.loads(text)["args"][1])


def _decoded(text: str | None) -> JsonObject | None:
    return None if text is None else cast(JsonObject, orjson.loads(text))


def _decoded_error(text: str | None) -> JsonObject | None:
    decoded = _decoded(text)
    return None if decoded is None else cast(JsonObject, decoded.get(ERROR_KEY, decoded))
