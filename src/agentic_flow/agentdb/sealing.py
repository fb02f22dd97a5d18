"""Moving the changes that wait in the database into sealed segments.

A segment is durable before its rows leave the database. So a crash at any point leaves the changes in the
file, in the database or in both, and what is in both is recognized by its sequence and not sealed again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import apsw
import structlog

from agentic_flow.agentdb import segments
from agentic_flow.agentdb.erasure import Mark, erase_sealed
from agentic_flow.agentdb.segment_files import (
    SegmentFile,
    list_segments,
    locked,
    remove_leftovers,
    whole_segment,
    write_segment,
)
from agentic_flow.agentdb.segments import Kind, Record
from agentic_flow.core.db import rows
from agentic_flow.core.errors import DataCorrupted

_log = structlog.get_logger(__name__)

T = TypeVar("T")

SEGMENT_MAX_BYTES = 16 * 1024 * 1024
"""A segment takes no further record past it; one record may be larger."""
MERGED_MAX_BYTES = 1024 * 1024
"""While the last segment is smaller, it is written again with what is new: files do not become many."""
SEALED = "history_sealed_sequence"
"""Row of `about`: the last sequence that was sealed and removed from the database."""

_WAITING = struct.Struct("<BQ")


class Transaction(Protocol):
    """Runs a job in a transaction: reading sees one snapshot, writing is durable when it returns."""

    def __call__(self, job: Callable[[apsw.Connection], T]) -> T: ...


def pack_waiting(kind: Kind, first: int, payload: bytes) -> bytes:
    """`changes.patch` of a record that waits to be sealed."""
    return _WAITING.pack(kind, first) + payload


def read_waiting(
    connection: apsw.Connection, after: int = 0, max_bytes: int = SEGMENT_MAX_BYTES
) -> list[Record]:
    """Records behind the sequence `after` that wait in the database, in order; at least one if there is any.

    Raises:
        DataCorrupted: one cannot be read.
    """
    found: list[Record] = []
    size = 0
    cursor = cast(Any, connection).execute(
        "SELECT sequence, tenant, at_s, patch FROM changes WHERE sequence > ? ORDER BY sequence", (after,)
    )
    for sequence, tenant, at_s, patch in cursor:
        try:
            kind, first = _WAITING.unpack_from(patch)
            found.append(Record(Kind(kind), first, sequence, at_s, tenant, patch[_WAITING.size :]))
        except (struct.error, ValueError) as error:
            raise DataCorrupted(
                f"the change at sequence {sequence!r} cannot be read: {error}", hint="restore from a backup"
            ) from error
        size += len(patch)
        if size >= max_bytes:
            break
    return found


def waiting_bytes(connection: apsw.Connection) -> int:
    """Size of all changes that wait in the database."""
    return rows(connection, "SELECT coalesce(sum(octet_length(patch)), 0) FROM changes")[0][0]


class Sealer:
    """Moves the waiting changes of one database into the segments of its folder.

    Args:
        folder: `history_dir/<database id>`; it must exist.
        database_id: As `about` has it.
        read: Reads the database.
        write: Writes it. None: what is sealed stays in the database until somebody who writes it seals next.
    """

    def __init__(
        self,
        folder: Path,
        database_id: str,
        read: Transaction,
        write: Transaction | None,
        *,
        segment_max_bytes: int = SEGMENT_MAX_BYTES,
    ) -> None:
        self.folder = folder
        self._database_id = database_id
        self._read = read
        self._write = write
        self._segment_max_bytes = segment_max_bytes

    def seal(self, *, wait_s: float) -> int:
        """Seal everything that waits now. Returns the last sealed sequence, 0 when there is none.

        Raises:
            OSError: the folder cannot be written; BlockingIOError: another process writes it.
            Unavailable: the database cannot be written.
            DataCorrupted: the last segment is damaged, or is not of this database.
        """
        with locked(self.folder, wait_s):
            remove_leftovers(self.folder)
            # Others go on writing: without this mark the end would run away.
            goal = self._read(
                lambda connection: rows(connection, "SELECT coalesce(max(sequence), 0) FROM changes")
            )[0][0]
            tail = self._tail()
            if tail is not None:
                self._forget_sealed(tail)
            while (0 if tail is None else tail.last) < goal:
                tail = self._seal_next(tail)
            return 0 if tail is None else tail.last

    def _seal_next(self, tail: SegmentFile | None) -> SegmentFile:
        records = self._waiting(0 if tail is None else tail.last)
        for record in records:
            if record.kind is Kind.ERASURE:
                erase_sealed(self.folder, Mark.read(record.payload), record.last)
        tail = self._append(tail, records)
        self._forget(tail.last)
        return tail

    def _forget_sealed(self, tail: SegmentFile) -> None:
        """Remove from the database what a crash, or one who only reads it, left there after sealing it."""
        after = 0
        while records := [one for one in self._waiting(after) if one.last <= tail.last]:
            self._demand_sealed(records)
            after = records[-1].last
            self._forget(after)

    def _waiting(self, after: int) -> list[Record]:
        return self._read(lambda connection: read_waiting(connection, after, self._segment_max_bytes))

    def _tail(self) -> SegmentFile | None:
        """The last segment.

        Raises:
            DataCorrupted: segments that were sealed after it are gone.
        """
        files = list_segments(self.folder)
        found = self._read(
            lambda connection: rows(connection, "SELECT value FROM about WHERE name = ?", (SEALED,))
        )
        sealed = int(found[0][0]) if found else 0
        if files and files[-1].last < sealed:
            raise DataCorrupted(
                f"{str(self.folder)!r} ends at sequence {files[-1].last!r}, but {sealed!r} was sealed there",
                hint="bring the missing segments back, or move the folder away and make a new backup",
            )
        if not files and sealed:
            _log.warning("history_began_anew", folder=str(self.folder), sealed_before=sealed)
        return files[-1] if files else None

    def _append(self, tail: SegmentFile | None, records: list[Record]) -> SegmentFile:
        """Write a segment with these records after `tail`, or one that takes its place."""
        if tail is None:
            return self._write_segment(segments.NO_SEGMENT, records)
        if records[0].first != tail.last + 1:
            _log.warning(
                "history_gap_found", folder=str(self.folder), sealed=tail.last, next=records[0].first
            )
        if tail.path.stat().st_size < min(MERGED_MAX_BYTES, self._segment_max_bytes):
            scan = whole_segment(tail)
            assert scan.header is not None
            longer = self._write_segment(scan.header.previous, [*scan.records, *records])
            tail.path.unlink()
            return longer
        with tail.path.open("rb") as file:
            head = file.read(segments.HEADER_BYTES)
            file.seek(-segments.FOOTER_BYTES, os.SEEK_END)
            ends = segments.read_ends(head, file.read())
        if ends is None:
            whole_segment(tail)
            raise DataCorrupted(f"{str(tail.path)!r} changed while it was read", hint="try again")
        return self._write_segment(ends[1], records)

    def _write_segment(self, previous: bytes, records: Sequence[Record]) -> SegmentFile:
        data = segments.encode_segment(self._database_id, previous, records)
        return write_segment(self.folder, data, records[0].first, records[-1].last)

    def _demand_sealed(self, records: Sequence[Record]) -> None:
        """Raise DataCorrupted unless the segments hold these records: only then may they be forgotten."""
        wanted = {record.last: record for record in records}
        for file in list_segments(self.folder):
            if file.last < records[0].last or file.first > records[-1].last:
                continue
            for record in whole_segment(file).records:
                waiting = wanted.get(record.last)
                # One that was erased in the database meanwhile is erased here by the erasure that follows.
                if waiting is not None and (waiting.kind is Kind.ERASED or waiting.same_call(record)):
                    del wanted[record.last]
        if wanted:
            raise DataCorrupted(
                f"{str(self.folder)!r} holds other changes for sequence {min(wanted)!r} than this database",
                hint="this database is a copy of another; `restore` gives copies an id of their own",
            )

    def _forget(self, last: int) -> None:
        if self._write is None:
            return

        def job(connection: apsw.Connection) -> None:
            rows(connection, "DELETE FROM changes WHERE sequence <= ?", (last,))
            rows(
                connection,
                "INSERT INTO about (name, value) VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (SEALED, str(last)),
            )

        self._write(job)
