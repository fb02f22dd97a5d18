"""What files of exported items have in common: header, footer, rows; and what a foreign row is as an item."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import orjson
from pydantic import ValidationError

from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    InvalidInput,
    PathNotFound,
    Unavailable,
)
from agentic_flow.core.messages import Frozen
from agentic_flow.core.vectors import Fingerprint, Item, Namespace

FORMAT_VERSION = 1
Format = Literal["jsonl", "parquet"]

_ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_PARQUET_MAGIC = b"PAR1"
_ITEM_TIMES = ("expires_at_s", "valid_from_s", "valid_until_s")


class Header(Frozen):
    """What an export says of itself; `namespace` has the settings and, of that moment, the counts."""

    format_version: int
    product_version: str
    exported_at_s: float
    namespace: Namespace


class Footer(Frozen):
    """What a whole export has: its rows, and the digest of items and documents."""

    items: int
    documents: int
    digest: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a file that is not ours has what an item needs; all else becomes metadata.

    Args:
        id: Of the items' ids; "id" by default. Numbers are taken as their digits.
        text: Of the texts; "text" by default, if there is such a column.
        vector: Of the vectors; "vector" by default, if there is such a column.
        left_out: Columns that are not read.
    """

    id: str | None = None
    text: str | None = None
    vector: str | None = None
    left_out: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def given(self) -> bool:
        """Whether anything was chosen."""
        return self != Columns()

    def named(self) -> dict[str, str]:
        """Option → column, of those that must be there."""
        wanted = {"--id-column": self.id or "id", "--text-column": self.text, "--vector-column": self.vector}
        return {option: column for option, column in wanted.items() if column is not None}

    def check(self, has: Sequence[str]) -> None:
        """Raise InvalidInput unless the columns are there."""
        for option, column in self.named().items():
            if column not in has:
                names = ", ".join(map(repr, list(has)[:20]))
                raise InvalidInput(
                    f"there is no column {column!r}", hint=f"choose with {option}; there is {names or 'none'}"
                )


class Row(NamedTuple):
    """One row of a file: an item, a document, or what is wrong with it. Rows and lines count from 1."""

    number: int
    item: Item | None = None
    document: tuple[str, Fingerprint] | None = None
    problem: AgenticFlowError | None = None


class Reader(Protocol):
    """A file being read. Blocking: it belongs into a thread."""

    header: Header | None
    """None: the file is not an export of ours."""
    footer: Footer | None
    """Known once all rows were read; None: the file has none."""
    unit: Literal["line", "row"]

    def rows(self) -> Iterator[Row]:
        """Its rows, once. Documents come before the items that are their chunks.

        Raises:
            DataCorrupted: the rest of the file cannot be read.
        """
        ...

    def position(self) -> tuple[int, int]:
        """How much of it was read, and how much there is."""
        ...

    def close(self) -> None: ...


class Writer(Protocol):
    """A file being written. Blocking: it belongs into a thread."""

    def write(self, items: Sequence[Item], documents: Mapping[str, Fingerprint]) -> None:
        """Append items; `documents` has those that they are chunks of."""
        ...

    def finish(self, footer: Footer, documents: Mapping[str, Fingerprint]) -> None:
        """Append the documents that no written item was a chunk of, and the footer."""
        ...

    def close(self) -> None: ...


def written_format(path: Path, chosen: Format | None) -> Format:
    """The format to write.

    Raises:
        InvalidInput: the ending does not tell, and nothing was chosen.
    """
    found = chosen or _ENDINGS.get(_ending(path))
    if found is None:
        raise InvalidInput(
            f"the name {path.name!r} tells no format",
            hint="end it in .jsonl, .jsonl.gz or .parquet, or give --format",
        )
    if found == "parquet" and path.suffix == ".gz":
        raise InvalidInput(
            f"{path.name!r} is Parquet and ends in .gz", hint="Parquet is compressed inside: leave .gz out"
        )
    return found


