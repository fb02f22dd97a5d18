"""Certificates of recalls: which items, in which words, answered a query, in a chain of hashes.

Each tenant has one chain. A certificate holds the hash of the one before it, so that none can be changed,
taken out or put in between without every later one showing it. Whoever can rewrite the whole database can
rewrite the whole chain as well: note its head elsewhere (`head`, and `verify(known=…)`) to notice that too.
A certificate holds digests and ids, never words: it survives the erasure of what it speaks of.

Issuers in any number of processes are safe without a lock: a certificate is inserted under its number, and
of two that want the same number the store lets one in.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol
from weakref import WeakValueDictionary

import orjson
from pydantic import Field

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, DataCorrupted, NotFound
from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Item
from agentic_flow.memory.records import RECALLS, Id, MemoryItem, Recall, Share
from agentic_flow.memory.rows import Rows

GENESIS = "0" * 64
"""What the first certificate of a chain has for the hash of the one before it."""

TRIES_MAX = 1000
"""Numbers an issuer tries; each one lost means that another issuer got on."""

PROBE = 64
"""Certificates looked for at once behind the last known one."""

HEAD_EVERY = 32
"""Certificates between two notes of how far the chain has come; it is found by probing from there."""

TENANTS_KNOWN_MAX = 1000
"""Tenants whose last certificate an issuer remembers."""

LISTED_MAX = 200
"""Breaks, and certificates whose items changed, that a report lists; it counts all."""

_ITEMS_AT_ONCE = 500
_KEY = "c."
_POINTER = "r."
_HEAD = "chain.head"
_ANCHOR = "chain.anchor"
_FLOAT_DIGITS = 9
_VERIFIED_AGAIN_MAX = 5

Finite = Annotated[float, Field(allow_inf_nan=False)]


class CertifiedItem(Frozen):
    """An item as it was shown."""

    id: str
    revision: int
    content_sha256: str
    score: Finite
    score_parts: dict[str, Finite] = Field(default_factory=dict[str, float])


class Certificate(Frozen):
    """What answered one recall. `hash` is over all other fields; `previous_hash` is the one before's.

    `withheld` are items kept back by chance, each with the chance `withheld_share`; `context_sha256` is of
    the block as the agent saw it, `task_sha256` of the query.
    """

    id: Id
    sequence: Annotated[int, Field(ge=1)]
    previous_hash: str
    hash: str = ""
    task_sha256: str
    context_sha256: str
    items: tuple[CertifiedItem, ...]
    withheld: tuple[str, ...] = ()
    withheld_share: Share = 0.0
    embedder_id: str
    semantic: bool
    at_s: Finite

    @property
    def shown(self) -> tuple[str, ...]:
        """Ids of the items, best first."""
        return tuple(item.id for item in self.items)


@dataclass(frozen=True, slots=True)
class ItemCheck:
    """What became of an item since. `changed`: its words are others now; `gone`: it is no more."""

    item_id: str
    status: Literal["same", "changed", "gone"]
    revision_then: int
    revision_now: int | None
    state_now: str | None


@dataclass(frozen=True, slots=True)
class CertificateCheck:
    """A certificate with its items as they are now."""

    id: str
    sequence: int
    at_s: float
    items: tuple[ItemCheck, ...]


@dataclass(frozen=True, slots=True)
class Break:
    """Where the chain does not hold, and how."""

    sequence: int
    problem: str


@dataclass(slots=True)
class Verification:
    """What `verify` found.

    `whole`: every certificate is as it was issued and follows from the one before. `breaks` and `differing`
    (certificates with items that changed or went) list the first `LISTED_MAX`; the counts are of all.
    `pruned`: certificates that were removed on purpose, before the first. `asked` is the one asked for.
    """

    certificates: int = 0
    first_sequence: int | None = None
    last_sequence: int | None = None
    head_hash: str = GENESIS
    pruned: int = 0
    breaks_total: int = 0
    breaks: list[Break] = field(default_factory=list[Break])
    same: int = 0
    changed: int = 0
    gone: int = 0
    differing: list[CertificateCheck] = field(default_factory=list[CertificateCheck])
    asked: CertificateCheck | None = None

    @property
    def whole(self) -> bool:
        """Whether the chain holds from its first certificate to its last."""
        return self.breaks_total == 0

    def broken(self, sequence: int, problem: str) -> None:
        """Note a break."""
        self.breaks_total += 1
        if len(self.breaks) < LISTED_MAX:
            self.breaks.append(Break(sequence, problem))


class Head(Frozen):
    """A certificate of the chain by its number and hash. Note it elsewhere to notice a rewritten chain."""

    sequence: int = 0
    hash: str = GENESIS


class _Anchor(Frozen):
    """The last certificate that was pruned."""

    sequence: int = 0
    hash: str = GENESIS
    pruned: int = 0


class ItemReader(Protocol):
    """Reads items as they are now. The bank is one."""

    async def get(self, tenant: str, ids: Sequence[str]) -> list[MemoryItem]:
        """Those that exist."""
        ...


def content_sha256(item: MemoryItem) -> str:
    """Digest of what an agent is shown of an item."""
    return _digest([item.title, item.description, item.content, item.lesson])


def certificate_hash(certificate: Certificate) -> str:
    """The hash of all of a certificate's fields but its hash, as JSON with sorted keys."""
    return _digest(certificate.model_dump(mode="json", exclude={"hash"}))


