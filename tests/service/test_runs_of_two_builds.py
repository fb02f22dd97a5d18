"""Runs and schedules of a newer build, as this one's callers see them and as it goes on with them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_run_retry import agent, settings_at
from test_schedules import OWNER, Runs, SetClock, flow, process

from agentic_flow.client import AsyncClient
from agentic_flow.core.errors import NeedsNewer
from agentic_flow.testing.fake_provider import FakeProvider, Reply

WAITS = {"id": "first", "wait_for": {"signal": "go"}}


def write_flow(place: Path) -> Path:
    path = place / "flow.yaml"
    steps = [WAITS, agent("a", "first"), {**agent("b", "a"), "retry": {"attempts": 1}}]
    path.write_text(json.dumps({"name": "w", "steps": steps}), "utf-8")
    return path


def stored(place: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(place / "data" / "runs" / "runs.db", timeout=60.0)) as connection:
        rows = connection.execute(statement, values).fetchall()
        connection.commit()
        return rows


def rewrite(place: Path, run_id: str, change: Any) -> None:
    """Let a newer build have stored a run's payload."""
    ((text,),) = stored(place, "SELECT payload FROM af_workflows WHERE workflow_id = ?", run_id)
    payload = json.loads(text)
    change(payload)
    stored(place, "UPDATE af_workflows SET payload = ? WHERE workflow_id = ?", json.dumps(payload), run_id)


async def interrupted(place: Path, provider: FakeProvider) -> str:
    """A run that waits in its first step, and whose process has gone."""
    async with AsyncClient(settings=settings_at(place, provider)) as client, asyncio.timeout(60):
        run_id = await client.workflows.submit(write_flow(place))
        async for event in client.runs.events(run_id):
            if event.kind == "step_finished" and str(event.name).startswith("wait:"):
                return run_id
    raise AssertionError("it never waited")


def test_a_newer_builds_run_goes_on_here_and_keeps_what_it_says(tmp_path: Path) -> None:
    """Catches keys of a newer build that stop a run, or that are gone from what its steps and its retry were
    given; and an event of a new kind that ends the stream."""

    def answer(request: Any) -> Reply:
        return Reply.text("said")

    def more(payload: Any) -> None:
        payload["newer"] = 1
        payload["run"]["newer"] = 2
        payload["run"]["spec"]["newer"] = {"x": 3}
        payload["agents"]["a"]["newer"] = 4
        payload["workflow"]["steps"][1]["newer"] = 5

    async def main(provider: FakeProvider) -> None:
        run_id = await interrupted(tmp_path, provider)
        rewrite(tmp_path, run_id, more)
        stored(
            tmp_path, "UPDATE af_events SET kind = 'polished' WHERE root_id = ? AND kind = 'started'", run_id
        )
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client, asyncio.timeout(60):
            (listed,) = await client.runs.list()
            assert (listed.state, listed.error) == ("interrupted", None)
            await client.runs.signal(run_id, "go")
            result = await client.runs.resume(run_id)
            assert result.state == "completed", result.error
            others = [event async for event in client.runs.events(run_id) if event.kind == "other"]
            assert [event.data for event in others] == [{"kind": "polished"}]
            again = await client.runs.retry(run_id, from_step="b")
            assert (await client.runs.wait(again)).state == "completed"
            same = await client.workflows.submit(write_flow(tmp_path), idempotency_key="k")
            rewrite(tmp_path, same, more)
            assert await client.workflows.submit(write_flow(tmp_path), idempotency_key="k") == same
            await client.runs.cancel(same)
        rows = dict(stored(tmp_path, "SELECT workflow_id, payload FROM af_workflows"))
        for run in (run_id, again):
            payload = json.loads(rows[run])
            assert (payload["newer"], payload["run"]["newer"]) == (1, 2)
            below = {key: json.loads(text) for key, text in rows.items() if key.startswith(f"{run}.b")}
            assert len(below) == 2, "the step and its agent"
            for given in below.values():
                assert (given["run"]["newer"], given["run"]["spec"]["newer"]) == (2, {"x": 3}), given
        step = json.loads(rows[f"{run_id}.a"])
        assert (step["step"]["newer"], step["brief"]["newer"]) == (5, 4)

    with FakeProvider(answer) as provider:
        asyncio.run(main(provider))


def test_a_run_that_needs_a_newer_build_is_left_to_it(tmp_path: Path) -> None:
    """Catches a list that one such run breaks, a run that goes on here all the same, and a caller who is not
    told what to do."""

    def more(payload: Any) -> None:
        payload["run"]["reader_min"] = 2

    async def main(provider: FakeProvider) -> None:
        run_id = await interrupted(tmp_path, provider)
        rewrite(tmp_path, run_id, more)
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client, asyncio.timeout(60):
            (listed,) = await client.runs.list()
            assert listed.error is not None
            assert (listed.state, listed.error["code"]) == ("interrupted", "needs_newer")
            assert (await client.runs.show(run_id)).error == listed.error
            for operation in (client.runs.resume(run_id), client.runs.retry(run_id)):
                with pytest.raises(NeedsNewer, match="number 2") as refused:
                    await operation
                assert refused.value.hint
            assert await client.runs.cancel(run_id)
            assert (await client.runs.show(run_id)).state == "cancelled"
        assert provider.requests == []

    with FakeProvider() as provider:
        asyncio.run(main(provider))


@pytest.mark.anyio
async def test_schedules_of_a_newer_build(tmp_path: Path) -> None:
    """Catches a schedule with unknown keys that is not kept, one that needs a newer build and is fired here,
    or that keeps the others from being fired."""
    runs, clock = Runs(), SetClock()
    (tmp_path / "data").mkdir()
    async with process(tmp_path / "data", runs, clock) as one:
        for name in ("plain", "more", "later"):
            await one.add(OWNER, flow("every_s: 3600", name))
        for name, key, value in (("more", "newer", 1), ("later", "reader_min", 2)):
            ((text,),) = stored(tmp_path, "SELECT request FROM af_schedules WHERE name = ?", name)
            request = json.dumps(json.loads(text) | {key: value})
            stored(tmp_path, "UPDATE af_schedules SET request = ? WHERE name = ?", request, name)
        clock.now_s += 3601
        await one.fire_due()
        assert len(runs.made) == 2
        assert [shown.name for shown in await one.every(OWNER)] == ["more", "plain"]
        with pytest.raises(NeedsNewer):
            await one.show(OWNER, "later")
        assert await one.pause(OWNER, "more")
        await one.remove(OWNER, "later")
    ((text, paused),) = stored(tmp_path, "SELECT request, is_paused FROM af_schedules WHERE name = 'more'")
    assert (json.loads(text)["newer"], paused) == (1, 1)
