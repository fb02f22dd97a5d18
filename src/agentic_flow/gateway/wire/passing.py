"""Answers whose bytes pass through untouched: what is read from them on the way, and the one name rewritten.

Used where the caller and the provider speak the same format. Only whole events are passed on, so that a
stream that breaks within one can still be ended by an error event that clients understand.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import orjson

from agentic_flow.core.errors import ProviderError, ProviderProtocol
from agentic_flow.core.messages import JsonObject, StopReason, Usage
from agentic_flow.gateway.wire.sse import SseEvent, SseParser

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
# A string as a whole, or one structural character; what lies between says nothing about nesting.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]', re.DOTALL)
_NAMED = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)

# Fields whose strings are no text that a model reads or writes.
_LABELS = frozenset({"role", "type", "id", "tool_call_id", "tool_use_id"})

CHARS_PER_TOKEN = 4
"""The rule of thumb for English and code, used where no provider counted for us."""
IMAGE_TOKENS = 1600
"""What a full-size image costs at the large vendors, to the nearest hundred."""


class PassingRequest(NamedTuple):
    """A request as the caller sent it.

    Args:
        path: Where it goes, below the provider's base URL, query included.
        headers: The caller's headers that the provider must see.
        body: The bytes, the model's name in them rewritten.
        sent: The same, parsed.
        stream: Whether the answer is asked for as a stream.
        hides_usage: Whether `body` asks for the usage at the end although the caller did not: what was billed
            must be known, and is not passed on.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes
    sent: JsonObject
    stream: bool
    hides_usage: bool = False


class Glance:
    """What an ordinary whole answer says for the books, with the counts of `Usage`, as billed.

    `cost_usd` is filled in by who knows the price.
    """

    __slots__ = (
        "cache_read_tokens", "cache_write_tokens", "cost_usd", "input_tokens", "model", "output_tokens",
        "reasoning_tokens", "stop_reason",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        stop_reason: StopReason,
        input_tokens: int,
        output_tokens: int,
        cache_read_tokens: int,
        cache_write_tokens: int,
        reasoning_tokens: int,
    ) -> None:
        self.model = model
        self.stop_reason: StopReason = stop_reason
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.cache_read_tokens = cache_read_tokens
        self.cache_write_tokens = cache_write_tokens
        self.reasoning_tokens = reasoning_tokens
        self.cost_usd: float | None = None


