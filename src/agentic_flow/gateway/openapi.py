"""The OpenAPI document of the model routes: what each understands, and how each says what went wrong.

The vendors' formats are larger than what stands here. Named are the fields that the gateway itself reads;
others pass through to a provider that speaks the format, and are refused by name for one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Route

from agentic_flow.core.errors import (
    ROWS,
    AgenticFlowError,
    BudgetExceeded,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    LimitExceeded,
    ProviderFailed,
    RateLimited,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from agentic_flow.core.messages import Completion, CompletionRequest, JsonObject, ModelInfo, StreamEvent
from agentic_flow.core.openapi import JSON, PROBLEM, Operation, Problem, document, document_route
from agentic_flow.gateway import choice_routes, routes, usage_routes
from agentic_flow.gateway.front.routes import SCOPE
from agentic_flow.gateway.operator_document import MORE_ERRORS, operator_operations
from agentic_flow.gateway.routing.choice import ChoiceRequest, ExplainedChoice
from agentic_flow.gateway.usage_table import USAGE_KEYS

EVENTS = "text/event-stream"

_DESCRIPTION = (
    "Every model behind one door: OpenAI's Chat Completions, Responses and Embeddings, Anthropic's Messages, "
    "and the gateway's own routes. Of the vendors' formats those fields are named that the gateway reads. "
    "Other fields pass through where the model's provider speaks the format, and are refused by name where "
    "the request has to be translated. Clients that are written for a vendor need nothing but the base URL."
)
_LABEL = {"type": "string", "pattern": "^[A-Za-z0-9._:/@-]{1,128}$"}
_TIMES: dict[str, JsonObject] = {
    "x-deadline-s": {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Seconds that the caller is willing to wait.",
    },
    "idempotency-key": {"type": "string", "description": "Passed on to the provider."},
}
_HEADERS: dict[str, JsonObject] = {
    **_TIMES,
    "x-agentic-flow-agent": {**_LABEL, "description": "Which agent asks, for budgets and the usage ledger."},
    "x-agentic-flow-run": {**_LABEL, "description": "Which run it belongs to, likewise."},
    "x-agentic-flow-conversation": {**_LABEL, "description": "What belongs together, for sticky routes."},
}


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


ModelName = Annotated[
    str,
    Field(min_length=1, description="A model, `provider:model`, an alias, a route, or `auto`."),
]
Stream = Annotated[bool | None, Field(description="Whether the answer comes as server-sent events.")]


Content = Annotated[str | list[JsonObject], Field(description="A text, or a list of typed parts.")]


class ChatMessage(_Open):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None


class Turn(_Open):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ChatRequest(_Open):
    """OpenAI Chat Completions."""

    model: ModelName
    messages: list[ChatMessage]
    stream: Stream = None
    stream_options: JsonObject | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    tools: list[JsonObject] | None = Field(default=None, description="Of the type `function`.")
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    response_format: JsonObject | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class ResponsesRequest(_Open):
    """OpenAI Responses. Nothing is stored: the history travels in `input`."""

    model: ModelName
    input: str | list[JsonObject]
    instructions: str | None = None
    stream: Stream = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[JsonObject] | None = Field(default=None, description="Of the type `function`.")
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    text: JsonObject | None = Field(default=None, description="The format of the answer.")
    reasoning: JsonObject | None = None
    metadata: JsonObject | None = None
    safety_identifier: str | None = None
    user: str | None = None


class MessagesRequest(_Open):
    """Anthropic Messages."""

    model: ModelName
    messages: list[Turn]
    max_tokens: Annotated[int, Field(ge=1)]
    system: str | list[JsonObject] | None = None
    stream: Stream = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    tools: list[JsonObject] | None = Field(default=None, description="Of the type `custom`.")
    tool_choice: JsonObject | None = None
    thinking: JsonObject | None = None
    output_config: JsonObject | None = None
    metadata: JsonObject | None = None


class CountRequest(_Open):
    """A request for Messages whose tokens are to be counted."""

    model: ModelName
    messages: list[Turn]
    system: str | list[JsonObject] | None = None
    tools: list[JsonObject] | None = None


class EmbeddingsRequest(_Open):
    """OpenAI Embeddings. The model `local` is the platform's own embedder."""

    model: ModelName
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class ChatAnswer(_Open):
    """A chat completion."""

    id: str
    object: str
    model: str
    choices: list[JsonObject]


class ResponsesAnswer(_Open):
    """A response."""

    id: str
    object: str
    model: str
    output: list[JsonObject]


