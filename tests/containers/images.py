"""Builds our images for tests and benchmarks.

python tests/containers/images.py [TARGET…]    builds them (all by default) and prints their tags
"""

from __future__ import annotations

import configparser
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine import ROOT, Engine, build, start

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
REPOSITORIES = {
    "platform": "agentic-flow",
    "agentdb": "agentic-flow-agentdb",
    "swarm": "agentic-flow-swarm",
    "worker": "agentic-flow-worker",
}
"""Target of the Dockerfile → the image's name. agentic-flow-swarm does the same by the command `worker`."""
TAG = os.environ.get("CONTAINER_TESTS_TAG", "dev")


CONTEXT = ("LICENSE", "README.md", "pyproject.toml", ".dockerignore", "deploy/docker", "requirements", "src")
"""What builds read of the repository."""


class Images:
    """Our images on one engine.

    Args:
        engine: Where they are built.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._built: set[str] = set()

    def __call__(self, target: str) -> str:
        """The tag of a target's image, built from the source as it is now."""
        tag = f"{REPOSITORIES[target]}:{TAG}"
        if target not in self._built:
            self.build(target)
            self._built.add(target)
        return tag

    def build(self, target: str, *options: str | Path, tag: str = TAG) -> str:
        """Build a target and return what the build printed.

        Args:
            target: One of REPOSITORIES.
            options: More options of `docker build`.
            tag: The image's tag, without its name.
        """
        with build_secrets() as secrets:
            name = f"{REPOSITORIES[target]}:{tag}"
            return build(
                self._engine, ROOT, name, "--file", DOCKERFILE, "--target", target, *secrets, *options
            )


@contextmanager
def build_secrets(*, comment: str = "") -> Iterator[list[str]]:
    """Options that hand this machine's way to the package index to a build, in mounts that no layer keeps.

    Args:
        comment: A line of pip's configuration that says nothing.
    """
    configured = _pip_configuration()
    authority = os.environ.get("PIP_CERT") or configured.get("cert")
    index = {
        name: value
        for name, value in configured.items()
        if name in ("index-url", "extra-index-url") and "file:" not in value
    }
    with tempfile.TemporaryDirectory() as folder:
        options = []
        if authority and Path(authority).is_file():
            options += ["--secret", f"id=pip_ca,src={authority}"]
        if index or comment:
            parser = configparser.RawConfigParser()
            parser["global"] = index
            text = io.StringIO()
            parser.write(text)
            path = Path(folder) / "pip.conf"
            path.write_text(f"# {comment}\n{text.getvalue()}", "utf-8")
            options += ["--secret", f"id=pip_conf,src={path}"]
        yield options


def copy_context(folder: Path) -> Path:
    """A copy of all that builds read, in `folder`, to be changed."""
    for name in CONTEXT:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def _pip_configuration() -> dict[str, str]:
    """pip's global settings on this machine, by their plain names."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.startswith(("global.", ":env:.")):
            found[name.rpartition(".")[2]] = value.strip("'")
    return found


def main(targets: Sequence[str]) -> int:
    """Build targets and print their tags."""
    images = Images(start())
    for target in targets or REPOSITORIES:
        print(images(target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
