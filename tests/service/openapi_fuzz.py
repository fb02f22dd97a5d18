"""Requests made from a service's own OpenAPI document, and answers compared with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

WAIT_S = 30.0
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10"))
"""Of each operation, as many that follow the document as that do not."""
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def operations_of(document: dict[str, Any]) -> dict[str, Any]:
    """Name → operation of a document, from which requests can be made."""
    schema = schemathesis.openapi.from_dict(document)
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.definition.raw["operationId"]: operation for operation in found}


def check_operation(
    operation: Any, url: str, mode: GenerationMode, excused: Callable[[Any, Any], bool] = lambda *_: False
) -> None:
    """Ask a server, and hold each answer against the document.

    Args:
        operation: One of `operations_of`.
        url: Of the server.
        mode: Requests that follow the document, or that do not.
        excused: Whether a failure (case, response) is not the server's.
    """

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=url, timeout=WAIT_S)
        assert response.status_code < 500 or excused(case, response), (case.body, response.text)
        case.validate_response(response, checks=CHECKS)

    ask()
