"""file_write and file_edit: a file is replaced whole, by rename, or not at all."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from agentic_flow.core.errors import Conflict, Forbidden, InvalidInput, PathNotFound, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.toolkit import Stop, Tool, ToolCall, ToolInput, in_thread
from agentic_flow.tools.confine import Confinement, Place, open_regular, read_descriptor
from agentic_flow.tools.file_arguments import CanonicalPath
from agentic_flow.tools.text import FILE_MAX_BYTES, is_binary

TEXT_MAX_CHARS = 4 * 1024 * 1024
ABSENT = "absent"

_DIFF_LINES_MAX = 2000
_DIFF_CHARS_MAX = 16_000
_CONTEXT_LINES = 3
_HUNK = re.compile(r"^@@ -(\d+)((?:,\d+)?) \+(\d+)((?:,\d+)?) @@", re.MULTILINE)

Digest = Annotated[str, Field(pattern=rf"^([0-9a-f]{{64}}|{ABSENT})$")]
ExpectedDigest = Annotated[
    Digest | None,
    Field(description="SHA-256 the file must have now (file_read gives it), or 'absent' for a new file."),
]
DryRun = Annotated[bool, Field(description="Only say what would happen.")]


class FileWrite(ToolInput):
    path: Annotated[CanonicalPath, Field(min_length=1, description="File to create or replace.")]
    text: Annotated[str, Field(max_length=TEXT_MAX_CHARS, description="The whole new content.")]
    expected_sha256: ExpectedDigest = None
    create_folders: Annotated[bool, Field(description="Create missing folders above it.")] = False
    dry_run: DryRun = False


class FileEdit(ToolInput):
    path: Annotated[CanonicalPath, Field(min_length=1, description="File to change.")]
    old_text: Annotated[
        str,
        Field(min_length=1, max_length=TEXT_MAX_CHARS, description="Exact text to replace; must be unique."),
    ]
    new_text: Annotated[str, Field(max_length=TEXT_MAX_CHARS, description="What takes its place.")]
    replace_all: Annotated[bool, Field(description="Replace every occurrence.")] = False
    expected_sha256: ExpectedDigest = None
    dry_run: DryRun = False


def file_write_tools() -> list[Tool[Any]]:
    """The tools that change files."""

    async def file_write(call: ToolCall[FileWrite]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _write(call, stop), settle=True)

    async def file_edit(call: ToolCall[FileEdit]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _edit(call, stop), settle=True)

    return [
        Tool(
            "file_write",
            "Create a file or replace it whole, atomically. Give expected_sha256 to be refused when somebody "
            "else changed it. Returns the new and the previous SHA-256.",
            FileWrite,
            file_write,
            kind="destructive",
            private_arguments=frozenset({"text"}),
        ),
        Tool(
            "file_edit",
            "Replace an exact piece of text in a file, atomically. The old text must occur once, unless "
            "replace_all is set. Returns a unified diff and the new SHA-256.",
            FileEdit,
            file_edit,
            kind="destructive",
            idempotent=False,
            private_arguments=frozenset({"old_text", "new_text"}),
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Old:
    """A file as it is before a change."""

    data: bytes
    status: os.stat_result

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def _write(call: ToolCall[FileWrite], stop: Stop) -> JsonObject:
    asked = call.arguments
    confinement = Confinement(call.scope)
    place = _writable(confinement, asked.path)
    if asked.create_folders and not asked.dry_run:
        confinement.make_folders(place)
    data = asked.text.encode()
    try:
        with _locked_parent(confinement, place, stop) as (parent, name):
            old = _old(parent, name, place.path)
            _demand(asked.expected_sha256, old, place.path)
            if not asked.dry_run:
                _replace(parent, name, data, old, stop)
    except PathNotFound as error:
        if asked.create_folders and asked.dry_run:
            old = None  # its folders would be created
        elif not asked.create_folders and "does not exist" in error.message:
            raise PathNotFound(error.message, hint="set create_folders=true to create it") from None
        else:
            raise
    return {
        "path": place.path,
        "created": old is None,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "previous_sha256": old.sha256 if old else None,
        "dry_run": asked.dry_run,
    }


def _edit(call: ToolCall[FileEdit], stop: Stop) -> JsonObject:
    asked = call.arguments
    confinement = Confinement(call.scope)
    place = _writable(confinement, asked.path)
    with _locked_parent(confinement, place, stop) as (parent, name):
        old = _old(parent, name, place.path)
        if old is None:
            raise PathNotFound(f"path {place.path!r} does not exist", hint="create it with file_write")
        _demand(asked.expected_sha256, old, place.path)
        before = _text(old.data, place.path)
        after, replaced = replace_text(before, asked.old_text, asked.new_text, replace_all=asked.replace_all)
        data = after.encode()
        if len(data) > FILE_MAX_BYTES:
            raise TooLarge(f"file {place.path!r} would hold {len(data)} bytes, the limit is {FILE_MAX_BYTES}")
        if not asked.dry_run:
            _replace(parent, name, data, old, stop)
    diff = unified_diff(place.path, before, after)
    return {
        "path": place.path,
        "replaced": replaced,
        "diff": diff[:_DIFF_CHARS_MAX],
        "truncated": len(diff) > _DIFF_CHARS_MAX,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "previous_sha256": old.sha256,
        "dry_run": asked.dry_run,
    }


def replace_text(text: str, old: str, new: str, *, replace_all: bool) -> tuple[str, int]:
    """The text with `old` replaced, and how often. New lines of `old` also match CRLF, which is kept.

    Raises:
        InvalidInput: `old` equals `new`, does not occur, or occurs more than once without `replace_all`.
    """
    if old == new:
        raise InvalidInput("old_text and new_text are the same", hint="nothing would change")
    if old not in text and "\r\n" in text:
        old, new = (re.sub(r"\r?\n", "\r\n", part) for part in (old, new))
    count = text.count(old)
    if count == 0:
        raise InvalidInput(
            "old_text does not occur in the file", hint="read the file and copy the text exactly, spaces too"
        )
    if count > 1 and not replace_all:
        first = text.count("\n", 0, text.index(old)) + 1
        raise InvalidInput(
            f"old_text occurs {count} times, first in line {first}",
            hint="include more lines around it, or set replace_all=true",
        )
    return text.replace(old, new), count


def unified_diff(path: str, before: str, after: str) -> str:
    """A unified diff; "" when the changed part is longer than can be compared in reasonable time."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    start = max(0, head - _CONTEXT_LINES)
    keep = max(0, tail - _CONTEXT_LINES)
    old_part, new_part = old[start : len(old) - keep], new[start : len(new) - keep]
    if max(len(old_part), len(new_part)) > _DIFF_LINES_MAX:
        return ""
    lines = difflib.unified_diff(old_part, new_part, f"a/{path}", f"b/{path}", n=_CONTEXT_LINES)
    text = "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
    return _HUNK.sub(lambda m: f"@@ -{int(m[1]) + start}{m[2]} +{int(m[3]) + start}{m[4]} @@", text)


