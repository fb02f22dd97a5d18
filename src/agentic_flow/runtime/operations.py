"""The gateway's policies and budgets for operators: in its database, or over HTTP when the platform runs
elsewhere and its database is not ours to open."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import Settings
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.budget_routes import budget_entry
from agentic_flow.gateway.budgets.service import Budgets
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_files import Change, Replaced, as_document, replace_policies
from agentic_flow.gateway.policy_store import PolicyChange, PolicyStore, StoredPolicies, parse_policies
from agentic_flow.gateway.stores import gateway_database
from agentic_flow.runtime.build import Runtime

if TYPE_CHECKING:
    from agentic_flow.gateway.budgets.ledger import Reconciled, WorkerState


class Operations(Protocol):
    """What `policies` and `budgets show` do. Calls block."""

    def show(self, version: int | None = None) -> StoredPolicies:
        """A version of the policies; None: the one in force."""
        ...

    def history(self, limit: int) -> list[PolicyChange]:
        """The newest versions."""
        ...

    def replace(self, policies: GatewayPolicies, *, expected_version: int | None, reason: str) -> Replaced:
        """Store a new version; see `PolicyStore.put`."""
        ...

    def budgets(self, tenant: str | None) -> list[dict[str, Any]]:
        """The accounts of the budgets in force, as `budget_entry` writes them; None: of all tenants."""
        ...


@contextmanager
def operations(settings: Settings) -> Generator[Operations]:
    """Policies and budgets where these settings have them.

    Raises:
        Unavailable, DataCorrupted: the database cannot be used; over HTTP also what the platform refuses.
    """
    url = settings.peers.platform_url
    if url is not None and settings.gateway.database_url is None:
        yield _Remote(settings, url)
        return
    with opened_database(settings) as database:
        yield _Local(database)


@contextmanager
def opened_database(settings: Settings) -> Generator[SqlDatabase]:
    """The gateway's database with its tables; a data folder without one gets it."""
    database = gateway_database(settings.gateway, settings.data_dir)
    try:
        database.create()
        yield database
    finally:
        database.close()


def budget_workers(settings: Settings) -> list[WorkerState]:
    """All workers that the ledger of the budgets knows."""
    with opened_database(settings) as database:
        return asyncio.run(Budgets(database).workers())


def reconcile_budgets(
    settings: Settings, worker: str | None, *, spent_nano: int | None = None, account_id: str | None = None
) -> list[Reconciled]:
    """Close the books of dead workers; see `Budgets.reconcile`."""
    with opened_database(settings) as database:
        books = Budgets(database)
        return asyncio.run(books.reconcile(worker, spent_nano=spent_nano, account_id=account_id))


class _Local:
    def __init__(self, database: SqlDatabase) -> None:
        self._database = database
        self._store = PolicyStore(database)

    def show(self, version: int | None = None) -> StoredPolicies:
        return self._store.current() if version is None else self._store.get(version)

    def history(self, limit: int) -> list[PolicyChange]:
        return self._store.history(limit)

    def replace(self, policies: GatewayPolicies, *, expected_version: int | None, reason: str) -> Replaced:
        return replace_policies(
            self._store, policies, expected_version=expected_version, by=_who(), reason=reason
        )

    def budgets(self, tenant: str | None) -> list[dict[str, Any]]:
        rules = self._store.current().policies.budgets
        found = asyncio.run(Budgets(self._database).report(rules, tenant=tenant))
        return [budget_entry(state) for state in found]


class _Remote:
    """The same over the platform's routes; what they demand of our key is checked there."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._url = url

    def show(self, version: int | None = None) -> StoredPolicies:
        answer = self._call("GET", "/v1/policies", params={} if version is None else {"version": version})
        policies = parse_policies(answer["policies"], source=self._url)
        return StoredPolicies(answer["version"], policies, answer["at_s"], answer["by"], answer["reason"])

    def history(self, limit: int) -> list[PolicyChange]:
        answer = self._call("GET", "/v1/policies/history", params={"limit": limit})
        return [PolicyChange(**version) for version in answer["versions"]]

    def replace(self, policies: GatewayPolicies, *, expected_version: int | None, reason: str) -> Replaced:
        body = {"policies": as_document(policies), "reason": reason}
        made_from = "*" if expected_version is None else f'"{expected_version}"'
        answer = self._call(
            "PUT", "/v1/policies", body=body, headers={"if-match": made_from}, idempotent=False
        )
        changes = [Change(**change) for change in answer["changes"]]
        return Replaced(answer["version"], answer["before"], changes, answer["unreadable"])

    def budgets(self, tenant: str | None) -> list[dict[str, Any]]:
        answer = self._call("GET", "/v1/budgets", params={} if tenant is None else {"tenant": tenant})
        return list(answer["budgets"])

    def _call(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        async def call() -> Any:
            async with Runtime(self._settings) as runtime:
                twin = HttpTwin(
                    self._url,
                    self._settings.peers,
                    tls=self._settings.tls,
                    tokens=await runtime.tokens(),
                    peer="platform",
                )
                async with twin:
                    return await twin.call(method, path, principal=LOCAL_OWNER, **how)

        answer = asyncio.run(call())
        if not isinstance(answer, dict):
            raise Unavailable(
                f"{self._url!r} answered {path!r} with something else", hint="check peers.platform_url"
            )
        return cast(dict[str, Any], answer)


def _who() -> str:
    """Who changes them: the user of this machine, since no key is asked for here."""
    try:
        return f"{LOCAL_OWNER.subject} ({getpass.getuser()})"
    except (OSError, KeyError, ImportError):
        return LOCAL_OWNER.subject
