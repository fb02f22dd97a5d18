"""Checks of readiness: what is silent is told in time and asked once; a full disk before writes fail."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from agentic_flow.core.errors import Unavailable
from agentic_flow.core.readiness import Answering, all_of, room


async def test_what_is_silent_is_told_in_time_and_asked_once() -> None:
    """Catches a health route that hangs with its database, and a thread more for every look at it."""
    asked, answer = 0, asyncio.Event()

    async def silent() -> None:
        nonlocal asked
        asked += 1
        await answer.wait()

    check = Answering("database", silent, timeout_s=0.01)
    for _ in range(5):
        assert await check() == {"database": False}
    assert asked == 1
    answer.set()
    check = Answering("database", silent)
    assert await check() == {"database": True}
    assert await check() == {"database": True}
    assert asked == 3


async def test_what_was_silent_is_well_again_when_it_answers() -> None:
    """Catches an old question whose late answer is never taken, so that the service stays unready."""
    answer = asyncio.Event()
    check = Answering("database", answer.wait, timeout_s=0.01)
    assert await check() == {"database": False}
    answer.set()
    await asyncio.sleep(0)
    assert await check() == {"database": True}


async def test_refusals_are_told_and_faults_of_ours_are_not_hidden() -> None:
    """Catches a typed refusal that ends the health route, and a bug that looks like an outage."""

    async def refused() -> None:
        raise Unavailable("it is away", hint="start it")

    async def wrong() -> bool:
        return False

    async def broken() -> None:
        raise ZeroDivisionError

    assert await all_of(Answering("a", refused), Answering("b", wrong))() == {"a": False, "b": False}
    with pytest.raises(ZeroDivisionError):
        await Answering("c", broken)()


async def test_room_is_what_the_file_system_says(tmp_path: Path) -> None:
    """Catches a check that is always true: of a disk without room, and of a folder that is gone."""
    free_bytes = shutil.disk_usage(tmp_path).free
    assert await room(tmp_path, 1)() == {"disk": True}
    assert await room(tmp_path, free_bytes * 2)() == {"disk": False}
    assert await room(tmp_path / "gone", 1)() == {"disk": False}
