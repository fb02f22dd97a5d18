"""Finding the files of a folder: in a fixed order, never through a symbolic link, without what is ignored."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agentic_flow.agentdb.reading import SkipReason
from agentic_flow.core.errors import LimitExceeded, PathNotFound
from agentic_flow.core.toolkit import PathRules

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORED_FOLDERS = frozenset({".git", "node_modules", "__pycache__", ".venv"})
PATH_CHARS_MAX = 1000
_DEPTH_MAX = 64
_IGNORE_FILE_MAX_BYTES = 256 * 1024

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC

Ignores = tuple[tuple[int, "GitIgnoreSpec"], ...]
"""(components above the ignore file's folder, its patterns), outermost first."""


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file: `path` as documents name it, `parts` below `root`."""

    path: str
    root: Path
    parts: tuple[str, ...]
    size_bytes: int
    mtime_ns: int


@dataclass(slots=True)
class Walked:
    """The files to read, in path order within each root, and how many were passed over, by reason."""

    files: list[Found] = field(default_factory=list[Found])
    skipped: dict[SkipReason, int] = field(default_factory=dict[SkipReason, int])

    def skip(self, reason: SkipReason) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def walk(roots: dict[str, Path], rules: PathRules, *, files_max: int, file_max_bytes: int) -> Walked:
    """Look at everything below the roots without reading a file.

    Passed over and counted: files that `.gitignore` (nested ones too) or the rules exclude, hidden ones,
    symbolic links and what is no regular file (ignored), empty and too large ones, and what cannot be read.
    Folders that are excluded as a whole are not entered, so their files are not seen.

    Raises:
        PathNotFound: a root does not exist or cannot be read.
        LimitExceeded: there are more than `files_max` files.
    """
    walked = Walked()
    for name, root in roots.items():
        prefix = (name,) if len(roots) > 1 else ()
        walker = _Walker(walked, root, prefix, rules, files_max, file_max_bytes)
        try:
            mode = os.stat(root).st_mode
            if stat.S_ISDIR(mode):
                descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.scandir(descriptor).close()  # readable, or the error belongs to the caller
                    walker.folder(descriptor, (), ())
                finally:
                    os.close(descriptor)
            else:
                walker.single(root)
        except OSError as error:
            raise PathNotFound(
                f"path {str(root)!r} cannot be read: {error.strerror}", hint="name an existing, readable path"
            ) from error
    return walked


@contextmanager
def opened(found: Found) -> Generator[int]:
    """A descriptor of a found file, reached from its root without following a link.

    Raises:
        OSError: it is gone, was swapped for a link, or cannot be read.
    """
    if not found.parts:
        folder, name = (
            os.open(found.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
            found.root.name,
        )
    else:
        folder, name = os.open(found.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), found.parts[-1]
    try:
        for part in found.parts[:-1]:
            below = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = below
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Walker:
    walked: Walked
    root: Path
    prefix: tuple[str, ...]
    rules: PathRules
    files_max: int
    file_max_bytes: int

    def single(self, path: Path) -> None:
        """A root that is one file."""
        shown = "/".join((*self.prefix, path.name))
        # The caller named it, link or not; what it stands for is what is read.
        self.root = path.resolve(strict=True)
        with self.root.open("rb") as file:
            self._file(shown, (), os.fstat(file.fileno()))

    def folder(self, descriptor: int, parts: tuple[str, ...], ignores: Ignores) -> None:
        """Everything below an open folder."""
        with os.scandir(descriptor) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        ignores = (*ignores, *_ignore_file(descriptor, len(parts), entries))
        for entry in entries:
            below = (*parts, entry.name)
            shown = "/".join((*self.prefix, *below))
            if not _nameable(shown):
                self.walked.skip("unreadable")
            elif entry.is_dir(follow_symlinks=False):
                self._enter(descriptor, entry.name, below, shown, ignores)
            elif (
                entry.name.startswith(".")
                or not entry.is_file(follow_symlinks=False)
                or _ignored(below, False, ignores)
                or not self.rules.allows(shown)
            ):
                self.walked.skip("ignored")
            else:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    self.walked.skip("unreadable")
                    continue
                self._file(shown, below, status)

    def _enter(self, folder: int, name: str, parts: tuple[str, ...], shown: str, ignores: Ignores) -> None:
        if (
            name in IGNORED_FOLDERS
            or name.startswith(".")
            or len(parts) >= _DEPTH_MAX
            or _ignored(parts, True, ignores)
            or self.rules.forbids(shown, folder=True)
        ):
            return
        try:
            descriptor = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
        except OSError:
            self.walked.skip("unreadable")
            return
        try:
            self.folder(descriptor, parts, ignores)
        except OSError:
            self.walked.skip("unreadable")
        finally:
            os.close(descriptor)

    def _file(self, shown: str, parts: tuple[str, ...], status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            self.walked.skip("ignored")
        elif status.st_size == 0:
            self.walked.skip("empty")
        elif status.st_size > self.file_max_bytes:
            self.walked.skip("too_large")
        elif len(self.walked.files) >= self.files_max:
            raise LimitExceeded(
                f"there are more than {self.files_max!r} files below {str(self.root)!r}",
                hint="name a smaller folder, forbid paths, or raise agentdb.files_max",
            )
        else:
            self.walked.files.append(Found(shown, self.root, parts, status.st_size, status.st_mtime_ns))


def _ignored(parts: tuple[str, ...], folder: bool, ignores: Ignores) -> bool:
    """The deepest ignore file that has an opinion decides, as in git."""
    for depth, spec in reversed(ignores):
        verdict = spec.check_file("/".join(parts[depth:]) + ("/" if folder else "")).include
        if verdict is not None:
            return verdict
    return False


def _ignore_file(descriptor: int, depth: int, entries: list[os.DirEntry[str]]) -> Ignores:
    if not any(entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in entries):
        return ()
    from pathspec import GitIgnoreSpec

    try:
        opened_file = os.open(".gitignore", _FILE_FLAGS, dir_fd=descriptor)
    except OSError:
        return ()  # one that cannot be read excludes nothing
    try:
        data = os.read(opened_file, _IGNORE_FILE_MAX_BYTES)
    finally:
        os.close(opened_file)
    kept: list[str] = []
    for line in data.decode("utf-8-sig", "replace").splitlines():
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            continue  # git, too, passes over a line it cannot read
        kept.append(line)
    return ((depth, GitIgnoreSpec.from_lines(kept)),)


def _nameable(path: str) -> bool:
    """Whether the path can be a document's: valid Unicode and not too long."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return len(path) <= PATH_CHARS_MAX
