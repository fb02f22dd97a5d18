"""Options of `agentic-flow run` that have a small form of their own, as fields of a RunSpec."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from agentic_flow.core.errors import InvalidInput

_ROLE_KEYS = ("agent", "model", "tools")
_CRITERIA = {
    "contains": "text",
    "cites": "path",
    "min_citations": "n",
    "max_words": "n",
    "command": "argv",
    "question": "text",
}


def spec_options(
    *,
    teams: str | None,
    stages: Sequence[str] | None,
    roles: Sequence[str] | None,
    acceptance: Sequence[str] | None,
) -> dict[str, Any]:
    """Fields of a RunSpec; what was not given is left out.

    Args:
        teams: `2` or `2,3`.
        stages: `AGENT` or `AGENT=TASK`, in order.
        roles: `ROLE.agent=NAME`, `ROLE.model=NAME` or `ROLE.tools=A,B`.
        acceptance: `KIND:VALUE`.

    Raises:
        InvalidInput: one of them does not have its form.
    """
    found: dict[str, Any] = {}
    if teams is not None:
        found["teams"] = _teams(teams)
    if stages:
        found["stages"] = [_stage(text) for text in stages]
    if roles:
        found["roles"] = _roles(roles)
    if acceptance:
        found["acceptance"] = [_criterion(text) for text in acceptance]
    return found


def _teams(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InvalidInput(f"--teams {text!r} is no list of numbers", hint="write it like 2 or 2,3")
    return tuple(int(part) for part in parts)


def _stage(text: str) -> dict[str, str]:
    agent, equals, task = text.partition("=")
    return {"agent": agent.strip()} | ({"task": task} if equals else {})


def _roles(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    roles: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        role, _, key = name.partition(".")
        if not equals or key not in _ROLE_KEYS or not value:
            raise InvalidInput(
                f"--role {text!r} does not say how a role is played",
                hint=f"write it like worker.model=NAME; after the dot comes one of {', '.join(_ROLE_KEYS)}",
            )
        tools = [tool.strip() for tool in value.split(",") if tool.strip()]
        roles.setdefault(role, {})[key] = tools if key == "tools" else value
    return roles


def _criterion(text: str) -> dict[str, Any]:
    kind, colon, value = text.partition(":")
    field = _CRITERIA.get(kind)
    if field is None or not colon or not value:
        raise InvalidInput(
            f"--accept {text!r} is no criterion",
            hint=f"write KIND:VALUE with one of {', '.join(_CRITERIA)}, like min_citations:3",
        )
    if field == "n":
        if not value.isdecimal():
            raise InvalidInput(f"--accept {text!r} needs a number", hint=f"write it like {kind}:3")
        return {"kind": kind, field: int(value)}
    if field == "argv":
        try:
            return {"kind": kind, field: shlex.split(value)}
        except ValueError as error:
            raise InvalidInput(f"--accept {text!r}: {error}", hint="close the quotation") from None
    return {"kind": kind, field: value}
