"""Learns from trajectories in the background: judge, distil, keep, credit what was used.

The queue is the store's own rows (see `trajectories`), so nothing is lost when a process dies, and several
may learn side by side. Every effect can be repeated: items have the ids of their trajectory, a credit counts
once for an item and a trajectory, and the trajectory is marked as learned last. So a crash anywhere in
between means that it is done again, not that it counts twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import AgenticFlowError, LimitExceeded
from agentic_flow.core.settings import MemorySettings
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.confidence import Credit, credit_weight
from agentic_flow.memory.distill import ITEMS_MAX, item_id
from agentic_flow.memory.prompting import plain
from agentic_flow.memory.records import SOURCE_TASK_CHARS_MAX, VERDICT_RANK, MemoryItem, Trajectory, Verdict
from agentic_flow.memory.trajectories import LEASE_S, Claim, Trajectories

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

POLL_S = 600.0
"""How often a process looks for what others left: leases that ran out, trajectories past their retention."""

CONSOLIDATED_AFTER = 200
"""Trajectories of a tenant that one process learns from until it consolidates the tenant's items."""

_BACKOFF_FIRST_S = 15.0
_BACKOFF_FACTOR = 6.0
_BACKOFF_MAX_S = 6 * 3600.0
_EXPIRED_EVERY_S = 6 * 3600.0
_LEASE_USED = 0.8
_DUE_AT_ONCE = 16
_DUE_MAX = 1000
# A process that dies in the middle of it counts an attempt as well, and is no fault of the trajectory.
_BEGUN_MAX_FACTOR = 4


class Judges(Protocol):
    """Gives verdicts; `judge.Judge` is one."""

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict: ...

    async def judging_model(self, principal: Principal) -> str | None: ...


class Distils(Protocol):
    """Writes items; `distill.Distiller` is one."""

    async def distill(
        self, principal: Principal, trajectory: Trajectory, verdict: Verdict, deadline: Deadline
    ) -> list[MemoryItem]: ...


class Expires(Protocol):
    """Rows that are kept for a time only; `trajectories.Trajectories` are."""

    async def tenants(self) -> list[str]:
        """Tenants that have any."""
        ...

    async def expire(self, tenant: str) -> int:
        """Remove a tenant's that are older than they are kept; how many."""
        ...


Hook = Callable[[Principal, Trajectory, Verdict], Awaitable[object]]
"""What else is learned from a judged trajectory. Run again on the same one, it must come to the same."""

Shown = Callable[[str, str], Awaitable[Sequence[str]]]
"""Tenant and id of a recall → ids of the items that it showed."""


@dataclass(frozen=True, slots=True)
class LearnerStats:
    """What one process has learned since it started.

    `failures` counts failed attempts by error code; `problem` is the newest failure.
    """

    learned: int = 0
    shelved: int = 0
    running: int = 0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    problem: str | None = None


