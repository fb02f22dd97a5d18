"""Export and import: a namespace as a file, JSON Lines or Parquet, over any VectorStore, in bounded memory.

A file of ours brings back every row as it was, version, times, vector and document included, and carries a
digest that tells whether it is whole. Any other file is read with a mapping of its columns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from agentic_flow.agentdb.digests import Digest, document_digest, item_digest
from agentic_flow.agentdb.namespaces import CALLER
from agentic_flow.agentdb.paging import Progress, find_namespace, item_bytes, no_progress, pages
from agentic_flow.agentdb.schema import ITEMS_PER_CALL_MAX
from agentic_flow.agentdb.transfer_files import (
    FORMAT_VERSION,
    Columns,
    Footer,
    Format,
    Header,
    Reader,
    Row,
    Writer,
    read_format,
    replacing,
    written_format,
)
from agentic_flow.agentdb.transfer_lines import LinesReader, LinesWriter
from agentic_flow.agentdb.transfer_parquet import ParquetReader, ParquetWriter
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted, InvalidInput, TooLarge
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Fingerprint, Item, Metric, Namespace
from agentic_flow.core.version import __version__

BATCH_ITEMS = 1000
BATCH_BYTES = 8 * 1024 * 1024
DOCUMENTS_AT_ONCE = 1000
PROBLEMS_SHOWN_MAX = 20
SKIPPED_MAX = 10_000

OnError = Literal["stop", "skip"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; `digest` is that of the footer."""

    namespace: str
    path: str
    format: Format
    items: int
    documents: int
    size_bytes: int
    digest: str


@dataclass(slots=True)
class ImportReport:
    """What an import stored.

    `ours`: the file was an export, and rows were restored as they were. `verified`: its digest agrees with
    what was read. `problems` are the first PROBLEMS_SHOWN_MAX of what was skipped.
    """

    namespace: str
    path: str
    format: Format
    ours: bool = False
    created: bool = False
    verified: bool = False
    items: int = 0
    documents: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list[str])


