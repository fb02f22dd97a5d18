"""Watching a run: a live view on a terminal, lines elsewhere, and the exit code that tells how it ended.

Who watches owns nothing: Ctrl-C leaves the run alone. A connection that is cut is opened again after the
last event that was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Generator
from typing import IO, TYPE_CHECKING, Protocol

import typer

from agentic_flow.cli.follow import interrupts
from agentic_flow.cli.output import console, money, print_error, talk
from agentic_flow.cli.session import Session
from agentic_flow.core.errors import (
    AgenticFlowError,
    Cancelled,
    CircuitOpen,
    DeadlineExceeded,
    Unavailable,
    from_problem,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from agentic_flow.client import AsyncClient
    from agentic_flow.swarm.run_view import AgentRow, RunView
    from agentic_flow.swarm.runs import RunEvent

_ACCOUNT_S = 1.0
_PAUSE_S = 0.5
_FRAMES_PER_S = 4
_HEADER_LINES, _RECENT_LINES, _ROWS_MIN = 5, 6, 3
_MARKS = {
    "waiting": ("·", "dim"),
    "working": ("▶", "cyan"),
    "completed": ("✓", "green"),
    "failed": ("✗", "red"),
    "cancelled": ("✗", "yellow"),
    "unfinished": ("✗", "yellow"),
    "no part": ("-", "dim"),
}


class Watching(Protocol):
    """Where a run is shown while it goes."""

    def event(self, event: RunEvent) -> None:
        """Take one event."""
        ...

    def lost(self, problem: str | None) -> None:
        """The connection is lost, or (None) is there again."""
        ...


def watch(session: Session, run_id: str, *, url: str | None, after: int, reconnect_s: float) -> None:
    """Show a run until it ends, and exit with its code.

    Args:
        session: Of this command.
        run_id: The run.
        url: A platform elsewhere; None: by the settings.
        after: Events up to this number are not printed as lines.
        reconnect_s: How long a connection may stay lost.

    Raises:
        NotFound: there is no such run.
        Unavailable: the connection stayed lost.
    """
    code = asyncio.run(_watch(session, run_id, url=url, after=after, reconnect_s=reconnect_s))
    if code:
        raise typer.Exit(code)


async def _watch(session: Session, run_id: str, *, url: str | None, after: int, reconnect_s: float) -> int:
    from agentic_flow.client import AsyncClient
    from agentic_flow.swarm.run_view import RunView

    stopped = asyncio.Event()
    view = RunView(run_id)
    with interrupts(stopped):
        async with AsyncClient(url, settings=session.start()) as client:
            view.account(await client.runs.show(run_id))  # also says when there is no such run
            with _shown(session, view, after) as display:
                watching = asyncio.create_task(
                    follow_events(client, view, display, reconnect_s=reconnect_s), name="watch"
                )
                stopping = asyncio.create_task(stopped.wait())
                try:
                    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    if watching.done():
                        await watching
                finally:
                    watching.cancel()
                    stopping.cancel()
                    await asyncio.wait({watching, stopping})
    return _code(session, view, url)


def _code(session: Session, view: RunView, url: str | None) -> int:
    """Say how it ended, or how to come back; the exit code of that."""
    again = f"agentic-flow swarm watch {view.run_id}" + (f" --url {url}" if url else "")
    if not view.ended:
        if not session.as_json:
            again += f" --after {view.sequence}" if not sys.stdout.isatty() else ""
        talk(f"left; run {view.run_id} goes on without you. Come back with `{again}`")
        return Cancelled("").exit_code
    error: AgenticFlowError | None = None
    if view.state == "cancelled":
        error = Cancelled(
            f"run {view.run_id} was cancelled",
            hint=f"continue it with `agentic-flow runs resume {view.run_id}`",
        )
    elif view.error is not None:
        error = from_problem(view.error)
    if error is not None:
        print_error(error, as_json=False)
        return error.exit_code
    talk(f"run {view.run_id} {view.state}; `agentic-flow runs show {view.run_id}` prints its answer")
    return 0


async def follow_events(client: AsyncClient, view: RunView, display: Watching, *, reconnect_s: float) -> None:
    """Show events until the run has ended, through cuts of the connection up to `reconnect_s` long.

    Raises:
        Unavailable: nothing could be reached for so long.
    """
    account = asyncio.create_task(_keep_account(client, view))
    lost_at_s: float | None = None
    try:
        while not view.ended:
            try:
                async for event in client.runs.events(view.run_id, after=view.sequence):
                    if lost_at_s is not None:
                        lost_at_s = None
                        display.lost(None)
                    display.event(event)
                if not view.ended:
                    await asyncio.sleep(_PAUSE_S)
            except (Unavailable, CircuitOpen, DeadlineExceeded) as error:
                lost_at_s = time.monotonic() if lost_at_s is None else lost_at_s
                if time.monotonic() - lost_at_s >= reconnect_s:
                    raise Unavailable(
                        f"the connection was lost for {reconnect_s:g} s: {error.message}",
                        hint=f"the run is not touched by that; come back with "
                        f"`agentic-flow swarm watch {view.run_id}`",
                    ) from error
                display.lost(error.message)
                await asyncio.sleep(_PAUSE_S)
    finally:
        account.cancel()
        await asyncio.wait({account})
    with contextlib.suppress(AgenticFlowError):  # the figures of a moment ago are shown if it cannot be asked
        view.account(await client.runs.show(view.run_id))


async def _keep_account(client: AsyncClient, view: RunView) -> None:
    """Tokens and money, which events do not carry; asked more rarely where the answer takes long."""
    while True:
        began_s = time.monotonic()
        with contextlib.suppress(AgenticFlowError):  # who reads the events says what is wrong
            view.account(await client.runs.show(view.run_id))
        await asyncio.sleep(max(_ACCOUNT_S, 5 * (time.monotonic() - began_s)))


@contextlib.contextmanager
def _shown(session: Session, view: RunView, after: int) -> Generator[Watching]:
    if session.as_json:
        yield _JsonLines(view, after)
    elif not sys.stdout.isatty():
        yield Lines(view, sys.stdout, after)
    else:
        with live(view, sys.stdout) as display:
            yield display


@contextlib.contextmanager
def live(view: RunView, stream: IO[str]) -> Generator[Watching]:
    """The live view on a terminal. What it shows last stays there."""
    from rich.live import Live

    out = console(stream)
    display = _Tree(view, out)
    with Live(
        get_renderable=display.drawn,
        console=out,
        refresh_per_second=_FRAMES_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield display


class Lines:
    """A line for each event: its number, when it happened, who did what."""

    def __init__(self, view: RunView, stream: IO[str], after: int = 0) -> None:
        self._view = view
        self._stream = stream
        self._after = after
        self._is_lost = False

    def event(self, event: RunEvent) -> None:
        """See Watching."""
        line = self._view.take(event)
        if line is not None and event.sequence > self._after:
            at_s = self._view.elapsed_s(event.at_s)
            self._stream.write(f"#{event.sequence} +{at_s:.1f} s {line}\n")
            self._stream.flush()

    def lost(self, problem: str | None) -> None:
        """See Watching."""
        _tell_lost(problem, again=self._is_lost)
        self._is_lost = problem is not None


class _JsonLines:
    """A JSON object for each event, one a line."""

    def __init__(self, view: RunView, after: int) -> None:
        self._view = view
        self._after = after
        self._is_lost = False

    def event(self, event: RunEvent) -> None:
        if self._view.take(event) is not None and event.sequence > self._after:
            sys.stdout.write(f"{event.model_dump_json()}\n")
            sys.stdout.flush()

    def lost(self, problem: str | None) -> None:
        _tell_lost(problem, again=self._is_lost)
        self._is_lost = problem is not None


def _tell_lost(problem: str | None, *, again: bool) -> None:
    if problem is None:
        talk("connected again")
    elif not again:
        talk(f"connection lost, trying again: {problem}")


class _Tree:
    """Header, progress, agents in a tree, and what happened last; redrawn from the view."""

    def __init__(self, view: RunView, out: Console) -> None:
        self._view = view
        self._out = out
        self._lost: str | None = None

    def event(self, event: RunEvent) -> None:
        self._view.take(event)

    def lost(self, problem: str | None) -> None:
        self._lost = problem

    def drawn(self) -> RenderableType:
        """What stands on the screen now. Never higher than it: what scrolls away could not be redrawn."""
        from rich.console import Group

        now_s = time.time()
        height = shutil.get_terminal_size().lines if self._out.is_terminal else 1000
        room = max(_ROWS_MIN, height - _HEADER_LINES - _RECENT_LINES - 2)
        recent = [] if self._view.ended else list(self._view.recent)[-(_RECENT_LINES - 1) :]
        return Group(self._header(now_s), self._bar(), self._table(now_s, room), *self._told(recent))

    def _header(self, now_s: float) -> RenderableType:
        from rich.text import Text

        view = self._view
        shape = f"{view.topology}, now {view.shape}" if view.shape else view.topology
        used = "" if view.tokens is None else f"  {view.tokens} tokens, {money(view.cost_usd)}"
        head = Text.assemble(
            (f"{view.run_id}  ", "bold"),
            (view.state, _style(view.state)),
            f"  {shape}  {_span(view.elapsed_s(now_s))}{used}",
            overflow="ellipsis",
            no_wrap=True,
        )
        goal = Text(" ".join(view.goal.split()), style="dim", overflow="ellipsis", no_wrap=True)
        lines = [head, goal]
        if self._lost is not None:
            lines.append(Text(f"connection lost, trying again: {self._lost}", style="yellow"))
        return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 1))
        if self._view.reading is not None:
            done, total = self._view.reading
            words = f"reading the input: {done} of {total} files"
        else:
            done, total = self._view.progress()
            words = f"{done} of {total} assignments known so far"
        grid.add_row(ProgressBar(total=max(total, 1), completed=done, width=32), words)
        return grid

    def _table(self, now_s: float, room: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        tree = self._view.tree()
        shown = _fitting(tree, room)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("agent", "state", "step"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for name in ("steps", "elapsed", "tokens", "cost"):
            table.add_column(name, justify="right", no_wrap=True)
        for depth, row in shown:
            mark, style = _MARKS.get(row.state, ("?", ""))
            failures = f" ({row.failures} failed)" if row.failures else ""
            table.add_row(
                Text(f"{'  ' * depth}{row.name}"),
                Text(f"{mark} {row.state}", style=style),
                Text(f"{row.doing}{failures}"),
                Text(str(row.steps)),
                Text(_span(row.elapsed_s(now_s))),
                Text("-" if row.tokens is None else str(row.tokens)),
                Text("-" if row.tokens is None else money(row.cost_usd)),
            )
        if len(shown) < len(tree):
            table.add_row(Text(f"… {len(tree) - len(shown)} more", style="dim"))
        return table

    def _told(self, recent: list[tuple[int, str]]) -> list[RenderableType]:
        from rich.text import Text

        return [
            Text(f"#{number} {line}", style="dim", no_wrap=True, overflow="ellipsis")
            for number, line in recent
        ]


def _fitting(tree: list[tuple[int, AgentRow]], room: int) -> list[tuple[int, AgentRow]]:
    """As many rows as there is room for: those that work first, then those that failed, then the latest."""
    if len(tree) <= room:
        return tree
    first = {"working": 0, "failed": 1, "waiting": 2}
    ranked = sorted(range(len(tree)), key=lambda i: (first.get(tree[i][1].state, 3), -i))
    return [tree[i] for i in sorted(ranked[: room - 1])]


def _style(state: str) -> str:
    return {"completed": "green", "failed": "red", "running": "cyan"}.get(state, "yellow")


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
