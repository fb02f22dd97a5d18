"""AgentDB: namespaces of texts with vectors and metadata, searched by likeness and by words, in one SQLite file.

SQLite is the truth. The vectors of a namespace are kept in memory as a matrix that carries the operation
number it includes; when the number in the database is another one, the matrix is made anew. Every hit is read
in the transaction that ranked it, so a stale matrix cannot show a row that is gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import apsw
import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.agentdb.filters import compile_filter
from agentic_flow.agentdb.ranking import Scores, diversify, document_evidence, fuse
from agentic_flow.agentdb.schema import MIGRATIONS, create_full_text
from agentic_flow.agentdb.text import question_terms, terms
from agentic_flow.core.db import Database, execute_many, rows
from agentic_flow.core.errors import Conflict, InvalidInput, NotFound, TooLarge
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Hit,
    Item,
    Metric,
    Name,
    Namespace,
    Page,
    SearchQuery,
    SearchResult,
    UpsertResult,
)

T = TypeVar("T")
Matrix = NDArray[np.float32]

OWN_VECTORS = "caller"
"""Embedder id of namespaces whose callers bring their own vectors."""

CANDIDATES = 300
TEXT_WEIGHT = 0.6
DOCUMENT_WEIGHT = 0.35
DOCUMENT_DECAY = 0.5
FIELD_WEIGHTS = (1.0, 2.0, 2.5)  # body, symbol, path

ITEMS_MAX = 10_000
TEXT_BYTES_MAX = 1024 * 1024
METADATA_BYTES_MAX = 256 * 1024
LIST_MAX = 1000
_MATRICES_MAX = 8
_NAME = TypeAdapter(Name)
_COLUMNS = "id, text, metadata, version, created_at_s, updated_at_s, expires_at_s"


@dataclass(frozen=True, slots=True)
class _Space:
    """A namespace's row."""

    ns: int
    name: str
    dimension: int
    metric: Metric
    embedder_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Vectors of a namespace at one operation number; row i belongs to `items[i]`."""

    sequence: int
    items: NDArray[np.int64]
    matrix: Matrix


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An item ready to be written: validated, embedded, its words analysed."""

    item: Item
    metadata: str
    vector: bytes
    words: tuple[str, str, str]


