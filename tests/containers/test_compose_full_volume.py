"""A volume without room: told by the health routes, refused with a typed error, and well again by itself once
there is room, with all that was acknowledged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from faults import (
    HEALED_WITHIN_S,
    ON_POSTGRESQL,
    SEEN_WITHIN_S,
    Accepted,
    Took,
    agentic_flow,
    all_ready,
    healed,
    health,
    running,
    until,
)
from images import Images
from stacks import Stack, prepare, spec_with_free_ports

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.engine import Engine as DockerCommand
from agentic_flow.deploy.parts import FILES_GROUP
from agentic_flow.deploy.plan import VOLUMES
from agentic_flow.deploy.stack import Stack as DeployedStack

SIZE_MIB, DATABASE_SIZE_MIB = 96, 320
REFUSED_WITHIN_S = 30.0
FILL = "for size in 64k 4k 512; do dd if=/dev/zero bs=$size >> /volume/ballast 2>/dev/null; done; true"
POSTGRES_USER = 999  # of the published image


def holder(stack: Stack, volume: str) -> str:
    """The container that holds a volume, so that it outlives the service, and fills it."""
    return f"{stack.project}-holds-{volume}"


@contextmanager
def on_small_volumes(
    stack: Stack, image: str, volumes: Collection[str], size_mib: int, owner: int
) -> Iterator[Stack]:
    """The stack, healthy, with volumes that hold no more than a little."""
    options = f"size={size_mib}m,uid={owner},gid={owner},mode=0750"
    small = {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": options}}
    stack.override({}, volumes=dict.fromkeys(volumes, small))

    def hold() -> None:
        stack.compose("create")
        for volume in volumes:
            mount = f"--volume={stack.project}_{volume}:/volume"
            stack.engine.run(
                "run", "--detach", f"--name={holder(stack, volume)}", mount, "--user=0",
                "--entrypoint=sleep", "--no-healthcheck", image, "infinity",
            )  # fmt: skip

    with running(stack, hold):
        yield stack


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack on small volumes, AgentDB's port published too."""
    spec = spec_with_free_ports("agentdb", name=f"af-full-{new_key().id}")
    made = prepare(engine, images, spec.name, tmp_path_factory.mktemp("full"), spec, (compose.MAIN,))
    with on_small_volumes(made, images("swarm"), VOLUMES.values(), SIZE_MIB, FILES_GROUP):
        yield made


@contextmanager
def full(stack: Stack, volume: str) -> Iterator[None]:
    """A file of somebody else's takes all its room."""
    stack.engine.run("exec", holder(stack, volume), "sh", "-c", FILL)
    try:
        yield
    finally:
        stack.engine.run("exec", holder(stack, volume), "rm", "/volume/ballast")


def refusal_of_items(stack: Stack, accepted: Accepted) -> Any:
    """The answer to a write of an item that was refused since the last time; None: there was none."""
    accepted.refused.clear()
    time.sleep(0.3)
    return accepted.refused[-1] if accepted.refused else None


def refusal_of_runs(stack: Stack, accepted: Accepted) -> Any:
    """What became of one more run: None when it was accepted, and then it must end."""
    with stack.client() as client:
        try:
            accepted.runs.append(accepted.submit(client))
        except AgenticFlowError as error:
            return {"code": error.code, "hint": error.hint, "detail": error.message}
    return None


def refusal_of_keys(stack: Stack, accepted: Accepted) -> Any:
    """What became of one more key: None when it was made, and then it must let its bearer in."""
    status, body = stack.get(
        stack.spec.ports.platform,
        "/v1/keys",
        key=stack.secret("owner_key"),
        body=b'{"subject": "test", "scopes": ["runs:read"]}',
    )
    if status >= 400:
        return body
    accepted.keys.append(body["key"])
    return None


REFUSALS: dict[str, Callable[[Stack, Accepted], Any]] = {
    "agentdb": refusal_of_items,
    "swarm": refusal_of_runs,
    "platform": refusal_of_keys,
}


