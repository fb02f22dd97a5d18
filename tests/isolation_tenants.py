"""50 tenants that name everything alike, each with a naive model of what it may see, for any `VectorStore`.

Every text and every metadata of a tenant carries its mark, a word of its own. Namespaces, item ids, document
paths, idempotency keys and vectors are the same for all. What a call answers must be what the tenant's own
model says, and no answer and no error may hold another tenant's mark.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.agentdb.filters import matches
from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.core.errors import AgenticFlowError, Conflict, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import (
    Document,
    Filter,
    Fingerprint,
    Item,
    Namespace,
    SearchQuery,
    SearchResult,
    UpsertResult,
    Vector,
)

TENANTS = 50
EMBEDDING_DIMENSION = 256
EMBEDDER_ID = HashedNgramEmbedder(EMBEDDING_DIMENSION).id
WORDS = ("alpha", "bravo", "carol", "delta", "ember")
MARK = re.compile("qz[a-j][a-j]vx")
IDS = tuple(f"i{number}" for number in range(6))
PATHS = ("a.md", "b.md")
POINT_DIMENSION = 8
OPERATIONS_PER_CALL_MAX = 4
"""How many numbers one call may move a namespace's sequence by: a call about two documents takes most."""

_draw = random.Random(5)
VECTORS = {
    name: Vector([_draw.uniform(-1, 1) for _ in range(POINT_DIMENSION)])
    for name in (*IDS, *(f"{path}:{number}" for path in PATHS for number in range(4)))
}

SPECS: dict[str, Namespace] = {
    "notes": Namespace(
        name="notes", dimension=EMBEDDING_DIMENSION, metric="cosine", embedder_id=EMBEDDER_ID,
        quantization="f16",
    ),
    "points": Namespace(
        name="points", dimension=POINT_DIMENSION, metric="cosine", embedder_id="model-a", quantization="f32"
    ),
    "rare": Namespace(
        name="rare", dimension=POINT_DIMENSION, metric="euclidean", embedder_id="caller", quantization="f32"
    ),
}  # fmt: skip
"""The namespaces that a tenant may have; "rare" is had by few, so mostly it exists for somebody else."""

Call = Callable[[VectorStore], Awaitable[Any]]


@dataclass(frozen=True)
class Fault:
    """An error as a caller hears it."""

    code: str
    status: int
    message: str
    hint: str | None

    @classmethod
    def of(cls, error: AgenticFlowError) -> Fault:
        """What a caller hears of it."""
        return cls(error.code, error.status, error.message, error.hint)


def missing(name: str) -> Fault:
    """The namespace exists for nobody, or for somebody else: one and the same."""
    return Fault.of(NotFound(f"there is no namespace {name!r}", hint="create it first"))


@dataclass
class Space:
    """A namespace as its tenant knows it."""

    spec: Namespace
    items: dict[str, Item] = field(default_factory=dict[str, Item])
    documents: dict[str, Fingerprint] = field(default_factory=dict[str, Fingerprint])
    requests: dict[str, tuple[Any, UpsertResult]] = field(default_factory=dict[str, Any])
    sequence: int = 0
    """As it was last seen, and how many of our own calls may have moved it since."""
    calls: int = 0

    def chosen(self, where: Filter | None) -> list[Item]:
        """The items that a filter admits, in id order."""
        return [self.items[key] for key in sorted(self.items) if matches(where, self.items[key])]

    def chunks(self, path: str) -> list[str]:
        """Ids of a document's items."""
        return [key for key, item in self.items.items() if item.document == path]

    def drop(self, ids: Sequence[str]) -> int:
        """How many there were."""
        return sum(self.items.pop(key, None) is not None for key in ids)


@dataclass
class Step:
    """A call, and what the model says of its answer.

    Args:
        what: For messages.
        call: Makes it.
        expected: The answer, as `plain` tells it, or a Fault.
    """

    what: str
    call: Call
    expected: Any


