"""The run database: who owns which workflow, and what the store says about it.

Twelve tables, in SQLite or PostgreSQL:

    af_executors  one row per process, with its last heartbeat
    af_workflows  one row per workflow. A top-level one carries its owner, and an epoch that grows when it
                  changes hands; its children, their children and so on are rows of their own below it
    af_steps      one row per recorded step, under the number that it has in its workflow
    af_events     one row per thing that happened in a tree, numbered in it (`event_log`)
    af_inbox      one row per message to a top-level workflow, numbered in it (`inbox`)
    af_paused     one row per top-level workflow that is paused (`pauses`)
    af_queued     one row per top-level workflow that was put into a shared queue (`queues`)
    af_after      one row per top-level workflow that another one waits for (`dependencies`)
    af_artifacts  one row per version of an artifact, with its bytes, numbered in its tree (`artifact_rows`)
    af_starts     one row per recent start from a queue whose starts are limited (`queue_rates`)
    af_serving    one row per process and queue that it takes runs from
    af_schedules  one row per schedule, which makes top-level workflows (`schedule_store`)

An owner is alive while its heartbeat is fresh and, on SQLite, while it holds the lock on its lock file: the
operating system drops that at once when the process dies, which makes `kill -9` visible without waiting. What
waits in a shared queue is owned by the queue, which lives always.
Heartbeats are stamped and compared by one clock: that of the machine for SQLite, of the server for Postgres.
Whoever changes a tree locks its top-level row first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import NeedsNewer, NotFound, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import EventKind
from agentic_flow.core.sql import Connection, SqlDatabase, execute
from agentic_flow.swarm.artifact_rows import create_artifacts
from agentic_flow.swarm.dbos_import import import_runs
from agentic_flow.swarm.event_log import append, create_events, event, written_down
from agentic_flow.swarm.locks import hold_lock, is_locked, lock_path
from agentic_flow.swarm.queue_rows import (
    CREATE_AFTER,
    CREATE_QUEUED,
    CREATE_SERVING,
    CREATE_STARTS,
    enqueue,
    make_ready,
    notify,
    set_state,
)
from agentic_flow.swarm.schedule_rows import CREATE_SCHEDULES
from agentic_flow.swarm.scheduling import (
    DEFAULT_QUEUE,
    HANDED_ON,
    QUEUED_BY,
    UNFINISHED,
    Fence,
    claim_verdict,
    is_alive,
)

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

VERSION = "runs-1"
"""Stored with every workflow: the least that whoever goes on with it must be able to read. A build that
records in a run what older ones cannot replay stores another name with it; not every build does, otherwise an
upgrade would strand every run under way."""
READABLE = (VERSION,)
"""What this build goes on with. It leaves other runs alone, for those who can."""
READER = 1
"""The form of the whole database that this build reads: see `RunDatabase.check_form`."""

NOBODY = ""
ENDED_AT = "COALESCE(ended_at_s, updated_at_s)"
"""When a workflow that has ended did; an older build stored no such time."""
_UNFINISHED = "status IN ('queued', 'running')"
_IDS_AT_ONCE = 500
_CREATE = (
    """CREATE TABLE IF NOT EXISTS af_executors (
        executor_id TEXT PRIMARY KEY, heartbeat_at_s DOUBLE PRECISION NOT NULL, host TEXT NOT NULL,
        pid INTEGER NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS af_workflows (
        workflow_id TEXT PRIMARY KEY, root_id TEXT NOT NULL, parent_id TEXT, parent_step INTEGER,
        name TEXT NOT NULL, version TEXT NOT NULL, tenant TEXT NOT NULL,
        priority INTEGER NOT NULL, status TEXT NOT NULL, epoch INTEGER NOT NULL, executor_id TEXT NOT NULL,
        payload TEXT NOT NULL, output TEXT, error TEXT, cancelled_with TEXT, takeovers INTEGER NOT NULL,
        accepted_at_s DOUBLE PRECISION NOT NULL, started_at_s DOUBLE PRECISION,
        updated_at_s DOUBLE PRECISION NOT NULL, ended_at_s DOUBLE PRECISION)""",
    """CREATE TABLE IF NOT EXISTS af_steps (
        workflow_id TEXT NOT NULL, step_index INTEGER NOT NULL, name TEXT NOT NULL, output TEXT, error TEXT,
        started_at_s DOUBLE PRECISION, completed_at_s DOUBLE PRECISION,
        PRIMARY KEY (workflow_id, step_index))""",
    """CREATE TABLE IF NOT EXISTS af_inbox (
        root_id TEXT NOT NULL, number INTEGER NOT NULL, topic TEXT NOT NULL, message_key TEXT NOT NULL,
        payload TEXT NOT NULL, sender TEXT NOT NULL, at_s DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (root_id, number), UNIQUE (root_id, topic, message_key))""",
    """CREATE TABLE IF NOT EXISTS af_paused (
        root_id TEXT PRIMARY KEY, at_s DOUBLE PRECISION NOT NULL, sender TEXT NOT NULL)""",
    *CREATE_QUEUED,
    *CREATE_AFTER,
    *CREATE_STARTS,
    *CREATE_SERVING,
    *CREATE_SCHEDULES,
    "CREATE INDEX IF NOT EXISTS af_workflows_unfinished ON af_workflows (executor_id, accepted_at_s) "
    f"WHERE parent_id IS NULL AND {_UNFINISHED}",
    "CREATE INDEX IF NOT EXISTS af_workflows_by_tenant ON af_workflows (tenant, name, accepted_at_s) "
    "WHERE parent_id IS NULL",
    f"CREATE INDEX IF NOT EXISTS af_workflows_ended ON af_workflows (tenant, ({ENDED_AT})) "
    "WHERE parent_id IS NULL AND status IN ('completed', 'failed', 'cancelled')",
    "CREATE INDEX IF NOT EXISTS af_workflows_below ON af_workflows (root_id) WHERE parent_id IS NOT NULL",
)
PARTS = ("af_events", "af_inbox", "af_paused", "af_queued", "af_after", "af_artifacts")
"""Tables whose rows belong to a whole run, by `root_id`: they go with it."""
TREE = (
    "(workflow_id = :id OR (parent_id IS NOT NULL AND root_id = :root "
    "AND substr(workflow_id, 1, :length) = :below))"
)
"""A workflow, its children, their children and so on; see `tree_of`."""


class RunDatabase(SqlDatabase):
    """Connections to one run database.

    Args:
        database_url: `postgresql://…`, or None for SQLite at `<data_dir>/runs/runs.db`.
        data_dir: Folder of local state.
        pooled: Keep connections open until `close`; without it each is closed after use.
    """

    def __init__(self, database_url: str | None, data_dir: Path, *, pooled: bool = True) -> None:
        self.folder = data_dir / "runs"
        sqlite = not database_url
        self._tables = (*_CREATE, create_artifacts(sqlite=sqlite), create_events(sqlite=sqlite))
        super().__init__(
            database_url,
            self.folder / "runs.db",
            name="run database",
            setting="swarm.database_url",
            create=self._tables,
            pooled=pooled,
        )

    def create(self) -> None:
        """Make the tables; what earlier builds kept in those of DBOS is taken in.

        Raises:
            Conflict: a process of such a build is at work on them.
            NeedsNewer: a newer build has changed them so that this one cannot use them.
            Unavailable: the database cannot be reached.
            DataCorrupted: the database file is damaged.
        """
        if self.has_table("af_leases"):
            import_runs(self, self._tables, self.folder / "executors")
        self.check_form()
        super().create()

    def locked_run(self, connection: Connection, run_id: str) -> tuple[str, str]:
        """Name and status of a top-level workflow, locked until the transaction ends.

        Raises:
            NotFound: there is none of this id.
        """
        row = execute(
            connection,
            "SELECT name, status FROM af_workflows WHERE workflow_id = :id AND parent_id IS NULL"
            f"{self.for_update}",
            id=run_id,
        ).first()
        if row is None:
            raise NotFound(f"there is no run {run_id!r}", hint="list them with `agentic-flow runs list`")
        return str(row[0]), str(row[1])

    def roots_in(self, table: Literal["af_after", "af_paused"], roots: Collection[str]) -> set[str]:
        """Which of these top-level workflows have rows in a table."""
        ids, found = sorted(roots), set[str]()
        for start in range(0, len(ids), _IDS_AT_ONCE):
            some = ids[start : start + _IDS_AT_ONCE]
            told = self.rows(f"SELECT DISTINCT root_id FROM {table} WHERE root_id IN :ids", ids=some)
            found |= {str(row[0]) for row in told}
        return found

    def check_form(self) -> None:
        """Refuse a database in a form that is none of this build's.

        New columns and tables harm nobody (`0027` in the decisions). A build that takes something away or
        gives it another meaning puts into `af_form` the number that a reader must know.

        Raises:
            NeedsNewer: it is too new.
        """
        if not self.has_table("af_form"):
            return
        least = max((int(row[0]) for row in self.rows("SELECT reader_min FROM af_form")), default=0)
        if least > READER:
            raise NeedsNewer(
                f"the run database needs a reader of number {least!r}, this build reads {READER!r}",
                hint="upgrade agentic-flow here too",
            )

    def has_runs(self) -> bool:
        """False as long as nobody has made the tables: there are no runs then. Takes older ones in."""
        if self.file is not None and not self.file.exists():
            return False
        if self.has_table("af_leases"):
            self.create()
        if not self.has_table("af_workflows"):
            return False
        self.check_form()
        return True

    def now_s(self, connection: Connection, clock: Clock) -> float:
        """The time of the one clock that all processes on this database share: for SQLite the machine's,
        which is `clock`, else the server's."""
        if self.is_sqlite:
            return clock.time_s()
        return float(connection.execute("SELECT EXTRACT(EPOCH FROM clock_timestamp())").scalar_one())

    def has_table(self, name: str) -> bool:
        """Whether there is a table of this name."""
        with self.reading() as connection:
            if self.is_sqlite:
                found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = :name", {"name": name})
                return found.first() is not None
            return connection.execute("SELECT to_regclass(:name)", {"name": name}).scalar_one() is not None


@dataclass(frozen=True, slots=True)
class Claim:
    """A workflow that was handed to this process."""

    workflow_id: str
    name: str
    tenant: str
    priority: int
    payload: str
    fence: Fence
    accepted_at_s: float
    is_new: bool = False
    """Nobody has executed anything of it."""
    deadline_s: float | None = None
    queue: str | None = None


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
        path = lock_path(self._database.folder / "executors", executor_id)
        try:
            descriptor = hold_lock(path)
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
                "INSERT INTO af_executors (executor_id, heartbeat_at_s, host, pid) "
                "VALUES (:id, :now, :host, :pid) "
                "ON CONFLICT (executor_id) DO UPDATE SET heartbeat_at_s = excluded.heartbeat_at_s",
                id=executor_id,
                now=self._now_s(connection),
                host=socket.gethostname(),
                pid=os.getpid(),
            )

    def hand_on(self, executor_id: str, run_ids: Sequence[str] | None = None) -> None:
        """Let others go on with what this process has and does not execute any more; they look for it twice
        a second. What it would still record is refused.

        Args:
            executor_id: The process.
            run_ids: Only these top-level workflows; None: all.
        """
        with self._database.transaction() as connection:
            self._hand_on(connection, executor_id, run_ids)

    def leave_to_others(self, workflow_id: str, name: str, fence: Fence, why: str) -> bool:
        """As `hand_on`, of one that this build cannot go on with; its events say so.

        Args:
            workflow_id: A top-level workflow that came from no shared queue.
            name: Its workflow's.
            fence: What this process held of it.
            why: For people.

        Returns:
            False when it is not this process's any more.
        """
        with self._database.transaction() as connection:
            changed = execute(
                connection,
                f"UPDATE af_workflows SET executor_id = :nobody WHERE workflow_id = :id AND {_UNFINISHED} "
                "AND executor_id = :me AND epoch = :epoch",
                nobody=HANDED_ON,
                id=workflow_id,
                me=fence.executor_id,
                epoch=fence.epoch,
            )
            if changed.rowcount:
                self._tell(connection, workflow_id, "handed_back", name, {"text": why})
            return bool(changed.rowcount)

    def _hand_on(self, connection: Connection, executor_id: str, run_ids: Sequence[str] | None) -> None:
        if run_ids is not None and not run_ids:
            return
        only: dict[str, Any] = {} if run_ids is None else {"ids": list(run_ids)}
        execute(
            connection,
            f"UPDATE af_workflows SET executor_id = :nobody WHERE parent_id IS NULL AND {_UNFINISHED} "
            f"AND executor_id = :me {'AND workflow_id IN :ids' if only else ''}",
            nobody=HANDED_ON,
            me=executor_id,
            **only,
        )

    def serve(self, executor_id: str, queues: Collection[str]) -> None:
        """Say from which shared queues this process, whose heart beats, takes runs; from no others."""
        with self._database.transaction() as connection:
            execute(connection, "DELETE FROM af_serving WHERE executor_id = :id", id=executor_id)
            for queue in sorted(set(queues)):
                execute(
                    connection,
                    "INSERT INTO af_serving (executor_id, queue) VALUES (:id, :queue)",
                    id=executor_id,
                    queue=queue,
                )

    def is_served(self, queue: str) -> bool:
        """Whether any process that lives takes runs from this queue."""
        with self._database.reading() as connection:
            found = execute(
                connection, "SELECT executor_id FROM af_serving WHERE queue = :queue", queue=queue
            )
            return bool(self.alive(connection, {str(row[0]) for row in found}))

    def has_handed_on(self) -> bool:
        """Whether any workflow waits for whoever goes on with it: a question that takes no lock."""
        return bool(
            self._database.rows(
                f"SELECT 1 FROM af_workflows WHERE parent_id IS NULL AND {_UNFINISHED} "
                "AND executor_id = :nobody LIMIT 1",
                nobody=HANDED_ON,
            )
        )

    def leave(self, executor_id: str) -> None:
        """Let go of everything, so that others need not wait."""
        with self._database.transaction() as connection:
            self._hand_on(connection, executor_id, None)
            execute(connection, "DELETE FROM af_serving WHERE executor_id = :id", id=executor_id)
            execute(connection, "DELETE FROM af_executors WHERE executor_id = :id", id=executor_id)

    def forget_the_dead(self) -> None:
        """Remove rows and lock files of processes long gone; without them they count as dead all the same."""
        with self._database.transaction() as connection:
            before_s = self._now_s(connection) - 10 * self._lease_s
            execute(connection, "DELETE FROM af_executors WHERE heartbeat_at_s < :before", before=before_s)
            execute(
                connection,
                "DELETE FROM af_serving WHERE executor_id NOT IN (SELECT executor_id FROM af_executors)",
            )
        if self._database.is_sqlite:
            for path in (self._database.folder / "executors").glob("*.lock"):
                if not is_locked(path):
                    path.unlink(missing_ok=True)

    def alive(self, connection: Connection, executors: Collection[str]) -> set[str]:
        """Which of these processes still work."""
        if not executors:
            return set()
        found = execute(
            connection,
            "SELECT executor_id, heartbeat_at_s FROM af_executors WHERE executor_id IN :ids",
            ids=executors,
        )
        now_s = self._now_s(connection)
        living = {
            str(row[0])
            for row in found
            if is_alive(float(row[1]), now_s, self._lease_s, holds_lock=self._holds_lock(str(row[0])))
        }
        return living | ({QUEUED_BY} & set(executors))

    def _holds_lock(self, executor_id: str) -> bool | None:
        if not self._database.is_sqlite:
            return None
        return is_locked(lock_path(self._database.folder / "executors", executor_id))

    # ---- workflows ---------------------------------------------------------------------------------------

    def has_orphans(self) -> bool:
        """Whether any unfinished top-level workflow has a dead owner."""
        return bool(self.orphans(None))

    def orphans(
        self, names: Collection[str] | None, *, asker: str | None = None, queued: bool | None = None
    ) -> list[str]:
        """Unfinished top-level workflows with one of these names whose owner is dead, oldest first.

        Args:
            names: Names of workflows; None: all.
            asker: The process that asks. It lives, however late its own heartbeat is.
            queued: Only those that came from a shared queue, or only others; None: all.
        """
        if (names is not None and not names) or not self._has_runs():
            return []
        named: dict[str, Any] = {} if names is None else {"names": names}
        unfinished = f"FROM af_workflows WHERE parent_id IS NULL AND {_UNFINISHED}"
        with self._database.reading() as connection:
            owners = {str(row[0]) for row in execute(connection, f"SELECT DISTINCT executor_id {unfinished}")}
            dead = owners - self.alive(connection, owners) - {asker}
            if not dead:
                return []
            among = f"AND workflow_id {'' if queued else 'NOT'} IN (SELECT root_id FROM af_queued)"
            found = execute(
                connection,
                f"SELECT workflow_id {unfinished} AND executor_id IN :dead AND version IN :versions "
                f"{'AND name IN :names' if named else ''} {'' if queued is None else among} "
                "ORDER BY accepted_at_s, workflow_id",
                dead=dead,
                versions=list(READABLE),
                **named,
            )
            return [str(row[0]) for row in found]

    def claim(
        self, workflow_id: str, executor_id: str, *, asked: bool, queue: str = DEFAULT_QUEUE
    ) -> Claim | None:
        """Become the owner of an interrupted workflow or, when somebody `asked` for it, of a cancelled one.

        One transaction raises the epoch of its tree, by which every later write of the owner before is
        refused. Of several processes that try, exactly one gets it; one whose owner lives is left alone. With
        `QUEUED_BY` as the process it goes back to its shared queue, or to `queue` if it had none.

        Raises:
            NeedsNewer: it was stored by a version of the product whose workflows this one cannot continue.
        """
        with self._database.transaction() as connection:
            row = execute(
                connection,
                "SELECT status, executor_id, epoch, takeovers, version, name, tenant, priority, payload, "
                "accepted_at_s FROM af_workflows WHERE workflow_id = :id AND parent_id IS NULL"
                f"{self._database.for_update}",
                id=workflow_id,
            ).first()
            if row is None:
                return None
            status, owner, epoch = str(row[0]), str(row[1]), int(row[2])
            owner_lives = status in UNFINISHED and (
                owner == executor_id or bool(self.alive(connection, [owner]))
            )
            verdict = claim_verdict(status, owner_lives=owner_lives, takeovers=int(row[3]), asked=asked)
            if verdict == "leave":
                return None
            if verdict == "give_up":
                execute(
                    connection,
                    "UPDATE af_workflows SET status = 'given_up', updated_at_s = :now "
                    "WHERE workflow_id = :id",
                    id=workflow_id,
                    now=self._clock.time_s(),
                )
                self._tell(connection, workflow_id, "given_up", str(row[5]), {"takeovers": int(row[3])})
                return None
            check_readable(workflow_id, str(row[4]))
            data: JsonObject = {"asked": asked, "epoch": epoch + 1}
            kind: EventKind = "handed_back" if executor_id == QUEUED_BY else "taken_over"
            self._tell(connection, workflow_id, kind, str(row[5]), data)
            # A process that has let go of it was not taken down by it.
            counted = owner != HANDED_ON
            self._take(connection, workflow_id, executor_id, status, asked=asked, counted=counted)
            self._move_in_queue(connection, workflow_id, executor_id, row, queue)
            return Claim(
                workflow_id=workflow_id,
                name=str(row[5]),
                tenant=str(row[6]),
                priority=int(row[7]),
                payload=str(row[8]),
                fence=Fence(executor_id, epoch + 1),
                accepted_at_s=float(row[9]),
            )

    def _take(
        self,
        connection: Connection,
        workflow_id: str,
        executor_id: str,
        status: str,
        *,
        asked: bool,
        counted: bool,
    ) -> None:
        now_s = self._clock.time_s()
        execute(
            connection,
            "UPDATE af_workflows SET executor_id = :me, epoch = epoch + 1, status = 'queued', "
            f"takeovers = {'0' if asked else f'takeovers + {int(counted)}'}, cancelled_with = NULL, "
            "ended_at_s = NULL, updated_at_s = :now WHERE workflow_id = :id",
            id=workflow_id,
            me=executor_id,
            now=now_s,
        )
        if status == "cancelled":
            # What was cancelled with it; a child that was cancelled by itself stays so.
            execute(
                connection,
                "UPDATE af_workflows SET status = 'running', cancelled_with = NULL, ended_at_s = NULL, "
                "updated_at_s = :now WHERE parent_id IS NOT NULL AND root_id = :id "
                "AND status = 'cancelled' AND cancelled_with = :id",
                id=workflow_id,
                now=now_s,
            )

    def _move_in_queue(
        self, connection: Connection, workflow_id: str, executor_id: str, row: Sequence[Any], queue: str
    ) -> None:
        now_s = self._clock.time_s()
        if executor_id != QUEUED_BY:
            set_state(connection, [workflow_id], "taken", now_s)
            return
        enqueue(  # one that was accepted without a queue
            connection,
            workflow_id,
            queue=queue,
            priority=int(row[7]),
            tenant=str(row[6]),
            name=str(row[5]),
            version=str(row[4]),
            at_s=now_s,
        )
        make_ready(connection, [workflow_id], now_s)
        if not self._database.is_sqlite:
            notify(connection)

    def release(self, workflow_id: str, fence: Fence) -> None:
        """Nobody executes this workflow any more: it can be resumed anywhere."""
        with self._database.transaction() as connection:
            execute(
                connection,
                "UPDATE af_workflows SET executor_id = :nobody "
                "WHERE workflow_id = :id AND executor_id = :me AND epoch = :epoch",
                id=workflow_id,
                me=fence.executor_id,
                epoch=fence.epoch,
                nobody=NOBODY,
            )

    def owned(self, executor_id: str) -> dict[str, int]:
        """Unfinished top-level workflows that this process owns, with their epochs."""
        rows = self._database.rows(
            "SELECT workflow_id, epoch FROM af_workflows "
            f"WHERE parent_id IS NULL AND {_UNFINISHED} AND executor_id = :me",
            me=executor_id,
        )
        return {str(row[0]): int(row[1]) for row in rows}

    def statuses(self, workflow_ids: Sequence[str]) -> dict[str, str]:
        """What is stored of each of these."""
        found: dict[str, str] = {}
        for start in range(0, len(workflow_ids), 500):
            rows = self._database.rows(
                "SELECT workflow_id, status FROM af_workflows WHERE workflow_id IN :ids",
                ids=list(workflow_ids[start : start + 500]),
            )
            found |= {str(row[0]): str(row[1]) for row in rows}
        return found

    def cancel(self, workflow_id: str, *, only_as: Fence | None = None) -> bool:
        """Cancel what is unfinished in the tree under this workflow, itself included, in one transaction.

        Args:
            workflow_id: A workflow or a child.
            only_as: What its tree must still have; a process that lost it may not cancel it.

        Returns:
            False when the workflow had already ended (or is not known).
        """
        if not self._has_runs():
            return False
        root_id = root_of(workflow_id)
        with self._database.transaction() as connection:
            root = execute(
                connection,
                "SELECT executor_id, epoch FROM af_workflows WHERE workflow_id = :id"
                f"{self._database.for_update}",
                id=root_id,
            ).first()
            if root is None or (only_as is not None and Fence(str(root[0]), int(root[1])) != only_as):
                return False
            top = execute(
                connection, "SELECT status, name FROM af_workflows WHERE workflow_id = :id", id=workflow_id
            ).first()
            if top is None or top[0] not in (*UNFINISHED, "given_up"):
                return False
            self._tell(connection, workflow_id, "cancelled", str(top[1]), {"state": "cancelled"})
            execute(
                connection,
                "UPDATE af_workflows SET status = 'cancelled', cancelled_with = :id, updated_at_s = :now, "
                f"ended_at_s = :now WHERE {TREE} AND status IN ('queued', 'running', 'given_up')",
                now=self._clock.time_s(),
                **tree_of(workflow_id),
            )
            if workflow_id == root_id:
                set_state(connection, [root_id], "taken", None)  # nobody waits for it any more
            return True

    def erase_tenant(self, tenant: str) -> int:
        """Remove a tenant's workflows with their steps and payloads; the number of top-level ones.

        One that runs is removed as well: its owner finds it gone and stops, and what it still tries to record
        is refused.
        """
        if not self._has_runs():
            return 0
        self._database.create()  # what an older build has made lacks tables
        with self._database.transaction() as connection:  # first, so that none makes a new run meanwhile
            execute(connection, "DELETE FROM af_schedules WHERE tenant = :tenant", tenant=tenant)
        roots = self._database.rows(
            "SELECT workflow_id FROM af_workflows WHERE tenant = :tenant AND parent_id IS NULL", tenant=tenant
        )
        for (root,) in roots:
            with self._database.transaction() as connection:
                execute(
                    connection,
                    f"SELECT 1 FROM af_workflows WHERE workflow_id = :id{self._database.for_update}",
                    id=root,
                )
                tree = f"SELECT workflow_id FROM af_workflows WHERE {TREE}"
                bindings = tree_of(str(root))
                execute(connection, f"DELETE FROM af_steps WHERE workflow_id IN ({tree})", **bindings)
                execute(connection, f"DELETE FROM af_workflows WHERE {TREE}", **bindings)
                for table in PARTS:
                    execute(connection, f"DELETE FROM {table} WHERE root_id = :id", id=root)
        return len(roots)

    # ---- plumbing ----------------------------------------------------------------------------------------

    def _tell(
        self, connection: Connection, workflow_id: str, kind: EventKind, name: str, data: JsonObject
    ) -> None:
        """Add to the event log of a tree whose top-level row this transaction holds."""
        root_id = root_of(workflow_id)
        sqlite = self._database.is_sqlite
        written_down(connection, root_id, sqlite=sqlite)
        told = event(root_id, workflow_id, kind, self._clock.time_s(), name, data)
        append(connection, [told], sqlite=sqlite)

    def _has_runs(self) -> bool:
        self._runs_seen = self._runs_seen or self._database.has_runs()
        return self._runs_seen

    def _now_s(self, connection: Connection) -> float:
        return self._database.now_s(connection, self._clock)


def check_readable(workflow_id: str, version: str) -> None:
    """Refuse a run that this build cannot go on with.

    Raises:
        NeedsNewer: that is so.
    """
    if version not in READABLE:
        raise NeedsNewer(
            f"workflow {workflow_id!r} was stored as {version!r}, this build goes on with {READABLE!r}",
            hint="resume or retry it with the version of agentic-flow that worked on it last",
        )


def root_of(workflow_id: str) -> str:
    """The top-level workflow of a child's id."""
    return workflow_id.partition(".")[0]


def tree_of(workflow_id: str) -> dict[str, Any]:
    """What is bound to `TREE`."""
    below = f"{workflow_id}."
    return {"id": workflow_id, "root": root_of(workflow_id), "below": below, "length": len(below)}
