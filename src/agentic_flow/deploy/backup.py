"""Backup and restore of folders of state: what one process keeps in its data folder, or the services of a
stack each in its own.

A backup holds every SQLite database of these folders as of one moment (`snapshot.py`), so runs, ledger, keys
and memory agree with each other as they would after a power cut. AgentDB's is stored as a backup of AgentDB;
its indexes are derived and left out, and restored it gets an id of its own, as with `db restore`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import apsw

from agentic_flow.agentdb import backup as agentdb_backup
from agentic_flow.agentdb.erasure import BACKUPS_MADE, carry_records, record_backup
from agentic_flow.agentdb.erasure import MANIFEST as AGENTDB_MANIFEST
from agentic_flow.agentdb.manifest import DATABASE as AGENTDB
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, PathNotFound
from agentic_flow.deploy.archive import (
    PART,
    About,
    ArchiveWriter,
    Contents,
    Entry,
    Manifest,
    new_archive,
    read_about,
    read_archive,
    unwritten,
    written,
)
from agentic_flow.deploy.snapshot import Snapshot, in_use, is_database, one_moment, sync
from agentic_flow.deploy.supervisor import LOG_FILE, PID_FILE, STATE_FILE
from agentic_flow.gateway.usage import INTERVAL_S

FOLDER = "data"
"""Name of one process's data folder within a backup."""
SETTLE_S = 6 * INTERVAL_S
"""What a service acknowledged before is on disk; its usage of models follows within this time, on a busy
machine too."""
SECRETS = ("secrets.json", "secrets.key", "owner_key")
DERIVED = ("agentdb/indexes", "runs/executors", "secrets.lock", PID_FILE, STATE_FILE, LOG_FILE)
"""What a data folder has that is made again."""

_DEEP = ("*.db", "*/*.db")
_LEFT_OUT_MAX = 50
# Whoever has the keys that sign tokens needs no other key. Without them new ones are made at the next start.
_WITHOUT_SIGNING_KEYS = "DELETE FROM signing_keys"
_TENANTS = ("namespaces", "af_workflows", "gw_usage")
"""Tables whose rows belong to tenants, and go when a tenant is erased."""

