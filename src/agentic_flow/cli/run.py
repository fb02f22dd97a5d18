"""`agentic-flow run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentic_flow.cli.queueing import After, AfterAnyEnd, Detach, Priority, Queue
from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.client import AsyncClient


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "run",
        examples=(
            'agentic-flow run "How are timeouts implemented?" --input src',
            'agentic-flow run "Compare the two parsers" -i a.py -i b.py --topology mesh --agents 3',
            'agentic-flow run "How is state kept?" -i src --agents 8 --teams 2 --accept min_citations:3',
            'agentic-flow run "What has changed?" -i src --queue nightly --detach',
            'agentic-flow run "What is risky here?" -i . --forbid "secrets/**" --budget-usd 0.50 --json',
        ),
        job=True,
    )
    def run(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        goal: Annotated[str, typer.Argument(help="The question or task.", metavar="GOAL")],
        input: Annotated[
            list[Path] | None,
            typer.Option("--input", "-i", help="File or folder to work on; may be repeated.", metavar="PATH"),
        ] = None,
        topology: Annotated[
            str | None,
            typer.Option(
                "--topology",
                help="Who works with whom: adaptive, hierarchical, mesh, pipeline, ring or star. "
                "[default: setting swarm.topology]",
                metavar="NAME",
            ),
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
        teams: Annotated[
            str | None,
            typer.Option(
                "--teams", help="Leads below the planner: 2, or 2,2 for two levels.", metavar="N[,N]"
            ),
        ] = None,
        rounds: Annotated[
            int | None, typer.Option("--rounds", min=2, max=10, help="Rounds of a mesh. [default: 2]")
        ] = None,
        laps: Annotated[
            int | None, typer.Option("--laps", min=1, max=10, help="Times around a ring. [default: 1]")
        ] = None,
        stage: Annotated[
            list[str] | None,
            typer.Option(
                "--stage", help="Next stage of a pipeline; may be repeated.", metavar="AGENT[=TASK]"
            ),
        ] = None,
        reviewers: Annotated[
            int | None,
            typer.Option("--reviewers", min=1, max=9, help="Reviewers who vote on claims. [default: 1]"),
        ] = None,
        quorum: Annotated[
            int | None,
            typer.Option("--quorum", min=1, max=64, help="Voices needed. [default: more than half]"),
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option("--batch-size", min=1, max=64, help="Agents that work at once at most.")
        ] = None,
        role: Annotated[
            list[str] | None,
            typer.Option(
                "--role",
                help="How a role is played: worker.model=NAME, reviewer.agent=NAME, worker.tools=A,B; may be "
                "repeated.",
                metavar="ROLE.KEY=VALUE",
            ),
        ] = None,
        accept: Annotated[
            list[str] | None,
            typer.Option(
                "--accept",
                help="What must hold of the answer: contains:TEXT, cites:GLOB, min_citations:N, max_words:N, "
                "command:ARGV or question:TEXT; may be repeated.",
                metavar="KIND:VALUE",
            ),
        ] = None,
        board: Annotated[
            Literal["none", "topology", "all"],
            typer.Option("--board", help="Who shares a blackboard: nobody, who may speak anyway, or all."),
        ] = "none",
        queue: Queue = None,
        priority: Priority = 0,
        after: After = None,
        after_any_end: AfterAnyEnd = False,
        deadline_s: Annotated[
            float | None, typer.Option("--deadline-s", help="Longest time of the run.", metavar="SECONDS")
        ] = None,
        steps_max: Annotated[
            int | None, typer.Option("--steps-max", min=1, help="Model calls of one agent at most.")
        ] = None,
        tokens_max: Annotated[
            int | None, typer.Option("--tokens-max", min=1, help="Tokens of the run at most.")
        ] = None,
        watch: Annotated[
            bool, typer.Option("--watch", help="Show the whole team at work, as `swarm watch` does.")
        ] = False,
        detach: Detach = False,
    ) -> None:
        """Put a team of agents to work on a goal and print its answer with citations.

        The input is read into memory first (files that have not changed are not read again). Everything the
        run does is recorded: if this process dies, `agentic-flow runs resume ID` goes on where it was.
        Ctrl-C cancels the run; a second Ctrl-C leaves at once.
        """
        from agentic_flow.cli.follow import follow, leave
        from agentic_flow.cli.run_options import spec_options
        from agentic_flow.core.errors import InvalidInput
        from agentic_flow.swarm.topology import topology_named

        if topology is not None:
            topology_named(topology)  # before anything is opened
        more = spec_options(teams=teams, stages=stage, roles=role, acceptance=accept) | {
            "rounds_max": rounds,
            "laps": laps,
            "reviewers": reviewers,
            "quorum": quorum,
            "batch_size": batch_size,
            "board": board,
            "queue": queue,
            "priority": priority or None,
            "after": tuple(after) if after else None,
            "after_any_end": after_any_end or None,
            "deadline_s": deadline_s,
            "steps_max": steps_max,
            "tokens_max": tokens_max,
        }
        given: dict[str, Any] = {name: value for name, value in more.items() if value is not None}

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
                detached=detach,
                **given,
            )

        if detach and watch:
            raise InvalidInput("--detach leaves the run alone, and --watch stays", hint="give one of the two")
        if detach:
            leave(session, submit)
        else:
            follow(session, submit, whole=watch)
