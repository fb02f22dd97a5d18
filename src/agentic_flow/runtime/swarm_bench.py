"""The harness of `agentic-flow swarm bench`: topologies at real work, and what came of it by the record.

Two tasks, neither of which needs a key. `tests`: a team runs a repository's test files, each in a process of
its own (see `swarm.bench_suite`). `index`: a folder is read into a fresh database, a team answers a question
about it with the configured model, and passages are looked for by their own words. Every run has its own
data folder in a temporary place; nothing of it reaches the user's runs or memory.
"""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, NotFound, PathNotFound
from agentic_flow.core.settings import Settings
from agentic_flow.core.vectors import SearchQuery
from agentic_flow.runtime.build import Runtime
from agentic_flow.swarm.bench_suite import (
    PROGRAM,
    FileRun,
    Suite,
    SuiteModel,
    policy_text,
    runs_of,
    suite_of,
)
from agentic_flow.swarm.inputs import Folder
from agentic_flow.swarm.picture import graph_of, picture
from agentic_flow.swarm.runs import RoleChoice, RunResult, RunSpec, RunStep

Task = Literal["tests", "index"]
QUESTION = "How are errors handled here, and what is done when something fails?"
_RECALLED_MAX = 20
_RECALL_K = 10
_CHECK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A team as it is measured; `batch_size` None: all agents at once."""

    topology: str
    agents: int
    batch_size: int | None = None


PLANS: dict[str, Plan] = {
    "mesh": Plan("mesh", 10, 5),
    "hierarchical": Plan("hierarchical", 8),
    "ring": Plan("ring", 6),
    "star": Plan("star", 6),
}
"""The teams of the familiar harness."""


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """A test file: how its first run ended, and whether others ended otherwise."""

    path: str
    outcome: str
    said: str
    agent: str
    time_s: float
    runs: int
    flaky: bool


@dataclass(slots=True)
class Measured:
    """One run of one team. `verdict` is "ok" or says why its figures are worth nothing.

    `at_once` is the greatest number of agents whose recorded steps overlap, `messages` how many outputs
    agents were shown, `recall` the share of passages found by their own words.
    """

    task: Task
    topology: str
    agents: int
    batch_size: int | None
    iteration: int
    verdict: str = "ok"
    state: str = ""
    model: str = ""
    wall_s: float = 0.0
    work_s: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    messages: int = 0
    at_once: int = 0
    files: tuple[FileVerdict, ...] = ()
    files_read: int = 0
    citations: int = 0
    recall: float | None = None
    picture: str = field(default="", repr=False)

    @property
    def failing(self) -> tuple[FileVerdict, ...]:
        """Test files that did not pass."""
        return tuple(file for file in self.files if file.outcome in ("failed", "broken"))


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured.

    Args:
        settings: Of the caller; models and keys are taken from them.
        folder: What the teams work on.
        python: Interpreter of the tests.
        files: Globs of test files' names, below `folder`.
        question: Of the task `index`.
        file_timeout_s: Longest time of one test file.
    """

    settings: Settings
    folder: Path
    python: Path
    files: tuple[str, ...] = ("test_*.py", "*_test.py")
    question: str = QUESTION
    file_timeout_s: float = 300.0

    async def run(self, task: Task, plan: Plan, iteration: int) -> Measured:
        """One run. What goes wrong in it is its verdict, not an error.

        Raises:
            PathNotFound, NotFound, TooLarge: there is nothing to run, or nothing to run it with.
        """
        measured = Measured(task, plan.topology, plan.agents, plan.batch_size, iteration)
        suite = self.suite() if task == "tests" else None
        with tempfile.TemporaryDirectory(prefix="agentic-flow-bench-") as place, self._program(Path(place)):
            settings = self._settings(Path(place), suite)
            completer = SuiteModel(suite, plan.agents) if suite else None
            before_s, began_s = _cpu_s(), time.monotonic()
            try:
                async with Runtime(settings, completer=completer) as runtime:
                    await self._measure(runtime, self._spec(plan, suite), suite, measured, began_s)
            except AgenticFlowError as error:
                measured.verdict = error.message
            measured.wall_s = time.monotonic() - began_s
            measured.cpu_s = _cpu_s() - before_s
        return measured

    def suite(self) -> Suite:
        """The test files, once it is known that they can be run.

        Raises:
            PathNotFound: there are none, or no such interpreter.
            NotFound: the interpreter has no pytest.
        """
        suite = suite_of(self.folder, self.files)
        try:
            has_pytest = subprocess.run(  # noqa: S603 - the interpreter that the caller names
                [self.python, "-c", "import pytest"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_CHECK_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            raise PathNotFound(
                f"the interpreter {str(self.python)!r} cannot be started: {error.strerror}",
                hint="name another one with --python",
            ) from error
        if has_pytest.returncode:
            raise NotFound(
                f"{str(self.python)!r} has no pytest", hint="install it there, or name another with --python"
            )
        return suite

    @contextmanager
    def _program(self, place: Path) -> Generator[None]:
        """The interpreter under a name that is on the path and on the agents' allow-list, in a place that no
        agent can write to: a virtual environment inside the folder would be refused as a program."""
        programs = place / "programs"
        programs.mkdir()
        script = programs / PROGRAM
        script.write_text(f'#!/bin/sh\nexec "{self.python}" "$@"\n', "utf-8")
        script.chmod(stat.S_IRWXU)
        before = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before

    def _settings(self, place: Path, suite: Suite | None) -> Settings:
        own = self.settings
        peers = own.peers.model_copy(update={"platform_url": None, "agentdb_url": None, "swarm_url": None})
        changes: dict[str, Any] = {
            "data_dir": place / "data",
            "peers": peers,
            "memory": own.memory.model_copy(update={"enabled": False}),
            "swarm": own.swarm.model_copy(update={"database_url": None, "run_timeout_s": 24 * 3600.0}),
            "agentdb": own.agentdb.model_copy(update={"database_url": None, "history_dir": None}),
        }
        if suite is not None:
            policy = place / "policy.toml"
            policy.write_text(policy_text(), "utf-8")
            changes["swarm"] = changes["swarm"].model_copy(
                update={"tool_calls_max": 2 * len(suite.files) + 1}
            )
            changes["tools"] = own.tools.model_copy(
                update={
                    "shell_allowed": (PROGRAM,),
                    "policy_file": policy,
                    "timeout_s": self.file_timeout_s,
                }
            )
        return own.model_copy(update=changes)

    def _spec(self, plan: Plan, suite: Suite | None) -> RunSpec:
        shell = RoleChoice(tools=("shell_run",))
        return RunSpec(
            goal=suite.goal if suite else self.question,
            inputs=(str(self.folder.resolve()),),
            topology=plan.topology,
            agents=plan.agents,
            batch_size=plan.batch_size,
            memory=False,
            roles={"worker": shell, "reviewer": shell} if suite else {},
        )

    async def _measure(
        self, runtime: Runtime, spec: RunSpec, suite: Suite | None, measured: Measured, began_s: float
    ) -> None:
        swarm = await runtime.swarm()
        run_id = await swarm.submit(runtime.principal, spec)
        result = await swarm.wait(runtime.principal, run_id)
        steps = await swarm.steps(runtime.principal, run_id)
        measured.state, measured.model = result.state, result.model
        measured.steps, measured.at_once = len(steps), _at_once(steps)
        measured.work_s = _span_s([step for step in steps if step.agent != "run"])
        measured.messages = sum(edge.messages for edge in graph_of(steps).edges)
        measured.citations = len(result.citations)
        measured.picture = picture(result, steps)
        if result.ingest is not None:
            measured.files_read = result.ingest.added + result.ingest.changed
        if suite is not None:
            measured.files = verdicts_of(runs_of(steps))
        else:
            measured.recall = await self._recalled(runtime, spec)
        measured.verdict = _verdict(result, suite, measured)

    async def _recalled(self, runtime: Runtime, spec: RunSpec) -> float | None:
        """The share of passages, evenly taken from the folder, that are among the first ten for their own
        words; None when nothing was read."""
        store = await runtime.store()
        folder = await asyncio.to_thread(Folder.of, spec)
        tenant = runtime.principal.tenant
        page = await store.list_items(tenant, folder.namespace, limit=1000)
        items = [item for item in page.items if item.text]
        taken = items[:: max(1, len(items) // _RECALLED_MAX)][:_RECALLED_MAX]
        found = 0
        for item in taken:
            words = " ".join((item.text or "").split()[:40])
            hits = (await store.search(tenant, folder.namespace, SearchQuery(text=words, k=_RECALL_K))).hits
            found += any(hit.item.id == item.id for hit in hits)
        return found / len(taken) if taken else None


def verdicts_of(runs: Sequence[FileRun]) -> tuple[FileVerdict, ...]:
    """What each file came to: its first run counts, the others say whether it can be relied on."""
    by_path: dict[str, list[FileRun]] = {}
    for run in runs:
        by_path.setdefault(run.path, []).append(run)
    return tuple(
        FileVerdict(
            path,
            first.outcome,
            first.said,
            first.agent,
            first.time_s,
            len(own),
            len({run.outcome for run in own}) > 1,
        )
        for path, own in sorted(by_path.items())
        for first in own[:1]
    )


def _verdict(result: RunResult, suite: Suite | None, measured: Measured) -> str:
    """Whether the figures are of work that was done."""
    if result.state != "completed":
        return f"the run is {result.state}: {(result.error or {}).get('detail')}"
    if suite is not None:
        missing = [path for path in suite.files if path not in {file.path for file in measured.files}]
        return f"{len(missing)} of {len(suite.files)} files were not run: {missing[0]!r}" if missing else "ok"
    if not measured.files_read:
        return "nothing was read"
    if not measured.citations:
        return "no citation of the answer stands"
    return "ok" if measured.recall else "no passage is found by its own words"


def default_python(folder: Path) -> Path:
    """The interpreter of the folder's own virtual environment, or the one that runs this."""
    own = folder / ".venv" / "bin" / "python"
    return own.absolute() if own.exists() else Path(sys.executable)


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, both by default.

    Raises:
        InvalidInput: there is none of that name.
    """
    known: tuple[Task, ...] = ("tests", "index")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInput(f"there is no task {unknown[0]!r} to measure", hint="use tests or index")
    return [task for task in known if not names or task in names]


def plans_of(topologies: Sequence[str], agents: int | None = None) -> list[Plan]:
    """The teams of these names, all by default; `agents` in place of the familiar numbers.

    Raises:
        InvalidInput: there is no team of that name.
    """
    unknown = [name for name in topologies if name not in PLANS]
    if unknown:
        raise InvalidInput(
            f"there is no team {unknown[0]!r} to measure", hint=f"use one of {', '.join(PLANS)}"
        )
    chosen = [PLANS[name] for name in topologies or PLANS]
    return [Plan(plan.topology, agents or plan.agents, plan.batch_size) for plan in chosen]


def rows_of(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A line for each task and team: medians over its runs that count, and how many do."""
    grouped: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        grouped.setdefault((one.task, one.topology), []).append(one)
    rows: list[tuple[str, ...]] = []
    for (task, topology), runs in grouped.items():
        good = [run for run in runs if run.verdict == "ok"]
        first = runs[0]
        what = f"{topology} {first.agents}" + (
            f" in batches of {first.batch_size}" if first.batch_size else ""
        )
        if not good:
            rows.append((task, what, *["-"] * 7, f"0 of {len(runs)} ok: {first.verdict}"))
            continue

        def median(name: str, own: Sequence[Measured] = good) -> float:
            return statistics.median(getattr(run, name) for run in own)

        last = good[-1]
        if task == "tests":
            passed = sum(file.outcome == "passed" for file in last.files)
            came = f"{passed} of {len(last.files)} files pass"
        else:
            came = f"{last.citations} citations, recall {last.recall or 0.0:.2f}"
        rows.append(
            (
                task,
                what,
                f"{median('wall_s'):.2f}",
                f"{median('work_s'):.2f}",
                f"{median('cpu_s'):.2f}",
                f"{median('steps'):.0f}",
                f"{median('messages'):.0f}",
                f"{max(run.at_once for run in good)}",
                came,
                f"{len(good)} of {len(runs)} ok",
            )
        )
    return rows


HEADERS = ("task", "team", "wall s", "work s", "CPU s", "steps", "messages", "at once", "result", "verdict")
"""Of the columns of `rows_of`."""


def _cpu_s() -> float:
    """CPU time of this process and of all that it waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _span_s(steps: Sequence[RunStep]) -> float:
    begun = [step.started_at_s for step in steps if step.started_at_s is not None]
    ended = [step.completed_at_s for step in steps if step.completed_at_s is not None]
    return max(ended) - min(begun) if begun and ended else 0.0


def _at_once(steps: Sequence[RunStep]) -> int:
    """The greatest number of agents between their first and last recorded step."""
    spans: dict[str, list[float]] = {}
    for step in steps:
        if step.agent != "run" and step.started_at_s is not None and step.completed_at_s is not None:
            span = spans.setdefault(step.agent, [step.started_at_s, step.completed_at_s])
            span[0], span[1] = min(span[0], step.started_at_s), max(span[1], step.completed_at_s)
    moments = sorted(
        [(begun, 1) for begun, _ in spans.values()] + [(ended, -1) for _, ended in spans.values()]
    )
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most
