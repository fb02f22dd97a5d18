"""Lives that record trajectories and learn from them, each killed at random; see test_memory_crash.

    python memory_learner.py FOLDER LIVES COUNT SEED [DATABASE_URL]

This process imports everything once and then only forks, which makes a kill cost little. A life records COUNT
trajectories and learns at the same time, also from what earlier lives left. It notes each trajectory in
FOLDER/acknowledged once `record` has returned, and each judgement in FOLDER/judged. The first life is left to
itself, to see how long one takes. At the end the number of lives that had to be killed is printed. The store
is in FOLDER, or in a database of PostgreSQL.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from agentic_flow.agentdb.postgres.store import PostgresAgentDB
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline, SystemClock
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings, MemorySettings
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.distill import Distiller
from agentic_flow.memory.learning import Learner
from agentic_flow.memory.records import MemoryItem, Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.trajectories import Trajectories

TENANT = "t-crash"
SHOWN = ("shared-1", "shared-2")
LEASE_S = 60.0
WORDS = (
    "apple bridge candle dragon engine forest garden harbor island jacket kettle ladder magnet needle "
    "orange pencil quartz ribbon saddle tunnel umbrella violin window yellow zipper"
).split()


class LaterClock(SystemClock):
    """The system's clock, moved on by a lease for each life: who comes next need not wait for the dead."""

    def __init__(self, life: int) -> None:
        self._ahead_s = life * (LEASE_S + 1)

    def time_s(self) -> float:
        return super().time_s() + self._ahead_s


class NotingJudge:
    """Notes whom it judged before it says so; every third failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict:
        note(self._folder / "judged", trajectory.id)
        outcome = "failure" if int(trajectory.id[1:]) % 3 == 0 else "success"
        return Verdict(outcome=outcome, confidence=1.0, source="judge")

    async def judging_model(self, principal: Principal) -> str | None:
        return None


def note(path: Path, line: str) -> None:
    """Append a line at once; what is written survives the process."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def tried(number: int) -> Trajectory:
    """A run that tells its number, unlike all others in its words."""
    rng = random.Random(number)
    told = " ".join(rng.choices(WORDS, k=8))
    steps = (
        TrajectoryStep(agent="w", name=f"tool-{told.split()[0]}", action=told, observation=f"saw {number}"),
        TrajectoryStep(agent="w", name=f"tool-{told.split()[1]}", action=told[::-1], observation="end"),
    )
    return Trajectory(
        id=f"r{number}",
        task=f"{told} {number}",
        outcome="completed",
        answer=told,
        steps=steps,
        recall_id="recall",
        cited=("shared-1",),
    )


def store_in(folder: Path, url: str | None) -> AgentDB | PostgresAgentDB:
    """The store, to be opened."""
    return AgentDB(folder, AgentDBSettings()) if url is None else PostgresAgentDB(url, AgentDBSettings())


def parts(store: VectorStore, folder: Path, life: int) -> tuple[Trajectories, Bank, Learner]:
    """Memory over a store, as of a life."""
    clock, settings = LaterClock(life), MemorySettings()
    trajectories, bank = Trajectories(store, settings, clock=clock), Bank(store, settings, clock=clock)

    async def shown(tenant: str, recall_id: str) -> Sequence[str]:
        return SHOWN

    learner = Learner(
        trajectories,
        bank,
        NotingJudge(folder),
        Distiller(None, model=None, clock=clock),
        settings,
        clock=clock,
        shown=shown,
        lease_s=LEASE_S,
    )
    return trajectories, bank, learner


async def make(folder: Path, url: str | None) -> None:
    """The store with the items that every run is shown."""
    async with store_in(folder, url) as store:
        _, bank, _ = parts(store, folder, 0)
        items = [
            MemoryItem(id=one, title=f"Shared {word}", content=f"{word} {word} {word}")
            for one, word in zip(SHOWN, ("anvil", "meadow"), strict=True)
        ]
        await bank.add(TENANT, items, idempotency_key="shared")


async def live(folder: Path, url: str | None, life: int, first: int, count: int) -> None:
    """Record and learn, at the same time."""
    async with store_in(folder, url) as store:
        trajectories, _, learner = parts(store, folder, life)
        learner.start()
        for number in range(first, first + count):
            await trajectories.record(TENANT, tried(number))
            note(folder / "acknowledged", f"r{number}")
            learner.wake(TENANT)
        await learner.settle(TENANT)
        await learner.close()


def killed_after(seconds: float | None, life: int, living: Coroutine[Any, Any, None]) -> bool:
    """One life in a process of its own; whether it had to be killed, which it is after so many seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.run(living)
            status = 0
        finally:
            os._exit(status)
    living.close()
    ended = os.pidfd_open(child)
    try:
        alive = not select.select([ended], [], [], seconds)[0]
        if alive:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(ended)
    if not alive and status != 0:
        raise SystemExit(f"life {life} ended with status {status}")
    return alive


def main() -> None:
    folder, lives, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    url = sys.argv[5] if len(sys.argv) > 5 else None
    rng = random.Random(seed)
    asyncio.run(make(folder, url))
    killed, whole_s = 0, None
    for life in range(1, lives + 1):
        # As long as the last one took that was not killed, at the most: machines differ.
        after_s = None if whole_s is None else rng.uniform(0.02, 1.0) * whole_s
        began_s = time.monotonic()
        if killed_after(after_s, life, live(folder, url, life, life * count, count)):
            killed += 1
        else:
            whole_s = time.monotonic() - began_s
    print(killed)


if __name__ == "__main__":
    main()
