"""Bringing a namespace up to date with folders: what is unchanged is not read, what is gone is removed.

Each batch is one transaction of the store, and a document is replaced whole. Whoever is killed in between
leaves whole documents only; the next run sees by their fingerprints what is still to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import structlog

from agentic_flow.agentdb.chunking import Chunk, chunk, kind_of
from agentic_flow.agentdb.reading import (
    PROBE_BYTES,
    BinaryContent,
    FileText,
    SkipReason,
    looks_binary,
    read_text,
)
from agentic_flow.agentdb.walking import Found, Walked, opened, walk
from agentic_flow.core.errors import Cancelled, InvalidInput, TooLarge
from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import ToolScope, VectorStore
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.toolkit import PathRules
from agentic_flow.core.vectors import Document, Fingerprint, Item

BATCH_TEXT_BYTES = 512 * 1024
BATCH_DOCUMENTS = 64
DELETED_AT_ONCE = 1000
RACY_NS = 100_000_000
"""A file changed this shortly before it was read may change again without a new time stamp."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.agentdb")


class IngestReport(Frozen):
    """What the reading of the inputs did; every file seen is in exactly one count but `chunks`.

    `removed` counts documents whose file is no longer there; `chunks` those stored by this run.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped_binary: int = 0
    skipped_ignored: int = 0
    skipped_too_large: int = 0
    skipped_unreadable: int = 0
    skipped_empty: int = 0
    chunks: int = 0
    cpu_s: float = 0.0


async def ingest(
    store: VectorStore,
    tenant: str,
    namespace: str,
    roots: Mapping[str, Path],
    *,
    settings: AgentDBSettings,
    paths_allowed: Sequence[str] = (),
    paths_forbidden: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> IngestReport:
    """Read the files below `roots` into a namespace, which is created when there is none.

    Args:
        roots: Name → folder or single file. With one root, document paths are relative to it; with several
            they start with the root's name.
        paths_allowed: gitignore-style patterns; empty allows all.
        paths_forbidden: Likewise; wins.
        progress: Called in this event loop with the files done and the files found.
        cancelled: Asked between batches.

    Raises:
        PathNotFound: a root does not exist or cannot be read; nothing was written.
        LimitExceeded: there are more files than `settings.files_max`; nothing was written.
        Cancelled: `cancelled` said so; what was stored stays and is whole.
    """
    started_s = time.process_time()
    rules = PathRules(
        ToolScope(
            roots=dict(roots), paths_allowed=tuple(paths_allowed), paths_forbidden=tuple(paths_forbidden)
        )
    )
    walked = await asyncio.to_thread(
        walk, dict(roots), rules, files_max=settings.files_max, file_max_bytes=settings.file_max_bytes
    )
    await store.create_namespace(tenant, namespace)
    run = _Run(store, tenant, namespace, settings, walked, await store.fingerprints(tenant, namespace))
    total = len(walked.files)
    if progress is not None:
        progress(0, total)
    batches = run.batches()
    while (batch := await asyncio.to_thread(next, batches, None)) is not None:
        if cancelled is not None and cancelled():
            raise Cancelled("the reading of the folder was cancelled", hint="run it again to complete it")
        await run.store_batch(batch)
        if progress is not None:
            progress(batch.files_done, total)
    await run.remove_gone()
    if progress is not None:
        progress(total, total)
    report = run.report(time.process_time() - started_s)
    _log.info("ingest_finished", tenant=tenant, namespace=namespace, **report.model_dump())
    return report


@dataclass(slots=True)
class _Batch:
    documents: list[Document] = field(default_factory=list[Document])
    text_bytes: int = 0
    files_done: int = 0


@dataclass(slots=True)
class _Run:
    """The state of one ingestion."""

    store: VectorStore
    tenant: str
    namespace: str
    settings: AgentDBSettings
    walked: Walked
    known: dict[str, Fingerprint]
    kept: set[str] = field(default_factory=set[str])
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    chunks: int = 0

    def batches(self) -> Iterator[_Batch]:
        """Documents to store, in batches bounded in memory; runs in a worker thread."""
        batch = _Batch()
        for number, found in enumerate(self.walked.files, start=1):
            document = self._examine(found)
            batch.files_done = number
            if document is not None:
                batch.documents.append(document)
                batch.text_bytes += sum(len(item.text) for item in document.chunks)
            if batch.text_bytes >= BATCH_TEXT_BYTES or len(batch.documents) >= BATCH_DOCUMENTS:
                yield batch
                batch = _Batch()
        if batch.documents:
            yield batch

    def _examine(self, found: Found) -> Document | None:
        """The document to store for a file; None when nothing is to be done or it was passed over."""
        known = self.known.get(found.path)
        if known is not None and (known.size_bytes, known.mtime_ns) == (found.size_bytes, found.mtime_ns):
            self.kept.add(found.path)
            self.unchanged += 1
            return None
        try:
            data, fingerprint = _read(found, self.settings.file_max_bytes)
            if known is not None and known.sha256 == fingerprint.sha256:
                return Document(path=found.path, fingerprint=fingerprint, chunks=())
            text = read_text(found.path, data)
            chunks = tuple(_items(found.path, text, self.settings))
        except (_BinaryHead, BinaryContent):
            return self._skip("binary")
        except TooLarge:
            return self._skip("too_large")
        except (OSError, InvalidInput) as error:
            _log.info("file_skipped", path=found.path, reason=str(error))
            return self._skip("unreadable")
        if not chunks:
            return self._skip("empty")
        return Document(path=found.path, fingerprint=fingerprint, chunks=chunks)

    def _skip(self, reason: SkipReason) -> None:
        self.walked.skip(reason)

    async def store_batch(self, batch: _Batch) -> None:
        """Store the documents of a batch together; one that the store finds too large is passed over."""
        try:
            await self.store.put_documents(self.tenant, self.namespace, batch.documents)
        except TooLarge:
            for document in batch.documents:
                try:
                    await self.store.put_documents(self.tenant, self.namespace, [document])
                except TooLarge as error:
                    _log.warning("file_skipped", path=document.path, reason=error.message)
                    self._skip("too_large")
                else:
                    self._stored(document)
        else:
            for document in batch.documents:
                self._stored(document)

    def _stored(self, document: Document) -> None:
        self.kept.add(document.path)
        self.chunks += len(document.chunks)
        if document.path not in self.known:
            self.added += 1
        elif document.chunks:
            self.changed += 1
        else:
            self.unchanged += 1

    async def remove_gone(self) -> None:
        """Remove documents whose file is gone or is no longer read."""
        seen = {found.path for found in self.walked.files}
        gone = sorted(self.known.keys() - self.kept)
        for start in range(0, len(gone), DELETED_AT_ONCE):
            await self.store.delete_documents(
                self.tenant, self.namespace, gone[start : start + DELETED_AT_ONCE]
            )
        # A file that is there but was passed over is in the count of its reason.
        self.removed = sum(path not in seen for path in gone)

    def report(self, cpu_s: float) -> IngestReport:
        skipped = self.walked.skipped
        return IngestReport(
            added=self.added,
            changed=self.changed,
            unchanged=self.unchanged,
            removed=self.removed,
            skipped_binary=skipped.get("binary", 0),
            skipped_ignored=skipped.get("ignored", 0),
            skipped_too_large=skipped.get("too_large", 0),
            skipped_unreadable=skipped.get("unreadable", 0),
            skipped_empty=skipped.get("empty", 0),
            chunks=self.chunks,
            cpu_s=cpu_s,
        )


class _BinaryHead(Exception):
    """The beginning of the file is no text; the rest was not read."""


def _read(found: Found, max_bytes: int) -> tuple[bytes, Fingerprint]:
    with opened(found) as descriptor:
        # Before the content: a change that comes later shows next time.
        status = os.fstat(descriptor)
        if status.st_size > max_bytes:
            raise TooLarge(f"file {found.path!r} has {status.st_size!r} bytes", hint=f"at most {max_bytes}")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(PROBE_BYTES)
            if looks_binary(found.path, data):
                raise _BinaryHead
            data += file.read(max_bytes - len(data) + 1)
    if len(data) > max_bytes:
        raise TooLarge(
            f"file {found.path!r} grew past {max_bytes!r} bytes", hint="it is read when it is smaller"
        )
    racy = abs(time.time_ns() - status.st_mtime_ns) < RACY_NS
    return data, Fingerprint(
        size_bytes=status.st_size,
        mtime_ns=0 if racy else status.st_mtime_ns,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _items(path: str, text: FileText, settings: AgentDBSettings) -> Iterator[Item]:
    kind = kind_of(path)
    lines = text.text.splitlines()
    pages = [*text.page_starts, len(lines)] if text.page_starts else [0, len(lines)]
    for page, (start, stop) in enumerate(pairwise(pages), start=1):
        for found in chunk(
            lines[start:stop], kind, lines_max=settings.chunk_lines_max, chars_max=settings.chunk_chars_max
        ):
            yield _item(path, kind, found, start, page if text.page_starts else None)


def _item(path: str, kind: str, found: Chunk, offset: int, page: int | None) -> Item:
    first, last = found.line_start + offset, found.line_end + offset
    metadata: dict[str, str | int] = {"path": path, "line_start": first, "line_end": last, "kind": kind}
    if found.symbol is not None:
        metadata["symbol"] = found.symbol
    if page is not None:
        metadata["page"] = page
    if found.part:
        metadata["part"] = found.part
    # Pieces of one overlong line have the same range.
    suffix = f"#{found.part}" if found.part else ""
    return Item(id=f"{path}:{first}-{last}{suffix}", text=found.text, metadata=metadata)
