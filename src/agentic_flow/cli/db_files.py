"""`agentic-flow db export|import|plot|recall-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from agentic_flow.cli.db_session import (
    NamespaceArgument,
    TenantOption,
    WhereOption,
    on_store,
    progress_bar,
    read_where,
    size,
)
from agentic_flow.cli.session import Session, command

FileArgument = Annotated[Path, typer.Argument(help="The file.", metavar="FILE")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]


def register(app: typer.Typer) -> None:
    """Give the commands their place."""
    command(
        app,
        "export",
        examples=(
            "agentic-flow db export notes notes.jsonl.gz",
            "agentic-flow db export notes notes.parquet --overwrite",
        ),
    )(export_file)
    command(
        app,
        "import",
        examples=(
            "agentic-flow db import notes notes.jsonl.gz",
            "agentic-flow db import papers papers.parquet --id-column doi --text-column abstract "
            "--vector-column emb",
            "agentic-flow db import notes mixed.jsonl --on-error skip",
        ),
    )(import_file)
    command(
        app,
        "recall-check",
        examples=(
            "agentic-flow db recall-check notes",
            "agentic-flow db recall-check notes --samples 500 -k 20 --at-least 0.99",
        ),
    )(recall_check)
    command(
        app,
        "plot",
        examples=(
            "agentic-flow db plot notes notes.png",
            "agentic-flow db plot notes notes.svg --color-by topic",
        ),
    )(plot)


def export_file(
    session: Session,
    name: NamespaceArgument,
    file: FileArgument,
    format: Annotated[
        Literal["jsonl", "parquet"] | None,
        typer.Option("--format", help="By default the ending tells: .jsonl, .jsonl.gz or .parquet."),
    ] = None,
    overwrite: OverwriteOption = False,
    tenant: TenantOption = None,
) -> None:
    """Write a namespace into a file that `db import` brings back as it was.

    The file appears under its name once it is whole. Rows that are written meanwhile may be in it or not.
    """
    from agentic_flow.agentdb.transfer import export_namespace

    with progress_bar(f"export {name}") as progress:
        report = on_store(
            session,
            tenant,
            lambda store, who: export_namespace(
                store, who, name, file, format=format, overwrite=overwrite, progress=progress
            ),
        )
    session.show(
        report,
        lambda: print(
            f"{report.items} items and {report.documents} documents in {report.path} "
            f"({size(report.size_bytes)}), digest {report.digest[:16]}"
        ),
    )


def import_file(
    session: Session,
    name: NamespaceArgument,
    file: FileArgument,
    format: Annotated[
        Literal["jsonl", "parquet"] | None, typer.Option("--format", help="By default the file itself tells.")
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", help="Most rows of one call: all or none of them.", metavar="N", min=1, max=10_000
        ),
    ] = 1000,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option("--on-error", help="At a row that is no good: stop, or count it."),
    ] = "stop",
    id_column: Annotated[
        str | None, typer.Option("--id-column", help="Of a foreign file. [default: id]", metavar="NAME")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="Of a foreign file. [default: text]", metavar="NAME")
    ] = None,
    vector_column: Annotated[
        str | None,
        typer.Option("--vector-column", help="Of a foreign file. [default: vector]", metavar="NAME"),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", help="Column that is not read; may be repeated.", metavar="NAME"),
    ] = None,
    metric: Annotated[
        Literal["cosine", "dot", "euclidean"] | None,
        typer.Option("--metric", help="Of a namespace made for a foreign file. [default: cosine]"),
    ] = None,
    embedder_id: Annotated[
        str | None,
        typer.Option("--embedder-id", help="What made the vectors of a foreign file.", metavar="ID"),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Store a file's rows in a namespace, which is made if it does not exist.

    An export of ours comes back as it was, versions and times included, and is checked against its digest.
    Of any other JSON Lines or Parquet file the columns that are not named become metadata, and rows replace
    those of their ids. When it stops, the batches before are stored; the error says how many rows that is.
    """
    from agentic_flow.agentdb import transfer
    from agentic_flow.agentdb.transfer_files import Columns
    from agentic_flow.cli.output import talk

    columns = Columns(id_column, text_column, vector_column, frozenset(leave_out or ()))
    with progress_bar(f"import {name}") as progress:
        report = on_store(
            session,
            tenant,
            lambda store, who: transfer.import_file(
                store,
                who,
                name,
                file,
                format=format,
                batch_items=batch,
                on_error=on_error,
                columns=columns,
                metric=metric,
                embedder_id=embedder_id,
                progress=progress,
            ),
        )

    def human() -> None:
        checked = ", verified by its digest" if report.verified else ""
        print(f"{report.items} items and {report.documents} documents stored in {name}{checked}")

    session.show(report, human)
    if report.skipped:
        talk(f"{report.skipped} rows skipped:")
        for problem in report.problems:
            talk(f"  {problem}")
        if report.skipped > len(report.problems):
            talk(f"  … {report.skipped - len(report.problems)} more")


