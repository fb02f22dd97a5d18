"""The main stack by its Compose file: up in time, the main job over it, walls between its parts, no leaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from images import Images
from probing import addresses, connections, world_outside
from stacks import Stack, assert_no_secret_shows, prepare, spec_with_free_ports

from agentic_flow.client import Client
from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.plan import PORTS, checked_plan
from conftest import remove_project

ROOT = Path(__file__).resolve().parents[2]
# Runs within a service: asks a neighbour over TLS with its certificate, over TLS without, and without TLS.
ASKED_THREE_WAYS = """
import json, socket, ssl, sys
caller, callee, port = sys.argv[1:]
def answer(connection):
    lines = ("GET /health/live HTTP/1.1", f"host: {callee}", "connection: close", "", "")
    connection.sendall("\\r\\n".join(lines).encode())
    return (connection.recv(100).split(b" ") + [b"", b""])[1].decode()
def asked(how):
    context = ssl.create_default_context(cafile="/run/secrets/ca.crt")
    if how == "certificate":
        context.load_cert_chain(f"/run/secrets/{caller}.crt", f"/run/secrets/{caller}.key")
    try:
        with socket.create_connection((callee, int(port)), 5) as plain:
            if how == "plain":
                return answer(plain)
            with context.wrap_socket(plain, server_hostname=callee) as connection:
                return answer(connection)
    except OSError as error:
        return type(error).__name__
print(json.dumps({how: asked(how) for how in ("certificate", "tls", "plain")}))
"""
QUESTION = "How is a secret file read again when it changes?"


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack, healthy, with a folder of sources to ask about."""
    project = f"af-main-{new_key().id}"
    folder = tmp_path_factory.mktemp("main")
    made = prepare(engine, images, project, folder, spec_with_free_ports(), (compose.MAIN,))
    shutil.copytree(
        ROOT / "src" / "agentic_flow" / "core",
        folder / "inputs" / "core",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    try:
        made.up()
        yield made
    finally:
        remove_project(engine, project)


def test_both_published_ports_answer(stack: Stack) -> None:
    """Catches a proxy that is up and passes nothing on, and a service that lets strangers in."""
    for port in (stack.spec.ports.platform, stack.spec.ports.swarm):
        status, body = stack.get(port, "/health/ready")
        assert (status, body["status"]) == (200, "ready")
        status, _ = stack.get(port, "/v1/runs")
        assert status == 401


def test_the_main_job_gives_the_same_answer_as_embedded(stack: Stack, tmp_path: Path) -> None:
    """Catches a stack that answers otherwise than one process does: ingest, run and search, from outside."""

    def job(client: Client, source: str) -> tuple[Any, ...]:
        run = client.run(QUESTION, input=source, agents=2)
        assert run.state == "completed", run.error
        return run.answer, [(one.path, one.line_start, one.line_end) for one in run.citations]

    with stack.client() as outside, Client(data_dir=tmp_path) as embedded:
        answers = [job(outside, "/inputs/core"), job(embedded, str(stack.folder / "inputs" / "core"))]
        assert answers[0] == answers[1]
        assert "secrets.py" in str(answers[0])
        _, listed = stack.get(stack.spec.ports.platform, "/v1/namespaces", key=stack.secret("owner_key"))
        (namespace,) = [name for name in _names(listed) if name.startswith("input.")]
        there = outside.search(QUESTION, namespace=namespace, k=5).hits
        here = embedded.search(QUESTION, input=str(stack.folder / "inputs" / "core"), k=5).hits
        assert [hit.item.text for hit in there] == [hit.item.text for hit in here]
        assert len(there) == 5


def _names(listed: Any) -> list[str]:
    found = listed["namespaces"] if isinstance(listed, dict) else listed
    return [one["name"] if isinstance(one, dict) else one for one in found]


def test_who_reaches_whom_is_the_list_of_edges(stack: Stack, images: Images) -> None:
    """Catches a connection that the list of edges forbids and the networks allow, by name or by address."""
    plan = checked_plan(stack.spec)
    joined = {frozenset((edge.caller, edge.callee)) for edge in plan.edges}
    listening = {name: PORTS[name] for name in ("platform", "agentdb", "swarm")}
    listening["proxy"] = stack.spec.ports.platform or 0
    inspected = {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in stack.inspected()}
    assert set(inspected) == set(listening)
    for caller, container in inspected.items():
        targets = [
            (host, port)
            for callee, port in listening.items()
            if callee != caller
            for host in (callee, *addresses(inspected[callee]))
        ]
        outcome = connections(stack.engine, images("platform"), container["Id"], targets)
        for callee, port in listening.items():
            if callee == caller:
                continue
            told = [outcome[host, port] for host in (callee, *addresses(inspected[callee]))]
            reached = "reached" in told
            assert reached is (frozenset((caller, callee)) in joined), (caller, callee, told)


def test_services_speak_only_with_who_shows_a_certificate(stack: Stack) -> None:
    """Catches a service that answers a neighbour without TLS, or without a certificate of the stack."""
    for caller, callees in (("platform", ("agentdb", "swarm")), ("swarm", ("platform", "agentdb"))):
        (container,) = stack.containers(caller)
        for callee in callees:
            words = ("python", "-c", ASKED_THREE_WAYS, caller, callee, str(PORTS[callee]))
            told = json.loads(stack.engine.output("exec", container, *words))
            assert told["certificate"] == "200", (caller, callee, told)
            assert "200" not in (told["tls"], told["plain"]), (caller, callee, told)


def test_internal_networks_have_no_way_out(stack: Stack, images: Images) -> None:
    """Catches a database or coordinator that can reach the world outside; only who calls models may."""
    with world_outside() as outside:
        for service, expected in (("platform", True), ("agentdb", False), ("swarm", False)):
            (container,) = stack.containers(service)
            (told,) = connections(stack.engine, images("platform"), container, [outside]).values()
            assert (told == "reached") is expected, (service, told)


def test_containers_are_locked_down(stack: Stack) -> None:
    """Catches a promise of the file that the engine does not keep: root, rights, memory, writable root."""
    for one in stack.inspected():
        host, name = one["HostConfig"], one["Name"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert host["NanoCpus"] > 0, name
        assert host["PidsLimit"] > 0, name
        assert not host["Privileged"], name
        assert int(one["Config"]["User"].partition(":")[0]) >= 10_000, name
        ports = [
            binding["HostIp"] for bindings in (host["PortBindings"] or {}).values() for binding in bindings
        ]
        assert set(ports) <= {"127.0.0.1"}, name
        assert bool(ports) is name.endswith("proxy-1"), name


def test_keys_are_rotated_without_a_restart(stack: Stack) -> None:
    """Catches a rotation that needs a restart, leaves the old key good, or stops the services' own calls."""
    before = {one["Id"]: one["State"]["StartedAt"] for one in stack.inspected()}
    old = stack.secret("owner_key")
    for name in ("service_key", "owner_key"):
        stack.rotate(name, new_key().plaintext)
    with stack.client() as client:
        assert client.run(QUESTION, input="/inputs/core", agents=1).state == "completed"
    assert stack.get(stack.spec.ports.platform, "/v1/runs", key=old)[0] == 401
    assert {one["Id"]: one["State"]["StartedAt"] for one in stack.inspected()} == before


def test_no_secret_shows(stack: Stack) -> None:
    """Catches a key in an environment, a command, a label or a log; the last test, with all logs written."""
    assert_no_secret_shows(stack)
