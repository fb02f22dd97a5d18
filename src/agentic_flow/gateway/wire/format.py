"""What a wire format must do, and what all of them share.

A format is sans-I/O: it encodes a request into a path, headers and a body, decodes a whole answer, and makes
a decoder for a streamed one. Sockets, keys and retries belong to the provider around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import orjson

from agentic_flow.core.errors import InvalidInput, ProviderProtocol, ProviderRejected
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    JsonObject,
    Message,
    Part,
    StopReason,
    StreamEnd,
    StreamEvent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.gateway.wire.passing import CHARS_PER_TOKEN, IMAGE_TOKENS, PassingReader


class WireRequest(NamedTuple):
    """An HTTP POST without host and credentials."""

    path: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """A decoded answer. `usage_estimated`: the provider counted nothing, so we counted characters."""

    completion: Completion
    usage_estimated: bool


class ProviderFault(NamedTuple):
    """What an error object of a provider says: its own type or code, and its message."""

    kind: str
    message: str


class StreamDecoder(Protocol):
    """Turns the bytes of one streamed answer into events."""

    @property
    def usage_estimated(self) -> bool: ...

    @property
    def done(self) -> bool:
        """Whether the terminal event came; what follows it can be ignored."""
        ...

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        """The events completed by these bytes.

        Raises:
            ProviderProtocol: the bytes are not this format.
            ProviderError: the stream carries an error of the provider.
        """
        ...

    def end(self) -> StreamEnd:
        """The whole answer, once the body has ended.

        Raises:
            ProviderProtocol: the stream ended before its terminal event.
        """
        ...


class WireFormat(Protocol):
    """One provider's way to write requests and answers."""

    @property
    def name(self) -> str: ...

    def auth_headers(self, key: str) -> dict[str, str]: ...

    def encode(self, request: CompletionRequest, *, stream: bool) -> WireRequest:
        """Raises InvalidInput for what this format cannot say."""
        ...

    def decode(self, request: CompletionRequest, body: bytes) -> Answer: ...

    def decoder(self, request: CompletionRequest) -> StreamDecoder: ...

    def passing(self, sent: JsonObject) -> PassingReader:
        """What reads usage and completeness from an answer whose bytes are passed on untouched.

        `sent` is the body of the request.
        """
        ...

    def fault(self, body: bytes) -> ProviderFault | None:
        """The error object in a body, None when it holds none."""
        ...


@dataclass(slots=True)
class ToolCallDraft:
    """A tool call whose argument text is still arriving."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list[str])

    def finish(self, request: CompletionRequest, stop_reason: StopReason | None) -> ToolCallPart:
        """The finished call.

        Raises:
            ProviderProtocol: the argument text is no JSON object.
            ProviderRejected: it was cut by the output limit, which a retry would meet again.
        """
        text = "".join(self.arguments).strip() or "{}"
        try:
            arguments: object = orjson.loads(text)
        except orjson.JSONDecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            if stop_reason == "length":
                raise ProviderRejected(
                    f"the answer was cut at {request.output_tokens_max} output tokens, within the arguments "
                    f"of tool call {self.name!r}",
                    hint="raise output_tokens_max (setting swarm.output_tokens_max)",
                )
            raise ProviderProtocol(
                f"the arguments of tool call {self.name!r} are no JSON object: {_shown(text)!r}",
                hint="the model wrote them wrong; another model may do better",
            )
        return ToolCallPart(id=self.id, name=self.name, arguments=cast(JsonObject, arguments))


def load_object(data: bytes, what: str) -> JsonObject:
    """Parse a JSON object or raise ProviderProtocol that shows its beginning."""
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        shown = _shown(data.decode("utf-8", "replace"))
        raise ProviderProtocol(f"{what} is not valid JSON ({error}): {shown!r}") from None
    if not isinstance(value, dict):
        raise ProviderProtocol(f"{what} is no JSON object but {_shown(str(value))!r}")
    return value  # pyright: ignore[reportUnknownVariableType] - a `cast` would be a call for each answer


def mapping(value: object) -> Mapping[str, Any]:
    """`value` when it is an object, else an empty one: for optional parts of an answer."""
    if isinstance(value, dict):
        # A `cast` would be a call, and this is asked for often.
        return value  # pyright: ignore[reportUnknownVariableType]
    return {}


def items(value: object) -> list[Mapping[str, Any]]:
    """The objects of a list; an empty one for anything else."""
    if not isinstance(value, list):
        return []
    if len(value) == 1 and isinstance(value[0], dict):  # pyright: ignore[reportUnknownArgumentType]
        return value  # pyright: ignore[reportUnknownVariableType] - as nearly always
    return [mapping(entry) for entry in cast(list[object], value)]


def count(value: object) -> int:
    """A token count; absent or null is zero."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def text_of(value: object) -> str:
    """A string field; absent or null is empty."""
    return value if isinstance(value, str) else ""


