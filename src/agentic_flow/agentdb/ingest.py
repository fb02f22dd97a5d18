"""Reading folders into memory, incrementally: what did not change is not read again.

Each file becomes one document with its chunks, replaced in one transaction. A process that is killed half-way
leaves whole documents only; the next run reads the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agentic_flow.agentdb.chunking import chunk, kind_of
from agentic_flow.agentdb.reading import NotText, text_of
from agentic_flow.core.errors import TooLarge
from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import ToolScope, VectorStore
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.toolkit import PathRules
from agentic_flow.core.vectors import Document, Fingerprint, Item

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_BATCH_FILES, _BATCH_BYTES = 64, 2 * 1024 * 1024
_NEVER = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv", ".tox"})
_GITIGNORE_MAX_BYTES = 1024 * 1024

NO_TEXT = "no-text:"
"""Begins the hash of a document without chunks: a file that was read and has no text. It is remembered so
that an unchanged binary is not read again; what follows is the name of its count."""


class IngestReport(Frozen):
    """What the reading of the inputs did; every file seen is in exactly one count but `chunks`.

    An ignored folder is not entered and counts as one.
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


@dataclass(frozen=True, slots=True)
class _Found:
    """A file worth looking at: its path as cited, where it is, and what the file system says of it."""

    path: str
    place: Path
    size_bytes: int
    mtime_ns: int


@dataclass
class _Counts:
    """The report while it grows."""

    values: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, name: str, number: int = 1) -> None:
        self.values[name] = self.values.get(name, 0) + number


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
) -> IngestReport:
    """Bring a namespace up to date with folders.

    Args:
        roots: Name → folder. Paths of documents are relative to the folder, with the name in front when
            there are several.
        paths_allowed: gitignore-style patterns; empty allows all.
        paths_forbidden: Likewise; they win.
        progress: Called with (files done, files in all) as batches are stored, and at the end.

    Raises:
        TooLarge: more files than `agentdb.files_max`; nothing was written.
    """
    started_s = time.process_time()
    counts = _Counts()
    rules = PathRules(
        ToolScope(
            roots=dict(roots), paths_allowed=tuple(paths_allowed), paths_forbidden=tuple(paths_forbidden)
        )
    )
    found = await asyncio.to_thread(_survey, roots, rules, settings, counts)
    await store.create_namespace(tenant, namespace)
    known = await store.fingerprints(tenant, namespace)
    fresh: list[_Found] = []
    for file in found:
        if _is_known(file, known):
            counts.add(_count_of(known[file.path]))
        else:
            fresh.append(file)
    kept = {file.path for file in found}
    done = len(found) - len(fresh)
    for batch in _batches(fresh):
        documents = await asyncio.to_thread(_read_batch, batch, known, settings, counts)
        kept -= {file.path for file in batch} - {document.path for document in documents}
        if documents:
            counts.add("chunks", await store.put_documents(tenant, namespace, documents))
        done += len(batch)
        if progress is not None:
            progress(done, len(found))
    gone = [path for path in known if path not in kept]
    if gone:
        counts.add("removed", await store.delete_documents(tenant, namespace, gone))
    if progress is not None:
        progress(len(found), len(found))
    return IngestReport(**counts.values, cpu_s=time.process_time() - started_s)


def _is_known(file: _Found, known: Mapping[str, Fingerprint]) -> bool:
    fingerprint = known.get(file.path)
    return (
        fingerprint is not None
        and fingerprint.size_bytes == file.size_bytes
        and fingerprint.mtime_ns == file.mtime_ns
    )


def _count_of(fingerprint: Fingerprint) -> str:
    """The count that an unchanged file belongs to."""
    if fingerprint.sha256.startswith(NO_TEXT):
        return fingerprint.sha256.removeprefix(NO_TEXT)
    return "unchanged"


