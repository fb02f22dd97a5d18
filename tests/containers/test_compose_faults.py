"""Faults of the main stack: each shows on the health routes, heals by itself, and loses nothing accepted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine import Engine
from images import Images
from stacks import Stack, prepare, spec_with_free_ports

from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.compose import network_name
from agentic_flow.deploy.plan import checked_plan
from conftest import remove_project

ROOT = Path(__file__).resolve().parents[2]
SEEN_WITHIN_S = 5.0
HEALED_WITHIN_S = 60.0
"""Generous, for a busy machine; what is promised is 15 s, and the test prints what it took."""
SERVICES = ("platform", "agentdb", "swarm")


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The main stack, healthy, with something to ask about."""
    if not engine.own:
        pytest.skip("a process is killed by its number on this machine: the engine must run on it")
    project, folder = f"af-faults-{new_key().id}", tmp_path_factory.mktemp("faults")
    made = prepare(engine, images, project, folder, spec_with_free_ports(), (compose.MAIN,))
    shutil.copytree(ROOT / "docs" / "guides", folder / "inputs" / "guides")
    try:
        made.up()
        yield made
    finally:
        remove_project(engine, project)


def is_ready(stack: Stack, port: int | None) -> bool:
    """Whether a published port says so within a second."""
    try:
        return stack.get(port, "/health/ready", timeout_s=1.0)[0] == 200
    except (urllib.error.URLError, OSError):
        return False


def all_ready(stack: Stack) -> bool:
    return all(is_ready(stack, port) for port in (stack.spec.ports.platform, stack.spec.ports.swarm))


def until(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """Seconds until it holds."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, f"{what}: not within {within_s:g} s"
        time.sleep(0.1)
    return time.monotonic() - began_s


class Accepted:
    """Writes and runs that the stack acknowledged, before and during a fault."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self.items: list[str] = []
        self.runs: list[str] = []

    def __enter__(self) -> Accepted:
        with self._stack.client() as client:
            self.runs = [
                client.runs.submit("How are runs resumed?", input="/inputs/guides", agents=2)
                for _ in range(2)
            ]
        port, key = self._stack.spec.ports.platform, self._stack.secret("owner_key")
        path = "/v1/namespaces/faults"
        until(
            lambda: self._stack.get(port, path, key=key, body=b"{}", method="PUT")[0] in (200, 201),
            30,
            "a namespace to write to",
        )
        self._thread.start()
        until(lambda: len(self.items) > 3, 30, "the first writes")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(40)

    def takes_writes(self) -> bool:
        """Whether a write is acknowledged again: breakers between services close a little later than they are
        healthy."""
        before = len(self.items)
        time.sleep(0.3)
        return len(self.items) > before

    def _write(self) -> None:
        while not self._stop.is_set():
            name = f"item-{new_key().id}"
            body = json.dumps({"items": [{"id": name, "text": f"the item {name}"}]}).encode()
            try:
                status, _ = self._stack.get(
                    self._stack.spec.ports.platform,
                    "/v1/namespaces/faults/items",
                    key=self._stack.secret("owner_key"),
                    body=body,
                    timeout_s=3.0,
                )
            except (urllib.error.URLError, OSError):
                continue
            if status == 200:
                self.items.append(name)

    def all_there(self) -> None:
        """Every one of them is found, and every run ends well."""
        body = json.dumps({"ids": self.items}).encode()
        status, found = self._stack.get(
            self._stack.spec.ports.platform,
            "/v1/namespaces/faults/items/get",
            key=self._stack.secret("owner_key"),
            body=body,
        )
        assert status == 200, found
        missing = set(self.items) - {item["id"] for item in found["items"] if item}
        assert not missing
        with self._stack.client() as client:
            for run in self.runs:
                result = client.runs.wait(run)
                assert result.state == "completed", result.error


@contextmanager
def killed(stack: Stack, service: str) -> Iterator[None]:
    """Its first process dies, as by a fault of its own: Docker's own kill would count as a stop."""
    (container,) = stack.containers(service)
    os.kill(int(stack.engine.output("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)
    yield


@contextmanager
def paused(stack: Stack, service: str) -> Iterator[None]:
    """All its processes stand still."""
    (container,) = stack.containers(service)
    # The kernel cannot always freeze processes at once on a busy machine; runc then gives up and thaws them.
    until(lambda: stack.engine.run("pause", container, check=False).returncode == 0, 30, "the pause")
    try:
        yield
    finally:
        stack.engine.run("unpause", container)


@contextmanager
def cut_off(stack: Stack, service: str) -> Iterator[None]:
    """It is taken off the networks that it shares with other services."""
    (container,) = stack.containers(service)
    groups = [group for group in checked_plan(stack.spec).networks if service in group]
    names = [f"{stack.project}_{network_name(group)}" for group in groups]
    for name in names:
        stack.engine.run("network", "disconnect", name, container)
    try:
        yield
    finally:
        for name in names:
            stack.engine.run("network", "connect", "--alias", service, name, container)


FAULTS = {"kill": killed, "pause": paused, "partition": cut_off}
CASES = [(fault, name) for fault in FAULTS for name in SERVICES]


@pytest.mark.parametrize(("fault", "service"), CASES)
def test_a_fault_is_seen_heals_and_loses_nothing(stack: Stack, fault: str, service: str) -> None:
    """Catches a fault that health hides, that stays when its cause has gone, or that loses something."""
    until(lambda: all_ready(stack), 60, "ready before the fault")
    with Accepted(stack) as accepted:
        with FAULTS[fault](stack, service):
            seen_s = until(lambda: not all_ready(stack), SEEN_WITHIN_S, f"{fault} of {service} seen")
        healed_s = until(lambda: all_ready(stack), HEALED_WITHIN_S, f"{fault} of {service} healed")
        writes_s = healed_s + until(accepted.takes_writes, HEALED_WITHIN_S, "writes again")
    print(
        f"{fault} of {service}: seen after {seen_s:.1f} s; after its end ready in {healed_s:.1f} s, "
        f"writes acknowledged in {writes_s:.1f} s"
    )
    accepted.all_there()
