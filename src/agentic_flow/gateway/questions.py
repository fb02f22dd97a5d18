"""What a caller asks, in whichever format it came: what a walk through the gateway begins with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import orjson

from agentic_flow.core.messages import CompletionRequest, JsonObject
from agentic_flow.gateway.wire.format import request_chars, request_images
from agentic_flow.gateway.wire.passing import CHARS_PER_TOKEN, IMAGE_TOKENS, PassingRequest

# Vendors wrap messages, and more so tools, in words of their own that are billed.
_WRAPPING_TOKENS = 1024


class Destination(NamedTuple):
    """Where a call goes: the provider, its own id of the model, the format that it speaks over HTTP, and all
    formats in which requests pass through to it."""

    provider: str
    model: str
    wire: str | None
    passes: frozenset[str] = frozenset()


class Question(ABC):
    """One request.

    Args:
        asked: The model's name, as the caller wrote it.
        wire: The format that it came in, where answers of that format can be passed through; None: ours.
        stream: Whether the answer is wanted as a stream.
        agent, run: Who asks within the caller's house, for budgets and the usage ledger.
        conversation: The caller's name for what belongs together, for routes that are sticky.
    """

    operation = "chat"
    """What the conventions for generative AI call it."""

    def __init__(
        self,
        asked: str,
        *,
        wire: str | None,
        stream: bool,
        agent: str | None = None,
        run: str | None = None,
        conversation: str | None = None,
    ) -> None:
        self.asked = asked
        self.wire = wire
        self.stream = stream
        self.agent = agent
        self.run = run
        self.conversation = conversation

    @abstractmethod
    def request(self) -> CompletionRequest:
        """It in our own vocabulary.

        Raises:
            InvalidInput: a field cannot be translated; names it.
        """

    @abstractmethod
    def passing(self, destination: Destination) -> PassingRequest:
        """It in its own format, for a provider that speaks it."""

    def also(self) -> Mapping[str, str]:
        """What else than `sent` decides about the answer, such as headers that are passed on."""
        return {}

    @abstractmethod
    def sent(self) -> JsonObject:
        """It as JSON, in its own format."""

    @abstractmethod
    def input_tokens(self) -> int:
        """About as many tokens as the model will read."""

    @abstractmethod
    def input_tokens_max(self) -> int:
        """No fewer tokens than the model can be billed for reading: one for each byte of text."""

    @abstractmethod
    def output_tokens_max(self) -> int | None:
        """The most that it lets be written, all choices together; None when it sets no limit."""

    @abstractmethod
    def prompt(self) -> str:
        """The text of the last user message, for routers that look at it."""


class TypedQuestion(Question):
    """A request in our own vocabulary."""

    def __init__(self, request: CompletionRequest, *, stream: bool) -> None:
        super().__init__(request.model, wire=None, stream=stream, agent=request.agent, run=request.run)
        self._request = request

    def request(self) -> CompletionRequest:
        return self._request

    def passing(self, destination: Destination) -> PassingRequest:
        raise AssertionError("no provider speaks our own vocabulary")

    def sent(self) -> JsonObject:
        return self._request.model_dump(mode="json", exclude={"agent", "run", "stream"})

    def input_tokens(self) -> int:
        return tokens_of(self._request)

    def input_tokens_max(self) -> int:
        images = IMAGE_TOKENS * request_images(self._request)
        # A character takes at most four bytes, and one for nearly all that are written.
        text = request_chars(self._request)
        return text + _beyond_ascii(self._request) + images + _WRAPPING_TOKENS

    def output_tokens_max(self) -> int | None:
        return self._request.output_tokens_max

    def prompt(self) -> str:
        return next((m.text for m in reversed(self._request.messages) if m.role == "user"), "")


class BodyQuestion(Question):
    """A request in a vendor's format; what reads the format is the front's.

    Args:
        body: The bytes that came.
        sent: The same, parsed.
    """

    def __init__(
        self,
        body: bytes,
        sent: JsonObject,
        asked: str,
        *,
        wire: str | None,
        stream: bool,
        agent: str | None = None,
        run: str | None = None,
        conversation: str | None = None,
    ) -> None:
        # What `Question` sets: every request through a front makes one.
        self.asked = asked
        self.wire = wire
        self.stream = stream
        self.agent = agent
        self.run = run
        self.conversation = conversation
        self._body = body
        self._sent = sent
        # Routes, limits, budgets and spans ask for these, each on its own.
        self._sized: tuple[int, int] | None = None
        self._output_max: int | None = None
        self._output_max_known = False

    def sent(self) -> JsonObject:
        return self._sent

    def input_tokens(self) -> int:
        text_bytes, images = self._sized or self._size()
        return text_bytes // CHARS_PER_TOKEN + IMAGE_TOKENS * images

    def input_tokens_max(self) -> int:
        text_bytes, images = self._sized or self._size()
        return text_bytes + IMAGE_TOKENS * images + _WRAPPING_TOKENS

    def output_tokens_max(self) -> int | None:
        """As `Question` says; `n` choices may each be as long as the limit."""
        if not self._output_max_known:
            self._output_max = self._asked_output()
            self._output_max_known = True
        return self._output_max

    def _asked_output(self) -> int | None:
        choices = self._sent.get("n")
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
            value = self._sent.get(name)
            if isinstance(value, int) and value > 0:
                return value * (choices if isinstance(choices, int) and choices > 1 else 1)
        return None

    def prompt(self) -> str:
        return _last_text(self._sent.get("messages") or self._sent.get("input"))

    def _size(self) -> tuple[int, int]:
        """Bytes of text and the number of images."""
        plain = b"base64" not in self._body and b"image" not in self._body
        sized = self._sized = (len(self._body), 0) if plain else _text_and_images(self._sent)
        return sized


def tokens_of(request: CompletionRequest) -> int:
    """About as many tokens as a model reads in this request."""
    return -(-request_chars(request) // CHARS_PER_TOKEN) + IMAGE_TOKENS * request_images(request)


def _beyond_ascii(request: CompletionRequest) -> int:
    """Bytes that text takes beyond one for each character."""
    texts = (
        getattr(part, "text", None) or getattr(part, "content", "")
        for m in request.messages
        for part in m.parts
    )
    return sum(len(text.encode("utf-8", "surrogatepass")) - len(text) for text in texts if not text.isascii())


def _text_and_images(value: Any) -> tuple[int, int]:
    text_bytes = images = 0
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            members = cast(JsonObject, found)
            if members.get("type") in ("image", "image_url", "input_image"):
                images += 1
                continue
            left.extend(members.values())
            text_bytes += sum(map(len, members))
        elif isinstance(found, list):
            left.extend(cast(list[Any], found))
        elif isinstance(found, str):
            text_bytes += len(found.encode("utf-8", "surrogatepass"))
        else:
            text_bytes += len(orjson.dumps(found))
    return text_bytes, images


def _last_text(messages: Any) -> str:
    if isinstance(messages, str):
        return messages
    for message in reversed(cast(list[Any], messages) if isinstance(messages, list) else []):
        if not isinstance(message, dict) or cast(JsonObject, message).get("role") != "user":
            continue
        content = cast(JsonObject, message).get("content")
        if isinstance(content, str):
            return content
        parts = cast(list[Any], content) if isinstance(content, list) else []
        texts = [cast(JsonObject, part).get("text") for part in parts if isinstance(part, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""
