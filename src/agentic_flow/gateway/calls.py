"""The record of one call: its span, its one log line, and its entry in the books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from pydantic import BaseModel

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.messages import Completion, StopReason, Usage
from agentic_flow.core.telemetry import traces, writes_info
from agentic_flow.gateway.policies import Caller
from agentic_flow.gateway.questions import Destination, Question
from agentic_flow.gateway.usage import UsageRecord
from agentic_flow.gateway.wire.passing import Glance

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer("agentic_flow.gateway")

Books = Callable[[UsageRecord], None]
"""Takes the record of a call that has ended: the usage ledger and the metrics."""

NOTHING = Usage()

AnyModel = TypeVar("AnyModel", bound=BaseModel)
_set = object.__setattr__


class Ended(NamedTuple):
    """What the books need of a whole answer; a `Completion` has it too."""

    provider: str
    model: str
    stop_reason: StopReason
    usage: Usage | Glance


class CallRecord:
    """One call as it goes on.

    Attribute names of the span: OpenTelemetry semantic conventions for generative AI.

    Args:
        question: What is asked.
        caller: Who asks.
        request_id: Of the request that brought it, "" for none.
        books: Where the record goes at the end.
        clock: Times.
    """

    # As they begin.
    tries = 0
    cached = False
    estimated = False
    first_event_s: float | None = None
    destination: Destination | None = None
    """Who was asked last."""
    _closed = False
    _spent: Usage | None = None

    def __init__(
        self, question: Question, caller: Caller, request_id: str, books: Books | None, clock: Clock
    ) -> None:
        self._question = question
        self._caller = caller
        self._request_id = request_id
        self._books = books
        self._clock = clock
        self._started_s = clock.monotonic_s()

    def spend(self, usage: Usage) -> None:
        """Add what an answer cost that the caller does not get."""
        self._spent = usage if self._spent is None else self._spent + usage

    def elapsed_s(self) -> float:
        return self._clock.monotonic_s() - self._started_s

    def first_event(self) -> None:
        """The first event of a stream is there."""
        if self.first_event_s is None:
            self.first_event_s = self.elapsed_s()

    def start_span(self) -> Span:
        """The span of the call; where nobody records any, one that says nothing."""
        if not traces():
            return trace.INVALID_SPAN
        """A span of this call that is not current; whoever starts it ends it."""
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": self._question.operation,
            "gen_ai.request.model": self._question.asked,
            "agentic_flow.tenant": self._caller.tenant,
        }
        limit = self._question.output_tokens_max()
        # An attribute of a span holds 64 bits.
        if limit is not None and limit < 2**63:
            attributes["gen_ai.request.max_tokens"] = limit
        return _tracer.start_span(
            f"{self._question.operation} {self._question.asked}", kind=SpanKind.CLIENT, attributes=attributes
        )

    def span(self) -> AbstractContextManager[Span]:
        """A span that is current for a block; `failed` and `finished` say how it went."""
        if not traces():
            return nullcontext(trace.INVALID_SPAN)  # and the caller's trace stays the current one
        return trace.use_span(
            self.start_span(), end_on_exit=True, record_exception=False, set_status_on_exception=False
        )

    def finished(self, span: Span, completion: Completion | Ended, *, told: bool | None = None) -> None:
        """The answer is whole.

        Args:
            told: Whether a line is written; None: as log lines of the level info are.
        """
        usage = completion.usage
        if span is not trace.INVALID_SPAN and span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.provider.name": completion.provider,
                    "gen_ai.response.model": completion.model,
                    "gen_ai.response.finish_reasons": [completion.stop_reason],
                    "gen_ai.usage.input_tokens": usage.input_tokens,
                    "gen_ai.usage.output_tokens": usage.output_tokens,
                }
            )
            if usage.cost_usd is not None:
                span.set_attribute("agentic_flow.cost_usd", usage.cost_usd)
        if writes_info() if told is None else told:
            self._tell(completion)
        self._enter("ok", completion.provider, completion.model, usage)

    def _tell(self, completion: Completion | Ended) -> None:
        usage = completion.usage
        _log.info(
            "completion_finished",
            provider=completion.provider,
            model=completion.model,
            tenant=self._caller.tenant,
            tries=self.tries,
            stop_reason=completion.stop_reason,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cost_usd=usage.cost_usd,
            cached=self.cached,
            latency_s=round(self.elapsed_s(), 4),
            first_event_s=None if self.first_event_s is None else round(self.first_event_s, 4),
        )

    def failed(self, span: Span, error: BaseException, usage: Usage = NOTHING) -> None:
        """Mark the span and close the books, with what is known to be used.

        The error travels on to whoever logs it, so it is not logged here.
        """
        kind = error.code if isinstance(error, AgenticFlowError) else type(error).__name__
        left = isinstance(error, asyncio.CancelledError | GeneratorExit)
        span.set_attribute("error.type", kind)
        if not left:
            span.set_status(Status(StatusCode.ERROR, str(error)))
        at = self.destination
        if at is not None:
            span.set_attribute("gen_ai.provider.name", at.provider)
        self._enter("cancelled" if left else kind, at.provider if at else "", at.model if at else "", usage)

    def _enter(self, status: str, provider: str, model: str, usage: Usage | Glance) -> None:
        if self._books is None or self._closed:
            return
        self._closed = True
        if self._spent is not None and isinstance(usage, Usage):
            usage = usage + self._spent
        question, caller, cost = self._question, self._caller, usage.cost_usd
        self._books(
            UsageRecord(  # by position: two dozen names cost two microseconds more
                self._clock.time_s(),
                self._request_id,
                *caller,
                provider,
                model,
                question.asked,
                question.wire or "",
                usage.input_tokens,
                usage.output_tokens,
                usage.cache_read_tokens,
                usage.cache_write_tokens,
                usage.reasoning_tokens,
                None if cost is None else nano_usd(cost),
                self._clock.monotonic_s() - self._started_s,
                self.first_event_s,
                status,
                self.tries,
                self.cached,
                self.estimated,
                question.stream,
            )
        )


def changed(model: AnyModel, /, **fields: Any) -> AnyModel:
    """`model.model_copy(update=fields)` of a model without private attributes, at a third of its cost.

    Args:
        fields: Values that are right: nothing is checked.
    """
    copied = model.__class__.__new__(model.__class__)
    _set(copied, "__dict__", {**model.__dict__, **fields})
    _set(copied, "__pydantic_fields_set__", model.model_fields_set | fields.keys())
    _set(copied, "__pydantic_extra__", None)
    _set(copied, "__pydantic_private__", None)
    return copied


def nano_usd(usd: float) -> int:
    """Whole thousand-millionths of a dollar, rounded up: a budget never gives a fraction away.

    Floating point leaves dust above whole numbers; a millionth of a nano-dollar is taken for it.
    """
    return -int(-(usd * 1e9 - 1e-6) // 1) if usd > 0 else 0
