"""`agentic-flow tenants create|list|revoke|erase`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.agentdb.erasure import BackupSurvey

app = new_app("Make, list, revoke and erase tenants.")

Name = Annotated[str, typer.Argument(help="Name of the tenant.", metavar="NAME")]


@command(app, "create", examples=("agentic-flow tenants create team-a",))
def create(session: Session, name: Name) -> None:
    """Make a tenant. Give its people keys with `agentic-flow keys create --tenant NAME`."""
    from agentic_flow.runtime.admin import administer

    info = administer(session.start(), lambda admin: admin.create_tenant(name))
    session.show(info, lambda: print(f"tenant {info.name} made"))


@command(app, "list", examples=("agentic-flow tenants list", "agentic-flow tenants list --json"))
def list_tenants(session: Session) -> None:
    """List all tenants, revoked ones included."""
    from agentic_flow.cli.output import local_time, print_table
    from agentic_flow.runtime.admin import administer

    found = administer(session.start(), lambda admin: admin.list_tenants())
    session.show(
        found,
        lambda: print_table(
            ("tenant", "created", "revoked"),
            [(t.name, local_time(t.created_at_s), local_time(t.revoked_at_s)) for t in found],
        ),
    )


@command(app, "revoke", examples=("agentic-flow tenants revoke team-a",))
def revoke(session: Session, name: Name) -> None:
    """Stop a tenant: all its keys and tokens. Its data stays until it is erased."""
    from agentic_flow.runtime.admin import administer

    info = administer(session.start(), lambda admin: admin.revoke_tenant(name))
    session.show(info, lambda: print(f"tenant {info.name} revoked"))


@command(
    app,
    "erase",
    examples=(
        "agentic-flow tenants erase team-a",
        "agentic-flow tenants erase team-a --yes --backups /mnt/backups --json",
    ),
)
def erase(
    session: Session,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    backups: Annotated[
        list[Path] | None,
        typer.Option(
            "--backups",
            help="Where to look for backups that hold it, beside agentdb.backups_dirs; may be repeated.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Revoke a tenant and remove its keys, their history, its memory, its runs and its model calls.

    There is no way back. Memory is all that was read in or learned for it; runs are goals, steps and answers;
    model calls are its usage, budgets, outcomes and cached answers. The records of its tool calls stay in the
    audit log, whose chain would break without them. Backups stay as they are: those that still hold the
    tenant are named, to be deleted by hand. Asks first; without a terminal it needs --yes.
    """
    import sys

    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.admin import administer

    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(f"erasing {name!r} needs a yes and there is no terminal", hint="add --yes")
        typer.confirm(f"Erase the keys and the memory of tenant {name!r}?", abort=True, err=True)
    done = administer(session.start(), lambda admin: admin.erase_tenant(name, backups=backups or ()))

    def human() -> None:
        print(f"tenant {name} erased: {', '.join(f'{n} {what}' for what, n in done.erased.items())}")
        for line in _backup_lines(done.backups):
            print(line)

    session.show({"name": name, "erased": done.erased, "backups": done.backups}, human)


def _backup_lines(survey: BackupSurvey) -> list[str]:
    """What is known of backups, for people."""
    lines = [f"still held in {place}" for place in survey.holding]
    if survey.verdict == "not_held":
        lines.append(f"nothing that is known here holds it: {', '.join(survey.looked_at)}")
    lines += [f"{place} is no longer there: deleted, or moved" for place in survey.missing]
    lines += [f"could not be looked at: {problem}" for problem in survey.unreadable]
    return [*lines, *survey.notes]