class AgentDB:
    """VectorStore in a directory; see the port for what each method promises.

    Args:
        data_dir: Folder of local state; the database is `agentdb/agentdb.db` in it.
        settings: The `agentdb` section.
        embedder: Embeds items and queries that come without a vector.
    """

    def __init__(self, data_dir: Path, settings: AgentDBSettings, embedder: Embedder | None = None) -> None:
        self._db = Database(data_dir / "agentdb" / "agentdb.db", MIGRATIONS)
        self._embedder: Embedder = embedder or HashedNgramEmbedder(settings.embedding_dimension)
        self._matrices: OrderedDict[int, _Vectors] = OrderedDict()
        self._lock = threading.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish queued writes and close the file."""
        await asyncio.to_thread(self._db.close)

    # ---- namespaces --------------------------------------------------------------------------------------

    async def create_namespace(
        self, tenant: str, name: str, *, metric: Metric = "cosine", dimension: int | None = None
    ) -> Namespace:
        _check_name("tenant", tenant)
        _check_name("namespace", name)
        if dimension is not None and not 1 <= dimension <= 8192:
            raise InvalidInput(f"dimension is {dimension!r}", hint="use 1 to 8192")
        embedder_id = OWN_VECTORS if dimension is not None else self._embedder.id
        wanted = (dimension or self._embedder.dimension, metric, embedder_id)

        def create(connection: apsw.Connection) -> Namespace:
            found = _space_or_none(connection, tenant, name)
            if found is None:
                (ns,) = rows(
                    connection,
                    "INSERT INTO namespaces (tenant, name, dimension, metric, embedder_id) "
                    "VALUES (?, ?, ?, ?, ?) RETURNING ns",
                    (tenant, name, *wanted),
                )[0]
                rows(connection, create_full_text(ns))
                _log_operation(connection, ns, "create")
            elif (found.dimension, found.metric, found.embedder_id) != wanted:
                raise Conflict(
                    f"namespace {name!r} exists with dimension {found.dimension}, metric {found.metric!r} and "
                    f"embedder {found.embedder_id!r}",
                    hint="use another name, or delete it first",
                )
            return _namespace(connection, tenant, name)

        return await self._db.write(create)

    async def namespaces(self, tenant: str) -> list[Namespace]:
        def read(connection: apsw.Connection) -> list[Namespace]:
            names = rows(connection, "SELECT name FROM namespaces WHERE tenant = ? ORDER BY name", (tenant,))
            return [_namespace(connection, tenant, str(name)) for (name,) in names]

        return await self._db.read(read)

    async def delete_namespace(self, tenant: str, name: str) -> bool:
        def delete(connection: apsw.Connection) -> bool:
            space = _space_or_none(connection, tenant, name)
            if space is not None:
                _drop(connection, space.ns)
            return space is not None

        return await self._db.write(delete)

    async def erase_tenant(self, tenant: str) -> int:
        def erase(connection: apsw.Connection) -> int:
            spaces = rows(connection, "SELECT ns FROM namespaces WHERE tenant = ?", (tenant,))
            count = 0
            for (ns,) in spaces:
                count += rows(connection, "SELECT count(*) FROM items WHERE ns = ?", (ns,))[0][0]
                _drop(connection, ns)
                rows(connection, "DELETE FROM operations WHERE ns = ?", (ns,))
            rows(connection, "DELETE FROM idempotency WHERE tenant = ?", (tenant,))
            return count

        return await self._db.write(erase)

    # ---- items -------------------------------------------------------------------------------------------

    async def upsert(
        self,
        tenant: str,
        namespace: str,
        items: Sequence[Item],
        *,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> UpsertResult:
        if len({item.id for item in items}) != len(items):
            raise InvalidInput("an item occurs twice in one upsert", hint="send each id once")
        space = await self._space(tenant, namespace)
        prepared = await self._prepare(space, items)
        digest = _digest(namespace, items, expected_version) if idempotency_key else ""

        def write(connection: apsw.Connection) -> UpsertResult:
            if idempotency_key:
                known = _known_result(connection, tenant, idempotency_key, digest)
                if known is not None:
                    return known
            current = _space(connection, tenant, namespace, same_as=space)
            result = _upsert(connection, current.ns, prepared, expected_version)
            if idempotency_key:
                rows(
                    connection,
                    "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)",
                    (tenant, idempotency_key, digest, result.model_dump_json(), time.time()),
                )
            return result

        return await self._db.write(write)

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        def read(connection: apsw.Connection) -> list[Item]:
            space = _space(connection, tenant, namespace)
            found: list[Item] = []
            for item_id in ids:
                found += [
                    _item(row, with_vector=True)
                    for row in rows(
                        connection,
                        f"SELECT {_COLUMNS}, vector FROM items WHERE ns = ? AND id = ? AND {_ALIVE}",
                        (space.ns, item_id, time.time()),
                    )
                ]
            return found

        return await self._db.read(read)

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        def remove(connection: apsw.Connection) -> int:
            space = _space(connection, tenant, namespace)
            targets = [
                row[0]
                for item_id in dict.fromkeys(ids)
                for row in rows(
                    connection, "SELECT item FROM items WHERE ns = ? AND id = ?", (space.ns, item_id)
                )
            ]
            return _remove_items(connection, space.ns, targets)

        return await self._db.write(remove)

    async def delete_where(self, tenant: str, namespace: str, where: Filter) -> int:
        condition, bindings = compile_filter(where)

        def remove(connection: apsw.Connection) -> int:
            space = _space(connection, tenant, namespace)
            found = rows(
                connection, f"SELECT item FROM items WHERE ns = ? AND ({condition})", (space.ns, *bindings)
            )
            return _remove_items(connection, space.ns, [row[0] for row in found])

        return await self._db.write(remove)

    async def list_items(
        self,
        tenant: str,
        namespace: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page:
        if not 1 <= limit <= LIST_MAX:
            raise InvalidInput(f"limit is {limit!r}", hint=f"use 1 to {LIST_MAX}")
        condition, bindings = compile_filter(where or {})

        def read(connection: apsw.Connection) -> Page:
            space = _space(connection, tenant, namespace)
            found = rows(
                connection,
                f"SELECT {_COLUMNS} FROM items WHERE ns = ? AND id > ? AND {_ALIVE} AND ({condition}) "
                "ORDER BY id LIMIT ?",
                (space.ns, cursor or "", time.time(), *bindings, limit + 1),
            )
            items = tuple(_item(row) for row in found[:limit])
            return Page(items=items, cursor=items[-1].id if len(found) > limit else None)

        return await self._db.read(read)

    # ---- documents ---------------------------------------------------------------------------------------

    async def put_documents(self, tenant: str, namespace: str, documents: Sequence[Document]) -> int:
        space = await self._space(tenant, namespace)
        chunks = [chunk for document in documents for chunk in document.chunks]
        prepared = iter(await self._prepare(space, chunks))
        batches = [(document, [next(prepared) for _ in document.chunks]) for document in documents]

        def write(connection: apsw.Connection) -> int:
            current = _space(connection, tenant, namespace, same_as=space)
            for document, own in batches:
                _forget_document(connection, current.ns, document.path)
                fingerprint = document.fingerprint
                (doc,) = rows(
                    connection,
                    "INSERT INTO documents (ns, path, size_bytes, mtime_ns, sha256) VALUES (?, ?, ?, ?, ?) "
                    "RETURNING doc",
                    (
                        current.ns,
                        document.path,
                        fingerprint.size_bytes,
                        fingerprint.mtime_ns,
                        fingerprint.sha256,
                    ),
                )[0]
                _insert(connection, current.ns, own, doc)
            _log_operation(connection, current.ns, "documents")
            return len(chunks)

        return await self._db.write(write)

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        def read(connection: apsw.Connection) -> dict[str, Fingerprint]:
            space = _space(connection, tenant, namespace)
            found = rows(
                connection,
                "SELECT path, size_bytes, mtime_ns, sha256 FROM documents WHERE ns = ?",
                (space.ns,),
            )
            return {
                path: Fingerprint(size_bytes=size, mtime_ns=mtime, sha256=sha256)
                for path, size, mtime, sha256 in found
            }

        return await self._db.read(read)

    async def delete_documents(self, tenant: str, namespace: str, paths: Sequence[str]) -> int:
        def remove(connection: apsw.Connection) -> int:
            space = _space(connection, tenant, namespace)
            count = sum(_forget_document(connection, space.ns, path) for path in dict.fromkeys(paths))
            if count:
                _log_operation(connection, space.ns, "documents")
            return count

        return await self._db.write(remove)

    # ---- search ------------------------------------------------------------------------------------------

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        if not query.text.strip() and query.vector is None:
            raise InvalidInput("the query has neither text nor a vector", hint="give one of them")
        space = await self._space(tenant, namespace)
        vector = await self._query_vector(space, query)
        mode = query.mode
        if vector is None:
            mode = "text"  # a namespace of callers' vectors, asked by words
        elif not query.text.strip():
            mode = "vector"

        def run(connection: apsw.Connection) -> SearchResult:
            current = _space(connection, tenant, namespace, same_as=space)
            hits = self._rank(connection, current, query, mode, vector)
            own = current.embedder_id == OWN_VECTORS
            return SearchResult(
                hits=tuple(hits),
                embedder_id=current.embedder_id,
                semantic=not own and self._embedder.semantic,
                mode=mode,
            )

        return await self._db.read(run)

    async def _query_vector(self, space: _Space, query: SearchQuery) -> Matrix | None:
        if query.mode == "text":
            return None
        if query.vector is not None:
            if len(query.vector) != space.dimension:
                raise InvalidInput(
                    f"the query's vector has {len(query.vector)} dimensions, namespace {space.name!r} has "
                    f"{space.dimension}",
                    hint="use the embedder of the namespace",
                )
            return _normal(np.asarray(query.vector, dtype=np.float32), space.metric)
        if space.embedder_id == OWN_VECTORS:
            if query.mode == "vector":
                raise InvalidInput(
                    f"namespace {space.name!r} holds its callers' vectors", hint="search it with a vector"
                )
            return None
        self._check_embedder(space)
        return (await self._embedder.embed([query.text], kind="query"))[0]

    def _rank(
        self,
        connection: apsw.Connection,
        space: _Space,
        query: SearchQuery,
        mode: str,
        vector: Matrix | None,
    ) -> list[Hit]:
        vectors = self._vectors(connection, space)
        allowed = _allowed(connection, space, vectors.items, query.filter)
        likeness = _likeness(vectors.matrix, vector, space.metric)
        words = _text_scores(connection, space.ns, query.text) if mode != "vector" else {}
        text = np.zeros(len(vectors.items))
        if words:
            found = np.fromiter(words, dtype=np.int64, count=len(words))
            places = np.searchsorted(vectors.items, found)
            text[places] = np.fromiter(words.values(), dtype=np.float64, count=len(words))
        candidates = _candidates(mode, likeness, text, allowed)
        if len(candidates) == 0:
            return []
        near, worded = likeness[candidates], text[candidates]
        if mode == "hybrid":
            scores = fuse(near, worded, text_weight=TEXT_WEIGHT)
        else:
            scores = near if mode == "vector" else worded
        details = _details(connection, vectors.items[candidates])
        if mode == "hybrid":
            documents = [row[-1] if row[-1] is not None else -row[-2] for row in details]
            evidence = document_evidence(scores, documents, decay=DOCUMENT_DECAY)
            scores = scores + DOCUMENT_WEIGHT * evidence
        order = np.argsort(-scores, kind="stable")
        if query.mmr_lambda is not None and mode != "text":
            pool = order[: max(4 * query.k, 50)]
            chosen = diversify(scores[pool], vectors.matrix[candidates[pool]], len(pool), query.mmr_lambda)
            order = pool[chosen]
        hits: list[Hit] = []
        per_document: dict[object, int] = {}
        for index in order:
            row = details[index]
            document = row[-1] if row[-1] is not None else f"item {row[-2]}"
            if query.per_document and per_document.get(document, 0) >= query.per_document:
                continue
            per_document[document] = per_document.get(document, 0) + 1
            parts = {"vector": float(near[index]), "text": float(worded[index])}
            hits.append(Hit(item=_item(row), score=float(scores[index]), score_parts=parts))
            if len(hits) == query.k:
                break
        return hits

    def _vectors(self, connection: apsw.Connection, space: _Space) -> _Vectors:
        """The namespace's matrix as of this read transaction."""
        with self._lock:
            known = self._matrices.get(space.ns)
            if known is not None:
                self._matrices.move_to_end(space.ns)
        if known is not None and known.sequence == space.sequence:
            return known
        found = rows(connection, "SELECT item, vector FROM items WHERE ns = ? ORDER BY item", (space.ns,))
        matrix = np.empty((len(found), space.dimension), dtype=np.float32)
        for index, (_, blob) in enumerate(found):
            matrix[index] = np.frombuffer(blob, dtype=np.float16)
        items = np.fromiter((row[0] for row in found), dtype=np.int64, count=len(found))
        fresh = _Vectors(space.sequence, items, matrix)
        with self._lock:
            self._matrices[space.ns] = fresh
            while len(self._matrices) > _MATRICES_MAX:
                self._matrices.popitem(last=False)
        return fresh

    # ---- parts -------------------------------------------------------------------------------------------

    async def _space(self, tenant: str, namespace: str) -> _Space:
        return await self._db.read(lambda connection: _space(connection, tenant, namespace))

    def _check_embedder(self, space: _Space) -> None:
        if space.embedder_id != self._embedder.id:
            raise Conflict(
                f"namespace {space.name!r} was made with embedder {space.embedder_id!r}, this store has "
                f"{self._embedder.id!r}: their vectors cannot be compared",
                hint="configure the former, or read the contents into a new namespace",
            )

    async def _prepare(self, space: _Space, items: Sequence[Item]) -> list[_Prepared]:
        """Everything that costs CPU, before the writer is asked for its time."""
        if len(items) > ITEMS_MAX:
            raise TooLarge(f"{len(items)} items in one call", hint=f"send at most {ITEMS_MAX}")
        to_embed = [item.text for item in items if item.vector is None]
        if to_embed:
            if space.embedder_id == OWN_VECTORS:
                raise InvalidInput(
                    f"namespace {space.name!r} holds its callers' vectors", hint="give every item a vector"
                )
            self._check_embedder(space)
        embedded = iter(await self._embedder.embed(to_embed)) if to_embed else iter(())
        return await asyncio.to_thread(
            lambda: [
                _prepare_item(item, space, next(embedded) if item.vector is None else None) for item in items
            ]
        )


