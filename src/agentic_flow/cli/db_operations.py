"""`agentic-flow db backup|verify|restore|prune|migrate|migrate-schema`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentic_flow.cli.db_session import progress_bar, progress_bars, read_time, size
from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.agentdb.migrate import Moved
    from agentic_flow.agentdb.pruning import PruneReport
    from agentic_flow.agentdb.restoring import RestoreReport
    from agentic_flow.agentdb.verifying import VerifyReport
    from agentic_flow.core.settings import Settings


def register(app: typer.Typer) -> None:
    """Give the commands their place."""
    command(
        app,
        "backup",
        examples=("agentic-flow db backup backups/monday", "agentic-flow db backup backups/monday --json"),
    )(backup)
    command(
        app,
        "verify",
        examples=("agentic-flow db verify backups/monday", "agentic-flow db verify history"),
    )(verify)
    command(
        app,
        "restore",
        examples=(
            "agentic-flow db restore backups/monday --to restored",
            "agentic-flow db restore backups/monday --to restored --history history --at 2026-11-24T09:30Z",
            "agentic-flow db restore backups/monday --to restored --history history --at 4711",
        ),
    )(restore)
    command(
        app,
        "prune",
        examples=("agentic-flow db prune --dry-run", "agentic-flow db prune --backups /mnt/backups"),
    )(prune)
    command(
        app,
        "migrate",
        examples=(
            "agentic-flow db migrate --to postgresql://flow@db.example/flow",
            "agentic-flow db migrate --from postgresql://flow@db.example/flow --to ./copy --tenant team-a",
        ),
    )(migrate)
    command(
        app,
        "migrate-schema",
        examples=(
            "agentic-flow db migrate-schema",
            "agentic-flow db migrate-schema --url postgresql://owner@db.example/flow",
        ),
    )(migrate_schema)


def backup(
    session: Session,
    destination: Annotated[Path, typer.Argument(help="New folder for the backup.", metavar="DEST")],
) -> None:
    """Copy the database as it is at one moment, while others write.

    The folder appears when it is complete. With `agentdb.history_dir` the history is sealed up to the backup.
    """
    from agentic_flow.agentdb.backup import backup as make
    from agentic_flow.cli.output import talk

    settings = session.start()
    data_dir = _own_folder(settings)
    with progress_bar("backup") as progress:
        report = make(data_dir, destination, history_dir=settings.agentdb.history_dir, progress=progress)
    manifest = report.manifest
    session.show(
        {
            "folder": str(report.folder),
            "manifest": manifest.model_dump(exclude={"block_sha256"}),
            "sealed_sequence": report.sealed_sequence,
            "history_error": report.history_error,
        },
        lambda: print(
            f"{report.folder}: {manifest.items} items of {manifest.namespaces} namespaces, "
            f"{size(manifest.size_bytes)}, sequence {manifest.sequence}"
        ),
    )
    if report.history_error is not None:
        talk(f"the history could not be sealed: {report.history_error}")


def verify(
    session: Session,
    path: Annotated[Path, typer.Argument(help="A backup, a history or a data folder.", metavar="PATH")],
) -> None:
    """Check every byte of a backup or a history, or a database in use. Damage is named, and ends with 9."""
    from agentic_flow.agentdb.verifying import verify as check
    from agentic_flow.cli.output import talk

    session.start()
    with progress_bar("verify") as progress:
        report = check(path, progress=progress)

    def human() -> None:
        found = [
            f"{name} {value}"
            for name, value in (
                ("items", report.items),
                ("segments", report.segments),
                ("calls", report.records),
            )
            if value is not None
        ]
        span = (
            "" if report.sequences is None else f", sequences {report.sequences[0]} to {report.sequences[1]}"
        )
        verdict = "nothing is wrong" if report.ok else f"{len(report.problems)} problems"
        print(f"{report.kind} {report.path}: {', '.join(found) or 'unreadable'}{span}: {verdict}")

    session.show({**_plain(report), "ok": report.ok}, human)
    for note in report.notes:
        talk(f"note: {note}")
    if not report.ok:
        for problem in report.problems:
            place = "" if problem.offset is None else f" at byte {problem.offset}"
            talk(f"{problem.file}{place}: {problem.message}")
        raise typer.Exit(9)


def restore(
    session: Session,
    backup_dir: Annotated[Path, typer.Argument(help="Folder of the backup.", metavar="BACKUP")],
    target: Annotated[
        Path, typer.Option("--to", help="New data folder; use it with --data-dir.", metavar="DATA_DIR")
    ],
    history: Annotated[
        Path | None,
        typer.Option(
            "--history", help="For moments after the backup. [default: agentdb.history_dir]", metavar="DIR"
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            help="A sequence number, or a time. [default: the newest there is]",
            metavar="SEQUENCE|TIME",
        ),
    ] = None,
    live: Annotated[
        Path | None,
        typer.Option(
            "--live", help="Data folder of the original, for what is not sealed yet.", metavar="DATA_DIR"
        ),
    ] = None,
) -> None:
    """Make a database with exactly the rows of one moment, in a new data folder.

    Without a history it is the moment of the backup. Tenants that were erased since then stay erased.
    """
    from agentic_flow.agentdb.restoring import restore as make
    from agentic_flow.cli.output import talk

    settings = session.start()
    with progress_bar("restore") as progress:
        report = make(
            backup_dir,
            target,
            history=history or settings.agentdb.history_dir,
            at=_moment(at),
            live=live,
            progress=progress,
        )
    moment = datetime.fromtimestamp(report.at_s, UTC).isoformat(timespec="seconds")
    session.show(
        _plain(report),
        lambda: print(
            f"{report.data_dir}: {report.items} items of {report.namespaces} namespaces, as of sequence "
            f"{report.sequence} ({moment})"
        ),
    )
    if report.tenants_withheld:
        talk(f"{report.tenants_withheld} tenants were erased after the backup and are left out")
    for note in report.notes:
        talk(f"note: {note}")


def prune(
    session: Session,
    backups: Annotated[
        list[Path] | None,
        typer.Option(
            "--backups",
            help="Where to look for backups, beside agentdb.backups_dirs; may be repeated.",
            metavar="DIR",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove the part of the history that no kept backup needs: what lies before the oldest of them.

    The oldest backup is read in full first. A backup that is neither in these folders nor where it was made
    is taken for deleted: moments behind it are lost if it lies before the others.
    """
    from agentic_flow.agentdb.pruning import prune as remove
    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import InvalidInput

    settings = session.start()
    data_dir, own = _own_folder(settings), settings.agentdb
    if own.history_dir is None:
        raise InvalidInput("agentdb.history_dir is not set", hint="set it to the folder of the history")
    report = remove(data_dir, own.history_dir, (*own.backups_dirs, *(backups or ())), dry_run=dry_run)

    def human() -> None:
        for path in report.removed:
            print(path)
        print(
            f"{len(report.removed)} segments, {size(report.removed_bytes)}, "
            f"{'would be removed' if dry_run else 'removed'}; {report.kept} kept, for {report.oldest_backup} "
            f"(sequence {report.oldest_sequence}) and what came after it"
        )

    session.show({**_plain(report), "dry_run": dry_run}, human)
    for place in report.missing:
        talk(f"note: the backup {place} is no longer there, and was taken for deleted")


