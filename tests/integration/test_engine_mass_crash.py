"""A thousand accepted tasks while every process is killed again and again, on SQLite and on PostgreSQL.

One process accepts tasks (and works on them), two others work; all are killed by SIGKILL at random points, at
times all at once, and others come in their place. They are forked from a server that has everything imported,
so that most of a life is work. Every step notes that it ran, and has an effect under its idempotency key: it
adds to an account, once for each key.

`MASS_TASKS` and `MASS_KILLS` are the sizes, `MASS_SEED` replays the choices, though not the scheduling.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from test_engine_crash import Store

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import RunDatabase
from postgres_server import new_database, postgres_server

TASKS = int(os.environ.get("MASS_TASKS", "1000"))
KILLS = int(os.environ.get("MASS_KILLS", "200"))
LEASE_S = 1.0
PLACES = 16
STEPS = ("1", ".x:1", ".y:1", "6")
TAKEOVER_MAX_S = 30.0
"""Generous, for a busy machine; what is promised is 15 s, and the test prints what it took."""
TIMEOUT_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
forks: Any = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "pytest",
        "agentic_flow.agentdb.postgres.schema",
        "agentic_flow.core.settings",
        "agentic_flow.swarm.engine",
        "sqlalchemy.dialects.postgresql.psycopg",
    ]
)


# ---- the processes -------------------------------------------------------------------------------------


def append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def pay(store: Store, key: str) -> None:
    """The effect: one more on the account, unless this key has paid already."""
    with closing(sqlite3.connect(store.path("account.db"), timeout=60, isolation_level=None)) as account:
        account.execute("BEGIN IMMEDIATE")
        done = account.execute("INSERT INTO paid VALUES (?) ON CONFLICT DO NOTHING", (key,))
        if done.rowcount:
            account.execute("UPDATE account SET balance = balance + 1")
        account.execute("COMMIT")


def open_account(store: Store) -> None:
    with closing(sqlite3.connect(store.path("account.db"), isolation_level=None)) as account:
        account.execute("PRAGMA journal_mode = WAL")
        account.execute("CREATE TABLE paid (key TEXT PRIMARY KEY)")
        account.execute("CREATE TABLE account (balance INTEGER)")
        account.execute("INSERT INTO account VALUES (0)")


def register(engine: SqlRunEngine, store: Store) -> None:
    async def work(step: StepContext) -> JsonObject:
        append(store.path("journal"), f"{time.time():.6f} {os.getpid()} {step.idempotency_key}\n")
        await asyncio.sleep(random.uniform(0.0, 0.03))
        await asyncio.to_thread(pay, store, step.idempotency_key)
        return {"by": os.getpid()}

    async def agent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("work", work)

    async def task(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("plan", work)
        await context.children("agent", {"x": {}, "y": {}})
        await context.step("merge", work)
        return {"number": payload["number"]}

    async def hold(step: StepContext) -> JsonObject:
        append(store.path("holding"), f"{step.idempotency_key}\n")
        while not store.path("gate").exists():
            await asyncio.sleep(0.05)
        return {"by": os.getpid()}

    async def held_agent(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("hold", hold)

    async def held(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        """Held in its first step, after a step, or in a child."""
        if payload["at"] == "child":
            return (await context.children("held_agent", {"x": {}}))["x"]
        if payload["at"] == "later":
            await context.step("plan", work)
        return await context.step("hold", hold)

    for name, workflow in {"agent": agent, "task": task, "held": held, "held_agent": held_agent}.items():
        engine.register(name, workflow)


def live(store: Store, role: str, places: int = PLACES) -> None:
    """What a process does until it is killed."""
    asyncio.run(_live(store, role, places))


async def _live(store: Store, role: str, places: int) -> None:
    engine = store.engine(runs_parallel_max=places)
    register(engine, store)
    async with engine.open(takeover=role != "holder"):
        store.path(f"ready-{os.getpid()}").touch()
        if role == "coordinator":
            await _accept(engine, store)
        elif role == "holder":
            for point in POINTS:
                await engine.start("held", point, {"at": point}, tenant="t0")
            store.path("all-accepted").touch()
        await asyncio.Event().wait()


async def _accept(engine: SqlRunEngine, store: Store) -> None:
    number = len(accepted(store))
    while number < TASKS:
        while number >= int(store.path("quota").read_text() or 0):
            await asyncio.sleep(0.01)
        # What was accepted and not noted before the kill is submitted again, under the same id.
        await engine.start("task", f"t{number}", {"number": number}, tenant=f"tenant{number % 5}")
        append(store.path("accepted"), f"t{number}\n")
        number += 1


# ---- the tests' side -----------------------------------------------------------------------------------


def accepted(store: Store) -> list[str]:
    path = store.path("accepted")
    return path.read_text().split() if path.exists() else []


def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at_s, f"{what} did not happen within {TIMEOUT_S} s"
        time.sleep(0.005)


@contextmanager
def processes(store: Store, *roles: str) -> Generator[list[BaseProcess]]:
    """One of each role; the list may be changed. All are dead at the end."""
    started: list[BaseProcess] = []
    try:
        started += [begin(store, role) for role in roles]
        yield started
    finally:
        for process in started:
            kill(process)


def begin(store: Store, role: str, places: int = PLACES) -> BaseProcess:
    process = forks.Process(target=live, args=(store, role, places))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def is_ready(store: Store, process: BaseProcess) -> bool:
    assert process.is_alive(), f"process {process.pid} ended by itself"
    return store.path(f"ready-{process.pid}").exists()


def kill_many(store: Store, seed: int) -> int:
    """Kill at random points until enough, then let the last ones end everything; the number of kills."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    roles = ("coordinator", "worker", "worker")
    kills = 0
    set_quota(store, 10)
    with processes(store, *roles) as lives:
        while kills < KILLS:
            victims = rng.sample(range(len(roles)), 3 if rng.random() < 0.05 else 1)
            if rng.random() < 0.9:  # most kills hit the work, some the launch
                for victim in victims:
                    until(lambda at=victim: is_ready(store, lives[at]), "the start of a process")
                time.sleep(rng.uniform(0.0, 0.25))
            else:
                time.sleep(rng.uniform(0.0, 0.1))
            for victim in victims:
                kill(lives[victim])
                kills += 1
            for victim in victims:
                lives[victim] = begin(store, roles[victim])
            set_quota(store, 10 + TASKS * kills // KILLS)
        set_quota(store, TASKS)
        until(lambda: len(accepted(store)) == TASKS, "the acceptance of all tasks")
        database = RunDatabase(store.url, Path(store.folder), pooled=False)
        ended = "SELECT count(*) FROM af_workflows WHERE parent_id IS NULL AND ended_at_s IS NOT NULL"
        until(lambda: database.rows(ended)[0][0] == TASKS, "the end of all tasks")
    return kills


def set_quota(store: Store, quota: int) -> None:
    new = store.path("quota.new")
    new.write_text(str(min(quota, TASKS)))
    new.replace(store.path("quota"))


def check(store: Store, kills: int) -> None:
    """Nothing lost, nothing recorded twice, no effect twice, and repeats only of what was in flight."""
    database = RunDatabase(store.url, Path(store.folder), pooled=False)
    ended = database.rows("SELECT workflow_id, status, output FROM af_workflows WHERE parent_id IS NULL")
    assert {(row[0], row[1], row[2]) for row in ended} == {
        (f"t{number}", "completed", f'{{"number":{number}}}') for number in range(TASKS)
    }
    wanted = {f"t{n}{':' if step.isdigit() else ''}{step}" for n in range(TASKS) for step in STEPS}
    rows = database.rows("SELECT workflow_id, step_index, output, completed_at_s FROM af_steps")
    recorded = {f"{row[0]}:{row[1]}": (str(row[2]), float(row[3])) for row in rows}
    assert recorded.keys() == wanted
    journal = [line.split() for line in store.path("journal").read_text().splitlines()]
    ran = Counter(key for _, _, key in journal)
    assert ran.keys() == wanted
    with closing(sqlite3.connect(store.path("account.db"))) as account:
        assert account.execute("SELECT balance FROM account").fetchone() == (len(wanted),)
        assert account.execute("SELECT count(*) FROM paid").fetchone() == (len(wanted),)
    # A process that was silent for a lease and lives may be a step late; only its record is refused.
    late = [
        (pid, key)
        for at_s, pid, key in journal
        if float(at_s) > recorded[key][1] and recorded[key][0] != f'{{"by":{pid}}}'
    ]
    again = [
        (pid, key)
        for at_s, pid, key in journal
        if float(at_s) > recorded[key][1] and recorded[key][0] == f'{{"by":{pid}}}'
    ]
    assert again == [], "a step ran again after its own process had recorded it"
    repeats = sum(ran.values()) - len(ran)
    assert len(late) <= kills // 20, late
    assert repeats <= kills * PLACES * 2
    told = database.rows(
        "SELECT root_id, count(*), max(sequence), sum(CASE WHEN kind = 'step_finished' THEN 1 ELSE 0 END), "
        "sum(CASE WHEN kind = 'ended' THEN 1 ELSE 0 END), "
        "sum(CASE WHEN kind = 'taken_over' THEN 1 ELSE 0 END) FROM af_events GROUP BY root_id"
    )
    assert len(told) == TASKS
    assert all(row[1] == row[2] and (row[3], row[4]) == (len(STEPS), 1) for row in told)
    takeovers = sum(row[5] for row in told)
    assert takeovers > kills / 4, "most kills must hit the work"
    print(
        f"{TASKS} tasks, {kills} kills: 0 lost, {takeovers} take-overs, {repeats} of {len(ran)} steps ran "
        f"again while in flight ({len(late)} by a late process), 0 effects twice"
    )


def mass_crash(store: Store) -> None:
    open_account(store)
    check(store, kill_many(store, int(os.environ.get("MASS_SEED", random.SystemRandom().randrange(1 << 32)))))


def test_a_thousand_tasks_on_sqlite(tmp_path: Path) -> None:
    """Catches a task that is lost, recorded twice, or whose effect happens twice, whoever dies when."""
    mass_crash(Store(str(tmp_path), lease_s=LEASE_S))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A PostgreSQL of this module's own."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


def test_a_thousand_tasks_on_postgres(server: str, tmp_path: Path) -> None:
    """Catches the same where only the lease tells that a process died."""
    mass_crash(Store(str(tmp_path), url=new_database(server), lease_s=LEASE_S))


POINTS = ("first", "later", "child", "queued")


def held(store: Store) -> int:
    """How many runs are held."""
    path = store.path("holding")
    return len(path.read_text().split()) if path.exists() else 0


def test_takeover_at_the_default_lease(server: str, tmp_path: Path) -> None:
    """Catches a dead process's runs that wait for much longer than a lease, wherever they were."""
    from agentic_flow.core.settings import Settings

    store = Store(str(tmp_path), url=new_database(server), lease_s=Settings().swarm.lease_s)
    open_account(store)
    with processes(store, "worker") as lives:
        holder = begin(store, "holder", len(POINTS) - 1)
        lives.append(holder)
        until(lambda: store.path("all-accepted").exists(), "the acceptance")
        until(lambda: held(store) == len(POINTS) - 1, "the work")
        assert [store.record(point).state for point in POINTS] == ["running"] * 3 + ["queued"]
        killed_at_s = time.time()
        kill(holder)
        store.path("gate").touch()
        until(lambda: {store.record(point).state for point in POINTS} == {"completed"}, "the end")
        for point in POINTS:
            events = {event.kind: event for event in store.reader().events(point)}
            after_s = events["taken_over"].at_s - killed_at_s
            print(f"{point}: taken over {after_s:.2f} s after the kill")
            assert after_s <= TAKEOVER_MAX_S, point
            assert store.record(point).output == {"by": lives[0].pid}
