"""Real processes killed by SIGKILL, stopped by SIGSTOP or racing each other over one store.

This module is also the program of those processes: `python test_engine_crash.py STORE_JSON COMMAND …`. Every
step appends one line to a journal, with fsync, before it returns: the journal says what really ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import RunState, StepContext, WorkflowContext, WorkflowRecord
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.reader import RunReader

KILLS = int(os.environ.get("ENGINE_KILLS", "24"))
TIMEOUT_S = 60.0
CHILDREN, STEPS = 4, 5
TENANT = "t"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Store:
    """Where the engine of a test lives, and its journal."""

    folder: str
    url: str | None = None
    lease_s: float = 30.0

    def engine(self, runs_parallel_max: int = 8) -> SqlRunEngine:
        return SqlRunEngine(
            self.url, Path(self.folder), lease_s=self.lease_s, runs_parallel_max=runs_parallel_max
        )

    def reader(self) -> RunReader:
        return RunReader(self.url, Path(self.folder), lease_s=self.lease_s)

    def record(self, workflow_id: str) -> WorkflowRecord:
        record = self.reader().get(workflow_id)
        assert record is not None, workflow_id
        return record

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def journal(self) -> list[tuple[int, str]]:
        """Process and idempotency key of every step that ran, in order."""
        if not self.path("journal").exists():
            return []
        lines = self.path("journal").read_text().splitlines()
        return [(int(pid), key) for pid, key in (line.split() for line in lines)]

    def runs_of(self, key: str) -> int:
        return Counter(key for _, key in self.journal())[key]

    def recorded_keys(self, workflow_id: str) -> set[str]:
        return {f"{step.workflow_id}:{step.index}" for step in self.reader().steps(workflow_id)}


# ---- the processes ---------------------------------------------------------------------------------------


def note(store: Store, step: StepContext) -> None:
    descriptor = os.open(store.path("journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {step.idempotency_key}\n".encode())
    os.fsync(descriptor)
    os.close(descriptor)


def register(engine: SqlRunEngine, store: Store) -> None:
    def noting(number: int) -> Any:
        async def run(step: StepContext) -> JsonObject:
            await asyncio.sleep(0.002)
            note(store, step)
            return {"n": number}

        return run

    async def agent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        done = [await context.step(f"s{n}", noting(n + int(payload["base"]))) for n in range(STEPS)]
        return {"sum": sum(int(result["n"]) for result in done)}

    async def team(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("plan", noting(0))
        plans: dict[str, JsonObject] = {f"a{n}": {"base": n * 10} for n in range(CHILDREN)}
        results = await context.children("agent", plans)
        await context.step("merge", noting(0))
        return {"total": sum(int(result["sum"]) for result in results.values())}

    async def held(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        """Ends when the file `gate` exists; says when it was interrupted."""

        async def hold(step: StepContext) -> JsonObject:
            note(store, step)
            print("holding", context.workflow_id, flush=True)
            try:
                while not store.path("gate").exists():
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                print("interrupted", context.workflow_id, flush=True)
                raise
            return {"by": os.getpid()}

        first = await context.step("hold", hold)
        await context.step("after", noting(0))
        return first

    engine.register("agent", agent)
    engine.register("team", team)
    engine.register("held", held)


TOTAL = sum(n * 10 + s for n in range(CHILDREN) for s in range(STEPS))


async def line() -> str:
    return (await asyncio.to_thread(sys.stdin.readline)).strip()


async def process(store: Store, command: str, arguments: Sequence[str]) -> None:
    engine = store.engine(runs_parallel_max=1 if command == "queue" else 8)
    register(engine, store)
    async with engine.open(takeover=command == "takeover"):
        print("ready", flush=True)
        if command == "same":  # what a user does: the same command again
            name, run = arguments
            if await engine.start(name, run, {}, tenant=TENANT):
                print("accepted", flush=True)
            else:
                await engine.resume(run)
            await engine.wait(run)
        elif command == "takeover":
            for run in arguments:
                await engine.wait(run)
        elif command in ("queue", "serve"):
            for run in arguments:
                await engine.start("held", run, {}, tenant=TENANT)
            print("accepted", flush=True)
            while await line() != "end":
                pass
            print("alive", len(await engine.list_workflows(TENANT, name="held")), flush=True)
            await engine.start("team", f"late-{os.getpid()}", {}, tenant=TENANT)
            print("late", (await engine.wait(f"late-{os.getpid()}")).state, flush=True)
        elif command == "race":
            await line()
            print("took", *await engine.resume_interrupted(), flush=True)
            await line()
        elif command == "cancel":
            print("cancelled", await engine.cancel(arguments[0]), flush=True)
        print("done", flush=True)


# ---- the tests' side ---------------------------------------------------------------------------------------


class Child:
    """One process of the engine, with its output read line by line."""

    def __init__(
        self, store: Store, command: str, *arguments: str, file: str = __file__, within: Sequence[str] = ()
    ) -> None:
        python = [*within, sys.executable, "-W", "error"]
        program = [*python, file, json.dumps(store.__dict__), command, *arguments]
        self.log = store.path(f"stderr-{time.monotonic_ns()}")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def expect(self, start: str) -> str:
        """Read until a line begins like this; returns the line."""
        assert self.process.stdout is not None
        give_up_at_s = time.monotonic() + TIMEOUT_S
        while True:
            while b"\n" in self._buffer:
                head, _, self._buffer = self._buffer.partition(b"\n")
                if head.decode().startswith(start):
                    return head.decode()
            ready, _, _ = select.select([self.process.stdout], [], [], give_up_at_s - time.monotonic())
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                self.kill()
                raise AssertionError(f"no line {start!r} came: {self.log.read_text()[-3000:]}")
            self._buffer += chunk

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n".encode())
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.finish()

    def finish(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def child(
    store: Store, command: str, *arguments: str, file: str = __file__, within: Sequence[str] = ()
) -> Generator[Child]:
    """A process that is gone at the end, stopped or not.

    Args:
        store: What it works on.
        command: What it is to do.
        arguments: Of the command.
        file: The program, if not this one.
        within: What comes before the program on the command line.
    """
    started = Child(store, command, *arguments, file=file, within=within)
    try:
        yield started
    finally:
        started.kill()


def until(condition: Any) -> None:
    give_up_at_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at_s, f"it did not happen within {TIMEOUT_S} s"
        time.sleep(0.02)


def until_alone(url: str) -> None:
    """Wait until nobody else is connected: what a killed process had sent may be committed after its end."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"
    with psycopg.connect(url, autocommit=True) as connection:
        until(lambda: connection.execute(others, (connection.info.backend_pid,)).fetchone() == (0,))


