"""Files of other memories, and exports of ours: all that is in them, read before anything is stored.

A file is read as a whole and checked; what is damaged gives nothing. What cannot be taken is counted with the
reason, so that a report can say of every row where it went.
"""

from __future__ import annotations

import gzip
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import orjson
from pydantic import Field, ValidationError

from agentic_flow.core.errors import AgenticFlowError, DataCorrupted, InvalidInput, TooLarge
from agentic_flow.core.messages import Frozen
from agentic_flow.core.vectors import Item
from agentic_flow.memory.bank_rows import item_values
from agentic_flow.memory.foreign_tables import (
    Cells,
    Unusable,
    episode_trajectory,
    pattern_item,
    reasoning_item,
    skill_item,
    task_trajectory,
)
from agentic_flow.memory.records import ITEMS, TRAJECTORIES, MemoryItem, Trajectory

Format = Literal["reasoningbank", "agentdb", "agentdb-json", "export"]

RECORDS_MAX = 100_000
JSON_MAX_BYTES = 512 * 1024 * 1024

_SQLITE_MAGIC = b"SQLite format 3\0"
_GZIP_MAGIC = b"\x1f\x8b"
_BUSY_S = 5.0
_OURS = {ITEMS: "items", TRAJECTORIES: "trajectories"}

# Tables that hold nothing to learn from, and why each stays behind.
_LEFT_OUT = {
    "pattern_embeddings": "vectors of another embedder: texts are embedded anew",
    "episode_embeddings": "vectors of another embedder: texts are embedded anew",
    "skill_embeddings": "vectors of another embedder: texts are embedded anew",
    "note_embeddings": "vectors of another embedder: texts are embedded anew",
    "exp_node_embeddings": "vectors of another embedder: texts are embedded anew",
    "memory_entries": "key-value entries, no strategies",
    "matts_runs": "logs of another program's scaling runs",
    "consolidation_runs": "logs of another program's consolidation",
    "metrics_log": "another program's metrics",
}

R = TypeVar("R")


class LeftOut(Frozen):
    """Rows that were not taken: where they are, how many, and why."""

    where: str
    count: int
    why: str


