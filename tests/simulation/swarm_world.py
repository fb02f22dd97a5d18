"""Processes that execute runs on a clock of the simulation's own, with faults drawn from a seed.

    python tests/simulation/swarm_world.py SEED [--real]    # what happened, line by line

What is real: the decisions (`swarm.scheduling`), the checkpoints (`swarm.checkpoints`), the topologies, and,
with `--real`, the store with its SQL. What is played: time, the event loop and threads of each process, the
way to the store, and what agents say. A process here follows `swarm.engine` step by step; the faults are

- `kill -9` at any moment, and a new process in the dead one's place;
- pauses longer than a lease, after which the process goes on as if nothing had been;
- requests that reach the store late, out of order, twice (a retry after a lost answer), or never, and whole
  minutes in which none does;
- clocks that differ by several leases and jump.

Faults end at some point; from then on every process and the store are well. What must hold:

1. No accepted run is lost: each one ends, within a bounded time after the faults.
2. A write is let through only for the present owner: no run is effectively executed by two.
3. The result of a step is recorded once and never changes, and the run's log tells of it once.
4. A recorded step is not executed again by the owner of its run; without faults no step runs twice and
   nothing changes hands.
5. A run that ended or was cancelled stays so, until somebody resumes it.
6. A process executes no more runs at a time than it has places.
7. Each topology ends, keeps its rules (`topology.checked`), and asks for the same work on every replay.
8. The model store and the real one give the same answer to every request, and keep the same log.
"""

from __future__ import annotations

import argparse
import heapq
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from swarm_store import BothStores, ModelStore, Observed, Rules, SqlStore, Violation, row

from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.checkpoints import Accept, Operation
from agentic_flow.swarm.scheduling import ENDED, Fence
from agentic_flow.swarm.topology import (
    MERGE,
    TOPOLOGIES,
    Agreement,
    Assignment,
    Reviewed,
    Shape,
    Task,
    TeamState,
    checked,
)

LEASE_S = 4.0
MACHINES = 3
PLACES = 2
FAULTS_END_S = 20.0
GIVE_UP_S = 400.0
LOST = object()
"""The answer that never came."""


def draw(*parts: object) -> int:
    """A number that depends on nothing but these: what an agent says is the same on every replay."""
    return crc32(repr(parts).encode())


@dataclass(frozen=True)
class Spec:
    """A run that somebody wants."""

    run_id: str
    tenant: str
    priority: int
    topology: str
    shape: Shape
    salt: int


@dataclass(eq=False)
class SimRun:
    """A run as its process holds it. `tenant` and `priority` are what `Places` looks at."""

    spec: Spec
    fence: Fence
    accepted_at_s: float
    is_new: bool
    is_accepted: bool = False
    has_place: bool = False
    has_begun: bool = False
    starts_at_once: bool = False
    is_ending: bool = False
    stopped: bool = False
    steps: dict[tuple[str, int], tuple[str, str | None]] = field(default_factory=dict)
    children: dict[str, tuple[str, str | None, int | None]] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"plans": {}, "done": {}, "ballots": {}, "reviews": {}}
    )
    index: int = 0
    pending: int = 0

    @property
    def tenant(self) -> str:
        return self.spec.tenant

    @property
    def priority(self) -> int:
        return self.spec.priority

    @property
    def run_id(self) -> str:
        return self.spec.run_id


