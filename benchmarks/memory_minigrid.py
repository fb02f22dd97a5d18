"""Whether memory helps an agent in MiniGrid: real rollouts, the real memory end to end, no model anywhere.

Claims: in the second half of a stream of houses whose missions hide a rule (memory_minigrid_world.py) the
agent with memory succeeds in at least 15 points more of the walks than without and takes a fifth fewer steps;
notes drawn at random from the same bank, as many as were recalled, gain nothing.

The memory is the product's, wired as its runtime wires it, on a database in a temporary folder and without a
model: recall before each walk, steps recorded during it, its end after it; then the learner judges and
distils by rules and credits what was used. Judge and distiller see the record of the walk and nothing else.

Usage: python benchmarks/memory_minigrid.py [--check] [--seeds 0,1,…] [--episodes N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from agentic_flow.agentdb.embedding import HashedNgramEmbedder
from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.settings import AgentDBSettings, Settings
from agentic_flow.memory.answers import Finish, MemoryService
from agentic_flow.memory.bank_rows import searched_text
from agentic_flow.memory.confidence import quantile
from agentic_flow.memory.distill import mechanical_items
from agentic_flow.memory.judge import mechanical_verdict
from agentic_flow.memory.records import MemoryItem, Trajectory, TrajectoryStep
from agentic_flow.runtime.build import Runtime

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
WORLD_PYTHON = HERE.parent / ".venv-bench-minigrid" / "bin" / "python"
"""The interpreter that has MiniGrid; `make bench-memory` makes it."""

PICTURE = HERE / "memory_minigrid.svg"
TITLE = "Memory in MiniGrid"
SEEDS = tuple(range(10))
EPISODES = 144
STEPS_MAX = 60
"""Steps of a walk at most: about enough to open three of the six doors."""

NOTES_MAX = 3
POINTS_MIN = 15.0
STEPS_LESS_MIN = 0.2
ARMS = {
    "none": "no memory",
    "memory": "memory",
    "random": "random notes of the same bank",
    "append": "plain append",
}
COLOURS = {"none": "#767676", "memory": "#4477aa", "random": "#ee6677", "append": "#228833"}
SMOOTHED_OVER = 24
"""Walks over which a point of the curve is the mean."""


class Failed(Exception):
    """The process with the houses ended or cannot be started."""


class Houses:
    """The houses and the agent that walks them, in a process of their own.

    Args:
        seed: Decides all houses.
        count: How many.
        python: Interpreter that has MiniGrid.

    Raises:
        Failed: it does not start.
    """

    def __init__(self, seed: int, count: int, python: Path = WORLD_PYTHON) -> None:
        if not python.exists():
            raise Failed(f"{python} is missing: `make bench-memory` makes it")
        self._process = subprocess.Popen(
            [python, HERE / "memory_minigrid_world.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.missions: list[str] = self._ask({"seed": seed, "count": count, "steps_max": STEPS_MAX})

    def walk(self, episode: int, notes: Sequence[MemoryItem]) -> dict[str, Any]:
        """What became of one walk: success, steps, log of opened doors, ids of the notes that it used."""
        given = [{"lesson": note.lesson, "text": note.content} for note in notes]
        answer = self._ask({"episode": episode, "notes": given})
        return {**answer, "used": tuple(notes[index].id for index in answer["used"])}

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            _, said = self._process.communicate()
            raise Failed(f"the houses ended: {said.strip().splitlines()[-1:]}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


class PlainAppend:
    """What the reference of ReasoningBank does: keeps every item, compares all, believes all alike."""

    def __init__(self) -> None:
        self._embedder = HashedNgramEmbedder(AgentDBSettings().embedding_dimension)
        self.items: list[MemoryItem] = []
        self._vectors: list[np.ndarray] = []

    def recall(self, task: str) -> list[MemoryItem]:
        """The nearest items."""
        if not self.items:
            return []
        likeness = np.stack(self._vectors) @ self._embedder.embed_now([task])[0]
        return [self.items[row] for row in np.argsort(-likeness, kind="stable")[:NOTES_MAX].tolist()]

    def add(self, items: Sequence[MemoryItem]) -> None:
        """Append them."""
        if items:
            self.items += items
            self._vectors += list(self._embedder.embed_now([searched_text(item) for item in items]))


@dataclass
class Walks:
    """One arm of one seed, walk by walk."""

    success: list[bool] = field(default_factory=list[bool])
    steps: list[int] = field(default_factory=list[int])
    notes: list[int] = field(default_factory=list[int])
    kept: int = 0
    """Items in the bank at the end."""

    def add(self, done: dict[str, Any], notes: Sequence[MemoryItem]) -> None:
        """Note a walk that was given these notes."""
        self.success.append(done["success"])
        self.steps.append(done["steps"])
        self.notes.append(len(notes))

    def late(self) -> tuple[float, float]:
        """Share of successes and mean steps of the second half."""
        return statistics.mean(second_half(self.success)), statistics.mean(second_half(self.steps))


def second_half(values: Sequence[T]) -> Sequence[T]:
    """The later ones."""
    return values[len(values) // 2 :]


def lost(ours: Walks, none: Walks) -> float:
    """Share of walks of the second half that notes made fail."""
    pairs = zip(second_half(ours.success), second_half(none.success), strict=True)
    return statistics.mean(without and not with_notes for with_notes, without in pairs)


async def stream(
    seed: int, count: int, *, python: Path = WORLD_PYTHON, settings: Settings | None = None
) -> dict[str, Walks]:
    """All arms of one seed, walk by walk in turns.

    Args:
        seed: Of the houses, and of the random arm's draws.
        count: Walks.
        python: Interpreter that has MiniGrid.
        settings: Whose `memory` section is used; by default the defaults.
    """
    rng = random.Random(f"notes {seed}")
    walks = {arm: Walks() for arm in ARMS}
    append = PlainAppend()
    with Houses(seed, count, python) as houses, tempfile.TemporaryDirectory() as folder:
        own = (settings or Settings()).model_copy(update={"data_dir": Path(folder)})
        # Skills are no notes: the random arm has nothing that would be as many.
        own = own.model_copy(update={"memory": own.memory.model_copy(update={"skills_recalled": 0})})
        async with Runtime(own) as runtime:
            memory = await runtime.memory()
            bank: list[MemoryItem] = []
            for episode, mission in enumerate(houses.missions):
                walks["none"].add(houses.walk(episode, ()), ())
                recall = await memory.recall(LOCAL_OWNER, mission, k=NOTES_MAX)
                notes = [one.item for one in recall.items]
                drawn = rng.sample(bank, len(notes))
                walks["random"].add(houses.walk(episode, drawn), drawn)
                done = houses.walk(episode, notes)
                walks["memory"].add(done, notes)
                await learned(memory, f"walk-{episode:04}", mission, recall.id if notes else None, done)
                bank = await active(memory)
                appended = append.recall(mission)
                done = houses.walk(episode, appended)
                walks["append"].add(done, appended)
                append.add(distilled(f"walk-{episode:04}", mission, done))
    walks["memory"].kept = walks["random"].kept = len(bank)
    walks["append"].kept = len(append.items)
    return walks


async def active(memory: MemoryService) -> list[MemoryItem]:
    """All items that a recall might give, in order of their ids."""
    found: list[MemoryItem] = []
    cursor: str | None = None
    while True:
        page = await memory.items(LOCAL_OWNER, state="active", cursor=cursor, limit=1000)
        found += page.items
        cursor = page.cursor
        if cursor is None:
            return found


def steps_of(done: dict[str, Any]) -> list[TrajectoryStep]:
    """A walk as an agent's tool calls."""
    return [
        TrajectoryStep(agent="walker", name="open", action=one["action"], observation=one["observation"])
        for one in done["log"]
    ]


