"""Worker processes that share a queue, in SQLite and PostgreSQL: killed, drained, and beside each other.

This module is also the program of those workers: `python test_engine_queue.py STORE_JSON PLACES DRAIN_S`.
Every step appends one line to a journal, with fsync, before it returns: the journal says what really ran.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_engine_crash import TENANT, TIMEOUT_S, Store, note, until

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.core.serve import stop_on_signals
from agentic_flow.swarm.engine import SqlRunEngine

QUEUE, RUNS, STEPS, PLACES = "jobs", 40, 3, 2
QUEUED, PEAK_MAX_MB = 10_000, 300
MANY = r"""
import asyncio, json, re, sys
from pathlib import Path
from agentic_flow.swarm.engine import SqlRunEngine

folder, url, queued = json.loads(sys.argv[1])
ended = asyncio.Semaphore(0)

async def flow(context, payload):
    ended.release()
    return {}

async def main():
    engine = SqlRunEngine(url, Path(folder), lease_s=60.0, runs_parallel_max=4)
    engine.register("flow", flow)
    async with engine.open():
        for first in range(0, queued, 1000):
            put = [
                engine.start("flow", f"r{n}", {"text": "x" * 1000}, tenant=f"t{n % 20}", queue="jobs")
                for n in range(first, first + 1000)
            ]
            assert all(await asyncio.gather(*put))
    async with engine.open(queues=["jobs"]):
        for _ in range(50):
            await ended.acquire()
        (depth,) = await engine.queue_depths()
        assert depth.waiting > queued - 1000, depth
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

