"""Tool calls that the policy lets pass with somebody's yes only: asked for as a durable question of the run.

A call that needs one is recorded as having asked, and not made. The question waits as all questions of runs
do, through restarts; then the call is made, or refused, with the answer, as a step of its own.
"""

from __future__ import annotations

import orjson

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import Approval, WorkflowContext
from agentic_flow.swarm.questions import QUESTION_CHARS_MAX

APPROVE, DENY = "approve", "deny"
SCOPE = "platform:approve"
"""The policy is the operator's: a key that may do everything in its tenant may not say yes in its place."""
ASKS = "$asks"
"""In the output of a step that has asked instead of calling."""


def asking(who: str, call: JsonObject) -> JsonObject:
    """The output of a step that has not called because somebody must say yes first.

    Args:
        who: The agent or step that calls.
        call: What it calls, as `ToolBox.asks` shows it.
    """
    shown = orjson.dumps(call["arguments"]).decode()
    return {ASKS: f"May {who} call {call['tool']} with {shown}? (asked by {call['reason']})"}


async def answer_to(context: WorkflowContext, output: JsonObject, timeout_s: float) -> Approval | None:
    """What somebody says to a call; None when its step has not asked. Silence is a no."""
    asked = output.get(ASKS)
    if asked is None:
        return None
    text = str(asked)
    if len(text) > QUESTION_CHARS_MAX:
        text = text[: QUESTION_CHARS_MAX - 1] + "…"
    given = await context.ask(text, options=(APPROVE, DENY), timeout_s=timeout_s, default=DENY, scope=SCOPE)
    return Approval(granted=given["answer"] == APPROVE, by=given["by"])
