"""The typed vocabulary of model calls: what every wire format is parsed into and encoded from.

Providers translate these to their own wire formats; agents, the journal of a run and the HTTP twins speak
nothing else. All models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from agentic_flow.core.errors import NeedsNewer

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

JsonObject = dict[str, Any]
"""A JSON object: string keys, JSON values."""

READER = 1
"""Number of what this build reads. A build that writes a record in which an unknown key must not be passed
over says so in it (`READER_MIN`), with a number of its own."""
READER_MIN = "reader_min"
"""Key of a record: who reads less than this number must leave it alone."""


class Frozen(BaseModel):
    """Immutable value that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_record(cls, record: object, *, keep: bool = True) -> Self:
        """What a process of ours has stored or answered, perhaps one of a newer build.

        What callers send is validated, and refused with keys that are not known; here such keys are passed
        over, and a `Record` writes them again.

        Args:
            record: JSON-compatible values.
            keep: Whether unknown keys are kept, and then count when two values are compared.

        Raises:
            NeedsNewer: it says that this build must leave it alone, or cannot be read otherwise.
        """
        least = cast("Mapping[str, Any]", record).get(READER_MIN) if isinstance(record, Mapping) else None
        if isinstance(least, int) and least > READER:
            raise NeedsNewer(
                f"a record of type {cls.__name__!r} needs a reader of number {least!r}, this build reads "
                f"{READER!r}",
                hint="leave it to processes of the build that wrote it, or upgrade this one",
            )
        try:
            return cls.model_validate(record, extra="allow" if keep else "ignore")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise NeedsNewer(
                f"a record of type {cls.__name__!r} cannot be read by this build ({where!r}: {first['msg']})",
                hint="leave it to processes of the build that wrote it, or upgrade this one",
            ) from error

    @classmethod
    def trusted(cls, **values: Any) -> Self:
        """The model of values that were checked before; nothing is checked again, and nothing filled in.

        Several times as fast as `model_construct`, which walks the fields. Every field must be given.
        """
        model = cls.__new__(cls)
        _set_values(model, values)
        _set_given(model, set(values))
        _set_extra(model, None)
        _set_private(model, None)
        return model


class Record(Frozen):
    """A value that our processes store, read and store again: keys of a newer build survive that."""

    @model_serializer(mode="wrap")
    def _with_unknown_keys(self, handler: SerializerFunctionWrapHandler) -> Any:
        known = handler(self)
        return known if not self.__pydantic_extra__ else self.__pydantic_extra__ | known

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """That of the known keys: what the serializer gives besides has none."""
        return handler(cast("CoreSchema", _without_serializer(cast(JsonObject, core_schema))))


def _without_serializer(schema: JsonObject) -> JsonObject:
    plain = {key: value for key, value in schema.items() if key != "serialization"}
    if plain["type"] != "model" and "schema" in plain:  # a validator of the model is around it
        plain["schema"] = _without_serializer(plain["schema"])
    return plain


# The slots of a model, by what fills them: to look them up by name takes longer than to fill them.
_set_values, _set_given, _set_extra, _set_private = (
    BaseModel.__dict__[slot].__set__
    for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)


class TextPart(Frozen):
    kind: Literal["text"] = "text"
    text: str


class ThinkingPart(Frozen):
    """Reasoning that the provider showed; `signature` lets Anthropic accept it back unchanged."""

    kind: Literal["thinking"] = "thinking"
    text: str
    signature: str | None = None


class ImagePart(Frozen):
    """An image: base64 `data` with its media type, or a `url` the provider fetches."""

    kind: Literal["image"] = "image"
    media_type: str
    data: str | None = None
    url: str | None = None


class ToolCallPart(Frozen):
    """The model asks for a tool. `arguments` are parsed; what was not a JSON object never gets here."""

    kind: Literal["tool_call"] = "tool_call"
    id: str
    name: str
    arguments: JsonObject


class ToolResultPart(Frozen):
    """The answer to the tool call with the same `id`."""

    kind: Literal["tool_result"] = "tool_result"
    id: str
    name: str
    content: str
    is_error: bool = False


