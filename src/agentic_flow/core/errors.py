"""Every error the product raises on purpose, and the one table that says how each leaves the house.

    AgenticFlowError
    ├── InvalidInput             the caller's words are wrong; changing them helps
    │   ├── InvalidSettings      a setting is unknown, malformed or contradictory
    │   ├── PathNotFound         a file or folder that does not exist or cannot be read
    │   ├── TooLarge             a body, file or result past its limit
    │   └── UnknownModel         no configured provider serves this model
    ├── Unauthenticated          no credential, or one that is wrong, expired or revoked
    ├── Forbidden                the principal may not do this
    │   └── PolicyDenied         a tool policy refused the call
    ├── NotFound                 no such object in this tenant
    ├── Conflict                 version, state or idempotency key contradicts what is stored
    │   └── NeedsNewer           a newer build wrote it, and this one cannot go on with it
    ├── RateLimited              too many requests; carries `retry_after_s`
    ├── BudgetExceeded           the money set aside does not cover the next call
    ├── LimitExceeded            a step, recursion or size limit of a run was reached
    ├── Cancelled                somebody cancelled the work
    ├── DeadlineExceeded         the time given was not enough
    ├── Unavailable              a service or database cannot be reached now
    │   ├── CircuitOpen          calls are held back until the peer recovers
    │   └── StorageFull          the disk of a store has no room left; nothing was written
    ├── PortInUse                another process listens there
    ├── ProviderError            a model provider answered with an error
    │   ├── ProviderRejected     it will not answer this request (4xx); do not retry
    │   ├── ProviderOverloaded   429 or 529; retry after a pause
    │   ├── ProviderFailed       5xx or a broken connection; retry
    │   └── ProviderProtocol     broken JSON or a truncated stream; retry
    └── DataCorrupted            stored data fails its checksum or schema

A message says what happened and shows the value with `!r`; the hint says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class AgenticFlowError(Exception):
    """Root of the tree.

    Args:
        message: What happened, one line, the offending value shown with `!r`.
        hint: What the reader can do about it, one line.
        retry_after_s: Seconds to wait before a retry can succeed, when known.
        details: JSON-compatible facts for programs (never secrets).
    """

    code = "internal"
    retryable = False
    answer_headers: Mapping[str, str] = MappingProxyType({})
    """What an HTTP answer carries beside the error, by lower-case name."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retry_after_s: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.details: dict[str, Any] = dict(details or {})

    def __reduce__(self) -> Any:
        # Keyword-only arguments do not survive the default pickling of exceptions.
        return (_rebuild, (type(self), self.message, self.hint, self.retry_after_s, self.details))

    @property
    def status(self) -> int:
        """HTTP status of this error."""
        return ROWS[self.code].status

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ends with this error."""
        return ROWS[self.code].exit_code


def _rebuild(
    kind: type[AgenticFlowError],
    message: str,
    hint: str | None,
    retry_after_s: float | None,
    details: dict[str, Any],
) -> AgenticFlowError:
    return kind(message, hint=hint, retry_after_s=retry_after_s, details=details)


class InvalidInput(AgenticFlowError):
    code = "invalid_input"


class InvalidSettings(InvalidInput):
    code = "invalid_settings"


class PathNotFound(InvalidInput):
    code = "path_not_found"


class TooLarge(InvalidInput):
    code = "too_large"


class UnknownModel(InvalidInput):
    code = "unknown_model"


class Unauthenticated(AgenticFlowError):
    code = "unauthenticated"


class Forbidden(AgenticFlowError):
    code = "forbidden"


class PolicyDenied(Forbidden):
    code = "policy_denied"


class NotFound(AgenticFlowError):
    code = "not_found"


class Conflict(AgenticFlowError):
    code = "conflict"


class NeedsNewer(Conflict):
    code = "needs_newer"


class RateLimited(AgenticFlowError):
    code = "rate_limited"
    retryable = True


class BudgetExceeded(AgenticFlowError):
    code = "budget_exceeded"


class LimitExceeded(AgenticFlowError):
    code = "limit_exceeded"


class NotAccepted(AgenticFlowError):
    """A run has a result that does not meet its acceptance criteria."""

    code = "not_accepted"


class Cancelled(AgenticFlowError):
    code = "cancelled"


class DeadlineExceeded(AgenticFlowError):
    code = "deadline_exceeded"
    retryable = True


OF_REQUEST: Mapping[str, str] = MappingProxyType({"scope": "request"})
"""Details of an Unavailable that another request would not meet."""


class Unavailable(AgenticFlowError):
    """Something that is needed does not serve now.

    `peer` is the neighbour of ours that was not reached, whose answer broke off, or that said it of itself,
    as when its database is away; else None.
    """

    code = "unavailable"
    retryable = True
    peer: str | None = None

    @property
    def is_of_request(self) -> bool:
        """Whether it is said of this request alone, as of a prompt too long for the memory there is: whoever
        raises it so gives it `OF_REQUEST` as details. It says nothing of the service's health."""
        return self.details.get("scope") == OF_REQUEST["scope"]


class CircuitOpen(Unavailable):
    code = "circuit_open"


class StorageFull(Unavailable):
    """A write was refused because there is no room for it. The store still answers reads."""

    code = "storage_full"


class PortInUse(AgenticFlowError):
    code = "port_in_use"


class ProviderError(AgenticFlowError):
    code = "provider_error"


class ProviderRejected(ProviderError):
    code = "provider_rejected"


class ProviderOverloaded(ProviderError):
    code = "provider_overloaded"
    retryable = True


class ProviderFailed(ProviderError):
    code = "provider_failed"
    retryable = True


class ProviderProtocol(ProviderError):
    code = "provider_protocol"
    retryable = True


