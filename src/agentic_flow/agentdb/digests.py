"""Digests of what a namespace holds: equal exactly when every row is, whatever the order it is read in.

An item counts with its id, text, metadata, vector as stored, version, times, validity and document; a
document with its path and fingerprint. Each gets a SHA-256; a set of them is their sum modulo 2^256, which
protects against accidents of every kind, not against somebody who searches for another set of that sum.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

import numpy as np
import orjson

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.vectors import Fingerprint, Item, Quantization, Vector

_MODULUS = 1 << 256
_NUMBERS = struct.Struct("<qdd3?3d")


def item_digest(item: Item, quantization: Quantization) -> bytes:
    """SHA-256 over everything an item is; vectors in the precision in which their namespace keeps them.

    Raises:
        InvalidInput: its metadata have no JSON form.
    """
    times = (item.expires_at_s, item.valid_from_s, item.valid_until_s)
    digest = hashlib.sha256(
        _NUMBERS.pack(
            item.version,
            item.created_at_s,
            item.updated_at_s,
            *(at_s is not None for at_s in times),
            *(at_s or 0.0 for at_s in times),
        )
    )
    try:
        metadata = orjson.dumps(item.metadata, option=orjson.OPT_SORT_KEYS)
        texts = (item.id.encode(), item.text.encode(), metadata, (item.document or "").encode())
    except (orjson.JSONEncodeError, UnicodeEncodeError) as error:
        raise InvalidInput(
            f"item {item.id!r} cannot be stored: {error}", hint="use Unicode text and JSON values"
        ) from None
    for part in (*texts, stored_vector(item.vector, quantization)):
        # With its length before it, so that no two items share one string of bytes.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(b"\1" if item.document is not None else b"\0")
    return digest.digest()


def stored_vector(vector: Vector | None, quantization: Quantization) -> bytes:
    """The bytes that a namespace of this quantization keeps of a vector that it gave out."""
    if vector is None:
        return b""
    if quantization == "f32":
        return vector.data
    # What does not fit becomes infinite, and differs then from all that a store holds.
    with np.errstate(over="ignore"):
        return np.frombuffer(vector.data, "<f4").astype("<f2").tobytes()


def document_digest(path: str, mark: Fingerprint) -> bytes:
    """SHA-256 of a document: its path and its fingerprint."""
    return hashlib.sha256(
        orjson.dumps([path, mark.sha256, str(mark.size_bytes), str(mark.mtime_ns)])
    ).digest()


class Digest:
    """The sum of the digests of some rows, and how many they were."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0

    def add(self, digest: bytes) -> None:
        """Take in one more row."""
        self.count += 1
        self._sum = (self._sum + int.from_bytes(digest, "little")) % _MODULUS

    def add_items(self, items: Iterable[Item], quantization: Quantization) -> None:
        """Take in items."""
        for item in items:
            self.add(item_digest(item, quantization))

    def add_documents(self, documents: Mapping[str, Fingerprint]) -> None:
        """Take in documents."""
        for path, mark in documents.items():
            self.add(document_digest(path, mark))

    @property
    def hex(self) -> str:
        """64 hexadecimal digits; those of nothing are all 0."""
        return self._sum.to_bytes(32, "big").hex()
