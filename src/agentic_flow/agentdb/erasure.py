"""Erasing a tenant from the sealed history, and telling which backups still hold it.

Its records lose their content and keep their place, so that other tenants' history stays whole. The erasure
itself is a record, which names the tenant only by a salted hash: restoring an older backup needs to know
whose rows must not come back, and it has the names to compare.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import apsw

from agentic_flow.agentdb import segments
from agentic_flow.agentdb.names import check_tenant
from agentic_flow.agentdb.segment_files import list_segments, locked, replace_file, whole_segment
from agentic_flow.agentdb.segments import Kind, Record
from agentic_flow.core.db import rows
from agentic_flow.core.errors import DataCorrupted, PathNotFound, Unavailable

BACKUP_DATABASE = "agentdb.db"
"""File of a backup that is the database."""
MANIFEST = "manifest.json"
"""File of a backup that says what it is."""
PART = ".part"
"""Ending of a folder that is being written; a crash may leave it, and it can be removed."""

_SALT_BYTES = 16
_LOCK_WAIT_S = 30.0
_FOLDERS_DEEP_MAX = 4


@dataclass(frozen=True, slots=True)
class Mark:
    """A tenant by a salted hash of its name."""

    salt: bytes
    sha256: bytes

    @classmethod
    def of(cls, tenant: str) -> Self:
        """A new mark of the tenant."""
        salt = os.urandom(_SALT_BYTES)
        return cls(salt, _hashed(salt, tenant))

    @classmethod
    def read(cls, payload: bytes) -> Self:
        """The mark in the payload of an ERASURE record."""
        return cls(payload[:_SALT_BYTES], payload[_SALT_BYTES:])

    def payload(self) -> bytes:
        """Payload of an ERASURE record."""
        return self.salt + self.sha256

    def is_of(self, tenant: str) -> bool:
        """Whether this tenant is meant."""
        return hmac.compare_digest(self.sha256, _hashed(self.salt, tenant))


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """What erasing did to the sealed history.

    Args:
        records: Records that lost their content.
        segments: Files that were written again.
    """

    records: int
    segments: int


def erase_from_history(
    history_dir: Path, database_id: str, tenant: str, sequence: int, *, wait_s: float = _LOCK_WAIT_S
) -> ErasureReport:
    """Remove the content of the tenant's records up to `sequence` from the sealed segments of a database.

    `History` does this by itself for an erasure that it recorded. Repeating it is harmless.

    Raises:
        PathNotFound: there is no history of this database.
        Unavailable: another process writes it, or a file cannot be written; what was done stays done.
        DataCorrupted: a segment is damaged; none of it was written again.
    """
    folder = history_dir / database_id
    if not folder.is_dir():
        raise PathNotFound(f"there is no history in {str(folder)!r}", hint="give the folder of the history")
    check_tenant(tenant)
    try:
        with locked(folder, wait_s):
            return _erase(folder, lambda record: record.tenant == tenant and record.last <= sequence)
    except OSError as error:
        raise Unavailable(
            f"the history in {str(folder)!r} cannot be written: {error.strerror or error}",
            hint="correct that and erase the tenant again",
        ) from error


def erase_sealed(folder: Path, mark: Mark, sequence: int) -> ErasureReport:
    """Remove the content of the marked tenant's records up to `sequence`; the caller holds the lock.

    Raises:
        OSError: a file cannot be written.
        DataCorrupted: a segment is damaged.
    """
    known: dict[str, bool] = {}

    def is_meant(record: Record) -> bool:
        if record.last > sequence:
            return False
        if record.tenant not in known:
            known[record.tenant] = mark.is_of(record.tenant)
        return known[record.tenant]

    return _erase(folder, is_meant)


def backups_holding(tenant: str, folders: Iterable[Path]) -> list[Path]:
    """The backups, finished or left behind by a crash, that hold rows or waiting changes of the tenant.

    Args:
        folders: Backups, or folders with backups in them (up to four deep).

    Raises:
        PathNotFound: a folder does not exist.
        DataCorrupted: a backup cannot be read, so that nobody can tell.
    """
    check_tenant(tenant)
    holding: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise PathNotFound(f"{str(folder)!r} is no folder", hint="give folders that hold backups")
        holding += [file.parent for file in _databases(folder) if _holds(file, tenant)]
    return holding


def open_readonly(path: Path) -> apsw.Connection:
    """Open a database that nobody writes (a backup) without writing beside it either.

    Raises:
        apsw.Error: it cannot be read.
    """
    name = f"file:{_uri(path)}?immutable=1"
    return apsw.Connection(name, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)


def _erase(folder: Path, is_meant: Callable[[Record], bool]) -> ErasureReport:
    erased = files = 0
    # All are read before the first is written: a damaged one must not leave the work half done.
    wanted = [
        (file, [r.last for r in whole_segment(file).records if r.kind is Kind.PATCH and is_meant(r)])
        for file in list_segments(folder)
    ]
    for file, sequences in wanted:
        if sequences:
            replace_file(file.path, (segments.erase_records(file.path.read_bytes(), sequences),))
            erased += len(sequences)
            files += 1
    return ErasureReport(erased, files)


def _hashed(salt: bytes, tenant: str) -> bytes:
    return hashlib.sha256(salt + tenant.encode()).digest()


def _databases(folder: Path) -> list[Path]:
    found: list[Path] = []
    level = [folder]
    for _ in range(_FOLDERS_DEEP_MAX):
        found += [one / BACKUP_DATABASE for one in level if _is_backup(one)]
        level = [child for one in level for child in sorted(one.iterdir()) if child.is_dir()]
    return found


def _is_backup(folder: Path) -> bool:
    """Whether it is one, or what is left of one that was never finished."""
    named = (folder / MANIFEST).is_file() or folder.suffix == PART
    return named and (folder / BACKUP_DATABASE).is_file()


def _holds(file: Path, tenant: str) -> bool:
    try:
        connection = open_readonly(file)
        try:
            return any(
                rows(connection, f"SELECT 1 FROM {table} WHERE tenant = ? LIMIT 1", (tenant,))  # noqa: S608 - our own names
                for table in ("namespaces", "changes")
            )
        finally:
            connection.close()
    except apsw.Error as error:
        raise DataCorrupted(
            f"{str(file)!r} cannot be read: {error}", hint="whether it holds the tenant cannot be told"
        ) from error


def _uri(path: Path) -> str:
    return path.resolve().as_uri().removeprefix("file://")
