"""Searches of the embedded store beside a naive model: a dict, sorted in plain Python."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Document, Fingerprint, Hit, Item, Metric, SearchQuery, Vector
from agentic_flow.testing.vector_store_steps import similarity

pytestmark = pytest.mark.anyio

TENANT, SPACE = "acme", "notes"
DIMENSION = 5
WORDS = ("red", "green", "blue", "fox", "owl", "newt", "runs", "sleeps")


@dataclass
class Model:
    """What the namespace should hold."""

    metric: Metric
    rng: random.Random
    items: dict[str, Item] = field(default_factory=dict[str, Item])

    def vector(self) -> Vector:
        return Vector([self.rng.gauss(0, 1) for _ in range(DIMENSION)])

    def item(self, item_id: str) -> Item:
        rng = self.rng
        return Item(
            id=item_id,
            text=" ".join(rng.choices(WORDS, k=rng.randrange(1, 9))),
            metadata={"part": rng.randrange(4), "note": rng.choice([None, "Red fox", 3, 2.5])},
            vector=self.vector(),
            valid_until_s=rng.choice([None, None, None, 100.0]),
            expires_at_s=rng.choice([None, None, None, None, 1.0]),
        )

    def admitted(self, query: SearchQuery) -> dict[str, Item]:
        """The items that the query may find; the model knows the few filters the test asks with."""
        tests = {
            "{}": lambda item: True,
            "{'part': 1}": lambda item: item.metadata["part"] == 1,
            "{'not': {'part': {'lt': 2}}}": lambda item: item.metadata["part"] >= 2,
            "{'note': {'match': 'fox'}}": lambda item: item.metadata["note"] == "Red fox",
            "{'@id': {'in': ['i1', 'i2', 'i3']}}": lambda item: item.id in ("i1", "i2", "i3"),
            "{'@text': {'match': 'RED'}}": lambda item: "red" in item.text.split(),
        }
        test = tests[str(query.filter or {})]
        at_s = 1e9 if query.at_s is None else query.at_s
        return {
            key: item
            for key, item in self.items.items()
            if test(item)
            and (item.expires_at_s is None or item.expires_at_s > 1e9)
            and (item.valid_until_s is None or item.valid_until_s > at_s)
        }

    def by_vector(self, query: SearchQuery) -> list[tuple[str, float]]:
        """Ids and similarities of the answer, best first."""
        admitted = self.admitted(query)
        assert query.vector is not None
        scores = {
            key: similarity(self.metric, query.vector, item.vector or ()) for key, item in admitted.items()
        }
        order = sorted(scores, key=lambda key: -scores[key])
        if order and query.mmr_lambda is not None:
            order = diverse(order, scores, admitted, query.mmr_lambda)
        kept: list[str] = []
        for key in order:
            document = admitted[key].document
            of_document = [other for other in kept if admitted[other].document == document]
            if not query.per_document or document is None or len(of_document) < query.per_document:
                kept.append(key)
        return [(key, scores[key]) for key in kept[: query.k]]


def diverse(order: list[str], scores: dict[str, float], items: dict[str, Item], lambda_: float) -> list[str]:
    """Maximal marginal relevance, by definition."""
    low, high = min(0.0, *scores.values()), max(0.0, *scores.values())
    if low == 0 and high > 0:
        relevance = {key: score / high for key, score in scores.items()}
    else:
        low, high = min(scores.values()), max(scores.values())
        relevance = {
            key: (score - low) / (high - low) if high > low else 1.0 for key, score in scores.items()
        }
    chosen = [order[0]]

    def gain(key: str) -> float:
        nearest = max(
            similarity("cosine", items[key].vector or (), items[other].vector or ()) for other in chosen
        )
        return lambda_ * relevance[key] - (1 - lambda_) * nearest

    while len(chosen) < len(order):
        chosen.append(max((key for key in order if key not in chosen), key=gain))
    return chosen


async def change(store: AgentDB, model: Model) -> None:
    """One random write, to both."""
    rng = model.rng
    action = rng.randrange(6)
    if action < 3:
        batch = [model.item(f"i{n}") for n in rng.sample(range(30), rng.randrange(1, 5))]
        await store.upsert(TENANT, SPACE, batch)
        model.items |= {item.id: item for item in batch}
    elif action == 3:
        path = f"{rng.randrange(3)}.md"
        chunks = tuple(model.item(f"{path}:{n}") for n in range(rng.randrange(1, 5)))
        mark = Fingerprint(size_bytes=1, mtime_ns=1, sha256=str(rng.random()))
        await store.put_documents(TENANT, SPACE, [Document(path=path, fingerprint=mark, chunks=chunks)])
        model.items = {key: item for key, item in model.items.items() if item.document != path}
        model.items |= {chunk.id: chunk.model_copy(update={"document": path}) for chunk in chunks}
    elif action == 4:
        gone = [f"i{n}" for n in rng.sample(range(30), 3)]
        await store.delete(TENANT, SPACE, gone)
        for key in gone:
            model.items.pop(key, None)
    else:
        part = rng.randrange(4)
        await store.delete_where(TENANT, SPACE, {"and": [{"part": part}, {"@text": {"match": "newt owl"}}]})
        model.items = {
            key: item
            for key, item in model.items.items()
            if item.metadata["part"] != part
            or not {"newt", "owl"} <= set(item.text.split())
            # What has expired is gone already, for the store.
            or (item.expires_at_s is not None)
        }


def question(model: Model, **more: Any) -> SearchQuery:
    rng = model.rng
    where = rng.choice(
        [
            None,
            {"part": 1},
            {"not": {"part": {"lt": 2}}},
            {"note": {"match": "fox"}},
            {"@id": {"in": ["i1", "i2", "i3"]}},
            {"@text": {"match": "RED"}},
        ]
    )
    return SearchQuery(filter=where, at_s=rng.choice([None, 50.0]), **more)


def assert_same(hits: tuple[Hit, ...], expected: list[tuple[str, float]], query: SearchQuery) -> None:
    assert [hit.item.id for hit in hits] == [key for key, _ in expected], query
    for hit, (_, score) in zip(hits, expected, strict=True):
        assert hit.score == pytest.approx(score, rel=1e-4, abs=1e-4), query


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_vector_searches(metric: Metric, seed: int, tmp_path: Path) -> None:
    """Catches neighbours lost, stale, foreign to the filter or the time, or in another order."""
    model = Model(metric, random.Random(seed))
    async with AgentDB(tmp_path, AgentDBSettings()) as store:
        await store.create_namespace(TENANT, SPACE, metric=metric, dimension=DIMENSION)
        for _ in range(40):
            await change(store, model)
            rng = model.rng
            for _ in range(4):
                query = question(
                    model,
                    vector=model.vector(),
                    mode="vector",
                    k=rng.choice([1, 3, 10, 1000]),
                    exact=rng.random() < 0.5,
                    per_document=rng.choice([0, 0, 1, 2]),
                    mmr_lambda=rng.choice([None, None, 1.0, 0.7, 0.3]),
                )
                found = await store.search(TENANT, SPACE, query)
                assert_same(found.hits, model.by_vector(query), query)


def standard(values: dict[str, float]) -> dict[str, float]:
    spread = statistics.pstdev(values.values())
    if spread <= 1e-12:
        return dict.fromkeys(values, 0.0)
    mean = statistics.fmean(values.values())
    return {key: (value - mean) / spread for key, value in values.items()}


def rank(values: dict[str, float], key: str) -> int:
    return 1 + sum(other > values[key] for other in values.values())


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_hybrid_searches(seed: int, tmp_path: Path) -> None:
    """Catches fusion over other candidates than the answer's, wrong weights, and parts of another item."""
    model = Model("cosine", random.Random(seed))
    async with AgentDB(tmp_path, AgentDBSettings()) as store:
        await store.create_namespace(TENANT, SPACE, dimension=DIMENSION)
        items = [model.item(f"i{n}") for n in range(30)]
        model.items = {item.id: item for item in items}
        await store.upsert(TENANT, SPACE, items)
        for _ in range(40):
            words = " ".join(model.rng.sample(WORDS, 2))
            query = question(model, text=words, vector=model.vector(), k=1000, explain=True)
            admitted = model.admitted(query)
            summed = (await store.search(TENANT, SPACE, query)).hits
            ranked = (await store.search(TENANT, SPACE, query.model_copy(update={"fusion": "rrf"}))).hits
            assert {hit.item.id for hit in summed} == {hit.item.id for hit in ranked} == admitted.keys()
            if not admitted:
                continue
            text = {hit.item.id: hit.score_parts["text"] for hit in summed}
            near = {
                key: similarity("cosine", query.vector or (), item.vector or ())
                for key, item in admitted.items()
            }
            assert {key for key, score in text.items() if score > 0} == {
                key for key, item in admitted.items() if set(words.split()) & set(item.text.split())
            }
            text_z, near_z = standard(text), standard(near)
            total = {key: text_z[key] + near_z[key] for key in text}
            low, high = min(total.values()), max(total.values())
            for hit in summed:
                key = hit.item.id
                unit = (total[key] - low) / (high - low) if high - low > 1e-6 else 1.0
                assert hit.score == pytest.approx(unit, abs=1e-4)
                assert hit.score_parts == pytest.approx(
                    {
                        "text": text[key],
                        "vector": near[key],
                        "text_z": text_z[key],
                        "vector_z": near_z[key],
                        "vector_weight": 1.0,
                    },
                    abs=1e-4,
                )
            found = {key: score for key, score in text.items() if score > 0}
            for hit in ranked:
                key = hit.item.id
                parts = {"vector_rank": rank(near, key), "vector_weight": 1.0}
                if key in found:
                    parts["text_rank"] = rank(found, key)
                shown = {name: hit.score_parts[name] for name in hit.score_parts.keys() - {"text", "vector"}}
                assert shown == parts
                assert hit.score == pytest.approx(sum(1 / (60 + parts[n]) for n in parts if "rank" in n))
            for hits in (summed, ranked):
                scores = [hit.score for hit in hits]
                assert scores == sorted(scores, reverse=True)
                assert all(math.isfinite(score) for score in scores)
