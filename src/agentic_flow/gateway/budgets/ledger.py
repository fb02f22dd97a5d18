"""The ledger of budgets: accounts, slices and workers in the gateway's database.

One exchange is one transaction that locks its accounts' rows in the order of their ids; what to do is decided
by `exchange.decide`. Everything here blocks: call it in a thread. The time of heartbeats is the database's
own on PostgreSQL, where workers' machines may disagree, and the machine's on SQLite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, Conflict, NotFound
from agentic_flow.core.sql import Connection, SqlDatabase, execute
from agentic_flow.gateway.budgets.accounts import Account, BudgetState, account_name, rule_identity
from agentic_flow.gateway.budgets.exchange import Answer, Ask, Books, Change, Exchange, Slice, decide
from agentic_flow.gateway.budgets.periods import kept_until_s
from agentic_flow.gateway.policies import BudgetRule

LIVE_S = 10.0
"""A worker that was silent for so long has no share, and nobody waits for its money."""
DEAD_AFTER_S = 60.0
"""A worker that was silent for so long may be reconciled. It stopped to reserve before (`LEASE_S`)."""
WANTED_S = 3.0
"""How long the others hand back for a call that waits."""
ENDED_GRACE_S = 3600.0
"""Dead workers' slices of periods that ended so long ago are counted as spent without being asked."""
REMOVED_MAX = 500
REPORTED_MAX = 10_000
_KNOWN_MAX = 100_000
_WORKER_KEPT_S = 86_400.0

