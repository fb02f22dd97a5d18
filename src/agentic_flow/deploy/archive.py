"""The file that a backup of a stack is: a compressed tar, written and read as a stream.

`about.json` comes first, so that a reader knows at once what it has before it; `manifest.json` with the size
and SHA-256 of every file comes last, so that a file that was cut off is none. The checksums find damage. They
are no signature: who can change the file can change them too.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self, cast

import orjson
from pydantic import ValidationError

from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    InvalidInput,
    PathNotFound,
    StorageFull,
    Unavailable,
)
from agentic_flow.core.messages import Frozen
from agentic_flow.core.version import __version__
from agentic_flow.deploy.snapshot import sync

FORMAT = 1
PRODUCT = "agentic-flow"
ABOUT, MANIFEST = "about.json", "manifest.json"
PART = ".part"
"""Ending of what is being written; a crash may leave it, and it can be removed."""

_COMPRESSION = 3
_CHUNK_BYTES = 1024 * 1024
_TEXT_MAX_BYTES = 64 * 1024 * 1024
_FILES_MAX = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9_@+=,.-][A-Za-z0-9_@+=,. -]*")
_NAME_CHARS_MAX = 1000

Kind = Literal["embedded", "compose"]
Store = Literal["directory", "postgresql"]


class About(Frozen):
    """What a backup is, before its files.

    Args:
        format: Of the file; a reader refuses what is newer than it knows.
        product_version: Of the program that wrote it.
        made_at_s: When it was begun.
        at_s: The one moment that it holds.
        kind: What was backed up: one process's data folder, or a stack of containers.
        store: Where that kept its state.
        name: Of the stack, or of the data folder.
        with_secrets: Whether keys, certificates and passwords are in it.
        tenants: Whose runs, memory or model calls are in it.
        elsewhere: What was kept outside of what was backed up, by the setting that says so.
    """

    format: int = FORMAT
    product: str = PRODUCT
    product_version: str = __version__
    made_at_s: float
    at_s: float
    kind: Kind
    store: Store
    name: str
    with_secrets: bool
    tenants: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


class Entry(Frozen):
    """A file of a backup."""

    path: str
    size_bytes: int
    sha256: str
    mode: int


class Manifest(Frozen):
    """All files of a backup.

    Args:
        pause_s: For how long writers were held when the moment was fixed.
    """

    format: int = FORMAT
    pause_s: float
    files: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """A backup that was read to its end and is whole."""

    about: About
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Of its files, unpacked."""
        return sum(entry.size_bytes for entry in self.manifest.files)


