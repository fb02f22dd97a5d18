"""What is left of the budgets, over HTTP.

GET /v1/budgets   ?tenant=NAME → the accounts in their current periods, the fullest first

A caller with `usage:read` sees the accounts of its own tenant. `platform:admin` sees all of them, those that
the whole platform shares included, or one tenant's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.web import json_response, require
from agentic_flow.gateway.budgets.accounts import NANO_USD, BudgetState
from agentic_flow.gateway.budgets.service import Budgets
from agentic_flow.gateway.policies import BudgetRule

SCOPE = "usage:read"
ADMIN_SCOPE = "platform:admin"


def build_budget_routes(budgets: Budgets, rules: Callable[[], Sequence[BudgetRule]]) -> list[Route]:
    """The route of the budgets.

    Args:
        budgets: Their ledger.
        rules: Gives the rules in force.
    """

    async def show(request: Request) -> Response:
        tenant = _tenant(require(request, SCOPE), request.query_params.get("tenant"))
        found = await budgets.report(rules(), tenant=tenant)
        return json_response({"tenant": tenant, "budgets": [budget_entry(state) for state in found]})

    return [Route("/v1/budgets", show, methods=["GET"])]


def budget_entry(state: BudgetState) -> dict[str, Any]:
    """One account as JSON: dollars to read, nano-USD to reckon with."""
    amounts = {
        "limit": state.limit_nano,
        "spent": state.spent_nano,
        "reserved": state.reserved_nano,
        "left": state.left_nano,
    }
    rule = state.rule
    return {
        "rule": {"scope": rule.scope, "name": rule.name, "tenant": rule.tenant, "period": rule.period},
        "account": state.account,
        "account_id": state.account_id,
        "tenant": state.tenant or None,
        "period_start_s": state.period_start_s,
        "period_end_s": state.period_end_s,
        **{f"{name}_usd": nano / NANO_USD for name, nano in amounts.items()},
        **{f"{name}_nano_usd": nano for name, nano in amounts.items()},
    }


def _tenant(principal: Principal, asked: str | None) -> str | None:
    """Whose accounts; None: everybody's."""
    if principal.allows(ADMIN_SCOPE):
        return asked
    if asked is not None and asked != principal.tenant:
        principal.demand(ADMIN_SCOPE)
    return principal.tenant
