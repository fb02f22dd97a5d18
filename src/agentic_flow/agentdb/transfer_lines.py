"""Exports as JSON Lines: a header, documents and items one a line, and a footer that tells that it is whole.

A foreign file has no header: each line is an object, and `Columns` says what is what.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import orjson
from pydantic import ValidationError

from agentic_flow.agentdb.http.lines import Line, LineSplitter
from agentic_flow.agentdb.transfer_files import (
    Columns,
    Footer,
    Header,
    Row,
    file_errors,
    foreign_item,
    item_values,
    read_header,
    read_item,
)
from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, InvalidInput
from agentic_flow.core.vectors import Fingerprint, Item

LINE_MAX_BYTES = 16 * 1024 * 1024
"""Longer than any item can be."""

_CHUNK_BYTES = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_LEVEL = 6
_HEADER, _FOOTER, _DOCUMENT = "agentic_flow_export", "agentic_flow_end", "agentic_flow_document"


class LinesWriter:
    """Writes an export; see Writer. A name that ends in .gz is compressed.

    Args:
        path: File to make.
        name: The name that it will have in the end.
    """

    def __init__(self, path: Path, name: str, header: Header) -> None:
        self._documents: set[str] = set()
        self._path = path
        with file_errors(path):
            self._raw = path.open("xb")
            # No time and no name inside: the same rows make the same file.
            self._file: IO[bytes] = (
                cast(IO[bytes], gzip.GzipFile("", "wb", _GZIP_LEVEL, self._raw, mtime=0))
                if name.endswith(".gz")
                else self._raw
            )
        self._put([{_HEADER: header.model_dump()}])

    def write(self, items: Sequence[Item], documents: Mapping[str, Fingerprint]) -> None:
        """See Writer."""
        fresh = {path: mark for path, mark in documents.items() if path not in self._documents}
        self._put_documents(fresh)
        self._put([item_values(item) for item in items])

    def finish(self, footer: Footer, documents: Mapping[str, Fingerprint]) -> None:
        """See Writer."""
        self._put_documents(documents)
        self._put([{_FOOTER: footer.model_dump()}])
        self.close()

    def close(self) -> None:
        """Idempotent."""
        with file_errors(self._path):
            self._file.close()
            self._raw.close()

    def _put_documents(self, documents: Mapping[str, Fingerprint]) -> None:
        self._documents.update(documents)
        self._put([{_DOCUMENT: {"path": path, **mark.model_dump()}} for path, mark in documents.items()])

    def _put(self, values: Sequence[Mapping[str, Any]]) -> None:
        with file_errors(self._path):
            self._file.write(
                b"".join(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE) for value in values)
            )


class LinesReader:
    """Reads an export or a foreign file; see Reader. Compressed ones are recognised by their first bytes.

    Raises:
        PathNotFound: the file cannot be read.
        InvalidInput: columns were chosen for an export of ours.
        DataCorrupted: its header is broken.
    """

    unit: Literal["line", "row"] = "line"

    def __init__(self, path: Path, columns: Columns) -> None:
        self.header: Header | None = None
        self.footer: Footer | None = None
        self._path = path
        self._columns = columns
        with file_errors(path):
            self._raw = path.open("rb")
            self._size = path.stat().st_size
            compressed = self._raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            self._raw.seek(0)
        self._file: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw)) if compressed else self._raw
        self._lines = self._split()
        self._first: Line | None = None
        try:
            self._begin()
        except AgenticFlowError:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
        self._raw.close()

    def position(self) -> tuple[int, int]:
        """In bytes of the file."""
        return (self._size if self._raw.closed else self._raw.tell()), self._size

    def rows(self) -> Iterator[Row]:
        """See Reader."""
        if self._first is not None:
            yield self._row(self._first)
        for line in self._lines:
            if line.content is not None and not line.content.strip():
                continue
            row = self._row(line)
            if row.item is not None or row.document is not None or row.problem is not None:
                yield row

    def _begin(self) -> None:
        """Read the first line: a header, or a row already."""
        first = next((line for line in self._lines if line.content is None or line.content.strip()), None)
        self._first = first
        if first is None or first.content is None or not first.content.lstrip().startswith(b"{"):
            return
        try:
            values = orjson.loads(first.content)
        except orjson.JSONDecodeError:
            return  # the line is reported as the row that it is
        if _HEADER in values:
            if self._columns.given:
                raise InvalidInput(
                    f"{str(self._path)!r} is an export of ours: its columns are known",
                    hint="leave out the --…-column options",
                )
            self.header = read_header(orjson.dumps(values[_HEADER]), self._path)
            self._first = None

    def _row(self, line: Line) -> Row:
        try:
            if self.footer is not None:
                raise DataCorrupted(
                    "something follows the footer", hint="two exports in one file? split them"
                )
            if line.content is None:
                raise InvalidInput(
                    f"it is longer than {LINE_MAX_BYTES!r} bytes", hint="is it one object a line?"
                )
            try:
                values = orjson.loads(line.content)
            except orjson.JSONDecodeError as error:
                raise InvalidInput(f"it is no JSON: {error}", hint="each line is one JSON object") from None
            if not isinstance(values, dict):
                raise InvalidInput("it is no JSON object", hint="each line is one JSON object")
            return self._understood(line.number, cast(dict[str, Any], values))
        except AgenticFlowError as error:
            return Row(line.number, problem=error)

    def _understood(self, number: int, values: dict[str, Any]) -> Row:
        if self.header is None:
            return Row(number, item=foreign_item(values, self._columns))
        try:
            if _DOCUMENT in values:
                mark = dict(values[_DOCUMENT])
                return Row(number, document=(str(mark.pop("path")), Fingerprint.model_validate(mark)))
            if _FOOTER in values:
                self.footer = Footer.model_validate(values[_FOOTER])
                return Row(number)
        except (ValidationError, KeyError, TypeError, ValueError):
            raise InvalidInput("it is no document and no footer", hint="export it again") from None
        return Row(number, item=read_item(values))

    def _split(self) -> Iterator[Line]:
        splitter = LineSplitter(LINE_MAX_BYTES)
        while chunk := self._read():
            yield from splitter.feed(chunk)
        yield from splitter.finish()

    def _read(self) -> bytes:
        try:
            with file_errors(self._path):
                try:
                    return self._file.read(_CHUNK_BYTES)
                except (gzip.BadGzipFile, zlib.error) as error:
                    raise DataCorrupted(
                        f"{str(self._path)!r} is damaged: {error}", hint="export it again"
                    ) from None
        except EOFError:
            raise DataCorrupted(
                f"{str(self._path)!r} is cut off inside its compressed data", hint="copy or export it again"
            ) from None