TABLES: tuple[str, ...] = (
    """CREATE TABLE IF NOT EXISTS gw_budget_accounts (
        id VARCHAR(32) PRIMARY KEY, rule_id VARCHAR(32) NOT NULL, scope TEXT NOT NULL, tenant TEXT NOT NULL,
        subject TEXT NOT NULL, starts_at BIGINT NOT NULL, ends_at BIGINT, kept_until BIGINT,
        limit_nano BIGINT NOT NULL, held_nano BIGINT NOT NULL, settled_nano BIGINT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS gw_budget_accounts_tenant ON gw_budget_accounts (tenant)",
    "CREATE INDEX IF NOT EXISTS gw_budget_accounts_rule ON gw_budget_accounts (rule_id, ends_at)",
    "CREATE INDEX IF NOT EXISTS gw_budget_accounts_kept ON gw_budget_accounts (kept_until)",
    """CREATE TABLE IF NOT EXISTS gw_budget_slices (
        account_id VARCHAR(32) NOT NULL, worker_id VARCHAR(64) NOT NULL, state VARCHAR(16) NOT NULL,
        ceiling_nano BIGINT NOT NULL, spent_nano BIGINT NOT NULL, reserved_nano BIGINT NOT NULL,
        wanted_nano BIGINT NOT NULL, wanted_at DOUBLE PRECISION NOT NULL,
        created_at DOUBLE PRECISION NOT NULL, updated_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (account_id, worker_id))""",
    "CREATE INDEX IF NOT EXISTS gw_budget_slices_worker ON gw_budget_slices (worker_id)",
    "CREATE INDEX IF NOT EXISTS gw_budget_slices_wanted ON gw_budget_slices (wanted_at)",
    """CREATE TABLE IF NOT EXISTS gw_budget_workers (
        id VARCHAR(64) PRIMARY KEY, started_at DOUBLE PRECISION NOT NULL,
        heartbeat_at DOUBLE PRECISION NOT NULL)""",
)

_HEARTBEAT = """INSERT INTO gw_budget_workers (id, started_at, heartbeat_at) VALUES (:worker, :now, :now)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = :now"""
_INSERT_ACCOUNT = """INSERT INTO gw_budget_accounts (id, rule_id, scope, tenant, subject, starts_at, ends_at,
    kept_until, limit_nano, held_nano, settled_nano) VALUES (:id, :rule_id, :scope, :tenant, :subject,
    :starts_at, :ends_at, :kept_until, :limit_nano, 0, 0) ON CONFLICT (id) DO NOTHING"""
_UPDATE_ACCOUNT = """UPDATE gw_budget_accounts SET limit_nano = :limit_nano, held_nano = :held_nano,
    settled_nano = :settled_nano WHERE id = :id"""
_PUT_SLICE = """INSERT INTO gw_budget_slices (account_id, worker_id, state, ceiling_nano, spent_nano,
    reserved_nano, wanted_nano, wanted_at, created_at, updated_at)
    VALUES (:id, :worker, 'live', :ceiling, :spent, :reserved, :wanted, :wanted_at, :now, :now)
    ON CONFLICT (account_id, worker_id) DO UPDATE SET state = 'live', ceiling_nano = :ceiling,
    spent_nano = :spent, reserved_nano = :reserved, wanted_nano = :wanted, wanted_at = :wanted_at,
    updated_at = :now"""
_DELETE_SLICE = "DELETE FROM gw_budget_slices WHERE account_id = :id AND worker_id = :worker"


class ExchangeFailed(Exception):
    """The database could not be used. `applied`: the transaction may have been committed all the same."""

    def __init__(self, error: AgenticFlowError, *, applied: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.applied = applied


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers by account id, and how many workers are alive."""

    answers: dict[str, Answer]
    live_workers: int


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker as the ledger sees it.

    Args:
        silent_s: Seconds since its last heartbeat.
        dead: It may be reconciled.
        accounts: Accounts of which it holds money.
        held_nano: The most that it holds of one account.
    """

    id: str
    silent_s: float
    dead: bool
    accounts: int
    held_nano: int


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What became of one slice of a dead worker: counted as spent, and given back to the account."""

    worker_id: str
    account: str
    account_id: str
    counted_nano: int
    released_nano: int


class Ledger:
    """The ledger of one worker's making.

    Args:
        database: Its tables (`TABLES`) exist.
        worker_id: At most 64 characters, never used by two processes.
        clock: Time of heartbeats on SQLite.
        dead_after_s: A worker that was silent for so long may be reconciled.
    """

    def __init__(
        self,
        database: SqlDatabase,
        worker_id: str,
        clock: Clock = SYSTEM_CLOCK,
        *,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._clock = clock
        self._dead_after_s = dead_after_s
        self._known: set[str] = set()

    def exchange(self, exchange: Exchange | None) -> Outcome:
        """Say that this worker lives, and settle, hand back and draw.

        Raises:
            ExchangeFailed: the database cannot be used now.
        """
        asks = sorted(exchange.asks, key=lambda ask: ask.account.id) if exchange else []
        wants = exchange.wants if exchange else ()
        wanted = {account_id for want in wants for account_id in want.account_ids}
        new = [ask for ask in asks if ask.account.id in wanted and ask.account.id not in self._known]
        finished = False
        try:
            if new and not self._database.is_sqlite:
                # Apart, so that every transaction takes its locks in one order.
                with self._database.transaction() as connection:
                    _insert_accounts(connection, new)
            with self._database.transaction() as connection:
                if new and self._database.is_sqlite:
                    _insert_accounts(connection, new)
                outcome = self._exchange(connection, exchange, asks)
                finished = True
        except AgenticFlowError as error:
            raise ExchangeFailed(error, applied=finished) from error
        self._remember(asks, outcome)
        return outcome

    def wanted(self) -> list[str]:
        """Accounts of which this worker holds a slice and for which calls of other workers wait."""
        with self._database.reading() as connection:
            return [
                row[0]
                for row in _rows(
                    connection,
                    "SELECT DISTINCT other.account_id FROM gw_budget_slices other JOIN gw_budget_slices own"
                    " ON own.account_id = other.account_id AND own.worker_id = :worker"
                    " WHERE other.wanted_at > :since AND other.worker_id <> :worker",
                    since=self._now(connection) - WANTED_S,
                    worker=self._worker_id,
                )
            ]

    def leave(self) -> None:
        """Forget this worker, unless it still holds something."""
        with self._database.transaction() as connection:
            execute(
                connection,
                "DELETE FROM gw_budget_workers WHERE id = :worker AND NOT EXISTS"
                " (SELECT 1 FROM gw_budget_slices WHERE worker_id = :worker AND ceiling_nano > spent_nano)",
                worker=self._worker_id,
            )

    def report(
        self, rules: Sequence[BudgetRule], time_s: float, tenant: str | None = None
    ) -> list[BudgetState]:
        """All accounts of these rules whose periods have not ended, the fullest first; or one tenant's."""
        by_id: dict[str, BudgetRule] = {}
        for rule in rules:
            same = by_id.get(rule_identity(rule))
            if same is None or rule.limit_nano_usd < same.limit_nano_usd:
                by_id[rule_identity(rule)] = rule
        if not by_id:
            return []
        found = self._database.rows(
            "SELECT id, rule_id, tenant, subject, starts_at, ends_at, settled_nano, held_nano"
            " FROM gw_budget_accounts WHERE rule_id IN :rules AND (ends_at IS NULL OR ends_at > :now)"
            " AND (:everybody = 1 OR tenant = :tenant)"
            " ORDER BY settled_nano + held_nano DESC, id LIMIT :most",
            most=REPORTED_MAX,
            rules=list(by_id),
            now=int(time_s),
            everybody=int(tenant is None),
            tenant=_stored(tenant or ""),
        )
        states: list[BudgetState] = []
        for account_id, rule_id, owner, subject, starts_at, ends_at, settled, held in found:
            rule = by_id[rule_id]
            whose = _loaded(owner)
            name = account_name(rule.scope, whose, _loaded(subject))
            limit = rule.limit_nano_usd
            states.append(
                BudgetState(
                    rule, name, account_id, limit, settled, held, starts_at, ends_at, time_s, tenant=whose
                )
            )
        return states

    def workers(self) -> list[WorkerState]:
        """All workers that have a heartbeat or hold money, the longest silent first."""
        with self._database.reading() as connection:
            now = self._now(connection)
            found = _rows(
                connection,
                "SELECT w.id, w.heartbeat_at, COUNT(s.account_id), MAX(s.ceiling_nano - s.spent_nano)"
                " FROM gw_budget_workers w LEFT JOIN gw_budget_slices s"
                " ON s.worker_id = w.id AND s.ceiling_nano > s.spent_nano"
                " GROUP BY w.id, w.heartbeat_at ORDER BY w.heartbeat_at, w.id",
            )
            return [
                WorkerState(
                    worker,
                    max(0.0, now - beat),
                    beat <= now - self._dead_after_s,
                    count,
                    max(0, int(held or 0)),
                )
                for worker, beat, count, held in found
            ]

    def reconcile(
        self, worker_id: str | None, spent_nano: int | None, account_id: str | None
    ) -> list[Reconciled]:
        """See `Budgets.reconcile`."""
        with self._database.transaction() as connection:
            now = self._now(connection)
            which = "heartbeat_at <= :dead" if worker_id is None else "id = :worker"
            found = self._locked(
                connection,
                f"SELECT id, heartbeat_at FROM gw_budget_workers WHERE {which} ORDER BY id",  # noqa: S608
                worker=worker_id,
                dead=now - self._dead_after_s,
            )
            if worker_id is not None and not found:
                raise NotFound(
                    f"the ledger knows no worker {worker_id!r}",
                    hint="list the workers; one that closed in order needs no reconciling",
                )
            for worker, heartbeat_at in found:
                if heartbeat_at > now - self._dead_after_s:
                    raise Conflict(
                        f"worker {worker!r} was heard {now - heartbeat_at:.1f} s ago",
                        hint=f"stop it, then wait until it was silent for {self._dead_after_s:.0f} s",
                    )
            dead = [worker for worker, _ in found]
            done = self._write_off(connection, dead, spent_nano, account_id, now)
            self._forget_workers(connection, dead)
            return done

    def tidy(self, time_s: float) -> int:
        """Close the books of periods long over: a small batch. Returns how many accounts were removed.

        Slices of dead workers in periods that have ended count as spent; accounts are removed when their
        time (`periods.kept_until_s`) is over, unless a live worker still holds something of them.
        """
        # Three transactions: each takes its locks in the order that exchanges keep.
        with self._database.transaction() as connection:
            self._close_ended(connection, time_s)
        with self._database.transaction() as connection:
            old = self._locked(
                connection,
                "SELECT a.id FROM gw_budget_accounts a WHERE a.kept_until < :now AND NOT EXISTS"
                " (SELECT 1 FROM gw_budget_slices s"
                " WHERE s.account_id = a.id AND s.ceiling_nano > s.spent_nano) ORDER BY a.id LIMIT :most",
                now=int(time_s),
                most=REMOVED_MAX,
            )
            self._remove(connection, [row[0] for row in old])
        with self._database.transaction() as connection:
            gone = self._locked(
                connection,
                "SELECT id FROM gw_budget_workers WHERE heartbeat_at <= :long ORDER BY id LIMIT :most",
                long=self._now(connection) - _WORKER_KEPT_S,
                most=REMOVED_MAX,
            )
            self._forget_workers(connection, [row[0] for row in gone])
        return len(old)

    def erase_tenant(self, tenant: str) -> int:
        """Remove all accounts of a tenant with their slices. Returns how many there were."""
        with self._database.transaction() as connection:
            found = self._locked(
                connection,
                "SELECT id FROM gw_budget_accounts WHERE tenant = :tenant ORDER BY id",
                tenant=_stored(tenant),
            )
            ids = [row[0] for row in found]
            for start in range(0, len(ids), REMOVED_MAX):
                self._remove(connection, ids[start : start + REMOVED_MAX])
            self._known.difference_update(ids)
            return len(ids)

    def _close_ended(self, connection: Connection, time_s: float) -> None:
        dead = self._now(connection) - self._dead_after_s
        found = _rows(
            connection,
            "SELECT s.account_id, s.worker_id FROM gw_budget_slices s"
            " JOIN gw_budget_accounts a ON a.id = s.account_id"
            " LEFT JOIN gw_budget_workers w ON w.id = s.worker_id"
            " WHERE a.ends_at < :ended AND s.ceiling_nano > s.spent_nano"
            " AND (w.id IS NULL OR w.heartbeat_at <= :dead) ORDER BY s.account_id LIMIT :most",
            ended=int(time_s - ENDED_GRACE_S),
            dead=dead,
            most=REMOVED_MAX,
        )
        workers: dict[str, list[str]] = {}
        for account_id, worker in found:
            workers.setdefault(account_id, []).append(worker)
        for account_id in sorted(workers):
            self._write_off(connection, workers[account_id], None, account_id, dead + self._dead_after_s)

    def _exchange(self, connection: Connection, exchange: Exchange | None, asks: Sequence[Ask]) -> Outcome:
        now = self._now(connection)
        execute(connection, _HEARTBEAT, worker=self._worker_id, now=now)
        live = execute(
            connection,
            "SELECT COUNT(*) FROM gw_budget_workers WHERE heartbeat_at > :since",
            since=now - LIVE_S,
        ).scalar_one()
        if exchange is None:
            return Outcome({}, live)
        books = self._books(connection, [ask.account.id for ask in asks], now)
        decision = decide(exchange, books, live)
        limits = {ask.account.id: ask.limit_nano for ask in asks}
        self._write(connection, decision.changes, limits, now)
        return Outcome(decision.answers, live)

    def _books(self, connection: Connection, ids: Sequence[str], now: float) -> dict[str, Books]:
        accounts = self._locked(
            connection,
            "SELECT id, settled_nano, held_nano FROM gw_budget_accounts WHERE id IN :ids ORDER BY id",
            ids=list(ids),
        )
        own: dict[str, Slice] = {}
        free: dict[str, int] = {}
        wanted: set[str] = set()
        slices = _rows(
            connection,
            "SELECT s.account_id, s.worker_id, s.ceiling_nano, s.spent_nano, s.reserved_nano, s.wanted_nano,"
            " s.wanted_at, COALESCE(w.heartbeat_at, 0) FROM gw_budget_slices s"
            " LEFT JOIN gw_budget_workers w ON w.id = s.worker_id WHERE s.account_id IN :ids",
            ids=[row[0] for row in accounts],
        )
        for account_id, worker, ceiling, spent, reserved, lacks, wanted_at, heartbeat_at in slices:
            if worker == self._worker_id:
                own[account_id] = Slice(ceiling, spent, reserved, lacks)
            elif heartbeat_at > now - LIVE_S:
                free[account_id] = free.get(account_id, 0) + max(0, ceiling - spent - reserved)
                if lacks and wanted_at > now - WANTED_S:
                    wanted.add(account_id)
        return {
            account_id: Books(
                settled, held, own.get(account_id), free.get(account_id, 0), account_id in wanted
            )
            for account_id, settled, held in accounts
        }

    def _write(
        self, connection: Connection, changes: Mapping[str, Change], limits: Mapping[str, int], now: float
    ) -> None:
        if not changes:
            return
        accounts = [
            {
                "id": account_id,
                "limit_nano": limits[account_id],
                "held_nano": change.held_nano,
                "settled_nano": change.settled_nano,
            }
            for account_id, change in changes.items()
        ]
        _execute_many(connection, _UPDATE_ACCOUNT, accounts)
        kept = [
            {
                "id": account_id,
                "worker": self._worker_id,
                "ceiling": own.ceiling_nano,
                "spent": own.spent_nano,
                "reserved": own.reserved_nano,
                "wanted": own.wanted_nano,
                "wanted_at": now if own.wanted_nano else 0.0,
                "now": now,
            }
            for account_id, change in changes.items()
            if (own := change.own) is not None
        ]
        _execute_many(connection, _PUT_SLICE, kept)
        closed = [
            {"id": key, "worker": self._worker_id} for key, change in changes.items() if change.own is None
        ]
        _execute_many(connection, _DELETE_SLICE, closed)

    def _write_off(
        self,
        connection: Connection,
        workers: Sequence[str],
        spent_nano: int | None,
        only_account: str | None,
        now: float,
    ) -> list[Reconciled]:
        if not workers:
            return []
        ids = {
            row[0]
            for row in _rows(
                connection,
                "SELECT account_id FROM gw_budget_slices WHERE worker_id IN :workers",
                workers=list(workers),
            )
        }
        done: list[Reconciled] = []
        for account_id in sorted(ids if only_account is None else ids & {only_account}):
            done += self._write_off_account(connection, account_id, workers, spent_nano, now)
        return done

    def _write_off_account(
        self,
        connection: Connection,
        account_id: str,
        workers: Sequence[str],
        spent_nano: int | None,
        now: float,
    ) -> list[Reconciled]:
        locked = self._locked(
            connection,
            "SELECT scope, tenant, subject, held_nano, settled_nano FROM gw_budget_accounts WHERE id = :id",
            id=account_id,
        )
        if not locked:
            return []
        scope, tenant, subject, total_held, settled = locked[0]
        name = account_name(scope, _loaded(tenant), _loaded(subject))
        slices = _rows(
            connection,
            "SELECT worker_id, ceiling_nano, spent_nano FROM gw_budget_slices WHERE account_id = :id"
            " AND worker_id IN :workers AND ceiling_nano > spent_nano ORDER BY worker_id",
            id=account_id,
            workers=list(workers),
        )
        done: list[Reconciled] = []
        for worker, ceiling, spent in slices:
            held = ceiling - spent
            counted = held if spent_nano is None else min(held, spent_nano)
            total_held -= held
            settled += counted
            execute(
                connection,
                "UPDATE gw_budget_slices SET state = 'reconciled', ceiling_nano = :spent,"
                " spent_nano = :spent, reserved_nano = 0, wanted_nano = 0, wanted_at = 0, updated_at = :now"
                " WHERE account_id = :id AND worker_id = :worker",
                spent=spent + counted,
                now=now,
                id=account_id,
                worker=worker,
            )
            done.append(Reconciled(worker, name, account_id, counted, held - counted))
        execute(
            connection,
            "UPDATE gw_budget_accounts SET held_nano = :held, settled_nano = :settled WHERE id = :id",
            held=total_held,
            settled=settled,
            id=account_id,
        )
        return done

    def _forget_workers(self, connection: Connection, workers: Sequence[str]) -> None:
        # Slices that hold nothing stay: should the worker be alive after all, it goes on from there.
        if workers:
            execute(
                connection,
                "DELETE FROM gw_budget_workers WHERE id IN :workers AND NOT EXISTS"
                " (SELECT 1 FROM gw_budget_slices s WHERE s.worker_id = gw_budget_workers.id"
                " AND s.ceiling_nano > s.spent_nano)",
                workers=list(workers),
            )

    def _remove(self, connection: Connection, ids: Sequence[str]) -> None:
        if ids:
            execute(connection, "DELETE FROM gw_budget_slices WHERE account_id IN :ids", ids=list(ids))
            execute(connection, "DELETE FROM gw_budget_accounts WHERE id IN :ids", ids=list(ids))

    def _remember(self, asks: Sequence[Ask], outcome: Outcome) -> None:
        if len(self._known) > _KNOWN_MAX:
            self._known.clear()
        for ask in asks:
            if ask.account.id in outcome.answers:
                self._known.add(ask.account.id)
            else:
                self._known.discard(ask.account.id)

    def _locked(self, connection: Connection, select: str, **bindings: Any) -> list[Sequence[Any]]:
        return _rows(connection, select + self._database.for_update, **bindings)

    def _now(self, connection: Connection) -> float:
        if self._database.is_sqlite:
            return self._clock.time_s()
        statement = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"
        return float(execute(connection, statement).scalar_one())


def _rows(connection: Connection, select: str, **bindings: Any) -> list[Sequence[Any]]:
    return [tuple(row) for row in execute(connection, select, **bindings)]


def _insert_accounts(connection: Connection, asks: Sequence[Ask]) -> None:
    _execute_many(connection, _INSERT_ACCOUNT, [_account_row(ask.account, ask.limit_nano) for ask in asks])


def _account_row(account: Account, limit_nano: int) -> dict[str, Any]:
    return {
        "id": account.id,
        "rule_id": account.rule_id,
        "scope": account.rule.scope,
        "tenant": _stored(account.tenant),
        "subject": _stored(account.subject),
        "starts_at": account.start_s,
        "ends_at": account.end_s,
        "kept_until": kept_until_s(account.rule.period, account.end_s),
        "limit_nano": limit_nano,
    }


def _execute_many(connection: Connection, statement: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)


def _stored(text: str) -> str:
    """As the database keeps callers' words: PostgreSQL takes no NUL, and neither takes lone surrogates."""
    return json.dumps(text)[1:-1]


def _loaded(text: str) -> str:
    return str(json.loads(f'"{text}"'))
