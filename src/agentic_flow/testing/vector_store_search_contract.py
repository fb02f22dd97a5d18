"""What every `VectorStore` must do when it is searched: filters, ranking, vectors, time."""

from __future__ import annotations

import math
import random
import time
from typing import Any

from agentic_flow.agentdb.filters import matches
from agentic_flow.core.errors import InvalidInput, NotFound, TooLarge
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Item, Metric, SearchQuery, Vector
from agentic_flow.testing.vector_store_steps import (
    SPACE,
    Scenario,
    document,
    fails,
    fill,
    found_by,
    ids_of,
    similarity,
)

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
    {"title": {"match": "fox red"}},
    {"title": {"match": "STRASSE"}},
    {"not": {"title": {"match": "fox"}}},
    {"due": {"before": "2026-11-24T12:00Z"}},
    {"due": {"after": 1795521620, "before": "2026-11-25T00:00:00.000Z"}},
    {"@@kind": {"in": [0, 2]}},
    {"@id": "i0007"},
    {"@id": {"in": ["i0001", "i0002", "nobody"]}},
    {"@id": {"gte": "i0010", "lt": "i0020"}},
    {"@text": {"match": "DILUTES filler"}},
    {"@version": 2},
    {"@version": {"lt": 2}, "lang": "md"},
    {"or": [{"@id": {"ne": "i0003"}}, {"rare": {"exists": True}}]},
    {"@created_at_s": {"gt": 1_000_000_000, "before": "2199-01-01T00:00Z"}},
    {"@updated_at_s": {"after": "2001-09-09T01:46:40Z"}},
)

BAD_FILTERS: tuple[dict[str, Any], ...] = (
    {"size": {"like": 3}}, {"and": 3}, {"or": [3]}, {"not": []}, {"lang": {"in": "py"}}, {"n": {"gt": True}},
    {"n": 2**63}, {"n": [1]}, {"n": {}}, {"n": {"exists": 1}}, {"title": {"match": "…"}},
    {"title": {"match": 1}}, {"a\0": 1},
    {"due": {"before": "2026-11-24"}}, {"due": {"after": "tomorrow"}}, {"@kind": 1}, {"@id": 3},
    {"@text": "common"}, {"@version": "1"}, {"@created_at_s": {"gt": "2026-11-24T12:00Z"}},
    {"n": math.nan}, {"n": {"lt": math.inf}},
)  # fmt: skip


async def filters_select_exactly(store: VectorStore) -> None:
    """Listing, paging and deleting by a filter agree with the filter's definition."""
    tenant = "t-filters"
    items = await fill(store, tenant, 60)
    for where in FILTERS:
        expected = sorted(item.id for item in items if matches(where, item))
        assert expected, f"{where} selects nothing, so it proves nothing"
        assert await ids_of(store, tenant, where=where) == expected, where
    for where in BAD_FILTERS:
        await fails(InvalidInput, store.list_items(tenant, SPACE, where=where))
        await fails(InvalidInput, store.search(tenant, SPACE, SearchQuery(text="word", filter=where)))
        await fails(InvalidInput, store.delete_where(tenant, SPACE, where))
    await fails(InvalidInput, store.delete_where(tenant, SPACE, {}))
    gone = [item.id for item in items if matches(FILTERS[1], item)]
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
        expected = [item.id for item in items if matches(where, item)]
        assert await ids_of(store, tenant, where=where) == expected, where
    last = await store.upsert(tenant, SPACE, [Item(id="last", metadata={"n": 499})])
    for where in ({"or": [{"n": i} for i in range(500)]}, {"n": {"in": list(range(50_000))}}):
        assert await ids_of(store, tenant, where=where) == list(last.ids), "the largest filter must work"


