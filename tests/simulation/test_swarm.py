"""Many seeds of the simulated swarm (see `swarm_world` for what must hold), and proof that it can fail.

`SWARM_SEED=17 pytest tests/simulation/test_swarm.py` plays one seed; `swarm_world.py 17` as a program prints
what happens in it. `SWARM_SEEDS` is how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from swarm_store import Rules, Violation
from swarm_world import World

from agentic_flow.swarm import checkpoints, scheduling
from agentic_flow.swarm.scheduling import UNFINISHED, Custody, Fence, Places, StoredWorkflow

SEEDS = int(os.environ.get("SWARM_SEEDS", "10000"))
FIRST = int(os.environ.get("SWARM_SEED", random.SystemRandom().randrange(1 << 30)))
REAL_SEEDS = 60
SEEDS_TO_FIND = 400
CHUNK = 250

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def play(first: int, count: int) -> dict[str, int]:
    """These seeds; how often what happened in them."""
    sums = {"takeovers": 0, "refused": 0, "repeated": 0, "recorded": 0}
    for seed in range(first, first + count):
        world = World(seed).run()
        sums["takeovers"] += world.store.takeovers
        sums["refused"] += world.store.refused
        sums["repeated"] += sum(len(who) - 1 for who in world.effects.values())
        sums["recorded"] += len(world.store.recorded)
    return sums


def test_ten_thousand_seeds() -> None:
    """Catches decisions that lose a run, let two owners write, or leave a run without an end."""
    seeds = 1 if "SWARM_SEED" in os.environ else SEEDS
    print(f"seeds {FIRST} to {FIRST + seeds - 1}")
    chunks = [(start, min(CHUNK, FIRST + seeds - start)) for start in range(FIRST, FIRST + seeds, CHUNK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        played = list(pool.map(play, *zip(*chunks, strict=True)))
    sums = {key: sum(each[key] for each in played) for key in played[0]}
    print(sums)
    if seeds >= 1000:  # a simulation in which nothing goes wrong proves nothing
        assert sums["takeovers"] > seeds
        assert sums["refused"] > seeds / 2
        assert seeds / 10 < sums["repeated"] < sums["recorded"] / 10


@pytest.mark.parametrize("part", range(2))
def test_the_store_decides_as_its_model(part: int) -> None:
    """Catches SQL that decides otherwise than the functions that were simulated."""
    memory = Path("/dev/shm")
    for seed in range(FIRST + part, FIRST + REAL_SEEDS, 2):
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            World(seed, folder=Path(folder)).run()


# ---- it can fail: each of these is found ---------------------------------------------------------------


def without_fence(
    root: StoredWorkflow | None, workflow: StoredWorkflow | None, fence: Fence, *, ending: str | None = None
) -> scheduling.Permission:
    held = fence if root is None else Fence(root.executor_id, root.epoch)
    return scheduling.may_record(root, workflow, held, ending=ending)


def without_epoch(
    root: StoredWorkflow | None, workflow: StoredWorkflow | None, fence: Fence, *, ending: str | None = None
) -> scheduling.Permission:
    held = fence if root is None else Fence(fence.executor_id, root.epoch)
    return scheduling.may_record(root, workflow, held, ending=ending)


def without_cancelling(*stored: Any, ending: str | None = None) -> scheduling.Permission:
    permission = scheduling.may_record(*stored, ending=ending)
    return "granted" if permission == "cancelled" else permission


def claims_what_ended(status: str, *, owner_lives: bool, takeovers: int, asked: bool) -> str:
    return "leave" if owner_lives else "claim"


class Trusting(Custody):
    """Believes that a write without an answer was not done."""

    def doubt(self) -> None: ...


class Hoarding(Custody):
    """Keeps what it does not execute."""

    def to_release(self, owned: Mapping[str, int], executed: Any, under_way: Any) -> dict[str, int]:
        return {}


class Crowded(Places[Any]):
    """Has a place too many."""

    def __init__(self, places_max: int) -> None:
        super().__init__(places_max + 1)


BROKEN = {
    "the fence is ignored": Rules(may_record=without_fence),
    "the epoch is ignored": Rules(may_record=without_epoch),
    "cancelling is ignored": Rules(may_record=without_cancelling),
    "ended runs are taken over": Rules(claim_verdict=claims_what_ended),
    "everybody lives for ever": Rules(is_alive=lambda *_, **__: True),
    "everybody is dead": Rules(is_alive=lambda *_, **__: False),
    "what is queued is no orphan": Rules(unfinished=("running",)),
    "a lost answer is believed": Rules(custody=Trusting),
    "nothing is let go": Rules(custody=Hoarding),
    "too many places": Rules(places=Crowded),
}


def first_violation(seeds: int, make: Callable[[int], World]) -> str:
    for seed in range(seeds):
        try:
            make(seed).run()
        except Violation as violation:
            return str(violation)
    return ""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_decision_is_found(name: str) -> None:
    """Catches a simulation that would not notice this."""
    found = first_violation(SEEDS_TO_FIND, lambda seed: World(seed, BROKEN[name]))
    print(found)
    assert found, f"{name}: not found in {SEEDS_TO_FIND} seeds"


def test_a_failing_seed_fails_again() -> None:
    """Catches a seed that does not replay: chance that comes from elsewhere."""
    rules = BROKEN["the fence is ignored"]
    found = first_violation(SEEDS_TO_FIND, lambda seed: World(seed, rules))
    seed = int(found.split()[1].rstrip(","))
    lines: list[list[str]] = [[], []]
    for each in lines:
        with pytest.raises(Violation) as again:
            World(seed, rules, trace=each.append).run()
        assert str(again.value) == found
    assert lines[0] == lines[1]
    assert lines[0]


def test_a_store_without_fences_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a comparison with the real store that would not notice that it lets anybody write."""
    monkeypatch.setattr(checkpoints, "may_record", without_fence)
    found = first_violation(SEEDS_TO_FIND, lambda seed: World(seed, folder=tmp_path / str(seed)))
    assert "the model says" in found


def test_unfinished_is_what_the_rules_say() -> None:
    """Catches rules of the simulation that are not the product's."""
    rules = Rules()
    assert rules.may_record is scheduling.may_record
    assert rules.claim_verdict is scheduling.claim_verdict
    assert rules.is_alive is scheduling.is_alive
    assert rules.unfinished == UNFINISHED
    assert (rules.places, rules.custody) == (Places, Custody)
