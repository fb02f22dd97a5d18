"""The model routes of the real platform under requests made from its own OpenAPI document.

The server is a process of its own, with the fake provider behind it; the document is the one that it serves.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pkgutil
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import requests
from cli_process import Place
from openapi_fuzz import WAIT_S, check_operation, operations_of
from schemathesis import GenerationMode
from starlette.routing import Route

from agentic_flow import gateway
from agentic_flow.gateway.openapi import openapi_document
from agentic_flow.runtime import platform as platform_faces
from agentic_flow.testing.fake_provider import FakeProvider, Reply

MODELS = [
    "openai:fake-model",
    "anthropic:fake-model",
    "openrouter:fake/model",
    "extractive",
    "auto",
    "onnx:no",
]
EMBEDDERS = ["local", "anthropic:fake-model", "extractive"]
OPERATIONS = sorted(
    operation["operationId"]
    for methods in openapi_document()["paths"].values()
    for operation in methods.values()
)


class Served(NamedTuple):
    """A running platform and its document, in which models have names that exist."""

    url: str
    operations: dict[str, Any]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with FakeProvider(lambda seen: Reply.text("{}"), keyless=True) as fake:
        place = Place(
            tmp_path_factory.mktemp("platform"),
            AGENTIC_FLOW_SERVE__REQUESTS_PER_MINUTE="1000000",
            OPENAI_BASE_URL=fake.openai_url,
            OPENROUTER_BASE_URL=fake.openai_url,
            OPENROUTER_API_KEY="k",
            ANTHROPIC_BASE_URL=fake.anthropic_url,
            ANTHROPIC_API_KEY="k",
        )
        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]
            document = requests.get(f"{url}/openapi.json", timeout=WAIT_S).json()
            assert document == json.loads(json.dumps(openapi_document()))
            yield Served(url, operations_of(_with_models(document)))
            assert requests.get(f"{url}/health/ready", timeout=WAIT_S).status_code == 200
            server.signal(signal.SIGTERM)
            done = server.end()
        assert done.code == 0, done.err
        assert "request_failed" not in done.err


def _with_models(document: dict[str, Any]) -> dict[str, Any]:
    """The document, in which most models are ones that somebody serves."""
    document = copy.deepcopy(document)
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            schema["properties"]["model"] = {"enum": EMBEDDERS if name.startswith("Embeddings") else MODELS}
    return document


# What is asked may store policies, by which the platform then judges: those come last.
CASES = [
    (name, mode)
    for name in sorted(OPERATIONS, key=lambda name: name == "replace_policies")
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Whatever stands in a path is a name that a model could have; the other takes nothing at all.
    if mode is GenerationMode.POSITIVE or name not in ("show_model", "budget_workers")
]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_every_answer_is_one_that_the_document_allows(
    platform: Served, name: str, mode: GenerationMode
) -> None:
    """Catches a 500, a hang, and an answer with a status, media type or shape that the document denies."""
    operation = platform.operations[name]

    check_operation(operation, platform.url, mode, _excused)


def _excused(case: Any, response: Any) -> bool:
    """Whether a failure is not the server's: too short a deadline, or what the provider does not take."""
    if response.status_code == 504:
        return "x-deadline-s" in {key.lower() for key in case.headers or {}}
    return response.status_code == 502 and '"provider_rejected"' in response.text


def _builders() -> Iterator[tuple[str, Callable[..., list[Route]]]]:
    """Every function of the gateway that builds routes, in whatever module it stands."""
    for module in pkgutil.walk_packages(gateway.__path__, f"{gateway.__name__}."):
        for name, found in vars(importlib.import_module(module.name)).items():
            if re.fullmatch(r"build_(\w+_)?routes", name) and found.__module__ == module.name:
                yield f"{module.name}.{name}", found


def test_every_model_route_is_documented() -> None:
    """Catches a route beside the document, and a reference in it that leads nowhere."""
    built: dict[str, list[Route]] = {}
    for name, build in _builders():
        given = [None for one in inspect.signature(build).parameters.values() if one.default is one.empty]
        built[name] = build(*given)
    served = {
        (str(route.path).replace(":path}", "}"), method.lower())
        for routes in built.values()
        for route in routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    document = openapi_document()
    assert served == {(path, method) for path, methods in document["paths"].items() for method in methods}
    for reference in set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))):
        assert reference in document["components"]["schemas"]


def test_whatever_the_platform_builds_of_the_gateway_is_compared_with_the_document() -> None:
    """Catches a builder of routes that the platform uses and the comparison above would not find."""
    used = set(re.findall(r"build_(?:\w+_)?routes", inspect.getsource(platform_faces)))
    found = {name.rpartition(".")[2] for name, _ in _builders()}
    assert used & found == found, "a builder that nobody serves"
    imported = re.findall(
        r"from agentic_flow\.gateway[\w.]* import (\w*routes\w*)", inspect.getsource(platform_faces)
    )
    assert set(imported) == found
