"""The text of a file as tools show it: decoding, lines, and pages of lines that fit a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from agentic_flow.core.errors import InvalidInput

TextOf = Callable[[str, bytes], str]
"""(path, content) → text. Raises an AgenticFlowError when the content is not text."""

BINARY_PROBE_BYTES = 8192

FILE_MAX_BYTES = 64 * 1024 * 1024
"""Largest file that tools read, hash or edit; larger ones are refused with their size."""


def is_binary(data: bytes) -> bool:
    """Whether content is binary by the rule that git and ripgrep use: a NUL near its beginning."""
    return b"\0" in data[:BINARY_PROBE_BYTES]


def plain_text(path: str, data: bytes) -> str:
    """UTF-8 text; bytes that are not UTF-8 become U+FFFD.

    Raises:
        InvalidInput: the content is binary.
    """
    if is_binary(data):
        raise InvalidInput(
            f"file {path!r} is binary ({len(data)} bytes)", hint="see its size and hash with file_info"
        )
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")


def lines_of(text: str) -> list[str]:
    """The lines of a text, numbered from 1 by whoever counts. The one place that decides what a line is."""
    return text.splitlines()


@dataclass(frozen=True, slots=True)
class LinePage:
    """Lines `line_start` to `line_end`, both included; `line_end` < `line_start` when there are none."""

    text: str
    line_start: int
    line_end: int
    truncated: bool


def page_of_lines(
    lines: Sequence[str], line_start: int, line_end: int | None, *, max_bytes: int, numbered: bool = False
) -> LinePage:
    """As many whole lines of a range as fit into `max_bytes` of JSON; one line too long alone is cut.

    Raises:
        InvalidInput: the range lies behind the end, or ends before it starts.
    """
    total = len(lines)
    if line_end is not None and line_end < line_start:
        raise InvalidInput(
            f"line_end {line_end!r} comes before line_start {line_start!r}", hint="swap the two"
        )
    if line_start > max(total, 1):
        raise InvalidInput(f"line_start {line_start!r} is past the end", hint=f"the file has {total} lines")
    last = total if line_end is None else min(line_end, total)
    shown: list[str] = []
    left = max_bytes
    for number in range(line_start, last + 1):
        line = f"{number:6d}\t{lines[number - 1]}" if numbered else lines[number - 1]
        cost = len(orjson.dumps(line)) + 2  # the quotes stand in for the new line's escape
        if cost > left:
            if not shown:
                return LinePage(_cut(line, left), line_start, number, True)
            return LinePage("\n".join(shown), line_start, number - 1, True)
        left -= cost
        shown.append(line)
    return LinePage("\n".join(shown), line_start, max(last, line_start - 1), False)


def _cut(line: str, max_bytes: int) -> str:
    """The longest prefix whose JSON is at most `max_bytes`."""
    low, high = 0, min(len(line), max_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if len(orjson.dumps(line[:middle])) <= max_bytes:
            low = middle
        else:
            high = middle - 1
    return line[:low]
