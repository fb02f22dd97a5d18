"""What a crash test knows of an AgentDB: the calls a lane makes, and the rows each of them leaves.

A lane is a tenant that nobody else writes as, so that of each lane at most one call is under way when the
process dies. Calls carry the time they happen at: also the times of rows and what has expired are foretold.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.core.vectors import Document, Fingerprint, Item, Metric, Quantization, Vector

BASE_S = 1_700_000_000.0
LETTERS = "bcdfghklmnpqrtvw"  # no vowels: stemming leaves such words alone
GROUPS = ("amber", "birch", "cedar", "dahlia", "elder")
SINGLE_IDS, BATCH_IDS, BATCH_ROWS, PATHS = 40, 150, 100, 5
EMBEDDER = HashedNgramEmbedder(256)


class Spec(NamedTuple):
    """How a namespace is made. Without `embedder` the store embeds the texts."""

    metric: Metric
    dimension: int
    quantization: Quantization
    embedder: str | None = "test"


SPECS = {
    "plain": Spec("cosine", 64, "f32"),
    "short": Spec("euclidean", 16, "f32"),
    "half": Spec("cosine", 72, "f16"),
    "inner": Spec("dot", 64, "f16"),
    "words": Spec("cosine", 256, "f32", None),
}
LANES = (("plain", "short"), ("half", "words"), ("inner",))
"""Namespaces of each lane."""

Kind = Literal[
    "upsert", "batch", "versioned", "keyed", "delete", "delete_where", "documents", "refresh",
    "delete_documents", "restore", "create", "drop", "erase",
]  # fmt: skip
WEIGHTS: dict[Kind, int] = {
    "upsert": 30, "batch": 12, "versioned": 6, "keyed": 8, "delete": 12, "delete_where": 5, "documents": 14,
    "refresh": 3, "delete_documents": 4, "restore": 6, "drop": 3, "erase": 1,
}  # fmt: skip


class Call(NamedTuple):
    """One call of a lane. `number` tells everything that is in it, together with the ids."""

    lane: int
    number: int
    kind: Kind
    space: str
    ids: tuple[str, ...] = ()
    version: int | None = None
    group: str = ""

    @classmethod
    def told(cls, fields: Sequence[Any]) -> Call:
        """The call of a JSON array."""
        lane, number, kind, space, ids, version, group = fields
        return cls(lane, number, kind, space, tuple(ids), version, group)

    @property
    def now_s(self) -> float:
        return BASE_S + self.number


@dataclass(slots=True)
class Space:
    """Rows of a namespace by id, expired ones included, and its documents by path."""

    rows: dict[str, Item] = field(default_factory=dict[str, Item])
    documents: dict[str, Fingerprint] = field(default_factory=dict[str, Fingerprint])

    def live(self, now_s: float) -> dict[str, Item]:
        return {
            i: row for i, row in self.rows.items() if row.expires_at_s is None or row.expires_at_s > now_s
        }


def word(lane: int, number: int, position: int) -> str:
    """A word that no other row was ever given."""
    digits = f"{lane:x}{number:05x}{position:03x}"
    return "z" + "".join(LETTERS[int(digit, 16)] for digit in digits)


def own_word(item: Item) -> str:
    """The word that only this row has."""
    return item.text.rsplit(" ", 1)[1]


def items_of(call: Call) -> tuple[Item, ...]:
    """The items that the call stores."""
    spec = SPECS[call.space]
    chance = random.Random(f"{call.lane}/{call.number}")
    numbers = np.random.default_rng([call.lane, call.number])
    vectors = numbers.standard_normal((len(call.ids), spec.dimension)).astype(np.float32)
    kept = call.kind in ("documents", "keyed")
    return tuple(
        Item(
            id=item_id,
            text=f"the {chance.choice(GROUPS)} grove {word(call.lane, call.number, position)}",
            metadata={"group": chance.choice(GROUPS), "number": call.number},
            vector=None if spec.embedder is None else Vector(data=vectors[position].tobytes()),
            expires_at_s=None if kept or chance.random() < 0.7 else call.now_s + chance.randint(1, 12),
            valid_until_s=call.now_s + 1e6 if chance.random() < 0.1 else None,
        )
        for position, item_id in enumerate(call.ids)
    )


def restored_of(call: Call) -> tuple[Item, ...]:
    """The items that a `restore` stores: as another database had them."""
    return tuple(
        item.model_copy(
            update={"version": 3 + n, "created_at_s": BASE_S - 50.5, "updated_at_s": BASE_S - 20.25}
        )
        for n, item in enumerate(items_of(call))
    )


def documents_of(call: Call) -> tuple[Document, ...]:
    """The documents that the call stores; the ids are path#chunk."""
    by_path: dict[str, list[Item]] = {}
    for item in items_of(call):
        by_path.setdefault(item.id.partition("#")[0], []).append(item)
    mark = Fingerprint(size_bytes=call.number, mtime_ns=call.number, sha256=f"{call.number}")
    return tuple(Document(path=p, fingerprint=mark, chunks=tuple(chunks)) for p, chunks in by_path.items())


