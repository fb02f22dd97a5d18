"""Server-sent events, parsed incrementally from bytes.

Source: WHATWG HTML, section 9.2.6 "Interpreting an event stream". Data stays bytes: events carry JSON, whose
decoder checks the UTF-8 strictly, where the specification would put replacement characters into an answer.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"
# A named tuple's own is a function of Python's: too slow for each event of a stream.
_new = cast(Any, tuple).__new__


class SseEvent(NamedTuple):
    """One dispatched event; `event` is "message" when the stream named none."""

    event: str
    data: bytes


class SseParser:
    """Feed it the body in pieces of any size; it returns the events that each piece completes."""

    def __init__(self) -> None:
        self._partial: list[bytes] = []
        self._after_cr = False
        self._at_start = True
        self._event = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events completed by these bytes."""
        if not chunk:
            return []
        if self._at_start and not self._partial and chunk[0] != _BOM[0]:
            self._at_start = False
        if chunk.endswith(b"\n\n") and b"\r" not in chunk and self._between():
            # Whole events, as nearly always: most of them are one line each.
            events: list[SseEvent] = []
            for block in chunk[:-2].split(b"\n\n"):
                if block.startswith(b"data: ") and b"\n" not in block:
                    events.append(_new(SseEvent, ("message", block[6:])))
                elif block:
                    events += self._feed(block + b"\n\n")
            return events
        return self._feed(chunk)

    def _between(self) -> bool:
        """Whether nothing of an event has come yet."""
        return not (
            self._at_start
            or self._after_cr
            or self._event
            or self._data
            or (self._partial and self._partial != [b""])
        )

    def _feed(self, chunk: bytes) -> list[SseEvent]:
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CRLF that the network cut in two
        self._after_cr = chunk.endswith(b"\r")
        first, *rest = _LINE_END.split(chunk)
        self._partial.append(first)
        events: list[SseEvent] = []
        for piece in rest:
            line = b"".join(self._partial)
            self._partial = [piece]
            event = self._take_line(line)
            if event is not None:
                events.append(event)
        return events

    def flush(self) -> list[SseEvent]:
        """The event that the end of the body left without its closing blank line, if any.

        The specification drops it; some servers end that way after their terminal event. A caller that
        needs completeness looks for the terminal event, so a cut one is still noticed.
        """
        events: list[SseEvent] = []
        line = b"".join(self._partial)
        self._partial = []
        for last in (line, b""):
            event = self._take_line(last)
            if event is not None:
                events.append(event)
        return events

    def _take_line(self, line: bytes) -> SseEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        if line.startswith(b":"):
            return None  # a comment, sent to keep the connection alive
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._event = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> SseEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return SseEvent(event, b"\n".join(data)) if data else None


def encode_event(data: bytes, *, event: str | None = None) -> bytes:
    """One event as bytes; line ends within `data` become several data lines."""
    head = f"event: {event}\n".encode() if event else b""
    lines = b"".join(b"data: " + line + b"\n" for line in _LINE_END.split(data))
    return head + lines + b"\n"
