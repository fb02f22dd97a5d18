"""The stack on PostgreSQL by its overlay: workers do the runs, and the walls stand there too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine
from images import Images
from probing import addresses, connections
from stacks import Stack, assert_no_secret_shows, prepare, spec_with_free_ports

from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.infrastructure import DATABASE_PORT
from agentic_flow.deploy.plan import PORTS, checked_plan
from agentic_flow.deploy.spec import ServiceSpec
from conftest import remove_project

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """PostgreSQL, the three services, two workers and the proxy, healthy."""
    project, folder = f"af-postgres-{new_key().id}", tmp_path_factory.mktemp("postgres")
    spec = spec_with_free_ports(
        store="postgresql",
        services={name: {} for name in ("platform", "agentdb", "swarm")} | {"worker": {"replicas": 2}},
    )
    made = prepare(engine, images, project, folder, spec, compose.files_of(spec))
    shutil.copytree(ROOT / "docs" / "guides", folder / "inputs" / "guides")
    try:
        made.up()
        yield made
    finally:
        remove_project(engine, project)


def test_workers_do_the_runs_and_everything_is_in_the_database(stack: Stack) -> None:
    """Catches a coordinator that does the work itself, and state that stays in a container."""
    with stack.client() as client:
        run = client.run("What does a worker do at SIGTERM?", input="/inputs/guides", agents=2)
        assert run.state == "completed", run.error
        assert "workers.md" in {citation.path for citation in run.citations}
    query = "SELECT (SELECT count(*) FROM af_workflows), (SELECT count(*) FROM agentic_flow.items)"
    (postgres,) = stack.containers("postgres")
    said = stack.engine.output(
        "exec", postgres, "psql", "-U", "agentic_flow", "-d", "agentic_flow", "-At", "-c", query
    )
    workflows, items = map(int, said.split("|"))
    assert workflows >= 1
    assert items >= 1
    worked = stack.engine.output("exec", stack.containers("worker")[0], "ls", "-A", "/data")
    assert "agentdb" not in worked.split()


def test_a_run_goes_on_when_its_worker_is_killed(stack: Stack) -> None:
    """Catches an accepted run that is lost with the container that did it."""
    with stack.client() as client:
        runs = [
            client.runs.submit("How are runs resumed?", input="/inputs/guides", agents=4) for _ in range(4)
        ]
        first, *_ = stack.containers("worker")
        stack.engine.run("kill", "--signal", "KILL", first)
        for run in runs:
            assert client.runs.wait(run).state == "completed"
    stack.engine.run("start", first)  # to Docker a kill by hand is a stop


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
    query = f"SELECT bool_and(ssl) FROM {clients}"
    (postgres,) = stack.containers("postgres")
    said = stack.engine.output(
        "exec", postgres, "psql", "-U", "agentic_flow", "-d", "agentic_flow", "-At", "-c", query
    )
    assert said == "t"


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