class MemoryFile(Frozen):
    """What a file holds for us."""

    format: Format
    items: tuple[MemoryItem, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class ImportReport(Frozen):
    """What became of a file. `merged`: said the same as an item that is here; `present`: was here already."""

    format: Format
    items_added: int = 0
    items_merged: int = 0
    items_present: int = 0
    trajectories_added: int = 0
    trajectories_present: int = 0
    left_out: tuple[LeftOut, ...] = Field(default_factory=tuple)


def read_memory_file(path: Path, *, now_s: float) -> MemoryFile:
    """All of a file. Blocking: it belongs into a thread.

    Args:
        path: `.swarm/memory.db`, a database or a JSON export of the npm package agentdb (also gzipped), or an
            export (JSON Lines) of the namespace `memory.items` or `memory.trajectories`.
        now_s: Time of the import, for rows without one.

    Raises:
        PathNotFound: it cannot be read.
        InvalidInput: it is none of these.
        DataCorrupted: it is damaged or cut off.
        TooLarge: it has more than RECORDS_MAX records.
    """
    # The file errors of exports are those of every file.
    from agentic_flow.agentdb.transfer_files import file_errors

    with file_errors(path), path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InvalidInput(f"{str(path)!r} is empty", hint=_KNOWN_HINT)
    if head.startswith(_SQLITE_MAGIC):
        found = _read_database(path, now_s)
    elif head.startswith(_GZIP_MAGIC):
        with file_errors(path):
            found = _read_compressed(path)
    elif head.lstrip().startswith(b"["):
        with file_errors(path):
            found = _read_episodes(_whole(path.open("rb"), path), path)
    else:
        found = _read_export(path)
    count = len(found.items) + len(found.trajectories)
    if count > RECORDS_MAX:
        raise TooLarge(f"{str(path)!r} has {count!r} records, more than {RECORDS_MAX!r}", hint="split it")
    return found


_KNOWN_HINT = (
    "known are .swarm/memory.db, databases and JSON exports of the npm package agentdb, and exports of "
    "memory.items and memory.trajectories (`agentic-flow db export`)"
)


class _Tally:
    """What was left out, by place and reason."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, where: str, why: str, count: int = 1) -> None:
        if count:
            self._counts[where, why] += count

    def entries(self) -> tuple[LeftOut, ...]:
        return tuple(LeftOut(where=w, count=n, why=why) for (w, why), n in sorted(self._counts.items()))


# SQLite files


def _read_database(path: Path, now_s: float) -> MemoryFile:
    try:
        # Never written to; a log beside it that another process still fills is read as of now.
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)
        ) as database:
            database.row_factory = sqlite3.Row
            problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise DataCorrupted(f"{str(path)!r} is damaged: {problem}", hint="restore it from a copy")
            database.execute("BEGIN")
            return _read_tables(database, path, now_s)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise DataCorrupted(
            f"{str(path)!r} cannot be read as a database: {error}",
            hint="it is damaged, or another program holds it: stop that, or copy the file with its -wal",
        ) from None


def _read_tables(database: sqlite3.Connection, path: Path, now_s: float) -> MemoryFile:
    tables = {
        str(row[0])
        for row in database.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
    }
    tally = _Tally()
    items: list[MemoryItem] = []
    trajectories: list[Trajectory] = []
    taken = tables & {"patterns", "task_trajectories", "reasoning_patterns", "skills", "episodes"}
    if not taken:
        raise InvalidInput(f"{str(path)!r} has no table of a memory that is known here", hint=_KNOWN_HINT)
    if "patterns" in taken:
        links = _contradictions(database, tables, tally)
        items += _taken(database, "patterns", lambda row: pattern_item(row, links, now_s), tally)
    if "reasoning_patterns" in taken:
        items += _taken(database, "reasoning_patterns", lambda row: reasoning_item(row, now_s), tally)
    if "skills" in taken:
        items += _taken(database, "skills", lambda row: skill_item(row, now_s), tally)
    if "task_trajectories" in taken:
        trajectories += _taken(database, "task_trajectories", task_trajectory, tally)
    if "episodes" in taken:
        trajectories += _taken(database, "episodes", episode_trajectory, tally)
    for table in sorted(tables - taken - {"pattern_links"}):
        quoted = table.replace('"', '""')
        count = database.execute(f'SELECT count(*) FROM "{quoted}"').fetchone()[0]  # noqa: S608 - quoted
        tally.add(table, _LEFT_OUT.get(table, "a table that memory has no place for"), count)
    known = {item.id for item in items}
    return MemoryFile(
        format="reasoningbank" if taken & {"patterns", "task_trajectories"} else "agentdb",
        items=tuple(
            item.model_copy(update={"contradicts": tuple(one for one in item.contradicts if one in known)})
            for item in items
        ),
        trajectories=tuple(trajectories),
        left_out=tally.entries(),
    )


def _taken(
    database: sqlite3.Connection, table: str, read: Callable[[Cells], R], tally: _Tally
) -> Iterator[R]:
    """The records of a table; rows that cannot become one are counted."""
    for number, row in enumerate(database.execute(f"SELECT * FROM {table}"), start=1):  # noqa: S608 - ours
        if number > RECORDS_MAX:
            raise TooLarge(f"table {table!r} has more than {RECORDS_MAX!r} rows", hint="split it")
        record = _usable(dict(zip(row.keys(), tuple(row), strict=True)), read, table, tally)
        if record is not None:
            yield record


def _usable(row: Cells, read: Callable[[Cells], R], where: str, tally: _Tally) -> R | None:
    try:
        return read(row)
    except Unusable as error:
        tally.add(where, str(error))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        tally.add(where, f"with a {first['loc'][0] if first['loc'] else 'value'} that has no place here")
    return None


def _contradictions(
    database: sqlite3.Connection, tables: set[str], tally: _Tally
) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    if "pattern_links" in tables:
        for source, target, relation in database.execute(
            "SELECT src_id, dst_id, relation FROM pattern_links ORDER BY src_id, dst_id"
        ):
            if relation == "contradicts":
                found.setdefault(str(source), []).append(str(target))
            else:
                tally.add("pattern_links", f"{str(relation)[:40]!r} links: consolidation finds its own")
    return found


# JSON


def _read_compressed(path: Path) -> MemoryFile:
    try:
        with gzip.open(path) as file:
            if file.read(64).lstrip().startswith(b"["):
                return _read_episodes(_whole(cast(Any, gzip.open(path)), path), path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataCorrupted(f"{str(path)!r} is damaged: {error}", hint="copy or export it again") from None
    return _read_export(path)


def _whole(file: Any, path: Path) -> bytes:
    with closing(file):
        content = bytes(file.read(JSON_MAX_BYTES + 1))
    if len(content) > JSON_MAX_BYTES:
        raise TooLarge(
            f"{str(path)!r} is larger than {JSON_MAX_BYTES!r} bytes", hint="import its database instead"
        )
    return content


def _read_episodes(content: bytes, path: Path) -> MemoryFile:
    """`agentdb export`: a JSON list of episodes."""
    try:
        rows = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(f"{str(path)!r} is no whole JSON: {error}", hint="export it again") from None
    tally = _Tally()
    trajectories: list[Trajectory] = []
    for row in cast(list[Any], rows):
        if not isinstance(row, dict):
            tally.add("list", "that are no objects")
            continue
        cells = dict(cast(dict[str, Any], row))
        if cells.pop("embedding", None) is not None:
            tally.add("embedding", _LEFT_OUT["episode_embeddings"])
        found = _usable(cells, episode_trajectory, "episodes", tally)
        if found is not None:
            trajectories.append(found)
    return MemoryFile(format="agentdb-json", trajectories=tuple(trajectories), left_out=tally.entries())


# Exports of ours


def _record_values(row: Item, namespace: str) -> dict[str, Any]:
    if namespace == ITEMS:
        return item_values(row)
    return {**row.metadata, "id": row.id, "task": row.text}


def _read_export(path: Path) -> MemoryFile:
    """An export of `memory.items` or `memory.trajectories`, whose digest must agree."""
    from agentic_flow.agentdb.digests import Digest
    from agentic_flow.agentdb.transfer_files import Columns
    from agentic_flow.agentdb.transfer_lines import LinesReader

    reader = LinesReader(path, Columns())
    try:
        if reader.header is None:
            raise InvalidInput(f"{str(path)!r} is no memory", hint=_KNOWN_HINT)
        namespace = reader.header.namespace.name
        if namespace not in _OURS:
            raise InvalidInput(
                f"{str(path)!r} is an export of the namespace {namespace!r}",
                hint=f"bring it back as it was with `agentic-flow db import {namespace} {path}`",
            )
        digest = Digest()
        rows: list[Item] = []
        for row in reader.rows():
            if row.problem is not None:
                raise DataCorrupted(
                    f"line {row.number!r} of {str(path)!r}: {row.problem.message}", hint="export it again"
                )
            if row.item is not None:
                digest.add_items([row.item], reader.header.namespace.quantization)
                rows.append(row.item)
        if reader.footer is None or reader.footer.digest != digest.hex:
            raise DataCorrupted(f"{str(path)!r} is not whole", hint="export it again")
    finally:
        reader.close()
    kind: Any = MemoryItem if namespace == ITEMS else Trajectory
    try:
        records = tuple(kind.model_validate(_record_values(row, namespace)) for row in rows)
    except (ValidationError, AgenticFlowError) as error:
        raise DataCorrupted(
            f"{str(path)!r} has a row that is no record of memory: {str(error).splitlines()[0]}",
            hint="was it written by a newer version?",
        ) from None
    if namespace == ITEMS:
        return MemoryFile(format="export", items=records)
    return MemoryFile(format="export", trajectories=records)
