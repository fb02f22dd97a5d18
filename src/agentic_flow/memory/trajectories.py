"""Trajectories: what each run tried, what it observed and how it ended; also the queue of what is to learn.

A trajectory is one row of the tenant's namespace `memory.trajectories`, found by its task. Its `state` and
`due_at_s` make it an entry of a durable queue: whoever wants to learn from it claims it by compare-and-set of
the row's version, for as long as a lease. So several processes may learn from one store, and a crash loses
nothing: an entry whose lease ran out is due again. What comes in while a trajectory is open is kept in rows
of its own, so that its thousandth step costs what its first did.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import MemorySettings
from agentic_flow.core.vectors import Filter, Item, SearchQuery, Vector
from agentic_flow.memory.records import (
    ANSWER_CHARS_MAX,
    OBSERVATION_CHARS_MAX,
    STEPS_MAX,
    TRAJECTORIES,
    Outcome,
    Trajectory,
    TrajectoryStep,
    Verdict,
)

STEPS = "memory.steps"
"""Namespace of the steps of open trajectories, one row for each `append`."""

LEASE_S = 300.0
"""A claim lasts so long; whoever learns must be done by then."""

ATTEMPTS_TO_CHANGE_MAX = 16
VERDICTS_MAX = 32
CITED_MAX = 64
_STATED_MAX_BYTES = 512 * 1024
_USAGE_MAX_BYTES = 16 * 1024
_ERROR_CHARS_MAX = 2_000
_NAME_CHARS_MAX = 200
_KEPT_CHARS_MAX = 200
_KEPT_STEPS_MAX = 100
_DAY_S = 86_400.0
_PAGE = 500

Ended = Literal["completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A trajectory that one worker may learn from, until `trajectory.due_at_s`; `version` is its row's."""

    tenant: str
    trajectory: Trajectory
    version: int


