"""What every `VectorStore` must do, whether it is embedded, reached over HTTP, or on PostgreSQL.

A test module gives `run_all` a store; tenants are made up by the scenarios, so one store serves all of them.
Another implementation imports this module and does the same. What searching must do is told in
`vector_store_search_contract`; `ALWAYS` has those scenarios as well.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from agentic_flow.core.errors import AgenticFlowError, Conflict, InvalidInput, NotFound, TooLarge
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Document, Fingerprint, Item, Metric, Quantization, SearchQuery, Vector
from agentic_flow.testing.vector_store_search_contract import WHEN_SEARCHED, the_right_item_is_found
from agentic_flow.testing.vector_store_steps import (
    SPACE,
    Scenario,
    all_of,
    document,
    fails,
    fill,
    found_by,
    half,
    ids_of,
    unit,
    upsert_one,
)

__all__ = [
    "ALWAYS",
    "SPACE",
    "Scenario",
    "document",
    "found_by",
    "run_all",
    "tenants_never_meet",
    "the_right_item_is_found",
]

TENANTS = 50
INDEXED_WITHIN_S = 30.0


async def namespaces_are_made_once(store: VectorStore) -> None:
    """The same settings twice are one namespace; others are a Conflict; made anew it is empty."""
    tenant = "t-namespaces"
    first = await store.create_namespace(tenant, SPACE)
    assert await store.create_namespace(tenant, SPACE) == first
    await fails(Conflict, store.create_namespace(tenant, SPACE, metric="dot"))
    await fails(Conflict, store.create_namespace(tenant, SPACE, dimension=3))
    await store.create_namespace(tenant, "also", metric="euclidean", dimension=3)
    await store.upsert(tenant, SPACE, [Item(id="a", text="some words")])
    await store.check()
    listed = await store.namespaces(tenant)
    assert [(space.name, space.items, space.metric) for space in listed] == [
        ("also", 0, "euclidean"),
        (SPACE, 1, "cosine"),
    ]
    assert await store.delete_namespace(tenant, SPACE) is True
    assert await store.delete_namespace(tenant, SPACE) is False
    await fails(NotFound, store.search(tenant, SPACE, SearchQuery(text="words")))
    await store.create_namespace(tenant, SPACE, metric="dot", dimension=2)
    assert (await store.list_items(tenant, SPACE)).items == ()
    assert (await store.search(tenant, SPACE, SearchQuery(vector=Vector((1.0, 0.0))))).hits == ()


async def tenants_with_a_namespace_are_found(store: VectorStore) -> None:
    """A service finds every tenant that it has work for, and none that it has not (any more)."""
    for tenant in ("t-with-b", "t-with-a", "t-with-other"):
        await store.create_namespace(tenant, "wanted" if tenant != "t-with-other" else "wanted2")
    assert await store.tenants_with("wanted") == ["t-with-a", "t-with-b"]
    await store.erase_tenant("t-with-a")
    assert await store.tenants_with("wanted") == ["t-with-b"]
    await store.delete_namespace("t-with-b", "wanted")
    assert await store.tenants_with("wanted") == []
    await fails(InvalidInput, store.tenants_with("a/b"))


async def bad_names_are_refused(store: VectorStore) -> None:
    """Names that could leave their folder, table or URL are refused, never cleaned up silently."""
    for name in ("a b", "-a", "a/b", "x" * 129, "ä", "a\nb", 'a"b', "a\n"):
        await fails(InvalidInput, store.create_namespace("t-names", name))
    await fails(InvalidInput, store.create_namespace("t-names", SPACE, dimension=0))
    await fails(InvalidInput, store.create_namespace("t-names", SPACE, dimension=10**6))
    assert await store.namespaces("t-names") == []


async def unknown_namespaces_are_not_found(store: VectorStore) -> None:
    """No call creates a namespace by accident or answers as if it were empty."""
    tenant, mark = "t-unknown", Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.upsert(tenant, "none", [Item(id="a")]),
        lambda: store.get(tenant, "none", ["a"]),
        lambda: store.delete(tenant, "none", ["a"]),
        lambda: store.delete_where(tenant, "none", {"a": 1}),
        lambda: store.list_items(tenant, "none"),
        lambda: store.search(tenant, "none", SearchQuery(text="a")),
        lambda: store.search_many(tenant, "none", [SearchQuery(text="a")]),
        lambda: store.restore(tenant, "none", [Item(id="a")]),
        lambda: store.put_documents(tenant, "none", [Document(path="a", fingerprint=mark, chunks=())]),
        lambda: store.fingerprints(tenant, "none"),
        lambda: store.delete_documents(tenant, "none", ["a"]),
    ]
    for call in calls:
        await fails(NotFound, call())
    assert await store.namespaces(tenant) == []
    assert await store.stats(tenant) == []


async def items_are_what_was_stored(store: VectorStore) -> None:
    """Text, metadata, times and order survive: unicode, NUL bytes, quotes, nested and long values."""
    tenant = "t-items"
    await store.create_namespace(tenant, SPACE)
    metadata = {
        "none": None,
        "flag": True,
        "n": 2**53 + 1,
        "x": 0.1,
        "list": [1, {"ключ": "'\""}],
        'key."q"': "v",
    }
    items = [
        Item(id="plain", text="some words", metadata=metadata),
        Item(id="empty"),
        Item(id="no words", text="… !? —"),
        Item(id="nul", text="before\x00after", metadata={"nul": "a\x00b"}),
        Item(id="long", text="word " * 100_000),
        Item(id="ид/🙂 'x'", text="日本語 текст"),
        Item(id="late", text="later", expires_at_s=4e9),
    ]
    result = await store.upsert(tenant, SPACE, items)
    assert result.ids == tuple(item.id for item in items)
    assert (result.inserted, result.updated) == (len(items), 0)
    wanted = ["late", "missing", *(item.id for item in items[:-1])]
    found = await store.get(tenant, SPACE, wanted)
    assert [item.id for item in found] == [item_id for item_id in wanted if item_id != "missing"]
    stored = {item.id: item for item in found}
    for item in items:
        assert (stored[item.id].text, stored[item.id].metadata, stored[item.id].expires_at_s) == (
            item.text,
            item.metadata,
            item.expires_at_s,
        )
        assert stored[item.id].version == 1
        assert abs(stored[item.id].created_at_s - time.time()) < 3600
    assert (await store.search(tenant, SPACE, SearchQuery(text="after"))).hits[0].item.id == "nul"


async def versions_count_changes(store: VectorStore) -> None:
    """A lost update: whoever writes over a version it has not seen is refused, with the whole batch."""
    tenant = "t-versions"
    await store.create_namespace(tenant, SPACE)
    assert (await upsert_one(store, tenant, "a", "one", 0)) == 1
    assert (await upsert_one(store, tenant, "a", "two", 1)) == 2
    await fails(Conflict, upsert_one(store, tenant, "a", "three", 1))
    await fails(Conflict, upsert_one(store, tenant, "a", "three", 0))
    both = [Item(id="new", text="new"), Item(id="a", text="three")]
    await fails(Conflict, store.upsert(tenant, SPACE, both, expected_version=0))
    assert await ids_of(store, tenant) == ["a"], "a refused batch left something behind"
    (kept,) = await store.get(tenant, SPACE, ["a"])
    assert (kept.text, kept.version) == ("two", 2)
    assert kept.updated_at_s >= kept.created_at_s
    assert (await upsert_one(store, tenant, "a", "three", None)) == 3
    await store.delete(tenant, SPACE, ["a"])
    assert (await upsert_one(store, tenant, "a", "again", 0)) == 1
    await fails(InvalidInput, store.upsert(tenant, SPACE, [Item(id="b"), Item(id="b")]))


async def updates_replace_what_is_found(store: VectorStore) -> None:
    """Stale index rows: the old words of a changed or deleted item must not find it."""
    tenant = "t-updates"
    await store.create_namespace(tenant, SPACE)
    await store.upsert(tenant, SPACE, [Item(id="a", text="zebra stripes"), Item(id="b", text="walrus")])
    await store.upsert(tenant, SPACE, [Item(id="a", text="giraffe neck")])
    assert await found_by(store, tenant, text="zebra", mode="text") == []
    assert await found_by(store, tenant, text="giraffe", mode="text") == ["a"]
    assert (await found_by(store, tenant, text="giraffe neck", mode="vector"))[0] == "a"
    assert await store.delete(tenant, SPACE, ["a", "a", "never"]) == 1
    assert await found_by(store, tenant, text="giraffe", mode="text") == []
    assert await found_by(store, tenant, text="giraffe", mode="vector") == ["b"]


async def idempotency_keys_replay(store: VectorStore) -> None:
    """A retried request is applied once and answered alike; a key is not lent to another request."""
    tenant = "t-idempotency"
    await store.create_namespace(tenant, SPACE)
    item = Item(id="a", text="once")
    first = await store.upsert(tenant, SPACE, [item], idempotency_key="k")
    assert await store.upsert(tenant, SPACE, [item], idempotency_key="k") == first
    assert (await store.get(tenant, SPACE, ["a"]))[0].version == 1
    await fails(Conflict, store.upsert(tenant, SPACE, [Item(id="a", text="other")], idempotency_key="k"))
    await store.create_namespace(tenant, "other")
    elsewhere = await store.upsert(tenant, "other", [Item(id="z")], idempotency_key="k")
    assert elsewhere.ids == ("z",), "keys of one namespace answered for another"


async def expired_items_are_gone(store: VectorStore) -> None:
    """Rows past their time must not be read, listed, counted, found or block a new version 1."""
    tenant = "t-expiry"
    await store.create_namespace(tenant, SPACE)
    await store.upsert(
        tenant,
        SPACE,
        [Item(id="old", text="walrus", expires_at_s=1.0), Item(id="new", text="walrus", expires_at_s=4e9)],
    )
    assert await ids_of(store, tenant) == ["new"]
    assert [item.id for item in await store.get(tenant, SPACE, ["old", "new"])] == ["new"]
    for mode in ("hybrid", "text", "vector"):
        assert await found_by(store, tenant, text="walrus", mode=mode) == ["new"], mode
    assert (await store.namespaces(tenant))[0].items == 1
    assert await store.delete(tenant, SPACE, ["old"]) == 0
    assert (await upsert_one(store, tenant, "old", "walrus again", 0)) == 1
    assert await ids_of(store, tenant) == ["new", "old"]


async def pages_cover_everything(store: VectorStore) -> None:
    """A page lost or repeated, also when rows go while paging; cursors of others are refused."""
    tenant = "t-pages"
    items = await fill(store, tenant, 25)
    for limit in (1, 7, 25, 26):
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await store.list_items(tenant, SPACE, cursor=cursor, limit=limit)
            assert len(page.items) <= limit
            seen += [item.id for item in page.items]
            if (cursor := page.cursor) is None:
                break
        assert seen == sorted(item.id for item in items)
    assert await all_of(store, tenant) == items
    first = await store.list_items(tenant, SPACE, limit=10)
    await store.delete(tenant, SPACE, [item.id for item in first.items])
    second = await store.list_items(tenant, SPACE, cursor=first.cursor, limit=100)
    assert [item.id for item in second.items] == sorted(item.id for item in items)[10:]
    for cursor in ("%%%", "not a cursor", "é"):
        await fails(InvalidInput, store.list_items(tenant, SPACE, cursor=cursor))
    for limit in (0, -1, 10**6):
        await fails(InvalidInput, store.list_items(tenant, SPACE, limit=limit))


async def documents_are_replaced_whole(store: VectorStore) -> None:
    """Chunks of an older version left behind, fingerprints out of step, half of a refused batch stored."""
    tenant = "t-documents"
    await store.create_namespace(tenant, SPACE)
    old = document("a.py", ["zebra one", "zebra two", "zebra three"])
    other = document("b.py", ["walrus"])
    assert await store.put_documents(tenant, SPACE, [old, other]) == 4
    assert await store.fingerprints(tenant, SPACE) == {"a.py": old.fingerprint, "b.py": other.fingerprint}
    new = document("a.py", ["giraffe"], "b")
    assert await store.put_documents(tenant, SPACE, [new]) == 1
    assert await ids_of(store, tenant) == ["a.py:1-1", "b.py:1-1"]
    assert (await store.fingerprints(tenant, SPACE))["a.py"] == new.fingerprint
    assert await found_by(store, tenant, text="zebra", mode="text") == []
    assert await found_by(store, tenant, text="giraffe", mode="text") == ["a.py:1-1"]
    (space,) = await store.namespaces(tenant)
    assert (space.items, space.documents) == (2, 2)
    stolen = Document(path="c.py", fingerprint=new.fingerprint, chunks=(Item(id="b.py:1-1", text="mine"),))
    await fails(Conflict, store.put_documents(tenant, SPACE, [document("d.py", ["kept?"]), stolen]))
    assert set(await store.fingerprints(tenant, SPACE)) == {"a.py", "b.py"}
    await fails(InvalidInput, store.put_documents(tenant, SPACE, [old, old]))
    assert await store.delete_documents(tenant, SPACE, ["a.py", "never.py"]) == 1
    assert await ids_of(store, tenant) == ["b.py:1-1"]
    assert set(await store.fingerprints(tenant, SPACE)) == {"b.py"}
    assert await found_by(store, tenant, text="giraffe", mode="text") == []


async def vectors_come_back(store: VectorStore) -> None:
    """Numbers rounded, scaled or reordered on their way in or out, whichever form they were sent in."""
    tenant, rng = "t-round-trip", random.Random(3)
    exact = [
        Vector((1e-40, -0.0, 3.4e10, 1.1754944e-38, -1.0000001)),
        *(Vector([rng.gauss(0, 10) for _ in range(5)]) for _ in range(20)),
    ]
    for metric in ("cosine", "dot", "euclidean"):
        full, halved = f"{metric}-full", f"{metric}-half"
        await store.create_namespace(tenant, full, metric=metric, dimension=5, quantization="f32")
        await store.create_namespace(tenant, halved, metric=metric, dimension=5, quantization="f16")
        sent = [Item(id=f"i{i:02}", text="words", vector=vector) for i, vector in enumerate(exact)]
        await store.upsert(tenant, full, sent)
        for item in (*await all_of(store, tenant, full), *await store.get(tenant, full, ["i00", "i07"])):
            assert item.vector is not None
            assert item.vector.data == exact[int(item.id[1:])].data, (metric, item.id)
        # Of length 1, so that a store that keeps directions alone gives back what it was given.
        units = [unit(vector) for vector in exact[1:]]
        await store.upsert(
            tenant, halved, [Item(id=f"i{i:02}", vector=vector) for i, vector in enumerate(units)]
        )
        for item in await all_of(store, tenant, halved):
            vector = units[int(item.id[1:])]
            assert item.vector is not None
            assert all(abs(a - b) <= 2**-11 for a, b in zip(item.vector, vector, strict=True)), metric
            assert item.vector.floats() == half(item.vector), "more than 16 bits were kept"
    forms = [[1, 2.5, -3, 0, 4], Vector((1, 2.5, -3, 0, 4)).base64()]
    await store.upsert(
        tenant,
        "dot-full",
        [Item.model_validate({"id": f"form{i}", "vector": form}) for i, form in enumerate(forms)],
    )
    for item in await store.get(tenant, "dot-full", ["form0", "form1"]):
        assert item.vector == (1.0, 2.5, -3.0, 0.0, 4.0)


async def quantization_is_fixed(store: VectorStore) -> None:
    """A namespace whose vectors are kept in fewer bytes than asked for, or that changes its mind."""
    tenant = "t-quantization"
    pairs: tuple[tuple[Quantization, Quantization], ...] = (("f32", "f16"), ("f16", "f32"))
    for quantization, other in pairs:
        space = await store.create_namespace(tenant, quantization, dimension=64, quantization=quantization)
        assert space.quantization == quantization
        assert await store.create_namespace(tenant, quantization, dimension=64) == space
        again = store.create_namespace(tenant, quantization, dimension=64, quantization=quantization)
        assert await again == space
        await fails(Conflict, store.create_namespace(tenant, quantization, dimension=64, quantization=other))
        items = [Item(id=f"i{i}", vector=Vector([float(i + 1)] * 64)) for i in range(50)]
        await store.upsert(tenant, quantization, items)
    assert (await store.create_namespace(tenant, "callers", dimension=64)).quantization == "f32"
    assert (await store.create_namespace(tenant, "stores")).quantization == "f16"
    listed = {space.name: space.quantization for space in await store.namespaces(tenant)}
    assert listed == {"f32": "f32", "f16": "f16", "callers": "f32", "stores": "f16"}
    sizes = {stats.name: stats.vector_bytes for stats in await store.stats(tenant)}
    assert 50 * 64 * 2 <= sizes["f16"] < sizes["f32"], sizes


async def other_embedders_are_refused(store: VectorStore) -> None:
    """Vectors of two models in one namespace: their distances mean nothing."""
    tenant, mine = "t-embedders", "model-a"
    space = await store.create_namespace(tenant, SPACE, dimension=2, embedder_id=mine)
    assert space.embedder_id == mine
    assert await store.create_namespace(tenant, SPACE, dimension=2, embedder_id=mine) == space
    await fails(Conflict, store.create_namespace(tenant, SPACE, dimension=2, embedder_id="model-b"))
    await fails(InvalidInput, store.create_namespace(tenant, "other", embedder_id="model-a"))
    for name in ("", "a\nb", "x" * 1000):
        await fails(InvalidInput, store.create_namespace(tenant, "other", dimension=2, embedder_id=name))
    item = Item(id="a", vector=Vector((1.0, 0.0)))
    await fails(Conflict, store.upsert(tenant, SPACE, [item], embedder_id="model-b"))
    assert await ids_of(store, tenant) == []
    await store.upsert(tenant, SPACE, [item], embedder_id=mine)
    await store.upsert(tenant, SPACE, [item.model_copy(update={"id": "b"})])
    result = await store.search(tenant, SPACE, SearchQuery(vector=item.vector))
    assert (result.embedder_id, result.semantic, len(result.hits)) == (mine, False, 2)
    own = await store.create_namespace(tenant, "own")
    await store.upsert(tenant, "own", [Item(id="a", text="words")], embedder_id=own.embedder_id)
    await fails(Conflict, store.upsert(tenant, "own", [Item(id="b", text="words")], embedder_id=mine))
    assert (await store.search(tenant, "own", SearchQuery(text="words"))).embedder_id == own.embedder_id


async def bad_values_are_refused(store: VectorStore) -> None:
    """Values stored as something else (NaN as null), or so large that one item is an attack."""
    tenant = "t-bad-values"
    await store.create_namespace(tenant, SPACE)
    bad: list[tuple[type[AgenticFlowError], Item]] = [
        (InvalidInput, Item(id="a", metadata={"n": math.nan})),
        (InvalidInput, Item(id="a", metadata={"list": [{"n": -math.inf}]})),
        (InvalidInput, Item(id="a", metadata={"a\0b": 1})),
        (InvalidInput, Item(id="a\0b")),
        (InvalidInput, Item(id="a", expires_at_s=math.inf)),
        (InvalidInput, Item(id="a", valid_from_s=math.nan)),
        (InvalidInput, Item(id="a", valid_until_s=-math.inf)),
        (TooLarge, Item(id="a", metadata={"much": "x" * (1024 * 1024)})),
        (TooLarge, Item(id="a", text="x" * (1024 * 1024 + 1))),
    ]
    for kind, item in bad:
        await fails(kind, store.upsert(tenant, SPACE, [Item(id="good", text="words"), item]))
        await fails(kind, store.restore(tenant, SPACE, [item]))
    await fails(TooLarge, store.upsert(tenant, SPACE, [Item(id=f"i{i}") for i in range(10_001)]))
    for key in ("", "x" * 1000, "a\nb"):
        await fails(InvalidInput, store.upsert(tenant, SPACE, [Item(id="a")], idempotency_key=key))
    assert await ids_of(store, tenant) == [], "a refused call left something behind"


async def restored_items_are_equal(store: VectorStore) -> None:
    """An export and import that loses a version, a time, a vector or the document an item is of."""
    tenant = "t-restore"
    kinds: tuple[tuple[Metric, int | None], ...] = (("cosine", None), ("dot", 3))
    for metric, dimension in kinds:
        source, target = f"{metric}-source", f"{metric}-target"
        spaces = [
            await store.create_namespace(tenant, name, metric=metric, dimension=dimension)
            for name in (source, target)
        ]
        vector = None if dimension is None else Vector((1.5, -2.25, 1e-3))
        plain = Item(
            id="a", text="zebra", metadata={"n": 2**53 + 1, "nested": [None, {"x": 0.1}]}, vector=vector
        )
        timed = plain.model_copy(
            update={"id": "b", "expires_at_s": 4e9, "valid_from_s": 10.25, "valid_until_s": 5e9}
        )
        await store.upsert(tenant, source, [plain, timed])
        await store.upsert(tenant, source, [plain])
        # A text without words has no direction; what the store made of it, it must take back.
        await store.upsert(tenant, source, [Item(id="empty", vector=vector)])
        chunks = document("a.py", ["walrus one", "walrus two"])
        chunks = chunks.model_copy(
            update={"chunks": tuple(c.model_copy(update={"vector": vector}) for c in chunks.chunks)}
        )
        await store.put_documents(tenant, source, [chunks])
        items = await all_of(store, tenant, source, vectors=True)
        marks = await store.fingerprints(tenant, source)
        assert {item.id: (item.version, item.document) for item in items} == {
            "a": (2, None),
            "b": (1, None),
            "empty": (1, None),
            "a.py:1-1": (1, "a.py"),
            "a.py:2-2": (1, "a.py"),
        }
        assert all(item.vector is not None for item in items)
        await fails(InvalidInput, store.restore(tenant, target, items))
        assert await all_of(store, tenant, target) == [], "a refused call left something behind"
        assert await store.restore(tenant, target, items, marks) == len(items)
        assert await all_of(store, tenant, target, vectors=True) == items
        assert await store.fingerprints(tenant, target) == marks
        assert await store.restore(tenant, target, items, marks) == len(items)
        assert await all_of(store, tenant, target, vectors=True) == items, "restoring twice is restoring"
        counts = {space.name: (space.items, space.documents) for space in await store.namespaces(tenant)}
        assert counts[source] == counts[target] == (len(items), 1)
        query = SearchQuery(text="walrus", mode="text")
        found = [await store.search(tenant, space.name, query) for space in spaces]
        assert found[0] == found[1]
        await store.upsert(tenant, target, [plain], expected_version=2)
        (again,) = await store.get(tenant, target, ["a"])
        assert (again.version, again.created_at_s) == (3, items[0].created_at_s)
        assert await store.delete_documents(tenant, target, ["a.py"]) == 1
        assert [item.id for item in await all_of(store, tenant, target)] == ["a", "b", "empty"]


async def listing_brings_vectors_when_asked(store: VectorStore) -> None:
    """Vectors of the store's embedder sent to everybody, or missing where an export needs them."""
    tenant = "t-list-vectors"
    space = await store.create_namespace(tenant, SPACE)
    await store.upsert(tenant, SPACE, [Item(id="a", text="zebra stripes"), Item(id="b", text="walrus tusks")])
    assert [item.vector for item in await all_of(store, tenant)] == [None, None]
    with_vectors = await all_of(store, tenant, vectors=True)
    assert [len(item.vector or ()) for item in with_vectors] == [space.dimension] * 2
    for item in with_vectors:
        query = SearchQuery(vector=item.vector, mode="vector", k=1)
        (hit,) = (await store.search(tenant, SPACE, query)).hits
        assert (hit.item.id, round(hit.score, 2)) == (item.id, 1.0)


