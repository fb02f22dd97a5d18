"""Memory over HTTP: the real server on real ports, by the twin, through a whole turn of learning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.errors import InvalidInput, NotFound
from agentic_flow.core.settings import load
from agentic_flow.memory.answers import Edit, Note
from agentic_flow.memory.records import Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.remote import RemoteMemory
from agentic_flow.runtime.platform import serve_services

pytestmark = pytest.mark.anyio

TASK = "run the linter on the changed file"


@pytest.fixture
async def urls(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    ports = {f"serve.{name}_port": 0 for name in ("platform", "agentdb", "swarm")}
    settings = load({"data_dir": str(tmp_path), **ports}).settings
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve_services(settings, ["all"], on_ready=ready.set_result, stop=stop, on_owner_key=lambda _: None)
    )
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    yield ready.result()
    stop.set()
    await serving


def lint_run(number: int, recall_id: str, cited: str) -> Trajectory:
    step = TrajectoryStep(name="tool:shell", action="ruff check", observation="no problems")
    return Trajectory(
        id=f"lint-{number}",
        task=TASK,
        outcome="completed",
        answer="done",
        recall_id=recall_id,
        cited=(cited,),
        steps=(step,),
    )


@pytest.mark.parametrize("port", ["platform", "agentdb"])
async def test_a_turn_of_learning(port: str, urls: dict[str, str]) -> None:
    """Catches a route that is not there, a use that is not credited, a recall without its certificate."""
    async with RemoteMemory(urls[port]) as memory:
        kept = await memory.add(
            LOCAL_OWNER,
            Note(title="Run the linter first", content="Its messages name the changed file and line."),
        )
        recall = await memory.recall(LOCAL_OWNER, TASK)
        assert [one.item.id for one in recall.items] == [kept.id]
        assert f"[{kept.id}]" in recall.context
        before = await memory.explain(LOCAL_OWNER, kept.id)
        await memory.record(LOCAL_OWNER, lint_run(1, recall.id, kept.id))
        await memory.add_verdict(LOCAL_OWNER, "lint-1", Verdict(outcome="success", source="person"))
        report = await memory.learn(LOCAL_OWNER, timeout_s=60)
        assert report.settled
        # The verdict came while the run was learned from without it.
        assert report.waiting == 0
        after = await memory.explain(LOCAL_OWNER, kept.id)
        assert after.belief.mean > before.belief.mean
        assert (await memory.trajectory(LOCAL_OWNER, "lint-1")).state == "learned"
        # The person changes their mind: the credit is replaced, not added.
        await memory.add_verdict(LOCAL_OWNER, "lint-1", Verdict(outcome="failure", source="person"))
        await memory.learn(LOCAL_OWNER, timeout_s=60)
        assert (await memory.explain(LOCAL_OWNER, kept.id)).belief.mean < before.belief.mean
        checked = await memory.verify(LOCAL_OWNER)
        assert (checked.whole, checked.certificates) == (True, 1)
        assert (await memory.uplift(LOCAL_OWNER)).recalls == 1
        status = await memory.status(LOCAL_OWNER)
        assert (status.trajectories["learned"], status.recalls, status.skills) == (1, 1, 0)


async def test_bad_input_is_refused(urls: dict[str, str]) -> None:
    """Catches a 500, or a change, for what does not exist or says nothing."""
    async with RemoteMemory(urls["platform"]) as memory:
        with pytest.raises(InvalidInput):
            await memory.recall(LOCAL_OWNER, "  ")
        for unknown in (
            memory.explain(LOCAL_OWNER, "nobody"),
            memory.edit(LOCAL_OWNER, "nobody", Edit(title="a title")),
            memory.trajectory(LOCAL_OWNER, "nobody"),
            memory.add_verdict(LOCAL_OWNER, "nobody", Verdict(outcome="success", source="person")),
        ):
            with pytest.raises(NotFound):
                await unknown
        assert not await memory.forget(LOCAL_OWNER, "nobody")
        assert (await memory.items(LOCAL_OWNER)).items == ()
