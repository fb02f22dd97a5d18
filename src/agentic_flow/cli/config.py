"""`agentic-flow config show|init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Show the settings in force, or write a configuration file.")


@command(
    app,
    "show",
    examples=(
        "agentic-flow config show",
        "agentic-flow config show gateway --origin",
        "agentic-flow config show serve.platform_port --json",
    ),
)
def show(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(help="One setting, or a section such as `gateway`.", metavar="NAME")
    ] = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Also show where each value comes from and its variable.")
    ] = False,
) -> None:
    """Show every setting and its value. Secrets are masked."""
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.core.settings import describe

    values = [
        value
        for value in describe(session.loaded)
        if name is None or value.name == name or value.name.startswith(f"{name}.")
    ]
    if not values:
        raise InvalidInput(f"{name!r} is not a setting", hint="`agentic-flow config show` lists them all")

    def human() -> None:
        from agentic_flow.cli.output import print_table

        if origin:
            rows = [(v.name, v.value, v.origin, v.variable) for v in values]
            print_table(("setting", "value", "from", "variable"), rows)
        else:
            print_table(("setting", "value"), [(v.name, v.value) for v in values])

    if origin:
        session.show(
            {v.name: {"value": v.value, "origin": v.origin, "variable": v.variable} for v in values}, human
        )
    else:
        session.show({v.name: v.value for v in values}, human)


@command(app, "init", examples=("agentic-flow config init", "agentic-flow config init --user"))
def init(
    session: Session,
    user: Annotated[
        bool, typer.Option("--user", help="Write the user's own file instead of ./agentic-flow.toml.")
    ] = False,
) -> None:
    """Write a configuration file with every setting, its default and its meaning, commented out.

    An existing file is never overwritten.
    """
    from agentic_flow.core.settings import CONFIG_FILE, user_config_path, write_template

    path = user_config_path() if user else Path.cwd() / CONFIG_FILE
    write_template(path)
    session.show({"path": str(path)}, lambda: print(path))
