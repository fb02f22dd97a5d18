"""The file tools: reading, listing and finding. Searching and writing have modules of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any, Literal

from pydantic import Field

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.toolkit import Stop, Tool, ToolCall, ToolInput, in_thread
from agentic_flow.tools.confine import Confinement, canonical_path, kind_of, read_descriptor
from agentic_flow.tools.file_arguments import (
    CanonicalPath,
    FolderPath,
    Glob,
    Limit,
    OptionalCursor,
    PathCursor,
    ShowHidden,
    ShowIgnored,
)
from agentic_flow.tools.file_search import file_search_tool
from agentic_flow.tools.file_writes import file_write_tools
from agentic_flow.tools.text import FILE_MAX_BYTES, TextOf, lines_of, page_of_lines, plain_text
from agentic_flow.tools.walk import Entry, Walk, WalkOptions, entry_matcher

_ENVELOPE_BYTES = 1024  # room for the keys around a page of text

LineNumber = Annotated[int, Field(ge=1, le=100_000_000)]


class FileRead(ToolInput):
    path: Annotated[CanonicalPath, Field(description="File to read, as tools print it.")]
    line_start: Annotated[LineNumber, Field(description="First line, counted from 1.")] = 1
    line_end: Annotated[LineNumber | None, Field(description="Last line, included. Default: the end.")] = None
    numbered: Annotated[bool, Field(description="Put its number before each line; do so to cite.")] = False


class FileInfo(ToolInput):
    path: Annotated[CanonicalPath, Field(description="File or folder.")]
    hash: Annotated[bool, Field(description="Compute the SHA-256 of a file.")] = True


class FileList(ToolInput):
    path: FolderPath = ""
    depth: Annotated[int, Field(ge=1, le=32, description="Levels to show; 1 is the folder's own.")] = 1
    glob: Glob = None
    hidden: ShowHidden = False
    ignored: ShowIgnored = False
    limit: Limit = 200
    cursor: OptionalCursor = None


class FileFind(ToolInput):
    glob: Glob = None
    path: FolderPath = ""
    kind: Annotated[Literal["file", "folder", "any"], Field(description="What to find.")] = "file"
    size_min_bytes: Annotated[int | None, Field(ge=0, description="Least size of a file.")] = None
    size_max_bytes: Annotated[int | None, Field(ge=0, description="Greatest size of a file.")] = None
    modified_after_s: Annotated[float | None, Field(description="Changed at or after this Unix time.")] = None
    modified_before_s: Annotated[float | None, Field(description="Changed before this Unix time.")] = None
    hidden: ShowHidden = False
    ignored: ShowIgnored = False
    limit: Limit = 200
    cursor: OptionalCursor = None


def file_tools(*, text_of: TextOf = plain_text) -> list[Tool[Any]]:
    """All file tools.

    Args:
        text_of: How a file's content becomes text. Give the reader that fills the memory, so that line
            numbers from memory, from these tools and in a review are the same lines.
    """
    return [*_reading_tools(text_of), file_search_tool(text_of), *file_write_tools()]


def _reading_tools(text_of: TextOf) -> list[Tool[Any]]:
    async def file_read(call: ToolCall[FileRead]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _read(call, text_of, stop))

    async def file_info(call: ToolCall[FileInfo]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _info(call, stop))

    async def file_list(call: ToolCall[FileList]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _list(call, stop))

    async def file_find(call: ToolCall[FileFind]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _find(call, stop))

    return [
        Tool(
            "file_read",
            "Read a text file, or a range of its lines. Returns text, line_start, line_end, lines_total and "
            "sha256; when truncated, call again with line_start after line_end.",
            FileRead,
            file_read,
        ),
        Tool(
            "file_info",
            "Kind, size, time of change, mode and SHA-256 of a file or folder.",
            FileInfo,
            file_info,
        ),
        Tool(
            "file_list",
            "List a folder: path, kind and size of each entry, sorted. Hidden and git-ignored entries are "
            "left out unless asked for.",
            FileList,
            file_list,
        ),
        Tool(
            "file_find",
            "Find files by glob ('*.py', 'src/**/test_*.py'), size or time of change, below a folder.",
            FileFind,
            file_find,
        ),
    ]


def _read(call: ToolCall[FileRead], text_of: TextOf, stop: Stop) -> JsonObject:
    asked = call.arguments
    confinement = Confinement(call.scope)
    with confinement.open_file(confinement.locate(asked.path)) as (descriptor, status):
        data = read_descriptor(
            descriptor, asked.path, size_bytes=status.st_size, max_bytes=FILE_MAX_BYTES, check=stop.check
        )
    lines = lines_of(text_of(asked.path, data))
    page = page_of_lines(
        lines,
        asked.line_start,
        asked.line_end,
        max_bytes=max(call.result_max_bytes - _ENVELOPE_BYTES - len(asked.path), _ENVELOPE_BYTES),
        numbered=asked.numbered,
    )
    result: JsonObject = {
        "path": asked.path,
        "text": page.text,
        "line_start": page.line_start,
        "line_end": page.line_end,
        "lines_total": len(lines),
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "truncated": page.truncated,
    }
    if page.truncated:
        result["more"] = f"call again with line_start={page.line_end + 1}"
    return result


def _info(call: ToolCall[FileInfo], stop: Stop) -> JsonObject:
    confinement = Confinement(call.scope)
    place = confinement.locate(call.arguments.path)
    status = confinement.status(place)
    digest: str | None = None
    if call.arguments.hash and kind_of(status.st_mode) == "file":
        with confinement.open_file(place) as (descriptor, status):
            digest = _digest(descriptor, stop)
    return {
        "path": place.path,
        "kind": kind_of(status.st_mode),
        "size_bytes": status.st_size,
        "modified_at_s": status.st_mtime,
        "changed_at_s": status.st_ctime,
        "mode": f"{status.st_mode & 0o7777:04o}",
        "sha256": digest,
    }


def _digest(descriptor: int, stop: Stop) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(descriptor, 1024 * 1024):
        stop.check()
        digest.update(chunk)
    return digest.hexdigest()


def _list(call: ToolCall[FileList], stop: Stop) -> JsonObject:
    asked = call.arguments
    options = WalkOptions(asked.hidden, asked.ignored, asked.depth, _after(asked.cursor))
    walk = Walk(Confinement(call.scope), options, stop)
    matches = entry_matcher(asked.glob, asked.path)
    found: list[JsonObject] = []
    cursor: str | None = None
    with closing(walk.below(asked.path)) as entries:
        for entry in entries:
            if not matches(entry):
                continue
            if len(found) == asked.limit:
                cursor = found[-1]["path"]
                break
            found.append(_entry(entry))
    return _page(asked.path, found, cursor, walk)


def _find(call: ToolCall[FileFind], stop: Stop) -> JsonObject:
    asked = call.arguments
    options = WalkOptions(asked.hidden, asked.ignored, after=_after(asked.cursor))
    walk = Walk(Confinement(call.scope), options, stop)
    found: list[JsonObject] = []
    cursor: str | None = None
    with closing(_found(walk, asked)) as entries:
        for entry in entries:
            if len(found) == asked.limit:
                cursor = found[-1]["path"]
                break
            found.append(_entry(entry))
    return _page(asked.path, found, cursor, walk)


def _found(walk: Walk, asked: FileFind) -> Generator[Entry]:
    matches = entry_matcher(asked.glob, asked.path)
    for entry in walk.below(asked.path):
        if asked.kind != "any" and entry.kind != asked.kind:
            continue
        if not matches(entry):
            continue
        status = entry.status()
        if status is None:
            continue
        sized = asked.size_min_bytes is not None or asked.size_max_bytes is not None
        if sized and entry.kind != "file":
            continue
        if status.st_size < (asked.size_min_bytes or 0):
            continue
        if asked.size_max_bytes is not None and status.st_size > asked.size_max_bytes:
            continue
        if asked.modified_after_s is not None and status.st_mtime < asked.modified_after_s:
            continue
        if asked.modified_before_s is not None and status.st_mtime >= asked.modified_before_s:
            continue
        yield entry


def _entry(entry: Entry) -> JsonObject:
    status = entry.status()
    shown: JsonObject = {"path": entry.path, "kind": entry.kind}
    if status is not None and entry.kind == "file":
        shown["size_bytes"] = status.st_size
        shown["modified_at_s"] = round(status.st_mtime, 3)
    return shown


def _page(path: str, found: list[JsonObject], cursor: str | None, walk: Walk) -> JsonObject:
    result: JsonObject = {"path": path, "entries": found, "truncated": cursor is not None or walk.cut}
    if cursor is not None:
        result["cursor"] = cursor
        result["more"] = "call again with this cursor for the next page"
    elif walk.cut:
        result["more"] = "the folder is too large to walk whole: name a folder inside it"
    if walk.unreadable:
        result["unreadable"] = walk.unreadable
    return result


def _after(cursor: PathCursor | None) -> tuple[str, ...]:
    return tuple(canonical_path(cursor).split("/")) if cursor else ()