class World:
    """One seed's world. `run` plays it to its end or raises Violation.

    Args:
        seed: Of everything that is drawn.
        rules: The decisions.
        folder: With one, the real store plays beside the model there.
        trace: Called with a line for everything that happens.
    """

    def __init__(
        self,
        seed: int,
        rules: Rules | None = None,
        *,
        folder: Path | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.rules = rules or Rules()
        self.trace = trace
        self.is_calm = seed % 8 == 0
        lock_files = self.rng.random() < 0.5
        model = ModelStore(self.rules, LEASE_S, lock_files)
        if folder is None:
            self.store = Observed(model)
        else:
            self.store = Observed(BothStores(model, SqlStore(folder, LEASE_S, lock_files)))
        self.now_s = 0.0
        self.skew_s = [0.0] * MACHINES
        self.outage_until_s = 0.0
        self.effects: dict[str, list[str]] = {}
        self.accepted: set[str] = set()
        self.specs = [self._spec(number) for number in range(self.rng.randint(2, 4))]
        self.of = {spec.run_id: spec for spec in self.specs}
        self.processes: list[Process] = []
        self._started = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._pushed = 0
        self._over = False

    def _spec(self, number: int) -> Spec:
        topology = self.rng.choice(sorted(TOPOLOGIES))
        agents = self.rng.randint(1, 3)
        shape = Shape(
            agents=agents,
            rounds_max=self.rng.randint(1, 3),
            laps=self.rng.randint(1, 2),
            stages=tuple((f"stage{n}", None) for n in range(agents)) if topology == "pipeline" else (),
            reviewers=self.rng.choice([1, 1, 3]),
        )
        tenant, priority = f"t{self.rng.randrange(2)}", self.rng.randrange(2)
        return Spec(f"r{number}", tenant, priority, topology, shape, self.rng.getrandbits(32))

    # ---- time ------------------------------------------------------------------------------------------

    def push(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._pushed, action, arguments))

    def note(self, *parts: object) -> None:
        if self.trace is not None:
            self.trace(f"{self.now_s:9.3f}  {' '.join(map(str, parts))}")

    @property
    def has_faults(self) -> bool:
        return not self.is_calm and self.now_s < FAULTS_END_S

    def run(self) -> World:
        """To the end of all runs, then look at what is left."""
        try:
            for number in range(MACHINES):
                self.processes.append(self._new_process(number))
                if not self.is_calm:
                    self.push(self.rng.uniform(0.5, 8.0), self._fault, number)
            for spec in self.specs:
                self.push(self.rng.uniform(0.0, 6.0), self._submit, spec)
            if not self.is_calm:
                self.push(FAULTS_END_S, self._all_well)
            self.push(1.0, self._look)
            while not self._over:
                self.now_s, _, action, arguments = heapq.heappop(self._heap)
                if self.now_s > GIVE_UP_S:
                    raise Violation(f"these never ended: {self._unfinished()}")
                action(*arguments)
            self._check()
        except Violation as violation:
            raise Violation(f"seed {self.seed}, at {self.now_s:.3f} s: {violation}") from violation
        finally:
            self.store.close()
        return self

    def _unfinished(self) -> dict[str, str]:
        statuses = self.store.statuses()
        return {
            spec.run_id: statuses.get(spec.run_id, "not accepted")
            for spec in self.specs
            if statuses.get(spec.run_id) not in ENDED
        }

    def _look(self) -> None:
        """Whether all runs ended, and the zombies had their say."""
        ended = self.store.ended.keys() | self.store.cancelled
        all_ended = len(self.accepted) == len(self.specs) and self.of.keys() <= ended
        self._over = all_ended and (self.is_calm or self.now_s > FAULTS_END_S + 2 * LEASE_S)
        self.push(1.0, self._look)

    # ---- faults ----------------------------------------------------------------------------------------

    def _new_process(self, machine: int) -> Process:
        self._started += 1
        return Process(self, machine, f"m{machine}p{self._started}")

    def _fault(self, machine: int) -> None:
        if not self.has_faults:
            return
        rng = self.rng
        process = self.processes[machine]
        kind = rng.choices(("kill", "pause", "clock", "outage"), (4, 4, 2, 1))[0]
        if kind == "kill" and process.lives:
            self.note(process.name, "is killed")
            process.lives = False
            self.store.die(process.name)
            self.push(rng.uniform(0.0, 6.0), self._restart, machine)
        elif kind == "pause":
            process.paused_until_s = self.now_s + rng.uniform(0.0, 4 * LEASE_S)
            self.note(process.name, f"pauses until {process.paused_until_s:.3f}")
        elif kind == "clock":
            self.skew_s[machine] = rng.uniform(-3 * LEASE_S, 3 * LEASE_S)
            self.note(process.name, f"has a clock that is {self.skew_s[machine]:.3f} s ahead")
        elif kind == "outage":
            self.outage_until_s = self.now_s + rng.uniform(0.0, 2 * LEASE_S)
            self.note("the store is away until", f"{self.outage_until_s:.3f}")
        self.push(rng.uniform(0.5, 8.0), self._fault, machine)

    def _restart(self, machine: int) -> None:
        self.processes[machine] = self._new_process(machine)

    def _all_well(self) -> None:
        self.note("the faults end")
        self.skew_s = [0.0] * MACHINES
        self.outage_until_s = 0.0

    def clock_s(self, machine: int) -> float:
        return 1000.0 + self.now_s + self.skew_s[machine]

    # ---- who wants runs --------------------------------------------------------------------------------

    def _submit(self, spec: Spec) -> None:
        """Somebody submits, asks again elsewhere until it is accepted, and may cancel and resume."""
        if spec.run_id in self.accepted:
            return
        process = self.rng.choice(self.processes)
        if process.lives:
            process.start(spec)
        self.push(self.rng.uniform(2.0, 6.0), self._submit, spec)

    def is_accepted(self, spec: Spec) -> None:
        if spec.run_id in self.accepted:
            return
        self.accepted.add(spec.run_id)
        if not self.is_calm and self.rng.random() < 0.2:
            self.push(self.rng.uniform(0.1, 8.0), self._cancel, spec)

    def _cancel(self, spec: Spec) -> None:
        agent = self.rng.choice(["", "", ".plan", ".work-1", ".draft-1"])
        done = self.store.cancel(f"{spec.run_id}{agent}", self.clock_s(0))
        self.note(f"{spec.run_id}{agent}", "is cancelled" if done else "cannot be cancelled")
        if done and not agent and self.rng.random() < 0.5:
            self.push(self.rng.uniform(0.5, 8.0), self._resume, spec)

    def _resume(self, spec: Spec) -> None:
        process = self.rng.choice(self.processes)
        if process.lives and spec.run_id in self.store.cancelled:
            process.take(spec.run_id, asked=True)

    # ---- at the end ------------------------------------------------------------------------------------

    def _check(self) -> None:
        statuses = self.store.statuses()
        for spec in self.specs:
            status = statuses.get(spec.run_id)
            if status not in ENDED:
                raise Violation(f"{spec.run_id} is {status}")
            log = self.store.events(spec.run_id)
            ends = Counter(kind for kind, _, _ in log if kind in ("accepted", "ended"))
            if ends != Counter({"accepted": 1} if status == "cancelled" else {"accepted": 1, "ended": 1}):
                raise Violation(f"the log of {spec.run_id} ({status}) tells of {dict(ends)}")
            told = Counter((agent, name) for kind, agent, name in log if kind == "step_finished")
            steps = self.store.history(spec.run_id).steps.items()
            known = Counter((wid.partition(".")[2], name) for (wid, _), (name, _) in steps)
            if told != known:
                raise Violation(
                    f"the log of {spec.run_id} and its steps differ: {told - known or known - told}"
                )
        if self.is_calm:
            if self.store.takeovers:
                raise Violation(f"{self.store.takeovers} runs changed hands without a fault")
            if twice := [key for key, who in self.effects.items() if len(who) > 1]:
                raise Violation(f"without a fault these ran twice: {twice}")


