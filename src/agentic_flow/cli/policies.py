"""`agentic-flow policies show|set|history|restore`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.gateway.policies import GatewayPolicies
    from agentic_flow.runtime.operations import Operations

app = new_app("Decide about model calls: routes, budgets, limits, the cache, guardrails.")

Reason = Annotated[
    str, typer.Option("--reason", help="Why, in a line that is kept with the version.", metavar="TEXT")
]
Version = Annotated[int, typer.Argument(help="Number of a version.", metavar="VERSION")]


@command(
    app,
    "show",
    examples=(
        "agentic-flow policies show",
        "agentic-flow policies show --format json > policies.json",
        "agentic-flow policies show --version 3",
    ),
)
def show(
    session: Session,
    format: Annotated[
        Literal["yaml", "json"], typer.Option("--format", help="How the document is written.")
    ] = "yaml",
    version: Annotated[
        int | None,
        typer.Option("--version", help="An earlier version. [default: the one in force]", metavar="N"),
    ] = None,
) -> None:
    """Show the policies in force as a document that `policies set` takes back.

    `--json` shows the version, who stored it and why beside the document.
    """
    from agentic_flow.cli.output import local_time, print_json, talk
    from agentic_flow.gateway.policy_files import as_document, as_yaml
    from agentic_flow.runtime.operations import operations

    with operations(session.start()) as place:
        stored = place.show(version)
    document = as_document(stored.policies)

    def human() -> None:
        if stored.version:
            talk(f"version {stored.version}, {local_time(stored.at_s)}, by {stored.by}: {stored.reason}")
        else:
            talk("nothing was ever stored: models go by their names, nothing is limited")
        if format == "json":
            print_json(document)
        else:
            print(as_yaml(stored.policies), end="")

    session.show(
        {
            "version": stored.version,
            "at_s": stored.at_s,
            "by": stored.by,
            "reason": stored.reason,
            "policies": document,
        },
        human,
    )


@command(
    app,
    "set",
    examples=(
        'agentic-flow policies set policies.yaml --reason "cheap models first"',
        'agentic-flow policies set policies.toml --expect 3 --reason "a budget for team-a"',
    ),
)
def set_policies(
    session: Session,
    file: Annotated[Path, typer.Argument(help="YAML, TOML or JSON, by its suffix.", metavar="FILE")],
    reason: Reason,
    expect: Annotated[
        int | None,
        typer.Option(
            "--expect", help="Refuse unless this version is the one in force.", metavar="VERSION", min=0
        ),
    ] = None,
) -> None:
    """Put the file's policies in the place of those in force, and show what changed.

    They are replaced as a whole. Running gateways follow within about a second.
    """
    from agentic_flow.gateway.policy_files import read_policy_file
    from agentic_flow.runtime.operations import operations

    policies = read_policy_file(file)
    with operations(session.start()) as place:
        _replace(session, place, policies, reason, expect)


@command(
    app,
    "history",
    examples=("agentic-flow policies history", "agentic-flow policies history --limit 5 --json"),
)
def history(
    session: Session,
    limit: Annotated[
        int, typer.Option("--limit", help="Most versions shown.", metavar="N", min=1, max=10_000)
    ] = 50,
) -> None:
    """List the versions that were ever stored, newest first: when, by whom, why."""
    from agentic_flow.cli.output import local_time, print_table
    from agentic_flow.runtime.operations import operations

    with operations(session.start()) as place:
        found = place.history(limit)
    session.show(
        [change._asdict() for change in found],
        lambda: print_table(
            ("version", "stored", "by", "reason"),
            [(change.version, local_time(change.at_s), change.by, change.reason) for change in found],
        ),
    )


@command(
    app, "restore", examples=('agentic-flow policies restore 3 --reason "version 4 sent all to one model"',)
)
def restore(session: Session, version: Version, reason: Reason) -> None:
    """Store an earlier version again, as the newest one, and show what changed."""
    from agentic_flow.runtime.operations import operations

    with operations(session.start()) as place:
        _replace(session, place, place.show(version).policies, reason, None)


def _replace(
    session: Session, place: Operations, policies: GatewayPolicies, reason: str, expect: int | None
) -> None:
    from agentic_flow.cli.output import print_table, talk

    done = place.replace(policies, expected_version=expect, reason=reason)
    if done.unreadable is not None:
        talk(f"{done.unreadable}; all of it is replaced")

    def human() -> None:
        print(f"version {done.version} is in force; it was {done.before}")
        if not done.changes:
            print("nothing changed")
            return
        print_table(
            ("", "field", "before", "after"),
            [(change.kind, change.field, change.before, change.after) for change in done.changes],
        )

    data: dict[str, Any] = {"version": done.version, "before": done.before}
    session.show(data | {"changes": [change._asdict() for change in done.changes]}, human)
