"""A stack as its operator meets it: a folder of its own, commands of ours as child processes, a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from engine import Engine
from images import TAG
from stacks import free_ports

from command_done import Done

COMMAND_TIMEOUT_S = 400.0


class StackPlace:
    """One stack of the images under test.

    Args:
        folder: An empty folder.
        engine: Whose environment the commands get.
        project: Name of the stack.
        spec: More of its description.
    """

    def __init__(self, folder: Path, engine: Engine, project: str, **spec: Any) -> None:
        self.folder = folder
        self.stack = folder / "stack"
        self.engine = engine
        self.project = project
        self.ports = dict(zip(("platform", "swarm"), free_ports(2), strict=True)) | spec.pop("ports", {})
        self.spec = {
            "name": project,
            "images": {"tag": TAG},
            "ports": self.ports,
            **spec,
        }
        self.write_spec()
        self.environment = {
            **{k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "TMPDIR")},
            **engine.environment,
            "HOME": str(folder),
            "AGENTIC_FLOW_DATA_DIR": str(folder / "data"),
        }

    def write_spec(self, **changes: Any) -> None:
        """Write the description, with changes."""
        self.spec |= changes
        (self.folder / "spec.yaml").write_text(yaml.safe_dump(self.spec))

    @property
    def url(self) -> str:
        """Where clients find the platform."""
        return f"https://localhost:{self.ports['platform']}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What `up` tells people to set."""
        return {
            "AGENTIC_FLOW_PEERS__TOKEN_FILE": str(self.stack / "secrets" / "owner_key"),
            "AGENTIC_FLOW_TLS__CA_FILE": str(self.stack / "certs" / "ca.crt"),
            "AGENTIC_FLOW_PEERS__PLATFORM_URL": self.url,
            "AGENTIC_FLOW_PEERS__SWARM_URL": self.url,
            "AGENTIC_FLOW_PEERS__AGENTDB_URL": self.url,
        }

    def run(self, *words: str | Path, **variables: str) -> Done:
        """Run a command of ours to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "agentic_flow", *map(str, words)],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """Begin a command of ours; what it writes, errors too, is its output."""
        # A shell begins what it runs in the background with Ctrl-C ignored, and children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "agentic_flow", *map(str, words)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def client(self, *words: str | Path) -> Done:
        """The same, as a client of the stack."""
        return self.run(*words, **self.client_environment)

    def up(self, *words: str) -> Done:
        """Start it."""
        return self.run("up", "--spec", "spec.yaml", "--json", *words)

    def container(self, service: str) -> str:
        """Id of a service's one container."""
        return self.engine.output("ps", "-q", "--no-trunc", *self.filters(service)).strip()

    def filters(self, service: str) -> list[str]:
        """Options of `docker ps` that choose a service's containers."""
        return [
            "--filter",
            f"label=com.docker.compose.project={self.project}",
            "--filter",
            f"label=com.docker.compose.service={service}",
        ]
