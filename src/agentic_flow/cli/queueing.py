"""Options that commands share which have runs made: who does them, when, and of what inputs."""

from __future__ import annotations

from typing import Annotated

import typer

Queue = Annotated[
    str | None,
    typer.Option("--queue", help="Let a worker of this shared queue do it, and follow that.", metavar="NAME"),
]
Priority = Annotated[
    int, typer.Option("--priority", min=-100, max=100, help="High ones go first.", metavar="N")
]
After = Annotated[
    list[str] | None,
    typer.Option(
        "--after",
        help="Begin when this run has completed, fail when it does not; may be repeated.",
        metavar="ID",
    ),
]
AfterAnyEnd = Annotated[
    bool, typer.Option("--after-any-end", help="With --after: it is enough that they have ended.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Leave it to a server or worker, print its id and end at once.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        help="An input of the workflow; lists, tables and numbers as JSON. May be repeated.",
        metavar="K=V",
    ),
]


def words_of(given: list[str] | None) -> dict[str, str]:
    """`Inputs` as they were written: name → text.

    Raises:
        InvalidInput: one has no value, or is given twice.
    """
    from agentic_flow.core.errors import InvalidInput

    words: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"the input {text!r} has no value", hint="write --input NAME=VALUE")
        if name in words:
            raise InvalidInput(f"the input {name!r} is given twice", hint="a list is written as JSON")
        words[name] = value
    return words