class ArchiveWriter:
    """Writes one backup. Use it with `with`.

    Args:
        sink: Where the bytes of the tar go.
        about: Its head.
    """

    def __init__(self, sink: IO[bytes], about: About) -> None:
        self._sink = _Sink(sink)
        self._tar = tarfile.open(  # noqa: SIM115 - closed by `__exit__`
            fileobj=cast(IO[bytes], self._sink), mode="w|", format=tarfile.PAX_FORMAT
        )
        self._at_s = int(about.made_at_s)
        self._entries: list[Entry] = []
        self._put(ABOUT, _encoded(about), 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The tar would write its end in any case, on a disk that may be full, into a file that is gone.
        self._sink.is_open = False
        self._tar.close()

    def add(self, path: str, source: IO[bytes], size_bytes: int, mode: int) -> Entry:
        """Add a file of a known size.

        Raises:
            OSError: `source` ends before that.
        """
        hashing = _Hashing(source)
        self._tar.addfile(self._header(path, size_bytes, mode), cast(IO[bytes], hashing))
        entry = Entry(path=path, size_bytes=size_bytes, sha256=hashing.sha256, mode=mode & 0o777)
        self._entries.append(entry)
        return entry

    def add_file(self, path: str, file: Path) -> Entry:
        """Add a file of the disk, with its mode."""
        with file.open("rb") as source:
            status = os.fstat(source.fileno())
            return self.add(path, source, status.st_size, status.st_mode)

    def add_bytes(self, path: str, content: bytes, mode: int = 0o600) -> Entry:
        """Add a small file."""
        return self.add(path, io.BytesIO(content), len(content), mode)

    def finish(self, pause_s: float) -> Manifest:
        """Write the end. Without it the backup is none."""
        manifest = Manifest(pause_s=pause_s, files=tuple(self._entries))
        self._put(MANIFEST, _encoded(manifest), 0o600)
        self._tar.close()
        self._sink.is_open = False
        return manifest

    def _put(self, path: str, content: bytes, mode: int) -> None:
        self._tar.addfile(self._header(path, len(content), mode), io.BytesIO(content))

    def _header(self, path: str, size_bytes: int, mode: int) -> tarfile.TarInfo:
        header = tarfile.TarInfo(path)
        header.size, header.mode, header.mtime = size_bytes, mode & 0o777, self._at_s
        return header


@contextlib.contextmanager
def new_archive(destination: Path) -> Generator[IO[bytes]]:
    """A compressed file that appears under its name, durable, when the block ends well, and else not at all.

    Raises:
        Conflict: there is one already.
        Unavailable: it cannot be written; nothing is left of it.
    """
    if destination.exists() or destination.is_symlink():
        raise Conflict(f"{str(destination)!r} exists", hint="give each backup a new name")
    part = destination.parent / f".{destination.name}.{os.getpid()}.{os.urandom(4).hex()}{PART}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            with gzip.GzipFile("", "wb", _COMPRESSION, file) as packed:
                yield cast(IO[bytes], packed)
            file.flush()
            os.fsync(file.fileno())
        part.rename(destination)
        sync(destination.parent)
    except OSError as error:
        raise unwritten(f"the backup {str(destination)!r}", error, "nothing is left of it") from error
    finally:
        part.unlink(missing_ok=True)


Take = Callable[[Entry, IO[bytes]], None]
"""Called with each file in order. The checksum of the entry is not known yet: it is ""."""


def read_archive(
    file: Path, take: Take | None = None, begin: Callable[[About], None] | None = None
) -> Contents:
    """Read a backup to its end, checking everything.

    Args:
        file: The backup.
        take: Called with each file. What it does is to be undone when this raises: the checksums come last.
        begin: Called with the head before that.

    Raises:
        PathNotFound: the file cannot be read.
        InvalidInput: it is no backup of ours.
        Conflict: a newer version wrote it.
        DataCorrupted: it is cut off or damaged, or its files would leave their folder.
    """
    began = False

    def note(about: About) -> None:
        nonlocal began
        began = True
        if begin is not None:
            begin(about)

    try:
        with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) as packed:
            return read_stream(cast(IO[bytes], packed), repr(str(file)), take, note)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        if error.filename not in (str(file), file):
            raise
        raise PathNotFound(
            f"{str(file)!r} cannot be read: {error.strerror}", hint="check the path"
        ) from error
    except gzip.BadGzipFile as error:
        raise (_damaged if began else _foreign)(repr(str(file)), str(error)) from error
    except (EOFError, zlib.error) as error:
        raise _damaged(repr(str(file)), f"it ends too early or was changed ({error})") from error


def read_stream(
    stream: IO[bytes],
    name: str,
    take: Take | None = None,
    begin: Callable[[About], None] | None = None,
) -> Contents:
    """`read_archive` of the unpacked bytes. Raises also what reading them does."""
    about: About | None = None
    manifest: Manifest | None = None
    found: dict[str, Entry] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for header in tar:
                if about is None:
                    if header.name != ABOUT:
                        raise _foreign(name, f"it begins with {header.name!r}")
                    about = _read_about(_text(tar, header, name), name)
                    if begin is not None:
                        begin(about)
                elif manifest is not None:
                    raise _damaged(name, f"{header.name!r} comes after the end")
                elif header.name == MANIFEST:
                    manifest = _read_manifest(_text(tar, header, name), name)
                else:
                    _check_header(header, found, name)
                    found[header.name] = _pass_on(tar, header, take)
    except tarfile.TarError as error:
        if about is None:
            raise _foreign(name, str(error)) from error
        raise _damaged(name, str(error)) from error
    if about is None:
        raise _foreign(name, "it is empty")
    while stream.read(_CHUNK_BYTES):  # to the checksum of the compression
        pass
    if manifest is None:
        raise _damaged(name, "its end is missing")
    _compare(found, manifest, name)
    return Contents(about, manifest)


def read_about(file: Path) -> About:
    """The head alone; nothing behind it is looked at. Raises as `read_archive`."""
    found: list[About] = []

    class _Enough(Exception):
        pass

    def begin(about: About) -> None:
        found.append(about)
        raise _Enough

    with contextlib.suppress(_Enough):
        read_archive(file, begin=begin)
    return found[0]


