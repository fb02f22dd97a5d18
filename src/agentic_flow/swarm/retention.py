"""Removing runs that have ended: by age, and by what a tenant's take, in small transactions.

A run goes with all that is stored of it: its agents, steps, events, messages, questions and artifacts.
One that is alive stays, also when it is paused or interrupted and could be resumed; so does one that an
unfinished run of the tenant names in its input, to wait for it or to learn how it went. Learned memory and
the books of model calls are kept elsewhere and stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from agentic_flow.core.clock import Clock
from agentic_flow.core.ports import PurgeReport
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.inbox import CLOSED
from agentic_flow.swarm.leases import ENDED_AT, PARTS, RunDatabase

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

DAY_S = 86_400.0
PAGE_RUNS = 100
TRANSACTION_MAX_BYTES = 4_000_000
"""So much is removed at once: whoever works on runs waits for the end of a transaction."""

_ENDED = "parent_id IS NULL AND status IN ('completed', 'failed', 'cancelled')"
_UNFINISHED = "parent_id IS NULL AND status IN ('queued', 'running')"
_TREES = (
    "SELECT workflow_id, root_id, payload, output, error FROM af_workflows WHERE workflow_id IN :ids "
    "UNION ALL SELECT workflow_id, root_id, payload, output, error FROM af_workflows "
    "WHERE parent_id IS NOT NULL AND root_id IN :ids"
)
_NAME = re.compile(r'"([A-Za-z0-9_-]{1,128})"')


@dataclass(slots=True)
class _Run:
    """An ended run, and what is stored of it."""

    workflow_id: str
    ended_at_s: float
    agents: int = 0
    steps: int = 0
    events: int = 0
    messages: int = 0
    artifacts: int = 0
    size_bytes: int = 0


def kept_by(settings: SwarmSettings) -> tuple[float | None, int | None]:
    """The age in seconds, and the bytes of a tenant, past which ended runs go by themselves."""
    keep_days = settings.keep_days
    return (None if keep_days is None else keep_days * DAY_S), settings.keep_bytes


class Retention:
    """What of a run database may go.

    Args:
        database: Where the runs are.
        clock: Tells their age.
    """

    def __init__(self, database: RunDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def tenants(self) -> list[str]:
        """Tenants that have runs which ended."""
        if not self._database.has_runs():
            return []
        rows = self._database.rows(f"SELECT DISTINCT tenant FROM af_workflows WHERE {_ENDED} ORDER BY tenant")
        return [str(row[0]) for row in rows]

    def purge(
        self, tenant: str, *, older_than_s: float | None, keep_bytes: int | None, dry_run: bool = False
    ) -> PurgeReport:
        """See RunEngine."""
        counts: Counter[str] = Counter()
        if (older_than_s is None and keep_bytes is None) or not self._database.has_runs():
            return PurgeReport(dry_run=dry_run)
        self._database.create()  # what an older build has made lacks tables
        named = self._named_by_unfinished(tenant)
        for runs in self._due(tenant, older_than_s, keep_bytes):
            for chunk in _chunks([run for run in runs if run.workflow_id not in named]):
                gone = chunk if dry_run else self._remove(chunk)
                for run in gone:
                    counts.update(
                        runs=1,
                        agents=run.agents,
                        steps=run.steps,
                        events=run.events,
                        messages=run.messages,
                        artifacts=run.artifacts,
                        size_bytes=run.size_bytes,
                    )
        return PurgeReport(**counts, dry_run=dry_run)

    def _named_by_unfinished(self, tenant: str) -> set[str]:
        """Everything that the inputs of the tenant's unfinished runs name, and that may be a run's id."""
        waited_for = self._database.rows(
            "SELECT a.needed_id FROM af_after a JOIN af_workflows d ON d.workflow_id = a.root_id "
            "WHERE d.tenant = :tenant AND d.status IN ('queued', 'running')",
            tenant=tenant,
        )
        found, last = {str(row[0]) for row in waited_for}, ""
        while True:
            rows = self._database.rows(
                f"SELECT workflow_id, payload FROM af_workflows WHERE {_UNFINISHED} AND tenant = :tenant "
                f"AND workflow_id > :last ORDER BY workflow_id LIMIT {PAGE_RUNS}",
                tenant=tenant,
                last=last,
            )
            for _, payload in rows:
                found.update(_NAME.findall(str(payload)))
            if len(rows) < PAGE_RUNS:
                return found
            last = str(rows[-1][0])

    def _due(self, tenant: str, older_than_s: float | None, keep_bytes: int | None) -> Generator[list[_Run]]:
        """Runs that are past a limit, newest first, in pages."""
        now_s = self._clock.time_s()
        cut_s = None if older_than_s is None else now_s - older_than_s
        kept_bytes = 0
        # What is not past the age must be weighed only where there is a limit on weight.
        before = (now_s + 1e9 if keep_bytes is not None or cut_s is None else cut_s, "\U0010ffff")
        while page := self._page(tenant, *before):
            due: list[_Run] = []
            for run in page:
                kept_bytes += run.size_bytes
                is_old = cut_s is not None and run.ended_at_s <= cut_s
                if is_old or (keep_bytes is not None and kept_bytes > keep_bytes):
                    due.append(run)
            yield due
            before = (page[-1].ended_at_s, page[-1].workflow_id)

    def _page(self, tenant: str, ended_at_s: float, workflow_id: str) -> list[_Run]:
        """The next ended runs below this end and id, with their weight."""
        with self._database.reading() as connection:
            found = execute(
                connection,
                f"SELECT workflow_id, {ENDED_AT} FROM af_workflows WHERE {_ENDED} AND tenant = :tenant "
                f"AND {ENDED_AT} <= :at AND ({ENDED_AT} < :at OR workflow_id < :id) "
                f"ORDER BY {ENDED_AT} DESC, workflow_id DESC LIMIT {PAGE_RUNS}",
                tenant=tenant,
                at=ended_at_s,
                id=workflow_id,
            )
            runs = {str(row[0]): _Run(str(row[0]), float(row[1])) for row in found}
            if runs:
                self._weigh(connection, runs)
        return list(runs.values())

    def _weigh(self, connection: Connection, runs: Mapping[str, _Run]) -> None:
        ids = list(runs)

        def octets(*columns: str) -> str:
            length = "LENGTH(CAST({} AS BLOB))" if self._database.is_sqlite else "OCTET_LENGTH({})"
            return " + ".join(f"COALESCE({length.format(column)}, 0)" for column in columns)

        for what, statement in (
            (
                "agents",
                f"SELECT t.root_id, COUNT(*), SUM({octets('t.payload', 't.output', 't.error')}) "
                f"FROM ({_TREES}) t GROUP BY t.root_id",
            ),
            (
                "steps",
                f"SELECT t.root_id, COUNT(*), SUM({octets('s.name', 's.output', 's.error')}) "
                f"FROM ({_TREES}) t JOIN af_steps s ON s.workflow_id = t.workflow_id GROUP BY t.root_id",
            ),
            (
                "events",
                f"SELECT root_id, COUNT(*), SUM({octets('name', 'data')}) FROM af_events "
                "WHERE root_id IN :ids GROUP BY root_id",
            ),
            (
                "messages",
                f"SELECT root_id, COUNT(*), SUM({octets('topic', 'payload')}) FROM af_inbox "
                f"WHERE root_id IN :ids AND message_key <> '{CLOSED}' GROUP BY root_id",
            ),
            (
                "artifacts",
                f"SELECT root_id, COUNT(*), SUM(size_bytes + {octets('name', 'media_type')}) "
                "FROM af_artifacts WHERE root_id IN :ids GROUP BY root_id",
            ),
        ):
            for root_id, count, size_bytes in execute(connection, statement, ids=ids):
                run = runs[str(root_id)]
                setattr(run, what, int(count) - (1 if what == "agents" else 0))  # a run is none of its agents
                run.size_bytes += int(size_bytes)

    def _remove(self, runs: Sequence[_Run]) -> list[_Run]:
        """Remove those that nobody has resumed meanwhile, in one transaction."""
        by_id = {run.workflow_id: run for run in runs}
        with self._database.transaction() as connection:
            found = execute(
                connection,
                f"SELECT workflow_id, {ENDED_AT} FROM af_workflows WHERE workflow_id IN :ids AND {_ENDED} "
                f"ORDER BY workflow_id{self._database.for_update}",
                ids=list(by_id),
            )
            gone = [by_id[str(row[0])] for row in found if float(row[1]) == by_id[str(row[0])].ended_at_s]
            ids = [run.workflow_id for run in gone]
            if not ids:
                return []
            trees = f"SELECT t.workflow_id FROM ({_TREES}) t"
            execute(connection, f"DELETE FROM af_steps WHERE workflow_id IN ({trees})", ids=ids)
            for table in PARTS:
                execute(connection, f"DELETE FROM {table} WHERE root_id IN :ids", ids=ids)
            below = "DELETE FROM af_workflows WHERE parent_id IS NOT NULL AND root_id IN :ids"
            execute(connection, below, ids=ids)
            execute(connection, "DELETE FROM af_workflows WHERE workflow_id IN :ids", ids=ids)
        return gone


def _chunks(runs: Sequence[_Run]) -> Generator[list[_Run]]:
    """Parts that a transaction may remove; a heavy run is one of its own."""
    chunk: list[_Run] = []
    size_bytes = 0
    for run in runs:
        if chunk and size_bytes + run.size_bytes > TRANSACTION_MAX_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(run)
        size_bytes += run.size_bytes
    if chunk:
        yield chunk
