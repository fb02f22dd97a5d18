"""Takes in what earlier builds kept in the tables of DBOS, once, in one transaction.

Step numbers mean the same as before, so an interrupted run goes on after its last recorded step, and the
idempotency keys of its steps stay what they were. What was taken in is removed from DBOS's tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import orjson
import structlog

from agentic_flow.core.errors import Conflict
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.sql import Connection, Row, SqlDatabase, execute
from agentic_flow.swarm.locks import is_locked, lock_path

# ruff: noqa: S608 - what is interpolated into SQL here is the schema's prefix and constants; values are bound.

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_PAGE = 200
_SILENT_S = 30.0
_STATUSES = {
    "SUCCESS": "completed",
    "ERROR": "failed",
    "CANCELLED": "cancelled",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "given_up",
}
_RESULT_STEP = "DBOS.getResult"
_LIBRARY_STEPS = "DBOS."
_TABLES = ("operation_outputs", "workflow_input", "workflow_output", "workflow_status")


def import_runs(database: SqlDatabase, create: Sequence[str], lock_folder: Path) -> None:
    """Move all runs from the tables of DBOS into ours.

    Args:
        database: The run database.
        create: Statements that make our tables.
        lock_folder: Where processes hold their lock files, on SQLite.

    Raises:
        Conflict: a process of an older build is still at work.
        Unavailable: the database cannot be reached.
    """
    with database.transaction() as connection:
        if not database.is_sqlite:
            connection.execute("SELECT pg_advisory_xact_lock(:key)", {"key": 0x61665F72})
        if not _exists(connection, database, "af_leases"):
            return  # another process was first
        working = _working(connection, None if not database.is_sqlite else lock_folder)
        if working:
            raise Conflict(
                f"the run database is in use by a process of an older build: {working!r}",
                hint="stop every process of the older build first",
            )
        for statement in ("DROP TABLE af_executors", *create):
            connection.execute(statement)
        status = "workflow_status" if database.is_sqlite else "dbos.workflow_status"
        number = 0
        if _exists(connection, database, status):
            leases = list(connection.execute("SELECT * FROM af_leases"))
            for start in range(0, len(leases), _PAGE):
                number += _Page(connection, "" if database.is_sqlite else "dbos.").move(
                    leases[start : start + _PAGE]
                )
        connection.execute("DROP TABLE af_leases")
    log.info("runs_of_older_build_taken_in", runs=number)


def _exists(connection: Connection, database: SqlDatabase, table: str) -> bool:
    if database.is_sqlite:
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = :name", {"name": table})
        return found.first() is not None
    return connection.execute("SELECT to_regclass(:name)", {"name": table}).scalar_one() is not None


def _working(connection: Connection, lock_folder: Path | None) -> list[str]:
    rows = list(connection.execute("SELECT executor_id, heartbeat_at_s FROM af_executors"))
    if lock_folder is not None:
        return [str(row[0]) for row in rows if is_locked(lock_path(lock_folder, str(row[0])))]
    if not rows:
        return []
    now_s = float(connection.execute("SELECT EXTRACT(EPOCH FROM clock_timestamp())").scalar_one())
    return [str(row[0]) for row in rows if float(row[1]) > now_s - _SILENT_S]


class _Page:
    """Some top-level workflows with all that is below them."""

    def __init__(self, connection: Connection, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix

    def move(self, leases: Sequence[Row]) -> int:
        """Returns how many there were."""
        owners = {str(row[0]): row for row in leases}
        rows = self._trees(owners)
        ids = [str(row[0]) for row in rows]
        steps: dict[str, list[Row]] = defaultdict(list)
        for step in self._of(
            "workflow_uuid, function_id, function_name, output, error, child_workflow_id, "
            "started_at_epoch_ms, completed_at_epoch_ms",
            "operation_outputs",
            ids,
        ):
            steps[str(step[0])].append(step)
        inputs = {str(row[0]): row[1] for row in self._of("workflow_uuid, inputs", "workflow_input", ids)}
        outputs = {
            str(row[0]): (row[1], row[2])
            for row in self._of("workflow_uuid, output, error", "workflow_output", ids)
        }
        statuses = {str(row[0]): str(row[1]) for row in rows}
        for row in rows:
            workflow = _workflow(row, owners, statuses, steps)
            workflow |= _payload(inputs.get(str(row[0])), workflow["name"])
            output, error = outputs.get(str(row[0]), (None, None))
            workflow |= {"output": _value(output), "error": _error(error)}
            self._insert("af_workflows", workflow)
            for step in steps[str(row[0])]:
                if step[5] is None and not str(step[2]).startswith(_LIBRARY_STEPS):
                    self._insert("af_steps", _step(step))
        for table in _TABLES:
            execute(
                self._connection, f"DELETE FROM {self._prefix}{table} WHERE workflow_uuid IN :ids", ids=ids
            )
        return sum(str(row[0]) in owners for row in rows)

    def _trees(self, owners: Collection[str]) -> list[Row]:
        columns = (
            "workflow_uuid, status, parent_workflow_id, application_version, recovery_attempts, created_at, "
            "updated_at, completed_at, started_at_epoch_ms"
        )
        found = level = self._of(columns, "workflow_status", owners)
        while level:
            parents = [str(row[0]) for row in level]
            level = self._of(columns, "workflow_status", parents, by="parent_workflow_id")
            found = [*found, *level]
        return found

    def _of(self, columns: str, table: str, ids: Collection[str], *, by: str = "workflow_uuid") -> list[Row]:
        statement = f"SELECT {columns} FROM {self._prefix}{table} WHERE {by} IN :ids"
        return list(execute(self._connection, statement, ids=list(ids)))

    def _insert(self, table: str, row: JsonObject) -> None:
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", row)


def _workflow(
    row: Row,
    owners: Mapping[str, Row],
    statuses: Mapping[str, str],
    steps: Mapping[str, Sequence[Row]],
) -> JsonObject:
    """A row of ours, without payload and results."""
    workflow_id = str(row[0])
    root_id = workflow_id.partition(".")[0]
    _, executor_id, epoch, started, tenant, name, accepted_at_s = owners[root_id]
    parent_id = None if workflow_id == root_id else str(row[2])
    of_parent = [step for step in steps.get(parent_id or "", ()) if step[5] == workflow_id]
    status = _STATUSES.get(str(row[1])) or ("running" if parent_id or started else "queued")
    # A child cancelled with its run comes back with it, unless its parent has been told of it.
    told = any(step[2] == _RESULT_STEP for step in of_parent)
    with_root = status == "cancelled" and statuses[root_id] == "CANCELLED" and not told
    created_at_s = float(accepted_at_s) if parent_id is None else row[5] / 1000
    return {
        "workflow_id": workflow_id,
        "root_id": root_id,
        "parent_id": parent_id,
        "parent_step": next((int(step[1]) for step in of_parent if step[2] != _RESULT_STEP), None),
        "name": str(name),
        "version": str(row[3]),
        "tenant": str(tenant),
        "priority": 0,
        "status": status,
        "epoch": int(epoch) if parent_id is None else 1,
        "executor_id": str(executor_id) if parent_id is None else "",
        "cancelled_with": root_id if with_root else None,
        "takeovers": max(0, int(row[4] or 0) - 1),
        "accepted_at_s": created_at_s,
        "started_at_s": row[8] / 1000 if row[8] is not None else None,
        "updated_at_s": max(row[6] / 1000, created_at_s),
        "ended_at_s": row[7] / 1000 if row[7] is not None else None,
    }


def _payload(inputs: str | None, name: str) -> JsonObject:
    """Name and payload: the arguments of the one entry point that DBOS knew."""
    try:
        stored_name, payload = orjson.loads(inputs or "")["args"]
        return {"name": str(stored_name), "payload": orjson.dumps(payload).decode()}
    except (ValueError, TypeError, KeyError):
        return {"name": name, "payload": inputs or ""}  # damaged, and stays visible as such


def _value(text: str | None) -> str | None:
    if text is None or not text.startswith('{"$value"'):
        return text
    try:
        value = orjson.loads(text)
    except ValueError:
        return text
    return orjson.dumps(value["$value"]).decode() if list(value) == ["$value"] else text


def _error(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        problem: Any = orjson.loads(text)["$error"]
    except (ValueError, TypeError, KeyError):
        return text
    return orjson.dumps(cast(JsonObject, problem)).decode()


def _step(row: Row) -> JsonObject:
    return {
        "workflow_id": str(row[0]),
        "step_index": int(row[1]),
        "name": str(row[2]),
        "output": _value(row[3]),
        "error": _error(row[4]),
        "started_at_s": row[6] / 1000 if row[6] is not None else None,
        "completed_at_s": row[7] / 1000 if row[7] is not None else None,
    }
