"""Logs, traces and metrics: configured once by the process that owns them; the library only uses the APIs.

Logs go to standard error, because standard output carries data. No value under a name that means a secret,
and nothing that looks like a key, a token or personal data (`redaction`), reaches them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TextIO, cast

import structlog

from agentic_flow.core.redaction import redact_event
from agentic_flow.core.settings import TelemetrySettings

MASK = "********"

_SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:password|passwd|secrets?|token|api[_-]?keys?|authorization|credentials?|cookie|private[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"(?P<keep>(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}"  # Authorization headers
    r"|\baf_[0-9a-f]+_[A-Za-z0-9_-]{16,}"  # our keys
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # keys of Anthropic, OpenAI, OpenRouter
    r"|\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"  # JSON Web Tokens
    r"|(?P<url>://[^\s/:@]+:)[^\s/@]+(?=@)",  # passwords within URLs
    re.IGNORECASE,
)
_DEPTH_MAX = 6


def product_version() -> str:
    """The version of this product, which the package's root holds; nothing else of the root is used here."""
    return str(import_module("agentic_flow").__version__)


def is_secret_name(name: str) -> bool:
    """Whether values under this name must not be shown (`api_key`, `peers.token`, `x-api-key`)."""
    return bool(_SECRET_NAME.search(name))


def redact(value: Any, depth: int = 0) -> Any:
    """`value` with secrets masked, by the names in mappings and by the look of texts."""
    if isinstance(value, str):
        return _SECRET_TEXT.sub(_masked, value)
    if depth >= _DEPTH_MAX:
        return (
            value if isinstance(value, int | float | bool | None) else _SECRET_TEXT.sub(_masked, str(value))
        )
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret_name(str(key)) and item is not None else redact(item, depth + 1)
            for key, item in cast(Mapping[Any, Any], value).items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, depth + 1) for item in cast(list[Any], value)]
    if isinstance(value, BaseException):
        return redact(repr(value))
    return value


def _masked(match: re.Match[str]) -> str:
    return (match["keep"] or match["url"] or "") + MASK


def _redact_event(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return cast(MutableMapping[str, Any], redact(event))


_ABOVE_INFO = frozenset(
    structlog.make_filtering_bound_logger(level)
    for level in (logging.WARNING, logging.ERROR, logging.CRITICAL)
)


_UNKNOWN = object()
_NAMED_PROVIDER = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ


def traces() -> bool:
    """Whether spans are recorded by anybody. Where they are not, making one still costs ten microseconds."""
    trace: Any = sys.modules.get("opentelemetry.trace")  # not imported here: `--help` needs none
    if trace is None:
        return False
    # Asking by the API reads the environment each time as long as there is none.
    provider = getattr(trace, "_TRACER_PROVIDER", _UNKNOWN)
    if provider is _UNKNOWN or (provider is None and _NAMED_PROVIDER):
        provider = trace.get_tracer_provider()
    return provider is not None and not isinstance(provider, trace.ProxyTracerProvider)


def writes_info() -> bool:
    """Whether lines of the level info are written.

    Worth asking where a line belongs to every request: one that nobody writes costs ten microseconds.
    """
    return structlog.get_config()["wrapper_class"] not in _ABOVE_INFO


def configure(
    settings: TelemetrySettings, service: str, *, stream: TextIO | None = None
) -> Callable[[], None]:
    """Set up logs, and with an endpoint traces and metrics; once, in the process that owns the streams.

    The logs of libraries (uvicorn, aiohttp, …) take the same way out.

    Args:
        service: Name of the process in traces and metrics.
        stream: Where logs go; standard error by default.

    Returns:
        What to call at the end: sends what waits.
    """
    stream = stream if stream is not None else cast(TextIO, sys.stderr)
    on_terminal = stream.isatty()
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and on_terminal)
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Before redaction, which must see the text of tracebacks too.
        structlog.processors.format_exc_info,
        _redact_event,
        redact_event,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(
            colors=on_terminal and not os.environ.get("NO_COLOR"),
            exception_formatter=structlog.dev.plain_traceback,
        )
        if as_text
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    _route_library_logs(shared, renderer, level, stream)
    return _configure_export(settings, service)


class _LibraryHandler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `configure` can tell and replace it."""


def _route_library_logs(shared: list[Any], renderer: Any, level: int, stream: TextIO) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _LibraryHandler):
            root.removeHandler(handler)
    handler = _LibraryHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _redact_event,
                redact_event,
                renderer,
            ],
        )
    )
    # A library's info is our debug: its requests are our own business's details.
    handler.setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    root.addHandler(handler)


def _configure_export(settings: TelemetrySettings, service: str) -> Callable[[], None]:
    if settings.otlp_endpoint is None:
        return lambda: None
    # The SDK costs start-up time; only who sends traces and metrics pays for it.
    from opentelemetry import metrics, trace
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    endpoint = settings.otlp_endpoint.rstrip("/").removesuffix("/v1/traces")
    resource = Resource.create(
        {"service.name": f"agentic-flow-{service}", "service.version": product_version()}
    )
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces")))
    trace.set_tracer_provider(tracers)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{endpoint}/v1/metrics"))
    meters = MeterProvider([reader], resource=resource)
    metrics.set_meter_provider(meters)

    def shutdown() -> None:
        tracers.shutdown()
        meters.shutdown()

    return shutdown
