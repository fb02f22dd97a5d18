"""AgentDB's HTTP twin: the same `VectorStore`, when the database runs elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from agentic_flow.agentdb.names import check_namespace
from agentic_flow.core.auth import Principal, TokenSource
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Unavailable
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

Value = TypeVar("Value")

_NAMESPACES = TypeAdapter(list[Namespace])
_NAMESPACE = TypeAdapter(Namespace)
_ITEMS = TypeAdapter(list[Item])
_PAGE = TypeAdapter(Page)
_UPSERT = TypeAdapter(UpsertResult)
_SEARCH = TypeAdapter(SearchResult)
_FINGERPRINTS = TypeAdapter(dict[str, Fingerprint])
_COUNT = TypeAdapter(int)
_FLAG = TypeAdapter(bool)


def service_principal(tenant: str) -> Principal:
    """Whoever works for a tenant inside the product."""
    return Principal(tenant, "service", frozenset({"memory:*"}))


class RemoteAgentDB(HttpTwin):
    """`VectorStore` over HTTP; constructed like every HttpTwin.

    Args:
        principal_of: The principal that calls are made as, by tenant. Without authentication on the far side
            the caller there is the local owner, whatever this says.
    """

    def __init__(
        self,
        base_url: str,
        peers: PeerSettings | None = None,
        *,
        tls: TlsSettings | None = None,
        tokens: TokenSource | None = None,
        peer: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        principal_of: Callable[[str], Principal] = service_principal,
    ) -> None:
        super().__init__(base_url, peers, tls=tls, tokens=tokens, peer=peer, clock=clock)
        self._principal_of = principal_of

    async def __aenter__(self) -> Self:
        return self

    # Namespaces

    async def create_namespace(
        self, tenant: str, name: str, *, metric: Metric = "cosine", dimension: int | None = None
    ) -> Namespace:
        """See VectorStore."""
        body = {"metric": metric, "dimension": dimension}
        return _read(_NAMESPACE, await self._ask(tenant, "PUT", _path(name), body))

    async def namespaces(self, tenant: str) -> list[Namespace]:
        return _read(_NAMESPACES, await self._ask(tenant, "GET", "/v1/namespaces"), "namespaces")

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        return _read(_FLAG, await self._ask(tenant, "DELETE", _path(name)), "deleted")

    async def erase_tenant(self, tenant: str) -> int:
        return _read(_COUNT, await self._ask(tenant, "DELETE", "/v1/namespaces"), "items")

    # Items

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> UpsertResult:
        """See VectorStore. Without a key it makes one, so that a retry changes nothing more."""
        answer = await self.call(
            "POST",
            _path(namespace, "/items"),
            body={"items": [_plain(item) for item in items], "expected_version": expected_version},
            principal=self._principal_of(tenant),
            idempotency_key=idempotency_key or secrets.token_hex(16),
        )
        return _read(_UPSERT, answer)

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        answer = await self._ask(tenant, "POST", _path(namespace, "/items/get"), {"ids": list(ids)})
        return _read(_ITEMS, answer, "items")

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        answer = await self._ask(tenant, "POST", _path(namespace, "/items/delete"), {"ids": list(ids)})
        return _read(_COUNT, answer, "deleted")

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int:
        answer = await self._ask(tenant, "POST", _path(namespace, "/items/delete"), {"where": where})
        return _read(_COUNT, answer, "deleted")

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
        return _read(_PAGE, await self._ask(tenant, "POST", _path(namespace, "/items/list"), body))

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        body = query.model_dump(mode="json")
        return _read(_SEARCH, await self._ask(tenant, "POST", _path(namespace, "/search"), body))

    # Documents

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        body = {
            "documents": [
                {
                    **document.model_dump(exclude={"chunks"}),
                    "chunks": [_plain(item) for item in document.chunks],
                }
                for document in documents
            ]
        }
        return _read(_COUNT, await self._ask(tenant, "PUT", _path(namespace, "/documents"), body), "chunks")

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        answer = await self._ask(tenant, "GET", _path(namespace, "/documents"))
        return _read(_FINGERPRINTS, answer, "documents")

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        body = {"paths": list(paths)}
        answer = await self._ask(tenant, "POST", _path(namespace, "/documents/delete"), body)
        return _read(_COUNT, answer, "deleted")

    async def _ask(self, tenant: str, method: str, path: str, body: Any = None) -> Any:
        # All of these end in the same state when they are done twice; upsert has its key instead.
        principal = self._principal_of(tenant)
        return await self.call(method, path, body=body, principal=principal, idempotent=True)


def _path(namespace: str, below: str = "") -> str:
    # Checked here, for a slash would name another route there.
    return f"/v1/namespaces/{quote(check_namespace(namespace), safe='')}{below}"


def _plain(item: Item) -> dict[str, Any]:
    """What the far side needs of an item: defaults and what it sets itself stay here."""
    return item.model_dump(
        mode="json",
        context={"vectors": "base64"},
        exclude={"version", "created_at_s", "updated_at_s"},
        exclude_defaults=True,
    )


def _read(adapter: TypeAdapter[Value], answer: Any, field: str | None = None) -> Value:
    """The value of an answer, or of one of its fields."""
    try:
        return adapter.validate_python(answer if field is None else answer[field])
    except (ValidationError, KeyError, TypeError) as error:
        raise Unavailable(
            f"the far side answered with something that is no answer of AgentDB ({type(error).__name__})",
            hint="check that peers.agentdb_url names an AgentDB of this version",
        ) from error
