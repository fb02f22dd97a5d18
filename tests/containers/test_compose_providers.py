"""The provider variants against the fake provider: each asks for its model with its key, and shows none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from engine import Engine
from images import Images
from probing import connections
from stacks import Stack, assert_no_secret_shows, prepare, spec_with_free_ports

from agentic_flow.core.identity import new_key
from agentic_flow.deploy import compose
from agentic_flow.deploy.plan import PORTS
from agentic_flow.deploy.variants import VARIANTS, Variant
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from conftest import remove_project

HOST = "providers.test"


@dataclass
class Driven:
    """The providers' stack and who answers in the providers' place."""

    stack: Stack
    fake: FakeProvider

    def port(self, name: str) -> int:
        return int(getattr(self.stack.spec.ports, name))


@pytest.fixture(scope="module")
def driven(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    """Three platforms behind one proxy; providers are the fake one, on this machine."""
    project, folder = f"af-providers-{new_key().id}", tmp_path_factory.mktemp("providers")
    with FakeProvider([Reply.text("a scripted answer")] * 200, host="0.0.0.0") as fake:
        here = f"http://{HOST}:{fake.url.rpartition(':')[2]}"
        variables = {"ANTHROPIC_BASE_URL": here, "OPENROUTER_BASE_URL": f"{here}/v1"}
        stack = prepare(
            engine,
            images,
            project,
            folder,
            spec_with_free_ports(),
            (compose.PROVIDERS,),
            targets=("platform",),
            variables=variables,
        )
        stack.override({one.name: {"extra_hosts": [f"{HOST}:host-gateway"]} for one in VARIANTS})
        try:
            stack.up()
            yield Driven(stack, fake)
        finally:
            remove_project(engine, project)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_each_port_has_its_model_and_its_key(driven: Driven, variant: Variant) -> None:
    """Catches a port that calls another provider or model, or with a key that is not the file's."""
    goal = f"Say something to {variant.name}."
    with driven.stack.client(driven.port(variant.name)) as client:
        run = client.run(goal, agents=1)
    assert run.state == "completed", run.error
    assert "a scripted answer" in run.answer
    # What is learned from a run is asked later, while the next variant works: only its own count here.
    requests = [one for one in driven.fake.requests if goal in str(one.body)]
    assert requests
    anthropic = variant.provider == "claude"
    key = driven.stack.secret("anthropic_api_key" if anthropic else "openrouter_api_key")
    for request in requests:
        assert request.wire == ("anthropic" if anthropic else "openai")
        assert key in " ".join(request.headers.values())
        assert variant.name in request.body["model"]


def test_the_variants_do_not_reach_each_other(driven: Driven, images: Images) -> None:
    """Catches variants on one network: a key of one could be asked for through another."""
    names = [one.name for one in VARIANTS]
    for name in names:
        (container,) = driven.stack.containers(name)
        targets = [(other, PORTS["platform"]) for other in names if other != name]
        told = connections(driven.stack.engine, images("platform"), container, targets)
        assert "reached" not in told.values()


def test_a_key_is_rotated_without_a_restart(driven: Driven) -> None:
    """Catches a provider's key that is read once."""
    driven.stack.rotate("anthropic_api_key", "sk-anthropic-the-next-one")
    goal = "Say something else."
    with driven.stack.client(driven.port("claude")) as client:
        assert client.run(goal, agents=1).state == "completed"
    # Not those of the variants before, which still learn from their runs.
    requests = [one for one in driven.fake.requests if goal in str(one.body)]
    assert requests
    assert all("sk-anthropic-the-next-one" in " ".join(request.headers.values()) for request in requests)


def test_no_key_shows(driven: Driven) -> None:
    """Catches a provider's key in an image, an environment dump or a log."""
    assert_no_secret_shows(driven.stack)
