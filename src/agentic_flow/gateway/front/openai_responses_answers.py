"""OpenAI Responses as a server writes it: answers, events and errors out.

Thinking is shown as the summary of a reasoning item, and its signature in `encrypted_content`, whether or not
the caller asked to include it: nothing is stored here, so that is the only way for it to come back.

In a stream the signature is known at the end only. A reasoning item's text is closed when it is complete, and
the item itself (`response.output_item.done`) at the end of the answer, with everything that belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agentic_flow.core.errors import AgenticFlowError, ProviderProtocol
from agentic_flow.core.messages import (
    Completion,
    JsonObject,
    StopReason,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    ToolCallDelta,
    ToolCallPart,
    Usage,
)
from agentic_flow.gateway.front.errors import openai_error
from agentic_flow.gateway.front.openai_responses import SIGNED

_CUT: dict[StopReason, str] = {"length": "max_output_tokens", "refusal": "content_filter"}
"""Why an answer is incomplete; any other reason completes it."""

_ECHO_DEFAULT: JsonObject = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
_FAILURES = frozenset({"rate_limit_exceeded"})
"""Codes of errors that a failed response may carry besides `server_error`."""


def encode_response(
    completion: Completion, *, answer_id: str, created_s: int, echo: Mapping[str, object] | None = None
) -> bytes:
    """A whole answer.

    Args:
        completion: What the model said.
        answer_id: Id of the response; ids of its items are made of it.
        created_s: Unix time.
        echo: What the answer repeats of the request (`Call.echo`).
    """
    items: list[_Item] = []
    told = [_logprob(entry) for entry in completion.logprobs]
    for part in completion.parts:
        match part:
            case TextPart():
                if items and items[-1].kind == "message":
                    items[-1].pieces.append(part.text)
                else:
                    items.append(_Item("message", len(items), answer_id, pieces=[part.text]))
                    # All of them: who tells probabilities of tokens writes one text.
                    items[-1].logprobs += told
                    told = []
            case ThinkingPart():
                pieces = [part.text] if part.text else []
                items.append(_Item("reasoning", len(items), answer_id, pieces=pieces, thoughts=[part]))
            case ToolCallPart():
                text = orjson.dumps(part.arguments).decode()
                items.append(
                    _Item(
                        "function_call", len(items), answer_id, pieces=[text], call_id=part.id, name=part.name
                    )
                )
            case _:
                raise ProviderProtocol(f"an answer cannot hold a part of kind {part.kind!r}")
    head = _head(answer_id, created_s, echo)
    return orjson.dumps(_ended(head, completion, items))


def encode_usage(usage: Usage) -> JsonObject:
    """The usage object."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _head(answer_id: str, created_s: int, echo: Mapping[str, object] | None) -> JsonObject:
    """A response without what changes while it is written."""
    return {
        "id": answer_id,
        "object": "response",
        "created_at": created_s,
        "background": False,
        "error": None,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        **_ECHO_DEFAULT,
        **(echo or {}),
    }


def _ended(head: JsonObject, completion: Completion, items: Sequence[_Item]) -> JsonObject:
    cut = _CUT.get(completion.stop_reason)
    # Thinking that nobody was shown stands at the end of a stream, wherever it was.
    shown = [item for item in items if item.pieces or item.kind != "reasoning"]
    if cut is not None and shown and shown[-1].kind == "message":
        shown[-1].status = "incomplete"
    return {
        **head,
        "model": completion.model,
        "status": "completed" if cut is None else "incomplete",
        "incomplete_details": None if cut is None else {"reason": cut},
        "output": [item.encoded() for item in items],
        "usage": encode_usage(completion.usage),
    }


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass(slots=True)
class _Item:
    """One output item, whole or in the making."""

    kind: str
    index: int
    answer_id: str
    pieces: list[str] = field(default_factory=list[str])
    thoughts: list[ThinkingPart] = field(default_factory=list[ThinkingPart])
    logprobs: list[JsonObject] = field(default_factory=list[JsonObject])
    call_id: str = ""
    name: str = ""
    status: str = "completed"
    written: bool = False
    """Whether the end of a call's arguments was sent."""
    closed: bool = False
    """Whether its end was sent."""

    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{self.answer_id.removeprefix('resp_')}_{self.index}"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def begun(self) -> JsonObject:
        """The item as it is announced, without its content."""
        shown: JsonObject = {"id": self.id, "type": self.kind, "status": "in_progress"}
        match self.kind:
            case "message":
                return {**shown, "role": "assistant", "content": []}
            case "reasoning":
                return {**shown, "summary": []}
            case _:
                return {**shown, "call_id": self.call_id, "name": self.name, "arguments": ""}

    def encoded(self) -> JsonObject:
        """The whole item."""
        shown: JsonObject = {"id": self.id, "type": self.kind, "status": self.status}
        match self.kind:
            case "message":
                return {**shown, "role": "assistant", "content": [_output_text(self.text, self.logprobs)]}
            case "reasoning":
                summary = [_summary_text(self.text)] if self.pieces else []
                return {**shown, "summary": summary, "encrypted_content": _sealed(self.thoughts)}
            case _:
                arguments = self.text.strip() or "{}"
                return {**shown, "call_id": self.call_id, "name": self.name, "arguments": arguments}

    def whole(self) -> bool:
        """Whether the arguments of a call are complete."""
        try:
            orjson.loads(self.text)
        except orjson.JSONDecodeError:
            return False
        return True


