"""Decisions of the run engine, without I/O: who lives, who may have a run, who may record, who is next.

The engine and its stores ask these functions and carry out what they say, so that every decision can be
tested, and a simulation can drive them on a clock of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from agentic_flow.core.ports import RunState

Status = Literal["queued", "running", "completed", "failed", "cancelled", "given_up"]
"""What a stored workflow says of itself; whether its owner lives is another question (`state_of`)."""

UNFINISHED: tuple[Status, ...] = ("queued", "running")
ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})
TAKEOVERS_MAX = 100
"""A workflow that took so many processes down with it is left alone until somebody resumes it."""

QUEUED_BY = "(queue)"
"""The owner of what waits in a shared queue: no process, and yet not dead."""
HANDED_ON = "(handed on)"
"""The owner of what a process has let go of on purpose: no process, and dead, but nobody to wait for."""
DEFAULT_QUEUE = "default"

Permission = Literal["granted", "cancelled", "lost"]
ClaimVerdict = Literal["claim", "give_up", "leave"]


@dataclass(frozen=True, slots=True)
class Fence:
    """Whose a tree is: the process, and how often it had changed hands when that process got it."""

    executor_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StoredWorkflow:
    """The part of a stored workflow that decisions need; owner and epoch are those of a top-level one."""

    status: str
    executor_id: str
    epoch: int


def is_alive(heartbeat_at_s: float, now_s: float, lease_s: float, *, holds_lock: bool | None) -> bool:
    """Whether a process still works.

    Args:
        heartbeat_at_s: Its last sign of life, in seconds of the clock that `now_s` is of.
        now_s: The present.
        lease_s: So long a silence is forgiven.
        holds_lock: Whether it holds the lock on its file; None where there are no lock files.
    """
    return holds_lock is not False and heartbeat_at_s >= now_s - lease_s


def may_record(
    root: StoredWorkflow | None, workflow: StoredWorkflow | None, fence: Fence, *, ending: str | None = None
) -> Permission:
    """Whether an execution may still write to the store.

    Args:
        root: The stored top-level workflow of its tree, or None when it is gone.
        workflow: The stored workflow itself (the same as `root` for a top-level one).
        fence: What the execution believes to hold.
        ending: The status it wants to end with. To write it twice, when the answer to the first was lost, is
            no harm.
    """
    if root is None or workflow is None or (root.executor_id, root.epoch) != (fence.executor_id, fence.epoch):
        return "lost"
    if workflow.status in UNFINISHED or workflow.status == ending:
        return "granted"
    return "cancelled" if workflow.status == "cancelled" else "lost"


def claim_verdict(status: str, *, owner_lives: bool, takeovers: int, asked: bool) -> ClaimVerdict:
    """Whether a process may take a top-level workflow over.

    Args:
        status: Its stored status.
        owner_lives: Whether the process that has it works.
        takeovers: How often it was taken over since somebody last asked for it.
        asked: Somebody asks for this one: then also when it was cancelled or given up.
    """
    if status in UNFINISHED:
        if owner_lives:
            return "leave"
        return "claim" if asked or takeovers < TAKEOVERS_MAX else "give_up"
    return "claim" if asked and status in ("cancelled", "given_up") else "leave"


def state_of(status: str, root_status: str, *, owner_lives: bool, paused: bool = False) -> RunState:
    """What to say of a workflow, from what is stored and whether the owner of its tree lives.

    A paused one whose owner is dead is interrupted: to lift the pause would not be enough to continue it.
    """
    if status in ("completed", "failed", "cancelled"):
        return status
    if status == "given_up" or not owner_lives:
        return "interrupted"
    if paused and root_status in UNFINISHED:
        return "paused"
    if root_status == "queued":
        return "queued"
    return "running" if root_status == "running" else "interrupted"


class Custody:
    """What a process holds, beside what the store says that it owns.

    The two part when an answer of the store is lost, or when others took something over.
    """

    def __init__(self) -> None:
        self._idle_before: frozenset[str] = frozenset()
        self._rounds = 0

    def doubt(self) -> None:
        """Something may be ours in the store that nobody here executes: a write whose answer is not known."""
        self._rounds = 2  # the comparison under way may have asked the store before that write

    def must_compare(self, held: Collection[str]) -> bool:
        """Whether to ask the store what this process owns. `held` are the workflows it executes."""
        return bool(held) or self._rounds > 0

    def lost(self, held: Mapping[str, int], owned: Mapping[str, int]) -> list[str]:
        """What it executes and does not own any more; both with their epochs, `held` read before `owned`."""
        return [workflow_id for workflow_id, epoch in held.items() if owned.get(workflow_id) != epoch]

    def to_release(
        self, owned: Mapping[str, int], executed: Collection[str], under_way: Collection[str]
    ) -> dict[str, int]:
        """What it owns and nobody executes, when that was so the last time as well, with the epochs.

        Once is no proof: a workflow may have ended between the reading of `owned` and that of `executed`.

        Args:
            owned: What the store says, with epochs.
            executed: What it executes, or has accepted.
            under_way: What it asks the store for now. Whether that is its own, the next comparison tells.
        """
        unheld = {workflow_id: epoch for workflow_id, epoch in owned.items() if workflow_id not in executed}
        idle = unheld.keys() - set(under_way)
        released = {workflow_id: unheld[workflow_id] for workflow_id in idle & self._idle_before}
        self._idle_before = frozenset(idle)
        self._rounds = 2 if unheld else max(0, self._rounds - 1)
        return released


@dataclass(frozen=True, slots=True)
class Queued:
    """A run that waits in a shared queue.

    Args:
        run_id: The run.
        queue: Where it waits.
        priority: High ones go first.
        tenant: Whose it is.
        at_s: Since when it waits.
        served_at_s: When a run of its tenant was last taken from a queue; 0: never.
        is_start: Nobody has taken it before.
    """

    run_id: str
    queue: str
    priority: int
    tenant: str
    at_s: float
    served_at_s: float
    is_start: bool = True


def chosen(
    waiting: Iterable[Queued],
    running: Mapping[tuple[str, str], int],
    free: int,
    *,
    queue_runs_max: Mapping[str, int],
    tenant_runs_max: int | None,
    starts_left: Mapping[str, int] | None = None,
) -> list[Queued]:
    """Who gets the free places of a process, in order: by priority, then fair among tenants, then by age.

    Fair as in `Places`: the tenant with the fewest runs at work is next, whichever processes have them; among
    equals the one that was served the longest ago.

    Args:
        waiting: The oldest `free` runs, at least, of each queue, priority and tenant.
        running: Queue and tenant → unfinished runs that processes have taken from it.
        free: Places.
        queue_runs_max: Queue → how many of its runs may be taken at a time; no entry: any number.
        tenant_runs_max: So many runs of one tenant may be taken at a time; None: any number.
        starts_left: Queue → how many of its runs may be begun now, beside those that are gone on with; no
            entry: any number.
    """
    left = dict(starts_left or {})
    lines: dict[tuple[str, int, str, bool], deque[Queued]] = {}
    for one in sorted(waiting, key=lambda each: (each.at_s, each.run_id)):
        lines.setdefault((one.queue, one.priority, one.tenant, one.is_start), deque()).append(one)
    of_queue, of_tenant = Counter[str](), Counter[str]()
    for (queue, tenant), count in running.items():
        of_queue[queue] += count
        of_tenant[tenant] += count
    served_here: dict[str, int] = {}
    found: list[Queued] = []

    def order(line: deque[Queued]) -> tuple[float, ...]:
        head = line[0]
        here = served_here.get(head.tenant, 0)
        return (-head.priority, of_tenant[head.tenant], here, head.served_at_s, head.at_s)

    while len(found) < free:
        heads = [
            line
            for (queue, _, tenant, is_start), line in lines.items()
            if line
            and not (is_start and left.get(queue, 1) <= 0)
            and (queue not in queue_runs_max or of_queue[queue] < queue_runs_max[queue])
            and (tenant_runs_max is None or of_tenant[tenant] < tenant_runs_max)
        ]
        if not heads:
            break
        one = min(heads, key=order).popleft()
        found.append(one)
        of_queue[one.queue] += 1
        of_tenant[one.tenant] += 1
        if one.is_start and one.queue in left:
            left[one.queue] -= 1
        served_here[one.tenant] = len(found)
    return found


class Waiting(Protocol):
    """Something that wants a place."""

    @property
    def tenant(self) -> str: ...

    @property
    def priority(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Places(Generic[W]):
    """A number of places, and who is next for one: by priority, then fair among tenants, then by age.

    High priorities go first. Of the tenants with work of the same priority that one is next which has the
    fewest places; among equals that one which got its last place the longest ago; its oldest work comes
    first. Work is told apart by identity.

    Args:
        places_max: How many there are.
    """

    def __init__(self, places_max: int) -> None:
        self._free = places_max
        self._waiting: dict[int, dict[str, deque[W]]] = {}
        self._holders: set[W] = set()
        self._held: Counter[str] = Counter()
        self._served: dict[str, int] = {}
        self._served_last = 0

    def ask(self, work: W, *, returns: bool = False) -> None:
        """Let it wait for a place; `admit` says when it has one.

        Args:
            work: What wants one.
            returns: It had one and gave it back while it waited: before what has not begun.
        """
        tenants = self._waiting.setdefault(work.priority, {})
        line = tenants.setdefault(work.tenant, deque())
        if returns:
            line.appendleft(work)
        else:
            line.append(work)

    def admit(self) -> list[W]:
        """Those that have a place from now on, in order."""
        admitted: list[W] = []
        while self._free and self._waiting:
            work = self._next()
            self._free -= 1
            self._holders.add(work)
            self._held[work.tenant] += 1
            self._served_last += 1
            self._served[work.tenant] = self._served_last
            admitted.append(work)
        return admitted

    def give_back(self, work: W) -> None:
        """It needs no place any more, whether it has one or waits for it. Idempotent."""
        if work in self._holders:
            self._holders.remove(work)
            self._free += 1
            self._held[work.tenant] -= 1
            if not self._held[work.tenant]:
                del self._held[work.tenant]
            return
        queue = self._waiting.get(work.priority, {}).get(work.tenant, deque())
        if work in queue:
            queue.remove(work)
            self._tidy(work.priority, work.tenant)

    @property
    def free(self) -> int:
        """Places that nobody has and nobody waits for."""
        return 0 if self._waiting else self._free

    def _next(self) -> W:
        priority = max(self._waiting)
        tenants = self._waiting[priority]
        tenant = min(tenants, key=lambda one: (self._held[one], self._served.get(one, 0)))
        work = tenants[tenant].popleft()
        self._tidy(priority, tenant)
        return work

    def _tidy(self, priority: int, tenant: str) -> None:
        tenants = self._waiting[priority]
        if not tenants[tenant]:
            del tenants[tenant]
            if not any(tenant in each for each in self._waiting.values()) and not self._held[tenant]:
                self._served.pop(tenant, None)  # forgotten, so that tenants of the past cost nothing
        if not tenants:
            del self._waiting[priority]