async def export_namespace(
    store: VectorStore,
    tenant: str,
    namespace: str,
    path: Path,
    *,
    format: Format | None = None,
    overwrite: bool = False,
    clock: Clock = SYSTEM_CLOCK,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write a namespace into a file, which appears under its name once it is whole.

    The namespace may be written to meanwhile; the file is then no snapshot of one moment (a backup is).

    Args:
        format: By default told by the ending: .jsonl, .jsonl.gz or .parquet.

    Raises:
        NotFound: there is no such namespace.
        Conflict: the file exists, and is not to be overwritten.
        PathNotFound: it cannot be written there.
        Unavailable: the disk is full, or pyarrow is not installed.
    """
    chosen = written_format(path, format)
    found = await find_namespace(store, tenant, namespace)
    header = Header(
        format_version=FORMAT_VERSION,
        product_version=__version__,
        exported_at_s=clock.time_s(),
        namespace=found,
    )
    with replacing(path, overwrite=overwrite) as part:
        writer: Writer = await asyncio.to_thread(_open_writer, part, path.name, chosen, header)
        try:
            digest, documents = await _write_all(store, tenant, found, writer, progress)
        finally:
            await asyncio.to_thread(writer.close)
        size_bytes = part.stat().st_size
    items = digest.count - documents
    return ExportReport(namespace, str(path), chosen, items, documents, size_bytes, digest.hex)


def _open_writer(part: Path, name: str, chosen: Format, header: Header) -> Writer:
    return LinesWriter(part, name, header) if chosen == "jsonl" else ParquetWriter(part, header)


async def _write_all(
    store: VectorStore, tenant: str, namespace: Namespace, writer: Writer, progress: Progress
) -> tuple[Digest, int]:
    """Write every row and the footer; the digest of all, and how many of them are documents."""
    documents = await store.fingerprints(tenant, namespace.name) if namespace.documents else {}
    digest = Digest()

    def write(items: Sequence[Item], own: Mapping[str, Fingerprint]) -> None:
        digest.add_items(items, namespace.quantization)
        writer.write(items, own)

    async for page in pages(store, tenant, namespace.name):
        if any(item.document is not None and item.document not in documents for item in page):
            # What was written of a document stands, should it have changed meanwhile.
            documents = await store.fingerprints(tenant, namespace.name) | documents
        # A document that is unknown even now was deleted after the page was read, and its chunks with it.
        items = [item for item in page if item.document is None or item.document in documents]
        own = {item.document: documents[item.document] for item in items if item.document is not None}
        await asyncio.to_thread(write, items, own)
        progress(digest.count, max(namespace.items, digest.count))
    digest.add_documents(documents)
    footer = Footer(items=digest.count - len(documents), documents=len(documents), digest=digest.hex)
    await asyncio.to_thread(writer.finish, footer, documents)
    return digest, len(documents)


async def import_file(
    store: VectorStore,
    tenant: str,
    namespace: str,
    path: Path,
    *,
    format: Format | None = None,
    batch_items: int = BATCH_ITEMS,
    on_error: OnError = "stop",
    columns: Columns | None = None,
    metric: Metric | None = None,
    embedder_id: str | None = None,
    progress: Progress = no_progress,
) -> ImportReport:
    """Store the rows of a file in a namespace, which is made if it does not exist.

    An export of ours is restored as it was, into a namespace with its settings. Rows of any other file are
    upserted; a new namespace takes its dimension from the first vector, or the store embeds the texts.

    Args:
        format: By default told by the file itself.
        batch_items: Rows of one call; all of them are stored or none.
        on_error: "stop" at the first row that is no good, or "skip" and count it.
        columns: Where a foreign file has what.
        metric: Of a namespace that a foreign file makes; cosine by default.
        embedder_id: What made the vectors of a foreign file; one that is not the namespace's is refused.
        progress: In bytes of JSON Lines, in rows of Parquet.

    Raises:
        InvalidInput: a row is no good (`details` has the number of rows that are in), or a column is unknown.
        Conflict: the namespace has other settings or another embedder.
        DataCorrupted: the file is damaged or cut off; `details` has the number of rows that are in.
        PathNotFound: it cannot be read.
        Unavailable: pyarrow is not installed, or the store cannot be reached.
    """
    if not 1 <= batch_items <= ITEMS_PER_CALL_MAX:
        raise InvalidInput(
            f"a batch of {batch_items!r} items is out of range", hint=f"1 to {ITEMS_PER_CALL_MAX}"
        )
    chosen = await asyncio.to_thread(read_format, path, format)
    reader: Reader = await asyncio.to_thread(
        LinesReader if chosen == "jsonl" else ParquetReader, path, columns or Columns()
    )
    try:
        if reader.header is not None and (metric or embedder_id):
            raise InvalidInput(
                f"{str(path)!r} is an export of ours: it says what made it",
                hint="leave out --metric and --embedder-id",
            )
        work = _Import(store, tenant, namespace, path, chosen, reader, on_error, metric, embedder_id)
        return await work.run(batch_items, progress)
    finally:
        await asyncio.to_thread(reader.close)


class _Import:
    """One import under way."""

    def __init__(
        self,
        store: VectorStore,
        tenant: str,
        name: str,
        path: Path,
        format: Format,
        reader: Reader,
        on_error: OnError,
        metric: Metric | None,
        embedder_id: str | None,
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._name = name
        self._path = path
        self._reader = reader
        self._skips = on_error == "skip"
        self._metric: Metric = metric or "cosine"
        self._embedder_id = embedder_id
        self._report = ImportReport(name, str(path), format, ours=reader.header is not None)
        self._digest = Digest()
        self._documents: dict[str, Fingerprint] = {}
        self._stored_documents: set[str] = set()
        self._ready = False

    async def run(self, batch_items: int, progress: Progress) -> ImportReport:
        """Store everything; what is wrong with the file says how much is in."""
        header = self._reader.header
        try:
            if header is not None:
                await self._prepare(header.namespace.dimension, header)
            rows = _Batches(self._reader.rows(), batch_items)
            while batch := await asyncio.to_thread(rows.next):
                await self._take(batch)
                progress(*self._reader.position())
            if header is not None:
                await self._end()
        except AgenticFlowError as error:
            raise self._told(error) from None
        if not self._ready:
            raise InvalidInput(f"{str(self._path)!r} has no rows", hint="there is nothing to import")
        return self._report

    async def _take(self, batch: Sequence[Row]) -> None:
        items: list[Row] = []
        for row in batch:
            if row.problem is not None:
                self._refuse(row, row.problem)
            elif row.document is not None:
                self._add_document(*row.document)
            elif row.item is not None:
                items.append(row)
                if self._reader.header is not None:
                    self._digest.add(item_digest(row.item, self._reader.header.namespace.quantization))
        if items:
            if not self._ready:
                first = items[0].item
                await self._prepare(len(first.vector) if first and first.vector else None, None)
            await self._store_rows(items)

    def _add_document(self, path: str, mark: Fingerprint) -> None:
        if self._documents.get(path) != mark:
            self._digest.add(document_digest(path, mark))
        self._documents[path] = mark

    async def _prepare(self, dimension: int | None, header: Header | None) -> None:
        """Make the namespace, or see that it has what the file needs."""
        self._ready = True
        existing = {one.name: one for one in await self._store.namespaces(self._tenant)}.get(self._name)
        self._report.created = existing is None
        if header is not None:
            await create_like(self._store, self._tenant, header.namespace, self._name)
        elif existing is None:
            await self._store.create_namespace(
                self._tenant,
                self._name,
                metric=self._metric,
                dimension=dimension,
                embedder_id=self._embedder_id if dimension else None,
            )
        elif self._embedder_id not in (None, existing.embedder_id):
            raise Conflict(
                f"namespace {self._name!r} holds vectors of {existing.embedder_id!r}, the file's are of "
                f"{self._embedder_id!r}",
                hint="vectors of different embedders cannot be compared: use a namespace of its own",
            )

    async def _store_rows(self, rows: Sequence[Row]) -> None:
        """Store them in one call; when that is refused and bad rows are skipped, by halves."""
        items = [row.item for row in rows if row.item is not None]
        try:
            await self._store_items(items)
        except (InvalidInput, TooLarge) as error:
            if len(rows) == 1:
                self._refuse(rows[0], error)
            elif self._skips:
                half = len(rows) // 2
                await self._store_rows(rows[:half])
                await self._store_rows(rows[half:])
            else:
                unit = self._reader.unit
                raise _again(
                    error, f"{unit}s {rows[0].number} to {rows[-1].number}: {error.message}"
                ) from None

    async def _store_items(self, items: Sequence[Item]) -> None:
        if self._reader.header is None:
            await self._store.upsert(self._tenant, self._name, items)
        else:
            own = {
                item.document: self._documents[item.document]
                for item in items
                if item.document is not None and item.document in self._documents
            }
            await self._store.restore(self._tenant, self._name, items, own)
            self._stored_documents.update(own)
        self._report.items += len(items)
        self._report.documents = len(self._stored_documents)

    def _refuse(self, row: Row, error: AgenticFlowError) -> None:
        """Count the row, or stop."""
        message = f"{self._reader.unit} {row.number}: {error.message}"
        if not self._skips:
            raise _again(error, message)
        self._report.skipped += 1
        if self._report.skipped > SKIPPED_MAX:
            raise InvalidInput(
                f"more than {SKIPPED_MAX!r} rows are no good; the last: {message}", hint=error.hint
            )
        if len(self._report.problems) < PROBLEMS_SHOWN_MAX:
            self._report.problems.append(message)

    async def _end(self) -> None:
        """Store documents without chunks, and see whether the file was whole."""
        bare = ((path, mark) for path, mark in self._documents.items() if path not in self._stored_documents)
        while some := dict(islice(bare, DOCUMENTS_AT_ONCE)):
            await self._store.restore(self._tenant, self._name, (), some)
            self._report.documents += len(some)
        footer = self._reader.footer
        has = Footer(
            items=self._digest.count - len(self._documents),
            documents=len(self._documents),
            digest=self._digest.hex,
        )
        if footer == has:
            self._report.verified = True
        elif not self._report.skipped:
            why = (
                "has no footer: it is cut off"
                if footer is None
                else f"is not what was exported: {has.items} of {footer.items} items, {has.documents} of "
                f"{footer.documents} documents, digest {has.digest[:12]} instead of {footer.digest[:12]}"
            )
            raise DataCorrupted(
                f"{str(self._path)!r} {why}", hint="copy or export it again, then repeat the import"
            )

    def _told(self, error: AgenticFlowError) -> AgenticFlowError:
        stored = self._report.items
        said = f"{stored} rows of the file are stored" if stored else "nothing was stored"
        return type(error)(
            f"{error.message} ({said})",
            hint=error.hint,
            retry_after_s=error.retry_after_s,
            details={**error.details, "items": stored, "skipped": self._report.skipped},
        )


class _Batches:
    """Cuts rows into batches: by number, by size, and before an id that the batch has already."""

    def __init__(self, rows: Iterator[Row], batch_items: int) -> None:
        self._rows = rows
        self._batch_items = batch_items
        self._next: Row | None = None

    def next(self) -> list[Row]:
        """The next batch; empty at the end. Blocking."""
        batch: list[Row] = []
        ids: set[str] = set()
        size = 0
        while len(ids) < self._batch_items and len(batch) < 2 * self._batch_items and size < BATCH_BYTES:
            row = self._next or next(self._rows, None)
            self._next = None
            if row is None:
                break
            if row.item is not None:
                if row.item.id in ids:
                    self._next = row
                    break
                ids.add(row.item.id)
                size += item_bytes(row.item)
            batch.append(row)
        return batch


async def create_like(store: VectorStore, tenant: str, like: Namespace, name: str) -> Namespace:
    """A namespace with the settings of another, or the existing one with the same.

    Where the store has the embedder of the rows, it serves the namespace; else the namespace takes callers'
    vectors, made by the embedder that is named.

    Raises:
        Conflict: it exists with other settings.
    """

    async def create(dimension: int | None) -> Namespace:
        return await store.create_namespace(
            tenant,
            name,
            metric=like.metric,
            dimension=dimension,
            embedder_id=like.embedder_id,
            quantization=like.quantization,
        )

    if like.embedder_id != CALLER:
        try:
            return await create(None)
        except InvalidInput:
            pass  # this store embeds with another
    return await create(like.dimension)


def _again(error: AgenticFlowError, message: str) -> AgenticFlowError:
    return type(error)(message, hint=error.hint, details=error.details)
