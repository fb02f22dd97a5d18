"""`agentic-flow run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "run",
        examples=(
            'agentic-flow run "How are timeouts implemented?" --input src',
            'agentic-flow run "Compare the two parsers" -i a.py -i b.py --topology mesh --agents 3',
            'agentic-flow run "What is risky here?" -i . --forbid "secrets/**" --budget-usd 0.50 --json',
        ),
    )
    def run(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        goal: Annotated[str, typer.Argument(help="The question or task.", metavar="GOAL")],
        input: Annotated[
            list[Path] | None,
            typer.Option("--input", "-i", help="File or folder to work on; may be repeated.", metavar="PATH"),
        ] = None,
        topology: Annotated[
            Literal["hierarchical", "mesh", "ring", "star"] | None,
            typer.Option("--topology", help="Who works with whom. [default: setting swarm.topology]"),
        ] = None,
        agents: Annotated[
            int | None,
            typer.Option(
                "--agents", min=1, max=64, help="Worker agents. [default: setting swarm.agents_max]"
            ),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                "--model",
                help="`provider:model` or a bare name; see `agentic-flow models list`.",
                metavar="NAME",
            ),
        ] = None,
        budget_usd: Annotated[
            float | None,
            typer.Option("--budget-usd", help="Hard limit on the money spent on models.", metavar="USD"),
        ] = None,
        allow: Annotated[
            list[str] | None,
            typer.Option(
                "--allow", help="Only these paths, gitignore-style; may be repeated.", metavar="PATTERN"
            ),
        ] = None,
        forbid: Annotated[
            list[str] | None,
            typer.Option("--forbid", help="Never these paths; wins over --allow.", metavar="PATTERN"),
        ] = None,
        no_memory: Annotated[
            bool,
            typer.Option(
                "--no-memory", help="Tell the agents nothing of earlier runs; to compare with runs that do."
            ),
        ] = False,
    ) -> None:
        """Put a team of agents to work on a goal and print its answer with citations.

        The input is read into memory first (files that have not changed are not read again). Everything the
        run does is recorded: if this process dies, `agentic-flow runs resume ID` goes on where it was.
        Ctrl-C cancels the run; a second Ctrl-C leaves at once.
        """
        from agentic_flow.cli.follow import follow
        from agentic_flow.client import AsyncClient

        async def submit(client: AsyncClient) -> str:
            return await client.runs.submit(
                goal,
                input=list(input or ()),
                topology=topology,
                agents=agents,
                model=model,
                budget_usd=budget_usd,
                paths_allowed=allow or (),
                paths_forbidden=forbid or (),
                memory=not no_memory,
            )

        follow(session, submit)
