"""One trace for each run, whichever processes work on it: its context is stored with the run.

Whoever accepts a run stores the trace that it was accepted in; whoever works on it, from its beginning or
from where another process left it, goes on in that trace. A run that is accepted outside of any trace has one
that follows from its id. Spans have the names and attributes of the GenAI conventions where there are some.

Sources: W3C Trace Context; OpenTelemetry semantic conventions for generative AI agents.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from hashlib import sha256

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.telemetry import traces

_tracer = trace.get_tracer("agentic_flow.swarm")
_format = TraceContextTextMapPropagator()


@contextmanager
def accepting(run_id: str) -> Generator[str]:
    """While a run is being accepted; gives the `traceparent` to store with it."""
    if not (traces() or trace.get_current_span().get_span_context().is_valid):
        yield _of_id(run_id)
        return
    attributes = {"agentic_flow.run_id": run_id}
    with _tracer.start_as_current_span("submit_run", kind=SpanKind.PRODUCER, attributes=attributes):
        carrier: dict[str, str] = {}
        _format.inject(carrier)
        yield carrier.get("traceparent") or _of_id(run_id)


@contextmanager
def working(
    name: str,
    attributes: Mapping[str, str],
    *,
    traceparent: str | None = None,
    linked: str | None = None,
) -> Generator[None]:
    """While something of a run is done here; what is called meanwhile, also over HTTP, is below it.

    Args:
        name: Of the span.
        attributes: Of the span.
        traceparent: What it belongs to; None: the span that is current.
        linked: A `traceparent` of another trace that led to this one.
    """
    if traceparent is None and not (traces() or trace.get_current_span().get_span_context().is_valid):
        yield
        return
    parent = None if traceparent is None else _context_of(traceparent)
    links = [] if linked is None else [Link(trace.get_current_span(_context_of(linked)).get_span_context())]
    # Where nobody records spans this one says nothing, and carries the trace on all the same.
    with _tracer.start_as_current_span(
        name,
        context=parent,
        attributes=dict(attributes),
        links=links,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except AgenticFlowError as error:
            span.set_status(Status(StatusCode.ERROR, error.code))
            raise


def _context_of(traceparent: str) -> Context:
    return _format.extract({"traceparent": traceparent}, context=Context())


def _of_id(run_id: str) -> str:
    digest = sha256(f"run {run_id}".encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"
