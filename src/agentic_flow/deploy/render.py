"""The last step: the files of a target, and putting them into a folder or comparing them with one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentic_flow.core.errors import InvalidInput, PathNotFound
from agentic_flow.deploy import compose, environments
from agentic_flow.deploy.spec import StackSpec

_NOTICE = b"# written by agentic-flow deploy render"

Target = Callable[[StackSpec], dict[str, str]]

TARGETS: dict[str, Target] = {"compose": compose.render, "env": lambda _: environments.render()}
"""Name → what makes its files: path → text."""


def render(target: str, spec: StackSpec) -> dict[str, str]:
    """The files of a target. Pure: the same spec gives the same bytes.

    Raises:
        InvalidInput: there is no such target, or the spec makes no sense.
    """
    make = TARGETS.get(target)
    if make is None:
        raise InvalidInput(f"{target!r} is not a target", hint=f"use one of {', '.join(TARGETS)}")
    return make(spec)


@dataclass(frozen=True, slots=True)
class Difference:
    """A file that is not as it would be written: `missing`, `changed`, or `stale` (no longer written)."""

    path: str
    state: str


def differences(folder: Path, files: Mapping[str, str]) -> list[Difference]:
    """What writing `files` into `folder` would change, by path."""
    found: list[Difference] = []
    for path, text in files.items():
        try:
            there = (folder / path).read_bytes()
        except FileNotFoundError:
            found.append(Difference(path, "missing"))
        else:
            if there != text.encode():
                found.append(Difference(path, "changed"))
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        if name not in files and path.is_file() and _is_ours(path):
            found.append(Difference(name, "stale"))
    return sorted(found, key=lambda one: one.path)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(200).startswith(_NOTICE)


def write_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write what differs, each file whole or not at all; the paths that were written.

    Files that are no longer written stay, for nobody knows who uses them; `differences` names them.

    Raises:
        PathNotFound: the folder cannot be written.
    """
    changed = [one.path for one in differences(folder, files) if one.state != "stale"]
    for path in changed:
        try:
            _write(folder / path, files[path].encode())
        except OSError as error:
            raise PathNotFound(
                f"{str(folder / path)!r} cannot be written: {error.strerror}", hint="choose another --output"
            ) from error
    return changed


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)  # users within the containers read some of them
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
