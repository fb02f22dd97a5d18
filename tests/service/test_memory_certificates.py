"""Certificates of recalls: the chain under several issuers, changed rows, changed items, erasure, pruning."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import Conflict, DataCorrupted, NotFound
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import Item, Page, UpsertResult, Vector
from agentic_flow.memory.certificates import (
    GENESIS,
    HEAD_EVERY,
    PROBE,
    Certificate,
    Certificates,
    Head,
    certificate_hash,
    certify,
    content_sha256,
)
from agentic_flow.memory.records import RECALLS, MemoryItem, Recall, RecalledItem

pytestmark = pytest.mark.anyio

T = "tenant"
SETTINGS = AgentDBSettings(embedding_dimension=256)


class Shelf:
    """Items that a test changes."""

    def __init__(self, *items: MemoryItem) -> None:
        self.items = {item.id: item for item in items}

    async def get(self, tenant: str, ids: Sequence[str]) -> list[MemoryItem]:
        return [self.items[one] for one in ids if one in self.items]


class LaterClock(SystemClock):
    """A clock that a test sets forward."""

    ahead_s = 0.0

    def time_s(self) -> float:
        return super().time_s() + self.ahead_s


def item(name: str, **more: Any) -> MemoryItem:
    return MemoryItem(
        id=name, **{"title": f"title of {name}", "content": f"what {name} says", "revision": 1, **more}
    )


def recall(name: str, *items: MemoryItem, **more: Any) -> Recall:
    found = tuple(
        RecalledItem(item=one, score=1 / 3, score_parts={"similarity": 0.1 + 0.2, "recency": 1e-7})
        for one in items
    )
    return Recall(id=name, task=f"task of {name}", items=found, context=f"[{name}]", embedder_id="e", **more)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[AgentDB]:
    async with AgentDB(tmp_path, SETTINGS) as opened:
        yield opened


async def tampered(db: AgentDB, sequence: int, /, **changes: Any) -> None:
    """Change fields of a stored certificate behind everybody's back."""
    (row,) = await db.get(T, RECALLS, [f"c.{sequence:012d}"])
    await db.upsert(T, RECALLS, [row.model_copy(update={"metadata": {**row.metadata, **changes}})])


async def test_a_certificate_says_what_was_shown_and_survives_a_restart(tmp_path: Path) -> None:
    """Catches a certificate that is not durable, loses digits, or has no place in the chain."""
    shelf = Shelf(item("a"), item("b", revision=3))
    async with AgentDB(tmp_path, SETTINGS) as db:
        issuer = Certificates(db, shelf)
        assert await issuer.get(T, "r1") is None
        assert (await issuer.verify(T)).certificates == 0
        first = await issuer.issue(
            T, recall("r1", *shelf.items.values(), withheld=("w",)), withheld_share=0.2
        )
        second = await issuer.issue(T, recall("r2"))
    async with AgentDB(tmp_path, SETTINGS) as db:
        issuer = Certificates(db, shelf)
        third = await issuer.issue(T, recall("r3", shelf.items["b"]))
        assert await issuer.get(T, "r1") == first
        assert await issuer.head(T) == Head(sequence=3, hash=third.hash)
        report = await issuer.verify(T)
    assert (first.sequence, second.sequence, third.sequence) == (1, 2, 3)
    assert [first.previous_hash, second.previous_hash, third.previous_hash] == [
        GENESIS,
        first.hash,
        second.hash,
    ]
    assert first.shown == ("a", "b")
    assert (first.withheld, first.withheld_share) == (("w",), 0.2)
    assert first.items[1].revision == 3
    assert first.items[1].content_sha256 == content_sha256(shelf.items["b"])
    assert "what a says" not in first.model_dump_json(), "a certificate holds digests, not words"
    assert report.whole
    assert (report.certificates, report.same, report.changed, report.gone) == (3, 3, 0, 0)


async def test_issuing_again_gives_the_same_certificate(db: AgentDB) -> None:
    """Catches a repeated step that lengthens the chain, and an id that two recalls share."""
    issuer, other = Certificates(db, Shelf()), Certificates(db, Shelf())
    first = await issuer.issue(T, recall("r", item("a")))
    await issuer.issue(T, recall("s", item("a")))
    assert await issuer.issue(T, recall("r", item("a"))) == first
    assert await other.issue(T, recall("r", item("a"))) == first
    with pytest.raises(Conflict, match="something else"):
        await issuer.issue(T, recall("r", item("b")))
    assert (await issuer.verify(T)).certificates == 2