class MessagesAnswer(_Open):
    """A message."""

    id: str
    type: str
    role: str
    model: str
    content: list[JsonObject]


class CountAnswer(_Open):
    """Tokens of a request; the header `x-agentic-flow-token-count` says `exact` or `estimated`."""

    input_tokens: int


class EmbeddingsAnswer(_Open):
    """Vectors, in the order of the input."""

    object: str
    model: str
    data: list[JsonObject]


class ListedModel(_Open):
    """A model as OpenAI lists it, with what is known of it beside."""

    id: str
    object: str
    owned_by: str


class ModelList(BaseModel):
    """All models, the default one first."""

    object: Literal["list"]
    data: list[ListedModel]


class AnthropicModel(BaseModel):
    """A model as Anthropic lists it, for clients that send `anthropic-version`."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int | None


class AnthropicPage(BaseModel):
    """A page of models, for clients that send `anthropic-version`."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class PageQuery(BaseModel):
    """Pages as Anthropic's clients ask for them."""

    limit: Annotated[int, Field(ge=1, le=1000)] = Field(default=20, description="Models of one page.")
    after_id: str | None = Field(default=None, description="The page begins after this model.")
    before_id: str | None = Field(default=None, description="The page ends before this model.")


class ResolveQuery(BaseModel):
    """What is to be resolved."""

    model: str | None = Field(default=None, description="A model's name. Left out: the default one.")


class UsageQuery(BaseModel):
    """Which part of the usage ledger."""

    by: str = Field(default="model", description=f"Keys with commas between: {', '.join(USAGE_KEYS)}.")
    since: str = Field(
        default=usage_routes.DEFAULT_SINCE, description="A date, a moment (ISO 8601), or `7d`, `12h`, `30m`."
    )
    until: str | None = Field(default=None, description="Likewise. Left out: now.")
    limit: Annotated[int, Field(ge=1, le=9999)] = Field(
        default=usage_routes.DEFAULT_LIMIT, description="Rows at most."
    )
    tenant: str | None = Field(
        default=None, description="Another tenant, or `*` for all: needs the scope `platform:admin`."
    )


class UsageTable(_Open):
    """Sums and percentiles of each group, and of all."""

    tenant: str
    since_s: float
    until_s: float
    by: list[str]
    rows: list[JsonObject]


class OpenAIFault(_Open):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class OpenAIError(_Open):
    """An error of OpenAI-shaped routes; a vendor's words about a refused request come as it wrote them."""

    error: OpenAIFault


class AnthropicFault(_Open):
    """What went wrong, as Anthropic's clients read it."""

    type: str
    message: str


class AnthropicError(_Open):
    """An error of Anthropic-shaped routes."""

    type: Literal["error"]
    error: AnthropicFault


class ModelsError(Problem):
    """An error of the model list, which clients of all kinds ask: each finds its fields."""

    error: OpenAIFault


_ERRORS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": OpenAIError,
    "/v1/responses": OpenAIError,
    "/v1/embeddings": OpenAIError,
    "/v1/messages": AnthropicError,
    "/v1/messages/count_tokens": AnthropicError,
    "/v1/models": ModelsError,
    "/v1/models/{id}": ModelsError,
}
_READING = (InvalidInput, Unauthenticated, Forbidden, RateLimited, AgenticFlowError, Unavailable)
_NAMING = (*_READING, UnknownModel, ProviderFailed, DeadlineExceeded)
_ASKING = (*_NAMING, TooLarge, BudgetExceeded, LimitExceeded)


