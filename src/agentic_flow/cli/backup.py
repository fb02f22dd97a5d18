"""`agentic-flow backup|restore`: everything that was kept, at one moment, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.deploy.archive import Contents
    from agentic_flow.deploy.backup import BackupReport, RestoreReport

File = Annotated[Path, typer.Argument(help="The backup.", metavar="FILE")]
Folder = Annotated[Path, typer.Option("--dir", help="Folder of the stack of containers.", metavar="DIR")]
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="The data folder, even where there is a stack of containers.")
]
_FOLDER = Path("stack")


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    command(
        app,
        "backup",
        examples=(
            "agentic-flow backup monday.tar.gz",
            "agentic-flow backup monday.tar.gz --with-secrets --dir /srv/flow",
            "agentic-flow backup --verify monday.tar.gz",
        ),
    )(backup)
    command(
        app,
        "restore",
        examples=(
            "agentic-flow restore monday.tar.gz --data-dir elsewhere",
            "agentic-flow restore monday.tar.gz --dir /srv/flow",
        ),
    )(restore)


def backup(
    session: Session,
    file: File,
    folder: Folder = _FOLDER,
    embedded: EmbeddedOption = False,
    with_secrets: Annotated[
        bool,
        typer.Option(
            "--with-secrets", help="Take keys, passwords and certificates along. Keep the file like them."
        ),
    ] = False,
    folder_only: Annotated[
        bool,
        typer.Option("--folder-only", help="Only the data folder, though settings keep state elsewhere too."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Make none: read this one to its end and check it.")
    ] = False,
) -> None:
    """Write runs, ledger, keys, memory and everything else that is kept into one file, as of one moment.

    It may run while everything is at work: writers are held for some milliseconds. As with `up`, it is the
    stack of containers where there is one, else the data folder. The file appears once it is whole.
    """
    from agentic_flow.cli.db_session import progress_bars, size
    from agentic_flow.cli.output import local_time, talk
    from agentic_flow.cli.stack import is_compose, opened_stack
    from agentic_flow.deploy.archive import read_archive
    from agentic_flow.deploy.backup import back_up_folder
    from agentic_flow.deploy.stack_backup import back_up_stack

    settings = session.start()
    if verify:
        contents = read_archive(file)
        session.show(
            {"file": str(file.absolute()), **_described(contents)},
            lambda: print(
                f"{file}: {_summary(contents)}, as of {local_time(contents.about.at_s)}: nothing is wrong"
            ),
        )
        return
    with progress_bars() as progress:
        report: BackupReport
        if is_compose(folder, embedded):
            stack = opened_stack(folder)
            report = back_up_stack(stack, file, with_secrets=with_secrets, progress=progress)
        else:
            elsewhere = _elsewhere(session, folder_only)
            report = back_up_folder(
                settings.data_dir, file, with_secrets=with_secrets, elsewhere=elsewhere, progress=progress
            )

    def human() -> None:
        manifest = report.contents.manifest
        print(f"{file}: {_summary(report.contents)}, {size(report.size_bytes)}")
        talk(
            f"the moment is {local_time(report.contents.about.at_s)}; "
            f"writers were held for {manifest.pause_s * 1000:.0f} ms"
        )
        if not with_secrets:
            talk("keys, passwords and certificates are not in it (--with-secrets)")
        for name in report.left_out:
            talk(f"left out: {name}")

    session.show(
        {
            "file": str(report.file),
            "size_bytes": report.size_bytes,
            "left_out": report.left_out,
            **_described(report.contents),
        },
        human,
    )


def _elsewhere(session: Session, folder_only: bool) -> list[str]:
    """The settings that keep state outside of the data folder.

    Raises InvalidInput unless the user said that he knows.
    """
    from agentic_flow.core.errors import InvalidInput

    settings = session.settings
    urls = {
        "agentdb.database_url": settings.agentdb.database_url,
        "gateway.database_url": settings.gateway.database_url,
        "swarm.database_url": settings.swarm.database_url,
    }
    found = [name for name, url in urls.items() if url is not None]
    if found and not folder_only:
        raise InvalidInput(
            f"{found[0]} keeps state in PostgreSQL, which a backup of the data folder does not hold",
            hint="say --folder-only, and back PostgreSQL up with its own tools",
        )
    return found


def restore(
    session: Session,
    file: File,
    folder: Folder = _FOLDER,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec",
            help="Description of the stack, YAML or TOML, such as with another name or other ports. "
            "[default: that of the backup]",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move the data folder that is there aside, instead of refusing.")
    ] = False,
) -> None:
    """Make a data folder, or a stack of containers, of a backup: all of it, or nothing.

    The whole file is checked before anything is written. A data folder goes to --data-dir, a stack to --dir
    and new volumes. Start what was restored with `agentic-flow up`.
    """
    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.deploy.archive import read_about
    from agentic_flow.deploy.backup import restore_folder

    settings = session.start()
    report: RestoreReport
    if read_about(file).kind == "compose":
        if force:
            raise InvalidInput(
                "--force is for data folders: a stack is restored into a new folder and new volumes",
                hint="name a new folder with --dir, and another stack with --spec",
            )
        report = _restore_stack(session, file, folder, spec)
        start = f"agentic-flow up --dir {report.folder}"
    else:
        report = restore_folder(file, settings.data_dir, force=force)
        start = f"agentic-flow up --embedded --data-dir {report.folder}"

    def human() -> None:
        print(f"{report.folder}: {_summary(report.contents)}")
        if report.kept is not None:
            talk(f"what was there is in {report.kept}")
        for note in report.notes:
            talk(note)
        talk(f"start it: {start}")

    session.show(
        {
            "folder": str(report.folder),
            "kept": str(report.kept) if report.kept is not None else None,
            "notes": report.notes,
            "start": start,
            **_described(report.contents),
        },
        human,
    )


def _restore_stack(session: Session, file: Path, folder: Path, spec: Path | None) -> RestoreReport:
    from agentic_flow.cli.stack import provider_keys
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.spec import read_spec
    from agentic_flow.deploy.stack_backup import restore_stack

    engine = Engine()
    engine.check()
    return restore_stack(
        file,
        folder,
        engine,
        spec=read_spec(spec) if spec is not None else None,
        provider_key=provider_keys(session),
    )


def _summary(contents: Contents) -> str:
    from agentic_flow.cli.db_session import size

    about = contents.about
    what = "data folder" if about.kind == "embedded" else "stack"
    files = len(contents.manifest.files)
    return f"{what} {about.name}, {files} files, {size(contents.size_bytes)} unpacked"


def _described(contents: Contents) -> dict[str, object]:
    about = contents.about.model_dump()
    return {
        **about,
        "pause_s": contents.manifest.pause_s,
        "unpacked_bytes": contents.size_bytes,
        "files": [entry.model_dump() for entry in contents.manifest.files],
    }
