"""Backups of a database while others write it; with `verify` and `restore`, which belong to them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import apsw

from agentic_flow.agentdb.erasure import (
    BACKUPS_MADE,
    MANIFEST,
    PART,
    backups_holding,
    carry_records,
    erase_from_history,
    open_readonly,
    record_backup,
)
from agentic_flow.agentdb.manifest import (
    DATABASE,
    FORMAT,
    Contents,
    Hasher,
    Manifest,
    Progress,
    backup_database,
    block_size,
    check_schema,
    is_readable_file,
    open_live,
    read_contents,
    read_parts,
    sync_file,
)
from agentic_flow.agentdb.restoring import RestoreReport, restore
from agentic_flow.agentdb.sealing import Sealer
from agentic_flow.agentdb.segment_files import failure, replace_file, sync_folder
from agentic_flow.agentdb.verifying import Problem, VerifyReport, verify
from agentic_flow.core.db import rows
from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted, PathNotFound, Unavailable
from agentic_flow.core.version import __version__

__all__ = [
    "BackupReport",
    "Problem",
    "RestoreReport",
    "VerifyReport",
    "backup",
    "backups_holding",
    "describe",
    "erase_from_history",
    "restore",
    "verify",
]

T = TypeVar("T")

_SEAL_WAIT_S = 30.0
_STEPS_PER_REPORT = 50_000


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A finished backup.

    Args:
        folder: Where it is.
        manifest: What it holds.
        sealed_sequence: Last operation in the sealed history; None without one.
        history_error: Why the history could not be sealed, the backup aside; None when it was.
    """

    folder: Path
    manifest: Manifest
    sealed_sequence: int | None
    history_error: str | None


def backup(
    data_dir: Path,
    destination: Path,
    *,
    history_dir: Path | None = None,
    progress: Progress | None = None,
) -> BackupReport:
    """Copy the database as it is at one moment, without stopping those who write it.

    The copy is compact: what was deleted is not in it, not even as free space. It appears under its name when
    it is complete and durable; a crash leaves at most a hidden `.part` folder beside it. Its place is noted
    beside the database, so that erasing a tenant can say that this backup holds it; the backup has the places
    of those before it.

    Args:
        data_dir: Data folder of the database.
        destination: New folder for the backup.
        history_dir: Seal the history in it up to the backup.
        progress: Told of bytes copied and checked.

    Raises:
        PathNotFound: there is no database.
        Conflict: the destination exists, or the database is of another version.
        Unavailable: something cannot be read or written, as on a full disk; nothing is left.
        DataCorrupted: the database is damaged.
    """
    source = data_dir / DATABASE
    if not is_readable_file(source):
        raise PathNotFound(
            f"there is no database in {str(data_dir)!r}", hint="give the data folder (--data-dir)"
        )
    if (
        destination.is_file()
        or destination.is_symlink()
        or (destination.exists() and any(destination.iterdir()))
    ):
        raise Conflict(f"{str(destination)!r} exists", hint="give each backup a new folder")
    part = destination.parent / f".{destination.name}.{os.getpid()}.{os.urandom(4).hex()}{PART}"
    try:
        part.mkdir(parents=True)
        manifest = _copy(source, part, progress)
        carry_records([source.parent / BACKUPS_MADE], part)
        part.rename(destination)
        sync_folder(destination.parent)
    except OSError as error:
        raise Unavailable(
            f"the backup in {str(destination)!r} cannot be written: {error.strerror or error}",
            hint="make room or choose another place; nothing is left of it",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    record_backup(source, destination, manifest.sequence)
    sealed, failure = (None, None) if history_dir is None else _seal(source, history_dir)
    return BackupReport(destination, manifest, sealed, failure)


def describe(folder: Path) -> Manifest:
    """Make a folder that holds a copy of the database (`agentdb.db`, by itself, whole) a backup.

    Raises:
        Conflict: the copy is of another version. DataCorrupted: it is no database of ours.
    """
    copy = backup_database(folder)
    try:
        connection = open_readonly(copy)
        try:
            check_schema(connection, copy)
            contents = read_contents(connection)
        finally:
            connection.close()
    except (apsw.Error, IndexError) as error:
        raise DataCorrupted(
            f"{str(copy)!r} is no database of AgentDB: {error}", hint="`db verify` says what is wrong with it"
        ) from error
    return _finish(folder, contents, None)


def _copy(source: Path, folder: Path, progress: Progress | None) -> Manifest:
    copy = backup_database(folder)
    try:
        connection = open_live(source)
        try:
            check_schema(connection, source)
            size = _live_bytes(connection)
            if progress is not None:
                _report(connection, copy, size, progress)
            rows(connection, "VACUUM INTO ?", (str(copy),))
        finally:
            connection.close()
        copied = open_readonly(copy)
        try:
            contents = read_contents(copied)
        finally:
            copied.close()
    except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError, IndexError) as error:
        raise DataCorrupted(
            f"{str(source)!r} cannot be copied: {error}", hint="`verify` says what is wrong with it"
        ) from error
    except apsw.Error as error:
        raise Unavailable(
            f"{str(source)!r} cannot be copied to {str(folder.parent)!r}: {error}",
            hint="make room, or check the permissions of both; nothing is left of the backup",
        ) from error
    return _finish(folder, contents, progress)


