"""Server-sent events as pure functions: encoding, and a parser that takes bytes as they come.

Source: WHATWG HTML, section 9.2, "Server-sent events".
"""

from __future__ import annotations

from dataclasses import dataclass

from agentic_flow.core.errors import TooLarge


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event. `data` is text (usually JSON); `event` None is the type `message`."""

    data: str
    event: str | None = None
    id: str | None = None


def encode(event: ServerEvent) -> bytes:
    """The event in wire form. Line breaks in `data` are kept; in `event` and `id` they are refused."""
    lines: list[str] = []
    for name, value in (("event", event.event), ("id", event.id)):
        if value is None:
            continue
        if any(mark in value for mark in "\r\n\0"):
            raise ValueError(f"{name} of a server-sent event holds a control character: {value!r}")
        lines.append(f"{name}: {value}")
    data = event.data.replace("\r\n", "\n").replace("\r", "\n")
    lines += [f"data: {line}" for line in data.split("\n")]
    return ("\n".join(lines) + "\n\n").encode()


def encode_comment(text: str) -> bytes:
    """A comment, which parsers skip: the heartbeat."""
    return f": {text}\n\n".encode()


class SseParser:
    """Bytes in, whole events out. Keeps at most `event_max_bytes` of an unfinished event.

    Raises:
        TooLarge: an event is past the limit.
    """

    def __init__(self, *, event_max_bytes: int = 16 * 1024 * 1024) -> None:
        self._event_max_bytes = event_max_bytes
        self._tail = b""
        self._size_bytes = 0
        self._first = True
        self._skip_line_feed = False
        self._data: list[str] = []
        self._event: str | None = None
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes. Chunks may be cut anywhere, within a character too."""
        if not chunk:
            return []
        if self._skip_line_feed:
            chunk = chunk.removeprefix(b"\n")
        # A "\r" that ends the chunk ends its line; the "\n" that may follow belongs to it.
        self._skip_line_feed = chunk.endswith(b"\r")
        buffer = self._tail + chunk
        lines = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._tail = lines.pop()
        events: list[ServerEvent] = []
        for line in lines:
            self._size_bytes += len(line)
            self._check_size()
            event = self._line(line)
            if event is not None:
                events.append(event)
        self._check_size()
        return events

    @property
    def unfinished(self) -> bool:
        """Whether bytes of an incomplete event were seen: the stream was cut if it ends now."""
        return bool(self._tail or self._data)

    def _check_size(self) -> None:
        if self._size_bytes + len(self._tail) > self._event_max_bytes:
            raise TooLarge(f"a server-sent event is larger than {self._event_max_bytes!r} bytes")

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatch()
        if line.startswith(b":"):
            return None
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._size_bytes = [], None, 0
        if not data:
            return None
        return ServerEvent("\n".join(data), event, self._id)
