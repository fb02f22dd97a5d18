"""The files of a history folder: which of them count, writing them durably, and who may write.

A segment is written under another name, synced, renamed, and the folder synced. What has a segment's name is
whole, unless the disk spoils it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentic_flow.agentdb import segments
from agentic_flow.agentdb.segments import Scan
from agentic_flow.core.errors import DataCorrupted

ENDING = ".segment"
LOCK = "lock"

_NAME = re.compile(r"^(\d{16})-(\d{16})\.segment$")
_LOCK_RETRY_S = 0.02


@dataclass(frozen=True, slots=True, order=True)
class SegmentFile:
    """A segment by its name: operations `first` to `last`."""

    first: int
    last: int
    path: Path


def list_segments(folder: Path) -> list[SegmentFile]:
    """The segments of a database's folder in order. One whose range lies within another's does not count: it
    was written again with what came after, and a crash kept it from being removed.

    Raises:
        OSError: the folder cannot be read.
    """
    found = [
        SegmentFile(int(match[1]), int(match[2]), folder / name)
        for name in os.listdir(folder)
        if (match := _NAME.match(name))
    ]
    kept: list[SegmentFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        if not kept or file.last > kept[-1].last:
            kept.append(file)
    return kept


def superseded_segments(folder: Path) -> list[Path]:
    """Files of segments that do not count any more."""
    counted = {file.path.name for file in list_segments(folder)}
    return [folder / name for name in os.listdir(folder) if _NAME.match(name) and name not in counted]


def write_segment(folder: Path, data: bytes, first: int, last: int) -> SegmentFile:
    """Store a segment; it is durable and whole when this returns, or was never there.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f"{first:016d}-{last:016d}{ENDING}"
    replace_file(path, (data,))
    return SegmentFile(first, last, path)


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write or replace a file durably, as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, wait_s: float) -> Generator[None]:
    """Hold the folder's lock, which the operating system drops when the process dies.

    Raises:
        BlockingIOError: another process holds it for longer than `wait_s`.
        OSError: the folder is not there or cannot be written.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        give_up_at_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at_s:
                    raise
                time.sleep(_LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def failure(error: Exception, folder: Path) -> str:
    """Why the history in `folder` cannot be written, for people: the path and the system's words."""
    if isinstance(error, BlockingIOError):
        return f"another process is writing the history in {str(folder)!r}"
    if isinstance(error, OSError):
        return f"{str(error.filename or folder)!r} cannot be written: {error.strerror or error}"
    return str(error)


def load_segment(file: SegmentFile) -> Scan:
    """Read and check a whole segment.

    Raises:
        OSError: it cannot be read.
        Conflict: it is of a newer version.
    """
    return segments.scan_segment(file.path.read_bytes())


def whole_segment(file: SegmentFile) -> Scan:
    """`load_segment`, demanding that it is undamaged.

    Raises:
        DataCorrupted: it is not; names file and byte.
    """
    scan = load_segment(file)
    if scan.damage is not None:
        raise DataCorrupted(
            f"{str(file.path)!r} is damaged at byte {scan.damage.offset}: {scan.damage.reason}",
            hint="move the history folder away and make a new backup; `verify` says what is left of it",
            details={"file": str(file.path), "offset": scan.damage.offset},
        )
    return scan


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed left; to be called with the lock held."""
    for path in (*superseded_segments(folder), *folder.glob(f"*{ENDING}.*.part")):
        path.unlink(missing_ok=True)
