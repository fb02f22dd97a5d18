"""Observability by its overlay: Prometheus really gathers and watches, traces really arrive at a receiver."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from container import paused
from engine import Engine
from images import Images
from stacks import Stack, assert_no_secret_shows, prepare, spec_with_free_ports

from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.plan import PORTS
from agentic_flow.deploy.prometheus import rules
from conftest import remove_project

WAIT_S = 90
# Takes OTLP over mutual TLS as the collector does, and writes the names of what came to its log.
RECEIVER = """
import http.server, re, ssl
class Receiver(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip
            body = gzip.decompress(body)
        names = sorted(set(re.findall(rb"service.name\\x12[^a-z]*([a-z-]+)", body)))
        print("RECEIVED", self.path, self.headers["content-type"], names, flush=True)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
server = http.server.ThreadingHTTPServer(("0.0.0.0", 4318), Receiver)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/run/secrets/collector.crt", "/run/secrets/collector.key")
context.load_verify_locations("/run/secrets/ca.crt")
context.verify_mode = ssl.CERT_REQUIRED
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack with Prometheus, and a receiver in the collector's place, whose image is not here."""
    project, folder = f"af-observed-{new_key().id}", tmp_path_factory.mktemp("observed")
    spec = spec_with_free_ports(observability=True)
    made = prepare(engine, images, project, folder, spec, compose.files_of(spec))
    made.override(
        {
            "collector": {
                "image": images("platform"),
                "entrypoint": ["python", "-c", RECEIVER],
                "command": [],
                "healthcheck": {"disable": True},
            }
        }
    )
    try:
        made.up()
        yield made
    finally:
        remove_project(engine, project)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Ask again until it holds; Prometheus looks every 15 s."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        found = condition()
        if found:
            return found
        time.sleep(1.0)
    raise AssertionError(f"{what}: not within {WAIT_S} s")


def asked(stack: Stack, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers, through the proxy."""
    path = f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    status, body = stack.get(stack.spec.ports.metrics, path)
    assert status == 200, body
    return list(body["data"]["result"])


def test_prometheus_gathers_from_every_service(stack: Stack) -> None:
    """Catches a target that is not found, a certificate that is refused, or a metric of another name."""

    def up() -> bool:
        found = {one["metric"]["job"]: one["value"][1] for one in asked(stack, "up")}
        return all(found.get(name) == "1" for name in PORTS if name != "worker")

    until(up, "every service up")

    def counted() -> bool:
        found = asked(stack, "sum by (service) (agentic_flow_http_request_duration_seconds_count)")
        return {one["metric"]["service"] for one in found} >= {"platform", "agentdb", "swarm"}

    until(counted, "requests of every service")


def test_prometheus_takes_the_rules_and_one_fires(stack: Stack) -> None:
    """Catches a rule that Prometheus refuses, and an alert that stays silent when a service is gone."""
    _, body = stack.get(stack.spec.ports.metrics, "/api/v1/rules")
    (group,) = body["data"]["groups"]
    assert {rule["name"] for rule in group["rules"]} == {
        one["alert"] for one in rules()["groups"][0]["rules"]
    }
    until(
        lambda: all(
            rule["health"] == "ok"
            for rule in stack.get(stack.spec.ports.metrics, "/api/v1/rules")[1]["data"]["groups"][0]["rules"]
        ),
        "all rules evaluated",
    )
    (agentdb,) = stack.containers("agentdb")
    with paused(stack.engine, agentdb):
        until(lambda: asked(stack, 'ALERTS{alertname="ServiceDown", job="agentdb"}'), "the alert")


def test_promtool_finds_nothing_wrong(stack: Stack) -> None:
    """Catches a configuration that Prometheus bears and its own checker does not."""
    (prometheus,) = stack.containers("prometheus")
    said = stack.engine.run(
        "exec", prometheus, "promtool", "check", "config", "/etc/prometheus/prometheus.yml"
    )
    assert "SUCCESS" in said.stdout + said.stderr


def test_traces_of_every_service_arrive(stack: Stack) -> None:
    """Catches an exporter that does not trust the collector, shows it no certificate, or sends nothing, and
    services that all have one name."""
    with stack.client() as client:
        client.models()

    def arrived() -> bool:
        text = stack.logs("collector")
        names = set(re.findall(r"b'(agentic-flow-[a-z]+)'", text))
        return "/v1/traces" in text and names == {
            f"agentic-flow-{name}" for name in ("platform", "agentdb", "swarm")
        }

    until(arrived, f"traces of all services: {stack.logs('collector')[-2000:]}")


def test_no_secret_shows(stack: Stack) -> None:
    """Catches a key in the configuration or log of what observes."""
    assert_no_secret_shows(stack)
    assert json.dumps(stack.states())
