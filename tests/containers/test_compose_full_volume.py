"""A volume without room: told by the health routes, refused with a typed error, and well again by itself once
there is room, with all that was acknowledged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from faults import HEALED_WITHIN_S, SEEN_WITHIN_S, Accepted, Took, all_ready, health, until
from images import Images
from stacks import Stack, prepare, spec_with_free_ports

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.parts import FILES_GROUP
from agentic_flow.deploy.plan import VOLUMES
from conftest import remove_project

ROOT = Path(__file__).resolve().parents[2]
SIZE_MIB = 96
REFUSED_WITHIN_S = 30.0
FILL = "for size in 64k 4k 512; do dd if=/dev/zero bs=$size >> /volume/ballast 2>/dev/null; done; true"


def holder(stack: Stack, service: str) -> str:
    """The container that holds a service's volume, so that it outlives the service, and fills it."""
    return f"{stack.project}-holds-{VOLUMES[service]}"


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack on volumes that hold no more than a little, healthy, AgentDB's port published too."""
    project, folder = f"af-full-{new_key().id}", tmp_path_factory.mktemp("full")
    spec = spec_with_free_ports("agentdb", name=project)
    made = prepare(engine, images, project, folder, spec, (compose.MAIN,))
    shutil.copytree(ROOT / "docs" / "guides", folder / "inputs" / "guides")
    options = f"size={SIZE_MIB}m,uid={FILES_GROUP},gid={FILES_GROUP},mode=0750"
    small = {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": options}}
    made.override({}, volumes=dict.fromkeys(VOLUMES.values(), small))
    try:
        made.compose("create")
        for service, volume in VOLUMES.items():
            engine.run(
                "run", "--detach", f"--name={holder(made, service)}", f"--volume={project}_{volume}:/volume",
                "--entrypoint=sleep", "--no-healthcheck", images("swarm"), "infinity",
            )  # fmt: skip
        made.up()
        yield made
    finally:
        remove_project(engine, project)


@contextmanager
def full(stack: Stack, service: str) -> Iterator[None]:
    """A file of somebody else's takes all the room of its volume."""
    stack.engine.run("exec", holder(stack, service), "sh", "-c", FILL)
    try:
        yield
    finally:
        stack.engine.run("exec", holder(stack, service), "rm", "/volume/ballast")


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


@pytest.mark.parametrize("service", REFUSALS)
def test_a_full_volume_is_told_refused_and_heals(stack: Stack, service: str) -> None:
    """Catches a full disk behind a green health route, a write that is acknowledged and lost, an error
    without a way out, and a service that stays broken when there is room again."""
    until(lambda: all_ready(stack), 60, "ready before the fault")
    before = {one["Id"]: one["State"]["StartedAt"] for one in stack.inspected()}
    port = getattr(stack.spec.ports, service)
    with Accepted(stack, runs=3, agents=4) as accepted:
        refusals: list[Any] = []

        def is_refused() -> bool:
            told = REFUSALS[service](stack, accepted)
            refusals.extend([told] if told else [])
            return bool(told)

        with full(stack, service):
            seen_s = until(lambda: "disk" in health(stack, port).get("failing", ()), SEEN_WITHIN_S, "full")
            until(is_refused, REFUSED_WITHIN_S, "a write refused")
            for other in set(REFUSALS) - {service}:
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
