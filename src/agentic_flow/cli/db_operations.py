"""`agentic-flow db migrate|migrate-schema`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.db_session import progress_bars
from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.agentdb.migrate import Moved
    from agentic_flow.core.settings import Settings


def register(app: typer.Typer) -> None:
    """Give the commands their place."""
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

    own = settings.agentdb
    with progress_bars() as watch:
        async with (
            open_embedder(own) as embedder,
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
