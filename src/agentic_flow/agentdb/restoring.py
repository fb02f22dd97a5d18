"""Restoring a database from a backup, and from there to any moment of its history."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import apsw

from agentic_flow.agentdb import schema, writing
from agentic_flow.agentdb.erasure import BACKUPS_MADE, PART, carry_records, record_backup
from agentic_flow.agentdb.lineage import add_origin
from agentic_flow.agentdb.manifest import (
    DATABASE,
    Hasher,
    Manifest,
    Progress,
    backup_database,
    difference,
    is_readable_file,
    last_sequences,
    open_live,
    read_contents,
    read_manifest,
    read_parts,
    sync_file,
)
from agentic_flow.agentdb.patches import apply_patch, drop_rows, patch_schema
from agentic_flow.agentdb.records import all_namespaces
from agentic_flow.agentdb.sealing import SEALED
from agentic_flow.agentdb.segment_files import list_segments, sync_folder
from agentic_flow.agentdb.segments import Kind
from agentic_flow.agentdb.timeline import Point, Survey, Timeline
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, PathNotFound, Unavailable


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A finished restore.

    Args:
        data_dir: Data folder of the restored database.
        database_id: Its new id: its history is a branch of its own.
        origin_database_id: Of the database that was backed up.
        sequence: Last operation of the moment that was restored.
        at_s: Unix seconds of that operation.
        patches: Calls of the history that were applied to the backup.
        tenants_withheld: Tenants that were erased after the backup, whose rows were left out.
        notes: What else the operator should know.
    """

    data_dir: Path
    database_id: str
    origin_database_id: str
    sequence: int
    at_s: float
    namespaces: int
    items: int
    patches: int
    tenants_withheld: int
    notes: tuple[str, ...]


