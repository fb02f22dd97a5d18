"""Tables of an AgentDB file, its limits, and the full-text tables that each namespace has of its own.

Word statistics (and so scores) must not depend on another tenant's rows; hence one pair of full-text tables
per namespace instead of one for all. They are contentless: the text itself is in `items`.
"""

from __future__ import annotations

import apsw

from agentic_flow.core.db import rows

MIGRATIONS = (
    """
    CREATE TABLE namespaces (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        dimension INTEGER NOT NULL,
        metric TEXT NOT NULL,
        embedder_id TEXT NOT NULL,
        vector_format TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        UNIQUE (tenant, name)
    ) STRICT;

    CREATE TABLE documents (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace_id INTEGER NOT NULL REFERENCES namespaces (id),
        path TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        updated_at_s REAL NOT NULL,
        UNIQUE (namespace_id, path)
    ) STRICT;

    -- Small columns first: what filters and joins read must not drag overflow pages along.
    CREATE TABLE items (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace_id INTEGER NOT NULL REFERENCES namespaces (id),
        document_id INTEGER REFERENCES documents (id),
        id TEXT NOT NULL,
        version INTEGER NOT NULL,
        created_at_s REAL NOT NULL,
        updated_at_s REAL NOT NULL,
        expires_at_s REAL,
        metadata TEXT NOT NULL,
        text TEXT NOT NULL,
        vector BLOB NOT NULL,
        UNIQUE (namespace_id, id)
    ) STRICT;
    CREATE INDEX items_by_document ON items (document_id) WHERE document_id IS NOT NULL;
    CREATE INDEX items_by_expiry ON items (namespace_id, expires_at_s) WHERE expires_at_s IS NOT NULL;

    -- What changed, in the transaction that changed it. Derived indexes name the last sequence they include.
    CREATE TABLE operations (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace_id INTEGER NOT NULL,
        kind TEXT NOT NULL,
        item_key INTEGER NOT NULL,
        at_s REAL NOT NULL
    ) STRICT;
    CREATE INDEX operations_by_namespace ON operations (namespace_id, sequence);

    CREATE TABLE idempotency (
        namespace_id INTEGER NOT NULL,
        key TEXT NOT NULL,
        request_sha256 TEXT NOT NULL,
        response TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (namespace_id, key)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE about (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- Which database a backup, a sealed log or an index file belongs to.
    INSERT INTO about (name, value) VALUES ('database_id', lower(hex(randomblob(16))));

    ALTER TABLE namespaces RENAME COLUMN vector_format TO quantization;
    ALTER TABLE namespaces ADD COLUMN callers_vectors INTEGER NOT NULL DEFAULT 0;
    UPDATE namespaces SET callers_vectors = 1 WHERE embedder_id = 'caller';

    -- Vectors apart from texts: what is compared lies close together, and filters never read past it.
    CREATE TABLE vectors (
        key INTEGER PRIMARY KEY,
        vector BLOB NOT NULL
    ) STRICT;
    INSERT INTO vectors (key, vector) SELECT key, vector FROM items;

    CREATE TABLE moved_items (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace_id INTEGER NOT NULL REFERENCES namespaces (id),
        document_id INTEGER REFERENCES documents (id),
        id TEXT NOT NULL,
        version INTEGER NOT NULL,
        created_at_s REAL NOT NULL,
        updated_at_s REAL NOT NULL,
        expires_at_s REAL,
        valid_from_s REAL,
        valid_until_s REAL,
        metadata TEXT NOT NULL,
        text TEXT NOT NULL,
        UNIQUE (namespace_id, id)
    ) STRICT;
    INSERT INTO moved_items (key, namespace_id, document_id, id, version, created_at_s, updated_at_s,
        expires_at_s, metadata, text)
        SELECT key, namespace_id, document_id, id, version, created_at_s, updated_at_s, expires_at_s,
        metadata, text FROM items;
    UPDATE sqlite_sequence SET seq = (SELECT seq FROM sqlite_sequence WHERE name = 'items')
        WHERE name = 'moved_items';
    DROP TABLE items;
    ALTER TABLE moved_items RENAME TO items;
    CREATE INDEX items_by_document ON items (document_id) WHERE document_id IS NOT NULL;
    CREATE INDEX items_by_expiry ON items (namespace_id, expires_at_s) WHERE expires_at_s IS NOT NULL;
    CREATE INDEX items_by_validity ON items (namespace_id)
        WHERE valid_from_s IS NOT NULL OR valid_until_s IS NOT NULL;

    -- One row a call instead of one an item: `keys` are little-endian int64. Index files written before know
    -- other sequences; there are none yet, so the old rows can go, but their numbers are not given out again.
    CREATE TABLE calls (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace_id INTEGER NOT NULL,
        kind TEXT NOT NULL,
        keys BLOB NOT NULL,
        at_s REAL NOT NULL
    ) STRICT;
    INSERT INTO calls (sequence, namespace_id, kind, keys, at_s)
        SELECT coalesce(max(sequence), 0) + 1, 0, 'migrate', x'', 0 FROM operations;
    DROP TABLE operations;
    ALTER TABLE calls RENAME TO operations;
    CREATE INDEX operations_by_namespace ON operations (namespace_id, sequence);

    -- The history that waits to be sealed: what each call changed, as an SQLite patchset.
    CREATE TABLE changes (
        sequence INTEGER PRIMARY KEY,
        tenant TEXT NOT NULL,
        at_s REAL NOT NULL,
        patch BLOB NOT NULL
    ) STRICT;
    """,
)