def examined(stack: Stack) -> dict[str, dict[str, Any]]:
    """What `agentic-flow doctor --stack` finds, by name."""
    DeployedStack(stack.folder, stack.spec, DockerCommand()).remember()
    done = agentic_flow(stack, "doctor", "--stack", "--dir", stack.folder, "--json")
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize("service", REFUSALS)
def test_a_full_volume_is_told_refused_and_heals(stack: Stack, service: str) -> None:
    """Catches a full disk behind a green health route, a write that is acknowledged and lost, an error
    without a way out, and a service that stays broken when there is room again."""
    until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready before the fault")
    before = {one["Id"]: one["State"]["StartedAt"] for one in stack.inspected()}
    port = getattr(stack.spec.ports, service)
    with Accepted(stack, runs=3, agents=4) as accepted:
        refusals: list[Any] = []

        def is_refused() -> bool:
            told = REFUSALS[service](stack, accepted)
            refusals.extend([told] if told else [])
            return bool(told)

        with full(stack, VOLUMES[service]):
            seen_s = until(lambda: "disk" in health(stack, port).get("failing", ()), SEEN_WITHIN_S, "full")
            until(is_refused, REFUSED_WITHIN_S, "a write refused")
            checks = examined(stack)
            assert checks[f"data of {service}"]["state"] == "broken", checks
            assert "make room" in checks[f"data of {service}"]["hint"]
            for other in set(REFUSALS) - {service}:
                assert checks[f"data of {other}"]["state"] == "ok", checks
                assert "disk" not in health(stack, getattr(stack.spec.ports, other)).get("failing", ())
        healed_s = until(lambda: all_ready(stack), HEALED_WITHIN_S, "well again")
        until(lambda: not REFUSALS[service](stack, accepted), HEALED_WITHIN_S, "taken again")
        writes_s = healed_s + until(accepted.takes_writes, HEALED_WITHIN_S, "writes again")
    Took(f"full volume of {service}", seen_s, healed_s, writes_s).tell()
    assert refusals[-1]["code"] == "storage_full", refusals[-1]
    assert "make room" in refusals[-1]["hint"], refusals[-1]
    accepted.all_there()
    assert {one["Id"]: one["State"]["StartedAt"] for one in stack.inspected()} == before, (
        "nobody was restarted"
    )


def test_a_full_volume_of_the_database_loses_nothing(engine: Engine, images: Images, tmp_path: Path) -> None:
    """Catches a write that is acknowledged and lost because PostgreSQL has no room, an error that does not
    say so, services that call themselves ready meanwhile, and that stay broken when there is room again."""
    spec = spec_with_free_ports("agentdb", name=f"af-full-{new_key().id}", **ON_POSTGRESQL)
    made = prepare(engine, images, spec.name, tmp_path, spec, compose.files_of(spec))
    with (
        on_small_volumes(
            made, images("swarm"), ("postgres-data",), DATABASE_SIZE_MIB, POSTGRES_USER
        ) as stack,
        Accepted(stack, runs=3, agents=4) as accepted,
    ):
        with full(stack, "postgres-data"):

            def seen_by(service: str, check: str) -> float:
                until(lambda: REFUSALS[service](stack, accepted), REFUSED_WITHIN_S, f"{service} refuses")
                return until(lambda: check in failing_at(stack, service), SEEN_WITHIN_S, f"{service} says so")

            seen_s = max(seen_by("agentdb", "database"), seen_by("swarm", "run database"))
            assert accepted.refused[-1]["code"] == "storage_full", accepted.refused[-1]
        healed(stack, accepted, "full volume of postgres", seen_s).tell()
        accepted.all_there()


def failing_at(stack: Stack, service: str) -> Collection[str]:
    """What a service says that it misses."""
    return health(stack, getattr(stack.spec.ports, service)).get("failing", ())
