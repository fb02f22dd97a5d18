"""Stacks from the rendered files, as an operator without our commands would run them: Compose alone.

A `Stack` is a folder with the files of a spec, its certificates and secrets, and a Compose project.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import Engine
from images import TAG, Images

from agentic_flow.client import Client
from agentic_flow.core.settings import load
from agentic_flow.deploy import compose, render, secret_files
from agentic_flow.deploy.certs import CertificateFolder
from agentic_flow.deploy.parts import Secret
from agentic_flow.deploy.spec import StackSpec

ROOT = Path(__file__).resolve().parents[2]
HEALTHY_WITHIN_S = 60.0
"""A stack is up and healthy within this time, or the test fails: what the documents promise. They mean a
machine with nothing else to do; of another it is as many times longer as its processors are asked for."""
UP_TIMEOUT_S = 300


@dataclass
class Stack:
    """The files of one stack in a folder, and Compose on them.

    Args:
        engine: Where it runs.
        project: Name of the Compose project; the fixture `project` removes what bears it.
        folder: Where its files are.
        spec: What it is.
        files: The Compose files, in the order of `-f`.
        variables: The operator's environment.
    """

    engine: Engine
    project: str
    folder: Path
    spec: StackSpec
    files: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    up_s: float = 0.0

    def compose(self, *words: str, check: bool = True, timeout_s: float = 180.0) -> str:
        """`docker compose WORDS…`; what it printed, on both streams."""
        files = [word for name in self.files for word in ("--file", name)]
        done = self.engine.run(
            "compose", "--project-name", self.project, *files, *words,
            directory=self.folder, environment=self.variables, timeout_s=timeout_s, check=check,
        )  # fmt: skip
        return done.stdout + done.stderr

    def up(self, *services: str) -> None:
        """Start it and wait until all of it is healthy, which takes as long as is promised at most."""
        began_s = time.monotonic()
        done = self.compose(
            *("up", "--detach", "--wait", f"--wait-timeout={UP_TIMEOUT_S}", *services),
            check=False,
            timeout_s=UP_TIMEOUT_S + 60,
        )
        self.up_s = time.monotonic() - began_s
        states = [one["State"] + one["Health"] for one in self.states()]
        well = all(state in ("running", "runninghealthy") for state in states)
        assert states, done
        assert well, f"{done}\n{states}\n{self.logs()[-6000:]}"
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert self.up_s <= HEALTHY_WITHIN_S * busy, f"healthy after {self.up_s:.0f} s"
        print(f"{self.project} ({' '.join(self.files)}): healthy after {self.up_s:.1f} s")

    def states(self) -> list[dict[str, Any]]:
        """Its containers as `docker compose ps` tells them."""
        done = self.compose("ps", "--all", "--format", "json")
        return [json.loads(line) for line in done.splitlines() if line.startswith("{")]

    def containers(self, service: str = "") -> list[str]:
        """Ids of its containers, or of one service's."""
        return self.compose("ps", "--all", "--quiet", *([service] if service else [])).split()

    def inspected(self) -> list[dict[str, Any]]:
        """Everything that the engine tells of its containers."""
        return list(json.loads(self.engine.output("inspect", *self.containers())))

    def logs(self, *services: str) -> str:
        """What its containers wrote."""
        return self.compose("logs", "--no-color", *services, check=False)

    def secret(self, name: str) -> str:
        """A secret of it."""
        return (self.folder / "secrets" / name).read_text("utf-8").strip()

    def rotate(self, name: str, value: str) -> None:
        """Give a secret another value, as its file's documentation says."""
        secret_files.write_in_place(self.folder / "secrets" / name, f"{value}\n".encode())

    def url(self, port: int | None) -> str:
        """Address of a published port."""
        return f"https://localhost:{port}"

    def client(self, port: int | None = None) -> Client:
        """A client outside, with the owner's key."""
        nowhere = self.folder / "nowhere"
        flags = {
            "tls.ca_file": str(self.folder / "certs" / "ca.crt"),
            "data_dir": str(self.folder / "client"),
        }
        settings = load(flags, environ={}, directory=nowhere, user_config=nowhere).settings
        return Client(
            self.url(port or self.spec.ports.platform), token=self.secret("owner_key"), settings=settings
        )

    def get(
        self,
        port: int | None,
        path: str,
        *,
        key: str | None = None,
        body: bytes | None = None,
        method: str | None = None,
        timeout_s: float = 30.0,
    ) -> tuple[int, Any]:
        """Status and parsed body of a request from outside; with a JSON body it is a POST by default."""
        context = ssl.create_default_context(cafile=str(self.folder / "certs" / "ca.crt"))
        request = urllib.request.Request(f"{self.url(port)}{path}", data=body, method=method)
        if body is not None:
            request.add_header("content-type", "application/json")
        if key is not None:
            request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, context=context, timeout=timeout_s) as answer:
                status, said = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, said = error.code, error.read()
        try:
            return status, json.loads(said)
        except ValueError:
            return status, said.decode()

    def override(self, services: Mapping[str, Any], **more: Mapping[str, Any]) -> None:
        """Lay a file of the test over the others; `more`: its other sections, such as volumes."""
        name = "compose.test.yaml"
        (self.folder / name).write_text(json.dumps({"services": services, **more}), "utf-8")  # JSON is YAML
        self.files = (*self.files, name)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each another: they are held until all are known."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def spec_with_free_ports(*more: str, **changes: Any) -> StackSpec:
    """The default spec on ports of its own, with the images of the suite; `more`: ports that are published
    only when asked for (agentdb)."""
    names = ("platform", "swarm", "metrics", "claude", "llama", "deepseek", *more)
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return StackSpec.model_validate({"ports": ports, "images": {"tag": TAG}, **changes})