def _moment(text: str | None) -> int | float | None:
    """A sequence number, or a time as Unix seconds."""
    if text is None:
        return None
    return int(text) if text.isdigit() else read_time(text, "--at")


def _own_folder(settings: Settings) -> Path:
    """The data folder, when the database is in it.

    Raises:
        InvalidInput: it is elsewhere.
    """
    from agentic_flow.core.errors import InvalidInput

    if settings.peers.agentdb_url is not None:
        raise InvalidInput(
            "the database is a service", hint="run the command where its data folder is, with --data-dir"
        )
    if settings.agentdb.database_url is not None:
        raise InvalidInput(
            "the database is PostgreSQL",
            hint="use its own tools: pg_basebackup, or pg_dump of the schema agentic_flow",
        )
    return settings.data_dir


def _plain(report: VerifyReport | RestoreReport | PruneReport) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def migrate(
    session: Session,
    target: Annotated[
        str, typer.Option("--to", help="`postgresql://…`, or a data folder.", metavar="URL_OR_DIR")
    ],
    source: Annotated[
        str | None,
        typer.Option("--from", help="The same. [default: the configured database]", metavar="URL_OR_DIR"),
    ] = None,
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", help="Only this one; may be repeated.", metavar="NAME")
    ] = None,
) -> None:
    """Copy every tenant's namespaces to another database, and compare both sides by hash.

    From a folder to PostgreSQL and back. Rows keep their versions, times and vectors. Nothing may write
    meanwhile. Run it again after an interruption: what is equal stays. A difference is an error and named.
    """
    import asyncio
    from dataclasses import asdict

    from agentic_flow.agentdb.migrate import check_places, shown_place
    from agentic_flow.cli.output import print_table

    settings = session.start()
    origin = source or _configured(settings)
    check_places(origin, target)
    moved = asyncio.run(_migrate(settings, origin, target, tenant or ()))
    places = {"source": shown_place(origin), "target": shown_place(target)}

    def human() -> None:
        print_table(
            ("tenant", "namespace", "items", "documents", "written", "digest of source", "of target"),
            [
                (
                    m.tenant,
                    m.namespace,
                    m.items,
                    m.documents,
                    m.written,
                    m.source_digest[:16],
                    m.target_digest[:16],
                )
                for m in moved
            ],
        )
        print(f"{len(moved)} namespaces are the same in {places['source']} and {places['target']}")

    session.show({**places, "namespaces": [asdict(one) for one in moved]}, human)