async def stats_tell_what_is_there(store: VectorStore) -> None:
    """Counts that drift from the rows, sizes of nothing, and changes that leave no trace in the sequence."""
    tenant = "t-stats"
    assert await store.stats(tenant) == []
    await store.create_namespace(tenant, "b", dimension=3, metric="euclidean", embedder_id="model-a")
    await store.create_namespace(tenant, "a")
    first, second = await store.stats(tenant)
    assert (first.name, first.items, first.documents, first.index_lag) == ("a", 0, 0, 0)
    assert (second.name, second.dimension, second.metric, second.embedder_id, second.quantization) == (
        "b",
        3,
        "euclidean",
        "model-a",
        "f32",
    )
    sequences = [first.sequence]

    async def after(call: Awaitable[Any]) -> tuple[int, int]:
        await call
        stats = (await store.stats(tenant))[0]
        assert stats.tier in ("exact", "scan", "graph")
        assert stats.index_lag >= 0
        assert stats.index_bytes is None or stats.index_bytes >= 0
        sequences.append(stats.sequence)
        return stats.items, stats.documents

    texts = ["walrus " * 100, "zebra"]
    items = [Item(id=f"i{i}", text=text) for i, text in enumerate(texts)]
    assert await after(store.upsert(tenant, "a", items)) == (2, 0)
    full = (await store.stats(tenant))[0]
    assert full.vector_bytes >= 2 * 2 * full.dimension
    assert full.text_bytes >= sum(map(len, texts))
    assert await after(store.put_documents(tenant, "a", [document("a.py", ["one", "two"])])) == (4, 1)
    assert await after(store.upsert(tenant, "a", items[:1])) == (4, 1)
    assert await after(store.delete(tenant, "a", ["i0"])) == (3, 1)
    assert await after(store.restore(tenant, "a", items[:1])) == (4, 1)
    assert await after(store.delete_documents(tenant, "a", ["a.py"])) == (2, 0)
    assert await after(store.delete_where(tenant, "a", {"@id": "i1"})) == (1, 0)
    numbers = [sequence for sequence in sequences if sequence is not None]
    assert len(numbers) in (0, len(sequences)), "told to one and the same caller, or not"
    assert numbers == sorted(set(numbers)), "a change without a number of its own"
    assert await after(store.upsert(tenant, "a", [Item(id="gone", expires_at_s=1.0)])) == (1, 0)
    assert (await store.stats(tenant))[1] == second, "a change of one namespace shows in another"


