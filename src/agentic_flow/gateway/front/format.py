"""What the fronts share: a decoded call, and what several of the formats describe in one way."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import NamedTuple, cast, get_args

import orjson
from pydantic import ValidationError

from agentic_flow.core.messages import CompletionRequest, ImagePart, JsonObject, ReasoningEffort, ToolSpec
from agentic_flow.gateway.front.fields import Fields, json_object, wrong

OUTPUT_TOKENS_DEFAULT = 4096
"""The output limit of requests in OpenAI's formats that name none."""

_DATA_URL = re.compile(r"data:(image/[a-zA-Z0-9.+-]+);base64,(.*)", re.DOTALL)


class Call(NamedTuple):
    """A decoded request.

    Args:
        request: What is asked.
        include_usage: Whether the caller wants the usage at the end of a stream.
        echo: What the answer repeats of the request, in formats that do so.
    """

    request: CompletionRequest
    include_usage: bool = True
    echo: Mapping[str, object] | None = None


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


def image_of(url: str, at: str) -> ImagePart:
    """The image of an http(s) URL or a data URL; `at` is the field's path for errors."""
    if url.startswith(("http://", "https://")):
        return ImagePart(media_type="image/*", url=url)
    inline = _DATA_URL.fullmatch(url)
    if inline is None:
        raise wrong(at, "must be an http(s) URL or a base64 data URL of an image", url)
    try:
        base64.b64decode(inline[2], validate=True)
    except (binascii.Error, ValueError):
        raise wrong(at, "is not valid base64", url) from None
    return ImagePart(media_type=inline[1], data=inline[2])


def arguments_of(text: str, at: str) -> JsonObject:
    """The arguments of a tool call, which OpenAI's formats write as JSON in a string."""
    try:
        arguments: object = orjson.loads(text.strip() or "{}")
    except orjson.JSONDecodeError:
        raise wrong(at, "must be a JSON object in a string", text) from None
    return json_object(arguments, at)


def effort_of(fields: Fields, key: str) -> ReasoningEffort | None:
    """A reasoning effort, None when it is absent."""
    effort = fields.text(key)
    if effort is not None and effort not in get_args(ReasoningEffort):
        raise wrong(fields.name(key), f"must be one of {', '.join(get_args(ReasoningEffort))}", effort)
    return cast(ReasoningEffort | None, effort)
