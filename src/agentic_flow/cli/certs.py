"""`agentic-flow certs init|renew|show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.deploy.certs import Change

app = new_app("Make and renew the certificates of a stack: an authority, and one for each service.")

Folder = Annotated[Path, typer.Option("--dir", help="Folder of the certificates.", metavar="DIR")]
Days = Annotated[
    int | None, typer.Option("--days", help="Days that a service's is valid. [default: 365]", metavar="N")
]
AuthorityDays = Annotated[
    int | None,
    typer.Option("--authority-days", help="Days that the authority is valid. [default: 3650]", metavar="N"),
]
Mounted = Annotated[
    bool,
    typer.Option(
        "--mounted", help="For containers: keys that all can read, in a folder that only you can enter."
    ),
]
_FOLDER = Path("certs")


@command(
    app,
    "init",
    examples=(
        "agentic-flow certs init",
        "agentic-flow certs init platform agentdb --host flow.example --host platform=192.0.2.7",
        "agentic-flow certs init --dir /etc/agentic-flow/certs --days 90",
    ),
)
def init(
    session: Session,
    services: Annotated[
        list[str] | None,
        typer.Argument(
            help="Whose. [default: platform agentdb swarm worker]", metavar="[SERVICE]...", show_default=False
        ),
    ] = None,
    folder: Folder = _FOLDER,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="A name or address beside the service's own and localhost; SERVICE=HOST for one service. "
            "May be repeated.",
            metavar="HOST",
        ),
    ] = None,
    days: Days = None,
    authority_days: AuthorityDays = None,
    mounted: Mounted = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make the services' anew, whatever is there.")
    ] = False,
) -> None:
    """Make an authority and a certificate for each service, in one folder. What is there is kept.

    Writes ca.crt, ca.key, and NAME.crt with NAME.key. Keep ca.key to yourself: it is needed only to make and
    renew certificates, and no service reads it.
    """
    from agentic_flow.deploy.certs import (
        AUTHORITY_DAYS,
        CERTIFICATE_DAYS,
        SERVICES,
        CertificateFolder,
        read_hosts,
    )

    session.start()
    changes = CertificateFolder(folder, mounted=mounted).init(
        services or SERVICES,
        hosts=read_hosts(host or ()),
        days=CERTIFICATE_DAYS if days is None else days,
        authority_days=AUTHORITY_DAYS if authority_days is None else authority_days,
        force=force,
    )
    _show(session, folder, changes)


@command(
    app,
    "renew",
    examples=("agentic-flow certs renew", "agentic-flow certs renew platform --within 400"),
)
def renew(
    session: Session,
    services: Annotated[
        list[str] | None,
        typer.Argument(help="Whose. [default: all]", metavar="[SERVICE]...", show_default=False),
    ] = None,
    folder: Folder = _FOLDER,
    within: Annotated[
        int | None,
        typer.Option("--within", help="Only with fewer days left than this. [default: 30]", metavar="DAYS"),
    ] = None,
    days: Days = None,
    authority_days: AuthorityDays = None,
) -> None:
    """Make anew what expires soon or cannot be used. Servers take it up without a restart (tls.reload_s).

    Keys are made anew too, except the authority's: what it signed before stays good. In the folder of a stack
    that runs (stack/certs), the proxy and PostgreSQL are told to take theirs up.
    """
    from agentic_flow.deploy.certs import (
        AUTHORITY_DAYS,
        CERTIFICATE_DAYS,
        RENEW_WITHIN_DAYS,
        CertificateFolder,
    )

    session.start()
    changes = CertificateFolder(folder).renew(
        services or (),
        within_days=RENEW_WITHIN_DAYS if within is None else within,
        days=CERTIFICATE_DAYS if days is None else days,
        authority_days=AUTHORITY_DAYS if authority_days is None else authority_days,
    )
    _show(session, folder, changes)
    if any(change.outcome != "kept" for change in changes):
        _tell_stack(folder)


def _tell_stack(folder: Path) -> None:
    """Let the stack whose certificates these are take them up, if there is one that runs."""
    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import AgenticFlowError
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.stack import STATE_FILE, Stack

    place = folder.absolute().parent
    if not (place / STATE_FILE).exists() or folder.name != "certs":
        return
    engine = Engine()
    try:
        engine.check()
    except AgenticFlowError as error:
        talk(f"no container was told: {error.message}")
        return
    for name in Stack.remembered(place, engine).take_up_certificates():
        talk(f"{name} has taken up its own")


@command(app, "show", examples=("agentic-flow certs show", "agentic-flow certs show --dir certs --json"))
def show(session: Session, folder: Folder = _FOLDER) -> None:
    """List the certificates: for which names, and for how many days. Exits with 1 if one cannot be used."""
    from dataclasses import asdict

    from agentic_flow.cli.output import print_table
    from agentic_flow.deploy.certs import CertificateFolder, said

    session.start()
    states = CertificateFolder(folder).states()
    session.show(
        [asdict(state) for state in states],
        lambda: print_table(
            ("certificate", "days left", "state", "subject", "names"),
            [(s.name, s.days_left, said(s.fault) if s.fault else "good", s.subject, s.names) for s in states],
        ),
    )
    if any(state.fault is not None for state in states):
        raise typer.Exit(1)


def _show(session: Session, folder: Path, changes: list[Change]) -> None:
    from dataclasses import asdict

    def human() -> None:
        for change in changes:
            print(f"{folder / change.name}.crt {change.outcome}: {change.why}")

    session.show({"folder": str(folder), "changes": [asdict(change) for change in changes]}, human)