ALWAYS: tuple[Scenario, ...] = (
    namespaces_are_made_once,
    tenants_with_a_namespace_are_found,
    bad_names_are_refused,
    unknown_namespaces_are_not_found,
    items_are_what_was_stored,
    bad_values_are_refused,
    versions_count_changes,
    updates_replace_what_is_found,
    idempotency_keys_replay,
    expired_items_are_gone,
    vectors_come_back,
    quantization_is_fixed,
    other_embedders_are_refused,
    restored_items_are_equal,
    listing_brings_vectors_when_asked,
    pages_cover_everything,
    documents_are_replaced_whole,
    stats_tell_what_is_there,
    *WHEN_SEARCHED,
)


async def tenants_never_meet(store: VectorStore, *, seed: int) -> None:
    """50 tenants with equal names, changed in random order: each sees what a dict of its own would hold."""
    rng = random.Random(seed)
    names = [f"tenant-{i}" for i in range(TENANTS)]
    truth: dict[str, dict[str, str]] = {name: {} for name in names}
    for name in names:
        await store.create_namespace(name, SPACE)
    for step in range(4 * TENANTS):
        name = rng.choice(names)
        item_id, secret = f"item{rng.randrange(4)}", f"secret{step}of{name.replace('-', '')}"
        action = rng.randrange(5)
        if action < 3:
            await store.upsert(name, SPACE, [Item(id=item_id, text=secret, metadata={"k": "same"})])
            truth[name][item_id] = secret
        elif action == 3:
            assert await store.delete(name, SPACE, [item_id]) == (truth[name].pop(item_id, None) is not None)
        else:
            assert await store.delete_where(name, SPACE, {"k": "same"}) == len(truth[name])
            truth[name].clear()
    every = " ".join(secret for held in truth.values() for secret in held.values())
    for name in names:
        page = await store.list_items(name, SPACE)
        assert {item.id: item.text for item in page.items} == truth[name], (seed, name)
        query = SearchQuery(text=every, k=1000)
        exact = query.model_copy(update={"mode": "vector", "exact": True})
        by_filter = SearchQuery(text="secret", mode="vector", filter={"k": "same"}, k=1000)
        for result in await store.search_many(name, SPACE, [query, exact, by_filter]):
            assert {hit.item.id: hit.item.text for hit in result.hits} == truth[name], (seed, name)
        (stats,) = await store.stats(name)
        assert (stats.name, stats.items, stats.documents) == (SPACE, len(truth[name]), 0), (seed, name)
    one, other = rng.sample(names, 2)
    await _neighbours_change_nothing(store, one, other, truth)
    erased, *others = names
    assert await store.erase_tenant(erased) == len(truth[erased])
    assert await store.erase_tenant(erased) == 0
    assert await store.namespaces(erased) == []
    assert await store.stats(erased) == []
    for name in others:
        assert (await store.namespaces(name))[0].items == len(truth[name]), (seed, name)


