"""`agentic-flow deploy render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app("From one typed description to the files that run a stack.")


@command(
    app,
    "render",
    examples=(
        "agentic-flow deploy render --target compose --output stack",
        "agentic-flow deploy render --target compose --spec stack.yaml --output stack --check",
        "agentic-flow deploy render --target env --output stack/env",
    ),
)
def render(
    session: Session,
    target: Annotated[str, typer.Option("--target", help="compose or env.", metavar="NAME")] = "compose",
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec", help="The description, YAML or TOML. [default: the main stack]", metavar="FILE"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the files.", metavar="DIR")
    ] = Path(),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say which files differ, and exit with 1.")
    ] = False,
) -> None:
    """Write the files of a target. The same description gives the same bytes."""
    from dataclasses import asdict

    from agentic_flow.deploy.render import differences, write_files
    from agentic_flow.deploy.render import render as rendered
    from agentic_flow.deploy.spec import StackSpec, read_spec

    files = rendered(target, read_spec(spec) if spec is not None else StackSpec())
    if not check:
        written = write_files(output, files)
        session.show({"written": written, "files": list(files)}, lambda: _tell(written, output))
        return
    found = differences(output, files)

    def human() -> None:
        for one in found:
            print(f"{one.state}: {output / one.path}")

    session.show([asdict(one) for one in found], human)
    if found:
        raise typer.Exit(1)


def _tell(written: list[str], output: Path) -> None:
    for path in written:
        print(output / path)
    if not written:
        from agentic_flow.cli.output import talk

        talk("nothing to write: all files are as they should be")
