"""Checking a backup, a history or a database: bytes by their checksums, rows by their partners."""

# ruff: noqa: S608 - SQL is put together from our own names

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import apsw

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.erasure import MANIFEST, open_readonly
from agentic_flow.agentdb.manifest import (
    DATABASE,
    Contents,
    Hasher,
    Manifest,
    Progress,
    backup_database,
    check_schema,
    difference,
    is_readable_file,
    open_live,
    read_contents,
    read_manifest,
    read_parts,
)
from agentic_flow.agentdb.records import NamespaceRow, all_namespaces
from agentic_flow.agentdb.sealing import read_waiting
from agentic_flow.agentdb.segment_files import (
    ENDING,
    LOCK,
    SegmentFile,
    list_segments,
    load_segment,
    superseded_segments,
)
from agentic_flow.agentdb.segments import Kind
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, DataCorrupted, PathNotFound

_PROBLEMS_MAX = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where.

    Args:
        offset: First byte of what is damaged; None when the fault is not at one place.
    """

    file: Path
    offset: int | None
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked and found.

    Args:
        sequences: First and last operation in it; a backup and a database have the last one only.
        problems: Damage; none means that all of it can be restored.
        notes: What is no damage but good to know, such as operations that were never recorded.
    """

    path: Path
    kind: Literal["backup", "history", "database"]
    database_id: str | None
    sequences: tuple[int, int] | None
    items: int | None
    segments: int | None
    records: int | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check a backup, the history folder (of one database or of several) or a data folder in use.

    Raises:
        PathNotFound: it is none of them.
        Conflict: it was written by a newer version.
    """
    if is_readable_file(path / MANIFEST):
        return _verify_backup(path, progress)
    if is_readable_file(path / DATABASE):
        return _verify_live(path)
    if os.access(path, os.R_OK | os.X_OK) and path.is_dir():
        folders = (
            [path] if _is_history(path) else sorted(child for child in path.iterdir() if _is_history(child))
        )
        if folders:
            return _verify_history(path, folders, progress)
    raise PathNotFound(
        f"{str(path)!r} is no finished backup, no history and no data folder",
        hint="give the folder of one of them",
    )


def _is_history(folder: Path) -> bool:
    return (folder / LOCK).is_file() or any(folder.glob(f"*{ENDING}"))


def _verify_backup(folder: Path, progress: Progress | None) -> VerifyReport:
    file = backup_database(folder)
    try:
        manifest = read_manifest(folder)
    except DataCorrupted as error:
        problem = Problem(folder / MANIFEST, None, error.message)
        return VerifyReport(folder, "backup", None, None, None, None, None, (problem,), ())
    problems: list[Problem] = []
    if not file.is_file():
        problems.append(Problem(file, None, "it is missing"))
    else:
        hasher = Hasher(manifest.block_bytes)
        for part in read_parts(file):
            hasher.add(part)
            if progress is not None:
                progress(min(hasher.size_bytes, manifest.size_bytes), manifest.size_bytes)
        wrong = difference(manifest, hasher.hashes())
        if wrong is not None:
            problems.append(Problem(file, *wrong))
        problems += _check_file(file, lambda: open_readonly(file), lambda found: _unlike(manifest, found))
    return VerifyReport(
        path=folder,
        kind="backup",
        database_id=manifest.database_id,
        sequences=(manifest.sequence, manifest.sequence),
        items=manifest.items,
        segments=None,
        records=None,
        problems=tuple(problems),
        notes=(),
    )


def _unlike(manifest: Manifest, found: Contents) -> list[str]:
    """Where the manifest says something else than the database."""
    return [
        f"it has {name} {getattr(found, name)!r}, its manifest says {getattr(manifest, name)!r}"
        for name in ("database_id", "schema_version", "sequence", "namespaces", "documents", "items")
        if getattr(found, name) != getattr(manifest, name)
    ]


def _verify_live(data_dir: Path) -> VerifyReport:
    file = data_dir / DATABASE
    contents: list[Contents] = []

    def keep(found: Contents) -> list[str]:
        contents.append(found)
        return []

    problems = _check_file(file, lambda: open_live(file), keep)
    found = contents[0] if contents else None
    return VerifyReport(
        path=data_dir,
        kind="database",
        database_id=found.database_id if found else None,
        sequences=(found.sequence, found.sequence) if found else None,
        items=found.items if found else None,
        segments=None,
        records=None,
        problems=tuple(problems),
        notes=(),
    )


def _check_file(
    file: Path, connect: Callable[[], apsw.Connection], compare: Callable[[Contents], list[str]]
) -> list[Problem]:
    """Everything that is wrong with a database, in one snapshot of it."""
    try:
        connection = connect()
        try:
            rows(connection, "BEGIN")
            check_schema(connection, file)
            messages = [*_check_pages(connection), *_check_rows(connection)]
            messages += compare(read_contents(connection))
        finally:
            connection.close()
    except (apsw.Error, IndexError, UnicodeDecodeError) as error:
        messages = [f"it cannot be read: {error}"]
    return [Problem(file, None, message) for message in messages[:_PROBLEMS_MAX]]


def _check_pages(connection: apsw.Connection) -> list[str]:
    """SQLite's own check of pages, indexes, constraints and full-text tables."""
    found = rows(connection, f"PRAGMA integrity_check({_PROBLEMS_MAX})")
    messages = [str(message) for (message,) in found if message != "ok"]
    messages += [
        f"row {row} of {table!r} refers to a row of {parent!r} that is not there"
        for table, row, parent, _ in rows(connection, "PRAGMA foreign_key_check")[:_PROBLEMS_MAX]
    ]
    return messages