async def filters_never_cost_recall(store: VectorStore) -> None:
    """Filtering after the nearest were picked: the few rows a filter admits must all be found."""
    tenant = "t-recall"
    items = await fill(store, tenant, 600)
    for where in FILTERS:
        expected = {item.id for item in items if matches(where, item)}
        for mode in ("hybrid", "text", "vector"):
            found = await found_by(store, tenant, text="common word", mode=mode, filter=where, k=1000)
            assert set(found) == expected if len(expected) <= 200 else set(found) <= expected, (where, mode)
            few = await found_by(store, tenant, text="common word", mode=mode, filter=where, k=5)
            assert len(few) == min(5, len(expected)), (where, mode)
            assert set(few) <= expected, (where, mode)


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
    for query in (SearchQuery(), SearchQuery(text="  "), SearchQuery(mode="text", vector=Vector((1.0,)))):
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
        f"v{i:02}": Vector([rng.uniform(-1, 1) * 10 ** rng.uniform(-1, 1) for _ in range(4)])
        for i in range(40)
    }
    query = Vector((0.5, -1.0, 2.0, 0.1))
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
        for bad in map(Vector, ((1.0,), (1.0,) * 5, (1.0, 2.0, 3.0, 1e39))):
            await fails(InvalidInput, store.upsert(tenant, metric, [Item(id="bad", vector=bad)]))
            await fails(InvalidInput, store.search(tenant, metric, SearchQuery(vector=bad)))
        await fails(InvalidInput, store.upsert(tenant, metric, [Item(id="bad", text="no vector")]))
        assert (await store.get(tenant, metric, ["bad"])) == []


async def extreme_vectors_keep_their_order(store: VectorStore) -> None:
    """Values past half precision, or whose squares leave single precision: scores infinite, NaN or alike."""
    tenant = "t-extreme"
    for metric in ("dot", "euclidean"):
        await store.create_namespace(tenant, metric, metric=metric, dimension=2)
        items = [Item(id=str(i), vector=Vector((1e6 * i, 1e3))) for i in range(1, 6)]
        await store.upsert(tenant, metric, items)
        result = await store.search(
            tenant, metric, SearchQuery(vector=Vector((5e6, 1e3)), k=5, mode="vector")
        )
        assert [hit.item.id for hit in result.hits] == ["5", "4", "3", "2", "1"], metric
    for metric in ("cosine", "dot", "euclidean"):
        for name, size in (("huge", 1e14), ("tiny", 1e-14)):
            space = f"{metric}-{name}"
            await store.create_namespace(tenant, space, metric=metric, dimension=2)
            items = [Item(id=str(i), vector=Vector((size * i, size))) for i in range(1, 4)]
            await store.upsert(tenant, space, items)
            query = SearchQuery(vector=Vector((3 * size, size)), k=3, mode="vector")
            result = await store.search(tenant, space, query)
            assert [hit.item.id for hit in result.hits] == ["3", "2", "1"], space
            assert all(math.isfinite(hit.score) for hit in result.hits), space
            beyond = Item(id="beyond", vector=Vector((1e30, 1.0)))
            await fails(InvalidInput, store.upsert(tenant, space, [beyond]))
            await fails(InvalidInput, store.search(tenant, space, SearchQuery(vector=beyond.vector)))
            if metric == "cosine":
                for nothing in (0.0, 1e-30):
                    item = Item(id="nothing", vector=Vector((nothing, 0.0)))
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
    metrics: tuple[Metric, ...] = ("cosine", "dot")
    for metric in metrics:
        await store.create_namespace(tenant, metric, metric=metric, dimension=3)
        same = [Item(id=f"same{i}", vector=Vector((1.0, 0.001 * i, 0.0))) for i in range(5)]
        await store.upsert(tenant, metric, [*same, Item(id="other", vector=Vector((0.7, 0.0, 0.7)))])
        query = SearchQuery(vector=Vector((1.0, 0.0, 0.1)), k=2, mode="vector")
        plain = await store.search(tenant, metric, query)
        assert "other" not in {hit.item.id for hit in plain.hits}
        varied = await store.search(tenant, metric, query.model_copy(update={"mmr_lambda": 0.3}))
        assert varied.hits[0].item.id == plain.hits[0].item.id
        assert varied.hits[1].item.id == "other"
        relevance = await store.search(tenant, metric, query.model_copy(update={"mmr_lambda": 1.0}))
        assert [hit.item.id for hit in relevance.hits] == [hit.item.id for hit in plain.hits]


