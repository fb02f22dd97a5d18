"""A backup: a folder with the database as one file, and a manifest that says what it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import orjson
from pydantic import ValidationError

from agentic_flow.agentdb import schema
from agentic_flow.agentdb.erasure import BACKUP_DATABASE, MANIFEST, open_readonly
from agentic_flow.core.db import rows
from agentic_flow.core.errors import Conflict, DataCorrupted, PathNotFound
from agentic_flow.core.messages import Frozen

DATABASE = Path("agentdb", "agentdb.db")
"""The database in a data folder."""
FORMAT = 1

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all that there are."""

_BLOCK_MIN_BYTES = 4 * 1024 * 1024
_BLOCKS_MAX = 4096
_BUSY_TIMEOUT_MS = 10_000
_READ_BYTES = 1024 * 1024


class Manifest(Frozen):
    """What a backup holds, and how to tell that it still does.

    Args:
        database_id: Of the database that was backed up.
        sequence: Its last operation.
        last_commit_at_s: Unix seconds of that operation.
        made_at_s: When the backup was made.
        sha256: Of the database file.
        block_sha256: Of each `block_bytes` of it, so that damage can be located.
    """

    format: int
    product_version: str
    schema_version: int
    database_id: str
    sequence: int
    last_commit_at_s: float
    made_at_s: float
    namespaces: int
    documents: int
    items: int
    size_bytes: int
    sha256: str
    block_bytes: int
    block_sha256: tuple[str, ...]

    def encode(self) -> bytes:
        """The manifest file: JSON with a checksum of itself."""
        content = self.model_dump()
        content["manifest_sha256"] = _own_sha256(content)
        return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database file says of itself."""

    database_id: str
    schema_version: int
    sequence: int
    last_commit_at_s: float
    namespaces: int
    documents: int
    items: int


@dataclass(frozen=True, slots=True)
class Hashes:
    """Checksums of a file, whole and by block."""

    size_bytes: int
    sha256: str
    block_bytes: int
    block_sha256: tuple[str, ...]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a backup.

    Raises:
        PathNotFound: there is no backup, or none that was finished.
        DataCorrupted: the manifest is damaged.
        Conflict: it was written by a newer version.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise PathNotFound(
            f"there is no backup in {str(folder)!r}: it has no {MANIFEST}",
            hint="give the folder that `backup` made; one without a manifest was never finished",
        ) from None
    except OSError as error:
        raise PathNotFound(f"{str(path)!r} cannot be read: {error.strerror}", hint="check it") from error
    try:
        content: dict[str, Any] = orjson.loads(data)
        if content.pop("manifest_sha256") != _own_sha256(content):
            raise DataCorrupted(f"{str(path)!r} does not match its checksum", hint="use another backup")
        if content["format"] > FORMAT:
            raise Conflict(
                f"{str(path)!r} has format {content['format']!r}, this program knows {FORMAT!r}",
                hint="use the version of agentic-flow that wrote it, or a newer one",
            )
        return Manifest.model_validate_json(orjson.dumps(content))
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValidationError) as error:
        raise DataCorrupted(
            f"{str(path)!r} is no manifest of a backup: {str(error).splitlines()[0]}",
            hint="use another backup",
        ) from error


def backup_database(folder: Path) -> Path:
    """The database file of a backup."""
    return folder / BACKUP_DATABASE


def read_contents(connection: apsw.Connection) -> Contents:
    """What the database says of itself.

    Raises:
        apsw.Error: it is no AgentDB database.
    """
    last = rows(connection, "SELECT at_s FROM operations ORDER BY sequence DESC LIMIT 1")
    return Contents(
        database_id=rows(connection, "SELECT value FROM about WHERE name = 'database_id'")[0][0],
        schema_version=rows(connection, "PRAGMA user_version")[0][0],
        sequence=last_sequences(connection).get("operations", 0),
        last_commit_at_s=last[0][0] if last else 0.0,
        namespaces=rows(connection, "SELECT count(*) FROM namespaces")[0][0],
        documents=rows(connection, "SELECT count(*) FROM documents")[0][0],
        items=rows(connection, "SELECT count(*) FROM items")[0][0],
    )


def check_schema(connection: apsw.Connection, path: Path) -> None:
    """Raise Conflict unless the database has the schema that this program writes."""
    version, known = rows(connection, "PRAGMA user_version")[0][0], len(schema.MIGRATIONS)
    if version != known:
        raise Conflict(
            f"{str(path)!r} has schema version {version!r}, this program knows {known!r}",
            hint="use the version of agentic-flow that wrote it"
            if version > known
            else "start agentic-flow on it once, which brings it up to date",
        )


def open_live(path: Path) -> apsw.Connection:
    """Open a database for reading that others may be writing.

    Raises:
        apsw.Error: it cannot be read.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        rows(connection, "SELECT count(*) FROM sqlite_master")
    except (apsw.CantOpenError, apsw.ReadOnlyError):
        connection.close()
        wal = path.with_name(f"{path.name}-wal")
        if wal.exists() and wal.stat().st_size:
            raise
        # A folder that cannot be written: nobody writes this database, and all of it is in its file.
        return open_readonly(path)
    except BaseException:
        connection.close()
        raise
    return connection


def last_sequences(connection: apsw.Connection) -> dict[str, int]:
    """Table → the largest key that it ever gave out."""
    return dict(rows(connection, "SELECT name, seq FROM sqlite_sequence"))


def is_readable_file(path: Path) -> bool:
    """Whether it is a file that can be read; one behind a closed folder is not."""
    return os.access(path, os.R_OK) and path.is_file()


def block_size(size_bytes: int) -> int:
    """Bytes of one block of a file of this size: the manifest stays small however large the file is."""
    return max(_BLOCK_MIN_BYTES, -(-size_bytes // _BLOCKS_MAX))


def read_parts(path: Path) -> Iterator[bytes]:
    """The file in pieces that fit in memory."""
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            yield part


class Hasher:
    """Checksums of a file that is read in pieces."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._blocks: list[str] = []
        self.size_bytes = 0

    def add(self, data: bytes) -> None:
        """The next piece."""
        self._whole.update(data)
        while data:
            room = self._block_bytes - self.size_bytes % self._block_bytes
            part, data = data[:room], data[room:]
            self._block.update(part)
            self.size_bytes += len(part)
            if len(part) == room:
                self._blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def hashes(self) -> Hashes:
        """The checksums, after the last piece."""
        rest = [self._block.hexdigest()] if self.size_bytes % self._block_bytes else []
        return Hashes(self.size_bytes, self._whole.hexdigest(), self._block_bytes, (*self._blocks, *rest))


def difference(manifest: Manifest, found: Hashes) -> tuple[int, str] | None:
    """Where and how a backup's file differs from its manifest: the first byte of the damaged block; None when
    it does not."""
    for number, (wanted, has) in enumerate(zip(manifest.block_sha256, found.block_sha256, strict=False)):
        if wanted != has:
            start = number * manifest.block_bytes
            end = min(start + manifest.block_bytes, manifest.size_bytes)
            if found.size_bytes < end:
                return found.size_bytes, f"it is cut off: {found.size_bytes} of {manifest.size_bytes} bytes"
            return start, f"bytes {start} to {end} do not match their checksum"
    if found.size_bytes != manifest.size_bytes:
        return (
            min(found.size_bytes, manifest.size_bytes),
            f"it has {found.size_bytes} bytes, not {manifest.size_bytes}",
        )
    if found.sha256 != manifest.sha256:
        return 0, "it does not match its checksum"
    return None


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