def plain(answer: Any) -> Any:
    """An answer without its times and scores, and search hits by id: what a model can foretell."""
    if isinstance(answer, SearchResult):
        found = {hit.item.id: plain(hit.item) | {"vector": None} for hit in answer.hits}
        assert len(found) == len(answer.hits), "an item twice"
        return {"hits": found}
    if isinstance(answer, Item):
        return answer.model_dump(include={"id", "text", "metadata", "version", "document"}) | {
            "vector": None if answer.vector is None else list(answer.vector)
        }
    if isinstance(answer, BaseModel):
        return {name: plain(getattr(answer, name)) for name in type(answer).model_fields}
    if isinstance(answer, list | tuple):
        return [plain(one) for one in answer]
    if isinstance(answer, dict):
        return {name: plain(value) for name, value in answer.items()}
    return answer


class Tenant:
    """One of them: its words, its model, and the steps it may take."""

    def __init__(self, number: int, cursors: list[tuple[str, str]], marks: Sequence[str]) -> None:
        self.name = f"tenant-{number:02}"
        self.mark = marks[number]
        self.spaces: dict[str, Space] = {}
        self._others = [mark for mark in marks if mark != self.mark]
        self._cursors = cursors

    # What it may do

    def step(self, rng: random.Random) -> Step:
        """Any call of the port, and its outcome; the model has taken the step already."""
        name = rng.choices(tuple(SPECS), (6, 6, 1))[0]
        kinds: list[tuple[int, Callable[[random.Random, str], Step]]] = [
            (4, self._create), (1, self._namespaces), (12, self._upsert), (4, self._get), (3, self._delete),
            (2, self._delete_where), (6, self._list), (10, self._search), (3, self._search_many),
            (2, self._stats), (2, self._fingerprints), (6, self._put_documents), (2, self._delete_documents),
            (3, self._restore), (1, self._delete_namespace), (1, self._erase),
        ]  # fmt: skip
        (kind,) = rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        return kind(rng, name)

    def looks(self, rng: random.Random) -> list[Step]:
        """Calls that show all that a tenant can see."""
        steps = [self._namespaces(rng, ""), self._stats(rng, "")]
        for name in SPECS:
            steps += [
                self._whole(name),
                self._fingerprints(rng, name),
                self._near(name),
                self._stranger(rng, name),
            ]
        return steps

    def _on(self, name: str, step: Callable[[Space], Step], what: str, call: Call) -> Step:
        """The step on the namespace, or the error where there is none."""
        space = self.spaces.get(name)
        return Step(what, call, missing(name)) if space is None else step(space)

    # Namespaces

    def _seen(self, space: Space) -> dict[str, Any]:
        counts = {"items": len(space.items), "documents": len(space.documents)}
        return plain(space.spec.model_copy(update=counts))

    def _create(self, rng: random.Random, name: str) -> Step:
        spec = SPECS[name]
        space = self.spaces.setdefault(name, Space(spec))
        space.calls += 1
        dimension = None if name == "notes" else spec.dimension
        embedder = "model-a" if name == "points" else None
        return Step(
            f"create {name}",
            lambda store: store.create_namespace(
                self.name, name, metric=spec.metric, dimension=dimension, embedder_id=embedder
            ),
            self._seen(space),
        )

    def _namespaces(self, rng: random.Random, name: str) -> Step:
        expected = [self._seen(self.spaces[one]) for one in sorted(self.spaces)]
        return Step("namespaces", lambda store: store.namespaces(self.name), expected)

    def _stats(self, rng: random.Random, name: str) -> Step:
        bounds = {one: (space.sequence, space.calls) for one, space in self.spaces.items()}
        spaces = dict(self.spaces)
        expected = [
            {
                "name": one,
                "items": len(space.items),
                "documents": len(space.documents),
                "vector_bytes": len(space.items) * space.spec.dimension * (2 if one == "notes" else 4),
            }
            for one, space in sorted(self.spaces.items())
        ]

        async def call(store: VectorStore) -> Any:
            found = await store.stats(self.name)
            for stats in found:
                # Over HTTP the key is a tenant's, which must not learn how much the others write.
                assert (stats.sequence is None) == isinstance(store, RemoteAgentDB), f"{self.name}: {stats!r}"
                if stats.sequence is None:
                    continue
                before, calls = bounds[stats.name]
                moved = stats.sequence - before
                assert moved >= 0, f"{self.name}: the sequence went back by {-moved}"
                assert calls or not moved, (
                    f"{self.name}: the sequence moved by {moved} without a call of ours"
                )
                spaces[stats.name].sequence = stats.sequence
                spaces[stats.name].calls -= calls
            return [
                {key: getattr(stats, key) for key in ("name", "items", "documents", "vector_bytes")}
                for stats in found
            ]

        return Step("stats", call, expected)

    def _delete_namespace(self, rng: random.Random, name: str) -> Step:
        existed = self.spaces.pop(name, None) is not None
        return Step(
            f"delete_namespace {name}", lambda store: store.delete_namespace(self.name, name), existed
        )

    def _erase(self, rng: random.Random, name: str) -> Step:
        count = sum(len(space.items) for space in self.spaces.values())
        self.spaces.clear()
        return Step("erase_tenant", lambda store: store.erase_tenant(self.name), count)

    # Items

    def _item(self, rng: random.Random, name: str, item_id: str, **more: Any) -> Item:
        text = " ".join((self.mark, *rng.sample(WORDS, 2), "common"))
        metadata = {"owner": self.mark, "k": "same", "n": rng.randrange(6)}
        vector = None if name == "notes" else VECTORS[item_id]
        return Item(id=item_id, text=text, metadata=metadata, vector=vector, **more)

    def _upsert(self, rng: random.Random, name: str) -> Step:
        items = [self._item(rng, name, item_id) for item_id in rng.sample(IDS, rng.randint(1, 4))]
        expected_version = rng.choice((None, None, None, None, 0, 1, 2))
        key = rng.choice((None, None, "key-0", "key-1"))
        space = self.spaces.get(name)
        if space is not None and key in space.requests and rng.random() < 0.5:
            items, expected_version = space.requests[key][0]

        def call(store: VectorStore) -> Awaitable[UpsertResult]:
            return store.upsert(
                self.name, name, items, expected_version=expected_version, idempotency_key=key
            )

        what = f"upsert {name} {[item.id for item in items]} at {expected_version} as {key}"
        return self._on(
            name, lambda space: Step(what, call, _upserted(space, items, expected_version, key)), what, call
        )

    def _restore(self, rng: random.Random, name: str) -> Step:
        items = [
            self._item(rng, name, item_id, version=rng.randrange(5), created_at_s=5.0, updated_at_s=6.0)
            for item_id in rng.sample(IDS, rng.randint(1, 3))
        ]
        if name == "notes":
            # The store's own vectors are restored as it gave them out; these have none and are embedded.
            items = [item.model_copy(update={"vector": None}) for item in items]
        what = f"restore {name}"

        def step(space: Space) -> Step:
            space.calls += 1
            for item in items:
                space.items[item.id] = item.model_copy(update={"version": max(item.version, 1)})
            return Step(what, call, len(items))

        def call(store: VectorStore) -> Awaitable[int]:
            return store.restore(self.name, name, items)

        return self._on(name, step, what, call)

    def _get(self, rng: random.Random, name: str) -> Step:
        ids = rng.sample(tuple(VECTORS), 5)
        what = f"get {name}"

        def call(store: VectorStore) -> Awaitable[list[Item]]:
            return store.get(self.name, name, ids)

        return self._on(
            name,
            lambda space: Step(what, call, [plain(space.items[key]) for key in ids if key in space.items]),
            what,
            call,
        )

    def _delete(self, rng: random.Random, name: str) -> Step:
        ids = rng.sample(tuple(VECTORS), 3)
        what = f"delete {name} {ids}"

        def step(space: Space) -> Step:
            space.calls += 1
            return Step(what, call, space.drop(ids))

        def call(store: VectorStore) -> Awaitable[int]:
            return store.delete(self.name, name, ids)

        return self._on(name, step, what, call)

    def _delete_where(self, rng: random.Random, name: str) -> Step:
        where = self._filter(rng) or {"n": 1}
        what = f"delete_where {name} {where}"

        def step(space: Space) -> Step:
            space.calls += 1
            return Step(what, call, space.drop([item.id for item in space.chosen(where)]))

        def call(store: VectorStore) -> Awaitable[int]:
            return store.delete_where(self.name, name, where)

        return self._on(name, step, what, call)

    def _filter(self, rng: random.Random) -> Filter | None:
        """A filter; some name another tenant's mark, or everything that is not ours."""
        other = rng.choice(self._others)
        filters: tuple[Filter | None, ...] = (
            None, {"k": "same"}, {"n": {"gte": rng.randrange(6)}}, {"owner": self.mark}, {"owner": other},
            {"not": {"owner": self.mark}}, {"@text": {"match": other}}, {"@version": {"gte": 2}},
            {"@id": {"in": ["i0", "a.md:0"]}}, {"or": [{"owner": other}, {"n": 3}]},
            {"owner": {"in": self._others}}, {"owner": {"ne": self.mark}},
        )  # fmt: skip
        return rng.choice(filters)

    def _list(self, rng: random.Random, name: str) -> Step:
        """A page; the place it begins at may have been given to any tenant."""
        where, limit = self._filter(rng), rng.randint(1, 4)
        cursor, after = rng.choice(self._cursors) if self._cursors and rng.random() < 0.6 else (None, "")
        what = f"list {name} {where} after {after!r}"

        def step(space: Space) -> Step:
            rest = [item for item in space.chosen(where) if item.id > after]
            expected = [plain(item) for item in rest[:limit]]
            return Step(what, call, {"items": expected, "more": len(rest) > limit})

        async def call(store: VectorStore) -> Any:
            page = await store.list_items(self.name, name, where=where, cursor=cursor, limit=limit)
            if page.cursor is not None:
                self._cursors.append((page.cursor, page.items[-1].id))
            return {"items": plain(page.items), "more": page.cursor is not None}

        return self._on(name, step, what, call)

    def _whole(self, name: str) -> Step:
        what = f"list {name}"

        async def call(store: VectorStore) -> Any:
            return (await store.list_items(self.name, name, limit=1000)).items

        return self._on(name, lambda space: Step(what, call, plain(space.chosen(None))), what, call)

    # Search

    def _query(self, rng: random.Random, name: str) -> tuple[SearchQuery, Callable[[Space], dict[str, Any]]]:
        """A query that all rows take part in, and what it must find of a namespace."""
        mode = rng.choice(("vector", "text", "hybrid"))
        word = rng.choice((*WORDS, "common", self.mark, rng.choice(self._others)))
        where = self._filter(rng)
        vector = None if name == "notes" else VECTORS[rng.choice(IDS)]
        query = SearchQuery(
            text=word,
            vector=vector,
            mode=mode,
            filter=where,
            k=1000,
            exact=rng.random() < 0.3,
            explain=rng.random() < 0.3,
            fusion=rng.choice(("zscore", "rrf")),
            mmr_lambda=rng.choice((None, None, 0.5)),
        )

        def found(space: Space) -> dict[str, Any]:
            chosen = space.chosen(where)
            if mode == "text":
                chosen = [item for item in chosen if word in item.text.split()]
            return {"hits": {item.id: plain(item) | {"vector": None} for item in chosen}}

        return query, found

    def _search(self, rng: random.Random, name: str) -> Step:
        query, found = self._query(rng, name)
        what = f"search {name} {query.mode} {query.text!r} {query.filter} {query.exact} {query.mmr_lambda}"

        def call(store: VectorStore) -> Awaitable[SearchResult]:
            return store.search(self.name, name, query)

        return self._on(name, lambda space: Step(what, call, found(space)), what, call)

    def _search_many(self, rng: random.Random, name: str) -> Step:
        pairs = [self._query(rng, name) for _ in range(3)]
        what = f"search_many {name} {[(q.mode, q.text, q.filter, q.exact, q.mmr_lambda) for q, _ in pairs]}"

        def call(store: VectorStore) -> Awaitable[list[SearchResult]]:
            return store.search_many(self.name, name, [query for query, _ in pairs])

        return self._on(name, lambda space: Step(what, call, [one(space) for _, one in pairs]), what, call)

    def _near(self, name: str) -> Step:
        """Everything, by likeness."""
        query = SearchQuery(
            text="common", vector=None if name == "notes" else VECTORS["i0"], mode="vector", k=1000
        )
        what = f"search all of {name}"

        def call(store: VectorStore) -> Awaitable[SearchResult]:
            return store.search(self.name, name, query)

        def step(space: Space) -> Step:
            hits = {key: plain(item) | {"vector": None} for key, item in space.items.items()}
            return Step(what, call, {"hits": hits})

        return self._on(name, step, what, call)

    def _stranger(self, rng: random.Random, name: str) -> Step:
        """Nothing, by the words of all others."""
        query = SearchQuery(text=" ".join(rng.sample(self._others, 20)), mode="text", k=1000)
        what = f"search {name} for strangers"

        def call(store: VectorStore) -> Awaitable[SearchResult]:
            return store.search(self.name, name, query)

        return self._on(name, lambda space: Step(what, call, {"hits": {}}), what, call)

    # Documents

    def _put_documents(self, rng: random.Random, name: str) -> Step:
        documents: list[Document] = []
        for path in rng.sample(PATHS, rng.randint(1, 2)):
            chunks = tuple(self._item(rng, name, f"{path}:{n}") for n in range(rng.randrange(4)))
            mark = Fingerprint(
                size_bytes=rng.randrange(9), mtime_ns=rng.randrange(9), sha256=rng.choice("ab")
            )
            documents.append(Document(path=path, fingerprint=mark, chunks=chunks))
        what = f"put_documents {name} {[(d.path, len(d.chunks)) for d in documents]}"

        def step(space: Space) -> Step:
            space.calls += 1
            return Step(what, call, sum(_put_document(space, document) for document in documents))

        def call(store: VectorStore) -> Awaitable[int]:
            return store.put_documents(self.name, name, documents)

        return self._on(name, step, what, call)

    def _fingerprints(self, rng: random.Random, name: str) -> Step:
        what = f"fingerprints {name}"

        def call(store: VectorStore) -> Awaitable[dict[str, Fingerprint]]:
            return store.fingerprints(self.name, name)

        return self._on(name, lambda space: Step(what, call, plain(space.documents)), what, call)

    def _delete_documents(self, rng: random.Random, name: str) -> Step:
        paths = rng.sample((*PATHS, "c.md"), 2)
        what = f"delete_documents {name}"

        def step(space: Space) -> Step:
            space.calls += 1
            gone = [path for path in paths if space.documents.pop(path, None) is not None]
            for path in gone:
                space.drop(space.chunks(path))
            return Step(what, call, len(gone))

        def call(store: VectorStore) -> Awaitable[int]:
            return store.delete_documents(self.name, name, paths)

        return self._on(name, step, what, call)


