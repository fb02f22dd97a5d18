"""The gateway's policies, budgets, usage and choices for operators: in its database, or over HTTP when the
platform runs elsewhere and its database is not ours to open."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import SYSTEM_CLOCK
from agentic_flow.core.errors import Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import Settings
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.budget_routes import budget_entry
from agentic_flow.gateway.budgets.ledger import Reconciled, WorkerState
from agentic_flow.gateway.budgets.service import Budgets
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_files import Change, Replaced, as_document, replace_policies
from agentic_flow.gateway.policy_store import PolicyChange, PolicyStore, StoredPolicies, parse_policies
from agentic_flow.gateway.stores import gateway_database
from agentic_flow.gateway.usage_table import EVERYBODY, UsageReport, read_keys, read_moment, usage_report
from agentic_flow.runtime.build import Runtime, stored_secrets, with_stored_secrets

if TYPE_CHECKING:
    from agentic_flow.gateway.routing.choice import ChoiceRequest, ExplainedChoice

T = TypeVar("T")


class Operations(Protocol):
    """What `policies`, `budgets`, `models usage` and `models route` do. Calls block."""

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

    def workers(self) -> list[WorkerState]:
        """All workers that the ledger of the budgets knows."""
        ...

    def reconcile(
        self, worker: str | None, *, spent_nano: int | None = None, account_id: str | None = None
    ) -> list[Reconciled]:
        """Close the books of dead workers; see `Budgets.reconcile`."""
        ...

    def usage(self, tenant: str | None, by: str, since: str, until: str | None, limit: int) -> UsageReport:
        """What calls used, as `GET /v1/usage` takes it; None: the tenant of whoever asks, `*`: everybody."""
        ...


@contextmanager
def operations(settings: Settings, url: str | None = None) -> Generator[Operations]:
    """What these settings lead to: the database, or the platform that has it.

    Args:
        settings: Of this process.
        url: A platform to ask, whatever database the settings name.

    Raises:
        Unavailable, DataCorrupted: the database cannot be used; over HTTP also what the platform refuses.
    """
    url = platform_of(settings, url)
    if url is not None:
        yield _Remote(settings, url)
        return
    with opened_database(settings) as database:
        yield _Local(database)


def platform_of(settings: Settings, url: str | None = None) -> str | None:
    """The platform that is to be asked; None: the database is ours to open. Arguments as `operations`."""
    if url is None and settings.gateway.database_url is None:
        return settings.peers.platform_url
    return url


def explained_choice(settings: Settings, wanted: ChoiceRequest, url: str | None = None) -> ExplainedChoice:
    """Where a call would go: by this machine's settings, or as a running platform sees it. Blocks.

    Unlike `operations` it makes no database where there is none.

    Args:
        settings: Of this process.
        wanted: What would be asked.
        url: As `operations`.

    Raises:
        AgenticFlowError: as `choice.explained`, and as `operations`.
    """
    from agentic_flow.core import plugins
    from agentic_flow.gateway.routing.choice import explain_choice, learned_router, stored_policies

    url = platform_of(settings, url)
    if url is not None:
        return _Remote(settings, url).explain(wanted)
    settings = with_stored_secrets(settings)
    wanted = wanted.model_copy(update={"tenant": wanted.tenant or LOCAL_OWNER.tenant})
    stored = stored_policies(settings.gateway, settings.data_dir)
    return explain_choice(
        wanted,
        settings=settings.gateway,
        stored=stored,
        extra_providers=plugins.load_all("agentic_flow.providers"),
        learned=learned_router(wanted, settings.gateway, settings.data_dir, stored),
        stored_secrets=stored_secrets(settings.data_dir),
    )


@contextmanager
def opened_database(settings: Settings) -> Generator[SqlDatabase]:
    """The gateway's database with its tables; a data folder without one gets it."""
    database = gateway_database(settings.gateway, settings.data_dir)
    try:
        database.create()
        yield database
    finally:
        database.close()


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

    def workers(self) -> list[WorkerState]:
        return asyncio.run(Budgets(self._database).workers())

    def reconcile(
        self, worker: str | None, *, spent_nano: int | None = None, account_id: str | None = None
    ) -> list[Reconciled]:
        books = Budgets(self._database)
        return asyncio.run(books.reconcile(worker, spent_nano=spent_nano, account_id=account_id))

    def usage(self, tenant: str | None, by: str, since: str, until: str | None, limit: int) -> UsageReport:
        now_s = SYSTEM_CLOCK.time_s()
        since_s = read_moment(since, "--since", now_s)
        until_s = now_s if until is None else read_moment(until, "--until", now_s)
        whose = None if tenant == EVERYBODY else tenant or LOCAL_OWNER.tenant
        return usage_report(self._database, whose, read_keys(by), since_s, until_s, limit)


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

    def workers(self) -> list[WorkerState]:
        def read(answer: dict[str, Any]) -> list[WorkerState]:
            return [WorkerState(**worker) for worker in answer["workers"]]

        return self._asked(read, "GET", "/v1/budgets/workers")

    def reconcile(
        self, worker: str | None, *, spent_nano: int | None = None, account_id: str | None = None
    ) -> list[Reconciled]:
        body = {"worker": worker, "spent_nano_usd": spent_nano, "account_id": account_id}

        def read(answer: dict[str, Any]) -> list[Reconciled]:
            return [Reconciled(**one) for one in answer["reconciled"]]

        return self._asked(read, "POST", "/v1/budgets/reconcile", body=body)

    def usage(self, tenant: str | None, by: str, since: str, until: str | None, limit: int) -> UsageReport:
        asked: dict[str, str | int] = {"by": by, "since": since, "limit": limit}
        asked |= {} if until is None else {"until": until}
        asked |= {} if tenant is None else {"tenant": tenant}
        return self._asked(UsageReport.from_json, "GET", "/v1/usage", params=asked)

    def explain(self, wanted: ChoiceRequest) -> ExplainedChoice:
        """As `explained_choice`."""
        from agentic_flow.gateway.routing.choice import ExplainedChoice

        body = wanted.model_dump(mode="json", exclude_none=True)
        return self._asked(ExplainedChoice.model_validate, "POST", "/v1/route", body=body, idempotent=True)

    def _asked(self, read: Callable[[dict[str, Any]], T], method: str, path: str, **how: Any) -> T:
        """What `read` makes of an answer."""
        answer = self._call(method, path, **how)
        try:
            return read(answer)
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_answer(path) from error

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
            raise self._no_answer(path)
        return cast(dict[str, Any], answer)

    def _no_answer(self, path: str) -> Unavailable:
        return Unavailable(
            f"{self._url!r} answered {path!r} with something else",
            hint="check that it is the address of a platform of this version",
        )


def _who() -> str:
    """Who changes them: the user of this machine, since no key is asked for here."""
    try:
        return f"{LOCAL_OWNER.subject} ({getpass.getuser()})"
    except (OSError, KeyError, ImportError):
        return LOCAL_OWNER.subject