async def exact_search_is_brute_force(store: VectorStore) -> None:
    """Neighbours that an exact search misses, with a filter or without; `ef` that costs rows."""
    tenant, rng = "t-exact", random.Random(5)
    vectors = {f"v{i:03}": tuple(rng.uniform(-1, 1) for _ in range(8)) for i in range(400)}
    items = [
        Item(id=key, vector=Vector(value), metadata={"part": index % 10})
        for index, (key, value) in enumerate(vectors.items())
    ]
    for metric in ("cosine", "dot", "euclidean"):
        await store.create_namespace(tenant, metric, metric=metric, dimension=8)
        await store.upsert(tenant, metric, items)
        for where in (None, {"part": 3}, {"part": {"in": [1, 2, 3, 4, 5]}}):
            given = Vector([rng.uniform(-1, 1) for _ in range(8)])
            closeness = {
                item.id: similarity(metric, given, item.vector or ())
                for item in items
                if matches(where, item)
            }
            expected = sorted(closeness, key=lambda key: -closeness[key])[:20]
            query = SearchQuery(vector=given, k=20, mode="vector", filter=where, exact=True)
            hits = (await store.search(tenant, metric, query)).hits
            assert [hit.item.id for hit in hits] == expected, (metric, where)
            for hit in hits:
                assert math.isclose(hit.score, closeness[hit.item.id], abs_tol=1e-4), (metric, where)
                assert math.isclose(hit.score_parts["vector"], hit.score, abs_tol=1e-6), (metric, where)
            for ef in (1, 20, 10_000):
                asked = query.model_copy(update={"exact": False, "ef": ef})
                near = (await store.search(tenant, metric, asked)).hits
                assert len(near) == 20, (metric, where, ef)
                assert all(hit.item.id in closeness for hit in near), (metric, where, ef)


async def many_searches_are_single_ones(store: VectorStore) -> None:
    """A batch whose answers are swapped, cut or made of another moment; a bad query let through."""
    tenant = "t-many"
    await fill(store, tenant, 40)
    queries = [
        SearchQuery(text="common word", k=3),
        SearchQuery(text="number 7", mode="text"),
        SearchQuery(text="number 31", mode="vector", k=1),
        SearchQuery(text="common word", filter={"lang": "md"}, k=100),
        SearchQuery(text="filler", fusion="rrf", explain=True, mmr_lambda=0.5),
        SearchQuery(text="nothing like it", mode="text"),
        SearchQuery(text="common word", k=3),
    ]
    together = await store.search_many(tenant, SPACE, queries)
    assert together == [await store.search(tenant, SPACE, query) for query in queries]
    assert await store.search_many(tenant, SPACE, []) == []
    await fails(InvalidInput, store.search_many(tenant, SPACE, [queries[0], SearchQuery()]))
    await fails(TooLarge, store.search_many(tenant, SPACE, [queries[2]] * 10_000))
    await fails(NotFound, store.search_many(tenant, "none", queries[:1]))


async def fusion_is_explained(store: VectorStore) -> None:
    """Parts that do not make the score, parts nobody asked for, and the other fusion than was asked for."""
    tenant = "t-fusion"
    await store.create_namespace(tenant, SPACE)
    texts = [
        "red fox",
        "red fox jumps over the fox",
        "a redder foxglove",
        "blue whale",
        "the fox and the whale",
    ]
    await store.upsert(tenant, SPACE, [Item(id=f"i{i}", text=text) for i, text in enumerate(texts)])
    query = SearchQuery(text="red fox", explain=True, fusion="rrf")
    hits = (await store.search(tenant, SPACE, query)).hits
    assert {hit.item.id for hit in hits} == {f"i{i}" for i in range(5)}
    for hit in hits:
        parts = hit.score_parts
        expected = parts["vector_weight"] / (60 + parts["vector_rank"])
        if "text_rank" in parts:
            assert parts["text"] > 0
            expected += 1 / (60 + parts["text_rank"])
        assert math.isclose(hit.score, expected, rel_tol=1e-5), hit
    assert sorted(hit.score_parts["vector_rank"] for hit in hits) == [1, 2, 3, 4, 5]
    by_text = sorted(
        (hit for hit in hits if "text_rank" in hit.score_parts), key=lambda hit: -hit.score_parts["text"]
    )
    assert [hit.score_parts["text_rank"] for hit in by_text] == list(range(1, len(by_text) + 1))
    assert "i3" not in {hit.item.id for hit in by_text}, "a rank of what no word found"
    plain = (await store.search(tenant, SPACE, query.model_copy(update={"explain": False}))).hits
    assert [(hit.item.id, hit.score) for hit in plain] == [(hit.item.id, hit.score) for hit in hits]
    assert all(hit.score_parts.keys() <= {"text", "vector"} for hit in plain)
    summed = (await store.search(tenant, SPACE, query.model_copy(update={"fusion": "zscore"}))).hits
    for hit in summed:
        assert {"text_z", "vector_z", "vector_weight"} <= hit.score_parts.keys()
    total = {
        hit.item.id: hit.score_parts["text_z"]
        + hit.score_parts["vector_weight"] * hit.score_parts["vector_z"]
        for hit in summed
    }
    assert [hit.item.id for hit in summed] == sorted(total, key=lambda key: -total[key])
    for side in ("text_z", "vector_z"):
        assert abs(sum(hit.score_parts[side] for hit in summed)) < 1e-3, "z-scores have the mean 0"


