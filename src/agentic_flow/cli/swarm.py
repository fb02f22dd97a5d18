"""`agentic-flow swarm watch`: looking at teams at work."""

from __future__ import annotations

from typing import Annotated

import typer

from agentic_flow.cli.session import Session, UrlOption, command, new_app

app = new_app("Watch teams of agents at work.")


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