async def learned(
    memory: MemoryService, name: str, mission: str, recall_id: str | None, done: dict[str, Any]
) -> None:
    """Leave a walk as a trajectory and let memory learn from it.

    Raises:
        Failed: it did not.
    """
    begun = Trajectory(id=name, task=mission, agent="walker", recall_id=recall_id)
    await memory.start(LOCAL_OWNER, begun)
    await memory.append(LOCAL_OWNER, name, steps_of(done))
    end = Finish(outcome="failed", error="no steps were left", cited=done["used"])
    if done["success"]:
        end = Finish(outcome="completed", answer="reached the goal", cited=done["used"])
    await memory.finish(LOCAL_OWNER, name, end)
    report = await memory.learn(LOCAL_OWNER)
    if report.learned != 1:
        raise Failed(f"{name!r} was not learned from: {report!r}")


def distilled(name: str, mission: str, done: dict[str, Any]) -> list[MemoryItem]:
    """What the product's rules distil of a walk, for the arm that only appends."""
    ended = Trajectory(
        id=name,
        task=mission,
        agent="walker",
        steps=tuple(steps_of(done)),
        outcome="completed" if done["success"] else "failed",
        answer="reached the goal" if done["success"] else "",
        error=None if done["success"] else "no steps were left",
    )
    return mechanical_items(ended, mechanical_verdict(ended), 0.0)


