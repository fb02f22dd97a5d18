"""Artifacts and files: what a step of a workflow leaves in its folders, and what a caller writes into one.

Both go by open descriptors (`tools.confine`): no link leads out of the folder, on the way in or out.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Conflict, InvalidInput, LimitExceeded, PathNotFound
from agentic_flow.core.ports import NewArtifact, ToolScope
from agentic_flow.core.toolkit import Stop, in_thread
from agentic_flow.swarm.artifacts import Left, StepArtifacts, check_name, media_type_of
from agentic_flow.swarm.workflow_text import is_template
from agentic_flow.tools.confine import Confinement, Place, confined_read
from agentic_flow.tools.walk import Walk, WalkOptions, entry_matcher

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o644


def check_pattern(pattern: str) -> None:
    """Refuse a pattern of files that can match none, as far as that is known before it is filled in.

    Raises:
        InvalidInput: it is malformed.
    """
    if not is_template(pattern):
        if pattern.startswith("!"):
            raise InvalidInput(f"{pattern!r} only leaves files out", hint="name those to keep")
        entry_matcher(pattern, "")


async def keep_files(
    artifacts: StepArtifacts, scope: ToolScope, patterns: Sequence[str], deadline: Deadline
) -> list[Left]:
    """Leave the files that fit these patterns, each under its path, in the order of the paths.

    Files that are ignored by git count, hidden ones do not. They may replace what others have left: to name
    them here is to say so.

    Args:
        artifacts: Of the step.
        scope: The folders, and which paths of them.
        patterns: gitignore-style; each must fit a file.
        deadline: When they must have been read.

    Raises:
        PathNotFound: no file fits one of the patterns, or it cannot be read.
        LimitExceeded: there are too many files to look through, or see `StepArtifacts.leave`.
    """
    for pattern in patterns:
        check_pattern(pattern)
    paths = await in_thread(deadline, lambda stop: _fitting(scope, patterns, stop))
    left: list[Left] = []
    for path in paths:
        name = check_name(path)
        content = await in_thread(
            deadline, lambda _, path=path: confined_read(scope, path, max_bytes=artifacts.max_bytes)
        )
        kept = NewArtifact(name, media_type_of(name, None, text=False), content)
        left.append(await artifacts.leave(kept, replaces_others=True))
    return left


def _fitting(scope: ToolScope, patterns: Sequence[str], stop: Stop) -> list[str]:
    matchers = {pattern: entry_matcher(pattern, "") for pattern in patterns}
    missing = set(patterns)
    found: list[str] = []
    walk = Walk(Confinement(scope), WalkOptions(ignored=True), stop)
    with closing(walk.below("")) as entries:
        for entry in entries:
            if entry.kind != "file":
                continue
            fitting = [pattern for pattern, fits in matchers.items() if fits(entry)]
            if fitting:
                missing.difference_update(fitting)
                found.append(entry.path)
    if walk.cut:
        raise LimitExceeded(
            "the folders hold more files than are looked through", hint="narrow them with paths_allowed"
        )
    if missing:
        raise PathNotFound(
            f"no file fits {sorted(missing)[0]!r}, which the step was to leave",
            hint="see that the step writes it, and that its path is relative to the folder",
        )
    return found


def write_out(folder: Path, files: Sequence[tuple[str, bytes]], *, force: bool = False) -> list[Path]:
    """Write artifacts into a folder, which is made if it is not there; the paths of the files. Blocks.

    Each file is written whole or not at all. Nothing is written when one of them is there already.

    Args:
        folder: Where to. What is written lies below it, whatever links are in it.
        files: Names and bytes.
        force: Replace files that are there.

    Raises:
        InvalidInput: a name is none.
        Conflict: a file is there already.
        PathNotFound: the folder cannot be written to.
        Forbidden: a link, or something that is no folder, stands in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot(folder, error) from error
    confinement = Confinement(ToolScope(roots={"out": folder}))
    places = [confinement.locate(check_name(name)) for name, _ in files]
    if not force:
        for place in places:
            if _is_there(confinement, place):
                raise _in_the_way(folder / place.path)
    for place, (_, content) in zip(places, files, strict=True):
        confinement.make_folders(place)
        try:
            _write(confinement, place, content, force=force)
        except FileExistsError as error:
            raise _in_the_way(folder / place.path) from error
        except OSError as error:
            raise _cannot(folder / place.path, error) from error
    return [folder / place.path for place in places]


def _is_there(confinement: Confinement, place: Place) -> bool:
    try:
        with confinement.open_parent(place) as (parent, name):
            os.stat(name, dir_fd=parent, follow_symlinks=False)
    except (PathNotFound, FileNotFoundError):
        return False
    return True


def _write(confinement: Confinement, place: Place, content: bytes, *, force: bool) -> None:
    with confinement.open_parent(place) as (parent, name):
        beside = f".agentic-flow-{secrets.token_hex(8)}"
        descriptor = os.open(beside, _NEW_FILE, _MODE, dir_fd=parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
            else:  # a link, because a rename would replace what has come meanwhile
                os.link(beside, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=parent)


def _in_the_way(path: Path) -> Conflict:
    return Conflict(f"{str(path)!r} is there already", hint="take another folder, or replace it with --force")


def _cannot(path: Path, error: OSError) -> PathNotFound:
    return PathNotFound(
        f"{str(path)!r} cannot be written: {error.strerror}", hint="name a folder that you may write to"
    )
