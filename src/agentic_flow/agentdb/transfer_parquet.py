"""Exports as Parquet, for which `pyarrow` is asked; any Parquet file with an id column can be read.

Of an export, vectors are a fixed-size list of float32, metadata JSON in a column of strings, and what is
known of a chunk's document stands beside the chunk. Key-value metadata of the file have header and footer
(`agentic_flow_export`, `agentic_flow_end`) and documents without chunks. Pages carry checksums, which reading
verifies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import orjson
from pydantic import ValidationError

from agentic_flow.agentdb.paging import item_bytes
from agentic_flow.agentdb.transfer_files import (
    Columns,
    Footer,
    Header,
    Row,
    file_errors,
    foreign_item,
    read_header,
    read_item,
)
from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, InvalidInput, Unavailable
from agentic_flow.core.vectors import Fingerprint, Item, Vector

ROW_GROUP_ITEMS = 16_384
ROW_GROUP_BYTES = 64 * 1024 * 1024
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1024 * 1024

_HEADER, _FOOTER, _DOCUMENTS = b"agentic_flow_export", "agentic_flow_end", "agentic_flow_documents"
_FLOATS = ("created_at_s", "updated_at_s", "expires_at_s", "valid_from_s", "valid_until_s")
_MARKS = ("document", "document_size_bytes", "document_mtime_ns", "document_sha256")


def _pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; their types are too loose to be of use.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Unavailable(
            "Parquet needs the library pyarrow, which is not installed",
            hint="pip install 'agentic-flow[parquet]', or use JSON Lines",
        ) from None
    return cast(Any, pyarrow), cast(Any, pyarrow.parquet)


class ParquetWriter:
    """Writes an export; see Writer.

    Args:
        path: File to make.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._arrow, parquet = _pyarrow()
        self._path = path
        self._dimension = header.namespace.dimension
        self._schema = _own_schema(self._arrow, header)
        self._waiting: list[tuple[Item, Fingerprint | None]] = []
        self._waiting_bytes = 0
        self._documents: set[str] = set()
        with file_errors(path):
            self._file = parquet.ParquetWriter(
                path,
                self._schema,
                compression="zstd",
                # Of ids, texts and numbers hardly any repeat.
                use_dictionary=["document", "document_sha256"],
                write_page_checksum=True,
            )

    def write(self, items: Sequence[Item], documents: Mapping[str, Fingerprint]) -> None:
        """See Writer."""
        self._documents.update(documents)
        for item in items:
            self._waiting.append((item, None if item.document is None else documents[item.document]))
            self._waiting_bytes += item_bytes(item)
            if len(self._waiting) >= ROW_GROUP_ITEMS or self._waiting_bytes >= ROW_GROUP_BYTES:
                self._flush()

    def finish(self, footer: Footer, documents: Mapping[str, Fingerprint]) -> None:
        """See Writer."""
        self._flush()
        bare = {path: mark.model_dump() for path, mark in documents.items() if path not in self._documents}
        with file_errors(self._path):
            self._file.add_key_value_metadata(
                {_FOOTER: orjson.dumps(footer.model_dump()).decode(), _DOCUMENTS: orjson.dumps(bare).decode()}
            )
        self.close()

    def close(self) -> None:
        """Idempotent."""
        with file_errors(self._path):
            self._file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        arrow = self._arrow
        items = [item for item, _ in self._waiting]
        marks = [mark for _, mark in self._waiting]
        columns: list[Any] = [
            arrow.array([item.id for item in items], arrow.string()),
            arrow.array([item.text for item in items], arrow.string()),
            arrow.array([orjson.dumps(item.metadata).decode() for item in items], arrow.string()),
            self._vectors(items),
            arrow.array([item.version for item in items], arrow.int64()),
            *(arrow.array([getattr(item, name) for item in items], arrow.float64()) for name in _FLOATS),
            arrow.array([item.document for item in items], arrow.string()),
            arrow.array([mark and mark.size_bytes for mark in marks], arrow.int64()),
            arrow.array([mark and mark.mtime_ns for mark in marks], arrow.int64()),
            arrow.array([mark and mark.sha256 for mark in marks], arrow.string()),
        ]
        with file_errors(self._path):
            self._file.write_table(
                arrow.Table.from_arrays(columns, schema=self._schema), row_group_size=len(items)
            )
        self._waiting.clear()
        self._waiting_bytes = 0

    def _vectors(self, items: Sequence[Item]) -> Any:
        arrow = self._arrow
        missing = np.array([item.vector is None for item in items])
        empty = bytes(4 * self._dimension)
        data = b"".join(empty if item.vector is None else item.vector.data for item in items)
        flat = arrow.array(np.frombuffer(data, "<f4"), arrow.float32())
        mask = arrow.array(missing) if missing.any() else None
        return arrow.FixedSizeListArray.from_arrays(flat, self._dimension, mask=mask)


