"""Managing tenants and keys: on this data folder, or over HTTP when the platform runs elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from agentic_flow.core.auth import DEFAULT_TENANT, LOCAL_OWNER
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import Settings
from agentic_flow.runtime.build import Runtime
from agentic_flow.runtime.identity import Identity, KeyInfo, TenantInfo

if TYPE_CHECKING:
    from agentic_flow.agentdb.erasure import BackupSurvey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ErasedTenant:
    """What erasing a tenant removed, by place, and which backups still hold it."""

    erased: dict[str, int]
    backups: BackupSurvey


class Administration(Protocol):
    """What `keys` and `tenants` do. Tenant None is the caller's own."""

    async def create_key(
        self, tenant: str | None, subject: str, scopes: Collection[str], *, expires_at_s: float | None = None
    ) -> tuple[KeyInfo, str]: ...

    async def list_keys(self, tenant: str | None) -> list[KeyInfo]: ...

    async def revoke_key(self, key_id: str) -> KeyInfo: ...

    async def create_tenant(self, name: str) -> TenantInfo: ...

    async def list_tenants(self) -> list[TenantInfo]: ...

    async def revoke_tenant(self, name: str) -> TenantInfo: ...

    async def erase_tenant(self, name: str, *, backups: Sequence[Path] = ()) -> ErasedTenant:
        """Erase it everywhere, then look for it in backups: also in these folders of this machine.

        Raises:
            PathNotFound: one of them is no folder; nothing was erased.
        """
        ...


def administer(settings: Settings, work: Callable[[Administration], Awaitable[T]]) -> T:
    """Run one piece of administration where the platform is."""

    async def run() -> T:
        async with Runtime(settings) as runtime:
            url = runtime.peer_url("platform")
            if url is None:
                return await work(_Local(runtime, await runtime.identity()))
            twin = HttpTwin(
                url,
                settings.peers,
                tls=settings.tls,
                tokens=await runtime.tokens(),
                peer="platform",
            )
            async with twin:
                return await work(_Remote(twin))

    return asyncio.run(run())


class _Local:
    def __init__(self, runtime: Runtime, identity: Identity) -> None:
        self._runtime = runtime
        self._identity = identity

    async def create_key(
        self, tenant: str | None, subject: str, scopes: Collection[str], *, expires_at_s: float | None = None
    ) -> tuple[KeyInfo, str]:
        return await self._identity.create_key(
            tenant or DEFAULT_TENANT, subject, scopes, expires_at_s=expires_at_s
        )

    async def list_keys(self, tenant: str | None) -> list[KeyInfo]:
        return await self._identity.list_keys(tenant or DEFAULT_TENANT)

    async def revoke_key(self, key_id: str) -> KeyInfo:
        return await self._identity.revoke_key(key_id)

    async def create_tenant(self, name: str) -> TenantInfo:
        return await self._identity.create_tenant(name)

    async def list_tenants(self) -> list[TenantInfo]:
        return await self._identity.list_tenants()

    async def revoke_tenant(self, name: str) -> TenantInfo:
        return await self._identity.revoke_tenant(name)

    async def erase_tenant(self, name: str, *, backups: Sequence[Path] = ()) -> ErasedTenant:
        from agentic_flow.agentdb.erasure import check_folders

        check_folders(backups)
        erased = await self._identity.erase_tenant(name, others=await self._runtime.erasers())
        return ErasedTenant(erased, await self._runtime.survey_backups(name, backups))


class _Remote:
    """The same over the platform's routes; what they demand of our key is checked there."""

    def __init__(self, twin: HttpTwin) -> None:
        self._twin = twin

    async def create_key(
        self, tenant: str | None, subject: str, scopes: Collection[str], *, expires_at_s: float | None = None
    ) -> tuple[KeyInfo, str]:
        body: dict[str, Any] = {"subject": subject, "scopes": list(scopes)}
        body |= {"tenant": tenant} if tenant else {}
        body |= {"expires_at_s": expires_at_s} if expires_at_s else {}
        answer = await self._call("POST", "/v1/keys", body)
        return _key(answer["info"]), str(answer["key"])

    async def list_keys(self, tenant: str | None) -> list[KeyInfo]:
        params = {"tenant": tenant} if tenant else None
        answer = await self._twin.call("GET", "/v1/keys", params=params, principal=LOCAL_OWNER)
        return [_key(key) for key in answer["keys"]]

    async def revoke_key(self, key_id: str) -> KeyInfo:
        return _key(await self._call("DELETE", f"/v1/keys/{key_id}"))

    async def create_tenant(self, name: str) -> TenantInfo:
        return TenantInfo(**await self._call("POST", "/v1/tenants", {"name": name}))

    async def list_tenants(self) -> list[TenantInfo]:
        answer = await self._call("GET", "/v1/tenants")
        return [TenantInfo(**tenant) for tenant in answer["tenants"]]

    async def revoke_tenant(self, name: str) -> TenantInfo:
        return TenantInfo(**await self._call("POST", f"/v1/tenants/{name}/revoke"))

    async def erase_tenant(self, name: str, *, backups: Sequence[Path] = ()) -> ErasedTenant:
        from agentic_flow.agentdb.erasure import BackupSurvey, check_folders, survey_backups

        check_folders(backups)
        answer = await self._call("DELETE", f"/v1/tenants/{name}")
        survey = BackupSurvey.model_validate(answer["backups"])
        if backups:
            here = await asyncio.to_thread(survey_backups, name, backups)
            survey = survey.joined(here)
        return ErasedTenant({str(place): int(count) for place, count in answer["erased"].items()}, survey)

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        return await self._twin.call(method, path, body=body, principal=LOCAL_OWNER)


def _key(data: dict[str, Any]) -> KeyInfo:
    scopes: list[str] = data["scopes"]
    return KeyInfo(**{name: value for name, value in data.items() if name != "scopes"}, scopes=tuple(scopes))
