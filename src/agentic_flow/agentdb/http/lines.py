"""Cutting a stream of bytes into lines of bounded length (NDJSON). Pure: bytes in, lines out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Line(NamedTuple):
    """A line without its end; `content` is None when it was longer than the limit. Lines count from 1."""

    number: int
    content: bytes | None


class LineSplitter:
    """Gives the lines of what it is fed; of a line past the limit it keeps nothing but the fact.

    Args:
        line_max_bytes: Longest line, without its end.
    """

    def __init__(self, line_max_bytes: int) -> None:
        self._line_max_bytes = line_max_bytes
        self._rest = bytearray()
        self._too_long = False
        self._number = 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that end within `chunk`. Take them all before feeding more."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._keep(chunk[start:end])
            yield self._line()
            start = end + 1
        self._keep(chunk[start:])

    def finish(self) -> Iterator[Line]:
        """The last line, when nothing ended it."""
        if self._rest or self._too_long:
            yield self._line()

    def _keep(self, piece: bytes) -> None:
        if self._too_long:
            return
        if len(self._rest) + len(piece) > self._line_max_bytes:
            self._too_long = True
            self._rest.clear()
        else:
            self._rest += piece

    def _line(self) -> Line:
        self._number += 1
        line = Line(self._number, None if self._too_long else bytes(self._rest))
        self._rest.clear()
        self._too_long = False
        return line