class Learner:
    """Works through the trajectories that are due, of all tenants.

    Args:
        trajectories: The queue.
        bank: Takes items and credits.
        judge: Gives verdicts where nobody more trusted has.
        distiller: Writes items.
        settings: `attempts_max`, `learners_max`, `enabled`.
        clock: Time.
        after: What else is learned from each judged trajectory; an error of one is an error of the attempt.
        expiring: What else is kept for a time only; looked at after the trajectories.
        shown: Finds what a recall showed; None: only cited items are credited.
        principal_of: In whose name models are asked, by tenant.
        rng: Spreads the retries.
        lease_s: How long one attempt may take before another worker may begin it again.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        bank: Bank,
        judge: Judges,
        distiller: Distils,
        settings: MemorySettings,
        *,
        clock: Clock = SYSTEM_CLOCK,
        after: Sequence[Hook] = (),
        expiring: Sequence[Expires] = (),
        shown: Shown | None = None,
        principal_of: Callable[[str], Principal] | None = None,
        rng: random.Random | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self._trajectories = trajectories
        self._bank = bank
        self._judge = judge
        self._distiller = distiller
        self._settings = settings
        self._clock = clock
        self._after = tuple(after)
        self._expiring: tuple[Expires, ...] = (trajectories, *expiring)
        self._shown = shown
        self._principal_of = principal_of or _memory_principal
        self._rng = rng or random.Random()
        self._lease_s = lease_s
        self._places = asyncio.Semaphore(settings.learners_max)
        self._woken = asyncio.Event()
        # Of a tenant the ids that are due, or None: whatever is.
        self._dirty: dict[str, set[str] | None] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._later: dict[str, tuple[float, asyncio.Task[None]]] = {}
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._at_work: set[tuple[str, str]] = set()
        self._again: set[tuple[str, str]] = set()
        self._learned = 0
        self._overtaken = 0
        self._shelved = 0
        self._failures: Counter[str] = Counter()
        self._problem: str | None = None
        self._since: Counter[str] = Counter()
        self._expired_at_s: dict[tuple[int, str], float] = {}

    # ---- in the background -------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to learn, also from what earlier processes left. Needs a running event loop."""
        if not self._keepers:
            self._keepers = [asyncio.create_task(self._work()), asyncio.create_task(self._poll())]

    async def close(self) -> None:
        """Stop. What was begun is given back, and is due again."""
        tasks = [*self._keepers, *(task for _, task in self._later.values())]
        self._keepers, self._later = [], {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, tenant: str, trajectory_id: str | None = None) -> None:
        """Something of this tenant is due.

        Args:
            trajectory_id: It alone, which saves looking through the tenant's trajectories.
        """
        known = self._dirty.setdefault(tenant, set())
        if trajectory_id is None:
            self._dirty[tenant] = None
        elif known is not None:
            known.add(trajectory_id)
        self._woken.set()

    @property
    def stats(self) -> LearnerStats:
        """What this process has learned so far."""
        return LearnerStats(self._learned, self._shelved, self._running, dict(self._failures), self._problem)

    async def judging_model(self, principal: Principal) -> str | None:
        """The model that judges what leaves it open, or None when that goes mechanically."""
        return await self._judge.judging_model(principal)

    async def settle(self, tenant: str | None = None) -> None:
        """Learn from what is due now, started or not, and wait for what this process is at already.

        What failed and waits for its next attempt is not due.

        Args:
            tenant: Whose; None: every tenant's that this process may know of.
        """
        while True:
            begun = self._learned, self._overtaken
            tenants = [tenant] if tenant is not None else await self._trajectories.tenants()
            await asyncio.gather(*(self._drain(one) for one in tenants))
            await self._idle.wait()
            # What was finished meanwhile may have made others due; what stays due now is out of reach.
            if (self._learned, self._overtaken) == begun:
                return

    async def retry_shelved(self, tenant: str) -> list[str]:
        """Make what was shelved due again; the ids."""
        again = await self._trajectories.retry_shelved(tenant)
        if again:
            self.wake(tenant)
        return again

    async def _work(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            dirty, self._dirty = self._dirty, {}
            await asyncio.gather(*(self._drained(tenant, ids) for tenant, ids in dirty.items()))

    async def _drained(self, tenant: str, ids: set[str] | None) -> None:
        """Work through a tenant; when the store fails, later again."""
        try:
            if ids is None:
                await self._drain(tenant)
            else:
                await asyncio.gather(*(self.learn_one(tenant, one) for one in ids))
                await self._consolidate(tenant)
        except Exception as error:  # noqa: BLE001 - the loop must outlive whatever one tenant's rows cause
            self._note_failure(error, tenant=tenant)
            self._wake_at(tenant, self._clock.time_s() + _BACKOFF_FIRST_S)

    async def _poll(self) -> None:
        while True:
            try:
                for tenant in await self._trajectories.tenants():
                    self.wake(tenant)
            except Exception as error:  # noqa: BLE001 - as above
                self._note_failure(error)
            for place in range(len(self._expiring)):
                await self._expire(place)
            await self._clock.sleep(POLL_S)

    async def _expire(self, place: int) -> None:
        """Of all tenants, unless that was done not long ago; one that fails does not keep back the others."""
        kept = self._expiring[place]
        try:
            tenants = await kept.tenants()
        except Exception as error:  # noqa: BLE001 - as above
            self._note_failure(error)
            return
        now_s = self._clock.time_s()
        for tenant in tenants:
            if now_s - self._expired_at_s.get((place, tenant), -_EXPIRED_EVERY_S) < _EXPIRED_EVERY_S:
                continue
            try:
                await kept.expire(tenant)
                self._expired_at_s[place, tenant] = now_s
            except Exception as error:  # noqa: BLE001 - as above
                self._note_failure(error, tenant=tenant)

    def _wake_at(self, tenant: str, at_s: float) -> None:
        """Wake a tenant later, unless it will be woken earlier; only where it learns in the background."""
        if not self._keepers:
            return
        planned = self._later.get(tenant)
        if planned is not None and not planned[1].done():
            if planned[0] <= at_s:
                return
            planned[1].cancel()

        async def wait() -> None:
            await self._clock.sleep(max(0.0, at_s - self._clock.time_s()))
            self.wake(tenant)

        self._later[tenant] = (at_s, asyncio.create_task(wait()))

    # ---- one tenant --------------------------------------------------------------------------------------

    async def _drain(self, tenant: str) -> None:
        """Learn from all that is due of a tenant, each one tried once."""
        tried: set[str] = set()
        stuck = 0
        while True:
            # Past those that were tried and are due all the same: others were faster, or they are broken.
            ids = await self._trajectories.due(
                tenant, self._clock.time_s(), min(_DUE_MAX, stuck + _DUE_AT_ONCE)
            )
            fresh = [one for one in ids if one not in tried]
            if not fresh:
                break
            stuck = len(ids) - len(fresh)
            tried.update(fresh)
            await asyncio.gather(*(self.learn_one(tenant, one) for one in fresh))
        await self._consolidate(tenant)

    async def _consolidate(self, tenant: str) -> None:
        if self._since[tenant] >= CONSOLIDATED_AFTER:
            self._since[tenant] = 0
            await self._bank.consolidate(tenant)

    async def learn_one(self, tenant: str, trajectory_id: str) -> bool:
        """Learn from one trajectory if it is due; whether that was done, by this call."""
        one = tenant, trajectory_id
        if one in self._at_work:
            self._again.add(one)  # two at once would only undo each other
            return False
        self._at_work.add(one)
        try:
            async with self._places:
                self._running += 1
                self._idle.clear()
                try:
                    return await self._learn_claimed(tenant, trajectory_id)
                finally:
                    self._running -= 1
                    if not self._running:
                        self._idle.set()
        finally:
            self._at_work.discard(one)
            if one in self._again:
                self._again.discard(one)
                if self._keepers:
                    self.wake(tenant, trajectory_id)

    async def _learn_claimed(self, tenant: str, trajectory_id: str) -> bool:
        try:
            claim = await self._trajectories.claim(tenant, trajectory_id, lease_s=self._lease_s)
            if claim is None:
                # Somebody was faster, a verdict perhaps: it may be due still, and who asked was sent away.
                self._overtaken += (tenant, trajectory_id) in self._again
                return False
        except Exception as error:  # noqa: BLE001 - a row that cannot be read must not stop the others
            self._note_failure(error, tenant=tenant, trajectory=trajectory_id)
            return False
        try:
            if claim.trajectory.attempts > _BEGUN_MAX_FACTOR * self._settings.attempts_max:
                raise LimitExceeded(
                    f"learning from it was begun {claim.trajectory.attempts - 1} times and never ended",
                    hint="see why the process died meanwhile",
                )
            return await self._learn(claim)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(claim))
            raise
        except Exception as error:  # noqa: BLE001 - it is counted, kept with the trajectory and tried again
            await self._failed(claim, error)
            return False

    async def _learn(self, claim: Claim) -> bool:
        tenant, trajectory = claim.tenant, claim.trajectory
        principal = self._principal_of(tenant)
        deadline = Deadline.after(self._lease_s * _LEASE_USED, self._clock)
        verdict, judged = trajectory.verdict, False
        if verdict is None or VERDICT_RANK[verdict.source] <= VERDICT_RANK["judge"]:
            verdict, judged = await self._judge.judge(principal, trajectory, deadline), True
        shown = await self._shown_to(claim)
        item_ids = await self._kept(principal, trajectory, verdict, _used(trajectory, shown), deadline)
        await self._bank.credit(tenant, credits_of(trajectory, verdict, shown))
        for hook in self._after:
            await hook(principal, trajectory, verdict)
        done = await self._trajectories.settle(
            claim, item_ids=item_ids, taught=verdict.outcome, verdict=verdict if judged else None
        )
        if done:
            self._learned += 1
            self._since[tenant] += 1
        else:
            # It changed meanwhile: it is due again.
            await self._trajectories.note_items(tenant, trajectory.id, item_ids, verdict.outcome)
            self._overtaken += 1
            self._again.add((tenant, trajectory.id))
        return done

    async def _kept(
        self,
        principal: Principal,
        trajectory: Trajectory,
        verdict: Verdict,
        used: Sequence[str],
        deadline: Deadline,
    ) -> tuple[str, ...]:
        """The items that carry what it taught. What it taught under another outcome is taken back."""
        if trajectory.item_ids and trajectory.taught == verdict.outcome:
            return trajectory.item_ids
        if trajectory.item_ids or trajectory.attempts > 1 or trajectory.verdicts:
            # An attempt that died may have left items under their own ids, of whatever outcome it was told.
            own = [
                item_id(trajectory.id, outcome, number)
                for outcome in ("success", "failure")
                if outcome != verdict.outcome
                for number in range(1, ITEMS_MAX + 1)
            ]
            wrong = dict.fromkeys((*trajectory.item_ids, *own))
            await self._bank.retract(principal.tenant, trajectory.id, list(wrong))
        items = await self._distiller.distill(principal, trajectory, verdict, deadline)
        if not items:
            return ()
        key = _key(trajectory, items)
        added = await self._bank.add(principal.tenant, items, idempotency_key=key, used=used)
        return tuple(dict.fromkeys(one.merged_into or one.id for one in added))

    async def _shown_to(self, claim: Claim) -> Sequence[str]:
        recall_id = claim.trajectory.recall_id
        if self._shown is None or recall_id is None:
            return ()
        return await self._shown(claim.tenant, recall_id)

    # ---- failures ----------------------------------------------------------------------------------------

    async def _failed(self, claim: Claim, error: Exception) -> None:
        trajectory = claim.trajectory
        self._note_failure(error, tenant=claim.tenant, trajectory=trajectory.id)
        problem = error.message if isinstance(error, AgenticFlowError) else f"{type(error).__name__}: {error}"
        retry_at_s: float | None = None
        if trajectory.attempts < self._settings.attempts_max:
            asked_s = error.retry_after_s if isinstance(error, AgenticFlowError) else None
            pause_s = max(backoff_s(trajectory.attempts, self._rng.random()), asked_s or 0.0)
            retry_at_s = self._clock.time_s() + pause_s
        try:
            written = await self._trajectories.settle(
                claim, learned=False, problem=problem, retry_at_s=retry_at_s
            )
        except AgenticFlowError as again:
            # The store itself fails; the lease runs out, and then it is due again.
            self._note_failure(again, tenant=claim.tenant, trajectory=trajectory.id)
            retry_at_s = trajectory.due_at_s
        else:
            if written and retry_at_s is None:
                self._shelved += 1
                log.error(
                    "trajectory_shelved", tenant=claim.tenant, trajectory=trajectory.id, problem=problem
                )
        if retry_at_s is not None:
            self._wake_at(claim.tenant, retry_at_s)

    async def _give_back(self, claim: Claim) -> None:
        # When the store is closing as well, the lease runs out instead.
        with contextlib.suppress(AgenticFlowError):
            await self._trajectories.settle(
                claim, learned=False, problem="interrupted", retry_at_s=self._clock.time_s()
            )

    def _note_failure(self, error: Exception, **where: str) -> None:
        """Count it; log the first of each kind."""
        code = error.code if isinstance(error, AgenticFlowError) else type(error).__name__
        self._failures[code] += 1
        self._problem = f"{code}: {error}"
        if self._failures[code] == 1:
            log.warning("learning_failed", code=code, problem=str(error), **where)


