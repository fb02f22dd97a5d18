"""Answers as JSON in one pass, with vectors in the form that was asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel
from starlette.responses import Response

from agentic_flow.agentdb.http.bodies import VectorFormat
from agentic_flow.core.vectors import Vector

NDJSON = "application/x-ndjson"

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_LINE_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def answer(value: BaseModel, vector_format: VectorFormat = "list") -> Response:
    """A JSON response of one of AgentDB's own models."""
    return Response(
        orjson.dumps(value, _PLAIN[vector_format], _OPTIONS), headers={"content-type": "application/json"}
    )


async def lines(values: AsyncIterator[BaseModel], vector_format: VectorFormat) -> AsyncIterator[bytes]:
    """Each model as a line of JSON."""
    plain = _PLAIN[vector_format]
    async for value in values:
        yield orjson.dumps(value, plain, _LINE_OPTIONS)


# By exact type, because isinstance is slow on abstract and pydantic's classes, and these run for every row.


def _fields(value: Any) -> Any:
    if hasattr(value, "__pydantic_fields__"):
        # Our models have no other fields, aliases or secrets, so what they hold is what is written.
        return value.__dict__
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _as_list(value: Any) -> Any:
    # As float32, so that 0.1 is written as 0.1 and no digit more than reading it back takes.
    return np.frombuffer(value.data, "<f4") if type(value) is Vector else _fields(value)


def _as_base64(value: Any) -> Any:
    return value.base64() if type(value) is Vector else _fields(value)


def _as_nothing(value: Any) -> Any:
    return None if type(value) is Vector else _fields(value)


_PLAIN: dict[VectorFormat, Callable[[Any], Any]] = {
    "list": _as_list,
    "base64": _as_base64,
    "none": _as_nothing,
}
