"""Erasing a tenant from the sealed history and from freed space, and telling which backups still hold it.

Its records lose their content and keep their place, so that other tenants' history stays whole. The erasure
itself is a record, which names the tenant only by a salted hash: restoring an older backup needs to know
whose rows must not come back, and it has the names to compare.

Backups stay as they are: a changed backup would be none. They are looked for in the folders that are named,
and where `backups.jsonl` beside the database says that backups of it were made.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import apsw
import orjson
import structlog

from agentic_flow.agentdb import segments
from agentic_flow.agentdb.names import check_tenant
from agentic_flow.agentdb.segment_files import (
    list_segments,
    load_segment,
    locked,
    replace_file,
    whole_segment,
)
from agentic_flow.agentdb.segments import Kind, Record
from agentic_flow.core.db import rows
from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, PathNotFound, Unavailable
from agentic_flow.core.messages import Frozen

_log = structlog.get_logger(__name__)

BACKUP_DATABASE = "agentdb.db"
"""File of a backup that is the database."""
MANIFEST = "manifest.json"
"""File of a backup that says what it is."""
WHOLE, WHOLE_HEAD = ".tar.gz", "about.json"
"""Ending and first file of a backup of everything, whose head names its tenants."""
PART = ".part"
"""Ending of a folder that is being written; a crash may leave it, and it can be removed."""

BACKUPS_MADE = "backups.jsonl"
"""File beside the database that says where backups of it were made: one JSON object a line."""

_HISTORY_NOTE = (
    "{!r} is the history of a database that this one comes from: erasing here does not change it; delete it "
    "with the backups that need it, once there is a new backup"
)
_SALT_BYTES = 16
_LOCK_WAIT_S = 30.0
_FOLDERS_DEEP_MAX = 4
_FILLED_AT_ONCE_BYTES = 64 * 1024 * 1024
_CHECKPOINT_RETRY_S = 0.05


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
        check_folders([folder])
        holding += [file.parent for file in _databases(folder) if _holds(file, tenant)]
    return holding


def find_backups(folder: Path) -> list[Path]:
    """The finished backups in a folder (up to four deep), or the folder itself if it is one."""
    return [file.parent for file in _databases(folder) if (file.parent / MANIFEST).is_file()]


class BackupSurvey(Frozen):
    """Which backups still hold a tenant that was erased, as far as anybody can tell here; and which histories
    of databases that this one was restored from, which no erasure here reaches.

    Args:
        verdict: "held" by those of `holding`; "not_held" by any that was looked at; "unknown" when none was
            looked at, or one could not be read.
        looked_at: Folders that were searched, backups that were recorded, and histories.
        holding: Backups and folders of histories that hold it, to be deleted by hand.
        missing: Backups and histories that are no longer where they were: deleted, or moved.
        unreadable: What could not be looked at, and why.
        notes: What this cannot know, in sentences.
    """

    verdict: Literal["held", "not_held", "unknown"]
    looked_at: tuple[str, ...] = ()
    holding: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def joined(self, other: BackupSurvey) -> BackupSurvey:
        """Both together, each path once."""
        verdicts = (self.verdict, other.verdict)
        return BackupSurvey(
            verdict=next(one for one in ("held", "unknown", "not_held") if one in verdicts),
            looked_at=_once(self.looked_at, other.looked_at),
            holding=_once(self.holding, other.holding),
            missing=_once(self.missing, other.missing),
            unreadable=_once(self.unreadable, other.unreadable),
            notes=_once(self.notes, other.notes),
        )


def survey_backups(
    tenant: str,
    folders: Sequence[Path],
    made: Sequence[Path] = (),
    *,
    histories: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> BackupSurvey:
    """Look for the tenant in backups. What cannot be read is told, never raised: the tenant is gone already.

    Args:
        folders: Backups, or folders with backups in them (up to four deep).
        made: Places of backups that were recorded; those that are gone are told apart.
        histories: Folders with the sealed history of one database each, which the erasure did not reach.
        notes: What is to be said beside.
    """
    check_tenant(tenant)
    missing = [place for place in made if not (place.is_file() or (place / BACKUP_DATABASE).is_file())]
    missing += [place for place in histories if not place.is_dir()]
    places = [place.resolve() for place in (*folders, *(one for one in made if one not in missing))]
    files: dict[Path, None] = {}
    unreadable: list[str] = []
    holding: list[str] = []
    for place in dict.fromkeys(places):
        try:
            if place.is_file():
                files[place] = None
                continue
            check_folders([place])
            files |= dict.fromkeys(_databases(place))
        except (PathNotFound, OSError) as error:
            unreadable.append(str(error))
    for file in files:
        try:
            whole = file.name != BACKUP_DATABASE
            if tenant in _tenants_of_whole(file) if whole else _holds(file, tenant):
                holding.append(str(file if whole else file.parent))
        except (DataCorrupted, OSError) as error:
            unreadable.append(str(error))
    branches = [place.resolve() for place in histories if place.is_dir()]
    for place in branches:
        try:
            if _history_holds(place, tenant):
                holding.append(str(place))
                notes = (*notes, _HISTORY_NOTE.format(str(place)))
        except (AgenticFlowError, OSError) as error:
            unreadable.append(str(error))
    unsure = bool(unreadable or notes) or not places
    if not places:
        notes = (*notes, "no folder of backups is known here, so it cannot be told which still hold it")
    return BackupSurvey(
        verdict="held" if holding else "unknown" if unsure else "not_held",
        looked_at=tuple(map(str, dict.fromkeys((*places, *branches)))),
        holding=tuple(holding),
        missing=tuple(str(place) for place in missing),
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )


def check_folders(folders: Iterable[Path]) -> None:
    """Raise PathNotFound for the first that is no folder."""
    for folder in folders:
        if not folder.is_dir():
            raise PathNotFound(f"{str(folder)!r} is no folder", hint="give folders that hold backups")


def record_backup(database: Path, folder: Path, sequence: int) -> None:
    """Note beside the database that a backup of it was made. A failure is logged: the backup is whole.

    Args:
        database: The AgentDB file.
        folder: The backup.
        sequence: The last operation in it.
    """
    line = orjson.dumps({"path": str(folder.resolve()), "made_at_s": time.time(), "sequence": sequence})
    path = database.parent / BACKUPS_MADE
    try:
        with path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _log.warning("backup_unrecorded", path=str(path), error=str(error))


def carry_records(sources: Iterable[Path], folder: Path) -> None:
    """Note in `folder`, too, where backups were made. A failure is logged: these notes hold no rows.

    Args:
        sources: Files of such notes; those that do not exist are passed over.
        folder: Of a backup or a database.
    """
    found: dict[bytes, None] = {}
    path = folder / BACKUPS_MADE
    try:
        for source in sources:
            if source.is_file():
                found |= dict.fromkeys(line for line in source.read_bytes().splitlines() if line)
        if found:
            path.write_bytes(b"".join(line + b"\n" for line in found))
    except OSError as error:
        _log.warning("backup_unrecorded", path=str(path), error=str(error))


def recorded_backups(database: Path) -> list[Path]:
    """Where backups of this database were made, the oldest first, each once."""
    path = database.parent / BACKUPS_MADE
    if not path.is_file():
        return []
    found: dict[Path, None] = {}
    for line in path.read_bytes().splitlines():
        try:
            found[Path(orjson.loads(line)["path"])] = None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            # A crash may cut a line short; the others still tell.
            _log.warning("backup_record_unreadable", path=str(path))
    return list(found)


def overwrite_free_space(connection: apsw.Connection) -> None:
    """Fill the pages that the file has free with zeros, in the writer's transaction.

    Rows that go away are overwritten within their pages at once (`secure_delete=FAST`), but pages that are
    freed as a whole are not: that would write each of them once more.
    """
    (page_bytes,) = rows(connection, "PRAGMA page_size")[0]
    rows(connection, "PRAGMA secure_delete=ON")
    try:
        rows(connection, "CREATE TABLE filling (zeros BLOB NOT NULL) STRICT")
        while free := rows(connection, "PRAGMA freelist_count")[0][0]:
            size = min(free * page_bytes, _FILLED_AT_ONCE_BYTES)
            rows(connection, "INSERT INTO filling (zeros) VALUES (zeroblob(?))", (size,))
        rows(connection, "DROP TABLE filling")
    finally:
        rows(connection, "PRAGMA secure_delete=FAST")


def empty_log(path: Path, *, wait_s: float) -> None:
    """Move everything from the write-ahead log into the database file and cut the log off: it holds pages as
    they were before.

    Raises:
        Unavailable: somebody reads or writes all the time, or the disk is full.
    """
    give_up_at_s = time.monotonic() + wait_s
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            while rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
                if time.monotonic() >= give_up_at_s:
                    raise Unavailable(
                        f"the log of {str(path)!r} is in use, and may still hold what was erased",
                        hint="end long reads of other processes, then erase the tenant again",
                    )
                time.sleep(_CHECKPOINT_RETRY_S)
        finally:
            connection.close()
    except apsw.Error as error:
        raise Unavailable(
            f"the log of {str(path)!r} cannot be emptied: {error}",
            hint="correct that and erase the tenant again",
        ) from error


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
        found += [file for one in level for file in sorted(one.glob(f"*{WHOLE}")) if file.is_file()]
        level = [child for one in level for child in sorted(one.iterdir()) if child.is_dir()]
    return found


def _is_backup(folder: Path) -> bool:
    """Whether it is one, or what is left of one that was never finished."""
    named = (folder / MANIFEST).is_file() or folder.suffix == PART
    return named and (folder / BACKUP_DATABASE).is_file()


def _tenants_of_whole(file: Path) -> frozenset[str]:
    """The tenants that a backup of everything (`agentic-flow backup`) names in its head; none if it is
    somebody else's archive.
    """
    try:
        with tarfile.open(file, "r|gz") as archive:
            head = archive.next()
            source = None if head is None or head.name != WHOLE_HEAD else archive.extractfile(head)
            return frozenset() if source is None else frozenset(orjson.loads(source.read())["tenants"])
    except (tarfile.TarError, EOFError, zlib.error, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise DataCorrupted(
            f"{str(file)!r} cannot be read: {error}", hint="whether it holds the tenant cannot be told"
        ) from error


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


def _history_holds(folder: Path, tenant: str) -> bool:
    """Whether any record of the tenant has content; what is damaged hides only what lies behind it."""
    damaged: list[str] = []
    for file in list_segments(folder):
        scan = load_segment(file)
        if any(record.kind is Kind.PATCH and record.tenant == tenant for record in scan.records):
            return True
        if scan.damage is not None:
            damaged.append(
                f"{str(file.path)!r} is damaged at byte {scan.damage.offset}: {scan.damage.reason}"
            )
    if damaged:
        raise DataCorrupted("; ".join(damaged), hint="whether it holds the tenant cannot be told")
    return False


def _once(*groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for group in groups for one in group))


def _uri(path: Path) -> str:
    return path.resolve().as_uri().removeprefix("file://")