def read_format(path: Path, chosen: Format | None) -> Format:
    """The format of a file, told by its first bytes or, failing that, by its name.

    Raises:
        PathNotFound: it cannot be read.
    """
    with file_errors(path), path.open("rb") as file:
        head = file.read(len(_PARQUET_MAGIC))
    if chosen is not None:
        return chosen
    return "parquet" if head == _PARQUET_MAGIC else _ENDINGS.get(_ending(path), "jsonl")


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_header(text: bytes, path: Path) -> Header:
    """The header in its JSON.

    Raises:
        Conflict: a newer version wrote the file.
        DataCorrupted: it is no header.
    """
    try:
        values = orjson.loads(text)
        if (
            isinstance(values, dict)
            and cast(dict[str, Any], values).get("format_version", 0) > FORMAT_VERSION
        ):
            raise Conflict(
                f"{str(path)!r} has format version {values['format_version']!r}, this program reads "
                f"{FORMAT_VERSION!r}",
                hint="use the version of agentic-flow that wrote it, or a newer one",
            )
        return Header.model_validate(values)
    except (orjson.JSONDecodeError, ValidationError, TypeError) as error:
        raise DataCorrupted(
            f"{str(path)!r} has a broken header: {_first(error)}", hint="export it again"
        ) from None


def read_item(values: Any) -> Item:
    """The item of a row of our own.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return Item.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(f"it is no item: {_first(error)}", hint="see docs/guides/agentdb.md") from None


def foreign_item(record: Mapping[str, Any], columns: Columns) -> Item:
    """The item of a row of anybody's file.

    Args:
        record: Column → value as Python has it. A `metadata` object is merged with the other columns.

    Raises:
        InvalidInput: there is no id, or a value has no place in an item.
    """
    columns.check(list(record))
    rest = dict(record)
    item_id = rest.pop(columns.id or "id")
    if isinstance(item_id, bool) or not isinstance(item_id, str | int):
        raise InvalidInput(f"the id {item_id!r} is no text or integer", hint="choose with --id-column")
    text = rest.pop(columns.text or "text", None)
    vector = rest.pop(columns.vector or "vector", None)
    times = {name: rest.pop(name) for name in _ITEM_TIMES if name in rest}
    for name in columns.left_out:
        rest.pop(name, None)
    metadata = _own_metadata(rest.pop("metadata", None), rest)
    return read_item(
        {
            "id": str(item_id),
            "text": "" if text is None else text,
            "vector": vector,
            "metadata": metadata,
            **{name: at.timestamp() if isinstance(at, datetime) else at for name, at in times.items()},
        }
    )


def _own_metadata(given: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {name: json_value(name, value) for name, value in rest.items() if value is not None}
    if isinstance(given, str) and given.startswith("{"):
        with contextlib.suppress(orjson.JSONDecodeError):
            given = orjson.loads(given)
    if isinstance(given, Mapping):
        return {**metadata, **json_value("metadata", given)}
    return metadata if given is None else {**metadata, "metadata": json_value("metadata", given)}


def json_value(name: str, value: Any) -> Any:
    """A value of a column as JSON has it: times as ISO 8601, decimals as numbers.

    Raises:
        InvalidInput: JSON has nothing like it.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): json_value(name, one) for key, one in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [json_value(name, one) for one in cast(Sequence[Any], value)]
    raise InvalidInput(
        f"column {name!r} holds {type(value).__name__}, which metadata cannot", hint=f"add --leave-out {name}"
    )


def item_values(item: Item) -> dict[str, Any]:
    """An item as a JSON object, without what it does not have; the vector as base64 of float32."""
    values: dict[str, Any] = {
        "id": item.id,
        "text": item.text,
        "metadata": item.metadata,
        "vector": None if item.vector is None else base64.b64encode(item.vector.data).decode(),
        "version": item.version,
        "created_at_s": item.created_at_s,
        "updated_at_s": item.updated_at_s,
    }
    for name in (*_ITEM_TIMES, "document"):
        value: Any = getattr(item, name)
        if value is not None:
            values[name] = value
    return values


@contextlib.contextmanager
def file_errors(path: Path) -> Generator[None]:
    """What the operating system says about a file, in our words."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise PathNotFound(
            f"{str(path)!r} cannot be used: {(error.strerror or 'no access').lower()}",
            hint="check the path and who may read and write there",
        ) from None
    except OSError as error:
        raise Unavailable(
            f"{str(path)!r} cannot be read or written: {error.strerror or error}",
            hint="check the disk and its space",
        ) from error


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool) -> Generator[Path]:
    """A new file beside `path` that takes its name when all went well, and is gone otherwise.

    Raises:
        Conflict: `path` exists, and is not to be overwritten.
    """
    if path.exists() and not overwrite:
        raise Conflict(f"{str(path)!r} exists", hint="give another name, or --overwrite")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with file_errors(path):
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _first(error: Exception) -> str:
    """The first complaint of a validation, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]
