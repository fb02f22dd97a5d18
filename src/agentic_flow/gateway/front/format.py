"""What the fronts share: a decoded call, and tools as both vendors describe them."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from agentic_flow.core.messages import CompletionRequest, JsonObject, ToolSpec
from agentic_flow.gateway.front.fields import Fields, wrong


class Call(NamedTuple):
    """A decoded request, and whether its caller wants the usage at the end of a stream."""

    request: CompletionRequest
    include_usage: bool = True


def tool_spec(fields: Fields, *, schema: JsonObject) -> ToolSpec:
    """The tool of an object with `name`, `description` and `strict`."""
    name = fields.demand("name")
    try:
        return ToolSpec(
            name=name,
            description=fields.text("description") or "",
            input_schema=schema,
            strict=fields.flag("strict"),
        )
    except ValidationError:
        raise wrong(
            fields.name("name"), "must begin with a letter and have at most 64 letters, digits, _ and -", name
        ) from None