async def _migrate(
    settings: Settings, origin: str, target: str, tenants: list[str] | tuple[str, ...]
) -> list[Moved]:
    from agentic_flow.agentdb import migrate
    from agentic_flow.agentdb.embedders.registry import open_embedder
    from agentic_flow.core import plugins

    own = settings.agentdb
    with progress_bars() as watch:
        async with (
            open_embedder(own, plugins.load_all("agentic_flow.embedders")) as embedder,
            migrate.open_place(origin, own, embedder=embedder) as here,
            migrate.open_place(target, own, embedder=embedder, create=True) as there,
        ):
            return await migrate.migrate(here, there, tenants=tenants, watch=watch)


def _configured(settings: Settings) -> str:
    url = settings.agentdb.database_url
    return str(settings.data_dir) if url is None else url.get_secret_value()


def migrate_schema(
    session: Session,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Log in as the owner. [default: agentdb.database_url]", metavar="URL"),
    ] = None,
) -> None:
    """Bring a PostgreSQL database to this version's schema. Nothing does so by itself.

    Every process that uses the database needs the same version afterwards: stop them first.
    """
    import asyncio

    from agentic_flow.agentdb.migrate import is_postgres, shown_place
    from agentic_flow.agentdb.postgres.schema import migrate as apply
    from agentic_flow.core.errors import InvalidInput

    settings = session.start()
    place = url or _configured(settings)
    if not is_postgres(place):
        raise InvalidInput(
            f"{shown_place(place)!r} is no PostgreSQL database",
            hint="set agentdb.database_url or give --url; one in a folder is migrated when it is opened",
        )
    applied = asyncio.run(apply(place))
    session.show(
        {"database": shown_place(place), "applied": applied},
        lambda: print(f"{shown_place(place)}: {', '.join(applied) if applied else 'was current'}"),
    )
