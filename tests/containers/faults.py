"""What fault tests share: what a stack acknowledged, how it is made ill, how long it takes to show and heal.

Health is asked from outside, through the proxy, ten times a second: what is measured is when somebody who
looks at the health routes knows.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from stacks import Stack

from agentic_flow.client import Client
from agentic_flow.core.identity import new_key
from agentic_flow.deploy.compose import network_name
from agentic_flow.deploy.plan import checked_plan

SEEN_WITHIN_S = 5.0
HEALED_WITHIN_S = 60.0
"""Generous, for a busy machine; what is promised is 15 s, and the tests print what it took."""


def health(stack: Stack, port: int | None, *, timeout_s: float = 1.0) -> dict[str, Any]:
    """What `/health/ready` behind a published port says; of a silent one, an empty table."""
    try:
        _, body = stack.get(port, "/health/ready", timeout_s=timeout_s)
    except (urllib.error.URLError, OSError):
        return {}
    return body if isinstance(body, dict) else {}


def is_ready(stack: Stack, port: int | None) -> bool:
    """Whether a published port says so within a second."""
    return health(stack, port).get("status") == "ready"


def all_ready(stack: Stack) -> bool:
    """Whether every service of ours whose port is published says so."""
    ports = stack.spec.ports
    return all(is_ready(stack, port) for port in (ports.platform, ports.swarm, ports.agentdb) if port)


def until(condition: Callable[[], object], within_s: float, what: str) -> float:
    """Seconds until it holds."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, f"{what}: not within {within_s:g} s"
        time.sleep(0.1)
    return time.monotonic() - began_s


class Accepted:
    """Writes, runs and keys that the stack acknowledged, before and during a fault.

    Args:
        stack: Which one.
        runs: How many are accepted before the fault.
        agents: Of each run.
    """

    def __init__(self, stack: Stack, *, runs: int = 2, agents: int = 2) -> None:
        self._stack = stack
        self._runs = runs
        self._agents = agents
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self.items: list[str] = []
        self.runs: list[str] = []
        self.keys: list[str] = []
        self.refused: list[Any] = []
        """Bodies of answers to writes that were none."""

    def __enter__(self) -> Accepted:
        with self._stack.client() as client:
            self.runs = [self.submit(client) for _ in range(self._runs)]
        path = "/v1/namespaces/faults"
        until(lambda: self._asked(path, b"{}", method="PUT")[0] in (200, 201), 30, "a namespace to write to")
        self._thread.start()
        until(lambda: len(self.items) > 3, 30, "the first writes")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(40)

    def submit(self, client: Client) -> str:
        """Submit one more run and remember it once it is accepted."""
        return client.runs.submit("How are runs resumed?", input="/inputs/guides", agents=self._agents)

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
                status, said = self._asked("/v1/namespaces/faults/items", body, timeout_s=3.0)
            except (urllib.error.URLError, OSError):
                continue
            if status == 200:
                self.items.append(name)
            else:
                self.refused.append(said)
                self._stop.wait(0.05)

    def all_there(self) -> None:
        """Every one of them is found, and every run ends well."""
        missing: set[str] = set()
        for begin in range(0, len(self.items), 100):
            some = self.items[begin : begin + 100]
            status, found = self._asked("/v1/namespaces/faults/items/get", json.dumps({"ids": some}).encode())
            assert status == 200, found
            missing |= set(some) - {item["id"] for item in found["items"] if item}
        assert not missing
        platform = self._stack.spec.ports.platform
        assert all(self._stack.get(platform, "/v1/runs", key=key)[0] == 200 for key in self.keys)
        with self._stack.client() as client:
            for run in self.runs:
                result = client.runs.wait(run)
                assert result.state == "completed", result.error

    def _asked(self, path: str, body: bytes, **options: Any) -> tuple[int, Any]:
        ports = self._stack.spec.ports
        return self._stack.get(
            ports.platform, path, key=self._stack.secret("owner_key"), body=body, **options
        )


def fault_then_whole(
    stack: Stack, what: str, fault: AbstractContextManager[None], accepted: Accepted
) -> None:
    """Go through one fault: it shows in time, heals when its cause ends, and loses nothing accepted."""
    with accepted:
        with fault:
            seen_s = until(lambda: not all_ready(stack), SEEN_WITHIN_S, f"{what} seen")
        healed_s = until(lambda: all_ready(stack), HEALED_WITHIN_S, f"{what} healed")
        writes_s = healed_s + until(accepted.takes_writes, HEALED_WITHIN_S, f"{what}: writes again")
    tell(what, seen_s, healed_s, writes_s)
    accepted.all_there()


def tell(what: str, seen_s: float, healed_s: float, writes_s: float) -> None:
    """Print what a fault took."""
    print(
        f"{what}: seen after {seen_s:.1f} s; after its end ready in {healed_s:.1f} s, "
        f"writes acknowledged in {writes_s:.1f} s"
    )


@contextmanager
def killed(stack: Stack, service: str) -> Iterator[None]:
    """Its first process dies, as by a fault of its own: Docker's own kill would count as a stop."""
    container = stack.containers(service)[0]
    os.kill(int(stack.engine.output("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)
    yield


@contextmanager
def down(stack: Stack, service: str) -> Iterator[None]:
    """It is killed by somebody's hand, and so stays dead until it is started."""
    container = stack.containers(service)[0]
    stack.engine.run("kill", container)
    try:
        yield
    finally:
        stack.engine.run("start", container)


@contextmanager
def paused(stack: Stack, service: str) -> Iterator[None]:
    """All its processes stand still."""
    container = stack.containers(service)[0]
    # The kernel cannot always freeze processes at once on a busy machine; runc then gives up and thaws them.
    until(lambda: stack.engine.run("pause", container, check=False).returncode == 0, 30, "the pause")
    try:
        yield
    finally:
        stack.engine.run("unpause", container)


@contextmanager
def cut_off(stack: Stack, service: str) -> Iterator[None]:
    """It is taken off the networks that it shares with other services."""
    container = stack.containers(service)[0]
    groups = [group for group in checked_plan(stack.spec).networks if service in group]
    names = [f"{stack.project}_{network_name(group)}" for group in groups]
    for name in names:
        stack.engine.run("network", "disconnect", name, container)
    try:
        yield
    finally:
        for name in names:
            stack.engine.run("network", "connect", "--alias", service, name, container)


FAULTS = {"kill": killed, "down": down, "pause": paused, "partition": cut_off}