class ParquetReader:
    """Reads an export or a foreign file; see Reader.

    Raises:
        PathNotFound: the file cannot be read.
        InvalidInput: it is no Parquet file, or has not the columns.
        DataCorrupted: its header is broken.
        Unavailable: pyarrow is not installed.
    """

    unit: Literal["line", "row"] = "row"

    def __init__(self, path: Path, columns: Columns) -> None:
        self._arrow, parquet = _pyarrow()
        self.header: Header | None = None
        self.footer: Footer | None = None
        self._path = path
        self._columns = columns
        self._done = 0
        with file_errors(path):
            # Opened here, because pyarrow's own messages about paths are of many kinds.
            self._raw = path.open("rb")
        try:
            self._file = parquet.ParquetFile(
                self._raw,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
                thrift_string_size_limit=2**31 - 1,
            )
            self._understand()
        except (self._arrow.ArrowException, OSError) as error:
            self.close()
            raise InvalidInput(
                f"{str(path)!r} is no whole Parquet file: {_line(error)}",
                hint="its end, which tells what is inside, is missing or damaged: copy or make it again",
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._raw.close()

    def position(self) -> tuple[int, int]:
        """In rows."""
        return self._done, int(self._file.metadata.num_rows)

    def _understand(self) -> None:
        about: dict[bytes, bytes] = self._file.metadata.metadata or {}
        if _HEADER not in about:
            self._columns.check(self._file.schema_arrow.names)
            return
        if self._columns.given:
            raise InvalidInput(
                f"{str(self._path)!r} is an export of ours: its columns are known",
                hint="leave out the --…-column options",
            )
        self.header = read_header(about[_HEADER], self._path)
        if not self._file.schema_arrow.equals(_own_schema(self._arrow, self.header)):
            raise DataCorrupted(
                f"{str(self._path)!r} has not the columns of an export of ours", hint="export it again"
            )
        try:
            self.footer = Footer.model_validate_json(about[_FOOTER.encode()])
            documents = orjson.loads(about[_DOCUMENTS.encode()])
            self._bare = {path: Fingerprint.model_validate(mark) for path, mark in documents.items()}
        except (KeyError, ValidationError, orjson.JSONDecodeError, AttributeError):
            raise DataCorrupted(
                f"{str(self._path)!r} has no footer of ours: its export did not end", hint="export it again"
            ) from None

    def rows(self) -> Iterator[Row]:
        """See Reader."""
        if self.header is not None:
            yield from (Row(0, document=document) for document in self._bare.items())
        understood = self._foreign_rows if self.header is None else self._own_rows
        batches = self._batches()
        while True:
            try:
                with file_errors(self._path):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    rows = understood(batch)
            # For damaged pages pyarrow raises OSError.
            except (self._arrow.ArrowException, Unavailable) as error:
                raise DataCorrupted(
                    f"{str(self._path)!r} is damaged after row {self._done!r}: {_line(error)}",
                    hint="copy or make it again",
                ) from None
            yield from rows
            self._done += batch.num_rows

    def _batches(self) -> Iterator[Any]:
        wanted = [name for name in self._file.schema_arrow.names if name not in self._columns.left_out]
        return self._file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)

    def _own_rows(self, batch: Any) -> list[Row]:
        columns: dict[str, list[Any]] = {
            name: batch.column(name).to_pylist()
            for name in ("id", "text", "metadata", "version", *_FLOATS, *_MARKS)
        }
        vectors = self._read_vectors("vector", batch.column("vector"))
        rows: list[Row] = []
        for place, vector in enumerate(vectors):
            number = self._done + place + 1
            values = {name: column[place] for name, column in columns.items()}
            path, size_bytes, mtime_ns, sha256 = (values.pop(name) for name in _MARKS)
            try:
                if path is not None:
                    mark = Fingerprint(size_bytes=size_bytes, mtime_ns=mtime_ns, sha256=sha256)
                    rows.append(Row(number, document=(path, mark)))
                metadata = orjson.loads(values.pop("metadata"))
                rows.append(
                    Row(
                        number,
                        item=read_item({**values, "metadata": metadata, "vector": vector, "document": path}),
                    )
                )
            except AgenticFlowError as error:
                rows.append(Row(number, problem=error))
            except (ValidationError, orjson.JSONDecodeError) as error:
                problem = InvalidInput(f"it is no item: {_line(error)}", hint="export it again")
                rows.append(Row(number, problem=problem))
        return rows

    def _foreign_rows(self, batch: Any) -> list[Row]:
        names: list[str] = batch.schema.names
        vector_name = self._columns.vector or "vector"
        vectors: list[Vector | None] = [None] * batch.num_rows
        if vector_name in names:
            vectors = self._read_vectors(vector_name, batch.column(vector_name))
        columns = {name: batch.column(name).to_pylist() for name in names if name != vector_name}
        rows: list[Row] = []
        for place, vector in enumerate(vectors):
            record = {name: column[place] for name, column in columns.items()}
            if vector_name in names:
                record[vector_name] = vector
            try:
                rows.append(Row(self._done + place + 1, item=foreign_item(record, self._columns)))
            except AgenticFlowError as error:
                rows.append(Row(self._done + place + 1, problem=error))
        return rows

    def _read_vectors(self, name: str, column: Any) -> list[Vector | None]:
        """The vectors of a column of lists, of whatever kind; None where it has none.

        Raises:
            InvalidInput: it holds something else.
        """
        types = self._arrow.types
        kind = column.type
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not lists or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
            raise InvalidInput(
                f"column {name!r} holds {str(kind)!r}, not lists of numbers",
                hint="choose with --vector-column",
            )
        import pyarrow.compute

        lengths: list[int | None] = cast(Any, pyarrow.compute).list_value_length(column).to_pylist()
        # A missing number becomes NaN, which stores refuse.
        with np.errstate(over="ignore"):
            numbers = column.flatten().to_numpy(zero_copy_only=False).astype("<f4")
        vectors: list[Vector | None] = []
        start = 0
        for length in lengths:
            vectors.append(None if length is None else Vector(data=numbers[start : start + length].tobytes()))
            start += length or 0
        return vectors


def _own_schema(arrow: Any, header: Header) -> Any:
    """The columns of an export, and its header."""
    fields: list[Any] = [
        arrow.field("id", arrow.string(), nullable=False),
        arrow.field("text", arrow.string(), nullable=False),
        arrow.field("metadata", arrow.string(), nullable=False),
        arrow.field("vector", arrow.list_(arrow.float32(), header.namespace.dimension)),
        arrow.field("version", arrow.int64(), nullable=False),
        *(arrow.field(name, arrow.float64()) for name in _FLOATS),
        arrow.field("document", arrow.string()),
        arrow.field("document_size_bytes", arrow.int64()),
        arrow.field("document_mtime_ns", arrow.int64()),
        arrow.field("document_sha256", arrow.string()),
    ]
    return arrow.schema(fields, metadata={_HEADER: orjson.dumps(header.model_dump())})


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
