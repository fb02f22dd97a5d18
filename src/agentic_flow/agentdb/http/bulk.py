"""Streams of items as lines of JSON: import with back-pressure, and export that shows when it was cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from agentic_flow.agentdb.http.bodies import (
    ExportedDocuments,
    ExportEnd,
    ExportLine,
    ImportOptions,
    ImportReport,
    RefusedLine,
)
from agentic_flow.agentdb.http.lines import Line, LineSplitter
from agentic_flow.core.errors import AgenticFlowError, InvalidInput, TooLarge
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Fingerprint, Item
from agentic_flow.core.web_floor import check_json_numbers, invalid_input

BATCH_ITEMS = 500
BATCH_BYTES = 4 * 1024 * 1024
ERRORS_SHOWN_MAX = 100
EXPORT_PAGE_ITEMS = 200
FINGERPRINTS_PER_LINE = 500

_ITEM = TypeAdapter(Item)
_DOCUMENTS = TypeAdapter(ExportedDocuments)
_END = TypeAdapter(ExportEnd)
_SET_BY_THE_STORE = {"version": 0, "created_at_s": 0.0, "updated_at_s": 0.0, "document": None}


class _Entry(NamedTuple):
    """An item and the line that it stood on."""

    line: int
    item: Item


class _Stopped(Exception):
    """A line was refused and the caller wants the import to end there."""


class ItemImport:
    """Stores the items of a stream of lines in batches, each committed before the next is read.

    A line is an Item, or what an export has beside items. A batch that the store refuses is halved until the
    line is found that is to blame, so what stands before a refused line is always stored. Sending the same
    lines again changes versions and times and nothing else.

    Args:
        line_max_bytes: Longest line.
    """

    def __init__(
        self, db: VectorStore, tenant: str, namespace: str, options: ImportOptions, *, line_max_bytes: int
    ) -> None:
        self._db = db
        self._tenant = tenant
        self._namespace = namespace
        self._options = options
        self._line_max_bytes = line_max_bytes
        self._batch: list[_Entry] = []
        self._batch_ids: set[str] = set()
        self._batch_bytes = 0
        self._documents: dict[str, Fingerprint] = {}
        self._counts = {"lines": 0, "items": 0, "inserted": 0, "updated": 0, "batches": 0, "refused": 0}
        self._errors: list[RefusedLine] = []
        self._items_since_end = 0
        self.stopped = False

    @property
    def report(self) -> ImportReport:
        """What became of the lines so far."""
        return ImportReport(**self._counts, errors=tuple(self._errors))

    async def run(self, chunks: AsyncIterator[bytes]) -> ImportReport:
        """Take the stream to its end, or to the first refused line when the options say so.

        Raises:
            NotFound: there is no such namespace; nothing was read.
            AgenticFlowError: the store cannot go on; `details["report"]` says what is stored.
        """
        # One row is asked for because a stream for a namespace that is not there should not be read.
        await self._db.list_items(self._tenant, self._namespace, limit=1)
        lines = LineSplitter(self._line_max_bytes)
        try:
            async for chunk in chunks:
                for line in lines.feed(chunk):
                    await self._take(line)
            for line in lines.finish():
                await self._take(line)
            await self._flush()
        except _Stopped:
            self.stopped = True
        except AgenticFlowError as error:
            error.details["report"] = self.report.model_dump(mode="json")
            raise
        return self.report

    async def _take(self, line: Line) -> None:
        self._counts["lines"] += 1
        if line.content is None:
            await self._refuse_here(
                line.number,
                TooLarge(
                    f"the line is longer than {self._line_max_bytes!r} bytes", hint="send smaller items"
                ),
            )
            return
        content = line.content.strip()
        if not content:
            return
        try:
            value = read_line(content)
        except InvalidInput as error:
            await self._refuse_here(line.number, error)
            return
        if isinstance(value, Item):
            await self._add(_Entry(line.number, value), len(content))
        elif isinstance(value, ExportedDocuments):
            self._documents.update(value.documents)
        else:
            await self._check_end(line.number, value)

    async def _add(self, entry: _Entry, size_bytes: int) -> None:
        self._items_since_end += 1
        if entry.item.id in self._batch_ids or self._batch_bytes + size_bytes > BATCH_BYTES:
            await self._flush()
        if self._options.mode == "upsert":
            entry = _Entry(entry.line, entry.item.model_copy(update=_SET_BY_THE_STORE))
        self._batch.append(entry)
        self._batch_ids.add(entry.item.id)
        self._batch_bytes += size_bytes
        if len(self._batch) >= BATCH_ITEMS:
            await self._flush()

    async def _check_end(self, line: int, end: ExportEnd) -> None:
        count, self._items_since_end = self._items_since_end, 0
        if count != end.count:
            await self._refuse_here(
                line,
                InvalidInput(f"the export says that it has {end.count!r} items, and {count!r} came before"),
            )

    async def _flush(self) -> None:
        batch, self._batch, self._batch_ids, self._batch_bytes = self._batch, [], set(), 0
        if batch or (self._documents and self._options.mode == "restore"):
            await self._store(batch)

    async def _store(self, batch: Sequence[_Entry]) -> None:
        try:
            await self._commit([entry.item for entry in batch])
        except InvalidInput as error:
            if len(batch) <= 1:
                if not batch:
                    raise
                self._refuse(batch[0].line, error)
                return
            half = len(batch) // 2
            await self._store(batch[:half])
            await self._store(batch[half:])

    async def _commit(self, items: Sequence[Item]) -> None:
        if self._options.mode == "restore":
            await self._db.restore(self._tenant, self._namespace, items, self._documents)
            self._documents = {}
        else:
            result = await self._db.upsert(
                self._tenant, self._namespace, items, embedder_id=self._options.embedder_id
            )
            self._counts["inserted"] += result.inserted
            self._counts["updated"] += result.updated
        self._counts["items"] += len(items)
        self._counts["batches"] += 1

    async def _refuse_here(self, line: int, error: AgenticFlowError) -> None:
        """Refuse a line; what stands before it is stored first if the import ends here."""
        if self._options.on_error == "stop":
            await self._flush()
        self._refuse(line, error)

    def _refuse(self, line: int, error: AgenticFlowError) -> None:
        self._counts["refused"] += 1
        if len(self._errors) < ERRORS_SHOWN_MAX:
            self._errors.append(RefusedLine(line=line, code=error.code, reason=error.message))
        if self._options.on_error == "stop":
            raise _Stopped


def read_line(content: bytes) -> ExportLine:
    """The value of one line: an item, or the documents or the end of an export.

    Raises:
        InvalidInput: it is none of them.
    """
    # Of the three only an item has an id, and it may have a text that mentions the others' names.
    kind: TypeAdapter[Any] = _ITEM
    if content.startswith(b'{"documents"'):
        kind = _DOCUMENTS
    elif content.startswith(b'{"end"'):
        kind = _END
    check_json_numbers(content)
    try:
        return kind.validate_json(content, strict=True)
    except ValidationError as error:
        raise invalid_input(error) from None


async def export(db: VectorStore, tenant: str, namespace: str) -> AsyncIterator[ExportLine]:
    """Every item of a namespace in id order, documents before their chunks, and the end with its count.

    Pages are read one after the other: what changes meanwhile may be in it or not, each item whole.

    Raises:
        NotFound: there is no such namespace; raised before the first line.
    """
    count = 0
    cursor: str | None = None
    known: set[str] = set()
    while True:
        page = await db.list_items(tenant, namespace, cursor=cursor, limit=EXPORT_PAGE_ITEMS, vectors=True)
        if cursor is None or {item.document for item in page.items if item.document is not None} - known:
            marks = await db.fingerprints(tenant, namespace)
            news = [path for path in marks if path not in known]
            known.update(news)
            for start in range(0, len(news), FINGERPRINTS_PER_LINE):
                paths = news[start : start + FINGERPRINTS_PER_LINE]
                yield ExportedDocuments(documents={path: marks[path] for path in paths})
        for item in page.items:
            # A document that was deleted since the page was read leaves its chunks without one.
            gone = item.document is not None and item.document not in known
            yield item.model_copy(update={"document": None}) if gone else item
        count += len(page.items)
        cursor = page.cursor
        if cursor is None:
            yield ExportEnd(end=True, count=count)
            return
