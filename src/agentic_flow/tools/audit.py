"""The audit log: who called which tool with what, what was decided, how it ended. Append-only, hash-chained.

Each record's hash covers its content and the hash of the record before it, so changing, removing or moving
a record breaks the chain from there on. The newest hash is kept beside the records, so removing the last
ones shows as well. Somebody who can rewrite the whole file can forge a whole chain: who fears that keeps
`head()` elsewhere from time to time and compares.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import apsw
import orjson

from agentic_flow.core.db import Database, rows
from agentic_flow.core.messages import JsonObject

Outcome = Literal["started", "ok", "error", "refused", "timeout", "cancelled"]
"""`started` precedes the outcome of every call that may change something."""

GENESIS = "0" * 64
TEXT_CHARS_MAX = 500
"""Longer texts are recorded as their length and hash."""

_MIGRATIONS = (
    """
    CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY, at_s REAL NOT NULL, tenant TEXT NOT NULL, subject TEXT NOT NULL,
        run_id TEXT, agent TEXT, tool TEXT NOT NULL, idempotency_key TEXT, arguments_sha256 TEXT NOT NULL,
        arguments TEXT NOT NULL, decision TEXT NOT NULL, outcome TEXT NOT NULL, error_code TEXT,
        duration_s REAL NOT NULL, previous_hash TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT;
    CREATE INDEX audit_by_run ON audit (tenant, run_id, sequence);
    CREATE TABLE audit_head (
        only INTEGER PRIMARY KEY CHECK (only = 1), sequence INTEGER NOT NULL, hash TEXT NOT NULL
    ) STRICT;
    """,
)
_COLUMNS = (
    "sequence, at_s, tenant, subject, run_id, agent, tool, idempotency_key, arguments_sha256, arguments, "
    "decision, outcome, error_code, duration_s, previous_hash"
)
_VERIFY_BATCH = 1000

_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?$|secret|token|api_?key|authori[sz]ation|credential|cookie", re.I
)
_SECRET_TEXT = re.compile(
    r"\b(?:sk|pk|rk|ghp|gho|ghs|github_pat|xox[abprs])[-_][A-Za-z0-9_-]{12,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|\b[Bb]earer\s+[A-Za-z0-9._~+/-]{12,}=*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
REDACTED = "[redacted]"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the caller of `append` knows. `arguments` are redacted before they are stored."""

    at_s: float
    tenant: str
    subject: str
    run_id: str | None
    agent: str | None
    tool: str
    idempotency_key: str | None
    arguments: Mapping[str, Any]
    decision: str
    outcome: Outcome
    error_code: str | None = None
    duration_s: float = 0.0
    private: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Record:
    """One stored record. `arguments` is JSON text; `hash` covers every other field."""

    sequence: int
    at_s: float
    tenant: str
    subject: str
    run_id: str | None
    agent: str | None
    tool: str
    idempotency_key: str | None
    arguments_sha256: str
    arguments: str
    decision: str
    outcome: str
    error_code: str | None
    duration_s: float
    previous_hash: str

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of all fields, keys sorted."""
        return hashlib.sha256(orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS)).hexdigest()


class AuditLog:
    """The log in its SQLite file. Several processes may append to one file.

    Args:
        path: The file, created with its folder.

    Raises:
        DataCorrupted, Unavailable: the file is no healthy database, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _MIGRATIONS, readers=2)

    async def append(self, entry: Entry) -> int:
        """Add a record; returns its sequence once it is durable."""
        return await self._database.write(lambda connection: _append(connection, entry))

    def append_soon(self, entry: Entry) -> None:
        """Queue a record without waiting for it, for a caller who is being cancelled."""
        self._database.submit(lambda connection: _append(connection, entry))

    async def verify(self) -> int | None:
        """The first sequence at which the chain is broken (changed, missing or moved); None when whole."""
        return await self._database.read(_first_broken)

    async def head(self) -> tuple[int, str]:
        """(sequence, hash) of the newest record; (0, GENESIS) when there is none."""
        return await self._database.read(_head)

    async def records(
        self, tenant: str, *, run_id: str | None = None, after: int = 0, limit: int = 100
    ) -> list[Record]:
        """Records of a tenant in order, after a sequence; of one run when `run_id` is given."""

        def read(connection: apsw.Connection) -> list[Record]:
            found = rows(
                connection,
                f"SELECT {_COLUMNS} FROM audit WHERE tenant = ? AND (? IS NULL OR run_id = ?) "  # noqa: S608
                "AND sequence > ? ORDER BY sequence LIMIT ?",
                (tenant, run_id, run_id, after, limit),
            )
            return [Record(*row) for row in found]

        return await self._database.read(read)

    def close(self) -> None:
        """Finish queued appends, then close. Idempotent."""
        self._database.close()