def _batches(files: Sequence[_Found]) -> Generator[list[_Found]]:
    batch: list[_Found] = []
    size = 0
    for file in files:
        if batch and (len(batch) == _BATCH_FILES or size + file.size_bytes > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size_bytes
    if batch:
        yield batch


# ---- finding files ---------------------------------------------------------------------------------------


def _survey(
    roots: Mapping[str, Path], rules: PathRules, settings: AgentDBSettings, counts: _Counts
) -> list[_Found]:
    """The files to consider, in path order; what is passed over is counted."""
    found: list[_Found] = []
    for name, root in roots.items():
        prefix = f"{name}/" if len(roots) > 1 else ""
        for file in _walk(root, prefix, rules, settings, counts):
            found.append(file)
            if len(found) > settings.files_max:
                raise TooLarge(
                    f"{str(root)!r} holds more than {settings.files_max} files",
                    hint="name a smaller folder, or raise agentdb.files_max",
                )
    return sorted(found, key=lambda file: file.path)


def _walk(
    root: Path, prefix: str, rules: PathRules, settings: AgentDBSettings, counts: _Counts
) -> Generator[_Found]:
    """Walk one root without following links; ignored folders are not entered."""
    pending: list[tuple[Path, str, tuple[tuple[str, GitIgnoreSpec], ...]]] = [(root, "", ())]
    while pending:
        folder, relative, ignores = pending.pop()
        spec = _gitignore(folder)
        if spec is not None:
            ignores = (*ignores, (relative, spec))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            counts.add("skipped_unreadable")
            continue
        for entry in entries:
            path = f"{relative}{entry.name}"
            try:
                path.encode()
                status = entry.stat(follow_symlinks=False)
            except (UnicodeEncodeError, OSError):
                counts.add("skipped_unreadable")
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if _ignored(entry.name, path, is_folder, ignores) or rules.forbids(
                prefix + path, folder=is_folder
            ):
                counts.add("skipped_ignored")
            elif is_folder:
                pending.append((folder / entry.name, f"{path}/", ignores))
            elif not rules.allows(prefix + path) or not stat.S_ISREG(status.st_mode):
                counts.add("skipped_ignored")  # not asked for; or a link, a pipe, a socket, a device
            elif status.st_size > settings.file_max_bytes:
                counts.add("skipped_too_large")
            elif status.st_size == 0:
                counts.add("skipped_empty")
            else:
                yield _Found(prefix + path, folder / entry.name, status.st_size, status.st_mtime_ns)


def _ignored(name: str, path: str, is_folder: bool, ignores: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    if name.startswith(".") or (is_folder and name in _NEVER):
        return True
    ending = "/" if is_folder else ""
    for base, spec in reversed(ignores):  # the nearest file that has an opinion decides
        opinion = spec.check_file(path[len(base) :] + ending).include
        if opinion is not None:
            return opinion
    return False


def _gitignore(folder: Path) -> GitIgnoreSpec | None:
    place = folder / ".gitignore"
    try:
        if not stat.S_ISREG(place.lstat().st_mode) or place.lstat().st_size > _GITIGNORE_MAX_BYTES:
            return None
        lines = place.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))


def _is_pattern(line: str) -> bool:
    """Whether pathspec takes this line; git passes over lines it cannot make sense of."""
    from pathspec import GitIgnoreSpec

    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


# ---- reading files ---------------------------------------------------------------------------------------


def _read_batch(
    batch: Sequence[_Found], known: Mapping[str, Fingerprint], settings: AgentDBSettings, counts: _Counts
) -> list[Document]:
    documents: list[Document] = []
    for file in batch:
        document = _read(file, settings, counts)
        if document is not None and not document.chunks:
            counts.add(_count_of(document.fingerprint))
            documents.append(document)
        elif document is not None:
            before = known.get(document.path)
            if before is None:
                counts.add("added")
            elif before.sha256 == document.fingerprint.sha256:
                counts.add("unchanged")  # touched only; stored again for the new time
            else:
                counts.add("changed")
            documents.append(document)
    return documents


def _read(file: _Found, settings: AgentDBSettings, counts: _Counts) -> Document | None:
    """One file as a document, without chunks when it has no text; None, and counted, when it is not read."""
    try:
        data, status = _content(file.place, settings.file_max_bytes)
    except OSError:
        counts.add("skipped_unreadable")
        return None
    if len(data) > settings.file_max_bytes:  # it grew since it was found
        counts.add("skipped_too_large")
        return None
    try:
        lines = text_of(file.path, data).splitlines()
    except NotText:
        return _document(file.path, status, f"{NO_TEXT}skipped_binary", [])
    kind = kind_of(file.path)
    chunks = chunk(lines, kind, lines_max=settings.chunk_lines_max, chars_max=settings.chunk_chars_max)
    if not chunks:
        return _document(file.path, status, f"{NO_TEXT}skipped_empty", [])
    items: list[Item] = []
    for piece in chunks:
        metadata = {
            "path": file.path,
            "line_start": piece.line_start,
            "line_end": piece.line_end,
            "kind": kind,
        }
        if piece.symbol:
            metadata["symbol"] = piece.symbol
        suffix = f"#{piece.part}" if piece.part else ""
        identity = f"{file.path}:{piece.line_start}-{piece.line_end}{suffix}"
        items.append(Item(id=identity, text=piece.text, metadata=metadata))
    return _document(file.path, status, hashlib.sha256(data).hexdigest(), items)


def _document(path: str, status: os.stat_result, sha256: str, items: Sequence[Item]) -> Document:
    fingerprint = Fingerprint(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)
    return Document(path=path, fingerprint=fingerprint, chunks=tuple(items))


def _content(place: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """The bytes, and the status they belong to: taken before reading, so that a later change is noticed."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{place} is no regular file")
        return file.read(max_bytes + 1), status
