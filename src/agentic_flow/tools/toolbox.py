"""The ToolBox: the one way to call a tool, whoever calls.

look up → validate → policy → run within the deadline → bound the result → audit. Only then does the caller
see the result: what is not in the audit log has not been answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import structlog
from pydantic import ValidationError

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PolicyDenied,
    TooLarge,
    Unavailable,
    as_tool_error,
)
from agentic_flow.core.messages import JsonObject, ToolSpec
from agentic_flow.core.ports import Approval, ToolResult, ToolScope
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.core.toolkit import Tool, ToolCall, ToolInput
from agentic_flow.tools.audit import AuditLog, Entry, Outcome
from agentic_flow.tools.bounds import bound_result
from agentic_flow.tools.policy import Decision, Policy
from agentic_flow.tools.registry import Registry

ARGUMENTS_MAX_BYTES = 16 * 1024 * 1024
_MESSAGE_CHARS_MAX = 2000

_log = structlog.get_logger(__name__)


class Approver(Protocol):
    """Says yes or no where the policy asks. It may take until the call's deadline."""

    async def __call__(self, principal: Principal, tool: Tool[Any], arguments: JsonObject) -> bool: ...


@dataclass(slots=True)
class _Attempt:
    """One call on its way, with what the audit log will say of it."""

    principal: Principal
    scope: ToolScope
    name: str
    started_s: float
    idempotency_key: str | None
    arguments: JsonObject
    private: frozenset[str] = frozenset()
    decision: str = "none"


