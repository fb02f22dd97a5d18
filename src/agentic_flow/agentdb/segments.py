"""The file format of the sealed history: pure functions between records and bytes.

    header  magic · version · database id · first, last sequence · chain hash of the segment before · CRC-32
    record  'R' · kind · first, last sequence · time · size and SHA-256 of the body · CRC-32 · body
    footer  'F' · number of records · chain hash · CRC-32

All numbers are little-endian. A body is 16 random bytes, the tenant and the payload. Every byte is covered
by a check, so damage is found where it is, and what lies before it is still good.

The chain hash is the SHA-256 of the header and of every record's numbers and body hash, not of the bodies
themselves. So a body can be erased (its record stays, as ERASED, with the hash of what it held) while every
later segment's link to this one remains true. The random bytes keep that hash from confirming a guess.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from agentic_flow.core.errors import Conflict

VERSION = 1
NO_SEGMENT = bytes(32)
"""What the first segment of a chain names as the one before."""

_MAGIC = b"AFHIST\r\n"
_HEADER = struct.Struct("<8sI16sQQ32s")
_RECORD = struct.Struct("<cBQQdQ32s")
_FOOTER = struct.Struct("<cQ32s")
_LINK = struct.Struct("<QQd32s")
_CRC = struct.Struct("<I")
_TENANT = struct.Struct("<H")
_SALT_BYTES = 16
HEADER_BYTES = _HEADER.size + _CRC.size
RECORD_BYTES = _RECORD.size + _CRC.size
"""What a record takes beside its body."""
FOOTER_BYTES = _FOOTER.size + _CRC.size


class Kind(IntEnum):
    """What a record is."""

    PATCH = 1
    """Rows that one call changed."""
    ERASURE = 2
    """A tenant was erased at this sequence; the payload names it by a salted hash."""
    ERASED = 3
    """The call of an erased tenant: nothing but its place is left."""


@dataclass(frozen=True, slots=True)
class Record:
    """One call: operations `first` to `last`, which were committed together.

    Args:
        at_s: Unix seconds of the call.
        body_sha256: Of the sealed body; empty for a record that was never sealed.
    """

    kind: Kind
    first: int
    last: int
    at_s: float
    tenant: str
    payload: bytes
    body_sha256: bytes = b""

    def erased(self) -> Record:
        """What is left of it when its tenant is erased."""
        return replace(self, kind=Kind.ERASED, tenant="", payload=b"")

    def same_call(self, other: Record) -> bool:
        """Whether both are the same call, sealed or not."""
        return replace(self, body_sha256=b"") == replace(other, body_sha256=b"")


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment is of. `previous` is the chain hash of the segment before."""

    database_id: str
    first: int
    last: int
    previous: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a segment, and at which byte of it."""

    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What bytes hold as a segment: everything when `damage` is None, else the longest good beginning.

    Args:
        chain: The segment's own chain hash; None when it is damaged.
    """

    header: Header | None
    records: tuple[Record, ...]
    chain: bytes | None
    damage: Damage | None


class _Chain:
    """The chain hash of a segment, record by record."""

    def __init__(self, header: bytes) -> None:
        self._hash = hashlib.sha256(header)

    def add(self, first: int, last: int, at_s: float, body_sha256: bytes) -> None:
        self._hash.update(_LINK.pack(first, last, at_s, body_sha256))

    def closed(self, count: int) -> bytes:
        """The hash once all `count` records are in."""
        whole = self._hash.copy()
        whole.update(count.to_bytes(8, "little"))
        return whole.digest()


def encode_segment(database_id: str, previous: bytes, records: Sequence[Record]) -> bytes:
    """A segment of at least one record, in order of their sequences.

    Args:
        database_id: 32 hexadecimal digits.
        previous: Chain hash of the segment before, or NO_SEGMENT.
        records: Those that were sealed before keep their body hash only if they are ERASED.
    """
    header = _checked(
        _HEADER.pack(
            _MAGIC, VERSION, bytes.fromhex(database_id), records[0].first, records[-1].last, previous
        )
    )
    chain = _Chain(header)
    parts = [header]
    for record in records:
        parts += _encode_record(record, chain)
    footer = _FOOTER.pack(b"F", len(records), chain.closed(len(records)))
    return b"".join((*parts, _checked(footer)))


def erase_records(data: bytes, erased: Sequence[int]) -> bytes:
    """A whole segment again, without the bodies of the records that end at these sequences.

    Its chain hash remains what it was.
    """
    wanted = frozenset(erased)
    parts = [data[:HEADER_BYTES]]
    position = HEADER_BYTES
    while data[position : position + 1] == b"R":
        mark, _, first, last, at_s, size, digest = _RECORD.unpack_from(data, position)
        end = position + RECORD_BYTES + size
        if last in wanted:
            parts.append(_checked(_RECORD.pack(mark, Kind.ERASED, first, last, at_s, 0, digest)))
        else:
            parts.append(data[position:end])
        position = end
    parts.append(data[position:])
    return b"".join(parts)


