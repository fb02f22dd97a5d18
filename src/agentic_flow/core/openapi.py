"""The operations of an HTTP service as one table, from which its routes and its OpenAPI document are made.

What the table says is what happens: the scope is demanded, a body of another media type is refused, and body
and query parameters are read as the very models that the document shows.

Source: OpenAPI Specification 3.1.1, whose schemas are JSON Schema 2020-12.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.errors import (
    ROWS,
    AgenticFlowError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.telemetry import product_version
from agentic_flow.core.web import json_response, parse, require
from agentic_flow.core.web_floor import invalid_input

Handler = Callable[..., Awaitable[Response]]
Query = TypeVar("Query", bound=BaseModel)

JSON = "application/json"
PROBLEM = "application/problem+json"
DOCUMENT_PATH = "/openapi.json"

_DONE = {200: "Done.", 201: "Made.", 202: "Accepted: it is on disk, and will be done."}
_UNSUPPORTED_MEDIA_TYPE = 415
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ALWAYS: tuple[type[AgenticFlowError], ...] = (
    InvalidInput,
    Unauthenticated,
    Forbidden,
    RateLimited,
    AgenticFlowError,
    Unavailable,
    DeadlineExceeded,
)


class Problem(BaseModel):
    """RFC 9457 problem details, as every error leaves."""

    type: str = Field(description="URN of the kind of error.")
    title: str
    status: int
    detail: str = Field(description="What happened, with the value that was refused.")
    code: str = Field(description="Stable name of the kind of error.")
    retryable: bool = Field(description="Whether the same request may succeed later.")
    hint: str | None = Field(default=None, description="What to do about it.")
    retry_after_s: float | None = Field(default=None, description="Seconds to wait before trying again.")
    instance: str | None = Field(default=None, description="URN with the request id.")
    details: dict[str, Any] | None = Field(default=None, description="Facts for programs.")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Args:
        name: Its `operationId`.
        method: HTTP method.
        path: Starlette's path, whose parameters are written `{name}`, or `{name:path}` if with slashes.
        summary: One line of what it does.
        handler: Takes the request, and `body` and `query` where the table gives them.
        scope: What the caller must hold.
        answer: Type of the JSON answer.
        answer_media_type: Other than JSON: the answer is a stream of lines of type `answer`.
        status: Of an answer that is no error.
        body: Model of a JSON body.
        raw: Media type → handler of bodies that are no JSON document; it takes `query`, and reads the body.
        raw_notes: Media type → what such a body holds.
        query: Model of the query parameters; unknown ones are refused.
        headers: Request header → its schema.
        errors: Kinds of error beyond those that its method, path and body bring with them.
        notes: More than the summary says.
    """

    name: str
    method: str
    path: str
    summary: str
    handler: Handler | None
    scope: str
    answer: Any
    answer_media_type: str = JSON
    status: int = 200
    body: type[BaseModel] | None = None
    raw: Mapping[str, Handler] = field(default_factory=dict[str, Handler])
    raw_notes: Mapping[str, str] = field(default_factory=dict[str, str])
    query: type[BaseModel] | None = None
    headers: Mapping[str, JsonObject] = field(default_factory=dict[str, JsonObject])
    errors: tuple[type[AgenticFlowError], ...] = ()
    notes: str = ""


def routes_of(operations: Sequence[Operation]) -> list[Route]:
    """The routes of a table, one a path, in the order of their first operations."""
    paths: dict[str, dict[str, Operation]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = operation
    # One route for all methods of a path: only then does a 405 know what to put in its Allow header.
    return [Route(path, _dispatch(methods), methods=list(methods)) for path, methods in paths.items()]


def document_route(document: JsonObject) -> Route:
    """`GET /openapi.json`. The document describes the service and holds nothing of anybody's data."""
    answer = json_response(document)

    async def show(request: Request) -> Response:
        return answer

    return Route(DOCUMENT_PATH, show)


def _dispatch(methods: Mapping[str, Operation]) -> Callable[[Request], Awaitable[Response]]:
    endpoints = {method: _endpoint(operation) for method, operation in methods.items()}
    if "GET" in endpoints:
        endpoints["HEAD"] = endpoints["GET"]
    if len(endpoints) == 1:
        return next(iter(endpoints.values()))

    async def dispatch(request: Request) -> Response:
        return await endpoints[request.method](request)

    return dispatch


def _endpoint(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        require(request, operation.scope)
        arguments: dict[str, Any] = {}
        handler = operation.handler
        if operation.body is not None or operation.raw:
            media_type = _media_type(request, operation)
            if media_type in operation.raw:
                handler = operation.raw[media_type]
            elif operation.body is not None:
                arguments["body"] = await parse(request, operation.body, strict=True)
        if operation.query is not None:
            arguments["query"] = read_query(request, operation.query)
        assert handler is not None, f"{operation.name} takes no body of this kind"
        return await handler(request, **arguments)

    return endpoint


def _media_type(request: Request, operation: Operation) -> str:
    accepted = [*([JSON] if operation.body is not None else []), *operation.raw]
    announced = request.headers.get("content-type")
    if announced is None:
        return accepted[0]
    media_type = announced.partition(";")[0].strip().lower()
    if media_type not in accepted:
        raise HTTPException(
            _UNSUPPORTED_MEDIA_TYPE,
            f"its content-type is {announced!r}, not {' or '.join(accepted)}",
            {"accept": ", ".join(accepted)},
        )
    return media_type


def read_query(request: Request, model: type[Query]) -> Query:
    """The query parameters as `model`.

    Raises:
        InvalidInput: one is unknown, wrong, or there twice.
    """
    parameters = request.query_params
    if len(parameters.multi_items()) != len(parameters):
        raise InvalidInput("a query parameter is there twice", hint="send each once")
    try:
        return model.model_validate_strings(dict(parameters))
    except ValidationError as error:
        raise invalid_input(error) from None


# The document


def document(
    operations: Sequence[Operation],
    *,
    title: str,
    description: str,
    path_types: Mapping[str, Any],
) -> JsonObject:
    """The OpenAPI document of a table.

    Args:
        path_types: Type of each path parameter.
    """
    schemas, refs = _schemas(operations, path_types)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _described(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": product_version(), "description": description},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key or token. On loopback none is needed unless auth.required is set.",
                }
            },
        },
        "security": [{"bearer": []}, {}],
    }