def _check_rows(connection: apsw.Connection) -> list[str]:
    """Rows of one table that lack their partner in another."""
    messages: list[str] = []
    for what, sql in (
        ("items have no vector", "SELECT count(*) FROM items WHERE key NOT IN (SELECT key FROM vectors)"),
        ("vectors have no item", "SELECT count(*) FROM vectors WHERE key NOT IN (SELECT key FROM items)"),
    ):
        count = rows(connection, sql)[0][0]
        if count:
            messages.append(f"{count} {what}")
    for namespace in all_namespaces(connection):
        messages += _check_namespace(connection, namespace)
    try:
        after = 0
        while waiting := read_waiting(connection, after):
            after = waiting[-1].last
    except DataCorrupted as error:
        messages.append(error.message)
    return messages


def _check_namespace(connection: apsw.Connection, namespace: NamespaceRow) -> Iterable[str]:
    """Vectors of another length, and rows that full-text search cannot find or should not."""
    name = f"namespace {namespace.id}"
    wrong = rows(
        connection,
        "SELECT count(*) FROM items JOIN vectors USING (key) WHERE namespace_id = ? AND length(vector) <> ?",
        (namespace.id, namespace.layout.stored_bytes),
    )[0][0]
    if wrong:
        yield f"{wrong} vectors of {name} are not {namespace.layout.stored_bytes} bytes long"
    for table, text_table, key in (
        ("items", schema.item_table(namespace.id), "key"),
        ("documents", schema.document_table(namespace.id), "id"),
    ):
        held = f"SELECT {key} FROM {table} WHERE namespace_id = {namespace.id:d}"
        texts = f"SELECT id FROM {text_table}_docsize"
        for what, first, second in (
            ("are not in its full text", held, texts),
            ("of its full text are gone", texts, held),
        ):
            count = rows(connection, f"SELECT count(*) FROM ({first} EXCEPT {second})")[0][0]
            if count:
                yield f"{count} {table} of {name} {what}"


def _verify_history(path: Path, folders: list[Path], progress: Progress | None) -> VerifyReport:
    found = [_check_folder(folder) for folder in folders]
    total = sum(file.path.stat().st_size for check in found for file in check.files)
    done = 0
    for check in found:
        for file in check.files:
            done += check.add(file)
            if progress is not None:
                progress(done, total)
    first = found[0] if len(found) == 1 else None
    return VerifyReport(
        path=path,
        kind="history",
        database_id=first.folder.name if first else None,
        sequences=(first.files[0].first, first.last) if first and first.files else None,
        items=None,
        segments=sum(len(check.files) for check in found),
        records=sum(check.records for check in found),
        problems=tuple(problem for check in found for problem in check.problems),
        notes=tuple(note for check in found for note in check.notes),
    )


class _FolderCheck:
    """The segments of one database, checked one after the other."""

    def __init__(self, folder: Path, files: list[SegmentFile], notes: list[str]) -> None:
        self.folder = folder
        self.files = files
        self.records = 0
        self.problems: list[Problem] = []
        self.notes = notes
        self.last = 0
        self._chain: bytes | None = None

    def add(self, file: SegmentFile) -> int:
        """Check the next segment. Returns its size in bytes."""
        try:
            file = self._current(file)
            scan = load_segment(file)
        except OSError as error:
            self._wrong(file, None, f"it cannot be read: {error.strerror or error}")
            return 0
        except Conflict as error:
            self._wrong(file, None, error.message)
            return 0
        header = scan.header
        if header is not None:
            if (header.first, header.last) != (file.first, file.last):
                self._wrong(file, 0, f"it holds sequences {header.first} to {header.last}")
            if header.database_id != self.folder.name:
                self._wrong(file, 0, f"it is of database {header.database_id!r}")
            if self._chain is not None and header.previous != self._chain:
                self._wrong(file, 0, "the segment before it is missing or is not the one sealed before it")
        for record in scan.records:
            if self.last and record.first != self.last + 1:
                self.notes.append(
                    f"operations {self.last + 1} to {record.first - 1} were not recorded: moments after them "
                    "need a backup made after them"
                )
            self.last = record.last
            self.records += record.kind is not Kind.ERASED
        if scan.damage is not None:
            self._wrong(
                file, scan.damage.offset, f"{scan.damage.reason}; good up to sequence {self.last or 'none'}"
            )
            self.last = file.last
        self._chain = scan.chain
        return file.path.stat().st_size

    def _current(self, file: SegmentFile) -> SegmentFile:
        """The segment, or the one with more in it that took its place meanwhile."""
        if file.path.exists():
            return file
        later = [
            one for one in list_segments(self.folder) if one.first == file.first and one.last > file.last
        ]
        return later[0] if later else file

    def _wrong(self, file: SegmentFile, offset: int | None, message: str) -> None:
        if len(self.problems) < _PROBLEMS_MAX:
            self.problems.append(Problem(file.path, offset, message))


def _check_folder(folder: Path) -> _FolderCheck:
    notes = [
        f"{str(path)!r} is a leftover that the next sealing removes" for path in superseded_segments(folder)
    ]
    return _FolderCheck(folder, list_segments(folder), notes)
