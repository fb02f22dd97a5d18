"""`agentic-flow db …`: namespaces and items of the vector database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentic_flow.cli import db_files, db_operations
from agentic_flow.cli.db_session import (
    NamespaceArgument,
    TenantOption,
    WhereOption,
    head,
    on_store,
    read_object,
    read_time,
    read_vector,
    read_where,
    size,
)
from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.core.vectors import Item, SearchResult

app = new_app("The vector database: namespaces, items, search, files, backups.")


@command(app, "namespaces", examples=("agentic-flow db namespaces", "agentic-flow db namespaces --json"))
def namespaces(session: Session, tenant: TenantOption = None) -> None:
    """List the namespaces with what was fixed when they were made."""
    from agentic_flow.cli.output import print_table

    found = on_store(session, tenant, lambda store, who: store.namespaces(who))
    session.show(
        found,
        lambda: print_table(
            ("namespace", "items", "documents", "dimension", "metric", "vectors kept as", "embedder"),
            [
                (n.name, n.items, n.documents, n.dimension, n.metric, n.quantization, n.embedder_id)
                for n in found
            ],
        ),
    )


@command(
    app,
    "create",
    examples=(
        "agentic-flow db create notes",
        "agentic-flow db create images --dimension 512 --embedder-id clip-vit-b32 --quantization f16",
    ),
)
def create(
    session: Session,
    name: NamespaceArgument,
    dimension: Annotated[
        int | None,
        typer.Option(
            "--dimension",
            help="Of the vectors that you bring. [default: the store embeds texts]",
            metavar="N",
        ),
    ] = None,
    metric: Annotated[
        Literal["cosine", "dot", "euclidean"], typer.Option("--metric", help="How vectors are compared.")
    ] = "cosine",
    quantization: Annotated[
        Literal["f32", "f16"] | None,
        typer.Option("--quantization", help="How vectors are kept. [default: yours f32, the store's f16]"),
    ] = None,
    embedder_id: Annotated[
        str | None, typer.Option("--embedder-id", help="What made the vectors that you bring.", metavar="ID")
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Make a namespace. Its dimension, metric, quantization and embedder are fixed."""
    made = on_store(
        session,
        tenant,
        lambda store, who: store.create_namespace(
            who, name, metric=metric, dimension=dimension, embedder_id=embedder_id, quantization=quantization
        ),
    )
    session.show(
        made,
        lambda: print(
            f"namespace {made.name}: {made.dimension} dimensions, {made.metric}, {made.quantization}, "
            f"embedder {made.embedder_id}"
        ),
    )


@command(app, "drop", examples=("agentic-flow db drop notes", "agentic-flow db drop notes --yes"))
def drop(
    session: Session,
    name: NamespaceArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    tenant: TenantOption = None,
) -> None:
    """Remove a namespace and all its items. Asks first; without a terminal it needs --yes."""
    import sys

    from agentic_flow.core.errors import InvalidInput, NotFound

    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(f"dropping {name!r} needs a yes and there is no terminal", hint="add --yes")
        typer.confirm(f"Remove namespace {name!r} and all its items?", abort=True, err=True)
    if not on_store(session, tenant, lambda store, who: store.delete_namespace(who, name)):
        raise NotFound(f"there is no namespace {name!r}", hint="see `agentic-flow db namespaces`")
    session.show({"name": name, "dropped": True}, lambda: print(f"namespace {name} dropped"))


