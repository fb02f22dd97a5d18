"""What every `VectorStore` must do, whether it is embedded or reached over HTTP.

A test module gives `run_all` a store; tenants are made up by the scenarios, so one store serves all of them.
Another implementation imports this module and does the same.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agentic_flow.agentdb.filters import matches
from agentic_flow.core.errors import AgenticFlowError, Conflict, InvalidInput, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery, SearchResult

SPACE = "notes"
TENANTS = 50

Scenario = Callable[[VectorStore], Awaitable[None]]


async def namespaces_are_made_once(store: VectorStore) -> None:
    """The same settings twice are one namespace; others are a Conflict; made anew it is empty."""
    tenant = "t-namespaces"
    first = await store.create_namespace(tenant, SPACE)
    assert await store.create_namespace(tenant, SPACE) == first
    await fails(Conflict, store.create_namespace(tenant, SPACE, metric="dot"))
    await fails(Conflict, store.create_namespace(tenant, SPACE, dimension=3))
    await store.create_namespace(tenant, "also", metric="euclidean", dimension=3)
    await store.upsert(tenant, SPACE, [Item(id="a", text="some words")])
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
    assert (await store.search(tenant, SPACE, SearchQuery(vector=(1.0, 0.0)))).hits == ()


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
        lambda: store.put_documents(tenant, "none", [Document(path="a", fingerprint=mark, chunks=())]),
        lambda: store.fingerprints(tenant, "none"),
        lambda: store.delete_documents(tenant, "none", ["a"]),
    ]
    for call in calls:
        await fails(NotFound, call())
    assert await store.namespaces(tenant) == []


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


FILTERS: tuple[dict[str, Any], ...] = (
    {"lang": "py"},
    {"size": {"gte": 3, "lt": 9}},
    {"lang": {"in": ["py", "md"]}},
    {"note": {"exists": True}},
    {"note": {"exists": False}},
    {"and": [{"lang": "py"}, {"size": {"gt": 5}}]},
    {"or": [{"lang": "md"}, {"size": 1}]},
    {"not": {"lang": "py"}},
    {"lang": {"ne": "py"}},
    {"note": None},
    {"rare": True},
)


async def filters_select_exactly(store: VectorStore) -> None:
    """Listing, paging and deleting by a filter agree with the filter's definition."""
    tenant = "t-filters"
    items = await fill(store, tenant, 60)
    for where in FILTERS:
        expected = sorted(item.id for item in items if matches(where, item.metadata))
        assert expected, f"{where} selects nothing, so it proves nothing"
        assert await ids_of(store, tenant, where=where) == expected, where
    for where in (
        {"size": {"like": 3}},
        {"and": 3},
        {"or": [3]},
        {"lang": {"in": "py"}},
        {"size": {"gt": True}},
    ):
        await fails(InvalidInput, store.list_items(tenant, SPACE, where=where))
        await fails(InvalidInput, store.search(tenant, SPACE, SearchQuery(text="word", filter=where)))
    await fails(InvalidInput, store.delete_where(tenant, SPACE, {}))
    gone = [item.id for item in items if matches(FILTERS[1], item.metadata)]
    assert await store.delete_where(tenant, SPACE, FILTERS[1]) == len(gone)
    assert await ids_of(store, tenant) == sorted({item.id for item in items} - set(gone))
    assert await store.delete_where(tenant, SPACE, FILTERS[1]) == 0


ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.0, 0.5, -0.0, 2**53, 2**53 + 1, 2.0**53,
    2**63 - 1, -(2**63), 9.3e18, 1e300,
    "", "1", "true", "null",
    "a'b", '"', "\\", "a\x00b", "\x00", "é", "e\u0301", "🙂", "Z", "z",
)  # fmt: skip
ODD_KEYS = ("a", "a.b", "$", '"', "'", "ключ", "[0]", "", "a b", "\\")


