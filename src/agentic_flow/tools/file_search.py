"""file_search: regular expressions over files, with ripgrep's habits on what to search.

The parent walks and reads, confined; a child process matches (see `regex_worker` for why). One child per
call: it costs some 30 ms of CPU, keeps the interpreter lock of this process free, and is killed when time is
up or nobody waits.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, NoReturn

import orjson
from pydantic import Field

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, DeadlineExceeded, InvalidInput, LimitExceeded
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.toolkit import Stop, Tool, ToolCall, ToolInput, in_thread
from agentic_flow.tools.confine import Confinement, kind_of, open_regular, read_descriptor
from agentic_flow.tools.file_arguments import (
    FolderPath,
    Glob,
    ShowHidden,
    ShowIgnored,
)
from agentic_flow.tools.text import TextOf
from agentic_flow.tools.walk import Entry, Walk, WalkOptions, entry_matcher

SEARCH_TIMEOUT_S = 10.0
FILE_SEARCHED_MAX_BYTES = 16 * 1024 * 1024
LINE_CHARS_MAX = 400

_WORKER = Path(__file__).with_name("regex_worker.py")
_WORKER_MEMORY_MAX_BYTES = 1024 * 1024 * 1024
_MARGIN_S = 0.25  # so that our own message, not the ToolBox's general one, says what was slow
_ENVELOPE_BYTES = 1024

Cursor = Annotated[str, Field(pattern=r"^.+:\d+$", max_length=4200)]


class FileSearch(ToolInput):
    pattern: Annotated[
        str, Field(min_length=1, max_length=1000, description="Regular expression, matched line by line.")
    ]
    path: FolderPath = ""
    glob: Glob = None
    mode: Annotated[
        Literal["lines", "files", "count"],
        Field(description="Answer with matching lines, only the files, or lines counted per file."),
    ] = "lines"
    case: Annotated[
        Literal["sensitive", "insensitive", "smart"],
        Field(description="smart: insensitive unless the pattern has a capital."),
    ] = "sensitive"
    literal: Annotated[bool, Field(description="Take the pattern as plain text.")] = False
    word: Annotated[bool, Field(description="Match whole words only.")] = False
    context: Annotated[int, Field(ge=0, le=10, description="Lines to show before and after each match.")] = 0
    hidden: ShowHidden = False
    ignored: ShowIgnored = False
    limit: Annotated[int, Field(ge=1, le=500, description="Most matches (or files) of one page.")] = 100
    cursor: Annotated[Cursor | None, Field(description="The `cursor` of the page before.")] = None


def file_search_tool(text_of: TextOf) -> Tool[FileSearch]:
    """The tool, with `text_of` turning a file's content into text."""

    async def file_search(call: ToolCall[FileSearch]) -> JsonObject:
        return await in_thread(call.deadline, lambda stop: _Search(call, text_of, stop).run())

    return Tool(
        "file_search",
        "Search file contents by regular expression. Returns matches with path, line and text. Hidden, "
        "git-ignored, binary and very large files are left out. When truncated, page with the cursor.",
        FileSearch,
        file_search,
    )


class _Search:
    """One search: the walk, the child, and the page that is being filled."""

    def __init__(self, call: ToolCall[FileSearch], text_of: TextOf, stop: Stop) -> None:
        self._asked = call.arguments
        self._text_of = text_of
        self._stop = stop
        self._confinement = Confinement(call.scope)
        self._deadline = call.deadline.earliest(
            min(SEARCH_TIMEOUT_S, max(0.0, call.deadline.remaining_s - _MARGIN_S))
        )
        self._left_bytes = max(call.result_max_bytes - _ENVELOPE_BYTES, _ENVELOPE_BYTES)
        self._found: list[JsonObject] = []
        self._cursor: str | None = None
        self._searched = 0
        self._skipped = 0
        path, _, line = (self._asked.cursor or "").rpartition(":")
        self._after = tuple(path.split("/")) if path else ()
        self._after_line = int(line) if line else 0

    def run(self) -> JsonObject:
        asked = self._asked
        options = WalkOptions(asked.hidden, asked.ignored, after=self._after, inclusive=self._after_line > 0)
        walk = Walk(self._confinement, options, self._stop)
        with _RegexProcess(self._stop, self._deadline) as process, closing(self._texts(walk)) as texts:
            process.compile(
                expression(asked),
                ignore_case=asked.case == "insensitive"
                or (asked.case == "smart" and asked.pattern == asked.pattern.lower()),
                context=asked.context,
            )
            for entry, text in texts:
                self._searched += 1
                if not self._take(entry, text, process):
                    break
        key = "matches" if asked.mode == "lines" else "files"
        result: JsonObject = {
            key: self._found,
            "files_searched": self._searched,
            "files_skipped": self._skipped,
            "truncated": self._cursor is not None or walk.cut,
        }
        if self._cursor is not None:
            result |= {"cursor": self._cursor, "more": "call again with this cursor for the next page"}
        elif walk.cut:
            result["more"] = "the folder is too large to search whole: name a folder inside it"
        return result

    def _take(self, entry: Entry, text: str, process: _RegexProcess) -> bool:
        """Search one file into the page; False when the page is full."""
        asked = self._asked
        skip = self._after_line if entry.parts == self._after else 0
        if asked.mode == "lines":
            room = asked.limit - len(self._found)
        else:
            room = 1 if asked.mode == "files" else len(text) + 1
        answer = process.search(text, skip=skip, limit=room, path=entry.path)
        if asked.mode != "lines":
            if not answer["matches"]:
                return True
            shown: JsonObject = {"path": entry.path}
            if asked.mode == "count":
                shown["count"] = len(answer["matches"])
            return self._add(shown, 0)
        for line, matched, before, after in answer["matches"]:
            shown = {"path": entry.path, "line": line, "text": matched}
            if asked.context:
                shown |= {"before": before, "after": after}
            if not self._add(shown, line):
                return False
        if answer["more"]:
            return self._full()
        return True

    def _add(self, shown: JsonObject, line: int) -> bool:
        size = len(orjson.dumps(shown)) + 1
        if (size > self._left_bytes and self._found) or len(self._found) == self._asked.limit:
            return self._full()
        self._left_bytes -= size
        self._found.append(shown)
        return True

    def _full(self) -> bool:
        """Note where the next page starts; nothing was found yet only if nothing fits, and then none does."""
        if self._found:
            last = self._found[-1]
            self._cursor = f"{last['path']}:{last.get('line', 0)}"
        return False

    def _texts(self, walk: Walk) -> Generator[tuple[Entry, str]]:
        """Readable text files with their text; what is not one is counted."""
        matches = entry_matcher(self._asked.glob, self._asked.path)
        for entry in self._files(walk):
            if not matches(entry):
                continue
            try:
                descriptor = open_regular(entry.folder, entry.name, entry.path)
                try:
                    size_bytes = os.fstat(descriptor).st_size
                    data = read_descriptor(
                        descriptor, entry.path, size_bytes=size_bytes, max_bytes=FILE_SEARCHED_MAX_BYTES
                    )
                finally:
                    os.close(descriptor)
                text = self._text_of(entry.path, data)
            except (AgenticFlowError, OSError):
                self._skipped += 1  # vanished, unreadable, too large, or no text
                continue
            yield entry, text

    def _files(self, walk: Walk) -> Generator[Entry]:
        path = self._asked.path
        if path and kind_of(self._confinement.status(self._confinement.locate(path)).st_mode) != "folder":
            place = self._confinement.locate(path)
            parts = tuple(place.path.split("/"))
            with (
                self._confinement.open_file(place),  # refuses what is no permitted regular file
                self._confinement.open_parent(place) as (folder, name),
            ):
                yield Entry(place.path, parts, name, "file", 1, folder)
            return
        for entry in walk.below(path):
            if entry.kind == "file":
                yield entry


