"""The routes of runs of the real platform under requests made from its own OpenAPI document."""

from __future__ import annotations

import copy
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cli_process import Place
from openapi_fuzz import WAIT_S, check_operation, operations_of
from schemathesis import GenerationMode

from agentic_flow.swarm.routes import DOCUMENT_PATH, openapi_document

OPERATIONS = sorted(
    operation["operationId"]
    for methods in openapi_document()["paths"].values()
    for operation in methods.values()
)


def _operation(name: str) -> dict[str, Any]:
    return next(
        operation
        for methods in openapi_document()["paths"].values()
        for operation in methods.values()
        if operation["operationId"] == name
    )


CASES = [
    (name, mode)
    # What is purged cannot be shown any more: that comes last.
    for name in sorted(OPERATIONS, key=lambda name: name == "purge_runs")
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Any text can be a name in a path: what takes nothing else has no wrong request.
    if mode is GenerationMode.POSITIVE or "requestBody" in _operation(name)
]


class Served:
    """A running platform with a run that has ended, and the operations with names that exist."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        spec = {"goal": "Who keeps the keys?", "inputs": [str(folder)], "agents": 1, "memory": False}
        run_id = requests.post(f"{url}/v1/runs", json=spec, timeout=WAIT_S).json()["run_id"]
        events = requests.get(f"{url}/v1/runs/{run_id}/events", timeout=WAIT_S).text
        assert "event: run_finished" in events
        document = requests.get(f"{url}{DOCUMENT_PATH}", timeout=WAIT_S).json()
        assert document == json.loads(json.dumps(openapi_document()))
        self.operations = operations_of(_with_names(document, run_id, folder))


def _with_names(document: dict[str, Any], run_id: str, folder: Path) -> dict[str, Any]:
    """The document, in which runs are one that is there or one that is not, and folders are small."""
    document = copy.deepcopy(document)
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "run_id":
                    parameter["schema"] = {"enum": [run_id, "run-none"]}
    schemas = document["components"]["schemas"]
    schemas["RunSpec"]["properties"]["inputs"]["items"] = {"enum": [str(folder)]}
    for name in ("RunSpec", "WorkflowRequest"):
        schemas[name]["properties"]["after"]["items"] = {"enum": [run_id, "run-none"]}
    return document


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("folder")
    (folder / "keys.txt").write_text("The porter keeps the keys.\n")
    place = Place(tmp_path_factory.mktemp("platform"), AGENTIC_FLOW_SERVE__REQUESTS_PER_MINUTE="1000000")
    with place.start("serve", "platform") as server:
        served = Served(server.addresses(1)["platform"], folder)
        yield served
        assert requests.get(f"{served.url}/health/ready", timeout=WAIT_S).status_code == 200
        server.signal(signal.SIGTERM)
        done = server.end()
    assert done.code == 0, done.err
    assert "request_failed" not in done.err


@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_every_answer_is_one_that_the_document_allows(
    platform: Served, name: str, mode: GenerationMode
) -> None:
    """Catches a 500, a hang, and an answer with a status, media type or shape that the document denies."""
    check_operation(platform.operations[name], platform.url, mode)


def test_references_of_the_document_lead_somewhere() -> None:
    """Catches a schema that is named and not there."""
    document = openapi_document()
    for reference in set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))):
        assert reference in document["components"]["schemas"]


@pytest.mark.parametrize("last", ["²", "-1", "9" * 19, "9" * 5000, "two"])
def test_a_last_event_that_is_no_number_of_ours(platform: Served, last: str) -> None:
    """Catches a header that ends as an error within the stream, and one that is taken for the start."""
    got = requests.get(
        f"{platform.url}/v1/runs/run-none/events",
        headers={"last-event-id": last.encode()},
        timeout=WAIT_S,
    )
    assert got.status_code == 400, got.text
    assert "last-event-id" in got.json()["detail"]
