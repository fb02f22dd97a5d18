"""Schedules between real processes, and on PostgreSQL."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_process import Place
from test_run_signals import call
from test_schedules import (
    check_a_process_dies_while_it_fires,
    check_pause_resume_remove_and_names,
    check_two_processes_fire_once,
)

from agentic_flow.client import AsyncClient
from postgres_server import new_database, postgres_server

pytestmark = pytest.mark.timeout(300)

FLOW = """
name: often
schedule: {every_s: 1}
inputs: {n: {type: integer}}
steps:
- {id: a, timeout_s: 0.01, wait_for: {signal: never, default: 1}}
outputs: {n: "{{ inputs.n }}"}
"""


def is_firing(place: Place) -> bool:
    """Whether a due time was noted whose run is not counted yet: it is made, pause or not."""
    with closing(sqlite3.connect(place.data_dir / "runs" / "runs.db", timeout=60.0)) as runs:
        return runs.execute("SELECT firing_s FROM af_schedules").fetchone() != (None,)


def test_two_servers_and_a_kill(tmp_path: Path) -> None:
    """Catches a schedule that two servers both fire, or that dies with the one that fired it first."""
    place = Place(tmp_path)
    flow = tmp_path / "often.yaml"
    flow.write_text(FLOW, "utf-8")
    wrong = place.run("schedules", "add", str(flow), "--input", "n=one")
    assert wrong.code == 2, wrong.err
    added = place.run("schedules", "add", str(flow), "--input", "n=7", "--json")
    assert (added.code, added.data["state"], added.data["fired"]) == (0, "active", 0), added.err

    async def until(url: str, wanted: Callable[[Any], bool]) -> Any:
        async with AsyncClient(url) as client, asyncio.timeout(120):
            while not wanted(shown := await client.schedules.show("often")):
                await asyncio.sleep(0.1)
        return shown

    with place.start("serve", "platform") as one, place.start("serve", "platform") as other:
        here, there = one.addresses(1)["platform"], other.addresses(1)["platform"]
        before = asyncio.run(until(here, lambda shown: shown.fired >= 3))
        one.signal(signal.SIGKILL)
        one.end()
        asyncio.run(until(there, lambda shown: shown.fired >= before.fired + 3))
        assert call(f"{there}/v1/schedules/often/pause", {})[1] == {"paused": True}
        assert call(f"{there}/v1/schedules/nothing/pause", {})[0] == 404
        assert call(f"{there}/v1/schedules", {"text": FLOW, "inputs": {"n": 7}})[0] == 409

        async def ended() -> tuple[int, int, set[str]]:
            async with AsyncClient(there) as client, asyncio.timeout(60):
                while is_firing(place):
                    await asyncio.sleep(0.05)
                runs = await client.runs.list(limit=500)
                results = [await client.runs.wait(run.run_id) for run in runs]
                shown = await client.schedules.show("often")
            return shown.fired, len(runs), {f"{run.state} {run.answer.strip()}" for run in results}

        fired, made, how = asyncio.run(ended())
        assert made == fired >= 6
        assert len(how) == 1
        assert how.pop().startswith("completed 7")
    listed = place.run("schedules", "list")
    assert "often" in listed.out
    assert "every 1 s" in listed.out
    assert place.run("schedules", "remove", "often").code == 0
    gone = place.run("schedules", "show", "often")
    assert gone.code != 0
    assert "there is no schedule 'often'" in gone.err


@pytest.mark.anyio
async def test_on_postgres(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Catches what the tests of the same names on SQLite do, where two processes really write at a time."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        for check in (
            check_two_processes_fire_once,
            check_a_process_dies_while_it_fires,
            check_pause_resume_remove_and_names,
        ):
            await check(tmp_path, new_database(server))