# ---- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """By Student's t: seeds are few.

    Args:
        values: One a seed.
    """
    middle = statistics.mean(values)
    if len(values) < 2:
        return Mean(middle, -math.inf, math.inf)
    freedom = len(values) - 1
    # x of the incomplete beta function at which |t| is exceeded once in twenty.
    x = quantile(freedom / 2, 0.5, 0.05)
    half = math.sqrt(freedom * (1 - x) / x) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(middle, middle - half, middle + half)


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm over all seeds, second half: success, steps, and both beside no memory in pairs.

    `lost` is the share of walks that fail and would have succeeded without notes; `kept` counts items.
    """

    success: Mean
    steps: Mean
    points: Mean
    fewer: Mean
    lost: Mean
    notes: float
    kept: float


def compared(runs: Sequence[dict[str, Walks]]) -> dict[str, Arm]:
    """Each arm beside the one without memory, seed by seed."""
    found: dict[str, Arm] = {}
    for arm in ARMS:
        own = [run[arm].late() for run in runs]
        none = [run["none"].late() for run in runs]
        found[arm] = Arm(
            success=mean_of([success for success, _ in own]),
            steps=mean_of([steps for _, steps in own]),
            points=mean_of([100 * (a - b) for (a, _), (b, _) in zip(own, none, strict=True)]),
            fewer=mean_of([1 - a / b for (_, a), (_, b) in zip(own, none, strict=True)]),
            lost=mean_of([lost(run[arm], run["none"]) for run in runs]),
            notes=statistics.mean(statistics.mean(second_half(run[arm].notes)) for run in runs),
            kept=statistics.mean(run[arm].kept for run in runs),
        )
    return found


def broken(arms: dict[str, Arm]) -> list[str]:
    """Claims that do not hold."""
    ours, control = arms["memory"], arms["random"]
    found: list[str] = []
    if ours.points.value < POINTS_MIN:
        found.append(f"success is {ours.points.value:.1f} points higher, not {POINTS_MIN:g}")
    if ours.points.low <= 0:
        found.append("the interval of that difference has 0 in it")
    if ours.fewer.value < STEPS_LESS_MIN:
        found.append(f"steps are {ours.fewer.value:.0%} fewer, not {STEPS_LESS_MIN:.0%}")
    if control.points.low > 0 or control.fewer.low > 0:
        found.append(
            f"random notes gain {control.points.value:.1f} points and {control.fewer.value:.0%} steps"
        )
    return found