def check_exactly_once(store: Store, run: str, kills: int) -> None:
    """Everything ran; repeats are only what was in flight at a kill, at most one step per child."""
    counts = Counter(key for _, key in store.journal() if key.startswith((f"{run}:", f"{run}.")))
    assert set(counts) == store.recorded_keys(run)
    assert len(counts) == CHILDREN * STEPS + 2
    assert sum(counts.values()) - len(counts) <= kills * CHILDREN
    log = store.reader().events(run)
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    told = [(event.agent, event.data["index"]) for event in log if event.kind == "step_finished"]
    steps = store.reader().steps(run)
    assert sorted(told) == sorted((step.workflow_id[len(run) + 1 :], step.index) for step in steps)
    ends = Counter(event.kind for event in log if event.kind in ("child_ended", "ended"))
    assert ends == {"child_ended": CHILDREN, "ended": 1}
    assert log[-1].kind == "ended"


def kill_at_random_points(store: Store, kills_wanted: int, seed: int) -> None:
    print(f"seed {seed}")  # ENGINE_SEED replays the choices, though not the scheduling
    random_ = random.Random(seed)
    kills, number, repeats = 0, 0, 0
    while kills < kills_wanted:
        number += 1
        run, kills_of_run, settled = f"run{number}", 0, Counter[str]()
        while True:
            known = store.reader().get(run)
            recover = "takeover" if known is not None and random_.random() < 0.5 else "same"
            arguments = (run,) if recover == "takeover" else ("team", run)
            worker = Child(store, recover, *arguments)
            if kills < kills_wanted:
                if random_.random() < 0.85:  # most kills hit the work, some the launch
                    worker.expect("ready")
                    delay_s = random_.uniform(0.0, 0.35)
                else:
                    delay_s = random_.uniform(0.0, 1.5)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(delay_s)
                ended = worker.process.poll() is not None
                worker.kill()
                if store.url is not None:
                    until_alone(store.url)
                if not ended:
                    kills, kills_of_run = kills + 1, kills_of_run + 1
            else:
                worker.expect("done")
                assert worker.finish() == 0, worker.log.read_text()
            # What was recorded before this process must not have run again in it.
            for key, times in settled.items():
                assert store.runs_of(key) == times, f"{key} ran again after it was recorded (seed {seed})"
            record = store.reader().get(run)
            if known is not None:
                assert record is not None, f"{run} was accepted and is lost (seed {seed})"
            settled = Counter({key: store.runs_of(key) for key in store.recorded_keys(run)})
            if record is not None and record.state == "completed":
                assert record.output == {"total": TOTAL}
                break
            if record is not None and worker.process.returncode == -signal.SIGKILL:
                # At once on SQLite, by the lock file; on Postgres when the lease has run out.
                assert store.url is not None or record.state == "interrupted", record.state
                until(lambda run=run: store.record(run).state != "running")
        check_exactly_once(store, run, kills_of_run)
        repeats += sum(settled.values()) - len(settled)
    print(f"{kills} kills over {number} runs, {repeats} steps in flight ran twice, none that was recorded")