class PassingReader(ABC):
    """Reads one answer while it passes: its model, usage, stop reason, and whether it is complete.

    Args:
        provider: Named in errors.
        sent: The body of the request, to estimate usage where none is reported.
    """

    read_keys: ClassVar[tuple[str, ...]] = ("system", "messages", "tools")
    """Fields of the request that hold what the model reads."""

    def __init__(self, provider: str, sent: JsonObject) -> None:
        self.provider = provider
        self.done = False
        """Whether the terminal event came."""
        self.error: ProviderError | None = None
        """The error that the provider put into the stream; its event was passed on."""
        self.model = ""
        self.usage: Usage | None = None
        """As billed; None when the provider has reported none."""
        self.stop_reason: StopReason = "end"
        self._sent = sent
        self._written_chars = 0
        self._parser: SseParser | None = None
        self._held = b""

    @property
    def _sse(self) -> SseParser:
        """Made for streams alone."""
        if self._parser is None:
            self._parser = SseParser()
        return self._parser

    @abstractmethod
    def take_event(self, sent: SseEvent) -> None:
        """Read one event of a stream."""

    @abstractmethod
    def take_answer(self, answer: JsonObject) -> None:
        """Read a whole answer.

        Raises:
            ProviderError: it is an error, or no answer.
        """

    def feed(self, chunk: bytes) -> bytes:
        """The whole events that these bytes complete, as they came.

        Raises:
            ProviderProtocol: they are not of this format.
        """
        if not self._held and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            whole = chunk  # as nearly always
        else:
            known = len(self._held)
            self._held += chunk
            end = 0
            for mark in _EVENT_ENDS:
                at = self._held.rfind(mark, max(0, known - len(mark) + 1))
                if at >= 0:
                    end = max(end, at + len(mark))
            whole, self._held = self._held[:end], self._held[end:]
        for event in (self._parser or self._sse).feed(whole):
            self.take_event(event)
        return whole

    def finish(self) -> bytes:
        """What is left at the end of the body: a terminal event without its blank line, or nothing.

        Raises:
            ProviderProtocol: the stream ended before its terminal event.
        """
        rest, self._held = self._held, b""
        if not self.done and rest:
            for event in [*self._sse.feed(rest), *self._sse.flush()]:
                self.take_event(event)
        if self.done:
            return rest + b"\n\n" if rest else b""
        raise ProviderProtocol(
            f"the stream of {self.provider} ended before its terminal event: the answer is incomplete",
            hint="the connection broke; the call can be repeated",
        )

    def count_written(self, value: object) -> None:
        """Note the text of a delta or a message, for an estimate."""
        if self.usage is not None:
            return
        delta = cast(JsonObject, value) if isinstance(value, dict) else {}
        if len(delta) == 1:
            content = delta.get("content")
            if isinstance(content, str) and not content.startswith("data:image/"):
                self._written_chars += len(content)  # as nearly every delta
                return
        self._written_chars += _text_chars(cast(object, value))[0]

    def billed(self) -> tuple[Usage, bool]:
        """The usage, and whether it is an estimate by four characters a token."""
        if self.usage is not None:
            return self.usage, False
        chars, images = _text_chars([self._sent.get(key) for key in self.read_keys])
        estimate = Usage(
            input_tokens=-(-chars // CHARS_PER_TOKEN) + images * IMAGE_TOKENS,
            output_tokens=-(-self._written_chars // CHARS_PER_TOKEN),
            cost_usd=None,
        )
        return estimate, True


def rename_model(body: bytes, model: str) -> bytes:
    """The JSON object `body` with another value of its top-level `model`, every other byte as it was.

    Where the name is given several times, each is replaced. `body` must be valid JSON, and the name a string
    other than `model`.
    """
    found = list(itertools.islice(_NAMED.finditer(body), 2))
    if len(found) == 1:
        # Nearly always the one place that looks right is; reading the result is faster than walking there.
        start, end = found[0].span(1)
        renamed = b"".join([body[:start], orjson.dumps(model), body[end:]])
        if orjson.loads(renamed).get("model") == model:
            return renamed
    return _rename_everywhere(body, model)


def _rename_everywhere(body: bytes, model: str) -> bytes:
    """The same by walking through all of it."""
    pieces: list[bytes] = []
    depth, at, key, awaiting = 0, 0, b"", False
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in b"{[":
            depth += 1
            awaiting = False
        elif text in b"}]":
            depth -= 1
        elif text == b":":
            awaiting = depth == 1 and _is_model(key)
        elif text == b",":
            awaiting = False
        elif depth == 1:
            if awaiting:
                pieces += [body[at : token.start()], orjson.dumps(model)]
                at = token.end()
                awaiting = False
            key = text
    return b"".join([*pieces, body[at:]])


def _is_model(key: bytes) -> bool:
    return key == b'"model"' or (b"\\" in key and orjson.loads(key) == "model")


def _text_chars(value: object) -> tuple[int, int]:
    """Characters of all strings within, and how many of them are images instead."""
    chars = images = 0
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if item.startswith("data:image/"):
                images += 1
            else:
                chars += len(item)
        elif isinstance(item, dict):
            fields = cast(dict[str, Any], item)
            if fields.get("type") == "base64":
                images += 1
            else:
                left.extend(value for key, value in fields.items() if key not in _LABELS)
        elif isinstance(item, list):
            left.extend(cast(list[object], item))
    return chars, images
