"""What faults are tried with: stacks, what they acknowledged, how they are made ill, how soon that heals.

Health is asked from outside, through the proxy, ten times a second: what is measured is when somebody who
looks at the health routes knows.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import container as containers
from engine import Engine
from images import Images
from stacks import Stack, prepare, spec_with_free_ports

from agentic_flow.client import Client
from agentic_flow.core.errors import CircuitOpen
from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.plan import checked_plan

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("platform", "agentdb", "swarm")
ON_POSTGRESQL: dict[str, Any] = {
    "store": "postgresql",
    "services": {**{name: {} for name in SERVICES}, "worker": {"replicas": 2}},
}
"""Of a stack's description."""

UNANSWERED = (OSError, http.client.HTTPException)
"""What a request raises whose server is away, silent, or dies within its answer."""

SEEN_WITHIN_S = 20.0
HEALED_WITHIN_S = 120.0
"""Both generous, for a busy machine; what is promised is 5 s and 15 s, and the tests print what it took."""


def health(stack: Stack, port: int | None, *, timeout_s: float = 1.0) -> dict[str, Any]:
    """What `/health/ready` behind a published port says; of a silent one, an empty table."""
    try:
        _, body = stack.get(port, "/health/ready", timeout_s=timeout_s)
    except UNANSWERED:
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


def beginning(stack: Stack, service: str) -> Callable[[], bool]:
    """Whether the service's container has begun anew since this was called."""
    container = stack.containers(service)[0]

    def started_at() -> str:
        return stack.engine.output("inspect", "--format={{.State.StartedAt}}", container)

    before = started_at()
    return lambda: started_at() != before


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
            until(lambda: self._is_accepted(client), HEALED_WITHIN_S, "the first run")
            while len(self.runs) < self._runs:
                self.runs.append(self.submit(client))
        path = "/v1/namespaces/faults"
        until(lambda: self._asked(path, b"{}", method="PUT")[0] in (200, 201), HEALED_WITHIN_S, "a namespace")
        self._thread.start()
        until(lambda: len(self.items) > 3, HEALED_WITHIN_S, "the first writes")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(40)

    def submit(self, client: Client) -> str:
        """Submit one more run and remember it once it is accepted."""
        return client.runs.submit("How are runs resumed?", input="/inputs/guides", agents=self._agents)

    def _is_accepted(self, client: Client) -> bool:
        """Whether a run is, or a circuit that the fault before this one opened is still to close."""
        try:
            self.runs.append(self.submit(client))
        except CircuitOpen:
            return False
        return True

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
            except UNANSWERED:
                continue
            if status == 200:
                self.items.append(name)
            else:
                self.refused.append(said)
                self._stop.wait(0.05)

    def all_there(self) -> None:
        """Every one of them is found, and every run ends well and has left its trajectory."""
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
                path = f"/v1/memory/trajectories/{run}"
                status, kept = self._stack.get(platform, path, key=self._stack.secret("owner_key"))
                assert (status, kept["outcome"]) == (200, "completed"), kept

    def _asked(self, path: str, body: bytes, **options: Any) -> tuple[int, Any]:
        ports = self._stack.spec.ports
        return self._stack.get(
            ports.platform, path, key=self._stack.secret("owner_key"), body=body, **options
        )


class Took(NamedTuple):
    """Seconds until a fault was seen, and after its end until all was ready and until writes were taken."""

    what: str
    seen_s: float
    healed_s: float
    writes_s: float

    def tell(self) -> None:
        """Print it."""
        print(
            f"{self.what}: seen after {self.seen_s:.1f} s; after its end ready in {self.healed_s:.1f} s, "
            f"writes acknowledged in {self.writes_s:.1f} s"
        )


def healed(stack: Stack, accepted: Accepted, what: str, seen_s: float) -> Took:
    """Once its cause has ended: wait until everything is ready and takes writes again."""
    healed_s = until(lambda: all_ready(stack), HEALED_WITHIN_S, f"{what} healed")
    writes_s = healed_s + until(accepted.takes_writes, HEALED_WITHIN_S, f"{what}: writes again")
    return Took(what, seen_s, healed_s, writes_s)


def fault_then_whole(stack: Stack, fault: str, service: str) -> Took:
    """Go through one fault: it shows in time, heals when its cause ends, and loses nothing accepted."""
    until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready before the fault")
    what = f"{fault} of {service}"
    has_begun_anew = beginning(stack, service)
    with Accepted(stack) as accepted:
        with FAULTS[fault](stack, service):
            # On a busy machine one that was killed is well again before anybody looks.
            seen_s = until(lambda: not all_ready(stack) or has_begun_anew(), SEEN_WITHIN_S, f"{what} seen")
        took = healed(stack, accepted, what, seen_s)
    accepted.all_there()
    took.tell()
    return took


