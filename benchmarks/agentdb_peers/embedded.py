"""Vector databases that run inside the process: qdrant-edge, zvec, LanceDB and chroma.

Graphs have M = 16 and a construction beam of 100; search beams are what gave a recall of about .99
on these rows, so that CPU times can be compared; where a default is kept, it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from agentdb_peers.rows import DIMENSION, TENANT, K, Kind, Query, Row, Rows, value_of
from agentdb_peers.system import System, folder_bytes

ATTRIBUTES: tuple[Kind, ...] = ("tenth", "hundredth", "tenant")


class QdrantEdge(System):
    """Payload indexes on every attribute; the tenant's is marked as such."""

    name = "qdrant-edge"
    about = (
        "HNSW m 16, ef_construct 100, hnsw_ef 20, one segment, payload indexes (the tenant's: is_tenant), "
        "text index"
    )
    durability = "flush() after each write: on disk (some 54 sync calls each)"
    ef = 20

    def imports(self) -> None:
        import qdrant_edge

        self._lib = qdrant_edge

    def create(self) -> None:
        lib = self._lib
        hnsw = lib.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10_000, max_indexing_threads=1)
        config = lib.EdgeConfig(
            vectors=lib.EdgeVectorParams(size=DIMENSION, distance=lib.Distance.Cosine, hnsw_config=hnsw),
            hnsw_config=hnsw,
            optimizers=lib.EdgeOptimizersConfig(default_segment_number=1),
            max_search_threads=1,
        )
        self._shard = lib.EdgeShard.create(str(self.folder), config)
        operation = lib.UpdateOperation.create_field_index
        for name in ("tenth", "hundredth"):
            self._shard.update(operation(name, lib.IntegerIndexParams(lookup=True, range=False)))
        self._shard.update(operation("tenant", lib.KeywordIndexParams(is_tenant=True)))
        self._shard.update(operation("text", lib.TextIndexParams(lowercase=True)))
        self._shard.flush()

    def open(self) -> None:
        self._shard = self._lib.EdgeShard.load(str(self.folder))

    def close(self) -> None:
        self._shard.close()

    def _add(self, rows: Sequence[Row]) -> None:
        point = self._lib.Point
        points = [
            point(
                row.number,
                row.vector.tolist(),
                {**row.metadata, "tenant": str(row.metadata["tenant"]), "id": row.id, "text": row.text},
            )
            for row in rows
        ]
        self._shard.update(self._lib.UpdateOperation.upsert_points(points))

    def load(self, rows: Rows) -> None:
        for block in rows.blocks():
            self._add(block)
        self._shard.flush()

    def build(self) -> None:
        self._shard.optimize()
        self._shard.flush()

    def upsert(self, rows: Sequence[Row]) -> None:
        self._add(rows)
        self._shard.flush()

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        lib = self._lib
        where = None
        if query.kind != "all":
            value = str(query.value) if query.kind == "tenant" else query.value
            where = lib.Filter(must=[lib.FieldCondition(key=query.kind, match=lib.MatchValue(value))])
        found = self._shard.query(
            lib.QueryRequest(
                limit=K,
                query=lib.Query.Nearest(query.vector.tolist()),
                filter=where,
                with_payload=True,
                with_vector=False,
                params=lib.SearchParams(hnsw_ef=self.ef),
            )
        )
        return [(point.payload["id"], point.payload["text"], point.payload) for point in found]

    def index_bytes(self) -> int | None:
        return sum(folder_bytes(path) for path in self.folder.glob("segments/*/vector_index"))


class Zvec(System):
    """One collection; attributes have inverted indexes, the text a full-text index."""

    name = "zvec"
    about = "HNSW m 16, ef_construction 100, ef 24, inverted indexes on attributes, full-text index"
    durability = "flush() after each write: on disk (some 65 sync calls each)"
    ef = 24

    def imports(self) -> None:
        import zvec

        self._lib = zvec
        zvec.init(query_threads=1, optimize_threads=1, log_level=zvec.LogLevel.ERROR)

    def create(self) -> None:
        lib = self._lib
        self._path.parent.mkdir(parents=True, exist_ok=True)
        numbers = [
            lib.FieldSchema(name, lib.DataType.INT64, index_param=lib.InvertIndexParam())
            for name in ATTRIBUTES
        ]
        schema = lib.CollectionSchema(
            name="rows",
            fields=[
                *numbers,
                lib.FieldSchema("source", lib.DataType.STRING),
                lib.FieldSchema("text", lib.DataType.STRING, index_param=lib.FtsIndexParam()),
            ],
            vectors=lib.VectorSchema(
                "vector",
                lib.DataType.VECTOR_FP32,
                DIMENSION,
                lib.HnswIndexParam(metric_type=lib.MetricType.COSINE, m=16, ef_construction=100),
            ),
        )
        self._collection = lib.create_and_open(path=str(self._path), schema=schema)

    @property
    def _path(self) -> Any:
        return self.folder / "rows"  # it must not exist before

    def open(self) -> None:
        self._collection = self._lib.open(path=str(self._path))

    def close(self) -> None:
        self._collection.close()

    def _add(self, rows: Sequence[Row]) -> None:
        docs = [
            self._lib.Doc(
                id=row.id, vectors={"vector": row.vector}, fields={**row.metadata, "text": row.text}
            )
            for row in rows
        ]
        for status in self._collection.upsert(docs):
            if not status.ok():
                raise RuntimeError(str(status))

    def load(self, rows: Rows) -> None:
        for block in rows.blocks():
            self._add(block)
        self._collection.flush()

    def build(self) -> None:
        self._collection.optimize(self._lib.OptimizeOption(concurrency=1))
        self._collection.flush()

    def upsert(self, rows: Sequence[Row]) -> None:
        self._add(rows)
        self._collection.flush()

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        lib = self._lib
        found = self._collection.query(
            lib.Query(field_name="vector", vector=query.vector, param=lib.HnswQueryParam(ef=self.ef)),
            topk=K,
            filter=None if query.kind == "all" else f"{query.kind} = {query.value}",
        )
        return [(doc.id, doc.fields["text"], doc.fields) for doc in found]

    def index_bytes(self) -> int | None:
        # Its index file holds the vectors too.
        return sum(path.stat().st_size for path in self._path.rglob("vector.index.*"))