Part = Annotated[
    TextPart | ThinkingPart | ImagePart | ToolCallPart | ToolResultPart, Field(discriminator="kind")
]


class Message(Frozen):
    """One turn. Tool results travel in `user` messages, tool calls in `assistant` messages."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined by new lines."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


class ToolSpec(Frozen):
    """A tool as a model sees it. `input_schema` is JSON Schema 2020-12 of an object.

    `strict` asks a provider that can to hold the model to the schema; None leaves it to the provider.
    """

    name: Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_-]{0,63}$")]
    description: str
    input_schema: JsonObject
    read_only: bool = False
    strict: bool | None = None


TOP_LOGPROBS_MAX = 20
"""Most alternatives that a vendor gives beside each token."""

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class CompletionRequest(Frozen):
    """One model call.

    `tool_choice` is "auto", "none", "required" or the name of the one tool to call. `stream` asks the
    gateway to use the provider's streaming wire format even when the caller wants the whole answer, so that
    a stalled or truncated answer is noticed while it happens. `parallel_tool_calls` False asks for one call
    at a time; `reasoning_effort` None leaves thinking to the model; `end_user` is the caller's opaque name of
    the person behind the request, for the provider's abuse checks. `logprobs` asks for the probability of
    each token of the text, with this many alternatives beside it; None asks for none. `agent` and `run` say
    who asks within the caller's house, for budgets and the usage ledger; providers never see them.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    output_tokens_max: Annotated[int, Field(gt=0)] = 4096
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    output_schema: JsonObject | None = None
    seed: int | None = None
    stream: bool = False
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    end_user: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    agent: Annotated[str, Field(max_length=128)] | None = None
    run: Annotated[str, Field(max_length=128)] | None = None


class Usage(Frozen):
    """Tokens as the provider billed them, and their price.

    `input_tokens` includes cache reads and writes; `output_tokens` includes reasoning. `cost_usd` is None
    when no price for the model is known, which is not the same as free.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        cost = None if self.cost_usd is None or other.cost_usd is None else self.cost_usd + other.cost_usd
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cost_usd=cost,
        )


StopReason = Literal["end", "tool_calls", "length", "stop_sequence", "refusal"]


class TokenLogprob(Frozen):
    """A token of the text and the natural logarithm of its probability.

    `utf8` are its bytes, None where the provider does not tell: a token may be part of a character. `top` are
    the likeliest tokens at its place, which need not include it; they have no `top` of their own.
    """

    token: str
    logprob: float
    utf8: tuple[int, ...] | None = None
    top: tuple[TokenLogprob, ...] = ()


class Completion(Frozen):
    """A finished model answer. `model` is the one that served, `provider` who ran it.

    `logprobs` are those of the tokens of all text, in order; empty where nobody asked, or the provider told
    none.
    """

    model: str
    provider: str
    parts: tuple[Part, ...]
    stop_reason: StopReason
    usage: Usage
    latency_s: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def tool_calls(self) -> tuple[ToolCallPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCallPart))


class TextDelta(Frozen):
    """A piece of the text; `logprobs` are those of its tokens, where they were asked for."""

    kind: Literal["text_delta"] = "text_delta"
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ThinkingDelta(Frozen):
    kind: Literal["thinking_delta"] = "thinking_delta"
    text: str


class ToolCallDelta(Frozen):
    """A piece of a tool call's JSON arguments; `id` and `name` come with the first piece of each index."""

    kind: Literal["tool_call_delta"] = "tool_call_delta"
    index: int
    id: str | None = None
    name: str | None = None
    arguments_json: str = ""


class StreamEnd(Frozen):
    """The last event of a complete stream. A stream without it is broken, whatever came before."""

    kind: Literal["end"] = "end"
    completion: Completion


StreamEvent = Annotated[TextDelta | ThinkingDelta | ToolCallDelta | StreamEnd, Field(discriminator="kind")]


class ModelInfo(Frozen):
    """A model that a provider serves. `generative` is False for models that only select and cite."""

    id: str
    provider: str
    generative: bool = True
    context_tokens: int | None = None
    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None