async def filters_compare_odd_values(store: VectorStore) -> None:
    """Kinds mixed up, large integers rounded, quoting, and limits that the database cannot take."""
    tenant, rng = "t-odd-filters", random.Random(11)
    await store.create_namespace(tenant, SPACE)
    items: list[Item] = []
    for i in range(200):
        metadata: dict[str, Any] = {key: rng.choice(ODD_VALUES) for key in rng.sample(ODD_KEYS, 3)}
        metadata[rng.choice(ODD_KEYS)] = rng.choice(([1], {"a": 1}, {"b": [None]}, rng.choice(ODD_VALUES)))
        items.append(Item(id=f"i{i:03}", metadata=metadata))
    await store.upsert(tenant, SPACE, items)
    ordered = [value for value in ODD_VALUES if value is not None and not isinstance(value, bool)]
    for _ in range(150):
        key = rng.choice(ODD_KEYS)
        operator = rng.choice(("eq", "ne", "in", "gt", "gte", "lt", "lte"))
        operand = rng.choice(ODD_VALUES if operator in ("eq", "ne") else ordered)
        test = {operator: rng.sample(ODD_VALUES, 3) if operator == "in" else operand}
        where = rng.choice(({key: test}, {"not": {key: test}}, {"or": [{key: test}, {"a": operand}]}))
        expected = [item.id for item in items if matches(where, item.metadata)]
        assert await ids_of(store, tenant, where=where) == expected, where
    last = await store.upsert(tenant, SPACE, [Item(id="last", metadata={"n": 499})])
    for where in ({"or": [{"n": i} for i in range(500)]}, {"n": {"in": list(range(50_000))}}):
        assert await ids_of(store, tenant, where=where) == list(last.ids), "the largest filter must work"
    await fails(InvalidInput, store.list_items(tenant, SPACE, where={"n": 2**63}))


async def filters_never_cost_recall(store: VectorStore) -> None:
    """Filtering after the nearest were picked: the few rows a filter admits must all be found."""
    tenant = "t-recall"
    items = await fill(store, tenant, 600)
    for where in FILTERS:
        expected = {item.id for item in items if matches(where, item.metadata)}
        for mode in ("hybrid", "text", "vector"):
            found = await found_by(store, tenant, text="common word", mode=mode, filter=where, k=1000)
            assert set(found) == expected if len(expected) <= 200 else set(found) <= expected, (where, mode)
            few = await found_by(store, tenant, text="common word", mode=mode, filter=where, k=5)
            assert len(few) == min(5, len(expected)), (where, mode)
            assert set(few) <= expected, (where, mode)


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
    first = await store.list_items(tenant, SPACE, limit=10)
    await store.delete(tenant, SPACE, [item.id for item in first.items])
    second = await store.list_items(tenant, SPACE, cursor=first.cursor, limit=100)
    assert [item.id for item in second.items] == sorted(item.id for item in items)[10:]
    for cursor in ("%%%", "not a cursor", "é"):
        await fails(InvalidInput, store.list_items(tenant, SPACE, cursor=cursor))
    for limit in (0, -1, 10**6):
        await fails(InvalidInput, store.list_items(tenant, SPACE, limit=limit))


def document(path: str, texts: Sequence[str], sha256: str = "a") -> Document:
    """A document of one chunk per text."""
    chunks = tuple(
        Item(
            id=f"{path}:{line}-{line}",
            text=text,
            metadata={"path": path, "line_start": line, "line_end": line},
        )
        for line, text in enumerate(texts, 1)
    )
    return Document(
        path=path,
        fingerprint=Fingerprint(size_bytes=len(texts), mtime_ns=2**60 + 1, sha256=sha256),
        chunks=chunks,
    )


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