def certify(recall: Recall, previous: Head, *, at_s: float, withheld_share: float = 0.0) -> Certificate:
    """The certificate of a recall behind `previous`.

    Args:
        recall: It has its id.
        previous: The last certificate of the chain.
        at_s: Unix seconds.
        withheld_share: The chance with which each candidate was kept back.
    """
    unsigned = Certificate(
        id=recall.id,
        sequence=previous.sequence + 1,
        previous_hash=previous.hash,
        task_sha256=_text_digest(recall.task),
        context_sha256=_text_digest(recall.context),
        items=tuple(
            CertifiedItem(
                id=found.item.id,
                revision=found.item.revision,
                content_sha256=content_sha256(found.item),
                score=_rounded(found.score),
                score_parts={name: _rounded(part) for name, part in found.score_parts.items()},
            )
            for found in recall.items
        ),
        withheld=recall.withheld,
        withheld_share=_rounded(withheld_share),
        embedder_id=recall.embedder_id,
        semantic=recall.semantic,
        at_s=_rounded(at_s),
    )
    return unsigned.model_copy(update={"hash": certificate_hash(unsigned)})


def _rounded(value: float) -> float:
    # Stores write floats in their own ways; so few digits come back the same from all. `+ 0.0`: no -0.
    return round(float(value), _FLOAT_DIGITS) + 0.0


