"""HTTP twin of AgentDB: the same VectorStore, in another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from agentic_flow.core.auth import DEFAULT_TENANT, LOCAL_OWNER, Principal, TokenSource
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import PeerSettings, TlsSettings
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    Page,
    SearchQuery,
    SearchResult,
    UpsertResult,
)

BATCH_BYTES_MAX = 4 * 1024 * 1024
"""Documents are sent in requests of about this size; each document is replaced atomically, a batch of
several requests is not."""


def _as_service(tenant: str) -> Principal:
    """Who calls for a tenant when the port names only the tenant."""
    if tenant == DEFAULT_TENANT:
        return LOCAL_OWNER
    return Principal(tenant, "service", frozenset({"memory:*"}))


class RemoteAgentDB(HttpTwin):
    """VectorStore over HTTP; constructed like any HttpTwin.

    Args:
        principal_of: Who a call is made for, by tenant.
    """

    def __init__(
        self,
        base_url: str,
        peers: PeerSettings | None = None,
        *,
        tls: TlsSettings | None = None,
        tokens: TokenSource | None = None,
        peer: str | None = None,
        principal_of: Callable[[str], Principal] = _as_service,
    ) -> None:
        super().__init__(base_url, peers, tls=tls, tokens=tokens, peer=peer)
        self._principal_of = principal_of

    async def create_namespace(
        self, tenant: str, name: str, *, metric: Metric = "cosine", dimension: int | None = None
    ) -> Namespace:
        body = {"name": name, "metric": metric, "dimension": dimension}
        return Namespace.model_validate(await self._ask(tenant, "POST", "/v1/namespaces", body))

    async def namespaces(self, tenant: str) -> list[Namespace]:
        answer = await self._ask(tenant, "GET", "/v1/namespaces")
        return [Namespace.model_validate(namespace) for namespace in answer["namespaces"]]

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        return bool((await self._ask(tenant, "DELETE", _path(name)))["deleted"])

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> UpsertResult:
        answer = await self.call(
            "POST",
            f"{_path(namespace)}/items",
            body={"items": list(items), "expected_version": expected_version},
            principal=self._principal_of(tenant),
            idempotency_key=idempotency_key,
        )
        return UpsertResult.model_validate(answer)

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        answer = await self._ask(tenant, "POST", f"{_path(namespace)}/items/get", {"ids": list(ids)})
        return [Item.model_validate(item) for item in answer["items"]]

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        body = {"ids": list(ids)}
        return int((await self._once(tenant, f"{_path(namespace)}/items/delete", body))["deleted"])

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int:
        body = {"where": where}
        return int((await self._once(tenant, f"{_path(namespace)}/items/delete-where", body))["deleted"])

    async def list_items(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page:
        body = {"where": where, "cursor": cursor, "limit": limit}
        return Page.model_validate(await self._ask(tenant, "POST", f"{_path(namespace)}/items/list", body))

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        answer = await self._ask(tenant, "POST", f"{_path(namespace)}/search", query)
        return SearchResult.model_validate(answer)

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        chunks = 0
        for batch in _batches(documents):
            answer = await self._ask(tenant, "PUT", f"{_path(namespace)}/documents", {"documents": batch})
            chunks += int(answer["chunks"])
        return chunks

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        answer = await self._ask(tenant, "GET", f"{_path(namespace)}/documents")
        return {path: Fingerprint.model_validate(value) for path, value in answer["fingerprints"].items()}

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        body = {"paths": list(paths)}
        return int((await self._once(tenant, f"{_path(namespace)}/documents/delete", body))["deleted"])

    async def erase_tenant(self, tenant: str) -> int:
        answer = await self.call(
            "DELETE", "/v1/memory", params={"confirm": tenant}, principal=self._principal_of(tenant)
        )
        return int(answer["erased"])

    async def _ask(self, tenant: str, method: str, path: str, body: Any = None) -> Any:
        """A call that may be repeated: it reads, or doing it twice is doing it once."""
        return await self.call(method, path, body=body, principal=self._principal_of(tenant), idempotent=True)

    async def _once(self, tenant: str, path: str, body: Any) -> Any:
        """A call whose answer would differ the second time, such as how many rows there were to delete."""
        return await self.call(
            "POST", path, body=body, principal=self._principal_of(tenant), idempotent=False
        )


def _path(namespace: str) -> str:
    return f"/v1/namespaces/{quote(namespace, safe='')}"


def _batches(documents: Sequence[Document]) -> list[list[Document]]:
    batches: list[list[Document]] = []
    size = BATCH_BYTES_MAX + 1
    for document in documents:
        # JSON of source code is rarely more than twice its text.
        own = 2 * sum(len(chunk.text) for chunk in document.chunks) + 512 * len(document.chunks)
        if size + own > BATCH_BYTES_MAX:
            batches.append([])
            size = 0
        batches[-1].append(document)
        size += own
    return batches
