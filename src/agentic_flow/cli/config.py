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


@command(
    app,
    "init",
    examples=(
        "agentic-flow config init",
        "agentic-flow config init --user",
        "ANTHROPIC_API_KEY=… agentic-flow config init --template claude",
        "agentic-flow config init --template local --set MAX_AGENTS=8",
    ),
)
def init(
    session: Session,
    user: Annotated[
        bool, typer.Option("--user", help="Write the user's own file instead of ./agentic-flow.toml.")
    ] = False,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Write ./.env instead, from this template: claude, openrouter, multi-model or local.",
            metavar="NAME",
        ),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A variable of the template and its value; may be repeated. What the template needs and is "
            "not given is taken from the environment.",
            metavar="NAME=VALUE",
        ),
    ] = None,
) -> None:
    """Write a configuration file with every setting, its default and its meaning, commented out.

    With --template, a .env file that only its owner can read, filled in and checked. An existing file is
    never overwritten.
    """
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.core.settings import CONFIG_FILE, user_config_path, write_template

    if template is not None:
        if user:
            raise InvalidInput("--user and --template write two kinds of files", hint="give one of them")
        path = _write_environment(template, value or [])
    elif value:
        raise InvalidInput(f"--set {value[0]!r} needs a template", hint="add --template NAME")
    else:
        path = user_config_path() if user else Path.cwd() / CONFIG_FILE
        write_template(path)
    session.show({"path": str(path)}, lambda: print(path))


def _write_environment(name: str, given: list[str]) -> Path:
    import os

    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.deploy.environments import template_named, write_environment

    template = template_named(name)
    values = {variable: os.environ.get(variable, "") for variable in template.required}
    for pair in given:
        variable, equals, text = pair.partition("=")
        if not equals:
            raise InvalidInput(f"--set {pair!r} has no value", hint="write NAME=VALUE")
        values[variable] = text
    path = Path.cwd() / ".env"
    write_environment(path, template, values)
    return path