_ALIVE = "(expires_at_s IS NULL OR expires_at_s > ?)"


def _check_name(what: str, name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise InvalidInput(
            f"{name!r} is no name of a {what}",
            hint="use up to 128 letters, digits, dots, colons, dashes, underscores",
        ) from None


def _space_or_none(connection: apsw.Connection, tenant: str, name: str) -> _Space | None:
    found = rows(
        connection,
        "SELECT ns, name, dimension, metric, embedder_id, sequence FROM namespaces "
        "WHERE tenant = ? AND name = ?",
        (tenant, name),
    )
    return _Space(*found[0]) if found else None


def _space(connection: apsw.Connection, tenant: str, name: str, same_as: _Space | None = None) -> _Space:
    space = _space_or_none(connection, tenant, name)
    if space is None:
        raise NotFound(f"there is no namespace {name!r}", hint="create it first")
    if same_as is not None and space.ns != same_as.ns:
        raise Conflict(f"namespace {name!r} was replaced meanwhile", hint="try again")
    return space


def _namespace(connection: apsw.Connection, tenant: str, name: str) -> Namespace:
    space = _space(connection, tenant, name)
    ((items,),) = rows(
        connection, f"SELECT count(*) FROM items WHERE ns = ? AND {_ALIVE}", (space.ns, time.time())
    )
    ((documents,),) = rows(connection, "SELECT count(*) FROM documents WHERE ns = ?", (space.ns,))
    return Namespace(
        name=space.name,
        dimension=space.dimension,
        metric=space.metric,
        embedder_id=space.embedder_id,
        items=items,
        documents=documents,
    )


def _log_operation(connection: apsw.Connection, ns: int, kind: str) -> None:
    """Number this change; derived data that carries a smaller number is stale."""
    rows(connection, "INSERT INTO operations (ns, kind, at_s) VALUES (?, ?, ?)", (ns, kind, time.time()))
    rows(
        connection,
        "UPDATE namespaces SET sequence = (SELECT max(sequence) FROM operations WHERE ns = ?1) WHERE ns = ?1",
        (ns,),
    )


def _drop(connection: apsw.Connection, ns: int) -> None:
    rows(connection, "DELETE FROM items WHERE ns = ?", (ns,))
    rows(connection, "DELETE FROM documents WHERE ns = ?", (ns,))
    rows(connection, f"DROP TABLE fts_{int(ns)}")
    rows(connection, "DELETE FROM namespaces WHERE ns = ?", (ns,))


def _prepare_item(item: Item, space: _Space, embedded: Matrix | None) -> _Prepared:
    if len(item.text.encode("utf-8", "surrogatepass")) > TEXT_BYTES_MAX:
        raise TooLarge(
            f"the text of item {item.id!r} is too large", hint=f"keep it under {TEXT_BYTES_MAX} bytes"
        )
    try:
        metadata = orjson.dumps(item.metadata)
        item.text.encode()
    except (orjson.JSONEncodeError, UnicodeEncodeError) as error:
        raise InvalidInput(
            f"item {item.id!r} cannot be stored: {error}", hint="use JSON and Unicode"
        ) from None
    if len(metadata) > METADATA_BYTES_MAX:
        raise TooLarge(
            f"the metadata of item {item.id!r} is too large", hint=f"keep it under {METADATA_BYTES_MAX} bytes"
        )
    if embedded is None:
        vector = np.asarray(item.vector, dtype=np.float32)
        if vector.shape != (space.dimension,) or not np.isfinite(vector).all():
            raise InvalidInput(
                f"the vector of item {item.id!r} has {vector.size} values, namespace {space.name!r} takes "
                f"{space.dimension} finite ones",
                hint="use the embedder of the namespace",
            )
        embedded = _normal(vector, space.metric)
    words = (
        " ".join(terms(item.text)),
        " ".join(terms(str(item.metadata.get("symbol") or ""))),
        " ".join(terms(str(item.metadata.get("path") or ""))),
    )
    return _Prepared(item, metadata.decode(), embedded.astype(np.float16).tobytes(), words)


def _normal(vector: Matrix, metric: Metric) -> Matrix:
    """Cosine namespaces hold unit vectors, so that likeness is one product."""
    norm = float(np.linalg.norm(vector))
    return vector / norm if metric == "cosine" and norm > 0 else vector


def _upsert(
    connection: apsw.Connection, ns: int, prepared: Sequence[_Prepared], expected_version: int | None
) -> UpsertResult:
    now = time.time()
    versions: list[int] = []
    inserted = 0
    for entry in prepared:
        known = rows(
            connection,
            f"SELECT item, version, created_at_s, {_ALIVE} FROM items WHERE ns = ? AND id = ?",
            (now, ns, entry.item.id),
        )
        version = known[0][1] if known and known[0][3] else 0
        if expected_version is not None and version != expected_version:
            raise Conflict(
                f"item {entry.item.id!r} has version {version}, {expected_version} was expected",
                hint="read it again and repeat the change",
                details={"id": entry.item.id, "version": version},
            )
        created = known[0][2] if version else now
        if known:
            _remove_items(connection, ns, [known[0][0]], log=False)
        _insert(connection, ns, [entry], None, version=version + 1, created_at_s=created)
        versions.append(version + 1)
        inserted += version == 0
    if prepared:
        _log_operation(connection, ns, "upsert")
    return UpsertResult(
        ids=tuple(entry.item.id for entry in prepared),
        versions=tuple(versions),
        inserted=inserted,
        updated=len(prepared) - inserted,
    )


def _insert(
    connection: apsw.Connection,
    ns: int,
    prepared: Sequence[_Prepared],
    doc: int | None,
    *,
    version: int = 1,
    created_at_s: float | None = None,
) -> None:
    now = time.time()
    for entry in prepared:
        item = entry.item
        try:
            ((number,),) = rows(
                connection,
                "INSERT INTO items (ns, id, doc, text, metadata, vector, version, created_at_s, updated_at_s, "
                "expires_at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING item",
                (
                    ns,
                    item.id,
                    doc,
                    item.text,
                    entry.metadata,
                    entry.vector,
                    version,
                    created_at_s or now,
                    now,
                    item.expires_at_s,
                ),
            )
        except apsw.ConstraintError:
            raise Conflict(
                f"item {item.id!r} exists already outside of this document",
                hint="give chunks ids of their own",
            ) from None
        execute_many(
            connection,
            f"INSERT INTO fts_{int(ns)} (rowid, body, symbol, path) VALUES (?, ?, ?, ?)",
            [(number, *entry.words)],
        )


def _remove_items(connection: apsw.Connection, ns: int, numbers: Sequence[int], *, log: bool = True) -> int:
    execute_many(connection, f"DELETE FROM fts_{int(ns)} WHERE rowid = ?", [(n,) for n in numbers])
    execute_many(connection, "DELETE FROM items WHERE item = ?", [(n,) for n in numbers])
    if numbers and log:
        _log_operation(connection, ns, "delete")
    return len(numbers)


def _forget_document(connection: apsw.Connection, ns: int, path: str) -> int:
    """Remove a document with its chunks; 1 when there was one."""
    found = rows(connection, "SELECT doc FROM documents WHERE ns = ? AND path = ?", (ns, path))
    for (doc,) in found:
        chunks = [row[0] for row in rows(connection, "SELECT item FROM items WHERE doc = ?", (doc,))]
        _remove_items(connection, ns, chunks, log=False)
        rows(connection, "DELETE FROM documents WHERE doc = ?", (doc,))
    return len(found)


def _known_result(connection: apsw.Connection, tenant: str, key: str, digest: str) -> UpsertResult | None:
    found = rows(
        connection,
        "SELECT request_sha256, result FROM idempotency WHERE tenant = ? AND key = ?",
        (tenant, key),
    )
    if not found:
        return None
    if found[0][0] != digest:
        raise Conflict(f"idempotency key {key!r} was used for another upsert", hint="use a new key")
    return UpsertResult.model_validate_json(found[0][1])


def _digest(namespace: str, items: Sequence[Item], expected_version: int | None) -> str:
    content = [namespace, expected_version, [item.model_dump(mode="json") for item in items]]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _item(row: Sequence[Any], *, with_vector: bool = False) -> Item:
    vector = None
    if with_vector:
        vector = tuple(float(value) for value in np.frombuffer(row[7], dtype=np.float16))
    return Item(
        id=row[0],
        text=row[1],
        metadata=cast(JsonObject, orjson.loads(row[2])),
        version=row[3],
        created_at_s=row[4],
        updated_at_s=row[5],
        expires_at_s=row[6],
        vector=vector,
    )


def _allowed(
    connection: apsw.Connection, space: _Space, items: NDArray[np.int64], where: Filter | None
) -> NDArray[np.bool_]:
    """Which rows of the matrix are alive and pass the filter: decided before ranking, never after."""
    condition, bindings = compile_filter(where or {})
    if not where:
        dead = rows(
            connection,
            "SELECT item FROM items WHERE ns = ? AND expires_at_s IS NOT NULL AND expires_at_s <= ?",
            (space.ns, time.time()),
        )
        if not dead:
            return np.ones(len(items), dtype=np.bool_)
    passing = rows(
        connection,
        f"SELECT item FROM items WHERE ns = ? AND {_ALIVE} AND ({condition})",
        (space.ns, time.time(), *bindings),
    )
    return np.isin(items, np.fromiter((row[0] for row in passing), dtype=np.int64, count=len(passing)))


def _likeness(matrix: Matrix, vector: Matrix | None, metric: Metric) -> Scores:
    if vector is None:
        return np.zeros(len(matrix))
    if metric == "euclidean":
        return -np.linalg.norm(matrix - vector, axis=1).astype(np.float64)
    return (matrix @ vector).astype(np.float64)


def _text_scores(connection: apsw.Connection, ns: int, text: str) -> dict[int, float]:
    """BM25 of the rows that hold any word of the question; larger is better."""
    wanted = question_terms(text)
    if not wanted:
        return {}
    match = " OR ".join(f'"{term}"' for term in wanted[:200])
    body, symbol, path = FIELD_WEIGHTS
    found = rows(
        connection,
        f"SELECT rowid, -bm25(fts_{int(ns)}, {body}, {symbol}, {path}) FROM fts_{int(ns)} "
        f"WHERE fts_{int(ns)} MATCH ?",
        (match,),
    )
    return {int(row[0]): float(row[1]) for row in found}


def _candidates(mode: str, likeness: Scores, text: Scores, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the best rows by either side, among the allowed."""
    sides: list[NDArray[np.int64]] = []
    if mode != "text":
        sides.append(_best(np.where(allowed, likeness, -np.inf)))
    if mode != "vector":
        sides.append(_best(np.where(allowed & (text > 0), text, -np.inf)))
    return np.unique(np.concatenate(sides))


def _best(scores: Scores) -> NDArray[np.int64]:
    """Indices of the highest finite scores, at most CANDIDATES."""
    count = min(CANDIDATES, len(scores))
    best = np.argpartition(-scores, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    return best[np.isfinite(scores[best])].astype(np.int64)


def _details(connection: apsw.Connection, items: NDArray[np.int64]) -> list[tuple[Any, ...]]:
    """The rows of these items, in their order, each with its number and document at the end."""
    found = {
        row[-2]: row
        for row in rows(
            connection,
            f"SELECT {_COLUMNS}, item, doc FROM items WHERE item IN (SELECT value FROM json_each(?))",
            (orjson.dumps(items.tolist()).decode(),),
        )
    }
    return [found[int(item)] for item in items]
