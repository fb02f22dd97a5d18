"""The policies of the gateway, version by version, in its database; and the copy that each process acts on.

Rows are only ever added: who changed what, when and why stays readable, and an earlier version is restored by
storing it again. A document is kept as its operator wrote it, without defaults, so that gateways of two
releases can share a database as long as nobody uses what the older one does not know.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson
import structlog
from pydantic import ValidationError

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    InvalidInput,
    NotFound,
    TooLarge,
)
from agentic_flow.core.sql import SqlDatabase, execute
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.routing.names import check_names

_log = structlog.get_logger(__name__)

DOCUMENT_MAX_BYTES = 1024 * 1024
WORDS_MAX = 2000
HISTORY_MAX = 10_000

TABLES: tuple[str, ...] = (
    """
    CREATE TABLE IF NOT EXISTS gw_policies (
        version BIGINT PRIMARY KEY,
        at_s DOUBLE PRECISION NOT NULL,
        by_whom TEXT NOT NULL,
        reason TEXT NOT NULL,
        document TEXT NOT NULL,
        digest TEXT NOT NULL
    )
    """,
)

_NEWEST = """
SELECT version, at_s, by_whom, reason, document, digest FROM gw_policies ORDER BY version DESC LIMIT 1
"""
_ONE = "SELECT version, at_s, by_whom, reason, document, digest FROM gw_policies WHERE version = :version"
_ADD = """
INSERT INTO gw_policies (version, at_s, by_whom, reason, document, digest)
VALUES (:version, :at_s, :by_whom, :reason, :document, :digest)
"""


class StoredPolicies(NamedTuple):
    """One version. Version 0 is what holds before anything was stored: nothing."""

    version: int
    policies: GatewayPolicies
    at_s: float
    by: str
    reason: str


class PolicyChange(NamedTuple):
    """A version without its document."""

    version: int
    at_s: float
    by: str
    reason: str


class PolicyStore:
    """Reads and adds versions. Calls block: run them in a thread.

    Args:
        database: One whose tables include `TABLES`, made.
        clock: Dates the versions.
    """

    def __init__(self, database: SqlDatabase, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._database = database
        self._clock = clock

    def current(self) -> StoredPolicies:
        """The newest version.

        Raises:
            Unavailable: the database cannot be used now.
            DataCorrupted: the stored document is damaged, or this release cannot read it.
        """
        found = self._database.rows(_NEWEST)
        return _read(found[0]) if found else StoredPolicies(0, GatewayPolicies(), 0.0, "", "")

    def get(self, version: int) -> StoredPolicies:
        """One version; raises as `current` does, and NotFound for one that was never stored."""
        found = self._database.rows(_ONE, version=version)
        if not found:
            raise NotFound(
                f"the policies have no version {version!r}", hint="`agentic-flow policies history` lists them"
            )
        return _read(found[0])

    def history(self, limit: int = 100) -> list[PolicyChange]:
        """The newest versions, newest first, readable or not.

        Args:
            limit: At most so many, up to `HISTORY_MAX`.
        """
        if not 1 <= limit <= HISTORY_MAX:
            raise InvalidInput(f"limit {limit!r} is out of bounds", hint=f"give 1 to {HISTORY_MAX}")
        found = self._database.rows(
            "SELECT version, at_s, by_whom, reason FROM gw_policies ORDER BY version DESC LIMIT :limit",
            limit=limit,
        )
        return [PolicyChange(int(row[0]), float(row[1]), row[2], row[3]) for row in found]

    def newest(self) -> tuple[int, str]:
        """Number and digest of the newest version, (0, "") for none: whether anything changed."""
        found = self._database.rows("SELECT version, digest FROM gw_policies ORDER BY version DESC LIMIT 1")
        return (int(found[0][0]), str(found[0][1])) if found else (0, "")

    def put(self, policies: GatewayPolicies, *, expected_version: int | None, by: str, reason: str) -> int:
        """Store a new version and return its number.

        Args:
            policies: All of them; they replace the earlier ones as a whole.
            expected_version: The version that they were made from; None replaces whatever there is.
            by: Who decides it.
            reason: Why.

        Raises:
            Conflict: another version than the expected one is the newest; says which.
            InvalidInput: an alias or route could not be followed, or nobody or no reason is named.
            TooLarge: the document is over `DOCUMENT_MAX_BYTES`.
            Unavailable: the database cannot be used now.
        """
        check_names(policies)
        by, reason = _words("by", by), _words("reason", reason)
        document = _written(policies)
        if len(document.encode()) > DOCUMENT_MAX_BYTES:
            raise TooLarge(
                f"the policies have {len(document.encode())} bytes",
                hint=f"the limit is {DOCUMENT_MAX_BYTES}; name fewer things one by one",
            )
        with self._database.transaction() as connection:
            if not self._database.is_sqlite:
                # Of two that add a version only one may go on; readers are not held up.
                execute(connection, "LOCK TABLE gw_policies IN SHARE ROW EXCLUSIVE MODE")
            found = execute(connection, "SELECT COALESCE(MAX(version), 0) FROM gw_policies").scalar_one()
            newest = int(found)
            if expected_version is not None and newest != expected_version:
                raise Conflict(
                    f"the policies are at version {newest!r}, not at {expected_version!r}",
                    hint="read them again, and make the change to what is there now",
                    details={"version": newest, "expected_version": expected_version},
                )
            row = (newest + 1, self._clock.time_s(), by, reason, document)
            execute(
                connection,
                _ADD,
                version=row[0],
                at_s=row[1],
                by_whom=by,
                reason=reason,
                document=document,
                digest=_digest(*row),
            )
        _log.info("policies_stored", version=row[0], by=by, reason=reason)
        return row[0]


class PolicyWatch:
    """The policies in force in this process: loaded once, then again whenever the database has others.

    While the database is away the last good ones stay in force.

    Args:
        store: Where they are.
        interval_s: Between looks, in seconds.
        clock: Waits between looks.
    """

    def __init__(self, store: PolicyStore, *, interval_s: float = 1.0, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._interval_s = interval_s
        self._clock = clock
        self._loading = asyncio.Lock()
        self._callbacks: list[Callable[[GatewayPolicies, int], None]] = []
        self._digest = ""
        self._failing = False
        self._task: asyncio.Task[None] | None = None
        self.policies = GatewayPolicies()
        self.version = 0

    def on_change(self, callback: Callable[[GatewayPolicies, int], None]) -> None:
        """Call this with the policies and their version whenever they change, in the event loop.

        Also for those found by `start`, when there are any.
        """
        self._callbacks.append(callback)

    async def start(self) -> None:
        """Load them, and begin to watch.

        Raises:
            Unavailable, DataCorrupted: they cannot be read; nothing is watched then.
        """
        await self.refresh()
        self._task = asyncio.create_task(self._watch(), name="policy watch")

    async def close(self) -> None:
        """Stop watching; what was loaded stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def refresh(self) -> None:
        """Look now; raises as `start` does, and what was in force stays in force then."""
        async with self._loading:
            loaded = await asyncio.to_thread(self._load)
            if loaded is not None:
                self._take(*loaded)

    def _load(self) -> tuple[StoredPolicies, str] | None:
        """What differs from what is in force; by digest too, since a restored database counts anew."""
        version, digest = self._store.newest()
        if (version, digest) == (self.version, self._digest):
            return None
        if version == 0:
            return StoredPolicies(0, GatewayPolicies(), 0.0, "", ""), ""
        return self._store.get(version), digest

    def _take(self, stored: StoredPolicies, digest: str) -> None:
        self.policies, self.version, self._digest = stored.policies, stored.version, digest
        _log.info("policies_changed", version=stored.version, by=stored.by, reason=stored.reason)
        for callback in self._callbacks:
            try:
                callback(stored.policies, stored.version)
            except Exception:  # noqa: BLE001 - whatever a listener does
                # The others must hear of it all the same.
                _log.exception("policy_callback_failed", version=stored.version)

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(self._interval_s)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - even a flaw of ours must not end the watch
                if not self._failing:
                    _log.error(
                        "policies_unreadable",
                        version_in_force=self.version,
                        error_code=error.code if isinstance(error, AgenticFlowError) else "internal",
                        error=str(error),
                    )
                self._failing = True
            else:
                if self._failing:
                    _log.warning("policies_readable_again", version=self.version)
                self._failing = False