def _upserted(space: Space, items: Sequence[Item], expected_version: int | None, key: str | None) -> Any:
    """What an upsert answers; the space has it then."""
    request = (items, expected_version)
    if key is not None and key in space.requests:
        earlier, result = space.requests[key]
        if earlier == request:
            return plain(result)
        return Fault.of(
            Conflict(
                f"the idempotency key {key!r} was used for another request",
                hint="use a new key for a new request",
            )
        )
    versions = {item.id: space.items[item.id].version if item.id in space.items else 0 for item in items}
    for item_id, version in versions.items():
        if expected_version is not None and version != expected_version:
            return Fault.of(
                Conflict(
                    f"item {item_id!r} is at version {version!r}, not {expected_version!r}",
                    hint="read it again and repeat the change",
                )
            )
    space.calls += 1
    for item in items:
        space.items[item.id] = item.model_copy(update={"version": versions[item.id] + 1})
    inserted = sum(not version for version in versions.values())
    result = UpsertResult(
        ids=tuple(versions),
        versions=tuple(version + 1 for version in versions.values()),
        inserted=inserted,
        updated=len(versions) - inserted,
    )
    if key is not None:
        space.requests[key] = (request, result)
    return plain(result)


def _put_document(space: Space, document: Document) -> int:
    """How many chunks the document has then."""
    stored = space.documents.get(document.path)
    space.documents[document.path] = document.fingerprint
    if stored is not None and stored.sha256 == document.fingerprint.sha256 and not document.chunks:
        return len(space.chunks(document.path))
    space.drop(space.chunks(document.path))
    for chunk in document.chunks:
        space.items[chunk.id] = chunk.model_copy(update={"version": 1, "document": document.path})
    return len(document.chunks)


