"""Fixtures of the container suite: the engine, our images built once, and projects that leave nothing behind.

- `engine`: what answers (see `engine.py`); started for the suite where none runs, and then ended with it.
- `images`: `images("platform")` is the tag of that target, built the first time that a test asks for it.
- `place`: a stack that `agentic-flow up` has started.
- `project`: makes names for Compose projects, containers, networks and volumes. Whatever has such a name, as
  its Compose project or at the beginning of its own, is removed after the test.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import Project
from engine import Engine, EngineUnavailable, running, start, stop
from images import Images
from stack_place import StackPlace

HERE = Path(__file__).resolve().parent
TEST_TIMEOUT_S = 900
"""A test may be the first to need an image, which then is built within its time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of this folder the time that builds and stacks take."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The Docker engine; one that was started here is ended here."""
    before = running()
    try:
        found = start()
    except EngineUnavailable as error:
        pytest.fail(f"the container suite needs a Docker engine: {error}", pytrace=False)
    try:
        yield found
    finally:
        if before is None:
            stop()


@pytest.fixture(scope="session")
def images(engine: Engine) -> Images:
    """Our images, each built once a session."""
    return Images(engine)


@pytest.fixture(scope="module")
def place(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackPlace]:
    """A stack that `agentic-flow up` has started, one for all tests of a module."""
    for target in ("platform", "agentdb", "swarm"):
        images(target)
    place = StackPlace(tmp_path_factory.mktemp("stack"), engine, f"af-test-{secrets.token_hex(4)}")
    try:
        started = place.up()
        assert started.code == 0, started.err
        yield place
    finally:
        remove_project(engine, place.project)


@pytest.fixture
def project(engine: Engine) -> Iterator[Project]:
    """Makes project names; what bears one is removed at the end of the test."""
    made: list[str] = []

    def new() -> str:
        made.append(f"af-test-{secrets.token_hex(4)}")
        return made[-1]

    try:
        yield new
    finally:
        for name in made:
            remove_project(engine, name)


def remove_project(engine: Engine, name: str) -> None:
    """Remove the containers, networks and volumes of a Compose project, and those that are named after it."""
    filters = (f"label=com.docker.compose.project={name}", f"name={name}")
    for chosen in filters:  # all of them first: each may hold what the other filter finds
        if containers := engine.output("ps", "--all", "--quiet", "--filter", chosen).split():
            engine.run("rm", "--force", "--volumes", *containers)
    for kind in ("network", "volume"):
        for chosen in filters:
            if found := engine.output(kind, "ls", "--quiet", "--filter", chosen).split():
                engine.run(kind, "rm", *found)