def _operations() -> list[Operation]:
    def front(
        name: str, path: str, summary: str, body: type[BaseModel], answer: Any, notes: str
    ) -> Operation:
        return Operation(
            name, "POST", path, summary, None, SCOPE, answer, body=body, headers=_HEADERS, notes=notes
        )

    streams = "With `stream` the answer is a stream of the format's own events; an error is the last of them."
    version: dict[str, JsonObject] = {
        "anthropic-version": {"type": "string", "description": "Asks for Anthropic's shape."}
    }
    return [
        front(
            "chat", "/v1/chat/completions", "As OpenAI Chat Completions.", ChatRequest, ChatAnswer, streams
        ),
        front(
            "respond", "/v1/responses", "As OpenAI Responses.", ResponsesRequest, ResponsesAnswer, streams
        ),
        front("message", "/v1/messages", "As Anthropic Messages.", MessagesRequest, MessagesAnswer, streams),
        front(
            "count_tokens",
            "/v1/messages/count_tokens",
            "Count the tokens of a request.",
            CountRequest,
            CountAnswer,
            "By the provider where it counts, else an estimate.",
        ),
        front(
            "embed",
            "/v1/embeddings",
            "Make vectors of texts.",
            EmbeddingsRequest,
            EmbeddingsAnswer,
            "Models of providers that speak OpenAI's format, and the platform's own embedder as `local`.",
        ),
        Operation(
            "list_models", "GET", "/v1/models", "Models that can be asked now.", None, SCOPE,
            ModelList | AnthropicPage, query=PageQuery, headers=version,
            notes="The parameters are for clients that send `anthropic-version`.",
        ),
        Operation(
            "show_model", "GET", "/v1/models/{id}", "One of them.", None, SCOPE,
            ListedModel | AnthropicModel, headers=version,
        ),
        Operation(
            "resolve", "GET", "/v1/resolve", "The model that would serve a name now.", None, routes.SCOPE,
            ModelInfo, query=ResolveQuery,
        ),
        Operation(
            "route", "POST", "/v1/route", "Explain where a call would go. No provider is asked.", None,
            choice_routes.SCOPE, ExplainedChoice, body=ChoiceRequest,
        ),
        Operation(
            "complete", "POST", "/v1/complete", "Answer in the gateway's own vocabulary.", None, routes.SCOPE,
            Completion, body=CompletionRequest, headers=_TIMES,
        ),
        Operation(
            "complete_stream", "POST", "/v1/complete/stream", "The same as a stream of events.", None,
            routes.SCOPE, StreamEvent, answer_media_type=EVENTS, body=CompletionRequest, headers=_TIMES,
            notes="An error is the last event, `error`.",
        ),
        Operation(
            "usage", "GET", "/v1/usage", "What calls used and cost.", None, usage_routes.SCOPE, UsageTable,
            query=UsageQuery,
        ),
        *operator_operations(),
    ]  # fmt: skip


def openapi_document() -> JsonObject:
    """The OpenAPI document of the model routes."""
    described = document(
        _operations(), title="Agentic Flow models", description=_DESCRIPTION, path_types={"id": str}
    )
    schemas: dict[str, Any] = described["components"]["schemas"]
    for shape in (OpenAIError, AnthropicError, ModelsError):
        schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[shape.__name__] = schema
    described["components"]["schemas"] = dict(sorted(schemas.items()))
    for path, methods in described["paths"].items():
        for operation in methods.values():
            operation["responses"] = _responses(path, operation)
    return described


def build_document_route() -> Route:
    """`GET /openapi.json`, which needs no credential."""
    return document_route(openapi_document())


def _responses(path: str, operation: Mapping[str, Any]) -> JsonObject:
    answer = operation["responses"]["200"]
    name = operation["operationId"]
    if name in ("chat", "respond", "message"):
        answer = {**answer, "content": {**answer["content"], EVENTS: {"schema": _events({})}}}
    elif EVENTS in answer["content"]:
        either = [answer["content"][EVENTS]["schema"], {"$ref": "#/components/schemas/Problem"}]
        answer = {**answer, "content": {EVENTS: {"schema": _events({"anyOf": either})}}}
    responses: JsonObject = {"200": answer}
    asks = "requestBody" in operation
    kinds = _ASKING if asks else _NAMING if name in ("resolve", "show_model") else _READING
    if path.startswith(("/v1/budgets", "/v1/policies")):
        kinds = (*_READING, *MORE_ERRORS.get(name, ()))
    shape = _ERRORS.get(path)
    media_type = PROBLEM if shape is None else JSON
    schema = {"$ref": f"#/components/schemas/{'Problem' if shape is None else shape.__name__}"}
    for kind in kinds:
        row = ROWS[kind.code]
        codes = sorted(other.code for other in kinds if ROWS[other.code].status == row.status)
        responses[str(row.status)] = {
            "description": ", ".join(codes),
            "content": {media_type: {"schema": schema}},
        }
    if shape is AnthropicError:
        responses["529"] = {"description": "overloaded", "content": {media_type: {"schema": schema}}}
    return dict(sorted(responses.items()))


def _events(data: JsonObject) -> JsonObject:
    """The schema of one server-sent event, whose data is JSON (or OpenAI's `[DONE]`)."""
    content = {"contentMediaType": JSON, "contentSchema": data} if data else {}
    return {
        "type": "object",
        "description": "One server-sent event.",
        "properties": {"event": {"type": "string"}, "data": {"type": "string", **content}},
    }
