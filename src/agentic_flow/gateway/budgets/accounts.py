"""Accounts: a budget rule, applied to one caller, in one period."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b

from agentic_flow.core.errors import BudgetExceeded
from agentic_flow.gateway.budgets.periods import span
from agentic_flow.gateway.policies import EACH, BudgetRule, Caller

NANO_USD = 1_000_000_000
NANO_USD_MAX = 10**18
"""Largest amount of one call: a thousand million dollars, far inside what a database's integers hold."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whose money, under which rule, in which period.

    Args:
        id: A hash of all that follows but the limit and the rule's other words, so it stays when a limit or
            another rule changes.
        rule_id: A hash of the rule without its limit.
        tenant: "" where the whole platform shares it.
        subject: Which tenant, key, agent or run; "" for the platform.
        start_s, end_s: Its period; `end_s` is None for `total`.
    """

    id: str
    rule_id: str
    rule: BudgetRule
    tenant: str
    subject: str
    start_s: int
    end_s: int | None

    @property
    def name(self) -> str:
        """What people call it."""
        return account_name(self.rule.scope, self.tenant, self.subject)


@dataclass(frozen=True, slots=True)
class BudgetState:
    """One account as far as it is known.

    Args:
        account: Its name, for people.
        account_id: Its id in the ledger.
        limit_nano, spent_nano: Nano-USD.
        reserved_nano: Set aside: calls in flight, and what workers hold of it.
        period_end_s: Seconds since the Unix epoch; None: never.
        as_of_s: When the ledger was last asked (same clock); None: this worker never asked about it, so
            that what others spent is not in it.
        tenant: Whose it is; "" where the whole platform shares it.
    """

    rule: BudgetRule
    account: str
    account_id: str
    limit_nano: int
    spent_nano: int
    reserved_nano: int
    period_start_s: int
    period_end_s: int | None
    as_of_s: float | None
    tenant: str = ""

    @property
    def left_nano(self) -> int:
        return max(0, self.limit_nano - self.spent_nano - self.reserved_nano)


def account_name(scope: str, tenant: str, subject: str) -> str:
    """`run 'r1' of tenant 'acme'`; characters that a database would refuse are shown as escapes."""
    if scope == "platform":
        return f"platform for tenant {_shown(tenant)}" if tenant else "platform"
    if scope == "tenant":
        return f"tenant {_shown(tenant)}"
    return f"{scope} {_shown(subject)} of tenant {_shown(tenant)}"


def accounts_of(caller: Caller, rules: Iterable[BudgetRule], time_s: float) -> list[Account]:
    """The accounts that a call of this caller is charged to, each once.

    Rules that differ only in their limit are one account, and the lowest limit counts. A rule for agents
    (runs) matches only callers that name one.
    """
    found: dict[str, Account] = {}
    for rule in rules:
        account = _account(caller, rule, time_s)
        if account is None:
            continue
        same = found.get(account.id)
        if same is None or rule.limit_nano_usd < same.rule.limit_nano_usd:
            found[account.id] = account
    return list(found.values())


def rule_identity(rule: BudgetRule) -> str:
    """Hash of a rule without its limit."""
    return _digest([rule.scope, rule.tenant, rule.name, rule.period])


def exceeded(
    account: Account, limit_nano: int, left_nano: int, asked_nano: int, time_s: float
) -> BudgetExceeded:
    """The refusal: which rule, its limit, what is left, and when the period ends."""
    rule = account.rule
    ends = "never ends"
    retry_after_s = None
    if account.end_s is not None:
        ends = f"ends {datetime.fromtimestamp(account.end_s, UTC):%Y-%m-%d %H:%M} UTC"
        retry_after_s = max(0.0, account.end_s - time_s)
    scope = f"{rule.scope} {rule.name!r}" + (f" of tenant {rule.tenant!r}" if rule.tenant else "")
    return BudgetExceeded(
        f"the budget rule for {scope} allows {usd(limit_nano)} USD per {rule.period}, and {account.name} has "
        f"{usd(left_nano)} USD left of it; this call can cost {usd(asked_nano)} USD; the period {ends}",
        hint="wait for the next period, ask for fewer output tokens, or have the operator raise the limit",
        retry_after_s=retry_after_s,
        details={
            "scope": rule.scope,
            "name": rule.name,
            "period": rule.period,
            "account": account.name,
            "limit_usd": limit_nano / NANO_USD,
            "left_usd": left_nano / NANO_USD,
            "period_end_s": account.end_s,
        },
    )


def usd(nano: int) -> str:
    """Nano-USD as dollars without rounding: `1.5`, `0.000000001`."""
    sign, whole = ("-", -nano) if nano < 0 else ("", nano)
    return f"{sign}{whole // NANO_USD}.{whole % NANO_USD:09d}".rstrip("0").rstrip(".")


def _account(caller: Caller, rule: BudgetRule, time_s: float) -> Account | None:
    if rule.tenant is not None and rule.tenant != caller.tenant:
        return None
    tenant, subject = caller.tenant, ""
    if rule.scope == "platform":
        # A rule for the platform that names a tenant counts that tenant's callers only.
        tenant = rule.tenant or ""
    else:
        subject = getattr(caller, rule.scope)
        if not subject or rule.name not in (EACH, subject):
            return None
    start_s, end_s = span(rule.period, time_s)
    rule_id = rule_identity(rule)
    return Account(
        _digest([rule_id, tenant, subject, start_s]), rule_id, rule, tenant, subject, start_s, end_s
    )


def _digest(parts: Sequence[str | int | None]) -> str:
    # JSON in ASCII keeps apart what a plain join would confuse, and callers' NULs and lone surrogates out.
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _shown(text: str) -> str:
    return repr(text)
