"""`agentic-flow doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "doctor",
        examples=(
            "agentic-flow doctor",
            "agentic-flow doctor --json",
            "agentic-flow doctor --stack --dir /srv/flow",
        ),
    )
    def doctor(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        stack: Annotated[
            bool,
            typer.Option("--stack", help="Look at a stack of containers instead, from outside and inside."),
        ] = False,
        folder: Annotated[
            Path, typer.Option("--dir", help="Folder of the stack, with --stack.", metavar="DIR")
        ] = Path("stack"),
        outside: Annotated[
            list[str] | None,
            typer.Option(
                "--outside",
                help="What only parts with a way out may reach, with --stack; may be repeated. "
                "[default: the model providers]",
                metavar="HOST:PORT",
            ),
        ] = None,
    ) -> None:
        """Say what is configured, what is missing, and what to do about it.

        With --stack: containers, endpoints, volumes, networks and who can reach whom, certificates, secrets,
        disk, memory and processors of what `agentic-flow up` started. Exits with 1 when something is broken.
        It only looks: it starts nothing and repairs nothing.
        """
        if stack:
            _examine_stack(session, folder, outside or ())
            return
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


def _address(text: str) -> tuple[str, int]:
    from agentic_flow.core.errors import InvalidInput

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidInput(f"--outside {text!r} is no address", hint="write it as HOST:PORT")
    return host.strip("[]"), int(port)


def _examine_stack(session: Session, folder: Path, outside: Sequence[str]) -> None:
    from dataclasses import asdict

    from agentic_flow.cli.output import print_checks
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.stack import Stack
    from agentic_flow.deploy.stack_checks import OUTSIDE, examine

    session.start()
    addresses = [_address(text) for text in outside] or OUTSIDE
    checks = examine(Stack.remembered(folder, Engine()), outside=addresses)
    broken = sum(check.state == "broken" for check in checks)
    session.show(
        {"healthy": broken == 0, "checks": [asdict(check) for check in checks]},
        lambda: print_checks([(c.state, c.name, c.message, c.hint) for c in checks]),
    )
    if broken:
        raise typer.Exit(1)