def scan_segment(data: bytes) -> Scan:
    """Read a segment and check every byte of it.

    Raises:
        Conflict: it is whole, but of a newer version of the format.
    """
    if not _is_checked(data, 0, _HEADER.size):
        return Scan(None, (), None, Damage(0, "the header is damaged or cut off"))
    magic, version, database_id, first, last, previous = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return Scan(None, (), None, Damage(0, "this is no history segment"))
    if version > VERSION:
        raise Conflict(
            f"the segment has format version {version!r}, this program knows {VERSION!r}",
            hint="use the version of agentic-flow that wrote it, or a newer one",
        )
    header = Header(database_id.hex(), first, last, previous)
    chain = _Chain(data[:HEADER_BYTES])
    records: list[Record] = []
    position = HEADER_BYTES
    while data[position : position + 1] == b"R":
        found = _decode_record(data, position, chain)
        if isinstance(found, str):
            return Scan(header, tuple(records), None, Damage(position, found))
        record, position = found
        records.append(record)
    reason = _footer_damage(data, position, records, header, chain)
    if reason is not None:
        return Scan(header, tuple(records), None, Damage(position, reason))
    return Scan(header, tuple(records), chain.closed(len(records)), None)


def read_ends(head: bytes, tail: bytes) -> tuple[Header, bytes] | None:
    """Header and chain hash of a segment from its first HEADER_BYTES and last FOOTER_BYTES alone; None when
    either is damaged. What lies between is not checked."""
    if not _is_checked(head, 0, _HEADER.size) or not _is_checked(tail, 0, _FOOTER.size):
        return None
    magic, version, database_id, first, last, previous = _HEADER.unpack_from(head)
    mark, _, chain = _FOOTER.unpack_from(tail)
    if magic != _MAGIC or mark != b"F" or version > VERSION:
        return None
    return Header(database_id.hex(), first, last, previous), chain


def _encode_record(record: Record, chain: _Chain) -> tuple[bytes, ...]:
    if record.kind is Kind.ERASED:
        # One that was never sealed has no hash to keep; random bytes stand for a body that nobody knows.
        body, digest = b"", record.body_sha256 or os.urandom(32)
    else:
        tenant = record.tenant.encode()
        body = b"".join((os.urandom(_SALT_BYTES), _TENANT.pack(len(tenant)), tenant, record.payload))
        digest = hashlib.sha256(body).digest()
    head = _RECORD.pack(b"R", record.kind, record.first, record.last, record.at_s, len(body), digest)
    chain.add(record.first, record.last, record.at_s, digest)
    return _checked(head), body


def _decode_record(data: bytes, position: int, chain: _Chain) -> tuple[Record, int] | str:
    """The record at `position` and where it ends; or what is wrong with it."""
    if not _is_checked(data, position, _RECORD.size):
        return "the head of the record is damaged or cut off"
    _, kind, first, last, at_s, size, digest = _RECORD.unpack_from(data, position)
    start = position + RECORD_BYTES
    body = data[start : start + size]
    if len(body) != size:
        return f"the record is cut off: {len(body)} of {size} bytes"
    try:
        known = Kind(kind)
    except ValueError:
        return f"the record is of the unknown kind {kind!r}"
    tenant, payload = "", b""
    if known is Kind.ERASED:
        if size:
            return "an erased record has content"
    else:
        if hashlib.sha256(body).digest() != digest:
            return "the content of the record does not match its checksum"
        payload_at = _SALT_BYTES + _TENANT.size + _TENANT.unpack_from(body, _SALT_BYTES)[0]
        tenant = body[_SALT_BYTES + _TENANT.size : payload_at].decode()
        payload = body[payload_at:]
    chain.add(first, last, at_s, digest)
    return Record(known, first, last, at_s, tenant, payload, digest), start + size


def _footer_damage(
    data: bytes,
    position: int,
    records: Sequence[Record],
    header: Header,
    chain: _Chain,
) -> str | None:
    """What is wrong with the end of a segment whose records are good."""
    if not _is_checked(data, position, _FOOTER.size):
        return "the next record or the end of the segment is damaged or cut off"
    mark, count, stated = _FOOTER.unpack_from(data, position)
    if mark != b"F" or position + FOOTER_BYTES != len(data):
        return "there are bytes that belong to no record"
    if count != len(records) or stated != chain.closed(count):
        return "the records are not those that were sealed"
    if not records or (records[0].first, records[-1].last) != (header.first, header.last):
        return "the records are not of the sequences that the header names"
    return None


def _checked(data: bytes) -> bytes:
    return data + _CRC.pack(zlib.crc32(data))


def _is_checked(data: bytes, position: int, size: int) -> bool:
    """Whether `size` bytes and their CRC-32 are there and agree."""
    if len(data) < position + size + _CRC.size:
        return False
    return _CRC.unpack_from(data, position + size)[0] == zlib.crc32(data[position : position + size])
