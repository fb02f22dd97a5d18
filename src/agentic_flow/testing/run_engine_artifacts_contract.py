"""What every `RunEngine` must do with what steps leave besides their results.

Part of `run_engine_contract`: its CHECKS include these.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import NewArtifact, RunEngine, StepContext, WorkflowContext
from agentic_flow.testing.run_engine_case import TENANT, TIMEOUT_S, Journal, RunEngineCase

BINARY = bytes(range(256)) * 300


def _leaving(name: str, content: bytes, *, fails: bool = False) -> Callable[[StepContext], Awaitable[Any]]:
    """A step that leaves an artifact, and may fail after it."""

    async def run(step: StepContext) -> JsonObject:
        step.artifacts.append(NewArtifact(name, "application/octet-stream", content))
        if fails:
            raise InvalidInput("no", hint="another time")
        return {}

    return run


async def _told(engine: RunEngine, workflow_id: str) -> list[tuple[str, str, int, bytes | None]]:
    """Who left what: id below the tree's, name, version, bytes."""
    told: list[tuple[str, str, int, bytes | None]] = []
    for one in await engine.artifacts(workflow_id):
        content = await engine.artifact_content(workflow_id, one.number)
        assert content is not None, one
        assert (one.size_bytes, one.sha256) == (len(content), hashlib.sha256(content).hexdigest()), one
        told.append((one.workflow_id.partition(".")[2], one.name, one.version, content))
    return told


async def _end(engine: RunEngine, workflow_id: str, state: str = "completed") -> None:
    async with asyncio.timeout(TIMEOUT_S):
        assert (await engine.wait(workflow_id)).state == state


async def keeps_what_steps_leave(case: RunEngineCase) -> None:
    """Any bytes are kept under their names and versions, with who left them; a failed step leaves none."""

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("draw", _leaving("plots/a.png", BINARY))

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("write", _leaving("report.md", b"one"))
        await context.children(case.id("child"), {"a": {}})
        try:
            await context.step("bad", _leaving("report.md", b"wrong", fails=True))
        except InvalidInput:
            await context.step("write", _leaving("report.md", b""))
        return {}

    run, empty = case.id("run"), case.id("empty")
    async with case.engine(child=child, flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await _end(engine, run)
        await engine.start(case.id("child"), empty, {}, tenant=TENANT)
        await _end(engine, empty)
        expected = [("", "report.md", 1, b"one"), ("a", "plots/a.png", 1, BINARY), ("", "report.md", 2, b"")]
        assert await _told(engine, run) == expected
        assert await _told(engine, f"{run}.a") == expected[1:2]
        records = await engine.artifacts(run)
        assert [(one.step, one.media_type) for one in records] == [
            (name, "application/octet-stream") for name in ("write", "draw", "write")
        ]
        assert sorted({one.number for one in records}) == [one.number for one in records]
        steps = {step.completed_at_s for step in await engine.steps(run)}
        assert {one.created_at_s for one in records} <= steps
        assert await engine.artifact_content(run, 99) is None
    closed = case.make()
    assert await _told(closed, run) == expected, "whoever only reads sees less"
    assert await closed.artifacts(case.id("nobody")) == []


async def leaves_them_once(case: RunEngineCase) -> None:
    """A process that ends before, in and after a step that leaves something: one version, not two or none."""
    journal = Journal()

    async def held(step: StepContext) -> JsonObject:
        await _leaving("held.txt", b"held")(step)
        return await journal.hold("held")(step)

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("first", _leaving("first.txt", b"first"))
        await context.step("held", held)
        return await context.step("last", journal.hold("last"))

    run = case.id("run")
    async with case.engine(flow=flow) as engine:
        await engine.start(case.id("flow"), run, {}, tenant=TENANT)
        await journal.begun.wait()
        assert [one.name for one in await engine.artifacts(run)] == ["first.txt"]
    for _ in range(2):
        journal.begun.clear()
        async with case.engine(flow=flow) as engine:
            assert [one.name for one in await engine.artifacts(run)] == ["first.txt"]
            assert await engine.resume_interrupted() == [run]
            await journal.begun.wait()
    journal.gate.set()
    async with case.engine(flow=flow) as engine:
        assert await engine.resume_interrupted() == [run]
        await _end(engine, run)
        both = [("", "first.txt", 1, b"first"), ("", "held.txt", 1, b"held")]
        assert await _told(engine, run) == both
    assert journal.calls == ["held", "held", "held", "held", "last"]


async def retries_with_what_was_left_before(case: RunEngineCase) -> None:
    """A retried run has the artifacts of the steps that it keeps, in their old versions, and its own."""
    broken = [True]

    async def child(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        return await context.step("draw", _leaving("a.png", BINARY))

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("write", _leaving("report.md", b"one"))
        await context.children(case.id("child"), {"a": {}})
        again = b"again" if payload.get("again") else b"two"
        await context.step("revise", _leaving("report.md", again))
        if broken[0]:
            raise InvalidInput("no", hint="another time")
        return {}

    old, new = case.id("old"), case.id("new")
    async with case.engine(child=child, flow=flow) as engine:
        await engine.start(case.id("flow"), old, {}, tenant=TENANT)
        await _end(engine, old, "failed")
        before = await _told(engine, old)
        broken[0] = False
        assert await engine.retry(old, new, {"again": True}, from_step="revise")
        await _end(engine, new)
        assert await _told(engine, new) == [*before[:2], ("", "report.md", 2, b"again")]
        assert await _told(engine, old) == before
        first = case.id("first")
        assert await engine.retry(old, first, {}, from_step="write")
        await _end(engine, first)
        assert await _told(engine, first) == before


async def removes_them_with_their_run(case: RunEngineCase) -> None:
    """Their bytes count in a limit on bytes, and go with their run, and with no other."""
    tenant = case.id("mine")

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("write", _leaving("big.bin", b"x" * int(payload["bytes"])))
        return {}

    async with case.engine(flow=flow) as engine:
        runs = [case.id(f"r{number}") for number in range(3)]
        for run in runs:
            await engine.start(case.id("flow"), run, {"bytes": 50_000}, tenant=tenant)
            await _end(engine, run)
        would = await engine.purge(tenant, older_than_s=0, keep_bytes=None, dry_run=True)
        assert (would.runs, would.artifacts) == (3, 3)
        assert would.size_bytes > 150_000
        gone = await engine.purge(tenant, older_than_s=None, keep_bytes=60_000)
        assert (gone.runs, gone.artifacts) == (2, 2)
        assert [len(await engine.artifacts(run)) for run in runs] == [0, 0, 1]
        assert await engine.artifact_content(runs[0], 1) is None


ARTIFACT_CHECKS: tuple[Callable[[RunEngineCase], Awaitable[None]], ...] = (
    keeps_what_steps_leave,
    leaves_them_once,
    retries_with_what_was_left_before,
    removes_them_with_their_run,
)