class LanceDB(System):
    """One table; attributes have bitmap indexes, the text a full-text index."""

    name = "lancedb"
    about = (
        "IVF_HNSW_SQ (m 16, ef_construction 100), nprobes 20, refine_factor 3, bitmap indexes, "
        "full-text index"
    )
    durability = (
        "add() of a new version of the table: written, but nothing synced to the disk; not yet in the index"
    )

    def imports(self) -> None:
        import lancedb
        import lancedb.index
        import pyarrow as pa

        self._lib, self._index, self._pa = lancedb, lancedb.index, pa
        self._schema = pa.schema(
            [
                ("id", pa.string()),
                ("text", pa.string()),
                *((name, pa.int32()) for name in ATTRIBUTES),
                ("source", pa.string()),
                ("vector", pa.list_(pa.float32(), DIMENSION)),
            ]
        )

    def create(self) -> None:
        self._table = self._lib.connect(str(self.folder)).create_table("rows", schema=self._schema)

    def open(self) -> None:
        self._table = self._lib.connect(str(self.folder)).open_table("rows")

    def _batch(self, rows: Sequence[Row]) -> Any:
        vectors = np.concatenate([row.vector for row in rows])
        columns = [
            [row.id for row in rows],
            [row.text for row in rows],
            *([value_of(name, row.number) for row in rows] for name in ATTRIBUTES),
            [row.metadata["source"] for row in rows],
            self._pa.FixedSizeListArray.from_arrays(self._pa.array(vectors), DIMENSION),
        ]
        return self._pa.table(
            [
                self._pa.array(c, f.type) if isinstance(c, list) else c
                for c, f in zip(columns, self._schema, strict=True)
            ],
            schema=self._schema,
        )

    def load(self, rows: Rows) -> None:
        for block in rows.blocks(10_000):
            self._table.add(self._batch(block))

    def build(self) -> None:
        index = self._index
        config = index.HnswSq(distance_type="cosine", m=16, ef_construction=100)
        self._table.create_index("vector", config=config)
        for name in ATTRIBUTES:
            self._table.create_index(name, config=index.Bitmap())
        self._table.create_index("text", config=index.FTS())
        self._table.optimize(cleanup_older_than=timedelta(0))

    def upsert(self, rows: Sequence[Row]) -> None:
        self._table.add(self._batch(rows))

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        asked = self._table.search(query.vector).distance_type("cosine").nprobes(20).refine_factor(3).limit(K)
        if query.kind != "all":
            asked = asked.where(f"{query.kind} = {query.value}", prefilter=True)
        found = asked.select(["id", "text", *ATTRIBUTES, "source", "_distance"]).to_list()
        return [(row["id"], row["text"], row) for row in found]

    def index_bytes(self) -> int | None:
        return folder_bytes(self.folder / "rows.lance" / "_indices")


class Chroma(System):
    """A collection for all, and one for the tenant, as its documentation advises."""

    name = "chroma"
    about = "HNSW M 16, ef_construction 100, ef_search 100 (its defaults), a collection for the tenant"
    durability = "in its own SQLite file: on disk (8 sync calls each); the graph is written every 1,000 rows"

    def imports(self) -> None:
        import chromadb
        import chromadb.config

        self._lib = chromadb

    def create(self) -> None:
        self.open()

    def open(self) -> None:
        settings = self._lib.config.Settings(anonymized_telemetry=False)
        self._client = self._lib.PersistentClient(path=str(self.folder), settings=settings)
        hnsw = {"space": "cosine", "num_threads": 1}
        self._all, self._few = (
            self._client.get_or_create_collection(name, configuration={"hnsw": hnsw}, embedding_function=None)
            for name in ("rows", "tenant")
        )

    @staticmethod
    def _add(collection: Any, rows: Sequence[Row]) -> None:
        collection.upsert(
            ids=[row.id for row in rows],
            embeddings=[row.vector for row in rows],
            documents=[row.text for row in rows],
            metadatas=[row.metadata for row in rows],
        )

    def load(self, rows: Rows) -> None:
        for block in rows.blocks(5000):
            self._add(self._all, block)
            self._add(self._few, [row for row in block if value_of("tenant", row.number) == TENANT])

    def upsert(self, rows: Sequence[Row]) -> None:
        self._add(self._all, rows)

    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        collection = self._few if query.kind == "tenant" else self._all
        where = {query.kind: query.value} if query.kind in ("tenth", "hundredth") else None
        found = collection.query(
            query_embeddings=[query.vector], n_results=K, where=where, include=["documents", "metadatas"]
        )
        return list(zip(found["ids"][0], found["documents"][0], found["metadatas"][0], strict=True))

    def index_bytes(self) -> int | None:
        return sum(folder_bytes(path) for path in self.folder.iterdir() if path.is_dir())