_Use = tuple[str, str]
"""What a schema is for: ("body" or "answer" or "query", name of the operation), or ("path", parameter)."""


def _schemas(
    operations: Sequence[Operation], path_types: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[_Use, Any]]:
    """Named schemas, and for each use its schema or a reference to one."""
    wanted: list[tuple[_Use, Any, TypeAdapter[Any]]] = [
        (("path", name), "validation", TypeAdapter(kind)) for name, kind in path_types.items()
    ]
    wanted.append((("problem", ""), "serialization", TypeAdapter(Problem)))
    for operation in operations:
        wanted.append((("answer", operation.name), "serialization", TypeAdapter(operation.answer)))
        if operation.body is not None:
            wanted.append((("body", operation.name), "validation", TypeAdapter(operation.body)))
        if operation.query is not None:
            wanted.append((("query", operation.name), "validation", TypeAdapter(operation.query)))
    found, definitions = TypeAdapter.json_schemas(wanted, ref_template="#/components/schemas/{model}")
    return dict(definitions.get("$defs", {})), {use: schema for (use, _), schema in found.items()}


def _described(operation: Operation, refs: Mapping[_Use, Any]) -> JsonObject:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "description": f"{operation.notes}\n\nNeeds the scope `{operation.scope}`.".strip(),
        "parameters": _parameters(operation, refs),
        "responses": _responses(operation, refs),
    }
    content: dict[str, Any] = {}
    if operation.body is not None:
        content[JSON] = {"schema": refs["body", operation.name]}
    for media_type in operation.raw:
        # Without a schema type: bytes as they are (3.1, "Considerations for File Uploads").
        content[media_type] = {
            "schema": {"contentMediaType": media_type, "description": operation.raw_notes[media_type]}
        }
    if content:
        # A stream of nothing is one without lines.
        described["requestBody"] = {"required": operation.body is not None, "content": content}
    return described


def _parameters(operation: Operation, refs: Mapping[_Use, Any]) -> list[JsonObject]:
    found: list[JsonObject] = [
        {"name": name, "in": "path", "required": True, "schema": refs["path", name]}
        for name in _PARAMETER.findall(operation.path)
    ]
    found += [{"name": name, "in": "header", "schema": shape} for name, shape in operation.headers.items()]
    if operation.query is not None:
        # Made apart, so that parameters stand where they are used instead of behind a reference.
        schema = operation.query.model_json_schema(ref_template="#/components/schemas/{model}")
        required = schema.get("required", [])
        for name, shape in schema["properties"].items():
            shape = {key: value for key, value in shape.items() if key != "title"}
            text = shape.pop("description", "")
            # A query string has no null: what is not wanted is left out.
            choices = [choice for choice in shape.get("anyOf", []) if choice != {"type": "null"}]
            if len(choices) == 1:
                shape = choices[0]
            found.append(
                {
                    "name": name,
                    "in": "query",
                    "required": name in required,
                    "description": text,
                    "schema": shape,
                }
            )
    return found


def _responses(operation: Operation, refs: Mapping[_Use, Any]) -> JsonObject:
    answer = refs["answer", operation.name]
    responses: JsonObject = {
        str(operation.status): {
            "description": _DONE[operation.status],
            "content": {operation.answer_media_type: {"schema": answer}},
        }
    }
    kinds = {*_ALWAYS, *operation.errors}
    if "{" in operation.path:
        kinds.add(NotFound)
    problem = {PROBLEM: {"schema": refs["problem", ""]}}
    takes_body = operation.body is not None or bool(operation.raw)
    if takes_body:
        kinds.add(TooLarge)
        responses[str(_UNSUPPORTED_MEDIA_TYPE)] = {
            "description": "The body is of another media type.",
            "content": problem,
        }
    if operation.method != "GET":
        kinds.add(Conflict)
    for kind in kinds:
        row = ROWS[kind.code]
        names = sorted(other.code for other in kinds if ROWS[other.code].status == row.status)
        responses[str(row.status)] = {"description": ", ".join(names), "content": problem}
    return dict(sorted(responses.items()))
