"""The run database: who owns which workflow, and what the store says about it.

DBOS keeps workflows and steps in its own tables. This module reads them with plain SQL, so that listing runs
needs neither a launch nor an import of DBOS, and it hands a workflow over (claim, cancel) in the same
transaction that changes its lease. The layout belongs to the pinned version of DBOS; the contract and crash
suites of the engine run before that pin moves. Two tables are ours:

    af_executors  one row per process, with its last heartbeat
    af_leases     one row per top-level workflow: its owner, and an epoch that grows when it changes hands

An owner is alive while its heartbeat is fresh and, on SQLite, while it holds the lock on its lock file: the
operating system drops that at once when the process dies, which makes `kill -9` visible without waiting.
Heartbeats are stamped and compared by one clock: that of the machine for SQLite, of the server for Postgres.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    Conflict,
    DataCorrupted,
    LimitExceeded,
    Unavailable,
    as_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunState, StepRecord, WorkflowRecord
from agentic_flow.core.sql import Connection, Result, SqlDatabase
from agentic_flow.core.sql import execute as execute

# ruff: noqa: S608 - what is interpolated into SQL here is the schema's prefix and constants; values are bound.

APPLICATION_VERSION = "runs-1"
"""Stored with every workflow. It changes when stored runs can no longer be replayed by this code, not with
every build (as DBOS's own hash of the code would): otherwise an upgrade would strand every run under way."""

ERROR_KEY = "$error"
"""The only key of a stored value that is an error; its value is the problem document."""
VALUE_KEY = "$value"
"""The only key of a stored value that would otherwise be taken for an error."""

TAKEOVERS_MAX = 100
"""A workflow that took so many processes down with it is left alone until somebody resumes it."""

_FINAL: dict[str, RunState] = {"SUCCESS": "completed", "ERROR": "failed", "CANCELLED": "cancelled"}
_WAITING = ("PENDING", "ENQUEUED", "DELAYED")
_GIVEN_UP = "MAX_RECOVERY_ATTEMPTS_EXCEEDED"
_STATUSES: dict[RunState, tuple[str, ...]] = {
    "completed": ("SUCCESS",),
    "failed": ("ERROR", "SUCCESS"),  # a completed one whose result cannot be read counts as failed
    "cancelled": ("CANCELLED",),
    "queued": _WAITING,
    "running": _WAITING,
    "interrupted": (*_WAITING, _GIVEN_UP),
}
_NOBODY = ""
_LIBRARY_STEPS = "DBOS."
_CREATE = (
    """CREATE TABLE IF NOT EXISTS af_executors (
        executor_id TEXT PRIMARY KEY, heartbeat_at_s DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS af_leases (
        workflow_id TEXT PRIMARY KEY, executor_id TEXT NOT NULL, epoch INTEGER NOT NULL,
        started INTEGER NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
        accepted_at_s DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS af_leases_by_tenant ON af_leases (tenant, name, accepted_at_s)",
    "CREATE INDEX IF NOT EXISTS af_leases_by_executor ON af_leases (executor_id)",
)


class RunDatabase(SqlDatabase):
    """Connections to one run database, shared by DBOS, the leases and the reader.

    Args:
        database_url: `postgresql://…`, or None for SQLite at `<data_dir>/runs/runs.db`.
        data_dir: Folder of local state.
        pooled: Keep connections open until `close`; without it each is closed after use.
    """

    def __init__(self, database_url: str | None, data_dir: Path, *, pooled: bool = True) -> None:
        self.folder = data_dir / "runs"
        super().__init__(
            database_url,
            self.folder / "runs.db",
            name="run database",
            setting="swarm.database_url",
            create=_CREATE,
            pooled=pooled,
        )

    def has_runs(self) -> bool:
        """False as long as nobody has made the tables: there are no runs then."""
        if self.file is not None and not self.file.exists():
            return False
        with self.reading() as connection:
            if self.is_sqlite:
                names = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('af_leases', 'workflow_output')"
                return connection.execute(names).scalar_one() == 2
            found = "SELECT to_regclass('af_leases'), to_regclass('dbos.workflow_output')"
            return None not in (connection.execute(found).first() or (None,))

    def table(self, name: str) -> str:
        """A table of DBOS."""
        return name if self.is_sqlite else f"dbos.{name}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A workflow that was handed to this process: what to execute again, children before their parents."""

    workflow_id: str
    epoch: int
    unfinished: tuple[str, ...]


class Leases:
    """Ownership of the workflows of one run database.

    Args:
        database: Where they are.
        lease_s: Seconds after which a silent owner counts as dead.
        clock: Stamps heartbeats on SQLite.
    """

    def __init__(self, database: RunDatabase, *, lease_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._database = database
        self._lease_s = lease_s
        self._clock = clock
        self._runs_seen = False

    # ---- processes ---------------------------------------------------------------------------------------

    @contextmanager
    def presence(self, executor_id: str) -> Generator[None]:
        """Hold this process's lock file, on SQLite, for as long as the process lives or the context lasts."""
        if not self._database.is_sqlite:
            yield
            return
        path = self._lock_path(executor_id)
        try:
            descriptor = _lock(path)
        except OSError as error:
            raise Unavailable(
                f"cannot write in {str(path.parent)!r}: {error.strerror}",
                hint="choose another data folder, or correct its permissions",
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def beat(self, executor_id: str) -> None:
        """Renew this process's heartbeat."""
        with self._database.transaction() as connection:
            execute(
                connection,
                "INSERT INTO af_executors (executor_id, heartbeat_at_s) VALUES (:id, :now) "
                "ON CONFLICT (executor_id) DO UPDATE SET heartbeat_at_s = excluded.heartbeat_at_s",
                id=executor_id,
                now=self._now_s(connection),
            )

    def leave(self, executor_id: str) -> None:
        """Say that this process has let go of everything, so that others need not wait."""
        with self._database.transaction() as connection:
            execute(connection, "DELETE FROM af_executors WHERE executor_id = :id", id=executor_id)

    def forget_the_dead(self) -> None:
        """Remove rows and lock files of processes long gone; without them they count as dead all the same."""
        with self._database.transaction() as connection:
            before_s = self._now_s(connection) - 10 * self._lease_s
            execute(connection, "DELETE FROM af_executors WHERE heartbeat_at_s < :before", before=before_s)
        if self._database.is_sqlite:
            for path in self._lock_path("x").parent.glob("*.lock"):
                if not _is_locked(path):
                    path.unlink(missing_ok=True)

    def alive(self, connection: Connection, executors: Collection[str]) -> set[str]:
        """Which of these processes still work."""
        if not executors:
            return set()
        found = execute(
            connection,
            "SELECT executor_id FROM af_executors WHERE executor_id IN :ids AND heartbeat_at_s >= :since",
            ids=executors,
            since=self._now_s(connection) - self._lease_s,
        )
        fresh = {str(row[0]) for row in found}
        if not self._database.is_sqlite:
            return fresh
        return {executor for executor in fresh if _is_locked(self._lock_path(executor))}

    # ---- workflows ---------------------------------------------------------------------------------------

    def take_new(self, workflow_id: str, executor_id: str, tenant: str, name: str) -> bool | None:
        """Own a workflow that has not been stored yet.

        Returns True when it is ours to store, False when it is stored already, None when another living
        process has taken the id and is about to store it.
        """
        status = self._database.table("workflow_status")
        with self._database.transaction() as connection:
            taken = execute(
                connection,
                "INSERT INTO af_leases VALUES (:id, :me, 1, 0, :tenant, :name, :now) ON CONFLICT DO NOTHING",
                id=workflow_id,
                me=executor_id,
                tenant=tenant,
                name=name,
                now=self._now_s(connection),
            )
            if taken.rowcount == 1:
                return True
            lease = self._lease(connection, workflow_id)
            stored = execute(
                connection, f"SELECT 1 FROM {status} WHERE workflow_uuid = :id", id=workflow_id
            ).first()
            if stored is not None or lease is None:
                return False
            if lease[0] != executor_id and self.alive(connection, [lease[0]]):
                return None
            # The process that took the id died before it stored anything.
            execute(
                connection,
                "UPDATE af_leases SET executor_id = :me, epoch = 1, started = 0, tenant = :tenant, "
                "name = :name WHERE workflow_id = :id",
                id=workflow_id,
                me=executor_id,
                tenant=tenant,
                name=name,
            )
            return True

    def has_orphans(self) -> bool:
        """Whether any unfinished top-level workflow has a dead owner."""
        return bool(self.orphans(None))

    def orphans(self, names: Collection[str] | None) -> list[str]:
        """Unfinished top-level workflows with one of these names whose owner is dead, oldest first.

        Args:
            names: Names of workflows; None: all.
        """
        if (names is not None and not names) or not self._has_runs():
            return []
        named: dict[str, Any] = {} if names is None else {"names": names}
        with self._database.reading() as connection:
            found = execute(
                connection,
                "SELECT w.workflow_uuid, l.executor_id "
                f"FROM {self._database.table('workflow_status')} w "
                "JOIN af_leases l ON l.workflow_id = w.workflow_uuid "
                f"WHERE w.status IN :waiting {'AND l.name IN :names' if named else ''} "
                "AND w.application_version = :version "
                "ORDER BY l.accepted_at_s, w.workflow_uuid",
                waiting=_WAITING,
                **named,
                version=APPLICATION_VERSION,
            )
            rows: list[Sequence[Any]] = [tuple(row) for row in found]
            alive = self.alive(connection, {str(row[1]) for row in rows})
        return [str(row[0]) for row in rows if row[1] not in alive]

    def claim(self, workflow_id: str, executor_id: str, owner_token: str, *, asked: bool) -> Claim | None:
        """Become the owner of an interrupted workflow or, when somebody `asked` for it, of a cancelled one.

        One transaction raises the epoch of the lease and gives the unfinished workflows of the tree to this
        process under `owner_token`, by which DBOS refuses every later write of the owner before. Of several
        processes that try, exactly one gets it; a workflow whose owner lives is left alone.

        Raises:
            Conflict: it was stored by a version of the product whose workflows this one cannot continue.
        """
        status = self._database.table("workflow_status")
        with self._database.transaction() as connection:
            lease = self._lease(connection, workflow_id)
            row = _first(
                execute(
                    connection,
                    f"SELECT status, application_version FROM {status} WHERE workflow_uuid = :id",
                    id=workflow_id,
                )
            )
            if lease is None or row is None:
                return None
            may = _WAITING if not asked else (*_WAITING, _GIVEN_UP, "CANCELLED")
            if row[0] not in may or (row[0] in _WAITING and self.alive(connection, [lease[0]])):
                return None
            if row[1] != APPLICATION_VERSION:
                raise Conflict(
                    f"workflow {workflow_id!r} was stored by version {row[1]!r} of the run engine, this one "
                    f"continues {APPLICATION_VERSION!r}",
                    hint="resume it with the version of agentic-flow that started it",
                )
            # What was cancelled by itself inside a living tree stays cancelled when the tree changes hands.
            revived = (*_WAITING, _GIVEN_UP, row[0])
            tree = execute(
                connection,
                f"{self._tree()} SELECT w.workflow_uuid FROM {status} w "
                "JOIN tree ON tree.id = w.workflow_uuid WHERE w.status IN :revived "
                "ORDER BY tree.depth DESC, w.created_at, w.workflow_uuid",
                id=workflow_id,
                revived=revived,
            )
            unfinished = tuple(str(found[0]) for found in tree)
            execute(
                connection,
                "UPDATE af_leases SET executor_id = :me, epoch = epoch + 1, started = 0 "
                "WHERE workflow_id = :id",
                id=workflow_id,
                me=executor_id,
            )
            self._hand_over(connection, unfinished, executor_id, owner_token, start_anew=asked)
            return Claim(workflow_id, int(lease[1]) + 1, unfinished)

    def note_started(self, workflow_id: str, executor_id: str, epoch: int) -> bool:
        """The workflow has left the queue and works. False when it belongs to somebody else by now."""
        with self._database.transaction() as connection:
            changed = execute(
                connection,
                "UPDATE af_leases SET started = 1 "
                "WHERE workflow_id = :id AND executor_id = :me AND epoch = :epoch",
                id=workflow_id,
                me=executor_id,
                epoch=epoch,
            )
            return changed.rowcount == 1

    def release(self, workflow_id: str, executor_id: str) -> None:
        """Nobody executes this workflow any more: it can be resumed anywhere."""
        with self._database.transaction() as connection:
            execute(
                connection,
                "UPDATE af_leases SET executor_id = :nobody WHERE workflow_id = :id AND executor_id = :me",
                id=workflow_id,
                me=executor_id,
                nobody=_NOBODY,
            )

    def owned(self, executor_id: str) -> set[str]:
        """Unfinished top-level workflows whose lease this process holds."""
        rows = self._database.rows(
            "SELECT l.workflow_id FROM af_leases l "
            f"JOIN {self._database.table('workflow_status')} w ON w.workflow_uuid = l.workflow_id "
            "WHERE l.executor_id = :me AND w.status IN :waiting",
            me=executor_id,
            waiting=_WAITING,
        )
        return {str(row[0]) for row in rows}

    def statuses(self, workflow_ids: Collection[str]) -> dict[str, str]:
        """What DBOS says of each of these."""
        if not workflow_ids:
            return {}
        rows = self._database.rows(
            f"SELECT workflow_uuid, status FROM {self._database.table('workflow_status')} "
            "WHERE workflow_uuid IN :ids",
            ids=workflow_ids,
        )
        return {str(row[0]): str(row[1]) for row in rows}

    def cancel(self, workflow_id: str, *, only_as: tuple[str, int] | None = None) -> bool:
        """Cancel what is unfinished in the tree under this workflow, itself included, in one transaction.

        Args:
            workflow_id: A workflow or a child.
            only_as: Owner and epoch its tree must still have; a process that lost it may not cancel it.

        Returns:
            False when the workflow had already ended (or is not known).
        """
        if not self._has_runs():
            return False
        status = self._database.table("workflow_status")
        with self._database.transaction() as connection:
            lease = self._lease(connection, root_of(workflow_id))
            if only_as is not None and (lease is None or (str(lease[0]), int(lease[1])) != only_as):
                return False
            unfinished = (*_WAITING, _GIVEN_UP)
            top = execute(
                connection,
                f"SELECT 1 FROM {status} WHERE workflow_uuid = :id AND status IN :unfinished",
                id=workflow_id,
                unfinished=unfinished,
            )
            if top.first() is None:
                return False
            execute(
                connection,
                f"{self._tree()} UPDATE {status} SET status = 'CANCELLED', owner_xid = NULL, "
                "queue_name = NULL, started_at_epoch_ms = NULL, updated_at = :now, completed_at = :now "
                "WHERE workflow_uuid IN (SELECT id FROM tree) AND status IN :unfinished",
                id=workflow_id,
                now=_now_ms(),
                unfinished=unfinished,
            )
            return True

    def erase_tenant(self, tenant: str) -> int:
        """Remove a tenant's workflows with their steps, payloads and leases; the number of top-level ones.

        One that runs is removed as well: its owner finds the lease gone and stops, and what it still tries
        to record is refused.
        """
        if not self._has_runs():
            return 0
        table = self._database.table
        roots = self._database.rows("SELECT workflow_id FROM af_leases WHERE tenant = :tenant", tenant=tenant)
        for (root,) in roots:
            with self._database.transaction() as connection:
                tree = execute(connection, f"{self._tree()} SELECT id FROM tree", id=root)
                ids = [str(row[0]) for row in tree]
                for name in ("operation_outputs", "workflow_input", "workflow_output", "workflow_status"):
                    if ids:
                        execute(connection, f"DELETE FROM {table(name)} WHERE workflow_uuid IN :ids", ids=ids)
                execute(connection, "DELETE FROM af_leases WHERE workflow_id = :id", id=root)
        return len(roots)

    # ---- plumbing ----------------------------------------------------------------------------------------

    def _has_runs(self) -> bool:
        """Whether DBOS has made its tables, which it does at its first launch."""
        self._runs_seen = self._runs_seen or self._database.has_runs()
        return self._runs_seen

    def _lease(self, connection: Connection, workflow_id: str) -> Sequence[Any] | None:
        """Owner and epoch, locked until the transaction ends."""
        lock = "" if self._database.is_sqlite else " FOR UPDATE"
        return _first(
            execute(
                connection,
                f"SELECT executor_id, epoch FROM af_leases WHERE workflow_id = :id{lock}",
                id=workflow_id,
            )
        )

    def _tree(self) -> str:
        """A workflow, its children, their children and so on."""
        status = self._database.table("workflow_status")
        return (
            "WITH RECURSIVE tree (id, depth) AS ("
            f"SELECT workflow_uuid, 0 FROM {status} WHERE workflow_uuid = :id "
            f"UNION SELECT c.workflow_uuid, tree.depth + 1 FROM {status} c "
            "JOIN tree ON c.parent_workflow_id = tree.id)"
        )

    def _hand_over(
        self,
        connection: Connection,
        workflow_ids: Collection[str],
        executor_id: str,
        owner_token: str,
        *,
        start_anew: bool,
    ) -> None:
        """What DBOS writes when a workflow is resumed and then taken from a queue, at once and for a tree."""
        attempts = "1" if start_anew else "COALESCE(recovery_attempts, 0) + 1"
        execute(
            connection,
            f"UPDATE {self._database.table('workflow_status')} SET status = 'PENDING', owner_xid = :token, "
            f"executor_id = :me, recovery_attempts = {attempts}, queue_name = NULL, "
            "deduplication_id = NULL, workflow_deadline_epoch_ms = NULL, started_at_epoch_ms = :now, "
            "updated_at = :now, completed_at = NULL WHERE workflow_uuid IN :ids",
            token=owner_token,
            me=executor_id,
            now=_now_ms(),
            ids=workflow_ids,
        )

    def _now_s(self, connection: Connection) -> float:
        if self._database.is_sqlite:
            return self._clock.time_s()
        return float(connection.execute("SELECT EXTRACT(EPOCH FROM clock_timestamp())").scalar_one())

    def _lock_path(self, executor_id: str) -> Path:
        return self._database.folder / "executors" / f"{executor_id}.lock"


class RunReader:
    """What the store says, read-only, from any process and without launching DBOS.

    Args:
        database_url: `postgresql://…`, or None for SQLite in the data folder.
        data_dir: Folder of local state.
        lease_s: Seconds after which a silent owner counts as dead.
        clock: Compares heartbeats on SQLite.
    """

    def __init__(
        self, database_url: str | None, data_dir: Path, *, lease_s: float, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._database = RunDatabase(database_url, data_dir, pooled=False)
        self._leases = Leases(self._database, lease_s=lease_s, clock=clock)
        self._ready = False

    @classmethod
    def on(cls, database: RunDatabase, leases: Leases) -> RunReader:
        """A reader over connections that somebody else opens and closes."""
        reader = cls.__new__(cls)
        reader._database, reader._leases, reader._ready = database, leases, False
        return reader

    def get(self, workflow_id: str) -> WorkflowRecord | None:
        """One workflow, top-level or child, or None."""
        found = self._records(
            "w.workflow_uuid = :id", "w.workflow_uuid", 1, root=root_of(workflow_id), id=workflow_id
        )
        return found[0] if found else None

    def list_workflows(
        self, tenant: str, *, name: str, states: Sequence[RunState] = (), limit: int = 50
    ) -> list[WorkflowRecord]:
        """Top-level workflows of a tenant, newest first."""
        where = "l.tenant = :tenant AND l.name = :name"
        order = "l.accepted_at_s DESC, w.workflow_uuid DESC"
        bindings: dict[str, Any] = {"tenant": tenant, "name": name}
        if states:
            where += " AND w.status IN :statuses"
            bindings["statuses"] = sorted({s for state in states for s in _STATUSES[state]})
        # Whether an unfinished one runs depends on its owner, so that part is decided after reading.
        found: list[WorkflowRecord] = []
        offset, page = 0, max(limit, 100) if states else limit
        while len(found) < limit:
            records = self._records(where, order, page, offset, **bindings)
            found += [record for record in records if not states or record.state in states]
            if len(records) < page:
                break
            offset += page
        return found[:limit]

    def steps(self, workflow_id: str) -> list[StepRecord]:
        """Recorded steps of the workflow and of everything below it, in order of completion."""
        if not self._is_ready():
            return []
        table = self._database.table
        rows = self._database.rows(
            f"{self._leases._tree()} "  # pyright: ignore[reportPrivateUsage] - one module
            "SELECT o.workflow_uuid, o.function_id, o.function_name, o.output, o.error, "
            f"o.started_at_epoch_ms, o.completed_at_epoch_ms FROM {table('operation_outputs')} o "
            "JOIN tree ON tree.id = o.workflow_uuid WHERE o.child_workflow_id IS NULL "
            "ORDER BY o.completed_at_epoch_ms, o.workflow_uuid, o.function_id",
            id=workflow_id,
        )
        return [_step(row) for row in rows if not str(row[2]).startswith(_LIBRARY_STEPS)]

    def _is_ready(self) -> bool:
        self._ready = self._ready or self._database.has_runs()
        return self._ready

    def _records(
        self, where: str, order: str, limit: int, offset: int = 0, *, root: str | None = None, **bindings: Any
    ) -> list[WorkflowRecord]:
        if not self._is_ready():
            return []
        table = self._database.table
        lease = "w.workflow_uuid"
        if root is not None:
            lease, bindings["root"] = ":root", root
        with self._database.reading() as connection:
            found = execute(
                connection,
                "SELECT w.workflow_uuid, l.name, l.tenant, w.status, i.inputs, o.output, o.error, "
                "w.created_at, w.updated_at, l.executor_id, l.started, l.accepted_at_s "
                f"FROM {table('workflow_status')} w JOIN af_leases l ON l.workflow_id = {lease} "
                f"LEFT JOIN {table('workflow_input')} i ON i.workflow_uuid = w.workflow_uuid "
                f"LEFT JOIN {table('workflow_output')} o ON o.workflow_uuid = w.workflow_uuid "
                f"WHERE {where} ORDER BY {order} LIMIT {int(limit)} OFFSET {int(offset)}",
                **bindings,
            )
            rows: list[Sequence[Any]] = [tuple(row) for row in found]
            alive = self._leases.alive(connection, {str(row[9]) for row in rows if row[3] in _WAITING})
        return [_record(row, alive) for row in rows]


def _first(result: Result) -> Sequence[Any] | None:
    row = result.first()
    return None if row is None else tuple(row)


def root_of(workflow_id: str) -> str:
    """The top-level workflow of a child's id."""
    return workflow_id.partition(".")[0]


def decoded(text: str) -> Any:
    """A stored value; an error is left as its problem document under `ERROR_KEY`.

    Raises:
        DataCorrupted: it is not JSON.
    """
    try:
        value: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(
            f"a stored value of the run database is not JSON: {text[:60]!r}", hint="restore it from a backup"
        ) from error
    if isinstance(value, dict) and list(cast(JsonObject, value)) == [VALUE_KEY]:
        return cast(JsonObject, value)[VALUE_KEY]
    return cast(Any, value)


def _record(row: Sequence[Any], alive: Collection[str]) -> WorkflowRecord:
    state = _FINAL.get(row[3]) or _unfinished_state(row[9] in alive, bool(row[10]))
    name = str(row[1])
    payload: JsonObject = {}
    output, error = None, None
    try:
        # The arguments of the one entry point that DBOS knows.
        stored_name, payload = decoded(row[4])["args"] if row[4] is not None else (name, payload)
        name = str(stored_name)
        output = decoded(row[5]) if row[5] is not None else None
        error = decoded(row[6]).get(ERROR_KEY) if row[6] is not None else None
    except DataCorrupted as damage:
        error = as_problem(damage)
        state = "failed" if state == "completed" else state
    except (TypeError, ValueError, KeyError, AttributeError) as damage:
        error = as_problem(DataCorrupted(f"the stored form of workflow {row[0]!r} is unknown: {damage!r}"))
        state = "failed" if state == "completed" else state
    if row[3] == _GIVEN_UP:
        error = as_problem(
            LimitExceeded(
                f"workflow {row[0]!r} was taken over {TAKEOVERS_MAX} times and never finished",
                hint="look at why its processes die, then resume it",
            )
        )
    return WorkflowRecord(
        workflow_id=row[0],
        name=name,
        tenant=row[2],
        state=state,
        payload=payload,
        output=output,
        error=error,
        # DBOS on SQLite knows whole seconds only.
        created_at_s=row[11] if row[0] == root_of(row[0]) else row[7] / 1000,
        updated_at_s=max(row[8] / 1000, row[11]),
        owner=row[9] or None,
    )


def _step(row: Sequence[Any]) -> StepRecord:
    output, error = None, None
    try:
        output = decoded(row[3]) if row[3] is not None else None
        error = decoded(row[4]).get(ERROR_KEY) if row[4] is not None else None
    except DataCorrupted as damage:
        error = as_problem(damage)
    return StepRecord(
        workflow_id=row[0],
        index=row[1],
        name=row[2],
        output=output,
        error=error,
        started_at_s=row[5] / 1000 if row[5] is not None else None,
        completed_at_s=row[6] / 1000 if row[6] is not None else None,
    )


def _unfinished_state(alive: bool, started: bool) -> RunState:
    if not alive:
        return "interrupted"
    return "running" if started else "queued"


def _now_ms() -> int:
    return int(time.time() * 1000)


def _lock(path: Path) -> int:
    """Create the file and hold its lock; returns the open descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have tidied the file away between the two calls: then the lock is on nothing.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock. It asks for a shared one, so that askers do not hinder each other."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
