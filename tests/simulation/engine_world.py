"""The real run engine in several processes: shared queues, messages, questions; faults drawn from a seed.

    python tests/simulation/engine_world.py SEED     # what happened, line by line

`swarm_world` plays what a process does, over a model of the store: fast enough for many thousand seeds. Here
the processes are `SqlRunEngine` itself, with its claimer, inbox, leases, dependencies and their SQL on SQLite
(see `engine_process` for what is played instead). One half of the seeds is one machine with lock files, whose
clock jumps; the other half is like a server: no locks, and a clock of its own for the store, while those of
the machines differ from it. What of PostgreSQL is not played is that its transactions run beside each other.

The faults are `kill -9` and a new process in the dead one's place, ends in order, pauses longer than a lease,
requests that arrive late, never, or whose answer is lost after the commit, a store that is away, and clocks
that jump. People submit, send, answer, cancel, resume and pause through any process, and repeat what they
got no answer to, so that messages come twice, late and in any order. Faults end at some point. What must
hold:

1. No accepted run is lost: each one ends, within a bounded time after the faults. Nor is an accepted message.
2. What is recorded was executed under the fence that its run had then: none is run by two. A recorded step
   and an end never change; whoever holds a run does not execute again what is recorded.
3. All processes together never have more runs of a queue, or of a tenant, than its limit; and begin no more
   in a minute than its rate, by the store's clock.
4. Nobody starves: a tenant never gets a place before one that has fewer runs at work and waits in the same
   queue with the same priority; and each other tenant gets ahead at most once of one that has none. Higher
   priorities go first. (By design a lower priority waits for as long as there is work of a higher one.)
5. Each workflow reads the messages of a topic in the order in which they were stored, without a gap, each
   once, whatever died between receipt and record; what it returns is what it has recorded.
6. A question whose answer was accepted is not settled by its default.
7. Nothing unexpected is logged, and no log has a gap, two acceptances, or an end too many.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import structlog
from engine_oracle import ENDED, Limits, Oracle
from engine_process import Process, played
from swarm_store import Violation

from agentic_flow.core.errors import AgenticFlowError, Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.questions import ANSWER, check_answer, questions_of

LEASE_S = 4.0
MACHINES = 3
FAULTS_END_S = 16.0
GIVE_UP_S = 400.0
MINUTE_S = 6.0
TENANTS = 3
QUEUES = ("narrow", "wide")
ANSWERS = ("yes", "no")
EXPECTED = ("queue_unavailable", "checkpoint_failed", "engine_upkeep_failed")


def draw(*parts: object) -> int:
    """A number that depends on nothing but these."""
    return crc32(repr(parts).encode())


@dataclass
class Wish:
    """A run that somebody wants.

    `plan` is what its workflow does; `needed` how many messages of each topic that takes.
    """

    run_id: str
    tenant: str
    queue: str | None
    priority: int
    plan: list[list[Any]]
    needed: dict[str, int]
    not_before_s: float | None = None
    deadline_s: float | None = None
    is_paused: bool = False
    others: dict[str, Any] = field(default_factory=dict[str, Any])


class World:
    """One seed's world. `run` plays it to its end or raises Violation.

    Args:
        seed: Of everything that is drawn.
        folder: Of the run database.
        trace: Called with a line for everything that happens.
    """

    def __init__(self, seed: int, folder: Path, *, trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.folder = folder
        self.trace = trace
        self.lease_s = LEASE_S
        self.is_calm = seed % 8 == 0
        self.has_locks = rng.random() < 0.5
        self.now_s = 0.0
        self.skew_s = [0.0] * MACHINES
        self.store_skew_s = 0.0
        self._leapt_s = 0.0
        self.outage_until_s = 0.0
        self.acting: Process | None = None
        self.effects: dict[str, int] = {}
        self.accepted: set[str] = set()
        self.cancelled: set[str] = set()
        self.delivered: set[tuple[str, str, str]] = set()
        self.limits = Limits(
            {"narrow": rng.randint(1, 3)},
            rng.choice([None, 1, 2]),
            {"narrow": rng.randint(1, 3)},
            MINUTE_S,
        )
        self.oracle = Oracle(folder / "runs" / "runs.db", self.limits, lambda: self.now_s + self._leapt_s)
        self.wishes = {wish.run_id: wish for wish in map(self._wish, range(rng.randint(4, 9)))}
        self.processes: list[Process] = []
        self.dead: list[Process] = []
        self._started = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._pushed = 0
        self._over = False
        self._odd: list[str] = []
        self._violation: Violation | None = None
        self._call, self._fate = "", "well"

    def _wish(self, number: int) -> Wish:
        rng = self.rng
        needed: dict[str, int] = {}
        plan = self._plan(f"r{number}", needed, may_have_children=True)
        wish = Wish(
            f"r{number}",
            f"t{rng.randrange(TENANTS)}",
            rng.choice([*QUEUES, "narrow", None]),
            rng.choice([0, 0, 1]),
            plan,
            needed,
        )
        if wish.queue is not None and rng.random() < 0.15:
            wish.deadline_s = 1000.0 + rng.uniform(3.0, 30.0)
        elif wish.queue is not None and rng.random() < 0.15:
            wish.not_before_s = 1000.0 + rng.uniform(2.0, 12.0)
        return wish

    def _plan(self, name: str, needed: dict[str, int], *, may_have_children: bool) -> list[list[Any]]:
        rng = self.rng
        plan: list[list[Any]] = []
        own: dict[str, int] = {}
        kinds = ["step", "step", "receive", "ask"] + ["children"] * may_have_children
        for number in range(rng.randint(1, 4)):
            kind = rng.choice(kinds)
            if kind == "step":
                plan.append(["step", f"s{number}"])
            elif kind == "receive":
                topic, timeout_s = rng.choice([("go", None), ("go", None), ("maybe", rng.uniform(0.5, 6.0))])
                own[topic] = own.get(topic, 0) + 1
                plan.append(["receive", topic, timeout_s])
            elif kind == "ask":
                plan.append(["ask", f"{name} asks?", rng.choice([None, rng.uniform(0.5, 8.0)])])
            else:
                below = {
                    f"c{number}{n}": self._plan(f"{name}.c{number}{n}", needed, may_have_children=False)
                    for n in range(rng.randint(1, 2))
                }
                plan.append(["children", below])
        for topic, count in own.items():
            needed[topic] = max(needed.get(topic, 0), count)
        return plan

    # ---- time, and the way to the store ------------------------------------------------------------------

    def push(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._pushed, action, arguments))

    def note(self, *parts: object) -> None:
        if self.trace is not None:
            self.trace(f"{self.now_s:9.3f}  {' '.join(map(str, parts))}")

    def clock_s(self, machine: int) -> float:
        return self.store_clock_s() if self.has_locks else 1000.0 + self.now_s + self.skew_s[machine]

    def store_clock_s(self) -> float:
        return 1000.0 + self.now_s + self.store_skew_s

    @property
    def has_faults(self) -> bool:
        return not self.is_calm and self.now_s < FAULTS_END_S

    def arriving(self, process: Process, name: str) -> tuple[float, str]:
        """When a request reaches the store, and what becomes of it."""
        rng = self.rng
        if not self.has_faults:
            return 0.004, "well"
        fate = rng.choices(("well", "unsent", "unheard"), (93, 3, 4))[0]
        return (rng.uniform(0.5, 6.0) if rng.random() < 0.03 else rng.uniform(0.001, 0.05)), fate

    @contextmanager
    def carrying_out(self, name: str, fate: str) -> Generator[None]:
        self._call, self._fate = name, fate
        try:
            yield
        finally:
            self._call, self._fate = "", "well"

    def reached(self) -> None:
        if self._over or self._fate == "unsent" or self.now_s < self.outage_until_s:
            raise Unavailable("the run database is away", hint="wait for it")

    def committed(self) -> None:
        assert self.acting is not None
        if self._violation is None:
            try:
                self.oracle.look(self.acting.executor_id, self._call)
            except Violation as violation:  # the engine must not take it for one of its own
                self._violation = violation
        if self.trace is not None and self._call not in ("Heartbeat._beat", ""):
            self.note(self.acting.name, "has committed", self._call, self._fate)
        if self._fate == "unheard":
            self._fate = "well"  # what comes after it in this request gets through
            raise Unavailable("the run database did not answer", hint="look again")

    def is_odd(self, what: str) -> None:
        self._odd.append(what)

    def _logged(self, logger: Any, method: str, entry: dict[str, Any]) -> dict[str, Any]:
        """What is logged with a traceback is a bug, unless the simulation has made it."""
        if entry.get("exc_info") and not self._over:
            self.is_odd(f"{entry}")
        raise structlog.DropEvent

    def run(self) -> World:
        """To the end of all runs, then look at what is left."""
        before = structlog.get_config()
        structlog.configure(processors=[self._logged])
        try:
            with played(self):
                try:
                    self._play()
                finally:
                    self._over = True
                    for process in [*self.processes, *self.dead]:
                        with suppress(Violation):
                            process.bury()
        except Violation as violation:
            raise Violation(f"seed {self.seed}, at {self.now_s:.3f} s: {violation}") from violation
        finally:
            structlog.configure(**before)
            self.oracle.close()
        return self

    def _play(self) -> None:
        for machine in range(MACHINES):
            self._start(machine)
            if not self.is_calm:
                self.push(self.rng.uniform(1.0, 8.0), self._fault, machine)
        for wish in self.wishes.values():
            self.push(self.rng.uniform(0.2, 8.0), self._submit, wish)
        if not self.is_calm:
            self.push(FAULTS_END_S, self._all_well)
        self.push(1.0, self._look)
        while not self._over:
            turning = min(self.processes, key=lambda process: process.next_s)
            if turning.next_s < self._heap[0][0]:
                self.now_s = max(self.now_s, turning.next_s)
                turning.turn()
            else:
                self.now_s, _, action, arguments = heapq.heappop(self._heap)
                action(*arguments)
            if self._violation is not None:
                raise self._violation
            if self._odd:
                raise Violation(f"unexpected: {self._odd[0]}")
            if self.now_s > GIVE_UP_S:
                raise Violation(f"these never ended: {self._unfinished()}")
        self.oracle.judge_end(self.accepted, self.delivered)
        if self.is_calm:
            if self.oracle.takeovers:
                raise Violation(f"{self.oracle.takeovers} runs changed hands without a fault")
            if twice := [key for key, count in self.effects.items() if count > 1]:
                raise Violation(f"without a fault these ran twice: {twice}")

    def _unfinished(self) -> dict[str, Any]:
        stored = self.oracle.workflows
        return {
            run_id: (stored[run_id][1:4], self.oracle.queued.get(run_id)) if run_id in stored else None
            for run_id in self.wishes
            if run_id not in stored or stored[run_id].status not in (*ENDED, "cancelled")
        }

    def _look(self) -> None:
        self._over = (
            len(self.accepted) == len(self.wishes)
            and not self._unfinished()
            and (self.is_calm or self.now_s > FAULTS_END_S + 2 * LEASE_S)
        )
        self.push(1.0, self._look)

    # ---- processes and faults ----------------------------------------------------------------------------

    def _start(self, machine: int) -> None:
        self._started += 1
        rng = self.rng
        process = Process(
            self,
            machine,
            f"m{machine}p{self._started}",
            QUEUES if machine == 0 else rng.choice([QUEUES, QUEUES[:1], ()]),
            runs_parallel_max=2,
            queue_runs_max=self.limits.queue_runs_max,
            tenant_runs_max=self.limits.tenant_runs_max,
            queue_starts_per_minute=self.limits.starts_max,
            minute_s=MINUTE_S,
        )
        process.executor_id = f"sim-{process.name}"
        self.note(process.name, "starts, for", process.queues)
        process.engine.register("flow", self._flow(process))
        if machine < len(self.processes):
            self.dead.append(self.processes[machine])
            self.processes[machine] = process
        else:
            self.processes.append(process)
        process.begin()

    def _fault(self, machine: int) -> None:
        if not self.has_faults:
            return
        rng, process = self.rng, self.processes[machine]
        kind = rng.choices(("kill", "end", "pause", "clock", "outage"), (4, 2, 4, 2, 1))[0]
        if kind == "kill" and process.lives:
            self.note(process.name, "is killed")
            process.die()
            self.push(rng.uniform(0.0, 5.0), self._start, machine)
        elif kind == "end" and process.is_open:
            self.note(process.name, "ends in order")
            process.leave()
            self.push(0.5, self._follow, machine, process)
        elif kind == "pause":
            process.paused_until_s = self.now_s + rng.uniform(0.0, 3 * LEASE_S)
            self.note(process.name, f"pauses until {process.paused_until_s:.3f}")
        elif kind == "clock":
            self._set_clock(machine, rng.uniform(-3 * LEASE_S, 3 * LEASE_S))
        elif kind == "outage":
            self.outage_until_s = self.now_s + rng.uniform(0.0, 2 * LEASE_S)
            self.note("the store is away until", f"{self.outage_until_s:.3f}")
        self.push(rng.uniform(0.5, 8.0), self._fault, machine)

    def _follow(self, machine: int, before: Process) -> None:
        """A new process in the place of one that has ended in order."""
        if self.processes[machine] is not before:
            return
        if before.lives:
            self.push(0.5, self._follow, machine, before)
        else:
            self._start(machine)

    def _set_clock(self, machine: int, skew_s: float) -> None:
        if self.has_locks or self.rng.random() < 0.2:
            self._leapt_s += max(0.0, skew_s - self.store_skew_s)
            self.store_skew_s = skew_s
            self.note(f"the store's clock is {skew_s:.3f} s ahead")
        else:
            self.skew_s[machine] = skew_s
            self.note(f"machine {machine} has a clock that is {skew_s:.3f} s ahead")

    def _all_well(self) -> None:
        self.note("the faults end")
        self.outage_until_s = 0.0
        self._leapt_s += max(0.0, -self.store_skew_s)
        self.store_skew_s, self.skew_s = 0.0, [0.0] * MACHINES

    # ---- what workflows do -------------------------------------------------------------------------------

    def _flow(self, process: Process) -> Callable[[WorkflowContext, JsonObject], Coroutine[Any, Any, Any]]:
        async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
            got: list[Any] = []
            for kind, *what in payload["plan"]:
                if kind == "step":
                    await context.step(what[0], self._effect(process, context))
                elif kind == "receive":
                    topic, timeout_s = what
                    default = None if timeout_s is None else {"silence": True}
                    got.append(await context.receive(topic, timeout_s=timeout_s, default=default))
                elif kind == "ask":
                    question, timeout_s = what
                    default = None if timeout_s is None else "silence"
                    options = ANSWERS if timeout_s is None else (*ANSWERS, "silence")
                    asked = await context.ask(question, options=options, timeout_s=timeout_s, default=default)
                    got.append(asked["answer"])
                else:
                    below = {key: {"plan": plan} for key, plan in what[0].items()}
                    got.append(await context.children("flow", below))
            return {"got": got}

        return flow

    def _effect(
        self, process: Process, context: Any
    ) -> Callable[[StepContext], Coroutine[Any, Any, JsonObject]]:
        async def work(step: StepContext) -> JsonObject:
            key = step.idempotency_key
            workflow_id, _, index = key.rpartition(":")
            root_id = workflow_id.partition(".")[0]
            owner = self.oracle.workflows[root_id]
            epoch = context._execution.run.fence.epoch
            holds = (owner.executor_id, owner.epoch) == (process.executor_id, epoch)
            if holds and (workflow_id, int(index)) in self.oracle.steps:
                self._violation = Violation(f"{process.name} executes {key} again, which is recorded")
            self.effects[key] = count = self.effects.get(key, 0) + 1
            self.note(process.name, "executes", key)
            await asyncio.sleep(0.01 + draw(self.seed, key, count) % 600 / 1000)
            return {"by": process.executor_id, "epoch": epoch}

        return work

    # ---- people ------------------------------------------------------------------------------------------

    def _through(self, work: Callable[[Process], Coroutine[Any, Any, Any]]) -> None:
        """Let some process that is up do this; whether it lives to the end of it, nobody knows."""
        up = [process for process in self.processes if process.lives and process.is_open]
        if not up:
            return
        process = self.rng.choice(up)

        async def guarded() -> None:
            with suppress(AgenticFlowError):
                await work(process)

        process.spawn(guarded())

    def _submit(self, wish: Wish) -> None:
        """Somebody submits, and asks again elsewhere until it is accepted."""
        if wish.run_id in self.accepted:
            return

        async def start(process: Process) -> None:
            await process.engine.start(
                "flow",
                wish.run_id,
                {"plan": wish.plan},
                tenant=wish.tenant,
                queue=wish.queue,
                priority=wish.priority,
                not_before_s=wish.not_before_s,
                deadline_s=wish.deadline_s,
            )
            self._is_accepted(wish)

        self._through(start)
        self.push(self.rng.uniform(2.0, 6.0), self._submit, wish)

    def _is_accepted(self, wish: Wish) -> None:
        if wish.run_id in self.accepted:
            return
        rng = self.rng
        self.accepted.add(wish.run_id)
        self.note(wish.run_id, "is accepted")
        for topic, count in wish.needed.items():
            for number in range(count):
                self.push(rng.uniform(0.0, 12.0), self._send, wish, topic, f"k{number}")
        if any(kind in repr(wish.plan) for kind in ("'ask'",)):
            self.push(rng.uniform(0.5, 4.0), self._answer, wish)
        if not self.is_calm and rng.random() < 0.2:
            self.push(rng.uniform(0.1, 8.0), self._cancel, wish)
        elif rng.random() < 0.15:
            self.push(rng.uniform(0.1, 8.0), self._pause, wish)

    def _has_ended(self, wish: Wish) -> bool:
        stored = self.oracle.workflows.get(wish.run_id)
        return stored is not None and stored.status in ENDED

    def _send(self, wish: Wish, topic: str, key: str) -> None:
        """A message, sent again until somebody says that it has arrived, and sometimes once more."""
        message = (wish.run_id, topic, key)
        if self._has_ended(wish) or (message in self.delivered and self.rng.random() < 0.7):
            return

        async def send(process: Process) -> None:
            await process.engine.send(wish.run_id, topic, {"key": key}, key=key, sender="somebody")
            self.delivered.add(message)

        self._through(send)
        self.push(self.rng.uniform(0.5, 5.0), self._send, wish, topic, key)

    def _answer(self, wish: Wish) -> None:
        """Somebody looks for questions and answers them, as the service does it, until the run has ended."""
        if self._has_ended(wish):
            return

        async def answer(process: Process) -> None:
            engine = process.engine
            steps, messages = await engine.steps(wish.run_id), await engine.messages(wish.run_id)
            asked = questions_of(wish.run_id, steps, messages, now_s=process.clock.time_s())
            for question in asked:
                if question.state != "open" or (draw(self.seed, question.id) % 4 == 0 and question.until_s):
                    continue
                said = ANSWERS[draw(self.seed, question.id) % 2]
                check_answer(question, said)
                if question.until_s and draw(self.seed, question.id, "late") % 2:  # at the last moment
                    left_s = question.until_s - process.clock.time_s()
                    await asyncio.sleep(max(0.0, min(left_s - draw(self.seed, question.id) % 10 / 100, 8.0)))
                await engine.send(
                    wish.run_id,
                    f"{ANSWER}{question.id}",
                    {"answer": said},
                    key="answer",
                    sender="somebody",
                    before_s=question.until_s,
                )

        self._through(answer)
        self.push(self.rng.uniform(0.3, 3.0), self._answer, wish)

    def _cancel(self, wish: Wish) -> None:
        async def cancel(process: Process) -> None:
            done = await process.engine.cancel(wish.run_id)
            self.note(wish.run_id, "is cancelled" if done else "cannot be cancelled")
            self.push(self.rng.uniform(0.5, 8.0), self._resume, wish)

        self._through(cancel)

    def _resume(self, wish: Wish) -> None:
        if self.rng.random() < 0.7:

            async def resume(process: Process) -> None:
                if await process.engine.resume(wish.run_id):
                    self.note(wish.run_id, "is resumed")

            self._through(resume)

    def _pause(self, wish: Wish) -> None:
        async def pause(process: Process) -> None:
            await process.engine.pause(wish.run_id)

        self.note(wish.run_id, "is to pause")
        self._through(pause)
        self.push(self.rng.uniform(0.5, 4.0), self._unpause, wish)

    def _unpause(self, wish: Wish) -> None:
        """Again and again: a pause whose answer was lost may come late."""
        if self._has_ended(wish):
            return

        async def unpause(process: Process) -> None:
            await process.engine.unpause(wish.run_id)

        self._through(unpause)
        self.push(self.rng.uniform(1.0, 3.0), self._unpause, wish)


def fresh_folder(parent: Path | None = None) -> Path:
    """Of a run database, in memory where there is such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=parent or (memory if memory.is_dir() else None)))


def play(seed: int, *, trace: Callable[[str], None] | None = None) -> World:
    """One seed, in a folder of its own."""
    folder = fresh_folder()
    try:
        return World(seed, folder, trace=trace).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Play one seed and print what happens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("seed", type=int)
    play(parser.parse_args().seed, trace=print)


if __name__ == "__main__":
    main()
