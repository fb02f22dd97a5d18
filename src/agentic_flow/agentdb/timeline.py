"""The records of a history one after the other: from the sealed segments, then from what still waits.

Damage and gaps end a timeline: what lies behind them cannot be restored, and is never skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import apsw

from agentic_flow.agentdb.erasure import Mark
from agentic_flow.agentdb.sealing import read_waiting
from agentic_flow.agentdb.segment_files import SegmentFile, list_segments, load_segment
from agentic_flow.agentdb.segments import Kind, Record, Scan
from agentic_flow.core.errors import DataCorrupted, InvalidInput

_SEGMENTS_RETRIED_MAX = 100


@dataclass(frozen=True, slots=True)
class Break:
    """Where a timeline ends before its time: the file and byte, and why."""

    file: Path
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class Point:
    """A moment of a database: its last operation and when that was."""

    sequence: int
    at_s: float


@dataclass(slots=True)
class Survey:
    """What is to be known of a history before anything is restored from it.

    Args:
        target: The last call at or before the moment asked for.
        end: The last call that can be reached.
        newest: The last sequence that is known of, whether it can be reached or not.
        latest_s: The latest time of a call that can be reached.
        erasures: Tenants that were erased after the base, and up to which sequence.
        broken: Why what lies behind `end` cannot be reached; None when nothing does.
    """

    target: Point
    end: Point
    newest: int
    latest_s: float
    erasures: list[tuple[Mark, int]] = field(default_factory=list[tuple[Mark, int]])
    broken: Break | None = None

    def is_erased(self, record: Record) -> bool:
        """Whether the record's tenant was erased later."""
        return any(record.last <= last and mark.is_of(record.tenant) for mark, last in self.erasures)


