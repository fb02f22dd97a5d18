"""The stack on PostgreSQL by its overlay: workers do the runs, and the walls stand there too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine
from faults import (
    HEALED_WITHIN_S,
    SERVICES,
    Accepted,
    database_death_then_whole,
    database_fault_then_whole,
    fault_then_whole,
    postgres_stack,
    until,
)
from images import Images
from probing import addresses, connections
from stacks import Stack, assert_no_secret_shows

from agentic_flow.deploy.certs import CertificateFolder
from agentic_flow.deploy.engine import Engine as DockerCommand
from agentic_flow.deploy.infrastructure import DATABASE_PORT
from agentic_flow.deploy.plan import PORTS, checked_plan
from agentic_flow.deploy.spec import ServiceSpec
from agentic_flow.deploy.stack import Stack as DeployedStack

ROOT = Path(__file__).resolve().parents[2]
# PostgreSQL speaks TLS after it was asked whether it does.
SHOWN_BY_POSTGRES = """
import socket, ssl, struct
context = ssl.create_default_context(cafile="/run/secrets/ca.crt")
with socket.create_connection(("postgres", 5432), 5) as plain:
    plain.sendall(struct.pack("!ii", 8, 80877103))
    assert plain.recv(1) == b"S"
    with context.wrap_socket(plain, server_hostname="postgres") as connection:
        print(connection.getpeercert()["serialNumber"])
"""


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for all tests here."""
    with postgres_stack(engine, images, tmp_path_factory.mktemp("postgres")) as made:
        yield made


def test_workers_do_the_runs_and_everything_is_in_the_database(stack: Stack) -> None:
    """Catches a coordinator that does the work itself, and state that stays in a container."""
    with stack.client() as client:
        run = client.run("What does a worker do at SIGTERM?", input="/inputs/guides", agents=2)
        assert run.state == "completed", run.error
        assert "workers.md" in {citation.path for citation in run.citations}
    query = "SELECT (SELECT count(*) FROM af_workflows), (SELECT count(*) FROM agentic_flow.items)"
    ((workflows, items),) = in_database(stack, query)
    assert int(workflows) >= 1
    assert int(items) >= 1
    worked = stack.engine.output("exec", stack.containers("worker")[0], "ls", "-A", "/data")
    assert "agentdb" not in worked.split()


def test_a_run_goes_on_when_its_worker_is_killed(stack: Stack) -> None:
    """Catches an accepted run that is lost with the container that did it, or that waits for that one."""
    of_runs = "SELECT workflow_id, host FROM af_workflows JOIN af_executors USING (executor_id) WHERE "
    left: set[str] = set()
    killed = host = ""
    with Accepted(stack, agents=6) as accepted, stack.client() as client:
        # On a quick machine a worker may end its last run between the look and the kill.
        for _ in range(10):
            accepted.runs += [accepted.submit(client) for _ in range(10)]
            working = in_database(stack, of_runs + "status = 'running'")
            if not working:
                continue
            host = working[0][1]
            (killed,) = (one for one in stack.containers("worker") if one.startswith(host))
            stack.engine.run("kill", "--signal", "KILL", killed)
            left = {run for run, at in in_database(stack, of_runs + "status = 'running'") if at == host}
            if left:
                break
            stack.engine.run("start", killed)
        assert left, "no kill met a worker at work"
        accepted.all_there()
    hosts = {at for run, at in in_database(stack, of_runs + "takeovers > 0") if run in left}
    stack.engine.run("start", killed)  # to Docker a kill by hand is a stop
    assert hosts, "none of its runs was taken over"
    assert host not in hosts


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_dies_loses_nothing(stack: Stack, service: str) -> None:
    """Catches what only a service on a database loses, or does not take up again, when it is killed."""
    fault_then_whole(stack, "kill", service)


@pytest.mark.parametrize("fault", ["pause", "partition", "down"])
def test_a_fault_of_the_database_is_seen_by_all_and_heals(stack: Stack, fault: str) -> None:
    """Catches a service that calls itself ready without its database, or that stays ill when that is back."""
    _, failing = database_fault_then_whole(stack, fault)
    assert "gateway database" in failing["platform"]
    assert "database" in failing["agentdb"]
    assert "run database" in failing["swarm"]


