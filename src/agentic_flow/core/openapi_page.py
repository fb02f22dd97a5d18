"""An OpenAPI document as a page to read, such as docs/reference/agentdb-http.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from agentic_flow.core.messages import JsonObject

_SCHEMAS = "#/components/schemas/"


def reference_page(
    document: JsonObject, *, title: str, errors: str, document_path: str = "/openapi.json"
) -> str:
    """The page, without the notice that the writer puts above it.

    Args:
        document: As `core.openapi.document` makes it.
        title: Of the page.
        errors: What errors look like.
        document_path: Where a service answers the document.
    """
    parts = [
        f"# {title}",
        str(document["info"]["description"]),
        f"As OpenAPI 3.1: `GET {document_path}`. {errors} [errors](errors.md).",
        *_operations(document),
        "## Schemas",
        *_schemas(document),
    ]
    return "\n\n".join(parts) + "\n"


def _operations(document: JsonObject) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"## `{method.upper()} {path}`"
            yield str(operation["summary"])
            yield str(operation["description"])
            parameters = [p for p in operation["parameters"] if p["in"] != "path"]
            if parameters:
                yield _table(
                    ("Parameter", "In", "Type", "Meaning"),
                    [
                        (
                            f"`{p['name']}`",
                            p["in"],
                            shown(p["schema"]),
                            p.get("description") or p["schema"].get("description", ""),
                        )
                        for p in parameters
                    ],
                )
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                schema = content["schema"]
                what = shown(schema) if "$ref" in schema else schema["description"]
                yield f"Body `{media_type}`: {what}"
            done, *failed = sorted(operation["responses"].items())
            status = "" if done[0] == "200" else f" ({done[0]})"
            for media_type, content in done[1]["content"].items():
                yield f"Answer{status} `{media_type}`: {shown(content['schema'])}"
            statuses = ", ".join(
                f"{status} {response['description'].rstrip('.')}" for status, response in failed
            )
            yield f"Errors: {statuses}."


def _schemas(document: JsonObject) -> Iterator[str]:
    text_of_all = json.dumps(document)
    for name, schema in document["components"]["schemas"].items():
        if f'"{_SCHEMAS}{name}"' not in text_of_all:
            continue  # its fields stand with the operations as query parameters
        yield f"### {name}"
        if text := schema.get("description"):
            yield str(text)
        if "oneOf" in schema:
            yield "One of: " + "; ".join(
                ", ".join(f"`{field}` {shown(part)}" for field, part in choice["properties"].items())
                for choice in schema["oneOf"]
            )
            continue
        required = schema.get("required", [])
        yield _table(
            ("Field", "Type", "Default", "Meaning"),
            [
                (
                    f"`{field}`",
                    shown(part),
                    "required" if field in required else _default(part),
                    part.get("description", ""),
                )
                for field, part in schema["properties"].items()
            ],
        )


def shown(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, other schemas as links."""
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix(_SCHEMAS)
        return f"[{name}](#{name.lower()})"
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(shown(choice) for choice in cast(list[dict[str, Any]], choices))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{str(schema['const']).lower()}`"
    kind = str(schema.get("type", "any"))
    if kind == "array" and "items" in schema:
        return f"list of {shown(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {shown(schema['additionalProperties'])}"
    if schema.get("contentEncoding") == "base64":
        return "base64 of float32"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        return f"{kind} {'' if low is None else low}…{'' if high is None else high}"
    return kind


def _default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "" if value is None else f"`{json.dumps(value)}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
