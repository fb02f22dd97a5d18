"""The segment format: what was written is read back, and any damage is found where it is."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb import segments
from agentic_flow.agentdb.segments import Kind, Record, encode_segment, erase_records, scan_segment
from agentic_flow.core.errors import Conflict

DATABASE_ID = "0123456789abcdef0123456789abcdef"
PREVIOUS = bytes(range(32))


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """One to six records, each of one to three operations, without gaps."""
    records: list[Record] = []
    sequence = draw(st.integers(0, 2**40))
    for _ in range(draw(st.integers(1, 6))):
        last = sequence + draw(st.integers(1, 3))
        records.append(
            Record(
                kind=draw(st.sampled_from([Kind.PATCH, Kind.ERASURE])),
                first=sequence + 1,
                last=last,
                at_s=draw(st.floats(0, 4e9)),
                tenant=draw(st.text(max_size=12)),
                payload=draw(st.binary(max_size=60)),
            )
        )
        sequence = last
    return records


def bare(records: tuple[Record, ...] | list[Record]) -> list[Record]:
    """The records without the checksums that sealing gave them."""
    return [Record(r.kind, r.first, r.last, r.at_s, r.tenant, r.payload) for r in records]


def ends(data: bytes, count: int) -> list[int]:
    """Where each of the records ends."""
    found, position = [], segments.HEADER_BYTES
    for _ in range(count):
        size: int = struct.unpack_from("<Q", data, position + 26)[0]
        position += segments.RECORD_BYTES + size
        found.append(position)
    return found


@given(histories())
def test_records_come_back(records: list[Record]) -> None:
    """Catches a field that is lost or changed on the way through a file."""
    data = encode_segment(DATABASE_ID, PREVIOUS, records)
    scan = scan_segment(data)
    assert scan.damage is None
    assert bare(scan.records) == records
    assert scan.header == segments.Header(DATABASE_ID, records[0].first, records[-1].last, PREVIOUS)
    ended = segments.read_ends(data[: segments.HEADER_BYTES], data[-segments.FOOTER_BYTES :])
    assert ended == (scan.header, scan.chain)


@given(histories())
def test_truncation_at_every_byte_is_found_and_keeps_what_is_whole(records: list[Record]) -> None:
    """Catches a cut that goes unnoticed, and a record before the cut that is given up."""
    data = encode_segment(DATABASE_ID, PREVIOUS, records)
    borders = ends(data, len(records))
    for size in range(len(data)):
        scan = scan_segment(data[:size])
        assert scan.damage is not None, size
        assert scan.chain is None
        whole = sum(border <= size for border in borders)
        assert bare(scan.records) == records[:whole]
        assert scan.damage.offset <= size


@given(histories(), st.data())
def test_a_flipped_bit_is_found_where_it_is(records: list[Record], data: st.DataObject) -> None:
    """Catches a changed bit that is read as if it were true, or blamed on another record."""
    good = encode_segment(DATABASE_ID, PREVIOUS, records)
    borders = [segments.HEADER_BYTES, *ends(good, len(records)), len(good)]
    for _ in range(40):
        bit = data.draw(st.integers(0, len(good) * 8 - 1))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        scan = scan_segment(bytes(bad))
        assert scan.damage is not None, bit
        place = next(number for number, border in enumerate(borders) if bit // 8 < border)
        assert scan.damage.offset == (0 if place == 0 else borders[place - 1])
        assert bare(scan.records) == records[: max(place - 1, 0)]


@given(histories(), st.binary(min_size=1, max_size=40))
def test_bytes_behind_the_end_are_found(records: list[Record], more: bytes) -> None:
    """Catches a file that something was appended to."""
    scan = scan_segment(encode_segment(DATABASE_ID, PREVIOUS, records) + more)
    assert scan.damage is not None


@given(st.binary(max_size=400))
def test_garbage_is_no_segment(data: bytes) -> None:
    """Catches a crash of the reader on bytes that nobody wrote."""
    assert scan_segment(data).damage is not None


@given(histories(), st.data())
def test_an_erased_record_keeps_its_place_and_the_chain(records: list[Record], data: st.DataObject) -> None:
    """Catches content that is still there, a neighbour that changes, and a broken link to what follows."""
    gone = data.draw(st.sets(st.sampled_from([record.last for record in records])))
    whole = encode_segment(DATABASE_ID, PREVIOUS, records)
    erased = erase_records(whole, sorted(gone))
    scan = scan_segment(erased)
    assert scan.damage is None
    assert scan.chain == scan_segment(whole).chain
    for record, was in zip(scan.records, records, strict=True):
        assert (record.first, record.last, record.at_s) == (was.first, was.last, was.at_s)
        if was.last in gone:
            assert (record.kind, record.tenant, record.payload) == (Kind.ERASED, "", b"")
        else:
            assert record.same_call(was)
    assert len(whole) - len(erased) == sum(
        18 + len(record.tenant.encode()) + len(record.payload) for record in records if record.last in gone
    )


def test_a_record_erased_before_it_was_sealed_and_sealed_again_keeps_its_hash() -> None:
    """Catches a tombstone whose hash changes when its segment is written again with more in it."""
    record = Record(Kind.PATCH, 1, 1, 1.0, "acme", b"secret").erased()
    first = scan_segment(encode_segment(DATABASE_ID, PREVIOUS, [record]))
    again = scan_segment(encode_segment(DATABASE_ID, PREVIOUS, first.records))
    assert first.damage is None
    assert again.records == first.records


def test_a_newer_version_is_refused_and_not_called_damaged() -> None:
    """Catches a program that reads a format it does not know, or tells its owner that the file is broken."""
    data = bytearray(encode_segment(DATABASE_ID, PREVIOUS, [Record(Kind.PATCH, 1, 1, 1.0, "a", b"x")]))
    struct.pack_into("<I", data, 8, segments.VERSION + 1)
    size = segments.HEADER_BYTES - 4
    struct.pack_into("<I", data, size, zlib.crc32(bytes(data[:size])))
    with pytest.raises(Conflict, match="format version"):
        scan_segment(bytes(data))


def test_equal_content_does_not_give_equal_hashes() -> None:
    """Catches a body hash without salt, by which the content of an erased record could be guessed."""
    record = Record(Kind.PATCH, 1, 1, 1.0, "acme", b"yes")
    hashes = {
        scan_segment(encode_segment(DATABASE_ID, PREVIOUS, [record])).records[0].body_sha256 for _ in range(5)
    }
    assert len(hashes) == 5
