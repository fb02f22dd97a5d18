"""`agentic-flow schedules add|list|show|pause|resume|remove`: workflow files that run by themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.queueing import Inputs, Priority, words_of
from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.swarm.schedules import Schedule

app = new_app("Run workflow files by themselves: add, list, show, pause, resume and remove schedules.")

Name = Annotated[str, typer.Argument(help="The schedule, as `schedules list` prints it.", metavar="NAME")]


@command(
    app,
    "add",
    examples=(
        "agentic-flow schedules add nightly.yaml --input folder=src",
        "agentic-flow schedules add nightly.yaml --name docs --input folder=docs --queue nightly --json",
    ),
)
def add(
    session: Session,
    file: Annotated[
        Path,
        typer.Argument(help="Workflow file that has a `schedule`: .yaml, .yml or .toml.", metavar="FILE"),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the schedule. [default: the workflow's]", metavar="NAME"),
    ] = None,
    input: Inputs = None,
    queue: Annotated[
        str | None,
        typer.Option("--queue", help="Let workers of this shared queue do its runs.", metavar="NAME"),
    ] = None,
    priority: Priority = 0,
) -> None:
    """Keep a workflow file and run it by its schedule, from now on.

    The file is read now; to change it later, remove the schedule and add it again. Its runs are made by a
    server (`agentic-flow serve`) or a worker on the same run database, with the rights of whoever adds it.
    """
    from agentic_flow.swarm.workflow_bound import parsed_inputs, source_of, workflow_of

    inputs = parsed_inputs(workflow_of(source_of(file)), words_of(input))
    with session.client() as client:
        added = client.schedules.add(file, inputs, name=name, queue=queue, priority=priority)
    session.show(added, lambda: _print(added))


@command(app, "list", examples=("agentic-flow schedules list", "agentic-flow schedules list --json"))
def list_schedules(session: Session) -> None:
    """List schedules, by name."""
    from agentic_flow.cli.output import local_time, print_table

    with session.client() as client:
        found = client.schedules.list()
    session.show(
        found,
        lambda: print_table(
            ("schedule", "rule", "state", "next", "runs", "skipped", "last run"),
            [
                (
                    one.name,
                    one.rule.text,
                    one.state,
                    "-" if one.next_at_s is None else local_time(one.next_at_s),
                    one.fired,
                    one.skipped,
                    one.last_run_id or "-",
                )
                for one in found
            ],
        ),
    )


@command(app, "show", examples=("agentic-flow schedules show nightly",))
def show(session: Session, name: Name) -> None:
    """Show a schedule: its rule, its next time, its last run, and what was skipped and why."""
    with session.client() as client:
        found = client.schedules.show(name)
    session.show(found, lambda: _print(found))


@command(app, "pause", examples=("agentic-flow schedules pause nightly",))
def pause(session: Session, name: Name) -> None:
    """Make no more runs of a schedule until it is resumed. What runs goes on."""
    with session.client() as client:
        changed = client.schedules.pause(name)
    said = "paused" if changed else "was paused already"
    session.show({"name": name, "paused": changed}, lambda: print(f"schedule {name} {said}"))


@command(app, "resume", examples=("agentic-flow schedules resume nightly",))
def resume(session: Session, name: Name) -> None:
    """Let a schedule go on with its next time; those of the pause are not made up for."""
    with session.client() as client:
        changed = client.schedules.resume(name)
    said = "goes on" if changed else "was active already"
    session.show({"name": name, "resumed": changed}, lambda: print(f"schedule {name} {said}"))


@command(app, "remove", examples=("agentic-flow schedules remove nightly",))
def remove(session: Session, name: Name) -> None:
    """Forget a schedule. Its runs stay."""
    with session.client() as client:
        client.schedules.remove(name)
    session.show({"name": name, "removed": True}, lambda: print(f"schedule {name} removed"))


def _print(one: Schedule) -> None:
    from agentic_flow.cli.output import local_time

    coming = "paused" if one.next_at_s is None else f"next {local_time(one.next_at_s)}"
    out = sys.stdout.write
    out(f"schedule {one.name}: workflow {one.workflow}, {one.rule.text}, {coming}\n")
    out(f"  {one.fired} runs, {one.skipped} skipped; overlap {one.rule.overlap}\n")
    if one.last_run_id is not None and one.last_at_s is not None:
        out(f"  last: {one.last_run_id}, due {local_time(one.last_at_s)}\n")
    if one.note:
        out(f"  note: {one.note}\n")
