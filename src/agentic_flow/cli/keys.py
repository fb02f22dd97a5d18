"""`agentic-flow keys create|generate|list|revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Make, list and revoke API keys.")

Tenant = Annotated[
    str | None, typer.Option("--tenant", help="Tenant of the key. [default: the owner's]", metavar="NAME")
]


@command(
    app,
    "create",
    examples=(
        "agentic-flow keys create ci --scope runs:* --scope memory:read",
        "agentic-flow keys create alice --tenant team-a --expires-days 90",
    ),
)
def create(
    session: Session,
    subject: Annotated[str, typer.Argument(help="Who will hold it.", metavar="SUBJECT")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="What it allows: noun:verb, noun:* or *; may be repeated. [default: *]",
            metavar="SCOPE",
        ),
    ] = None,
    tenant: Tenant = None,
    expires_days: Annotated[
        float | None,
        typer.Option("--expires-days", help="Days until it expires. [default: never]", metavar="N"),
    ] = None,
) -> None:
    """Make a key and print it. It is shown now and never again; only its hash is kept."""
    import time

    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.admin import administer

    if expires_days is not None and expires_days <= 0:
        raise InvalidInput(f"--expires-days is {expires_days!r}", hint="give a number above 0")
    expires_at_s = None if expires_days is None else time.time() + expires_days * 86_400
    info, text = administer(
        session.start(),
        lambda admin: admin.create_key(tenant, subject, scope or ["*"], expires_at_s=expires_at_s),
    )

    def human() -> None:
        talk(f"key {info.id} of {info.subject} in {info.tenant}: {' '.join(info.scopes)}")
        talk("it is shown only this once:")
        print(text)

    session.show({"key": text, "info": info}, human)


@command(
    app,
    "generate",
    examples=(
        "agentic-flow keys generate --output secrets/owner_key",
        "AGENTIC_FLOW_AUTH__OWNER_KEY_FILE=secrets/owner_key agentic-flow serve all",
    ),
)
def generate(
    session: Session,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New file for the key, 0600. [default: stdout]", metavar="FILE"),
    ] = None,
) -> None:
    """Make the text of a key that no platform knows yet, and need none for it.

    The platform takes it as the owner's from auth.owner_key_file, or as the services' own from
    auth.service_key_file, at its start and when it is first shown.
    """
    from agentic_flow.core.errors import Conflict
    from agentic_flow.core.identity import new_key
    from agentic_flow.core.secrets import write_private

    key = new_key()
    if output is None:
        session.show({"key": key.plaintext, "id": key.id}, lambda: print(key.plaintext))
        return
    if output.exists():
        raise Conflict(f"{str(output)!r} exists", hint="a key in use is not overwritten: move it away first")
    write_private(output, f"{key.plaintext}\n".encode())
    session.show({"path": str(output), "id": key.id}, lambda: print(output))


@command(app, "list", examples=("agentic-flow keys list", "agentic-flow keys list --tenant team-a --json"))
def list_keys(session: Session, tenant: Tenant = None) -> None:
    """List a tenant's keys, newest first, revoked ones included. The keys themselves are not kept."""
    from agentic_flow.cli.output import local_time, print_table
    from agentic_flow.runtime.admin import administer

    found = administer(session.start(), lambda admin: admin.list_keys(tenant))
    session.show(
        found,
        lambda: print_table(
            ("key", "subject", "scopes", "created", "expires", "revoked"),
            [
                (
                    key.id,
                    key.subject,
                    " ".join(key.scopes),
                    local_time(key.created_at_s),
                    local_time(key.expires_at_s),
                    local_time(key.revoked_at_s),
                )
                for key in found
            ],
        ),
    )


@command(app, "revoke", examples=("agentic-flow keys revoke 0123456789ab",))
def revoke(
    session: Session, key_id: Annotated[str, typer.Argument(help="Id of the key.", metavar="ID")]
) -> None:
    """Stop a key and the tokens made from it; every service refuses it within 5 seconds."""
    from agentic_flow.runtime.admin import administer

    info = administer(session.start(), lambda admin: admin.revoke_key(key_id))
    session.show(info, lambda: print(f"key {info.id} of {info.subject} revoked"))