def _finish(folder: Path, contents: Contents, progress: Progress | None) -> Manifest:
    """Make the copy durable and describe it."""
    copy = backup_database(folder)
    sync_file(copy)
    size = copy.stat().st_size
    hasher = Hasher(block_size(size))
    for part in read_parts(copy):
        hasher.add(part)
        if progress is not None:
            progress(size + hasher.size_bytes, 2 * size)
    hashes = hasher.hashes()
    manifest = Manifest(
        format=FORMAT,
        product_version=__version__,
        schema_version=contents.schema_version,
        database_id=contents.database_id,
        sequence=contents.sequence,
        last_commit_at_s=contents.last_commit_at_s,
        made_at_s=time.time(),
        namespaces=contents.namespaces,
        documents=contents.documents,
        items=contents.items,
        size_bytes=hashes.size_bytes,
        sha256=hashes.sha256,
        block_bytes=hashes.block_bytes,
        block_sha256=hashes.block_sha256,
    )
    replace_file(folder / MANIFEST, (manifest.encode(),))
    return manifest


def _live_bytes(connection: apsw.Connection) -> int:
    """Bytes of the pages that are in use."""
    pages, free, size = (
        rows(connection, f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _report(connection: apsw.Connection, copy: Path, size: int, progress: Progress) -> None:
    """Tell of the copy while SQLite makes it. Copying is half of the work, reading it again the other."""

    def tell() -> bool:
        done = copy.stat().st_size if copy.exists() else 0
        progress(min(done, size), 2 * size)
        return False

    cast(Any, connection).set_progress_handler(tell, _STEPS_PER_REPORT)


def _seal(source: Path, history_dir: Path) -> tuple[int | None, str | None]:
    """Seal what waits, only reading the database: one that is written without pause would keep us waiting.

    A backup is needed most when this fails, so that is told and not raised.
    """

    def read(job: Callable[[apsw.Connection], T]) -> T:
        connection = open_live(source)
        try:
            rows(connection, "BEGIN")
            return job(connection)
        finally:
            connection.close()

    try:
        database_id = read(lambda connection: read_contents(connection).database_id)
        folder = history_dir / database_id
        folder.mkdir(parents=True, exist_ok=True)
        return Sealer(folder, database_id, read, None).seal(wait_s=_SEAL_WAIT_S), None
    except (AgenticFlowError, OSError, IndexError, apsw.Error) as error:
        return None, failure(error, history_dir)