KIB, MIB = 1024, 1024 * 1024

ITEMS_PER_CALL_MAX = 10_000
IDS_PER_CALL_MAX = 50_000
DOCUMENTS_PER_CALL_MAX = 1000
CHUNKS_PER_DOCUMENT_MAX = 100_000
TEXT_MAX_BYTES = MIB
METADATA_MAX_BYTES = MIB
DIMENSION_MAX = 16_384
VECTOR_ABS_MAX = 1e15
"""Largest value of a vector: the sum of DIMENSION_MAX squared differences is still finite in float32."""
DIRECTION_ABS_MIN = 1e-15
"""Least largest value of a vector under cosine: its square is still no zero in float32."""
HALF_ABS_MAX = 65_504.0
"""Largest value of float16."""
PAGE_ITEMS_MAX = 1000
KEY_CHARS_MAX = 256
TENANT_CHARS_MAX = 128
QUERY_CHARS_MAX = 20_000
IDEMPOTENCY_KEPT_S = 24 * 3600.0
OPERATIONS_KEPT = 200_000
PURGED_AT_ONCE = 1000
REBUILT_AT_ONCE = 1000

# Weights of the columns: a name says more than a line of the body.
ITEM_WEIGHTS = (2.0, 1.0, 1.0)
DOCUMENT_WEIGHTS = (1.0, 1.0)


def item_table(namespace_id: int) -> str:
    """Full-text table of the namespace's items; its rowid is `items.key`."""
    return f"item_text_{namespace_id:d}"


def document_table(namespace_id: int) -> str:
    """Full-text table of the namespace's documents; its rowid is `documents.id`."""
    return f"document_text_{namespace_id:d}"


def create_text_tables(connection: apsw.Connection, namespace_id: int) -> None:
    """Make both full-text tables of a new namespace."""
    options = "tokenize='porter unicode61', content='', contentless_delete=1"
    rows(
        connection,
        f"CREATE VIRTUAL TABLE {item_table(namespace_id)} USING fts5(symbol, path, text, {options})",
    )
    rows(
        connection,
        f"CREATE VIRTUAL TABLE {document_table(namespace_id)} USING fts5(path, text, {options})",
    )


def drop_text_tables(connection: apsw.Connection, namespace_id: int) -> None:
    """Remove both."""
    rows(connection, f"DROP TABLE {item_table(namespace_id)}")
    rows(connection, f"DROP TABLE {document_table(namespace_id)}")