def restore(
    backup_dir: Path,
    target_data_dir: Path,
    *,
    history: Path | None = None,
    at: int | float | datetime | None = None,
    live: Path | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Make a database with exactly the rows of one moment: keys, versions, times and vectors included.

    Full-text tables are made from the rows; indexes are left to be built. Tenants that the history says were
    erased are left out, whatever the moment: erased is erased. The database appears when it is complete.

    Args:
        backup_dir: A backup.
        target_data_dir: Data folder to restore into; it must not have a database.
        history: The history folder (`agentdb.history_dir`), for moments after the backup.
        at: A sequence (int), or a time (Unix seconds as float, or an aware datetime), which means the last
            call that was not after it. None: the newest there is.
        live: Data folder of the original, for the changes that were not sealed yet.
        progress: Told of bytes read.

    Raises:
        PathNotFound: there is no backup, history or original.
        InvalidInput: `at` is not within what backup and history hold; says what is.
        Conflict: the target has a database, or something is of a newer version.
        DataCorrupted: backup or history are damaged before `at`; says where, and what can be restored.
        Unavailable: the target cannot be written, as on a full disk; nothing is left of it.
    """
    manifest = read_manifest(backup_dir)
    if manifest.schema_version > len(schema.MIGRATIONS):
        raise Conflict(
            f"{str(backup_dir)!r} has schema version {manifest.schema_version!r}, this program knows "
            f"{len(schema.MIGRATIONS)!r}",
            hint="use the version of agentic-flow that made it, or a newer one",
        )
    folder = (target_data_dir / DATABASE).parent
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{str(folder)!r} is not empty", hint="restore into a new data folder")
    base = Point(manifest.sequence, manifest.last_commit_at_s)
    with ExitStack() as stack:
        original = None
        if live is not None:
            original = _open_original(live, manifest.database_id)
            stack.callback(original.close)
        segments = None if history is None else _segments_folder(history, manifest.database_id)
        timeline = Timeline(manifest.database_id, base, segments, original)
        try:
            survey = timeline.survey(at, time.time())
        except OSError as error:
            raise Unavailable(
                f"the history cannot be read: {error.strerror or error}", hint="check the history folder"
            ) from error
        newest = survey.newest
        if original is not None:
            newest = max(newest, last_sequences(original).get("operations", 0))
        part = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}{PART}")
        try:
            part.mkdir(parents=True)
            read = _Read(progress, manifest.size_bytes + _history_bytes(segments, survey.target.sequence))
            _copy_base(backup_dir, manifest, part / DATABASE.name, read)
            report = _roll_forward(
                part / DATABASE.name, target_data_dir, manifest, timeline, survey, newest, read
            )
            # Whoever erases a tenant here is told of the original's backups too.
            known = [backup_dir] if live is None else [backup_dir, live / DATABASE.parent]
            carry_records([place / BACKUPS_MADE for place in known], part)
            record_backup(part / DATABASE.name, backup_dir, manifest.sequence)
            sync_file(part / DATABASE.name)
            sync_folder(part)
            part.rename(folder)
            sync_folder(folder.parent)
        except (OSError, apsw.FullError, apsw.IOError) as error:
            raise Unavailable(
                f"{str(folder)!r} cannot be restored: {getattr(error, 'strerror', None) or error}",
                hint="make room or choose another place; nothing is left of it",
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return report


class _Read:
    """Counts the bytes that were read, for the caller to see."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, size: int) -> None:
        self._done = min(self._done + size, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)


def _open_original(data_dir: Path, database_id: str) -> apsw.Connection:
    path = data_dir / DATABASE
    if not is_readable_file(path):
        raise PathNotFound(
            f"there is no database in {str(data_dir)!r}", hint="give the data folder of the original"
        )
    try:
        connection = open_live(path)
        try:
            rows(connection, "BEGIN")
            found = read_contents(connection).database_id
            if found != database_id:
                raise InvalidInput(
                    f"{str(path)!r} is database {found!r}, the backup is of {database_id!r}",
                    hint="give the data folder that was backed up",
                )
        except BaseException:
            connection.close()
            raise
    except (apsw.Error, IndexError) as error:
        raise DataCorrupted(
            f"{str(path)!r} cannot be read: {error}",
            hint="leave out the original: what was sealed can be restored without it",
        ) from error
    return connection


def _segments_folder(history: Path, database_id: str) -> Path:
    """The database's folder in the history, or the folder itself when it is that."""
    for folder in (history / database_id, history):
        if folder.name == database_id and folder.is_dir():
            return folder
    raise PathNotFound(
        f"there is no history of database {database_id!r} in {str(history)!r}",
        hint="give the folder of agentdb.history_dir",
    )


def _history_bytes(folder: Path | None, last: int) -> int:
    if folder is None:
        return 0
    return sum(file.path.stat().st_size for file in list_segments(folder) if file.first <= last)


def _copy_base(backup_dir: Path, manifest: Manifest, path: Path, read: _Read) -> None:
    """Copy the database of a backup, checking it on the way."""
    source = backup_database(backup_dir)
    hasher = Hasher(manifest.block_bytes)
    try:
        with path.open("wb") as file:
            for part in read_parts(source):
                hasher.add(part)
                file.write(part)
                read.add(len(part))
    except FileNotFoundError as error:
        raise DataCorrupted(f"{str(source)!r} is missing", hint="use another backup") from error
    wrong = difference(manifest, hasher.hashes())
    if wrong is not None:
        offset, reason = wrong
        raise DataCorrupted(
            f"{str(source)!r} is damaged at byte {offset}: {reason}",
            hint="use another backup; with a history, an older one restores the same moments",
            details={"file": str(source), "offset": offset},
        )


def _roll_forward(
    path: Path,
    data_dir: Path,
    manifest: Manifest,
    timeline: Timeline,
    survey: Survey,
    newest: int,
    read: _Read,
) -> RestoreReport:
    """Bring the copied base to the moment, and make it a database of its own."""
    connection = apsw.Connection(str(path))
    try:
        # Nobody sees this file before it is whole: a crash leaves it to be removed, not to be repaired.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "foreign_keys=OFF", "secure_delete=ON"):
            rows(connection, f"PRAGMA {pragma}")
        rows(connection, "BEGIN")
        withheld = _drop_erased(connection, survey)
        touched: set[int] = set()
        applied = 0
        for record in timeline.records(survey):
            read.add(len(record.payload))
            if record.kind is not Kind.PATCH or not record.payload or survey.is_erased(record):
                continue
            _migrate(connection, patch_schema(record.payload))
            touched |= apply_patch(connection, record.payload)
            applied += 1
        _migrate(connection, len(schema.MIGRATIONS))
        _make_texts(connection, touched)
        _make_own(connection, survey, newest)
        add_origin(connection, manifest.database_id, timeline.folder)
        wrong = rows(connection, "PRAGMA foreign_key_check")
        if wrong:
            raise DataCorrupted(
                f"{len(wrong)!r} rows of the restored moment refer to rows that are not there",
                hint="the backup and the history do not belong together; restore an older moment",
            )
        rows(connection, "COMMIT")
        contents = read_contents(connection)
    finally:
        connection.close()
    read.finish()
    return RestoreReport(
        data_dir=data_dir,
        database_id=contents.database_id,
        origin_database_id=manifest.database_id,
        sequence=survey.target.sequence,
        at_s=survey.target.at_s,
        namespaces=contents.namespaces,
        items=contents.items,
        patches=applied,
        tenants_withheld=withheld,
        notes=_notes(survey),
    )


def _migrate(connection: apsw.Connection, version: int) -> None:
    """Bring the rows to the schema of the calls that come next, as the program did at the time."""
    current: int = rows(connection, "PRAGMA user_version")[0][0]
    if version > len(schema.MIGRATIONS):
        raise Conflict(
            f"the history has schema version {version!r}, this program knows {len(schema.MIGRATIONS)!r}",
            hint="use the version of agentic-flow that wrote it, or a newer one",
        )
    for script in schema.MIGRATIONS[current:version]:
        rows(connection, script)
    if version > current:
        rows(connection, f"PRAGMA user_version={version:d}")


def _drop_erased(connection: apsw.Connection, survey: Survey) -> int:
    """Remove what the base still has of tenants that were erased after it. Returns how many there were."""
    found = rows(connection, "SELECT DISTINCT tenant FROM namespaces")
    erased = [tenant for (tenant,) in found if any(mark.is_of(tenant) for mark, _ in survey.erasures)]
    for tenant in erased:
        for (namespace_id,) in rows(connection, "SELECT id FROM namespaces WHERE tenant = ?", (tenant,)):
            drop_rows(connection, namespace_id)
    return len(erased)


def _make_texts(connection: apsw.Connection, touched: set[int]) -> None:
    """Full-text tables for every namespace that there is now; those of changed rows anew."""
    tables = {name for (name,) in rows(connection, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    prefix = schema.item_table(0).removesuffix("0")
    known = {int(name[len(prefix) :]) for name in tables if re.fullmatch(rf"{prefix}\d+", name)}
    present = {namespace.id: namespace for namespace in all_namespaces(connection)}
    for namespace_id in known - present.keys():
        schema.drop_text_tables(connection, namespace_id)
    for namespace_id, namespace in present.items():
        if namespace_id not in known:
            schema.create_text_tables(connection, namespace_id)
        if namespace_id not in known or namespace_id in touched:
            writing.rebuild_texts(connection, namespace)


def _make_own(connection: apsw.Connection, survey: Survey, newest: int) -> None:
    """A new id and an empty log: the restored database goes its own way from here.

    No sequence that the original gave out is given out again.
    """
    rows(connection, "DELETE FROM changes")
    rows(connection, "DELETE FROM operations")
    rows(
        connection,
        "INSERT INTO operations (sequence, namespace_id, kind, keys, at_s) VALUES (?, 0, 'restore', x'', ?)",
        (newest + 1, survey.target.at_s),
    )
    rows(connection, "DELETE FROM about WHERE name = ?", (SEALED,))
    rows(connection, "UPDATE about SET value = lower(hex(randomblob(16))) WHERE name = 'database_id'")
    for name, value in (
        ("origin_sequence", str(survey.target.sequence)),
        ("restored_at_s", str(time.time())),
    ):
        rows(connection, "INSERT OR REPLACE INTO about (name, value) VALUES (?, ?)", (name, value))


def _notes(survey: Survey) -> tuple[str, ...]:
    if survey.broken is None:
        return ()
    broken = survey.broken
    return (
        f"{str(broken.file)!r} at byte {broken.offset}, after the restored moment: {broken.reason}; a tenant "
        "whose erasure was recorded there may have come back",
    )