async def test_many_issuers_make_one_chain(tmp_path: Path) -> None:
    """Catches a fork, a gap or a lost certificate when several processes issue at once."""
    issuers, each = 4, 2 * HEAD_EVERY
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(AgentDB(tmp_path, SETTINGS)) for _ in range(issuers)]
        certificates = [Certificates(store, Shelf()) for store in stores]

        async def work(number: int) -> list[Certificate]:
            return [
                await certificates[number].issue(T, recall(f"r{number}.{turn}", item("a")))
                for turn in range(each)
            ]

        issued = [one for part in await asyncio.gather(*map(work, range(issuers))) for one in part]
        report = await Certificates(stores[0], Shelf()).verify(T)
        assert sorted(one.sequence for one in issued) == list(range(1, issuers * each + 1))
        assert report.whole
        assert report.certificates == issuers * each
        assert report.head_hash == max(issued, key=lambda one: one.sequence).hash
        assert [await certificates[0].get(T, one.id) for one in issued[:5]] == issued[:5]


async def test_what_happened_to_the_items_is_told(db: AgentDB) -> None:
    """Catches a certificate that still vouches for an item that was edited or forgotten."""
    shelf = Shelf(item("a"), item("b"), item("c"), item("d"))
    issuer = Certificates(db, shelf)
    await issuer.issue(T, recall("r1", *shelf.items.values()))
    await issuer.issue(T, recall("r2", item("a")))
    shelf.items["b"] = item("b", revision=2, content="other words")
    shelf.items["d"] = item("d", content="other words under the same revision")
    del shelf.items["c"]
    report = await issuer.verify(T)
    assert report.whole
    assert (report.same, report.changed, report.gone) == (2, 2, 1)
    assert [check.id for check in report.differing] == ["r1"]
    asked = (await issuer.verify(T, "r1")).asked
    assert asked is not None
    assert [check.status for check in asked.items] == ["same", "changed", "gone", "changed"]
    assert (asked.items[1].revision_then, asked.items[1].revision_now) == (1, 2)
    again = (await issuer.verify(T, "r2")).asked
    assert again is not None
    assert [check.status for check in again.items] == ["same"]
    with pytest.raises(NotFound):
        await issuer.verify(T, "never")