async def _neighbours_change_nothing(
    store: VectorStore, one: str, other: str, truth: dict[str, dict[str, str]]
) -> None:
    """What one tenant writes, under every equal name, leaves the other as it was; also what it is told."""
    await store.upsert(other, SPACE, [Item(id="mine", text="walrus")], idempotency_key="key")
    truth[other]["mine"] = "walrus"
    query = SearchQuery(text="walrus zebra", mode="text", explain=True)

    async def seen() -> list[Any]:
        return [
            await all_of(store, other, vectors=True),
            await store.stats(other),
            await store.fingerprints(other, SPACE),
            await store.search(other, SPACE, query),
        ]

    async with asyncio.timeout(INDEXED_WITHIN_S):  # the tenant's own write, in the background
        while any(space.index_lag for space in await store.stats(other)):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)
    before = await seen()
    mine = [Item(id=f"item{i}", text=f"walrus zebra {i}", version=7, created_at_s=5.0) for i in range(4)]
    assert await store.restore(one, SPACE, mine) == 4
    again = await store.upsert(one, SPACE, [Item(id="mine", text="walrus zebra")], idempotency_key="key")
    assert (again.inserted, again.updated) == (1, 0), "an idempotency key answered for another tenant"
    await store.put_documents(one, SPACE, [document("mine.py", ["walrus", "zebra"])])
    truth[one] = {item.id: item.text for item in await all_of(store, one)}
    await store.create_namespace(one, "private", dimension=2, embedder_id="model-a")
    assert await seen() == before, "a neighbour's writes show"
    # A page's cursor is a place in an order, not a key to the rows behind it.
    page = await store.list_items(one, SPACE, limit=1)
    assert page.cursor is not None
    rest = await store.list_items(other, SPACE, cursor=page.cursor, limit=1000)
    assert {item.id for item in rest.items} <= truth[other].keys()
    assert all(item.text == truth[other][item.id] for item in rest.items)
    assert await store.get(other, SPACE, ["mine.py:1-1"]) == []
    assert await store.delete_documents(other, SPACE, ["mine.py"]) == 0
    await _strangers_hear_the_same(store, other)
    assert await store.delete_namespace(other, "private") is False
    assert await store.delete_namespace(one, "private") is True