class Timeline:
    """What a database's history holds behind a base.

    Args:
        database_id: Of the base; segments of another database are refused.
        base: The moment of the base.
        folder: The database's folder of segments, if there is one.
        live: A connection to the database itself for what waits there, inside a transaction.
    """

    def __init__(
        self, database_id: str, base: Point, folder: Path | None, live: apsw.Connection | None
    ) -> None:
        self._database_id = database_id
        self._base = base
        self.folder = folder
        self._live = live

    def survey(self, at: int | float | datetime | None, now_s: float) -> Survey:
        """Read and check all of it.

        Args:
            at: The moment wanted: a sequence (int), a time (Unix seconds as float, or an aware datetime),
                or None for the newest.
            now_s: Times after the last call are known to be unchanged up to now, if `live` is there.

        Raises:
            InvalidInput: there is nothing at that moment; names what there is.
            DataCorrupted: damage or a gap lies before it; names the last sequence that can be restored.
        """
        wanted_s = _seconds(at)
        survey = Survey(
            target=self._base, end=self._base, newest=self._base.sequence, latest_s=self._base.at_s
        )
        for found in self._walk():
            if isinstance(found, Break):
                survey.broken = survey.broken or found
                continue
            survey.newest = max(survey.newest, found.last)
            if found.kind is Kind.ERASURE:
                survey.erasures.append((Mark.read(found.payload), found.last))
            if survey.broken is None:
                survey.end = Point(found.last, found.at_s)
                survey.latest_s = max(survey.latest_s, found.at_s)
                if _reaches(at, wanted_s, found):
                    survey.target = survey.end
        self._demand(at, wanted_s, survey, now_s)
        return survey

    def records(self, survey: Survey) -> Iterator[Record]:
        """The records from the base to the survey's target."""
        for found in self._walk():
            if isinstance(found, Break) or found.last > survey.target.sequence:
                return
            yield found

    def _demand(
        self, at: int | float | datetime | None, wanted_s: float | None, survey: Survey, now_s: float
    ) -> None:
        possible = (
            f"possible are sequences {self._base.sequence} to {survey.end.sequence}, "
            f"times {self._base.at_s} to {survey.latest_s}"
        )
        before = at is not None and (
            at < self._base.sequence if isinstance(at, int) else (wanted_s or 0.0) < self._base.at_s
        )
        if before:
            raise InvalidInput(
                f"the moment {at!r} lies before the backup", hint=f"use an older backup; {possible}"
            )
        if isinstance(at, int):
            after = at > survey.end.sequence
        else:
            after = wanted_s is None or wanted_s > survey.latest_s
        if after and survey.broken is not None:
            broken = survey.broken
            raise DataCorrupted(
                f"{str(broken.file)!r} at byte {broken.offset}: {broken.reason}; "
                f"the last sequence that can be restored is {survey.end.sequence}",
                hint=f"ask for that or an earlier moment; {possible}",
                details={
                    "file": str(broken.file),
                    "offset": broken.offset,
                    "sequence": survey.end.sequence,
                },
            )
        if at is not None and after and not (wanted_s and self._live is not None and wanted_s <= now_s):
            raise InvalidInput(f"the history ends before {at!r}", hint=possible)

    def _walk(self) -> Iterator[Record | Break]:
        """Records behind the base in order. Behind a Break the rest is still read, for the erasures in it."""
        position = self._base.sequence
        if self.folder is not None:
            for file, scan, reason in self._scans():
                if reason is not None:
                    yield Break(file.path, 0, reason)
                for record in scan.records:
                    if record.last <= self._base.sequence:
                        continue
                    if record.first != position + 1:
                        yield Break(file.path, 0, _gap(position, record))
                    position = record.last
                    yield record
                if scan.damage is not None:
                    yield Break(file.path, scan.damage.offset, scan.damage.reason)
                    position = file.last
        if self._live is not None:
            while waiting := read_waiting(self._live, after=position):
                for record in waiting:
                    if record.first != position + 1:
                        yield Break(Path(self._live.filename), 0, _gap(position, record))
                    position = record.last
                    yield record

    def _scans(self) -> Iterator[tuple[SegmentFile, Scan, str | None]]:
        """The segments behind the base, and what is wrong with the place of each, if anything is."""
        assert self.folder is not None
        position, chain = self._base.sequence, None
        retried = 0
        while True:
            file = next((file for file in list_segments(self.folder) if file.last > position), None)
            if file is None:
                return
            try:
                scan = load_segment(file)
            except FileNotFoundError:
                # The last segment was written again, with more in it, between listing and reading.
                retried += 1
                if retried > _SEGMENTS_RETRIED_MAX:
                    raise
                continue
            yield file, scan, self._misplaced(file, scan, chain)
            position, chain = file.last, scan.chain

    def _misplaced(self, file: SegmentFile, scan: Scan, chain: bytes | None) -> str | None:
        header = scan.header
        if header is None:
            return None  # damaged, which is told as such
        if header.database_id != self._database_id:
            return f"it is of database {header.database_id!r}, not {self._database_id!r}"
        if (header.first, header.last) != (file.first, file.last):
            return f"it holds sequences {header.first} to {header.last}, other than its name says"
        if chain is not None and header.previous != chain:
            return "the segment before it is not the one that was sealed before it"
        return None


def _seconds(at: int | float | datetime | None) -> float | None:
    if isinstance(at, datetime):
        if at.tzinfo is None:
            raise InvalidInput(f"{at.isoformat()!r} has no time zone", hint="append Z or an offset")
        # It tells microseconds, the clock more: what happened within that microsecond was not after it.
        return at.timestamp() + 1e-6
    return at if isinstance(at, float) else None


def _reaches(at: int | float | datetime | None, wanted_s: float | None, record: Record) -> bool:
    """Whether the record is at or before the moment. Clocks jump, so later records may be earlier in time."""
    if at is None:
        return True
    if wanted_s is not None:
        return record.at_s <= wanted_s
    return isinstance(at, int) and record.last <= at


def _gap(position: int, record: Record) -> str:
    if record.first > position + 1:
        return f"operations {position + 1} to {record.first - 1} are not in the history"
    return f"operation {record.first} comes after {position}"
