"""Walking confined folders in a fixed order, with ripgrep's rules on what to pass over."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.toolkit import Stop
from agentic_flow.tools.confine import (
    DEPTH_MAX,
    Confinement,
    Place,
    canonical_path,
    kind_of,
    open_regular,
    open_subfolder,
    read_descriptor,
)

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILES = (".gitignore", ".ignore")
ENTRIES_MAX = 200_000
_IGNORE_FILE_MAX_BYTES = 256 * 1024
_GLOBS_MAX = 64

_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")

Parts = tuple[str, ...]
Ignores = tuple[tuple[int, "GitIgnoreSpec"], ...]
"""(number of leading components that the ignore file's folder has, its patterns), outermost first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something found. `folder` is the open descriptor of the folder that holds it, until the next entry."""

    path: str
    parts: Parts
    name: str
    kind: str
    depth: int
    folder: int

    def status(self) -> os.stat_result | None:
        """Its status, links not followed; None when it is gone by now."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except OSError:
            return None


@dataclass(frozen=True, slots=True)
class WalkOptions:
    """What to pass over.

    Args:
        hidden: Include names that start with a dot.
        ignored: Include what `.gitignore` and `.ignore` files exclude.
        depth_max: Levels below the start; 1 is its own entries.
        after: Begin behind this path (its components), for the next page.
        inclusive: Begin at `after` itself.
    """

    hidden: bool = False
    ignored: bool = False
    depth_max: int = DEPTH_MAX
    after: Parts = ()
    inclusive: bool = False


class Walk:
    """Everything permitted below a folder, depth first, names in code-point order.

    Forbidden files and folders do not appear. With an allow-list, a folder appears only if the patterns
    cover it or an allowed file lies below it. Iterate once; close the iterator (or exhaust it) to release
    the descriptors.

    Args:
        stop: Asked at every folder; ends the walk by raising.
    """

    def __init__(self, confinement: Confinement, options: WalkOptions, stop: Stop) -> None:
        self._confinement = confinement
        self._rules = confinement.rules
        self._options = options
        self._stop = stop
        self.entries = 0
        self.unreadable = 0
        self.cut = False

    def below(self, path: str) -> Generator[Entry]:
        """Entries below the folder `path`; with several roots, `""` stands for all of them.

        Raises:
            PathNotFound, Forbidden, InvalidInput: it is no permitted folder.
            Cancelled, DeadlineExceeded: `stop` said so.
        """
        if len(self._confinement.roots) > 1 and not canonical_path(path):
            for name in sorted(self._confinement.roots):
                yield from self.below(name)
            return
        place = self._confinement.locate(path)
        base = tuple(place.path.split("/")) if place.path else ()
        with self._confinement.open_folder(place) as descriptor:
            ignores = () if self._options.ignored else self._inherited_ignores(place, base)
            yield from self._entries(descriptor, base, 1, ignores)

    def _entries(self, descriptor: int, parts: Parts, depth: int, ignores: Ignores) -> Generator[Entry]:
        self._stop.check()
        try:
            with os.scandir(descriptor) as found:
                names = sorted((entry.name, _entry_kind(entry)) for entry in found)
        except OSError:
            self.unreadable += 1
            return
        if not self._options.ignored:
            ignores = (*ignores, *_ignore_files(descriptor, parts, {name for name, _ in names}))
        for name, kind in names:
            if self.cut or self.entries >= ENTRIES_MAX:
                self.cut = True
                return
            entry = Entry("/".join((*parts, name)), (*parts, name), name, kind, depth, descriptor)
            if self._passed_over(entry, ignores):
                continue
            self.entries += 1
            if kind != "folder":
                if self._wanted(entry.parts) and self._rules.allows(entry.path):
                    yield entry
            else:
                yield from self._folder(entry, ignores)

    def _folder(self, entry: Entry, ignores: Ignores) -> Generator[Entry]:
        if self._rules.forbids(entry.path, folder=True):
            return
        try:
            descriptor = open_subfolder(entry.folder, entry.name, entry.path)
        except AgenticFlowError:
            self.unreadable += 1  # vanished, not ours to read, or swapped for a link since it was listed
            return
        try:
            if self._wanted(entry.parts) and self._shown(entry, descriptor, ignores):
                yield entry
            if entry.depth < self._options.depth_max and entry.depth < DEPTH_MAX:
                yield from self._entries(descriptor, entry.parts, entry.depth + 1, ignores)
        finally:
            os.close(descriptor)

    def _shown(self, folder: Entry, descriptor: int, ignores: Ignores) -> bool:
        if self._rules.allows(folder.path, folder=True):
            return True
        look = Walk(self._confinement, WalkOptions(self._options.hidden, self._options.ignored), self._stop)
        look.entries = self.entries
        with closing(look._entries(descriptor, folder.parts, folder.depth + 1, ignores)) as below:
            return any(entry.kind != "folder" for entry in below)

    def _passed_over(self, entry: Entry, ignores: Ignores) -> bool:
        if entry.name.startswith(".") and not self._options.hidden:
            return True
        if _unencodable(entry.name):
            self.unreadable += 1  # no JSON string can name it
            return True
        after = self._options.after
        if entry.parts < after and after[: len(entry.parts)] != entry.parts:
            return True
        return _ignored(entry.parts, entry.kind == "folder", ignores)

    def _wanted(self, parts: Parts) -> bool:
        after = self._options.after
        return parts >= after if self._options.inclusive else parts > after

    def _inherited_ignores(self, place: Place, base: Parts) -> Ignores:
        """Ignore files of the folders above the start, from its root down."""
        found: Ignores = ()
        rooted = len(base) - len(place.parts)
        for depth in range(len(place.parts)):
            parts = base[: rooted + depth]
            above = Place("/".join(parts), place.root, place.parts[:depth])
            with self._confinement.open_folder(above) as descriptor:
                found = (*found, *_ignore_files(descriptor, parts, set(IGNORE_FILES)))
        return found


def entry_matcher(glob: str | None, start: str) -> Callable[[Entry], bool]:
    """Whether an entry's path, whole or below the folder `start`, fits a glob.

    `*.py` fits at any depth, `src/**/*.py` from the root (or from `start`), `{a,b}` either.

    Raises:
        InvalidInput: the glob is malformed or expands to too many.
    """
    spec = _globs(glob) if glob is not None else None
    skip = len(start) + 1 if start else 0

    def fits(entry: Entry) -> bool:
        if spec is None:
            return True
        end = "/" if entry.kind == "folder" else ""
        return spec.match_file(entry.path + end) or (skip > 0 and spec.match_file(entry.path[skip:] + end))

    return fits


@lru_cache(maxsize=128)
def _globs(glob: str) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    expanded = _expand_braces(glob)
    if not glob.strip() or len(expanded) > _GLOBS_MAX:
        raise InvalidInput(f"glob {glob!r} is empty or expands to too many", hint="use one like '*.py'")
    try:
        return GitIgnoreSpec.from_lines(expanded)
    except ValueError as error:
        raise InvalidInput(
            f"glob {glob!r} is malformed: {error}", hint="use one like '*.py' or 'src/**/*.py'"
        ) from None


def _expand_braces(glob: str) -> list[str]:
    """`*.{py,md}` → `*.py`, `*.md`; one level deep, as ripgrep's globs have it."""
    found = [glob]
    for _ in range(6):
        opened = [text for text in found if _BRACES.search(text)]
        if not opened or len(found) > _GLOBS_MAX:
            break
        grown: list[str] = []
        for text in found:
            match = _BRACES.search(text)
            choices = match[1].split(",") if match else [None]
            grown += [
                text
                if match is None or choice is None
                else text[: match.start()] + choice + text[match.end() :]
                for choice in choices
            ]
        found = grown
    return found


def _ignored(parts: Parts, folder: bool, ignores: Ignores) -> bool:
    """The deepest ignore file that has an opinion decides, as in git."""
    for depth, spec in reversed(ignores):
        verdict = spec.check_file("/".join(parts[depth:]) + ("/" if folder else "")).include
        if verdict is not None:
            return verdict
    return False


def _ignore_files(descriptor: int, parts: Parts, names: set[str]) -> Ignores:
    found: list[tuple[int, GitIgnoreSpec]] = []
    for name in IGNORE_FILES:
        if name not in names:
            continue
        try:
            opened = open_regular(descriptor, name, "/".join((*parts, name)))
        except AgenticFlowError:
            continue  # absent, unreadable or a link: it excludes nothing
        try:
            data = read_descriptor(
                opened, name, size_bytes=os.fstat(opened).st_size, max_bytes=_IGNORE_FILE_MAX_BYTES
            )
        except (AgenticFlowError, OSError):
            continue
        finally:
            os.close(opened)
        found.append((len(parts), _ignore_spec(data)))
    return tuple(found)


@lru_cache(maxsize=256)
def _ignore_spec(data: bytes) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    kept: list[str] = []
    for line in data.decode("utf-8", "replace").splitlines():
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            continue  # git, too, passes over a line it cannot read
        kept.append(line)
    return GitIgnoreSpec.from_lines(kept)


def _entry_kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if entry.is_file(follow_symlinks=False):
        return "file"
    try:
        return kind_of(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return "other"


def _unencodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False
