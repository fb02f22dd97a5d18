"""What every `VectorStore` must do, embedded or over HTTP.

A test gives `VectorStoreContract` a factory of empty stores and runs each scenario of `SCENARIOS`. Another
implementation imports this module and does the same.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from agentic_flow.core.errors import AgenticFlowError, Conflict, InvalidInput, NotFound, TooLarge
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Document, Fingerprint, Item, SearchQuery

E = TypeVar("E", bound=AgenticFlowError)

Advance = Callable[[float], None]
StoreFactory = Callable[[], AbstractAsyncContextManager[tuple[VectorStore, Advance]]]
"""Opens an empty store and gives the function that moves its clock, in seconds."""

TENANT, OTHER = "acme", "rival"
START_S = 1_700_000_000.0
"""What the clock of a store under test says at first."""

TEXTS = {
    "fox": "The quick brown fox jumps over the lazy dog.",
    "parser": "def parseConfigFile(path): read the settings file and return a mapping",
    "socket": "class SocketServer: accept connections and answer each in its own thread",
    "cycle": "raise CycleError when the graph of prerequisites has a cycle",
    "cache": "least recently used entries are evicted from the cache first",
}


async def raises(kind: type[E], call: Awaitable[Any]) -> E:
    """The error that the call raised; it must be of this kind and say what to do."""
    caught: E | None = None
    try:
        await call
    except kind as error:
        caught = error
    assert caught is not None, f"{kind.__name__} was not raised"
    assert caught.hint, f"{kind.__name__} without a hint: {caught.message}"
    return caught


def items(*names: str, **metadata: Any) -> list[Item]:
    return [Item(id=name, text=TEXTS[name], metadata={"name": name, **metadata}) for name in names]


def document(path: str, *texts: str, sha256: str = "", mtime_ns: int = 1) -> Document:
    """A document with one chunk per text, a line each."""
    return Document(
        path=path,
        fingerprint=Fingerprint(
            size_bytes=sum(map(len, texts)), mtime_ns=mtime_ns, sha256=sha256 or repr(texts)
        ),
        chunks=tuple(
            Item(
                id=f"{path}:{number}-{number}",
                text=text,
                metadata={"path": path, "line_start": number, "line_end": number},
            )
            for number, text in enumerate(texts, start=1)
        ),
    )


async def all_ids(store: VectorStore, tenant: str, namespace: str, **how: Any) -> list[str]:
    """Ids of every item, page by page."""
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await store.list_items(tenant, namespace, cursor=cursor, **how)
        found += [item.id for item in page.items]
        cursor = page.cursor
        if cursor is None:
            return found


class VectorStoreContract:
    """The scenarios. Each opens a store of its own.

    Args:
        factory: Opens an empty store whose clock starts at START_S.
    """

    def __init__(self, factory: StoreFactory) -> None:
        self._factory = factory

    async def check_namespaces(self) -> None:
        """Creating twice gives the same; other settings conflict; deleting takes everything along."""
        async with self._factory() as (store, _):
            assert await store.namespaces(TENANT) == []
            made = await store.create_namespace(TENANT, "docs")
            assert made == await store.create_namespace(TENANT, "docs")
            assert made.metric == "cosine"
            assert made.dimension >= 256
            await raises(Conflict, store.create_namespace(TENANT, "docs", metric="dot"))
            await raises(Conflict, store.create_namespace(TENANT, "docs", dimension=3))
            await store.create_namespace(TENANT, "a.b:c-d_e", metric="euclidean", dimension=3)
            await store.upsert(TENANT, "docs", items("fox", "cache"))
            await store.put_documents(TENANT, "docs", [document("a.py", "one", "two")])
            listed = await store.namespaces(TENANT)
            assert [(n.name, n.items, n.documents) for n in listed] == [("a.b:c-d_e", 0, 0), ("docs", 4, 1)]
            assert await store.delete_namespace(TENANT, "docs") is True
            assert await store.delete_namespace(TENANT, "docs") is False
            await raises(NotFound, store.get(TENANT, "docs", ["fox"]))
            assert (await store.create_namespace(TENANT, "docs")).items == 0
            assert (await store.search(TENANT, "docs", SearchQuery(text="fox"))).hits == ()

    async def check_bad_names(self) -> None:
        """Names that could mean something else are refused, not normalised."""
        async with self._factory() as (store, _):
            for name in ("a b", ".hidden", "x" * 129, "a/b", "ü"):
                await raises(InvalidInput, store.create_namespace(TENANT, name))
            await raises(InvalidInput, store.create_namespace(TENANT, "zero", dimension=0))

    async def check_upsert_and_get(self) -> None:
        """What went in comes out, in the order asked; versions grow; creation times stay."""
        async with self._factory() as (store, advance):
            await store.create_namespace(TENANT, "docs")
            metadata = {"n": 1, "x": 1.5, "s": "ü\n", "none": None, "list": [1, {"a": True}]}
            item = Item(id="weird/id ?#%&:1-2", text="some\ntext", metadata=metadata)
            result = await store.upsert(TENANT, "docs", [item, *items("fox")])
            assert (result.ids, result.versions) == ((item.id, "fox"), (1, 1))
            assert (result.inserted, result.updated) == (2, 0)
            got = await store.get(TENANT, "docs", ["fox", "absent", item.id, "fox"])
            assert [found.id for found in got] == ["fox", item.id, "fox"]
            assert (got[1].text, got[1].metadata, got[1].version) == (item.text, metadata, 1)
            assert got[1].created_at_s == got[1].updated_at_s == START_S
            advance(10)
            again = await store.upsert(TENANT, "docs", [item.model_copy(update={"text": "new"})])
            assert (again.versions, again.inserted, again.updated) == ((2,), 0, 1)
            [changed] = await store.get(TENANT, "docs", [item.id])
            assert (changed.text, changed.created_at_s, changed.updated_at_s) == (
                "new",
                START_S,
                START_S + 10,
            )
            assert (await store.upsert(TENANT, "docs", [])).ids == ()

    async def check_expected_version(self) -> None:
        """The slower of two writers is refused, and a refused batch changes nothing."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            await store.upsert(TENANT, "docs", items("fox"), expected_version=0)
            await raises(Conflict, store.upsert(TENANT, "docs", items("fox"), expected_version=0))
            await raises(Conflict, store.upsert(TENANT, "docs", items("cache"), expected_version=3))
            await store.upsert(TENANT, "docs", items("fox", changed=1), expected_version=1)
            await raises(Conflict, store.upsert(TENANT, "docs", items("cache", "fox"), expected_version=0))
            assert await store.get(TENANT, "docs", ["cache"]) == []
            [fox] = await store.get(TENANT, "docs", ["fox"])
            assert (fox.version, fox.metadata["changed"]) == (2, 1)

    async def check_idempotency(self) -> None:
        """A repeated request answers as the first did and changes nothing; its key serves no other."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            first = await store.upsert(TENANT, "docs", items("fox"), idempotency_key="k1")
            assert await store.upsert(TENANT, "docs", items("fox"), idempotency_key="k1") == first
            assert (await store.get(TENANT, "docs", ["fox"]))[0].version == 1
            await raises(Conflict, store.upsert(TENANT, "docs", items("cache"), idempotency_key="k1"))
            await store.create_namespace(TENANT, "more")
            elsewhere = await store.upsert(TENANT, "more", items("cache"), idempotency_key="k1")
            assert elsewhere.inserted == 1

    async def check_expiry(self) -> None:
        """No read shows an expired item, and its id is free again."""
        async with self._factory() as (store, advance):
            await store.create_namespace(TENANT, "docs")
            short = items("fox")[0].model_copy(update={"expires_at_s": START_S + 60})
            await store.upsert(TENANT, "docs", [short, *items("cache")])
            assert (await store.get(TENANT, "docs", ["fox"]))[0].expires_at_s == START_S + 60
            assert (await store.search(TENANT, "docs", SearchQuery(text="fox", k=1))).hits[0].item.id == "fox"
            advance(60)
            assert await store.get(TENANT, "docs", ["fox"]) == []
            assert await all_ids(store, TENANT, "docs") == ["cache"]
            for mode in ("hybrid", "vector", "text"):
                query = SearchQuery.model_validate({"text": "quick fox", "mode": mode})
                assert "fox" not in [h.item.id for h in (await store.search(TENANT, "docs", query)).hits]
            assert (await store.namespaces(TENANT))[0].items == 1
            assert await store.delete(TENANT, "docs", ["fox"]) == 0
            renewed = await store.upsert(TENANT, "docs", items("fox"), expected_version=0)
            assert renewed.versions == (1,)
            assert await all_ids(store, TENANT, "docs") == ["cache", "fox"]

    async def check_delete(self) -> None:
        """Deleting counts what was there, and no side of the search finds it afterwards."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            await store.upsert(TENANT, "docs", items(*TEXTS))
            await store.search(TENANT, "docs", SearchQuery(text="fox"))
            assert await store.delete(TENANT, "docs", ["fox", "absent"]) == 1
            assert await store.delete_where(TENANT, "docs", {"name": {"in": ["cache", "cycle", "fox"]}}) == 2
            await raises(InvalidInput, store.delete_where(TENANT, "docs", {}))
            for mode in ("hybrid", "vector", "text"):
                query = SearchQuery.model_validate({"text": "fox cache graph socket", "mode": mode})
                found = {hit.item.id for hit in (await store.search(TENANT, "docs", query)).hits}
                assert found <= {"parser", "socket"}, mode
                assert "socket" in found, mode

    async def check_paging(self) -> None:
        """Pages join to everything exactly once, in id order, with and without a filter."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            names = [f"item-{number:03d}" for number in range(57)]
            await store.upsert(
                TENANT,
                "docs",
                [
                    Item(id=name, text=name, metadata={"even": number % 2 == 0})
                    for number, name in enumerate(names)
                ],
            )
            for limit in (1, 10, 57, 100):
                assert await all_ids(store, TENANT, "docs", limit=limit) == names
            assert await all_ids(store, TENANT, "docs", limit=7, where={"even": True}) == names[::2]
            await raises(InvalidInput, store.list_items(TENANT, "docs", limit=0))
            await raises(InvalidInput, store.list_items(TENANT, "docs", cursor="not ours!"))

    async def check_filters(self) -> None:
        """Each operator keeps what it says, in search as in listing; what is none is refused."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            rows: list[dict[str, Any]] = [{"n": 1, "s": "a"}, {"n": 2.5, "s": "b"}, {"s": None}, {"n": True}]
            await store.upsert(
                TENANT,
                "docs",
                [Item(id=str(i), text="fox text", metadata=metadata) for i, metadata in enumerate(rows)],
            )
            wanted: list[tuple[dict[str, Any], list[str]]] = [
                ({}, ["0", "1", "2", "3"]),
                ({"n": 1.0}, ["0"]),
                ({"n": True}, ["3"]),
                ({"s": None}, ["2"]),
                ({"s": {"ne": "a"}}, ["1", "2", "3"]),
                ({"n": {"gt": 1, "lte": 2.5}}, ["1"]),
                ({"s": {"gte": "a", "lt": "b"}}, ["0"]),
                ({"s": {"in": ["b", None, 7]}}, ["1", "2"]),
                ({"s": {"exists": False}}, ["3"]),
                ({"or": [{"n": 1}, {"n": True}]}, ["0", "3"]),
                ({"not": {"n": {"exists": True}}, "s": {"exists": True}}, ["2"]),
                ({"and": [{"s": "a"}, {"n": 2}]}, []),
                ({"n' OR 1=1 --": 1}, []),
            ]
            for where, expected in wanted:
                assert await all_ids(store, TENANT, "docs", where=where) == expected, where
                for mode in ("hybrid", "vector", "text"):
                    query = SearchQuery.model_validate({"text": "fox", "mode": mode, "filter": where})
                    found = (await store.search(TENANT, "docs", query)).hits
                    assert sorted(hit.item.id for hit in found) == expected, (mode, where)
            refused: Sequence[dict[str, Any]] = (
                {"n": {"almost": 1}}, {"n": {}}, {"n": {"in": 3}}, {"and": {}}, {"not": []},
                {"n": {"gt": None}}, {"n": [1]}, {"n": {"exists": 1}},
            )  # fmt: skip
            for where in refused:
                await raises(InvalidInput, store.list_items(TENANT, "docs", where=where))
            deep: dict[str, Any] = {"n": 1}
            for _ in range(40):
                deep = {"not": deep}
            await raises(InvalidInput, store.list_items(TENANT, "docs", where=deep))

    async def check_search_modes(self) -> None:
        """Each mode finds by its own side, says what it did, and refuses a query it cannot serve."""
        async with self._factory() as (store, _):
            made = await store.create_namespace(TENANT, "docs")
            await store.upsert(TENANT, "docs", items(*TEXTS))
            for mode in ("hybrid", "vector", "text"):
                query = SearchQuery.model_validate({"text": "parse config", "mode": mode, "k": 2})
                found = await store.search(TENANT, "docs", query)
                assert found.hits[0].item.id == "parser", mode
                assert (found.mode, found.embedder_id) == (mode, made.embedder_id)
                scores = [hit.score for hit in found.hits]
                assert scores == sorted(scores, reverse=True)
                assert set(found.hits[0].score_parts) >= {"hybrid": {"text", "vector"}}.get(mode, {mode})
            # Inflected words and the parts of identifiers are the same words.
            text = SearchQuery(text="parsing configs", mode="text")
            assert (await store.search(TENANT, "docs", text)).hits[0].item.id == "parser"
            # Spelling alone: no whole word is shared.
            vector = SearchQuery(text="prerequisit graf", mode="vector", k=1)
            assert (await store.search(TENANT, "docs", vector)).hits[0].item.id == "cycle"
            await raises(InvalidInput, store.search(TENANT, "docs", SearchQuery()))
            await raises(InvalidInput, store.search(TENANT, "docs", SearchQuery(mode="text", vector=(1.0,))))
            await raises(NotFound, store.search(TENANT, "absent", SearchQuery(text="fox")))
            # Operators of the full-text language are only words.
            for odd in ('"', "fox AND", "NEAR(", "text: *", "'; DROP TABLE items", "\x00fox"):
                await store.search(TENANT, "docs", SearchQuery(text=odd))

    async def check_own_vectors(self) -> None:
        """Vectors that callers bring keep their values and are compared by the namespace's metric."""
        async with self._factory() as (store, _):
            points = {"east": (1.0, 0.0), "north": (0.0, 1.0), "far": (10.0, 1.0)}
            best = {"cosine": "east", "dot": "far", "euclidean": "east"}
            for metric, nearest in best.items():
                await store.create_namespace(TENANT, metric, metric=metric, dimension=2)  # pyright: ignore[reportArgumentType]
                await store.upsert(
                    TENANT, metric, [Item(id=name, text=name, vector=point) for name, point in points.items()]
                )
                found = await store.search(TENANT, metric, SearchQuery(vector=(1.0, 0.02), k=3))
                assert found.hits[0].item.id == nearest, metric
                assert (found.mode, found.semantic) == ("vector", False)
                assert (await store.get(TENANT, metric, ["far"]))[0].vector == points["far"]
                # Text alone is searched as text, and the answer says so.
                texted = await store.search(TENANT, metric, SearchQuery(text="north"))
                assert (texted.mode, [hit.item.id for hit in texted.hits]) == ("text", ["north"])
            for vector in (
                (1.0,),
                (1.0, 2.0, 3.0),
                (math.nan, 1.0),
                (math.inf, 1.0),
                (0.0, 0.0),
                (1e39, 0.0),
            ):
                if all(map(math.isfinite, vector)):
                    bad = Item(id="bad", vector=vector)
                    await raises(InvalidInput, store.upsert(TENANT, "cosine", [bad]))
                    await raises(InvalidInput, store.search(TENANT, "cosine", SearchQuery(vector=vector)))
            await raises(InvalidInput, store.upsert(TENANT, "cosine", [Item(id="bare", text="no vector")]))
            assert await all_ids(store, TENANT, "cosine") == ["east", "far", "north"]

    async def check_diversity(self) -> None:
        """MMR prefers something new to a copy; `per_document` limits what one document may take."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs", dimension=3)
            near = {"a": (1.0, 0.0, 0.0), "a-copy": (0.999, 0.001, 0.0), "b": (0.9, 0.0, 0.436)}
            await store.upsert(TENANT, "docs", [Item(id=i, text=i, vector=v) for i, v in near.items()])
            plain = SearchQuery(vector=(1.0, 0.0, 0.1), k=2)
            ids = [hit.item.id for hit in (await store.search(TENANT, "docs", plain)).hits]
            assert set(ids) == {"a", "a-copy"}
            diverse = plain.model_copy(update={"mmr_lambda": 0.3})
            ids = [hit.item.id for hit in (await store.search(TENANT, "docs", diverse)).hits]
            assert "b" in ids
            await store.create_namespace(TENANT, "files")
            await store.put_documents(
                TENANT,
                "files",
                [document("big.txt", *(f"fox number {n}" for n in range(9))), document("small.txt", "a fox")],
            )
            query = SearchQuery(text="fox", k=10, per_document=2)
            paths = [h.item.metadata["path"] for h in (await store.search(TENANT, "files", query)).hits]
            assert sorted(paths) == ["big.txt", "big.txt", "small.txt"]

    async def check_documents(self) -> None:
        """Replacing a document leaves nothing of the old one; equal content may refresh its times only."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            one, two = document("a.py", "alpha", "beta"), document("b/c.md", "gamma")
            assert await store.put_documents(TENANT, "docs", [one, two]) == 3
            assert await store.fingerprints(TENANT, "docs") == {
                "a.py": one.fingerprint,
                "b/c.md": two.fingerprint,
            }
            assert await all_ids(store, TENANT, "docs") == ["a.py:1-1", "a.py:2-2", "b/c.md:1-1"]
            assert await store.put_documents(TENANT, "docs", [document("a.py", "delta")]) == 1
            assert await all_ids(store, TENANT, "docs") == ["a.py:1-1", "b/c.md:1-1"]
            for mode in ("hybrid", "vector", "text"):
                query = SearchQuery.model_validate({"text": "alpha delta", "mode": mode})
                texts = [h.item.text for h in (await store.search(TENANT, "docs", query)).hits]
                assert texts[0] == "delta"
                assert "alpha" not in texts
            touched = two.model_copy(
                update={"chunks": (), "fingerprint": two.fingerprint.model_copy(update={"mtime_ns": 99})}
            )
            await store.put_documents(TENANT, "docs", [touched])
            assert (await store.fingerprints(TENANT, "docs"))["b/c.md"].mtime_ns == 99
            assert len(await store.get(TENANT, "docs", ["b/c.md:1-1"])) == 1
            emptied = document("b/c.md", sha256="other")
            await store.put_documents(TENANT, "docs", [emptied])
            assert await store.get(TENANT, "docs", ["b/c.md:1-1"]) == []
            assert await store.delete_documents(TENANT, "docs", ["a.py", "absent"]) == 1
            assert set(await store.fingerprints(TENANT, "docs")) == {"b/c.md"}
            assert await all_ids(store, TENANT, "docs") == []

    async def check_documents_are_atomic(self) -> None:
        """One bad document of a batch, and none of the batch is stored."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            await store.upsert(TENANT, "docs", [Item(id="taken.py:1-1", text="mine")])
            batch = [document("good.py", "fine"), document("taken.py", "stolen")]
            await raises(Conflict, store.put_documents(TENANT, "docs", batch))
            assert await store.fingerprints(TENANT, "docs") == {}
            assert await all_ids(store, TENANT, "docs") == ["taken.py:1-1"]
            twice = [document("a.py", "x"), document("a.py", "y")]
            await raises(InvalidInput, store.put_documents(TENANT, "docs", twice))

    async def check_tenants_are_walls(self) -> None:
        """Equal names in two tenants are two things; nothing of one shows in the other."""
        async with self._factory() as (store, _):
            for tenant in (TENANT, OTHER):
                await store.create_namespace(tenant, "docs")
            await store.upsert(TENANT, "docs", items("fox", "cache"))
            await store.put_documents(TENANT, "docs", [document("secret.py", "the secret fox")])
            assert (await store.namespaces(OTHER))[0].items == 0
            assert await store.get(OTHER, "docs", ["fox"]) == []
            assert await all_ids(store, OTHER, "docs") == []
            assert await store.fingerprints(OTHER, "docs") == {}
            assert await store.delete(OTHER, "docs", ["fox"]) == 0
            assert await store.delete_where(OTHER, "docs", {"name": "fox"}) == 0
            assert await store.delete_documents(OTHER, "docs", ["secret.py"]) == 0
            await store.upsert(
                OTHER, "docs", [Item(id="fox", text="another fox entirely")], expected_version=0
            )
            before = await store.search(OTHER, "docs", SearchQuery(text="fox"))
            assert [hit.item.text for hit in before.hits] == ["another fox entirely"]
            # Scores, too, must not tell how many rows the neighbour has.
            await store.upsert(TENANT, "docs", [Item(id=str(n), text="fox fox fox") for n in range(50)])
            assert await store.search(OTHER, "docs", SearchQuery(text="fox")) == before
            await store.create_namespace(TENANT, "only-mine")
            await raises(NotFound, store.search(OTHER, "only-mine", SearchQuery(text="fox")))
            assert await store.delete_namespace(OTHER, "only-mine") is False
            assert await store.erase_tenant(TENANT) == 53
            assert await store.erase_tenant(TENANT) == 0
            assert await store.namespaces(TENANT) == []
            assert await store.search(OTHER, "docs", SearchQuery(text="fox")) == before

    async def check_limits(self) -> None:
        """What is past a limit is refused by name, and nothing of it is stored."""
        async with self._factory() as (store, _):
            await store.create_namespace(TENANT, "docs")
            await raises(TooLarge, store.upsert(TENANT, "docs", [Item(id="big", text="x" * (1 << 20) + "x")]))
            heavy = Item(id="heavy", metadata={"blob": "x" * (1 << 20)})
            await raises(TooLarge, store.upsert(TENANT, "docs", [heavy]))
            await raises(InvalidInput, store.upsert(TENANT, "docs", items("fox", "fox")))
            assert await all_ids(store, TENANT, "docs") == []


SCENARIOS = tuple(name for name in vars(VectorStoreContract) if name.startswith("check_"))