def _pass_on(tar: tarfile.TarFile, header: tarfile.TarInfo, take: Take | None) -> Entry:
    source = tar.extractfile(header)
    assert source is not None  # it is a regular file
    hashing = _Hashing(source)
    entry = Entry(path=header.name, size_bytes=header.size, sha256="", mode=header.mode & 0o777)
    if take is not None:
        take(entry, cast(IO[bytes], hashing))
    while hashing.read(_CHUNK_BYTES):  # what was not taken
        pass
    return entry.model_copy(update={"size_bytes": hashing.size_bytes, "sha256": hashing.sha256})


def _compare(found: dict[str, Entry], manifest: Manifest, name: str) -> None:
    wanted = {entry.path: entry for entry in manifest.files}
    for path in [*wanted, *found]:
        if found.get(path) != wanted.get(path):
            what = "is missing" if path not in found else "does not match its checksum"
            raise _damaged(name, f"{path!r} {what}")


def _check_header(header: tarfile.TarInfo, found: dict[str, Entry], name: str) -> None:
    """Whether it is a file that we would have written."""
    parts = header.name.split("/")
    fine = (
        header.isreg()
        and len(parts) >= 2
        and len(header.name) <= _NAME_CHARS_MAX
        and all(_NAME.fullmatch(part) and part not in (".", "..") for part in parts)
    )
    if not fine or header.name in found or len(found) >= _FILES_MAX:
        raise _damaged(name, f"it names {header.name!r}, which no backup of ours holds")


def _text(tar: tarfile.TarFile, header: tarfile.TarInfo, name: str) -> bytes:
    source = tar.extractfile(header) if header.isreg() and header.size <= _TEXT_MAX_BYTES else None
    if source is None:
        raise _damaged(name, f"{header.name!r} is no text")
    return source.read()


def _read_about(text: bytes, name: str) -> About:
    document = _document(text, name)
    if document.get("product") != PRODUCT:
        raise _foreign(name, f"it was written by {document.get('product')!r}")
    version, wrote = document.get("format"), str(document.get("product_version"))
    if not isinstance(version, int) or version > FORMAT or _release(wrote) > _release(__version__):
        raise Conflict(
            f"{name} has format {version!r} and is of version {wrote!r}; this program knows {FORMAT!r} and "
            f"is {__version__!r}",
            hint="use the version of agentic-flow that wrote it, or a newer one",
        )
    try:
        return About.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(name, f"{ABOUT}: {str(error).splitlines()[0]}") from error


def _read_manifest(text: bytes, name: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(name, f"{MANIFEST}: {str(error).splitlines()[0]}") from error


def _document(text: bytes, name: str) -> dict[str, Any]:
    try:
        document: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _damaged(name, f"{ABOUT}: {error}") from error
    if not isinstance(document, dict):
        raise _foreign(name, f"{ABOUT} is no table")
    return cast(dict[str, Any], document)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _encoded(model: About | Manifest) -> bytes:
    return orjson.dumps(model.model_dump(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def unwritten(what: str, error: OSError, effect: str) -> AgenticFlowError:
    """What a failed write means to the operator.

    Args:
        what: What cannot be written.
        effect: What became of it.
    """
    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
    return kind(
        f"{what} cannot be written: {error.strerror or error}",
        hint=f"make room or choose another place; {effect}",
    )


def _foreign(name: str, why: str) -> AgenticFlowError:
    return InvalidInput(
        f"{name} is no backup of a stack: {why}",
        hint="give a file that `agentic-flow backup` made; one of `db backup` is a folder for `db restore`",
    )


def _damaged(name: str, why: str) -> AgenticFlowError:
    return DataCorrupted(f"{name} is damaged: {why}", hint="use another copy of it, or another backup")


class _Sink:
    """What a tar is written to, until it is given up."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.is_open = True

    def write(self, data: bytes) -> int:
        return self._sink.write(data) if self.is_open else len(data)


class _Hashing:
    """A source that is hashed while it is read."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        self.size_bytes += len(data)
        return data

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def written(source: IO[bytes], target: Path, mode: int) -> None:
    """Write a new file of this content, durable, for its owner alone until it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks(source):
            file.write(chunk)
        file.flush()
        os.fchmod(file.fileno(), mode & 0o777)
        os.fsync(file.fileno())


def chunks(source: IO[bytes]) -> Iterator[bytes]:
    """The rest of a stream in pieces."""
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk
