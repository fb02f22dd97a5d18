"""Answers of the run engine's store that are lost: what it did all the same is executed, and fails no run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.core.errors import Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm import executor as executor_module
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import Leases


async def test_what_was_accepted_without_an_answer_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that is in the store, of a process that lives, and that nobody ever executes.

    The commit succeeds and its answer is lost until the engine gives up; then the caller asks again.
    """
    engine = SqlRunEngine(None, tmp_path, lease_s=1.0, runs_parallel_max=8)
    write = checkpoints.write

    def unheard(database: Any, operations: Any, *, again: bool = False) -> Any:
        write(database, operations, again=again)
        raise Unavailable("the answer was lost")

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return {"done": True}

    engine.register("flow", flow)
    async with engine.open(takeover=True):
        monkeypatch.setattr(checkpoints, "write", unheard)
        with pytest.raises(Unavailable, match="lost"):
            await engine.start("flow", "run", {}, tenant="t")
        monkeypatch.setattr(checkpoints, "write", write)
        assert not await engine.start("flow", "run", {}, tenant="t"), "it is there already"
        async with asyncio.timeout(30):
            assert (await engine.wait("run")).output == {"done": True}


async def test_a_claim_without_an_answer_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that a living process has taken over without knowing it."""
    begun, claim = asyncio.Event(), Leases.claim
    hold = asyncio.Event()

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def held(_: StepContext) -> JsonObject:
            begun.set()
            await hold.wait()
            return {}

        return await context.step("held", held)

    def unheard(self: Leases, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(Leases, "claim", claim)
        claim(self, *arguments, **options)
        raise Unavailable("the answer was lost")

    for turn in range(2):
        engine = SqlRunEngine(None, tmp_path, lease_s=1.0, runs_parallel_max=8)
        engine.register("flow", flow)
        async with engine.open(takeover=turn == 1):
            if turn == 0:
                await engine.start("flow", "run", {}, tenant="t")
                await begun.wait()
                monkeypatch.setattr(Leases, "claim", unheard)
                continue
            hold.set()
            async with asyncio.timeout(30):
                assert (await engine.wait("run")).state == "completed"
            assert Leases.claim is claim, "no answer was lost"


async def test_a_history_that_cannot_be_read_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that is recorded as failed because the store was away when it was taken over."""
    begun, hold, read = asyncio.Event(), asyncio.Event(), executor_module.recorded_history

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        async def held(_: StepContext) -> JsonObject:
            begun.set()
            await hold.wait()
            return {}

        return await context.step("held", held)

    def away(*arguments: Any) -> Any:
        monkeypatch.setattr(executor_module, "recorded_history", read)
        raise Unavailable("the run database is away")

    for turn in range(2):
        engine = SqlRunEngine(None, tmp_path, lease_s=1.0, runs_parallel_max=8)
        engine.register("flow", flow)
        async with engine.open(takeover=turn == 1):
            if turn == 0:
                await engine.start("flow", "run", {}, tenant="t")
                await begun.wait()
                monkeypatch.setattr(executor_module, "recorded_history", away)
                continue
            hold.set()
            async with asyncio.timeout(30):
                assert (await engine.wait("run")).state == "completed"
            assert executor_module.recorded_history is read, "it was never away"