@command(
    app,
    "put",
    examples=(
        'agentic-flow db put notes --id n1 --text "The kettle switches off at 96 °C."',
        'agentic-flow db put images --id cat.jpg --vector-file cat.json --metadata \'{"label": "cat"}\'',
    ),
)
def put(
    session: Session,
    name: NamespaceArgument,
    item_id: Annotated[
        str, typer.Option("--id", help="Of the item; one that exists is replaced.", metavar="ID")
    ],
    text: Annotated[str, typer.Option("--text", help="What it says.", metavar="TEXT")] = "",
    metadata: Annotated[str, typer.Option("--metadata", help="A JSON object.", metavar="JSON")] = "{}",
    vector_file: Annotated[
        Path | None,
        typer.Option("--vector-file", help="Its vector: a JSON list of numbers, or .npy.", metavar="FILE"),
    ] = None,
    expires_in_s: Annotated[
        float | None, typer.Option("--expires-in", help="Seconds until it is gone.", metavar="SECONDS", min=0)
    ] = None,
    valid_from: Annotated[
        str | None, typer.Option("--valid-from", help="Searches see it from this time on.", metavar="TIME")
    ] = None,
    valid_until: Annotated[
        str | None, typer.Option("--valid-until", help="Searches see it before this time.", metavar="TIME")
    ] = None,
    expected_version: Annotated[
        int | None,
        typer.Option("--expected-version", help="Refuse unless it is at this version (0: new).", metavar="N"),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Insert an item, or replace the one with its id. For many at once, see `db import`."""
    import time

    from agentic_flow.core.vectors import Item

    item = Item(
        id=item_id,
        text=text,
        metadata=read_object(metadata, "--metadata"),
        vector=read_vector(vector_file),
        expires_at_s=None if expires_in_s is None else time.time() + expires_in_s,
        valid_from_s=read_time(valid_from, "--valid-from"),
        valid_until_s=read_time(valid_until, "--valid-until"),
    )
    done = on_store(
        session,
        tenant,
        lambda store, who: store.upsert(who, name, [item], expected_version=expected_version),
    )
    verb = "inserted" if done.inserted else "replaced"
    session.show(done, lambda: print(f"{item_id} {verb}, version {done.versions[0]}"))


@command(app, "get", examples=("agentic-flow db get notes n1", "agentic-flow db get notes n1 n2 --json"))
def get(
    session: Session,
    name: NamespaceArgument,
    ids: Annotated[list[str], typer.Argument(help="Ids of items.", metavar="ID...")],
    tenant: TenantOption = None,
) -> None:
    """Show items. Ids that do not exist are named on stderr, and the command ends with 4."""
    from agentic_flow.cli.output import talk

    found = on_store(session, tenant, lambda store, who: store.get(who, name, ids))

    def human() -> None:
        for item in found:
            _print_item(item)

    session.show([_shown(item) for item in found], human)
    missing = sorted(set(ids) - {item.id for item in found})
    if missing:
        talk(f"not found: {', '.join(missing)}")
        raise typer.Exit(4)


@command(
    app,
    "delete",
    examples=(
        "agentic-flow db delete notes n1 n2",
        'agentic-flow db delete notes --where \'{"lang": "py"}\'',
    ),
)
def delete(
    session: Session,
    name: NamespaceArgument,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of items.", metavar="ID...")] = None,
    where: WhereOption = None,
    tenant: TenantOption = None,
) -> None:
    """Delete items by id, or those that pass a filter. Says how many there were."""
    from agentic_flow.core.errors import InvalidInput

    condition = read_where(where)
    if bool(ids) == (condition is not None):
        raise InvalidInput("give either ids or --where", hint="see `agentic-flow db delete --help`")
    count = on_store(
        session,
        tenant,
        lambda store, who: (
            store.delete(who, name, ids or [])
            if condition is None
            else store.delete_where(who, name, condition)
        ),
    )
    session.show({"deleted": count}, lambda: print(f"{count} deleted"))


@command(
    app,
    "list",
    examples=(
        "agentic-flow db list notes",
        'agentic-flow db list notes --where \'{"due": {"before": "2026-12-01T00:00Z"}}\' --limit 20',
    ),
)
def list_items(
    session: Session,
    name: NamespaceArgument,
    where: WhereOption = None,
    limit: Annotated[int, typer.Option("--limit", help="Most items.", metavar="N", min=1, max=1000)] = 50,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page ended.", metavar="CURSOR")
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """List items by id, one page at a time."""
    from agentic_flow.cli.output import local_time, print_table, talk

    page = on_store(
        session,
        tenant,
        lambda store, who: store.list_items(who, name, where=read_where(where), limit=limit, cursor=cursor),
    )

    def human() -> None:
        print_table(
            ("id", "version", "updated", "metadata", "text"),
            [
                (i.id, i.version, local_time(i.updated_at_s), _compact(i), head(i.text, 50))
                for i in page.items
            ],
        )
        if page.cursor:
            talk(f"more: --cursor {page.cursor}")

    session.show({"items": [_shown(item) for item in page.items], "cursor": page.cursor}, human)


@command(
    app,
    "search",
    examples=(
        'agentic-flow db search notes "when does the kettle switch off"',
        'agentic-flow db search notes kettle -k 3 --where \'{"room": "kitchen"}\' --explain',
        "agentic-flow db search images --vector-file cat.json --exact",
    ),
)
def search(
    session: Session,
    name: NamespaceArgument,
    text: Annotated[str, typer.Argument(help="What to look for.", metavar="TEXT")] = "",
    k: Annotated[int, typer.Option("-k", help="Most hits.", metavar="N", min=1, max=1000)] = 10,
    where: WhereOption = None,
    vector_file: Annotated[
        Path | None,
        typer.Option("--vector-file", help="Search by this vector: a JSON list, or .npy.", metavar="FILE"),
    ] = None,
    mode: Annotated[
        Literal["hybrid", "vector", "text"], typer.Option("--mode", help="Both sides, or one of them.")
    ] = "hybrid",
    fusion: Annotated[
        Literal["zscore", "rrf"], typer.Option("--fusion", help="How both sides are put together.")
    ] = "zscore",
    mmr: Annotated[
        float | None,
        typer.Option(
            "--mmr",
            help="Diversify: 1 is relevance alone, lower is more variety.",
            metavar="LAMBDA",
            min=0,
            max=1,
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector; ask no index.")] = False,
    ef: Annotated[
        int | None,
        typer.Option("--ef", help="Candidates that the index looks at.", metavar="N", min=1, max=10_000),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="What is valid then. [default: now]", metavar="TIME")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show what made each score.")] = False,
    tenant: TenantOption = None,
) -> None:
    """Find the items nearest in meaning or words. Says which embedder and which index answered."""
    from agentic_flow.core.vectors import SearchQuery

    query = SearchQuery(
        text=text,
        vector=read_vector(vector_file),
        k=k,
        mode=mode,
        filter=read_where(where),
        mmr_lambda=mmr,
        fusion=fusion,
        exact=exact,
        ef=ef,
        at_s=read_time(at, "--at"),
        explain=explain,
    )
    result = on_store(session, tenant, lambda store, who: store.search(who, name, query))
    hits = [{**hit.model_dump(mode="json"), "item": _shown(hit.item)} for hit in result.hits]
    session.show(
        {**result.model_dump(mode="json", exclude={"hits"}), "hits": hits},
        lambda: _print_result(result, explain),
    )


@command(app, "stats", examples=("agentic-flow db stats", "agentic-flow db stats --json"))
def stats(session: Session, tenant: TenantOption = None) -> None:
    """Rows, bytes, index tier and lag of every namespace.

    The lag counts changes that the index has not taken in; searches look at those rows themselves. The
    sequence counts the calls of all tenants: a service tells it only to keys with the scope platform:admin.
    """
    from agentic_flow.cli.output import print_table

    found = on_store(session, tenant, lambda store, who: store.stats(who))
    session.show(
        found,
        lambda: print_table(
            ("namespace", "items", "documents", "texts", "vectors", "index", "tier", "lag", "sequence"),
            [
                (
                    one.name,
                    one.items,
                    one.documents,
                    size(one.text_bytes),
                    size(one.vector_bytes),
                    size(one.index_bytes),
                    one.tier,
                    one.index_lag,
                    one.sequence,
                )
                for one in found
            ],
        ),
    )


def _print_result(result: SearchResult, explain: bool) -> None:
    from agentic_flow.cli.output import print_table, talk

    parts = sorted({part for hit in result.hits for part in hit.score_parts}) if explain else []
    print_table(
        ("#", "score", *parts, "id", "metadata", "text"),
        [
            (
                number,
                f"{hit.score:.3g}",
                *(f"{hit.score_parts[part]:.3g}" if part in hit.score_parts else "-" for part in parts),
                hit.item.id,
                _compact(hit.item),
                head(hit.item.text, 50),
            )
            for number, hit in enumerate(result.hits, start=1)
        ],
    )
    kind = "semantic" if result.semantic else "not semantic"
    count = f"{len(result.hits)} hit{'' if len(result.hits) == 1 else 's'}"
    if result.mode == "text":
        talk(f"{count} by full text alone")
    else:
        talk(f"{count}, {result.mode}, embedder {result.embedder_id} ({kind}), index: {result.tier}")


def _print_item(item: Item) -> None:
    from agentic_flow.cli.output import local_time

    print(f"{item.id}  version {item.version}, updated {local_time(item.updated_at_s)}")
    for label, value in (
        ("metadata", json.dumps(item.metadata, ensure_ascii=False) if item.metadata else None),
        ("vector", item.vector),
        ("document", item.document),
        ("expires", local_time(item.expires_at_s) if item.expires_at_s else None),
        ("valid from", local_time(item.valid_from_s) if item.valid_from_s else None),
        ("valid until", local_time(item.valid_until_s) if item.valid_until_s else None),
    ):
        if value is not None:
            print(f"  {label}: {value}")
    for line in item.text.splitlines():
        print(f"  {line}".rstrip())


def _shown(item: Item) -> dict[str, object]:
    """The item as JSON: an absent vector is left out, a present one is base64 as in exports."""
    values = item.model_dump(mode="json", context={"vectors": "base64"})
    if values["vector"] is None:
        del values["vector"]
    return values


def _compact(item: Item) -> str:
    return head(json.dumps(item.metadata, ensure_ascii=False), 50) if item.metadata else "-"


db_files.register(app)
db_operations.register(app)
