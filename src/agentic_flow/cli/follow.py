"""Following a run to its end: progress on stderr, Ctrl-C, and the exit code that tells how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Protocol

import typer

from agentic_flow.cli.output import console, print_error, talk
from agentic_flow.cli.session import Session
from agentic_flow.core.errors import AgenticFlowError, Cancelled, from_problem

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from agentic_flow.client import AsyncClient
    from agentic_flow.swarm.runs import RunEvent, RunResult

Begin = Callable[["AsyncClient"], Awaitable[str]]
_STOP_TIMEOUT_S = 15.0
_RECONNECT_S = 60.0


class Display(Protocol):
    """Where events go while a run is under way."""

    def event(self, event: RunEvent) -> None:
        """Show one event."""
        ...


def follow(session: Session, begin: Begin, *, whole: bool = False) -> None:
    """Begin a run with `begin`, show it while it goes, print it when it has ended, and learn from it.

    `whole` shows it as `swarm watch` does: every agent with what it used, or every event.

    Exits with 0 for a completed run, with the error's code for a failed one, and with 130 when Ctrl-C (or
    somebody elsewhere) cancelled it.
    """
    code = asyncio.run(_follow(session, begin, whole))
    if code:
        raise typer.Exit(code)


def leave(session: Session, begin: Begin) -> None:
    """Begin a run with `begin`, say under which id, and leave it to others."""
    from agentic_flow.client import AsyncClient

    async def main() -> str:
        async with AsyncClient(settings=session.start()) as client:
            return await begin(client)

    run_id = asyncio.run(main())
    session.show({"run_id": run_id}, lambda: print(run_id))
    talk(f"`agentic-flow runs show {run_id}` tells how it goes, `agentic-flow swarm watch {run_id}` shows it")


def _print_end(session: Session, result: RunResult) -> int:
    """Print the run as it ended; the exit code that tells how."""
    if result.state == "cancelled":
        error = Cancelled(
            f"run {result.run_id} was cancelled",
            hint=f"continue it with `agentic-flow runs resume {result.run_id}`",
        )
    elif result.error is not None:
        error = from_problem(result.error)
    else:
        error = None
    from agentic_flow.cli.answer import print_result

    session.show(result, lambda: print_result(result))
    if error is not None:
        print_error(error, as_json=False)  # with --json, stdout has the run itself, its error included
    return error.exit_code if error is not None else 0


async def _follow(session: Session, begin: Begin, whole: bool) -> int:
    from agentic_flow.client import AsyncClient

    stopped = asyncio.Event()
    with interrupts(stopped):
        async with AsyncClient(settings=session.start()) as client:
            run_id = await _unless(stopped, begin(client))
            talk(f"run {run_id}")
            with _shown(client, run_id, whole) as shown:
                watching = asyncio.ensure_future(shown)
                stopping = asyncio.create_task(stopped.wait())
                try:
                    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    if not watching.done():
                        talk("cancelling; press Ctrl-C again to leave at once")
                        async with asyncio.timeout(_STOP_TIMEOUT_S):
                            await client.runs.cancel(run_id)
                    await watching
                finally:
                    watching.cancel()
                    stopping.cancel()
            result = await client.runs.wait(run_id)
            code = _print_end(session, result)
            if result.state != "cancelled":
                await _learn(client, stopped)
            return code


async def _learn(client: AsyncClient, stopped: asyncio.Event) -> None:
    """Learn for a bounded time, after the answer is out; what is left is kept, and said.

    A server learns by itself. Here nothing would, once this process has ended.
    """
    own = client.settings.memory
    if not own.enabled or not client.learns_here:
        return
    report = None
    if own.learn_at_end_s > 0 and not stopped.is_set():
        learning = asyncio.ensure_future(client.learn(timeout_s=own.learn_at_end_s))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({learning, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if learning.done():
            try:
                report = learning.result()
            except AgenticFlowError as error:
                talk(f"nothing was learned: {error.message}")
        else:
            learning.cancel()
            await asyncio.wait({learning})
    if report is not None and report.learned:
        talk(f"learned from {_counted(report.learned, 'run')}: {_counted(report.items, 'item')}")
    if report is None or report.waiting:
        waiting = "this run" if report is None else _counted(report.waiting, "run")
        talk(f"{waiting} to be learned from later: `agentic-flow memory learn`, or by a server")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


async def _watch(client: AsyncClient, run_id: str, display: Display) -> None:
    async for event in client.runs.events(run_id):
        display.event(event)
        if event.kind == "question_asked":
            options = " or ".join(event.data["options"]) or "ANSWER"
            talk(f"{event.agent} asks: {event.data['text']}")
            talk(f"answer with `agentic-flow runs answer {run_id} {event.data['id']} {options}`")


@contextlib.contextmanager
def _shown(client: AsyncClient, run_id: str, whole: bool) -> Generator[Awaitable[None]]:
    """What shows the run to its end, with its place on the terminal."""
    if not whole:
        with _display() as display:
            yield _watch(client, run_id, display)
        return
    from agentic_flow.cli.watch import Lines, follow_events, live
    from agentic_flow.swarm.run_view import RunView

    view = RunView(run_id)
    place = live(view, sys.stderr) if sys.stderr.isatty() else contextlib.nullcontext(Lines(view, sys.stderr))
    with place as display:
        yield follow_events(client, view, display, reconnect_s=_RECONNECT_S)


async def _unless(stopped: asyncio.Event, beginning: Awaitable[str]) -> str:
    """The id of the run, or Cancelled when Ctrl-C came before it was accepted."""
    begun = asyncio.ensure_future(beginning)
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({begun, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if begun.done():
            return await begun
        begun.cancel()
        raise Cancelled("stopped before the run was accepted", hint="nothing was stored; start it again")
    finally:
        stopping.cancel()


@contextlib.contextmanager
def interrupts(stopped: asyncio.Event) -> Generator[None]:
    """The first Ctrl-C sets `stopped`; the second ends the process, whatever it is doing."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if stopped.is_set():
            sys.stderr.write("\x1b[?25h\n" if sys.stderr.isatty() else "\n")  # the cursor may be hidden
            sys.stderr.flush()
            os._exit(130)
        stopped.set()

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except NotImplementedError:  # Windows: Ctrl-C interrupts the loop itself
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _display() -> Generator[Display]:
    """Live lines on a terminal; a line per agent elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeElapsedColumn(),
        console=console(sys.stderr),
        transient=True,
    )
    with progress:
        yield _Live(progress)


class _Lines:
    """For logs and pipes: when reading is done, and when an agent has finished a step of note."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def event(self, event: RunEvent) -> None:
        """One short line for what a reader of a log wants to know."""
        if event.kind == "step_finished" and event.agent and event.agent != "run":
            self._steps[event.agent] = self._steps.get(event.agent, 0) + 1
            problem = event.data.get("error")
            if isinstance(problem, dict):
                talk(f"{event.agent}: {event.name} failed: {problem.get('detail')}")  # pyright: ignore[reportUnknownMemberType] - JSON
        elif event.kind == "step_finished" and event.name == "ingest":
            talk("input read")
        elif event.kind == "agent_finished" and event.agent:
            state = "done" if event.data.get("state") == "completed" else event.data.get("state")
            talk(f"{event.agent}: {state} after {self._steps.get(event.agent, 0)} steps")


class _Live:
    """One line for the reading of the input, one per agent."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._reading = progress.add_task("reading the input", total=None, shown="")

    def event(self, event: RunEvent) -> None:
        """Move the line that the event belongs to."""
        match event.kind:
            case "ingest_progress":
                done, total = event.data.get("done"), event.data.get("total")
                self._progress.update(
                    self._reading, completed=done, total=total, shown=f"{done}/{total} files"
                )
            case "step_finished" if event.agent == "run" or event.agent is None:
                if event.name == "ingest":
                    self._progress.update(self._reading, visible=False)
            case "step_finished":
                task = self._task(event.agent or "")
                failed = " failed" if event.data.get("error") else ""
                self._progress.update(task, advance=1, shown=f"{event.name}{failed}")
            case "agent_finished":
                state = "done" if event.data.get("state") == "completed" else str(event.data.get("state"))
                self._progress.update(self._task(event.agent or ""), total=1, completed=1, shown=state)
            case "run_finished":
                self._progress.stop()
            case _:
                pass

    def _task(self, agent: str) -> TaskID:
        self._progress.update(self._reading, visible=False)
        if agent not in self._tasks:
            self._tasks[agent] = self._progress.add_task(agent, total=None, shown="")
        return self._tasks[agent]
