"""The run database as the simulation sees it: a model that asks the pure decisions, and the real one.

Both answer the same requests. `Observed` stands before either: it keeps its own account of who owns what,
from the requests and answers alone, and raises `Violation` when an answer breaks a promise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.checkpoints import Accept, Answer, Bindings, Checkpoint, Operation
from agentic_flow.swarm.leases import NOBODY, VERSION, Leases, RunDatabase
from agentic_flow.swarm.reader import RunReader
from agentic_flow.swarm.scheduling import (
    UNFINISHED,
    Custody,
    Fence,
    Permission,
    Places,
    StoredWorkflow,
    claim_verdict,
    is_alive,
    may_record,
)

Told = tuple[str, str, str]
"""Kind, agent and name of an event."""


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Rules:
    """The decisions under test. A test replaces one to see that the simulation notices."""

    may_record: Callable[..., Permission] = may_record
    claim_verdict: Callable[..., Any] = claim_verdict
    is_alive: Callable[..., bool] = is_alive
    places: Callable[[int], Places[Any]] = Places
    custody: Callable[[], Custody] = Custody
    unfinished: Collection[str] = UNFINISHED
    keeps_first: bool = True


@dataclass(frozen=True)
class History:
    """What is recorded of a tree: steps by workflow and number (name, output), children by id."""

    steps: dict[tuple[str, int], tuple[str, str | None]]
    children: dict[str, tuple[str, str | None, int | None]]


class Store(Protocol):
    """What processes ask of the run database. `now_s` is what the asker's clock shows."""

    def join(self, executor_id: str, now_s: float) -> None: ...
    def die(self, executor_id: str) -> None: ...
    def beat(self, executor_id: str, now_s: float) -> None: ...
    def write(self, operations: Sequence[Operation], again: bool) -> list[Answer]: ...
    def orphans(self, names: Collection[str], asker: str, now_s: float) -> list[str]: ...
    def claim(self, workflow_id: str, executor_id: str, asked: bool, now_s: float) -> Fence | None: ...
    def release(self, workflow_id: str, fence: Fence) -> None: ...
    def owned(self, executor_id: str) -> dict[str, int]: ...
    def cancel(self, workflow_id: str, now_s: float) -> bool: ...
    def history(self, root_id: str) -> History: ...
    def statuses(self) -> dict[str, str]: ...
    def events(self, root_id: str) -> list[Told]: ...
    def close(self) -> None: ...


