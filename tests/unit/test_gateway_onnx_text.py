"""The reader of a local model's text: stop sequences and tool calls, whatever the pieces are cut into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import ProviderProtocol, ProviderRejected
from agentic_flow.core.messages import CompletionRequest, TextDelta, TextPart, ToolCallDelta, ToolSpec
from agentic_flow.gateway.onnx_text import AnswerReader

TOOL = ToolSpec(name="look_up", description="Looks up.", input_schema={"type": "object"})
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"q": "a"}}\n</tool_call>'


def request(**more: Any) -> CompletionRequest:
    return CompletionRequest(model="m", messages=(), **more)


def read(pieces: Sequence[str], asked: CompletionRequest) -> tuple[str, list[Any], str]:
    """Text, calls and stop reason; the deltas must add up to the parts."""
    reader = AnswerReader(asked, call_ids="c")
    events = []
    for piece in pieces:
        events += reader.feed(piece)
        if reader.stopped:
            break
    rest, reason = reader.finish("end")
    events += rest
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert text == "".join(part.text for part in reader.parts if isinstance(part, TextPart))
    return text, [(call.name, orjson.loads(call.arguments_json)) for call in calls], reason


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_sequence_is_met_where_the_text_first_completes_one(
    pieces: list[str], stops: list[str]
) -> None:
    """Catches a stop sequence missed because it was cut in two, and text behind it that is given."""
    whole = "".join(pieces)
    expected, reason = whole, "end"
    for end in range(1, len(whole) + 1):
        met = [stop for stop in stops if whole[:end].endswith(stop)]
        if met:
            expected, reason = whole[: end - len(max(met, key=len))], "stop_sequence"
            break
    assert read(pieces, request(stop=tuple(stops))) == (expected, [], reason)


@given(st.lists(st.integers(1, 120), max_size=6), st.booleans())
def test_calls_are_read_whatever_the_pieces(cuts: list[int], newline: bool) -> None:
    """Catches a mark of a call that is shown as text, or a call lost, because of where pieces end."""
    whole = "Let me <look>." + CALL + ("\n" if newline else "") + CALL.replace('"a"', '"<b>\\n"') + "\n"
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in itertools.pairwise(places)]
    text, calls, reason = read(pieces, request(tools=(TOOL,)))
    assert (text, reason) == ("Let me <look>.", "tool_calls")
    assert calls == [("look_up", {"q": "a"}), ("look_up", {"q": "<b>\n"})]


def test_one_call_at_a_time_ends_the_answer() -> None:
    """Catches a second call although the caller takes one."""
    _, calls, reason = read([CALL + CALL], request(tools=(TOOL,), parallel_tool_calls=False))
    assert (len(calls), reason) == (1, "tool_calls")


def test_without_tools_marks_are_text() -> None:
    """Catches a call made up from text where no tools were offered, or tools were forbidden."""
    assert read([CALL], request()) == (CALL, [], "end")
    assert read([CALL], request(tools=(TOOL,), tool_choice="none")) == (CALL, [], "end")


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"arguments": {}}', '{"name": 3}', '{"name": "x", "arguments": 7}']
)
def test_a_call_that_is_no_call_is_an_error(body: str) -> None:
    """Catches a malformed call that passes for text or for a call without arguments."""
    with pytest.raises(ProviderProtocol):
        read([f"<tool_call>{body}</tool_call>"], request(tools=(TOOL,)))


def test_an_answer_that_ends_within_a_call_is_an_error() -> None:
    """Catches half of a call that passes for a finished answer, and a cut that is blamed on the model."""
    for reason, kind in (("end", ProviderProtocol), ("length", ProviderRejected)):
        reader = AnswerReader(request(tools=(TOOL,)), call_ids="c")
        reader.feed('<tool_call>{"name": "lo')
        with pytest.raises(kind):
            reader.finish(reason)  # type: ignore[arg-type]