Progress = Callable[[str, int, int], None]
"""Called with what is at work, how much of it is done, and all that there is."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A finished backup.

    Args:
        size_bytes: Of the file.
        contents: What is in it.
        left_out: What lies in the folders and is not in it, nor is it made again.
    """

    file: Path
    size_bytes: int
    contents: Contents
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A finished restore.

    Args:
        folder: Where it was restored to.
        kept: Where what was there before is now.
        notes: What the operator should know.
    """

    folder: Path
    contents: Contents
    kept: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """What `take_folders` put into an archive."""

    manifest: Manifest
    about: About
    left_out: tuple[str, ...]


def back_up_folder(
    data_dir: Path,
    destination: Path,
    *,
    with_secrets: bool = False,
    elsewhere: Sequence[str] = (),
    settle_s: float = SETTLE_S,
    progress: Progress | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> BackupReport:
    """Back up a data folder, whether or not processes work on it.

    Everything that was acknowledged before the call is in it; of what is written meanwhile, all that came
    before one moment and nothing that came after.

    Args:
        data_dir: The folder.
        destination: A new file.
        with_secrets: Take keys that open something along: those of the store of secrets, the owner's, those
            that sign tokens.
        elsewhere: Settings that keep state outside of the folder, for the record.
        settle_s: Seconds before the moment, for what services write behind their answers.
        progress: Told of the work.

    Raises:
        PathNotFound: the folder holds no database.
        Conflict: the destination exists.
        Unavailable: something cannot be read or written; nothing is left of the backup.
        DataCorrupted: a database is damaged.
    """
    made_at_s = clock.time_s()
    folders = {FOLDER: data_dir.absolute()}
    if not databases(data_dir):
        raise PathNotFound(
            f"there is no database in {str(data_dir)!r}", hint="give the data folder (--data-dir)"
        )
    time.sleep(settle_s)

    def head(at_s: float, tenants: tuple[str, ...]) -> About:
        return About(
            made_at_s=made_at_s,
            at_s=at_s,
            kind="embedded",
            store="directory",
            name=data_dir.absolute().name,
            with_secrets=with_secrets,
            tenants=tenants,
            elsewhere=tuple(elsewhere),
        )

    with new_archive(destination) as sink, _scratch(destination.absolute().parent) as scratch:
        taken = take_folders(sink, folders, head, scratch, progress=progress)
    agentdb = data_dir / AGENTDB
    if agentdb.exists():
        record_backup(agentdb, destination, 0)
    return BackupReport(
        destination.absolute(),
        destination.stat().st_size,
        Contents(taken.about, taken.manifest),
        taken.left_out,
    )


def take_folders(
    sink: IO[bytes],
    folders: Mapping[str, Path],
    head: Callable[[float, tuple[str, ...]], About],
    scratch: Path,
    *,
    at_moment: Callable[[], None] | None = None,
    more: Callable[[ArchiveWriter], None] | None = None,
    progress: Progress | None = None,
) -> Taken:
    """Write an archive with all databases of these folders at one moment.

    Args:
        sink: Where it goes.
        folders: Name within the archive → folder.
        head: Makes the head from the moment and the tenants.
        scratch: A folder with room for the largest database.
        at_moment: See `one_moment`.
        more: Adds further files.
        progress: Told of the work.

    Raises:
        As `one_moment` and `Snapshot.copy`.
    """
    found = {f"{name}/{file.relative_to(root).as_posix()}": file for name, root in folders.items()
             for file in databases(root)}  # fmt: skip
    with one_moment(list(found.values()), at_moment=at_moment) as moment:
        about = head(moment.at_s, _tenants(moment, found.values()))
        with ArchiveWriter(sink, about) as archive:
            for path, file in found.items():
                _take_database(archive, moment, path, file, scratch, about.with_secrets, progress)
            others = (*(SECRETS if about.with_secrets else ()), AGENTDB.with_name(BACKUPS_MADE).as_posix())
            for name, root in folders.items():
                for relative in others:
                    if (root / relative).is_file():
                        archive.add_file(f"{name}/{relative}", root / relative)
            if more is not None:
                more(archive)
            manifest = archive.finish(moment.pause_s)
    left_out = [
        f"{name}/{one}" if len(folders) > 1 else one
        for name, root in folders.items()
        for one in left_out_of(root)
    ]
    return Taken(manifest, about, tuple(left_out[:_LEFT_OUT_MAX]))


def _take_database(
    archive: ArchiveWriter,
    moment: Snapshot,
    path: str,
    file: Path,
    scratch: Path,
    with_secrets: bool,
    progress: Progress | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        copy = Path(place, file.name)
        clean = _WITHOUT_SIGNING_KEYS if file.name == "identity.db" and not with_secrets else ""

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(path, done, total)

        moment.copy(file, copy, clean=clean, progress=tell)
        copy.chmod(file.stat().st_mode & 0o777)
        if is_agentdb(path):
            agentdb_backup.describe(copy.parent)
            archive.add_file(
                f"{path.rpartition('/')[0]}/{AGENTDB_MANIFEST}", copy.with_name(AGENTDB_MANIFEST)
            )
        archive.add_file(path, copy)


def is_agentdb(path: str) -> bool:
    """Whether a file of an archive is AgentDB's database."""
    return path.split("/", 1)[-1] == AGENTDB.as_posix()