class StandardToolBox:
    """`ToolBox` over a set of tools, a policy and an audit log.

    Args:
        tools: Every tool that can be called at all.
        settings: Time and size limits.
        policy: Who may call what.
        audit: Where each call is recorded; closed by whoever opened it.
        approver: Asked where the policy says `ask`; None refuses.
        asked_by_callers: Callers find somebody who says yes (`asks`), so that tools which need it are shown.
        clock: Time of the records and the deadlines.
    """

    def __init__(
        self,
        tools: Iterable[Tool[Any]],
        *,
        settings: ToolsSettings,
        policy: Policy,
        audit: AuditLog,
        approver: Approver | None = None,
        asked_by_callers: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._tools = Registry(tools)
        self._specs = {tool.name: tool.spec for tool in self._tools}
        self._settings = settings
        self._policy = policy
        self._audit = audit
        self._approver = approver
        self._may_ask = asked_by_callers or approver is not None
        self._clock = clock

    def specs(self, principal: Principal, scope: ToolScope) -> list[ToolSpec]:
        """The tools this principal may call in this scope, in name order."""
        return [self._specs[tool.name] for tool in self.permitted(principal, scope)]

    def permitted(self, principal: Principal, scope: ToolScope) -> list[Tool[Any]]:
        """Likewise, as tools. What the policy refuses whatever the arguments is left out."""
        return [
            tool
            for tool in self._tools
            if (scope.tools_allowed is None or tool.name in scope.tools_allowed)
            and self._policy.may_permit(principal, tool.name, tool.kind, approver=self._may_ask)
        ]

    def asks(
        self, principal: Principal, name: str, arguments: Mapping[str, Any], scope: ToolScope
    ) -> JsonObject | None:
        """See ToolBox. Arguments that the tool keeps private are not shown."""
        try:
            tool = self._tools.get(name, scope.tools_allowed)
            given = validated(tool, arguments).model_dump(mode="json")
        except AgenticFlowError:
            return None
        decision = self._policy.decide(principal, tool.name, tool.kind, given)
        if decision.effect != "ask":
            return None
        shown = {key: "…" if key in tool.private_arguments else value for key, value in given.items()}
        return {"tool": tool.name, "arguments": shown, "reason": decision.reason}

    async def call(
        self,
        principal: Principal,
        name: str,
        arguments: Mapping[str, Any],
        *,
        deadline: Deadline,
        scope: ToolScope,
        idempotency_key: str | None = None,
        approval: Approval | None = None,
    ) -> ToolResult:
        """Run one tool. A refused or failed call is a result with `is_error`, which a model can read.

        Raises:
            NotFound: no tool has this name in this scope.
            Unavailable: the audit log cannot be written; nothing is answered that is not recorded. Or a
                service of ours that the tool needs is away (`peer`).
        """
        attempt = _Attempt(
            principal, scope, name, self._clock.monotonic_s(), idempotency_key, _recordable(arguments)
        )
        try:
            return await self._attempt(attempt, arguments, deadline, approval)
        except NotFound as error:
            await self._record(attempt, "refused", error.code)
            raise
        except asyncio.CancelledError:
            self._audit.append_soon(self._entry(attempt, "cancelled", "cancelled"))
            raise

    async def _attempt(
        self,
        attempt: _Attempt,
        arguments: Mapping[str, Any],
        deadline: Deadline,
        approval: Approval | None,
    ) -> ToolResult:
        tool = self._tools.get(attempt.name, attempt.scope.tools_allowed)
        attempt.private = tool.private_arguments
        try:
            given = validated(tool, arguments)
            attempt.arguments = given.model_dump(mode="json")
            await self._authorise(attempt, tool, deadline, approval)
        except AgenticFlowError as error:
            return await self._failed(attempt, error, "refused")
        except Exception:  # noqa: BLE001 - an approver that crashes has not said yes
            return await self._crashed(attempt, "refused")
        limit = deadline.earliest(self._settings.timeout_s)
        if limit.remaining_s <= 0:
            error = DeadlineExceeded(f"no time was left to call {tool.name!r}", hint="give a longer timeout")
            return await self._failed(attempt, error, "timeout")
        if tool.kind != "read":
            # Before the effect, so that a crash in between cannot leave an effect without a record.
            await self._record(attempt, "started", None)
        call = ToolCall(
            attempt.principal,
            attempt.scope,
            given,
            limit,
            self._settings.result_max_bytes,
            attempt.idempotency_key,
        )
        return await self._run(attempt, tool, call)

    async def _authorise(
        self, attempt: _Attempt, tool: Tool[Any], deadline: Deadline, approval: Approval | None
    ) -> None:
        decision = self._policy.decide(attempt.principal, tool.name, tool.kind, attempt.arguments)
        attempt.decision = decision.label
        if decision.effect == "allow":
            return
        if decision.effect == "deny":
            raise PolicyDenied(
                f"tool {tool.name!r} is refused by {decision.reason}",
                hint="try another way; repeating the call will not help",
            )
        if approval is not None:
            _heed(attempt, tool, approval)
            return
        if self._approver is None:
            raise _unapproved(tool, decision)
        waiting = asyncio.timeout(deadline.remaining_s)
        try:
            async with waiting:
                approved = await self._approver(attempt.principal, tool, attempt.arguments)
        except TimeoutError:
            if not waiting.expired():
                raise
            attempt.decision += ":unanswered"
            raise PolicyDenied(
                f"nobody approved tool {tool.name!r} in time", hint="ask again when somebody is there"
            ) from None
        attempt.decision += ":approved" if approved else ":declined"
        if not approved:
            raise PolicyDenied(
                f"tool {tool.name!r} was declined", hint="do not repeat the call; find another way or stop"
            )

    async def _run(self, attempt: _Attempt, tool: Tool[Any], call: ToolCall[Any]) -> ToolResult:
        timeout_s = call.deadline.remaining_s
        guard = asyncio.timeout(timeout_s)
        try:
            async with guard:
                content = await tool.handler(call)
            content, cut = bound_result(
                content, call.result_max_bytes, limit_argument="limit" in tool.input.model_fields
            )
        except AgenticFlowError as error:
            return await self._failed(attempt, error, "error")
        except Exception as error:  # noqa: BLE001 - whatever a tool raises, its caller reads a result
            if isinstance(error, TimeoutError) and guard.expired():
                return await self._failed(attempt, _timed_out(tool, timeout_s), "timeout")
            return await self._crashed(attempt, "error")
        await self._record(attempt, "ok", None)
        return ToolResult(
            content,
            truncated=cut or content.get("truncated") is True,
            duration_s=self._elapsed_s(attempt),
        )

    async def _crashed(self, attempt: _Attempt, outcome: Outcome) -> ToolResult:
        """The caller reads that it failed; how is for the log."""
        _log.exception("tool_crashed", tool=attempt.name, run_id=attempt.scope.run_id)
        failure = AgenticFlowError(
            f"tool {attempt.name!r} failed by a fault of its own", hint="the operator finds it in the log"
        )
        return await self._failed(attempt, failure, outcome)

    async def _failed(self, attempt: _Attempt, error: AgenticFlowError, outcome: Outcome) -> ToolResult:
        await self._record(attempt, outcome, error.code)
        if isinstance(error, Unavailable) and error.peer is not None:
            raise error  # no answer of the tool: whoever calls may wait for the service
        shown = as_tool_error(error)
        if len(shown["message"]) > _MESSAGE_CHARS_MAX:
            shown["message"] = shown["message"][:_MESSAGE_CHARS_MAX] + "…"
        return ToolResult(shown, is_error=True, duration_s=self._elapsed_s(attempt))

    async def _record(self, attempt: _Attempt, outcome: Outcome, error_code: str | None) -> None:
        await self._audit.append(self._entry(attempt, outcome, error_code))

    def _entry(self, attempt: _Attempt, outcome: Outcome, error_code: str | None) -> Entry:
        return Entry(
            at_s=self._clock.time_s(),
            tenant=attempt.principal.tenant,
            subject=attempt.principal.subject,
            run_id=attempt.scope.run_id,
            agent=attempt.scope.agent,
            tool=attempt.name[:100],
            idempotency_key=attempt.idempotency_key,
            arguments=attempt.arguments,
            decision=attempt.decision,
            outcome=outcome,
            error_code=error_code,
            duration_s=self._elapsed_s(attempt),
            private=attempt.private,
        )

    def _elapsed_s(self, attempt: _Attempt) -> float:
        return self._clock.monotonic_s() - attempt.started_s


def validated(tool: Tool[Any], arguments: Mapping[str, Any]) -> ToolInput:
    """The arguments as the tool's input model, strictly: no unknown keys, no silent conversion.

    Raises:
        InvalidInput: names the argument, what it was and what is expected.
        TooLarge: more than 16 MiB of JSON.
    """
    try:
        encoded = orjson.dumps(dict(arguments))
    except TypeError as error:
        raise InvalidInput(
            f"the arguments of {tool.name!r} are no JSON object: {error}", hint=_expects(tool)
        ) from None
    if len(encoded) > ARGUMENTS_MAX_BYTES:
        raise TooLarge(
            f"the arguments of {tool.name!r} take {len(encoded)} bytes, the limit is {ARGUMENTS_MAX_BYTES}"
        )
    try:
        # From JSON, because strict validation of Python values would refuse a list where a tuple is meant.
        return tool.input.model_validate_json(encoded)
    except ValidationError as error:
        raise _explained(tool, error) from None


def _explained(tool: Tool[Any], error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "the arguments"
    if first["type"] == "extra_forbidden":
        message = f"{tool.name!r} takes no argument {name!r}"
    elif first["type"] == "missing":
        message = f"argument {name!r} of {tool.name!r} is missing"
    else:
        shown = repr(first["input"])
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        reason = first["msg"].removeprefix("Value error, ")
        message = f"argument {name!r} of {tool.name!r} = {shown} is refused: {reason}"
    return InvalidInput(message, hint=_expects(tool))


def _expects(tool: Tool[Any]) -> str:
    """The tool's arguments in one line: `path (string, required), line_start (integer)`."""
    schema = tool.input_schema
    required = set(schema.get("required", ()))
    shown = [
        f"{name} ({_kind(part)}{', required' if name in required else ''})"
        for name, part in schema.get("properties", {}).items()
    ]
    return f"{tool.name} takes {', '.join(shown) or 'no arguments'}"


def _kind(schema: JsonObject) -> str:
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"])
    for part in schema.get("anyOf", ()):
        if part.get("type") != "null":
            return _kind(part)
    kind = str(schema.get("type", "value"))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        kind += f" {'' if low is None else low}..{'' if high is None else high}"
    return kind


def _recordable(arguments: Mapping[str, Any]) -> JsonObject:
    """Arguments that failed validation, as far as JSON can hold them, for the audit log."""
    try:
        encoded = orjson.dumps(dict(arguments))
    except TypeError:
        return {"unencodable": repr(arguments)[:_MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode()}
    return orjson.loads(encoded) if len(encoded) <= ARGUMENTS_MAX_BYTES else {"bytes": len(encoded)}


def _heed(attempt: _Attempt, tool: Tool[Any], approval: Approval) -> None:
    """Let the call pass if it was approved; the audit log says by whom."""
    if approval.by is None:
        attempt.decision += ":unanswered"
        raise PolicyDenied(
            f"nobody approved tool {tool.name!r} in time",
            hint="find another way, or say what you could not do",
        )
    attempt.decision += f":{'approved' if approval.granted else 'declined'} by {approval.by}"
    if not approval.granted:
        raise PolicyDenied(
            f"tool {tool.name!r} was declined by {approval.by!r}",
            hint="do not repeat the call; find another way or stop",
        )


def _unapproved(tool: Tool[Any], decision: Decision) -> PolicyDenied:
    return PolicyDenied(
        f"tool {tool.name!r} needs approval by {decision.reason}, and there is nobody to ask",
        hint=f'to permit it, add [[rules]] effect = "allow", tools = ["{tool.name}"] to tools.policy_file',
    )


def _timed_out(tool: Tool[Any], timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"tool {tool.name!r} did not end within {timeout_s:.1f} s",
        hint="narrow the call"
        if tool.kind == "read"
        else "it may have taken effect: look before you repeat it",
    )
