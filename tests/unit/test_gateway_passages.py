"""Passages and the extractive model: what is chosen, how it is quoted, when it searches or stops."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import InvalidInput, ProviderRejected
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Message,
    StreamEnd,
    TextDelta,
    TextPart,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.gateway.extractive import NOTHING_FOUND, PREAMBLE, ExtractiveProvider, answer
from agentic_flow.gateway.passages import (
    QUOTE_LINES_MAX,
    Passage,
    identifiers,
    rank,
    select,
    stem,
    terms,
    z_scores,
)
from agentic_flow.swarm.citations import parse_claims

QUESTION = "How does the event loop schedule a callback?"
LOOP = """class BaseEventLoop:

    def call_soon(self, callback, *args):
        \"\"\"Schedule the callback to be called by the event loop as soon as possible.\"\"\"
        self._check_closed()
        handle = self._call_soon(callback, args)
        return handle
"""
CSV = "def reader(data):\n    return [row.split(',') for row in data[i:10]]\n"
SEARCH = ToolSpec(
    name="memory_search",
    description="d",
    input_schema={
        "type": "object",
        "properties": {"query": {"type": "string"}, "limit": {"type": "integer", "maximum": 8}},
        "required": ["query"],
    },
    read_only=True,
)
WRITE = SEARCH.model_copy(update={"name": "file_write", "read_only": False})


def user(text: str) -> Message:
    return Message(role="user", parts=(TextPart(text=text),))


def ask(*messages: Message, **more: Any) -> Completion:
    return answer(CompletionRequest(model="extractive", messages=messages, **more))


def hit(path: str, start: int, text: str, score: float = 1.0) -> dict[str, Any]:
    return {
        "path": path,
        "line_start": start,
        "line_end": start + text.count("\n"),
        "text": text,
        "score": score,
    }


def converse(results: list[list[dict[str, Any]]], question: str = QUESTION) -> tuple[list[str], Completion]:
    """Play the loop of an agent with these search results; the queries made and the final answer."""
    messages, queries = [user(question)], list[str]()
    while True:
        completion = ask(*messages, tools=(SEARCH,))
        if not completion.tool_calls:
            return queries, completion
        call = completion.tool_calls[0]
        queries.append(call.arguments["query"])
        assert call.arguments["limit"] == 8
        found = results[min(len(queries), len(results)) - 1]
        content = orjson.dumps({"hits": found}).decode()
        messages += [
            Message(role="assistant", parts=completion.parts),
            Message(role="user", parts=(ToolResultPart(id=call.id, name=call.name, content=content),)),
        ]


@pytest.mark.parametrize(
    "family",
    [
        ("cancel", "cancels", "cancelled", "cancelling"),
        ("schedule", "schedules", "scheduled", "scheduling"),
        ("query", "queries"),
        ("callback", "callbacks"),
    ],
)
def test_stems_bring_forms_together(family: tuple[str, ...]) -> None:
    """Catches a question in one form missing the code that uses another."""
    assert len({stem(word) for word in family}) == 1


def test_identifiers_are_split_and_stop_words_dropped() -> None:
    """Catches `call_soonThreadsafe` and `HTTPServer` matching nothing but themselves."""
    assert terms("call_soonThreadsafe HTTPServer") == [
        *map(stem, ("call", "soon", "threadsafe", "http", "server"))
    ]
    assert terms("what is the of and") == []


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1000).map(float), max_size=8))
def test_z_scores_are_centred_and_keep_the_order(values: list[float]) -> None:
    """Catches one search's scale deciding over another's."""
    normal = z_scores(values)
    assert len(normal) == len(values)
    assert abs(sum(normal)) < 1e-4 * (len(normal) or 1)
    if any(normal):
        assert sorted(range(len(values)), key=values.__getitem__) == sorted(
            range(len(values)), key=normal.__getitem__
        )


words = st.sampled_from(
    ["event", "loop", "callback", "schedule", "row", "data", "x = 1", "", "    ", "[i:10]"]
)
passage_lists = st.lists(
    st.builds(
        lambda path, start, text, score: Passage(path, start, start + len(text) - 1, "\n".join(text), score),
        st.sampled_from(["a.py", "b.py", "c/d.md"]),
        st.integers(1, 30),
        st.lists(st.lists(words, max_size=4).map(" ".join), min_size=1, max_size=30),
        st.floats(-5, 5),
    ),
    max_size=8,
)


def consistent(passages: list[Passage]) -> list[Passage]:
    """Passages as one real set of files would give them: a line has one text."""
    text: dict[tuple[str, int], str] = {}
    fixed: list[Passage] = []
    for passage in passages:
        lines = [
            text.setdefault((passage.path, passage.line_start + i), line)
            for i, line in enumerate(passage.text.split("\n"))
        ]
        fixed.append(
            Passage(passage.path, passage.line_start, passage.line_end, "\n".join(lines), passage.score)
        )
    return fixed


@settings(deadline=None)
@given(passage_lists)
def test_excerpts_are_verbatim_bounded_and_apart(passages: list[Passage]) -> None:
    """Catches quotes that differ from the file, ranges that lie, overlaps, and one file taking over."""
    passages = consistent(passages)
    files = {(p.path, p.line_start + i): line for p in passages for i, line in enumerate(p.text.split("\n"))}
    chosen = select(QUESTION, passages)
    for shown in chosen:
        assert 1 <= len(shown.lines) == shown.line_end - shown.line_start + 1 <= QUOTE_LINES_MAX
        assert list(shown.lines) == [
            files[shown.path, n] for n in range(shown.line_start, shown.line_end + 1)
        ]
        assert shown.lead in "\n".join(shown.lines)
    ranges = [(s.path, n) for s in chosen for n in range(s.line_start, s.line_end + 1)]
    assert len(ranges) == len(set(ranges))
    assert all(sum(s.path == path for s in chosen) <= 3 for path in ("a.py", "b.py", "c/d.md"))


@settings(deadline=None)
@given(passage_lists)
def test_every_citation_is_read_back_by_the_reviewer(passages: list[Passage]) -> None:
    """Catches an answer whose citations downstream reads differently than they were written."""
    passages = consistent(passages)
    block = orjson.dumps([hit(p.path, p.line_start, p.text, p.score) for p in passages]).decode()
    text = ask(user(f"{QUESTION}\n<passages>{block}</passages>")).text
    chosen = [(s.path, s.line_start, s.line_end) for s in select(QUESTION, passages)]
    read = [(c.path, c.line_start, c.line_end) for claim in parse_claims(text) for c in claim.citations]
    assert read == chosen
    assert text.splitlines()[0] == PREAMBLE


def test_the_quote_starts_where_the_definition_does() -> None:
    """Catches a window that shows the tail of one function and the head of another."""
    text = ask(
        user(f"{QUESTION}<passages>{orjson.dumps([hit('loop.py', 101, LOOP)]).decode()}</passages>")
    ).text
    assert "[loop.py:103-107]" in text or "[loop.py:101-107]" in text
    assert "    def call_soon" in text
    assert re.search(r"^1\. \S", text, re.MULTILINE)


def test_files_take_turns_and_copies_are_dropped() -> None:
    """Catches ten citations of one file, and the same text cited from two places."""
    many = [
        Passage("one.py", n * 40 + 1, n * 40 + 1, f"event loop schedule {n} {'abcdef'[n] * 4}", 9.0)
        for n in range(6)
    ]
    assert len(select(QUESTION, many)) == 3
    assert len(select(QUESTION, many, max_per_file=5)) == 5
    copies = [Passage(f"copy{n}/loop.py", 1, 7, LOOP, 1.0) for n in range(3)]
    assert [shown.path for shown in select(QUESTION, copies)] == ["copy0/loop.py"]


def test_neighbouring_ranges_merge() -> None:
    """Catches one place cited twice in two halves."""
    first = Passage("a.py", 1, 2, "def schedule(loop):\n    loop.callback()", 2.0)
    second = Passage("a.py", 3, 4, "    event = loop.event()\n    return event", 1.0)
    assert [shown.label for shown in select(QUESTION, [first, second])] == ["a.py:1-4"]


def test_scores_of_the_search_and_words_both_count() -> None:
    """Catches a ranking that ignores one of its two judges."""
    same = "the event loop will schedule a callback {}"
    by_score = [Passage(f"{n}.py", 1, 1, same.format(n), float(n)) for n in range(4)]
    assert rank(QUESTION, by_score)[0][0].path == "3.py"
    by_words = [Passage("weak.py", 1, 1, "event loop here", 1.0), Passage("strong.py", 1, 1, LOOP, 1.0)]
    assert rank(QUESTION, by_words)[0][0].path == "strong.py"


def test_identifiers_come_from_what_was_found() -> None:
    """Catches follow-up queries made of names that have nothing to do with the question."""
    assert identifiers(QUESTION, [Passage("a", 1, 7, LOOP)]) == ["BaseEventLoop"]


# The loop


def test_it_searches_looks_and_searches_again() -> None:
    """Catches a model that asks once and answers whatever came, or that repeats one query for ever."""
    other = "def run_callback_soon(loop):\n    # the loop runs each scheduled callback\n    pass"
    queries, completion = converse(
        [
            [hit("loop.py", 101, LOOP, 2.0), hit("csv.py", 1, CSV, 1.0)],
            [hit("loop.py", 101, LOOP), hit("other.py", 5, other)],
            [hit("loop.py", 101, LOOP)],
        ]
    )
    assert queries[0] == QUESTION
    assert len(queries) == 3
    assert len(set(queries)) == 3
    assert "BaseEventLoop" in queries[2] or "run_callback_soon" in queries[2]
    assert "[loop.py:" in completion.text
    assert "[other.py:5-7]" in completion.text
    assert "csv.py" not in completion.text
    assert completion.text.index("loop.py") < completion.text.index("other.py")
    assert completion.usage.cost_usd == 0.0


def test_it_stops_when_a_search_brings_nothing_new() -> None:
    """Catches searches made for their own sake."""
    queries, _ = converse([[hit("loop.py", 101, LOOP)]])
    assert len(queries) == 2


def test_nothing_relevant_is_said_and_nothing_cited() -> None:
    """Catches passages cited because they were the best of a bad lot."""
    queries, completion = converse([[hit("csv.py", 1, CSV)]], "How do volcanoes erupt under glaciers?")
    assert NOTHING_FOUND in completion.text
    assert "[" not in completion.text
    assert len(queries) == 2, "the bare words are tried before giving up"


def test_a_failed_search_is_reported() -> None:
    """Catches a broken tool that looks like an empty library."""
    first = ask(user(QUESTION), tools=(SEARCH,))
    failed = ToolResultPart(
        id=first.tool_calls[0].id, name="memory_search", content="the index is gone", is_error=True
    )
    turns = [
        user(QUESTION),
        Message(role="assistant", parts=first.parts),
        Message(role="user", parts=(failed,)),
    ]
    assert "the index is gone" in ask(*turns, tools=(SEARCH,), tool_choice="none").text


def test_follow_up_questions_start_afresh() -> None:
    """Catches the evidence of an earlier question answering a later one."""
    _, completion = converse([[hit("loop.py", 101, LOOP)]])
    later = [
        user(QUESTION),
        Message(role="assistant", parts=completion.parts),
        user("How are rows of a csv split?"),
    ]
    asked = ask(*later, tools=(SEARCH,))
    assert asked.tool_calls[0].arguments["query"] == "How are rows of a csv split?"
    assert NOTHING_FOUND in ask(*later).text


def test_only_search_tools_are_called() -> None:
    """Catches a tool that changes something being called because it takes a `query`."""
    assert not ask(user(QUESTION), tools=(WRITE,)).tool_calls
    other = SEARCH.model_copy(update={"name": "docs_search"})
    assert ask(user(QUESTION), tools=(WRITE, other)).tool_calls[0].name == "docs_search"
    assert ask(user(QUESTION), tools=(other, SEARCH)).tool_calls[0].name == "memory_search"
    with pytest.raises(ProviderRejected):
        ask(user(QUESTION), tools=(WRITE,), tool_choice="required")
    with pytest.raises(ProviderRejected):
        ask(user(QUESTION), tools=(WRITE,), tool_choice="file_write")
    with pytest.raises(InvalidInput):
        ask(user(QUESTION), tools=(WRITE,), tool_choice="missing")
    with pytest.raises(ProviderRejected, match="schema"):
        ask(user(QUESTION), output_schema={"type": "object"})


def test_limits_are_honoured() -> None:
    """Catches an answer longer than allowed, a quote cut in two, and ignored stop sequences."""
    block = orjson.dumps(
        [hit(f"{n}.py", 1, LOOP.replace("soon", f"name{n} other{n} more{n}")) for n in range(5)]
    )
    question = user(f'{QUESTION}<passages max_per_file="5">{block.decode()}</passages>')
    whole = ask(question)
    short = ask(question, output_tokens_max=150)
    assert short.stop_reason == "end"
    assert len(short.text) <= 600 < len(whole.text)
    assert whole.text.startswith(short.text)
    assert ask(question, output_tokens_max=5).stop_reason == "length"
    stopped = ask(question, stop=("nothing",))
    assert (stopped.text, stopped.stop_reason) == (PREAMBLE[: PREAMBLE.index("nothing")], "stop_sequence")


def test_streaming_is_the_same_answer() -> None:
    """Catches a stream of the keyless model that differs from its whole answer."""
    block = orjson.dumps([hit("loop.py", 101, LOOP)]).decode()
    request = CompletionRequest(
        model="extractive", messages=(user(f"{QUESTION}<passages>{block}</passages>"),)
    )

    async def collect() -> list[Any]:
        stream = ExtractiveProvider().stream(request, deadline=Deadline.after(5))
        return [event async for event in stream]

    events = asyncio.run(collect())
    assert isinstance(events[-1], StreamEnd)
    assert events[-1].completion == answer(request)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answer(request).text