async def validity_decides_searches(store: VectorStore) -> None:
    """Answers from another time: not yet valid, no longer valid, or bounds that count on the wrong side."""
    tenant, now_s = "t-validity", time.time()
    await store.create_namespace(tenant, SPACE)
    bounds: dict[str, tuple[float | None, float | None]] = {
        "always": (None, None),
        "past": (None, 1000.0),
        "between": (1000.0, 2000.0),
        "future": (now_s + 1e6, None),
        "current": (now_s - 1e6, now_s + 1e6),
        "never": (2000.0, 1000.0),
    }
    await store.upsert(
        tenant,
        SPACE,
        [
            Item(id=name, text="walrus", metadata={"a": 1}, valid_from_s=since, valid_until_s=until)
            for name, (since, until) in bounds.items()
        ],
    )
    for at_s, expected in (
        (None, {"always", "current"}),
        (999.5, {"always", "past"}),
        (1000.0, {"always", "between"}),
        (1999.5, {"always", "between"}),
        (2000.0, {"always"}),
        (now_s + 2e6, {"always", "future"}),
    ):
        for mode in ("hybrid", "text", "vector"):
            for where in (None, {"a": 1}):
                found = await found_by(store, tenant, text="walrus", mode=mode, at_s=at_s, filter=where)
                assert sorted(found) == sorted(expected), (at_s, mode, where)
    assert await ids_of(store, tenant) == sorted(bounds), "what is stored is listed, whenever it is valid"
    (back,) = await store.get(tenant, SPACE, ["between"])
    assert (back.valid_from_s, back.valid_until_s) == bounds["between"]
    await store.upsert(tenant, SPACE, [Item(id="past", text="walrus")])
    assert sorted(await found_by(store, tenant, text="walrus")) == ["always", "current", "past"]
    for at_s in (math.inf, math.nan):
        await fails(InvalidInput, store.search(tenant, SPACE, SearchQuery(text="walrus", at_s=at_s)))


async def bad_vectors_are_refused(store: VectorStore) -> None:
    """Vectors that no comparison can rank, let in by one way or another; half a refused batch."""
    tenant = "t-bad-vectors"
    bad: dict[str, Vector] = {
        "nan": Vector((math.nan, 1.0, 1.0)),
        "infinite": Vector((1.0, math.inf, 1.0)),
        "minus infinite": Vector((1.0, 1.0, -math.inf)),
        "short": Vector((1.0, 1.0)),
        "long": Vector((1.0, 1.0, 1.0, 1.0)),
        "empty": Vector(),
        "zero": Vector((0.0, -0.0, 0.0)),
    }
    for metric in ("cosine", "dot", "euclidean"):
        await store.create_namespace(tenant, metric, metric=metric, dimension=3)
        good = Item(id="good", vector=Vector((1.0, 2.0, 3.0)))
        for name, vector in bad.items():
            if name == "zero" and metric != "cosine":
                continue
            batch = [good, Item(id="bad", vector=vector)]
            await fails(InvalidInput, store.upsert(tenant, metric, batch))
            await fails(InvalidInput, store.restore(tenant, metric, batch))
            await fails(InvalidInput, store.search(tenant, metric, SearchQuery(vector=vector)))
            await fails(InvalidInput, store.search(tenant, metric, SearchQuery(vector=vector, exact=True)))
        assert (await store.list_items(tenant, metric)).items == (), metric
        await store.upsert(tenant, metric, [good])
    await store.upsert(tenant, "dot", [Item(id="zero", vector=bad["zero"])])
    hits = (await store.search(tenant, "dot", SearchQuery(vector=good.vector, mode="vector"))).hits
    assert [hit.item.id for hit in hits] == ["good", "zero"]


WHEN_SEARCHED: tuple[Scenario, ...] = (
    filters_select_exactly,
    filters_compare_odd_values,
    filters_never_cost_recall,
    the_right_item_is_found,
    odd_queries_are_answered,
    own_vectors_are_ranked_by_metric,
    extreme_vectors_keep_their_order,
    bad_vectors_are_refused,
    exact_search_is_brute_force,
    many_searches_are_single_ones,
    fusion_is_explained,
    validity_decides_searches,
    hits_of_a_document_are_limited,
    mmr_prefers_novelty,
)