class DataCorrupted(AgenticFlowError):
    code = "data_corrupted"


class Row(NamedTuple):
    """How one error code leaves the house, by door."""

    kind: type[AgenticFlowError]
    status: int
    openai_type: str
    anthropic_type: str
    mcp_code: int
    federation_refusal: str
    exit_code: int


# The one mapping table. MCP codes: JSON-RPC -32602 invalid params, -32603 internal, -32000.. server errors.
ROWS: dict[str, Row] = {
    row.kind.code: row
    for row in (
        Row(AgenticFlowError, 500, "server_error", "api_error", -32603, "internal", 1),
        Row(InvalidInput, 400, "invalid_request_error", "invalid_request_error", -32602, "malformed", 2),
        Row(InvalidSettings, 400, "invalid_request_error", "invalid_request_error", -32602, "malformed", 2),
        Row(PathNotFound, 400, "invalid_request_error", "invalid_request_error", -32602, "malformed", 2),
        Row(TooLarge, 413, "invalid_request_error", "request_too_large", -32602, "too_large", 2),
        Row(UnknownModel, 404, "invalid_request_error", "not_found_error", -32602, "malformed", 2),
        Row(
            Unauthenticated, 401, "authentication_error", "authentication_error", -32001, "unauthenticated", 3
        ),
        Row(Forbidden, 403, "permission_error", "permission_error", -32003, "forbidden", 3),
        Row(PolicyDenied, 403, "permission_error", "permission_error", -32003, "forbidden", 3),
        Row(NotFound, 404, "invalid_request_error", "not_found_error", -32004, "not_found", 4),
        Row(Conflict, 409, "invalid_request_error", "invalid_request_error", -32009, "conflict", 5),
        Row(NeedsNewer, 409, "invalid_request_error", "invalid_request_error", -32009, "conflict", 5),
        Row(RateLimited, 429, "rate_limit_error", "rate_limit_error", -32029, "rate_limited", 6),
        Row(BudgetExceeded, 402, "insufficient_quota", "billing_error", -32030, "budget_exceeded", 6),
        Row(
            LimitExceeded, 422, "invalid_request_error", "invalid_request_error", -32031, "limit_exceeded", 6
        ),
        Row(NotAccepted, 422, "invalid_request_error", "invalid_request_error", -32032, "limit_exceeded", 6),
        Row(Cancelled, 499, "server_error", "api_error", -32800, "cancelled", 130),
        Row(DeadlineExceeded, 504, "server_error", "timeout_error", -32008, "deadline_exceeded", 7),
        Row(Unavailable, 503, "server_error", "overloaded_error", -32010, "unavailable", 7),
        Row(CircuitOpen, 503, "server_error", "overloaded_error", -32010, "unavailable", 7),
        Row(StorageFull, 507, "server_error", "overloaded_error", -32010, "unavailable", 7),
        Row(PortInUse, 503, "server_error", "api_error", -32010, "unavailable", 7),
        Row(ProviderError, 502, "server_error", "api_error", -32020, "unavailable", 8),
        Row(ProviderRejected, 502, "server_error", "api_error", -32020, "unavailable", 8),
        Row(ProviderOverloaded, 503, "server_error", "overloaded_error", -32020, "unavailable", 8),
        Row(ProviderFailed, 502, "server_error", "api_error", -32020, "unavailable", 8),
        Row(ProviderProtocol, 502, "server_error", "api_error", -32020, "unavailable", 8),
        Row(DataCorrupted, 500, "server_error", "api_error", -32603, "internal", 9),
    )
}


def as_problem(error: AgenticFlowError, *, instance: str | None = None) -> dict[str, Any]:
    """RFC 9457 problem details of an error; `from_problem` is its inverse."""
    problem: dict[str, Any] = {
        "type": f"urn:agentic-flow:error:{error.code}",
        "title": error.code.replace("_", " "),
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "retryable": error.retryable,
    }
    if error.hint:
        problem["hint"] = error.hint
    if error.retry_after_s is not None:
        problem["retry_after_s"] = error.retry_after_s
    if instance:
        problem["instance"] = instance
    if error.details:
        problem["details"] = error.details
    return problem


def from_problem(problem: Mapping[str, Any]) -> AgenticFlowError:
    """The error that a problem document describes; an unknown code gives the root class."""
    row = ROWS.get(str(problem.get("code")))
    details = problem.get("details")
    retry_after = problem.get("retry_after_s")
    return (row.kind if row else AgenticFlowError)(
        str(problem.get("detail") or problem.get("title") or "the peer reported an error without detail"),
        hint=str(problem["hint"]) if problem.get("hint") else None,
        retry_after_s=float(retry_after) if isinstance(retry_after, int | float) else None,
        details=dict(details) if isinstance(details, Mapping) else None,  # pyright: ignore[reportUnknownArgumentType]
    )


def as_openai(error: AgenticFlowError) -> dict[str, Any]:
    """The error object of OpenAI-shaped routes."""
    return {
        "error": {
            "message": _line(error),
            "type": ROWS[error.code].openai_type,
            "param": None,
            "code": error.code,
        }
    }


def as_anthropic(error: AgenticFlowError) -> dict[str, Any]:
    """The error object of Anthropic-shaped routes."""
    return {"type": "error", "error": {"type": ROWS[error.code].anthropic_type, "message": _line(error)}}


def as_tool_error(error: AgenticFlowError) -> dict[str, Any]:
    """What a model reads when its tool call failed: code, message and the way out."""
    shown: dict[str, Any] = {"code": error.code, "message": error.message, "retryable": error.retryable}
    if error.hint:
        shown["hint"] = error.hint
    return shown


def _line(error: AgenticFlowError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