def database_fault_then_whole(stack: Stack, fault: str) -> tuple[Took, dict[str, set[str]]]:
    """The same with the database, which each service has to miss; also the checks that failed at each."""
    until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready before the fault")
    what = f"{fault} of postgres"

    def failing_at(name: str) -> set[str]:
        failing: set[str] = set()

        def said() -> set[str]:
            failing.update(health(stack, getattr(stack.spec.ports, name), timeout_s=10.0).get("failing", ()))
            return failing

        until(said, SEEN_WITHIN_S, f"{what} seen by {name}")
        return failing

    with Accepted(stack, runs=3, agents=4) as accepted:
        with FAULTS[fault](stack, "postgres"), ThreadPoolExecutor(len(SERVICES)) as asking:
            began_s = time.monotonic()
            failing = dict(zip(SERVICES, asking.map(failing_at, SERVICES), strict=True))
            seen_s = time.monotonic() - began_s
        took = healed(stack, accepted, what, seen_s)
    accepted.all_there()
    took.tell()
    return took, failing


def database_death_then_whole(stack: Stack) -> Took:
    """The database dies and is started again, perhaps before anybody missed it. Seen is its new start."""
    until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready before the fault")
    has_begun_anew = beginning(stack, "postgres")
    with Accepted(stack, runs=3, agents=4) as accepted:
        with killed(stack, "postgres"):
            seen_s = until(has_begun_anew, SEEN_WITHIN_S, "the database starts again")
        took = healed(stack, accepted, "kill of postgres", seen_s)
    accepted.all_there()
    took.tell()
    return took


def death_of_all_then_whole(stack: Stack) -> Took:
    """Every container is killed by the engine; `agentic-flow up` starts them again, and that is the end."""
    until(lambda: all_ready(stack), HEALED_WITHIN_S, "ready before the fault")
    with Accepted(stack, runs=4, agents=4) as accepted:
        stack.engine.run("kill", *stack.containers())
        seen_s = until(lambda: not all_ready(stack), SEEN_WITHIN_S, "the death of all seen")
        started_s = time.monotonic()
        done = agentic_flow(stack, "up", "--spec", "spec.json.yaml", "--dir", stack.folder, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        up_s = time.monotonic() - started_s
        rest = healed(stack, accepted, "the rest of it", seen_s)
    accepted.all_there()
    what = "kill of the whole stack (its end: `agentic-flow up`)"
    took = Took(what, seen_s, up_s + rest.healed_s, up_s + rest.writes_s)
    took.tell()
    return took


def agentic_flow(stack: Stack, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of ours, beside the stack, which its own description names."""
    (stack.folder / "spec.json.yaml").write_text(json.dumps(stack.spec.model_dump(mode="json")), "utf-8")
    return subprocess.run(
        [sys.executable, "-m", "agentic_flow", *map(str, words)],
        cwd=stack.folder,
        env={**stack.engine.environment, "AGENTIC_FLOW_DATA_DIR": str(stack.folder / "client")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@contextmanager
def main_stack(engine: Engine, images: Images, folder: Path) -> Iterator[Stack]:
    """The main stack, healthy, with something to ask about; removed at the end."""
    spec = spec_with_free_ports(name=f"af-faults-{new_key().id}")
    with running(prepare(engine, images, spec.name, folder, spec, (compose.MAIN,))) as stack:
        yield stack


@contextmanager
def postgres_stack(engine: Engine, images: Images, folder: Path) -> Iterator[Stack]:
    """PostgreSQL, the three services, two workers and the proxy, likewise."""
    spec = spec_with_free_ports("agentdb", name=f"af-postgres-{new_key().id}", **ON_POSTGRESQL)
    with running(prepare(engine, images, spec.name, folder, spec, compose.files_of(spec))) as stack:
        yield stack


@contextmanager
def running(stack: Stack, begin: Callable[[], None] = lambda: None) -> Iterator[Stack]:
    """A prepared stack, healthy, with something to ask about; removed at the end, also what `begin` made."""
    from conftest import remove_project

    shutil.copytree(ROOT / "docs" / "guides", stack.folder / "inputs" / "guides")
    try:
        begin()
        stack.up()
        yield stack
    finally:
        remove_project(stack.engine, stack.project)


@contextmanager
def killed(stack: Stack, service: str) -> Iterator[None]:
    """Its first process dies, as by a fault of its own: Docker's own kill would count as a stop.

    It is killed from another container, which sees the engine's processes: the engine may be elsewhere.
    """
    container = stack.containers(service)[0]
    pid, image = stack.engine.output("inspect", "--format", "{{.State.Pid}} {{.Image}}", container).split()
    stack.engine.run(
        "run", "--rm", "--pid=host", "--user=0", "--network=none", "--no-healthcheck",
        "--entrypoint=sh", image, "-c", f"kill -9 {pid}",
    )  # fmt: skip
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
    with containers.paused(stack.engine, stack.containers(service)[0]):
        yield


@contextmanager
def cut_off(stack: Stack, service: str) -> Iterator[None]:
    """It is taken off the networks that it shares with other services."""
    container = stack.containers(service)[0]
    groups = [group for group in checked_plan(stack.spec).networks if service in group]
    names = [f"{stack.project}_{compose.network_name(group)}" for group in groups]
    for name in names:
        stack.engine.run("network", "disconnect", name, container)
    try:
        yield
    finally:
        for name in names:
            stack.engine.run("network", "connect", "--alias", service, name, container)


FAULTS = {"kill": killed, "down": down, "pause": paused, "partition": cut_off}
