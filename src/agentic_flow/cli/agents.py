"""`agentic-flow agents list|show|validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Show and check agent definitions.")


@command(app, "list", examples=("agentic-flow agents list", "agentic-flow agents list --json"))
def list_agents(session: Session) -> None:
    """List the agents that runs can use: built-in ones, yours, and this folder's `.claude/agents`.

    A definition that is wrong is left out and named on stderr.
    """
    from agentic_flow.cli.output import print_table, talk
    from agentic_flow.runtime.build import definition_catalog

    catalog = definition_catalog(session.settings)
    found = catalog.list()
    session.show(
        [agent.model_dump(mode="json", exclude={"prompt"}) for agent in found],
        lambda: print_table(
            ("agent", "role", "model", "tools", "description"),
            [(a.name, a.role, a.model, _tools(a.tools), _head(a.description)) for a in found],
        ),
    )
    for problem in catalog.problems:
        talk(f"{problem.severity}: {problem}")


@command(
    app, "show", examples=("agentic-flow agents show reviewer", "agentic-flow agents show reviewer --json")
)
def show(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the agent.", metavar="NAME")],
) -> None:
    """Show a definition with its prompt."""
    from agentic_flow.runtime.build import definition_catalog

    agent = definition_catalog(session.settings).get(name)

    def human() -> None:
        for key, value in agent.model_dump(exclude={"prompt", "tools"}, exclude_none=True).items():
            print(f"{key}: {value}")
        print(f"tools: {_tools(agent.tools)}")
        print(f"\n{agent.prompt}")

    session.show(agent, human)


@command(
    app,
    "validate",
    examples=("agentic-flow agents validate", "agentic-flow agents validate .claude/agents my-agent.md"),
)
def validate(
    session: Session,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders of *.md; the folders in use by default.", metavar="[PATH]..."),
    ] = None,
) -> None:
    """Check definition files; each problem is one line `path:line: what; remedy`.

    Warnings do not fail; an error exits with 2.
    """
    from dataclasses import asdict

    from agentic_flow.cli.output import print_error
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.build import definition_places
    from agentic_flow.swarm.definitions import validate as check

    checked = paths or [path for path in definition_places(session.settings) if path.is_dir()]
    problems = check(checked)
    errors = sum(problem.severity == "error" for problem in problems)
    session.show(
        {"valid": errors == 0, "problems": [asdict(problem) for problem in problems]},
        lambda: print("\n".join(f"{p.severity}: {p}" for p in problems) or "no problems"),
    )
    if errors:
        error = InvalidInput(
            f"{errors} of the definitions' problems are errors", hint="correct the lines above"
        )
        print_error(error, as_json=False)
        raise typer.Exit(error.exit_code)


def _tools(names: tuple[str, ...] | None) -> str:
    return "every tool the run permits" if names is None else ", ".join(names) or "none"


def _head(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 70 else f"{line[:67]}..."
