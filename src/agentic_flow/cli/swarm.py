"""`agentic-flow swarm watch|bench`: looking at teams at work, and measuring them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.session import Session, UrlOption, command, new_app

if TYPE_CHECKING:
    from agentic_flow.runtime.swarm_bench import Bench, Measured, Plan, Task

app = new_app("Watch teams of agents at work, and measure them.")


@command(
    app,
    "watch",
    examples=(
        "agentic-flow swarm watch ID",
        "agentic-flow swarm watch ID --url http://127.0.0.1:3000",
        "agentic-flow swarm watch ID --after 120 --json",
    ),
)
def watch(
    session: Session,
    run_id: Annotated[str, typer.Argument(help="Id of the run, as `runs list` prints it.", metavar="ID")],
    url: UrlOption = None,
    after: Annotated[
        int, typer.Option("--after", min=0, help="Leave out the lines of events up to this number.")
    ] = 0,
    reconnect_s: Annotated[
        float,
        typer.Option("--reconnect-s", min=0, help="How long a connection may stay lost.", metavar="SECONDS"),
    ] = 60.0,
) -> None:
    """Watch a run, here or on a server, until it ends; exit with the code that tells how it ended.

    On a terminal a live view: agents in a tree with state, time, tokens and cost, and what happened last.
    Elsewhere a line for each event, with --json a JSON object. A connection that is cut is opened again after
    the last event. Ctrl-C leaves the run alone.
    """
    from agentic_flow.cli.watch import watch as show

    show(session, run_id, url=url, after=after, reconnect_s=reconnect_s)


@command(
    app,
    "bench",
    examples=(
        "agentic-flow swarm bench --input .",
        "agentic-flow swarm bench --input . --task tests --topology star --agents 4 --json",
        "agentic-flow swarm bench --input src --task index --iterations 10 --out results",
    ),
    job=True,
)
def bench(
    session: Session,
    input: Annotated[
        Path, typer.Option("--input", "-i", help="Folder that the teams work on.", metavar="DIR")
    ] = Path(),
    topology: Annotated[
        list[str] | None,
        typer.Option(
            "--topology",
            help="mesh (10 agents in batches of 5), hierarchical (8), ring (6) or star (6); may be repeated. "
            "[default: all]",
            metavar="NAME",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="tests or index; may be repeated. [default: both]", metavar="TASK"),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            min=1,
            max=1000,
            help="Runs of each. [default: 1, with swarm.benchmark_mode swarm.iterations]",
        ),
    ] = None,
    agents: Annotated[
        int | None, typer.Option("--agents", min=1, max=64, help="Workers, in place of those numbers.")
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--files", help="Glob of the test files' names; may be repeated.", metavar="GLOB"),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option("--python", help="Interpreter of the tests. [default: the folder's .venv, or this one]"),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", help="What the task index asks.", metavar="TEXT")
    ] = None,
    file_timeout_s: Annotated[
        float,
        typer.Option("--file-timeout-s", min=1, max=600, help="Longest time of a test file.", metavar="S"),
    ] = 300.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for bench.json and a picture of each run.", metavar="DIR"),
    ] = None,
) -> None:
    """Measure teams of each topology at real work, without a key.

    The task tests runs the folder's test files, each in a process of its own by a tool with policy; no model
    has a part in it. The task index reads the folder and asks a team about it, with the configured model.
    Every run begins in an empty place of its own; the figures are of its record. Exits with 1 when a run did
    not do its work, or a test file fails.
    """
    import asyncio

    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import PathNotFound
    from agentic_flow.runtime.swarm_bench import QUESTION, Bench, default_python, plans_of, tasks_of

    if not input.is_dir():
        raise PathNotFound(f"{str(input)!r} is no folder", hint="name one with --input")
    own = session.start()
    harness = Bench(
        settings=own,
        folder=input,
        python=python or default_python(input),
        question=question or QUESTION,
        file_timeout_s=file_timeout_s,
        **({"files": tuple(files)} if files else {}),
    )
    tasks = tasks_of(task or ())
    if "tests" in tasks:
        try:
            harness.suite()
        except PathNotFound as error:
            if task:
                raise
            talk(f"left out: {error.message}")
            tasks.remove("tests")
    repeated = iterations or (own.swarm.iterations if own.swarm.benchmark_mode else 1)
    plans = plans_of(topology or (), agents)
    measured = asyncio.run(_measured(harness, tasks, plans, repeated, out))
    _show_bench(session, measured, out)


async def _measured(
    harness: Bench, tasks: list[Task], plans: list[Plan], iterations: int, out: Path | None
) -> list[Measured]:
    from agentic_flow.cli.output import talk

    measured: list[Measured] = []
    for task in tasks:
        for number in range(1, iterations + 1):
            for plan in plans:
                one = await harness.run(task, plan, number)
                talk(f"{task}, {plan.topology}, {number} of {iterations}: {one.wall_s:.2f} s, {one.verdict}")
                _draw(one, out)
                measured.append(one)
    return measured


def _draw(one: Measured, out: Path | None) -> None:
    if out is not None and one.picture:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{one.task}-{one.topology}-{one.iteration}.svg").write_text(one.picture, "utf-8")


def _show_bench(session: Session, measured: list[Measured], out: Path | None) -> None:
    from dataclasses import asdict

    import orjson

    from agentic_flow.cli.output import print_error, print_table, talk
    from agentic_flow.core.errors import AgenticFlowError
    from agentic_flow.runtime.swarm_bench import HEADERS, rows_of

    records = [{name: value for name, value in asdict(one).items() if name != "picture"} for one in measured]
    failing = {file.path: file for one in measured for file in one.failing}
    useless = [one for one in measured if one.verdict != "ok"]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_bytes(orjson.dumps(records, option=orjson.OPT_INDENT_2))
        talk(f"written to {out}")

    def human() -> None:
        print_table(HEADERS, rows_of(measured))
        for path, file in sorted(failing.items()):
            flaky = ", not every time" if file.flaky else ""
            print(f"{path}: {file.outcome}{flaky} ({file.said})")

    session.show(records, human)
    error: AgenticFlowError | None = None
    if useless:
        first = useless[0]
        error = AgenticFlowError(
            f"{len(useless)} of {len(measured)} runs did not do their work: {first.topology}, {first.task}: "
            f"{first.verdict}",
            hint="their figures are left out of the table",
        )
    elif failing:
        error = AgenticFlowError(
            f"{len(failing)} test file{'s fail' if len(failing) > 1 else ' fails'}",
            hint="the teams did their work; the tests are the folder's own",
        )
    if error is not None:
        print_error(error, as_json=False)  # with --json, stdout has the runs themselves
        raise typer.Exit(error.exit_code)
