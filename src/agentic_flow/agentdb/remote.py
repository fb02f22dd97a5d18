"""AgentDB's HTTP twin: the same `VectorStore`, when the database runs elsewhere."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from agentic_flow.agentdb.names import check_idempotency_key, check_namespace
from agentic_flow.core.auth import DEFAULT_TENANT, Principal, TokenSource
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidInput, TooLarge, Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.settings import PeerSettings, ServeSettings, TlsSettings
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Metric,
    Namespace,
    NamespaceStats,
    Page,
    Quantization,
    SearchQuery,
    SearchResult,
    UpsertResult,
    Vector,
)

Value = TypeVar("Value")

_NAMESPACES = TypeAdapter(list[Namespace])
_NAMESPACE = TypeAdapter(Namespace)
_ITEMS = TypeAdapter(list[Item])
_PAGE = TypeAdapter(Page)
_UPSERT = TypeAdapter(UpsertResult)
_SEARCH = TypeAdapter(SearchResult)
_SEARCHES = TypeAdapter(list[SearchResult])
_STATS = TypeAdapter(list[NamespaceStats])
_FINGERPRINTS = TypeAdapter(dict[str, Fingerprint])
_NAMES = TypeAdapter(list[str])
_COUNT = TypeAdapter(int)
_FLAG = TypeAdapter(bool)

_BASE64 = {"vector_format": "base64"}
_SET_BY_THE_STORE = {"version", "created_at_s", "updated_at_s", "document"}
# What stands around the parts of a body, with room to spare.
_FRAME_BYTES = 256


def service_principal(tenant: str) -> Principal:
    """Whoever works for a tenant inside the product."""
    return Principal(tenant, "service", frozenset({"memory:*"}))


class RemoteAgentDB(HttpTwin):
    """`VectorStore` over HTTP; constructed like every HttpTwin. Vectors travel as base64 of float32.

    Args:
        principal_of: The principal that calls are made as, by tenant. Without authentication on the far side
            the caller there is the local owner, whatever this says.
        body_max_bytes: The far side's `serve.body_max_bytes`: what is larger goes in several calls where the
            port allows it.
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
        body_max_bytes: int | None = None,
    ) -> None:
        super().__init__(base_url, peers, tls=tls, tokens=tokens, peer=peer, clock=clock)
        self._principal_of = principal_of
        self._body_max_bytes = body_max_bytes or ServeSettings().body_max_bytes

    async def __aenter__(self) -> Self:
        return self

    # Namespaces

    async def create_namespace(
        self,
        tenant: str,
        name: str,
        *,
        metric: Metric = "cosine",
        dimension: int | None = None,
        embedder_id: str | None = None,
        quantization: Quantization | None = None,
    ) -> Namespace:
        """See VectorStore."""
        body = {
            "metric": metric,
            "dimension": dimension,
            "embedder_id": embedder_id,
            "quantization": quantization,
        }
        return _read(_NAMESPACE, await self._ask(tenant, "PUT", _path(name), body))

    async def namespaces(self, tenant: str) -> list[Namespace]:
        return _read(_NAMESPACES, await self._ask(tenant, "GET", "/v1/namespaces"), "namespaces")

    async def check(self) -> None:
        """See VectorStore."""
        await self.namespaces(DEFAULT_TENANT)

    async def stats(self, tenant: str) -> list[NamespaceStats]:
        """See VectorStore. `sequence` is None unless the token is an operator's (scope `platform:admin`)."""
        return _read(_STATS, await self._ask(tenant, "GET", "/v1/namespace-stats"), "stats")

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        return _read(_FLAG, await self._ask(tenant, "DELETE", _path(name)), "deleted")

    async def erase_tenant(self, tenant: str) -> int:
        return _read(_COUNT, await self._ask(tenant, "DELETE", "/v1/namespaces"), "items")

    async def tenants_with(self, namespace: str) -> list[str]:
        """See VectorStore. It asks in the name of the default tenant, as an operator where it may."""
        path = f"/v1/tenants-with/{quote(check_namespace(namespace), safe='')}"
        service = self._principal_of(DEFAULT_TENANT)
        operator = replace(service, scopes=service.scopes | {"platform:admin"})
        found = await self.call("GET", path, principal=operator, idempotent=True)
        return _read(_NAMES, found, "tenants")

    # Items

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
        embedder_id: str | None = None,
    ) -> UpsertResult:
        """See VectorStore. Without a key it makes one, so that a retry changes nothing more."""
        key = secrets.token_hex(16) if idempotency_key is None else check_idempotency_key(idempotency_key)
        body = {
            "items": [_plain(item, _SET_BY_THE_STORE) for item in items],
            "expected_version": expected_version,
            "embedder_id": embedder_id,
        }
        answer = await self.call(
            "POST",
            _path(namespace, "/items"),
            body=_json(body),
            principal=self._principal_of(tenant),
            idempotency_key=key,
        )
        return _read(_UPSERT, answer)

    async def restore(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        documents: Mapping[str, Fingerprint] | None = None,
    ) -> int:
        """See VectorStore. What is larger than one call goes in several, documents before their chunks.

        Raises:
            TooLarge: one item alone is larger than a call may be.
        """
        path = _path(namespace, "/items/restore")
        marks = [_json(name) + b":" + _json(mark.model_dump()) for name, mark in (documents or {}).items()]
        rows = [_json(_plain(item)) for item in items]

        def named(index: int) -> str:
            return "a document" if index < len(marks) else f"item {items[index - len(marks)].id!r}"

        restored = 0
        for start, stop in self._parts([*marks, *rows], named):
            some_marks = marks[start:stop]
            some_rows = rows[max(0, start - len(marks)) : max(0, stop - len(marks))]
            body = b'{"documents":{%b},"items":[%b]}' % (b",".join(some_marks), b",".join(some_rows))
            restored += _read(_COUNT, await self._ask(tenant, "POST", path, body), "restored")
        return restored

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        path = _path(namespace, "/items/get")
        return _read(_ITEMS, await self._ask(tenant, "POST", path, {"ids": list(ids)}, _BASE64), "items")

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
        vectors: bool = False,
    ) -> Page:
        """See VectorStore."""
        body = {"where": where, "cursor": cursor, "limit": limit, "vectors": vectors}
        return _read(_PAGE, await self._ask(tenant, "POST", _path(namespace, "/items/list"), body, _BASE64))

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        body = _json(_plain(query))
        return _read(_SEARCH, await self._ask(tenant, "POST", _path(namespace, "/search"), body, _BASE64))

    async def search_many(
        self, tenant: str, namespace: str, queries: Sequence[SearchQuery]
    ) -> list[SearchResult]:
        """See VectorStore."""
        path, body = _path(namespace, "/search/batch"), _json({"queries": [_plain(q) for q in queries]})
        return _read(_SEARCHES, await self._ask(tenant, "POST", path, body, _BASE64), "results")

    # Documents

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        """See VectorStore. What is larger than one call goes in several, each document whole in one of them.

        Raises:
            TooLarge: one document alone is larger than a call may be.
        """
        path = _path(namespace, "/documents")
        rows = [
            _json(
                {
                    "path": document.path,
                    "fingerprint": document.fingerprint.model_dump(),
                    "chunks": [_plain(chunk, _SET_BY_THE_STORE) for chunk in document.chunks],
                }
            )
            for document in documents
        ]
        chunks = 0
        for start, stop in self._parts(rows, lambda index: f"document {documents[index].path!r}"):
            body = b'{"documents":[%b]}' % b",".join(rows[start:stop])
            chunks += _read(_COUNT, await self._ask(tenant, "PUT", path, body), "chunks")
        return chunks

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        answer = await self._ask(tenant, "GET", _path(namespace, "/documents"))
        return _read(_FINGERPRINTS, answer, "documents")

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        body = {"paths": list(paths)}
        answer = await self._ask(tenant, "POST", _path(namespace, "/documents/delete"), body)
        return _read(_COUNT, answer, "deleted")

    def _parts(self, pieces: Sequence[bytes], named: Callable[[int], str]) -> list[tuple[int, int]]:
        """From where to where the pieces go into one call each; all in one when they fit, at least one call.

        All are measured before the first call, so that one that fits nowhere changes nothing.

        Raises:
            TooLarge: a piece fits into no call; `named` says which it is.
        """
        most = self._body_max_bytes - _FRAME_BYTES
        parts: list[tuple[int, int]] = []
        start, size = 0, 0
        for index, piece in enumerate(pieces):
            if len(piece) > most:
                raise TooLarge(
                    f"{named(index)} takes {len(piece)!r} bytes, more than the {self._body_max_bytes!r} "
                    "of one call",
                    hint="split it, or raise serve.body_max_bytes on both sides",
                )
            if index > start and size + len(piece) > most:
                parts.append((start, index))
                start, size = index, 0
            size += len(piece) + 1
        return [*parts, (start, len(pieces))]

    async def _ask(
        self, tenant: str, method: str, path: str, body: Any = None, params: Mapping[str, str] | None = None
    ) -> Any:
        # All of these end in the same state when they are done twice; upsert has its key instead.
        principal = self._principal_of(tenant)
        if body is not None and not isinstance(body, bytes):
            body = _json(body)
        return await self.call(method, path, body=body, params=params, principal=principal, idempotent=True)


