"""The real memory in the simulated stream: it must beat what it is compared with, in pairs, on a few seeds.

All arms, noises and seeds: `python benchmarks/memory_stream.py`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from agentic_flow.testing.memory_stream import NoMemory, PlainAppend, make_world, walk
from agentic_flow.testing.memory_stream_learned import LearnedMemory

SEEDS = (200, 201)

pytestmark = pytest.mark.timeout(600)  # a busy machine takes ten times as long as a quiet one


@pytest.mark.parametrize("error_rate", [0.0, 0.2])
async def test_the_memory_succeeds_more_often_and_keeps_less(tmp_path: Path, error_rate: float) -> None:
    """Catches a memory that stops learning, believes wrong verdicts, or keeps a lesson for each task."""
    ours: list[float] = []
    plain: list[float] = []
    none: list[float] = []
    for seed in SEEDS:
        world = make_world(seed, tasks=240, families=8)
        memory = LearnedMemory(tmp_path / f"{seed}")
        try:
            walked = await walk(world, memory, error_rate=error_rate)
        finally:
            memory.close()
        appended = await walk(world, PlainAppend(tmp_path / f"{seed}.jsonl"), error_rate=error_rate)
        ours.append(statistics.mean(walked.success))
        plain.append(statistics.mean(appended.success))
        none.append(statistics.mean((await walk(world, NoMemory(), error_rate=error_rate)).success))
        assert walked.size[-1] < 0.75 * appended.size[-1]
    assert statistics.mean(ours) > statistics.mean(none) + 0.15
    assert statistics.mean(ours) > statistics.mean(plain)
