"""`agentic-flow health`."""

from __future__ import annotations

from typing import Annotated

import typer

from agentic_flow.cli.health_probe import DEFAULT_SERVICE, NAMES, TIMEOUT_S
from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "health",
        examples=(
            "agentic-flow health",
            "agentic-flow health swarm",
            "agentic-flow health https://flow.example:3000 --timeout-s 10 --json",
        ),
    )
    def health(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        target: Annotated[
            str,
            typer.Argument(
                help="platform, agentdb, swarm or worker: asked here, by the port and the TLS files of the "
                "settings. Or a base URL.",
                metavar="SERVICE|URL",
            ),
        ] = DEFAULT_SERVICE,
        timeout_s: Annotated[
            float,
            typer.Option("--timeout-s", min=0.1, help="Longest wait for the answer.", metavar="SECONDS"),
        ] = TIMEOUT_S,
    ) -> None:
        """Ask a service whether it is ready; exit with 0 when it is, with 1 and one line of why when not.

        Made for the health checks of containers: without options it costs a few hundredths of a second.
        """
        from agentic_flow.cli.health_probe import ask
        from agentic_flow.core.settings import Settings

        settings: Settings = session.settings
        values: dict[str, str] = {}
        for name in NAMES:
            section, _, key = name.partition(".")
            value: object = getattr(getattr(settings, section), key)
            if value is not None:
                values[name] = str(value)
        healthy, message = ask(target, values, timeout_s=timeout_s)
        session.show({"target": target, "healthy": healthy, "message": message}, lambda: print(message))
        if not healthy:
            raise typer.Exit(1)