class Lane:
    """The rows that one tenant must have, and its next call."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tenant = f"lane{number}"
        self.names = LANES[number]
        self.spaces: dict[str, Space] = {}
        self.next = 1
        self.dead_words: list[tuple[str, str]] = []
        """Namespaces and words of rows that are no more, the newest last."""

    @property
    def now_s(self) -> float:
        return BASE_S + self.next

    def plan(self, chance: random.Random) -> Call:
        """A call that fits what there is."""
        name = chance.choice(self.names)
        call = Call(self.number, self.next, "create", name)
        space = self.spaces.get(name)
        if space is None:
            return call
        kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        live = space.live(call.now_s)
        singles = [f"i{n}" for n in chance.sample(range(SINGLE_IDS), chance.randint(1, 3))]
        match kind:
            case "upsert" | "keyed":
                return call._replace(kind=kind, ids=tuple(singles))
            case "restore":
                return call._replace(kind=kind, ids=(*singles, "r0", "r1"))
            case "batch":
                ids = [f"b{n}" for n in chance.sample(range(BATCH_IDS), BATCH_ROWS)]
                return call._replace(kind=kind, ids=tuple(ids))
            case "versioned":
                now = live[singles[0]].version if singles[0] in live else 0
                return call._replace(kind=kind, ids=(singles[0],), version=now + (chance.random() < 0.3))
            case "delete":
                known = sorted(live)
                ids = chance.sample(known, min(len(known), chance.choice((1, 1, 2, 30))))
                return call._replace(kind=kind, ids=(*ids, "never-was"))
            case "delete_where":
                return call._replace(kind=kind, group=chance.choice(GROUPS))
            case "documents":
                paths = chance.sample(range(PATHS), chance.randint(1, 2))
                ids = [f"doc{p}.md#{n}" for p in paths for n in range(chance.randint(1, 6))]
                return call._replace(kind=kind, ids=tuple(ids))
            case "refresh" | "delete_documents":
                return call._replace(kind=kind, ids=(f"doc{chance.randrange(PATHS)}.md",))
            case _:
                return call._replace(kind=kind)

    def apply(self, call: Call) -> Any:
        """Take the call in; what it must answer, None where that is not foretold."""
        assert call.number == self.next, "calls of a lane come one after the other"
        self.next += 1
        before = {(name, own_word(row)) for name, space in self.spaces.items() for row in space.rows.values()}
        answer = self._apply(call, call.now_s)
        after = {(name, own_word(row)) for name, space in self.spaces.items() for row in space.rows.values()}
        self.dead_words = [*self.dead_words, *sorted(before - after)][-150:]
        return answer

    def _apply(self, call: Call, now_s: float) -> Any:
        if call.kind == "create":
            self.spaces[call.space] = Space()
            return None
        if call.kind == "erase":
            self.spaces.clear()
            return None
        space = self.spaces[call.space]
        match call.kind:
            case "drop":
                del self.spaces[call.space]
                return True
            case "upsert" | "batch" | "keyed" | "versioned":
                return self._upsert(space, call, now_s)
            case "restore":
                space.rows |= {item.id: item for item in restored_of(call)}
                return len(call.ids)
            case "delete":
                gone = space.live(now_s).keys() & set(call.ids)
            case "delete_where":
                gone = {i for i, row in space.live(now_s).items() if row.metadata["group"] == call.group}
            case "documents":
                return self._documents(space, call, now_s)
            case "refresh":
                return self._refresh(space, call)
            case "delete_documents":
                known = [path for path in call.ids if space.documents.pop(path, None) is not None]
                space.rows = {i: row for i, row in space.rows.items() if row.document not in known}
                return len(known)
        for item_id in gone:
            del space.rows[item_id]
        return len(gone)

    @staticmethod
    def _upsert(space: Space, call: Call, now_s: float) -> Any:
        live = space.live(now_s)
        if call.version is not None:
            held = live.get(call.ids[0])
            if (held.version if held else 0) != call.version:
                return "conflict"
        versions: list[int] = []
        for item in items_of(call):
            was = live.get(item.id)
            told = {"version": 1, "created_at_s": now_s, "updated_at_s": now_s}
            if was is not None:
                told = {
                    "version": was.version + 1,
                    "created_at_s": was.created_at_s,
                    "updated_at_s": now_s,
                    "document": was.document,
                }
            space.rows[item.id] = item.model_copy(update=told)
            versions.append(space.rows[item.id].version)
        return versions

    @staticmethod
    def _documents(space: Space, call: Call, now_s: float) -> int:
        stored = documents_of(call)
        paths = {document.path for document in stored}
        space.rows = {i: row for i, row in space.rows.items() if row.document not in paths}
        for document in stored:
            space.documents[document.path] = document.fingerprint
            for item in document.chunks:
                told = {"version": 1, "created_at_s": now_s, "updated_at_s": now_s, "document": document.path}
                space.rows[item.id] = item.model_copy(update=told)
        return len(call.ids)

    @staticmethod
    def _refresh(space: Space, call: Call) -> int:
        """The same content under a new time: the chunks stay. An unknown path is a new empty document."""
        mark = refreshed(space.documents.get(call.ids[0]), call)
        space.documents[call.ids[0]] = mark
        return sum(row.document == call.ids[0] for row in space.rows.values())

    def after(self, calls: Sequence[Call]) -> Lane:
        """A copy with these calls taken in."""
        lane = copy.copy(self)
        lane.spaces = {
            name: Space(dict(space.rows), dict(space.documents)) for name, space in self.spaces.items()
        }
        for call in calls:
            lane.apply(call)
        return lane


def refreshed(known: Fingerprint | None, call: Call) -> Fingerprint:
    """The fingerprint that a `refresh` stores."""
    sha = known.sha256 if known is not None else f"{call.number}"
    return Fingerprint(size_bytes=call.number, mtime_ns=call.number, sha256=sha)


def stored_vector(item: Item, spec: Spec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The vector that the store must hold of an item, as float32."""
    if item.vector is None:
        return EMBEDDER.embed_now([item.text])[0]
    vector = np.frombuffer(item.vector.data, np.float32)
    if spec.quantization == "f32":
        return vector
    if spec.metric == "cosine":
        vector = vector / np.linalg.norm(vector)
    return vector.astype(np.float16).astype(np.float32)