def _writable(confinement: Confinement, path: str) -> Place:
    place = confinement.locate(path)
    if place.parts and not confinement.rules.allows(place.path):
        raise Forbidden(
            f"path {place.path!r} is outside what this run may touch",
            hint="its allowed and forbidden paths were set when it was started",
        )
    return place


@contextmanager
def _locked_parent(confinement: Confinement, place: Place, stop: Stop) -> Generator[tuple[int, str]]:
    """The open folder of a file, locked against our other writers, so that check and replace are one.

    The lock is advisory: programs that do not take it can still write in between.
    """
    with confinement.open_parent(place) as (parent, name):
        while True:
            try:
                fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.pause(0.01)
        yield parent, name  # closing the descriptor releases the lock


def _old(parent: int, name: str, path: str) -> _Old | None:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PathNotFound(f"path {path!r} cannot be written: {error.strerror}") from None
    descriptor = open_regular(parent, name, path)
    try:
        status = os.fstat(descriptor)
        return _Old(
            read_descriptor(descriptor, path, size_bytes=status.st_size, max_bytes=FILE_MAX_BYTES), status
        )
    finally:
        os.close(descriptor)


def _demand(expected: str | None, old: _Old | None, path: str) -> None:
    if expected is None:
        return
    found = old.sha256 if old else ABSENT
    if found != expected:
        raise Conflict(
            f"file {path!r} has SHA-256 {found!r}, expected was {expected!r}",
            hint="read it again and repeat the change on what it holds now",
        )


def _text(data: bytes, path: str) -> str:
    if is_binary(data):
        raise InvalidInput(f"file {path!r} is binary ({len(data)} bytes)", hint="only text can be edited")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"file {path!r} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="convert it first, or replace it whole with file_write",
        ) from None


def _replace(parent: int, name: str, data: bytes, old: _Old | None, stop: Stop) -> None:
    """Write beside the file, then rename over it: durable, and never half-written."""
    temporary = f".agentic-flow-{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o666, dir_fd=parent)
    except OSError as error:
        raise PathNotFound(
            f"a file cannot be created beside {name!r}: {error.strerror}",
            hint="check the folder's permissions",
        ) from None
    try:
        try:
            if old is not None:
                _keep_owner(descriptor, old.status)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        stop.check()
        if old is None:
            # link, not rename: a file that appeared meanwhile is not overwritten
            os.link(temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
        else:
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except FileExistsError:
        raise Conflict(f"file {name!r} appeared while it was being written", hint="try again") from None
    except OSError as error:
        raise PathNotFound(f"file {name!r} cannot be written: {error.strerror}") from None
    finally:
        with suppress(FileNotFoundError):  # renamed away
            os.unlink(temporary, dir_fd=parent)
    os.fsync(parent)


def _keep_owner(descriptor: int, status: os.stat_result) -> None:
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):  # only root may give files away; the content is what was asked for
            os.fchown(descriptor, status.st_uid, status.st_gid)
    os.fchmod(descriptor, status.st_mode & 0o777)
