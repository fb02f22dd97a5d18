"""How values of items become what PostgreSQL can hold, and back. Pure.

PostgreSQL stores no NUL, orders text by a collation, and its indexes take no long keys. So texts are escaped
in a way that keeps the order of code points, under the collation "C"; and a long id or path is represented in
its index by a prefix and a hash.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from agentic_flow.agentdb.analysis import index_text, query_words
from agentic_flow.agentdb.filters import text_words, unix_s
from agentic_flow.agentdb.records import path_words
from agentic_flow.core.errors import DataCorrupted
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.vectors import Item

KEY_BYTES_MAX = 2000
"""Longest text that stands in an index by itself; a B-tree takes entries of some 2,700 bytes."""
WORD_CHARS_MAX = 256
SYMBOL_WEIGHT = 2
"""A name says more than a line of the body."""

_KEY_PREFIX_CHARS = 450
_EXACT_MAX = 2**53
_ESCAPED = re.compile("\1([\1\2])")


def escape(text: str) -> str:
    """Text without NUL, in the same order: NUL becomes 01 01, and 01 becomes 01 02."""
    if "\0" not in text and "\1" not in text:
        return text
    return text.replace("\1", "\1\2").replace("\0", "\1\1")


def unescape(text: str) -> str:
    """What `escape` was given."""
    if "\1" not in text:
        return text
    return _ESCAPED.sub(lambda pair: "\0" if pair[1] == "\1" else "\1", text)


def index_key(text: str) -> tuple[str, str | None]:
    """What stands for an id or path in its unique index, and the escaped whole when that is not all of it."""
    whole = escape(text)
    encoded = whole.encode()
    if len(encoded) <= KEY_BYTES_MAX:
        return whole, None
    # 01 03 occurs in no escaped text: the key of a long id is never that of a short one.
    return f"{escape(text[:_KEY_PREFIX_CHARS])}\1\3{hashlib.sha256(encoded).hexdigest()}", whole


def fields_json(values: JsonObject) -> str:
    """The metadata as filters see it: scalars by key; of lists and objects only that they are there."""
    return orjson.dumps({escape(key): scalar(value) for key, value in values.items()}).decode()


def derived_json(text: str, values: JsonObject) -> str | None:
    """What filters need of texts beside themselves: folded words where they are not ASCII, and instants."""
    derived: dict[str, Any] = {}
    if not text.isascii():
        derived["text"] = _spaced(text)
    strings = {escape(key): value for key, value in values.items() if isinstance(value, str)}
    if words := {key: _spaced(value) for key, value in strings.items() if not value.isascii()}:
        derived["words"] = words
    if instants := {key: time_s for key, value in strings.items() if (time_s := unix_s(value)) is not None}:
        derived["instants"] = instants
    return orjson.dumps(derived).decode() if derived else None


def _spaced(text: str) -> str:
    return f" {' '.join(dict.fromkeys(text_words(text)))} "


def scalar(value: Any) -> Any:
    """A metadata value or operand whose JSON PostgreSQL compares as Python compares the value."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return []
    if isinstance(value, dict):
        return {}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)  # what filters take it for
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= _EXACT_MAX:
        # Its shortest decimal is another integer than the one it is.
        return orjson.Fragment(str(int(value)))
    return value


def scalar_json(value: Any) -> str:
    """`scalar` as JSON text."""
    return orjson.dumps(scalar(value)).decode()


def fold(word: str) -> str:
    """A word as full text compares it: lower case, without marks, of bounded length."""
    word = word[:WORD_CHARS_MAX].lower()
    if word.isascii():
        return word
    decomposed = unicodedata.normalize("NFKD", word)
    return "".join(char for char in decomposed if not unicodedata.combining(char)) or word


def folded_query(text: str) -> list[str]:
    """The words of a query, as `count_words` counts those of items; stemming is the database's."""
    return list(dict.fromkeys(map(fold, query_words(text))))


def count_words(text: str, metadata: Mapping[str, Any]) -> tuple[str, int]:
    """Weighted counts of an item's words as JSON, and how many words there are."""
    symbol, path = metadata.get("symbol"), metadata.get("path")
    counts: Counter[str] = Counter()
    length = 0
    for source, weight in (
        (index_text(text), 1),
        (index_text(symbol) if isinstance(symbol, str) else "", SYMBOL_WEIGHT),
        (path_words(path) if isinstance(path, str) else "", 1),
    ):
        found = source.split()
        length += len(found)
        for word, count in Counter(map(fold, found)).items():
            counts[word] += weight * count
    return orjson.dumps(counts).decode(), length


class Prepared(NamedTuple):
    """An item checked and encoded, which only has to be stored."""

    item: Item
    id_key: str
    long_id: str | None
    text: str
    metadata: str
    fields: str
    derived: str | None
    words: str
    word_count: int
    vector: NDArray[np.float32]


def prepare(items: Sequence[Item], metadata: Sequence[bytes], vectors: NDArray[np.float32]) -> list[Prepared]:
    """Encode checked items; `vectors` has shape (len(items), dimension)."""
    prepared: list[Prepared] = []
    for item, encoded, vector in zip(items, metadata, vectors, strict=True):
        id_key, long_id = index_key(item.id)
        words, word_count = count_words(item.text, item.metadata)
        values = read_metadata(item.id, encoded.decode())
        prepared.append(
            Prepared(
                item,
                id_key,
                long_id,
                escape(item.text),
                encoded.decode(),
                fields_json(values),
                derived_json(item.text, values),
                words,
                word_count,
                vector,
            )
        )
    return prepared


def read_metadata(item_id: str, metadata: str) -> JsonObject:
    """The metadata of a row.

    Raises:
        DataCorrupted: it is no JSON.
    """
    try:
        return cast(JsonObject, orjson.loads(metadata))
    except orjson.JSONDecodeError as error:
        raise DataCorrupted(
            f"the metadata of item {item_id!r} is broken: {error}", hint="restore the database from a backup"
        ) from error
