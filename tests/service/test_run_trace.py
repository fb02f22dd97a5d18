"""One trace for each run: over HTTP, through a queue, in a worker, back over HTTP to the models."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event

from cli_process import Place
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from scripted_team import GOAL, make_folder, team
from test_cli_serve import remote

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@dataclass(frozen=True)
class Seen:
    """A span that was received."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, str]
    links: tuple[str, ...]


class Receiver:
    """An OTLP/HTTP receiver of traces; what else comes is taken and forgotten."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.url = ""

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [
                    Seen(
                        about["service.name"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        {one.key: one.value.string_value for one in span.attributes},
                        tuple(link.trace_id.hex() for link in span.links),
                    )
                    for span in scope.spans
                ]

    def of_run(self, run_id: str) -> list[Seen]:
        return [span for span in self.spans if span.attributes.get("agentic_flow.run_id") == run_id]


@contextmanager
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                found.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def posted(url: str, body: object, **headers: str) -> dict[str, object]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json", **headers}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_a_run_is_one_trace_in_every_process(tmp_path: Path) -> None:
    """Catches a run whose trace ends at the queue, at a worker's death, or at the platform that it asks for
    models; and a retry that nobody can follow back."""
    folder = str(make_folder(tmp_path))
    asked, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" not in request.last_text and not goes_on.is_set():
            asked.set()
            return Reply.broken("hang")
        return team(request)

    with receiver() as traces, FakeProvider(script) as provider:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
            AGENTIC_FLOW_TELEMETRY__OTLP_ENDPOINT=traces.url,
        )
        accepts = {"AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX": "0"}
        with place.start("serve", "all", **accepts) as server:
            url = server.addresses()["platform"]
            asks = {"AGENTIC_FLOW_PEERS__PLATFORM_URL": url}
            with place.start("worker", "--drain-s", "0", **asks) as first:
                first.until(lambda line: "takes runs" in line)
                body = {"goal": GOAL, "inputs": [folder], "agents": 2}
                run_id = str(posted(f"{url}/v1/runs", body, traceparent=TRACEPARENT)["run_id"])
                assert asked.wait(60)
                first.signal(signal.SIGTERM)
                assert first.end().code == 0
            goes_on.set()
            with place.start("worker", **asks) as second, remote(url, place) as client:
                second.until(lambda line: "takes runs" in line)
                assert client.runs.wait(run_id).state == "completed"
                retried = client.runs.retry(run_id, from_step="merge")
                assert client.runs.wait(retried).state == "completed"
                second.signal(signal.SIGTERM)
                assert second.end().code == 0
            server.signal(signal.SIGTERM)
            assert server.end().code == 0
    of_run = traces.of_run(run_id)
    assert {span.trace for span in of_run} == {TRACE}
    assert len([span for span in of_run if span.name == "run"]) == 2, "two workers had it"
    (submitted,) = [span for span in of_run if span.name == "submit_run"]
    assert {span.parent for span in of_run if span.name == "run"} == {submitted.id}
    mine = [span for span in traces.spans if span.trace == TRACE]
    assert {span.service for span in mine} == {"agentic-flow-platform-agentdb-swarm", "agentic-flow-worker"}
    models = [span for span in mine if span.name.startswith("chat ")]
    assert {span.service for span in models} >= {"agentic-flow-platform-agentdb-swarm"}, "over HTTP"
    assert any(span.name == "invoke_agent worker-1" for span in mine)
    assert any(span.name == "execute_tool file_read" for span in mine)
    (again,) = [span for span in traces.of_run(retried) if span.name == "run"]
    assert again.trace != TRACE
    assert again.links == (TRACE,)
