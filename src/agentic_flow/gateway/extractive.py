"""The built-in keyless model: it searches with the tools it is given, then selects passages and cites them.

It generates nothing. It is deterministic, works offline and costs nothing; its answers say what it is. It
sits behind the same interface as every other provider, so that a team of agents, the recording of runs and
the command line need no second path for machines without a key.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import ProviderRejected
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    Message,
    ModelInfo,
    StopReason,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ToolCallDelta,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    Usage,
)
from agentic_flow.gateway import passages as p
from agentic_flow.gateway.models import EXTRACTIVE
from agentic_flow.gateway.wire.format import (
    CHARS_PER_TOKEN,
    check_no_logprobs,
    check_tool_choice,
    estimate_tokens,
    request_chars,
)

PREAMBLE = "Answered by the extractive model: passages selected, nothing generated."
NOTHING_FOUND = "Nothing relevant to the question was found."
SEARCHES_MAX = 3
HITS_WANTED = 20
QUERY_CHARS_MAX = 1000
_BLOCK = re.compile(r"<passages(?:\s+max_per_file=\"(\d{1,3})\")?\s*>(.*?)</passages>", re.DOTALL)
_LIMIT_NAMES = ("limit", "k", "top_k", "max_results", "results_max")


@dataclass(frozen=True, slots=True)
class _Conversation:
    """What matters of a request: the question, the evidence so far, and the searches already made."""

    question: str
    given: tuple[p.Passage, ...]
    max_per_file: int
    queries: tuple[str, ...]
    found: tuple[p.Passage, ...]
    failures: tuple[str, ...]


class ExtractiveProvider:
    """`Provider` of the one model `extractive`."""

    name = EXTRACTIVE
    default_model = EXTRACTIVE
    configured = True
    setup_hint = "the extractive model is always there"

    def owns(self, model: str) -> bool:
        return model == EXTRACTIVE

    async def models(self, *, deadline: Deadline) -> list[ModelInfo]:
        return [
            ModelInfo(
                id=EXTRACTIVE,
                provider=EXTRACTIVE,
                generative=False,
                input_usd_per_mtok=0.0,
                output_usd_per_mtok=0.0,
            )
        ]

    async def complete(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> Completion:
        return answer(request)

    async def stream(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> AsyncIterator[StreamEvent]:
        completion = answer(request)
        calls = 0
        for part in completion.parts:
            if isinstance(part, ToolCallPart):
                arguments = orjson.dumps(part.arguments).decode()
                yield ToolCallDelta(index=calls, id=part.id, name=part.name, arguments_json=arguments)
                calls += 1
            elif isinstance(part, TextPart):
                for block in re.findall(r".+?(?:\n\n|\Z)", part.text, re.DOTALL):
                    yield TextDelta(text=block)
        yield StreamEnd(completion=completion)


def answer(request: CompletionRequest) -> Completion:
    """The model itself: one turn, from the request alone.

    Raises:
        ProviderRejected: the request asks for what selecting cannot do.
        InvalidInput: tool_choice names no tool of the request, or logprobs are asked for.
    """
    check_tool_choice(request)
    check_no_logprobs(request, "the extractive model")
    if request.output_schema is not None:
        raise ProviderRejected(
            "the extractive model selects passages and cannot fill a schema",
            hint="use a generative model for structured output",
        )
    conversation = _read(request)
    tool = _search_tool(request)
    if tool is not None:
        query = _next_query(conversation)
        if query is None and request.tool_choice not in ("auto", "none"):
            query = conversation.question or "overview"  # the caller demands a call, whatever we know
        if query is not None:
            return _call(request, tool, query)
    text, stop_reason = _write(conversation, request)
    return Completion(
        model=EXTRACTIVE,
        provider=EXTRACTIVE,
        parts=(TextPart(text=text),),
        stop_reason=stop_reason,
        usage=_usage(request, text),
    )


def _usage(request: CompletionRequest, written: str) -> Usage:
    """Its own rule, since it has no tokenizer: four characters are a token."""
    return Usage(
        input_tokens=-(-request_chars(request) // CHARS_PER_TOKEN),
        output_tokens=estimate_tokens(written),
        cost_usd=0.0,
    )


def _call(request: CompletionRequest, tool: ToolSpec, query: str) -> Completion:
    arguments: JsonObject = {"query": query[:QUERY_CHARS_MAX], **_limit_argument(tool)}
    call = ToolCallPart(id=f"extractive_{len(request.messages)}", name=tool.name, arguments=arguments)
    return Completion(
        model=EXTRACTIVE,
        provider=EXTRACTIVE,
        parts=(call,),
        stop_reason="tool_calls",
        usage=_usage(request, orjson.dumps(arguments).decode()),
    )


def _search_tool(request: CompletionRequest) -> ToolSpec | None:
    if request.tool_choice == "none":
        return None
    searchable = [tool for tool in request.tools if _takes_query(tool)]
    if request.tool_choice not in ("auto", "required"):
        named = [tool for tool in searchable if tool.name == request.tool_choice]
        if not named:
            raise ProviderRejected(
                f"the extractive model can only call search tools, not {request.tool_choice!r}",
                hint="use a generative model, or a read-only tool with a required string `query`",
            )
        return named[0]
    by_preference = sorted(
        searchable, key=lambda tool: (tool.name != "memory_search", "search" not in tool.name)
    )
    if not by_preference and request.tool_choice == "required":
        raise ProviderRejected(
            "the extractive model was told to call a tool and none of them is a search",
            hint="use a generative model, or give a read-only tool with a required string `query`",
        )
    return by_preference[0] if by_preference else None


def _takes_query(tool: ToolSpec) -> bool:
    properties = tool.input_schema.get("properties")
    required = tool.input_schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    query = cast(JsonObject, properties).get("query")
    if required != ["query"] or not isinstance(query, dict):
        return False
    kind = cast(JsonObject, query).get("type")
    return kind == "string" and (tool.name == "memory_search" or tool.read_only)


def _limit_argument(tool: ToolSpec) -> JsonObject:
    properties = cast(JsonObject, tool.input_schema["properties"])
    for name in _LIMIT_NAMES:
        schema = properties.get(name)
        if isinstance(schema, dict) and cast(JsonObject, schema).get("type") == "integer":
            highest = cast(JsonObject, schema).get("maximum")
            return {name: min(HITS_WANTED, highest) if isinstance(highest, int) else HITS_WANTED}
    return {}


def _read(request: CompletionRequest) -> _Conversation:
    position = _question_position(request.messages)
    text = request.messages[position].text if position is not None else ""
    given: list[p.Passage] = []
    max_per_file = p.PER_FILE_MAX
    for match in _BLOCK.finditer(text):
        given.extend(_passages_of(_loads(match[2]), source=0))
        if match[1]:
            max_per_file = max(1, int(match[1]))
    question = _BLOCK.sub(" ", text).strip()
    later = request.messages[position + 1 :] if position is not None else ()
    queries: list[str] = []
    asked: dict[str, int] = {}
    found: list[p.Passage] = []
    failures: list[str] = []
    for message in later:
        for part in message.parts:
            if isinstance(part, ToolCallPart) and isinstance(part.arguments.get("query"), str):
                asked[part.id] = len(queries)
                queries.append(part.arguments["query"])
            elif isinstance(part, ToolResultPart):
                if part.is_error:
                    failures.append(part.content)
                    continue
                content = _loads(part.content)
                hits = cast(Mapping[str, Any], content).get("hits") if isinstance(content, dict) else None
                found.extend(_passages_of(hits, source=asked.get(part.id, 0)))
    return _Conversation(question, tuple(given), max_per_file, tuple(queries), tuple(found), tuple(failures))


def _question_position(messages: Sequence[Message]) -> int | None:
    """The last user turn with text. One that also carries tool results only comments on those."""
    with_text = [i for i, m in enumerate(messages) if m.role == "user" and m.text.strip()]
    pure = [i for i in with_text if not any(isinstance(part, ToolResultPart) for part in messages[i].parts)]
    return pure[-1] if pure else (with_text[-1] if with_text else None)


def _passages_of(value: object, *, source: int) -> list[p.Passage]:
    found: list[p.Passage] = []
    for entry in cast(list[object], value) if isinstance(value, list) else []:
        if not isinstance(entry, dict):
            continue
        hit = cast(JsonObject, entry)
        path, start, end, text = (hit.get(name) for name in ("path", "line_start", "line_end", "text"))
        score = hit.get("score")
        if (
            isinstance(path, str)
            and isinstance(text, str)
            and isinstance(start, int)
            and isinstance(end, int)
        ):
            number = float(score) if isinstance(score, int | float) else 0.0
            found.append(p.Passage(path, start, end, text, number, source))
    return found


def _loads(text: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None  # a result that is no JSON holds no passages; the model reads nothing else


def _next_query(conversation: _Conversation) -> str | None:
    """What to search next, None when it is time to answer.

    First the question itself. Then, having looked at what came back: its bare words when nothing relevant
    did, else its words with those that the best passages add; and once more with the names found there, as
    long as the last search brought anything new.
    """
    question, queries = conversation.question, conversation.queries
    if not question or len(queries) >= SEARCHES_MAX:
        return None
    if not queries:
        return question
    ranked = [passage for passage, _ in p.rank(question, conversation.found)]
    words = p.key_terms(question)
    if len(queries) == 1:
        extra = p.expansion_terms(question, ranked) if ranked else []
        candidate = " ".join([*words, *extra])
    else:
        before = {(x.path, x.line_start) for x in conversation.found if x.source < len(queries) - 1}
        last = {(x.path, x.line_start) for x in conversation.found if x.source == len(queries) - 1}
        if not last - before:
            return None
        names = p.identifiers(question, ranked)
        candidate = " ".join(names)
    candidate = candidate[:QUERY_CHARS_MAX]
    return candidate if candidate and candidate not in queries else None


def _write(conversation: _Conversation, request: CompletionRequest) -> tuple[str, StopReason]:
    chosen = p.select(
        conversation.question,
        [*conversation.given, *conversation.found],
        max_per_file=conversation.max_per_file,
    )
    if not chosen:
        why = NOTHING_FOUND
        if conversation.failures and not conversation.found:
            why = f"The search failed, so nothing can be cited: {conversation.failures[-1][:500]}"
        return _cut(f"{PREAMBLE}\n\n{why}", request)
    # Fewer whole passages rather than a cut one: a quote must stay verbatim to its last line.
    budget = request.output_tokens_max * CHARS_PER_TOKEN
    text = PREAMBLE
    for number, shown in enumerate(chosen, start=1):
        block = f"\n\n{p.render(number, shown)}"
        if len(text) + len(block) > budget and number > 1:
            break
        text += block
    return _cut(text, request)


def _cut(text: str, request: CompletionRequest) -> tuple[str, StopReason]:
    """Honour stop sequences and the output limit like any model."""
    reason: StopReason = "end"
    limit = request.output_tokens_max * CHARS_PER_TOKEN
    if len(text) > limit:
        text, reason = text[:limit], "length"
    stops = [position for stop in request.stop if stop and (position := text.find(stop)) != -1]
    return (text[: min(stops)], "stop_sequence") if stops else (text, reason)
