"""Tables of AgentDB. Script i brings a database from version i to i + 1; shipped scripts are never edited.

Full text lives in one FTS5 table per namespace (`fts_N`), made with the namespace: term statistics of one
tenant must not move the scores of another.
"""

from __future__ import annotations

MIGRATIONS = [
    """
    CREATE TABLE namespaces (
        ns INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        dimension INTEGER NOT NULL,
        metric TEXT NOT NULL,
        embedder_id TEXT NOT NULL,
        sequence INTEGER NOT NULL DEFAULT 0,
        UNIQUE (tenant, name)
    );
    CREATE TABLE documents (
        doc INTEGER PRIMARY KEY,
        ns INTEGER NOT NULL REFERENCES namespaces ON DELETE CASCADE,
        path TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        UNIQUE (ns, path)
    );
    CREATE TABLE items (
        item INTEGER PRIMARY KEY AUTOINCREMENT,
        ns INTEGER NOT NULL REFERENCES namespaces ON DELETE CASCADE,
        id TEXT NOT NULL,
        doc INTEGER REFERENCES documents ON DELETE CASCADE,
        text TEXT NOT NULL,
        metadata TEXT NOT NULL,
        vector BLOB NOT NULL,
        version INTEGER NOT NULL,
        created_at_s REAL NOT NULL,
        updated_at_s REAL NOT NULL,
        expires_at_s REAL,
        UNIQUE (ns, id)
    );
    CREATE INDEX items_by_document ON items (doc);
    CREATE TABLE operations (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        ns INTEGER NOT NULL,
        kind TEXT NOT NULL,
        at_s REAL NOT NULL
    );
    CREATE TABLE idempotency (
        tenant TEXT NOT NULL,
        key TEXT NOT NULL,
        request_sha256 TEXT NOT NULL,
        result TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (tenant, key)
    );
    """,
]


def create_full_text(ns: int) -> str:
    """The namespace's full-text table: words of the text, of its symbol and of its path, stemmed."""
    return (
        f"CREATE VIRTUAL TABLE fts_{ns} USING fts5(body, symbol, path, content='', contentless_delete=1, "
        "tokenize='porter unicode61 remove_diacritics 2')"
    )
