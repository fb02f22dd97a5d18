"""What a local model writes, as events: text up to a stop sequence, and tool calls between their marks.

Pure: pieces of text in, events out, whatever the pieces are cut into.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from agentic_flow.core.errors import ProviderProtocol, ProviderRejected
from agentic_flow.core.messages import (
    CompletionRequest,
    Part,
    StopReason,
    StreamEvent,
    TextDelta,
    TextPart,
    ToolCallDelta,
    ToolCallPart,
)
from agentic_flow.gateway.wire.format import ToolCallDraft

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


class AnswerReader:
    """Reads one answer.

    Args:
        request: Its stop sequences count in text; its tools make marks of calls count.
        call_ids: Prefix of the ids that calls get.
    """

    def __init__(self, request: CompletionRequest, *, call_ids: str) -> None:
        self._request = request
        self._call_ids = call_ids
        tools = bool(request.tools) and request.tool_choice != "none"
        self._marks = (*(stop for stop in request.stop if stop), *((CALL_OPEN,) if tools else ()))
        self._held = ""
        self._in_call = False
        self._text: list[str] = []
        self._calls: list[ToolCallPart] = []
        self.stopped: StopReason | None = None
        """Why reading ended before the model did: a stop sequence, or the one call that was asked for."""

    def feed(self, text: str) -> list[StreamEvent]:
        """Events of the next piece; none after `stopped`.

        Raises:
            ProviderProtocol: a tool call is no JSON object with a name.
        """
        events: list[StreamEvent] = []
        self._held += text
        while self.stopped is None:
            if self._in_call:
                body, closed, rest = self._held.partition(CALL_CLOSE)
                if not closed:
                    break
                self._held, self._in_call = rest, False
                events.append(self._call(body))
                if self._request.parallel_tool_calls is False:
                    self.stopped = "tool_calls"
                continue
            place, mark = _first(self._held, self._marks)
            if mark is None:
                kept = _start_of_mark(self._held, self._marks)
                written, self._held = (
                    self._held[: len(self._held) - kept],
                    self._held[len(self._held) - kept :],
                )
                self._write(written, events)
                break
            self._write(self._held[:place], events)
            self._held = self._held[place + len(mark) :]
            if mark == CALL_OPEN and mark not in self._request.stop:
                self._in_call = True
            else:
                self.stopped = "stop_sequence"
        return events

    def finish(self, reason: StopReason) -> tuple[list[StreamEvent], StopReason]:
        """The rest of the events, and why the answer ended, given why the model did.

        Raises:
            ProviderProtocol: the model ended within a tool call.
            ProviderRejected: its output limit did.
        """
        events: list[StreamEvent] = []
        if self.stopped is not None:
            return events, self.stopped
        if self._in_call:
            if reason == "length":
                raise ProviderRejected(
                    f"the answer was cut at {self._request.output_tokens_max} output tokens or the end of "
                    "the context, within a tool call",
                    hint="raise output_tokens_max, or shorten the conversation",
                )
            raise ProviderProtocol(
                f"the answer ended within a tool call: {self._held[:120]!r}",
                hint="another model may do better",
            )
        self._write(self._held, events)
        self._held = ""
        return events, "tool_calls" if self._calls and reason == "end" else reason

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was read so far: the text, then the calls."""
        text = "".join(self._text)
        return (*((TextPart(text=text),) if text else ()), *self._calls)

    def _write(self, text: str, events: list[StreamEvent]) -> None:
        # Models put new lines between their calls, which are nobody's text.
        if text and not (self._calls and not text.strip()):
            self._text.append(text)
            events.append(TextDelta(text=text))

    def _call(self, body: str) -> ToolCallDelta:
        try:
            value: object = orjson.loads(body.strip())
        except orjson.JSONDecodeError:
            value = None
        name: object = value.get("name") if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if not isinstance(value, dict) or not isinstance(name, str) or not name:
            raise ProviderProtocol(
                f"a tool call is no JSON object with a name: {body.strip()[:120]!r}",
                hint="the model wrote it wrong; another model may do better",
            )
        given: object = value.get("arguments", {})  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        written = given if isinstance(given, str) else orjson.dumps(given).decode()
        draft = ToolCallDraft(id=f"{self._call_ids}_{len(self._calls)}", name=name, arguments=[written])
        call = draft.finish(self._request, None)
        self._calls.append(call)
        return ToolCallDelta(
            index=len(self._calls) - 1,
            id=call.id,
            name=name,
            arguments_json=orjson.dumps(call.arguments).decode(),
        )


def _first(text: str, marks: Sequence[str]) -> tuple[int, str | None]:
    """The mark that ends first in a text, the longest of those: what reading letter by letter would meet."""
    found = [(place + len(mark), place, mark) for mark in marks if (place := text.find(mark)) != -1]
    if not found:
        return -1, None
    _, place, mark = min(found)
    return place, mark


def _start_of_mark(text: str, marks: Sequence[str]) -> int:
    """How many of the last characters could be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