def recall_check(
    session: Session,
    name: NamespaceArgument,
    samples: Annotated[
        int, typer.Option("--samples", help="How many items to search with.", metavar="N", min=1, max=10_000)
    ] = 100,
    k: Annotated[
        int, typer.Option("-k", help="Nearest neighbours compared.", metavar="N", min=1, max=999)
    ] = 10,
    where: WhereOption = None,
    ef: Annotated[
        int | None,
        typer.Option("--ef", help="Candidates that the index looks at.", metavar="N", min=1, max=10_000),
    ] = None,
    at_least: Annotated[
        float | None,
        typer.Option("--at-least", help="End with 1 below this recall.", metavar="RECALL", min=0, max=1),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the samples.", metavar="N")] = 0,
    tenant: TenantOption = None,
) -> None:
    """Measure the index on your own data: its recall and latency against exact search.

    Searches with the vectors of random items of the namespace; each item itself is left out of both answers.
    A filter narrows what is searched, not what is searched with. A hit as near as the last true one counts.
    """
    from agentic_flow.agentdb.recall import check_recall
    from agentic_flow.cli.output import print_table, talk

    with progress_bar(f"search {name}") as progress:
        report = on_store(
            session,
            tenant,
            lambda store, who: check_recall(
                store,
                who,
                name,
                samples=samples,
                k=k,
                where=read_where(where),
                ef=ef,
                seed=seed,
                progress=progress,
            ),
        )

    def human() -> None:
        print_table(
            ("search", f"recall@{report.k}", "worst", "p50", "p95"),
            [
                (
                    report.tier if report.tier != "exact" else "index",
                    f"{report.recall:.4f}",
                    f"{report.recall_min:.2f}",
                    f"{report.index.p50_ms:.2f} ms",
                    f"{report.index.p95_ms:.2f} ms",
                ),
                ("exact", "1.0000", "1.00", f"{report.exact.p50_ms:.2f} ms", f"{report.exact.p95_ms:.2f} ms"),
            ],
        )
        talk(f"{report.samples} of {report.items} items as queries, the item itself left out")
        if report.tier == "exact":
            talk("so few rows are compared one by one: there is no index that could miss any")
        if report.short:
            talk(f"{report.short} searches gave fewer hits than there are")

    session.show(report, human)
    if at_least is not None and report.recall < at_least:
        talk(f"recall {report.recall:.4f} is below {at_least}")
        raise typer.Exit(1)


def plot(
    session: Session,
    name: NamespaceArgument,
    file: Annotated[Path, typer.Argument(help="Ends in .png or .svg.", metavar="FILE")],
    color_by: Annotated[
        str | None,
        typer.Option("--color-by", help="Key of the metadata that gives the colours.", metavar="KEY"),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Most points, drawn at random.", metavar="N", min=1, max=100_000)
    ] = 5000,
    where: WhereOption = None,
    overwrite: OverwriteOption = False,
    tenant: TenantOption = None,
) -> None:
    """Draw a namespace in two dimensions, its first two principal components.

    The axes say how much of the variance they show. Needs matplotlib (the extra `plot`).
    """
    from agentic_flow.agentdb.projection import plot_namespace

    with progress_bar(f"read {name}") as progress:
        report = on_store(
            session,
            tenant,
            lambda store, who: plot_namespace(
                store,
                who,
                name,
                file,
                color_by=color_by,
                limit=limit,
                where=read_where(where),
                overwrite=overwrite,
                progress=progress,
            ),
        )
    shown = sum(report.explained)
    session.show(
        report,
        lambda: print(
            f"{report.points} of {report.items} items in {report.path}, {shown:.1%} of the variance shown"
        ),
    )
