"""What is left of the budgets, and the books of dead workers, over HTTP.

GET  /v1/budgets             ?tenant=NAME → the accounts in their current periods, the fullest first
GET  /v1/budgets/workers     the workers that share them: when each was last heard, and what it holds
POST /v1/budgets/reconcile   {"worker": null, "spent_nano_usd": null, "account_id": null} closes the books of
                             dead workers → what counts as spent, and what was released

A caller with `usage:read` sees the accounts of its own tenant. `platform:admin` sees all of them, those that
the whole platform shares included, or one tenant's; workers are for it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.auth import Principal
from agentic_flow.core.web import json_response, parse, require
from agentic_flow.gateway.budgets.accounts import NANO_USD, NANO_USD_MAX, BudgetState
from agentic_flow.gateway.budgets.service import Budgets
from agentic_flow.gateway.policies import BudgetRule

SCOPE = "usage:read"
ADMIN_SCOPE = "platform:admin"

_log = structlog.get_logger(__name__)


class Reconciling(BaseModel):
    """What `POST /v1/budgets/reconcile` takes; see `Budgets.reconcile`.

    Args:
        worker: Id of a dead worker; None: all of them.
        spent_nano_usd: It spent at most this of each account beyond what it settled, in thousand-millionths
            of a dollar; the rest is given back. None: all that it held.
        account_id: Only this account.
    """

    model_config = ConfigDict(extra="forbid")

    worker: str | None = None
    spent_nano_usd: Annotated[int, Field(ge=0, le=NANO_USD_MAX)] | None = None
    account_id: str | None = None


def build_budget_routes(budgets: Budgets, rules: Callable[[], Sequence[BudgetRule]]) -> list[Route]:
    """The routes of the budgets.

    Args:
        budgets: Their ledger.
        rules: Gives the rules in force.
    """

    async def show(request: Request) -> Response:
        tenant = _tenant(require(request, SCOPE), request.query_params.get("tenant"))
        found = await budgets.report(rules(), tenant=tenant)
        return json_response({"tenant": tenant, "budgets": [budget_entry(state) for state in found]})

    async def workers(request: Request) -> Response:
        require(request, ADMIN_SCOPE)
        return json_response({"workers": [asdict(worker) for worker in await budgets.workers()]})

    async def reconcile(request: Request) -> Response:
        principal = require(request, ADMIN_SCOPE)
        wanted = await parse(request, Reconciling, strict=True)
        done = await budgets.reconcile(
            wanted.worker, spent_nano=wanted.spent_nano_usd, account_id=wanted.account_id
        )
        _log.info(
            "budgets_reconciled",
            by=principal.subject,
            tenant=principal.tenant,
            worker=wanted.worker,
            slices=len(done),
            counted_nano=sum(one.counted_nano for one in done),
            released_nano=sum(one.released_nano for one in done),
        )
        return json_response({"reconciled": [asdict(one) for one in done]})

    return [
        Route("/v1/budgets", show, methods=["GET"]),
        Route("/v1/budgets/workers", workers, methods=["GET"]),
        Route("/v1/budgets/reconcile", reconcile, methods=["POST"]),
    ]


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