@pytest.mark.parametrize(
    "changes",
    [
        {"items": []},
        {"at_s": 1.0},
        {"task_sha256": "0" * 64},
        {"withheld": ["a"]},
        {"semantic": True},
        {"sequence": 2},
        {"hash": "f" * 64},
        {"previous_hash": GENESIS},
        {"embedder_id": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_a_changed_certificate_breaks_the_chain(db: AgentDB, changes: dict[str, Any]) -> None:
    """Catches a field that the hash does not cover, and a row that cannot be read taken for a good one."""
    issuer = Certificates(db, Shelf(item("a")))
    for number in range(1, 6):
        await issuer.issue(T, recall(f"r{number}", item("a")))
    await tampered(db, 3, **changes)
    report = await issuer.verify(T)
    assert not report.whole
    assert {one.sequence for one in report.breaks} <= {3, 4}
    assert report.breaks[0].sequence == 3


async def test_a_forged_certificate_with_a_right_hash_breaks_the_next(db: AgentDB) -> None:
    """Catches a check of each certificate by itself: one made anew fits its hash, not its successor."""
    issuer = Certificates(db, Shelf(item("a")))
    issued = [await issuer.issue(T, recall(f"r{number}", item("a"))) for number in range(1, 5)]
    noted = Head(sequence=4, hash=issued[3].hash)
    forged = issued[1].model_copy(update={"items": ()})
    await tampered(db, 2, items=[], hash=certificate_hash(forged))
    report = await issuer.verify(T)
    assert [one.sequence for one in report.breaks] == [3]
    # Whoever makes every later one anew as well is found out by a head that was noted elsewhere.
    previous = forged.model_copy(update={"hash": certificate_hash(forged)})
    for later in issued[2:]:
        anew = later.model_copy(update={"previous_hash": previous.hash})
        previous = anew.model_copy(update={"hash": certificate_hash(anew)})
        await tampered(db, later.sequence, previous_hash=previous.previous_hash, hash=previous.hash)
    assert (await issuer.verify(T)).whole
    found = await issuer.verify(T, known=noted)
    assert [one.sequence for one in found.breaks] == [4]


async def test_missing_certificates_are_missed(db: AgentDB) -> None:
    """Catches certificates taken out of the middle, from the beginning or from the end."""
    issuer = Certificates(db, Shelf(item("a")))
    issued = [await issuer.issue(T, recall(f"r{number}", item("a"))) for number in range(1, HEAD_EVERY + 4)]
    await db.delete(T, RECALLS, ["c.000000000007", "c.000000000008"])
    report = await issuer.verify(T)
    assert [(one.sequence, one.problem) for one in report.breaks] == [(7, "certificates 7 to 8 are missing")]
    with pytest.raises(DataCorrupted):
        await issuer.get(T, "r7")
    await db.delete(T, RECALLS, ["c.000000000001"])
    assert (await issuer.verify(T)).breaks[0].sequence == 1
    tail = [f"c.{one.sequence:012d}" for one in issued if one.sequence >= HEAD_EVERY]
    await db.delete(T, RECALLS, tail)
    report = await issuer.verify(T)
    assert (report.breaks_total, report.breaks[-1].sequence) == (3, HEAD_EVERY)
    # The chain goes on from what it noted, and the gap stays visible.
    after = await Certificates(db, Shelf()).issue(T, recall("after", item("a")))
    assert after.sequence == HEAD_EVERY + 1
    assert HEAD_EVERY in {one.sequence for one in (await issuer.verify(T)).breaks}


async def test_tenants_have_chains_of_their_own(db: AgentDB) -> None:
    """Catches a chain that two tenants share, and an issuer that goes on with an erased one."""
    issuer = Certificates(db, Shelf())
    mine = [await issuer.issue(T, recall(f"r{number}")) for number in range(3)]
    theirs = await issuer.issue("other", recall("r0"))
    assert (theirs.sequence, theirs.previous_hash) == (1, GENESIS)
    assert await issuer.get("other", "r1") is None
    await db.erase_tenant(T)
    assert await issuer.get(T, "r0") is None
    anew = await issuer.issue(T, recall("r9"))
    assert (anew.sequence, anew.previous_hash) == (1, GENESIS)
    assert anew.hash != mine[0].hash
    assert (await issuer.verify(T)).whole
    assert (await issuer.verify("other")).certificates == 1


async def test_a_pruned_chain_still_verifies(db: AgentDB) -> None:
    """Catches retention that breaks the chain, removes what is needed, or leaves the rest unverifiable."""
    clock = LaterClock()
    issuer = Certificates(db, Shelf(), clock=clock)
    total = PROBE + 10
    for number in range(1, total + 1):
        await issuer.issue(T, recall(f"r{number}"))
    clock.ahead_s = 1000.0
    await issuer.issue(T, recall("late"))
    cut_s = clock.time_s() - 500
    assert await issuer.prune(T, cut_s, keep={f"r{total - 1}"}) == total - 2
    report = await issuer.verify(T)
    assert report.whole
    assert (report.certificates, report.pruned, report.first_sequence) == (3, total - 2, total - 1)
    assert await issuer.get(T, "r1") is None
    assert (await issuer.get(T, f"r{total}")) is not None
    assert await issuer.prune(T, cut_s + 10_000) == 2, "the last certificate carries the chain on"
    again = await Certificates(db, Shelf()).issue(T, recall("next"))
    assert again.sequence == total + 2
    assert (await issuer.verify(T)).whole
    await db.delete(T, RECALLS, [f"c.{total + 1:012d}"])
    assert not (await issuer.verify(T)).whole


async def test_an_interrupted_pruning_is_finished_by_the_next(db: AgentDB) -> None:
    """Catches certificates that a killed pruning left behind being reported as breaks, or staying forever."""
    issuer = Certificates(db, Shelf())
    issued = [await issuer.issue(T, recall(f"r{number}")) for number in range(1, 7)]
    anchor = {"kind": "chain", "sequence": 4, "hash": issued[3].hash, "pruned": 4}
    await db.upsert(T, RECALLS, [Item(id="chain.anchor", metadata=anchor, vector=Vector((1.0,)))])
    report = await issuer.verify(T)
    assert report.whole
    assert (report.certificates, report.pruned) == (2, 4)
    assert await issuer.prune(T, issued[3].at_s + 1e-3, keep={"r5"}) == 4
    report = await issuer.verify(T)
    assert (report.whole, report.certificates, report.pruned) == (True, 2, 4)


class Stepped(AgentDB):
    """A store before whose so-manieth call something else happens, which is not counted itself."""

    left: int | None = None
    meanwhile: Callable[[], Awaitable[object]]

    async def step(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                await self.meanwhile()

    async def get(self, tenant: str, namespace: str, ids: Sequence[str]) -> list[Item]:
        await self.step()
        return await super().get(tenant, namespace, ids)

    async def upsert(self, tenant: str, namespace: str, items: Sequence[Item], **more: Any) -> UpsertResult:
        await self.step()
        return await super().upsert(tenant, namespace, items, **more)

    async def list_items(self, tenant: str, namespace: str, **more: Any) -> Page:
        await self.step()
        return await super().list_items(tenant, namespace, **more)

    async def delete(self, tenant: str, namespace: str, ids: Sequence[str]) -> int:
        await self.step()
        return await super().delete(tenant, namespace, ids)


@pytest.mark.parametrize("calls", ["prune", "verify", "issue"])
async def test_who_prunes_at_the_same_time_breaks_nothing(tmp_path: Path, calls: str) -> None:
    """Catches a pruning that takes back how far another one has cut the chain, and a verification, or an
    issuer, that takes what was pruned meanwhile for missing."""
    async with Stepped(tmp_path, SETTINGS) as store:
        for moment in range(1000):
            tenant = f"t{moment}"
            issuer, other = Certificates(store, Shelf()), Certificates(store, Shelf())
            for number in range(1, 7):
                await issuer.issue(tenant, recall(f"r{number}"))
            future_s = SystemClock().time_s() + 60
            store.left = moment
            store.meanwhile = partial(other.prune, tenant, future_s, keep={"r5"})
            if calls == "prune":
                await issuer.prune(tenant, future_s, keep={"r3", "r5"})
            elif calls == "verify":
                assert (await issuer.verify(tenant)).whole, moment
            else:
                assert (await Certificates(store, Shelf()).issue(tenant, recall("next"))).sequence == 7
            if store.left is not None:
                break
            report = await issuer.verify(tenant)
            assert (report.whole, report.first_sequence, report.pruned) == (True, 5, 4), moment
        assert moment >= 2


names = st.text(alphabet="abcdef012345.", min_size=1, max_size=12).map(lambda text: "x" + text)
recalls = st.builds(
    Recall,
    id=names,
    task=st.text(max_size=40),
    context=st.text(max_size=40),
    items=st.lists(
        st.builds(
            RecalledItem,
            item=st.builds(
                MemoryItem,
                id=names,
                title=st.text(min_size=1, max_size=20),
                content=st.text(min_size=1, max_size=20),
                revision=st.integers(1, 9),
            ),
            score=st.floats(-10, 10),
        ),
        max_size=4,
    ).map(tuple),
)


@given(recalls, st.floats(0, 4e9), st.randoms(use_true_random=False))
def test_every_field_is_under_the_hash(shown: Recall, at_s: float, rng: random.Random) -> None:
    """Catches a field that can be changed without the hash showing it, and a hash that JSON would change."""
    certificate = certify(shown, Head(sequence=4, hash="a" * 64), at_s=at_s)
    assert certificate.hash == certificate_hash(
        Certificate.model_validate_json(certificate.model_dump_json())
    )
    field = rng.choice([name for name in Certificate.model_fields if name != "hash"])
    other: dict[str, Any] = {"items": (), "withheld": ("x",), "semantic": True, "id": "another"}
    value = getattr(certificate, field)
    changed = other.get(field, value + 1 if isinstance(value, int | float) else f"{value}x")
    if changed != value:
        assert certificate_hash(certificate.model_copy(update={field: changed})) != certificate.hash
