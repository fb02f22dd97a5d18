"""`agentic-flow doctor`."""

from __future__ import annotations

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(app, "doctor", examples=("agentic-flow doctor", "agentic-flow doctor --json"))
    def doctor(session: Session) -> None:  # pyright: ignore[reportUnusedFunction] - called through the app
        """Say what is configured, what is missing, and what to do about it.

        Exits with 1 when something is broken. It only looks: it starts nothing and repairs nothing.
        """
        from dataclasses import asdict

        from agentic_flow.cli.output import print_checks
        from agentic_flow.runtime.doctor import examine

        checks = examine(session.start())
        broken = sum(check.state == "broken" for check in checks)
        session.show(
            {"healthy": broken == 0, "checks": [asdict(check) for check in checks]},
            lambda: print_checks([(c.state, c.name, c.message, c.hint) for c in checks]),
        )
        if broken:
            raise typer.Exit(1)
