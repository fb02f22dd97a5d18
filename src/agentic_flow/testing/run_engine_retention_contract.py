"""What every `RunEngine` must do when ended workflows are removed.

Part of `run_engine_contract`: its CHECKS include these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import PurgeReport, WorkflowContext
from agentic_flow.testing.run_engine_case import TIMEOUT_S, Journal, RunEngineCase


async def _tree(context: WorkflowContext, payload: JsonObject) -> JsonObject:
    await context.step("text", Journal().note("x" * int(payload.get("chars", 1))))
    if payload.get("waits"):
        await context.receive("news")
    if "child" in payload:
        await context.children(payload["child"], {"a": {}, "b": {}})
    return {}


async def removes_what_has_ended(case: RunEngineCase) -> None:
    """A purge leaves nothing of an ended tree, and everything of those alive, named or another tenant's."""
    tenant, other = case.id("mine"), case.id("other")
    child = case.id("tree")

    async def start(run: str, payload: JsonObject, owner: str = tenant) -> str:
        await engine.start(child, case.id(run), payload, tenant=owner)
        return case.id(run)

    async with case.engine(tree=_tree) as engine:
        gone = await start("gone", {"child": child, "waits": True})
        await engine.send(gone, "news", {}, key="k")
        kept = [await start("named", {}), await start("theirs", {}, other)]
        alive = await start("alive", {"waits": True, "learns_from": [kept[0]]})
        async with asyncio.timeout(TIMEOUT_S):
            for run in (gone, *kept):
                await engine.wait(run)
        told = [run for run in kept if await engine.events(run)]
        assert told == kept
        none = await engine.purge(tenant, older_than_s=3600, keep_bytes=None)
        assert none == PurgeReport()
        would = await case.make().purge(tenant, older_than_s=0, keep_bytes=None, dry_run=True)
        assert (would.runs, would.agents, would.steps, would.messages) == (1, 2, 5, 1)
        assert would.events == len(await engine.events(gone))
        assert would.size_bytes > 0
        assert await engine.get(gone) is not None, "a dry run removed it"
        assert await engine.purge(tenant, older_than_s=0, keep_bytes=None) == replace(would, dry_run=False)
        for left in (await engine.get(gone), await engine.get(f"{gone}.a")):
            assert left is None
        for empty in (await engine.steps(gone), await engine.events(gone), await engine.messages(gone)):
            assert empty == []
        assert [run for run in (*kept, alive) if await engine.get(run) is None] == []
        await engine.send(alive, "news", {}, key="k")
        async with asyncio.timeout(TIMEOUT_S):
            assert (await engine.wait(alive)).state == "completed"
        assert await engine.start(child, gone, {}, tenant=tenant), "its id is free again"
        await engine.wait(gone)
        assert (await engine.purge(tenant, older_than_s=0, keep_bytes=None)).runs == 3
        assert await engine.get(kept[1]) is not None


async def keeps_the_newest_within_a_size(case: RunEngineCase) -> None:
    """A limit on bytes removes the oldest first, and no more of them than it must."""
    tenant = case.id("mine")
    async with case.engine(tree=_tree) as engine:
        runs = [case.id(f"r{number}") for number in range(4)]
        for run in runs:
            await engine.start(case.id("tree"), run, {"chars": 10_000}, tenant=tenant)
            await engine.wait(run)
        whole = await engine.purge(tenant, older_than_s=0, keep_bytes=None, dry_run=True)
        assert whole.runs == 4
        assert whole.size_bytes > 40_000
        assert (await engine.purge(tenant, older_than_s=None, keep_bytes=whole.size_bytes)).runs == 0
        found = await engine.purge(tenant, older_than_s=None, keep_bytes=whole.size_bytes // 2 + 100)
        assert found.runs == 2
        assert [run for run in runs if await engine.get(run) is not None] == runs[2:]
        both = await engine.purge(tenant, older_than_s=3600, keep_bytes=0)
        assert both.runs == 2
        assert await engine.get(runs[3]) is None


async def purges_beside_a_resume(case: RunEngineCase) -> None:
    """A cancelled workflow that is resumed while it is purged either goes on whole or is wholly gone."""
    tenant = case.id("mine")
    async with case.engine(tree=_tree) as engine, case.engine(tree=_tree) as other:
        for number in range(8):
            run = case.id(f"r{number}")
            await engine.start(case.id("tree"), run, {"waits": True}, tenant=tenant)
            assert await engine.cancel(run)
            resumed, gone = await asyncio.gather(
                other.resume(run), engine.purge(tenant, older_than_s=0, keep_bytes=None)
            )
            if gone.runs:
                assert not resumed
                assert await engine.get(run) is None
            else:
                assert resumed
                await engine.send(run, "news", {}, key="k")
                async with asyncio.timeout(TIMEOUT_S):
                    assert (await engine.wait(run)).state == "completed"
                await engine.purge(tenant, older_than_s=0, keep_bytes=None)


RETENTION_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    removes_what_has_ended,
    keeps_the_newest_within_a_size,
    purges_beside_a_resume,
)
