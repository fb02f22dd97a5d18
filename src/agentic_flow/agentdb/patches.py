"""What one call changed, as bytes: taken while the rows change, applied to a database of the moment before.

A patch holds whole rows: those that are new, those that changed (as they are now) and the keys of those that
are gone. Full-text tables and indexes are derived and take no part.

    size of the JSON (4 bytes) · JSON · the vectors, one after the other
"""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import apsw
import orjson

from agentic_flow.agentdb import schema
from agentic_flow.core.db import execute_many, rows
from agentic_flow.core.errors import DataCorrupted

KEYS: Mapping[str, tuple[str, ...]] = {
    "namespaces": ("id",),
    "documents": ("id",),
    "items": ("key",),
    "vectors": ("key",),
    "idempotency": ("namespace_id", "key"),
}
"""The tables that hold the truth, and their primary keys."""

_TEXT_TABLES = ("items", "documents")
"""Those whose rows have words in the full-text tables; their second column is the namespace."""

_SIZE = struct.Struct("<I")
_HOOK = "agentdb-history"

Row = tuple[Any, ...]


class _Table:
    """Rows of one table as a call leaves them, by primary key."""

    __slots__ = ("gone", "keyed", "new", "old")

    def __init__(self, *, keyed: bool) -> None:
        self.keyed = keyed
        """Whether the primary key is not the rowid, but the first two columns."""
        self.new: dict[Any, Row] = {}
        self.old: dict[Any, Row] = {}
        """Rows that were there before, as they are now."""
        self.gone: dict[Any, None] = {}


class Capture:
    """The rows that a connection changes inside a `with` block, collected as it changes them.

    SQLite's session extension does the same, but prepares statements for each table of each call (100 µs) and
    keeps the whole of every deleted row in memory.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection: Any = connection
        self._tables = {name: _Table(keyed=len(key) > 1) for name, key in KEYS.items()}

    def __enter__(self) -> Self:
        self._connection.preupdate_hook(self._changed, id=_HOOK)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.preupdate_hook(None, id=_HOOK)

    def encode(self) -> bytes | None:
        """The patch; None when nothing changed."""
        tables: dict[str, dict[str, Any]] = {}
        blobs: list[bytes] = []
        for name, table in self._tables.items():
            if not (table.new or table.old or table.gone):
                continue
            new, old = list(table.new.values()), list(table.old.values())
            if name == "vectors":
                blobs = [row[1] for row in new + old]
                new, old = [(row[0], len(row[1])) for row in new], [(row[0], len(row[1])) for row in old]
            tables[name] = {"new": new, "old": old, "gone": list(table.gone)}
        return _encode(tables, (), blobs) if tables else None

    def _changed(self, update: Any) -> None:
        table = self._tables.get(update.table_name)
        if table is None:
            return
        operation = update.opcode
        if operation == apsw.SQLITE_DELETE:
            key = update.old[:2] if table.keyed else update.rowid
            if table.new.pop(key, None) is None:
                table.old.pop(key, None)
                table.gone[key] = None
            return
        row = update.new
        key = row[:2] if table.keyed else update.rowid_new
        if key in table.new or (operation == apsw.SQLITE_INSERT and key not in table.gone):
            table.new[key] = row
        else:
            table.gone.pop(key, None)
            table.old[key] = row


def encode_dropped(namespace_ids: Sequence[int]) -> bytes | None:
    """The patch of a call that removed these namespaces and all in them; None when there are none."""
    return _encode({}, namespace_ids, ()) if namespace_ids else None


def patch_schema(patch: bytes) -> int:
    """Schema version of the rows in a patch."""
    return _head(patch)[0]["schema"]


def apply_patch(connection: apsw.Connection, patch: bytes) -> set[int]:
    """Change the rows as the call did. Returns the ids of the namespaces whose texts may have changed.

    Foreign keys must be off: tables are filled one after the other.

    Raises:
        DataCorrupted: the rows are not those that the call found.
    """
    head, start = _head(patch)
    for namespace_id in head["dropped"]:
        drop_rows(connection, namespace_id)
    touched: set[int] = set(head["dropped"])
    for name, change in head["tables"].items():
        new, old, gone = change["new"], change["old"], change["gone"]
        if name == "vectors":
            blobs = _blobs(patch, start, [size for _, size in new + old])
            new = [(key, next(blobs)) for key, _ in new]
            old = [(key, next(blobs)) for key, _ in old]
        if name in _TEXT_TABLES:
            touched |= {int(row[1]) for row in (*new, *old)}
            touched |= _namespaces_of(connection, name, gone)
        width = len(KEYS[name])
        before = [row[:width] for row in old] + (gone if width > 1 else [(key,) for key in gone])
        condition = " AND ".join(f"{column} = ?" for column in KEYS[name])
        already = connection.total_changes()
        execute_many(connection, f"DELETE FROM {name} WHERE {condition}", before)
        found = connection.total_changes() - already
        if found != len(before):
            raise _misfit(f"it changes {len(before)!r} rows of {name!r}, of which {found!r} are there")
        if new or old:
            marks = ", ".join("?" * len((new or old)[0]))
            try:
                execute_many(connection, f"INSERT INTO {name} VALUES ({marks})", new + old)
            except (apsw.ConstraintError, apsw.SQLError) as error:
                raise _misfit(f"its rows of {name!r} cannot be stored: {error}") from error
    return touched


def _encode(tables: dict[str, Any], dropped: Sequence[int], blobs: Sequence[bytes]) -> bytes:
    head = orjson.dumps({"schema": len(schema.MIGRATIONS), "tables": tables, "dropped": list(dropped)})
    return b"".join((_SIZE.pack(len(head)), head, *blobs))


def _head(patch: bytes) -> tuple[dict[str, Any], int]:
    """The JSON of a patch, and where its vectors begin."""
    try:
        (size,) = _SIZE.unpack_from(patch)
        return orjson.loads(patch[_SIZE.size : _SIZE.size + size]), _SIZE.size + size
    except (struct.error, orjson.JSONDecodeError) as error:
        raise DataCorrupted(
            f"a change of the history cannot be read: {error}", hint="restore an older moment"
        ) from error


def _misfit(reason: str) -> DataCorrupted:
    return DataCorrupted(
        f"a change of the history does not fit: {reason}",
        hint="the backup and the history do not belong together; restore an older moment",
    )


def _namespaces_of(connection: apsw.Connection, table: str, keys: Sequence[int]) -> set[int]:
    if not keys:
        return set()
    found = rows(
        connection,
        f"SELECT DISTINCT namespace_id FROM {table} "
        f"WHERE {KEYS[table][0]} IN (SELECT value FROM json_each(?))",
        (orjson.dumps(keys).decode(),),
    )
    return {namespace_id for (namespace_id,) in found}


def drop_rows(connection: apsw.Connection, namespace_id: int) -> None:
    """Remove a namespace and its rows from the tables that hold the truth."""
    rows(
        connection,
        "DELETE FROM vectors WHERE key IN (SELECT key FROM items WHERE namespace_id = ?)",
        (namespace_id,),
    )
    for table in ("items", "documents", "idempotency"):
        rows(connection, f"DELETE FROM {table} WHERE namespace_id = ?", (namespace_id,))
    rows(connection, "DELETE FROM namespaces WHERE id = ?", (namespace_id,))


def _blobs(patch: bytes, start: int, sizes: Sequence[int]) -> Iterator[bytes]:
    for size in sizes:
        yield patch[start : start + size]
        start += size
