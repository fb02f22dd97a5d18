"""Peers on SQLite: sqlite-vec, and the table of float blobs that agent memories keep and read row by row."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentdb_peers.rows import DIMENSION, K, Query, Row, Rows
from agentdb_peers.system import System

_ITEMS = """
CREATE TABLE items (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, metadata TEXT NOT NULL,
    tenth INTEGER NOT NULL, hundredth INTEGER NOT NULL, tenant INTEGER NOT NULL{more}
);
CREATE VIRTUAL TABLE item_text USING fts5(text, content='', contentless_delete=1);
"""


class SqliteSystem(System):
    """A WAL database with `synchronous=FULL` and a full-text table, one transaction a write."""

    durability = "SQLite WAL, synchronous=FULL: on disk (1 sync call each); FTS5 in the same transaction"

    def imports(self) -> None:
        import apsw

        self._apsw = apsw

    def open(self) -> None:
        self._db = self._apsw.Connection(str(self.folder / "rows.db"))
        self._db.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA mmap_size=8589934592")

    def close(self) -> None:
        self._db.close()

    def load(self, rows: Rows) -> None:
        for block in rows.blocks():
            self.upsert(block)

    def upsert(self, rows: Sequence[Row]) -> None:
        with self._db:
            self._add(rows)

    @abstractmethod
    def _add(self, rows: Sequence[Row]) -> None:
        """Store rows, inside a transaction."""

    def _add_text(self, rows: Sequence[Row]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO item_text (rowid, text) VALUES (?, ?)",
            [(row.number, row.text) for row in rows],
        )

    def _items(self, keys: Sequence[int]) -> list[tuple[str, str, Any]]:
        found: list[tuple[str, str, Any]] = []
        for key in keys:
            item_id, text, metadata = self._db.execute(
                "SELECT id, text, metadata FROM items WHERE key = ?", (key,)
            ).fetchone()
            found.append((item_id, text, json.loads(metadata)))
        return found


class SqliteMemory(SqliteSystem):
    """What an agent memory does: read every row, one cosine after the other, keep the best.

    Fair to it: numpy computes each cosine over the blob as it is, without making lists of floats, an index
    serves the filters, and the lengths of rows are known to be 1.
    """

    name = "sqlite memory"
    about = "rows with float32 blobs; each search reads every row and computes its cosine by numpy"

    def create(self) -> None:
        self.open()
        self._db.execute(_ITEMS.format(more=", vector BLOB NOT NULL"))
        for name in ("tenth", "hundredth", "tenant"):
            self._db.execute(f"CREATE INDEX items_by_{name} ON items ({name})")

    def _add(self, rows: Sequence[Row]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    row.number,
                    row.id,
                    row.text,
                    json.dumps(m),
                    m["tenth"],
                    m["hundredth"],
                    m["tenant"],
                    row.vector.tobytes(),
                )
                for row in rows
                if (m := row.metadata)
            ],
        )
        self._add_text(rows)

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        where = "" if query.kind == "all" else f" WHERE {query.kind} = {query.value}"
        vector, frombuffer, dot, float32 = query.vector, np.frombuffer, np.dot, np.float32
        scores = [
            (float(dot(frombuffer(blob, float32), vector)), key)
            for key, blob in self._db.execute(f"SELECT key, vector FROM items{where}")
        ]
        scores.sort(reverse=True)
        return self._items([key for _, key in scores[:K]])


class SqliteVec(SqliteSystem):
    """A `vec0` table: tenants as its partitions, attributes as its metadata columns."""

    name = "sqlite-vec"
    about = (
        "vec0, every row compared (it has no other index), tenant as partition key, attributes as metadata"
    )

    def imports(self) -> None:
        import sqlite_vec

        super().imports()
        self._extension = sqlite_vec.loadable_path()

    def open(self) -> None:
        super().open()
        self._db.enable_load_extension(True)
        self._db.load_extension(self._extension)

    def create(self) -> None:
        self.open()
        self._db.execute(_ITEMS.format(more=""))
        self._db.execute(
            "CREATE VIRTUAL TABLE vectors USING vec0(tenant INTEGER PARTITION KEY, "
            f"vector FLOAT[{DIMENSION}] DISTANCE_METRIC=cosine, tenth INTEGER, hundredth INTEGER)"
        )

    def _add(self, rows: Sequence[Row]) -> None:
        items, vectors = [], []
        for row in rows:
            m = row.metadata
            items.append(
                (row.number, row.id, row.text, json.dumps(m), m["tenth"], m["hundredth"], m["tenant"])
            )
            vectors.append((row.number, m["tenant"], row.vector.tobytes(), m["tenth"], m["hundredth"]))
        self._db.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", items)
        self._db.executemany("DELETE FROM vectors WHERE rowid = ?", [(vector[0],) for vector in vectors])
        self._db.executemany(
            "INSERT INTO vectors (rowid, tenant, vector, tenth, hundredth) VALUES (?, ?, ?, ?, ?)", vectors
        )
        self._add_text(rows)

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        where = "" if query.kind == "all" else f" AND {query.kind} = {query.value}"
        found = self._db.execute(
            f"SELECT rowid FROM vectors WHERE vector MATCH ? AND k = {K}{where} ORDER BY distance",
            (query.vector.tobytes(),),
        )
        return self._items([key for (key,) in found])