def check_fencing(store: Store) -> None:
    """Stop the owner until another process has finished its run; what it then writes must be refused."""
    with child(store, "serve", "run1") as old:
        old.expect("holding")
        os.kill(old.pid, signal.SIGSTOP)
        try:
            until(lambda: store.record("run1").state == "interrupted")
            with child(store, "takeover", "run1") as new:
                new.expect("holding")
                store.path("gate").touch()
                new.expect("done")
                taken_by = new.pid
        finally:
            os.kill(old.pid, signal.SIGCONT)
        before = store.record("run1")
        assert (before.state, before.output) == ("completed", {"by": taken_by})
        old.say("end")
        # The old owner is well, tells what the store says, and works on other things.
        old.expect("late completed")
        assert store.record("run1") == before
        outputs = {step.name: step.output for step in store.reader().steps("run1")}
        assert outputs["hold"] == {"by": taken_by}
        after_key = next(key for pid, key in store.journal() if pid == taken_by and key != "run1:1")
        assert [pid for pid, key in store.journal() if key == after_key] == [taken_by]


def check_cancel_from_elsewhere(store: Store) -> None:
    with child(store, "serve", "run1") as owner:
        owner.expect("holding")
        with child(store, "cancel", "run1") as other:
            assert other.expect("cancelled") == "cancelled True"
            other.expect("done")
        owner.expect("interrupted run1")
        assert store.record("run1").state == "cancelled"
        owner.say("end")
        owner.expect("alive")
    store.path("gate").touch()
    with child(store, "same", "held", "run1") as again:
        again.expect("done")
    assert store.record("run1").state == "completed"


def check_race(store: Store, runs: int, racers: int) -> None:
    """Every interrupted run is taken by exactly one of the processes that try at the same moment."""
    names = [f"run{n}" for n in range(runs)]
    with child(store, "serve", *names) as owner:
        for _ in names:
            owner.expect("holding")
    until(lambda: {store.record(name).state for name in names} == {"interrupted"})
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(child(store, "race")) for _ in range(racers)]
        for other in others:
            other.expect("ready")
        for other in others:
            other.say("go")
        taken = [other.expect("took").split()[1:] for other in others]
        assert sorted(name for each in taken for name in each) == names, taken
        until(lambda: len(store.journal()) >= 2 * runs)
        until(lambda: {store.record(name).state for name in names} == {"running"})
        store.path("gate").touch()
        until(lambda: {store.record(name).state for name in names} == {"completed"})
        for other in others:
            other.say("end")
            other.expect("done")
    for name in names:
        assert len({pid for pid, key in store.journal() if key == f"{name}:1"}) == 2


def check_killed_while_queued(store: Store) -> None:
    names = ["run1", "run2", "run3"]
    with child(store, "queue", *names) as owner:
        owner.expect("accepted")
        until(lambda: store.record("run1").state == "running")
        states: list[RunState] = [store.record(name).state for name in names]
        assert states == ["running", "queued", "queued"]
    store.path("gate").touch()
    with child(store, "takeover", *names) as new:
        new.expect("done")
    assert {store.record(name).state for name in names} == {"completed"}


def test_killed_at_random_points(tmp_path: Path) -> None:
    """Catches a lost run, a recorded step that runs again, and a wrong result after kill -9 and recovery."""
    seed = int(os.environ.get("ENGINE_SEED", random.SystemRandom().randrange(1 << 32)))
    kill_at_random_points(Store(str(tmp_path)), KILLS, seed)


def test_killed_while_queued(tmp_path: Path) -> None:
    """Catches accepted work that existed only in the memory of the process it waited in."""
    check_killed_while_queued(Store(str(tmp_path)))


def test_race_to_take_over(tmp_path: Path) -> None:
    """Catches two processes that both continue one run."""
    check_race(Store(str(tmp_path)), runs=6, racers=3)


def test_stopped_owner_is_fenced(tmp_path: Path) -> None:
    """Catches a process that comes back from a long pause and overwrites what its successor did."""
    check_fencing(Store(str(tmp_path), lease_s=1.0))


def test_cancel_from_another_process(tmp_path: Path) -> None:
    """Catches a cancellation that changes the state in the store while the owner works on."""
    check_cancel_from_elsewhere(Store(str(tmp_path)))


def test_live_owner_is_left_alone(tmp_path: Path) -> None:
    """Catches a resume that steals a run from a process that is alive."""
    store = Store(str(tmp_path))
    with child(store, "serve", "run1") as owner:
        owner.expect("holding")
        with child(store, "race") as other:
            other.expect("ready")
            other.say("go")
            assert other.expect("took") == "took"
        assert store.record("run1").state == "running"
        assert len(store.journal()) == 1


def test_processes_open_a_new_folder_together(tmp_path: Path) -> None:
    """Catches processes that fail each other while the file is created, switched to WAL and migrated."""
    store = Store(str(tmp_path))
    with contextlib.ExitStack() as stack:
        for other in [stack.enter_context(child(store, "same", "team", f"run{n}")) for n in range(3)]:
            other.expect("done")
            assert other.finish() == 0, other.log.read_text()
    assert {store.record(f"run{n}").state for n in range(3)} == {"completed"}


if __name__ == "__main__":
    asyncio.run(process(Store(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3:]))