@dataclass
class ModelStore:
    """A run database in memory that decides by `Rules` alone.

    Args:
        rules: The decisions.
        lease_s: Seconds of silence that are forgiven.
        lock_files: Whether the death of a process shows at once, as on SQLite.
    """

    rules: Rules
    lease_s: float
    lock_files: bool
    workflows: dict[str, Bindings] = field(default_factory=dict[str, Bindings])
    steps: dict[tuple[str, int], tuple[str, str | None]] = field(
        default_factory=dict[tuple[str, int], tuple[str, str | None]]
    )
    log: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict[str, list[tuple[Any, ...]]])
    heartbeats: dict[str, float] = field(default_factory=dict[str, float])
    locked: set[str] = field(default_factory=set[str])

    def join(self, executor_id: str, now_s: float) -> None:
        for other, beaten_at_s in list(self.heartbeats.items()):
            if beaten_at_s < now_s - 10 * self.lease_s:
                del self.heartbeats[other]
        self.locked.add(executor_id)
        self.beat(executor_id, now_s)

    def die(self, executor_id: str) -> None:
        self.locked.discard(executor_id)

    def beat(self, executor_id: str, now_s: float) -> None:
        self.heartbeats[executor_id] = now_s

    def _lives(self, executor_id: str, now_s: float) -> bool:
        if executor_id not in self.heartbeats:
            return False
        locked = executor_id in self.locked if self.lock_files else None
        return self.rules.is_alive(self.heartbeats[executor_id], now_s, self.lease_s, holds_lock=locked)

    def write(self, operations: Sequence[Operation], again: bool) -> list[Answer]:
        answers: list[Answer] = [False] * len(operations)
        told: list[Any] = []
        accepts = [(o.row["workflow_id"], n) for n, o in enumerate(operations) if isinstance(o, Accept)]
        for _, number in sorted(accepts):
            operation = operations[number]
            assert isinstance(operation, Accept)
            answers[number] = self._accept(operation.row, again, told)
        rows: dict[str, list[Bindings]] = {}
        ending: dict[str, str] = {}
        for number, operation in enumerate(operations):
            if isinstance(operation, Accept):
                continue
            stored = self._stored(operation.workflow_id, ending)
            answers[number] = permission = self.rules.may_record(
                self._stored(operation.root_id, ending), stored, operation.fence, ending=operation.ending
            )
            if permission != "granted":
                continue
            rows.setdefault(operation.statement, []).extend(operation.rows)
            if operation.ending is None or (stored is not None and stored.status in UNFINISHED):
                told += operation.events
            if operation.ending is not None:
                ending[operation.workflow_id] = operation.ending
        for statement in sorted(rows):
            for row in rows[statement]:
                self._apply(row)
        for event in told:
            log = self.log.setdefault(event[0], [])
            if not (again and event in log):
                log.append(event)
        return answers

    def _accept(self, row: Bindings, again: bool, told: list[Any]) -> bool:
        workflow_id = row["workflow_id"]
        known = self.workflows.get(workflow_id)
        if known is not None:
            same = all(known[key] == row[key] for key in ("executor_id", "accepted_at_s"))
            return again and same
        self.workflows[workflow_id] = {**row, "takeovers": 0, "output": None, "cancelled_with": None}
        kinds = ["accepted", "started"] if row["status"] == "running" else ["accepted"]
        told += [(workflow_id, kind, row["accepted_at_s"], "", row["name"], "{}") for kind in kinds]
        return True

    def _stored(self, workflow_id: str, ending: Mapping[str, str]) -> StoredWorkflow | None:
        row = self.workflows.get(workflow_id)
        if row is None:
            return None
        return StoredWorkflow(ending.get(workflow_id, row["status"]), row["executor_id"], row["epoch"])

    def _apply(self, row: Bindings) -> None:
        """What a statement of `checkpoints` does, told apart by what is bound to it."""
        if "step_index" in row:
            step = (row["workflow_id"], row["step_index"])
            if step not in self.steps or not self.rules.keeps_first:
                self.steps[step] = (row["name"], row["output"])
        elif "parent_step" in row:
            child = {**row, "takeovers": 0, "output": None, "cancelled_with": None}
            self.workflows.setdefault(row["workflow_id"], child)
        elif "status" in row:
            self.workflows[row["workflow_id"]] |= {"status": row["status"], "output": row["output"]}
        else:
            self.workflows[row["workflow_id"]]["status"] = "running"

    def orphans(self, names: Collection[str], asker: str, now_s: float) -> list[str]:
        found = [
            row
            for row in self.workflows.values()
            if row["parent_id"] is None
            and row["status"] in self.rules.unfinished
            and row["executor_id"] != asker
            and not self._lives(row["executor_id"], now_s)
            and row["name"] in names
        ]
        found.sort(key=lambda row: (row["accepted_at_s"], row["workflow_id"]))
        return [row["workflow_id"] for row in found]

    def claim(self, workflow_id: str, executor_id: str, asked: bool, now_s: float) -> Fence | None:
        row = self.workflows.get(workflow_id)
        if row is None:
            return None
        status, owner = row["status"], row["executor_id"]
        lives = status in UNFINISHED and (owner == executor_id or self._lives(owner, now_s))
        verdict = self.rules.claim_verdict(status, owner_lives=lives, takeovers=row["takeovers"], asked=asked)
        log = self.log.setdefault(workflow_id, [])
        if verdict == "leave":
            return None
        if verdict == "give_up":
            row["status"] = "given_up"
            log.append((workflow_id, "given_up", now_s, "", row["name"], ""))
            return None
        log.append((workflow_id, "taken_over", now_s, "", row["name"], ""))
        row |= {
            "executor_id": executor_id,
            "epoch": row["epoch"] + 1,
            "status": "queued",
            "takeovers": 0 if asked else row["takeovers"] + 1,
            "cancelled_with": None,
        }
        if status == "cancelled":
            for below in self._below(workflow_id):
                if below["status"] == "cancelled" and below["cancelled_with"] == workflow_id:
                    below |= {"status": "running", "cancelled_with": None}
        return Fence(executor_id, row["epoch"])

    def _below(self, workflow_id: str) -> list[Bindings]:
        return [row for key, row in self.workflows.items() if key.startswith(f"{workflow_id}.")]

    def release(self, workflow_id: str, fence: Fence) -> None:
        row = self.workflows[workflow_id]
        if (row["executor_id"], row["epoch"]) == (fence.executor_id, fence.epoch):
            row["executor_id"] = NOBODY

    def owned(self, executor_id: str) -> dict[str, int]:
        return {
            key: row["epoch"]
            for key, row in self.workflows.items()
            if row["parent_id"] is None and row["status"] in UNFINISHED and row["executor_id"] == executor_id
        }

    def cancel(self, workflow_id: str, now_s: float) -> bool:
        row = self.workflows.get(workflow_id)
        unfinished = (*UNFINISHED, "given_up")
        if row is None or row["status"] not in unfinished:
            return False
        root_id, _, agent = workflow_id.partition(".")
        told = (root_id, "cancelled", now_s, agent, row["name"], "")
        self.log.setdefault(root_id, []).append(told)
        for each in (row, *self._below(workflow_id)):
            if each["status"] in unfinished:
                each |= {"status": "cancelled", "cancelled_with": workflow_id}
        return True

    def history(self, root_id: str) -> History:
        below = self._below(root_id)
        ids = {root_id, *(row["workflow_id"] for row in below)}
        return History(
            {step: value for step, value in self.steps.items() if step[0] in ids},
            {row["workflow_id"]: (row["status"], row["output"], row["parent_step"]) for row in below},
        )

    def statuses(self) -> dict[str, str]:
        return {key: row["status"] for key, row in self.workflows.items()}

    def events(self, root_id: str) -> list[Told]:
        return [(kind, agent, name) for _, kind, _, agent, name, _ in self.log.get(root_id, [])]

    def close(self) -> None:
        pass