async def _strangers_hear_the_same(store: VectorStore, tenant: str) -> None:
    """ "private" exists for another tenant, "nowhere" for none: no answer may tell them apart."""
    mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
    item = Item(id="a", vector=Vector((1.0, 0.0)))
    calls: list[Callable[[str], Awaitable[Any]]] = [
        lambda name: store.upsert(tenant, name, [item], embedder_id="model-b"),
        lambda name: store.upsert(tenant, name, [item], expected_version=3, idempotency_key="key"),
        lambda name: store.restore(tenant, name, [item], {"a.py": mark}),
        lambda name: store.get(tenant, name, ["a"]),
        lambda name: store.delete(tenant, name, ["a"]),
        lambda name: store.delete_where(tenant, name, {"a": 1}),
        lambda name: store.list_items(tenant, name, vectors=True),
        lambda name: store.search(tenant, name, SearchQuery(vector=item.vector)),
        lambda name: store.search_many(tenant, name, [SearchQuery(text="a")]),
        lambda name: store.put_documents(tenant, name, [Document(path="a", fingerprint=mark, chunks=())]),
        lambda name: store.fingerprints(tenant, name),
        lambda name: store.delete_documents(tenant, name, ["a"]),
    ]
    for call in calls:
        heard: list[tuple[str, str, str | None, dict[str, Any]]] = []
        for name in ("private", "nowhere"):
            error = await fails(NotFound, call(name))
            heard.append((error.code, error.message.replace(name, "…"), error.hint, error.details))
        assert heard[0] == heard[1], heard


async def run_all(store: VectorStore) -> list[str]:
    """Every scenario that applies to any store, in order; the names of those that ran."""
    for check in ALWAYS:
        await check(store)
    return [getattr(check, "__name__", "") for check in ALWAYS]