def prepare(
    engine: Engine,
    images: Images,
    project: str,
    folder: Path,
    spec: StackSpec,
    files: Sequence[str],
    *,
    targets: Sequence[str] = ("platform", "agentdb", "swarm"),
    variables: Mapping[str, str] | None = None,
) -> Stack:
    """A stack that only needs to be started: images, files, certificates and secrets.

    Keys of providers are made up; each is a word of its own, so that a leak shows.
    """
    for target in targets:
        images(target)
    rendered = render.render("compose", spec)
    render.write_files(folder, rendered)
    (folder / "inputs").mkdir(exist_ok=True)
    stack = Stack(engine, project, folder, spec, files, variables or {})
    merged = json.loads(stack.compose("config", "--format", "json"))
    named = {Path(one["file"]) for one in merged.get("secrets", {}).values()}
    certificates = sorted(path.stem for path in named if path.suffix == ".key")
    if certificates:
        CertificateFolder(folder / compose.CERTIFICATES_DIR, mounted=True).init(certificates)
    wanted = tuple(_secret(path.name) for path in sorted(named) if path.parent.name == compose.SECRETS_DIR)
    secret_files.make_missing(
        folder / compose.SECRETS_DIR, wanted, lambda provider: f"sk-{provider}-{secrets.token_hex(12)}"
    )
    return stack


def _secret(name: str) -> Secret:
    kinds = {"postgres_password": "password", "database_url": "database_url"}
    kind = kinds.get(name) or ("provider_key" if name.endswith("_api_key") else "api_key")
    return Secret(name, kind)  # pyright: ignore[reportArgumentType]


def assert_no_secret_shows(stack: Stack) -> None:
    """No secret of the stack is in what the engine tells of its containers, in their logs or their images."""
    told = {
        "inspect": json.dumps(stack.inspected()),
        "logs": stack.logs(),
        "images": "\n".join(
            stack.engine.output("image", "history", "--no-trunc", one["Image"])
            + stack.engine.output("image", "inspect", one["Image"])
            for one in stack.inspected()
        ),
    }
    for file in (stack.folder / "secrets").iterdir():
        value = file.read_text("utf-8").strip()
        for where, text in told.items():
            assert value not in text, f"{file.name} shows in {where}"
