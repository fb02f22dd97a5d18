"""Containers of ours as tests run them: hardened, on a port of loopback, asked from outside."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine import Engine

Project = Callable[[], str]
"""Makes a name that a test's containers, networks and volumes begin with; see `conftest.project`."""

HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
PORTS = {"platform": 3000, "agentdb": 5432, "swarm": 9000, "worker": 9001}
START_TIMEOUT_S = 120.0
_KEY = re.compile(r"\baf_[0-9a-f]+_[A-Za-z0-9_-]{16,}")


@dataclass(frozen=True)
class Answer:
    """What a service answered; status 0: it could not be reached."""

    status: int
    text: str

    @property
    def data(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)


class Container:
    """A running container.

    Args:
        engine: Where it runs.
        name: Its name.
        service: One of PORTS.
    """

    def __init__(self, engine: Engine, name: str, service: str) -> None:
        self._engine = engine
        self.name = name
        self.service = service
        self.key: str | None = None

    @classmethod
    def run(
        cls,
        engine: Engine,
        name: str,
        image: str,
        service: str,
        *command: str,
        options: tuple[str, ...] = (),
        hardened: bool = True,
    ) -> Container:
        """Start a container whose port is published on loopback.

        Args:
            engine: Where it runs.
            name: Its name; begins with the test's project.
            image: Tag of the image.
            service: One of PORTS; its port is published.
            command: Words in place of the image's command.
            options: More options of `docker run`.
            hardened: Whether with a read-only root, without capabilities.
        """
        published = f"--publish=127.0.0.1::{PORTS[service]}"
        given = HARDENED if hardened else ()
        engine.run("run", "--detach", f"--name={name}", published, *given, *options, image, *command)
        return cls(engine, name, service)

    @property
    def url(self) -> str:
        """Where its port is on this machine; another one after each start."""
        place = self._engine.output("port", self.name, str(PORTS[self.service])).splitlines()[0]
        return f"http://{place}"

    def logs(self) -> str:
        """Everything that it said so far."""
        done = self._engine.run("logs", self.name)
        return done.stdout + done.stderr

    def state(self, what: str) -> str:
        """A field of its state, such as `.State.ExitCode`."""
        return self._engine.output("inspect", f"--format={{{{{what}}}}}", self.name)

    def exec(self, *words: str, check: bool = True) -> tuple[int, str]:
        """Run a command in it: exit code and output."""
        done = self._engine.run("exec", self.name, *words, check=check)
        return done.returncode, done.stdout + done.stderr

    def wait_ready(self) -> Container:
        """Wait until it says that it is ready; then with the owner's key, if it has made one."""
        end = time.monotonic() + START_TIMEOUT_S
        while (answer := self.call("GET", "/health/ready")).status != 200:
            if self.state(".State.Running") != "true" or time.monotonic() > end:
                raise AssertionError(f"{self.name} is not ready: {answer}\n{self.logs()[-6000:]}")
            time.sleep(0.1)
        if self.key is None and self.service != "worker":
            # The engine may pass on what was written before it was ready a little later.
            self.key = until(lambda: _KEY.search(self.logs()), "the owner's key", 60.0).group()
        return self

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = 60.0) -> Answer:
        """One request, with the owner's key when there is one."""
        try:
            url = self.url
        except RuntimeError:  # it has no port when it does not run
            return Answer(0, "no port")
        return call(url, method, path, body, key=self.key, timeout_s=timeout_s)

    def stop(self, grace_s: int = 30) -> int:
        """`docker stop`; its exit code."""
        self._engine.run("stop", f"--time={grace_s}", self.name, timeout_s=grace_s + 60)
        return int(self.state(".State.ExitCode"))

    def kill(self) -> None:
        """Kill it as `kill -9` does."""
        self._engine.run("kill", "--signal=KILL", self.name)

    def start(self) -> Container:
        """Start it again, with the same volumes."""
        self._engine.run("start", self.name)
        return self


def call(
    url: str, method: str, path: str, body: Any = None, *, key: str | None = None, timeout_s: float = 60.0
) -> Answer:
    """One request to a base URL."""
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data=content, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read().decode())
    except (OSError, http.client.HTTPException) as error:  # the latter: it died within its answer
        return Answer(0, repr(error))


@contextmanager
def paused(engine: Engine, container: str) -> Iterator[None]:
    """All processes of a container stand still."""
    # The kernel cannot always freeze processes at once on a busy machine; runc then gives up and thaws them.
    until(lambda: engine.run("pause", container, check=False).returncode == 0, f"the pause of {container}")
    try:
        yield
    finally:
        engine.run("unpause", container)


def until(what: Callable[[], Any], description: str, timeout_s: float = 120.0) -> Any:
    """The first true thing that `what` gives."""
    end = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {description}"
        time.sleep(0.1)
    return found