class Process:
    """One process of the engine: what it does between two answers of the store."""

    def __init__(self, world: World, machine: int, name: str) -> None:
        self.world = world
        self.machine = machine
        self.name = name
        self.lives = True
        self.paused_until_s = 0.0
        self.places = world.rules.places(PLACES)
        self.custody = world.rules.custody()
        self.runs: dict[str, SimRun] = {}
        self.accepting: set[str] = set()
        self.claiming: set[str] = set()
        self.outbox: list[tuple[Operation, Callable[[Any], None]]] = []
        self.is_writing = False
        world.note(name, "starts")
        world.store.join(name, world.clock_s(machine))
        self.at(LEASE_S / 4, self.beat)
        self.at(LEASE_S / 2, self.take_orphans)
        self.at(LEASE_S / 4, self.watch)

    # ---- its time, and its way to the store ------------------------------------------------------------

    def at(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.world.push(delay_s, self._do, action, arguments)

    def _do(self, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.lives:
            return
        if self.world.now_s < self.paused_until_s:
            self.world.push(self.paused_until_s - self.world.now_s, self._do, action, arguments)
            return
        action(*arguments)

    def ask(self, request: Callable[[float], Any], then: Callable[[Any], None]) -> None:
        """One request to the store. What is on its way arrives, whatever becomes of the process meanwhile."""
        world = self.world
        rng = world.rng
        if not world.has_faults:
            world.push(0.005, self._arrive, request, then, True)
        elif rng.random() < 0.03:
            self.at(1.0, then, LOST)
        else:
            delay_s = rng.uniform(0.5, 8.0) if rng.random() < 0.05 else rng.uniform(0.001, 0.05)
            world.push(delay_s, self._arrive, request, then, rng.random() > 0.04)

    def _arrive(self, request: Callable[[float], Any], then: Callable[[Any], None], heard: bool) -> None:
        if self.world.now_s < self.world.outage_until_s:
            self.at(0.5, then, LOST)
            return
        answer = request(self.world.clock_s(self.machine))
        self.at(0.005 if heard else 1.0, then, answer if heard else LOST)

    def write(self, operation: Operation, then: Callable[[Any], None]) -> None:
        """As the checkpoint writer does: one transaction at a time, with all that is pending."""
        self.outbox.append((operation, then))
        if not self.is_writing:
            self.is_writing = True
            self.at(0.0, self._hand_over)

    def _hand_over(self) -> None:
        batch, self.outbox = self.outbox, []
        if not batch:
            self.is_writing = False
            return
        self._attempt(batch, False, self.world.now_s + LEASE_S)

    def _attempt(self, batch: Sequence[Any], again: bool, give_up_at_s: float) -> None:
        operations = [operation for operation, _ in batch]

        def written(answers: Any) -> None:
            if answers is LOST and self.world.now_s + 0.3 <= give_up_at_s:
                self.at(0.3, self._attempt, batch, True, give_up_at_s)
                return
            for number, (_, then) in enumerate(batch):
                then(LOST if answers is LOST else answers[number])
            self._hand_over()

        self.ask(lambda _: self.world.store.write(operations, again), written)

    # ---- upkeep ----------------------------------------------------------------------------------------

    def beat(self) -> None:
        self.ask(lambda now_s: self.world.store.beat(self.name, now_s), lambda _: None)
        self.at(LEASE_S / 4, self.beat)

    def watch(self) -> None:
        self.at(LEASE_S / 4, self.watch)
        here = {run_id: run for run_id, run in self.runs.items() if run.is_accepted}
        if not self.custody.must_compare(here):
            return
        held = {run_id: run.fence.epoch for run_id, run in here.items()}

        def compared(owned: Any) -> None:
            if owned is LOST:
                return
            for run_id in self.custody.lost(held, owned):
                run = self.runs.get(run_id)
                if run is not None and run is here[run_id] and not run.is_ending:
                    self.stop(run, "not its own any more")
            executed = {run_id for run_id, run in self.runs.items() if run.is_accepted}
            under_way = {*self.accepting, *self.claiming}
            for run_id, epoch in self.custody.to_release(owned, executed, under_way).items():
                self.release(run_id, Fence(self.name, epoch))

        self.ask(lambda _: self.world.store.owned(self.name), compared)

    def release(self, run_id: str, fence: Fence) -> None:
        self.world.note(self.name, "releases", run_id)
        self.ask(lambda _: self.world.store.release(run_id, fence), lambda _: None)

    def take_orphans(self) -> None:
        self.at(LEASE_S / 2, self.take_orphans)

        def found(orphans: Any) -> None:
            for run_id in () if orphans is LOST else orphans:
                self.take(run_id, asked=False)

        self.ask(lambda now_s: self.world.store.orphans(("team",), self.name, now_s), found)

    def take(self, run_id: str, *, asked: bool) -> None:
        if run_id in self.claiming:
            return
        self.claiming.add(run_id)

        def claimed(fence: Any) -> None:
            self.claiming.discard(run_id)
            if fence is LOST:
                self.custody.doubt()
            elif fence is not None:
                self.world.note(self.name, "has taken", run_id, fence.epoch)
                if run_id in self.runs:
                    self.stop(self.runs[run_id], "taken anew")
                run = SimRun(self.world.of[run_id], fence, 0.0, is_new=False, is_accepted=True)
                self.enter(run)

        self.ask(lambda now_s: self.world.store.claim(run_id, self.name, asked, now_s), claimed)

    # ---- runs ------------------------------------------------------------------------------------------

    def start(self, spec: Spec) -> None:
        if spec.run_id in self.accepting:
            return
        if spec.run_id in self.runs:
            self.world.is_accepted(spec)
            return
        now_s = self.world.clock_s(self.machine)
        run = SimRun(spec, Fence(self.name, 1), now_s, is_new=True)
        self.accepting.add(spec.run_id)
        self.enter(run)
        run.starts_at_once = run.has_place
        stored = row(
            spec.run_id,
            name="team",
            tenant=spec.tenant,
            priority=spec.priority,
            status="running" if run.starts_at_once else "queued",
            executor_id=self.name,
            accepted_at_s=now_s,
            started_at_s=now_s if run.starts_at_once else None,
        )

        def accepted(answer: Any) -> None:
            self.accepting.discard(spec.run_id)
            if answer is LOST:
                self.custody.doubt()
            else:
                self.world.is_accepted(spec)
            if answer is LOST or not answer:
                self.leave(run)
                return
            self.world.note(self.name, "has accepted", spec.run_id, spec.topology)
            run.is_accepted = True
            self.begin_if_placed(run)

        self.write(Accept(stored), accepted)

    def enter(self, run: SimRun) -> None:
        self.runs[run.run_id] = run
        self.places.ask(run)
        self.admit()

    def admit(self) -> None:
        for admitted in self.places.admit():
            admitted.has_place = True
            self.begin_if_placed(admitted)

    def begin_if_placed(self, run: SimRun) -> None:
        if run.has_place and run.is_accepted and not run.has_begun and not run.stopped:
            run.has_begun = True
            working = [each for each in self.runs.values() if each.has_begun]
            if len(working) > PLACES:
                raise Violation(f"{self.name} executes {len(working)} runs and has {PLACES} places")
            if run.starts_at_once:
                self.began(run)
            else:
                told = checkpoints.started(run.run_id, run.fence, "team", self.world.now_s)
                self.record(run, told, lambda: self.began(run))

    def leave(self, run: SimRun) -> None:
        run.stopped = True
        if self.runs.get(run.run_id) is run:
            del self.runs[run.run_id]
        self.places.give_back(run)
        self.admit()

    def stop(self, run: SimRun, why: str) -> None:
        self.world.note(self.name, "stops", run.run_id, why)
        self.leave(run)

    def abandon(self, run: SimRun) -> None:
        """The store could not be used: let go, so that it is continued where it can be."""
        self.stop(run, "for want of the store")
        self.custody.doubt()
        self.release(run.run_id, run.fence)

    def record(
        self,
        run: SimRun,
        checkpoint: checkpoints.Checkpoint,
        then: Callable[[], None],
        cancelled: Callable[[], None] | None = None,
    ) -> None:
        def answered(answer: Any) -> None:
            if run.stopped:
                return
            if answer is LOST:
                self.abandon(run)
            elif answer == "granted":
                then()
            elif answer == "cancelled" and cancelled is not None:
                cancelled()
            else:
                self.stop(run, f"refused: {answer}")

        self.write(checkpoint, answered)

    def began(self, run: SimRun) -> None:
        if run.is_new:
            self.advance(run)
            return

        def loaded(history: Any) -> None:
            if run.stopped:
                return
            if history is LOST:
                self.abandon(run)
                return
            run.steps, run.children = history.steps, history.children
            self.advance(run)

        self.ask(lambda _: self.world.store.history(run.run_id), loaded)

    # ---- one run: a step, the team, and its end --------------------------------------------------------

    def advance(self, run: SimRun) -> None:
        """From what is recorded to what is next."""
        if (run.run_id, 1) not in run.steps:
            self.step(run, run.run_id, 1, "read", lambda: self.advance(run))
            return
        run.index = max(run.index, 1)
        while not run.stopped:
            spec = run.spec
            state = TeamState("goal", spec.shape, **run.state)
            batch = checked(spec.topology, TOPOLOGIES[spec.topology](state), state.done)
            if not batch:
                self.finish(run)
                return
            ids = {f"{run.run_id}.{each.key}": each for each in batch}
            self._must_fit(run, list(ids))
            left = [each for each in ids if run.children.get(each, ("new",))[0] not in ENDED]
            if left:
                self.begin_children(run, list(ids), left)
                return
            run.index += 2 * len(batch)
            for child_id, assignment in ids.items():
                self._learn(run, assignment, run.children[child_id])

    def _must_fit(self, run: SimRun, ids: Sequence[str]) -> None:
        """What is recorded at these numbers must be what the topology asks for."""
        numbers = range(run.index + 1, run.index + 1 + 2 * len(ids))
        for number, child_id in enumerate(ids, run.index + 1):
            stored = run.children.get(child_id)
            if stored is not None and stored[2] != number:
                raise Violation(f"{child_id} was number {stored[2]} and is {number} on replay")
        for child_id, (_, _, number) in run.children.items():
            if number in numbers and child_id not in ids:
                raise Violation(f"{child_id} was recorded where {ids} are on replay")

    def _learn(self, run: SimRun, assignment: Assignment, child: tuple[str, str | None, int | None]) -> None:
        status, output, _ = child
        key, state = assignment.key, run.state
        said = draw(run.spec.salt, key)
        state["done"][key] = status == "completed" and output is not None and '"ok":true' in output
        if assignment.role == "planner" and state["done"][key]:
            count = 1 + said % 4
            after = (1,) if count > 1 and said % 5 == 0 else ()
            tasks = [Task(f"task {n}") for n in range(1, count)]
            state["plans"][key] = (*tasks, Task("last", after))
        if assignment.role == "reviewer":
            state["reviews"][key] = Reviewed(said % 3, said % 4)
        if assignment.ballot is not None:
            voters = run.spec.shape.agents
            agreement = Agreement(
                draw(run.spec.salt, assignment.ballot) % (voters + 1), voters, voters // 2 + 1
            )
            state["ballots"][assignment.ballot] = agreement

    def begin_children(self, run: SimRun, ids: Sequence[str], left: Sequence[str]) -> None:
        new = [child_id for child_id in left if child_id not in run.children]
        run.pending = len(left)
        numbers = {child_id: number for number, child_id in enumerate(ids, run.index + 1)}

        def begin() -> None:
            for child_id in new:
                run.children[child_id] = ("running", None, numbers[child_id])
            for child_id in left:
                self.child(run, child_id)

        if not new:
            begin()
            return
        rows = [
            row(
                child_id,
                parent_step=numbers[child_id],
                name="agent",
                tenant=run.tenant,
                priority=run.priority,
                status="running",
                executor_id="",
                accepted_at_s=self.world.now_s,
                started_at_s=self.world.now_s,
            )
            for child_id in new
        ]
        told = checkpoints.new_children(run.run_id, run.run_id, run.fence, rows)
        self.record(run, told, begin)

    def child(self, run: SimRun, child_id: str) -> None:
        """One to three steps, the first unrecorded one next, and an end."""
        for index in range(1, 2 + draw(run.spec.salt, child_id) % 3):
            if (child_id, index) not in run.steps:
                self.step(run, child_id, index, f"s{index}", lambda: self.child(run, child_id))
                return
        fails = draw("fails", run.spec.salt, child_id) % 8 == 0
        status = "failed" if fails else "completed"
        usable = "true" if draw("usable", run.spec.salt, child_id) % 6 else "false"
        output = None if fails else f'{{"ok":{usable}}}'
        told = checkpoints.ended(
            run.run_id,
            child_id,
            run.fence,
            "agent",
            status,
            output,
            "{}" if fails else None,
            self.world.now_s,
        )
        self.record(
            run,
            told,
            lambda: self.child_ended(run, child_id, status, output),
            lambda: self.child_ended(run, child_id, "cancelled", None),
        )

    def child_ended(self, run: SimRun, child_id: str, status: str, output: str | None) -> None:
        run.children[child_id] = (status, output, run.children[child_id][2])
        run.pending -= 1
        if run.pending == 0:
            self.advance(run)

    def step(self, run: SimRun, workflow_id: str, index: int, name: str, then: Callable[[], None]) -> None:
        """Execute it (its effect happens), then record its result."""
        store = self.world.store
        if (workflow_id, index) in store.recorded and store.owners[run.run_id] == run.fence:
            raise Violation(f"{self.name} executes {workflow_id}:{index} again, which is recorded")

        def done() -> None:
            if run.stopped:
                return
            self.world.effects.setdefault(f"{workflow_id}:{index}", []).append(self.name)
            now_s = self.world.now_s
            result: dict[str, Any] = {
                "workflow_id": workflow_id,
                "step_index": index,
                "name": name,
                "output": f'{{"by":"{self.name}","at":{now_s}}}',
                "error": None,
                "started_at_s": now_s,
                "completed_at_s": now_s,
            }

            def recorded() -> None:
                run.steps[workflow_id, index] = (name, result["output"])
                then()

            told = checkpoints.recorded_step(run.run_id, workflow_id, run.fence, result)
            if workflow_id == run.run_id:
                self.record(run, told, recorded)
            else:
                self.record(
                    run, told, recorded, lambda: self.child_ended(run, workflow_id, "cancelled", None)
                )

        self.at(self.world.rng.uniform(0.01, 0.6), done)

    def finish(self, run: SimRun) -> None:
        status = "completed" if run.state["done"].get(MERGE) else "failed"
        run.is_ending = True
        told = checkpoints.ended(
            run.run_id, run.run_id, run.fence, "team", status, "{}", None, self.world.now_s
        )
        self.record(run, told, lambda: self.stop(run, f"as {status}"))


def main() -> None:
    """Play one seed and print what happens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--real", action="store_true", help="with the store's SQL beside the model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        World(options.seed, folder=Path(folder) if options.real else None, trace=print).run()


if __name__ == "__main__":
    main()