# ---- pure ------------------------------------------------------------------------------------------------


def credits_of(trajectory: Trajectory, verdict: Verdict, shown: Sequence[str]) -> list[Credit]:
    """What a verdict says of the items that the run was shown.

    A cited item counts whole; those that were shown and not cited share half; all as sure as the verdict is.
    An unknown or impossible outcome says something of none: such credits only take back earlier ones.
    """
    cited = _used(trajectory, shown)
    task = plain(trajectory.task, SOURCE_TASK_CHARS_MAX)
    return [
        Credit(
            one,
            trajectory.id,
            verdict.outcome,
            credit_weight(one in cited, len(shown), verdict.confidence),
            verdict.source,
            task,
        )
        for one in dict.fromkeys((*cited, *shown))
    ]


def _used(trajectory: Trajectory, shown: Sequence[str]) -> list[str]:
    """The items that the run says it used, and that it was shown as far as that is known."""
    return [one for one in dict.fromkeys(trajectory.cited) if not shown or one in shown]


def backoff_s(attempts: int, draw: float) -> float:
    """Seconds until the next attempt after so many; `draw`, 0 to 1, spreads them by half around."""
    pause_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * _BACKOFF_FACTOR ** max(0, attempts - 1))
    return pause_s * (0.5 + draw)


def _key(trajectory: Trajectory, items: Sequence[MemoryItem]) -> str:
    """The same for the same words: a model may write others when it is asked again after a crash."""
    digest = hashlib.sha256(trajectory.id.encode())
    for item in items:
        digest.update(f"\0{item.id}\0{item.title}\0{item.description}\0{item.content}".encode())
    return f"learn-{digest.hexdigest()[:40]}"


def _memory_principal(tenant: str) -> Principal:
    return Principal(tenant, "memory", frozenset({"models:use", "memory:*"}))