async def the_right_item_is_found(store: VectorStore) -> None:
    """Searching by words, by parts of identifiers and by likeness of spelling; scores descend."""
    tenant = "t-search"
    await store.create_namespace(tenant, SPACE)
    texts = {
        "loop": "def call_soon_threadsafe(self, callback): schedules a callback from another thread",
        "cancel": "The task was cancelled while it waited for the lock",
        "json": "Serialise an object to a JSON formatted string",
        "mail": "Parse the headers of an electronic mail message",
        "zip": "Compress files into an archive",
    }
    await store.upsert(tenant, SPACE, [Item(id=name, text=text) for name, text in texts.items()])
    for words, right in (
        ("threadsafe callback", "loop"),
        ("callSoonThreadsafe", "loop"),
        ("how do I serialise an object?", "json"),
        ("mail headers", "mail"),
        ("compress archive", "zip"),
    ):
        for mode in ("hybrid", "text"):
            assert (await found_by(store, tenant, text=words, mode=mode))[0] == right, (words, mode)
    # No word of it is stored: likeness finds it.
    assert (await found_by(store, tenant, text="cancellation", mode="vector"))[0] == "cancel"
    assert (await found_by(store, tenant, text="cancellation"))[0] == "cancel"
    result = await store.search(tenant, SPACE, SearchQuery(text="callback thread lock", k=1000))
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    assert len({hit.item.id for hit in result.hits}) == len(result.hits) <= len(texts)
    assert result.mode == "hybrid"
    assert all(hit.item.text == texts[hit.item.id] for hit in result.hits)
    assert await found_by(store, tenant, text="callback", k=1) == ["loop"]
    assert await found_by(store, tenant, text="xylophone", mode="text") == []
    again = await store.search(tenant, SPACE, SearchQuery(text="callback thread lock", k=1000))
    assert again == result, "the same query gave another answer"
    for query in (SearchQuery(), SearchQuery(text="  "), SearchQuery(mode="text", vector=(1.0,))):
        await fails(InvalidInput, store.search(tenant, SPACE, query))


ODD_TEXTS = (
    '"', "a AND", "NEAR(", "*", "x:y", "^a", "text : {", "(", "\x00", "and\x00not", "'--", "日本",
    "a" * 30_000, "word " * 10_000, "🙂",
)  # fmt: skip


async def odd_queries_are_answered(store: VectorStore) -> None:
    """Operators of the full-text language, quotes, NUL and emptiness must not reach the query parser."""
    tenant = "t-odd"
    await store.create_namespace(tenant, SPACE)
    assert (await store.search(tenant, SPACE, SearchQuery(text="anything"))).hits == ()
    await store.upsert(tenant, SPACE, [Item(id="a", text="near and not or words"), Item(id="b")])
    for text in ODD_TEXTS:
        for mode in ("hybrid", "text", "vector"):
            result = await store.search(tenant, SPACE, SearchQuery(text=text, mode=mode))
            assert {hit.item.id for hit in result.hits} <= {"a", "b"}, (text[:20], mode)


async def own_vectors_are_ranked_by_metric(store: VectorStore) -> None:
    """The wrong metric, a wrong order, or a vector that does not fit accepted."""
    tenant, rng = "t-vectors", random.Random(7)
    vectors = {
        f"v{i:02}": tuple(rng.uniform(-1, 1) * 10 ** rng.uniform(-1, 1) for _ in range(4)) for i in range(40)
    }
    query = (0.5, -1.0, 2.0, 0.1)
    for metric in ("cosine", "dot", "euclidean"):
        await store.create_namespace(tenant, metric, metric=metric, dimension=4)
        await store.upsert(tenant, metric, [Item(id=key, vector=value) for key, value in vectors.items()])
        result = await store.search(tenant, metric, SearchQuery(vector=query, k=40, mode="vector"))
        expected = sorted(vectors, key=lambda key: -similarity(metric, query, vectors[key]))
        assert [hit.item.id for hit in result.hits] == expected, metric
        (back,) = await store.get(tenant, metric, ["v05"])
        assert back.vector is not None
        assert all(
            abs(a - b) < 1e-5 * max(1, abs(b)) for a, b in zip(back.vector, vectors["v05"], strict=True)
        )
        for bad in ((1.0,), (1.0,) * 5, (1.0, 2.0, 3.0, 1e39)):
            await fails(InvalidInput, store.upsert(tenant, metric, [Item(id="bad", vector=bad)]))
            await fails(InvalidInput, store.search(tenant, metric, SearchQuery(vector=bad)))
        await fails(InvalidInput, store.upsert(tenant, metric, [Item(id="bad", text="no vector")]))
        assert (await store.get(tenant, metric, ["bad"])) == []


