"""What operators' routes of the gateway take and give, for its OpenAPI document: budgets and policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from agentic_flow.core.errors import AgenticFlowError, Conflict, NotFound, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.openapi import Operation
from agentic_flow.gateway import budget_routes, policy_routes
from agentic_flow.gateway.budgets.ledger import Reconciled, WorkerState
from agentic_flow.gateway.policies import GatewayPolicies, Period, Scope
from agentic_flow.gateway.policy_files import Change
from agentic_flow.gateway.policy_store import HISTORY_MAX, WORDS_MAX, PolicyChange

_IF_MATCH: dict[str, JsonObject] = {
    "if-match": {
        "type": "string",
        "pattern": r'^(\*|"[0-9]{1,18}")$',
        "description": "ETag of the version that the change was made from; `*`: whatever is there.",
    }
}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BudgetsQuery(_Closed):
    """Whose accounts."""

    tenant: str | None = Field(
        default=None,
        description="Another tenant: needs the scope `platform:admin`, with which none means all of them.",
    )


class BudgetOwner(_Closed):
    """The rule that an account is kept by."""

    scope: Scope
    name: str
    tenant: str | None
    period: Period


class BudgetEntry(_Closed):
    """One account in its current period: dollars to read, thousand-millionths of them to reckon with."""

    rule: BudgetOwner
    account: str = Field(description="Its name, for people.")
    account_id: str
    tenant: str | None = Field(description="Null where the whole platform shares it.")
    period_start_s: int
    period_end_s: int | None = Field(description="Null: it never ends.")
    limit_usd: float
    spent_usd: float
    reserved_usd: float = Field(description="Set aside for calls under way, and what workers hold.")
    left_usd: float
    limit_nano_usd: int
    spent_nano_usd: int
    reserved_nano_usd: int
    left_nano_usd: int


class BudgetList(_Closed):
    """Accounts, the fullest first."""

    tenant: str | None
    budgets: list[BudgetEntry]


class WorkerList(_Closed):
    """The workers that share the budgets."""

    workers: list[WorkerState]


class ReconciledList(_Closed):
    """What became of the slices of dead workers."""

    reconciled: list[Reconciled]


class PoliciesQuery(_Closed):
    """Which version."""

    version: Annotated[int, Field(ge=0, le=policy_routes.VERSION_MAX)] | None = Field(
        default=None, description="Left out: the one in force."
    )


class HistoryQuery(_Closed):
    """How much of the history."""

    limit: Annotated[int, Field(ge=1, le=HISTORY_MAX)] = Field(
        default=policy_routes.HISTORY_DEFAULT, description="Versions at most."
    )


class PoliciesVersion(_Closed):
    """One version; its document as its operator wrote it, without defaults."""

    version: int
    at_s: float
    by: str
    reason: str
    policies: JsonObject


class ReplacePolicies(_Closed):
    """All policies, why, and the version that they were made from, unless `if-match` says it."""

    policies: GatewayPolicies
    reason: Annotated[str, Field(min_length=1, max_length=WORDS_MAX)]
    expected_version: Annotated[int, Field(ge=0, le=policy_routes.VERSION_MAX)] | None = None


class ReplacedPolicies(_Closed):
    """The new version, the one before it, and what differs."""

    version: int
    before: int
    changes: list[PolicyChanged]
    unreadable: str | None = Field(description="Why the replaced version could not be read, if it could not.")


class PolicyChanged(_Closed):
    """One field that differs."""

    kind: Annotated[str, Field(json_schema_extra={"enum": ["added", "removed", "changed"]})]
    field: str
    before: Any
    after: Any


class PolicyVersion(_Closed):
    """A version without its document."""

    version: int
    at_s: float
    by: str
    reason: str


class PolicyHistory(_Closed):
    """Versions, newest first."""

    versions: list[PolicyVersion]


assert Change._fields == tuple(PolicyChanged.model_fields), "the document shows what the route gives"
assert PolicyChange._fields == tuple(PolicyVersion.model_fields), "the document shows what the route gives"

MORE_ERRORS: Mapping[str, tuple[type[AgenticFlowError], ...]] = {
    "reconcile_budgets": (NotFound, Conflict, TooLarge),
    "show_policies": (NotFound,),
    "replace_policies": (Conflict, TooLarge),
}
"""What an operation can fail with, beside what each can."""


def operator_operations() -> list[Operation]:
    """The operations of budgets and policies."""
    return [
        Operation(
            "budgets", "GET", "/v1/budgets", "What is left of the budgets.", None, budget_routes.SCOPE,
            BudgetList, query=BudgetsQuery,
        ),
        Operation(
            "budget_workers", "GET", "/v1/budgets/workers", "The workers that share the budgets.", None,
            budget_routes.ADMIN_SCOPE, WorkerList,
        ),
        Operation(
            "reconcile_budgets", "POST", "/v1/budgets/reconcile", "Close the books of dead workers.", None,
            budget_routes.ADMIN_SCOPE, ReconciledList, body=budget_routes.Reconciling,
            notes="What such a worker held counts as spent, unless the request says that it was less.",
        ),
        Operation(
            "show_policies", "GET", "/v1/policies", "The policies in force, or an earlier version.", None,
            policy_routes.SCOPE, PoliciesVersion, query=PoliciesQuery,
        ),
        Operation(
            "replace_policies", "PUT", "/v1/policies", "Replace the policies.", None, policy_routes.SCOPE,
            ReplacedPolicies, body=ReplacePolicies, headers=_IF_MATCH,
            notes="Refused when they have changed since the version that the request names.",
        ),
        Operation(
            "policy_history", "GET", "/v1/policies/history", "Who changed the policies, when and why.", None,
            policy_routes.SCOPE, PolicyHistory, query=HistoryQuery,
        ),
    ]  # fmt: skip