def _tenants(moment: Snapshot, files: Iterable[Path]) -> tuple[str, ...]:
    found: set[str] = set()
    for file in files:
        tables = {
            name for (name,) in moment.read(file, "SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        for table in tables.intersection(_TENANTS):
            rows = moment.read(file, f"SELECT DISTINCT tenant FROM {table}")  # noqa: S608 - our own names
            found |= {str(tenant) for (tenant,) in rows}
    return tuple(sorted(found))


def databases(folder: Path) -> list[Path]:
    """The SQLite databases of a data folder, those of services' own folders in it too."""
    found = {path for pattern in _DEEP for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.is_symlink() and is_database(path))


def left_out_of(folder: Path) -> list[str]:
    """What lies in a data folder and is not backed up, nor made again; folders end in a slash."""
    taken = {path.relative_to(folder).as_posix() for path in databases(folder)}
    known = {*taken, *SECRETS, *DERIVED, AGENTDB.with_name(BACKUPS_MADE).as_posix()}
    known |= {f"{path}{ending}" for path in taken for ending in ("-wal", "-shm")}
    inside = {path.partition("/")[0] for path in known if "/" in path}
    found: list[str] = []
    for top in sorted(folder.iterdir()):
        for path in sorted(top.iterdir()) if top.is_dir() and top.name in inside else (top,):
            name = path.relative_to(folder).as_posix()
            if name not in known and not name.startswith(LOG_FILE):
                found.append(f"{name}/" if path.is_dir() else name)
    return found


@contextmanager
def _scratch(parent: Path) -> Generator[Path]:
    """A folder for copies beside what is being written; a crash leaves it, and it can be removed."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".backup.", suffix=PART) as place:
        yield Path(place)


def verify_file(file: Path) -> Contents:
    """Read a backup to its end and check everything in it. Raises as `read_archive`."""
    return read_archive(file)


def restore_folder(file: Path, data_dir: Path, *, force: bool = False) -> RestoreReport:
    """Make a data folder of a backup: all of it, or nothing.

    Args:
        file: A backup of one process's data folder.
        data_dir: A folder that is not there, or is empty.
        force: Move what is there aside.

    Raises:
        Conflict: the folder is not empty, or in use; or the backup is of a stack, or of a newer version.
        InvalidInput, DataCorrupted, PathNotFound: as `read_archive`; nothing has changed.
        Unavailable: it cannot be written, as on a full disk; nothing is left of it.
    """
    about = read_about(file)
    if about.kind != "embedded":
        raise Conflict(
            f"{str(file)!r} is of the stack of containers {about.name!r}, not of a data folder",
            hint="restore it with --dir DIR, where there is a container engine",
        )
    target = data_dir.absolute()
    check_target(target, force=force)
    contents = read_archive(file)  # before anything is written
    part = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}{PART}")
    kept: Path | None = None
    try:
        part.mkdir(parents=True, mode=0o700)
        again = read_archive(file, lambda entry, source: unpack(entry, source, {FOLDER: part}))
        if again.manifest != contents.manifest:
            raise Conflict(f"{str(file)!r} changed while it was read", hint="try again")
        settle(part, file)
        if target.exists() and any(target.iterdir()):
            kept = _moved_aside(target)
        part.rename(target)
        sync(target.parent)
    except OSError as error:
        if kept is not None and not target.exists():
            kept.rename(target)
        raise unwritten(repr(str(target)), error, "nothing has changed") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return RestoreReport(target, contents, kept, notes_of(about))


def check_target(target: Path, *, force: bool) -> None:
    """Whether a folder may be restored to.

    Raises:
        Conflict: it holds something and nobody said `force`, or somebody works on what it holds.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise Conflict(f"{str(target)!r} is no folder", hint="restore into a new folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise Conflict(
            f"{str(target)!r} is not empty",
            hint="restore into a new folder, or say --force, which moves what is there aside",
        )
    for file in databases(target):
        try:
            used = in_use(file)
        except apsw.Error:
            continue  # damaged, as in a folder that is restored it may be
        if used:
            raise Conflict(
                f"{str(file)!r} is in use by another process", hint="stop what works on the folder first"
            )


def _moved_aside(target: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    kept = target.with_name(f"{target.name}.before-{stamp}")
    target.rename(kept)
    return kept


def unpack(entry: Entry, source: IO[bytes], folders: Mapping[str, Path]) -> None:
    """Write one file of an archive into the folder that it belongs to; others are passed over."""
    place, _, relative = entry.path.partition("/")
    if place in folders:
        written(source, folders[place] / relative, entry.mode)


def settle(folder: Path, origin: Path | None) -> None:
    """Finish an unpacked folder: AgentDB becomes a database of its own, and all of it is durable.

    Args:
        folder: That nobody works on.
        origin: The backup, to be named to whoever erases a tenant.

    Raises:
        As `agentdb.backup.restore`.
    """
    agentdb = folder / AGENTDB.parent
    if (folder / AGENTDB).exists():
        backup = folder / f".{AGENTDB.parent}.backup"
        agentdb.rename(backup)
        agentdb_backup.restore(backup, folder)
        (agentdb / BACKUPS_MADE).unlink(missing_ok=True)
        carry_records([backup / BACKUPS_MADE], agentdb)
        if origin is not None:
            record_backup(folder / AGENTDB, origin, 0)
        shutil.rmtree(backup)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync(path)
    sync(folder)


def notes_of(about: About) -> tuple[str, ...]:
    """What whoever restores this should know."""
    notes: list[str] = []
    if not about.with_secrets:
        notes.append(
            "keys of model providers, the owner's key file and certificates are not in it; API keys of users "
            "go on working, tokens that were made of them are to be made anew"
        )
    notes += [f"{setting} was set: what is kept there is not in it" for setting in about.elsewhere]
    return tuple(notes)
