"""What every `Completer` must do, whichever provider answers and whether it is near or remote.

A test module gives each case a `CompleterCase`; `run_all` runs every check that applies. Another
implementation imports this module and does the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, DeadlineExceeded, UnknownModel
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Message,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ToolCallDelta,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.core.ports import Completer
from agentic_flow.testing.fake_provider import Reply

TIMEOUT_S = 20.0
SEARCH = ToolSpec(
    name="memory_search",
    description="Search the memory.",
    input_schema={
        "type": "object",
        "properties": {"query": {"type": "string"}, "limit": {"type": "integer", "maximum": 50}},
        "required": ["query"],
    },
    read_only=True,
)
READ = ToolSpec(
    name="file_read",
    description="Read a file.",
    input_schema={"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    read_only=True,
)
HIT = (
    '{"hits": [{"path": "loop.py", "line_start": 10, "line_end": 12, "score": 1.5, '
    '"text": "def call_soon(self, callback):\\n    # schedule the callback\\n    self._ready.append(cb)"'
    "}]}"
)


@dataclass(frozen=True)
class CompleterCase:
    """One implementation under test.

    Args:
        completer: It.
        model: A model that it serves.
        play: Sets the next replies of the provider behind it; None for a model without a script.
        stream: Ask `complete` for the provider's streaming format.
    """

    completer: Completer
    model: str
    play: Callable[[list[Reply]], None] | None = None
    stream: bool = False
    checked: list[str] = field(default_factory=list[str])

    def request(self, *messages: Message, **more: Any) -> CompletionRequest:
        return CompletionRequest(model=self.model, messages=messages, stream=self.stream, **more)

    async def complete(self, request: CompletionRequest, timeout_s: float = TIMEOUT_S) -> Completion:
        return await self.completer.complete(
            request, principal=LOCAL_OWNER, deadline=Deadline.after(timeout_s)
        )

    async def events(self, request: CompletionRequest, timeout_s: float = TIMEOUT_S) -> list[StreamEvent]:
        stream = self.completer.stream(request, principal=LOCAL_OWNER, deadline=Deadline.after(timeout_s))
        async with aclosing(cast(AsyncGenerator[StreamEvent], stream)) as reading:
            return [event async for event in cast(AsyncIterator[StreamEvent], reading)]


def user(text: str) -> Message:
    return Message(role="user", parts=(TextPart(text=text),))


async def run_all(case: CompleterCase) -> list[str]:
    """Every check that applies to this case; the names of those that ran."""
    for check in (*ALWAYS, *(SCRIPTED if case.play else ())):
        await check(case)
        case.checked.append(check.__name__)
    return case.checked


async def lists_its_model(case: CompleterCase) -> None:
    """Catches a completer that answers for a model which its own list does not show."""
    listed = await case.completer.models(principal=LOCAL_OWNER)
    assert case.model.rpartition(":")[2] in {info.id for info in listed}, listed


async def resolves_its_model(case: CompleterCase) -> None:
    """Catches a resolved name that cannot be asked for, and a default that is not the resolved one."""
    info = await case.completer.resolve(case.model, principal=LOCAL_OWNER)
    assert info.id.rpartition(":")[2] == case.model.rpartition(":")[2]
    assert await case.completer.resolve(info.id, principal=LOCAL_OWNER) == info


async def refuses_unknown_models(case: CompleterCase) -> None:
    """Catches silent fallback to some other model, whole and streamed, and an error without a remedy."""
    request = case.request(user("hello")).model_copy(update={"model": "no-such-model-anywhere"})
    for call in (case.complete, case.events):
        error = await _error_of(call, request)
        assert isinstance(error, UnknownModel), error
        assert "no-such-model-anywhere" in error.message
        assert error.hint


async def respects_a_spent_deadline(case: CompleterCase) -> None:
    """Catches a call that is made although nobody waits for it any more."""
    request = case.request(user("hello"))
    assert isinstance(await _error_of(case.complete, request, 0.0), DeadlineExceeded)
    assert isinstance(await _error_of(case.events, request, 0.0), DeadlineExceeded)


async def a_stream_says_what_complete_says(case: CompleterCase) -> None:
    """Catches deltas that do not add up to the answer, and a stream without its end."""
    question = user("How does call_soon schedule a callback?")
    if case.play:
        case.play([Reply.text("Ünïcode 🎻 and\nlines"), Reply.text("Ünïcode 🎻 and\nlines")])
    completion = await case.complete(case.request(question))
    events = await case.events(case.request(question))
    assert isinstance(events[-1], StreamEnd)
    assert sum(isinstance(event, StreamEnd) for event in events) == 1
    final = events[-1].completion
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == final.text
    assert final.parts == completion.parts
    assert final.usage == completion.usage
    assert completion.text
    assert completion.stop_reason == "end"
    assert completion.provider
    assert completion.usage.input_tokens > 0
    assert completion.usage.output_tokens > 0


async def tool_calls_round_trip(case: CompleterCase) -> None:
    """Catches a tool call lost or changed on the way, and results that the next turn refuses."""
    question = user("How does call_soon schedule a callback?")
    if case.play:
        first = Reply.tool_calls([{"name": "memory_search", "arguments": {"query": "call_soon"}}])
        case.play([first, first, Reply.text("It appends. [loop.py:10-12]")])
    asked = case.request(question, tools=(SEARCH,))
    completion = await case.complete(asked)
    assert completion.stop_reason == "tool_calls"
    assert [call.name for call in completion.tool_calls] == ["memory_search"]
    events = await case.events(asked)
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert deltas[0].id
    assert deltas[0].name == "memory_search"
    end = events[-1]
    assert isinstance(end, StreamEnd)
    assert [c.arguments for c in end.completion.tool_calls] == [c.arguments for c in completion.tool_calls]
    turns = [question]
    for _ in range(5):
        results = tuple(
            ToolResultPart(id=call.id, name=call.name, content=HIT) for call in completion.tool_calls
        )
        turns += [
            Message(role="assistant", parts=completion.parts),
            Message(role="user", parts=results),
        ]
        completion = await case.complete(case.request(*turns, tools=(SEARCH,)))
        if completion.stop_reason == "end":
            break
    assert completion.stop_reason == "end"
    assert "[loop.py:10-12]" in completion.text


async def honours_tool_choice_none(case: CompleterCase) -> None:
    """Catches a tool call where the caller forbade one."""
    if case.play:
        case.play([Reply.text("no tools used")])
    completion = await case.complete(case.request(user("hello"), tools=(SEARCH,), tool_choice="none"))
    assert not completion.tool_calls
    assert completion.text


async def parallel_tool_calls_keep_their_arguments(case: CompleterCase) -> None:
    """Catches arguments mixed up between calls that arrive in many pieces."""
    assert case.play
    calls = [
        {"name": "memory_search", "arguments": {"query": 'quote " backslash \\ newline \n end', "limit": 5}},
        {"name": "file_read", "arguments": {"path": "a/ü.py"}},
        {"name": "memory_search", "arguments": {"query": ""}},
    ]
    reply = Reply.tool_calls(calls, body_text="Let me look.", chunk_chars=3)
    case.play([reply, reply])
    request = case.request(user("look"), tools=(SEARCH, READ))
    completion = await case.complete(request)
    events = await case.events(request)
    expected = [(call["name"], call["arguments"]) for call in calls]
    assert [(call.name, call.arguments) for call in completion.tool_calls] == expected
    assert completion.text == "Let me look."
    assert len({call.id for call in completion.tool_calls}) == 3
    written: dict[int, str] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            written[event.index] = written.get(event.index, "") + event.arguments_json
    assert [orjson.loads(text or "{}") for _, text in sorted(written.items())] == [
        arguments for _, arguments in expected
    ]


async def a_whole_conversation_is_accepted(case: CompleterCase) -> None:
    """Catches encodings that the vendor refuses: systems, several results, errors, text beside results."""
    assert case.play
    calls = (
        ToolCallPart(id="call_a", name="memory_search", arguments={"query": "x"}),
        ToolCallPart(id="call_b", name="file_read", arguments={"path": "x"}),
    )
    case.play([Reply.text("fine")])
    completion = await case.complete(
        case.request(
            Message(role="system", parts=(TextPart(text="Be brief."),)),
            user("first"),
            Message(role="assistant", parts=(TextPart(text="looking"), *calls)),
            Message(
                role="user",
                parts=(
                    TextPart(text="and note this"),
                    ToolResultPart(id="call_b", name="file_read", content="no such file", is_error=True),
                    ToolResultPart(id="call_a", name="memory_search", content=HIT),
                ),
            ),
            Message(role="assistant", parts=(TextPart(text="interim"),)),
            user("second"),
            tools=(SEARCH, READ),
            temperature=0.1,
            stop=("END",),
        )
    )
    assert completion.text == "fine"


async def usage_is_what_was_billed(case: CompleterCase) -> None:
    """Catches cached or reasoning tokens dropped or counted twice."""
    assert case.play
    reply = Reply.text(
        "x",
        input_tokens=100,
        output_tokens=50,
        cache_read_tokens=60,
        cache_write_tokens=10,
        reasoning_tokens=20,
    )
    case.play([reply])
    usage = (await case.complete(case.request(user("hello")))).usage
    assert (usage.input_tokens, usage.output_tokens) == (100, 50)
    assert (usage.cache_read_tokens, usage.cache_write_tokens, usage.reasoning_tokens) == (60, 10, 20)


async def structured_output_is_json(case: CompleterCase) -> None:
    """Catches a structured answer that comes as a tool call, or that is not what was asked for."""
    assert case.play
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    case.play([Reply.text('{"n": 4}')])
    completion = await case.complete(case.request(user("2+2"), output_schema=schema))
    assert orjson.loads(completion.text) == {"n": 4}
    assert not completion.tool_calls
    assert completion.stop_reason == "end"


async def stop_reasons_are_told_apart(case: CompleterCase) -> None:
    """Catches an answer that was cut or refused and passes for complete."""
    assert case.play
    for reason in ("length", "refusal"):
        case.play([Reply.text("partial", stop_reason=reason)])
        assert (await case.complete(case.request(user("hello")))).stop_reason == reason


ALWAYS = (
    lists_its_model,
    resolves_its_model,
    refuses_unknown_models,
    respects_a_spent_deadline,
    a_stream_says_what_complete_says,
    tool_calls_round_trip,
    honours_tool_choice_none,
)
SCRIPTED = (
    parallel_tool_calls_keep_their_arguments,
    a_whole_conversation_is_accepted,
    usage_is_what_was_billed,
    structured_output_is_json,
    stop_reasons_are_told_apart,
)


async def _error_of(call: Callable[..., Any], *arguments: Any) -> AgenticFlowError | None:
    try:
        await call(*arguments)
    except AgenticFlowError as error:
        return error
    return None
