"""`agentic-flow worker`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "worker",
        examples=(
            "agentic-flow worker",
            "agentic-flow worker --queue nightly --queue default --places 4 --port 9001",
            "AGENTIC_FLOW_SWARM__DATABASE_URL=postgresql://db/runs agentic-flow worker --queue gpu --json",
        ),
    )
    def worker(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        queue: Annotated[
            list[str] | None,
            typer.Option(
                "--queue",
                help="Shared queue to take runs from; may be repeated. [default: setting swarm.queues]",
                metavar="NAME",
            ),
        ] = None,
        places: Annotated[
            int | None,
            typer.Option(
                "--places",
                min=1,
                help="Runs at a time. [default: setting swarm.runs_parallel_max]",
                metavar="N",
            ),
        ] = None,
        drain_s: Annotated[
            float | None,
            typer.Option(
                "--drain-s",
                min=0,
                help="Longest time to finish runs after SIGTERM. [default: setting swarm.drain_s]",
                metavar="SECONDS",
            ),
        ] = None,
        port: Annotated[
            int | None,
            typer.Option(
                "--port",
                min=0,
                max=65535,
                help="Answer /health/live, /health/ready and /metrics there; 0 takes any free one. "
                "[default: setting serve.worker_port, unset: no port]",
            ),
        ] = None,
    ) -> None:
        """Take runs from shared queues and do them, until SIGTERM or Ctrl-C.

        Any number of workers share a run database: on one machine the data folder, on many
        swarm.database_url with agentdb.database_url or peers.agentdb_url. Each needs the input folders of its
        runs under the same paths. At SIGTERM it takes no more, finishes for --drain-s and hands the rest back
        to its queue; a second one ends it at once. With --json its logs are JSON, one object a line, on
        stderr.
        """
        import asyncio

        from agentic_flow.cli.output import print_json, talk
        from agentic_flow.core.errors import InvalidSettings
        from agentic_flow.core.serve import run
        from agentic_flow.runtime.worker import work

        session.flags["swarm.queues"] = tuple(queue) if queue else None
        session.flags["swarm.runs_parallel_max"] = places
        session.flags["swarm.drain_s"] = drain_s
        session.flags["serve.worker_port"] = port
        if session.as_json:
            session.flags["telemetry.log_format"] = "json"
        own = session.start("worker").swarm
        if not own.runs_parallel_max or not own.queues:
            raise InvalidSettings(
                f"a worker with {own.runs_parallel_max!r} places for {list(own.queues)!r} does nothing",
                hint="give it --places and --queue",
            )
        about: dict[str, Any] = {"queues": list(own.queues), "places": own.runs_parallel_max}

        def ready() -> None:
            if session.as_json:
                print_json({"working": about})
            talk(f"takes runs from {', '.join(own.queues)}, {own.runs_parallel_max} at a time")

        def listening(url: str) -> None:
            about["listening"] = url
            talk(f"worker listens on {url}")

        def drain() -> None:
            talk(f"takes no more runs; finishes for up to {own.drain_s:g} s")

        async def main() -> int:
            return await work(
                session.settings,
                on_ready=ready,
                on_drain=drain,
                stop=asyncio.Event(),
                on_listening=listening,
            )

        left = run(main())
        talk(f"left, {left} unfinished runs handed back" if left else "left, all done")