def new_tenants() -> list[Tenant]:
    """All of them, with nothing."""
    letters = "abcdefghij"
    marks = [f"qz{letters[n // 10]}{letters[n % 10]}vx" for n in range(TENANTS)]
    cursors: list[tuple[str, str]] = []
    return [Tenant(number, cursors, marks) for number in range(TENANTS)]


async def check(store: VectorStore, tenant: Tenant, step: Step) -> Any:
    """Take a step: the answer must be the model's, and speak of nobody else."""
    try:
        answer = await step.call(store)
    except AgenticFlowError as error:
        answer = Fault.of(error)
        strangers_in(tenant, f"{error!r} {error.details}", step.what)
    else:
        strangers_in(tenant, repr(answer), step.what)
    got = answer if isinstance(answer, Fault) else plain(answer)
    assert got == step.expected, f"{tenant.name}, {step.what}: {got!r} instead of {step.expected!r}"
    return answer


def strangers_in(tenant: Tenant, text: str, what: str) -> None:
    """Fail when a text names another tenant or holds its mark."""
    others = set(MARK.findall(text)) | set(re.findall(r"tenant-\d\d", text))
    assert others <= {tenant.mark, tenant.name}, f"{tenant.name}, {what}: {sorted(others)} in {text[:500]}"


async def live(
    store: VectorStore,
    seed: int,
    *,
    rounds: int,
    at_once: int,
    looks_every: int,
    alone: VectorStore | None = None,
) -> list[Tenant]:
    """Let 50 tenants act at random, some of them at the same time, and compare every answer.

    Args:
        seed: Of all that is drawn.
        rounds: How often some of them act.
        at_once: How many do so in one round.
        looks_every: Rounds between two looks of every tenant at all that it can see.
        alone: A store that one tenant has for itself: its answers must be the same there, scores included.
    """
    rng = random.Random(seed)
    tenants = new_tenants()
    for tenant in tenants:
        for name in ("notes", "points"):
            if rng.random() < 0.8:
                await _both(store, alone, tenants[0], tenant, tenant._create(rng, name))
    for number in range(1, rounds + 1):
        # The first acts in every round, so that it lives long enough to be compared.
        acting = [tenants[0], *rng.sample(tenants[1:], at_once - 1)]
        steps = [(tenant, tenant.step(rng)) for tenant in acting]
        await asyncio.gather(*(_both(store, alone, tenants[0], *pair) for pair in steps))
        if number % looks_every == 0 or number == rounds:
            for tenant in tenants:
                for step in tenant.looks(rng):
                    await check(store, tenant, step)
    return tenants


async def _both(
    store: VectorStore, alone: VectorStore | None, lone: Tenant, tenant: Tenant, step: Step
) -> None:
    answer = await check(store, tenant, step)
    if alone is not None and tenant is lone and step.what != "stats":
        there = await check(alone, tenant, step)
        assert scores(answer) == scores(there), f"{tenant.name}, {step.what}: other scores when it is alone"


def scores(answer: Any) -> Any:
    """What ranking made of each hit."""
    if isinstance(answer, SearchResult):
        return {
            hit.item.id: (round(hit.score, 5), {part: round(of, 5) for part, of in hit.score_parts.items()})
            for hit in answer.hits
        }
    return [scores(one) for one in answer] if isinstance(answer, list) else None