def expression(asked: FileSearch) -> str:
    """The expression that the arguments stand for."""
    pattern = re.escape(asked.pattern) if asked.literal else asked.pattern
    return rf"\b(?:{pattern})\b" if asked.word else pattern


class _RegexProcess:
    """The child that matches, with its time limit. Used in one thread; killed from any."""

    def __init__(self, stop: Stop, deadline: Deadline) -> None:
        self._stop = stop
        self._deadline = deadline

    def __enter__(self) -> _RegexProcess:
        self._process = subprocess.Popen(  # noqa: S603 - our own script by our own interpreter
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._in = self._process.stdin
        self._output = self._process.stdout
        self._out = self._output.fileno()
        self._stop.on_set(self._process.kill)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # bytes it no longer wanted
            self._in.close()
        self._output.close()
        self._process.wait()
        self._stop.forget(self._process.kill)

    def compile(self, pattern: str, *, ignore_case: bool, context: int) -> None:
        """Hand over the pattern.

        Raises:
            InvalidInput: it is no regular expression.
        """
        self._send(
            orjson.dumps(
                {
                    "pattern": pattern,
                    "ignore_case": ignore_case,
                    "context": context,
                    "line_chars_max": LINE_CHARS_MAX,
                    "memory_max_bytes": _WORKER_MEMORY_MAX_BYTES,
                    "cpu_max_s": int(SEARCH_TIMEOUT_S) + 2,
                }
            )
        )
        answer = self._receive("compiling the pattern")
        if "error" in answer:
            raise InvalidInput(
                f"pattern {pattern!r} is no regular expression: {answer['error']}",
                hint="correct it, or set literal=true to search for plain text",
            )

    def search(self, text: str, *, skip: int, limit: int, path: str) -> JsonObject:
        """Matching lines of one text, after the first `skip` lines."""
        self._send(orjson.dumps({"skip": skip, "limit": limit}))
        self._send(text.encode("utf-8", "replace"))
        return self._receive(path)

    def _send(self, data: bytes) -> None:
        try:
            self._in.write(len(data).to_bytes(4, "big") + data)
            self._in.flush()
        except OSError:
            self._explain("sending")

    def _receive(self, what: str) -> JsonObject:
        head = self._read(4, what)
        return orjson.loads(self._read(int.from_bytes(head, "big"), what))

    def _read(self, size_bytes: int, what: str) -> bytes:
        got = bytearray()
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        while len(got) < size_bytes:
            if not poll.poll(self._deadline.remaining_s * 1000):
                self._stop.check()
                raise DeadlineExceeded(
                    f"the search ran out of time at {what!r}",
                    hint="make the pattern simpler (no nested repeats), or narrow it with path or glob",
                )
            chunk = os.read(self._out, size_bytes - len(got))
            if not chunk:
                self._explain(what)
            got += chunk
        return bytes(got)

    def _explain(self, what: str) -> NoReturn:
        """Why the child is gone."""
        self._stop.check()
        raise LimitExceeded(
            f"the search gave up at {what!r}: the pattern used too much memory or time",
            hint="make the pattern simpler, or narrow it with path or glob",
        )