def test_a_database_that_dies_is_started_again(stack: Stack) -> None:
    """Catches a database that stays dead, and a lost write or run, before anybody could miss it."""
    database_death_then_whole(stack)


def in_database(stack: Stack, query: str) -> list[list[str]]:
    """What psql answers beside the database, row by row."""
    (postgres,) = stack.containers("postgres")
    said = stack.engine.output(
        "exec", postgres, "psql", "-U", "agentic_flow", "-d", "agentic_flow", "-At", "-c", query
    )
    return [line.split("|") for line in said.splitlines()]


def test_the_database_is_reached_by_those_who_need_it_alone(stack: Stack, images: Images) -> None:
    """Catches a way to the database from the proxy, or from a worker to the coordinator."""
    plan = checked_plan(stack.spec)
    joined = {frozenset((edge.caller, edge.callee)) for edge in plan.edges}
    listening = {**PORTS, "postgres": DATABASE_PORT}
    by_service: dict[str, dict[str, object]] = {}
    for one in stack.inspected():
        by_service.setdefault(one["Config"]["Labels"]["com.docker.compose.service"], one)
    for caller, container in by_service.items():
        targets = {
            callee: [(host, port) for host in (callee, *addresses(by_service[callee]))]
            for callee, port in listening.items()
            if callee != caller
        }
        flat = [target for group in targets.values() for target in group]
        outcome = connections(stack.engine, images("platform"), str(container["Id"]), flat)
        for callee, group in targets.items():
            told = [outcome[target] for target in group]
            assert ("reached" in told) is (frozenset((caller, callee)) in joined), (caller, callee, told)


def test_the_database_takes_nobody_without_tls(stack: Stack) -> None:
    """Catches a connection whose certificate is not checked, or none of TLS at all, on the services' side."""
    assert "sslmode=verify-full" in stack.secret("database_url")
    clients = "pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL"
    assert in_database(stack, f"SELECT bool_and(ssl) FROM {clients}") == [["t"]]


def test_the_database_takes_up_a_renewed_certificate(stack: Stack) -> None:
    """Catches a certificate that the database shows until it expires, though a new one lies in its place."""
    (platform,), (postgres,) = stack.containers("platform"), stack.containers("postgres")

    def shown() -> str:
        return stack.engine.output("exec", platform, "python", "-c", SHOWN_BY_POSTGRES)

    before = shown(), stack.engine.output("inspect", "--format={{.State.StartedAt}}", postgres)
    CertificateFolder(stack.folder / "certs", mounted=True).renew(["postgres"], within_days=400)
    engine = DockerCommand(stack.engine.docker, stack.engine.variables)
    assert "postgres" in DeployedStack(stack.folder, stack.spec, engine).take_up_certificates()
    until(lambda: shown() != before[0], HEALED_WITHIN_S, "the new certificate")
    assert stack.engine.output("inspect", "--format={{.State.StartedAt}}", postgres) == before[1]
    with stack.client() as client:
        assert client.run("What is a worker?", input="/inputs/guides", agents=1).state == "completed"


def test_the_overlays_are_the_whole_plan(stack: Stack) -> None:
    """Catches an overlay that leaves something of the plan out when Compose merges it."""
    import json

    merged = json.loads(stack.compose("config", "--format", "json"))
    plan = checked_plan(
        stack.spec.model_copy(update={"services": {**stack.spec.services, "worker": ServiceSpec(replicas=2)}})
    )
    assert set(merged["services"]) == {part.name for part in plan.parts}
    for part in plan.parts:
        service = merged["services"][part.name]
        assert service["environment"].items() >= dict(part.environment).items(), part.name
        assert {one["source"] for one in service["secrets"]} >= {secret.name for secret in part.secrets}
        groups = [set(group) for group in plan.networks if part.name in group]
        assert len(groups) <= len(service["networks"])
        assert service["read_only"]
        assert service["deploy"].get("replicas", 1) == part.replicas


def test_no_secret_shows(stack: Stack) -> None:
    """Catches the database's password or a key in an environment, a command or a log."""
    assert_no_secret_shows(stack)
    password = stack.secret("postgres_password")
    assert password not in stack.logs()