def parse_policies(data: Mapping[str, Any], *, source: str) -> GatewayPolicies:
    """Policies from a document that somebody wrote.

    Args:
        data: The document.
        source: Where it is from, for errors.

    Raises:
        InvalidInput: a field is unknown or wrong, or a name cannot be followed; names the field.
    """
    try:
        policies = GatewayPolicies.model_validate(data)
    except ValidationError as error:
        first, *others = [
            f"{_field(entry['loc'])} = {_shortened(entry['input'])}: {entry['msg']}"
            for entry in error.errors(include_url=False)
        ]
        also = f"; and {len(others)} more, the next is {others[0]}" if others else ""
        raise InvalidInput(f"{source!r} is refused: {first}", hint=f"correct that field{also}") from None
    check_names(policies)
    return policies


def _read(row: Any) -> StoredPolicies:
    version, at_s, by, reason, document, digest = row
    if digest != _digest(version, at_s, by, reason, document):
        raise DataCorrupted(
            f"version {version!r} of the gateway's policies fails its checksum",
            hint="restore a backup, or an earlier version by `agentic-flow policies restore`",
        )
    try:
        policies = GatewayPolicies.model_validate_json(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataCorrupted(
            f"version {version!r} of the gateway's policies cannot be read: "
            f"{_field(first['loc'])}: {first['msg']}",
            hint="run the release that wrote it, or restore an earlier version by "
            "`agentic-flow policies restore`",
        ) from None
    return StoredPolicies(int(version), policies, float(at_s), by, reason)


def _written(policies: GatewayPolicies) -> str:
    try:
        document = policies.model_dump_json(exclude_unset=True)
        type(policies).model_validate_json(document)
        orjson.dumps(policies.model_dump(mode="json"))  # as it leaves over HTTP: whole numbers of 64 bits
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            f"the policies cannot be written as JSON: {' '.join(str(error).split())[:200]}",
            hint="give text, numbers of 64 bits, lists and tables only",
        ) from error
    return document


def _digest(version: int, at_s: float, by: str, reason: str, document: str) -> str:
    hashed = hashlib.sha256()
    for part in (str(int(version)), repr(float(at_s)), by, reason, document):
        encoded = part.encode()
        hashed.update(len(encoded).to_bytes(8, "big") + encoded)
    return hashed.hexdigest()


def _words(name: str, text: str) -> str:
    text = text.strip()
    if not text or len(text) > WORDS_MAX or "\0" in text or not _is_unicode(text):
        raise InvalidInput(
            f"{name} {text[:40]!r} is refused", hint=f"give 1 to {WORDS_MAX} characters: it is kept for good"
        )
    return text


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, as words of a command line in a wrong encoding do."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _field(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or "the document"


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
