"""What is read from answers of OpenAI Responses and Embeddings while their bytes pass through untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from agentic_flow.core.errors import (
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
)
from agentic_flow.core.messages import JsonObject, StopReason, Usage
from agentic_flow.gateway.wire.format import count, items, load_object, mapping, text_of
from agentic_flow.gateway.wire.passing import PassingReader
from agentic_flow.gateway.wire.sse import SseEvent

RESPONSES_PATH = "/responses"
EMBEDDINGS_PATH = "/embeddings"

_ENDS = frozenset({"response.completed", "response.incomplete"})
_WRITTEN = frozenset(
    {
        "response.output_text.delta",
        "response.refusal.delta",
        "response.function_call_arguments.delta",
        "response.reasoning_summary_text.delta",
        "response.reasoning_text.delta",
    }
)
_CUT: dict[str, StopReason] = {"max_output_tokens": "length", "content_filter": "refusal"}


class ResponsesPassing(PassingReader):
    """`PassingReader` of Responses. A stream is whole when a completed or incomplete response ends it."""

    read_keys = ("instructions", "input", "tools")

    def take_event(self, sent: SseEvent) -> None:
        """See `PassingReader`."""
        if sent.data.strip() == b"[DONE]":
            return  # imitators send it after the last event, which has told everything
        event = load_object(sent.data, f"an event in the stream of {self.provider}")
        kind = text_of(event.get("type"))
        response = mapping(event.get("response"))
        if kind in _WRITTEN:
            self.count_written(event.get("delta"))
        elif kind in _ENDS:
            self._take(response)
            self.done = True
        elif kind == "response.failed":
            self._take(response)
            self.error = _error(self.provider, mapping(response.get("error")))
        elif kind == "error" or event.get("error"):
            # The vendor documents its fields at the top, and its servers put them within `error`.
            self.error = _error(self.provider, mapping(event.get("error")) or event)
        elif response:
            self.model = self.model or text_of(response.get("model"))

    def take_answer(self, answer: JsonObject) -> None:
        """See `PassingReader`."""
        if answer.get("error"):
            raise _error(self.provider, mapping(answer["error"]))
        if not isinstance(answer.get("output"), list):
            raise ProviderProtocol(f"the answer of {self.provider} has no output")
        if answer.get("status") not in ("completed", "incomplete"):
            raise ProviderProtocol(
                f"the answer of {self.provider} is not whole: its status is {answer.get('status')!r}"
            )
        self._take(answer)
        if self.usage is None:
            self.count_written(answer["output"])

    def _take(self, response: Mapping[str, Any]) -> None:
        self.model = self.model or text_of(response.get("model"))
        usage = mapping(response.get("usage"))
        if "input_tokens" in usage:
            read, written = (
                mapping(usage.get("input_tokens_details")),
                mapping(usage.get("output_tokens_details")),
            )
            self.usage = Usage(
                input_tokens=count(usage.get("input_tokens")),
                output_tokens=count(usage.get("output_tokens")),
                cache_read_tokens=count(read.get("cached_tokens")),
                cache_write_tokens=count(read.get("cache_write_tokens")),
                reasoning_tokens=count(written.get("reasoning_tokens")),
                cost_usd=None,
            )
        reason = text_of(mapping(response.get("incomplete_details")).get("reason"))
        if response.get("status") == "incomplete":
            self.stop_reason = _CUT.get(reason, "length")
        elif any(item.get("type") == "function_call" for item in items(response.get("output"))):
            self.stop_reason = "tool_calls"


class EmbeddingsPassing(PassingReader):
    """`PassingReader` of Embeddings, which are never streamed."""

    read_keys = ("input",)

    def take_event(self, sent: SseEvent) -> None:
        """See `PassingReader`."""
        raise ProviderProtocol(f"{self.provider} streamed embeddings, which nobody asked for")

    def take_answer(self, answer: JsonObject) -> None:
        """See `PassingReader`."""
        if answer.get("error"):
            raise _error(self.provider, mapping(answer["error"]))
        asked: object = self._sent.get("input")
        # A list of numbers is one input, given as tokens.
        several = isinstance(asked, list) and not all(
            isinstance(entry, int) for entry in cast(list[object], asked)
        )
        wanted = len(cast(list[object], asked)) if several else 1
        found = len(items(answer.get("data")))
        if found != wanted:
            raise ProviderProtocol(
                f"{self.provider} sent {found} embeddings for {wanted} inputs",
                hint="the call can be repeated",
            )
        self.model = text_of(answer.get("model"))
        usage = mapping(answer.get("usage"))
        if "prompt_tokens" in usage:
            self.usage = Usage(input_tokens=count(usage.get("prompt_tokens")), cost_usd=None)


READERS: Mapping[str, Callable[[str, JsonObject], PassingReader]] = {
    RESPONSES_PATH: ResponsesPassing,
    EMBEDDINGS_PATH: EmbeddingsPassing,
}
"""Path below the base URL → what reads its answers; every other path speaks the provider's main format."""


def reader_of(path: str, provider: str, sent: JsonObject) -> PassingReader | None:
    """The reader for a path of its own, None where the provider's main format is spoken."""
    make = READERS.get(path.partition("?")[0])
    return None if make is None else make(provider, sent)


def _error(provider: str, error: Mapping[str, Any]) -> ProviderError:
    code = text_of(error.get("code")) or text_of(error.get("type"))
    message = text_of(error.get("message")) or "no explanation"
    said = f"{provider} sent the error {code!r}: {message[:500]}"
    if code in ("rate_limit_exceeded", "rate_limit_error", "overloaded_error"):
        return ProviderOverloaded(said, hint="it is tried again after a pause")
    if code.startswith(("invalid_", "unsupported_")) or "image" in code or code.endswith("_violation"):
        return ProviderRejected(said, hint="correct the request")
    return ProviderFailed(said, hint="it is tried again after a pause")
