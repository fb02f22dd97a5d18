"""`agentic-flow audit verify`."""

from __future__ import annotations

from agentic_flow.cli.session import Session, command, new_app

app = new_app("Check the record of tool calls.")


@command(app, "verify", examples=("agentic-flow audit verify", "agentic-flow audit verify --json"))
def verify(session: Session) -> None:
    """Check that no record of a tool call was changed, removed or moved.

    Each record's hash covers the record before it. The newest hash is printed: kept elsewhere, it also shows
    whether somebody replaced the whole log. Exits with 9 when the chain is broken.
    """
    import asyncio

    from agentic_flow.core.errors import DataCorrupted
    from agentic_flow.runtime.build import verify_audit

    checked = asyncio.run(verify_audit(session.start()))
    if checked.first_broken is not None:
        raise DataCorrupted(
            f"the audit log in {str(session.settings.data_dir)!r} is broken at record {checked.first_broken}",
            hint="records from there on prove nothing; compare with a backup",
            details={"first_broken": checked.first_broken, "records": checked.records},
        )
    session.show(
        {"whole": True, "records": checked.records, "head": checked.head},
        lambda: print(f"{checked.records} records, chain whole, head {checked.head}"),
    )
