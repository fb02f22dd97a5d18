"""Moving whole tenants from one store to another: folder to PostgreSQL and back, verified by hash.

Rows are copied as they are. What the target has already and is equal is left alone, so that an interrupted
migration goes on where it was; afterwards both sides are read again and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from agentic_flow.agentdb.digests import Digest, item_digest, stored_vector
from agentic_flow.agentdb.paging import find_namespace, pages
from agentic_flow.agentdb.transfer import DOCUMENTS_AT_ONCE, create_like
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, DataCorrupted, InvalidInput, NotFound, PathNotFound
from agentic_flow.core.ports import Embedder, VectorStore
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Fingerprint, Item, Namespace

EXPIRY_MARGIN_MIN_S = 600.0
"""Items that expire sooner than this are copied and not compared: they may go between the two readings."""

_FIELDS = (
    "text",
    "metadata",
    "version",
    "created_at_s",
    "updated_at_s",
    "expires_at_s",
    "valid_from_s",
    "valid_until_s",
    "document",
)

Watch = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class TenantStore(VectorStore, Protocol):
    """A store whose operator may ask for its tenants: the embedded one, or PostgreSQL."""

    async def tenants(self) -> list[str]:
        """Every tenant that has a namespace, by name."""
        ...


@dataclass(frozen=True, slots=True)
class Moved:
    """A namespace that is the same on both sides: its rows, and the one digest that both have.

    `written` items were missing or older in the target; `expiring` ones were about to expire, and are not in
    the digest.
    """

    tenant: str
    namespace: str
    items: int
    documents: int
    written: int
    expiring: int
    source_digest: str
    target_digest: str


def is_postgres(place: str) -> bool:
    """Whether a place is the URL of a PostgreSQL database; else it is a folder."""
    return place.startswith(("postgresql://", "postgres://"))


def shown_place(place: str) -> str:
    """A place without user and password."""
    if not is_postgres(place):
        return place
    url = urlsplit(place)
    host = url.hostname or ""
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{host}{port}{url.path}"


@asynccontextmanager
async def open_place(
    place: str, settings: AgentDBSettings, *, embedder: Embedder | None = None, create: bool = False
) -> AsyncGenerator[TenantStore]:
    """The store in a folder (a data folder, as `--data-dir`) or a PostgreSQL database.

    Args:
        create: Make it where there is none.

    Raises:
        PathNotFound: the folder has no database.
        Conflict, Forbidden, Unavailable: the database cannot be used as it is; see the stores.
    """
    # A replica lags: what was just written must be read.
    settings = settings.model_copy(update={"replica_url": None})
    if is_postgres(place):
        from agentic_flow.agentdb.postgres.store import PostgresAgentDB

        async with PostgresAgentDB(place, settings, embedder, create=create) as store:
            yield store
        return
    from agentic_flow.agentdb.service import DATABASE, AgentDB

    folder = Path(place)
    if not create and not (folder / DATABASE).is_file():
        raise PathNotFound(
            f"there is no database in {place!r}",
            hint=f"give a data folder, one that has {str(DATABASE)!r} in it",
        )
    async with await asyncio.to_thread(AgentDB, folder, settings, embedder) as store:
        yield store


async def migrate(
    source: TenantStore,
    target: TenantStore,
    *,
    tenants: Sequence[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    watch: Watch = lambda what, done, total: None,
) -> list[Moved]:
    """Copy tenants with all they have, and compare both sides.

    Nobody may write to either side meanwhile. What the target has beside the source's namespaces stays.

    Args:
        tenants: All of the source's by default.

    Raises:
        NotFound: the source has no such tenant.
        Conflict: the target has a namespace with other settings, or an item that was changed later there.
        DataCorrupted: both sides differ afterwards; names the namespace and the first difference.
    """
    known = await source.tenants()
    for tenant in tenants:
        if tenant not in known:
            raise NotFound(
                f"there is no tenant {tenant!r} in the source", hint=f"it has {', '.join(known) or 'none'}"
            )
    moved: list[Moved] = []
    for tenant in tenants or known:
        for namespace in await source.namespaces(tenant):
            move = _Move(source, target, tenant, namespace, clock, watch)
            moved.append(await move.run())
    return moved


class _Move:
    """One namespace on its way."""

    def __init__(
        self,
        source: TenantStore,
        target: TenantStore,
        tenant: str,
        namespace: Namespace,
        clock: Clock,
        watch: Watch,
    ) -> None:
        self._source = source
        self._target = target
        self._tenant = tenant
        self._namespace = namespace
        self._name = namespace.name
        self._clock = clock
        self._watch = watch

    async def run(self) -> Moved:
        began_s = self._clock.monotonic_s()
        there = await create_like(self._target, self._tenant, self._namespace, self._name)
        written = await self._copy(fresh=there.items == 0)
        copied_s = self._clock.monotonic_s() - began_s
        horizon_s = self._clock.time_s() + max(EXPIRY_MARGIN_MIN_S, 3 * copied_s)
        here, expiring, documents = await self._digest(self._source, horizon_s)
        same, _, _ = await self._digest(self._target, horizon_s)
        if here.hex != same.hex or here.count != same.count:
            raise await self._difference(here, same, horizon_s)
        return Moved(
            tenant=self._tenant,
            namespace=self._name,
            items=here.count - documents + expiring,
            documents=documents,
            written=written,
            expiring=expiring,
            source_digest=here.hex,
            target_digest=same.hex,
        )

    async def _copy(self, *, fresh: bool) -> int:
        """Bring the target up to date; how many items were written."""
        documents = await self._source.fingerprints(self._tenant, self._name)
        stored = await self._target.fingerprints(self._tenant, self._name)
        await self._copy_documents(
            {path: mark for path, mark in documents.items() if stored.get(path) != mark}
        )
        done = written = 0
        async for page in pages(self._source, self._tenant, self._name):
            missing: Sequence[Item] = page if fresh else await self._missing(page)
            if missing:
                own = {
                    item.document: documents[item.document] for item in missing if item.document in documents
                }
                await self._target.restore(self._tenant, self._name, missing, own)
            done += len(page)
            written += len(missing)
            self._watch(f"copy {self._tenant}/{self._name}", done, max(done, self._namespace.items))
        return written

    async def _copy_documents(self, documents: Mapping[str, Fingerprint]) -> None:
        rest = iter(documents.items())
        while some := dict(islice(rest, DOCUMENTS_AT_ONCE)):
            await self._target.restore(self._tenant, self._name, (), some)

    async def _missing(self, page: Sequence[Item]) -> list[Item]:
        """Those of the items that the target has not, or has otherwise.

        Raises:
            Conflict: one of them was changed later there.
        """
        there = await self._in_target(page)
        missing: list[Item] = []
        for item in page:
            other = there.get(item.id)
            if other is not None and self._hash(other) == self._hash(item):
                continue
            if other is not None and other.updated_at_s > item.updated_at_s:
                raise Conflict(
                    f"item {item.id!r} of {self._where} was changed in the target after it was in the source",
                    hint="decide which one holds, and delete the other one",
                )
            missing.append(item)
        return missing

    async def _in_target(self, page: Sequence[Item]) -> dict[str, Item]:
        found: dict[str, Item] = {}
        cursor: str | None = None
        where = {"@id": {"in": [item.id for item in page]}}
        while True:
            some = await self._target.list_items(
                self._tenant, self._name, where=where, cursor=cursor, limit=len(page), vectors=True
            )
            found |= {item.id: item for item in some.items}
            cursor = some.cursor
            if cursor is None:
                return found

    async def _digest(self, store: TenantStore, horizon_s: float) -> tuple[Digest, int, int]:
        """Digest of the items that live beyond the horizon and of the documents; how many items do not, and
        how many documents there are."""
        digest = Digest()
        expiring = 0
        side = "source" if store is self._source else "target"
        quantization = (await find_namespace(store, self._tenant, self._name)).quantization
        async for page in pages(store, self._tenant, self._name):
            lasting = [item for item in page if item.expires_at_s is None or item.expires_at_s > horizon_s]
            expiring += len(page) - len(lasting)
            await asyncio.to_thread(digest.add_items, lasting, quantization)
            done = digest.count + expiring
            self._watch(
                f"verify {self._tenant}/{self._name} ({side})", done, max(done, self._namespace.items)
            )
        documents = await store.fingerprints(self._tenant, self._name)
        digest.add_documents(documents)
        return digest, expiring, len(documents)

    async def _difference(self, here: Digest, there: Digest, horizon_s: float) -> DataCorrupted:
        """What differs first, in words."""
        found = await self._first_difference(horizon_s)
        return DataCorrupted(
            f"{self._where} differs between source ({here.hex[:12]}) and target ({there.hex[:12]}): "
            f"{found or 'rows changed while they were compared'}",
            hint="stop whatever writes there, and run it again: what is equal stays",
            details={"tenant": self._tenant, "namespace": self._name},
        )

    async def _first_difference(self, horizon_s: float) -> str | None:
        async for page in pages(self._source, self._tenant, self._name):
            there = await self._in_target(page)
            for item in page:
                if item.expires_at_s is not None and item.expires_at_s <= horizon_s:
                    continue
                other = there.get(item.id)
                if other is None:
                    return f"item {item.id!r} is missing in the target"
                if self._hash(other) != self._hash(item):
                    return f"item {item.id!r} has another {self._other_field(item, other)} in the target"
        here = await self._source.fingerprints(self._tenant, self._name)
        marks = await self._target.fingerprints(self._tenant, self._name)
        for path in sorted(here.keys() | marks.keys()):
            if here.get(path) != marks.get(path):
                return f"document {path!r} is not the same"
        async for page in pages(self._target, self._tenant, self._name, vectors=False):
            ids = [item.id for item in page]
            found = {item.id for item in await self._source.get(self._tenant, self._name, ids)}
            for item_id in ids:
                if item_id not in found:
                    return f"item {item_id!r} is only in the target"
        return None

    def _other_field(self, item: Item, other: Item) -> str:
        kept = self._namespace.quantization
        if stored_vector(item.vector, kept) != stored_vector(other.vector, kept):
            return "vector"
        return next((name for name in _FIELDS if getattr(item, name) != getattr(other, name)), "form")

    def _hash(self, item: Item) -> bytes:
        return item_digest(item, self._namespace.quantization)

    @property
    def _where(self) -> str:
        return f"namespace {self._name!r} of tenant {self._tenant!r}"


def check_places(source: str, target: str) -> None:
    """Raise InvalidInput when both are the same."""

    def named(place: str) -> str:
        return place if is_postgres(place) else str(Path(place).resolve())

    if named(source) == named(target):
        raise InvalidInput(f"source and target are both {shown_place(source)!r}", hint="give two places")