def _digest(value: object) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Certificates:
    """Issues and verifies the certificates of tenants.

    Args:
        store: Keeps them, in the namespace `memory.recalls`.
        items: Reads items, to compare them with what certificates say.
        clock: Dates them.
    """

    def __init__(self, store: VectorStore, items: ItemReader, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._rows = Rows(store, RECALLS, searched=False)
        self._items = items
        self._clock = clock
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reached: dict[str, Head] = {}

    async def issue(self, tenant: str, recall: Recall, *, withheld_share: float = 0.0) -> Certificate:
        """The next certificate of the tenant's chain, durable when this returns.

        Issued again for the same recall (a step that is repeated after a crash), it is the one of before.

        Args:
            tenant: Whose chain.
            recall: With its id, and without the items that were withheld.
            withheld_share: The chance with which each candidate was kept back.

        Raises:
            Conflict: the id has a certificate that says something else, or too many issuers were faster.
        """
        # Those of one process wait for each other here; the loop is for those of others.
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        async with turn:
            return await self._issued(tenant, recall, withheld_share)

    async def _issued(self, tenant: str, recall: Recall, withheld_share: float) -> Certificate:
        for _ in range(TRIES_MAX):
            earlier, head = await self._before(tenant, recall.id)
            if earlier is not None:
                return _same(earlier, recall)
            certificate = certify(recall, head, at_s=self._clock.time_s(), withheld_share=withheld_share)
            try:
                await self._rows.put(tenant, _as_rows(certificate), expected_version=0)
            except Conflict:
                continue
            reached = Head(sequence=certificate.sequence, hash=certificate.hash)
            if len(self._reached) >= TENANTS_KNOWN_MAX:
                self._reached.clear()
            self._reached[tenant] = reached
            if reached.sequence % HEAD_EVERY == 0:
                await self._note(tenant, _HEAD, reached)
            return certificate
        raise Conflict(
            f"no place in the chain of recalls for {recall.id!r} after {TRIES_MAX} tries",
            hint="too many recalls are certified at once; try again",
        )

    async def _before(self, tenant: str, recall_id: str) -> tuple[Certificate | None, Head]:
        """The certificate that the recall has already, if any, and the last one of the chain."""
        reached = self._reached.get(tenant, Head())
        pointer, here, behind = _POINTER + recall_id, _key(reached.sequence), _key(reached.sequence + 1)
        found = await self._rows.get(tenant, [pointer, here, behind])
        if pointer in found:
            return await self.get(tenant, recall_id), reached
        # Mostly this process was the last to issue one. The tenant may have been erased since, though.
        if behind not in found and here in found and found[here].metadata["hash"] == reached.hash:
            return None, reached
        return None, await self.head(tenant)

    async def get(self, tenant: str, recall_id: str) -> Certificate | None:
        """The certificate of a recall, or None.

        Raises:
            DataCorrupted: it is not in the place where it was put.
        """
        pointer = (await self._rows.get(tenant, [_POINTER + recall_id])).get(_POINTER + recall_id)
        if pointer is None:
            return None
        key = _key(int(pointer.metadata["sequence"]))
        row = (await self._rows.get(tenant, [key])).get(key)
        if row is None or row.metadata.get("id") != recall_id:
            raise DataCorrupted(
                f"the certificate of recall {recall_id!r} is not where it was put",
                hint="verify the chain; restore from a backup",
            )
        return _read(row)

    async def head(self, tenant: str) -> Head:
        """The last certificate of the chain; number 0 while there is none."""
        noted = await self._rows.get(tenant, [_HEAD, _ANCHOR])
        head = max((_head_of(noted.get(name)) for name in (_HEAD, _ANCHOR)), key=lambda one: one.sequence)
        while True:
            last = await self._last(tenant, head)
            cut = _head_of((await self._rows.get(tenant, [_ANCHOR])).get(_ANCHOR))
            if cut.sequence <= last.sequence:
                return last
            head = cut  # what was behind the noted one was pruned meanwhile

    async def _last(self, tenant: str, head: Head) -> Head:
        """The last one without a gap from this one on."""
        while True:
            # The noted one is not asked for: if somebody took it away, the chain goes on from its hash,
            # and verification shows the gap.
            behind = range(head.sequence + 1, head.sequence + 1 + PROBE)
            found = await self._rows.get(tenant, [_key(number) for number in behind])
            for number in behind:
                row = found.get(_key(number))
                if row is None:
                    return head
                head = Head(sequence=number, hash=str(row.metadata["hash"]))

    async def verify(
        self, tenant: str, recall_id: str | None = None, *, known: Head | None = None
    ) -> Verification:
        """Check the whole chain, and the items of one certificate, or of all, against those of now.

        Args:
            tenant: Whose chain.
            recall_id: The certificate whose items are to be checked; all, when None.
            known: A head that was noted earlier and must be in the chain.

        Raises:
            NotFound: there is no certificate of this recall.
        """
        report, anchor = await self._verified(tenant, recall_id, known)
        for _ in range(_VERIFIED_AGAIN_MAX):
            now = _anchor_of((await self._rows.get(tenant, [_ANCHOR])).get(_ANCHOR))
            if report.whole or anchor == now:
                break
            # What was pruned while it was read looks as if it were missing.
            report, anchor = await self._verified(tenant, recall_id, known)
        if recall_id is not None and report.asked is None:
            raise NotFound(
                f"there is no certificate of recall {recall_id!r}",
                hint="it may have been pruned; verify without an id to check the chain",
            )
        return report

    async def _verified(
        self, tenant: str, recall_id: str | None, known: Head | None
    ) -> tuple[Verification, _Anchor]:
        report = Verification()
        notes = await self._rows.get(tenant, [_HEAD, _ANCHOR])
        anchor = _anchor_of(notes.get(_ANCHOR))
        report.pruned = anchor.pruned
        last = Head(sequence=anchor.sequence, hash=anchor.hash)
        expected = [note for note in (_head_of(notes.get(_HEAD)), known) if note is not None]
        if known is not None and 0 < known.sequence == anchor.sequence and known.hash != anchor.hash:
            report.broken(anchor.sequence, "the certificate at which the chain was cut is not the noted one")
        batch: list[Certificate] = []
        async for row in self._rows.all(tenant, where={"kind": "certificate"}):
            number = _number(row)
            if number <= anchor.sequence:
                continue  # pruning was interrupted after it had noted how far it would go
            last, certificate = _follow(report, last, number, row, expected)
            if certificate is not None and recall_id in (None, certificate.id):
                batch.append(certificate)
            if len(batch) >= _ITEMS_AT_ONCE:
                await self._compare(tenant, batch, report, recall_id)
                batch = []
        await self._compare(tenant, batch, report, recall_id)
        for note in expected:
            if note.sequence > last.sequence:
                report.broken(last.sequence + 1, f"the chain ends before certificate {note.sequence}")
        report.head_hash = last.hash
        return report, anchor

    async def _compare(
        self, tenant: str, batch: Sequence[Certificate], report: Verification, recall_id: str | None
    ) -> None:
        wanted = sorted({item.id for certificate in batch for item in certificate.items})
        now: dict[str, MemoryItem] = {}
        for start in range(0, len(wanted), _ITEMS_AT_ONCE):
            found = await self._items.get(tenant, wanted[start : start + _ITEMS_AT_ONCE])
            now |= {item.id: item for item in found}
        for certificate in batch:
            checks = tuple(check_item(item, now.get(item.id)) for item in certificate.items)
            check = CertificateCheck(certificate.id, certificate.sequence, certificate.at_s, checks)
            for one in checks:
                setattr(report, one.status, getattr(report, one.status) + 1)
            if any(one.status != "same" for one in checks) and len(report.differing) < LISTED_MAX:
                report.differing.append(check)
            if certificate.id == recall_id:
                report.asked = check

    async def prune(self, tenant: str, before_s: float, *, keep: Collection[str] = ()) -> int:
        """Remove the certificates from before a time from the beginning of the chain; how many.

        The chain notes how far it was cut and still verifies from there. The last certificate stays, and
        so does everything from the first one in `keep` on.

        Args:
            tenant: Whose chain.
            before_s: Unix seconds.
            keep: Recall ids that are still needed.
        """
        for _ in range(TRIES_MAX):
            try:
                return await self._pruned(tenant, before_s, keep)
            except Conflict:
                continue  # another process prunes; what it has noted must not be taken back
        raise Conflict("the chain of recalls kept being pruned", hint="try again")

    async def _pruned(self, tenant: str, before_s: float, keep: Collection[str]) -> int:
        note = (await self._rows.get(tenant, [_ANCHOR])).get(_ANCHOR)
        anchor = _anchor_of(note)
        head = await self.head(tenant)
        gone: list[Certificate] = []
        async for row in self._rows.all(tenant, where={"kind": "certificate"}):
            certificate = _read(row)
            if certificate.sequence >= head.sequence or certificate.id in keep:
                break
            if certificate.at_s >= before_s:
                break
            gone.append(certificate)
        fresh = [certificate for certificate in gone if certificate.sequence > anchor.sequence]
        if fresh:
            anchor = _Anchor(
                sequence=fresh[-1].sequence, hash=fresh[-1].hash, pruned=anchor.pruned + len(fresh)
            )
            # First the note, then the removal: interrupted between them, the next pruning finishes it.
            await self._note(tenant, _ANCHOR, anchor, expected_version=0 if note is None else note.version)
        for start in range(0, len(gone), PROBE):
            part = gone[start : start + PROBE]
            await self._rows.delete(tenant, [_key(one.sequence) for one in part])
            await self._rows.delete(tenant, [_POINTER + one.id for one in part])
        return len(gone)

    async def _note(
        self, tenant: str, name: str, value: Head | _Anchor, *, expected_version: int | None = None
    ) -> None:
        metadata = {"kind": "chain", **value.model_dump(mode="json")}
        await self._rows.put(tenant, [Item(id=name, metadata=metadata)], expected_version=expected_version)


def check_item(then: CertifiedItem, now: MemoryItem | None) -> ItemCheck:
    """What became of a certified item."""
    if now is None:
        return ItemCheck(then.id, "gone", then.revision, None, None)
    same = then.revision == now.revision and then.content_sha256 == content_sha256(now)
    return ItemCheck(then.id, "same" if same else "changed", then.revision, now.revision, now.state)


def _follow(
    report: Verification, last: Head, number: int, row: Item, expected: Sequence[Head]
) -> tuple[Head, Certificate | None]:
    """Check the next row of the chain; the head after it, and its certificate if it can be read."""
    report.certificates += 1
    report.last_sequence = number
    if report.first_sequence is None:
        report.first_sequence = number
    stored = str(row.metadata.get("hash"))
    try:
        certificate = _read(row)
    except DataCorrupted as error:
        report.broken(number, error.message)
        return Head(sequence=number, hash=stored), None
    if number != last.sequence + 1:
        report.broken(last.sequence + 1, f"certificates {last.sequence + 1} to {number - 1} are missing")
    elif certificate.previous_hash != last.hash:
        report.broken(number, "it does not follow from the certificate before it")
    actual = certificate_hash(certificate)
    if certificate.hash != actual or certificate.sequence != number:
        report.broken(number, "it is not as it was issued")
    for note in expected:
        if note.sequence == number and note.hash != actual:
            report.broken(number, f"it is not the certificate that was noted as {note.hash[:12]}…")
    return Head(sequence=number, hash=certificate.hash), certificate


def _same(earlier: Certificate, recall: Recall) -> Certificate:
    """The certificate, if it says what the recall says."""
    shown = tuple((item.item.id, item.item.revision, content_sha256(item.item)) for item in recall.items)
    certified = tuple((item.id, item.revision, item.content_sha256) for item in earlier.items)
    if (certified, earlier.withheld, earlier.task_sha256) != (
        shown,
        recall.withheld,
        _text_digest(recall.task),
    ):
        raise Conflict(
            f"recall {recall.id!r} has a certificate that says something else",
            hint="give every recall an id of its own",
        )
    return earlier


def _as_rows(certificate: Certificate) -> list[Item]:
    """The certificate under its number, and its number under the recall's id."""
    metadata = {"kind": "certificate", **certificate.model_dump(mode="json")}
    pointer = {"kind": "recall", "sequence": certificate.sequence}
    return [
        Item(id=_key(certificate.sequence), metadata=metadata),
        Item(id=_POINTER + certificate.id, metadata=pointer),
    ]


def _key(sequence: int) -> str:
    return f"{_KEY}{sequence:012d}"


def _number(row: Item) -> int:
    digits = row.id.removeprefix(_KEY)
    return int(digits) if digits.isdecimal() else 0


def _read(row: Item) -> Certificate:
    fields = {name: value for name, value in row.metadata.items() if name != "kind"}
    try:
        return Certificate.model_validate(fields)
    except ValueError as error:
        raise DataCorrupted(f"certificate {row.id!r} cannot be read", hint="restore from a backup") from error


def _head_of(row: Item | None) -> Head:
    if row is None:
        return Head()
    return Head(sequence=int(row.metadata["sequence"]), hash=str(row.metadata["hash"]))


def _anchor_of(row: Item | None) -> _Anchor:
    if row is None:
        return _Anchor()
    return _Anchor.model_validate({name: value for name, value in row.metadata.items() if name != "kind"})
