"""Learning on PostgreSQL: two processes' worth of stores over one database."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

from agentic_flow.agentdb.postgres.store import PostgresAgentDB
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.settings import AgentDBSettings, MemorySettings
from agentic_flow.memory.bank import Bank
from agentic_flow.memory.distill import Distiller
from agentic_flow.memory.judge import Judge
from agentic_flow.memory.learning import Learner
from agentic_flow.memory.records import Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.trajectories import Trajectories
from postgres_server import TEMPLATE, make_template, new_database, postgres_server

pytestmark = pytest.mark.anyio

T = "t-learn"
RUNS = 12
WORDS = "anchor basket canyon donkey elbow feather guitar hammer insect jungle koala lemon".split()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A migrated database on a server of this module's own."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        make_template(server)
        yield new_database(server, template=TEMPLATE)


def memory_on(store: VectorStore) -> tuple[Trajectories, Bank, Learner]:
    settings = MemorySettings()
    trajectories, bank = Trajectories(store, settings), Bank(store, settings)
    judge, distiller = Judge(None, model=None), Distiller(None, model=None)
    return trajectories, bank, Learner(trajectories, bank, judge, distiller, settings)


async def test_two_stores_share_a_queue(url: str) -> None:
    """Catches a trajectory that is lost, learned from twice or never, or a verdict that changes nothing."""
    async with PostgresAgentDB(url, AgentDBSettings()) as one, PostgresAgentDB(url, AgentDBSettings()) as two:
        trajectories, bank, first = memory_on(one)
        _, _, second = memory_on(two)
        for number, word in enumerate(WORDS):
            step = TrajectoryStep(
                agent="w", name=f"use-{word}", action=f"the {word} {number}", observation="ok"
            )
            begun = Trajectory(id=f"r{number}", task=f"find the {word} \x00 of {number}", agent="w")
            await trajectories.start(T, begun)
            await trajectories.append(T, begun.id, [step])
            await trajectories.finish(T, begun.id, outcome="completed", answer=f"{word} found")
        assert await trajectories.tenants() == [T]
        await asyncio.gather(first.settle(), second.settle())
        assert first.stats.learned + second.stats.learned == RUNS
        assert first.stats.failures == second.stats.failures == {}
        learned, _ = await trajectories.list_trajectories(T, state="learned")
        assert {run.attempts for run in learned} == {1}
        assert {run.steps_total for run in learned} == {1}
        assert len(learned) == RUNS
        assert (await bank.recall(T, "find the guitar")).items[0].item.sources[0].trajectory_id == "r6"
        await trajectories.add_verdict(T, "r6", Verdict(outcome="failure", source="person"))
        await second.settle()
        after = await trajectories.get(T, "r6")
        assert after is not None
        assert after.item_ids == ("r6.f1",)
        assert await bank.get(T, ["r6.s1"]) == []
