"""`agentic-flow secrets set|list|delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Keep keys in the encrypted store of the data folder.")

Name = Annotated[
    str,
    typer.Argument(help="The setting it is for, such as gateway.anthropic.api_key.", metavar="NAME"),
]


@command(
    app,
    "set",
    examples=(
        "agentic-flow secrets set gateway.anthropic.api_key",
        "agentic-flow secrets set gateway.openai.api_key < key.txt",
    ),
)
def set_secret(session: Session, name: Name) -> None:
    """Store a secret for a setting, read from standard input or asked for on the terminal.

    It is used where neither a variable nor a file gives the setting; a server reads it when it starts. It is
    never taken from the command line, which other users of the machine can see.
    """
    import sys

    from agentic_flow.core.secrets import SecretStore
    from agentic_flow.core.settings import check_secret_name

    check_secret_name(name)
    if sys.stdin.isatty():
        value: str = typer.prompt("value", hide_input=True, confirmation_prompt=True, err=True)
    else:
        value = sys.stdin.read()
    SecretStore(session.settings.data_dir).set(name, value.strip())
    session.show({"name": name, "stored": True}, lambda: print(f"{name} stored"))


@command(app, "list", examples=("agentic-flow secrets list",))
def list_secrets(session: Session) -> None:
    """List the names of stored secrets, never their values."""
    from agentic_flow.core.secrets import SecretStore

    names = SecretStore(session.settings.data_dir).names()
    session.show([{"name": name} for name in names], lambda: print("\n".join(names)) if names else None)


@command(app, "delete", examples=("agentic-flow secrets delete gateway.anthropic.api_key",))
def delete_secret(session: Session, name: Name) -> None:
    """Remove a stored secret."""
    from agentic_flow.core.errors import NotFound
    from agentic_flow.core.secrets import SecretStore

    if not SecretStore(session.settings.data_dir).delete(name):
        raise NotFound(
            f"no secret {name!r} is stored", hint="`agentic-flow secrets list` shows those that are"
        )
    session.show({"name": name, "stored": False}, lambda: print(f"{name} deleted"))