def _append(connection: apsw.Connection, entry: Entry) -> int:
    # Inside the write transaction, so that no other process extends the chain between look and insert.
    sequence, previous = _head(connection)
    canonical = orjson.dumps(dict(entry.arguments), option=orjson.OPT_SORT_KEYS)
    record = Record(
        sequence=sequence + 1,
        at_s=float(entry.at_s),
        tenant=entry.tenant,
        subject=entry.subject,
        run_id=entry.run_id,
        agent=entry.agent,
        tool=entry.tool,
        idempotency_key=entry.idempotency_key,
        arguments_sha256=hashlib.sha256(canonical).hexdigest(),
        arguments=orjson.dumps(
            redacted(entry.arguments, entry.private), option=orjson.OPT_SORT_KEYS
        ).decode(),
        decision=entry.decision,
        outcome=entry.outcome,
        error_code=entry.error_code,
        duration_s=float(entry.duration_s),
        previous_hash=previous,
    )
    marks = ", ".join("?" * 16)
    values = (*asdict(record).values(), record.hash)
    rows(connection, f"INSERT INTO audit ({_COLUMNS}, hash) VALUES ({marks})", values)  # noqa: S608
    rows(
        connection,
        "INSERT INTO audit_head (only, sequence, hash) VALUES (1, ?, ?) "
        "ON CONFLICT (only) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash",
        (record.sequence, record.hash),
    )
    return record.sequence


def _head(connection: apsw.Connection) -> tuple[int, str]:
    found = rows(connection, "SELECT sequence, hash FROM audit_head")
    return (int(found[0][0]), str(found[0][1])) if found else (0, GENESIS)


def _first_broken(connection: apsw.Connection) -> int | None:
    expected, previous = 1, GENESIS
    after = -(2**63)
    while batch := rows(
        connection,
        f"SELECT {_COLUMNS}, hash FROM audit WHERE sequence > ? ORDER BY sequence LIMIT {_VERIFY_BATCH}",  # noqa: S608
        (after,),
    ):
        for *fields, stored in batch:
            record = Record(*cast(Any, fields))
            if record.sequence != expected or record.previous_hash != previous or record.hash != stored:
                return min(expected, record.sequence)
            expected, previous = expected + 1, stored
        after = int(batch[-1][0])
    return None if _head(connection) == (expected - 1, previous) else expected


def redacted(arguments: Mapping[str, Any], private: frozenset[str] = frozenset()) -> JsonObject:
    """Arguments as the log keeps them: without secrets, private texts and long texts."""
    return {
        name: _digested(_text(value)) if name in private and value is not None else _redact(name, value)
        for name, value in arguments.items()
    }


def _redact(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _redact(str(key), item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_redact(name, item) for item in cast(list[Any], value)]
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name) and value:
        return REDACTED
    if len(value) > TEXT_CHARS_MAX:
        return _digested(value)
    return _SECRET_TEXT.sub(REDACTED, value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _digested(text: str) -> JsonObject:
    return {"chars": len(text), "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