def table(arms: dict[str, Arm]) -> str:
    """The figures as a Markdown table."""
    rows = [
        f"| {ARMS[name]} | {arm.notes:.1f} | {arm.success.value:.1%} | {_points(arm.points, name)} | "
        f"{arm.steps.value:.1f} | {_share(arm.fewer, name)} | {_share(arm.lost, name)} | {arm.kept:.0f} |"
        for name, arm in arms.items()
    ]
    head = (
        "| second half | notes a walk | success | points above no memory | steps | fewer steps | "
        "lost by notes | items kept |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def _points(mean: Mean, arm: str) -> str:
    return "" if arm == "none" else f"{mean.value:+.1f} ({mean.low:+.1f} to {mean.high:+.1f})"


def _share(mean: Mean, arm: str) -> str:
    return "" if arm == "none" else f"{mean.value:.0%} ({mean.low:.0%} to {mean.high:.0%})"


def draw(runs: Sequence[dict[str, Walks]], path: Path) -> None:
    """The curves of success, each point the mean of all seeds over the walks before it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "agentic-flow"}):
        figure: Any = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        for arm, label in ARMS.items():
            means = np.mean([run[arm].success for run in runs], axis=0)
            window = min(SMOOTHED_OVER, len(means))
            curve = np.convolve(means, np.ones(window) / window, mode="valid")
            axes.plot(np.arange(window, len(means) + 1), curve, label=label, color=COLOURS[arm], linewidth=2)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("walks so far")
        axes.set_ylabel(f"success, mean of the last {SMOOTHED_OVER} walks")
        axes.set_title(f"{TITLE}: {len(runs)} seeds", loc="left", fontweight="bold")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, format="svg", metadata={"Date": None})


async def measured(
    seeds: Sequence[int], episodes: int, python: Path = WORLD_PYTHON
) -> list[dict[str, Walks]]:
    """All arms of all seeds."""
    return [await stream(seed, episodes, python=python) for seed in seeds]


def section() -> str:
    """The section of RESULTS.md; draws the picture beside it."""
    try:
        runs = asyncio.run(measured(SEEDS, EPISODES))
    except Failed as problem:
        return f"Not measured: {problem}."
    draw(runs, PICTURE)
    return text_of(compared(runs))


def text_of(arms: dict[str, Arm]) -> str:
    """The section's text for these figures."""
    problems = broken(arms)
    verdict = "They hold." if not problems else f"Not reached: {'; '.join(problems)}."
    return f"""Targets: in the second half of a stream success at least {POINTS_MIN:g} points above no memory
and {STEPS_LESS_MIN:.0%} fewer steps; random notes of the same bank, as many as were recalled, gain nothing.
{verdict}

{len(SEEDS)} seeds of {EPISODES} walks each; paired differences by seed, 95 % intervals (Student's t).

{table(arms)}

![Success over walks]({PICTURE.name})

Real rollouts in MiniGrid: six rooms, doors of six colours in a new order each time, {STEPS_MAX} steps, twelve
kinds of houses whose missions name the kind in three of its five words and never the colour that is right
for it; kinds are in pairs that share words. The agent is scripted and has no model: it opens doors that notes
advise first and those they warn of last. The memory is the product's as its runtime wires it, with default
settings and without a model: trajectories are judged and distilled by rules from what was recorded. "Plain
append" is the reference's way with the same distilled items: each one kept, the nearest {NOTES_MAX} by brute
force, all believed alike. A walk that fails counts with all its steps; "lost by notes" are walks that failed
with them and succeed without. Nothing misleads here but notes on other kinds of houses: outcomes are
recorded truly, so this says nothing of wrong verdicts, which the simulated stream is about.

`python benchmarks/memory_minigrid.py`"""


def main() -> int:
    """Print the table; with `--check` fail when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a claim does not hold")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--python", type=Path, default=WORLD_PYTHON, help="interpreter with MiniGrid")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    arms = compared(asyncio.run(measured(seeds, options.episodes, options.python)))
    print(table(arms))
    problems = broken(arms)
    if problems:
        print("\n".join(problems), file=sys.stderr)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