class Trajectories:
    """Stores, finds and queues the trajectories of tenants. Outcomes, answers and steps are bounded.

    Args:
        store: Where they are kept.
        settings: Retention.
        clock: Times of what is stored, and of leases.
    """

    def __init__(self, store: VectorStore, settings: MemorySettings, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    # ---- writing -----------------------------------------------------------------------------------------

    async def start(self, tenant: str, trajectory: Trajectory) -> Trajectory:
        """Begin a trajectory, to which steps come by `append`; durable when it returns.

        Starting the same one again (same task, still open) changes nothing.

        Raises:
            Conflict: the id is taken by another trajectory, or this one has ended.
        """
        opened = bounded(trajectory).model_copy(
            update={
                "state": "open",
                "outcome": "open",
                "started_at_s": trajectory.started_at_s or self._clock.time_s(),
                "ended_at_s": None,
            }
        )
        try:
            await self._put(tenant, _item(opened), expected_version=0)
        except Conflict:
            has = await self.get(tenant, trajectory.id)
            if has is not None and has.state == "open" and has.task == opened.task:
                return has
            raise Conflict(
                f"the trajectory {trajectory.id!r} exists already", hint="choose another id for it"
            ) from None
        return opened

    async def append(
        self, tenant: str, trajectory_id: str, steps: Sequence[TrajectoryStep], *, key: str | None = None
    ) -> None:
        """Add steps to an open trajectory, in the order of the calls; durable when it returns.

        Args:
            key: A second call with the same key replaces the first, so that a retry adds nothing. It then
                also gives the order among calls with a key.

        Raises:
            NotFound: there is no such trajectory.
            Conflict: it has ended.
        """
        await self._open(tenant, trajectory_id)
        if not steps:
            return
        # The time gives the order; the tail keeps two calls within one tick of the clock apart.
        order = key or f"{self._clock.time_s():020.6f}.{secrets.token_hex(4)}"
        row = Item(
            id=f"{trajectory_id}/{order}",
            metadata={
                "trajectory": trajectory_id,
                "steps": [_bounded_step(step).model_dump(mode="json") for step in steps[:STEPS_MAX]],
            },
            vector=Vector((1.0,)),
        )
        try:
            await self._store.upsert(tenant, STEPS, [row])
        except NotFound:
            await self._store.create_namespace(tenant, STEPS, dimension=1)
            await self._store.upsert(tenant, STEPS, [row])

    async def finish(
        self,
        tenant: str,
        trajectory_id: str,
        *,
        outcome: Ended,
        answer: str = "",
        error: str | None = None,
        usage: dict[str, Any] | None = None,
        cited: Sequence[str] = (),
        verdict: Verdict | None = None,
    ) -> Trajectory:
        """Close an open trajectory: its steps are put together and it waits to be learned from.

        Finishing it again with the same outcome returns what is stored.

        Raises:
            NotFound: there is no such trajectory.
            Conflict: it ended with another outcome.
        """
        has = await self.get(tenant, trajectory_id)
        if has is None:
            raise _unknown(trajectory_id)
        if has.state != "open":
            if has.outcome == outcome:
                return has
            raise Conflict(
                f"the trajectory {trajectory_id!r} has ended as {has.outcome!r}",
                hint="give a verdict on it instead",
            )
        now_s = self._clock.time_s()
        closed = has.model_copy(
            update={
                "outcome": outcome,
                "answer": answer,
                "error": error,
                "usage": usage or {},
                "cited": tuple(cited),
                "ended_at_s": now_s,
                "state": "pending",
                "due_at_s": now_s,
            }
        )

        def change(stored: Trajectory) -> Trajectory | None:
            if stored.state != "open":
                return None  # somebody else finished it meanwhile
            ended = closed.model_copy(update={"verdicts": stored.verdicts})
            return ended if verdict is None else _with_verdict(ended, verdict, now_s)

        ended = await self._change(tenant, trajectory_id, change)
        await self._forget_steps(tenant, [trajectory_id])
        return ended

    async def record(self, tenant: str, trajectory: Trajectory) -> None:
        """Store a whole, ended trajectory at once; it waits to be learned from. Durable when it returns.

        The same id again replaces what is stored, verdicts that came meanwhile kept, until it was learned
        from: then nothing changes.
        """
        now_s = self._clock.time_s()
        ended = bounded(trajectory).model_copy(
            update={
                "state": "pending",
                "due_at_s": now_s,
                "started_at_s": trajectory.started_at_s or now_s,
                "ended_at_s": trajectory.ended_at_s or now_s,
            }
        )

        for attempt in range(ATTEMPTS_TO_CHANGE_MAX):
            found = await self._read(tenant, trajectory.id)
            version, item = 0, _item(ended)
            if found is not None:
                stored, version, _ = found
                if stored.state == "learned":
                    return
                item = _item(
                    ended.model_copy(
                        update={
                            "verdicts": ended.verdicts or stored.verdicts,
                            "item_ids": stored.item_ids,
                            "taught": stored.taught,
                            "attempts": stored.attempts,
                        }
                    )
                )
            try:
                await self._put(tenant, item, expected_version=version)
            except Conflict:
                if attempt == ATTEMPTS_TO_CHANGE_MAX - 1:
                    raise
            else:
                if found is not None and found[0].state == "open":
                    await self._forget_steps(tenant, [trajectory.id])
                return
        raise AssertionError("the last attempt returns or raises")

    async def keep(self, tenant: str, trajectory: Trajectory) -> bool:
        """Store an ended trajectory that needs no learning, such as one of an import.

        Returns:
            False when there is one of its id; then nothing changes.
        """
        now_s = self._clock.time_s()
        kept = bounded(trajectory).model_copy(
            update={"state": "learned", "due_at_s": now_s, "ended_at_s": trajectory.ended_at_s or now_s}
        )
        try:
            await self._put(tenant, _item(kept), expected_version=0)
        except Conflict:
            return False
        return True

    async def add_verdict(self, tenant: str, trajectory_id: str, verdict: Verdict) -> Trajectory:
        """Say what became of a trajectory. If it was learned from already, it will be again.

        A verdict replaces the earlier one of the same source and subject.

        Raises:
            NotFound: there is no such trajectory.
        """
        now_s = self._clock.time_s()

        def change(stored: Trajectory) -> Trajectory:
            judged = _with_verdict(stored, verdict, now_s)
            if stored.state == "open":
                return judged
            return judged.model_copy(
                update={"state": "pending", "due_at_s": now_s, "attempts": 0, "problem": None}
            )

        return await self._change(tenant, trajectory_id, change)

    # ---- reading -----------------------------------------------------------------------------------------

    async def get(self, tenant: str, trajectory_id: str) -> Trajectory | None:
        """The trajectory, with the steps that it has so far."""
        try:
            items = await self._store.get(tenant, TRAJECTORIES, [trajectory_id])
        except NotFound:
            return None
        if not items:
            return None
        trajectory = _parse(items[0])
        if trajectory.state == "open":
            steps = await self._appended(tenant, trajectory_id)
            return bounded(trajectory.model_copy(update={"steps": (*trajectory.steps, *steps)}))
        return trajectory

    async def list_trajectories(
        self,
        tenant: str,
        *,
        state: str | None = None,
        agent: str | None = None,
        outcome: str | None = None,
        since_s: float | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> tuple[list[Trajectory], str | None]:
        """One page in id order, and the cursor of the next. Open ones come without their newest steps.

        Args:
            since_s: Only those that started then or later, Unix seconds.
        """
        where: Filter = {
            name: value
            for name, value in (("state", state), ("agent", agent), ("outcome", outcome))
            if value is not None
        }
        if since_s is not None:
            where["started_at_s"] = {"gte": since_s}
        try:
            page = await self._store.list_items(
                tenant, TRAJECTORIES, where=where or None, cursor=cursor, limit=limit
            )
        except NotFound:
            return [], None
        return [_parse(item) for item in page.items], page.cursor

    async def recalls(self, tenant: str, *, started_before_s: float) -> set[str]:
        """Recall ids of the trajectories that there still are.

        Args:
            started_before_s: Only of those that started before then, Unix seconds.
        """
        found: set[str] = set()
        where: Filter = {"started_at_s": {"lt": started_before_s}}
        cursor: str | None = None
        while True:
            try:
                page = await self._store.list_items(
                    tenant, TRAJECTORIES, where=where, cursor=cursor, limit=_PAGE
                )
            except NotFound:
                return found
            found |= {recall for item in page.items if (recall := item.metadata.get("recall_id")) is not None}
            if (cursor := page.cursor) is None:
                return found

    async def similar(self, tenant: str, task: str, *, k: int = 5) -> list[Trajectory]:
        """Past trajectories of tasks like this one, nearest first."""
        try:
            found = await self._store.search(tenant, TRAJECTORIES, SearchQuery(text=task, k=k))
        except NotFound:
            return []
        return [_parse(hit.item) for hit in found.hits]

    async def tenants(self) -> list[str]:
        """Tenants that have trajectories, as far as this process may know them."""
        return await self._store.tenants_with(TRAJECTORIES)

    # ---- the queue ---------------------------------------------------------------------------------------

    async def due(self, tenant: str, now_s: float, limit: int = 16) -> list[str]:
        """Ids of trajectories that can be claimed at a time, in no particular order."""
        where: Filter = {"state": "pending", "due_at_s": {"lte": now_s}}
        try:
            page = await self._store.list_items(tenant, TRAJECTORIES, where=where, limit=limit)
        except NotFound:
            return []
        return [item.id for item in page.items]

    async def waiting(self, tenant: str, limit: int = 1000) -> int:
        """How many are not learned from yet, whether due, leased or backing off; counted up to a limit."""
        try:
            page = await self._store.list_items(tenant, TRAJECTORIES, where={"state": "pending"}, limit=limit)
        except NotFound:
            return 0
        return len(page.items)

    async def claim(self, tenant: str, trajectory_id: str, *, lease_s: float = LEASE_S) -> Claim | None:
        """Take a due trajectory for `lease_s` seconds; None when it is not due, or somebody was faster."""
        found = await self._read(tenant, trajectory_id)
        now_s = self._clock.time_s()
        if found is None:
            return None
        stored, version, vector = found
        if stored.state != "pending" or stored.due_at_s > now_s:
            return None
        taken = stored.model_copy(update={"due_at_s": now_s + lease_s, "attempts": stored.attempts + 1})
        try:
            result = await self._store.upsert(
                tenant, TRAJECTORIES, [_item(taken, vector)], expected_version=version
            )
        except Conflict:
            return None
        return Claim(tenant, taken, result.versions[0])

    async def settle(
        self,
        claim: Claim,
        *,
        item_ids: Sequence[str] = (),
        taught: Outcome | None = None,
        verdict: Verdict | None = None,
        learned: bool = True,
        problem: str | None = None,
        retry_at_s: float | None = None,
    ) -> bool:
        """Give a claimed trajectory back: learned from, to be tried again, or shelved.

        What was learned from is compressed: it keeps which steps it took, not what they observed.

        Args:
            item_ids: The items that carry what was distilled from it.
            taught: The outcome under which that was.
            verdict: What the judge said, to be kept.
            learned: False when it failed, with the `problem`; it is due again at `retry_at_s`, or shelved
                without that.

        Returns:
            False when it changed since it was claimed (a verdict came, the lease ran out): then nothing is
            written, and whoever holds it now, or its being due again, does the rest.
        """
        now_s = self._clock.time_s()
        found = await self._read(claim.tenant, claim.trajectory.id)
        if found is None or found[1] != claim.version:
            return False
        stored, version, vector = found
        if verdict is not None:
            stored = _with_verdict(stored, verdict, now_s)
        if learned:
            after = compressed(stored).model_copy(
                update={
                    "state": "learned",
                    "item_ids": tuple(item_ids),
                    "taught": taught,
                    "problem": None,
                    "due_at_s": now_s,
                }
            )
        else:
            after = stored.model_copy(
                update={
                    "state": "pending" if retry_at_s is not None else "shelved",
                    "problem": clip(problem or "", _ERROR_CHARS_MAX),
                    "due_at_s": now_s if retry_at_s is None else retry_at_s,
                }
            )
        try:
            await self._store.upsert(
                claim.tenant, TRAJECTORIES, [_item(after, vector)], expected_version=version
            )
        except Conflict:
            return False
        return True

    async def note_items(
        self, tenant: str, trajectory_id: str, item_ids: Sequence[str], taught: Outcome
    ) -> None:
        """Keep which items carry what was distilled from a trajectory that changed meanwhile, so that they
        can be taken back. While it is pending it is due at once: whoever claimed it meanwhile does not know
        of them, and cannot settle it any more.
        """
        now_s = self._clock.time_s()

        def change(stored: Trajectory) -> Trajectory:
            known = stored.item_ids if stored.taught in (taught, None) else ()
            ids = tuple(dict.fromkeys((*known, *item_ids)))
            due_at_s = now_s if stored.state == "pending" else stored.due_at_s
            return stored.model_copy(update={"item_ids": ids, "taught": taught, "due_at_s": due_at_s})

        await self._change(tenant, trajectory_id, change)

    async def retry_shelved(self, tenant: str) -> list[str]:
        """Make every shelved trajectory due again; their ids."""
        now_s = self._clock.time_s()
        again: list[str] = []

        def change(stored: Trajectory) -> Trajectory | None:
            if stored.state != "shelved":
                return None
            return stored.model_copy(update={"state": "pending", "due_at_s": now_s, "attempts": 0})

        cursor: str | None = None
        while True:
            page, cursor = await self.list_trajectories(tenant, state="shelved", cursor=cursor)
            for shelved in page:
                changed = await self._change(tenant, shelved.id, change)
                again += [changed.id] if changed.state == "pending" else []
            if cursor is None:
                return again

    async def expire(self, tenant: str) -> int:
        """Remove what is older than the retention; how many.

        Of learned ones their end counts, of open ones their start, of shelved ones when they were shelved.
        Pending ones stay: nobody has learned from them.
        """
        cut_s = self._clock.time_s() - self._settings.retention_days * _DAY_S
        where: Filter = {
            "or": [
                {"state": "learned", "ended_at_s": {"lt": cut_s}},
                {"state": "open", "started_at_s": {"lt": cut_s}},
                {"state": "shelved", "due_at_s": {"lt": cut_s}},
            ]
        }
        try:
            removed = await self._store.delete_where(tenant, TRAJECTORIES, where)
        except NotFound:
            return 0
        # Without the namespace no trajectory was ever open.
        with contextlib.suppress(NotFound):
            await self._store.delete_where(tenant, STEPS, {"@updated_at_s": {"lt": cut_s}})
        return removed

    # ---- rows --------------------------------------------------------------------------------------------

    async def _read(self, tenant: str, trajectory_id: str) -> tuple[Trajectory, int, Vector | None] | None:
        """The stored trajectory, its row's version, and its vector: to write it again without embedding."""
        try:
            page = await self._store.list_items(
                tenant, TRAJECTORIES, where={"@id": trajectory_id}, limit=1, vectors=True
            )
        except NotFound:
            return None
        if not page.items:
            return None
        item = page.items[0]
        # A task without words has no direction, which only the store's embedder may say.
        vector = item.vector if item.vector is not None and any(item.vector) else None
        return _parse(item), item.version, vector

    async def _change(
        self, tenant: str, trajectory_id: str, change: Callable[[Trajectory], Trajectory | None]
    ) -> Trajectory:
        """Read, change, compare and set, again when somebody was faster. None leaves it as it is.

        Raises:
            NotFound: there is no such trajectory.
        """
        for attempt in range(ATTEMPTS_TO_CHANGE_MAX):
            found = await self._read(tenant, trajectory_id)
            if found is None:
                raise _unknown(trajectory_id)
            stored, version, vector = found
            changed = change(stored)
            if changed is None:
                return stored
            changed = bounded(changed)
            try:
                await self._store.upsert(
                    tenant, TRAJECTORIES, [_item(changed, vector)], expected_version=version
                )
            except Conflict:
                if attempt == ATTEMPTS_TO_CHANGE_MAX - 1:
                    raise
            else:
                return changed
        raise AssertionError("the last attempt returns or raises")

    async def _put(self, tenant: str, item: Item, *, expected_version: int) -> None:
        try:
            await self._store.upsert(tenant, TRAJECTORIES, [item], expected_version=expected_version)
        except NotFound:
            await self._store.create_namespace(tenant, TRAJECTORIES)
            await self._store.upsert(tenant, TRAJECTORIES, [item], expected_version=expected_version)

    async def _open(self, tenant: str, trajectory_id: str) -> None:
        try:
            items = await self._store.get(tenant, TRAJECTORIES, [trajectory_id])
        except NotFound:
            items = []
        if not items:
            raise _unknown(trajectory_id)
        state = items[0].metadata.get("state")
        if state != "open":
            raise Conflict(f"the trajectory {trajectory_id!r} is {state!r}", hint="start another one")

    async def _appended(self, tenant: str, trajectory_id: str) -> list[TrajectoryStep]:
        rows: list[Item] = []
        cursor: str | None = None
        while True:
            try:
                page = await self._store.list_items(
                    tenant, STEPS, where={"trajectory": trajectory_id}, cursor=cursor, limit=1000
                )
            except NotFound:
                return []
            rows += page.items
            cursor = page.cursor
            if cursor is None:
                break
        return [TrajectoryStep.from_record(step) for row in rows for step in row.metadata["steps"]]

    async def _forget_steps(self, tenant: str, trajectory_ids: Sequence[str]) -> None:
        try:
            await self._store.delete_where(tenant, STEPS, {"trajectory": {"in": list(trajectory_ids)}})
        except NotFound:
            return  # it was recorded without any


# ---- pure ------------------------------------------------------------------------------------------------


def clip(text: str, chars_max: int) -> str:
    """The head of a text, marked where it was cut; what is no Unicode is replaced."""
    if len(text) > chars_max:
        text = text[: max(0, chars_max - 1)] + "…"
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def bounded(trajectory: Trajectory) -> Trajectory:
    """The trajectory within its limits: of too many steps the first and last stay, of long texts the head.

    `steps_total` keeps how many there were.
    """
    steps = trajectory.steps
    total = max(trajectory.steps_total, len(steps))
    if len(steps) > STEPS_MAX:
        head = STEPS_MAX // 4
        steps = (*steps[:head], *steps[head - STEPS_MAX :])
    chars_max = OBSERVATION_CHARS_MAX
    kept = tuple(_bounded_step(step, chars_max) for step in steps)
    while _size_bytes(kept) > _STATED_MAX_BYTES:
        chars_max //= 2
        kept = tuple(_bounded_step(step, chars_max) for step in kept)
    usage = trajectory.usage
    usage_bytes = len(orjson.dumps(usage, default=str))
    if usage_bytes > _USAGE_MAX_BYTES:
        usage = {"omitted_bytes": usage_bytes}
    return trajectory.model_copy(
        update={
            "task": clip(trajectory.task, len(trajectory.task)),
            "agent": clip(trajectory.agent, _NAME_CHARS_MAX),
            "model": clip(trajectory.model, _NAME_CHARS_MAX),
            "topology": clip(trajectory.topology, _NAME_CHARS_MAX),
            "steps": kept,
            "steps_total": total,
            "answer": clip(trajectory.answer, ANSWER_CHARS_MAX),
            "error": None if trajectory.error is None else clip(trajectory.error, _ERROR_CHARS_MAX),
            "usage": usage,
            "cited": tuple(dict.fromkeys(clip(one, _NAME_CHARS_MAX) for one in trajectory.cited))[:CITED_MAX],
        }
    )


def compressed(trajectory: Trajectory) -> Trajectory:
    """The trajectory without what its steps observed; which steps they were, and their errors, stay."""
    kept = trajectory.steps[:_KEPT_STEPS_MAX]
    return trajectory.model_copy(
        update={
            "compressed": True,
            "steps": tuple(
                step.model_copy(
                    update={
                        "action": clip(step.action, _KEPT_CHARS_MAX),
                        "observation": "",
                        "error": None if step.error is None else clip(step.error, _KEPT_CHARS_MAX),
                    }
                )
                for step in kept
            ),
            "answer": clip(trajectory.answer, OBSERVATION_CHARS_MAX),
        }
    )


def outcome_of(trajectory: Trajectory) -> Outcome:
    """What the verdict that counts says; unknown without one."""
    return trajectory.verdict.outcome if trajectory.verdict else "unknown"


def _bounded_step(step: TrajectoryStep, chars_max: int = OBSERVATION_CHARS_MAX) -> TrajectoryStep:
    return step.model_copy(
        update={
            "agent": clip(step.agent, min(_NAME_CHARS_MAX, chars_max)),
            "name": clip(step.name, min(_NAME_CHARS_MAX, chars_max)),
            "action": clip(step.action, chars_max),
            "observation": clip(step.observation, chars_max),
            "error": None if step.error is None else clip(step.error, chars_max),
        }
    )


def _size_bytes(steps: Sequence[TrajectoryStep]) -> int:
    return len(orjson.dumps([step.model_dump(mode="json") for step in steps]))


def _with_verdict(trajectory: Trajectory, verdict: Verdict, now_s: float) -> Trajectory:
    given = verdict if verdict.at_s else verdict.model_copy(update={"at_s": now_s})
    others = [
        one for one in trajectory.verdicts if (one.source, one.subject) != (given.source, given.subject)
    ]
    return trajectory.model_copy(update={"verdicts": (*others[1 - VERDICTS_MAX :], given)})


def _item(trajectory: Trajectory, vector: Vector | None = None) -> Item:
    return Item(
        id=trajectory.id,
        text=trajectory.task,
        metadata=trajectory.model_dump(mode="json", exclude={"id", "task"}),
        vector=vector,
    )


def _parse(item: Item) -> Trajectory:
    return Trajectory.from_record({**item.metadata, "id": item.id, "task": item.text})


def _unknown(trajectory_id: str) -> NotFound:
    return NotFound(
        f"there is no trajectory {trajectory_id!r}", hint="it may be past its retention; list those there are"
    )
