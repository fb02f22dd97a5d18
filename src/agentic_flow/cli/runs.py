"""`agentic-flow runs`: list, show, draw, hold, go on, answer, signal, cancel, retry, purge; artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app(
    "List, show, draw, pause, resume, answer, signal, cancel, retry and purge runs; their artifacts."
)

RunId = Annotated[str, typer.Argument(help="Id of the run, as `runs list` prints it.", metavar="ID")]


@command(
    app,
    "list",
    examples=(
        "agentic-flow runs list",
        "agentic-flow runs list --state interrupted --json",
    ),
)
def list_runs(
    session: Session,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            help="Only queued, running, paused, interrupted, completed, failed or cancelled ones.",
            metavar="STATE",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most runs listed.")] = 50,
) -> None:
    """List runs, newest first."""
    from agentic_flow.cli.output import local_time, money, print_table
    from agentic_flow.client import known_states

    with session.client() as client:
        found = client.runs.list(states=known_states(state or ()), limit=limit)
    session.show(
        found,
        lambda: print_table(
            ("run", "state", "started", "model", "cost", "goal"),
            [
                (
                    r.run_id,
                    r.state,
                    local_time(r.created_at_s),
                    r.model,
                    money(r.usage.cost_usd) if r.state == "completed" else "-",
                    _head(r.goal),
                )
                for r in found
            ],
        ),
    )


@command(
    app,
    "show",
    examples=(
        "agentic-flow runs show ID",
        "agentic-flow runs show ID --steps",
        "agentic-flow runs show ID --json",
    ),
)
def show(
    session: Session,
    run_id: RunId,
    steps: Annotated[bool, typer.Option("--steps", help="Also list every recorded step.")] = False,
) -> None:
    """Show a run: its answer and citations, or what it has done so far."""
    from agentic_flow.cli.answer import print_result, print_steps

    with session.client() as client:
        result = client.runs.show(run_id)
        recorded = client.runs.steps(run_id) if steps else ()

    def human() -> None:
        print_result(result)
        if result.error is not None:
            print(f"{result.state}: {result.error.get('detail')}")
            print(f"hint: {result.error.get('hint') or 'look at its steps with --steps'}")
        if steps:
            print_steps(recorded)

    if steps:
        session.show({**result.model_dump(mode="json"), "steps": list(recorded)}, human)
    else:
        session.show(result, human)


@command(app, "graph", examples=("agentic-flow runs graph ID", "agentic-flow runs graph ID --json"))
def graph(session: Session, run_id: RunId) -> None:
    """Show who heard whom in a run, from its record."""
    from dataclasses import asdict

    from agentic_flow.swarm.picture import graph_of, graph_text

    with session.client() as client:
        result = client.runs.show(run_id)
        steps = client.runs.steps(run_id)
    session.show(asdict(graph_of(steps)), lambda: print(graph_text(result, steps)))


@command(app, "picture", examples=("agentic-flow runs picture ID -o run.svg",))
def picture(
    session: Session,
    run_id: RunId,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, replaced if it exists.", metavar="FILE")
    ],
) -> None:
    """Draw a run as SVG: its message graph, and the timeline of its agents with tokens and cost."""
    from agentic_flow.core.errors import PathNotFound

    with session.client() as client:
        drawn = client.runs.picture(run_id)
    try:
        output.write_text(drawn, "utf-8")
    except OSError as error:
        raise PathNotFound(
            f"{str(output)!r} cannot be written: {error.strerror}", hint="name a file in a folder of yours"
        ) from error
    session.show({"run_id": run_id, "file": str(output)}, lambda: print(f"{run_id} drawn in {output}"))


@command(
    app,
    "artifacts",
    examples=(
        "agentic-flow runs artifacts ID",
        "agentic-flow runs artifacts ID --out results",
        "agentic-flow runs artifacts ID report.md --out . --force",
    ),
)
def artifacts(
    session: Session,
    run_id: RunId,
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these. [default: all]", metavar="[NAME]...")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write them into this folder, made if it is not there.", metavar="DIR"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="List every version, not only the newest.")
    ] = False,
) -> None:
    """List the files that a run has left, or write them into a folder.

    Each is written whole or not at all; without --force none is, when one of the files is there already.
    """
    from agentic_flow.cli.output import print_table
    from agentic_flow.core.errors import InvalidInput

    if versions and (names or out is not None):
        raise InvalidInput(
            "--versions lists all, and takes no names and no folder", hint="leave one of them out"
        )
    with session.client() as client:
        known = {one.name: one for one in client.runs.artifacts(run_id)}
        # Of one that is not there the service says what is wrong.
        found = [known.get(name) or client.runs.artifact(run_id, name).artifact for name in names or known]
        if versions:
            found = list(client.runs.artifacts(run_id, versions=True))
        written: list[Path] = []
        if out is not None:
            from agentic_flow.swarm.artifact_files import write_out

            files = [
                (one.name, client.runs.artifact(run_id, one.name, version=one.version).data) for one in found
            ]
            written = write_out(out, files, force=force)

    def human() -> None:
        if not found:
            print(f"{run_id} has left no artifacts")
            return
        if out is not None:
            for path, one in zip(written, found, strict=True):
                print(f"{path} ({one.size_bytes:,} bytes)")
            return
        print_table(
            ("artifact", "version", "type", "bytes", "agent", "step", "sha256"),
            [
                (a.name, a.version, a.media_type, f"{a.size_bytes:,}", a.agent, a.step, a.sha256[:12])
                for a in found
            ],
        )

    session.show({"run_id": run_id, "artifacts": found, "files": [str(path) for path in written]}, human)


@command(app, "resume", examples=("agentic-flow runs resume ID", "agentic-flow runs resume ID --json"))
def resume(session: Session, run_id: RunId) -> None:
    """Continue a paused, interrupted or cancelled run where it was, and print its answer.

    Finished steps are not repeated and recorded model calls are not paid again.
    """
    from agentic_flow.cli.follow import follow
    from agentic_flow.client import AsyncClient

    async def restart(client: AsyncClient) -> str:
        await client.runs.restart(run_id)
        return run_id

    follow(session, restart)


@command(app, "pause", examples=("agentic-flow runs pause ID",))
def pause(session: Session, run_id: RunId) -> None:
    """Hold a run before its next steps until `runs resume`; what is under way ends and is recorded."""
    from agentic_flow.core.errors import Conflict

    with session.client() as client:
        if not client.runs.pause(run_id):
            state = client.runs.show(run_id).state
            raise Conflict(f"run {run_id!r} is {state} already", hint="there is nothing to pause")
    session.show({"run_id": run_id, "state": "paused"}, lambda: print(f"{run_id} paused"))


@command(
    app, "questions", examples=("agentic-flow runs questions ID", "agentic-flow runs questions ID --json")
)
def questions(session: Session, run_id: RunId) -> None:
    """List what a run has asked people, and what was answered."""
    from agentic_flow.cli.output import local_time, print_table

    with session.client() as client:
        asked = client.runs.questions(run_id)
    session.show(
        asked,
        lambda: print_table(
            ("question", "state", "until", "options", "answer", "text"),
            [
                (
                    q.id,
                    q.state,
                    "-" if q.until_s is None else local_time(q.until_s),
                    "|".join(q.options) or "any text",
                    "-" if q.answer is None else _head(q.answer),
                    _head(q.text),
                )
                for q in asked
            ],
        ),
    )


@command(app, "answer", examples=("agentic-flow runs answer ID release.q1 approve",))
def answer(
    session: Session,
    run_id: RunId,
    question: Annotated[
        str, typer.Argument(help="Id of the question, as `runs questions` prints it.", metavar="QUESTION")
    ],
    text: Annotated[str, typer.Argument(help="One of its options, or any text.", metavar="ANSWER")],
) -> None:
    """Answer a question of a run, which goes on with it wherever it waits."""
    with session.client() as client:
        is_new = client.runs.answer(run_id, question, text)
    told = {"run_id": run_id, "question_id": question, "answer": text, "is_new": is_new}
    session.show(told, lambda: print(f"{question} answered {text!r}" + ("" if is_new else " already")))


@command(
    app,
    "signal",
    examples=(
        "agentic-flow runs signal ID deployed",
        "agentic-flow runs signal ID deployed --value '{\"version\": 3}' --key deploy-3",
    ),
)
def signal(
    session: Session,
    run_id: RunId,
    name: Annotated[str, typer.Argument(help="What the run waits for.", metavar="NAME")],
    value: Annotated[
        str, typer.Option("--value", help="What the signal says, as JSON.", metavar="JSON")
    ] = "null",
    key: Annotated[
        str | None,
        typer.Option("--key", help="To send it again with this key does nothing.", metavar="KEY"),
    ] = None,
) -> None:
    """Send a run a signal, which it receives wherever it waits for it (`wait_for` in workflow files)."""
    import json

    from agentic_flow.core.errors import InvalidInput

    try:
        said = json.loads(value)
    except ValueError as error:
        raise InvalidInput(
            f"--value {value!r} is no JSON: {error}", hint="put texts in double quotes: '\"text\"'"
        ) from error
    with session.client() as client:
        is_new = client.runs.signal(run_id, name, said, key=key)
    told = {"run_id": run_id, "signal": name, "value": said, "is_new": is_new}
    session.show(told, lambda: print(f"{name} sent" + ("" if is_new else " already")))


@command(app, "cancel", examples=("agentic-flow runs cancel ID",))
def cancel(session: Session, run_id: RunId) -> None:
    """Cancel a run and its agents, wherever they work."""
    from agentic_flow.core.errors import Conflict

    with session.client() as client:
        if not client.runs.cancel(run_id):
            state = client.runs.show(run_id).state
            raise Conflict(f"run {run_id!r} is {state} already", hint="there is nothing left to cancel")
    session.show({"run_id": run_id, "state": "cancelled"}, lambda: print(f"{run_id} cancelled"))


@command(
    app,
    "retry",
    examples=("agentic-flow runs retry ID", "agentic-flow runs retry ID --from synthesizer --json"),
)
def retry(
    session: Session,
    run_id: RunId,
    from_step: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Step or agent to begin with. [default: the first that did not complete]",
            metavar="STEP",
        ),
    ] = None,
) -> None:
    """Start a new run with the recorded steps of an ended one, and print its answer.

    Steps before STEP, and what was started together with it and has completed, are taken over: their model
    calls are not repeated. The rest is done again. The new run has its own budget, tokens and deadline.
    """
    from agentic_flow.cli.follow import follow
    from agentic_flow.client import AsyncClient

    async def start(client: AsyncClient) -> str:
        return await client.runs.retry(run_id, from_step=from_step)

    follow(session, start)


@command(
    app,
    "purge",
    examples=(
        "agentic-flow runs purge --older-than 30d --dry-run",
        "agentic-flow runs purge --older-than 30d --keep-bytes 1000000000 --json",
    ),
)
def purge(
    session: Session,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", help="Those that ended so long ago: 30d, 12h, 90m or 10s.", metavar="AGE"
        ),
    ] = None,
    keep_bytes: Annotated[
        int | None,
        typer.Option("--keep-bytes", min=0, help="The oldest, until the rest takes no more than this."),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose. [default: your own]", metavar="NAME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Remove runs that have ended, with their agents, steps, events, messages, questions and artifacts.

    There is no way back. Runs that are alive stay, paused and interrupted ones too, and so do those that an
    unfinished run names. What was learned from them stays in memory. Without an age and a number of bytes,
    swarm.keep_days and swarm.keep_bytes say which go.
    """
    from agentic_flow.cli.memory_session import counted
    from agentic_flow.cli.output import duration_of

    older_than_s = None if older_than is None else duration_of(older_than)
    with session.client() as client:
        gone = client.runs.purge(
            older_than_s=older_than_s, keep_bytes=keep_bytes, tenant=tenant, dry_run=dry_run
        )

    def human() -> None:
        print(
            f"{counted(gone.runs, 'run')} {'would be ' if dry_run else ''}removed, with "
            f"{counted(gone.agents, 'agent')}, {counted(gone.steps, 'step')}, "
            f"{counted(gone.events, 'event')}, {counted(gone.messages, 'message')} and "
            f"{counted(gone.artifacts, 'artifact')}: "
            f"{gone.size_bytes:,} bytes"
        )
        if gone.runs and not dry_run:
            print("The database uses the space for new runs; VACUUM, while nothing runs, gives it to others.")

    session.show(gone, human)


def _head(goal: str) -> str:
    line = " ".join(goal.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