asyncio.run(main())
"""
"""Queues many runs and works on some; says its peak, as `ru_maxrss` would have that of its parent in it."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def register(engine: SqlRunEngine, store: Store) -> None:
    """What the workers know: `job` notes its steps, `held` waits for the file `gate` in its second one."""

    async def job(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def work(step: StepContext) -> JsonObject:
            await asyncio.sleep(0.005)
            note(store, step)
            return {}

        for number in range(STEPS):
            await context.step(f"s{number}", work)
        return {"by": os.getpid()}

    async def held(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def first(step: StepContext) -> JsonObject:
            note(store, step)
            return {}

        async def second(step: StepContext) -> JsonObject:
            note(store, step)
            while not store.path("gate").exists():
                await asyncio.sleep(0.02)
            return {}

        await context.step("first", first)
        return await context.step("second", second)

    engine.register("job", job)
    engine.register("held", held)


async def work(store: Store, places: int, drain_s: float) -> None:
    """A worker as `agentic-flow worker` is one."""
    engine = store.engine(places)
    register(engine, store)
    stop = asyncio.Event()
    async with engine.open(takeover=True, queues=[QUEUE]):
        with stop_on_signals(stop):
            print("ready", flush=True)
            await stop.wait()
            print("left", await engine.drain(drain_s), flush=True)


async def put(store: Store, name: str, *runs: str) -> None:
    """Put runs into the queue from a process that executes none."""
    engine = store.engine(0)
    register(engine, store)
    async with engine.open():
        accepted = await asyncio.gather(
            *(engine.start(name, run, {}, tenant=TENANT, queue=QUEUE) for run in runs)
        )
    assert all(accepted)


class Worker:
    """One worker process."""

    def __init__(self, store: Store, places: int, drain_s: float) -> None:
        program = [sys.executable, "-W", "error", __file__, json.dumps(store.__dict__)]
        self.log = store.path(f"stderr-{time.monotonic_ns()}")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, str(places), str(drain_s)], stdout=subprocess.PIPE, stderr=log
            )

    def line(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        line = self.process.stdout.readline().decode().strip() if ready else ""
        assert line, self.log.read_text()[-3000:]
        return line


@contextmanager
def worker(store: Store, places: int = PLACES, drain_s: float = 0.0) -> Generator[Worker]:
    """A worker that takes runs; gone at the end."""
    started = Worker(store, places, drain_s)
    try:
        assert started.line() == "ready"
        yield started
    finally:
        started.process.kill()
        started.process.wait(TIMEOUT_S)
        assert started.process.stdout is not None
        started.process.stdout.close()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, and a folder for the journal."""
    if request.param == "sqlite":
        return Store(str(tmp_path))
    from postgres_server import new_database

    return Store(str(tmp_path), url=new_database(request.getfixturevalue("server")), lease_s=3.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Address of a PostgreSQL of this module's own."""
    from postgres_server import postgres_server

    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


def test_a_killed_worker_loses_nothing(store: Store) -> None:
    """Catches a run that is lost with its worker, done by two, or whose recorded steps are repeated."""
    runs = [f"run{number}" for number in range(RUNS)]
    with worker(store) as one, worker(store) as other:
        asyncio.run(put(store, "job", *runs))

        def both_work() -> bool:
            seen = Counter(pid for pid, _ in store.journal())
            return seen[one.process.pid] >= STEPS and seen[other.process.pid] >= STEPS

        until(both_work)
        one.process.kill()
        until(lambda: all(store.record(run).state == "completed" for run in runs))
        counts = Counter(key for _, key in store.journal())
        assert set(counts) == {f"{run}:{step}" for run in runs for step in range(1, STEPS + 1)}
        repeated = {key: count for key, count in counts.items() if count > 1}
        assert len(repeated) <= PLACES, repeated
        assert set(repeated.values()) <= {2}


def test_ten_thousand_wait_in_little_memory(store: Store) -> None:
    """Catches a process that holds in memory what waits in the store, as submitter or as worker."""
    told = json.dumps([store.folder, store.url, QUEUED])
    done = subprocess.run([sys.executable, "-c", MANY, told], stdout=subprocess.PIPE, check=True, timeout=200)
    peak_mb = int(done.stdout) / 1024
    print(f"{peak_mb:.0f} MB with {QUEUED} runs")
    assert peak_mb < PEAK_MAX_MB


def test_a_drained_worker_hands_back_at_once(store: Store) -> None:
    """Catches a run that waits for the lease of a worker that left on purpose, or begins anew."""
    patient = Store(store.folder, store.url, lease_s=600.0)
    with worker(patient) as one:
        asyncio.run(put(patient, "held", "run"))
        until(lambda: patient.runs_of("run:2") == 1)
        one.process.send_signal(signal.SIGTERM)
        assert one.line() == "left 1"
        assert one.process.wait(TIMEOUT_S) == 0
        assert patient.record("run").state == "queued"
    patient.path("gate").touch()
    with worker(patient):
        until(lambda: patient.record("run").state == "completed")
    assert (patient.runs_of("run:1"), patient.runs_of("run:2")) == (1, 2)


def test_a_draining_worker_finishes(store: Store) -> None:
    """Catches a worker that drops what it could finish in time, or goes on taking runs meanwhile."""
    with worker(store, places=1, drain_s=TIMEOUT_S) as one:
        asyncio.run(put(store, "held", "run"))
        until(lambda: store.runs_of("run:2") == 1)
        one.process.send_signal(signal.SIGTERM)
        asyncio.run(put(store, "job", "next"))
        store.path("gate").touch()
        assert one.line() == "left 0"
        assert one.process.wait(TIMEOUT_S) == 0
    assert (store.record("run").state, store.record("next").state) == ("completed", "queued")


def test_a_second_signal_ends_it_at_once(store: Store) -> None:
    """Catches a worker that cannot be hurried: it must not wait for what it drains."""
    with worker(store, drain_s=TIMEOUT_S) as one:
        asyncio.run(put(store, "held", "run"))
        until(lambda: store.runs_of("run:2") == 1)
        one.process.send_signal(signal.SIGTERM)
        until(lambda: _takes_the_default_action(one.process.pid))
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(TIMEOUT_S) == -signal.SIGTERM
    store.path("gate").touch()
    with worker(store):
        until(lambda: store.record("run").state == "completed")


def _takes_the_default_action(pid: int) -> bool:
    """Whether SIGTERM is no longer caught, from the process's mask of caught signals."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return not int(caught, 16) >> (signal.SIGTERM - 1) & 1


if __name__ == "__main__":
    asyncio.run(work(Store(**json.loads(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])))