async def extreme_vectors_keep_their_order(store: VectorStore) -> None:
    """Values past half precision, or whose squares leave single precision: scores infinite, NaN or alike."""
    tenant = "t-extreme"
    for metric in ("dot", "euclidean"):
        await store.create_namespace(tenant, metric, metric=metric, dimension=2)
        items = [Item(id=str(i), vector=(1e6 * i, 1e3)) for i in range(1, 6)]
        await store.upsert(tenant, metric, items)
        result = await store.search(tenant, metric, SearchQuery(vector=(5e6, 1e3), k=5, mode="vector"))
        assert [hit.item.id for hit in result.hits] == ["5", "4", "3", "2", "1"], metric
    for metric in ("cosine", "dot", "euclidean"):
        for name, size in (("huge", 1e14), ("tiny", 1e-14)):
            space = f"{metric}-{name}"
            await store.create_namespace(tenant, space, metric=metric, dimension=2)
            items = [Item(id=str(i), vector=(size * i, size)) for i in range(1, 4)]
            await store.upsert(tenant, space, items)
            query = SearchQuery(vector=(3 * size, size), k=3, mode="vector")
            result = await store.search(tenant, space, query)
            assert [hit.item.id for hit in result.hits] == ["3", "2", "1"], space
            assert all(math.isfinite(hit.score) for hit in result.hits), space
            beyond = Item(id="beyond", vector=(1e30, 1.0))
            await fails(InvalidInput, store.upsert(tenant, space, [beyond]))
            await fails(InvalidInput, store.search(tenant, space, SearchQuery(vector=beyond.vector)))
            if metric == "cosine":
                for nothing in (0.0, 1e-30):
                    item = Item(id="nothing", vector=(nothing, 0.0))
                    await fails(InvalidInput, store.upsert(tenant, space, [item]))
                    await fails(InvalidInput, store.search(tenant, space, SearchQuery(vector=item.vector)))
                assert abs(result.hits[0].score - 1) < 1e-5, space


async def hits_of_a_document_are_limited(store: VectorStore) -> None:
    """One long document crowding out the others although per_document asks for variety."""
    tenant = "t-perdocument"
    await store.create_namespace(tenant, SPACE)
    await store.put_documents(
        tenant,
        SPACE,
        [document("long.py", [f"zebra number {i}" for i in range(30)])]
        + [document(f"short{i}.py", ["a zebra among many other animals here"]) for i in range(4)],
    )
    await store.upsert(tenant, SPACE, [Item(id=f"loose{i}", text="zebra loose") for i in range(3)])
    for mode in ("hybrid", "text", "vector"):
        found = await found_by(store, tenant, text="zebra", mode=mode, per_document=2, k=100)
        assert sum(item_id.startswith("long.py") for item_id in found) == 2, mode
        assert sum(item_id.startswith("short") for item_id in found) == 4, mode
        assert sum(item_id.startswith("loose") for item_id in found) == 3, "loose items are no document"
        assert len(await found_by(store, tenant, text="zebra", mode=mode, k=100)) == 37


async def mmr_prefers_novelty(store: VectorStore) -> None:
    """Near duplicates filling the answer although the query asks for diversity."""
    tenant = "t-mmr"
    await store.create_namespace(tenant, SPACE, dimension=3)
    same = [Item(id=f"same{i}", vector=(1.0, 0.001 * i, 0.0)) for i in range(5)]
    await store.upsert(tenant, SPACE, [*same, Item(id="other", vector=(0.7, 0.0, 0.7))])
    query = SearchQuery(vector=(1.0, 0.0, 0.1), k=2, mode="vector")
    plain = await store.search(tenant, SPACE, query)
    assert "other" not in {hit.item.id for hit in plain.hits}
    varied = await store.search(tenant, SPACE, query.model_copy(update={"mmr_lambda": 0.3}))
    assert varied.hits[0].item.id == plain.hits[0].item.id
    assert varied.hits[1].item.id == "other"
    relevance = await store.search(tenant, SPACE, query.model_copy(update={"mmr_lambda": 1.0}))
    assert [hit.item.id for hit in relevance.hits] == [hit.item.id for hit in plain.hits]


