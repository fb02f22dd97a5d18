"""Logs and traces: in the right place, in the right form, without secrets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import structlog

from agentic_flow.core.settings import TelemetrySettings
from agentic_flow.core.telemetry import configure, is_secret_name, redact

KEY = "af_0123456789ab_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ"
TOKEN = "eyJhbGciOiJFZDI1NTE5In0.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {KEY}",
        f"key {KEY} refused",
        f"got {TOKEN}",
        "x-api-key: sk-ant-api03-abcdefghijklmnop",
        "postgresql://user:hunter2secret@host/db",
    ],
)
def test_secrets_within_texts_are_masked(text: str) -> None:
    """Catches keys, tokens and passwords that reach a log inside a message."""
    masked = redact(text)
    assert "********" in masked
    for secret in (KEY, TOKEN, "sk-ant", "hunter2secret"):
        assert secret not in masked


def test_secrets_under_telling_names_are_masked_at_any_depth() -> None:
    """Catches a password two levels down, and counters of tokens masked by mistake."""
    event = {
        "event": "x",
        "input_tokens": 5,
        "peer": {"token": "abc", "list": [{"api_key": "abc", "n": 1}]},
        "X-Api-Key": "abc",
        "password": None,
    }
    assert redact(event) == {
        "event": "x",
        "input_tokens": 5,
        "peer": {"token": "********", "list": [{"api_key": "********", "n": 1}]},
        "X-Api-Key": "********",
        "password": None,
    }
    deep: object = KEY
    for _ in range(50):
        deep = [deep]
    assert KEY not in str(redact(deep))
    assert not is_secret_name("tokens_max")
    assert is_secret_name("gateway.openai.api_key")


def test_lines_are_json_off_a_terminal_and_carry_context() -> None:
    """Catches logs that no collector can parse, lost context, and secrets within tracebacks."""
    stream = io.StringIO()
    configure(TelemetrySettings(log_level="info"), "test", stream=stream)
    log = structlog.get_logger("x")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.info("thing_done", count=2, api_key="abc")
        log.debug("thing_hidden")
        try:
            raise ValueError(f"bad key {KEY}")
        except ValueError:
            log.exception("thing_failed")
    done, failed = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (done["event"], done["count"], done["api_key"]) == ("thing_done", 2, "********")
    assert (done["level"], done["request_id"]) == ("info", "r1")
    assert "ValueError" in failed["exception"]
    assert KEY not in stream.getvalue()


def library_log() -> logging.Logger:
    """A library's logger at its own level: servers of other tests in this process may have quietened it."""
    found = logging.getLogger("uvicorn.error")
    found.setLevel(logging.NOTSET)
    found.propagate, found.disabled = True, False
    logging.getLogger("uvicorn").propagate = True
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    return found


def test_personal_data_and_keys_of_any_vendor_stay_out_of_the_logs() -> None:
    """Catches a log chain without the redaction by looks: fields, tracebacks, lines of libraries."""
    stream = io.StringIO()
    configure(TelemetrySettings(log_level="info", log_format="json"), "test", stream=stream)
    mail, aws, card = "jane.doe@example.com", "AKIAIOSFODNN7ABCDEFG", "4111 1111 1111 1111"
    log = structlog.get_logger("x")
    log.info("asked_by", who=mail, within={"list": [f"paid with {card}"]}, input_tokens=4111111111111111)
    try:
        raise ValueError(f"refused {aws}")
    except ValueError:
        log.exception("thing_failed")
    library_log().warning("lost %s", mail)
    asked, failed, library = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (asked["who"], asked["within"]) == (
        "[redacted: email]",
        {"list": ["paid with [redacted: card]"]},
    )
    assert asked["input_tokens"] == 4111111111111111
    assert "refused [redacted: key]" in failed["exception"]
    assert library["event"] == "lost [redacted: email]"
    assert not any(text in stream.getvalue() for text in (mail, aws, card))


def test_lines_are_text_on_a_terminal_with_colour_only_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches JSON in a person's face, and colours despite NO_COLOR."""
    for value, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        stream = Terminal()
        configure(TelemetrySettings(log_level="info"), "test", stream=stream)
        structlog.get_logger().info("thing_done", count=2)
        assert "thing_done" in stream.getvalue()
        assert not stream.getvalue().startswith("{")
        assert ("\x1b[" in stream.getvalue()) == coloured


def test_the_logs_of_libraries_take_the_same_way_once() -> None:
    """Catches warnings of uvicorn in another format, twice, or with secrets."""
    stream = io.StringIO()
    for _ in range(2):
        configure(TelemetrySettings(log_level="info", log_format="json"), "test", stream=stream)
    library_log().warning("refused %s", f"Bearer {TOKEN}")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "refused Bearer ********"


def test_logs_leave_standard_output_to_data() -> None:
    """Catches a log line in the middle of `--json` output."""
    program = (
        "import structlog\nfrom agentic_flow.core.settings import TelemetrySettings\n"
        "from agentic_flow.core.telemetry import configure\n"
        "configure(TelemetrySettings(log_level='info'), 'test')()\n"
        "structlog.get_logger().info('thing_done')\n"
        "import sys; assert not any(m.startswith('opentelemetry.sdk') for m in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=dict(os.environ), check=True
    )
    assert done.stdout == b""
    assert b"thing_done" in done.stderr


class _Collector(BaseHTTPRequestHandler):
    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.seen.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return None


def test_spans_reach_the_collector_before_the_end() -> None:
    """Catches traces that are configured and never sent, or lost when a short process ends."""
    handler = type("Handler", (_Collector,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    program = (
        "import sys\nfrom agentic_flow.core.settings import TelemetrySettings\n"
        "from agentic_flow.core.telemetry import configure\nfrom opentelemetry import trace\n"
        "shutdown = configure(TelemetrySettings(otlp_endpoint=sys.argv[1]), 'test')\n"
        "with trace.get_tracer('x').start_as_current_span('a-span-of-ours'): pass\nshutdown()\n"
    )
    try:
        subprocess.run(
            [sys.executable, "-c", program, f"http://127.0.0.1:{server.server_port}"],
            env=dict(os.environ),
            check=True,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = handler.seen  # type: ignore[attr-defined]
    assert path == "/v1/traces"
    assert b"a-span-of-ours" in body
    assert b"agentic-flow-test" in body


def test_metrics_reach_the_collector_before_the_end() -> None:
    """Catches metrics that are recorded and never sent, or sent to the address of the traces."""
    handler = type("Handler", (_Collector,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    program = (
        "import sys\nfrom agentic_flow.core.settings import TelemetrySettings\n"
        "from agentic_flow.core.telemetry import configure\nfrom opentelemetry import metrics\n"
        "counter = metrics.get_meter('x').create_counter('a-counter-of-ours')\n"
        "shutdown = configure(TelemetrySettings(otlp_endpoint=sys.argv[1]), 'test')\n"
        "counter.add(3)\nshutdown()\n"
    )
    try:
        subprocess.run(
            [sys.executable, "-c", program, f"http://127.0.0.1:{server.server_port}/v1/traces"],
            env=dict(os.environ),
            check=True,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = handler.seen  # type: ignore[attr-defined]
    assert path == "/v1/metrics"
    assert b"a-counter-of-ours" in body
    assert b"agentic-flow-test" in body


def test_configuring_does_not_need_an_event_loop() -> None:
    """Catches a configuration that only works inside asyncio, or only outside."""

    async def main() -> None:
        configure(TelemetrySettings(), "test", stream=io.StringIO())()

    asyncio.run(main())
    configure(TelemetrySettings(), "test", stream=io.StringIO())()
