"""Files confined to a scope's roots by open descriptors.

Every path is walked from its root one component at a time with `openat` and O_NOFOLLOW, so the object that
was checked is the object that is used: a component swapped for a symbolic link between two system calls is
refused by the kernel, not by a check that came too early. Symbolic links are never followed, not even to
places inside the root, because a link would also carry a path around the allowed and forbidden patterns.
Devices, FIFOs and sockets are never opened for their content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentic_flow.core.errors import Forbidden, InvalidInput, PathNotFound, TooLarge
from agentic_flow.core.ports import ToolScope
from agentic_flow.core.toolkit import PathRules

PATH_CHARS_MAX = 4096
DEPTH_MAX = 64
"""Deepest folder that is walked or opened; each level of a walk holds a descriptor."""

_CHUNK_BYTES = 1024 * 1024
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

KINDS: dict[int, str] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
}


def kind_of(mode: int) -> str:
    """The kind of a file-system object by its `st_mode`."""
    return KINDS.get(stat.S_IFMT(mode), "other")


def canonical_path(text: str) -> str:
    """The one spelling of a relative path: no empty or `.` components, no trailing slash.

    Raises:
        InvalidInput: it is absolute, climbs with `..`, holds a NUL or a lone surrogate, or is too long.
    """
    if text.startswith("/"):
        raise InvalidInput(f"path {_shown(text)} is absolute", hint="give it relative to the root, as listed")
    if "\0" in text or _unencodable(text):
        raise InvalidInput(f"path {_shown(text)} holds a character that no file name has")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidInput(f"path {_shown(text)} climbs with '..'", hint="give it from the root downwards")
    if len(text) > PATH_CHARS_MAX or len(parts) > DEPTH_MAX:
        raise InvalidInput(
            f"path {_shown(text)} is longer than {PATH_CHARS_MAX} characters or {DEPTH_MAX} folders"
        )
    return "/".join(parts)


def _unencodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")


@dataclass(frozen=True, slots=True)
class Place:
    """A permitted path: as printed, and as components below a real root."""

    path: str
    root: Path
    parts: tuple[str, ...]


class Confinement:
    """Opens what a scope permits, and nothing else. All methods block; call them in a thread.

    Args:
        scope: Roots and path patterns.

    Raises:
        InvalidInput: a path pattern of the scope is malformed.
    """

    def __init__(self, scope: ToolScope) -> None:
        self.roots = dict(scope.roots)
        self.rules = PathRules(scope)

    def locate(self, path: str) -> Place:
        """Where a path a tool was given lies. The root itself is `""` (with a single root) or its name.

        Raises:
            InvalidInput: the path is malformed (see `canonical_path`).
            Forbidden: no root, or the patterns refuse it; says nothing about whether it exists.
        """
        if not self.roots:
            raise Forbidden("no folder is open to tools here", hint="start the run with --input PATH")
        clean = canonical_path(path)
        if len(self.roots) == 1:
            [(_, root)] = self.roots.items()
            parts = tuple(clean.split("/")) if clean else ()
        else:
            name, _, below = clean.partition("/")
            if name not in self.roots:
                raise PathNotFound(
                    f"path {_shown(path)} names none of the roots {sorted(self.roots)!r}",
                    hint="start the path with one of them",
                )
            root = self.roots[name]
            parts = tuple(below.split("/")) if below else ()
        if parts and self.rules.forbids(clean):
            raise _off_limits(path)
        return Place(clean, root, parts)

    @contextmanager
    def open_folder(self, place: Place) -> Generator[int]:
        """A descriptor of the folder, for `dir_fd`. Closed on exit."""
        descriptor = self._descend(place, place.parts)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def open_parent(self, place: Place) -> Generator[tuple[int, str]]:
        """(descriptor of the folder that holds it, last component). The object need not exist."""
        if not place.parts:
            raise InvalidInput(f"path {place.path!r} is a root, not something inside one")
        descriptor = self._descend(place, place.parts[:-1])
        try:
            yield descriptor, place.parts[-1]
        finally:
            os.close(descriptor)

    @contextmanager
    def open_file(self, place: Place) -> Generator[tuple[int, os.stat_result]]:
        """(descriptor for reading, its status) of a regular file.

        Raises:
            PathNotFound: it does not exist or cannot be read.
            Forbidden: it is a symbolic link, device, FIFO or socket, or the patterns do not allow it.
            InvalidInput: it is a folder.
        """
        if place.parts and not self.rules.allows(place.path):
            raise _off_limits(place.path)
        with self.open_parent(place) as (parent, name):
            descriptor = open_regular(parent, name, place.path)
        try:
            yield descriptor, os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def status(self, place: Place) -> os.stat_result:
        """The status of the object itself; a symbolic link is not followed."""
        if not place.parts:
            with self.open_folder(place) as descriptor:
                return os.fstat(descriptor)
        with self.open_parent(place) as (parent, name):
            status = _status(parent, name, place.path)
        folder = stat.S_ISDIR(status.st_mode)
        # A folder outside the allow-list may lead to allowed files; only a forbidden one is out of bounds.
        refused = self.rules.forbids(place.path, folder=True) if folder else not self.rules.allows(place.path)
        if refused:
            raise _off_limits(place.path)
        return status

    def make_folders(self, place: Place) -> None:
        """Create the folders above a place that are missing, each inside the one before it."""
        descriptor = self._open_root(place)
        try:
            for depth, part in enumerate(place.parts[:-1], start=1):
                path = _printed(place, depth)
                self._check_folder(path)
                try:
                    os.mkdir(part, dir_fd=descriptor)
                except FileExistsError:
                    pass  # whatever it is, opening it below decides
                except OSError as error:
                    raise _translated(error, path, "created") from None
                descriptor, previous = open_subfolder(descriptor, part, path), descriptor
                os.close(previous)
        finally:
            os.close(descriptor)

    def _descend(self, place: Place, parts: tuple[str, ...]) -> int:
        descriptor = self._open_root(place)
        for depth, part in enumerate(parts, start=1):
            try:
                path = _printed(place, depth)
                self._check_folder(path)
                below = open_subfolder(descriptor, part, path)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    def _check_folder(self, path: str) -> None:
        if self.rules.forbids(path, folder=True):
            raise _off_limits(path)

    def _open_root(self, place: Place) -> int:
        try:
            # The root itself was named by the caller, who may name it through a link.
            return os.open(place.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PathNotFound(
                f"the root of {place.path!r} cannot be opened: {error.strerror}",
                hint="it was moved or its permissions changed since the run began",
            ) from None


def confined_read(scope: ToolScope, path: str, *, max_bytes: int) -> bytes:
    """The content of a regular file inside the scope's roots, as permitted by its patterns. Blocks.

    Raises:
        InvalidInput: the path is malformed or names a folder.
        PathNotFound: there is no such file, or it cannot be read.
        Forbidden: it leads out of the roots, is no regular file, or the patterns refuse it.
        TooLarge: it holds more than `max_bytes`.
    """
    confinement = Confinement(scope)
    with confinement.open_file(confinement.locate(path)) as (descriptor, status):
        return read_descriptor(descriptor, path, size_bytes=status.st_size, max_bytes=max_bytes)


def read_descriptor(
    descriptor: int,
    path: str,
    *,
    size_bytes: int,
    max_bytes: int,
    check: Callable[[], None] = lambda: None,
) -> bytes:
    """All bytes of an open file; `check` is called between chunks and may raise.

    Raises:
        TooLarge: there are more than `max_bytes`, whatever its status said.
    """
    if size_bytes > max_bytes:
        raise _too_large(path, size_bytes, max_bytes)
    chunks: list[bytes] = []
    got = 0
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        check()
        got += len(chunk)
        if got > max_bytes:
            raise _too_large(path, got, max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def open_subfolder(parent: int, name: str, path: str) -> int:
    """A descriptor of a folder in an open folder; never through a link."""
    try:
        return os.open(name, _FOLDER_FLAGS, dir_fd=parent)
    except OSError as error:
        raise _refusal(error, parent, name, path, "a folder") from None


def open_regular(parent: int, name: str, path: str) -> int:
    """A descriptor, for reading, of a regular file in an open folder; never through a link.

    The kind is looked at before opening, because opening a device may act on it, and again afterwards,
    because only then is it certain.
    """
    _demand_regular(_status(parent, name, path).st_mode, path)
    try:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=parent)
    except OSError as error:
        raise _refusal(error, parent, name, path, "a file") from None
    try:
        _demand_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _demand_regular(mode: int, path: str) -> None:
    kind = kind_of(mode)
    if kind == "folder":
        raise InvalidInput(f"path {path!r} is a folder", hint="list it with file_list")
    if kind != "file":
        raise _not_followed(path, kind)


def _status(parent: int, name: str, path: str) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        raise _translated(error, path, "read") from None


def _refusal(error: OSError, parent: int, name: str, path: str, wanted: str) -> Exception:
    """The reason in our words. The kernel has refused already; a look now only chooses the message."""
    try:
        kind = kind_of(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return _translated(error, path, "read")
    if kind == "symlink":
        return _not_followed(path, kind)
    if isinstance(error, NotADirectoryError):
        return PathNotFound(f"path {path!r} is not {wanted} but a {kind}")
    return _translated(error, path, "read")


def _translated(error: OSError, path: str, verb: str) -> PathNotFound:
    if isinstance(error, FileNotFoundError):
        return PathNotFound(
            f"path {_shown(path)} does not exist", hint="find its name with file_list or file_find"
        )
    return PathNotFound(
        f"path {_shown(path)} cannot be {verb}: {error.strerror}", hint="check its permissions"
    )


def _not_followed(path: str, kind: str) -> Forbidden:
    if kind == "symlink":
        return Forbidden(
            f"path {path!r} is a symbolic link, and links are not followed", hint="name the real file instead"
        )
    return Forbidden(f"path {path!r} is a {kind}, not a regular file")


def _off_limits(path: str) -> Forbidden:
    return Forbidden(
        f"path {_shown(path)} is outside what this run may touch",
        hint="its allowed and forbidden paths were set when it was started",
    )


def _too_large(path: str, size_bytes: int, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"file {path!r} holds {size_bytes} bytes or more, the limit is {max_bytes}",
        hint="read a part of it",
    )


def _printed(place: Place, depth: int) -> str:
    """The printed path of the first `depth` components of a place."""
    rooted = len(place.path.split("/")) - len(place.parts) if place.path else 0
    return "/".join(place.path.split("/")[: rooted + depth])