ALWAYS: tuple[Scenario, ...] = (
    namespaces_are_made_once,
    bad_names_are_refused,
    unknown_namespaces_are_not_found,
    items_are_what_was_stored,
    versions_count_changes,
    updates_replace_what_is_found,
    idempotency_keys_replay,
    expired_items_are_gone,
    filters_select_exactly,
    filters_compare_odd_values,
    filters_never_cost_recall,
    pages_cover_everything,
    documents_are_replaced_whole,
    the_right_item_is_found,
    odd_queries_are_answered,
    own_vectors_are_ranked_by_metric,
    extreme_vectors_keep_their_order,
    hits_of_a_document_are_limited,
    mmr_prefers_novelty,
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
        hits = (await store.search(name, SPACE, SearchQuery(text=every, k=1000))).hits
        assert {hit.item.id: hit.item.text for hit in hits} == truth[name], (seed, name)
    erased, *others = names
    assert await store.erase_tenant(erased) == len(truth[erased])
    assert await store.erase_tenant(erased) == 0
    assert await store.namespaces(erased) == []
    for name in others:
        assert (await store.namespaces(name))[0].items == len(truth[name]), (seed, name)


async def run_all(store: VectorStore) -> list[str]:
    """Every scenario that applies to any store, in order; the names of those that ran."""
    for check in ALWAYS:
        await check(store)
    return [getattr(check, "__name__", "") for check in ALWAYS]


async def fails(kind: type[AgenticFlowError], call: Awaitable[Any]) -> None:
    """Await a call that must raise exactly this kind, saying what was wrong."""
    raised: AgenticFlowError | None = None
    result: Any = None
    try:
        result = await call
    except AgenticFlowError as error:
        raised = error
    assert raised is not None, f"{result!r} instead of {kind.__name__}"
    assert type(raised) is kind, f"{raised!r} instead of {kind.__name__}"
    assert raised.message, "an error without a message"


async def upsert_one(
    store: VectorStore, tenant: str, item_id: str, text: str, expected_version: int | None
) -> int:
    """The version that one item got."""
    item = Item(id=item_id, text=text)
    return (await store.upsert(tenant, SPACE, [item], expected_version=expected_version)).versions[0]


async def ids_of(store: VectorStore, tenant: str, *, where: dict[str, Any] | None = None) -> list[str]:
    """Ids of one page that holds everything."""
    page = await store.list_items(tenant, SPACE, where=where, limit=1000)
    assert page.cursor is None
    return [item.id for item in page.items]


async def found_by(store: VectorStore, tenant: str, **query: Any) -> list[str]:
    """Ids of the hits, best first."""
    result: SearchResult = await store.search(tenant, SPACE, SearchQuery.model_validate(query))
    return [hit.item.id for hit in result.hits]


async def fill(store: VectorStore, tenant: str, count: int) -> list[Item]:
    """Items that all match "common word", with metadata of several kinds; three of them are rare."""
    await store.create_namespace(tenant, SPACE)
    items: list[Item] = []
    for i in range(count):
        metadata: dict[str, Any] = {"lang": ("py", "md", "txt")[i % 3], "size": i % 12}
        if i % 5 == 0:
            metadata["note"] = None if i % 2 else f"note {i}"
        if i in (7, 31, 53 % count):
            metadata["rare"] = True
        # The rare ones match worst: a ranking cut before the filter would lose them.
        text = "common word " + ("filler text that dilutes " * 20 if "rare" in metadata else f"number {i}")
        items.append(Item(id=f"i{i:04}", text=text, metadata=metadata))
    await store.upsert(tenant, SPACE, items)
    return items


def similarity(metric: str, one: Sequence[float], other: Sequence[float]) -> float:
    """The metric in plain Python; higher is closer."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    if metric == "dot":
        return product
    if metric == "cosine":
        return product / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5
    return -(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5)