def estimate_tokens(*texts: str) -> int:
    """Tokens of these texts by the four-characters rule, rounded up."""
    return -(-sum(len(text) for text in texts) // CHARS_PER_TOKEN)


def request_chars(request: CompletionRequest) -> int:
    """Characters of everything the model reads, tool definitions and schema included, images excluded."""
    total = 0
    for message in request.messages:
        for part in message.parts:
            match part:
                case TextPart() | ThinkingPart():
                    total += len(part.text)
                case ToolCallPart():
                    total += len(part.name) + len(orjson.dumps(part.arguments))
                case ToolResultPart():
                    total += len(part.content)
                case ImagePart():
                    pass
    for tool in request.tools:
        total += len(tool.name) + len(tool.description) + len(orjson.dumps(tool.input_schema))
    if request.output_schema is not None:
        total += len(orjson.dumps(request.output_schema))
    return total


def request_images(request: CompletionRequest) -> int:
    """How many images the model sees."""
    return sum(isinstance(part, ImagePart) for message in request.messages for part in message.parts)


def estimated_usage(request: CompletionRequest, parts: Sequence[Part]) -> Usage:
    """Usage by counting characters, for endpoints that report none. The price is left open."""
    written = 0
    for part in parts:
        match part:
            case TextPart() | ThinkingPart():
                written += len(part.text)
            case ToolCallPart():
                written += len(part.name) + len(orjson.dumps(part.arguments))
            case _:
                pass
    return Usage(
        input_tokens=-(-request_chars(request) // CHARS_PER_TOKEN) + IMAGE_TOKENS * request_images(request),
        output_tokens=-(-written // CHARS_PER_TOKEN),
        cost_usd=None,
    )


def check_tool_choice(request: CompletionRequest) -> None:
    """Refuse a choice that names no tool of the request."""
    if request.tool_choice in ("auto", "none"):
        return
    if request.tool_choice == "required":
        if not request.tools:
            raise InvalidInput("tool_choice 'required' needs at least one tool", hint="give tools")
        return
    names = [tool.name for tool in request.tools]
    if request.tool_choice not in names:
        raise InvalidInput(
            f"tool_choice {request.tool_choice!r} names no tool of the request",
            hint=f"one of 'auto', 'none', 'required' or a tool name: {', '.join(names) or 'there are none'}",
        )


def check_no_logprobs(request: CompletionRequest, provider: str) -> None:
    """Refuse log probabilities where the provider has none to give."""
    if request.logprobs is not None:
        raise InvalidInput(
            f"logprobs {request.logprobs!r} cannot be had: {provider} tells no probabilities of tokens",
            hint="leave logprobs out, or ask a model of an OpenAI-compatible provider",
            details={"field": "logprobs"},
        )


def check_structured(request: CompletionRequest, parts: Sequence[Part], stop_reason: StopReason) -> None:
    """An answer promised as JSON must be JSON, or the call failed."""
    if request.output_schema is None or stop_reason != "end":
        return
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        raise ProviderProtocol(
            f"a structured answer was asked for and this is not JSON: {_shown(text)!r}",
            hint="use a model that supports structured output",
        ) from None


def system_and_turns(messages: Sequence[Message]) -> tuple[list[str], list[Message]]:
    """System texts in order, and the other turns with neighbours of the same role joined."""
    system: list[str] = []
    turns: list[Message] = []
    for message in messages:
        if message.role == "system":
            if any(not isinstance(part, TextPart) for part in message.parts):
                raise InvalidInput("a system message holds text only", hint="move other parts to a user turn")
            system.append(message.text)
        elif turns and turns[-1].role == message.role:
            turns[-1] = Message(role=message.role, parts=(*turns[-1].parts, *message.parts))
        else:
            turns.append(message)
    return system, turns


def misplaced(part: Part, role: str) -> InvalidInput:
    """The error for a part that its turn cannot hold."""
    return InvalidInput(
        f"a {role} message cannot hold a part of kind {part.kind!r}",
        hint="tool calls and thinking belong to assistant turns; tool results and images to user turns",
    )


def check_image(part: ImagePart) -> None:
    """An image has exactly one source."""
    if (part.data is None) == (part.url is None):
        raise InvalidInput("an image needs either data or url", hint="give exactly one of them")


def _shown(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}…"
