"""Removing the sealed segments that no kept backup needs.

A backup needs every record behind its last operation, and none before. So segments that end at or before the
oldest backup that is kept can go. The newest segment always stays: the next one continues its chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import apsw

from agentic_flow.agentdb.erasure import check_folders, find_backups, recorded_backups
from agentic_flow.agentdb.history import read_database_id
from agentic_flow.agentdb.manifest import DATABASE, Manifest, is_readable_file, open_live, read_manifest
from agentic_flow.agentdb.segment_files import SegmentFile, failure, list_segments, locked, sync_folder
from agentic_flow.agentdb.verifying import verify
from agentic_flow.core.errors import Conflict, DataCorrupted, PathNotFound, Unavailable

_LOCK_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was removed.

    Args:
        folder: Of the segments.
        oldest_backup: What is restored from goes back to this one.
        oldest_sequence: Its last operation, the earliest moment that can be restored.
        removed: Segments that are gone; with `dry_run` those that would be.
        removed_bytes: Their size.
        kept: Segments that are still there.
        missing: Backups that were made and are no longer where they were. They were taken for deleted.
    """

    folder: Path
    oldest_backup: Path
    oldest_sequence: int
    removed: tuple[Path, ...]
    removed_bytes: int
    kept: int
    missing: tuple[Path, ...]


def prune(
    data_dir: Path, history_dir: Path, folders: Iterable[Path] = (), *, dry_run: bool = False
) -> PruneReport:
    """Remove the segments before the oldest backup, which is read in full first.

    Backups are looked for in `folders` and where they were made. Those of other databases do not count.

    Args:
        data_dir: Data folder of the database.
        history_dir: As configured (`agentdb.history_dir`).
        folders: Backups, or folders with backups in them (up to four deep).
        dry_run: Tell what would be removed, and remove nothing.

    Raises:
        PathNotFound: there is no database, no history or no such folder.
        Conflict: there is no backup, or the history does not continue the oldest; nothing was removed.
        DataCorrupted: a backup is damaged, so that it cannot be told what it needs; nothing was removed.
        Unavailable: the history is in use or cannot be written; what was removed stays removed.
    """
    database = data_dir / DATABASE
    folder = history_dir / _database_id(database)
    if not folder.is_dir():
        raise PathNotFound(f"there is no history in {str(folder)!r}", hint="check agentdb.history_dir")
    made = recorded_backups(database)
    missing = tuple(place for place in made if not place.is_dir())
    backups = _backups((*folders, *(place for place in made if place not in missing)), folder.name)
    if not backups:
        raise Conflict(
            f"no backup of database {folder.name!r} was found: without one the history cannot be restored",
            hint="make a backup, or name the folders (--backups, agentdb.backups_dirs)",
        )
    oldest, manifest = min(backups, key=lambda one: one[1].sequence)
    report = verify(oldest)
    if not report.ok:
        raise DataCorrupted(
            f"the oldest backup, {str(oldest)!r}, is damaged: {report.problems[0].message}",
            hint="delete it and prune again: what newer backups need stays",
        )
    try:
        with locked(folder, _LOCK_WAIT_S):
            files = list_segments(folder)
            old = [file for file in files[:-1] if file.last <= manifest.sequence]
            kept = files[len(old) :]
            _demand_continued(kept, oldest, manifest)
            removed_bytes = sum(file.path.stat().st_size for file in old)
            if not dry_run:
                # The oldest first: a crash in between leaves no gap.
                for file in old:
                    file.path.unlink()
                sync_folder(folder)
    except OSError as error:
        raise Unavailable(failure(error, folder), hint="correct that and prune again") from error
    return PruneReport(
        folder=folder,
        oldest_backup=oldest,
        oldest_sequence=manifest.sequence,
        removed=tuple(file.path for file in old),
        removed_bytes=removed_bytes,
        kept=len(kept),
        missing=missing,
    )


def _database_id(database: Path) -> str:
    if not is_readable_file(database):
        raise PathNotFound(
            f"there is no database {str(database)!r}", hint="give the data folder (--data-dir)"
        )
    try:
        connection = open_live(database)
        try:
            return read_database_id(connection)
        finally:
            connection.close()
    except (apsw.Error, IndexError) as error:
        raise DataCorrupted(
            f"{str(database)!r} cannot be read: {error}", hint="`db verify` says what is wrong with it"
        ) from error


def _backups(folders: Iterable[Path], database_id: str) -> list[tuple[Path, Manifest]]:
    """The finished backups of this database."""
    places = dict.fromkeys(place.resolve() for place in folders)
    check_folders(places)
    found = {backup for place in places for backup in find_backups(place)}
    manifests = [(backup, read_manifest(backup)) for backup in sorted(found)]
    return [(backup, manifest) for backup, manifest in manifests if manifest.database_id == database_id]


def _demand_continued(kept: list[SegmentFile], oldest: Path, manifest: Manifest) -> None:
    """Raise Conflict when moments right behind the oldest backup are not in what would be left."""
    if kept and kept[0].first > manifest.sequence + 1:
        raise Conflict(
            f"the history begins at {kept[0].first!r}, the oldest backup, {str(oldest)!r}, ends at "
            f"{manifest.sequence!r}: what lies between is in neither",
            hint="delete that backup if a newer one is enough, and prune again",
        )
