"""Delegation: an agent asks another role a question, or hands its whole task over. Bounded, and measured.

Both are tools that a role must be given (`delegate`, `handoff`). The one who is asked is a child workflow of
the one who asks: durable, within the same budget, and without sight of anything but the question. It ends
because the depth is limited, because each agent may ask so many times, and because nobody may pass on the
question that it was asked, to whatever role, in whatever spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from agentic_flow.core.errors import InvalidInput, LimitExceeded
from agentic_flow.core.messages import JsonObject, ToolSpec
from agentic_flow.swarm.topology import Role

DELEGATE = "delegate"
HANDOFF = "handoff"
TOOLS = (DELEGATE, HANDOFF)
QUESTION_CHARS_MAX = 8000

_ROLES = get_args(Role)
_ARGUMENTS: JsonObject = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": list(_ROLES), "description": "Who is to answer."},
        "question": {
            "type": "string",
            "minLength": 1,
            "maxLength": QUESTION_CHARS_MAX,
            "description": "The whole question: who answers it sees nothing else.",
        },
    },
    "required": ["role", "question"],
    "additionalProperties": False,
}
_SPECS = {
    DELEGATE: "Ask an agent of another role a question and get its answer. Ask what you cannot find out.",
    HANDOFF: "Hand your whole task over to another role. Its answer becomes yours, and you are done.",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to another role, as it may be passed on."""

    role: Role
    question: str


def specs(tools: Sequence[str], depth: int, depth_max: int) -> list[ToolSpec]:
    """The delegation tools of an agent that is given `tools`, `depth` questions below an assignment."""
    if depth >= depth_max:
        return []
    return [
        ToolSpec(name=name, description=text, input_schema=_ARGUMENTS, read_only=True)
        for name, text in _SPECS.items()
        if name in tools
    ]


def admitted(
    arguments: JsonObject,
    above: Sequence[tuple[str, str]],
    *,
    own: str,
    made: int,
    depth_max: int,
    delegations_max: int,
) -> Asked:
    """The question, if it may be passed on.

    Args:
        arguments: As the model wrote them.
        above: (role, question) of every question above this agent.
        own: What this agent itself was asked.
        made: Questions that it has passed on before.

    Raises:
        InvalidInput: the arguments are not what the tool takes.
        LimitExceeded: too deep, too many, or a question going round in a circle.
    """
    role, question = arguments.get("role"), arguments.get("question")
    if role not in _ROLES or not isinstance(question, str) or not question.strip():
        raise InvalidInput(
            f"role {role!r} with the question {str(question)[:80]!r} cannot be asked",
            hint=f"role is one of {', '.join(_ROLES)}, question a text",
        )
    if len(question) > QUESTION_CHARS_MAX:
        raise InvalidInput(
            f"the question has {len(question)} characters, the limit is {QUESTION_CHARS_MAX}",
            hint="ask more briefly",
        )
    if len(above) >= depth_max:
        raise LimitExceeded(
            f"this question is {len(above)} deep already, the limit is {depth_max}",
            hint="answer it yourself, or say what is missing",
        )
    if made >= delegations_max:
        raise LimitExceeded(
            f"{made} questions have been passed on, which is the limit", hint="answer with what you have"
        )
    earlier = {_spelled(one) for _, one in above} | {_spelled(own)}
    if _spelled(question) in earlier:
        raise LimitExceeded(
            f"the question {question[:80]!r} has been asked above and would go round in a circle",
            hint="answer it yourself, or ask a part of it",
        )
    return Asked(cast(Role, role), question.strip())


def _spelled(question: str) -> str:
    """The question without what does not change it."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.casefold()).split())
