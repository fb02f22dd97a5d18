"""Index files: one container with a checked header and checked parts, replaced as a whole.

    magic (8 bytes) · length of the header (4) · CRC-32 of the header (4) · header (JSON) · parts, one by one

An index file is derived. One that is damaged in any way is as good as none: it is made again from the rows.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import orjson
import structlog

_log = structlog.get_logger(__name__)

_MAGIC = b"afindex1"
_HEAD = struct.Struct("<8sII")
_HEADER_MAX_BYTES = 1 << 20
_WRITTEN_WITHIN_S = 3600.0
"""Nobody writes one file for so long; the number of its process may be another's by then."""


class DamagedIndex(Exception):
    """The file is not what was written; the message says how."""


def write_index(path: Path, about: dict[str, Any], parts: dict[str, bytes]) -> int:
    """Write or replace the file; returns its size in bytes.

    Args:
        about: What the index is of; JSON values.
        parts: Its content by name.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    table = [{"name": name, "size": len(data), "crc": zlib.crc32(data)} for name, data in parts.items()]
    header = orjson.dumps({**about, "parts": table})
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of this process and thread's own: several may write the same index at once, the last one stays.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)))
            file.write(header)
            for data in parts.values():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return _HEAD.size + len(header) + sum(map(len, parts.values()))


def is_abandoned(path: Path) -> bool:
    """Whether this is what a process that is gone left of writing an index file."""
    name, _, rest = path.name.rpartition(".index.")
    process = rest.partition(".")[0]
    if not (name and rest.endswith(".part") and process.isdecimal()):
        return False
    try:
        if time.time() - path.stat().st_mtime > _WRITTEN_WITHIN_S:
            return True
        os.kill(int(process), 0)
    except (FileNotFoundError, PermissionError):
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `write_index` was given.

    Raises:
        FileNotFoundError: there is none.
        DamagedIndex: it is not whole.
    """
    data = path.read_bytes()
    if len(data) < _HEAD.size:
        raise DamagedIndex(f"{len(data)} bytes are no index file")
    magic, length, crc = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedIndex(f"it begins with {magic!r}, not {_MAGIC!r}")
    header = data[_HEAD.size : _HEAD.size + min(length, _HEADER_MAX_BYTES)]
    if len(header) != length or zlib.crc32(header) != crc:
        raise DamagedIndex("the header is damaged")
    about: dict[str, Any] = orjson.loads(header)
    parts: dict[str, bytes] = {}
    position = _HEAD.size + length
    for entry in about.pop("parts"):
        part = data[position : position + entry["size"]]
        if len(part) != entry["size"] or zlib.crc32(part) != entry["crc"]:
            raise DamagedIndex(f"part {entry['name']!r} is damaged")
        parts[entry["name"]] = part
        position += entry["size"]
    if position != len(data):
        raise DamagedIndex(f"{len(data) - position} bytes too many")
    return about, parts


def read_sequence(path: Path) -> int:
    """The operation that the index of the file is of; 0 when the file is no whole index."""
    try:
        return read_index(path)[0]["sequence"]
    except (DamagedIndex, OSError, KeyError):
        return 0


def remove_index(path: Path) -> None:
    """Remove the file, if it is there; one that cannot be removed is told of in the log."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        # It is derived, and never used for anything but its namespace.
        _log.warning("index_unremoved", path=str(path), error=str(error))