def _sealed(thoughts: Sequence[ThinkingPart]) -> str | None:
    """The signatures of an item's thinking, in the form in which `openai_responses` reads them back."""
    if not any(thought.signature for thought in thoughts):
        return None
    if len(thoughts) == 1:
        return f"{SIGNED}{thoughts[0].signature}"
    return SIGNED + orjson.dumps([[thought.text, thought.signature] for thought in thoughts]).decode()


def _output_text(text: str, logprobs: Sequence[JsonObject] = ()) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprob(entry: TokenLogprob) -> JsonObject:
    """A token and its alternatives. Bytes are not left open in this format."""
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": _bytes_of(entry),
        "top_logprobs": [
            {"token": other.token, "logprob": other.logprob, "bytes": _bytes_of(other)} for other in entry.top
        ],
    }


def _bytes_of(entry: TokenLogprob) -> Sequence[int]:
    return list(entry.token.encode()) if entry.utf8 is None else entry.utf8


def _summary_text(text: str) -> JsonObject:
    return {"type": "summary_text", "text": text}


class ResponseStream:
    """Encodes the events of one answer, numbered and in the vendor's order.

    Calls whose pieces come interleaved are open at the same time; every event names its item.

    Args:
        model: The model's name at the start; the end names the one that served.
        answer_id: Id of the response.
        created_s: Unix time.
        echo: What the answer repeats of the request (`Call.echo`).
    """

    def __init__(
        self, model: str, *, answer_id: str, created_s: int, echo: Mapping[str, object] | None = None
    ) -> None:
        self._model = model
        self._head = _head(answer_id, created_s, echo)
        self._answer_id = answer_id
        self._number = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None  # the message or the thinking that is being written
        self._calls: dict[int, _Item] = {}

    def take(self, event: StreamEvent) -> bytes:
        """The events of one event of ours.

        Raises:
            ProviderProtocol: a piece belongs to no open tool call.
        """
        begin = b"" if self._number else self._start()
        match event:
            case TextDelta():
                return begin + self._piece("message", event.text, event.logprobs)
            case ThinkingDelta():
                return begin + self._piece("reasoning", event.text)
            case ToolCallDelta():
                return begin + self._call(event)
            case StreamEnd():
                return begin + self._end(event.completion)

    def fail(self, error: AgenticFlowError) -> bytes:
        """The end of a stream that broke: the failed response, where one had begun, and the error."""
        if not self._number:
            return error_event(error)
        shown = openai_error(error)["error"]
        code = shown.get("code")
        failure = {
            "code": code if code in _FAILURES else "server_error",
            "message": str(shown.get("message")),
        }
        output = [item.encoded() for item in self._items if item.closed]
        response = self._response("failed", output=output) | {"error": failure}
        failed = self._event("response.failed", {"response": response})
        return failed + error_event(error, sequence_number=self._number)

    # The response as a whole

    def _response(self, status: str, *, output: Sequence[JsonObject] = ()) -> JsonObject:
        return {
            **self._head,
            "model": self._model,
            "status": status,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }

    def _start(self) -> bytes:
        response = self._response("in_progress")
        created = self._event("response.created", {"response": response})
        return created + self._event("response.in_progress", {"response": response})

    def _end(self, completion: Completion) -> bytes:
        sent = [self._close_open()]
        sent += [self._close_call(call) for call in self._calls.values() if not call.written]
        sent.append(self._sign(completion))
        ended = _ended(self._head, completion, self._items)
        sent += [self._done(item) for item in self._items if not item.closed]
        sent.append(self._event(f"response.{ended['status']}", {"response": ended}))
        return b"".join(sent)

    def _sign(self, completion: Completion) -> bytes:
        """Give the thinking its signatures; what no item showed gets one of its own."""
        items = [item for item in self._items if item.kind == "reasoning"]
        thoughts = [part for part in completion.parts if isinstance(part, ThinkingPart)]
        added = b""
        if not items and any(thought.signature for thought in thoughts):
            item, added = self._add("reasoning")
            items = [item]
        at = 0
        for thought in thoughts:
            # Blocks that follow one another were shown as one item.
            written = sum(len(known.text) for known in items[at].thoughts) if items else 0
            if thought.text and at + 1 < len(items) and written >= len(items[at].text):
                at += 1
            if items:
                items[at].thoughts.append(thought)
        return added

    # Items

    def _add(self, kind: str, **about: Any) -> tuple[_Item, bytes]:
        item = _Item(kind, len(self._items), self._answer_id, **about)
        self._items.append(item)
        return item, self._event(
            "response.output_item.added", {"output_index": item.index, "item": item.begun()}
        )

    def _done(self, item: _Item) -> bytes:
        item.closed = True
        return self._event("response.output_item.done", {"output_index": item.index, "item": item.encoded()})

    def _at(self, item: _Item, **more: object) -> JsonObject:
        return {"item_id": item.id, "output_index": item.index, **more}

    def _piece(self, kind: str, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        opening = b""
        item = self._open
        if item is None or item.kind != kind:
            opening = self._finish_open() + self._finish_calls()
            item, added = self._add(kind)
            self._open = item
            opening += added
            if kind == "message":
                at = self._at(item, content_index=0, part=_output_text(""))
                opening += self._event("response.content_part.added", at)
            else:
                at = self._at(item, summary_index=0, part=_summary_text(""))
                opening += self._event("response.reasoning_summary_part.added", at)
        item.pieces.append(text)
        if kind == "message":
            told = [_logprob(entry) for entry in logprobs]
            item.logprobs += told
            return opening + self._text_delta(item.id, item.index, text, told)
        at = self._at(item, summary_index=0, delta=text)
        return opening + self._event("response.reasoning_summary_text.delta", at)

    def _text_delta(self, item_id: str, output_index: int, text: str, told: Sequence[JsonObject]) -> bytes:
        # Nearly all events of a stream are of this kind, so it is written in one go.
        number, self._number = self._number, self._number + 1
        return b"event: response.output_text.delta\ndata: %b\n\n" % orjson.dumps(
            {
                "type": "response.output_text.delta",
                "sequence_number": number,
                "item_id": item_id,
                "output_index": output_index,
                "content_index": 0,
                "delta": text,
                "logprobs": told,
            }
        )

    def _close_open(self) -> bytes:
        """End the message or the thinking that is being written."""
        item, self._open = self._open, None
        if item is None:
            return b""
        text = item.text
        if item.kind == "reasoning":
            done = self._at(item, summary_index=0, text=text)
            part = self._at(item, summary_index=0, part=_summary_text(text))
            return self._event("response.reasoning_summary_text.done", done) + self._event(
                "response.reasoning_summary_part.done", part
            )
        done = self._at(item, content_index=0, text=text, logprobs=item.logprobs)
        part = self._at(item, content_index=0, part=_output_text(text, item.logprobs))
        return self._event("response.output_text.done", done) + self._event(
            "response.content_part.done", part
        )

    def _finish_open(self) -> bytes:
        """The same, and the item with it, unless its signature is still to come."""
        item = self._open
        sent = self._close_open()
        return sent if item is None or item.kind == "reasoning" else sent + self._done(item)

    # Tool calls

    def _call(self, event: ToolCallDelta) -> bytes:
        call = self._calls.get(event.index)
        if call is not None:
            return self._argument(call, event.arguments_json)
        if event.id is None or event.name is None:
            raise ProviderProtocol(
                "a piece of a tool call came before its name", hint="the call can be repeated"
            )
        opening = self._finish_open() + self._finish_calls()
        call, added = self._add("function_call", call_id=event.id, name=event.name)
        self._calls[event.index] = call
        return opening + added + self._argument(call, event.arguments_json)

    def _argument(self, call: _Item, text: str) -> bytes:
        if not text or (call.written and not text.strip()):
            return b""
        if call.written:
            raise ProviderProtocol(
                "a piece of a tool call came after its end", hint="the call can be repeated"
            )
        call.pieces.append(text)
        return self._event("response.function_call_arguments.delta", self._at(call, delta=text))

    def _close_call(self, call: _Item) -> bytes:
        # Clients parse the arguments of every call, and nothing at all is no JSON.
        filled = b"" if call.text.strip() else self._argument(call, "{}")
        call.written = True
        done = self._at(call, arguments=call.text)
        return filled + self._event("response.function_call_arguments.done", done)

    def _finish_calls(self) -> bytes:
        """End the calls whose arguments are complete."""
        return b"".join(
            self._close_call(call) + self._done(call)
            for call in self._calls.values()
            if not call.written and call.whole()
        )

    def _event(self, kind: str, content: Mapping[str, object]) -> bytes:
        number, self._number = self._number, self._number + 1
        return _event(kind, {"type": kind, "sequence_number": number, **content})


def error_event(error: AgenticFlowError, *, sequence_number: int = 0) -> bytes:
    """The end of a stream that broke. No `response.completed` follows, so nobody takes it for complete.

    The fields stand where the vendor documents them, and again within `error`, where its servers put them and
    its SDK looks for them.
    """
    shown = openai_error(error)["error"]
    about = {key: shown.get(key) for key in ("code", "message", "param")}
    return _event("error", {"type": "error", "sequence_number": sequence_number, **about, "error": shown})


def _event(kind: str, content: Mapping[str, object]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(content) + b"\n\n"