def _path(namespace: str, below: str = "") -> str:
    # Checked here, for a slash would name another route there.
    return f"/v1/namespaces/{quote(check_namespace(namespace), safe='')}{below}"


def _plain(value: BaseModel, without: set[str] | None = None) -> dict[str, Any]:
    """What the far side needs of a model: defaults stay here. Nested values stay as they are."""
    return value.model_dump(exclude=without, exclude_defaults=True)


def _json(value: Any) -> bytes:
    _check_numbers(value)
    try:
        return orjson.dumps(value, _vector)
    except orjson.JSONEncodeError as error:
        raise InvalidInput(
            f"the call cannot be sent as JSON: {error}", hint="use Unicode text and 64-bit integers"
        ) from None


def _check_numbers(value: Any) -> None:
    """Refuse NaN and infinities, which JSON lacks: they would arrive as null, and mean something else."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInput(f"the call contains the number {value!r}", hint="use finite numbers")
    elif isinstance(value, dict):
        for part in cast(dict[Any, Any], value).values():
            _check_numbers(part)
    elif isinstance(value, list | tuple):
        for part in cast(Sequence[Any], value):
            _check_numbers(part)


def _vector(value: Any) -> str:
    if isinstance(value, Vector):
        return value.base64()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _read(adapter: TypeAdapter[Value], answer: Any, field: str | None = None) -> Value:
    """The value of an answer, or of one of its fields."""
    try:
        # A newer one may say more.
        return adapter.validate_python(answer if field is None else answer[field], extra="ignore")
    except (ValidationError, KeyError, TypeError) as error:
        raise Unavailable(
            f"the far side answered with something that is no answer of AgentDB ({type(error).__name__})",
            hint="check that peers.agentdb_url names an AgentDB of this version",
        ) from error