class HandClock:
    """A clock that shows what it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError(f"the simulation does not wait ({duration_s!r} s)")


class _LeasesWithoutLocks(Leases):
    """As on a server: only the heartbeat tells whether a process lives."""

    def _holds_lock(self, executor_id: str) -> bool | None:
        return None


class SqlStore:
    """The product's own store on SQLite, with a clock that the simulation sets."""

    def __init__(self, folder: Path, lease_s: float, lock_files: bool) -> None:
        self._clock = HandClock()
        self._database = RunDatabase(None, folder)
        self._database.create()
        make = Leases if lock_files else _LeasesWithoutLocks
        self._leases = make(self._database, lease_s=lease_s, clock=self._clock)
        self._reader = RunReader.on(self._database, self._leases)
        self._present: dict[str, ExitStack] = {}

    def join(self, executor_id: str, now_s: float) -> None:
        self._clock.now_s = now_s
        self._leases.forget_the_dead()
        self._present[executor_id] = ExitStack()
        self._present[executor_id].enter_context(self._leases.presence(executor_id))
        self._leases.beat(executor_id)

    def die(self, executor_id: str) -> None:
        """As the operating system does it: the lock goes, the row stays."""
        self._present.pop(executor_id).close()

    def beat(self, executor_id: str, now_s: float) -> None:
        self._clock.now_s = now_s
        self._leases.beat(executor_id)

    def write(self, operations: Sequence[Operation], again: bool) -> list[Answer]:
        return checkpoints.write(self._database, operations, again=again)

    def orphans(self, names: Collection[str], asker: str, now_s: float) -> list[str]:
        self._clock.now_s = now_s
        return self._leases.orphans(names, asker=asker)

    def claim(self, workflow_id: str, executor_id: str, asked: bool, now_s: float) -> Fence | None:
        self._clock.now_s = now_s
        claim = self._leases.claim(workflow_id, executor_id, asked=asked)
        return None if claim is None else claim.fence

    def release(self, workflow_id: str, fence: Fence) -> None:
        self._leases.release(workflow_id, fence)

    def owned(self, executor_id: str) -> dict[str, int]:
        return self._leases.owned(executor_id)

    def cancel(self, workflow_id: str, now_s: float) -> bool:
        self._clock.now_s = now_s
        return self._leases.cancel(workflow_id)

    def history(self, root_id: str) -> History:
        steps = self._database.rows(
            "SELECT workflow_id, step_index, name, output FROM af_steps WHERE workflow_id IN "
            "(SELECT workflow_id FROM af_workflows WHERE root_id = :id)",
            id=root_id,
        )
        children = self._database.rows(
            "SELECT workflow_id, status, output, parent_step FROM af_workflows "
            "WHERE root_id = :id AND parent_id IS NOT NULL",
            id=root_id,
        )
        return History(
            {(row[0], row[1]): (row[2], row[3]) for row in steps},
            {row[0]: (row[1], row[2], row[3]) for row in children},
        )

    def statuses(self) -> dict[str, str]:
        return {
            str(row[0]): str(row[1])
            for row in self._database.rows("SELECT workflow_id, status FROM af_workflows")
        }

    def events(self, root_id: str) -> list[Told]:
        events = self._reader.events(root_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [(event.kind, event.agent, event.name) for event in events]

    def close(self) -> None:
        for present in self._present.values():
            present.close()
        self._database.close()


class BothStores:
    """The model and the real store side by side: every answer must be the same."""

    def __init__(self, model: ModelStore, real: SqlStore) -> None:
        self.model, self.real = model, real

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> Any:
            told = getattr(self.model, name)(*arguments)
            done = getattr(self.real, name)(*arguments)
            if told != done:
                raise Violation(f"{name}{arguments!r}: the model says {told!r}, the store {done!r}")
            return done

        return ask


@dataclass
class Observed:
    """A store, and an account of its own of what it granted."""

    store: Any
    owners: dict[str, Fence] = field(default_factory=dict[str, Fence])
    recorded: dict[tuple[str, int], str | None] = field(default_factory=dict[tuple[str, int], str | None])
    ended: dict[str, str] = field(default_factory=dict[str, str])
    cancelled: set[str] = field(default_factory=set[str])
    takeovers: int = 0
    refused: int = 0

    def write(self, operations: Sequence[Operation], again: bool) -> list[Answer]:
        before = dict(self.owners)
        answers = self.store.write(operations, again)
        for operation, answer in zip(operations, answers, strict=True):
            if isinstance(operation, Accept):
                if answer:
                    fence = Fence(operation.row["executor_id"], 1)
                    known = before.get(operation.row["workflow_id"], fence)
                    if known != fence and not again:
                        raise Violation(f"{operation.row['workflow_id']} was accepted twice")
                    self.owners.setdefault(operation.row["workflow_id"], fence)
            elif answer == "granted":
                self._granted(operation)
            else:
                self.refused += 1
        return answers

    def _granted(self, checkpoint: Checkpoint) -> None:
        owner = self.owners.get(checkpoint.root_id)
        if owner != checkpoint.fence:
            raise Violation(
                f"{checkpoint.workflow_id} is {owner}'s, and {checkpoint.fence} was let write "
                f"{[event[1] for event in checkpoint.events]}"
            )
        root_id = checkpoint.root_id
        # The retry of an end whose answer was lost changes nothing, and may come late.
        is_repeated_end = checkpoint.ending is not None and checkpoint.workflow_id in self.ended
        if root_id in self.cancelled and not is_repeated_end:
            raise Violation(f"{root_id} is cancelled, and {checkpoint.fence} was let write")
        if root_id in self.ended and not is_repeated_end:
            raise Violation(f"{root_id} has ended, and {checkpoint.fence} was let write")
        for row in checkpoint.rows:
            if "step_index" in row:
                step = (row["workflow_id"], row["step_index"])
                if self.recorded.setdefault(step, row["output"]) != row["output"]:
                    raise Violation(f"step {step} was recorded twice, with another result")
        if checkpoint.ending is not None:
            first = self.ended.setdefault(checkpoint.workflow_id, checkpoint.ending)
            if first != checkpoint.ending:
                raise Violation(f"{checkpoint.workflow_id} was {first} and is {checkpoint.ending} now")

    def claim(self, workflow_id: str, executor_id: str, asked: bool, now_s: float) -> Fence | None:
        fence = self.store.claim(workflow_id, executor_id, asked, now_s)
        if fence is None:
            return None
        before = self.owners[workflow_id]
        if fence != Fence(executor_id, before.epoch + 1):
            raise Violation(f"{workflow_id} was {before}'s, and {executor_id} got {fence}")
        if workflow_id in self.ended or (workflow_id in self.cancelled and not asked):
            raise Violation(f"{executor_id} took {workflow_id} over, which had ended")
        self.cancelled.discard(workflow_id)
        self.owners[workflow_id] = fence
        self.takeovers += not asked
        return fence

    def release(self, workflow_id: str, fence: Fence) -> None:
        self.store.release(workflow_id, fence)
        if self.owners[workflow_id] == fence:
            self.owners[workflow_id] = Fence(NOBODY, fence.epoch)

    def cancel(self, workflow_id: str, now_s: float) -> bool:
        done = self.store.cancel(workflow_id, now_s)
        if done and "." not in workflow_id:
            self.cancelled.add(workflow_id)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def row(workflow_id: str, *, parent_step: int | None = None, **values: Any) -> Bindings:
    """A new workflow as the engine stores it; see `execution`."""
    root_id, _, agent = workflow_id.partition(".")
    return {
        "version": VERSION,
        "epoch": 1,
        "workflow_id": workflow_id,
        "root_id": root_id,
        "parent_id": root_id if agent else None,
        "parent_step": parent_step,
        "payload": "{}",
        **values,
    }
